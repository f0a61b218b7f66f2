"""What a handle knows of a model that is spread over processes (sharded.py spreads it)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.processes import is_sharded

if TYPE_CHECKING:
    from .tuned import Tuned

#: entries of one collective: a bucket of gradients is copied while it is on its way
BUCKET = 1 << 22


class Shards:
    """What a sharded handle knows.

    mesh: the processes.  offload: the parts wait on the host.  average: of gradients of whole
    tensors.
    """

    def __init__(self, mesh: Any, offload: bool, average: Average):
        self.mesh, self.offload, self.average = mesh, offload, average


def let_go(tuned: Tuned) -> None:
    """The model's parameters are the shares again, where a forward has left them gathered."""
    if tuned.state.shards is not None:
        from torch.distributed.fsdp import FSDPModule

        for m in tuned.model.modules():
            if isinstance(m, FSDPModule):
                m.reshard()


def refuse(tuned: Tuned, what: str) -> None:
    """ConfigError for what needs the whole model, where it is sharded."""
    if tuned.state.shards is not None:
        raise ConfigError(f"this model is sharded over {tuned.state.shards.mesh.size()} processes, "
                          f"and {what} needs all of its weights: tuned.save(folder) there, then "
                          "burnish.load(model, folder) on the whole model")


def check_own(tuned: Tuned) -> None:
    """ConfigError where somebody else has sharded what was added."""
    if tuned.state.shards is not None:
        return
    found = next((n for n, p in tuned.model.named_parameters() if is_sharded(p)), None)
    if found is not None:
        raise ConfigError(f"{found} was sharded since the model was tuned; what is added has to "
                          "stay whole, and its gradients shared: call burnish.shard(tuned) in "
                          "place of fully_shard or accelerator.prepare(model)")


class Average:
    """Gradients of tensors that every process holds whole: their mean over the processes, once at
    the end of each backward. A mean that is already there stays as it is, so micro-batches add up.

    still: a pass is under way that is each process's own.
    """

    def __init__(self, group: Any, still: Callable[[], bool]):
        self.group, self.still = group, still
        self.size = torch.distributed.get_world_size(group)
        self.params: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        self._due = False

    def watch(self, params: Iterable[nn.Parameter]) -> None:
        """These from now on."""
        for hook in self._hooks:
            hook.remove()
        self.params = [p for p in params if not is_sharded(p)]
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.params]

    def _arrived(self, p: Tensor) -> None:
        if not self._due and not self.still():
            self._due = True
            torch.autograd.Variable._execution_engine.queue_callback(self._mean)

    @torch.no_grad()
    def _mean(self) -> None:
        self._due = False
        there = torch.tensor([p.grad is not None for p in self.params], dtype=torch.int32,
                             device=self.params[0].device)
        torch.distributed.all_reduce(there, group=self.group)
        bucket: list[nn.Parameter] = []
        for p, count in zip(self.params, there.tolist(), strict=True):
            if not count:
                continue                         # used nowhere in this batch
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            full = sum(q.numel() for q in bucket) + p.numel() > BUCKET
            if bucket and (full or bucket[0].grad.dtype != p.grad.dtype
                           or bucket[0].device != p.device):
                self._reduce(bucket)
                bucket = []
            bucket.append(p)
        if bucket:
            self._reduce(bucket)

    def _reduce(self, bucket: list[nn.Parameter]) -> None:
        grads = [p.grad for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in grads]).div_(self.size)
        torch.distributed.all_reduce(flat, group=self.group)
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def watch(tuned: Tuned) -> None:
    """A new optimizer: what trains now has its gradients averaged."""
    check_own(tuned)
    if tuned.state.shards is not None:
        tuned.state.shards.average.watch(p for _, p in tuned.named_parameters())
