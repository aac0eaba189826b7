"""What does a call cost beside torch's own attention where there is next to nothing to compute?

Small tensors with gradients enabled, forward only, one thread; analyses are found. By turns, a call of ours and one of
theirs: each finds the processor's caches as the other left them. In a loop, as `timeit` has it: turns of 50 calls. The
difference is that of each pair, so that a machine that slows down slows both.

Run: python -m benchmarks.overhead
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from benchmarks import runner
from benchmarks.runner import Row

TITLES: Final = {"overhead": "One call on small tensors, gradients enabled: maskflash beside SDPA with the same mask"}
TOKENS: Final = 64
HEADS: Final = 4
HEAD_DIM: Final = 32
CALLS: Final = 2000  # pairs, unless told otherwise
LOOP: Final = 50  # calls
CEILING: Final = 60e-6  # seconds over SDPA


@mf.mask
def packed(b: Any, h: Any, q: Any, kv: Any, *, doc: Any) -> Any:
    """Causal, inside documents that come with the call."""
    return q >= kv and doc[b, q] == doc[b, kv]


class Layer(torch.nn.Module):
    """Causal, inside documents that are a buffer of the module: looked up at each call."""

    def __init__(self, doc: Tensor) -> None:
        super().__init__()
        self.register_buffer("doc", doc)
        self.attn = mf.compile(self.visible)

    def visible(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        """The mask."""
        return q >= kv and self.doc[q] == self.doc[kv]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = runner.arguments(__doc__ or "")
    parser.set_defaults(pairs=CALLS)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    pairs = 3 if options.quick else options.pairs
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM, requires_grad=True) for _ in range(3))
    rows: list[Row] = []
    for case, ours, dense in cases(q, k, v):
        rows += rows_of(case, ours, partial(scaled_dot_product_attention, q, k, v, **dense), pairs)
    return runner.finish(str(__doc__).partition("\n")[0], TITLES, rows, options)


def cases(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[str, Callable[[], Tensor], dict[str, Any]]]:
    """Name, our call, and what SDPA is told of the mask."""
    ids = torch.arange(TOKENS)[None] // 20
    causal, documents = mf.compile(mf.causal()), mf.compile(mf.causal() & mf.document(ids=ids))
    layer = Layer(ids[0])
    by_name, windowed = mf.compile(packed), mf.compile(mf.sliding_window(8))
    sees = {"attn_mask": packed.dense(TOKENS, TOKENS, doc=ids)}
    whole = {"attn_mask": mf.causal().dense(TOKENS, TOKENS, q_offset=16)}
    window = {"attn_mask": mf.sliding_window(8).dense(TOKENS, TOKENS)}
    return [
        ("causal", lambda: causal(q, k, v), {"is_causal": True}),
        ("causal from row 16 on", lambda: causal(q, k, v, q_offset=16), whole),
        ("window of 8", lambda: windowed(q, k, v), window),
        ("documents, captured", lambda: documents(q, k, v), sees),
        ("documents, a module's buffer", lambda: layer.attn(q, k, v), sees),
        ("documents, an argument", lambda: by_name(q, k, v, doc=ids), sees),
    ]


def rows_of(case: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], pairs: int) -> list[Row]:
    """Both times, and by how much ours is longer: by turns, and in a loop."""
    rows = []
    for calls, measure in ((1, "by turns"), (LOOP, "in a loop")):
        contenders = (runner.timed(partial(repeated, call, calls)) for call in (ours, theirs))
        (mine,), (other,) = runner.alternate(*contenders, -(-pairs // calls))
        mine, other = ([seconds / calls for seconds in samples] for samples in (mine, other))
        longer = [a - b for a, b in zip(mine, other, strict=True)]
        rows.append(runner.compared("overhead", case, TOKENS, measure, mine, other, dtype="float32"))
        rows.append(runner.alone("overhead", case, TOKENS, f"longer, {measure}", longer, ceiling=CEILING))
    return rows


def repeated(call: Callable[[], Tensor], times: int) -> Tensor:
    """The last of so many results."""
    for _ in range(times - 1):
        call()
    return call()


if __name__ == "__main__":
    sys.exit(any(row.met is False for row in main()))
