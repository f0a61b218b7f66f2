"""LoRA-GA against its equations in plain float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import ConfigError, RankError, RecipeError
from burnish.core.site import Place
from burnish.testing.models import tiny

#: of the singular vectors 0..2r-1: which are A's, which are B's
SPLIT = {"ArB2r": ([0, 1, 2], [3, 4, 5]), "A2rBr": ([3, 4, 5], [0, 1, 2]),
         "ArBr": ([1, 3, 5], [0, 2, 4])}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 8), nn.Linear(8, 9)

    def forward(self, x, labels):
        out = self.b(torch.tanh(self.a(x)))
        return {"loss": F.cross_entropy(out, labels), "logits": out}


def data(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(5, 10, generator=g, dtype=torch.float64),
             "labels": torch.randint(9, (5,), generator=g)} for _ in range(n)]


def gradients(net, batches):
    """Mean over batches of dL/dW, by autograd on the untouched model."""
    mean = [torch.zeros_like(net.a.weight), torch.zeros_like(net.b.weight)]
    for batch in batches:
        loss = net(**batch)["loss"]
        for m, g in zip(mean, torch.autograd.grad(loss, [net.a.weight, net.b.weight]),
                        strict=True):
            m += g / len(batches)
    return mean


def started(split="ArB2r", **kw):
    torch.manual_seed(0)
    net, batches = Net().double(), data()
    G = gradients(net, batches)
    more = "".join(f", {k}={v}" for k, v in kw.items())
    tuned = burnish.tune(net, f"lora_ga(rank=3, split={split!r}{more})", targets="a,b", head=False,
                         calibration=batches)
    return tuned, G, [m.burnish.default["lora_ga"] for m in (net.a, net.b)]


@pytest.mark.parametrize("split", SPLIT)
@pytest.mark.parametrize("gamma", [16.0, 4.0])
def test_the_factors_are_singular_vectors_of_the_gradient(split, gamma):
    tuned, G, terms = started(split, gamma=gamma, alpha=12.0)
    for g, term in zip(G, terms, strict=True):
        A, B = term.A.detach(), term.B.detach()
        c = g.shape[0] ** 0.25 / gamma**0.5
        eye = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(A @ A.t(), c**2 * eye, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(B.t() @ B, c**2 * eye, rtol=1e-9, atol=1e-9)
        assert term.scale == pytest.approx(12 / 3**0.5)
        U, _, Vt = torch.linalg.svd(g)
        mine, others = SPLIT[split]
        for got, want in ((A, Vt[mine]), (B.t(), U[:, others].t())):     # signs are free
            cos = (got * want).sum(1).abs() / c
            torch.testing.assert_close(cos, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_first_step_is_the_best_one_of_twice_the_rank():
    """One SGD step on A and B moves W within the span of the first 2r singular pairs of G, and
    for ArB2r by -lr s^2 c^2 (G V1 V1^T + U2 U2^T G)."""
    tuned, (G, _), (term, _) = started(alpha=1.0)
    (A, B), s = (term.A.detach().clone(), term.B.detach().clone()), term.scale
    loss = 0
    for batch in data():
        loss = loss + tuned.model(**batch)["loss"] / 3
    loss.backward()
    eta = 1e-6
    A1, B1 = A - eta * term.A.grad, B - eta * term.B.grad
    step = s * (B1 @ A1 - B @ A) / eta
    U, _, Vt = torch.linalg.svd(G)
    c2 = 8**0.5 / 16
    V1, U2 = Vt[:3].t(), U[:, 3:6]
    want = -s**2 * c2 * (G @ V1 @ V1.t() + U2 @ U2.t() @ G)
    torch.testing.assert_close(step, want, rtol=1e-4, atol=1e-9)
    inside = U[:, :6] @ U[:, :6].t() @ step @ Vt[:6].t() @ Vt[:6]
    torch.testing.assert_close(step, inside, rtol=1e-4, atol=1e-9)
    best = U[:, :6] @ U[:, :6].t() @ G                       # what of G has rank 2r
    cosine = F.cosine_similarity(-step.flatten(), best.flatten(), dim=0)
    random = F.normalize(torch.randn(3, 10, dtype=torch.float64), dim=1)   # LoRA: B = 0, A drawn
    lora = G @ random.t() @ random
    plain = F.cosine_similarity(lora.flatten(), G.flatten(), dim=0)
    assert float(cosine) > 0.999 and float(cosine) > float(plain)


def test_outputs_and_gradients_are_those_of_the_equation():
    tuned, _, (term, _) = started()
    layer = tuned.model.a
    W, bias, s = layer.weight.detach().clone(), layer.bias.detach().clone(), term.scale
    x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, W, bias)), "step 0 is the base"
    A0, B0 = term.A.detach().clone(), term.B.detach().clone()
    with torch.no_grad():
        for p in (term.A, term.B):
            p.add_(0.1 * torch.randn_like(p))
    A, B = (p.detach().clone().requires_grad_() for p in (term.A, term.B))
    want, got = F.linear(x, W - s * B0 @ A0 + s * B @ A, bias), layer(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, term.A, term.B], g),
                    torch.autograd.grad(want, [x, A, B], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_only_as_many_samples_as_are_asked_for_are_read():
    _, _, (few, _) = started(samples=5)
    torch.manual_seed(0)
    net = Net().double()
    U, _, Vt = torch.linalg.svd(gradients(net, data()[:1])[0])
    cos = (few.A.detach() * Vt[:3]).sum(1).abs() / (8**0.25 / 4)
    torch.testing.assert_close(cos, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_load_needs_no_data_and_a_tune_does(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora_ga(rank=4)", calibration=[batch])
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    with pytest.raises(ConfigError, match="calibration"):
        burnish.tune(tiny("llama")[0], "lora_ga(rank=4)")


def test_a_second_adapter_over_coded_weights_says_what_it_lacks():
    """A weight that a storage holds has no gradient of its own."""
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "nf4 + lora_ga(rank=4)", calibration=[batch])
    with pytest.raises(ConfigError, match="lora_ga reads the gradient of .* a storage holds"):
        tuned.add("second", "lora_ga(rank=4)")
    assert list(tuned.adapters) == ["default"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(RankError, match="needs 10 singular vectors.*largest rank there is 4"):
        burnish.tune(Net().double(), "lora_ga(rank=5)", targets="a", head=False,
                     calibration=data())
    with pytest.raises(RankError, match="rank 0 needs .* largest rank there is 4"):
        burnish.tune(Net().double(), "lora_ga(rank=0)", targets="a", head=False,
                     calibration=data())
    with pytest.raises(RecipeError, match="gamma > 0"):
        burnish.parse("lora_ga(gamma=0)")


def test_the_count_on_llama():
    method = burnish.parse("lora_ga(rank=8)")[0]
    assert 32 * 2 * method.count(Place("q", "weight", "linear", 4096, 4096)) == 4_194_304


def test_defaults_are_the_published_ones():
    assert burnish.parse("lora_ga")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "gamma": 16.0, "split": "ArB2r", "samples": 32}


def test_what_just_fits_is_taken():
    assert burnish.parse("lora_ga(gamma=0.5, samples=1)")
    (term,) = (t for _, t in burnish.tune(Net().double(), "lora_ga(rank=1)", targets="a",
                                          head=False, calibration=data()).terms(nn.Module))
    assert term.A.shape == (1, 10)
