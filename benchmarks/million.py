"""How does analysis grow? Block maps from 131,072 to 1,048,576 tokens, and new document layouts one after another.

`python -m benchmarks.analysis --million` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
from torch.nn.attention.flex_attention import create_block_mask

import maskflash as mf
from benchmarks import fresh, runner, workloads
from benchmarks.runner import Row, Spread
from maskflash.op.analyse import analyse

TITLES = {
    "million": "A mask made from its arguments, and its block map",
    "growth": "The same, eight times as many tokens: how many times the median",
    "layouts": "A new document layout, as a data loader brings them: of a hundred, each made and analysed once",
    "flex": "Block map of causal documents beside create_block_mask (eager once or twice; compiled: warm; ours: five)",
}
LENGTHS: Final = (131_072, 1_048_576)
LONGEST: Final = 8000  # tokens of a document
LAYOUT_TOKENS: Final = 32_768
LAYOUTS: Final = 100
FLEX_TOKENS: Final = (16_384, 32_768)
OURS: Final = 5  # block maps beside one of theirs, which takes a thousand times as long and leaves memory cold

TIME_CEILINGS: Final = {
    **dict.fromkeys(("causal", "sliding window", "prefix"), 0.005),
    "causal document": 1.0,
    **dict.fromkeys(("document", "share question", "global + window"), 2.0),
}
MEMORY_CEILINGS: Final = {
    **dict.fromkeys(("causal", "sliding window", "prefix"), 10e6),
    "causal document": 300e6,
    **dict.fromkeys(("document", "share question", "global + window"), 500e6),
}
GROWTH_CEILING: Final = 10.0
LAYOUT_CEILING: Final = 0.015
FLEX_FLOORS: Final = {"eager": 2000.0, "compiled": 25.0}  # at the longer length


def maker(case: str, tokens: int, seed: int) -> Callable[[], mf.Mask]:
    """What makes a mask of the table from its arguments."""
    if case in ("causal document", "document"):
        documents = workloads.document_lengths(tokens, seed, LONGEST)
        alone = partial(mf.document, documents)
        return alone if case == "document" else lambda: mf.causal() & alone()
    if case == "share question":
        return partial(mf.presets.share_question, **mf.presets.paper("share_question", tokens, seed).arguments)
    return {
        "causal": mf.causal,
        "sliding window": lambda: mf.sliding_window(4096),
        "prefix": lambda: mf.prefix_lm(tokens // 3),
        "global + window": lambda: mf.global_tokens(128) | mf.sliding_window(2048, 2048),
    }[case]


def rows(pairs: int, seed: int, quick: bool) -> Iterator[Row]:
    """All rows, for the tables of TITLES."""
    lengths = (512, 1024) if quick else LENGTHS
    for case in TIME_CEILINGS:
        times = [_times(case, tokens, pairs, seed) for tokens in lengths]
        yield from _grown("time", "s", case, lengths, times, TIME_CEILINGS[case])
        if fresh.STATUS.exists():  # elsewhere than on Linux a process's peak isn't to be had this way
            peaks = [[_peak(case, tokens, seed) for _ in range(min(pairs, 3))] for tokens in lengths]
            yield from _grown("peak memory", "B", case, lengths, peaks, MEMORY_CEILINGS[case])
    yield from _layouts(512 if quick else LAYOUT_TOKENS, 3 if quick else LAYOUTS, seed)
    for tokens in (256,) if quick else FLEX_TOKENS:
        yield from _beside_flex(tokens, 1 if quick else min(pairs, 2), pairs, seed, quick)


def _times(case: str, tokens: int, samples: int, seed: int) -> list[float]:
    make = maker(case, tokens, seed)
    run = runner.timed(lambda: make().block_map(tokens, tokens))
    run()
    return [run()[0] for _ in range(samples)]


def _peak(case: str, tokens: int, seed: int) -> float:
    return fresh.run("memory", case, str(tokens), str(seed))


def _grown(
    measure: str, unit: str, case: str, lengths: tuple[int, ...], samples: list[list[float]], ceiling: float
) -> Iterator[Row]:
    spreads = [Spread.of(x) for x in samples]
    for tokens, values, spread in zip(lengths, samples, spreads, strict=True):
        wanted = ceiling if tokens == lengths[-1] else None
        yield Row("million", case, tokens, measure, "", unit, len(values), spread, ceiling=wanted)
    factor = spreads[1].p50 / spreads[0].p50
    same = Spread(factor, factor, factor)
    yield Row("growth", case, lengths[1], measure, "", "x", len(samples[1]), same, ceiling=GROWTH_CEILING)


def _layouts(tokens: int, count: int, seed: int) -> Iterator[Row]:
    """Each layout is new: nothing of it is known."""
    lengths = [workloads.document_lengths(tokens, seed + n, LONGEST) for n in range(count + 1)]

    def attention_ready(layout: list[int]) -> None:
        causal_document = mf.causal() & mf.document(layout)
        problem = causal_document.at(tokens, tokens).tiled((workloads.TILE, workloads.TILE))
        analyse(problem, "cpu")

    steps: dict[str, Callable[[list[int]], object]] = {
        "block map": lambda layout: (mf.causal() & mf.document(layout)).block_map(tokens, tokens),
        "block map and the CPU's plan": attention_ready,
    }
    for measure, step in steps.items():
        step(lengths[-1])
        samples = []
        for layout in lengths[:count]:
            start = time.perf_counter()
            step(layout)
            samples.append(time.perf_counter() - start)
        yield runner.alone("layouts", "causal document", tokens, measure, samples, ceiling=LAYOUT_CEILING)


def _beside_flex(tokens: int, slow: int, pairs: int, seed: int, quick: bool) -> Iterator[Row]:
    predicate = workloads.document_predicate(workloads.document_ids(tokens, seed))
    several = runner.timed(
        lambda: [mf.mask(predicate).block_map(tokens, tokens, block_size=workloads.TILE) for _ in range(OURS)]
    )

    def ours() -> tuple[float]:
        return (several()[0] / OURS,)

    def eager() -> object:
        return create_block_mask(predicate, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=workloads.TILE)

    contenders = {"eager": (eager, slow)}
    if not quick:  # compiling takes half a minute
        compiled = torch.compile(create_block_mask)
        contenders["compiled"] = (
            lambda: compiled(predicate, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=workloads.TILE),
            pairs,
        )
    for name, (theirs, samples) in contenders.items():
        (a,), (b,) = runner.alternate(ours, runner.timed(theirs), samples)
        floor = FLEX_FLOORS[name] if tokens == FLEX_TOKENS[-1] else None
        yield runner.compared("flex", f"causal documents, {name}", tokens, "time", a, b, floor=floor)
