"""SNELL on models: counts, zeros, what is kept, merge. Its mathematics: blocks/test_tiled.py."""

from __future__ import annotations

import pytest
import torch
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
                                            ("norm_p=0.5", "norm_p")])
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


def test_the_start_is_as_near_the_base_as_published():                     # findings 6
    """Delta has an rms of 2.7e-6 on 768 x 768 at rank 8, K one of 1.28e-3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768))
    tuned = burnish.tune(model, "snell(rank=8, s=0.0, magnitude='signed_square')", head=False)
    (t,) = terms(tuned)
    assert float(t.dense().square().mean().sqrt()) == pytest.approx(2.7e-6, rel=0.2)
    assert float(kernel(t.A, t.B).square().mean().sqrt()) == pytest.approx(1.28e-3, rel=0.1)


def test_defaults_are_the_published_ones():
    assert burnish.parse("snell")[0].settings() == {
        "targets": None, "rank": 8, "s": 0.5, "norm_p": 2.0, "magnitude": "auto"}


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
