"""How far forward in 8 bits is from float64, by what is quantised how: emulated on a CPU in torch's float8_e4m3fn.

The emulation rounds what the kernel rounds: q, k and v, and probabilities before their product with v. Sums are
float32's, and a row's maximum is its last one, where the kernel rounds probabilities by the maximum so far. The data
are FlashAttention-3's (section 4.3): N(0, 1), and to one entry in a thousand N(0, 100) is added; and N(0, 1) alone.

Gradients are those of the backward in full precision, given out and lse of a forward in 8 bits, without a rounding of
its own: what is left is the error that these two bring.

    python -m benchmarks.fp8_accuracy               prints the tables
    python -m benchmarks.fp8_accuracy --json        also stores them, for docs/numerics.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.runner import ROOT, conditions, describe, store_lines
from maskflash.backends.incoherence import dequantise, quantise
from maskflash.backends.triton.fp8 import SCALED
from maskflash.ground.eight_bits import FORMAT

RESULTS: Final = ROOT / "benchmarks/results/fp8_accuracy.json"
QUESTION: Final = "How far is forward in 8 bits from float64, by what is quantised how?"
HEADS: Final = 4
ROWS: Final = 512  # of each head
CASES: Final = (
    ("outliers", 4096, 64),
    ("outliers", 16384, 64),
    ("outliers", 1024, 128),
    ("outliers", 4096, 128),
    ("outliers", 16384, 128),
    ("normal", 16384, 128),
)
_CHUNK: Final = 256  # rows at once

Operands = tuple[Tensor, Tensor, Tensor]


class Attended(NamedTuple):
    """What attention gives: out (B, H, Sq, Dv), and lse (B, H, Sq) in natural units."""

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class Way:
    """One way to round.

    Attributes:
        name: of it.
        operands: q, k and v -> the float32 numbers that products see.
        p_scale: what probabilities are multiplied by before they are rounded to e4m3; None to leave them as they are.
    """

    name: str
    operands: Callable[[Tensor, Tensor, Tensor], Operands]
    p_scale: float | None


@dataclass(frozen=True, slots=True)
class Figure:
    """The root of the mean square of what a way is off by, and how many times less that is than the first way's."""

    data: str
    tokens: int
    head_dim: int
    way: str
    rmse: float
    ratio: float


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, p_scale: float | None) -> Attended:
    """Attention in the dtype of the operands; with `p_scale` probabilities are rounded to e4m3.

    Args:
        q: (B, H, Sq, D).
        k: (B, H, Skv, D).
        v: (B, H, Skv, Dv).
        visible: bool, broadcastable to (B, H, Sq, Skv); None where all is. A row that sees nothing has out 0.
        scale: of the scores.
        p_scale: see `Way`.
    """
    scores = q @ k.mT * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    p = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = p.sum(-1, keepdim=True)
    if p_scale is not None:
        p = (p * p_scale).to(FORMAT).to(p.dtype) / p_scale
    out = p @ v / total.masked_fill(total == 0, 1.0)
    return Attended(out, (total.log() + top).squeeze(-1))


def per_tensor(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """One scale for each of them."""
    q, k, v = (
        dequantise(quantise(flat, flat.shape[2]), flat.shape[2]).view(x.shape)
        for x in (q, k, v)
        for flat in [x.reshape(1, 1, -1, x.shape[3])]
    )
    return q, k, v


def by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """A scale for each head and block of tokens."""
    q, k, v = (dequantise(quantise(x, SCALED), SCALED) for x in (q, k, v))
    return q, k, v


def as_the_kernel(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """The same, q and k after incoherent processing."""
    turned = (dequantise(quantise(x, SCALED, incoherent=True), SCALED) for x in (q, k))
    return (*turned, dequantise(quantise(v, SCALED), SCALED))


def _as_they_are(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    return q.float(), k.float(), v.float()


P_SCALE: Final = 256.0  # the kernel's
PER_TENSOR: Final = Way("per-tensor scales", per_tensor, 1.0)
OURS: Final = Way("block scales, incoherent processing", as_the_kernel, P_SCALE)
WAYS: Final = (
    PER_TENSOR,
    Way("block scales", by_blocks, P_SCALE),
    OURS,
    Way("the same, p not scaled", as_the_kernel, 1.0),
    Way("the same, p times 448", as_the_kernel, 448.0),
    Way("the same, p not rounded", as_the_kernel, None),
    Way("p alone rounded", _as_they_are, P_SCALE),
)


def drawn(data: str, tokens: int, dim: int, heads: int, seed: int) -> list[Tensor]:
    """q, k and v in bfloat16: (1, heads, tokens, dim)."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(3):
        x = torch.randn(1, heads, tokens, dim, generator=draw)
        if data == "outliers":
            hit = torch.rand(x.shape, generator=draw) < 0.001
            x += 10 * torch.randn(x.shape, generator=draw) * hit
        made.append(x.to(torch.bfloat16))
    return made


def errors(data: str, tokens: int, dim: int, heads: int, rows: int, seed: int) -> Iterator[Figure]:
    """A line for each way, over some rows of heads."""
    q, k, v = drawn(data, tokens, dim, heads, seed)
    given = [(way, way.operands(q, k, v)) for way in WAYS]
    squares = dict.fromkeys((way.name for way in WAYS), 0.0)
    for head in range(heads):
        for first in range(0, min(rows, tokens), _CHUNK):
            part = slice(head, head + 1), slice(first, first + _CHUNK)
            exact = _rows((q.double(), k.double(), v.double()), *part, None)
            for way, operands in given:
                squares[way.name] += float((_rows(operands, *part, way.p_scale).double() - exact).square().sum())
    count = heads * min(rows, tokens) * dim
    first_rmse = (squares[WAYS[0].name] / count) ** 0.5
    for name, total in squares.items():
        rmse = (total / count) ** 0.5
        yield Figure(data, tokens, dim, name, rmse, first_rmse / rmse)


def _rows(operands: Operands, head: slice, rows: slice, p_scale: float | None) -> Tensor:
    q, k, v = (x[:, head] for x in operands)
    return attended(q[:, :, rows], k, v, None, v.shape[3] ** -0.5, p_scale).out


def gradient_errors(data: str, tokens: int, dim: int, heads: int, seed: int) -> Iterator[dict[str, Any]]:
    """How far dq, dk and dv are from exact ones, relative to these, where out and lse come from 8 bits."""
    q, k, v = (x.double() for x in drawn(data, tokens, dim, heads, seed))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    scale = dim**-0.5
    exact = attended(q, k, v, None, scale, None)
    eighth = attended(*(x.double() for x in as_the_kernel(q, k, v)), None, scale, P_SCALE)
    truth = gradients(q, k, v, dout, *exact, scale)
    ways = {
        "out and lse of 8 bits": eighth,
        "out of 8 bits": Attended(eighth.out, exact.lse),
        "lse of 8 bits": Attended(exact.out, eighth.lse),
    }
    for name, found in ways.items():
        pairs = zip(gradients(q, k, v, dout, *found, scale), truth, strict=True)
        dq, dk, dv = (float((x - y).norm() / y.norm()) for x, y in pairs)
        yield {"data": data, "tokens": tokens, "head_dim": dim, "given": name, "dq": dq, "dk": dk, "dv": dv}


def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, scale: float) -> Operands:
    """What backward computes from out and lse: dq, dk, dv."""
    p = (q @ k.mT * scale - lse[..., None]).exp().to(q.dtype)  # lse may be of more bits
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ dout


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--seed", type=int, default=0, help="of the tensors (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"store the rows in {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    cases = [("outliers", 256, 64)] if options.quick else CASES
    heads, rows = (1, 128) if options.quick else (HEADS, ROWS)
    lines = [line for case in cases for line in errors(*case, heads, rows, options.seed)]
    back = [*gradient_errors("outliers", *((128, 64) if options.quick else (2048, 128)), 2, options.seed)]
    where = conditions(options.quick)
    console = Console()
    table = Table(title=QUESTION, title_justify="left")
    for name in ("data", "tokens", "D", "way", "RMSE", "per-tensor / this"):
        table.add_column(name)
    for line in lines:
        cells = line.data, f"{line.tokens:,}", str(line.head_dim), line.way, f"{line.rmse:.2e}", f"{line.ratio:.2f}"
        table.add_row(*cells)
    console.print(table)
    for row in back:
        console.print(row)
    console.print(f"{heads} heads, {rows} rows of each; {describe(where)}", highlight=False)
    if options.json:
        head = {"question": QUESTION, "conditions": where, "heads": heads, "rows_of_each": rows, "gradients": back}
        store_lines(RESULTS, head, [asdict(line) for line in lines])


if __name__ == "__main__":
    sys.exit(main())
