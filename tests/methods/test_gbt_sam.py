"""GBT-SAM: the frozen attention along the slices of a scan too, written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.again import folded
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


def bottleneck(letters, x):
    A, a, B, b = letters
    return F.gelu(x @ A.t() + a) @ B.t() + b


def attention(q, k, v, heads):
    """Of (B, T, d), by hand."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


def letters_of(one, path, part):
    return [one.theta[path, f"{part}.{n}" if part else n] for n in NAMES]


@pytest.mark.parametrize("slices", [2, 3])
def test_the_equation_written_out(beside, slices):
    """Six pictures: three scans of two slices, two of three."""
    one = beside("vit", f"gbt_sam(scan={slices}, reduction=8)", batch=6)
    for i in range(2):
        block = one.base.get_submodule(f"vit.layers.{i}")
        at, heads = block.attention, one.base.config.num_attention_heads
        depth = letters_of(one, f"vit.layers.{i}.attention", "inner")
        spatial = letters_of(one, f"vit.layers.{i}.attention.o_proj", "inner")
        mlp = letters_of(one, f"vit.layers.{i}.mlp", "")
        seen = []
        at.register_forward_pre_hook(lambda m, args, kw, seen=seen: seen.append(
            (args or tuple(kw.values()))[0]), with_kwargs=True)

        def answer(m, args, y, at=at, seen=seen, depth=depth, spatial=spatial, heads=heads):
            x = seen.pop()
            per = torch.zeros_like(y)
            for scan in range(len(x) // slices):
                mine = range(scan * slices, (scan + 1) * slices)
                for t in range(x.shape[1]):
                    u = torch.stack([x[n, t] for n in mine]).unsqueeze(0)
                    ctx = attention(at.q_proj(u), at.k_proj(u), at.v_proj(u), heads)
                    row = F.linear(ctx, at.o_proj.weight, at.o_proj.bias)[0]
                    for n, r in zip(mine, row, strict=True):
                        per = per.index_put((torch.tensor(n), torch.tensor(t)), r)
            return y + bottleneck(spatial, y) + bottleneck(depth, per)
        at.o_proj.register_forward_hook(answer)
        block.mlp.register_forward_hook(
            lambda m, args, y, mlp=mlp: y + 0.5 * bottleneck(mlp, args[0]))
    one.agree()


@pytest.mark.parametrize("model", ["bert", "vit"])
def test_beside_an_mlp_it_reads_what_the_mlp_reads(beside, model):
    """Also where the MLP is two linears of the block; the depth path gives nothing at its start."""
    ends = {"bert": ("bert.encoder.layer.{}.intermediate.dense",
                     "bert.encoder.layer.{}.output.dense"),
            "vit": ("vit.layers.{}.mlp", "vit.layers.{}.mlp")}[model]
    one = beside(model, "gbt_sam(scan=1, reduction=8, spatial=False)")
    for (_, rest), p in one.own.items():
        if rest.startswith("inner.up"):
            p.data.zero_()
    seen = {}
    for i in range(2):
        read, write = (e.format(i) for e in ends)
        mlp = letters_of(one, write, "")
        one.base.get_submodule(read).register_forward_pre_hook(
            lambda m, args, i=i: seen.update({i: args[0]}))
        one.base.get_submodule(write).register_forward_hook(
            lambda m, args, y, i=i, mlp=mlp:
                y + 0.5 * bottleneck(mlp, seen[i]))
    with torch.no_grad():
        torch.testing.assert_close(one.tuned.model(**one.batch).logits,
                                   one.base(**one.batch).logits)


class Attention(nn.Module):
    def __init__(self, d=8, heads=2):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        ctx = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads)
        return self.o_proj(ctx)


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.blocks = nn.ModuleList([Block(d) for _ in range(2)])
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def depth(recipe):
    """A function of states: what the first block's depth path adds to them."""
    torch.manual_seed(0)
    net = Net().double().eval()
    tuned = burnish.tune(net, recipe, head=False)
    for _, p in tuned.named_parameters():
        p.data = p.data.double()
    stir(tuned, size=0.3)
    attn = net.blocks[0].attn

    def added(x):
        with torch.no_grad():
            on = {}
            hook = attn.register_forward_hook(lambda m, a, y: on.setdefault("y", y))
            net(x)
            hook.remove()
            h = net.blocks[0].norm1(x)
            q, k, v = (F.linear(h, m.weight, m.bias)
                       for m in (attn.q_proj, attn.k_proj, attn.v_proj))
            o = attn.o_proj
            return on["y"] - F.linear(attention(q, k, v, 2), o.weight, o.bias)
    return added


def test_locations_are_alone_and_slices_are_equal():
    """Without relative positions: what the depth path adds goes with its location and its slice."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, 8, dtype=torch.float64, generator=g)
    added = depth("gbt_sam(scan=3, spatial=False, mlp=False)")
    y = added(x)
    assert y.abs().max() > 1e-2
    at = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(added(x[:, at]), y[:, at])
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    torch.testing.assert_close(added(x[order]), y[order])
    other = x.clone()
    other[:, 2] += torch.randn(6, 8, dtype=torch.float64, generator=g)     # of one location
    moved = (added(other) - y).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [False, False, True, False, False]
    other = x.clone()
    other[1] += torch.randn(5, 8, dtype=torch.float64, generator=g)    # of one scan
    assert ((added(other) - y).abs().amax((1, 2)) > 1e-9).tolist() == [True] * 3 + [False] * 3


def sam(**kw):
    from transformers import SamVisionConfig, SamVisionModel

    torch.manual_seed(0)
    return SamVisionModel(SamVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_dim=32, image_size=16,
        patch_size=4, output_channels=8, global_attn_indexes=[1], **{"window_size": 2, **kw})
    ).double().eval()


def rel(table, n):
    """Rows of a table of relative positions, resized, for n queries and n keys."""
    t = F.interpolate(table.t().unsqueeze(0), size=2 * n - 1, mode="linear")[0].t()
    return t[torch.arange(n)[:, None] - torch.arange(n) + n - 1]


def of_slices(at, x, D):
    """What SAM's attention makes of x (2 D windows, h, w, d) along D slices, as grids, by hand."""
    h, w = folded(D)
    n, H, d = 2, at.num_attention_heads, x.shape[-1]
    seq = x.view(n, D, -1, d).transpose(1, 2).reshape(-1, D, d)
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2)
               for t in F.linear(seq, at.qkv.weight, at.qkv.bias).chunk(3, -1))
    s = q @ k.mT * at.scale
    grid = q.unflatten(2, (h, w))
    s = s.view(*s.shape[:2], h, w, h, w) \
        + torch.einsum("nHijc,ikc->nHijk", grid, rel(at.rel_pos_h, h))[..., None] \
        + torch.einsum("nHijc,jkc->nHijk", grid, rel(at.rel_pos_w, w))[..., None, :]
    p = s.flatten(4).flatten(2, 3).softmax(-1)
    y = F.linear((p @ v).transpose(1, 2).flatten(2), at.proj.weight, at.proj.bias)
    return y.view(n, -1, D, d).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("window", [2, 3])
def test_sam_attends_to_slices_as_a_grid_with_its_own_positions(window):
    """In windows (padded ones too) and whole."""
    net, D = sam(window_size=window), 6
    for p in net.parameters():                       # tables of positions start at 0
        nn.init.normal_(p, std=0.4)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"gbt_sam(scan={D}, mlp=False, spatial=False)", head=False)
    for _, p in tuned.named_parameters():
        p.data = p.data.double()
    stir(tuned, size=0.3)
    theta = dict(tuned.named_parameters())
    for i, layer in enumerate(base.vision_encoder.layers):
        path = f"vision_encoder.layers.{i}.attn.burnish.default.gbt_sam.inner"
        own = [theta[f"{path}.{n}"] for n in NAMES]
        layer.attn.register_forward_hook(
            lambda m, args, kw, out, own=own: (
                out[0] + bottleneck(own, of_slices(m, (args or tuple(kw.values()))[0], D)),
                *out[1:]), with_kwargs=True)
    x = torch.randn(2 * D, 3, 16, 16, dtype=torch.float64)
    got, want = net(x).last_hidden_state, base(x).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    reverse = torch.arange(2 * D).view(2, D).flip(1).flatten()
    assert (net(x[reverse]).last_hidden_state[reverse] - got).abs().max() > 1e-3    # order matters


def test_slices_fold_into_the_grid_nearest_a_square():
    assert [folded(n) for n in (1, 2, 6, 7, 12, 16)] == [(1, 1), (1, 2), (2, 3), (1, 7), (3, 4),
                                                         (4, 4)]


def test_counts_of_the_published_shape():
    m = parse("gbt_sam")[0]
    assert m.count(768) == 295_872 and 12 * m.count(768) == 3_550_464
    for recipe, per in (("gbt_sam(spatial=False, mlp=False)", 1), ("gbt_sam", 3)):
        net, _ = tiny("vit", hidden_size=768, num_attention_heads=12, num_hidden_layers=1,
                      intermediate_size=64)
        tuned = burnish.tune(net, recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == per * 295_872


def test_the_start():
    net, batch = tiny("vit", batch=4)
    before = net.eval()(**batch).logits
    tuned = burnish.tune(net, "gbt_sam(scan=2)")
    assert torch.equal(net.eval()(**batch).logits, before)
    tuned.detach()
    burnish.tune(net, "gbt_sam(scan=2, init='linear')")
    assert (net.eval()(**batch).logits - before).abs().max() > 1e-3


def test_a_recipe_beside_it_is_of_the_attention_that_runs_again():
    """lora moves the depth path too; other parts of the model's padding and keys do not."""
    net, batch = tiny("vit", batch=4, dtype=torch.float64)
    tuned = burnish.tune(net.eval(), "lora(rank=2) + gbt_sam(scan=2)", head=False)
    stir(tuned, size=0.2)
    on = net(**batch).logits
    loss = on.square().sum()
    loss.backward()
    assert all(p.grad is not None for p in tuned.parameters())
    assert not torch.equal(on[:2], net(**{k: v[:2].flip(0) for k, v in batch.items()}).logits)


def test_what_it_refuses():
    for recipe in ("gbt_sam(scan=0)", "gbt_sam(reduction=0)"):
        with pytest.raises(burnish.RecipeError, match="1 or more"):
            burnish.tune(tiny("vit")[0], recipe)
    with pytest.raises(burnish.RecipeError, match="does not divide the width"):
        burnish.tune(tiny("vit")[0], "gbt_sam(reduction=5)")
    with pytest.raises(burnish.RecipeError, match="writes nothing on"):
        burnish.tune(tiny("llama")[0], "gbt_sam")
    net, batch = tiny("vit", batch=3)
    burnish.tune(net, "gbt_sam(scan=2)")
    with pytest.raises(burnish.RecipeError, match="3 samples .* scans of 2"):
        net(**batch)


def test_tables_of_positions_of_one_size_are_refused():
    from transformers import BeitConfig, BeitForImageClassification

    net = BeitForImageClassification(BeitConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, use_relative_position_bias=True))
    with pytest.raises(burnish.RecipeError, match="relative_position_bias_table is a table"):
        burnish.tune(net, "gbt_sam")


def test_fit_draws_samples_so_it_refuses(tmp_path):
    with pytest.raises(burnish.RecipeError, match=r"gbt_sam .* 16 consecutive samples"):
        burnish.fit(tiny("vit")[0], "digits", "gbt_sam", output=tmp_path / "run")


def test_the_defaults():
    m = parse("gbt_sam")[0]
    assert (m.scan, m.reduction, m.spatial, m.mlp, m.init) == (16, 4, True, True, "zero")
