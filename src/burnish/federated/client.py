"""A client: its own rows, its own recipe, and one round of its work, message in and message out.

The same function runs in a simulation, where all share one base in turn, and in a Flower app, where
each client has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import cut, moved
from ..core.draw import random_kept
from ..core.errors import ConfigError
from ..core.recipe import parse
from ..core.sampling import Sampling
from ..engine.tune import tune
from ..engine.tuned import Tuned
from ..fit.secret import Drawn
from ..fit.state import load_optimizer_state, optimizer_state
from .message import Content, pack, unpack
from .rules import Rule
from .split import number

Loss = Callable[[Any, Any], Tensor]


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one batch, key by key."""
    return {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}


@dataclass
class Member:
    """A client as a server knows it.

    recipe, batch: its own, where they are not everybody's.
    memory: what it has ("200MB"); its recipe is then one that fits (federated/choose.py).
    """

    name: str
    recipe: str | None = field(default=None, kw_only=True)
    batch: int | None = field(default=None, kw_only=True)
    memory: str | int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"client {self.name!r}: batch={self.batch}: expected at least 1")


@dataclass
class Client(Member):
    """Whose rows train.

    rows: whatever can be counted and indexed; they never leave the client. collate: rows -> batch.
    secret: a seed that nobody else knows. Without one, who knows the federation's seed can draw a
        client's noise again; a simulation may, and in Flower a private client makes one up.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], Any] = stacked
    secret: int | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.rows):
            raise ConfigError(f"client {self.name!r} has no rows, so it has no part")


@dataclass(frozen=True)
class Training:
    """What is the same for all clients; see :func:`burnish.federated.federate`."""

    recipe: str = "lora(rank=8)"
    rounds: int = 3
    epochs: int = 1
    steps: int | None = None
    batch: int = 16
    lr: float = 1e-3
    seed: int = 0
    targets: Any = None
    head: bool | str = "auto"
    loss: Loss | None = None
    keep_optimizer: bool = False
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs", "steps", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")


@dataclass
class Report:
    """A client's part of a round.

    sent, received: bytes of its messages; plain: (sent, received) as they would be without a
    coding. loss: mean over its updates; None where rows are protected. told: what parts of the
    recipe say of the run (the epsilon of dp).
    """

    name: str
    recipe: str
    rows: int
    updates: int
    sent: int = 0
    received: int = 0
    plain: tuple[int, int] = (0, 0)
    loss: float | None = None
    told: dict[str, Any] = field(default_factory=dict)


def recipe_of(client: Member, training: Training) -> str:
    return str(parse(client.recipe or training.recipe))


def private(recipe: str) -> bool:
    return any(m.private for m in parse(recipe))


def steps_of(client: Client, training: Training) -> int:
    """Updates of one round. Where rows are drawn each by itself, a pass is as many as are expected
    to draw each once."""
    if training.steps is not None:
        return training.steps
    rows, batch = len(client.rows), batch_of(client, training)
    each = max(1, round(rows / batch)) if private(recipe_of(client, training)) \
        else math.ceil(rows / batch)
    return training.epochs * each


def batch_of(client: Client, training: Training) -> int:
    return min(client.batch or training.batch, len(client.rows))


def batches(client: Client, training: Training, turn: int) -> Iterator[Any]:
    """The batches of a client's round `turn` (1, 2, ...), a function of the seed, the round and
    the client's name alone: shuffled passes; each row drawn by itself where a part counts on it."""
    size, rows = batch_of(client, training), client.rows
    seed = number(training.seed, "rows", client.name, *_secret(client))

    def every() -> Iterator[list[int]]:
        if private(recipe_of(client, training)):
            drawn = Drawn(Sampling(len(rows), size), seed)
            for epoch in count():
                drawn.set_epoch(turn * 1_000_003 + epoch)
                yield from drawn
        for epoch in count():
            g = torch.Generator().manual_seed(number(seed, turn, epoch))
            order = torch.randperm(len(rows), generator=g).tolist()
            yield from (order[i:i + size] for i in range(0, len(order), size))

    for some in islice(every(), steps_of(client, training)):
        yield client.collate([rows[i] for i in some]) if some else \
            cut(client.collate([rows[0]]), 0)


def _secret(client: Client) -> tuple[int, ...]:
    return () if client.secret is None else (client.secret,)


def joined(model: nn.Module, client: Member, rule: Rule, training: Training, turn: int) -> Tuned:
    """The client's recipe on a base: for all the same start, or a fresh one of its own."""
    seed = number(training.seed, "start", turn, client.name) if rule.merges else training.seed
    return tune(model, recipe_of(client, training), targets=training.targets, head=training.head,
                seed=seed)


def work(model: nn.Module, client: Client, rule: Rule, training: Training, turn: int,
         received: bytes, coding: str = "none", kept: dict[str, Any] | None = None
         ) -> tuple[bytes, Report]:
    """One client's round `turn` on a base that holds all that was merged before: (message, report).

    kept: what stays at the client from round to round: what a private recipe has spent, and with
        ``keep_optimizer`` the optimizer's state. It is changed.

    The model is left as it was, and so are random generators. Raises whatever training raises.
    """
    recipe, kept = recipe_of(client, training), {} if kept is None else kept
    content = unpack(received)
    secret = private(recipe)
    lasting = secret or training.keep_optimizer
    steps = steps_of(client, training)
    with random_kept():
        torch.manual_seed(number(training.seed, "training", turn, client.name, *_secret(client)))
        tuned = joined(model, client, rule, training, turn)
        trained, device = list(tuned.parameters()), device_of(model)
        try:
            rule.put(tuned, content)
            before = _standing(tuned)
            tuned.total_steps = steps * (training.rounds if lasting else 1)
            if secret:
                tuned.sampling = Sampling(len(client.rows), batch_of(client, training))
            optimizer = tuned.optimizer(lr=training.lr, **training.optimizer)
            if "optimizer" in kept:
                load_optimizer_state(optimizer, _named(tuned), kept["optimizer"])
            if "timeline" in kept:
                tuned.timeline.load(kept["timeline"])
            losses = []
            try:
                for batch in batches(client, training, turn):
                    losses.append(tuned.step(moved(batch, device), training.loss).detach())
            finally:
                if lasting:                          # what was spent is spent, whatever happens
                    kept["timeline"] = tuned.timeline.state()
            if training.keep_optimizer:
                kept["optimizer"] = optimizer_state(optimizer, _named(tuned))
            _same(tuned, before)
            said = rule.says(tuned)
            told = tuned.timeline.told() if secret else {}
        finally:
            for p in trained:
                p.grad = None
            tuned.detach()
    like = None if rule.merges else content
    message = pack(said, coding, like)
    bare = len(message) if coding == "none" else len(pack(said))
    return message, Report(client.name, recipe, len(client.rows), steps, len(message),
                           len(received), (bare, len(received)),
                           None if secret else float(torch.stack(losses).double().mean()), told)


def device_of(model: nn.Module) -> torch.device:
    """Where a model reads its batches: rows are wherever a client has them."""
    return next(p.device for p in model.parameters())


def _named(tuned: Tuned) -> list[tuple[str, nn.Parameter]]:
    return list(tuned.model.named_parameters())


def _standing(tuned: Tuned) -> Content:
    """What belongs to the adapter and does not train."""
    trained = {n for n, _ in tuned.named_parameters()}
    return {n: t.clone() for n, t in tuned.tensors().items() if n not in trained}


def _same(tuned: Tuned, before: Content) -> None:
    """Raises ConfigError for what training moved and no rule sums."""
    after = _standing(tuned)
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            raise ConfigError(
                f"{name} moves as {tuned.recipe} trains, and is no tensor that trains: clients "
                "would each have their own and no rule makes one of them; put norms that keep "
                "statistics in evaluation mode, or take another recipe")
