"""Each 16-bit tile of the table -> a predicted speed, from its machine code alone; and what the model is worth.

    compile a kernel, read it             benchmarks/compiled.py, benchmarks/sass/instructions.py
    its loops, and which warps run them   benchmarks/sass/flow.py, benchmarks/sass/roles.py
    each instruction's cost               benchmarks/sass/work.py
    warps in order, pipes, copies         benchmarks/sass/simulate.py, benchmarks/sass/mbarriers.py
    limits of memory                      benchmarks/sass/predict.py
    kernels of known speed                benchmarks/sass/reference.py, benchmarks/sass/specialised.py

Nothing runs on a GPU. Predictions differ from what is known by up to 10 % for forward kernels on sm_90; for backward
ones only ratios mean something, and sm_80 and sm_86 are not validated. Differences under 10 % mean nothing.

    python -m benchmarks.sass_model                         the validation, then every row of the table
    python -m benchmarks.sass_model --arch 90 --pass dq --dim 64 --tile 128,64,8,3 --tile 128,64,8,3,128
    python -m benchmarks.sass_model --json                  also store it, for docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.compiled import MASKS, Case, arch_name, compile_case, disassemble, in_processes
from benchmarks.processors import PROCESSORS, programs_at_once
from benchmarks.runner import ROOT, WIDTH, conditions, describe, store_lines
from benchmarks.sass.instructions import parse
from benchmarks.sass.predict import Prediction, predict
from benchmarks.sass.roles import depths, roles
from benchmarks.sass.simulate import NO_BULK, Bulk
from maskflash.backends.triton.layout import padded
from maskflash.backends.triton.signature import HOPPER, OF_KEYS, PASSES
from maskflash.backends.triton.tiles import ROWS, Tile

RESULTS: Final = ROOT / "benchmarks/results/sass_model.json"
QUESTION: Final = "How fast would each tile's kernel be, as a model of its machine code predicts?"
_MODELLED: Final = (*PASSES, *HOPPER)
ARCHS: Final = tuple(arch for arch, processor in PROCESSORS.items() if processor.product_cycles)
WALKS: Final = ("full", "partial")
_CYCLES: Final = {False: 50_000, True: 5_000}  # by quick


@dataclass(frozen=True, slots=True)
class Modelled:
    """A kernel with a prediction for each of its loops.

    Attributes:
        registers: per thread.
        shared: bytes per program.
        programs: that fit a multiprocessor.
        loops: over full tiles, then over partial ones.
    """

    registers: int
    shared: int
    programs: int
    loops: list[Prediction]


def model(compiled: Any, arch: int, warps: int, *, bulk: Bulk = NO_BULK, cycles: int) -> Modelled:
    """Predict a compiled kernel.

    Args:
        compiled: by Triton.
        arch: compute capability times ten.
        warps: of a program.
        bulk: how it makes bulk copies.
        cycles: to simulate.

    Raises:
        ValueError: if its warps have roles that the model cannot tell apart.
    """
    code, shared = disassemble(compiled.asm["cubin"]), compiled.metadata.shared
    programs = programs_at_once(arch, warps, code.registers, shared)
    instructions = parse(code.text)
    found = roles(instructions, warps)
    predicted = [
        predict(
            [(role.loops[walk], role.warps) for role in found],
            arch,
            programs,
            bulk=bulk,
            depths=depths(instructions),
            cycles=cycles,
        )
        for walk in range(len(found[0].loops) if programs else 0)
    ]
    return Modelled(code.registers, shared, programs, predicted)


def validation(quick: bool) -> list[dict[str, Any]]:
    """Kernels of known speed: names, known and predicted TFLOP/s."""
    flex, tutorial, dkdv, dq, *specialised = in_processes(partial(_reference, quick=quick), range(6))
    # The backward counts 10 products' worth of work, and computes 8 and 6.
    backward = {"name": "FlexAttention, backward", "predicted": 10 / (8 / dkdv["predicted"] + 6 / dq["predicted"])}
    return [flex, tutorial, {**flex, **backward, "known": dkdv["together"]}, *specialised]


def _reference(number: int, quick: bool) -> dict[str, Any]:
    """One of them; they import triton, which only processes of their own do."""
    from benchmarks.sass.reference import BACKWARD, DIM, REFERENCES

    reference = REFERENCES[number]
    tile = reference.tile
    ahead = 0 if tile.consumers else tile.stages - 1
    bulk = Bulk(2 * tile.block_n * DIM, ahead) if reference.tma else NO_BULK
    found = model(reference.compile(), 90, tile.warps, bulk=bulk, cycles=_CYCLES[quick])
    known = {"name": reference.name, "known": reference.known, "use": reference.use, "together": BACKWARD}
    return {**known, "predicted": found.loops[0].tflops}


def table_cases() -> list[Case]:
    """The rows that have a prediction. Those of few rows wait for keys from memory, which is not in the model."""
    return [
        Case(row.arch, row.pass_name, "interval", row.bits, row.head_dim, row.head_dim, row.tile)
        for row in ROWS
        if row.arch in ARCHS and row.bits == 16 and row.pass_name in _MODELLED
    ]


def _modelled(case: Case, quick: bool) -> Modelled | None:
    """A case's prediction; None of a tile that does not compile."""
    try:
        compiled = compile_case(case)
    except Exception:
        return None
    tile = case.tile
    walked = tile.block_m if case.pass_name in OF_KEYS else tile.block_n
    bulk = Bulk(2 * walked * padded(case.head_dim)) if tile.consumers else NO_BULK
    found = model(compiled, int(case.arch), tile.warps, bulk=bulk, cycles=_CYCLES[quick])
    # Hopper's own forward walks over partial tiles first.
    return replace(found, loops=found.loops[::-1]) if case.pass_name == "hopper" else found


def main(argv: Sequence[str] | None = None) -> None:
    options = _options(argv)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    known = [] if options.tile else validation(options.quick)
    if known:
        console.print(_validation_table(known))
    cases = _chosen(options)
    found = list(in_processes(partial(_modelled, quick=options.quick), cases))
    console.print(_table(cases, found))
    where = conditions(options.quick)
    import triton

    where["versions"]["triton"] = triton.__version__
    console.print(f"predicted, never run; {describe(where)}", highlight=False)
    if options.json:
        rows = [{**asdict(case), **asdict(each)} for case, each in zip(cases, found, strict=True) if each]
        store_lines(options.json, {"question": QUESTION, "conditions": where, "validation": known}, rows)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Predict the speed of the tile table's kernels from their machine code."
    )
    parser.add_argument("--quick", action="store_true", help="few cycles: does it run at all?")
    parser.add_argument("--arch", type=int, choices=ARCHS, action="append", help="compute capability times ten")
    parser.add_argument("--pass", dest="passes", choices=_MODELLED, action="append")
    parser.add_argument("--mask", choices=MASKS, default="interval", help="of the partial tiles (default: %(default)s)")
    parser.add_argument("--dim", type=int, action="append", help="head dim")
    parser.add_argument(
        "--tile",
        action="append",
        metavar="M,N,WARPS,STAGES[,REGISTERS[,CONSUMERS]]",
        help="instead of the table's; repeat it to compare",
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="FILE", help=f"also store it (default: {RESULTS})"
    )
    return parser.parse_args(argv)


def _chosen(options: argparse.Namespace) -> list[Case]:
    wanted = [("arch", options.arch), ("pass_name", options.passes), ("head_dim", options.dim)]
    cases = [case for case in table_cases() if all(not some or getattr(case, name) in some for name, some in wanted)]
    kinds = dict.fromkeys((case.arch, case.pass_name, options.mask, 16, *(case.head_dim,) * 2) for case in cases)
    if options.tile:
        tiles = [Tile(*(int(n) for n in text.split(","))) for text in options.tile]
        return [Case(*kind, tile) for kind in kinds for tile in tiles]
    return [Case(*kind, case.tile) for kind, case in zip(kinds, cases, strict=True)]


def _validation_table(known: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="What the model says of kernels whose speed is known (H100, TFLOP/s)", title_justify="left")
    for name in ("kernel", "known", "predicted", "used for"):
        table.add_column(name, justify="left" if name in ("kernel", "used for") else "right")
    for row in known:
        table.add_row(row["name"], str(row["known"]), f"{row['predicted']:.0f}", row["use"])
    return table


def _table(cases: Sequence[Case], found: Sequence[Modelled | None]) -> Table:
    table = Table(title="Predicted TFLOP/s of the loops (never run)", title_justify="left")
    for name in ("arch", "pass", "D", "mask", "tile", "registers", "programs", *WALKS, "instructions", "tensor cores"):
        table.add_column(name, justify="left" if name in ("pass", "mask") else "right")
    for case, each in zip(cases, found, strict=True):
        cells = ["does not compile"] + [""] * 5
        if each:
            cells = [str(each.registers), str(each.programs)]
            cells += [f"{loop.tflops:.0f}" for loop in each.loops] or ["does not fit", ""]
            cells.append(" / ".join(str(loop.instructions) for loop in each.loops))
            cells.append(" / ".join(f"{100 * loop.tensor_share:.0f} %" for loop in each.loops))
        table.add_row(arch_name(case.arch), case.pass_name, str(case.head_dim), case.mask, tile_text(case.tile), *cells)
    return table


def tile_text(tile: Tile) -> str:
    """A tile in a table: its sides, warps and stages, its limit of registers, and warpgroups that only compute."""
    limit = "" if tile.registers is None else f", r{tile.registers}"
    limit += f", {tile.consumers} consumers" if tile.consumers else ""
    return f"{tile.block_m} x {tile.block_n}, {tile.warps} warps, {tile.stages} stages{limit}"


if __name__ == "__main__":
    main()
