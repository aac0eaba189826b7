"""How strongly a visible pair attends: all of a call that is no mask, as backends are given it beside their plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from maskflash.errors import BackendError
from maskflash.expr.derivative import Derivatives, differentiate
from maskflash.expr.evaluate import Inputs
from maskflash.expr.nodes import Expr
from maskflash.scores.form import Form, form_of

Kernels = Literal["auto", "portable", "hopper"]
Precision = Literal["full", "tf32x3", "fp8"]


@dataclass(frozen=True, slots=True, eq=False)
class BoundScore:
    """A score function in one call: what a pair's scaled product becomes.

    The score itself is float32, float64 for float64 q, k and v; the value has the same dtype. Its look-ups are inside
    their tables wherever the mask shows the pair; elsewhere they may be anywhere. A value of -inf hides a pair.

    Attributes:
        expr: the program; `score` is its leaf for the product.
        inputs: the values of its slots. Tables may have any strides (0 too), and be of any floating or integer dtype.
        wanted: for each table, whether its gradient is asked for.
        q_offset: added to row numbers, an int or an int tensor (B,).
        kv_offset: added to column numbers, likewise.
    """

    expr: Expr
    inputs: Inputs
    wanted: tuple[bool, ...]
    q_offset: int | Tensor = 0
    kv_offset: int | Tensor = 0

    @property
    def form(self) -> Form:
        """Its class."""
        return form_of(self.expr)

    @property
    def derivatives(self) -> Derivatives:
        """The program with its derivatives."""
        return differentiate(self.expr)


@dataclass(frozen=True, slots=True, eq=False)
class Dropout:
    """Which probabilities are dropped: see `scores/dropout.py`.

    Attributes:
        p: the probability of being dropped, 0 < p < 1.
        seed: int64, on the device of the call: (1,), or (3,) with the first batch row and head of a part of a call; or
            (3 + Sq + Skv,) with where all its rows and columns are too, and then no offset counts.
        q_offset: as of a score.
        kv_offset: as of a score.
    """

    p: float
    seed: Tensor
    q_offset: int | Tensor = 0
    kv_offset: int | Tensor = 0


@dataclass(frozen=True, slots=True, eq=False)
class Strength:
    """How strongly visible pairs attend, and how that is computed on a GPU.

    Attributes:
        scale: positive factor of the products of q and k.
        sinks: (Hq,), see `backends/sinks.py`; None for none.
        score: what becomes of a scaled product; None where it stays what it is.
        dropout: None where all probabilities are kept.
        kernels: which of a GPU's kernels run, as asked for.
        precision: of products: that of q, k and v; "tf32x3", of all; or "fp8", of forward's.
    """

    scale: float
    sinks: Tensor | None = None
    score: BoundScore | None = None
    dropout: Dropout | None = None
    kernels: Kernels = "auto"
    precision: Precision = "full"


class Gradients(NamedTuple):
    """What a backend's backward gives.

    Attributes:
        q: (B, Hq, Sq, D), like q.
        k: likewise.
        v: likewise.
        sinks: None where there are none.
        tables: of those of the score's tables that want one, in order, each like its table (dense).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    tables: tuple[Tensor, ...] = ()


def check_wishes(backend: str, kernels: Kernels, precision: Precision) -> None:
    """Check that a backend has what was asked for.

    Raises:
        BackendError: a GPU's kernels alone have it.
    """
    for name, value, usual in (("precision", precision, "full"), ("kernels", kernels, "auto")):
        if backend != "triton" and value not in (usual, "portable"):
            raise BackendError(
                f'attention: {name} is "{value}", which the triton backend alone has; this call runs on the '
                f"{backend} backend: leave it out here"
            )
