"""VeLoRA: what is kept of an input, what is made of it again, what stays exact."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.tape.projected import mean_direction, subtokens
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.memory import Ledger
from burnish.testing.models import tiny

INP, HID, OUT, N = 24, 42, 8, 64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(INP, HID), nn.Linear(HID, OUT)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def mse(out, batch):
    return (out - batch[1]).square().mean()


def gradients(tuned, batch, loss=mse):
    for p in tuned.parameters():
        p.grad = None
    tuned.loss(batch, loss).backward()
    return {n: p.grad.clone() for n, p in tuned.named_parameters()}


def approximated(x, groups, v=None):
    """Token by token, run by run of channels."""
    d = math.ceil(x.shape[1] / groups)
    padded = torch.zeros(len(x), d * groups, dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    if v is None:
        v = sum(padded[n, g * d : g * d + d] for n in range(len(x)) for g in range(groups))
        v = v / v.norm()
    out = torch.zeros_like(padded)
    for n in range(len(x)):
        for g in range(groups):
            out[n, g * d : g * d + d] = (padded[n, g * d : g * d + d] @ v) * v
    return out[:, : x.shape[1]]


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("groups", [1, 5, 8])
def test_gradients_are_those_of_the_equation(groups, scale):
    """A weight's own gradient reads x^; biases, and what goes down, are exact."""
    torch.manual_seed(0)
    net = Net().double()
    x, y = torch.randn(N, INP).double() + 0.3, torch.randn(N, OUT).double()
    a, b = copy.deepcopy(net.a), copy.deepcopy(net.b)
    got = gradients(burnish.tune(net, f"full + velora(groups={groups}, scale={scale})",
                                 head=False), (x, y))
    z = torch.relu(a(x))
    out = b(z)
    g = 2 * (out - y) / out.numel()
    want = {"b.weight": g.t() @ approximated(z.detach(), groups) * scale, "b.bias": g.sum(0)}
    down = (g @ b.weight) * (z > 0)
    want |= {"a.weight": down.t() @ approximated(x, groups) * scale, "a.bias": down.sum(0)}
    for n, w in want.items():
        torch.testing.assert_close(got[n], w, rtol=1e-9, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


def test_lora_keeps_its_down_projection_exact():
    """A's gradient reads x^, B's reads A x."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INP, OUT)).double()
    x, y = torch.randn(N, INP).double(), torch.randn(N, OUT).double()
    tuned = burnish.tune(net, "lora(rank=2, alpha=2) + velora(groups=4)", head=False, targets="0")
    for p in tuned.parameters():
        p.data = torch.randn(p.shape).double()
    got = gradients(tuned, (x, y))
    A, B = tuned.parameters()
    own = net[0]
    g = 2 * (F.linear(x, own.weight + B @ A, own.bias) - y) / y.numel()
    for n, value in got.items():
        want = (g @ B).t() @ approximated(x, 4) if n.endswith("A") else g.t() @ (x @ A.t())
        torch.testing.assert_close(value, want.detach(), rtol=1e-9, atol=1e-12)


def test_as_many_groups_as_channels_are_the_input():
    torch.manual_seed(0)
    net, batch = Net().double(), (torch.randn(N, INP).double(), torch.randn(N, OUT).double())
    stock = copy.deepcopy(net)
    got = gradients(burnish.tune(net, f"full + velora(groups={HID})", head=False), batch)
    mse(stock(batch[0]), batch).backward()
    for n, p in stock.named_parameters():
        torch.testing.assert_close(got[n], p.grad, rtol=1e-12, atol=1e-15)


def test_directions():
    x = torch.randn(30, 10).double()
    v = mean_direction(x, 3)
    assert v.shape == (4,) and float(v.norm()) == pytest.approx(1)
    assert subtokens(x, 3).shape == (30, 3, 4) and not subtokens(x, 3)[:, 2, 2:].any()
    cancel = torch.cat([x, -x])
    flat = mean_direction(torch.zeros(4, 10), 3)
    assert torch.allclose(flat, torch.full((4,), 0.5))
    assert torch.isfinite(mean_direction(cancel, 3)).all()


def test_a_drawn_direction_is_the_same_in_every_step_and_another_with_another_seed():
    torch.manual_seed(0)
    net, batch = Net().double(), (torch.randn(N, INP).double(), torch.randn(N, OUT).double())
    seen = []
    for seed in (0, 0, 1):
        tuned = burnish.tune(copy.deepcopy(net), "full + velora(groups=4, init='random')",
                             head=False, seed=seed)
        first = gradients(tuned, batch)
        tuned.state.tape.policy.begin(5)
        assert all(torch.equal(first[n], g) for n, g in gradients(tuned, batch).items())
        seen.append(first["a.weight"])
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_a_number_for_each_run(dtype):
    rows, b = N * 64, dtype.itemsize
    net, batch = Net().to(dtype), (torch.randn(rows, INP, dtype=dtype),
                                   torch.randn(rows, OUT, dtype=dtype))
    tuned = burnish.tune(net, "full + velora(groups=4)", head=False)
    with Ledger(net) as ledger:
        ledger.watch("weights", [*batch])
        loss = tuned.loss(batch, mse)
        kept = sum(e.bytes for e in ledger.entries
                   if e.death is None and ledger.category(e) != "weights")
    method = parse("velora(groups=4)")[0]
    says = sum(method.kept_bytes(rows, w, b) for w in (INP, HID)) + rows * HID / 8
    assert says == (rows * 4 * 2 + 6 + 11) * b + rows * HID / 8
    others = rows * OUT * b                          # the loss keeps out - y
    assert loss.requires_grad and kept - others - loss.nbytes == pytest.approx(says, abs=200)
    assert method.kept_bytes(10, 4, b) == 10 * 4 * b


@pytest.mark.parametrize("recipe", ["full + lean(on=False)", "lora(rank=4) + checkpoint"])
def test_the_promise_is_kept_and_the_loss_is_exact(recipe):
    net, batch = tiny("llama", batch=4)
    more = f"{recipe} + velora(groups=8)"
    promised = burnish.simulate(copy.deepcopy(net), more, batch)
    plain = burnish.tune(copy.deepcopy(net), recipe)
    tuned = burnish.tune(net, more)
    assert torch.equal(plain.loss(batch), tuned.loss(batch))
    assert promised.peak_bytes == pytest.approx(burnish.measure(tuned, batch).peak_bytes, rel=0.03)


def test_a_run_in_which_nothing_was_projected_says_so():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "bitfit + velora", head=False)
    tuned.optimizer(lr=1e-3)
    with pytest.warns(UserWarning, match="velora saves nothing here"):
        tuned.step(batch)
    tuned = burnish.tune(Net(), "full + velora(groups=4)", head=False)
    tuned.optimizer(lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.step((torch.randn(N, INP), torch.randn(N, OUT)), mse)


@pytest.mark.parametrize("recipe, words", [
    ("velora(groups=0)", "1 group or more"), ("velora(scale=0.0)", "a scale above 0"),
    ("full + velora + wta_crs", "the form of kept tensors"),
    ("full + velora + coded", "the form of kept tensors")])
def test_what_cannot_be_is_refused(recipe, words):
    with pytest.raises(RecipeError, match=words):
        burnish.tune(Net(), recipe, head=False)


def test_the_defaults():
    assert parse("velora")[0].settings() == {"targets": None, "groups": 64, "scale": 1.0,
                                             "init": "mean"}
