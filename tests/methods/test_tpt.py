"""Test-time prompt tuning: against torch's own AdamW over all views, and everything comes back."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.choose.views import agreed, alike, entropies, sure
from burnish.core.recipe import parse
from burnish.methods.lifecycle.tpt import Tpt
from burnish.testing.models import tiny

N = 20


def joined(model="vit", recipe="vpt(length=2, dropout=0.3)", dtype=torch.float64):
    net, batch = tiny(model, dtype=dtype, dropout=0.3)
    tuned = burnish.tune(net, recipe, head=False)
    for p in tuned.parameters():
        p.data = p.data.to(dtype)
    g = torch.Generator().manual_seed(4)
    x = batch["pixel_values"][:1]
    views = x + 0.5 * torch.randn(N, *x.shape[1:], generator=g, dtype=x.dtype) * (
        torch.arange(N) > 0).view(-1, 1, 1, 1)
    if model == "clip":
        return tuned, {"pixel_values": views, "input_ids": batch["input_ids"]}
    return tuned, {"pixel_values": views}


def logits(out):
    return out.logits if hasattr(out, "logits") else out.logits_per_image


def entropy(p):
    return -(p * p.log()).sum(-1)


def reference(tuned, views, share, updates, rate, decay=0.01, made=0, similar=1.0):
    """All views in one graph, the choice detached, torch's optimizer on a copy of the model."""
    twin = copy.deepcopy(tuned).model.eval()
    params = [p for p in twin.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=rate, weight_decay=decay)
    with torch.no_grad():
        out = twin(**views)
        order = entropy(logits(out).softmax(-1)).argsort()[:max(1, int(share * N))].tolist()
    if made:
        f = F.normalize(out.image_embeds, dim=-1)
        near = sorted(range(N - made, N), key=lambda i: -float(f[i] @ f[0]))
        near = near[:max(1, int(similar * made))]
        order = [i for i in order if i < N - made or i in near] or [0]
    seen = []
    for _ in range(updates):
        p = logits(twin(**views)).softmax(-1)[order].mean(0)
        loss = entropy(p)
        seen.append(float(loss.detach()))
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        answer = logits(twin(**{**views, "pixel_values": views["pixel_values"][:1]}))
        seen.append(float(entropy(logits(twin(**views)).softmax(-1)[order].mean(0))))
    return answer, seen


@pytest.mark.parametrize("model", ["vit", "clip"])
@pytest.mark.parametrize("settings", [
    {"confident": 0.1, "updates": 1, "step_rate": 5e-3}, {"confident": 0.45, "updates": 3,
     "step_rate": 1e-2, "weight_decay": 0.2}])
def test_it_answers_as_torch_s_own_steps_on_all_views_do(model, settings):
    tuned, views = joined(model)
    got = logits(Tpt(**settings).lifecycle(tuned, views))
    want, seen = reference(tuned, views, settings["confident"], settings["updates"],
                           settings["step_rate"], settings.get("weight_decay", 0.01))
    assert got.shape == want.shape and len(got) == 1
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    assert seen[-1] < seen[0]                            # the views agree more than before
    tuned.model.eval()
    with torch.no_grad():
        plain = logits(tuned.model(**{**views, "pixel_values": views["pixel_values"][:1]}))
    assert float((plain - got).abs().max()) > 1e-4       # and the steps did something


def test_where_no_view_stays_the_sample_stands_alone():
    """The one sure view was made, and another is the nearest."""
    tuned, views = joined()
    tuned.model.eval()
    with torch.no_grad():
        sharpest = int(entropy(logits(tuned.model(**views)).softmax(-1)).argmin())
    assert sharpest > 0
    near = 1 + sharpest % (N - 1)

    def features(out):
        f = torch.zeros(N, 2, dtype=torch.float64)
        f[:, 1] = 1.0
        f[[0, near]] = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return f

    got = Tpt(confident=0.05, similar=0.05).lifecycle(tuned, views, made=N - 1, features=features)
    own = {"pixel_values": views["pixel_values"][:1]}
    torch.testing.assert_close(logits(got), logits(Tpt(confident=1.0).lifecycle(tuned, own)))


def test_everything_is_itself_again_and_no_sample_reaches_another():
    tuned, views = joined()
    tuned.optimizer(lr=1e-2)
    labels = {"pixel_values": views["pixel_values"][:3], "labels": torch.tensor([0, 1, 2])}
    tuned.step(labels)
    tuned.backward(labels)

    def everything():
        return {**{n: t.clone() for n, t in tuned.model.state_dict().items()},
                **{f"grad {n}": p.grad.clone() for n, p in tuned.named_parameters()},
                **{f"{k} {i}": v.clone() for i, s in enumerate(
                    tuned.current_optimizer.state.values()) for k, v in s.items()},
                "random": torch.get_rng_state()}

    before, mode = everything(), [m.training for m in tuned.model.modules()]
    first, second = views, {"pixel_values": views["pixel_values"].flip(0) * 1.5}
    method = Tpt(updates=2)
    a, b = (logits(method.lifecycle(tuned, v)) for v in (first, second))
    b2, a2 = (logits(method.lifecycle(tuned, v)) for v in (second, first))
    assert torch.equal(a, a2) and torch.equal(b, b2) and not torch.equal(a, b)
    after = everything()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert mode == [m.training for m in tuned.model.modules()]
    assert tuned.timeline.step == 1


def test_a_run_that_breaks_off_gives_back_what_it_moved():
    tuned, views = joined()
    before = [p.detach().clone() for p in tuned.parameters()]
    asked = []
    plain = tuned.probe

    def probe(*args, **kw):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(*args, **kw)

    tuned.probe = probe
    with pytest.raises(KeyboardInterrupt):
        Tpt(updates=3).lifecycle(tuned, views)
    assert all(torch.equal(p, b) for p, b in zip(tuned.parameters(), before, strict=True))
    assert all(p.grad is None for p in tuned.parameters())


@pytest.mark.parametrize("made, similar", [(6, 0.5), (12, 0.25), (19, 0.06)])
def test_of_views_that_were_made_only_the_nearest_may_stay(made, similar):
    tuned, views = joined("clip")
    method = Tpt(confident=0.6, similar=similar, updates=2)
    got = logits(method.lifecycle(tuned, views, made=made))
    want, _ = reference(tuned, views, 0.6, 2, 5e-3, made=made, similar=similar)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    if made == 6:                                        # by other features, others are near
        other = logits(method.lifecycle(tuned, views, made=made, features=lambda o: torch.cat(
            [o.image_embeds[:1], -o.image_embeds[1:]])))
        assert not torch.equal(got, other)


def test_only_the_kept_views_have_a_graph():
    tuned, views = joined()
    seen = []
    tuned.model.register_forward_hook(
        lambda m, a, k, o: seen.append((len(k["pixel_values"]), o.logits.requires_grad)),
        with_kwargs=True)
    Tpt(confident=0.25, updates=2).lifecycle(tuned, views)
    assert seen == [(N, False), (5, True), (5, True), (1, False)]


def test_choices():
    z = torch.tensor([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    assert entropies(z).argsort(descending=True).tolist() == [0, 2, 3, 1]
    assert sure(z, 0.5).tolist() == [1, 3] and sure(z, 0.1).tolist() == [1]
    assert sure(torch.zeros(5, 3), 0.6).tolist() == [0, 1, 2]            # of equals the first
    f = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [-1.0, 0.0], [1.0, 1.0]])
    assert alike(f, 0, 0.5).all()
    assert alike(f, 3, 0.4).tolist() == [True, True, True, False, False]
    assert alike(f, 4, 0.5).tolist() == [True, False, True, False, True]
    certain = torch.tensor([[400.0, 0.0, -400.0]], dtype=torch.float16, requires_grad=True)
    agreed(certain).backward()                           # a probability of 0 has no logarithm
    assert agreed(certain) == 0 and certain.grad.isfinite().all()
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(agreed(p.log()), entropy(p.mean(0)))


def test_half_precision_steps_are_made_in_fp32_and_come_back():
    tuned, views = joined(dtype=torch.float32)
    tuned.model.to(torch.bfloat16)
    views = {k: v.bfloat16() for k, v in views.items()}
    before = [p.detach().clone() for p in tuned.parameters()]
    Tpt(step_rate=0.1).lifecycle(tuned, views)
    assert all(torch.equal(p, b) for p, b in zip(tuned.parameters(), before, strict=True))


def test_which_rows_are_views():
    net, batch = tiny("timm_qkv")
    tuned = burnish.tune(net, "vpt(length=2)", head=False)
    x = torch.randn(6, 3, 16, 16)
    one = Tpt().lifecycle(tuned, {"x": x}).logits
    assert one.shape == (1, 3)
    with pytest.raises(burnish.ConfigError, match="cannot be told: say over="):
        Tpt().lifecycle(tuned, {"x": x, "labels": torch.zeros(6, dtype=torch.long)})
    with pytest.raises(burnish.ConfigError, match="cannot be told"):
        Tpt().lifecycle(tuned, {"x": x}, over=["y"])
    more = Tpt().lifecycle(tuned, {"x": x, "labels": torch.zeros(6, dtype=torch.long)},
                           over=["x", "labels"])
    assert torch.equal(more.logits, one)
    with pytest.raises(burnish.ConfigError, match="cannot be told"):
        Tpt().lifecycle(tuned, {"x": x, "labels": torch.zeros(3, dtype=torch.long)},
                        over=["x", "labels"])


def test_its_settings():
    made = parse("tpt")[0]
    assert (made.confident, made.similar, made.updates, made.step_rate, made.weight_decay) \
        == (0.1, 1.0, 1, 5e-3, 0.01)
    assert sure(torch.randn(64, 5), made.confident).numel() == 6         # a tenth of 64


def test_what_cannot_act_is_refused():
    for settings in ({"confident": 0.0}, {"confident": 1.1}, {"similar": 0.0}, {"similar": 2.0}):
        with pytest.raises(burnish.ConfigError, match="shares above 0"):
            Tpt(**settings)
    for settings in ({"updates": 0}, {"step_rate": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(burnish.ConfigError, match="updates of at least 1"):
            Tpt(**settings)
    tuned, views = joined()
    for made in (-1, N):
        with pytest.raises(burnish.ConfigError, match="the first is the sample itself"):
            Tpt().lifecycle(tuned, views, made=made)
    with pytest.raises(burnish.ConfigError, match="no image_embeds: give features"):
        Tpt().lifecycle(tuned, views, made=2)
    for p in tuned.parameters():
        p.requires_grad_(False)
    with pytest.raises(burnish.ConfigError, match="nothing trains"):
        Tpt().lifecycle(tuned, views)
    with pytest.raises(burnish.ConfigError, match="tpt compares logits"):
        from burnish.methods.objective.distill import logits_of
        logits_of(SimpleNamespace(), "tpt")
