"""The norm of each sample's own gradient over everything that trains.

Terms on plain linears, trained weights and biases of linears give theirs from the layer's input
and the gradient of its output, without forming gradients. What is left (norms, branches, functions
of W, tensors that several places share) is done sample by sample, exactly and slowly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.weight.persample import product_norms, sum_norms
from ..blocks.weight.provided import Term, Wrap
from ..core.batches import cut, size
from .layout import is_conv1d
from .slot import slots

Norms = Callable[[Tensor, Tensor], list[tuple[nn.Parameter, Tensor]]]


def sample_norms(model: nn.Module, trained: list[nn.Parameter], batch: Any,
                 loss: Callable[[Any], Tensor]) -> Tensor:
    """(B,) norms; see :meth:`burnish.Tuned.sample_norms`."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        n = size(batch)
        readers = _readers(model, {id(p) for p in trained})
        total, done = _ghosts(model, readers, batch, loss, n)
        rest = [p for p in trained if id(p) not in done]
        if rest:
            total = total + _one_by_one(rest, batch, loss, n).to(total.device)
        return total.sqrt()
    finally:
        for m, was in modes.items():
            m.training = was


def _readers(model: nn.Module, trained: set[int]) -> dict[nn.Module, list[Norms]]:
    """Linears -> what gives the norms of the tensors they alone read."""
    uses: Counter[int] = Counter()
    for m in model.modules():
        for p in (*m._parameters.values(), *getattr(m, "borrowed", ())):
            if p is not None:
                uses[id(p)] += 1
    alone = {i for i in trained if uses[i] == 1}
    found: dict[nn.Module, list[Norms]] = {}
    here = {module: slot for _, module, slot in slots(model)}
    for module in model.modules():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        todo = list(_own(module, alone))
        slot = here.get(module)
        terms = [] if slot is None else [slot.module_of(p) for p in slot.parts if p.place]
        plain = slot is None or all(
            isinstance(t, Term) and not isinstance(t, Wrap) for t in terms) and not any(
            p.branch for p in slot.parts)
        if slot is not None and plain:
            for part in slot.parts:
                term = slot.module_of(part)
                theta = [t for t in term.theta() if t.requires_grad]
                if part.place is not None and theta and all(id(t) in alone for t in theta):
                    todo.append(_of_term(term, part.place.rows))
        if plain and todo:
            found[module] = todo
    return found


def _own(module: nn.Module, alone: set[int]) -> Iterator[Norms]:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is not None and id(weight) in alone:
        yield lambda x, g: [(weight, product_norms(g, x))]
    if bias is not None and id(bias) in alone:
        yield lambda x, g: [(bias, sum_norms(g))]


def _of_term(term: Any, rows: tuple[int, int] | None) -> Norms:
    def norms(x: Tensor, g: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        g = g if rows is None else g[..., rows[0]: rows[1]]
        got = zip(term.theta(), term.sample_norms(x, g), strict=True)
        return [(t, v) for t, v in got if v is not None]

    return norms


def _ghosts(model: nn.Module, readers: dict[nn.Module, list[Norms]], batch: Any,
            loss: Callable[[Any], Tensor], n: int) -> tuple[Tensor, set[int]]:
    """Squared norms (B,) of what `readers` cover, and the ids of those tensors."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {m: [] for m in readers}
    with _watched(readers, calls), torch.enable_grad():
        value = loss(batch)
        if value.requires_grad:
            wanted = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(value, wanted, allow_unused=True)
    first = next(iter(model.parameters()))
    total, done = torch.zeros(n, device=first.device), set()
    for module, got in calls.items():
        if not got or any(x.shape[0] != n for x, _ in got):
            continue                                 # tokens of samples are mixed here
        x = torch.cat([x.reshape(n, -1, x.shape[-1]) for x, _ in got], 1)
        g = torch.cat([g.reshape(n, -1, g.shape[-1]) for _, g in got], 1) * n
        for norms in readers[module]:
            for p, value in norms(x, g):
                total = total + value.to(total.device)
                done.add(id(p))
    return total, done


@contextmanager
def _watched(modules: Any, calls: dict[nn.Module, list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple, kw: dict, out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            x = (args[0] if args else next(iter(kw.values()))).detach()
            out.register_hook(lambda g: calls[module].append((x, g.detach())))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _one_by_one(rest: list[nn.Parameter], batch: Any, loss: Callable[[Any], Tensor],
                n: int) -> Tensor:
    """Squared norms (B,) of `rest`, a forward and a backward per sample."""
    out = []
    for i in range(n):
        with torch.enable_grad():
            value = loss(cut(batch, i + 1, i))
            got = torch.autograd.grad(value, rest, allow_unused=True)
        out.append(sum((g.to(torch.promote_types(g.dtype, torch.float32)).square().sum()
                        for g in got if g is not None), torch.zeros((), device=value.device)))
    return torch.stack(out)
