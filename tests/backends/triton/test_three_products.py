"""float32 as three products of TF32: as exact as plain attention computed so, asked for by name, refused by name."""

import pytest
import torch

import maskflash as mf
from maskflash.backends.triton import device as triton_device
from maskflash.backends.triton import tile_choice
from maskflash.backends.triton.launch import Kernel
from maskflash.backends.triton.tile_choice import Case
from maskflash.errors import BackendError
from tests.backends.triton.conftest import expressions

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LENGTHS = {"documents": (96, 96), "few rows": (1, 80), "ragged": (70, 45)}


def halves(x):
    """The part of float32 that TF32 holds, and TF32's part of the rest."""
    large = (x.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return large, ((x - large).view(torch.int32) & -(1 << 13)).view(torch.float32)


class Product(torch.autograd.Function):
    """a b, and its gradients, without the smallest of the four products of halves."""

    @staticmethod
    def times(a, b):
        (a, a_rest), (b, b_rest) = halves(a.contiguous()), halves(b.contiguous())
        return a_rest @ b + a @ b_rest + a @ b

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return Product.times(a, b)

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        return Product.times(dc, b.mT), Product.times(a.mT, dc)


def dense(q, k, v, visible, times):
    p = torch.softmax((times(q, k.mT) * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf), -1)
    return times(p, v)


def results(attend, tensors, dout, dtype=torch.float32):
    """Out, and the gradients of q, k and v."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


@pytest.mark.parametrize("of_expressions", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_as_exact_as_plain_attention_with_such_products(device, name, of_expressions):
    q_len, kv_len = LENGTHS[name]
    mask, offset = mf.causal(), max(0, kv_len - q_len)
    if name == "documents":
        mask = mask & mf.document([30, 1, 65])
    shapes = (1, 2, q_len, 32), (1, 2, kv_len, 32), (1, 2, kv_len, 32)
    tensors = [torch.randn(shape) for shape in shapes]
    dout, visible = torch.randn(1, 2, q_len, 32), mask.at(q_len, kv_len, q_offset=offset).dense()
    attn = mf.compile(mask, backend="triton", block_size=64, precision="tf32x3")
    with expressions() if of_expressions else torch.enable_grad():
        mine = results(lambda *x: attn(*x, q_offset=offset), [x.to(device) for x in tensors], dout.to(device))
    plain = results(lambda *x: dense(*x, visible, Product.apply), tensors, dout)
    exact = results(lambda *x: dense(*x, visible, torch.matmul), tensors, dout, torch.float64)
    for label, ours, theirs, truth in zip(("out", "dq", "dk", "dv"), mine, plain, exact, strict=True):
        unit = torch.finfo(torch.float32).eps * truth.abs().max()
        error, budget = (ours.cpu() - truth).abs().max(), 2 * (theirs - truth).abs().max() + unit
        assert error <= budget, (label, float(error / budget))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(device, dtype):
    q, k, v = torch.randn(3, 1, 2, 32, 16, dtype=dtype, device=device).unbind()
    attn = mf.compile(mf.causal(), backend="triton", precision="tf32x3")
    mf.compile(mf.causal(), backend="triton")(q, k, v)  # whose analysis the next calls find by name
    calls = [lambda: attn(q, k, v), lambda: attn(q[:, :, :1], k, v, q_offset=31)]
    for call in calls:
        with pytest.raises(BackendError, match=r'precision="tf32x3" can\'t serve .* for float32, .*got (b?float16)'):
            call()


def test_pages_refuse_them_too(device):
    k, v = torch.randn(2, 20, 16, 2, 16, dtype=torch.float16, device=device).unbind()
    table = torch.arange(20, dtype=torch.int32, device=device)[None]
    pages = mf.PageTable(table, torch.tensor([300], device=device), page_size=16)
    attn = mf.compile(mf.causal(), backend="triton", precision="tf32x3")
    with pytest.raises(BackendError, match='precision="tf32x3" can\'t serve this call'):
        attn.paged(torch.randn(1, 2, 1, 16, dtype=torch.float16, device=device), k, v, pages)


def test_amds_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(BackendError, match="on NVIDIA's GPUs, got AMD's; leave precision out"):
        triton_device.precision(torch.float32, "tf32x3")
    told = mf.compile(mf.causal(), backend="triton", precision="tf32x3").explain(256, 256).to_dict()["forward"]
    assert told["kernel"] == "none"


@pytest.mark.parametrize("name", LENGTHS)
def test_every_pass_is_told(device, monkeypatch, name):
    """delta too: where a row sees one key, it must be rounded as dP is."""
    found = {}

    def launch(kernel, programs, tile, **named):
        found[kernel.function.__name__] = named.get("PRECISION")
        return original(kernel, programs, tile, **named)

    original = Kernel.launch
    monkeypatch.setattr(Kernel, "launch", launch)
    q_len, kv_len = LENGTHS[name]
    q, k, v = (torch.randn(1, 1, n, 16, device=device, requires_grad=True) for n in (q_len, kv_len, kv_len))
    mf.compile(mf.full(), backend="triton", precision="tf32x3")(q, k, v).sum().backward()
    found.pop("combine", None)  # it has no products
    assert found == dict.fromkeys(("split" if q_len == 1 else "forward", "delta", "dkdv", "dq"), "tf32x3")


def test_measured_tiles_are_not_shared_with_products_in_full(monkeypatch):
    monkeypatch.setattr(tile_choice.gpu, "name", lambda device: "one")
    kind = torch.device("cpu"), "forward", torch.float32, (64, 64), (128, 128), "kv=kv"
    assert Case(*kind).key != Case(*kind, products="tf32x3").key


def test_explain_says_so():
    attn = mf.compile(mf.causal(), backend="triton", precision="tf32x3")
    assert attn.explain(256, 256).to_dict()["forward"]["precision"] == "in float32 as three products of TF32"
