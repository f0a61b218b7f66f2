"""What the slots of one model share, and the call that a forward makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.state.prompts import accepts, named
from ..blocks.tape.saved import Tape
from ..blocks.update.objective import Riding
from ..blocks.weight.folded import Room
from ..core.call import Call, given_to, giving, rows_given, switched_off
from ..core.errors import ConfigError, RecipeError, nearest
from ..core.keys import Read
from ..core.site import Branch, Place
from .base import Base
from .owners import tuned_of


@dataclass
class State:
    """What all slots of one model share. A forward reads none of it but through its `Call`."""

    tape: Tape = field(default_factory=Tape)
    riding: Riding = field(default_factory=Riding)
    room: Room = field(default_factory=Room)         # for what evaluation makes once
    active: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None      # one adapter per sample
    training: str | None = None                      # the active adapter that trains
    version: int = 0                                 # grows when `active` or the parts change
    ready: bool = False                              # are `Slot.now` of what is active? (settle)
    readers: dict[tuple[str, str], list[Part]] = field(default_factory=dict)  # of each tap
    gone: dict[str, int] = field(default_factory=dict)      # adapter -> version that dropped it
    listening: list[str] = field(default_factory=list)      # adapters, one entry per listener
    #: adapter -> key of the batch -> how a part reads it
    context: dict[str, dict[str, Read]] = field(default_factory=dict)
    fused: bool = False                              # some of torch's layers read past modules
    watched: bool = False                            # or take another road where nobody watches
    by_sample: bool = False                          # a term draws once for each sample
    waits: bool = False                              # weights that train lie on the host
    shards: Any = None                               # see sharded.py
    off_here: int = 0                                # how many stand in `disabled` just now
    rows_here: int = 0                               # and how many in `adapters.rows`

    def looks_at(self, model: nn.Module) -> None:
        """Torch's encoder layers and attention have fused forms for evaluation, which they leave
        where a tape watches: answers then have the bits of training."""
        self.fused = any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
        self.watched = self.fused or any(isinstance(m, nn.MultiheadAttention)
                                         for m in model.modules())

    def use(self, active: tuple[tuple[str, float], ...],
            rows: tuple[str | None, ...] | None = None) -> None:
        self.active, self.rows = active, rows
        self.changed()

    def changed(self) -> None:
        """What runs where has changed."""
        self.version, self.ready = self.version + 1, False

    def loose(self, root: bool) -> dict[Any, Any] | None:
        """States of this thread that one part of the model, run by itself, left for the next."""
        if not self.readers:
            return None
        waiting = self.tape.waiting
        if root:
            waiting.clear()
        return None if root else waiting

    @property
    def off(self) -> bool:
        """Is the recipe switched off in this thread?"""
        return switched_off(self)[0]

    def base_of(self, model: nn.Module) -> Base | None:
        """What gives the base's values of what trains and moves in a tuned model, as `disabled`
        has it; None for a copy of the model alone, without its handle."""
        tuned = tuned_of(model)
        return None if tuned is None else Base(model, tuned.originals, tuned.buffers)

    @property
    def by_rows(self) -> bool:
        """Has each sample its own adapter, here or in another thread?"""
        return self.rows is not None or self.rows_here > 0

    @property
    def beside(self) -> str:
        """Why a compiled graph may not begin at the root, or "" if it may."""
        if self.by_rows:
            return "each sample has its own adapter"
        if self.waits:                               # (a graph would ask them at every operator)
            return "weights that train wait on the host"
        if self.fused:                               # without the tape's mode they take a fast path
            return "torch's encoder layers read weights past the modules that hold them"
        if why := self.tape.policy.beside or self.tape.beside:
            return why
        if self.riding.on_end is not None:
            return "objectives of the recipe follow the loss"
        if self.listening or self.readers:
            return "parts of the recipe hand states to each other"
        reads = self.context or self.by_sample
        return "parts of the recipe read the context of the call" if reads else ""

    def open(self, module: nn.Module, args: tuple, kw: dict) -> Call:
        """A new call: what is active now, for good, and what the module is called with."""
        off, base = switched_off(self)
        self.room.opens(self.version, not (torch.is_grad_enabled() or module.training))
        given = rows_given(self)
        active, rows = (self.active, self.rows) if given is None else ((), given[0])
        return Call(self, active, rows, off, base, self.version,
                    samples=samples(args, kw), valid=valid(module, args, kw), given=given_to(self))

    def take(self, module: nn.Module, kw: dict, call: Call) -> tuple[dict, Call]:
        """The declared keys, off the batch and into the call. Those the model takes stay too.

        Raises RecipeError when a part that is active reads a key that the batch lacks, or that has
        entries it may not have.
        """
        if not self.context:
            return kw, call
        declared = {k for keys in self.context.values() for k in keys}
        found = {k: v for k, v in kw.items() if k in declared}
        kw = {k: v for k, v in kw.items() if k not in found or accepts(module, k)}
        call = replace(call, given={**call.given, **found})
        active = () if call.off else {*dict(call.active), *(r for r in call.rows or () if r)}
        for name in active:
            for key, read in self.context.get(name, {}).items():
                if key in call.given:
                    read.check(key, call.given[key])
                elif not read.key.optional and (module.training or not read.key.training):
                    raise RecipeError(f"{read.part} reads {key!r} of the batch "
                                      f"({read.key.meaning}), which has none: add it to the "
                                      f"batch, or call inside tuned.given({key}=...)")
        return kw, call

    @contextmanager
    def reading(self, keys: dict[str, Any]) -> Iterator[None]:
        """Inside, in this thread, every call has these keys of context. ConfigError for one that
        no part of a recipe reads."""
        read = {k for adapter in self.context.values() for k in adapter}
        for key in keys:
            if key not in read:
                raise ConfigError(f"no part of the recipe reads {key!r}{nearest(key, read)} (parts "
                                  f"read {', '.join(sorted(read)) or 'nothing'})")
        with giving(self, keys):
            yield


@dataclass
class Part:
    """A term on a place of this module, or a branch that reads and writes here.

    damp: how much it counts just now beside its adapter's weight.
    """

    adapter: str
    key: str
    place: Place | None = None
    branch: Branch | None = None
    damp: float = 1.0


def samples(args: tuple, kw: dict) -> tuple[int, ...]:
    """The leading sizes of the tensors a model is called with, each once."""
    return tuple(dict.fromkeys(t.shape[0] for t in (*args, *kw.values())
                               if isinstance(t, Tensor) and t.dim()))


def valid(module: nn.Module, args: tuple, kw: dict) -> Tensor | None:
    """The (batch, tokens) attention mask the model is called with."""
    mask = kw.get("attention_mask") if not args else named(module, args, kw).get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
