"""Pages on the Triton backend, in its interpreter: keys that are seen are gathered, and the ordinary kernels run."""

import pytest
import torch

import maskflash as mf

pytest.importorskip("triton")

BIAS = torch.linspace(-1, 1, 128).view(2, 64)


@pytest.mark.parametrize(
    ("mask", "score"),
    [
        (mf.sliding_window(9), None),
        (mf.mask(lambda b, h, q, kv: q >= kv and (kv + b) % 2 == 0), None),
        (mf.causal(), lambda score, b, h, q, kv: score + BIAS[b, kv]),
    ],
)
def test_pages_are_attended_as_on_the_cpu(mask, score):
    pages = mf.PageTable(torch.tensor([[3, 5, -1], [3, 1, 7]]), torch.tensor([20, 40]), 16)
    draw = torch.Generator().manual_seed(0)
    pools = torch.randn(2, 8, 16, 2, 16, generator=draw).unbind()
    for pool in pools:
        pool[5, 4:], pool[7, 8:], pool[0] = (torch.nan,) * 3
    q, starts = torch.randn(7, 4, 16, generator=draw), torch.tensor([0, 1, 7])
    more = {"cu_seqlens_q": starts, "return_lse": True, "sinks": torch.linspace(-1, 1, 4)}
    found, wanted = (
        mf.compile(mask, score=score, backend=backend).paged(q, *pools, pages, **more) for backend in ("triton", "cpu")
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
