# ruff: noqa: SIM223 (predicates as users write them, one to a line)
"""Look-ups out of range and divisions by zero are errors exactly where no guard keeps them from being reached."""

import inspect

import pytest
import torch

from maskflash.errors import MaskflashError, MaskIndexError
from maskflash.expr.evaluate import Inputs, evaluate
from maskflash.expr.nodes import parse
from maskflash.trace.trace import trace

SHORT = torch.tensor([1, 0, 1])
WIDE = torch.arange(12).view(3, 4)
EMPTY = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda b, h, q, kv: q < 3 and SHORT[q] == kv,
        lambda b, h, q, kv: q >= 3 or SHORT[q] == kv,
        lambda b, h, q, kv: SHORT[q] == kv if q < 3 else kv == 0,
        lambda b, h, q, kv: kv == 0 if q >= 3 else SHORT[q] == kv,
        lambda b, h, q, kv: torch.where(q < 3, SHORT[q], 0) == kv if q < 3 else False,
        lambda b, h, q, kv: not (q >= 3 or SHORT[q] == kv),
        lambda b, h, q, kv: 0 <= q < 3 and 0 <= kv <= 2 and WIDE[q, kv] > 4,
        lambda b, h, q, kv: (q < 3 and SHORT[q] == 1) or (kv < 3 and SHORT[kv] == 1),
        lambda b, h, q, kv: any(i < 3 and SHORT[i] == 1 for i in (q, kv)),
        lambda b, h, q, kv: SHORT[min(q, 2)] == SHORT[max(-3, -kv) if kv else 0],
        lambda b, h, q, kv: SHORT[q - 3] == 1 if q < 6 else False,
        lambda b, h, q, kv: q != 0 and 7 // q > kv,
        lambda b, h, q, kv: 7 % q > kv if q else True,
        lambda b, h, q, kv: False and EMPTY[q] == 1,
        lambda b, h, q, kv: q > 99 and EMPTY[q] == 1,
    ],
)
def test_guarded(agree, predicate):
    agree(predicate)


def test_a_path_never_taken_may_read_out_of_range(agree):
    def clamped(b, h, q, kv):
        place = 2
        if q < 2:
            place = 0
        elif kv > 99:
            place = 99
        return SHORT[place] == 1

    agree(clamped)


def test_guards_of_statements(agree):
    def early(b, h, q, kv):
        if q >= 3:
            return False
        if SHORT[q] == 0:
            return True
        return kv < 3 and SHORT[kv] == SHORT[q]

    def helper(b, h, q, kv):
        def at(i):
            if i >= 3:
                return 5
            return SHORT[i]

        return at(q) == at(kv)

    agree(early)
    agree(helper)


@pytest.mark.parametrize(
    ("predicate", "code", "what"),
    [
        (
            lambda b, h, q, kv: SHORT[q] == kv,
            "SHORT[q]",
            "reads index 3 of a table of shape (3,) at b=0, h=0, q=3, kv=0",
        ),
        (lambda b, h, q, kv: SHORT[-kv - 1] == q, "SHORT[-kv - 1]", "reads index -4 of a table of shape (3,)"),
        (lambda b, h, q, kv: (q < 3) & (SHORT[q] == kv), "SHORT[q]", "at b=0, h=0, q=3, kv=0"),
        (lambda b, h, q, kv: (q >= 3) | (SHORT[q] == kv), "SHORT[q]", "q=3"),
        (lambda b, h, q, kv: q < 3 and SHORT[kv] == 0, "SHORT[kv]", "at b=0, h=0, q=0, kv=3"),
        (lambda b, h, q, kv: SHORT[q] == 1 and q < 3, "SHORT[q]", "q=3"),
        (lambda b, h, q, kv: SHORT[q] == 1 if q < 4 else True, "SHORT[q]", "q=3"),
        (lambda b, h, q, kv: WIDE[kv, q] == 1, "WIDE[kv, q]", "reads index (3, 0) of a table of shape (3, 4)"),
        (lambda b, h, q, kv: EMPTY[q] == 1, "EMPTY[q]", "reads index 0 of a table of shape (0,)"),
        (lambda b, h, q, kv: torch.where(q < 3, SHORT[q - 1], 0) == SHORT[q], "SHORT[q]", "q=3"),
    ],
)
def test_reads_out_of_range(brute, predicate, code, what):
    with pytest.raises(MaskIndexError) as caught:
        brute.traced_values(predicate, (1, 1, 9, 8), {})
    message = str(caught.value)
    line = inspect.getsourcelines(predicate)[1]
    assert f"<lambda> ({__file__}:{line}): " in message
    assert f'"{code}" ' in message
    assert what in message
    assert "guard the look-up: `q < n and table[q] == ...`" in message
    assert "`&` does not guard" in message
    assert isinstance(caught.value, (MaskflashError, IndexError))


@pytest.mark.parametrize(
    ("predicate", "code", "at"),
    [
        (lambda b, h, q, kv: 7 // q > kv, "7 // q", "q=0, kv=0"),
        (lambda b, h, q, kv: q % (kv - 2) == 0, "q % (kv - 2)", "q=0, kv=2"),
        (lambda b, h, q, kv: (q != 0) & (7 % q > kv), "7 % q", "q=0"),
        (lambda b, h, q, kv: torch.fmod(q, kv) == 1, "torch.fmod(q, kv)", "kv=0"),
        (lambda b, h, q, kv: torch.div(q, kv, rounding_mode="trunc") == 1, None, "kv=0"),
        (lambda b, h, q, kv: kv > 3 or q // (q - 1) == 1, "q // (q - 1)", "q=1, kv=0"),
    ],
)
def test_divisions_by_zero(brute, predicate, code, at):
    with pytest.raises(MaskIndexError, match="divides by zero at b=0, h=0") as caught:
        brute.traced_values(predicate, (1, 1, 9, 8), {})
    message = str(caught.value)
    assert f"{__file__}:{inspect.getsourcelines(predicate)[1]}" in message
    assert at in message
    assert "Guard it: `divisor != 0 and ...`" in message
    assert code is None or f'"{code}"' in message


def test_division_of_floats_by_zero_is_no_fault(agree):
    agree(lambda b, h, q, kv: q / kv > 2)
    agree(lambda b, h, q, kv: (q * 1.0) // kv > 2 or (q * 0.5) % kv > 0)


def test_a_look_up_shared_by_a_guarded_and_a_free_use_is_reached(brute):
    with pytest.raises(MaskIndexError):
        brute.traced_values(lambda b, h, q, kv: (q < 3 and SHORT[q] == 1) or SHORT[q] == 0, (1, 1, 9, 8), {})


def test_only_the_pairs_asked_for_are_reached(brute):
    predicate = lambda b, h, q, kv: SHORT[q] == kv  # noqa: E731
    assert brute.traced_values(predicate, (1, 1, 3, 8), {}).any()
    assert brute.traced_values(predicate, (1, 1, 9, 0), {}).shape == (1, 1, 9, 0)
    assert brute.traced_values(predicate, (1, 0, 9, 8), {}).numel() == 0


def test_the_result_has_the_pairs_shape_whatever_the_mask_reads(brute):
    for predicate in (lambda b, h, q, kv: True, lambda b, h, q, kv: kv > 2, lambda b, h, q, kv: WIDE[b, h] == 0):
        seen = brute.traced_values(predicate, (3, 2, 5, 4), {})
        assert seen.shape == (3, 2, 5, 4)
        assert seen.dtype == torch.bool


def test_without_sources_the_message_still_says_where():
    text = trace(lambda b, h, q, kv: SHORT[q] == 1).expr.text
    index = {name: torch.tensor([9]) for name in ("b", "h", "q", "kv")}
    with pytest.raises(MaskIndexError, match=r"^reads index 9 of a table of shape \(3,\) at b=9"):
        evaluate(parse(text), Inputs((1,), (SHORT,)), index)


def test_inputs_are_not_written(brute):
    table = torch.arange(9)
    before = table.clone()
    brute.traced_values(lambda b, h, q, kv: table[q] - 3 > -table[kv] and table[q - 4] != 2, (1, 1, 9, 9), {})
    assert torch.equal(table, before)
