"""R-AMT: masks straight through their step, and a task gradient that the base decides about."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.binary import Binary, Bits
from burnish.core.site import Place
from burnish.methods.delta.sparse.r_amt import Decided, counts, probability
from burnish.testing.models import tiny
from burnish.testing.stir import stir

VISION = "vision_model*self_attn*"


def handler(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "r_amt")


# -- the mask -------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2", "vit", "mha"])
def test_the_equation_written_out(beside, model):
    """W' = W * 1[m > cut], dm = dW' * W, of every projection of attention."""
    one = beside(model, "r_amt(cut=0.02, init=0.03)")
    assert len(one.theta) == {"llama": 8, "gpt2": 4, "vit": 8, "mha": 2}[model]
    held = {}
    for (path, _), m in one.theta.items():
        module, kind = one.base.get_submodule(path), type(one.base.get_submodule(path))
        param = "weight" if kind is not nn.MultiheadAttention else \
            "in_proj_weight" if len(m) == 96 else "out_proj.weight"
        W = module.get_parameter(param)
        b = (m.detach() > 0.02).double() + m - m.detach()
        assert 0.2 < float(b.detach().mean()) < 0.8
        held[f"{path}.{param}"] = W * (b.t() if kind.__name__ == "Conv1D" else b)
    want = torch.func.functional_call(one.base, held, (), one.batch).logits
    one.agree(want)


def test_rows_of_a_fused_weight_and_an_mlp_where_they_are_named(beside):
    one = beside("gpt2", "r_amt(targets='v,fc1', cut=0.02, init=0.03)")
    assert [tuple(m.shape) for m in one.theta.values()] == [(32, 32), (128, 32)] * 2
    held = {}
    for (path, _), m in one.theta.items():
        W = one.base.get_submodule(path).weight
        b = ((m.detach() > 0.02).double() + m - m.detach()).t()
        if path.endswith("c_attn"):
            b = torch.cat([torch.ones(32, 64, dtype=torch.float64), b], 1)
        held[f"{path}.weight"] = W * b
    one.agree(torch.func.functional_call(one.base, held, (), one.batch).logits)


def test_above_the_cut_is_one_and_on_it_zero():
    term = Binary(torch.Size([1, 3]), 0.01, 0.5)
    with torch.no_grad():
        term.m.copy_(torch.tensor([[0.5, 0.51, 0.49]]))
    assert term.of(torch.ones(1, 3)).tolist() == [[0, 1, 0]]


def test_the_start_is_the_function_itself():
    net, batch = tiny("vit")
    want = net(**batch).logits
    tuned = burnish.tune(net, "r_amt", head=False)
    assert torch.equal(net(**batch).logits, want)
    assert all(bool((p == 1e-2).all()) for p in tuned.parameters())
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}


# -- what counts ----------------------------------------------------------------------------------
def test_the_probability():
    g = torch.Generator().manual_seed(0)
    a, k = (torch.randn(500, generator=g, dtype=torch.float64) for _ in range(2))
    P = probability(a, k)
    want = 0.5 * (1 + torch.sign(a) * (a + k) / (a.abs() + k.abs()))
    torch.testing.assert_close(P, want, rtol=1e-9, atol=1e-9)
    assert bool((P >= 0).all()) and bool((P <= 1).all())
    agree = a * k > 0
    torch.testing.assert_close(P[agree], torch.ones_like(P[agree]), rtol=1e-9, atol=1e-9)
    against = ~agree
    torch.testing.assert_close(P[against], (a.abs() / (a.abs() + k.abs()))[against], rtol=1e-9,
                               atol=1e-9)
    assert probability(torch.zeros(1), torch.zeros(1)).tolist() == [0.5]


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_mean_gradient_is_its_probability(alpha):
    """E[((1 - alpha) + alpha 1[P > U]) a] = ((1 - alpha) + alpha P) a; the rest is as it was."""
    torch.manual_seed(0)
    a, k = torch.tensor([0.5, 0.5, -2.0, 1.0]), torch.tensor([-1.5, 1.0, 1.0, -1.0])
    P = torch.tensor([0.25, 1.0, 2 / 3, 0.5])
    torch.testing.assert_close(probability(a, k), P)
    n, total = 20_000, torch.zeros(4)
    many = a.repeat(n, 1)
    counts(many, k.repeat(n, 1), alpha)
    assert many[:, 0].unique().tolist() == pytest.approx([0.5 * (1 - alpha), 0.5])
    total = many.mean(0)
    torch.testing.assert_close(total, (1 - alpha + alpha * P) * a, rtol=0, atol=0.04)
    assert bool((many[:, 1] == 0.5).all())


def test_a_probability_of_none_never_counts():
    """U is in [0, 1): where P = 0 the entry is left out even for U = 0."""
    a, k = torch.full((9,), 1e-30), torch.full((9,), -1.0)
    assert not probability(a, k).any()
    counts(a, k, 1.0)
    assert not a.any()


def decided(tuned, base, batch, T, kl_rows=None):
    """(a, k) by name, from a real copy of the base."""
    names = dict(tuned.named_parameters())
    mine = list(names.values())
    with torch.no_grad():
        teacher = base.eval()(**batch).logits
    out = tuned.model(**batch)
    a = torch.autograd.grad(out.loss, mine, retain_graph=True)
    q, p = torch.softmax(out.logits / T, -1), torch.softmax(teacher / T, -1)
    rows = (p * (p.log() - q.log())).sum(-1)
    rows = rows if kl_rows is None else rows[kl_rows]
    k = torch.autograd.grad(T * T * rows.mean(), mine)
    return dict(zip(names, a, strict=True)), dict(zip(names, k, strict=True))


@pytest.mark.parametrize("model, T", [("vit", 1.0), ("bert", 3.0), ("llama", 1.0)])
def test_a_step_takes_the_gradient_that_counts(model, T):
    """Gradients that the optimizer meets: those of the loss, where P > U, and nothing of k."""
    net, batch = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"r_amt(temperature={T})", head=False)
    for p in tuned.parameters():
        p.data = p.double()
    stir(tuned, size=0.01)
    net.eval()
    rows = None
    if model == "llama":
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, :3] = -100
        rows = torch.zeros(batch["labels"].shape, dtype=torch.bool)
        rows[:, 2:-1] = True                         # row n answers the label n + 1
    a, k = decided(tuned, base, batch, T, rows)
    tuned.optimizer(lr=0.0)
    left = dropped = 0
    tuned.backward(batch)
    P = {n: 0.5 * (1 + a[n].sign() * (a[n] + k[n]) / (a[n].abs() + k[n].abs() + 1e-300)) for n in a}
    for n, p in tuned.named_parameters():
        out = p.grad == 0
        torch.testing.assert_close(p.grad, a[n].masked_fill(out, 0), rtol=1e-6, atol=1e-14)
        real = a[n].abs() > 1e-9 * a[n].abs().max()
        assert not bool((out & real & (P[n] > 1 - 1e-6)).any())
        doubt = real & (P[n] < 1 - 1e-6)
        left, dropped = left + int((doubt & ~out).sum()), dropped + int((doubt & out).sum())
        expected = float((1 - P[n][doubt]).sum())
        spread = float((P[n] * (1 - P[n]))[doubt].sum()) ** 0.5
        assert abs(int((doubt & out).sum()) - expected) < 5 * spread + 1
    assert left and dropped


def test_the_share_that_is_decided_about():
    net, batch = tiny("vit", dtype=torch.float64)
    tuned = stir(burnish.tune(net, "r_amt(alpha=0.25)", head=False), size=0.01)
    net.eval()
    tuned.optimizer(lr=0.0)
    a = tuned.probe(batch).grads
    tuned.backward(batch)
    ratio = torch.cat([(p.grad / a[n]).flatten() for n, p in tuned.named_parameters()
                       if n in a]).nan_to_num(1.0)
    near = [(ratio - v).abs() < 1e-4 for v in (1.0, 0.75)]
    assert bool((near[0] | near[1]).all()) and bool(near[0].any()) and bool(near[1].any())


def test_without_a_difference_from_the_base_every_gradient_counts():
    """At the start the divergence has no gradient: P = 1."""
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "r_amt", head=False)
    net.eval()
    tuned.optimizer(lr=0.0)
    a = tuned.probe(batch).grads
    tuned.backward(batch)
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p.grad, a[n])


def test_micro_batches_add_up_and_each_decides():
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, "r_amt", head=False), size=0.01)
    net.eval()
    tuned.optimizer(lr=0.0)
    grads = []
    for _ in range(2):
        for p in tuned.parameters():
            p.grad = None
        h = handler(tuned)
        tuned.backward(batch)
        grads.append({n: p.grad.clone() for n, p in tuned.named_parameters()})
    assert h.at == (0, 1)
    assert any(not torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    h.at = None
    for p in tuned.parameters():
        p.grad = None
    for _ in range(2):
        tuned.backward(batch)
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p.grad, grads[0][n] + grads[1][n])


def test_decisions_are_drawn_again_alike_and_by_the_seed():
    found = []
    for seed in (0, 0, 1):
        net, batch = tiny("vit")
        tuned = stir(burnish.tune(net, f"r_amt(seed={seed})", head=False), size=0.01)
        tuned.optimizer(lr=0.0)
        torch.manual_seed(seed + 5)                  # of nobody's interest
        tuned.backward(batch)
        found.append(torch.cat([p.grad.flatten() for p in tuned.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class Fake:
    """A pass over tensors of which some are not reached, by the task or by the divergence."""

    index = 3

    def __init__(self, *params):
        self.params = dict(zip("abcdef", params, strict=False))

    def parameters(self):
        return self.params

    def probe(self, of):
        self.looked = of
        return self

    grads = {"a": torch.full((4,), -9.0), "c": torch.ones(4)}


def test_what_one_of_the_passes_does_not_reach_stays_as_it_is():
    a, b, c, d = (nn.Parameter(torch.zeros(4)) for _ in range(4))
    for p in (c, d):
        p.grad = torch.full((4,), 5.0)               # of a micro-batch before
    fake, made = Fake(a, b, c, d), burnish.parse("r_amt(temperature=3.0)")[0]
    handler = Decided(made, {id(p) for p in (a, b, c)}, lambda run, T: (run, T))
    around = handler.around_step(fake)
    next(around)
    assert a.grad is b.grad is c.grad is None and d.grad is not None
    a.grad, b.grad = torch.full((4,), 1e-30), torch.ones(4)
    d.grad = torch.full((4,), 7.0)
    assert next(around, "over") == "over"
    assert not a.grad.any()                          # decided against
    assert b.grad.tolist() == [1] * 4                # nothing to decide by
    assert c.grad.tolist() == [5] * 4                # nothing of this one
    assert d.grad.tolist() == [7] * 4                # no mask
    assert fake.looked("run") == ("run", 3.0) and handler.at == (3, 0)


def test_a_run_that_goes_on_decides_as_one_that_did_not_stop():
    found = []
    for stop in (False, True):
        net, batch = tiny("vit")
        tuned = stir(burnish.tune(net, "r_amt", head=False), size=0.01)
        tuned.optimizer(lr=1e-3)
        tuned.step(batch)
        if stop:
            handler(tuned).at = None
        tuned.backward(batch)
        found.append(torch.cat([p.grad.flatten() for p in tuned.parameters()]))
    assert torch.equal(*found)


def test_what_stands_beside_it_keeps_its_own_gradient():
    """A head, a low-rank update elsewhere: the decision is about the masks alone."""
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, "r_amt + lora(rank=2, targets='mlp')"), size=0.01)
    net.eval()
    tuned.optimizer(lr=0.0)
    a = tuned.probe(batch).grads
    tuned.backward(batch)
    changed = [n for n, p in tuned.named_parameters()
               if not torch.allclose(p.grad, a[n], atol=1e-9)]
    assert changed and all(n.endswith("r_amt.m") for n in changed)


# -- a model that compares pictures with texts ----------------------------------------------------
def clip():
    net, batch = tiny("clip")
    given = {k: v for k, v in batch.items() if k != "return_loss"}
    labels = torch.tensor([1, 0])
    return net, given, lambda out, b: F.cross_entropy(out.logits_per_image, labels)


def test_masks_of_an_image_encoder_learn_and_are_one_bit_each(tmp_path):
    net, batch, loss = clip()
    with torch.no_grad():
        want = net(**batch).logits_per_image
    tuned = burnish.tune(net, f"r_amt(targets='{VISION}')")
    names = [n for n, _ in tuned.named_parameters()]
    assert len(names) == 8 and all(n.startswith("vision_model") for n in names)
    tuned.optimizer(lr=1.5e-3)
    losses = [float(tuned.step(batch, loss=loss)) for _ in range(10)]
    assert losses[-1] < losses[0]
    net.eval()
    moved = net(**batch).logits_per_image
    assert not torch.equal(moved, want)
    zeros = sum(int((p <= 5e-3).sum()) for p in tuned.parameters())
    assert zeros
    tuned.save(tmp_path / "a")
    tuned.save(tmp_path / "whole", whole=True)
    entries = sum(p.numel() for p in tuned.parameters())
    size = {k: max(f.stat().st_size for f in (tmp_path / k).glob("*.safetensors"))
            for k in ("a", "whole")}
    assert size["a"] < entries / 8 + 3000 < size["whole"] - 3 * entries
    other, _, _ = clip()
    again = burnish.load(other, tmp_path / "a")
    assert str(again.recipe).count("stored=True") == 1 and not list(again.parameters())
    assert torch.equal(other.eval()(**batch).logits_per_image, moved)
    assert again.recipe[0].controller(again) is None         # nothing is decided any more
    merged = again.merge()
    torch.testing.assert_close(merged(**batch).logits_per_image, moved)
    named = dict(net.named_parameters())
    assert sum(int((p == 0).sum()) for n, p in named.items()
               if n in {m.partition(".burnish")[0] + ".weight" for m in names}) == 0
    assert sum(int((p == 0).sum()) for n, p in merged.named_parameters()
               if n in {m.partition(".burnish")[0] + ".weight" for m in names}) == zeros
    third, _, _ = clip()
    on = burnish.load(third, tmp_path / "whole")
    on.optimizer(lr=1e-3)
    on.step(batch, loss=loss)


def test_a_bit_is_a_byte_of_eight():
    term = Binary(torch.Size([3, 5]), 0.01, 0.005)
    with torch.no_grad():
        term.m[1, 2], term.m[2, 4] = 0.0, -1.0
    bits = term.finished()["bits"]
    assert bits.dtype == torch.uint8 and bits.numel() == 2
    kept = Bits(torch.Size([3, 5]))
    V = torch.randn(3, 5)
    assert torch.equal(kept.of(V), V)                # ones, until a file says otherwise
    kept.bits.copy_(bits)
    assert torch.equal(kept.of(V), term.of(V).detach())


def test_masks_of_a_file_are_for_files():
    with pytest.raises(burnish.RecipeError, match="stored=True. has the masks of a saved adapter"):
        burnish.tune(tiny("vit")[0], "r_amt(stored=True)")


# -- settings -------------------------------------------------------------------------------------
def test_the_count_of_an_image_encoder(published):
    anatomy, _ = published("CLIPVisionConfig", "CLIPVisionModel", hidden_size=768,
                           intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                           patch_size=16)
    places = [p for p in anatomy.places if p.role in ("q", "k", "v", "o")]
    m = burnish.parse("r_amt")[0]
    assert len(places) == 48 and sum(m.count(p) for p in places) == 28_311_552
    assert sum(p.out * p.inp for p in places) // 8 == 3_538_944
    assert burnish.parse("r_amt(stored=True)")[0].count(places[0]) == 0


def test_defaults():
    assert burnish.parse("r_amt")[0].settings() == {
        "targets": "attention", "alpha": 1.0, "temperature": 1.0, "cut": 5e-3, "init": 1e-2,
        "seed": 0, "stored": False}
    assert burnish.parse("r_amt")[0].count(Place("x", "weight", "linear", 3, 5)) == 15


def test_decay_leaves_the_scores_alone():
    tuned = burnish.tune(tiny("vit")[0], "r_amt", head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


def test_a_flip_takes_as_many_updates_as_the_rate_says():
    """Adam moves a score by its rate at most: at 1e-3 the first mask falls after five."""
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "r_amt", head=False)
    tuned.optimizer(lr=1e-3)
    zeros = []
    for _ in range(7):
        tuned.step(batch)
        zeros.append(sum(int((p <= 5e-3).sum()) for p in tuned.parameters()))
    assert not any(zeros[:4]) and zeros[-1]


@pytest.mark.parametrize("settings", ["alpha=0.0", "alpha=1.1", "temperature=0.0",
                                      "init=0.005", "cut=0.01"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^r_amt"):
        burnish.parse(f"r_amt({settings})")


def test_settings_at_their_bounds_are_taken():
    assert burnish.parse("r_amt(alpha=1.0, temperature=0.001, init=0.0051)")


def test_a_second_function_of_a_weight_is_refused():
    with pytest.raises(burnish.RecipeError, match="the function of W"):
        burnish.parse("r_amt + dora(targets='attention')")
