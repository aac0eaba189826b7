# ruff: noqa: SIM103, SIM110, SIM201, SIM210 (predicates as users write them)
"""Tracing a predicate is calling it: whatever plain Python does on every pair, the expression does too."""

import functools
import itertools
import threading

import numpy as np
import pytest
import torch

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.trace.trace import keyword_arguments, trace

DOC = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
DOC_INT32 = DOC.int()
FLAGS = torch.tensor([True, False, True, True, False, False, True, False, True])
BATCHED = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 2, 2, 2, 3]])
LIMIT = 4


# Short-circuit operators and branches


def test_connectives(agree):
    agree(lambda b, h, q, kv: q >= kv and q - kv < 3)
    agree(lambda b, h, q, kv: q == 0 or kv == 0 or q == kv)
    agree(lambda b, h, q, kv: not q > kv)
    agree(lambda b, h, q, kv: not (q > kv and not kv == 2) or q == 7)
    agree(lambda b, h, q, kv: (q & 1) and kv)
    agree(lambda b, h, q, kv: (q and kv) == 3)
    agree(lambda b, h, q, kv: (q - 4 or kv) == 3)
    agree(lambda b, h, q, kv: (q > 3) & (kv > 2) | ~(q == kv) ^ (kv == 1))


def test_chains(agree):
    agree(lambda b, h, q, kv: kv <= q < kv + 3)
    agree(lambda b, h, q, kv: 0 < q <= 5 != kv)
    agree(lambda b, h, q, kv: q >= 2 and 1 <= kv <= q <= 7)
    agree(lambda b, h, q, kv: 1 < 2 < q)
    agree(lambda b, h, q, kv: not 1 <= q - kv <= 3)


def test_ternaries(agree):
    agree(lambda b, h, q, kv: q >= kv if q < 5 else q == kv)
    agree(lambda b, h, q, kv: (kv if q % 2 else 2 * kv) < q)
    agree(lambda b, h, q, kv: (1 if q > 3 else 4 if kv > 2 else 6) > kv)
    agree(lambda b, h, q, kv: True if q < kv else False)


def test_branches(agree):
    def branches(b, h, q, kv):
        if q < 3:
            return kv < 3
        elif q == 4:
            return True
        if kv == 0:
            limit = 1
        else:
            limit = q - kv
            if limit > 4:
                return False
        return limit >= 0

    agree(branches)


def test_branches_that_return_constants(agree):
    def constant(b, h, q, kv):
        return True

    def either(b, h, q, kv):
        if kv > q:
            return False
        return True

    agree(constant)
    agree(either)
    agree(lambda b, h, q, kv: False)
    agree(lambda b, h, q, kv: torch.tensor(True))


def test_branches_in_loops(agree):
    bounds = [(0, 2), (2, 3), (3, 7), (7, 9)]

    def segments(b, h, q, kv):
        for lo, hi in bounds:
            if lo <= q < hi and lo <= kv < hi:
                return True
        return False

    def last_start(b, h, q, kv):
        start = 0
        for lo, _ in bounds:
            start = lo if q >= lo else start
        return start <= kv <= q

    def statements(b, h, q, kv):
        start = 0
        for lo, _ in bounds:
            if q >= lo:
                start = lo
        return start <= kv <= q

    agree(segments)
    agree(last_start)
    agree(statements)


def test_walrus_and_locals(agree):
    def walrus(b, h, q, kv):
        return (distance := q - kv) >= 0 and distance < 4

    def rebinding(b, h, q, kv):
        q += 1
        q, kv = kv, q
        return q <= kv

    agree(walrus)
    agree(rebinding)


# Helpers and captures


def window(q, kv, left=2, *, right=0):
    if q >= kv:
        return q - kv <= left
    return kv - q <= right


class Window:
    left = 2

    def __init__(self, right):
        self.right = right

    def __call__(self, b, h, q, kv):
        return self.inside(q, kv) and not self.far(q, kv)

    def inside(self, q, kv):
        return -self.right <= q - kv <= self.left

    @staticmethod
    def far(q, kv):
        return abs(q - kv) > 4

    @classmethod
    def of_two(cls, b, h, q, kv):
        return q - kv == cls.left or False

    @property
    def limit(self):
        return self.right


def test_helpers(agree):
    agree(lambda b, h, q, kv: window(q, kv))
    agree(lambda b, h, q, kv: window(q, kv, 3, right=1) or window(kv, q, left=1))
    agree(lambda b, h, q, kv: not window(*(q, kv), **{"right": 4}))

    def with_inner(b, h, q, kv):
        def inner(x):
            return 2 if x > 4 else 5

        return kv < inner(q) and q < inner(kv)

    agree(with_inner)

    def none_or_value(x):
        if x > 4:
            return x

    agree(lambda b, h, q, kv: none_or_value(q) is None or none_or_value(q) > kv)


def test_a_helper_returning_several_values(agree):
    def span(x):
        if x < 4:
            return 0, x
        return x - 2, x + 1

    def inside(b, h, q, kv):
        lo, hi = span(q)
        return lo <= kv <= hi

    agree(inside)


def test_recursion_on_a_concrete_number(agree):
    def alternate(x, depth):
        return x == 0 if depth == 0 else alternate(x // 2, depth - 1) or x % 3 == 1

    agree(lambda b, h, q, kv: alternate(q + kv, 3))


def test_methods_partials_and_callable_objects(agree):
    agree(Window(1))
    agree(Window(1).of_two)
    agree(Window.of_two)
    agree(lambda b, h, q, kv: Window(1)(b, h, q, kv) or kv == Window(7).limit)
    agree(functools.partial(lambda left, b, h, q, kv: q - kv <= left and q >= kv, 2))
    agree(lambda b, h, q, kv: functools.partial(window, left=1)(q, kv))


def test_captured_values(agree):
    lo, hi, half, zero_dim = 2, 6, 0.5, torch.tensor(3)
    agree(lambda b, h, q, kv: lo <= q <= hi and kv > LIMIT - hi)
    agree(lambda b, h, q, kv: DOC[q] == DOC[kv] and DOC_INT32[kv] != 1)
    agree(lambda b, h, q, kv: q * half >= kv)
    agree(lambda b, h, q, kv: q - zero_dim >= kv)
    agree(lambda b, h, q, kv: zero_dim.where(kv > 3, 2) == q)
    agree(lambda b, h, q, kv: zero_dim - 1 == kv or 3 / zero_dim * q > kv)
    agree(lambda b, h, q, kv: zero_dim * zero_dim - q > kv)
    agree(lambda b, h, q, kv: q >= np.int64(3) and np.float32(2.5) < kv and np.bool_(True))
    agree(lambda b, h, q, kv: q < DOC.shape[0] - LIMIT and kv < len(DOC) - 2 and DOC.size(0) > DOC.ndim)
    agree(lambda b, h, q, kv: any(d == q - kv for d in DOC[3:]))
    agree(lambda b, h, q, kv: (FLAGS[0] and q > 3) or ((kv if FLAGS[1] else q) > 2 and not DOC[0]))
    agree(lambda b, h, q, kv: q > torch.tensor(2) and kv < torch.tensor(4.5))


def test_keyword_arguments(agree):
    def packed(b, h, q, kv, *, doc, left, both):
        return doc[q] == doc[kv] and q - kv <= left and (both or q >= kv)

    for left, both in itertools.product((0, 2), (True, False)):
        traced = agree(packed, doc=DOC, left=left, both=both)
        assert traced.specialised == {"both"}
    agree(lambda b, h, q, kv, *, n: q + n > kv and n + 1 > q, n=torch.tensor(3))
    agree(lambda b, h, q, kv, *, n: q // n == kv // n and kv < 2 * n, n=3)
    agree(lambda b, h, q, kv, *, f: q * f > kv, f=0.75)
    agree(lambda b, h, q, kv, *, flag: flag and q > kv, flag=torch.tensor(True))
    agree(lambda b, h, q, kv, *, doc: q < doc.shape[0] - 3 and kv < len(doc) - 4, doc=DOC)
    agree(lambda b, h, q, kv, *, n=3: q < n)


# Structure


def test_structure_ignores_numbers_and_contents():
    def make(left, table):
        def mask(b, h, q, kv):
            near = -left <= q - kv <= left or kv < 2 * left
            return near and table[q] == left and (q + 0 if q > left else kv * 1) != left

        return mask

    tables = [DOC, DOC + 5, torch.zeros(500, dtype=torch.int64)]
    texts = {trace(make(left, table)).expr.text for left in (0, 1, 5, 128) for table in tables}
    assert len(texts) == 1

    def keywords(b, h, q, kv, *, n, doc):
        return doc[q] == doc[kv] and q - kv < n

    calls = [trace(keywords, {"n": n, "doc": doc}) for n in (0, 1, 7) for doc in tables]
    assert len({traced.expr.text for traced in calls}) == 1
    assert all(traced.specialised == frozenset() for traced in calls)


def test_structure_ignores_segment_boundaries_but_not_their_number():
    def make(starts):
        return lambda b, h, q, kv: any(lo <= q < hi for lo, hi in itertools.pairwise(starts))

    assert trace(make([0, 0, 5])).expr.text == trace(make([0, 7, 9])).expr.text
    assert trace(make([0, 5])).expr.text != trace(make([0, 7, 9])).expr.text


def test_divisors_belong_to_the_structure():
    def make(n):
        return lambda b, h, q, kv: q // n == kv // n

    def dividend(n):
        return lambda b, h, q, kv: n // (q + 1) == n % (kv + 1) and n << q > n >> kv

    assert trace(make(4)).expr.text != trace(make(8)).expr.text
    assert trace(dividend(4)).expr.text == trace(dividend(8)).expr.text

    def argument(b, h, q, kv, *, n):
        return q // n == kv // n

    assert trace(argument, {"n": 4}).specialised == {"n"}


def test_reads_and_slots():
    traced = trace(lambda b, h, q, kv: DOC[q] == DOC[kv] and BATCHED[b, q] < LIMIT)
    assert traced.expr.reads == {"b", "q", "kv"}
    assert traced.names == ("DOC", "BATCHED")
    assert traced.params == (LIMIT,)
    assert traced.tables[0] is DOC


def test_tables_are_read_by_reference(agree):
    table = torch.zeros(9, dtype=torch.int64)

    def mask(b, h, q, kv):
        return table[q] == kv

    traced = trace(mask)
    table += 3
    assert traced.bind({}).tables[0] is table
    agree(mask)


def test_traces_in_threads_do_not_meet():
    failures = []

    def work(n):
        for _ in range(20):
            traced = trace(lambda b, h, q, kv: q >= kv and q - kv < n if q > 3 else kv > n)
            if set(traced.params) != {n, 3}:
                failures.append(traced.params)

    threads = [threading.Thread(target=work, args=(n,)) for n in (11, 12, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_trace_may_start_inside_another():
    def outer(b, h, q, kv):
        inner = trace(lambda b, h, q, kv: q > 5 and kv > 6)
        return q > inner.params[0] or kv == 2

    assert trace(outer).params == (5, 2)


# Signatures


def test_keyword_arguments_are_named():
    assert keyword_arguments(lambda b, h, q, kv: True) == ()
    assert keyword_arguments(lambda b, h, q_idx, kv_idx, extra=3, *, doc, n=4: True) == ("doc", "n")
    assert keyword_arguments(lambda *index: True) == ()
    assert keyword_arguments(Window(1)) == ()


@pytest.mark.parametrize("wrong", [lambda q, kv: q >= kv, lambda b, h, q, kv, doc: True, lambda: True])
def test_wrong_arity(wrong):
    with pytest.raises(ArgumentError, match=r"takes \(b, h, q, kv\), got \(.*put run-time tensors after a `\*`"):
        keyword_arguments(wrong)


def test_not_a_function():
    with pytest.raises(ArgumentTypeError, match="predicate is a Tensor; pass a function"):
        keyword_arguments(DOC)
