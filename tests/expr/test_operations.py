"""docs/analysis.md says of every operation what formulas and columns make of it, and what it says is so."""

import re
from pathlib import Path

import pytest
import torch

from maskflash.analysis.ways.cuts import find_cuts
from maskflash.analysis.ways.separate import separate
from maskflash.expr.nodes import Builder
from maskflash.expr.ops import COMPARISONS, OPERATIONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "analysis.md"
TABLE = re.search(r"<!-- operations -->\n(.*?)<!-- end operations -->", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE[1].splitlines()[2:]]
SAID = {op: row[1:] for row in ROWS for op in row[0].split(", ")}


def masks_of(op, limit):
    """The operation on the row's side of a comparison with kv or a number, and (of bools) on two comparisons."""
    for truths in (False, True):
        builder = Builder()
        q, kv = (builder.add(name, dtype=torch.int64) for name in ("q", "kv"))
        if op in ("q", "kv", "b", "h"):
            operand = builder.add(op, dtype=torch.int64)
            yield builder.finish(builder.add("ge", operand if op != "kv" else q, kv))
            return
        against = kv if limit == "kv" else builder.const(3)
        five, known = builder.const(5), builder.add("param", dtype=torch.int64, weak=True, value=0)
        if op in ("const", "param"):
            yield builder.finish(builder.add("ge", builder.add("add", q, five if op == "const" else known), against))
            return
        if op in ("lookup", "cast"):
            made = builder.add(op, q, dtype=torch.int64, value=0 if op == "lookup" else None)
            yield builder.finish(builder.add("ge", made, against))
            return
        left, right = builder.add("gt", q, five), builder.add("gt", q, kv)
        if op in COMPARISONS or op in ("and", "or", "not"):
            operands = [left, right] if op in ("and", "or", "not") else [q, kv]
            yield builder.finish(builder.add(op, *operands[: OPERATIONS[op].arity]))
            return
        if op == "select":
            yield builder.finish(builder.add("ge", builder.add(op, left, q, five), against))
            return
        operands = [left, right] if truths else [q, five]
        try:
            made = builder.add(op, *operands[: OPERATIONS[op].arity])
        except (RuntimeError, TypeError):
            return
        if truths and builder.nodes[made].dtype == torch.bool and op.startswith("bit"):
            yield builder.finish(made)
        elif not truths:
            yield builder.finish(builder.add("ge", made, against))


def test_the_table_has_every_operation_of_masks():
    assert set(SAID) == {row.name for row in OPERATIONS.values() if not row.inexact} - {"score"}


@pytest.mark.parametrize("op", sorted(SAID))
def test_formulas(op):
    served = [find_cuts(mask, (7,)) is not None for mask in masks_of(op, "a number")]
    assert served and any(served) == (SAID[op][0] != "no")


@pytest.mark.parametrize("op", sorted(SAID))
def test_columns(op):
    floats = op in ("truediv", "sqrt")  # comparisons of floats don't separate
    served = [separate(mask) is not None for mask in masks_of(op, "kv")]
    assert served and (all(served) or floats)
