"""What a predicate catches, raises or changes: refusals are raised whoever catches them, and so are its own errors."""

import contextlib
import itertools
import math

import pytest
import torch

from maskflash.errors import MaskTraceError
from maskflash.trace.trace import trace
from tests.trace.refusals import refuse

DOC = torch.tensor([0, 0, 1, 1, 2])
TABLE = torch.arange(20).view(4, 5)
LIST = [0, 0, 1, 1, 2]
HERE = __file__


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
