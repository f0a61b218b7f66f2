"""Tent: against torch's own batch norms and optimizers over a stream, and the source comes back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.answers import detached, mapped, with_logits
from burnish.core.errors import CheckError, ConfigError, FormatError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.tent import Tent
from burnish.testing.models import tiny


def classifier(name="cnn", dtype=torch.float64, recipe=None):
    """A model with statistics of its own, in training mode, and batches that are shifted."""
    torch.manual_seed(3)
    model, batch = tiny(name, dtype=dtype, dropout=0.3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
    key = "x" if name == "cnn" else "pixel_values"
    x = batch[key]
    stream = [{key: 1.5 * torch.randn(6, *x.shape[1:], dtype=dtype) + 0.7} for _ in range(3)]
    return (model if recipe is None else burnish.tune(model, recipe, head=False)), stream


def logits(out):
    return out.logits


def reference(model, stream, *, loss, optimizer, updates=1):
    """Batch norms in training mode with nothing remembered, torch's optimizer on the norms."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    params = []
    for m in twin.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.training, m.track_running_stats = True, False
            m.running_mean = m.running_var = None
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
            params += list(m.requires_grad_(True).parameters())
    opt, answers = optimizer(params), []
    for batch in stream:
        for _ in range(updates):
            z = twin(**batch).logits
            opt.zero_grad()
            loss(z).backward()
            opt.step()
        answers.append(z.detach())
    return answers


def entropy(z):
    p = z.softmax(1)
    return -(p * p.log()).sum(1)


def mean_entropy(z):
    return entropy(z).mean()


def label_loss(z):
    return -z.softmax(1).max(1).values.log().mean()


ADAM = lambda rate: lambda p: torch.optim.Adam(p, lr=rate)                          # noqa: E731


@pytest.mark.parametrize("settings, loss, optimizer", [
    ({}, mean_entropy, ADAM(1e-3)),
    ({"updates": 3, "step_rate": 0.02}, mean_entropy, ADAM(0.02)),
    ({"descent": "sgd", "step_rate": 0.05, "updates": 2}, mean_entropy,
     lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    ({"descent": "sgd", "step_rate": 0.05, "momentum": 0.0}, mean_entropy,
     lambda p: torch.optim.SGD(p, lr=0.05)),
    ({"guess": True, "step_rate": 0.02}, label_loss, ADAM(0.02)),
])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_stream_is_answered_as_torch_s_own_steps_do(name, settings, loss, optimizer):
    model, stream = classifier(name)
    want = reference(model, stream, loss=loss, optimizer=optimizer,
                     updates=settings.get("updates", 1))
    with Tent(**settings).lifecycle(model) as adapted:
        got = [adapted(b).logits for b in stream]
        with torch.no_grad():                            # as a caller that scores does
            adapted.reset()
            again = [adapted(b).logits for b in stream]
    for g, w, a in zip(got, want, again, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)
        assert torch.equal(g, a) and not g.requires_grad


@pytest.mark.parametrize("name, recipe", [("cnn", None), ("vit", None), ("vit", "lora(rank=2)"),
                                          ("vit", "norms + vpt(length=2)"), ("cnn", "full")])
def test_only_norms_move_and_the_source_comes_back_bit_for_bit(name, recipe):
    tuned, stream = classifier(name, torch.float32, recipe)
    model = tuned if recipe is None else tuned.model
    if recipe:
        tuned.step({**stream[0], "labels": torch.zeros(6, dtype=torch.long)})
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None

    def everything():
        return {**{n: t.clone() for n, t in model.state_dict().items()},
                **{f"grad {n}": p.grad.clone() for n, p in model.named_parameters()
                   if p.grad is not None}, "random": torch.get_rng_state()}

    before = everything()
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    norms = {f"{n}.{leaf}" for n, m in model.named_modules()
             if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)
             for leaf, _ in m.named_parameters(recurse=False)}
    with Tent(step_rate=0.1).lifecycle(tuned) as adapted:
        first = adapted(stream[0])
        adapted(stream[1])
        assert flags == [p.requires_grad for p in model.parameters()]
        assert modes == [m.training for m in model.modules()]
        moved = everything()
        assert {k for k in before if not torch.equal(before[k], moved[k])} == norms
        adapted.reset()
        now = everything()
        assert all(torch.equal(before[k], now[k]) for k in before)
        assert torch.equal(adapted(stream[0]).logits, first.logits)
    after = everything()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(burnish.BurnishError, match="inside a with block"):
        adapted(stream[0])


def test_entropy_on_a_fixed_batch_falls():
    for name in ("cnn", "vit"):
        model, stream = classifier(name)
        with Tent(step_rate=0.01).lifecycle(model) as adapted:
            seen = [float(mean_entropy(adapted(stream[0]).logits)) for _ in range(12)]
        assert all(b < a for a, b in zip(seen, seen[1:], strict=False))


def test_what_trains_is_counted_on_published_shapes():
    from transformers import ResNetConfig, ResNetForImageClassification

    from burnish.methods.lifecycle._adapted import affines

    with torch.device("meta"):
        resnet = ResNetForImageClassification(ResNetConfig())
    assert sum(p.numel() for p in affines(Tent(), resnet).values()) == 53_120
    vit, _ = tiny("vit", meta=True, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                  intermediate_size=3072, image_size=224, patch_size=16)
    assert sum(p.numel() for p in affines(Tent(), vit).values()) == 38_400
    some = affines(Tent(targets="layernorm_after"), vit)
    assert len(some) == 24 and all("layernorm_after" in n for n in some)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_an_episode_knows_nothing_of_the_one_before(name):
    model, stream = classifier(name)
    one = [{k: v[:1] for k, v in b.items()} for b in stream]         # a picture at a time
    with Tent(episodic=True, updates=3, step_rate=0.05).lifecycle(model) as adapted:
        forth = [adapted(b).logits for b in one]
        back = [adapted(b).logits for b in one[::-1]][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forth, back, strict=True))
    want = [reference(model, [b], loss=mean_entropy, optimizer=ADAM(0.05), updates=3)[0]
            for b in one]
    for g, w in zip(forth, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)


def test_the_answer_after_the_step_is_of_another_forward():
    model, stream = classifier()
    with Tent(again=True, step_rate=0.05).lifecycle(model) as adapted:
        after = adapted(stream[0]).logits
    with Tent(step_rate=0.05).lifecycle(model) as adapted:
        before = adapted(stream[0]).logits
        # the same batch again is answered where the first step went
        torch.testing.assert_close(adapted(stream[0]).logits, after, rtol=1e-12, atol=1e-12)
    assert mean_entropy(after) < mean_entropy(before)


def test_doubtful_samples_are_left_out():
    model, stream = classifier()
    with Tent().lifecycle(model) as adapted:
        plain = adapted(stream[0]).logits
    shares = (entropy(plain) / math.log(3)).sort().values
    between = float(shares[2] + shares[3]) / 2

    def some(z):
        return entropy(z)[entropy(z).detach() <= between * math.log(3)].mean()

    want = reference(model, [stream[0]] * 2, loss=some, optimizer=ADAM(0.02))
    with Tent(doubt=between, step_rate=0.02).lifecycle(model) as adapted:
        for w in want:
            torch.testing.assert_close(adapted(stream[0]).logits, w, rtol=1e-8, atol=1e-9)
        assert adapted.steps == 2
    with Tent(doubt=float(shares[0]) / 2).lifecycle(model) as adapted:
        adapted(stream[0])
        assert torch.equal(adapted(stream[0]).logits, plain) and adapted.steps == 0


def test_a_stream_goes_on_from_where_it_stood():
    model, stream = classifier()
    method = Tent(step_rate=0.05)
    with method.lifecycle(model) as adapted:
        whole = [adapted(b).logits for b in stream]
    with method.lifecycle(model) as adapted:
        adapted(stream[0])
        state = adapted.state()
        adapted(stream[2])
    with method.lifecycle(model) as adapted:
        adapted.restore(state)
        assert all(torch.equal(adapted(b).logits, w)
                   for b, w in zip(stream[1:], whole[1:], strict=True))
        with pytest.raises(FormatError, match="another stream: "):
            adapted.restore({k: v for k, v in state.items() if k != "value.features.1.weight"})
    with Tent(descent="sgd").lifecycle(model) as adapted, pytest.raises(FormatError):
        adapted.restore(state)


def test_a_loss_that_is_not_finite_moves_nothing():
    model, stream = classifier()
    before = copy.deepcopy(model.state_dict())
    broken = {"x": stream[0]["x"].clone()}
    broken["x"][0, 0, 0, 0] = float("nan")
    with Tent(step_rate=0.1).lifecycle(model) as adapted:
        with pytest.raises(CheckError, match="not finite"):
            adapted(broken)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        adapted(stream[0])
    assert all(p.requires_grad for p in model.parameters()) and model.training


def test_small_steps_add_up_in_half_precision():
    model, stream = classifier("vit", torch.float32)
    model.to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    batch = {k: v.bfloat16() for k, v in stream[0].items()}
    with Tent(step_rate=1e-4).lifecycle(model) as adapted:
        for _ in range(40):
            adapted(batch)
        far = {n: (p - before[n]).abs().max() for n, p in model.named_parameters()}
        assert far["vit.layernorm.weight"] > 1e-3        # a step alone is rounded away
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_outputs_of_every_form_are_made_anew():
    from collections import namedtuple
    from types import SimpleNamespace

    z, y = torch.zeros(2, 3, requires_grad=True) * 1, torch.ones(2)
    Pair = namedtuple("Pair", "logits rest")
    for out in (z, (z, y), [z, y], {"logits": z, "y": y}, Pair(z, y),
                SimpleNamespace(logits=z, y=y)):
        got = with_logits(detached(out), None, None)
        assert type(got) is type(out)
    inner = {"a": [z, (y, None)], "b": 3}
    got = mapped(inner, lambda t: t + 1)
    assert torch.equal(got["a"][1][0], y + 1) and got["b"] == 3 and inner["a"][1][0] is y
    kept = SimpleNamespace(logits=z, y=y)
    assert with_logits(kept, z, y).logits is y and kept.logits is z


def test_its_settings():
    made = parse("tent")[0]
    assert (made.descent, made.step_rate, made.updates, made.episodic, made.guess, made.doubt) == \
        ("adam", 1e-3, 1, False, False, 1.0)
    assert Tent(descent="sgd").momentum == 0.9


def test_what_cannot_act_is_refused():
    for settings, said in (({"updates": 0}, "at least 1"), ({"step_rate": 0.0}, "positive"),
                           ({"momentum": 1.0, "descent": "sgd"}, "momentum"),
                           ({"momentum": 0.5}, "adam has none"),
                           ({"descent": "lion"}, "adam or sgd"),
                           ({"doubt": 0.0}, "share"), ({"doubt": 1.5}, "share"),
                           ({"episodic": True}, "has learnt nothing")):
        with pytest.raises(ConfigError, match=said):
            Tent(**settings)
    Tent(episodic=True, again=True)
    with pytest.raises(ConfigError, match="this model has none; lame needs"):
        Tent().lifecycle(tiny("mlp")[0])
    with pytest.raises(burnish.BurnishError, match="name nothing|has none there"):
        Tent(targets="classifier").lifecycle(tiny("cnn")[0])
    model, batch = tiny("llama")
    with Tent().lifecycle(model) as adapted, pytest.raises(ConfigError, match="one row of logits"):
        adapted({"input_ids": batch["input_ids"]})

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.norm(x)
            return self.head(x)

    with Tent().lifecycle(Cut()) as adapted, \
            pytest.raises(ConfigError, match="no gradient reaches"):
        adapted(torch.randn(4, 4))
    cnn, _ = tiny("cnn")
    x = torch.randn(1, 3, 2, 2)
    with Tent().lifecycle(cnn) as adapted, pytest.raises(ConfigError, match="one value a channel"):
        adapted({"x": x})                                # 1 x 1 after the pool
    assert not any(m._forward_pre_hooks for m in cnn.modules())
