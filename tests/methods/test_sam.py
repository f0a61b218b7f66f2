"""SAM against its equations in plain fp64 torch, and what may not be left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import BurnishError, CheckError, ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.memory import measure, simulate
from burnish.testing.models import tiny

RHO, LR = 0.3, 0.1


def mse(out, batch):
    return (out - batch[1]).square().mean()


class Net(nn.Module):
    """A normalisation with running statistics, a dropout, tensors of unlike sizes."""

    def __init__(self, p=0.0, norm=True):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def start(dtype=torch.float64, **kw):
    torch.manual_seed(0)
    net = Net(**kw).to(dtype)
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(5, 6, generator=g).to(dtype), torch.randn(5, 3, generator=g).to(dtype))
               for _ in range(4)]
    return net, batches


def perturbation(params, grads, rho, adaptive):
    """e as the papers write it."""
    if not adaptive:
        norm = sum(float(g.square().sum()) for g in grads) ** 0.5
        return [rho * g / norm for g in grads]
    t = [p.detach().abs() + 0.01 for p in params]
    norm = sum(float((w * g).square().sum()) for w, g in zip(t, grads, strict=True)) ** 0.5
    return [rho * w * w * g / norm for w, g in zip(t, grads, strict=True)]


def by_hand(net, updates, rho=RHO, adaptive=False):
    """SGD with SAM, each update a list of micro-batches; statistics from the pass at w, dropout
    the same in both passes."""
    net = copy.deepcopy(net)
    params = list(net.parameters())
    for micro in updates:
        total = [torch.zeros_like(p) for p in params]
        for batch in micro:
            random = torch.get_rng_state()
            grads = torch.autograd.grad(mse(net(batch[0]), batch), params)
            e = perturbation(params, grads, rho, adaptive)
            there = copy.deepcopy(net)
            with torch.no_grad():
                for p, step in zip(there.parameters(), e, strict=True):
                    p += step
            torch.set_rng_state(random)
            got = torch.autograd.grad(mse(there(batch[0]), batch), list(there.parameters()))
            for t, g in zip(total, got, strict=True):
                t += g / len(micro)
        with torch.no_grad():
            for p, g in zip(params, total, strict=True):
                p -= LR * g
    return net


def same(net, other):
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_steps_are_the_papers(adaptive, p):
    net, batches = start(p=p)
    torch.manual_seed(7)
    want = by_hand(net, [[b] for b in batches], adaptive=adaptive)
    after = torch.get_rng_state()
    tuned = burnish.tune(net, f"full + sam(radius={RHO}, adaptive={adaptive}) + sgd", head=True)
    tuned.optimizer(LR)
    torch.manual_seed(7)
    for b in batches:
        tuned.step(b, mse)
    same(tuned.model, want)
    assert torch.equal(torch.get_rng_state(), after)


def test_each_micro_batch_has_a_step_of_its_own():
    net, batches = start(p=0.3)
    torch.manual_seed(7)
    want = by_hand(net, [batches[:2], batches[2:]])
    tuned = burnish.tune(net, f"full + sam(radius={RHO}) + sgd", head=True)
    opt = tuned.optimizer(LR)
    torch.manual_seed(7)
    for micro in (batches[:2], batches[2:]):
        opt.zero_grad()
        for b in micro:
            tuned.backward(b, mse, scale=1 / 2)
        opt.step()
    same(tuned.model, want)


def test_a_loss_scale_cancels():
    net, batches = start(p=0.3)
    torch.manual_seed(7)
    want = by_hand(net, [[b] for b in batches])
    tuned = burnish.tune(net, f"full + sam(radius={RHO}) + sgd", head=True)
    opt = tuned.optimizer(LR)
    torch.manual_seed(7)
    for b in batches:
        opt.zero_grad()
        tuned.backward(b, mse, scale=4096.0)
        for p in tuned.parameters():
            p.grad /= 4096
        opt.step()
    same(tuned.model, want)


def test_only_what_trains_moves_and_the_norm_is_over_all_of_it():
    net, batches = start(norm=False)
    tuned = burnish.tune(net, f"lora(rank=2) + sam(radius={RHO}) + sgd", targets="a,b", head=False)
    tuned.optimizer(LR)
    frozen = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    seen = []
    module = net.a
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    hook = module.register_forward_pre_hook(lambda *_: seen.append(
        {n: p.detach().clone() for n, p in net.named_parameters()}))
    tuned.step(batches[0], mse)
    hook.remove()
    there = seen[-1]
    assert len(seen) == 2 and all(torch.equal(there[n], w) for n, w in frozen.items())
    length = sum(float((there[n] - w).square().sum()) for n, w in before.items()) ** 0.5
    assert length == pytest.approx(RHO, rel=1e-6)             # factors are in fp32


def test_weights_come_back_bit_for_bit_whatever_happens():
    net, batches = start(torch.float32)
    tuned = burnish.tune(net, "full + sam(radius=3.0)", head=True)
    tuned.optimizer(0.0, weight_decay=0.0)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    for _ in range(3):
        tuned.step(batches[0], mse)
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n]), n

    calls = []

    def fails(out, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a kernel failed")
        return mse(out, batch)

    with pytest.raises(RuntimeError, match="a kernel failed"):
        tuned.step(batches[0], fails)
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n]), n


def test_a_second_pass_that_is_not_finite_updates_nothing():
    net, batches = start()
    tuned = burnish.tune(net, "full + sam", head=True)
    tuned.optimizer(LR)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    calls = []

    def explodes(out, batch):
        calls.append(1)
        return mse(out, batch) * (float("nan") if len(calls) == 2 else 1.0)

    with pytest.raises(BurnishError, match="the loss is nan"):
        tuned.step(batches[0], explodes)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert not tuned.current_optimizer.state


def test_a_gradient_that_is_zero_or_not_finite_moves_nothing():
    from burnish.blocks.update.elsewhere import ascent

    p = {"w": nn.Parameter(torch.ones(3)), "v": nn.Parameter(torch.ones(2))}
    for bad in (0.0, float("nan"), float("inf")):
        grads = {"w": torch.full((3,), bad), "v": torch.zeros(2)}
        for eta in (None, 0.01):
            steps = ascent(p, dict(grads), 0.1, eta)
            assert all(not s.any() for s in steps.values())
    assert ascent(p, {}, 0.1) == {}
    net, batches = start()
    tuned = burnish.tune(net, "full + sam + sgd", head=True)
    tuned.optimizer(LR)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    tuned.step(batches[0], lambda out, batch: 0.0 * mse(out, batch))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("size", [1e-15, 1e-4, 1.0, 1e15])
def test_the_length_of_a_step_is_the_radius_whatever_the_size_of_the_gradient(size):
    from burnish.blocks.update.elsewhere import ascent

    p = {"w": nn.Parameter(torch.randn(3)), "v": nn.Parameter(torch.randn(2))}
    steps = ascent(p, {n: size * torch.ones_like(t) for n, t in p.items()}, 0.1)
    for s in steps.values():
        torch.testing.assert_close(s, torch.full_like(s, 0.1 / 5 ** 0.5))


def test_a_step_below_every_spacing_is_an_error():
    net, batches = start(torch.bfloat16, norm=False)
    tuned = burnish.tune(net, "full + sam(radius=1e-7)", head=True)
    tuned.optimizer(LR)
    with pytest.raises(CheckError, match="moves no weight"):
        tuned.step(batches[0], mse)


def test_only_the_first_pass_is_asked_whether_it_moves_a_weight():
    """Weights may grow out of the radius' reach in a long run; that ends nothing."""
    net, batches = start(torch.bfloat16, norm=False)
    tuned = burnish.tune(net, "full + sam(radius=0.3) + sgd", head=True)
    tuned.optimizer(1e-3)
    tuned.step(batches[0], mse)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(512.0)                               # a spacing of 4
    assert torch.isfinite(tuned.step(batches[1], mse))


def test_a_loop_that_makes_its_own_backward_is_refused_before_anything_moves():
    net, batches = start()
    tuned = burnish.tune(net, "full + sam", head=True)
    opt = tuned.optimizer(LR)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    mse(net(batches[0][0]), batches[0]).backward()
    with pytest.raises(ConfigError, match=r"sam acts around .* tuned.backward"):
        opt.step()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    tuned.step(batches[0], mse)                      # one of ours does not excuse the next
    mse(net(batches[0][0]), batches[0]).backward()
    with pytest.raises(ConfigError, match="tuned.backward"):
        opt.step()


@pytest.mark.parametrize("other", ["mezo", "step_in_backward", "galore(in_backward=True)"])
def test_a_step_that_cannot_be_surrounded_is_refused_when_the_recipe_is_read(other):
    for text in (f"full + sam + {other}", f"full + {other} + sam"):
        with pytest.raises(RecipeError, match="sam needs further passes"):
            parse(text)


def test_two_of_them_are_refused():
    with pytest.raises(RecipeError):
        parse("full + sam + sam(radius=0.1)")


@pytest.mark.parametrize("rho", [0.0, -1.0, float("inf"), float("nan")])
def test_a_length_is_positive(rho):
    with pytest.raises(RecipeError, match="positive"):
        burnish.core.registry.find("sam")(radius=rho)


@pytest.mark.parametrize("recipe", ["full + sam", "lora + sam(adaptive=True) + checkpoint",
                                    "nf4 + lora + sam + adam8bit"])
def test_its_memory_is_promised(recipe):
    model, batch = tiny("llama")
    promised = simulate(model, recipe, batch)
    tuned = burnish.tune(model, recipe)
    measured = measure(tuned, batch)
    assert promised.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)
    plain = simulate(tiny("llama")[0], recipe.replace(" + sam(adaptive=True)", "")
                     .replace(" + sam", ""), batch)
    copies = sum(p.numel() * p.element_size() for p in tuned.parameters())
    assert promised.peak_bytes <= plain.peak_bytes + 1.1 * copies      # one copy, no more


def test_beside_objectives_adapters_and_checkpointing_the_loss_falls():
    model, batch = tiny("llama")
    tuned = burnish.tune(model, "lora(rank=4) + l2_sp + sam + checkpoint")
    tuned.add("other", "houlsby(bottleneck=4) + sam(radius=0.1)")
    for name in ("default", "other"):
        tuned.use(name)
        tuned.optimizer(5e-3)
        losses = [float(tuned.step(batch)) for _ in range(6)]
        assert losses[-1] < losses[0]


def test_an_objective_is_part_of_the_loss_that_is_looked_at():
    net, batches = start(norm=False)
    anchor = [p.detach().clone() for p in net.parameters()]
    tuned = burnish.tune(net, f"full + l2_sp(alpha=0.5, beta=0.3) + sam(radius={RHO}) + sgd",
                         head=True)
    tuned.optimizer(LR)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1
    hand = copy.deepcopy(net)
    own = [p for n, p in hand.named_parameters() if ".burnish" not in n]

    def whole(params):
        out = nn.functional.linear(torch.tanh(nn.functional.linear(
            batches[0][0], params[0], params[1])), params[2], params[3])
        body = sum((p - a).square().sum() for p, a in zip(params[:2], anchor[:2], strict=True))
        head = sum(p.square().sum() for p in params[2:])
        return mse(out, batches[0]) + 0.5 / 2 * body + 0.3 / 2 * head

    grads = torch.autograd.grad(whole(own), own)
    there = [(p.detach() + e).requires_grad_() for p, e in
             zip(own, perturbation(own, grads, RHO, False), strict=True)]
    want = [p - LR * g for p, g in zip(own, torch.autograd.grad(whole(there), there), strict=True)]
    tuned.step(batches[0], mse)
    for p, w in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-10, atol=1e-12)


def test_its_settings_are_the_authors():
    from burnish.core.recipe import parse

    (made,) = parse("sam")
    want = {"radius": 0.05, "adaptive": False}
    assert {k: getattr(made, k) for k in want} == want
