"""BlackVIP: the coordinator written out in float64, its count, and training without a graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.recipe import parse
from burnish.engine.tune import tune
from burnish.testing.models import tiny

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)


def joined(model="vit", recipe="blackvip(map_side=2)", **kw):
    net, batch = tiny(model, **kw)
    net.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, recipe, head=False)
    for name, p in net.named_parameters():
        if ".burnish." in f".{name}":
            p.data = p.data.double()
    for module in net.modules():
        for key, b in module._buffers.items():
            if b is not None and b.is_floating_point():
                module._buffers[key] = b.double()
    return tuned, batch, base


def parts(tuned):
    """name below the coordinator -> tensor."""
    return {n.partition(".coordinator.")[2]: p for n, p in tuned.named_parameters()}


def prompt(theta, z, grid):
    """h of the docstring, by functions of torch; batch norms as in training."""
    x = torch.cat([z, theta["trigger"].expand(len(z), -1)], 1).view(len(z), 32, grid, grid)
    for i, (inp, wide) in enumerate([(32, 64), (64, 64), (32, 32), (32, 32)]):
        k = 4 * i
        x = F.conv_transpose2d(x, theta[f"body.{k}.weight"], theta[f"body.{k}.bias"], stride=2,
                               groups=inp)
        assert x.shape[1] == wide
        x = torch.einsum("bchw,co->bohw", x, theta[f"body.{k + 1}.weight"][:, :, 0, 0])
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        x = x * theta[f"body.{k + 2}.weight"].view(-1, 1, 1) + \
            theta[f"body.{k + 2}.bias"].view(-1, 1, 1)
        x = F.gelu(x)
    return F.conv_transpose2d(x, theta["body.16.weight"], stride=2)


def drawn(x, h, eps):
    h = F.interpolate(h, size=x.shape[-2:], mode="bilinear", align_corners=False)
    low, high = -CLIP_MEAN / CLIP_STD, (1 - CLIP_MEAN) / CLIP_STD
    x = x + eps * h
    return torch.minimum(torch.maximum(x, low.view(3, 1, 1)), high.view(3, 1, 1))


def seen(base, model, x):
    """What the last block says of the picture: class token, or the mean over its map."""
    base.eval()
    with torch.no_grad():
        if model == "vit":
            return base.vit(x, output_hidden_states=True).hidden_states[-1][:, 0]
        if model == "convnext":
            out = base.convnext(x, output_hidden_states=True).hidden_states[-1]
            return out.flatten(2).mean(-1)
        out = base.swin.embeddings(x)
        got = []
        hook = base.swin.encoder.layers[-1].blocks[-1].register_forward_hook(
            lambda m, a, o: got.append(o[0] if isinstance(o, tuple) else o))
        base.swin(x)
        hook.remove()
        assert out is not None
        return got[0].mean(1)


@pytest.mark.parametrize("model", ["vit", "swin", "convnext"])
@pytest.mark.parametrize("eps", [1.0, 0.25])
def test_the_equation(model, eps):
    tuned, batch, base = joined(model, f"blackvip(map_side=2, scale={eps})")
    theta = {n: p.detach().clone().requires_grad_() for n, p in parts(tuned).items()}
    z = seen(base, model, batch["pixel_values"])
    x = drawn(batch["pixel_values"], prompt(theta, z, 2), eps)
    base.train()
    want = base(**{**batch, "pixel_values": x}).loss
    tuned.model.train()
    got = tuned.loss(batch)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    got.backward()
    wanted = torch.autograd.grad(want, list(theta.values()))
    top = max(float(g.abs().max()) for g in wanted)
    for (n, p), g in zip(parts(tuned).items(), wanted, strict=True):
        assert float((p.grad - g).abs().max()) <= 1e-8 * top, n


def test_the_published_count():
    """9,920: a trigger of 800, and 9,120 of convolutions and batch norms, at ViT-B/16's shapes."""
    net, _ = tiny("vit", hidden_size=768, num_attention_heads=12, intermediate_size=3072,
                  num_hidden_layers=1, image_size=224, patch_size=16)
    tuned = burnish.tune(net, "blackvip", head=False)
    count = sum(p.numel() for p in tuned.parameters())
    assert count == 9920 == parse("blackvip")[0].count(768)
    assert parts(tuned)["trigger"].numel() == 800 == count - 9120
    made = next(m for m in net.modules() if type(m).__name__ == "Coordinator")
    with torch.no_grad():
        assert made(torch.randn(1, 768)).shape == (1, 3, 224, 224)
    trigger = made.trigger.detach()
    assert float(trigger.min()) >= 0 and 0.05 < float(trigger.max()) <= 0.1


@pytest.mark.parametrize("channels", [1, 4])
def test_the_count_of_other_channels(channels):
    mean = std = (0.5,) * channels
    net, _ = tiny("vit", num_channels=channels)
    recipe = f"blackvip(map_side=2, pixel_mean={mean}, pixel_std={std})"
    tuned = burnish.tune(net, recipe, head=False)
    assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32)


def test_a_map_that_z_fills_alone_is_refused():
    with pytest.raises(burnish.RecipeError, match="z alone has 1024 numbers, and the map 512: "):
        burnish.tune(tiny("vit", hidden_size=1024, num_attention_heads=4, num_hidden_layers=1)[0],
                     "blackvip(map_side=4)", head=False)


class Service(nn.Module):
    """A client: an encoder of its own, and a model elsewhere that answers with numbers alone."""

    def __init__(self, width=12, wrap=lambda z: z):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.Tanh(), nn.Dropout(0.5))
        self.wrap, self.asked, self.pictures = wrap, 0, []
        g = torch.Generator().manual_seed(5)
        self.away = torch.randn(3, 3 * 16 * 16, generator=g).tolist()

    def forward(self, pixel_values, labels):
        assert not torch.is_grad_enabled(), "nothing may reach for a gradient here"
        self.asked += 1
        self.pictures.append(pixel_values.clone())
        logits = pixel_values.flatten(1) @ torch.tensor(self.away).t() / 30
        return {"loss": F.cross_entropy(logits, labels)}


def service_batch():
    g = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(6, 3, 16, 16, generator=g),
            "labels": torch.arange(6) % 3}


def test_a_closed_model_is_trained_by_its_answers_alone():
    model = Service()
    tuned = burnish.tune(model, "blackvip(map_side=1, encoder='encoder', encoder_width=12) + "
                                "spsa_gc(queries=3)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 32 - 12 + 9120
    before = {n: t.clone() for n, t in model.encoder.state_dict().items()}
    tuned.optimizer(lr=0.02)
    tuned.step(service_batch())
    first = model.asked
    losses = []
    for _ in range(25):
        losses.append(float(tuned.step(service_batch())))
    assert model.asked - first == 25 * 2 * 3              # queries of both sides, nothing else
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(t, before[n]) for n, t in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_encoder_answers_in_evaluation_whatever_the_mode():
    """Its dropout would make other pictures of one picture; batch norms are held still here."""
    model = Service()
    tuned = burnish.tune(model, "blackvip(map_side=1, encoder='encoder', encoder_width=12) + "
                                "spsa_gc", head=False)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(**service_batch())
    assert torch.equal(*model.pictures[-2:]) and model.encoder[2].training
    assert tuned.model.training


def test_batch_norms_take_the_batch_in_every_evaluation_and_the_running_mean_after():
    model = Service()
    tuned = burnish.tune(model, "blackvip(map_side=1, encoder='encoder', encoder_width=12) + "
                                "spsa_gc(queries=1)", head=False)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.train()
    tuned.optimizer(lr=0.01)
    tuned.step(service_batch())
    asked = model.asked
    assert [int(n.num_batches_tracked) for n in norms] == [asked] * 4
    assert model.training and all(n.training for n in norms)
    model.eval()
    held = [n.running_mean.clone() for n in norms]
    tuned.step(service_batch())                           # in evaluation mode nothing moves
    assert all(torch.equal(n.running_mean, h) for n, h in zip(norms, held, strict=True))
    with torch.no_grad():
        model(**service_batch())
        one = {k: v[:1] for k, v in service_batch().items()}
        model(**one)
    torch.testing.assert_close(model.pictures[-1], model.pictures[-2][:1])


def test_the_model_is_given_pixels_that_there_are_and_nothing_else():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "blackvip(map_side=2, scale=100.0, pixel_mean=(0.5, 0.5, 0.5), "
                              "pixel_std=(0.5, 0.5, 0.5))", head=False)
    given = []
    conv = net.vit.embeddings.patch_embeddings.projection
    hook = conv.register_forward_pre_hook(lambda m, a: given.append(a[0]))
    net(**batch)
    plain, x = (t.detach() for t in given)                # the look, and the model's own run
    hook.remove()
    assert torch.equal(plain, batch["pixel_values"])
    assert float(x.min()) == -1.0 and float(x.max()) == 1.0
    with tuned.disabled():
        base = net(**batch).logits
    assert torch.equal(base, tuned.detach()(**batch).logits)


def test_positional_pictures_are_replaced_too():
    net, batch = tiny("vit")
    burnish.tune(net, "blackvip(map_side=2)", head=False)
    net.eval()
    with torch.no_grad():
        a = net(batch["pixel_values"]).logits
        b = net(pixel_values=batch["pixel_values"]).logits
    assert torch.equal(a, b)


@pytest.mark.parametrize("beside", ["lora(rank=2)", "bitfit", "full", "norms"])
def test_the_look_sees_nothing_of_a_recipe_beside_it(beside):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"{beside} + blackvip(map_side=2)", head=False)
    found = []
    made = next(m for m in net.modules() if type(m).__name__ == "Coordinator")
    made.register_forward_pre_hook(lambda m, a: found.append(a[0].clone()))
    net(**batch)
    for n, p in tuned.named_parameters():
        if ".coordinator." not in n:
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    moved = net(**batch)
    assert torch.equal(found[0], found[1]) and not found[0].requires_grad
    with tuned.disabled():
        assert not torch.allclose(net(**batch).logits, moved.logits, atol=1e-2)


def test_what_an_encoder_may_answer():
    from types import SimpleNamespace

    from burnish.blocks.state.coordinator import features

    x = torch.randn(2, 5, 4)
    assert torch.equal(features(x, 4, True), x[:, 0])
    assert torch.equal(features(x, 4, False), x.mean(1))
    assert torch.equal(features((x,), 4, True), x[:, 0])
    assert torch.equal(features(SimpleNamespace(last_hidden_state=x), 4, True), x[:, 0])
    assert torch.equal(features(x[:, 0], 4, False), x[:, 0])
    maps = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(features(maps, 4, True), maps.mean((2, 3)))
    torch.testing.assert_close(features(maps.movedim(1, -1), 4, True), maps.mean((2, 3)))
    with pytest.raises(burnish.RecipeError, match="no axis of 9"):
        features(x, 9, True)


def test_its_settings_are_the_paper_s():
    made = parse("blackvip")[0]
    assert (made.scale, made.map_side, made.encoder) == (1.0, 7, None)


@pytest.mark.parametrize("model, recipe, says", [
    ("cnn", "blackvip", "no blocks behind a patch convolution.*give it an encoder"),
    ("vit", "blackvip(map_side=1)", "z alone has 32 numbers, and the map 32: take a larger"),
    ("vit", "blackvip(encoder='nowhere')", "no module of that path"),
    ("cnn", "blackvip(encoder='features')", "cannot be told; say it, encoder_width="),
    ("vit", "blackvip(scale=0.0)", "scale is positive and map_side at least 1"),
    ("vit", "blackvip(map_side=0)", "scale is positive and map_side at least 1"),
    ("vit", "blackvip(pixel_std=(1.0,))", "one number a channel"),
    ("vit", "blackvip(pixel_std=(1.0, 0.0, 1.0))", "one number a channel, the latter positive"),
    ("vit", "blackvip(pixel_mean=(), pixel_std=())", "one number a channel"),
    ("vit", "blackvip(encoder_width=3)", "encoder_width says how wide `encoder` answers"),
    ("vit", "blackvip(targets='q')", "takes no targets"),
])
def test_what_cannot_act_is_refused(model, recipe, says):
    with pytest.raises(burnish.RecipeError, match=says):
        tune(tiny(model)[0], recipe)


def test_other_channels_and_no_picture_are_refused():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "blackvip(map_side=2, pixel_mean=(0.5,), pixel_std=(0.5,))",
                         head=False)
    with pytest.raises(burnish.RecipeError, match="pictures of 1 channels, and is given"):
        tuned.loss(batch)
    net, batch = tiny("mlp")
    tuned = burnish.tune(net, "blackvip(map_side=2, encoder='layers', encoder_width=32)",
                         head=False)
    with pytest.raises(burnish.RecipeError, match="the model was given none"):
        tuned.loss(batch)
