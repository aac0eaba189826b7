"""Column intervals say what FlashMask's rule says, row by row, in any company; and refuse what has no meaning."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, columns

LENGTH = st.integers(0, 40)
ENDS = torch.tensor([3, 3, 3, 6, 6, 6], dtype=torch.int32)


def rule(mask, q_len, kv_len, batch, heads):
    """The definition, written out over all pairs."""
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    vectors = {
        name: x.expand(batch, -1, -1).repeat_interleave(heads // x.shape[1], 1)[:, :, None]
        for name, x in mask.vectors().items()
    }
    hidden = (i >= vectors["lts"]) & (i < vectors.get("lte", q_len))
    if "ute" in vectors:
        hidden = hidden | ((i >= vectors.get("uts", 0)) & (i < vectors["ute"]))
    if mask.causal:
        hidden = hidden | (i < j - (kv_len - q_len))
    return ~hidden


@settings(max_examples=200)
@given(st.data(), LENGTH, LENGTH)
def test_they_are_the_rule(data, q_len, kv_len):
    mask = data.draw(columns(q_len, kv_len, 2, 4))
    assert torch.equal(mask.dense(q_len, kv_len, batch=2, heads=4), rule(mask, q_len, kv_len, 2, 4))


@given(st.data(), st.integers(1, 40), st.integers(1, 40))
def test_they_combine_pickle_move_and_come_from_indices(data, q_len, kv_len):
    x, y = data.draw(columns(q_len, kv_len, 2, 4)), data.draw(columns(q_len, kv_len, 2, 4))
    sizes = {"batch": 2, "heads": 4}
    bits, others = (mask.dense(q_len, kv_len, **sizes) for mask in (x, y))
    assert torch.equal((x & y).dense(q_len, kv_len, **sizes), bits & others)
    assert torch.equal((x | ~y).dense(q_len, kv_len, **sizes), bits | ~others)
    window = mf.sliding_window(3, 2)
    assert torch.equal((x ^ window).dense(q_len, kv_len, **sizes), bits ^ window.dense(q_len, kv_len))
    assert torch.equal(pickle.loads(pickle.dumps(x)).dense(q_len, kv_len, **sizes), bits)
    again = mf.ColumnIntervals.from_flashmask(x.startend_row_indices, x.causal)
    assert torch.equal(again.dense(q_len, kv_len, **sizes), bits)
    assert x.to("cpu") is x and x.to("meta").lts.is_meta


@settings(max_examples=60)
@given(st.data(), st.integers(0, 70), st.integers(0, 70), st.sampled_from([1, 2, 4]))
def test_attention_under_them_is_dense_attention(data, q_len, kv_len, kv_heads):
    mask = data.draw(columns(q_len, kv_len, 2, 4))
    block = data.draw(st.sampled_from([16, (16, 32)]))
    assert_matches_dense(mask, Shape(2, 4, kv_heads, q_len, kv_len, 8, 12), block_size=block)


@settings(max_examples=15)
@given(st.data(), st.integers(1, 32), st.integers(1, 32), st.sampled_from([torch.float32, torch.float16]))
def test_and_in_triton(data, q_len, kv_len, dtype):
    mask = data.draw(columns(q_len, kv_len, 2, 2))
    assert_matches_dense(mask, Shape(2, 2, 1, q_len, kv_len, 16, 16), block_size=16, dtype=dtype, backend="triton")


def test_vectors_are_loaded_once_for_a_column_of_tiles():
    """They stand before the walk over rows, so that each program of dK/dV reads them once; no pair reads them."""
    q, k, v = torch.randn(3, 1, 2, 6, 16).unbind()
    gaps = mf.mask(lambda b, h, q, kv: (q * 7 + kv * 3) % 5 < 4)  # else rows see one interval, and no vector is read
    attn = mf.compile(mf.ColumnIntervals(ENDS, ENDS, ENDS - 3, ENDS - 2, causal=True) & gaps)
    text = attn.source(q, k, v, pass_name="dkdv")
    before, walk = text.split("for _ in tl.range(0, steps, disable_licm=True):")[1:3]
    assert before.count("tl.load(t") == 4 and "tl.load(t" not in walk
    assert not any("tl.load(t" in line and "[None, :]" in line and "[:, None]" in line for line in text.splitlines())


def test_vectors_are_read_by_reference_and_traced_once():
    first, second = ENDS.clone(), ENDS.clone()
    mask = mf.ColumnIntervals(first, causal=True)
    assert int(mask.dense(6, 6).sum()) == 12
    first[:3] = 6
    assert int(mask.dense(6, 6).sum()) == 21
    other = mf.ColumnIntervals(second, causal=True)
    call = {"kv_len - q_len": 0}
    assert mask.traced(call).expr is other.traced(call).expr


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mf.ColumnIntervals(None), mf.ArgumentError, "lts is None"),
        (lambda: mf.ColumnIntervals(ENDS, uts=ENDS), mf.ArgumentError, "uts without ute"),
        (lambda: mf.ColumnIntervals(ENDS.float()), mf.ArgumentTypeError, "lts has dtype torch.float32"),
        (lambda: mf.ColumnIntervals(ENDS, ENDS[:5]), mf.ArgumentError, r"lte has shape \(5,\), expected .*\(6,\)"),
        (lambda: mf.ColumnIntervals(ENDS, ENDS.to("meta")), mf.ArgumentError, "lte is on meta, expected cpu"),
        (lambda: mf.ColumnIntervals(ENDS.view(1, 1, 2, 3)), mf.ArgumentError, "lts has shape .*expected a 1-d or 2-d"),
        (
            lambda: mf.ColumnIntervals(torch.tensor([1, 2, 1 << 40, 1 << 41])),
            mf.ArgumentError,
            "lts is 1099511627776 at column 2, expected a 32-bit row number",
        ),
        (
            lambda: mf.ColumnIntervals(ENDS.view(1, 6)[:0]),
            mf.ArgumentError,
            r"shape \(0, 6\), expected batch and heads",
        ),
        (lambda: mf.ColumnIntervals(ENDS).dense(6, 7), mf.ArgumentError, "kv_len is 7, expected 6"),
        (lambda: mf.ColumnIntervals(ENDS).dense(6, 6, q_offset=1), mf.ArgumentError, "q_offset is 1, expected 0"),
        (
            lambda: (mf.ColumnIntervals(ENDS) & mf.causal()).dense(6, 6, batch=2, q_offset=torch.tensor([0, 0])),
            mf.ArgumentError,
            "q_offset is a tensor",
        ),
        (
            lambda: mf.ColumnIntervals(ENDS.expand(3, 6)).dense(6, 6, batch=2),
            mf.ArgumentError,
            "batch is 2, expected 3",
        ),
        (
            lambda: mf.ColumnIntervals(ENDS.expand(1, 2, 6)).dense(6, 6, heads=3),
            mf.ArgumentError,
            "3 query heads, expected a multiple of the vectors' 2",
        ),
        (
            lambda: mf.compile(lambda b, h, q, kv: mf.ColumnIntervals(ENDS, causal=True)(b, h, q, kv)),
            mf.ArgumentTypeError,
            "a predicate can't call it.*combine the masks",
        ),
        (
            lambda: mf.ColumnIntervals.from_flashmask(ENDS.view(1, 1, 6, 1), False),
            mf.ArgumentError,
            "has 1 vectors in its last dimension with causal=False, expected 2 for LTS, UTE; 4",
        ),
        (
            lambda: mf.ColumnIntervals.from_flashmask(ENDS.view(1, 1, 2, 3), True),
            mf.ArgumentError,
            "has 3 vectors .*causal=True, expected 1 for LTS; 2 for LTS, LTE; 4",
        ),
        (lambda: mf.ColumnIntervals.from_flashmask(ENDS, True), mf.ArgumentError, "expected a 4-d tensor"),
    ],
)
def test_what_means_nothing_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
