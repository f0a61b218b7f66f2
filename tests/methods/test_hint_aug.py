"""Hint-Aug: attention maps from eager attention, the chosen patches and delta written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.choose.patches import chosen, mistaken, spread
from burnish.core.recipe import parse
from burnish.methods.lifecycle.hint_aug import HintAug
from burnish.testing.models import tiny


def joined(recipe="lora(rank=2, alpha=8.0)", model="vit"):
    net, batch = tiny(model, dtype=torch.float64, batch=6, dropout=0.3)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, recipe, head=True)
    g = torch.Generator().manual_seed(3)
    for p in tuned.parameters():
        p.data = p.data.double() + 0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    key = "pixel_values" if model == "vit" else "x"
    batch[key] = batch[key].clamp(-1, 1)
    return tuned, batch, base


def eager(net, x, layer, prompts=0):
    """The map by transformers' own eager attention, its probabilities among the outputs."""
    net = copy.deepcopy(net).eval()
    net.set_attn_implementation("eager")
    with torch.no_grad():
        p = net(pixel_values=x, output_attentions=True).attentions[layer]
    seen = p.mean(1).mean(1)[:, 1 + prompts:]
    return seen / seen.norm(dim=1, keepdim=True)


def merged(tuned):
    return copy.deepcopy(tuned).merge().eval()


def pixels(index):
    """The pixels of patches of 4 x 4 in a picture of 16 x 16."""
    mask = torch.zeros(1, 16, 16, dtype=torch.float64)
    for i in index:
        r, c = divmod(int(i), 4)
        mask[0, 4 * r:4 * r + 4, 4 * c:4 * c + 4] = 1
    return mask


def masks(t, s, k, limit):
    out = []
    for a, b in zip(t, s, strict=True):
        score = a - b if float((a - b).abs().max()) > limit else b
        out.append(pixels(score.argsort(descending=True)[:k]))
    return torch.stack(out)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("limit", [0.0, 0.9])
@pytest.mark.parametrize("updates", [1, 3])
def test_the_augmented_batch(layer, limit, updates):
    tuned, batch, base = joined()
    method = HintAug(layer=layer, limit_of_change=limit, pixel_updates=updates, patches=3)
    likely = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)).softmax(1).double()
    tuned.model.train()
    got = method.augmented(tuned, batch, likely, torch.Generator().manual_seed(5))
    x, now = batch["pixel_values"], merged(tuned)
    here = masks(eager(base, x, layer), eager(now, x, layer), 3, limit)
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)).double()
    delta = torch.nn.Parameter(here * (2 * u - 1 - x))
    opt = torch.optim.Adam([delta], lr=0.1)
    for _ in range(updates):
        z = now(pixel_values=x + delta).logits
        value = -(likely[batch["labels"]] * F.log_softmax(z, 1)).sum(1).mean()
        opt.zero_grad()
        value.backward()
        opt.step()
        with torch.no_grad():
            delta.copy_(here * ((x + here * delta).clamp(-1, 1) - x))
    torch.testing.assert_close(got["pixel_values"], (x + delta).detach(), rtol=1e-6, atol=1e-8)
    assert got["labels"] is batch["labels"] and tuned.model.training
    moved = got["pixel_values"] != x
    assert not (moved & (here == 0)).any() and moved.any()       # zero outside chosen patches
    assert float(got["pixel_values"].abs().max()) <= 1


def test_redrawn_patches_are_likelier_what_the_class_is_mistaken_for():
    tuned, batch, _ = joined()
    likely = torch.eye(3).roll(1, 1).double()
    first, later = (HintAug(layer=1, patches=8, pixel_updates=n, pixel_rate=r).augmented(
        tuned, batch, likely, torch.Generator().manual_seed(5)) for n, r in ((1, 1e-9), (5, 0.001)))
    now = merged(tuned)

    def far(b):
        return float(F.cross_entropy(now(pixel_values=b["pixel_values"]).logits,
                                     likely[batch["labels"]]))
    assert far(later) < far(first)


def test_the_teacher_is_the_base_and_prompts_are_no_patches():
    tuned, batch, base = joined("vpt(length=3, dropout=0.0)")
    found = []
    from burnish.blocks.choose import patches as block

    plain = block.Maps.map

    def heard(self, n):
        found.append(plain(self, n))
        return found[-1]

    block.Maps.map = heard
    try:
        HintAug(layer=1).augmented(tuned, batch, torch.eye(3).double())
    finally:
        block.Maps.map = plain
    before, now = found
    torch.testing.assert_close(before, eager(base, batch["pixel_values"], 1), rtol=1e-6, atol=1e-8)
    assert before.shape == now.shape == (6, 16) and not torch.equal(before, now)
    torch.testing.assert_close(now.norm(dim=1), torch.ones(6, dtype=now.dtype))


@pytest.mark.parametrize("kind", ["bias", "mask"])
def test_a_bias_of_relative_positions_is_part_of_the_map(kind):
    """BEiT's maps are those of its own eager attention; a mask of what may be seen, likewise."""
    from transformers import BeitConfig, BeitForImageClassification

    from burnish.blocks.choose.patches import Maps

    torch.manual_seed(0)
    net = BeitForImageClassification(BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=3, use_relative_position_bias=True,
        attn_implementation="sdpa")).double().eval()
    with torch.no_grad():
        for n, p in net.named_parameters():
            if "relative_position" in n:
                p.normal_()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    if kind == "mask":
        attention, seen = net.beit.layers[1].attention, torch.rand(1, 1, 17, 17) < 0.6
        seen[..., 0] = True
        attention.forward = lambda h: F.scaled_dot_product_attention(h, h, h, attn_mask=seen)
        h = torch.randn(2, 4, 17, 8, dtype=torch.float64)
        with Maps(attention) as maps:
            attention(h)
        z = (h @ h.mT / 8 ** 0.5).masked_fill(~seen, -torch.inf)
        want = F.normalize(z.softmax(-1).mean((1, 2))[:, 1:], dim=1)
    else:
        want = eager(net, x, 1)
        with torch.no_grad(), Maps(net.beit.layers[1].attention) as maps:
            net(pixel_values=x)
    torch.testing.assert_close(maps.map(16), want, rtol=1e-6, atol=1e-8)


def test_confusions():
    tuned, batch, base = joined()
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    b = {**batch, "labels": labels}
    with torch.no_grad():
        said = base(pixel_values=batch["pixel_values"]).logits.argmax(1)
    counts = torch.zeros(3, 3)
    for i, j in zip(labels.tolist(), said.tolist(), strict=True):
        counts[i, j] += 2 * (i != j)
    torch.testing.assert_close(HintAug().lifecycle(tuned, [b, b]), counts.softmax(1))
    z = torch.eye(3)[torch.tensor([0, 1, 1, 2])]
    assert mistaken(z, torch.tensor([0, 0, 1, 0]), 3).tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(burnish.ConfigError, match="no batch to read"):
        HintAug().lifecycle(tuned, [])


def test_choices():
    t = torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.5, 0.5, 0.5, 0.5]])
    s = torch.tensor([[0.1, 0.2, 0.9, 0.3], [0.4, 0.6, 0.5, 0.55]])
    assert chosen(t, s, 2, 0.7).tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]
    assert chosen(t, s, 2, 0.8).tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    m = spread(torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 1.0]]), torch.Size((1, 3, 4, 9)), (2, 3))
    want = torch.zeros(1, 1, 4, 9)
    want[..., :2, 3:6] = 1
    want[..., 2:, 6:] = 1
    assert torch.equal(m, want)


def test_a_step_trains_on_it():
    tuned, batch, _ = joined(model="timm_qkv")
    method = HintAug(layer=0)
    likely = method.lifecycle(tuned, [batch])
    tuned.optimizer(lr=5e-3)
    losses = [float(method.step(tuned, batch, likely)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_its_settings():
    made = parse("hint_aug")[0]
    assert (made.layer, made.patches, made.limit_of_change, made.pixel_rate, made.pixel_updates,
            made.least_pixel, made.largest_pixel) == (4, 2, 0.7, 0.1, 1, -1.0, 1.0)


def test_what_cannot_act_is_refused():
    least = parse("hint_aug(layer=0, patches=1, pixel_updates=1)")[0]
    assert (least.layer, least.patches) == (0, 1)
    for settings in ({"layer": -1}, {"patches": 0}, {"pixel_updates": 0}, {"pixel_rate": 0.0}):
        with pytest.raises(burnish.ConfigError, match="layer of at least 0"):
            HintAug(**settings)
    with pytest.raises(burnish.ConfigError, match="which leaves none"):
        HintAug(least_pixel=1.0)
    tuned, batch, _ = joined()
    with pytest.raises(burnish.ConfigError, match="has 2 blocks"):
        HintAug().augmented(tuned, batch, torch.eye(3))
    with pytest.raises(burnish.ConfigError, match="labels holds none"):
        HintAug(layer=0).augmented(tuned, {"labels": batch["labels"]}, torch.eye(3))
    net, batch = tiny("vit")
    net.set_attn_implementation("eager")
    with pytest.raises(burnish.ConfigError, match="attn_implementation='sdpa'"):
        HintAug(layer=0).augmented(burnish.tune(net, "bitfit"), batch, torch.eye(3))
    net, batch = tiny("swin")
    with pytest.raises(burnish.ConfigError, match="it looks at windows"):
        HintAug(layer=0).augmented(burnish.tune(net, "bitfit"), batch, torch.eye(3))
