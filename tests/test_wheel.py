"""What a user installs works: sdist -> wheel -> a clean folder, imported from outside the checkout."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
USE = """
import importlib.metadata, pathlib, torch
import maskflash as mf

package = pathlib.Path(mf.__file__).parent
assert package.parent == pathlib.Path(INSTALLED), package
assert (package / "templates").is_dir() and (package / "py.typed").is_file()
assert importlib.metadata.version("maskflash")

q, k, v = (torch.randn(1, 2, 37, 16) for _ in range(3))
out = mf.compile(mf.causal())(q, k, v)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(out, dense)
"""


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from the sdist; needs no network."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, CHECKOUT, cwd=folder)
    return folder


def test_the_installed_wheel_works_outside_the_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--target", installed, wheel, cwd=tmp_path)
    program = f"import sys\nINSTALLED = {str(installed)!r}\nsys.path.insert(0, INSTALLED)\n{USE}"
    run(sys.executable, "-c", program, cwd=tmp_path)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "maskflash").rglob("*.py")}
    templates = {
        f"maskflash/{path.relative_to(CHECKOUT).as_posix()}"
        for path in (CHECKOUT / "templates").rglob("*")
        if path.is_file()
    }
    inside = {name for name in names if name.startswith("maskflash/")}
    assert inside == package | templates | {"maskflash/py.typed"}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"maskflash"}


def test_the_sdist_holds_what_the_checkout_needs(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "templates/README.md"} <= inside
    assert not any(name.startswith((".venv", ".git/")) for name in inside)
