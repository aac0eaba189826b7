"""Combining traces is combining the masks, pair by pair, with each run-time value in one slot."""

import pytest
import torch

from maskflash.errors import MaskIndexError
from maskflash.expr.evaluate import evaluate
from maskflash.trace.combine import combine
from maskflash.trace.trace import trace

DOC = torch.tensor([0, 0, 1, 1, 2])
SHORT = torch.tensor([1, 0])


def same_document(b, h, q, kv):
    return DOC[q] == DOC[kv]


def near(b, h, q, kv, *, n):
    return q - kv <= n and DOC[kv] < 2


def joined(op, parts):
    return combine((*parts, (op, tuple(range(len(parts))))))


OPERATIONS = {"bitand": torch.logical_and, "bitor": torch.logical_or, "bitxor": torch.logical_xor}


def seen(traced, brute, **mask_args):
    return evaluate(traced.expr, traced.bind(mask_args), brute.grid((1, 1, 5, 5)))


@pytest.mark.parametrize("op", OPERATIONS)
def test_two_masks(op, brute):
    first, second = trace(same_document), trace(near, {"n": 1})
    both = joined(op, (first, second))
    expected = OPERATIONS[op](seen(first, brute), seen(second, brute, n=1))
    assert torch.equal(seen(both, brute, n=1), expected)
    assert len(both.tables) == 1
    assert both.names == ("DOC",)
    assert both.params == ("n", 2)


def test_negation(brute):
    first = trace(same_document)
    negated = joined("not", (first,))
    assert torch.equal(seen(negated, brute), ~seen(first, brute))
    assert joined("not", (negated,)).expr == first.expr


def test_equal_ints_keep_their_own_slots_and_structure():
    def make(n):
        return trace(lambda b, h, q, kv: q - kv < n)

    texts = {joined("bitand", (make(n), make(m))).expr.text for n in (3, 4) for m in (3, 4)}
    assert len(texts) == 1
    assert joined("bitand", (make(3), make(3))).params == (3, 3)


def test_constant_masks_fold():
    everything = trace(lambda b, h, q, kv: True)
    first = trace(same_document)
    assert joined("bitand", (everything, first)).expr == first.expr
    assert joined("bitor", (everything, trace(lambda b, h, q, kv: q > 2))).expr.reads == frozenset()


def test_what_one_mask_specialises_the_combination_does():
    divided = trace(lambda b, h, q, kv, *, n: q // n == kv, {"n": 2})
    assert joined("bitor", (divided, trace(same_document))).specialised == {"n"}


def test_no_side_guards_the_other(brute):
    short = trace(lambda b, h, q, kv: SHORT[q] == 1)
    guard = trace(lambda b, h, q, kv: q < 2)
    with pytest.raises(MaskIndexError, match=r'"SHORT\[q\]" reads index 2'):
        seen(joined("bitand", (guard, short)), brute)
