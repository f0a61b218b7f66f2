"""The conformance suite: what every method must show, ours and other people's.

    from burnish.testing import conformance

    def test_my_method():
        report = conformance.run("my_method")
        assert not report.failures, report

or from a shell: ``burnish conformance my_method``. Every check takes a method's name and the name
of a small model (burnish.testing.models.NAMES, or ``"gpt2/q,v"`` with targets), compares with the
untouched model or with a reference and raises AssertionError with what is wrong. Where it has
nothing to look at it returns a :class:`Skip` with the reason, which is counted. What a method is
excused from stands in its file, as `excused` with the reason; an excused check that passes fails.
Which cells a run of our own suite looks at is said in choose.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import wraps

from ..core import registry
from ..core.errors import BurnishError, ConfigError, nearest
from ..core.method import Method
from . import changed, checks, choose
from .checks import CHECKS, ONCE, Skip
from .checks.common import SMALL, TRAINS, Check, idle, make, part, recipe, refusal, stir, widen
from .checks.reference import every_kind_of_place
from .checks.settings import every_setting_acts, own
from .models import NAMES

__all__ = ["CHECKS", "ONCE", "SMALL", "TRAINS", "Check", "Report", "Result", "Skip", "check",
           "checks", "excuse", "live", "look", "make", "methods", "once", "one", "part", "recipe",
           "refusal", "run", "stir", "widen"]


#: an excuse that begins so is of a check that draws decide: it may pass
CHANCE = "by chance"


def excuse(check: str, method: str, model: str) -> str | None:
    """Why the method is excused from a check on this model, or None: its file says ``excused =
    {"check": reason}``, or ``{"check on model": reason}``."""
    told = registry.find(method).excused
    return told.get(check, told.get(f"{check} on {model}"))


@dataclass(frozen=True)
class Result:
    """One check in one cell. state: "pass", "not applicable", "excluded" or "fail"."""

    check: str
    method: str
    model: str
    state: str
    reason: str = ""


@dataclass
class Report:
    """The results of a run of checks; prints its failures."""

    results: list[Result] = field(default_factory=list)

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if r.state == "fail"]

    def count(self) -> dict[str, int]:
        return dict(Counter(r.state for r in self.results))

    def __str__(self) -> str:
        said = ", ".join(f"{n} {state}" for state, n in sorted(self.count().items()))
        return "\n".join([said, *(f"{r.method} on {r.model}: {r.check}: {r.reason}"
                                  for r in self.failures)])


def methods() -> list[str]:
    """Names of the catalogue's methods that join to a model (not pure lifecycle functions); what a
    script has registered is checked by name."""
    return [n for n in registry.names(extra=False) if set(registry.find(n).axes()) - {"lifecycle"}]


def one(check: Check, name: str, model: str) -> Result:
    """One check of one method on one model, as a result instead of an exception."""
    word = check.__name__
    excused = excuse(word, name, model)
    try:
        said = check(name, model)
    except Exception as e:
        if excused is not None:
            return Result(word, name, model, "excluded", excused)
        if isinstance(e, BurnishError) and (reason := refusal(name, model)) is not None:
            return Result(word, name, model, "not applicable", reason)
        what = str(e) if isinstance(e, AssertionError) else f"{type(e).__name__}: {e}"
        return Result(word, name, model, "fail", what or "assertion failed")
    if isinstance(said, Skip):
        return Result(word, name, model, "not applicable", said.reason)
    if excused is not None and not excused.startswith(CHANCE):
        return Result(word, name, model, "fail", "passes although its file excuses it "
                      f"({excused}): take the excuse away")
    return Result(word, name, model, "pass")


# -- what one run of our own suite looks at -------------------------------------------------------
def live(names: Iterable[str]) -> dict[str, Sequence[str]]:
    """Method -> names of the checks that look at it, by what its file says of itself."""
    return {n: [c.__name__ for c in CHECKS if idle(c, n) is None] for n in names}


def look(cells: Iterable[choose.Cell]) -> Report:
    """The results of some cells."""
    named = {c.__name__: c for c in CHECKS}
    return Report([one(named[c.check], c.method, c.model) for c in cells])


def once(name: str) -> list[Check]:
    """The checks that stand beside the cells: whole for a changed method and in a whole product;
    for the others every kind of place by two checks, and a few of the settings, in turn, and what
    takes no run."""
    if choose.everything() or name in changed.methods():
        return list(ONCE)
    turn = changed.seed() + choose.rank(name)
    few = choose.some(name, [f.name for f in own(name)], choose.SETTINGS)

    @wraps(every_kind_of_place)
    def places(name: str, model: str) -> Skip | None:
        return every_kind_of_place(name, model, turn)

    @wraps(every_setting_acts)
    def settings(name: str, model: str) -> Skip | None:
        return every_setting_acts(name, model, few)

    instead = {every_kind_of_place: places, every_setting_acts: settings}
    return [instead.get(c, c) for c in ONCE]


def run(name: str | type[Method], models: Iterable[str] | None = None,
        only: Iterable[Check] | None = None) -> Report:
    """Every check of one method on three models of different families (or on `models`).

    Raises RecipeError for an unknown method and ConfigError for an unknown model.
    """
    name = name if isinstance(name, str) else registry.register(name).name
    cls = registry.find(name)
    if not set(cls.axes()) - {"lifecycle"}:
        raise ConfigError(f"{name} joins to no model: it is a function on checkpoints, and the "
                          "suite has nothing to run")
    chosen = list(choose.models_for(name) if models is None else models)
    report = Report()
    for i, model in enumerate(chosen):
        which = model.partition("/")[0]
        if which not in NAMES:
            raise ConfigError(f"unknown model {which!r}{nearest(which, NAMES)} "
                              f"(there are {', '.join(NAMES)})")
        if (reason := refusal(name, model)) is not None:
            report.results += [Result(c.__name__, name, model, "not applicable", reason)
                               for c in only or CHECKS]
            continue
        wanted = only or (*CHECKS, *(ONCE if not i else ()))
        report.results += [one(c, name, model) for c in wanted]
    return report


def check(name: str | type[Method], model: str = "vit") -> None:
    """All checks of one method on one small model; raises AssertionError with all that failed."""
    report = run(name, [model], only=CHECKS)
    assert not report.failures, str(report)
