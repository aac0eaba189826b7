"""Rows of the tile table -> real machine code, without a GPU: registers, memory, and what fits a processor.

Every row is compiled for each of three masks, and for head dims that fill it only in part; with one mask also for score
functions and dropout, on sm_80, sm_90 and sm_100, in bfloat16; and float32's as three products of TF32. A row fails the
gate when

- its loops use local memory: in 16 bits more than one instruction in 25, or in 10 where the tile limits registers; on
  AMD's GPUs any; in float32 on NVIDIA's the kernel may have 600 bytes of it,
- it misses the matrix cores that it is meant for,
- it needs more shared memory than its devices have,
- it is for sm_80 or sm_90, its stages prefetch nothing, and no other program on the multiprocessor computes meanwhile;
  but for scores with look-ups of pairs, which wait for memory themselves.

Nothing here runs or times a kernel; `benchmarks/sass_model.py` says how fast it may be.

    python -m benchmarks.static_gates            all rows, all masks
    python -m benchmarks.static_gates --quick    each row once
    python -m benchmarks.static_gates --arch 90 --pass dq --bits 16 --dim 128 --tile 64,64,4,2
    python -m benchmarks.static_gates --arch 90 --pass dq --bits 16 --dim 64 --tile 128,64,8,3,128

The last two try tiles that are not in the table; a fifth number is the most registers of a thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks import amdgcn
from benchmarks.compiled import (
    BLOCK,
    DTYPES,
    LEARNED,
    MASKS,
    OF_PAIRS,
    SCORES,
    Case,
    arch_name,
    compile_case,
    disassemble,
    in_processes,
    tool,
)
from benchmarks.processors import AMD_SHARED, PROCESSORS, programs_at_once
from benchmarks.runner import ROOT, WIDTH, conditions, describe, store_lines
from benchmarks.sass.flow import loops
from benchmarks.sass.instructions import PRODUCTS, local_accesses, parse, products_under_copies
from maskflash.backends.triton.few import narrowed
from maskflash.backends.triton.signature import FEW, HOPPER, PASSES
from maskflash.backends.triton.tiles import COMBINE, DELTA, ROWS, SHARED_LIMITS, Tile, choose

RESULTS: Final = ROOT / "benchmarks/results/static_gates.json"
FLOAT32_STACK: Final = 600  # bytes: in full precision its products have no tensor cores, and registers run out
# Of a loop's instructions, without and with a limit of registers: sm_90's forward D64 with FlashMask's look-ups has 6 %
# with one, and is predicted to run at 357 and 117 TFLOP/s, full and partial tiles, without at 251 and 111.
LOCAL_SHARES: Final = (0.04, 0.1)
ODD: Final = ((80, 80), (96, 96), (192, 192), (192, 128), (40, 72))  # D and DV, whole vectors as all are made
_PRODUCTS: Final[dict[int | str, tuple[str, ...]]] = {
    90: ("wgmma",),
    100: ("tcgen05", "mma"),
    "gfx942": ("mfma",),
    "gfx950": ("mfma",),
    "gfx1201": ("wmma",),
}
OF_8_BITS: Final = " of 8 bits"
THREE: Final = "tf32x3"  # products of float32 that have tensor cores
SCORED: Final = (80, 90, 100)
# By each family of the table.
SERVED: Final[dict[int | str, tuple[int | str, ...]]] = {80: (80,), 86: (86, 89), 90: (90,), 100: (100,)} | {
    name: (name,) for name in AMD_SHARED
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel needs.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread.
        local: accesses to it in the innermost loops.
        local_share: the largest share of a loop's instructions that they are.
        shared: bytes per program.
        programs: that fit a multiprocessor at once.
        product: "wgmma", "mma", "tcgen05", "mfma" or "wmma", the instructions of matrix cores, of NVIDIA's also " of 8
            bits"; "" where it has none.
        under_copies: products that a loop issues, at least, between a copy and the wait for it; None without such.
        serialised: ptxas warns that Hopper's products wait for one another (C7511); None where it was not asked.
        seconds: to compile.
    """

    registers: int
    stack: int
    local: int
    local_share: float
    shared: int
    programs: int
    product: str
    under_copies: int | None
    serialised: bool | None
    seconds: float


def faults(case: Case, found: Resources) -> list[str]:
    """Why a kernel fails the gate; empty where it passes."""
    wrong = []
    amd, half = isinstance(case.arch, str), case.bits < 32
    allowed = 0.0 if amd else LOCAL_SHARES[case.tile.registers is not None]
    if found.local_share > allowed and (amd or half):
        wrong.append(f"spills: {found.local} accesses to local memory in its loops")
    if not amd and not half and found.stack > FLOAT32_STACK:
        wrong.append(f"{found.stack} B of stack, more than {FLOAT32_STACK}")
    if half and case.pass_name not in ("delta", "combine"):
        short = case.arch == 90 and case.pass_name == "split" and case.tile.block_m < 64  # of rows of a product
        products = ("mma",) if short else _PRODUCTS.get(case.arch, ("mma",))
        products = tuple(name + OF_8_BITS for name in products) if case.bits == 8 else products
        if found.product not in products:
            wrong.append(f"no {products[0]}")
        if found.serialised:
            wrong.append("ptxas serialises wgmma (C7511)")
        # The model says so of these. On 8.6 and 8.9 a tile's products take longer than the copy of the next.
        alone = found.under_copies == 0 and found.programs == 1
        if case.arch in (80, 90) and alone and not OF_PAIRS.get(case.score):
            wrong.append("its stages prefetch nothing, and its program is alone on the multiprocessor")
    if case.products == THREE and not found.product:
        wrong.append("no tensor cores")
    if found.shared > SHARED_LIMITS[case.arch]:
        wrong.append(f"{found.shared} B of shared memory, more than {SHARED_LIMITS[case.arch]}")
    return wrong


def table_cases(quick: bool) -> list[Case]:
    """The kernels of every row, with each mask; then those of odd head dims, with one mask, which changes.

    If quick, rows too have one mask, and there is one odd head dim for each architecture, pass and width. float32's
    and AMD's kernels take longest to compile: quick runs have float32's rows, which all of NVIDIA's share, of one
    architecture, and of AMD's the 16-bit rows of one architecture of each kind.
    """
    cases = []
    for number, row in enumerate(ROWS):
        masks = [MASKS[number % len(MASKS)]] if quick else MASKS
        archs = _archs(row.arch, row.bits, quick)
        kind = (row.bits, row.head_dim, row.head_dim, row.tile)
        cases += [Case(arch, row.pass_name, mask, *kind) for arch in archs for mask in masks]
        if row.bits == 32 and row.arch in SCORED and not (quick and (row.arch, row.head_dim) != (80, 64)):
            cases.append(Case(row.arch, row.pass_name, "interval", *kind, products=THREE))
        if row.pass_name == "split":
            cases += [Case(arch, "split", "interval", *kind, paged=True) for arch in archs]
            with_e4m3 = [arch for arch in archs if isinstance(arch, int) and arch >= 89 and row.bits == 16]
            cases += [Case(arch, "split", "interval", *kind, paged=True, pages_in_8_bits=True) for arch in with_e4m3]
        if row.pass_name == "split" and (one := narrowed(row.tile, 1)) != row.tile:
            few = (*kind[:-1], one)
            cases += [Case(arch, "split", mask, *few) for arch in archs for mask in (masks[:1] if quick else masks)]
    for family, bits in product(SERVED, (16, 32)):  # 8 bits are forward's alone
        for name, tile in (("delta", DELTA), ("combine", COMBINE)):
            cases += [Case(arch, name, "interval", bits, 256, 256, tile) for arch in _archs(family, bits, quick)]
    largest = {(row.arch, row.pass_name, row.bits): row.head_dim for row in ROWS}
    for number, (served, dims) in enumerate(product(largest, ODD)):
        family, pass_name, bits = served
        skipped = quick and (family in AMD_SHARED or dims != ODD[number // len(ODD) % len(ODD)])
        if max(dims) <= largest[served] and not skipped:
            tile = choose(family, pass_name, DTYPES[bits], max(dims), (BLOCK, BLOCK))
            archs = _archs(family, bits, quick)
            cases += [Case(arch, pass_name, MASKS[number % len(MASKS)], bits, *dims, tile) for arch in archs]
    return cases + score_cases(quick)


def score_cases(quick: bool) -> list[Case]:
    """The kernels of each score, and of dropout, with one mask; if quick, a few of them."""
    cases = []
    passes = (*PASSES, *HOPPER, "split", "dtables")
    kinds = [*product(SCORED, (64, 128), SCORES, passes), *product((90,), (256,), SCORES, ("hopper",))]
    for arch, dim, score, pass_name in kinds:
        without = {"delta": True, "split": score == "dropout", "dtables": score not in LEARNED}
        without |= dict.fromkeys(HOPPER, arch != 90)
        if not without.get(pass_name):
            tile = choose(arch, pass_name, DTYPES[16], dim, (BLOCK, BLOCK), None, OF_PAIRS.get(score, 0))
            cases.append(Case(arch, pass_name, "interval", 16, dim, dim, tile, score))
    return cases[::17] if quick else cases


def _archs(family: int | str, bits: int, quick: bool) -> Sequence[int | str]:
    """Which architectures of a family are compiled for."""
    if bits == 8:  # 8.6 has no such products
        return [arch for arch in SERVED[family] if arch != 86]
    if quick and ((bits == 32 and family != 80) or family == "gfx950"):
        return []
    return SERVED[family][:1] if quick else SERVED[family]


def measure(case: Case) -> Resources:
    """Compile one kernel and read what it needs."""
    start = time.perf_counter()
    compiled = compile_case(case)
    seconds = round(time.perf_counter() - start, 2)
    return _amd(case, compiled, seconds) if isinstance(case.arch, str) else _nvidia(case, compiled, seconds)


def _nvidia(case: Case, compiled: Any, seconds: float) -> Resources:
    code, shared = disassemble(compiled.asm["cubin"]), compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    turns = loops(parse(code.text))
    under_copies = [under for turn in turns if (under := products_under_copies(turn)) is not None]
    kinds = ("wgmma", "tcgen05", "mma")
    names = dict(zip(PRODUCTS, (*kinds, *(kind + OF_8_BITS for kind in kinds)), strict=True))
    return Resources(
        code.registers,
        code.stack,
        sum(map(local_accesses, turns)),
        round(max((local_accesses(turn) / len(turn) for turn in turns), default=0.0), 3),
        shared,
        programs_at_once(case.arch, case.tile.warps, code.registers, shared, tensor_memory),
        next((names[name] for name in names if name in code.text), ""),
        min(under_copies, default=None),
        _serialised(compiled.asm["ptx"]) if case.arch == 90 and case.bits < 32 else None,
        seconds,
    )


def _amd(case: Case, compiled: Any, seconds: float) -> Resources:
    code, shared = amdgcn.read(compiled.asm["amdgcn"]), compiled.metadata.shared
    by_shared = AMD_SHARED[case.arch] // max(shared, 1)
    return Resources(
        code.registers,
        code.scratch,
        code.scratch_in_loops,
        float(code.scratch_in_loops > 0),
        shared,
        min(4 * code.waves // case.tile.warps, by_shared),  # a multiprocessor has four SIMDs
        code.product,
        None,
        None,
        seconds,
    )


def _serialised(ptx: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        return "C7511" in tool("ptxas", "--gpu-name=sm_90a", "-v", source, "-o", os.devnull)


def _tried(case: Case) -> tuple[Case, Resources | None, list[str]]:
    """A case with what was found, and its faults; a kernel that does not compile has that one."""
    try:
        found = measure(case)
    except Exception as error:
        last = str(error).strip().splitlines()[-1:] or [""]
        return case, None, [f"does not compile: {type(error).__name__}: {last[0]}"]
    return case, found, faults(case, found)


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    cases = _chosen(options)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    results = []
    for number, result in enumerate(in_processes(_tried, cases), 1):
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
        question = "What does each row of the tile table need, and does it pass the static gates?"
        rows = [{**asdict(case), **(asdict(found) if found else {}), "faults": wrong} for case, found, wrong in results]
        store_lines(options.json, {"question": question, "conditions": where}, rows)
    return 1 if failed else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile the tile table for real devices and check what it needs.")
    parser.add_argument("--quick", action="store_true", help="each row of the table once")
    parser.add_argument("--arch", type=_arch, choices=[*PROCESSORS, *AMD_SHARED], action="append", help="90 or gfx942")
    parser.add_argument("--pass", dest="passes", choices=(*PASSES, *HOPPER, *FEW, "dtables"), action="append")
    parser.add_argument("--score", choices=("", *SCORES), action="append", help='"" for none')
    parser.add_argument("--mask", choices=MASKS, action="append")
    parser.add_argument("--bits", type=int, choices=DTYPES, action="append", help="of the dtype")
    parser.add_argument("--dim", type=int, action="append", help="head dim")
    parser.add_argument(
        "--tile",
        action="append",
        metavar="M,N,WARPS,STAGES[,REGISTERS]",
        help="instead of the table's; repeat it to compare",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"where to store (default, if all ran: {RESULTS})")
    options = parser.parse_args(argv)
    chosen = options.arch, options.passes, options.mask, options.bits, options.dim, options.tile, options.score
    whole = not (options.quick or any(chosen))
    if whole and options.json is None:
        options.json = RESULTS
    return options


def _arch(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _chosen(options: argparse.Namespace) -> list[Case]:
    cases = table_cases(options.quick)
    wanted = [("arch", options.arch), ("pass_name", options.passes), ("mask", options.mask)]
    wanted += [("bits", options.bits), ("head_dim", options.dim), ("score", options.score)]
    cases = [case for case in cases if all(not some or getattr(case, name) in some for name, some in wanted)]
    if not options.tile:
        return cases
    tiles = [Tile(*(int(n) for n in text.split(","))) for text in options.tile]
    kinds = dict.fromkeys(
        (case.arch, case.pass_name, case.mask, case.bits, case.head_dim, case.v_head_dim, case.score) for case in cases
    )
    return [Case(*kind, tile, score) for *kind, score in kinds for tile in tiles]


def _line(case: Case) -> str:
    tile = case.tile
    limit = "" if tile.registers is None else f", at most {tile.registers} registers"
    shape = f"({tile.block_m}, {tile.block_n}, {tile.warps} warps, {tile.stages} stages{limit})"
    return f"{arch_name(case.arch)} {case.pass_name} {case.bits} bits D={_dims(case)} {_what(case)} {shape}"


def _what(case: Case) -> str:
    """The mask, and the score and the pages where there are any."""
    pages = ["paged in 8 bits" if case.pages_in_8_bits else "paged"] if case.paged else []
    pages += [case.products] * (case.products != "ieee")
    return ", ".join([case.mask, *([case.score] if case.score else []), *pages])


def _dims(case: Case) -> str:
    return str(case.head_dim) if case.head_dim == case.v_head_dim else f"{case.head_dim}/{case.v_head_dim}"


def _table(results: Sequence[tuple[Case, Resources | None, list[str]]]) -> Table:
    table = Table(title="What the kernels need (compiled, never run)", title_justify="left")
    for name in ("arch", "pass", "bits", "D", "mask", "tile", "warps", "stages"):
        table.add_column(name, justify="left" if name in ("pass", "mask") else "right")
    for name in ("registers", "stack", "local", "shared", "programs", "product"):
        table.add_column(name, justify="right")
    for case, found, wrong in results:
        tile = case.tile
        needs = [""] * 6
        if found:
            needs = [str(found.registers), str(found.stack), str(found.local), f"{found.shared:,}"]
            needs += [str(found.programs), found.product]
        table.add_row(
            *(arch_name(case.arch), case.pass_name, str(case.bits), _dims(case), _what(case)),
            *(f"{tile.block_m} x {tile.block_n}", str(tile.warps), str(tile.stages), *needs),
            style="bold red" if wrong else "",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
