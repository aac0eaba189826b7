"""What does a step of decoding cost beside SDPA with the mask that it would need, ready?

A step has one query for each batch row. The cache is a part of larger tensors and grows by a token from step to step,
so that no call is like the one before: ours evaluates its mask each time, SDPA is given a mask of bool that was made
before its time is taken. By turns, without gradients, on all cores. Beside one long sequence stands what it takes to
read the same keys and values once: their sum. Steps over pages, in any order and in the pool's, stand beside the same
steps over contiguous keys. Steps over pages in 8 bits stand beside the same steps over pages of float32. Requests that
share the pages of a prefix stand beside the same ones, each with pages of its own.

Run: python -m benchmarks.decode
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from benchmarks import runner
from benchmarks.runner import Row

TITLES: Final = {
    "steps": "A step of decoding, 8 query heads, 2 key heads, D 64, float32: maskflash beside SDPA with a ready mask",
    "reading": "The same beside reading the keys and values once",
    "pages": "The same over pages of 16 tokens beside contiguous keys and values, maskflash both",
    "quantised": "A step over shuffled pages in float8_e4m3fn beside the same in float32, maskflash both",
    "shared": "A step of requests that share their first pages, beside the same with pages of their own",
}
HEADS: Final = 8
KV_HEADS: Final = 2
HEAD_DIM: Final = 64
PAIRS: Final = 60
WINDOW: Final = 256
DRAFTS: Final = 64
PAGE: Final = 16
REQUESTS: Final = 16
SHARED: Final = 4096  # tokens
OWN: Final = 256
SPARE: Final = 6  # times as many steps as pairs: a slow one is taken three times, of each side


class Case(NamedTuple):
    """A kind of step.

    Attributes:
        name: of the case.
        batch: batch rows.
        tokens: in the cache.
        floor: SDPA's time over ours, at least.
        rows: queries of a batch row.
        mask: of a number of cached tokens, the mask and the arguments of a call with it.
    """

    name: str
    batch: int
    tokens: int
    floor: float | None
    rows: int
    mask: Callable[[Case], tuple[Any, dict[str, Any]]]


def causal(case: Case) -> tuple[Any, dict[str, Any]]:
    """Every token so far."""
    return mf.causal(), {}


def window(case: Case) -> tuple[Any, dict[str, Any]]:
    """The latest ones."""
    return mf.sliding_window(WINDOW - 1), {}


def mixed(case: Case) -> tuple[Any, dict[str, Any]]:
    """Rows of a quarter to all of the cache, padded: their lengths are an argument."""
    lengths = torch.linspace(case.tokens // 4, case.tokens, case.batch).long()
    return mf.mask(lambda b, h, q, kv, *, lengths: kv < lengths[b]), {"lengths": lengths}


def drafts(case: Case) -> tuple[Any, dict[str, Any]]:
    """A binary tree of drafts, each of which sees its ancestors and the cache."""
    numbers = torch.arange(case.rows)
    parents = (numbers - 1).div(2, rounding_mode="floor")
    return mf.presets.tree(parents), {}


CASES: Final = (
    Case("causal", 4, 512, 1 / 1.5, 1, causal),
    Case("causal", 4, 2048, 1 / 1.1, 1, causal),
    Case("causal", 4, 8192, 1 / 0.95, 1, causal),
    Case(f"window of {WINDOW}", 4, 8192, 1 / 0.3, 1, window),
    Case("mixed lengths", 4, 8192, 1 / 0.8, 1, mixed),
    Case(f"tree of {DRAFTS} drafts", 4, 2048, 1 / 1.2, DRAFTS, drafts),
    Case("causal, one sequence", 1, 32768, None, 1, causal),
)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = runner.arguments(__doc__ or "")
    parser.set_defaults(pairs=PAIRS)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    pairs = 3 if options.quick else options.pairs
    rows: list[Row] = []
    with torch.no_grad():
        for case in CASES:
            rows += rows_of(case, pairs)
        for case in CASES[:4]:
            rows += [beside_pages(case, pairs, shuffled=shuffled) for shuffled in (True, False)]
        for case in CASES[:4]:
            rows += [in_8_bits(case, pairs, of_tokens=of_tokens) for of_tokens in (False, True)]
        rows.append(beside_copies(pairs))
    return runner.finish(str(__doc__).partition("\n")[0], TITLES, rows, options)


def rows_of(case: Case, pairs: int) -> list[Row]:
    """A case's times beside SDPA's; those of one sequence beside reading it, too."""
    room = case.tokens + case.rows + SPARE * (pairs + 1)
    k, v = torch.randn(2, case.batch, KV_HEADS, room, HEAD_DIM).unbind()
    (mine,), (theirs,) = runner.alternate(ours(case, k, v), dense(case, k, v), pairs)
    name = f"{case.name}, batch {case.batch}"
    rows = [runner.compared("steps", name, case.tokens, "forward", mine, theirs, dtype="float32", floor=case.floor)]
    if case.batch == 1:
        part = [x[:, :, : case.tokens] for x in (k, v)]
        (mine,), (reading,) = runner.alternate(ours(case, k, v), runner.timed(lambda: [x.sum() for x in part]), pairs)
        rows.append(runner.compared("reading", name, case.tokens, "forward", mine, reading, dtype="float32", floor=0.8))
    return rows


def beside_pages(case: Case, pairs: int, *, shuffled: bool) -> Row:
    """A case's time over pages beside that over contiguous keys."""
    k, v = torch.randn(2, case.batch, KV_HEADS, room_of(case, pairs) * PAGE, HEAD_DIM).unbind()
    pages = over_pages(case, k, v, shuffled=shuffled)
    (mine,), (theirs,) = runner.alternate(pages, ours(case, k, v), pairs)
    name = f"{case.name}, batch {case.batch}, {'shuffled' if shuffled else 'in order'}"
    return runner.compared("pages", name, case.tokens, "forward", mine, theirs, dtype="float32", floor=1 / 1.3)


def in_8_bits(case: Case, pairs: int, *, of_tokens: bool) -> Row:
    """A case's time over pages in 8 bits beside that over pages in float32."""
    k, v = torch.randn(2, case.batch, KV_HEADS, room_of(case, pairs) * PAGE, HEAD_DIM).unbind()
    scales = "tokens" if of_tokens else "numbers"
    sides = [over_pages(case, k, v, shuffled=True, in_8_bits=kind) for kind in (scales, None)]
    (mine,), (theirs,) = runner.alternate(*sides, pairs)
    name = f"{case.name}, batch {case.batch}, {'a scale for each token' if of_tokens else 'one scale'}"
    return runner.compared("quantised", name, case.tokens, "forward", mine, theirs, dtype="float32")


def room_of(case: Case, pairs: int) -> int:
    """The pages of a request."""
    return -(-(case.tokens + SPARE * (pairs + 1)) // PAGE)


def over_pages(case: Case, k: Tensor, v: Tensor, *, shuffled: bool, in_8_bits: str | None = None) -> runner.Contender:
    """One step more over pages each time it is called; `in_8_bits`: scales of "numbers" or "tokens"."""
    room = k.shape[2] // PAGE
    places = torch.randperm(case.batch * room) if shuffled else torch.arange(case.batch * room)
    pools = torch.empty(2, case.batch * room, PAGE, KV_HEADS, HEAD_DIM)
    scales: dict[str, Any] = {}
    if in_8_bits:
        pools = pools.to(torch.float8_e4m3fn)
        each = torch.empty(2, *pools.shape[1:4]).unbind() if in_8_bits == "tokens" else (0.01, 0.01)
        scales = {f"{name}_scale": scale for name, scale in zip("kv", each, strict=True)}
    k_pages, v_pages = pools.unbind()
    pages = mf.PageTable(places.view(case.batch, room), torch.full((case.batch,), room * PAGE), PAGE)
    pages.append(k_pages, v_pages, k, v, **scales)
    pages.lengths.fill_(case.tokens)
    mask, args = case.mask(case)
    attn = mf.compile(mask)

    def run() -> Sequence[float]:
        q = torch.randn(case.batch, HEADS, case.rows, HEAD_DIM)
        pages.lengths += 1
        return runner.timed(lambda: attn.paged(q, k_pages, v_pages, pages, **scales, **args))()

    return run


def beside_copies(pairs: int) -> Row:
    """The time of requests that share a prefix beside that of the same requests, where each has a copy of it."""
    own, prefix = -(-(OWN + SPARE * (pairs + 1)) // PAGE), SHARED // PAGE
    shared, copied = requests(own, prefix, copies=1), requests(own, prefix, copies=REQUESTS)
    (mine,), (theirs,) = runner.alternate(shared, copied, pairs)
    name = f"{REQUESTS} requests, {SHARED:,} tokens shared, {OWN} of their own"
    return runner.compared("shared", name, SHARED + OWN, "forward", mine, theirs, dtype="float32")


def requests(own: int, prefix: int, *, copies: int) -> runner.Contender:
    """A step of all requests, whose first pages are of so many copies."""
    total = copies * prefix + REQUESTS * own
    table = torch.randperm(total)
    prefixes = table[: copies * prefix].view(copies, prefix).expand(REQUESTS, prefix)
    table = torch.cat([prefixes, table[copies * prefix :].view(REQUESTS, own)], 1)
    pages = mf.PageTable(table, torch.full((REQUESTS,), SHARED + OWN), PAGE)
    pools, attn = torch.randn(2, total, PAGE, KV_HEADS, HEAD_DIM).unbind(), mf.compile(mf.causal())

    def run() -> Sequence[float]:
        q = torch.randn(REQUESTS, HEADS, 1, HEAD_DIM)
        pages.lengths += 1
        return runner.timed(lambda: attn.paged(q, *pools, pages))()

    return run


def steps(case: Case, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """q, k, v of each step, and the place of its first query."""
    for cached in count(case.tokens - case.rows):
        q = torch.randn(case.batch, HEADS, case.rows, HEAD_DIM)
        yield q, k[:, :, : cached + case.rows], v[:, :, : cached + case.rows], cached


def ours(case: Case, k: Tensor, v: Tensor) -> runner.Contender:
    """One step more each time it is called."""
    mask, args = case.mask(case)
    attn, each = mf.compile(mask), steps(case, k, v)

    def run() -> Sequence[float]:
        q, keys, values, place = next(each)
        return runner.timed(lambda: attn(q, keys, values, q_offset=place, **args))()

    return run


def dense(case: Case, k: Tensor, v: Tensor) -> runner.Contender:
    """The same by SDPA; its mask is made before its time begins."""
    mask, args = case.mask(case)
    each = steps(case, k, v)

    def run() -> Sequence[float]:
        q, keys, values, place = next(each)
        visible = mf.mask(mask).dense(case.rows, keys.shape[2], batch=case.batch, q_offset=place, **args).contiguous()
        return runner.timed(lambda: scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True))()

    return run


if __name__ == "__main__":
    sys.exit(any(row.met is False for row in main()))
