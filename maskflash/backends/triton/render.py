"""A template and a specialisation -> the source of a Python module that holds one Triton kernel."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from maskflash.backends.triton.emit import TableKind, emit, signature
from maskflash.errors import BackendError
from maskflash.expr.nodes import Expr

if TYPE_CHECKING:
    from jinja2 import Environment

PassName = Literal["forward", "delta", "dkdv", "dq"]
PASSES: Final[tuple[PassName, ...]] = ("forward", "delta", "dkdv", "dq")


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Everything a kernel's text depends on. Lengths, windows, offsets and the contents of tables are not among it.

    Attributes:
        expr: the mask.
        tables: the kind of each of its tables.
        narrow: its 64-bit integers fit 32 bits at the lengths of the call.
        map_batch: the block map has batch rows of its own.
        map_heads: the block map has heads of its own.
        per_row_offset: q_offset is a tensor.
        padded_d: the head dim of q and k is no power of two (at least 16).
        padded_dv: likewise of v.
    """

    expr: Expr
    tables: tuple[TableKind, ...] = ()
    narrow: bool = True
    map_batch: bool = False
    map_heads: bool = False
    per_row_offset: bool = False
    padded_d: bool = False
    padded_dv: bool = False


def render(special: Specialisation, pass_name: PassName) -> str:
    """The source of one pass's module.

    Raises:
        BackendError: the mask uses an operation that Triton can't express exactly.
    """
    emitted = emit(special.expr, special.tables, narrow=special.narrow, transposed=pass_name == "dkdv")
    own = signature(special.expr, special.tables)
    pointers = [f"t{slot}" for slot in range(len(special.tables))]
    typed = (f"{name}," if name in pointers else f'{name}: "i64",' for name in own)
    context: dict[str, Any] = {
        "mask": {
            **{group: "\n".join(getattr(emitted, group)) or _NOTHING for group in ("once", "rows", "columns", "pairs")},
            "visible": emitted.visible,
        },
        "arguments": " ".join(typed) or _NOTHING,
        "offset_type": "" if special.per_row_offset else ': "i64"',
        "integer": "tl.int32" if special.narrow else "tl.int64",
        "unspecialised": _MARK,
        **{
            name: getattr(special, name)
            for name in ("map_batch", "map_heads", "per_row_offset", "padded_d", "padded_dv")
        },
    }
    text = _environment().get_template(f"{pass_name}.py.jinja").render(context)
    if pass_name == "delta":
        return _tidy(_unspecialised(text, ()))
    return _tidy(_unspecialised(text, [*pointers, "q_offset"] if special.per_row_offset else pointers))


def _tidy(text: str) -> str:
    """No lines where a hole was empty, no trailing blanks."""
    lines = (line.rstrip() for line in text.splitlines() if line.strip() != _NOTHING)
    return "\n".join(lines) + "\n"


_NOTHING: Final = "#-"
_NUMBER: Final = re.compile(r'(\w+): "(?:i|fp)\d+"')
_MARK: Final = "NUMBERS"
_INDENT: Final = 4 * " "


def _unspecialised(text: str, pointers: Sequence[str]) -> str:
    """Name what Triton must not compile into the kernel: values of numbers, and how these pointers are aligned."""
    before, _, after = text.partition(_MARK)
    numbers = dict.fromkeys(_NUMBER.findall(after.partition("\n):")[0]))  # of the signature alone
    names = ", ".join(f'"{name}"' for name in (*numbers, *pointers))
    return f"{before}[\n{textwrap.fill(names, 116, initial_indent=_INDENT, subsequent_indent=_INDENT)},\n]{after}"


def template_folder() -> Path:
    """Where the templates lie: in the installed package, else in the checkout this package runs from.

    Raises:
        BackendError: in neither; the message names both.
    """
    package = Path(__file__).parents[2]
    packaged, checkout = package / "templates", package.parent
    if packaged.is_dir():
        return packaged
    if (checkout / "pyproject.toml").is_file() and (checkout / "templates").is_dir():
        return checkout / "templates"
    raise BackendError(f"the kernel templates are neither in {packaged} nor in {checkout / 'templates'}; reinstall")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(os.fspath(template_folder())),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def table_kind(table: torch.Tensor) -> TableKind:
    """What a kernel must know of a table."""
    return TableKind(table.dtype, table.ndim)
