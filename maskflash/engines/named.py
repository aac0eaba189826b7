"""The name of an engine -> the engine."""

from __future__ import annotations

from typing import Final

import torch

from maskflash.engines.cudnn import Cudnn
from maskflash.engines.engine import Engine
from maskflash.engines.fa4 import FlashAttention4
from maskflash.engines.flashinfer import FlashInfer
from maskflash.engines.flex import Flex
from maskflash.engines.magi import Magi
from maskflash.functions.slots import aside

_ALL: Final = (Flex(), Cudnn(), FlashAttention4(), Magi(), FlashInfer())
ENGINES: Final[dict[str, Engine]] = {engine.name: engine for engine in _ALL}


@aside
def unavailable(name: str, device: torch.device) -> str | None:
    """Why an engine can't serve tensors on a device, with the fix; None where it can."""
    return ENGINES[name].unavailable(device)
