"""Other numbers and tensors that a predicate captures need no other trace; what Python computes with needs one."""

import functools
from types import SimpleNamespace

import pytest
import torch

import maskflash as mf
from maskflash.functions import written
from tests.functions.capturing import N, pair_by_pair

WINDOW = 5
DOC = torch.arange(N) // 5


@pytest.fixture
def traces(monkeypatch):
    found = []
    real = written.trace
    monkeypatch.setattr(written, "trace", lambda *args: found.append(args) or real(*args))
    return found


def test_another_number_or_tensor_is_no_other_trace(traces):
    held = SimpleNamespace(n=3, doc=DOC, radius=1.5)
    place = torch.arange(N) * 0.5

    @mf.mask
    def mask(b, h, q, kv):
        near = abs(place[q] - place[kv]) <= held.radius
        return held.doc[q] == held.doc[kv] and 0 <= q - kv < held.n and near and kv + WINDOW > q

    for n in range(1, 40):
        held.n, held.radius, held.doc = n, 0.25 * n, torch.arange(N) // n
        assert torch.equal(mask.dense(N, N)[0, 0], pair_by_pair(mask.function))
    assert len(traces) == 1


def test_what_python_computes_with_is_traced_again_and_not_kept_for_good(traces):
    held = SimpleNamespace(n=1)
    mask = mf.mask(lambda b, h, q, kv: q - kv < held.n * 2)
    for n in range(1, 200):
        held.n = n
        assert mask.row(190, 191) == [(max(0, 191 - 2 * n), 191)]
    assert len(traces) == 199
    assert len(mask.traces.all()) <= 64
    for n in range(199, 190, -1):
        held.n = n
        assert mask.row(190, 191) == [(max(0, 191 - 2 * n), 191)]
    assert len(traces) == 199


def test_float_arguments_are_params(traces):
    mask = mf.mask(lambda b, h, q, kv, *, radius: (q - kv) * 0.5 < radius)
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    for n in range(300):
        mf.compile(mask)(q, k, v, radius=n / 7)
    assert len(traces) == 1
    for radius in (float("nan"), float("inf"), -0.0, 0.0, -2.75):
        assert torch.equal(mask.dense(N, N, radius=radius)[0, 0], pair_by_pair(mask.function, radius=radius))
    assert mask.fingerprint(radius=0.0) != mask.fingerprint(radius=-0.0)


def test_python_may_compute_with_a_float_argument():
    mask = mf.mask(lambda b, h, q, kv, *, share: kv < int(share * 20) or q >= kv)
    for share in (0.25, 0.5, 0.25):
        assert torch.equal(mask.dense(N, N, share=share)[0, 0], pair_by_pair(mask.function, share=share))


def test_a_table_that_cannot_be_followed_is_traced_at_each_call():
    @functools.lru_cache
    def table():
        return made[0]

    made = [torch.arange(N) // 4]
    hidden = {"x" + "y": SimpleNamespace(**{"do" + "c": made[0]})}
    get = functools.partial(hidden.get, "xy")
    mask = mf.mask(lambda b, h, q, kv: getattr(get(), "".join("doc"))[q] == getattr(get(), "".join("doc"))[kv])
    assert mask.row(9, N) == [(8, 12)]
    attn, joined = mf.compile(mask), mf.compile(mask & mf.causal())
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    hidden["xy"].doc = torch.arange(N) // 8
    assert mask.row(9, N) == [(8, 16)]
    for doc in (torch.arange(N) // 8, torch.arange(N) // 3):
        hidden["xy"].doc = doc
        assert torch.equal(attn(q, k, v), mf.attention(q, k, v, mf.document(ids=doc)))
        assert torch.equal(joined(q, k, v), mf.attention(q, k, v, mf.document(ids=doc) & mf.causal()))
