"""Emitted text, run by Triton on a tile, says of every pair what evaluating the expression says."""

import math
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.backends.triton import modules
from maskflash.backends.triton.emit import GROUPS, emit
from maskflash.backends.triton.signature import TableKind, arguments_of
from maskflash.errors import BackendError
from maskflash.expr.bounds import bounds
from maskflash.expr.evaluate import Inputs, evaluate
from maskflash.expr.intervals import Interval
from maskflash.expr.nodes import Builder, Expr, Source, promote
from maskflash.expr.ops import OPERATIONS
from maskflash.trace.trace import trace

HALF = (torch.float16,)  # the interpreter computes on bfloat16's raw bits
SIDE = 16
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def tile(out, b: "i64", h: "i64", {arguments}SIDE: tl.constexpr):
    b = b.to({integer})
    h = h.to({integer})
    q = (tl.arange(0, SIDE) - 3).to({integer})
    kv = tl.arange(0, SIDE).to({integer})
{once}
{rows}
{columns}
{pairs}
    visible = {visible}
    place = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out + place, tl.where(visible & (place >= 0), 1, 0))
"""


def kernel_text(expr, kinds, narrow, transposed):
    emitted = emit(expr, kinds, narrow=narrow, transposed=transposed)
    arguments = (argument for line in arguments_of(expr, kinds) for argument in line)
    return KERNEL.format(
        arguments="".join(f"{argument.text}, " for argument in arguments),
        integer="tl.int32" if narrow else "tl.int64",
        visible=emitted.visible,
        **{group: textwrap.indent("\n".join(emitted.lines[group]), "    ") for group in GROUPS},
    )


def run(expr, inputs, *, narrow=False, transposed=False, b=1, h=2, device="cpu"):
    """Truth on a tile: q from -3, kv from 0, as the emitted text has it."""
    tables = [table.to(device) for table in inputs.tables]
    module = modules.load(kernel_text(expr, tuple(map(TableKind.of, tables)), narrow, transposed))
    values = list(inputs.params[: expr.slots("param")])
    for table in tables:
        memory = table.view(torch.uint8) if table.dtype == torch.bool else table
        values += [memory, *table.shape, *table.stride()]
    out = torch.full((SIDE, SIDE), -1, dtype=torch.int32, device=device)
    module.tile[(1,)](out, b, h, *values, SIDE=SIDE)
    assert ((out == 0) | (out == 1)).all()
    found = out.cpu().bool()
    return found.T if transposed else found


def pairs(b=1, h=2):
    def at(n):
        return torch.tensor(n)

    return {"b": at(b), "h": at(h), "q": torch.arange(SIDE)[:, None] - 3, "kv": torch.arange(SIDE)[None, :]}


def fits_32_bits(expr, inputs):
    boxes = {name: Interval(index.min(), index.max()) for name, index in pairs().items()}
    return bounds(expr, inputs, boxes).largest < 2**31


def agree(expr, inputs, device="cpu"):
    expected = evaluate(expr, inputs, pairs())
    for narrow in (False, True) if fits_32_bits(expr, inputs) else (False,):
        for transposed in (False, True):
            found = run(expr, inputs, narrow=narrow, transposed=transposed, device=device)
            wrong = (found != expected).nonzero().tolist()
            text = kernel_text(expr, tuple(map(TableKind.of, inputs.tables)), narrow, transposed)
            assert not wrong, f"{expr}\n{text}\ndiffers at {wrong[:5]}, narrow={narrow}, transposed={transposed}"


TABLES = (
    torch.tensor([[3, -2, 0, 7], [7, 11, -9, 5]]).repeat(2, 4),
    torch.tensor([2**31 - 1, -(2**31), 4, 9, -6, 0, 1, -1], dtype=torch.int32),
    torch.tensor([0, 255, 128, 3, 200, 1, 2], dtype=torch.uint8),
    torch.tensor([127, -128, 5, 0, -3], dtype=torch.int8),
    torch.tensor([True, False, False, True, True, False]),
    torch.tensor([0.5, -1.5, 2.5, 1e30, 0.1, -0.0, 7.0, -2.25]),
    torch.tensor([0.5, -1.5, 2.5, 6e4, 0.1, -0.0, 7.0], dtype=torch.float16),
    torch.tensor([0.5, -3.5, 1e-300, 0.1, 1e300], dtype=torch.float64),
    torch.tensor(5),
    torch.tensor([2**62, -(2**62), 2**40, -1, 5]),
)
KINDS = tuple(map(TableKind.of, TABLES))
NUMBERS = (0, 1, 2, 3, 5, 8, -1, -4, 100, 300, 2**31, -(2**31), 2**40)
REALS = (0.0, 0.5, -1.25, 0.1, 3.0, float("inf"), float("-inf"), float("nan"))
PARAMS = (3, -5, 2**33)
INTEGERS = ("add", "sub", "mul", "min", "max", "bitand", "bitor", "bitxor")
DIVISIONS = ("floordiv", "mod", "truncdiv", "fmod")
ON_REALS = ("add", "sub", "mul", "truediv", "min", "max")
ROUNDING = ("floor", "ceil", "trunc", "round")
EVERY_OP = {name for name, op in OPERATIONS.items() if not op.inexact}
EVERY_OP -= {"kv", "q", "b", "h", "const", "param", "score"}


class Draw:
    """Draws an expression node by node, of exactly those operations that torch has on its operands."""

    def __init__(self, draw, one_group):
        self.draw, self.build, self.one_group = draw, Builder(), one_group

    def pick(self, options):
        return self.draw(st.sampled_from(list(options)))

    def kind(self, position):
        return self.build.nodes[position]

    def integer(self, depth):
        build = self.build
        if depth == 0 or self.pick(range(5)) == 0:
            leaf = self.pick(("q", "kv", "q", "kv", "b", "h", "const", "param"))
            leaf = self.one_group if self.one_group and leaf in ("q", "kv") else leaf
            if leaf == "const":
                return build.const(self.pick(NUMBERS))
            if leaf == "param":
                slot = self.pick(range(len(PARAMS)))
                return build.add("param", dtype=torch.int64, weak=True, value=slot)
            return build.add(leaf, dtype=torch.int64)
        kind = self.pick(
            ("binary", "binary", "division", "shift", "unary", "lookup", "lookup", "select", "cast", "bits")
        )
        x = self.integer(depth - 1)
        if kind == "unary":
            return build.add(self.pick(("neg", "abs", "bitnot", *ROUNDING)), x)
        if kind == "lookup":
            return self.lookup(self.pick((0, 1, 2, 3, 8, 9)), depth)
        if kind == "cast":
            dtype = self.pick((torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8))
            source = self.pick((x, self.truth(depth - 1)))
            return build.add("cast", source, dtype=dtype)
        if kind == "bits":
            return build.add("cast", self.truth(depth - 1), dtype=torch.int64)
        y = self.integer(depth - 1)
        if kind == "select":
            return build.add("select", self.truth(depth - 1), x, y)
        if kind == "division":
            if self.pick((True, False)):
                y = build.const(self.pick((1, 2, 3, 7, 8, -3, 64)))
            return build.add(self.pick(DIVISIONS), x, y)
        if kind == "shift":
            if self.pick((True, False)):
                y = build.const(self.pick((0, 1, 3, 7, 31, 32, 40, 63, 64, -1)))
            return build.add(self.pick(("shl", "shr")), x, y)
        return build.add(self.pick(INTEGERS), x, y)

    def lookup(self, slot, depth):
        table = TABLES[slot]
        indices = [self.index(size, depth - 1) for size in table.shape]
        return self.build.add("lookup", *indices, dtype=table.dtype, weak=False, value=slot)

    def index(self, size, depth):
        x = self.integer(max(depth, 0))
        if self.kind(x).dtype != torch.int64 or self.kind(x).weak:
            x = self.build.add("cast", x, dtype=torch.int64, weak=False)
        inside = self.build.add("mod", x, self.build.const(size))
        # Half of the time from the end: negative look-ups wrap.
        return inside if self.pick((True, False)) else self.build.add("sub", inside, self.build.const(size))

    def real(self, depth):
        build = self.build
        if depth == 0 or self.pick(range(4)) == 0:
            if self.pick((True, False)):
                return self.lookup(self.pick((5, 6, 7)), max(depth, 0))
            number = build.const(self.pick(REALS))
            x = build.add(self.pick(("mul", "add")), self.integer(0), number)
            return x if self.kind(x).dtype.is_floating_point else build.add("cast", x, dtype=torch.float32)
        x, y = self.real(depth - 1), self.real(depth - 1)
        kind = self.pick(("binary", "binary", "unary", "rounding", "select", "cast", "sqrt", "truncdiv"))
        if kind == "unary":
            return build.add(self.pick(("neg", "abs")), x)
        if kind == "rounding":
            return build.add(self.pick(ROUNDING), x)
        if kind == "sqrt":
            return build.add("sqrt", build.add("abs", x))
        if kind == "select":
            return build.add("select", self.truth(depth - 1), x, y)
        if kind == "cast":
            return build.add("cast", x, dtype=self.pick((torch.float32, torch.float64, torch.float16)))
        if kind == "truncdiv" and promote(self.kind(x), self.kind(y))[0] not in HALF:
            return build.add("truncdiv", x, y)
        return build.add(self.pick(ON_REALS), x, y)

    def truth(self, depth):
        build = self.build
        if depth <= 0:
            return build.add(self.pick(("lt", "le", "gt", "ge", "eq", "ne")), self.integer(0), self.integer(0))
        kind = self.pick(
            ("compare", "compare", "reals", "logic", "logic", "not", "table", "select", "mixed", "arithmetic")
        )
        if kind == "not":
            return build.add("not", self.pick((self.truth(depth - 1), self.integer(depth - 1), self.real(depth - 1))))
        if kind == "table":
            return self.lookup(4, depth)
        if kind in ("logic", "mixed"):
            other = self.truth if kind == "logic" else self.integer
            return build.add(self.pick(("and", "or")), self.truth(depth - 1), other(depth - 1))
        if kind == "select":
            return build.add("select", self.truth(depth - 1), self.truth(depth - 1), self.truth(depth - 1))
        if kind == "arithmetic":
            x, y = self.truth(depth - 1), self.truth(depth - 1)
            if self.kind(x).weak or self.kind(y).weak:
                return x
            op = self.pick(("bitand", "bitor", "bitxor", "add", "mul", "min", "max", "bitnot"))
            return build.add(op, x, y) if op != "bitnot" else build.add(op, x)
        operand = self.integer if kind == "compare" else self.real
        return build.add(self.pick(("lt", "le", "gt", "ge", "eq", "ne")), operand(depth - 1), operand(depth - 1))


@pytest.fixture(scope="module", autouse=True)
def broadcasting_of_scalar_truth(device):
    """The interpreter spreads a comparison of two scalar floats as floats, which no `&` takes: keep what it holds."""
    if device != "cpu":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_splat(self, ret_ty, arg):
        return TensorHandle(np.full(ret_ty.shape, arg.data, dtype=arg.data.dtype), arg.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_splat", create_splat)
        yield


@st.composite
def expressions(draw):
    drawing = Draw(draw, draw(st.sampled_from([None, None, None, "q", "kv"])))
    return drawing.build.finish(drawing.truth(draw(st.sampled_from([1, 2, 3]))))


def usable(expr):
    """Whether torch evaluates it at all: dividing by zero, or an operation torch lacks on such operands, does not."""
    try:
        evaluate(expr, Inputs(PARAMS, TABLES), pairs())
    except (ArithmeticError, IndexError, RuntimeError):
        return False
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows and NaN
@settings(max_examples=150)
@given(expressions())
def test_every_expression_is_computed_as_torch_computes_it(device, expr):
    if usable(expr):
        agree(expr, Inputs(PARAMS, TABLES), device)


def test_every_operation_of_the_grammar_is_drawn():
    """So that the test above means what it says."""
    drawn = set()

    @settings(max_examples=1000)
    @given(expressions())
    def collect(expr):
        if usable(expr):
            drawn.update(node.op for node in expr.nodes)

    collect()
    assert drawn >= EVERY_OP


def emitted(predicate, narrow=True, remarks=False, **mask_args):
    traced = trace(predicate, mask_args)
    tables = traced.bind(mask_args).tables
    return emit(traced.expr, tuple(map(TableKind.of, tables)), narrow=narrow, remarks=remarks), traced.expr


def packed(b, h, q, kv, *, doc, spans):
    same = doc[b, q] == doc[b, kv]
    return q >= kv and same and (q - kv < spans[h] or (q - kv) % 7 == 0)


DOC, SPANS = torch.zeros(2, 40, dtype=torch.int64), torch.ones(4, dtype=torch.int32)


def test_each_part_of_an_expression_appears_once_and_before_its_use():
    text, expr = emitted(packed, doc=DOC, spans=SPANS)
    lines = [line for group in GROUPS for line in text.lines[group] if not line.startswith("#")]
    assigned = [line.split(" = ")[0] for line in lines]
    assert len(set(assigned)) == len(assigned)
    computed = [n for n, node in enumerate(expr.nodes) if node.op not in ("b", "h", "q", "kv", "const", "param")]
    assert {f"x{n}" for n in computed} <= set(assigned)
    known = {"b", "h", "q", "kv", "tl"}
    for line, name in zip(lines, assigned, strict=True):
        used = set(re.findall(r"\b(x\d+(?:_\w+)?|b|h|q|kv)\b", line.split(" = ", 1)[1]))
        assert used <= known, line
        known.add(name)
    assert sum(" - kv" in line or "- kv[" in line for line in lines) == 1  # q - kv is written three times above


def test_statements_are_grouped_by_what_they_depend_on():
    text, _ = emitted(packed, doc=DOC, spans=SPANS)
    loads = {group: sum("tl.load" in line for line in text.lines[group]) for group in GROUPS}
    assert loads == {"once": 1, "rows": 1, "columns": 1, "pairs": 0}  # spans[h], doc[b, q], doc[b, kv]
    assert not any(re.search(r"\bkv\b", line) for line in text.lines["rows"])
    assert not any(re.search(r"\bq\b", line) for line in text.lines["columns"])
    assert not any(re.search(r"\b(q|kv)\b", line) for line in text.lines["once"])


@pytest.mark.parametrize(
    ("transposed", "row", "column"), [(False, "[:, None]", "[None, :]"), (True, "[None, :]", "[:, None]")]
)
def test_rows_and_columns_are_shaped_for_the_tile(transposed, row, column):
    text = emit(trace(lambda b, h, q, kv: q >= kv).expr, (), narrow=True, transposed=transposed)
    assert text.lines["pairs"][-1] == f"x2 = q{row} >= kv{column}"
    assert text.visible == "x2"


def test_statements_name_the_line_of_the_user():
    text, _ = emitted(packed, remarks=True, doc=DOC, spans=SPANS)
    comments = [line for group in GROUPS for line in text.lines[group] if line.startswith("#")]
    first = packed.__code__.co_firstlineno
    assert f"# packed (test_emit.py:{first + 1}): doc[b, q]" in text.lines["rows"]
    assert any(line.startswith(f"# packed (test_emit.py:{first + 2}): ") for line in text.lines["pairs"])
    assert not any(os.sep in line.split(":")[0] for line in comments)  # whose machine it was is nobody's business
    assert len(comments) == len(set(comments))
    bare, _ = emitted(packed, doc=DOC, spans=SPANS)  # as kernels that run have them
    for group in GROUPS:
        assert bare.lines[group] == [line for line in text.lines[group] if not line.startswith("#")]


def test_a_comment_is_one_line_whatever_the_source_holds():
    expr = trace(lambda b, h, q, kv: q >= kv).expr
    bad = Source("f", "/home/me/a.py", 3, "q >=\n    kv\r\nimport os")
    text = emit(Expr(expr.nodes, (bad,) * len(expr.nodes)), (), narrow=True, remarks=True)
    assert text.lines["pairs"] == ["# f (a.py:3): q >= kv import os", "x2 = q[:, None] >= kv[None, :]"]


def test_what_a_guard_excludes_is_neither_read_nor_divided_by():
    """Both sides of `and` are computed, so a kernel must not leave a table, nor divide by zero (undefined in LLVM)."""
    table = torch.ones(4)
    text, _ = emitted(
        lambda b, h, q, kv: (q < 4 and table[q] > 0 and kv < 4 and table[kv] > 0) or (kv > 0 and q // kv > 1)
    )
    rows, columns = ([line for line in text.lines[group] if "tl.load" in line] for group in ("rows", "columns"))
    assert [re.search(r"mask=(.*), other=0", line)[1] for line in rows + columns] == [
        f"({rows[0].split(' = ')[0]}_0 >= 0) & ({rows[0].split(' = ')[0]}_0 < t0_size0_32)",
        "(kv < t0_size0_32)",  # a column is never negative
    ]
    (divisor,) = (line for line in text.lines["pairs"] if "== 0, 1," in line)
    assert re.fullmatch(r"(x\d+_d) = tl\.where\(kv\[None, :\] == 0, 1, kv\[None, :\]\)", divisor)
    assert all("// kv" not in line and "% kv" not in line for line in text.lines["pairs"] if not line.startswith("#"))


@pytest.mark.parametrize(("narrow", "bits"), [(True, 32), (False, 64)])
def test_a_shift_stays_below_the_bits_there_are(narrow, bits):
    """Beyond them it is undefined in LLVM, though numpy knows an answer."""
    text, _ = emitted(lambda b, h, q, kv: q << kv > q >> kv, narrow=narrow)
    shifts = [line for line in text.lines["pairs"] if not line.startswith("#") and ("<<" in line or ">>" in line)]
    assert len(shifts) == 2
    assert all(f"(kv[None, :] < {bits})" in line and f"(kv[None, :] & {bits - 1})" in line for line in shifts)


def test_another_number_is_the_same_text():
    def window(n):
        return lambda b, h, q, kv: q - kv < n

    first, *others = (emitted(window(n))[0] for n in (0, 1, 7, 1024))
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, torch.float32) for op in ("floordiv", "mod", "fmod")] + [("truncdiv", torch.float16), ("mod", torch.float64)],
)
def test_what_has_no_exact_counterpart_is_refused(op, dtype):
    build = Builder()
    x = build.add("cast", build.add("q", dtype=torch.int64), dtype=dtype)
    y = build.add("cast", build.add("kv", dtype=torch.int64), dtype=dtype)
    expr = build.finish(build.add("lt", build.add(op, x, y), y))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(BackendError, match=rf"no exact `{op}` for {kind}; compute it outside the mask, into a table"):
        emit(expr, (), narrow=True)


def edge(op, y, dtype):
    """Whether an operation on table 0, with a number, gives what table 1 holds."""
    build = Builder()

    def table(slot):
        return build.add("lookup", build.add("kv", dtype=torch.int64), dtype=dtype, value=slot, weak=False)

    value = build.add(op, table(0), build.const(y)) if y is not None else build.add(op, table(0))
    return build.finish(build.add("eq", value, table(1)))


EDGES = torch.tensor(
    [2**63 - 1, -(2**63), -(2**63) + 1, 2**62, -1, 0, 1, 2**31, -(2**31), 2**31 - 1, 7, -7, 6, -6, 3, -3]
)


@pytest.mark.parametrize("y", [1, 2, 3, 7, 64, -3, 2**40])
@pytest.mark.parametrize("op", DIVISIONS)
def test_divisions_are_exact_to_the_ends_of_the_range(device, op, y):
    expected = {
        "floordiv": [v // y for v in EDGES.tolist()],
        "mod": [v % y for v in EDGES.tolist()],
        "truncdiv": [abs(v) // abs(y) * (1 if (v < 0) == (y < 0) else -1) for v in EDGES.tolist()],
        "fmod": [abs(v) % abs(y) * (1 if v >= 0 else -1) for v in EDGES.tolist()],
    }[op]
    inputs = Inputs((), (EDGES, torch.tensor(expected)))
    assert run(edge(op, y, torch.int64), inputs, device=device).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rounding_to_even_and_the_neighbours_of_a_half(device):
    half = torch.tensor(0.5)
    values = torch.tensor(
        [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, 1e10, -1e30, 8388609.0, -0.25, 0.75, math.inf, 4194304.5]
    )
    near = [torch.nextafter(half, torch.tensor(x)) for x in (0.0, 1.0)]
    values = torch.cat([values, torch.stack(near)])
    for op in ROUNDING:
        inputs = Inputs((), (values, getattr(torch, op)(values)))
        assert run(edge(op, None, torch.float32), inputs, device=device).all(), op


COMPILED = """
import sys

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, sys.argv[1])
import test_emit as t
from maskflash.backends.triton import modules

def compiled(predicate):
    traced = t.trace(predicate)
    inputs = traced.bind({})
    text = t.kernel_text(traced.expr, tuple(map(t.TableKind.of, inputs.tables)), False, False)
    kernel = modules.load(text).tile
    pointers = {f"t{n}": "*" + t.NAMES[x.dtype] for n, x in enumerate(inputs.tables)}
    types = {name: pointers.get(name, "i64") for name in kernel.arg_names}
    types |= {"out": "*i32", "SIDE": "constexpr"}
    source = ASTSource(kernel, types, {"SIDE": 16}, {})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]

F, U, M, H = torch.ones(16), torch.ones(16, dtype=torch.uint8), torch.ones(16, dtype=torch.bool), torch.ones(16).half()
"""


def test_real_numbers_are_computed_by_the_instructions_that_torch_means(tmp_path):
    """What the interpreter's numpy does by itself, and a GPU only if told to."""
    out = compile_in_a_process(
        """
        print("PRODUCT", compiled(lambda b, h, q, kv: F[q] * F[kv] + F[b] < 0))
        print("SMALLER", compiled(lambda b, h, q, kv: torch.minimum(F[q], F[kv]) < 0))
        print("BYTE", compiled(lambda b, h, q, kv: F[q].to(torch.uint8) < 3))
        print("RATIO", compiled(lambda b, h, q, kv: torch.sqrt(F[q] / F[kv]) < 3))
        """,
        tmp_path,
    )
    product, smaller, byte, ratio = re.split("PRODUCT|SMALLER|BYTE|RATIO", out)[1:]
    # LLVM and ptxas fuse a product into a sum wherever they see one; torch rounds in between.
    products, sums = (re.findall(rf"\b{name}\.(?:rn\.)?f32\b.*", product) for name in ("(?:mul|fma)", "add"))
    assert products
    assert len(products) == len(sums)
    assert all(line.startswith("fma") and line.endswith(", 0f00000000;") for line in products)
    assert "min.NaN.f32" in smaller
    assert "cvt.rzi.s64.f32" in byte  # straight to unsigned, negative numbers would become 0
    assert "div.rn.f32" in ratio
    assert "sqrt.rn.f32" in ratio


def test_every_kind_of_statement_compiles_for_a_gpu(tmp_path):
    """What the interpreter forgives: types that don't meet, conditions that are no truth values."""
    out = compile_in_a_process(
        """
        masks = [
            lambda b, h, q, kv: True,
            lambda b, h, q, kv: M[h],
            lambda b, h, q, kv: U[q] + 200 > U[kv] and U[q] // 3 != U[kv] % U[b],
            lambda b, h, q, kv: (q // 7 == kv // 7) | ((q - kv) % -3 == 1) | (q << 3 > kv >> (q & 7)),
            lambda b, h, q, kv: torch.where(M[q], q, 3) == torch.where(M[kv], 2**40, 5),
            lambda b, h, q, kv: torch.minimum(F[q], F[kv]) * 0.1 < q / 3 + 0.7,
            lambda b, h, q, kv: torch.round(F[q]) == torch.trunc(H[kv] / 3) and torch.sqrt(F[kv]) < float("inf"),
            lambda b, h, q, kv: torch.floor(H[q]) <= abs(-H[kv]) and F[q].to(torch.uint8) == U[kv],
            lambda b, h, q, kv: (F[q].double() * 1e-300 < F[kv].double() / 3) ^ M[kv],
            lambda b, h, q, kv: max(q - 5, 0) <= kv <= min(q + 5, 1000) and not M[kv] and ~q != kv,
        ]
        for mask in masks:
            assert "visible entry" in compiled(mask).replace(".entry", "entry")
        print("DONE")
        """,
        tmp_path,
    )
    assert "DONE" in out


NAMES = {
    **{
        torch.bool: "u8",
        torch.uint8: "u8",
        torch.int32: "i32",
        torch.int64: "i64",
        torch.float32: "fp32",
        torch.float16: "fp16",
    },
}


def compile_in_a_process(script, folder):
    """Without the interpreter; warnings of Triton's are errors."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    path = folder / "script.py"  # the tracer reads the source
    path.write_text(COMPILED + textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(path), os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
