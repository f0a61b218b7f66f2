"""``burnish adapt``: a model that adapts to the rows it answers, beside what it says without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, nearest
from .app import Json, app
from .screen import emit, table

#: in what order rows come
ORDERS = ("data", "shuffled", "class")


@app.command()
def adapt(
    source: Annotated[Path, typer.Argument(help="The folder of a finished fit, or of a model.")],
    data: Annotated[str, typer.Argument(help="As for fit; its labels only score.")],
    how: Annotated[list[str] | None, typer.Option(help="tent, lame, 'alpha_bn(alpha=0.5)', ... "
                                                       "(default tent); may repeat: a column "
                                                       "each.")] = None,
    corrupt: Annotated[str | None, typer.Option(help="Make pictures worse first: noise,blur or "
                                                     "all; a row each.")] = None,
    severity: Annotated[int | None, typer.Option(help="Of corruptions, 1 to 5; default: 5.")
                        ] = None,
    order: Annotated[str, typer.Option(help="data: as the rows come; shuffled; class: one class "
                                            "after the other.")] = "data",
    split: Annotated[str | None, typer.Option(help="Default: test, else validation, else train.")
                     ] = None,
    batch: Annotated[int, typer.Option(help="Rows at once; 1 with episodic methods.", min=1)] = 64,
    seed: Annotated[int | None, typer.Option(help="Of corruptions and of the shuffled order; "
                                                  "default: 0.")] = None,
    base: Annotated[str | None, typer.Option(help="Of a run: the base model, where it moved "
                                                  "since.")] = None,
    json: Json = False,
) -> None:
    """Test-time adaptation: figures of a model on a stream of rows, before and with it.

    Every column begins at the model as it is in the folder, and nothing is written. Labels have no
    part but in the figures; label_shift and itta learn beforehand, of the rows and labels of the
    data's train split.
    """
    parts = [_part(text) for text in how or ["tent"]]
    if severity is not None and corrupt is None:
        raise ConfigError("--severity is of corruptions: give --corrupt")
    severity = 5 if severity is None else severity
    names = _corruptions(corrupt, severity)
    if order not in ORDERS:
        raise ConfigError(f"--order {order}: expected {', '.join(ORDERS)}{nearest(order, ORDERS)}")
    if seed is not None and not names and order != "shuffled":
        raise ConfigError("--seed is of corruptions and of the shuffled order: give --corrupt or "
                          "--order shuffled")
    seed = seed or 0
    stream = _opened(source, data, split, batch, base)
    adapted = [(str(p), p.lifecycle(stream.tuned, *stream.source(p)))   # refused before any row
               for p in parts]
    stream.arrange(order, seed)
    found = []
    for name in names or (None,):
        stream.corrupt(name, severity, seed)
        found.append({"corruption": name, "before": stream.figures(),
                      "after": {said: stream.figures(a) for said, a in adapted}})
    told = {"source": source, "data": data, "split": stream.split, "rows": stream.count,
            "batch": batch, "order": order, "severity": severity if names else None, "seed": seed,
            "metric": stream.task.metric, "figures": found}
    if len(found) > 1:
        told["mean"] = _mean(found)
    emit(json, told, _text(told, [said for said, _ in adapted]))


def _part(text: str) -> Any:
    from ..core import registry
    from ..core.recipe import parse

    parts = list(parse(text))
    if len(parts) != 1 or not getattr(parts[0], "adapts", False):
        known = [n for n in registry.names(extra=False) if getattr(registry.find(n), "adapts",
                                                                   False)]
        raise ConfigError(f"--how {text}: expected one method that adapts: {', '.join(known)}"
                          f"{nearest(text, known)}")
    return parts[0]


def _corruptions(text: str | None, severity: int) -> list[str]:
    from ..fit.corruptions import CORRUPTIONS, check

    if text is None:
        return []
    names = list(CORRUPTIONS) if text == "all" else [part.strip() for part in text.split(",")]
    for name in names:
        check(name, severity)
    if len(set(names)) < len(names):
        raise ConfigError(f"--corrupt {text} names one of them twice")
    return names


class _Stream:
    """The rows of one split, as one model answers them."""

    def __init__(self, tuned: Any, task: Any, split: str, batch: int):
        from ..fit.kinds import tells_classes

        self.tuned, self.task, self.split, self.batch = tuned, task, split, batch
        if not tells_classes(task.data.task):
            raise ConfigError("what adapts reads the probabilities of classes, and this is "
                              f"{task.data.task}")
        self.rows = task.data.splits[split]
        self.count = len(self.rows)

    def arrange(self, order: str, seed: int) -> None:
        import torch

        if order == "data":
            return
        index = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed)).tolist()
        if order == "class":
            labels = self.rows["label"][:]
            index = sorted(range(self.count), key=lambda i: labels[i])
        self.rows = self.rows.select(index)
        if at := self.task.data.where.get(self.split):
            self.task.data.where[self.split] = lambda i: at(index[i])

    def source(self, part: Any) -> tuple[Iterator[Any], ...]:
        """What a part that learns beforehand is given besides the model: labelled batches."""
        if not part.learns:
            return ()
        if self.split == "train":
            raise ConfigError(f"{part.name} learns of the labels of the train split, which is the "
                              "stream: give another --split")
        if "train" not in self.task.data.splits:
            raise ConfigError(f"{part.name} learns of the labels of the train split, and "
                              f"{self.task.data.source} has none")
        return (self._learnt(self.task.rows("train")),)

    def _learnt(self, rows: Any) -> Iterator[Any]:
        for at in range(0, len(rows), self.batch):
            batch = self.task.collate([rows[i] for i in range(at, min(at + self.batch, len(rows)))])
            yield {**self.task.feed(batch), "labels": self.task.right(batch)}

    def corrupt(self, name: str | None, severity: int, seed: int) -> None:
        from ..fit.corruptions import Corrupted

        if name is not None and self.task.takes != ("image",):
            raise ConfigError(f"--corrupt makes pictures worse, and this is {self.task.data.task}")
        self.task.data.splits[self.split] = self.rows if name is None else \
            Corrupted(self.rows, name, severity, seed)

    def figures(self, adapted: Any = None) -> dict[str, float]:
        """Of the model as it is, or as it adapts to these rows from the source on."""
        import torch
        from torch import nn

        from ..fit.tasks import evaluate

        class Asked(nn.Module):
            def forward(self, **batch: Any) -> Any:
                return adapted(batch)

        if adapted is None:
            model = self.tuned if isinstance(self.tuned, nn.Module) else self.tuned.model
            with torch.no_grad():
                return evaluate(model, self.task, self.split, self.batch)
        with adapted:
            return evaluate(Asked(), self.task, self.split, self.batch)


def _opened(source: Path, data: str, split: str | None, batch: int, base: str | None) -> _Stream:
    from ..fit.finished import Finished
    from ..formats.combine import kind_of
    from .scoring import Models

    if kind_of([source]) == "model":
        if base is not None:
            raise ConfigError(f"--base is of a run's adapter, and {source} is a whole model")
        held = Models(source, data, split, batch, prefer=("test", "validation", "train"))
        return _Stream(held.load(source), held.task, held.split, batch)
    run = Finished.open(source, base)
    _, name, _ = run.chosen(data, split, {})
    run.task.ready(run.tuned, next(run.tuned.model.parameters()).device, batch)
    return _Stream(run.tuned, run.task, name, batch)


def _mean(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}

    return {"before": mean([f["before"] for f in found]),
            "after": {k: mean([f["after"][k] for f in found]) for k in found[0]["after"]}}


def _text(told: Mapping[str, Any], how: Sequence[str]) -> str:
    rows, metric = list(told["figures"]), told["metric"]
    if "mean" in told:
        rows.append({"corruption": "mean", **told["mean"]})
    head = ("" if told["severity"] is None else f"severity {told['severity']}", "before", *how)
    cells = [(r["corruption"] or "as it is", f"{r['before'][metric]:.4f}",
              *(f"{r['after'][h][metric]:.4f}" for h in how)) for r in rows]
    order = {"data": "as they come", "shuffled": "shuffled", "class": "class by class"}
    return (f"{metric} on {told['rows']} rows of {told['data']} ({told['split']}), {told['batch']} "
            f"at once, {order[told['order']]}\n" + table(head, cells, right=range(1, len(head))))
