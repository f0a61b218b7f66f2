"""The AST study's adapters: placements, residuals and the conformer, in float64; what trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.mixers import Conformer
from burnish.core.call import Call, resume
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

SITES = {"attention": ("vit.layers.{}.attention", "vit.layers.{}.attention.o_proj"),
         "mlp": ("vit.layers.{}.mlp", "vit.layers.{}.mlp")}


def wide(one):
    """Statistics in float64 too."""
    for m in one.tuned.model.modules():
        if isinstance(m, Conformer):
            m.double()
    return one


def plain(one, path):
    A, a, B, b = (one.theta[path, leaf] for leaf in
                  ("down.weight", "down.bias", "up.weight", "up.bias"))
    return lambda z: F.gelu(z @ A.t() + a) @ B.t() + b


def conformer(one, path, kernel, train=False):
    """1x1 conv d -> 2 r, GLU, depthwise conv over tokens, batch norm, SiLU, 1x1 conv r -> d."""
    t = {leaf: one.theta[path, leaf] for leaf in
         ("down.weight", "down.bias", "mixer.conv.weight", "mixer.norm.weight",
          "mixer.norm.bias", "up.weight", "up.bias")}

    def f(z):
        u, gate = (z @ t["down.weight"].t() + t["down.bias"]).chunk(2, -1)
        u = (u * torch.sigmoid(gate)).transpose(1, 2)
        T, left = u.shape[-1], (kernel - 1) // 2
        rows = []
        for k in range(kernel):                          # y_t = sum_k w_k u_(t + k - left)
            at = torch.arange(T) + k - left
            shifted = torch.where((at >= 0) & (at < T), u[..., at.clamp(0, T - 1)], 0.0)
            rows.append(t["mixer.conv.weight"][:, 0, k, None] * shifted)
        y = sum(rows)
        if train:
            mean, var = y.mean((0, 2)), y.var((0, 2), unbiased=False)
        else:
            mean, var = torch.zeros(len(u[0]), dtype=y.dtype), torch.ones(len(u[0]), dtype=y.dtype)
        y = (y - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
        y = y * t["mixer.norm.weight"][:, None] + t["mixer.norm.bias"][:, None]
        return F.silu(y).transpose(1, 2) @ t["up.weight"].t() + t["up.bias"]

    return f


@pytest.mark.parametrize("mode", ["parallel", "series"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("placement", ["mlp", "both"])
@pytest.mark.parametrize("mixer", ["none", "conformer"])
def test_the_equation_written_out(beside, mode, residual, placement, mixer):
    inside = ", mixer='conformer', kernel=3" if mixer == "conformer" else ""
    one = wide(beside("vit", f"ast_adapter(bottleneck=4, mode={mode!r}, own_residual={residual}, "
                             f"placement={placement!r}{inside})"))
    sites = SITES.values() if placement == "both" else [SITES["mlp"]]
    for i in range(2):
        for read, write in sites:
            path, seen = write.format(i), []
            f = plain(one, path) if mixer == "none" else conformer(one, path, 3)
            one.base.get_submodule(read.format(i)).register_forward_pre_hook(
                lambda m, args, kw, seen=seen: seen.append((args or tuple(kw.values()))[0]),
                with_kwargs=True)

            def after(m, args, out, f=f, seen=seen):
                if mode == "parallel":
                    return out + f(seen[-1]) + (seen[-1] if residual else 0)
                return f(out) + (out if residual else 0)

            one.base.get_submodule(path).register_forward_hook(after)
    norms = {p for p, rest in one.theta if not rest}
    assert len(norms) == 4 * (1 + (placement == "both"))
    one.agree()


def test_the_conformer_in_training_learns_from_the_batch(beside):
    one = wide(beside("vit", "ast_adapter(bottleneck=4, mixer='conformer', kernel=4)"))
    for i in range(2):
        path = SITES["mlp"][1].format(i)
        f = conformer(one, path, 4, train=True)
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out, f=f: out + f(args[0]))
    one.tuned.model.train()
    one.base.train()
    one.agree()
    for m in one.tuned.model.modules():
        if isinstance(m, Conformer):
            assert m.norm.num_batches_tracked == 1 and m.norm.running_mean.any()


def test_the_conformer_sees_its_neighbours_and_no_padding():
    torch.manual_seed(0)
    m = Conformer(3, 5).double().eval()
    z = torch.randn(2, 9, 6, dtype=torch.float64)
    y, moved = m(z), z.clone()
    moved[:, 4] += 1
    changed = (m(moved) - y).abs().amax((0, 2)) > 0
    assert changed.tolist() == [2 <= t <= 6 for t in range(9)]
    with pytest.raises(burnish.RecipeError, match="batch, tokens, channels"):
        m(z[0])
    with pytest.raises(burnish.RecipeError, match="no variance"):
        m.train()(z[:1, :1])


@pytest.mark.parametrize("train", [False, True])
def test_what_is_padding_is_not_seen(train):
    """Tokens behind the attention mask are zeros to the others, whatever stands there, and count in
    no statistic."""
    net, batch = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    stir(burnish.tune(net, "ast_adapter(bottleneck=4, mixer='conformer', kernel=3)"), size=0.3)
    net.train(train)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -3:] = 0
    other = batch["input_ids"].clone()
    other[:, -3:] = 1
    a, b, c = (net(input_ids=ids, attention_mask=mask[:, :ids.shape[1]]).logits
               for ids in (batch["input_ids"], other, other[:, :-3]))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_tokens_that_count():
    """Values, gradients and running statistics of the sequences without their padding."""
    torch.manual_seed(0)
    m, lengths = Conformer(3, 5).double().train(), (9, 6)
    stir(m, size=0.3)
    m.norm.running_mean.normal_(), m.norm.running_var.uniform_(0.5, 2)
    z = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    mean, var = m.norm.running_mean.clone(), m.norm.running_var.clone()
    rows = [F.conv1d(F.glu(z[i, :n], -1).t()[None], m.conv.weight, padding=2, groups=3)[0]
            for i, n in enumerate(lengths)]
    want = F.silu(F.batch_norm(torch.cat(rows, 1)[None], mean, var, m.norm.weight, m.norm.bias,
                               True, m.norm.momentum, m.norm.eps))[0].t()
    with resume(Call(valid=mask.long())):
        got = m(z)[mask]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(m.norm.running_mean, mean)
    torch.testing.assert_close(m.norm.running_var, var)
    assert m.norm.num_batches_tracked == 1
    g, inputs = torch.randn_like(want), [z, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g),
                    strict=True):
        torch.testing.assert_close(a, b)


def test_the_promise_beside_padding_is_what_is_measured():
    net, batch = tiny("bert", batch=8)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, -3:] = 0
    recipe = "ast_adapter(bottleneck=4, mixer='conformer', kernel=3)"
    promise = burnish.simulate(copy.deepcopy(net), recipe, batch)
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(lr=1e-3)
    truth = burnish.measure(tuned, batch)
    assert abs(promise.peak_bytes / truth.peak_bytes - 1) <= 0.01


@pytest.mark.parametrize("settings", ["", "placement='both'", "mode='series', own_residual=True",
                                      "mixer='conformer', kernel=3"])
def test_the_start_is_the_base(settings):
    net, batch = tiny("vit")
    with torch.no_grad():
        before = net.eval()(**batch).logits
        burnish.tune(net, f"ast_adapter(bottleneck=4, {settings})")
        assert torch.equal(net.eval()(**batch).logits, before)


@pytest.mark.parametrize("settings", ["mode='series'", "own_residual=True"])
def test_without_the_right_residual_it_is_not(settings):
    net, batch = tiny("vit")
    before = net.eval()(**batch).logits
    burnish.tune(net, f"ast_adapter(bottleneck=4, {settings})")
    assert (net.eval()(**batch).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("inside", ["", ", mixer='conformer', kernel=3"])
def test_the_way_down_has_a_gradient_after_two_steps(inside):
    """With both matrices at zero only the last bias ever would."""
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"ast_adapter(bottleneck=4{inside})")
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    downs = [p for n, p in tuned.named_parameters() if n.endswith("down.weight")]
    assert len(downs) == 2 and all(p.grad.any() for p in downs)


def test_counts_on_the_published_shape(published):
    """AST-base: 12 x 19,212 = 230,544, and 12 x 1,536 of norms."""
    anatomy, _ = published("ASTConfig", "ASTForAudioClassification")
    m = parse("ast_adapter")[0]
    with torch.device("meta"):
        count = sum(p.numel() for b in m.branch(anatomy) for p in b.module.parameters())
    assert count == 12 * m.count(768) == 12 * 19_212 == 230_544
    norms = [s.name for s in m.select(anatomy)]
    assert sum(anatomy.model.get_parameter(n).numel() for n in norms) == 12 * 1_536
    assert all("layernorm_after" in n for n in norms)
    m = parse("ast_adapter(mixer='conformer', kernel=3)")[0]
    with torch.device("meta"):
        count = sum(p.numel() for b in m.branch(anatomy) for p in b.module.parameters())
    assert count == 12 * m.count(768) == 12 * (3 * 768 * 12 + 24 + 12 * 5 + 768)


def test_statistics_are_in_the_file(tmp_path):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "ast_adapter(bottleneck=4, mixer='conformer', kernel=3)")
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit")[0], tmp_path / "a")
    assert torch.equal(again.model.eval()(**batch).logits, net.eval()(**batch).logits)


def test_which_norms_train_in_other_blocks():
    names = {m: [n for n, _ in burnish.tune(tiny(m)[0], "ast_adapter(bottleneck=4, "
                                            "placement='both')", head=False).named_parameters()
                 if ".burnish." not in n and ".0." in n] for m in ("bert", "llama", "whisper")}
    assert {n.rpartition(".layer.0.")[2] for n in names["bert"]} == \
        {"attention.output.LayerNorm.weight", "attention.output.LayerNorm.bias"}
    assert {n.rpartition(".layers.0.")[2] for n in names["llama"]} == \
        {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert {n for n in names["whisper"] if "decoder" in n and n.endswith("weight")} == \
        {f"model.decoder.layers.0.{leaf}.weight" for leaf in
         ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")}


class OwnNorm(nn.LayerNorm):
    """A norm with a layer of its own below it."""

    def __init__(self, d):
        super().__init__(d)
        self.gate = nn.Linear(d, d)


def test_norms_train_without_decay_and_no_layer_below_them():
    net, _ = tiny("vit")
    net.vit.layers[1].layernorm_after = OwnNorm(32)
    tuned = burnish.tune(net, "ast_adapter(bottleneck=4)", head=False)
    own = {n: p for n, p in tuned.named_parameters() if ".burnish." not in n}
    assert sorted(own) == [f"vit.layers.{i}.layernorm_after.{leaf}" for i in range(2)
                           for leaf in ("bias", "weight")]
    groups = tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups
    free = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {id(p) for p in own.values()} <= free


@pytest.mark.parametrize("recipe, why", [
    ("ast_adapter(kernel=3)", "mixer='conformer'"), ("ast_adapter(bottleneck=0)", "at least 1"),
    ("ast_adapter(mixer='conformer') + checkpoint", "mode of the blocks"),
])
def test_what_it_refuses(recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny("vit")[0], recipe)


def test_the_defaults():
    assert parse("ast_adapter(bottleneck=1, mixer='conformer', kernel=1)")[0].kernel == 1
    m = parse("ast_adapter")[0]
    assert (m.bottleneck, m.mode, m.placement, m.own_residual, m.mixer, m.kernel, m.norms) == \
        (12, "parallel", "mlp", False, "none", 31, True)
    assert isinstance(next(iter(parse("ast_adapter(mixer='conformer')")[0].branch(
        burnish.tune(tiny("vit")[0], "lora(rank=2)").anatomy))).module, nn.Module)
