r"""Drafts of speculative decoding that form trees -> a mask: each sees its ancestors, itself and what is cached.

    parents = [-1, 0, 0, 1, 2, 2]                 cached    drafts
                                                  ■ ■ ■   ■ · · · · ·   0
            0                                     ■ ■ ■   ■ ■ · · · ·   1
          /   \                                   ■ ■ ■   ■ · ■ · · ·   2
        1       2                                 ■ ■ ■   ■ ■ · ■ · ·   3
        |      / \                                ■ ■ ■   ■ · ■ · ■ ·   4
        3     4   5                               ■ ■ ■   ■ · ■ · · ■   5

What each draft sees of the drafts is kept as bits, 64 to a number: two look-ups and a shift decide a pair.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.sizes import Fits, Sizes
from maskflash.functions.slots import aside
from maskflash.functions.traces import Reading
from maskflash.ground import arguments, modes
from maskflash.ground.identity import state
from maskflash.masks.mask import Mask
from maskflash.presets.documents import Ints, unless_1
from maskflash.trace.sources import Captured
from maskflash.trace.trace import Traced, trace

__all__ = ["tree"]

_CACHED: Final = "q_offset of the call"  # arguments that the call implies: no identifiers, so nobody can pass them
_DRAFTS: Final = "drafts of the tree"
_SEEN: Final = "@seen"  # what traces call the table
_WORD: Final = 64  # bits
_MOST_DRAFTS: Final = 1 << 15  # of a row: their bits are 128 MiB

_library = torch.library.Library("maskflash", "FRAGMENT")
_library.define("ancestors(Tensor parents) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def tree(parents: Ints) -> DraftTree:
    """Drafts of speculative decoding that form trees: a draft sees its ancestors, itself, and all that is cached.

        visible = kv is cached or kv is q or kv is an ancestor of q

        ■ · · · · ·    parents=[-1, 0, 0, 1, 2, 2]
        ■ ■ · · · ·
        ■ · ■ · · ·
        ■ ■ · ■ · ·
        ■ · ■ · ■ ·
        ■ · ■ · · ■

    A call has a query for each draft, and its q_offset is the length of the cache: an int, or an int tensor (B,) where
    the rows' caches differ. Keys before it are cached ones, and the drafts' own keys follow. Nobody sees keys after
    them, so k and v may have room. Drafts may stand in any order. Those that a step doesn't need may be roots (-1).

    Args:
        parents: (N,) or (B, N) integers, for each draft the number of its parent among the N; -1 for a root, of which
            there may be several. Kept by reference: what is written to it is seen by the next call.

    Returns:
        The mask; its `depths` are the drafts' distances from their roots, for positions.

    Raises:
        ArgumentError: parents out of range or in a cycle; when made, and in a call after they were written to.

    Example:
        >>> import torch
        >>> import maskflash as mf
        >>> parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]])  # a tree of each batch row
        >>> cached = torch.tensor([9, 7])
        >>> mask = mf.presets.tree(parents)
        >>> verify = mf.compile(mask)
        >>> q = torch.randn(2, 8, 4, 64)
        >>> k, v = torch.randn(2, 2, 2, 16, 64).unbind()  # drafts' keys at cached[b] to cached[b] + 3
        >>> verify(q, k, v, q_offset=cached).shape
        torch.Size([2, 8, 4, 64])
        >>> cached[:, None] + mask.depths  # their positions
        tensor([[ 9, 10, 10, 11],
                [ 7,  8,  9, 10]])

    Source: Miao et al., SpecInfer, 2024 (arXiv 2305.09781), section 4: tree attention.
    """
    return DraftTree(parents)


class DraftTree(Mask):
    """The mask of drafts that form trees: see `tree`, which makes it.

    Attributes:
        parents: (N,) or (B, N) integers, as they were given.
    """

    def __init__(self, parents: Ints) -> None:
        table = arguments.int_table("tree", "parents", parents, (1, 2))
        if arguments.without_data(table):
            raise ArgumentError(
                "tree: parents holds no data, being on meta or a fake tensor; expected numbers, which are checked now; "
                "make the mask where the tensor has its data"
            )
        if table.shape[-1] > _MOST_DRAFTS:
            raise ArgumentError(f"tree: {table.shape[-1]:,} drafts, expected at most {_MOST_DRAFTS:,}")
        if table.ndim == 2 and len(table) == 0:
            raise ArgumentError(f"tree: parents has shape {tuple(table.shape)}, expected a batch of at least 1")
        rows = 1 if table.ndim == 1 else len(table)
        drafts = f"{table.shape[-1]} drafts" + (" per row" if rows > 1 else "")
        super().__init__(f"tree({drafts})", (), {}, (_CACHED, _DRAFTS), fits=Fits(batch=unless_1(rows)))
        self.parents: Tensor = table
        self._batched = rows > 1
        self._now = _read(table, 0)

    def __dir__(self) -> list[str]:
        """What users may use."""
        return sorted((*super().__dir__(), "depths", "parents"))

    @property
    def depths(self) -> Tensor:
        """(N,) or (B, N) int64, how many ancestors each draft has, on the device of the parents."""
        self.look()
        bits = np.unpackbits(self._now.seen.numpy().view(np.uint8), axis=-1)
        with modes.off():
            depths = torch.from_numpy(bits.sum(-1, dtype=np.int64) - 1)
            return depths.reshape(self.parents.shape).to(self.parents.device)

    def implied(self, sizes: Sizes) -> dict[str, Any]:
        """Where the drafts begin, and how many there are."""
        super().implied(sizes)
        drafts = int(self.parents.shape[-1])
        if not sizes.partial:
            _check_call(sizes, drafts)
        return {_CACHED: sizes.q_offset, _DRAFTS: drafts}

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The expression that all trees of a kind share."""
        return _trace(self._batched, isinstance(mask_args[_CACHED], Tensor))

    def look(self) -> int:
        """Whether the parents are other numbers than before."""
        now = self._now
        if not (torch.compiler.is_compiling() or _unchanged(self.parents, now)):
            now = self._now = _read(self.parents, now.stamp + 1)
        return now.stamp

    def reading(self) -> Reading:
        """What each draft sees of the drafts."""
        now = self._now
        seen = torch.ops.maskflash.ancestors(self.parents) if torch.compiler.is_compiling() else now.seen  # by export
        return Reading(now.stamp, {_SEEN: seen}, (), (seen,))

    def read(self) -> dict[str, Any]:
        """The same, found by the graph itself, which so sees what is written to the parents."""
        self._look_aside()
        return {_SEEN: torch.ops.maskflash.ancestors(self.parents)}

    @aside
    def _look_aside(self) -> None:
        self.look()

    def __call__(self, *indices: Any, **mask_args: Any) -> NoReturn:
        """Nothing to call: a pair alone doesn't say where the call's queries begin."""
        raise ArgumentTypeError(
            "tree: a predicate can't call it, since it depends on where the call's queries begin; "
            "combine the masks with & | ^ ~ instead"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return tree, (self.parents,)


class _Known(NamedTuple):
    """What was found of parents, and how to tell whether they are still the same.

    Attributes:
        stamp: another number for other parents.
        seen: (B, N, words) or (N, words) int64, whose bits say what each draft sees; on the CPU.
        parents: a copy.
        state: of the tensor; None where only its contents tell.
    """

    stamp: int
    seen: Tensor
    parents: npt.NDArray[Any]
    state: tuple[Any, ...] | None


def _read(parents: Tensor, stamp: int) -> _Known:
    with modes.off():
        versioned = parents.device.type != "cpu" and not parents.is_inference()
        known = state(parents) if versioned else None  # first: a write during the copy is noticed
        numbers = np.atleast_2d(parents.cpu().numpy())
        seen = torch.from_numpy(_ancestors(numbers))
        return _Known(stamp, seen if len(seen) > 1 else seen[0], numbers.copy(), known)


def _unchanged(parents: Tensor, known: _Known) -> bool:
    """Whether parents are those that were read: on a GPU by their state, so that nobody waits for them."""
    if known.state is not None:
        return known.state == state(parents)
    here = parents if parents.device.type == "cpu" else parents.cpu()
    return np.array_equal(np.atleast_2d(here.numpy()), known.parents)


def _ancestors(parents: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """What each draft sees of the drafts: (B, N, words) int64, the bit of itself and of each ancestor.

    Each draft knows the 2ⁿ nearest of its line and who comes next; joined with what that one knows they are 2ⁿ⁺¹.

    Raises:
        ArgumentError: a parent out of range, or a cycle.
    """
    rows, n = parents.shape
    wrong = (parents < -1) | (parents >= n)
    if wrong.any():
        row, draft = np.argwhere(wrong)[0].tolist()
        raise ArgumentError(
            f"tree: parents holds {parents[row, draft]}{_at(rows, row, draft)}, expected -1 for a root, or a draft "
            f"from 0 to {n - 1}"
        )
    drafts = np.arange(n)
    seen = np.zeros((rows, n + 1, n // _WORD + 1), dtype=np.uint64)  # the last draft is nobody
    seen[:, drafts, drafts // _WORD] = np.uint64(1) << (drafts % _WORD).astype(np.uint64)
    after = np.full((rows, n + 1), n, dtype=np.int64)
    after[:, :n] = np.where(parents < 0, n, parents)
    for _ in range(n.bit_length()):
        if (after == n).all():
            break
        seen |= np.take_along_axis(seen, after[:, :, None], axis=1)
        after = np.take_along_axis(after, after, axis=1)
    else:
        _refuse_cycle(parents, after)
    return np.ascontiguousarray(seen[:, :n]).view(np.int64)


def _refuse_cycle(parents: npt.NDArray[Any], after: npt.NDArray[np.int64]) -> None:
    """An error if some draft's line has no end, of the drafts that it comes back to."""
    rows, n = parents.shape
    endless = np.argwhere(after < n)
    if len(endless) == 0:
        return
    row, draft = endless[0].tolist()
    line = [int(after[row, draft])]  # so far up that it is in the cycle
    while len(line) == 1 or line[-1] != line[0]:
        line.append(int(parents[row, line[-1]]))
    shown = " -> ".join(map(str, line if len(line) <= 8 else [*line[:7], "...", line[0]]))
    raise ArgumentError(
        f"tree: parents has a cycle, {shown}{_at(rows, row)}, expected that every draft's line ends at a root, -1"
    )


def _at(rows: int, row: int, draft: int | None = None) -> str:
    """Where something is, for a message."""
    place = [] if draft is None else [f"at draft {draft}"]
    return " " + " ".join([*place, *([f"of batch row {row}"] if rows > 1 else [])]) if place or rows > 1 else ""


def _check_call(sizes: Sizes, drafts: int) -> None:
    """Refuse a call whose queries aren't the drafts, or that has more keys but doesn't say how many are cached."""
    if sizes.q_len != drafts:
        raise ArgumentError(
            f"{sizes.operation}: q_len is {sizes.q_len}, expected {drafts}, a query for each draft of the tree; where "
            "a step has fewer, let the others be roots (-1)"
        )
    if sizes.kv_len > drafts and all(not isinstance(offset, Tensor) and offset == 0 for _, offset in sizes.offsets):
        raise ArgumentError(
            f"{sizes.operation}: kv_len is {sizes.kv_len} and the tree has {drafts} drafts, expected a q_offset that "
            f"says how many keys are cached: q_offset={sizes.kv_len - drafts}, or less where k has room, or an int "
            "tensor (B,)"
        )


@lru_cache(maxsize=4)
def _trace(batched: bool, per_row: bool) -> Traced:
    """The expression of all trees whose parents, and whose caches' lengths, are or aren't given for each row."""
    anything = torch.zeros((1,) * (2 + batched), dtype=torch.int64)

    def visible(b: Any, h: Any, q: Any, kv: Any, **values: Any) -> Any:
        cached = values[_CACHED][b] if per_row else values[_CACHED]
        query, key = q - cached, kv - cached
        if key < 0:
            return True
        if key >= values[_DRAFTS]:
            return False
        place = (query, key // _WORD)
        return (values["seen"][(b, *place) if batched else place] >> key % _WORD) & 1 == 1

    with modes.off():
        implied = {_CACHED: torch.zeros(1, dtype=torch.int64) if per_row else 0, _DRAFTS: 1}
    traced = trace(visible, {"seen": anything, **implied})
    tables = tuple(Captured(_SEEN) if table == "seen" else table for table in traced.tables)
    return replace(traced, tables=tables)


def _ancestors_of(parents: Tensor) -> Tensor:
    return _read(parents, 0).seen.to(parents.device)


def _shape_of_ancestors(parents: Tensor) -> Tensor:
    rows = parents.shape[:-1] if parents.ndim == 2 and len(parents) > 1 else ()
    drafts = parents.shape[-1]
    return parents.new_empty((*rows, drafts, drafts // _WORD + 1), dtype=torch.int64)


_library.impl("ancestors", _ancestors_of, "CompositeExplicitAutograd")
_library.impl("ancestors", _shape_of_ancestors, "Meta")  # register_fake would take longer than all of this module
