"""The tile table's rows compile to real cubins that pass the gates, on a machine without a GPU.

In a process of its own: kernels here are interpreted, and triton decides once.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.static_gates import ODD, Case, Resources, faults, programs_at_once, table_cases
from maskflash.backends.triton.signature import PASSES
from maskflash.backends.triton.tiles import ROWS, Tile, shared_bytes

ROOT = Path(__file__).parents[3]
HOPPER = Case(90, "forward", "interval", 16, 128, 128, Tile(128, 64, 8, 3))
CLEAN = Resources(200, 0, 0, 100_000, 1, True, False, 1.0)


def gates(*words, timeout=900):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.static_gates", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Each row once, with one of the three masks."""
    path = tmp_path_factory.mktemp("gates") / "gates.json"
    done = gates("--quick", "--json", str(path))
    assert path.exists(), done.stderr
    return done, json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_every_row_passes(quick):
    done, rows = quick
    assert [row for row in rows if row["faults"]] == []
    assert done.returncode == 0, done.stderr
    compiled = {(row["arch"], row["pass_name"], row["bits"], row["head_dim"]) for row in rows}
    assert {(row.arch, row.pass_name, row.bits, row.head_dim) for row in ROWS} <= compiled
    assert {row["mask"] for row in rows} == {"interval", "causal document", "flashmask"}
    assert {(row["head_dim"], row["v_head_dim"]) for row in rows if row["bits"] == 16} >= set(ODD)


def test_the_estimate_of_shared_memory_is_from_above(quick):
    for row in quick[1]:
        if row["pass_name"] != "delta":
            tile, bytes_each = Tile(**row["tile"]), row["bits"] // 8
            largest = max(row["head_dim"], row["v_head_dim"])
            estimate = shared_bytes(row["arch"], row["pass_name"], tile, bytes_each, largest)
            assert row["shared"] <= estimate, row


def test_a_tile_that_is_too_big_is_reported(tmp_path):
    path = tmp_path / "gates.json"
    only = ["--arch", "90", "--pass", "forward", "--mask", "interval", "--bits", "16", "--dim", "128"]
    done = gates(*only, "--tile", "128,128,4,3", "--json", str(path))
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert done.returncode == 1
    assert row["stack"] > 0
    assert any("spills" in fault for fault in row["faults"])


@pytest.mark.parametrize(
    ("case", "found", "fault"),
    [
        (HOPPER, {"stack": 8}, "8 B of stack"),
        (HOPPER, {"spills": 2}, "2 local loads and stores"),
        (HOPPER, {"wgmma": False}, "no wgmma"),
        (HOPPER, {"serialised": True}, "C7511"),
        (HOPPER, {"shared": 232_449}, "more than 232448"),
        (Case(80, "dq", "interval", 16, 64, 64, Tile(64, 64, 4, 2)), {"shared": 166_913}, "more than 166912"),
        (Case(86, "dq", "interval", 16, 64, 64, Tile(64, 64, 4, 2)), {"shared": 101_377}, "more than 101376"),
        (Case(90, "dq", "interval", 32, 64, 64, Tile(64, 64, 4, 2)), {"stack": 601}, "601 B of stack"),
    ],
)
def test_each_gate_can_fail(case, found, fault):
    fields = {name: getattr(CLEAN, name) for name in CLEAN.__slots__} | {"shared": 90_000}
    assert faults(case, Resources(**fields)) == []
    (said,) = faults(case, Resources(**fields | found))
    assert fault in said


def test_float32_may_spill_a_little_and_needs_no_wgmma():
    case = Case(90, "dq", "interval", 32, 64, 64, Tile(64, 64, 4, 2))
    assert faults(case, Resources(255, 600, 90, 90_000, 1, False, None, 1.0)) == []


def test_what_fits_a_multiprocessor():
    assert programs_at_once(90, 8, 255, 131_072) == 1  # registers: 8 warps of 255 fill it
    assert programs_at_once(90, 4, 255, 98_304) == 2
    assert programs_at_once(90, 4, 160, 131_072) == 1  # shared memory
    assert programs_at_once(86, 4, 32, 1024) == 12  # warps
    assert programs_at_once(100, 4, 64, 1024, tensor_memory=256) == 2


def test_the_full_run_covers_every_row_mask_and_device():
    cases = table_cases(quick=False)
    kinds = {(case.arch, case.mask) for case in cases if case.pass_name != "delta"}
    assert len(kinds) == 5 * 3
    assert len(cases) == len(set(cases))
    odd = {(case.arch, case.pass_name, case.bits, case.head_dim, case.v_head_dim) for case in cases}
    assert {
        (*kind, *dims) for kind in product((80, 86, 89, 90, 100), PASSES[:1] + PASSES[2:], (16, 32)) for dims in ODD
    } <= odd
