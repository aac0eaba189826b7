"""What the README promises: its Python runs, it stays short, and every file that the docs point to is there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_examples_run(tmp_path, capsys):
    # As one file, as users have it: the tracer reads a predicate's source.
    path = tmp_path / "example.py"
    path.write_text("\n".join(BLOCKS), encoding="utf-8")
    names = runpy.run_path(str(path))
    assert names["q"].grad is not None
    assert names["out"].shape == names["q"].shape
    printed = capsys.readouterr().out
    assert "BlockMap(1024 x 1024 tokens" in printed
    assert tiles(printed) == tiles(README)  # the picture below the example is what it prints


def tiles(text):
    """The rows of a picture of 8 x 8 tiles, without what stands beside or before them."""
    return re.findall(r"^ *([·▒█]{8})(?!\S)", text, re.MULTILINE)


def test_it_has_examples_and_is_short():
    assert len(BLOCKS) >= 2
    assert len(README.splitlines()) <= 120
    assert max(map(len, README.splitlines())) <= 120


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []
