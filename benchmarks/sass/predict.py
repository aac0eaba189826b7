"""A kernel's machine code, its warps and how many programs fit -> a predicted speed of each of its loops.

speed = EFFICIENCY * (least of simulation, L2 cache and shared memory, rounded where two are near)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Final

from benchmarks.processors import PROCESSORS
from benchmarks.sass.instructions import Loop
from benchmarks.sass.simulate import Bulk, Part, simulate
from benchmarks.sass.work import Kind, works

EFFICIENCY: Final = 0.8  # what prologues, epilogues, uneven programs and clocks leave, of long sequences
_L2_BYTES: Final = 30.0  # a cycle and multiprocessor, when all read: 7 TB/s of an H100
_SHARED_BYTES: Final = 128.0
_SHARPNESS: Final = 6  # of the least


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of a loop.

    Attributes:
        tflops: a second, of the products that the loop computes.
        instructions: of a turn.
        turn: cycles that a warp takes for it.
        tensor_share: of the time that the tensor cores compute.
        lost: cycles of the turn in which the warp could not go on, by what it waited for.
    """

    tflops: float
    instructions: int
    turn: float
    tensor_share: float
    lost: dict[str, float]


def predict(
    roles: Sequence[tuple[Loop, int]],
    arch: int,
    programs: int,
    *,
    bulk: Bulk,
    depths: Mapping[int, int],
    seeds: tuple[int, ...] = (1, 2),
    cycles: int = 50_000,
) -> Prediction:
    """How fast loops that run together would run if the whole chip did nothing else.

    Args:
        roles: the instructions of each role's loop, and how many warps of a program run it; those with products first.
        arch: compute capability times ten.
        programs: that fit a multiprocessor.
        bulk: how bulk copies (TMA) are made.
        depths: how many mbarriers the ring at each place has.
        seeds: of the runs that are averaged.
        cycles: of each run.
    """
    processor = PROCESSORS[arch]
    assert processor.product_cycles is not None
    parts = [Part(works(loop, processor.product_cycles), max(1, warps // 4)) for loop, warps in roles]
    runs = [simulate(parts, programs, bulk=bulk, depths=depths, cycles=cycles, seed=seed) for seed in seeds]
    limits = [mean(run.flops_per_cycle for run in runs), *_limits(parts, bulk.size)]
    least = sum(limit**-_SHARPNESS for limit in limits) ** (-1 / _SHARPNESS)
    reasons = dict.fromkeys(why for run in runs for why in run.lost)
    return Prediction(
        EFFICIENCY * least * processor.multiprocessors * processor.gigahertz / 1e3,
        len(roles[0][0]),
        mean(run.turn for run in runs),
        mean(run.tensor_share for run in runs),
        {why: mean(run.lost.get(why, 0.0) for run in runs) for why in reasons},
    )


def _limits(parts: Sequence[Part], bulk_bytes: float) -> list[float]:
    """Operations a cycle that the L2 cache and shared memory allow."""
    bulk = bulk_bytes * sum(work.share for part in parts for work in part.turn if work.kind is Kind.BULK_COPY)
    flops, copied, shared = (
        sum(part.warps * getattr(work, what) for part in parts for work in part.turn)
        for what in ("flops", "size", "shared")
    )
    limits = (copied + bulk) / _L2_BYTES, shared + bulk / _SHARED_BYTES
    return [flops / cycles for cycles in limits if cycles]
