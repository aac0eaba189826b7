"""Keys or values in pages -> copies of some pages: as they are, or out of 8 bits.

parts = 2      page 0                    page 1                    pages of many tokens are cut, so that few tokens
numbers        0           1             2           3             are copied at once: here 4 of 7, and the last part
tokens         0 1 2 3     3 4 5 6       0 1 2 3     3 4 5 6       begins earlier where the size is no multiple
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.ground.eight_bits import quantised, scales_of, widen, widened
from maskflash.ground.stretch import Numbers, Stretch

_LARGE: Final = 256  # tokens of a page that is not cut, and of a part of one, at most


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """A pool of pages, of keys or of values.

    Attributes:
        pages: (P, page_size, H, D), any strides.
        scales: (P, page_size, H) float32, any strides: what codes of 8 bits are multiplied by; None where pages hold
            the numbers themselves.
        parts: pages of their own that each page counts as.
    """

    pages: Tensor
    scales: Tensor | None = None
    parts: int = 1

    @property
    def page_size(self) -> int:
        """Tokens of a page, or of a part."""
        return -(-self.pages.shape[1] // self.parts)

    @property
    def starts(self) -> Numbers:
        """The first token of each part of a page, (parts,); the last part ends with the page."""
        size = self.page_size
        return np.minimum(np.arange(self.parts) * size, self.pages.shape[1] - size)

    def held_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of copies: that of the pages; of 8 bits the one that is asked for."""
        return self.pages.dtype if self.scales is None else dtype

    @property
    def adjacent(self) -> bool:
        """Whether pages that follow one another are one tensor of tokens, which can be read where it lies."""
        x = self.pages
        return self.scales is None and x.stride(0) == x.shape[1] * x.stride(1)

    def cut(self) -> Pool:
        """The same with large pages cut into parts."""
        return replace(self, parts=max(1, -(-self.pages.shape[1] // _LARGE)))

    def copy(self, ids: Numbers, out: Tensor, room: Tensor) -> Tensor:
        """Copy pages into out.

        Args:
            ids: which.
            out: (n, page_size, H, D), in the dtype of the pages; of 8 bits in that of the result.
            room: of 8 bits, bytes for what comes between, three for each number at least.
        """
        if self.scales is None:
            return self._picked(ids, out)
        n = out.numel()
        halves, codes = room[: 2 * n].view(torch.int16), room[2 * n : 3 * n].view(self.pages.dtype)
        widen(self._picked(ids, codes.view(out.shape)), self._scales(ids), out, halves.view(out.shape))
        return out

    def stretch(self, stretch: Stretch, ids: Numbers, dtype: torch.dtype) -> Tensor:
        """A stretch of a request's tokens, (1, H, stop - start, D); zeros where no row sees any.

        Args:
            stretch: which; of 8 bits only what some row sees is widened.
            ids: where its pages are in the pool.
            dtype: of what was in 8 bits.
        """
        if self.scales is not None:
            return stretch.spread(self._widened(stretch.slots(ids), dtype))
        if self.adjacent and len(ids) and (np.diff(ids) == 1).all():
            return stretch.tokens(self.pages[int(ids[0]) : int(ids[-1]) + 1].flatten(0, 1))
        return stretch.tokens(self.pages.index_select(0, torch.from_numpy(ids).to(self.pages.device)).flatten(0, 1))

    def write(self, x: Tensor, at: tuple[Tensor, ...], *, of_tokens: bool) -> None:
        """Write vectors to their slots, in place.

        Args:
            x: (T, H, D).
            at: page and slot of each, (T,).
            of_tokens: the scales are those of tokens, and are found and written here.
        """
        if self.scales is None:
            self.pages[at] = x
            return
        if of_tokens:
            self.scales[at] = scales_of(x)
        self.pages.view(torch.uint8)[at] = quantised(x, self.scales[at]).view(torch.uint8)

    def _widened(self, slots: tuple[Numbers, Numbers], dtype: torch.dtype) -> Tensor:
        """The tokens of 8 bits in pages and slots, (n, H, D), in a dtype."""
        assert self.scales is not None, "of 8 bits"
        at = tuple(torch.from_numpy(x).to(self.pages.device) for x in slots)
        scales = self.scales[0, :1] if self._shared else self.scales[at]
        return widened(self.pages.view(torch.uint8)[at].view(self.pages.dtype), scales, dtype)

    def _picked(self, ids: Numbers, out: Tensor) -> Tensor:
        """Pages as they are, in out."""
        if self.parts == 1:
            return torch.index_select(self.pages, 0, torch.from_numpy(ids), out=out)
        starts, size = self.starts[ids % self.parts].tolist(), self.page_size
        for each, page, start in zip(out, (ids // self.parts).tolist(), starts, strict=True):  # many tokens each
            each.copy_(self.pages[page, start : start + size])
        return out

    def _scales(self, ids: Numbers) -> Tensor:
        """The scales of pages (n, page_size, H), or (1, 1, H) where all tokens share them."""
        assert self.scales is not None, "of 8 bits"
        if self._shared:
            return self.scales[:1, :1]
        slots = self.starts[ids % self.parts][:, None] + np.arange(self.page_size)
        return self.scales[torch.from_numpy(ids // self.parts)[:, None], torch.from_numpy(slots)]

    @property
    def _shared(self) -> bool:
        """Whether all tokens of a head have one scale."""
        return self.scales is not None and self.scales.stride()[:2] == (0, 0)
