"""A template and a specialisation -> the source of a Python module that holds one Triton kernel."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from maskflash.backends.triton.emit import Group, emit
from maskflash.backends.triton.emit_score import emit_score
from maskflash.backends.triton.emit_shown import emit_shown
from maskflash.backends.triton.signature import OF_KEYS, PassName, Specialisation, signature
from maskflash.backends.triton.spans import emit_few
from maskflash.errors import BackendError

if TYPE_CHECKING:
    from jinja2 import Environment


def render(special: Specialisation, pass_name: PassName, *, remarks: bool = False) -> str:
    """The source of one pass's module.

    Args:
        special: what it depends on.
        pass_name: which pass.
        remarks: name the user's lines above what comes of them. Kernels that run have none, so that a function may move
            in its file, or to another one, and nothing is compiled again.

    Raises:
        BackendError: the mask uses an operation that Triton can't express exactly; or the score, where it decides
            what must be exact.
    """
    template = _environment().get_template(f"{pass_name}.py.jinja")
    transposed = pass_name in OF_KEYS
    how = {"narrow": special.narrow, "negative_kv": special.negative_kv, "remarks": remarks}
    forward, few = pass_name in ("forward", "hopper", "split"), pass_name == "split"
    score = {"backward": not forward, "transposed": transposed, "packed": few, "remarks": remarks}
    return template.render(
        special=special,
        signature=signature(special, pass_name),
        spread=spread,
        integer="tl.int32" if special.narrow else "tl.int64",
        mask=emit_few(special.expr, special.tables, **how)
        if few
        else emit(special.expr, special.tables, transposed=transposed, **how),
        score=emit_score(special.score, **score) if special.score else None,
        shown=emit_shown(special.expr, special.tables, narrow=special.narrow, negative_kv=special.negative_kv)
        if pass_name == "hopper"
        else [],
    )


def spread(lines: Mapping[Group, list[str]], group: Group, result: str) -> list[str]:
    """Statements of pairs, where those of a group have left one number in each thread.

    What pairs use of it goes to all threads that have such pairs, just before its first use: each such number holds a
    register for every column, or row, of a thread's pairs.

    Args:
        lines: of a mask or a score.
        group: "rows" or "columns".
        result: what is made of them, an expression.
    """
    given = [line.partition(" = ")[0] for line in lines[group] if not line.startswith("#")]
    statements = []
    for line in (*lines["pairs"], result):
        used = set() if line.startswith("#") else set(re.findall(r"\w+", line))
        names = [name for name in given if name in used]
        statements += [f"{name} = tl.convert_layout({name}, OF_{group.upper()})" for name in names]
        given = [name for name in given if name not in names]
        statements.append(line)
    return statements[:-1]


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
