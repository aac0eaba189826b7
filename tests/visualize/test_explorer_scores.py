"""The explorer's layer of scores: colours, numbers and words of what a score function adds, by pointer and by keys."""

from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import torch

import maskflash as mf
from maskflash import visualize
from maskflash.errors import ArgumentError
from maskflash.visualize.effects import Effect
from maskflash.visualize.style import COLOURS, DARK_COLOURS, SCALE, UNKNOWN

PACKED = mf.causal() & mf.document([300, 500, 224])
SLOPE = torch.tensor([0.5, 0.125, 0.03])
ALIBI = mf.scores.alibi(SLOPE)
SHOWN = {"score": ALIBI, "heads": 3}


def opened_with_scores(opened, mask=PACKED, length=1024, **options):
    page = opened(visualize.explorer(mask, length, length, **{**SHOWN, **options}))
    if page.page.locator("#show-documents").count():
        page.page.locator("#show-documents").uncheck()
    page.page.locator("#show-scores").check()
    return page


def means(h, mask=PACKED, length=1024, side=128):
    return Effect.of("test", mask, ALIBI, 0.0, length, length, {"heads": 3}).added(0, h, (side, side)).mean


def on_scale(value, low, high):
    """The colour of a number, as the page mixes it of the two anchors around it."""
    place = (value - low) / (high - low) * (len(SCALE) - 1)
    first = min(int(place), len(SCALE) - 2)
    one, other = (np.array([int(text[at : at + 2], 16) for at in (1, 3, 5)]) for text in SCALE[first : first + 2])
    return one + (place - first) * (other - one)


def rgb(colour):
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])


def nearly(colour, wanted):
    return np.abs(rgb(colour) - wanted).max() <= 1.5


def said(value):
    """A number as the page writes it: three digits."""
    exact = Decimal(float(np.float32(value)))
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), ROUND_HALF_UP).normalize():,f}"


@pytest.mark.parametrize("head", [0, 2])
def test_each_tile_has_the_colour_of_its_mean_on_the_head_s_own_scale(opened, head):
    page, mean = opened_with_scores(opened), means(head)
    page.page.locator("#head").select_option(str(head))
    low, high = np.nanmin(mean), np.nanmax(mean)
    assert (page.text("low"), page.text("high")) == (said(low), said(high))
    tiles = [(i, j) for i in range(8) for j in range(8)]
    # Left quarters: the number stands in the middle.
    found = page.colours([(i * 128, i * 128 + 128, j * 128, j * 128 + 32) for i, j in tiles])
    for (i, j), colour in zip(tiles, found, strict=True):
        wanted = rgb(COLOURS[0]) if np.isnan(mean[i, j]) else on_scale(mean[i, j], low, high)
        assert nearly(colour, wanted), (i, j)


def test_it_is_off_until_asked_for_and_then_says_what_is_drawn(opened):
    page = opened(visualize.explorer(PACKED, 1024, 1024, at=2.0, **SHOWN))
    scale, full = page.page.locator("#scale"), page.page.locator("#legend .coloured").first
    assert (scale.is_visible(), full.is_visible()) == (False, True)
    page.page.locator("#map").focus()
    page.press("s")
    assert page.page.locator("#show-scores").is_checked()
    assert (scale.is_visible(), full.is_visible()) == (True, False)
    text = " ".join(page.text("scale").split())
    assert "is what alibi(3 slopes) adds to a score of 2. Each tile has the mean of its visible pairs" in text
    assert "16 × 16 that were looked at" in text
    page.press("s")
    assert (scale.is_visible(), full.is_visible()) == (False, True)


def test_a_tile_says_its_numbers(opened):
    page, effect = opened_with_scores(opened), Effect.of("test", PACKED, ALIBI, 0.0, 1024, 1024, {"heads": 3})
    page.page.locator("#head").select_option("1")
    mean, least, largest = (numbers[5, 3] for numbers in effect.added(0, 1, (128, 128)))
    page.point(5 * 128 + 64, 3 * 128 + 64)
    assert page.text("score") == f"mean {said(mean)}, from {said(least)} to {said(largest)}"
    page.point(64, 1000)
    assert page.text("score") == "no number: no pair that was looked at is visible"


NUMBERS = """() => {
  const found = [], real = context.fillText.bind(context);
  context.fillText = (text, x, y) => { found.push([text, x / dpr, y / dpr]); real(text, x, y); };
  draw();
  context.fillText = real;
  return found;
}"""


def test_numbers_stand_in_their_tiles_where_they_have_room(opened):
    page, mean = opened_with_scores(opened), means(0)
    written = page.page.evaluate(NUMBERS)
    assert len(written) == int((~np.isnan(mean)).sum())
    for text, x, y in written:
        left, top = page.place(0, 0)
        right, bottom = page.place(1024, 1024)
        i, j = int((y - top) / (bottom - top) * 8), int((x - left) / (right - left) * 8)
        assert text == said(mean[i, j])
    page.page.set_viewport_size({"width": 390, "height": 844})
    page.drawn()
    assert page.page.evaluate(NUMBERS) == []  # no room
    page.page.locator("#map").focus()
    page.press("+", "+", "+", "+")
    page.drawn()
    assert page.page.evaluate(NUMBERS)


@pytest.mark.parametrize("wide", [1280, 390])
def test_it_fits_the_screen_and_nothing_is_cut(opened, wide):
    page = opened_with_scores(opened)
    page.page.set_viewport_size({"width": wide, "height": 844})
    page.drawn()
    assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("#scale", ".ends", "#controls"):
        box = page.page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= wide


def test_a_dark_screen_keeps_the_scale_and_darkens_what_is_hidden(opened):
    page, mean = opened_with_scores(opened), means(0)
    page.page.emulate_media(color_scheme="dark")
    hidden, tile = page.colours([(0, 128, 896, 1024), (128, 256, 0, 32)])
    assert hidden == DARK_COLOURS[0]
    assert nearly(tile, on_scale(mean[1, 0], np.nanmin(mean), np.nanmax(mean)))


def test_pairs_have_the_colour_of_their_tile(opened):
    page, mean = opened_with_scores(opened), means(0)
    page.point(140, 140)
    for _ in range(4):
        page.page.mouse.wheel(0, -400)
    page.drawn()
    assert "visible ones as their tile" in page.text("view")
    top, bottom, left, right = page.view()
    corners = [(bottom - 8, bottom - 4, left + 4, left + 8), (top + 4, top + 8, right - 8, right - 4)]
    visible, hidden = page.colours(corners)
    assert nearly(visible, on_scale(mean[1, 1], np.nanmin(mean), np.nanmax(mean)))
    assert hidden == COLOURS[0]


def test_a_million_tokens_have_a_number_for_each_square_of_tiles(opened):
    million, window = 1 << 20, mf.sliding_window(100_000)
    page = opened_with_scores(opened, window, million)
    assert "Each square of 128 × 128 tiles" in " ".join(page.text("scale").split())
    page.point(500_000, 450_000)
    mean = means(0, window, million, 128 * 128)
    i, j = 500_000 // 16384, 450_000 // 16384
    assert page.text("score").startswith(f"mean {said(mean[i, j])}, from ")
    assert "in the square of 128 × 128 tiles around it" in page.text("score")


def test_what_was_not_looked_at_is_grey(opened):
    page = opened_with_scores(opened, mf.mask(lambda b, h, q, kv: (q == 5) & (kv == 3)), 600)
    page.page.locator("#whole").click()
    assert page.colours([(0, 128, 0, 128)]) == [UNKNOWN]


def test_a_mask_alone_has_no_such_layer_and_a_map_can_have_none(opened):
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    assert page.page.locator("#show-scores, #scale, #score").count() == 0
    page.page.locator("#map").focus()
    page.press("s")
    with pytest.raises(ArgumentError, match="explorer: score needs the mask"):
        visualize.explorer(PACKED.block_map(1024, 1024), score=ALIBI)
