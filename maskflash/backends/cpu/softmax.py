"""Values of a tile -> their exponentials, 0 where pairs are hidden."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hide(values: Tensor, hidden: Tensor, *, bounded: bool, out: Tensor) -> Tensor:
    """The values, and -inf for hidden pairs."""
    if bounded:
        return torch.add(values, hidden, out=out)
    return out.copy_(values).masked_fill_(hidden < 0, -torch.inf)


def exponentials(x: Tensor) -> None:
    """exp(x) in place, x not above 0.

    By exp2, which is twice as fast, and does not slow down 4 to 40 times where the result underflows. What the product
    is rounded by is a factor of |x| units in exp(x): at most 0.4 units of 1.
    """
    x.mul_(1 / math.log(2)).exp2_()


def probabilities(x: Tensor) -> None:
    """exp(x) in place, x not above 0, 0 where that underflows; to the last bit, which gradients of long rows need.

    Torch's exp slows down 4 to 40 times where its result underflows: there it gets something else.
    """
    tiny = torch.finfo(x.dtype).tiny
    torch.threshold_(x.clamp_min_(math.log(tiny) + 1).exp_(), 4 * tiny, 0.0)


def merge_some(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge one more part into out (..., D) and lse (...), in place; either may have seen nothing."""
    weight = torch.sigmoid(part_lse - lse).masked_fill_(part_lse == -torch.inf, 0.0)
    out.lerp_(part, weight[..., None])
    torch.logaddexp(lse, part_lse, out=lse)
