"""What only a GPU's kernels have is refused by name elsewhere: nothing falls back."""

import pytest
import torch

import maskflash as mf
from maskflash.errors import ArgumentError, BackendError


@pytest.mark.parametrize(("name", "value"), [("kernels", "hopper"), ("precision", "fp8"), ("precision", "tf32x3")])
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


@pytest.mark.parametrize(("name", "value"), [("kernels", "hopper"), ("precision", "fp8"), ("precision", "tf32x3")])
def test_sequences_and_requests_are_asked_for_the_same(name, value):
    """What an op hands its calls on to is asked for what it was asked for."""
    attn = mf.compile(mf.causal(), **{name: value}, splits=3)
    x, starts = torch.randn(8, 2, 16), torch.tensor([0, 3, 8])
    with pytest.raises(BackendError, match=f'{name} is "{value}"'):
        attn.varlen(x, x, x, starts, starts)
    for twin in (attn._packed(), attn._for_requests()):
        assert (twin.splits, getattr(twin, name)) == (3, value)
    nested = torch.nested.nested_tensor([torch.randn(n, 2, 16) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(BackendError, match=f'{name} is "{value}"'):
        attn(nested, nested, nested)


@pytest.mark.parametrize(("name", "value"), [("kernels", "hopper"), ("precision", "fp8")])
def test_an_explanation_says_that_a_call_on_a_cpu_raises(name, value):
    """In the call's own words."""
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    attn = mf.compile(mf.causal(), **{name: value})
    with pytest.raises(BackendError) as raised:
        attn(q, k, v)
    explanation = attn.explain(64, 64)
    assert f"none, since a call raises: {raised.value}" in str(explanation)
    assert explanation.to_dict()["forward"]["kernel"] == "none"
    assert mf.compile(mf.causal(), kernels="portable").explain(64, 64).to_dict()["forward"] is None
