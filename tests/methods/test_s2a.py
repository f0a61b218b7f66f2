"""S2A as a preset: biases, prompts and side branches train, and what waits for backward is coded.
References are stock torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.tape.coded import Coded
from burnish.blocks.tape.saved import Tape
from burnish.core.recipe import parse
from burnish.memory import Ledger
from burnish.testing import stir
from burnish.testing.models import tiny

STRUCTURE = "bitfit + vpt(length=20, deep=True) + lite_residual(bottleneck=24)"


def test_what_it_stands_for():
    assert str(parse("s2a")) == str(parse(f"{STRUCTURE} + coded(softmax_bits=4)"))


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_forward_is_bit_identical(how, dropout):
    """To that of the same parts with nothing coded, masks of dropout included."""
    losses = []
    for recipe in (STRUCTURE, "s2a"):
        net, batch = tiny("vit", dropout=dropout)
        net.set_attn_implementation(how)
        torch.manual_seed(3)
        tuned = burnish.tune(net, recipe)
        stir(tuned, size=0.3)
        torch.manual_seed(5)
        with torch.no_grad():
            out = net.eval()(**batch).logits
        net.train()
        torch.manual_seed(7)
        losses.append((tuned.loss(batch).detach(), out))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


def test_what_trains(published):
    """Biases, prompts, branches and the head; 0.86 % of ViT-B, as the paper's text quotes 0.9 %."""
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "s2a", head=False)
    d, r, L, blocks = 32, 24, 20, 2
    names = [n for n, p in net.named_parameters() if p.requires_grad and ".burnish." not in n]
    assert names and all(n.endswith("bias") for n in names)
    biases = sum(p.numel() for n, p in net.named_parameters()
                 if n.endswith("bias") and ".burnish." not in n and "classifier" not in n)
    assert sum(p.numel() for p in tuned.parameters()) \
        == biases + blocks * (L * d + 2 * d * r + r + d)
    vit, _ = published("ViTConfig", "ViTForImageClassification")
    whole = {n: p.numel() for n, p in vit.model.named_parameters() if "classifier" not in n}
    d, blocks = 768, 12
    assert sum(k for n, k in whole.items() if n.endswith("bias") and ".layers." in n) == 101_376
    trains = sum(k for n, k in whole.items() if n.endswith("bias")) \
        + blocks * (L * d + 2 * d * r + r + d)
    assert trains / sum(whole.values()) == pytest.approx(0.0086, abs=5e-5)


def test_the_derivative_of_gelu_is_off_by_seven_hundredths_at_most():
    x = torch.linspace(-6, 6, 24001, dtype=torch.float64, requires_grad=True)
    m = parse("s2a")[-1]
    with Tape(True, Coded(m.bits, m.norm_bits, m.derivative_bits)).recording():
        y = F.gelu(x * 1)
    (got,) = torch.autograd.grad(y.sum(), x)
    v = x.detach()
    phi = torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    want = 0.5 * (1 + torch.erf(v / math.sqrt(2))) + v * phi
    worst = float((got - want).abs().max())
    assert 0.02 < worst <= 0.07 and len(got.unique()) == 16


def test_half_a_byte_a_number_waits():
    """Of an activation's input, and of probabilities (with a step for every row)."""
    m = parse("s2a")[-1]
    x = torch.randn(64, 96, requires_grad=True)
    with Tape(True, Coded(m.bits, m.norm_bits, m.derivative_bits,
                          softmax=m.softmax_bits)).recording():
        gelu, shares = F.gelu(x * 1), torch.softmax(x * 1, -1)
    (code,) = gelu.grad_fn.saved_tensors
    assert code.nbytes == x.numel() / 2
    held = shares.grad_fn.saved_tensors
    assert sum(t.nbytes for t in held) == x.numel() / 2 + 64 * 4


def test_less_than_half_waits():
    """Beside stock torch on the same parts, eager attention, ViT blocks."""
    kept = []
    for recipe in (f"{STRUCTURE} + lean(on=False)", "s2a"):
        net, batch = tiny("vit", batch=8, image_size=32)
        net.set_attn_implementation("eager")
        tuned = burnish.tune(net, recipe, head=False)
        with Ledger(net) as ledger:
            for value in batch.values():
                ledger.watch("weights", [value])
            loss = tuned.loss(batch)
            kept.append(sum(e.bytes for e in ledger.entries
                            if e.death is None and ledger.category(e) != "weights"))
        assert loss.requires_grad
    assert kept[1] < 0.4 * kept[0]


def test_the_gradient_through_a_softmax_is_right_in_the_mean():
    """Probabilities in four bits, drawn again and again; reference: dS = P (dP - sum P dP)."""
    torch.manual_seed(0)
    s = torch.randn(6, 9, dtype=torch.float64) * 2
    g = torch.randn(6, 9, dtype=torch.float64)
    P = s.exp() / s.exp().sum(-1, keepdim=True)
    want = P * (g - (P * g).sum(-1, keepdim=True))
    policy, draws, each = Coded(softmax=4), 1500, []
    for k in range(draws):
        policy.begin(k)
        x = s.clone().requires_grad_()
        with Tape(True, policy).recording():
            y = torch.softmax(x * 1, -1)
        each.append(torch.autograd.grad((y * g).sum(), x)[0])
    each = torch.stack(each)
    error = each.std(0) / draws ** 0.5
    assert float(error.max()) > 0
    assert float(((each.mean(0) - want) / error.clamp_min(1e-12)).abs().max()) < 5


def test_a_model_learns_with_it():
    net, batch = tiny("vit", batch=4)
    tuned = burnish.tune(net, "s2a")
    torch.manual_seed(0)
    losses = [float(tuned.step(batch))
              for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("model", ["llama", "cnn", "swin"])
def test_models_without_patches_are_refused(model):
    with pytest.raises(burnish.RecipeError):
        burnish.tune(tiny(model)[0], "s2a")
