r"""Sequences that share prefixes -> one packed sequence that has each shared token once, and the way back.

    sequences     tree                packed, depth first    end
    a b c d       a - b - c - d       0  a                   6
    a b c e            \   \          1    b                 6
    a b f               f   e         2      c               5
                                      3        d             4
                                      4        e             5
                                      5      f               6

A token is in the path of all tokens from itself to the end of its subtree, so the mask is `kv <= q < end[kv]`: one
interval of rows for each column. Attention, and all that is computed of a token and what comes before it, is the same
as in the sequences, with the positions that tokens have there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.functions.sizes import Fits
from maskflash.ground import arguments, modes
from maskflash.masks.mask import Mask
from maskflash.masks.predicate import Predicate
from maskflash.presets.documents import Ints

__all__ = ["PrefixTree", "prefix_tree"]

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Sequences packed as a tree, T tokens in depth-first order: `prefix_tree` makes it.

    Attributes:
        tokens: (T,) int64.
        positions: (T,) int64, where each token stands in its sequences, from 0.
        parents: (T,) int64, the packed token before each; -1 for the first of a sequence.
        end: (T,) int32, one past the last packed token that has this one in its path.
        counts: (T,) int64, how many sequences each token is part of.
        paths: (total,) int64, the packed token of each token of the sequences, one sequence after the other.
        lengths: tokens of each sequence.
    """

    tokens: Tensor
    positions: Tensor
    parents: Tensor
    end: Tensor
    counts: Tensor
    paths: Tensor
    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return len(self.paths)

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again: `total` less those that are packed."""
        return self.total - len(self)

    @cached_property
    def mask(self) -> Mask:
        """Each token sees its path: itself and what comes before it in its sequences; for a batch of one row."""
        return _paths(self.end)

    @cached_property
    def predicted(self) -> Tensor:
        """(M,) int64, the packed tokens that something comes before: those that a loss is about."""
        return (self.parents >= 0).nonzero().flatten()

    @property
    def queries(self) -> Tensor:
        """(M,) int64, the packed token whose output predicts each of `predicted`; several may share one."""
        return self.parents[self.predicted]

    @property
    def targets(self) -> Tensor:
        """(M,) int64, the tokens that are predicted."""
        return self.tokens[self.predicted]

    @property
    def weights(self) -> Tensor:
        """(M,) int64, how many sequences have each prediction: with these, a sum of losses is that of the batch."""
        return self.counts[self.predicted]

    def add_up(self, values: Sequence[Tensor]) -> Tensor:
        """What each packed token gets of all its sequences: the sum of their values for it.

        Of weights of each sequence's tokens it makes the weights of packed ones, so that any weighted sum of losses is
        that of the unpacked batch. It is differentiable.

        Args:
            values: for each sequence (length, ...), in the order in which they were given.

        Returns:
            (T, ...), of the values' dtype.

        Raises:
            ArgumentError: another number of sequences, or lengths that aren't theirs.
        """
        joined = _joined(values, self.lengths)
        found: Tensor = joined.new_zeros((len(self), *joined.shape[1:]))
        return found.index_add(0, self.paths.to(joined.device), joined)

    def unpack(self, packed: Tensor, dim: int = 0) -> list[Tensor]:
        """Values of packed tokens as those of each sequence, in the order in which they were given.

        It is differentiable: gradients of shared tokens add up.

        Args:
            packed: has T entries in dimension `dim`.
            dim: that dimension; 1 for (1, T, ...).

        Raises:
            ArgumentError: another number of entries.

        Example:
            >>> tree = prefix_tree([[5, 6, 7], [5, 6, 8, 9]])
            >>> [x.tolist() for x in tree.unpack(tree.tokens)]
            [[5, 6, 7], [5, 6, 8, 9]]
        """
        if not isinstance(packed, Tensor):
            raise ArgumentTypeError(f"unpack: packed is {arguments.by_type(packed)}, expected a tensor")
        dim = arguments.integer("unpack", "dim", dim, low=-packed.ndim, high=packed.ndim - 1)
        if packed.shape[dim] != len(self):
            raise ArgumentError(
                f"unpack: packed has shape {tuple(packed.shape)}, expected {len(self)} entries in dimension {dim}, one "
                "for each packed token; say which with dim="
            )
        return list(packed.index_select(dim, self.paths.to(packed.device)).split(self.lengths, dim))

    def to(self, device: torch.device | str) -> PrefixTree:
        """The same with its tensors on a device."""
        on = arguments.device("PrefixTree.to", device)
        return PrefixTree(
            self.tokens.to(on),
            self.positions.to(on),
            self.parents.to(on),
            self.end.to(on),
            self.counts.to(on),
            self.paths.to(on),
            self.lengths,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return (
            f"PrefixTree({len(self.lengths):,} sequences, {self.total:,} tokens packed as {len(self):,}, "
            f"{self.saved:,} saved)"
        )


def prefix_tree(sequences: Sequence[Ints]) -> PrefixTree:
    """Pack sequences that share prefixes so that each shared token is computed once: rollouts of a prompt, DPO's pairs.

        visible = kv <= q < end[kv], where end[kv] is one past kv's subtree

        ■ · · · · ·    sequences=["abcd", "abce", "abf"], as numbers
        ■ ■ · · · ·
        ■ ■ ■ · · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ · ■ ·
        ■ ■ · · · ■

    Sequences share what they begin with alike, however many do and wherever they part; those that begin with different
    tokens are trees of their own in the same packed sequence. Children are in ascending order of their tokens, so the
    packed sequence doesn't depend on the order of the sequences. Tokens are read now; the tree's tensors are on the
    CPU: see `PrefixTree.to`.

    Args:
        sequences: token ids of each, lists or (length,) integer tensors; any length, 0 too. Where more than ids tells
            tokens apart (an image, an adapter), number the different ones before.

    Returns:
        The packed tokens with positions, mask and loss map, and what unpacks their outputs.

    Raises:
        ArgumentTypeError: something that holds no integers.
        ArgumentError: a sequence of more than one dimension; more tokens than a call may have.

    Example:
        >>> tree = prefix_tree([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6]])
        >>> tree
        PrefixTree(3 sequences, 11 tokens packed as 6, 5 saved)
        >>> tree.tokens.tolist(), tree.positions.tolist(), tree.end.tolist()
        ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 3, 2], [6, 6, 5, 4, 5, 6])
        >>> list(zip(tree.queries.tolist(), tree.targets.tolist(), tree.weights.tolist()))
        [(0, 2, 3), (1, 3, 2), (2, 4, 1), (2, 5, 1), (1, 6, 1)]
    """
    given = _read(sequences)
    lengths = [len(x) for x in given]
    if sum(lengths) > arguments.MOST_TOKENS:
        raise ArgumentError(
            f"prefix_tree: the sequences have {sum(lengths):,} tokens, expected at most {arguments.MOST_TOKENS:,}"
        )
    order = sorted(range(len(given)), key=_keys(given).__getitem__)
    paths: list[Array] = [np.empty(0, np.int64)] * len(given)
    new: list[tuple[Array, int, int]] = []  # of each sequence its tokens that no earlier one has, their place, parent
    end = np.zeros(sum(lengths), np.int64)  # longer than needed
    packed, before, last = 0, np.empty(0, np.int64), np.empty(0, np.int64)
    for at in order:
        tokens = given[at]
        shared = _shared(before, tokens)
        end[last[shared:]] = packed  # the subtrees of what this sequence has no more
        parent = int(last[shared - 1]) if shared else -1
        path = np.concatenate([last[:shared], np.arange(packed, packed + len(tokens) - shared)])
        new.append((tokens[shared:], shared, parent))
        packed += len(tokens) - shared
        paths[at] = last = path
        before = tokens
    end[last] = packed
    return _tree(new, paths, end[:packed], lengths)


def _tree(new: list[tuple[Array, int, int]], paths: list[Array], end: Array, lengths: list[int]) -> PrefixTree:
    empty = np.empty(0, np.int64)
    joined = np.concatenate([empty, *paths])
    tokens = np.concatenate([empty, *(part for part, _, _ in new)])
    positions = np.concatenate([empty, *(np.arange(start, start + len(part)) for part, start, _ in new)])
    parents = np.arange(-1, len(tokens) - 1)
    at = 0
    for part, _, parent in new:
        if len(part):
            parents[at] = parent
        at += len(part)
    counts = np.bincount(joined, minlength=len(tokens))
    with modes.off():
        return PrefixTree(
            torch.from_numpy(tokens),
            torch.from_numpy(positions),
            torch.from_numpy(parents),
            torch.from_numpy(end.astype(np.int32)),
            torch.from_numpy(counts),
            torch.from_numpy(joined),
            tuple(lengths),
        )


def _paths(end: Tensor) -> Mask:
    n = len(end)
    name = f"prefix_tree({n:,} tokens)"
    if n == 0:
        return Predicate(lambda b, h, q, kv: False, name)
    return Predicate(lambda b, h, q, kv: kv < n and kv <= q < end[kv], name, Fits(q_total=n))


def _read(sequences: Any) -> list[Array]:
    """The tokens of each sequence."""
    if isinstance(sequences, str) or not isinstance(sequences, Sequence):
        raise ArgumentTypeError(
            f"prefix_tree: sequences is {arguments.by_type(sequences)}, expected a list of token lists; of a padded "
            "tensor pass [row[:length] for row, length in zip(tokens, lengths)]"
        )
    found = []
    for place, tokens in enumerate(sequences):
        table = arguments.int_table("prefix_tree", f"sequences[{place}]", tokens, (1,))
        if arguments.without_data(table):
            raise ArgumentError(
                f"prefix_tree: sequences[{place}] holds no data, being on meta or a fake tensor; expected token ids, "
                "which are read now"
            )
        with modes.off():
            found.append(table.detach().cpu().numpy().astype(np.int64))
    return found


def _keys(sequences: list[Array]) -> list[bytes]:
    """Bytes that compare as the sequences do: of each token the highest first, its sign turned."""
    return [(x.view(np.uint64) ^ np.uint64(1 << 63)).astype(">u8").tobytes() for x in sequences]


def _shared(tokens: Array, others: Array) -> int:
    """How many tokens two sequences begin with alike."""
    most = min(len(tokens), len(others))
    differ = tokens[:most] != others[:most]
    return int(differ.argmax()) if differ.any() else most


def _joined(values: Any, lengths: tuple[int, ...]) -> Tensor:
    """Values of all sequences, one after the other."""
    if isinstance(values, Tensor | str) or not isinstance(values, Sequence):
        raise ArgumentTypeError(
            f"add_up: values is {arguments.by_type(values)}, expected a list with a tensor (length, ...) for each "
            "sequence"
        )
    if len(values) != len(lengths):
        raise ArgumentError(f"add_up: got {len(values)} values, expected {len(lengths)}, one for each sequence")
    for place, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"add_up: values[{place}] is {arguments.by_type(value)}, expected a tensor")
        if value.ndim == 0 or len(value) != length:
            raise ArgumentError(
                f"add_up: values[{place}] has shape {tuple(value.shape)}, expected ({length}, ...), an entry for each "
                "token of its sequence"
            )
    return torch.cat(list(values)) if values else torch.zeros(0)
