"""P2P: clouds drawn point by point, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.rendered import Painter, cells, splat, turned
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

RECIPE = "p2p(cloud_size=12, neighbours=4, drawn=8, rotate=False)"


def feature(p, theta, k):
    """f of one cloud (P, 3), edge by edge."""
    g = p @ theta["first.weight"].t() + theta["first.bias"]
    edges = []
    for i in range(len(p)):
        near = sorted(range(len(p)), key=lambda j: float((p[i] - p[j]).norm()))[:k]
        edges.append(torch.stack([torch.cat([g[j] - g[i], g[i]]) @ theta["edges.weight"].t()
                                  for j in near]))
    edges = torch.stack(edges)                                  # (P, k, 64)
    normed = []
    for part in edges.split(16, -1):                            # 4 groups of channels
        mean, var = part.mean(), part.var(unbiased=False)
        normed.append((part - mean) / (var + 1e-5).sqrt())
    made = torch.cat(normed, -1) * theta["norm.weight"] + theta["norm.bias"]
    most = torch.where(made > 0, made, 0.2 * made).max(1).values
    return most @ theta["last.weight"].t() + theta["last.bias"]


def drawn(f, p, S):
    """(64, S, S): every point onto its nine cells."""
    xy = p[:, :2]
    low = xy.min(0).values
    cell = float((xy.max(0).values - low).max()) / (S - 3)
    at = [[min(S - 3, math.floor(float(v) / cell)) for v in row - low] for row in xy]
    shift = [(S - 3 - max(a[n] for a in at)) // 2 for n in (0, 1)]
    grid = [[torch.zeros_like(f[0]) for _ in range(S)] for _ in range(S)]
    for row, a in zip(f, at, strict=True):
        for dy in range(3):
            for dx in range(3):
                grid[a[1] + shift[1] + dy][a[0] + shift[0] + dx] = \
                    grid[a[1] + shift[1] + dy][a[0] + shift[0] + dx] + row
    return torch.stack([torch.stack(line, 1) for line in grid], 1)


def conv(x, w, b):
    """A convolution that keeps the sides, tap by tap."""
    r = w.shape[-1] // 2
    wide = torch.zeros(x.shape[0], x.shape[1] + 2 * r, x.shape[2] + 2 * r, dtype=x.dtype)
    wide[:, r : r + x.shape[1], r : r + x.shape[2]] = x
    out = b.view(-1, 1, 1).expand(-1, *x.shape[1:])
    for u in range(2 * r + 1):
        for v in range(2 * r + 1):
            seen = wide[:, u : u + x.shape[1], v : v + x.shape[2]]
            out = out + torch.einsum("oc,chw->ohw", w[:, :, u, v], seen)
    return out


def picture(p, theta, k, S, size):
    m = drawn(feature(p, theta, k), p, S)
    wide = torch.zeros(m.shape[0], size, size, dtype=m.dtype)
    a = (size - S) // 2
    wide[:, a : a + S, a : a + S] = m

    def by(name, x):
        return conv(x, theta[f"{name}.weight"], theta[f"{name}.bias"])

    h = wide + by("outer", by("inner", wide).clamp(min=0))
    x = 1 / (1 + torch.exp(-by("colour", by("mix", h).clamp(min=0))))
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype).view(3, 1, 1)
    return (x - mean) / std


def cloud(samples=2, points=12, seed=0):
    return torch.rand(samples, points, 3, generator=torch.Generator().manual_seed(seed),
                      dtype=torch.float64)


@pytest.mark.parametrize("model", ["vit", "timm_qkv", "convnext"])
def test_the_equation_written_out(beside, model):
    """Logits and all gradients, of the norms and the class token too."""
    one = beside(model, RECIPE)
    p = cloud()
    theta = {n.removeprefix("painter."): t for (path, n), t in one.theta.items() if not path}
    pixels = torch.stack([picture(row, theta, 4, 8, 16) for row in p])
    key = "pixel_values" if "pixel_values" in one.batch else "x"
    want = one.base(**{**one.batch, key: pixels}).logits
    one.batch["cloud"] = p
    one.agree(want)


def test_the_sum_over_a_map_is_nine_times_that_of_the_features():
    torch.manual_seed(0)
    f, p = torch.randn(3, 20, 5).double(), torch.randn(3, 20, 3).double()
    at = cells(p[..., :2], 10)
    assert int(at.min()) >= 0 and int(at.max()) <= 7
    torch.testing.assert_close(splat(f, at, 10).sum((2, 3)), 9 * f.sum(1))


@pytest.mark.parametrize("shift", [(3.0, 0.0), (0.0, -2.0), (1.5, 0.25)])
def test_where_a_cloud_stands_does_not_matter(shift):
    """In the plane, and at what scale; along one line and at one point it is drawn too."""
    p = (cloud() * 64).round() / 64                              # exact under these shifts
    moved = p[..., :2] + torch.tensor(shift).double()
    assert torch.equal(cells(p[..., :2], 9), cells(moved, 9))
    assert torch.equal(cells(p[..., :2], 9), cells(4 * p[..., :2], 9))
    line = p[..., :2] * torch.tensor([1.0, 0.0])
    at = cells(line, 9)
    assert (at[..., 1] == 3).all() and at[..., 0].amin(1).tolist() == [0, 0]
    assert (cells(torch.ones(1, 4, 2), 9) == 3).all()


def test_only_allowed_tensors_change():
    """Norms, class token, head and what draws: everything else stays as it is."""
    net, batch = tiny("vit")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    tuned = burnish.tune(net, RECIPE)
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step({**batch, "cloud": cloud().float()})
    moved = {n for n, t in before.items() if not torch.equal(t, net.state_dict()[n])}
    want = {n for n in before if "layernorm" in n or n.endswith("cls_token") or "classifier" in n}
    assert moved == want
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"{RECIPE[:-1]}, rest=False)", head=False)
    assert all(".burnish." in f".{n}" for n, _ in tuned.named_parameters())


def test_norms_and_class_tokens_do_not_decay_and_a_top_token_trains():
    for model in ("vit", "timm_qkv"):
        net, _ = tiny(model)
        if model == "timm_qkv" and not hasattr(net, "cls_token"):
            net.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        names = {id(p): n for n, p in net.named_parameters()}
        tuned = burnish.tune(net, RECIPE, head=False)
        optimizer = tuned.optimizer(lr=1e-3, weight_decay=0.1)
        decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups
                  for p in g["params"] if id(p) in names}
        assert any("norm" in n for n in decays) and any(n.endswith("cls_token") for n in decays)
        assert set(decays.values()) == {0.0}


def test_a_token_of_another_tower_rests():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = tiny("timm_qkv")[0], nn.Module()
            self.other.cls_token = nn.Parameter(torch.zeros(1, 1, 4))

        def forward(self, x):
            return self.inner(x).logits

    tuned = burnish.tune(Two(), RECIPE, head=False)
    assert not any(n == "other.cls_token" for n, _ in tuned.named_parameters())


def test_the_least_that_acts():
    least = {"cloud_size": 1, "neighbours": 1, "drawn": 4, "picture": 4}
    assert parse(f"p2p({', '.join(f'{k}={v}' for k, v in least.items())})")[0].changed() == least


def test_running_statistics_stay():
    class Seen(nn.Module):
        """A picture cut into patches, with a batch norm behind blocks."""

        def __init__(self):
            super().__init__()
            self.inner, self.batch_norm = tiny("timm_qkv")[0], nn.BatchNorm2d(3)

        def forward(self, x):
            return self.inner(self.batch_norm(x)).logits

    torch.manual_seed(0)
    net = Seen()
    tuned = burnish.tune(net, RECIPE)
    tuned.optimizer(lr=1e-2)
    label = torch.tensor([0, 1])
    tuned.step({"x": torch.zeros(2, 3, 16, 16), "cloud": cloud().float()},
               loss=lambda out, b: nn.functional.cross_entropy(out, label))
    assert not net.batch_norm.running_mean.any() and int(net.batch_norm.num_batches_tracked) == 0
    assert not torch.equal(net.batch_norm.weight, torch.ones(3)), "its scale trains"


def test_a_picture_says_its_size_alone():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"{RECIPE[:-1]}, picture=16)", head=False)
    stir(tuned)
    net.eval()
    p = cloud().float()
    want = net(**batch, cloud=p).logits
    other = net(pixel_values=torch.zeros_like(batch["pixel_values"]), cloud=p).logits
    assert torch.equal(other, want) and torch.equal(net(cloud=p).logits, want)


def test_clouds_are_turned_in_training_alone():
    torch.manual_seed(0)
    p = cloud(64)
    q = turned(p)
    assert torch.equal(p[..., 1], q[..., 1])
    torch.testing.assert_close(p[..., ::2].norm(dim=-1), q[..., ::2].norm(dim=-1))
    angle = (torch.atan2(q[..., 0], q[..., 2]) - torch.atan2(p[..., 0], p[..., 2])) % math.tau
    torch.testing.assert_close(angle, angle[:, :1].expand_as(angle))
    assert angle[:, 0].std() > 1
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "p2p(cloud_size=12, neighbours=4, drawn=8)", head=False)
    stir(tuned)
    batch["cloud"] = cloud().float()
    assert not torch.equal(net(**batch).logits, net(**batch).logits)
    net.eval()
    assert torch.equal(net(**batch).logits, net(**batch).logits)


def test_count_and_defaults():
    m = parse("p2p")[0]
    want = 32 + 1024 + 128 + 4160 + 2 * 36_928 + 4160 + 195
    assert m.count() == want == 83_555 == sum(p.numel() for p in Painter(32).parameters())
    assert (m.cloud_size, m.neighbours, m.drawn, m.picture, m.rotate) == (4096, 32, None, 224, True)
    net, batch = tiny("vit")
    burnish.tune(net, "p2p(cloud_size=12, neighbours=4)")
    assert net(**batch, cloud=cloud().float()).logits.isfinite().all()      # 16 cells: the picture


@pytest.mark.parametrize("recipe, why", [
    ("p2p(cloud_size=0)", "at least"), ("p2p(neighbours=0)", "at least"),
    ("p2p(drawn=3)", "4 or more"), ("p2p(picture=3)", "4 or more"),
    ("p2p(pixel_mean=(0.5,))", "three"),
    ("p2p(pixel_std=(1.0, 0.0, 1.0))", "positive"), ("p2p(targets='q')", "no targets"),
])
def test_what_it_refuses(recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny("vit")[0], recipe)


def test_what_it_refuses_of_batches_and_models():
    with pytest.raises(burnish.RecipeError, match="cuts pictures"):
        burnish.tune(tiny("bert")[0], "p2p")
    net, batch = tiny("vit")
    burnish.tune(net, "p2p(cloud_size=12, drawn=20)")
    with pytest.raises(burnish.RecipeError, match="20 x 20"):
        net(**batch, cloud=cloud().float())
    with pytest.raises(burnish.RecipeError, match="cloud"):
        net(**batch)
