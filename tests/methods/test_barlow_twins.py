"""Barlow Twins: the correlation, the two sums, the views, and gradients through both of them."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import burnish
from burnish.blocks.state import twins
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.methods.objective.barlow_twins import pooled
from burnish.testing import stir, tiny


def hand(a, b, redundancy, eps):
    """The sums entry by entry, in float64."""
    a, b = a.double(), b.double()
    n, d = a.shape
    total = 0.0
    for i in range(d):
        for j in range(d):
            u, v = a[:, i] - a[:, i].sum() / n, b[:, j] - b[:, j].sum() / n
            c = (u * v).sum() / n / ((u * u).sum() / n + eps).sqrt() / \
                ((v * v).sum() / n + eps).sqrt()
            total = total + ((1 - c) ** 2 if i == j else redundancy * c * c)
    return total


@pytest.mark.parametrize("redundancy", [0.0, 0.0051, 1.0])
def test_the_sums(redundancy):
    g = torch.Generator().manual_seed(0)
    a, b = (3 + torch.randn(7, 4, generator=g, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(twins.barlow(a, b, redundancy, 1e-5), hand(a, b, redundancy, 1e-5))
    assert twins.barlow(a.bfloat16(), b.bfloat16(), 1.0, 1e-5).dtype == torch.float32
    assert twins.barlow(a, 5 * a - 2, 0.0, 0.0) < 1e-12, "the same but for size and place"
    with pytest.raises(ConfigError, match="at least two samples"):
        twins.barlow(a[:1], b[:1], 1.0, 1e-5)


def features(net, batch, path):
    seen = []
    hook = net.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    out = net(**batch)
    hook.remove()
    return seen[0], out


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("recipe, model, head", [
    ("lora(rank=2)", "bert", "classifier"), ("full", "vit", "classifier"),
    ("lora(rank=2) + checkpoint", "vit", "classifier")])
def test_gradients_are_those_of_the_sum(recipe, model, head, both):
    net, batch = tiny(model, dtype=torch.float64)
    batch = {k: torch.cat([v, v.flip(-1), v.roll(3, -1)]) if v.dim() > 1 else v.repeat(3)
             for k, v in batch.items()}
    tuned = burnish.tune(net, f"{recipe} + barlow_twins(weight=0.7, redundancy=0.4, seed=5, "
                              f"distortion=0.4, both={both})", head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    stir(tuned, size=0.1)
    net.eval()
    draw = random.Random("barlow_twins 5 0")
    views = [twins.view((), batch, 0.4, model == "bert", draw.getrandbits(31))[1]
             for _ in range(1 + both)]
    a, b = (features(net, v, head)[0] for v in ([] if both else [batch]) + views)
    whole = net(**batch).loss + 0.7 * hand(a, b, 0.4, 1e-5)
    want = torch.autograd.grad(0.5 * whole, list(tuned.parameters()), allow_unused=True)
    assert (a - b).abs().max() > 1e-4
    tuned.optimizer(lr=0.0)
    (0.5 * net(**batch).loss).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=n)


def test_views_differ_from_update_to_update_and_are_drawn_again_alike():
    def losses(seed):
        net, batch = tiny("bert", dtype=torch.float64)
        batch = {k: torch.cat([v, v.flip(-1)]) if v.dim() > 1 else v.repeat(2)
                 for k, v in batch.items()}
        net.eval()
        tuned = burnish.tune(net, f"full + barlow_twins(seed={seed})", head=False)
        tuned.optimizer(lr=0.0)
        seen = []
        for _ in range(2):
            tuned.loss(batch).backward()
            seen.append(torch.cat([p.grad.flatten() for p in tuned.parameters()
                                   if p.grad is not None]).clone())
            tuned.steps.optimizer.step()
            for p in tuned.parameters():
                p.grad = None
        return seen

    first, again, other = losses(0), losses(0), losses(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.allclose(first[0], first[1]) and not torch.allclose(first[0], other[0])


# -- views --------------------------------------------------------------------------------------
def test_a_picture_is_cut_and_keeps_its_type():
    x = torch.linspace(0, 1, 16).expand(64, 3, 16, 16)           # brighter to the right
    torch.manual_seed(0)
    y = twins.picture(x, 1e-9)
    torch.testing.assert_close(y, x, atol=1e-5, rtol=0)
    cut = twins.picture(x, 0.75)
    span = cut[:, 0, 8, -1] - cut[:, 0, 8, 0]
    factor = (cut.flatten(1).std(1) / x.flatten(1).std(1))
    assert (span > 0).all(), "no mirror image"
    assert factor.min() >= 0.4 * 0.25 and factor.max() <= 1.75
    assert len(span.unique()) == 64
    assert twins.picture(x.bfloat16(), 0.3).dtype == torch.bfloat16


def test_numbers_come_from_their_own_column():
    x = torch.arange(2000.0).view(500, 4)
    torch.manual_seed(0)
    y = twins.numbers(x, 0.3)
    assert torch.equal(y % 4, x % 4)
    assert 0.26 < float((y != x).float().mean()) < 0.33


def test_words_are_left_out_and_never_brought_in():
    mask = torch.ones(400, 12, dtype=torch.long)
    mask[:, 9:] = 0
    mask[::2, :2] = 0                                            # padded on the left
    torch.manual_seed(0)
    y = twins.words(mask, 0.4, 0)
    assert not (y > mask).any() and y[1::2, 0].all() and y[::2, 2].all()
    counted = mask.bool() & (mask.cumsum(1) > 1)
    assert 0.36 < 1 - float(y[counted].float().mean()) < 0.44


def test_what_has_no_view_is_refused():
    with pytest.raises(ConfigError, match="nothing to make another view of.*got input_ids"):
        twins.view((), {"input_ids": torch.ones(2, 3, dtype=torch.long)}, 0.3, False, 0)
    args, kw = twins.view((torch.randn(3, 5),), {"pixel_mask": torch.ones(3, 5)}, 0.9, False, 0)
    assert torch.equal(kw["pixel_mask"], torch.ones(3, 5)) and args[0].shape == (3, 5)


def test_settings_and_refusals():
    (m,) = burnish.parse("barlow_twins(lambd=0.1)")
    assert m.redundancy == 0.1
    assert burnish.parse("barlow_twins")[0].settings() == {
        "targets": None, "weight": 0.024, "redundancy": 0.0051, "distortion": 0.3, "both": True,
        "eps": 1e-5, "seed": 0}
    assert m.taps(Anatomy.of(tiny("llama")[0])) == ()              # a head of its words, no class
    for bad in ("weight=0.0", "eps=0.0", "redundancy=-1.0", "distortion=0.0", "distortion=1.0"):
        with pytest.raises(RecipeError, match="distortion between 0 and 1"):
            burnish.parse(f"barlow_twins({bad})")
    with pytest.raises(RecipeError, match="needs a task head of one linear"):
        burnish.tune(copy.deepcopy(tiny("llama")[0]), "lora(rank=2) + barlow_twins")


def test_of_a_head_that_reads_many_places_their_mean_is_compared():
    h = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for many in (h, h[:, 0]):
        rows = many.reshape(2, -1, 5)
        want = torch.stack([sum(places) / len(places) for places in rows])
        torch.testing.assert_close(pooled(many), want)
    assert torch.equal(pooled(h[:, 0, 0]), h[:, 0, 0])


def test_it_takes_redundancy_out():
    """Trained on it alone, both sums fall."""
    net, _ = tiny("vit")
    g = torch.Generator().manual_seed(0)
    blocks = torch.randn(16, 3, 4, 4, generator=g)
    batch = {"pixel_values": blocks.repeat_interleave(4, 2).repeat_interleave(4, 3),
             "labels": torch.zeros(16, dtype=torch.long)}
    tuned = burnish.tune(net, "full + barlow_twins(weight=1.0, redundancy=0.05)", head=False)
    net.eval()
    tuned.optimizer(lr=1e-3)

    def term():
        with torch.no_grad(), tuned.steps.objectives.riding.collecting() as found:
            net(**batch)
        return float(found[0])

    before = term()
    for _ in range(15):
        tuned.step(batch, loss=lambda out, b: 0 * out.logits.sum())
    assert term() < 0.8 * before
