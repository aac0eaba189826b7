"""Modules whose tensors are swapped in place, as `load_state_dict` and `.to` do on request, keep working."""

import pytest
import torch
from torch import nn

import maskflash as mf
from maskflash.op import cache

TOKENS = 300
ONE, OTHER = torch.arange(TOKENS) // 90, torch.arange(TOKENS) // 35


class Layer(nn.Module):
    """Attention under a mask that reads the module's own buffer."""

    def __init__(self, doc, dtype=torch.int64):
        super().__init__()
        self.register_buffer("doc", doc.to(dtype, copy=True))
        self.attn = mf.compile(self.mask)

    def mask(self, b, h, q, kv):
        return (q >= kv) & (self.doc[q] == self.doc[kv])

    def forward(self, q, k, v):
        return self.attn(q, k, v)


@pytest.fixture(autouse=True)
def swapping():
    cache._entries.clear(), cache._names.clear()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def call(layer, grad=False, dtype=torch.float32):
    tensors = torch.randn(3, 1, 2, TOKENS, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = (x.clone().requires_grad_(grad) for x in tensors.unbind())
    out = layer(q, k, v)
    if grad:
        out.sum().backward()
    return out.detach()


def expected(doc, dtype=torch.float32):
    return call(lambda q, k, v: mf.attention(q, k, v, mf.causal() & mf.document(ids=doc)), dtype=dtype)


def assert_follows(layer, doc):
    torch.testing.assert_close(call(layer), expected(doc))


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_a_state_dict_is_loaded_after_calls(grad):
    layer = Layer(ONE)
    call(layer, grad)
    layer.load_state_dict({"doc": OTHER.clone()})
    assert_follows(layer, OTHER)
    layer.load_state_dict({"doc": ONE.clone()})
    assert_follows(layer, ONE)


def test_a_state_dict_is_loaded_while_other_masks_read_the_table():
    layer = Layer(ONE)
    call(layer)
    mf.compile(lambda b, h, q, kv: layer.doc[q] <= layer.doc[kv]).prepare(TOKENS, TOKENS)
    layer.load_state_dict({"doc": OTHER.clone()})
    assert_follows(layer, OTHER)


CONVERSIONS = {"double": nn.Module.double, "bfloat16": nn.Module.bfloat16, "to": lambda m: m.to(torch.float64)}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_buffers_of_floats_are_converted_after_calls(convert):
    layer = Layer(ONE, torch.float32)
    call(layer)
    convert(layer)
    assert_follows(layer, ONE)
    layer.doc.copy_(OTHER)
    assert_follows(layer, OTHER)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_parameters_are_converted_after_calls(convert):
    layer = Layer(ONE, torch.float32)
    doc = layer.doc
    del layer.doc
    layer.doc = nn.Parameter(doc, requires_grad=False)
    call(layer)
    convert(layer)
    assert_follows(layer, ONE)


def test_new_contents_at_the_same_version_are_seen():
    layer, other = Layer(ONE), OTHER.clone()
    call(layer)
    assert layer.doc._version == other._version  # so that the version alone tells nothing
    torch.utils.swap_tensors(layer.doc, other)
    assert_follows(layer, OTHER)


def test_a_table_that_is_an_argument_may_be_swapped():
    @mf.mask
    def packed(b, h, q, kv, *, doc):
        return (q >= kv) & (doc[q] == doc[kv])

    attn, doc = mf.compile(packed), ONE.clone()
    call(lambda q, k, v: attn(q, k, v, doc=doc))
    torch.utils.swap_tensors(doc, OTHER.clone())
    torch.testing.assert_close(call(lambda q, k, v: attn(q, k, v, doc=doc)), expected(OTHER))


def test_offsets_that_are_tensors_may_be_swapped():
    attn, offset = mf.compile(mf.causal()), torch.tensor([0])
    call(lambda q, k, v: attn(q, k, v, q_offset=offset))
    torch.utils.swap_tensors(offset, torch.tensor([TOKENS]))
    found = call(lambda q, k, v: attn(q, k, v, q_offset=offset))
    torch.testing.assert_close(found, call(lambda q, k, v: mf.attention(q, k, v)))


def test_a_state_dict_is_loaded_before_any_call():
    layer = Layer(ONE)
    layer.load_state_dict({"doc": OTHER.clone()})
    assert_follows(layer, OTHER)
