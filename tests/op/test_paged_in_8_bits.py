"""Pools in float8_e4m3fn: attention is dense float64's over the numbers that codes and scales stand for."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.cpu import few, paged
from maskflash.ground import pool as pool_module
from maskflash.ground.eight_bits import FORMAT, LARGEST, quantised, scales_of, widened
from maskflash.ground.pool import Pool
from maskflash.testing import masks, scores
from tests.op.test_paged import (
    DIM,
    FEW,
    HEADS,
    KV_HEADS,
    PAGED,
    PREFIXES,
    TABLES,
    V_DIM,
    Cache,
    assert_as_dense,
    computed_once,
    drawn,
    requests,
    steps,
)

__all__ = ["computed_once"]  # a fixture
KINDS = ("number", "0-d", "one of 1", "heads", "tokens")


class CacheIn8Bits(Cache):
    """The same with codes in the pools, NaN in unused slots, and NaN as their scales where each token has one."""

    def __init__(self, lengths, page_size, layout="NHD", scale="tokens", dtype=torch.float32, **how):
        super().__init__(lengths, page_size, "NHD", dtype=torch.float32, **how)
        self.layout, self.dtype = layout, dtype
        table, given, wide = self.pages.block_table.long(), {}, []
        for n, (name, pool) in enumerate(zip("kv", self.pools, strict=True)):
            draw = torch.Generator().manual_seed(n)
            one, heads = 0.007 + 0.001 * n, torch.rand(KV_HEADS, generator=draw) * 0.02 + 0.002
            tokens = 2 ** (torch.randn(pool.shape[:3], generator=draw) - 7)
            each = {"heads": heads, "tokens": tokens}.get(scale, torch.tensor(one)).expand(pool.shape[:3])
            codes = (pool / each[..., None]).to(FORMAT)
            tokens.masked_fill_(pool.isnan().all((2, 3))[..., None], math.nan)
            if layout == "HND":
                tokens = tokens.transpose(1, 2).contiguous()
            kinds = {"number": one, "0-d": torch.tensor(one), "one of 1": torch.tensor([one])}
            given[f"{name}_scale"] = {**kinds, "heads": heads, "tokens": tokens}[scale]
            places = torch.arange(self.k.shape[2])
            found = (codes.double() * each.double()[..., None])[table[:, places // page_size], places % page_size]
            wide.append(found.nan_to_num(0.0).transpose(1, 2))
            self.pools[n] = codes.transpose(1, 2).contiguous() if layout == "HND" else codes
        (self.k, self.v), self.scales = wide, given


@FEW
@given(
    mask=masks(2 * TABLES, batch=3, heads=4),
    call=requests(),
    how=PAGED,
    scale=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_random_masks(mask, call, how, scale, dtype):
    assert_as_dense(CacheIn8Bits(call[0], **how, scale=scale, dtype=dtype), call[1], mask)


@settings(max_examples=8)
@given(
    mask=masks(2 * TABLES, batch=3, heads=4),
    score=scores(2 * TABLES, batch=3, heads=4),
    call=requests(),
    how=PAGED,
    scale=st.sampled_from(KINDS),
)
def test_random_masks_and_scores(mask, score, call, how, scale):
    assert_as_dense(CacheIn8Bits(call[0], **how, scale=scale), call[1], mask, score=score)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=masks(2 * TABLES, batch=3, heads=4), call=steps(), how=PREFIXES, scale=st.sampled_from(KINDS))
def test_shared_prefixes(computed_once, mask, call, how, scale):
    assert_as_dense(CacheIn8Bits(call[0], **how, scale=scale), call[1], mask)


@pytest.mark.parametrize("scale", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[1, 1, 1], [20, 1, 0], [50, 30, 9]])
def test_sinks(scale, dtype, counts):
    cache = CacheIn8Bits([50, 40, 9], 8, scale=scale, shared=1, dtype=dtype)
    assert_as_dense(cache, counts, mf.sliding_window(9), sinks=torch.tensor([0.5, -torch.inf, 2.0, -1.0]))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [512, 320, 257, 514, 1000])
@pytest.mark.parametrize("scale", ["heads", "tokens"])
def test_large_pages_are_read_in_parts(layout, page_size, scale, monkeypatch):
    """A contiguous cache is pages of whole requests: only parts of them that some row sees are widened."""
    copied, honest = [], Pool.copy  # tokens

    def copy(pool, ids, *to):
        copied.append(len(ids) * pool.page_size)
        return honest(pool, ids, *to)

    monkeypatch.setattr(Pool, "copy", copy)
    cache = CacheIn8Bits([1000, 400], page_size, layout, scale)
    assert_as_dense(cache, [1, 2], mf.causal())
    copied.clear()
    assert_as_dense(cache, [1, 1], mf.sliding_window(30))
    part = {512: 256, 320: 160, 257: 129, 514: 172, 1000: 250}[page_size]
    assert max(copied) <= 4 * part and len(copied) == 2  # of k and v, up to two parts of each request


def test_scores_count_tokens_of_pages_that_are_read_in_parts():
    bias = torch.linspace(-1, 1, 600)
    cache = CacheIn8Bits([600, 300], 514)
    assert_as_dense(cache, [1, 1], mf.causal(), score=lambda score, b, h, q, kv: score + bias[kv])


@pytest.mark.parametrize("size", [1, 16, 256, 257, 514, 4099, 8198, 131_071, 131_073, 131_074])
def test_parts_hold_each_token_of_a_page_and_few_of_them_twice(size):
    pool = Pool(torch.empty(1, size, 1, 1)).cut()
    held = (pool.starts[:, None] + range(pool.page_size)).reshape(-1)
    assert pool.page_size <= 256 and set(held.tolist()) == set(range(size))
    assert len(held) - size < pool.page_size


@pytest.mark.parametrize("scale", ["heads", "tokens"])
@pytest.mark.parametrize("page_size", [16, 1000])
def test_chunks_widen_only_tokens_that_some_query_sees(page_size, scale, monkeypatch):
    counts, honest = [], pool_module.widened

    def counted(codes, *given):
        counts.append(codes.numel() // (codes.shape[-1] * codes.shape[-2]))
        return honest(codes, *given)

    monkeypatch.setattr(pool_module, "widened", counted)
    monkeypatch.setattr(few, "are_few", lambda *_: False)  # each request is a call of its own
    cache = CacheIn8Bits([1000, 400], page_size, "NHD", scale)
    assert_as_dense(cache, [40, 30], mf.sliding_window(9))
    assert counts == [49, 49, 39, 39]
    counts.clear()
    assert_as_dense(cache, [40, 0], mf.mask(lambda b, h, q, kv: (q - kv < 9) & (q >= kv) | (kv < 4)))
    assert counts == [52, 52]


def test_little_is_widened_at_once(monkeypatch):
    monkeypatch.setattr(paged, "_COPIED", 1 << 14)
    rooms, honest = [], paged._memory
    monkeypatch.setattr(paged, "_memory", lambda size: rooms.append(size) or honest(size))
    assert_as_dense(CacheIn8Bits([5000, 1700], 16), [1, 1], mf.causal())
    keys = (1 << 14) // (KV_HEADS * DIM * 4)  # about
    assert max(rooms) <= 2 * keys * KV_HEADS * (4 * (DIM + V_DIM) + 3 * DIM)


def test_codes_that_are_nan_are_nan_only_where_they_are_seen():
    cache = CacheIn8Bits([40, 33], 8, scale="heads")
    page = int(cache.pages.block_table[1, 2])
    for pool, code in zip(cache.pools, (0x7F, 0xFF), strict=True):
        pool.view(torch.uint8)[page, 3, 1, 0] = code
    q = drawn(2, HEADS, 1, DIM)
    out = mf.compile(mf.causal()).paged(q, *cache.pools, cache.pages, **cache.scales)
    assert out[0].isfinite().all() and out[1, :2].isfinite().all() and out[1, 2:].isnan().all()
    assert mf.compile(mf.sliding_window(9)).paged(q, *cache.pools, cache.pages, **cache.scales).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_code_is_widened_to_its_number(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(FORMAT)
    scales = torch.tensor([1.0, 0.3, 3e-39, 7.0])[:, None].expand(4, 256)
    found = widened(codes.expand(4, 1, 256).transpose(1, 2).contiguous(), scales, dtype)[..., 0]
    wanted = (codes.double() * scales.double()).to(torch.promote_types(dtype, torch.float32)).to(dtype)
    assert torch.equal(found.isnan(), wanted.isnan()) and int(wanted.isnan().sum()) == 8
    assert torch.equal(found.nan_to_num(0.0), wanted.nan_to_num(0.0))


NUMBERS = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1e-45, -1e-38, 448.0, 1e-3]),
)


@settings(max_examples=100)
@given(st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1, max_size=5))
def test_vectors_are_quantised_to_the_nearest_code(rows):
    x = torch.tensor(rows, dtype=torch.float32)
    scales = scales_of(x)
    assert (scales > 0).all() and scales.isfinite().all()
    codes = quantised(x, scales)
    lost = codes.float().isnan()
    assert torch.equal(lost, ~x.isfinite())
    known = torch.arange(256, dtype=torch.uint8).view(FORMAT).double().nan_to_num(0.0)
    exact = (x / scales[:, None]).double().masked_fill(lost, 0.0)
    nearest = (exact[..., None] - known).abs().amin(-1)
    error = (codes.double().masked_fill(lost, 0.0) - exact).abs()
    assert bool((error <= nearest).all())
    assert bool((codes.float().masked_fill(lost, 0.0).abs() <= LARGEST).all())


def filled(scale, dtype=torch.float32, layout="NHD"):
    """Tokens of two requests, in pools of 8 bits under scales: q, k, v, pools, pages and scales."""
    k, v = drawn(2, KV_HEADS, 21, DIM, seed=1), drawn(2, KV_HEADS, 21, V_DIM, seed=2)
    pages = mf.PageTable(torch.tensor([[7, 2, 4], [1, 0, 5]]), torch.tensor([21, 21]), 8)
    pools, scales = [], []
    for x in (k, v):
        shape = (9, 8, KV_HEADS) if layout == "NHD" else (9, KV_HEADS, 8)
        pools.append(torch.zeros(*shape, x.shape[3]).to(FORMAT))
        kinds = {"number": 0.01, "heads": torch.tensor([0.01, 0.02])}
        scales.append(kinds[scale] if scale in kinds else torch.full(shape, torch.nan))
    return k.to(dtype), v.to(dtype), pools, pages, dict(zip(("k_scale", "v_scale"), scales, strict=True))


def test_the_largest_numbers_come_back():
    """The scale that append finds of float32's largest number is one that calls take; zeros beside it stay zeros."""
    largest = torch.finfo(torch.float32).max
    k, v, pools, pages, scales = filled("tokens")
    v = torch.zeros_like(v)
    v[..., 0] = largest
    pages.append(*pools, k, v, **scales)
    out = mf.compile(mf.mask(lambda b, h, q, kv: q == kv)).paged(
        k[:, :, -1:].repeat(1, 2, 1, 1), *pools, pages, **scales
    )
    assert torch.equal(out, v.repeat(1, 2, 1, 1)[:, :, -1:])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("scale", ["number", "heads", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_appended_tokens_are_quantised(layout, scale, dtype):
    k, v, pools, pages, scales = filled(scale, dtype, layout)
    pages.append(*pools, k, v, layout=layout, **scales)
    places = torch.arange(21)
    for x, pool, each in zip((k, v), pools, scales.values(), strict=True):
        if layout == "HND":
            pool, each = pool.transpose(1, 2), each.transpose(1, 2) if scale == "tokens" else each
        at = pages.block_table[:, places // 8], (places % 8).expand(2, -1)
        if scale == "tokens":
            each = each[at]
            assert torch.equal(each, x.transpose(1, 2).float().abs().amax(-1) / 448)
            assert not scales["k_scale"].isfinite().all()  # other slots stay as they were
        unit = torch.as_tensor(each)[..., None].expand(2, 21, KV_HEADS, 1)
        found, wanted = pool[at].float() * unit, x.transpose(1, 2).float().clamp(-448 * unit, 448 * unit)
        assert bool(((found - wanted).abs() <= wanted.abs() / 16 + unit * 2**-10).all())  # half of its last place
    out = mf.compile(mf.causal()).paged(k.repeat(1, 2, 1, 1)[:, :, -1:], *pools, pages, layout=layout, **scales)
    assert out.dtype == dtype and out.isfinite().all()


def test_chunks_and_steps_equal_one_pass():
    k, v, pools, pages, scales = filled("tokens")
    attn, q = mf.compile(mf.sliding_window(7)), drawn(2, HEADS, 21, DIM)
    pages.append(*pools, k, v, **scales)
    wanted = attn.paged(q, *pools, pages, **scales)
    pages.lengths.zero_()
    again, found, done = filled("tokens"), [], 0
    for chunk in (9, 1, 1, 10):
        new = slice(done, done + chunk)
        pages.lengths += chunk
        pages.append(*again[2], k[:, :, new], v[:, :, new], **again[4])
        found.append(attn.paged(q[:, :, new], *again[2], pages, **again[4]))
        done += chunk
    assert torch.allclose(torch.cat(found, 2), wanted, atol=1e-6)


K, V, POOLS, TABLE, SCALES = filled("tokens")
TABLE.append(*POOLS, K, V, **SCALES)
Q = drawn(2, HEADS, 1, DIM)
RIGHT = {"q": Q, "k_pages": POOLS[0], "v_pages": POOLS[1], "pages": TABLE, **SCALES}
NONE = {"k_scale": None, "v_scale": None}
OTHERS = {"k_pages": POOLS[0].to(torch.float8_e5m2), "v_pages": POOLS[1].to(torch.float8_e5m2)}


def changed(at, number):
    scale = SCALES["k_scale"].clone()
    scale[at] = number
    return {"k_scale": scale}


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            NONE,
            mf.ArgumentError,
            r"k_pages holds torch.float8_e4m3fn and k_scale is missing, expected .* \(2,\), one for",
        ),
        ({"v_scale": None}, mf.ArgumentError, "v_scale is missing"),
        (
            {"k_pages": POOLS[0].float()},
            mf.ArgumentError,
            r"k_scale is given for k_pages of torch.float32, expected none",
        ),
        (
            {"v_pages": POOLS[1].float(), "v_scale": None},
            mf.ArgumentTypeError,
            "v_pages has dtype torch.float32 and k_pages torch.float8_e4m3fn; expected both in 8 bits",
        ),
        (
            OTHERS,
            mf.ArgumentTypeError,
            "k_pages has dtype torch.float8_e5m2, expected q's dtype, or torch.float8_e4m3fn",
        ),
        ({"k_scale": "0.1"}, mf.ArgumentTypeError, "k_scale is a str, expected a number or a float32 tensor"),
        (
            {"k_scale": SCALES["k_scale"].numpy()},
            mf.ArgumentTypeError,
            r"k_scale is a ndarray, expected a number or a float32 tensor; torch.from_numpy\(k_scale\).float\(\) makes",
        ),
        (
            {"k_scale": 1e36},
            mf.ArgumentError,
            "k_scale in float32 is .*e\\+35, expected a positive number of at most 7.6e35",
        ),
        (
            {"v_scale": torch.tensor(1e36)},
            mf.ArgumentError,
            "v_scale is .*e\\+35, expected a positive number of at most",
        ),
        (
            changed((7, 3, 1), 7.6e35),
            mf.ArgumentError,
            "k_scale is .*e\\+35 for slot 3 of page 7, head 1, which is used",
        ),
        ({"k_scale": True}, mf.ArgumentTypeError, "k_scale is a bool, expected a number"),
        ({"k_scale": 0.0}, mf.ArgumentError, "k_scale is 0.0, expected a finite positive number"),
        ({"v_scale": -1}, mf.ArgumentError, "v_scale is -1, expected a finite positive number"),
        ({"v_scale": math.nan}, mf.ArgumentError, "v_scale is nan, expected a finite positive number"),
        ({"k_scale": 1e39}, mf.ArgumentError, "k_scale in float32 is inf, expected"),
        ({"k_scale": 1e-60}, mf.ArgumentError, "k_scale in float32 is 0.0, expected"),
        ({"k_scale": torch.tensor(-0.5)}, mf.ArgumentError, "k_scale is -0.5, expected a positive number"),
        ({"k_scale": torch.tensor([0.5, math.inf])}, mf.ArgumentError, "k_scale is inf for head 1, expected"),
        (
            {"k_scale": torch.ones(2).double()},
            mf.ArgumentTypeError,
            "k_scale has dtype torch.float64, expected torch.float32",
        ),
        (
            {"k_scale": torch.ones(4)},
            mf.ArgumentError,
            r"k_scale has shape \(4,\), expected one number, or .*\(9, 8, 2\)",
        ),
        ({"k_scale": torch.ones(9, 2, 8)}, mf.ArgumentError, r"k_scale has shape \(9, 2, 8\), expected"),
        ({"k_scale": torch.ones(2, device="meta")}, mf.ArgumentError, "k_scale is on meta"),
        ({"k_scale": torch.ones(2).requires_grad_()}, mf.ArgumentError, "k_scale asks for a gradient, expected none"),
        ({"q": Q.clone().requires_grad_()}, mf.ArgumentError, "q asks for a gradient, expected none"),
        (changed((7, 3, 1), 0.0), mf.ArgumentError, "k_scale is 0.0 for slot 3 of page 7, head 1, which is used"),
        (changed((5, 4, 0), math.nan), mf.ArgumentError, "k_scale is nan for slot 4 of page 5, head 0, which is used"),
        (changed((4, 2, 0), -1.0), mf.ArgumentError, "k_scale is -1.0 for slot 2 of page 4"),
    ],
)
@pytest.mark.parametrize("count", [1, 20])
def test_bad_input(given, kind, message, count):
    right = {**RIGHT, "q": drawn(2, HEADS, count, DIM)}
    with pytest.raises(kind, match=message):
        mf.compile(mf.causal()).paged(**{**right, **given})


@pytest.mark.parametrize("count", [1, 20])
def test_scales_of_what_no_query_sees_may_be_anything(count):
    attn, q = mf.compile(mf.causal() & mf.mask(lambda b, h, q, kv: kv != 3)), drawn(2, HEADS, count, DIM)
    wanted = attn.paged(**{**RIGHT, "q": q})
    for number in (0.0, -1.0, math.nan, math.inf):
        assert torch.equal(attn.paged(**{**RIGHT, "q": q, **changed((7, 3), number)}), wanted)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (NONE, mf.ArgumentError, "PageTable.append: k_pages holds torch.float8_e4m3fn and k_scale is missing"),
        (
            {"k": K.to(FORMAT)},
            mf.ArgumentError,
            "k holds .* of torch.float8_e4m3fn on cpu, expected .* of 16, 32 or 64",
        ),
        ({"k": K.long()}, mf.ArgumentError, "k holds .* of torch.int64"),
        ({"v_scale": torch.tensor([0.1, -0.1])}, mf.ArgumentError, "v_scale is -0.1.* for head 1, expected"),
        ({"v_scale": torch.ones(3)}, mf.ArgumentError, r"v_scale has shape \(3,\)"),
        ({"k_scale": 0}, mf.ArgumentError, "k_scale is 0, expected a finite positive number"),
    ],
)
def test_bad_tokens_write_nothing(given, kind, message):
    _, _, pools, pages, scales = filled("tokens")
    with pytest.raises(kind, match=message):
        pages.append(**{**{"k_pages": pools[0], "v_pages": pools[1], "k": K, "v": V}, **scales, **given})
    assert not any(pool.float().any() for pool in pools) and all(x.isnan().all() for x in scales.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"k_scale": (one := torch.ones(9, 8, KV_HEADS)), "v_scale": one},
            "v_scale shares memory with k_scale, expected memory of its own",
        ),
        (
            {"k_scale": (rows := torch.ones(10, 8, KV_HEADS))[:9], "v_scale": rows[1:]},
            "v_scale shares memory with k_scale",
        ),
        (
            {"k_scale": torch.ones(1, 1, 1).expand(9, 8, KV_HEADS)},
            r"k_scale of shape \(9, 8, 2\) has strides \(0, 0, 0\), expected memory .* k_scale.contiguous\(\)",
        ),
        ({"v_scale": torch.ones(9, 8, 1).expand(9, 8, KV_HEADS)}, r"v_scale of shape \(9, 8, 2\) has strides"),
        ({"v_scale": torch.ones(200).as_strided((9, 8, KV_HEADS), (2, 1, 1))}, "v_scale .* has strides"),
        ({"k_pages": torch.zeros(1, 8, KV_HEADS, DIM).to(FORMAT).expand(9, -1, -1, -1)}, "k_pages .* has strides"),
        (
            {
                "k_pages": (pool := torch.zeros(9, 8, KV_HEADS, max(DIM, V_DIM)).to(FORMAT))[..., :DIM],
                "v_pages": pool[..., -V_DIM:],
            },
            "v_pages shares memory with k_pages",
        ),
        (
            {
                "k_pages": (memory := torch.zeros(9, 8, KV_HEADS, DIM, 4, dtype=torch.uint8)).view(FORMAT)[..., 0],
                "k_scale": memory.view(torch.float32)[:, :, :, 3, 0],
            },
            "k_scale shares memory with k_pages",
        ),
    ],
)
def test_memory_that_is_written_twice_is_refused_before_it_is(given, message):
    _, _, pools, pages, scales = filled("tokens")
    given = {"k_pages": pools[0], "v_pages": pools[1], **scales, **given}
    before = [x.view(torch.uint8).clone() if x.dtype == FORMAT else x.clone() for x in given.values()]
    with pytest.raises(mf.ArgumentError, match=f"PageTable.append: {message}"):
        pages.append(**given, k=K, v=V)
    for x, old in zip(given.values(), before, strict=True):
        torch.testing.assert_close(x.view(torch.uint8) if x.dtype == FORMAT else x, old, equal_nan=True)


def test_pools_that_interleave_are_apart():
    """Views of one tensor serve where no byte belongs to both: codes of k, those of v, and both tensors of scales."""
    _, _, pools, pages, scales = filled("tokens")
    pages.append(*pools, K, V, **scales)
    memory = torch.zeros(9, 8, KV_HEADS, 64, dtype=torch.uint8)
    codes = memory[..., 8:].view(FORMAT)
    views = codes[..., :DIM], codes[..., DIM : DIM + V_DIM]
    mixed = dict(zip(scales, memory[..., :8].view(torch.float32).unbind(-1), strict=True))
    pages.append(*views, K, V, **mixed)
    for x, y in zip((*views, *mixed.values()), (*pools, *scales.values()), strict=True):
        assert torch.equal(x.float(), y.float().nan_to_num(0.0))


def test_contiguous_calls_say_what_to_write():
    k, v = K.to(FORMAT), V.to(FORMAT)
    with pytest.raises(mf.ArgumentTypeError, match=r"k has dtype torch.float8_e4m3fn.*paged"):
        mf.attention(Q, k, v, mf.causal())
    attn, length = mf.compile(mf.causal()), torch.tensor([21, 21])
    whole = mf.PageTable(torch.arange(2)[:, None], length, page_size=21)
    out = attn.paged(Q, k, v, whole, layout="HND", k_scale=1.0, v_scale=1.0)
    assert torch.allclose(out, attn(Q, k.float(), v.float(), q_offset=20), atol=1e-5)


def test_few_rows_are_few(monkeypatch):
    """What the tests above call steps are steps."""
    monkeypatch.setattr(few, "seen", None)
    with pytest.raises(TypeError):
        mf.compile(mf.causal()).paged(**RIGHT)
