"""SupCon: both placements of the mean, the views, gradients through both of them, refusals."""

from __future__ import annotations

import random

import pytest
import torch

import burnish
from burnish.blocks.state import twins
from burnish.blocks.state.supervised import per_anchor, supervised
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.testing import stir, tiny


def hand(h, classes, t, outside):
    """Row by row and pair by pair, in float64: the mean over rows that have a positive."""
    h = h.double()
    z = [r / (r * r).sum().sqrt() for r in h]
    n, total, many = len(z), 0.0, 0
    for i in range(n):
        P = [p for p in range(n) if p != i and classes[p] == classes[i]]
        if not P:
            continue
        below = sum(torch.exp((z[i] * z[a]).sum() / t) for a in range(n) if a != i)
        q = [torch.exp((z[i] * z[p]).sum() / t) / below for p in P]
        total = total + (-sum(torch.log(v) for v in q) / len(P) if outside
                         else -torch.log(sum(q) / len(P)))
        many += 1
    return total / many if many else 0.0


@pytest.mark.parametrize("t", [0.1, 1.0])
@pytest.mark.parametrize("outside", [True, False])
def test_the_loss_and_its_gradient(outside, t):
    g = torch.Generator().manual_seed(0)
    h = (3 * torch.randn(7, 4, generator=g, dtype=torch.float64)).requires_grad_()
    classes = torch.tensor([0, 1, 0, 2, 0, 1, 5])                # one of 3, one of 2, two alone
    got, want = supervised(h, classes, t, outside), hand(h, classes, t, outside)
    torch.testing.assert_close(got, want)
    (a,), (b,) = torch.autograd.grad(got, h), torch.autograd.grad(want, h)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    losses, has = per_anchor(h, classes, t, outside)
    assert has.tolist() == [True, True, True, False, True, True, False]
    assert losses[3] == losses[6] == 0 and (losses[has] > 0).all()
    assert supervised(h.detach().bfloat16(), classes, t, outside).dtype == torch.float32


def test_inside_is_no_more_than_outside_and_the_same_for_two():
    g = torch.Generator().manual_seed(1)
    h = torch.randn(8, 5, generator=g, dtype=torch.float64)
    out, _ = per_anchor(h, torch.arange(8) % 2, 0.1, True)
    ins, _ = per_anchor(h, torch.arange(8) % 2, 0.1, False)
    assert (ins < out).all()
    two = torch.arange(8) // 2
    torch.testing.assert_close(per_anchor(h, two, 0.1, True)[0], per_anchor(h, two, 0.1, False)[0])


@pytest.mark.parametrize("outside", [True, False])
def test_no_two_of_a_class_cost_nothing_and_give_no_gradient(outside):
    h = torch.randn(4, 3, requires_grad=True)
    loss = supervised(h, torch.arange(4), 0.1, outside)
    loss.backward()
    assert loss == 0 and torch.equal(h.grad, torch.zeros(4, 3))


def features(net, batch, path):
    seen = []
    hook = net.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    out = net(**batch)
    hook.remove()
    return seen[0], out


@pytest.mark.parametrize("second, outside", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("recipe, model, head", [
    ("lora(rank=2)", "bert", "classifier"), ("full", "vit", "classifier"),
    ("lora(rank=2) + checkpoint", "vit", "classifier")])
def test_gradients_are_those_of_the_term(recipe, model, head, second, outside):
    net, batch = tiny(model, dtype=torch.float64)
    batch = {k: torch.cat([v, v.flip(-1), v.roll(3, -1)]) if v.dim() > 1 else v.repeat(3)
             for k, v in batch.items()}
    batch["labels"] = torch.tensor([0, 1, 0, 2, 0, 1])
    how = ", distortion=0.4, seed=5" if second else ""
    tuned = burnish.tune(net, f"{recipe} + supcon(weight=0.7, temperature=0.5, outside={outside}, "
                              f"second_view={second}{how})", head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    stir(tuned, size=0.1)
    net.eval()
    draw = random.Random("supcon 5 0").getrandbits(31)
    views = [batch] + ([twins.view((), batch, 0.4, model == "bert", draw)[1]] if second else [])
    h = torch.cat([features(net, v, head)[0] for v in views])
    whole = net(**batch).loss + 0.7 * hand(h, batch["labels"].repeat(1 + second), 0.5, outside)
    want = torch.autograd.grad(0.5 * whole, list(tuned.parameters()), allow_unused=True)
    tuned.optimizer(lr=0.0)
    (0.5 * net(**batch).loss).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=n)


def test_it_brings_classes_together():
    net, _ = tiny("vit")
    g = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 3, 4, 4, generator=g).repeat(8, 1, 1, 1)
    x = torch.randn(24, 3, 4, 4, generator=g) + kinds
    x = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    batch = {"pixel_values": x, "labels": torch.arange(24) % 3}
    tuned = burnish.tune(net, "full + supcon(second_view=False)", head=False)
    net.eval()
    tuned.optimizer(lr=2e-3)

    def apart():
        with torch.no_grad():
            z = torch.nn.functional.normalize(features(net, batch, "classifier")[0], dim=-1)
        cos = z @ z.T
        near = (batch["labels"][:, None] == batch["labels"]) & ~torch.eye(24, dtype=torch.bool)
        return float(cos[near].mean() - cos[batch["labels"][:, None] != batch["labels"]].mean())

    before = apart()
    for _ in range(80):
        tuned.step(batch, loss=lambda out, b: 0 * out.logits.sum())
    assert apart() > before + 0.5


def test_settings_and_refusals():
    (m,) = burnish.parse("supcon")
    assert (m.weight, m.temperature, m.outside, m.second_view, m.distortion, m.seed) == \
        (1.0, 0.1, True, True, 0.3, 0)
    assert m.taps(Anatomy.of(tiny("llama")[0])) == ()              # a head of its words, no class
    for bad in ("weight=0.0", "temperature=0.0", "distortion=0.0", "distortion=1.0"):
        with pytest.raises(RecipeError, match="distortion between 0 and 1"):
            burnish.parse(f"supcon({bad})")
    with pytest.raises(RecipeError, match="do nothing beside second_view=False"):
        burnish.parse("supcon(second_view=False, seed=3)")
    with pytest.raises(RecipeError, match="needs a task head of one linear"):
        burnish.tune(tiny("llama")[0], "lora(rank=2) + supcon")
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + supcon(second_view=False)")
    tuned.optimizer(lr=1e-3)
    for labels in (torch.rand(2, 3), None):
        with pytest.raises(ConfigError, match="one class a sample"):
            tuned.loss({k: v for k, v in {**batch, "labels": labels}.items() if v is not None},
                       loss=lambda out, b: out.logits.sum())


def test_a_batch_that_has_no_names_has_no_labels():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    tuned = burnish.tune(net, "lora(rank=2) + supcon(second_view=False)")
    tuned.optimizer(lr=1e-3)
    with pytest.raises(ConfigError, match="a batch has `labels`"):
        tuned.step((torch.randn(4, 6), torch.arange(4)), loss=lambda out, b: out.sum())
