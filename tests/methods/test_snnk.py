"""SNNK adapters: random features behind sub-layers, their kernel, what is shared and kept."""

from __future__ import annotations

import math

import pytest
import torch

import burnish
from burnish.blocks.state.features import RandomFeatures, directions
from burnish.testing import tiny


@pytest.mark.parametrize("model", ["vit", "bert", "gpt2", "swin"])
def test_the_equation_written_out(model, beside):
    """h <- h + V relu(G h) / sqrt(m) + c behind attention and MLP."""
    one = beside(model, "snnk(features=5, seed=3)")
    one.tuned.model.double()
    for path, V in one.at("V"):
        c, width = one.theta[path, "c"], V.shape[0]
        G = directions(5, width, 3, False).double()

        def hook(m, args, h, V=V, c=c, G=G):
            first = h[0] if isinstance(h, tuple) else h
            y = first + torch.clamp(first @ G.T, min=0) @ V.T / 5**0.5 + c
            return (y, *h[1:]) if isinstance(h, tuple) else y
        one.base.get_submodule(path).register_forward_hook(hook)
    # G is kept in single precision, divided there
    with torch.no_grad():
        for _, m in one.tuned.branches(RandomFeatures):
            if "frozen" in m._modules:
                m.frozen.G = directions(5, m.V.shape[0], 3, False).double() / 5**0.5
    one.agree()


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_features_estimate_the_kernel(orthogonal):
    """Without bias, and with an error that falls as the root of their number; less of it with rows
    at right angles."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 8, generator=g, dtype=torch.float64)
    t = torch.arccos(x @ w / x.norm() / w.norm())
    k = float(x.norm() * w.norm() * (torch.sin(t) + (math.pi - t) * torch.cos(t)) / (2 * math.pi))

    def errors(m, draws=400):
        G = torch.stack([directions(m, 8, s, orthogonal).double() for s in range(draws)])
        est = (torch.relu(G @ x) * torch.relu(G @ w)).mean(1)
        return est - k

    few, many = errors(8), errors(128)
    assert abs(few.mean()) < 4 * few.std() / 20 and abs(many.mean()) < 4 * many.std() / 20
    assert 3.2 < float(few.std() / many.std()) < 4.8
    if orthogonal:
        torch.manual_seed(0)
        free = torch.stack([directions(8, 8, s, False).double() for s in range(400)])
        free = (torch.relu(free @ x) * torch.relu(free @ w)).mean(1) - k
        assert few.std() < free.std()


def test_rows_at_right_angles_a_width_at_a_time():
    G = directions(12, 5, 0, True).double()
    lengths = G.norm(dim=1)
    for part in G.split(5):
        gram = part @ part.T
        assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-5
    many = directions(2000, 5, 1, True).norm(dim=1).square()
    assert 4.6 < many.mean() < 5.4 and many.std() > 2                    # chi squared of 5
    assert lengths.std() > 0
    assert torch.equal(directions(3, 5, 7, False), directions(3, 5, 7, False))
    assert not torch.equal(directions(3, 5, 7, False), directions(3, 5, 8, False))
    assert 0.95 < directions(100, 100, 0, False).std() < 1.05


def test_a_bundled_layer_is_the_two_matrices():
    """W2 k(W1 x) of the estimated kernel is V phi(x) with V = W2 phi(W1)."""
    g = torch.Generator().manual_seed(0)
    W1, W2, x = (torch.randn(*shape, generator=g, dtype=torch.float64)
                 for shape in ((6, 4), (3, 6), (5, 4)))
    G = directions(7, 4, 0, False).double()

    def phi(t):
        return torch.relu(t @ G.T) * 7**-0.5
    torch.testing.assert_close((phi(x) @ phi(W1).T) @ W2.T, phi(x) @ (W2 @ phi(W1)).T)


def test_start_counts_and_defaults(published):
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "snnk")
    assert torch.equal(net(**batch).logits, want)
    (m,) = burnish.parse("snnk")
    assert m.settings() == {"targets": None, "features": 16, "orthogonal": False, "seed": 0}
    assert m.count(768) == 13_056
    bottleneck = burnish.parse("pfeiffer(reduction=16)")[0].count(768)       # of 48
    assert bottleneck == 74_544 and round(bottleneck / 13_056, 1) == 5.7
    anatomy, _ = published("ViTConfig", "ViTForImageClassification")
    with torch.device("meta"):
        made = list(m.branch(anatomy))
    assert sum(p.numel() for b in made for p in b.module.parameters()) == 24 * 13_056


@pytest.mark.parametrize("model, widths", [("vit", {32}), ("swin", {16, 32})])
def test_what_is_fixed_stands_once_per_width(model, widths, tmp_path):
    tuned = burnish.tune(tiny(model)[0], "snnk(features=4, seed=2, orthogonal=True)", head=False)
    own = {n: t for n, t in tuned.model.state_dict().items() if n.endswith("frozen.G")}
    assert {t.shape for t in own.values()} == {(4, w) for w in widths} and len(own) == len(widths)
    for t in own.values():
        torch.testing.assert_close(t, directions(4, t.shape[1], 2, True) / 2)
    layers = [m for _, m in tuned.branches(RandomFeatures)]
    assert len({id(m.frozen) for m in layers}) == len(widths) < len(layers)


def test_features_alone_wait_for_backward():
    """m numbers per token of a site, and not the state."""
    from burnish.blocks.state.features import Frozen

    layer = RandomFeatures(Frozen(3, 64, 0, False), 64, owns=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(50, 64, requires_grad=True))
    token = {t.data_ptr(): t.numel() for t in kept if 50 in t.shape}
    assert sum(token.values()) == 50 * 3


def test_no_features_are_refused():
    with pytest.raises(burnish.RecipeError, match="snnk.features=0.: expected at least 1"):
        burnish.tune(tiny("vit")[0], "snnk(features=0)", head=False)
    burnish.tune(tiny("vit")[0], "snnk(features=1)", head=False)
    with pytest.raises(burnish.RecipeError, match="no attention or MLP"):
        burnish.tune(tiny("mlp")[0], "snnk")
