"""Stepping inside backward: the weights are those of the same rule stepped afterwards."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse
from burnish.testing.models import tiny


@pytest.mark.parametrize("rule", ["sgd", "adamw(weight_decay=0.2)", "lion(weight_decay=0.2)",
                                  "sgd(momentum=0.9)"])
@pytest.mark.parametrize("model", ["vit", "llama"])
def test_bit_for_bit_that_of_the_rule_alone(model, rule):
    """Five updates with a falling rate; tied weights step once, with the whole gradient."""
    ends = []
    for recipe in (f"full + {rule} + master_weights", f"full + {rule} + step_in_backward"):
        net, batch = tiny(model, dtype=torch.float64)
        net.eval()
        tuned = burnish.tune(net, recipe)
        opt = tuned.optimizer(lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t))
        for _ in range(5):
            net(**batch).loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
        ends.append({n: p.detach().clone() for n, p in net.named_parameters()})
    for n, p in ends[0].items():
        torch.testing.assert_close(ends[1][n], p, rtol=1e-12, atol=1e-14, msg=n)


def test_against_stock_torch_alone():
    """torch.optim.SGD behind a whole backward, on an untouched copy."""
    net, batch = tiny("vit", dtype=torch.float64)
    stock, _ = tiny("vit", dtype=torch.float64)
    stock.load_state_dict(net.state_dict())
    for m in (net, stock):
        m.eval()
    tuned = burnish.tune(net, "full + sgd(momentum=0.9, weight_decay=0.1) + step_in_backward")
    opt = tuned.optimizer(lr=1e-2)
    other = torch.optim.SGD(stock.parameters(), 1e-2, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        net(**batch).loss.backward()
        assert all(p.grad is None for p in net.parameters()), "each is freed when it is used"
        opt.step()
        other.zero_grad()
        stock(**batch).loss.backward()
        other.step()
    for (n, a), b in zip(net.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=n)


def test_it_is_a_site_and_not_a_rule():
    (m,) = parse("step_in_backward")
    assert m.state_bytes((3, 5), 4) == 8 * 15, "beside AdamW, which a recipe without a rule takes"
    with pytest.raises(burnish.RecipeError, match="step_in_backward"):
        parse("full + step_in_backward + step_in_backward")
    net, batch = tiny("vit")
    opt = burnish.tune(net, "full + step_in_backward").optimizer(lr=1e-3)
    net(**batch).loss.backward()
    with pytest.raises(burnish.BurnishError, match="step_in_backward|backward"):
        net(**batch).loss.backward()                         # nobody stepped in between
    assert opt.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_bytes_it_tells_are_held_beside_adamw(dtype):
    """Two moments, in fp32 or, of fp64 weights, in fp64."""
    p = torch.nn.Parameter(torch.ones(3, 5, dtype=dtype))
    opt = compose([m.optimizer() for m in parse("step_in_backward")], [("w", p)], 1e-3)
    p.sum().backward()
    opt.step()
    held = sum(v.nbytes for v in opt.state[p].values() if isinstance(v, torch.Tensor) and v.dim())
    assert parse("step_in_backward")[0].state_bytes((3, 5), dtype.itemsize) == held == \
        2 * 15 * max(4, dtype.itemsize)


class Net(torch.nn.Module):
    """Running statistics and dropout: a pass that only weighs may move neither."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = (torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8),
                                     torch.nn.Linear(8, 3))
        self.drop = torch.nn.Dropout(0.4)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def mse(out, batch):
    return (out - batch[1]).square().mean()


def start():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    return Net().double(), [(torch.randn(5, 6, generator=g).double(),
                             torch.randn(5, 3, generator=g).double()) for _ in range(6)]


def stock(net, batches, value, norm, wd=0.0):
    """Ordinary clipped descent: torch's optimizer and torch's clipping."""
    opt, losses = torch.optim.SGD(net.parameters(), 0.3, weight_decay=wd), []
    torch.manual_seed(7)
    for batch in batches:
        opt.zero_grad()
        loss = mse(net(batch[0]), batch)
        loss.backward()
        if value:
            torch.nn.utils.clip_grad_value_(net.parameters(), value)
        if norm:
            torch.nn.utils.clip_grad_norm_(net.parameters(), norm)
        opt.step()
        losses.append(loss.item())
    return losses


# findings 3.9
@pytest.mark.parametrize("value, norm", [(0.0, 0.05), (0.02, 0.0), (0.03, 0.05), (0.0, 1e3)])
def test_lomo_is_ordinary_clipped_training(value, norm):
    """Losses, weights and running statistics, in fp64, through dropout; 1e3 cuts nothing."""
    (net, batches), (other, _), (free, _) = start(), start(), start()
    recipe = f"full + sgd(weight_decay=0.1) + step_in_backward(clip_value={value})"
    tuned = burnish.tune(net, recipe, head=True)
    tuned.optimizer(0.3, max_grad_norm=norm)
    torch.manual_seed(7)
    losses = [float(tuned.step(batch, mse)) for batch in batches]
    assert losses == pytest.approx(stock(other, batches, value, norm, 0.1), rel=1e-12)
    for (n, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=n)
    plain = stock(free, batches, 0.0, 0.0, 0.1)
    assert (losses == pytest.approx(plain, rel=1e-9)) == (norm == 1e3), "it must have acted"


# findings 3.9
def test_the_norm_is_of_the_objectives_too():
    ends = []
    for site in ("", " + step_in_backward"):
        net, batches = start()
        tuned = burnish.tune(net, f"full + l2_sp(alpha=0.7, beta=0.4) + sgd{site}", head=True)
        tuned.optimizer(0.3, max_grad_norm=0.05)
        torch.manual_seed(7)
        ends.append([float(tuned.step(b, mse)) for b in batches])
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)


# findings 3.9
def test_no_two_gradients_live_in_either_backward(monkeypatch):
    from burnish.blocks.update.clip import Clip

    (net, batches), most = start(), []
    tuned = burnish.tune(net, "full + sgd + step_in_backward", head=True)
    opt = tuned.optimizer(0.3, max_grad_norm=0.05)
    weighs, cut = Clip.weighs, Clip.cut_

    def seen(self, g, *name):
        most.append(sum(p.grad is not None for p in net.parameters()))
        return cut(self, g, *name) if name else weighs(self, g)

    monkeypatch.setattr(Clip, "weighs", seen)
    monkeypatch.setattr(Clip, "cut_", seen)
    tuned.step(batches[0], mse)
    assert len(most) == 2 * 6 and max(most) == 1
    assert all(p.grad is None for p in net.parameters()) and not opt.muted


# findings 3.9
def test_what_cannot_clip_says_so_before_anything_moves():
    net, batches = start()
    before = {n: v.clone() for n, v in net.state_dict().items() if "norm" not in n}
    tuned = burnish.tune(net, "full + sgd + step_in_backward", head=True)
    tuned.optimizer(0.3, max_grad_norm=0.05)
    with pytest.raises(burnish.BurnishError, match=r"tuned\.backward"):
        mse(net(batches[0][0]), batches[0]).backward()
    tuned.step(batches[0], mse)                       # the next pass is whole
    with pytest.raises(burnish.BurnishError, match=r"tuned\.backward"):
        mse(net(batches[0][0]), batches[0]).backward()           # its norm was the last update's
    net.load_state_dict(before, strict=False)
    tuned.current_optimizer.zero_grad()
    with pytest.raises(burnish.BurnishError, match="norm of the gradients is (inf|nan)"):
        tuned.step(batches[0], lambda out, b: (out * 0).square().sum().sqrt())
    assert all(torch.equal(net.state_dict()[n], v) for n, v in before.items())
    for recipe, kw, word in (
            ("full + mezo", {"max_grad_norm": 1.0}, "mezo makes no gradient"),
            ("full + sgd + step_in_backward", {"max_grad_norm": -1.0}, "max_grad_norm is a length"),
            ("full + sgd", {"max_grad_norm": "1"}, "max_grad_norm is a length")):
        with pytest.raises(burnish.BurnishError, match=word):
            burnish.tune(start()[0], recipe, head=True).optimizer(0.3, **kw)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(burnish.RecipeError, match="clip_value"):
            burnish.methods.optimizer.step_in_backward.StepInBackward(clip_value=value)


@pytest.mark.parametrize("recipe", ["sgd", "adam8bit", "adamw"])
def test_the_setting_acts_in_a_loop_of_ones_own(recipe):
    """max_grad_norm was only looked at where gradients do exist together."""
    ends = []
    for norm in (0.0, 1e-3):
        net, batches = start()
        tuned = burnish.tune(net, f"full + {recipe}", head=True)
        opt = tuned.optimizer(0.3, max_grad_norm=norm)
        mse(net(batches[0][0]), batches[0]).backward()
        opt.step()
        ends.append(torch.stack([p.grad.norm() for p in net.parameters()]).norm())
    assert float(ends[1]) == pytest.approx(1e-3, rel=1e-2) and ends[0] > 1e-2


def test_adalomo_is_adafactor_at_this_site():
    """U = G / sqrt(V), V factored with b = 1 - t^-0.8, grouped normalisation; plain fp64."""
    net, batches = start()
    tuned = burnish.tune(net, "full + adafactor(scale_parameter=True) + step_in_backward",
                         head=True)
    tuned.optimizer(1e-2)
    w = net.a.weight.detach().clone()
    R, C = torch.zeros(8).double(), torch.zeros(6).double()
    seen = []
    tuned.model.a.weight.register_hook(lambda g: seen.append(g.clone()))
    for t, batch in enumerate(batches, 1):
        tuned.step(batch, mse)
        G, b = seen[-1], 1 - t ** -0.8
        R = b * R + (1 - b) * (G.square() + 1e-30).mean(1)
        C = b * C + (1 - b) * (G.square() + 1e-30).mean(0)
        U = G / (R[:, None] * C / R.mean()).sqrt()
        U = U / max(1.0, float(U.square().mean().sqrt()))
        w = w - 1e-2 * U * max(1e-3, float(w.square().mean().sqrt()))
        torch.testing.assert_close(net.a.weight.detach(), w, rtol=1e-10, atol=1e-13)
