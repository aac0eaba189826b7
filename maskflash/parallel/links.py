"""How fast a rank computes and how fast bytes reach it -> the time of a step: the cost model of plans.

A rank computes and receives at the same time, so that its step takes as long as the slower of both:

    compute     operations / flops
    transfer    messages * latency + max(bytes received, bytes sent) / bandwidth

Forward has 4 * pairs * head_dim operations, and backward 2.5 times as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Links:
    """What a user measures of ranks and of what connects them.

    Attributes:
        flops: operations of attention that a rank computes in a second.
        bandwidth: bytes that a rank receives in a second, while it sends as many.
        latency: seconds that a message takes beside its bytes.
    """

    flops: float
    bandwidth: float
    latency: float = 1e-5

    def compute(self, pairs: float, head_dim: int, *, backward: bool) -> float:
        """Seconds of a rank's own work: visible pairs, summed over batch rows and query heads."""
        return (10 if backward else 4) * pairs * head_dim / self.flops

    def transfer(self, received: float, sent: float, messages: float) -> float:
        """Seconds of what reaches a rank and what leaves it, in bytes."""
        return messages * self.latency + max(received, sent) / self.bandwidth


KNOWN: Final = {
    "nvlink": Links(flops=4e14, bandwidth=3e11, latency=5e-6),
    "infiniband": Links(flops=4e14, bandwidth=4.5e10, latency=1e-5),
    "cpu": Links(flops=1e11, bandwidth=2e9, latency=1e-4),
}
"""Links by name: an H100's rate in 16 bits over NVLink and over a 400 Gbit/s adapter, and processes of one CPU."""
