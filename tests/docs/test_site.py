"""The site builds with warnings as errors, fetches nothing, documents every public name, and draws every picture."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import maskflash as mf
from maskflash import parallel, presets, scores, testing, visualize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
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
    pictures = re.findall(r'<img[^>]* src="(pictures/[^"]+\.svg)"', page)
    wanted = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8").count("<!-- picture")
    assert len(pictures) == len(set(pictures)) == wanted
    for name in pictures:
        assert "</svg>" in (site / name).read_text(encoding="utf-8")
    assert "<!-- picture" not in page


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
def test_the_build_can_fail(page, fails, tmp_path):
    """A site of two pages, with this one's configuration and hooks."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "hooks.py", tmp_path / "docs")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).write_text("# Title\n", encoding="utf-8")
    (tmp_path / "docs" / "page.md").write_text(page, encoding="utf-8")
    pages = ["index.md", "page.md", "contributing.md", "changelog.md", "decisions/index.md"]
    own = {"nav": pages, "plugins": [], "watch": []}
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8")) | own
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with warnings.catch_warnings(action="ignore"):
        config = load_config(str(tmp_path / "mkdocs.yml"))
        with pytest.raises(Abort) if fails else nullcontext():
            build(config)
