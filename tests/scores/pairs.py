"""What tests of score functions share: a function's values as Python has them, a pair at a time, and by its trace."""

import itertools

import torch

from maskflash.expr.evaluate import compute
from maskflash.scores.score import ROLES
from maskflash.trace.trace import trace

SHAPE = (2, 3, 7, 6)


def indices(shape=SHAPE):
    """b, h, q and kv of all pairs, that broadcast."""
    axes = [torch.arange(n).view([-1 if a == axis else 1 for a in range(4)]) for axis, n in enumerate(shape)]
    return dict(zip(("b", "h", "q", "kv"), axes, strict=True))


def scores(shape=SHAPE, dtype=torch.float64):
    """A score for each pair: both signs, none of them zero."""
    found = torch.linspace(-4, 5, 2 * torch.Size(shape).numel(), dtype=dtype)[1::2]
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(1))].view(shape)


def pair_by_pair(function, shape=SHAPE, index=torch.tensor, **given):
    """Calling a function on each pair, with 0-dim tensors (or what `index` makes of numbers)."""
    score = scores(shape)
    found = torch.empty(shape, dtype=torch.float64)
    for pair in itertools.product(*map(range, shape)):
        found[pair] = function(score[pair], *map(index, pair), **given)
    return found


def traced(function, shape=SHAPE, **given):
    """The same by the function's trace."""
    found = trace(function, given, role=ROLES[torch.float64])
    value, faults = compute(found.expr, found.bind(given), {**indices(shape), "score": scores(shape)})
    assert not any(fault.any() for fault in faults)
    return value.expand(shape)


def agrees(function, index=torch.tensor, **given):
    """Check that tracing a function is calling it."""
    torch.testing.assert_close(traced(function, **given), pair_by_pair(function, index=index, **given))
