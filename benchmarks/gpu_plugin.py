"""For pytest on a lent device: a line of JSON for each test, none begun after the time is up, a broken worker ended.

`gpu_test` loads it, and tells it by $MASKFLASH_CHECKS and $MASKFLASH_SECONDS where to write and when to stop.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.device import Clock, append

_CLOCK: Final = Clock(float(os.environ.get("MASKFLASH_SECONDS", "inf")))
_BROKEN: Final = ("CUDA error", "Triton Error [CUDA]")  # after which a process can do nothing more on its device

_state = {"broken": False, "worker": False}


def pytest_configure(config: Any) -> None:
    _state["worker"] = hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if os.environ.get("MASKFLASH_TEST_DEVICE") == "cuda":
        items[:] = [item for item in items if not getattr(item.obj, "is_hypothesis_test", False)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    if _state["broken"]:
        pytest.skip("an earlier test broke the device")
    if not _CLOCK.left:
        pytest.skip("the time is up")


def pytest_exception_interact(node: Any, call: Any, report: Any) -> None:
    _state["broken"] |= any(text in str(call.excinfo.value) for text in _BROKEN)


def pytest_runtest_logreport(report: Any) -> None:
    told = report.when == "call" or report.outcome != "passed"  # a fixture that works is no news
    if told and not _state["worker"] and "MASKFLASH_CHECKS" in os.environ:
        why = report.longrepr[2] if report.skipped else str(report.longrepr)[-2000:] if report.failed else ""
        result = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "why": why}
        append(Path(os.environ["MASKFLASH_CHECKS"]), {name: value for name, value in result.items() if value != ""})


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    if _state["worker"] and _state["broken"]:
        os._exit(1)  # xdist starts another, on whose device nothing is broken
