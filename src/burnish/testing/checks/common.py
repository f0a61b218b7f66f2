"""What the checks share: a recipe that shows a method, a tuned model beside its untouched base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ...core import registry
from ...core.errors import BurnishError, CheckError
from ...core.keys import examples
from ...core.method import Method
from ...core.recipe import parse
from ...engine.slot import ATTR, slots
from ...engine.tune import tune
from ...engine.tuned import Tuned
from ..models import tiny
from ..stir import stir as stir

#: settings that suit models of width 32, taken when a method has a setting of that name
SMALL: dict[str, Any] = {"rank": 4, "init_rank": 6, "length": 3, "bottleneck": 4, "reduction": 4,
                         "threshold": 1, "every": 1, "layers": 1, "dropout": 0.0}
#: axes that add or choose something trainable
TRAINS = {"delta", "select", "branch", "prompt", "side", "mixture"}
#: of a recipe made of these alone the untouched model can compute the same, on dense weights
DENSE = {"delta", "storage", "select", "activations", "optimizer", "controller", "objective"}


@dataclass(frozen=True)
class Skip:
    """A check has nothing to look at here, and says why."""

    reason: str


class Batch(dict[str, Any]):
    """A batch of the model, with examples of the keys that the parts of a recipe read beside it.

    bare: without them, as the untouched model takes it.
    """

    def __init__(self, bare: Mapping[str, Any], keys: Mapping[str, Any]):
        super().__init__({**bare, **keys})
        self.bare = dict(bare)


Check = Callable[[str, str], "Skip | None"]


def where(lack: Callable[[str], Skip | None]) -> Callable[[Check], Check]:
    """A check that has nothing to look at where `lack(method name)` says so, whatever the model:
    :func:`idle` asks for it without running anything."""
    def deco(check: Check) -> Check:
        @wraps(check)
        def asked(name: str, model: str) -> Skip | None:
            return lack(name) or check(name, model)
        asked.lack = lack                                   # type: ignore[attr-defined]
        return asked
    return deco


def idle(check: Check, name: str) -> Skip | None:
    """Why a check looks at nothing of this method on any model, by what its file says of itself."""
    lack = getattr(check, "lack", None)
    return None if lack is None else lack(name)


# -- recipes --------------------------------------------------------------------------------------
def part(name: str, **settings: Any) -> str:
    """The method in the sizes of a small model."""
    cls = registry.find(name)
    given = {f.name: SMALL[f.name] for f in fields(cls)
             if f.name in SMALL and isinstance(f.default, int | float)
             and not isinstance(f.default, bool) and f.default != SMALL[f.name]}
    given |= {**cls.small, **settings}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" if given else name


def partner(name: str) -> str:
    """What stands beside a method that trains nothing itself; empty for the others."""
    if beside := registry.find(name).shown_beside:
        return beside
    axes = set(registry.find(name).axes())
    if TRAINS & axes:
        return ""
    return "full" if {"optimizer", "controller", "objective"} & axes else "lora(rank=4)"


def recipe(name: str, **settings: Any) -> str:
    """A recipe that shows the method on a small model: itself, or beside something that trains."""
    return " + ".join(filter(None, (partner(name), part(name, **settings))))


def axes_of(text: str) -> set[str]:
    return {a for m in parse(text) for a in m.axes()}


# -- models ---------------------------------------------------------------------------------------
def split(cell: str) -> tuple[str, str | None]:
    """``"gpt2/q,v"``: a model, and targets other than the default."""
    model, _, targets = cell.partition("/")
    return model, targets or None


@lru_cache(maxsize=512)
def refusal(name: str, model: str) -> str | None:
    """Why the method refuses this model, or None when it applies."""
    try:
        tune(fresh(model)[0], recipe(name), targets=split(model)[1],
             calibration=data(model, torch.float32, recipe(name)))
    except CheckError:
        raise
    except BurnishError as e:
        return str(e)
    return None


def fresh(model: str, dtype: torch.dtype = torch.float32, text: str = "", **kw: Any
          ) -> tuple[nn.Module, Batch]:
    """A small model and a batch, all floating tensors in `dtype`, with the keys that the recipe
    `text` reads."""
    net, batch = tiny(split(model)[0], **kw)
    if dtype == torch.float64 and hasattr(net, "set_experts_implementation"):
        net.set_experts_implementation("eager")      # the grouped product has no float64 form
    if dtype == torch.float64 and \
            getattr(getattr(net, "loss_function", None), "__name__", "") == "ForCausalLMLoss":
        net.loss_function = next_word_loss           # transformers' own rounds to float32
    return net.to(dtype), cast(keyed(batch, text), dtype)


def next_word_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kw: Any) -> Tensor:
    """What a language model of transformers is trained with, in the precision of the logits."""
    wanted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    return F.cross_entropy(logits.view(-1, vocab_size), wanted.reshape(-1))


def keyed(batch: Mapping[str, Any], text: Any) -> Batch:
    """The batch with an example of every key that the recipe `text` reads."""
    samples = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim())
    return Batch(batch, examples(parse(text), samples) if text else {})


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    bare = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in batch.bare.items()}
    return Batch(bare, {k: v for k, v in batch.items() if k not in bare})


def join(net: nn.Module, text: str, model: str, **kw: Any) -> Tuned:
    """The recipe on the cell's targets, the head frozen: what moves is the method's."""
    seen = data(model, next(net.parameters()).dtype, text) if model else None
    return tune(net, text, targets=split(model)[1], **{"head": False, "calibration": seen, **kw})


def data(model: str, dtype: torch.dtype, text: str) -> list[Batch]:
    """Batches for methods that read data before they start."""
    return [cast(keyed(_batch(split(model)[0]), text), dtype)]


@lru_cache(maxsize=32)
def _batch(model: str) -> dict[str, Any]:
    return tiny(model)[1]


def make(name: str, model: str, dtype: torch.dtype = torch.float64, train: bool = True,
         text: str | None = None, **kw: Any) -> tuple[Tuned, Batch, nn.Module]:
    """(tuned, batch, untouched copy of the base), all floating tensors in `dtype`."""
    text = text or recipe(name)
    net, batch = fresh(model, dtype, text, **kw)
    base = copy.deepcopy(net)
    tuned = join(net, text, model)
    net.train(train)
    base.train(train)
    return tuned, batch, base


def widen(tuned: Tuned, dtype: torch.dtype = torch.float64) -> None:
    """Put everything that was added in `dtype` too, for comparisons without rounding."""
    for _, _, slot in slots(tuned.model):
        slot.to(dtype)


def logits(out: Any) -> Tensor:
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    return out.loss


def method_of(name: str) -> type[Method]:
    return registry.find(name)


def ready(tuned: Tuned, total: int, lr: float | None = None) -> Any:
    """An optimizer for a run of `total` steps, so that budgets and schedules act."""
    tuned.total_steps = total
    opt = tuned.optimizer()
    if lr is None:                        # zeroth-order steps have their own scale
        lr = 1e-3 if getattr(opt, "zeroth_order", False) else 5e-3
    return tuned.optimizer(lr=lr)


# -- the untouched model on dense weights ---------------------------------------------------------
@contextmanager
def dense_weights(tuned: Tuned, base: nn.Module) -> Iterator[None]:
    """Inside, `base` computes with weights formed densely and differentiably from the terms, and
    with what storages decode to."""
    made: dict[str, Tensor] = {n: p for n, p in tuned.model.named_parameters()
                               if f".{ATTR}." not in f".{n}"}
    for path, module, slot in slots(tuned.model):
        for param in slot.providers:
            made[f"{path}.{param}" if path else param] = slot._stored(module, param).detach()
        groups, _, _ = slot._planned(module, tuned.state.active)
        for place, op in groups:
            if all(t.mirrors for t in op.all):       # a tied tensor is one for all that read it
                continue
            key = f"{path}.{place.param}" if path else place.param
            stored = made.get(key, slot._stored(module, place.param).detach())
            whole = op.dense(place.view(stored))
            if place.rows is not None:
                full = replace(place, rows=None).view(stored)
                a, b = place.rows
                whole = torch.cat([full[..., :a, :], whole, full[..., b:, :]], dim=-2)
            made[key] = place.unview(whole, stored)
    with _reparametrize_module(base, made, tie_weights=True):
        yield


def close(got: Tensor, want: Tensor, what: str, rel: float = 1e-8, scale: Tensor | None = None
          ) -> None:
    """|got - want| <= rel * the largest |want| (or of `scale`), entry by entry."""
    size = float((want if scale is None else scale).abs().max()) if want.numel() else 0.0
    off = float((got - want).abs().max()) if want.numel() else 0.0
    assert off <= rel * max(size, 1e-3), f"{what}: off by {off:.3g} where the largest is {size:.3g}"


def gradients_close(names: Any, got: Any, want: Any, rel: float = 1e-8) -> None:
    """Every gradient, in units of the largest entry of all of them."""
    top = max((float(w.abs().max()) for w in want if w is not None and w.numel()), default=0.0)
    for n, a, b in zip(names, got, want, strict=True):
        a = torch.zeros_like(b) if a is None else a
        off = float((a - b).abs().max()) if b.numel() else 0.0
        assert off <= rel * max(top, 1e-6), \
            f"gradient of {n}: off by {off:.3g} where the largest is {top:.3g}"
