"""Pictures of other engines' forms: what is drawn is what the form says."""

import numpy as np
import pytest

import maskflash as mf

pytest.importorskip("matplotlib")
from matplotlib.path import Path

PACKED = mf.causal() & mf.document([12, 20, 16])
MASKS = {
    "documents": PACKED,
    "window": mf.sliding_window(5, right=3),
    "window in documents": PACKED & mf.sliding_window(5),
    "prefix": mf.prefix_lm(10),
    "future": mf.mask(lambda b, h, q, kv: kv >= q),
}


@pytest.mark.parametrize("name", MASKS)
def test_slices_cover_the_mask_and_nothing_else(name):
    mask = MASKS[name]
    ax = mf.visualize.draw_slices(mask.to_slices(48, 48), 48, 48)
    kv, q = np.meshgrid(np.arange(48) + 0.5, np.arange(48) + 0.5)
    centres = np.stack((kv.ravel(), q.ravel()), 1)
    covered = np.zeros(48 * 48, dtype=int)
    for drawn in ax.collections:
        for path in drawn.get_paths():
            covered += Path(path.vertices).contains_points(centres)
    assert np.array_equal(covered.reshape(48, 48), mask.dense(48, 48)[0, 0].int().numpy())


def test_slices_are_counted_by_type():
    ax = mf.visualize.draw_slices((PACKED & mf.sliding_window(5)).to_slices(48, 48), 48, 48)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["3 causal", "3 bi-causal"]
    assert ax.get_ylim() == (48, 0)
    assert mf.visualize.draw_slices(PACKED.to_slices(48, 48), 48, 48, legend=False).get_legend() is None
    nothing = (mf.causal() & ~mf.causal()).to_slices(48, 48)
    assert mf.visualize.draw_slices(nothing, 48, 48).get_legend() is None


def test_row_intervals_begin_and_end_where_rows_do():
    mask = mf.causal() & (mf.global_tokens(2) | mf.sliding_window(5))
    seen = mask.to_row_intervals(48, 48)
    ax = mf.visualize.draw_row_intervals(seen, ax=mf.visualize.draw_mask(mask, 48, 48))
    starts, stops = ([segment.tolist() for segment in drawn.get_segments()] for drawn in ax.collections[-2:])
    expected = [(q, *interval) for q in range(48) for interval in seen.row(q)]
    assert starts == [[[start, q], [start, q + 1]] for q, start, _ in expected]
    assert stops == [[[stop, q], [stop, q + 1]] for q, _, stop in expected]
