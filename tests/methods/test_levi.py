"""LEVI: heads over a large model's layers, each beside a small model's own view."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.views import Answers, Heads, Small
from burnish.core.errors import RecipeError
from burnish.engine.slot import slots
from burnish.memory import Ledger
from burnish.testing import stir
from burnish.testing.models import tiny

BLOCKS = {"vit": "vit.layers", "bert": "bert.encoder.layer"}


def parts(tuned, kind):
    return [m for _, _, slot in slots(tuned.model) for m in slot.modules() if isinstance(m, kind)]


def made(text, model="vit", **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    base = copy.deepcopy(net).requires_grad_(False).eval()
    tuned = burnish.tune(net, text, head=False)
    net.double()
    return stir(tuned, size=0.2), net, base, batch


def norm(x, w, b):
    off = x - x.mean(-1, keepdim=True)
    return off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b


def written_out(tuned, base, batch, blocks):
    """The equation, sample by sample."""
    model = "vit" if "pixel_values" in batch else "bert"
    states, (small,), (end,) = [], parts(tuned, Small), parts(tuned, Answers)
    layers = base.get_submodule(BLOCKS[model])
    layers[0].register_forward_pre_hook(lambda m, args: states.append(args[0]))
    for layer in layers:
        layer.register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    base(**batch)
    p, rows = dict(small.named_parameters()), []
    own = dict(end.heads.named_parameters())
    for b in range(len(states[0])):
        seen = torch.ones(states[0].shape[1], dtype=torch.bool)
        if "attention_mask" in batch:
            seen = batch["attention_mask"][b].bool()
        x = states[0][b] @ p["down.weight"].T + p["down.bias"]
        S, H = x.shape[1], small.blocks[0].heads
        for n in range(len(small.blocks)):
            w = {k[len(f"blocks.{n}."):]: v for k, v in p.items() if k.startswith(f"blocks.{n}.")}
            h = norm(x, w["norm1.weight"], w["norm1.bias"]) @ w["qkv.weight"].T + w["qkv.bias"]
            q, k, v = (t.view(-1, H, S // H).transpose(0, 1) for t in h.split(S, 1))
            scores = q @ k.transpose(1, 2) / math.sqrt(S // H)
            a = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
            x = x + a.transpose(0, 1).reshape(-1, S) @ w["proj.weight"].T + w["proj.bias"]
            h = norm(x, w["norm2.weight"], w["norm2.bias"]) @ w["fc1.weight"].T + w["fc1.bias"]
            x = x + F.gelu(h) @ w["fc2.weight"].T + w["fc2.bias"]
        u = norm(x, p["norm.weight"], p["norm.bias"])[seen].mean(0)
        ys = []
        for n, j in enumerate(blocks):
            z = states[j + 1][b][seen].mean(0)
            z = z @ own[f"project.{n}.weight"].T + own[f"project.{n}.bias"]
            ys.append(torch.cat([z, u]) @ own[f"heads.{n}.weight"].T + own[f"heads.{n}.bias"])
        w = own["shares"].softmax(0) if "shares" in own else torch.full((len(ys),), 1 / len(ys))
        rows.append(sum(a * y for a, y in zip(w, ys, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("model, more, blocks", [
    ("vit", "", (0, 1)), ("vit", ", reads=(1,), layers=1", (1,)),
    ("bert", ", weighed=True", (0, 1))])
def test_it_is_the_equation_and_so_are_its_gradients(model, more, blocks):
    tuned, net, base, batch = made(f"levi(bottleneck=8{more})", model)
    if model == "bert":
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -3:] = 0
        batch["attention_mask"] = mask
    batch.pop("labels")
    got, want = net(**batch).logits, written_out(tuned, base, batch, blocks)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn_like(want)
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")
        assert b.any(), n


def test_no_gradient_in_the_frozen_model_and_no_graph():
    tuned, net, _, batch = made("levi(bottleneck=8)")
    ran = []
    net.vit.layers[0].attention.register_forward_hook(
        lambda m, a, out: ran.append(torch.is_grad_enabled()))
    tuned.loss(batch).backward()
    assert ran == [False]
    for n, p in net.named_parameters():
        assert (p.grad is not None) == (".burnish." in n), n


def test_without_one_view_only_that_input_changes():
    """A head that reads nothing of a view answers alike whatever that view is."""
    torch.manual_seed(0)
    heads = Heads(2, 6, 4, 3, 5, False).double()
    z, u = [torch.randn(2, 6, dtype=torch.float64) for _ in range(2)], torch.randn(2, 3).double()
    whole = heads(z, u)
    with torch.no_grad():
        for head in heads.heads:
            head.weight[:, 4:] = 0               # u is ablated
    assert torch.equal(heads(z, u), heads(z, torch.zeros_like(u)))
    assert not torch.allclose(heads(z, u), whole)
    assert not torch.allclose(heads([2 * x for x in z], u), heads(z, u))
    for project in heads.project:
        torch.nn.init.zeros_(project.weight)     # and z
    assert torch.equal(heads([2 * x for x in z], u), heads(z, u))


def test_what_waits_for_backward_does_not_grow_with_the_depth_but_by_one_row_a_block():
    kept = []
    for depth in (2, 6):
        net, batch = tiny("vit", num_hidden_layers=depth, batch=3)
        tuned = burnish.tune(net, "levi(bottleneck=8)", head=False)
        with Ledger(net) as ledger:
            for value in batch.values():
                ledger.watch("weights", [value])
            loss = tuned.loss(batch)
            kept.append(sum(e.bytes for e in ledger.entries if e.death is None
                            and ledger.category(e) != "weights"))
        del loss
    tokens = 17
    more = (kept[1] - kept[0]) / 4 / 4 / 3       # numbers a block and sample
    assert 0 < more <= 32 + 2 * (8 + 8) + 3 + 8 < 32 * tokens


def test_the_large_model_may_be_tuned_beside():
    tuned, net, _, batch = made("lora(rank=2) + levi(bottleneck=8, frozen=False)")
    tuned.loss(batch).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in net.named_parameters()
               if ".lora." in n)
    with pytest.raises(RecipeError, match="could not train"):
        made("lora(rank=2) + levi(bottleneck=8)")


def test_it_stands_in_the_place_of_the_head_which_nobody_has_to_leave_out():
    net, batch = tiny("vit", num_hidden_layers=1)
    tuned = burnish.tune(net, "levi(bottleneck=8)")
    assert not [n for n, _ in tuned.named_parameters() if ".burnish." not in n]
    assert torch.isfinite(tuned.step(batch))


def test_it_has_the_numbers_of_the_model_it_stands_beside():
    net, batch = tiny("vit", dtype=torch.bfloat16)
    tuned = burnish.tune(net, "levi(bottleneck=8, weighed=True)", head=False)
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}
    assert torch.isfinite(tuned.step(batch))


@pytest.mark.parametrize("width, heads", [(16, 4), (24, 2), (12, 1)])
def test_the_small_model_has_four_heads_or_as_many_as_divide_its_width(width, heads):
    net, _ = tiny("vit", hidden_size=width, num_attention_heads=2 if width > 12 else 1)
    tuned = burnish.tune(net, "levi(bottleneck=8)", head=False)
    (small,) = parts(tuned, Small)
    assert {b.heads for b in small.blocks} == {heads}
    assert small.norm.normalized_shape == (width // 4,)


def test_a_frozen_model_drops_nothing_and_one_that_is_tuned_does():
    for frozen, alike in ((True, True), (False, False)):
        net, batch = tiny("vit", dropout=0.5)
        tuned = burnish.tune(net, f"lora(rank=2) + levi(bottleneck=8, frozen={frozen})"
                             if not frozen else "levi(bottleneck=8)", head=False)
        losses = [tuned.loss(batch).detach() for _ in range(2)]
        assert bool(torch.equal(*losses)) == alike and net.training


def test_tokens_before_samples_are_refused():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=False)
            self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = torch.nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(0))

    with pytest.raises(RecipeError, match="levi tells the samples.*tokens before samples"):
        burnish.tune(Net(), "levi", head=False)


def test_the_counts():
    method = burnish.parse("levi")[0]
    assert (method.bottleneck, method.reduction, method.layers) == (128, 4, 2)
    assert method.repeats() == 1 and burnish.parse("levi(reads=(0, 2))")[0].repeats() is None
    assert 12 * (768 * 128 + 128) == 1_181_184
    small = 768 * 192 + 192 + 2 * (12 * 192 ** 2 + 13 * 192) + 2 * 192
    assert method.count(12, 768, 10) == small + 1_181_184 + 12 * 10 * (128 + 192 + 1)
    for text, blocks in (("levi(bottleneck=8)", 2), ("levi(bottleneck=8, weighed=True)", 2),
                         ("levi(bottleneck=8, reads=(0,), layers=3)", 1)):
        tuned, *_ = made(text)
        got = sum(p.numel() for p in tuned.parameters())
        assert got == tuned.recipe[0].count(blocks, 32, 3), text


@pytest.mark.parametrize("text, why", [
    ("levi(bottleneck=0)", "of at least 1"), ("levi(reduction=3)", "not divisible"),
    ("levi(reads=(0, 0))", "each once"), ("levi(reads=(2,))", "blocks 0 to 1"),
    ("levi(reads=())", "each once"), ("levi(reads=(-1,))", "each once"),
    ("levi(layers=0)", "of at least 1"), ("levi(reduction=0)", "of at least 1|1 or more"),
    ("linear_probe + levi", "heads of its own"),
    ("lora(rank=2, targets='classifier') + levi(frozen=False)", "heads of its own"),
    ("levi + checkpoint", "mode"), ("levi + levi", "mode"), ("levi(targets='q')", "no targets")])
def test_what_cannot_act_is_refused(text, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.tune(tiny("vit")[0], text, head=False)


@pytest.mark.parametrize("model", ["llama", "t5", "swin", "mlp"])
def test_models_that_it_cannot_read_are_refused(model):
    with pytest.raises(RecipeError, match="levi needs"):
        burnish.tune(tiny(model)[0], "levi", head=False)
