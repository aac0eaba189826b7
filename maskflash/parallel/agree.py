"""What each rank is about to do, or its error -> every rank knows that all do the same, or every rank raises one error.

It comes before anything else is sent: a rank that held another mask, or had raised alone, would leave the others waiting
for keys. What is compared is a few numbers from each rank. Only where these differ do ranks tell each other more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from maskflash import errors
from maskflash.errors import ArgumentError, MaskflashError

_OPERATION = "parallel attention"

Facts = Mapping[str, str]
"""What a call is, by name: of the same names on every rank, in the same order."""


def agree(group: Any, facts: Facts | Exception, names: tuple[str, ...]) -> None:
    """Compare what ranks are about to do.

    The host waits for the slowest rank. On a group that has a CPU backend (gloo; torch's default has it beside NCCL)
    nothing waits for a GPU.

    Args:
        group: the ranks; None for all.
        facts: of this rank: a text for each of `names`, or the error that it has instead.
        names: what is compared.

    Raises:
        MaskflashError: of the lowest rank that has an error: the same kind and text on every rank.
        ArgumentError: the facts differ; the text says which, and on which ranks.
    """
    failed = isinstance(facts, Exception)
    hashes = [0] * len(names) if isinstance(facts, Exception) else [_hash(facts[name]) for name in names]
    mine = torch.tensor([int(failed), *hashes], device=_device(group))
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    told = torch.stack(every).cpu()
    if bool((told == told[0]).all()) and not failed:
        return
    said: list[Any] = [None] * len(every)
    dist.all_gather_object(said, _told(facts), group=group)
    for rank, (kind, text) in enumerate(said):
        if kind is not None:
            raise _raised(rank, kind, text) from (facts if isinstance(facts, Exception) else None)
    differing = "; ".join(_differing(name, [each[name] for _, each in said]) for name in names if _differ(name, said))
    raise ArgumentError(f"{_OPERATION}: {differing}; expected the same call, of the same plan, on every rank")


def _told(facts: Facts | Exception) -> tuple[str | None, Any]:
    return (type(facts).__name__, str(facts)) if isinstance(facts, Exception) else (None, dict(facts))


def _raised(rank: int, kind: str, text: str) -> MaskflashError:
    """The error of a rank as all raise it."""
    ours = getattr(errors, kind, None)
    if isinstance(ours, type) and issubclass(ours, MaskflashError):
        return ours(f"{_OPERATION}: on rank {rank}: {text}")
    return ArgumentError(f"{_OPERATION}: on rank {rank}: {kind}: {text}")


def _differ(name: str, said: list[Any]) -> bool:
    return len({each[name] for _, each in said}) > 1


def _differing(name: str, texts: list[str]) -> str:
    """What is said of one fact, and by whom."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        by_text.setdefault(text, []).append(rank)
    return f"{name} is " + ", ".join(f"{text} on {_ranks(who)}" for text, who in by_text.items())


def _ranks(ranks: list[int]) -> str:
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _device(group: Any) -> torch.device:
    """Where the group's backends take a small tensor: the CPU if one of them is there."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
