"""Each instruction on registers gives what PTX says, in numpy or in exact fractions, at limits and at random bits."""

import math
import operator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import values as on
from tests.ptx.arithmetic import OPERATIONS
from tests.ptx.faults import Unsupported
from tests.ptx.snippets import value_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinities

LIMITS = {
    "u32": [0, 1, 2, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
    "u64": [0, 1, 2, 63, 64, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1],
    "u16": [0, 1, 0x7FFF, 0x8000, 0xFFFF],
    "f32": np.array([0.0, -0.0, 1, -1, 1.5, 2.5, 1e-40, -1e-40, 3e38, np.inf, -np.inf, np.nan], np.float32).view("u4"),
    "f64": np.array([0.0, -0.0, 1, -1, 1.5, 1e-310, 1e308, np.inf, -np.inf, np.nan]).view("u8"),
    "f16": np.array([0.0, -0.0, 1, -1, 1.5, 6e-8, 65504, np.inf, -np.inf, np.nan], np.float16).view("u2"),
    "bf16": [0, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0],
}
PRECISION = {"f16": (11, -24), "bf16": (8, -133), "f32": (24, -149), "f64": (53, -1074)}  # bits, least exponent


def draw(*kinds, threads=256):
    """Bits for each operand: limits against limits, then random ones, many of them near one another."""
    rng, out = np.random.default_rng(len(kinds)), []
    for place, kind in enumerate(kinds):
        base = "u" + kind[1:] if kind[0] in "sb" and kind not in LIMITS else kind
        dtype = f"u{on.size_of(kind)}"
        limits = np.array(LIMITS[base], np.uint64).astype(dtype)
        repeated = np.tile(np.repeat(limits, len(limits) ** place)[: len(limits) ** 2], 3)[: threads // 2]
        rest = rng.integers(0, 2 ** (8 * on.size_of(kind)), threads - len(repeated), dtype=dtype)
        if on.is_float(kind):
            near = on.encode(rng.integers(-9, 9, len(rest)) * 2.0 ** rng.integers(-14, 3, len(rest)), kind)
            rest = np.where(rng.integers(0, 2, len(rest)) == 0, rest, near)
        out.append(np.concatenate([repeated, rest]).astype(dtype))
    return out


def rounded(value, kind):
    """A fraction -> the nearest number of a type, ties to even, as a float."""
    bits, least = PRECISION[kind]
    if value == 0:
        return 0.0
    value = Fraction(value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - bits - 1
    while abs(value) >= Fraction(2) ** (exponent + bits):
        exponent += 1
    exponent = max(exponent, least)
    whole = round(value / Fraction(2) ** exponent)  # Python's own: ties to even
    largest = {"f16": 65504.0, "bf16": float.fromhex("0x1.fep127")}.get(kind) or float(np.finfo(on.DTYPES[kind]).max)
    found = abs(Fraction(whole) * Fraction(2) ** exponent)
    return math.copysign(math.inf if found > largest else float(found), 1 if value > 0 else -1)


def exactly(function, kind, *bits):
    """A function of fractions, rounded once; IEEE's rules for infinities and NaN are numpy's, in float64."""
    numbers = [on.decode(x, kind).astype(np.float64) for x in bits]
    with np.errstate(all="ignore"):
        plain = np.array(function(*numbers))
    for n, row in enumerate(zip(*numbers, strict=True)):
        if all(map(math.isfinite, row)) and (exact := function(*map(Fraction, row))) != 0:
            plain[n] = rounded(exact, kind)
    return on.encode(plain.astype(on.DTYPES.get(kind, np.float64)), kind)


def assert_same(found, expected, kind):
    """The same bits, but for NaN's."""
    if on.is_float(kind):
        nan = np.isnan(on.decode(expected, kind))
        assert np.isnan(on.decode(found, kind)[nan]).all()
        found, expected = found[~nan], expected[~nan]
    assert np.array_equal(found, expected), np.flatnonzero(found != expected)


def register(kind, n):
    return {2: "%rs", 4: "%r", 8: "%rd"}[on.size_of(kind)] + str(n)


ROUNDED = [
    *((f"{name}.{how}{kind}", function, 2) for name, function in (("add", operator.add), ("sub", operator.sub))
      for kind, how in (("f32", ""), ("f64", "rn."), ("f16", ""), ("bf16", "rn."))),
    *((f"mul.{kind}", operator.mul, 2) for kind in ("f32", "f64", "f16", "bf16")),
    *((f"fma.rn.{kind}", lambda a, b, c: a * b + c, 3) for kind in ("f32", "f64", "f16", "bf16")),
    *((f"neg.{kind}", operator.neg, 1) for kind in ("f32", "f64", "bf16")),
    *((f"abs.{kind}", abs, 1) for kind in ("f32", "f64", "f16")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "count"), ROUNDED, ids=[name for name, *_ in ROUNDED])
def test_floats_are_rounded_once(name, function, count):
    kind = name.rsplit(".", 1)[1]
    bits = draw(*[kind] * count)
    names = ", ".join(register(kind, n) for n in range(count + 1))
    assert_same(value_of(f"{name} {names};", *bits, out=kind), exactly(function, kind, *bits), kind)


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.floats(width=32)] * 3), min_size=1, max_size=40))
def test_fma_of_any_floats_is_rounded_once(rows):
    bits = np.array(rows, np.float32).T.copy().view(np.uint32)
    with np.errstate(all="ignore"):
        found = on.fma32(*(x.view(np.float32) for x in bits)).view(np.uint32)
        assert_same(found, exactly(lambda a, b, c: a * b + c, "f32", *bits), "f32")


UNIT = 2.0**-23


@pytest.mark.parametrize(("power", "c"), [(-12, 1 + UNIT), (-75, 2.0**-127 + 2.0**-149)])  # the latter is subnormal
def test_fma_does_not_round_in_float64_first(power, c):
    """a * b is just below half a unit of c, and float64 makes exactly that of it: a tie."""
    a, b = ((1 + sign * UNIT) * 2.0**power for sign in (1, -1))
    bits = [np.full(32, x, np.float32).view(np.uint32) for x in (a, b, c)]
    assert np.array_equal(value_of("fma.rn.f32 %r0, %r1, %r2, %r3;", *bits), bits[2])


@pytest.mark.parametrize("base", ["f16", "bf16"])
@pytest.mark.parametrize(("name", "count"), [("add.{}", 2), ("mul.rn.{}", 2), ("fma.rn.{}", 3), ("max.NaN.{}", 2)])
def test_two_halves_of_a_register_are_computed_apart(name, base, count):
    bits = draw(*[base] * (2 * count))
    pairs = [
        low.astype(np.uint32) | high.astype(np.uint32) << 16 for low, high in zip(bits[::2], bits[1::2], strict=True)
    ]
    names = ", ".join(f"%r{n}" for n in range(count + 1))
    found = value_of(f"{name.format(base + 'x2')} {names};", *pairs)
    halves = ", ".join(f"%rs{n}" for n in range(count + 1))
    for place, shift in ((0, 0), (1, 16)):
        alone = value_of(f"{name.format(base)} {halves};", *bits[place::2], out=base)
        assert_same((found >> shift).astype(np.uint16), alone, base)


def signed(bits):
    return [int(x) for x in bits.view(f"i{bits.itemsize}")]


def of_integers(function, bits, sign=False, size=None):
    """A function of Python's integers, wrapped."""
    numbers = [signed(x) if sign else [int(n) for n in x] for x in bits]
    size = size or bits[0].itemsize
    return np.array([function(*row) % 2 ** (8 * size) for row in zip(*numbers, strict=True)], f"u{size}")


def field(size, sign):
    """bfe, bit by bit, as PTX tells it."""

    def extracted(a, start, length):
        bits = [a >> n & 1 for n in range(size)]
        start, length = start % 256, length % 256
        fill = bits[min(start + length - 1, size - 1)] if sign and length else 0
        return sum((bits[start + n] if n < length and start + n < size else fill) << n for n in range(size))

    return extracted


def quotient(a, b):
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a + b if b == 0 else a - quotient(a, b) * b


def inserted(a, b, start, length):
    start, length = min(start % 256, 32), min(length % 256, 32)
    mask = ((1 << length) - 1) << start
    return b & ~mask | a << start & mask


def permuted(a, b, selector):
    out = 0
    for n in range(4):
        pick = selector >> 4 * n & 15
        byte = (a | b << 32) >> 8 * (pick & 7) & 255
        out |= ((255 if byte & 128 else 0) if pick & 8 else byte) << 8 * n
    return out


def majority(a, b, c):
    return a & b | a & c | b & c


INTEGERS = [
    ("add.s32", operator.add, "uu", False),
    ("add.s64", operator.add, "uu", False),
    ("sub.s32", operator.sub, "uu", False),
    ("mul.lo.s32", operator.mul, "uu", False),
    ("mul.lo.s64", operator.mul, "uu", False),
    ("mul.hi.u32", lambda a, b: a * b >> 32, "uu", False),
    ("mul.hi.s32", lambda a, b: a * b >> 32, "uu", True),
    ("mul.hi.u64", lambda a, b: a * b >> 64, "uu", False),
    ("mul.hi.s64", lambda a, b: a * b >> 64, "uu", True),
    ("mad.lo.s32", lambda a, b, c: a * b + c, "uuu", False),
    ("mad.lo.s64", lambda a, b, c: a * b + c, "uuu", False),
    ("div.s32", quotient, "uu", True),
    ("div.u32", quotient, "uu", False),
    ("div.s64", quotient, "uu", True),
    ("rem.s32", remainder, "uu", True),
    ("rem.u64", remainder, "uu", False),
    ("neg.s32", operator.neg, "u", True),
    ("abs.s32", abs, "u", True),
    ("min.s32", min, "uu", True),
    ("min.u32", min, "uu", False),
    ("max.s64", max, "uu", True),
    ("max.u32", max, "uu", False),
    ("and.b32", operator.and_, "uu", False),
    ("or.b64", operator.or_, "uu", False),
    ("xor.b16", operator.xor, "uu", False),
    ("not.b32", operator.invert, "u", False),
    ("shl.b32", lambda a, n: a << n if n < 32 else 0, "un", False),
    ("shl.b64", lambda a, n: a << n if n < 64 else 0, "un", False),
    ("shr.u32", lambda a, n: a >> n if n < 32 else 0, "un", False),
    ("shr.s32", lambda a, n: a >> min(n % 2**32, 31), "un", True),
    ("shr.s64", lambda a, n: a >> min(n % 2**32, 63), "un", True),
    ("bfe.u32", field(32, False), "unn", False),
    ("bfe.s32", field(32, True), "unn", False),
    ("bfi.b32", inserted, "uunn", False),
    ("prmt.b32", permuted, "uuu", False),
    ("cvta.to.global.u64", lambda a: a, "u", False),
]


@pytest.mark.parametrize(("name", "function", "takes", "sign"), INTEGERS, ids=[name for name, *_ in INTEGERS])
def test_integers(name, function, takes, sign):
    kind = name.rsplit(".", 1)[1]
    kinds = [f"u{kind[1:]}" if one == "u" else "u32" for one in takes]
    bits = draw(*kinds)
    if "n" in takes and takes.count("n") > 1:  # positions: near the word's end
        bits = [x % 70 if one == "n" else x for x, one in zip(bits, takes, strict=True)]
    names = ", ".join(register(k, n) for n, k in enumerate([kind, *kinds]))
    assert_same(value_of(f"{name} {names};", *bits, out=kind), of_integers(function, bits, sign), kind)


def test_products_may_be_wider():
    a, b = draw("u32", "u32")
    for kind, sign in (("s32", True), ("u32", False)):
        wide = of_integers(operator.mul, [a, b], sign, 8)
        assert np.array_equal(value_of(f"mul.wide.{kind} %rd0, %r1, %r2;", a, b, out="b64"), wide)
        found = value_of(f"mad.wide.{kind} %rd0, %r1, %r2, %rd3;", a, b, wide, out="b64")
        assert np.array_equal(found, wide + wide)


def test_three_inputs_are_looked_up_in_a_table():
    bits = draw("u32", "u32", "u32")
    assert np.array_equal(value_of("lop3.b32 %r0, %r1, %r2, %r3, 0xE8;", *bits), of_integers(majority, bits))
    assert not value_of("lop3.b32 %r0, %r1, %r2, %r3, 0;", *bits).any()


APPROXIMATE = {
    "ex2.approx.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.rn.f32": np.reciprocal,
    "sqrt.rn.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_functions_are_near(name):
    bits = draw("f32")[0]
    found = value_of(f"{name} %r0, %r1;", bits).view(np.float32)
    with np.errstate(all="ignore"):
        expected = APPROXIMATE[name](bits.view(np.float32).astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=2e-45)


@pytest.mark.parametrize("name", ["div.full.f32", "div.rn.f32", "div.rn.f64"])
def test_quotients(name):
    kind = name[-3:]
    a, b = draw(kind, kind)
    names = ", ".join(register(kind, n) for n in range(3))
    with np.errstate(all="ignore"):
        expected = on.encode(on.decode(a, kind) / on.decode(b, kind), kind)
    assert_same(value_of(f"{name} {names};", a, b, out=kind), expected, kind)


def test_subnormal_numbers_are_flushed_where_it_says_so():
    tiny = np.full(32, 1e-40, np.float32).view(np.uint32)
    half = np.full(32, 0.5, np.float32).view(np.uint32)
    least = np.full(32, 2.0**-126, np.float32).view(np.uint32)
    assert (value_of("add.f32 %r0, %r1, %r1;", tiny) == 2 * tiny).all()
    assert not value_of("add.ftz.f32 %r0, %r1, %r1;", tiny).any()
    assert not value_of("mul.ftz.f32 %r0, %r1, %r2;", least, half).any()
    assert not value_of("fma.rn.ftz.f32 %r0, %r1, %r2, %r3;", least, half, tiny).any()
    assert not value_of("ex2.approx.ftz.f32 %r0, 0fC3000000;", tiny).any()  # 2 to the -128


def test_extremes_pass_over_nan_and_order_zeros():
    one, nan, plus, minus = (np.full(32, x, np.float32).view(np.uint32) for x in (1, np.nan, 0.0, -0.0))
    assert (value_of("max.f32 %r0, %r1, %r2;", one, nan) == one).all()
    assert np.isnan(value_of("min.NaN.f32 %r0, %r1, %r2;", one, nan).view(np.float32)).all()
    assert (value_of("max.f32 %r0, %r1, %r2;", minus, plus) == plus).all()
    assert (value_of("min.f32 %r0, %r1, %r2;", plus, minus) == minus).all()
    a, b = draw("f32", "f32")
    expected = np.fmax(a.view(np.float32), b.view(np.float32))
    assert np.array_equal(value_of("max.f32 %r0, %r1, %r2;", a, b).view(np.float32), expected, equal_nan=True)


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "f32", "f64", "f16", "bf16"])
def test_comparisons(name, kind):
    a, b = draw(kind, kind)
    names = ", ".join(register(kind, n) for n in (1, 2))
    x, y = on.decode(a, kind), on.decode(b, kind)
    nan = (np.isnan(x) | np.isnan(y)) if on.is_float(kind) else np.zeros(len(x), bool)
    expected = COMPARISONS[name](x, y) & ~nan
    assert np.array_equal(value_of(f"setp.{name}.{kind} %p0, {names};", a, b, out="pred"), expected)
    if on.is_float(kind):
        found = value_of(f"setp.{name}u.{kind} %p0, {names};", a, b, out="pred")
        assert np.array_equal(found, expected | nan)


def test_comparisons_are_joined_with_predicates():
    a, b = draw("u32", "u32")
    body = "setp.gt.u32 %p1, %r1, 5; setp.lt.{} %p0, %r1, %r2, %p1; not.pred %p2, %p0; xor.pred %p0, %p2, %p1;"
    for name, function in (("and", np.logical_and), ("or", np.logical_or)):
        found = value_of(body.format(f"{name}.s32"), a, b, out="pred")
        joined = function(a.view(np.int32) < b.view(np.int32), a > 5)
        assert np.array_equal(found, ~joined ^ (a > 5))
    x, y = (bits.view(np.float32) for bits in draw("f32", "f32"))
    for name, expected in (("nan", np.isnan(x) | np.isnan(y)), ("num", ~(np.isnan(x) | np.isnan(y)))):
        found = value_of(f"setp.{name}.f32 %p0, %r1, %r2;", x.view(np.uint32), y.view(np.uint32), out="pred")
        assert np.array_equal(found, expected)


def test_one_of_two_is_selected():
    a, b = draw("u32", "u32")
    found = value_of("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r0, %r1, -7, !%p1;", a, b)
    assert np.array_equal(found, np.where(a < b, np.uint32(2**32 - 7), a))


def test_a_guard_lets_some_threads_through():
    a, b = draw("u32", "u32")
    body = "mov.b32 %r0, %r1; setp.lt.u32 %p1, %r1, %r2; @!%p1 add.s32 %r0, %r1, %r2;"
    assert np.array_equal(value_of(body, a, b), np.where(a < b, a, a + b))


def test_moves_pack_and_unpack():
    low, high = draw("u16", "u16")
    both = value_of("mov.b32 %r0, {%rs1, %rs2};", low, high)
    assert np.array_equal(both, low.astype(np.uint32) | high.astype(np.uint32) << 16)
    assert np.array_equal(value_of("mov.b32 {%rs0, _}, %r1;", both, out="b16"), low)
    assert np.array_equal(value_of("mov.b32 {_, %rs0}, %r1;", both, out="b16"), high)
    assert (value_of("mov.b32 %r0, 0f3F800000;") == 0x3F800000).all()
    assert (value_of("mov.b64 %rd0, -1;", out="b64") == 2**64 - 1).all()
    assert value_of("mov.pred %p0, -1;", out="pred").all()
    assert np.array_equal(value_of("mov.u32 %r0, %tid.x;"), np.arange(32))
    assert (value_of("mov.u32 %r0, %ctaid.x; mov.u32 %r1, %nctaid.x; add.s32 %r0, %r0, %r1;") == 1).all()


CONVERSIONS = [
    ("u64", "u32", lambda x: x.astype(np.uint64)),
    ("s64", "s32", lambda x: x.astype(np.int64)),
    ("u32", "u64", lambda x: x.astype(np.uint32)),
    ("u32", "u16", lambda x: x.astype(np.uint32)),
    ("s32", "s16", lambda x: x.astype(np.int32)),
    ("rn.f32", "s32", lambda x: x.astype(np.float32)),
    ("rn.f32", "u32", lambda x: x.astype(np.float32)),
    ("rn.f64", "s64", lambda x: x.astype(np.float64)),
    ("f64", "f32", lambda x: x.astype(np.float64)),
    ("rn.f32", "f64", lambda x: x.astype(np.float32)),
    ("rn.f16", "f32", lambda x: x.astype(np.float16)),
    ("f32", "f16", lambda x: x.astype(np.float32)),
    ("f32", "bf16", lambda x: x.astype(np.float32)),
    ("rmi.f32", "f32", np.floor),
    ("rpi.f32", "f32", np.ceil),
    ("rni.f64", "f64", np.rint),
]


@pytest.mark.parametrize(("target", "source", "function"), CONVERSIONS)
def test_conversions(target, source, function):
    (bits,), kind = draw(source), target.split(".")[-1]
    found = value_of(f"cvt.{target}.{source} {register(kind, 0)}, {register(source, 1)};", bits, out=kind)
    with np.errstate(all="ignore"):
        assert_same(found, np.asarray(function(on.decode(bits, source))).view(f"u{on.size_of(kind)}"), kind)


def test_float32_becomes_bfloat16_to_nearest_even():
    (bits,) = draw("f32")
    found = value_of("cvt.rn.bf16.f32 %rs0, %r1;", bits, out="bf16")
    assert_same(found, nearest(bits), "bf16")
    pair = value_of("cvt.rn.bf16x2.f32 %r0, %r1, %r2;", bits, bits[::-1].copy())
    assert_same((pair >> 16).astype(np.uint16), found, "bf16")
    assert_same((pair & 0xFFFF).astype(np.uint16), found[::-1], "bf16")


def test_pairs_of_e4m3_become_halves():
    codes = np.arange(1 << 16, dtype=np.uint16)[:: (1 << 16) // 256 + 1]
    pair = value_of("cvt.rn.f16x2.e4m3x2 %r0, %rs1;", codes)
    for half, code in ((pair & 0xFFFF, codes & 255), (pair >> 16, codes >> 8)):
        wanted = torch.from_numpy(code.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
        assert np.array_equal(half.astype(np.uint16).view(np.float16).astype(np.float32), wanted, equal_nan=True)


def nearest(bits):
    numbers = bits.view(np.float32).astype(np.float64)
    finite = np.isfinite(numbers)
    exact = [rounded(Fraction(x), "bf16") if ok else x for x, ok in zip(numbers.tolist(), finite, strict=True)]
    signs = np.signbit(bits.view(np.float32))
    return on.encode(np.copysign(np.array(exact), np.where(signs, -1.0, 1.0)), "bf16")


@pytest.mark.parametrize(("target", "low", "high"), [("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1)])
def test_floats_become_integers_within_their_limits(target, low, high):
    (bits,) = draw("f32")
    numbers = bits.view(np.float32).astype(np.float64).tolist()
    for how, function in (("rzi", math.trunc), ("rni", round), ("rmi", math.floor), ("rpi", math.ceil)):
        found = value_of(f"cvt.{how}.{target}.f32 %r0, %r1;", bits)
        clamped = [0 if math.isnan(x) else max(low, min(high, function(max(min(x, 1e30), -1e30)))) for x in numbers]
        assert np.array_equal(found, np.array([x % 2**32 for x in clamped], np.uint32))


def of_e4m3(bits):
    return torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn).float().numpy()


def test_float32_becomes_e4m3_to_nearest_even():
    """Torch's numbers of the 8 bits are the truth; its own rounding saturates or not, by its version."""
    (bits,) = draw("f32")
    grid = of_e4m3(np.arange(256, dtype=np.uint8))
    middle = (grid[1:127] + grid[:126]) / 2
    special = np.array([448, 463, 464, 465, 1e30, np.inf, -np.inf, np.nan, 2**-10, 1.5 * 2**-10, 0.0, -0.0], np.float32)
    numbers = np.concatenate([bits.view(np.float32), grid, middle, -middle, special])
    numbers = np.resize(numbers, -(-len(numbers) // 32) * 32).astype(np.float32)
    found = value_of(
        "cvt.rn.satfinite.e4m3x2.f32 %rs0, %r1, %r2;", *(x.view(np.uint32) for x in (numbers, -numbers)), out="u16"
    )
    clamped = torch.from_numpy(np.clip(numbers, -448, 448)).to(torch.float8_e4m3fn)
    expected = clamped.view(torch.uint8).numpy()
    nan = np.isnan(numbers)
    assert ((found >> 8).astype(np.uint8)[~nan] == expected[~nan]).all()
    assert ((found & 0x7F) == (found >> 8 & 0x7F)).all()
    assert np.isnan(of_e4m3((found >> 8).astype(np.uint8)[nan])).all()
    halves = np.clip(numbers, -65504, 65504).astype(np.float16).view(np.uint16)
    pairs = halves.astype(np.uint32) << 16 | halves
    found = value_of("cvt.rn.satfinite.e4m3x2.f16x2 %rs0, %r1;", pairs, out="u16")
    near = value_of(
        "cvt.rn.satfinite.e4m3x2.f32 %rs0, %r1, %r2;",
        *(halves.view(np.float16).astype(np.float32).view(np.uint32),) * 2,
        out="u16",
    )
    assert np.array_equal(found, near)


def test_float16_towards_zero():
    (bits,) = draw("f32")
    numbers = bits.view(np.float32)
    found = value_of("cvt.rz.f16.f32 %rs0, %r1;", bits, out="f16").view(np.float16)
    finite = np.isfinite(numbers)
    assert (np.abs(found[finite].astype(np.float64)) <= np.abs(numbers[finite])).all()
    beyond = np.nextafter(found[finite], np.copysign(np.float16(np.inf), numbers[finite]).astype(np.float16))
    assert (np.abs(beyond.astype(np.float64)) > np.abs(numbers[finite])).all()


def test_tf32_is_rounded_away_from_zero():
    bits = np.array([0x3F800FFF, 0x3F801000, 0xBF801000, 0x3F803000], np.uint32).repeat(8)
    expected = np.array([0x3F800000, 0x3F802000, 0xBF802000, 0x3F804000], np.uint32).repeat(8)
    assert np.array_equal(value_of("cvt.rna.tf32.f32 %r0, %r1;", bits), expected)


def test_every_operation_has_a_test():
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    assert [name for name in OPERATIONS if f'"{name}.' not in text and f" {name}." not in text] == []


@pytest.mark.parametrize(
    "line",
    [
        "sin.approx.f32 %r0, %r1;",
        "add.rz.f32 %r0, %r1, %r2;",
        "add.sat.s32 %r0, %r1, %r2;",
        "mad.rn.f32 %r0, %r1, %r2, %r3;",
        "mul.s32 %r0, %r1, %r2;",
        "setp.foo.s32 %p0, %r1, %r2;",
        "setp.lt.s32 %p0|%p1, %r1, %r2;",
        "cvt.rp.f16.f32 %rs0, %r1;",
        "cvt.rn.e4m3x2.f32 %rs0, %r1, %r2;",
        "cvt.s32.f32 %r0, %r1;",
        "bfi.b64 %rd0, %rd1, %rd2, 1, 2;",
        "add.s32 %r0, %q1, %r2;",
        "add.s32 %r0, %r1;",
        "add.s128 %r0, %r1, %r2;",
        "mov.b32 %r0, %clock;",
        "mov.b32 %r0, 0d3FF0000000000000;",
    ],
)
def test_what_is_unknown_is_named(line):
    with pytest.raises(Unsupported, match=line.split()[0].replace(".", r"\.")):
        value_of(line)
