"""Triton attention equals dense float64 attention, on a GPU, in Triton's interpreter or as emulated PTX.

And it keeps its promises.
"""

import math
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton import device as triton_device
from maskflash.testing import Shape, assert_matches_dense, masks, shapes
from tests.backends.triton.conftest import expressions, in_a_process

# The interpreter computes with numpy, which warns of the NaN and infinities that some tests are about, and its
# products of bfloat16 are wrong.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
BLOCKS = st.sampled_from([16, 32, 64, (16, 32), (64, 16)])
SMALL = shapes(max_len=48, max_head_dim=24)  # about a second each under the interpreter, and to compile on a GPU


KERNELS = st.sampled_from([nullcontext, expressions])


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@settings(max_examples=24)
@given(masks(max_len=48), SMALL, st.sampled_from(DTYPES), BLOCKS, KERNELS)
def test_every_mask_and_shape_matches_dense_float64(device, mask, shape, dtype, block_size, kernels):
    with kernels():
        assert_matches_dense(mask, shape, dtype=dtype, block_size=block_size, backend="triton", device=device)


@settings(max_examples=8)
@given(masks(max_len=96), SMALL, st.lists(st.integers(0, 48), min_size=2, max_size=2), st.booleans(), KERNELS)
def test_offsets_match_dense_float64(device, mask, shape, offsets, per_row, kernels):
    offset = torch.tensor(offsets, device=device)[: shape.batch] if per_row else offsets[0]
    with kernels():
        assert_matches_dense(mask, shape, block_size=16, q_offset=offset, backend="triton", device=device)


@pytest.mark.parametrize("layout", [lambda x: x.repeat_interleave(3)[::3], lambda x: x[:1].expand(2)])
def test_offsets_of_any_strides(device, layout):
    offset = layout(torch.tensor([5, 1], device=device))
    shape = Shape(2, 1, 1, 20, 24)
    assert_matches_dense(mf.causal(), shape, block_size=16, q_offset=offset, backend="triton", device=device)


def per_batch_and_head(b, h, q, kv, *, ids, spans, floor=0):
    return abs(q - kv) < spans[h] + floor and ids[b, q] == ids[b, kv]


CASES = {
    "several sub-tiles": (mf.causal() & mf.document([30, 1, 60, 20]), Shape(1, 1, 1, 120, 120), 64, {}),
    "several sub-tiles and runs": (  # a chessboard of full and partial tiles, ragged at the end
        lambda b, h, q, kv: (q // 64 + kv // 64) % 2 == 0 or q % 64 == kv % 64,
        Shape(1, 1, 1, 250, 250),
        64,
        {},
    ),
    "a group of three": (mf.sliding_window(9, 3), Shape(2, 6, 2, 40, 50, 20, 9), (16, 32), {}),
    "one key head": (mf.causal(), Shape(1, 4, 1, 33, 33, 16, 32), 32, {}),
    "one query": (mf.causal(), Shape(2, 2, 1, 1, 70), 64, {"q_offset": 69}),
    "a head dim of one": (mf.sliding_window(3, 3), Shape(1, 1, 1, 20, 20, 1, 1), 16, {}),
    "a head dim past a power of two": (mf.causal(), Shape(1, 1, 1, 20, 20, 40, 72), 16, {}),
    "guarded look-ups and divisions": (
        lambda b, h, q, kv: (kv < 4 and kv != 2) or (kv > 9 and q // (kv - 9) > 1),
        Shape(),
        16,
        {},
    ),
    "a head apart": (lambda b, h, q, kv: h == 1, Shape(1, 2, 1, 20, 20), 16, {}),
    "tiles of 48": (mf.causal(), Shape(1, 1, 1, 100, 100), 48, {}),
    "rows before the first": (mf.causal(), Shape(1, 1, 1, 20, 20), 16, {"q_offset": -6}),
    "rows beyond 32 bits": (
        lambda b, h, q, kv: q - 5_000_000_000 >= kv,
        Shape(1, 1, 1, 20, 20),
        16,
        {"q_offset": 5_000_000_000},
    ),
    "a scale": (mf.causal(), Shape(1, 1, 1, 20, 20), 16, {"scale": 3.0}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_shapes_that_take_paths_of_their_own(device, case, dtype):
    mask, shape, block_size, more = CASES[case]
    assert_matches_dense(mask, shape, dtype=dtype, block_size=block_size, backend="triton", device=device, **more)


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_keyword_arguments_and_maps_per_batch_row_and_head(device, ids):
    tables = {
        "ids": (torch.arange(80).view(2, 40) // 9 % 4).to(device, ids),
        "spans": torch.tensor([3, 9, 27, 1], dtype=torch.int32, device=device),
    }
    shape = Shape(2, 4, 2, 40, 40)
    mask = mf.mask(per_batch_and_head)
    assert_matches_dense(mask, shape, block_size=16, backend="triton", device=device, floor=2, **tables)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(device, lengths):
    assert_matches_dense(mf.causal(), Shape(1, 2, 1, *lengths), backend="triton", device=device)


def test_tables_with_strides(device):
    table = torch.arange(160, device=device).view(80, 2)[::2].T // 7  # (2, 40), strides 1 and 4
    assert_matches_dense(
        lambda b, h, q, kv: table[b, q] == table[b, kv],
        Shape(2, 1, 1, 40, 40),
        block_size=16,
        backend="triton",
        device=device,
    )


def big_numbers(b, h, q, kv):
    return (q * 3_000_000_000 + kv) % 7 == 0


def big_table(device):
    table = torch.tensor([2**40 + 3, 3, 2**40 + 3, 2**32 + 3, -(2**62)], device=device).repeat(8)
    return lambda b, h, q, kv: table[q] == table[kv]


@pytest.mark.parametrize("make", [lambda device: big_numbers, big_table])
def test_integers_beyond_32_bits_are_computed_in_64(device, make):
    # In 32 bits 3e9 * q is another number, and 2**32 + 3 equals 3.
    assert_matches_dense(make(device), Shape(1, 1, 1, 40, 40), block_size=16, backend="triton", device=device)


def test_small_integers_are_computed_in_32_bits(device):
    inputs, stripes = Shape().tensors(torch.float32, device=device), mf.dilated_window(7, 2)
    texts = [mf.compile(mask, backend="triton").source(*inputs) for mask in (stripes, big_numbers)]
    assert ["p0_32 = p0.to(tl.int32)" in text for text in texts] == [True, False]


def documents_with_gaps(device):
    """Keys 8 to 12 and 30 on are seen by nobody, rows 20 to 23 and 30 on see nothing."""
    ids = torch.zeros(40, dtype=torch.int32, device=device)
    ids[8:13] = 1
    ids[20:24] = 2
    return lambda b, h, q, kv: ids[q] != 2 and ids[kv] != 1 and q >= kv - 4 and kv < 30 and q < 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_nobody_sees_may_hold_anything(device, results, small, poison, dtype):
    """NaN in hidden K and V, and in Q and dO of blind rows: outputs and gradients finite and unchanged, bit by bit."""
    mask = mf.mask(documents_with_gaps(device))
    q, k, v = small(batch=1, heads=2, kv_heads=1, dtype=dtype)
    dense = mask.dense(40, 40, heads=2, device=device)
    blind, hidden = ~dense.any(3, keepdim=True), ~dense.any(1, keepdim=True).any(2)[..., None]
    assert blind.any()
    assert hidden.any()
    dout, dlse = torch.randn(q.shape).to(q), torch.randn(q.shape[:3]).to(device)
    clean = results.with_gradients(mask, q, k, v, dout, dlse, block_size=32)
    inputs = [
        x.detach().masked_fill(where, poison) for x, where in ((q, blind), (k, hidden), (v, hidden), (dout, blind))
    ]
    dirty = results.with_gradients(
        mask, *[x.requires_grad_() for x in inputs[:3]], inputs[3].detach(), dlse, block_size=32
    )
    assert same(clean, dirty)
    assert all(x.isfinite().all() for x in (dirty[0], *dirty[2:]))


@settings(max_examples=4)
@given(masks(max_len=40), st.sampled_from([math.nan, math.inf]))
def test_what_nobody_sees_may_hold_anything_under_any_mask(device, results, mask, poison):
    q, k, v = Shape(2, 2, 1, 24, 40, 16, 8).tensors(torch.float32, device=device)
    dense = mask.dense(24, 40, batch=2, heads=2, device=device)
    blind, hidden = ~dense.any(3, keepdim=True), ~dense.any(1, keepdim=True).any(2)[..., None]
    dout, dlse = torch.randn(2, 2, 24, 8).to(q), torch.randn(2, 2, 24).to(device)
    clean = results.with_gradients(mask, q, k, v, dout, dlse)
    inputs = [
        x.detach().masked_fill(where, poison) for x, where in ((q, blind), (k, hidden), (v, hidden), (dout, blind))
    ]
    dirty = results.with_gradients(mask, *[x.requires_grad_() for x in inputs[:3]], inputs[3].detach(), dlse)
    assert same(clean, dirty)


def test_rows_that_see_nothing(results, small):
    q, k, v = small()
    out, lse, dq, dk, dv = results(lambda b, h, q, kv: q > 20 and kv < q - 20, q, k, v)
    assert (out[:, :, :21] == 0).all()
    assert (lse[:, :, :21] == -math.inf).all()
    assert (dq[:, :, :21] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    out, lse, *gradients = results(~mf.full(), q, k, v)
    assert not any(x.any() for x in (out, *gradients))
    assert (lse == -math.inf).all()


@settings(max_examples=4)
@given(st.sampled_from([1, 16, 40, 64, 128]), st.sampled_from([16, 64, 128]), st.integers(0, 99))
def test_one_query_of_one_key_has_no_gradient_of_its_score(device, dim, v_dim, seed):
    """P is 1 whatever the score is. dP and delta are rounded alike, so their difference is exactly 0.

    But for numpy's products, by which kernels are interpreted: on some CPUs their sums' order depends on their shape.
    """
    q, k, v = Shape(1, 2, 2, 1, 1, dim, v_dim).tensors(torch.float32, seed=seed, device=device)
    out = mf.attention(q, k, v, mf.causal(), backend="triton", block_size=32)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(q)
    terms = (dout * v).abs().sum(-1, keepdim=True).detach() * dim**-0.5
    unit = 2 * v_dim * torch.finfo(torch.float32).eps if INTERPRETED else 0.0
    for gradient, factor in zip(torch.autograd.grad(out, (q, k), dout), (k, q), strict=True):
        assert (gradient.abs() <= unit * terms * factor.abs()).all()


@settings(max_examples=3)
@given(st.integers(1, 100), st.sampled_from([16, 64]), st.integers(0, 99))
def test_one_query_of_many_keys_matches_dense_float64_in_float32(device, keys, dim, seed):
    shape, offset = Shape(1, 2, 1, 1, keys, dim, dim), keys - 1
    assert_matches_dense(mf.causal(), shape, q_offset=offset, backend="triton", device=device, seed=seed)


def test_same_inputs_same_bits(results, small):
    q, k, v = small(heads=4, kv_heads=1, dtype=torch.float16)
    mask = mf.causal() & mf.document([13, 27])
    assert same(results(mask, q, k, v), results(mask, q, k, v))


def test_any_strides(results, device):
    mask = mf.sliding_window(9, 4)
    packed = torch.randn(2, 40, 3, 2, 16, device=device)  # (B, S, 3, H, D), as a fused projection gives it
    layouts = [x.transpose(1, 2) for x in packed.unbind(2)]
    expected = results(mask, *[x.contiguous().requires_grad_() for x in layouts])
    assert same(results(mask, *[x.detach().requires_grad_() for x in layouts]), expected)
    mirrored = [x.mT.contiguous().mT.requires_grad_() for x in layouts]
    assert mirrored[0].stride(3) != 1
    assert same(results(mask, *mirrored), expected)
    odd = [torch.empty(2, 2, 40, 19, device=device)[..., 1:17].copy_(x).requires_grad_() for x in layouts]
    assert odd[0].stride(2) % 8
    assert same(results(mask, *odd), expected)


def test_tensors_that_begin_inside_a_vector(results, device, compiled):
    """As parts of packed buffers do: same bits, and the kernels that others run."""
    _, _, keys = compiled
    mask = mf.sliding_window(9, 4)
    inputs = [torch.randn(1, 2, 40, 16, device=device) for _ in range(4)]
    dlse = torch.randn(1, 2, 40, device=device)

    def off(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def run(q, k, v, dout, dlse):
        return results.with_gradients(mask, *(x.detach().requires_grad_() for x in (q, k, v)), dout, dlse)

    expected, before = run(*inputs, dlse), len(keys)
    moved = [off(x) for x in (*inputs, dlse)]
    assert all(x.data_ptr() % 16 and x.is_contiguous() for x in moved)
    assert same(run(*moved), expected)
    assert len(keys) == before == 4


def test_an_expanded_key_head_is_a_key_head_apiece(results, device):
    q = torch.randn(1, 3, 20, 16, device=device, requires_grad=True)
    k, v = (torch.randn(1, 1, 20, 16, device=device) for _ in range(2))
    spread = results(mf.causal(), q, *[x.expand(1, 3, 20, 16).detach().requires_grad_() for x in (k, v)])
    copied = results(mf.causal(), q, *[x.repeat(1, 3, 1, 1).requires_grad_() for x in (k, v)])
    assert same(spread, copied)


def test_gradients_through_out_alone_and_lse_alone(small):
    q, k, v = small()
    for pick in (0, 1):
        found, expected = (
            torch.autograd.grad(
                mf.attention(q, k, v, mf.causal(), block_size=16, backend=backend, return_lse=True)[pick].sum(),
                (q, k, v),
                allow_unused=True,
            )
            for backend in ("triton", "cpu" if q.device.type == "cpu" else "triton")
        )
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.zeros(()) if x is None else x, torch.zeros(()) if y is None else y)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_group_may_be_split_over_programs(results, small, monkeypatch, per_head, kv_heads):
    q, k, v = small(batch=2, heads=4, kv_heads=kv_heads, length=20)
    spans = torch.tensor([2, 5, 9, 30], device=q.device)
    mask = mf.mask(lambda b, h, q, kv: abs(q - kv) < spans[h]) if per_head else mf.causal()
    found = {}
    *parts, whole = (part for part in (1, 2, 4) if part <= 4 // kv_heads)
    for part in (*parts, whole):
        monkeypatch.setattr(triton_device, "part_of_group", lambda device, group, programs, part=part: part)
        found[part] = results(mask, q, k, v)
    for part in parts:
        assert same(found[part][:3], found[whole][:3])
        for x, y in zip(found[part][3:], found[whole][3:], strict=True):  # sums in another order
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", [1, 2])
def test_the_order_of_programs_changes_nothing(results, small, monkeypatch, part):
    q, k, v = small(batch=2, heads=4, kv_heads=2, length=24)
    spans = torch.tensor([[2, 5, 9, 30], [1, 3, 40, 4]], device=q.device)
    mask = mf.mask(lambda b, h, q, kv: abs(q - kv) < spans[b, h])
    monkeypatch.setattr(triton_device, "part_of_group", lambda device, group, programs: part)
    found = []
    for share in (1, 2, 3, 8):
        monkeypatch.setattr(
            triton_device, "heads_in_cache", lambda device, size, group, heads, share=share: max(1, min(heads, share))
        )
        found.append(results(mask, q, k, v))
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("dtype", "block_size", "message"),
    [
        (torch.float64, 128, "float64"),
        (torch.float32, 24, "block.size.* multiples? of 16, got"),
        (torch.float32, (16, 8), "block.size.* multiples? of 16, got"),
    ],
)
def test_what_it_cannot_do_is_told(small, dtype, block_size, message):
    with pytest.raises(mf.BackendError, match=message):
        mf.attention(*small(dtype=dtype), mf.causal(), block_size=block_size, backend="triton")


def test_a_mask_without_exact_counterpart_is_told(small):
    with pytest.raises(
        mf.BackendError,
        match=r"no exact `floordiv` for float32, in <lambda> \(.*\.py:\d+\); compute it outside the mask",
    ):
        mf.attention(*small(), lambda b, h, q, kv: (q * 0.5) // 3.0 > kv % 5, backend="triton")


def test_tensors_on_the_cpu_are_refused_without_the_interpreter():
    out = in_a_process("""
        import torch, maskflash as mf
        x = torch.zeros(1, 1, 16, 16)
        try:
            mf.attention(x, x, x, backend="triton")
        except mf.BackendError as error:
            print(error)
    """)
    assert "the triton backend can't run here: its kernels run on CUDA tensors, got cpu; move q, k and v" in out


# Columns that count from an offset of the call's


def by_number(device):
    """Masks whose columns' own numbers matter: compared, looked up (before the first, too) and divided."""
    ids = (torch.arange(200, device=device) // 9 % 3).to(torch.int32)
    spans = torch.tensor([4, 19], device=device)
    return {
        "causal": lambda b, h, q, kv: q >= kv,
        "documents": lambda b, h, q, kv: ids[q] == ids[kv],
        "a window for each head": lambda b, h, q, kv: abs(q - kv) < spans[h],
        "divisions": lambda b, h, q, kv: (kv // 3 + kv % 5 + q) % 7 < 4,
    }


@settings(max_examples=8)
@given(st.sampled_from(["causal", "documents", "a window for each head", "divisions"]), SMALL, st.data(), KERNELS)
def test_offsets_of_rows_and_columns_match_dense_float64(device, name, shape, data, kernels):
    heads = 2 if name == "a window for each head" else shape.heads
    shape = replace(shape, heads=heads, kv_heads=1 if heads != shape.heads else shape.kv_heads)
    offsets = {}
    for index in ("q_offset", "kv_offset"):
        numbers = data.draw(st.lists(st.integers(-20, 60), min_size=shape.batch, max_size=shape.batch), label=index)
        per_row = data.draw(st.booleans(), label=f"{index} per row")
        offsets[index] = torch.tensor(numbers, device=device) if per_row else numbers[0]
    with kernels():
        assert_matches_dense(
            by_number(device)[name], shape, block_size=(16, 32), backend="triton", device=device, **offsets
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("limit", [0.1, -0.0, 2.5, float("inf"), float("nan"), 1e-40])
def test_floats_that_come_with_a_call_are_what_torch_makes_of_them(limit, dtype, device):
    place = (torch.arange(40, device=device) % 7 * 0.1).to(dtype)
    mask = mf.mask(lambda b, h, q, kv, *, limit: place[q] - place[kv] <= limit or (kv + 1) * limit > 60)
    shape = Shape(1, 2, 1, 40, 40, 16, 16)
    assert_matches_dense(mask, shape, block_size=16, backend="triton", device=device, limit=limit)
