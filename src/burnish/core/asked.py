"""What targets were asked for, and which parts of the recipe have listened to them.

Targets come from two sides: of one part (``lora(targets="q")``) and of the whole recipe
(``tune(model, recipe, targets="q")``). The first are that part's own and it must use them; the
second go to every part that can be narrowed, and at least one must use them. So nothing that was
asked for is ever dropped without a word.

A part asks through :func:`wanted` (which places), :func:`narrowed` (which of its own sites) or
:func:`chosen` (which existing tensors); asking counts as listening.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import TargetError
from .targets import match, tensors

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .method import Method
    from .site import Place

T = TypeVar("T")


@dataclass
class Asked:
    """targets: those of the whole recipe.  listened: names of the parts that used targets, own
    ones or the recipe's.  notes: what was left as it is because nothing of it was named.
    unread: modules whose answer nobody reads beside some part of the recipe."""

    targets: Any = None
    listened: set[int] = field(default_factory=set)
    narrowed: bool = False
    notes: list[str] = field(default_factory=list)
    unread: tuple[str, ...] = ()

    def read(self, path: str) -> bool:
        """Does anybody read what the module at this path makes?"""
        return not any(f"{path}.".startswith(f"{u}.") for u in self.unread)

    def living(self, method: Method, sites: list[T], path: Callable[[T], str]) -> list[T]:
        """The sites whose answer somebody reads, with a note about others."""
        dead = [path(s) for s in sites if not self.read(path(s))]
        if dead:
            self.notes.append(f"{method.name} leaves {dead[0]} alone: beside this recipe nobody "
                              "reads what it makes")
        return [s for s in sites if self.read(path(s))]

    def of(self, method: Method) -> tuple[Any, bool]:
        """(targets for this part, are they its own?); (None, False) for no wish."""
        if method.targets is not None:
            return method.targets, True
        return self.targets, False

    def used(self, method: Method) -> None:
        """The part was narrowed by what was asked."""
        self.listened.add(id(method))
        self.narrowed = self.narrowed or method.targets is None

    def check(self, anatomy: Anatomy, recipe: Sequence[Method]) -> None:
        """Raise TargetError for targets that no part has used."""
        for part in recipe:
            if part.targets is not None and id(part) not in self.listened:
                raise TargetError(f"{part.name} takes no targets: it cannot be narrowed to "
                                  f"{part.targets!r}; leave them out, or give them to another part")
        if self.targets is not None and not self.narrowed:
            tensors(anatomy, self.targets, (n for n, _ in anatomy.model.named_parameters()),
                    siblings=True)
            own = all(p.targets is not None for p in recipe)
            why = "every part has targets of its own" if own else \
                "it has no part that they narrow down"
            raise TargetError(f"targets {self.targets!r} do nothing in {_text(recipe)}: {why}; "
                              "leave them out, or give them to the part that is meant")


def left_alone(method: Method, places: int, left: list[str]) -> list[str]:
    """Notes about the weights that a part has left alone, of so many that it was to act on; an
    error where it was told these and acts on none."""
    if method.targets is not None and left and len(left) == places:
        raise TargetError(f"{method.name}: targets {method.targets!r} name nothing that it acts "
                          f"on; it leaves {left[0]}")
    return [f"{method.name} leaves {why}" for why in left]


def too_small(method: Method, small: Sequence[Place], of: int) -> list[str]:
    """A note about weights that a rank does not fit, of so many that a part was to act on."""
    return [f"{method.name} leaves {len(small)} of {of} weights alone, too small for its rank, "
            f"e.g. {p.name} ({p.out} x {p.inp})" for p in small[:1]]


def _text(recipe: Sequence[Method]) -> str:
    return " + ".join(p.name for p in recipe)


def wanted(anatomy: Anatomy, method: Method) -> list[Place] | None:
    """The places that targets name for this part; None where nothing was asked."""
    targets, _ = anatomy.asked.of(method)
    if targets is None:
        return None
    found = match(anatomy, targets)
    anatomy.asked.used(method)
    return found


def narrowed(anatomy: Anatomy, method: Method, sites: Iterable[T],
             named: Callable[[T, list[Place]], bool]) -> list[T]:
    """Those of a part's `sites` that targets name: ``named(site, places)`` tells.

    Targets of its own that name none are an error. The recipe's then leave this part as it is,
    with a note: they were meant for another part, and are an error when there is none.
    """
    sites = list(sites)
    targets, own = anatomy.asked.of(method)
    if targets is None:
        return anatomy.asked.living(method, sites, lambda s: str(getattr(s, "path", "")))
    places = match(anatomy, targets)
    return _kept(anatomy, method, sites, [s for s in sites if named(s, places)], targets, own)


def chosen(anatomy: Anatomy, method: Method, names: Iterable[str], *, siblings: bool) -> list[str]:
    """Those of a part's existing tensors that targets name (see :func:`targets.tensors`)."""
    names = list(names)
    targets, own = anatomy.asked.of(method)
    if targets is None:
        return anatomy.asked.living(method, names, lambda n: n.rpartition(".")[0])
    left = tensors(anatomy, targets, names, siblings=siblings)
    return _kept(anatomy, method, names, left, targets, own)


def _kept(anatomy: Anatomy, method: Method, sites: list[T], left: list[T], targets: Any,
          own: bool) -> list[T]:
    if left or not sites:
        anatomy.asked.used(method)
        return left
    if own:
        raise TargetError(f"{method.name}: targets {targets!r} name nothing it acts on in this "
                          "model")
    anatomy.asked.notes.append(f"{method.name} is not narrowed by targets {targets!r}: they name "
                               "nothing it acts on")
    return sites
