"""The same clients and the same server in Flower (``pip install burnish[federated]``).

    app = client_app(load_base, load_client, training, rule="stack")          # a ClientApp
    result = strategy(load_base(), members, training, rule="stack").start(grid, initial_arrays=...)

A message carries a federation's own messages as bytes, so what is counted and what is summed is as
in :func:`burnish.federated.federate`, bit for bit. Flower's own strategies, and its secure
aggregation, sum arrays of one shape: they do not apply (a stack is no sum).
"""

from __future__ import annotations

import importlib.util
import json
import random
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.anatomy import Anatomy
from ..core.errors import BurnishError, ConfigError, FormatError
from ..fit.state import pack as packed
from ..fit.state import unpack as unpacked
from .client import Client, Member, Training, private, recipe_of, work
from .message import check_coding, pack, unpack
from .rounds import Sent, Server
from .rules import Rule, rule_of
from .split import number

RECORD, KEPT = "burnish", "burnish.kept"


def _flower() -> Any:
    if importlib.util.find_spec("flwr") is None:
        raise ConfigError("Flower is not installed: pip install burnish[federated]; a federation "
                          "in one process needs none (burnish.federated.federate)")
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp.strategy

    return flwr


def client_app(base: Callable[[], nn.Module], client: Callable[[Any], Client], training: Training,
               rule: str | Rule = "mean", up: str = "none") -> Any:
    """A ``ClientApp`` that trains one client.

    base: the model that all have.  client: Flower's context -> the client of that node, with rows.
    training, rule, up: as the server has them.

    What a client keeps between rounds (sums to merge, what dp has spent, moments where they are
    declared) is in the state of Flower's context, which never leaves the node.
    """
    flwr, made = _flower(), rule_of(rule)
    check_coding(up, not made.merges)
    app = flwr.clientapp.ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        record = message.content.config_records[RECORD]
        mine, turn = client(context), int(record["turn"])
        if mine.secret is None and private(recipe_of(mine, training)):
            mine = replace(mine, secret=secrets.randbits(62))     # the server knows the other seed
        kept = context.state.config_records.get(KEPT)
        merged = [] if kept is None else list(kept["merged"])
        state = {} if kept is None else _unkept(kept)
        if (first := int(record["first"])) > len(merged):
            raise BurnishError(f"client {mine.name!r} has {len(merged)} sums of the rounds before, "
                               f"and is sent those from number {first} on")
        merged = merged[:first] + list(record["merge"])
        model = base()
        places = {p.name: p for p in Anatomy.of(model).places}
        for sums in merged:
            made.land(model, unpack(sums), places)
        try:
            said, report = work(model, mine, made, training, turn, record["start"], up, state)
        finally:
            context.state[KEPT] = _kept(flwr, merged, state)
        told = {"message": said, "name": mine.name, "rows": report.rows,
                "report": json.dumps({"updates": report.updates, "told": report.told})}
        content = flwr.app.RecordDict({RECORD: flwr.app.ConfigRecord(told)})
        return flwr.app.Message(content, reply_to=message)

    return app


def _kept(flwr: Any, merged: list[bytes], state: Mapping[str, Any]) -> Any:
    tree, tensors = packed(dict(state))
    return flwr.app.ConfigRecord({"merged": merged, "tree": json.dumps(tree),
                                  "tensors": pack(tensors)})


def _unkept(kept: Any) -> dict[str, Any]:
    return unpacked(json.loads(kept["tree"]), unpack(kept["tensors"]))


def _said(reply: Any) -> tuple[str, bytes, int]:
    """(name, message, rows) of a reply. Raises FormatError for one that lacks them: it is somebody
    else's, and rows are its weight in the mean."""
    found = reply.content.config_records.get(RECORD) or {}
    name, message, rows = (found.get(k) for k in ("name", "message", "rows"))
    if not isinstance(name, str) or not isinstance(message, bytes) or type(rows) is not int \
            or rows < 1:
        raise FormatError("its reply is none of a client of a federation: a name, a message and a "
                          f"number of rows from 1 on are expected, and rows is {rows!r}")
    return name, message, rows


def strategy(model: nn.Module, members: Sequence[Member], training: Training,
             rule: str | Rule = "mean", *, sampled: int | None = None, up: str = "none",
             down: str = "none", weights: Any = "samples", on_failure: str = "name") -> Any:
    """A Flower ``Strategy`` round a :class:`~burnish.federated.Server`; ``.server`` is it.

    model: the server's own base; with the rule "stack" the sums are in it afterwards.
    members: the clients by name, with recipes where they are their own, and no rows.
    sampled: nodes of a round, drawn by the seed; None: all there are.
    ``.failed`` has round -> node or name -> why, of clients whose work does not count.
    """
    flwr, server = _flower(), Server(model, members, rule_of(rule), training, up, down, weights)
    if on_failure not in ("name", "refuse"):
        raise ConfigError(f"on_failure={on_failure!r}: expected name or refuse")
    by_name = {m.name: m for m in server.clients}
    Base: Any = flwr.serverapp.strategy.Strategy

    class Burnish(Base):
        def __init__(self) -> None:
            self.server, self.failed = server, dict[int, dict[str, str]]()
            self.history: list[Sent] = []            # sums, oldest first
            self.has: dict[int, int] = {}            # node -> how many of them it has merged
            self.sent = b""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any
                            ) -> Iterable[Any]:
            nodes = sorted(grid.get_node_ids())
            if sampled is not None:
                if sampled > len(nodes):
                    raise ConfigError(f"sampled={sampled}, and there are {len(nodes)} nodes")
                draw = random.Random(number(training.seed, "clients", server_round))
                nodes = sorted(draw.sample(nodes, sampled))
            self.sent = pack({}) if server.rule.merges else \
                Sent.of(server.content, server.down).message
            for node in nodes:
                first = self.has.get(node, 0)
                record = flwr.app.ConfigRecord({
                    "turn": server_round, "start": self.sent, "first": first,
                    "merge": [s.message for s in self.history[first:]]})
                yield flwr.app.Message(flwr.app.RecordDict({RECORD: record}), dst_node_id=node,
                                       message_type="train")

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            said, failed, up_bytes = {}, dict[str, str](), 0
            for reply in replies:
                node = str(reply.metadata.src_node_id)
                if reply.has_error():
                    failed[node] = reply.error.reason
                    self.has.pop(reply.metadata.src_node_id, None)     # who knows what it has got
                    continue
                self.has[reply.metadata.src_node_id] = len(self.history)
                try:
                    name, message, rows = _said(reply)
                except ConfigError as e:
                    failed[node] = str(e)
                    continue
                try:
                    if name not in by_name or name in said:
                        raise ConfigError(f"node {node} calls itself {name!r}, which is "
                                          f"{'there already' if name in said else 'no member'}")
                    said[name] = (server.hears(by_name[name], message, unpack(self.sent)), rows)
                    up_bytes += len(message)
                except ConfigError as e:
                    failed[name] = str(e)
            self.failed[server_round] = failed
            if failed and on_failure == "refuse" or not said:
                raise BurnishError(f"round {server_round}: {failed or 'nobody answered'}")
            server.gather(said)
            waiting = next(iter(server.waiting.values()))
            self.history += waiting
            for queue in server.waiting.values():
                queue.clear()
            sums = unpack(self.history[-1].message) if server.rule.merges else server.content
            return flwr.app.ArrayRecord(sums), flwr.app.MetricRecord({"bytes-up": up_bytes,
                                                                      "clients": len(said)})

        def configure_evaluate(self, *args: Any) -> Iterable[Any]:
            return ()

        def aggregate_evaluate(self, *args: Any) -> None:
            return None

        def summary(self) -> None:
            pass

    return Burnish()
