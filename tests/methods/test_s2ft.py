"""S2FT: whole channels of a matrix train, as dense slices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.slices import Slice
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.memory import measure
from burnish.testing import follows, stir, tiny
from burnish.testing.checks.cost import keeps_what_it_says

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
LLAMA_3_8B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}


def made(settings="density=0.25", inp=12, out=10, **kw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"s2ft({settings})", head=False, targets="0", **kw)
    ((_, term),) = tuned.terms(Slice)
    return tuned, term.double()


@pytest.mark.parametrize("config, want", [(LLAMA_7B, 43_282_432), (LLAMA_3_8B, 56_369_152)])
def test_counts_of_the_released_recipe(config, want):
    """int(11008 32 .03) 4096: channels are drawn over all layers together."""
    inner, layers = config["intermediate_size"], config["num_hidden_layers"]
    places = [Place(f"{i}", "weight", "linear", 4096, inner, "down", i) for i in range(layers)]
    (method,) = parse("s2ft")
    from burnish.core.site import Site

    terms = [method.delta(Site(p, torch.empty(4096, inner, device="meta"), places=places))
             for p in places]
    sizes = [t.at.numel() for t in terms]
    assert sum(t.V.numel() for t in terms) == want
    assert len(set(sizes)) > 4 and max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_equation(rows, bias):
    tuned, term = made(f"density=0.3, rows={rows}")
    layer = tuned.model[0]
    if not bias:
        layer.bias = None
    W, b = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach()
    nn.init.normal_(term.V)
    at = term.at.tolist()
    assert len(at) == 3 and tuple(term.V.shape) == ((3, 12) if rows else (10, 3))

    def equation(x, V):
        y = F.linear(x, W, b)
        if not rows:
            return y + x[..., at] @ V.t()
        made = x @ V.t()
        return y + torch.stack([made[..., at.index(o)] if o in at else torch.zeros_like(y[..., 0])
                                for o in range(10)], -1)

    follows(tuned, equation, [term.V], (5, 3, 12))
    assert int(torch.linalg.matrix_rank(term.dense())) == 3


@pytest.mark.parametrize("rows", [False, True])
def test_the_gradient_is_a_slice_of_the_dense_one(rows):
    tuned, term = made(f"density=0.3, rows={rows}")
    x, g = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    (dV,) = torch.autograd.grad(tuned.model(x), term.V, g)
    dense, at = g.t() @ x, term.at.long()
    torch.testing.assert_close(dV, dense[at] if rows else dense[:, at], rtol=1e-10, atol=1e-12)


def test_a_frozen_slice_lets_the_gradient_of_the_input_pass():
    for rows in (False, True):
        tuned, term = made(f"density=0.3, rows={rows}")
        nn.init.normal_(term.V).requires_grad_(False)
        x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(tuned.model(x).sum(), x)
        want = (tuned.model[0].weight + term.dense()).sum(0).expand(4, -1)
        torch.testing.assert_close(dx, want, rtol=1e-10, atol=1e-12)


def test_what_is_kept_is_the_share_of_the_input():
    """100 tokens of 64 numbers: 16 of them, of rows all."""
    for rows, wide in ((False, 16), (True, 64)):
        model = nn.Sequential(nn.Linear(64, 32))
        tuned = burnish.tune(model, f"s2ft(density=0.25, rows={rows})", head=False, targets="0")
        tuned.state.tape.lean, kept = False, []
        tuned.state.tape.pack = lambda t, kept=kept: kept.append(t) or t
        tuned.state.tape.unpack = lambda t: t
        model(torch.randn(100, 64, requires_grad=True)).sum().backward()
        shapes = [tuple(t.shape) for t in kept if not isinstance(t, nn.Parameter) and t.dim() == 2]
        assert shapes == [(100, wide)]


def test_state_and_gradient_are_those_of_the_slice():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "s2ft(density=0.25)", targets="down", head=False)
    opt = tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    assert sum(t.numel() for s in opt.state.values() for t in s.values() if t.dim()) == \
        2 * int(96 * 0.25) * 32
    assert measure(tuned, batch).peak_bytes > 0


def test_channels_of_all_matrices_are_drawn_together_by_the_seed_alone():
    def drawn(seed=0):
        net, _ = tiny("llama")
        return [t.at.tolist() for _, t in
                burnish.tune(net, f"s2ft(density=0.2, seed={seed})", head=False).terms(Slice)]

    first = drawn()
    torch.manual_seed(9)
    assert drawn() == first and drawn(1) != first
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "s2ft(density=0.2)", head=False)
    total = sum(t.inp for _, t in tuned.terms(Slice))
    assert sum(len(a) for a in first) == int(total * 0.2)
    assert all(a == sorted(set(a)) and max(a) < 48 for a in first)
    sizes = {len(a) / t.inp for a, (_, t) in zip(first, tuned.terms(Slice), strict=True)}
    assert len(sizes) > 1


@pytest.mark.parametrize("rows", [False, True])
def test_the_heaviest_channels_of_the_weight_and_of_the_gradient(rows):
    dim = 1 if rows else 0
    tuned, term = made(f"density=0.3, mask='weight', rows={rows}")
    want = tuned.model[0].weight.square().sum(dim).argsort(descending=True)[:3]
    assert set(term.at.tolist()) == set(want.tolist())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 10)

        def forward(self, x):
            return {"loss": self.a(x).pow(4).mean()}

    net, x = Net().double(), torch.randn(9, 12, dtype=torch.float64)
    base = copy.deepcopy(net)
    (g,) = torch.autograd.grad(base(x[:5])["loss"], base.a.weight)
    tuned = burnish.tune(net, f"s2ft(density=0.3, mask='gradient', samples=5, rows={rows})",
                         calibration=[{"x": x}], targets="a", head=False)
    ((_, term),) = tuned.terms(Slice)
    assert set(term.at.tolist()) == set(g.square().sum(dim).argsort(descending=True)[:3].tolist())


@pytest.mark.parametrize("mask", ["random", "weight", "gradient"])
def test_a_folder_brings_the_channels(mask, tmp_path):
    net, batch = tiny("vit")
    base = copy.deepcopy(net)
    data = {"calibration": [batch]} if mask == "gradient" else {}
    tuned = stir(burnish.tune(net, f"s2ft(density=0.2, mask={mask!r})", head=False, **data))
    tuned.save(tmp_path / "a")
    with torch.no_grad():                                # a base whose weights say other channels
        other = burnish.load(base, tmp_path / "a")
    assert [t.at.tolist() for _, t in other.terms(Slice)] == \
        [t.at.tolist() for _, t in tuned.terms(Slice)]
    net.eval(), base.eval()
    assert torch.equal(base(**batch).logits, net(**batch).logits)


def test_a_matrix_that_got_no_channel_is_left_alone():
    model = nn.Sequential(nn.Linear(200, 4), nn.Linear(4, 4))
    tuned = burnish.tune(model, "s2ft(density=0.005)", targets="0,1", head=False)
    assert [n for n, _ in tuned.terms(Slice)] == ["0.weight"]
    assert sum(p.numel() for p in tuned.parameters()) == 4
    least = burnish.tune(nn.Sequential(nn.Linear(20, 4)), "s2ft(density=0.001)", targets="0")
    assert [t.at.numel() for _, t in least.terms(Slice)] == [1]


def test_refusals_defaults_and_counts():
    for text, why in (("density=0.0", r"density is in \(0, 1\]"), ("density=1.01", "density is in"),
                      ("samples=0, mask='gradient'", "samples at least 1"),
                      ("seed=1, mask='weight'", "seed does nothing beside mask='weight'"),
                      ("samples=5", "samples does nothing beside mask='random'")):
        with pytest.raises(RecipeError, match=why):
            parse(f"s2ft({text})")
    parse("s2ft(density=1.0, samples=1, mask='gradient')")
    (method,) = parse("s2ft")
    assert method.settings() == {"targets": None, "density": 0.03, "rows": False, "mask": "random",
                                 "seed": 0, "samples": 128}
    assert method.repeats() is None and parse("s2ft(mask='weight')")[0].repeats() == 1
    place = Place("a", "weight", "linear", 10, 200)
    assert (method.count(place), method.count(place, 9)) == (60, 90)
    assert (method.per_token(place), method.per_token(place, 9)) == (6, 9)
    (rows,) = parse("s2ft(rows=True, density=0.5)")
    assert (rows.count(place), rows.per_token(place)) == (5 * 200, 0)
    assert method.count(Place("a", "weight", "linear", 10, 7)) == 10
    assert keeps_what_it_says("s2ft", "vit") is None
