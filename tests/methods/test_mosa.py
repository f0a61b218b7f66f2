"""MoSA: disjoint experts of one adapter, two forwards, and the adapter that they add up to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.bottleneck import Bottleneck
from burnish.blocks.state.divided import EXPERT, Divided, owners
from burnish.core.anatomy import Anatomy
from burnish.core.call import Call, resume
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.fit import state
from burnish.formats.adapter import load
from burnish.methods.branch.mosa import symmetric
from burnish.testing import stir, tiny

MLP = "vit.layers.{}.mlp"


# -- the matrix ------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["matrix", "row", "column"])
@pytest.mark.parametrize("experts", [2, 3, 4])
def test_owners_divide_the_matrix_in_equal_bands(by, experts):
    owner = owners(12, 8, experts, by, 3, "x")
    assert owner.dtype == torch.uint8 and owner.shape == (12, 8)
    runs = {"matrix": owner.view(1, -1), "row": owner, "column": owner.t()}[by]
    for run in runs:
        counts = torch.bincount(run.long(), minlength=experts)
        assert len(counts) == experts and int(counts.max() - counts.min()) <= 1
    assert torch.equal(owner, owners(12, 8, experts, by, 3, "x"))
    assert not torch.equal(owner, owners(12, 8, experts, by, 4, "x"))
    assert not torch.equal(owner, owners(12, 8, experts, by, 3, "y"))
    assert len({tuple(r.tolist()) for r in runs}) > 1 or by == "matrix"


def divided(experts=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(6, 5, generator=g, dtype=torch.float64)
    bias = torch.randn(6, generator=g, dtype=torch.float64)
    owner = owners(6, 5, experts, "matrix", 0, "x")
    return Divided(start, bias, owner, experts), start, bias, owner


def named(expert):
    return resume(Call(given={EXPERT: expert}))


def test_masks_part_the_matrix_and_their_sum_is_the_whole():
    layer, start, bias, owner = divided()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(layer.weight, start) and torch.equal(layer(x), F.linear(x, start, bias))
    parts = []
    for k in range(3):
        with named(k):
            parts.append(layer.weight.detach())
        assert torch.equal(parts[-1], start * (owner == k))
    assert torch.equal(sum(parts), start)
    assert sum(p.numel() for p in layer.experts) == start.numel()
    assert layer.owner.element_size() == 1 and "owner" not in layer.state_dict()


@pytest.mark.parametrize("expert", [None, 0, 2])
def test_the_gradient_is_in_the_entries_of_the_expert_alone(expert):
    layer, start, bias, owner = divided()
    x = torch.randn(4, 5, dtype=torch.float64)
    g = torch.randn(4, 6, dtype=torch.float64)
    with named(expert):
        got = torch.autograd.grad(layer(x), list(layer.experts), g, allow_unused=True)
    W = start.clone().requires_grad_()
    mask = torch.ones_like(start) if expert is None else (owner == expert).double()
    (dense,) = torch.autograd.grad(F.linear(x, W * mask, bias), [W], g)
    for k, grad in enumerate(got):
        if expert in (None, k):
            torch.testing.assert_close(grad, dense[owner == k])
        else:
            assert grad is None
    layer.experts[0].requires_grad_(False)
    with named(None):
        (dense,) = torch.autograd.grad(layer(x), [layer.experts[1]], g)
    assert dense.any()


# -- the loss --------------------------------------------------------------------------------------
def test_the_consistency_written_out():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 6, 5, generator=g, dtype=torch.float64)
    p, q = a.softmax(-1), b.softmax(-1)
    rows = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2
    torch.testing.assert_close(symmetric(a, b), rows.mean())
    counts = torch.rand(4, 6, generator=g) > 0.4
    torch.testing.assert_close(symmetric(a, b, counts), rows[counts].mean())
    one = torch.zeros(4, 6).index_put((torch.tensor([2]), torch.tensor([3])), torch.ones(()))
    torch.testing.assert_close(symmetric(a, b, one), rows[2, 3])
    assert float(symmetric(a, b)) > 0 and float(symmetric(a, a)) == 0 == symmetric(a, a + 3).round()
    assert float(symmetric(a, b, torch.zeros(4, 6))) == 0
    assert symmetric(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def start(settings="", model="vit", lr=1e-2, **kw):
    torch.manual_seed(0)
    net, batch = tiny(model)
    tuned = burnish.tune(net, f"mosa(bottleneck=4, scale=1.0, dropout=0.0, {settings})",
                         head=False)
    stir(tuned, size=0.2)
    tuned.optimizer(lr=lr, weight_decay=0.1, **kw)
    return tuned, batch


def turns(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "mosa")


def layers(tuned):
    return [m for _, b in tuned.branches(Bottleneck) for m in b.modules()
            if isinstance(m, Divided)]


def by_hand(tuned, weight, model="vit"):
    """The loss of the first update, with masks put on the adapters of the untouched model."""
    net, batch = tiny(model)
    if model == "llama":
        batch["labels"][0, 3:] = -100
    made = {p: (b.down.weight, b.down.bias, b.up.weight, b.up.bias, b.up.owner)
            for p, b in tuned.branches(Bottleneck)}
    letters = {p: [t.detach().clone().requires_grad_() for t in ts[:4]] for p, ts in made.items()}

    def run(expert):
        hooks = []
        for path, (A, a, B, b) in letters.items():
            mask = (made[path][4] == expert).float()

            def hook(m, args, out, A=A, a=a, B=B, b=b, mask=mask):
                return out + torch.relu(args[0] @ A.t() + a) @ (B * mask).t() + b
            hooks.append(net.get_submodule(path).register_forward_hook(hook))
        out = net.requires_grad_(False).train()(**batch)
        for h in hooks:
            h.remove()
        return out

    first, second = turns(tuned).drawn(0)
    one, two = run(first), run(second)
    p, q = one.logits.log_softmax(-1), two.logits.log_softmax(-1)
    if model == "llama":                             # position n answers label n + 1
        rows = batch["labels"][:, 1:] != -100
        p, q = p[:, :-1][rows], q[:, :-1][rows]
    kl = F.kl_div(q, p, log_target=True, reduction="none") + \
        F.kl_div(p, q, log_target=True, reduction="none")
    return one.loss, one.loss + weight * kl.sum(-1).mean() / 2, letters


@pytest.mark.parametrize(("model", "weight"), [("vit", 1.0), ("vit", 0.3), ("llama", 1.0)])
def test_loss_and_gradients_are_those_of_two_forwards(model, weight):
    tuned, batch = start(f"weight={weight}, experts=3", model, lr=1e-9)
    if model == "llama":
        batch["labels"][0, 3:] = -100
    task, whole, letters = by_hand(tuned, weight, model)
    flat = [t for ts in letters.values() for t in ts]
    want = dict(zip([(p, i) for p in letters for i in range(4)],
                    torch.autograd.grad(whole, flat), strict=True))
    torch.testing.assert_close(tuned.backward(batch), task.detach())
    first, second = turns(tuned).drawn(0)
    for path, b in tuned.branches(Bottleneck):
        for i, p in enumerate((b.down.weight, b.down.bias)):
            torch.testing.assert_close(p.grad, want[path, i], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(b.up.bias.grad, want[path, 3], rtol=1e-3, atol=1e-6)
        for k, p in enumerate(b.up.experts):
            if k in (first, second):
                torch.testing.assert_close(p.grad, want[path, 2][b.up.owner == k], rtol=1e-3,
                                           atol=1e-6)
            else:
                assert p.grad is None


def test_experts_that_rest_are_not_moved_by_momentum_or_decay():
    tuned, batch = start("experts=4")
    moved, rested = [0] * 4, 0
    for k in range(8):
        before = [[p.detach().clone() for p in m.experts] for m in layers(tuned)]
        moments = [[copy.deepcopy(tuned.current_optimizer.state.get(p)) for p in m.experts]
                   for m in layers(tuned)]
        live = turns(tuned).drawn(k)
        assert len(set(live)) == 2
        tuned.step(batch)
        for m, was, state_ in zip(layers(tuned), before, moments, strict=True):
            for e, p in enumerate(m.experts):
                assert torch.equal(p, was[e]) == (e not in live), (k, e)
                moved[e] += e in live
                if e not in live and state_[e]:
                    rested += 1
                    now = tuned.current_optimizer.state[p]
                    assert all(torch.equal(now[n], v) for n, v in state_[e].items())
    assert all(moved) and rested, "all have their turn, and keep their state"
    for _, b in tuned.branches(Bottleneck):
        assert b.down.weight.grad is not None, "what is shared always trains"


def test_a_projection_of_an_expert_that_leaves_is_made_anew():
    """What an optimizer has folded into a basis of its own would be stale when the expert is back;
    its moments stay."""
    tuned, batch = start("experts=4")
    for _ in range(6):
        tuned.step(batch)
    state = tuned.current_optimizer.state
    ran = [(e, p) for m in layers(tuned) for e, p in enumerate(m.experts) if p in state]
    for _, p in ran:
        state[p]["folded"] = torch.ones(())
    live = turns(tuned).drawn(6)
    assert {e for e, _ in ran} - set(live)
    turns(tuned).step_begin(6)
    for e, p in ran:
        assert ("folded" in state[p]) == (e in live) and "exp_avg" in state[p]


def test_without_consistency_one_expert_runs_once():
    tuned, batch = start("weight=0, experts=3")
    runs = []
    tuned.model.register_forward_hook(lambda *_: runs.append(1))
    tuned.step(batch)
    assert len(runs) == 1 and len(turns(tuned).drawn(0)) == 1
    for k, settings in enumerate(("experts=3", "experts=2")):
        tuned, batch = start(settings)
        tuned.model.register_forward_hook(lambda *_: runs.append(1))
        tuned.step(batch)
        assert len(runs) == 3 + 2 * k
    assert turns(tuned).drawn(3) != turns(start("experts=3, seed=1")[0]).drawn(3) or \
        turns(tuned).drawn(4) != turns(start("experts=3, seed=1")[0]).drawn(4)


def test_elsewhere_all_stand_together_as_one_ordinary_adapter():
    tuned, batch = start("experts=3, share='none'")
    tuned.step(batch)
    tuned.model.eval()
    got = tuned.model(**batch).logits.detach()
    other, _ = tiny("vit")
    plain = burnish.tune(other, "parallel(bottleneck=4, scale=1.0)", head=False)
    for (_, a), (_, b) in zip(tuned.branches(Bottleneck), plain.branches(Bottleneck),
                              strict=True):
        for at in ("down", "up"):
            getattr(b, at).weight.data.copy_(getattr(a, at).weight)
            getattr(b, at).bias.data.copy_(getattr(a, at).bias)
    other.eval()
    torch.testing.assert_close(other(**batch).logits, got)


@pytest.mark.parametrize("share", ["down", "none"])
def test_a_file_holds_the_numbers_of_one_adapter(share, tmp_path):
    tuned, batch = start(f"experts=3, share={share!r}")
    for _ in range(3):
        tuned.step(batch)
    tuned.model.eval()
    tuned.save(tmp_path / "a")
    assert sum(t.numel() for t in tuned.tensors().values()) == 2 * parse(
        "mosa(bottleneck=4)")[0].count(32)
    other, _ = tiny("vit")
    again = burnish.load(other, tmp_path / "a")
    other.eval()
    assert torch.equal(other(**batch).logits, tuned.model(**batch).logits)
    assert all(torch.equal(a.owner, b.owner) for a, b in zip(layers(tuned), layers(again),
                                                             strict=True))


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_in_the_same_bits(stop, tmp_path):
    ends = []
    for cut in (None, stop):
        tuned, batch = start("experts=4")
        for k in range(5):
            if k == cut:
                tuned.save(tmp_path / "a", whole=True)
                tree = {"optimizer": state.optimizer_state(tuned.current_optimizer,
                                                           list(tuned.model.named_parameters())),
                        "timeline": tuned.timeline.state()}
                state.save_tree(tree, tmp_path, "run")
                kept = state.load_tree(tmp_path, "run")
                tuned = load(tiny("vit")[0], tmp_path / "a")
                tuned.model.train()
                tuned.optimizer(lr=1e-2, weight_decay=0.1)
                state.load_optimizer_state(tuned.current_optimizer,
                                           tuned.model.named_parameters(), kept["optimizer"])
                tuned.timeline.load(kept["timeline"])
            tuned.step(batch)
        ends.append(tuned.tensors())
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


def test_blocks_that_run_again_run_the_expert_of_their_forward():
    grads = []
    for more in ("", " + checkpoint"):
        torch.manual_seed(0)
        net, batch = tiny("vit")
        tuned = burnish.tune(net, "mosa(bottleneck=4, experts=3, dropout=0.0)" + more, head=False)
        stir(tuned, size=0.2)
        tuned.optimizer(lr=1e-9)
        tuned.step(batch)
        grads.append({n: p.grad for n, p in tuned.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-4, atol=1e-7)


def test_a_promise_is_of_all_states_and_two_experts():
    tuned, _ = start("experts=4")
    t = turns(tuned)
    t.rehearse(0)
    assert t.schedule.live == {"0", "1", "2", "3"}
    t.rehearse(1)
    assert t.schedule.live == set(map(str, t.drawn(1)))


# -- what it says ----------------------------------------------------------------------------------
def test_counts_and_defaults(published):
    (m,) = parse("mosa")
    assert m.settings() == {
        "targets": None, "bottleneck": 64, "experts": 4, "mask": "matrix", "share": "down",
        "scale": 0.1, "act": "relu", "dropout": 0.1, "weight": 1.0, "seed": 0}
    anatomy, _ = published("ViTConfig", "ViTForImageClassification")
    assert 12 * m.count(768) == 1_189_632
    made = list(m.branch(anatomy))
    assert sum(p.numel() for b in made for p in b.module.parameters()) == 1_189_632
    assert [b.module.up.owner.shape for b in made] == [(768, 64)] * 12
    assert not torch.equal(made[0].module.up.owner, made[1].module.up.owner)
    (whole,) = parse("mosa(share='none', mask='row')")
    anatomy, _ = published("ViTConfig", "ViTForImageClassification", num_hidden_layers=1)
    (b,) = whole.branch(anatomy)
    assert sum(p.numel() for p in b.module.parameters()) == m.count(768)
    assert torch.bincount(b.module.down.owner[0].long()).tolist() == [192] * 4
    assert b.module.scale == 0.1 and b.module.dropout == 0.1


@pytest.mark.parametrize("model, at, reads", [
    ("vit", "vit.layers.0.mlp", "vit.layers.0.mlp"),
    ("bert", "bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.intermediate.dense")])
def test_it_stands_beside_the_mlp_or_its_first_and_last_linear(model, at, reads):
    first = next(iter(parse("mosa(bottleneck=4)")[0].branch(Anatomy.of(tiny(model)[0]))))
    assert (first.write, first.read) == (at, (reads, "input"))


@pytest.mark.parametrize("settings", ["experts=1", "experts=256", "weight=-0.1", "dropout=1.0",
                                      "dropout=-0.1"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(RecipeError, match="^mosa: "):
        parse(f"mosa({settings})")


def test_refusals():
    assert parse("mosa(experts=255, weight=0, dropout=0)") and parse("mosa(experts=2)")
    assert [parse(f"mosa({s})")[0].sees_run for s in ("weight=0", "weight=0.1")] == [False, True]
    with pytest.raises(RecipeError, match="which experts run"):
        parse("mosa + mosa(bottleneck=8)")
    with pytest.raises(RecipeError, match="mezo"):
        parse("mosa + mezo")
    with pytest.raises(burnish.BurnishError):
        burnish.tune(nn.Sequential(nn.Linear(3, 2)), "mosa")
