"""The name of an engine -> the engine."""

from __future__ import annotations

from typing import Final

import torch

from maskflash.engines.engine import Engine
from maskflash.engines.flex import Flex
from maskflash.functions.slots import aside

ENGINES: Final[dict[str, Engine]] = {engine.name: engine for engine in (Flex(),)}


@aside
def unavailable(name: str, device: torch.device) -> str | None:
    """Why an engine can't serve tensors on a device, with the fix; None where it can."""
    return ENGINES[name].unavailable(device)
