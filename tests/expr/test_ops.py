"""What the table of operations says is what torch and Python do, and what other tables are held against."""

import itertools

import pytest
import torch

from maskflash.backends.triton.emit import TableKind, emit
from maskflash.errors import BackendError
from maskflash.expr.nodes import Builder
from maskflash.expr.ops import COMPARISONS, OPERATIONS

NUMBERS = torch.tensor([-7, -3, -1, 0, 1, 2, 5, 9])
X, Y = NUMBERS[:, None], NUMBERS[None, :]
COMPUTED = [row for row in OPERATIONS.values() if row.compute]


def operands(row, dtype=torch.int64):
    """Every pair of numbers, with divisors and counts that the operation has a value for."""
    right = torch.where(Y <= 0, 3, Y) if row.fixes in ("divisor", "count") else Y
    return [x.to(dtype) for x in (X, right)][: row.arity]


@pytest.mark.parametrize("op", sorted(COMPARISONS))
def test_comparisons_have_their_opposites_and_mirrors(op):
    row = OPERATIONS[op]
    holds = row.compute(X, Y)
    assert torch.equal(OPERATIONS[row.opposite].compute(X, Y), ~holds)
    assert torch.equal(OPERATIONS[row.mirrored].compute(Y, X), holds)


@pytest.mark.parametrize("row", [row for row in COMPUTED if row.symbol], ids=lambda row: row.name)
def test_symbols_are_pythons(row):
    x, y = operands(row)
    for a, b in itertools.product(x.flatten().tolist(), y.flatten().tolist()):
        computed = row.compute(torch.tensor(a), torch.tensor(b)).item()
        expected = eval(f"a {row.symbol} b", {"a": a, "b": b})
        assert computed == pytest.approx(bool(expected) if row.name in ("and", "or") else expected)


@pytest.mark.parametrize("row", COMPUTED, ids=lambda row: row.name)
def test_every_name_is_a_torch_function_or_method_that_does_the_same(row):
    args = operands(row)
    for name in row.called:
        function = getattr(torch, name, None) or getattr(torch.Tensor, name)
        torch.testing.assert_close(function(*args), row.compute(*args), rtol=0, atol=0, equal_nan=True)
    if row.method:
        assert torch.equal(getattr(torch.Tensor, f"__{row.method}__")(*args), row.compute(*args))


@pytest.mark.parametrize("row", COMPUTED, ids=lambda row: row.name)
def test_torch_takes_what_the_table_says(row):
    for dtype, taken in ((torch.bool, row.of_truths), (torch.float32, row.of_reals)):
        try:
            row.compute(*operands(row, dtype))
        except (RuntimeError, NotImplementedError):
            assert not taken
        else:
            assert taken or dtype == torch.bool  # torch lets some pass that mean nothing of truths


@pytest.mark.parametrize("row", [row for row in COMPUTED if row.settled is not None], ids=lambda row: row.name)
def test_one_operand_settles_a_connective(row):
    other = torch.tensor([False, True])
    for settled in (row.compute(torch.tensor(row.settled), other), row.compute(other, torch.tensor(row.settled))):
        assert settled.tolist() == [row.settled] * 2


@pytest.mark.parametrize("row", [row for row in COMPUTED if not row.inexact], ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_triton_has_every_operation_or_refuses_it_by_name(row, dtype):
    builder = Builder()
    if row.name in ("and", "or", "not"):
        dtype = torch.bool
    elif not {torch.bool: row.of_truths, torch.float32: row.of_reals}.get(dtype, True):
        return  # torch has none
    args = [builder.add("lookup", builder.add(name, dtype=torch.int64), dtype=dtype, value=0) for name in ("q", "kv")]
    root = builder.add(row.name, *args[: row.arity])
    expr = builder.finish(builder.add("cast", root, dtype=torch.bool))
    try:
        written = emit(expr, [TableKind(dtype, 1)], narrow=False)
    except BackendError as refused:
        assert f"no exact `{row.name}` for {str(dtype).removeprefix('torch.')}" in str(refused)
        assert dtype.is_floating_point or row.name == "fmod"
    else:
        assert any(
            line.startswith(f"x{len(expr.nodes) - 2} = ") for line in (*written.lines["rows"], *written.lines["pairs"])
        )
