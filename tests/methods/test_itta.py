"""ITTA: a network written out, with its copies in mixed styles, its two steps and its maps."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F

from burnish.blocks.state.consistency import disagreement, elementwise, mixed
from burnish.core.errors import CheckError, ConfigError, DataError, FormatError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.itta import Itta
from burnish.testing.models import tiny

D64 = torch.float64


def network(dtype=D64, stages=3):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    net = ResNetForImageClassification(ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 6, 8][:stages], depths=[1] * stages,
        layer_type="basic", num_labels=3)).to(dtype)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    for stage in net.resnet.encoder.stages:
        stage.layers[-1].activation = torch.nn.Softplus()       # away from the maps' kink at zero
    g = torch.Generator().manual_seed(1)
    rows = [{"pixel_values": torch.randn(4, 3, 16, 16, generator=g, dtype=dtype),
             "labels": torch.randint(3, (4,), generator=g)} for _ in range(3)]
    stream = [torch.randn(5, 3, 16, 16, generator=g, dtype=dtype) + 0.5 for _ in range(3)]
    return net, rows, stream


def style(x, rng, a):
    lam = [rng.betavariate(a, a) for _ in range(len(x))]
    perm = rng.sample(range(len(x)), len(x))
    out = []
    mean = x.detach().mean((2, 3), keepdim=True)
    std = (x.detach().var((2, 3), keepdim=True) + 1e-6).sqrt()
    for i, j in enumerate(perm):
        out.append((x[i] - mean[i]) / std[i] * (lam[i] * std[i] + (1 - lam[i]) * std[j])
                   + lam[i] * mean[i] + (1 - lam[i]) * mean[j])
    return torch.stack(out)


def layers(x, w, b):
    for i in range(len(w) - 1):
        x = torch.relu(w[i] * x + b[i])
    return w[-1] * x + b[-1]


def written(net, x, rng=None, a=0.1, maps=None):
    """(z, z' or None) stage by stage."""
    def mapped(i, v):
        return v if maps is None else layers(v, *maps[i])

    h = net.resnet.embedder(x)
    stages = net.resnet.encoder.stages
    h = stages[0](h)
    first = rng is not None and rng.random() > 0.5
    c = (style(h, rng, a) if first else h) if rng is not None else None
    h, c = mapped(0, h), None if c is None else mapped(0, c)
    for i, s in enumerate(stages[1:], 1):
        h, c = s(h), None if c is None else s(c)
        if c is not None and i == 1 and not first:
            c = style(c, rng, a)
        h, c = mapped(i, h), None if c is None else mapped(i, c)
    return h.mean((2, 3)), None if c is None else c.mean((2, 3))


def taught(net, rows, lr, seed=0, a=0.1):
    """The source's two steps a batch, by hand: (moved copy, w, b, firsts)."""
    net = copy.deepcopy(net).eval()
    head = net.classifier[-1]
    w = torch.ones(10, head.in_features, dtype=D64, requires_grad=True)
    b = torch.zeros(10, head.in_features, dtype=D64, requires_grad=True)
    adam, other = torch.optim.Adam(net.parameters(), lr), torch.optim.Adam([w, b], lr * 0.1)
    rng = random.Random(f"{seed} source")

    def losses(batch):
        z, c = written(net, batch["pixel_values"], rng, a)
        return (F.cross_entropy(head(z), batch["labels"])
                + F.cross_entropy(head(c), batch["labels"])), layers(c - z, w, b).square().mean()

    for batch in rows:
        main, aux = losses(batch)
        adam.zero_grad()
        (main + aux).backward()
        adam.step()
        main, aux = losses(batch)
        body = list(net.resnet.parameters())
        ga = torch.cat([g.flatten() for g in torch.autograd.grad(aux, body, create_graph=True)])
        gm = torch.cat([g.flatten() for g in torch.autograd.grad(main, body)])
        gap = ((ga - ga.mean()) / ga.std() - (gm - gm.mean()) / gm.std()).square().mean()
        w.grad, b.grad = torch.autograd.grad(0.1 * gap, [w, b])
        other.step()
    return net, w.detach(), b.detach()


@pytest.mark.parametrize("channels", [False, True])
def test_the_source_is_learnt_and_a_stream_answered_as_written_out(channels):
    net, rows, stream = network()
    net.train()
    before = copy.deepcopy(net.state_dict())
    method = Itta(step_rate=0.02, weight=0.5, mix=0.4, channels=channels, seed=3)
    adapted = method.lifecycle(net, rows)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    twin, w, b = taught(net, rows, 0.02, 3, 0.4)
    part = adapted.parts[0]
    torch.testing.assert_close(part.read["w"], w, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(part.read["b"], b, rtol=1e-6, atol=1e-8)
    assert float((w - 1).abs().max()) > 1e-3
    for n, p in twin.named_parameters():
        torch.testing.assert_close(part.values[n], p.detach(), rtol=1e-6, atol=1e-8)
    twin.requires_grad_(False)
    sides = [(4, 4, 4), (6, 2, 2), (8, 1, 1)]
    sides = [(c, 1, 1) for c, *_ in sides] if channels else sides
    maps = [(torch.ones(5, *s, dtype=D64, requires_grad=True),
             torch.zeros(5, *s, dtype=D64, requires_grad=True)) for s in sides]
    assert [tuple(p.shape) for p in adapted.params.values()] == [
        (5, *s) for s in sides for _ in range(2)]
    adam = torch.optim.Adam([t for m in maps for t in m], 0.002)
    with adapted:
        for n, x in enumerate(stream):
            z, c = written(twin, x, random.Random(f"3 test {n}"), 0.4, maps)
            adam.zero_grad()
            (0.5 * layers(c - z, w, b).square().mean()).backward()
            adam.step()
            with torch.no_grad():
                want = twin.classifier[-1](written(twin, x, maps=maps)[0])
                plain = twin.classifier[-1](written(twin, x)[0])
            got = adapted({"pixel_values": x}).logits
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
            assert float((got - plain).abs().max()) > 1e-5 and not got.requires_grad
            assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        for n, p in twin.named_parameters():          # only the maps move
            torch.testing.assert_close(part.values[n], p, rtol=1e-6, atol=1e-8)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_before_the_first_step_the_answer_is_the_trained_models():
    net, rows, stream = network()
    adapted = Itta(step_rate=0.02).lifecycle(net, rows)
    adapted.updates = 0
    twin, _, _ = taught(net, rows, 0.02)
    with torch.no_grad(), adapted:
        want = twin(stream[0]).logits
        torch.testing.assert_close(adapted({"pixel_values": stream[0]}).logits, want, rtol=1e-7,
                                   atol=1e-9)
        assert not torch.allclose(want, net.eval()(stream[0]).logits, atol=1e-3)


def test_the_hypergradient_is_that_of_finite_differences():
    torch.manual_seed(2)
    body = [torch.randn(4, 3, dtype=D64, requires_grad=True),
            torch.randn(3, 4, dtype=D64, requires_grad=True)]
    x, other = torch.randn(6, 3, dtype=D64), torch.randn(6, 3, dtype=D64)
    w = (1 + 0.1 * torch.randn(10, 3, dtype=D64)).requires_grad_()
    b = (0.1 * torch.rand(10, 3, dtype=D64)).requires_grad_()

    def penalty():
        def f(v):
            return torch.tanh(v @ body[0].t()) @ body[1].t()

        aux = elementwise(f(other) - f(x), w, b).square().mean()
        main = F.cross_entropy(f(x), torch.arange(6) % 3)
        return disagreement(aux, main, body)

    exact = torch.autograd.grad(penalty(), [w, b])
    for t, g in zip((w, b), exact, strict=True):
        assert float(g.abs().max()) > 1e-3
        for i in range(t.numel()):
            with torch.no_grad():
                t.view(-1)[i] += 1e-6
                up = t.clone()
            high = float(penalty().detach())
            with torch.no_grad():
                t.view(-1)[i] -= 2e-6
            low = float(penalty().detach())
            with torch.no_grad():
                t.copy_(up)
                t.view(-1)[i] -= 1e-6
            assert (high - low) / 2e-6 == pytest.approx(float(g.view(-1)[i]), rel=1e-4, abs=1e-7)


def test_maps_and_styles():
    x = torch.rand(3, 4, 5, 5, dtype=D64)
    ones, zeros = torch.ones(5, 4, 5, 5, dtype=D64), torch.zeros(5, 4, 5, 5, dtype=D64)
    assert torch.equal(elementwise(x, ones, zeros), x)
    assert torch.equal(elementwise(x - 0.5, ones, zeros), (x - 0.5).clamp_min(0))
    own = mixed(x, torch.ones(3), [1, 2, 0])
    torch.testing.assert_close(own, x, rtol=1e-12, atol=1e-12)
    foreign = mixed(x, torch.zeros(3), [1, 2, 0])
    torch.testing.assert_close(foreign.mean((2, 3)), x[[1, 2, 0]].mean((2, 3)))
    sizes = 64 * 56**2 + 128 * 28**2 + 256 * 14**2 + 512 * 7**2
    assert 2 * 5 * sizes == 3_763_200 and "3,763,200" in Itta.__doc__


def test_a_stream_goes_on_from_its_state():
    net, rows, stream = network()
    it = Itta(step_rate=0.02, weight=1.0)
    with it.lifecycle(net, rows) as adapted:
        adapted({"pixel_values": stream[0]})
        state = adapted.state()
        want = adapted({"pixel_values": stream[1]}).logits
        adapted.reset()
        again = adapted({"pixel_values": stream[0]}).logits
    with it.lifecycle(net, rows[:1]) as other:
        other.restore(state)
        assert torch.equal(other({"pixel_values": stream[1]}).logits, want)
        with pytest.raises(FormatError, match="another stream"):
            other.restore({})
    with it.lifecycle(net, rows) as adapted:
        assert torch.equal(adapted({"pixel_values": stream[0]}).logits, again)


def test_its_settings_and_refusals():
    made = parse("itta")[0]
    assert (made.step_rate, made.weight, made.mix, made.channels, made.seed) == \
        (5e-5, 1e-6, 0.1, False, 0) and made.learns and made.adapts
    for settings, match in (({"step_rate": 0.0}, "positive"), ({"weight": 0.0}, "positive"),
                            ({"mix": 0.0}, "positive"), ({"targets": "q"}, "maps of its own")):
        with pytest.raises(ConfigError, match=match):
            Itta(**settings)
    net, rows, stream = network()
    before = copy.deepcopy(net.state_dict())
    for model, given, error, match in (
            (net, [], DataError, "no batch"), (net, [stream[0]], DataError, "with labels"),
            (net, [{k: v[:1] for k, v in rows[0].items()}], ConfigError, "two at once"),
            (net, [rows[0], rows[1] | {"pixel_values": rows[1]["pixel_values"] * math.inf}],
             CheckError, "not finite"),
            (net, [rows[0] | {"labels": rows[0]["labels"] + 3}], DataError, "3 classes"),
            (network(stages=1)[0], rows, ConfigError, "no two stages"),
            (tiny("cnn")[0], rows, ConfigError, "no two stages"),
            (tiny("vit", dtype=D64)[0], rows, ConfigError, "no map of channels"),
            (tiny("llama")[0], rows, ConfigError, "no linear head")):
        with pytest.raises(error, match=match):
            Itta(step_rate=0.02).lifecycle(model, given)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with Itta().lifecycle(net, rows) as adapted:
        with pytest.raises(ConfigError, match="as large as the source's, or channels=True"):
            adapted({"pixel_values": torch.randn(4, 3, 32, 32, dtype=D64)})
        with pytest.raises(ConfigError, match="two at once"):
            adapted({"pixel_values": stream[0][:1]})
    with Itta(channels=True).lifecycle(net, rows) as adapted:
        adapted({"pixel_values": torch.randn(4, 3, 32, 32, dtype=D64)})


def test_stages_that_say_what_is_negative_are_refused():
    net, rows, _ = network()
    for stage in net.resnet.encoder.stages:
        stage.layers[-1].activation = torch.nn.Identity()
    with pytest.raises(ConfigError, match="what is not negative"):
        Itta().lifecycle(net, rows)
