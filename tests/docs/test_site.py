"""The site builds with warnings as errors, fetches nothing, documents every public name, and draws every picture."""

import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import maskflash as mf
from benchmarks import charts
from maskflash import parallel, presets, scores, testing, visualize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    said = found.stdout + found.stderr
    assert found.returncode == 0, said
    assert "WARNING" not in said  # with --quiet mkdocs would neither say nor count them
    return folder


class Fetched(HTMLParser):
    """What a page makes a browser fetch by itself: links that one may follow are none."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            fetched = name in ("src", "srcset", "data", "poster") or (name in ("href", "xlink:href") and tag != "a")
            self.found += [value] if fetched and value else []
            self.found += styled(value or "") if name == "style" else []


def styled(css):
    found = re.findall(r"url\(['\"]?([^)'\"]+)|@import\s+['\"]([^'\"]+)", css)
    return [target for pair in found for target in pair if target]


def elsewhere(path):
    """What a file of the site fetches from another host."""
    text = path.read_text(encoding="utf-8")
    page = Fetched()
    if path.suffix in (".html", ".svg"):
        page.feed(text)
    return [target for target in (*page.found, *styled(text)) if re.match(r"(\w+:)?//", target)]


def test_nothing_is_fetched(site):
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".svg")]
    assert len(files) > 50
    assert {path.name: elsewhere(path) for path in files if elsewhere(path)} == {}


def test_fetching_is_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<a href="https://fine.org">x</a><script src="https://a.org/x.js"></script><link href="//b.org/x.css">'
        '<p style="background: url(http://c.org/x.png)"><img src="here.png"><style>@import "https://d.org";</style>'
    )
    found = {"https://a.org/x.js", "//b.org/x.css", "http://c.org/x.png", "https://d.org"}
    assert set(elsewhere(page)) == found


def test_every_public_name_is_in_the_reference(site):
    there = set(re.findall(r'id="maskflash\.([\w.]+)"', (site / "reference.html").read_text(encoding="utf-8")))
    modules = {"parallel": parallel, "presets": presets, "scores": scores, "testing": testing, "visualize": visualize}
    names = {f"{module}.{name}" for module, found in modules.items() for name in found.__all__}
    names |= {name for name in mf.__all__ if f"presets.{name}" not in names}  # these are also in maskflash itself
    names |= {"integrations.transformers.register", "integrations.shards.on_shards", "cli.traffic.predict"}
    assert names - there - set(modules) == set()


def test_every_recipe_has_its_picture(site):
    page = (site / "cookbook.html").read_text(encoding="utf-8")
    recipes = [re.findall(r'<img[^>]* src="(pictures/[^"]+\.svg)"', text) for text in page.split("<p>")]
    recipes = [panels for panels in recipes if panels]
    pictures = [name for panels in recipes for name in panels]
    wanted = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8").count("<!-- picture")
    assert len(recipes) == wanted
    assert len(pictures) == len(set(pictures))
    assert {len(panels) for panels in recipes} == {2, 4}  # pairs and tiles, or a panel for each of four heads
    for name in pictures:
        assert "<text" in (site / name).read_text(encoding="utf-8")  # not outlines of letters
        assert "</svg>" in (site / name).read_text(encoding="utf-8")
    assert "<!-- picture" not in page


def test_what_presets_add_is_drawn_beside_their_weights(site, hooks):
    page = (site / "scores.html").read_text(encoding="utf-8")
    wanted = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8").count("<!-- scores")
    pictures = re.findall(r'<img alt="what [^"]+ adds at [^"]*" [^>]*src="(pictures/[^"]+\.svg)"', page)
    assert len(set(pictures)) > wanted > 3
    assert "added to a score of 0" in (site / pictures[0]).read_text(encoding="utf-8")
    shown = hooks.scored(mf.causal(), 12, 12, [mf.scores.alibi(), mf.scores.softcap(3.0)], heads=8, at=5.0)
    drawings, titles = zip(*shown, strict=True)
    assert titles == ("what alibi() adds at 12 x 12 tokens", "what softcap(3) adds at 12 x 12 tokens")
    assert all(b"added to a score of 5" in drawing for drawing in drawings)


def test_the_gallery_leads_to_every_recipe(site):
    page = (site / "cookbook.html").read_text(encoding="utf-8")
    (links,) = re.findall(r'<p class="gallery">(.*?)</p>', page, re.DOTALL)
    found = re.findall(r'<a href="#([^"]+)"><img[^>]*src="(pictures/[^"]+\.png)"[^>]*/?> ([^<]+)</a>', links)
    headings = re.findall(r'<h3 id="([^"]+)">([^<]+)', page)
    assert [(anchor, title) for anchor, _, title in found] == headings
    assert all((site / picture).stat().st_size > 50 for _, picture, _ in found)


def test_a_thumbnail_has_a_pixel_for_each_pair(hooks):
    from matplotlib.image import imread

    mask = mf.causal() & mf.document([20, 30, 14])
    pixels = imread(io.BytesIO(hooks.thumbnail(mask, 64, 64)))[..., 2]
    assert pixels.shape == (64, 64)
    assert ((pixels < 0.5) == mask.dense(64, 64)[0, 0].numpy()).all()


def test_every_chart_is_on_the_page_of_benchmarks(site):
    page = (site / "benchmarks.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img[^>]* src="pictures/[^"]+\.svg"', page)) == len(charts.CHARTS) + 1  # and the frontier


class Linked(HTMLParser):
    """A page's links, and the places in it that links may lead to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        self.places.update(own[name] for name in ("id", "name") if own.get(name))
        self.links += [own["href"]] if tag == "a" and own.get("href") else []


def broken(folder):
    """Links from pages to pages or places that are not there."""
    pages = {path.resolve(): Linked(path) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            if path.name == "404.html" or re.match(r"\w+:|//", link):
                continue
            name, _, place = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target in pages and place not in pages[target].places):
                found.append((path.name, link))
    return found


def test_every_link_leads_somewhere(site):
    assert broken(site) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a>')
    (tmp_path / "b.html").write_text('<h1 id="here">x</h1><a href="https://fine.org">4</a><a href="#">5</a>')
    assert broken(tmp_path) == [("a.html", "b.html#gone"), ("a.html", "c.html")]


@pytest.fixture
def served(site):
    """The site's address: a page finds the others' words only from a server."""
    handler = partial(SilentHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class SilentHandler(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_):
        pass


# What people look for, and the page that is to be among the first three that the search finds.
FOUND = {
    "Transformers": "integrations",
    "varlen": "serving",
    "ALiBi": "scores",
    "KV cache": "serving",
    "Trainer": "training",
    "window_size": "conventions",
    "soft-cap": "scores",
    "dropout": "scores",
    "GQA": "index",
    "pages": "serving",
    "natten": "cookbook",
    "FlexAttention": "coming-from",
    "ring attention": "parallel",
    "fp8": "numerics",
}
# The first three pages that the search shows, once they are there.
RESULTS = """() => {
  const found = document.querySelector(".md-search-result__meta").innerText.match(/^(\\d+) matching/);
  const pages = [...document.querySelectorAll(".md-search-result__item")]
    .map((item) => new URL(item.querySelector("a").href).pathname.slice(1, -".html".length));
  return found && pages.length >= Math.min(3, found[1]) && pages.slice(0, 3);
}"""


def test_search_finds(served, chromium):
    page, first = chromium.new_page(), {}
    for words in FOUND:
        page.goto(f"{served}/index.html")
        page.locator(".md-search__input").click()
        page.keyboard.insert_text(words)  # at once: no result is that of a part of it
        first[words] = page.wait_for_function(RESULTS, timeout=30_000).json_value()
    assert {words: first[words] for words, name in FOUND.items() if name not in first[words]} == {}
    page.close()


# Text whose colour and background are less than 4.5 to 1 apart (large text: 3 to 1), each kind once.
PALE = r"""() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true}), found = new Map();
  const known = new Map(); // reading pixels takes as long as all the rest
  const channels = (colour) => {
    if (known.has(colour)) return known.get(colour);
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    known.set(colour, [r, g, b, a / 255]);
    return known.get(colour);
  };
  const over = (ink, paper) => [0, 1, 2].map((i) => ink[i] * ink[3] + paper[i] * (1 - ink[3]));
  const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(colour[i] / 255), 0.05);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, style = getComputedStyle(element);
    const text = texts.currentNode.textContent.trim();
    if (!text || !element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    if (!/[\p{L}\p{N}]/u.test(text) || element.closest("script, style, noscript")) continue;
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(channels(getComputedStyle(at).backgroundColor));
    const paper = layers.reduce((below, layer) => over(layer, below), [255, 255, 255]);
    const lights = [light(over(channels(style.color), paper)), light(paper)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (lights[0] / lights[1] < (large ? 3 : 4.5)) found.set(`${style.color} on ${paper.map(Math.round)}`, text);
  }
  return Object.fromEntries(found);
}"""


# What is wider than its place, and what reaches under the button that copies.
CUT_OFF = """() => {
  const wide = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > wide) found.push("the page");
  for (const button of document.querySelectorAll(".md-code__nav")) {
    const code = button.parentElement.querySelector("code").getBoundingClientRect();
    const own = button.getBoundingClientRect();
    if (own.width && own.left < code.right - 1) found.push(button.parentElement.innerText.slice(0, 40));
  }
  for (const image of document.querySelectorAll(".md-content img")) {
    const scrolls = getComputedStyle(image.parentElement).overflowX === "auto";
    if (image.getBoundingClientRect().right > wide && !scrolls) found.push(image.src);
    const least = parseFloat(image.style.minWidth || 0);
    if (image.getBoundingClientRect().width < least) found.push(`letters of ${image.src}`);
  }
  return found;
}"""
# Tables that scroll, and blocks of code that do though no line has more than 120 columns.
SCROLLS = """() => [...document.querySelectorAll(".md-content :is(pre > code, .md-typeset__scrollwrap, p)")]
  .filter((x) => x.scrollWidth > x.clientWidth + 1)
  .filter((x) => x.tagName !== "CODE" || x.innerText.split("\\n").every((line) => line.length <= 120))
  .map((x) => x.innerText.slice(0, 60))"""


@pytest.mark.parametrize("wide", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(wide, scheme, site, chromium):
    context = chromium.new_context(viewport={"width": wide, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    found = {}
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri())
        found[path.name] = page.evaluate(CUT_OFF) + (page.evaluate(SCROLLS) if wide == 1400 else [])
        found[path.name] += page.evaluate(PALE).items()
    assert {name: cut for name, cut in found.items() if cut} == {}
    context.close()


def test_the_kernel_is_there_in_full(site):
    page = (site / "triton-text.html").read_text(encoding="utf-8")
    assert re.sub(r"<[^>]+>", "", page).count("@triton.jit") == 1


def test_the_notebook_shows_its_outputs(site):
    page = (site / "notebook.html").read_text(encoding="utf-8")
    assert "<!-- output" not in page
    assert re.search(r'<svg role="img"[^>]*><path fill="currentColor"', page)
    assert "torch.Size([1, 8, 1024, 64])" in page


def test_code_in_tables_is_as_on_a_git_host(site):
    pages = {path.name: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    assert "<code>global_tokens(n) | sliding_window(w, w)</code>" in pages["flashmask.html"]
    assert [name for name, page in pages.items() if re.search(r"<td>.*\\\|", page)] == []


def test_links_out_of_the_docs_lead_to_pages(site):
    assert 'href="index.html#writing-masks"' in (site / "cli.html").read_text(encoding="utf-8")
    assert 'href="notebook.html"' in (site / "getting-started.html").read_text(encoding="utf-8")
    assert 'href="decisions/index.html"' in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "fails"),
    [
        ("fine: [here](index.md)", False),
        ("[nowhere](nowhere.md)", True),
        ("[no such heading](index.md#nowhere)", True),
        ("[outside](../mkdocs.yml)", True),
        ("```pycon\n>>> 1 + 1\n3\n\n```\n\n<!-- listing: '' -->\n", True),
    ],
)
def test_the_build_can_fail(page, fails, tmp_path, hooks):
    """A site of two pages, with this one's configuration and hooks."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "hooks.py", tmp_path / "docs")
    (tmp_path / "templates").mkdir()
    for name in hooks.FROM_ROOT:
        (tmp_path / name).write_text("# Title\n", encoding="utf-8")
    (tmp_path / "docs" / "page.md").write_text(page, encoding="utf-8")
    pages = ["index.md", "page.md", "contributing.md", "changelog.md", "templates.md", "decisions/index.md"]
    own = {"nav": pages, "plugins": [], "watch": []}
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8")) | own
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with warnings.catch_warnings(action="ignore"):
        config = load_config(str(tmp_path / "mkdocs.yml"))
        with pytest.raises(Abort) if fails else nullcontext():
            build(config)
