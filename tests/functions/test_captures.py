"""What a predicate captures is looked up at each call, as Python looks it up."""

import array
import functools
import sys
import types
import weakref
from collections import ChainMap, UserDict, deque, namedtuple
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash.masks import predicate as masks_mask

N = 24
WINDOW = 5
DOC = torch.arange(N) // 5
SETTINGS = SimpleNamespace(window=4, spans=[(0, 3), (9, 12)])
Pair = namedtuple("Pair", "low high")


@dataclass
class Config:
    window: int = 4
    tables: dict = field(default_factory=lambda: {"doc": torch.arange(N) // 4})
    nested: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(radius=2.5))


class Model(torch.nn.Module):
    shift = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("doc", torch.arange(N) // 6)
        self.register_buffer("place", torch.arange(N).float() * 0.75)
        self.config = Config()
        self.spans = [(2, 5), (8, 9)]
        self.limits = Pair(2, 20)
        self.layers = torch.nn.ParameterList([torch.nn.Parameter(torch.arange(N).float())])
        self.attn = mf.compile(self.visible)

    @property
    def reach(self):
        return self.config.window + self.shift

    def near(self, q, kv):
        return abs(self.place[q] - self.place[kv]) < self.config.nested.radius

    def visible(self, b, h, q, kv):
        if any(low <= kv < high for low, high in self.spans):
            return True
        inside = self.limits.low <= q < self.limits.high
        return inside and (self.doc[q] == self.doc[kv] or (q - kv < self.reach and self.near(q, kv)))


def pair_by_pair(predicate, **mask_args):
    """Python's own answer, a pair at a time."""
    return torch.tensor([[bool(predicate(0, 0, q, kv, **mask_args)) for kv in range(N)] for q in range(N)])


def holds(mask, predicate, **mask_args):
    """Whether all that is asked of a mask agrees with Python."""
    expected = pair_by_pair(predicate, **mask_args)
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, expected).nan_to_num()
    return (
        torch.equal(mask.dense(N, N, **mask_args)[0, 0], expected)
        and mask.block_map(N, N, block_size=1, **mask_args).counts["full"] == expected.sum()
        and torch.allclose(mf.attention(q, k, v, mask, **mask_args), plain, atol=1e-5)
        and torch.allclose(mf.compile(mask)(q, k, v, **mask_args), plain, atol=1e-5)
    )


CHANGES = {
    "a buffer loaded by assignment": lambda m: m.load_state_dict(
        {**m.state_dict(), "doc": torch.arange(N) // 11}, assign=True
    ),
    "a buffer set": lambda m: setattr(m, "doc", torch.arange(N) // 3),
    "a buffer written to": lambda m: m.doc.zero_(),
    "a buffer with other data": lambda m: setattr(m.doc, "data", torch.arange(N) // 2),
    "a buffer of another dtype": lambda m: (m.double(), m.place.mul_(2)),
    "an int": lambda m: setattr(m.config, "window", 9),
    "an int that becomes a float": lambda m: setattr(m.config, "window", 2.5),
    "a float": lambda m: setattr(m.config.nested, "radius", 7.25),
    "another object": lambda m: setattr(m, "config", Config(window=1, nested=SimpleNamespace(radius=0.5))),
    "an object of another class": lambda m: setattr(
        m, "config", SimpleNamespace(window=7, nested=SimpleNamespace(radius=9.0))
    ),
    "a list that grows": lambda m: m.spans.append((13, 17)),
    "an item of a list": lambda m: m.spans.__setitem__(0, (0, 1)),
    "another list": lambda m: setattr(m, "spans", [(20, 24)]),
    "a named tuple": lambda m: setattr(m, "limits", Pair(5, 9)),
    "an attribute of the class": lambda m: setattr(type(m), "shift", 6),
    "an attribute that hides the class's": lambda m: setattr(m, "shift", 8),
}


@pytest.fixture
def model():
    yield Model()
    Model.shift = 1


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


@pytest.fixture
def traces(monkeypatch):
    found = []
    real = masks_mask.trace
    monkeypatch.setattr(masks_mask, "trace", lambda *args: found.append(args) or real(*args))
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


def compiled(model):
    count = []

    def backend(graph, _):
        count.append(graph)
        return graph

    return torch.compile(lambda q, k, v: model.attn(q, k, v), backend=backend, fullgraph=True), count


@pytest.mark.parametrize("change", CHANGES)
def test_compiled_code_reads_the_module_as_it_is(model, change):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    run, graphs = compiled(model)
    assert torch.equal(run(q, k, v), model.attn(q, k, v))
    CHANGES[change](model)
    assert torch.equal(run(q, k, v), model.attn(q, k, v))
    assert len(graphs) <= 2


def test_compiled_code_refuses_arrays_whose_contents_it_can_t_guard():
    torch._dynamo.reset()
    ends = np.array([3, 9])
    attn = mf.compile(lambda b, h, q, kv: ends[0] <= kv < ends[1])
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    with pytest.raises(Exception, match="reads an array that isn't torch's"):
        torch.compile(lambda q, k, v: attn(q, k, v), backend="eager", fullgraph=True)(q, k, v)


def test_another_buffer_is_an_input_of_compiled_code(model):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    run, graphs = compiled(model)
    for n in range(1, 6):
        model.doc = torch.arange(N) // n
        assert torch.equal(run(q, k, v), model.attn(q, k, v))
    assert len(graphs) == 1


NUMBERS = {
    "of a list": (lambda: [1], lambda x: x[0], lambda x, n: x.__setitem__(0, n)),
    "of a dict": (lambda: {"n": 1}, lambda x: x["n"], lambda x, n: x.__setitem__("n", n)),
    "of a deque": (lambda: deque([1]), lambda x: x[0], lambda x, n: x.__setitem__(0, n)),
    "of a tuple": (lambda: SimpleNamespace(n=(1,)), lambda x: x.n[0], lambda x, n: setattr(x, "n", (n,))),
    "that isn't there at first": (SimpleNamespace, lambda x: getattr(x, "n", 1), lambda x, n: setattr(x, "n", n)),
}


@pytest.mark.parametrize("where", NUMBERS)
def test_compiled_code_guards_numbers(where):
    torch._dynamo.reset()
    make, read, change = NUMBERS[where]
    held = make()
    attn = mf.compile(lambda b, h, q, kv: q - kv < read(held) * 2)
    run = torch.compile(lambda q, k, v: attn(q, k, v), backend="eager", fullgraph=True)
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    for n in (1, 4, 5, 6, 7):  # from the second on dynamo takes an int for a symbol
        if n > 1:
            change(held, n)
        assert torch.equal(run(q, k, v), attn(q, k, v))


def test_compiled_code_takes_views_of_the_tensor_that_is_there():
    torch._dynamo.reset()
    held = SimpleNamespace(ids=torch.arange(2 * N).view(2, N) // 5)
    attn = mf.compile(lambda b, h, q, kv: held.ids[1][q] == held.ids[1:, 2:].T[kv % 20, 0])
    run = torch.compile(lambda q, k, v: attn(q, k, v), backend="aot_eager", fullgraph=True)
    q, k, v = torch.randn(3, 1, 1, N, 8).unbind()
    for ids in (held.ids, torch.arange(3 * N)[N:].view(2, N) // 3, torch.arange(2 * N).view(N, 2).T // 3):
        held.ids = ids
        assert torch.equal(run(q, k, v), attn(q, k, v))
