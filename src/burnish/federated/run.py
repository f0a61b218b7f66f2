"""A federation of a data set's rows, as ``burnish federate`` runs it, and the rows it is beside."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import BurnishError, ConfigError
from ..core.recipe import Recipe, parse
from ..fit.assets import GLYPH_VIT
from ..fit.data import read
from ..fit.driving import quiet_libraries
from ..fit.tasks import Task, embedded, evaluate, task_for
from ..formats import claim, safe, staged
from ..memory import parse_bytes
from .client import Client
from .rounds import Federation, Round, federate
from .rules import RULES, Rule, Stack, rule_of
from .split import dirichlet, even


@dataclass(frozen=True)
class Part:
    """Some of the rows of a task."""

    rows: Any
    mine: list[int]

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, i: int) -> Any:
        return self.rows[self.mine[i]]


@dataclass
class Setting:
    """Everything that rows of a comparison share."""

    task: Task
    model: nn.Module
    clients: list[Client]
    recipe: str
    alpha: float | None
    words: dict[str, Any] = field(default_factory=dict)
    loss: Any = None
    reads: Sequence[tuple[str, Any]] = ()            # what an output may not be

    @property
    def last(self) -> str:
        """The split that the end is judged by."""
        return "test" if "test" in self.task.data.splits else "validation"

    def score(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        return evaluate(model, self.task, split)


def setting(recipe: str, *, model: str | Path = GLYPH_VIT, data: Any = "digits", clients: int = 32,
            alpha: float | None = None, ranks: Sequence[int] = (), memory: Sequence[Any] = (),
            seed: int = 0, text: str | None = None, label: str | None = None,
            image: str | None = None, max_length: int | None = None, **words: Any) -> Setting:
    """Rows, a model, and clients who have the rows among themselves.

    alpha: of the Dirichlet law by which classes are divided (0.1 where nothing is said); rows
        without classes are dealt out evenly. ranks, memory: dealt to the clients in turn; with a
        memory the ranks are those that may be chosen.
    """
    quiet_libraries()
    parts = parse(recipe)                            # before anything is loaded
    for m in memory:
        parse_bytes(m)
    found = read(data, text=text, label=label, image=image, seed=seed)
    embedded(found.task, recipe)
    if "validation" not in found.splits:
        raise ConfigError(f"{found.source} has no validation rows, and rounds are told by them")
    task = task_for(found, str(model), seed=seed, max_length=max_length)
    classed = found.task in ("image-classification", "text-classification")
    if alpha is not None and not classed:
        raise ConfigError(f"alpha={alpha} divides classes among clients, and rows for {found.task} "
                          "have none; leave it out, and they are dealt out evenly")
    torch.manual_seed(seed)                          # a new head is drawn
    module = task.load(str(model)).train()
    task.check(module)
    rows = task.rows("train")
    if classed:
        labels = found.train["label"][:]
        of_row = [labels[rows.source(i)] for i in range(len(rows))]
        alpha = 0.1 if alpha is None else alpha
        shares = dirichlet(of_row, clients, alpha, seed)
    else:
        shares = even(len(rows), clients, seed)
    loss = task.call(task.example(1), False)[1]

    def collate(some: list[Any]) -> Any:
        return task.call(task.collate(some), False)[0]

    width = len(str(clients - 1))
    recipes = [str(_ranked(parts, r)) for r in ranks] if ranks and not memory else [None]
    every = [Client(f"client-{i:0{width}}", Part(rows, mine), collate, recipe=r, memory=m)
             for i, mine, r, m in zip(range(clients), shares, cycle(recipes),
                                      cycle(memory or [None]), strict=False)]
    if memory and ranks:
        words["ranks"] = tuple(ranks)
    return Setting(task, module, every, recipe, alpha, words | {"seed": seed}, loss,
                   _inputs(model, data))


def _ranked(recipe: Recipe, rank: int) -> Recipe:
    """The recipe with another rank."""
    if len(have := [m for m in recipe if hasattr(m, "rank")]) != 1:
        raise ConfigError(f"{recipe} has {len(have)} parts of a rank, and ranks are for one")
    return Recipe([replace(m, rank=rank) if m is have[0] else m for m in recipe])


def once(at: Setting, rule: str = "mean", rank: int | None = None,
         on_round: Callable[[Round], None] | None = None, clients: Sequence[Client] | None = None,
         **more: Any) -> tuple[Federation, dict[str, float], nn.Module]:
    """One federation: (its rounds, the figures at the end, the model, with the sums of a rule that
    merges). `more` goes before the setting's own words."""
    made = Stack(rank) if rule == "stack" else rule_of(rule)
    if rank is not None and rule != "stack":
        raise ConfigError(f"rank={rank} is what the stack is sent with, and the rule is {rule}")
    model = copy.deepcopy(at.model)
    words = at.words | more
    done = federate(model, clients or at.clients, at.recipe, rule=made, loss=at.loss,
                    score=at.score, on_round=on_round, **words)
    return done, _end(at, done, model), model


def _end(at: Setting, done: Federation, model: nn.Module) -> dict[str, float]:
    if done.server.rule.merges:
        return at.score(model, at.last)
    tuned = done.server.join()
    try:
        return at.score(tuned.model, at.last)
    finally:
        tuned.detach()


def check_output(output: Path, rule: str, model: Any, data: Any) -> None:
    """Raises ConfigError for a folder that is an input, or has files of others or of another
    kind."""
    claim.refuse_overlap(output, _inputs(model, data), whole=True)
    staged.refuse_others(output, _kind(rule_of(rule)))


def _inputs(model: Any, data: Any) -> list[tuple[str, Any]]:
    return [("the model", model), ("the data", data)]


def _kind(rule: Rule) -> str:
    return "model" if rule.merges else "adapter"


def save(at: Setting, done: Federation, model: nn.Module, output: Path, facts: dict[str, Any]
         ) -> None:
    """The adapter, or the model that has the sums, what reads rows for it, and what happened: all
    of it or, where anything fails, nothing."""
    rule = done.server.rule
    with staged.replace(output, _kind(rule), at.reads) as new:
        if rule.merges:
            model.save_pretrained(new)
        else:
            tuned = done.server.join()
            try:
                tuned.save(new)
            finally:
                tuned.detach()
        if hasattr(at.task.processor, "save_pretrained"):
            at.task.processor.save_pretrained(new)
        safe.write_json(new / "federation.json", facts)


# -- beside what it should be seen ------------------------------------------------------------
def compare(at: Setting, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """The same rows and settings five ways: nothing trained, everybody's rows in one place, every
    client alone, the mean of what trains, the stack."""
    started = time.perf_counter()
    found = [{"way": "the base, untrained", **_figures(at, at.score(at.model, at.last)),
              "seconds": time.perf_counter() - started}]
    rows = at.task.rows("train")
    pooled = Client("everybody", Part(rows, list(range(len(rows)))), at.clients[0].collate)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("central: all rows in one place", {"clients": [pooled], "sampled": None, "ranks": ()}),
        ("local only: each client alone", {}),
        *((f"{rule}: {'FedAvg of what trains' if rule == 'mean' else 'FLoRA'}", {"rule": rule})
          for rule in RULES)]
    for way, words in ways:
        started = time.perf_counter()
        try:
            row = _alone(at) if way.startswith("local") else _row(at, *once(at, **words)[:2])
        except BurnishError as e:                    # a mean of unlike ranks; nobody's work counts
            row = {"refused": str(e)}
        found.append({"way": way, **row, "seconds": time.perf_counter() - started})
        say(f"{way}: " + (row.get("refused") or f"{row['figure']:.4f}"))
    return found


def _figures(at: Setting, figures: dict[str, float]) -> dict[str, Any]:
    return {"metric": at.task.metric, "figure": figures[at.task.metric]}


def _row(at: Setting, done: Federation, figures: dict[str, float]) -> dict[str, Any]:
    spent = [t["epsilon"] for c in done.rounds[-1].clients for t in c.told.values()
             if "epsilon" in t]
    return _figures(at, figures) | done.bytes | {"epsilon": max(spent, default=None)}


def _alone(at: Setting) -> dict[str, Any]:
    """Every client by itself, for as many updates: the mean over clients, and the range."""
    words = at.words | {"sampled": None, "up": "none", "down": "none"}
    words.pop("weights", None)
    scores = []
    for client in at.clients:
        done = federate(at.model, [client], at.recipe, loss=at.loss,
                        **words | ({} if client.memory else {"ranks": ()}))
        scores.append(_figures(at, _end(at, done, at.model))["figure"])
    return {"metric": at.task.metric, "figure": sum(scores) / len(scores),
            "range": [min(scores), max(scores)]}


def facts(at: Setting, done: Federation, figures: dict[str, float]) -> dict[str, Any]:
    """What is told of one federation, in plain values."""
    labels = at.task.data.labels
    return {"recipe": at.recipe, "data": at.task.data.summary(), "alpha": at.alpha,
            "clients": [{"name": c.name, "rows": len(c.rows), "recipe": c.recipe,
                         "memory": c.memory} for c in at.clients],
            "classes": len(labels) if labels else None, "split": at.last, "figures": figures,
            "choices": {n: asdict(c) for n, c in done.choices.items()},
            "words": {k: v for k, v in at.words.items() if k != "loss"}, **done.to_dict()}
