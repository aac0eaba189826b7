"""Pictures of scores: the colour of each pair or tile is that of its number on the bar, and the legend says of what."""

import itertools

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash import visualize
from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.visualize.effects import Effect
from maskflash.visualize.style import COLOURS, SCALE, UNKNOWN

pytest.importorskip("matplotlib", reason="an extra: pip install 'maskflash[plot]'")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb

PACKED = mf.causal() & mf.document([300, 500, 224])
SLOPE = torch.tensor([0.5, 0.125])


def colours_of(ax):
    """What gives the commonest colour of a rectangle (top, bottom, left, right) in tokens."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]

    def of(top, bottom, left, right):
        (x0, y0), (x1, y1) = (ax.transData.transform(corner) for corner in ((left, bottom), (right, top)))
        rows = slice(image.shape[0] - int(y1) + 2, max(image.shape[0] - int(y0) - 2, image.shape[0] - int(y1) + 3))
        part = image[rows, int(x0) + 2 : max(int(x1) - 2, int(x0) + 3)].reshape(-1, 3)
        found, counts = np.unique(part, axis=0, return_counts=True)
        return found[counts.argmax()] / 255

    return of


def on_scale(value, low, high):
    place = (value - low) / (high - low) if high > low else 0.5
    return np.array(LinearSegmentedColormap.from_list("numbers", SCALE)(place)[:3])


def bar_of(ax):
    return next(other for other in ax.figure.axes if other is not ax)


def legend_of(ax):
    legend = ax.get_legend()
    return legend.get_title().get_text(), [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("head", [0, 1])
def test_each_pair_has_the_colour_of_its_number(head):
    mask = mf.causal() & mf.document([9, 15])
    ax = visualize.draw_score(mask, mf.scores.alibi(SLOPE), 24, 24, heads=2, head=head, block_size=8)
    of, seen = colours_of(ax), mask.dense(24, 24)[0, 0]
    low = -14 * SLOPE[head].item()
    for q, kv in itertools.product(range(24), range(24)):
        found = of(q, q + 1, kv, kv + 1)
        wanted = on_scale(SLOPE[head].item() * (kv - q), low, 0) if seen[q, kv] else np.array(to_rgb(COLOURS[0]))
        assert np.abs(found - wanted).max() < 0.02, (q, kv)
    assert legend_of(ax) == ("each pair", ["hidden"])
    assert bar_of(ax).get_ylabel() == "added to a score of 0"
    assert bar_of(ax).get_ylim() == pytest.approx((low, 0))
    assert [tick for tick in ax.get_xticks() if 0 <= tick <= 24] == [0, 8, 16, 24]


def test_each_tile_of_many_has_the_mean_of_what_was_looked_at():
    score = mf.scores.alibi(SLOPE)
    ax = visualize.draw_score(PACKED, score, 1024, 1024, heads=2, head=1)
    of, kinds = colours_of(ax), PACKED.block_map(1024, 1024).kinds()[0, 0]
    mean = Effect.of("test", PACKED, score, 0.0, 1024, 1024, {"heads": 2}).added(0, 1, (128, 128)).mean
    for i, j in itertools.product(range(8), range(8)):
        found = of(128 * i, 128 * i + 128, 128 * j, 128 * j + 128)
        seen = kinds[i, j] > 0
        wanted = on_scale(mean[i, j], np.nanmin(mean), np.nanmax(mean)) if seen else np.array(to_rgb(COLOURS[0]))
        assert np.abs(found - wanted).max() < 0.02, (i, j)
    said, names = legend_of(ax)
    assert " ".join(said.split()) == (
        "each tile of 128 x 128 pairs: the mean of its visible ones, of 16 x 16 that were looked at"
    )
    assert names == ["hidden", "visible in part"]
    hatched = [collection for collection in ax.collections if collection.get_hatch()]
    assert len(hatched[0].get_paths()) == int((kinds == 1).sum())


def test_a_million_tokens_are_drawn_in_squares_of_tiles():
    million = 1 << 20
    ax = visualize.draw_score(mf.sliding_window(40_000), mf.scores.alibi(SLOPE), million, million, heads=2)
    assert legend_of(ax)[0].startswith("each square of 16,384 x 16,384")


def test_what_is_visible_and_was_not_looked_at_is_grey_and_says_so():
    ax = visualize.draw_score(
        mf.mask(lambda b, h, q, kv: (q == 5) & (kv == 3)), mf.scores.alibi(SLOPE), 600, 600, heads=2
    )
    assert legend_of(ax)[1] == ["hidden", "visible in part", "no sampled pair"]
    assert np.abs(colours_of(ax)(0, 128, 0, 128) - to_rgb(UNKNOWN)).max() < 0.02


def test_a_soft_cap_changes_large_scores_alone():
    cap = mf.scores.softcap(10.0)
    assert bar_of(visualize.draw_score(mf.causal(), cap, 8, 8)).get_ylim() == (-0.5, 0.5)  # 0 in the middle
    drawn = visualize.draw_score(mf.causal(), cap, 8, 8, at=20)
    assert bar_of(drawn).get_ylabel() == "added to a score of 20"
    assert np.mean(bar_of(drawn).get_ylim()) == pytest.approx(10 * np.tanh(2) - 20, rel=1e-5)


def test_it_stands_beside_other_panels_and_without_a_legend():
    beside = {
        "mask": mf.causal(),
        "score": lambda ax: visualize.draw_score(mf.causal(), mf.scores.alibi(SLOPE), 64, 64, ax=ax, heads=2),
    }
    made = visualize.side_by_side(beside, 64, 64)
    assert [ax.get_title() for ax in made.axes[:2]] == ["mask", "score"]
    ax = visualize.draw_score(mf.causal(), mf.scores.alibi(SLOPE), 64, 64, heads=2, legend=False)
    assert ax.get_legend() is None
    assert len(ax.figure.axes) == 1


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 7), (7, 0), (1, 1), (1, 4096), (4096, 1)])
def test_odd_lengths_are_drawn(q_len, kv_len):
    colours_of(visualize.draw_score(mf.full(), mf.scores.alibi(SLOPE), q_len, kv_len, heads=2))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"head": 1}, ArgumentError, "draw_score: h is 1, expected less than heads, 1"),
        ({"batch_row": 3}, ArgumentError, "draw_score: b is 3"),
        ({"block_size": 0}, ArgumentError, "block_size"),
        ({"legend": 1}, ArgumentTypeError, "legend"),
        ({"at": "x"}, ArgumentTypeError, "draw_score: at is"),
        ({"depth": 1}, ArgumentTypeError, "depth"),
    ],
)
def test_wrong_arguments_are_errors(options, error, said):
    with pytest.raises(error, match=said):
        visualize.draw_score(mf.causal(), mf.scores.softcap(3.0), 8, 8, **options)
