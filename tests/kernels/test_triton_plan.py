"""A plan may be read from any stream, is never made while a CUDA graph is captured, and lives as long as such a graph.

Streams are stand-ins here: what counts is what they are asked for.
"""

import pytest
import torch

import maskflash as mf
from maskflash.blocks.classify import classify
from maskflash.kernels import triton_device, triton_plan
from maskflash.kernels.triton_plan import plan

HALF = mf.causal() & mf.document([20, 13])  # of 40 tokens: the last ones see nothing


class Stream:
    """Counts what is waited for."""

    waits = 0

    def synchronize(self):
        self.waits += 1


@pytest.fixture
def recorded(monkeypatch):
    """The tensors recorded on each stream."""
    found = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: found.append((stream, tensor)))
    return found


@pytest.fixture
def current(monkeypatch):
    """Make a stream the current one."""
    return lambda stream: monkeypatch.setattr(triton_device, "stream", lambda device: stream)


@pytest.fixture
def problem():
    return HALF.problem("test", 40, 40, 1, 1, (16, 16), 0, torch.device("cpu"), {})


def test_what_is_made_is_waited_for_once(problem, current):
    stream = Stream()
    current(stream)
    made = plan(classify(problem))
    assert stream.waits == 1
    for _ in range(2):
        made.order(False, 3, 1)
        made.seen(problem, rows=True)
        made.seen(problem, rows=False)
    assert stream.waits == 4


def test_each_stream_is_lent_every_tensor_once(problem, current, recorded):
    made = plan(classify(problem))
    first, second = Stream(), Stream()
    for stream in (first, second, first, second):
        current(stream)
        made.lend(problem)
    tensors = {id(tensor) for tensor in (*made.rows.tensors, *made.columns.tensors)}
    for stream in (first, second):
        lent = [id(tensor) for by, tensor in recorded if by is stream]
        assert set(lent) == tensors
        assert len(lent) == len(tensors)
    order, seen = made.order(True, 3, 1), made.seen(problem, rows=True)  # made on the second
    recorded.clear()
    for stream in (first, second):
        current(stream)
        made.lend(problem)
        assert {id(order), id(seen)} <= {id(tensor) for by, tensor in recorded if by is stream}


def test_bytes_are_those_of_all_tensors(problem):
    made = plan(classify(problem))
    before = sum(x.nbytes for x in (*made.rows.tensors, *made.columns.tensors))
    assert made.nbytes == before > 0
    assert made.nbytes < before + made.order(False, 3, 1).nbytes + made.seen(problem, rows=True).nbytes == made.nbytes


def test_nothing_is_made_while_a_graph_is_captured(problem, monkeypatch):
    """It would be part of the graph: not computed before the first replay, and in the graph's memory."""
    made = plan(classify(problem))
    made.order(False, 3, 1)
    monkeypatch.setattr(triton_device, "capturing", lambda device: True)
    made.order(False, 3, 1)  # is there already
    for make in (lambda: made.order(True, 3, 1), lambda: made.seen(problem, rows=True)):
        with pytest.raises(mf.BackendError, match=r"CUDA graph is being captured.*run the same call once before"):
            make()


def test_what_a_graph_reads_is_kept(problem, monkeypatch):
    kept = []
    monkeypatch.setattr(triton_plan, "_captured", kept)
    made = plan(classify(problem))
    made.lend(problem)
    assert kept == []
    monkeypatch.setattr(triton_device, "capturing", lambda device: True)
    made.lend(problem)
    ((held, tables),) = kept
    assert held is made
    assert tables is problem.inputs.tables
    assert len(tables) > 0
