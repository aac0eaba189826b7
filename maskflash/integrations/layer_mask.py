"""A mask, offsets and lengths -> the tensor without pairs that models of Transformers hand from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from maskflash.errors import ArgumentError
from maskflash.masks.mask import Mask

HERE: Final = "maskflash.integrations.transformers"
"""Who speaks in errors: what users register."""


class LayerMask(Tensor):
    """What models hand on from layer to layer: a mask in the shape of a dense one, (B, 1, Sq, Skv), without its pairs.

    It can be passed on and asked for its shape. Computing with it is an error.

    Attributes:
        mask: which pairs may attend.
        offsets: numbers of the first row and of the first column.
        mask_args: the mask's own arguments.
        of: the kind of model, for messages.
        documents: (B, Sq), the document of each token, where the mask keeps documents apart; else None.
        agreed: the cu_seq_lens that were last found to say the same.
    """

    mask: Mask
    offsets: tuple[int, int]
    mask_args: dict[str, Any]
    of: str
    documents: Tensor | None
    agreed: tuple[Tensor | None, ...] | None

    @staticmethod
    def __new__(
        cls,
        mask: Mask,
        offsets: tuple[int, int],
        mask_args: dict[str, Any],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        of: str = "",
        documents: Tensor | None = None,
    ) -> LayerMask:
        """A mask at the lengths of a forward pass."""
        at = torch.device(device)
        made: LayerMask = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.bool, device=at)
        made.mask, made.offsets, made.mask_args = mask, offsets, mask_args
        made.of, made.documents, made.agreed = of, documents, None
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Hand it on; refuse everything else."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        of = next((x.of for x in tree_leaves((args, kwargs)) if isinstance(x, LayerMask)), "")
        # A TypeError would be swallowed by operators, which then try the other side's.
        raise ArgumentError(
            f"{HERE}: the model{of and f' ({of})'} computes {func} of its attention mask, which holds no pairs; use "
            "another attn_implementation for this model"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LayerMask({self.mask}, shape={tuple(self.shape)}, offsets={self.offsets})"
