"""Tunable convolutions: the combination and its gradients, and one network for two objectives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.tunable import Tunable
from burnish.core.errors import ConfigError, RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import stir, tiny


def net(seed=0, groups=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(),
                         nn.Conv2d(8, 2, 3, padding=1, groups=groups)).double()


def made(recipe, groups=1, size=0.3):
    model = net(groups=groups)
    base = copy.deepcopy(model)
    tuned = burnish.tune(model, recipe, targets="0,2", head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    return stir(tuned, size=size), base, [t for _, t in tuned.terms(Tunable)]


def by_hand(base, terms, x, w, s):
    def kernel(conv, t):
        if hasattr(t, "K"):
            D = sum(w[i] * t.K[i] for i in range(len(w)))
        else:
            D = s * sum(w[i] * t.B[i] @ t.A[i] for i in range(len(w)))
        return conv.weight + D.view_as(conv.weight)

    def layer(conv, t, h):
        return F.conv2d(h, kernel(conv, t), conv.bias, padding=1, groups=conv.groups)

    return layer(base[2], terms[1], torch.tanh(layer(base[0], terms[0], x)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("recipe, s, w", [
    ("tunable(rank=2, alpha=5.0)", 2.5, (0.5, 0.5)),
    ("tunable(rank=2, objectives=3, coefficients=(0.2, 0.0, 1.5))", 4.0, (0.2, 0.0, 1.5)),
    ("tunable(rank=0)", 1.0, (0.5, 0.5))])
def test_outputs_and_gradients_are_the_combinations(recipe, s, w, groups):
    tuned, base, terms = made(recipe, groups)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = by_hand(base, terms, x, w, s)
    own = [p for t in terms for p in t.parameters()]
    grads = torch.autograd.grad(want.square().sum(), own)
    got = tuned.model(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)       # w is held in fp32
    got.square().sum().backward()
    for p, g in zip(own, grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)
    if 0.0 in w:
        assert all(torch.equal(t.B.grad[1], torch.zeros_like(t.B[1])) for t in terms)


def test_coefficients_are_set_and_put_back_and_merge_as_they_are():
    tuned, base, terms = made("tunable(rank=2)")
    (part,) = tuned.recipe
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    model = tuned.model.eval()
    plain = model(x).detach()
    with part.lifecycle(tuned, (0.25, 2.0)):
        inside = model(x).detach()
        torch.testing.assert_close(inside, by_hand(base, terms, x, (0.25, 2.0), 4.0).detach())
    assert torch.equal(model(x), plain) and not torch.allclose(inside, plain)
    with pytest.raises(RuntimeError), part.lifecycle(tuned, (1.0, 0.0)):
        raise RuntimeError
    assert torch.equal(model(x), plain)
    with part.lifecycle(tuned, (0.25, 2.0)):
        merged = tuned.merge()
    torch.testing.assert_close(merged(x), inside, rtol=1e-6, atol=1e-8)


def test_the_start_is_the_base_under_every_coefficient():
    model, batch = tiny("cnn")
    before = model.eval()(**batch).logits if isinstance(batch, dict) else model.eval()(batch)
    tuned = burnish.tune(model, "tunable(rank=1)", targets="conv", head=False)
    (part,) = tuned.recipe
    with part.lifecycle(tuned, (3.0, 0.5)):
        after = model(**batch).logits if isinstance(batch, dict) else model(batch)
    assert torch.equal(after, before)


def test_draws():
    (simplex,) = parse("tunable(objectives=3)")
    (cube,) = parse("tunable(objectives=3, among='cube')")
    many = torch.stack([simplex.drawn(k) for k in range(2000)])
    torch.testing.assert_close(many.sum(1), torch.ones(2000))
    torch.testing.assert_close(many.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    # of a uniform draw among three that sum to one, one is above t with probability (1 - t)^2
    assert abs(float((many[:, 0] > 0.5).float().mean()) - 0.25) < 0.03
    each = torch.stack([cube.drawn(k) for k in range(2000)])
    assert float(each.min()) >= 0 and float(each.max()) <= 1
    torch.testing.assert_close(each.mean(0), torch.full((3,), 0.5), atol=0.03, rtol=0)
    assert torch.equal(simplex.drawn(5), simplex.drawn(5))
    assert not torch.equal(simplex.drawn(6), simplex.drawn(5))
    for seed in (1, -1, 2**63 - 1):                        # any that a setting takes
        other = parse(f"tunable(objectives=3, seed={seed})")[0].drawn(5)
        assert not torch.equal(other, simplex.drawn(5))


def test_one_network_for_two_objectives(tmp_path):
    """Between a target and its mirror: at each end as near as at its own, in the middle between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 1, 3, padding=1))
    tuned = burnish.tune(model, "tunable(rank=0)", targets="0,2", head=False)
    (part,) = tuned.recipe
    tuned.optimizer(lr=1e-2)
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def up(out, b):
        return (out - x.roll(1, -1)).square().mean()

    def down(out, b):
        return (out - x.roll(-1, -1)).square().mean()

    for _ in range(500):
        part.step(tuned, (x, x), [up, down])

    def losses(w):
        with part.lifecycle(tuned, w), torch.no_grad():
            out = model.eval()(x)
            model.train()
            return float(up(out, None)), float(down(out, None))

    first, middle, last = losses((1.0, 0.0)), losses((0.5, 0.5)), losses((0.0, 1.0))
    assert first[0] < 0.3 < 1.2 < first[1] and last[1] < 0.3 < 1.2 < last[0], (first, last)
    assert first[0] < middle[0] < last[0] and last[1] < middle[1] < first[1]
    tuned.save(tmp_path)
    torch.manual_seed(0)
    again = burnish.load(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(),
                                       nn.Conv2d(8, 1, 3, padding=1)), tmp_path)
    with next(iter(again.recipe)).lifecycle(again, (1.0, 0.0)), torch.no_grad():
        assert float(up(again.model.eval()(x), None)) == pytest.approx(first[0], rel=1e-4)


@pytest.mark.parametrize("made_before", [True, False])
def test_an_update_is_one_of_the_weighed_losses(made_before):
    """p <- p - lr d(sum w_i L_i)/dp, w drawn for the update; its loss is what comes back."""
    tuned, base, terms = made("tunable(rank=0) + sgd")
    part = tuned.recipe[0]
    x, y = (torch.randn(3, 2, 5, 5, dtype=torch.float64) for _ in range(2))
    losses = [lambda out, b: (out - b[1]).square().mean(), lambda out, b: out.square().sum()]
    if made_before:
        tuned.optimizer(lr=0.1)
    for step in range(2):
        own = [t.K for t in terms]
        before = [K.detach().clone() for K in own]
        w = part.drawn(step).tolist()
        out = by_hand(base, terms, x, w, 1.0)
        want = sum(c * loss(out, (x, y)) for c, loss in zip(w, losses, strict=True))
        grads = torch.autograd.grad(want, own)
        got = part.step(tuned, (x, y), losses)
        lr = tuned.current_optimizer.param_groups[0]["lr"]
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-6, atol=0)
        for K, old, g in zip(own, before, grads, strict=True):
            torch.testing.assert_close(K.detach(), old - lr * g, rtol=1e-6, atol=1e-9)


def test_whole_coefficients_are_numbers_like_others():
    tuned, base, terms = made("tunable(rank=2, coefficients=(0, 1))")
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    with tuned.recipe[0].lifecycle(tuned, (0.25, 0.5)):
        torch.testing.assert_close(tuned.model(x), by_hand(base, terms, x, (0.25, 0.5), 4.0))
    torch.testing.assert_close(tuned.model(x), by_hand(base, terms, x, (0, 1), 4.0))


def test_count_defaults_and_refusals():
    (part,) = parse("tunable")
    assert (part.objectives, part.rank, part.alpha, part.among) == (2, 8, 8.0, "simplex")
    place = Place("c", "weight", "conv", 64, 288, "conv", kernel=9)
    assert part.count(place) == 2 * 8 * (64 + 288)
    assert parse("tunable(rank=0, objectives=3)")[0].count(place) == 3 * 64 * 288
    for bad, said in (("objectives=1", "at least 2"), ("rank=-1", "0 or more"),
                      ("coefficients=(1.0,)", "2 coefficients"),
                      ("coefficients=(1.0, -0.5)", "of 0 or more"),
                      ("rank=0, alpha=3.0", "alpha does nothing")):
        with pytest.raises(RecipeError, match=said):
            parse(f"tunable({bad})")
    with pytest.raises(RankError, match="tunable: rank 3 does not fit 2.weight"):
        burnish.tune(net(), "tunable(rank=3)", targets="2", head=False)
    tuned = made("tunable(rank=1)")[0]
    with pytest.raises(ConfigError, match="2 losses are expected.*got 1"):
        part.step(tuned, (1, 1), [lambda o, b: o])
    with pytest.raises(RecipeError, match="2 coefficients"), part.lifecycle(tuned, (1, 2, 3)):
        pass
    plain = burnish.tune(net(), "lora(rank=1)", targets="0,2", head=False)
    with pytest.raises(ConfigError, match="no part in this model"), \
            part.lifecycle(plain, (1.0, 1.0)):
        pass
