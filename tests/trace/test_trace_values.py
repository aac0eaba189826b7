"""Look-ups and arithmetic in a predicate have the values that torch and Python give them, pair by pair."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.trace.refusals import refuse

DOC = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
DOC_INT32 = DOC.int()
SMALL = torch.tensor([250, 3, 100, 200, 7, 0, 128, 255, 64], dtype=torch.uint8)
SIGNED = torch.tensor([-7, -3, -1, 0, 1, 2, 5, 6, 9])
FLOATS = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.1, 2.5, 3.5, -0.5, -1.5])
FLAGS = torch.tensor([True, False, True, True, False, False, True, False, True])
BATCHED = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 2, 2, 2, 3]])
ARRAY = np.arange(5)


# Look-ups


def test_lookups(agree):
    offset = torch.tensor([0, 3, 5])
    square = torch.arange(81).view(9, 9)
    heads = torch.tensor([1, 3])
    agree(lambda b, h, q, kv: offset[DOC[q]] <= kv <= q)
    agree(lambda b, h, q, kv: BATCHED[b, q] == BATCHED[b, kv], shape=(2, 1, 9, 9))
    agree(lambda b, h, q, kv: BATCHED[b][q] == BATCHED[b][kv], shape=(2, 1, 9, 9))
    agree(lambda b, h, q, kv, *, t: t[b][q] == t[b, kv], shape=(2, 2, 9, 9), t=BATCHED)
    agree(lambda b, h, q, kv: q - kv <= heads[h], shape=(1, 2, 9, 9))
    agree(lambda b, h, q, kv: square[q, kv] % 3 == 0 or square[kv][q] == 4)
    agree(lambda b, h, q, kv: square.T[q, kv] == square[kv, q] - q)
    agree(lambda b, h, q, kv: BATCHED[1][q] == kv or BATCHED[0, 2] == kv)
    agree(lambda b, h, q, kv: FLAGS[q] and not FLAGS[kv])
    agree(lambda b, h, q, kv: FLAGS[q] & FLAGS[kv] | (FLAGS[q] ^ True))
    agree(lambda b, h, q, kv: BATCHED[b, ...][q] == BATCHED[b, :][kv], shape=(2, 1, 9, 9))
    agree(lambda b, h, q, kv: DOC[2:][q - 2] == kv if q >= 2 else False)


def test_negative_lookups_wrap(agree):
    agree(lambda b, h, q, kv: DOC[-1] == kv)
    agree(lambda b, h, q, kv: DOC[q - 4] == DOC[kv])
    agree(lambda b, h, q, kv: DOC[~q] == DOC[-kv])


def test_guarded_lookups(agree):
    short = torch.tensor([1, 0, 1])

    def guarded(b, h, q, kv):
        if q < 3:
            return short[q] == kv
        return kv < 3 and short[kv] == 1

    agree(guarded)
    agree(lambda b, h, q, kv: short[q] == kv if q < 3 else False)
    agree(lambda b, h, q, kv: q >= 3 or short[q] == kv)
    agree(lambda b, h, q, kv: 0 <= q < 3 and short[q] == 1)
    agree(lambda b, h, q, kv: any(i < 3 and short[i] == 1 for i in (q, kv)))


# Arithmetic


def test_division_of_negative_numbers(agree):
    agree(lambda b, h, q, kv: (q - 5) // 3 == (kv - 4) // 2)
    agree(lambda b, h, q, kv: (q - 5) % 3 == (kv - 4) % -3 + 2)
    agree(lambda b, h, q, kv: divmod(q - 5, 3) == divmod(kv - 4, 3), index=int)
    agree(lambda b, h, q, kv: divmod(7, q + 1)[1] == kv, index=int)
    agree(lambda b, h, q, kv: (q - 5) // -3 == (kv - 4) % -3, index=int)
    agree(lambda b, h, q, kv: -7 // 2 + q == kv and -7 % 3 == 2)
    agree(lambda b, h, q, kv: SIGNED[q] // (kv + 1) == 1 or SIGNED[q] % (kv + 1) == 2)
    agree(lambda b, h, q, kv: 20 // (q + 1) > kv or -20 % (q + 1) == kv)
    agree(lambda b, h, q, kv: torch.div(q - 5, 3, rounding_mode="trunc") == kv - 2)
    agree(lambda b, h, q, kv: torch.div(q - 5, 3, rounding_mode="floor") == kv - 2)
    agree(lambda b, h, q, kv: torch.fmod(q - 5, 3) == kv - 2 or torch.remainder(q - 5, 3) == kv)


def test_true_division_and_floats(agree):
    agree(lambda b, h, q, kv: q / 3 > kv / 2)
    agree(lambda b, h, q, kv: 7 / (q + 1) >= 7 / (kv + 1) * 1.0)
    agree(lambda b, h, q, kv: (q + 1) * (49 / (q + 1)) == 49)
    agree(lambda b, h, q, kv: q * 0.1 + 0.2 == kv * 0.3)
    agree(lambda b, h, q, kv: FLOATS[q] * kv > 1.5)
    agree(lambda b, h, q, kv: FLOATS.double()[q] > 0.9 if False else FLOATS[q] > 0.9)
    agree(lambda b, h, q, kv: torch.floor(q / 2) == kv and torch.round(FLOATS[q]) > 0)
    agree(lambda b, h, q, kv: torch.ceil(FLOATS[q]) == kv or torch.trunc(FLOATS[q]) == -kv)
    agree(lambda b, h, q, kv: torch.sqrt(q * 1.0) > kv or (q * q + kv * kv).sqrt() < 5)
    agree(lambda b, h, q, kv: (q / 2).long() == kv and (q * 1.5).int() % 2 == 0)
    agree(lambda b, h, q, kv: FLOATS[q] // 0.5 == kv or FLOATS[q] % 0.4 > 0.2)


def test_promotion(agree):
    big = torch.tensor([2**30, 2**31 - 1, 5, 7, 0, 1, 2, 3, 4], dtype=torch.int32)
    agree(lambda b, h, q, kv: big[q] * q > 2**31)
    agree(lambda b, h, q, kv: big[q] * 4 < kv)  # wraps in 32 bits
    agree(lambda b, h, q, kv: big[q] + big[q] < 0)
    agree(lambda b, h, q, kv: SMALL[q] + 100 < SMALL[kv])  # wraps in 8 bits
    agree(lambda b, h, q, kv: SMALL[q] - SMALL[kv] > 100)
    agree(lambda b, h, q, kv: SMALL[q] + kv * 100 > 300)
    agree(lambda b, h, q, kv: SMALL[q] * 2 // 3 == SMALL[kv] >> 1)
    agree(lambda b, h, q, kv: -SMALL[q] == 6 or ~SMALL[q] == 5)
    agree(lambda b, h, q, kv: FLAGS[q] + FLAGS[kv] == 1)
    agree(lambda b, h, q, kv: FLAGS[q] + 1 == 2 and FLAGS[q] * kv == kv)
    agree(lambda b, h, q, kv: sum(x > 3 for x in (q, kv)) == 1)
    agree(lambda b, h, q, kv: (q > 2) * 3 + (kv > 3) > 2)
    agree(lambda b, h, q, kv: FLOATS[q].half() * 3 > FLOATS[kv].double())
    agree(lambda b, h, q, kv: q.to(torch.int32) * 2**30 > kv.short())
    agree(lambda b, h, q, kv: q.float() == kv.double() or q.bool() ^ kv.to(torch.bool))


def test_values_of_different_kinds_stay_what_they_are(agree):
    agree(lambda b, h, q, kv: (SMALL[q] if kv > 3 else -1) < 0)
    agree(lambda b, h, q, kv: (SMALL[q] if kv > 3 else 0) - 1 < 0)
    agree(lambda b, h, q, kv: (SMALL[q] if kv > 3 else 300) == 300)
    agree(lambda b, h, q, kv: (DOC_INT32[q] if kv > 3 else 2**40) > 1000)
    agree(lambda b, h, q, kv: (FLAGS[q] if kv > 3 else q) == 2)
    agree(lambda b, h, q, kv: not ~(q and kv > 3))
    double = FLOATS.double()
    agree(lambda b, h, q, kv: (double[q] if kv > 3 else 0.1) + FLOATS[kv] == FLOATS[kv] + 0.1)
    agree(lambda b, h, q, kv: min(SMALL[q], 300) == max(SMALL[q], -1) and max(FLOATS[q], 1) > kv)
    agree(lambda b, h, q, kv: max(DOC_INT32[q], 1000) > 5 + kv)


def test_shifts_and_bits(agree):
    agree(lambda b, h, q, kv: (q >> 1) == (kv >> 1) and (1 << q) > 8)
    agree(lambda b, h, q, kv: (q & 3) == (kv & 3) or (q | 4) == kv or q ^ kv == 7)
    agree(lambda b, h, q, kv: (5 & q) == (kv ^ 1))
    agree(lambda b, h, q, kv: SIGNED[q] & 6 == kv or SIGNED[q] >> 1 == -1 or ~SIGNED[q] == kv)
    agree(lambda b, h, q, kv: (SMALL[q] << 1) > 100)
    agree(lambda b, h, q, kv: torch.bitwise_and(q, 3) == torch.bitwise_xor(kv, 1))


def test_min_max_and_friends(agree):
    agree(lambda b, h, q, kv: min(q, kv) > 2 and max(q, kv, 5) < 7)
    agree(lambda b, h, q, kv: max([q - kv, 0]) == abs(q - kv))
    agree(lambda b, h, q, kv: min(DOC[q], 1) == min(1, DOC[kv]))
    agree(lambda b, h, q, kv: max(FLOATS[q], 0.7) > min(FLOATS[kv], 1.0))
    agree(lambda b, h, q, kv: min(q, kv, key=lambda x: -x) == 4)
    agree(lambda b, h, q, kv: torch.minimum(q, kv) == torch.maximum(q - 3, kv - 2))
    agree(lambda b, h, q, kv: q.clamp(2, 6) >= torch.clamp(kv, min=3) and kv.clip(max=4) < 4)
    agree(lambda b, h, q, kv: torch.abs(q - kv) <= 2 or (q - kv).abs() == 5)
    agree(lambda b, h, q, kv: torch.where(q > 4, kv, q) == torch.where(kv > 3, 5, 2))
    agree(lambda b, h, q, kv: q.where(kv > 3, 2) == 2 or torch.where(q > kv, True, False))
    agree(lambda b, h, q, kv: q**2 <= kv**3 and round(2.6) == 3 and q.square() > 3)
    agree(lambda b, h, q, kv: torch.logical_and(q > 2, torch.logical_not(kv == 1)).logical_or(q == kv))
    agree(lambda b, h, q, kv: torch.eq(q, kv) | torch.lt(q, kv + 1).logical_xor(torch.ge(kv, 4)))
    agree(lambda b, h, q, kv: torch.sub(input=q, other=kv) > 1 and torch.true_divide(q, 2) > 1)
    agree(lambda b, h, q, kv: bool(q > kv) or bool(kv - 3))


def test_statements_on_captured_elements(agree):
    def flags(b, h, q, kv):
        if FLAGS[1]:
            return q > kv
        if FLAGS[2] and DOC[-1] == 2:
            return q > DOC[3]
        return False

    agree(flags)


def test_any_all_and_in(agree):
    starts = [0, 3, 5]
    agree(lambda b, h, q, kv: any(s <= kv <= q < s + 3 for s in starts))
    agree(lambda b, h, q, kv: all(q != s for s in starts))
    agree(lambda b, h, q, kv: any([]) or all(()))
    agree(lambda b, h, q, kv: any([q == 1, kv == 2, True]) and all((q, kv)))
    agree(lambda b, h, q, kv: any(s <= q for s in starts if s > 0))
    agree(lambda b, h, q, kv: any(s <= q for s in starts if s > kv))
    agree(lambda b, h, q, kv: q in (1, 4, 7) or kv in [2, 3])
    agree(lambda b, h, q, kv: q not in (1, kv) and q - kv in {0, 2} and kv not in {3: "x"}, index=int)
    agree(lambda b, h, q, kv: q in range(2, 6) or kv in range(7, 0, -3))
    agree(lambda b, h, q, kv: q - kv in range(-4, 8, 3) and q not in range(5, 5))
    agree(lambda b, h, q, kv: q / 2 in range(1, 4) or 3 in (q, kv))
    agree(lambda b, h, q, kv: SMALL[q] in range(0, 250, 50))


# What has no place in an expression


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
