"""A call on a GPU -> which kernels run its forward and its backward, and why: the one place that decides between them.

    asked for by                    runs                                where it doesn't serve a call
    kernels="portable"              portable Triton, on every device    an error
    kernels="hopper"                Hopper's own: see `hopper.py`       an error
    precision="fp8"                 portable, in 8 bits: see `fp8.py`   an error
    MASKFLASH_KERNELS=hopper        Hopper's own                        portable
    nothing                         portable Triton

The backward of Hopper's own serves fewer calls than its forward: where the forward is asked for
and it doesn't serve, the portable one runs, and explanations say so. Hopper's own kernels have not run on a GPU: until
they have, nobody gets them who doesn't ask. Few rows over many keys have a forward of their own (`few.py`), whatever is
asked for here. Whether Hopper's own serve a call is found out where they are wanted alone: to ask loads Gluon.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from maskflash.analysis.problem import Problem
from maskflash.backends.triton import device as gpu
from maskflash.backends.triton import fp8, hopper
from maskflash.backends.triton.few import are_few
from maskflash.errors import BackendError
from maskflash.scores.strength import Kernels, Precision, Strength

VARIABLE: Final = "MASKFLASH_KERNELS"
_UNMEASURED: Final = "since no other has been measured on a GPU"


class KernelChoice(NamedTuple):
    """Which kernel runs forward.

    Attributes:
        pass_name: "forward" for the portable one, or "hopper"; ahead of a call also "split", that of few rows.
        why: in words, beginning with "as" or "since".
    """

    pass_name: Literal["forward", "hopper", "split"]
    why: str


class BackwardChoice(NamedTuple):
    """Which kernels run backward.

    Attributes:
        own: Hopper's own; else the portable ones.
        why: in words, beginning with "as" or "since".
    """

    own: bool
    why: str


def choose(problem: Problem, q: Tensor, k: Tensor, v: Tensor, strength: Strength) -> KernelChoice:
    """The kernel of a call's forward.

    Args:
        problem: the mask at the call's lengths, and its tiles.
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Skv, D).
        v: (B, Hkv, Skv, Dv).
        strength: how the call is to be computed.

    Raises:
        BackendError: what it asks for doesn't serve it; or the environment asks for what there is not.
    """
    if strength.precision == "fp8":
        fp8.check(q, k, v, problem.block_size)

    def why_not() -> str | None:
        return hopper.why_not(problem, q, v, hopper.FORWARD) or _in_full(strength.precision)

    return _choose(strength.kernels, why_not)


def ahead(problem: Problem, kernels: Kernels, precision: Precision) -> KernelChoice:
    """The same ahead of a call, as far as lengths and device decide it; dtype and head dims may be against it yet.

    Args:
        problem: the mask at the call's lengths, and its tiles.
        kernels: as asked for.
        precision: as asked for.

    Raises:
        BackendError: as calls will.
    """
    lengths = problem.q_len, problem.kv_len
    if precision == "tf32x3":
        gpu.precision(torch.float32, precision)
    if precision == "fp8":
        if reason := fp8.why_not_at(problem.device, *lengths, problem.block_size):
            raise fp8.refusal(reason)
    elif are_few(*lengths):
        return KernelChoice("split", "since rows are few")
    return _choose(kernels, lambda: hopper.why_not_at(problem, hopper.FORWARD) or _in_full(precision))


def of_text(problem: Problem, q: Tensor, v: Tensor, kernels: Kernels, precision: Precision) -> KernelChoice:
    """The kernel whose text is shown: that of a call with these tensors on its GPU, or of one on a GPU that it suits.

    Args:
        problem: as in `choose`.
        q: as in `choose`.
        v: as in `choose`.
        kernels: as asked for.
        precision: as asked for.

    Raises:
        BackendError: as calls will.
    """
    why_not = hopper.why_not if problem.device.type == "cuda" else hopper.why_not_text
    return _choose(kernels, lambda: why_not(problem, q, v, hopper.FORWARD) or _in_full(precision))


def choose_backward(problem: Problem, q: Tensor, v: Tensor, strength: Strength) -> BackwardChoice:
    """The kernels of a call's backward.

    Args:
        problem: the mask at the call's lengths, and its tiles.
        q: (B, Hq, Sq, D).
        v: (B, Hkv, Skv, Dv).
        strength: how the call is to be computed.
    """
    return _choose_backward(strength.kernels, lambda: hopper.why_not(problem, q, v, hopper.BACKWARD))


def backward_ahead(problem: Problem, kernels: Kernels) -> BackwardChoice:
    """The same ahead of a call, as far as lengths and device decide it; dtype and head dims may be against it yet.

    Args:
        problem: the mask at the call's lengths, and its tiles.
        kernels: as asked for.
    """
    return _choose_backward(kernels, lambda: hopper.why_not_at(problem, hopper.BACKWARD))


def _choose(kernels: Kernels, why_not: Callable[[], str | None]) -> KernelChoice:
    wanted, why = _wanted(kernels)
    if wanted != "hopper":
        return KernelChoice("forward", why)
    obstacle = why_not()
    if obstacle is None:
        return KernelChoice("hopper", why)
    if kernels == "hopper":
        raise BackendError(
            f'attention: kernels is "hopper", whose kernel doesn\'t serve this call: {obstacle}; leave kernels out'
        )
    return KernelChoice("forward", f"since what {VARIABLE}={wanted} asks for doesn't serve this call: {obstacle}")


def _choose_backward(kernels: Kernels, why_not: Callable[[], str | None]) -> BackwardChoice:
    wanted, why = _wanted(kernels)
    obstacle = why_not() if wanted == "hopper" else None
    if obstacle is not None:
        return BackwardChoice(False, f"since Hopper's own doesn't serve this call: {obstacle}")
    return BackwardChoice(wanted == "hopper", why)


def _wanted(kernels: Kernels) -> tuple[str, str]:
    """Which kernels a call or the environment wants, and who says so."""
    if kernels != "auto":
        return kernels, "as asked for"
    wanted = _of_environment()
    return wanted, _UNMEASURED if wanted == "auto" else f"as {VARIABLE}={wanted} says"


def _of_environment() -> str:
    """What the environment asks for.

    Raises:
        BackendError: something that there is not.
    """
    found = os.environ.get(VARIABLE) or "auto"
    if found not in get_args(Kernels):
        raise BackendError(f"attention: {VARIABLE} is {found!r}, expected one of {', '.join(get_args(Kernels))}")
    return found


def _in_full(precision: Precision) -> str | None:
    return None if precision == "full" else f'its products are in 16 bits, got precision="{precision}"'
