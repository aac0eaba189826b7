"""Offsets of rows and columns: a call computes a part of something longer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense

WHOLE = 96


@mf.mask
def packed(b, h, q, kv, *, doc):
    return doc[b, q] == doc[b, kv] and q >= kv - h


DOC = (torch.arange(WHOLE) // torch.tensor([[20], [33]])).contiguous()
MASKS = {
    "causal": (mf.causal(), {}),
    "window": (mf.sliding_window(7, 3), {}),
    "global": (mf.causal() & (mf.global_tokens(3) | mf.sliding_window(9)), {}),
    "remainders": (mf.mask(lambda b, h, q, kv: (q - 2 * kv) % 5 < 2), {}),
    "documents": (packed, {"doc": DOC}),
    "branches": (mf.mask(lambda b, h, q, kv: q >= kv if kv >= 0 else q % 2 == 0), {}),
}


@st.composite
def offsets(draw, low):
    """An int, or one for each of two batch rows."""
    one = st.integers(low, WHOLE - 40)
    return draw(st.one_of(one, st.lists(one, min_size=2, max_size=2).map(torch.tensor)))


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=12)
@given(data=st.data(), q_len=st.integers(1, 40), kv_len=st.integers(1, 40))
def test_a_call_with_offsets_is_the_part_that_they_say(name, data, q_len, kv_len):
    mask, mask_args = MASKS[name]
    low = 0 if mask_args else -50  # a table has no row before its first
    given_offsets = {side: data.draw(offsets(low)) for side in ("q_offset", "kv_offset")}
    assert_matches_dense(mask, Shape(2, 2, 2, q_len, kv_len, 8, 8), block_size=16, **given_offsets, **mask_args)


def test_rows_and_columns_are_cut_out_of_the_whole():
    whole = packed.dense(WHOLE, WHOLE, batch=2, heads=2, doc=DOC)
    part = packed.at(20, 30, batch=2, heads=2, q_offset=40, kv_offset=25, doc=DOC)
    assert torch.equal(part.dense(), whole[:, :, 40:60, 25:55])
    shifted = packed.at(20, 30, batch=2, heads=2, q_offset=torch.tensor([40, 3]), kv_offset=25, doc=DOC).dense()
    assert torch.equal(shifted[1], whole[1, :, 3:23, 25:55])


def test_attention_over_parts_of_the_keys_is_merged_into_that_over_all():
    q, k, v = torch.randn(3, 2, 2, WHOLE, 8).unbind()
    attn = mf.compile(packed)
    parts = [
        attn(q, k[:, :, at : at + 32], v[:, :, at : at + 32], kv_offset=at, return_lse=True, doc=DOC)
        for at in range(0, WHOLE, 32)
    ]
    out, lse = attn(q, k, v, return_lse=True, doc=DOC)
    merged = mf.merge(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, (out, lse))


@pytest.mark.parametrize("offset", [3, torch.tensor([3, 9])], ids=["int", "tensor"])
def test_a_compiled_call_takes_them(offset):
    q, k, v = (torch.randn(2, 2, n, 8) for n in (20, 30, 30))
    attn = mf.compile(packed)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours = attn(q, k, v, q_offset=40, kv_offset=offset, doc=DOC)
        torch.testing.assert_close(compiled(q, k, v, q_offset=40, kv_offset=offset, doc=DOC), ours)
        offset = offset + 1


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.5, mf.ArgumentTypeError, "kv_offset is 1.5"),
        (2**61, mf.ArgumentError, "kv_offset is 2305843009213693952"),
        (torch.zeros(3, dtype=torch.long), mf.ArgumentError, r"kv_offset has shape \(3,\)"),
        (torch.tensor([0, 2**61]), mf.ArgumentError, "an entry of kv_offset is 2305843009213693952"),
    ],
)
def test_what_is_no_offset_is_refused(value, error, message):
    q, k, v = torch.randn(3, 2, 2, 20, 8).unbind()
    with pytest.raises(error, match=message):
        mf.attention(q, k, v, packed, kv_offset=value, doc=DOC)
