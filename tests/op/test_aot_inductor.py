"""AOTInductor packages a model with the op in it: the package gives the model's own results, at other lengths too."""

import shutil

import pytest
import torch
from torch import nn

import maskflash as mf

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs a C++ compiler")


class Layers(nn.Module):
    """Masks with every kind of empty and filled list: tables, numbers, both and neither."""

    def __init__(self):
        super().__init__()
        doc = torch.arange(300) // 7
        masks = (
            mf.causal(),
            mf.sliding_window(9),
            mf.mask(lambda b, h, q, kv: doc[q] == doc[kv]),
            mf.document(ids=torch.arange(300) // 30),
        )
        self.attns = [mf.compile(mask) for mask in masks]

    def forward(self, q, k, v):
        return [self.attns[0](q, k, v, return_lse=True), *(attn(q, k, v) for attn in self.attns[1:])]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_package_computes_what_the_model_does(tmp_path):
    q, k, v = torch.randn(3, 2, 2, 40, 8).unbind()
    length = torch.export.Dim("length", min=2, max=300)
    program = torch.export.export(Layers(), (q, k, v), dynamic_shapes=[{2: length}] * 3)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layers.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for tokens in (40, 300, 3):
        q, k, v = torch.randn(3, 2, 2, tokens, 8).unbind()
        for found, expected in zip(package(q, k, v), Layers()(q, k, v), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_lists_may_be_none_where_python_dispatches():
    """As AOTInductor's runtime hands empty ones over, in forward and in backward."""
    from maskflash.op import autograd
    from maskflash.op.spec import Spec

    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    spec = Spec.make("q:int64();kv:int64();ge:bool(0,1)", [], [], 0, 0, None, 0.5, (128, 128), "cpu")
    hollow = tuple(None if value == [] else value for value in spec)
    assert hollow.count(None) == 9  # five lists, and four tensors that there aren't
    out, lse = autograd._forward(q, k, v, *hollow)
    assert torch.equal(out, torch.ops.maskflash.forward(q, k, v, *spec)[0])
    found = autograd._backward(out, None, q, k, v, out, lse, *hollow)
    expected = torch.ops.maskflash.backward(out, None, q, k, v, out, lse, *spec)
    assert all(torch.equal(one, other) for one, other in zip(found[:4], expected[:4], strict=True))
