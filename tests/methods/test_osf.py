"""OSF: the lesser triplets of a weight train, beside its leading directions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.lower import Lower
from burnish.core.errors import CheckError, RankError
from burnish.core.site import Place
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def made(settings="kept=4", inp=12, out=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"osf({settings})", head=False, targets="0")
    (_, term), = tuned.terms(Lower)
    term.double()
    return model, tuned, term


class Beside(torch.autograd.Function):
    """The value as it is; of its gradient the part off span(U), U (n, k), by rows or columns."""

    @staticmethod
    def forward(ctx, t, U):
        ctx.save_for_backward(U)
        return t.clone()

    @staticmethod
    def backward(ctx, g):
        (U,) = ctx.saved_tensors
        off = torch.eye(len(U), dtype=U.dtype) - U @ U.t()
        return (off @ g if g.shape[0] == len(U) else g @ off), None


@pytest.mark.parametrize("inp, out", [(12, 9), (9, 12), (10, 10), (9, 10), (10, 9)])
@pytest.mark.parametrize("panel", [1 << 22, 40])
def test_outputs_and_gradients_are_those_of_the_equation(inp, out, panel, monkeypatch):
    monkeypatch.setattr("burnish.blocks.weight.panels.PANEL", panel)
    model, tuned, term = made(inp=inp, out=out)
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    high = U[:, :4] @ torch.diag(S[:4]) @ Vt[:4]
    stir(tuned, size=0.3)
    follows(tuned, lambda x, P, E, Q: F.linear(x, high + Beside.apply(P, U[:, :4]) @ torch.diag(E)
                                               @ Beside.apply(Q, Vt[:4].t()), bias),
            [term.P, term.E, term.Q], (5, 3, inp), rtol=1e-5, atol=1e-5)  # its start is in fp32


def test_the_gradients_lie_beside_the_leading_directions():
    for inp, out in ((12, 9), (9, 12)):
        model, tuned, term = made(inp=inp, out=out)
        stir(tuned)
        U, _, Vt = torch.linalg.svd(model[0].weight.detach())
        model(torch.randn(7, inp, dtype=torch.float64)).square().sum().backward()
        assert float(term.P.grad.norm()) > 0.1 < float(term.Q.grad.norm())
        assert float((U[:, :4].t() @ term.P.grad).norm()) < 1e-5
        assert float((term.Q.grad @ Vt[:4].t()).norm()) < 1e-5


def test_plain_descent_leaves_the_leading_triplets_as_they_are():
    model, tuned, _ = made()
    W = model[0].weight.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    sgd = torch.optim.SGD(list(tuned.parameters()), lr=0.05)
    for _ in range(5):
        sgd.zero_grad()
        (model(torch.randn(16, 12, dtype=torch.float64)) - 1).square().mean().backward()
        sgd.step()
    after = tuned.merge()[0].weight.detach()
    assert float((after - W).norm()) > 0.01
    torch.testing.assert_close(after @ Vt[:4].t(), U[:, :4] * S[:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(U[:, :4].t() @ after, S[:4, None] * Vt[:4], rtol=1e-5, atol=1e-5)


def test_the_start_and_the_file(tmp_path):
    net, batch = tiny("llama")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "osf")
    assert torch.equal(net(**batch).logits, want)
    net.train()
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"P", "E", "Q", "P0", "E0", "Q0", "high"}
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_it_is_made_panel_by_panel(monkeypatch):
    monkeypatch.setattr("burnish.blocks.weight.panels.PANEL", 40)
    model, _, _ = made()
    seen, tile = [], Lower.tile
    monkeypatch.setattr(Lower, "tile", lambda self, i0, i1, state: seen.append((i0, i1)) or
                        tile(self, i0, i1, state))
    with torch.no_grad():
        model(torch.randn(2, 12, dtype=torch.float64))
    assert seen == [(0, 4), (4, 8), (8, 12)]


def test_it_leaves_as_a_pair_of_factors():
    _, tuned, term = made()
    stir(tuned)
    A, B = term.low_rank()
    assert A.shape == (10, 12) and B.shape == (9, 10)
    torch.testing.assert_close(B @ A, term.dense())
    want = term.P @ torch.diag(term.E) @ term.Q - term.P0 @ torch.diag(term.E0) @ term.Q0
    torch.testing.assert_close(term.dense(), want)


def test_counts_and_cost():
    place = Place("a", "weight", "linear", 3072, 768)
    (method,) = burnish.parse("osf")
    assert method.count(place) == 384 * 3841 and method.per_token(place) == 0
    assert burnish.parse("osf(kept=700)")[0].count(place) == 68 * 3841
    assert burnish.parse("osf(kept=0.001)")[0].rank(Place("a", "weight", "linear", 9, 12)) == 8
    assert burnish.parse("osf(kept=1)")[0].rank(Place("a", "weight", "linear", 9, 12)) == 8
    assert keeps_what_it_says("osf", "vit") is None
    _, tuned, _ = made()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


@pytest.mark.parametrize("kept", ["0", "-3", "1.0", "0.0", "2.5", "-0.5"])
def test_what_is_no_number_of_triplets_is_refused(kept):
    with pytest.raises(burnish.RecipeError, match="^osf: kept"):
        burnish.parse(f"osf(kept={kept})")


def test_what_has_no_such_triplets_is_refused():
    with pytest.raises(RankError, match="of the 9 triplets of 0.weight leaves none"):
        made("kept=9")
    made("kept=8")
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError):
        burnish.tune(model, "osf", head=False, targets="0")
    assert burnish.parse("osf")[0].settings() == {"targets": None, "kept": 0.5}
