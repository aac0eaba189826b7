"""What does it cost before the first result? Analysis beside FlexAttention's, import time, time to the first result.

Run: python -m benchmarks.analysis              the comparison at 16,384 tokens, lengths, joined masks, start-up
     python -m benchmarks.analysis --million    how it grows to a million tokens: benchmarks/million.py

What only a fresh process shows (peak memory, start-up) comes from `benchmarks/fresh.py`.
"""

from __future__ import annotations

import functools
import operator
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

import maskflash as mf
from benchmarks import fresh, million, runner, workloads
from benchmarks.runner import Row

TITLES = {
    "comparison": "Block map of causal documents, predicate to map: maskflash beside FlexAttention's eager "
    "create_block_mask (few pairs: it takes over ten seconds a call)",
    "lengths": "Block map of causal documents by length: maskflash alone",
    "joined": "Masks joined by `|`: their first row, traces included, and another's block map at 2,048 tokens",
    "short": "Block map of documents of at most 6 tokens: maskflash alone",
    "masks": "Block map of masks of tables: look-ups of both indices, circles, conditions of one side",
    "start": "Start-up in fresh processes: import over `import torch`; compile and first call, imports aside",
}
TOKENS = 16384
LENGTHS = tuple(1 << n for n in range(13, 21))  # 8,192 to 1,048,576
JOINED = (250, 500, 1000)  # masks
SHORT_LENGTHS = (20480, 40960, 81920)
LONGEST = 6  # tokens of a short document
TABLE_MASKS = {  # tokens
    "kinds, in order": 16384,
    "kinds, mixed": 16384,
    "cells": 204458,
    "cells, causal": 204458,
    "a circle": 16384,
    "flags of queries": 49152,
    "flags of keys": 49152,
    "flags of queries, causal": 49152,
    "flags of keys, causal": 49152,
}
SLOW_PAIRS = 3  # of a comparison whose other side takes over ten seconds
FIRST_TOKENS = 1024

TIME_FLOOR = 100.0
MEMORY_FLOOR = 20.0
IMPORT_CEILING = 0.050
FIRST_CEILING = 0.150


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = runner.arguments("Measure what is done before the first result.")
    parser.add_argument("--million", action="store_true", help="how analysis grows, up to 1,048,576 tokens")
    options = parser.parse_args(argv)
    if options.million:
        rows = list(million.rows(1 if options.quick else options.pairs, options.seed, options.quick))
        return runner.finish("million", million.TITLES, rows, options)
    quick, seed = options.quick, options.seed
    tokens = 512 if quick else TOKENS
    slow, pairs = (1, 1) if quick else (min(SLOW_PAIRS, options.pairs), options.pairs)
    rows = [_time(tokens, slow, seed)]
    if fresh.STATUS.exists():  # elsewhere than on Linux a process's peak isn't to be had this way
        rows.append(_memory(tokens, slow, seed))
    for length in (512, 1024) if quick else LENGTHS:
        rows.append(_alone(length, pairs, seed))
    for count in (2, 4) if quick else JOINED:
        rows += _joined(count, slow)
    for length in (512, 1024) if quick else SHORT_LENGTHS:
        rows += _short(length, slow, seed)
    rows += [_of_tables(case, 1024 if quick else length, pairs, seed) for case, length in TABLE_MASKS.items()]
    rows += _start(pairs, seed)
    return runner.finish("analysis", TITLES, rows, options)


def _time(tokens: int, pairs: int, seed: int) -> Row:
    """The same predicate for both; ours is traced anew each time."""
    predicate = workloads.document_predicate(workloads.document_ids(tokens, seed))
    theirs = partial(create_block_mask, predicate, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=workloads.TILE)
    assert_equal(mf.mask(predicate).block_map(tokens, tokens), theirs())
    (ours,), (flex,) = runner.alternate(runner.timed(lambda: _analysed(predicate, tokens)), runner.timed(theirs), pairs)
    return runner.compared("comparison", "causal documents", tokens, "time", ours, flex, floor=TIME_FLOOR)


def _memory(tokens: int, pairs: int, seed: int) -> Row:
    ours, flex = (
        [fresh.run("memory", side, str(tokens), str(seed)) for _ in range(pairs)] for side in ("maskflash", "flex")
    )
    return runner.compared(
        "comparison", "causal documents", tokens, "peak memory", ours, flex, unit="B", floor=MEMORY_FLOOR
    )


def _alone(tokens: int, samples: int, seed: int) -> Row:
    predicate = workloads.document_predicate(workloads.document_ids(tokens, seed))
    run = runner.timed(lambda: _analysed(predicate, tokens))
    run()
    return runner.alone("lengths", "causal documents", tokens, "time", [run()[0] for _ in range(samples)])


def _joined(count: int, samples: int) -> list[Row]:
    """Masks of one comparison each, made anew each time."""

    def joined() -> mf.Mask:
        return functools.reduce(operator.or_, (mf.mask(_diagonal(distance)) for distance in range(count)))

    def row() -> None:
        joined().row(TOKENS // 2, TOKENS)

    def block_map() -> None:
        joined().block_map(2048, 2048)

    return [
        runner.alone("joined", f"{count} masks", 0, measure, [runner.timed(run)()[0] for _ in range(samples)])
        for measure, run in (("first row", row), ("block map", block_map))
    ]


def _diagonal(distance: int) -> Callable[..., Any]:
    return lambda b, h, q, kv: q - kv == distance


def _short(tokens: int, samples: int, seed: int) -> list[Row]:
    """Short documents whose ids are in any order, or have gaps between them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (tokens,), generator=generator)
    ids = torch.randperm(tokens, generator=generator)
    gaps = torch.where(torch.rand(tokens, generator=generator) < 0.3, -1, torch.arange(tokens))
    permuted, apart = (x.repeat_interleave(lengths)[:tokens].contiguous() for x in (ids, gaps))
    cases = {
        "in any order": workloads.document_predicate(permuted),
        "with gaps of -1": lambda b, h, q, kv: (apart[q] == apart[kv]) & (apart[q] >= 0) & (q >= kv),
    }
    rows = []
    for case, predicate in cases.items():
        run = runner.timed(lambda predicate=predicate: _analysed(predicate, tokens))
        rows.append(runner.alone("short", case, tokens, "time", [run()[0] for _ in range(samples)]))
    return rows


def _of_tables(case: str, tokens: int, samples: int, seed: int) -> Row:
    predicate = workloads.table_predicate(case, tokens, seed)
    run = runner.timed(lambda: _analysed(predicate, tokens))
    run()
    return runner.alone("masks", case, tokens, "time", [run()[0] for _ in range(samples)])


def _start(samples: int, seed: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as cache:  # byte code, as an installed package has it
        fresh.run("import", cache)
        fresh.run("first", cache, str(FIRST_TOKENS), str(seed))
        imports = [fresh.run("import", cache) for _ in range(samples)]
        firsts = [fresh.run("first", cache, str(FIRST_TOKENS), str(seed)) for _ in range(samples)]
    return [
        runner.alone("start", "import maskflash", 0, "time", imports, ceiling=IMPORT_CEILING),
        runner.alone("start", "compile and first call", FIRST_TOKENS, "time", firsts, ceiling=FIRST_CEILING),
    ]


def _analysed(predicate: object, tokens: int) -> mf.BlockMap:
    return mf.Mask.block_map(mf.mask(predicate), tokens, tokens, block_size=workloads.TILE)  # type: ignore[arg-type]


def assert_equal(ours: mf.BlockMap, theirs: object) -> None:
    """Both found the same tiles; lengths are whole tiles, where the two projects' rules agree."""
    lists = {"full": "full_kv_num_blocks", "partial": "kv_num_blocks"}
    counts = {kind: int(torch.as_tensor(getattr(theirs, name)).sum()) for kind, name in lists.items()}
    found = {kind: ours.counts[kind] for kind in lists}
    assert found == counts, f"maskflash found {found}, FlexAttention {counts}"


if __name__ == "__main__":
    main()
