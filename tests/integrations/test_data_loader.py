"""Ragged lengths from a data loader, analysed in a thread: the training step then analyses nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader

import maskflash as mf
from maskflash.op import analyse, cache

TOKENS = 256
LENGTHS = [[100, 156], [30, 30, 196], [256], [1, 255]]


@pytest.fixture
def analyses(monkeypatch):
    """The thread of each analysis."""
    threads = []

    def counted(*args):
        threads.append(threading.current_thread())
        return analyse.analyse(*args)

    monkeypatch.setattr(cache, "analyse", counted)
    return threads


def step(attn, **mask_args):
    """Two layers, forward and backward."""
    q, k, v = (torch.randn(2, 4, TOKENS, 8, requires_grad=True) for _ in range(3))
    x = attn(q, k, v, **mask_args)
    attn(x, k, v, **mask_args).sum().backward()
    assert q.grad is not None


def ahead(batches):
    """Batches, each made in a thread while the one before is used."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = worker.submit(next, batches, None)
            yield batch


def packed(rows):
    """Ragged rows of lengths -> the batch's attention, analysed."""
    attn = mf.compile(mf.causal() & mf.document(lengths=rows))
    attn.prepare(TOKENS, TOKENS, batch=len(rows), heads=4)
    return attn


def test_a_step_analyses_nothing_that_was_prepared(analyses):
    loader = DataLoader(LENGTHS, batch_size=2, collate_fn=packed)
    for attn in ahead(loader):
        step(attn)
    assert len(analyses) == 2
    assert threading.main_thread() not in analyses


def test_without_preparation_a_step_analyses(analyses):
    step(mf.compile(mf.causal() & mf.document(lengths=LENGTHS[:2])))
    assert analyses == [threading.main_thread()]


def test_tables_as_arguments_are_prepared_too(analyses):
    @mf.mask
    def packed(b, h, q, kv, *, doc):
        return q >= kv and doc[b, q] == doc[b, kv]

    attn = mf.compile(packed)
    doc = torch.arange(TOKENS).expand(2, -1) // 100
    with ThreadPoolExecutor(1) as worker:
        worker.submit(attn.prepare, TOKENS, TOKENS, batch=2, heads=4, doc=doc).result()
    step(attn, doc=doc)
    assert len(analyses) == 1
    step(attn, doc=doc.clone())  # another tensor: nobody has compared their contents
    assert len(analyses) == 2


def test_preparation_finds_what_a_call_would():
    short = torch.zeros(4)
    attn = mf.compile(lambda b, h, q, kv: short[q] == 0)
    with pytest.raises(mf.MaskIndexError, match="reads index"):
        attn.prepare(8, 8)
    with pytest.raises(mf.ArgumentError, match=r"Attention.prepare: q_len is -1"):
        attn.prepare(-1, 8)
    with pytest.raises(mf.ArgumentError, match="which holds no data"):
        attn.prepare(4, 8, device="meta")
