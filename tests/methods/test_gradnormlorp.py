"""GradNormLoRP: DoRA whose factors' gradients are projected on both sides; in float64."""

from __future__ import annotations

import math

import torch
from torch import nn

import burnish
from burnish.core.recipe import parse
from burnish.memory import simulate
from burnish.testing.models import tiny

F64 = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(14, 18, dtype=F64)])

    def forward(self, x):
        return self.layers[0](x)


def moved(G, state, t, r):
    """P N Q of one factor: both singular factors from the first gradient, Adam in r x r."""
    if t == 1:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)             # largest entries positive
        state["P"] = (U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign())[:, :r]
        state["Q"] = (Vh * Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign())[:r]
        state["m"] = state["v"] = 0.0
    R = state["P"].t() @ G @ state["Q"].t()
    return state["P"] @ adam(R, state, t) @ state["Q"]


def adam(R, state, t):
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * R
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * R**2
    return math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * state["m"] / (state["v"].sqrt() + 1e-6)


def test_the_equations():
    """W = M (W0 + I J) / ||W0 + I J||, norms differentiated; I and J by projected Adam."""
    torch.manual_seed(0)
    net = Net()
    W0, b = net.layers[0].weight.detach().clone(), net.layers[0].bias.detach().clone()
    recipe = "dora(rank=8, alpha=16.0, hold_norm=False) + " \
             "galore(rank=4, every=250, scale=4.0, proj_type='full')"
    assert str(parse("gradnormlorp")) == str(parse(recipe))
    tuned = burnish.tune(net, "gradnormlorp", head=False, targets="layers.0")
    for _, p in tuned.named_parameters():
        p.data = p.data.double()
    J, B = (named_of(tuned, s).detach().clone().requires_grad_() for s in ((8, 14), (18, 8)))
    M = W0.norm(dim=1).requires_grad_()
    tuned.optimizer(lr=1e-2)
    states = {"I": {}, "J": {}, "M": {}}
    for t in range(1, 5):
        x = torch.randn(6, 14, dtype=F64, generator=torch.Generator().manual_seed(t))
        y = torch.randn(6, 18, dtype=F64, generator=torch.Generator().manual_seed(t + 50))
        tuned.step(x, lambda out, _, y=y: (out - y).square().mean())
        V = W0 + 2.0 * B @ J
        out = x @ (M / V.norm(dim=1))[:, None].mul(V).t() + b
        gB, gJ, gM = torch.autograd.grad((out - y).square().mean(), (B, J, M))
        with torch.no_grad():
            for p, g, word in ((B, gB, "I"), (J, gJ, "J")):
                if t == 1 and word == "J":
                    assert not g.any()                   # I = 0 there: J's first gradient is zero
                p -= 1e-2 * 4.0 * moved(g, states[word], t, 4) if g.any() else 0.0
            M -= 1e-2 * adam(gM, states["M"], t)
        if t == 1:                                       # there the stored basis is the first axes
            states["J"].update(P=torch.eye(8, dtype=F64)[:, :4], Q=torch.eye(14, dtype=F64)[:4],
                               m=0.0, v=0.0)
    for want in (B, J, M):
        p = named_of(tuned, tuple(want.shape))
        torch.testing.assert_close(p.detach(), want.detach(), rtol=1e-7, atol=1e-9)


def test_a_row_is_moved_across_its_direction():
    """``(dL/dV)_o . V_o = 0``; with norms held constant it is not."""
    torch.manual_seed(0)
    across = []
    for hold in (False, True):
        net = Net()
        tuned = burnish.tune(net, f"dora(rank=14, alpha=14.0, hold_norm={hold})", head=False,
                             targets="layers.0")
        for _, p in tuned.named_parameters():
            p.data = p.data.double()
        J = named_of(tuned, (14, 14))
        with torch.no_grad():
            J.copy_(torch.eye(14))                       # V = W + I, so that dI is dV
        x, y = torch.randn(6, 14, dtype=F64), torch.randn(6, 18, dtype=F64)
        (net(x) - y).square().mean().backward()
        dV = named_of(tuned, (18, 14)).grad
        W = net.layers[0].weight
        across.append(float(((dV * W).sum(1) / (dV.norm(dim=1) * W.norm(dim=1))).abs().max()))
    assert across[0] < 1e-12 and across[1] > 1e-2


def named_of(tuned, shape):
    return next(p for _, p in tuned.named_parameters() if tuple(p.shape) == shape)


def test_it_begins_as_the_model_and_merges():
    net, batch = tiny("llama")
    net.eval()
    first = net(**batch).logits.detach()
    tuned = burnish.tune(net, "gradnormlorp", head=False)
    torch.testing.assert_close(tuned.model(**batch).logits, first, rtol=1e-5, atol=1e-5)
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(8)]
    assert losses[-1] < losses[0]
    net.eval()
    with torch.no_grad():
        last = net(**batch).logits
        tuned.merge()
        torch.testing.assert_close(net(**batch).logits, last, rtol=1e-4, atol=1e-4)


def test_its_moments_are_fewer_than_lora_s_and_lengths_are_not_projected():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "gradnormlorp", head=False)
    opt = tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    moments = lora = 0
    for _, p in tuned.named_parameters():
        held = opt.state[p]["exp_avg"].shape
        assert held == ((4, 4) if p.dim() > 1 else p.shape)
        assert ("projector.left" in opt.state[p]) == (p.dim() > 1)
        moments += 2 * held.numel()
        lora += 2 * p.numel() if p.dim() > 1 else 0
    assert moments < lora


def test_what_trains_of_a_7b_model_is_the_count_of_the_paper_s_setting():
    """r (m + n) and a length a row. With moments of a byte the state is a small part of the 10.5 %
    of full tuning's (Adam, bf16) that the paper tells of."""
    net, _ = tiny("llama", meta=True, dtype=torch.bfloat16, hidden_size=4096, vocab_size=32000,
                  intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                  num_key_value_heads=32, tie_word_embeddings=False)
    ids = torch.zeros(1, 8, dtype=torch.long)
    report = simulate(net, "gradnormlorp + adam8bit", {"input_ids": ids, "labels": ids},
                      device="cuda")
    assert report.trainable == 19_988_480 + 1_359_872
    whole = sum(p.numel() for p in net.parameters())
    assert 0 < report.by_category["optimizer"] < 0.105 * 4 * whole
