"""Trials of a space by Optuna, kept in a file so that a search goes on where it stopped.

What is known without training is not modelled: recipes that no model takes and recipes that need
more than the memory there is are told as failed before anything runs, and the peak of the others is
what the simulator says. A recipe that was tried is not tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, ConfigError, RecipeError, TargetError
from .space import Space

JOURNAL = "search.log"
#: of a space with no more ways to choose, all recipes are known, and a search ends with the last
SMALL = 10_000
#: what a trial is judged by, and which way is better
OBJECTIVES = {"figure": "maximize", "peak": "minimize", "trained": "minimize",
              "seconds": "minimize"}


@dataclass(frozen=True)
class Score:
    """figure: on rows held out, more is better.  peak: bytes of a step.  trained: parameters.
    seconds: of the run."""

    figure: float
    peak: int
    trained: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """failed: why there is no score."""

    number: int
    recipe: str | None
    score: Score | None = None
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"number": self.number, "recipe": self.recipe, "failed": self.failed,
                **(asdict(self.score) if self.score else {})}


@dataclass
class Front:
    """What a search has come to. best: trials that no other beats in every objective, the best
    figure first."""

    space: Space
    objectives: tuple[str, ...]
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> list[Trial]:
        scored: dict[str, Trial] = {}
        for t in self.trials:
            if t.score is not None and t.recipe is not None:
                scored.setdefault(t.recipe, t)
        found = [t for t in scored.values()
                 if not any(self._beats(o, t) for o in scored.values() if o is not t)]
        return sorted(found, key=lambda t: (-t.score.figure, t.score.peak))  # type: ignore

    def _beats(self, a: Trial, b: Trial) -> bool:
        x, y = self.signed(a), self.signed(b)
        return all(p >= q for p, q in zip(x, y, strict=True)) and x != y

    def signed(self, t: Trial) -> list[float]:
        """Its objectives, turned so that more is better."""
        return [getattr(t.score, o) * (1 if OBJECTIVES[o] == "maximize" else -1)
                for o in self.objectives]

    def to_dict(self) -> dict[str, Any]:
        return {"objectives": list(self.objectives), "trials": [t.to_dict() for t in self.trials],
                "best": [t.to_dict() for t in self.best]}


def search(space: Space, score: Callable[[str, int], Score], folder: str | Path, *,
           trials: int = 20, first: int | None = None, seed: int = 0,
           objectives: Sequence[str] = ("figure", "peak"), random: bool = False,
           say: Callable[[Trial], None] = lambda trial: None) -> Front:
    """So many trials of a space, those that the folder holds already counted; fewer where every
    recipe was tried.

    score: (recipe, number of the trial) -> what it came to; a BurnishError is a trial that failed,
        but for a ConfigError that is not of the recipe: the search is asked wrongly then.
    first: trials at random before the model of earlier ones is asked; default a third.
    objectives: some of :data:`OBJECTIVES`.  random: never ask it (the baseline).

    What is asked next depends on the seed and on the trials so far alone, so a search that was
    stopped goes on as one that was not. Raises ConfigError for a folder that holds the trials of
    another space or of other objectives, and where Optuna is not installed.
    """
    optuna = _optuna()
    if unknown := [o for o in objectives if o not in OBJECTIVES]:
        raise ConfigError(f"objective {unknown[0]!r} is none of {', '.join(OBJECTIVES)}")
    if not objectives or len(set(objectives)) < len(objectives):
        raise ConfigError("objectives are one or more, each once")
    if trials < 1:
        raise ConfigError(f"trials={trials}: expected at least 1")
    study = _study(optuna, Path(folder), space, tuple(objectives))
    running = optuna.trial.TrialState.RUNNING
    stopped = [t for t in study.trials if t.state == running]
    front = Front(space, tuple(objectives), [_read(t) for t in study.trials if t.state != running])
    left = trials // 3 if first is None else first
    kinds = {k: optuna.distributions.CategoricalDistribution(v) for k, v in
             _plain(space.choices).items()}
    every = {space.recipe(v) for v in space.all()} if space.size <= SMALL else None
    while len(front.trials) < trials and (
            every is None or every - {t.recipe for t in front.trials}):
        number = len(front.trials)
        # fresh for each trial: nothing of what is drawn next is in memory alone
        study.sampler = optuna.samplers.RandomSampler(seed=seed * 1_000_003 + number) \
            if random or number < left else optuna.samplers.TPESampler(
                seed=seed * 1_000_003 + number, multivariate=True, n_startup_trials=0)
        asked = optuna.trial.Trial(study, stopped.pop(0)._trial_id) if stopped else \
            study.ask(kinds)                         # one that was begun is the next
        values = {k: space.choices[k][int(i)] for k, i in asked.params.items()}
        trial = _tried(space, values, number, front, score)
        _tell(optuna, study, asked, trial, tuple(objectives))
        front.trials.append(trial)
        say(trial)
    return front


def _tried(space: Space, values: Mapping[str, Any], number: int, front: Front,
           score: Callable[[str, int], Score]) -> Trial:
    recipe = space.recipe(values)
    if (why := space.buildable(values)) is not None:
        return Trial(number, recipe, failed=why)
    assert recipe is not None
    for known in front.trials:
        if known.recipe == recipe:
            return Trial(number, recipe, known.score, known.failed)
    try:
        return Trial(number, recipe, score(recipe, number))
    except BurnishError as e:
        if isinstance(e, ConfigError) and not isinstance(e, RecipeError | TargetError):
            raise                                    # of what was asked for, whatever the recipe
        return Trial(number, recipe, failed=str(e))


def _tell(optuna: Any, study: Any, asked: Any, trial: Trial, objectives: Sequence[str]) -> None:
    asked.set_user_attr("recipe", trial.recipe)
    asked.set_user_attr("failed", trial.failed)
    if trial.score is None:
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return
    asked.set_user_attr("score", asdict(trial.score))
    study.tell(asked, [float(getattr(trial.score, o)) for o in objectives])


def _read(t: Any) -> Trial:
    score = t.user_attrs.get("score")
    return Trial(t.number, t.user_attrs.get("recipe"), Score(**score) if score else None,
                 t.user_attrs.get("failed", ""))


def _study(optuna: Any, folder: Path, space: Space, objectives: tuple[str, ...]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    made = optuna.create_study(
        study_name="burnish", storage=optuna.storages.JournalStorage(backend),
        directions=[OBJECTIVES[o] for o in objectives], load_if_exists=True)
    told = {"space": {k: list(map(repr, v)) for k, v in space.choices.items()},
            "parts": [p.text({}) for p in space.parts], "objectives": list(objectives)}
    if (was := made.user_attrs.get("asked")) is None:
        made.set_user_attr("asked", told)
    elif was != told:
        raise ConfigError(f"{folder} holds a search of another space or for other objectives: name "
                          "another folder, or ask the same")
    return made


def _plain(choices: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[str, ...]]:
    """Values by their number, as text: a file holds those whatever they are."""
    return {k: tuple(map(str, range(len(v)))) for k, v in choices.items()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("searching needs Optuna: pip install 'burnish[search]'") from None
    return optuna
