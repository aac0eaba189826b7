"""What every test shares: reproducible examples and randomness, threads, where kernels run, and a kernel cache."""

import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.predicates import agree_fixture, brute, texts  # noqa: F401 (fixtures)

# MASKFLASH_TEST_DEVICE=cuda runs the kernels' tests on a GPU; sm_80, sm_86 or sm_90 compiles them for that architecture
# and emulates the PTX (tests/ptx); without it Triton interprets them on the CPU. Triton reads TRITON_INTERPRET when it
# is first imported, so tests import it only after this.
DEVICE = os.environ.get("MASKFLASH_TEST_DEVICE", "cpu")
EMULATED = DEVICE.startswith("sm_")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
if EMULATED:
    from tests.ptx import driver

    driver.install(int(DEVICE.removeprefix("sm_")))

# Under pytest-xdist the workers share the cores: each takes its part of torch's threads, and so does what it starts.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]

# "ci", the default, draws the same examples everywhere; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "explore", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing them")


@pytest.fixture(scope="session")
def device():
    """Where kernels' tensors are: "cuda" on a GPU, "cpu" where kernels are interpreted or emulated."""
    return "cpu" if EMULATED else DEVICE


@pytest.fixture(scope="session", autouse=True)
def kernel_cache():
    """A cache of kernels for this run alone."""
    with tempfile.TemporaryDirectory(prefix="maskflash-tests-") as folder:
        before = os.environ.get("MASKFLASH_CACHE_DIR")
        os.environ["MASKFLASH_CACHE_DIR"] = os.path.join(folder, "kernels")
        yield
        if before is None:
            del os.environ["MASKFLASH_CACHE_DIR"]
        else:
            os.environ["MASKFLASH_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def chromium():
    """The system's browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium here; as root, `make browser` installs it from Debian's packages")
    playwright = pytest.importorskip("playwright.sync_api", reason="in the extra test: pip install 'maskflash[test]'")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()
