"""Triton attention equals dense float64 attention, on a GPU, in Triton's interpreter or as emulated PTX.

And it keeps its promises.
"""

import math
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.errors import OutOfResources, PTXASError

import maskflash as mf
from maskflash.backends.triton import device as triton_device
from maskflash.backends.triton import launch as triton_launch
from maskflash.backends.triton import modules, tile_choice
from maskflash.backends.triton import plan as triton_plan
from maskflash.backends.triton import run as triton
from maskflash.op import attention
from maskflash.testing import Shape, assert_matches_dense, columns, masks, shapes

# The interpreter computes with numpy, which warns of the NaN and infinities that some tests are about, and its
# products of bfloat16 are wrong.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
BLOCKS = st.sampled_from([16, 32, 64, (16, 32), (64, 16)])
SMALL = shapes(max_len=48, max_head_dim=24)  # about a second each under the interpreter, and to compile on a GPU


@contextmanager
def expressions():
    """Kernels compute masks from their expressions, also where each row sees one interval."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_plan, triton):
            patch.setattr(module, "intervals", lambda found: None)
        mf.invalidate()
        yield
    mf.invalidate()


KERNELS = st.sampled_from([nullcontext, expressions])


@pytest.fixture
def by_expression():
    with expressions():
        yield


@pytest.fixture(scope="module")
def small(device):
    """q, k and v of a small call."""

    def build(batch=1, heads=2, kv_heads=2, length=40, dim=16, dtype=torch.float32):
        return Shape(batch, heads, kv_heads, length, length, dim, dim).tensors(dtype, device=device)

    return build


@pytest.fixture(scope="module")
def results(device):
    """out, lse, dq, dk and dv of a call, with fixed gradients arriving at out and lse."""

    def run(mask, q, k, v, **kwargs):
        draw = torch.Generator().manual_seed(5)
        dout = torch.randn(*q.shape[:3], v.shape[3], generator=draw).to(q)
        return run_with(mask, q, k, v, dout, torch.randn(q.shape[:3], generator=draw).to(device), **kwargs)

    def run_with(mask, q, k, v, dout, dlse, **kwargs):
        out, lse = mf.attention(q, k, v, mask, backend="triton", return_lse=True, **{"block_size": 16, **kwargs})
        return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))

    run.with_gradients = run_with
    return run


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
    """P is 1 whatever the score is. dP and delta are rounded alike, so their difference is exactly 0."""
    q, k, v = Shape(1, 2, 2, 1, 1, dim, v_dim).tensors(torch.float32, seed=seed, device=device)
    out = mf.attention(q, k, v, mf.causal(), backend="triton", block_size=32)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(q)
    assert not any(gradient.any() for gradient in torch.autograd.grad(out, (q, k), dout))


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


REFUSALS = [
    lambda: OutOfResources(300_000, 200_000, "shared memory"),
    lambda: PTXASError("ptxas fatal: (C7600) Register allocation failed"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["memory", "ptxas"])
def test_a_tile_that_does_not_fit_is_shrunk_until_it_does(results, small, monkeypatch, refusal):
    monkeypatch.setattr(tile_choice, "_known", {})
    q, k, v = small()
    expected = results(mf.causal(), q, k, v, block_size=64)
    launch, tried = triton_launch.Launcher.launch, []

    def limited(self, pass_name, tile, *rest):
        tried.append((pass_name, tile))
        if tile.block_m * tile.block_n > 512 or tile.stages > 1:
            raise refusal()
        return launch(self, pass_name, tile, *rest)

    monkeypatch.setattr(triton_launch.Launcher, "launch", limited)
    found = results(mf.causal(), q, k, v, block_size=(64, 128))  # another block size: a plan that knows no tile yet
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in tried} == {"forward", "dkdv", "dq"}
    count = len(tried)
    assert count > 6
    results(mf.causal(), q, k, v, block_size=(64, 128))
    assert len(tried) == count + 3  # it knows now


@pytest.mark.parametrize("refusal", REFUSALS, ids=["memory", "ptxas"])
def test_a_device_that_nothing_fits_is_told(results, small, monkeypatch, refusal):
    def never(*args):
        raise refusal()

    monkeypatch.setattr(triton_launch.Launcher, "launch", never)
    with pytest.raises(mf.BackendError, match=r"no tile of forward fits this device: ") as told:
        results(mf.causal(), *small())
    assert str(refusal()) in str(told.value)


def test_an_error_that_is_not_the_tiles_is_not_tried_again(results, small, monkeypatch):
    tried = []

    def broken(self, pass_name, tile, *rest):
        tried.append(tile)
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(triton_launch.Launcher, "launch", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        results(mf.causal(), *small())
    assert len(tried) == 1


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


def test_what_no_kernel_computes_may_be_known_of_rows(small):
    """Triton has no such division; the analysis has done it, since each row sees one interval."""
    q, k, v = small(length=40)
    expected = mf.attention(q.cpu(), k.cpu(), v.cpu(), lambda b, h, q, kv: (q * 0.5) // 3.0 > 2)
    found = mf.attention(q, k, v, lambda b, h, q, kv: (q * 0.5) // 3.0 > 2, backend="triton")
    torch.testing.assert_close(found.cpu(), expected)


def in_a_process(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


# Nothing is compiled again for another length, window, offset or table


def varied(device):
    """Calls that differ in numbers alone: (q, k, v), then what is given by name."""

    @mf.mask
    def packed(b, h, q, kv, *, ids, window, slope):
        return 0 <= q - kv < window and ids[b, q] == ids[b, kv] and kv * slope < 9

    def call(batch, heads, kv_heads, length, kv_len, window, q_offset, seed, ids=torch.int64, dim=16, slope=0.5):
        shape = Shape(batch, heads, kv_heads, length, kv_len, dim, dim)
        q, k, v = shape.tensors(torch.float16, seed=seed, device=device)
        size = max(length + 20, kv_len)
        table = torch.arange(batch * size, device=device).view(batch, size).to(ids) // (3 + seed)
        if isinstance(q_offset, list):
            q_offset = torch.tensor(q_offset, device=device)
        out = mf.attention(
            q, k, v, packed, block_size=16, backend="triton", q_offset=q_offset, ids=table, window=window, slope=slope
        )
        out.sum().backward()

    return call


@pytest.fixture
def compiled(monkeypatch):
    """What has been rendered and imported, and all that triton compiles for: constants, types, alignments."""
    triton_launch.kernel.cache_clear()
    rendered, loaded, keys = [], [], set()
    render, load, kernel = triton_launch.render, modules.load, triton_launch.kernel

    def recorded(special, pass_name):
        found = kernel(special, pass_name)

        def launch(programs, tile, **arguments):
            kinds = {
                name: (x.dtype, x.data_ptr() % 16 == 0)
                if isinstance(x, torch.Tensor)
                else x
                if name.isupper()
                else type(x)
                for name, x in arguments.items()
            }
            keys.add((special, pass_name, tile, *kinds.items()))
            return found.launch(programs, tile, **arguments)

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(triton_launch, "render", lambda *args: rendered.append(args) or render(*args))
    monkeypatch.setattr(modules, "load", lambda text: loaded.append(text) or load(text))
    monkeypatch.setattr(triton_launch, "kernel", recorded)
    monkeypatch.setattr(triton, "kernel", recorded)
    return rendered, loaded, keys


def test_another_number_renders_imports_and_compiles_nothing(device, compiled, monkeypatch, by_expression):
    rendered, loaded, keys = compiled
    call = varied(device)
    call(1, 4, 2, 20, 20, 5, 0, seed=0)
    assert len(rendered) == len(loaded) == len(keys) == 4  # forward, delta, dk and dv, dq
    for part in (1, 2):  # how many of a group one program sums depends on lengths
        monkeypatch.setattr(triton_device, "part_of_group", lambda device, group, programs, part=part: part)
        for arguments in [
            (1, 4, 2, 20, 20, 6, 0),
            (1, 4, 2, 20, 20, 0, 0),
            (1, 4, 2, 20, 20, 1, 0),
            (1, 4, 2, 33, 20, 5, 0),
            (1, 4, 2, 16, 32, 5, 0),
            (1, 4, 2, 1, 1, 5, 0),
            (1, 4, 2, 20, 20, 5, 7),
            (3, 6, 3, 20, 20, 5, 0),
            (1, 4, 1, 20, 20, 5, 0),
        ]:
            call(*arguments, seed=1)
    for slope in (0.0, -0.0, 0.25, -3.5, float("inf"), 1e-300):
        call(1, 4, 2, 20, 20, 5, 0, seed=1, slope=slope)
    assert len(rendered) == len(loaded) == len(keys) == 4


def one_interval_masks(device):
    """Masks of which each row sees one interval, which know of no other; with what a call of them brings."""
    spans = torch.tensor([3, 30, 9, 1], device=device)
    ids = (torch.arange(80, device=device) // 7).view(2, 40)
    stops = torch.full((40,), 33, dtype=torch.int32, device=device)
    return {
        "causal": (mf.causal(), {}),
        "a window": (mf.sliding_window(9, 4), {}),
        "a window inside documents": (mf.causal() & mf.sliding_window(9) & mf.document([13, 1, 26]), {}),
        "FlashMask's vectors": (mf.ColumnIntervals(stops, causal=True), {}),
        "a window for each head": (mf.mask(lambda b, h, q, kv: abs(q - kv) < spans[h]), {}),
        "documents of each batch row": (mf.mask(lambda b, h, q, kv, *, ids: ids[b, q] == ids[b, kv]), {"ids": ids}),
        "blind rows": (mf.mask(lambda b, h, q, kv: q > 20 and kv < q - 25), {}),
        "everything": (mf.full(), {}),
    }


def test_all_masks_of_one_interval_share_one_kernel(device, compiled, small):
    """Whatever they look at, and whatever offsets come with them, on any batch."""
    rendered, loaded, keys = compiled
    for mask, given_by_name in one_interval_masks(device).values():
        q, k, v = small(batch=2, heads=4)
        mf.attention(q, k, v, mask, block_size=16, backend="triton", **given_by_name).sum().backward()
    for offsets in ({"q_offset": 5}, {"q_offset": torch.tensor([3, -9], device=device), "kv_offset": -2}):
        q, k, v = small(batch=2, heads=4)
        mf.attention(q, k, v, mf.causal(), block_size=16, backend="triton", **offsets).sum().backward()
    assert len(rendered) == len(loaded) == len(keys) == 4  # forward, delta, dk and dv, dq
    assert not any("causal" in text or "<lambda>" in text for text in loaded)


@pytest.mark.parametrize("name", one_interval_masks("cpu"))
def test_masks_of_one_interval_match_dense_float64(device, name):
    mask, given_by_name = one_interval_masks(device)[name]
    offset = {} if "FlashMask" in name else {"kv_offset": torch.tensor([0, 2], device=device)}
    shape = Shape(2, 4, 2, 40, 38 if offset else 40)
    assert_matches_dense(mask, shape, block_size=(16, 32), backend="triton", device=device, **offset, **given_by_name)


@settings(max_examples=8)
@given(st.integers(1, 40), st.data())
def test_column_intervals_match_dense_float64(device, length, data):
    vectors = data.draw(columns(length, length, 2, 2))
    shape = Shape(2, 2, 1, length, length)
    assert_matches_dense(vectors.to(device), shape, block_size=16, backend="triton", device=device)


def test_the_kernel_is_told(device, small):
    made = {"interval": mf.causal(), "expression": mf.dilated_window(9, 2)}
    for name, mask in made.items():
        attn = mf.compile(mask, backend="triton")
        explained = attn.explain(40, 40, device=device)
        assert explained.to_dict()["kernel"] == name
        assert f"{name}: it " in str(explained)
        assert ("intervals" in attn.source(*small())) == (name == "interval")


def test_a_function_that_moves_in_its_file_compiles_nothing(compiled, small, tmp_path):
    text = "def stripes(b, h, q, kv):\n    return (q + kv) % 3 == 0\n"
    for number, above in enumerate(("", "\n\n")):
        path = tmp_path / f"masks_{number}.py"
        path.write_text(above + text)
        names = {}
        exec(compile(path.read_text(), str(path), "exec"), names)
        attn = mf.compile(names["stripes"], backend="triton", block_size=16)
        attn(*small(length=20)).sum().backward()
        assert f"# stripes ({path.name}:{2 + len(above)}): q + kv" in attn.source(*small(length=20))
    rendered, loaded, keys = compiled
    assert len(rendered) == len(loaded) == len(keys) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("limit", [0.1, -0.0, 2.5, float("inf"), float("nan"), 1e-40])
def test_floats_that_come_with_a_call_are_what_torch_makes_of_them(limit, dtype, device):
    place = (torch.arange(40, device=device) % 7 * 0.1).to(dtype)
    mask = mf.mask(lambda b, h, q, kv, *, limit: place[q] - place[kv] <= limit or (kv + 1) * limit > 60)
    shape = Shape(1, 2, 1, 40, 40, 16, 16)
    assert_matches_dense(mask, shape, block_size=16, backend="triton", device=device, limit=limit)


@pytest.mark.parametrize(
    ("change", "renders", "compiles"),
    [
        ({"ids": torch.int32}, 3, 3),  # delta knows no mask
        ({"q_offset": [7]}, 3, 3),
        ({"dim": 8}, 3, 4),
        ({"heads": 2}, 0, 1),  # no group: dK and dV need no sums, and are written as they are wanted
    ],
)
def test_another_structure_renders_and_compiles_once(device, compiled, change, renders, compiles, by_expression):
    rendered, _, keys = compiled
    call = varied(device)
    first = {"batch": 1, "heads": 4, "kv_heads": 2, "length": 20, "kv_len": 20, "window": 5, "q_offset": 0}
    call(**first, seed=0)
    assert len(rendered) == len(keys) == 4
    call(**{**first, **change}, seed=0)
    assert (len(rendered), len(keys)) == (4 + renders, 4 + compiles)
    again = {"q_offset": [3, 9], "batch": 2} if "q_offset" in change else {"length": 33}
    call(**{**first, **change, **again}, seed=1)
    assert (len(rendered), len(keys)) == (4 + renders, 4 + compiles)
    if "dim" in change:
        call(**{**first, "dim": 12}, seed=0)  # is filled up to 16
        assert (len(rendered), len(keys)) == (4 + renders, 4 + compiles)


def test_triton_compiles_no_number_into_a_kernel():
    """Every number has a type of its own and is not specialised; pointers and capital constants are what is left."""
    out = in_a_process("""
        import torch, maskflash as mf
        from maskflash.backends.triton import modules
        from maskflash.backends.triton.render import render
        from maskflash.backends.triton.signature import PASSES, Specialisation, TableKind

        ids, spans = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(4)
        for window in (3, 5):
            mask = mf.mask(lambda b, h, q, kv: q - kv < window and ids[b, q] == ids[b, kv] and spans[h] < q)
            problem = mask.at(8, 8, batch=2, heads=4).tiled((16, 16))
            tables = tuple(map(TableKind.of, problem.inputs.tables))
            for flags in ({}, {"q_offsets": True, "kv_offsets": True}, {"interval": True}):
                special = Specialisation(problem.expr, tables, **flags)
                for name in PASSES:
                    kernel = getattr(modules.load(render(special, name)), name)
                    for param in kernel.params:
                        free = param.do_not_specialize
                        kind = "constant" if param.is_constexpr else param.annotation_type or "pointer"
                        print(name, param.name, kind, free)
        print(len(modules._modules))
    """)
    *lines, modules = out.splitlines()
    assert modules == "10"  # three each, and delta: another window is the same text
    seen = set()
    for line in lines:
        _, name, kind, free = line.split()
        seen.add(kind)
        if kind == "constant":
            assert name.isupper(), line
        elif (name.startswith("t") and name[1:].isdigit()) or (name in ("q_offset", "kv_offset") and kind == "pointer"):
            assert free == "True", line  # a table may lie at any address: new ones are views as often as not
        elif kind == "pointer":
            assert name.endswith("_ptr") or name in {*WALKS, "intervals"}, line
        else:
            assert kind in ("i32", "i64", "fp32"), line
            assert free == "True", line
    assert seen >= {"constant", "pointer", "i64", "fp32"}


WALKS = {"order", *(f"{kind}_{what}" for kind in ("full", "partial") for what in ("offsets", "tiles", "start", "stop"))}


# Measured tiles


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Tiles with two stages are fastest: (tiles that were timed, tiles that were launched) by pass."""
    monkeypatch.setenv(modules.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tile_choice, "_known", {})
    timed, launched = [], []
    launch = triton_launch.Launcher.launch

    def seconds(function, device):
        tile = function.args[1]
        timed.append(tile)
        return abs(tile.stages - 2) + tile.block_m / 1e3

    def counted(self, pass_name, tile, *rest):
        launched.append((pass_name, tile))
        return launch(self, pass_name, tile, *rest)

    monkeypatch.setattr(triton_device, "seconds", seconds)
    monkeypatch.setattr(triton_launch.Launcher, "launch", counted)
    return timed, launched


def test_tuning_measures_once_and_keeps_the_fastest(small, measured, monkeypatch):
    timed, launched = measured
    q, k, v = small(length=33)

    def run(window, **more):
        attn = mf.compile(mf.sliding_window(window), backend="triton", block_size=64, **more)
        out = attn(q, k, v)
        return out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))

    expected = run(7)
    assert timed == []
    launched.clear()
    found = run(7, tune=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    count = len(timed)
    assert count > 9
    assert all(64 % side == 0 for tile in timed for side in (tile.block_m, tile.block_n))
    assert {name for name, _ in launched} == {"forward", "dkdv", "dq"}
    chosen = dict(launched)
    assert all(tile.stages == 2 or tile.block_m == 16 for tile in chosen.values())
    launched.clear()
    run(7, tune=True)
    assert len(timed) == count
    assert dict(launched) == chosen
    monkeypatch.setattr(tile_choice, "_known", {})  # a later process, and another window
    launched.clear()
    run(5, tune=True)
    assert len(timed) == count
    assert dict(launched) == chosen


def test_nothing_is_measured_while_a_cuda_graph_is_captured(small, measured, monkeypatch):
    monkeypatch.setattr(attention, "capturing", lambda device: True)
    with torch.no_grad():
        mf.compile(mf.causal(), backend="triton", block_size=64, tune=True)(*small())
    assert measured[0] == []
    assert [name for name, _ in measured[1]] == ["forward"]


def test_tiles_that_do_not_compile_are_passed_over(small, measured, monkeypatch):
    seconds, failed = triton_device.seconds, []

    def failing(function, device):
        error = (OutOfResources(300_000, 1, "shared memory"), PTXASError("too many registers"))[len(failed) % 2]
        if function.args[1].stages > 1:
            failed.append(error)
            raise error
        return seconds(function, device)

    monkeypatch.setattr(triton_device, "seconds", failing)
    attn = mf.compile(mf.causal(), backend="triton", block_size=64, tune=True)
    attn(*small()).sum().backward()
    assert len(failed) > 1
    assert all(tile.stages == 1 for _, tile in measured[1][-2:])
