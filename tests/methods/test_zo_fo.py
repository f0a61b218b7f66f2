"""Gradients above, probes below: against both equations, dense and in float64, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import burnish
from burnish.blocks.update.hybrid import Hybrid
from burnish.blocks.update.named import load_named_state, named_state
from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.step import compose
from burnish.core.errors import BurnishError, ConfigError, FormatError, RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64, LR, EPS, RATE = torch.float64, 2e-2, 1e-2, 0.05
BLOCKS = ("layers.0", "layers.1", "layers.2")


class Stack(nn.Module):
    """The head is defined before the blocks, and a norm that they share runs in each of them."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.shared = nn.Linear(6, 6)
        self.drop = nn.Dropout(dropout)
        g = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.5)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + self.shared(layer(x))
        return self.head(self.drop(x))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
BELOW = {1: ("embed", "layers.0", "shared"), 2: ("embed", "layers.0", "layers.1", "shared"),
         3: ("embed", "layers.", "shared")}


def loss_of(model, theta=None):
    out = model(X) if theta is None else functional_call(model, theta, (X,))
    return (out - Y).square().mean()


def build(model, settings="", lr=LR, **kw):
    (method,) = parse(f"zo_fo(eps={EPS}, zo_rate={RATE}{settings})")
    opt = compose([method.optimizer()], model.named_parameters(), lr, **kw)
    opt.model, opt.blocks = model, BLOCKS
    return opt


def dense(opt, theta, state, t, k, queries=1, rule="adam", decay=0.0):
    """One update of the equations over whole tensors; `theta` changes."""
    model = Stack().double().eval()
    low = {n for n in theta if n.startswith(BELOW[k])}
    leaves = {n: p.clone().requires_grad_(True) for n, p in theta.items()}
    loss = loss_of(model, leaves)                                  # a full backward, everywhere
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    moves = {n: torch.zeros_like(theta[n]) for n in low}
    for s in opt.log.seeds[-queries:]:
        z = {n: CounterNoise(s, n).normal(theta[n].numel()).double().view(theta[n].shape)
             for n in low}
        up, down = (float(loss_of(model, {n: p + e * z[n] if n in low else p
                                          for n, p in theta.items()})) for e in (EPS, -EPS))
        for n in low:
            moves[n] += (up - down) / (2 * EPS) / queries * z[n]
    for n in theta:
        lr = LR * RATE if n in low else LR
        u = moves[n] if n in low else grads[n]
        if n not in low and rule == "adam":
            m, v = state.get(n, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * u, 0.999 * v + 0.001 * u**2
            state[n] = m, v
            u = m / (1 - 0.9 ** t) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)
        elif n not in low and rule == "momentum":
            u = state[n] = 0.9 * state.get(n, 0.0) + u
        elif n not in low and rule == "lion":
            m = state.get(n, torch.zeros_like(u))
            u, state[n] = torch.sign(0.9 * m + 0.1 * u), 0.99 * m + 0.01 * u
        keep = 1 - lr * decay if theta[n].dim() > 1 else 1.0
        theta[n] = theta[n] * keep - lr * u
    return float(loss)


CASES = [("", {}), (", layers=1", {"k": 1}), (", layers=2", {"k": 2}), (", layers=3", {"k": 3}),
         (", layers=2, rule='sgd', queries=2", {"k": 2, "rule": "sgd", "queries": 2}),
         (", layers=2, rule='momentum', weight_decay=0.3",
          {"k": 2, "rule": "momentum", "decay": 0.3}),
         (", layers=2, weight_decay=0.3", {"k": 2, "decay": 0.3}),
         (", layers=2, rule='lion', mode='in_place'", {"k": 2, "rule": "lion"})]


@pytest.mark.parametrize("settings, how", CASES)
def test_the_equations(settings, how):
    model = Stack().double().eval()
    opt = build(model, settings, seed=3)
    theta, state = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    for t in range(1, 5):
        value = opt.step(lambda: loss_of(model))
        want = dense(opt, theta, state, t, **{"k": 1, **how})      # half of three blocks is one
        assert value == pytest.approx(want, rel=1e-6)
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), theta[n], rtol=1e-5, atol=1e-7, msg=n)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert {id(p) for p in opt.state} == {id(p) for n, p in model.named_parameters()
                                          if n not in opt.below}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_its_gradients_are_the_upper_part_of_a_full_backward_and_below_there_is_no_graph(k):
    model = Stack().double().eval()
    full = dict(zip([n for n, _ in model.named_parameters()],
                    torch.autograd.grad(loss_of(model), list(model.parameters())), strict=True))
    opt, seen, graphs = build(model, f", layers={k}"), {}, {}
    opt._descend = lambda update: seen.update(                     # what the rule would be given
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for path, module in model.named_modules():
        module.register_forward_hook(lambda _m, _a, out, path=path: graphs.setdefault(
            path, []).append(out.requires_grad))
    opt.step(lambda: loss_of(model))
    assert seen.keys() == {n for n in full if not n.startswith(BELOW[k])}
    for n, g in seen.items():
        torch.testing.assert_close(g, full[n], rtol=1e-12, atol=1e-14, msg=n)
    for i in range(3):                               # a look, the gradient's forward, two probes
        assert graphs[f"layers.{i}"] == [False, i >= k, False, False], i
    assert graphs["embed"] == [False] * 4 and graphs["head"] == [False, True, False, False]


def test_nothing_is_kept_for_backward_below():
    """Bytes kept by autograd fall block by block as k rises; the first blocks keep none."""
    kept = {}
    for k in (1, 2, 3):
        model, total = Stack().double().eval(), []
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(t, total=total, weights=weights):
            if t.untyped_storage()._cdata not in weights:
                total.append(t.untyped_storage().nbytes())
            return t

        opt = build(model, f", layers={k}")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            opt.step(lambda m=model: loss_of(m))
        kept[k] = sum(total)
    assert kept[1] - kept[2] == kept[2] - kept[3] > 0


def test_gradients_see_dropout_and_probes_do_not():
    """A dropout of everything before the head leaves its weight no gradient, in training only."""
    model = Stack(dropout=1.0).double()
    opt = build(model, ", layers=2, rule='sgd'")
    before, modes = model.head.weight.detach().clone(), []
    model.drop.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    for training, moved in ((True, False), (False, True)):
        model.eval()
        opt.training = training
        opt.step(lambda: loss_of(model))
        assert torch.equal(before, model.head.weight) is not moved
        assert not model.training and not model.drop.training
    assert modes == [False, True, False, False, False, False, False]


@pytest.mark.parametrize("name, recipe", [
    ("llama", "full"), ("t5", "lora(rank=2)"), ("vit", "full"), ("llama", "lora(rank=2)")])
def test_on_models_the_loss_falls(name, recipe):
    torch.manual_seed(0)
    model, batch = tiny(name)
    tuned = burnish.tune(model, f"{recipe} + zo_fo(zo_rate=1e-2)", head=False)
    opt = tuned.optimizer(lr=5e-3)
    losses = [float(tuned.step(batch)) for _ in range(12)]
    assert losses[-1] < losses[0]
    blocks = [b.path for b in tuned.anatomy.blocks]
    assert all(n.startswith(blocks[0]) or not n.startswith(tuple(blocks)) for n in opt.below
               if len(blocks) == 2)
    assert not opt.below & {n for n, p in tuned.named_parameters() if p in opt.state}


def test_a_resumed_run_is_bit_for_bit_the_same():
    whole, parts = Stack().double().eval(), Stack().double().eval()
    one = build(whole, ", layers=2", seed=5)
    for _ in range(5):
        one.step(lambda: loss_of(whole))
    first = build(parts, ", layers=2", seed=5)
    for _ in range(2):
        first.step(lambda: loss_of(parts))
    again = copy.deepcopy(parts)
    second = build(again, ", layers=2", seed=5)
    load_named_state(second, *named_state(first))
    for _ in range(3):
        second.step(lambda: loss_of(again))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(),
                                                 strict=True))


def test_a_loss_that_is_not_finite_moves_nothing():
    model = Stack().double().eval()
    opt, before = build(model), copy.deepcopy(model.state_dict())
    with pytest.raises(BurnishError, match="the loss is nan; nothing was updated"):
        opt.step(lambda: loss_of(model) * float("nan"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_weight_read_again_below_is_refused_before_anything_moves():
    class Leaky(Stack):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = x + layer(x) * self.head.weight.sum()
            return self.head(x)

    model = Leaky().double().eval()
    opt, before = build(model, ", layers=2"), copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match="is also read below"):
        opt.step(lambda: loss_of(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_cannot_act_is_refused():
    for settings, says in ((", layers=0", "layers is at least 1"), (", zo_rate=0.0", "positive")):
        with pytest.raises(RecipeError, match=says):
            parse(f"zo_fo({settings.removeprefix(', ')})")[0].optimizer()
    model = Stack().double().eval()
    with pytest.raises(RecipeError, match="4 blocks are to be probed, and 3 run"):
        build(model, ", layers=4").step(lambda: loss_of(model))
    alone = build(model)
    alone.blocks = ()
    with pytest.raises(ConfigError, match=r"use tuned.step\(batch\)"):
        alone.step(lambda: loss_of(model))
    with pytest.raises(ConfigError, match="the loss is a float and has no gradient"):
        build(model).step(lambda: loss_of(model).item())
    with pytest.raises(RecipeError, match="depends on nothing that trains behind"):
        build(model).step(lambda: loss_of(model).detach())
    with pytest.raises(FormatError, match="does not hold"):
        build(model).replay(build(model).log)
    for rest, says in (("head", "nothing trains in the first 2 blocks"),
                       ("embed", "nothing trains behind the first 2 of 3 blocks")):
        opt = compose([parse("zo_fo(layers=2)")[0].optimizer()],
                      [(n, p) for n, p in model.named_parameters() if n.startswith(rest)], LR)
        opt.model, opt.blocks = model, BLOCKS
        with pytest.raises(RecipeError, match=says):
            opt.step(lambda: loss_of(model))
    for other in ("galore(rank=2)", "lisa(layers=1)", "l2_sp", "sam", "step_in_backward", "mezo"):
        with pytest.raises(RecipeError, match="zo_fo"):
            parse(f"full + zo_fo + {other}").optimizer if other != "mezo" else \
                burnish.tune(Stack(), f"full + zo_fo + {other}")


def test_its_settings_and_the_rate_that_fit_takes():
    from burnish.fit.settings import usual_rate

    (method,) = parse("zo_fo")
    assert (method.layers, method.rule, method.zo_rate, method.eps, method.queries) == \
        (None, "adam", 1e-3, 1e-3, 1)
    assert usual_rate(100, 100, parse("full + zo_fo")) == 1e-4          # that of gradients
    assert usual_rate(100, 100, parse("full + mezo")) == pytest.approx(1e-6)


def test_what_nobody_set_of_the_block_is_the_method_s():
    assert Hybrid() == parse("zo_fo")[0].optimizer()
