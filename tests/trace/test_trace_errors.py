# ruff: noqa: SIM110 (predicates as users write them, one to a line)
"""What can't become an expression is refused with file and line, the offending code and what to do instead."""

import ast
import functools
import inspect
import math
import numbers
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maskflash.errors import MaskTraceError
from maskflash.expr.ops import OPERATIONS
from maskflash.trace.trace import trace
from tests.trace.refusals import refuse

DOC = torch.tensor([0, 0, 1, 1, 2])
TABLE = torch.arange(20).view(4, 5)
SCALAR = torch.tensor(3)
FLAGS = torch.tensor([True, False, True])
LIST = [0, 0, 1, 1, 2]
DICT = {0: 1, 1: 2}
ARRAY = np.arange(5)
REALS = torch.tensor([0.5, 1.5])
HERE = __file__


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
        (lambda b, h, q, kv: torch.sinh(q) > kv, "`sinh`"),
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


@pytest.mark.parametrize("name", sorted({name for row in OPERATIONS.values() if row.inexact for name in row.called}))
def test_what_is_another_number_on_each_machine(name):
    compute = getattr(torch, name)
    words = (f"uses `{name}`, whose last bit is another on each machine", "Compute it beforehand, into a table")
    refuse(lambda b, h, q, kv: compute(q / 3) > kv, *words, code="compute(q / 3)")


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
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    assert sum(isinstance(node, ast.Lambda) for node in ast.walk(tree)) > 60
