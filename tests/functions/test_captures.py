"""What a predicate captures is looked up at each call, as Python looks it up."""

import array
import functools
import sys
import types
import weakref
from collections import ChainMap, UserDict, deque, namedtuple
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import maskflash as mf
from tests.functions.capturing import CHANGES, Config, Model, N, holds

WINDOW = 5
DOC = torch.arange(N) // 5
SETTINGS = SimpleNamespace(window=4, spans=[(0, 3), (9, 12)])


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_s_mask_reads_the_module_as_it_is(model, change):
    assert holds(model.attn.mask, model.visible)
    CHANGES[change](model)
    assert holds(model.attn.mask, model.visible)
    for other in CHANGES.values():
        other(model)
        assert holds(model.attn.mask, model.visible)


def test_functional_call_is_followed(model):
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    model.forward = lambda q, k, v: model.attn(q, k, v)
    other = {"doc": torch.zeros(N, dtype=torch.int64)}
    own = model(q, k, v)
    found = torch.func.functional_call(model, other, (q, k, v))
    assert not torch.equal(found, own)
    assert torch.equal(model(q, k, v), own)
    model.doc = other["doc"]
    assert torch.equal(model(q, k, v), found)


def test_a_module_made_without_memory_is_read_once_it_has_some():
    with torch.device("meta"):
        model = Model()
    with pytest.raises(mf.ArgumentError, match=r"a table \(24,\) of torch.int64 that the mask captures is on meta"):
        model.attn(*torch.randn(3, 1, 1, N, 8).unbind())
    model.to_empty(device="cpu")
    model.load_state_dict(Model().state_dict())
    assert holds(model.attn.mask, model.visible)


def test_closures_and_globals_are_read_as_they_are(monkeypatch):
    window, doc = 3, torch.arange(N) // 7

    def rebind(new_window, new_doc):
        nonlocal window, doc
        window, doc = new_window, new_doc

    def helper(q, kv):
        return doc[q] == doc[kv] and SETTINGS.window >= abs(q - kv)

    def predicate(b, h, q, kv):
        return (
            (q - kv < window and helper(q, kv)) or any(low <= q < high for low, high in SETTINGS.spans) or kv < WINDOW
        )

    mask = mf.mask(predicate)
    assert holds(mask, predicate)
    rebind(8, doc)
    assert holds(mask, predicate)
    rebind(8.5, torch.arange(N) // 2)
    assert holds(mask, predicate)
    for name, value in {"WINDOW": 1, "SETTINGS": SimpleNamespace(window=1, spans=[])}.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)
        assert holds(mask, predicate)
    helper_before = helper

    def helper(q, kv):
        return helper_before(q, kv) and q % 2 == 0

    assert holds(mask, predicate)


@pytest.mark.parametrize("joined", [False, True])
def test_partials_defaults_and_callable_objects_are_read_as_they_are(joined):
    class Near:
        def __init__(self):
            self.by = 2

        def __call__(self, b, h, q, kv):
            return abs(q - kv) <= self.by

    def within(b, h, q, kv, **options):
        return options["low"] <= kv < options["high"]

    sizes = [3]

    def sized(b, h, q, kv):
        def inner(x, sizes=sizes):
            return x < sizes[0]

        return inner(q - kv)

    near = Near()
    bounded = functools.partial(within, low=1, high=9)

    def check(predicate):
        mask = masks[predicate]
        if not joined:
            return holds(mask, predicate)
        return holds(mask & mf.causal(), lambda b, h, q, kv: predicate(b, h, q, kv) and q >= kv)

    masks = {predicate: mf.mask(predicate) for predicate in (near, bounded, sized)}
    assert all(map(check, masks))
    near.by = 6
    bounded.keywords["high"] = 20
    sizes[0] = 11
    assert all(map(check, masks))


class Kind(Enum):
    """A value with a method, which reads a global."""

    NEAR = 1

    def visible(self, q, kv):
        return q - kv < WINDOW


def test_methods_of_enums_and_named_tuples_are_followed(monkeypatch):
    class Span(namedtuple("Span", "low")):
        def visible(self, q):
            return self.low <= q + WINDOW

    kind, span = Kind.NEAR, Span(9)
    mask = mf.mask(lambda b, h, q, kv: kind.visible(q, kv) and span.visible(q))
    assert holds(mask, mask.function)
    monkeypatch.setattr(sys.modules[__name__], "WINDOW", 2)
    assert holds(mask, mask.function)


class Options(dict):
    """A dict with attributes."""


class Renamed:
    """Reads another attribute than it is asked for."""

    def __init__(self):
        self.n = 3

    def __getattribute__(self, name):
        return super().__getattribute__({"window": "n"}.get(name, name))


def _with_options():
    options = Options()
    options.window = 3
    return options


HOLDERS = {  # what holds a number, how code reads it, and how it becomes another
    "deque": (lambda: deque([3]), lambda x: x[0], lambda x: x.append(x.popleft() + 5)),
    "array": (lambda: array.array("l", [3]), lambda x: x[0], lambda x: x.__setitem__(0, 8)),
    "bytearray": (lambda: bytearray([3]), lambda x: x[0], lambda x: x.__setitem__(0, 8)),
    "UserDict": (lambda: UserDict(n=3), lambda x: x["n"], lambda x: x.__setitem__("n", 8)),
    "ChainMap": (lambda: ChainMap({"n": 3}), lambda x: x["n"], lambda x: x.__setitem__("n", 8)),
    "an attribute of a dict": (_with_options, lambda x: x.window, lambda x: setattr(x, "window", 8)),
    "an attribute by another name": (Renamed, lambda x: x.window, lambda x: setattr(x, "n", 8)),
    "no attribute": (SimpleNamespace, lambda x: getattr(x, "n", 3), lambda x: setattr(x, "n", 8)),
    "None": (
        lambda: SimpleNamespace(doc=None),
        lambda x: 3 if x.doc is None else x.doc[0],
        lambda x: setattr(x, "doc", DOC + 8),
    ),
    "a module's attribute that isn't there": (
        torch.nn.Module,
        lambda x: getattr(x, "n", 3),
        lambda x: x.register_buffer("n", DOC[9]),
    ),
    "a function in an attribute": (
        lambda: SimpleNamespace(reach=lambda: 3),
        lambda x: x.reach(),
        lambda x: setattr(x, "reach", lambda: 8),
    ),
    "a method that an attribute hides": (
        lambda: type("Reach", (), {"reach": lambda self: 3})(),
        lambda x: x.reach(),
        lambda x: setattr(x, "reach", lambda: 8),
    ),
    "a class's attribute that isn't there": (
        lambda: type("Reach", (), {})(),
        lambda x: getattr(x, "n", 3),
        lambda x: setattr(type(x), "n", 8),
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_holds_a_number_is_read_as_it_is(holder):
    make, read, change = HOLDERS[holder]
    held = make()

    def predicate(b, h, q, kv):
        return q - kv < read(held)

    mask = mf.mask(predicate)
    assert holds(mask, predicate)
    assert holds(mask & mf.full(), predicate)
    change(held)
    assert holds(mask, predicate)
    assert holds(mask & mf.full(), predicate)


def test_views_of_dicts_and_weak_references_are_followed():
    spans, near = {"n": 3}, Config(window=3)
    view, proxy, ref = types.MappingProxyType(spans), weakref.proxy(near), weakref.ref(near)
    predicates = (
        lambda b, h, q, kv: q - kv < view["n"],
        lambda b, h, q, kv: q - kv < proxy.window,
        lambda b, h, q, kv: q - kv < ref().window,
    )
    masks = [mf.mask(predicate) for predicate in predicates]
    assert all(map(holds, masks, predicates))
    spans["n"] = near.window = 8
    assert all(map(holds, masks, predicates))


def test_names_that_are_bound_after_the_mask_is_made_are_followed(monkeypatch):
    here = sys.modules[__name__]

    @mf.mask
    def mask(b, h, q, kv, *, doc):
        return q - kv < window and kv < LATER and doc[q] == doc[kv]  # noqa: F821

    window = 3
    monkeypatch.setattr(here, "LATER", 20, raising=False)
    assert holds(mask, mask.function, doc=DOC)
    window = 8
    assert holds(mask, mask.function, doc=DOC)
    monkeypatch.setattr(here, "LATER", 12)
    assert holds(mask, mask.function, doc=DOC)


def test_a_global_may_hide_a_builtin(monkeypatch):
    mask = mf.mask(lambda b, h, q, kv: abs(q - kv) < 3)
    assert holds(mask, mask.function)
    monkeypatch.setattr(sys.modules[__name__], "abs", lambda x: x, raising=False)
    assert holds(mask, mask.function)


def test_functions_may_get_other_code():
    def helper(q, kv):
        return q - kv < 3

    def another(q, kv):
        return kv - q < 5 and q > 1

    mask = mf.mask(lambda b, h, q, kv: helper(q, kv))
    assert holds(mask, mask.function)
    helper.__code__ = another.__code__  # as reloading does
    assert holds(mask, mask.function)


def test_a_combination_reads_what_its_parts_read():
    left, right = SimpleNamespace(doc=DOC, n=2), SimpleNamespace(doc=DOC, n=4)
    one = mf.mask(lambda b, h, q, kv: left.doc[q] == left.doc[kv] or q - kv < left.n)
    two = mf.mask(lambda b, h, q, kv: right.doc[q] == right.doc[kv] or kv - q < right.n)
    both = one & ~(two | mf.sliding_window(1))

    def predicate(b, h, q, kv):
        return one(b, h, q, kv) and not (two(b, h, q, kv) or 0 <= q - kv <= 1)

    assert holds(both, predicate)
    right.doc = torch.arange(N) // 2  # until now the two had one table
    assert holds(both, predicate)
    left.n, right.n = 5, 1
    assert holds(both, predicate)
    left.doc = right.doc
    assert holds(both, predicate)


def test_a_mask_that_a_predicate_calls_is_followed():
    inner = SimpleNamespace(n=2)
    mask = mf.mask(lambda b, h, q, kv: q - kv < inner.n) & mf.causal()
    outer = mf.mask(lambda b, h, q, kv: mask(b, h, q, kv) or kv == 0)
    assert outer.row(9, N) == [(0, 1), (8, 10)]
    inner.n = 4
    assert outer.row(9, N) == [(0, 1), (6, 10)]


def test_views_are_taken_of_the_tensor_that_is_there():
    held = SimpleNamespace(ids=torch.arange(2 * N).view(2, N) // 5)

    def predicate(b, h, q, kv):
        first, last = held.ids[0], held.ids[:, 2:].T
        return first[q] == first[kv] and (last[kv % 20, 1] >= held.ids.shape[0] + first[q])

    mask = mf.mask(predicate)
    assert holds(mask, predicate)
    held.ids = torch.arange(2 * N).view(2, N) // 3
    assert holds(mask, predicate)
    held.ids = torch.arange(3 * N).view(3, N).flip(1) // 2  # of another shape
    assert holds(mask, predicate)
    held.ids = torch.arange(3 * N).view(N, 3).T // 2  # of other strides
    assert holds(mask, predicate)
    held.ids.data = torch.arange(3 * N).view(3, N) // 9
    assert holds(mask, predicate)


def test_views_of_one_memory_are_one_table_for_as_long_as_they_are():
    ids = torch.arange(2 * N).view(2, N) // 5
    one, two = ids[0], ids[0]

    def predicate(b, h, q, kv):
        return one[q] == two[kv]

    mask = mf.mask(predicate)
    assert len(mask.traced({}).tables) == 1
    two.data = torch.arange(N) // 3
    assert holds(mask, predicate)
    two = torch.arange(N) // 7
    assert holds(mask, predicate)


def test_a_view_is_taken_of_its_own_tensor_where_several_share_memory():
    memory = torch.arange(2 * N) // 5
    held = SimpleNamespace(low=memory[:N], high=memory[N:])

    def predicate(b, h, q, kv):
        return held.low[4:][q % 20] == held.high[2:][kv % 20] - 3

    mask = mf.mask(predicate)
    assert holds(mask, predicate)
    held.high = torch.arange(N) // 9 + 3
    assert holds(mask, predicate)
    held.low, held.high = torch.arange(N) // 7, memory[N:]
    assert holds(mask, predicate)
    held.low = held.high = memory[:N]
    assert holds(mask, predicate)
    held.high = memory[N:]
    assert holds(mask, predicate)
    held.high.data = torch.arange(N) // 2
    assert holds(mask, predicate)


def test_arguments_and_captures_change_side_by_side():
    held = SimpleNamespace(n=3)
    mask = mf.mask(lambda b, h, q, kv, *, doc, factor: doc[q] == doc[kv] and (q - kv) * factor < held.n)
    for n, factor, doc in ((3, 1.5, DOC), (4, 1.5, DOC), (4, 0.25, DOC + 1), (2.5, 0.25, DOC.int()), (3, 2, DOC)):
        held.n = n
        assert holds(mask, mask.function, doc=doc, factor=factor)


def test_a_module_with_the_name_of_one_of_pythons_is_the_user_s(tmp_path, monkeypatch):
    (tmp_path / "token.py").write_text("WINDOW = 3\n\n\ndef near(q, kv):\n    return q - kv < WINDOW\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "token")
    import token as own

    mask = mf.mask(lambda b, h, q, kv: own.near(q, kv))
    assert mask.row(9, 10) == [(7, 10)]
    own.WINDOW = 5
    assert mask.row(9, 10) == [(5, 10)]


def test_a_predicate_may_change_what_it_reads():
    seen = []

    def predicate(b, h, q, kv):
        seen.append(len(seen))
        return q - kv < 3 and len(seen) > 0

    mask = mf.mask(predicate)
    for _ in range(3):
        assert mask.row(9, N) == [(7, N)]


def test_arrays_of_numpy_are_read_as_they_are():
    ends = np.array([3, 9])
    mask = mf.mask(lambda b, h, q, kv: ends[0] <= kv < ends[1])
    assert mask.row(0, N) == [(3, 9)]
    ends[1] = 12
    assert mask.row(0, N) == [(3, 12)]


def test_predicates_that_capture_nothing_have_nothing_to_look_at():
    assert mf.causal()._captures.now.reads == ()
