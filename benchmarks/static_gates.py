"""Rows of the tile table -> real cubins, without a GPU: registers, stack, shared memory and what fits a processor.

Every row is compiled for each of three masks, and for head dims that fill it only in part. A row fails the gate when
its kernel spills (16-bit types: at all; float32: more than 600 bytes), misses the tensor cores it is meant for, or
needs more shared memory than its devices have. Nothing here runs or times a kernel.

    python -m benchmarks.static_gates            all rows, all masks
    python -m benchmarks.static_gates --quick    each row once
    python -m benchmarks.static_gates --arch 90 --pass dq --bits 16 --dim 128 --tile 64,64,4,2

The last tries a tile that is not in the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

import maskflash as mf
from benchmarks.runner import ROOT, WIDTH, conditions, describe
from maskflash.backends.triton import modules
from maskflash.backends.triton.launch import ANY_MASK
from maskflash.backends.triton.layout import UNIT, padded
from maskflash.backends.triton.render import render
from maskflash.backends.triton.signature import PASSES, PassName, Specialisation, TableKind
from maskflash.backends.triton.tiles import DELTA, ROWS, SHARED_LIMITS, Tile, choose

RESULTS: Final = ROOT / "benchmarks/results/static_gates.json"
DTYPES: Final = {16: torch.bfloat16, 32: torch.float32}
BLOCK: Final = 128  # tokens of a block map's tile
FLOAT32_STACK: Final = 600  # bytes: in full precision its products have no tensor cores, and registers run out
PROCESSES: Final = 2


@dataclass(frozen=True, slots=True)
class Processor:
    """What one multiprocessor of an architecture has: bytes of shared memory for all programs, warps."""

    shared: int
    warps: int


# CUDA C++ Programming Guide, table of technical specifications by compute capability.
PROCESSORS: Final = {
    80: Processor(164 * 1024, 64),
    86: Processor(100 * 1024, 48),
    89: Processor(100 * 1024, 48),
    90: Processor(228 * 1024, 64),
    100: Processor(228 * 1024, 64),
}
ODD: Final = ((80, 80), (96, 96), (192, 192), (192, 128), (40, 72))  # D and DV, whole vectors as all are made
SERVED: Final = {80: (80,), 86: (86, 89), 90: (90,), 100: (100,)}  # by each family of the table


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel: compute capability times ten, pass, mask, bits of the dtype, tile, head dims of q and k and of v."""

    arch: int
    pass_name: PassName
    mask: str
    bits: int
    head_dim: int
    v_head_dim: int
    tile: Tile


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel needs.

    Attributes:
        registers: per thread.
        stack: bytes per thread.
        spills: loads from and stores to local memory in its text.
        shared: bytes per program.
        programs: that fit a multiprocessor at once.
        wgmma: it uses Hopper's warpgroup products.
        serialised: ptxas warns that these wait for one another (C7511); None where it was not asked.
        seconds: to compile.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    programs: int
    wgmma: bool
    serialised: bool | None
    seconds: float


def faults(case: Case, found: Resources) -> list[str]:
    """Why a kernel fails the gate; empty where it passes."""
    wrong = []
    if case.bits == 16 and (found.stack or found.spills):
        wrong.append(f"spills: {found.stack} B of stack, {found.spills} local loads and stores")
    if case.bits == 32 and found.stack > FLOAT32_STACK:
        wrong.append(f"{found.stack} B of stack, more than {FLOAT32_STACK}")
    if case.arch == 90 and case.bits == 16 and case.pass_name != "delta":
        if not found.wgmma:
            wrong.append("no wgmma")
        if found.serialised:
            wrong.append("ptxas serialises wgmma (C7511)")
    if found.shared > SHARED_LIMITS[case.arch]:
        wrong.append(f"{found.shared} B of shared memory, more than {SHARED_LIMITS[case.arch]}")
    return wrong


def table_cases(quick: bool) -> list[Case]:
    """The kernels of every row, with each mask; then those of odd head dims, with one mask, which changes.

    If quick, rows too have one mask, and there is one odd head dim for each architecture, pass and width.
    """
    cases = []
    for number, row in enumerate(ROWS):
        masks = [MASKS[number % len(MASKS)]] if quick else MASKS
        archs = SERVED[row.arch][:1] if quick else SERVED[row.arch]
        kind = (row.bits, row.head_dim, row.head_dim, row.tile)
        cases += [Case(arch, row.pass_name, mask, *kind) for arch in archs for mask in masks]
    for arch in (arch for family in SERVED.values() for arch in (family[:1] if quick else family)):
        cases += [Case(arch, "delta", "interval", bits, 256, 256, DELTA) for bits in DTYPES]
    kinds = list(product(SERVED, PASSES, DTYPES))
    for number, ((family, pass_name, bits), dims) in enumerate(product(kinds, ODD)):
        wanted = dims == ODD[number // len(ODD) % len(ODD)] if quick else True
        if wanted and pass_name != "delta":
            tile = choose(family, pass_name, DTYPES[bits], max(dims), (BLOCK, BLOCK))
            archs = SERVED[family][:1] if quick else SERVED[family]
            cases += [Case(arch, pass_name, MASKS[number % len(MASKS)], bits, *dims, tile) for arch in archs]
    return cases


def measure(case: Case) -> Resources:
    """Compile one kernel to a cubin and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    function = getattr(modules.load(render(_specialisation(case), case.pass_name)), case.pass_name)
    kinds, constants, attributes = {}, {}, {}
    values = _constants(case)
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            kinds[name], constants[(place,)] = "constexpr", values[name]
        elif parameter.annotation_type:
            kinds[name] = parameter.annotation_type
        else:
            kinds[name] = _pointer(name, case.bits)
            if not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(function, kinds, constants, attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": case.tile.warps, "num_stages": case.tile.stages},
    )
    seconds = time.perf_counter() - start
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, text = (_output(tools / "cuobjdump", what, cubin) for what in ("--dump-resource-usage", "--dump-sass"))
        serialised = None
        if case.arch == 90 and case.bits == 16:
            source = Path(folder, "kernel.ptx")
            source.write_text(compiled.asm["ptx"], encoding="utf-8")
            said = _output(tools / "ptxas", "--gpu-name=sm_90a", "-v", source, "-o", os.devnull)
            serialised = "C7511" in said
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0) or 0
    return Resources(
        registers,
        stack,
        len(re.findall(r"\b(?:STL|LDL)\b", text)),
        shared,
        programs_at_once(case.arch, case.tile.warps, registers, shared, tensor_memory),
        "HGMMA" in text,
        serialised,
        round(seconds, 2),
    )


def programs_at_once(arch: int, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many programs fit a multiprocessor: the least of what its limits allow.

    Registers come by eights to a thread, and in four banks of 16,384; a program's shared memory costs another KiB;
    tensor memory has 512 columns.
    """
    processor = PROCESSORS[arch]
    by_registers = 4 * (16384 // (32 * -(-registers // 8) * 8)) // warps
    by_shared = processor.shared // (shared + 1024)
    by_tensor_memory = 512 // tensor_memory if tensor_memory else by_shared
    return min(by_registers, by_shared, processor.warps // warps, by_tensor_memory)


def _causal_document(b: Any, h: Any, q: Any, kv: Any, *, doc: Any) -> Any:
    return q >= kv and doc[b, q] == doc[b, kv]


MASKS: Final = ("interval", "causal document", "flashmask")  # the last two by their expressions


def _specialisation(case: Case) -> Specialisation:
    """What the kernels of a mask and of head dims depend on; the contents of tables are not among it."""
    paddings = {
        "padded_d": padded(case.head_dim) != case.head_dim,
        "padded_dv": padded(case.v_head_dim) != case.v_head_dim,
    }
    if case.mask == "interval":
        return Specialisation(ANY_MASK, interval=True, **paddings)
    columns = torch.zeros(2, 2, 8, dtype=torch.int32)  # of each batch row and head
    made, tables = {
        "causal document": (mf.mask(_causal_document), {"doc": columns[0]}),
        "flashmask": (mf.ColumnIntervals(columns, columns, columns, columns, causal=True), {}),
    }[case.mask]
    problem = made.problem("static_gates", 8, 8, 2, 2, (BLOCK, BLOCK), 0, torch.device("cpu"), tables)
    return Specialisation(problem.expr, tuple(map(TableKind.of, problem.inputs.tables)), **paddings)


def _constants(case: Case) -> dict[str, Any]:
    tile, dims = case.tile, (case.head_dim, case.v_head_dim)
    own, step = (tile.block_n, tile.block_m) if case.pass_name == "dkdv" else (tile.block_m, tile.block_n)
    return {
        **{"UNIT": UNIT, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "ROWS": BLOCK // own, "SUB": BLOCK // step},
        **dict(zip(("D", "DV", "BLOCK_D", "BLOCK_DV"), (*dims, *map(padded, dims)), strict=True)),
        **{"PRECISION": "ieee", "HAS_DLSE": True},
    }


def _pointer(name: str, bits: int) -> str:
    if name in ("lse_ptr", "delta_ptr", "dlse_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return {16: "*bf16", 32: "*fp32"}[bits]
    return "*i32"  # the walk over tiles, and the tables of these masks


def _output(tool: Path, *words: str | Path) -> str:
    done = subprocess.run([tool, *words], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _tried(case: Case) -> tuple[Case, Resources | None, list[str]]:
    """A case with what was found, and its faults; a kernel that does not compile has that one."""
    try:
        found = measure(case)
    except Exception as error:
        last = str(error).strip().splitlines()[-1:] or [""]
        return case, None, [f"does not compile: {type(error).__name__}: {last[0]}"]
    return case, found, faults(case, found)


def _start(folder: str) -> None:
    """A worker's surroundings: caches of this run alone, and kernels compiled even where tests interpret them."""
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
    os.environ[modules.VARIABLE] = os.path.join(folder, "maskflash")
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def run(cases: Sequence[Case]) -> Iterable[tuple[Case, Resources | None, list[str]]]:
    """Compile cases, two at a time, in processes with caches of their own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(PROCESSES, _start, (folder,)) as pool,
    ):
        yield from pool.imap(_tried, cases)


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    cases = _chosen(options)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    results = []
    for number, result in enumerate(run(cases), 1):
        results.append(result)
        if result[2]:
            console.print(f"{_line(result[0])}: {'; '.join(result[2])}", style="bold red", highlight=False)
        elif number % 20 == 0:
            console.print(f"{number} of {len(cases)}", style="dim", highlight=False)
    console.print(_table(results))
    where = conditions(options.quick)
    import triton

    where["versions"]["triton"] = triton.__version__
    failed = sum(bool(wrong) for *_, wrong in results)
    console.print(f"{len(results)} kernels, {failed} fail; {describe(where)}", highlight=False)
    if options.json:
        stored = {
            "question": "What does each row of the tile table need, and does it pass the static gates?",
            "conditions": where,
            "rows": [
                {**asdict(case), **(asdict(found) if found else {}), "faults": wrong} for case, found, wrong in results
            ],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in stored.pop("rows"))
        options.json.write_text(
            f'{json.dumps(stored, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8"
        )
    return 1 if failed else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile the tile table for real devices and check what it needs.")
    parser.add_argument("--quick", action="store_true", help="each row of the table once")
    parser.add_argument("--arch", type=int, choices=PROCESSORS, action="append", help="compute capability times ten")
    parser.add_argument("--pass", dest="passes", choices=PASSES, action="append")
    parser.add_argument("--mask", choices=MASKS, action="append")
    parser.add_argument("--bits", type=int, choices=DTYPES, action="append", help="of the dtype")
    parser.add_argument("--dim", type=int, action="append", help="head dim")
    parser.add_argument(
        "--tile", action="append", metavar="M,N,WARPS,STAGES", help="instead of the table's; repeat it to compare"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where to store (default, if all ran: {RESULTS})")
    options = parser.parse_args(argv)
    whole = not any(
        (options.quick, options.arch, options.passes, options.mask, options.bits, options.dim, options.tile)
    )
    if whole and options.json is None:
        options.json = RESULTS
    return options


def _chosen(options: argparse.Namespace) -> list[Case]:
    cases = table_cases(options.quick)
    wanted = [("arch", options.arch), ("pass_name", options.passes), ("mask", options.mask)]
    wanted += [("bits", options.bits), ("head_dim", options.dim)]
    cases = [case for case in cases if all(not some or getattr(case, name) in some for name, some in wanted)]
    if not options.tile:
        return cases
    tiles = [Tile(*(int(n) for n in text.split(","))) for text in options.tile]
    kinds = dict.fromkeys(
        (case.arch, case.pass_name, case.mask, case.bits, case.head_dim, case.v_head_dim) for case in cases
    )
    return [Case(*kind, tile) for kind in kinds for tile in tiles]


def _line(case: Case) -> str:
    tile = case.tile
    shape = f"({tile.block_m}, {tile.block_n}, {tile.warps} warps, {tile.stages} stages)"
    return f"sm_{case.arch} {case.pass_name} {case.bits} bits D={_dims(case)} {case.mask} {shape}"


def _dims(case: Case) -> str:
    return str(case.head_dim) if case.head_dim == case.v_head_dim else f"{case.head_dim}/{case.v_head_dim}"


def _table(results: Sequence[tuple[Case, Resources | None, list[str]]]) -> Table:
    table = Table(title="What the kernels need (compiled, never run)", title_justify="left")
    for name in ("arch", "pass", "bits", "D", "mask", "tile", "warps", "stages"):
        table.add_column(name, justify="left" if name in ("pass", "mask") else "right")
    for name in ("registers", "stack", "shared", "programs", "wgmma"):
        table.add_column(name, justify="right")
    for case, found, wrong in results:
        tile = case.tile
        needs = ["", "", "", "", ""]
        if found:
            needs = [str(found.registers), str(found.stack), f"{found.shared:,}", str(found.programs)]
            needs.append("yes" if found.wgmma else "")
        table.add_row(
            *(f"sm_{case.arch}", case.pass_name, str(case.bits), _dims(case), case.mask),
            *(f"{tile.block_m} x {tile.block_n}", str(tile.warps), str(tile.stages), *needs),
            style="bold red" if wrong else "",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
