"""A tuned model spread over processes: FSDP2, with what trains beside the base whole in each.

What is large and what is small are held in two ways (docs/decisions):

    matrices of the base, frozen or trained         sharded by ``fully_shard``, block by block
    what was added, vectors, and heads that train   whole in every process

Parts that read, score, resize or step what was added find it as they would in one process; its
gradients are averaged over the processes at the end of each backward, so that all take one step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ..blocks.tape.segment import Segment
from ..blocks.tape.unmade import Logits
from ..blocks.update.step import compose, plan_of
from ..core.errors import ConfigError, RecipeError
from ..core.processes import processes
from .spread import Average, Shards, let_go
from .stages import stages_of
from .swap import ATTR

if TYPE_CHECKING:
    from .tuned import Tuned

def shard(tuned: Tuned, mesh: Any = None, *, offload: bool = False) -> Tuned:
    """Spread the model over the processes that train it, in place (FSDP2); returns the handle.

    Called in every process, after :func:`burnish.tune` and before ``tuned.optimizer``. Each block
    becomes a unit of ``torch.distributed.fsdp.fully_shard``, the rest another: a process holds
    1 / n of the base's matrices, where they train with their gradients and moments, and gathers a
    block while it runs. What was added, vectors, and a head that trains stay whole, with their
    gradients averaged after each backward. All processes start from the first one's values of what
    trains.

    mesh: of one dimension (``torch.distributed.init_device_mesh``); default all processes, on the
        model's device type or the accelerator there is.
    offload: the shards wait on the host, and are stepped there.

    ``tuned.save`` is then called in every process: the first one writes the file that one process
    would have written. Raises ConfigError where no processes were started, RecipeError for parts
    that cannot act on parts of weights; nothing is changed then.
    """
    tuned.check_ready()
    if tuned.state.shards is not None:
        raise ConfigError("this model is sharded already")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ConfigError("shard spreads a model over processes, and none have been started "
                          "together: run the script with torchrun --nproc-per-node 2, and call "
                          "torch.distributed.init_process_group() first")
    if tuned.current_optimizer is not None:
        raise ConfigError("the optimizer holds the whole parameters: call shard before "
                          "tuned.optimizer(...)")
    check(tuned)
    mesh = _mesh(tuned.model) if mesh is None else mesh
    if mesh.ndim != 1:
        raise ConfigError(f"shard takes a mesh of one dimension, not {mesh.ndim}")
    from ..formats.written import read_base

    if not any(isinstance(p, FakeTensor) for p in tuned.model.parameters()):
        read_base(tuned)                         # names and content of the base, while it is whole
    stay = _stay(tuned)
    _alike(tuned, stay, mesh)
    _spread(tuned, set(stay.values()), mesh, offload)
    average = Average(mesh.get_group(), lambda: tuned.steps.still)
    tuned.state.shards = Shards(mesh, offload, average)
    for adapter in tuned.adapters.values():
        for name in adapter.selected:
            adapter.selected[name] = tuned.model.get_parameter(name)
    tuned.adapters.set_trainable()
    return tuned



def check(tuned: Tuned) -> None:
    """Raises RecipeError (ConfigError) for what cannot act on a model that is sharded."""
    parts, recipe = list(tuned.recipe), tuned.recipe
    if held := next((m.name for a in tuned.adapters.values() for m in a.recipe
                     if "storage" in m.axes()), None):
        raise RecipeError(f"{held} holds the frozen weights as codes, which are no parameters and "
                          "which FSDP2 leaves whole in every process; drop it, or let every "
                          "process hold the model (DistributedDataParallel)")
    answers = [m.optimizer() for m in parts if "optimizer" in m.axes()]
    plan = plan_of(answers)
    if plan.in_backward:
        raise RecipeError(f"{plan.names['step site']} steps each tensor before {processes()} "
                          "processes have shared its gradient; step after backward")
    if apart := next((m.name for m in parts if "activations" in m.axes()
                      and isinstance(a := m.activations(tuned.anatomy), Segment)
                      and not isinstance(a.run, str)), None):
        raise RecipeError(f"{apart} runs blocks one behind the other in a way of its own, and "
                          "FSDP2 stands between them to gather and free each; take checkpoint")
    if staged := stages_of(tuned):
        raise RecipeError(f"{recipe} trains in {len(staged)} stages, which add adapters to a whole "
                          "model; train it in one process, or under DistributedDataParallel")
    if bn := next((n for n, m in tuned.model.named_modules() if _moves(m)), None):
        raise ConfigError(f"{bn} keeps running statistics of the rows that its process sees, so "
                          "they would part; convert it with nn.SyncBatchNorm, or fix it "
                          "(eval(), track_running_stats=False)")
    spread = [n for n, p in tuned.named_parameters() if n not in _stay(tuned)]
    if not spread:
        return
    what = f"{len(spread)} weights of the base train ({spread[0]}), and FSDP2 shards them"
    made = type(compose(answers, [("probe", nn.Parameter(torch.zeros(1)))], lr=0.0))
    if made not in (torch.optim.AdamW, torch.optim.SGD):
        names = " + ".join(m.name for m in parts if "optimizer" in m.axes())
        raise RecipeError(f"{what}, while {names} reads whole tensors; take adamw or sgd for them, "
                          "or train what is added (lora), which stays whole")
    if other := [m.name for m in parts if {"controller", "objective"} & set(m.axes())
                 and "activations" not in m.axes()]:
        raise RecipeError(f"{what}, while {' and '.join(other)} reads whole tensors; train what is "
                          "added (lora) beside it, which stays whole, or drop it")


def _moves(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats \
        and not isinstance(m, nn.SyncBatchNorm) and m.training


# -- what is done --------------------------------------------------------------------------------
def _stay(tuned: Tuned) -> dict[str, nn.Parameter]:
    """What every process holds whole: what was added, vectors (backward runs a norm of one block
    again while the next one is gathered), and a head that trains."""
    heads = tuple(f"{h}." for h in tuned.anatomy.head) \
        if tuned.anatomy.head_kind == "classification" else ()
    mine = {n for a in tuned.adapters.values() for n in a.selected}
    return {n: p for n, p in tuned.model.named_parameters()
            if f".{ATTR}." in f".{n}" or p.dim() < 2 or n in mine and n.startswith(heads)}


def _mesh(model: nn.Module) -> Any:
    kind = next(model.parameters()).device.type
    found = torch.accelerator.current_accelerator()
    if kind == "cpu" and found is not None and torch.distributed.get_backend() != "gloo":
        kind = found.type
    return torch.distributed.init_device_mesh(kind, (processes(),))


@torch.no_grad()
def _alike(tuned: Tuned, stay: dict[str, nn.Parameter], mesh: Any) -> None:
    """The first process's values of what trains and what moves, in all of them."""
    group = mesh.get_group()
    source = torch.distributed.get_global_rank(group, 0)
    for p in stay.values():
        p.data = p.data.to(mesh.device_type)
    for _, t in sorted({**dict(tuned.named_parameters()), **stay,
                        **dict(tuned.model.named_buffers())}.items()):
        flat = t.detach().to(mesh.device_type).contiguous()
        torch.distributed.broadcast(flat, source, group=group)
        t.detach().copy_(flat)


def _spread(tuned: Tuned, stay: set[nn.Parameter], mesh: Any, offload: bool) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    kw: dict[str, Any] = {"mesh": mesh, "ignored_params": stay}
    if offload:
        kw["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    for block in tuned.anatomy.blocks:
        fully_shard(tuned.model.get_submodule(block.path), **kw)
    fully_shard(tuned.model, **kw)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        """What stands outside the blocks stays gathered for a backward, and for logits that wait
        for whoever reads them; where neither comes, it is let go."""
        if not torch.is_grad_enabled() and not any(
                isinstance(t, Logits) for t in pytree.tree_leaves(out)):
            let_go(tuned)

    tuned.model.register_forward_hook(after)
