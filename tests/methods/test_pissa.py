"""PiSSA: the principal part trains, the residual rests, and 4 bits hurt the residual less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.start import LessStart
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
R = 8


def spiked(out=96, inp=64):
    """A weight as pre-training leaves it: a few large directions over a noisy floor."""
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(out, inp, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(inp, inp, dtype=torch.float64))
    S = 4.0 * 0.8 ** torch.arange(inp, dtype=torch.float64) + 0.2
    return (U * S) @ V.t(), S


def model_of(W, dtype=torch.float64):
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(W)
    return model


def start(recipe=f"pissa(rank={R})", dtype=torch.float64, **kw):
    W, S = spiked()
    tuned = burnish.tune(model_of(W, dtype), recipe, **kw)
    ((_, term),) = tuned.terms(LessStart)
    return tuned, term, W, S


def test_count_on_llama_7b():
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    (method,) = parse("pissa(rank=128)")
    assert sum(method.count(p) for p in match(anatomy, None)) == 319_815_680


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_factors_hold_the_principal_part(alpha):
    """A0 A0^T = B0^T B0 = S_r / s; the residual's norm is the next singular value."""
    recipe = f"pissa(rank={R})" if alpha is None else f"pissa(rank={R}, alpha={alpha})"
    _, term, W, S = start(recipe)
    s = term.scale
    assert s == (1.0 if alpha is None else alpha / R)
    want = torch.diag(S[:R] / s)
    A, B = term.A.detach(), term.B.detach()
    torch.testing.assert_close(A @ A.t(), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.t() @ B, want, rtol=1e-10, atol=1e-10)
    residual = W - s * B @ A
    assert float(torch.linalg.matrix_norm(residual, 2)) == pytest.approx(float(S[R]), rel=1e-9)


def test_the_randomised_decomposition_comes_close():
    _, term, W, S = start(f"pissa(rank={R}, iterations=8)")
    residual = W - term.scale * term.B.detach() @ term.A.detach()
    assert float(torch.linalg.matrix_norm(residual, 2)) == pytest.approx(float(S[R]), rel=1e-2)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                        (torch.bfloat16, 3e-2)])
def test_the_start_is_the_base(dtype, tol):
    tuned, _, W, _ = start(dtype=dtype)
    x = torch.randn(4, 64, dtype=dtype)
    torch.testing.assert_close(tuned.model(x), x @ tuned.model[0].weight.t(), rtol=tol, atol=tol)
    assert torch.equal(tuned.model[0].weight, W.to(dtype)), "the base is never written"


def test_it_is_a_plain_chain_of_twice_the_rank():
    """B* = [B, -B0], A* = [A; A0] on the untouched base."""
    tuned, term, W, _ = start()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    B = torch.cat([term.B, -term.B0], 1)
    A = torch.cat([term.A, term.A0], 0)
    x = torch.randn(4, 64, dtype=torch.float64)
    torch.testing.assert_close(tuned.model(x), x @ (W + term.scale * B @ A).t(), rtol=1e-10,
                               atol=1e-10)
    want = tuned.model(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-10, atol=1e-10)


def test_four_bits_lose_less_of_the_residual():
    """QPiSSA: storage holds the residual; its error is below that of coding W itself."""
    tuned, term, W, _ = start(f"nf4 + pissa(rank={R})", torch.float32)
    assert term.folded
    direct = burnish.tune(model_of(W, torch.float32), "nf4 + lora(rank=8)")
    W = W.float()
    ours = (tuned.model[0].weight + term.dense().detach() - W).norm()
    theirs = (direct.model[0].weight - W).norm()
    assert float(ours) < 0.7 * float(theirs)
    assert float(torch.linalg.matrix_norm(tuned.model[0].weight, 2)) < 1.2


def test_a_storage_that_declines_changes_nothing():
    """NF4 leaves the head alone; the start is then still subtracted."""
    W, _ = spiked()
    tuned = burnish.tune(nn.ModuleDict({"body": nn.Linear(64, 64), "head": model_of(W)[0]}).float(),
                         f"nf4 + pissa(rank={R})", targets="all", head=False)
    x = torch.randn(3, 64)
    torch.testing.assert_close(tuned.model["head"](x), x @ W.float().t(), rtol=1e-4, atol=1e-4)


def test_saved_with_its_start_and_loaded_without_a_new_decomposition(tmp_path, monkeypatch):
    tuned, term, W, _ = start(dtype=torch.float32)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(4, 64)
    want = tuned.model(x)
    tuned.save(tmp_path / "a")
    exact = torch.linalg.svd

    def other_signs(w, full_matrices=True):         # what another machine may compute
        U, S, Vt = exact(w, full_matrices=full_matrices)
        return -U, S, -Vt

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    again = burnish.load(model_of(W, torch.float32), tmp_path / "a")
    torch.testing.assert_close(again.model(x), want, rtol=1e-5, atol=1e-5)


def test_dora_on_a_folded_start_begins_at_the_base():
    from burnish.blocks.weight.magnitude import Magnitude

    W, _ = spiked()
    tuned = burnish.tune(model_of(W, torch.float32), f"nf4 + pissa(rank={R}) + dora(rank=4)")
    ((_, term),) = tuned.terms(LessStart)
    ((_, wrap),) = tuned.terms(Magnitude)
    V = (tuned.model[0].weight + term.dense()).detach()
    torch.testing.assert_close(wrap.m.detach(), V.norm(dim=1))
    x = torch.randn(4, 64)
    torch.testing.assert_close(tuned.model(x), x @ V.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_start_is_the_base_to_the_last_bit(dtype):                    # findings 3.8
    """Over a dense base nothing is added at step 0, whatever the precision."""
    model, batch = tiny("vit")
    model = model.to(dtype).eval()
    batch = {"pixel_values": batch["pixel_values"].to(dtype)}
    want = model(**batch).logits
    tuned = burnish.tune(model, "pissa(rank=4)", head=False)
    assert torch.equal(model(**batch).logits, want)
    merged = tuned.merge()
    assert torch.equal(merged(**batch).logits, want)


def test_a_small_move_is_not_lost_in_half_precision():                    # findings 3.8
    """B moves by 1e-3 of itself: the difference is seen, and is that of s (B - B0) A."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    tuned = burnish.tune(model, "pissa(rank=8)", targets="0", head=False)
    (_, term), = tuned.terms(torch.nn.Module)
    with torch.no_grad():
        term.B.mul_(1.001)
    x = torch.randn(256, 64).bfloat16()
    y = torch.zeros(256, 64, dtype=torch.bfloat16)
    term.forward_(x, y, 1.0)
    want = term.scale * x.double() @ ((term.B - term.B0).double() @ term.A.double()).t()
    assert ((y.double() - want).norm() / want.norm()).item() < 1e-2


def test_defaults_are_the_published_ones():
    assert burnish.parse("pissa")[0].settings() == {
        "targets": None, "rank": 8, "alpha": None, "iterations": 0}


def test_decay_leaves_it_alone():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "pissa(rank=3)", targets="0",
                         head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


def test_what_a_token_keeps_besides_the_input():
    from burnish.core.site import Place

    place = Place("l", "weight", "linear", 24, 16)
    assert burnish.parse("pissa(rank=5)")[0].per_token(place) == 5


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(burnish.RecipeError, match="rank 17 does not fit"):
        burnish.tune(nn.Sequential(nn.Linear(16, 24)), "pissa(rank=17)", targets="0", head=False)


def test_nothing_larger_than_the_weight_is_made(monkeypatch):
    """Of 300 x 8 there are eight singular vectors a side, not three hundred."""
    exact, made = torch.linalg.svd, []

    def seen(*args, **kw):
        out = exact(*args, **kw)
        made.extend(t.numel() for t in out)
        return out

    monkeypatch.setattr(torch.linalg, "svd", seen)
    burnish.tune(nn.Sequential(nn.Linear(8, 300)), "pissa(rank=2)", targets="0", head=False)
    assert made and max(made) <= 8 * 300
