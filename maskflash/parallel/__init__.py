"""Context parallel for any mask: a mask and a number of ranks -> a plan of shards, and attention on them.

`plan` says which tokens each rank holds, what it computes and what travels. `compile` makes the op that each rank
calls with its shard of q, k and v. docs/parallel.md leads through both.
"""

from maskflash.parallel.links import Links
from maskflash.parallel.planning import plan
from maskflash.parallel.search import Candidate
from maskflash.parallel.shard_plan import PlannedLayer, PlannedPass, ShardPlan
from maskflash.parallel.sharded_attention import ShardedAttention, compile

__all__ = [
    "Candidate",
    "Links",
    "PlannedLayer",
    "PlannedPass",
    "ShardPlan",
    "ShardedAttention",
    "compile",
    "plan",
]


def __dir__() -> list[str]:
    """What users may use."""
    return sorted(__all__)
