"""DP-LoRA: the Gaussian mechanism on the factors of every client, accounted over all rounds."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.update.accountant import epsilon_of
from burnish.blocks.update.private import Clipped
from burnish.blocks.weight.factor import Chain
from burnish.federated import Client, Mean, Server, federate
from burnish.federated.client import batches, work
from burnish.federated.message import pack, unpack
from burnish.testing import tiny

LORA = "lora(rank=2)"


def rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(8, 32, generator=g), "labels": torch.tensor(i % 3)}
            for i in range(n)]


def some(sizes=(6, 9), **kw):
    return [Client(f"c{i}", rows(n, i), **kw) for i, n in enumerate(sizes)]


def model():
    return tiny("encoder")[0]


def flat(content):
    return torch.cat([t.flatten().double() for _, t in sorted(content.items())])


def test_one_example_more_or_less_moves_the_sum_by_the_bound_at_most():
    tuned, bound = burnish.tune(model(), LORA, head=False), 0.05
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_(std=.2)

    def total(some):
        with Clipped(tuned.parameters(), bound) as sums:
            for row in some:
                tuned.loss({"x": row["x"][None], "labels": row["labels"][None]}).backward()
                sums.take()
        found = torch.cat([p.grad.flatten().double() for p in tuned.parameters()])
        for p in tuned.parameters():
            p.grad = None
        return found

    have, others = rows(5, 0), rows(3, 7)
    whole = total(have)
    for i in range(5):
        less = total(have[:i] + have[i + 1:])
        assert 0 < (whole - less).norm() <= bound * (1 + 1e-6)
        for other in others:
            swapped = total([*have[:i], other, *have[i + 1:]])
            assert 0 < (whole - swapped).norm() <= 2 * bound * (1 + 1e-6)


@pytest.mark.parametrize("rule", ["mean", "stack"])
def test_no_noise_and_no_bound_are_training_without_protection(rule):
    """Every row in every batch (rate 1), noise of 1e-9 in all."""
    kw = {"rounds": 2, "steps": 3, "batch": 9, "lr": .1, "rule": rule}
    nets = [model(), model()]
    plain = federate(nets[0], some(), f"{LORA} + sgd", **kw)
    dp = federate(nets[1], some(), f"{LORA} + dp(sigma=1e-12, max_norm=1000) + sgd", **kw)
    for n, p in nets[0].named_parameters():
        assert torch.allclose(p, nets[1].get_parameter(n), atol=1e-5)
    if rule == "mean":
        assert torch.allclose(flat(plain.server.content), flat(dp.server.content), atol=1e-5)
        assert not torch.allclose(flat(plain.server.content), torch.zeros(1).double())


def test_noise_of_the_mean_gradient_has_the_deviation_it_should():
    """A loss that no tensor moves: what is sent is the start, less noise of sigma C / b."""
    client = Client("a", rows(20, 0), recipe=f"{LORA} + sgd + "
                    "dp(sigma=1.5, max_norm=0.3, accountant='rdp')")
    done = federate(model(), [client], rounds=1, steps=1, batch=5, lr=1.0,
                    loss=lambda out, b: out.loss * 0)
    start = Server(model(), [client], Mean(), done.server.training).content
    moved = flat(done.server.content) - flat(start)
    assert float(moved.std()) == pytest.approx(1.5 * .3 / 5, rel=.05)
    assert abs(float(moved.mean())) < 5 * .09 / len(moved) ** .5


def test_every_client_accounts_over_all_rounds():
    recipe = f"{LORA} + dp(sigma=2.0, accountant='rdp')"
    done = federate(model(), some((8, 12)), recipe, rounds=3, epochs=2, batch=4)
    for turn in (1, 2, 3):
        for said, n in zip(done.rounds[turn - 1].clients, (8, 12), strict=True):
            told = said.told["dp"]
            assert said.updates == 2 * round(n / 4) and told["updates"] == turn * said.updates
            assert told["epsilon"] == epsilon_of(2.0, 4 / n, turn * said.updates, 1 / n, "rdp")
            assert said.loss is None
    budget = f"{LORA} + dp(epsilon=3.0, accountant='rdp')"
    done = federate(model(), some((8, 12)), budget, rounds=2, batch=4, rule="stack")
    spent = [[c.told["dp"]["epsilon"] for c in r.clients] for r in done.rounds]
    assert all(a < b <= 3.0 + 1e-6 for a, b in zip(*spent, strict=True))
    assert all(b > 2.8 for b in spent[1])


def test_what_a_failed_round_has_spent_stays_spent():
    class Falls(list):
        falls = True

        def __getitem__(self, i):
            if self.falls and i == 0:
                raise OSError("gone")
            return super().__getitem__(i)

    have, kept = Falls(rows(6, 0)), {}
    client = Client("a", have)
    done = federate(model(), [*some((6,)), client], f"{LORA} + dp(sigma=2.0, accountant='rdp')",
                    rounds=1, batch=3)
    server = done.server
    start = pack(server.content)
    args = (server.model, client, server.rule, server.training)
    with pytest.raises(OSError):
        work(*args, 1, start, "none", kept)
    spent = kept["timeline"]["handlers"]["dp"]["spent"]
    have.falls = False
    _, report = work(*args, 2, start, "none", kept)
    assert report.told["dp"]["updates"] == spent + report.updates


def test_draws_are_each_rounds_own_and_empty_ones_are_noise():
    client = Client("a", rows(10, 0), recipe=f"{LORA} + dp(sigma=2.0, accountant='rdp')")
    done = federate(model(), [client], rounds=2, steps=30, batch=1)
    sizes = [[len(b["labels"]) for b in batches(client, done.server.training, t)] for t in (1, 2)]
    assert sizes[0] != sizes[1] and all(0 in s and max(s) > 1 for s in sizes)
    assert sum(map(sum, sizes)) / 60 == pytest.approx(1, abs=.5)


def test_with_a_frozen_the_mean_of_factors_is_the_mean_of_updates():
    recipe = "lora(rank=2, train_a=False) + dp(sigma=0.5, accountant='rdp')"
    net = model()
    done = federate(net, some(), recipe, rounds=1, batch=3, lr=1e-2, head=False)
    server, want = done.server, {}
    for client in some():
        start = Server(model(), some(), Mean(), server.training).content
        message, _ = work(model(), client, Mean(), server.training, 1, pack(start))
        tuned = burnish.tune(model(), "lora(rank=2, train_a=False)", head=False)
        Mean().put(tuned, unpack(message))
        for n, term in tuned.terms(Chain):
            want[n] = want.get(n, 0) + len(client.rows) / 15 * term.dense().detach()
    tuned = server.join()
    for n, term in tuned.terms(Chain):
        assert torch.allclose(term.dense(), want[n], atol=1e-6) and want[n].norm() > 0


def test_a_secret_of_its_own_makes_a_clients_draws_its_own():
    kw = {"recipe": f"{LORA} + dp(sigma=1.0, accountant='rdp')"}
    sent = [flat(federate(model(), [Client("a", rows(6, 0), secret=s, **kw)], rounds=1,
                          batch=3).server.content) for s in (None, 1, 1)]
    assert torch.equal(sent[1], sent[2]) and not torch.equal(sent[0], sent[1])


def test_noise_is_each_clients_own():
    kw = {"rounds": 1, "steps": 1, "batch": 6, "lr": 1.0, "loss": lambda out, b: out.loss * 0}
    twins = [Client(n, rows(6, 0)) for n in "ab"]
    messages = []
    for client in twins:
        done = federate(model(), [client], f"{LORA} + dp(sigma=1.0, accountant='rdp') + sgd", **kw)
        messages.append(flat(done.server.content))
    assert not torch.equal(*messages)


def test_noise_too_small_for_a_grid_has_a_bound_all_the_same():
    found = epsilon_of(1e-9, .5, 2, 1e-5, "pld")
    assert found == epsilon_of(1e-9, .5, 2, 1e-5, "rdp") and 1e9 < found < float("inf")
