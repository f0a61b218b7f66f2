"""Under autocast the readers of one activation share one copy of it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

import burnish
from burnish.blocks.tape.cast import autocast
from burnish.core.call import Call, resume
from burnish.memory.ledger import Ledger


class Attention(nn.Module):
    def __init__(self, d: int = 64, between: str = ""):
        super().__init__()
        self.norm, self.between = nn.LayerNorm(d), between
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.head = nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(h)
        k = self.k(h)
        if self.between == "in place" and torch.is_autocast_enabled("cpu"):
            with torch.no_grad():
                h.mul_(1.5)                      # stock autocast took copies: they stand
        elif self.between == "in place":
            h = h + (h * 0.5).detach()
        v = self.v(h)
        if self.between == "sum":
            return self.head((q + k + v).mean(1))
        return self.head((q * torch.sigmoid(k) + v).mean(1))


def kept(tuned, x: Tensor) -> int:
    """Bytes that wait for backward beside the weights."""
    ledger = Ledger(tuned.model)
    with ledger:
        with torch.autocast("cpu", torch.bfloat16):
            out = tuned.model(x)
        live = sum(e.bytes for e in ledger.entries if e.death is None and e.category != "weights")
        del out
    return live


@pytest.mark.parametrize("method", ["lora(rank=2", "dora(rank=2", "snell(rank=4", "bone(rank=8",
                                    "oft(block=8", "vera(rank=4", "miss(rank=4"])
def test_three_readers_keep_one_copy(method):  # findings 3.10
    torch.manual_seed(0)
    x = torch.randn(8, 128, 64)
    one = kept(burnish.tune(Attention(between="sum"), f"{method}, targets='q')"), x)
    three = kept(burnish.tune(Attention(between="sum"), f"{method}, targets='q,k,v')"), x)
    copy = x.numel() * 2
    assert three - one < copy / 4                # two further ranks, and no further copy


@pytest.mark.parametrize("between", ["", "in place"])
@pytest.mark.parametrize("recipe", ["full", "lora(rank=2, targets='q,k,v')"])
def test_gradients_are_those_of_stock_autocast(recipe, between):
    torch.manual_seed(0)
    plain = Attention(between=between)
    if recipe.startswith("lora"):
        tuned = burnish.tune(plain, recipe)
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    else:
        tuned = burnish.tune(plain, recipe)
    x = torch.randn(4, 8, 64)

    def grads(on: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        inp = x.clone().requires_grad_()
        tuned.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = tuned.model(inp)
        out.float().square().sum().backward()
        return out, {n: p.grad.clone() for n, p in tuned.model.named_parameters()
                     if p.grad is not None}, inp.grad

    (y, g, dx), (y0, g0, dx0) = grads(True), grads(False)
    assert torch.allclose(y.float(), y0, rtol=0.03, atol=0.03)
    for name, want in g0.items():
        assert torch.linalg.vector_norm(g[name].float() - want) < \
            0.03 * torch.linalg.vector_norm(want) + 1e-3, name
    assert torch.linalg.vector_norm(dx - dx0) < 0.03 * torch.linalg.vector_norm(dx0)


def test_the_shares_of_the_readers_are_summed_in_the_activations_precision():
    """Two gradients that cancel in fp32 but not when each sum is rounded to bf16."""
    net = nn.Module()
    net.a, net.b, net.c = (nn.Linear(1, 1, bias=False) for _ in range(3))
    for m, w in ((net.a, 256.0), (net.b, 1.0), (net.c, -256.0)):
        m.weight.data.fill_(w)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = net.a, net.b, net.c

        def forward(self, x):
            h = x * 1.0
            return self.a(h) + self.b(h) + self.c(h)

    tuned = burnish.tune(Three(), "lora(rank=1, targets='a,b,c')", head=False)
    x = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tuned.model(x).backward(torch.ones(1, 1, dtype=torch.bfloat16))
    assert x.grad.item() == 1.0                  # in bf16: 256 + 1 = 256, and then 0


def test_nothing_of_a_cast_outlives_the_forward():
    import gc

    tuned = burnish.tune(Attention(), "lora(rank=2, targets='q,k,v')")
    seen = []
    tuned.model.k.register_forward_hook(lambda m, a, o: seen.append(weakref.ref(a[0])))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tuned.model(torch.randn(2, 4, 64))
    gc.collect()
    assert seen[0]() is None


def test_a_cast_is_twice_differentiable():
    x = torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), resume(Call()):
        y = autocast(x)
    assert y.dtype == torch.bfloat16
    (g,) = torch.autograd.grad(y.float().pow(3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(h, 6 * x.detach(), rtol=0.02, atol=0.02)


def test_a_cast_goes_with_its_activation_while_the_call_goes_on():
    """At once, without a collection; an earlier activation that goes takes no later cast along."""
    call = Call()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), resume(call):
        first, x = torch.randn(3), torch.randn(3)
        autocast(first)
        once = autocast(x)
        del first
        assert autocast(x).data_ptr() == once.data_ptr()
        (last,) = call.box.values()
        made = weakref.ref(last.made)
        del last, x, once
        assert made() is None and not call.box
