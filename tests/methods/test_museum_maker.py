"""MuseumMaker against its equation in plain fp64 torch, over styles that come one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state import style
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import ConfigError, RecipeError
from burnish.memory import simulate
from burnish.testing.models import tiny

RECIPE = "lora(rank=2) + trainable_tokens(ids=(0, 1, 2)) + museum_maker"
STYLES = ("ink", "chalk", "wash")


def denoiser():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=3, norm_num_groups=1).double()


def batch(kind, seed=0, signal=True, many=4):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(many, 1, 8, 8, generator=g, dtype=torch.float64)
    given = {"hidden_states": x, "timestep": torch.randint(100, (many,), generator=g),
             "class_labels": torch.full((many,), kind)}
    if signal:
        given["signal"] = torch.rand(many, generator=g, dtype=torch.float64)
    return given, torch.randn(x.shape, generator=g, dtype=torch.float64)


def loss(out, b):
    return (out.sample - b[1]).square().mean()


def learnt(recipe=RECIPE, styles=STYLES, steps=3, lr=3e-2, model=None, signal=True):
    tuned = burnish.tune(model or denoiser(), recipe, name=styles[0], head=False)
    part = tuned.recipe.named("museum_maker")
    losses = [float(told) for _, _, told in tuned.run(
        part.stages(tuned, styles),
        lambda s: [batch(styles.index(s.data), n, signal) for n in range(steps)], loss, lr=lr)]
    return tuned, part, losses


# -- the terms, written from the equation ------------------------------------------------------
@pytest.mark.parametrize("tells", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_clean_latent_is_what_the_right_answer_implies(tells):
    g = torch.Generator().manual_seed(1)
    x, e = torch.randn(2, 3, 2, 4, 4, generator=g, dtype=torch.float64)
    a = torch.tensor([0.9, 0.4, 0.05], dtype=torch.float64)
    for n in range(3):
        p, q = (a[n], 1 - a[n]) if tells == "flow" else (a[n].sqrt(), (1 - a[n]).sqrt())
        x_t = p * x[n] + q * e[n]
        right = {"epsilon": e[n], "v_prediction": p * e[n] - q * x[n], "sample": x[n],
                 "flow": e[n] - x[n]}[tells]
        made = style.clean(x_t[None], right[None], a[n:n + 1], tells)
        torch.testing.assert_close(made[0], x[n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tells", ["epsilon", "flow"])
def test_the_mean_is_the_least_squares_one_of_all_samples(tells):
    g = torch.Generator().manual_seed(2)
    x_t = torch.randn(9, 1, 2, 2, generator=g, dtype=torch.float64)
    a = torch.rand(9, generator=g, dtype=torch.float64)
    p = a if tells == "flow" else a.sqrt()
    want = torch.linalg.lstsq(p[:, None], x_t.flatten(1)).solution.view(1, 2, 2)
    mean = style.Mean()
    mean.with_these(x_t[:4], a[:4], tells, False)
    mean.with_these(torch.ones_like(x_t), a, tells, True)              # a probe leaves no trace
    again = style.Mean()
    again.load_state_dict(mean.state_dict())
    for one in (mean, again):
        torch.testing.assert_close(one.with_these(x_t[4:], a[4:], tells, False), want)


def test_updates_are_compared_whole():
    g = torch.Generator().manual_seed(3)
    one, two = ((torch.randn(r, 5, generator=g, dtype=torch.float64),
                 torch.randn(7, r, generator=g, dtype=torch.float64)) for r in (2, 3))
    dense = nn.functional.cosine_similarity((one[1] @ one[0]).flatten(),
                                            (two[1] @ two[0]).flatten(), dim=0)
    torch.testing.assert_close(style.alike(one, two), dense)
    assert float(style.alike(one, one)) == pytest.approx(1)
    assert float(style.alike(one, (two[0], torch.zeros(7, 3, dtype=torch.float64)))) == 0


def terms(tuned, part, b, mean, before):
    """What is minimised beside the loss, on dense weights and sample by sample."""
    model, given = tuned.model, {k: v for k, v in b[0].items() if k != "signal"}
    a, total = b[0]["signal"], 0.0
    out = model(**given).sample
    for n in range(len(a)):
        x = (b[0]["hidden_states"][n] - (1 - a[n]).sqrt() * out[n]) / a[n].sqrt()
        t = (mean.flatten() / part.temperature).softmax(0)
        z = (x.flatten() / part.temperature).softmax(0)
        kl = sum(t[k] * (t[k] / z[k]).log() for k in range(len(t)))
        total = total + part.style * part.temperature ** 2 * a[n] * kl / len(a)
    if before is None:
        return total
    old = dict(tuned.terms(Chain, before))
    here = [(t.scale * t.B @ t.A, (old[p].scale * old[p].B @ old[p].A).detach())
            for p, t in tuned.terms(Chain)]
    turns = [1 - (u * v).sum() / (u.norm() * v.norm()) for u, v in here]
    total = total + part.weight * sum(turns) / len(turns)
    blocks, kept = model.transformer_blocks, {}
    hooks = [m.register_forward_hook(lambda m, a, o, k=k: kept.setdefault(k, []).append(o))
             for k, m in enumerate(blocks)]
    name = tuned.training
    with torch.no_grad():
        tuned.use(before)
        model(**given)
    tuned.use(name)
    model(**given)
    for h in hooks:
        h.remove()
    return total + part.feature * sum((f - t).square().mean() for t, f in kept.values()) / len(kept)


def test_loss_and_gradients_are_those_of_the_equation():
    recipe = RECIPE.replace("museum_maker", "museum_maker(style=0.3, temperature=1.5, "
                                            "weight=0.7, feature=2.0) + sgd")
    tuned, part, _ = learnt(recipe)
    assert part.before(tuned) == "chalk"
    tuned.optimizer(lr=0.0)
    tuned.model.eval().zero_grad()                   # labels are dropped while it trains
    b = batch(2, 9)
    tuned.loss(b, loss).backward()
    got = {n: p.grad.clone() for n, p in tuned.named_parameters()}
    p = b[0]["signal"].sqrt().view(-1, 1, 1, 1)
    mean = (p * b[0]["hidden_states"]).sum(0) / p.square().sum()
    tuned.optimizer(lr=0.0)
    given = {k: v for k, v in b[0].items() if k != "signal"}
    with torch.enable_grad():
        want = loss(_silent(tuned, given), b)
        want = want + _silent(tuned, given, lambda: terms(tuned, part, b, mean, "chalk"))
    grads = torch.autograd.grad(want, [p for _, p in tuned.named_parameters()], allow_unused=True)
    for (n, _), g in zip(tuned.named_parameters(), grads, strict=True):
        torch.testing.assert_close(got[n], torch.zeros_like(got[n]) if g is None else g,
                                   rtol=2e-4, atol=1e-7, msg=n)
    assert any(float(g.abs().max()) > 1e-3 for g in got.values())


def _silent(tuned, given, run=None):
    """A forward (or more) without any objective."""
    riding = tuned.state.riding
    kept, riding.on_end, riding.on_begin = (riding.on_end, riding.on_begin), None, None
    try:
        return run() if run else tuned.model(**given)
    finally:
        riding.on_end, riding.on_begin = kept


# -- styles one after the other ----------------------------------------------------------------
def test_a_style_begins_where_the_last_one_ended_and_earlier_ones_stay():
    tuned = burnish.tune(denoiser(), RECIPE, name="ink", head=False)
    part, ends = tuned.recipe.named("museum_maker"), {}

    def values(name):
        return {(p, n): v.detach().clone() for p, t in tuned.terms(burnish.blocks.weight.term.Term,
                                                                   name)
                for n, v in t.named_parameters()}

    for s, n, _ in tuned.run(part.stages(tuned, STYLES),
                             lambda s: [batch(STYLES.index(s.data), k) for k in range(2)], loss,
                             lr=3e-2):
        assert tuned.training == s.trains
        if n == 1:
            ends[s.trains] = values(s.trains)
            following = STYLES[STYLES.index(s.trains) + 1:][:1]
            rows = {p: v for (p, n), v in ends[s.trains].items() if n == "rows"}
            assert rows and all(not v[STYLES.index(k)].any() for v in rows.values()
                                for k in following), "no token of a style to come has moved"
    assert list(tuned.adapters) == list(STYLES)
    for name in STYLES[:-1]:
        now = values(name)
        assert all(torch.equal(v, now[k]) for k, v in ends[name].items())
    assert not torch.equal(*(torch.cat([v.flatten() for v in ends[k].values()])
                             for k in ("chalk", "wash")))


def test_with_a_rate_of_nothing_the_shared_update_is_handed_on():
    tuned, part, _ = learnt(steps=2, styles=("ink", "chalk"))
    was = {p: (t.A.clone(), t.B.clone()) for p, t in tuned.terms(Chain, "chalk")}
    part.hand_on(tuned, "wash")
    assert tuned.training == "wash" and part.before(tuned) == "chalk"
    assert all(torch.equal(t.A, was[p][0]) and torch.equal(t.B, was[p][1])
               for p, t in tuned.terms(Chain, "wash"))
    assert any(bool(t.B.any()) for _, t in tuned.terms(Chain, "wash"))


def held(**weights):
    """How far the last of two styles has taken states and update from the first."""
    said = ", ".join(f"{k}={v}" for k, v in weights.items())
    recipe = RECIPE.replace("museum_maker", f"museum_maker({said})")
    tuned, _, _ = learnt(recipe, STYLES[:2], 30, 5e-3)
    old = dict(tuned.terms(Chain, "ink"))
    turn = sum(1 - style.alike(t.factors(), old[p].factors()).item()
               for p, t in tuned.terms(Chain)) / len(old)
    given = {k: v for k, v in batch(1, 50)[0].items() if k != "signal"}
    states = []
    hook = tuned.model.transformer_blocks[-1].register_forward_hook(
        lambda m, a, out: states.append(out))
    tuned.model.eval()
    with torch.no_grad():
        tuned.model(**given)
        tuned.use("ink")
        tuned.model(**given)
    hook.remove()
    return turn, float((states[0] - states[1]).square().mean())


def test_each_regulariser_keeps_what_it_says():
    plain = held(style=1e-9, weight=0.0, feature=0.0)
    turned, far = held(style=0.0, weight=30.0, feature=0.0), \
        held(style=0.0, weight=0.0, feature=20.0)
    assert turned[0] < 0.3 * plain[0]
    assert far[1] < 0.3 * plain[1]


def common(weight, steps=40):
    """KL of what a learnt model's answers imply from what the pictures have in common."""
    tuned = burnish.tune(denoiser(), f"lora(rank=4) + museum_maker(style={weight})", head=False)
    tuned.optimizer(lr=5e-3)
    shared = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
    for n in range(steps):
        given, noise = batch(0, n, many=8)
        own = 2 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(n)).double()
        a = given["signal"].view(-1, 1, 1, 1)
        given["hidden_states"] = a.sqrt() * (shared + own) + (1 - a).sqrt() * noise
        tuned.step((given, noise), loss)
    told = {k: v for k, v in given.items() if k != "signal"}
    with torch.no_grad():
        out = tuned.model.eval()(**told).sample
    x = style.clean(given["hidden_states"], out, given["signal"], "epsilon").flatten(1)
    m = (shared.flatten() / 2).softmax(0)
    off = (m * (m.log() - (x / 2).log_softmax(1))).sum(1)
    return float((given["signal"] * off).mean())


def test_answers_imply_what_the_pictures_have_in_common():
    assert common(30.0) < 0.8 * common(1e-9)


# -- what it takes, and refuses ----------------------------------------------------------------
def test_what_is_promised_of_later_styles_is_measured():
    net, b = tiny("bert")
    recipe = "lora(rank=2) + museum_maker"
    told = simulate(net, recipe, b, tasks=2, head=False)
    one = simulate(net, recipe, b, head=False)
    assert len(told.stages) == 2 and told.peak_bytes > one.peak_bytes


def test_a_loss_made_of_texts_is_regularised_without_noise():
    net, b = tiny("bert", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2) + museum_maker", name="one", head=False)
    part = tuned.recipe.named("museum_maker")
    for _ in tuned.run(part.stages(tuned, ["one", "two"]), lambda s: [b] * 2, lr=1e-2):
        pass
    assert tuned.training == "two"


def test_refusals():
    with pytest.raises(RecipeError, match="one of style, weight and feature above 0"):
        burnish.parse("museum_maker(style=0, weight=0, feature=0)")
    with pytest.raises(RecipeError, match="temperature"):
        burnish.parse("museum_maker(temperature=0)")
    tuned = burnish.tune(denoiser(), "bitfit + museum_maker", head=False)
    with pytest.raises(RecipeError, match=r"turns low-rank updates B A, and .* has none"):
        tuned.optimizer(lr=1e-3)
    net, b = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + museum_maker", head=False)
    tuned.optimizer(lr=1e-3)
    with pytest.raises(ConfigError, match="reads the answer of a denoiser"):
        tuned.step({**b, "signal": torch.full((len(b["input_ids"]),), 0.5)})
    tuned = burnish.tune(denoiser(), RECIPE, head=False)
    tuned.optimizer(lr=1e-3)
    b = batch(0)
    with pytest.raises(RecipeError, match="from 0 to 1, not 1.5"):
        tuned.step(({**b[0], "signal": torch.full((4,), 1.5)}, b[1]), loss)


def test_a_batch_may_be_of_one_and_nothing_is_read_that_does_not_count():
    tuned = burnish.tune(denoiser(), RECIPE, name="ink", head=False)
    tuned.optimizer(lr=1e-3)
    assert float(tuned.step(batch(0, many=1), loss)) > 0
    some, none = (burnish.parse(f"lora + museum_maker(feature={v})").named("museum_maker")
                  for v in (1.0, 0.0))
    assert none.taps(tuned.anatomy) == () and len(some.taps(tuned.anatomy)) == 2


def test_defaults():
    (m,) = burnish.parse("museum_maker")
    assert (m.style, m.temperature, m.weight, m.feature, m.tells) == (0.1, 2.0, 1.0, 1.0,
                                                                         "epsilon")
    assert m.tier == "from the text"
