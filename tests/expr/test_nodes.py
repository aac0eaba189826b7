"""Expressions are shared graphs in evaluation order, and their text says all of their structure."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskflash.errors import MaskTraceError
from maskflash.expr.format import format_expr
from maskflash.expr.nodes import Builder, Expr, Node, Source, parse, promote, result_type
from maskflash.trace.trace import trace

DOC = torch.tensor([0, 0, 1])
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(data=st.data())
@settings(max_examples=60)
def test_parsing_the_text_gives_the_expression_back(data, texts, brute):
    try:
        expr = trace(brute.compile(data.draw(texts, label="predicate"))).expr
    except MaskTraceError:
        return
    assert parse(expr.text) == expr
    assert parse(expr.text).text == expr.text


@pytest.mark.parametrize(
    "value",
    [0, -7, 2**62, 0.1, -0.0, 1e300, 5e-324, float("inf"), float("-inf"), True, False],
)
def test_constants_survive_the_text(value):
    builder = Builder()
    expr = builder.finish(builder.const(value))
    (node,) = parse(expr.text).nodes
    assert type(node.value) is type(value)
    assert node == expr.nodes[0]
    assert math.copysign(1, node.value) == math.copysign(1, value)


def test_nan_survives_the_text():
    builder = Builder()
    (node,) = parse(builder.finish(builder.const(float("nan"))).text).nodes
    assert math.isnan(node.value)


def test_equal_nodes_are_shared():
    builder = Builder()
    q, kv = (builder.add(name, dtype=torch.int64) for name in ("q", "kv"))
    assert builder.add("sub", q, kv) == builder.add("sub", q, kv)
    assert builder.add("sub", q, kv) != builder.add("sub", kv, q)
    assert builder.const(1) != builder.const(True)
    assert builder.const(0.0) != builder.const(-0.0)
    assert builder.const(1) != builder.const(1.0)
    assert builder.add("add", q, kv) != builder.add("add", q, kv, dtype=torch.int32)


def test_finishing_keeps_only_what_the_root_needs():
    builder = Builder()
    q, kv = (builder.add(name, dtype=torch.int64) for name in ("q", "kv"))
    builder.add("mul", q, q)
    root = builder.add("ge", q, kv)
    builder.add("mul", kv, kv)
    expr = builder.finish(root)
    assert [node.op for node in expr.nodes] == ["q", "kv", "ge"]
    assert expr.text == "q:int64();kv:int64();ge:bool(0,1)"


def test_operands_come_first_and_last_uses_are_known():
    expr = trace(lambda b, h, q, kv: q >= kv and DOC[q] == DOC[kv] and q - kv < 3).expr
    for position, node in enumerate(expr.nodes):
        assert all(arg < position for arg in node.args)
        for arg in node.args:
            assert expr.last_use[arg] >= position
    assert expr.last_use[-1] == len(expr.nodes)


def test_sources_do_not_count():
    nodes = (Node("q", (), torch.int64),)
    here, there = Source("f", "a.py", 1, "q"), Source("g", "b.py", 2, "q")
    assert Expr(nodes, (here,)) == Expr(nodes, (there,)) == Expr(nodes)
    assert hash(Expr(nodes, (here,))) == hash(Expr(nodes))
    assert Expr(nodes, (here,)).source(0) == here
    assert Expr(nodes).source(0) is None
    assert str(here) == "f (a.py:1)"


def test_appending_renames_and_shares():
    inner = trace(lambda b, h, q, kv: q - kv < 3).expr
    builder = Builder()
    first = builder.append(inner)
    shifted = builder.append(
        inner, lambda node: Node(node.op, node.args, node.dtype, node.weak, 5) if node.op == "param" else node
    )
    both = builder.finish(builder.add("and", first, shifted))
    assert sum(node.op == "sub" for node in both.nodes) == 1
    assert both.slots("param") == 6
    assert both.slots("lookup") == 0


def test_formatting_reads_as_python():
    expr = trace(lambda b, h, q, kv: q >= kv and DOC[q] == DOC[kv] and not 0 <= q - kv < 4).expr
    text = format_expr(expr, params=(0, 4), tables=("doc",))
    assert text.splitlines()[0] == "t7 = q - kv"
    assert "doc[q] == doc[kv]" in text
    assert "t7 < 4" in text
    plain = format_expr(trace(lambda b, h, q, kv: (q + 1) * kv > 2 if kv else -q == abs(kv)).expr)
    assert plain == "(((q + p0) * kv) > p1) if bool(kv) else (-q == abs(kv))"
    assert str(trace(lambda b, h, q, kv: q >= kv).expr) == "q >= kv"


def tensor_of(dtype):
    return torch.ones((), dtype=dtype)


@pytest.mark.parametrize("x", DTYPES)
def test_promotion_is_torch_s(x):
    strong = Node("lookup", (), x)
    for y in DTYPES:
        other = Node("lookup", (), y)
        assert promote(strong, other) == ((tensor_of(x) * tensor_of(y)).dtype, False)
    for number in (True, 3, 0.5):
        weak = Builder()
        node = weak.nodes[weak.const(number)]
        expected = (tensor_of(x) * number).dtype
        assert promote(strong, node) == promote(node, strong) == (expected, False)
        assert result_type("truediv", [strong, node])[0] == (tensor_of(x) / number).dtype


def test_a_condition_that_is_an_if_itself_keeps_its_parentheses():
    expr = trace(lambda b, h, q, kv: (q if (kv > 1 if q > 2 else kv > 3) else b) > 4).expr
    assert format_expr(expr, (2, 1, 3, 4)) == "(q if ((kv > 1) if q > 2 else (kv > 3)) else b) > 4"
