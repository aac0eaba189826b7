"""Which masks come apart into comparisons of rows with columns, and that nothing else decides them."""

import pytest
import torch

import maskflash as mf
from maskflash.analysis.ways.separate import separate

IDS = torch.arange(64) // 7
SMALL = torch.arange(64, dtype=torch.int32)
REAL = torch.linspace(0, 1, 64)


def parts(predicate):
    problem = mf.mask(predicate).at(64, 64).tiled((16, 16))
    return separate(problem.expr)


@pytest.mark.parametrize(
    ("predicate", "thresholds", "switches", "rearranged"),
    [
        (lambda b, h, q, kv: q >= kv, 1, 0, False),
        (lambda b, h, q, kv: kv <= q, 1, 0, False),
        (lambda b, h, q, kv: True, 0, 0, False),
        (lambda b, h, q, kv: kv < 9, 0, 0, False),
        (lambda b, h, q, kv: q < 9, 0, 1, False),
        (lambda b, h, q, kv: IDS[q] == IDS[kv], 2, 0, False),
        (lambda b, h, q, kv: q >= kv and IDS[q] == IDS[kv], 3, 0, False),
        (lambda b, h, q, kv: q - 5 <= kv <= q + 5, 2, 0, False),
        (lambda b, h, q, kv: 0 <= q - kv <= 5, 2, 0, True),
        (lambda b, h, q, kv: abs(q - kv) <= 5, 2, 0, True),
        (lambda b, h, q, kv: kv > abs(kv - q), 2, 0, True),
        (lambda b, h, q, kv: abs(q - kv) == SMALL[kv], 4, 0, True),
        (lambda b, h, q, kv: q // 8 == kv // 8, 2, 0, False),
        (lambda b, h, q, kv: SMALL[q] < SMALL[kv], 1, 0, False),
        (lambda b, h, q, kv: not (kv < 3 or q >= kv) if q < 40 else kv < 7, 1, 1, False),
        (lambda b, h, q, kv: h + q - kv > b - 3, 1, 0, True),
        (lambda b, h, q, kv: (q >= kv) == (IDS[q] > IDS[kv]), 2, 0, False),
    ],
)
def test_masks_that_come_apart(predicate, thresholds, switches, rearranged):
    found = parts(predicate)
    assert (len(found.thresholds), len(found.switches), found.rearranged) == (thresholds, switches, rearranged)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda b, h, q, kv: (q - kv) % 2 == 0,
        lambda b, h, q, kv: (q ^ kv) & 3 == 0,
        lambda b, h, q, kv: REAL[q] < REAL[kv],
        lambda b, h, q, kv: torch.maximum(q, kv) < 9,
        lambda b, h, q, kv: SMALL[q] - SMALL[kv] < 3,  # 32 bits may wrap
        lambda b, h, q, kv: IDS[(q + kv) % 64] == 0,
        lambda b, h, q, kv: 2 * (q - kv) < 9,
    ],
)
def test_masks_that_do_not(predicate):
    assert parts(predicate) is None
