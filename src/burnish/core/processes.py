"""How many processes train together."""

from __future__ import annotations

import torch


def processes() -> int:
    """1 where nothing is distributed."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1
