"""The sessions in docs/ are real: they are run, and print what they show."""

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SESSION = re.compile(r"^```pycon\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_SESSIONS = [path for path in sorted(DOCS.rglob("*.md")) if SESSION.search(path.read_text(encoding="utf-8"))]


def run(text, name):
    """Run a document's sessions one after the other in one namespace; return failures, and what was printed of them."""
    said = []
    test = doctest.DocTestParser().get_doctest("\n".join(SESSION.findall(text)), {}, name, name, 0)
    # Dynamo takes its names out of the globals of what it compiled when that goes: clearing them would be too early.
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    return result.failed, "".join(said)


@pytest.mark.parametrize("path", WITH_SESSIONS, ids=lambda path: path.name)
def test_sessions_print_what_they_show(path):
    failed, said = run(path.read_text(encoding="utf-8"), path.name)
    assert failed == 0, said


def test_the_check_can_fail():
    failed, said = run("```pycon\n>>> 1 + 1\n3\n\n```\n", "wrong.md")
    assert failed == 1
    assert "Expected:\n    3\nGot:\n    2" in said


def test_the_pipeline_has_sessions():
    assert DOCS / "pipeline.md" in WITH_SESSIONS
