"""The repository's pages -> the site's: pages from outside docs/, the notebook, links between them, and pictures.

mkdocs calls the functions that begin with `on_`. In a page, a comment `<!-- picture: mask, 64, 64 -->` becomes a
picture of what the sessions above it have made, `<!-- scores: mask, 64, 64, [alibi] -->` some of what score functions
add, `<!-- shards: plan, mask -->` one of a plan's ranks over a mask, and `<!-- listing: text -->` a listing of a text;
they are what `picture(mask, 64, 64)` and so on return in the sessions' own namespace. `<!-- chart: "frontier" -->`
draws stored results.
Panels are pictures of their own: side by side where there is room, else below one another.
`<!-- gallery -->` becomes small pictures of all masks that the page draws, which lead to their headings.
"""

import doctest
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os.path import relpath
from pathlib import Path
from typing import Any

import griffe
import nbformat
from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "templates/README.md": "templates.md",
}
# What people look for, and the pages say in other words or not in a heading: search puts these pages first.
WORDS = {
    "coming-from.md": ["GQA"],
    "conventions.md": ["window_size"],
    "index.md": ["GQA"],
    "numerics.md": ["fp8"],
    "parallel.md": ["ring attention", "context parallel"],
    "scores.md": ["ALiBi", "soft-cap", "dropout"],
    "serving.md": ["KV cache", "pages", "varlen"],
}
SESSION = re.compile(r"^```pycon\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHOWN = re.compile(r"^<!-- ((?:picture|scores|shards|chart|listing): .*) -->$", re.MULTILINE)
GALLERY = "<!-- gallery -->"
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
ROW = re.compile(r"^\|.*$", re.MULTILINE)
CODE = re.compile(r"`[^`]*`")
LEAST = 0.7  # of a picture's size: letters of 10 points are 9 pixels; on a phone wide pictures scroll
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that aren't Markdown files in docs/."""
    pages = {place: (ROOT / name).read_text(encoding="utf-8") for name, place in FROM_ROOT.items()}
    pages["decisions/index.md"] = decisions()
    pages |= {f"{path.stem}.md": notebook(path) for path in ROOT.glob("docs/*.ipynb")}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw what the page wants to show, and lead its links to where the site has their targets."""

    def added(drawing: bytes, title: str, kind: str = "svg", look: str = "") -> str:
        place = f"pictures/{Path(uri).stem}-{sum(file.src_uri.startswith('pictures/') for file in files)}.{kind}"
        files.append(File.generated(config, place, content=drawing))
        if kind == "svg":
            look += f' style="min-width: {round(LEAST * width_of(drawing))}px"'
        return f"![{title}]({relpath(place, Path(uri).parent)}){{ loading=lazy {look} }}"

    def picture(*arguments: Any, **options: Any) -> str:
        if GALLERY in markdown:
            small.append(added(thumbnail(*arguments, **options), "", "png"))
        return " ".join(added(*one) for one in drawn(*arguments, **options))

    uri, small = page.file.src_uri, list[str]()
    if uri.startswith("decisions/"):
        page.meta["search"] = {"boost": 0.02}  # who looks for a word wants to use it first
    page.meta["tags"] = WORDS.get(uri, [])
    makers = {
        "picture": picture,
        "scores": lambda *arguments, **options: " ".join(
            added(*one, look=".paper") for one in scored(*arguments, **options)
        ),
        "shards": lambda *arguments, **options: added(*sharded(*arguments, **options), look=".paper"),
        "chart": lambda name: added(*charted(name)),
        "listing": listing,
    }
    shown = shown_in(markdown, uri, makers)
    headings = [HEADING.findall(text)[-1] for text in SHOWN.split(markdown)[:-1:2]] if GALLERY in markdown else []
    markdown = SHOWN.sub(lambda _: next(shown), markdown).replace(GALLERY, gallery(headings, small))
    # In a table a git host wants | escaped inside of code, too; here the backslash would show.
    markdown = ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), markdown)
    source = next((ROOT / name for name, place in FROM_ROOT.items() if place == uri), None)
    home = (source or ROOT / "docs" / uri).parent
    return LINK.sub(lambda link: moved(link[1], home, uri), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put a notebook's outputs in their places: Markdown would take the pictures out of them."""
    path = ROOT / "docs" / Path(page.file.src_uri).with_suffix(".ipynb")
    return re.sub(r"<!-- output of (\d+) -->", lambda place: output(path, int(place[1])), content)


class Examples(griffe.Extension):
    """Docstrings' sections `Example:` as sessions; the reference knows them in the plural."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def moved(target: str, home: Path, uri: str) -> str:
    """A link to a file of the repository, as the page at `uri` of the site has it; others stay as they are."""
    path = (home / target).resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        return target
    name = path.relative_to(ROOT).as_posix()
    place = FROM_ROOT.get(name, name.removeprefix("docs/"))
    place = f"{place}/index.md" if path.is_dir() else place.replace(".ipynb", ".md")
    return relpath(place, Path(uri).parent)


def shown_in(markdown: str, name: str, makers: dict[str, Callable[..., Any]]) -> Iterator[Any]:
    """What a page's comments make, each after the sessions above it; a page without comments is not run.

    Raises:
        PluginError: a session prints something else than it shows.
    """
    names: dict[str, Any] = {}
    pieces = SHOWN.split(markdown)
    for text, wish in zip(pieces[::2], pieces[1::2], strict=False):
        failed, said = run(text, name, names)
        if failed:
            raise PluginError(f"{name}: {said}")
        kind, _, arguments = wish.partition(": ")
        yield eval(f"{kind}({arguments})", {**names, **makers})


def run(text: str, name: str, names: dict[str, Any]) -> tuple[int, str]:
    """Run a text's sessions one after the other; return failures, and what was printed of them."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest("\n".join(SESSION.findall(text)), {}, name, name, 0)
    test.globs = names
    # Dynamo takes its names out of the globals of what it compiled when that goes: clearing them would be too early.
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    result = runner.run(test, out=said.append, clear_globs=False)
    return result.failed, "".join(said)


def drawn(
    mask: Any,
    q_len: int,
    kv_len: int,
    *,
    block_size: int = 8,
    heads: int = 1,
    form: Any = None,
    against: Any = None,
    **options: Any,
) -> Iterator[tuple[bytes, str]]:
    """A mask's pairs and its tiles, another engine's form or another mask, or its heads' pairs: SVGs with titles."""
    import maskflash as mf
    from maskflash import visualize

    def pairs(one: Any, ax: Any, **look: Any) -> Any:
        return visualize.draw_mask(one, q_len, kv_len, ax=ax, **look, **options)

    def formed(ax: Any) -> Any:
        pairs(mask, ax, legend=False)
        if isinstance(form, mf.Slices):
            return visualize.draw_slices(form, q_len, kv_len, ax=ax)
        return visualize.draw_row_intervals(form, ax=ax)

    def tiles(ax: Any) -> Any:
        return visualize.draw_tiles(mask.block_map(q_len, kv_len, block_size=block_size, **options), ax=ax)

    name, wide, panels = mask.name, 4.0, dict[str, Callable[[Any], Any]]()
    if heads > 1:
        panels = {f"head {h}": partial(pairs, mask, legend=False, heads=heads, head=h) for h in range(heads)}
    elif against is not None:
        name, wide = f"{mask.name} and {against.name}", 3.2  # three are as wide as the text
        shown = {"a": mask, "b": against, "only in one": mask ^ against}
        panels = {title: partial(pairs, one, legend=False) for title, one in shown.items()}
    else:
        panels["pairs"] = partial(pairs, mask)
        if form is None:
            panels[f"tiles of {block_size} x {block_size} tokens"] = tiles
        else:
            panels["slices" if isinstance(form, mf.Slices) else "row intervals"] = formed
    name = name.replace("<lambda>", "the mask")
    for title, draw in panels.items():
        figure, ax = panel(wide, 1.45 + (wide - 1) * q_len / kv_len, right=0.3, bottom=0.7, top=0.75)
        draw(ax=ax).set_title(title)
        yield as_svg(figure), f"{name} at {q_len} x {kv_len} tokens: {title}"


def panel(width: float, height: float, *, right: float, bottom: float, top: float) -> tuple[Any, Any]:
    """A figure of one panel, and its axes; sizes in inches. A layout engine takes as long as all the rest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    margins = {"left": 0.7 / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
    return figure, figure.subplots(gridspec_kw=margins)


def thumbnail(mask: Any, q_len: int, kv_len: int, **options: Any) -> bytes:
    """The pairs of a mask's first batch row and head as PNG, a pixel each."""
    import numpy as np
    from matplotlib.image import imsave

    from maskflash.visualize.cells import cells
    from maskflash.visualize.style import COLOURS

    colours = [[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for _, colour in sorted(COLOURS.items())]
    kinds = cells(mask.block_map(q_len, kv_len, **{**options, "block_size": 1}), max(q_len, kv_len)).kinds
    file = io.BytesIO()
    imsave(file, np.array(colours, dtype=np.uint8)[kinds], format="png")
    return file.getvalue()


def gallery(headings: list[str], pictures: list[str]) -> str:
    """Small pictures with their headings under them, each a link."""
    links = [
        f"[{picture} {heading}](#{slugify(heading, '-')})" for heading, picture in zip(headings, pictures, strict=True)
    ]
    return "\n".join([*links, "{ .gallery }"]) if links else ""


def scored(mask: Any, q_len: int, kv_len: int, scores: Sequence[Any], **options: Any) -> Iterator[tuple[bytes, str]]:
    """What each of some score functions adds under a mask: SVGs with titles."""
    from maskflash import visualize

    for score in scores:
        figure, ax = panel(4.7, 4.7, right=0.8, bottom=0.8, top=0.8)
        visualize.draw_score(mask, score, q_len, kv_len, ax=ax, **options)
        yield as_svg(figure), f"what {ax.get_title()} adds at {q_len} x {kv_len} tokens"


def sharded(plan: Any, mask: Any, **options: Any) -> tuple[bytes, str]:
    """A plan's ranks over a mask, as SVG; a title."""
    from maskflash import visualize

    figure = visualize.draw_shards(plan, mask, **options)
    return as_svg(figure), f"{mask.name}, {plan.seq_len} tokens on {plan.world_size} ranks"


def charted(name: str) -> tuple[bytes, str]:
    """A chart of stored results, as SVG; a title."""
    from benchmarks import charts, shard_tables

    if name == "frontier":
        return as_svg(shard_tables.stored_frontier()), "balance over bytes of plans and balancers"
    return as_svg(charts.stored(name)), charts.CHARTS[name].title


def as_svg(figure: Any) -> bytes:
    """A figure as a file: the same picture, the same bytes."""
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "maskflash", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def width_of(drawing: bytes) -> float:
    """The width of a drawing of matplotlib's in a browser's pixels."""
    found = re.search(rb'<svg [^>]*?width="([\d.]+)pt"', drawing)
    assert found, "matplotlib says how wide it is, in points"
    return float(found[1]) * 4 / 3


def listing(text: str) -> str:
    """Python text, folded."""
    body = "\n".join(f"    {line}" for line in text.rstrip().splitlines())
    return f'??? note "All of it"\n\n    ```python\n{body}\n    ```\n'


def decisions() -> str:
    """A list of the decision records, which a git host shows as a folder."""
    rows = [
        f"- [{path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}]({path.name})"
        for path in sorted(ROOT.glob("docs/decisions/*.md"))
    ]
    return "# Decisions\n\nWhat someone will ask about, and why it is as it is.\n\n" + "\n".join(rows) + "\n"


def cells(path: Path) -> list[Any]:
    """The cells of a notebook."""
    return list(nbformat.read(path, as_version=4).cells)


def notebook(path: Path) -> str:
    """A notebook as Markdown, with a comment in the place of each output."""
    parts = []
    for number, cell in enumerate(cells(path)):
        code = cell.cell_type == "code"
        parts.append(f"```python\n{cell.source}\n```\n\n<!-- output of {number} -->" if code else cell.source)
    return "\n\n".join(parts) + "\n"


def output(path: Path, number: int) -> str:
    """What a notebook's cell shows, as HTML."""
    shown = [each.get("data", {"text/plain": each.get("text", "")}) for each in cells(path)[number].outputs]
    parts = (data.get("text/html", f"<pre>{html.escape(data['text/plain'])}</pre>") for data in shown)
    return "\n".join(f'<div class="output">{part}</div>' for part in parts)
