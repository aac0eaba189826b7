"""The class of a score function is the simplest that holds, and its parts put together are the function."""

import pytest
import torch

from maskflash.expr.evaluate import Inputs, compute
from maskflash.scores.form import form_of
from maskflash.scores.score import ROLES
from maskflash.trace.trace import trace
from tests.scores.pairs import SHAPE, indices, scores

ROWS = torch.linspace(-1, 2, 7, dtype=torch.float64)
COLUMNS = torch.linspace(0.5, 3, 7, dtype=torch.float64)
HEADS = torch.tensor([0.5, 1.5, -0.25], dtype=torch.float64)
SCALAR = torch.tensor(0.75, dtype=torch.float64)
SIDES = {"": frozenset(), "row": frozenset("bhq"), "column": frozenset(("b", "h", "kv"))}

CASES = [
    # folded: the score, times a factor of rows or of columns
    (lambda score, b, h, q, kv: score, "folded", None),
    (lambda score, b, h, q, kv: score * 2.5, "folded", ""),
    (lambda score, b, h, q, kv: -score / SCALAR, "folded", ""),
    (lambda score, b, h, q, kv: score * HEADS[h] * ROWS[q], "folded", "row"),
    (lambda score, b, h, q, kv: COLUMNS[kv] * score / 3, "folded", "column"),
    (lambda score, b, h, q, kv: score * (1 + torch.log1p(torch.floor((q + 1) / 4.0))), "folded", "row"),
    (lambda score, b, h, q, kv: score + score * ROWS[q], "folded", "row"),
    (lambda score, b, h, q, kv: torch.where(q > 3, score * 2, score), "folded", "row"),
    (lambda score, b, h, q, kv: score - score, "folded", ""),
    # additive: and a bias of the pair
    (lambda score, b, h, q, kv: score + HEADS[h] * (kv - q), "additive", None),
    (lambda score, b, h, q, kv: ROWS[q] - COLUMNS[kv] - score, "additive", ""),
    (lambda score, b, h, q, kv: (score + ROWS[q]) * HEADS[h] - 1, "additive", "row"),
    (lambda score, b, h, q, kv: torch.where(q > kv, score + ROWS[q], score), "additive", None),
    (lambda score, b, h, q, kv: torch.where(q > 2, score * 0.5, ROWS[kv]), "additive", "row"),
    (lambda score, b, h, q, kv: score * COLUMNS[kv] + torch.tanh(ROWS[q]), "additive", "column"),
    (lambda score, b, h, q, kv: ROWS[q] * COLUMNS[kv], "additive", ""),
    (lambda score, b, h, q, kv: 1.0, "additive", ""),
    # general: anything else
    (lambda score, b, h, q, kv: 5 * torch.tanh(score / 5), "general", None),
    (lambda score, b, h, q, kv: score * ROWS[q] * COLUMNS[kv], "general", None),
    (lambda score, b, h, q, kv: score * score, "general", None),
    (lambda score, b, h, q, kv: torch.where(score > 0, score, ROWS[q]), "general", None),
    (lambda score, b, h, q, kv: torch.where(q > kv, score * 2, score), "general", None),
    (lambda score, b, h, q, kv: torch.maximum(score, ROWS[q]), "general", None),
    (lambda score, b, h, q, kv: abs(score) + 1, "general", None),
    (lambda score, b, h, q, kv: 1 / score, "general", None),
    (lambda score, b, h, q, kv: ROWS[q] ** score, "general", None),
    (lambda score, b, h, q, kv: score.half() + ROWS[q], "general", None),  # rounded, so not linear
]


@pytest.mark.parametrize(("function", "kind", "side"), CASES, ids=range(len(CASES)))
def test_classes(function, kind, side):
    traced = trace(function, role=ROLES[torch.float64])
    form = form_of(traced.expr)
    assert form.kind == kind
    if kind == "general":
        assert form.factor is None
        assert form.bias is None
        return
    assert (form.factor is None) == (side is None)
    if form.factor is not None:
        assert form.factor.reads <= SIDES[side]
        assert form.of_columns == (side == "column")
        assert not any(node.op == "score" for node in form.factor.nodes)
    assert (form.bias is None) == (kind == "folded")
    inputs, pairs = Inputs(traced.params, traced.tables), {**indices(), "score": scores()}
    parts = (1.0 if part is None else compute(part, inputs, pairs)[0] for part in (form.factor,))
    (factor,) = parts
    bias = 0.0 if form.bias is None else compute(form.bias, inputs, pairs)[0]
    expected = compute(traced.expr, inputs, pairs)[0].expand(SHAPE)
    torch.testing.assert_close((scores() * factor + bias).expand(SHAPE), expected)


def test_the_obstacle_is_where_it_stops_being_linear():
    expr = trace(lambda score, b, h, q, kv: torch.tanh(score / 5.0) + q, role=ROLES[torch.float32]).expr
    assert expr.nodes[form_of(expr).obstacle].op == "tanh"
    expr = trace(lambda score, b, h, q, kv: score * ROWS[q] * COLUMNS[kv], role=ROLES[torch.float32]).expr
    assert form_of(expr).obstacle is None  # linear, but the factor belongs to neither side


def test_parts_are_no_narrower_than_the_score():
    """Two terms that are added to the score one after the other are not added to each other in their own dtype."""
    x, y = (torch.linspace(0.1, 3, 7).to(torch.bfloat16) for _ in range(2))
    for function in (
        lambda score, b, h, q, kv: score + x[q] + y[kv],
        lambda score, b, h, q, kv: (score + x[q]) * y[q] * x[q],
        lambda score, b, h, q, kv: y[kv] - (x[q] - score) / y[q],
    ):
        traced = trace(function, role=ROLES[torch.float32])
        form = form_of(traced.expr)
        inputs, pairs = Inputs(traced.params, traced.tables), {**indices(), "score": scores(dtype=torch.float32)}
        bias, factor = (1.0 if part is None else compute(part, inputs, pairs)[0] for part in (form.bias, form.factor))
        expected = compute(traced.expr, inputs, pairs)[0].expand(SHAPE)
        torch.testing.assert_close((pairs["score"] * factor + bias).expand(SHAPE), expected)
