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
