"""All of a call but q, k and v <-> the flat arguments that the op's schema has of it.

Nothing in it is of this process: the mask is its canonical text, its numbers and its tables. So a graph that recorded
the op runs elsewhere, and lengths and numbers may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, cast

from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.expr.evaluate import Inputs
from maskflash.functions.sizes import Sizes
from maskflash.functions.slots import expression
from maskflash.scores.strength import BoundScore, Dropout, Kernels, Precision, Strength

Backend = Literal["cpu", "triton", "flex", "cudnn", "fa4", "magi", "flashinfer"]
ENGINES: Final[tuple[Backend, ...]] = (
    "flex",
    "cudnn",
    "fa4",
    "magi",
    "flashinfer",
)  # of other libraries, by name alone

SCHEMA: Final = (
    "Tensor[] tables, SymInt[] params, SymInt q_offset, Tensor? q_offsets, SymInt kv_offset, Tensor? kv_offsets, "
    "Tensor? sinks, Tensor[] score_tables, SymInt[] score_params, str score, bool[] learned, Tensor? seed, "
    "float dropout_p, float scale, str expr, int[2] block_size, int splits, str kernels, "
    "str precision, str backend"
)
"""The fields of a `Spec`, as torch declares the arguments of an op."""


_LISTS: Final = ("score_tables", "score_params", "learned")


class Scored(NamedTuple):
    """A score function in a call, as a spec has it: see there."""

    text: str
    params: Sequence[int]
    tables: Sequence[Tensor]
    learned: Sequence[bool]


UNSCORED: Final = Scored("", [], [], [])


class Spec(NamedTuple):
    """What is attended, and how: the tuple of the op's own arguments, `torch.ops.maskflash.forward(q, k, v, *spec)`.

    Attributes:
        tables: values of the mask's table slots.
        params: values of its number slots; of a float its 64 bits.
        q_offset: added to row numbers, where it is one for all batch rows.
        q_offsets: int tensor (B,), added to the row numbers of each batch row.
        kv_offset: added to column numbers, where it is one for all batch rows.
        kv_offsets: int tensor (B,), added to the column numbers of each batch row.
        sinks: (Hq,), one more term in the softmax of each head; None for none.
        score_tables: values of the score function's table slots.
        score_params: values of its number slots; of a float its 64 bits.
        score: its canonical text; "" for none.
        learned: for each of its tables, whether its gradient is asked for.
        seed: int64 (1,) or longer, see `Dropout`; None for no dropout.
        dropout_p: probability of being dropped.
        scale: positive factor of the scores.
        expr: the mask's canonical text.
        block_size: (bq, bkv), a tile in tokens.
        splits: pieces that few rows' keys are cut into on a GPU; 0 for as many as the device has work for.
        kernels: which of a GPU's kernels run.
        precision: of products on a GPU, as asked for.
        backend: what runs it.
    """

    tables: Sequence[Tensor]
    params: Sequence[int]
    q_offset: int
    q_offsets: Tensor | None
    kv_offset: int
    kv_offsets: Tensor | None
    sinks: Tensor | None
    score_tables: Sequence[Tensor]
    score_params: Sequence[int]
    score: str
    learned: Sequence[bool]
    seed: Tensor | None
    dropout_p: float
    scale: float
    expr: str
    block_size: Sequence[int]
    splits: int
    kernels: Kernels
    precision: Precision
    backend: Backend

    @classmethod
    def make(
        cls,
        text: str,
        params: Sequence[int],
        tables: Sequence[Tensor],
        q_offset: int | Tensor,
        kv_offset: int | Tensor,
        sinks: Tensor | None,
        scale: float,
        block_size: Sequence[int],
        backend: Backend,
        score: Scored = UNSCORED,
        seed: Tensor | None = None,
        dropout_p: float = 0.0,
        splits: int = 0,
        kernels: Kernels = "auto",
        precision: Precision = "full",
    ) -> Spec:
        """A spec of offsets that are either numbers or tensors."""
        q_number, q_tensor = (0, q_offset) if isinstance(q_offset, Tensor) else (q_offset, None)
        kv_number, kv_tensor = (0, kv_offset) if isinstance(kv_offset, Tensor) else (kv_offset, None)
        return cls(
            *(tables, params, q_number, q_tensor, kv_number, kv_tensor, sinks),
            *(score.tables, score.params, score.text, score.learned, seed, dropout_p),
            *(scale, text, block_size, splits),
            *(kernels, precision, backend),
        )

    @classmethod
    def of_problem(cls, problem: Problem, backend: Backend) -> Spec:
        """What a call asks whose mask and sizes are these."""
        return cls.make(
            problem.expr.text,
            problem.expr.coded(problem.inputs.params),
            problem.inputs.tables,
            problem.q_offset,
            problem.kv_offset,
            None,
            1.0,
            problem.block_size,
            backend,
        )

    @classmethod
    def from_op(cls, tables: Sequence[Tensor] | None, params: Sequence[int] | None, *rest: Any) -> Spec:
        """The op's arguments as a spec; AOTInductor hands empty lists over as None."""
        spec = cls(tables or [], params or [], *rest)
        if spec.score_tables is None or spec.score_params is None or spec.learned is None:
            empty: dict[str, Any] = {name: getattr(spec, name) or [] for name in _LISTS}
            spec = spec._replace(**empty)
        return spec

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in it; None for an offset that is a number, and for no sinks and no seed."""
        return self.sinks, *self.score_tables, self.seed, *self.of_mask

    @property
    def of_mask(self) -> tuple[Tensor | None, ...]:
        """Those of them that say which pairs attend."""
        return self.q_offsets, self.kv_offsets, *self.tables

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Spec:
        """The same with these in the places of its `tensors`."""
        sinks, *rest = tensors
        scored, others = rest[: len(self.score_tables)], rest[len(self.score_tables) :]
        seed, q_offsets, kv_offsets, *tables = others
        return self._replace(
            sinks=sinks,
            score_tables=cast("list[Tensor]", scored),
            seed=seed,
            q_offsets=q_offsets,
            kv_offsets=kv_offsets,
            tables=cast("list[Tensor]", tables),
        )

    @property
    def strength(self) -> Strength:
        """How strongly visible pairs attend."""
        if not self.score and self.seed is None:
            return Strength(self.scale, self.sinks, kernels=self.kernels, precision=self.precision)
        score, dropout, offsets = None, None, self._offsets
        if self.score:
            expr = expression(self.score)
            inputs = Inputs(expr.decoded(self.score_params), tuple(self.score_tables))
            score = BoundScore(expr, inputs, tuple(self.learned), *offsets)
        if self.seed is not None:
            dropout = Dropout(self.dropout_p, self.seed, *offsets)
        return Strength(self.scale, self.sinks, score, dropout, self.kernels, self.precision)

    @property
    def _offsets(self) -> tuple[int | Tensor, int | Tensor]:
        return (
            self.q_offset if self.q_offsets is None else self.q_offsets,
            self.kv_offset if self.kv_offsets is None else self.kv_offsets,
        )

    def problem(self, sizes: Sizes) -> Problem:
        """The mask of a call of these sizes (offsets are in the spec), ready to be analysed."""
        expr = expression(self.expr)
        rows, columns = self.block_size
        return Problem(
            expr=expr,
            inputs=Inputs(expr.decoded(self.params), tuple(self.tables)),
            q_len=sizes.q_len,
            kv_len=sizes.kv_len,
            batch=sizes.batch,
            heads=sizes.heads,
            block_size=(rows, columns),
            q_offset=self._offsets[0],
            kv_offset=self._offsets[1],
            device=sizes.device,
        )
