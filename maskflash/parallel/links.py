"""How fast a rank computes and how fast bytes reach it -> the time of a step: the cost model of plans.

A rank computes while the keys of other ranks reach it, so that its step takes as long as the slower of both:

    compute     operations / flops
    transfer    messages * latency + max(bytes received, bytes sent) / bandwidth

Forward has 4 * pairs * head_dim operations, and backward 2.5 times as many. A layer's step, forward or backward, takes
as long as its slowest rank's: what a layer needs of other ranks is what these made of the layer before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Final

from maskflash.errors import ArgumentError, ArgumentTypeError
from maskflash.ground import arguments

_FORWARD: Final = 4  # operations for each pair and element of a head: two products of a multiplication and an addition
_BACKWARD: Final = 10  # five products


@dataclass(frozen=True, slots=True)
class Links:
    """What a user measures of ranks and of what connects them.

    flops and bandwidth decide; measure them in the dtype and between the ranks of the run. flops: time `mf.attention`
    alone on one rank, at the tokens that a rank will hold, and divide 4 * visible pairs * query heads * head_dim by
    the seconds. bandwidth: let every rank send 64 MiB to the next one at once (`torch.distributed.batch_isend_irecv`),
    and divide the bytes by the seconds. latency: the same with 8 bytes.

    Attributes:
        flops: operations of attention that a rank computes in a second.
        bandwidth: bytes that a rank receives in a second, while it sends as many.
        latency: seconds that a message takes beside its bytes.

    Raises:
        ArgumentTypeError: a rate is no number.
        ArgumentError: a rate isn't finite and positive, or the latency is negative or not finite.
    """

    flops: float
    bandwidth: float
    latency: float = 1e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ArgumentTypeError(
                    f"Links: {field.name} is {arguments.by_type(value)}, expected a number, in units of a second"
                )
            least = "at least 0" if field.name == "latency" else "above 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name != "latency"):
                raise ArgumentError(f"Links: {field.name} is {value}, expected a finite number {least}")

    @staticmethod
    def of(value: Any) -> Links:
        """Links themselves, those of a name, or those of None: "nvlink".

        Raises:
            ArgumentTypeError: it is none of these.
            ArgumentError: nothing has that name.
        """
        if value is None:
            return KNOWN["nvlink"]
        if isinstance(value, str):
            arguments.choice("Links", "the name", value, tuple(KNOWN))
            return KNOWN[value]
        arguments.instance("Links", "links", value, Links, "measure Links(flops=, bandwidth=), or name one")
        found: Links = value
        return found

    def compute(self, pairs: Any, head_dim: int, *, backward: bool) -> Any:
        """Seconds of a rank's own work: visible pairs, summed over batch rows and query heads; also of an array."""
        return (_BACKWARD if backward else _FORWARD) * pairs * head_dim / self.flops

    def transfer(self, received: float, sent: float, messages: float) -> float:
        """Seconds of what reaches a rank and what leaves it, in bytes."""
        return messages * self.latency + max(received, sent) / self.bandwidth


KNOWN: Final = {
    "nvlink": Links(flops=4e14, bandwidth=3e11, latency=5e-6),
    "infiniband": Links(flops=4e14, bandwidth=4.5e10, latency=1e-5),
    "cpu": Links(flops=1e11, bandwidth=2e9, latency=1e-4),
}
"""Links by name: an H100's rate in 16 bits over NVLink and over a 400 Gbit/s adapter, and processes of one CPU."""
