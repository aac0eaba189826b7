"""Routes and a rank -> which of its tokens leave and which keys arrive, in stages; and the transfers themselves.

A stage has the pairs of ranks that are about as far apart, counted round the ring. So all ranks send and receive at
once, and the keys of one stage travel while those of the stage before are used. Two stages of five ranks:

    stage 1    0 -> 1    1 -> 2    2 -> 3    3 -> 4    4 -> 0        1 and 2 apart
               0 -> 2    1 -> 3    2 -> 4    3 -> 0    4 -> 1
    stage 2    0 -> 3    1 -> 4    2 -> 0    3 -> 1    4 -> 2        3 and 4 apart
               0 -> 4    1 -> 0    2 -> 1    3 -> 2    4 -> 3

What travels is rows of bytes, a row for each token. All that a rank sends in a stage is one buffer, receiver by
receiver, and what it receives is another, sender by sender.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskflash.analysis.runs import IntArray
from maskflash.op.parts import Tokens
from maskflash.parallel.peers import Peers
from maskflash.parallel.ranges import union
from maskflash.parallel.routes import Routes, Shards


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What one rank sends and receives in a stage.

    Attributes:
        keys: the tokens that arrive.
        order: int64, for each of them its row in what arrives; None where these are already in order.
        leaving: int64, which of the rank's own tokens leave, receiver by receiver.
        received: for each rank, how many tokens it sends here.
        sent: for each rank, how many tokens it gets from here.
    """

    keys: Tokens
    order: Tensor | None
    leaving: Tensor
    received: tuple[int, ...]
    sent: tuple[int, ...]


class Arriving:
    """Rows on their way."""

    def __init__(self, work: Any, rows: Tensor, sent: Tensor) -> None:
        self._work = work
        self._rows = rows
        self._sent = sent  # its memory is read until the transfer is done

    def wait(self) -> Tensor:
        """The rows, once they are here."""
        self._work.wait()
        del self._sent
        return self._rows


def find_stages(routes: Routes, shards: Shards, rank: int, count: int, device: torch.device) -> list[Stage]:
    """What a rank sends and receives; on every rank as many stages, those in which nobody sends anything left out.

    Args:
        routes: what travels.
        shards: who holds what.
        rank: this one.
        count: stages.
        device: of q, k and v.
    """
    ranks = len(shards)
    travels = routes.tokens() > 0
    source, target = np.indices(travels.shape)
    apart = (target - source) % ranks
    stage = np.where(apart > 0, (apart - 1) * count // max(1, ranks - 1), -1)
    held = _tokens(list(shards[rank]))
    found: list[Stage] = []
    for number in range(count):
        if not (travels & (stage == number)).any():
            continue
        ranges = [routes.between(other, rank) if stage[other, rank] == number else [] for other in range(ranks)]
        arrives = [_tokens(each) for each in ranges]
        leaves = [
            _tokens(routes.between(rank, other) if stage[rank, other] == number else []) for other in range(ranks)
        ]
        rows = np.concatenate(arrives)
        order = None if (np.diff(rows) > 0).all() else torch.from_numpy(rows.argsort(kind="stable")).to(device)
        leaving = torch.from_numpy(np.searchsorted(held, np.concatenate(leaves))).to(device)
        received, sent = (tuple(map(len, each)) for each in (arrives, leaves))
        found.append(Stage(Tokens.of(_joined([*chain(*ranges)]), device), order, leaving, received, sent))
    return found


def send_keys(stage: Stage, k: Tensor, v: Tensor, peers: Peers) -> Arriving:
    """Send what others need of this rank's k (B, Hkv, S, D) and v (B, Hkv, S, Dv), and have theirs sent here."""
    rows = _packed(*(x.index_select(2, stage.leaving) for x in (k, v)))
    return _send(rows, stage.sent, stage.received, peers)


def keys_of(stage: Stage, arrived: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The k and v of a stage's keys, shaped as these are but for the tokens, of what `send_keys` brought."""
    rows = arrived if stage.order is None else arrived.index_select(0, stage.order)
    return unpacked(rows, k, v)


def send_back(stage: Stage, dk: Tensor, dv: Tensor, peers: Peers) -> Arriving:
    """Send gradients of a stage's keys to the ranks that hold these, and have theirs sent here: as `add_back` wants."""
    rows = _packed(dk, dv)
    if stage.order is not None:
        rows = torch.empty_like(rows).index_copy_(0, stage.order, rows)
    return _send(rows, stage.received, stage.sent, peers)


def add_back(stage: Stage, arrived: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add what `send_back` brought to dk and dv, rank by rank: the order of the sum doesn't depend on who was first."""
    at, parts = stage.leaving.split(stage.sent), arrived.split(stage.sent)
    for tokens, rows in zip(at, parts, strict=True):
        for dx, part in zip((dk, dv), unpacked(rows, dk, dv), strict=True):
            dx.index_add_(2, tokens, part)


def unpacked(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of tokens as (B, Hkv, tokens, D) and (B, Hkv, tokens, Dv): views."""
    x = rows.view(len(rows), *k.shape[:2], k.shape[3] + v.shape[3]).permute(1, 2, 0, 3)
    return x[..., : k.shape[3]], x[..., k.shape[3] :]


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """(tokens, numbers of a token), dense."""
    return torch.cat((k, v), 3).permute(2, 0, 1, 3).flatten(1).contiguous()


def _send(rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], peers: Peers) -> Arriving:
    """An exchange of rows, so many of them for each rank, that goes on while others compute."""
    arriving = rows.new_empty((sum(received), rows.shape[1]))
    work = peers.all_to_all(arriving.view(torch.uint8), rows.view(torch.uint8), received, sent, wait=False)
    return Arriving(work, arriving, rows)


def _tokens(ranges: list[tuple[int, int]]) -> IntArray:
    """The tokens of ranges, one after the other."""
    return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in ranges)])


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of several ranks as ranges that ascend and don't touch."""
    start, stop = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    _, start, stop = union(np.zeros(len(start), dtype=np.int64), start, stop)
    return list(zip(start.tolist(), stop.tolist(), strict=True))
