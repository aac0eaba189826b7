"""A score function in a call -> what was decided about it, and why, for people and for tools."""

from __future__ import annotations

from typing import Any

from maskflash.expr.format import format_expr
from maskflash.functions.function import Bound, Function
from maskflash.functions.sizes import Sizes
from maskflash.scores.form import Form, form_of
from maskflash.scores.lifting import lift
from maskflash.scores.score import Score, own_arguments


def told(score: Score, sizes: Sizes, args: dict[str, Any]) -> dict[str, Any]:
    """The facts as plain data: name, value, class and why, and what of the function is a mask."""
    slots, params, tables = Function.bind(score, sizes, own_arguments(score, args))
    bound = Bound(slots, params, tables)
    split, values, names = lift(slots.expr), bound.inputs.params, slots.names
    form = form_of(split.rest)
    obstacle = None if form.obstacle is None else format_expr(split.rest.part(form.obstacle), values, names)
    return {
        "name": score.name,
        "value": format_expr(split.rest, values, names),
        "class": form.kind,
        "why": _why(form, obstacle),
        "lifted": None if split.mask is None else format_expr(split.mask, values, names),
        "tables": {name: list(table.shape) for name, table in zip(names, tables, strict=True)},
    }


def _why(form: Form, obstacle: str | None) -> str:
    if form.kind == "general":
        return f"{obstacle} is not linear in the score" if obstacle else "its factor depends on the query and the key"
    side = "k" if form.of_columns else "q"
    factor = f"its factor goes into {side}" if form.factor is not None else ""
    bias = "what it adds does not depend on the score" if form.kind == "additive" else ""
    return ", ".join(filter(None, (factor, bias))) or "it leaves the score as it is"
