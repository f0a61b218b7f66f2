"""Held-out figures of folders that are candidates of a soup, and weights learned on such rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, nearest
from ..fit.kinds import tells_classes


def scorer(kind: str, folders: Sequence[Path], data: str, split: str | None, batch: int,
           metric: str | None) -> Callable[[Path], float]:
    """folder -> its figure on held-out rows, higher is better."""
    figures = _adapter if kind == "adapter" else Models(folders[0], data, split, batch).figures

    def of(folder: Path) -> float:
        found, task = figures(folder, data, split, batch)
        return best(found, metric, task)

    return of


def best(figures: dict[str, float], metric: str | None, task: str) -> float:
    """One figure, turned so that more is better: `metric`, else what the task goes by."""
    from ..fit.settings import LESS
    from ..fit.tasks import TASKS

    name = metric or TASKS[task].metric
    if name not in figures:
        raise ConfigError(f"there is no figure {name!r}; there is {', '.join(figures)}"
                          f"{nearest(name, figures)}")
    return -figures[name] if name in LESS else figures[name]


def _adapter(folder: Path, data: str, split: str | None, batch: int
             ) -> tuple[dict[str, float], str]:
    """The figures, and the task they are of."""
    import torch

    from ..fit.finished import Finished
    from ..fit.tasks import evaluate

    run = Finished.open(folder)
    name = run.held_out(data, split)
    run.task.ready(run.tuned, next(run.tuned.model.parameters()).device, batch)
    with torch.no_grad():
        return evaluate(run.tuned.model, run.task, name, batch), run.task.data.task


class Models:
    """Model folders of one architecture, their task told by the data.

    split: default the first of `prefer` that there is, else where candidates are compared.
    """

    def __init__(self, folder: Path, data: str, split: str | None, batch: int,
                 prefer: Sequence[str] = ()):
        from ..fit.data import read
        from ..fit.finished import quiet
        from ..fit.pipelines import usual_task
        from ..fit.places import suited
        from ..fit.tasks import task_for

        quiet()
        task = usual_task(str(folder))
        found = read(data, task=task, validation=0)
        if found.labels and (names := _labels(folder, found.labels)):
            found = read(data, task=task, validation=0, labels=names)
        self.task = task_for(suited(found, str(folder)), str(folder))
        self.split = split or next((s for s in prefer if s in found.splits), None) or \
            _held_out(data, list(found.splits))
        self.batch = batch
        if found.task.endswith("preference-tuning"):
            raise ConfigError("preferences are compared with what a base says, and model folders "
                              "have none; give adapters")
        if self.split not in found.splits:
            raise ConfigError(f"{data} has no split {self.split!r}; it has "
                              f"{', '.join(found.splits)}")

    def load(self, folder: Path) -> Any:
        model = self.task.load(str(folder))
        if self.task.fresh:
            raise ConfigError(f"{folder} holds no {self.task.fresh[0]}, so it cannot be scored for "
                              f"{self.task.data.task}; give the folder of a tuned model")
        return model.eval()

    def figures(self, folder: Path, *_: Any) -> tuple[dict[str, float], str]:
        import torch

        from ..fit.tasks import evaluate

        with torch.no_grad():
            return evaluate(self.load(folder), self.task, self.split, self.batch), \
                self.task.data.task

    def score(self, model: Any, metric: str | None) -> float:
        """The figure of a model that stands, higher is better."""
        import torch

        from ..fit.tasks import evaluate

        with torch.no_grad():
            return best(evaluate(model, self.task, self.split, self.batch), metric,
                        self.task.data.task)

    def batches(self) -> list[tuple[dict[str, Any], Any]]:
        rows, out = self.task.rows(self.split), []
        for i in range(0, len(rows), self.batch):
            made = self.task.collate([rows[k] for k in range(i, min(i + self.batch, len(rows)))])
            out.append((self.task.feed(made), self.task.right(made)))
        return out


def learn(folders: Sequence[Path], data: str, split: str | None, batch: int) -> list[float]:
    """The weights of a learned soup of model folders that classify."""
    from ..formats.combine import open_models
    from ..methods.lifecycle.soup import learned

    models = open_models(folders)
    held = Models(folders[0], data, split, batch)
    if not tells_classes(held.task.data.task):
        raise ConfigError(f"--learned takes rows with a class each; {data} is for "
                          f"{held.task.data.task}: take --greedy")
    alpha, _ = learned(held.load(folders[0]), models, held.batches())
    return alpha[""].tolist()


def _labels(folder: Path, found: Sequence[str]) -> tuple[str, ...] | None:
    """The classes in the order of a model's head, where its configuration names them."""
    from ..formats.model_files import check_config

    named = check_config(folder).get("label2id") or {}
    if set(found) <= set(named):
        return tuple(sorted(named, key=lambda n: named[n]))
    generic = all(n.startswith("LABEL_") for n in named)
    if named and not (generic and len(named) == len(found)):
        raise ConfigError(f"{folder} tells {', '.join(map(str, named))} apart, the data "
                          f"{', '.join(map(str, found))}")
    return None


def _held_out(data: str, splits: Sequence[str]) -> str:
    """Where candidates are compared: never on what the result is tested with."""
    if "validation" in splits or len(splits) == 1:
        return "validation" if "validation" in splits else splits[0]
    raise ConfigError(f"{data} has {', '.join(splits)} and no validation split; say with --split "
                      "which rows were held out")
