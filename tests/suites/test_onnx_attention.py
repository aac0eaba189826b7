"""ONNX's own tests of its Attention operator: each case's inputs and attributes as a call, its outputs as results.

Every case runs. Some also want a matrix of all pairs. Where that is the probabilities, it is compared; `NO_RESULT` says
which matrices are not, since nothing here gives single scores away.
"""

import warnings

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash.testing import error_budget

with warnings.catch_warnings(action="ignore"):
    onnx = pytest.importorskip("onnx")
    from onnx.backend.test.case import node as onnx_cases

    np.random.seed(0)  # its cases draw their inputs when they are imported
    from onnx.backend.test.case.node import attention as _  # noqa: F401
    from onnx.reference.ops.op_attention import _compute_attention

CASES = {
    case.name.removeprefix("test_attention_"): case
    for case in onnx_cases._NodeTestCases
    if case.model.graph.node[0].op_type == "Attention"  # others are the operator written out in smaller ones
}
PROBABILITIES = 3  # as a case's qk_matmul_output_mode, 0 where it says none
NO_RESULT = {0: "scaled products", 1: "products after the soft cap", 2: "products with the mask added"}
INPUTS = ("q", "k", "v", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
OUTPUTS = ("out", "present_key", "present_value", "qk_matmul_output")

pytestmark = pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")


def as_torch(x):
    """numpy has no bfloat16 of its own: the case's is read by its bits."""
    return (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)
    )


def named(names, given, values):
    """Inputs or outputs by name; those left out of a node have the name "" there and no value."""
    values = iter(values)
    return {name: as_torch(next(values)) for name, here in zip(names, given, strict=False) if here}


def as_heads(x, heads):
    """(B, S, H D) as (B, H, S, D); others as they are."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2) if x.ndim == 3 else x


def as_mask(attributes, inputs, q, k):
    """Which pairs may attend, and what is added to their scores: a mask or None, and a float tensor or None."""
    past = inputs["past_key"].shape[2] if "past_key" in inputs else 0
    lengths = inputs.get("nonpad_kv_seqlen")
    offset = torch.full((q.shape[0],), past) if lengths is None else lengths - q.shape[2]
    left, right = (attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
    masks, bias = [], None
    if attributes.get("is_causal"):
        masks.append(mf.mask(lambda b, h, q, kv: kv <= q + offset[b]))
    if left >= 0:
        masks.append(mf.mask(lambda b, h, q, kv: q + offset[b] - left <= kv))
    if right >= 0:
        masks.append(mf.mask(lambda b, h, q, kv: kv <= q + offset[b] + right))
    if lengths is not None:
        masks.append(mf.padding(lengths))
    if (given := inputs.get("attn_mask")) is not None:
        hidden = False if given.dtype == torch.bool else -torch.inf  # of keys that it is too short for
        whole = torch.nn.functional.pad(given, (0, k.shape[2] - given.shape[-1]), value=hidden)
        if given.dtype != torch.bool:
            bias = whole.expand(*torch.broadcast_shapes(whole.shape, (1, 1)))
        elif masks:
            pairs = whole.expand(*q.shape[:3], k.shape[2])
            masks.append(mf.mask(lambda b, h, q, kv: pairs[b, h, q, kv]))
        else:
            return whole, None
    joined = None
    for mask in masks:
        joined = mask if joined is None else joined & mask
    return joined, bias


def attend(attributes, inputs):
    """The operator by ours: its outputs by name, out as the operator has it."""
    q_heads, kv_heads = attributes.get("q_num_heads"), attributes.get("kv_num_heads")
    q, k, v = (as_heads(inputs[name], heads) for name, heads in zip("qkv", (q_heads, kv_heads, kv_heads), strict=True))
    if "past_key" in inputs:
        k, v = (torch.cat([inputs[f"past_{name}"], x], 2) for name, x in (("key", k), ("value", v)))
    mask, bias = as_mask(attributes, inputs, q, k)
    score = (mf.scores.softcap(attributes["softcap"]),) if attributes.get("softcap") else ()
    if bias is not None and mask is None and not score:
        mask = bias  # as torch's attention takes it
    elif bias is not None:
        score += (mf.scores.bias(bias),)
    attn = mf.compile(mf.full() if mask is None else mask, score=score or None, scale=attributes.get("scale"))
    out = attn(q, k, v)
    if inputs["q"].ndim == 3:
        out = out.transpose(1, 2).flatten(2)
    shares = attn.probabilities(q, k, range(q.shape[2]))
    return {"out": out, "present_key": k, "present_value": v, "probabilities": shares}


def exact(attributes, inputs):
    """The operator's out in float64, by ONNX's reference."""
    numbers = {name: x.double().numpy() if x.is_floating_point() else x.numpy() for name, x in inputs.items()}
    q, k, v = (numbers.pop(name) for name in "qkv")
    others = {name: value for name, value in attributes.items() if name != "softmax_precision"}
    return torch.from_numpy(_compute_attention(q, k, v, **numbers, **others)[0])


@pytest.mark.parametrize("name", CASES)
def test_a_case(name):
    case = CASES[name]
    (node,) = case.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    ((given, expected),) = case.data_sets
    inputs, wanted = named(INPUTS, node.input, given), named(OUTPUTS, node.output, expected)
    found = attend(attributes, inputs)
    for output in wanted.keys() & {"present_key", "present_value"}:
        assert torch.equal(found[output], wanted[output])
    if "qk_matmul_output" in wanted and (mode := attributes.get("qk_matmul_output_mode", 0)) not in NO_RESULT:
        assert mode == PROBABILITIES
        given = wanted["qk_matmul_output"]
        torch.testing.assert_close(found["probabilities"].to(given.dtype), given, rtol=case.rtol, atol=case.atol)
    if wanted["out"].dtype == torch.float32:
        torch.testing.assert_close(found["out"], wanted["out"], rtol=case.rtol, atol=case.atol)
    else:  # whose tolerance says nothing of 16 bits
        truth = exact(attributes, inputs)
        assert (found["out"].double() - truth).abs().max() <= error_budget(wanted["out"], truth)


def test_the_cases_are_found():
    assert len(CASES) > 90
    kinds = {(len(case.data_sets[0][0][0].shape), case.data_sets[0][0][0].dtype.name) for case in CASES.values()}
    assert kinds == {(4, "float32"), (4, "float16"), (4, "bfloat16"), (3, "float32"), (3, "bfloat16")}
    modes = {
        a.i for case in CASES.values() for a in case.model.graph.node[0].attribute if a.name == "qk_matmul_output_mode"
    }
    assert modes | {0} == {*NO_RESULT, PROBABILITIES}
