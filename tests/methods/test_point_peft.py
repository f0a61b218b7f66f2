"""Point-PEFT: recalled prompts and a geometry adapter, written out cloud by cloud in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state import recalled
from burnish.blocks.state.recalled import Bank, Geometry, Prompted, Within
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny
from burnish.testing.points import Groups, PointTransformer

SMALL = "recalled=2, samples=6, layers=1, bottleneck=4, prompt_bottleneck=3, neighbours=3"
RECIPE = f"point_peft({SMALL}, dropout=0.0)"


def tuned_points(recipe=RECIPE, dtype=torch.float64, shown=5, size=0.3):
    """(tuned model in evaluation, untouched base, batch, what the bank was shown)."""
    net, batch = tiny("points", batch=3, dtype=dtype)
    base = copy.deepcopy(net).eval()
    torch.manual_seed(5)
    bank = {"x": torch.randn(shown, 32, 3, dtype=dtype) / 2}
    tuned = burnish.tune(net, recipe, head=False, calibration=[bank])
    for _, p in tuned.named_parameters():
        p.data = p.data.to(dtype)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.to(dtype)
    if size:
        stir(tuned, size=size)
    net.eval()
    return tuned, base, batch, bank


def said(base, x):
    """What the frozen network says of clouds: class token plus the largest of the others."""
    seen = {}
    handle = base.norm.register_forward_hook(lambda m, args, out: seen.update(h=out))
    with torch.no_grad():
        base(x)
    handle.remove()
    return torch.stack([h[0] + h[1:].max(0).values for h in seen["h"]])


def recall(q, bank, k):
    """C of one q: bank (N, d) of unit rows as they are held."""
    like = bank @ (q / q.norm())
    top = sorted(range(len(bank)), key=lambda n: -float(like[n]))[:k]
    e = torch.exp(like[top])
    mean = sum(w * bank[n] for w, n in zip(e / e.sum(), top, strict=True))
    return torch.stack([q, mean, *(bank[n] for n in top)])


def gelu(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def narrow(theta, at, x):
    """W_u quick_gelu(W_d x + b_d) + b_u."""
    z = x @ theta[f"{at}.down.weight"].t() + theta[f"{at}.down.bias"]
    return (z * torch.sigmoid(1.702 * z)) @ theta[f"{at}.up.weight"].t() + theta[f"{at}.up.bias"]


def farthest(p, count):
    chosen = [int((p - p.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        far = [min(float((a - p[c]).norm()) for c in chosen) for a in p]
        chosen.append(max(range(len(p)), key=lambda i: far[i]))
    return chosen


def geometry(theta, i, x, p, k, centres, shared):
    """One cloud in evaluation mode, running statistics at their start."""
    v = []
    for c in centres:
        near = sorted(range(len(p)), key=lambda j: float((p[j] - p[c]).detach().norm()))[:k]
        n = x[near]
        mean, var = n.mean(1, keepdim=True), n.var(1, unbiased=False, keepdim=True)
        m = (n - mean) / (var + 1e-5).sqrt() * theta[f"{i}.geometry.norm.weight"] \
            + theta[f"{i}.geometry.norm.bias"]
        a, b, d = (m @ w.t() for w in shared["qkv"].split(18))
        scores = a @ b.t() / math.sqrt(18)
        n = n + (scores.exp() / scores.exp().sum(1, keepdim=True)) @ d @ shared["proj"].t()
        most = n.max(0).values / math.sqrt(1 + 1e-5) * theta[f"{i}.geometry.batch_norm.weight"] \
            + theta[f"{i}.geometry.batch_norm.bias"]
        v.append(gelu(most) + 0.3 * x[c])
    rows = []
    for j in range(len(p)):
        w = [1 / ((p[j] - p[c]).square().sum() + 1e-8) for c in centres]
        rows.append(x[j] + 0.3 * sum(a / sum(w) * b for a, b in zip(w, v, strict=True)))
    x = torch.stack(rows)
    return x + narrow(theta, f"{i}.geometry.bottleneck", x)


def attention(m, x, far):
    """timm's fused attention of one cloud, with pairs that do not see each other."""
    T, d = x.shape
    q, k, v = (x @ m.qkv.weight.t() + m.qkv.bias).view(T, 3, m.num_heads, -1).permute(1, 2, 0, 3)
    scores = (q @ k.mT / math.sqrt(d // m.num_heads)).masked_fill(far, -math.inf)
    y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, d)
    return y @ m.proj.weight.t() + m.proj.bias


@pytest.mark.parametrize("sight, scale", [(1.28, 0.7), (0.8, 1.3), (None, 0.7)])
def test_the_equation_written_out(sight, scale):
    """Logits, and the gradient of everything that trains, block by block and cloud by cloud."""
    recipe = RECIPE.replace("dropout", f"sight={sight}, scale={scale}, dropout")
    tuned, base, batch, shown = tuned_points(recipe)
    theta = {n.replace(".burnish.default.point_peft", "").removeprefix("blocks."):
             p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}
    shared = {n: theta[f"0.geometry.shared.{n}.weight"] for n in ("qkv", "proj")}
    places = theta["0.geometry.shared.places"]
    q = said(base, batch["x"])
    bank = said(base, shown["x"])
    bank = (bank / bank.norm(dim=1, keepdim=True)).half().double()
    near, c = base.group_divider(batch["x"])
    tokens = base.encoder(near) + base.pos_embed(c)
    ends = []
    for b in range(len(c)):
        x = torch.cat([base.cls_token[0] + base.cls_pos[0], tokens[b]])
        for i, block in enumerate(base.blocks):
            p = c[b]
            if i == 0:
                C = recall(q[b], bank, 2)
                P = theta["0.prompts.rows"] + C + narrow(theta, "0.prompts.bottleneck", C)
                x, p = torch.cat([x[:1], P, x[1:]]), torch.cat([places, c[b]])
            L = len(p) - len(c[b])
            far = torch.zeros(len(x), len(x), dtype=torch.bool)
            for j in range(len(c[b])):
                for k in range(len(c[b])):
                    far[1 + L + j, 1 + L + k] = sight is not None and \
                        float((c[b, j] - c[b, k]).norm()) > sight
            x = x + attention(block.attn, block.norm1(x), far)
            f = block.mlp(block.norm2(x))
            x = x + f + scale * narrow(theta, f"{i}.mlp", f)
            chosen = farthest(p.detach(), len(p) // 2)
            rest = geometry(theta, i, x[1:], p, 3, chosen, shared)
            x = torch.cat([x[:1], rest[L:]])
        h = base.norm(x)
        ends.append(base.head(torch.cat([h[0], h[1:].max(0).values])))
    want, got = torch.stack(ends), tuned.model(**batch).logits
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-9, atol=1e-11)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=want.dtype)
    mine = torch.autograd.grad(got, [p for _, p in tuned.named_parameters()], g)
    for n, a, r in zip(theta, mine, torch.autograd.grad(want, [*theta.values()], g), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-7, atol=1e-10, msg=n)
        assert r.abs().max() > 0, n


def test_a_feature_of_the_bank_recalls_itself_first():
    torch.manual_seed(0)
    bank, seen = Bank(9, 16), torch.randn(9, 16)
    bank.take(seen[:4])
    bank.take(seen[4:])
    assert bank.full and bank.rows.dtype == torch.float16
    like, at = bank.nearest(3 * seen, 4)
    assert at[:, 0].tolist() == [*range(9)]
    assert (like[:, 0] > 0.99).all() and (like.diff(dim=1) <= 0).all()
    torch.testing.assert_close(bank.rows.float().norm(dim=1), torch.ones(9), rtol=0, atol=1e-3)


def test_what_a_bank_was_not_shown_is_not_recalled():
    bank = Bank(8, 4)
    bank.take(-torch.eye(4)[:3])                     # every cosine with it is below that of zeros
    assert sorted(bank.nearest(torch.ones(1, 4), 3)[1][0].tolist()) == [0, 1, 2]
    bank.take(torch.randn(9, 4))                     # more than there is room for
    assert bank.full and int(bank.filled) == 8


def test_the_bank_holds_what_the_base_says_of_calibration_alone():
    tuned, base, batch, shown = tuned_points(size=0)
    (bank,) = (m for m in tuned.model.modules() if isinstance(m, Bank))
    want = said(base, shown["x"])
    torch.testing.assert_close(bank.rows[:5].double(), want / want.norm(dim=1, keepdim=True),
                               rtol=0, atol=1e-3)
    assert int(bank.filled) == 5 and not bank.rows[5:].any()
    before = bank.rows.clone()
    tuned.optimizer(lr=0.1)
    tuned.step(batch)
    assert torch.equal(bank.rows, before)
    few = tuned_points(RECIPE.replace("samples=6", "samples=4"))[0].model
    assert [int(m.filled) for m in few.modules() if isinstance(m, Bank)] == [4]


def test_prompts_leave_behind_every_block():
    tuned, _, batch, _ = tuned_points()
    seen = []
    for block in tuned.model.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(("block", out.shape[1])))
        block.attn.register_forward_hook(lambda m, args, out: seen.append(("within", out.shape[1])))
    tuned.model(**batch)
    assert seen[-4:] == [("within", 13), ("block", 9), ("within", 9), ("block", 9)]


def test_weights_of_an_interpolation_sum_to_one(monkeypatch):
    """Where all centres say the same, every token is told that."""
    torch.manual_seed(1)
    part = Geometry(Within(6, 2), True, 6, 3, 4, None).double().eval()
    x, p = torch.randn(2, 10, 6).double(), torch.randn(2, 10, 3).double()
    monkeypatch.setattr(recalled, "SHARE", 0.0)
    nn.init.zeros_(part.batch_norm.weight)
    nn.init.constant_(part.batch_norm.bias, 0.7)
    want = gelu(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(part.gathered(x, p), want.expand(2, 10, 6))


def test_dropout_is_of_the_rows_alone():
    part, c = Prompted(4, 6, 3, 0.5), torch.randn(1, 4, 6)
    nn.init.ones_(part.rows)
    rows = part(c) - c - part.bottleneck(c)
    assert {*rows.detach().flatten().round().abs().tolist()} == {0.0, 2.0}
    assert torch.equal(part.eval()(c), part.rows + c + part.bottleneck(c))


def test_count_and_defaults():
    """At d = 384: 12 blocks, six of them with prompts."""
    m = parse("point_peft")[0]
    adapters, norms = 2 * (2 * 384 * 16 + 16 + 384), 4 * 384
    prompted = 10 * 384 + 2 * 384 * 8 + 8 + 384
    want = 12 * (adapters + norms) + 6 * prompted + 384 * 54 + 18 * 384 + 30
    assert m.count(384, 12) == want == 412_878
    assert (m.bottleneck, m.prompt_bottleneck, m.recalled, m.layers, m.sight, m.scale, m.dropout) \
        == (16, 8, 8, 6, 1.28, 0.7, 0.1)
    net = PointTransformer(width=64, blocks=3, groups=16)
    tuned = burnish.tune(net, "point_peft(layers=2)", head=False, calibration=[
        {"x": torch.randn(9, 32, 3)}])
    count = parse("point_peft(layers=2)")[0].count(64, 3)
    assert sum(p.numel() for p in tuned.parameters()) == count


def test_the_start():
    tuned, *_ = tuned_points(size=0, dtype=torch.float32)
    own = dict(tuned.named_parameters())
    rows = next(p for n, p in own.items() if n.endswith("prompts.rows")).detach()
    assert 0.01 < float(rows.std()) < 0.025 and float(rows.abs().max()) <= 0.04
    down = next(p for n, p in own.items() if "geometry.bottleneck.down.weight" in n).detach()
    assert 0.8 < float(down.abs().max()) / (6 / 36) ** 0.5 <= 1
    biases = [p.detach() for n, p in own.items() if "down.bias" in n or "up.bias" in n]
    assert all(0 < float(b.abs().max()) < 1e-5 for b in biases)
    places = next(p for n, p in own.items() if n.endswith("places")).detach()
    assert places.shape == (4, 3) and float(places.abs().max()) <= 1 and float(places.min()) < 0


def test_it_learns_and_a_file_brings_the_bank(tmp_path):
    tuned, _, batch, _ = tuned_points(size=0, dtype=torch.float32)
    tuned.model.train()
    tuned.optimizer(lr=5e-3)
    losses = [float(tuned.step(batch)) for _ in range(8)]
    assert losses[-1] < losses[0]
    tuned.model.eval()
    want = tuned.model(**batch).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("points")[0].eval(), tmp_path / "a")
    again.model.eval()
    assert torch.equal(again.model(**batch).logits, want)


@pytest.mark.parametrize("model, recipe, why", [
    ("points", "point_peft(bottleneck=0)", "at least 1"),
    ("points", "point_peft(centres=0)", "at least 1"),
    ("points", "point_peft(layers=-1)", "0 or more"),
    ("points", "point_peft(samples=4)", "at least `recalled`"),
    ("points", "point_peft(sight=0.0)", "positive"),
    ("points", "point_peft(dropout=1.0)", "point_peft: dropout is a probability"),
    ("points", "point_peft(layers=3)", "2 blocks"),
    ("points", "point_peft(layers=1)", "calibration"),
    ("vit", "point_peft", "group_divider"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_too_few_clouds_for_a_bank():
    net, batch = tiny("points")
    with pytest.raises(burnish.DataError, match="shown 2 clouds"):
        burnish.tune(net, "point_peft(layers=1)", calibration=[batch])


def test_tokens_that_are_not_points():
    net, batch = tiny("points")
    burnish.tune(net, f"vpt(length=2, after=1) + {RECIPE}", calibration=[batch])
    with pytest.raises(burnish.RecipeError, match="1 and 8 tokens"):
        net(**batch)


def test_the_groups_are_those_of_the_model():
    near, c = Groups(4, 3)(torch.randn(2, 9, 3))
    assert near.shape == (2, 4, 3, 3) and c.shape == (2, 4, 3)
    torch.testing.assert_close(near[:, :, 0], torch.zeros(2, 4, 3))     # a centre is a point
