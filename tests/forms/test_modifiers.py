"""Expressions as functions of tensors: the values of evaluation, whatever the offsets, and one text for all numbers."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.expr.evaluate import compute
from maskflash.forms.modifiers import modifier, written
from maskflash.testing import masks

CPU = torch.device("cpu")
OFFSET = st.sampled_from([0, -3, 5, torch.tensor([1, 4])])


def pairs(batch, heads, q_len, kv_len):
    return torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in (batch, heads, q_len, kv_len)), indexing="ij")


@settings(max_examples=40, deadline=None)
@given(masks(), st.integers(1, 24), st.integers(1, 24), OFFSET, OFFSET)
def test_masks_are_what_they_are(mask, q_len, kv_len, q_offset, kv_offset):
    sizes = {"batch": 2, "heads": 2, "q_offset": q_offset, "kv_offset": kv_offset}
    try:
        dense = mask.dense(q_len, kv_len, **sizes)
    except mf.MaskIndexError:
        assume(False)
    problem = mask.at(q_len, kv_len, **sizes).problem
    function = modifier(problem.expr, problem.inputs, problem.q_offset, problem.kv_offset, CPU)
    assert torch.equal(function(*pairs(2, 2, q_len, kv_len)).expand_as(dense), dense)


SCORES = {
    "cap": mf.scores.softcap(3.0),
    "slopes": mf.scores.alibi(),
    "bias": mf.scores.bias(torch.randn(2, 1, 9, 11)),
    "buckets": mf.scores.relative_bias(torch.randn(8, 4)),
    "several": (mf.scores.temperature(2.0), mf.scores.softcap(1.5), mf.scores.key_bias(torch.randn(11))),
    "chosen": lambda score, b, h, q, kv: torch.where(q > kv + h, score * 2, score / 2) + b,
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("q_offset", [0, 2])
def test_scores_are_what_they_are(name, q_offset):
    q_len = 9 - q_offset
    q, k = torch.randn(2, 4, q_len, 8), torch.randn(2, 4, 11, 8)
    attn = mf.compile(mf.causal(), score=SCORES[name])
    score = attn._score_in(attn._sizes(q, k, q_offset, 0), torch.float32, {})
    b, h, row, column = pairs(2, 4, q_len, 11)
    products = torch.randn(b.shape, dtype=torch.bfloat16)
    found = modifier(score.expr, score.inputs, q_offset, 0, CPU)(products, b, h, row, column)
    given_ = {"b": b.long(), "h": h.long(), "q": row.long() + q_offset, "kv": column.long()}
    expected = compute(score.expr, score.inputs, {**given_, "score": products.float()})[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.expand_as(found))


def test_a_text_is_of_all_numbers_and_tables():
    def text(n, table, offset):
        problem = mf.mask(lambda b, h, q, kv: table[kv] < q - n).at(8, 8, q_offset=offset).problem
        return modifier(problem.expr, problem.inputs, problem.q_offset, problem.kv_offset, CPU).__code__

    assert text(3, torch.arange(8), 1) is text(5, torch.arange(9), 7)


def test_what_is_written():
    problem = mf.mask(lambda b, h, q, kv: q >= kv // 2).at(8, 8).problem
    assert written(problem.expr, q_move="all").splitlines() == [
        "def make(q_offset, kv_offset, numbers, tables):",
        "    def modify(b, h, q, kv):",
        "        b, h, q, kv = b.to(int64), h.to(int64), q.to(int64), kv.to(int64)",
        "        q = q + q_offset",
        "        x0 = q",
        "        x1 = kv",
        "        x2 = q.new_full((), 2, dtype=int64)",
        "        x3 = op_floordiv(x1.to(int64), unfailing(x2.to(int64))).to(int64)",
        "        x4 = op_ge(x0.to(int64), x3.to(int64))",
        "        return x4.to(bool)",
        "    return modify",
    ]


def test_numbers_keep_all_their_bits():
    large = 2**60 + 1
    problem = mf.mask(lambda b, h, q, kv: q + large > kv + (2**60) and q % (2**60 + 3) == q).at(2, 2).problem
    function = modifier(problem.expr, problem.inputs, 0, 0, CPU)
    assert torch.equal(function(*pairs(1, 1, 2, 2)), problem.visible(*(x.long() for x in pairs(1, 1, 2, 2))))
