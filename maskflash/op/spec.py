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

Backend = Literal["cpu", "triton"]

SCHEMA: Final = (
    "Tensor[] tables, SymInt[] params, SymInt q_offset, Tensor? q_offsets, SymInt kv_offset, Tensor? kv_offsets, "
    "float scale, str expr, int[2] block_size, str backend"
)
"""The fields of a `Spec`, as torch declares the arguments of an op."""


class Spec(NamedTuple):
    """What is attended, and how: the tuple of the op's own arguments, `torch.ops.maskflash.forward(q, k, v, *spec)`.

    Attributes:
        tables: values of the mask's table slots.
        params: values of its number slots; of a float its 64 bits.
        q_offset: added to row numbers, where it is one for all batch rows.
        q_offsets: int tensor (B,), added to the row numbers of each batch row.
        kv_offset: added to column numbers, where it is one for all batch rows.
        kv_offsets: int tensor (B,), added to the column numbers of each batch row.
        scale: positive factor of the scores.
        expr: the mask's canonical text.
        block_size: (bq, bkv), a tile in tokens.
        backend: which kernels run it.
    """

    tables: Sequence[Tensor]
    params: Sequence[int]
    q_offset: int
    q_offsets: Tensor | None
    kv_offset: int
    kv_offsets: Tensor | None
    scale: float
    expr: str
    block_size: Sequence[int]
    backend: Backend

    @classmethod
    def make(
        cls,
        text: str,
        params: Sequence[int],
        tables: Sequence[Tensor],
        q_offset: int | Tensor,
        kv_offset: int | Tensor,
        scale: float,
        block_size: Sequence[int],
        backend: Backend,
    ) -> Spec:
        """A spec of offsets that are either numbers or tensors."""
        q_number, q_tensor = (0, q_offset) if isinstance(q_offset, Tensor) else (q_offset, None)
        kv_number, kv_tensor = (0, kv_offset) if isinstance(kv_offset, Tensor) else (kv_offset, None)
        return cls(tables, params, q_number, q_tensor, kv_number, kv_tensor, scale, text, block_size, backend)

    @classmethod
    def of_problem(cls, problem: Problem, backend: Backend) -> Spec:
        """What a call asks whose mask and sizes are these."""
        return cls.make(
            problem.expr.text,
            problem.expr.coded(problem.inputs.params),
            problem.inputs.tables,
            problem.q_offset,
            problem.kv_offset,
            1.0,
            problem.block_size,
            backend,
        )

    @classmethod
    def from_op(cls, tables: Sequence[Tensor] | None, params: Sequence[int] | None, *rest: Any) -> Spec:
        """The op's arguments as a spec; AOTInductor hands empty lists over as None."""
        return cls(tables or [], params or [], *rest)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in it; None for an offset that is a number."""
        return self.q_offsets, self.kv_offsets, *self.tables

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Spec:
        """The same with these in the places of its `tensors`."""
        q_offsets, kv_offsets, *tables = tensors
        return self._replace(q_offsets=q_offsets, kv_offsets=kv_offsets, tables=cast("list[Tensor]", tables))

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
            q_offset=self.q_offset if self.q_offsets is None else self.q_offsets,
            kv_offset=self.kv_offset if self.kv_offsets is None else self.kv_offsets,
            device=sizes.device,
        )
