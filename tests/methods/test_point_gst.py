"""PointGST: tokens filtered in a cloud's Fourier domain, written out in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.bottleneck import Bottleneck
from burnish.blocks.state.clouds import Filter, along_curve, bases, spectrum
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny
from burnish.testing.points import Groups, PointTransformer

RECIPE = "point_gst(rank=4, local=4)"


def fourier(c):
    """Phi of one cloud's centres (G, 3), entry by entry in numpy."""
    c = c.double().numpy()
    G = len(c)
    far = np.array([[np.sqrt(((c[i] - c[j]) ** 2).sum()) for j in range(G)] for i in range(G)])
    least = min(far[i, j] for i in range(G) for j in range(G) if far[i, j] > 0)
    near = np.array([[1.0 if i == j else least / far[i, j] for j in range(G)] for i in range(G)])
    degree = near.sum(1) + 1e-6
    L = np.eye(G) - near / np.sqrt(np.outer(degree, degree))
    values, U = np.linalg.eigh(L)
    assert (np.diff(values) > 1e-9).all(), "the basis of this example is not unique"
    rows = [u * np.sign(u[np.abs(u).argmax()]) for u in U.T]
    return torch.from_numpy(np.stack(rows))


def curve(c):
    """Groups along a Z-shaped curve: bits of the three cells interleaved, x lowest."""
    cells = [[min(1023, int(v)) for v in p] for p in ((c - c.min(0).values) * 100).tolist()]
    keys = [int("".join(f"{z:010b}"[n] + f"{y:010b}"[n] + f"{x:010b}"[n] for n in range(10)), 2)
            for x, y, z in cells]
    return sorted(range(len(keys)), key=lambda i: (keys[i], i))


def filtered(t, phi, W, b, scale, shift):
    s = phi @ t
    seen = (s - s.mean(-1, keepdim=True)) / (s.var(-1, unbiased=False, keepdim=True)
                                             + 1e-5).sqrt() * scale + shift
    z = seen @ W.t() + b
    return phi.t() @ (s + z * torch.sigmoid(z))


def mixed(h, c, letters, local=4):
    """One cloud: h (T, r), centres (G, 3)."""
    W, b, g, a, g_local, a_local = letters
    G = len(c)
    t = h[-G:]
    out = t * torch.sigmoid(t) + filtered(t, fourier(c), W, b, g, a)
    order, rows = curve(c), {}
    for k in range(0, G, local):
        run = order[k : k + local]
        made = filtered(t[run], fourier(c[run]), W, b, g_local, a_local)
        rows |= dict(zip(run, made, strict=True))
    out = out + torch.stack([rows[i] for i in range(G)])
    first = h[: len(h) - G]
    return torch.cat([first * torch.sigmoid(first), out])


INNER = [f"mixer.filter.{n}" for n in ("linear.weight", "linear.bias", "norm_global.weight",
                                       "norm_global.bias", "norm_local.weight", "norm_local.bias")]
OUTER = ("down.weight", "down.bias", "up.weight", "up.bias")


@pytest.mark.parametrize("besides", ["", " + checkpoint"])
def test_the_equation_written_out(beside, besides):
    one = beside("points", RECIPE + besides, size=0.5)
    _, centres = one.base.group_divider(one.batch["x"])
    for i in range(2):
        A, a, B, b = (one.theta[f"blocks.{i}.mlp", n] for n in OUTER)
        letters, seen = [one.theta[f"blocks.{i}.mlp", n] for n in INNER], {}

        def before(m, args, seen=seen):
            seen["x"] = args[0]

        def behind(m, args, out, A=A, a=a, B=B, b=b, letters=letters, seen=seen):
            h = seen["x"] @ A.t() + a
            made = [mixed(row, c, letters) for row, c in zip(h, centres, strict=True)]
            return out + torch.stack(made) @ B.t() + b

        one.base.get_submodule(f"blocks.{i}.norm2").register_forward_pre_hook(before)
        one.base.get_submodule(f"blocks.{i}.mlp").register_forward_hook(behind)
    one.agree()


@pytest.mark.parametrize("groups", [3, 8])
def test_a_basis_is_orthonormal_and_stands_by_frequency(groups):
    torch.manual_seed(0)
    c = torch.randn(5, groups, 3, dtype=torch.float64)
    phi = spectrum(c)
    torch.testing.assert_close(phi @ phi.mT, torch.eye(groups).double().expand(5, -1, -1))
    for one, cloud in zip(phi, c, strict=True):
        torch.testing.assert_close(one, fourier(cloud))
    assert (phi[:, 0] > 0).all(), "the lowest frequency has one sign"


def test_a_clouds_basis_is_its_own():
    """Another cloud of the batch, at another distance, changes nothing."""
    torch.manual_seed(1)
    c = torch.randn(2, 8, 3, dtype=torch.float64)
    near = torch.stack([c[0], c[1] * 1e-3])
    for mine, other in zip(bases(c, 4), bases(near, 4), strict=True):
        assert torch.equal(mine[0], other[0])


def test_centres_that_coincide_have_a_basis():
    """As if they were d_min apart, not at an infinite weight; also where all of them do."""
    torch.manual_seed(2)
    c = torch.randn(1, 6, 3, dtype=torch.float64)
    c[0, 3] = c[0, 1]
    for cloud in (c, torch.zeros(1, 6, 3).double()):
        phi = spectrum(cloud)
        assert phi.isfinite().all()
        torch.testing.assert_close(phi @ phi.mT, torch.eye(6).double().unsqueeze(0))
    far = (c[0].unsqueeze(1) - c[0].unsqueeze(0)).norm(dim=-1)
    least = far[far > 0].min()
    near = torch.where(far > 0, least / far.clamp(min=1e-12), 1.0)
    root = (near.sum(1) + 1e-6) ** -0.5
    L = torch.eye(6).double() - root[:, None] * near * root
    made = spectrum(c)[0] @ L @ spectrum(c)[0].t()
    torch.testing.assert_close(made, torch.diag(made.diag()), rtol=0, atol=1e-9)
    assert (made.diag().diff() > -1e-9).all()


def test_low_precision_is_lifted():
    c = torch.randn(2, 4, 3).bfloat16()
    assert spectrum(c).dtype == torch.float32
    assert torch.equal(spectrum(c), spectrum(c.float()))


def test_runs_follow_the_curve():
    torch.manual_seed(3)
    c = torch.rand(3, 16, 3, dtype=torch.float64) * 2 - 1
    assert [row.tolist() for row in along_curve(c)] == [curve(x) for x in c]
    _, runs, order = bases(c, 4)
    for b in range(3):
        for k in range(4):
            torch.testing.assert_close(runs[b, k], fourier(c[b, order[b, 4 * k : 4 * k + 4]]))


def test_without_a_filter_tokens_double_beside_their_activation():
    """W = b = 0: silu(t) + 2 t before W_u, since bases are orthonormal; other tokens silu(h)."""
    net, batch = tiny("points", dtype=torch.float64)
    burnish.tune(net, RECIPE, head=False)
    net.double()
    (first, _) = (m for m in net.modules() if isinstance(m, Bottleneck))
    seen = {}
    first.mixer.register_forward_hook(lambda m, args, out: seen.update(h=args[0], out=out))
    net(**batch)
    h, out = seen["h"], seen["out"]
    torch.testing.assert_close(out[:, 1:], F.silu(h[:, 1:]) + 2 * h[:, 1:])
    torch.testing.assert_close(out[:, :1], F.silu(h[:, :1]))


class PostNorm(PointTransformer):
    """Blocks that normalise last, whose MLP is two linears of the block."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.blocks = nn.Sequential(*(copy.deepcopy(layer) for _ in range(2)))


def test_where_the_norm_stands_last_it_reads_what_the_mlp_reads():
    """At W = b = 0: the MLP adds W_u (silu(h) + 2 h) + b_u of points, W_u silu(h) + b_u of the
    class token."""
    torch.manual_seed(0)
    net = PostNorm().double()
    base, batch = copy.deepcopy(net), tiny("points", dtype=torch.float64)[1]
    tuned = burnish.tune(net, "point_gst(rank=1, local=1)", head=False)
    net.double()
    made = {n: m for n, m in net.named_modules() if isinstance(m, Bottleneck)}
    assert len(made) == 2
    for m in made.values():
        nn.init.normal_(m.up.weight, std=0.3)
    for block, m in zip(base.blocks, made.values(), strict=True):
        def behind(module, args, out, block=block, m=m):
            h = block.seen @ m.down.weight.t() + m.down.bias
            t = torch.cat([F.silu(h[:, :1]), F.silu(h[:, 1:]) + 2 * h[:, 1:]], 1)
            return out + t @ m.up.weight.t() + m.up.bias

        block.linear1.register_forward_pre_hook(
            lambda module, args, block=block: setattr(block, "seen", args[0]))
        block.linear2.register_forward_hook(behind)
    got, want = net.train()(**batch).logits, base.train()(**batch).logits
    torch.testing.assert_close(got, want)
    with tuned.disabled():
        assert not torch.allclose(net(**batch).logits, want)


def test_the_start_is_the_base():
    net, batch = tiny("points")
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, RECIPE, head=False)
    assert torch.equal(net.eval()(**batch).logits, base(**batch).logits)
    down = next(m for m in net.modules() if isinstance(m, Bottleneck)).down.weight.detach()
    assert float(down.abs().max()) <= (6 / (32 + 4)) ** 0.5 < 1.2 * float(down.abs().max())
    assert not any(p.any() for m in net.modules() if isinstance(m, Filter)
                   for p in m.linear.parameters())
    stir(tuned, size=0.5)
    assert not torch.allclose(net(**batch).logits, base(**batch).logits, atol=1e-3)


def test_the_count_of_the_paper():
    """354,528 in twelve blocks of width 384 at rank 36."""
    assert parse("point_gst")[0].count(384) == 29_544 and 12 * 29_544 == 354_528
    net = PointTransformer(width=384, blocks=2, heads=6, groups=128, classes=15)
    tuned = burnish.tune(net, "point_gst", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * 29_544
    assert parse("point_gst")[0].local == 32


def test_bases_are_made_once_a_forward(monkeypatch):
    """For all blocks, and for those that run again in backward."""
    from burnish.blocks.state import clouds

    made = []
    monkeypatch.setattr(clouds, "spectrum", lambda c, of=clouds.spectrum: made.append(1) or of(c))
    net, batch = tiny("points")
    tuned = burnish.tune(net, f"{RECIPE} + checkpoint", head=False)
    tuned.loss(batch).backward()
    assert len(made) == 2                        # of the cloud, and of its runs
    with tuned.disabled():
        net(**batch)
    assert len(made) == 2


def test_beside_prompts_tokens_of_points_are_the_last():
    net, batch = tiny("points")
    tuned = burnish.tune(net, f"vpt(length=2, after=1) + {RECIPE}", head=False)
    stir(tuned, size=0.3)
    assert net(**batch).logits.isfinite().all()


class Elsewhere(nn.Module):
    """A grouper that says nothing of its centres."""

    def forward(self, x):
        return Groups(8, 6)(x)[0]


def test_what_it_refuses():
    for settings in ("rank=0", "local=0"):
        with pytest.raises(burnish.RecipeError, match="at least 1"):
            burnish.tune(tiny("points")[0], f"point_gst({settings})")
    with pytest.raises(burnish.RecipeError, match="group_divider"):
        burnish.tune(tiny("vit")[0], "point_gst")
    net, batch = tiny("points")
    burnish.tune(net, "point_gst(local=3)")
    with pytest.raises(burnish.RecipeError, match="2, 4, 8 are possible"):
        net(**batch)
    net, batch = tiny("points")
    burnish.tune(net, RECIPE)
    with pytest.raises(burnish.RecipeError, match="none have been gathered"):
        net.blocks(torch.randn(2, 9, 32))
    net, batch = tiny("points")
    net.group_divider = Elsewhere()
    burnish.tune(net, RECIPE)
    with pytest.raises(burnish.RecipeError, match=r"\(batch, groups, 3\)"):
        net(**batch)
