"""Rounds: the server's side of a federation, and the simulation of one in a process.

All clients share the one base in memory and take it in turn; what a round holds beside it is one
adapter that trains and the messages of those who are done: base + N |phi|.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import BurnishError, ConfigError, FormatError
from ..engine.tuned import Tuned
from ..engine.updates import Added, updates
from .choose import Choice, fitted
from .client import Client, Loss, Member, Report, Training, joined, recipe_of, work
from .message import Content, check_coding, pack, unpack
from .rules import Rule, rule_of
from .split import number

Score = Callable[[nn.Module], Mapping[str, float]]
_NOTHING = pack({})


@dataclass
class Round:
    """clients: those whose work counts.  failed: client -> why its work does not.
    up, down: bytes of all messages; plain_up, plain_down: as they would be without a coding.
    figures: what `score` said afterwards."""

    number: int
    clients: list[Report] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    up: int = 0
    down: int = 0
    plain_up: int = 0
    plain_down: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sent:
    """A message of the server.  plain: bytes it would have without a coding."""

    message: bytes
    plain: int

    @classmethod
    def of(cls, content: Content, coding: str) -> Sent:
        message = pack(content, coding)
        return cls(message, len(message) if coding == "none" else len(pack(content)))


class Server:
    """What the server holds: its clients' expected tensors, the adapter (mean) or what each client
    has yet to merge (stack). It sees messages, and no rows.

    The model is a base of its own in an app; in a simulation it is the one that all share.
    """

    def __init__(self, model: nn.Module, clients: Sequence[Member], rule: Rule, training: Training,
                 up: str = "none", down: str = "none",
                 weights: Literal["samples", "equal"] = "samples"):
        names = [c.name for c in clients]
        if not names or len(set(names)) < len(names):
            twice = next((n for n in names if names.count(n) > 1), None)
            raise ConfigError("a federation needs clients, and has none" if not names else
                              f"two clients are called {twice!r}; names tell clients apart")
        if training.keep_optimizer and rule.merges:
            raise ConfigError(f"keep_optimizer: the rule {rule.name} begins a fresh adapter each "
                              "round, which old moments do not belong to; leave it out")
        if weights not in ("samples", "equal"):
            raise ConfigError(f"weights={weights!r}: expected samples or equal")
        self.model, self.rule, self.training = model, rule, training
        self.clients = sorted(clients, key=lambda c: c.name)
        self.up = check_coding(up, not rule.merges)
        self.down = check_coding(down, False)
        self.weights = weights
        self.content: Content = {}                   # the adapter that all go on from
        self.waiting: dict[str, list[Sent]] = {n: [] for n in names}     # to be merged by each
        self.places: dict[str, Any] = {}
        self.expected: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}   # by recipe
        for client in self.clients:
            recipe = recipe_of(client, training)
            if recipe not in self.expected:
                self.expected[recipe] = self._begin(client)
        if not rule.merges and len({tuple(e.items()) for e in self.expected.values()}) > 1:
            raise ConfigError(f"the rule {rule.name} needs the same tensors of every client, and "
                              f"{' and '.join(self.expected)} train different ones; take the rule "
                              "stack, or one recipe")

    def _begin(self, client: Member) -> dict[str, tuple[torch.Size, torch.dtype]]:
        tuned = joined(self.model, client, self.rule, self.training, 1)
        try:
            said = self.rule.says(tuned)
            self.content = {} if self.rule.merges else dict(sorted(said.items()))
            for update in updates(tuned) if self.rule.merges else ():
                if isinstance(update, Added):
                    self.places[update.name] = update.place
            return {n: (t.shape, t.dtype) for n, t in sorted(said.items())}
        finally:
            tuned.detach()

    def chosen(self, turn: int, sampled: int | None) -> list[Member]:
        """The clients of a round, by name; `sampled` of them, drawn by the seed and the round."""
        if sampled is None:
            return self.clients
        draw = random.Random(number(self.training.seed, "clients", turn))
        return sorted(draw.sample(self.clients, sampled), key=lambda c: c.name)

    def sends(self, client: Member) -> list[Sent]:
        """The messages for a client, oldest first: sums that it has yet to merge, or the adapter
        as it stands."""
        if self.rule.merges:
            return list(self.waiting[client.name])
        return [Sent.of(self.content, self.down)]

    def has(self, client: Member) -> None:
        """It has got what was waiting for it."""
        self.waiting[client.name].clear()

    def hears(self, client: Member, message: bytes, received: Content) -> Content:
        """What a client says. Raises FormatError for what its recipe cannot have said."""
        said = unpack(message, None if self.rule.merges else received)
        expected = self.expected[recipe_of(client, self.training)]
        if odd := sorted(said.keys() ^ expected.keys()):
            raise FormatError(f"it {'lacks' if odd[0] in expected else 'has'} {odd[0]}")
        for name, t in said.items():
            if (t.shape, t.dtype) != expected[name]:
                shape, dtype = expected[name]
                raise FormatError(f"{name} is {t.dtype} {list(t.shape)}, and {dtype} "
                                  f"{list(shape)} is expected")
            if t.is_floating_point() and not torch.isfinite(t).all():
                raise FormatError(f"{name} is not finite")
        return said

    def gather(self, said: Mapping[str, tuple[Content, int]]) -> None:
        """One thing of what was said, by client with its rows; in the order of names, whoever came
        first. It is put into the base at once where the rule merges."""
        order = sorted(said)
        rows = [said[n][1] if self.weights == "samples" else 1 for n in order]
        made = self.rule.gather([said[n][0] for n in order], rows, self.model.get_parameter)
        if not self.rule.merges:
            self.content = made
            return
        sent = Sent.of(made, self.down)
        self.rule.land(self.model, unpack(sent.message), self.places)
        for queue in self.waiting.values():
            queue.append(sent)

    def join(self) -> Tuned:
        """The server's model with the adapter as it stands (rules that do not merge)."""
        if self.rule.merges:
            raise ConfigError(f"the rule {self.rule.name} has put everything into the model itself")
        tuned = joined(self.model, self.clients[0], self.rule, self.training, 1)
        try:
            self.rule.put(tuned, self.content)
        except BaseException:
            tuned.detach()
            raise
        return tuned


@dataclass
class Federation:
    """A finished federation. server: it can join the adapter to the model (``server.join()``).
    choices: of clients with a memory, what was chosen for it."""

    server: Server = field(repr=False)
    rounds: list[Round] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def bytes(self) -> dict[str, int]:
        return {k: sum(getattr(r, k) for r in self.rounds)
                for k in ("up", "down", "plain_up", "plain_down")}

    def to_dict(self) -> dict[str, Any]:
        return {"rule": self.server.rule.name, "bytes": self.bytes,
                "choices": {n: asdict(c) for n, c in self.choices.items()},
                "rounds": [r.to_dict() for r in self.rounds]}


def federate(model: nn.Module, clients: Sequence[Client], recipe: str = "lora(rank=8)", *,
             rule: str | Rule = "mean", rounds: int = 3, sampled: int | None = None,
             epochs: int = 1, steps: int | None = None, batch: int = 16, lr: float = 1e-3,
             targets: Any = None, head: bool | str = "auto", loss: Loss | None = None,
             up: str = "none", down: str = "none",
             weights: Literal["samples", "equal"] = "samples",
             on_failure: Literal["name", "refuse"] = "name", keep_optimizer: bool = False,
             ranks: Sequence[int] = (), bits: Sequence[int] = (16, 8, 4),
             trainable: int | None = None,
             seed: int = 0, score: Score | None = None,
             on_round: Callable[[Round], None] | None = None, **optimizer: Any) -> Federation:
    """Clients train in rounds and send what trained; a server makes one thing of it.

    model: the base that all have. With the rule "mean" it is left as it was (``.server.join()``
        gives it the adapter); with "stack" the sums are in it afterwards. It trains in the mode it
        is in.
    recipe: of clients that have none of their own.  rule: "mean", "stack", or an object with the
        settings of one (rules.py).
    sampled: clients of a round, drawn by the seed; None: all.
    epochs, steps: passes over a client's rows in a round, or updates.
    up, down: how messages are coded (message.py). Bytes are counted of the messages themselves; the
        base is there beforehand and is not counted.
    weights: of a client: its rows, or all alike.
    on_failure: a client that fails is named in its round, and the others go on; "refuse" ends the
        federation. Where a round ends so, everything stands as before it.
    keep_optimizer: moments and schedules go on from round to round at each client; otherwise they
        begin anew.
    ranks, bits, trainable: what may be chosen for clients with a memory, and how many values a
        client's matrices may train, by their importance (choose.py).
    score: figures of the model after each round, with the adapter on it.
    optimizer: for ``tuned.optimizer``.

    Nothing depends on the order in which clients are given. One client and one round are a local
    run, bit for bit. Beside ``dp`` in the recipe each client draws its rows as it must and accounts
    over all rounds: what is protected is a row of a client.

    Raises ConfigError for clients, recipes and rules that do not go together, BurnishError where
    nobody's work counts.
    """
    if on_failure not in ("name", "refuse"):
        raise ConfigError(f"on_failure={on_failure!r}: expected name or refuse")
    if sampled is not None and not 1 <= sampled <= len(clients):
        raise ConfigError(f"sampled={sampled}: expected 1 to {len(clients)}, the clients there are")
    training = Training(recipe, rounds, epochs, steps, batch, lr, seed, targets, head, loss,
                        keep_optimizer, optimizer)
    if ranks and not any(c.memory is not None for c in clients):
        raise ConfigError("ranks are chosen for clients with a memory, and none of these has one; "
                          "give each client its recipe")
    clients, choices = fitted(model, clients, training, ranks=ranks, bits=bits,
                              trainable=trainable)
    server = Server(model, clients, rule_of(rule), training, up, down, weights)
    done, kept = Federation(server, choices=choices), {c.name: dict[str, Any]() for c in clients}
    for turn in range(1, rounds + 1):
        found = _round(server, server.chosen(turn, sampled), turn, on_failure == "refuse", kept)
        if score is not None:
            found.figures = dict(scored(server, score))
        done.rounds.append(found)
        if on_round is not None:
            on_round(found)
    return done


def scored(server: Server, score: Score) -> Mapping[str, float]:
    """Figures of what the server has."""
    if server.rule.merges:
        return score(server.model)
    tuned = server.join()
    try:
        return score(tuned.model)
    finally:
        tuned.detach()


def _round(server: Server, clients: Sequence[Any], turn: int, strict: bool,
           kept: Mapping[str, dict[str, Any]]) -> Round:
    out, said = Round(turn), dict[str, tuple[Content, int]]()
    for client in clients:
        sent = server.sends(client)
        got = (sum(len(s.message) for s in sent), sum(s.plain for s in sent))
        # what is to be merged is in the base that all share already
        start = _NOTHING if server.rule.merges else sent[-1].message
        try:
            message, report = work(server.model, client, server.rule, server.training, turn, start,
                                   server.up, kept[client.name])
            heard = server.hears(client, message, unpack(start))
        except Exception as e:                       # of any library below
            why = f"{type(e).__name__}: {e}"
            if strict:
                raise BurnishError(f"round {turn}: client {client.name!r} failed, and the round "
                                   f"was told to refuse that: {why}") from e
            out.failed[client.name] = why
        else:
            said[client.name] = (heard, report.rows)
            report.received, report.plain = got[0], (report.plain[0], got[1])
            out.clients.append(report)
            out.up, out.plain_up = out.up + report.sent, out.plain_up + report.plain[0]
        out.down, out.plain_down = out.down + got[0], out.plain_down + got[1]
        server.has(client)
    if not out.clients:
        first = next(iter(out.failed))
        raise BurnishError(f"round {turn}: no client's work counts; {first!r}: "
                           f"{out.failed[first]}")
    server.gather(said)
    return out

