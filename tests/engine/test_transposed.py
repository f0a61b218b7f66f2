"""Transposed convolutions, which store (in, out / groups, kernel), as (out, in / groups * kernel)
matrices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.term import Term
from burnish.core.anatomy import Anatomy
from burnish.core.errors import FormatError, RecipeError
from burnish.testing import follows, stir

CONVS = {"line": (nn.ConvTranspose1d, (6, 8, 3), {"stride": 2, "output_padding": 1}),
         "square": (nn.ConvTranspose2d, (6, 8, 3), {"stride": 2, "padding": 1}),
         "grouped": (nn.ConvTranspose2d, (6, 8, 3), {"groups": 2, "dilation": 2}),
         "oblong": (nn.ConvTranspose2d, (6, 8, (1, 3)), {"bias": False}),
         "cube": (nn.ConvTranspose3d, (4, 6, 2), {})}
RUN = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def made(conv):
    cls, args, kw = CONVS[conv]
    torch.manual_seed(0)
    return nn.Sequential(cls(*args, **kw)).double()


def matrix(w, groups):
    """Row o, column (i, u): what output o takes of input i of its group, entry u of the kernel."""
    n, per = w.shape[0] // groups, w.shape[1]
    rows = [w[j * n : (j + 1) * n, o].flatten() for j in range(groups) for o in range(per)]
    return torch.stack(rows)


def kernel(rows, like, groups):
    """What `matrix` undoes, differentiable."""
    n, per = like.shape[0] // groups, like.shape[1]
    pieces = [torch.stack([rows[j * per + o].view(n, *like.shape[2:]) for o in range(per)], 1)
              for j in range(groups)]
    return torch.cat(pieces)


@pytest.mark.parametrize("conv", CONVS)
def test_the_place_is_the_matrix_of_its_outputs(conv):
    net = made(conv)
    (place,) = Anatomy.of(net).places
    w, groups = net[0].weight.detach(), net[0].groups
    assert place.axes == tuple(w.shape[2:]) and place.kernel == w[0, 0].numel()
    assert torch.equal(place.view(w), matrix(w, groups))
    assert place.view(w).shape == (place.out, place.inp)
    assert torch.equal(place.unview(place.view(w), w), w)
    assert torch.equal(kernel(matrix(w, groups), w, groups), w)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "dora(rank=2)"])
@pytest.mark.parametrize("conv", CONVS)
def test_outputs_and_gradients_are_those_of_the_equation(conv, recipe):
    net = made(conv)
    m = copy.deepcopy(net[0])
    tuned = burnish.tune(net, recipe, head=False, targets="conv")
    stir(tuned, size=0.3)
    for _, term in tuned.terms(Term):
        term.double()
    W = m.weight.detach()

    def equation(x, A, B, length=None):
        V = matrix(W, m.groups) + 16.0 / 2 * B @ A
        if length is not None:
            V = (length / V.detach().norm(dim=1)).unsqueeze(1) * V
        return RUN[W.dim()](x, kernel(V, W, m.groups), m.bias, m.stride, m.padding,
                            m.output_padding, m.groups, m.dilation)

    theta = [p for _, term in tuned.terms(Term) for p in term.parameters()]
    follows(tuned, equation, theta, (2, m.in_channels, *(4,) * (W.dim() - 2)))


def test_a_file_brings_it_back(tmp_path):
    net = made("grouped").float()
    tuned = stir(burnish.tune(net, "lora(rank=2)", head=False, targets="conv"))
    x = torch.randn(1, 6, 4, 4)
    want = net(x)
    tuned.save(tmp_path / "a")
    other = made("grouped").float()
    burnish.load(other, tmp_path / "a")
    assert torch.equal(other(x), want)


def test_a_storage_holds_it_without_its_start():
    """bf16 stores W - s B0 A0; off, the start is put back."""
    net = made("square").float()
    x = torch.randn(1, 6, 4, 4)
    want = net(x)
    tuned = burnish.tune(net, "bf16 + pissa(rank=2)", head=False, targets="conv")
    torch.testing.assert_close(net(x), want, rtol=0, atol=2e-2)
    with tuned.disabled():
        torch.testing.assert_close(net(x), want, rtol=0, atol=2e-2)
    term = next(t for _, t in tuned.terms(Term))
    assert float(term.start().norm()) > 0.5, "what is absorbed could be seen missing"


@pytest.mark.parametrize("conv", CONVS)
def test_a_scale_behind_it_folds(conv):
    net = made(conv)
    if net[0].bias is None:
        net[0].bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    tuned = stir(burnish.tune(net, "ssf", head=False), size=0.3)
    x = torch.randn(2, net[0].in_channels, *(4,) * len(net[0].kernel_size), dtype=torch.float64)
    want = net(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-8, atol=1e-8)


def test_what_has_no_form_there_says_so(tmp_path):
    from safetensors.torch import save_file

    net = made("square").float()
    with pytest.raises(RecipeError, match="dropout cannot act on 0.weight"):
        burnish.tune(net, "lora(rank=2, dropout=0.1)", head=False, targets="conv")
    save_file({"0.weight": torch.ones(6, 8, 3, 3)}, tmp_path / "m.safetensors")
    with pytest.raises(RecipeError, match="transposed convolution, as 0.weight"):
        burnish.tune(net, f"shira(mask='{tmp_path / 'm.safetensors'}')", head=False,
                     targets="conv")
    for recipe in ("lora(rank=2)", "oft(block=3)", "lokr(rank=2)"):
        tuned = stir(burnish.tune(made("square").float(), recipe, head=False, targets="conv"))
        with pytest.raises(FormatError, match="ConvTranspose2d"):
            burnish.export_peft(tuned, tmp_path / "p")


def test_entries_merge_and_come_back_whole():
    net = made("grouped").float()
    tuned = stir(burnish.tune(net, "shira(rank=1)", head=False, targets="conv"))
    x, was = torch.randn(1, 6, 4, 4), net[0].weight.detach().clone()
    want = net(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(net[0].weight, was)
    tuned.unmerge()
    assert torch.equal(net[0].weight, was)
