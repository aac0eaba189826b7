"""What a kernel's text depends on -> its arguments: the one list from which its signature and its launch come.

    descriptor      a tensor map: what Hopper's copy engine knows of a tensor
    pointer         a tensor; Triton compiles in whether its address is a multiple of 16 bytes
    view            a tensor at any address, as tables and offsets may be
    i64, i32, fp32  a number whose value is not compiled in
    constant        a number that is

Launches give every argument by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import torch

from maskflash.expr.nodes import Expr, Node
from maskflash.expr.ops import INDEX_VARIABLES

PassName = Literal[
    "forward", "hopper", "split", "combine", "delta", "dkdv", "dq", "hopper_dkdv", "hopper_dq", "dtables"
]
PASSES: Final[tuple[PassName, ...]] = ("forward", "delta", "dkdv", "dq")
"""Those of every mask; `dtables` is for scores that learn."""
FEW: Final[tuple[PassName, ...]] = ("split", "combine")
"""Forward where rows are few."""
HOPPER: Final[tuple[PassName, ...]] = ("hopper", "hopper_dkdv", "hopper_dq")
"""Those of Hopper's own, whose warps have roles."""
OF_KEYS: Final[tuple[PassName, ...]] = ("dkdv", "hopper_dkdv")
"""Those whose programs hold keys and walk over queries."""


@dataclass(frozen=True, slots=True)
class TableKind:
    """What a kernel must know of a table: its dtype and number of dimensions; sizes and strides are arguments."""

    dtype: torch.dtype
    ndim: int

    @classmethod
    def of(cls, table: torch.Tensor) -> TableKind:
        """The kind of a table."""
        return cls(table.dtype, table.ndim)


@lru_cache(maxsize=256)
def _lookups(expr: Expr) -> tuple[tuple[Node, frozenset[str]], ...]:
    """An expression's look-ups, each with what its indices depend on, of b, h, q, kv."""
    reads: list[frozenset[str]] = []
    for node in expr.nodes:
        own = {node.op} if node.op in INDEX_VARIABLES else {"q", "kv"} if node.op == "score" else set()
        reads.append(frozenset(own).union(*(reads[arg] for arg in node.args)))
    return tuple((node, reads[n]) for n, node in enumerate(expr.nodes) if node.op == "lookup")


@dataclass(frozen=True, slots=True)
class ScoreKind:
    """What a kernel's text depends on of a score; what its params and tables hold is not among it.

    Attributes:
        expr: the score's program.
        tables: the kind of each of its tables.
        wanted: for each of them, whether its gradient is; all False but in `dtables`.
        narrow: its 64-bit integers fit 32 bits.
        near: so do places in its tables, counted from where those of a head begin.
        q_offsets: its q_offset is a tensor.
        kv_offsets: its kv_offset is a tensor.
        negative_kv: column numbers may be below 0.
    """

    expr: Expr
    tables: tuple[TableKind, ...] = ()
    wanted: tuple[bool, ...] = ()
    narrow: bool = True
    near: bool = True
    q_offsets: bool = False
    kv_offsets: bool = False
    negative_kv: bool = False

    @property
    def of_pairs(self) -> int:
        """How many real numbers it looks up for each pair."""
        return sum(node.dtype.is_floating_point and {"q", "kv"} <= reads for node, reads in _lookups(self.expr))

    @property
    def learned(self) -> tuple[int, ...]:
        """The slots whose gradients are wanted."""
        return tuple(slot for slot, wanted in enumerate(self.wanted) if wanted)


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Everything a kernel's text depends on. Lengths, windows, offsets and the contents of tables are not among it.

    Attributes:
        expr: the mask; "always" where its rows' intervals stand for it.
        tables: the kind of each of its tables.
        interval: whatever the mask is, it comes as the interval that each row sees.
        narrow: its 64-bit integers fit 32 bits at the lengths of the call.
        q_offsets: q_offset is a tensor.
        kv_offsets: kv_offset is a tensor.
        negative_kv: column numbers may be below 0: kv_offset is, or is a tensor.
        padded_d: the head dim of q and k is no power of two (at least 16).
        padded_dv: the head dim of v is no power of two (at least 16).
        score: what becomes of scaled products; None where they stay what they are.
        dropout: some probabilities are dropped.
        paged: keys lie in pages.
        products_in_8_bits: forward's q, k and v are in float8_e4m3fn, and have scales.
        pages_in_8_bits: pages are, and have scales.
    """

    expr: Expr
    tables: tuple[TableKind, ...] = ()
    interval: bool = False
    narrow: bool = True
    q_offsets: bool = False
    kv_offsets: bool = False
    negative_kv: bool = False
    padded_d: bool = False
    padded_dv: bool = False
    score: ScoreKind | None = None
    dropout: bool = False
    paged: bool = False
    products_in_8_bits: bool = False
    pages_in_8_bits: bool = False

    @property
    def mask(self) -> str:
        """The mask as the kernel has it: what measured tiles hold for."""
        return "interval" if self.interval else self.expr.text

    @property
    def strength(self) -> str:
        """Likewise the score, whether there is dropout, and keys in 8 bits; empty without all."""
        score = "" if self.score is None else self.score.expr.text
        score = f"{score} dropout" if self.dropout else score
        return f"{score} 8 bits" if self.pages_in_8_bits else score


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument of a kernel."""

    name: str
    kind: Literal["descriptor", "pointer", "view", "i64", "i32", "fp32", "constant"]

    @property
    def text(self) -> str:
        """As it stands in the signature."""
        if self.kind in ("descriptor", "pointer", "view"):
            return self.name
        return f"{self.name}: tl.constexpr" if self.kind == "constant" else f'{self.name}: "{self.kind}"'

    @property
    def specialised(self) -> bool:
        """Whether Triton compiles its value or its alignment into the kernel."""
        return self.kind in ("descriptor", "pointer", "constant")


SCORE: Final = "s_"
"""What names of a score's values begin with, so that they are not the mask's."""
_DROPOUT: Final = [
    [Parameter("row_words", "pointer"), Parameter("column_words", "pointer")],
    [Parameter("threshold", "i32"), Parameter("kept_scale", "fp32")],
]
_SCALED: Final = [
    [Parameter(name, "pointer") for name in ("q_scales", "k_scales", "v_scales")],
    [Parameter("SCALED", "constant")],
]
_WALKED: Final = [
    [Parameter("order", "pointer")],
    *(
        [Parameter(f"{kind}_{x}", "pointer") for x in ("offsets", "tiles", "start", "stop")]
        for kind in ("full", "partial")
    ),
    [Parameter("map_b", "i32"), Parameter("map_h", "i32")],
]
_PAGED: Final = [
    [Parameter(name, "view") for name in ("block_table", "lengths", "starts")],
    [Parameter("table_step", "i64"), *(Parameter(name, "i32") for name in ("pages", "page_size", "room"))],
    [Parameter("RAGGED", "constant"), Parameter("REQUESTS", "constant")],
]
_SCALES: Final = [
    [Parameter("k_scales", "view"), Parameter("v_scales", "view")],
    *([Parameter(f"{x}_scales_{dimension}", "i64") for dimension in "bhs"] for x in "kv"),
]
# By pass: tensors with strides; contiguous tensors; real numbers; integers.
_OWN: Final[dict[PassName, tuple[str, str, str, str]]] = {
    "forward": ("q k v out", "lse sinks", "qk_scale", "batch heads group share q_len kv_len tiles_m"),
    "hopper": ("", "lse sinks", "qk_scale", "batch heads group share q_len kv_len tiles_m"),
    "split": ("q k v", "out lse sinks", "qk_scale", "batch heads group tiles pieces q_len head_rows"),
    "combine": ("", "out lse parts parts_lse sinks", "", "heads q_len pieces"),
    "delta": ("out dout", "dlse delta", "", "heads q_len tiles_m"),
    "dkdv": ("q k v dout", "lse delta dk dv", "scale qk_scale", "batch heads group part share q_len kv_len tiles_n"),
    "dq": ("q k v dout dq", "lse delta", "scale qk_scale", "batch heads group share q_len kv_len tiles_m"),
    "hopper_dkdv": ("", "lse delta dk dv", "scale qk_scale", "batch heads group part share q_len kv_len tiles_n"),
    "hopper_dq": ("", "lse delta", "scale qk_scale", "batch heads group share q_len kv_len tiles_m"),
    "dtables": ("q k v dout", "lse delta", "scale", "batch heads group share q_len kv_len tiles_m"),
}
_DESCRIPTORS: Final[dict[PassName, tuple[str, ...]]] = {
    "hopper": ("q_desc", "k_desc", "v_desc", "out_desc"),
    "hopper_dkdv": ("q_desc", "k_desc", "v_desc", "dout_desc"),
    "hopper_dq": ("q_desc", "k_desc", "v_desc", "dout_desc", "dq_desc"),
}
_FLAGS: Final[dict[PassName, tuple[str, ...]]] = {
    "forward": ("HAS_SINKS",),
    "hopper": ("HAS_SINKS",),
    "split": ("HAS_SINKS",),
    "dtables": ("MEASURE",),
}


def signature(special: Specialisation, pass_name: PassName) -> list[list[Parameter]]:
    """The arguments of a pass's kernel, line by line as its text has them."""
    strided, contiguous, reals, integers = (names.split() for names in _OWN[pass_name])
    if special.score and reals:
        reals = ["scale"]  # what a score is given is in natural units
    lines = [
        _line("descriptor", _DESCRIPTORS.get(pass_name, ())),
        _line("pointer", (f"{tensor}_ptr" for tensor in (*strided, *contiguous))),
        *(_line("i64", (f"{tensor}_{dimension}" for dimension in "bhs")) for tensor in strided),
        _line("fp32", reals),
        _line("i32", integers),
    ]
    if pass_name == "delta":
        lines.append(_line("constant", ("HAS_DLSE", "UNIT", "BLOCK_M", "DV", "BLOCK_DV", "PRECISION")))
    elif pass_name == "combine":
        lines.append(_line("constant", ("HAS_SINKS", "PARTS", "DV", "BLOCK_DV")))
    else:
        few = pass_name == "split"
        lines += [
            *((_PAGED if special.paged else [_line("i32", ["kv_len"])]) if few else _WALKED),
            *(_SCALES if special.pages_in_8_bits else []),
            *_of_mask(special),
            *(_of_score(special.score, pass_name) if special.score else []),
            *(_DROPOUT if special.dropout else []),
            *(_SCALED if special.products_in_8_bits else []),
            *(_line("constant", names) for names in _constants(pass_name)),
            _line("constant", _FLAGS.get(pass_name, ())),
        ]
    return [line for line in lines if line]


def _constants(pass_name: PassName) -> tuple[tuple[str, ...], ...]:
    """The numbers of a tile and of head dims; descriptors have head dims in them."""
    sides = ("BLOCK_M", "BLOCK_N", *(() if pass_name == "split" else ("ROWS", "SUB")))
    if pass_name in HOPPER:
        stored = ("D", "DV") if pass_name == "hopper_dkdv" else ()
        return (*sides, "STAGES", "REGISTERS"), (*stored, "BLOCK_D", "BLOCK_DV")
    return ("UNIT", *sides), ("D", "DV", "BLOCK_D", "BLOCK_DV", "PRECISION")


def _of_mask(special: Specialisation) -> list[list[Parameter]]:
    """How a mask comes: as its rows' intervals, or as what its expression reads."""
    if special.interval:
        return [_line("pointer", ["intervals"])]
    return [_offsets(special), *arguments_of(special.expr, special.tables)]


def _of_score(score: ScoreKind, pass_name: PassName) -> list[list[Parameter]]:
    """How a score comes: as a mask does, under names of its own; and where what it learns is summed."""
    lines = [_offsets(score, SCORE), *arguments_of(score.expr, score.tables, SCORE)]
    if pass_name == "dtables":
        lines.append(_line("pointer", ("totals", "factors", *(f"sums{slot}" for slot in score.learned))))
    return lines


def _offsets(found: Specialisation | ScoreKind, prefix: str = "") -> list[Parameter]:
    return [
        Parameter(f"{prefix}q_offset", "view" if found.q_offsets else "i64"),
        Parameter(f"{prefix}kv_offset", "view" if found.kv_offsets else "i64"),
    ]


def arguments_of(expr: Expr, tables: Sequence[TableKind], prefix: str = "") -> list[list[Parameter]]:
    """What an expression reads: its params on one line, then each table with its sizes and strides.

    All params are integers: a float comes as its 64 bits (`Expr.coded`).
    """
    lines = [_line("i64", (f"{prefix}p{slot}" for slot in range(expr.slots("param"))))]
    for slot, kind in enumerate(tables):
        table = f"{prefix}t{slot}"
        numbers = (f"{table}_{what}{axis}" for axis in range(kind.ndim) for what in ("size", "stride"))
        lines.append([Parameter(table, "view"), *_line("i64", numbers)])
    return lines


def _line(
    kind: Literal["descriptor", "pointer", "i64", "i32", "fp32", "constant"], names: Iterable[str]
) -> list[Parameter]:
    return [Parameter(name, kind) for name in names]
