"""LoftQ: rounding and decomposing in turn, written out with plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import BurnishError, RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.methods.delta.start.loftq import Alternated
from burnish.testing import stir
from burnish.testing.models import tiny

F64 = torch.float64
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def weight(out=24, inp=32):
    """A few large directions over a floor, of numbers with outliers."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(out, 3, generator=g) @ torch.randn(3, inp, generator=g) / 3 \
        + torch.randn(out, inp, generator=g)


def grid(W, group=8, top=3):
    """Two bits, runs of `group` inputs, entry by entry in float64."""
    out = torch.empty_like(W, dtype=F64)
    for o in range(W.shape[0]):
        for i in range(0, W.shape[1], group):
            w = W[o, i : i + group].double()
            low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
            s = (high - low) / top
            z = round(-low / s)
            out[o, i : i + group] = s * ((w / s).round().add(z).clamp(0, top) - z)
    return out


def by_turns(W, rank, T, q=grid):
    """(error, Q_t, L_t) of every t."""
    L, found = torch.zeros_like(W, dtype=F64), []
    for _ in range(T):
        Q = q((W.double() - L).float())
        U, S, Vt = torch.linalg.svd(W.double() - Q, full_matrices=False)
        L = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        found.append((float((W.double() - Q - L).norm()), Q, L))
    return found


def tuned(recipe, W=None, kind="linear"):
    W = weight() if W is None else W
    layer = nn.Linear(W.shape[1], W.shape[0]) if kind == "linear" else Conv1D(*W.shape)
    with torch.no_grad():
        layer.weight.copy_(W if kind == "linear" else W.t())
    net = nn.Sequential(layer)
    made = burnish.tune(net, recipe, targets="0", head=False)
    (_, term), = made.terms(Alternated)
    held = net[0].weight.detach()
    return made, term, held if kind == "linear" else held.t(), W


@pytest.mark.parametrize("kind", ["linear", "the transpose"])
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_it_begins_at_the_best_of_the_alternations(T, alpha, kind):
    recipe = f"rtn(bits=2, group=8) + loftq(rank=8, alternations={T}, alpha={alpha})"
    _, term, Q, W = tuned(recipe, kind=kind)
    turns = by_turns(W, 8, T)
    error, want_Q, want_L = min(turns, key=lambda found: found[0])
    assert turns[-1][0] > error or T < 5, "of five the last is not the best"
    assert term.folded and term.scale == (1.0 if alpha is None else alpha / 8)
    torch.testing.assert_close(Q.double(), want_Q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(term.dense().detach().double(), want_L, rtol=1e-3, atol=1e-3)
    got = float((W - Q - term.dense().detach()).norm())
    assert got == pytest.approx(error, rel=1e-4)
    torch.testing.assert_close(term.A @ term.A.t(), term.B.t() @ term.B, rtol=1e-4, atol=1e-4)


def test_a_kernel_is_a_matrix_of_its_inputs():
    net = nn.Sequential(nn.Conv2d(8, 12, (3, 2), groups=2))
    W = net[0].weight.detach().clone().flatten(1)
    made = burnish.tune(net, "rtn(bits=2, group=8) + loftq(rank=3, alternations=2)", targets="0",
                        head=False)
    (_, term), = made.terms(Alternated)
    _, Q, L = min(by_turns(W, 3, 2), key=lambda found: found[0])
    torch.testing.assert_close(net[0].weight.detach().flatten(1).double(), Q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(term.dense().detach().double(), L, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("storage", ["rtn(bits=2, group=8)", "rtn(bits=3, group=0)", "nf4", "fp8"])
def test_closer_than_the_codes_and_than_their_best_correction(storage):
    _, term, Q, W = tuned(f"{storage} + loftq(rank=4)")
    plain = nn.Sequential(nn.Linear(32, 24))
    plain[0].weight.data.copy_(W)
    burnish.tune(plain, f"{storage} + lora(rank=4)", targets="0", head=False)
    off = W - plain[0].weight.detach()
    U, S, Vt = torch.linalg.svd(off)
    corrected = float(S[4:].square().sum().sqrt())
    ours = float((W - Q - term.dense().detach()).norm())
    assert ours < 0.95 * float(off.norm())
    assert ours <= corrected * (1 + 1e-4)


def test_more_alternations_are_never_worse_although_the_error_need_not_fall():
    errors = [error for error, _, _ in by_turns(weight(), 8, 8)]
    assert any(b > a for a, b in zip(errors, errors[1:], strict=False))
    ours = []
    for t in (1, 2, 4, 8):
        _, term, Q, W = tuned(f"rtn(bits=2, group=8) + loftq(rank=8, alternations={t})")
        ours.append(float((W - Q - term.dense().detach()).norm()))
    assert all(b <= a * (1 + 1e-6) for a, b in zip(ours, ours[1:], strict=False))
    assert ours[-1] < ours[0]


def test_outputs_and_gradients_are_those_of_codes_and_a_chain():
    made, term, Q, _ = tuned("rtn(bits=2, group=8) + loftq(rank=4, alpha=2.0)")
    made.model.double()
    stir(made)
    x = torch.randn(6, 32, dtype=F64)
    A, B = (p.detach().double().clone().requires_grad_() for p in (term.A, term.B))
    want = x @ (Q.double() + 0.5 * B @ A).t() + made.model[0].bias.double()
    got = made.model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    for p, ref in ((term.A, A), (term.B, B)):
        torch.testing.assert_close(p.grad.double(), ref.grad, rtol=1e-4, atol=1e-4)


def test_a_load_makes_the_same_codes_bit_by_bit_without_decomposing(tmp_path, monkeypatch):
    net, batch = tiny("llama")
    made = stir(burnish.tune(net, "nf4 + loftq(rank=4, alternations=3)", head=False))
    with torch.no_grad():
        want = net(**batch).logits
    made.save(tmp_path / "a")
    monkeypatch.setattr(torch.linalg, "svd", None)
    again = burnish.load(tiny("llama")[0], tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, want)


def test_without_the_adapter_the_base_is_the_codes_and_what_they_left_out():
    made, term, Q, W = tuned("rtn(bits=4, group=8) + loftq(rank=4)")
    base = Q + term.scale * term.B0 @ term.A0
    with made.disabled():
        x = torch.randn(3, 32)
        torch.testing.assert_close(made.model(x), x @ base.t() + made.model[0].bias, rtol=1e-4,
                                   atol=1e-5)
    assert float((base - W).norm()) < 0.2 * float(W.norm())


def test_the_approximate_decomposition_comes_close():
    _, term, Q, W = tuned("rtn(bits=2, group=8) + loftq(rank=4, iterations=1)")
    _, exact, R, _ = tuned("rtn(bits=2, group=8) + loftq(rank=4)")
    error = [float((W - q - t.dense().detach()).norm()) for q, t in ((Q, term), (R, exact))]
    assert error[0] == pytest.approx(error[1], rel=2e-2) and error[0] != error[1]


def test_the_count_of_llama_7b():
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    (method,) = parse("loftq(rank=64)")
    assert sum(method.count(p) for p in match(anatomy, None)) == 159_907_840


@pytest.mark.parametrize("recipe", ["loftq(rank=2)", "wanda + loftq(rank=2)",
                                    "nf4(targets='1') + loftq(rank=2, targets='0')"])
def test_nothing_rounds_the_weight(recipe):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(RecipeError, match="loftq: nothing in the recipe rounds 0.weight"):
        burnish.tune(net, recipe, head=False, calibration=[torch.randn(3, 8)],
                     targets=None if "targets" in recipe else "0")


def test_nothing_rounds_the_weight_of_a_model_without_values():
    """A simulation is refused as the run would be; a load finds its factors in the file."""
    with pytest.raises(RecipeError, match="loftq: nothing in the recipe rounds"):
        burnish.simulate(tiny("llama", meta=True)[0], "loftq(rank=2)", tiny("llama")[1])


def test_what_a_rank_does_not_fit():
    def net():
        return nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 4), nn.Linear(4, 32))

    with pytest.raises(RankError, match="loftq: rank 5 does not fit 1.weight"):
        burnish.tune(net(), "nf4 + loftq(rank=5)", targets="0,1", head=False)
    made = burnish.tune(net(), "nf4 + loftq(rank=5)", head=False)
    assert [n for n, _ in made.terms(Alternated)] == ["0.weight"]
    assert any("too small for its rank" in n for n in made.adapters["default"].notes)


def test_settings(tmp_path):
    (method,) = parse("loftq")
    assert (method.rank, method.alternations, method.iterations, method.alpha) == (8, 5, 0, None)
    assert parse("loftq(loftq_iter=1)") == parse("loftq(alternations=1)")
    with pytest.raises(RecipeError, match="expected at least 1"):
        parse("loftq(alternations=0)")
    made, *_ = tuned("nf4 + loftq(rank=4)")
    for rank in (None, 4):
        with pytest.raises(BurnishError, match="no exact LoRA form$"):
            burnish.export_peft(made, tmp_path / "p", rank=rank)
