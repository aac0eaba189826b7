"""What do score functions, sinks and dropout cost? Beside the mask alone, beside dense torch, beside FlexAttention.

Run: python -m benchmarks.scores   (FlexAttention's part needs a C++ compiler)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import maskflash as mf
from benchmarks import fresh, runner, workloads
from benchmarks.runner import Contender, Row

TITLES: Final = {
    "dense": "Scores, B1 H8 D64 float32: maskflash beside matmul, score, mask and softmax of dense torch",
    "alone": "Scores, B1 H8 D64 float32: maskflash beside itself without the score; 1.00 is for free",
    "flex": "Scores, B1 H8 D64 float32, forward: maskflash beside FlexAttention, compiled for the CPU",
    "memory": "Soft-cap with its gradients, B1 H8 D64 float32: peak memory of the process over that of its inputs",
}
TOKENS: Final = (4096, 8192)
CAP: Final = 20.0
BUCKETS: Final = 32
DISTANCE: Final = 128
P: Final = 0.1
PEAK: Final = 400e6
DENSE_PAIRS: Final = 5
ALONE: Final = {"additive": 1 / 1.3, "soft-cap": 1 / 2.2, "sinks": 1 / 1.05, "dropout": 1 / 1.8}
DENSE: Final = {"additive": (8.0, 6.0), "soft-cap": (5.0, 4.0), "learned": (None, 4.0)}


@dataclass(frozen=True, slots=True)
class Case:
    """A score function, and the same for dense tensors and for FlexAttention.

    Attributes:
        name: what rows call it.
        kind: which floors it has.
        given: what `attention` is given.
        dense: what becomes of dense scores (H, S, S), given q - kv (S, S).
        flex: a score_mod; None where FlexAttention has none.
        learned: tensors whose gradients are asked for.
    """

    name: str
    kind: str
    given: dict[str, Any]
    dense: Callable[[Tensor, Tensor], Tensor] | None = None
    flex: Callable[..., Any] | None = None
    learned: tuple[Tensor, ...] = field(default=())


def cases() -> list[Case]:
    """The score functions that are measured."""
    slopes = torch.exp2(-torch.arange(1.0, workloads.HEADS + 1))
    table = torch.randn(BUCKETS, workloads.HEADS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bucket = mf.scores.presets.buckets(BUCKETS, True, DISTANCE)

    def alibi(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + slopes[h] * (kv - q)

    def capped(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return CAP * torch.tanh(score / CAP)

    def place(distance: Tensor) -> Tensor:
        return bucket[(-distance).clamp(-DISTANCE, DISTANCE) + DISTANCE]

    return [
        Case("ALiBi", "additive", {"score": alibi}, lambda s, d: s - slopes[:, None, None] * d, alibi),
        Case("soft-cap", "soft-cap", {"score": capped}, lambda s, d: CAP * torch.tanh(s / CAP), capped),
        Case(
            "T5's bias and its gradient",
            "learned",
            {"score": mf.scores.relative_bias(table)},
            lambda s, d: s + table[place(d)].permute(2, 0, 1),
            learned=(table,),
        ),
        Case("sinks", "sinks", {"sinks": torch.zeros(workloads.HEADS)}),
        Case("dropout 0.1", "dropout", {"dropout_p": P, "seed": 1}),
    ]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = runner.arguments("Measure score functions, sinks and dropout on the CPU.")
    parser.add_argument(
        "--others-up-to",
        type=int,
        default=TOKENS[-1],
        metavar="TOKENS",
        help="leave dense torch and FlexAttention out of longer sequences: they take most of the time",
    )
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out: its compiler takes a while")
    options = parser.parse_args(argv)
    pairs = 1 if options.quick else options.pairs
    rows: list[Row] = []
    for tokens in (256,) if options.quick else TOKENS:
        known = workloads.masks(tokens, options.seed)
        for name in ("causal documents", "causal window S/16"):
            for case in cases():
                rows += _alone(case, name, known[name], tokens, pairs, options.seed)
                if tokens > options.others_up_to:
                    continue
                rows += _beside_dense(case, name, known[name], tokens, min(pairs, DENSE_PAIRS), options.seed)
                if not options.no_flex:
                    rows += _beside_flex(case, name, known[name], tokens, pairs, options.seed)
    rows.append(_memory(384 if options.quick else TOKENS[-1], options.seed, 1 if options.quick else 3))
    return runner.finish("scores", TITLES, rows, options)


def _alone(case: Case, name: str, mask: mf.Mask, tokens: int, pairs: int, seed: int) -> list[Row]:
    """Forward, and forward with backward, beside the mask alone."""
    work = workloads.inputs(tokens, torch.float32, seed)
    with_score, without = _op(case, mask), partial(mf.attention, mask=mask)
    floor = ALONE.get(case.kind)
    with torch.no_grad():
        (ours,), (theirs,) = runner.alternate(
            *(runner.timed(partial(op, work.q, work.k, work.v)) for op in (with_score, without)), pairs
        )
    title = f"{case.name}, {name}"
    rows = [runner.compared("alone", title, tokens, "forward", ours, theirs, dtype="float32", floor=floor)]
    sides = (_step(with_score, work, case.learned), _step(without, work, ()))
    (_, ours), (_, theirs) = runner.alternate(*sides, pairs)
    floor = floor if case.kind in ("sinks", "dropout") else None
    measure = "forward + backward"
    return [*rows, runner.compared("alone", title, tokens, measure, ours, theirs, dtype="float32", floor=floor)]


def _beside_dense(case: Case, name: str, mask: mf.Mask, tokens: int, pairs: int, seed: int) -> list[Row]:
    """Forward, and forward with backward, beside what one writes in torch."""
    if case.dense is None:
        return []
    work = workloads.inputs(tokens, torch.float32, seed)
    visible = mask.dense(tokens, tokens)[0, 0].contiguous()
    places = torch.arange(tokens)
    distance = places[:, None] - places

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert case.dense is not None, "asked above"
        scores = case.dense(q @ k.mT * workloads.HEAD_DIM**-0.5, distance)
        return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v

    rows = []
    title = f"{case.name}, {name}"
    sides = (_step(_op(case, mask), work, case.learned), _step(dense, work, case.learned))
    ours, theirs = runner.alternate(*sides, pairs)
    measures = ("forward", "forward + backward")
    for measure, mine, its, floor in zip(measures, ours, theirs, DENSE[case.kind], strict=True):
        rows.append(runner.compared("dense", title, tokens, measure, mine, its, dtype="float32", floor=floor))
    return rows


def _beside_flex(case: Case, name: str, mask: mf.Mask, tokens: int, pairs: int, seed: int) -> list[Row]:
    """Forward beside FlexAttention, which has no backward on a CPU; its mask is ours, ready before the clock starts."""
    if case.flex is None:
        return []
    work = workloads.inputs(tokens, torch.float32, seed)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention)
    theirs = partial(compiled, score_mod=case.flex, block_mask=mask.to_block_mask(tokens, tokens))
    with torch.no_grad():
        q, k, v = (x.detach() for x in (work.q, work.k, work.v))
        try:
            (ours,), (its,) = runner.alternate(
                *(runner.timed(partial(op, q, k, v)) for op in (_op(case, mask), theirs)), pairs
            )
        except Exception as error:  # no compiler, or a CPU that it has no kernel for
            print(f"FlexAttention can't be compiled here: {type(error).__name__}", file=sys.stderr)
            return []
    title = f"{case.name}, {name}"
    return [runner.compared("flex", title, tokens, "forward", ours, its, dtype="float32", floor=1.0)]


def _op(case: Case, mask: mf.Mask) -> Callable[..., Tensor]:
    given = dict(case.given)
    return partial(mf.compile(mask, score=given.pop("score", None)), **given)


def _step(attend: Callable[..., Tensor], work: workloads.Inputs, learned: tuple[Tensor, ...]) -> Contender:
    """Seconds of forward, and of forward and backward."""

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        out = attend(work.q, work.k, work.v)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(out, (work.q, work.k, work.v, *learned), work.dout)
        end = time.perf_counter()
        del gradients
        return middle - start, end - start

    return run


def _memory(tokens: int, seed: int, samples: int) -> Row:
    """Peaks of processes of their own."""
    peaks = runner.Spread.of([fresh.run("memory", "soft-cap", str(tokens), str(seed)) for _ in range(samples)])
    case = "soft-cap, causal documents"
    return Row("memory", case, tokens, "peak memory", "float32", "B", samples, peaks, ceiling=PEAK)


def capped_step(tokens: int, seed: int) -> Contender:
    """Forward and backward with a soft-cap, under causal documents."""
    case = next(case for case in cases() if case.kind == "soft-cap")
    work = workloads.inputs(tokens, torch.float32, seed)
    return _step(_op(case, workloads.masks(tokens, seed)["causal documents"]), work, ())


if __name__ == "__main__":
    main()
