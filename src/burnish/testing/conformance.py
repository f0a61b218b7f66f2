"""The conformance suite: what every method must show, ours and other people's.

    from burnish.testing import conformance

    def test_my_method():
        report = conformance.run("my_method")
        assert not report.failures, report

or from a shell: ``burnish conformance my_method``. Every check takes a method's name and the name
of a small model (burnish.testing.models.NAMES, or ``"gpt2/q,v"`` with targets), compares with the
untouched model or with a reference and raises AssertionError with what is wrong. Where it has
nothing to look at it returns a :class:`Skip` with the reason, which is counted. What a method is
excused from stands in ``exclusions.toml`` with the reason; an excused check that passes fails.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..core import registry
from ..core.errors import ConfigError, nearest
from ..core.method import Method
from . import checks, choose
from .checks import CHECKS, ONCE, Skip
from .checks.common import SMALL, TRAINS, Check, make, part, recipe, refusal, stir, widen
from .models import NAMES

__all__ = ["CHECKS", "ONCE", "SMALL", "TRAINS", "Check", "Exclusion", "Report",
           "Result", "Skip", "check", "checks", "exclusions", "make", "methods", "one", "part",
           "recipe", "refusal", "run", "stir", "widen"]


@dataclass(frozen=True)
class Exclusion:
    """A check that a method (glob) is excused from on a model (glob), and why."""

    check: str
    method: str
    model: str
    reason: str

    def covers(self, check: str, method: str, model: str) -> bool:
        return self.check == check and fnmatch.fnmatchcase(method, self.method) \
            and fnmatch.fnmatchcase(model, self.model)


@lru_cache(maxsize=1)
def exclusions() -> tuple[Exclusion, ...]:
    """The one file of what is excused."""
    return read((Path(__file__).parent / "exclusions.toml").read_text("utf-8"))


def read(text: str) -> tuple[Exclusion, ...]:
    """Exclusions as they are written. What a method's settings need to be shown is a fact of its
    own file: ConfigError for any other table."""
    try:
        import tomllib
    except ImportError:                                     # Python 3.10
        import tomli as tomllib
    told = tomllib.loads(text)
    if strange := sorted(set(told) - {"exclusion"}):
        raise ConfigError(f"exclusions.toml has {', '.join(f'[{k}]' for k in strange)}: what "
                          "settings need to be shown stands in the method's file, as "
                          "setting(..., other=, beside=, unseen=) and `small`")
    return tuple(Exclusion(e["check"], e.get("method", "*"), e.get("model", "*"), e["reason"])
                 for e in told.get("exclusion", ()))


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
    excused = next((e for e in exclusions() if e.covers(word, name, model)), None)
    try:
        said = check(name, model)
    except Exception as e:
        if excused is not None:
            return Result(word, name, model, "excluded", excused.reason)
        what = str(e) if isinstance(e, AssertionError) else f"{type(e).__name__}: {e}"
        return Result(word, name, model, "fail", what or "assertion failed")
    if isinstance(said, Skip):
        return Result(word, name, model, "not applicable", said.reason)
    if excused is not None:
        return Result(word, name, model, "fail", "passes although it is excused in "
                      f"exclusions.toml ({excused.reason}): take the exclusion away")
    return Result(word, name, model, "pass")


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
