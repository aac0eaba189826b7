"""Requests in pages attend as they would contiguously: held against dense float64, for random masks and pages."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.backends.cpu import few, paged
from maskflash.backends.dense import DenseCall
from maskflash.ground.stretch import Stretch
from maskflash.scores.score import as_score
from maskflash.testing import Shape, error_budget, masks, scores
from maskflash.testing.dense import bound_score

TABLES = 64  # tokens of a request, at most; the dense reference counts on to twice as many
PREFIX = torch.tensor([3, 0, 7])
HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 8, 6
FEW = settings(max_examples=20)


def starts(counts):
    return torch.nn.functional.pad(torch.as_tensor(counts, dtype=torch.int64).cumsum(0), (1, 0))


def drawn(*size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Cache:
    """Requests with random keys and values in shuffled pages, between NaN; the first pages may be shared."""

    def __init__(self, lengths, page_size, layout="NHD", shared=0, dtype=torch.float32, adjacent=False):
        self.lengths, self.page_size, self.layout, self.dtype, self.scales = lengths, page_size, layout, dtype, {}
        longest = max([1, *lengths])
        self.k, self.v = (drawn(len(lengths), KV_HEADS, longest, d, seed=d, dtype=dtype) for d in (DIM, V_DIM))
        shared = min(shared, *(n // page_size for n in lengths)) if lengths else 0
        for x in (self.k, self.v):
            x[:, :, : shared * page_size] = x[:1, :, : shared * page_size].clone()
        counts = [-(-n // page_size) for n in lengths]
        total = sum(counts) + 3
        order = torch.arange(total) if adjacent else torch.randperm(total, generator=torch.Generator().manual_seed(1))
        table = torch.full((len(lengths), max([1, *counts]) + 1), -1, dtype=torch.int32)
        used = iter(order.tolist())
        for r, count in enumerate(counts):
            for page in range(count):
                table[r, page] = table[0, page] if r and page < shared else next(used)
        self.pages = mf.PageTable(table, torch.tensor(lengths), page_size)
        pools = [torch.full((total, page_size, KV_HEADS, d), torch.nan, dtype=dtype) for d in (DIM, V_DIM)]
        for r, length in enumerate(lengths):  # by the definition, not by `append`
            for token in range(length):
                page, slot = int(table[r, token // page_size]), token % page_size
                for pool, x in zip(pools, (self.k, self.v), strict=True):
                    pool[page, slot] = x[r, :, token]
        if layout == "HND":
            pools = [x.transpose(1, 2).contiguous() for x in pools]
        self.pools = pools

    def forget(self, r, token):
        """NaN in a token's slot."""
        at = int(self.pages.block_table[r, token // self.page_size])
        for pool in self.pools:
            pool[at].select(0 if self.layout == "NHD" else 1, token % self.page_size).fill_(torch.nan)


def assert_as_dense(cache, counts, mask, score=None, sinks=None, packed=True, **args):
    """out and lse of the last tokens of each request are those of the padded batch, densely and in float64."""
    dtype, lengths, most = cache.dtype, torch.tensor(cache.lengths), max([1, *counts])
    q = drawn(len(counts), HEADS, most, DIM, seed=7, dtype=dtype)
    given_q = torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(q, counts, strict=True)]) if packed else q
    attn = mf.compile(mask, score=score)
    with torch.no_grad():
        out, lse = attn.paged(
            *(given_q, *cache.pools, cache.pages),
            **{"cu_seqlens_q": starts(counts) if packed else None, "layout": cache.layout},
            **{"sinks": sinks, "return_lse": True, **cache.scales},
            **args,
        )
    assert out.dtype == dtype and out.is_contiguous()
    whole, columns = mf.mask(mask), cache.k.shape[2]
    offsets = lengths - torch.tensor(counts)
    sizes = {"batch": len(counts), "heads": HEADS, "q_offset": offsets, "kv_offset": 0, "device": "cpu"}
    dense = whole.dense(most, columns, **sizes, **{name: args[name] for name in whole.keywords})
    inside = torch.arange(most) < torch.tensor(counts)[:, None], torch.arange(columns) < lengths[:, None]
    dense = dense & inside[0][:, None, :, None] & inside[1][:, None, None, :]
    bound = None
    if score is not None:
        score = as_score("score", score)
        bound = bound_score(score, Shape(len(counts), HEADS, KV_HEADS, most, columns, DIM, V_DIM), sizes, dtype, args)
    zeros = torch.zeros(*q.shape[:3], V_DIM, dtype=dtype), torch.zeros(q.shape[:3], dtype=lse.dtype)
    batch = [x.clone().requires_grad_() for x in (q, cache.k, cache.v)]
    call = DenseCall(*batch, dense, DIM**-0.5, *zeros, sinks, bound, (), None)
    exact, plain = call.results(torch.float64), call.results(dtype, backwards=True)
    terms = call.terms(exact)
    for name, x in {"out": out, "lse": lse}.items():
        unit = torch.finfo(dtype).eps + torch.finfo(torch.float64).eps
        expected = exact[name].double()
        budget = (error_budget(plain[name], exact[name], dtype) + unit * terms[name]) * torch.ones_like(expected)
        for r, n in enumerate(counts):
            first = sum(counts[:r])
            if not packed:
                found = x[r]
            else:
                found = x[first : first + n].transpose(0, 1) if name == "out" else x[:, first : first + n]
            error = (found.double() - expected[r, :, :n]).abs()
            assert bool(((found.double() == expected[r, :, :n]) | (error <= budget[r, :, :n])).all()), (name, r)


@st.composite
def requests(draw):
    """Lengths and how many queries each request has, from a step to all of it."""
    lengths = draw(st.lists(st.integers(0, TABLES), min_size=1, max_size=3))
    counts = [draw(st.one_of(st.integers(0, min(n, 2)), st.integers(0, n))) for n in lengths]
    return lengths, counts


PAGED = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 2, 3, 4, 7, 16, 32, 64, 256]),
        "layout": st.sampled_from(["NHD", "HND"]),
        "shared": st.integers(0, 3),
        "adjacent": st.booleans(),
    }
)


@FEW
@given(mask=masks(2 * TABLES, batch=3, heads=4), call=requests(), paged=PAGED)
def test_random_masks(mask, call, paged):
    assert_as_dense(Cache(call[0], **paged), call[1], mask)


@settings(max_examples=8)
@given(
    mask=masks(2 * TABLES, batch=3, heads=4), score=scores(2 * TABLES, batch=3, heads=4), call=requests(), paged=PAGED
)
def test_random_masks_and_scores(mask, score, call, paged):
    assert_as_dense(Cache(call[0], **paged), call[1], mask, score=score)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("counts", [[1, 1, 1], [20, 1, 0], [50, 30, 9]])
@pytest.mark.parametrize(
    "mask",
    [
        mf.full(),
        mf.causal(),
        mf.sliding_window(9),
        mf.causal() & (mf.global_tokens(2) | mf.sliding_window(4)),
        mf.prefix_lm(PREFIX),
        lambda b, h, q, kv: q >= kv and (kv + b) % 3 < 2,
        lambda b, h, q, kv: q - kv in (0, 7, 8, 40),
        lambda b, h, q, kv: kv > q,
    ],
)
def test_masks_with_sinks(mask, counts, dtype):
    cache = Cache([50, 40, 9], 8, shared=1, dtype=dtype)
    assert_as_dense(cache, counts, mask, sinks=torch.tensor([0.5, -torch.inf, 2.0, -1.0]))


def test_batches_of_equally_many_queries():
    for count in (0, 1, 5):
        assert_as_dense(Cache([9, 40, 17], 4), [count] * 3, mf.causal(), packed=False)


def test_arguments_of_masks_and_scores_count_by_request():
    cache = Cache([33, 5, 64], 16)
    mask = mf.mask(lambda b, h, q, kv, *, first: kv >= first[b])
    assert_as_dense(cache, [1, 1, 1], mask, first=torch.tensor([20, 0, 63]))
    assert_as_dense(cache, [30, 5, 64], mask, first=torch.tensor([20, 0, 63]))
    bias = drawn(3, TABLES)
    assert_as_dense(cache, [2, 1, 9], mf.causal(), score=lambda score, b, h, q, kv: score + bias[b, kv])


@pytest.mark.parametrize("count", [1, 20])
def test_what_scores_look_up_is_there_wherever_the_mask_shows_it(count):
    cache, bias = Cache([33, 40], 16), drawn(40)
    assert_as_dense(cache, [count] * 2, mf.causal(), score=lambda score, b, h, q, kv: score + bias[kv])
    short = bias[:39].clone()
    with pytest.raises(mf.MaskIndexError, match=r"short\[kv\].* index 39 "):
        assert_as_dense(cache, [count] * 2, mf.causal(), score=lambda score, b, h, q, kv: score + short[kv])


def test_trees_of_drafts_behind_a_cache():
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]])
    assert_as_dense(Cache([30, 21], 4), [4, 4], mf.presets.tree(parents))


@pytest.mark.parametrize("length", [1000, 5000])
@pytest.mark.parametrize("adjacent", [False, True])
def test_long_requests_are_read_in_pieces(length, adjacent, monkeypatch):
    monkeypatch.setattr(paged, "_COPIED", 1 << 14)
    monkeypatch.setattr(paged, "_IN_PLACE", 1 << 14)
    cache = Cache([length, length // 3], 16, adjacent=adjacent)
    assert_as_dense(cache, [1, 2], mf.causal())
    assert_as_dense(cache, [3, 1], mf.sliding_window(300))


def test_runs_among_shuffled_pages_are_read_where_they_lie():
    ids = torch.tensor([[9, 4, *range(20, 60), 3, 5, 70, *range(80, 96), 2], [*range(62)]]).numpy()
    seen = torch.ones(2, 62, dtype=torch.bool).numpy()
    seen[1, [0, 1, 30, 60]] = False
    assert paged._runs(seen, ids, 16, whole=False) == [(0, 2, 42), (0, 45, 61), (1, 2, 30), (1, 31, 60)]
    assert paged._runs(seen, ids, 16, whole=True) == []
    seen[1] = True
    assert paged._runs(seen, ids, 16, whole=True) == [(1, 0, 62)]


def test_what_lies_in_the_pool_is_not_copied(monkeypatch):
    monkeypatch.setattr(paged, "_IN_PLACE", 1 << 14)
    cache, attn, calls = Cache([600, 40], 16, adjacent=True), mf.compile(mf.causal()), []
    index_select = torch.index_select
    monkeypatch.setattr(
        torch, "index_select", lambda x, *args, **out: calls.append(args) or index_select(x, *args, **out)
    )
    attn.paged(drawn(2, 4, 1, DIM), *cache.pools, cache.pages)
    assert [len(pages) for _, pages in calls] == [3, 3]  # of k and v: those of the short request


@pytest.fixture
def copied(monkeypatch):
    """How many pages are copied, each time."""
    found, honest = [], torch.index_select
    monkeypatch.setattr(
        torch, "index_select", lambda x, dim, at, **out: found.append(len(at)) or honest(x, dim, at, **out)
    )
    return found


CACHES = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 3, 16]),
        "layout": st.sampled_from(["NHD", "HND"]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    }
)


@FEW
@given(mask=masks(2 * TABLES, batch=3, heads=4), last=st.lists(st.integers(0, 2), min_size=1, max_size=3), paged=CACHES)
def test_random_masks_of_pages_that_lie_like_a_contiguous_cache(mask, last, paged):
    lengths = [3 * paged["page_size"] + 12 - n % paged["page_size"] for n in last]
    assert_as_dense(Cache(lengths, adjacent=True, **paged), [2] * len(lengths), mask)


@pytest.mark.parametrize("score", [None, mf.scores.softcap(5.0)])
def test_pages_that_lie_like_a_contiguous_cache_are_not_copied(score, copied):
    for mask in (mf.causal(), mf.sliding_window(20)):
        assert_as_dense(Cache([90, 90, 90], 8, adjacent=True), [2] * 3, mask, score=score)
    assert_as_dense(Cache([90, 90], 90, layout="HND", adjacent=True), [1, 1], mf.causal(), score=score)
    assert not copied
    assert_as_dense(Cache([90, 89, 90], 8, adjacent=True), [1] * 3, mf.causal())  # a slot of the second holds NaN
    assert copied


def test_pages_of_16_bits_are_copied_for_few_requests_at_once(monkeypatch):
    monkeypatch.setattr(paged, "_COPIED", 2 * 5 * 4 * KV_HEADS * DIM * 2)  # keys of two requests
    cache, copied, honest = Cache([20, 19, 18, 17, 20], 4, dtype=torch.bfloat16), [], torch.index_select
    monkeypatch.setattr(
        torch, "index_select", lambda x, dim, at, **out: copied.append(len(at)) or honest(x, dim, at, **out)
    )
    assert_as_dense(cache, [1] * 5, mf.causal())
    assert copied == [10, 10, 10, 10, 5, 5]  # of k and v, all pages of each: so each result is rounded once


def test_requests_may_be_partly_in_order(monkeypatch):
    monkeypatch.setattr(paged, "_IN_PLACE", 1 << 14)
    cache = Cache([700, 90], 16, adjacent=True)
    moved = cache.pages.block_table[0, :3].clone()
    cache.pages.block_table[0, :3] = moved.flip(0)  # what is copied, before a run that isn't
    for x in cache.k, cache.v:
        x[0, :, :48] = x[0, :, :48].unflatten(1, (3, 16)).flip(1).flatten(1, 2)
    assert_as_dense(cache, [1, 1], mf.causal())


PREFIXES = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 2, 3, 4, 7, 16]),
        "layout": st.sampled_from(["NHD", "HND"]),
        "shared": st.integers(1, 12),
        "adjacent": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    }
)


@st.composite
def steps(draw):
    """Lengths of requests with equally few queries each."""
    count = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(few._WIDE * count, TABLES), min_size=2, max_size=3))
    return lengths, [count] * len(lengths)


@pytest.fixture
def computed_once(monkeypatch):
    """What is shared is computed once, however little it is, in pieces; the shares that there were."""
    monkeypatch.setattr(paged, "_SHARED", 0)
    found, honest = [], paged.shared
    monkeypatch.setattr(paged, "shared", lambda *given: found.append(honest(*given)) or found[-1])
    return found


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=masks(2 * TABLES, batch=3, heads=4), call=steps(), paged_as=PREFIXES, pieces=st.booleans())
def test_shared_prefixes(computed_once, mask, call, paged_as, pieces):
    with pytest.MonkeyPatch.context() as patch:
        if pieces:
            patch.setattr(paged, "_COPIED", 512)
        assert_as_dense(Cache(call[0], **paged_as), call[1], mask)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mask=masks(2 * TABLES, batch=3, heads=4),
    score=scores(2 * TABLES, batch=3, heads=4),
    call=steps(),
    paged_as=PREFIXES,
)
def test_shared_prefixes_with_scores(computed_once, mask, score, call, paged_as):
    assert_as_dense(Cache(call[0], **paged_as), call[1], mask, score=score)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -torch.inf, 2.0, -1.0])])
def test_what_is_shared_is_computed_once(sinks, computed_once, monkeypatch):
    cache, copied, honest = Cache([61, 40, 55], 4, shared=9), [], torch.index_select
    monkeypatch.setattr(
        torch, "index_select", lambda x, dim, at, **out: copied.append(len(at)) or honest(x, dim, at, **out)
    )
    mask = mf.mask(lambda b, h, q, kv: q >= kv and kv >= 1 + b)  # rows differ on the shared pages, too
    assert_as_dense(cache, [1, 1, 1], mask, sinks=sinks)
    ((share,),) = computed_once
    assert (share.requests.tolist(), share.first, share.stop) == ([0, 1, 2], 0, 9)
    assert sum(copied) == 2 * (9 + 7 + 7 + 7)  # of k and v; the rest of each is copied as far as the longest one's


def test_prefixes_are_found_level_by_level():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 1], [5, 6, 9, 2], [3, 6, 7, 8]]).numpy()
    seen = torch.ones(4, 4, dtype=torch.bool).numpy()
    found = [(share.requests.tolist(), share.first, share.stop) for share in paged.shared(seen, ids, 1)]
    assert found == [([0, 1, 2], 0, 2), ([1, 2], 2, 3)]
    assert [share.requests.tolist() for share in paged.shared(seen, ids, 2)] == [[0, 1, 2]]
    seen[2, 0] = False  # what a request doesn't see, it doesn't share
    assert [(x.requests.tolist(), x.first, x.stop) for x in paged.shared(seen, ids, 1)] == [([0, 1], 0, 2)]
    seen[:, 0] = False  # behind all windows
    found = [(share.requests.tolist(), share.first, share.stop) for share in paged.shared(seen, ids, 1)]
    assert found == [([0, 1, 2, 3], 0, 2), ([1, 2], 2, 3), ([0, 3], 2, 4)]
    assert paged.shared(seen, torch.arange(16).view(4, 4).numpy(), 1) == []


def test_shared_prefixes_of_16_bits_are_rounded_once(computed_once):
    cache, q = Cache([61, 40, 55], 4, shared=9, dtype=torch.bfloat16), drawn(3, HEADS, 1, DIM, dtype=torch.bfloat16)
    attn = mf.compile(mf.causal())
    wide = attn.paged(q.float(), *(x.float() for x in cache.pools), cache.pages)
    assert torch.equal(attn.paged(q, *cache.pools, cache.pages), wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", [None, mf.scores.softcap(3.0)])
def test_with_splits_the_bits_of_a_request_are_its_own(dtype, score, computed_once, monkeypatch):
    monkeypatch.setattr(paged, "_COPIED", 2048)  # as many pages at once as there are requests for
    monkeypatch.setattr(paged, "_ALONE", 20)
    cache, q = Cache([61, 40, 55], 4, shared=9, dtype=dtype), drawn(3, HEADS, 1, DIM, dtype=dtype)
    attn = mf.compile(mf.causal(), score=score, splits=1)
    together = attn.paged(q, *cache.pools, cache.pages)
    assert not computed_once
    for r in range(3):
        pages = mf.PageTable(cache.pages.block_table[r : r + 1], cache.pages.lengths[r : r + 1], 4)
        assert torch.equal(attn.paged(q[r : r + 1], *cache.pools, pages)[0], together[r])


def test_tables_of_masks_may_end_with_the_longest_request():
    marks = torch.tensor([0, 1, 1] * 7)[:19].expand(2, -1).contiguous()
    mask = mf.mask(lambda b, h, q, kv: marks[b, kv] > 0)
    cache, attn, q = Cache([19, 19], 16), mf.compile(mask), drawn(2, HEADS, 1, DIM)
    out = attn.paged(q, *cache.pools, cache.pages)
    assert torch.allclose(out, attn(q, cache.k, cache.v, q_offset=18), atol=1e-6)


@pytest.mark.parametrize("count", [1, 20])
def test_what_no_query_sees_is_not_read(count, monkeypatch):
    cache = Cache([64, 64, 64], 4)
    table = cache.pages.block_table
    mask = mf.causal() & (mf.global_tokens(4) | mf.sliding_window(7))
    table[:, 2 : (64 - count - 7) // 4] = -1  # evicted
    assert_as_dense(cache, [count] * 3, mask)
    for r in range(3):
        for token in range(4, 64 - count - 7):
            if token < 8 or token // 4 == (64 - count - 7) // 4:
                cache.forget(r, token)
    assert_as_dense(cache, [count] * 3, mask)
    table[1, 0] = 999
    with pytest.raises(mf.ArgumentError, match=r"block_table is 999 for page 0 of request 1, which is used; expected"):
        assert_as_dense(cache, [count] * 3, mask)


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_chunks_and_steps_equal_one_pass(page_size):
    total, attn = 40, mf.compile(mf.sliding_window(11))
    q, k, v = drawn(3, 2, 4, total, DIM).unbind()
    wanted = attn(q, k[:, :2], v[:, :2])
    pools = [torch.full((2 * total, page_size, 2, DIM), torch.nan) for _ in range(2)]
    table = torch.randperm(2 * total, generator=torch.Generator().manual_seed(3))[: 2 * -(-total // page_size)]
    pages = mf.PageTable(table.view(2, -1), torch.zeros(2, dtype=torch.int64), page_size)
    found, done = [], 0
    for chunk in (17, 8, 1, 1, 1, 12):
        new = slice(done, done + chunk)
        pages.lengths += chunk
        pages.append(*pools, k[:, :2, new], v[:, :2, new])
        found.append(attn.paged(q[:, :, new], *pools, pages))
        done += chunk
    assert torch.allclose(torch.cat(found, 2), wanted, atol=1e-6)


def test_writes_to_the_table_are_seen():
    cache, attn = Cache([20, 20], 4), mf.compile(mf.full())
    q = drawn(2, 4, 1, DIM)
    before = attn.paged(q, *cache.pools, cache.pages)
    cache.pages.block_table[0] = cache.pages.block_table[1].clone()
    after = attn.paged(q[1:].expand(2, -1, -1, -1), *cache.pools, cache.pages)
    assert torch.allclose(after[0], after[1]) and torch.allclose(after[1], before[1], atol=1e-6)


def test_pools_may_be_parts_of_one_tensor():
    cache, attn, q = Cache([20, 33], 4), mf.compile(mf.causal()), drawn(2, 4, 3, DIM)
    k_pages = cache.pools[0]
    wanted = attn.paged(q, k_pages, k_pages, cache.pages)
    both = torch.stack([k_pages, k_pages.clone()], 1)  # FlashInfer's cache, (P, 2, page_size, Hkv, D)
    assert torch.equal(attn.paged(q, both[:, 0], both[:, 1], cache.pages), wanted)


def test_steps_keep_nothing():
    cache, attn = Cache([40, 40], 4), mf.compile(mf.causal())
    table = torch.cat([cache.pages.block_table, cache.pages.block_table[:1]])
    pages = mf.PageTable(table, torch.tensor([9, 10, 11]), 4)
    q = drawn(3, 4, 1, DIM)

    def step():
        attn.paged(q, *cache.pools, pages)
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    first = [step() for _ in range(3)][-1]
    assert step() == first


Q, CACHE = drawn(2, 4, 3, DIM), Cache([9, 12], 4)
RIGHT = {"q": Q, "k_pages": CACHE.pools[0], "v_pages": CACHE.pools[1], "pages": CACHE.pages}


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"pages": CACHE.pages.block_table}, mf.ArgumentTypeError, "pages is a Tensor, expected a PageTable"),
        ({"layout": "HDN"}, mf.ArgumentError, 'layout is .*expected "NHD" or "HND"'),
        ({"layout": "HND"}, mf.ArgumentError, r"k_pages has shape .*, expected \(pages, heads, page_size, head_dim\)"),
        ({"q": Q[:1]}, mf.ArgumentError, r"q has shape \(1, 4, 3, 8\).* of 2 requests"),
        ({"q": Q[0]}, mf.ArgumentError, r"q has shape .* expected \(requests, heads, tokens, head_dim\)"),
        ({"q": Q.double()}, mf.ArgumentTypeError, "k has dtype torch.float32, expected q's torch.float64"),
        ({"q": Q.expand(2, 4, 3, 8)[:, :3]}, mf.ArgumentError, "q has 3 heads and k 2"),
        ({"q": Q.repeat(1, 1, 4, 1)}, mf.ArgumentError, "q has 12 tokens for request 0, whose length is 9"),
        ({"v_pages": CACHE.pools[1][:2]}, mf.ArgumentError, "pages and v_pages 2; expected the same"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, mf.ArgumentError, r"with cu_seqlens, expected \(tokens, heads"),
        (
            {"q": Q[0].transpose(0, 1), "cu_seqlens_q": torch.tensor([0, 3])},
            mf.ArgumentError,
            r"cu_seqlens is \[0, 3\], expected 3",
        ),
        ({"q": Q[0].transpose(0, 1), "cu_seqlens_q": torch.tensor([0, 3, 2])}, mf.ArgumentError, "don't fall"),
        (
            {"q": Q[0].transpose(0, 1), "cu_seqlens_q": torch.tensor([0.0, 1, 4])},
            mf.ArgumentTypeError,
            "expected an integer dtype",
        ),
        ({"sinks": torch.zeros(3)}, mf.ArgumentError, r"paged: sinks have shape \(3,\)"),
        ({"dropout_p": 0.1}, mf.ArgumentError, "dropout is asked for, expected none"),
        ({"seed": 3}, mf.ArgumentError, "dropout is asked for, expected none"),
        ({"q": Q.clone().requires_grad_()}, mf.ArgumentError, "q asks for a gradient, expected none"),
        ({"sinks": torch.zeros(4).requires_grad_()}, mf.ArgumentError, "sinks asks for a gradient"),
        ({"window": 3}, mf.ArgumentTypeError, "window"),
        ({"pages": mf.PageTable(CACHE.pages.block_table, torch.tensor([9, 99]), 4)}, mf.ArgumentError, "lengths is 99"),
        ({"pages": mf.PageTable(CACHE.pages.block_table, torch.tensor([-1, 9]), 4)}, mf.ArgumentError, "lengths is -1"),
        ({"pages": mf.PageTable(CACHE.pages.block_table - 1, torch.tensor([9, 12]), 4)}, mf.ArgumentError, "page"),
    ],
)
def test_bad_input(given, kind, message):
    attn = mf.compile(mf.causal())
    with pytest.raises(kind, match=message):
        attn.paged(**{**RIGHT, **given})


def test_learned_scores_are_refused():
    slopes = torch.zeros(4, requires_grad=True)
    attn = mf.compile(mf.causal(), score=lambda score, b, h, q, kv: score + slopes[h] * kv)
    with pytest.raises(mf.ArgumentError, match="asks for a gradient"):
        attn.paged(**RIGHT)
    with torch.no_grad():
        attn.paged(**RIGHT)


@pytest.mark.filterwarnings("ignore::maskflash.DenseMaskWarning")
def test_masks_of_one_size_are_refused():
    for mask in (torch.ones(3, 12, dtype=torch.bool), mf.causal().to_flashmask(3, 12)):
        with pytest.raises(mf.ArgumentError, match=r"paged: .* expected 0"):
            mf.compile(mask).paged(**RIGHT)


def test_only_columns_that_are_seen_are_gathered():
    seen = torch.zeros(30, dtype=torch.bool)
    assert Stretch.of(seen.numpy(), 4).pages.tolist() == []
    seen[[5, 6, 21]] = True
    stretch = Stretch.of(seen.numpy(), 4)
    assert (stretch.start, stretch.stop, stretch.pages.tolist(), stretch.columns.tolist()) == (
        5,
        22,
        [1, 5],
        [5, 6, 21],
    )


def test_inference_mode():
    with torch.inference_mode():
        cache = Cache([9, 12], 4)
        out = mf.compile(mf.causal()).paged(Q, *cache.pools, cache.pages)
    assert torch.equal(out, mf.compile(mf.causal()).paged(**RIGHT))


def test_graphs_leave_the_call_as_it_is():
    attn = mf.compile(mf.causal())
    graph = torch.compile(lambda q: attn.paged(q * 2, *CACHE.pools, CACHE.pages) + 1, backend="eager")
    assert torch.equal(graph(Q), attn.paged(Q * 2, *CACHE.pools, CACHE.pages) + 1)
