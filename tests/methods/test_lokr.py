"""LoKr: one Kronecker product, its second factor of low rank."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.kronecker import Kronecker
from burnish.blocks.weight.term import Term
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.methods.delta.tensor.lokr import split
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def whole(factors):
    """A factor as one matrix."""
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def dense(term):
    return written_out(term.C, term.B, term.scale)


def written_out(C, B, scale):
    """s C (x) B, entry by entry: Delta[a o2 + c, b i2 + d] = s C[a, b] B[c, d]."""
    C, B = whole(C), whole(B)
    return scale * torch.einsum("ab,cd->acbd", C, B).reshape(
        C.shape[0] * B.shape[0], C.shape[1] * B.shape[1])


@pytest.mark.parametrize("recipe", [
    "lokr(rank=2)", "lokr(rank=2, alpha=3)", "lokr(rank=64)", "lokr(rank=2, factor=4)",
    "lokr(rank=1, decompose_both=True)"])
def test_outputs_and_gradients_are_those_of_the_equation(recipe):
    model = nn.Sequential(nn.Linear(32, 48)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    (_, term), = tuned.terms(Kronecker)
    term.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    n = len(list(term.C))
    follows(tuned, lambda x, *p: F.linear(x, W + written_out(p[:n], p[n:], term.scale), bias),
            [*term.C, *term.B], (5, 3, 32))


def test_its_rank_is_the_product_of_ranks():
    model = nn.Sequential(nn.Linear(64, 64))
    tuned = burnish.tune(model, "lokr(rank=2)", head=False, targets="0")
    (_, term), = tuned.terms(Kronecker)
    term.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    assert int(torch.linalg.matrix_rank(term.dense())) == 8 * 2


def test_counts():
    place = Place("a", "weight", "linear", 4096, 4096)
    assert parse("lokr(rank=8, factor=16)")[0].count(place) == 4_352
    assert parse("lokr(rank=128, factor=16)")[0].count(place) == 65_792
    for recipe in ("lokr(rank=2)", "lokr(rank=64)", "lokr(rank=1, decompose_both=True)"):
        tuned = burnish.tune(nn.Sequential(nn.Linear(32, 48)), recipe, head=False, targets="0")
        assert sum(p.numel() for p in tuned.parameters()) == \
            tuned.recipe[0].count(Place("0", "weight", "linear", 48, 32))


def test_the_start_is_the_base():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "lokr(rank=2)")
    assert torch.equal(net(**batch).logits, want)


@pytest.mark.parametrize("n, factor, pair", [(256, -1, (16, 16)), (128, -1, (8, 16)),
                                             (128, 4, (4, 32)), (48, 5, (4, 12)),
                                             (127, -1, (1, 127))])
def test_sides_are_split(n, factor, pair):
    assert split(n, factor) == pair


@pytest.mark.parametrize("args", [{"r": 2, "alpha": 3}, {"r": 1, "alpha": 2, "both": True},
                                  {"r": 2, "alpha": 2, "factor": 4}])
def test_it_is_what_peft_computes(args):
    """peft's w1 is C, its w2 is B; the same tensors give the same outputs."""
    import peft

    both, factor = args.get("both", False), args.get("factor", -1)
    base = nn.Sequential(nn.Linear(32, 48))
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.LoKrConfig(
        r=args["r"], alpha=args["alpha"], decompose_both=both, decompose_factor=factor,
        target_modules=["0"], init_weights=False))
    tuned = burnish.tune(ours, f"lokr(rank={args['r']}, alpha={args['alpha']}, factor={factor}, "
                         f"decompose_both={both})", head=False, targets="0")
    (_, term), = tuned.terms(Kronecker)
    held = {n: p for n, p in theirs.named_parameters() if "lokr_w" in n}

    def of(which):
        return [p for n, p in sorted(held.items()) if f"lokr_{which}" in n]

    with torch.no_grad():
        for mine, his in zip((*term.C, *term.B), (*of("w1"), *of("w2")), strict=True):
            mine.copy_(his)
    x = torch.randn(5, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_prime_sides_are_refused():
    with pytest.raises(RecipeError, match="no sides to split"):
        burnish.tune(nn.Sequential(nn.Linear(7, 5)), "lokr(rank=1)", head=False, targets="0")


def test_defaults_are_the_published_ones():
    assert burnish.parse("lokr")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 8.0, "factor": -1, "decompose_both": False,
        "tucker": False, "rank_dropout": 0.0, "rank_dropout_scale": False, "module_dropout": 0.0}


def test_decay_leaves_it_alone():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "lokr(rank=2)", targets="0",
                         head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


@pytest.mark.parametrize("settings", ["rank=1", "factor=-1", "factor=1", "factor=2"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"lokr({settings})")


@pytest.mark.parametrize("settings", ["rank=0", "factor=0", "factor=-2"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^lokr"):
        burnish.parse(f"lokr({settings})")


@pytest.mark.parametrize("recipe, shapes, scale", [
    # 48 = 6 x 8, 32 = 4 x 8: a factor is whole from half of its longer side on
    ("lokr(rank=3, alpha=6)", [(6, 4), (8, 3), (3, 8)], 2.0),
    ("lokr(rank=4, alpha=6)", [(6, 4), (8, 8)], 1.0),
    ("lokr(rank=2, alpha=6, decompose_both=True)", [(6, 2), (2, 4), (8, 2), (2, 8)], 3.0),
    ("lokr(rank=3, alpha=6, decompose_both=True)", [(6, 4), (8, 3), (3, 8)], 2.0),
    ("lokr(rank=2, alpha=6, factor=2)", [(2, 2), (24, 2), (2, 16)], 3.0),
])
def test_which_factors_are_whole(recipe, shapes, scale):
    tuned = burnish.tune(nn.Sequential(nn.Linear(32, 48)), recipe, head=False, targets="0")
    (_, term), = tuned.terms(Kronecker)
    assert [tuple(p.shape) for p in (*term.C, *term.B)] == shapes and term.scale == scale
    assert tuned.recipe[0].count(Place("0", "weight", "linear", 48, 32)) == \
        sum(a * b for a, b in shapes)


@pytest.mark.parametrize("n, factor, pair", [
    (100, 30, (10, 10)), (100, 20, (20, 5)), (64, 1, (1, 64)), (36, 7, (6, 6)), (37, 6, (1, 37)),
    (50, -1, (5, 10)), (2, -1, (1, 2))])
def test_sides_at_the_bounds_are_split(n, factor, pair):
    assert split(n, factor) == pair


def test_one_side_may_be_prime():
    burnish.tune(nn.Sequential(nn.Linear(16, 7)), "lokr(rank=1)", head=False, targets="0")
    with pytest.raises(RecipeError, match="no sides to split"):
        burnish.tune(nn.Sequential(nn.Linear(16, 8)), "lokr(rank=1, factor=1)", head=False,
                     targets="0")


def test_what_is_drawn_is_even_within_one_over_the_root_of_its_columns():
    tuned = burnish.tune(nn.Sequential(nn.Linear(2304, 2304)), "lokr(rank=16)", head=False,
                         targets="0")
    (_, term), = tuned.terms(Kronecker)
    (C,), (up, down) = term.C, term.B
    for p, columns in ((C, 48), (up, 16)):
        p = p.detach() * columns**0.5
        assert 0.98 < float(p.max()) <= 1 and -1 <= float(p.min()) < -0.98
        assert float(p.square().mean()) == pytest.approx(1 / 3, rel=0.1)
    assert not down.any()


# -- convolutions -------------------------------------------------------------------------------
CONVS = {"square": (nn.Conv2d, (8, 12, 3), {"padding": 1, "stride": 2}),
         "grouped": (nn.Conv2d, (8, 12, 3), {"groups": 2}),
         "oblong": (nn.Conv2d, (6, 8, (1, 3)), {"dilation": 2}),
         "line": (nn.Conv1d, (8, 12, 3), {}), "point": (nn.Conv2d, (8, 12, 1), {})}
KERNELS = ["lokr(rank=1)", "lokr(rank=1, tucker=True)", "lokr(rank=16)",
           "lokr(rank=1, decompose_both=True, tucker=True)"]


def kernel_of(term, weight):
    """Delta[a o2 + c, b i2 + d, u] = s C[a, b] B[c, d, u], B[c, d, u] = sum U[c, p] T[p, q, u]
    V[q, d] where it has a core, entry by entry; in the weight's shape."""
    C, k = whole(term.C), weight[0, 0].numel()
    if len(term.B) == 3:
        U, T, V = term.B
        B = torch.einsum("cp,pqu,qd->cdu", U, T.unflatten(1, (-1, k)), V)
    else:
        B = whole(term.B).unflatten(1, (-1, k))
    return term.scale * torch.einsum("ab,cdu->acbdu", C, B).reshape(weight.shape)


@pytest.mark.parametrize("recipe", KERNELS)
@pytest.mark.parametrize("conv", CONVS)
def test_on_a_convolution_it_is_the_equation(conv, recipe):
    cls, args, kw = CONVS[conv]
    model = nn.Sequential(cls(*args, **kw)).double()
    stock = copy.deepcopy(model[0])
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    (_, term), = tuned.terms(Kronecker)
    assert (len(term.B) == 3) == ("tucker" in recipe and stock.weight[0, 0].numel() > 1)
    assert sum(p.numel() for p in tuned.parameters()) == \
        tuned.recipe[0].count(tuned.anatomy.places[0])
    x = torch.randn(2, args[0], *(7,) * (stock.weight.dim() - 2), dtype=torch.float64,
                    requires_grad=True)
    assert torch.equal(model(x), stock(x)), "step 0 is the base"
    term.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    W = stock.weight.detach() + kernel_of(term, stock.weight)
    want, got = stock._conv_forward(x, W, stock.bias), model(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    wanted, g = [x, *term.parameters()], torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("recipe", KERNELS[:3])
def test_the_path_on_tokens_is_the_matrix(recipe):
    """A convolution's path is not run on tokens; it says the same as the matrix all the same."""
    tuned = burnish.tune(nn.Sequential(nn.Conv2d(8, 12, 3)), recipe, head=False, targets="0")
    (_, term), = tuned.terms(Kronecker)
    with torch.no_grad():
        term.double().B[-1].normal_()
    h = torch.randn(5, 72, dtype=torch.float64)
    torch.testing.assert_close(term.path(h), h @ term.dense().t(), rtol=1e-10, atol=1e-12)


def test_it_keeps_what_it_says():
    assert keeps_what_it_says("lokr", "vit") is None


def test_a_kernel_of_two_has_a_core_of_two():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(16, 16, 2)).double()
    tuned = burnish.tune(net, "lokr(rank=1, tucker=True)", targets="0", head=False)
    (_, term), = tuned.terms(Kronecker)
    assert [tuple(p.shape) for p in term.B] == [(4, 1), (1, 2), (1, 4)]
    (method,) = burnish.parse("lokr(rank=1, tucker=True)")
    place = Place("0", "weight", "conv", 16, 32, kernel=2)
    assert sum(p.numel() for p in tuned.parameters()) == method.count(place) == 16 + 4 + 2 + 4


@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Conv1d(12, 8, 2)], ids=["linear", "conv"])
def test_a_frozen_update_hands_the_gradient_on(layer):
    """Beside another that trains: x gets its gradient through both, and nothing of x is kept."""
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(layer)).double()
    tuned = burnish.tune(net, "lokr(rank=2)", targets="0", head=False)
    (_, term), = tuned.terms(Kronecker)
    term.double()
    for p in term.parameters():
        nn.init.normal_(p)
    conv = isinstance(layer, nn.Conv1d)
    x = torch.randn(*((3, 12, 5) if conv else (3, 12)), dtype=torch.float64, requires_grad=True)
    for p in tuned.parameters():
        p.requires_grad_(False)
    W = (net[0].weight.flatten(1) + term.dense()).view(net[0].weight.shape)
    op = nn.functional.conv1d if conv else nn.functional.linear
    want = op(x, W, net[0].bias)
    got = net(x)
    g = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, x, g)[0],
                               torch.autograd.grad(want, x, g)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("word", ["rank_dropout", "module_dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), f"lokr(rank=2, {word}=0.25)",
                         targets="0", head=False)
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^lokr: {word} is a probability"):
            burnish.parse(f"lokr({word}={p})")
    for scales in (False, True):
        tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), targets="0", head=False, recipe=(
            f"lokr(rank=2, rank_dropout=0.5, rank_dropout_scale={scales})"))
        assert next(tuned.terms(Term))[1].rescale is scales
