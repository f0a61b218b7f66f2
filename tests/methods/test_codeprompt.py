"""CodePrompt: the mask's states of all layers, pooled for a head, in float64 with stock models."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.state.pooled import Pooled
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

BLOCKS = {"bert": "bert.encoder.layer.{}", "roberta": "roberta.encoder.layer.{}"}


def masked(batch, mask=62, at=(3, 5)):
    ids = batch["input_ids"].clamp(max=60)
    for i, n in enumerate(at):
        ids[i, n] = mask
    batch["input_ids"] = ids
    return at


def pooled(states, W, w):
    """f and the weights, sample by sample."""
    out, shares = [], []
    for h in states:
        e = torch.stack([(w @ torch.tanh(W @ x)).exp() for x in h])
        shares.append(e / e.sum())
        out.append((shares[-1][:, None] * h).sum(0))
    return torch.stack(out), torch.stack(shares)


@pytest.mark.parametrize("model", ["bert", "roberta"])
@pytest.mark.parametrize("layers, mask", [(None, 62), (1, 62), (None, None)])
def test_the_equation_written_out(beside, model, layers, mask):
    one = beside(model, f"codeprompt(bottleneck=4, layers={layers}, mask={mask})", head=True)
    at = masked(one.batch) if mask else (0, 0)
    states = []
    for i in range(2 - (layers or 2), 2):
        one.base.get_submodule(BLOCKS[model].format(i)).register_forward_hook(
            lambda m, args, out: states.append(out[0] if isinstance(out, tuple) else out))

    def reads(m, args):
        h = torch.stack([s[torch.arange(2), list(at)] for s in states], 1)
        f, _ = pooled(h, one.theta["classifier", "linear.weight"],
                      one.theta["classifier", "score"])
        return (f[:, None] if model == "roberta" else f,)

    one.base.classifier.register_forward_pre_hook(reads)
    if layers == 1:                                        # one layer leaves pooling no choice
        got, want = (m(**one.batch).logits for m in (one.tuned.model, one.base))
        torch.testing.assert_close(got, want)
        return
    one.agree()


def test_weights_of_the_layers_sum_to_one_and_begin_alike():
    one = Pooled(None, "a", 8, 4)
    h = torch.randn(3, 5, 8)
    assert torch.equal(one.weights(h), torch.full((3, 5), 0.2))
    stir_ = torch.Generator().manual_seed(0)
    one.score.data = 3 * torch.randn(4, generator=stir_)
    got = one.weights(h)
    torch.testing.assert_close(got.sum(1), torch.ones(3))
    assert float(got.max()) > 0.3
    torch.testing.assert_close(got, pooled(h, one.linear.weight, one.score)[1])


def test_a_text_without_its_mask_is_refused():
    net, batch = tiny("roberta")
    burnish.tune(net, "codeprompt(mask=62)")
    masked(batch)
    assert net(**batch).loss.isfinite()
    batch["input_ids"][1, 2] = 62
    with pytest.raises(burnish.RecipeError, match="needs one token 62, and here they have 1, 2"):
        net(**batch)
    batch["input_ids"][1, [2, 5]] = 4
    with pytest.raises(burnish.RecipeError, match="have 0, 1 .truncation must leave the mask"):
        net(**batch)
    with pytest.raises(burnish.RecipeError, match="give input_ids"):
        net(inputs_embeds=torch.randn(2, 8, 32))


def test_nothing_below_the_head_waits_for_backward(kept):
    """Of a frozen model; with it all trains, as published."""
    waits = []
    for n in (2, 4):
        net, batch = tiny("bert", num_hidden_layers=n)
        waits.append(kept(burnish.tune(net, "codeprompt(bottleneck=4, layers=2)"), batch))
    assert waits[0] == waits[1]
    net, batch = tiny("bert")
    masked(batch)
    tuned = burnish.tune(net, "full + codeprompt(mask=62)")
    stir(tuned)
    tuned.loss(batch).backward()
    assert net.get_submodule(BLOCKS["bert"].format(0)).output.dense.weight.grad.any()


def test_one_block_and_the_first_token_id():
    """A mask whose id is 0, in a model of one block: f is its state there."""
    net, batch = tiny("bert", num_hidden_layers=1)
    masked(batch, mask=0)
    batch["input_ids"] = torch.where(batch["input_ids"] == 0, 0, batch["input_ids"].clamp(min=1))
    seen = {}
    burnish.tune(net, "codeprompt(mask=0)", head=False)
    batch["input_ids"] = torch.arange(1, 9).repeat(2, 1)
    batch["input_ids"][0, 3] = batch["input_ids"][1, 5] = 0
    net.bert.encoder.layer[0].register_forward_hook(
        lambda m, args, out: seen.update(h=out[0] if isinstance(out, tuple) else out))
    got = net.eval()(**batch).logits
    h = seen["h"][torch.arange(2), [3, 5]]
    torch.testing.assert_close(got, h @ net.classifier.weight.t() + net.classifier.bias)


def test_soft_words_beside_it():
    """A template of pseudo-tokens, made by zecoler, around the mask."""
    net, batch = tiny("bert")
    masked(batch)
    batch["input_ids"][:, 6:8] = 61
    tuned = burnish.tune(net, "codeprompt(mask=62) + zecoler(length=2, placeholder=61)")
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_count_and_defaults():
    m = parse("codeprompt")[0]
    assert (m.mask, m.bottleneck, m.layers) == (None, 0, None)
    assert m.count(768) == 768 * 769 and m.repeats() is None
    for recipe in ("codeprompt", "codeprompt(bottleneck=5)"):
        tuned = burnish.tune(tiny("bert")[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32)


@pytest.mark.parametrize("model, recipe, why", [
    ("bert", "codeprompt(bottleneck=-1)", "a width of 0"),
    ("bert", "codeprompt(mask=-1)", "a token id"), ("vit", "codeprompt", "codeprompt"),
    ("bert", "codeprompt(layers=3)", "has 2 blocks"), ("llama", "codeprompt", "codeprompt"),
    ("bert", "codeprompt(targets='q')", "no targets"),
    ("bert", "codeprompt + checkpoint", "mode of the blocks"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


@pytest.mark.parametrize("part", ["ssf", "full", "bitfit", "lora(rank=2)", "film"])
@pytest.mark.parametrize("order", [0, 1])
def test_other_parts_leave_a_pooler_alone_that_nobody_reads(part, order):
    """And all that is left trains."""
    net, batch = tiny("bert")
    batch |= {"condition": torch.zeros(2, dtype=torch.long)} if part == "film" else {}
    tuned = stir(burnish.tune(net, " + ".join((part, "codeprompt")[:: 1 - 2 * order])))
    tuned.backward(batch)
    assert not [n for n, p in tuned.named_parameters() if p.grad is None or "pooler" in n]
    if part == "ssf":
        assert "ssf leaves bert.pooler.dense alone: beside this recipe nobody reads" in \
            " ".join(tuned.active.notes)


def test_what_is_told_to_act_on_a_pooler_that_nobody_reads_is_refused():
    for text in ("ssf(targets='bert.pooler')", "full(targets='bert.pooler')",
                 "lora(rank=2, targets='linear')"):
        net, batch = tiny("bert")
        with pytest.raises(RecipeError, match="beside codeprompt nobody reads what bert.pooler"):
            burnish.tune(net, f"{text} + codeprompt")
        assert not [n for n, _ in net.named_modules() if ".burnish" in f".{n}"]
    burnish.tune(net, "ssf(targets='attention') + codeprompt").step(batch)
