"""DEFT's density loss: the smooth count, its gradient, what it does to a network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.density import density
from burnish.blocks.tape import codes
from burnish.blocks.tape.saved import Tape
from burnish.core.errors import RecipeError
from burnish.memory import Ledger
from burnish.testing.models import tiny

PATHS = {"vit": ["vit.layers.{}.mlp.fc2"],
         "bert": ["bert.encoder.layer.{}.output.dense"],
         "llama": ["model.layers.{}.mlp.down_proj"],
         "t5": ["encoder.block.{}.layer.1.DenseReluDense.wo",
                "decoder.block.{}.layer.2.DenseReluDense.wo"]}


def plain(x, valid=None, eps=1e-7):
    each = x.double() ** 2 / (x.double() ** 2 + eps)
    return each.mean() if valid is None else each[valid.bool()].mean()


# -- the count ------------------------------------------------------------------------------------
@pytest.mark.parametrize("piece", [1 << 20, 24])
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradient_are_those_of_autograd(padded, piece, monkeypatch):
    monkeypatch.setattr(codes, "PIECE", piece)
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 12, dtype=torch.float64) * 1e-3).requires_grad_()
    valid = None
    if padded:
        valid = torch.ones(3, 5, dtype=torch.long)
        valid[1, 2:] = 0
    got, want = density(x, valid, 1e-6), plain(x, valid, 1e-6)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (a,), (b,) = torch.autograd.grad(got * 3, x), torch.autograd.grad(want * 3, x)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert not padded or not a[1, 2:].any()


def test_the_gradient_is_largest_at_the_root_of_a_third_of_eps():
    x = torch.logspace(-6, -1, 4001, dtype=torch.float64).requires_grad_()
    (g,) = torch.autograd.grad(density(x.unsqueeze(0)), x)
    assert float(x.detach()[g.argmax()]) == pytest.approx((1e-7 / 3) ** 0.5, rel=4e-3)


def test_as_eps_falls_it_is_the_share_of_numbers_that_are_not_zero():
    x = F.relu(torch.randn(50, 40, dtype=torch.float64))
    share = float((x != 0).double().mean())
    off = [abs(float(density(x, eps=e)) - share) for e in (1e-2, 1e-5, 1e-9, 1e-14)]
    assert off == sorted(off, reverse=True) and off[-1] < 1e-6 < off[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_counted_in_single(dtype):
    x = torch.full((4, 8), 2e-4).to(dtype).requires_grad_()
    got = density(x)
    (g,) = torch.autograd.grad(got * 32, x)
    want = x.detach().double().requires_grad_()
    (h,) = torch.autograd.grad(plain(want) * 32, want)
    assert got.dtype == torch.float32 and float(got) == pytest.approx(float(plain(x)), rel=1e-5)
    torch.testing.assert_close(g.double(), h, rtol=1e-2, atol=0)


def test_it_keeps_nothing_but_what_is_kept_anyway():
    x = torch.randn(64, 32, requires_grad=True)
    with Ledger() as ledger, Tape().recording():
        h = F.gelu(x * 1.0)
        density(h)
        out = density(h) + h.sum()
        kept = sum(e.bytes for e in ledger.entries if e.death is None)
    # x * 1 for the GELU, h itself by its name here, scalars
    assert out.requires_grad and kept - h.nbytes - 64 * 32 * 4 < 200


# -- in a network ---------------------------------------------------------------------------------
def inner(model, net, batch):
    """What the last linears of the MLPs read, by stack."""
    seen, hooks = {}, []
    for pattern in PATHS[model]:
        for i in range(2):
            path = pattern.format(i)
            hooks.append(net.get_submodule(path).register_forward_pre_hook(
                lambda m, a, path=path: seen.__setitem__(path, a[0])))
    loss = net(**batch).loss
    for h in hooks:
        h.remove()
    return loss, [[seen[p.format(i)] for i in range(2)] for p in PATHS[model]]


@pytest.mark.parametrize("model", ["vit", "llama", "t5", "bert"])
@pytest.mark.parametrize("more", ["", " + checkpoint", " + lean(on=False)"])
def test_gradients_are_the_tasks_and_the_terms(model, more):
    net, batch = tiny(model, dtype=torch.float64)
    valid = None
    if model == "bert":
        valid = torch.ones_like(batch["input_ids"])
        valid[0, -4:] = 0
        batch["attention_mask"] = valid
    stock = copy.deepcopy(net)
    tuned = burnish.tune(net, f"full + density(weight=0.5, eps=0.001){more}", head=False)
    tuned.optimizer(lr=1e-3)
    loss = tuned.loss(batch)
    task, states = inner(model, stock, batch)
    torch.testing.assert_close(loss, task, rtol=1e-10, atol=0)
    total = task + 0.5 * sum(sum(plain(x, valid, 1e-3) for x in s) / len(s) for s in states)
    names = [n for n, p in tuned.named_parameters()]
    want = torch.autograd.grad(total, [stock.get_parameter(n) for n in names], allow_unused=True)
    loss.backward()
    moved = 0
    for n, w in zip(names, want, strict=True):
        g = net.get_parameter(n).grad
        assert (w is None) == (g is None) or not w.any()
        if w is not None and g is not None:
            torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-11)
            moved += 1
    assert moved > 10


def test_the_term_follows_the_scale_of_the_loss():
    grads = []
    for scale in (1.0, 0.25):
        net, batch = tiny("vit", dtype=torch.float64)
        tuned = burnish.tune(net, "full + density(eps=0.001)", head=False)
        tuned.optimizer(lr=1e-3)
        (tuned.loss(batch) * scale).backward()
        grads.append(net.vit.layers[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(grads[0] * 0.25, grads[1], rtol=1e-10, atol=1e-14)


class Net(nn.Module):
    """One block with a ReLU MLP."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def test_density_falls_while_it_trains():
    found = []
    for more in ("", " + density(weight=5.0)"):
        torch.manual_seed(0)
        net = Net()
        x, y = torch.randn(16, 6, 16), torch.arange(16) % 3
        tuned = burnish.tune(net, f"full{more}", head=False)
        tuned.optimizer(lr=1e-2)
        for _ in range(40):
            tuned.step((x, y), lambda out, batch: F.cross_entropy(out, batch[1]))
        seen = []
        for b in net.encoder.layers:
            b.linear2.register_forward_pre_hook(
                lambda m, a, seen=seen: seen.append(float((a[0] != 0).float().mean())))
        tuned.loss((x, y), lambda out, batch: F.cross_entropy(out, batch[1]))
        found.append(sum(seen) / len(seen))
    assert found[1] < 0.7 * found[0]


def test_an_evaluation_and_the_base_are_untouched():
    net, batch = tiny("vit")
    base = copy.deepcopy(net).eval()
    net.eval()
    tuned = burnish.tune(net, "lora(rank=2) + density", head=False)
    with torch.no_grad():
        assert torch.equal(net(**batch).logits, base(**batch).logits)
        with tuned.disabled():
            assert torch.equal(net(**batch).logits, base(**batch).logits)


def test_zeroth_order_steps_add_its_value():
    losses = []
    for more in ("", " + density"):
        net, batch = tiny("vit")
        tuned = burnish.tune(net, f"lora(rank=2) + mezo{more}", head=False)
        tuned.optimizer(lr=1e-3)
        with tuned.state.riding.collecting() as terms, torch.no_grad():
            net(**batch)
        losses.append(float(sum(terms)) if terms else 0.0)
    assert losses[0] == 0 and 0.5 < losses[1] <= 1


@pytest.mark.parametrize("settings", ["weight=0", "weight=-1", "eps=0"])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(RecipeError, match="weight and eps above 0 are expected"):
        burnish.parse(f"density({settings})")


@pytest.mark.parametrize("model", ["mlp", "cnn", "mixtral"])
def test_a_model_without_such_mlps_is_refused(model):
    with pytest.raises(RecipeError, match="last linear"):
        burnish.tune(tiny(model)[0], "lora(rank=2) + density", head=False)


def test_defaults():
    method = burnish.parse("density")[0]
    assert (method.weight, method.eps) == (1.0, 1e-7)
    assert burnish.parse("density(alpha=0.5)")[0].weight == 0.5
