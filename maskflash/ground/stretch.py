"""The columns of a request that some row sees -> the pages that hold them, and their tokens out of a pool of pages.

columns       . . # # # . . . . . # # . .        first to last: the stretch
pages         0 0 0 0 1 1 1 1 2 2 2 2 3 3        of 4 tokens: pages 0, 1 and 2 hold it, of which some row sees a part
tokens            2 3 4           10 11          what is read; where a whole page is unseen, it isn't looked at
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Columns of a request that some row sees.

    Attributes:
        start: the first.
        stop: one past the last.
        columns: all of them, ascending; None where they are all from start to stop.
        pages: the request's pages that hold them, ascending.
        page_size: tokens of a page.
    """

    start: int
    stop: int
    columns: Numbers | None
    pages: Numbers
    page_size: int

    @staticmethod
    def of(seen: npt.NDArray[np.bool_], page_size: int) -> Stretch:
        """The stretch of all columns, given whether some row sees them."""
        start = int(seen.argmax()) if len(seen) else 0
        if not len(seen) or not seen[start]:
            return Stretch(0, 0, None, np.empty(0, np.int64), page_size)
        stop = len(seen) - int(seen[::-1].argmax())
        if seen[start:stop].all():
            return Stretch(start, stop, None, np.arange(start // page_size, -(-stop // page_size)), page_size)
        columns = np.flatnonzero(seen)
        return Stretch(start, stop, columns, np.unique(columns // page_size), page_size)

    def tokens(self, pool: Tensor, ids: Numbers, pages: slice) -> Tensor:
        """The tokens of some of the pages, (1, H, tokens, D): a view where pages lie one after the other, else a copy.

        Args:
            pool: (P, page_size, H, D), any strides.
            ids: the page of the pool for each of `pages`.
            pages: which of them; all, where `columns` are not None.
        """
        some = ids[pages]
        adjacent = pool.stride(0) == self.page_size * pool.stride(1) and (np.diff(some) == 1).all()
        if adjacent and len(some):
            found = pool[int(some[0]) : int(some[-1]) + 1].flatten(0, 1)
        else:
            found = pool.index_select(0, torch.from_numpy(some).to(pool.device)).flatten(0, 1)
        if self.columns is None:
            first, last = self.columns_of(pages)
            before = int(self.pages[pages.start]) * self.page_size if len(some) else 0
            found = found[first - before : last - before]
        else:
            places = np.searchsorted(self.pages, self.columns // self.page_size) * self.page_size
            within = torch.from_numpy(places + self.columns % self.page_size)
            found = found.index_select(0, within.to(pool.device))
        return found.transpose(0, 1)[None]

    def columns_of(self, pages: slice) -> tuple[int, int]:
        """Of a stretch of all columns, those from first to last of which some pages hold."""
        held = self.pages[pages]
        if not len(held):
            return 0, 0
        first, last = int(held[0]) * self.page_size, (int(held[-1]) + 1) * self.page_size
        return max(first, self.start), min(last, self.stop)

    def placed(self, pool: Tensor, ids: Numbers) -> Tensor:
        """All tokens from start to stop, (1, H, stop - start, D); zeros where no row sees any."""
        found = self.tokens(pool, ids, slice(0, len(ids)))
        if self.columns is None:
            return found
        whole = found.new_zeros(1, found.shape[1], self.stop - self.start, found.shape[3])
        whole[:, :, torch.from_numpy(self.columns - self.start).to(pool.device)] = found
        return whole
