"""Several processes, of which a simulation is the first: groups whose collectives move nothing.

Torch's own ``fake`` backend answers every collective at once, so that the code that trains in many
processes (FSDP2, DistributedDataParallel, the averages of :mod:`..engine.spread`) runs in one: it
makes the buffers it makes, keeps them as long as it does, and prefetches as it does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.processes import SHARDS, check_shard, processes

if TYPE_CHECKING:
    from ..engine.tuned import Tuned

def _forget_meshes() -> None:
    """What shares remember of earlier operators names a mesh, and equal meshes count as one."""
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()


#: names of the simulated groups begin here: no real group is ever called so
_APART = 1 << 40


@dataclass(frozen=True)
class World:
    """How many processes train together, and how the model stands in them.

    shard: one of :data:`SHARDS`; None in one process.  offload: the shares wait on the host.
    """

    size: int = 1
    shard: str | None = None
    offload: bool = False

    @classmethod
    def of(cls, size: int, shard: str | None, offload: bool) -> World:
        """Raises ConfigError for what cannot be."""
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"world_size={size!r}: expected a number of processes, 1 or more")
        check_shard(shard)
        if shard is not None and size == 1:
            raise ConfigError(f"shard={shard!r} is for several processes, and there is one: give "
                              "world_size=2 or more")
        if offload and shard != "fsdp2":
            raise ConfigError("shard_offload keeps the shares of shard='fsdp2' on the host; give "
                              "both")
        return cls(size, (shard or SHARDS[0]) if size > 1 else None, bool(offload))

    def settings(self) -> dict[str, Any]:
        """As :func:`burnish.simulate` takes them."""
        return {"world_size": self.size, "shard": self.shard, "shard_offload": self.offload}

    @contextlib.contextmanager
    def started(self, device: str) -> Iterator[Any]:
        """Inside, this is the first of so many processes. Yields their mesh; None for one process.
        Processes that were started in earnest are where they were afterwards."""
        if self.size == 1:
            yield None
            return
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist, c10d = torch.distributed, torch.distributed.distributed_c10d
        real, count, hook = c10d._world.default_pg, c10d._world.group_count, sys.excepthook
        backend = getattr(c10d, "_backend", None)
        _forget_meshes()
        c10d._world.default_pg = None
        c10d._world.group_count = count + _APART
        try:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.size)
            fake = c10d._world.default_pg
            try:
                yield dist.init_device_mesh(torch.device(device).type, (self.size,))
            finally:
                c10d._world.default_pg = real
                dist.destroy_process_group(fake)
        finally:
            c10d._world.default_pg, c10d._world.group_count = real, count
            c10d._backend, sys.excepthook = backend, hook
            _forget_meshes()

    def spread(self, tuned: Tuned, mesh: Any) -> None:
        """Give this process its share, where the model is sharded."""
        if self.shard == "fsdp2":
            from ..engine.sharded import shard

            shard(tuned, mesh, offload=self.offload)

    def wrap(self, tuned: Tuned) -> None:
        """What trains has its gradients averaged in buckets, where every process holds the model;
        as ``fit`` wraps it (a tensor that a batch does not reach is waited for by nobody)."""
        if self.shard == "ddp" and any(p.requires_grad for p in tuned.model.parameters()):
            wrapped = _Wrapped(tuned.model, find_unused_parameters=True, init_sync=False)
            wrapped.register_comm_hook(None, _sum)
            tuned.steps.through = wrapped


class _Wrapped(nn.parallel.DistributedDataParallel):
    """Without its advice, at the first forward, to look for no unused tensors: it is written to
    file 2 by C++, where no filter of warnings is asked."""

    def forward(self, *args: Any, **kw: Any) -> Any:
        with _unheard():
            return super().forward(*args, **kw)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def standing(tuned: Tuned) -> tuple[int, str | None]:
    """(how many real processes train it, how it stands in them)."""
    if tuned.state.shards is not None:
        return tuned.state.shards.mesh.size(), "fsdp2"
    wrapped = isinstance(tuned.steps.through, nn.parallel.DistributedDataParallel)
    return (processes(), "ddp") if wrapped else (1, None)


def _sum(_, bucket):                          # type: ignore[no-untyped-def]  # as torch asks
    """What the reducer does with a bucket by itself; a fake collective hands it no result."""
    torch.distributed.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
