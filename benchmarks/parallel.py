"""How do plans of shards compare with what others lay out: balance, bytes, messages and predicted time, by simulation?

Nothing is sent. For each mask, length and number of ranks a plan and the balancers of others are judged by the same
exact counts, under the package's own model of links: maskflash/parallel/links.py.

    benchmarks/balancers.py     a mask, ranks        -> tokens of each rank, as others lay them out
    benchmarks/sharding.py      tokens of each rank  -> work, bytes, messages and seconds
    this file                   the masks, the sizes, the goals; tables, and what the docs draw

Run: python -m benchmarks.parallel
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

import maskflash as mf
from benchmarks import runner
from benchmarks.balancers import BALANCERS, Layout, visited_tiles
from benchmarks.runner import WIDTH
from benchmarks.shard_tables import SIZE, TABLES
from benchmarks.sharding import LAYER, LayerStep, gathered, needed, ring
from maskflash.flashmask.paper import PAPER, paper
from maskflash.parallel.links import KNOWN, Links
from maskflash.parallel.needs import Needs, find_needs
from maskflash.parallel.routes import Shards

QUESTION: Final = "How do plans of shards compare with what others lay out?"
WHOLE: Final = ((65_536, 2), (65_536, 8), (65_536, 64))
"""Tokens and ranks of every mask, with a plan for each of the known links."""
LONG: Final = ((262_144, 16), (262_144, 128), (1_048_576, 32), (1_048_576, 256), (1_048_576, 1024))
"""The same of the masks below, with a plan for InfiniBand."""
QUICK: Final = ((8192, 2), (8192, 4))
BANDWIDTHS: Final = tuple(10.0**power for power in (9, 9.5, 10, 10.5, 11, 11.5))
"""Bytes per second, for which the frontier has a plan each; operations are those of an H100."""

_BLOCK: Final = 65_536  # tokens, after which the masks below begin anew
_UNIT: Final = 256  # tokens, so that torch's per-document balancer takes them at up to 128 ranks
_DOCUMENTS: Final = (13, 512, 13_056)  # of a block: how many, from and to how many tokens
_WINDOW: Final = 1024


@dataclass(frozen=True, eq=False)
class Case:
    """A mask at a length."""

    name: str
    tokens: int
    mask: mf.Mask
    documents: tuple[int, ...] | None = None

    def needs(self, tile: int) -> Needs:
        """What its lines need, for the heads of the layer."""
        problem = self.mask.at(self.tokens, self.tokens, heads=LAYER.heads).problem
        return find_needs(problem, tile)

    @cached_property
    def layout(self) -> Layout:
        """What balancers are told."""
        visited = visited_tiles(self.mask.block_map(self.tokens, self.tokens, block_size=128))
        return Layout(self.needs(128), visited, self.documents)

    def judged(self, shards: Shards) -> Needs:
        """The needs of lines that don't cross from one rank to another."""
        edges = [edge for ranges in shards for span in ranges for edge in span if edge < self.tokens]
        tile = math.gcd(128, *edges)
        return self.layout.needs if tile == 128 else self.needs(tile)


def documents(tokens: int, seed: int) -> tuple[int, ...]:
    """13 lengths from 512 to 13,056 for each 65,536 tokens, multiples of 256, drawn until they fit; 3 at least."""
    draw, found = random.Random(seed), []
    count, least, most = _DOCUMENTS
    for block in range(0, tokens, _BLOCK):
        room, parts = min(_BLOCK, tokens - block), max(3, count * min(_BLOCK, tokens - block) // _BLOCK)
        lengths: list[int] = []
        while not lengths or min(lengths) < least or max(lengths) > most:
            cuts = sorted(draw.sample(range(1, room // _UNIT), parts - 1))
            lengths = [_UNIT * (b - a) for a, b in zip([0, *cuts], [*cuts, room // _UNIT], strict=True)]
        found += lengths
    return tuple(found)


def share_question(tokens: int) -> mf.Mask:
    """For each 65,536 tokens a question of a quarter and 12 answers of a sixteenth each."""
    block = min(tokens, _BLOCK)
    return mf.presets.share_question([(block // 4, [block // 16] * 12)] * (tokens // block))


def prefix_trees(tokens: int, seed: int) -> mf.Mask:
    """Prompts of 16,384 tokens with their rollouts: a third is shared, and the rest parts in 2 to 4, three times."""
    draw, end = random.Random(seed), torch.empty(tokens, dtype=torch.int64)

    def grow(start: int, stop: int, depth: int) -> None:
        trunk = stop if depth == 0 else start + (stop - start) // 3
        end[start:trunk] = stop
        if depth:
            cuts = sorted(draw.sample(range(trunk + 1, stop), draw.randint(1, 3)))
            for a, b in zip([trunk, *cuts], [*cuts, stop], strict=True):
                grow(a, b, depth - 1 if b - a > _UNIT else 0)

    each = min(tokens, _BLOCK) // 4
    for start in range(0, tokens, each):
        grow(start, min(start + each, tokens), 3)
    return mf.mask(lambda b, h, q, kv: kv <= q and q < end[kv])


MASKS: Final[dict[str, Callable[[int, int], mf.Mask]]] = {
    **{name: lambda n, seed, name=name: paper(name, n, seed).predicate for name in PAPER},
    "13 causal documents": lambda n, seed: mf.causal() & mf.document(list(documents(n, seed))),
    "16K question, 12 answers": lambda n, seed: share_question(n),
    "prefix trees": lambda n, seed: prefix_trees(n, seed),
    "window of 1,024": lambda n, seed: mf.sliding_window(_WINDOW - 1),
}


@lru_cache(maxsize=1)
def case_of(name: str, tokens: int, seed: int = 0) -> Case:
    """One of the masks."""
    lengths = documents(tokens, seed) if name == "13 causal documents" else None
    return Case(name, tokens, MASKS[name](tokens, seed), lengths)


LONG_MASKS: Final = ("causal", "causal_document", "share_question", *tuple(MASKS)[len(PAPER) :])
DRAWN: Final = ("causal", *tuple(MASKS)[len(PAPER) : -1])


def steps(case: Case, ranks: int, links: Sequence[str]) -> Iterator[tuple[str, LayerStep, float]]:
    """Each contender's name, its step, and the CPU seconds that its shards took; those that take the sizes."""
    layout = case.layout
    for name in links:
        yield (f"plan, {name}", *planned(case, ranks, KNOWN[name]))
    if LAYER.kv_heads % ranks == 0:
        shards = BALANCERS["contiguous"](layout, ranks)
        assert shards is not None, "it takes every size"
        yield "Ulysses", needed(layout.needs, shards, ranks), 0.0
    for name, balancer in BALANCERS.items():
        start = time.process_time()
        shards = balancer(layout, ranks)
        seconds = time.process_time() - start
        if shards is None:
            continue
        needs = case.judged(shards)
        yield name, needed(needs, shards), seconds
        if name in ("head and tail", "per document", "round robin"):
            yield f"torch: {name}, gathered", gathered(needs, shards), seconds
        if name == "head and tail":
            yield "ring: zigzag", ring(needs, shards), seconds


def planned(case: Case, ranks: int, links: Links) -> tuple[LayerStep, float]:
    """A plan's step, judged as everybody's, and the CPU seconds that it took, needs included."""
    start = time.process_time()
    plan = mf.parallel.plan(
        case.mask,
        case.tokens,
        ranks,
        heads=LAYER.heads,
        kv_heads=LAYER.kv_heads,
        head_dim=LAYER.head_dim,
        links=links,
    )
    seconds = time.process_time() - start
    return needed(case.judged(plan.shards), plan.shards, plan.head_ranks), seconds


def row(table: str, case: Case, ranks: int, name: str, step: LayerStep, seconds: float) -> dict[str, Any]:
    """A contender's figures: bytes are a rank's most, and all ranks' sum; milliseconds by link."""
    figures: dict[str, Any] = {"imbalance": step.imbalance}
    for title, one in (("forward", step.forward), ("backward", step.backward)):
        figures[f"{title} bytes"] = [one.received.max(), one.sent.max(), one.received.sum()]
    figures["messages"] = [int(step.forward.messages.max()), int(step.backward.messages.max())]
    figures["milliseconds"] = {link: 1e3 * step.seconds(links) for link, links in KNOWN.items()}
    head = {"table": table, "mask": case.name, "tokens": case.tokens, "ranks": ranks, "by": name}
    return {**head, **figures, "planning": seconds}


Job = tuple[tuple[str, str, int, int], Callable[[], list[dict[str, Any]]]]
"""The table, the mask, the tokens and the ranks of some rows, and what makes them."""


def grid(quick: bool, seed: int, masks: Sequence[str], wanted: Sequence[int] | None) -> Iterator[Job]:
    """Every mask at every size by every contender."""
    some = [name for name in masks if name in LONG_MASKS]
    kinds = [(QUICK, masks, KNOWN)] if quick else [(WHOLE, masks, KNOWN), (LONG, some, ("infiniband",))]
    for sizes, names, links in kinds:
        for name, tokens in dict.fromkeys((name, tokens) for name in names for tokens, _ in sizes):
            for ranks in (ranks for size, ranks in sizes if size == tokens and (wanted is None or ranks in wanted)):
                yield ("grid", name, tokens, ranks), partial(_cell, name, tokens, ranks, seed, tuple(links))


def _cell(name: str, tokens: int, ranks: int, seed: int, links: Sequence[str]) -> list[dict[str, Any]]:
    case = case_of(name, tokens, seed)
    return [row("grid", case, ranks, by, step, seconds) for by, step, seconds in steps(case, ranks, links)]


def frontier(quick: bool, seed: int, masks: Sequence[str], wanted: Sequence[int] | None) -> Iterator[Job]:
    """Plans for slower and faster links: fewer bytes, or better balance."""
    tokens, ranks = (8192, 4) if quick else SIZE
    for name in masks if wanted is None or ranks in wanted else ():
        yield ("frontier", name, tokens, ranks), partial(_line, quick, name, tokens, ranks, seed)


def _line(quick: bool, name: str, tokens: int, ranks: int, seed: int) -> list[dict[str, Any]]:
    case, fast = case_of(name, tokens, seed), KNOWN["infiniband"]
    made = []
    for bandwidth in BANDWIDTHS[:2] if quick else BANDWIDTHS:
        links = Links(fast.flops, bandwidth, fast.latency)
        made.append(row("frontier", case, ranks, f"plan, {bandwidth:.0e}", *planned(case, ranks, links)))
    return made


def _stored(path: Path | None, where: dict[str, Any]) -> dict[tuple[str, str, int, int], list[dict[str, Any]]]:
    """Rows that runs of the same conditions have left, be it for other ranks, or cut short."""
    kept: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    if path and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for one in found["rows"] if found["conditions"] == json.loads(json.dumps(where)) else ():
            kept.setdefault((one["table"], one["mask"], one["tokens"], one["ranks"]), []).append(one)
    return kept


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = runner.arguments(__doc__ or "")
    parser.add_argument("--mask", action="append", choices=MASKS, metavar="NAME", help="only these; repeat it")
    parser.add_argument("--ranks", type=int, action="append", metavar="N", help="only so many; repeat it")
    options = parser.parse_args(argv)
    chosen = [name for name in MASKS if options.mask is None or name in options.mask]
    where = {**runner.conditions(options.quick), "seed": options.seed}
    done = _stored(options.json, where)
    drawn = [name for name in chosen if name in DRAWN]
    jobs = dict(grid(options.quick, options.seed, chosen, options.ranks))
    jobs |= frontier(options.quick, options.seed, drawn, options.ranks)
    for key in [key for key in jobs if key not in done]:
        with torch.no_grad():
            done[key] = jobs[key]()
        if options.json:  # at once, so that a run that is cut short goes on where it stopped
            every = [row for key in {**jobs, **done} for row in done.get(key, ())]
            runner.store_lines(options.json, {"question": QUESTION, "conditions": where}, every)
    rows = [row for key in jobs for row in done[key]]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for title, made in TABLES.values():
        console.print(_table(title, *made(rows)))
    console.print(f"simulated; planning in CPU seconds; {runner.describe(where)}", highlight=False, soft_wrap=True)
    return rows


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("mask", "goal", "links") else "right")
    for line in lines:
        table.add_row(*line)
    return table


if __name__ == "__main__":
    main()
