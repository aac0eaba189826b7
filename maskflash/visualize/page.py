"""A mask or a block map -> the explorer: one HTML file to zoom, pan and ask, which needs nothing beside itself.

The page holds runs of tiles, never a lattice: numbers as their differences, deflated, in base64. Its template lies in
`explorer/` beside this file; matplotlib is not needed.
"""

from __future__ import annotations

import base64
import math
import os
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.classify import classify
from maskflash.analysis.runs import FULL, PARTIAL, SKIP, Runs
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments
from maskflash.ground.arguments import BlockSize
from maskflash.masks.columns import ColumnIntervals
from maskflash.masks.mask import Mask
from maskflash.scores.score import ScoreLike
from maskflash.visualize import style
from maskflash.visualize.deciders import Decided, decide
from maskflash.visualize.effects import SAMPLES, Added, Effect
from maskflash.visualize.marks import Documents, Steps, Vectors, find_documents, find_vectors

if TYPE_CHECKING:
    from jinja2 import Environment

_DASHES: Final = {"solid": [], "dashed": [6, 3], "dotted": [2, 2], "dashdot": [6, 2, 2, 2]}  # of lines, in pixels
_MOST_PAIRS: Final = 1 << 24  # of partial tiles, up to which they are looked at one by one
_SQUARES: Final = 64  # of numbers of scores, a side
_MOST_SQUARES: Final = 1 << 15  # of all batch rows and heads
_MOST_RUNS: Final = 1 << 18  # of pairs, up to which the page holds them


def explorer(
    shown: Mask | BlockMap,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    score: ScoreLike | None = None,
    at: float = 0.0,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
    block_size: BlockSize = 128,
    **call: Any,
) -> str:
    """Make a page that shows a block map: its tiles, who decided each, and the work of its rows and columns.

    The page is made from runs, so a million tokens of causal documents are well below a megabyte. It fetches nothing.
    Zoomed in, partial tiles of a mask show their pairs, if they hold at most 2^24 pairs in all, in at most 2^18 runs.
    Documents are marked where a mask compares look-ups by q and kv, such as `doc[b, q] == doc[b, kv]`, and vectors
    where it is a `ColumnIntervals`. What a score function adds is a layer that can be switched on: a number for each
    tile, or for squares of them, of at most 16 x 16 of their pairs.

    Args:
        shown: a mask, or a block map; a map alone doesn't tell who decided its tiles, nor about documents.
        q_len: rows in tokens; needed for a mask, and for nothing else.
        kv_len: columns in tokens; likewise.
        score: a score function, for a mask: as in `compile`.
        at: the score that it changes, the same for all pairs: see `draw_score`.
        path: a file to write the page to as well.
        title: what to call it; None for the mask's own name.
        block_size: tokens per tile, one number or (q_tokens, kv_tokens).
        **call: for a mask, batch, heads, q_offset, kv_offset, device, its own arguments and the score function's: see
            `Mask.at`.

    Returns:
        The page's HTML.

    Raises:
        ArgumentTypeError: something that is neither.
        ArgumentError: a mask without lengths, or a file that can't be written.
        MaskIndexError: a look-up out of range, or a division by zero, that no guard excludes.

    Example:
        >>> import maskflash as mf
        >>> page = explorer(mf.causal(), 1024, 1024)
        >>> page.startswith("<!doctype html>"), "28 full, 8 partial, 28 skip" in page
        (True, True)
    """
    if title is not None:
        arguments.instance("explorer", "title", title, str, "it is what the page is called")
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"explorer: path is a {type(path).__name__}, expected a str or a path")
    decided, pairs, documents, vectors, scores = None, None, [], None, None
    if isinstance(shown, BlockMap):
        if score is not None:
            raise ArgumentError("explorer: score needs the mask that it is used under, got a block map; pass the mask")
        block_map = shown
    elif isinstance(shown, Mask):
        if q_len is None or kv_len is None:
            raise ArgumentError(f"explorer: {shown.name} is a mask, so q_len and kv_len are needed")
        size = arguments.block_size("explorer", block_size)
        at = arguments.real("explorer", "at", at)
        effect = None if score is None else Effect.of("explorer", shown, score, at, q_len, kv_len, call)
        asked = shown.at_call("explorer", q_len, kv_len, call) if effect is None else effect.sight
        problem = asked.tiled(size).on_host()
        decided = decide(problem)
        block_map = decided.seen.block_map
        if 0 < block_map.counts["partial"] * math.prod(size) <= _MOST_PAIRS:
            pairs = _few(classify(asked.tiled((1, 1)).on_host()).block_map)
        documents = find_documents(problem)
        if effect is not None:
            scores = _scores(effect, block_map)
        if isinstance(shown, ColumnIntervals):
            vectors = find_vectors(shown, problem.q_len)
    else:
        raise ArgumentTypeError(
            f"explorer: got a {type(shown).__name__}, expected a Mask or a BlockMap; make one with mf.mask"
        )
    name = "block map" if isinstance(shown, BlockMap) else shown.name
    if scores is not None:
        name = f"{name}, {scores['name']}"
    page = _render(name if title is None else title, block_map, decided, pairs, documents, vectors, scores)
    if path is not None:
        _write(page, Path(path))
    return page


def _render(
    name: str,
    block_map: BlockMap,
    decided: Decided | None,
    pairs: BlockMap | None,
    documents: list[Documents],
    vectors: Vectors | None,
    scores: dict[str, Any] | None,
) -> str:
    lines = {
        name: {"colour": style.VECTOR_COLOURS[name], "dash": _DASHES[style.VECTOR_DASHES[name]]}
        for name in (vectors.named if vectors else ())
    }
    data = {
        "q_len": block_map.q_len,
        "kv_len": block_map.kv_len,
        "block_size": block_map.block_size,
        "shape": block_map.shape,
        "choices": list(map(max, block_map.shape, scores["shape"])) if scores else block_map.shape[:2],
        "runs": _runs(block_map.rows),
        "pairs": pairs and {"shape": pairs.shape[:2], **_runs(pairs.rows)},
        "decided": decided and decided.seen.decided,
        "evaluated": decided and decided.evaluated and _runs(decided.evaluated),
        "documents": [
            {
                "name": found.name,
                "shape": found.shape,
                "rows": _all_steps(found.rows),
                "columns": _all_steps(found.columns),
            }
            for found in documents
        ],
        "vectors": vectors
        and {"shape": vectors.shape, "named": {name: _all_steps(steps) for name, steps in vectors.named.items()}},
        "scores": scores,
        "scale": style.SCALE,
        "unknown": style.UNKNOWN,
        "lines": lines,
        "colours": {
            "kinds": [style.COLOURS[kind] for kind in (SKIP, PARTIAL, FULL)],
            "hatch": style.HATCH_INK,
            "outline": style.OUTLINE,
            "document": style.DOCUMENT_COLOUR,
            "paper": "#ffffff",
            "ink": "#000000",
            "halo": "rgba(255, 255, 255, 0.75)",
        },
        "dark": {
            "kinds": [style.DARK_COLOURS[kind] for kind in (SKIP, PARTIAL, FULL)],
            "hatch": style.DARK_HATCH_INK,
            "outline": style.DARK_OUTLINE,
            "document": style.DARK_DOCUMENT_COLOUR,
            "paper": "#14181d",
            "ink": "#ffffff",
            "halo": "rgba(0, 0, 0, 0.6)",
        },
    }
    return _environment().get_template("page.html.jinja").render(name=name, block_map=block_map, data=data)


def _scores(effect: Effect, block_map: BlockMap) -> dict[str, Any]:
    """What a score function adds in squares of tiles: numbers packed, and all that is said of them."""
    (batch, heads), tiles = effect.shape, block_map.shape[2:]
    side = 1
    while side < max(tiles) and (
        max(tiles) > side * _SQUARES
        or batch * heads * math.prod(math.ceil(count / side) for count in tiles) > _MOST_SQUARES
    ):
        side *= 2
    square = side * block_map.block_size[0], side * block_map.block_size[1]
    found = [effect.added(b, h, square) for b in range(batch) for h in range(heads)]
    return {
        "name": effect.name,
        "at": effect.at,
        "shape": (batch, heads),
        "side": side,
        "across": math.ceil(tiles[1] / side),
        "samples": [min(SAMPLES, tokens) for tokens in square],
        "sampled": max(square) > SAMPLES,
        "numbers": {
            name: [pack(getattr(one, name).astype(np.float32).ravel().view(np.int32)) for one in found]
            for name in Added._fields
        },
    }


def _few(pairs: BlockMap) -> BlockMap | None:
    """A map of single pairs, unless it has more runs than a page should hold."""
    return pairs if len(pairs.rows.start) <= _MOST_RUNS else None


def pack(numbers: Any) -> str:
    """Integers of 32 bits (n,) -> text: each less the one before, deflated, in base64."""
    found = np.asarray(numbers, dtype=np.int32)
    return base64.b64encode(zlib.compress(np.diff(found, prepend=np.int32(0)).astype("<i4").tobytes(), 9)).decode()


def _runs(runs: Runs) -> dict[str, str]:
    fields = {"offsets": runs.offsets, "start": runs.start, "stop": runs.stop, "full": runs.full}
    return {name: pack(x.cpu().numpy()) for name, x in fields.items()}


def _all_steps(several: Iterable[Steps]) -> list[dict[str, str]]:
    return [{name: pack(x) for name, x in steps._asdict().items()} for steps in several]


def _write(page: str, path: Path) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"explorer: can't write path, {path}: {error.strerror}; choose another") from None


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "explorer"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return made
