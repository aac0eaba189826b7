"""What answers imply of other conditions is true of every index that gives these answers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.expr.nodes import Builder
from maskflash.expr.ops import COMPARISONS, OPERATIONS
from maskflash.trace.premises import Premises

CONDITIONS = st.tuples(
    st.sampled_from(sorted(COMPARISONS)), st.sampled_from(["q", "kv"]), st.integers(-3, 4), st.booleans()
)


def holds(condition, indices):
    op, name, number, mirrored = condition
    x, y = indices[name], torch.tensor(number)
    return bool(OPERATIONS[op].compute(*((y, x) if mirrored else (x, y))))


@given(asked=st.lists(CONDITIONS, max_size=4), q=st.integers(-6, 6), kv=st.integers(0, 6), other=CONDITIONS)
@settings(max_examples=400)
def test_what_is_implied_is_so(asked, q, kv, other):
    builder = Builder()

    def node(condition):
        op, name, number, mirrored = condition
        sides = [builder.add(name, dtype=torch.int64), builder.const(number)]
        return builder.add(op, *(reversed(sides) if mirrored else sides))

    facts = Premises(builder.nodes, lambda node: float(node.value) if node.op == "const" else None)
    indices = {"q": torch.tensor(q), "kv": torch.tensor(kv)}
    for condition in asked:
        facts.learn(node(condition), holds(condition, indices))
    assert facts.implied(node(other)) in (None, holds(other, indices))
    assert q < 0 or not facts.contradict()


def test_ranges_close_to_the_last_number():
    builder = Builder()
    kv = builder.add("kv", dtype=torch.int64)
    facts = Premises(builder.nodes, lambda node: float(node.value) if node.op == "const" else None)
    facts.learn(builder.add("gt", kv, builder.const(2)), True)
    facts.learn(builder.add("lt", kv, builder.const(4)), True)
    assert facts.ranges["kv"] == (3, 3)
    assert facts.implied(builder.add("ge", kv, builder.const(3))) is True
    facts.learn(builder.add("ne", kv, builder.const(3)), False)
    assert not facts.contradict()
    facts.learn(builder.add("ge", kv, builder.const(4)), True)
    assert facts.contradict()
