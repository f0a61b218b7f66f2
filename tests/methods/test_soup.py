"""Soups against the direct mean, autograd through the mixture, and the rule of the greedy one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.weight.checkpoints import mixed, weight_gradients
from burnish.blocks.weight.taskvector import TaskVector, combine
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.soup import greedy, learned, uniform


def checkpoint(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 6), "a.weight": (7, 6), "a.bias": (7,), "b.weight": (3, 7)}
    return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}


def test_running_sum_equals_the_direct_mean():
    models = [checkpoint(i) for i in range(7)]
    soup = dict(uniform(models))
    for n in soup:
        want = torch.stack([m[n] for m in models]).double().mean(0)
        assert (soup[n] - want).abs().max() < 1e-6


def test_greedy_keeps_what_does_not_hurt():
    target = checkpoint(0)
    good = [{n: t + 0.1 * s for n, t in target.items()} for s in (1, -1)]
    bad = {n: t + 5 for n, t in target.items()}
    models, calls = [bad, *good], []

    def score(some):
        calls.append(some)
        m = {n: torch.stack([models[i][n] for i in some]).double().mean(0) for n in target}
        return -sum(float((m[n] - target[n]).square().sum()) for n in target)

    chosen, best = greedy(3, score)
    assert sorted(chosen) == [1, 2] and best == score(tuple(chosen))
    assert best >= max(score((i,)) for i in range(3))
    single = [score((i,)) for i in range(3)]
    calls.clear()
    assert greedy(3, score, single) == (chosen, best)
    assert [len(c) for c in calls] == [2, 3] and calls[1][:2] == tuple(chosen)
    assert greedy(1, score) == ([0], single[0])
    with pytest.raises(ConfigError, match="3 checkpoints and 2 scores"):
        greedy(3, score, single[:2])
    with pytest.raises(ConfigError, match="at least one"):
        greedy(0, score)


def test_equals_count_as_no_worse():
    assert greedy(3, lambda some: 1.0) == ([0, 1, 2], 1.0)
    assert greedy(3, lambda some: 1.0 if len(some) == 1 else 0.9) == ([0], 1.0)


def test_soups_refuse_other_architectures_and_copy_integers():
    with pytest.raises(ConfigError, match=r"a.bias is \[3\] beside \[7\]"):
        dict(uniform([checkpoint(0), {**checkpoint(1), "a.bias": torch.zeros(3)}]))
    with pytest.raises(ConfigError, match="b.weight is not in all"):
        dict(uniform([checkpoint(0), {n: t for n, t in checkpoint(1).items()
                                      if n != "b.weight"}]))
    with pytest.raises(ConfigError, match="at least one"):
        uniform([])
    steps = [{"n": torch.tensor(4)}, {"n": torch.tensor(6)}]
    assert dict(uniform(steps))["n"] == 4
    moved = [{"bn.running_mean": torch.full((2,), v)} for v in (1.0, 3.0)]
    assert (dict(uniform(moved))["bn.running_mean"] == 1).all()
    halves = dict(uniform([{"w": torch.full((2,), v).bfloat16()} for v in (1.0, 0.0)]))
    assert halves["w"].dtype == torch.bfloat16 and (halves["w"] == 0.5).all()
    same = [checkpoint(3)] * 3                       # the mean of equals is each of them
    assert all(torch.equal(t, same[0][n]) for n, t in uniform(same))


@pytest.mark.parametrize("per_layer", [False, True])
def test_gradient_of_the_weights_equals_autograd_through_the_mixture(per_layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    models = [{n: torch.randn_like(t) for n, t in net.state_dict().items()} for _ in range(3)]
    x, y = torch.randn(10, 5).double(), torch.randint(3, (10,))
    layer = (lambda n: n.partition(".")[0]) if per_layer else (lambda n: "")
    alpha = {k: torch.rand(3).softmax(0).double().requires_grad_() for k in {"", "0", "2"}}
    beta = torch.tensor(1.3, requires_grad=True)
    explicit = {n: sum(alpha[layer(n)][i] * m[n] for i, m in enumerate(models)) for n in models[0]}
    value = nn.functional.cross_entropy(beta * torch.func.functional_call(net, explicit, (x,)), y)
    value.backward()
    scale = torch.tensor(1.3, requires_grad=True)
    da = weight_gradients(net, models, lambda n: alpha[layer(n)].detach().tolist(), x,
                          lambda out: nn.functional.cross_entropy(scale * out, y), layer)
    assert da.keys() == ({"0", "2"} if per_layer else {""})
    for k, g in da.items():
        assert torch.allclose(g.double(), alpha[k].grad, rtol=1e-5, atol=1e-7)
    assert scale.grad.item() == pytest.approx(beta.grad.item(), rel=1e-5)
    assert all(p.grad is None for p in net.parameters())


def test_learned_weights_find_the_good_model():
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    truth = {n: t.clone() for n, t in net.state_dict().items()}
    models = [{n: torch.randn_like(t) for n, t in truth.items()},
              {n: 3 * t for n, t in truth.items()},
              {n: torch.randn_like(t) for n, t in truth.items()}]
    x = torch.randn(256, 4)
    y = (x @ truth["weight"].T + truth["bias"]).argmax(1)
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)]
    before = {n: t.clone() for n, t in net.state_dict().items()}
    alpha, beta = learned(net, models, batches, epochs=12)
    assert alpha[""].argmax() == 1 and alpha[""].sum() == pytest.approx(1) and beta > 1
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())

    def accuracy(m):
        return float(((x @ m["weight"].T + m["bias"]).argmax(1) == y).float().mean())

    soup = dict(mixed(models, lambda n: alpha[""].tolist()))
    assert accuracy(soup) > accuracy(dict(uniform(models)))


def test_learning_follows_adamw_on_the_free_logits_and_the_scale():
    """The same steps, by autograd through an explicit softmax and mixture."""
    torch.manual_seed(1)
    net = nn.Linear(4, 3)
    models = [{n: torch.randn_like(t) for n, t in net.state_dict().items()} for _ in range(3)]
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    for layer, names in ((lambda n: "", [""]), (lambda n: n, ["bias", "weight"])):
        free = {k: torch.zeros(3, requires_grad=True) for k in names}
        beta = torch.ones((), requires_grad=True)
        opt = torch.optim.AdamW([*free.values(), beta], lr=0.1, weight_decay=0.0)
        for x, y in batches * 3:
            opt.zero_grad()
            theta = {n: sum(free[layer(n)].softmax(0)[i] * m[n] for i, m in enumerate(models))
                     for n in models[0]}
            out = torch.func.functional_call(net, theta, (x,))
            nn.functional.cross_entropy(beta * out, y).backward()
            opt.step()
        alpha, scale = learned(net, models, batches, layer=layer)
        assert alpha.keys() == set(names)
        for k in names:
            torch.testing.assert_close(alpha[k], free[k].detach().softmax(0), rtol=1e-4, atol=1e-6)
        assert scale == pytest.approx(beta.item(), rel=1e-4)


def test_the_scale_of_the_logits_stays_positive():
    net = nn.Linear(2, 2)
    models = [dict(net.state_dict()) for _ in range(2)]
    x = torch.randn(16, 2)
    wrong = 1 - net(x).argmax(1)                     # every answer is wrong: small logits are best
    _, beta = learned(net, models, [(x, wrong)], epochs=40, lr=0.3)
    assert beta == pytest.approx(1e-3, rel=1e-3)


def test_a_model_of_transformers_learns_from_its_logits():
    from burnish.testing.models import tiny

    net, batch = tiny("bert")
    models = [{n: t + 0.1 * k for n, t in net.state_dict().items() if t.is_floating_point()}
              for k in range(2)]
    y = batch.pop("labels")
    alpha, _ = learned(net.eval(), models, [(batch, y)])
    assert alpha[""].shape == (2,) and alpha[""][0] != 0.5


def test_the_method_makes_each_kind_of_soup():
    soup, plain, learnt = (parse(f"soup{k}")[0] for k in ("", "(kind='uniform')",
                                                          "(kind='learned')"))
    assert soup.axes() == ("lifecycle",) and soup.kind == "greedy"
    base, tuned = checkpoint(0), checkpoint(1)
    with pytest.raises(ConfigError, match="needs score="):
        soup.lifecycle(base, tuned)
    with pytest.raises(ConfigError, match="needs model= and batches="):
        learnt.lifecycle(base, tuned)
    mean = {n: (base[n].double() + tuned[n].double()).div(2).float() for n in base}
    assert all(torch.equal(plain.lifecycle(base, tuned)[n], mean[n]) for n in base)
    assert all(torch.equal(soup.lifecycle(base, tuned, score=lambda m: 1.0)[n], mean[n])
               for n in base)
    start = checkpoint(2)
    tasks = [TaskVector(start, m) for m in (base, tuned)]
    averaged = dict(combine(start, tasks, plain.rule(tasks)))            # as a rule among others
    for n in base:
        torch.testing.assert_close(averaged[n], mean[n])
    for whole in (soup, learnt):
        with pytest.raises(ConfigError, match=f"a {whole.kind} soup is made of whole runs"):
            whole.rule(tasks)
    best = soup.lifecycle(base, tuned, score=lambda m: float(torch.equal(m["a.bias"],
                                                                         tuned["a.bias"])))
    assert all(torch.equal(best[n], tuned[n]) for n in base)
    net = nn.Linear(4, 2)
    models = [{n: torch.randn_like(t) for n, t in net.state_dict().items()} for _ in range(2)]
    batches = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    made = learnt.lifecycle(*models, model=net, batches=batches)
    alpha = learned(net, models, batches)[0][""]
    for n in made:
        torch.testing.assert_close(made[n], alpha[0] * models[0][n] + alpha[1] * models[1][n])


def test_one_model_alone_has_all_the_weight():
    net = nn.Linear(4, 2)
    alpha, _ = learned(net, [dict(net.state_dict())], [(torch.randn(8, 4), torch.arange(8) % 2)])
    assert alpha[""].tolist() == [1.0]
