"""IDPT: a prompt that a sample's tokens make, edge by edge, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.instance import FromTokens, Instance, nearest
from burnish.core import registry
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.checks.reference import bf16_is_near_fp32
from burnish.testing.models import tiny

#: (blocks, last norm, head, tokens before the patches)
MADE_OF = {"vit": ("vit.layers", "vit.layernorm", "classifier", 1),
           "deit": ("deit.layers", "deit.layernorm", "classifier", 2),
           "timm_qkv": ("blocks", "norm", "head", 1), "points": ("blocks", "norm", "head", 1),
         "encoder": ("encoder.layers", "encoder.norm", "head", 0)}


def normed(x, scale, shift, train):
    """Batch norm over all axes but the last; statistics 0 and 1 where it does not train."""
    flat = x.flatten(0, -2)
    mean, var = (flat.mean(0), flat.var(0, unbiased=False)) if train else (0, 1)
    return (x - mean) / (var + 1e-5) ** 0.5 * scale + shift


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def prompt(Y, theta, k, train=False):
    """p of each sample: every edge [x_j - x_i; x_i] by itself."""
    x, seen = Y, []
    for n in range(3):
        near = (x.unsqueeze(2) - x.unsqueeze(1)).square().sum(-1).argsort(-1)[..., :k]
        edges = torch.stack([torch.stack([torch.stack([
            torch.cat([s[j] - s[i], s[i]]) for j in near[b, i]]) for i in range(len(s))])
            for b, s in enumerate(x)])                                  # (B, G, k, 2 d)
        made = normed(edges @ theta[f"edges.{n}.linear.weight"].t(),
                      theta[f"edges.{n}.norm.weight"], theta[f"edges.{n}.norm.bias"], train)
        x = leaky(made).max(2).values
        seen.append(x)
    made = torch.cat(seen, -1) @ theta["linear.weight"].t()
    return leaky(normed(made, theta["norm.weight"], theta["norm.bias"], train)).max(1).values


@pytest.mark.parametrize("model", [*MADE_OF])
def test_the_equation_written_out(beside, model):
    """[cls; p + e; Y] into the last block; the head reads [cls; p; max Y] behind the last norm."""
    one = beside(model, "idpt(neighbours=4)")
    for m in one.tuned.model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.double()                                         # its statistics too
    blocks, norm, head, after = MADE_OF[model]
    last = f"{blocks}.1"
    theta = {n.removeprefix("maker."): p for (path, n), p in one.theta.items() if path == last}
    V = one.theta[head, "idpt_head.weight"]
    seen = {}

    def enter(m, args):
        x, *rest = args
        p = prompt(x[:, after:], theta, 4) + theta["place"]
        return (torch.cat([x[:, :after], p.unsqueeze(1), x[:, after:]], 1), *rest)

    def leave(m, args, h):
        seen["s"] = torch.cat([h[:, after], h[:, after + 1:].max(1).values], -1)
        return torch.cat([h[:, :after], h[:, after + 1:]], 1)

    one.base.get_submodule(last).register_forward_pre_hook(enter)
    one.base.get_submodule(norm).register_forward_hook(leave)
    one.base.get_submodule(head).register_forward_hook(lambda m, a, y: y + seen["s"] @ V.t())
    one.agree()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_prompt_of_tokens(train, k):
    """Batch statistics in training; of fewer tokens than neighbours all are near."""
    torch.manual_seed(0)
    part = FromTokens(5, k).double().train(train)
    stir(part, size=0.3)
    theta = {n: p.detach().clone().requires_grad_() for n, p in part.named_parameters()}
    Y = torch.randn(2, 6, 5, dtype=torch.float64)
    mine, other = Y.clone().requires_grad_(), Y.clone().requires_grad_()
    got, want = part(mine), prompt(other, theta, min(k, 6), train)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [mine, *part.parameters()], g),
                    torch.autograd.grad(want, [other, *theta.values()], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_order_of_the_points_does_not_matter():
    torch.manual_seed(0)
    part, Y = FromTokens(8, 4).eval(), torch.randn(2, 12, 8)
    torch.testing.assert_close(part(Y), part(Y[:, torch.randperm(12)]))
    near = nearest(Y, 4)
    assert near.shape == (2, 12, 4) and torch.equal(near[..., 0], torch.arange(12).expand(2, -1))


def test_frozen_blocks_keep_nothing(kept):
    """As many bytes with six blocks as with two, whatever the recipe's own."""
    waits = []
    for layers in (2, 6):
        net, batch = tiny("vit", batch=4, num_hidden_layers=layers)
        waits.append(kept(burnish.tune(net, "idpt(neighbours=4)", head=False), batch))
    assert waits[0] == waits[1]
    net, batch = tiny("vit", num_hidden_layers=3)
    burnish.tune(net, "idpt(neighbours=4)", head=False)
    graphs = []
    for block in net.vit.layers:
        block.mlp.register_forward_hook(lambda m, a, out: graphs.append(out.requires_grad))
    net(**batch)
    assert graphs == [False, False, True]


class Points(nn.Module):
    """Groups of points as tokens, a class token, and a head of one linear."""

    def __init__(self, d=384, blocks=12, classes=15):
        super().__init__()
        self.embed = nn.Linear(3, d)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        layer = nn.TransformerEncoderLayer(d, 6, 4 * d, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x):
        x = self.embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Collecting(Points):
    """Hands out the states between its blocks too."""

    def forward(self, x):
        x = self.embed(x)
        states = (x := torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1),)
        for block in self.blocks:
            states += (x := block(x),)
        return self.head(self.norm(x)[:, 0]), states


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_what_collects_states_has_them_without_the_prompt(blocks):
    net = Collecting(d=12, blocks=blocks).eval()
    x = torch.randn(2, 32, 3)
    before = net(x)[1]
    tuned = burnish.tune(net, "idpt(neighbours=4)", head=False)
    stir(tuned, size=0.3)
    after = net(x)[1]
    assert [s.shape for s in after] == [(2, 33, 12)] * (blocks + 1)
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    assert not torch.allclose(before[-1], after[-1])


def test_one_neighbour_is_the_token_itself():
    """x_j - x_i is 0: what is left of an edge is W_l [0; x_i]."""
    torch.manual_seed(0)
    part, Y = FromTokens(5, 1).double().eval(), torch.randn(2, 6, 5, dtype=torch.float64)
    want = prompt(Y, dict(part.named_parameters()), 1)
    torch.testing.assert_close(part(Y), want)
    assert burnish.tune(tiny("vit")[0], "idpt(neighbours=1)")


def test_points_and_the_count_of_the_paper():
    """1,330,176 numbers make the prompt at d = 384; one more row is its place."""
    net = Points(blocks=2)
    tuned = burnish.tune(net, "idpt", head=False)
    (part,) = (m for m in net.modules() if isinstance(m, Instance))
    assert sum(p.numel() for p in part.maker.parameters()) == 1_330_176
    assert part.place.shape == (384,) and part.after == 1
    assert parse("idpt")[0].count(384, 0) == 1_330_176 + 384
    assert sum(p.numel() for p in tuned.parameters()) == parse("idpt")[0].count(384, 15)
    x = torch.randn(2, 32, 3)
    net.eval()
    stir(tuned, size=0.3)
    turned = x[:, torch.randperm(32)]
    torch.testing.assert_close(net(x), net(turned), rtol=1e-4, atol=1e-4)
    tuned.optimizer(lr=1e-3)
    label = torch.tensor([0, 1])
    losses = [float(tuned.step((x, label), loss=lambda out, b: F.cross_entropy(out, b[1])))
              for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("model", [m for m in MADE_OF if m != "points"])
def test_bf16_is_near_fp32_where_all_tokens_are_near(model, monkeypatch):
    """What is left of the suite's bounds is the choice of neighbours, which rounding decides."""
    monkeypatch.setattr(registry.find("idpt"), "small", {"neighbours": 16})
    bf16_is_near_fp32("idpt", model)


def test_the_start():
    net, batch = tiny("vit")
    burnish.tune(net, "idpt(neighbours=4)", head=False)
    (part,) = (m for m in net.modules() if isinstance(m, Instance))
    assert 0.01 < float(part.place.detach().std()) < 0.03
    own = {n: p for n, p in net.named_parameters() if n.endswith("idpt_head.weight")}
    assert len(own) == 1 and not next(iter(own.values())).any()
    assert parse("idpt")[0].neighbours == 20 and parse("idpt")[0].repeats() is None


def test_switched_off_it_is_the_base():
    net, batch = tiny("vit")
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "idpt(neighbours=4)", head=False)
    stir(tuned)
    with tuned.disabled(), torch.no_grad():
        assert torch.equal(net.eval()(**batch).logits, base(**batch).logits)


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "idpt(neighbours=0)", "at least one"), ("vit", "idpt(targets='q')", "no targets"),
    ("vit", "idpt + lora(rank=2)", "without a graph"), ("bert", "idpt", "reads no token ids"),
    ("roberta", "idpt", "one linear"), ("vit", "idpt + checkpoint", "cannot be joined"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
