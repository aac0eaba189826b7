"""Pools in float8_e4m3fn on the Triton backend: few rows widen them in the kernel, others as they are gathered."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import few
from maskflash.ground.eight_bits import FORMAT
from maskflash.testing import masks
from tests.backends.triton.test_paged import by_table, cache, check
from tests.backends.triton.test_run import DTYPES
from tests.conftest import DEVICE, EMULATED

pytest.importorskip("triton")
__all__ = ["by_table"]  # a fixture
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy, of NaN and infinities
    pytest.mark.skipif(DEVICE in ("sm_80", "sm_86"), reason="has no e4m3"),
]

KINDS = ("number", "heads", "tokens")
UNREAD = [torch.bfloat16] if EMULATED else []  # the emulator can't read the assembly that makes it of e4m3
BIAS = torch.linspace(-1, 1, 128).view(2, 64)


def in_8_bits(draw, pools, kind, layout):
    """Codes of pools (P, page_size, Hkv, D), in a layout; scales as a call takes them; what they stand for, float64."""
    found, given, wide = [], {}, []
    for name, pool in zip("kv", pools, strict=True):
        pool = pool.float().cpu()
        tokens = 2.0 ** torch.randint(-30 if name == "v" else -9, 4, pool.shape[:3], generator=draw)
        shared = {"number": torch.tensor(0.01), "heads": torch.rand(pool.shape[2], generator=draw) * 0.02 + 0.001}
        each = tokens if kind == "tokens" else shared[kind].expand(pool.shape[:3])
        codes = (pool / each[..., None]).clamp(-448, 448).to(FORMAT)
        wide.append(codes.double() * each.double()[..., None])
        unused = pool.isnan().all((2, 3))
        tokens = tokens.masked_fill(unused[..., None], math.nan)
        turned = (lambda x: x.transpose(1, 2).contiguous()) if layout == "HND" else (lambda x: x)
        scale = {"number": 0.01, "tokens": turned(tokens)}.get(kind, shared["heads"])
        found.append(turned(codes))
        given[f"{name}_scale"] = scale
    return found, given, wide


def on(device, scales):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in scales.items()}


@settings(max_examples=15)
@given(st.data())
def test_every_mask_and_table_matches_dense_float64(device, data):
    requests = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=requests, max_size=requests))
    count = min(data.draw(st.integers(1, 5)), *lengths)
    page_size = data.draw(st.sampled_from([1, 3, 4, 16, 33]))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 3)]))
    heads, dims = kv_heads * group, data.draw(st.sampled_from([(16, 16), (8, 24)]))
    dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES if dtype not in UNREAD]))
    layout = data.draw(st.sampled_from(["NHD", "HND"]))
    mask = data.draw(masks(max_len=64, batch=requests, heads=heads))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids, pools, _ = cache(draw, lengths, page_size, kv_heads, dims, torch.float32, "cpu", "NHD")
    pools, scales, wide = in_8_bits(draw, pools, data.draw(st.sampled_from(KINDS)), layout)
    q = torch.randn(requests, heads, count, dims[0], generator=draw).to(dtype).to(device)
    sizes = {"batch": requests, "heads": heads, "device": device}
    visible, k, v = [], [], []
    for r, length in enumerate(lengths):
        see = mask.dense(count, length, q_offset=length - count, **sizes)
        visible.append(see[r : r + 1] if len(see) > 1 else see)
        columns, at = visible[r].flatten(0, 2).any(0), torch.arange(length)
        for tokens, pool in zip((k, v), wide, strict=True):
            found = pool[ids[r, at // page_size], at % page_size].to(device)
            tokens.append(torch.where(columns[:, None, None], found, 0.0))
        used = torch.zeros(ids.shape[1], dtype=torch.bool)
        used[columns.nonzero()[:, 0].cpu() // page_size] = True
        ids[r][~used] = -1
    sinks = torch.linspace(-1, 2, heads, device=device) if data.draw(st.booleans()) else None
    pages = mf.PageTable(ids.to(device), torch.tensor(lengths, device=device), page_size)
    attn = mf.compile(mask, backend="triton", block_size=32, splits=data.draw(st.sampled_from(["auto", 1, 3])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "are_few", lambda q_len, kv_len: q_len > 0)
        patch.setattr(few, "_SHORTEST", 16)
        patch.setattr(gpu, "programs", lambda device: 1 << 20)
        more = {"layout": layout, "sinks": sinks, "return_lse": True, **on(device, scales)}
        out, lse = attn.paged(q, *(pool.to(device) for pool in pools), pages, **more)
    for r in range(requests):
        check((out[r], lse[r]), q[r], k[r], v[r], visible[r], sinks)


def step(device, kind="tokens", seed=0):
    """q, pools, pages and scales of three requests."""
    draw, lengths = torch.Generator().manual_seed(seed), (20, 40, 33)
    ids, pools, _ = cache(draw, lengths, 8, 2, (16, 16), torch.float32, "cpu", "NHD")
    pools, scales, _ = in_8_bits(draw, pools, kind, "NHD")
    q = torch.randn(3, 4, 1, 16, generator=draw).to(device)
    pages = mf.PageTable(ids.to(device), torch.tensor(lengths, device=device), 8)
    return q, [pool.to(device) for pool in pools], pages, on(device, scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("score", [None, lambda score, b, h, q, kv: score + BIAS[b % 2, kv]])
def test_pools_are_attended_as_on_the_cpu(kind, gathered, score):
    q, pools, pages, scales = step("cpu", kind)
    found, wanted = (
        mf.compile(mf.sliding_window(11), score=score, backend=backend, check=gathered).paged(
            q, *pools, pages, return_lse=True, **scales
        )
        for backend in ("triton", "cpu")
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=4e-6, rtol=1e-5)


def test_the_host_reads_no_scale(device, by_table):
    """A scale that can't be makes rows NaN that see its token, and no others."""
    q, pools, pages, scales = step(device)
    for splits in (1, 4):
        attn = mf.compile(mf.sliding_window(11), backend="triton", splits=splits)
        clean = attn.paged(q, *pools, pages, return_lse=True, **scales)
        assert all(x.isfinite().all() for x in clean)
        page, old = int(pages.block_table[1, 4]), int(pages.block_table[1, 0])
        for name in scales:
            for wrong in (0.0, -1.0, math.nan, math.inf, 7.6e35):
                changed = scales[name].clone()
                changed[page, 3, 1] = changed[old, 3, 1] = wrong  # of which no row sees the second
                found = attn.paged(q, *pools, pages, return_lse=True, **{**scales, name: changed})
                for x, y in zip(found, clean, strict=True):
                    assert x[1, 2:].isnan().all()
                    assert torch.equal(x[1, :2], y[1, :2]) and torch.equal(x[[0, 2]], y[[0, 2]])


def test_values_of_tiny_scales_are_not_lost(device):
    """In float16 their product with p would be 0."""
    q, pools, pages, scales = step(device, "heads")
    attn, scales["v_scale"] = mf.compile(mf.causal(), backend="triton"), torch.full((2,), 2.0**-20, device=device)
    found = attn.paged(q, *pools, pages, **scales)
    wanted = attn.paged(q, pools[0], pools[1], pages, **{**scales, "v_scale": 1.0}) * 2.0**-20
    assert torch.equal(found, wanted)
    half = attn.paged(q.half(), *pools, pages, **scales)
    assert (half != 0).any() and float((half.float() - wanted).abs().amax()) < 2.0**-20


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_that_see_tiny_scales_alone_are_as_exact_as_others(device, dtype, by_table):
    """Each row is right by its own size, though other rows of its tile see values of far larger scales."""
    length, draw = 32, torch.Generator().manual_seed(3)
    q, (k, v) = torch.randn(1, 4, 4, 16, generator=draw).to(dtype), torch.randn(2, 1, 2, length, 16, generator=draw)
    v_scale = torch.where(torch.arange(length) % 2 == 0, 2.0**-11, 2.0**13)[None, :, None].repeat(1, 1, 2)
    pools = [x.transpose(1, 2).contiguous().to(FORMAT) for x in (k, v)]
    mask = mf.mask(lambda b, h, q, kv: (q + kv) % 2 == 0)
    pages = mf.PageTable(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([length]), length)
    pages.block_table, pages.lengths = pages.block_table.to(device), pages.lengths.to(device)
    given, scales = (x.to(device) for x in (q, *pools)), {"k_scale": 1.0, "v_scale": v_scale.to(device)}
    found = mf.compile(mask, backend="triton").paged(*given, pages, **scales).cpu().double()
    numbers = pools[0].double(), pools[1].double() * v_scale[..., None]
    k, v = (x.transpose(1, 2).repeat_interleave(2, 1) for x in numbers)
    products = (q.double() @ k.mT / 4).masked_fill(~mask.dense(4, length, q_offset=length - 4), -math.inf)
    wanted = products.softmax(-1) @ v
    errors, sizes = (x.square().mean(-1).sqrt() for x in (found - wanted, wanted))
    assert sizes.amin() < 2.0**-11 and sizes.amax() > 2.0**10
    assert float((errors / sizes).amax()) < (2.0**-10 if dtype == torch.float16 else 2.0**-19)


@pytest.mark.skipif(EMULATED, reason="it says which device there is")
def test_devices_without_the_format_are_refused(monkeypatch):
    q, pools, pages, scales = step("cpu")
    attn = mf.compile(mf.causal(), backend="triton")
    monkeypatch.setattr(gpu._Compiling, "arch", 86)
    monkeypatch.setattr(gpu, "interprets", lambda: False)
    with pytest.raises(mf.BackendError, match=r"pools in 8 bits here: it needs compute capability 8\.9 .*, got 8\.6"):
        attn.paged(q, *pools, pages, **scales)
    monkeypatch.setattr(gpu, "arch", lambda device: "gfx942")
    with pytest.raises(mf.BackendError, match=r"on AMD's GPUs no kernel with it has been compiled, got gfx942"):
        attn.paged(q, *pools, pages, **scales)
    assert gpu.without_8_bits(torch.device("cpu")) is not None
    monkeypatch.setattr(gpu, "arch", lambda device: 90)
    assert gpu.without_8_bits(torch.device("cuda")) is None
