"""DVPT: queries over bottlenecked features, written out in float64 with explicit sums."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.dynamic import Dynamic, Lent
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

#: (what returns an MLP's answer, what is given the stream before its norm) of each block
MLP = {"vit": ("vit.layers.{}.mlp", "vit.layers.{}.layernorm_after"),
       "timm_qkv": ("blocks.{}.mlp", "blocks.{}.norm2"),
       "bert": ("bert.encoder.layer.{}.output.dense", "bert.encoder.layer.{}.intermediate")}


def attended(q, k, v, r, mask=None):
    scores = torch.einsum("...md,...nd->...mn", q, k) / math.sqrt(r)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    return torch.einsum("...mn,...nd->...md", e / e.sum(-1, keepdim=True), v)


def adapter(letters, x, s, mask=None):
    """s (Z' W_u + b_u)."""
    A, a, B, b, Q = letters
    z = F.gelu(x @ A.t() + a)
    made = attended(Q.expand(len(x), -1, -1), z, z, len(A), mask)
    return s * ((z + attended(z, made, made, len(A))) @ B.t() + b)


def stands(one, model, letters, scale, tap="residual"):
    mlp, norm = MLP[model]
    valid = one.batch.get("attention_mask")
    mask = None if valid is None else valid.bool().unsqueeze(1)
    seen = {}
    for i in range(2):
        read = norm if tap == "residual" else mlp
        one.base.get_submodule(read.format(i)).register_forward_pre_hook(
            lambda m, args, i=i: seen.update({i: args[0]}))
        one.base.get_submodule(mlp.format(i)).register_forward_hook(
            lambda m, args, out, i=i: out + adapter(letters[i], seen[i], scale[i], mask))


NAMES = ("down.weight", "down.bias", "up.weight", "up.bias", "mixer.rows")


@pytest.mark.parametrize("model, tap", [("vit", "residual"), ("vit", "norm"),
                                        ("timm_qkv", "residual"), ("bert", "residual")])
def test_the_equation_written_out(beside, model, tap):
    one = beside(model, f"dvpt(bottleneck=4, length=3, scale=2.0, tap={tap!r})", size=0.5)
    if model == "bert":
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        one.batch["attention_mask"][1, -3:] = 0
    paths = [p for p, _ in one.at("down.weight")]
    assert paths == [MLP[model][0].format(i) for i in range(2)]
    stands(one, model, [[one.theta[p, n] for n in NAMES] for p in paths], [2.0, 2.0], tap)
    one.agree()


def test_one_module_for_all_blocks(beside):
    """One set of parameters, whose gradients add up; a scale of each block's own."""
    one = beside("vit", "dvpt(bottleneck=4, length=3, share=True, train_scale=True)", size=0.5)
    letters = [next(p for (_, n), p in one.theta.items() if n == f"f.{name}") for name in NAMES]
    assert len(one.theta) == len(NAMES) + 2
    stands(one, "vit", [letters] * 2, [p for _, p in one.at("scale")])
    one.agree()


def test_a_scale_that_trains(beside):
    one = beside("vit", "dvpt(bottleneck=4, length=3, scale=0.5, train_scale=True)", size=0.5)
    paths = [p for p, _ in one.at("down.weight")]
    stands(one, "vit", [[one.theta[p, n] for n in NAMES] for p in paths],
           [p for _, p in one.at("scale")])
    one.agree()


@pytest.mark.parametrize("share", [False, True])
def test_the_start_is_the_base(share):
    net, batch = tiny("vit")
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, f"dvpt(share={share})", head=False)
    assert torch.equal(net.eval()(**batch).logits, base(**batch).logits)
    stir(tuned, size=0.5)
    assert not torch.allclose(net(**batch).logits, base(**batch).logits, atol=1e-3)


def test_one_query_over_one_channel(beside):
    one = beside("vit", "dvpt(bottleneck=1, length=1)", size=0.5)
    paths = [p for p, _ in one.at("down.weight")]
    stands(one, "vit", [[one.theta[p, n] for n in NAMES] for p in paths], [1.0, 1.0])
    with torch.no_grad():
        torch.testing.assert_close(one.tuned.model(**one.batch).logits,
                                   one.base(**one.batch).logits)


def test_two_samples_have_different_prompts():
    """And each sample's are its own: what else is in the batch does not matter."""
    torch.manual_seed(0)
    part, z = Dynamic(3, 4), torch.randn(2, 7, 4)
    with torch.no_grad():
        made = part.queries(z)
        assert made.shape == (2, 3, 4) and not torch.allclose(made[0], made[1], atol=0.05)
        torch.testing.assert_close(part.queries(z[1:]), made[1:])
    with pytest.raises(burnish.RecipeError, match=r"\(batch, tokens, width\)"):
        part(z[0])


@pytest.mark.parametrize("hidden", [slice(-3, None), slice(1, 4)])
def test_padding_is_not_read_behind_a_prompt_either(hidden):
    """Of tokens that the prompt has moved: other ids there change nothing."""
    net, batch = tiny("bert", dtype=torch.float64)
    tuned = burnish.tune(net, "prompt_tuning(length=3) + dvpt(bottleneck=4, length=3)", head=False)
    stir(tuned, size=0.5)
    net.double().eval()
    ids = batch["input_ids"]
    mask, other = torch.ones_like(ids), ids.clone()
    mask[:, hidden] = 0
    other[:, hidden] = 1 + ids[:, hidden] % 60
    with torch.no_grad():
        a, b = (net(input_ids=i, attention_mask=mask).logits for i in (ids, other))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        a, b = (net(input_ids=i).logits for i in (ids, other))
        assert not torch.allclose(a, b, atol=1e-6)


def test_a_mask_of_other_tokens_is_refused():
    from burnish.core.call import Call, resume

    z = torch.randn(2, 5, 4)
    for rows, tokens, text in ((2, 6, True), (3, 5, True), (2, 4, False)):
        with resume(Call(valid=torch.ones(rows, tokens))), \
                pytest.raises(burnish.RecipeError, match=r"beside a mask of \(\d, \d\)"):
            Dynamic(3, 4, text)(z)
    with resume(Call(valid=torch.ones(2, 5))):
        Dynamic(3, 4, False)(z)


def test_shared_weights_are_one_set_in_files(tmp_path):
    net, batch = tiny("vit")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "dvpt(bottleneck=4, length=3, share=True)", head=False)
    lent = [m for m in net.modules() if isinstance(m, Lent)]
    assert len(lent) == 2 and lent[0].f is lent[1].f and not list(lent[1].parameters())
    stir(tuned, size=0.5)
    tuned.save(tmp_path)
    again = burnish.load(base, tmp_path)
    assert torch.equal(again.model.eval()(**batch).logits, net.eval()(**batch).logits)


def test_counts_and_defaults(published):
    """100,416 numbers for ViT-B/16 where blocks share, 1.2M where they do not."""
    m = parse("dvpt")[0]
    assert (m.bottleneck, m.length, m.scale, m.train_scale, m.share, m.tap) == (
        64, 20, 1.0, False, False, "residual")
    vit, _ = published("ViTConfig", "ViTForImageClassification")
    d, blocks = vit.hidden_size, len(vit.blocks)
    made = list(m.branch(vit))
    assert sum(p.numel() for b in made for p in b.module.parameters()) == m.count(d, blocks) \
        == 12 * 100_416
    shared = parse("dvpt(share=True)")[0]
    assert sum(p.numel() for b in shared.branch(vit) for p in b.module.parameters()) \
        == shared.count(d, blocks) == 100_416
    assert m.count(d) == 100_416 and parse("dvpt(train_scale=True)")[0].count(d) == 100_417
    both = parse("dvpt(share=True, train_scale=True)")[0]
    assert both.count(d, blocks) == 100_416 + 12


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "dvpt(length=0)", "a query of 1"), ("vit", "dvpt(bottleneck=0)", "a width"),
    ("llama", "dvpt", "reads its input as a whole"), ("cnn", "dvpt", "an MLP"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
