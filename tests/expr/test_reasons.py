"""Reasons: each is true of its pair as the text says, and together they decide the mask."""

import itertools

import pytest
import torch
from hypothesis import given, settings

import maskflash as mf
from maskflash.expr.evaluate import evaluate
from maskflash.expr.reasons import find_reasons
from maskflash.trace.trace import trace

NAMES = {name: getattr(torch, name) for name in ("floor", "ceil", "trunc", "round", "sqrt", "fmod")}


def as_python(text, pair, tables):
    """The truth of a reason's text, called as a predicate would be."""
    scope = dict(zip(("b", "h", "q", "kv"), map(torch.tensor, pair), strict=True))
    casts = {
        str(dtype).removeprefix("torch."): lambda x, dtype=dtype: torch.as_tensor(x).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float64)
    }
    others = {"bitnot": lambda x: ~torch.as_tensor(x), "truncdiv": lambda x, y: torch.div(x, y, rounding_mode="trunc")}
    pairwise = {"min": torch.minimum, "max": torch.maximum}
    wrapped = {name: lambda x, y, op=op: op(torch.as_tensor(x), torch.as_tensor(y)) for name, op in pairwise.items()}
    return bool(eval(text, {**NAMES, **casts, **others, **wrapped, **tables, **scope}))


def test_reasons_are_true_as_they_are_written_and_decide(texts, brute):
    decided = []

    @settings(max_examples=80)
    @given(texts)
    def check(text):
        try:
            traced = trace(brute.compile(text))
        except mf.MaskTraceError:  # such as an index of uint8
            return
        inputs = traced.bind({})
        tables = dict(zip(traced.names, inputs.tables, strict=True))
        pairs = list(itertools.product(range(1), range(2), range(3), range(4)))
        try:
            dense = evaluate(traced.expr, inputs, brute.grid((1, 2, 3, 4)))
        except mf.MaskIndexError:
            return
        for pair in pairs[::5]:
            found = find_reasons(traced.expr, inputs, traced.names, pair)
            assert found.truth == dense[pair]
            if any("..." in reason.text for reason in found.reasons):
                continue
            for reason in found.reasons:
                assert as_python(reason.text, pair, tables) == reason.holds, reason
            for other in pairs:
                same = True
                for reason in found.reasons:
                    try:
                        same &= as_python(reason.text, other, tables) == reason.holds
                    except (IndexError, RuntimeError, ZeroDivisionError):
                        same = False
                if same:
                    assert dense[other] == found.truth, (found.reasons, other)
                    decided.append(other)

    check()
    assert len(decided) > 500


def reasons(predicate, q, kv, **mask_args):
    traced = trace(predicate, mask_args)
    found = find_reasons(traced.expr, traced.bind(mask_args), traced.names, (0, 0, q, kv))
    return [reason.text for reason in found.reasons], list(found.unread)


CASES = [
    (lambda b, h, q, kv: q > 3 and kv > 3, (1, 1), ["q > 3"], ["kv > 3"]),
    (lambda b, h, q, kv: q > 3 and kv > 3, (9, 1), ["kv > 3"], []),
    (lambda b, h, q, kv: q > 3 and kv > 3, (9, 9), ["q > 3", "kv > 3"], []),
    (lambda b, h, q, kv: (q > 3) & (kv > 3), (1, 1), ["q > 3", "kv > 3"], []),
    (lambda b, h, q, kv: (q > 3) & (kv > 3), (1, 9), ["q > 3"], []),
    (lambda b, h, q, kv: q > 3 or kv > 3, (9, 9), ["q > 3"], ["kv > 3"]),
    (lambda b, h, q, kv: q > 3 or kv > 3, (1, 9), ["kv > 3"], []),
    (lambda b, h, q, kv: q > 3 or kv > 3, (1, 1), ["q > 3", "kv > 3"], []),
    (lambda b, h, q, kv: (q > 3) | (kv > 3), (9, 9), ["q > 3", "kv > 3"], []),
    (lambda b, h, q, kv: (q > 3) ^ (kv > 3), (9, 1), ["q > 3", "kv > 3"], []),
    (lambda b, h, q, kv: not (q > 3 and kv > 3), (1, 9), ["q > 3"], ["kv > 3"]),
    (lambda b, h, q, kv: kv > 1 if q > 3 else kv > 2, (9, 9), ["q > 3", "kv > 1"], ["kv > 2"]),
    (lambda b, h, q, kv: kv > 1 if q > 3 else kv > 2, (1, 9), ["q > 3", "kv > 2"], ["kv > 1"]),
    (lambda b, h, q, kv: True, (0, 0), ["True"], []),
]


@pytest.mark.parametrize(("predicate", "pair", "decisive", "unread"), CASES)
def test_what_decides_and_what_is_passed_over(predicate, pair, decisive, unread):
    assert reasons(predicate, *pair) == (decisive, unread)


def test_values_stand_in_the_relation_that_holds():
    table = torch.tensor([0.5, float("nan")])
    traced = trace(lambda b, h, q, kv: table[q] < table[kv] and kv == 3)

    def only(q, kv):
        return str(find_reasons(traced.expr, traced.bind({}), ("table",), (0, 0, q, kv)).reasons[0])

    assert only(0, 0) == "table[q] < table[kv]: 0.5 >= 0.5"
    assert only(0, 1) == "table[q] < table[kv]: not 0.5 < nan"


def test_look_ups_inside_what_is_compared_are_told():
    doc, start = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2])
    traced = trace(lambda b, h, q, kv: kv - start[doc[q]] >= doc[kv])
    (reason,) = find_reasons(traced.expr, traced.bind({}), traced.names, (0, 0, 3, 1)).reasons
    assert str(reason) == "(kv - start[doc[q]]) >= doc[kv]: -1 < 0, start[doc[q]] is 2, doc[q] is 1"
    assert reason.reads == (("start[doc[q]]", 2), ("doc[q]", 1))


def test_a_negated_comparison_keeps_the_line_it_was_written_on():
    def predicate(b, h, q, kv):
        if q < kv:
            return False
        return kv >= 0

    traced = trace(predicate)
    (reason,) = find_reasons(traced.expr, traced.bind({}), (), (0, 0, 1, 2)).reasons
    assert (reason.text, reason.source.text) == ("q >= kv", "q < kv")
    assert reason.source.line == predicate.__code__.co_firstlineno + 1


def test_a_look_up_out_of_range_is_an_error():
    table = torch.tensor([1, 2])
    traced = trace(lambda b, h, q, kv: q > 5 and table[kv] == 1)
    assert find_reasons(traced.expr, traced.bind({}), ("table",), (0, 0, 1, 7)).unread == ("table[kv] == 1",)
    with pytest.raises(mf.MaskIndexError, match="reads index 7"):
        find_reasons(traced.expr, traced.bind({}), ("table",), (0, 0, 6, 7))
