"""A mask <-> the arguments of kernels whose masks are fixed, by the name of the library: where the mask is just that.

                     rows' keys                        proposal
    mask, lengths  ------------->  RowIntervals  ---------------->  arguments  --->  what rows see with these
                                        |                                                    |
                                        +----------------  equal, row for row?  -------------+

So two masks that are written differently have the same arguments, and no name of a preset decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.errors import ArgumentError, ArgumentTypeError, UnsupportedMask
from maskflash.forms import conventions, kernels, xformers
from maskflash.forms.row_intervals import RowIntervals, find_row_intervals
from maskflash.forms.sequences import Hulls
from maskflash.forms.windows import AlignedWindow, PackedWindows, Spans
from maskflash.ground import arguments, names
from maskflash.masks.lines import Line
from maskflash.masks.mask import Mask


class Library(NamedTuple):
    """How a library takes masks.

    Attributes:
        propose: from what rows see, arguments that may show it, the plainest first.
        read: the mask of such arguments.
        takes: their names.
        needs: those that can't be left out.
    """

    propose: Callable[[Hulls, torch.device], Iterator[dict[str, Any]]]
    read: Callable[..., Mask]
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()


_VARLEN: Final = ("cu_seqlens_q", "cu_seqlens_k")
_TORCH_VARLEN: Final = ("cu_seq_q", "cu_seq_k")
LIBRARIES: Final = {
    "flash_attn": Library(kernels.propose_flash, kernels.read_flash, ("causal", "window_size")),
    "flash_attn_varlen": Library(
        kernels.propose_flash_varlen,
        kernels.read_flash_varlen,
        (*_VARLEN, "max_seqlen_q", "max_seqlen_k", "causal", "window_size"),
        _VARLEN,
    ),
    "torch_varlen": Library(
        kernels.propose_torch_varlen,
        kernels.read_torch_varlen,
        (*_TORCH_VARLEN, "max_q", "max_k", "window_size", "seqused_k"),
        _TORCH_VARLEN,
    ),
    "sdpa": Library(kernels.propose_sdpa, kernels.read_sdpa, ("attn_mask", "is_causal")),
    "xformers": Library(xformers.propose, xformers.read, xformers.TAKES, ("attn_bias",)),
    "flash_attn_3": Library(
        conventions.propose_flash_3, conventions.read_flash_3, ("causal", "window_size", "attention_chunk")
    ),
    "flash_attn_4": Library(conventions.propose_flash_4, conventions.read_flash_4, ("causal", "window_size")),
    "flashinfer_prefill": Library(
        conventions.propose_flashinfer, conventions.read_flashinfer, ("causal", "window_left")
    ),
    "transformers": Library(
        conventions.propose_transformers,
        conventions.read_transformers,
        ("sliding_window", "attention_chunk_size", "is_causal"),
    ),
    "vllm": Library(
        conventions.propose_vllm, conventions.read_vllm, ("sliding_window", "attention_chunk_size", "attn_type")
    ),
    "paddle": Library(conventions.propose_paddle, conventions.read_paddle, ("causal", "window_size")),
    "jax": Library(conventions.propose_jax, conventions.read_jax, ("is_causal", "local_window_size")),
}


class _Difference(NamedTuple):
    """The first pair that arguments treat otherwise than the mask, and whether the mask shows it."""

    pair: tuple[int, int, int, int]
    shown: bool
    given: dict[str, Any]


def as_arguments(problem: Problem, library: str, name: str) -> dict[str, Any]:
    """The arguments of a library for a problem's mask; see `Mask.as_arguments`.

    Args:
        problem: the mask at its lengths.
        library: one of LIBRARIES.
        name: what messages call the mask.

    Raises:
        ArgumentError: a library that isn't known; more tokens in all batch rows than 32 bits count.
        UnsupportedMask: the library has no arguments for it; a pair that shows so.
    """
    arguments.choice("as_arguments", "library", library, tuple(LIBRARIES))
    tokens = problem.batch * max(problem.q_len, problem.kv_len)
    if tokens > arguments.MOST_TOKENS:
        raise ArgumentError(
            f"as_arguments: the batch rows have {tokens:,} tokens, expected at most {arguments.MOST_TOKENS:,} in all"
        )
    seen = find_row_intervals(problem)
    hulls = Hulls.of(seen, problem.batch)
    rows = _Rows.of(seen)
    found = _decided(LIBRARIES[library], rows, hulls, problem)
    if isinstance(found, dict):
        return found
    others = [
        other
        for other, how in LIBRARIES.items()
        if other != library and isinstance(_decided(how, rows, hulls, problem), dict)
    ]
    instead = f"{_listed(others)} take{'s' * (len(others) == 1)} it" if others else "no fixed-function kernel does"
    hidden, shown = ("hide", "shows") if found.shown else ("show", "hides")
    raise UnsupportedMask(
        f"as_arguments: {library} has no arguments for {name}: the nearest, {_text(found.given)}, {hidden} pair (b, h, "
        f"q, kv) = {found.pair}, which the mask {shown}; {instead}. compile(mask) runs any mask, and to_row_intervals "
        "and to_block_mask are forms of any for other kernels"
    )


def from_arguments(library: str, **its_own: Any) -> Mask:
    """The mask of what a library's attention call was given: exactly the pairs that its kernel lets attend.

        "flash_attn"         causal=, window_size=(left, right)
        "flash_attn_varlen"  cu_seqlens_q=, cu_seqlens_k=, max_seqlen_q=, max_seqlen_k=, causal=, window_size=
        "torch_varlen"       cu_seq_q=, cu_seq_k=, max_q=, max_k=, window_size=, seqused_k=
        "sdpa"               is_causal=, or attn_mask=, a torch.nn.attention.bias or a boolean tensor
        "xformers"           attn_bias=, one of its objects; or the name of its class, and what its constructor takes
        "flash_attn_3"       causal=, window_size=(left, right), attention_chunk=
        "flash_attn_4"       causal=, window_size=(left, right), None for no end; -1 is a number there
        "flashinfer_prefill" causal=, window_left=
        "transformers"       sliding_window= or attention_chunk_size=, as its configurations say; is_causal=
        "vllm"               sliding_window= or attention_chunk_size=; attn_type="decoder" or "encoder_only"
        "paddle"             causal=, window_size=, for as many queries as keys
        "jax"                is_causal=, local_window_size=

    The mask counts the rows and columns of the tensors themselves, so it takes no offsets. What a library aligns with
    the bottom right is aligned so at the lengths of each call; for models these are new tokens behind a cache. Tokens
    of packed sequences are counted through the batch rows: those of one row, or those of a padded batch seen as one
    row.

    Args:
        library: one of these names.
        **its_own: its own arguments, those that are about the mask; -1 and None mean what they mean there. Tensors are
            read now.

    Raises:
        ArgumentTypeError: an argument that isn't known, or isn't the mask's; what the latter is here.
        ArgumentError: a library that isn't known, or values that mean nothing.

    Source: flash-attention 2.8, torch 2.13, xFormers 0.0.35, Transformers 5.23 and others, which `kernels.py`,
    `xformers.py` and `conventions.py` in `maskflash/forms` name.

    Example:
        >>> from_arguments("flash_attn", causal=True, window_size=(1, 0)).dense(2, 4)[0, 0].int()
        tensor([[0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        >>> packed = from_arguments("flash_attn_varlen", cu_seqlens_q=[0, 1, 3], cu_seqlens_k=[0, 2, 4], causal=True)
        >>> packed.dense(3, 4)[0, 0].int()
        tensor([[1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    arguments.choice("from_arguments", "library", library, tuple(LIBRARIES))
    how = LIBRARIES[library]
    for name in its_own:
        if name not in how.takes:
            raise _unexpected(library, name)
    missing = [name for name in how.needs if name not in its_own]
    if missing:
        raise ArgumentTypeError(f"from_arguments: {library} needs {', '.join(missing)}; pass it by name")
    return how.read(**its_own)


def _unexpected(library: str, name: str) -> ArgumentTypeError:
    """The error for an argument that is no part of a library's mask."""
    others = [other for other, how in LIBRARIES.items() if name in how.takes]
    if others:
        answer = f"it is one of {_listed(others)}"
    elif name in names.PEERS:
        answer = f"it is no part of the mask; here: {names.PEERS[name]}"
    else:
        answer = f"its mask is in {', '.join(LIBRARIES[library].takes)}"
    return ArgumentTypeError(f"from_arguments: unexpected argument {name!r} of {library}; {answer}")


def _decided(how: Library, rows: _Rows, hulls: Hulls, problem: Problem) -> dict[str, Any] | _Difference:
    """The first proposal that shows just what rows see; else where the one that holds longest departs from it."""
    nearest: _Difference | None = None
    for given in how.propose(hulls, problem.device):
        mask = how.read(**given)
        assert isinstance(mask, (AlignedWindow, PackedWindows))
        found = rows.difference(mask.spans(problem.q_len, problem.kv_len, problem.batch), problem.batch)
        if found is None:
            return given
        if nearest is None or found[0] > nearest.pair:
            nearest = _Difference(*found, given)
    assert nearest is not None
    return nearest


class _Rows(NamedTuple):
    """What rows see, ready to be compared with spans.

    Attributes:
        seen: as intervals.
        start: (B, H, q_len) int64, the only interval of each row; 0 where there is none.
        stop: likewise.
        many: (B, H, q_len) bool, whether a row has several, and start and stop don't tell.
    """

    seen: RowIntervals
    start: Tensor
    stop: Tensor
    many: Tensor

    @staticmethod
    def of(seen: RowIntervals) -> _Rows:
        """The rows of intervals."""
        count = seen.count
        start, stop = torch.zeros_like(count), torch.zeros_like(count)
        one = count == 1
        start[one], stop[one] = (x[seen.offsets[:-1][one]] for x in (seen.start, seen.stop))
        shape = *seen.shape, seen.q_len
        return _Rows(seen, start.view(shape), stop.view(shape), (count > 1).view(shape))

    def difference(self, spans: Spans, batch: int) -> tuple[tuple[int, int, int, int], bool] | None:
        """The first pair (b, h, q, kv), row by row, that spans treat otherwise, and whether the rows see it.

        Args:
            spans: (batch or 1, q_len) each: one interval for each row, of all heads.
            batch: batch rows; rows or spans of one serve all.
        """
        some = spans[0] < spans[1]
        start, stop = (x.where(some, 0)[:, None] for x in spans)
        wrong = self.many | (self.start != start) | (self.stop != stop)
        if batch == 0 or not bool(wrong.any()):
            return None
        b, h, q = wrong.nonzero()[0].tolist()
        row = self.seen.row(q, b=min(b, self.seen.shape[0] - 1), h=h)
        place = min(b, len(start) - 1)
        told = [(int(start[place, 0, q]), int(stop[place, 0, q]))]
        ends = sorted({end for span in (*row, *told) for end in span})
        kv = next(end for end in ends if _within(row, end) != _within(told, end))
        return (b, h, q, kv), _within(row, kv)


def _within(line: Line, kv: int) -> bool:
    return any(start <= kv < stop for start, stop in line)


def _listed(texts: list[str]) -> str:
    """Names in a sentence."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def _text(given: dict[str, Any]) -> str:
    """Arguments as one would write them, the long ones in short."""

    def short(value: Any) -> str:
        text = "[...]" if isinstance(value, (Tensor, list)) and len(value) > 8 else repr(value)
        return str(value.tolist()) if isinstance(value, Tensor) and text != "[...]" else text

    return ", ".join(f"{name}={short(value)}" for name, value in given.items()) or "none"
