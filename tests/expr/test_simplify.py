"""Rewriting makes expressions smaller and never changes a pair, nor hides a fault."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.errors import MaskIndexError
from maskflash.expr.evaluate import Inputs, evaluate
from maskflash.expr.nodes import Builder
from maskflash.expr.simplify import simplify

TABLE = torch.tensor([0, 1, 2, 1, 0])
BOOLEAN = ["and", "or", "bitand", "bitor", "bitxor"]


class Draft:
    """A builder with names for what the tests combine."""

    def __init__(self):
        self.builder = Builder()
        self.q, self.kv = (self.builder.add(name, dtype=torch.int64) for name in ("q", "kv"))
        self.x = self.builder.add("lt", self.q, self.kv)
        self.y = self.builder.add("eq", self.kv, self.builder.add("param", dtype=torch.int64, weak=True, value=0))
        self.read = self.builder.add("lookup", self.q, dtype=torch.int64, value=0)
        self.fault = self.builder.add("eq", self.read, self.kv)
        self.true, self.false = self.builder.const(True), self.builder.const(False)

    def __getattr__(self, op):
        return lambda *args: self.builder.add(op.rstrip("_"), *args)

    def simplified(self, root):
        return simplify(self.builder.finish(root))

    def same(self, root, expected):
        assert self.simplified(root) == simplify(self.builder.finish(expected))


@pytest.fixture
def d():
    return Draft()


def test_constants_fold(d):
    d.same(d.and_(d.true, d.x), d.x)
    d.same(d.and_(d.x, d.true), d.x)
    d.same(d.or_(d.false, d.x), d.x)
    d.same(d.bitand(d.x, d.true), d.x)
    d.same(d.not_(d.not_(d.x)), d.x)
    d.same(d.or_(d.x, d.x), d.x)
    d.same(d.select(d.x, d.y, d.y), d.y)
    d.same(d.select(d.x, d.true, d.false), d.x)
    d.same(d.select(d.true, d.x, d.y), d.x)
    either = d.bitxor(d.x, d.y)
    d.same(d.select(d.not_(either), d.q, d.kv), d.select(either, d.kv, d.q))
    assert [node.value for node in d.simplified(d.and_(d.false, d.fault)).nodes] == [False]
    assert [node.value for node in d.simplified(d.or_(d.x, d.true)).nodes] == [True]


def test_truths_chosen_by_a_condition_become_connectives(d):
    d.same(d.select(d.x, d.true, d.y), d.or_(d.x, d.y))
    d.same(d.select(d.x, d.y, d.false), d.and_(d.x, d.y))
    d.same(d.select(d.x, d.false, d.y), d.and_(d.ge(d.q, d.kv), d.y))
    d.same(d.select(d.x, d.y, d.true), d.or_(d.ge(d.q, d.kv), d.y))


def test_negation_reaches_comparisons_of_integers_only(d):
    opposites = {"lt": "ge", "le": "gt", "eq": "ne"}
    for op, opposite in [*opposites.items(), *((b, a) for a, b in opposites.items())]:
        assert d.simplified(d.not_(getattr(d, op)(d.q, d.kv))).nodes[-1].op == opposite
    real = d.builder.add("cast", d.q, dtype=torch.float32)
    assert d.simplified(d.not_(d.lt(real, d.kv))).nodes[-1].op == "not"  # NaN is neither less nor not less
    assert d.simplified(d.not_(d.eq(real, d.kv))).nodes[-1].op == "ne"


def test_comparing_a_value_with_itself(d):
    assert d.simplified(d.le(d.q, d.q)).nodes[-1].value is True
    assert d.simplified(d.lt(d.q, d.q)).nodes[-1].value is False
    assert d.simplified(d.eq(d.read, d.read)).nodes[-1].op == "eq"  # it may be out of range
    real = d.builder.add("cast", d.q, dtype=torch.float32)
    assert d.simplified(d.eq(real, real)).nodes[-1].op == "eq"  # it may be NaN


def test_faults_are_not_dropped(d):
    for root in (
        d.and_(d.fault, d.false),
        d.bitand(d.false, d.fault),
        d.bitor(d.fault, d.true),
        d.or_(d.fault, d.true),
        d.select(d.fault, d.x, d.x),
        d.select(d.fault, d.true, d.true),
        d.and_(d.bitor(d.fault, d.true), d.x),
    ):
        expr = d.simplified(root)
        assert any(node.op == "lookup" for node in expr.nodes), expr
        index = {name: torch.tensor([7]) for name in ("b", "h", "q", "kv")}
        with pytest.raises(MaskIndexError):
            evaluate(expr, Inputs((3,), (TABLE,)), index)


def test_params_are_never_folded(d):
    n, m = (d.builder.add("param", dtype=torch.int64, weak=True, value=slot) for slot in (0, 1))
    assert d.simplified(d.eq(n, m)).nodes[-1].op == "eq"


def test_a_result_keeps_its_dtype_and_weakness(d):
    """`uint8 == (300 if True else q)`: the branch that is left must not become a Python number again."""
    byte = d.builder.add("cast", d.q, dtype=torch.uint8)
    number = d.builder.add("param", dtype=torch.int64, weak=True, value=0)
    chosen = d.select(d.true, number, d.kv)
    root = d.builder.finish(d.eq(byte, chosen))
    index = {name: torch.arange(50) for name in ("b", "h", "q", "kv")}
    for expr in (root, simplify(root)):
        assert not evaluate(expr, Inputs((300,), ()), index).any()


def test_simplifying_twice_changes_nothing(d):
    root = d.builder.finish(d.select(d.x, d.select(d.y, d.true, d.x), d.not_(d.or_(d.x, d.false))))
    once = simplify(root)
    assert simplify(once) == once


@st.composite
def drafts(draw):
    """A random graph of truths over q, kv, constants and a look-up that may fault."""
    d = Draft()
    truths = [d.x, d.y, d.fault, d.true, d.false]
    pick = st.sampled_from
    for _ in range(draw(st.integers(1, 9))):
        op = draw(pick([*BOOLEAN, "not", "bitnot", "select", "lt", "ne", "eq"]))
        arity = {"not": 1, "bitnot": 1, "select": 3}.get(op, 2)
        truths.append(d.builder.add(op, *(draw(pick(truths)) for _ in range(arity))))
    return d.builder.finish(truths[-1])


@given(expr=drafts())
@settings(max_examples=150)
def test_every_pair_keeps_its_truth_and_its_fault(expr):
    inputs = Inputs((2,), (TABLE,))
    simple = simplify(expr)
    assert len(simple.nodes) <= len(expr.nodes) + 3
    for q in range(7):
        for kv in range(4):
            index = {name: torch.tensor(kv if name == "kv" else q) for name in ("b", "h", "q", "kv")}
            outcomes = []
            for candidate in (expr, simple):
                try:
                    outcomes.append(bool(evaluate(candidate, inputs, index)))
                except MaskIndexError:
                    outcomes.append("fault")
            assert outcomes[0] == outcomes[1], f"{expr}\n->\n{simple}"


@pytest.mark.parametrize("n", [1, 7, -3, 64])
def test_a_number_less_its_remainder_is_aligned(d, n):
    divisor = d.builder.const(n)
    rounded = d.sub(d.q, d.mod(d.q, divisor))
    simple = d.simplified(d.ge(d.kv, rounded))
    assert "mod" not in {node.op for node in simple.nodes}
    q, kv = torch.arange(-40, 200)[:, None], torch.arange(200)
    zero = torch.tensor(0)
    assert torch.equal(evaluate(simple, Inputs(), {"b": zero, "h": zero, "q": q, "kv": kv}), kv >= q - q % n)


def test_a_remainder_by_zero_is_still_a_fault(d):
    zero = d.builder.const(0)
    simple = d.simplified(d.ge(d.kv, d.sub(d.q, d.mod(d.q, zero))))
    assert "mod" in {node.op for node in simple.nodes}
