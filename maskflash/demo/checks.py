"""Holds one attention call against dense references: out, lse and gradients in float64, the block map tile by tile."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import maskflash as mf
from maskflash.backends.reference import error_budget, reference
from maskflash.demo.workload import SCALE, Workload

ROWS = 256  # of the score matrix at a time, one head at a time: twice as fast as 1,024, which leave the cache
RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True, slots=True)
class Check:
    """One result's largest error beside the largest it may be."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget; a NaN is not."""
        return self.error <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**asdict(self), "passed": self.passed}


def check_results(results: tuple[Tensor, ...], work: Workload, mask: Tensor, tick: Callable[[], None]) -> list[Check]:
    """Hold out, lse, dq, dk and dv against float64.

    A budget is twice the error of a plain dense computation in the inputs' dtype, plus one rounding unit.

    Args:
        results: out, lse, dq, dk and dv of the call under test.
        work: the inputs of that call.
        mask: (1, 1, S, S) bool.
        tick: called once for each head.

    Returns:
        One check for each result.
    """
    exact = tuple(torch.zeros_like(result, dtype=torch.float64) for result in results)
    plain = tuple(torch.zeros_like(result, dtype=torch.float64) for result in results)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # these are small operations: on a busy machine several threads wait for one another at each
    try:
        for head in range(work.q.shape[1]):
            _add_dense_head(exact, work, mask, head, torch.float64)
            _add_dense_head(plain, work, mask, head, work.q.dtype)
            tick()
    finally:
        torch.set_num_threads(threads)
    return [
        Check(name, _largest(result - truth), error_budget(own.to(work.q.dtype), truth))
        for name, result, truth, own in zip(RESULTS, results, exact, plain, strict=True)
    ]


def check_block_map(block_map: mf.BlockMap, mask: Tensor) -> Check:
    """Count the tiles whose kind is not what all their pairs say; there may be none.

    Args:
        block_map: of a mask that looks at neither batch nor head beyond the first.
        mask: (1, 1, Sq, Skv) bool, the same mask.
    """
    seen, area = mask[0, 0].int(), torch.ones_like(mask[0, 0], dtype=torch.int32)
    for axis, block in enumerate(block_map.block_size):
        seen, area = _sum_blocks(seen, axis, block), _sum_blocks(area, axis, block)
    kinds = (seen > 0).int() + (seen == area).int()
    return Check("tiles", float((block_map.kinds()[0, 0] != kinds).sum()), 0.0)


def _add_dense_head(into: tuple[Tensor, ...], work: Workload, mask: Tensor, head: int, dtype: torch.dtype) -> None:
    """Add one head's dense out, lse, dq, dk and dv, computed in `dtype` a band of rows at a time.

    Columns before the first and after the last that a band sees are left out: they add exactly nothing.
    """
    one = slice(head, head + 1)
    for rows in _bands(work.q.shape[2]):
        seen = mask[0, 0, rows].any(0).nonzero()
        columns = slice(int(seen.min()), int(seen.max()) + 1) if len(seen) else slice(0, 0)
        q = work.q[:, one, rows].detach().to(dtype).requires_grad_()
        k, v = (t[:, one, columns].detach().to(dtype).requires_grad_() for t in (work.k, work.v))
        out, lse = reference(q, k, v, mask[:, :, rows, columns], SCALE)
        arriving = work.dout[:, one, rows].to(out.dtype), work.dlse[:, one, rows].to(lse.dtype)
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), arriving)
        places = (rows, rows, rows, columns, columns)
        for whole, part, place in zip(into, (out, lse, dq, dk, dv), places, strict=True):
            whole[:, head, place] += part[:, 0].detach()


def _bands(length: int) -> Iterator[slice]:
    for start in range(0, length, ROWS):
        yield slice(start, min(start + ROWS, length))


def _sum_blocks(counts: Tensor, axis: int, block: int) -> Tensor:
    """Sums of `block` neighbours along an axis; the last block may be short."""
    return torch.stack([part.sum(axis) for part in counts.split(block, axis)], axis)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()
