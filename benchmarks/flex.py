"""What does FlexAttention's mask cost with our analysis? `to_block_mask` beside `create_block_mask`.

Run: python -m benchmarks.flex.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import maskflash as mf
from benchmarks import runner, workloads
from benchmarks.analysis import SLOW_PAIRS
from benchmarks.runner import Row

TITLES = {
    "block masks": "BlockMask of causal documents: predicate to `to_block_mask`, beside FlexAttention's eager "
    "`create_block_mask`"
}
TOKENS = 8192


def main(argv: Sequence[str] | None = None) -> list[Row]:
    options = runner.arguments("Measure how long FlexAttention's masks take.").parse_args(argv)
    tokens, pairs = (512, 1) if options.quick else (TOKENS, min(SLOW_PAIRS, options.pairs))
    predicate = workloads.document_predicate(workloads.document_ids(tokens, options.seed))
    theirs = partial(create_block_mask, predicate, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=workloads.TILE)

    def ours() -> BlockMask:
        return mf.mask(predicate).to_block_mask(tokens, tokens, block_size=workloads.TILE)

    samples = runner.alternate(runner.timed(ours), runner.timed(theirs), pairs)
    (a,), (b,) = samples
    rows = [runner.compared("block masks", "causal documents", tokens, "time", a, b)]
    return runner.finish("flex", TITLES, rows, options)


if __name__ == "__main__":
    main()
