"""The aside pathway: written out in float64, and the gradient that meets no frozen weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

STACKS = {"bert": ["bert.encoder.layer"], "vit": ["vit.layers"], "llama": ["model.layers"],
          "timm_qkv": ["blocks"], "encoder": ["encoder.layers"],
          "whisper": ["model.encoder.layers", "model.decoder.layers"]}


def stands(one, stacks, detach=False, act=F.gelu):
    for stack in stacks:
        path = {}
        for i in range(2):
            A, a, B, b = (one.theta[f"{stack}.{i}", f"f.{n}"] for n in
                          ("down.weight", "down.bias", "up.weight", "up.bias"))

            def behind(module, args, out, i=i, A=A, a=a, B=B, b=b, path=path):
                h = out[0] if isinstance(out, tuple) else out
                before = path.get(i - 1, torch.zeros_like(h))
                z = (h.detach() if detach else h) + before
                path[i] = before + act(z @ A.t() + a) @ B.t() + b
                h = h if detach and i == 0 else h + path[i]
                return (h, *out[1:]) if isinstance(out, tuple) else h

            one.base.get_submodule(f"{stack}.{i}").register_forward_hook(behind)


@pytest.mark.parametrize("model", list(STACKS))
def test_the_equation_written_out(beside, model):
    one = beside(model, "connected(bottleneck=4)")
    stands(one, STACKS[model])
    one.agree()


@pytest.mark.parametrize("model", ["bert", "vit"])
def test_beside_the_model_and_another_activation(beside, model):
    one = beside(model, "connected(bottleneck=4, detach=True, act='relu')")
    stands(one, STACKS[model], detach=True, act=F.relu)
    one.agree()


def without_jacobian(net):
    """Every block answers as it does, and nothing of it hangs on what it is given."""
    for block in net.bert.encoder.layer:
        def cut(module, args, out):
            return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()

        for m in (block.attention, block.intermediate, block.output):
            m.register_forward_hook(cut)


def test_a_gradient_reaches_the_first_step_past_all_frozen_blocks():
    """Scattered modules get none where the blocks let none through."""
    net, batch = tiny("bert", num_hidden_layers=4)
    tuned = burnish.tune(net, "houlsby(bottleneck=4, norms=False) + connected(bottleneck=4)",
                         head=False)
    stir(tuned, size=0.2)
    without_jacobian(net)
    tuned.loss(batch).backward()
    own = dict(tuned.named_parameters())
    steps = [p for n, p in own.items() if ".connected." in n]
    scattered = [p for n, p in own.items() if ".houlsby." in n]
    assert len(steps) == 16 and all(p.grad is not None and p.grad.any() for p in steps)
    assert len(scattered) == 32 and all(p.grad is None for p in scattered)


def test_at_the_start_it_is_the_base_and_the_first_step_has_a_gradient():
    net, batch = tiny("bert", num_hidden_layers=4)
    before = net.eval()(**batch).logits
    tuned = burnish.tune(net, "connected(bottleneck=4)")
    assert torch.equal(net.eval()(**batch).logits, before)
    tuned.loss(batch).backward()
    ups = [p for n, p in tuned.named_parameters() if n.endswith("f.up.weight")]
    assert len(ups) == 4 and all(p.grad.any() for p in ups)


def test_beside_the_model_nothing_of_the_blocks_is_kept(kept):
    """Twice the blocks, and only the path's own numbers more: far less than a block keeps."""
    bytes_ = {}
    for detach in (False, True):
        for L in (2, 4):
            net, batch = tiny("bert", num_hidden_layers=L)
            tuned = burnish.tune(net, f"connected(bottleneck=4, detach={detach})", head=False)
            tuned.optimizer(lr=1e-3)
            bytes_[detach, L] = kept(tuned, batch)
    per = {d: (bytes_[d, 4] - bytes_[d, 2]) / 2 for d in (False, True)}
    tokens = 16
    assert per[True] <= tokens * (2 * 32 + 2 * 4) * 4 and per[True] * 3 < per[False]


def test_count_of_the_published_shape():
    assert parse("connected")[0].count(768) * 12 == 599_424
    net, _ = tiny("bert", hidden_size=96)
    tuned = burnish.tune(net, "connected", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * (2 * 96 * 32 + 32 + 96)


def test_a_text_written_word_by_word_is_the_whole_one():
    net, _ = tiny("llama", dtype=torch.float64)
    stir(burnish.tune(net, "connected(bottleneck=4)"), size=0.3)
    ids = torch.arange(7).unsqueeze(0)
    first = net.eval()(input_ids=ids[:, :5], use_cache=True)
    last = net(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, last.logits], 1), net(input_ids=ids).logits,
                               rtol=1e-8, atol=1e-10)


def test_blocks_that_somebody_else_runs_again_are_refused():
    net, batch = tiny("llama")
    net.gradient_checkpointing_enable({"use_reentrant": False})
    tuned = burnish.tune(net, "connected(bottleneck=4)")
    with pytest.raises(burnish.RecipeError, match="drop the checkpointing"):
        tuned.loss(batch).backward()


@pytest.mark.parametrize("model, recipe, why", [
    ("bert", "connected(bottleneck=0)", "1 or more"),
    ("bert", "connected(targets='q')", "takes no targets"),
    ("bert", "connected + checkpoint", "mode of the blocks"),
    ("convnext", "connected", "attention"), ("swin", "connected", "one width in each stack"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_the_defaults():
    m = parse("connected")[0]
    assert (m.bottleneck, m.act, m.detach) == (32, "gelu", False)
