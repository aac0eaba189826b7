"""The explorer's page as its reader has it in a browser, and what is to be said there."""

import re

import torch

from maskflash.visualize.deciders import decide

NAMES = ("skip", "partial", "full")
MEANS = {
    "pairs": "all pairs of the few rows",
    "formula": "a formula",
    "intervals": "the rows' intervals",
    "groups": "groups of rows and columns",
    "columns": "cutting columns",
    "parts": "conditions one by one",
    "bounds": "bounds",
    "samples": "samples",
    "elements": "all of its pairs",
}
# The commonest colour of each rectangle (left, top, right, bottom) of a canvas: outlines and hatches have fewer pixels.
COMMONEST = """(canvas, rectangles) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  return rectangles.map(([left, top, right, bottom]) => {
    const box = [left, top, right - left, bottom - top].map((x) => Math.round(x * canvas.width / canvas.clientWidth));
    const pixels = copy.getImageData(...box).data, counts = new Map();
    for (let at = 0; at < pixels.length; at += 4) {
      const colour = "#" + [0, 1, 2].map((i) => pixels[at + i].toString(16).padStart(2, "0")).join("");
      counts.set(colour, (counts.get(colour) ?? 0) + 1);
    }
    return [...counts].reduce((best, entry) => entry[1] > best[1] ? entry : best)[0];
  });
}"""
# Which colour of a palette each pixel (x, y) has, as a text of digits.
AT = """(canvas, [palette, xs, ys]) => {
  const {width, height} = canvas;
  const copy = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const pixels = copy.getImageData(0, 0, width, height).data;
  const hex = (at) => "#" + [0, 1, 2].map((i) => pixels[at + i].toString(16).padStart(2, "0")).join("");
  return ys.map((y) => xs.map((x) => palette.indexOf(hex(4 * (y * width + x)))).join(""));
}"""
TOLD = ("place", "kind", "rows", "columns", "decider", "row-work")


class Explorer:
    """A page as its reader has it: pointer, keys, and what is written there."""

    def __init__(self, page, url):
        self.page = page
        page.goto(url)
        page.wait_for_selector("body[data-ready]")

    def text(self, name):
        return self.page.locator(f"#{name}").inner_text()

    def drawn(self):
        """Wait until what was asked for is on the screen."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def view(self):
        """First and last query, first and last key that are shown, once they are."""
        self.drawn()
        return self._look()[0]

    def _look(self):
        """The same as it is now, and the canvas's rectangle."""
        text, box = self.page.evaluate(
            """() => {
              const {x, y, width, height} = document.getElementById("map").getBoundingClientRect();
              return [document.getElementById("view").innerText, [x, y, width, height]];
            }"""
        )
        found = re.match(r"queries ([\d,]+) to ([\d,]+), keys ([\d,]+) to ([\d,]+)", text)
        return [int(x.replace(",", "")) for x in found.groups()], box

    def place(self, query, key):
        """Where a token lies, in pixels of the canvas."""
        (top, bottom, left, right), (_, _, width, height) = self._look()
        return (key - left) / (right - left) * width, (query - top) / (bottom - top) * height

    def point(self, query, key):
        """Point at a token; what is said of it."""
        (x, y), (left, top, *_) = self.place(query, key), self._look()[1]
        self.page.mouse.move(left + x, top + y)
        return self.said()

    def said(self):
        """What is written of the tile."""
        script = "(names) => names.map((name) => document.getElementById(name).innerText)"
        return dict(zip(TOLD, self.page.evaluate(script, TOLD), strict=True))

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def colours(self, rectangles):
        """Of rectangles (top, bottom, left, right) in tokens."""
        self.drawn()
        corners = []
        for top, bottom, left, right in rectangles:
            (x0, y0), (x1, y1) = self.place(top, left), self.place(bottom, right)
            corners.append([x0 + 2, y0 + 2, x1 - 2, y1 - 2])
        return self.page.locator("#map").evaluate(COMMONEST, corners)


def span(first, stop):
    return f"{first:,} to {stop - 1:,}"


class Truth:
    """What is to be said of tiles, from the map's lattice and the analysis alone."""

    def __init__(self, mask, q_len, kv_len, block=128, **sizes):
        block_size = (block, block) if isinstance(block, int) else block
        sizes = {"batch": 1, "heads": 1} | sizes
        problem = mask.at(q_len, kv_len, **sizes).tiled(block_size)
        decided = decide(problem)
        self.counts = decided.seen.decided
        self.map = decided.seen.block_map
        self.kinds = self.map.kinds()
        self.evaluated = torch.zeros(len(self.map.rows.offsets) - 1, self.map.shape[3], dtype=torch.bool)
        if decided.evaluated is not None:
            self.evaluated[decided.evaluated.tiles(full=True)] = True
        self.evaluated = self.evaluated.view(self.map.shape)

    def spans(self, i, j):
        """Rows and columns of a tile in tokens: two (start, stop)."""
        (rows, columns), q_len, kv_len = self.map.block_size, self.map.q_len, self.map.kv_len
        return (i * rows, min(q_len, i * rows + rows)), (j * columns, min(kv_len, j * columns + columns))

    def middle(self, i, j):
        """A token in the middle of a tile."""
        return tuple(sum(span) / 2 for span in self.spans(i, j))

    def decider(self, i, j, b, h):
        for all_of_them in ("pairs", "formula", "intervals", "groups", "columns", "parts"):
            if self.counts[all_of_them]:
                return all_of_them
        return "elements" if self.evaluated[b, h, i, j] else "samples" if self.kinds[b, h, i, j] == 1 else "bounds"

    def __call__(self, i, j, b=0, h=0):
        row = self.kinds[b, h, i]
        full, partial = int((row == 2).sum()), int((row == 1).sum())
        rows, columns = self.spans(i, j)
        return {
            "place": f"row {i}, column {j} of tiles",
            "kind": NAMES[row[j]],
            "rows": span(*rows),
            "columns": span(*columns),
            "decider": MEANS[self.decider(i, j, b, h)],
            "row-work": f"{full + partial} of {len(row)} tiles visited: {full} full, {partial} partial",
        }
