"""Analyses are found again exactly as long as nothing they depend on has changed."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from maskflash.functions.sizes import Sizes
from maskflash.ground import identity
from maskflash.op import cache
from maskflash.op.analyse import Analysis
from maskflash.op.spec import Spec

Q, K, V = torch.randn(3, 2, 4, 96, 8).unbind()


@pytest.fixture
def analyses(monkeypatch):
    """The problems analysed during a test."""
    found = []
    original = cache.analyse
    monkeypatch.setattr(cache, "analyse", lambda problem, backend: found.append(problem) or original(problem, backend))
    cache._entries.clear()
    return found


@mf.mask
def packed(b, h, q, kv, *, doc):
    return q >= kv and doc[b, q] == doc[b, kv]


def one(x):
    return x[:1].clone()


def documents():
    return torch.arange(192).view(2, 96) // 17


def test_layers_of_a_model_share_an_analysis(analyses):
    ids = documents()
    attn, other = mf.compile(packed), mf.compile(packed, scale=1.0)
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    for op in (attn, other):
        op(q, k, v, doc=ids).sum().backward()
        op(q, k, v, doc=ids[:]).sum().backward()
        op(q.double(), k.double(), v.double(), doc=ids)
    mf.attention(q, k, v, lambda b, h, q, kv: q >= kv and ids[b, q] == ids[b, kv])
    mf.attention(q, k, v, lambda b, h, row, col: row >= col and ids[b, row] == ids[b, col])
    assert len(analyses) == 1


def test_heads_and_batch_count_only_where_the_mask_looks(analyses):
    attn = mf.compile(mf.causal())
    attn(Q, K, V)
    attn(Q[:1, :2], K[:1, :2], V[:1, :2])
    assert len(analyses) == 1
    attn(Q, K, V, q_offset=torch.tensor([0, 5]))
    assert analyses[1].shape[0] == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids.add_(1),
        lambda ids: ids[0].zero_(),
        lambda ids: ids.view(-1)[5:6].fill_(3),
        lambda ids: ids.copy_(documents() // 2),
        lambda ids: ids.set_(documents() // 2),
    ],
)
def test_a_write_to_a_table_is_seen(analyses, change):
    ids = documents()
    attn = mf.compile(packed)
    attn(Q, K, V, doc=ids)
    change(ids)
    expected = mf.compile(packed)(Q, K, V, doc=ids.clone())
    assert torch.equal(attn(Q, K, V, doc=ids), expected)
    assert len(analyses) == 3


def test_lengths_offsets_parameters_and_views_are_told_apart(analyses):
    ids = documents()
    attn = mf.compile(packed)
    calls = [
        lambda: attn(Q, K, V, doc=ids),
        lambda: attn(Q[:, :, :50], K, V, doc=ids),
        lambda: attn(Q, K[:, :, :50], V[:, :, :50], doc=ids),
        lambda: attn(Q[:, :, :50], K, V, doc=ids, q_offset=3),
        lambda: attn(Q, K, V, doc=ids.flip(0)),
        lambda: attn(Q[:, :, :48], K[:, :, :48], V[:, :, :48], doc=ids[:, 1:]),
        lambda: attn(Q[:, :, :48], K[:, :, :48], V[:, :, :48], doc=ids[:, ::2]),
        lambda: mf.compile(packed, block_size=64)(Q, K, V, doc=ids),
        lambda: mf.attention(Q, K, V, mf.sliding_window(3)),
        lambda: mf.attention(Q, K, V, mf.sliding_window(4)),
    ]
    for count, call in enumerate(calls, start=1):
        call()
        assert len(analyses) == count


def test_a_new_tensor_in_a_dead_one_s_place_is_not_taken_for_it(analyses):
    attn = mf.compile(packed)
    for n in range(1, 30):
        ids = documents() // n
        assert torch.equal(attn(Q, K, V, doc=ids), mf.compile(packed)(Q, K, V, doc=ids.clone()))
        del ids
    analyses.clear()
    gc.collect()
    mf.attention(Q, K, V, mf.causal())
    assert len(cache._entries) == 1  # what belongs to dead tensors is gone


def test_data_s_own_version_counter_does_not_deceive(analyses):
    ids = documents()
    attn = mf.compile(packed)
    attn(Q, K, V, doc=ids.data)
    ids.data.mul_(0)
    assert torch.equal(attn(Q, K, V, doc=ids.data), mf.compile(mf.causal())(Q, K, V))


def test_inference_tensors_are_compared_by_content(analyses):
    attn = mf.compile(packed)
    with torch.inference_mode():
        for _ in range(2):
            attn(Q, K, V, doc=documents())
        assert len(analyses) == 1
        ids = documents()
        ids[0] = 0
        assert torch.equal(attn(Q, K, V, doc=ids), mf.compile(packed)(Q, K, V, doc=ids.clone()))
        assert len(analyses) == 2


def test_a_write_behind_torch_s_back_needs_invalidate(analyses):
    ids = documents()
    attn, other = mf.compile(packed), mf.compile(mf.causal())
    stale = attn(Q, K, V, doc=ids)
    other(Q, K, V)
    ids.numpy()[:] = 0
    assert torch.equal(attn(Q, K, V, doc=ids), stale)
    attn.invalidate()
    assert torch.equal(attn(Q, K, V, doc=ids), other(Q, K, V))
    assert len(analyses) == 3  # the other mask's analysis was kept


def test_the_least_recently_used_goes_first(analyses, monkeypatch):
    monkeypatch.setattr(cache, "CAPACITY", 2)
    for window in (1, 2, 1, 3, 1, 2):
        mf.attention(Q, K, V, mf.sliding_window(window))
    assert [problem.inputs.params[0] for problem in analyses] == [1, 2, 3, 2]
    assert len(cache._entries) == 2


def test_bytes_are_bounded_too(analyses, monkeypatch):
    lengths = (96, 80, 64, 48)
    attn = mf.compile(mf.sliding_window(9))
    for length in lengths:
        attn(Q[:, :, :length], K[:, :, :length], V[:, :, :length])
    weights = [entry.nbytes for entry in cache._entries.values()]
    assert all(weights)
    cache._entries.clear()
    monkeypatch.setattr(cache, "MEMORY", sum(weights[-2:]) + weights[0])
    for length in lengths:
        attn(Q[:, :, :length], K[:, :, :length], V[:, :, :length])
    assert 0 < len(cache._entries) < len(lengths)
    monkeypatch.setattr(cache, "MEMORY", 1)
    attn(Q[:, :, :7], K[:, :, :7], V[:, :, :7])
    assert [entry.analysis.block_map.q_len for entry in cache._entries.values()] == [7]


def test_a_table_may_die_while_analyses_are_weighed(analyses, monkeypatch):
    """Collection runs anywhere, and takes the analyses of dead tables with it."""
    attn = mf.compile(mf.sliding_window(9))
    attn(Q, K, V)
    dying = []

    def nbytes(analysis):
        for key in dying:
            cache._forget(key)
        return 1

    monkeypatch.setattr(Analysis, "nbytes", property(nbytes))
    dying += list(cache._entries)
    attn(Q[:, :, :50], K, V)
    assert len(cache._entries) == 1


def test_no_key_outlives_its_analysis(analyses):
    cache._names.clear()
    attn = mf.compile(packed)
    ids = documents()
    attn(Q, K, V, doc=ids)
    attn(Q, K, V, doc=documents())
    assert {key for key, _ in cache._names.values()} == set(cache._entries)
    attn.invalidate()
    assert not cache._names


def test_what_backward_is_given_is_found_by_its_storage(analyses):
    ids = documents()
    detached = ids.detach()
    assert detached._base is None  # nothing says what it is a view of
    given, saved = (
        packed.at(96, 96, batch=2, heads=4, device=ids.device, doc=doc).tiled((128, 128)) for doc in (ids, detached)
    )
    given, saved = (Spec.of_problem(problem, "cpu") for problem in (given, saved))
    sizes = Sizes(96, 96, 2, 4, ids.device)
    forward = cache.find(given, sizes)
    assert cache.find(saved, sizes, saved=True) is forward
    assert cache.find(saved, sizes) is not forward


def test_threads_that_want_one_analysis_make_it_once(monkeypatch):
    made, start = [], threading.Barrier(8)
    original = cache.analyse

    def slowly(problem, backend):
        made.append(problem)
        time.sleep(0.05)
        return original(problem, backend)

    monkeypatch.setattr(cache, "analyse", slowly)
    cache._entries.clear()
    ids = documents()
    expected = scaled_dot_product_attention(Q, K, V, packed.dense(96, 96, batch=2, doc=ids))
    attn = mf.compile(packed)

    def work(_):
        start.wait()
        return attn(Q, K, V, doc=ids)

    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(work, range(8)):
            torch.testing.assert_close(out, expected)
    assert len(made) == 1
    assert not cache._turns


def test_threads_with_tables_of_their_own_do_not_mix_them_up(monkeypatch):
    monkeypatch.setattr(cache, "CAPACITY", 3)
    attn = mf.compile(packed)

    def work(seed):
        for n in range(1, 12):
            ids = documents() // (1 + (seed + n) % 5)
            expected = scaled_dot_product_attention(Q, K, V, packed.dense(96, 96, batch=2, doc=ids))
            torch.testing.assert_close(attn(Q, K, V, doc=ids), expected)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert len(cache._entries) <= 3


def test_an_analysis_that_fails_fails_again(analyses):
    table = torch.zeros(5)
    attn = mf.compile(lambda b, h, q, kv: table[q] == 0)
    for _ in range(2):
        with pytest.raises(mf.MaskIndexError):
            attn(Q, K, V)
    assert not cache._turns
    attn(Q[:, :, :5], K, V)


def test_analyses_do_not_keep_tables_alive_beyond_the_next(analyses):
    import weakref

    ids = documents()
    gone = weakref.ref(ids)
    mf.compile(packed)(Q, K, V, doc=ids)
    mf.compile(packed)(one(Q), one(K), one(V), doc=ids[:1])
    analyses.clear()
    del ids
    gc.collect()
    mf.compile(packed)(Q, K, V, doc=documents() // 3)
    assert gone() is None


@pytest.mark.parametrize("view", [False, True])
def test_tables_that_are_gone_go_with_the_next_analysis(view):
    cache._entries.clear()
    held = [documents()]
    attn = mf.compile(lambda b, h, q, kv: held[0][b, q] == (held[0][b][kv] if view else held[0][b, kv]))
    sizes = []
    for n in range(2, 8):
        held[0] = documents() // n
        attn(Q, K, V)
        attn(one(Q[:, :, :7]), one(K), one(V))
        sizes.append((len(cache._names), len(identity._kept)))
    assert sizes[-1] == sizes[2]


def test_views_of_one_table_are_told_apart_though_one_takes_the_place_of_another():
    """A view that is gone may leave its id to the next one, of the same tensor at the same version."""
    attn, ids = mf.compile(packed), torch.stack((torch.zeros(2, 96, dtype=torch.int64), documents()))
    for _ in range(3):
        for layer in (0, 1):
            out = attn(Q, K, V, doc=ids[layer])
            dense = packed.dense(96, 96, batch=2, doc=ids[layer])
            torch.testing.assert_close(out, scaled_dot_product_attention(Q, K, V, attn_mask=dense))


EVALUATED = {
    "a kept band": lambda: mf.sliding_window(5, 2),
    "a table": lambda: mf.document(lengths=[10, 20, 66]),
    "column vectors": lambda: mf.ColumnIntervals(torch.arange(96).clamp(min=40)),
    "kept bits": lambda: mf.mask(lambda b, h, q, kv: (7 * q + 3 * kv) % 5 < 2),
}


def gradients(attn, **arguments):
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    return torch.autograd.grad(attn(q, k, v, **arguments).sum(), (q, k, v))


@pytest.mark.parametrize("make", EVALUATED.values(), ids=EVALUATED)
def test_what_inference_mode_leaves_behind_trains(analyses, make):
    with torch.inference_mode():
        attn = mf.compile(make())
        attn(Q, K, V)
    assert all(map(torch.equal, gradients(attn), gradients(mf.compile(make()))))
    assert len(analyses) <= 2


def test_arguments_of_inference_mode_train(analyses):
    attn = mf.compile(packed)
    with torch.inference_mode():
        ids, offset = documents(), torch.tensor([0, -3])
    expected = gradients(attn, doc=documents(), q_offset=torch.tensor([0, -3]))
    assert all(map(torch.equal, gradients(attn, doc=ids, q_offset=offset), expected))
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    out = attn(q, k, v, doc=ids, q_offset=offset)
    with torch.inference_mode():
        ids.zero_()  # nothing forbids it
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), (q, k, v)), expected))
    assert len(analyses) == 2
