"""What a user installs works: sdist -> wheel -> an environment of its own, used from outside the checkout."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import maskflash as mf

CHECKOUT = Path(__file__).parents[1]
DOWNSTREAM = CHECKOUT / "tests" / "downstream"
MODULES = ("parallel", "presets", "scores", "testing", "visualize")
USE = """
import importlib.metadata, pathlib, sys, torch
import maskflash as mf
from maskflash.backends.triton.render import template_folder
from maskflash.backends.triton.signature import PASSES

package = pathlib.Path(mf.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert template_folder() == package / "templates"
assert importlib.metadata.version("maskflash") == mf.__version__

q, k, v = (torch.randn(1, 2, 37, 16, requires_grad=True) for _ in range(3))
attn = mf.compile(lambda b, h, q, kv: q >= kv)
out = attn(q, k, v)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(out, dense)
for found, expected in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, dense))):
    torch.testing.assert_close(found, expected)
for name in PASSES:
    compile(attn.source(q, k, v, pass_name=name), name, "exec")
"""


def run(*command: object, cwd: Path, status: int = 0) -> str:
    """What a command printed, run where nothing leads back to the checkout."""
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=bare, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from the sdist; needs no network."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, CHECKOUT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The scripts of an environment that has the wheel, and torch and the rest from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    scripts, packages = (
        Path(sysconfig.get_path(name, "venv", {"base": str(folder), "platbase": str(folder)}))
        for name in ("scripts", "purelib")
    )
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "others.pth").write_text("\n".join(ours), encoding="utf-8")  # .pth files in there are not read
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "--disable-pip-version-check"]
    # The environment that runs the tests may have the wheel as well.
    run(*pip, "install", "--quiet", "--ignore-installed", "--no-deps", "--no-index", wheel, cwd=folder)
    return scripts


@pytest.fixture(scope="module")
def archived(built):
    """The names of the sdist's files, without its top folder."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def test_the_installed_package_attends_and_renders_every_template(installed, tmp_path):
    run(installed / "python", "-c", USE, cwd=tmp_path)


def test_the_installed_command_shows_a_mask(installed, tmp_path):
    assert run(installed / "maskflash", "--version", cwd=tmp_path) == f"maskflash {mf.__version__}\n"
    shown = run(installed / "maskflash", "show", "causal & document(300, 500, 224)", cwd=tmp_path)
    assert "1,024" in shown
    assert shown.count("\n") > 8


def mypy(installed, name, status):
    """What mypy says of a user's file against the installed package, as (line, kind of error)."""
    command = [sys.executable, "-m", "mypy", "--config-file", DOWNSTREAM / "mypy.ini", "--no-error-summary"]
    command += ["--python-executable", installed / "python", "--cache-dir", installed.parent / "mypy"]
    said = run(*command, DOWNSTREAM / name, cwd=installed.parent, status=status).splitlines()
    errors = [line for line in said if ": note: " not in line]
    found = [re.fullmatch(rf".*{re.escape(name)}:(\d+): error: .* \[([a-z-]+)\]", line) for line in errors]
    assert all(found), said
    return [(int(match[1]), match[2]) for match in found]


@pytest.mark.parametrize("name", ["user.py", "everything.py"])
def test_a_type_checker_knows_the_installed_package(installed, name):
    assert mypy(installed, name, status=0) == []


def test_what_is_type_checked_has_every_public_name():
    """Each as an attribute of its module, as `mf.causal`; of what two modules have, one is enough."""
    tree = ast.parse((DOWNSTREAM / "everything.py").read_text(encoding="utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in mf.__all__ if f"mf.{name}" not in used} == set(MODULES)
    for module in MODULES:
        names = set(getattr(mf, module).__all__) - set(mf.__all__)
        assert {name for name in names if f"{module}.{name}" not in used} == set()


def test_a_type_checker_finds_a_user_s_mistakes(installed):
    lines = (DOWNSTREAM / "mistakes.py").read_text(encoding="utf-8").splitlines()
    marked = [(number, line.partition("# error: ")[2]) for number, line in enumerate(lines, 1) if "# error: " in line]
    assert mypy(installed, "mistakes.py", status=1) == marked


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = {
        path.relative_to(CHECKOUT).as_posix()
        for path in (CHECKOUT / "maskflash").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    templates = {
        f"maskflash/{path.relative_to(CHECKOUT).as_posix()}"
        for path in (CHECKOUT / "templates").rglob("*")
        if path.is_file()
    }
    inside = {name for name in names if name.startswith("maskflash/")}
    assert inside == package | templates
    assert {name.split("/")[0].split("-")[0] for name in names} == {"maskflash"}


def test_wheel_and_sdist_hold_the_licence(built, archived):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (text,) = (archive.read(name) for name in archive.namelist() if name.endswith("licenses/LICENSE"))
    assert text == (CHECKOUT / "LICENSE").read_bytes()
    assert metadata(archive)["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in archived


def test_the_sdist_is_the_checkout(archived):
    """So its tests can be run as they are."""
    tracked = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no git checkout to compare with")
    assert archived - {"PKG-INFO"} >= {name for name in tracked.stdout.splitlines() if (CHECKOUT / name).exists()}
    assert not any(name.startswith((".venv", ".git/", "dist/")) or "__pycache__" in name for name in archived)


def test_what_the_package_imports_is_declared(built):
    (wheel,) = built.glob("*.whl")
    requirements = metadata(zipfile.ZipFile(wheel)).get_all("Requires-Dist")
    declared = {re.match(r"[\w-]+", text)[0] for text in requirements}
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (CHECKOUT / "maskflash").rglob("*.py"))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"maskflash"}
    assert {"torch", "jinja2"} <= others <= declared


def metadata(wheel):
    """A wheel's METADATA."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))
