"""The explorer moved about: wheel, drag, keys, and the bars of its histogram, in a real browser."""

import pytest

import maskflash as mf
from maskflash import visualize
from maskflash.backends.triton.walks import split_runs
from maskflash.visualize.style import COLOURS
from tests.visualize.browser import COMMONEST, Truth, span

MILLION = 1 << 20
PACKED = mf.causal() & mf.document([300, 500, 224])


def test_the_wheel_zooms_about_the_pointer_and_tiles_stay_what_they_are(opened):
    mask = mf.causal() & mf.document([3000, 5000, 192])
    truth = Truth(mask, 8192, 8192)
    page = opened(visualize.explorer(mask, 8192, 8192))
    assert page.view() == [0, 8192, 0, 8192]
    before = page.point(6000, 4000)
    assert before == truth(46, 31)
    page.page.mouse.wheel(0, -600)
    top, bottom, left, right = page.view()
    assert 0 < top < 6000 < bottom < 8192
    assert 0 < left < 4000 < right < 8192
    assert (bottom - top) == pytest.approx(8192 / 3.32, rel=0.01)  # e to the power 600 x 0.002
    assert page.said() == before
    for i, j in [(46, 31), (46, 32), (50, 30), (44, 36)]:
        assert page.point(*truth.middle(i, j)) == truth(i, j)
    page.page.mouse.wheel(0, 5000)
    page.page.mouse.wheel(0, 5000)
    page.page.mouse.wheel(0, 5000)
    assert page.view() == [0, 8192, 0, 8192]


def test_dragging_moves_the_map_as_far_as_it_goes(opened):
    page = opened(visualize.explorer(PACKED, 8192, 8192))
    page.page.locator("#closer").click()
    page.page.locator("#closer").click()
    top, bottom, left, right = page.view()
    box = page.page.locator("#map").bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.page.mouse.move(*centre)
    page.page.mouse.down()
    page.page.mouse.move(centre[0] - 100, centre[1] + 50, steps=5)
    page.page.mouse.up()
    now = page.view()
    scale = (right - left) / box["width"]
    assert now[2] - left == pytest.approx(100 * scale, abs=2)
    assert now[0] - top == pytest.approx(-50 * scale, abs=2)
    assert (now[1] - now[0], now[3] - now[2]) == pytest.approx((bottom - top, right - left), abs=2)
    assert page.point(4160, 4160) == Truth(PACKED, 8192, 8192)(32, 32)
    page.page.mouse.down()
    for _ in range(8):
        page.page.mouse.move(box["x"] + 2, box["y"] + 2)
        page.page.mouse.up()
        page.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
        page.page.mouse.down()
        page.page.mouse.move(box["x"] + 2, box["y"] + 2, steps=3)
    page.page.mouse.up()
    assert (page.view()[1], page.view()[3]) == (8192, 8192)


def test_it_is_walked_with_keys_alone(opened):
    truth = Truth(PACKED, 1024, 1024)
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    page.page.locator("#map").focus()
    page.press("ArrowDown")
    assert page.said() == truth(0, 0)
    page.press("ArrowDown", "ArrowDown", "ArrowRight")
    assert page.said() == truth(2, 1)
    page.press("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowUp")
    assert page.said() == truth(1, 0)
    page.press("+", "+", "+", "+")
    top, bottom, *_ = page.view()
    assert bottom - top < 300
    page.press(*["ArrowDown"] * 6, *["ArrowRight"] * 7)
    assert page.said() == truth(7, 7)
    _, bottom, _, right = page.view()
    assert (bottom, right) == (1024, 1024)  # it came along
    page.press("Shift+ArrowLeft", "Shift+ArrowUp")
    assert page.view()[1] < 1024
    page.press("-", "0")
    assert page.view() == [0, 1024, 0, 1024]


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("order", ["place", "launch"])
def test_the_histogram_is_the_work_of_lines(opened, side, order):
    mask, q_len, kv_len = mf.causal() & mf.document([300, 500, 800]), 1600, 1500
    block_map = mask.block_map(q_len, kv_len)
    page = opened(visualize.explorer(mask, q_len, kv_len))
    page.page.locator("#side").select_option(side)
    page.page.locator("#order").select_option(order)
    kinds = block_map.kinds()[0, 0] if side == "rows" else block_map.kinds()[0, 0].T
    runs, length = (block_map.rows, q_len) if side == "rows" else (block_map.columns, kv_len)
    n = len(kinds)
    launched = split_runs(runs, n, kinds.shape[1], False).order(n, 1)[0].tolist()  # as the Triton kernels have it
    lines = list(range(n)) if order == "place" else launched
    page.page.locator("#histogram").scroll_into_view_if_needed()
    box = page.page.locator("#histogram").bounding_box()
    name, tokens = ("row", "queries") if side == "rows" else ("column", "keys")
    for place, line in enumerate(lines):
        page.page.mouse.move(box["x"] + (place + 0.5) * box["width"] / n, box["y"] + 50)
        full, partial = int((kinds[line] == 2).sum()), int((kinds[line] == 1).sum())
        assert page.text("bar") == (
            f"{name} {line} ({tokens} {span(line * 128, min(length, line * 128 + 128))}): {full + partial} tiles, "
            f"{full} full, {partial} partial; launched as number {launched.index(line) + 1} of {n}"
        )
    seen = (kinds > 0).sum(1)
    mean, most = float(seen.double().mean()), int(seen.max())
    assert page.text("balance") == (
        f"{n} {side} of tiles visit {int(seen.sum())}: mean {mean:.1f}, most {most} ({most / mean:.2f} × the mean)"
    )


def test_the_bars_are_as_high_as_the_work(opened):
    mask = mf.causal()
    page = opened(visualize.explorer(mask, 1024, 1024))
    histogram = page.page.locator("#histogram")
    page.drawn()
    box = histogram.bounding_box()
    for row in range(8):
        strips = [[(row + 0.3) * box["width"] / 8, box["height"] * (1 - (tile + 0.7) / 8.3), 0, 0] for tile in range(8)]
        strips = [[x, y, x + 4, y + 3] for x, y, *_ in strips]
        found = histogram.evaluate(COMMONEST, strips)
        assert found == [COLOURS[2]] * row + [COLOURS[1]] + ["#ffffff"] * (7 - row)


def test_a_bar_leads_to_its_row(opened):
    page = opened(visualize.explorer(mf.causal(), 8192, 8192))
    page.page.locator("#map").focus()
    page.press("ArrowDown", *["+"] * 5)
    histogram = page.page.locator("#histogram")
    histogram.scroll_into_view_if_needed()
    box = histogram.bounding_box()
    page.page.mouse.click(box["x"] + 40.5 * box["width"] / 64, box["y"] + 20)
    assert page.said()["place"] == "row 40, column 0 of tiles"
    top, bottom, _, _ = page.view()
    assert top < 40 * 128 < bottom
    histogram.focus()
    page.press("ArrowRight", "Enter")
    assert page.said()["place"] == "row 41, column 0 of tiles"
