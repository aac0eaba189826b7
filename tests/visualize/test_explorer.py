"""The explorer in a real browser: what it draws and says is what the block map holds, and it asks nobody else."""

import itertools
import re
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskflash as mf
from maskflash import visualize
from maskflash.testing import masks
from maskflash.visualize.cells import cells
from maskflash.visualize.style import COLOURS, DARK_COLOURS
from tests.visualize.browser import AT, COMMONEST, NAMES, Explorer, Truth, span

MILLION = 1 << 20
PACKED = mf.causal() & mf.document([300, 500, 224])
SHORTER = mf.causal() & mf.document([300, 500, 160])
SPANS = torch.tensor([[100, 800, 1], [400, 50, 900]])
PER_HEAD = mf.mask(lambda b, h, q, kv: q >= kv and q - kv < SPANS[b, h])
HOLES = mf.mask(lambda b, h, q, kv: (q * 37 + kv * 11) % 1009 != 5)


@pytest.mark.parametrize("shown", [PACKED, PACKED.block_map(1024, 1024), mf.full(), PACKED.to_flashmask(1024, 1024)])
def test_it_counts_what_the_map_counts(opened, shown):
    block_map = shown if isinstance(shown, mf.BlockMap) else shown.block_map(1024, 1024)
    page = opened(visualize.explorer(shown, 1024, 1024))
    counts = ", ".join(f"{count} {kind}" for kind, count in block_map.counts.items())
    assert page.text("counts") == page.text("drawn") == counts


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len", "block"),
    [(SHORTER, 1000, 960, (128, 128)), (mf.causal(), 700, 1100, (64, 128)), (HOLES, 256, 320, (32, 32))],
    ids=["documents", "causal", "holes"],
)
def test_each_tile_has_its_colour_and_says_what_it_is(opened, mask, q_len, kv_len, block):
    truth = Truth(mask, q_len, kv_len, block)
    page = opened(visualize.explorer(mask, q_len, kv_len, block_size=block))
    kinds = truth.kinds[0, 0]
    tiles = list(itertools.product(*map(range, kinds.shape)))
    found = page.colours([tuple(itertools.chain(*truth.spans(*tile))) for tile in tiles])
    assert found == [COLOURS[int(kinds[tile])] for tile in tiles]
    for tile in tiles:
        assert page.point(*truth.middle(*tile)) == truth(*tile)


@pytest.mark.parametrize("closer", [0, 1, 2])
def test_where_tiles_are_less_than_a_pixel_cells_are_drawn(opened, closer):
    length = 2003
    mask = (mf.causal() & mf.document([300, 999, 704])) | mf.mask(lambda b, h, q, kv: (q // 5 + kv // 3) % 40 == 0)
    block_map = mask.block_map(length, length, block_size=1)
    page = opened(visualize.explorer(block_map))
    for _ in range(closer):
        page.page.locator("#closer").click()  # 1.5 times, about the middle
    page.drawn()
    side = int(re.search(r"each cell is (\d+) × \1 tiles", page.text("view"))[1])
    grid = cells(block_map, -(-length // side))
    assert grid.side == side > 1
    width = page.page.locator("#map").evaluate("(canvas) => canvas.width")
    scale, first = width / length * 1.5**closer, (length - length / 1.5**closer) / 2
    centres = {cell: int(((cell + 0.5) * side - first) * scale) for cell in range(length // side)}
    shown = [cell for cell, x in centres.items() if 0 < x < width - 1]
    pixels = [centres[cell] for cell in shown]
    found = page.page.locator("#map").evaluate(AT, [[COLOURS[kind] for kind in (0, 1, 2)], pixels, pixels])
    assert found == ["".join(map(str, grid.kinds[cell, shown])) for cell in shown]


def test_all_deciders_are_among_them(opened):
    page = opened(visualize.explorer(HOLES, 256, 320, block_size=32))
    assert re.fullmatch(r"\d+ by samples, \d+ by all of its pairs", page.text("decided"))
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    assert page.text("decided") == "64 by the rows' intervals"
    page = opened(visualize.explorer(mf.mask(lambda b, h, q, kv: q * 1.0 >= kv), 1024, 1024))
    assert page.text("decided") == "56 by bounds, 8 by samples"
    assert opened(visualize.explorer(mf.causal(), 1024, 1024)).text("decided") == "64 by a formula"


def test_a_map_alone_does_not_tell_who_decided(opened):
    page = opened(visualize.explorer(PACKED.block_map(1024, 1024)))
    assert page.text("decided") == "not recorded in a block map"
    assert page.point(64, 64)["decider"] == "not recorded in a block map"


@settings(max_examples=12)
@given(data=st.data())
def test_any_mask_of_any_shape(chromium, tmp_path_factory, data):
    q_len, kv_len, block = (data.draw(st.integers(1, high)) for high in (40, 40, 12))
    mask = data.draw(masks(40))
    sizes = {"batch": 2, "heads": 2}
    truth = Truth(mask, q_len, kv_len, block, **sizes)
    path = tmp_path_factory.mktemp("any") / "page.html"
    visualize.explorer(mask, q_len, kv_len, **sizes, block_size=block, path=path)
    own = chromium.new_page()
    page = Explorer(own, path.as_uri())
    b, h = (data.draw(st.integers(0, size - 1)) for size in truth.map.shape[:2])
    for name, index, size in (("batch", b, truth.map.shape[0]), ("head", h, truth.map.shape[1])):
        if size > 1:
            own.locator(f"#{name}").select_option(str(index))
    for _ in range(3):
        i, j = (data.draw(st.integers(0, size - 1)) for size in truth.map.shape[2:])
        assert page.point(*truth.middle(i, j)) == truth(i, j, b, h)
    own.close()


def test_batch_rows_and_heads_are_chosen(opened):
    sizes = {"batch": 2, "heads": 3}
    truth = Truth(PER_HEAD, 1024, 1024, **sizes)
    page = opened(visualize.explorer(PER_HEAD, 1024, 1024, **sizes))
    for b, h in itertools.product(range(2), range(3)):
        page.page.locator("#batch").select_option(str(b))
        page.page.locator("#head").select_option(str(h))
        kinds = truth.kinds[b, h]
        counts = ", ".join(f"{int((kinds == kind).sum())} {NAMES[kind]}" for kind in (2, 1, 0))
        assert page.text("drawn") == f"batch row {b}, head {h}: {counts}"
        assert page.point(*truth.middle(5, 3)) == truth(5, 3, b, h)
    assert not opened(visualize.explorer(mf.causal(), 64, 64)).page.locator("#batch").is_visible()


def test_a_million_tokens_of_documents(opened):
    lengths = torch.randint(100, 20_000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [length for length, total in zip(lengths, accumulate(lengths), strict=True) if total <= MILLION]
    mask = mf.causal() & mf.document([*lengths, MILLION - sum(lengths)])
    block_map = mask.block_map(MILLION, MILLION)
    html = visualize.explorer(mask, MILLION, MILLION)
    assert len(html.encode()) < 5_000_000
    page = opened(html)
    page.page.locator("#show-documents").uncheck()  # lines over the tiles that are looked at
    page.drawn()
    side = int(re.search(r"each cell is (\d+) × \1 tiles", page.text("view"))[1])
    grid = cells(block_map, 8192 // side)
    assert grid.side == side
    for i, j in [(0, 0), (100, 100), (100, 99), (300, 10), (10, 300), (250, 250)]:
        said = page.point((i + 0.5) * side * 128, (j + 0.5) * side * 128)
        assert said["kind"].partition(":")[0] == NAMES[grid.kinds[i, j]]
        assert said["rows"] == span(i * side * 128, (i + 1) * side * 128)
        assert said["decider"] == "the rows' intervals"
    # The boundary is thinner than a pixel, and still there.
    size = side * 128
    diagonal = [(i * size, (i + 1) * size, i * size, (i + 1) * size) for i in range(0, 8192 // side, 37)]
    found = page.page.locator("#map").evaluate(
        COMMONEST, [[*place, place[0] + 1, place[1] + 1] for place in (page.place(x[0], x[2]) for x in diagonal)]
    )
    assert set(found) <= {COLOURS[1], COLOURS[2]}
    # Down to single tiles.
    query = 512 * 1024 + 64
    page.point(query, query)
    for _ in range(8):
        page.page.mouse.wheel(0, -600)
    top, bottom, left, right = page.view()
    assert bottom - top < 2000
    assert "each cell" not in page.text("view")
    i, j = (top + bottom) // 2 // 128, (left + right) // 2 // 128
    kind = NAMES[_kind(block_map, i, j)]
    said = page.point(i * 128 + 64, j * 128 + 64)
    assert (said["kind"], said["rows"], said["columns"]) == (
        kind,
        span(i * 128, i * 128 + 128),
        span(j * 128, j * 128 + 128),
    )
    number = int(torch.searchsorted(torch.tensor(lengths).cumsum(0), i * 128, right=True))
    assert f"queries {number}" in page.text("documents")


def _kind(block_map, i, j):
    """A tile's kind from the runs of its row: the lattice would be 64 MiB."""
    runs = block_map.rows
    for at in range(int(runs.offsets[i]), int(runs.offsets[i + 1])):
        if runs.start[at] <= j < runs.stop[at]:
            return 2 if runs.full[at] else 1
    return 0


def test_documents_and_vectors_are_marked(opened):
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    page.point(320, 64)
    assert page.text("documents") == "doc: queries 0, 1; keys 0"
    vectors = PACKED.to_flashmask(1024, 1024)
    page = opened(visualize.explorer(vectors, 1024, 1024))
    page.point(700, 320)
    assert page.text("vector-lts") == "300 to 800"
    page.point(700, 500)
    assert page.text("vector-lts") == "800"


@pytest.mark.parametrize(
    ("shown", "name", "line"),
    [(PACKED, "documents", (300, 500)), (PACKED.to_flashmask(1024, 1024), "vectors", (800, 500))],
    ids=["documents", "vectors"],
)
def test_marks_are_drawn_and_can_be_left_out(opened, shown, name, line):
    page = opened(visualize.explorer(shown, 1024, 1024))
    around = [(line[0] - 6, line[0] + 8, line[1], line[1] + 60)]

    def marked():
        page.drawn()
        (x0, y0), (x1, y1) = page.place(around[0][0], around[0][2]), page.place(around[0][1], around[0][3])
        colours = page.page.locator("#map").evaluate(COMMONEST, [[x0, y, x1, y + 1] for y in range(int(y0), int(y1))])
        return not set(colours) <= set(COLOURS.values())

    assert marked()
    page.page.locator(f"#show-{name}").uncheck()
    assert not marked()


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a\"b'&amp;<!--"]
)
def test_a_hostile_name_is_shown_as_it_is(opened, name):
    page = opened(visualize.explorer(PACKED, 1024, 1024, title=name))
    assert page.page.locator("h1").inner_text() == page.page.title() == name
    assert page.text("drawn") == "4 full, 18 partial, 42 skip"


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 7), (7, 0), (1, 1), (1, 4096), (4096, 1)])
def test_odd_lengths_are_shown(opened, q_len, kv_len):
    block_map = mf.causal().block_map(q_len, kv_len)
    page = opened(visualize.explorer(mf.causal(), q_len, kv_len))
    assert page.text("drawn") == ", ".join(f"{count} {kind}" for kind, count in block_map.counts.items())
    said = page.page.locator("header p").inner_text()
    queries, keys = "query" if q_len == 1 else "queries", "key" if kv_len == 1 else "keys"
    assert said.startswith(f"{q_len:,} {queries} × {kv_len:,} {keys} in tiles of 128 × 128 tokens: ")
    rows = len(block_map.kinds()[0, 0])
    visits = "1 row of tiles visits" if rows == 1 else f"{rows} rows of tiles visit"
    assert page.text("balance").startswith(visits)
    box = page.page.locator("#map").bounding_box()
    page.page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.page.mouse.wheel(0, -300)
    page.drawn()
    assert page.said()["place"] == ("row 0, column 0 of tiles" if q_len and kv_len else "")
    assert page.page.locator("#ask").is_visible() == (not (q_len and kv_len))


def test_it_fits_paper_and_comes_back(opened):
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    before = page.page.locator("#map").bounding_box()["width"]
    page.page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    assert page.page.locator("#map").bounding_box()["width"] < 600 < before
    page.page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
    assert page.page.locator("#map").bounding_box()["width"] == before
    assert page.page.pdf(format="A4").startswith(b"%PDF")


def test_everything_has_a_name_for_those_who_do_not_see_it(opened):
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    page.point(64, 64)
    unnamed = """() => [...document.querySelectorAll("button, select, input, canvas, section")].filter((x) =>
        !x.ariaLabel && !x.textContent.trim() && !(x.labels && x.labels.length)).map((x) => x.id)"""
    assert page.page.evaluate(unnamed) == []
    assert page.page.locator("#answer").get_attribute("aria-live") == "polite"
    assert "queries 0 to 1,024" in page.page.locator("#map").get_attribute("aria-label")


def test_a_browser_that_cannot_unpack_it_says_so(chromium, tmp_path):
    path = tmp_path / "page.html"
    visualize.explorer(PACKED, 1024, 1024, path=path)
    page = chromium.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(path.as_uri())
    page.wait_for_selector("#problem:not(:empty)")
    assert "it needs DecompressionStream" in page.locator("#problem").inner_text()
    assert page.locator("#counts").inner_text() == "4 full, 18 partial, 42 skip"
    page.close()


NATTEN = mf.natten(32, 32, 7, 7)
SCATTERED = mf.mask(lambda b, h, q, kv: (q * 7 + kv * 3) % 29 < 9)


@pytest.mark.parametrize("mask", [NATTEN, PER_HEAD, SCATTERED], ids=["natten", "heads", "scattered"])
def test_partial_tiles_show_their_pairs_when_there_is_room(opened, mask):
    sizes = {"batch": 2, "heads": 3} if mask is PER_HEAD else {}
    page = opened(visualize.explorer(mask, 1000, 1000, **sizes))
    b, h = (1, 2) if sizes else (0, 0)
    if sizes:
        page.page.locator("#batch").select_option(str(b))
        page.page.locator("#head").select_option(str(h))
    assert "show their pairs" not in page.text("view")
    page.point(900, 880)
    for _ in range(4):
        page.page.mouse.wheel(0, -400)
    top, bottom, left, right = page.view()
    assert bottom - top < 100
    assert "show their pairs" in page.text("view")
    rows, columns = range(top + 2, bottom - 2, 3), range(left + 2, right - 2, 3)
    centres = [page.place(q + 0.5, k + 0.5) for q, k in zip(rows, columns, strict=False)]
    xs, ys = ([round(value) for value in x] for x in zip(*centres, strict=True))
    found = page.page.locator("#map").evaluate(AT, [[COLOURS[kind] for kind in (0, 1, 2)], xs, ys])
    truth = mask.dense(1000, 1000, **sizes).expand(2, 3, -1, -1)[b, h]
    wrong = [
        (q, k)
        for q, line in zip(rows, found, strict=False)
        for k, kind in zip(columns, line, strict=False)
        if kind in "02" and (kind == "2") != bool(truth[q, k])
    ]
    assert wrong == []
    shown = "".join(found)
    assert shown.count("0") > 20
    assert shown.count("2") > 20
    assert shown.count("1") == 0


def test_pairs_are_left_out_where_there_are_too_many(opened):
    page = opened(visualize.explorer(mf.mask(lambda b, h, q, kv: (q + kv) % 2 == 0), 2048, 2048))
    for _ in range(6):
        page.page.locator("#closer").click()
    page.drawn()
    assert "show their pairs" not in page.text("view")


def test_an_empty_panel_says_what_to_do(opened):
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    assert "Point at a tile" in page.text("ask")
    assert not page.page.locator("#tile").is_visible()
    page.point(64, 64)
    assert page.page.locator("#tile").is_visible()
    assert not page.page.locator("#ask").is_visible()
    assert "There are no tiles" in opened(visualize.explorer(mf.causal(), 0, 0)).text("ask")


LABELS = """() => ["keys", "queries"].map((id) => [...document.getElementById(id).children].map((label) => {
  const box = label.getBoundingClientRect(), room = document.getElementById(id).getBoundingClientRect();
  return [label.textContent, box.right <= room.right + 1 && box.bottom <= room.bottom + 1];
}))"""


@pytest.mark.parametrize("wide", [1280, 390])
@pytest.mark.parametrize("length", [1024, MILLION])
def test_axes_have_equal_steps_at_borders_of_tiles_and_whole_labels(opened, wide, length):
    page = opened(visualize.explorer(mf.causal().block_map(length, length)))
    page.page.set_viewport_size({"width": wide, "height": 900})
    page.drawn()
    keys, queries = page.page.evaluate(LABELS)
    assert all(whole for _, whole in (*keys, *queries))
    places = [[int(re.sub(r"\D", "", text)) for text, _ in labels] for labels in (keys, queries)]
    few = min(map(len, places))
    assert few >= 2
    assert places[0][:few] == places[1][:few]
    assert all(place % 128 == 0 for place in places[0])
    assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_dark_screen_has_dark_paper(opened):
    page = opened(visualize.explorer(PACKED, 1024, 1024))
    page.page.locator("#show-documents").uncheck()
    assert page.colours([(0, 128, 896, 1024)]) == [COLOURS[0]]
    page.page.emulate_media(color_scheme="dark")
    assert page.colours([(0, 128, 896, 1024), (0, 128, 0, 128)]) == [DARK_COLOURS[0], DARK_COLOURS[1]]
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 40
    page.page.emulate_media(color_scheme="light")
    assert page.colours([(0, 128, 896, 1024)]) == [COLOURS[0]]
