"""Calls that wait for other ranks -> what torch.compile leaves as they are: imported with dynamo, see `op/later.py`."""

from __future__ import annotations

from typing import Any

import torch

from maskflash.parallel.sharded_attention import ShardedAttention

_owner: Any = ShardedAttention
_owner.__call__ = torch.compiler.disable(_owner.__call__, reason="calls on shards wait for other ranks on the host")
