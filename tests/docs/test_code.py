"""All code in the docs is real: sessions print what they show, Python runs, and no other code stands there unrun."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
COMMANDS = ["cli.md"]  # whose commands tests/cli/test_docs_cli.py runs


def blocks(text, language):
    return [code for name, code in FENCE.findall(text) if name == language]


def unrun(name, text):
    """The languages of code that nobody runs; commands are run of some pages only."""
    run = ["pycon", "python", *(["console"] if name in COMMANDS else [])]
    return [language for language, _ in FENCE.findall(text) if language not in run]


def pages_with(language):
    found = [path for path in PAGES if blocks(path.read_text(encoding="utf-8"), language)]
    return pytest.mark.parametrize("path", found, ids=lambda path: path.relative_to(ROOT).as_posix())


@pages_with("pycon")
def test_sessions_print_what_they_show(path, hooks):
    failed, said = hooks.run(path.read_text(encoding="utf-8"), path.name, {})
    assert failed == 0, said


@pages_with("python")
def test_python_runs(path, tmp_path):
    # As one file, as users have it: the tracer reads a predicate's source.
    file = tmp_path / "example.py"
    file.write_text("\n".join(blocks(path.read_text(encoding="utf-8"), "python")), encoding="utf-8")
    runpy.run_path(str(file))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_all_code_is_run(path):
    assert unrun(path.name, path.read_text(encoding="utf-8")) == []


def test_a_session_can_fail(hooks):
    failed, said = hooks.run("```pycon\n>>> 1 + 1\n3\n\n```\n", "wrong.md", {})
    assert failed == 1
    assert "Expected:\n    3\nGot:\n    2" in said


def test_code_can_be_unrun():
    text = "```bash\nls\n```\n\n```pycon\n>>> 1\n1\n```\n\n```\nplain\n```\n\n```console\n$ maskflash\n```\n"
    assert unrun("other.md", text) == ["bash", "", "console"]
    assert unrun("cli.md", text) == ["bash", ""]


def test_the_pages_are_found():
    with_sessions = {path.name for path in PAGES if blocks(path.read_text(encoding="utf-8"), "pycon")}
    assert {"pipeline.md", "scores.md", "cookbook.md", "getting-started.md", "troubleshooting.md"} <= with_sessions
    assert {path.name for path in PAGES if blocks(path.read_text(encoding="utf-8"), "python")} >= {"README.md"}
