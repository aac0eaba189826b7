"""What each rank is about to do, or its error -> every rank knows that all do the same, or all raise one error.

It comes before anything else is sent: a rank that held another mask, or that raised alone, would leave the others
waiting for keys. What is compared is a few numbers of each rank. Only where these differ do ranks tell more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskflash import errors
from maskflash.errors import ArgumentError, MaskflashError
from maskflash.parallel.peers import Ranks

Facts = Mapping[str, str]
"""What a call is, by name: of the same names on every rank, in the same order."""


def agree(operation: str, ranks: Ranks, facts: Facts | Exception, names: tuple[str, ...]) -> None:
    """Compare what ranks are about to do.

    The host waits for the slowest rank. Where the group has a CPU backend (gloo; torch's default has it beside NCCL)
    it waits for no GPU.

    Args:
        operation: what errors call it.
        ranks: all of them.
        facts: of this rank: a text for each of `names`, or the error that it has instead.
        names: what is compared.

    Raises:
        MaskflashError: of the lowest rank that has an error: of the same class and text on every rank.
        ArgumentError: the facts differ; the text says which, and on which ranks.
    """
    failed = isinstance(facts, Exception)
    hashes = [0] * len(names) if isinstance(facts, Exception) else [_hash(facts[name]) for name in names]
    told = ranks.gather(torch.tensor([int(failed), *hashes], device=_device(ranks))).cpu()
    if not told[:, 0].any() and bool((told == told[0]).all()):
        return
    said = _texts(ranks, [type(facts).__name__, str(facts)] if isinstance(facts, Exception) else dict(facts))
    for rank, text in enumerate(said):
        if isinstance(text, list):
            raise _raised(operation, rank, *text) from (facts if isinstance(facts, Exception) else None)
    differing = [name for name in names if len({facts[name] for facts in said}) > 1]
    raise ArgumentError(
        f"{operation}: {'; '.join(_differing(name, [facts[name] for facts in said]) for name in differing)}; expected "
        "the same call, under the same plan, on every rank"
    )


def _raised(operation: str, rank: int, kind: str, text: str) -> MaskflashError:
    """The error of a rank as all raise it."""
    ours = getattr(errors, kind, None)
    if isinstance(ours, type) and issubclass(ours, MaskflashError):
        return ours(f"{operation}: on rank {rank}: {text.removeprefix(f'{operation}: ')}")
    return ArgumentError(f"{operation}: on rank {rank}: {kind}: {text}")


def _differing(name: str, texts: list[str]) -> str:
    """What is said of one fact, and by whom."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        by_text.setdefault(text, []).append(rank)
    return f"{name} is " + ", ".join(f"{text} on {_named(who)}" for text, who in by_text.items())


def _named(ranks: list[int]) -> str:
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _texts(ranks: Ranks, value: Any) -> list[Any]:
    """What each rank says: values that JSON has."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device(ranks))
    lengths: list[int] = ranks.gather(torch.tensor([len(text)], device=text.device)).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=text.device)
    padded[: len(text)] = text
    texts: list[Tensor] = list(ranks.gather(padded).cpu())
    return [json.loads(bytes(found[:length].tolist())) for found, length in zip(texts, lengths, strict=True)]


def _device(ranks: Ranks) -> torch.device:
    """Where small tensors are exchanged: on the CPU, if the group has a backend for it."""
    if "cpu:" in dist.get_backend_config(ranks.everyone[0].group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
