"""A process group or a mesh, and how many ranks share heads out -> who exchanges tokens with whom, and who heads.

Rank r of a plan is r = t * head_ranks + h:

             h = 0   h = 1
    t = 0      0       1      ranks of a row exchange heads for tokens: then each has the tokens of all of them
    t = 1      2       3      ranks of a column exchange keys: they have the same heads

A mesh of two dimensions has a group for each row and for each column. Otherwise all exchanges are of the whole group,
with nothing for the ranks of other rows or columns: so no group is made that its user doesn't know of, and that every
process of the job would have to make with them, even those outside of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from maskflash.errors import ArgumentError, ArgumentTypeError

_OPERATION = "parallel.compile"
_EXPECTED = "a process group of torch.distributed, or a DeviceMesh"
_OUTSIDE = "this process is not in group, expected one of its ranks; call it in these alone"


@dataclass(frozen=True, slots=True)
class Peers:
    """Some ranks of a process group, in an order, this one among them.

    Attributes:
        group: torch's; None for no communication: there is one rank.
        ranks: their numbers in the group.
        place: of this rank among them.
    """

    group: Any
    ranks: tuple[int, ...]
    place: int

    def all_to_all(
        self, received: Tensor, sent: Tensor, of_each: Sequence[int], to_each: Sequence[int], *, wait: bool = True
    ) -> Any:
        """Exchange rows, in the order of these ranks: torch's work, or None where that is done.

        Args:
            received: (sum of `of_each`, ...), to be filled.
            sent: (sum of `to_each`, ...) of the same dtype, contiguous.
            of_each: how many rows come from each.
            to_each: how many rows go to each.
            wait: until they are here.
        """
        if self.group is None:
            received.copy_(sent)
            return None
        splits = self._of_group(of_each), self._of_group(to_each)
        return dist.all_to_all_single(received, sent, *splits, group=self.group, async_op=not wait)

    def _of_group(self, counts: Sequence[int]) -> list[int]:
        """Counts of these ranks as those of the whole group."""
        found = [0] * dist.get_world_size(self.group)
        for rank, count in zip(self.ranks, counts, strict=True):
            found[rank] = count
        return found


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where a process is among the ranks of a plan.

    Attributes:
        rank: its number.
        tokens: those with the same heads.
        heads: those that exchange heads for tokens with it.
        everyone: groups that together reach all ranks, one after the other.
    """

    rank: int
    tokens: Peers
    heads: Peers
    everyone: tuple[Peers, ...]

    def gather(self, x: Tensor) -> Tensor:
        """The same tensor of each rank, by rank: (ranks, *x.shape)."""
        found = x[None]
        for peers in self.everyone:
            parts = [torch.empty_like(found) for _ in range(dist.get_world_size(peers.group))]
            dist.all_gather(parts, found.contiguous(), group=peers.group)
            found = torch.cat([parts[rank] for rank in peers.ranks])
        return found


def find_ranks(group: Any, world_size: int, head_ranks: int = 1) -> Ranks:
    """Where this process is.

    Args:
        group: a ProcessGroup; None for the default one, or for none where there is one rank; or a DeviceMesh, (ranks,)
            or (ranks / head_ranks, head_ranks).
        world_size: ranks of the plan.
        head_ranks: how many of them exchange heads for tokens with one another.

    Raises:
        ArgumentTypeError: the group is none.
        ArgumentError: it has other sizes, or this process is not in it, or torch.distributed isn't initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        if group is not None or world_size > 1:
            raise ArgumentError(
                f"{_OPERATION}: the plan has {world_size} ranks and torch.distributed isn't initialised, expected a "
                "process group; call torch.distributed.init_process_group first"
            )
        alone = Peers(None, (0,), 0)
        return Ranks(0, alone, alone, ())
    if isinstance(group, DeviceMesh):
        return _of_mesh(group, world_size, head_ranks)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ArgumentError(f"{_OPERATION}: {_OUTSIDE}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ArgumentTypeError(f"{_OPERATION}: group is of type {type(group).__name__}, expected {_EXPECTED}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ArgumentError(f"{_OPERATION}: {_OUTSIDE}")
    size = dist.get_world_size(group)
    if size != world_size:
        raise ArgumentError(
            f"{_OPERATION}: group has {size} ranks, expected the plan's {world_size}; make a plan of world_size={size}"
        )
    return _of_group(dist.group.WORLD if group is None else group, tuple(range(size)), rank, head_ranks)


def _of_group(group: Any, members: tuple[int, ...], rank: int, head_ranks: int) -> Ranks:
    """Rows and columns of one group's members, which are in the plan's order."""
    t, h = divmod(rank, head_ranks)
    tokens = Peers(group, members[h::head_ranks], t)
    heads = Peers(group, members[t * head_ranks : (t + 1) * head_ranks], h)
    return Ranks(rank, tokens, heads, (Peers(group, members, rank),))


def _of_mesh(mesh: DeviceMesh, world_size: int, head_ranks: int) -> Ranks:
    shape, wanted = tuple(mesh.shape), (world_size // head_ranks, head_ranks)
    if shape not in ((world_size,), wanted):
        raise ArgumentError(
            f"{_OPERATION}: group is a mesh of {shape} ranks, expected ({world_size},) or {wanted}, (tokens, "
            "heads), as the plan has them; make the mesh with torch.distributed.init_device_mesh"
        )
    at = mesh.get_coordinate()
    if at is None:
        raise ArgumentError(f"{_OPERATION}: {_OUTSIDE}")
    if len(shape) == 1:
        return _of_group(mesh.get_group(0), _members(mesh, 0, mesh.mesh), at[0], head_ranks)
    t, h = at
    tokens = Peers(mesh.get_group(0), _members(mesh, 0, mesh.mesh[:, h]), t)
    heads = Peers(mesh.get_group(1), _members(mesh, 1, mesh.mesh[t]), h)
    return Ranks(t * head_ranks + h, tokens, heads, (heads, tokens))


def _members(mesh: DeviceMesh, dim: int, ranks: Tensor) -> tuple[int, ...]:
    """Numbers in a mesh's group of global ranks: a group sorts its own, a mesh needn't."""
    group = mesh.get_group(dim)
    return tuple(dist.get_group_rank(group, rank) for rank in ranks.tolist())
