"""Objectives follow the scale of the loss: accumulation, loss scaling, anybody's loop."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.testing.models import tiny


class Net(nn.Module):
    """Returns its loss where it is given targets."""

    def __init__(self, form="namespace"):
        super().__init__()
        self.form = form
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, y=None, labels=None, num_items_in_batch=None):
        out = self.b(torch.tanh(self.a(x)))
        if labels is not None:
            loss = F.cross_entropy(out, labels, reduction="sum") / num_items_in_batch
            return SimpleNamespace(loss=loss, logits=out)
        if y is None:
            return out
        loss = F.mse_loss(out, y)
        if self.form == "tuple":
            return loss, out
        if self.form == "scalar":
            return loss
        if self.form == "dict":
            return {"loss": loss, "logits": out}
        return SimpleNamespace(loss=loss, logits=out)


def start(form="namespace", alpha=0.7, extra="", dtype=torch.float64):
    torch.manual_seed(0)
    net = Net(form).to(dtype)
    tuned = burnish.tune(net, f"full + l2_sp(alpha={alpha}, beta={alpha}) + sgd{extra}", head=False)
    base = pulled_to(tuned)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, dtype=dtype))
    return tuned, base


def pulled_to(tuned):
    """The start of every tensor, zero for the head's."""
    heads = tuple(f"{h}." for h in tuned.anatomy.head)
    return {n: torch.zeros_like(p) if n.startswith(heads) else p.detach().clone()
            for n, p in tuned.model.named_parameters()}


def data(n, k=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(k)
    return torch.randn(n, 6, generator=g).to(dtype), torch.randn(n, 3, generator=g).to(dtype)


def want(tuned, base, batches, alpha=0.7):
    """Gradients of mean task loss + alpha / 2 ||w - w0||^2, by stock autograd on a stock copy."""
    stock = Net().double()
    stock.load_state_dict({n: p.detach() for n, p in tuned.model.named_parameters()})
    loss = sum(F.mse_loss(stock(x), y) for x, y in batches) / len(batches)
    loss = loss + sum(alpha / 2 * (p - base[n]).square().sum()
                      for n, p in stock.named_parameters())
    names, params = zip(*stock.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def compare(tuned, wanted, scale=1.0):
    for n, p in tuned.model.named_parameters():
        torch.testing.assert_close(p.grad, scale * wanted[n], rtol=1e-9, atol=1e-11)


def loss_in(out):
    if isinstance(out, torch.Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out["loss"] if isinstance(out, dict) else out.loss


@pytest.mark.parametrize("form", ["namespace", "tuple", "scalar", "dict"])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_accumulation_and_loss_scale_are_followed_in_a_plain_loop(form, scale):
    tuned, base = start(form)
    tuned.optimizer(lr=0.0)
    batches = [data(4, k) for k in range(3)]
    wanted = want(tuned, base, batches)
    for x, y in batches:
        (loss_in(tuned.model(x, y)) * (scale / 3)).backward()
    compare(tuned, wanted, scale)


def test_a_loss_made_by_tuned_loss_takes_the_terms_along():
    tuned, base = start()
    tuned.optimizer(lr=0.0)
    batches = [data(4, k) for k in range(2)]
    wanted = want(tuned, base, batches)
    for batch in batches:
        (tuned.loss(batch, lambda out, b: F.mse_loss(out, b[1])) / 2).backward()
    compare(tuned, wanted)


def test_two_losses_added_before_one_backward():
    tuned, base = start()
    tuned.optimizer(lr=0.0)
    batches = [data(4, k) for k in range(2)]
    wanted = want(tuned, base, batches)
    first, second = (tuned.model(x, y).loss for x, y in batches)
    (0.5 * first + 0.5 * second).backward()
    compare(tuned, wanted)


def test_a_loss_made_elsewhere_gets_the_terms_once_per_update():
    tuned, base = start()
    opt = tuned.optimizer(lr=0.0)
    batches = [data(4, k) for k in range(3)]
    wanted = want(tuned, base, batches)
    for x, y in batches:
        (F.mse_loss(tuned.model(x), y) / 3).backward()
    opt.step()
    compare(tuned, wanted)


def test_the_models_loss_unused_is_noticed():
    """Labels given, the loss computed again from the logits: the pull still acts, once."""
    tuned, base = start()
    opt = tuned.optimizer(lr=0.0)
    x, y = data(4)
    wanted = want(tuned, base, [(x, y)])
    F.mse_loss(tuned.model(x, y).logits, y).backward()
    opt.step()
    compare(tuned, wanted)


def test_shares_of_tokens_are_followed():
    """transformers divides sums by the items of all micro-batches; a term is spread likewise."""
    tuned, base = start()
    tuned.optimizer(lr=0.0)
    parts = [(data(n, n)[0], torch.randint(0, 3, (n,))) for n in (3, 5)]
    parts[0][1][0] = -100
    before = copy.deepcopy(tuned.model.state_dict())
    for x, labels in parts:
        tuned.model(x, labels=labels, num_items_in_batch=7).loss.backward()
    stock = Net().double()
    stock.load_state_dict(before)
    loss = sum(F.cross_entropy(stock(x), lab, reduction="sum") for x, lab in parts) / 7
    loss = loss + sum(0.35 * (p - base[n]).square().sum() for n, p in stock.named_parameters())
    for (n, p), g in zip(tuned.model.named_parameters(),
                         torch.autograd.grad(loss, list(stock.parameters())), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-8, msg=n)


def test_a_scaler_with_a_fused_step_gets_the_pull_at_its_scale():
    """Fused AdamW unscales inside its kernel: what is added before must be scaled."""
    ends = []
    for scaled in (False, True):
        tuned, _ = start(dtype=torch.float32, extra="")
        recipe = "full + l2_sp(alpha=5.0, beta=5.0) + adamw"
        tuned = burnish.tune(tuned.detach(), recipe, head=False)
        with torch.no_grad():
            for k, p in enumerate(tuned.model.parameters()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
        opt = tuned.optimizer(lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        x, y = data(4, dtype=torch.float32)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(F.mse_loss(tuned.model(x), y)).backward()
            scaler.step(opt)
            scaler.update()
        ends.append({n: p.detach().clone() for n, p in tuned.model.named_parameters()})
    for n in ends[0]:
        torch.testing.assert_close(ends[0][n], ends[1][n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", ["", " + step_in_backward"])
def test_a_step_inside_backward_sees_gradient_and_pull_together(extra):
    tuned, base = start(extra=extra)                                  # findings 2.2
    tuned.optimizer(lr=0.1)
    batch = data(4)
    before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
    wanted = want(tuned, base, [batch])
    tuned.step(batch, loss=lambda out, b: F.mse_loss(out, b[1]))
    for n, p in tuned.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] - 0.1 * wanted[n], rtol=1e-9, atol=1e-11)


def test_terms_of_two_tensors_see_both_as_they_were():
    """adalora + step_in_backward: the same step as after backward, bit for bit."""
    ends = []
    for extra in ("", " + step_in_backward"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        tuned = burnish.tune(net, f"lora(rank=2) + l2_sp(alpha=3.0) + sgd{extra}", targets="all",
                             head=False)
        tuned.optimizer(lr=0.1)
        for k in range(3):
            x, y = data(4, k, torch.float32)
            tuned.step((x, y), loss=lambda out, b: F.mse_loss(out, b[1]))
        ends.append([p.detach().clone() for p in tuned.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["scratch", "in_place"])
def test_a_zeroth_order_step_adds_the_pull_at_both_points(mode):
    """g is the difference of loss + pull at theta +- eps z, formed densely in fp64."""
    from burnish.blocks.update.zeroth import perturbed

    torch.manual_seed(0)                                              # findings 2.2
    net = Net().double()
    tuned = burnish.tune(net, f"full + l2_sp(alpha=0.7, beta=0.7) + mezo(mode='{mode}')",
                         head=False)
    base = pulled_to(tuned)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float64))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = tuned.optimizer(lr=1e-3)
    x, y = data(4)
    tuned.step((x, y), loss=lambda out, b: F.mse_loss(out, b[1]))
    both = []
    for eps in (1e-3, -1e-3):
        moved = {n: perturbed(t, n, opt.log.seeds[0], eps, torch.empty_like(t))
                 for n, t in before.items()}
        stock = Net().double()
        stock.load_state_dict(moved)
        both.append((F.mse_loss(stock(x), y) + sum(
            0.35 * (p - base[n]).square().sum() for n, p in stock.named_parameters())).item())
    assert opt.log.scalars[0] == pytest.approx((both[0] - both[1]) / 2e-3, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
def test_the_balance_of_routers_follows_the_scale_of_the_loss(scale):
    net, batch = tiny("llama", dtype=torch.float64)                   # findings 2.9
    tuned = burnish.tune(net, "mola(rank=2, balance=0.3, dropout=0.0)")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            p.data = p.double() + 0.05 * torch.randn(p.shape, dtype=torch.float64)
    tuned.loss(batch).backward()
    once = [p.grad.clone() for p in tuned.parameters()]
    for p in tuned.parameters():
        p.grad = None
    (net(**batch).loss * scale).backward()
    for p, g in zip(tuned.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, scale * g, rtol=1e-8, atol=1e-11)


def test_nothing_of_a_weights_size_waits_for_backward(kept_bytes):
    plain, pulled = kept_bytes("full"), kept_bytes("full + l2_sp")
    assert pulled <= plain + 64


@pytest.fixture
def kept_bytes():
    from burnish.memory import Ledger

    def measure(recipe):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
        tuned = burnish.tune(net, recipe, head=False)
        tuned.optimizer(lr=1e-3)
        batch = torch.randn(4, 64)
        with Ledger(net) as ledger:
            ledger.watch("weights", [batch])
            loss = tuned.loss(batch, lambda out, _: out.square().mean())
            alive = sum(e.bytes for e in ledger.entries
                        if e.death is None and ledger.category(e) != "weights")
        del loss
        return alive
    return measure
