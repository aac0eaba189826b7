"""One cache of traces for each function: it finds what it has, it is bounded, and nothing else grows beside it."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch

import maskflash as mf
from maskflash.functions import slots, traces
from maskflash.functions.sizes import Sizes

N = 24


def sizes(**given):
    given = {"batch": 1, "heads": 1, "q_offset": 0, "device": "cpu", **given}
    return Sizes.checked("test", N, N, **given)


STEPS = {
    "a float": (mf.mask(lambda b, h, q, kv, *, x: (q - kv) * 0.5 < x), lambda n: n / 7, 1),
    "an int": (mf.mask(lambda b, h, q, kv, *, x: q - kv < x), lambda n: n, 1),
    "a tensor whose shape matters": (mf.mask(lambda b, h, q, kv, *, x: q - kv < x.shape[0]), torch.zeros, 64),
    "a float that Python computes with": (mf.mask(lambda b, h, q, kv, *, x: q - kv < int(x * 9)), lambda n: n / 7, 64),
    "NaN": (mf.mask(lambda b, h, q, kv, *, x: x > int(q) if x > 1e9 else q >= kv), lambda n: float("nan"), 2),
}


@pytest.mark.parametrize("what", STEPS)
def test_an_argument_that_changes_at_each_step_grows_nothing(what, monkeypatch):
    mask, value, most = STEPS[what]
    monkeypatch.setattr(traces, "_MOST_NAMES", 100)
    monkeypatch.setattr(slots, "_MOST_EXPRESSIONS", 100)
    joined = mask & mf.causal()

    def objects(first, last):
        for n in range(first, last):
            mask.bind(sizes(), {"x": value(n)})
            if n % 2 == 0:
                joined.bind(sizes(), {"x": value(n)})
        gc.collect()
        return len(gc.get_objects())

    before = objects(1, 200)
    after = objects(200, 400)
    assert after - before < 60
    for own in (mask.traces, joined.traces):
        assert len(own.all()) == len([name for name in vars(own) if name.startswith("slots")]) <= most
        assert len(own.texts) <= most
        assert len(own._depends) <= 64
    assert len(traces._names) <= 100 and len(slots._expressions) <= 100


def test_captures_that_change_at_each_step_grow_nothing(monkeypatch):
    monkeypatch.setattr(traces, "_MOST_NAMES", 100)
    held = SimpleNamespace(x=1.0, shapes=[1])
    mask = mf.mask(lambda b, h, q, kv: (q - kv) * 0.5 < held.x and q - kv < held.shapes[0])
    for n in range(300):
        held.x, held.shapes[0] = n / 7, n
        mask.bind(sizes(), {})
    assert len(mask.traces.all()) <= 64 and len(mask.traces._depends) <= 64 and len(traces._names) <= 100
    assert len(mask._captures._laid_out) == 0


def test_the_least_recently_used_trace_goes_first(monkeypatch):
    mask = mf.mask(lambda b, h, q, kv, *, x: q - kv < int(x))
    kept = mask.bind(sizes(), {"x": 4.0}).slots
    for n in range(5, 300):
        mask.bind(sizes(), {"x": float(n)})
        assert mask.bind(sizes(), {"x": 4.0}).slots is kept


def test_bound_is_the_same_however_it_was_traced():
    def predicate(b, h, q, kv, *, doc, share, n=3):
        return doc[q] == doc[kv] and q - kv < max(n, doc.shape[0] // 8) and (q - kv) * 0.25 < share

    doc = torch.arange(N) // 5
    one, other = mf.mask(predicate), mf.mask(predicate)
    other.bind(sizes(), {"doc": doc[:8], "share": 0.5, "n": 9})
    for given in ({"doc": doc, "share": 2.5}, {"doc": doc.int(), "share": -0.0, "n": 7}):
        x, y = one.bind(sizes(), given), other.bind(sizes(), given)
        assert (x.slots.text, x.params, x.slots.names) == (y.slots.text, y.params, y.slots.names)
        assert [name for name in vars(one.traces) if getattr(one.traces, name) is x.slots] == [
            name for name in vars(other.traces) if getattr(other.traces, name) is y.slots
        ]
        assert x.inputs.params == tuple(y.slots.traced.bind({"n": 3, **given}).params)
        assert all(table is given["doc"] for table in x.tables)


def test_threads_get_the_traces_of_their_own_values():
    mask = mf.mask(lambda b, h, q, kv, *, x: q - kv < int(x))
    wrong = []

    def work(first):
        for n in range(first, first + 300):
            if mask.row(N - 1, N, x=n % 100 + 0.5) != ([(max(0, N - n % 100), N)] if n % 100 else []):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 100, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pickled_mask_keeps_what_its_traces_depend_on():
    import pickle

    mask = mf.mask(lambda b, h, q, kv, *, x, y: q - kv < int(x) and kv > y)
    for x in (4.0, 9.0):
        mask.dense(N, N, x=x, y=0)
    found = pickle.loads(pickle.dumps(mask))
    for x in (4.0, 9.0):
        assert torch.equal(found.dense(N, N, x=x, y=2), mask.dense(N, N, x=x, y=2))
    with pytest.raises(mf.ArgumentTypeError, match="pickled without its function"):
        found.dense(N, N, x=5.0, y=0)
