"""Where a model's repeated blocks are, in the order in which they run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

from . import families


@dataclass(frozen=True)
class Block:
    """One of the repeated blocks. Paths are full; None where the block has no such part.

    index: position within its stack; `stack` names the run of blocks it belongs to (encoder and
        decoder, text and vision are different stacks).
    attn: the self-attention module, output projection included.  attn_out: the module whose
        (first) output is attention's result: the last linear, or the attention module itself
        where it reads that linear's weight past it (`nn.MultiheadAttention`).
    cross, cross_out: the same of cross-attention.
    mixer: what mixes tokens: `attn`, or a state-space mixer.
    mlp_in, mlp_out: first linears (fc1, or gate and up) and last (fc2, down); empty and None for
        a mixture of experts, whose module is `mlp`.
    mlp: the module that holds the MLP, if there is one below the block.
    """

    path: str
    index: int
    stack: str
    attn: str | None = None
    attn_out: str | None = None
    cross: str | None = None
    cross_out: str | None = None
    mixer: str | None = None
    mlp_in: tuple[str, ...] = ()
    mlp_out: str | None = None
    mlp: str | None = None
    norms: tuple[str, ...] = ()
    hidden_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None


def blocks_of(modules: dict[str, nn.Module]) -> list[Block]:
    """Repeated composite children of lists, outermost first; stages are looked into.

    Counted per stack. Where some hold linears, lists of bare convolutions are no blocks, those of
    a U-Net's levels excepted.
    """
    found = _walk(modules, "", None)
    rich = [b for b in found if _linears(modules[b.path])
            or b.path.rpartition(".")[0].rpartition(".")[2] in families.TURNS] or found
    counts: Counter[str] = Counter()
    out = []
    for b in rich:
        out.append(replace(b, index=counts[b.stack]))
        counts[b.stack] += 1
    return out


def _walk(modules: dict[str, nn.Module], path: str, stack: str | None) -> list[Block]:
    children = {f"{path}.{n}" if path else n: m for n, m in modules[path].named_children()
                if f"{path}.{n}".lstrip(".") in modules}
    repeated, out = _repeated(path, modules[path], children), []
    for child, module in children.items():
        name = stack or _stack(path)
        if child in repeated and not _is_stage(child, module, modules):
            out.append(Block(child, 0, name))
        else:
            out += _walk(modules, child, name if child in repeated else stack or _alone(
                child, module))
    return sorted(out, key=lambda b: families.turn(b.path.removeprefix(f"{path}.")))


def _alone(path: str, module: nn.Module) -> str | None:
    """The name of the run of blocks in a stage that stands by itself (a U-Net's middle)."""
    return path if families.STAGE.search(type(module).__name__) else None


def _repeated(path: str, module: nn.Module, children: dict[str, nn.Module]) -> set[str]:
    """Those children of a list that are blocks or stages."""
    leaf = path.rpartition(".")[2]
    if not isinstance(module, nn.ModuleList | nn.Sequential) or families.NOT_BLOCKS.search(leaf):
        return set()
    made = {c: type(m).__name__ for c, m in children.items()
            if not isinstance(m, nn.ModuleList | nn.Sequential | nn.ModuleDict)
            and any(g._parameters or len(g._modules) for g in m.children())}
    kinds = Counter(made.values())
    if all(families.STAGE.search(k) for k in made.values()):
        return set(made)
    if len(made) > len(kinds) or (len(made) == 1 and leaf in families.LISTS):
        return {c for c, k in made.items() if kinds[k] > 1 or len(made) > 2 or len(made) == 1}
    return set()


def _stack(path: str) -> str:
    """The name of a run of blocks: its container, without a closing number (layer1..layer4)."""
    return re.sub(r"\d+$", "", path).rstrip(".")


def _is_stage(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """It only holds the blocks of one resolution: by its class, or by a list of blocks in it."""
    if families.STAGE.search(type(module).__name__):
        return True
    for inner, m in module.named_modules(prefix=path):
        if inner != path and inner.rpartition(".")[2] in families.LISTS and inner in modules:
            children = {f"{inner}.{n}": c for n, c in m.named_children()}
            if any(_linears(children[c]) > 1 for c in _repeated(inner, m, children)):
                return True
    return False


def _linears(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Linear | nn.MultiheadAttention)
               or type(m).__name__ == "Conv1D" for m in module.modules())
