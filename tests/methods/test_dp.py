"""DP-SGD against its equation in plain fp64 torch, its accountant against published figures."""

from __future__ import annotations

import copy
import importlib.util
import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update import accountant
from burnish.blocks.update.accountant import epsilon_of, sigma_for
from burnish.blocks.update.private import Clipped, hide, norm
from burnish.core.anatomy import Anatomy
from burnish.core.errors import BurnishError, ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.core.sampling import Sampling
from burnish.memory import measure, simulate
from burnish.methods.controller import _private
from burnish.methods.controller import dp as module
from burnish.testing import conformance, tiny

C, SIGMA, B, LR = 0.7, 0.4, 3.0, 0.1


def mse(out, batch):
    return (out - batch[1]).square().mean()


class Net(nn.Module):
    """Tensors of unlike sizes, a norm, a weight that is used twice."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 3), norm(6)

    def forward(self, x):
        return self.b(self.norm(torch.tanh(self.a(torch.tanh(self.a(x))))))


def start(rows=(5, 4), **kw):
    torch.manual_seed(0)
    net = Net(**kw).double()
    g = torch.Generator().manual_seed(1)
    return net, [(torch.randn(n, 6, generator=g).double(),
                  3 * torch.randn(n, 3, generator=g).double()) for n in rows]


def by_hand(net, params, updates, loss=mse, extra=lambda: 0.0):
    """Plain descent; each update is a list of micro-batches; the noise drawn tensor by tensor."""
    for micro in updates:
        total = [torch.zeros_like(p) for p in params]
        for batch in micro:
            for i in range(len(batch[0])):
                one = tuple(t[i:i + 1] for t in batch)
                grads = torch.autograd.grad(loss(net(one[0]), one) + extra(), params)
                size = sum(float(g.square().sum()) for g in grads) ** 0.5
                for t, g in zip(total, grads, strict=True):
                    t += g * min(1.0, C / size)
        with torch.no_grad():
            for p, t in zip(params, total, strict=True):
                noise = torch.randn(p.shape, dtype=p.dtype) * SIGMA * C
                p -= LR * (t + noise) / B
    return net


def tuned(net, recipe="full", more="", **kw):
    t = burnish.tune(net, f"{recipe} + dp(sigma={SIGMA}, max_norm={C}, batch={B}{more}) + sgd",
                     **{"head": True, **kw})
    return t, t.optimizer(LR)


# -- the equation ----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["step", "accumulated", "empty"])
def test_steps_are_the_equation(mode):
    net, batches = start()
    nothing = tuple(t[:0] for t in batches[0])
    micro = {"step": [[b] for b in batches], "accumulated": [batches, batches[:1]],
             "empty": [[nothing], batches[:1], [nothing]]}[mode]
    other = copy.deepcopy(net)
    torch.manual_seed(7)
    want = by_hand(other, list(other.parameters()), micro)
    t, opt = tuned(net)
    torch.manual_seed(7)
    for one in micro:
        if mode == "step":
            t.step(one[0], mse)
            continue
        for b in one:
            t.backward(b, mse, scale=1 / len(one))
        opt.step()
        opt.zero_grad()
    for (n, p), q in zip(net.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12, msg=n)


def test_an_objective_is_part_of_each_samples_loss():
    net, batches = start()
    other = copy.deepcopy(net)
    params = list(other.parameters())
    inside = [*other.a.parameters(), 0, 0, *other.norm.parameters()]     # the head is pulled to 0
    was = [p.detach().clone() if isinstance(p, torch.Tensor) else p for p in inside]

    def pull():
        return 0.5 * 0.3 * sum((p - w).square().sum() for p, w in zip(params, was, strict=True))

    micro = [[batches[0]], [tuple(t[:0] for t in batches[0])], [batches[1]]]
    torch.manual_seed(7)
    by_hand(other, params, micro, extra=pull)
    t, _ = tuned(net, "full + l2_sp(alpha=0.3, beta=0.3)", head=False)
    torch.manual_seed(7)
    for one in micro:
        t.step(one[0], mse)
    for p, q in zip(net.parameters(), params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("recipe", ["norms", "dora(rank=2)", "houlsby(bottleneck=2)"])
def test_whatever_trains_has_its_samples_gradients(recipe):
    """The sum of what each sample gives is the batch's gradient, each cut to C."""
    net, batch = tiny("vit")
    net = net.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

    def loss(out, batch):                            # the model's own rounds to fp32
        return torch.nn.functional.cross_entropy(out.logits, batch["labels"])

    t = burnish.tune(net, recipe, head=True)
    conformance.widen(t)
    for _, p in t.named_parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p) * 0.1)
    params = dict(t.named_parameters())
    whole = torch.autograd.grad(t.loss(batch, loss), list(params.values()))
    rows = len(batch["labels"])
    sizes = t.sample_norms(batch, loss).detach()
    for bound in (1e9, 0.5 * float(sizes.min())):
        for p in params.values():
            p.grad = None
        with Clipped(params.values(), bound) as sums:
            for i in range(rows):
                t.loss({k: v[i:i + 1] for k, v in batch.items()}, loss).backward()
                size = norm([p.grad for p in params.values()])
                torch.testing.assert_close(size, sizes[i], rtol=1e-8, atol=0)
                alone = Clipped(params.values(), bound)
                kept = [p.grad.clone() for p in params.values()]
                alone.take()
                assert float(norm(alone.sums.values())) <= min(bound, float(size)) * (1 + 1e-12)
                for p, g in zip(params.values(), kept, strict=True):
                    p.grad = g
                sums.take()
        if bound == 1e9:
            for p, w in zip(params.values(), whole, strict=True):
                torch.testing.assert_close(p.grad / rows, w, rtol=1e-8, atol=1e-12)
        else:
            assert float(norm([p.grad for p in params.values()])) <= rows * bound * (1 + 1e-12)


def test_a_scale_and_a_shift_sum_their_tokens():
    """dL/dgamma of a sample is the sum over its tokens of the gradient times what is normalised."""
    torch.manual_seed(0)
    layer = nn.LayerNorm(5).double()
    x, g = torch.randn(2, 3, 4, 5).double()
    for i in range(2):
        got = torch.autograd.grad(layer(x[i:i + 1]), [layer.weight, layer.bias], g[i:i + 1])
        hat = torch.nn.functional.layer_norm(x[i], (5,))
        torch.testing.assert_close(got[0], (g[i] * hat).sum(0))
        torch.testing.assert_close(got[1], g[i].sum(0))


# -- the sums --------------------------------------------------------------------------------------
def params_of(*sizes, dtype=torch.float64):
    return [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]


def test_what_is_not_finite_counts_as_nothing_and_what_waited_stays():
    a, b = params_of(2, 2)
    a.grad = torch.tensor([5.0, 0.0], dtype=torch.float64)
    with Clipped([a, b], 1.0) as sums:
        assert a.grad is None
        for one in ([3.0, 4.0], [float("nan"), 0.0], [float("inf"), 1.0], [0.0, 0.0]):
            a.grad = torch.tensor(one, dtype=torch.float64)
            sums.take()
        sums.take()                                  # a sample that reaches nothing
    assert a.grad.tolist() == [5.6, 0.8] and b.grad is None and sums.taken == 5
    with pytest.raises(ZeroDivisionError), Clipped([a, b], 1.0) as sums:
        a.grad = torch.ones(2, dtype=torch.float64)
        sums.take()
        raise ZeroDivisionError
    assert a.grad.tolist() == [5.6, 0.8] and b.grad is None


def test_sums_are_wide_and_gradients_have_the_weights_type():
    a = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    with Clipped([a], 10.0) as sums:
        for _ in range(600):
            a.grad = torch.ones(1, dtype=torch.bfloat16)
            sums.take()
            assert sums.sums[a].dtype == torch.float32
    assert a.grad.dtype == torch.bfloat16 and float(a.grad) == 600    # bf16 alone stops at 256
    torch.manual_seed(0)
    hide([a], 0.0, 2.0)
    assert a.grad.dtype == torch.bfloat16 and float(a.grad) == 300


def test_noise_is_on_every_tensor_and_as_large_as_said():
    a, b = params_of(20_000, 20_000, dtype=torch.float32)
    a.grad = torch.full_like(a, 8.0)
    torch.manual_seed(0)
    hide([a, b], 3.0, 4.0)
    for p, mean in ((a, 2.0), (b, 0.0)):
        assert abs(float(p.grad.mean()) - mean) < 0.02
        assert abs(float(p.grad.std()) - 0.75) < 0.02
    assert not torch.equal(a.grad - 2.0, b.grad)


# -- counts ----------------------------------------------------------------------------------------
def count(net, text):
    anatomy = Anatomy.of(net)
    sizes = {n: p.numel() for n, p in net.named_parameters()}
    return sum(sizes[s.name] for s in parse(text)[0].select(anatomy))


def test_the_papers_counts():
    vit = tiny("vit", meta=True, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
               intermediate_size=3072, image_size=224, patch_size=16)[0]
    assert count(vit, "norms + dp") == 38_400
    from transformers import BitConfig, BitForImageClassification

    with torch.device("meta"):
        bit = BitForImageClassification(BitConfig(num_labels=10))
    assert count(bit, "norms(targets='norm3,bit.norm') + dp") == 11_648


# -- what is spent ---------------------------------------------------------------------------------
def test_the_accountants_figures():
    given = (1.0, 0.01, 1000, 1e-5)
    assert epsilon_of(*given, "rdp") == pytest.approx(2.101, abs=1e-3)
    assert epsilon_of(*given, "pld") == pytest.approx(1.828, abs=1e-3)
    assert epsilon_of(1.2, 0.01, 1000, 1e-5, "rdp") < 2.101
    assert epsilon_of(1.0, 0.01, 2000, 1e-5, "rdp") > 2.102
    assert epsilon_of(1.0, 0.02, 1000, 1e-5, "rdp") > 2.102
    assert epsilon_of(1.0, 1.0, 4, 1e-5, "rdp") == pytest.approx(
        epsilon_of(0.5, 1.0, 1, 1e-5, "rdp"), rel=1e-9)         # no sampling: noise adds up
    assert epsilon_of(1.0, 0.01, 0, 1e-5, "pld") == 0.0
    for kind, sigma in (("rdp", 1.0), ("pld", 1.0)):
        found = sigma_for(epsilon_of(*given, kind), 0.01, 1000, 1e-5, kind)
        assert found == pytest.approx(sigma, abs=1e-3)


def test_a_central_limit_says_too_little_and_no_setting_takes_it():
    cdf, mu = NormalDist().cdf, 0.01 * math.sqrt(1000 * math.expm1(1.0))
    eps = 1.618                                         # delta(eps) of mu-Gaussian privacy
    delta = cdf(mu / 2 - eps / mu) - math.exp(eps) * cdf(-mu / 2 - eps / mu)
    assert mu == pytest.approx(0.4145, abs=1e-4) and delta == pytest.approx(1e-5, rel=5e-3)
    assert min(epsilon_of(1.0, 0.01, 1000, 1e-5, kind) for kind in ("pld", "rdp")) > eps + 0.2
    with pytest.raises(RecipeError, match="accountant='gdp'"):
        parse("dp(accountant='gdp')")


def planned(more="", total=6):
    net, batches = start()
    t = burnish.tune(net, "full + dp(epsilon=3.0, records=50, batch=5, accountant='rdp'"
                          f"{more}) + sgd", head=True)
    t.total_steps = total
    t.optimizer(0.01)
    return t, batches


@pytest.mark.parametrize("more, delta", [("", 1 / 50), (", delta=0.001", 0.001)])
def test_a_run_spends_what_it_was_to_and_no_more(more, delta):
    t, batches = planned(more)
    sigmas = []
    for _ in range(6):
        t.step(batches[0], mse)
        told = t.timeline.told()["dp"]
        sigmas.append(told["sigma"])
        assert told["epsilon"] < 3.0 and told["delta"] == delta and told["rate"] == 0.1
    assert set(sigmas) == {sigma_for(3.0, 0.1, 6, delta, "rdp")}
    assert told["updates"] == 6 and told["epsilon"] == pytest.approx(3.0, abs=0.01)
    assert told["accountant"] == "rdp" and told["max_norm"] == 1.0
    before = [p.detach().clone() for p in t.parameters()]
    with pytest.raises(ConfigError, match="^dp: the 6 updates that the noise was made for"):
        t.step(batches[0], mse)
    assert all(torch.equal(p, w) for p, w in zip(t.parameters(), before, strict=True))


def test_each_setting_reaches_the_accountant(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "sigma_for", lambda *a: asked.append(a) or 1.0)
    monkeypatch.setattr(module, "epsilon_of", lambda *a: asked.append(a) or 2.0)
    net, batches = start()
    for text in ("records=50, batch=5", "records=60, batch=3.0, epsilon=2.0, delta=0.01, "
                                        "accountant='rdp'", "records=2, batch=2.0"):
        t = burnish.tune(net, f"full + dp({text})", head=True)
        t.total_steps = 6
        t.optimizer(0.01)
        t.step(batches[0], mse)
        t.step(batches[0], mse)
        assert t.timeline.told()["dp"]["epsilon"] == 2.0
        t.detach()
    assert asked == [(8.0, 0.1, 6, 0.02, "pld"), (1.0, 0.1, 2, 0.02, "pld"),
                     (2.0, 0.05, 6, 0.01, "rdp"), (1.0, 0.05, 2, 0.01, "rdp"),
                     (8.0, 1.0, 6, 0.5, "pld"), (1.0, 1.0, 2, 0.5, "pld")]


def test_it_goes_on_where_it_stood():
    t, batches = planned()
    for _ in range(4):
        t.step(batches[0], mse)
    kept = copy.deepcopy(t.timeline.state())
    again, _ = planned(total=9)                      # another plan changes no noise
    again.timeline.load(kept)
    for _ in range(2):
        again.step(batches[0], mse)
    assert again.timeline.told()["dp"]["epsilon"] == pytest.approx(3.0, abs=0.01)
    with pytest.raises(ConfigError, match="the 6 updates"):
        again.step(batches[0], mse)


def test_noise_of_its_own_has_no_end_and_needs_no_accountant(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    t, opt = tuned(start()[0])
    batches = start()[1]
    t.total_steps = 1
    for _ in range(3):
        t.step(batches[0], mse)
    assert t.timeline.told()["dp"] == {"sigma": SIGMA, "max_norm": C, "updates": 3}
    epsilon_of.cache_clear()
    with pytest.raises(ConfigError, match="pip install burnish\\[privacy\\]"):
        epsilon_of(1.0, 0.01, 3, 1e-5, "pld")
    assert accountant._library.__module__


# -- memory ----------------------------------------------------------------------------------------
def test_a_step_holds_one_sample_and_is_promised():
    def made(recipe):
        net, batch = tiny("vit", dtype=torch.float32)
        net.train()
        return net, {k: v.repeat(4, *[1] * (v.dim() - 1)) for k, v in batch.items()}, recipe

    peaks = {}
    for recipe in ("norms", "norms + dp(sigma=1.0, batch=8.0)", "norms + dp"):
        net, batch, _ = made(recipe)
        promise = simulate(net, recipe, batch)
        peaks[recipe] = promise.peak_bytes
        if recipe.endswith("dp"):
            continue                                 # its noise is not known, its memory is
        t = burnish.tune(net, recipe)
        assert measure(t, batch).peak_bytes == promise.peak_bytes
    assert peaks["norms + dp"] == peaks["norms + dp(sigma=1.0, batch=8.0)"] < peaks["norms"]


def test_a_rehearsal_spends_nothing():
    t, batches = planned(total=2)
    measure(t, batches[0], mse)
    t.step(batches[0], mse)
    assert t.timeline.told()["dp"]["updates"] == 1
    t.step(batches[0], mse)
    measure(t, batches[0], mse)                      # after the last of them, too
    assert t.timeline.told()["dp"]["updates"] == 2


# -- refusals --------------------------------------------------------------------------------------
def test_defaults():
    assert parse("dp")[0].settings() == {
        "targets": None, "epsilon": None, "risk": None, "sigma": None, "max_norm": 1.0,
        "records": None, "batch": None, "accountant": "pld"}
    assert not parse("dp")[0].exact              # sums with noise are estimates
    assert str(parse("dp(delta=0.1, noise_multiplier=2.0)")[0]) == "dp(risk=0.1, sigma=2.0)"


@pytest.mark.parametrize("text, match", [
    ("dp(epsilon=1.0, sigma=1.0)", "^dp: sigma says how much"),
    ("dp(epsilon=0.0)", "^dp: epsilon is positive"), ("dp(sigma=0.0)", "^dp: sigma is positive"),
    ("dp(max_norm=0.0)", "^dp: max_norm is positive"),
    ("dp(records=0)", "^dp: records is positive"),
    ("dp(batch=0.0)", "^dp: batch is positive"), ("dp(delta=1.0)", "^dp: delta is between"),
    ("dp(delta=0.0)", "^dp: delta is between"),
    ("dp(records=3, batch=4.0)", "cannot be expected to draw 4 of 3"),
    ("lora + dp + dp", "what a sample may say"),
    ("lora + dp + sam", "^dp and sam cannot be joined: sam needs further passes.*only sums with "
                        "noise may be looked at; nearest recipe that works: lora(.*) . dp$"),
    ("lora + dp + mezo", "mezo and dp cannot be joined"),
    ("lora + dp + adamw + step_in_backward", "cannot be joined"),
])
def test_what_cannot_be_is_refused_when_it_is_read(text, match):
    with pytest.raises(BurnishError, match=match):
        parse(text)


def test_stages_are_refused():
    with pytest.raises(RecipeError, match="stages would each spend it again"):
        parse("lora + i_lora + dp")


def test_limits_that_are_allowed():
    assert parse("dp(delta=0.999, epsilon=1e-3, records=3, batch=3.0)")
    assert Sampling(4, 1).rate == 0.25
    for rows, batch in ((4, 0), (4, 5)):
        with pytest.raises(ConfigError, match="cannot be expected"):
            Sampling(rows, batch)


@pytest.mark.parametrize("text, total, match", [
    ("dp", 5, "^dp: how many samples is an update expected"),
    ("dp(sigma=1.0)", 5, "^dp: how many samples"), ("dp(batch=2.0)", 5, "^dp: the noise for an"),
    ("dp(batch=2.0, records=4)", None, "^dp: the noise for an epsilon depends"),
    ("dp(batch=1.0, records=1)", 5, "takes more than one; give delta="),
])
def test_what_is_not_known_is_asked_for_before_anything_moves(text, total, match):
    net, batches = start()
    t = burnish.tune(net, f"full + {text}", head=True)
    t.total_steps = total
    t.optimizer()
    before = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(ConfigError, match=match):
        t.step(batches[0], mse)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_what_a_loop_draws_by_stands_over_what_was_said():
    for text, match in (("records=7, ", "records=7, and this run draws by 50"),
                        ("batch=2.0, ", "batch=2, and this run draws by 5")):
        t = burnish.tune(start()[0], f"full + dp({text}sigma=1.0)", head=True)
        t.sampling = Sampling(50, 5)
        with pytest.raises(ConfigError, match=match):
            t.optimizer()
    net, batches = start()
    other = copy.deepcopy(net)
    ends = []
    for which, text in ((net, "dp(sigma=0.5)"), (other, "dp(sigma=0.5, batch=5.0, records=50)")):
        t = burnish.tune(which, f"full + {text} + sgd", head=True)
        t.sampling = Sampling(50, 5) if which is net else None
        t.optimizer(0.1)
        torch.manual_seed(0)
        t.step(batches[0], mse)
        ends.append([p.detach().clone() for p in t.parameters()])
        assert t.timeline.told()["dp"]["rate"] == 0.1
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_norms_over_a_batch_are_refused_and_those_of_running_statistics_are_not():
    net, batches = start(norm=nn.BatchNorm1d)
    with pytest.raises(RecipeError, match="norms that a sample has by itself"):
        burnish.tune(net, "full + dp(sigma=1.0, batch=2.0)", head=True)
    net.eval()
    t = burnish.tune(net, "full + dp(sigma=1.0, batch=2.0)", head=True)
    t.optimizer()
    t.step(batches[0], mse)
    net.train()
    with pytest.raises(ConfigError, match="^dp: norm normalises over the samples of a batch"):
        t.step(batches[0], mse)
    net.norm = nn.BatchNorm1d(6, track_running_stats=False).double().eval()
    with pytest.raises(ConfigError, match="^dp: norm normalises"):
        t.step(batches[0], mse)


def test_loops_that_cannot_are_told():
    net, batches = start()
    t, opt = tuned(net)
    def whole():
        return mse(net(batches[0][0]), batches[0])

    with pytest.raises(ConfigError, match="makes a pass for each sample, and this loop makes one"):
        t.around(whole, whole)
    t, opt = tuned(start()[0])
    mse(t.model(batches[0][0]), batches[0]).backward()
    with pytest.raises(ConfigError, match="call tuned.backward"):
        opt.step()
    with pytest.raises(ConfigError, match="^dp counts gradients in their own size.*scale of 1.5"):
        t.backward(batches[0], mse, scale=torch.tensor(1.5))
    with pytest.raises(ConfigError, match="^max_grad_norm cuts what dp sums"):
        t.optimizer(max_grad_norm=1.0)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(_private, "processes", lambda: 2)
    t = burnish.tune(start()[0], "full + dp(sigma=1.0, batch=2.0)", head=True)
    with pytest.raises(ConfigError, match="^dp draws its samples and its noise in one process"):
        t.optimizer()


def test_a_loss_of_several_samples_is_refused():
    with pytest.raises(RecipeError, match="a loss that a sample has by itself"):
        burnish.tune(tiny("clip")[0], "norms + dp(sigma=1.0, batch=2.0)", head=False)


def test_edgeworth_is_told_beside_a_bound_and_plans_nothing():
    """Exact where every row is drawn; else near the certified figure, on either side of it."""
    for sigma, steps in ((1.0, 1), (2.0, 10)):
        given = (sigma, 1.0, steps, 1e-5)
        assert epsilon_of(*given, "edgeworth") == pytest.approx(epsilon_of(*given, "pld"), abs=1e-3)
    given = (1.0, 0.01, 1000, 1e-5)
    assert abs(epsilon_of(*given, "edgeworth") - epsilon_of(*given, "pld")) < 0.12
    found = [epsilon_of(s, 0.01, t, 1e-5, "edgeworth")
             for s, t in ((1.2, 1000), (1.0, 1000), (1.0, 2000))]
    assert found == sorted(found) and found[0] < found[1] < found[2]
    with pytest.raises(ConfigError, match="closes no budget"):
        sigma_for(2.0, 0.01, 1000, 1e-5, "edgeworth")
    with pytest.raises(RecipeError, match="plans no"):
        parse("dp(epsilon=2.0, accountant='edgeworth')")
    net, batches = start()
    t = burnish.tune(net, "full + dp(sigma=1.0, records=100, batch=10, accountant='edgeworth')")
    t.optimizer(lr=0.1)
    t.step(batches[0], mse)
    (said,) = t.timeline.told().values()
    assert said["bound"] == epsilon_of(1.0, 0.1, 1, 0.01, "pld") and said["epsilon"] >= 0


@pytest.mark.parametrize("sigma, rate, steps", [
    (0.01, 0.5, 2), (1e-3, 0.1, 1000), (0.02, 1.0, 3), (1.0, 0.1, 10**8)])
def test_losses_that_fit_no_grid_are_bounded_by_moments(monkeypatch, sigma, rate, steps):
    """No distribution of so many points is made, which took minutes and gigabytes."""
    from dp_accounting import pld

    monkeypatch.setattr(pld, "PLDAccountant", None)
    epsilon_of.cache_clear()
    given = (sigma, rate, steps, 1e-5)
    assert epsilon_of(*given, "pld") == epsilon_of(*given, "rdp") < float("inf")
    epsilon_of.cache_clear()


def test_budgets_and_deltas_of_any_size():
    found = sigma_for(1e5, 0.5, 1000, 1e-5, "pld")                # memory ran out
    assert 0.99e5 < epsilon_of(found, 0.5, 1000, 1e-5, "pld") <= 1e5
    small = (1.0, 0.01, 100, 1e-20)                               # less than a grid cuts off
    assert epsilon_of(*small, "pld") == epsilon_of(*small, "rdp") < float("inf")
    with pytest.raises(ConfigError, match="epsilon=1e-06 and delta=1e-30 are less than any noise"):
        sigma_for(1e-6, 1.0, 100, 1e-30, "rdp")
    assert epsilon_of(1e-9, 0.5, 2, 1e-5, "edgeworth") == epsilon_of(1e-9, 0.5, 2, 1e-5, "rdp")
