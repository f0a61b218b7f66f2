"""Bytes: what waits for backward, what the optimizer holds, what was promised."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from ...core.recipe import parse
from ...engine.slot import slots
from .common import Skip, fresh, join, make, method_of, ready, recipe, where

#: samples of the batch: tokens must outweigh what is kept per output
SAMPLES = 16


def simulated_is_measured(name: str, model: str) -> Skip | None:
    """The promise: the simulated peak is within 3 % of the measured one; of a method that data
    decide about (`by_data`) it is not below. Of a run in stages in which some tensors rest, the
    dearest stage is measured."""
    from ...engine.stages import begin, stages_of
    from ...memory import measure, simulate
    from .common import split

    net, batch = fresh(model, text=recipe(name))
    targets = split(model)[1]
    if targets is not None:
        return Skip("simulate takes the default targets of a recipe")
    promise = simulate(copy.deepcopy(net), recipe(name), batch)
    tuned = join(net, recipe(name), model, head="auto")
    stages = stages_of(tuned)
    if any(s.only for s in stages):
        begin(tuned, stages[list(promise.stages).index(promise.stage)])
    tuned.optimizer(lr=1e-3)
    truth = measure(tuned, batch)
    ratio = promise.peak_bytes / truth.peak_bytes
    less = ratio > 1 and method_of(name).by_data
    assert less or abs(ratio - 1) <= 0.03, \
        f"promised {promise.peak_bytes:,}, took {truth.peak_bytes:,}"
    return None


def _says_nothing_kept(name: str) -> Skip | None:
    cls = method_of(name)
    if not {"delta", "mixture"} & set(cls.axes()):
        return Skip("adds to no weight")
    return None if hasattr(cls, "per_token") else Skip("declares no per_token(place)")


def _says_no_state(name: str) -> Skip | None:
    cls = method_of(name)
    if "optimizer" not in cls.axes():
        return Skip("no optimizer")
    return None if hasattr(cls, "state_bytes") else \
        Skip("declares no state_bytes(shape, itemsize)")


@where(_says_nothing_kept)
def keeps_what_it_says(name: str, model: str) -> Skip | None:
    """Between forward and backward a delta, or the experts of a linear, keep what stock autograd
    keeps for a weight that trains (that is frozen, with ``keeps_input = False``), and
    `per_token(place)` numbers per token and `per_forward(place)` more; nothing of the weight's
    size. Of a delta the numbers per token are exact: what does not grow with the tokens falls out
    between two batches."""
    cls = method_of(name)
    text = f"{recipe(name)} + lean(on=False)"
    tuned, batch, base = make(name, model, torch.float32, text=text, batch=SAMPLES)
    method = tuned.recipe.named(name)
    parts = [(path, p) for path, _, slot in slots(tuned.model) for p in slot.parts
             if p.key.startswith(name)]
    behind = {path for path, p in parts if p.branch is not None}         # experts of a linear
    places = {p.place for _, p in parts if p.place is not None}
    places |= {p for p in tuned.anatomy.places if p.path in behind}
    if any(p.kind != "linear" or p.rows for p in places):
        return Skip("the closed form is for whole linear layers")
    for p in base.parameters():
        p.requires_grad_(False)
    for place in places:
        owner = base.get_submodule(place.path)
        if getattr(cls, "keeps_input", True):
            place.stored(owner).requires_grad_(True)
        elif getattr(owner, "bias", None) is None:
            return Skip("stock autograd has no form for a frozen layer without a bias to compare")
        else:
            owner.bias.requires_grad_(True)                # gradients pass, nothing is kept
    settled = tuned.adapters["default"].settled.get(name, {})
    taken = inspect.signature(method.per_token).parameters
    numbers = {p: method.per_token(p, **{k: v for k, v in settled.get(p.name, {}).items()
                                         if k in taken}) for p in places}
    once = {p: method.per_forward(p) for p in places} if hasattr(cls, "per_forward") else {}

    def bytes_of(batch: Any) -> tuple[int, int, int]:
        """What is kept, what stock autograd keeps, what is said to be more."""
        rows = _rows(base, batch.bare, places)
        return (_kept(tuned.model, batch, lambda: tuned.loss(batch)),
                _kept(base, batch.bare, lambda: base(**batch.bare).loss),
                sum(4 * (rows[p.path] * n + once.get(p, 0)) for p, n in numbers.items()))

    ours, stock, said = bytes_of(batch)
    few = sum(16 * p.out for p in places)              # thresholds, norms of rows
    assert abs(ours - stock - said) <= few + 0.01 * stock, \
        (f"keeps {ours:,} bytes; stock autograd {stock:,}, and {said:,} more are said "
         f"(+- {few:,})")
    if "delta" in cls.axes():                          # experts keep sums per sample besides
        half = bytes_of(fresh(model, torch.float32, text, batch=SAMPLES // 2)[1])
        more, stock, said = (a - b for a, b in zip((ours, stock, said), half, strict=True))
        assert more == stock + said, \
            (f"{SAMPLES // 2} samples more keep {more:,} bytes more; stock autograd {stock:,}, "
             f"and {said:,} are said")
    return None


def _rows(base: nn.Module, batch: Any, places: Any) -> dict[str, int]:
    """Tokens that each module reads in one forward."""
    rows: dict[str, int] = {}
    hooks = []
    for path in {p.path for p in places}:
        def count(m: Any, args: Any, path: str = path) -> None:
            rows[path] = rows.get(path, 0) + args[0].numel() // args[0].shape[-1]
        hooks.append(base.get_submodule(path).register_forward_pre_hook(count))
    with torch.no_grad():
        base(**batch)
    for h in hooks:
        h.remove()
    return rows


def _kept(model: nn.Module, batch: Any, loss: Any) -> int:
    from ...memory import Ledger

    with Ledger(model) as ledger:
        for value in batch.values():
            ledger.watch("weights", [value])
        value = loss()
        kept = sum(e.bytes for e in ledger.entries
                   if e.death is None and ledger.category(e) != "weights")
    del value
    return kept


class _Block(nn.Module):
    """Matrices of two shapes above the sizes below which codecs keep fp32, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(96)
        self.fc1, self.fc2 = nn.Linear(96, 160), nn.Linear(160, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class _Two(nn.Module):
    """Two blocks, so that a subspace finds what it projects."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block(x)
        return x.square().mean()


@where(_says_no_state)
def holds_the_state_it_says(name: str, model: str) -> Skip | None:
    """After a step, state of `state_bytes(shape, itemsize)` bytes per tensor, in fp32 and bf16."""
    method: Any = parse(recipe(name)).named(name)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = _Two().to(dtype)
        tuned = join(net, recipe(name), "", head=False)
        opt = ready(tuned, 2)
        tuned.step((torch.randn(4, 96, dtype=dtype),), loss=lambda out, batch: out)
        for n, p in tuned.named_parameters():
            held = sum(t.nbytes for t in _tensors(opt.state.get(p, {})) if t.dim())
            said = method.state_bytes(tuple(p.shape), p.element_size())
            assert held == said, f"{n} {tuple(p.shape)} in {dtype}: holds {held}, says {said}"
    return None


def _tensors(tree: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


CHECKS = (keeps_what_it_says, holds_the_state_it_says, simulated_is_measured)
