"""One adapter per sample.

In a linear, all adapters whose update there is a product of thin factors run together: one product
with the weight, and what each adds to its own samples (blocks/weight/grouped.py). Anywhere else,
and for any other update, the batch is split by adapter, run, and put together again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..blocks.weight.dropped import drops
from ..blocks.weight.grouped import Grouped
from ..blocks.weight.term import asks_to_drop
from ..core.call import rows_given
from ..core.errors import RecipeError
from .layout import is_linear

if TYPE_CHECKING:
    from .slot import Slot

#: the name of the samples that run together, under which no adapter can go
TOGETHER = "*"
#: batches of which a module remembers who runs together
BATCHES = 4


class Rows(NamedTuple):
    """How one module runs a batch of several adapters.

    apart: what each sample runs under by itself: its adapter, or None for the base.
    keys: the same where chains run together, those (and the base's) as TOGETHER.
    grouped: what the chains add. dropping: terms of those that drop when they train.
    """

    apart: tuple[str | None, ...]
    keys: tuple[str | None, ...]
    grouped: list[Grouped]
    dropping: list[nn.Module]

    @property
    def now(self) -> tuple[str | None, ...]:
        """Who runs under what just now: what trains or drops is evaluated by itself."""
        alone = any(drops(t) for t in self.dropping) or \
            torch.is_grad_enabled() and any(g.trains() for g in self.grouped)
        return self.apart if alone else self.keys


def rows_of(slot: Slot, module: nn.Module, forward: Callable[..., Any],
            rows: tuple[str | None, ...]) -> Rows:
    """How a module runs a batch; that of the last few is remembered."""
    version, made = slot._rows
    if version != slot.state.version:
        slot._rows = version, made = slot.state.version, {}
    if rows not in made:
        if len(made) >= BATCHES:
            for g in made.pop(next(iter(made))).grouped:
                g.let_go()
        made[rows] = _plan(slot, module, forward, rows)
    return made[rows]


def _plan(slot: Slot, module: nn.Module, forward: Callable[..., Any],
          rows: tuple[str | None, ...]) -> Rows:
    here = {p.adapter for p in slot.parts if p.place or p.branch}
    apart = tuple(r if r in here else None for r in rows)
    chains: dict[str, dict[Any, Any]] = {}
    linear = is_linear(module, forward) and not slot.absorbed and slot.ends is None
    for name in dict.fromkeys(r for r in apart if r is not None and linear):
        groups, before, after = slot._planned(module, ((name, 1.0),))
        if not (before or after) and all(
                place.param == "weight" and op.wrap is None
                and all(t.pair() is not None for t, _ in op.terms) for place, op in groups):
            chains[name] = {place.rows: op.terms for place, op in groups}
    if not chains:
        return Rows(apart, apart, [], [])
    keys = tuple(TOGETHER if r is None or r in chains else r for r in apart)
    mine = [r for r, key in zip(apart, keys, strict=True) if key == TOGETHER]
    grouped = [Grouped({n: own[at] for n, own in chains.items() if at in own}, mine, at,
                       slot.state.room)
               for at in dict.fromkeys(at for own in chains.values() for at in own)]
    dropping = [t for g in grouped for t in g.terms if asks_to_drop(t)]
    return Rows(apart, keys, grouped, dropping)


def add_grouped(grouped: list[Grouped], x: Tensor, y: Tensor, samples: int) -> Tensor:
    """y with what chains add to their samples, which are the first axis (times heads, windows)."""
    if x.shape[0] % samples:
        raise RecipeError(f"a layer is given {x.shape[0]} rows for {samples} samples that each "
                          "have their own adapter: it mixes samples, so they cannot differ there")
    out = y.view(samples, -1, y.shape[-1])
    for g in grouped:
        out = g.add(x.reshape(samples, -1, x.shape[-1]), out)
    return out.view(y.shape)


def check_rows(state: Any, rows: tuple[str | None, ...], args: tuple, kw: dict) -> None:
    """The batch of a call has one sample per adapter named, or as many copies as were said."""
    batch = next(v.shape[0] for v in pytree.tree_leaves((args, kw))
                 if isinstance(v, Tensor) and v.dim())
    given = rows_given(state)
    copies = 1 if given is None else given[1]
    if batch not in (len(rows), len(rows) * copies):
        raise RecipeError(
            f"{len(rows)} adapters are named for a batch of {batch}; give one per sample (inside "
            "generate, num_beams or num_return_sequences copy each sample: "
            "tuned.adapters.rows([...], copies=num_beams))")


def split(rows: tuple[str | None, ...], run: Callable[..., Any], *given: Any) -> Any:
    """``run(adapter, *given)`` on the samples of each adapter; the results in the batch's order.

    Tensors whose first axis is a multiple of the batch (heads, windows) go with their samples.
    """
    batch, order, outs = len(rows), [], []
    for name in dict.fromkeys(rows):
        index = torch.tensor([i for i, r in enumerate(rows) if r == name])
        order.append(index)
        outs.append(run(name, *pytree.tree_map(lambda v, i=index: _pick(v, i, batch), given)))
    back = torch.cat(order).argsort()
    return pytree.tree_map(lambda *parts: _join(parts, back), *outs)


def _pick(v: Any, index: Tensor, batch: int) -> Any:
    if not isinstance(v, Tensor) or not v.dim() or v.shape[0] % batch or not v.shape[0]:
        return v
    per = v.shape[0] // batch
    if per > 1:
        return v.view(batch, per, *v.shape[1:])[index.to(v.device)].flatten(0, 1)
    return v[index.to(v.device)]


def _join(parts: tuple, back: Tensor) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    whole = torch.cat(parts)
    per, where = whole.shape[0] // len(back), back.to(whole.device)
    if per > 1:
        return whole.view(len(back), per, *whole.shape[1:])[where].flatten(0, 1)
    return whole[where]
