"""The flex engine: torch's FlexAttention for real on the CPU; with a stand-in for what torch compiles, as on a GPU."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

import maskflash as mf
from maskflash.backends.reference import error_budget, reference
from maskflash.engines import flex
from maskflash.engines.named import ENGINES
from maskflash.op import cache
from tests.engines.fakes import dense

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@mf.mask
def packed(b, h, q, kv, *, doc, width):
    return kv <= q < kv + width and doc[b, q] == doc[b, kv] and doc[b, q] != 1 and (h > 0 or kv % 3 > 0)


DOC = (torch.arange(150) // torch.tensor([[60], [45]])).contiguous()


def inputs(v_dim=16, dtype=torch.float32):
    """Two batch rows, grouped heads; NaN at a key of document 1, which nobody sees."""
    q, k, v = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, v_dim)
    k[0, :, 70], v[0, :, 70] = math.nan, math.nan
    return [x.to(dtype) for x in (q, k, v)]


def exact(q, k, v, mask, score=None, **mask_args):
    visible = mask.dense(150, 150, batch=2, heads=4, **mask_args)
    found, _ = reference(*(x.double() for x in (q, k, v)), visible, 0.25, score=score)
    plain, _ = reference(q, k, v, visible, 0.25, score=score)
    return found, error_budget(plain, found)


def test_it_runs_here_and_compiles_once_for_all_tables_and_numbers():
    attn = mf.compile(packed, backend="flex")
    q, k, v = inputs()
    out = attn(q, k, v, doc=DOC, width=30)
    found, budget = exact(q, k, v, packed, doc=DOC, width=30)
    assert (out - found).abs().max() <= budget
    assert out[0, :, 60:120].abs().max() == 0  # what sees nothing
    compiled = counters["stats"]["unique_graphs"]
    for doc, width in ((DOC.flip(0).contiguous(), 30), (DOC, 7)):
        k = k.nan_to_num(1.0)
        v = v.nan_to_num(1.0)
        found, budget = exact(q, k, v, packed, doc=doc, width=width)
        assert (attn(q, k, v, doc=doc, width=width) - found).abs().max() <= budget
    assert counters["stats"]["unique_graphs"] == compiled
    with torch.no_grad():  # as in torch.compile, and with tensors that want gradients
        again = torch.ops.maskflash.forward(q.requires_grad_(), k, v, *_spec_of(attn, q, k, doc=DOC, width=7))[0]
    assert torch.equal(again, attn(q.detach(), k, v, doc=DOC, width=7))


def _spec_of(attn, q, k, **mask_args):
    return attn._spec(attn._sizes(q, k, 0, 0), q, None, mask_args)


def test_scores_half_types_and_wide_values():
    def capped(score, b, h, q, kv, *, cap):
        return cap * torch.tanh(score / cap) + (kv - q) / (1 + h)

    q, k, v = (x.nan_to_num(1.0) for x in inputs(v_dim=32, dtype=torch.bfloat16))
    attn = mf.compile(mf.causal(), score=capped, backend="flex")
    h, row, column = torch.arange(4)[:, None, None], torch.arange(150)[:, None], torch.arange(150)

    def check(cap):
        out = attn(q, k, v, cap=cap)
        found, budget = exact(q, k, v, mf.causal(), lambda x: cap * torch.tanh(x / cap) + (column - row) / (1 + h))
        assert out.dtype == torch.bfloat16
        assert (out - found).abs().max() <= budget

    check(2.0)
    compiled = counters["stats"]["unique_graphs"]
    check(3.0)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_lengths_of_nothing(q_len, kv_len):
    q, k = torch.randn(2, 2, q_len, 16), torch.randn(2, 2, kv_len, 16)
    out = mf.attention(q, k, k, mf.causal(), backend="flex")
    assert out.shape == q.shape and bool((out == 0).all())


def test_what_torch_cant_do_on_the_cpu_is_refused():
    attn = mf.compile(mf.causal(), backend="flex")
    q = torch.randn(1, 2, 8, 16)
    for arguments, message in (
        ({"return_lse": True}, "the flex engine returns no lse on cpu; leave return_lse out"),
        ({"dropout_p": 0.1}, "the flex engine has no dropout; leave dropout_p out"),
        ({"sinks": torch.zeros(2)}, "the flex engine is given no sinks; leave sinks out"),
    ):
        with pytest.raises(mf.BackendError, match=message):
            attn(q, q, q, **arguments)
    with pytest.raises(mf.BackendError, match="takes float32, bfloat16, float16 on cpu, got float64; cast q, k and v"):
        attn(*[q.double()] * 3)
    with pytest.raises(mf.BackendError, match="the flex engine has no backward on cpu; detach q, k and v"):
        attn(q.requires_grad_(), q, q)
    table = torch.zeros(8, 8, requires_grad=True)
    learning = mf.compile(mf.causal(), score=mf.scores.bias(table), backend="flex")
    with pytest.raises(mf.BackendError, match="gives no gradients to what a score function looks up; detach it"):
        learning(*[q.detach()] * 3)


def test_what_torch_cant_compile_is_an_error_of_the_backend(monkeypatch):
    from torch._dynamo.exc import Unsupported

    def failing(*args):
        raise Unsupported("a graph break\nat length")

    monkeypatch.setattr(flex, "_compiled", lambda kind, any_length: failing)
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(mf.BackendError, match=r"can't compile FlexAttention for this call \(a graph break\); let"):
        mf.attention(q, q, q, mf.causal(), backend="flex")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What torch compiles, as a dense computation of what it is given, with lse and gradients."""

    def attend(q, k, v, score_mod, block_mask, scale, has_lse):
        assert has_lse and score_mod is None
        shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        b, h, row, column = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        return dense(q, k, v, block_mask.mask_mod(b, h, row, column), scale)

    monkeypatch.setattr(flex, "_compiled", lambda kind, any_length: attend)
    for name in ("with_gradients", "with_lse"):
        monkeypatch.setattr(type(ENGINES["flex"]), name, ("cpu", "cuda"))
    cache.invalidate()


def test_gradients_and_lse_as_on_a_gpu(as_on_a_gpu):
    tensors = [x.requires_grad_() for x in inputs()]
    found = []
    for backend in ("flex", "cpu"):
        out, lse = mf.compile(packed, backend=backend)(*tensors, doc=DOC, width=30, return_lse=True)
        loss = out.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()
        found.append([out, lse, *torch.autograd.grad(loss, tensors)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_one_compiled_function_for_a_kind_of_call(monkeypatch):
    kinds = []

    def compiled(kind, any_length):
        kinds.append(kind)
        return lambda q, *others: (q, None)

    monkeypatch.setattr(flex, "_compiled", compiled)
    attn = mf.compile(mf.causal(), backend="flex")
    for length, dtype in ((8, torch.float32), (8, torch.float32), (9, torch.float32), (8, torch.bfloat16)):
        attn(*[torch.randn(1, 2, length, 16, dtype=dtype)] * 3)
    assert len(set(kinds)) == 3 and kinds[0] == kinds[1]
