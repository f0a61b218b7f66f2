"""SNELL on models: counts, zeros, what is kept, merge. Its mathematics: blocks/test_tiled.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.testing.models import tiny

VIT_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "image_size": 224, "patch_size": 16}


@pytest.mark.parametrize("rank, expected", [(8, 1_327_104), (16, 2_654_208), (32, 5_308_416)])
def test_counts_on_vit_b(rank, expected):
    anatomy = Anatomy.of(tiny("vit", meta=True, **VIT_B)[0])
    places = match(anatomy, None)
    assert len(places) == 72
    assert sum(parse(f"snell(rank={rank})")[0].count(p) for p in places) == expected


def test_the_class_token_trains_beside_it():
    """The authors' trainable part but for the head: 1,327,104 and a token of 768."""
    net, _ = tiny("vit", meta=True, **VIT_B)
    batch = {"pixel_values": torch.zeros(1, 3, 224, 224, device="meta"),
             "labels": torch.zeros(1, dtype=torch.long, device="meta")}
    recipe = "snell(rank=8) + full(targets='cls_token')"
    assert burnish.simulate(net, recipe, batch, head=False).trainable == 1_327_104 + 768


def terms(tuned):
    return [t for _, t in tuned.terms(KernelDelta)]


def stirred(recipe="snell(rank=4, s=0.7)", model="vit"):
    net, batch = tiny(model)
    tuned = burnish.tune(net.eval(), recipe)
    with torch.no_grad():
        for t in terms(tuned):
            t.A.mul_(5)
    return tuned, batch


def test_every_matrix_has_its_own_competition():
    tuned, _ = stirred()
    assert len(terms(tuned)) == 12
    for t in terms(tuned):
        zeros = int((t.dense() == 0).sum())
        assert abs(zeros - 0.7 * t.out * t.inp) <= 1


def test_the_support_moves_and_no_index_is_stored():
    tuned, batch = stirred()
    first = [t.dense() != 0 for t in terms(tuned)]
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    assert any((a != (t.dense() != 0)).any() for a, t in zip(first, terms(tuned), strict=True))
    stored = {n for n in tuned.tensors() if ".burnish." in n}
    assert {n.rpartition(".")[2] for n in stored} == {"A", "B", "_extra_state"}


def test_the_start_is_near_the_base():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "snell(rank=4)")
    got = net(**batch).logits
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


def test_merged_in_fp32():
    tuned, batch = stirred()
    want = tuned.model(**batch).logits
    torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [32, 256])
def test_a_layer_keeps_its_input_and_one_number(width):
    model = nn.Sequential(nn.Linear(16, width, bias=False))
    tuned = burnish.tune(model, "snell(rank=4)")
    tuned.state.tape.lean, kept = False, []
    tuned.state.tape.pack = lambda t: kept.append(t) or t
    tuned.state.tape.unpack = lambda t: t
    model(torch.randn(3, 16, requires_grad=True))
    assert [tuple(t.shape) for t in kept if not isinstance(t, nn.Parameter)] == [(3, 16)]


def test_three_projections_keep_one_input():
    """q, k and v read one tensor; it waits once."""
    tuned, batch = stirred()
    kept = {}
    pack = tuned.state.tape.pack

    def see(t):
        kept.setdefault(t.untyped_storage()._cdata, []).append(tuple(t.shape))
        return pack(t)

    tuned.state.tape.pack = see
    tuned.model(**batch)
    inputs = [k for k in kept.values() if k.count((2, 17, 32)) >= 3]
    assert len(inputs) == 2                              # one per block


def test_every_factor_trains_with_frozen_embeddings_and_checkpointing():
    """Nothing below the first block carries a gradient; the factors get theirs all the same."""
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "snell(rank=4) + checkpoint")
    tuned.loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())


def test_the_dense_linear_form_is_the_kernel_itself():
    tuned, batch = stirred("snell(rank=4, s=0.0, magnitude='linear')")
    t = terms(tuned)[0]
    torch.testing.assert_close(t.dense(), t.kernel_reference())


@pytest.mark.parametrize("settings, word", [("rank=7", "rank=8"), ("rank=0", "rank=2"),
                                            ("s=1.0", r"\[0, 1\)"), ("s=-0.1", r"\[0, 1\)"),
                                            ("norm_p=0.5", "norm_p"), ("dropout=1.0", "dropout is"),
                                            ("drop_path=-0.1", "drop_path is")])
def test_settings_that_make_no_sense(settings, word):
    with pytest.raises(RecipeError, match=word):
        parse(f"snell({settings})")


def kernel(A, B, p=2.0):
    """K[o, i] = 0.1 (||B_1[o] - A_1[i]||_p - ||B_2[o] - A_2[i]||_p)."""
    d = [((B[h][:, None] - A[h][None]).abs() ** p).sum(-1) ** (1 / p) for h in (0, 1)]
    return 0.1 * (d[0] - d[1])


@pytest.mark.parametrize("p, s, magnitude", [(2.0, 0.6, "signed_square"), (3.0, 0.3, "linear"),
                                             (1.5, 0.0, "linear"), (3.0, 0.5, "signed_square"),
                                             (2.0, 0.0, "signed_square"), (2.0, 0.0, "auto"),
                                             (2.0, 0.2, "auto")])
def test_the_equation_written_out(p, s, magnitude):                        # findings 6
    """Delta = K sg(|K| 1[|K| > tau]), or K 1[...] in the linear form; outputs and gradients. "auto"
    is the authors' own run: at s = 0 unsquared and dense, above squared."""     # findings 3.9
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    tuned = burnish.tune(model, f"snell(rank=6, s={s}, norm_p={p}, magnitude={magnitude!r})",
                         head=False)
    (t,) = terms(tuned)
    t.double()
    with torch.no_grad():
        for v in (t.A, t.B):
            v.copy_(torch.randn(v.shape).double())
    x = torch.randn(5, 12).double().requires_grad_()
    g = torch.randn(5, 10).double()
    K, squared = kernel(t.A, t.B, p), magnitude == "signed_square" or magnitude == "auto" and s > 0
    alive = K.abs() > torch.quantile(K.detach().abs().flatten(), s) if s else torch.ones_like(K)
    factor = alive * (K.detach().abs() if squared else 1.0)
    y = x @ (model[0].weight + K * factor).t() + model[0].bias
    got = model(x)
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, (t.A, t.B, x), g),
                    torch.autograd.grad(y, (t.A, t.B, x), g), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rank, of_K, of_delta", [(8, 1.28e-3, 2.7e-6), (32, 6.2e-4, 6.7e-7)])
def test_the_start_is_as_near_the_base_as_published(rank, of_K, of_delta):  # findings 6
    """Roots of mean squares on 768 x 768."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768))
    tuned = burnish.tune(model, f"snell(rank={rank}, s=0.0, magnitude='signed_square')", head=False)
    (t,) = terms(tuned)
    assert float(t.dense().detach().square().mean().sqrt()) == pytest.approx(of_delta, rel=0.1)
    assert float(kernel(t.A, t.B).detach().square().mean().sqrt()) == pytest.approx(of_K, rel=0.05)


def test_defaults_are_the_published_ones():
    assert burnish.parse("snell")[0].settings() == {
        "targets": None, "rank": 8, "s": 0.5, "norm_p": 2.0, "magnitude": "auto",
        "dropout": 0.0, "drop_path": 0.0}


def test_what_a_token_keeps_besides_the_input():
    from burnish.core.site import Place

    place = Place("l", "weight", "linear", 24, 16)
    assert burnish.parse("snell")[0].per_token(place) == 0


def test_the_thinnest_pair_of_heads_is_one_wide():
    assert burnish.parse("snell(rank=2)")[0].count(burnish.core.site.Place(
        "l", "weight", "linear", 24, 16)) == 2 * (24 + 16)
    for rank in (0, 1, 3):
        with pytest.raises(RecipeError, match="must be even and at least 2"):
            burnish.parse(f"snell(rank={rank})")


# -- what drops: the mathematics stands in blocks/test_dropped.py ------------------------------
class Attention(nn.Module):
    """q, k, v read one tensor; the output projection another."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(16, 16))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("recipe", ["snell(rank=6, s=0.4, dropout=0.5)",
                                    "snell(rank=6, s=0.4, dropout=0.5, drop_path=0.5)",
                                    "snell(rank=6, s=0.4, dropout=0.5) + lean(on=False)"])
def test_q_k_and_v_share_one_mask_and_the_output_projection_has_none(recipe):  # findings 3.9
    """In float64, under the masks of stock torch: one drop(x) for three layers, and no second."""
    torch.manual_seed(0)
    model = Attention().double()
    tuned = burnish.tune(model, recipe, targets="q_proj,k_proj,v_proj", head=False)
    theta = {}
    for n, t in tuned.terms(KernelDelta):
        t.double()
        with torch.no_grad():
            t.A.normal_()
            t.B.normal_()
        theta[n.partition(".")[0]] = t
    x = torch.randn(3, 5, 16).double().requires_grad_()
    torch.manual_seed(3)
    xd = F.dropout(x, 0.5, True)
    made = []
    for name in ("q_proj", "k_proj", "v_proj"):
        t, layer = theta[name], getattr(model, name)
        K = kernel(t.A, t.B)
        M = K.abs() * (K.abs() > torch.quantile(K.abs().flatten(), 0.4))
        k = torch.ones(3).double()
        if "drop_path" in recipe:                        # after the mask, for each matrix its own
            k = torch.empty(3).double().bernoulli_(0.5) / 0.5
        made.append(F.linear(x, layer.weight, layer.bias)
                    + k.view(3, 1, 1) * (xd @ (K * M.detach()).t()))
    o = model.o_proj
    want = F.linear(F.scaled_dot_product_attention(*made), o.weight, o.bias)
    torch.manual_seed(3)
    got, g = model(x), torch.randn(3, 5, 16).double()
    wanted = [x, *tuned.parameters()]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g),
                    strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("method", ["snell", "snella"])
def test_the_output_projection_drops_no_input_but_its_path(method):        # findings 3.9
    net, _ = tiny("vit")
    tuned = burnish.tune(net, f"{method}(rank=4, dropout=0.1, drop_path=0.2)")
    places = {p.name: p for p in tuned.anatomy.places}
    got = {places[n].role: (t.dropout, t.drop_path) for n, t in tuned.terms(KernelDelta)}
    assert got == {"q": (0.1, 0.2), "k": (0.1, 0.2), "v": (0.1, 0.2), "o": (0.0, 0.2),
                   "fc1": (0.1, 0.2), "fc2": (0.1, 0.2)}
    with pytest.raises(RecipeError, match="dropout acts on none of its targets"):
        burnish.tune(tiny("vit")[0], f"{method}(rank=4, dropout=0.1)", targets="o")
    assert burnish.tune(tiny("vit")[0], f"{method}(rank=4, drop_path=0.1)", targets="o")


@pytest.mark.parametrize("drops", ["dropout=0.1", "drop_path=0.1"])
@pytest.mark.parametrize("model, targets", [("mha", "attn"), ("cnn", "conv")])
def test_what_is_read_as_a_weight_cannot_drop_and_says_so(drops, model, targets):   # findings 3.5
    with pytest.raises(RecipeError, match="drop.* cannot act"):
        burnish.tune(tiny(model)[0], f"snell(rank=4, {drops})", targets=targets)


@pytest.mark.parametrize("recipe", ["snell(rank=4, s=0.3, dropout=0.5, drop_path=0.5)",
                                    "snella(rank=4, dropout=0.5, drop_path=0.5)"])
def test_blocks_that_run_again_draw_again(recipe):
    """The same gradients with `+ checkpoint`."""
    grads = []
    for more in ("", " + checkpoint"):
        net, batch = tiny("vit")
        tuned = burnish.tune(net, recipe + more, head=False)
        with torch.no_grad():
            for t in terms(tuned):
                t.A.mul_(20)
        torch.manual_seed(5)
        tuned.loss(batch).backward()
        grads.append([p.grad.clone() for p in tuned.parameters()])
    assert sum(float(g.abs().sum()) for g in grads[0]) > 0
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_each_sample_keeps_or_loses_the_whole_update():                    # findings 3.9
    """Of the samples of a batch some have the base's output, the others twice the update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    base = model[0].weight.detach().clone()
    tuned = burnish.tune(model, "snell(rank=4, s=0.3, drop_path=0.5)", targets="0", head=False)
    (t,) = terms(tuned)
    t.double()
    with torch.no_grad():
        t.A.normal_()
        t.B.normal_()
        x = torch.randn(32, 3, 16).double()
        added = model(x) - x @ base.t()
        ratio = added.flatten(1).norm(dim=1) / (x @ t.dense().t()).flatten(1).norm(dim=1)
    alive = ratio > 0.5
    assert 4 < int(alive.sum()) < 28
    torch.testing.assert_close(ratio, 2.0 * alive.double())


def test_a_simulated_step_takes_what_a_real_one_does():
    from burnish.memory import measure, simulate

    recipe = "snell(rank=4, dropout=0.1, drop_path=0.1)"
    net, batch = tiny("vit", batch=8)
    promise = simulate(net, recipe, batch)
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(lr=1e-3)
    assert promise.peak_bytes == pytest.approx(measure(tuned, batch).peak_bytes, rel=0.03)


def test_a_dropped_update_under_a_transform_is_the_same_function():
    """functional_call runs the plain form, under the same masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).double()
    tuned = burnish.tune(model, "snell(rank=4, s=0.3, dropout=0.5, drop_path=0.5)", targets="0",
                         head=False)
    (t,) = terms(tuned)
    t.double()
    with torch.no_grad():
        t.A.normal_()
        t.B.normal_()
    x = torch.randn(5, 3, 16).double().requires_grad_()
    torch.manual_seed(2)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)

    params = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(2)
    y = torch.func.functional_call(model, params, (x,))
    (plain,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(plain, want)
