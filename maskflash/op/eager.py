"""Calls that read tables on the host -> what torch.compile leaves as they are: imported with dynamo, see `later`."""

from __future__ import annotations

from typing import Any

import torch

from maskflash.op.page_table import PageTable
from maskflash.op.paged import Paged

_REASON = "calls with pages read lengths and tables on the host"

for _owner, _name in ((Paged, "paged"), (PageTable, "append")):
    _call: Any = vars(_owner)[_name]
    setattr(_owner, _name, torch.compiler.disable(_call, reason=_REASON))
