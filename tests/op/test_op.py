"""The ops torch sees: their schema holds, on real tensors, fake ones and under autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import maskflash as mf
from maskflash.expr.nodes import parse
from maskflash.op.spec import Spec
from maskflash.testing import Shape


def arguments(mask, q, k, v, **mask_args):
    """What the op takes for one call."""
    problem = mask.at(q.shape[2], q.shape[2], batch=q.shape[0], heads=q.shape[1], **mask_args).tiled((32, 32))
    spec = Spec.of_problem(problem, "cpu")._replace(scale=0.25)
    return (q, k, v, list(spec.tables), *spec[1:])


@pytest.mark.parametrize("tables", [False, True])
def test_the_op_keeps_torch_s_rules(tables):
    mask = mf.sliding_window(9) & mf.document([20, 30]) if tables else mf.sliding_window(9)
    shape = Shape(2, 4, 2, 50, 50, 8, 6)
    given = arguments(mask, *shape.tensors(torch.float32))
    torch.library.opcheck(torch.ops.maskflash.forward.default, given)
    given = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in given)
    out, lse = torch.ops.maskflash.forward.default(*given)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(torch.ops.maskflash.backward.default, (out, dlse, *given[:3], out, lse, *given[3:]))


def test_the_op_alone_is_differentiable_and_needs_only_the_text():
    q, k, v = Shape(1, 2, 2, 50, 50, 8, 8).tensors(torch.float32)
    mask = mf.causal()
    found = torch.ops.maskflash.forward.default(*arguments(mask, q, k, v))[0]
    expected = mf.attention(q, k, v, mask, scale=0.25)
    assert torch.equal(found, expected)
    for x, y in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (found, expected)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_are_known_without_data(dtype):
    q, k, v = (x.detach().to("meta") for x in Shape(2, 4, 2, 50, 60, 8, 6).tensors(dtype))
    out, lse = torch.ops.maskflash.forward.default(*arguments(mf.causal(), q, k, v))
    assert (out.shape, out.dtype) == ((2, 4, 50, 6), dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 50), torch.float64 if dtype == torch.float64 else torch.float32)


class Seen(TorchDispatchMode):
    """Notes the ops that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.append(function)
        return function(*args, **(kwargs or {}))


def test_who_watches_dispatch_sees_the_op_and_nothing_below_it():
    q, k, v = Shape(1, 2, 2, 50, 50, 8, 8).tensors(torch.float32)
    plain = mf.attention(q, k, v, mf.causal())
    with Seen() as seen:
        out = mf.attention(q, k, v, mf.causal())
        torch.autograd.grad(out.sum(), q)
    assert torch.equal(out, plain)
    ours = [op for op in seen.ops if op.namespace == "maskflash"]
    assert ours == [torch.ops.maskflash.forward.default, torch.ops.maskflash.backward.default]
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default not in seen.ops


def test_fake_tensors_are_told_apart():
    attn = mf.compile(mf.causal())
    with FakeTensorMode():
        q = torch.empty(1, 2, 50, 8, requires_grad=True)
        out = attn(q, q, q)
        out.sum().backward()
    assert (type(out), out.shape, q.grad.shape) == (FakeTensor, q.shape, q.shape)


def test_the_text_is_the_expression():
    for mask in (mf.natten(8, 9, 3, 3), mf.causal() & mf.document([3, 4]), mf.dilated_window(4, 2)):
        expr = mask.traced({}).expr
        assert parse(expr.text) == expr
