"""NOLA: factors that are mixtures of random tensors, against the mixtures written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight import mixed
from burnish.blocks.weight.mixed import Mixtures
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="rank=3, alpha=6, k=5", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"nola({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Mixtures)
    term.double()
    return model, tuned, term


def written_out(term):
    """All A_j (k, r, in), all B_j (k, out, r), A_f."""
    each = {which: torch.cat([rows for _, rows in term.bases(which)]) for which in "ab"}
    return (each["a"].view(term.k, *term.shapes["a"]), each["b"].view(term.k, *term.shapes["b"]),
            term.fixed())


@pytest.mark.parametrize("drawn", [1, 1 << 21])
def test_outputs_and_gradients_are_those_of_the_mixtures(drawn, monkeypatch):
    monkeypatch.setattr(mixed, "DRAWN", drawn)            # one at a time, or all at once
    model, tuned, term = made()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    with torch.no_grad():
        term.a.normal_(), term.b.normal_()
    As, Bs, Af = written_out(term)

    def equation(x, a, b):
        A, B = Af + torch.einsum("j,jri->ri", a, As), torch.einsum("j,jor->or", b, Bs)
        return F.linear(x, W + 2.0 * B @ A, bias)

    follows(tuned, equation, [term.a, term.b], (5, 3, 12))


def test_the_start_is_the_base_and_b_moves_first():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "nola(rank=2, k=4)")
    assert torch.equal(net(**batch).logits, want)
    model, _, term = made()
    model(torch.randn(4, 12).double()).square().sum().backward()
    assert not term.a.grad.any() and bool(term.b.grad.all())


def test_what_is_drawn_is_even():
    _, _, term = made("rank=20, k=50", inp=60, out=40)
    As, Bs, Af = written_out(term)
    for t, bound in ((As, 50**-0.5), (Bs, 50**-0.5), (Af, 60**-0.5)):
        assert 0.98 * bound < float(t.max()) <= bound and -bound <= float(t.min()) < -0.98 * bound
        assert float(t.square().mean()) == pytest.approx(bound**2 / 3, rel=0.1)
    assert not torch.equal(As[0, :, :40], Bs[0].t()) and not torch.equal(As[0], As[1])


def test_places_and_seeds_draw_apart_and_nothing_else_is_disturbed():
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    torch.manual_seed(5)
    tuned = burnish.tune(net, "nola(rank=2, k=3)", head=False, targets="*")
    one, two = (t for _, t in tuned.terms(Mixtures))
    before = torch.get_rng_state()
    assert not torch.equal(one.fixed(), two.fixed())
    net(torch.randn(2, 12, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    other = burnish.tune(nn.Sequential(nn.Linear(12, 12)), "nola(rank=2, k=3, seed=1)", head=False,
                         targets="0")
    (_, third), = other.terms(Mixtures)
    assert not torch.equal(one.fixed(), third.fixed())


def test_a_step_draws_twice():
    model, _, term = made()
    asked = []
    bases = term.bases
    term.bases = lambda which: asked.append(which) or bases(which)
    y = model(torch.randn(4, 12).double())
    assert sorted(asked) == ["a", "b"]
    y.sum().backward()
    assert sorted(asked) == ["a", "a", "b", "b"]


def test_files_hold_coefficients_alone(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "nola(rank=4, k=8)")
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"a", "b"}
    torch.manual_seed(99)
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_counts_and_cost():
    place = Place("a", "weight", "linear", 1024, 1024)
    assert 48 * burnish.parse("nola(k=1024)")[0].count(place) == 98_304      # GPT-2 medium, q and v
    # LLaMA-2 7B and 70B, seven matrices a block; a LoRA of rank one has ten times as many
    assert 224 * burnish.parse("nola(k=512)")[0].count(place) == 229_376
    assert 560 * burnish.parse("nola(k=512)")[0].count(place) == 573_440
    (one,) = burnish.parse("lora(rank=1)")
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert 32 * sum(one.count(Place("a", "weight", "linear", o, i)) for o, i in shapes) == 2_498_560
    assert burnish.parse("nola")[0].per_token(place) == 8
    assert burnish.parse("nola")[0].per_forward(place) == 8 * 2048
    assert keeps_what_it_says("nola", "vit") is None
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_refusals():
    with pytest.raises(burnish.RecipeError, match="^nola: k=0"):
        burnish.parse("nola(k=0)")
    assert burnish.parse("nola(k=1)")
    with pytest.raises(RankError, match="^nola: rank 10"):
        made("rank=10")
    assert burnish.parse("nola")[0].settings() == {"targets": None, "rank": 8, "alpha": 8.0,
                                                   "k": 512, "seed": 0}
