"""One call's tensors and mask -> launches of its passes: each with its kernel, its tile and its arguments by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Final

from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import modules, tile_choice
from maskflash.backends.triton.layout import UNIT, dropout_values, padded, score_values
from maskflash.backends.triton.plan import DevicePlan, keep
from maskflash.backends.triton.render import render
from maskflash.backends.triton.score_kind import score_kind
from maskflash.backends.triton.signature import OF_KEYS, PassName, ScoreKind, Specialisation, TableKind, signature
from maskflash.backends.triton.tile_choice import Case
from maskflash.backends.triton.tiles import Tile, candidates, shrunk
from maskflash.errors import BackendError
from maskflash.expr.nodes import parse
from maskflash.ground.eight_bits import FORMAT
from maskflash.scores.strength import Strength

ANY_MASK: Final = parse("const=True:bool~()")  # of kernels that have no mask's expression
NO_MASK: Final = Specialisation(ANY_MASK)  # of those that look at no pair


def specialisation(
    problem: Problem,
    interval: bool,
    narrow: bool,
    dim: int,
    v_dim: int,
    score: ScoreKind | None = None,
    dropout: bool = False,
    paged: bool = False,
    pages_in_8_bits: bool = False,
) -> Specialisation:
    """What the text of a call's kernels depends on, given head dims that are whole vectors."""
    padded_d, padded_dv = dim != padded(dim), v_dim != padded(v_dim)
    if interval:
        special = Specialisation(ANY_MASK, interval=True, padded_d=padded_d, padded_dv=padded_dv)
        return replace(special, score=score, dropout=dropout)
    q_offsets, kv_offset = isinstance(problem.q_offset, Tensor), problem.kv_offset
    kv_offsets = isinstance(kv_offset, Tensor)
    return Specialisation(
        problem.expr,
        tuple(map(TableKind.of, problem.inputs.tables)),
        narrow=narrow,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        negative_kv=isinstance(kv_offset, Tensor) or kv_offset < 0,
        padded_d=padded_d,
        padded_dv=padded_dv,
        score=score,
        dropout=dropout,
        paged=paged,
        pages_in_8_bits=pages_in_8_bits,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """The compiled-when-launched function of a pass, and the names of its arguments in order."""

    function: Any
    names: tuple[str, ...]

    def launch(self, programs: int, tile: Tile, **named: Any) -> None:
        """Launch it with all of its arguments.

        They reach triton in order: by name, it takes 15 us longer to find them (40 arguments).
        """
        assert len(named) == len(self.names), f"beside the kernel's arguments: {named.keys() ^ set(self.names)}"
        values = [named[name] for name in self.names]
        self.function[(programs,)](*values, **tile.options)


@lru_cache(maxsize=1024)
def kernel(special: Specialisation, pass_name: PassName) -> Kernel:
    """The kernel of a pass."""
    function = getattr(modules.load(render(special, pass_name)), pass_name)
    return Kernel(function, tuple(argument.name for line in signature(special, pass_name) for argument in line))


@dataclass(slots=True, eq=False)
class Launches(ABC):
    """What the launches of one call share, whether there is a plan or none.

    Attributes:
        problem: the mask.
        q: (B, Hq, Sq, D) as laid out.
        k: (B, Hkv, Skv, D) as laid out.
        v: (B, Hkv, Skv, Dv) as laid out.
        strength: how strongly pairs attend.
        tuning: measure tiles first, and keep the fastest.
        special: what the text of its kernels depends on.
    """

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    strength: Strength
    tuning: bool = False
    special: Specialisation = field(init=False)
    _of_strength: dict[str, Any] = field(init=False)

    @abstractmethod
    def launch(self, pass_name: PassName, tile: Tile, own: dict[str, Any]) -> None:
        """Launch a pass with its own arguments and a tile."""

    @abstractmethod
    def _keep(self) -> None:
        """Keep for good what a CUDA graph that is being recorded will read."""

    def run(self, pass_name: PassName, own: dict[str, Any]) -> None:
        """Run a pass with the tile that `tile_choice` has for it, or the next smaller one that fits the device.

        Args:
            pass_name: which.
            own: arguments of its kernel, by name, that other passes don't have or have otherwise; see `launch`.
        """
        self._keep()
        case = self.case(pass_name)
        if self.tuning:
            self._tune(case, own)
        tile = wanted = tile_choice.find(case).tile
        while True:
            try:
                self.launch(pass_name, tile, own)
                break
            except Exception as error:
                if not gpu.is_too_large(error):
                    raise
                smaller = shrunk(pass_name, tile, case.dtype)
                if smaller is None:
                    raise BackendError(
                        f"the triton backend: no tile of {pass_name} fits this device: {error}"
                    ) from error
                tile = smaller
        if tile != wanted:
            tile_choice.remember(case, tile)

    def case(self, pass_name: PassName) -> Case:
        """What the tile of a pass is chosen for."""
        dims = self.q.shape[3], self.v.shape[3]
        special = self.special
        of_pairs = 0 if special.score is None else special.score.of_pairs
        kind = self.q.device, pass_name, self.q.dtype, dims, self.problem.block_size
        products = gpu.precision(self.q.dtype, self.strength.precision)
        return Case(*kind, special.mask, special.strength, of_pairs, products)

    def _tune(self, case: Case, own: dict[str, Any]) -> None:
        """Time the listed tile and its neighbours on this call, and keep the fastest for this device."""
        rows, columns = case.block_size
        seconds: dict[Tile, float] = {}
        for tile in candidates(tile_choice.listed(case), case.dtype):
            if rows % tile.block_m == 0 and columns % tile.block_n == 0:
                try:
                    seconds[tile] = gpu.seconds(partial(self.launch, case.pass_name, tile, own), case.device)
                except Exception as error:
                    if not gpu.is_too_large(error):
                        raise
        if seconds:
            tile_choice.keep(case, min(seconds, key=lambda tile: seconds[tile]))


@dataclass(slots=True, eq=False)
class Launcher(Launches):
    """Launches of passes that walk the tiles of a plan.

    Attributes:
        plan: of the mask.
    """

    plan: DevicePlan = field(kw_only=True)

    def __post_init__(self) -> None:
        interval, dims = self.plan.intervals is not None, (self.q.shape[3], self.v.shape[3])
        score, dropout = self.strength.score, self.strength.dropout
        sizes = {"b": (0, self.q.shape[0] - 1), "h": (0, self.q.shape[1] - 1)}
        kind = None if score is None else score_kind(score, {**self.plan.extents, **sizes})
        special = specialisation(self.problem, interval, self.plan.narrow, *dims, kind, dropout is not None)
        self.special = replace(special, products_in_8_bits=self.q.dtype == FORMAT)
        self._of_strength = {} if score is None else score_values(score)
        if dropout is not None:
            batch, heads, q_len, _ = self.q.shape
            self._of_strength |= dropout_values(dropout, batch, heads, q_len, self.v.shape[2])

    def launch(self, pass_name: PassName, tile: Tile, own: dict[str, Any]) -> None:
        """Launch a pass's kernel with its own arguments, the mask's, its walks, the sizes of the call and a tile."""
        (batch, heads, q_len, dim), (_, kv_heads, kv_len, v_dim) = self.q.shape, self.v.shape
        rows, columns = self.problem.block_size
        transposed = pass_name in OF_KEYS
        if transposed:
            tiles, per_line, steps = -(-kv_len // tile.block_n), columns // tile.block_n, rows // tile.block_m
        else:
            tiles, per_line, steps = -(-q_len // tile.block_m), rows // tile.block_m, columns // tile.block_n
        own_batch, own_heads, *_ = self.problem.shape
        with gpu.current(self.q.device):
            kernel(self._special(pass_name), pass_name).launch(
                tiles * batch * heads // own.get("part", 1),
                tile,
                **(_described(own, pass_name, tile) if tile.consumers else own),
                **self.plan.mask(self.problem),
                **self._of_strength,
                **self.plan.walked(transposed, tiles, per_line),
                **{"tiles_n" if transposed else "tiles_m": tiles},
                map_b=own_heads if own_batch > 1 else 0,
                map_h=1 if own_heads > 1 else 0,
                batch=batch,
                heads=heads,
                group=heads // kv_heads,
                q_len=q_len,
                kv_len=kv_len,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                ROWS=per_line,
                SUB=steps,
                BLOCK_D=padded(dim),
                BLOCK_DV=padded(v_dim),
                **self._constants(pass_name, tile),
            )

    def _constants(self, pass_name: PassName, tile: Tile) -> dict[str, Any]:
        """What kernels whose warps have roles are told, and the others; tensor maps have head dims in them."""
        dims = {"D": self.q.shape[3], "DV": self.v.shape[3]}
        if tile.consumers:
            stored = dims if pass_name == "hopper_dkdv" else {}
            return {"STAGES": tile.stages, "REGISTERS": tile.registers, **stored}
        return {"UNIT": UNIT, **dims, "PRECISION": gpu.precision(self.q.dtype, self.strength.precision)}

    def _special(self, pass_name: PassName) -> Specialisation:
        """What the text of one pass depends on: the tables that learn are the business of `dtables` alone."""
        score = self.special.score
        if score is None or pass_name != "dtables":
            return self.special
        assert self.strength.score is not None, "what the kind is of"
        return replace(self.special, score=replace(score, wanted=self.strength.score.wanted))

    def _keep(self) -> None:
        keep(self.plan, self.problem, self.strength)


def _described(own: dict[str, Any], pass_name: PassName, tile: Tile) -> dict[str, Any]:
    """Arguments with tensor maps in place of tensors, by what a tile copies of them at once."""
    return {
        name: gpu.descriptor(value, copied_rows(name, pass_name, tile), padded(value.shape[3]))
        if name.endswith("_desc")
        else value
        for name, value in own.items()
    }


def copied_rows(name: str, pass_name: PassName, tile: Tile) -> int:
    """How many tokens of a tensor a kernel of Hopper's own copies at once: those of a step, or those of a consumer."""
    of_keys = name in ("k_desc", "v_desc")
    side = tile.block_n if of_keys else tile.block_m
    return side // tile.consumers if of_keys == (pass_name in OF_KEYS) else side
