"""What is chosen for a client keeps its promise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import ConfigError, NoPlanError
from burnish.federated import Client, Training, federate, fitted, importance
from burnish.federated.client import batches
from burnish.memory import simulate

RECIPE = "lora(rank=4)"


class Wide(nn.Module):
    """Weights are most of what a step takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(384, 384), nn.ReLU())
                                    for _ in range(4))
        self.head = nn.Linear(384, 3)

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), labels)


def rows(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(384, generator=g), "labels": torch.tensor(i % 3)} for i in range(n)]


def peak(recipe, batch=8):
    return simulate(Wide(), recipe, {"x": torch.zeros(batch, 384),
                                     "labels": torch.zeros(batch, dtype=torch.long)}).peak_bytes


TRAINING = Training(RECIPE, batch=8)


def test_the_choice_never_exceeds_the_budget_and_more_never_lowers_the_precision():
    top, low = peak("lora(rank=16)"), peak("nf4 + lora(rank=1)", 1)
    budgets = [int(low + (top - low) * i / 5) for i in range(6)]
    clients = [Client(f"c{b:09}", rows(8), memory=b) for b in budgets]
    made, told = fitted(Wide(), clients, TRAINING, ranks=(1, 4, 16))
    bits = [told[c.name].bits for c in clients]
    assert bits == sorted(bits) and bits[0] == 4 and bits[-1] == 16
    assert told[clients[-1].name].rank == 16 and told[clients[-1].name].batch == 8
    for client, budget in zip(made, budgets, strict=True):
        choice = told[client.name]
        assert client.recipe == choice.recipe and choice.needs <= budget
        tuned = burnish.tune(Wide(), client.recipe, seed=1)
        tuned.optimizer()
        batch = client.collate([client.rows[i] for i in range(choice.batch)])
        assert burnish.measure(tuned, batch).peak_bytes <= budget
    with pytest.raises(NoPlanError, match="nothing fits the .* of client 'poor': the least"):
        fitted(Wide(), [Client("poor", rows(8), memory=low // 2)], TRAINING)


def test_equal_clients_have_equal_choices_and_the_federation_uses_them():
    some = [Client(n, rows(8, i), memory=peak("lora(rank=4)") + 2000) for i, n in enumerate("ab")]
    more = Client("c", rows(8, 3), memory="1GB")
    done = federate(Wide(), [*some, more], RECIPE, rule="stack", rounds=1, batch=8,
                    ranks=(1, 4, 16))
    assert done.choices["a"] == done.choices["b"] != done.choices["c"]
    assert [done.choices[n].rank for n in "abc"] == [4, 4, 16]
    assert [r.recipe for r in done.rounds[0].clients] == \
        [done.choices[n].recipe for n in "abc"]
    with pytest.raises(ConfigError, match="none of these has one"):
        federate(Wide(), [Client("a", rows(2))], RECIPE, ranks=(1, 2))
    with pytest.raises(ConfigError, match="bits=3"):
        fitted(Wide(), some, TRAINING, bits=(3,))


def test_importance_is_weight_times_gradient_and_pays_for_the_first_matrices():
    clients = [Client("a", rows(8, 1)), Client("b", rows(24, 2))]
    found = importance(Wide(), clients, TRAINING, count=100)
    want = {}
    for client in clients:
        every = list(batches(client, TRAINING, 0))
        for batch in every:
            net = Wide()
            net(**batch).backward()
            for n, p in net.named_parameters():
                if n.startswith("blocks") and p.dim() == 2:
                    share = len(client.rows) / 32 / len(every)
                    want[n] = want.get(n, 0) + share * float((p * p.grad).detach().abs().sum())
    assert {n: pytest.approx(s, rel=1e-4) for n, s in found.items()} == want
    assert list(found.values()) == sorted(found.values(), reverse=True)
    each = 4 * (384 + 384)
    made, _ = fitted(Wide(), clients, TRAINING, trainable=2 * each + 5)
    assert [c.recipe for c in made] == [made[0].recipe] * 2
    tuned = burnish.tune(Wide(), made[0].recipe, head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * each
    first = list(found)[:2]
    assert {n.partition(".burnish")[0] for n, _ in tuned.named_parameters()} == \
        {n.rpartition(".")[0] for n in first}
    with pytest.raises(ConfigError, match="pays for no matrix"):
        fitted(Wide(), clients, TRAINING, trainable=10)
    with pytest.raises(ConfigError, match="protects its rows"):
        importance(Wide(), clients, Training("lora(rank=4) + dp(sigma=1)"))
    with pytest.raises(ConfigError, match="parts of a rank"):
        fitted(Wide(), clients, Training("bitfit"), trainable=1000)


def test_clients_of_other_matrices_are_stacked():
    net, every = Wide(), [Client("a", rows(6, 1), recipe="lora(rank=2, targets='blocks.0.0')"),
                          Client("b", rows(2, 2), recipe="lora(rank=3, targets='blocks.1.0')")]
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    federate(net, every, rule="stack", rounds=1, lr=1e-2)
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert {"blocks.0.0.weight", "blocks.1.0.weight"} <= moved
    assert not moved & {"blocks.2.0.weight", "blocks.3.0.weight"}


class Long(Wide):
    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x.mean(1)), labels)


def padded(some):
    return {"x": nn.utils.rnn.pad_sequence([r["x"] for r in some], batch_first=True),
            "labels": torch.stack([r["labels"] for r in some])}


def test_a_choice_is_for_the_largest_rows_a_client_has():
    def texts(*lengths):
        return [{"x": torch.ones(n, 384), "labels": torch.tensor(0)} for n in lengths]

    short, long = texts(*[2] * 8), texts(*[2] * 8, *[90] * 8)
    need = simulate(Long(), RECIPE, padded(texts(*[90] * 3))).peak_bytes
    clients = [Client(n, r, padded, memory=need) for n, r in (("a", short), ("b", long))]
    made, told = fitted(Long(), clients, TRAINING, bits=(16,))
    assert told["a"].batch == 8 and told["b"].batch == 2
    tuned = burnish.tune(Long(), made[1].recipe)
    tuned.optimizer()
    worst = padded(long[-told["b"].batch:])
    assert burnish.measure(tuned, worst).peak_bytes <= told["b"].needs <= need
