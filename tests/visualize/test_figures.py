"""Pictures: the pixels of a tile have the colour of its kind, vectors lie where they should, at any length."""

import itertools
import resource
import sys

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash import visualize
from maskflash.errors import ArgumentError, ArgumentTypeError, BackendError
from maskflash.visualize.style import COLOURS, VECTOR_COLOURS

pytest.importorskip("matplotlib", reason="an extra: pip install 'maskflash[plot]'")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.legend import Legend
from matplotlib.text import Text

MILLION = 1 << 20
PACKED = mf.causal() & mf.document([300, 500, 224])


def pixels(ax):
    """(height, width, 3) of the figure, drawn; and where a (key, query) token lies in it."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]

    def at(query, key):
        x, y = ax.transData.transform((key, query))
        return image.shape[0] - 1 - int(y), int(x)

    return image, at


def kind_of(colour):
    """The kind whose colour is nearest; far from all of them is an error."""
    found = min(COLOURS, key=lambda kind: np.abs(np.array(to_rgb(COLOURS[kind])) * 255 - colour).sum())
    assert np.abs(np.array(to_rgb(COLOURS[found])) * 255 - colour).sum() < 30, colour
    return found


def commonest(image, corner, opposite):
    """The colour most pixels of a rectangle have: hatches and outlines have fewer."""
    (bottom, left), (top, right) = corner, opposite
    part = image[min(top, bottom) + 2 : max(top, bottom) - 1, left + 2 : right - 1].reshape(-1, 3)
    colours, counts = np.unique(part, axis=0, return_counts=True)
    return colours[counts.argmax()]


@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(1024, 1024, 128), (1000, 960, 128), (640, 1280, 64)])
def test_each_tile_has_the_colour_of_its_kind(q_len, kv_len, block):
    block_map = (mf.causal() & mf.document([300, 500, kv_len - 800])).block_map(q_len, kv_len, block_size=block)
    ax = visualize.draw_tiles(block_map)
    image, at = pixels(ax)
    kinds = block_map.kinds()[0, 0]
    assert set(kinds.unique().tolist()) == {0, 1, 2}
    for i, j in itertools.product(*map(range, kinds.shape)):
        top, left = i * block, j * block
        corner = at(min(top + block, q_len), left)
        opposite = at(top, min(left + block, kv_len))
        assert kind_of(commonest(image, corner, opposite)) == kinds[i, j], (i, j)


def test_each_pair_of_a_small_mask_has_its_colour():
    mask = mf.mask(lambda b, h, q, kv: (q * 7 + kv * 3) % 5 < 2)
    image, at = pixels(visualize.draw_mask(mask, 40, 64))
    truth = mask.dense(40, 64)[0, 0]
    for q, kv in itertools.product(range(40), range(64)):
        assert kind_of(image[at(q + 0.5, kv + 0.5)]) == 2 * truth[q, kv]


def test_queries_go_down_and_keys_to_the_right():
    _, at = pixels(visualize.draw_mask(mf.causal(), 64, 64))
    (top, left), (bottom, right) = at(1, 1), at(63, 63)
    assert top < bottom
    assert left < right


def test_the_row_and_head_asked_for_are_drawn():
    spans = torch.tensor([[1, 8], [4, 2]])
    mask = mf.mask(lambda b, h, q, kv: q - kv < spans[b, h] and q >= kv)
    for b, h in itertools.product(range(2), range(2)):
        image, at = pixels(visualize.draw_mask(mask, 16, 16, batch=2, heads=2, batch_row=b, head=h))
        seen = [kind_of(image[at(15.5, key + 0.5)]) for key in range(16)]
        assert seen == [2 * (15 - key < spans[b, h]) for key in range(16)]


def test_a_million_tokens_are_drawn_from_runs():
    mask = mf.causal() & mf.sliding_window(1 << 17) & mf.document([3 << 18, 1 << 18])
    block_map = mask.block_map(MILLION, MILLION)
    visualize.draw_mask(mf.causal(), 64, 64).figure.canvas.draw()  # loads code
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = visualize.side_by_side({"pairs": mask, "tiles": block_map}, MILLION, MILLION)
    images = [pixels(ax) for ax in made.axes]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200  # MiB
    for image, at in images:
        for query, key, kind in [
            (100_000, 50_000, 2),
            (50_000, 100_000, 0),
            (400_000, 300_000, 2),
            (400_000, 200_000, 0),
            (900_000, 700_000, 0),
            (900_000, 850_000, 2),
        ]:
            assert kind_of(image[at(query, key)]) == kind, (query, key)


def test_the_boundary_of_a_million_tokens_is_not_lost():
    # The band is thinner than a pixel; a picture that samples tiles would miss most of it.
    image, at = pixels(visualize.draw_tiles(mf.sliding_window(100).block_map(MILLION, MILLION)))
    for query in range(5000, MILLION, 50_000):
        row, middle = at(query, query)
        assert any(kind_of(colour) == 1 for colour in image[row, middle - 2 : middle + 3]), query


def test_colours_differ_in_grey():
    def luminance(colour):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)]
        return 100 * np.dot((0.2126, 0.7152, 0.0722), linear) ** (1 / 2.4)

    skip, partial, full = (luminance(COLOURS[kind]) for kind in (0, 1, 2))
    assert skip - partial > 20
    assert partial - full > 20


def test_partial_tiles_are_hatched_where_there_is_room():
    small = visualize.draw_tiles(mf.causal().block_map(1024, 1024))
    hatches = {artist.get_label(): artist.get_hatch() for artist in small.collections}
    assert hatches == {"full": None, "partial": "////", "skip": None}
    assert len(visualize.draw_tiles(mf.causal().block_map(65 * 128, 65 * 128)).collections) == 0


def test_the_legend_counts_tiles():
    block_map = mf.causal().block_map(1024, 1024)
    ax = visualize.draw_tiles(block_map)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["28 full", "8 partial", "28 skip"]


def test_vectors_lie_at_their_rows():
    vectors = (mf.causal() & mf.document([300, 500, 224])).to_flashmask(1024, 1024)
    ax = visualize.draw_intervals(vectors, 1024, ax=visualize.draw_mask(vectors, 1024, 1024))
    (line,) = [patch for patch in ax.patches if patch.get_label() == "lts"]
    values, edges, _ = line.get_data()
    assert torch.equal(torch.tensor(values), vectors.lts[0, 0])
    assert edges.tolist() == list(range(1025))
    image, at = pixels(ax)
    want = np.array(to_rgb(VECTOR_COLOURS["lts"])) * 255
    for key, row in [(150, 300), (600, 800)]:
        y, x = at(row, key)
        assert np.abs(image[y - 1 : y + 2, x] - want).sum(1).min() < 30
    assert len(ax.get_children()) > 0
    assert [legend for legend in ax.artists if type(legend).__name__ == "Legend"]  # the pairs' own is kept


def test_hidden_rows_are_hatched_and_no_others():
    columns = mf.ColumnIntervals(
        torch.tensor([4, 6, 8, 8]), torch.tensor([6, 5, 8, 8]), torch.tensor([1, 0, 2, 0]), torch.tensor([2, 0, 4, 0])
    )
    ax = visualize.draw_intervals(columns, 8)
    spans = [patch.get_data() for patch in ax.patches if patch.get_hatch()]
    assert [[(int(a), int(b)) for a, b in zip(s.baseline, s.values, strict=True)] for s in spans] == [
        [(4, 6), (6, 6), (8, 8), (8, 8)],
        [(1, 2), (0, 0), (2, 4), (0, 0)],
    ]


def test_a_million_columns_are_bands_that_hold_every_entry():
    generator = torch.Generator().manual_seed(0)
    lts = torch.randint(0, MILLION, (MILLION,), generator=generator, dtype=torch.int32)
    columns = mf.ColumnIntervals(lts, causal=True)
    ax = visualize.draw_intervals(columns, MILLION)
    (line,) = [patch for patch in ax.patches if patch.get_label() == "lts"]
    high, edges, low = line.get_data()
    assert len(high) == 1024
    group = np.searchsorted(edges, np.arange(MILLION), side="right") - 1
    assert (low[group] <= lts.numpy()).all()
    assert (lts.numpy() <= high[group]).all()


def test_panels_are_side_by_side_in_order():
    causal = mf.causal()
    vectors = mf.document([3, 5]).to_flashmask(8, 8)
    made = visualize.side_by_side({"a": causal, "b": causal.block_map(8, 8, block_size=2), "c": vectors}, 8, 8)
    assert [ax.get_title() for ax in made.axes] == ["a", "b", "c"]
    lefts = [ax.get_position().x0 for ax in made.axes]
    assert lefts == sorted(lefts)
    assert [text.get_text() for text in made.axes[2].get_legend().get_texts()] == [*vectors.vectors(), "hidden by them"]


def test_it_draws_on_the_axes_it_is_given():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    block_map = mf.causal().block_map(256, 256)
    assert visualize.draw_tiles(block_map, ax=ax, legend=False) is ax
    assert visualize.draw_mask(mf.causal(), 64, 64, ax=ax, legend=False) is ax
    assert ax.get_legend() is None


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 7), (7, 0), (1, 1), (1, 4096), (4096, 1)])
def test_odd_lengths_are_drawn(q_len, kv_len):
    mask = mf.causal()
    vectors = mf.ColumnIntervals(torch.full((kv_len,), q_len))
    made = visualize.side_by_side({"a": mask, "b": mask.block_map(q_len, kv_len), "c": vectors}, q_len, kv_len)
    FigureCanvasAgg(made).draw()


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: visualize.draw_mask(lambda b, h, q, kv: True, 8, 8), ArgumentTypeError, "make one with mf.mask"),
        (lambda: visualize.draw_tiles(mf.causal()), ArgumentTypeError, "make one with mask.block_map"),
        (lambda: visualize.draw_intervals(mf.causal(), 8), ArgumentTypeError, "use mask.to_flashmask"),
        (lambda: visualize.side_by_side({}), ArgumentError, "panels is empty"),
        (lambda: visualize.side_by_side({"a": mf.causal()}), ArgumentError, "'a' is a mask, so q_len and kv_len"),
        (lambda: visualize.draw_mask(mf.causal(), -1, 8), ArgumentError, "q_len is -1, expected at least 0"),
        (lambda: visualize.side_by_side({"a": 3}, 8, 8), ArgumentTypeError, "side_by_side: a: got a int"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(call, kind, said):
    with pytest.raises(kind) as caught:
        call()
    assert said in str(caught.value)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"pip install 'maskflash\[plot\]'"):
        visualize.draw_mask(mf.causal(), 8, 8)


def outside(made):
    """What of a figure's titles, labels and legends reaches over its border."""
    canvas = FigureCanvasAgg(made)
    canvas.draw()
    found = [text for ax in made.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    found += [text for legend in made.findobj(Legend) for text in legend.findobj(Text)]
    found = [text for text in found if text.get_visible() and text.get_text()]
    box = made.bbox
    extents = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found]
    return [name for name, x in extents if x.x0 < box.x0 or x.x1 > box.x1 or x.y0 < box.y0 or x.y1 > box.y1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: visualize.side_by_side({"pairs": PACKED, "tiles": PACKED.block_map(1024, 1024)}, 1024, 1024),
        lambda: visualize.side_by_side(
            {"pairs": mf.causal(), "tiles": mf.causal().block_map(MILLION, MILLION)}, MILLION, MILLION
        ),
        lambda: visualize.side_by_side({"vectors": PACKED.to_flashmask(1024, 1024)}, 1024, 1024),
        lambda: visualize.draw_mask(PACKED & mf.sliding_window(300) & mf.prefix_lm(200) & mf.full(), 1024, 1024).figure,
        lambda: visualize.draw_shards(mf.parallel.plan(PACKED, 1024, 4), PACKED),
    ],
    ids=["pairs and tiles", "a million", "vectors", "a long name", "shards"],
)
def test_titles_and_legends_are_whole(make):
    assert outside(make()) == []


def test_what_reaches_out_is_found():
    ax = visualize.draw_mask(mf.causal(), 64, 64)
    ax.set_title("too long " * 20)
    assert outside(ax.figure) == ["too long " * 20]


@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(1024, 1024, 128), (1000, 8192, (64, 96)), (64, 64, 8)])
def test_ticks_are_at_borders_of_tiles(q_len, kv_len, block):
    block_map = mf.causal().block_map(q_len, kv_len, block_size=block)
    ax = visualize.draw_tiles(block_map)
    for axis, size, length in ((ax.yaxis, 0, q_len), (ax.xaxis, 1, kv_len)):
        ticks = [tick for tick in axis.get_ticklocs() if 0 <= tick <= length]
        assert len(ticks) > 2
        assert all(tick % block_map.block_size[size] == 0 for tick in ticks)


@pytest.mark.parametrize("length", [24, 64, 1000, 10**6])
def test_pairs_and_their_tiles_have_the_same_ticks(length):
    mask = mf.causal()
    made = visualize.side_by_side(
        {"pairs": mask, "tiles": mask.block_map(length, length, block_size=8)}, length, length
    )
    assert len({(tuple(ax.get_xticks()), tuple(ax.get_yticks())) for ax in made.axes}) == 1


def test_legends_say_what_a_cell_is():
    legend = visualize.draw_mask(mf.causal(), 1024, 1024).get_legend()
    assert legend.get_title().get_text() == "squares of 4 x 4 pairs"
    assert [text.get_text() for text in legend.get_texts()] == ["all visible", "some", "none"]
    assert visualize.draw_mask(mf.causal(), 512, 512).get_legend().get_title().get_text() == ""
    legend = visualize.draw_tiles(mf.causal().block_map(MILLION, MILLION)).get_legend()
    assert legend.get_title().get_text() == "tiles; drawn in squares of 32 x 32"
    assert visualize.draw_tiles(mf.causal().block_map(1024, 1024)).get_legend().get_title().get_text() == ""


def test_the_boundary_of_a_million_tokens_is_two_pixels_wide():
    image, at = pixels(visualize.draw_tiles(mf.sliding_window(100).block_map(MILLION, MILLION)))
    for query in range(50_000, MILLION - 50_000, 50_000):
        row, middle = at(query, query)
        near = image[row, middle - 6 : middle + 7]
        assert sum(kind_of(colour) == 1 for colour in near) >= 2, query
