"""UniRGB-IR: pool, deformable attention and gates written out in float64; what the first update
moves; what stands outside of what is run again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.infrared import Deformable, Injector, Mix, Norm, Pool
from burnish.testing import stir
from burnish.testing.models import tiny

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = "pixels=16, injectors=2, attention_heads=4, stem=8, offsets=2"


def made(more="", model="vit", beside="", seed=0):
    """(tuned, batch, base) in float64, evaluation mode, statistics of the norms away from 0 and 1.
    """
    net, batch = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, f"unirgb_ir({SIZES}{more}){beside}", head=False)
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, Norm):
            m.running_mean.normal_(generator=g)
            m.running_var.uniform_(0.5, 2.0, generator=g)
    net.double().eval()
    batch = dict(batch, infrared=torch.rand(2, 1, 16, 16, generator=g).double())
    return tuned, batch, base



def groups(net):
    """(tensors of the pool, of each injector in order) by their own names."""
    out = {}
    for n, t in net.state_dict(keep_vars=True).items():
        if "burnish.default." in n:
            home, _, rest = n.partition("burnish.default.")
            out.setdefault(home, {})[rest.partition(".")[2]] = t
    pool = {n.removeprefix("pool."): t for n, t in out.pop("").items()}
    return pool, [{n.removeprefix("injector."): t for n, t in out[k].items()} for k in sorted(out)]


# -- written out ----------------------------------------------------------------------------------
def step(x, p, at, stride):
    x = F.conv2d(x, p[f"{at}.weight"], None, stride, 1)
    name, _, last = at.rpartition(".")
    n = f"{name}.{int(last) + 1}"
    x = (x - p[f"{n}.running_mean"].view(-1, 1, 1)) / (p[f"{n}.running_var"].view(-1, 1, 1)
                                                       + 1e-5).sqrt()
    return (x * p[f"{n}.weight"].view(-1, 1, 1) + p[f"{n}.bias"].view(-1, 1, 1)).relu()


def pooled(p, rgb, ir):
    """Three levels, (B, D, h, w)."""
    stems = []
    for side, x in (("first", rgb), ("second", ir)):
        x = step(step(step(x, p, f"{side}.0", 2), p, f"{side}.3", 1), p, f"{side}.6", 1)
        stems.append(F.max_pool2d(x, 3, 2, 1))
    mixed = []
    for g, k in enumerate((3, 3, 5, 7)):
        R, S = (F.conv2d(x[:, 2 * g : 2 * g + 2], p[f"mix.{s}.{g}.weight"], p[f"mix.{s}.{g}.bias"],
                         padding=(k - 1) // 2) for s, x in zip(("first", "second"), stems,
                                                               strict=True))
        a = torch.sigmoid(F.conv2d(R + S, p["mix.gate.weight"], p["mix.gate.bias"]))
        mixed.append(a * R + (1 - a) * S)
    x, levels = torch.cat(mixed, 1), []
    for i in range(3):
        x = step(x, p, f"down.{i}.0", 2)
        y = torch.einsum("dc,bchw->bdhw", p[f"out.{i}.weight"][:, :, 0, 0], x)
        levels.append(y + p[f"out.{i}.bias"].view(-1, 1, 1) + p["level"][i].view(-1, 1, 1))
    return levels


def norm(x, g, b):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True)
                                             + 1e-6).sqrt() * g + b


def at(v, x, y):
    """v (d, h, w) at a place in pixels, whose centres are at halves; 0 outside."""
    h, w = v.shape[1:]
    x, y = x - 0.5, y - 0.5
    i, j = math.floor(y.item()), math.floor(x.item())
    out = v.new_zeros(len(v))
    for di in (0, 1):
        for dj in (0, 1):
            if 0 <= i + di < h and 0 <= j + dj < w:
                part = (1 - (y - (i + di)).abs()) * (1 - (x - (j + dj)).abs())
                out = out + part * v[:, i + di, j + dj]
    return out


def attended(p, x, levels, grid, heads, places):
    """The injector's attention, a query, a head, a level, a place at a time."""
    q = norm(x, p["norm_q.weight"], p["norm_q.bias"])
    B, T, D = x.shape
    d, maps = D // heads, []
    for level in levels:
        f = norm(level.permute(0, 2, 3, 1), p["norm_f.weight"], p["norm_f.bias"])
        v = f @ p["attention.value.weight"].mT + p["attention.value.bias"]
        maps.append(v.permute(0, 3, 1, 2))
    o = (q @ p["attention.offsets.weight"].mT + p["attention.offsets.bias"]
         ).view(B, T, heads, 3, places, 2)
    a = (q @ p["attention.weights.weight"].mT + p["attention.weights.bias"]
         ).view(B, T, heads, 3 * places).softmax(-1).view(B, T, heads, 3, places)
    rows = []
    for b in range(B):
        for t in range(T):
            here, parts = ((t % grid[1] + 0.5) / grid[1], (t // grid[1] + 0.5) / grid[0]), []
            for h in range(heads):
                y = x.new_zeros(d)
                for n, v in enumerate(maps):
                    H, W = v.shape[2:]
                    for k in range(places):
                        px = here[0] * W + o[b, t, h, n, k, 0]
                        py = here[1] * H + o[b, t, h, n, k, 1]
                        y = y + a[b, t, h, n, k] * at(v[b, h * d : (h + 1) * d], px, py)
                parts.append(y)
            rows.append(torch.cat(parts))
    y = torch.stack(rows).view(B, T, D)
    return y @ p["attention.out.weight"].mT + p["attention.out.bias"]


def written(base, batch, pool, injectors):
    x = batch["pixel_values"]
    ir = batch["infrared"].expand(-1, 3, -1, -1)
    ir = (ir - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
    levels, P = pooled(pool, x, ir), None
    h = base.vit.embeddings(x)
    for layer, p in zip(base.vit.layers, injectors, strict=True):
        N = p["gamma"] * attended(p, h[:, 1:], levels, (4, 4), 4, 2)
        if P is None:
            P = N
        else:
            z = torch.sigmoid(torch.cat([N.mean(1), P.mean(1)], 1) @ p["gate.weight"].mT
                              + p["gate.bias"])
            assert z.shape == (2, 32)
            P = (1 - z[:, None]) * P + z[:, None] * N
        h = layer(torch.cat([h[:, :1], h[:, 1:] + P], 1))
        h = h[0] if isinstance(h, tuple) else h
    return base.classifier(base.vit.layernorm(h)[:, 0])


def test_the_equation_written_out():
    tuned, batch, base = made()
    stir(tuned, size=0.2)
    pool, injectors = groups(tuned.model)
    want = written(base, batch, pool, injectors)
    torch.testing.assert_close(tuned.model(**batch).logits, want)
    loss = F.cross_entropy(want, batch["labels"])
    params = dict(tuned.named_parameters())
    right = torch.autograd.grad(loss, list(params.values()))
    tuned.loss(batch).backward()
    for (n, p), w in zip(params.items(), right, strict=True):
        assert bool(w.any()) or n.endswith("value.bias"), n
        torch.testing.assert_close(p.grad, w, rtol=1e-6, atol=1e-9, msg=n)


def test_the_gate_is_one_number_a_sample_and_channel():
    g = torch.Generator().manual_seed(0)
    inj = Injector(8, 2, 2, first=False).double()
    N, P = torch.randn(3, 5, 8, generator=g).double(), torch.randn(3, 5, 8, generator=g).double()
    z = inj.z(N, P)
    assert z.shape == (3, 8)
    W, b = inj.gate.weight, inj.gate.bias
    torch.testing.assert_close(z, torch.sigmoid(N.mean(1) @ W[:, :8].mT + P.mean(1) @ W[:, 8:].mT
                                                + b))
    assert Injector(8, 2, 2, first=True).gate is None


# -- the start ------------------------------------------------------------------------------------
def test_step_0_is_the_pre_trained_function_whatever_the_second_picture():
    tuned, batch, base = made()
    want = base(pixel_values=batch["pixel_values"]).logits
    for ir in (batch["infrared"], torch.zeros(2, 1, 16, 16), torch.ones(2, 3, 8, 8)):
        got = tuned.model(pixel_values=batch["pixel_values"], infrared=ir).logits
        assert torch.equal(got, want)


def test_the_pool_is_reached_once_gamma_has_moved():
    tuned, batch, _ = made()
    tuned.optimizer(lr=1e-2)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    for turn in range(2):
        tuned.model.zero_grad()
        tuned.loss(batch).backward()
        reached = {n for n, p in tuned.named_parameters() if p.grad is not None
                   and bool(p.grad.any())}
        assert (reached == {n for n in before if n.endswith("gamma")}) == (turn == 0)
        if turn:
            assert any(".pool.first." in n for n in reached)
            assert any(".pool.second." in n for n in reached)
        for p in tuned.parameters():
            p.grad = None
        tuned.step(batch)


def test_convolutions_and_attention_start_as_said():
    torch.manual_seed(0)
    pool = Pool(64, 32)
    for m in pool.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000:
            n = m.kernel_size[0] ** 2 * m.out_channels
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / n), rel=0.05)
    assert pool.level.std().item() == pytest.approx(1, rel=0.2)
    attn = Deformable(16, 4, 3)
    o = attn.offsets.bias.view(4, 3, 3, 2)
    assert torch.allclose(o[0, 1, 2], torch.tensor([3.0, 0.0]), atol=1e-6)
    assert torch.allclose(o[1, 2, 0], torch.tensor([0.0, 1.0]), atol=1e-6)
    assert torch.allclose(o[2, 0, 1], torch.tensor([-2.0, 0.0]), atol=1e-6)
    assert not attn.offsets.weight.any() and not attn.weights.weight.any()


def test_counts_of_the_paper_s_size():
    m = burnish.parse("unirgb_ir")[0]
    assert Pool.count(768, 64) == sum(p.numel() for p in Pool(768, 64).parameters())
    pool = Pool.count(768, 64)
    attention = 4 * sum(p.numel() for p in Deformable(768, 6, 4).parameters())
    gates = 3 * (2 * 768 * 768 + 768)
    assert attention == 5_389_152 and gates == 3_541_248 and pool == 1_655_056
    assert m.count(768) == pool + attention + gates + 4 * 5 * 768
    assert round(m.count(768) / 1e6, 1) == 10.6
    tuned, _, _ = made()
    assert sum(p.numel() for p in tuned.parameters()) == tuned.recipe.named("unirgb_ir").count(32)


# -- in a model -----------------------------------------------------------------------------------
def test_where_the_stages_begin():
    net, _ = tiny("vit", num_hidden_layers=6)
    tuned = burnish.tune(net, "unirgb_ir(pixels=16, injectors=4, attention_heads=4, stem=4)")
    assert sorted({n.partition(".burnish.")[0] for n, _ in tuned.named_parameters()
                   if ".injector." in n}) == [f"vit.layers.{i}" for i in (0, 1, 3, 4)]


def test_a_transformer_of_one_block_has_one_injector():
    net, _ = tiny("vit", num_hidden_layers=1)
    tuned = burnish.tune(net, "unirgb_ir(pixels=16, injectors=1, attention_heads=4, stem=8)",
                         head=False)
    part = tuned.recipe.named("unirgb_ir")
    assert sum(p.numel() for p in tuned.parameters()) == part.count(32)


def test_a_block_that_is_run_again_is_given_the_same():
    plain, batch, _ = made()
    again, _, _ = made(beside=" + checkpoint")
    stir(plain, size=0.2)
    again.model.load_state_dict(plain.model.state_dict())
    for t in (plain, again):
        t.loss(batch).backward()
    theirs = dict(again.named_parameters())
    for n, p in plain.named_parameters():
        torch.testing.assert_close(theirs[n].grad, p.grad)


def test_what_a_checkpointing_of_the_model_s_own_runs_again_is_refused():
    tuned, batch, _ = made()
    block = tuned.model.vit.layers[0]
    with pytest.raises(burnish.RecipeError, match="a pool made where the model begins"):
        block(torch.zeros(2, 17, 32).double())


class Grid(nn.Module):
    """A plain transformer on grids (B, h, w, D), with tables of relative positions."""

    class Block(nn.Module):
        class Attention(nn.Module):
            def __init__(self, d):
                super().__init__()
                self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
                self.rel_pos_h = nn.Parameter(torch.zeros(7, d))

            def forward(self, x):
                q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
                y = F.scaled_dot_product_attention(q + self.rel_pos_h.mean(0), k, v)
                return self.proj(y).view_as(x)

        def __init__(self, d):
            super().__init__()
            self.norm1, self.attn = nn.LayerNorm(d), self.Attention(d)
            self.norm2, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, d), nn.GELU())

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def __init__(self, d=16):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, d, 4, 4)
        self.blocks = nn.ModuleList(self.Block(d) for _ in range(2))

    def forward(self, x):
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.mean((1, 2))


def test_tokens_on_a_grid_and_tables_of_relative_positions():
    torch.manual_seed(0)
    net = Grid().eval()
    x, ir = torch.randn(2, 3, 16, 24), torch.rand(2, 1, 16, 24)
    want = net(x)
    tuned = burnish.tune(net, f"unirgb_ir({SIZES})", head=False)
    extra = {n for n, _ in tuned.named_parameters() if "burnish." not in n}
    assert extra == {f"blocks.{i}.attn.rel_pos_h" for i in range(2)}
    assert torch.equal(net(x=x, infrared=ir), want)
    stir(tuned)
    assert not torch.allclose(net(x=x, infrared=ir), net(x=x, infrared=1 - ir))
    net = Grid()
    bare = burnish.tune(net, f"unirgb_ir({SIZES}, rel_pos=False)", head=False)
    assert all("burnish." in n for n, _ in bare.named_parameters())


def test_a_norm_of_one_number_goes_by_what_it_remembers():
    n = Norm(3).train()
    n.running_mean.fill_(1.0)
    n.running_var.fill_(4.0)
    x = torch.tensor([3.0, 1.0, -1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(n(x), (x - 1) / math.sqrt(4 + 1e-5))
    two = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(n(two).mean(0), torch.zeros(3, 1, 1), atol=1e-5, rtol=0)


def test_the_mix_is_between_both():
    mix = Mix(8).double()
    for p in mix.parameters():
        p.data.zero_()
    for side, value in (("first", 1.0), ("second", 3.0)):
        for conv in getattr(mix, side):
            conv.bias.data.fill_(value)
    x = torch.zeros(1, 8, 4, 4).double()
    torch.testing.assert_close(mix(x, x), torch.full_like(x, 2.0))     # a is a half
    mix.gate.bias.data.fill_(50.0)
    torch.testing.assert_close(mix(x, x), torch.ones_like(x))


@pytest.mark.parametrize("model, more, why", [
    ("vit", "unirgb_ir(pixels=0)", "at least 1"), ("vit", "unirgb_ir(stem=6)", "divides"),
    ("vit", "unirgb_ir(pixel_std=(1.0, 1.0))", "three numbers"),
    ("vit", "unirgb_ir(injectors=4, attention_heads=4)", "there are 2 blocks"),
    ("vit", "unirgb_ir(injectors=1)", "does not divide the width 32"),
    ("vit", "unirgb_ir(targets='q')", "takes no targets"),
    ("swin", "unirgb_ir(attention_heads=4)", "one stack of transformer blocks"),
    ("bert", "unirgb_ir(attention_heads=4)", "one stack of transformer blocks")])
def test_what_it_refuses(model, more, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], more)


@pytest.mark.parametrize("ir, why", [
    (torch.zeros(2, 2, 16, 16), "1 or 3"), (torch.zeros(1, 1, 16, 16), "1 or 3"),
    (torch.zeros(2, 16, 16), "1 or 3"), (torch.full((2, 1, 16, 16), 2.0), "from 0 to 1")])
def test_second_pictures_that_are_none(ir, why):
    tuned, batch, _ = made()
    with pytest.raises(burnish.RecipeError, match=why):
        tuned.model(**{**batch, "infrared": ir})


def test_the_second_picture_is_of_numbers_from_0_to_1():
    """As the class says for all, and with its shape as the settings have it."""
    part = burnish.parse("unirgb_ir(pixels=8)")[0]
    (name,) = part.context
    assert part.context[name].real and part.keys()[name].real and part.keys().keys() == {name}
    assert part.keys()[name].shape == (1, 8, 8)
    assert part.keys()[name].meaning == part.context[name].meaning == \
        "a second picture of each sample"


def test_the_defaults():
    m = burnish.parse("unirgb_ir")[0]
    assert (m.pixels, m.injectors, m.attention_heads, m.offsets, m.stem, m.rel_pos) == \
        (768, 4, 6, 4, 64, True)
