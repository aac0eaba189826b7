"""A plan makes each order once, says what it holds, and lives as long as a CUDA graph that reads it.

`tests/ground/test_transfer.py` has what it copies, waits for and refuses.
"""

from dataclasses import replace

import pytest
import torch

import maskflash as mf
from maskflash.analysis.classify import classify
from maskflash.backends.triton import plan as triton_plan
from maskflash.backends.triton.plan import plan
from maskflash.scores.strength import Strength

HALF = mf.causal() & mf.document([20, 13])  # of 40 tokens: the last ones see nothing


@pytest.fixture
def problem():
    return HALF.at(40, 40).tiled((16, 16))


@pytest.fixture
def made(problem):
    return plan(classify(problem), problem.device)


def test_an_order_is_made_once(made):
    first, again, other = (made.walked(True, *sizes)["order"] for sizes in ((3, 1), (3, 1), (5, 2)))
    assert again is first
    assert (first.shape, other.shape) == ((1, 3), (1, 5))


def test_bytes_are_those_of_all_tensors(made):
    seen = [made.intervals, *(made.seen(rows=rows) for rows in (True, False))]
    held = {id(x): x for walks in (made.rows, made.columns) for x in (*walks.tensors, walks.counts)}
    before = sum(x.nbytes for x in [*held.values(), *seen])
    assert made.nbytes == before > 0
    assert made.nbytes < before + made.walked(False, 3, 1)["order"].nbytes == made.nbytes


def test_what_a_graph_reads_is_kept_once(made, problem, monkeypatch):
    kept = {}
    monkeypatch.setattr(triton_plan, "_captured", kept)
    triton_plan.keep(made, problem, Strength(1.0))
    assert kept == {}
    monkeypatch.setattr(triton_plan, "capturing", lambda device: True)
    for _ in range(2):
        triton_plan.keep(made, problem, Strength(1.0))
    ((held, tables),) = kept.values()
    assert held is made
    assert tables is problem.inputs.tables
    assert len(tables) > 0
    others = replace(problem.inputs, tables=(torch.zeros(40),))  # another graph's
    triton_plan.keep(made, replace(problem, inputs=others), Strength(1.0))
    assert len(kept) == 2


def test_walks_are_read_after_the_stream_has_been_lent_them(monkeypatch):
    """Each read of the plan's tensors on the device comes after `lend`."""
    problem = (mf.causal() & mf.document([20, 9])).at(40, 40).tiled((16, 16))  # no tile of the last line is visited
    made = plan(classify(problem), problem.device)
    calls = []
    monkeypatch.setattr(type(made._made), "lend", lambda self: calls.append("lend"))

    class Read:
        """A walk that notes when it is read."""

        @property
        def tiles(self):
            calls.append("read")
            return made.rows.full.tiles

    used = replace(made, rows=replace(made.rows, full=Read())).used(problem, rows=True)
    assert calls == ["lend", "read"]
    assert used is not None
    assert used[0, 0].tolist() == [True] * 29 + [False] * 11


def test_nothing_is_hidden_of_a_full_mask():
    problem = mf.full().at(40, 40).tiled((16, 16))
    made = plan(classify(problem), problem.device)
    assert made.used(problem, rows=True) is made.used(problem, rows=False) is None
