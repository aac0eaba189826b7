# ruff: noqa: SIM102, SIM110 (predicates as users write them)
"""Predicates without source, from random text and as the field writes them are traced as what they say."""

import functools
import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from maskflash.errors import MaskIndexError
from maskflash.expr.evaluate import evaluate
from maskflash.trace.rewrite import rewritten
from maskflash.trace.trace import trace

DOC = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])


# Without source; without end


def without_source(text):
    scope = {"torch": torch, "DOC": DOC}
    exec(text, scope)
    return scope["f"]


def test_functions_without_source_fork(agree):
    agree(without_source("f = lambda b, h, q, kv: q >= kv and q - kv < 3 or kv == 0"))
    agree(without_source("f = lambda b, h, q, kv: kv <= q < kv + 3"))
    agree(without_source("f = lambda b, h, q, kv: any(s <= q for s in (kv, 3)) and not q == 5"))
    agree(without_source("f = lambda b, h, q, kv: q in (1, 2, kv) or max(q, kv) > 6"))
    agree(
        without_source(
            "def f(b, h, q, kv):\n"
            "    x = q if q > 3 else kv + 1\n"
            "    if DOC[q] != DOC[kv]:\n        return x > 4\n"
            "    return 1 <= x <= 5"
        )
    )


def test_functions_that_call_what_their_file_imports_do_not_fork(agree):
    def calls(b, h, q, kv):
        far = [torch.abs(q - kv) > i or math.isqrt(9) > kv for i in range(20)]
        return far[3] and not all(far)

    assert (math, torch) == tuple(map(globals().get, ("math", "torch")))
    assert "else" not in str(agree(calls).expr)
    assert all(map(rewritten, (calls.__code__, functools.wraps.__code__, or_masks.__code__)))


def test_two_functions_on_one_line_are_told_apart(agree):
    one, two = lambda b, h, q, kv: q > kv and q > 2, lambda b, h, q, kv: q > kv or q > 2  # fmt: skip
    agree(one)
    agree(two)


def test_decorated_functions(agree):
    def twice(function):
        @functools.wraps(function)
        def wrapper(b, h, q, kv):
            return function(b, h, q, kv) and function(b, h, q + 1, kv)

        return wrapper

    @twice
    def decorated(b, h, q, kv):
        if q > 4:
            return kv < 3
        return q >= kv

    agree(decorated)


def test_ten_thousand_operations():
    def long(b, h, q, kv):
        x = q
        for i in range(5_000):
            x = x * 3 + kv if i % 2 else x % 1_000
        return x % 7 < 3

    traced = trace(long)
    assert len(traced.expr.nodes) > 7_000
    assert traced.expr == trace(long).expr


def test_twenty_segments_share_one_expression(agree):
    starts = [3 * i for i in range(21)]

    def segments(b, h, q, kv):
        return any(lo <= q < hi and lo <= kv < hi for lo, hi in itertools.pairwise(starts))

    def statements(b, h, q, kv):
        for lo, hi in itertools.pairwise(starts):
            if lo <= q < hi and lo <= kv < hi:
                return True
        return False

    def nested(b, h, q, kv):
        for lo, hi in itertools.pairwise(starts):
            if lo <= q < hi:
                if lo <= kv < hi:
                    return True
        return False

    for predicate in (segments, statements, nested):
        traced = agree(predicate, shape=(1, 1, 30, 25))
        assert len(traced.expr.nodes) < 500


def test_contradictory_branches_are_pruned_by_value(agree):
    starts = list(range(0, 80))

    def which(x):
        place = 0
        for number, start in enumerate(starts):
            if x >= start:
                place = number
        return place

    def monotone(b, h, q, kv):
        place = 0
        for number, start in enumerate(starts):
            if q >= start:
                place = number
            else:
                break
        return place == kv

    def downward(b, h, q, kv):
        count = 0
        for start in reversed(starts):
            if kv <= start:
                count = count + 1
        return count % 3 == q

    agree(monotone)
    agree(lambda b, h, q, kv: which(q) == which(kv))
    agree(downward)


def test_a_row_number_below_zero_is_not_pruned(brute):
    """q may be negative: its offset may be."""

    def outer(b, h, q, kv):
        count = 0
        for start in range(-40, 40):
            if q >= start:
                count = count + 1
        return count == kv

    traced = trace(outer)
    q = torch.arange(-50, 50).view(-1, 1)
    kv = torch.arange(90).view(1, -1)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    got = evaluate(traced.expr, traced.bind({}), {"b": zero, "h": zero, "q": q, "kv": kv})
    assert torch.equal(got, (q + 41).clamp(0, 80) == kv)


@given(data=st.data(), with_source=st.booleans())
@settings(max_examples=150)
def test_tracing_a_random_predicate_is_calling_it(data, with_source, texts, brute):
    """Both give the same truth at every pair, or both refuse."""
    text = data.draw(texts, label="predicate")
    predicate = brute.compile(text, with_source)
    pairs = data.draw(st.lists(st.tuples(*(st.integers(0, n) for n in (1, 1, 9, 11))), min_size=4, max_size=4))
    try:
        traced = trace(predicate)
    except (TypeError, AttributeError):  # refused; or `(not x).long()`, of a bool where nothing is lowered
        return
    for pair in pairs:
        index = [torch.tensor(i) for i in pair]
        try:
            expected = bool(predicate(*index))
        except (IndexError, ZeroDivisionError):
            expected = None
        except (RuntimeError, TypeError, AttributeError) as problem:  # `torch.where(True, ...)`, `min(q, 3).to(...)`
            if "ZeroDivision" not in str(problem):
                continue
            expected = None
        if expected is None and "torch.where" in text:  # which guards here, and not in torch
            continue
        try:
            got = bool(evaluate(traced.expr, traced.bind({}), dict(zip(("b", "h", "q", "kv"), index, strict=True))))
        except MaskIndexError:
            got = None
        assert got == expected, f"at {pair}: {traced.expr}"


# Masks of the field


def causal(b, h, q, kv):
    return q >= kv


def test_masks_written_for_flex_attention(agree):
    prefix = torch.tensor([2, 4])

    def sliding(b, h, q_idx, kv_idx):
        return q_idx - kv_idx <= 3

    def document(b, h, q_idx, kv_idx):
        return DOC[q_idx] == DOC[kv_idx]

    def prefix_mask(b, h, q_idx, kv_idx):
        return kv_idx < prefix[b]

    def offset_causal(b, h, q_idx, kv_idx):
        return q_idx + torch.tensor(2, dtype=torch.int32).to(q_idx.device) >= kv_idx

    shape = (2, 1, 9, 9)
    agree(and_masks(causal, sliding), shape=shape)
    agree(or_masks(prefix_mask, causal), shape=shape)
    agree(and_masks(or_masks(causal, prefix_mask), document, noop_mask), shape=shape)
    agree(noop_mask)
    agree(and_masks())
    agree(offset_causal)


def test_shared_prefix_and_document_offsets(agree):
    offsets = torch.tensor([0, 3, 5, 9])

    def relative(b, h, q, kv):
        same = DOC[q] == DOC[kv]
        q_local, kv_local = q - offsets[DOC[q]], kv - offsets[DOC[kv]]
        return same & (q_local >= kv_local)

    def shared_prefix(b, h, q, kv):
        if kv < 3:
            return kv <= q
        return DOC[q] == DOC[kv] and q >= kv

    agree(relative)
    agree(shared_prefix)


def test_tree_masks(agree):
    parent = [0, 0, 0, 1, 1, 2, 5, 5, 6]
    ancestors = torch.zeros(9, 9, dtype=torch.bool)
    for node in range(9):
        place = node
        while True:
            ancestors[node, place] = True
            if place == 0:
                break
            place = parent[place]
    enter = torch.tensor([0, 1, 4, 2, 3, 5, 6, 8, 7])
    leave = torch.tensor([9, 4, 9, 3, 4, 9, 8, 9, 8])
    agree(lambda b, h, q, kv: ancestors[q, kv], shape=(1, 1, 9, 9))
    agree(lambda b, h, q, kv: enter[kv] <= enter[q] < leave[kv], shape=(1, 1, 9, 9))


def test_dilated_windows(agree):
    agree(lambda b, h, q, kv: 0 <= q - kv < 6 and (q - kv) % 2 == 0)
    dilations = torch.tensor([1, 2, 3])
    agree(lambda b, h, q, kv: abs(q - kv) % dilations[h] == 0, shape=(1, 3, 9, 9))


def neighbourhood(width, height, kernel, coordinates):
    def natten(b, h, q, kv):
        q_x, q_y = coordinates(q)
        kv_x, kv_y = coordinates(kv)
        centre_x = q_x.clamp(kernel // 2, (width - 1) - kernel // 2)
        centre_y = torch.clamp(q_y, kernel // 2, (height - 1) - kernel // 2)
        near_x = (centre_x - kv_x).abs() <= kernel // 2
        near_y = (centre_y - kv_y).abs() <= kernel // 2
        return near_x & near_y

    return natten


def test_two_dimensional_neighbourhoods(agree):
    def plain(index):
        return index // 6, index % 6

    def tiled(index):
        tile, inside = index // 4, index % 4
        return tile // 3 * 2 + inside // 2, tile % 3 * 2 + inside % 2

    def spread(x):
        x = (x | (x >> 1)) & 0x33
        return (x | (x >> 2)) & 0x0F

    def morton(index):
        return spread(index & 0x55), spread((index >> 1) & 0x55)

    for coordinates in (plain, tiled):
        agree(neighbourhood(6, 6, 3, coordinates), shape=(1, 1, 36, 36))
    agree(neighbourhood(8, 8, 5, morton), shape=(1, 1, 64, 64))
