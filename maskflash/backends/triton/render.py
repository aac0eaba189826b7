"""A template and a specialisation -> the source of a Python module that holds one Triton kernel."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from maskflash.backends.triton.emit import emit
from maskflash.backends.triton.emit_score import emit_score
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
        integer="tl.int32" if special.narrow else "tl.int64",
        mask=emit_few(special.expr, special.tables, **how)
        if few
        else emit(special.expr, special.tables, transposed=transposed, **how),
        score=emit_score(special.score, **score) if special.score else None,
    )


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
