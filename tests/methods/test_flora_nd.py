"""FLoRA (N-D): a Tucker form with the axes of the weight, against sums over all of its indices."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight import panels
from burnish.blocks.weight.convolved import convolved
from burnish.blocks.weight.tucker import Tucker
from burnish.core.errors import RankError, RecipeError
from burnish.core.site import Place
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

CONVS = {"square": (nn.Conv2d, (6, 8, 3), {"padding": 1, "stride": 2, "dilation": 2}),
         "grouped": (nn.Conv2d, (6, 8, 3), {"groups": 2}),
         "oblong": (nn.Conv2d, (6, 8, (1, 3)), {"padding": 1, "padding_mode": "circular"}),
         "line": (nn.Conv1d, (6, 8, 3), {"padding": "same"}),
         "cube": (nn.Conv3d, (3, 4, 2), {}),
         "turned": (nn.ConvTranspose2d, (6, 8, 3), {"stride": 2})}
#: Delta of the core and the factors, over every axis
SUMS = {2: "ab,oa,ib->oi", 3: "abc,oa,ib,uc->oiu", 4: "abcd,oa,ib,uc,vd->oiuv",
        5: "abcde,oa,ib,uc,vd,we->oiuvw"}


def written_out(scale, G, *U):
    return scale * torch.einsum(SUMS[G.dim()], G, *U)


def made(model, recipe, targets="0"):
    torch.manual_seed(0)
    tuned = burnish.tune(model.double(), recipe, head=False, targets=targets)
    (_, term), = tuned.terms(Tucker)
    term.double()
    return stir(tuned, size=0.3), term


@pytest.mark.parametrize("recipe, ranks", [
    ("flora_nd(rank=3)", (3, 3)), ("flora_nd(rank=3, in_rank=5, scale=2.5)", (3, 5))])
def test_outputs_and_gradients_on_a_linear_are_those_of_the_equation(recipe, ranks):
    model = nn.Sequential(nn.Linear(12, 10))
    tuned, term = made(model, recipe)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    assert term.G.shape == ranks
    s = 2.5 if "scale" in recipe else 1.0
    follows(tuned, lambda x, G, *U: F.linear(x, W + written_out(s, G, *U), bias),
            [term.G, *term.U], (5, 3, 12))


def conv_of(conv):
    cls, args, kw = CONVS[conv]
    torch.manual_seed(0)
    return nn.Sequential(cls(*args, **kw))


@pytest.mark.parametrize("recipe", ["flora_nd(rank=3, in_rank=2, scale=0.5)",
                                    "flora_nd(rank=3, in_rank=2, kernel_rank=2, scale=0.5)"])
@pytest.mark.parametrize("conv", CONVS)
def test_on_a_convolution_it_is_the_equation(conv, recipe, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 40)         # several panels
    model = conv_of(conv)
    stock = copy.deepcopy(model[0]).double()
    tuned, term = made(model, recipe)
    kernel = stock.kernel_size
    assert term.G.shape == (3, 2, *(min(k, 2) if "kernel" in recipe else k for k in kernel))
    turned = isinstance(stock, nn.ConvTranspose2d)
    W = stock.weight.detach()

    def equation(x, G, *U):
        D = written_out(0.5, G, *U)
        if turned:
            return F.conv_transpose2d(x, W + D.transpose(0, 1), stock.bias, stock.stride)
        return stock._conv_forward(x, W + D, stock.bias)

    follows(tuned, equation, [term.G, *term.U], (2, stock.in_channels, *(7,) * len(kernel)))


def test_panels_are_made_without_the_rest(monkeypatch):
    model = conv_of("square")
    made(model, "flora_nd(rank=3)")
    monkeypatch.setattr(panels, "PANEL", 40)
    monkeypatch.setattr(Tucker, "dense", None)
    widths, panel = [], Tucker.panel
    monkeypatch.setattr(Tucker, "panel",
                        lambda self, a, b: widths.append(b - a) or panel(self, a, b))
    model(torch.randn(1, 6, 7, 7, dtype=torch.float64)).sum().backward()
    assert max(widths) == 5 and sum(widths) % 54 == 0, widths


@pytest.mark.parametrize("conv", [c for c in CONVS if c != "turned"])
def test_three_convolutions_are_the_dense_update(conv):
    model = conv_of(conv)
    stock = copy.deepcopy(model[0]).double()
    _, term = made(model, "flora_nd(rank=3, in_rank=2, scale=0.5)")
    x = torch.randn(2, stock.in_channels, *(7,) * len(stock.kernel_size), dtype=torch.float64)
    want = stock._conv_forward(x, term.dense().view(stock.weight.shape), None)
    torch.testing.assert_close(convolved(term, model[0], x), want, rtol=1e-10, atol=1e-12)


def test_dropout_acts_on_what_the_update_reads():
    """On a linear and on a convolution: the update sees drop(x), drawn again in backward."""
    for model, x in ((nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6, dtype=torch.float64)),
                     (nn.Sequential(nn.Conv2d(6, 5, 3)),
                      torch.randn(2, 6, 5, 5, dtype=torch.float64))):
        stock = copy.deepcopy(model[0]).double()
        tuned, term = made(model, "flora_nd(rank=2, dropout=0.5)")
        torch.manual_seed(3)
        dropped = F.dropout(x, 0.5, True)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        got = model(leaf)
        D = term.dense().view(stock.weight.shape)
        run = (lambda x, W: F.linear(x, W)) if x.dim() == 2 else F.conv2d
        want = stock(x) + run(dropped, D)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        g, params = torch.randn_like(want), list(term.parameters())
        for a, b in zip(torch.autograd.grad(got, params, g), torch.autograd.grad(want, params, g),
                        strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        model.eval()
        torch.testing.assert_close(model(x), stock(x) + run(x, D), rtol=1e-10, atol=1e-12)


def test_every_unfolding_has_the_rank_of_its_axis():
    _, term = made(nn.Sequential(nn.Conv2d(8, 9, 4)), "flora_nd(rank=3, in_rank=2, kernel_rank=2)")
    D = term.dense().view(9, 8, 4, 4)
    ranks = [int(torch.linalg.matrix_rank(D.movedim(a, 0).flatten(1))) for a in range(4)]
    assert ranks == [3, 2, 2, 2]


def test_an_embedding_is_a_table():
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=4))
    table = model[0].weight.detach().double()
    tuned, term = made(model, "flora_nd(rank=2, in_rank=3, scale=0.5)")
    index, g = torch.tensor([[1, 4, 1], [10, 0, 4]]), torch.randn(2, 3, 6, dtype=torch.float64)
    theta = [t.detach().clone().requires_grad_() for t in (term.G, *term.U)]
    want = F.embedding(index, table + written_out(0.5, *theta).t(), 4)
    got = model(index)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, [term.G, *term.U], g),
                    torch.autograd.grad(want, theta, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_start_is_the_base_and_the_core_moves_first():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "flora_nd(rank=2)")
    assert torch.equal(net(**batch).logits, want)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(300, 200, 3))
    tuned = burnish.tune(model, "flora_nd(rank=50, in_rank=20)", head=False, targets="0")
    (_, term), = tuned.terms(Tucker)
    assert not term.G.any()
    for U, r in zip(list(term.U)[:2], (50, 20), strict=True):
        assert float(U.detach().std()) == pytest.approx(math.sqrt(0.5 / r), rel=0.03)
    grads = torch.autograd.grad(model(torch.randn(1, 300, 3, 3)).sum(), [term.G, *term.U])
    assert grads[0].any() and not any(g.any() for g in grads[1:])


def test_counts():
    (method,) = burnish.parse("flora_nd")
    assert method.count(Place("a", "weight", "linear", 4096, 4096)) == 65_600
    conv = Place("a", "weight", "conv", 256, 2304, kernel=9, axes=(3, 3))
    assert method.count(conv) == 4_690
    model = nn.Sequential(nn.Conv2d(256, 256, 3))
    tuned = burnish.tune(model, "flora_nd", targets="0", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 4_690
    assert burnish.parse("flora_nd(rank=8, in_rank=4, kernel_rank=2)")[0].count(conv) == \
        8 * 4 * 4 + 256 * 12 + 3 * 4


def test_what_cannot_act_is_refused():
    def on(model, settings):
        return burnish.tune(nn.Sequential(model), f"flora_nd({settings})", head=False, targets="0")

    on(nn.Linear(8, 4), "rank=4, in_rank=8")
    with pytest.raises(RankError, match="flora_nd: rank 5 does not fit 0.weight, whose axis has 4"):
        on(nn.Linear(8, 4), "rank=5")
    with pytest.raises(RankError, match="in_rank 9 does not fit 0.weight, whose axis has 8"):
        on(nn.Linear(8, 4), "rank=1, in_rank=9")
    with pytest.raises(RankError, match="in_rank 4 does not fit 0.weight, whose axis has 3"):
        on(nn.Conv2d(6, 8, 3, groups=2), "rank=4")
    on(nn.Conv2d(4, 4, (1, 3)), "rank=4, kernel_rank=3")
    on(nn.Linear(4, 4), "rank=4, kernel_rank=9")
    with pytest.raises(RankError, match="kernel_rank 4 does not fit 0.weight, .* 1 x 3"):
        on(nn.Conv2d(4, 4, (1, 3)), "rank=4, kernel_rank=4")
    for settings in ("rank=0", "in_rank=0", "kernel_rank=0"):
        with pytest.raises(RecipeError, match="^flora_nd: every rank"):
            burnish.parse(f"flora_nd({settings})")
    with pytest.raises(RecipeError, match="flora_nd: dropout"):
        burnish.parse("flora_nd(dropout=1.0)")
    burnish.parse("flora_nd(rank=1, in_rank=1, kernel_rank=1)")


def test_defaults_decay_and_cost():
    assert burnish.parse("flora_nd")[0].settings() == {
        "targets": None, "rank": 8, "in_rank": None, "kernel_rank": None, "scale": 1.0,
        "dropout": 0.0}
    tuned = burnish.tune(nn.Sequential(nn.Linear(9, 9)), "flora_nd(rank=2)", targets="0",
                         head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}
    assert keeps_what_it_says("flora_nd", "vit") is None
    assert burnish.parse("flora_nd")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
