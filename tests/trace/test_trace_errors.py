# ruff: noqa: SIM110 (predicates as users write them, one to a line)
"""What can't become an expression is refused with file and line, the offending code and what to do instead."""

import ast
import contextlib
import functools
import inspect
import itertools
import math
import numbers
import pickle
import random
import secrets
import sys
from fractions import Fraction
from random import choice

import numpy as np
import pytest
import torch

from maskflash.errors import MaskflashError, MaskTraceError
from maskflash.trace import torch_calls
from maskflash.trace.trace import trace

DOC = torch.tensor([0, 0, 1, 1, 2])
TABLE = torch.arange(20).view(4, 5)
SCALAR = torch.tensor(3)
FLAGS = torch.tensor([True, False, True])
LIST = [0, 0, 1, 1, 2]
DICT = {0: 1, 1: 2}
ARRAY = np.arange(5)
REALS = torch.tensor([0.5, 1.5])
HERE = __file__


def refuse(predicate, *words, code=None, **mask_args):
    """Check the message of tracing a predicate: this file, its line, the code and key words of the problem and fix."""
    with pytest.raises(MaskTraceError) as caught:
        trace(predicate, mask_args)
    message = str(caught.value)
    lines, first = inspect.getsourcelines(predicate)
    span = range(first, first + len(lines))
    assert any(f"{predicate.__name__} ({HERE}:{line}): " in message for line in span), message
    for word in words:
        assert word in message, message
    if code is not None:
        assert f': "{code}" ' in message, message
        (line,) = [line for line in span if f"({HERE}:{line})" in message]
        assert code in lines[line - first], message
    assert message.endswith((".", "?")), message
    assert isinstance(caught.value, (MaskflashError, TypeError))
    return message


CONCRETE = ("needs a concrete value", "Index tensors with q or kv, not lists")


@pytest.mark.parametrize(
    ("predicate", "code"),
    [
        (lambda b, h, q, kv: int(q) > 3, "int(q)"),
        (lambda b, h, q, kv: float(q) > kv, "float(q)"),
        (lambda b, h, q, kv: kv in range(q), "range(q)"),
        (lambda b, h, q, kv: LIST[q] == LIST[kv], "LIST[q]"),
        (lambda b, h, q, kv: ARRAY[q] == ARRAY[kv], "ARRAY[q]"),
        (lambda b, h, q, kv: any(x > 3 for x in q), None),
        (lambda b, h, q, kv: len(q) > 3, "len(q)"),
        (lambda b, h, q, kv: math.floor(q / 2) > kv, "math.floor(q / 2)"),
        (lambda b, h, q, kv: math.sqrt(q) > kv, "math.sqrt(q)"),
        (lambda b, h, q, kv: round(q / 2, 1) > kv, "round(q / 2, 1)"),
        (lambda b, h, q, kv: 2**q > kv, "2**q"),
        (lambda b, h, q, kv: f"{q}" == "3", None),
        (lambda b, h, q, kv: f"{q!r}" == "3", None),
        (lambda b, h, q, kv: str(q) == "3", "str(q)"),
        (lambda b, h, q, kv: repr(q - kv) == "3", "repr(q - kv)"),
        (lambda b, h, q, kv: "%s" % q == "3", None),  # noqa: UP031
        (lambda b, h, q, kv: "{}".format(q) == "3", None),  # noqa: UP032
        (lambda b, h, q, kv: ascii([q]) == "[3]", "ascii([q])"),
        (lambda b, h, q, kv: bytes(q) == b"", "bytes(q)"),
        (lambda b, h, q, kv: pickle.loads(pickle.dumps(q)) > kv, "pickle.dumps(q)"),
        (lambda b, h, q, kv: bin(q).count("1") > 2, "bin(q)"),
    ],
)
def test_what_needs_a_number_now(predicate, code):
    refuse(predicate, *CONCRETE, code=code)


@pytest.mark.parametrize(
    ("predicate", "code"),
    [
        (lambda b, h, q, kv: q.item() > 3, "q.item()"),
        (lambda b, h, q, kv: DOC[q].tolist() > 3, "DOC[q].tolist()"),
        (lambda b, h, q, kv: DOC[0].item() > kv, "DOC[0].item()"),
        (lambda b, h, q, kv: DOC.tolist()[2] > kv, "DOC.tolist()"),
        (lambda b, h, q, kv: int(DOC[1]) > kv, "int(DOC[1])"),
        (lambda b, h, q, kv: kv > 3 if DOC[1] > 2 and bool(DOC[0]) else DOC[0].item(), "DOC[0].item()"),
        (lambda b, h, q, kv: SCALAR.item() > kv, "SCALAR.item()"),
        (lambda b, h, q, kv: any(q == d for d in DOC.numpy()), "DOC.numpy()"),
    ],
)
def test_what_reads_a_tensor_now(predicate, code):
    message = refuse(predicate, "needs a concrete value", code=code)
    assert "Index the tensor with q or kv" in message or "Index tensors with q or kv" in message


NOWHERE = {"torch": torch, "DOC": DOC, "ARRAY": ARRAY}


def without_source(text):
    exec(text, NOWHERE)
    return NOWHERE["f"]


@pytest.mark.parametrize(
    ("predicate", "code"),
    [
        (lambda b, h, q, kv: q > kv if isinstance(q, int) else q < kv, "isinstance(q, int)"),
        (lambda b, h, q, kv: q > kv if isinstance(q, torch.Tensor) else q < kv, "isinstance(q, torch.Tensor)"),
        (lambda b, h, q, kv: q > kv if isinstance(q / 2, float) else q < kv, "isinstance(q / 2, float)"),
        (lambda b, h, q, kv: q > kv if isinstance(DOC[q], numbers.Number) else q < kv, None),
        (lambda b, h, q, kv: type(q) is int and q > kv, "type(q)"),
        (lambda b, h, q, kv: q > kv or type(q).__name__ == "Tensor", "type(q)"),
        (lambda b, h, q, kv: q.__class__ is int or q > kv, "q.__class__"),
    ],
)
def test_the_type_of_an_index_is_no_answer(predicate, code):
    refuse(predicate, "asks for the type of an index", "Write what serves both", code=code)


def test_class_patterns_ask_for_the_type():
    def matches(b, h, q, kv):
        match q:
            case int():
                return q > kv
        return q < kv

    refuse(matches, "asks for the type of an index", code="int()")


def test_without_source_types_are_refused_too():
    with pytest.raises(MaskTraceError, match="asks for the type of an index"):
        trace(without_source("f = lambda b, h, q, kv: q > kv if isinstance(q, int) else q < kv"))
    with pytest.raises(MaskTraceError, match="needs a concrete value"):
        trace(without_source("f = lambda b, h, q, kv: q > kv or str(q) == '3'"))


def test_identity():
    fix = ("compares numbers by identity", "use `==`")
    refuse(lambda b, h, q, kv: q is kv, *fix, code="q is kv")
    refuse(lambda b, h, q, kv: (q > kv) is not True, *fix, code="(q > kv) is not True")
    refuse(lambda b, h, q, kv: 0 <= q is kv, *fix)
    refuse(lambda b, h, q, kv: id(q) == id(kv), *fix, code="id(q)")


@pytest.mark.parametrize(
    ("predicate", "code"),
    [
        (lambda b, h, q, kv: kv in DOC, "kv in DOC"),
        (lambda b, h, q, kv: q > kv and kv not in DOC, "kv not in DOC"),
        (lambda b, h, q, kv, *, doc: kv in doc, "kv in doc"),
        (lambda b, h, q, kv: torch.isin(q, DOC), "torch.isin(q, DOC)"),
        (lambda b, h, q, kv: torch.isin(DOC, q)[0], "torch.isin(DOC, q)"),
        (lambda b, h, q, kv: q in ARRAY, "q in ARRAY"),
    ],
)
def test_membership_in_a_tensor_names_the_table_of_bools(predicate, code):
    words = ("looks for a value in the contents of a tensor or array", "`seen[ids] = True`", "`seen[kv]`")
    refuse(predicate, *words, code=code, **({"doc": DOC} if "doc" in predicate.__code__.co_varnames else {}))
    with pytest.raises(MaskTraceError, match="in the contents of a tensor"):
        trace(without_source("f = lambda b, h, q, kv: kv in DOC"))


# What the user's code catches


def catching(b, h, q, kv):
    try:
        w = math.isqrt(q)
    except Exception:
        w = 0
    return q - kv <= w


def catching_all(b, h, q, kv):
    try:
        w = int(q)
    except:  # noqa: E722
        w = 0
    return q - kv <= w


def suppressing(b, h, q, kv):
    w = 0
    with contextlib.suppress(TypeError):
        w = LIST[q]
    return q - kv <= w


def returning_at_last(b, h, q, kv):
    try:
        return DOC[q].item() > kv
    finally:
        return q > kv  # noqa: B012, SIM107


def raising_its_own(b, h, q, kv):
    try:
        return kv in range(q)
    except TypeError:
        raise ValueError("mine") from None


@pytest.mark.parametrize("predicate", [catching, catching_all, suppressing, returning_at_last, raising_its_own])
def test_a_refusal_is_raised_whoever_catches_it(predicate):
    refuse(predicate, "needs a concrete value")


def test_a_refusal_caught_in_a_helper_is_raised_too():
    def root(x):
        try:
            return math.isqrt(x)
        except TypeError:
            return 0

    with pytest.raises(MaskTraceError, match=r'"math.isqrt\(x\)" needs a concrete value'):
        trace(lambda b, h, q, kv: q >= kv and q - kv <= root(q))


def test_a_limit_is_raised_whoever_catches_it():
    def counts(b, h, q, kv):
        n = 0
        try:
            while n < q:
                n += 1
        except BaseException:
            n = 3
        return n == kv

    refuse(counts, "branches in more than 4096 ways")


# What the user's code raises


def test_an_error_in_a_branch_is_named():
    def small(b, h, q, kv):
        if q < 3:
            raise ValueError(f"no {3}")
        return q >= kv

    code = 'raise ValueError(f"no {3}")'
    message = refuse(small, "raises in a branch that some pairs may take (ValueError: no 3)", "return False", code=code)
    assert "check tensors and arguments before" in message
    refuse(lambda b, h, q, kv: q > 3 or [][0], "(IndexError: list index out of range)", code="[][0]")
    refuse(lambda b, h, q, kv: q > 3 or TABLE.select(0, 9)[q] == 1, "(IndexError: select(): index 9 out of range")


def test_an_error_that_an_argument_causes_is_the_user_s():
    def checked(b, h, q, kv, *, n):
        if n < 1:
            raise ValueError("n is small")
        return q - kv < n

    assert trace(checked, {"n": 4}).specialised == {"n"}
    with pytest.raises(ValueError, match="n is small"):
        trace(checked, {"n": 0})


# What outlives the predicate

HITS: list[int] = []
CACHE: dict[str, int] = {}
COUNT = 0
COUNTER = itertools.count()


class Box:
    hits = 0


def noted(x):
    if x:
        HITS.append(1)


def counted(x):
    global COUNT
    if x:
        COUNT += 1


@pytest.mark.parametrize(
    ("predicate", "kind"),
    [
        (lambda b, h, q, kv: noted(q > 3) or len(HITS) > 3, "a list"),
        (lambda b, h, q, kv: counted(q > 3) or COUNT > 3, "a dict or a global variable"),
        (lambda b, h, q, kv: (q > 3 and HITS.append(1)) or len(HITS) > 3, "a list"),
        (lambda b, h, q, kv: (CACHE.setdefault("q", 1) if q > 3 else 0) > kv, "a dict"),
        (lambda b, h, q, kv: (setattr(Box, "hits", 1) if q > 3 else None) or kv > 2, "a type"),
        (lambda b, h, q, kv: q > 3 and next(COUNTER) > 2, "a count"),
        (lambda b, h, q, kv: any(x > 3 and not HITS.append(1) for x in (q, kv)), "a list"),
    ],
)
def test_changes_of_what_outlives_the_predicate_are_refused_in_branches(predicate, kind):
    with pytest.raises(MaskTraceError) as caught:
        trace(predicate)
    assert f"changes {kind}" in str(caught.value)
    assert "that outlives the predicate, for some pairs only. A predicate is run once" in str(caught.value)
    assert HERE in str(caught.value)


def test_a_changed_variable_of_an_enclosing_function_is_refused():
    calls = 0

    def counts(b, h, q, kv):
        nonlocal calls
        if q > 3:
            calls += 1
            return True
        return kv > calls

    with pytest.raises(MaskTraceError, match="changes a nonlocal variable that outlives the predicate"):
        trace(counts)


def test_loops_over_data():
    def loop(b, h, q, kv, *, doc):
        for d in doc:
            if d == q:
                return True
        return False

    def counting(b, h, q, kv):
        n = 0
        while n < q:
            n += 1
        return n == kv

    def halving(b, h, q, kv):
        while q > 0:
            q = q >> 1
        return q == kv

    refuse(loop, "loops over the contents of a tensor", "Index it with q or kv", doc=DOC)
    refuse(counting, "branches in more than 4096 ways", "`while` on q or kv")
    refuse(halving, "branches in more than 4096 ways", "look the outcome up in a tensor")


def test_too_many_paths(monkeypatch):
    monkeypatch.setattr("maskflash.trace.trace.MAX_PATHS", 300)

    def exponential(b, h, q, kv):
        total = 0
        for i in range(9):
            if (q * i + kv) % 17 > 5:
                total = total + i
        return total > 9

    refuse(exponential, "branches in more than 300 ways", "Return one expression", "... if ... else ...")


def test_keys():
    cached = functools.lru_cache(lambda x: x > 3)
    refuse(lambda b, h, q, kv: DICT[q] == kv, "uses an index as a key", "tensor instead of a dict", code="DICT[q]")
    refuse(lambda b, h, q, kv: 3 in {q, kv}, "uses an index as a key", code="{q, kv}")
    refuse(lambda b, h, q, kv: cached(q), "uses an index as a key", "cache")


@pytest.mark.parametrize(
    ("predicate", "code"),
    [
        (lambda b, h, q, kv, *, doc: doc[:3][q] == 1, "doc[:3]"),
        (lambda b, h, q, kv, *, doc: doc[None, q] == 1, "doc[None, q]"),
        (lambda b, h, q, kv, *, doc: doc[..., q] == 1, "doc[..., q]"),
        (lambda b, h, q, kv, *, doc: doc[[0, 1]] == q, "doc[[0, 1]]"),
        (lambda b, h, q, kv, *, doc: doc[True] == q, "doc[True]"),
        (lambda b, h, q, kv, *, doc: doc[DOC] == q, "doc[DOC]"),
        (lambda b, h, q, kv, *, doc: doc[doc] == q, "doc[doc]"),
        (lambda b, h, q, kv, *, doc: DOC[doc] == q, "DOC[doc]"),
        (lambda b, h, q, kv, *, doc: TABLE[q, 1:] == q, "TABLE[q, 1:]"),
    ],
)
def test_several_elements_at_once(predicate, code):
    fix = ("slices a tensor or takes several elements", "one integer index per dimension")
    refuse(predicate, *fix, code=code, doc=DOC)


@pytest.mark.parametrize(
    ("predicate", "code"),
    [
        (lambda b, h, q, kv, *, doc: doc == q, "doc == q"),
        (lambda b, h, q, kv, *, doc: q + doc > 3, "q + doc"),
        (lambda b, h, q, kv, *, doc: abs(doc) > 3, "abs(doc)"),
        (lambda b, h, q, kv, *, doc: doc and q > kv, None),
        (lambda b, h, q, kv, *, doc: torch.where(q > kv, doc, q) > 3, "torch.where(q > kv, doc, q)"),
        (lambda b, h, q, kv, *, doc: DOC + q > 3, "DOC + q"),
        (lambda b, h, q, kv, *, doc: TABLE[q] == 3, "TABLE[q] == 3"),
        (lambda b, h, q, kv, *, doc: q == TABLE[kv], "q == TABLE[kv]"),
    ],
)
def test_whole_tensors(predicate, code):
    fix = "one index per dimension"
    message = refuse(predicate, fix, code=code, doc=DOC)
    assert "computes with a whole tensor of shape" in message or "of its dimensions not indexed" in message


def test_new_tensors():
    new = ("computes a new value", "would be frozen", "Compute it outside the predicate")
    refuse(lambda b, h, q, kv: (DOC + 1)[q] == kv, *new, code="DOC + 1")
    refuse(lambda b, h, q, kv: DOC.max() > kv, *new, code="DOC.max()")
    refuse(lambda b, h, q, kv: DOC.max(0).values > kv, *new, code="DOC.max(0)")
    refuse(lambda b, h, q, kv: DOC.cumsum(0)[q] > kv, *new, code="DOC.cumsum(0)")
    refuse(lambda b, h, q, kv: torch.arange(5)[q] > kv, *new, code="torch.arange(5)")
    refuse(lambda b, h, q, kv: torch.equal(DOC, DOC) and q > kv, *new, code="torch.equal(DOC, DOC)")
    refuse(lambda b, h, q, kv: 2 in DOC and q > kv, *new)
    refuse(lambda b, h, q, kv: q.new_ones((3,)) > kv, "makes a tensor inside the predicate", code="q.new_ones((3,))")
    refuse(lambda b, h, q, kv, *, doc: doc.max() > kv, "asks a whole tensor for `.max`", code="doc.max", doc=DOC)


def test_writes():
    counter = torch.tensor(3)

    def assigns(b, h, q, kv):
        DOC[0] = 7
        return q > kv

    def assigns_argument(b, h, q, kv, *, doc):
        doc[q] = 3
        return q > kv

    def out(b, h, q, kv):
        torch.add(q, kv, out=counter)
        return q > kv

    writes = "writes to a tensor"
    refuse(assigns, writes, "may only read", code="DOC[0]")
    refuse(assigns_argument, writes, code="doc[q]", doc=DOC)
    refuse(lambda b, h, q, kv: counter.add_(1) > q, writes, code="counter.add_(1)")
    refuse(lambda b, h, q, kv: DOC.zero_()[q] > q, writes)
    refuse(out, writes, "instead of `out=`", code="torch.add(q, kv, out=counter)")
    assert DOC.tolist() == LIST
    assert counter == 3


@pytest.mark.parametrize(
    ("predicate", "name"),
    [
        (lambda b, h, q, kv: torch.sin(q) > kv, "`sin`"),
        (lambda b, h, q, kv: q.cumsum(0) > kv, "`.cumsum`"),
        (lambda b, h, q, kv: torch.stack([q, kv]).max() > 3, "`stack`"),
        (lambda b, h, q, kv: q.unsqueeze(0) > kv, "`.unsqueeze`"),
        (lambda b, h, q, kv: torch.add(q, kv, alpha=2) > 3, "`add` with these arguments"),
        (lambda b, h, q, kv: torch.round(q / 3, decimals=1) > kv, "`round` with these arguments"),
        (lambda b, h, q, kv: q.view(torch.int32) > kv, "`view` with these arguments"),
        (lambda b, h, q, kv: q.type("torch.IntTensor") > kv, "`type` with these arguments"),
        (lambda b, h, q, kv: torch.div(q, kv, rounding_mode="up") > kv, "`div` with these arguments"),
        (lambda b, h, q, kv: torch.where(q > kv), "`where` with these arguments"),
        (lambda b, h, q, kv: q.requires_grad, "`.requires_grad`"),
    ],
)
def test_unsupported_functions(predicate, name):
    refuse(predicate, f"uses {name}, which has no meaning in a mask expression", "Masks may use arithmetic")


def test_kinds_of_numbers():
    refuse(lambda b, h, q, kv: DOC[q / 2] > kv, "indexes with torch.float32", "`x // y`", code="DOC[q / 2]")
    refuse(lambda b, h, q, kv: DOC[q > kv] > kv, "indexes with torch.bool", "`x.long()`", code="DOC[q > kv]")
    refuse(lambda b, h, q, kv: DOC[q.byte()] > kv, "indexes with torch.uint8", code="DOC[q.byte()]")
    refuse(lambda b, h, q, kv: (q / 2) & 1, "bit operations on floating-point", "`.long()`", code="(q / 2) & 1")
    refuse(lambda b, h, q, kv: ~(q / 2) > 1, "bit operations on floating-point", code="~(q / 2)")
    refuse(lambda b, h, q, kv: (q > 1) - (kv > 1) > 0, "applies `sub` to truth values", "Use `&`, `|`, `^` or `not`")
    refuse(lambda b, h, q, kv: -FLAGS[q] > 0, "applies `neg` to truth values", code="-FLAGS[q]")
    refuse(lambda b, h, q, kv: FLAGS[q] // FLAGS[kv], "applies `floordiv` to truth values")
    refuse(lambda b, h, q, kv: torch.floor(FLAGS[q]) > 0, "applies `floor` to truth values")
    refuse(lambda b, h, q, kv: q // 0 > kv, "divides by the constant zero", "Check the divisor", code="q // 0")
    refuse(lambda b, h, q, kv, *, n: q % n > kv, "divides by the constant zero", code="q % n", n=0)
    refuse(lambda b, h, q, kv: q > 2**70, "does not fit 64 bits", "at most 64-bit", code="q > 2**70")
    refuse(lambda b, h, q, kv: q**0.5 > kv, "raises to a power", "else multiply", code="q**0.5")
    refuse(lambda b, h, q, kv: q**kv > 3, "raises to a power", code="q**kv")
    refuse(lambda b, h, q, kv: q == "3", "computes with a str", "Use numbers, tensors", code='q == "3"')
    refuse(lambda b, h, q, kv: q * ARRAY > 3, "computes with a ndarray", code="q * ARRAY")
    refuse(lambda b, h, q, kv: q == None, "computes with None", "`return` missing", code="q == None")  # noqa: E711
    refuse(
        lambda b, h, q, kv, *, z: z[q] > 1, "looks up a tensor of torch.complex64", "Convert", z=DOC.to(torch.cfloat)
    )
    refuse(lambda b, h, q, kv, *, z: z[q] > 1, "looks up a tensor of torch.sparse_coo", z=DOC.to_sparse())


def test_numbers_beyond_64_bits():
    fix = ("which does not fit 64 bits", "at most 64-bit")
    refuse(lambda b, h, q, kv: q in range(2**70), *fix, code="q in range(2**70)")
    refuse(lambda b, h, q, kv: q in (1, 2**70), *fix)
    refuse(lambda b, h, q, kv: max(q, -(2**64)) > kv, *fix)
    refuse(lambda b, h, q, kv: q > 10**5000, "an integer of 16,610 bits", *fix, code="q > 10**5000")
    refuse(lambda b, h, q, kv: q > Fraction(10**400, 3), *fix)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e5m2])
def test_tables_of_other_dtypes_are_named(dtype):
    z = DOC.to(dtype)
    words = (
        f"looks up a tensor of {dtype}",
        "Convert it beforehand, to a dense tensor of int32, int64, bool or float32",
    )
    refuse(lambda b, h, q, kv: z[q] == z[kv], *words, code="z[q]")
    refuse(lambda b, h, q, kv, *, ids: ids[q] == ids[kv], f"{words[0]} (`ids`)", words[1], ids=z)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR tensor")
def test_tables_of_other_layouts_are_named():
    rows = torch.nested.nested_tensor([torch.arange(3), torch.arange(2)])
    square = torch.eye(5).to_sparse_csr()
    refuse(lambda b, h, q, kv: rows[b, q] == 1, "looks up a tensor of nested rows", "dense")
    refuse(lambda b, h, q, kv: square[q, kv] == 1, "looks up a tensor of torch.sparse_csr", code="square[q, kv]")


def test_recursion_without_end():
    def endless(x):
        return endless(x) or x > 3

    def mask(b, h, q, kv):
        return endless(q)

    limit = sys.getrecursionlimit()
    words = (f"calls functions within functions beyond Python's limit of {limit:,}", "join masks by `&` and `|`")
    refuse(mask, *words)
    assert sys.getrecursionlimit() == limit


def test_indices():
    refuse(lambda b, h, q, kv, *, doc: doc[b, q] > 1, "has 2 indices for 1 dimensions", code="doc[b, q]", doc=DOC)
    refuse(lambda b, h, q, kv: DOC[q][kv] > 1, "indexes a single element", "fewer dimensions", code="DOC[q][kv]")


@pytest.mark.parametrize(
    ("predicate", "words"),
    [
        (lambda b, h, q, kv: None, ("got NoneType", "Is a `return` missing?")),
        (lambda b, h, q, kv: q * 0.5, ("got torch.float32", "Compare, and return the truth: `return x > 0`")),
        (lambda b, h, q, kv: 0.5, ("got float",)),
        (lambda b, h, q, kv: 1, ("got int",)),
        (lambda b, h, q, kv: DOC, ("got Tensor",)),
        (lambda b, h, q, kv: REALS[0], ("got torch.float32",)),
        (lambda b, h, q, kv: (q > kv, kv > 3), ("got tuple",)),
        (lambda b, h, q, kv: "yes", ("got str",)),
    ],
)
def test_results_that_are_no_truth(predicate, words):
    refuse(predicate, "a mask predicate returns True or False", *words)


def test_a_return_missing_on_one_branch():
    def forgets(b, h, q, kv):
        if q > kv:
            return True

    def helper_forgets(b, h, q, kv):
        def helper(x):
            if x > 3:
                return x

        return helper(q) > kv

    refuse(forgets, "got NoneType", "Is a `return` missing?")
    refuse(helper_forgets, "computes with None", "`return` missing in a helper", code="helper(q) > kv")


def test_predicates_that_change():
    calls = itertools.count()

    def counts(b, h, q, kv):
        if next(calls) % 2:
            return q > kv
        if q == 3 and kv > 2 and DOC[q] > 1:
            return True
        return kv > 3

    refuse(counts, "takes other branches when it is run again", "no random numbers, counters")


class Coin:
    def __init__(self):
        self.generator = random.Random(0)

    def __call__(self):
        return self.generator.random() < 0.5


COIN = Coin()
UNIFORM = functools.partial(random.uniform, 0, 1)
LEGACY = np.random.RandomState(0)
GENERATOR = np.random.default_rng(0)
DICE = torch.Generator()
CHANCE = torch.tensor(0.5)


def states():
    generators = (COIN.generator.getstate(), LEGACY.get_state(), GENERATOR.bit_generator.state)
    own = (*generators, DICE.get_state().tolist())
    return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist(), own))


@pytest.mark.parametrize(
    ("predicate", "function", "code"),
    [
        (lambda b, h, q, kv: q >= kv and random.random() < 0.5, "Random.random", "random.random()"),
        (lambda b, h, q, kv: choice([q, kv]) > 3, "Random.choice", "choice([q, kv])"),
        (lambda b, h, q, kv: UNIFORM() * kv > q, "Random.uniform", "UNIFORM()"),
        (lambda b, h, q, kv: any(COIN.generator.randint(0, 1) for _ in (1, 2)) and q > kv, "Random.randint", None),
        (lambda b, h, q, kv: q > kv and secrets.SystemRandom().random() < 0.5, "SystemRandom.random", None),
        (lambda b, h, q, kv: np.random.rand() < 0.5 if q > kv else True, "RandomState.rand", "np.random.rand()"),
        (lambda b, h, q, kv: q > LEGACY.randint(9), "RandomState.randint", "LEGACY.randint(9)"),
        (lambda b, h, q, kv: GENERATOR.random() < 0.5 or q > kv, "Generator.random", "GENERATOR.random()"),
        (lambda b, h, q, kv: q > kv and torch.rand(()) < 0.5, "torch.rand", "torch.rand(())"),
        (lambda b, h, q, kv: torch.rand(9)[kv] < 0.5, "torch.rand", "torch.rand(9)"),
        (lambda b, h, q, kv: torch.rand((), generator=DICE) > kv, "torch.rand", "torch.rand((), generator=DICE)"),
        (lambda b, h, q, kv: torch.randint(0, 9, ()) > kv, "torch.randint", "torch.randint(0, 9, ())"),
        (lambda b, h, q, kv: torch.rand_like(q / 2) > 0.5, "torch.rand_like", "torch.rand_like(q / 2)"),
        (lambda b, h, q, kv: CHANCE.bernoulli() > 0 and q > kv, "torch.bernoulli", "CHANCE.bernoulli()"),
    ],
)
def test_random_numbers_are_refused_before_they_are_drawn(predicate, function, code):
    before = states()
    fix = ("would be frozen", "Draw a tensor once, outside the predicate", "then `keep[kv]`")
    refuse(predicate, f"draws random numbers (`{function}`)", *fix, code=code)
    assert states() == before


def test_helpers_that_draw_are_named_where_they_do():
    with pytest.raises(MaskTraceError) as caught:
        trace(lambda b, h, q, kv: q > kv and COIN())
    line = inspect.getsourcelines(Coin.__call__)[1] + 1
    assert f'({HERE}:{line}): "self.generator.random()" draws random numbers' in str(caught.value)


def test_torch_functions_that_draw_without_a_tensor_are_known():
    """Others compute with tensors, and so are refused at any rate."""
    for name, _, overload in (it.removeprefix("aten::").partition(".") for it in torch._C._dispatch_get_all_op_names()):
        if hasattr(torch, name) and not name.startswith("_"):
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
            takes = any("Tensor" in str(argument.type) for argument in op._schema.arguments if not argument.kwarg_only)
            if torch.Tag.nondeterministic_seeded in op.tags and not takes:
                assert name in torch_calls._RANDOM


def test_what_was_drawn_outside_is_a_table():
    keep, bound = torch.rand(9) < 0.5, random.random()
    before = states()
    with torch.inference_mode(), torch.random.fork_rng():
        assert trace(lambda b, h, q, kv: q >= kv and keep[kv] and q * bound < 9).tables == (keep,)
    trace(lambda b, h, q, kv: q >= kv if bound < 2 else random.random() < kv)
    assert states() == before


def test_an_index_kept_from_another_trace():
    kept = []
    trace(lambda b, h, q, kv: kept.append(q) is None)
    refuse(lambda b, h, q, kv: q > kept[0], "uses an index of another trace", code="q > kept[0]")


def test_errors_in_helpers_point_into_the_helper():
    def helper(x):
        return x.item() > 3

    def calls(b, h, q, kv):
        return q > kv and helper(q)

    with pytest.raises(MaskTraceError) as caught:
        trace(calls)
    line = inspect.getsourcelines(helper)[1] + 1
    assert f'calls ({HERE}:{line}): "x.item()" needs a concrete value' in str(caught.value)


def test_several_lines_show_the_first():
    def several(b, h, q, kv):
        return (
            q > kv
            and DOC[q].item(
            ) > 3
        )  # fmt: skip

    message = refuse(several, "needs a concrete value")
    assert '"and DOC[q].item("' in message


def test_functions_without_source_still_name_their_line():
    scope = {"torch": torch}
    exec(compile("\n\ndef f(b, h, q, kv):\n    x = q + 1\n    return x.item() > 3\n", "<made>", "exec"), scope)
    with pytest.raises(MaskTraceError, match=r"f \(<made>:5\): needs a concrete value|f \(<made>:5\): .*concrete"):
        trace(scope["f"])


def test_the_user_s_own_errors_stay_theirs():
    def broken(b, h, q, kv):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace(broken)


def test_this_file_has_a_line_for_every_refusal():
    """`refuse` compares lines by source: it needs every predicate's source to be found."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(refuse) or refuse))
    assert sum(isinstance(node, ast.Lambda) for node in ast.walk(tree)) > 60
