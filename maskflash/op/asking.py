"""A mask, a score function, and how to run them -> the spec of each call, its arguments checked and bound."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple, Self

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.errors import BackendError
from maskflash.expr.evaluate import Inputs
from maskflash.functions.sizes import Sizes
from maskflash.functions.slots import Slots
from maskflash.ground import arguments, qkv
from maskflash.masks.mask import Mask
from maskflash.masks.sight import Sight
from maskflash.op import checking
from maskflash.op.spec import ENGINES, UNSCORED, Backend, Scored, Spec
from maskflash.scores.lifting import has_holes, left_of, left_with_holes
from maskflash.scores.score import Score, own_arguments
from maskflash.scores.seeds import probability, seed_of
from maskflash.scores.strength import BoundScore, Kernels, Precision, check_wishes

BackendChoice = Literal["auto", "cpu", "triton", "flex", "cudnn", "fa4", "magi", "flashinfer"]

_BACKENDS: Final[dict[str, Backend]] = {"cpu": "cpu", "cuda": "triton"}  # by device, for "auto"


class Dropped(NamedTuple):
    """The dropout of a call: its probability, and its seed where there is any."""

    p: float = 0.0
    seed: Tensor | None = None


KEPT: Final = Dropped()


def asks_for_dropout(p: Any, generator: Any, seed: Any) -> bool:
    """Whether a call says anything of dropout but that there is none; nothing is checked yet."""
    return not (generator is None and seed is None and isinstance(p, int | float) and p == 0)


def dropout_of(operation: str, p: Any, generator: Any, seed: Any, device: torch.device) -> Dropped:
    """What a caller says of dropout, checked; a seed is drawn only where something is dropped."""
    p = probability(operation, p)
    if seed is None and p == 0:
        return KEPT
    found = seed_of(operation, seed, generator, device)
    return Dropped(p, found) if p else KEPT


class Asking:
    """What all parts of an attention op share: what was compiled, and what a call with it asks for.

    Attributes:
        mask: which pairs may attend; where a score function hides pairs, joined with those that it leaves.
        given: the mask as it was given.
        name: its name.
        score: how strongly they attend; None for the scaled products themselves.
        scale: factor of the scores; None for 1/sqrt(D).
        block_size: (bq, bkv), a tile in tokens.
        backend: as asked for.
        deterministic: same inputs, same bits. Both backends always are.
        tune: measure tiles at the first call of a kind (triton only).
        check: read every table at every call, to find writes that torch doesn't see.
        splits: as asked for, 0 for "auto".
        kernels: which of a GPU's kernels run, as asked for.
        precision: of products on a GPU, as asked for.
    """

    def __init__(
        self,
        mask: Mask,
        scale: float | None,
        block_size: tuple[int, int],
        backend: BackendChoice,
        deterministic: bool,
        tune: bool = False,
        check: bool = False,
        score: Score | None = None,
        splits: int = 0,
        kernels: Kernels = "auto",
        precision: Precision = "full",
    ) -> None:
        self.given = mask
        self.score = score
        if score is not None:
            self._with_holes = mask.pair(left_with_holes, score)
            mask = mask.pair(left_of, score)
        self.mask = mask
        self.scale = scale
        self.block_size = block_size
        self.backend = backend
        self.deterministic = deterministic
        self.tune = tune
        self.check: bool = check or checking.ALWAYS
        self.splits = splits
        self.kernels = kernels
        self.precision = precision

    @property
    def name(self) -> str:
        """The mask's, which no call reads: a graph would guard it."""
        return self.given.name

    def _as_asked(self, mask: Mask, score: Score | None) -> Self:
        """An op of another mask and score function, with all else as it was asked for here."""
        how = self.scale, self.block_size, self.backend, self.deterministic, self.tune, self.check
        return type(self)(mask, *how, score, self.splits, self.kernels, self.precision)

    def _sizes(self, q: Tensor, k: Tensor, q_offset: int | Tensor, kv_offset: int | Tensor) -> Sizes:
        """The sizes of a call; its tensors are checked already, its offsets here."""
        batch = q.shape[0]
        rows = arguments.offset("attention", "q_offset", q_offset, batch)
        return Sizes.of(q, k, rows, arguments.offset("attention", "kv_offset", kv_offset, batch))

    def _spec(
        self,
        sizes: Sizes,
        q: Tensor,
        sinks: Tensor | None,
        mask_args: dict[str, Any],
        stamp: int | None = None,
        dropout: Dropped = KEPT,
        *,
        check: bool = False,
    ) -> Spec:
        """What a call asks for, its arguments checked and bound."""
        backend = self._backend_for(sizes.device)
        check_wishes(backend, self.kernels, self.precision)
        scored = self._scored(sizes, q.dtype, mask_args)
        mask = self._with_holes if has_holes(scored.tables) else self.mask
        slots, params, tables = self._bound(mask, sizes, mask_args, stamp)
        if check:
            self._check(slots, tables, sizes)
        scale = int(q.shape[3]) ** -0.5 if self.scale is None else self.scale
        offsets = sizes.q_offset, sizes.kv_offset
        return Spec.make(
            *(slots.text, params, tables, *offsets, sinks, scale, self.block_size, backend, scored),
            seed=dropout.seed,
            dropout_p=0.0 if dropout.seed is None else dropout.p,  # a float of a module is an input to dynamo
            splits=self.splits,
            kernels=self.kernels,
            precision=self.precision,
        )

    def _refuse(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> None:
        """Check that 8-bit products, or the engine of another library, can do all of a call, where asked for."""
        if spec.precision == "fp8":
            from maskflash.backends.triton import fp8

            fp8.check(q, k, v, self.block_size)
        if spec.backend not in ENGINES:
            return
        from maskflash.engines import named
        from maskflash.engines.engine import Asked

        learning = torch.is_grad_enabled()
        call = Asked(
            *(q.device, q.dtype, q.shape[3], v.shape[3]),
            gradients=learning and (q.requires_grad or k.requires_grad or v.requires_grad),
            lse=lse,
            score=bool(spec.score),
            learned=any(spec.learned),
            sinks=spec.sinks is not None,
            dropout=spec.seed is not None,
            deterministic=self.deterministic,
        )
        named.ENGINES[spec.backend].refuse(call)

    def _scored(self, sizes: Sizes, dtype: torch.dtype, mask_args: dict[str, Any]) -> Scored:
        """The score function in a call, as specs have it."""
        if self.score is None:
            return UNSCORED
        slots, params, tables = self.score.at(dtype).bind(sizes, own_arguments(self.score, mask_args))
        if slots.expr.is_score:
            return UNSCORED
        qkv.same_device(sizes.device, [*zip(slots.names, tables, strict=True)])
        learning = torch.is_grad_enabled()
        return Scored(slots.text, params, tables, [learning and table.requires_grad for table in tables])

    def _score_in(self, sizes: Sizes, dtype: torch.dtype, mask_args: dict[str, Any]) -> BoundScore | None:
        """The same with the user's own lines; None where there is none."""
        scored = self._scored(sizes, dtype, mask_args)
        if self.score is None or not scored.text:
            return None
        expr = self.score.at(dtype).bind(sizes, own_arguments(self.score, mask_args)).slots.expr
        inputs = Inputs(expr.decoded(scored.params), tuple(scored.tables))
        return BoundScore(expr, inputs, tuple(scored.learned), sizes.q_offset, sizes.kv_offset)

    def _bound(
        self, mask: Mask, sizes: Sizes, mask_args: dict[str, Any], stamp: int | None = None
    ) -> tuple[Slots, list[int], list[Tensor]]:
        """A mask's expression, and its numbers and tables in a call."""
        slots, params, tables = mask.bind(sizes, mask_args, stamp)
        named = [*zip(slots.names, tables, strict=True), *sizes.offset_tensors]
        if named:
            qkv.same_device(sizes.device, named)
        return slots, params, tables

    def _check(self, slots: Slots, tables: list[Tensor], sizes: Sizes) -> None:
        """See `checking.check`."""
        if not torch.compiler.is_compiling():
            checking.check("attention", [*zip(slots.names, tables, strict=True), *sizes.offset_tensors])
        elif not checking.ALWAYS:
            torch._dynamo.graph_break(
                "attention: check=True looks at tables in Python, which torch.compile can't take in; set "
                "MASKFLASH_CHECK=1, with which compiled graphs check too"
            )

    def _problem(self, sizes: Sizes, mask_args: dict[str, Any]) -> Problem:
        """The mask at the sizes of a call, with the user's own lines."""
        self._bound(self.mask, sizes, mask_args)
        return Sight.of(self.mask, sizes, mask_args).tiled(self.block_size)

    def _backend_for(self, device: torch.device) -> Backend:
        chosen = _BACKENDS.get(device.type) if self.backend == "auto" else self.backend
        if chosen in ENGINES:
            from maskflash.engines import named

            problem = named.unavailable(chosen, device)
            if problem is not None:
                raise BackendError(f"attention: the {chosen} engine can't run here: {problem}")
            return chosen
        if chosen is None or (chosen == "cpu" and device.type != "cpu"):
            raise BackendError(
                f"attention: tensors are on {device.type}, expected "
                f"{'cpu' if chosen else ' or '.join(_BACKENDS)}; move q, k and v"
            )
        if chosen == "triton":
            from maskflash.backends.triton import run as triton

            problem = triton.unavailable(device)
            if problem is not None:
                raise BackendError(f"attention: the triton backend can't run here: {problem}")
        return chosen
