"""How many processes train together, and tensors of which each holds a part."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, nearest

#: how a model may stand in several processes: whole in each, or in shares
SHARDS = ("ddp", "fsdp2")


def check_shard(name: str | None) -> None:
    """ConfigError for a name that is none of :data:`SHARDS`."""
    if name not in (None, *SHARDS):
        raise ConfigError(f"shard={name!r}: expected {' or '.join(SHARDS)}"
                          f"{nearest(str(name), SHARDS)}")


def processes() -> int:
    """1 where nothing is distributed."""
    return torch.distributed.get_world_size() if _together() else 1


def first() -> bool:
    """Is this the process that writes files for all?"""
    return not _together() or torch.distributed.get_rank() == 0


def wait() -> None:
    """Until every process is here."""
    if _together():
        torch.distributed.barrier()


def leave(code: int = 0) -> None:
    """Ends this process, whose work is done, where several train together; one alone goes on.

    Their group is given up first. gloo's threads abort an exit of the usual kind once in some
    thirty on a busy machine ("terminate called without an active exception"), and a run that
    finished would be told to have failed: what others registered for an exit is run, then this one
    ends at once.
    """
    if not _together():
        return
    if code == 0:                               # who failed waits for nobody
        torch.distributed.barrier()             # one that left first would take its store along
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def anywhere(true: bool, group: Any = None) -> bool:
    """Is it so in any of the processes, each of which asks? What one of them refuses the others
    must refuse too: they would wait for it."""
    if not _together():
        return true
    device = "cpu" if "gloo" in torch.distributed.get_backend(group) else \
        torch.accelerator.current_accelerator()
    flag = torch.tensor(int(true), dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
    return bool(flag.item())


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(t: Any) -> bool:
    """Does each process hold a part of it only (a DTensor)?"""
    return isinstance(t, Tensor) and hasattr(t, "full_tensor")


def here(t: Tensor) -> Tensor:
    """The part that this process holds, sharing its memory; all of a tensor that is not sharded."""
    return t.detach().to_local() if is_sharded(t) else t      # type: ignore[attr-defined]


def gathered(t: Tensor) -> Tensor:
    """All of it, in every process, each of which must ask."""
    return t.detach().full_tensor() if is_sharded(t) else t   # type: ignore[attr-defined]


def share(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole `value` that this process holds of `like`; nobody is asked."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    made: Any = distribute_tensor(value, like.device_mesh, like.placements,  # type: ignore[attr-defined]
                                  src_data_rank=None)
    return made.to_local()


def alike(value: Tensor, like: Tensor) -> Tensor:
    """A whole value sharded as `like` is, whose shape it has."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor

    mine = share(value, like).to(here(like).device)
    return DTensor.from_local(mine, like.device_mesh, like.placements,  # type: ignore[attr-defined]
                              run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def assign(t: Tensor, value: Tensor) -> None:
    """``t.copy_(value)`` of a whole value; of a sharded `t` each process takes its part."""
    here(t).copy_(share(value, t))
