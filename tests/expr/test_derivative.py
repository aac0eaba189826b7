"""Derivatives of score programs are those that torch's autograd finds, for every operation and every kind of table."""

import math

import pytest
import torch

from maskflash.expr.derivative import DERIVATIVES, ZERO, differentiate
from maskflash.expr.evaluate import Inputs, compute_several
from maskflash.expr.nodes import Builder, parse
from maskflash.expr.ops import OPERATIONS
from maskflash.scores.score import ROLES
from maskflash.trace.trace import trace

ROWS = 12
PAIRS = {
    "b": torch.zeros((), dtype=torch.int64),
    "h": torch.ones((), dtype=torch.int64),
    "q": torch.arange(ROWS)[:, None],
    "kv": torch.arange(ROWS)[None, :],
}
SCORE = torch.linspace(-2.5, 3.0, ROWS * ROWS, dtype=torch.float64).reshape(ROWS, ROWS)[:, torch.randperm(ROWS)]
POSITIVE = torch.linspace(0.3, 4.0, ROWS, dtype=torch.float64)
MIXED = torch.tensor([-3.1, -2.2, -1.3, -0.6, 0.4, 0.7, 1.2, 1.9, 2.6, 3.3, 4.1, 5.7], dtype=torch.float64)
WITH_TIES = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
LOGARITHMS = ("log", "log2", "sqrt", "rsqrt", "pow", "log1p")
OPERAND = {name: POSITIVE if name in LOGARITHMS else MIXED for name in DERIVATIVES}


def derived(expr, tables, params=(), score=SCORE):
    """The value of a program at all pairs, its derivative in the score, and the gradient of its sum to each table."""
    found = differentiate(expr)
    roots = [found.value, *([] if found.slope is None else [found.slope])]
    indices = [list(found.expr.nodes[place].args) for place, _ in found.lookups]
    for (_, root), args in zip(found.lookups, indices, strict=True):
        roots += [root, *args]
    pairs = {**PAIRS, "score": score}
    values, _ = compute_several(found.expr, Inputs(tuple(params), tuple(tables)), pairs, roots)
    value = values.pop(0).expand(score.shape)
    slope = torch.zeros_like(score) if found.slope is None else values.pop(0).expand(score.shape)
    gradients = [torch.zeros_like(table, dtype=torch.float64) for table in tables]
    for (place, _), args in zip(found.lookups, indices, strict=True):
        root, *at = (values.pop(0).expand(score.shape) for _ in range(1 + len(args)))
        total = gradients[found.expr.nodes[place].slot]
        if at:
            total.index_put_(tuple(at), root.double(), accumulate=True)
        else:
            total += root.double().sum()
    return value, slope, gradients


def follows_torch(function, *, dtype=torch.float64, score=SCORE, rough=False, **tables):
    """Check a function's traced value, slope and gradients against torch's own, of the function on whole tensors.

    `rough`: torch sums some gradients up in a narrower dtype.
    """
    traced = trace(function, tables, role=ROLES[dtype])
    given = list(traced.bind(tables).tables)
    value, slope, gradients = derived(traced.expr, given, traced.bind(tables).params, score.to(dtype))
    own = score.to(dtype).clone().requires_grad_()
    learned = {name: x.detach().clone() for name, x in tables.items()}
    real = [x.requires_grad_() for x in learned.values() if x.is_floating_point()]
    expected = function(own, *PAIRS.values(), **learned).expand(score.shape)
    wanted = torch.autograd.grad(expected.sum(), [own, *real], allow_unused=True, materialize_grads=True)
    near = {"check_dtype": False, "equal_nan": True}
    if dtype == torch.float64:
        near |= {"rtol": 1e-13, "atol": 1e-12}
    torch.testing.assert_close(value, expected.detach().to(dtype), **near)
    torch.testing.assert_close(slope, wanted[0], **near)
    of_slots = dict(zip(traced.tables, gradients, strict=True))
    for name, table in learned.items():
        if table.is_floating_point():
            expected_gradient = wanted[1 + [id(x) for x in real].index(id(table))]
            wide = near if table.dtype == torch.float64 and not rough else {**near, "rtol": 0.02, "atol": 0.02}
            found = of_slots.get(name, torch.zeros_like(table)).double()
            torch.testing.assert_close(found, expected_gradient.double(), **wide)
        else:
            assert not of_slots[name].any()


# ------------------------------------------------------------------------------------------------------- operations


def test_every_operation_has_a_derivative_or_none():
    for row in OPERATIONS.values():
        ways = [row.name in DERIVATIVES, row.name in ZERO]
        of_its_own = row.name in ("score", "select", "lookup", "const", "param", "b", "h", "q", "kv")
        real = row.gives != "truth" and row.of_reals and not of_its_own
        assert sum(ways) == (1 if real else 0), row.name
        if real and row.name in DERIVATIVES:
            assert len(DERIVATIVES[row.name]) == row.arity


def operation_on(op, x, y):
    """A program: the operation on a look-up by row and, if it takes two, one by column."""
    builder = Builder()
    tables = [x, y][: OPERATIONS[op].arity]
    names = [builder.add(name, dtype=torch.int64) for name in ("q", "kv")]
    args = [builder.add("lookup", names[n], dtype=t.dtype, weak=False, value=n) for n, t in enumerate(tables)]
    kind = {"dtype": torch.float64, "weak": False} if op == "cast" else {}
    return builder.finish(builder.add(op, *args, **kind)), tables


def torch_on(op, tables):
    own = [table.clone().requires_grad_() for table in tables]
    operands = [own[0][:, None], *(x[None, :] for x in own[1:])]
    compute = OPERATIONS[op].compute or (lambda x: x.double())
    return compute(*operands).expand(len(own[0]), len(own[-1])), own


@pytest.mark.parametrize("op", sorted(DERIVATIVES))
def test_every_derivative_is_torchs(op):
    expr, tables = operation_on(op, OPERAND[op], MIXED.flip(0) + 0.05)
    value, slope, gradients = derived(expr, tables)
    expected, own = torch_on(op, tables)
    torch.testing.assert_close(value, expected.detach().expand(value.shape), rtol=1e-15, atol=0)
    assert not slope.any()
    wanted = torch.autograd.grad(expected.expand(ROWS, ROWS).sum(), own)
    for found, gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("op", sorted({"abs", "min", "max", "pow", "sqrt", "mod", "fmod", "exp", "tanh", "truediv"}))
def test_derivatives_at_ties_and_zeros_are_torchs(op):
    if op == "pow":
        x, y = WITH_TIES.abs(), WITH_TIES.abs()
    else:
        x, y = WITH_TIES.abs() if op == "sqrt" else WITH_TIES, WITH_TIES
    if op in ("mod", "fmod", "truediv"):
        y = torch.where(WITH_TIES == 0, 2.0, WITH_TIES)
    expr, tables = operation_on(op, x, y)
    found = differentiate(expr)
    q, kv = torch.arange(len(x))[:, None], torch.arange(len(y))
    inputs = Inputs((), tuple(tables))
    roots = [root for _, root in found.lookups]
    values, _ = compute_several(found.expr, inputs, {**PAIRS, "q": q, "kv": kv, "score": q.double()}, roots)
    own = [t.clone().requires_grad_() for t in (x[:, None].expand(6, 6), y[None, :].expand(6, 6))][: len(tables)]
    computed = OPERATIONS[op].compute(*own)
    for value, gradient in zip(values, torch.autograd.grad(computed.sum(), own), strict=True):
        torch.testing.assert_close(value.expand(6, 6), gradient, rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", sorted(ZERO))
def test_what_is_rounded_has_no_derivative(op):
    expr, tables = operation_on(op, MIXED, POSITIVE)
    found = differentiate(expr)
    assert found.slope is None
    assert found.lookups == ()
    expected, own = torch_on(op, tables)
    if expected.requires_grad and op != "floordiv":  # torch has none
        for gradient in torch.autograd.grad(expected.sum(), own, allow_unused=True, materialize_grads=True):
            assert not gradient.any()


def test_the_program_comes_first_and_as_it_was():
    traced = trace(lambda score, b, h, q, kv: 5 * torch.tanh(score / 5) + kv, role=ROLES[torch.float64])
    found = differentiate(traced.expr)
    assert found.expr.nodes[: len(traced.expr.nodes)] == traced.expr.nodes
    assert found.value == len(traced.expr.nodes) - 1
    assert differentiate(parse(traced.expr.text)).expr.text == found.expr.text


def test_nothing_is_derived_that_nobody_wants():
    """Numbers of positions have no derivative, so their adjoints are not computed either."""
    scale = torch.tensor(2.0, dtype=torch.float64)
    function = lambda score, b, h, q, kv: score + torch.log1p((q - kv).abs().double()) ** 2 * 3.0  # noqa: E731
    traced = trace(function, role=ROLES[torch.float64])
    found = differentiate(traced.expr)
    assert [node.op for node in found.expr.nodes[found.value + 1 :]] == ["const"]
    assert found.expr.nodes[found.slope].value == 1.0
    traced = trace(lambda score, b, h, q, kv: score * scale, role=ROLES[torch.float64])
    found = differentiate(traced.expr)
    ops = [found.expr.nodes[root].op for root in (found.slope, *(root for _, root in found.lookups))]
    assert ops == ["lookup", "score"]


# -------------------------------------------------------------------------------------------------- whole functions

T = {"t": MIXED / 4, "u": POSITIVE / 3}


@pytest.mark.parametrize(
    "function",
    [
        lambda score, b, h, q, kv, *, t, u: 2 * torch.tanh(score / 2) + t[q] * u[kv],
        lambda score, b, h, q, kv, *, t, u: score + t[q] + t[kv],
        lambda score, b, h, q, kv, *, t, u: score * t[q] * t[kv] + t[(q - kv).abs()] ** 2,
        lambda score, b, h, q, kv, *, t, u: torch.where(q > kv, score * t[q], u[kv] - score),
        lambda score, b, h, q, kv, *, t, u: torch.where(score > t[q], score**2, torch.exp(score) * u[q]),
        lambda score, b, h, q, kv, *, t, u: torch.maximum(score, t[q]) + torch.minimum(score * 2, u[kv]),
        lambda score, b, h, q, kv, *, t, u: score.clamp(-1.0, 1.5) + torch.clamp(t[q], min=0.5),
        lambda score, b, h, q, kv, *, t, u: torch.log(u[q]) * torch.sigmoid(score) / (1 + u[kv]),
        lambda score, b, h, q, kv, *, t, u: torch.sin(torch.cos(score)) + torch.tan(t[kv] / 9) - torch.atan(score),
        lambda score, b, h, q, kv, *, t, u: u[q] ** t[kv] + score * u[kv] ** 2.5,
        lambda score, b, h, q, kv, *, t, u: 2.0 ** (t[q] * 0.3) * score + torch.erf(score * t[q]),
        lambda score, b, h, q, kv, *, t, u: torch.rsqrt(u[q]) * score + torch.expm1(score / 4) * torch.log1p(u[kv]),
        lambda score, b, h, q, kv, *, t, u: torch.exp2(score) - torch.log2(u[q]) - torch.sqrt(u[kv]) * score,
        lambda score, b, h, q, kv, *, t, u: score % 1.3 + torch.fmod(score, u[q]) + torch.floor(score) * t[q],
        lambda score, b, h, q, kv, *, t, u: (
            torch.nn.functional.softplus(score) + torch.nn.functional.silu(t[q] * score)
        ),
        lambda score, b, h, q, kv, *, t, u: torch.relu(score) + torch.nn.functional.logsigmoid(score * u[q]),
        lambda score, b, h, q, kv, *, t, u: score.square() - score.reciprocal() + 1 / u[q],
        lambda score, b, h, q, kv, *, t, u: t[q] + 0 * u[kv],  # the score is not looked at
        lambda score, b, h, q, kv, *, t, u: -score.neg().abs() + abs(t[kv]),
        lambda score, b, h, q, kv, *, t, u: score.masked_fill(q < kv, 1.5) * t[q],
    ],
    ids=range(20),
)
def test_functions_have_torchs_gradients(function):
    follows_torch(function, **T)


def test_look_ups_of_every_kind():
    square = torch.linspace(-1, 1, 2 * ROWS, dtype=torch.float64).reshape(2, ROWS)
    index = (torch.arange(ROWS) * 5) % ROWS
    follows_torch(
        lambda score, b, h, q, kv, *, square, index: score * square[h, index[q]] + square[b, kv],
        square=square,
        index=index,
    )
    follows_torch(lambda score, b, h, q, kv, *, t: score + t[-1 - q] - t[kv], t=MIXED)  # from the end
    follows_torch(lambda score, b, h, q, kv, *, x: score * x + x**2, x=torch.tensor(0.7, dtype=torch.float64))
    follows_torch(lambda score, b, h, q, kv, *, steps: score * steps[q] + steps[kv], steps=index)  # no gradient


@pytest.mark.parametrize("of_table", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_score", [torch.float32, torch.float64])
def test_tables_of_other_dtypes(of_table, of_score):
    t = (MIXED / 4).to(of_table)
    for function in (
        lambda score, b, h, q, kv, *, t: score + t[q],
        lambda score, b, h, q, kv, *, t: 3 * torch.tanh(score * t[q] / 3) + t[kv] * t[q],
        lambda score, b, h, q, kv, *, t: torch.where(q > kv, score * t[q].float(), t[kv].double()),
        lambda score, b, h, q, kv, *, t: torch.exp(t[q] * 2 + 1).to(score.dtype) - score / (t[kv] + 5),
    ):
        follows_torch(function, dtype=of_score, rough=True, t=t)


def test_python_numbers_take_the_dtype_of_what_they_meet():
    """Weak numbers never widen a derivative: all of it stays in the score's dtype."""
    function = lambda score, b, h, q, kv, *, c: c * torch.tanh(score / c) + 0.1 * (q - kv) + c**2  # noqa: E731
    for dtype in (torch.float32, torch.float64):
        traced = trace(function, {"c": 20.0}, role=ROLES[dtype])
        found = differentiate(traced.expr)
        assert found.expr.nodes[found.slope].dtype == dtype
        assert {n.dtype for n in found.expr.nodes[found.value + 1 :] if n.dtype.is_floating_point} == {dtype}
    value, slope, _ = derived(traced.expr, [], (20.0,))
    torch.testing.assert_close(slope, 1 - torch.tanh(SCORE / 20) ** 2)
    torch.testing.assert_close(value, 20 * torch.tanh(SCORE / 20) + 0.1 * (PAIRS["q"] - PAIRS["kv"]) + 400)


def test_casts_hand_derivatives_on_and_integers_do_not():
    follows_torch(lambda score, b, h, q, kv, *, t: score.double() * t[q].float().double(), rough=True, t=MIXED)
    traced = trace(lambda score, b, h, q, kv: score.long() + 0.5 * score, role=ROLES[torch.float64])
    found = differentiate(traced.expr)
    assert found.expr.nodes[found.slope].value == 0.5
    traced = trace(lambda score, b, h, q, kv: score.long().double(), role=ROLES[torch.float64])
    assert differentiate(traced.expr).slope is None


def test_branches_on_the_score_itself():
    def leaky(score, b, h, q, kv):
        if score > 0:
            return score
        return 0.1 * score

    traced = trace(leaky, role=ROLES[torch.float64])
    value, slope, _ = derived(traced.expr, [], traced.params)
    assert torch.equal(value, torch.where(SCORE > 0, SCORE, 0.1 * SCORE))
    assert torch.equal(slope, torch.where(SCORE > 0, torch.ones_like(SCORE), 0.1))


def test_a_value_of_minus_infinity_has_no_nan_beside_it():
    """What a select leaves out doesn't reach the derivative of what it takes."""
    traced = trace(lambda score, b, h, q, kv: torch.where(q > kv, score, -math.inf), role=ROLES[torch.float64])
    value, slope, _ = derived(traced.expr, [])
    below = PAIRS["q"] > PAIRS["kv"]
    assert torch.equal(slope, below.double())
    assert torch.equal(value, torch.where(below, SCORE, -math.inf))
