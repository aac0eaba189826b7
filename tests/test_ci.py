"""The workflow runs .ci/run, on every Python that the package claims, and with the lowest versions it allows."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

import maskflash as mf

CHECKOUT = Path(__file__).parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = yaml.safe_load((CHECKOUT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
JOB = WORKFLOW["jobs"]["ci"]
STEPS = JOB["steps"]
TEMPLATES = [path for path in CHECKOUT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.stem != "config"]


def test_the_pythons_are_those_of_the_classifiers():
    prefix = "Programming Language :: Python :: 3."
    claimed = [text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(prefix)]
    assert JOB["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in claimed]
    assert PROJECT["requires-python"] == f">=3.{claimed[0]}"


def test_every_job_runs_what_must_pass_on_a_checkout():
    assert STEPS[-1] == {"run": ".ci/run"}
    assert (CHECKOUT / ".ci" / "run").stat().st_mode & 0o100
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    asked = re.findall(r"^make (\w+)", (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"lint", "test"} <= set(asked) <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def test_one_job_takes_the_lowest_versions():
    matrix = JOB["strategy"]["matrix"]
    lowest = {"python": matrix["python"][0], "versions": "lowest"}
    assert matrix["versions"] == ["pinned"]
    assert matrix["include"] == [lowest]
    (step,) = (step for step in STEPS if "lowest.py" in step.get("run", ""))
    assert step["if"] == "matrix.versions == 'lowest'"
    assert (CHECKOUT / step["run"].split()[1]).is_file()


def test_the_lowest_versions_are_the_bounds_of_the_project():
    script = runpy.run_path(str(CHECKOUT / ".ci" / "lowest.py"))
    lowest, dependencies = script["lowest"], script["bounded"](PROJECT)
    pinned = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8")
    lines = lowest(pinned, dependencies).splitlines()
    for name in ("torch", "triton", "numpy"):
        (bound,) = re.findall(rf"^{name}>=([\d.]+)", "\n".join(dependencies), re.MULTILINE)
        assert [line for line in lines if line.startswith(f"{name}==")] == [f"{name}=={bound}.*"]
    assert set(pinned.splitlines()) - set(lines) == {
        *(line for line in pinned.splitlines() if re.match("(torch|triton|numpy|setuptools)==", line))
    }


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what its format asks for
    assert (cited["title"], cited["version"], cited["license"]) == (PROJECT["name"], mf.__version__, PROJECT["license"])
    assert cited["authors"] == PROJECT["authors"]
    released = dict(re.findall(r"^## ([\d.]+) - (.*)$", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M))
    assert released[mf.__version__] == str(cited["date-released"])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_for_issues_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields) > 0


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_docs_name_the_pythons(name):
    first, *_, last = JOB["strategy"]["matrix"]["python"]
    assert f"Python {first} to {last}" in (CHECKOUT / name).read_text(encoding="utf-8")


def test_the_changelog_has_the_shape_of_releases():
    text = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in released)
    versions = [tuple(map(int, heading.split(" ")[0].split("."))) for heading in released]
    assert versions == sorted(versions, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
