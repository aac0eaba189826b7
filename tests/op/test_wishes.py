"""What only a GPU's kernels have is refused by name elsewhere: nothing falls back."""

import pytest
import torch

import maskflash as mf
from maskflash.errors import ArgumentError, BackendError


@pytest.mark.parametrize(("name", "value"), [("kernels", "hopper"), ("precision", "fp8")])
@pytest.mark.parametrize("rows", [1, 64])
def test_a_cpu_refuses_what_it_does_not_have(name, value, rows):
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    attn = mf.compile(mf.causal(), **{name: value})
    with pytest.raises(BackendError, match=f'attention: {name} is "{value}".* cpu backend: leave it out'):
        attn(q[:, :, :rows], k, v, q_offset=64 - rows)


@pytest.mark.parametrize(("name", "value"), [("kernels", "blackwell"), ("precision", "fp4"), ("kernels", None)])
def test_other_values_are_refused_when_compiled(name, value):
    with pytest.raises(ArgumentError, match=f"compile: {name} is {value!r}, expected"):
        mf.compile(mf.causal(), **{name: value})


def test_what_a_cpu_has_anyway_may_be_said():
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    said = mf.compile(mf.causal(), kernels="portable", precision="full")(q, k, v)
    assert torch.equal(said, mf.compile(mf.causal())(q, k, v))
