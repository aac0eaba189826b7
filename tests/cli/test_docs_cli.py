"""The sessions of docs/cli.md are real: each command prints what is shown, and its exit status is the one it says."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from maskflash import cli

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
SESSIONS = re.findall(r"^```console\n\$ maskflash ([^\n]*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
FILES = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the files that are shown, as one is in; 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    for name, source in FILES:
        (tmp_path / name).write_text(source, encoding="utf-8")


def differs(shown, printed):
    checker, options = doctest.OutputChecker(), doctest.ELLIPSIS
    if checker.check_output(shown, printed, options):
        return ""
    return checker.output_difference(doctest.Example("", shown), printed, options | doctest.REPORT_NDIFF)


@pytest.mark.parametrize(("command", "shown"), SESSIONS, ids=[command for command, _ in SESSIONS])
def test_a_command_prints_what_is_shown(command, shown, capsys):
    status = cli.main(shlex.split(command))
    found = capsys.readouterr()
    assert differs(shown, found.out + found.err) == ""
    differ = "only in" in found.out  # which `compare` says of masks
    assert status == (2 if found.err else int(differ))


def test_there_are_sessions_and_the_check_can_fail():
    assert len(SESSIONS) >= 5
    assert [name for name, _ in FILES] == ["masks.py"]
    assert "Differences" in differs("one\n", "two\n")
