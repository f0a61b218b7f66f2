"""The federation in Flower. Where Flower is installed, its own apps, records and strategy loop run
in this process, over a grid that hands messages on; without it, what is said instead."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from burnish.core.errors import ConfigError
from burnish.federated import Client, Member, Training, federate, flower
from burnish.testing import tiny

RECIPES = {"a": "lora(rank=2)", "b": "lora(rank=3)"}


def rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(8, 32, generator=g), "labels": torch.tensor(i % 3)}
            for i in range(n)]


def model():
    return tiny("encoder")[0]


def test_without_flower_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (lambda: flower.client_app(model, lambda c: None, Training()),
                 lambda: flower.strategy(model(), [Member("a")], Training())):
        with pytest.raises(ConfigError, match=r"pip install burnish\[federated\]"):
            call()


if importlib.util.find_spec("flwr") is not None:
    from flwr.app import ArrayRecord, Context, Message, RecordDict
    from flwr.app.error import Error
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    class Here(Grid):
        """Nodes of this process; messages go through Flower's own serialisation."""

        def __init__(self, app, names):
            self.app = app
            self.contexts = {i + 1: Context(1, i + 1, {"name": n}, RecordDict(), {})
                             for i, n in enumerate(names)}

        def set_run(self, run): ...
        @property
        def run(self): ...
        def create_message(self, *a, **kw): ...
        def push_messages(self, messages): ...
        def pull_messages(self, ids): ...

        def get_nodes(self):
            return []

        def get_node_ids(self):
            return list(reversed(self.contexts))

        def send_and_receive(self, messages, *, timeout=None):
            out = []
            for m in messages:
                content = {n: type(r).inflate(r.deflate()) for n, r in m.content.items()}
                m.content = RecordDict(content)
                try:
                    out.append(self.app(m, self.contexts[m.metadata.dst_node_id]))
                except Exception as e:
                    out.append(Message(Error(0, str(e)), reply_to=m))
            return out

    def clients(**kw):
        return {n: Client(n, rows(5 + i, i), recipe=kw.get(n), secret=i)
                for i, n in enumerate("ab")}

    @pytest.mark.parametrize("rule, recipes, more, up", [
        ("mean", {}, "", "8bit"), ("stack", RECIPES, "", "none"),
        ("mean", {}, " + dp(sigma=1.0, accountant='rdp')", "none"),
        ("stack", {}, "", "bf16"),
    ])
    def test_two_clients_in_flower_are_those_of_one_process_bit_for_bit(rule, recipes, more, up):
        mine, own, base = clients(**recipes), model(), model()
        done = federate(own, list(mine.values()), f"lora(rank=2){more}", rule=rule, rounds=3,
                        batch=3, up=up)
        training = done.server.training
        app = flower.client_app(model, lambda c: mine[c.node_config["name"]], training, rule, up)
        members = [Member(n, recipe=recipes.get(n)) for n in "ba"]
        there = flower.strategy(base, members, training, rule, up=up)
        result = there.start(Here(app, "ab"), ArrayRecord(), num_rounds=3)
        assert there.failed == {1: {}, 2: {}, 3: {}}
        for n, p in own.named_parameters():
            assert torch.equal(p, base.get_parameter(n)), n
        assert there.server.content.keys() == done.server.content.keys()
        for n, t in done.server.content.items():
            assert torch.equal(t, there.server.content[n])
            assert torch.equal(t, result.arrays.to_torch_state_dict()[n])
        up_bytes = [m["bytes-up"] for m in result.train_metrics_clientapp.values()]
        assert up_bytes == [r.up for r in done.rounds]

    def test_noise_of_a_private_client_is_nobody_elses_to_draw():
        training, sent = Training("lora(rank=2) + dp(sigma=1.0, accountant='rdp')", batch=3), []
        for _ in range(2):
            app = flower.client_app(model, lambda c: Client("a", rows(5, 0)), training)
            there = flower.strategy(model(), [Member("a")], training)
            there.start(Here(app, "a"), ArrayRecord(), num_rounds=1)
            sent.append(torch.cat([t.flatten() for t in there.server.content.values()]))
        assert not torch.equal(*sent)

    @pytest.mark.parametrize("told", [{}, {"rows": 0}, {"rows": -3}, {"message": "text"},
                                      {"name": 3}, None])
    def test_a_reply_of_somebody_else_is_named_and_the_others_count(told):
        mine = clients()
        training = Training("lora(rank=2)", batch=3)
        app = flower.client_app(model, lambda c: mine[c.node_config["name"]], training)

        def client(message, context):
            reply = app(message, context)
            if context.node_config["name"] == "b":
                if told is None:
                    del reply.content[flower.RECORD]
                else:
                    record = reply.content.config_records[flower.RECORD]
                    record.update(told)
                    if not told:
                        del record["name"]
            return reply

        there = flower.strategy(model(), [Member(n) for n in "ab"], training)
        there.start(Here(client, "ab"), ArrayRecord(), num_rounds=1)
        ((node, why),) = there.failed[1].items()
        assert node == "2" and "none of a client of a federation" in why

    def test_a_node_that_fails_is_named_and_catches_up():
        mine, falls = clients(), {"b": True}

        def client(context):
            name = context.node_config["name"]
            if falls.get(name):
                raise OSError("no disk")
            return mine[name]

        training = Training("lora(rank=2)", rounds=3, batch=3)
        app = flower.client_app(model, client, training, "stack")
        there = flower.strategy(base := model(), [Member(n) for n in "ab"], training, "stack")
        grid = Here(app, "ab")
        there.start(grid, ArrayRecord(), num_rounds=2)
        assert {t: {n: "no disk" in w for n, w in f.items()} for t, f in there.failed.items()} == \
            {1: {"2": True}, 2: {"2": True}}
        falls.clear()
        for message in there.configure_train(3, None, None, grid):
            there.aggregate_train(3, grid.send_and_receive([message]))
        kept = [c.state.config_records[flower.KEPT]["merged"] for c in grid.contexts.values()]
        assert [len(k) for k in kept] == [2, 3] or [len(k) for k in kept] == [3, 2]
        assert base is there.server.model
        strict = flower.strategy(model(), [Member("x")], training, "stack", on_failure="refuse")
        with pytest.raises(Exception, match="no member"):
            strict.start(grid, ArrayRecord(), num_rounds=1)
