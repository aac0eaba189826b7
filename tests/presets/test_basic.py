"""Basic presets: each equals its formula written with torch alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf

LENGTH = st.integers(0, 30)
NUMBER = st.integers(0, 40)


def grid(q_len, kv_len):
    return torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]


def same(mask, expected, **sizes):
    found = mask.dense(*expected.shape[-2:], **sizes)
    return torch.equal(found, expected.expand_as(found))


@given(LENGTH, LENGTH, NUMBER, NUMBER, st.integers(1, 6))
def test_windows_and_prefixes(q_len, kv_len, m, n, dilation):
    q, kv = grid(q_len, kv_len)
    every = torch.ones(q_len, kv_len, dtype=torch.bool)
    assert same(mf.full(), every)
    assert same(mf.causal(), q >= kv)
    assert same(mf.sliding_window(m, n), (kv >= q - m) & (kv <= q + n))
    assert same(mf.sliding_window(m), (kv >= q - m) & (kv <= q))
    assert same(mf.prefix_lm(n), (kv < n) | (q >= kv))
    assert same(mf.padding(n), (kv < n) & every)
    assert same(mf.global_tokens(n), (q < n) | (kv < n))
    away = (q - kv).abs()
    assert same(mf.dilated_window(m, dilation), (away <= m) & (away % dilation == 0))


def test_per_row_lengths():
    q, kv = grid(5, 5)
    lengths = torch.tensor([0, 3, 9])
    per_row = lengths[:, None, None, None]
    assert same(mf.prefix_lm(lengths), (kv < per_row) | (q >= kv), batch=3)
    assert same(mf.prefix_lm([0, 3, 9]), (kv < per_row) | (q >= kv), batch=3)
    assert same(mf.padding(lengths), (kv < per_row) & (q >= 0), batch=3)
    lengths[0] = 2  # by reference
    mask = mf.padding(lengths)
    lengths[0] = 4
    assert mask.dense(5, 5, batch=3)[0].sum() == 20


def documents(row, length):
    """The document of each token, -1 after the last."""
    ids = [number for number, size in enumerate(row) for _ in range(size)]
    return torch.tensor((ids + [-1] * length)[:length])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), LENGTH)
def test_documents_by_lengths_and_starts(row, rest):
    ids = documents(row, sum(row) + rest)
    expected = (ids[:, None] == ids[None, :]) & (ids[:, None] >= 0)
    starts = [0, *torch.tensor(row).cumsum(0).tolist()]
    for mask in (
        mf.document(lengths=row),
        mf.document(lengths=torch.tensor(row)),
        mf.document(cu_seqlens=starts),
        mf.document(cu_seqlens=torch.tensor(starts, dtype=torch.int32)),
    ):
        assert same(mask, expected)


@given(st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=4), min_size=2, max_size=3), LENGTH)
def test_documents_of_each_batch_row(rows, rest):
    ids = torch.stack([documents(row, max(map(sum, rows)) + rest) for row in rows])
    expected = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids[:, None, :, None] >= 0)
    assert same(mf.document(lengths=rows), expected, batch=len(rows))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5), LENGTH, LENGTH)
def test_documents_of_queries_and_keys_pair_up(pairs, rest, kv_rest):
    rows, columns = ([pair[side] for pair in pairs] for side in (0, 1))
    q_ids, kv_ids = documents(rows, sum(rows) + rest), documents(columns, sum(columns) + kv_rest)
    expected = (q_ids[:, None] == kv_ids[None, :]) & (q_ids[:, None] >= 0)
    starts, kv_starts = ([0, *torch.tensor(row).cumsum(0).tolist()] for row in (rows, columns))
    assert same(mf.document(lengths=rows, kv_lengths=columns), expected)
    assert same(mf.document(cu_seqlens=starts, kv_cu_seqlens=torch.tensor(kv_starts)), expected)
    assert same(mf.document(lengths=[rows, rows], kv_lengths=[columns, columns]), expected, batch=2)


def test_documents_by_ids():
    ids = torch.tensor([[2, 0, 2, 1], [0, 0, 0, 0]])
    assert same(mf.document(ids=ids), ids[:, None, :, None] == ids[:, None, None, :], batch=2)
    assert same(mf.document(ids=ids[0]), ids[0][:, None] == ids[0][None, :])
    with pytest.raises(mf.MaskIndexError, match=r"reads index 4 of a table of shape \(4,\)"):
        mf.document(ids=ids[0]).dense(5, 5)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_neighbourhoods(height, width, data):
    kernel_h, kernel_w = (data.draw(st.integers(1, side)) for side in (height, width))
    found = mf.natten(height, width, kernel_h, kernel_w).dense(height * width + 2, height * width + 2)[0, 0]
    assert not found[height * width :].any()
    assert not found[:, height * width :].any()
    for token in range(height * width):
        row, column = divmod(token, width)
        top = min(max(row - kernel_h // 2, 0), height - kernel_h)
        left = min(max(column - kernel_w // 2, 0), width - kernel_w)
        image = torch.zeros(height, width, dtype=torch.bool)
        image[top : top + kernel_h, left : left + kernel_w] = True
        assert torch.equal(found[token, : height * width], image.flatten())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: mf.sliding_window(-1),
            mf.ArgumentError,
            "left is -1, expected at least 0; pass None for a side without",
        ),
        (lambda: mf.sliding_window(3, 1.5), mf.ArgumentTypeError, "sliding_window: right is 1.5, expected an int"),
        (lambda: mf.document(), mf.ArgumentError, "got none, expected exactly one of lengths, ids and cu_seqlens"),
        (lambda: mf.document([4], cu_seqlens=[0, 4]), mf.ArgumentError, "got lengths, cu_seqlens, expected exactly"),
        (lambda: mf.document(lengths=[1, -2]), mf.ArgumentError, "lengths holds -2"),
        (lambda: mf.document([1.5]), mf.ArgumentTypeError, "lengths has dtype torch.float32"),
        (lambda: mf.document("ab"), mf.ArgumentTypeError, "lengths is 'ab', expected integers"),
        (lambda: mf.document(ids=[[0, 1], [2]]), mf.ArgumentTypeError, "ids is .* expected integers"),
        (lambda: mf.document(ids=torch.zeros(2, 2, 2, dtype=torch.int)), mf.ArgumentError, "expected a 1-d or 2-d"),
        (lambda: mf.document(cu_seqlens=[1, 4]), mf.ArgumentError, r"cu_seqlens is \[1, 4\], expected 0, where"),
        (lambda: mf.document(cu_seqlens=[0, 4, 3]), mf.ArgumentError, r"cu_seqlens is \[0, 4, 3\]"),
        (lambda: mf.document([1, 2], kv_lengths=[3]), mf.ArgumentError, "they must pair up"),
        (lambda: mf.document(ids=torch.zeros(3).int(), kv_lengths=[3]), mf.ArgumentError, "kv_lengths goes with"),
        (lambda: mf.prefix_lm(-1), mf.ArgumentError, "prefix_lm: n is -1"),
        (lambda: mf.padding(torch.tensor([1.0])), mf.ArgumentTypeError, "padding: lengths has dtype torch.float32"),
        (lambda: mf.dilated_window(4, 0), mf.ArgumentError, "dilation is 0, expected at least 1"),
        (lambda: mf.natten(4, 4, 5, 3), mf.ArgumentError, "kernel is 5 x 3, expected at most the image's 4 x 4"),
    ],
)
def test_wrong_arguments_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make()
