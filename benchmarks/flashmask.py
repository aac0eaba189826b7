"""How fast are the twelve masks of the FlashMask paper? Beside SDPA, dense speed and compiled FlexAttention.

Run: python -m benchmarks.flashmask              attention, and block maps of the same length
     python -m benchmarks.flashmask --analysis   block maps at 32,768 tokens beside eager create_block_mask, which takes
                                                 about 10 GB and a minute for each mask, and from vectors at 131,072
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from benchmarks import runner, workloads
from benchmarks.analysis import assert_equal
from benchmarks.attention import step
from benchmarks.flex_masks import mask_mod
from benchmarks.runner import Contender, Row, Spread
from maskflash.flashmask import paper as flashmask
from maskflash.presets import PAPER, PaperMask

TITLES = {
    "maps": "Block map: the mask made from its arguments and mapped; the vectors checked, made a mask and mapped",
    "dense": "Attention, B1 H8 D64, beside SDPA with the dense bool mask",
    "efficiency": "Efficiency: time of SDPA without a mask x visited 128 x 128 tiles / our time",
    "flex": "Attention beside compiled FlexAttention",
}
ANALYSIS_TITLES = {
    "comparison": "Block map beside FlexAttention's eager create_block_mask (run once for each mask)",
    "long": "Block map from vectors alone",
}
SOURCES = ("from the predicate", "from vectors")
MEASURES = ("forward", "forward + backward")
DTYPES = ("float32", "bfloat16")
TOKENS, ANALYSIS_TOKENS, LONG_TOKENS = 8192, 32768, 131072
PAIRS = 5
SECONDS = 60  # of a row, after which no pair is begun: SDPA's bfloat16 backward takes half a minute without AMX

SPEEDUP_FLOOR = 1.0
EFFICIENCY_FLOORS = {
    ("forward", "float32"): 0.7,
    ("forward + backward", "float32"): 0.6,
    ("forward", "bfloat16"): 0.5,
    ("forward + backward", "bfloat16"): 0.4,
}
MAPS_FLOOR = 100.0  # of all masks in total
LONG_CEILING = 0.050
NOT_COMPILED = "not compiled"
WIDTH = 180  # of the twelve-row table where the output is no terminal


def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = _options(argv)
    pairs = 1 if options.quick else options.pairs
    if options.analysis:
        rows = _analysis(options, pairs)
        return runner.finish("flashmask_analysis", ANALYSIS_TITLES, rows, options)
    tokens = options.seq_len or (256 if options.quick else TOKENS)
    rows = []
    for name in options.masks:
        rows += _maps(name, tokens, pairs, options.seed)
        for dtype in DTYPES:
            rows += _attention(name, tokens, dtype, pairs, options)
            gc.collect()
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    for dtype in DTYPES:
        columns, lines = twelve(rows, dtype)
        table = Table(title=f"The twelve masks, {tokens:,} tokens, B1 H8 D64, {dtype}: medians", title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "mask" else "right", no_wrap=column == "mask")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    return runner.finish("flashmask", TITLES if options.details else {}, rows, options)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runner.arguments(__doc__.splitlines()[0])
    parser.set_defaults(pairs=PAIRS)
    parser.add_argument("--analysis", action="store_true", help="measure block maps at long lengths instead")
    parser.add_argument("--seq-len", type=int, metavar="N", help=f"tokens (default: {TOKENS}; floors hold there)")
    parser.add_argument("--masks", nargs="+", choices=PAPER, default=PAPER, metavar="NAME", help="only these masks")
    parser.add_argument(
        "--no-flex", action="store_true", help="leave FlexAttention out: each mask takes it a compilation"
    )
    parser.add_argument("--details", action="store_true", help="also print every row with its spread")
    return parser.parse_args(argv)


def twelve(rows: Sequence[Row], dtype: str) -> tuple[list[str], list[list[str]]]:
    """A line for each mask, of medians: columns' names and cells; the rows themselves hold the spreads."""

    def cell(mask: str, table: str, measure: str, *, ratio: bool = False) -> str:
        for row in rows:
            if (row.case, row.table, row.measure) == (mask, table, measure) and row.dtype in ("", dtype):
                values, unit = (row.ratio, runner.ratio_unit(row)) if ratio else (row.ours, row.unit)
                return NOT_COMPILED if values is None else runner.spread(Spread(*[values.p50] * 3), unit)
        return ""

    columns = ["mask", "full / partial / skip", "map", "from vectors"]
    for measure in MEASURES:
        columns += [measure, "x SDPA", "efficiency"]
    lines = []
    for mask in dict.fromkeys(row.case for row in rows):
        line = [mask, next(row.tiles or "" for row in rows if row.case == mask)]
        line += [cell(mask, "maps", source) for source in SOURCES]
        for measure in MEASURES:
            line.append(cell(mask, "dense", measure))
            line += [cell(mask, table, measure, ratio=True) for table in ("dense", "efficiency")]
        lines.append([*line, cell(mask, "flex", "forward", ratio=True)])
    return [*columns, "x FlexAttention, forward"], lines


def _maps(name: str, tokens: int, samples: int, seed: int) -> Iterator[Row]:
    """From the arguments, or the vectors, to the map; tracing included."""
    mask = _paper(name, tokens, seed, workloads.HEADS)
    for source, run in zip(SOURCES, _analysed(mask, workloads.HEADS), strict=True):
        found, times = run(), [runner.timed(run)()[0] for _ in range(samples)]
        yield replace(runner.alone("maps", name, tokens, source, times), tiles=_tiles(found))


def _attention(name: str, tokens: int, dtype: str, pairs: int, options: argparse.Namespace) -> Iterator[Row]:
    """Beside SDPA with and without the dense mask, by turns; the mask is analysed in the uncounted first call."""
    mask = _paper(name, tokens, options.seed, workloads.HEADS)
    work = workloads.inputs(tokens, getattr(torch, dtype), options.seed)
    attend = mf.compile(mask.predicate, backend="cpu")
    dense = mask.predicate.dense(tokens, tokens, heads=workloads.HEADS)
    dense = dense[:, : 1 if name != "random_eviction" else None].contiguous()
    ours, theirs = runner.alternate(
        step(attend, work),
        _both(
            step(partial(scaled_dot_product_attention, attn_mask=dense), work), step(scaled_dot_product_attention, work)
        ),
        pairs,
        SECONDS,
    )
    visited = 1 - mask.predicate.block_map(tokens, tokens, heads=workloads.HEADS).sparsity
    wanted = tokens == TOKENS
    for measure, mine, masked, full in zip(MEASURES, ours[::2], theirs[:3:2], theirs[3::2], strict=True):
        row = partial(runner.compared, case=name, tokens=tokens, measure=measure, ours=mine, dtype=dtype)
        yield row("dense", theirs=masked, floor=SPEEDUP_FLOOR if wanted else None)
        floor = EFFICIENCY_FLOORS[measure, dtype] if wanted else None
        yield row("efficiency", theirs=full, visited=visited, floor=floor)
    if not options.no_flex:
        yield _flex(mask, work, attend, dtype, pairs, SPEEDUP_FLOOR if wanted else None)


def _flex(
    mask: PaperMask, work: workloads.Inputs, attend: mf.Attention, dtype: str, pairs: int, floor: float | None
) -> Row:
    """Forward alone: FlexAttention has no backward on the CPU. Where it can't be compiled, a row without it."""
    theirs = _flex_map(mask, workloads.HEADS)
    inputs = [x.detach() for x in (work.q, work.k, work.v)]  # it refuses any that require gradients
    ours = runner.timed(partial(attend, *inputs))
    assert_equal(mask.predicate.block_map(mask.seq_len, mask.seq_len, heads=workloads.HEADS), theirs)
    flex = runner.timed(partial(_compiled(), *inputs, block_mask=theirs))
    try:
        (mine,), (others,) = runner.alternate(ours, flex, pairs)
    except RuntimeError as error:  # no C++ compiler, say
        print(f"FlexAttention, {mask.name}, {dtype}: {str(error).splitlines()[0]}", file=sys.stderr)
        return replace(runner.alone("flex", mask.name, mask.seq_len, "forward", ours()), dtype=dtype)
    return runner.compared("flex", mask.name, mask.seq_len, "forward", mine, others, dtype=dtype, floor=floor)


@cache
def _compiled() -> Any:
    torch._dynamo.config.cache_size_limit = 1000  # every mask compiles anew: past 8 it would fall back to dense
    return torch.compile(flex_attention, dynamic=False)


def _analysis(options: argparse.Namespace, samples: int) -> list[Row]:
    """All block maps at one length beside FlexAttention's, and their totals; from vectors at a longer one.

    Random eviction has one head here: with more, create_block_mask would need as many times the memory.
    """
    tokens = options.seq_len or (512 if options.quick else ANALYSIS_TOKENS)
    alone = _long(options, samples)  # first: create_block_mask leaves a process whose memory is all to be had anew
    rows: list[Row] = []
    _flex_map(_paper("causal", 512, 0, 1), 1)  # loads code
    for name in options.masks:
        mask = _paper(name, tokens, options.seed, 1)
        start = time.perf_counter()
        theirs = _flex_map(mask, 1)
        seconds = time.perf_counter() - start
        for source, run in zip(SOURCES, _analysed(mask, 1), strict=True):
            found = run()
            assert_equal(found, theirs)
            ours = [runner.timed(run)()[0] for _ in range(samples)]
            row = runner.compared("comparison", name, tokens, source, ours, [seconds] * samples)
            rows.append(replace(row, tiles=_tiles(found)))
        del theirs
        gc.collect()
    rows += [_total(rows, source, len(options.masks) == len(PAPER)) for source in SOURCES]
    return rows + alone


def _total(rows: Sequence[Row], source: str, complete: bool) -> Row:
    """The medians' sums: all masks are made and mapped one after the other."""
    chosen = [row for row in rows if row.measure == source]
    ours, theirs = (sum(x.p50 for x in side if x) for side in zip(*((r.ours, r.theirs) for r in chosen), strict=True))
    floor = MAPS_FLOOR if complete else None
    return runner.compared("comparison", "all of these", chosen[0].tokens, source, [ours], [theirs], floor=floor)


def _long(options: argparse.Namespace, samples: int) -> list[Row]:
    tokens = 1024 if options.quick else LONG_TOKENS
    rows = []
    for name in options.masks:
        run = _analysed(_paper(name, tokens, options.seed, 1), 1)[1]
        found, times = run(), [runner.timed(run)()[0] for _ in range(samples)]
        row = runner.alone("long", name, tokens, SOURCES[1], times, ceiling=LONG_CEILING)
        rows.append(replace(row, tiles=_tiles(found)))
    return rows


def _paper(name: str, tokens: int, seed: int, heads: int) -> PaperMask:
    return mf.presets.paper(name, tokens, seed, heads=heads)


def _analysed(mask: PaperMask, heads: int) -> tuple[Callable[[], mf.BlockMap], Callable[[], mf.BlockMap]]:
    """The block map by both ways, each from what a user has at hand: the preset's arguments, or FlashMask's tensor."""
    size = {"q_len": mask.seq_len, "kv_len": mask.seq_len, "heads": heads, "block_size": workloads.TILE}
    indices, causal = mask.vectors.startend_row_indices, mask.vectors.causal
    return (
        lambda: flashmask.PREDICATES[mask.name](**mask.arguments).block_map(**size),
        lambda: mf.ColumnIntervals.from_flashmask(indices, causal).block_map(**size),
    )


def _flex_map(mask: PaperMask, heads: int) -> Any:
    shape = (1, heads) if mask.name == "random_eviction" else (None, None)
    tokens = mask.seq_len
    return create_block_mask(mask_mod(mask), *shape, tokens, tokens, device="cpu", BLOCK_SIZE=workloads.TILE)


def _tiles(block_map: mf.BlockMap) -> str:
    return " / ".join(f"{count:,}" for count in block_map.counts.values())


def _both(first: Contender, second: Contender) -> Contender:
    """Two baselines as one contender, of the parts of both."""
    return lambda: (*first(), *second())


if __name__ == "__main__":
    main()
