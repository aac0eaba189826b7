"""Names say one thing each: no two classes share one, and modules keep theirs where they are imported."""

import ast
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parents[1] / "maskflash"
ROOT = {"__init__.py", "__main__.py", "api.py", "doctor.py", "errors.py"}
RENAMED = {  # where the name itself would clash with, or say less than, what stands beside it
    "maskflash.backends.cpu.run as cpu",
    "maskflash.backends.triton.device as gpu",
    "maskflash.backends.triton.run as triton",
    "maskflash.expr.intervals as on",
    "maskflash.masks.predicate.mask as as_mask",
    "maskflash.presets.documents as packing",
}


def nodes(kind):
    """Every node of a kind in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kind))


def renamed(node):
    """What an import gives another name, as `module.name as other`."""
    module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [f"{module}{found.name} as {found.asname}" for found in node.names if found.asname]


def test_no_two_classes_share_a_name():
    counts = Counter(node.name for node in nodes(ast.ClassDef))
    assert len(counts) > 80
    assert {name for name, count in counts.items() if count > 1} == set()


def test_what_is_ours_is_imported_by_its_own_name():
    found = {text for node in nodes((ast.Import, ast.ImportFrom)) for text in renamed(node)}
    assert {text for text in found if text.startswith("maskflash.")} == RENAMED


def test_no_module_takes_the_place_of_what_its_package_offers():
    """Importing a submodule overwrites what its package has of the same name: decision 1."""
    for path in PACKAGE.rglob("__init__.py"):
        package = import_module(".".join(path.parent.relative_to(PACKAGE.parent).parts))
        folders = {found.parent.name for found in path.parent.glob("*/__init__.py")}
        modules = folders | {found.stem for found in path.parent.glob("*.py")}
        offered = {name for name in getattr(package, "__all__", ()) if name[:2] != "__"}
        assert {name for name in offered & modules if not isinstance(getattr(package, name), ModuleType)} == set()


def test_a_new_name_is_found():
    (node,) = ast.parse("from maskflash.analysis import runs as lines, rows").body
    assert renamed(node) == ["maskflash.analysis.runs as lines"]
    (node,) = ast.parse("import maskflash.analysis.runs as lines").body
    assert renamed(node) == ["maskflash.analysis.runs as lines"]


def test_few_modules_stand_at_the_root():
    assert {path.name for path in PACKAGE.glob("*.py")} == ROOT
