"""docs/troubleshooting.md holds what is really raised, and every message of the errors that it says it has."""

import ast
import doctest
import linecache
import re
from pathlib import Path

import pytest

import maskflash as mf

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ALL_OF = ("MaskTraceError", "MaskIndexError", "UnsupportedMask", "BackendError")
HEADINGS = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)
ROWS = [
    row
    for rows in re.findall(r"^\| message \|.*\n\|[-|]*\n((?:\|.*\n)*)", PAGE, re.MULTILINE)
    for row in re.findall(r"^\| `(.*?)` \|", rows, re.MULTILINE)
]


def pattern(message):
    """… stands for anything."""
    return re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)


@pytest.fixture(scope="module")
def raised(hooks):
    """Heading -> what its sessions raise; run as one, since later ones use what earlier ones made."""
    names, found = {}, {}
    for section in re.split(r"^(?=##)", PAGE, flags=re.MULTILINE):
        heading = section.partition("\n")[0].lstrip("# ").strip("`")
        for example in doctest.DocTestParser().get_examples("\n".join(hooks.SESSION.findall(section))):
            file = f"<{heading} {example.lineno}>"
            linecache.cache[file] = (len(example.source), None, example.source.splitlines(keepends=True), file)
            code = compile(example.source, file, "single")
            if example.exc_msg is None:
                exec(code, names)
                continue
            with pytest.raises(Exception) as caught:
                exec(code, names)
            found.setdefault(heading, []).append(caught.value)
    return found


@pytest.mark.parametrize("heading", HEADINGS)
def test_what_a_heading_says_is_raised(heading, raised):
    # One section may show several errors, all of them that heading's.
    assert raised[heading]
    for error in raised[heading]:
        assert pattern(heading).search(str(error))


def test_errors_stand_under_their_class(raised):
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        kind = getattr(mf, part.partition("\n")[0], None)
        if kind is not None:
            for heading in re.findall(r"^### `(.*)`$", part, re.MULTILINE):
                assert {type(error) for error in raised[heading]} == {kind}, heading


def texts(node, module):
    """The messages that an expression may be, with … where a value comes in; local functions are looked into."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        bodies = [x for x in ast.walk(module) if isinstance(x, ast.FunctionDef) and x.name == node.func.id]
        returns = [x.value for body in bodies for x in ast.walk(body) if isinstance(x, ast.Return)]
        return [text for value in returns for text in texts(value, module)]
    return []


def messages(source):
    """What a module may say with the errors whose messages the page has, all of them; a text for each place."""
    module, found = ast.parse(source), []
    for node in ast.walk(module):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        made = name in ALL_OF and isinstance(node.func, ast.Name)
        failed = name == "fail" and len(node.args) == 2  # Tracer.fail(what, fix), which makes a MaskTraceError
        if made or failed or name in ("warn", "graph_break"):
            said = texts(node.args[0], module)
            if said != ["…: ……. …"]:  # Tracer.fail itself, which adds the place and the fix
                found.append((node.lineno, said))
    return found


MODULES = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in ROOT.glob("maskflash/**/*.py")}
SAID = [(f"{path}:{line}", said) for path, source in MODULES.items() for line, said in messages(source)]


def unexplained(said):
    return [text for text in said if not any(pattern(entry).search(text) for entry in (*HEADINGS, *ROWS))]


@pytest.mark.parametrize(("place", "said"), SAID, ids=[place for place, _ in SAID])
def test_every_message_is_explained(place, said):
    assert said
    assert unexplained(said) == []


@pytest.mark.parametrize("row", ROWS)
def test_a_message_without_session_is_in_the_source(row):
    assert any(pattern(row).search(text) for _, said in SAID for text in said)


def test_the_checks_can_fail():
    source = 'raise MaskTraceError(f"{home}: is too {what}.")\ntracer.fail("stumbles", "Don\'t.")\n'
    assert [text for _, said in messages(source) for text in unexplained(said)] == ["…: is too ….", "stumbles"]
    assert len(SAID) > 40
