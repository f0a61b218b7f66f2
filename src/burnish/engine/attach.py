"""Asks every part of a recipe its questions and puts the answers into the model."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..blocks.state.prompts import Fixed, Graded
from ..blocks.weight.dropped import Dropping
from ..blocks.weight.provided import Wrap
from ..blocks.weight.shared import Shared
from ..blocks.weight.term import DROPS, asks_to_drop
from ..blocks.weight.waiting import come_home, wait
from ..core.anatomy import Anatomy
from ..core.asked import Asked, left_alone, too_small, wanted
from ..core.errors import RankError, RecipeError, TargetError
from ..core.families import UNGRADED
from ..core.keys import keys_of
from ..core.method import Method
from ..core.needs import refuse, unmet
from ..core.outputs import base_class
from ..core.recipe import Recipe, joins
from ..core.site import Branch, Place, Site
from ..core.targets import match
from ..core.unread import let_go, read_all, source_of, values
from .informed import Informed, parameter
from .layout import no_dropout
from .observe import Batches
from .planned import make_plan
from .refold import restart
from .slot import slot_of, slots
from .state import State
from .swap import ATTR, refill, set_aside, swap_provided
from .undo import Transaction

if TYPE_CHECKING:
    from .adapters import Adapter


class Attacher(Informed):
    """Collects the answers of one recipe for one model and applies each axis' law."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, state: State, adapter: Adapter,
                 undo: Transaction, data: tuple[Any, ...] = (Batches(None), None)):
        super().__init__(model, anatomy, state, adapter, data)
        self.undo = undo
        self.asked = anatomy.asked = Asked(adapter.targets)
        self.notes: list[str] = []
        self.replaced: dict[str, str] = {}
        self.trains: set[str] = set()                        # names of what is selected
        self.placed: dict[str, list[Place]] = {}
        self.held: dict[int, set[Place]] = {}                # what a storage will take, by part
        self.names = {id(p): n for n, p in model.named_parameters()}    # one name per tied tensor

    # -- where ---------------------------------------------------------------------------------
    def places(self, method: Method) -> list[Place]:
        """The places a part applies to; those of a kind it has no form for are named."""
        asked, fit, left = self._found(method)
        if left and (asked is not None or not fit):
            kinds = ", ".join(sorted(method.kinds))
            raise TargetError(f"{method.name} has no form for {left[0].name} (kind "
                              f"{left[0].kind}); it works on {kinds}")
        if left:
            self.notes.append(f"{method.name} leaves {len(left)} {left[0].kind} weights alone: "
                              "it has no form for them")
        return fit

    def _found(self, method: Method) -> tuple[list[Place] | None, list[Place], list[Place]]:
        """(what was asked for, if anything, what a part has a form for, what not)."""
        asked = wanted(self.anatomy, method)
        found = asked if asked is not None else self.asked.living(
            method, match(self.anatomy), lambda p: p.path)
        return (asked, [p for p in found if p.kind in method.kinds],
                [p for p in found if p.kind not in method.kinds])

    # -- what ----------------------------------------------------------------------------------
    def attach(self, recipe: Recipe) -> None:
        """Every question in the order of the table."""
        joins(recipe)
        name, before = self.adapter.name, dict(self.state.context)
        self.undo.later(lambda: (self.state.context.clear(), self.state.context.update(before)))
        if keys := keys_of(recipe):
            self.state.context[name] = keys
        self.asked.unread = tuple(p for part in recipe for p in part.unread(self.anatomy))
        if any(self._runs(part) for part in recipe):
            read_all(self.model)                 # the base runs whole, so it is in memory whole
        chosen = [(part, s) for part in recipe for s in part.select(self.anatomy)
                  if f".{ATTR}." not in f".{s.name}"]        # what other adapters own is theirs
        self.trains = {s.name for _, s in chosen}
        for part in recipe:
            self.look(part)
        for part in recipe:
            if "delta" in part.axes():
                self._deltas(part)
        for _, module, slot in slots(self.model):    # what cannot stand together is refused now
            make_plan(slot, module, ((name, 1.0),))
        for part in recipe:
            if "storage" in part.axes():
                self._storage(part)
        read_all(self.model)
        for part, selection in chosen:           # by now storage has said what it holds frozen
            self._select(part, selection.name, selection.decay)
        for part in recipe:
            self._wait(part)
        for part in recipe:
            found = (*part.branch(self.anatomy), *part.mixture(self.anatomy))
            for b in found:
                self._branch(part, b) if isinstance(b, Branch) else b.install(self, part)
            if not found and set(part.axes()) - {"lifecycle"} == {"branch"}:
                refuse(part, self.anatomy)
        for question in ("prompt", "side"):
            self._install(recipe, question)
        for part in recipe:
            if part.fixed:
                self._fix(part)
        self.modes(recipe)
        for part in recipe:
            if part.targets is not None and "optimizer" in part.axes():
                self._optimizer(part)
        self._met(recipe)
        self._graded()
        self._unread(recipe)
        self.asked.check(self.anatomy, recipe)
        self.notes += self.asked.notes

    def _met(self, recipe: Recipe) -> None:
        """Parts that are asked of no more than single weights have nothing to refuse a model by; of
        a storage that is told which ones it says itself what it cannot hold."""
        asked = {"storage", "optimizer", "controller", "objective", "lifecycle"}
        for part in recipe:
            if "storage" in part.axes() and (part.targets or self.adapter.targets) is not None:
                continue
            if set(part.axes()) <= asked and unmet(type(part), self.anatomy) is not None:
                refuse(part, self.anatomy)

    def _unread(self, recipe: Recipe) -> None:
        """Nothing trains where nobody reads what comes out."""
        mine = f".{ATTR}.{self.adapter.name}."
        for name, _ in self.model.named_parameters():
            path = name.partition(f".{ATTR}.")[0] if mine in name else name.rpartition(".")[0]
            if self.asked.read(path) or not (mine in name or name in self.trains):
                continue
            whose = next(p.name for p in recipe for u in p.unread(self.anatomy)
                         if f"{path}.".startswith(f"{u}."))
            raise RecipeError(f"beside {whose} nobody reads what {path} makes, so {name} would not "
                              "train; give targets that leave it out")

    def _graded(self) -> None:
        """Modules that the model runs without a graph have one where something trains in them."""
        own = [*self.adapter.selected,
               *(path for path, _, slot in slots(self.model) for p in slot.parts
                 if p.adapter == self.adapter.name
                 and any(q.requires_grad for m in slot.module_of(p).modules()
                         for q in (*m.parameters(recurse=False), *getattr(m, "borrowed", ()))))]
        for paths in UNGRADED.get(base_class(self.model).__name__, ()):
            for path in paths if any(_within(o, p) for o in own for p in paths) else ():
                Graded(self.state, self.adapter.name).listen(self.slot(path), "graded")

    def _fix(self, part: Method) -> None:
        """A body that a part declares fixed is in evaluation mode, if nothing trains in it."""
        mine = [p for path, _, slot in slots(self.model) for p in slot.parts
                if p.adapter == self.adapter.name
                and not any(_within(path, h) for h in self.anatomy.head)]
        if mine:
            self.notes.append(f"{part.name}: {mine[0].key} trains in the body, so it is not fixed")
            return
        owners = {n.rpartition(".")[0] for n in self.adapter.selected}
        fixed = [m for p, m in self.model.named_modules()
                 if f".{ATTR}." not in f".{p}."
                 and not any(_within(p, o) or _within(o, p) for o in owners)]
        Fixed(self.state, self.adapter.name, fixed).listen(self.slot(""), part.name)

    def modes(self, recipe: Recipe) -> None:
        """What is kept for backward."""
        self._install(recipe, "activations")

    def _install(self, recipe: Recipe, question: str) -> None:
        for part in recipe:
            if question in part.axes():
                answer = getattr(part, question)(self.anatomy)
                if answer is not None:
                    answer.install(self, part)

    def _optimizer(self, part: Method) -> None:
        """Targets of an optimizer choose among what trains."""
        where = getattr(part.optimizer(), "where", None)
        if where is None:
            return
        own = [*((n, p) for n, p in self.adapter.selected.items()),
               *((n, p) for n, p in self.model.named_parameters()
                 if f".{ATTR}.{self.adapter.name}." in f".{n}")]
        if not any(where(n, p) for n, p in own):
            raise TargetError(f"{part.name}: targets {part.targets!r} name no matrix that this "
                              "recipe trains")
        self.asked.used(part)

    def device(self, path: str) -> torch.device:
        """Where a module's tensors are; in a storage they are no parameters any more."""
        module = self.model.get_submodule(path)
        held = itertools.chain(module.parameters(), module.buffers(), self.model.parameters())
        return next(held).device

    def slot(self, path: str) -> Any:
        """The slot of a module, made on first use (for blocks that install themselves)."""
        return slot_of(self.model.get_submodule(path), self.state, path)

    def _shared(self, part: Method, places: list[Place]) -> Shared | None:
        """The tensors a part owns once, held by the root."""
        tensors = part.shared(places) if places else {}
        if not tensors:
            return None
        module = Shared(tensors, self.adapter.seed)
        module.to(self.device(places[0].path))
        self.slot("").add(self.adapter.name, f"{part.name}_shared", module)
        return module

    def _deltas(self, part: Method) -> None:
        undropped: list[tuple[Place, str]] = []
        acts = not asks_to_drop(part)           # where it is asked for, it acts somewhere
        small: list[Place] = []
        placed = self.places(part)
        shared, blank = self._shared(part, placed), self._blank(part)
        for place, seen, settled in self.informed(part, placed):
            ends = self.anatomy.ends(place) if part.ties else ()
            if self.anatomy.tied(place) and not ends:
                raise TargetError(
                    f"{part.name}: {place.name} is tied to {', '.join(self.anatomy.tied(place))}; "
                    "what is added to one end would not reach the other. Untie them first, or "
                    "leave it out of targets")
            module = self._module(place)
            slot = slot_of(module, self.state, place.path)
            try:
                with torch.no_grad(), values(parameter(module, place)):
                    weight = slot._place_view(module, place)
                    device = weight.device
                    if not weight.is_floating_point():
                        raise TargetError(
                            f"{part.name}: {place.name} holds {weight.dtype}, nothing can be "
                            "added to it; load the weights in a floating-point type")
                    answer = part.delta(Site(place, weight, seen, settled, shared, blank,
                                             slot.beside(place), placed, self._weight,
                                             functools.partial(self._rounded, place)))
                    del weight                       # one that was read for this is gone then
            except RankError:
                if self.asked.of(part)[0] is not None or len(small) + 1 == len(placed):
                    raise
                small.append(place)
                continue
            if answer is None:
                continue
            answer = answer if isinstance(answer, tuple) else (answer,)
            if (why := self._undropped(module, place, answer)):
                undropped.append((place, why))
            acts = acts or any(asks_to_drop(t) for t in answer)
            several = sum(p.path == place.path for p in placed) > 1
            label = part.name if not several else \
                f"{part.name}_{place.role or place.param.replace('.', '_')}"
            for k, term in enumerate(answer):
                if isinstance(term, Wrap):
                    self._one_wrap(part, place, slot)
                term.to(device)
                term.part = self._key(part)
                if getattr(term, "deaf", False):
                    self.replaced[f"{place.path}.{place.param}"] = \
                        f"{part.name} takes its place; give them different targets"
                if (said := getattr(term, "counted", None)) is not None:
                    kept = self.adapter.settled.setdefault(term.part, {})
                    kept.setdefault(place.name, {}).update(said)
                slot.add(self.adapter.name, label if not k else
                         f"{label}_{type(term).__name__.lower()}", term, place=place)
                for end in ends:
                    other = term.mirrored(end).to(device)
                    other.part = term.part
                    beside = slot_of(self._module(end), self.state, end.path)
                    beside.add(self.adapter.name, label, other, place=end)
            self.placed.setdefault(part.name, []).append(place)
        self.notes += too_small(part, small, len(placed))
        if undropped:
            self._without_dropout(part, undropped, len(placed))
        elif not acts and len(small) < len(placed):
            raise RecipeError(f"{part.name}: dropout acts on none of its targets, "
                              f"e.g. {placed[0].name}; set dropout=0, or give it others")

    def _undropped(self, module: nn.Module, place: Place, terms: tuple) -> str | None:
        """Switch off dropout that cannot act on this place; why, if any."""
        mine = [t for t in terms if asks_to_drop(t)]
        around = any(isinstance(t, Dropping) and not t.own_drops for t in mine)
        wrapped = any(isinstance(t, Wrap) for t in terms)
        why = no_dropout(module, place, wrapped, around) if mine else None
        for t in mine if why else ():
            for word in DROPS:
                setattr(t, word, 0.0)
        self.state.by_sample |= any(getattr(t, "drop_path", 0) for t in mine)
        return why

    def _without_dropout(self, part: Method, places: list[tuple[Place, str]], of: int) -> None:
        """A word about weights that dropout cannot reach; an error where no others are asked."""
        place, why = places[0]
        if self.asked.of(part)[0] is not None or len(places) == of:
            raise RecipeError(f"{part.name}: dropout cannot act on {place.name}: {why}; set "
                              "dropout=0, or leave it out of targets")
        self.notes.append(f"{part.name}: dropout does not act on {len(places)} of {of} weights, "
                          f"e.g. {place.name}: {why}")

    def _one_wrap(self, part: Method, place: Place, slot: Any) -> None:
        for other in slot.parts:
            if other.adapter == self.adapter.name and other.place is not None \
                    and other.place.param == place.param and other.place.rows == place.rows \
                    and isinstance(slot.module_of(other), Wrap):
                raise RecipeError(f"{other.key} and {part.name} are both functions of "
                                  f"{place.name}; one function of W wraps the terms: "
                                  "give them different targets or drop one")

    def _rounded(self, place: Place, W: torch.Tensor) -> torch.Tensor | None:
        """What the storage of the recipe would make of a weight (out, in) at a place, decoded
        again; None where it would not take it."""
        stored = self._module(place)._parameters.get(place.param)
        for part in self.adapter.recipe if stored is not None and not place.rows else ():
            if "storage" not in part.axes() or type(part).observe is not Method.observe:
                continue
            held = self.held.get(id(part))
            if held is None:
                held = self.held[id(part)] = set(self._found(part)[1])
            if place not in held or self._elsewhere(stored):
                continue
            like = place.unview(W.to(stored.dtype), stored)
            provider = part.storage(Site(place, like))
            return None if provider is None else place.view(provider.weight())
        return None

    def _storage(self, part: Method) -> None:
        places, left = self.places(part), list[str]()
        for place, seen, settled in self.informed(part, places):
            if f"{place.path}.{place.param}" in self.trains and part.waits(place):
                continue                             # it stays a parameter, see _wait
            if place.rows:
                raise TargetError(f"{part.name} stores whole weights; {place.name} is a slice: "
                                  "target the fused weight")
            module = self._module(place)
            slot = slot_of(module, self.state, place.path)
            if place.param in slot.providers:
                raise RecipeError(f"two storages for {place.name}: it has one form already")
            if "." in place.param:
                left.append(f"{place.name} alone: its module reads the weight past the child that "
                            "owns it")
                continue
            if self._elsewhere(module._parameters[place.param]):
                left.append(f"{place.name} alone: it is tied to another weight, which would go on "
                            "holding it whole")
                continue
            stored = module._parameters[place.param]
            absorbed = [p for p in slot.parts if p.place == place
                        and hasattr(slot.module_of(p), "fold_start")]
            with torch.no_grad(), values(stored):
                moved = stored.detach()
                for p in absorbed:                   # a start that storage should absorb
                    moved = slot.module_of(p).fold_start(moved, place)
                provider = part.storage(Site(place, moved, seen, settled, places=places))
                del moved
                if provider is None:
                    left.append(f"{place.name} as it is")
                    continue
                self.adapter.originals.put(place.path, place.param, stored, source_of(stored))
                self._empty(stored, place)
            for p in absorbed:
                slot.module_of(p).absorbed()
            slot.absorbed += absorbed
            slot.stored_by[place.param] = self._key(part)
            set_aside(module, place.param)
            slot.provide(place, provider)
            swap_provided(module, tuple(slot.providers))
            restart(slot, module, place.param)
            self.replaced[f"{place.path}.{place.param}"] = \
                f"{part.name} holds it frozen in another form; train a delta there instead, or " \
                "give them different targets"
            self.placed.setdefault(part.name, []).append(place)
        self.notes += left_alone(part, len(places), left)

    def _wait(self, part: Method) -> None:
        """Weights that train go to the host where a part has them there."""
        for place in self.places(part) if "storage" in part.axes() else ():
            if (name := f"{place.path}.{place.param}") in self.trains and part.waits(place):
                parameter = self.model.get_parameter(name)
                self.undo.later(functools.partial(come_home, parameter))
                wait(parameter)
                self.state.waits = True
                self.placed.setdefault(part.name, []).append(place)

    def _elsewhere(self, parameter: nn.Parameter) -> bool:
        """Does the model hold this parameter under another name too?"""
        return sum(p is parameter for m in self.model.modules()
                   for p in m._parameters.values()) > 1

    def _empty(self, parameter: nn.Parameter, place: Place) -> None:
        """Let go of the values of a parameter whose original waits aside."""
        originals, home = self.adapter.originals, parameter.device
        self.undo.later(lambda: refill(parameter, originals.get(place.path, place.param).to(home)))
        let_go(parameter)
        parameter.data = parameter.data.new_empty(0)

    def _select(self, part: Method, name: str, decay: bool) -> None:
        if name in self.replaced:
            raise RecipeError(f"{part.name} trains {name} whole, but {self.replaced[name]}")
        try:
            parameter = self.model.get_parameter(name)
        except AttributeError:
            raise RecipeError(f"{part.name} selects {name!r}, which the model does not have") \
                from None
        if not parameter.is_floating_point():
            raise RecipeError(f"{part.name} cannot train {name}: it holds {parameter.dtype}")
        self.adapter.select(self.names[id(parameter)], parameter, decay)

    def _branch(self, part: Method, branch: Branch) -> None:
        target = self.model.get_submodule(branch.write)
        slot = slot_of(target, self.state, branch.write)
        if branch.compose == "replace":
            for other in slot.parts:
                if other.branch is not None and other.branch.compose == "replace" \
                        and other.branch.at == branch.at and other.adapter == self.adapter.name:
                    raise RecipeError(f"{other.key} and {part.name} both replace the "
                                      f"{branch.at} of {branch.write}; only one may")
        like = next((p for p in target.parameters()), None)
        if like is not None:
            branch.module.to(like.device)
        if not hasattr(branch.module, "part"):
            branch.module.part = self._key(part)     # as terms have it: which part it is of
        slot.add(self.adapter.name, part.name, branch.module, branch=branch)
        path, what = branch.read
        if path not in ("", branch.write):
            slot_of(self.model.get_submodule(path), self.state, path).reads.add((path, what))
            self.state.readers.setdefault((path, what), []).append(slot.parts[-1])
        if (ready := getattr(branch.module, "attached", None)) is not None:
            ready(self)


def _within(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")
