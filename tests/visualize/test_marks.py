"""What is marked is what the mask says: the documents of tokens, and the rows of vectors, as runs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import columns as column_intervals
from maskflash.visualize.marks import _steps, find_documents, find_vectors

TABLE, OTHER, FLOATS = torch.arange(9), torch.arange(9) // 2, torch.rand(9)

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum)


def spread(steps, length):
    """Each token's number, from its stretch."""
    stops = [*steps.start[1:], length][: len(steps.start)]
    return [
        int(value + slope * at)
        for start, stop, value, slope in zip(steps.start, stops, steps.value, steps.slope, strict=True)
        for at in range(stop - start)
    ]


def documents(mask, q_len, kv_len, batch=1, heads=1, q_offset=0, **mask_args):
    return find_documents(
        mask.at(q_len, kv_len, batch=batch, heads=heads, q_offset=q_offset, **mask_args).tiled((4, 4))
    )


@given(st.lists(st.integers(0, 5) | st.integers(0, 2**31 - 1), max_size=40), st.booleans())
def test_steps_are_their_numbers(values, level):
    steps = _steps(np.array(values, dtype=np.int64), level=level)
    assert spread(steps, len(values)) == values
    assert not (level and steps.slope.any())


def test_steps_are_few():
    assert len(_steps(np.repeat([7, 3, 9], 100)).start) == 3
    assert len(_steps(np.arange(5, 500)).start) == 1
    assert len(_steps(np.concatenate((np.arange(100), np.full(50, 99)))).start) <= 3


@given(lengths, st.integers(1, 60), st.integers(1, 60), st.integers(-5, 5))
def test_documents_by_lengths(sizes, q_len, kv_len, q_offset):
    mask = mf.causal() & mf.document(lengths=sizes).__call__  # for calls of any length
    (found,) = documents(mask, q_len, kv_len, q_offset=q_offset)
    ids = [number for number, size in enumerate(sizes) for _ in range(size)]

    def of(token):
        return ids[token] if 0 <= token < len(ids) else -1

    assert spread(found.rows[0], q_len) == [of(q + q_offset) for q in range(q_len)]
    assert spread(found.columns[0], kv_len) == [of(kv) for kv in range(kv_len)]


def test_documents_of_batch_rows_by_argument():
    doc = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    mask = mf.mask(packed)
    (found,) = documents(mask, 5, 5, batch=2, heads=3, doc=doc)
    assert (found.name, found.shape) == ("doc", (2, 1))
    assert [spread(steps, 5) for steps in found.rows] == doc.tolist()
    assert [spread(steps, 5) for steps in found.columns] == doc.tolist()


def packed(b, h, q, kv, *, doc):
    if doc[b, q] != doc[b, kv]:  # the other way of asking
        return False
    return q >= kv


def test_documents_of_heads_and_tables_that_differ():
    rows, columns = torch.tensor([[3, 3, 4], [5, 6, 6]]), torch.tensor([3, 4, 5, 6])
    (found,) = documents(mf.mask(lambda b, h, q, kv: columns[kv] == rows[h, q]), 3, 4, heads=2)
    assert (found.name, found.shape) == ("rows = columns", (1, 2))
    assert [spread(steps, 3) for steps in found.rows] == rows.tolist()
    assert [spread(steps, 4) for steps in found.columns] == [columns.tolist()] * 2


def test_numbers_beyond_32_bits_become_ranks():
    doc = torch.tensor([2**40, 2**40, 7, 2**50])
    (found,) = documents(mf.document(ids=doc), 4, 4)
    assert spread(found.rows[0], 4) == [1, 1, 0, 2]


@pytest.mark.parametrize(
    "mask",
    [
        mf.causal(),
        mf.mask(lambda b, h, q, kv: TABLE[q] == OTHER[q]),  # compares no key
        mf.mask(lambda b, h, q, kv: TABLE[q].float() == TABLE[kv] / 2),
        mf.mask(lambda b, h, q, kv: TABLE[q + 1] == TABLE[kv]),  # not the row's own
        mf.mask(lambda b, h, q, kv: TABLE[q] <= TABLE[kv]),
        mf.mask(lambda b, h, q, kv: FLOATS[q] == FLOATS[kv]),
    ],
    ids=["causal", "rows alone", "computed", "shifted", "less", "floats"],
)
def test_other_masks_have_none(mask):
    assert documents(mask, 8, 8) == []


@given(st.data(), st.integers(1, 30))
def test_vectors_are_their_rows(data, q_len):
    columns = data.draw(column_intervals(20, 20, batch=2, heads=4))
    found = find_vectors(columns, q_len)
    for name, vector in columns.vectors().items():
        rows = vector.clamp(0, q_len).flatten(0, 1)
        assert [spread(steps, rows.shape[1]) for steps in found.named[name]] == rows.tolist()
    assert found.shape == tuple(columns.lts.shape[:2])
