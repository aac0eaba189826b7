"""What callers pass: what is taken, and what an error says to write instead."""

import re
import warnings
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash.functions.fingerprint import contents
from maskflash.ground.arguments import MOST_SCALE
from maskflash.testing import Shape, assert_matches_dense

Q, K, V = torch.randn(3, 2, 4, 8, 16).unbind()
IDS = torch.arange(8) // 3


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[q] == doc[kv]


@mf.mask
def near(b, h, q, kv, *, n):
    return q - kv < n


@dataclass
class Batch:
    ids: torch.Tensor


def nested(rows, layout=torch.strided):
    with warnings.catch_warnings(action="ignore"):  # the layout is a prototype
        return torch.nested.nested_tensor(rows, layout=layout)


# Mask arguments


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        (IDS.numpy(), "a ndarray, .*torch.from_numpy(doc)"),
        ({"ids": IDS}, "a dict, .*give each tensor in it an argument of its own, such as doc_ids"),
        (Batch(IDS), "a Batch, .*give each tensor in it an argument of its own"),
        ([IDS, IDS], "a list, .*torch.stack(doc)"),
        (IDS.tolist(), "[0, 0, 0, 1, 1, 1, 2, 2], .*torch.as_tensor(doc)"),
        ("ids", "'ids', .*a parameter of a function that returns the mask"),
        (IDS.to("meta"), "on meta, which holds no data"),
        (IDS.to_sparse(), "torch.sparse_coo, .*doc.to_dense()"),
        (nested([IDS[:3].float(), IDS.float()]), "nested, .*doc.to_padded_tensor(0)"),
    ],
    ids=["numpy", "dict", "dataclass", "tensors", "list", "text", "meta", "sparse", "nested"],
)
def test_a_mask_argument_that_is_no_tensor_in_memory_is_told_with_its_fix(value, fix):
    calls = [
        lambda: mf.attention(Q, K, V, packed, doc=value),
        lambda: packed.dense(8, 8, doc=value),
        lambda: packed.row(3, 8, doc=value),
        lambda: packed.fingerprint(doc=value),
    ]
    for call in calls:
        with pytest.raises(mf.MaskflashError, match=re.escape(f"doc is {fix}").replace(r"\.\*", ".*")):
            call()


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), np.float32(3), np.float64(3), 3.0])
def test_numbers_of_numpy_are_numbers(value):
    assert torch.equal(near.dense(8, 8, n=value), near.dense(8, 8, n=3))
    assert torch.equal(mf.attention(Q, K, V, near, n=value), mf.attention(Q, K, V, near, n=3))


# Offsets


@pytest.mark.parametrize("offset", [torch.tensor(5), torch.tensor([5]), torch.tensor(5, dtype=torch.uint8)])
@pytest.mark.parametrize("mask", [mf.sliding_window(3), mf.mask(lambda b, h, q, kv: (q + b) % 3 <= kv)])
def test_an_offset_of_one_element_serves_all_rows(mask, offset):
    sizes = {"batch": 3, "heads": 2}
    dense = mask.dense(8, 16, **sizes, q_offset=5)
    assert torch.equal(mask.dense(8, 16, **sizes, q_offset=offset), dense)
    maps = [mask.block_map(8, 16, **sizes, q_offset=given, block_size=2).kinds() for given in (offset, 5)]
    assert torch.equal(maps[0], maps[1].expand_as(maps[0]))
    assert mask.row(2, 16, b=2, batch=3, q_offset=offset) == mask.row(2, 16, b=2, batch=3, q_offset=5)
    assert mask.row(2, 16, b=2, q_offset=offset) == mask.row(2, 16, b=2, q_offset=5)
    assert mask.why(2, 6, b=1, q_offset=offset).visible == dense[1, 0, 2, 6]
    flex = mask.to_block_mask(8, 16, **sizes, q_offset=offset, block_size=4)
    b, h, q, kv = torch.meshgrid(*map(torch.arange, (3, 2, 8, 16)), indexing="ij")
    assert torch.equal(flex.mask_mod(b, h, q, kv), dense)
    assert_matches_dense(mask, Shape(3, 2, 1, 8, 16), q_offset=offset)


def test_an_offset_of_one_element_may_be_counted_on():
    place = torch.tensor(0)  # as static caches keep it
    k, v = torch.randn(2, 2, 4, 16, 16).unbind()
    attn = mf.compile(mf.causal())
    for step in range(3):
        expected = attn(Q[:, :, :1], k, v, q_offset=step)
        torch.testing.assert_close(attn(Q[:, :, :1], k, v, q_offset=place), expected)
        place += 1


def test_an_offset_of_one_element_needs_no_kernel_of_its_own():
    attn = mf.compile(mf.causal())
    texts = {attn.source(Q, K, V, q_offset=offset) for offset in (torch.tensor(3), torch.tensor([3]), IDS[:2])}
    assert len(texts) == 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float32, torch.bool])
def test_offsets_of_other_dtypes_are_told(dtype):
    with pytest.raises(mf.ArgumentTypeError, match=r"q_offset has dtype .*, expected an integer dtype"):
        mf.attention(Q, K, V, mf.causal(), q_offset=torch.ones(2, dtype=dtype))


# Tables


def test_a_table_for_one_batch_row_or_head_is_told_to_be_expanded():
    by_row = mf.mask(lambda b, h, q, kv, *, doc: doc[b, q] == doc[b, kv])
    by_head = mf.mask(lambda b, h, q, kv, *, span: q - kv < span[b, h, q])
    with pytest.raises(mf.MaskIndexError, match=r"A dimension of 1 doesn't serve all: .*: table.expand\(batch, -1\)"):
        mf.attention(Q, K, V, by_row, doc=IDS[None])
    with pytest.raises(mf.MaskIndexError, match=r"table.expand\(-1, heads, -1\)"):
        by_head.dense(8, 8, batch=2, heads=4, span=IDS.expand(2, 1, 8))
    expanded = IDS[None].expand(2, -1)
    assert torch.equal(by_row.dense(8, 8, batch=2, doc=expanded), mf.document(ids=IDS).dense(8, 8, batch=2))
    with pytest.raises(mf.MaskIndexError, match="Make the table longer"):
        packed.dense(8, 8, doc=IDS[:1])


@pytest.mark.parametrize("inference", [False, True])
def test_the_bytes_of_a_tensor_do_not_depend_on_its_strides(inference):
    with torch.inference_mode(inference):
        wide = torch.arange(12).view(3, 4)
        several = [torch.zeros(1, 2).long()[:, 0], wide[:, :1], wide.mT, wide[:0], wide[1, 1], wide[:1, 2:3]]
        several += [several[0].bfloat16(), wide[1:2, 3].to(torch.bool)]
        for tensor in several:
            plain = tensor.clone(memory_format=torch.contiguous_format)
            assert bytes(contents(tensor)) == bytes(contents(plain)) and contents(tensor).nbytes == tensor.nbytes
        one = torch.zeros(1, 2).long()[:, 0]
        mask = mf.mask(lambda b, h, q, kv, *, n: kv < n[0] + 3)
        assert mask.fingerprint(n=one) == mask.fingerprint(n=torch.zeros(1).long())
        assert torch.equal(mf.attention(Q, K, V, mask, n=one), mf.attention(Q, K, V, mf.padding(3)))


# Devices, block sizes, factors and kinds

METHODS = {
    "Mask.dense": lambda device: mf.causal().dense(4, 4, device=device),
    "Mask.block_map": lambda device: mf.causal().block_map(4, 4, device=device),
    "Mask.row": lambda device: mf.causal().row(3, 4, device=device),
    "Mask.column": lambda device: mf.causal().column(3, 4, device=device),
    "Mask.why": lambda device: mf.causal().why(3, 3, device=device),
    "Mask.to_flashmask": lambda device: mf.causal().to_flashmask(4, 4, device=device),
    "Mask.to_block_mask": lambda device: mf.causal().to_block_mask(4, 4, device=device),
    "equivalent": lambda device: mf.equivalent(mf.causal(), mf.causal(), 4, 4, device=device),
    "Attention.explain": lambda device: mf.compile(mf.causal()).explain(4, 4, device=device),
    "Attention.prepare": lambda device: mf.compile(mf.causal()).prepare(4, 4, device=device),
    "BlockMap.to": lambda device: mf.causal().block_map(4, 4).to(device),
    "ColumnIntervals.to": lambda device: mf.causal().to_flashmask(4, 4).to(device),
    "explorer": lambda device: mf.visualize.explorer(mf.causal(), 4, 4, device=device),
    "Shape.tensors": lambda device: Shape().tensors(torch.float32, device=device),
}
ABSENT = ["banana", "", "cpu:-1", None, 3.5, 0, "cuda:99", "mps"]


@pytest.mark.parametrize("operation", METHODS)
@pytest.mark.parametrize("device", ABSENT)
def test_devices_that_are_none_or_not_here_are_told(operation, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    with pytest.raises(mf.MaskflashError, match=f"^{operation}: device is "):
        METHODS[operation](device)


@pytest.mark.parametrize("operation", [name for name in METHODS if name != "ColumnIntervals.to"])
def test_a_device_without_data_is_told(operation):
    with pytest.raises(mf.ArgumentError, match=f'^{operation}: device is "meta", which holds no data'):
        METHODS[operation]("meta")
    METHODS[operation]("cpu")
    METHODS[operation](torch.device("cpu:0"))


@pytest.mark.parametrize(
    "size", [0, -1, 2**12 + 1, (1, 2**20 + 1), 2**31, 2**70, (128, 2**31), (1, 0), (1, 2, 3), "128", 1.5, None]
)
def test_block_sizes_beyond_what_a_tile_may_have_are_told(size):
    calls = [
        lambda: mf.compile(mf.causal(), block_size=size),
        lambda: mf.causal().block_map(8, 8, block_size=size),
        lambda: mf.causal().to_block_mask(8, 8, block_size=size),
        lambda: mf.BlockMap.from_kinds(torch.ones(1, 1, 1, 1).char(), 8, 8, size),
    ]
    for call in calls:
        with pytest.raises(mf.MaskflashError, match="block_size is "):
            call()


def test_the_largest_tiles_work():
    mask = mf.mask(lambda b, h, q, kv: (q * kv) % 3 != 1)
    for size in ((2**20, 16), (16, 2**20), 2**12):
        assert mask.block_map(50, 16, block_size=size).counts["partial"] == (4 if size == (16, 2**20) else 1)
    assert_matches_dense(mask, Shape(q_len=20, kv_len=30), block_size=2**12)


@pytest.mark.parametrize("scale", [1e300, 10**400, 2.0**65, 1e-300, 2.0**-65, 0, -1, float("nan"), float("inf")])
def test_factors_that_no_float32_score_survives_are_told(scale):
    with pytest.raises(mf.ArgumentError, match=r"^compile: scale is .*, expected"):
        mf.compile(mf.causal(), scale=scale)


@pytest.mark.parametrize("scale", [True, np.True_, torch.tensor(0.5), np.array(0.5), "1", 1j, [1], float])
def test_factors_that_are_no_numbers_are_told(scale):
    with pytest.raises(mf.ArgumentTypeError, match=r"^compile: scale is .*, expected a number"):
        mf.compile(mf.causal(), scale=scale)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", "1"), ("block_size", 0), ("backend", "gpu"), ("deterministic", 1)]
)
def test_how_to_run_is_told_by_the_call_that_was_asked(name, value):
    packed, starts = [x[0].transpose(0, 1) for x in (Q, K, V)], torch.tensor([0, Q.shape[2]])
    calls = {
        "compile": lambda **given: mf.compile(mf.causal(), **given),
        "attention": lambda **given: mf.attention(Q, K, V, mf.causal(), **given),
        "varlen_attention": lambda **given: mf.varlen_attention(*packed, mf.causal(), starts, starts, **given),
    }
    for operation, call in calls.items():
        with pytest.raises(
            ValueError if name in ("block_size", "backend") else TypeError, match=f"^{operation}: {name} is"
        ):
            call(**{name: value})


@pytest.mark.parametrize("scale", [MOST_SCALE, 1 / MOST_SCALE, 1, np.float32(0.5), Fraction(1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_up_to_the_limits_give_numbers(scale, dtype):
    q, k, v = Shape(1, 2, 2, 40, 40).tensors(dtype)
    for mask in (mf.causal(), mf.mask(lambda b, h, q, kv: (q * kv) % 3 != 1)):
        out, lse = mf.attention(q, k, v, mask, scale=scale, return_lse=True)
        gradients = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v))
        assert all(x.isfinite().all() for x in (out, lse, *gradients))


@pytest.mark.parametrize("value", ["no", "yes", 1, 0, None, 0.0, [], torch.tensor(True)])
def test_what_is_neither_true_nor_false_is_told(value):
    attn = mf.compile(mf.causal())
    attn(Q, K, V)
    calls = {
        "attention: return_lse": lambda: attn(Q, K, V, return_lse=value),
        "compile: deterministic": lambda: mf.compile(mf.causal(), deterministic=value),
        "compile: tune": lambda: mf.compile(mf.causal(), tune=value),
        "draw_mask: legend": lambda: mf.visualize.draw_mask(mf.causal(), 4, 4, legend=value),
    }
    if value is not None:
        calls["Mask.to_flashmask: causal"] = lambda: mf.causal().to_flashmask(4, 4, causal=value)
    for said, call in calls.items():
        with pytest.raises(mf.ArgumentTypeError, match=f"^{said} is .*, expected True or False"):
            call()
    assert len(attn(Q, K, V, return_lse=np.True_)) == 2


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (None, "kinds is None, expected integers"),
        (torch.full((1, 1, 2, 2), 7).char(), "kinds holds 7, expected 0"),
        (torch.tensor([[[[0, 1], [2, -1]]]]), "kinds holds -1, expected 0"),
        (torch.full((1, 1, 2, 2), torch.nan), "kinds has dtype torch.float32"),
        (torch.ones(2, 2).char(), r"kinds has shape \(2, 2\), expected \(B, H, 2, 2\)"),
        (torch.ones(1, 1, 2, 3).char(), r"kinds has shape \(1, 1, 2, 3\), expected \(B, H, 2, 2\)"),
        (torch.ones(1, 1, 2, 2, dtype=torch.int8, device="meta"), "kinds is on meta"),
    ],
)
def test_kinds_that_mean_nothing_are_told(kinds, said):
    with pytest.raises(mf.MaskflashError, match=f"^BlockMap.from_kinds: {said}"):
        mf.BlockMap.from_kinds(kinds, 8, 8, (4, 4))


def test_flex_attention_s_block_mask_has_no_empty_side():
    for lengths in ((0, 8), (8, 0)):
        with pytest.raises(mf.ArgumentError, match=r"^Mask.to_block_mask: (q|kv)_len is 0, expected at least 1"):
            mf.causal().to_block_mask(*lengths)
