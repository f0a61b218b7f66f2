"""Clipping and noise act: what an attack can tell of members falls with epsilon."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.core.errors import ConfigError
from burnish.federated import Client, auc, federate, membership

N = 24


def rows(seed):
    """Labels that nothing explains can only be learnt by heart."""
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(40, generator=g),
             "labels": torch.randint(2, (), generator=g)} for _ in range(N)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head = nn.Linear(40, 16), nn.Linear(16, 2)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.head(torch.tanh(self.a(x))), labels)


def told(recipe, seed):
    members, others = rows(seed), rows(100 + seed)
    done = federate(Net(), [Client("a", members[:N // 2]), Client("b", members[N // 2:])],
                    f"full{recipe} + sgd", rounds=2, steps=20, batch=N // 2, lr=1.0, seed=seed)
    tuned = done.server.join()
    return membership(tuned.model, members, others)


def test_an_attack_falls_to_chance_as_epsilon_falls():
    seeds = range(3)
    found = [sum(told(r, s) for s in seeds) / len(seeds) for r in (
        "", " + dp(epsilon=8.0, risk=0.01, accountant='rdp')",
        " + dp(epsilon=1.0, risk=0.01, accountant='rdp')")]
    open_, some, tight = found
    assert open_ > 0.8 and abs(tight - 0.5) < 0.13
    assert open_ - 0.05 > some > tight - 0.05


def test_the_figure_is_the_chance_that_a_member_stands_above():
    assert auc([3, 2], [1, 0]) == 1.0 and auc([0], [1, 2]) == 0.0
    assert auc([1, 2], [1, 2]) == 0.5 and auc([1], [1]) == 0.5
    with pytest.raises(ConfigError, match="one side is empty"):
        auc([], [1.0])
    net = Net().train()
    assert abs(membership(net, rows(1), rows(2)) - 0.5) < 0.2 and net.training


def test_scores_that_are_no_numbers_are_no_safety():
    with pytest.raises(ConfigError, match="are no numbers"):
        auc([float("nan"), 1.0], [0.0])
    many = torch.arange(100_000.0)                   # not each beside each, which is 80 GB
    assert auc(many, many) == 0.5 and auc(many + 0.5, many) > 0.5


def test_rows_are_read_where_the_model_is(monkeypatch):
    """Of an attack, a round and the importance of matrices."""
    from burnish.federated import attack, choose, client

    asked = []
    for module in (attack, choose, client):
        monkeypatch.setattr(module, "moved", lambda b, device, m=module.__name__:
                            asked.append((m, torch.device(device))) or b)
    net = Net()
    membership(net, rows(1)[:2], rows(2)[:2])
    federate(net, [Client("a", rows(1))], "lora(rank=1)", rounds=1, trainable=200)
    assert {m.rpartition(".")[2] for m, d in asked if d.type == "cpu"} == \
        {"attack", "choose", "client"}
