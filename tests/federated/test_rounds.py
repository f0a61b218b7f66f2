"""Rounds against local loops and dense sums in float64."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import burnish
from burnish import federated
from burnish.core.errors import BurnishError, ConfigError, FormatError
from burnish.federated import Client, Mean, Server, Stack, Training, federate
from burnish.federated.client import batches, joined, work
from burnish.federated.message import pack, unpack
from burnish.federated.split import number
from burnish.testing import tiny

RECIPE = "lora(rank=2)"


def rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(8, 32, generator=g), "labels": torch.tensor(i % 3)}
            for i in range(n)]


def some(sizes=(7, 4, 9), **kw):
    return [Client(f"c{i}", rows(n, i), **kw) for i, n in enumerate(sizes)]


def model():
    return tiny("encoder")[0]


def values(m):
    return {n: p.detach().clone() for n, p in m.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_one_client_and_one_round_are_a_local_run_bit_for_bit():
    net = model()
    twin, before = copy.deepcopy(net), values(net)
    client = some((10,))[0]
    done = federate(net, [client], RECIPE, rounds=1, epochs=2, batch=4, lr=1e-2, seed=3)
    tuned = burnish.tune(twin, RECIPE, seed=3)
    tuned.total_steps = 6
    tuned.optimizer(lr=1e-2)
    g = number(3, "rows", "c0")
    for epoch in range(2):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(number(g, 1, epoch)))
        for part in order.split(4):
            tuned.step({"x": torch.stack([client.rows[i]["x"] for i in part]),
                        "labels": torch.stack([client.rows[i]["labels"] for i in part])})
    assert same(done.server.content, {n: p.detach() for n, p in tuned.named_parameters()})
    assert same(values(net), before)
    net = model()
    done = federate(net, [client], RECIPE, rule="stack", rounds=1, epochs=2, batch=4, lr=1e-2)
    mine = joined(twin := model(), client, Stack(), done.server.training, 1)
    mine.optimizer(lr=1e-2)
    for batch in batches(client, done.server.training, 1):
        mine.step(batch)
    merged = mine.merge()
    assert all(torch.allclose(p, merged.get_parameter(n), atol=1e-7, rtol=1e-6)
               for n, p in net.named_parameters())


@pytest.mark.parametrize("rule", ["mean", "stack"])
def test_the_order_of_clients_changes_nothing(rule):
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        net, every = model(), some()
        done = federate(net, [every[i] for i in order], RECIPE, rule=rule, rounds=2, sampled=2)
        found.append((values(net), done.server.content, done.to_dict()))
    assert same(found[0][0], found[1][0]) and same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("rule", ["mean", "stack"])
def test_sharing_one_base_in_turn_is_having_one_each(rule):
    done = federate(net := model(), some(), RECIPE, rule=rule, rounds=1, lr=1e-2)
    training, alone = done.server.training, {}
    server = Server(model(), some(), done.server.rule, training)
    for client in reversed(some()):
        start = pack(server.content)
        own = model()
        message, report = work(own, client, server.rule, training, 1, start)
        assert report.sent == len(message) and same(values(own), values(model()))
        alone[client.name] = (server.hears(client, message, unpack(start)), report.rows)
    server.gather(alone)
    assert same(server.content, done.server.content)
    assert same(values(server.model), values(net))


def test_the_mean_is_weighed_by_rows():
    said = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([5.0, -1.0])}]
    assert torch.equal(Mean().gather(said, [1, 3], None)["w"], torch.tensor([4.0, 0.0]))
    done = federate(model(), some((2, 6)), RECIPE, rounds=1, weights="equal")
    parts = []
    for client in some((2, 6)):
        server = Server(model(), some((2, 6)), Mean(), done.server.training)
        message, _ = work(model(), client, Mean(), server.training, 1, pack(server.content))
        parts.append(unpack(message))
    for n, t in done.server.content.items():
        assert torch.equal(t, ((parts[0][n].double() + parts[1][n].double()) / 2).float())


def factors(ranks, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [{"w::A": torch.randn(r, 12, generator=g, dtype=dtype),
             "w::B": torch.randn(9, r, generator=g, dtype=dtype)} for r in ranks]


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2, 7)])
def test_a_stack_is_the_dense_weighted_sum(ranks, dtype, close):
    said, n = factors(ranks, dtype=dtype), list(range(1, len(ranks) + 1))
    made = Stack().gather(said, n, None)
    dense = sum(k / sum(n) * (one["w::B"].double() @ one["w::A"].double())
                for k, one in zip(n, said, strict=True))
    assert made["w::A"].shape[0] == sum(ranks)
    error = (made["w::B"].double() @ made["w::A"].double() - dense).norm() / dense.norm()
    assert error < close


def test_the_mean_of_factors_is_not_the_mean_of_updates_unless_a_is_shared():
    said = factors((3, 3))
    mean = Mean().gather(said, [1, 1], None)
    dense = sum(one["w::B"] @ one["w::A"] for one in said) / 2
    assert (mean["w::B"] @ mean["w::A"] - dense).norm() > 0.1 * dense.norm()
    said[1]["w::A"] = said[0]["w::A"]
    mean = Mean().gather(said, [1, 1], None)
    dense = sum(one["w::B"] @ one["w::A"] for one in said) / 2
    assert torch.allclose(mean["w::B"] @ mean["w::A"], dense, atol=1e-5)


def test_a_client_that_leaves_a_matrix_alone_counts_as_no_change():
    said = factors((2, 3))
    said[0]["bias"], base = torch.tensor([4.0]), torch.tensor([1.0])
    del said[1]["w::A"], said[1]["w::B"]
    made = Stack().gather(said, [1, 3], lambda name: base)
    assert torch.allclose(made["w::B"] @ made["w::A"], 0.25 * said[0]["w::B"] @ said[0]["w::A"])
    assert made["bias"].item() == 0.25 * 4 + 0.75 * 1


def test_a_stack_of_a_given_rank_is_the_best_one_and_says_what_it_loses():
    said = factors((3, 4, 2))
    rule = Stack(rank=4)
    made = rule.gather(said, [2, 1, 1], None)
    dense = sum(p * one["w::B"].double() @ one["w::A"].double()
                for p, one in zip((.5, .25, .25), said, strict=True))
    U, S, V = torch.linalg.svd(dense, full_matrices=False)
    error = (made["w::B"].double() @ made["w::A"].double() - dense).norm() / dense.norm()
    assert made["w::A"].shape[0] == 4
    assert rule.errors == [pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-4)]
    assert float(error) == pytest.approx(rule.errors[0], rel=1e-4)


def test_ranks_of_their_own_and_the_base_that_is_summed():
    """Against every client trained on a base of its own, summed densely."""
    recipes = ["lora(rank=1)", "lora(rank=4, alpha=2)", "lora(rank=2, scaling='rs')"]
    every = [Client(f"c{i}", rows(4 + i, i), recipe=r) for i, r in enumerate(recipes)]
    net = model()
    done = federate(net, every, rule="stack", rounds=1, lr=1e-2, head=True)
    want = {n: p.double() * 0 for n, p in values(net).items()}
    for client in every:
        tuned = joined(model(), client, Stack(), done.server.training, 1)
        tuned.optimizer(lr=1e-2)
        for batch in batches(client, done.server.training, 1):
            tuned.step(batch)
        for n, p in tuned.merge().named_parameters():
            want[n] += len(client.rows) / 15 * p.detach().double()
    for n, p in net.named_parameters():
        assert torch.allclose(p.double(), want[n], atol=1e-6), n
    assert [c.recipe for c in done.rounds[0].clients] == [str(burnish.parse(r)) for r in recipes]


def test_later_rounds_begin_afresh_on_the_summed_base():
    net, moved = model(), []
    federate(net, some(), RECIPE, rule="stack", rounds=2, lr=1e-2,
             score=lambda m: moved.append(values(m)) or {})
    assert not same(moved[0], moved[1])
    one = joined(model(), some()[0], Stack(), Training(), 1)
    two = joined(model(), some()[0], Stack(), Training(), 2)
    starts = [dict(t.named_parameters()) for t in (one, two)]
    assert any(not torch.equal(starts[0][n], starts[1][n]) for n in starts[0] if n.endswith(".A"))


def test_bytes_are_those_of_the_messages(tmp_path):
    done = federate(model(), some(), RECIPE, rounds=2)
    message = pack(done.server.content)
    (tmp_path / "m.safetensors").write_bytes(message)
    from safetensors.torch import load_file
    assert same(load_file(tmp_path / "m.safetensors"), done.server.content)
    for r in done.rounds:
        assert r.up == r.plain_up == r.down == r.plain_down == 3 * len(message)
    numbers = sum(t.nbytes for t in done.server.content.values())
    assert numbers < len(message) < numbers + 150 * len(done.server.content) + 200
    assert done.bytes["up"] == 6 * len(message)


@pytest.mark.parametrize("coding, share, off", [("bf16", .55, .01), ("8bit", .4, .03)])
def test_coded_messages_are_smaller_and_near(coding, share, off):
    kw = {"rounds": 1, "lr": 1e-2}
    plain = federate(model(), some(), "lora(rank=8)", **kw)
    coded = federate(model(), some(), "lora(rank=8)", up=coding, down=coding, **kw)
    r = coded.rounds[0]
    assert r.plain_up == plain.rounds[0].up and r.plain_down == plain.rounds[0].down
    assert r.up < share * r.plain_up and r.down < share * r.plain_down
    one, two = (torch.cat([t.flatten() for t in d.server.content.values()])
                for d in (plain, coded))
    assert 0 < (one - two).norm() < off * one.norm() + .02


def test_signs_are_a_code_of_changes():
    like = {"a": torch.randn(40, 50), "b": torch.randn(300), "n": torch.tensor([3])}
    now = {n: t + (torch.randn(t.shape) if t.is_floating_point() else 1) for n, t in like.items()}
    message = pack(now, "signs", like)
    back = unpack(message, like)
    change = {n: back[n] - like[n] for n in ("a", "b")}
    tau = torch.cat([(now[n] - like[n]).flatten() for n in ("a", "b")])
    kept = torch.cat([t.flatten() for t in change.values()])
    assert (kept.abs() > 1e-6).sum() == 115 and back["n"].item() == 4
    assert torch.allclose(kept[kept.abs() > 1e-6].abs(), tau.std(correction=0), rtol=1e-2)
    assert len(message) < 1000 < 4 * 2300
    done = federate(model(), some(), RECIPE, rounds=1, up="signs")
    assert done.rounds[0].up < done.rounds[0].plain_up
    for call in (lambda: federate(model(), some(), RECIPE, down="signs"),
                 lambda: federate(model(), some(), RECIPE, rule="stack", up="signs")):
        with pytest.raises(ConfigError, match="signs code changes"):
            call()


@pytest.mark.parametrize("junk", [b"", b"12", b"\xff" * 40, pack({"a": torch.ones(3)})[:-3],
                                  b"\x02\0\0\0\0\0\0\0{}"])
def test_bytes_that_are_no_message_are_refused(junk):
    with pytest.raises(FormatError, match="no message of a federation"):
        unpack(junk)


def test_bytes_wait_for_clients_that_have_no_part_in_a_round():
    done = federate(model(), some((3, 3, 3, 3)), RECIPE, rule="stack", rounds=4, sampled=1, seed=1)
    names = [r.clients[0].name for r in done.rounds]
    assert done.rounds[0].down == 0
    up = [r.up for r in done.rounds]
    for t, r in enumerate(done.rounds):
        since = max((i for i in range(t) if names[i] == names[t]), default=0)
        # an aggregate is the factors of one client: as large as what it sent
        assert r.down == pytest.approx(sum(up[since:t]), rel=.02)


#: what has bytes; fake tensors of an earlier simulation may still be about
REAL = (torch.Tensor, torch.nn.Parameter)


def live(known):
    seen = {}
    for t in gc.get_objects():
        if type(t) in REAL:
            s = t.untyped_storage()
            seen[s.data_ptr()] = s.nbytes()
    return sum(b for p, b in seen.items() if p not in known)


def test_a_round_holds_the_base_once_and_what_clients_said():
    net, clients, told = model(), some((3,) * 6), {}
    gc.collect()
    known = {t.untyped_storage().data_ptr() for t in gc.get_objects()
             if type(t) in REAL}

    class Looks(Mean):
        def gather(self, said, samples, base):
            gc.collect()
            told["held"], told["n"] = live(known), len(said)
            return super().gather(said, samples, base)

    done = federate(net, clients, RECIPE, rule=Looks(), rounds=1)
    phi = sum(t.nbytes for t in done.server.content.values())
    base = sum(p.nbytes for p in net.parameters())
    assert told["n"] == 6 and told["held"] <= 7 * phi + 8192 < base + 7 * phi


class Poor(list):
    """Rows of which one cannot be read."""

    def __getitem__(self, i):
        if i == 2:
            raise OSError("the disk is gone")
        return super().__getitem__(i)


@pytest.mark.parametrize("rule", ["mean", "stack"])
def test_a_client_that_fails_is_named_and_the_others_go_on(rule):
    net = model()
    bad = Client("bad", Poor(rows(4, 9)))
    done = federate(net, [*some(), bad], RECIPE, rule=rule, rounds=2)
    assert all(r.failed == {"bad": "OSError: the disk is gone"} for r in done.rounds)
    alone = federate(other := model(), some(), RECIPE, rule=rule, rounds=2)
    assert same(done.server.content, alone.server.content) and same(values(net), values(other))
    assert all(p.grad is None for p in net.parameters())
    net, before = model(), values(model())
    state = torch.get_rng_state()
    with pytest.raises(BurnishError, match="round 1: client 'bad' failed.*the disk is gone"):
        federate(net, [*some(), bad], RECIPE, rule=rule, on_failure="refuse")
    assert same(values(net), before) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(BurnishError, match="no client's work counts; 'bad'"):
        federate(net, [bad], RECIPE, rule=rule)


def test_what_is_not_finite_or_foreign_is_not_summed():
    server = Server(model(), some(), Mean(), Training(RECIPE))
    good = {n: t.clone() for n, t in server.content.items()}
    name = next(iter(good))
    for change, what in (({name: good[name][:1]}, "is expected"),
                         ({name: good[name].double()}, "is torch.float64 .*float32 .*expected"),
                         ({name: good[name].int()}, "is torch.int32"),
                         ({"more": torch.ones(1)}, "has"), ({name: None}, "lacks")):
        said = {n: t for n, t in {**good, **change}.items() if t is not None}
        with pytest.raises(FormatError, match=what):
            server.hears(server.clients[0], pack(said), {})
    good[name] = good[name] * float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        pack(good)


def test_moments_begin_anew_unless_they_are_to_be_kept():
    fresh = federate(model(), some((6,)), RECIPE, rounds=2, lr=1e-2).server.content
    kept = federate(model(), some((6,)), RECIPE, rounds=2, lr=1e-2, keep_optimizer=True)
    assert not same(fresh, kept.server.content)
    client, net = some((6,))[0], model()
    tuned = burnish.tune(net, RECIPE, seed=0)
    tuned.optimizer(lr=1e-2)
    for turn in (1, 2):
        for batch in batches(client, kept.server.training, turn):
            tuned.step(batch)
    assert same(kept.server.content, {n: p.detach() for n, p in tuned.named_parameters()})
    with pytest.raises(ConfigError, match="old moments do not belong"):
        federate(model(), some(), RECIPE, rule="stack", keep_optimizer=True)


@pytest.mark.parametrize("kw, what", [
    ({"rule": "median"}, "there are mean, stack"), ({"up": "zip"}, "there are none, bf16"),
    ({"sampled": 4}, "1 to 3"), ({"rounds": 0}, "rounds=0"), ({"on_failure": "ignore"}, "refuse"),
    ({"weights": "loss"}, "samples or equal"), ({"rule": "stack", "recipe": "dora(rank=2)"},
                                                "no product of two factors"),
    ({"rule": "stack", "recipe": "houlsby(bottleneck=2)"}, "no part of any weight"),
])
def test_what_does_not_go_together_is_refused(kw, what):
    with pytest.raises(ConfigError, match=what):
        federate(model(), some(), **{"recipe": RECIPE, **kw})


def test_clients_are_told_apart_and_have_rows_and_one_shape_for_a_mean():
    with pytest.raises(ConfigError, match="two clients are called 'a'"):
        federate(model(), [Client("a", rows(2, 0)), Client("a", rows(2, 1))], RECIPE)
    with pytest.raises(ConfigError, match="has no rows"):
        Client("a", [])
    with pytest.raises(ConfigError, match="take the rule stack"):
        federate(model(), [*some(), Client("x", rows(2, 0), recipe="lora(rank=3)")], RECIPE)
    with pytest.raises(ConfigError, match="needs clients"):
        federate(model(), [], RECIPE)
    with pytest.raises(ConfigError, match="least=1"):
        federated.dirichlet([0, 1], 0)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.b(self.norm(self.a(x.mean(1)))), labels)


def test_statistics_that_training_moves_are_not_left_out_in_silence():
    with pytest.raises(BurnishError, match="norm.running_mean moves"):
        federate(Normed().train(), some(), "lora(rank=2)", rounds=1)
    net = Normed().train()
    net.norm.eval()
    assert not federate(net, some(), "lora(rank=2)", rounds=1).rounds[0].failed


def test_published_counts():
    """The bias variant on ViT-B/16 with a 100-way head: 179,812 values, 0.686 MiB; LLaMA-7B's q and
    v at rank 16: 8,388,608."""
    import transformers

    from burnish.memory import simulate

    vit = transformers.ViTConfig(num_labels=100, architectures=["ViTForImageClassification"])
    assert simulate(vit, "bitfit").trainable == 179_812
    message = pack({"all": torch.zeros(179_812)})
    assert round(len(message) / 2**20, 3) == 0.686
    llama = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008,
                                     num_hidden_layers=32, architectures=["LlamaForCausalLM"])
    assert simulate(llama, "lora(rank=16, targets='q,v')", (1, 8)).trainable == 8_388_608
    assert sum((64, 32, 16, 16, 8, 8, 4, 4, 4, 4)) == 160


def test_dirichlet_splits_give_every_row_to_one_client():
    labels = [i % 10 for i in range(500)]
    for alpha, clients in ((.1, 32), (100., 8), (.01, 64)):
        parts = federated.dirichlet(labels, clients, alpha, seed=1)
        assert sorted(i for p in parts for i in p) == list(range(500)) and all(parts)
        assert parts == federated.dirichlet(labels, clients, alpha, seed=1)
        assert parts != federated.dirichlet(labels, clients, alpha, seed=2)

    def most(alpha):
        parts = federated.dirichlet(labels, 10, alpha)
        return sum(max(sum(labels[i] == c for i in p) for c in range(10)) / len(p)
                   for p in parts) / 10

    assert most(.05) > .6 > .25 > most(1000.)
    assert [len(p) for p in federated.even(11, 3)] == [4, 4, 3]
    with pytest.raises(ConfigError, match="take 2 clients or fewer"):
        federated.dirichlet([0, 1, 0, 1], 3, least=2)
    with pytest.raises(ConfigError, match="alpha=0"):
        federated.dirichlet([0, 1, 0, 1], 2, alpha=0)


@pytest.mark.parametrize("split", [lambda: federated.dirichlet([0, 1], 2, seed=-1),
                                   lambda: federated.even(4, 2, seed=-1)])
def test_seeds_are_numbers_from_0_on(split):
    with pytest.raises(ConfigError, match="seed=-1: expected 0 or more"):
        split()
