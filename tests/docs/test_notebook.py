"""docs/notebook.ipynb runs, and what is stored in it is what it shows; `--update-golden` stores it anew."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

PATH = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def shown(notebook):
    """What the cells show, by kind, without the rows of explain() that depend on the machine."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [
        {
            kind: re.sub(r"((?:forward|backward) \w+).*?(</pre>|\n|$)", r"\1\2", text)
            for kind, text in output.get("data", output).items()
        }
        for output in outputs
    ]


@pytest.fixture(scope="module")
def executed():
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False).execute()
    for cell in notebook.cells:  # a cell's file lies in another place each time
        for output in cell.get("outputs", ()):
            for kind, text in output.get("data", {}).items():
                output["data"][kind] = re.sub(r"[\w/.:\\-]*ipykernel_\d+[/\\]\d+\.py", "notebook", text)
    return notebook


def test_it_shows_what_is_stored(executed, request):
    if request.config.getoption("--update-golden"):
        nbformat.write(executed, PATH)
    assert shown(nbformat.read(PATH, as_version=4)) == shown(executed)


def test_the_check_can_fail(executed):
    changed = nbformat.read(PATH, as_version=4)
    output = next(output for cell in changed.cells for output in cell.get("outputs", ()) if "tiles" in str(output))
    output["data"]["text/html"] = output["data"]["text/html"].replace("partial", "full", 1)
    assert shown(changed) != shown(executed)


def test_masks_maps_explanations_and_answers_show_themselves():
    assert sum("text/html" in kinds for kinds in shown(nbformat.read(PATH, as_version=4))) >= 8
