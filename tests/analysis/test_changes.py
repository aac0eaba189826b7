"""Where columns turn: by whatever way it is found, as all pairs say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.analysis import changes
from maskflash.testing import masks

LENGTH = st.integers(0, 64)


def turns(bits):
    """(b*H + h) * kv_len + kv, and the row, of each turn of columns of (B, H, q_len, kv_len) bits, in order."""
    columns = bits.transpose(2, 3).flatten(0, 2).int()
    before = torch.cat((columns.new_zeros(len(columns), 1), columns[:, :-1]), 1)
    return (columns != before).nonzero().T.tolist()


def no_lines(*args):
    raise AssertionError("pairs of tiles were asked")


@settings(max_examples=100)
@given(masks(), LENGTH, LENGTH)
def test_changes_of_rows_turned_over_are_those_of_columns(mask, q_len, kv_len):
    problem = mask.at(q_len, kv_len, batch=2, heads=2).problem
    batch, heads = problem.shape[:2]
    of_rows = changes.find_changes(problem.turned())
    found = changes._turned(of_rows, problem)
    dense = mask.dense(q_len, kv_len, batch=2, heads=2)[:batch, :heads]
    assert [found.column.tolist(), found.row.tolist()] == (turns(dense) if dense.numel() else [[], []])


@pytest.mark.parametrize("turn", [False, True])
def test_a_tree_asks_no_pairs_of_tiles_from_either_side(monkeypatch, turn):
    monkeypatch.setattr(changes, "_of_lines", no_lines)
    last = torch.tensor([39, 19, 19, 9, 9] * 8).cummax(0).values.flip(0).repeat_interleave(2)
    last = torch.maximum(last, torch.arange(80))
    mask = mf.mask(lambda b, h, q, kv: (kv <= q) & (q <= last[kv]))
    problem = mask.at(80, 80).problem
    dense = mask.dense(80, 80)
    found = changes.find_changes(problem.turned() if turn else problem)
    assert [found.column.tolist(), found.row.tolist()] == turns(dense.mT if turn else dense)
