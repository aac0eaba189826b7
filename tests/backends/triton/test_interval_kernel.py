"""One kernel serves all masks whose rows see one interval each, and computes what they show."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash.testing import Shape, assert_matches_dense, columns

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of NaN and infinities


def one_interval_masks(device):
    """Masks of which each row sees one interval, which know of no other; with what a call of them brings."""
    spans = torch.tensor([3, 30, 9, 1], device=device)
    ids = (torch.arange(80, device=device) // 7).view(2, 40)
    stops = torch.full((40,), 33, dtype=torch.int32, device=device)
    return {
        "causal": (mf.causal(), {}),
        "a window": (mf.sliding_window(9, 4), {}),
        "a window inside documents": (mf.causal() & mf.sliding_window(9) & mf.document([13, 1, 26]), {}),
        "FlashMask's vectors": (mf.ColumnIntervals(stops, causal=True), {}),
        "a window for each head": (mf.mask(lambda b, h, q, kv: abs(q - kv) < spans[h]), {}),
        "documents of each batch row": (mf.mask(lambda b, h, q, kv, *, ids: ids[b, q] == ids[b, kv]), {"ids": ids}),
        "blind rows": (mf.mask(lambda b, h, q, kv: q > 20 and kv < q - 25), {}),
        "everything": (mf.full(), {}),
    }


def test_all_masks_of_one_interval_share_one_kernel(device, compiled, small):
    """Whatever they look at, and whatever offsets come with them, on any batch."""
    rendered, loaded, keys = compiled
    for mask, given_by_name in one_interval_masks(device).values():
        q, k, v = small(batch=2, heads=4)
        mf.attention(q, k, v, mask, block_size=16, backend="triton", **given_by_name).sum().backward()
    for offsets in ({"q_offset": 5}, {"q_offset": torch.tensor([3, -9], device=device), "kv_offset": -2}):
        q, k, v = small(batch=2, heads=4)
        mf.attention(q, k, v, mf.causal(), block_size=16, backend="triton", **offsets).sum().backward()
    assert len(rendered) == len(loaded) == len(keys) == 4  # forward, delta, dk and dv, dq
    assert not any("causal" in text or "<lambda>" in text for text in loaded)


@pytest.mark.parametrize("name", one_interval_masks("cpu"))
def test_masks_of_one_interval_match_dense_float64(device, name):
    mask, given_by_name = one_interval_masks(device)[name]
    offset = {} if "FlashMask" in name else {"kv_offset": torch.tensor([0, 2], device=device)}
    shape = Shape(2, 4, 2, 40, 38 if offset else 40)
    assert_matches_dense(mask, shape, block_size=(16, 32), backend="triton", device=device, **offset, **given_by_name)


@settings(max_examples=8)
@given(st.integers(1, 40), st.data())
def test_column_intervals_match_dense_float64(device, length, data):
    vectors = data.draw(columns(length, length, 2, 2))
    shape = Shape(2, 2, 1, length, length)
    assert_matches_dense(vectors.to(device), shape, block_size=16, backend="triton", device=device)


def test_the_kernel_is_told(device, small):
    made = {"interval": mf.causal(), "expression": mf.dilated_window(9, 2)}
    for name, mask in made.items():
        attn = mf.compile(mask, backend="triton")
        explained = attn.explain(40, 40, device=device)
        assert explained.to_dict()["kernel"] == name
        assert f"{name}: it " in str(explained)
        assert ("intervals" in attn.source(*small())) == (name == "interval")


def test_what_no_kernel_computes_may_be_known_of_rows(small):
    """Triton has no such division; the analysis has done it, since each row sees one interval."""
    q, k, v = small(length=40)
    expected = mf.attention(q.cpu(), k.cpu(), v.cpu(), lambda b, h, q, kv: (q * 0.5) // 3.0 > 2)
    found = mf.attention(q, k, v, lambda b, h, q, kv: (q * 0.5) // 3.0 > 2, backend="triton")
    torch.testing.assert_close(found.cpu(), expected)
