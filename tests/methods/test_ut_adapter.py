"""UT-Adapter: a convolution in time inside a bottleneck, written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.bottleneck import Bottleneck, Resting
from burnish.blocks.state.mixers import Temporal
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

#: (read, written) of attention and of the MLP
SITES = {"bert": [("bert.encoder.layer.{}.attention",
                   "bert.encoder.layer.{}.attention.output.dense"),
                  ("bert.encoder.layer.{}.intermediate.dense",
                   "bert.encoder.layer.{}.output.dense")],
         "vit": [("vit.layers.{}.attention", "vit.layers.{}.attention.o_proj"),
                 ("vit.layers.{}.mlp", "vit.layers.{}.mlp")],
         "timm_qkv": [("blocks.{}.attn", "blocks.{}.attn.proj"),
                      ("blocks.{}.mlp", "blocks.{}.mlp")]}
NAMES = ("inner.down.weight", "inner.down.bias", "inner.mixer.conv.weight", "inner.mixer.conv.bias",
         "inner.up.weight", "inner.up.bias", "norm.weight", "norm.bias")


def ut(letters, x, kernel, valid=None):
    D, d, C, c, U, u, g, h = letters
    z = F.gelu(x @ D.t() + d)
    z = z if valid is None else z * valid.unsqueeze(-1)
    T, left = x.shape[1], (kernel - 1) // 2
    y = c.expand(*z.shape[:-1], -1)
    for t in range(T):
        for k in range(kernel):
            if 0 <= (n := t + k - left) < T:
                y = y + torch.zeros_like(y).index_copy(1, torch.tensor([t]),
                                                       (z[:, n] @ C[..., k].t()).unsqueeze(1))
    w = F.gelu(F.gelu(y) @ U.t() + u) + x
    return (w - w.mean(-1, keepdim=True)) / (w.var(-1, unbiased=False, keepdim=True)
                                             + 1e-5).sqrt() * g + h


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("model", list(SITES))
def test_the_equation_written_out(beside, model, kernel):
    one = beside(model, f"ut_adapter(bottleneck=4, kernel={kernel})")
    valid = None
    if model == "bert":
        valid = one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        valid[1, -2:] = 0
    for i in range(2):
        for read, write in SITES[model]:
            path, seen = write.format(i), []
            letters = [one.theta[path, n] for n in NAMES]
            one.base.get_submodule(read.format(i)).register_forward_pre_hook(
                lambda m, args, kw, seen=seen: seen.append((args or tuple(kw.values()))[0]),
                with_kwargs=True)
            one.base.get_submodule(path).register_forward_hook(
                lambda m, args, out, seen=seen, letters=letters:
                    out + ut(letters, seen.pop(), kernel, valid))
    assert len([p for p, rest in one.theta if not rest]) == 2 * 4       # two norms a block
    one.agree()


def test_time_matters_inside():
    """Tokens in another order are answered otherwise; without it each is answered alone."""
    torch.manual_seed(0)
    x, order = torch.randn(2, 7, 8), torch.tensor([3, 1, 0, 6, 5, 2, 4])
    f = Resting(Bottleneck(8, 4, act="gelu", init="linear", mixer=Temporal(4, 3)))
    assert (f(x[:, order]) - f(x)[:, order]).abs().max() > 1e-2
    plain = Resting(Bottleneck(8, 4, act="gelu", init="linear"))
    torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order])
    one = Resting(Bottleneck(8, 4, act="gelu", init="linear", mixer=Temporal(4, 1)))
    torch.testing.assert_close(one(x[:, order]), one(x)[:, order])
    with pytest.raises(burnish.RecipeError, match="batch, tokens, channels"):
        f(x[0])


def test_what_is_padding_is_not_seen():
    net, batch = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    stir(burnish.tune(net, "ut_adapter(bottleneck=4)"), size=0.2)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -3:] = 0
    other = batch["input_ids"].clone()
    other[:, -3:] = 1
    a, b = (net.eval()(input_ids=ids, attention_mask=mask).logits
            for ids in (batch["input_ids"], other))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_count_of_the_published_shape():
    """A site 54,592, a block with its two norms 112,256."""
    m = parse("ut_adapter")[0]
    assert m.count(768) == 54_592 and 2 * m.count(768) + 2 * 1_536 == 112_256
    net, _ = tiny("bert", hidden_size=768, num_attention_heads=12, num_hidden_layers=1)
    tuned = burnish.tune(net, "ut_adapter", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 112_256
    again = burnish.tune(tiny("bert")[0], "ut_adapter(norms=False)", head=False)
    assert all(".burnish." in n for n, _ in again.named_parameters())


class OwnNorm(torch.nn.LayerNorm):
    """A norm with a layer of its own below it."""

    def __init__(self, d):
        super().__init__(d)
        self.gate = torch.nn.Linear(d, d)


def test_norms_train_without_decay_and_no_layer_below_them():
    net, _ = tiny("vit")
    net.vit.layers[1].layernorm_after = OwnNorm(32)
    tuned = burnish.tune(net, "ut_adapter(bottleneck=4)", head=False)
    own = {n: p for n, p in tuned.named_parameters() if ".burnish." not in n}
    assert sorted(own) == sorted(f"vit.layers.{i}.layernorm_{n}.{leaf}" for i in range(2)
                                 for n in ("before", "after") for leaf in ("weight", "bias"))
    groups = tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups
    free = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {id(p) for p in own.values()} <= free


def test_the_start_is_no_base_and_taken_off_it_is():
    net, batch = tiny("bert")
    before = net.eval()(**batch).logits
    tuned = burnish.tune(net, "ut_adapter(bottleneck=4)")
    assert (net.eval()(**batch).logits - before).abs().max() > 1e-3
    tuned.detach()
    assert torch.equal(net.eval()(**batch).logits, before)


@pytest.mark.parametrize("model, recipe, why", [
    ("bert", "ut_adapter(bottleneck=0)", "1 or more"),
    ("bert", "ut_adapter(kernel=0)", "1 or more"),
    ("llama", "ut_adapter", "writes nothing on"), ("t5", "ut_adapter", "writes nothing on"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_the_defaults():
    m = parse("ut_adapter")[0]
    assert (m.bottleneck, m.kernel, m.norms) == (32, 3, True)
