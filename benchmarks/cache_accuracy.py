"""How far a step of decoding is from float64, by what keys and values are kept in: 16 bits, or e4m3 under some scales.

The step is attended over pages by maskflash itself, with q in float32, so that what is left is the error of the cache.
Beside numbers of N(0, 1) there are those of heads whose spreads differ, the n-th 8ⁿ times as wide as the first; and
FlashAttention-3's: N(0, 1), and to one number in a thousand N(0, 100) is added.

    python -m benchmarks.cache_accuracy               prints the table
    python -m benchmarks.cache_accuracy --json        also stores it, for docs/serving.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import maskflash as mf
from benchmarks.runner import ROOT, conditions, describe, store_lines

RESULTS: Final = ROOT / "benchmarks/results/cache_accuracy.json"
QUESTION: Final = "How far is a step of decoding from float64, by what keys and values are kept in?"
BATCH: Final = 1
HEADS: Final = 16
KV_HEADS: Final = 4
HEAD_DIM: Final = 128
PAGE: Final = 16
DATA: Final = ("normal", "spreads by head", "outliers")
KEPT: Final = ("bfloat16", "e4m3, one scale", "e4m3, a scale for each head", "e4m3, a scale for each token and head")


@dataclass(frozen=True, slots=True)
class Figure:
    """An error.

    Attributes:
        data: what keys and values are drawn from.
        kept: what they are kept in.
        keys: of each request.
        rmse: the root of the mean square of what out is off by, over that of out itself; the mean over heads.
    """

    data: str
    kept: str
    keys: int
    rmse: float


def drawn(data: str, *size: int, draw: torch.Generator) -> Tensor:
    """Keys or values, (batch, heads, tokens, D) float32."""
    x = torch.randn(size, generator=draw)
    if data == "spreads by head":
        x *= 8.0 ** (torch.arange(size[1]) - size[1] + 1)[:, None, None]
    if data == "outliers":
        x += 10 * torch.randn(size, generator=draw) * (torch.rand(size, generator=draw) < 0.001)
    return x


def cached(kept: str, k: Tensor, v: Tensor) -> tuple[list[Tensor], mf.PageTable, dict[str, Any]]:
    """Pools that hold keys and values, where they lie, and their scales."""
    batch, heads, tokens, dim = k.shape
    table = torch.randperm(batch * tokens // PAGE).view(batch, -1)
    pages = mf.PageTable(table, torch.full((batch,), tokens), PAGE)
    shape = table.numel(), PAGE, heads
    if kept == "bfloat16":
        pools = [torch.empty(*shape, dim, dtype=torch.bfloat16) for _ in range(2)]
        pages.append(*pools, k.bfloat16(), v.bfloat16())
        return [pool.float() for pool in pools], pages, {}
    pools = [torch.empty(*shape, dim, dtype=torch.float8_e4m3fn) for _ in range(2)]
    if kept == KEPT[1]:
        found = [float(x.abs().amax()) / 448 for x in (k, v)]
    elif kept == KEPT[2]:
        found = [x.abs().amax((0, 2, 3)) / 448 for x in (k, v)]
    else:
        found = [torch.empty(shape) for _ in range(2)]  # filled by append
    scales = dict(zip(("k_scale", "v_scale"), found, strict=True))
    pages.append(*pools, k, v, **scales)
    return pools, pages, scales


def figures(data: str, keys: int, seed: int) -> list[Figure]:
    """The errors of all that keys and values may be kept in."""
    draw = torch.Generator().manual_seed(seed)
    k, v = (drawn(data, BATCH, KV_HEADS, keys, HEAD_DIM, draw=draw) for _ in range(2))
    q = torch.randn(BATCH, HEADS, 1, HEAD_DIM, generator=draw)
    if data == "spreads by head":  # products as wide as those of the others
        q /= k.std((2, 3), keepdim=True).repeat_interleave(HEADS // KV_HEADS, 1)
    attn, found = mf.compile(mf.causal()), list[Figure]()
    exact = mf.testing.reference(*(x.double() for x in (q, k, v)), mf.full().dense(1, keys), HEAD_DIM**-0.5)[0]
    for kept in KEPT:
        pools, pages, scales = cached(kept, k, v)
        out = attn.paged(q, *pools, pages, **scales).double()
        errors, sizes = ((x.square().mean((0, 2, 3))).sqrt() for x in (out - exact, exact))
        found.append(Figure(data, kept, keys, float((errors / sizes).mean())))
    return found


def main(argv: Sequence[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--json", action="store_true", help=f"store the figures in {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--quick", action="store_true", help="few keys")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    keys = 256 if options.quick else 8192
    with torch.no_grad():
        rows = [figure for data in DATA for figure in figures(data, keys, options.seed)]
    table = Table(title=f"Relative RMSE of a step over {keys:,} keys, beside float64", title_justify="left")
    for name in ("keys and values in", *DATA):
        table.add_column(name)
    for kept in KEPT:
        table.add_row(
            kept, *(f"{row.rmse:.2%}" for data in DATA for row in rows if (row.data, row.kept) == (data, kept))
        )
    console, where = Console(), conditions(options.quick)
    console.print(table)
    console.print(describe(where), highlight=False, soft_wrap=True)
    if options.json:
        store_lines(RESULTS, {"question": QUESTION, "conditions": where}, [asdict(row) for row in rows])
    return rows


if __name__ == "__main__":
    sys.exit(not main())
