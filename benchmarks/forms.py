"""How long does it take to write a mask in another engine's form?

Packed causal documents, in every form: once with the analysis that it needs, as a training step with new documents has
it. FlexAttention's own way is `create_block_mask`: see `python -m benchmarks.analysis`.

Run: python -m benchmarks.forms
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

import maskflash as mf
from benchmarks import runner, workloads
from benchmarks.runner import Row
from maskflash.masks.sight import Sight

TITLES: Final = {"forms": "Causal documents in other engines' forms"}
TIMES: Final = {131072: (7, 0.1), 1 << 20: (3, 2.0)}  # samples and seconds wanted, by tokens

FORMS: Final[dict[str, Callable[[Sight], Any]]] = {
    "intervals of rows": lambda sight: sight.to_row_intervals(),
    "cuDNN's endpoints": lambda sight: sight.to_row_intervals().to_cudnn(),
    "MagiAttention's slices": lambda sight: sight.to_slices(),
    "FlashMask's vectors": lambda sight: sight.to_flashmask(),
    "FlashAttention 4's blocks": lambda sight: sight.to_block_sparse(),
    "FlashInfer's blocks and bits": lambda sight: sight.to_block_rows(),
    "flash_attn_varlen": lambda sight: sight.as_arguments("flash_attn_varlen"),
    "torch_varlen": lambda sight: sight.as_arguments("torch_varlen"),
    "xformers": lambda sight: sight.as_arguments("xformers"),
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    options = runner.arguments(__doc__ or "").parse_args(arguments)
    rows: list[Row] = []
    for tokens, (samples, seconds) in TIMES.items():
        length = 4096 if options.quick else tokens
        mask = mf.causal() & mf.document(workloads.document_lengths(length, options.seed))
        for name, form in FORMS.items():
            run = runner.timed(lambda form=form, mask=mask, n=length: form(mask.at(n, n)))
            run()
            times = [run()[0] for _ in range(2 if options.quick else samples)]
            rows.append(runner.alone("forms", name, length, "export", times, ceiling=seconds))
    return runner.finish(str(__doc__).partition("\n")[0], TITLES, rows, options)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(any(row.met is False for row in main()))
