"""RELIEF: episodes on graphs, proximal steps written out in float64, what moves and what does not.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.graph_prompts import Ensemble, Graphs, Learner, parts
from burnish.blocks.update.ppo import Returns, advantages, drift, surrogate
from burnish.core.draw import drawn
from burnish.testing.graphs import GraphNetwork, molecules


def world(count=6, seed=0, largest=9):
    torch.manual_seed(seed)
    net = GraphNetwork(width=16).double().eval()
    nodes, adjacency, said = molecules(count, seed, largest)
    labels = torch.tensor([int(s["pairs"] > 0) for s in said])
    return net, {"nodes": nodes.double(), "adjacency": adjacency.double(), "labels": labels}


def each(out, batch):
    return F.cross_entropy(out.logits, batch["labels"], reduction="none")


def graphs(net):
    return Graphs(net, net.embed, net.norm, each)


def method(**kw):
    said = ", ".join(f"{k}={v!r}" for k, v in kw.items())
    return burnish.parse(f"relief({said})")[0]


def under(net, batch, P):
    """The network with P added to what embeds the nodes, without a hook."""
    there = batch["nodes"].abs().sum(-1, keepdim=True) > 0
    h = (net.embed(batch["nodes"]) + P) * there
    for layer in net.layers:
        h = layer(h, batch["adjacency"], there)
    S = net.norm(h)
    whole = (S * there).sum(1)
    most = S.masked_fill(~there, torch.finfo(S.dtype).min).amax(1)
    return S, net.head(torch.cat([whole, most], -1))


def played(seed=0, members=2):
    net, batch = world()
    torch.manual_seed(seed)
    e = Ensemble(members, 16, 16, 9, 0.5).double()
    for p in e.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net, batch, e, graphs(net).played(e.members[0], batch)


# -- episodes -------------------------------------------------------------------------------------
def test_rewards_telescope_to_what_the_whole_prompt_gained():
    net, batch, _, seen = played()
    n = (batch["nodes"].abs().sum(-1) > 0).sum(1)
    assert len(set(n.tolist())) > 1, "graphs of several sizes"
    P = torch.zeros(*batch["nodes"].shape[:2], 16).double()
    for g in range(len(n)):
        for t in range(int(n[g])):
            P[g, seen.v[g, t]] += seen.a[g, t]
    first = F.cross_entropy(net(**batch).logits, batch["labels"], reduction="none")
    last = F.cross_entropy(under(net, batch, P)[1], batch["labels"], reduction="none")
    torch.testing.assert_close(seen.rewards.sum(1), (first - last).detach())
    assert torch.equal(seen.alive.sum(1), n)
    assert not seen.rewards[~seen.alive].any() and bool(seen.rewards[seen.alive].any())


def test_each_step_reads_the_states_under_the_prompts_before_it():
    net, batch, e, seen = played()
    P = torch.zeros(*batch["nodes"].shape[:2], 16).double()
    there = batch["nodes"].abs().sum(-1) > 0
    rows = torch.arange(len(P))
    for t in range(seen.v.shape[1]):
        S = under(net, batch, P)[0]
        torch.testing.assert_close(seen.S[:, t], S.detach())
        f, g = e.members[0].node, e.members[0].content
        def mlp(m, x):
            x = torch.tanh(x @ m[0].weight.mT + m[0].bias)
            x = torch.tanh(x @ m[2].weight.mT + m[2].bias)
            return x @ m[4].weight.mT + m[4].bias
        p = mlp(f, S).squeeze(-1).exp() * there
        v, a = seen.v[:, t], seen.a[:, t]
        torch.testing.assert_close(seen.log_v[:, t], (p[rows, v] / p.sum(1)).log().detach())
        m = 0.5 * torch.tanh(mlp(g, S[rows, v]))
        log = torch.distributions.Normal(m, 1.0).log_prob(a).sum(1)
        torch.testing.assert_close(seen.log_a[:, t], log.detach())
        P[rows, v] += a * seen.alive[:, t, None]


def test_padding_is_never_taken():
    net, batch, e, seen = played()
    there = batch["nodes"].abs().sum(-1) > 0
    p = e.members[0].nodes(seen.S[:, 0], there).exp()
    assert not p[~there].any() and torch.allclose(p.sum(1), torch.ones(6).double())
    both = e.nodes(seen.S[:, 0], there)
    assert not both[~there].any() and torch.allclose(both.sum(1), torch.ones(6).double())
    assert bool(there[torch.arange(6).unsqueeze(1), seen.v][seen.alive].all())
    assert not graphs(net).prompts(e, batch, True)[~there].any()


def test_the_answer_takes_the_members_largest_and_the_mean_of_their_means():
    net, batch, e, _ = played()
    there, rows = batch["nodes"].abs().sum(-1) > 0, torch.arange(6)
    P = torch.zeros(*there.shape, 16).double()
    for t in range(int(there.sum(1).max())):
        S = under(net, batch, P)[0]
        most = torch.maximum(*(a.nodes(S, there).exp() for a in e.members))
        v = (most / most.sum(1, keepdim=True)).argmax(1)
        m = sum(a.mean(S, v) for a in e.members) / 2
        P[rows, v] += m.detach() * (t < there.sum(1)).unsqueeze(1)
    torch.testing.assert_close(graphs(net).prompts(e, batch, False), P)
    with drawn(3):
        drawn_ = graphs(net).prompts(e, batch, True)
    assert not torch.equal(drawn_, P)


def test_at_the_start_nodes_are_nearly_alike_and_prompts_small():
    net, batch = world()
    e = Ensemble(3, 16, 16, 9, 1.0).double()
    there = batch["nodes"].abs().sum(-1) > 0
    S = graphs(net).run(batch, None)[0]
    assert torch.equal(graphs(net).run(batch, None)[1].logits, net(**batch).logits)
    even = there / there.sum(1, keepdim=True)
    assert (e.nodes(S, there) - even).abs().max() < 0.01
    assert e.mean(S, torch.zeros(6).long()).abs().max() < 0.1
    first, second, last = [m for m in e.members[0].node if hasattr(m, "weight")]
    assert torch.allclose(first.weight @ first.weight.mT, 2 * torch.eye(8).double(), atol=1e-5)
    assert torch.allclose(last.weight @ last.weight.mT, 1e-4 * torch.eye(1).double(), atol=1e-8)
    assert first.weight.shape == (8, 16) and second.weight.shape == (4, 8)
    n = sum(p.numel() for p in e.members[0].parameters())
    assert n == (16 * 8 + 8 + 8 * 4 + 4 + 4 + 1) + (16 * 8 + 8 + 8 * 8 + 8 + 8 * 16 + 16)
    assert [m.weight.shape for m in e.critic.layers if hasattr(m, "weight")] \
        == [(7, 144), (3, 7), (1, 3)]


# -- proximal steps -------------------------------------------------------------------------------
def test_advantages_are_discounted_sums():
    torch.manual_seed(0)
    n = [4, 2, 3]
    alive = torch.arange(4) < torch.tensor(n).unsqueeze(1)
    r, V = torch.randn(3, 4).double() * alive, torch.randn(3, 4).double()
    A, R = advantages(r, V, alive)
    for b in range(3):
        delta = [float(r[b, t]) + (0.99 * float(V[b, t + 1]) if t + 1 < n[b] else 0)
                 - float(V[b, t]) for t in range(n[b])]
        for t in range(n[b]):
            want = sum((0.99 * 0.95) ** (k - t) * delta[k] for k in range(t, n[b]))
            assert float(A[b, t]) == pytest.approx(want, abs=1e-12)
            assert float(R[b, t]) == pytest.approx(want + float(V[b, t]), abs=1e-12)
        assert not A[b, n[b]:].any() and not R[b, n[b]:].any()


def test_a_ratio_counts_no_further_than_the_clip():
    old = torch.zeros(4).double()
    new = torch.tensor([0.5, -0.5, 0.5, -0.5]).double()
    A = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    want = [-1.2, -math.exp(-0.5), math.exp(0.5), 0.8]
    assert surrogate(new, old, A).tolist() == pytest.approx(want)
    old = torch.tensor([0.1, 0.2, -0.3, 0.4]).double()
    rho = [math.exp(x) for x in (new - old).tolist()]
    assert drift(new, old) == pytest.approx(sum(r - 1 - math.log(r) for r in rho) / 4)


def test_rewards_are_scaled_by_the_deviation_of_returns():
    r = torch.tensor([[1.0, 2.0], [-1.0, 0.5]]).double()
    alive = torch.tensor([[True, True], [True, False]])
    R = Returns()
    got = R.scaled(r * alive, alive)
    first = torch.tensor([1.0, -1.0]).std(unbiased=False)
    later = torch.tensor([1.0, -1.0, 0.99 + 2.0]).std(unbiased=False)
    want = torch.tensor([[1 / first, 2 / later], [-1 / first, 0.0]])
    torch.testing.assert_close(got, want.double(), rtol=1e-6, atol=1e-6)
    R.scaled(r * alive, alive)
    assert R.count == 6


def test_rewards_stay_as_they_are_while_no_return_differs():
    """One graph, or several that gain the same, say nothing of a deviation."""
    for episodes in (1, 3):
        r = torch.tensor([[0.5, -0.25]]).double().expand(episodes, 2)
        got = Returns().scaled(r, torch.ones(episodes, 2).bool())
        later = torch.tensor([0.5, 0.99 * 0.5 - 0.25]).double().std(unbiased=False)
        assert torch.equal(got[:, 0], r[:, 0])
        torch.testing.assert_close(got[:, 1], r[:, 1] / later)


@pytest.mark.parametrize("members", [1, 2])
def test_the_loss_of_a_member_written_out(members):
    net, batch, e, seen = played(members=members)
    there = batch["nodes"].abs().sum(-1) > 0
    S, v, a = seen.S[:, 1], seen.v[:, 1], seen.a[:, 1]
    A, R = torch.randn(6).double(), torch.randn(6).double()
    old = (seen.log_v[:, 1] - 0.3 * torch.rand(6).double(),
           seen.log_a[:, 1] + 0.3 * torch.rand(6).double())
    learner = Learner(e, 1e-3, 1, 64, 2.0, 0.7)
    got = learner.loss(0, S, there, v, a, A, R, old)
    want = 0.0
    for b in range(6):
        on = there[b]
        pi = [F.softmax(x.node(S[b, on]).squeeze(-1), -1) for x in e.members]
        k = int(on[: v[b]].sum())
        mean = [x.z_max * torch.tanh(x.content(S[b])) for x in e.members]
        log = torch.distributions.Normal(mean[0][v[b]], 1.0).log_prob(a[b]).sum()
        for new, was in ((pi[0][k].log(), old[0][b]), (log, old[1][b])):
            rho = (new - was).exp()
            want = want - torch.minimum(rho * A[b], rho.clamp(0.8, 1.2) * A[b])
        want = want + 0.01 * (pi[0] * pi[0].log()).sum() + 0.5 * (e.critic(S[b]) - R[b]) ** 2
        if members > 1:
            ens = torch.maximum(*pi).detach()
            ens = ens / ens.sum()
            want = want + 2.0 * (ens * (ens / pi[0]).log()).sum()
            best = on.nonzero().squeeze(1)[ens.argmax()]
            together = (sum(mean)[best] / 2).detach()
            want = want + 0.7 * torch.distributions.kl_divergence(
                torch.distributions.Normal(mean[0][best], 1.0),
                torch.distributions.Normal(together, 1.0)).sum()
    torch.testing.assert_close(got[0], want / 6)
    mine = [*e.members[0].parameters(), *e.critic.parameters()]
    for g, w in zip(torch.autograd.grad(got[0], mine), torch.autograd.grad(want / 6, mine),
                    strict=True):
        torch.testing.assert_close(g, w)


def test_a_member_stops_where_it_has_gone_too_far():
    _, batch, e, seen = played()
    there = batch["nodes"].abs().sum(-1) > 0
    steps = []
    for rate, passes in ((1e-7, 5), (0.5, 5)):
        learner = Learner(copy.deepcopy(e), rate, passes, 10_000, 1.0, 0.1)
        inner = learner.rules[0].step
        count = []
        learner.rules[0].step = lambda n=count, f=inner: (n.append(1), f())
        learner.learn(0, seen, there)
        steps.append(len(count))
    assert steps[0] == 5 and steps[1] < 5


def test_shares_of_the_graphs_overlap():
    got = list(parts(range(10), 2, 0.2))
    assert got == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 0]]
    assert list(parts(range(3), 1, 0.2)) == [[0, 1, 2]]


# -- the whole ------------------------------------------------------------------------------------
def test_the_network_stays_and_the_head_moves():
    net, batch = world()
    net.train().requires_grad_(True)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    prompted = method(epochs=2, members=2, updates=2).lifecycle(net, [batch])
    moved = {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"head.weight", "head.bias"}
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert len(prompted.losses) == 2
    P = prompted.prompts(batch)
    torch.testing.assert_close(prompted(batch).logits, under(net, batch, P)[1].detach())
    assert torch.equal(P, prompted.prompts(batch)) and bool(P.any())
    bare = {k: v for k, v in batch.items() if k != "labels"}
    assert torch.equal(prompted.prompts(bare), P), "an answer needs no label"


def test_a_run_is_its_seed_s_and_a_file_of_the_policy_is_the_policy():
    runs = []
    for seed in (1, 1, 2):
        net, batch = world()
        runs.append(method(epochs=1, members=2, updates=1, seed=seed).lifecycle(net, [batch]))
    states = [r.policy.state_dict() for r in runs]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert not all(torch.equal(t, states[2][n]) for n, t in states[0].items())
    net, batch = world()
    other = Ensemble(2, 16, 16, 9, 1.0).double()
    other.load_state_dict(states[0])
    with drawn(1):
        again = graphs(net).prompts(other, batch, True)
    torch.testing.assert_close(again, runs[0].prompts(batch))


def test_members_learn_of_their_own_graphs_and_a_policy_gets_better():
    """With a head that stands, prompts of the trained policy lower the loss by more than those of
    the first one."""
    net, batch = world(10, largest=8)
    base = float(each(net(**batch), batch).mean().detach())
    m = method(epochs=8, members=2, head_rate=1e-12, policy_rate=5e-3, alpha_d=0.0, alpha_c=0.0,
               z_max=0.5)
    trained = m.lifecycle(net, [batch])
    loss = float(F.cross_entropy(trained(batch).logits, batch["labels"]))
    assert trained.losses[-1] < trained.losses[0] and loss < 0.9 * base


def test_a_mask_says_who_is_there():
    net, batch = world()
    masked = {**batch, "mask": batch["nodes"].abs().sum(-1) > 0}
    one, two = (method(epochs=1, members=1, updates=1).lifecycle(copy.deepcopy(net), [b])
                for b in (batch, masked))
    assert torch.equal(one.prompts(batch), two.prompts(masked))
    masked["mask"] = masked["mask"].clone()
    masked["mask"][:, 0] = False
    masked["mask"][:, 1] = True
    assert not graphs(net).prompts(one.policy, masked, True)[:, 0].any()


@pytest.mark.parametrize("text, why", [
    ("relief(members=0)", "at least 1"), ("relief(overlap=2.0)", "0 to 1"),
    ("relief(updates=0)", "at least 1"), ("relief(minibatch=0)", "at least 1"),
    ("relief(epochs=0)", "at least 1"), ("relief(overlap=-0.1)", "0 to 1"),
    ("relief(head_rate=0.0)", "above 0"), ("relief(z_max=0.0)", "above 0"),
    ("relief(alpha_c=-1.0)", "at least 0"),
    ("relief(policy_rate=0.0)", "above 0"), ("relief(alpha_d=-1.0)", "at least 0"),
    ("relief(members=1, alpha_c=1.0)", "does nothing with one member"),
    ("relief(targets='q')", "does nothing")])
def test_settings_that_cannot_act_are_refused(text, why):
    with pytest.raises(burnish.ConfigError, match=why):
        burnish.parse(text)


def test_the_least_that_acts():
    for least in ({"members": 1, "updates": 1, "minibatch": 1, "epochs": 1},
                  {"overlap": 0.0, "alpha_d": 0.0, "alpha_c": 0.0}, {"overlap": 1.0}):
        assert method(**least).changed() == least


def test_what_it_refuses():
    net, batch = world()
    with pytest.raises(burnish.ConfigError, match="no module"):
        method(embed="nowhere").lifecycle(net, [batch])
    with pytest.raises(burnish.ConfigError, match="does not tell what embeds"):
        method().lifecycle(torch.nn.Sequential(torch.nn.Linear(4, 4)), [batch])
    with pytest.raises(burnish.DataError, match="no batch"):
        method().lifecycle(net, [])
    with pytest.raises(burnish.DataError, match="has no node"):
        method().lifecycle(net, [{**batch, "nodes": torch.zeros_like(batch["nodes"])}])
    with pytest.raises(burnish.DataError, match="mappings with nodes"):
        method().lifecycle(net, [{"x": batch["nodes"], "labels": batch["labels"]}])
    with pytest.raises(burnish.ConfigError, match="graphs, nodes, width"):
        method(state_of="head").lifecycle(net, [batch])


def test_the_defaults_are_the_authors():
    m = method()
    assert m.settings() == {
        "targets": None, "members": 3, "overlap": 0.2, "z_max": 1.0, "alpha_d": 1.0,
        "alpha_c": 0.1, "updates": 10, "minibatch": 64, "policy_rate": 5e-4, "head_rate": 1e-3,
        "epochs": 50, "draws": True, "embed": None, "state_of": None, "seed": 0}
    e = Ensemble(1, 4, 4, 3, 1.0)
    assert Learner(e, m.policy_rate, 10, 64, 1.0, 0.1).rules[0].defaults["eps"] == 1e-5
