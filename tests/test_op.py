"""The ops torch sees: their schema holds, on real tensors, fake ones and under autograd."""

import pytest
import torch

import maskflash as mf
from maskflash.expr.nodes import parse
from maskflash.testing import Shape


def arguments(mask, q, k, v, **mask_args):
    """What the op takes for one call."""
    problem = mask.problem("test", q.shape[2], q.shape[2], *q.shape[:2], (32, 32), 0, q.device, mask_args)
    tables, params = problem.inputs.tables, problem.inputs.params
    return (q, k, v, list(tables), list(params), 0, None, 0.25, problem.expr.text, [32, 32], "cpu")


@pytest.mark.parametrize("tables", [False, True])
def test_the_op_keeps_torch_s_rules(tables):
    mask = mf.sliding_window(9) & mf.document([20, 30]) if tables else mf.sliding_window(9)
    shape = Shape(2, 4, 2, 50, 50, 8, 6)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.maskflash.forward.default, arguments(mask, *shape.tensors(torch.float32)), test_utils=checks
    )


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


def test_the_text_is_the_expression():
    for mask in (mf.natten(8, 9, 3, 3), mf.causal() & mf.document([3, 4]), mf.dilated_window(4, 2)):
        expr = mask.traced({}).expr
        assert parse(expr.text) == expr
