"""Scaled parallel adapters: the equation written out in float64, both taps, dropout, start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.core.recipe import parse
from burnish.testing.models import tiny

MLP = {"vit": ("vit.layers.{}.mlp", "vit.layers.{}.layernorm_after"),
       "llama": ("model.layers.{}.mlp", "model.layers.{}.post_attention_layernorm"),
       "gpt2": ("transformer.h.{}.mlp", "transformer.h.{}.ln_2")}


def branch(one, path, x, s, p=0.0, act=torch.relu):
    """s (drop(act(x W_down^T + b_down)) W_up^T + b_up)."""
    A, a, B, b = (one.theta[path, leaf] for leaf in
                  ("down.weight", "down.bias", "up.weight", "up.bias"))
    return s * (F.dropout(act(x @ A.t() + a), p, p > 0) @ B.t() + b)


@pytest.mark.parametrize("tap", ["norm", "residual"])
@pytest.mark.parametrize("model", MLP)
def test_the_equation_written_out(beside, model, tap):                         # findings 6
    """MLP(LN x) + s f(LN x), or s f(x) with x the residual stream before that norm."""
    one = beside(model, f"parallel(bottleneck=4, scale=3.0, tap={tap!r})")
    mlp, norm = MLP[model]
    assert [p for p, _ in one.at("down.weight")] == [mlp.format(i) for i in range(2)]
    seen = {}
    for i in range(2):
        read = one.base.get_submodule((mlp if tap == "norm" else norm).format(i))
        read.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0]}))
        path = mlp.format(i)
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, i=i, path=path: out + branch(one, path, seen[i], 3.0))
    one.agree()


def test_beside_a_post_norm_mlp_it_reads_the_stream(beside):
    """In BERT the MLP has no module of its own: it starts at `intermediate`, ends in `output`."""
    one = beside("bert", "parallel(bottleneck=4, scale=2.0, act='gelu')")
    seen = {}
    for path, _ in one.at("down.weight"):
        layer = path.rpartition(".output")[0]
        one.base.get_submodule(f"{layer}.intermediate").register_forward_pre_hook(
            lambda m, args, k=path: seen.update({k: args[0]}))
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, k=path: out + branch(one, k, seen[k], 2.0, act=F.gelu))
    assert len(seen) == 0 and len(one.at("down.weight")) == 2
    one.agree()


def test_dropout_is_on_the_activation(beside):
    """One seed, the same masks: stock dropout of what the activation gives, s and bias behind."""
    one = beside("vit", "parallel(bottleneck=8, scale=3.0, dropout=0.4)")
    for i in range(2):
        path = MLP["vit"][0].format(i)
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: out + branch(one, path, args[0], 3.0, 0.4))
    one.tuned.model.train()
    torch.manual_seed(5)
    want = one.base(**one.batch).logits
    torch.manual_seed(5)
    one.agree(want)


def test_the_start_and_the_defaults():
    """W_down U(-1/sqrt d, 1/sqrt d), everything else 0; s = 4 at r = 512, ReLU, no dropout."""
    m = parse("parallel")[0]
    assert (m.bottleneck, m.scale, m.act, m.dropout, m.tap) == (512, 4.0, "relu", 0.0, "norm")
    tuned = burnish.tune(tiny("vit")[0], "parallel(bottleneck=64)", head=False)
    for n, p in tuned.named_parameters():
        if n.endswith("down.weight"):
            bound = 1 / math.sqrt(32)
            assert float(p.detach().abs().max()) <= bound
            assert float(p.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        else:
            assert not p.any(), n


def test_the_scale_may_train(beside):                                          # findings 3.9
    """s is one tensor more per block; its gradient is <g, f(x)>, under dropout too."""
    one = beside("vit", "parallel(bottleneck=8, scale=1.5, train_scale=True, dropout=0.4)")
    assert [p.shape for _, p in one.at("scale")] == [(), ()]
    for path, s in one.at("scale"):
        assert s != 1.5, "it has been moved"
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path, s=s: out + branch(one, path, args[0], s, 0.4))
    one.tuned.model.train()
    torch.manual_seed(5)
    want = one.base(**one.batch).logits
    torch.manual_seed(5)
    one.agree(want)


def test_a_scale_that_trains_is_counted_saved_and_not_decayed(tmp_path):       # findings 3.9
    recipe = "parallel(bottleneck=4, scale=1.5, train_scale=True)"
    net, batch = tiny("vit")
    tuned = burnish.tune(net, recipe, head=False)
    scales = [p for n, p in tuned.named_parameters() if n.endswith("scale")]
    assert [float(s.detach()) for s in scales] == [1.5, 1.5]
    assert sum(p.numel() for p in tuned.parameters()) == 2 * parse(recipe)[0].count(32)
    assert parse(recipe)[0].count(32) == 2 * 32 * 4 + 4 + 32 + 1
    decay = {id(p): g["weight_decay"] for g in
             tuned.optimizer(lr=1e-2, weight_decay=0.5).param_groups for p in g["params"]}
    assert {decay[id(s)] for s in scales} == {0.0} and 0.5 in decay.values()
    for _ in range(3):                                       # W_up = 0 at first: s waits a step
        tuned.step(batch)
    assert all(float(s.detach()) != 1.5 for s in scales)
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit")[0], tmp_path / "a")
    assert [float(p.detach()) for n, p in again.named_parameters() if n.endswith("scale")] == \
        [float(s.detach()) for s in scales]


# -- the other points of the unified view --------------------------------------------------------
ATTENTION = {"vit": [("vit.layers.{}.attention", "vit.layers.{}.attention.o_proj")],
             "bert": [("bert.encoder.layer.{}.attention",
                       "bert.encoder.layer.{}.attention.output.dense")],
             "llama": [("model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj")],
             "encoder": [("encoder.layers.{}.self_attn", "encoder.layers.{}.self_attn")],
             "t5": [("decoder.block.{}.layer.1.EncDecAttention",
                     "decoder.block.{}.layer.1.EncDecAttention.o"),
                    ("decoder.block.{}.layer.0.SelfAttention",
                     "decoder.block.{}.layer.0.SelfAttention.o"),
                    ("encoder.block.{}.layer.0.SelfAttention",
                     "encoder.block.{}.layer.0.SelfAttention.o")]}


def reads(one, read):
    """What a module of the base was given last, in a list."""
    seen = []
    one.base.get_submodule(read).register_forward_pre_hook(
        lambda m, args, kw: seen.append((args or tuple(kw.values()))[0]), with_kwargs=True)
    return seen


@pytest.mark.parametrize("model", ATTENTION)
def test_beside_attention_it_reads_what_attention_reads(beside, model):
    """Attn(x) + s f(x), x what the attention is given; of cross-attention what its queries are."""
    one = beside(model, "parallel(bottleneck=4, scale=3.0, placement='attention')")
    sites = [(r.format(i), w.format(i)) for i in range(2) for r, w in ATTENTION[model]]
    assert {p for p, _ in one.at("down.weight")} == {w for _, w in sites}
    for read, write in sites:
        seen = reads(one, read)

        def after(m, args, out, seen=seen, path=write):
            first = out[0] if isinstance(out, tuple) else out
            made = first + branch(one, path, seen[-1], 3.0)
            return (made, *out[1:]) if isinstance(out, tuple) else made

        one.base.get_submodule(write).register_forward_hook(after)
    one.tuned.model.train(model == "encoder")     # in eval torch takes a fused path of its own
    one.base.train(model == "encoder")
    one.agree()


@pytest.mark.parametrize("train_scale", [False, True])
def test_a_gate_weighs_the_output_and_the_branch(beside, train_scale):
    """F <- (1 - l) F + l f(x)."""
    one = beside("vit", f"parallel(bottleneck=8, scale=0.3, compose='blend', placement='both', "
                        f"train_scale={train_scale})")
    sites = [("vit.layers.{}.mlp", "vit.layers.{}.mlp"), *ATTENTION["vit"]]
    for i in range(2):
        for read, write in sites:
            path, seen = write.format(i), reads(one, read.format(i))
            gate = one.theta[path, "scale"] if train_scale else 0.3
            one.base.get_submodule(path).register_forward_hook(
                lambda m, args, out, path=path, seen=seen, gate=gate:
                (1 - gate) * out + branch(one, path, seen[-1], gate))
    one.agree()


def test_a_gate_that_starts_closed_is_the_base():
    net, batch = tiny("vit")
    before = net.eval()(**batch).logits
    tuned = burnish.tune(net, "parallel(bottleneck=4, scale=0.0, compose='blend', "
                              "train_scale=True)", head=False)
    assert torch.equal(net.eval()(**batch).logits, before)
    tuned.step(batch)
    gates = [p for n, p in tuned.named_parameters() if n.endswith("scale")]
    assert all(p.detach() != 0 for p in gates), "d loss / d l = <g, f(x) - F>, not 0"


@pytest.mark.parametrize("model", ["vit", "bert", "llama", "t5"])
@pytest.mark.parametrize("compose", ["add", "blend"])
def test_a_bottleneck_for_each_head(beside, model, compose):
    """head_i <- head_i + s act(x W_down,i^T + b_i) W_up,i^T + s c_i before W_o, r / heads wide."""
    s = 0.6
    one = beside(model, f"parallel(bottleneck=8, scale={s}, placement='attention', "
                        f"compose={compose!r}, multi_head=True)")
    for read, write in [(r.format(i), w.format(i)) for i in range(2) for r, w in ATTENTION[model]]:
        A, a, B, b = (one.theta[write, leaf] for leaf in
                      ("down.weight", "down.bias", "up.weight", "up.bias"))
        wide = one.base.get_submodule(write).in_features
        assert B.shape == (wide, 2), "4 heads share 8"
        seen = reads(one, read)

        def before(m, args, A=A, a=a, B=B, b=b, seen=seen, h=wide // 4):
            made = [torch.relu(seen[-1] @ A[2 * i:2 * i + 2].t() + a[2 * i:2 * i + 2])
                    @ B[h * i:h * i + h].t() + b[h * i:h * i + h] for i in range(4)]
            kept = 1 - s if compose == "blend" else 1
            return (kept * args[0] + s * torch.cat(made, -1),)

        one.base.get_submodule(write).register_forward_pre_hook(before)
    one.agree()


def test_heads_share_the_budget(published):
    """r = 30 heads' worth: 12 heads of r / 12 each; a twelfth of the plain one's way up."""
    bert, _ = published("BertConfig", "BertForSequenceClassification")
    m = parse("parallel(bottleneck=360, placement='attention', multi_head=True)")[0]
    with torch.device("meta"):
        count = sum(p.numel() for b in m.branch(bert) for p in b.module.parameters())
    assert count == 12 * m.count(768, 768, 12)
    assert m.count(768, 768, 12) == 768 * 360 + 768 * 30 + 360 + 768


@pytest.mark.parametrize("model, settings, why", [
    ("vit", "placement='both', tap='residual'", "of the MLP"),
    ("vit", "multi_head=True", "of attention"),
    ("vit", "dropout=1.0", "parallel: dropout is a probability"),
    ("vit", "compose='blend', scale=4.0", "from 0 to 1"),
    ("vit", "compose='blend', scale=1.01", "from 0 to 1"),
    ("vit", "compose='blend', scale=-0.01", "from 0 to 1"),
    ("vit", "placement='attention', multi_head=True, bottleneck=6", "multiple of 4"),
    ("encoder", "placement='attention', multi_head=True, bottleneck=4", "cannot be reached"),
    ("mamba", "placement='attention', multi_head=True, bottleneck=4", "cannot be reached"),
])
def test_what_it_refuses(model, settings, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], f"parallel({settings})")


@pytest.mark.parametrize("settings", ["placement='both'", "placement='attention', multi_head=True"])
def test_under_checkpointing_it_is_the_same(settings):
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("llama")
        tuned = burnish.tune(net.train(), f"parallel(bottleneck=4, {settings}){extra}")
        for i, p in enumerate(tuned.parameters()):
            torch.manual_seed(i)
            p.data.normal_(std=0.1)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
