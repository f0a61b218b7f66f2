"""AdapterDrop: the first blocks without adapters and without a graph, also afterwards."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

import burnish
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

HOST = "houlsby(bottleneck=4, norms=False)"
LAYERS = 4


def start(host=HOST, model="vit", settings="", lr=1e-2, dtype=torch.float32, **kw):
    torch.manual_seed(0)
    net, batch = tiny(model, dtype=dtype, num_hidden_layers=LAYERS, **kw)
    tuned = burnish.tune(net, f"{host} + adapterdrop({settings})", head=False)
    for p in tuned.parameters():
        p.data = p.data.to(dtype)
    stir(tuned, size=0.1)
    tuned.optimizer(lr=lr, weight_decay=0.1)
    return tuned, batch


def drops(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "adapterdrop")


def level(name):
    return int(name.partition(".layers.")[2].partition(".")[0])


def at(tuned, n):
    """The next update goes without n blocks."""
    drops(tuned).step_begin = lambda step: drops(tuned).set(n)
    drops(tuned).set(n)


def reference(net, tuned, n, act=torch.nn.functional.gelu):
    """A copy of the base whose blocks from n on have adapters, as leaves and stock hooks."""
    base, theta = copy.deepcopy(net), {}
    for name, p in tuned.model.named_parameters():
        if ".burnish." in name:
            theta[name] = p.detach().clone().requires_grad_(level(name) >= n)
    for path in {k.partition(".burnish.")[0] for k in theta}:
        if level(path) < n:
            continue
        A, a, B, b = (next(t for k, t in theta.items() if k.startswith(f"{path}.burnish.")
                           and k.endswith(leaf))
                      for leaf in ("down.weight", "down.bias", "up.weight", "up.bias"))
        base.get_submodule(path).register_forward_hook(
            lambda m, args, F, A=A, a=a, B=B, b=b: F + act(F @ A.t() + a) @ B.t() + b)
    return base, theta


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_pass_is_that_of_the_blocks_from_n_on(n):
    """h_l = F_l(h) below n, a_l(F_l(h)) from n on; dropped adapters have no gradient at all."""
    torch.manual_seed(0)
    net = tiny("vit", dtype=torch.float64, num_hidden_layers=LAYERS)[0].requires_grad_(False)
    tuned, batch = start(dtype=torch.float64)
    net.load_state_dict({k: v for k, v in tuned.model.state_dict().items() if "burnish" not in k})
    base, theta = reference(net.eval(), tuned, n)
    tuned.model.eval()
    at(tuned, n)
    loss = tuned.backward(batch)
    want = base(**batch).loss
    torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=1e-11)
    live = {k: t for k, t in theta.items() if t.requires_grad}
    grads = dict(zip(live, torch.autograd.grad(want, list(live.values())), strict=True))
    for name, p in tuned.model.named_parameters():
        if ".burnish." not in name:
            continue
        assert (p.grad is None) == (level(name) < n), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-8, atol=1e-11)


def test_draws_are_uniform_and_of_the_number_of_the_update_alone():
    m = parse("adapterdrop")[0]
    seen = Counter(m.drawn(step, 12) for step in range(12_000))
    assert set(seen) == set(range(12)) and max(abs(c - 1000) for c in seen.values()) < 120
    tuned, batch = start()
    ns = []
    for step in range(6):
        tuned.step(batch)
        ns.append(m.drawn(step, LAYERS))
        assert drops(tuned).n == m.drawn(step + 1, LAYERS)
    assert len(set(ns)) > 1
    assert [parse("adapterdrop(seed=1)")[0].drawn(k, 12) for k in range(9)] != \
        [m.drawn(k, 12) for k in range(9)]


def test_who_rests_is_not_moved():
    tuned, batch = start()
    for k in range(6):
        n = drops(tuned).n if k else drops(tuned).method.drawn(0, LAYERS)
        before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
        tuned.step(batch)
        for name, p in tuned.model.named_parameters():
            moved = not torch.equal(p, before[name])
            assert moved == (".burnish." in name and level(name) >= n), name


def test_moments_wait_for_who_rests_and_a_basis_does_not():
    tuned, batch = start(f"{HOST} + galore(rank=2)")
    assert drops(tuned).state_dict()["n"] == 0           # before the first update nobody rests
    at(tuned, 0)
    tuned.step(batch)
    state, names = tuned.current_optimizer.state, dict(tuned.model.named_parameters())
    downs = {n: p for n, p in names.items() if n.endswith("down.weight")}
    assert all("projector.left" in state[p] for p in downs.values())
    moments = {n: state[p]["exp_avg"].clone() for n, p in downs.items()}
    at(tuned, 2)
    assert {level(n) for n in downs} == set(range(LAYERS))
    for n, p in downs.items():
        assert torch.equal(state[p]["exp_avg"], moments[n]), n
        assert ("projector.left" in state[p]) == (level(n) >= 2), n


@pytest.mark.parametrize("host", [HOST, "lora(rank=2)", "dora(rank=2)",
                                  "parallel(bottleneck=4, tap='residual')"])
def test_it_answers_at_any_number_afterwards(host):
    """Without the first n blocks' adapters, as if theirs were nothing; whole outside."""
    tuned, batch = start(host)
    for _ in range(4):
        tuned.step(batch)
    net = tuned.model.eval()
    with torch.no_grad():
        whole = net(**batch).logits
        by_n = []
        for n in range(LAYERS + 1):
            with tuned.dropped(n):
                by_n.append(net(**batch).logits)
        with tuned.disabled():
            base = net(**batch).logits
        assert torch.equal(net(**batch).logits, whole) and torch.equal(by_n[0], whole)
        torch.testing.assert_close(by_n[-1], base)
        assert all(not torch.allclose(a, b, atol=1e-6)
                   for a, b in zip(by_n, by_n[1:], strict=False))
        if host == HOST:                             # adapters with nothing to say are the same
            for n in range(LAYERS):
                for name, p in tuned.model.named_parameters():
                    if name.endswith(("up.weight", "up.bias")) and level(name) == n:
                        p.zero_()
                torch.testing.assert_close(net(**batch).logits, by_n[n + 1])
    with pytest.raises(burnish.ConfigError, match="0 to 4"), tuned.dropped(5):
        pass


def test_robust_training_serves_every_number():
    """The loss at each n, falls below where it started from."""
    tuned, batch = start("houlsby(bottleneck=8, norms=False)", lr=3e-3)

    def losses():
        out = []
        for n in range(LAYERS):
            with tuned.dropped(n), torch.no_grad():
                out.append(float(tuned.model.eval()(**batch).loss))
        return out

    before = losses()
    for _ in range(40):
        tuned.step(batch)
    assert all(b < a for a, b in zip(before, losses(), strict=True))


def test_the_first_blocks_hold_nothing(kept):
    """Kept for backward falls with the blocks that a gradient passes, and no state waits there."""
    for host in (HOST, "parallel(bottleneck=4, tap='residual')"):
        held = []
        for n in range(LAYERS + 1):
            tuned, batch = start(host)
            at(tuned, min(n, LAYERS - 1))            # a step never goes without all of them
            with tuned.dropped(n):
                held.append(kept(tuned, batch))
        per = [a - b for a, b in zip(held[:-1], held[1:-1], strict=False)]
        assert min(per) > 0 and max(per) - min(per) <= 0.02 * max(per)
        assert held[-1] <= 0.02 * held[0], "with all of them off about nothing is held"


def test_the_simulator_promises_it():
    """Specialised: no adapter below n. What backward keeps falls to (L - n) / L of it, and the
    promise is what is measured."""
    kept = []
    for n in range(LAYERS):
        net, batch = tiny("vit", batch=8, num_hidden_layers=LAYERS)
        recipe = f"houlsby(bottleneck=4, norms=False, targets='o@{n}:,fc2@{n}:')"
        promise = burnish.simulate(copy.deepcopy(net), recipe, batch)
        tuned = burnish.tune(net, recipe)
        tuned.optimizer(lr=1e-3)
        truth = burnish.measure(tuned, batch)
        assert abs(promise.peak_bytes / truth.peak_bytes - 1) <= 0.03
        assert {level(k) for k, _ in tuned.named_parameters() if "burnish" in k} == \
            set(range(n, LAYERS))
        kept.append(promise.by_category["activations"])
    per = [a - b for a, b in zip(kept, kept[1:], strict=False)]
    assert min(per) > 0 and max(per) - min(per) <= 0.05 * max(per)


def test_a_promise_of_the_robust_form_is_of_its_dearest_update():
    net, batch = tiny("vit", batch=8, num_hidden_layers=LAYERS)
    recipe = f"{HOST} + adapterdrop(seed=19)"            # whose first updates go without two blocks
    assert all(burnish.parse(recipe)[1].drawn(k, LAYERS) >= 2 for k in range(5))
    plain, robust = (burnish.simulate(copy.deepcopy(net), r, batch).peak_bytes
                     for r in (HOST, recipe))
    assert abs(robust / plain - 1) < 0.01


def test_what_adapters_share_trains_with_whoever_reads_it():
    tuned, batch = start("compacter(reduction=4, norms=False)")
    at(tuned, 2)
    tuned.backward(batch)
    owner = [(n, p) for n, p in tuned.model.named_parameters() if n.endswith("slow.A")]
    assert len(owner) == 1 and level(owner[0][0]) == 0
    assert owner[0][1].grad.any(), "the blocks above read what the first one holds"
    assert all((p.grad is None) == (level(n) < 2) for n, p in tuned.model.named_parameters()
               if ".burnish." in n and not n.endswith("slow.A"))


def test_stages_are_one_run_and_stacks_are_several():
    runs = {m: [len(r) for r in burnish.tune(tiny(m)[0], "lora(rank=2)").anatomy.runs()]
            for m in ("swin", "t5", "clip")}
    assert runs["t5"] == runs["clip"] == [2, 2] and len(runs["swin"]) == 1


def test_the_same_after_a_resume():
    tuned, batch = start()
    for _ in range(3):
        tuned.step(batch)
    state = tuned.timeline.state()
    again, _ = start()
    again.timeline.load(state)
    assert drops(again).n == drops(tuned).n
    for h in (tuned, again):
        h.timeline.before_update()
        h.timeline.after_update()
    assert drops(again).n == drops(tuned).n == drops(tuned).method.drawn(4, LAYERS)


@pytest.mark.parametrize("model, host, why", [
    ("bert", "houlsby(bottleneck=4)", "before the blocks or beside"),
    ("vit", "bitfit", "before the blocks or beside"),
    ("vit", "lora(rank=2, targets='all')", "before the blocks or beside"),
    ("llama", "prefix(length=2)", "no adapter that could be left out"),
    ("llama", "prompt_tuning(length=2)", "before the blocks or beside"),
    ("vit", "lora(rank=2) + ist", "live blocks"),
])
def test_what_it_refuses(model, host, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], f"{host} + adapterdrop").optimizer(lr=1e-3)


@pytest.mark.parametrize("host, layers, why", [
    ("lora(rank=2)", 1, "here is one block alone"), ("bitfit(targets='fc1')", 2, "here are none")])
def test_adapters_of_two_blocks_are_needed(host, layers, why):
    net, _ = tiny("vit", num_hidden_layers=layers)
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(net, f"{host} + adapterdrop", head=False).optimizer(lr=1e-3)


def test_norms_inside_the_blocks_rest_with_them():
    tuned, batch = start("houlsby(bottleneck=4)")
    at(tuned, 2)
    tuned.backward(batch)
    for name, p in tuned.model.named_parameters():
        if "layernorm_" in name:
            assert (p.grad is None) == (level(name) < 2), name
