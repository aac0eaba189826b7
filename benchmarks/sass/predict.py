"""A kernel's machine code, its warps and how many programs fit -> a predicted speed of each of its loops.

speed = EFFICIENCY * (least of simulation, L2 cache and shared memory, rounded where two are near)
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Final

from benchmarks.processors import PROCESSORS
from benchmarks.sass.instructions import Loop
from benchmarks.sass.simulate import simulate
from benchmarks.sass.work import Kind, Work, works

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
    """

    tflops: float
    instructions: int
    turn: float
    tensor_share: float


def predict(
    loop: Loop,
    arch: int,
    warps: int,
    programs: int,
    *,
    bulk: tuple[int, int] = (0, 0),
    seeds: tuple[int, ...] = (1, 2),
    cycles: int = 50_000,
) -> Prediction:
    """How fast a loop would run if the whole chip did nothing else.

    Args:
        loop: its instructions.
        arch: compute capability times ten.
        warps: of a program.
        programs: that fit a multiprocessor.
        bulk: bytes of one bulk copy (TMA), and how many turns ahead the program copies.
        seeds: of the runs that are averaged.
        cycles: of each run.
    """
    processor = PROCESSORS[arch]
    assert processor.product_cycles is not None
    turn, each = works(loop, processor.product_cycles), max(1, warps // 4)
    runs = [simulate(turn, each, programs, bulk=bulk, cycles=cycles, seed=seed) for seed in seeds]
    limits = [mean(run.flops_per_cycle for run in runs), *_limits(turn, each, bulk[0])]
    least = sum(limit**-_SHARPNESS for limit in limits) ** (-1 / _SHARPNESS)
    return Prediction(
        EFFICIENCY * least * processor.multiprocessors * processor.gigahertz / 1e3,
        len(loop),
        mean(run.turn for run in runs),
        mean(run.tensor_share for run in runs),
    )


def _limits(turn: list[Work], warps: int, bulk_bytes: int) -> list[float]:
    """Operations a cycle that the L2 cache and shared memory allow."""
    bulk = bulk_bytes * sum(work.kind is Kind.BULK_COPY for work in turn) / warps
    flops = sum(work.flops for work in turn)
    copied = sum(work.size for work in turn) + bulk
    shared = sum(work.shared for work in turn) + bulk / _SHARED_BYTES
    return [flops / cycles for cycles in (copied / _L2_BYTES, shared) if cycles]
