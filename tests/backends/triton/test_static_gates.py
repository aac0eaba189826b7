"""The tile table's rows compile to real machine code that passes the gates, on a machine without a GPU.

In a process of its own: kernels here are interpreted, and triton decides once.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.compiled import OF_PAIRS, Case
from benchmarks.processors import AMD_SHARED
from benchmarks.static_gates import ODD, Resources, faults, table_cases
from maskflash.backends.triton.signature import PASSES
from maskflash.backends.triton.tiles import ROWS, Tile, shared_bytes

ROOT = Path(__file__).parents[3]
HOPPER = Case(90, "forward", "interval", 16, 128, 128, Tile(128, 64, 8, 3))
CLEAN = Resources(200, 0, 0, 0.0, 60_000, 1, "wgmma", 8, False, 1.0)
LIMITED = replace(HOPPER, tile=replace(HOPPER.tile, registers=128))
AMPERE = Case(80, "dq", "interval", 16, 64, 64, Tile(64, 64, 4, 2))
INSTINCT = Case("gfx942", "dq", "interval", 16, 64, 64, Tile(64, 32, 4, 2))


def gates(*words, timeout=1800):
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
    rows_wanted = [row for row in ROWS if row.arch not in AMD_SHARED and (row.bits < 32 or row.arch == 80)]
    served = {(row.arch, row.pass_name, row.bits, row.head_dim) for row in rows_wanted}
    wanted = {(89 if (arch, bits) == (86, 8) else arch, name, bits, dim) for arch, name, bits, dim in served}
    wanted |= {("gfx942", pass_name, 16, 128) for pass_name in PASSES[:1] + PASSES[2:]}
    assert wanted <= compiled
    assert {row["mask"] for row in rows} == {"interval", "causal document", "flashmask"}
    assert {(row["head_dim"], row["v_head_dim"]) for row in rows if row["bits"] == 16} >= set(ODD)


def test_the_estimate_of_shared_memory_is_from_above(quick):
    for row in quick[1]:
        if row["pass_name"] != "delta":
            tile, bytes_each = Tile(**row["tile"]), row["bits"] // 8
            largest = max(row["head_dim"], row["v_head_dim"])
            of_pairs = OF_PAIRS.get(row["score"], 0)
            estimate = shared_bytes(row["arch"], row["pass_name"], tile, bytes_each, largest, of_pairs)
            assert row["shared"] <= estimate, row


def test_a_tile_that_is_too_big_is_reported(tmp_path):
    path = tmp_path / "gates.json"
    only = ["--arch", "90", "--pass", "forward", "--mask", "interval", "--bits", "16", "--dim", "128"]
    done = gates(*only, "--score", "", "--tile", "128,128,4,3", "--json", str(path))
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert done.returncode == 1
    assert row["local"] > 0
    assert any("spills" in fault for fault in row["faults"])


@pytest.mark.parametrize(
    ("case", "product", "found", "fault"),
    [
        (HOPPER, "wgmma", {"local": 20, "local_share": 0.05}, "20 accesses to local memory"),
        (LIMITED, "wgmma", {"local": 60, "local_share": 0.11}, "60 accesses to local memory"),
        (HOPPER, "wgmma", {"product": "mma"}, "no wgmma"),
        (replace(HOPPER, bits=8), "wgmma of 8 bits", {"product": "wgmma"}, "no wgmma of 8 bits"),
        (replace(AMPERE, arch=89, bits=8), "mma of 8 bits", {"product": "mma"}, "no mma of 8 bits"),
        (HOPPER, "wgmma", {"serialised": True}, "C7511"),
        (HOPPER, "wgmma", {"under_copies": 0}, "prefetch nothing"),
        (HOPPER, "wgmma", {"shared": 232_449}, "more than 232448"),
        (AMPERE, "mma", {"product": ""}, "no mma"),
        (AMPERE, "mma", {"shared": 166_913}, "more than 166912"),
        (replace(AMPERE, arch=86), "mma", {"shared": 101_377}, "more than 101376"),
        (replace(HOPPER, bits=32), "mma", {"stack": 601}, "601 B of stack"),
        (replace(HOPPER, bits=32, products="tf32x3"), "wgmma", {"product": ""}, "no tensor cores"),
        (INSTINCT, "mfma", {"local": 1, "local_share": 1.0}, "1 accesses to local memory"),
        (INSTINCT, "mfma", {"product": ""}, "no mfma"),
        (INSTINCT, "mfma", {"shared": 65_537}, "more than 65536"),
        (replace(INSTINCT, arch="gfx1201"), "wmma", {"product": ""}, "no wmma"),
    ],
)
def test_each_gate_can_fail(case, product, found, fault):
    clean = replace(CLEAN, product=product)
    assert faults(case, clean) == []
    (said,) = faults(case, replace(clean, **found))
    assert fault in said


def test_what_gates_let_pass():
    outside = replace(CLEAN, stack=80)  # its loops use none of it
    few = replace(CLEAN, stack=56, local=12, local_share=0.03)
    together = replace(CLEAN, under_copies=0, programs=2)  # the other program computes meanwhile
    assert [faults(HOPPER, found) for found in (outside, few, together)] == [[]] * 3
    assert faults(LIMITED, replace(CLEAN, local=60, local_share=0.09)) == []
    assert faults(replace(AMPERE, arch=86), replace(CLEAN, under_copies=0, product="mma")) == []
    assert faults(replace(HOPPER, bits=32), replace(CLEAN, stack=600, local=90, local_share=0.2, product="")) == []


def test_the_full_run_covers_every_row_mask_and_device():
    cases = table_cases(quick=False)
    kinds = {(case.arch, case.mask) for case in cases if case.pass_name != "delta"}
    assert len(kinds) == (5 + len(AMD_SHARED)) * 3
    assert len(cases) == len(set(cases))
    odd = {(case.arch, case.pass_name, case.bits, case.head_dim, case.v_head_dim) for case in cases}
    kinds = product((80, 86, 89, 90, 100, "gfx942", "gfx950"), PASSES[:1] + PASSES[2:], (16, 32))
    assert {(*kind, *dims) for kind, dims in product(kinds, ODD)} <= odd
