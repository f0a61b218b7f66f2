"""GBLM-Pruner: weights times norms of inputs and of gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import RecipeError, TargetError
from burnish.core.recipe import parse
from burnish.testing import follows, tiny


def without_lowest(W, score, k):
    """Each row without the k entries of its lowest scores, in plain Python."""
    out = W.detach().clone()
    for row, s in zip(out, score.tolist(), strict=True):
        for i in sorted(range(len(s)), key=lambda i: s[i])[:k]:
            row[i] = 0
    return out


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x, labels=None):
        out = self.b(torch.tanh(self.a(x)))
        return {"logits": out, "loss": F.cross_entropy(out.mean(1), labels)}


def batches(n=3):
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 5, 12, generator=g, dtype=torch.float64),
             "labels": torch.randint(0, 3, (2,), generator=g)} for _ in range(n)]


def score(base, alpha, norm, samples):
    """``|W| |x|_2 + alpha |W| |g|``, every sample by itself."""
    W, gs, xs = base.a.weight, [], []
    for s in samples:
        gs.append(torch.autograd.grad(base(**s)["loss"], W)[0])
        xs.append(s["x"][0].square().sum(0))
    g = torch.stack(gs)
    g = g.abs().mean(0) if norm == "l1" else g.square().mean(0).sqrt()
    return W.abs() * (torch.stack(xs).mean(0).sqrt() + alpha * g)


def singly(data):
    return [{k: v[i : i + 1] for k, v in b.items()} for b in data for i in range(2)]


def made(settings=""):
    torch.manual_seed(0)
    net = Net().double()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"gblm({settings}) + lora(rank=2, alpha=6)", head=False, targets="a",
                         calibration=batches())
    return net, tuned, base


@pytest.mark.parametrize("settings, alpha, norm, n, k", [
    ("", 100.0, "l2", 6, 6), ("alpha=20.0, norm='l1', ratio=0.3", 20.0, "l1", 6, 3),
    ("samples=3", 100.0, "l2", 3, 6)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, alpha, norm, n, k):
    net, tuned, base = made(settings)
    W, bias = base.a.weight, base.a.bias.detach()
    s = score(base, alpha, norm, singly(batches())[:n])
    pruned = without_lowest(W, s, k)
    assert torch.equal(net.a.weight, pruned)
    assert not torch.equal(pruned, without_lowest(W, score(base, 0, norm, singly(batches())), k))
    ((_, term),) = tuned.terms(Chain)
    term.double()
    nn.init.normal_(term.B)

    class Just:
        model = net.a
        parameters = staticmethod(tuned.parameters)

    follows(Just, lambda x, A, B: F.linear(x, pruned + 3 * B @ A, bias), [term.A, term.B],
            (5, 3, 12), merged=False)
    tuned.detach()
    assert torch.equal(net.a.weight, W)


def test_patterns():
    net, _, base = made("mask='2:4'")
    s = score(base, 100.0, "l2", singly(batches()))
    assert torch.equal(net.a.weight.view(-1, 4),
                       without_lowest(base.a.weight.view(-1, 4), s.view(-1, 4), 2))


def test_without_the_gradient_it_is_wanda():
    kept = []
    for part in ("gblm(alpha=0.0)", "wanda"):
        net, batch = tiny("llama")
        burnish.tune(net, f"{part} + lora(rank=2)", head=False, calibration=[batch])
        kept.append([m.weight for m in net.modules() if isinstance(m, nn.Linear)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_each_block_by_the_gradients_of_the_model_as_it_is_then():
    net, batch = tiny("llama", dtype=torch.float64)
    net.eval()
    base = copy.deepcopy(net)
    burnish.tune(net, "gblm + lora(rank=2)", head=False, calibration=[batch])
    for block in ("layers.0.", "layers.1."):
        mine = {n: m for n, m in base.named_modules()
                if isinstance(m, nn.Linear) and block in n}
        seen = {n: [] for n in mine}
        hooks = [m.register_forward_pre_hook(lambda m, a, n=n, at=seen: at[n].append(a[0][0]))
                 for n, m in mine.items()]
        grads = []
        for s in singly([batch]):
            loss = base(**s).loss
            grads.append(torch.autograd.grad(loss, [m.weight for m in mine.values()]))
        for h in hooks:
            h.remove()
        for i, (n, m) in enumerate(mine.items()):
            g = torch.stack([g[i] for g in grads]).square().mean(0).sqrt()
            x = torch.stack([x.square().sum(0) for x in seen[n]]).mean(0).sqrt()
            W = m.weight.detach()
            m.weight.data = without_lowest(W, W.abs() * (x + 100 * g), W.shape[1] // 2)
            assert torch.equal(net.get_submodule(n).weight, m.weight), n


def test_small_gradients_of_half_precision_count():
    """1e-7 is below half of fp16's smallest number, which is 6e-8: a plain pass reads noise."""
    torch.manual_seed(0)
    found = []
    for dtype in (torch.float64, torch.float16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 8)).half().to(dtype)

        class Small(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x):
                y = self.net(x)
                return {"logits": y, "loss": (y.flatten(1).sin().sum(1) * 3e-8).sum()}

        torch.manual_seed(1)
        x = torch.randn(2, 4, 16).half().to(dtype)
        burnish.tune(Small(net), "gblm(alpha=1e12) + lora(rank=2)", head=False, targets="0",
                     calibration=[{"x": x}])
        found.append(net[0].weight != 0)
    assert float((found[0] == found[1]).float().mean()) > 0.95


def never_read():
    raise AssertionError("data were read")
    yield


def test_what_cannot_act_is_refused_and_the_defaults(tmp_path):
    for text, why in (("samples=0", "samples >= 1 and alpha >= 0"), ("ratio=1.0", "^gblm: ratio"),
                      ("alpha=-1.0", "samples >= 1 and alpha >= 0")):
        with pytest.raises(RecipeError, match=why):
            parse(f"gblm({text})")
    parse("gblm(samples=1, alpha=0.0)")
    net, batch = tiny("llama")
    with pytest.raises(TargetError, match="gblm: runs of 5 inputs do not tile"):
        burnish.tune(net, "gblm(mask='2:5') + lora(rank=2)", calibration=never_read())
    assert parse("gblm")[0].settings() == {"targets": None, "ratio": 0.5, "mask": "row",
                                           "alpha": 100.0, "norm": "l2", "samples": 128}


def test_the_head_stays():
    net, batch = tiny("vit")
    head = net.classifier.weight.detach().clone()
    burnish.tune(net, "gblm(targets='all-linear, head') + lora(rank=2, targets='q')", head=False,
                 calibration=[batch])
    assert torch.equal(net.classifier.weight, head)
