"""The benchmark of real ranks: its gather is attention, and it runs on loopback; no timing is asserted."""

import pytest
import torch

import maskflash as mf

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
from benchmarks import parallel_ranks  # noqa: E402
from maskflash.testing import error_budget  # noqa: E402
from tests.parallel.worlds import in_threads  # noqa: E402

TOKENS = 256


@pytest.mark.parametrize("name", parallel_ranks.masks(TOKENS))
def test_a_gather_computes_what_one_machine_does(name):
    mask = parallel_ranks.masks(TOKENS)[name]
    plan = mf.parallel.plan(mask, TOKENS, 2, chunk=64, shards=[[(0, 64), (192, 256)], [(64, 192)]])
    shape = 4, 1, parallel_ranks.HEADS, TOKENS, parallel_ranks.HEAD_DIM
    *qkv, dout = torch.randn(shape, generator=torch.Generator().manual_seed(0)).unbind()

    def learned(attn, qkv, dout):
        qkv = [x.clone().requires_grad_() for x in qkv]
        out = attn(*qkv)
        return [out.detach(), *torch.autograd.grad(out, qkv, dout)]

    def rank_does(rank):
        own = [plan.shard(x, rank) for x in (*qkv, dout)]
        return learned(parallel_ranks._gathered(mask, plan, rank), own[:3], own[3])

    parts = in_threads(2, rank_does)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    plain = learned(lambda *x: mf.attention(*x, mask), qkv, dout)
    exact = learned(lambda *x: mf.attention(*x, mask), [x.double() for x in qkv], dout.double())
    for found, one, truth in zip(zip(*parts, strict=True), plain, exact, strict=True):
        error = (plan.unshard(found).double() - truth).abs().max().item()
        assert error <= error_budget(one, truth)


def test_ranks_run_on_loopback(capsys):
    rows = parallel_ranks.main(["--quick"])
    assert [row["way"] for row in rows] == 3 * ["plan", "contiguous", "zigzag", "gather"]
    assert all(row["p50"] > 0 and row["predicted"] > 0 and row["bytes"] > 0 for row in rows)
    assert "operations/s" in capsys.readouterr().out
