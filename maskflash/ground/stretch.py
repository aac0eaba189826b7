"""The columns of a request that some row sees -> the pages that hold them, and their tokens out of these.

columns       . . # # # . . . . . . . # # . .        from the first to the last: the stretch
pages         0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3        of 4 tokens: some row sees a part of pages 0, 1 and 3
tokens            2 3 4               12 13          what is read; page 2 is not looked at
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Columns of a request that some row sees.

    Attributes:
        start: the first.
        stop: one past the last.
        columns: all of them, ascending.
        pages: the request's pages that hold them, ascending.
        page_size: tokens of a page.
    """

    start: int
    stop: int
    columns: Numbers
    pages: Numbers
    page_size: int

    @staticmethod
    def of(seen: BoolArray, page_size: int) -> Stretch:
        """The stretch of all columns, given whether some row sees them."""
        columns = np.flatnonzero(seen)
        start, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        return Stretch(start, stop, columns, np.unique(columns // page_size), page_size)

    def tokens(self, found: Tensor) -> Tensor:
        """All tokens from start to stop, (1, H, stop - start, D); zeros where no row sees any. A view if all is seen.

        Args:
            found: (len(pages) * page_size, H, D), the tokens of `pages`.
        """
        if len(self.columns) == self.stop - self.start:
            before = self.start % self.page_size
            found = found[before : before + len(self.columns)]
            return found.transpose(0, 1)[None]
        pages, slots = self.slots(np.arange(len(self.pages)))
        within = torch.from_numpy(pages * self.page_size + slots).to(found.device)
        return self.spread(found[within])

    def slots(self, ids: Numbers) -> tuple[Numbers, Numbers]:
        """The page and the slot of each of the columns.

        Args:
            ids: what `pages` are called.
        """
        return ids[np.searchsorted(self.pages, self.columns // self.page_size)], self.columns % self.page_size

    def spread(self, found: Tensor) -> Tensor:
        """All tokens from start to stop, (1, H, stop - start, D); zeros where no row sees any.

        Args:
            found: (len(columns), H, D), the tokens of `columns`.
        """
        if len(self.columns) < self.stop - self.start:
            whole = found.new_zeros(self.stop - self.start, *found.shape[1:])
            whole[torch.from_numpy(self.columns - self.start).to(found.device)] = found
            found = whole
        return found.transpose(0, 1)[None]


def span(numbers: Numbers) -> slice | Numbers:
    """Ascending numbers as a slice, where they have no gap: what it picks is a view."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
