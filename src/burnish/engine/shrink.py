"""Slicing out what was switched off: a smaller dense model, and the way back.

The update is merged, then every weight gives up the rows and columns of dead units, and of dead
channels of the residual stream (narrow.py). The sliced model is compared with the masked one on a
batch of its own, and its config is changed to say what it is now, where a config can: a model built
from it must have the same shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.state.mask import UnitMask
from ..blocks.state.stream import Hybrid
from ..core import families
from ..core.errors import CheckError, ConfigError
from ..core.example import example_batch
from ..core.groups import HEADS, Group, groups, say_heads
from ..core.stream import Stream, say_width, stream
from .narrow import cut, narrow

if TYPE_CHECKING:
    from .tuned import Tuned

#: attributes of attention modules that are heads x width
_WIDE = ("all_head_size", "split_size", "inner_dim")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "mlp_dim")

Put = Callable[[Any, str, Any], None]


def shrink(tuned: Tuned, ragged: bool = False) -> nn.Module:
    """See :meth:`burnish.Tuned.shrink`."""
    dead = {path: ~m.alive for path, m in tuned.branches(UnitMask)}
    found = [g for g in groups(tuned.anatomy)[0] if g.out.path in dead
             and bool(dead[g.out.path].any())]
    width = _width(tuned)
    if not found and width is None:
        raise ConfigError("nothing is switched off, so there is nothing to take out; a part such "
                          "as loraprune switches units off while it trains, pat channels")
    tuned.merge()
    undo: list[Callable[[], None]] = tuned.merged.first

    def put(owner: Any, name: str, value: Any) -> None:
        """Set an attribute (or a parameter) and remember what was there."""
        store = owner._parameters if isinstance(value, nn.Parameter) else None
        if store is None and not hasattr(owner, name):   # a word that a config did not need
            undo.append(lambda: vars(owner).pop(name, None))
        else:
            old = store[name] if store is not None else getattr(owner, name)
            undo.append(lambda: store.__setitem__(name, old) if store is not None
                        else setattr(owner, name, old))
        if store is not None:
            store[name] = value
        else:
            setattr(owner, name, value)

    try:
        probe = _probe(tuned.model)
        want = None if probe is None else _run(tuned.model, probe)
        _slice(tuned.model, found, dead, put)
        _attributes(tuned, found, dead, put)
        if width is not None:
            narrow(tuned.anatomy, *width, put)
        if want is not None:
            _same(want, tuned.model, probe)
        reason = _describe(tuned, found, dead, width, put)
        if reason and not ragged:
            raise CheckError(f"{reason}, so a saved folder could not be loaded; shrink("
                             "ragged=True) gives the smaller module all the same")
    except BaseException:
        tuned.unmerge()
        raise
    return tuned.model


# -- weights ------------------------------------------------------------------------------------
def _channels(width: int, dead: Tensor) -> Tensor:
    """The positions of dead units' channels."""
    return dead.repeat_interleave(width).nonzero().squeeze(1)


def _slice(model: nn.Module, found: list[Group], dead: dict[str, Tensor], put: Put) -> None:
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for g in found:
        off = dead[g.out.path]
        for place, width in g.rows:
            start = place.rows[0] if place.rows else 0
            gone.setdefault((place.path, 0), []).append(_channels(width, off) + start)
        for place, width in g.columns:
            gone.setdefault((place.path, 1), []).append(_channels(width, off))
    for (path, side), parts in gone.items():
        cut(model.get_submodule(path), side, torch.cat(parts), put)


def _width(tuned: Tuned) -> tuple[Stream, Tensor] | None:
    """The stream that loses channels, and which stay; None where all do."""
    mask = next((h.mask for _, h in tuned.branches(Hybrid)), None)
    found = stream(tuned.anatomy)
    if mask is None or bool(mask.alive.all()) or isinstance(found, str):
        return None
    return found, mask.alive.detach().clone()


# -- what modules say of themselves -------------------------------------------------------------
def _attributes(tuned: Tuned, found: list[Group], dead: dict[str, Tensor], put: Put) -> None:
    for g in found:
        if g.kind != "heads":
            continue
        alive, module = int((~dead[g.out.path]).sum()), tuned.model.get_submodule(g.path)
        for m in module.modules():
            for name in (*HEADS, *families.KV_COUNT, *_WIDE):
                value = vars(m).get(name)
                if isinstance(value, int) and value % g.units == 0:
                    put(m, name, value // g.units * alive)


def _describe(tuned: Tuned, found: list[Group], dead: dict[str, Tensor],
              width: tuple[Stream, Tensor] | None, put: Put) -> str | None:
    """Let the config say the new sizes; the reason where no config can."""
    config = getattr(tuned.model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None                                      # no config says anything of this model
    sizes: dict[str, set[int]] = {"heads": set(), "channels": set()}
    for g in groups(tuned.anatomy)[0]:
        off = dead.get(g.out.path)
        sizes[g.kind].add(g.units if off is None else int((~off).sum()))
    for kind, counts in sizes.items():
        if len(counts) > 1 and any(g.kind == kind for g in found):
            return (f"blocks keep {min(counts)} to {max(counts)} {kind}: a config has one number "
                    "for all of them (loraprune(spare=0) prunes all alike)")
    new = copy.deepcopy(config)
    if width is not None:
        say_width(new, tuned.anatomy, int(width[1].sum()))
    for g in found[:1] + [h for h in found if h.kind != found[0].kind][:1]:
        alive = int((~dead[g.out.path]).sum())
        if g.kind == "channels":
            named = [n for n in _INNER if hasattr(new, n)]
            for n in named[:1]:
                setattr(new, n, alive)
        else:
            say_heads(new, g, alive)
    if reason := _built_differs(tuned.model, new):
        return reason
    for n, value in vars(new).items():
        if vars(config).get(n) != value and not n.startswith("_"):
            put(config, n, value)
    return None


def _built_differs(model: nn.Module, config: Any) -> str | None:
    """Where a model built from `config` has other shapes than this one."""
    try:
        if hasattr(config, "validate"):                  # as it will be when it is written
            config.validate()
        with torch.device("meta"):
            built = type(model)(config)
    except Exception as e:                               # a foreign constructor may say anything
        why = str(e.__cause__ or e).splitlines()[0]
        return f"{type(config).__name__} does not take the new sizes ({why})"
    shapes = {n: p.shape for n, p in built.named_parameters()}
    for n, p in model.named_parameters():
        if shapes.get(n) != p.shape:
            return (f"{type(config).__name__} has no words for the new sizes: it makes {n} "
                    f"{tuple(shapes.get(n, ()))}, which is {tuple(p.shape)} now")
    return None


# -- the proof ----------------------------------------------------------------------------------
def _probe(model: nn.Module) -> dict[str, Any] | None:
    try:
        return example_batch(model, (2, 16))
    except ConfigError:
        return None


@torch.no_grad()
def _run(model: nn.Module, batch: Any) -> Any:
    was = model.training
    model.eval()
    try:
        first = next(model.parameters())
        given = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype)
                 if isinstance(v, Tensor) else v for k, v in batch.items()}
        return model(**given)
    finally:
        model.train(was)


def _same(want: Any, model: nn.Module, probe: Any) -> None:
    try:
        got = _run(model, probe)
        a, b = _answer(want), _answer(got)
        off = float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
    except (RuntimeError, ValueError, IndexError) as e:      # sizes its own forward disagrees with
        raise CheckError(f"{type(model).__name__} cannot run sliced ({str(e).splitlines()[0]}): it "
                         "counts its heads where it is not told; nothing was changed") from e
    if not off <= (1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2):
        raise CheckError(f"the sliced {type(model).__name__} answers otherwise than the masked one "
                         f"(by {off:.2g} of the largest output); nothing was changed")


def _answer(out: Any) -> Tensor:
    logits = getattr(out, "logits", None)
    return logits if logits is not None else next(v for v in out.values() if isinstance(v, Tensor))
