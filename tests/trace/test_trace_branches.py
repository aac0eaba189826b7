"""What branches of a predicate do to values and to one another is what they do where each pair takes its own."""

import collections
import copy
import heapq
import itertools
import linecache
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.errors import MaskIndexError
from maskflash.expr.evaluate import evaluate
from maskflash.trace.trace import trace

DOC = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
GRID = torch.arange(36).view(2, 2, 9)
TABLES = {
    "I64": torch.tensor([3, -2, 0, 7, 7, 11, -9, 2**40, 1]),
    "I32": torch.tensor([2**31 - 1, -(2**31), 4, 9, -6, 0, 1, 2, 3], dtype=torch.int32),
    "I16": torch.tensor([2**15 - 1, -(2**15), 4, 9, -6, 0, 1, 2, 3], dtype=torch.int16),
    "I8": torch.tensor([127, -128, 5, 0, -3, 1, 2, 3, 4], dtype=torch.int8),
    "U8": torch.tensor([0, 255, 128, 3, 200, 1, 2, 4, 5], dtype=torch.uint8),
    "FLAG": torch.tensor([True, False, False, True, True, False, True, True, False]),
    "F16": torch.tensor([0.5, -1.5, 2.25, 0.1, 7.0, 3.0, 1.0, 0.0, 9.0], dtype=torch.float16),
    "F32": torch.tensor([0.5, -1.5, 2.25, 1e30, 0.1, 7.0, 3.0, 1.0, 0.0]),
    "F64": torch.tensor([0.5, -1.5, 2.25, 1e30, 0.1, 7.0, 3.0, 1.0, 0.0], dtype=torch.float64),
}
_count = itertools.count()


def compile_function(source, **names):
    """The function `f` of a source text, whose lines can be found."""
    file = f"<branches {next(_count)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"torch": torch, "heapq": heapq, "collections": collections, "itertools": itertools, **TABLES, **names}
    exec(compile(source, file, "exec"), scope)
    return scope["f"]


# Values of several kinds


@st.composite
def choices(draw):
    """A value that is of one kind for some pairs and of another for others, written in the ways that merge."""
    index = st.sampled_from(["q", "kv", "(q + kv) % 9"])
    table = st.builds("{}[{}]".format, st.sampled_from(sorted(TABLES)), index)
    number = st.sampled_from(["0", "1", "5", "-3", "300", "0.1", "-2.5", "True", "False"])
    value = st.one_of(table, number, index)
    condition = draw(st.sampled_from(["q < 4", "kv >= 3", "q == kv", "FLAG[q]", "q > 2 and kv > 2"]))
    x, y = draw(value), draw(value)
    forms = ["({x} if {c} else {y})", "pick({c}, {x}, {y})", "({x} and {y})", "(({c}) and {x})", "(({c}) or {y})"]
    return draw(st.sampled_from([*forms, "min({x}, {y})", "max({x}, {y})"])).format(x=x, y=y, c=condition)


@st.composite
def uses(draw):
    """A truth that tells kinds apart: by wrapping, by precision, by what torch says of bools."""
    x = draw(choices())
    other = draw(st.one_of(choices(), st.sampled_from(["1", "7", "0.1", "I32[kv]", "F32[kv]", "I8[q]", "U8[q]", "kv"])))
    binary = ["{x} + {y}", "{x} * {y}", "{x} - {y}", "{x} << 40", "{x} << 6", "{x} / 3", "{x} // 2", "{x} % 7"]
    unary = ["-{x}", "abs({x})", "~{x}", "{x} * {x} + {y}", "min({x}, {y}) * 2**20", "({x} & 255) * 77"]
    number = draw(st.sampled_from(["0", "5", "100", "0.1", "2**31"]))
    form = draw(st.sampled_from([*binary, *unary, "{x}"])).format(x=x, y=other)
    return f"({form}) {draw(st.sampled_from(['<', '>=', '==', '!=']))} {number}"


@given(text=uses())
@settings(max_examples=250)
def test_a_value_of_several_kinds_is_of_its_own_kind_for_each_pair(text):
    predicate = compile_function(
        f"def pick(c, x, y):\n    if c:\n        return x\n    return y\n\nf = lambda b, h, q, kv: {text}\n"
    )
    try:
        traced = trace(predicate)
    except (TypeError, AttributeError):  # refused, or `(0.1 if ... else 2) & 255`
        return
    for pair in itertools.product([0], [0], [0, 1, 3, 4, 8], [0, 2, 3, 7]):
        index = [torch.tensor(i) for i in pair]
        try:
            expected = bool(predicate(*index))
        except (RuntimeError, TypeError, OverflowError, ZeroDivisionError):  # torch refuses `-flag`, numbers too large
            continue
        got = bool(evaluate(traced.expr, traced.bind({}), dict(zip(("b", "h", "q", "kv"), index, strict=True))))
        assert got == expected, f"{text} at {pair}: {traced.expr}"


@pytest.mark.filterwarnings("ignore:Bitwise inversion:DeprecationWarning")  # of Python 3.12 and later
def test_narrow_integers_stay_narrow_beside_numbers(agree):
    i32, i8 = TABLES["I32"], TABLES["I8"]
    agree(lambda b, h, q, kv: ((i32[q] if q < 4 else 0) << 40) > 0)
    agree(lambda b, h, q, kv: ((i8[q] if q < 4 else 1) << 6) > 0)
    agree(lambda b, h, q, kv: ((q if q < 4 else 5) * i32[kv]) > 0)
    agree(lambda b, h, q, kv: (q if q < 4 else 5) / 3 == 5 / 3)
    agree(lambda b, h, q, kv: min(i32[q], 5) * 2**30 > 0)
    agree(lambda b, h, q, kv: (True if q > 3 else False) + (True if kv > 3 else False) == 2)  # noqa: SIM210
    agree(lambda b, h, q, kv: ~(True if q > 3 else False) == -2)  # noqa: SIM210


def test_kinds_that_nothing_tells_apart_stay_one_expression():
    """Both sides of each comparison are one select: no path is taken twice."""
    i32 = TABLES["I32"]
    traced = trace(lambda b, h, q, kv: (i32[q] if q < 4 else -1) == (i32[kv] if kv < 4 else -2))
    assert [node.op for node in traced.expr.nodes].count("select") == 2


# What branches change

HELPERS = """
def note(hits, x):
    if x:
        hits.append(1)
    return x

def extend(hits, x):
    if x:
        hits += [2, 3]

def bump(box, x):
    if x:
        box["n"] = box.get("n", 0) + 1

def step(counter, x):
    return next(counter) if x else 0

def skip(counter, x):
    if x:
        for _ in counter:
            break

class Box:
    def __init__(self):
        self.n = 0

    def hit(self, x):
        if x:
            self.n += 1
        return self

def push(heap, x):
    if x:
        heapq.heappush(heap, 7)

def tally(counts, x):
    if x:
        counts.update("ab")

def assign(owner, x):
    if x:
        setattr(owner, "n", owner.n + 2)
"""
STATEMENTS = [
    *(
        "note(hits, {c})",
        "{c} and hits.append(4)",
        "{c} or hits.append(5)",
        "hits.append(6) if {c} else hits.append(7)",
    ),
    *("extend(hits, {c})", "bump(box, {c})", "step(counter, {c})", "skip(counter, {c})", "thing.hit({c}).hit({c})"),
    *(
        "push(hits, {c})",
        "tally(counts, {c})",
        "assign(thing, {c})",
        "count({c})",
        "any(note(hits, x) for x in ({c}, {c}))",
    ),
    *(
        "all(hits.append(i) or {c} for i in range(2))",
        "any(map(adding, ({c}, {c})))",
        "note(hits, {c}) and note(hits, {c})",
    ),
    *("hits.pop() if hits and {c} else None", "0 < kv < 5 < (hits.append(1) or 6)", "local({c})"),
    "if {c}:\n        hits.append(8)",
]
PROGRAM = """
def f(b, h, q, kv):
    hits, box, counter, thing, counts, n = [], {{}}, itertools.count(), Box(), collections.Counter(), 0

    def count(x):
        nonlocal n
        if x:
            n += 1

    def adding(x):
        if x:
            hits.append(9)
        return x

    def local(x):
        found = []
        if x:
            found.append(1)
        return len(found)

    {body}
    state = sum(hits) + 3 * box.get("n", 0) + 5 * thing.n + 7 * sum(counts.values()) + 11 * n + next(counter)
    return (state + q) % 3 == kv % 3
"""


@given(
    body=st.lists(
        st.builds(
            lambda form, c: form.format(c=c),
            st.sampled_from(STATEMENTS),
            st.sampled_from(["q > 3", "kv > 2", "q == kv", "q >= kv", "DOC[q] == 1"]),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=60)
def test_what_a_branch_changes_is_changed_for_its_pairs_only(body, agree):
    source = HELPERS + PROGRAM.format(body="\n    ".join(body))
    agree(compile_function(source, DOC=DOC), shape=(1, 1, 6, 5))


def test_what_a_helper_makes_for_itself_does_not_split_what_comes_after():
    """Its branches are merged where it returns, though it fills a list."""

    def bits(x):
        found = []
        for i in range(5):
            found.append(x > i)
        if x > 7:
            found.append(x)
        return sum(1 if bit else 0 for bit in found)

    traced = trace(lambda b, h, q, kv: bits(q) == bits(kv) and bits(q + 1) > 2 and bits(kv + 2) > 3)
    assert len(traced.expr.nodes) < 200


def test_what_changes_for_all_pairs_alike_may_outlive_the_predicate(agree):
    seen = []

    def notes(b, h, q, kv):
        seen.append(1)
        return q >= kv and kv != 3

    agree(notes)
    assert seen


# Errors on paths that no pair takes


def test_errors_that_no_pair_meets_change_nothing(agree):
    checks = compile_function(
        "def f(b, h, q, kv):\n"
        "    assert q >= 0 and kv >= 0, f'{q} and {kv}'\n"
        "    if q < 0 or not kv >= 0:\n        raise ValueError('%s' % q)\n"
        "    return checked(q) >= checked(kv)\n"
        "def checked(x):\n"
        "    if x < 0:\n        raise IndexError\n"
        "    return x + 1 if x > 3 else x\n"
    )
    assert str(agree(checks).expr) == str(
        trace(lambda b, h, q, kv: (q + 1 if q > 3 else q) >= (kv + 1 if kv > 3 else kv)).expr
    )


def test_errors_that_the_predicate_catches_itself(agree):
    def small(x):
        if x < 3:
            raise ValueError
        return x

    def catches(b, h, q, kv):
        try:
            width = small(q)
        except ValueError:
            width = 7
        return kv < width and q > 1

    agree(catches)
    agree(lambda b, h, q, kv: q >= kv if q < 7 else catches(b, h, kv, q))


@pytest.mark.parametrize(
    "read",
    [
        *(lambda q: GRID[9][0][q], lambda q: GRID[9, 0][q], lambda q: GRID[9, 0, q], lambda q: GRID[-9][1, q]),
        *(lambda q: GRID[:, 9][0][q], lambda q: GRID[..., 9][0, 1] + q, lambda q: GRID[:, :, 9][q, 0]),
        *(lambda q: GRID[9, ...][0][q], lambda q: GRID[0, :, -10][q], lambda q: GRID.transpose(0, 2)[99, q % 2, 0]),
        *(lambda q: GRID[0][9][q], lambda q: GRID[np.int64(9)][0][q]),
    ],
)
def test_a_view_out_of_range_is_an_error_only_where_a_pair_reaches_it(read, agree, brute):
    agree(lambda b, h, q, kv: q < 20 or read(q) == kv)
    agree(lambda b, h, q, kv: read(q) == kv if q > 20 else q >= kv)
    with pytest.raises(MaskIndexError, match="of a table of shape"):
        brute.traced_values(lambda b, h, q, kv: q < 5 or read(q) == kv, (1, 1, 9, 8), {})


# What stands for a number


def test_types_that_are_known(agree):
    def kinds(b, h, q, kv, *, n, doc):
        if isinstance(doc, torch.Tensor) and isinstance(n, int) and type(n) is int and not isinstance(n, bool):
            return doc[q] == doc[kv] and q - kv < n
        return q == kv

    agree(kinds, n=3, doc=DOC)
    agree(
        lambda b, h, q, kv: q > kv if isinstance(q, (int, torch.Tensor)) and not isinstance(kv, (str, list)) else False
    )
    agree(lambda b, h, q, kv: isinstance(1 if q > kv else 2, int) and kv > 3)
    agree(lambda b, h, q, kv: q is not None and kv is not Ellipsis and q > kv)
    agree(lambda b, h, q, kv: copy.copy(q) > copy.deepcopy([kv])[0])
    agree(lambda b, h, q, kv: not callable(q) and sorted([q, kv])[0] > 2)


def test_print_shows_the_expression(capsys):
    def prints(b, h, q, kv):
        print("distance", q - kv)
        return q >= kv

    trace(prints)
    assert "distance Symbol(q - kv)" in capsys.readouterr().out


def test_not_a_number_without_source(agree):
    scope = {"DOC": DOC, "nan": float("nan")}
    for text in ("q / 2 != float('nan') and q >= kv", "q > kv or q > float('nan')", "q < nan or kv == 1"):
        exec(f"f = lambda b, h, q, kv: {text}", scope)
        agree(scope["f"])


@pytest.mark.parametrize("depth", [50, 150, 300])
@pytest.mark.parametrize("last", [True, False])
def test_deeply_nested_closures(depth, last):
    def join(inner, i):
        if last:
            return lambda b, h, q, kv: q - kv != i and inner(b, h, q, kv)
        return lambda b, h, q, kv: inner(b, h, q, kv) and q - kv != i

    predicate = operator.ge
    nested = lambda b, h, q, kv: predicate(q, kv)  # noqa: E731
    for i in range(0, 2 * depth, 2):
        nested = join(nested, i)
    traced = trace(nested)
    q, kv, zero = torch.arange(80).view(-1, 1), torch.arange(70).view(1, -1), torch.zeros(1, 1, dtype=torch.int64)
    got = evaluate(traced.expr, traced.bind({}), {"b": zero, "h": zero, "q": q, "kv": kv})
    distance = q - kv
    assert torch.equal(got, (distance >= 0) & ((distance % 2 == 1) | (distance >= 2 * depth)))
