"""SaRA: entries that are all but zero, chosen once more, and a brake on their rank."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.fit import state
from burnish.formats.adapter import load
from burnish.methods.delta.sparse.sara import Small, brake
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says

TAU = 0.05


def net(out=16, wide=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(wide, out), nn.Tanh(), nn.Linear(out, 4))


def start(settings="switch=3", lr=2e-2, model=None, tau=TAU):
    model = (model or net()).double()
    tuned = burnish.tune(model, f"sara(tau={tau}, {settings})", targets="0,2", head=False)
    for _, term in tuned.terms(Small):
        term.double()
    tuned.optimizer(lr=lr)
    return tuned


def terms(tuned):
    return [t for _, t in tuned.terms(Small)]


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x, y = (torch.randn(16, n, generator=g, dtype=torch.float64)
            for n in (tuned.model[0].in_features, 4))
    return tuned.step((x, y), loss=lambda out, b: (out - b[1]).square().mean())


def test_exactly_the_small_entries_train():
    tuned = start()
    for layer, term in zip((0, 2), terms(tuned), strict=True):
        W = tuned.model[layer].weight.flatten()
        assert term.index.tolist() == [i for i, w in enumerate(W.tolist()) if abs(w) < TAU]
        assert (W[term.index.long()] < 0).any(), "negative ones among them"
    base = net().double()
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(tuned.model(x), base(x)), "the first answer is the base's, sign for sign"


def test_the_size_is_not_rounded_to_the_weights_precision():
    """2.0e-3 lies between two numbers of bf16, 1.9989e-3 and 2.0142e-3."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.9989e-3, 2.0142e-3]]))
    tuned = burnish.tune(model, "sara(tau=0.002)", head=False)
    assert terms(tuned)[0].index.tolist() == [0]


@pytest.mark.parametrize("live", ["all", "some"])
def test_the_equation_written_out(live):
    model = nn.Sequential(nn.Linear(12, 16)).double()
    tuned = burnish.tune(model, f"sara(tau={TAU}, switch=1)", head=False)
    (term,) = terms(tuned)
    term.double()
    stir(tuned, size=TAU)
    W, b, held = model[0].weight.detach().clone(), model[0].bias.detach().clone(), {}
    if live == "some":
        handler(tuned).step_begin(1)
        held = dict(zip(term.index[term.values.numel():].tolist(), term.held.tolist(),
                        strict=True))
        assert held and term.values.numel()
    index = term.trained

    def equation(x, v):
        delta = torch.zeros(16 * 12, dtype=torch.float64)
        for i, h in held.items():
            delta[i] = h
        return x @ (W + delta.index_put((index,), v).view(16, 12)).t() + b

    follows(tuned, equation, [term.values], (5, 12))


def handler(tuned):
    if tuned.current_optimizer is None:
        tuned.optimizer()
    return next(h for n, h in tuned.timeline.handlers if n == "sara")


def test_entries_that_are_not_small_stay_to_the_bit():
    tuned = start()
    base = net().double()
    for k in range(6):
        step(tuned, k)
    tuned.merge()
    for layer in (0, 2):
        before, after = base[layer].weight, tuned.model[layer].weight
        large = before.abs() >= TAU
        assert torch.equal(after[large], before[large]) and not torch.equal(after, before)


def test_the_second_set_is_what_is_still_small_of_the_first():
    tuned = start("switch=3")
    base = [net().double()[k].weight.detach().flatten() for k in (0, 2)]
    for k in range(3):
        assert all(t.held.numel() == 0 for t in terms(tuned))
        first = [(t.index.clone().long(), t.values.detach().clone()) for t in terms(tuned)]
        step(tuned, k)
    after = [{}, {}]
    for term, W, (index, _), seen in zip(terms(tuned), base, first, after, strict=True):
        delta = term.dense().detach().flatten()
        small = [i for i in index.tolist() if abs(W[i] + delta[i]) < TAU]
        assert term.trained.tolist() == small and 0 < len(small) < index.numel()
        assert term.values not in tuned.current_optimizer.state, "moments begin again"
        seen.update((i, float(delta[i])) for i in index.tolist() if i not in small)
    for k in range(3, 6):
        step(tuned, k)
    for term, seen in zip(terms(tuned), after, strict=True):
        delta = term.dense().detach().flatten()
        assert {i: float(delta[i]) for i in seen} == seen, "held at what they learned"
        own = tuned.current_optimizer.state[term.values]
        assert own["exp_avg"].shape == term.values.shape and int(own["step"]) == 3


def test_no_second_choice_where_none_is_asked_for():
    tuned = start("switch=0")
    for k in range(4):
        step(tuned, k)
    assert all(t.held.numel() == 0 and t.values.numel() == t.index.numel() for t in terms(tuned))


# -- the brake -------------------------------------------------------------------------------------
def test_its_gradient_is_that_of_the_nuclear_norm():
    torch.manual_seed(0)
    W = torch.randn(66, 70, dtype=torch.float64) * TAU
    index = (W.abs() < TAU).flatten().nonzero().squeeze(1)
    term = Small(Place("l", "weight", "linear", 66, 70), index).double()
    nn.init.normal_(term.values, std=TAU)
    v = term.values.detach().clone().requires_grad_()
    masked = torch.zeros(66 * 70, dtype=torch.float64).index_put((index,), W.flatten()[index] + v)
    want = 0.3 * torch.linalg.svdvals(masked.view(66, 70)).sum()
    objective = brake(term, lambda: W, 0.3)
    assert float(objective.value()) == 0 and objective.gradients() == [None]
    term.braked = True
    torch.testing.assert_close(objective.value(), want.detach())
    (g,), (gw,) = objective.gradients(), torch.autograd.grad(want, [v])
    torch.testing.assert_close(g, gw, rtol=1e-8, atol=1e-10)


def braked(tuned):
    return [k for k, t in enumerate(terms(tuned)) if t.braked]


def layers(*sizes):
    torch.manual_seed(0)
    made = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return nn.Sequential(*made).double()


def wide(settings="switch=3"):
    tuned = burnish.tune(layers(70, 65, 80, 66, 64, 70), f"sara(tau={TAU}, {settings})",
                         head=False, targets="0,1,2,3,4")
    for t in terms(tuned):
        t.double()
    tuned.optimizer(lr=1e-3)
    return tuned


def look(tuned, k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(4, 70, generator=g, dtype=torch.float64)
    return tuned.step((x, x), loss=lambda out, b: (out - b[1]).square().mean())


def test_one_wide_matrix_at_a_time_is_braked():
    tuned, seen = wide(), set()
    assert handler(tuned).state_dict() == {"at": 0}
    for k in range(12):
        look(tuned, k)
        (now,) = braked(tuned)
        seen.add(now)
    assert seen == {0, 1, 2}, "64 is not above 64"


def test_where_one_is_wide_it_is_always_its_turn():
    tuned = burnish.tune(layers(70, 66, 64), "sara", head=False, targets="0,1")
    for k in range(6):
        handler(tuned).step_begin(k)
        assert braked(tuned) == [0]


def test_a_kernel_of_a_convolution_is_no_matrix_to_brake():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(70, 66, 1), nn.Linear(1, 1), nn.Linear(70, 66))
    tuned = burnish.tune(net, f"sara(tau={TAU})", head=False, targets="0,2")
    assert [n for n, _ in tuned.terms(Small)] == ["0.weight", "2.weight"]
    handler(tuned).step_begin(0)
    assert braked(tuned) == [1]


def test_state_gradient_and_file_are_linear_in_what_trains(tmp_path):
    """Two moments and a gradient of sum M numbers; 4 bytes of index and 4 of value in the file."""
    seen = []
    for tau in (0.01, 0.03, 0.08):
        tuned = burnish.tune(layers(70, 66, 64).float(), f"sara(tau={tau})", head=False,
                             targets="0,1")
        opt = tuned.optimizer(lr=1e-3)
        x = torch.randn(4, 70)
        tuned.step((x, x), loss=lambda out, b: out.square().mean())
        n = sum(t.index.numel() for t in terms(tuned))
        assert sum(p.numel() for p in tuned.parameters()) == n
        assert sum(p.grad.numel() for p in tuned.parameters()) == n
        assert sum(v.numel() for s in opt.state.values() for v in s.values() if v.dim()) == 2 * n
        tuned.save(tmp_path / str(tau))
        held = load_file(tmp_path / str(tau) / "adapter_model.safetensors")
        assert sum(v.nbytes for v in held.values()) == 8 * n
        seen.append(n)
    assert seen[2] > 4 * seen[0]


def test_the_brake_joins_the_gradient_of_the_task():
    tuned, plain = wide("nuclear=0.25"), wide("nuclear=0")
    was = [(copy.deepcopy(layer.weight.detach()), t.trained)
           for layer, t in zip(tuned.model, terms(tuned), strict=True)]
    for t in (tuned, plain):
        look(t, 0)
    by = [a.values.grad - b.values.grad for a, b in zip(terms(tuned), terms(plain), strict=True)]
    (k,) = [k for k, g in enumerate(by) if g.any()]
    W, index = was[k]
    v = W.flatten()[index].requires_grad_()
    masked = torch.zeros(W.numel(), dtype=torch.float64).index_put((index,), v).view(W.shape)
    (want,) = torch.autograd.grad(0.25 * torch.linalg.svdvals(masked).sum(), [v])
    torch.testing.assert_close(by[k], want, rtol=1e-6, atol=1e-9)
    assert k < 3, "of those with both sides above 64"
    assert not list(plain.recipe[0].objective(plain, None)), "nothing is made for no brake"


def test_a_promise_is_of_the_largest_wide_matrix():
    tuned = wide()
    handler(tuned).rehearse(0)
    assert braked(tuned) == [2]
    narrow = start()
    handler(narrow).rehearse(0)
    assert braked(narrow) == []


def test_a_brake_with_nothing_to_act_on_is_refused():
    model = nn.Sequential(nn.Linear(65, 64))
    assert burnish.tune(model, "sara", head=False).optimizer(), "the default is no wish"
    for recipe, fine in (("sara(nuclear=0.1)", False), ("sara(nuclear=0)", True)):
        tuned = burnish.tune(nn.Sequential(nn.Linear(65, 64)), recipe, head=False)
        if fine:
            assert tuned.optimizer()
            continue
        with pytest.raises(RecipeError, match="^sara: nuclear=0.1 acts on matrices with both"):
            tuned.optimizer()


# -- files -----------------------------------------------------------------------------------------
def small_step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(4, 70, generator=g)
    return tuned.step((x, x), loss=lambda out, b: (out - b[1]).square().mean())


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_ends_in_the_same_bits(stop, tmp_path):
    """Before, at and after the choice, which is between the second update and the third."""
    def begin():
        return burnish.tune(layers(70, 66, 70).float(), "sara(tau=0.02, switch=2, nuclear=0.1)",
                            targets="0,1", head=False)

    ends = []
    for cut in (None, stop):
        tuned = begin()
        tuned.optimizer(lr=1e-2)
        for k in range(5):
            if k == cut:
                tuned.save(tmp_path / "a", whole=True)
                tree = {"optimizer": state.optimizer_state(tuned.current_optimizer,
                                                           list(tuned.model.named_parameters())),
                        "timeline": tuned.timeline.state()}
                state.save_tree(tree, tmp_path, "run")
                kept = state.load_tree(tmp_path, "run")
                tuned = load(layers(70, 66, 70).float(), tmp_path / "a")
                tuned.optimizer(lr=1e-2)
                state.load_optimizer_state(tuned.current_optimizer,
                                           tuned.model.named_parameters(), kept["optimizer"])
                tuned.timeline.load(kept["timeline"])
            small_step(tuned, k)
        ends.append(tuned.tensors())
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
    assert any(n.endswith(".held") and t.numel() for n, t in ends[0].items())


def test_a_matrix_without_small_entries_is_left_alone(tmp_path):
    def model():
        made = net()
        with torch.no_grad():
            made[0].weight.fill_(1.0)
        return made

    tuned = burnish.tune(model(), f"sara(tau={TAU})", targets="0,2", head=False)
    ((name, term),) = tuned.terms(Small)
    assert name == "2.weight"
    stir(tuned)
    tuned.save(tmp_path / "a")
    x = torch.randn(3, 12)
    again = burnish.load(model(), tmp_path / "a")
    assert len(list(again.terms(Small))) == 1
    assert torch.equal(again.model(x), tuned.model(x))


# -- what it says ----------------------------------------------------------------------------------
def test_the_defaults():
    assert burnish.parse("sara")[0].settings() == {
        "targets": None, "tau": 2e-3, "switch": 2500, "nuclear": 5e-4}
    assert burnish.parse("sara(threshold=0.1, progressive_iter=7)")[0].changed() == {
        "tau": 0.1, "switch": 7}


def test_the_count_is_what_was_found():
    (method,) = burnish.parse("sara")
    place = Place("l", "weight", "linear", 320, 768)
    assert method.count(place) == 320 * 768, "without values: all there may be"
    assert method.count(place, live=17) == 17


def test_kept_for_backward_is_the_input_alone():
    assert keeps_what_it_says("sara", "llama") is None


def test_simulation_promises_every_entry():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 66))
    most = burnish.simulate(model, "sara", (torch.zeros(2, 70),), head=False)
    assert most.trainable == 70 * 66
    assert all(p.requires_grad for p in model.parameters()), "the model is as it was"


@pytest.mark.parametrize("settings", ["tau=0", "tau=-0.1", "switch=-1", "nuclear=-0.1"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(RecipeError, match="^sara: tau is"):
        burnish.parse(f"sara({settings})")


@pytest.mark.parametrize("settings", ["tau=1e-9", "switch=0", "switch=1", "nuclear=0"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"sara({settings})")


def test_state_in_codes_is_refused():
    with pytest.raises(RecipeError, match="resize|grow and shrink"):
        burnish.parse("sara + adam8bit")
