"""What is a document mask worth in training? A small GPT on packed source files, beside the same one with dense SDPA.

Run: python -m benchmarks.train_packed (about two minutes). Both start from the same weights and read the same
sequences, step by step in turns. Ours is analysed a batch ahead, in a thread.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch.nn.functional import scaled_dot_product_attention

import maskflash as mf
from benchmarks import runner
from benchmarks.packed_model import BYTES, Attend, Batch, Gpt, batches
from benchmarks.runner import Row, Spread

TITLES = {
    "speed": "A training step on packed source files: forward, backward, optimizer; the making of the dense mask",
    "loss": "Loss in nats by step, means of the steps since the line before",
    "independence": "Documents changed one at a time: how many logits of the others are no longer the same bits",
}
TOKENS = 4096
STEPS = 60
LINES = 6
CHANGED = 8  # documents
LEARNING_RATE = 2e-3

Prepared = tuple[Batch, Attend]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = runner.arguments("Train on packed documents.")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    options = parser.parse_args(argv)
    tokens, steps = (512, LINES) if options.quick else (TOKENS, options.steps)
    torch.manual_seed(options.seed)
    ours = Gpt(tokens)
    theirs = copy.deepcopy(ours)
    optimizers = {model: torch.optim.AdamW(model.parameters(), LEARNING_RATE) for model in (ours, theirs)}
    seconds, losses = ({model: [] for model in (ours, theirs)} for _ in range(2))
    for step, (batch, attend) in enumerate(islice(ahead(prepared(tokens, options.seed)), steps)):
        for model in (ours, theirs) if step % 2 else (theirs, ours):
            start = time.perf_counter()
            chosen = attend if model is ours else dense_attention(batch)
            loss = model.loss(batch, chosen)
            loss.backward()
            optimizers[model].step()
            optimizers[model].zero_grad()
            seconds[model].append(time.perf_counter() - start)
            losses[model].append(loss.item())
    rows = [
        *_speed(tokens, seconds[ours], seconds[theirs]),
        *_curve(tokens, losses[ours], losses[theirs]),
        _independence(ours, theirs, tokens, options.seed),
    ]
    return runner.finish("train_packed", TITLES, rows, options)


def prepared(tokens: int, seed: int) -> Iterator[Prepared]:
    """Batches with attention under their documents, analysed."""
    for batch in batches(tokens, seed):
        yield batch, document_attention(batch)


def document_attention(batch: Batch) -> Attend:
    """Attention under a batch's documents, analysed here and now."""
    attn = mf.compile(mf.causal() & mf.document(lengths=batch.lengths))
    attn.prepare(batch.tokens.shape[1], batch.tokens.shape[1])
    return attn


def dense_attention(batch: Batch) -> Attend:
    """The same with SDPA and a dense mask, made once for all layers."""
    document = batch.document()
    mask = (document[:, None] == document).tril_()
    return partial(scaled_dot_product_attention, attn_mask=mask)


def ahead(items: Iterator[Prepared]) -> Iterator[Prepared]:
    """The items, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items)
        while True:
            item = coming.result()
            coming = worker.submit(next, items)
            yield item


def _speed(tokens: int, ours: list[float], theirs: list[float]) -> list[Row]:
    """Steps after the first, which allocate."""
    time_ = runner.compared("speed", "training step", tokens, "time", ours[2:], theirs[2:], dtype="float32")
    rates = [Spread.of([tokens / seconds for seconds in samples[2:]]) for samples in (ours, theirs)]
    rate = Row("speed", "training step", tokens, "rate", "float32", "tokens/s", len(ours[2:]), *rates, time_.ratio)
    return [time_, rate]


def _curve(tokens: int, ours: list[float], theirs: list[float]) -> list[Row]:
    """The losses in a few lines, and how far the two are apart at most."""

    def line(case: str, samples: int, *values: float) -> Row:
        return Row("loss", case, tokens, "loss", "float32", "nats", samples, *(Spread(x, x, x) for x in values))

    every = max(1, len(ours) // LINES)
    means = [
        line(f"steps to {stop}", every, *(sum(x[stop - every : stop]) / every for x in (ours, theirs)))
        for stop in range(every, len(ours) + 1, every)
    ]
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return [*means, line("largest difference at a step", len(ours), apart)]


def _independence(ours: Gpt, theirs: Gpt, tokens: int, seed: int) -> Row:
    batch = of_several(tokens, seed + 1)
    counts = [
        _changed(model, make(batch), batch) for model, make in ((ours, document_attention), (theirs, dense_attention))
    ]
    spreads = map(Spread.of, counts)
    return Row("independence", "trained model", tokens, "logits", "float32", "logits", len(counts[0]), *spreads)


def of_several(tokens: int, seed: int) -> Batch:
    """The first sequence that more than one document shares."""
    return next(batch for batch in batches(tokens, seed) if len(batch.lengths) > 1)


@torch.no_grad()
def _changed(model: Gpt, attend: Attend, batch: Batch) -> list[float]:
    """For each of some documents, how many logits of others are other bits when its bytes are other ones."""
    before, document = model(batch, attend), batch.document()
    counts = []
    for number in range(min(CHANGED, len(batch.lengths))):
        inside = document == number
        tokens = torch.where(inside, (batch.tokens + 1 + number) % BYTES, batch.tokens)
        same = model(replace(batch, tokens=tokens), attend) == before
        assert not bool(same[:, inside].all()), "a document's own logits follow its bytes"
        counts.append(float((~same[:, ~inside]).sum()))
    return counts


if __name__ == "__main__":
    main()
