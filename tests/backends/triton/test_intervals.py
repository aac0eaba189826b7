"""A row's interval is what the dense mask shows; masks of which a row sees more, or gaps, have none."""

import pytest
import torch
from hypothesis import given, settings

import maskflash as mf
from maskflash.analysis.classify import classify
from maskflash.backends.triton.intervals import intervals
from maskflash.testing import masks

N = 40
PARITY = torch.arange(N) % 2


def found(mask):
    return intervals(classify(mf.mask(mask).at(N, N, batch=2, heads=4).tiled((16, 16))))


@settings(max_examples=40)
@given(masks(max_len=N))
def test_intervals_are_what_rows_see(mask):
    of_rows = found(mask)
    if of_rows is not None:
        start, length = of_rows.long().unbind(-1)
        kv = torch.arange(N)
        shown = (kv >= start[..., None]) & (kv < (start + length)[..., None])
        dense = mask.dense(N, N, batch=2, heads=4)
        assert torch.equal(shown.expand(2, 4, N, N), dense.expand(2, 4, N, N))
        assert of_rows.dtype == torch.int32
        assert of_rows.is_contiguous()


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, kv: PARITY[q] == PARITY[kv],  # hulls are known, with gaps in them
        mf.causal() & (mf.sliding_window(3) | mf.global_tokens(2)),  # two intervals
        lambda b, h, q, kv: (q * 7 + kv * 3) % 5 < 2,  # only pairs tell
    ],
)
def test_rows_with_gaps_have_no_interval(mask):
    assert found(mask) is None
