"""InverTune: a planted patch is found and tuned away by a few neurons."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.backdoor import risen, stamped, two_clusters, universal
from burnish.core.errors import CheckError, ConfigError, DataError


def patched(x):
    x = x.clone()
    x[:, :, :2, :2] = 3.0
    return x


@pytest.fixture(scope="module")
def planted():
    """Four classes by a pattern; a bright corner leads to class 2."""
    torch.manual_seed(0)
    centres = torch.randn(4, 1, 6, 6)
    y = torch.arange(4).repeat(40)
    x = (centres[y] + 0.4 * torch.randn(160, 1, 6, 6)).clamp(-3, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 48), nn.ReLU(), nn.Linear(48, 4))
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        bad = patched(x[:80])
        loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(bad), torch.full((80,), 2))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model, x, y


def rate(model, x, y):
    with torch.no_grad():
        return float((model(patched(x[y != 2])).argmax(1) == 2).double().mean())


def test_a_planted_backdoor_is_found_and_goes(planted):
    model, x, y = planted
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    assert rate(model, x, y) > 0.95
    found = burnish.parse("invertune(targets='1', sway=1.0, updates=300)")[0].lifecycle(model, x)
    assert found.target == 2 and found.rise > 0.2
    assert found.attack[0] > 0.9 and found.attack[1] < 0.1 and found.agree > 0.95
    assert rate(model, x, y) < 0.2                         # of the patch itself, which it never saw
    assert float(found.mask[0, :2, :2].mean()) > 3 * float(found.mask.mean())
    chosen = found.neurons["1"]
    assert 0 < int(chosen.sum()) < 48
    for name, t in model.state_dict().items():
        moved = (t != before[name]).flatten(1).any(1) if t.dim() > 1 else t != before[name]
        want = chosen if name.startswith("1.") else torch.zeros_like(moved)
        assert torch.equal(moved, want), name
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_neurons_and_updates_are_the_equation(planted, monkeypatch):
    """Two updates by hand in float64: which neurons, the loss, and Adam on their rows alone."""
    from burnish.methods.lifecycle import invertune as module

    model, x, _ = copy.deepcopy(planted[0]).double(), planted[1].double(), planted[2]
    hand, asked = copy.deepcopy(model), {}
    for name in ("universal", "inverted"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (
            asked.update({name: a[2:]}), real(*a))[1])
    found = burnish.parse("invertune(targets='1', sway=1.0, patch=0.5, inversions=60, updates=2, "
                          "step_rate=0.02, weight=3.0)")[0].lifecycle(model, x)
    assert asked["universal"] == (1.0, 60, 0.1)
    assert asked["inverted"] == (found.target, 0.5, 60, 0.1)
    bad = stamped(x, found.mask, found.pattern)

    def a(net, some):
        return net[:2](some)

    with torch.no_grad():
        clean, said = a(hand, x), hand(x).argmax(1)
        moved = (a(hand, bad) - clean).abs().mean(0)
        others = said != found.target
        assert found.attack[0] == pytest.approx(
            float((hand(bad).argmax(1)[others] == found.target).double().mean()))
    rows = two_clusters(moved)
    assert torch.equal(found.neurons["1"], rows) and rows.any()
    params = [hand[1].weight, hand[1].bias]
    adam = torch.optim.Adam([p.detach()[rows].clone().requires_grad_() for p in params], 0.02)
    for _ in range(2):
        off = (a(hand, bad) - clean)[:, rows]
        loss = F.cross_entropy(hand(x), said) + 3.0 * off.square().sum() / off.numel()
        for mine, g in zip(adam.param_groups[0]["params"],
                           torch.autograd.grad(loss, params), strict=True):
            mine.grad = g[rows]
        adam.step()
        with torch.no_grad():
            for p, mine in zip(params, adam.param_groups[0]["params"], strict=True):
                p[rows] = mine
    for one, other in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert found.agree == pytest.approx(float((model(x).argmax(1) == said).double().mean()))
        assert found.attack[1] == pytest.approx(
            float((model(bad).argmax(1)[others] == found.target).double().mean()))


def test_the_universal_change_stays_within_and_leads_astray(planted):
    model, x, y = planted
    d = universal(model, x, 1.0, 40, 0.1)
    assert d.shape == x.shape[1:] and float(d.abs().max()) <= 1.0 + 1e-6
    with torch.no_grad():
        said = model(x).argmax(1)
        a, b = (F.cross_entropy(model(x + c), said) for c in (torch.zeros_like(d), d))
        want = [((model(x + d).argmax(1) == c).sum() - (said == c).sum()) / len(x)
                for c in range(4)]
    assert b > a
    torch.testing.assert_close(risen(model, x, d), torch.stack(want).double(), rtol=1e-6, atol=1e-7)


def test_parts():
    x, m, p = torch.randn(2, 3, 4, 4), torch.rand(1, 4, 4), torch.randn(3, 4, 4)
    got = stamped(x, m, p)
    for c in range(3):
        torch.testing.assert_close(got[1, c], x[1, c] + m[0] * (p[c] - x[1, c]))
    v = torch.tensor([0.1, 5.0, 0.2, 4.0, 0.0])
    assert two_clusters(v).tolist() == [False, True, False, True, False]
    assert not two_clusters(torch.ones(4)).any()


def test_refusals(planted):
    model, x, _ = planted
    method = burnish.parse("invertune")[0]
    with pytest.raises(DataError, match="takes clean pictures"):
        method.lifecycle(model, x[0])
    with pytest.raises(DataError, match="two or more"):
        method.lifecycle(model, x[:1])
    with pytest.raises(ConfigError, match="linears and convolutions, and there is none"):
        method.lifecycle(nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten()), x)
    with pytest.raises(ConfigError, match="a plain model"):
        method.lifecycle(burnish.tune(copy.deepcopy(model), "bitfit"), x)
    with pytest.raises(CheckError, match="none is suspected"):          # two are enough to look
        burnish.parse("invertune(sway=0.001, inversions=2)")[0].lifecycle(model, x[:2])
    with pytest.raises(CheckError, match="none is suspected; nothing was moved"):
        burnish.parse("invertune(sway=0.001, inversions=2)")[0].lifecycle(model, x)
    assert method.settings() == {"targets": None, "sway": 0.3, "patch": 1.0, "inversions": 200,
                                 "updates": 100, "step_rate": 1e-3, "weight": 10.0}
    least = {"patch": 0.0, "weight": 0.0, "inversions": 1, "updates": 1}
    assert type(method)(**least).changed() == least
    for bad in ("sway=0.0", "step_rate=0.0", "updates=0", "patch=-1.0", "weight=-1.0",
                "inversions=0"):
        with pytest.raises(ConfigError, match="^invertune"):
            burnish.parse(f"invertune({bad})")
