"""What rows see -> one interval for each, which kernels compare columns with, whatever the mask.

    columns    0 1 2 3 4 5 6 7      start  length
    row 0      # # # . . . . .      0      3
    row 1      . # # # # . . .      1      4
    row 2      . . . . . . . .      0      0

One kernel serves all such masks: causal ones, windows, documents, FlashMask's vectors and what is joined of them, with
any offsets and lengths. Nothing is compiled for another one. A second interval would cost spills in dK and dV (255
registers on sm_90), so masks of which some row sees more are computed from their expressions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskflash.analysis.seen import Seen


def intervals(found: Seen) -> Tensor | None:
    """What each row sees, where that is one interval; None where it isn't, or where only pairs tell.

    Returns:
        (B, H, q_len, 2) int32, with the map's own B and H: the first column that is seen, and how many from there on.
    """
    rows = found.rows()
    if rows is None or len(rows.start) > 1 or not bool(rows.told.all()):
        return None
    start = rows.start[0].masked_fill(rows.count == 0, 0)
    return torch.stack((start, rows.count), -1).int()
