"""What the parts of a recipe learn of data before they start, and who needs none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..core.anatomy import Anatomy
from ..core.errors import RankError
from ..core.method import Method
from ..core.recipe import key_of
from ..core.site import Place
from ..core.targets import match
from ..core.unread import values
from .observe import Pass, as_found, needs_data, no_data
from .slot import slot_of
from .state import State

if TYPE_CHECKING:
    from .adapters import Adapter

#: axes whose answers ask for the data pass themselves, place by place
THEMSELVES = {"delta", "storage", "branch", "prompt", "side"}


class Informed:
    """The data side of attaching one recipe.

    data: calibration batches, how to run one, how to be the base.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, state: State, adapter: Adapter,
                 data: tuple[Any, ...]):
        self.model, self.anatomy, self.state, self.adapter = model, anatomy, state, adapter
        self.data = data
        self._looked: set[str] = set()               # keys of parts that have had their pass here

    def _module(self, place: Place) -> nn.Module:
        return self.model.get_submodule(place.path)

    def look(self, part: Method) -> None:
        """The data pass of a part that decides of it (`settle`) and adds nothing to a weight: what
        it settled is what its controller reads (:func:`burnish.core.recipe.key_of`)."""
        if type(part).observe is Method.observe or THEMSELVES & set(part.axes()):
            return
        for _ in self.informed(part, [p for p in match(self.anatomy) if p.kind in part.kinds]):
            pass

    def rehearse(self, part: Method, enough: Callable[[], bool] = lambda: False,
                 batch: Any = None) -> bool:
        """Run the base as it was found, one calibration sample after another until `enough()`
        (default: all), or this batch. False, and nothing runs, where values come from a file or the
        model has none."""
        if self._blank(part, self._looked):
            return False
        batches, run, base = self.data
        if batch is None and not batches:
            raise no_data(part)
        with as_found(self.model, base), torch.no_grad():
            for one in batches.one_by_one() if batch is None else [batch]:
                run(one)
                if enough():
                    break
        return True

    def informed(self, part: Method, places: list[Place]
                  ) -> Iterator[tuple[Place, Any, Mapping[str, Any]]]:
        """(place, what was seen there, what was settled for it), after a data pass where the part
        asks for one. A file knows what was settled, and a simulation has no values to see."""
        key = self._key(part)
        known = self.adapter.settled.get(key)
        asks = self._fitting(part, places)
        if not asks or self._blank(part):
            for place in places:
                yield place, None, (known or {}).get(place.name, {})
            return
        record = self.adapter.settled[key] = {}
        self._looked.add(key)
        left = dict.fromkeys(places)
        looks = Pass(self.model, part, asks, *self.data, weight=self._weight)
        for seen, decided in looks.rounds():
            for place, statistic in seen.items():
                record[place.name] = dict(decided.get(place, {}))
                del left[place]
                yield place, statistic, record[place.name]
            seen.clear()
            del statistic                            # a round's statistics go with it
        for place in left:                           # the part asked for nothing there
            yield place, None, {}

    def _blank(self, part: Method, looked: Collection[str] = ()) -> bool:
        """Are shapes all that is wanted: what the part would make of values comes from a file, or
        the model has none? looked: keys whose settling is no file's."""
        key = self._key(part)
        return self.adapter.filled or key in self.adapter.settled and key not in looked \
            or isinstance(next(self.model.parameters(), None), FakeTensor)

    def _runs(self, part: Method) -> bool:
        """Does the part read data first, so that the base runs?"""
        if type(part).observe is Method.observe or self._blank(part):
            return False
        targets, _ = self.anatomy.asked.of(part)     # looked at: the part has not used them yet
        places = [p for p in match(self.anatomy, targets) if p.kind in part.kinds]
        return any(needs_data(part.observe(p)) for p in self._fitting(part, places))

    def _fitting(self, part: Method, places: Iterable[Place]) -> list[Place]:
        """Where the part looks first. Where its rank does not fit, what stands there says so
        (`delta`), and a place that nobody has named is left alone for it; one that somebody has is
        refused here, before anything is read."""
        out = []
        for place in places if type(part).observe is not Method.observe else ():
            try:
                if part.observe(place) is not None:
                    out.append(place)
            except RankError:
                if self.anatomy.asked.of(part)[0] is not None:
                    raise
        return out

    @contextmanager
    def _weight(self, place: Place) -> Iterator[torch.Tensor]:
        """Inside, the weight of a place stands, also one that waits in its file."""
        module = self._module(place)
        with torch.no_grad(), values(parameter(module, place)):
            yield slot_of(module, self.state, place.path)._place_view(module, place)

    def _key(self, part: Method) -> str:
        return key_of(self.adapter.recipe, part)


def parameter(module: nn.Module, place: Place) -> nn.Parameter | None:
    """The parameter of a place, where it has not got another form."""
    *parents, leaf = place.param.split(".")
    for name in parents:
        module = module._modules[name]
    return module._parameters.get(leaf)
