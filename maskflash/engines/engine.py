"""A call -> another library's kernel: what all engines share. Each says what it takes; the rest is refused by name.

    Asked      what a call asks for
    Engine     what its library takes, how a mask becomes its form, and its own differentiable function
    Prepared   a mask in that form, kept between calls

An engine is asked for by name and is never chosen otherwise. What it can't do raises BackendError before any work. Its
results are made to mean what ours do: out 0 and lse -inf in rows that see nothing, lse in natural logarithm, and tokens
that nobody sees may hold anything.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from maskflash.analysis.block_map import BlockMap
from maskflash.analysis.problem import Problem
from maskflash.analysis.seen import Seen
from maskflash.backends.triton.layout import without_hidden
from maskflash.backends.triton.walks import seen
from maskflash.errors import BackendError
from maskflash.scores.strength import Gradients, Strength


class Asked(NamedTuple):
    """What a call asks for, as engines refuse it.

    Attributes:
        device: of q, k and v.
        dtype: likewise.
        head_dim: of q and k.
        v_head_dim: of v.
        gradients: whether gradients of q, k or v may be asked for.
        lse: whether lse is.
        score: whether there is a score function.
        learned: whether gradients of its tables may be asked for.
        sinks: whether there are any.
        dropout: whether there is any.
        deterministic: whether the same inputs must give the same bits.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    gradients: bool = False
    lse: bool = False
    score: bool = False
    learned: bool = False
    sinks: bool = False
    dropout: bool = False
    deterministic: bool = True


class Formed(NamedTuple):
    """A mask in an engine's form.

    Attributes:
        form: what the engine makes of it.
        counts: what it consists of, for people.
        nbytes: bytes held.
    """

    form: Any
    counts: dict[str, int]
    nbytes: int


class Made(NamedTuple):
    """What a library makes of a form for one kind of call.

    Attributes:
        value: what it makes.
        nbytes: bytes held.
    """

    value: Any
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A mask in an engine's form, at the lengths of its calls. It holds none of the mask's tables.

    A mask that doesn't look at b is analysed once for any number of batch rows. Most forms have an entry for each.

    Attributes:
        block_map: the mask's tiles.
        counts: what the form consists of, for people.
        rows: which rows see anything, (B, H, q_len) bool; None where all do.
        columns: which columns are seen, (B, H, kv_len) bool; None where all are.
    """

    block_map: BlockMap
    counts: dict[str, int]
    rows: Tensor | None
    columns: Tensor | None
    forms: dict[int, Formed]
    _made: dict[Hashable, Made] = field(default_factory=dict)

    def made(self, kind: Hashable, make: Callable[[], Made]) -> Any:
        """What the engine's library makes of the form for one kind of call: at the first, and then kept."""
        if kind not in self._made:
            self._made[kind] = make()
        return self._made[kind].value

    @property
    def nbytes(self) -> int:
        """Bytes held so far."""
        tokens = sum(x.nbytes for x in (self.rows, self.columns) if x is not None)
        forms = sum(formed.nbytes for formed in self.forms.values())
        return tokens + forms + sum(made.nbytes for made in self._made.values())


class Engine(ABC):
    """Another library's attention.

    Attributes:
        name: by which it is asked for.
        package: the module that has to be there.
        install: how it gets there.
        form: the mask's form, in a word or two.
        by_batch: whether the form has an entry for each batch row of a call.
        dtypes: what it takes, for each kind of device.
        scores: whether it takes score functions.
        with_gradients: the kinds of device on which it has a backward.
        with_lse: the kinds of device on which it returns lse.
        learns_from_lse: whether its backward takes the gradient of lse.
        deterministic: whether its backward gives the same bits again.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    install: ClassVar[str]
    form: ClassVar[str]
    by_batch: ClassVar[bool] = True
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]]
    scores: ClassVar[bool] = False
    with_gradients: ClassVar[tuple[str, ...]] = ("cuda",)
    with_lse: ClassVar[tuple[str, ...]] = ("cuda",)
    learns_from_lse: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def unavailable(self, device: torch.device) -> str | None:
        """Why this engine can't serve tensors on a device, with the fix; None where it can."""
        if not _is_installed(self.package):
            return f"{self.package} is not installed; `{self.install}`"
        if device.type not in self.dtypes:
            return f"it runs on {' or '.join(self.dtypes)} tensors, got {device.type}; move q, k and v"
        return self.unfit(device) if device.type == "cuda" else None

    def unfit(self, device: torch.device) -> str | None:
        """Why it can't serve a GPU; None where it can."""
        return None

    def refuse(self, call: Asked) -> None:
        """Check that the engine can do what a call asks for.

        Raises:
            BackendError: it can't; the message says what, and what to do instead.
        """
        kind = call.device.type
        taken = self.dtypes.get(kind, ())
        wrong: tuple[str, str] | None = None
        if call.dtype not in taken:
            wrong = f"takes {_listed(taken)} on {kind}, got {_short(call.dtype)}", "cast q, k and v"
        elif call.dropout:
            wrong = "has no dropout", "leave dropout_p out"
        elif call.sinks:
            wrong = "is given no sinks", "leave sinks out"
        elif call.score and not self.scores:
            wrong = "takes no score functions", "leave score out"
        elif call.learned:
            wrong = "gives no gradients to what a score function looks up", "detach it"
        elif call.gradients and kind not in self.with_gradients:
            wrong = f"has no backward on {kind}", "detach q, k and v or call it under torch.no_grad()"
        elif call.lse and kind not in self.with_lse:
            wrong = f"returns no lse on {kind}", "leave return_lse out"
        elif call.lse and call.gradients and not self.learns_from_lse:
            wrong = "has no gradient of lse", "leave return_lse out or detach q, k and v"
        elif call.gradients and call.deterministic and not self.deterministic:
            wrong = "adds gradients up in any order", "pass deterministic=False to compile"
        else:
            misfit = self.misfit(call)
            wrong = None if misfit is None else (misfit, "pad them with zeros, and keep the scale")
        if wrong is not None:
            what, fix = wrong
            raise BackendError(f'attention: the {self.name} engine {what}; {fix}, or let backend="auto" run the call')

    def misfit(self, call: Asked) -> str | None:
        """What is wrong with the head dims of a call; None if nothing is."""
        return None

    @abstractmethod
    def formed(self, block_map: BlockMap, problem: Problem) -> Formed:
        """A mask in the engine's form, on the device.

        Args:
            block_map: the mask's tiles.
            problem: the mask itself.

        Raises:
            UnsupportedMask: it has no such form.
        """

    @abstractmethod
    def attend(
        self, form: Any, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """The engine's own attention, differentiable where it has a backward.

        Args:
            form: the mask in its form.
            prepared: what is kept between calls.
            problem: the mask itself, with the tables of the call.
            q: (B, Hq, Sq, D), nothing of it empty.
            k: (B, Hkv, Skv, D), Hkv divides Hq; tokens that nobody sees are zeros.
            v: (B, Hkv, Skv, Dv), likewise.
            strength: how strongly pairs attend.

        Returns:
            out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), natural logarithm, float32; rows that see nothing hold anything.
            Where the engine returns no lse it is NaN.
        """

    def prepare(self, found: Seen, problem: Problem) -> Prepared:
        """A mask in the engine's form, and which of its tokens see and are seen."""
        if 0 in (problem.q_len, problem.kv_len):
            return Prepared(found.block_map, {}, None, None, {})
        formed = self.formed(found.block_map, problem)
        rows, columns = (_touched(found, rows=rows, device=problem.device) for rows in (True, False))
        return Prepared(found.block_map, formed.counts, rows, columns, {self._key(problem): formed})

    def _key(self, problem: Problem) -> int:
        return problem.batch if self.by_batch else 1

    def differentiable(
        self, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """Out and lse as ours are, by the engine's own attention, which torch differentiates."""
        if 0 in (q.numel(), k.shape[2]):
            out = q.new_zeros((*q.shape[:3], v.shape[3]))
            return out, q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        key = self._key(problem)
        if key not in prepared.forms:
            prepared.forms[key] = self.formed(prepared.block_map, problem)
        k, v = without_hidden(prepared.columns, k, v)
        out, lse = self.attend(prepared.forms[key].form, prepared, problem, q, k, v, strength)
        if prepared.rows is not None:
            blind = ~prepared.rows
            out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -math.inf)
        return out, lse

    def forward(
        self, prepared: Prepared, problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength
    ) -> tuple[Tensor, Tensor]:
        """Out and lse, without gradients."""
        with torch.no_grad():
            return self.differentiable(prepared, problem, q.detach(), k.detach(), v.detach(), strength)

    def backward(
        self,
        prepared: Prepared,
        problem: Problem,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        strength: Strength,
    ) -> Gradients:
        """Gradients of a forward that torch has not recorded, as compiled graphs have it: it is run once more."""
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for key in _AUTOGRAD:
            excluded = excluded - torch._C.DispatchKeySet(key)
        included = torch._C._dispatch_tls_local_include_set()
        with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            again, again_lse = self.differentiable(prepared, problem, q, k, v, strength)
            results = [again] if dlse is None else [again, again_lse]
            arriving = [dout] if dlse is None else [dout, dlse]
            dq, dk, dv = torch.autograd.grad(results, (q, k, v), arriving, allow_unused=True, materialize_grads=True)
        return Gradients(dq, dk, dv)


_AUTOGRAD = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in dir(torch._C.DispatchKey)
    if name.startswith("Autograd") or name == "ADInplaceOrView"
)


def _touched(found: Seen, *, rows: bool, device: torch.device) -> Tensor | None:
    """Which rows see anything, or which columns are seen: (B, H, n) bool; None where all do.

    `walks.seen` says so of the tiles that are visited; what lies in no visited tile sees nothing.
    """
    block_map = found.block_map
    batch, heads, *counts = block_map.shape
    axis = 0 if rows else 1
    n, size = (block_map.q_len, block_map.kv_len)[axis], block_map.block_size[axis]
    visited = (block_map.rows if rows else block_map.columns).offsets.diff() > 0
    known = seen(found, rows=rows)
    if known is None and bool(visited.all()):
        return None
    touched = visited.view(batch, heads, counts[axis]).repeat_interleave(size, dim=2)[:, :, :n]
    return (touched if known is None else touched & known).to(device)


def _is_installed(package: str) -> bool:
    """Whether a module is there; what it is in is imported to see that."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def by_tokens(x: Tensor) -> Tensor:
    """(B, heads, tokens, n) as (B, tokens, heads, n), which most libraries take, and back; n is dense."""
    turned = x.transpose(1, 2)
    return turned if turned.stride(3) == 1 else turned.contiguous()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0) of others."""
    return (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device)


def dotted(found: tuple[int, int]) -> str:
    """A compute capability as people write it."""
    return ".".join(map(str, found))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(_short, dtypes)) or "nothing"
