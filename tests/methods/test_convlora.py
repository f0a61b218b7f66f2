"""ConvLoRA, LoRA-C, CP-LoRA and their forms with lengths, against kernels written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight import panels
from burnish.blocks.weight.kernels import Flat, Polyadic
from burnish.blocks.weight.magnitude import Magnitude
from burnish.blocks.weight.term import Term
from burnish.core.errors import RecipeError, TargetError
from burnish.core.site import Place
from burnish.testing import follows, stir

CONVS = {"square": (nn.Conv2d, (6, 8, 3), {"padding": 1, "stride": 2}),
         "grouped": (nn.Conv2d, (6, 8, 3), {"groups": 2, "dilation": 2}),
         "oblong": (nn.Conv2d, (6, 8, (2, 3)), {}), "line": (nn.Conv1d, (6, 8, 3), {}),
         "cube": (nn.Conv3d, (3, 4, 2), {}), "point": (nn.Conv2d, (6, 8, 1), {}),
         "turned": (nn.ConvTranspose2d, (6, 8, 3), {"stride": 2})}
RUN = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
CP = {3: "oj,ji,ju->oiu", 4: "oj,ji,ju,jv->oiuv", 5: "oj,ji,ju,jv,jw->oiuvw"}


def kernel(form, s, shape, first, second, *sides):
    """Delta as a kernel (out, in / groups, ...)."""
    if form == "cp":
        return s * torch.einsum(CP[len(shape)], first, second, *sides)
    return s * (second @ first).flatten().view(shape)        # first is A, second B


def made(conv, recipe):
    cls, args, kw = CONVS[conv]
    torch.manual_seed(0)
    model = nn.Sequential(cls(*args, **kw)).double()
    stock = copy.deepcopy(model[0])
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    terms = [t.double() for _, t in tuned.terms(Term)]
    return stir(tuned, size=0.3), stock, terms


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("form", ["conv", "c", "cp"])
@pytest.mark.parametrize("conv", CONVS)
def test_outputs_and_gradients_are_those_of_the_equation(conv, form, dora, monkeypatch):
    monkeypatch.setattr(panels, "PANEL", 40)
    tuned, stock, terms = made(conv, f"convlora(rank=2, alpha=3, form={form!r}, "
                               f"dora={dora})")
    turned = isinstance(stock, nn.ConvTranspose2d)
    W = stock.weight.detach()
    W = W.transpose(0, 1) if turned else W
    assert type(terms[0]) is (Polyadic if form == "cp" else Flat)
    assert sum(p.numel() for p in tuned.parameters()) == \
        tuned.recipe[0].count(tuned.anatomy.places[0])

    def equation(x, *theta):
        *theta, m = theta if dora else (*theta, None)
        V = W + kernel(form, 1.5, W.shape, *theta)
        if m is not None:
            c = V.detach().flatten(1).norm(dim=1)
            V = (m / c).view(-1, *(1,) * (V.dim() - 1)) * V
        if turned:
            return F.conv_transpose2d(x, V.transpose(0, 1), stock.bias, stock.stride)
        return RUN[type(stock)](x, V, stock.bias, stock.stride, stock.padding, stock.dilation,
                                stock.groups)

    follows(tuned, equation, [p for t in terms for p in t.parameters()],
            (2, stock.in_channels, *(7,) * (W.dim() - 2)))


def test_the_merged_rows_have_the_lengths():
    tuned, stock, (_, length) = made("square", "convlora(rank=2, dora=True)")
    m = length.m.detach().clone()
    torch.testing.assert_close(tuned.merge()[0].weight.flatten(1).norm(dim=1), m)


def test_cp_is_a_chain_of_thin_convolutions():
    """1 x 1, then a side of the kernel at a time and channel by channel, then 1 x 1."""
    _, stock, (term,) = made("square", "convlora(rank=3, alpha=3, form='cp')")
    b, c, e = term.rest
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    h = F.conv2d(x, b[:, :, None, None])
    h = F.conv2d(h, c[:, None, :, None], stride=(2, 1), padding=(1, 0), groups=3)
    h = F.conv2d(h, e[:, None, None, :], stride=(1, 2), padding=(0, 1), groups=3)
    want = F.conv2d(x, term.dense().view(8, 6, 3, 3), None, 2, 1)
    torch.testing.assert_close(F.conv2d(h, term.a[:, :, None, None]), want)


def test_panels_of_cp_are_made_without_the_rest(monkeypatch):
    tuned, _, (term,) = made("square", "convlora(rank=3, form='cp')")
    monkeypatch.setattr(panels, "PANEL", 40)
    monkeypatch.setattr(Polyadic, "dense", None)
    widths, panel = [], Polyadic.panel
    monkeypatch.setattr(Polyadic, "panel",
                        lambda self, a, b: widths.append(b - a) or panel(self, a, b))
    tuned.model(torch.randn(1, 6, 7, 7, dtype=torch.float64)).sum().backward()
    assert max(widths) == 5 and sum(widths) % 54 == 0


@pytest.mark.parametrize("settings, count", [
    ("", 36_864), ("form='c'", 12_288), ("form='cp'", 4_144), ("dora=True", 37_120),
    ("form='cp', dora=True", 4_400)])
def test_counts(settings, count):
    model = nn.Sequential(nn.Conv2d(256, 256, 3))
    tuned = burnish.tune(model, f"convlora({settings})", targets="0", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == count
    assert tuned.recipe[0].count(Place("a", "weight", "conv", 256, 2304, kernel=9, axes=(3, 3))) \
        == count
    grouped = Place("a", "weight", "conv", 256, 1152, kernel=9, axes=(3, 3), groups=2)
    if not settings:                                     # rank k^2 (in + out / g)
        assert tuned.recipe[0].count(grouped) == 8 * 9 * (256 + 128)


@pytest.mark.parametrize("form", ["conv", "c", "cp"])
def test_with_lengths_it_starts_at_the_base_to_rounding(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3)).double()
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    want = model(x)
    burnish.tune(model, f"convlora(rank=2, form={form!r}, dora=True)", targets="0", head=False)
    torch.testing.assert_close(model(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["conv", "c", "cp"])
def test_the_start(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(200, 16, 3))
    x = torch.randn(1, 200, 5, 5)
    want = model(x)
    tuned = burnish.tune(model, f"convlora(rank=100, form={form!r})", targets="0", head=False)
    assert torch.equal(model(x), want)
    (_, term), = tuned.terms(Term)
    zero, drawn = (term.a, list(term.rest)) if form == "cp" else (term.B, [term.A])
    assert not zero.any()
    for p in drawn:
        scaled = p.detach() * p.shape[1] ** 0.5
        assert -1 <= float(scaled.min()) < -0.95 and 0.95 < float(scaled.max()) <= 1
    grads = torch.autograd.grad(model(x).square().sum(), [zero, *drawn])
    assert grads[0].any() and not any(g.any() for g in grads[1:])


def test_lengths_start_as_those_of_the_kernel():
    model = nn.Sequential(nn.Conv2d(4, 5, 3))
    tuned = burnish.tune(model, "convlora(dora=True)", targets="0", head=False)
    (_, length), = tuned.terms(Magnitude)
    torch.testing.assert_close(length.m.detach(), model[0].weight.flatten(1).norm(dim=1))


def test_what_cannot_act_is_refused():
    def on(model, settings=""):
        return burnish.tune(nn.Sequential(model), f"convlora({settings})", head=False, targets="0")

    on(nn.Conv2d(4, 4, 3), "rank=1")
    on(nn.Conv2d(2, 4, 1, groups=1), "rank=50")
    with pytest.raises(RecipeError, match="convlora: 0.weight is depthwise"):
        on(nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(TargetError, match="convlora has no form for 0.weight"):
        on(nn.Linear(4, 4))
    with pytest.raises(RecipeError, match="convlora: rank=0"):
        burnish.parse("convlora(rank=0)")
    with pytest.raises(RecipeError, match="cannot be joined"):
        burnish.parse("convlora(dora=True) + dora")
    assert len(burnish.parse("convlora + dora")) == 2


def test_defaults_and_decay():
    assert burnish.parse("convlora")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "form": "conv", "dora": False}
    for settings in ("dora=True", "form='cp'"):
        tuned = burnish.tune(nn.Sequential(nn.Conv2d(4, 4, 3)), f"convlora({settings})",
                             targets="0", head=False)
        opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
        assert {g["weight_decay"] for g in opt.param_groups} == {0.0}
