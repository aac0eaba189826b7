"""`maskflash show`: a mask -> its picture in the terminal, its tiles counted; a figure and the explorer in files.

With a score function it also says, and draws, what that adds to a score.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskflash.analysis.block_map import BlockMap
from maskflash.cli import terminal
from maskflash.cli.masks import Subject, subject
from maskflash.errors import ArgumentError
from maskflash.scores.score import Score
from maskflash.visualize.cells import Cells, cells
from maskflash.visualize.effects import SAMPLES, Effect

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskflash.visualize.figures import Panel

_BLOCK = 128


def run(args: Namespace) -> int:
    """Print the picture; write the figure and the explorer if they were asked for."""
    seen = subject(args)
    written = {name: path for name in ("png", "html") if (path := getattr(args, name)) is not None}
    for name, path in written.items():
        if not Path(path).resolve().parent.is_dir():
            raise ArgumentError(f"--{name}: there is no folder {Path(path).parent}")
    if args.at is not None and seen.score is None:
        raise ArgumentError("--at: which score is changed is of no use without --score")
    place = {"batch_row": args.batch_row, "head": args.head}
    for name, size in (("batch_row", seen.batch), ("head", seen.heads)):
        if place[name] >= size:
            option, sizes = name.replace("_", "-"), "--batch" if name == "batch_row" else "--heads"
            raise ArgumentError(f"--{option}: {place[name]} is not less than {sizes}, {size}")
    with terminal.working(f"analysing {seen.mask}"):
        block_map = seen.block_map(args.block_size or (_BLOCK, _BLOCK))
        drawn, tokens = _cells(seen, block_map, args.block_size is not None, place)
        added = None if seen.score is None else _added(seen, seen.score, args.at or 0.0, block_map, place)
    if args.png is not None:
        with terminal.working(f"drawing {args.png}"):
            _figure(seen, block_map, args.at or 0.0, place).savefig(args.png, format="png")
    if args.html is not None:
        with terminal.working(f"writing {args.html}"):
            _explorer(seen, block_map, args.at or 0.0, args.html)
    if args.json:
        scored = {} if added is None else {"added": added}
        terminal.print_json(_facts(seen, block_map, drawn, tokens, place) | scored | written)
        return 0
    console = terminal.console()
    console.print(f"{seen.visible}: {seen.q_len:,} queries x {seen.kv_len:,} keys\n")
    if drawn.kinds.size:
        console.print(terminal.picture(drawn, terminal.encoding()), f" one cell is {tokens[0]} x {tokens[1]} tokens\n")
    rows, columns = block_map.block_size
    counts = ", ".join(f"{count:,} {kind}" for kind, count in block_map.counts.items())
    console.print(f"{rows} x {columns} tiles: {counts} ({100 * block_map.sparsity:.1f} %)")
    if block_map.shape[0] * block_map.shape[1] > 1:
        whole = f"{block_map.shape[0]} x {block_map.shape[1]}"
        console.print(f"drawn: batch row {args.batch_row}, head {args.head} of {whole}; counted: all")
    if added is not None:
        console.print(_said(seen, added, args.head))
    for path in written.values():
        console.print(f"wrote {path}")
    return 0


def _figure(seen: Subject, block_map: BlockMap, at: float, place: dict[str, int]) -> Figure:
    """The mask (column intervals with their vectors) beside its tiles, and beside what a score function adds."""
    from maskflash import visualize

    rows, columns = block_map.block_size
    panels: dict[str, Panel] = {f"{seen.visible}": seen.visible, f"tiles of {rows} x {columns}": block_map}
    call: dict[str, Any] = {"batch": seen.batch, "heads": seen.heads, **place}
    if seen.score is not None:
        lengths = seen.q_len, seen.kv_len
        panels[seen.score.name] = partial(
            visualize.draw_score,
            *(seen.mask, seen.score, *lengths),
            at=at,
            block_size=block_map.block_size,
            **call,
        )
    return visualize.side_by_side(panels, seen.q_len, seen.kv_len, **call)


def _added(
    seen: Subject, score: Score, at: float, block_map: BlockMap, place: dict[str, int]
) -> dict[str, float | bool | None]:
    """What a score function adds to a score: the least and the largest over visible pairs, or over sampled ones."""
    call = {"batch": seen.batch, "heads": seen.heads}
    effect = Effect.of("--score", seen.mask, score, at, seen.q_len, seen.kv_len, call)
    drawn = cells(block_map, terminal.CELLS)
    square = drawn.side * block_map.block_size[0], drawn.side * block_map.block_size[1]
    found = effect.added(place["batch_row"], place["head"], square)
    finite = [x[np.isfinite(x)] for x in (found.least, found.largest)]
    low, high = (finite[0].min(), finite[1].max()) if all(x.size for x in finite) else (None, None)
    return {"to": at, "least": low, "largest": high, "sampled": max(square) > SAMPLES}


def _said(seen: Subject, added: dict[str, Any], head: int) -> str:
    """The same for people."""
    if added["least"] is None:
        return f"{seen.score}: adds no finite number to a score of {added['to']:g}"
    some = "sampled visible pairs" if added["sampled"] else "visible pairs"
    of = f", head {head} of {seen.heads}" if seen.heads > 1 else ""
    return f"{seen.score}: adds {added['least']:g} to {added['largest']:g} to a score of {added['to']:g} ({some}{of})"


def _cells(seen: Subject, block_map: BlockMap, tiles: bool, place: dict[str, int]) -> tuple[Cells, tuple[int, int]]:
    """What to draw, and the tokens of a cell: whole tiles if they were asked for, else squares as small as fit."""
    most = terminal.room(seen.q_len)
    if tiles:
        drawn = cells(block_map, most, **place)
        rows, columns = block_map.block_size
        return drawn, (rows * drawn.side, columns * drawn.side)
    side = 1
    while max(seen.q_len, seen.kv_len) > side * most:
        side *= 2
    return cells(seen.block_map((side, side)), most, **place), (side, side)


def _explorer(seen: Subject, block_map: BlockMap, at: float, path: str) -> None:
    """The page to explore a mask with; it analyses the mask again, to know who decided each tile."""
    from maskflash import visualize

    visualize.explorer(
        seen.mask,
        seen.q_len,
        seen.kv_len,
        path=path,
        score=seen.score,
        at=at,
        batch=seen.batch,
        heads=seen.heads,
        block_size=block_map.block_size,
    )


def _facts(
    seen: Subject, block_map: BlockMap, drawn: Cells, tokens: tuple[int, int], place: dict[str, int]
) -> dict[str, object]:
    return {
        **seen.to_dict(),
        "block_size": list(block_map.block_size),
        "shape": list(block_map.shape),
        "tiles": block_map.counts,
        "sparsity": block_map.sparsity,
        "nbytes": block_map.nbytes,
        "picture": {**place, "tokens": list(tokens), "kinds": drawn.kinds.tolist()},
    }
