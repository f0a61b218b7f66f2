"""Composition of optimizers: laws, groups, slices, saving, rounding, and stepping in backward."""

from __future__ import annotations

import gc
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.blocks.update.composed import Composed
from burnish.blocks.update.named import load_named_state, named_state
from burnish.blocks.update.rules import SGD, AdamW, Lion
from burnish.blocks.update.step import (
    InBackward,
    Inner,
    Rounding,
    Subspace,
    check_loop,
    compose,
    matching,
)
from burnish.blocks.update.subspace import Basis, SubspaceMap
from burnish.core.errors import ConfigError, FormatError, RecipeError
from burnish.testing.ran import Allocations

LOW = Subspace(map=SubspaceMap(rank=4), every=3, where=lambda name, p: p.dim() > 1, name="galore")


def net(dtype=torch.float32, width=48):
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 8))
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model.to(dtype)


def batch(i, dtype=torch.float32):
    return torch.randn(10, 24, generator=torch.Generator().manual_seed(100 + i)).to(dtype)


def train(model, opt, steps, start=0, backwards=1):
    for i in range(start, start + steps):
        for k in range(backwards):
            x = batch(i * backwards + k, next(model.parameters()).dtype)
            (model(x).float() - 1).square().mean().div(backwards).backward()
        opt.step()
        opt.zero_grad()
    return model


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


SENTENCES = {
    "adamw fp32 state": [Inner(rule=AdamW(), state="fp32"), Rounding(kind="nearest")],
    "adam8bit": [Inner(rule=AdamW(), state="8bit")],
    "adam4bit": [Inner(rule=AdamW(), state="4bit")],
    "lion bf16": [Inner(rule=Lion(), state="bf16")],
    "galore": [LOW],
    "galore + adam8bit": [LOW, Inner(rule=AdamW(), state="8bit")],
    "galore + lion": [LOW, Lion()],
    "stochastic": [Rounding(kind="stochastic")],
    "master": [Rounding(kind="master")],
    "kahan": [Rounding(kind="kahan")],
}


# -- laws -----------------------------------------------------------------------------------
def test_no_answer_is_the_fused_adamw_of_torch():
    opt = compose([None], net().named_parameters(), lr=1e-3, weight_decay=0.1)
    assert type(opt) is torch.optim.AdamW
    assert opt.defaults["fused"] and opt.param_groups[0]["weight_decay"] == 0.1
    assert type(compose([SGD(momentum=0.9)], net().named_parameters(), 1e-3)) is torch.optim.SGD


def test_two_innermost_rules_are_refused_by_name():
    with pytest.raises(RecipeError, match="lion and adam8bit.*innermost"):
        compose([Lion(), Inner(rule=AdamW(), state="8bit", name="adam8bit")],
                net().named_parameters(), 1e-3)


def test_a_word_said_twice_is_refused_by_name():
    with pytest.raises(RecipeError, match="stochastic_rounding and kahan.*rounding"):
        compose([Rounding(kind="stochastic", name="stochastic_rounding"),
                 Rounding(kind="kahan", name="kahan")], net().named_parameters(), 1e-3)
    with pytest.raises(RecipeError, match="subspace"):
        compose([LOW, LOW], net().named_parameters(), 1e-3)


def test_wrappers_nest_in_any_order():
    runs = []
    for answers in itertools.permutations(
            [LOW, Inner(rule=AdamW(), state="8bit"), Rounding(kind="stochastic"), InBackward()]):
        model = net(torch.bfloat16)
        train(model, compose(answers, model.named_parameters(), 1e-2), 4)
        runs.append(weights(model))
    assert all(same(runs[0], r) for r in runs[1:])


def test_wrong_words_are_named():
    with pytest.raises(ConfigError, match="'beta'.*betas"):
        compose([], net().named_parameters(), 1e-3, beta=0.9)
    with pytest.raises(RecipeError, match="stochastic"):
        Rounding(kind="stochastc")
    with pytest.raises(RecipeError, match="str"):
        compose(["adamw"], net().named_parameters(), 1e-3)
    with pytest.raises(ConfigError, match="nothing trains"):
        compose([], [], 1e-3)
    with pytest.raises(RecipeError, match="fp16"):
        compose([Rounding(kind="stochastic")], net(torch.float16).named_parameters(), 1e-3)


# -- groups and loops -----------------------------------------------------------------------
@pytest.mark.parametrize("answers", [[], [LOW], [Lion()]])
def test_parameters_bring_their_rate_and_decay(answers):
    model = net()
    model[0].weight.burnish_lr = 16.0
    model[2].weight.burnish_decay = False
    opt = compose(answers, model.named_parameters(), 1e-3, weight_decay=0.1)
    found = {n: (g["lr"], g["weight_decay"]) for g in opt.param_groups for n in g["param_names"]}
    assert found["0.weight"] == (16e-3, 0.1)
    assert found["2.weight"] == (1e-3, 0.0)
    assert found["3.weight"] == (1e-3, 0.1)


def test_a_rate_multiplier_multiplies_the_step():
    model = net()
    model[0].weight.burnish_lr = 4.0
    before = weights(model)
    train(model, compose([Lion()], model.named_parameters(), 2**-10), 1)
    move = {n: (p - before[n]).abs().max().item() for n, p in weights(model).items()}
    assert move["0.weight"] == pytest.approx(4 * 2**-10, rel=1e-3)
    assert move["3.weight"] == pytest.approx(2**-10, rel=1e-3)


@pytest.mark.parametrize("answers", [[Lion()], [Lion(), InBackward()]])
def test_schedulers_and_step_hooks_work(answers):
    model = net()
    opt = compose(answers, model.named_parameters(), 2**-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5**i)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    for i in range(3):
        before = weights(model)
        train(model, opt, 1, start=i)
        schedule.step()
        move = (model[0].weight - before["0.weight"]).abs().max().item()
        assert move == pytest.approx(2**-6 * 0.5**i, rel=1e-3)
    assert seen == ["before", "after"] * 3


def test_tied_parameters_step_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    opt = compose([Lion()], model.named_parameters(remove_duplicate=False), 0.5)
    before = model["a"].weight.detach().clone()
    model["b"](model["a"](torch.ones(1, 4))).sum().backward()
    opt.step()
    torch.testing.assert_close((model["a"].weight - before).abs(), torch.full((4, 4), 0.5))


def test_gradients_are_left_as_they_were():
    for answers in SENTENCES.values():
        model = net()
        opt = compose(answers, model.named_parameters(), 1e-2)
        (model(batch(0)) - 1).square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        opt.step()
        assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


def test_a_closure_is_evaluated_with_gradients():
    model = net()
    opt = compose([Lion()], model.named_parameters(), 1e-2)

    def closure():
        loss = (model(batch(0)) - 1).square().mean()
        loss.backward()
        return loss

    before = weights(model)
    assert opt.step(closure).item() > 0 and not same(before, weights(model))


# -- slices and layouts ---------------------------------------------------------------------
def in_slices(words, dtype, monkeypatch):
    """The weights after three steps, whole tensors at a time and 512 elements at a time."""
    runs = []
    for size in (1 << 20, 512):
        monkeypatch.setattr(Composed, "_slice", staticmethod(lambda device, size=size: size))
        model = net(dtype, width=192)
        train(model, compose(SENTENCES[words], model.named_parameters(), 1e-2), 3)
        runs.append(weights(model))
    return runs


@pytest.mark.parametrize("words", [w for w in SENTENCES if LOW not in SENTENCES[w]])
def test_a_step_in_slices_is_the_step(words, monkeypatch):
    assert same(*in_slices(words, torch.bfloat16, monkeypatch))


@pytest.mark.parametrize("words", [w for w in SENTENCES if LOW in SENTENCES[w]])
def test_a_projected_step_in_slices_is_the_step(words, monkeypatch):
    """Products of panels sum in another order: to the rounding of float64, nothing more."""
    whole, parts = in_slices(words, torch.float64, monkeypatch)
    for n in whole:
        torch.testing.assert_close(parts[n], whole[n], rtol=1e-10, atol=1e-12, msg=n)


def small_tensors(dtype):
    g = torch.Generator().manual_seed(0)
    sizes = [(8, 768), (768, 8), (64, 64), (5000,), (1,), (33, 7), (3, 3), (96, 64), (4096,), (17,)]
    return [(f"t{i}", nn.Parameter(torch.randn(s, generator=g).mul_(0.1).to(dtype)))
            for i, s in enumerate(sizes)]


@dataclass(frozen=True)
class Signs:
    """A rule that knows slices one by one, and nothing else."""

    name, states, decoupled = "signs", {"count": False}, True

    def hyper(self):
        return {"weight_decay": 0.1}

    def direction(self, g, state, t, group):
        state["count"].add_(g.abs())
        return g.sign_().mul_(state["count"])


@pytest.mark.parametrize("words", [*SENTENCES, "signs", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_small_tensors_together_are_each_by_itself_bit_for_bit(words, dtype, monkeypatch):
    answers = {"signs": [Signs()], "sgd": [SGD(momentum=0.9, weight_decay=0.1),
                                           Rounding(kind="kahan")]}.get(words) or SENTENCES[words]
    runs, bunches = [], []
    step = Composed._step_bunch
    monkeypatch.setattr(Composed, "_step_bunch", lambda self, group, found, *a: (
        bunches.append(len(found)), step(self, group, found, *a)))
    for together in (True, False):
        named = small_tensors(dtype)
        named[2][1].burnish_lr = 3.0
        opt = compose(answers, named, 1e-2, seed=4)
        if not together:
            monkeypatch.setattr(Composed, "_together", lambda self: set())
        for t in range(3):
            g = torch.Generator().manual_seed(t)
            for i, (_, p) in enumerate(named):
                p.grad = None if (t, i) == (1, 3) else torch.randn(p.shape, generator=g).to(dtype)
            opt.step()
        runs.append({n: p for n, p in named} | {
            f"{n}.{k}": v for n, p in named for k, v in opt.state[p].items()
            if isinstance(v, torch.Tensor)})
    assert runs[0].keys() == runs[1].keys() and same(*runs)
    assert max(bunches) > 2 or LOW in answers


@pytest.mark.parametrize("words", [w for w in SENTENCES if LOW not in SENTENCES[w]])
def test_no_temporary_grows_with_the_number_of_tensors(words, monkeypatch):
    size = 1 << 14
    monkeypatch.setattr(Composed, "_slice", staticmethod(lambda device: size))
    named = [(f"t{i}", nn.Parameter(torch.randn(4096).bfloat16())) for i in range(64)]
    opt = compose(SENTENCES[words], named, 1e-3)
    for _, p in named:
        p.grad = torch.randn(4096).bfloat16()
    opt.step()
    with Allocations() as seen:
        opt.step()
    assert 0 < seen.largest <= 4 * size < 64 * 4096 * 2


@pytest.mark.parametrize("answers", [[Inner(rule=AdamW(), state="8bit")], [LOW], [Lion()]])
def test_layouts_do_not_matter(answers):
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        conv = nn.Conv2d(16, 32, 3).to(memory_format=layout)
        opt = compose(answers, conv.named_parameters(), 1e-2)
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            conv(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        assert conv.weight.is_contiguous(memory_format=layout)
        runs.append(conv.weight.detach())
    # block codecs cut the tensor in memory order, so their blocks differ between layouts
    loose = isinstance(answers[0], Inner)
    torch.testing.assert_close(*runs, rtol=1e-3, atol=6e-3 if loose else 1e-4)


# -- saving ---------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [*SENTENCES, "native"])
@pytest.mark.parametrize("road", ["state_dict", "named"])
def test_stop_and_resume_is_one_run_bit_for_bit(words, road):
    answers = SENTENCES.get(words, [])
    whole = net(torch.bfloat16)
    train(whole, compose(answers, whole.named_parameters(), 1e-2, seed=5), 7)

    first = net(torch.bfloat16)
    opt = compose(answers, first.named_parameters(), 1e-2, seed=5)
    train(first, opt, 4)
    second = net(torch.bfloat16)
    second.load_state_dict(first.state_dict())
    names = list(second.named_parameters())
    if road == "state_dict":
        again = compose(answers, names, 1e-2, seed=5)
        again.load_state_dict(opt.state_dict())
    else:                                               # listed in another order: names decide
        again = compose(answers, names[::-1], 1e-2, seed=5)
        tensors, scalars = named_state(opt)
        load_named_state(again, load(save({k: v.contiguous() for k, v in tensors.items()})),
                         scalars)
    train(second, again, 3, start=4)
    assert same(weights(whole), weights(second))


def test_named_state_is_flat_and_belongs_to_its_names():
    import json
    model = net(width=96)
    opt = compose([LOW, Inner(rule=AdamW(), state="8bit")], model.named_parameters(), 1e-2)
    train(model, opt, 1)
    tensors, scalars = opt.named_state()
    assert set(k for k in tensors if k.startswith("0.weight")) == {
        "0.weight.exp_avg", "0.weight.exp_avg_sq", "0.weight.projector.right"}
    assert json.loads(json.dumps(scalars)) == scalars
    assert scalars["state"]["0.weight.step"] == 1
    other = nn.Linear(3, 3)
    with pytest.raises(FormatError, match="0.weight|groups"):
        compose([LOW], other.named_parameters(), 1e-2).load_named_state(tensors, scalars)
    with pytest.raises(FormatError, match="another optimizer"):
        compose([Lion()], net(width=96).named_parameters(), 1e-2).load_named_state(tensors, scalars)


# -- step in backward -----------------------------------------------------------------------
@pytest.mark.parametrize("words", SENTENCES)
def test_stepping_in_backward_is_the_same_bit_for_bit(words):
    after, inside = net(torch.bfloat16), net(torch.bfloat16)
    train(after, compose(SENTENCES[words], after.named_parameters(), 1e-2), 5)
    opt = compose([*SENTENCES[words], InBackward()], inside.named_parameters(), 1e-2)
    train(inside, opt, 5)
    assert same(weights(after), weights(inside))


def test_gradients_never_coexist():
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])
    opt = compose([Lion(), InBackward()], model.named_parameters(), 1e-2)
    most = []
    for layer in model:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(p.grad is not None for p in model.parameters())))
    model(torch.randn(4, 32)).sum().backward()
    opt.step()
    assert max(most) <= 1 and all(p.grad is None for p in model.parameters())


def test_the_folded_gradient_is_the_projected_sum():
    runs = []
    for answers, accumulation in (([LOW], 1), ([LOW, InBackward()], 4)):
        model = net(torch.float64)
        opt = compose(answers, model.named_parameters(), 1e-2, accumulation=accumulation)
        if accumulation == 1:                  # give both the basis of the first micro-batch
            take_first_gradient_basis(opt)
        train(model, opt, 6, backwards=4)
        runs.append(weights(model))
    for n in runs[0]:
        torch.testing.assert_close(runs[0][n], runs[1][n], rtol=1e-5, atol=1e-9)


def take_first_gradient_basis(opt):
    """Reference for folding: refresh from the first micro-batch, then project the whole sum."""
    first = {}

    def note(p):
        first.setdefault(p, p.grad.detach().clone())

    for p in [p for g in opt.param_groups for p in g["params"]]:
        p.register_post_accumulate_grad_hook(note)
    basis = opt._basis
    opt._basis = lambda p, G: basis(p, first[p].reshape(G.shape))
    opt.register_step_post_hook(lambda *_: first.clear())


def test_folding_holds_only_the_projection():
    model = net()
    opt = compose([LOW, InBackward()], model.named_parameters(), 1e-2, accumulation=2)
    (model(batch(0)) - 1).square().mean().backward()
    assert model[0].weight.grad is None and model[0].bias.grad is not None
    assert opt.state[model[0].weight]["folded"].numel() == 48 * 4
    (model(batch(1)) - 1).square().mean().backward()
    opt.step()
    assert "folded" not in opt.state[model[0].weight]
    assert opt.state[model[0].weight]["step"] == 1


def test_a_short_last_accumulation_is_finished_by_step():
    model = net()
    opt = compose([LOW, InBackward()], model.named_parameters(), 1e-2, accumulation=4)
    before = weights(model)
    (model(batch(0)) - 1).square().mean().backward()
    assert same(before, weights(model))
    opt.step()
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all("folded" not in s for s in opt.state.values())


def test_loops_that_would_train_wrongly_are_refused():
    named = list(net().named_parameters())
    with pytest.raises(RecipeError, match="accumulate over 2"):
        compose([InBackward()], named, 1e-3, accumulation=2)
    low = Subspace(map=SubspaceMap(rank=4), name="galore")
    with pytest.raises(RecipeError, match="clip .max_grad_norm=1"):
        compose([low, InBackward()], named, 1e-3, accumulation=2, max_grad_norm=1.0)
    with pytest.raises(RecipeError, match="clip .clip_value=0.5"):
        compose([low, InBackward(clip_value=0.5)], named, 1e-3, accumulation=2)
    residual = Subspace(map=SubspaceMap(rank=4), residual="sign", name="frugal")
    with pytest.raises(RecipeError, match="accumulate"):
        compose([residual, InBackward()], named, 1e-3, accumulation=2)
    plan = compose([InBackward()], named, 1e-3).plan
    with pytest.raises(RecipeError, match="scaler"):
        check_loop(plan, scaler=True)
    compose([Lion()], named, 1e-3, accumulation=8, max_grad_norm=1.0)


def test_a_second_backward_without_step_is_an_error():
    model = net()
    opt = compose([InBackward()], model.named_parameters(), 1e-3)
    model(batch(0)).sum().backward()
    with pytest.raises(RecipeError, match="accumulation="):
        model(batch(1)).sum().backward()
    opt.step()
    opt.zero_grad()
    model(batch(2)).sum().backward()


def test_hooks_survive_freezing_and_do_not_keep_the_optimizer():
    model = net()
    model[0].weight.requires_grad_(False)
    opt = compose([InBackward()], model.named_parameters(), 1e-2)
    assert not model[0].weight.requires_grad
    frozen = model[0].weight.detach().clone()
    train(model, opt, 1)
    assert torch.equal(frozen, model[0].weight)
    model[0].weight.requires_grad_(True)
    train(model, opt, 1)
    assert not torch.equal(frozen, model[0].weight)
    del opt
    gc.collect()
    (model(batch(0)) - 1).square().mean().backward()           # nobody steps, nothing is freed
    assert model[0].weight.grad is not None
    other = compose([InBackward()], net().named_parameters(), 1e-2)
    other.close()


# -- rounding -------------------------------------------------------------------------------
def drift(kind, step, n, steps=10_000):
    """`steps` steps of `step` upward on bf16 weights of 1."""
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    opt = compose([SGD(), Rounding(kind=kind)], [("w", p)], lr=step)
    p.grad = -torch.ones_like(p)
    for _ in range(steps):
        opt.step()
    return p.detach().double() - 1


def test_small_steps_survive_stochastic_rounding_only():
    moved = drift("stochastic", 1e-5, 256)
    assert moved.mean() == pytest.approx(0.100, abs=5 * 0.028 / math.sqrt(256))
    assert 0.02 < moved.std() < 0.036                         # 0.028 per weight
    assert not drift("nearest", 1e-5, 4, 2000).any()
    assert not drift("kahan", 1e-5, 4, 2000).any()
    assert drift("kahan", 1e-4, 4).mean() == pytest.approx(1.0, rel=0.04)
    assert drift("master", 1e-5, 4).mean() == pytest.approx(0.1, rel=0.05)


def test_rounding_bytes():
    for kind, extra in (("nearest", 0), ("stochastic", 0), ("master", 4), ("kahan", 2)):
        model = net(torch.bfloat16)
        opt = compose([SGD(), Rounding(kind=kind)], model.named_parameters(), 1e-2)
        train(model, opt, 1)
        held = sum(v.nbytes for s in opt.state.values() for v in s.values()
                   if isinstance(v, torch.Tensor))
        assert held == extra * sum(p.numel() for p in model.parameters())


def test_stochastic_rounding_leaves_the_global_generator_alone():
    model = net(torch.bfloat16)
    opt = compose([Rounding(kind="stochastic")], model.named_parameters(), 1e-2)
    (model(batch(0, torch.bfloat16)) - 1).square().mean().backward()
    state = torch.get_rng_state()
    opt.step()
    assert torch.equal(state, torch.get_rng_state())


# -- fake tensors ---------------------------------------------------------------------------
@pytest.mark.parametrize("words", [*SENTENCES, "native"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_step_runs_on_fake_tensors(words, inside):
    answers = [*SENTENCES.get(words, []), *([InBackward()] if inside else [])]
    train(net(torch.bfloat16, 192), compose(answers, net(torch.bfloat16, 192).named_parameters(),
                                            1e-2), 1)          # fills caches with real tensors
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(24, 192, dtype=torch.bfloat16), nn.GELU(),
                              nn.Linear(192, 8, dtype=torch.bfloat16))
        opt = compose(answers, model.named_parameters(), 1e-2)
        for _ in range(2):
            model(torch.empty(10, 24, dtype=torch.bfloat16)).float().square().mean().backward()
            opt.step()
            opt.zero_grad()
    assert len(opt.state) == 4
    real = net(torch.bfloat16, 192)                            # and nothing fake was kept
    train(real, compose(answers, real.named_parameters(), 1e-2), 1)


def test_the_state_of_a_fake_step_has_the_real_bytes():
    sizes = []
    for mode in (None, FakeTensorMode()):
        with mode or torch.enable_grad():
            model = nn.Linear(200, 120)
            opt = compose([LOW, Inner(rule=AdamW(), state="8bit")], model.named_parameters(), 1e-2)
            model(torch.ones(2, 200)).sum().backward()
            opt.step()
        sizes.append({k: v.nbytes for k, v in opt.state[model.weight].items()
                      if isinstance(v, torch.Tensor)})
    assert sizes[0] == sizes[1]


def test_targets_of_a_subspace():
    where = matching("q_proj, *.layers.3.*")
    w = torch.zeros(4, 4)
    assert where("model.layers.0.q_proj.weight", w) and where("model.layers.3.mlp.up.weight", w)
    assert not where("model.layers.0.k_proj.weight", w) and not where("q_proj.bias", w[0])


# -- temporaries ----------------------------------------------------------------------------
@pytest.mark.parametrize("words", SENTENCES)
def test_no_temporary_grows_with_the_tensor(words, monkeypatch):
    size, m, n = 1 << 16, 1024, 1024                 # a slice is no less than a panel of noise
    monkeypatch.setattr(Composed, "_slice", staticmethod(lambda device: size))
    p = nn.Parameter(torch.randn(m, n).bfloat16())
    opt = compose(SENTENCES[words], [("w", p)], 1e-3)
    p.grad = torch.randn(m, n).bfloat16()
    opt.step()                                       # makes the state, and the basis
    if LOW in SENTENCES[words]:
        down = Basis.down                            # its panels scale with the slice, too
        monkeypatch.setattr(Basis, "down", lambda self, G, numel=size: down(self, G, numel))
    with Allocations() as seen:
        opt.step()
    # int64 table lookups of a slice are the largest; R (n, 4) of a projection is smaller
    assert 0 < seen.largest <= 8 * size < p.numel() * 2


def test_a_tensor_that_has_changed_its_shape_is_refused_before_any_of_its_bunch_moves():
    ps = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    opt = compose([Inner(rule=AdamW(), state="bf16")], list(zip("abc", ps, strict=True)), 1e-2)

    def step():
        for p in ps:
            p.grad = torch.ones_like(p)
        opt.step()

    step()
    ps[2].data = torch.randn(6)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(ConfigError, match="c has shape"):
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, ps, strict=True))
    assert [opt.state[p]["step"] for p in ps] == [1, 1, 1]
