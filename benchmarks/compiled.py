"""A kernel of the tile table -> its machine code, compiled for a device that need not be there.

Processes compile two at a time, with caches of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch

import maskflash as mf
from maskflash.backends.triton import modules
from maskflash.backends.triton.device import described
from maskflash.backends.triton.few import special_of
from maskflash.backends.triton.fp8 import SCALED
from maskflash.backends.triton.launch import ANY_MASK, copied_rows
from maskflash.backends.triton.layout import UNIT, padded
from maskflash.backends.triton.render import render
from maskflash.backends.triton.signature import HOPPER, OF_KEYS, SCORE, PassName, ScoreKind, Specialisation, TableKind
from maskflash.backends.triton.tiles import PARTS, Tile
from maskflash.functions.sizes import Sizes
from maskflash.ground.eight_bits import FORMAT

DTYPES: Final = {8: FORMAT, 16: torch.bfloat16, 32: torch.float32}
_SHORT: Final = {8: "bf16", 16: "bf16", 32: "fp32"}  # as Triton calls what is not in 8 bits
BLOCK: Final = 128  # tokens of a block map's tile
PROCESSES: Final = 2

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel: architecture, pass, mask, bits of the dtype, tile, head dims of q and k and of v, one of SCORES.

    Products of float32 are in full, "ieee", or "tf32x3". Of "split" the mask "interval" is a window's expression, and
    keys may lie in pages, which may be in 8 bits.
    """

    arch: int | str
    pass_name: PassName
    mask: str
    bits: int
    head_dim: int
    v_head_dim: int
    tile: Tile
    score: str = ""
    paged: bool = False
    pages_in_8_bits: bool = False
    products: str = "ieee"


def compile_case(case: Case) -> Any:
    """What Triton's compiler makes of a kernel: its texts, its machine code, its metadata."""
    import triton
    from triton.backends.compiler import GPUTarget

    tile = case.tile
    if case.pass_name == "hopper" and (tile.block_m, tile.warps, tile.consumers) != (128, 12, 2):
        raise ValueError(f"hopper: got {tile}, expected 128 rows, 12 warps and 2 consumers, which the kernel has")
    special = _specialisation(case)
    function = getattr(modules.load(render(special, case.pass_name)), case.pass_name)
    tables = special.score.tables if special.score else ()
    names = {f"{SCORE}t{slot}": kind.dtype for slot, kind in enumerate(tables)}
    kinds, constants, attributes = {}, {}, {}
    values = _constants(case)
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if name.endswith("_desc"):
            kinds[name] = _descriptor(case, name)
        elif parameter.is_constexpr:
            kinds[name], constants[(place,)] = "constexpr", values[name]
        elif parameter.annotation_type:
            kinds[name] = parameter.annotation_type
        else:
            kinds[name] = _TABLES[names[name]] if name in names else _pointer(name, case)
            if not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    if isinstance(case.arch, str):
        target = GPUTarget("hip", case.arch, 64 if case.arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", case.arch, 32)
    source = _source(case.pass_name)(function, kinds, constants, attributes)
    return triton.compile(source, target=target, options=case.tile.options)


def _source(pass_name: PassName) -> Any:
    """What Triton's compiler takes a function in: Hopper's own kernel is written in Gluon."""
    if pass_name in HOPPER:
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _descriptor(case: Case, name: str) -> str:
    """The type of a tensor map, as Triton calls it."""
    rows = copied_rows(name, case.pass_name, case.tile)
    dim = padded(case.head_dim if name in ("q_desc", "k_desc", "dq_desc") else case.v_head_dim)
    block, layout = described(DTYPES[case.bits], rows, dim)
    return f"tensordesc<{_SHORT[case.bits]}{block},{layout!r}>"


class Code(NamedTuple):
    """A cubin's instructions as text, and what it needs."""

    text: str
    registers: int
    stack: int


def disassemble(cubin: bytes) -> Code:
    """Read a cubin with the tool that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, text = (tool("cuobjdump", what, path) for what in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return Code(text, registers, stack)


def in_processes(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """A function's results for all items, in order."""
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(PROCESSES, _start, (folder,)) as pool,
    ):
        yield from pool.imap(function, items)


def _start(folder: str) -> None:
    """A worker's surroundings: caches of this run alone, and kernels compiled even where tests interpret them."""
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
    os.environ[modules.VARIABLE] = os.path.join(folder, "maskflash")
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def _causal_document(b: Any, h: Any, q: Any, kv: Any, *, doc: Any) -> Any:
    return q >= kv and doc[b, q] == doc[b, kv]


MASKS: Final = ("interval", "causal document", "flashmask")  # the last two by their expressions


SCORES: Final = ("alibi", "soft-cap", "relative bias", "pair bias", "dropout")
LEARNED: Final = ("alibi", "relative bias", "pair bias")
OF_PAIRS: Final = {"relative bias": 1, "pair bias": 1}  # numbers that a score looks up for each pair


def _score(case: Case) -> ScoreKind | None:
    """A score as its kernels have it; one that looks a number up learns it in `dtables`."""
    if case.score in ("", "dropout"):
        return None
    made = {
        "alibi": mf.scores.alibi(torch.zeros(2)),
        "soft-cap": mf.scores.softcap(30.0),
        "relative bias": mf.scores.relative_bias(torch.zeros(32, 2)),
        "pair bias": mf.scores.bias(torch.zeros(2, 2, 8, 8)),
    }[case.score]
    bound = made.bind(Sizes.checked("gates", 8, 8, batch=2, heads=2), {})
    learned = tuple(case.pass_name == "dtables" and table.is_floating_point() for table in bound.tables)
    return ScoreKind(bound.slots.expr, tuple(map(TableKind.of, bound.tables)), learned)


def _specialisation(case: Case) -> Specialisation:
    """What the kernels of a mask and of head dims depend on; the contents of tables are not among it."""
    further = {
        "padded_d": case.bits > 8 and padded(case.head_dim) != case.head_dim,
        "padded_dv": padded(case.v_head_dim) != case.v_head_dim,
        "score": _score(case),
        "dropout": case.score == "dropout",
        "products_in_8_bits": case.bits == 8,
    }
    few = case.pass_name == "split"
    if case.mask == "interval" and not few:
        return Specialisation(ANY_MASK, interval=True, **further)
    columns = torch.zeros(2, 2, 8, dtype=torch.int32)  # of each batch row and head
    made, tables = {
        "interval": (mf.sliding_window(4), {}),
        "causal document": (mf.mask(_causal_document), {"doc": columns[0]}),
        "flashmask": (mf.ColumnIntervals(columns, columns, columns, columns, causal=True), {}),
    }[case.mask]
    problem = made.at(8, 8, batch=2, heads=2, **tables).tiled((BLOCK, BLOCK))
    if few:
        where = {"paged": case.paged, "pages_in_8_bits": case.pages_in_8_bits}
        return replace(special_of(problem, case.head_dim, case.v_head_dim, None, **where), **further)
    return Specialisation(problem.expr, tuple(map(TableKind.of, problem.inputs.tables)), **further)


def _constants(case: Case) -> dict[str, Any]:
    # In 8 bits q and k come with a power of two of dims.
    tile, dims = case.tile, (max(32, padded(case.head_dim)) if case.bits == 8 else case.head_dim, case.v_head_dim)
    own, step = (tile.block_n, tile.block_m) if case.pass_name in OF_KEYS else (tile.block_m, tile.block_n)
    return {
        **{"UNIT": UNIT, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "ROWS": BLOCK // own, "SUB": BLOCK // step},
        **dict(zip(("D", "DV", "BLOCK_D", "BLOCK_DV"), (*dims, *map(padded, dims)), strict=True)),
        **{"PRECISION": case.products, "HAS_DLSE": True, "HAS_SINKS": True, "MEASURE": False, "PARTS": PARTS},
        **{"RAGGED": True, "REQUESTS": 128, "STAGES": tile.stages, "REGISTERS": tile.registers, "SCALED": SCALED},
    }


_TABLES: Final = {torch.float32: "*fp32", torch.int64: "*i64"}


def _pointer(name: str, case: Case) -> str:
    if name in ("lse_ptr", "delta_ptr", "dlse_ptr", "sinks_ptr", "parts_ptr", "parts_lse_ptr", "totals", "factors"):
        return "*fp32"
    if name.endswith("_scales"):
        return "*fp32"
    of_products = case.bits == 8 and name in ("q_ptr", "k_ptr", "v_ptr")
    if of_products or (case.pages_in_8_bits and name in ("k_ptr", "v_ptr")):
        return "*fp8e4nv"
    if name.startswith("sums"):
        return "*i64"
    if name.endswith("_ptr"):
        return f"*{_SHORT[case.bits]}"
    return "*i32"  # the walk over tiles, and the tables of these masks


def tool(tool: str, *words: str | Path) -> str:
    """What one of the tools that come with Triton says."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    done = subprocess.run([path, *words], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def arch_name(arch: int | str) -> str:
    """As compilers call it."""
    return arch if isinstance(arch, str) else f"sm_{arch}"
