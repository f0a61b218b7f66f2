"""RandLoRA: scaled random bases, against the sum written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.term import Term
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.methods.delta.shared.randlora import Scaled
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(shapes, settings="rank=3, alpha=6"):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in shapes)).double()
    tuned = burnish.tune(model, f"randlora({settings})", head=False, targets="*")
    for m in model.modules():
        if hasattr(m, "burnish"):
            m.burnish.double()
    return model, tuned, [t for _, t in tuned.terms(Scaled)]


def update(term, A, B, lam, gamma):
    """s sum_i B_i diag(lam_i) A diag(gamma_i), transposed where out < in."""
    total = 0
    for i in range(lam.shape[0]):
        total = total + B[i, : term.q] @ torch.diag(lam[i]) @ A[:, : term.p] \
            @ torch.diag(gamma[i])
    total = 2.0 * total
    return total.t() if term.out < term.inp else total


def test_outputs_and_gradients_are_those_of_the_sum():
    model, tuned, terms = made([(7, 11), (11, 5), (5, 5)])
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    shared = model.burnish.default["randlora_shared"]

    def equation(x, *letters):
        for k, (layer, term) in enumerate(zip(model, terms, strict=True)):
            W = layer.weight + update(term, shared.A, shared.B, *letters[2 * k : 2 * k + 2])
            x = F.linear(x, W, layer.bias)
        return x

    follows(tuned, equation, [p for t in terms for p in (t.lam, t.gamma)], (6, 7), atol=1e-9)


@pytest.mark.parametrize("out, inp", [(11, 7), (5, 11)])
def test_the_order_of_peft_pairs_column_c_with_row_c(out, inp):
    """Column c of all B_i, one after the other, meets the row c of (rank, n) scaled copies of A."""
    model, tuned, (term,) = made([(inp, out)], "rank=3, alpha=6, pairing='peft'")
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    shared = model.burnish.default["randlora_shared"]
    n = term.lam.shape[0]

    def equation(x, lam, gamma):
        total = 0
        for c in range(3 * n):
            k, i = divmod(c, n)
            row = lam[i, k] * shared.A[k, : term.p] * gamma[i]
            total = total + 2.0 * torch.outer(shared.B[c // 3, : term.q, c % 3], row)
        return F.linear(x, model[0].weight + (total.t() if out < inp else total), model[0].bias)

    follows(tuned, equation, [term.lam, term.gamma], (6, inp), atol=1e-9)


def test_the_bases_of_a_folder_stand_in_our_files_too(bases_of_a_folder):
    """Of PEFT's folder they are its own: no seed makes them, so what we save has them."""
    assert len(bases_of_a_folder("randlora(rank=8, pairing='peft')")) == 2


def test_stored_bases_come_with_a_file():
    with pytest.raises(burnish.RecipeError, match="has the bases of a saved adapter"):
        burnish.tune(tiny("llama")[0], "randlora(rank=8, bases='stored')")


@pytest.mark.parametrize("out, inp", [(48, 30), (30, 48)])
def test_its_rank_is_full(out, inp):
    model, tuned, (term,) = made([(inp, out)], "rank=7")
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    assert int(torch.linalg.matrix_rank(term.dense())) == 30


def test_panels_are_pieces_of_the_whole():
    for out, inp in ((12, 8), (8, 12)):
        _, tuned, (term,) = made([(inp, out)])
        with torch.no_grad():
            for p in tuned.parameters():
                p.normal_()
        torch.testing.assert_close(term.tile(2, 7, None), term.dense()[:, 2:7], rtol=1e-12,
                                   atol=1e-12)


def test_counts():
    (method,) = burnish.parse("randlora")

    def place(out, inp):
        return Place("a", "weight", "linear", out, inp)

    assert method.count(place(4096, 4096)) == 528_384
    like = burnish.parse("lora(rank=64)")[0].count(place(4096, 4096))      # about as many
    assert 528_384 / like == pytest.approx(1, rel=0.01)
    assert 24 * method.count(place(768, 768)) == 460_800                        # ViT-B q, v
    llama = 4 * [place(4096, 4096)] + 2 * [place(11008, 4096)] + [place(4096, 11008)]
    assert 32 * sum(method.count(p) for p in llama) == 118_358_016


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "randlora(rank=4)")
    assert torch.equal(net(**batch).logits, want)
    _, tuned, (term,) = made([(20, 8)], "rank=3")
    assert not term.lam.any() and torch.equal(term.gamma, torch.full((3, 8), 1 / 8).double())
    _, _, (few,) = made([(2, 9)], "rank=1")
    assert torch.equal(few.gamma, torch.full((2, 2), 0.5).double())
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("bases, zeros", [("uniform", 0.0), ("sparse", 2 / 3),
                                          ("very sparse", 1 - 400**-0.5)])
def test_bases_have_unit_variance_and_their_share_of_zeros(bases, zeros):
    model, _, _ = made([(400, 400)], f"rank=16, bases={bases!r}")
    shared = model.burnish.default["randlora_shared"]
    assert shared.A.shape == (16, 400) and shared.B.shape == (25, 400, 16)
    for t in (shared.A, shared.B):
        assert float(t.std()) == pytest.approx(1, rel=1e-3) and not t.requires_grad
        assert float((t == 0).double().mean()) == pytest.approx(zeros, abs=0.02)
        if zeros:
            assert len(t.unique()) == 3 and abs(float(t.mean())) < 0.05
        else:
            assert float(t.abs().max()) == pytest.approx(3**0.5, rel=0.02)


def test_files_hold_vectors_alone(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "randlora(rank=8)", seed=3)
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"lam", "gamma"}
    torch.manual_seed(99)
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(burnish.RecipeError, match="^randlora: rank=0"):
        burnish.parse("randlora(rank=0)")
    assert burnish.parse("randlora")[0].settings() == {
        "targets": None, "rank": 32, "alpha": 640.0, "bases": "uniform", "pairing": "paper",
        "dropout": 0.0}


def test_bounds_and_cost():
    assert keeps_what_it_says("randlora", "vit") is None
    assert burnish.parse("randlora")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
    assert burnish.parse("randlora(rank=1)")
    with pytest.raises(RankError, match="largest rank there is 5"):
        burnish.tune(nn.Sequential(nn.Linear(9, 5)), "randlora(rank=6)", head=False, targets="0")


@pytest.mark.parametrize("word", ["dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), f"randlora(rank=3, {word}=0.25)",
                         targets="0", head=False)
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^randlora: {word} is a probability"):
            burnish.parse(f"randlora({word}={p})")
