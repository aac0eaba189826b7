"""`maskflash show`: a mask -> its picture in the terminal, its tiles counted; a figure and the explorer in files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from maskflash.analysis.block_map import BlockMap
from maskflash.cli import terminal
from maskflash.cli.masks import Subject, subject
from maskflash.errors import ArgumentError
from maskflash.masks.mask import Mask
from maskflash.visualize.cells import Cells, cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK = 128


def run(args: Namespace) -> int:
    """Print the picture; write the figure and the explorer if they were asked for."""
    seen = subject(args)
    written = {name: path for name in ("png", "html") if (path := getattr(args, name)) is not None}
    for name, path in written.items():
        if not Path(path).resolve().parent.is_dir():
            raise ArgumentError(f"--{name}: there is no folder {Path(path).parent}")
    with terminal.working(f"analysing {seen.mask}"):
        block_map = seen.block_map(args.block_size or (_BLOCK, _BLOCK))
        drawn, tokens = _cells(seen, block_map, args.block_size is not None)
    if args.png is not None:
        with terminal.working(f"drawing {args.png}"):
            figure(seen, block_map).savefig(args.png, format="png")
    if args.html is not None:
        with terminal.working(f"writing {args.html}"):
            _explorer(seen, block_map, args.html)
    if args.json:
        terminal.print_json(_facts(seen, block_map, drawn, tokens) | written)
        return 0
    console = terminal.console()
    console.print(f"{seen.visible}: {seen.q_len:,} queries x {seen.kv_len:,} keys\n")
    if drawn.kinds.size:
        console.print(terminal.picture(drawn, terminal.encoding()), f" one cell is {tokens[0]} x {tokens[1]} tokens\n")
    rows, columns = block_map.block_size
    counts = ", ".join(f"{count:,} {kind}" for kind, count in block_map.counts.items())
    console.print(f"{rows} x {columns} tiles: {counts} ({100 * block_map.sparsity:.1f} %)")
    if block_map.shape[0] * block_map.shape[1] > 1:
        console.print(f"drawn: batch row 0, head 0 of {block_map.shape[0]} x {block_map.shape[1]}; counted: all")
    for path in written.values():
        console.print(f"wrote {path}")
    return 0


def figure(seen: Subject, block_map: BlockMap) -> Figure:
    """The mask (column intervals with their vectors) beside its tiles."""
    from maskflash import visualize

    rows, columns = block_map.block_size
    panels: dict[str, Mask | BlockMap] = {f"{seen.visible}": seen.visible, f"tiles of {rows} x {columns}": block_map}
    return visualize.side_by_side(panels, seen.q_len, seen.kv_len, batch=seen.batch, heads=seen.heads)


def _cells(seen: Subject, block_map: BlockMap, tiles: bool) -> tuple[Cells, tuple[int, int]]:
    """What to draw, and the tokens of a cell: whole tiles if they were asked for, else squares as small as fit."""
    most = terminal.room(seen.q_len)
    if tiles:
        drawn = cells(block_map, most)
        rows, columns = block_map.block_size
        return drawn, (rows * drawn.side, columns * drawn.side)
    side = 1
    while max(seen.q_len, seen.kv_len) > side * most:
        side *= 2
    return cells(seen.block_map((side, side)), most), (side, side)


def _explorer(seen: Subject, block_map: BlockMap, path: str) -> None:
    """The page to explore a mask with; it analyses the mask again, to know who decided each tile."""
    from maskflash import visualize

    visualize.explorer(
        seen.visible,
        seen.q_len,
        seen.kv_len,
        path=path,
        batch=seen.batch,
        heads=seen.heads,
        block_size=block_map.block_size,
    )


def _facts(seen: Subject, block_map: BlockMap, drawn: Cells, tokens: tuple[int, int]) -> dict[str, object]:
    return {
        **seen.to_dict(),
        "block_size": list(block_map.block_size),
        "shape": list(block_map.shape),
        "tiles": block_map.counts,
        "sparsity": block_map.sparsity,
        "nbytes": block_map.nbytes,
        "picture": {"tokens": list(tokens), "kinds": drawn.kinds.tolist()},
    }
