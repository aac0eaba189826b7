"""Keys or values in pages -> copies of some pages: as they are, or out of 8 bits.

parts = 2      page 0                    page 1                    pages of many tokens are cut, so that few tokens
numbers        0           1             2           3             are copied at once
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from maskflash.ground.eight_bits import quantised, scales_of, widen, widened
from maskflash.ground.stretch import Numbers

_LARGE: Final = 256  # tokens of a page that is not cut
_SMALL: Final = 16  # tokens of what pages are cut into, at least


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
        """Tokens of a page."""
        return self.pages.shape[1] // self.parts

    def held_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of copies: that of the pages; of 8 bits the one that is asked for."""
        return self.pages.dtype if self.scales is None else dtype

    @property
    def adjacent(self) -> bool:
        """Whether pages that follow one another are one tensor of tokens, which can be read where it lies."""
        x = self.pages
        return self.scales is None and x.stride(0) == x.shape[1] * x.stride(1)

    def cut(self) -> Pool:
        """The same with large pages cut into parts, where their size has a divisor that serves."""
        size = self.pages.shape[1]
        if size <= _LARGE:
            return self
        fitting = [n for n in range(_LARGE, _SMALL - 1, -1) if size % n == 0]
        return replace(self, parts=size // fitting[0]) if fitting else self

    def shape_of(self, ids: Numbers) -> tuple[int, ...]:
        """Of a copy of some pages: (n, page_size, H, D)."""
        return len(ids), self.page_size, *self.pages.shape[2:]

    def copy(self, ids: Numbers, out: Tensor, room: Tensor) -> Tensor:
        """Copy pages into out, of `shape_of`.

        Args:
            ids: which.
            out: in the dtype of the pages; of 8 bits in that of the result.
            room: of 8 bits, bytes for what comes between, three for each number at least.
        """
        if self.scales is None:
            return self._picked(ids, out)
        n = out.numel()
        halves, codes = room[: 2 * n].view(torch.int16), room[2 * n : 3 * n].view(self.pages.dtype)
        widen(self._picked(ids, codes.view(out.shape)), self._scales(ids), out, halves.view(out.shape))
        return out

    def tokens(self, ids: Numbers, dtype: torch.dtype) -> Tensor:
        """The tokens of pages, (n · page_size, H, D): a view where they lie one after the other, else a copy.

        Args:
            ids: which.
            dtype: of what was in 8 bits.
        """
        if self.adjacent and len(ids) and (np.diff(ids) == 1).all():
            return self.pages[int(ids[0]) : int(ids[-1]) + 1].flatten(0, 1)
        found = self.pages.index_select(0, torch.from_numpy(ids).to(self.pages.device))
        if self.scales is not None:
            found = widened(found, self._scales(ids), dtype)
        return found.flatten(0, 1)

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

    def _picked(self, ids: Numbers, out: Tensor) -> Tensor:
        """Pages as they are, in out."""
        if self.parts == 1:
            return torch.index_select(self.pages, 0, torch.from_numpy(ids), out=out)
        parts = self.pages.unflatten(1, (self.parts, -1))
        for each, number in zip(out, ids.tolist(), strict=True):  # many tokens each
            each.copy_(parts[number // self.parts, number % self.parts])
        return out

    def _scales(self, ids: Numbers) -> Tensor:
        """The scales of pages (n, page_size, H), or (1, 1, H) where all tokens share them."""
        assert self.scales is not None, "of 8 bits"
        if self.scales.stride()[:2] == (0, 0):
            return self.scales[:1, :1]
        number = torch.from_numpy(ids).to(self.scales.device)
        parts: Tensor = self.scales.unflatten(1, (self.parts, -1))
        return parts[number // self.parts, number % self.parts]
