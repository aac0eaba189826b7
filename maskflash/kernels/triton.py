"""Turns a Plan and q, k, v into attention on an NVIDIA GPU: renders the kernels a mask needs and launches them.

The only module that imports triton, and only when it is first needed. Under TRITON_INTERPRET=1 the same kernels run on
CPU tensors, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from maskflash.blocks.block_map import BlockMap
from maskflash.blocks.classify import Classified
from maskflash.blocks.problem import Problem
from maskflash.codegen import module_cache, tuned
from maskflash.codegen.render import PassName, Specialisation, render, table_kind
from maskflash.codegen.tuning import DELTA, Tile, choose, shrunk
from maskflash.errors import BackendError
from maskflash.expr.nodes import parse
from maskflash.kernels.triton_work import Work, seen, work

_LOG2E: Final = 1.4426950408889634
_NO_MASK: Final = parse("const=True:bool~()")  # delta looks at no pair
_UNIT: Final = 8  # elements: strides that are multiples of it let the compiler load whole vectors
_LARGEST_STEP: Final = 2**23  # elements from token to token


@dataclass(slots=True, eq=False)
class Plan:
    """What the kernels need of a mask at given lengths; reusable across calls, dtypes and head dims.

    Attributes:
        block_map: the tiles.
        narrow: the mask's integers fit 32 bits.
        rows: the map's rows, for forward and dQ.
        columns: the map's columns, for dK and dV.
    """

    block_map: BlockMap
    narrow: bool
    rows: Work
    columns: Work
    _orders: dict[tuple[bool, int, int], Tensor] = field(default_factory=dict)
    _tiles: dict[tuple[PassName, torch.dtype, int], Tile] = field(default_factory=dict)
    _seen: dict[bool, Tensor | None] = field(default_factory=dict)

    def order(self, transposed: bool, tiles: int, per_line: int) -> Tensor:
        """The kernel's row tiles (or column tiles), those with most work first."""
        key = transposed, tiles, per_line
        if key not in self._orders:
            self._orders[key] = (self.columns if transposed else self.rows).order(tiles, per_line)
        return self._orders[key]

    def seen(self, problem: Problem, *, rows: bool) -> Tensor | None:
        """Which rows see something, or which columns are seen; None where all are. See `triton_work.seen`."""
        if rows not in self._seen:
            self._seen[rows] = seen(problem, self.block_map, rows=rows)
        return self._seen[rows]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return self.rows.nbytes + self.columns.nbytes + sum(x.nbytes for x in self._orders.values())


def plan(classified: Classified) -> Plan:
    """Prepare a block map for the kernels."""
    block_map = classified.block_map
    _, _, n_q, n_kv = block_map.shape
    (bq, bkv), (q_len, kv_len) = block_map.block_size, (block_map.q_len, block_map.kv_len)
    return Plan(
        block_map,
        classified.largest < 2**31,
        work(block_map.rows, n_q, n_kv, kv_len % bkv != 0),
        work(block_map.columns, n_kv, n_q, q_len % bq != 0),
    )


def unavailable(device: torch.device) -> str | None:
    """Why this backend can't serve tensors on a device, with the fix; None where it can."""
    try:
        triton = _triton()
    except ImportError:
        return "triton is not installed; `pip install triton` (Linux only)"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"its kernels run on CUDA tensors, got {device.type}; move q, k and v"
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs, got an AMD one"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 (Ampere) or later, got {capability[0]}.{capability[1]}"
    return None


def source(problem: Problem, classified: Classified, head_dim: int, v_head_dim: int, pass_name: PassName) -> str:
    """The text of the kernel that a call with these head dims runs."""
    return render(_specialisation(problem, classified.largest < 2**31, head_dim, v_head_dim), pass_name)


def tune(plan: Plan, problem: Problem, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Measure which tiles are fastest for calls like this one, unless that is known; later calls use them.

    Takes some seconds for each pass: every candidate is compiled. Choices are kept beside the cached kernels.
    """
    call = _Call(plan, problem, q, v.shape[3], 1)
    if tuned.find(call._key("forward")) is None:
        out, lse = forward(plan, problem, q, k, v, scale, tuning=True)
        backward(plan, problem, out, None, q, k, v, out, lse, scale, tuning=True)


def forward(
    plan: Plan, problem: Problem, q: Tensor, k: Tensor, v: Tensor, scale: float, *, tuning: bool = False
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention.

    Args:
        plan: of the mask's block map.
        problem: the mask itself, for the partial tiles.
        q: (B, Hq, Sq, D) float32, bfloat16 or float16, any strides.
        k: (B, Hkv, Skv, D), Hkv divides Hq.
        v: (B, Hkv, Skv, Dv).
        scale: positive factor of the scores.
        tuning: measure tiles first, and keep the fastest.

    Returns:
        out: (B, Hq, Sq, Dv) in q's dtype. lse: (B, Hq, Sq) float32, natural logarithm; -inf, and out 0, for rows that
        see nothing.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty((batch, heads, q_len, v_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or kv_len == 0:
        return out.zero_(), lse.fill_(-math.inf)
    k, v = _without_hidden(plan.seen(problem, rows=False), k, v)
    unit, (q, k, v) = _laid_out(q, k, v)
    call = _Call(plan, problem, q, v_dim, unit)
    group = heads // kv_heads
    share = _heads_in_cache(q, kv_len * (dim + v_dim) * q.element_size(), group, batch * heads)
    numbers = [scale * _LOG2E, batch, heads, group, share, q_len, kv_len]

    def launch(tile: Tile) -> None:
        tiles = -(-q_len // tile.block_m)
        call.launch(
            "forward",
            tile,
            tiles * batch * heads,
            [q, k, v, out, lse, *_strides(unit, q, k, v, out)],
            [*call.walks("forward", tile, tiles), *numbers, tiles],
        )

    if tuning:
        call.tune("forward", launch)
    call.fitted("forward", launch)
    return out, lse


def backward(
    plan: Plan,
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    tuning: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        plan: as in forward.
        problem: as in forward.
        dout: (B, Hq, Sq, Dv), gradient of out.
        dlse: (B, Hq, Sq), gradient of lse, or None for zero.
        q: as in forward.
        k: as in forward.
        v: as in forward.
        out: forward's result.
        lse: forward's result.
        scale: positive factor of the scores.
        tuning: measure tiles first, and keep the fastest.

    Returns:
        dq, dk, dv, shaped and typed like q, k, v. No atomics: the same inputs give the same bits.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if min(q.numel(), k.numel()) == 0:
        return dq.zero_(), torch.zeros_like(k), torch.zeros_like(v)
    k, v = _without_hidden(plan.seen(problem, rows=False), k, v)
    q, dout = _without_hidden(plan.seen(problem, rows=True), q, dout)
    blind = lse == -math.inf
    lse = lse.masked_fill(blind, math.inf)  # so that p = exp(s - lse) is 0
    dlse = None if dlse is None else dlse.masked_fill(blind, 0.0)
    unit, (q, k, v, dout, out) = _laid_out(q, k, v, dout, out)
    call = _Call(plan, problem, q, v_dim, unit)
    group = heads // kv_heads
    delta = _delta(call, out, dout, dlse)
    part = _part(q, group, batch * kv_heads * -(-kv_len // 128))
    parts = group // part
    partial_dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = (
        torch.empty((parts, batch, kv_heads, kv_len, n), dtype=partial_dtype, device=q.device) for n in (dim, v_dim)
    )
    size = (dim + v_dim) * q.element_size()
    share_q = _heads_in_cache(q, kv_len * size, group, batch * heads)
    share_kv = _heads_in_cache(q, q_len * size * part, 1, batch * heads // part)
    scales = [scale, scale * _LOG2E, batch, heads, group]

    def launch_dq(tile: Tile) -> None:
        tiles = -(-q_len // tile.block_m)
        call.launch(
            "dq",
            tile,
            tiles * batch * heads,
            [q, k, v, dout, lse, delta, dq, *_strides(unit, q, k, v, dout, dq)],
            [*call.walks("dq", tile, tiles), *scales, share_q, q_len, kv_len, tiles],
        )

    def launch_dkdv(tile: Tile) -> None:
        tiles = -(-kv_len // tile.block_n)
        call.launch(
            "dkdv",
            tile,
            tiles * batch * heads // part,
            [q, k, v, dout, lse, delta, dk, dv, *_strides(unit, q, k, v, dout)],
            [*call.walks("dkdv", tile, tiles), *scales, part, share_kv, q_len, kv_len, tiles],
        )

    passes: dict[PassName, Callable[[Tile], None]] = {"dkdv": launch_dkdv, "dq": launch_dq}
    for pass_name, launch in passes.items():
        if tuning:
            call.tune(pass_name, launch)
        call.fitted(pass_name, launch)
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


@dataclass(slots=True, eq=False)
class _Call:
    """What the launches of one call share."""

    plan: Plan
    problem: Problem
    q: Tensor
    v_dim: int
    unit: int

    def fitted(self, pass_name: PassName, launch: Callable[[Tile], None]) -> None:
        """Launch with the tile measured or listed for this device, or the next smaller one that fits it."""
        tile = self.plan._tiles.get(self._place(pass_name))
        if tile is None:
            tile = tuned.find(self._key(pass_name)) or self._listed(pass_name)
        while True:
            try:
                launch(tile)
            except _triton().runtime.errors.OutOfResources as error:
                smaller = shrunk(tile)
                if smaller is None:
                    raise BackendError(
                        f"the triton backend: no tile of {pass_name} fits this device: {error}"
                    ) from error
                tile = smaller
            else:
                self.plan._tiles[self._place(pass_name)] = tile
                return

    def tune(self, pass_name: PassName, launch: Callable[[Tile], None]) -> None:
        """Time the listed tile and its neighbours on this call, and keep the fastest for this device."""
        rows, columns = self.problem.block_size
        seconds: dict[Tile, float] = {}
        for tile in tuned.candidates(self._listed(pass_name)):
            if rows % tile.block_m == 0 and columns % tile.block_n == 0:
                with contextlib.suppress(_triton().runtime.errors.OutOfResources):
                    seconds[tile] = _seconds(partial(launch, tile), self.q.device)
        if seconds:
            best = min(seconds, key=lambda tile: seconds[tile])
            tuned.keep(self._key(pass_name), best)
            self.plan._tiles[self._place(pass_name)] = best

    def _listed(self, pass_name: PassName) -> Tile:
        device, sizes = self.q.device, self.problem.block_size
        return choose(_arch(device), pass_name, self.q.dtype, self._dims(), sizes, _shared_limit(device))

    def _dims(self) -> int:
        return max(_power_of_two(self.q.shape[3]), _power_of_two(self.v_dim))

    def _place(self, pass_name: PassName) -> tuple[PassName, torch.dtype, int]:
        return pass_name, self.q.dtype, self._dims()

    def _key(self, pass_name: PassName) -> tuple[str, ...]:
        """What a measured tile holds for: see `tuned`."""
        device = torch.cuda.get_device_name(self.q.device) if self.q.device.type == "cuda" else self.q.device.type
        dims, sizes = (self.q.shape[3], self.v_dim), self.problem.block_size
        return (
            device,
            _triton().__version__,
            pass_name,
            str(self.q.dtype),
            str(dims),
            str(sizes),
            self.problem.expr.text,
        )

    def walks(self, pass_name: PassName, tile: Tile, tiles: int) -> list[Tensor]:
        """The order of the kernel's tiles, then the full and the partial walk."""
        transposed = pass_name == "dkdv"
        own, size = (
            (tile.block_n, self.problem.block_size[1]) if transposed else (tile.block_m, self.problem.block_size[0])
        )
        direction = self.plan.columns if transposed else self.plan.rows
        order = self.plan.order(transposed, tiles, size // own)
        full, partial = direction.full, direction.partial
        return [order, *(x for w in (full, partial) for x in (w.offsets, w.tiles, w.start, w.stop))]

    def launch(self, pass_name: PassName, tile: Tile, programs: int, tensors: list[Any], rest: list[Any]) -> None:
        problem, dim = self.problem, self.q.shape[3]
        special = _specialisation(problem, self.plan.narrow, dim, self.v_dim)
        kernel = _kernel(special, pass_name)
        offset = problem.q_offset.contiguous() if isinstance(problem.q_offset, Tensor) else problem.q_offset
        own, step = (tile.block_n, tile.block_m) if pass_name == "dkdv" else (tile.block_m, tile.block_n)
        own_size, step_size = problem.block_size[::-1] if pass_name == "dkdv" else problem.block_size
        with _on(self.q.device):
            kernel[(programs,)](
                *tensors,
                *rest,
                offset,
                *_mask_arguments(problem),
                UNIT=self.unit,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                ROWS=own_size // own,
                SUB=step_size // step,
                D=dim,
                DV=self.v_dim,
                BLOCK_D=_power_of_two(dim),
                BLOCK_DV=_power_of_two(self.v_dim),
                PRECISION=_precision(self.q.dtype),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def _delta(call: _Call, out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    batch, heads, q_len, v_dim = out.shape
    delta = torch.empty((batch, heads, q_len), dtype=torch.float32, device=out.device)
    tiles = -(-q_len // DELTA.block_m)
    with _on(out.device):
        _kernel(Specialisation(_NO_MASK), "delta")[(tiles * batch * heads,)](
            out,
            dout,
            delta if dlse is None else dlse.float().contiguous(),
            delta,
            *_strides(call.unit, out, dout),
            heads,
            q_len,
            tiles,
            HAS_DLSE=dlse is not None,
            UNIT=call.unit,
            BLOCK_M=DELTA.block_m,
            DV=v_dim,
            BLOCK_DV=_power_of_two(v_dim),
            num_warps=DELTA.warps,
        )
    return delta


def _specialisation(problem: Problem, narrow: bool, dim: int, v_dim: int) -> Specialisation:
    per_row = isinstance(problem.q_offset, Tensor)
    return Specialisation(
        problem.expr,
        tuple(table_kind(table) for table in problem.inputs.tables),
        narrow,
        map_batch=per_row or "b" in problem.expr.reads,
        map_heads="h" in problem.expr.reads,
        per_row_offset=per_row,
        padded_d=dim != _power_of_two(dim),
        padded_dv=v_dim != _power_of_two(v_dim),
    )


@lru_cache(maxsize=1024)
def _kernel(special: Specialisation, pass_name: PassName) -> Any:
    """The compiled-when-launched function of one pass."""
    return getattr(module_cache.load(render(special, pass_name)), pass_name)


def _mask_arguments(problem: Problem) -> list[Any]:
    """Params, then each table with its sizes and strides: what `emit.signature` names."""
    values: list[Any] = list(problem.inputs.params)
    for table in problem.inputs.tables:
        memory = table.view(torch.uint8) if table.dtype == torch.bool else table
        values += [memory, *table.shape, *table.stride()]
    return values


def _without_hidden(seen: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors (B, heads, tokens, n) with zeros for the tokens that nobody sees: 0 * NaN would be NaN in the kernels.

    See docs/decisions/0007 for what keeping them out inside the kernels costs.
    """
    if seen is None:
        return list(tensors)
    if seen.shape[1] > 1:  # query heads of a group share a key head: one that sees a token is enough
        seen = seen.unflatten(1, (tensors[0].shape[1], -1)).any(2)
    return [torch.where(seen[..., None], x, 0.0) for x in tensors]


def _laid_out(*tensors: Tensor) -> tuple[int, list[Tensor]]:
    """Tensors as the kernels address them, and the unit that all their strides but the last are multiples of.

    Their last dimension is dense, and offsets inside a tile (128 tokens at most) fit 32 bits.
    """
    unit = _UNIT if all(x.shape[3] % _UNIT == 0 for x in tensors) else 1

    def fits(x: Tensor) -> bool:
        return x.stride(3) == 1 and x.stride(2) < _LARGEST_STEP and all(step % unit == 0 for step in x.stride()[:3])

    return unit, [x if fits(x) else x.contiguous() for x in tensors]


def _strides(unit: int, *tensors: Tensor) -> list[int]:
    return [step // unit for x in tensors for step in x.stride()[:3]]


def _power_of_two(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _precision(dtype: torch.dtype) -> str:
    """float32 products in full, unless torch's own setting asks for TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _heads_in_cache(q: Tensor, bytes_per_head: int, group: int, heads: int) -> int:
    """How many heads to run side by side: as many as leave half of the L2 cache to everything else."""
    if q.device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(q.device).L2_cache_size
    return max(1, min(heads, group * (cache_bytes // 2 // max(bytes_per_head, 1))))


def _part(q: Tensor, group: int, programs: int) -> int:
    """How many of a group's heads one dK/dV program sums over: all, unless that leaves processors idle."""
    if q.device.type != "cuda":
        return group if programs % 2 else 1
    wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    divisors = [n for n in range(group, 0, -1) if group % n == 0]
    return next((part for part in divisors if programs * (group // part) >= wanted), 1)


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 80  # the interpreter: any family's tiles will do
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _shared_limit(device: torch.device) -> int | None:
    """Bytes of shared memory that one program may ask for; None for what the architecture has."""
    if device.type != "cuda":
        return None
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    """The median of a few runs, after one that compiles."""
    if device.type != "cuda":  # the interpreter
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    found: float = _triton().testing.do_bench(function, warmup=10, rep=50, return_mode="median") / 1e3
    return found


@cache
def _triton() -> ModuleType:
    return importlib.import_module("triton")
