"""Pages on the Triton backend: few rows follow the table themselves, others have the keys that they see gathered."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import few
from maskflash.op.page_table import PageTable
from maskflash.testing import error_budget, masks
from tests.backends.triton.test_few import dense
from tests.backends.triton.test_run import DTYPES
from tests.conftest import EMULATED

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of NaN and infinities

BIAS = torch.linspace(-1, 1, 128).view(2, 64)


@pytest.fixture
def by_table(monkeypatch):
    """Fails where the host reads lengths, starts or the table; any call's rows count as few."""
    monkeypatch.setattr(few, "are_few", lambda q_len, kv_len: q_len > 0)
    monkeypatch.setattr(PageTable, "lengths_now", None)


def cache(draw, lengths, page_size, kv_heads, dims, dtype, device, layout):
    """A pool with each request's pages anywhere in it, NaN in all other slots; keys and values of each request."""
    most = -(-max(lengths) // page_size)
    ids = torch.randperm(len(lengths) * most + 2, generator=draw)[: len(lengths) * most].view(len(lengths), most)
    shape = (len(lengths) * most + 2, page_size, kv_heads)
    pools = [torch.full((*shape, dim), math.nan, dtype=dtype) for dim in dims]
    tokens = [[torch.randn(n, kv_heads, dim, generator=draw).to(dtype) for n in lengths] for dim in dims]
    for pool, each in zip(pools, tokens, strict=True):
        for r, x in enumerate(each):
            at = torch.arange(len(x))
            pool[ids[r, at // page_size], at % page_size] = x
    if layout == "HND":
        pools = [pool.transpose(1, 2).contiguous() for pool in pools]
    return ids.to(device), [pool.to(device) for pool in pools], [[x.to(device) for x in each] for each in tokens]


def check(found, q, k, v, visible, sinks):
    """Out and lse of one request, rows (heads, n, D) over tokens (keys, heads, D), are dense float64's."""
    q, k, v = q[None], *(x.transpose(0, 1)[None] for x in (k, v))
    kinds = torch.float64, q.dtype
    exact, plain = (dense(*(x.to(kind) for x in (q, k, v)), visible, sinks) for kind in kinds)
    norms = [float(x.double().norm(dim=-1).amax()) if x.numel() else 0.0 for x in (q, k, v)]
    terms = {"out": norms[2], "lse": norms[0] * norms[1] * q.shape[3] ** -0.5}
    for name, ours, truth, other in zip(("out", "lse"), found, exact, plain, strict=True):
        blind = truth == -math.inf
        assert torch.equal(ours == -math.inf, blind[0]), name
        if ours.numel():
            budget = error_budget(other, truth, q.dtype) + torch.finfo(q.dtype).eps * terms[name]
            assert float((ours.double() - truth[0]).masked_fill(blind[0], 0.0).abs().amax()) <= budget, name


@settings(max_examples=25)
@given(st.data())
def test_every_mask_and_table_matches_dense_float64(device, data):
    requests = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=requests, max_size=requests))
    ragged = data.draw(st.booleans())
    counts = [data.draw(st.integers(0, min(n, 20))) for n in lengths]
    if not ragged:
        counts = [min(data.draw(st.integers(1, 5)), *lengths)] * requests
    assume(sum(counts))
    page_size = data.draw(st.sampled_from([1, 3, 4, 16, 33]))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 3)]))
    heads, dims = kv_heads * group, data.draw(st.sampled_from([(16, 16), (8, 24)]))
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["NHD", "HND"]))
    mask = data.draw(masks(max_len=64, batch=requests, heads=heads))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids, pools, (k, v) = cache(draw, lengths, page_size, kv_heads, dims, dtype, device, layout)
    q = [torch.randn(heads, n, dims[0], generator=draw).to(dtype).to(device) for n in counts]
    sizes = {"batch": requests, "heads": heads, "device": device}
    visible = []
    for r, (n, length) in enumerate(zip(counts, lengths, strict=True)):
        see = mask.dense(n, length, q_offset=length - n, **sizes)
        visible.append(see[r : r + 1] if len(see) > 1 else see)
    for r, see in enumerate(visible):
        places = torch.arange(ids.shape[1], device=device)
        columns = see.flatten(0, 2).any(0)
        used = torch.zeros_like(places, dtype=torch.bool)
        used[columns.nonzero()[:, 0] // page_size] = True
        ids[r][~used] = -1
        for tokens in (k, v):
            tokens[r][~columns] = 0.0  # what no row sees may be anything
    sinks = torch.linspace(-1, 2, heads, device=device) if data.draw(st.booleans()) else None
    pages = mf.PageTable(ids, torch.tensor(lengths, device=device), page_size)
    attn = mf.compile(mask, backend="triton", block_size=32, splits=data.draw(st.sampled_from(["auto", 1, 3])))
    packed = torch.cat([x.transpose(0, 1) for x in q]) if ragged else torch.stack(q)
    starts = torch.tensor([0, *counts], device=device).cumsum(0) if ragged else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "are_few", lambda q_len, kv_len: q_len > 0)
        patch.setattr(few, "_SHORTEST", 16)
        patch.setattr(gpu, "programs", lambda device: 1 << 20)
        out, lse = attn.paged(packed, *pools, pages, cu_seqlens_q=starts, layout=layout, sinks=sinks, return_lse=True)
    for r, n in enumerate(counts):
        if ragged:
            rows = slice(sum(counts[:r]), sum(counts[:r]) + n)
            found = out[rows].transpose(0, 1), lse[:, rows]
        else:
            found = out[r], lse[r]
        check(found, q[r], k[r], v[r], visible[r], sinks)


@pytest.mark.parametrize(
    ("mask", "score"),
    [
        (mf.sliding_window(9), None),
        (mf.mask(lambda b, h, q, kv: q >= kv and (kv + b) % 2 == 0), None),
        (mf.causal(), lambda score, b, h, q, kv: score + BIAS[b, kv]),
    ],
)
@pytest.mark.parametrize("gathered", [False, True])
def test_pages_are_attended_as_on_the_cpu(mask, score, gathered):
    pages = mf.PageTable(torch.tensor([[3, 5, -1, -1], [3, 1, 7, -1]]), torch.tensor([20, 40]), 16)
    draw = torch.Generator().manual_seed(0)
    pools = torch.randn(2, 8, 16, 2, 16, generator=draw).unbind()
    for pool in pools:
        pool[5, 4:], pool[7, 8:], pool[0] = (torch.nan,) * 3
    q, starts = torch.randn(7, 4, 16, generator=draw), torch.tensor([0, 1, 7])
    more = {"cu_seqlens_q": starts, "return_lse": True, "sinks": torch.linspace(-1, 1, 4)}
    found, wanted = (
        mf.compile(mask, score=score, backend=backend, check=gathered).paged(q, *pools, pages, **more)
        for backend in ("triton", "cpu")
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)


def steps(device, heads=4, keys=(20, 40, 33), page_size=8):
    draw = torch.Generator().manual_seed(0)
    ids, pools, tokens = cache(draw, keys, page_size, 2, (16, 16), torch.float32, device, "NHD")
    q = torch.randn(len(keys), heads, 1, 16, generator=draw).to(device)
    return q, pools, mf.PageTable(ids, torch.tensor(keys, device=device), page_size), tokens


def test_the_host_reads_nothing(device, by_table):
    q, pools, pages, _ = steps(device)
    offsets = torch.tensor([0, 5, 9], device=device)
    attn = mf.compile(lambda b, h, q, kv, *, offsets: offsets[b] <= kv <= q, backend="triton")
    before = attn.paged(q, *pools, pages, offsets=offsets, return_lse=True)
    starts = torch.arange(4, device=device)
    packed = attn.paged(q[:, :, 0], *pools, pages, cu_seqlens_q=starts, offsets=offsets, return_lse=True)
    assert torch.equal(packed[0], before[0][:, :, 0])
    assert torch.equal(packed[1], before[1][:, :, 0].T)
    offsets += 3
    pages.lengths -= 2
    assert not torch.equal(attn.paged(q, *pools, pages, offsets=offsets), before[0])


def test_a_request_has_the_same_bits_alone(device):
    """With a fixed number of splits, whoever else is there, and however its pages lie."""
    q, pools, pages, _ = steps(device)
    attn = mf.compile(mf.sliding_window(25), backend="triton", splits=3)
    together = attn.paged(q, *pools, pages, return_lse=True)
    for r in range(3):
        part = mf.PageTable(pages.block_table[r : r + 1], pages.lengths[r : r + 1], 8)
        alone = attn.paged(q[r : r + 1], *pools, part, return_lse=True)
        assert all(torch.equal(x[r : r + 1], y) for x, y in zip(together, alone, strict=True))


def test_what_the_host_does_not_look_at_is_nan(device, by_table):
    """A length that the table can't hold, too few keys, starts that leave rows out, pages that there are not: and only
    the request that it is about."""
    q, pools, pages, _ = steps(device)
    for splits in (1, 4):
        attn = mf.compile(mf.causal(), backend="triton", splits=splits)
        clean = attn.paged(q, *pools, pages, return_lse=True)
        assert all(x.isfinite().all() for x in clean)
        for wrong in (41, 0, -5, 2**33):
            lengths = pages.lengths.clone()
            lengths[1] = wrong
            found = attn.paged(q, *pools, mf.PageTable(pages.block_table, lengths, 8), return_lse=True)
            for x, y in zip(found, clean, strict=True):
                assert x[1].isnan().all()
                assert torch.equal(x[[0, 2]], y[[0, 2]])
        for wrong in (-1, 1000):
            table = pages.block_table.clone()
            table[1, 2] = wrong
            found = attn.paged(q, *pools, mf.PageTable(table, pages.lengths, 8), return_lse=True)
            for x, y in zip(found, clean, strict=True):
                assert x[1].isnan().all()
                assert torch.equal(x[[0, 2]], y[[0, 2]])
        # The emulator takes rows that a launch leaves as they were for forgotten.
        for wrong in () if EMULATED else ([1, 1, 2, 3], [0, 5, 2, 3], [0, -1, 2, 3], [0, 1, 2, 2]):
            starts = torch.tensor(wrong, device=device)
            found = attn.paged(q[:, :, 0], *pools, pages, cu_seqlens_q=starts)
            assert found.isnan().any()
        for wrong in () if EMULATED else ([0, 2, 1, 3], [0, 3, 2, 3], [3, 2, 1, 0]):  # of whom are the rows between?
            starts = torch.tensor(wrong, device=device)
            found = attn.paged(q[:, :, 0], *pools, pages, cu_seqlens_q=starts, return_lse=True)
            assert all(x.isnan().all() for x in found)
    told = mf.compile(mf.causal(), backend="triton", check=True)
    with pytest.raises(TypeError):  # it asks, as the fixture forbids
        told.paged(q, *pools, pages)


def test_wrong_numbers_are_errors_where_calls_are_checked(device):
    q, pools, pages, _ = steps(device)
    attn = mf.compile(mf.causal(), backend="triton", check=True)
    pages.lengths[1] = 41
    with pytest.raises(mf.ArgumentError, match="lengths is 41 for request 1"):
        attn.paged(q, *pools, pages)
