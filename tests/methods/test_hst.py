"""HST: a pyramid of maps that a vision transformer tells, and a token of every block's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import burnish
from burnish.blocks.state.pyramid import Answer, Own, Pyramid, kept
from burnish.core.errors import RecipeError
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny

SMALL = "hst(widths=(8, 16), heads=(2, 4), drop_path=0.0)"
BLOCKS = {"vit": "vit.layers", "deit": "deit.layers", "timm_qkv": "blocks"}


def parts(tuned, kind):
    return [m for _, _, slot in slots(tuned.model) for m in slot.modules() if isinstance(m, kind)]


def blocks_of(net, model):
    path = BLOCKS[model] if model != "deit" else next(
        p for p, m in net.named_modules() if isinstance(m, nn.ModuleList))
    return net.get_submodule(path)


# -- what it computes -----------------------------------------------------------------------------
def written_out(p, picture, taps, grid, heads, told):
    """Logits by the equation, in training; p: tensors by name."""
    def norm(x, at, eps=1e-5, over=(-1,), shape=(-1,)):
        mean, var = x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)
        x = (x - mean) / (var + eps).sqrt()
        return x * p[f"{at}.weight"].view(shape) + p[f"{at}.bias"].view(shape) \
            if f"{at}.weight" in p else x

    def linear(x, at):
        return x @ p[f"{at}.weight"].t() + p[f"{at}.bias"]

    def attention(x, tokens, at, h):
        q, (k, v) = linear(x, f"{at}.q"), linear(tokens, f"{at}.kv").chunk(2, -1)
        w, out = q.shape[-1] // h, []
        for i in range(h):
            a, b, c = (t[..., i * w : (i + 1) * w] for t in (q, k, v))
            out.append(torch.softmax(a @ b.transpose(1, 2) / w**0.5, -1) @ c)
        return linear(torch.cat(out, -1), f"{at}.proj")

    y = picture
    for k, h in enumerate(heads):
        at = f"pyramid.stages.{k}"
        if k == 0:
            y = F.conv2d(y, p[f"{at}.enter.0.weight"], stride=2, padding=1)
            y = norm(y, f"{at}.enter.1", over=(0, 2, 3), shape=(1, -1, 1, 1)).clamp_min(0)
            y = F.conv2d(y, p[f"{at}.enter.3.weight"], p[f"{at}.enter.3.bias"], stride=2)
        else:
            y = F.conv2d(y, p[f"{at}.enter.weight"], p[f"{at}.enter.bias"], stride=2, padding=1)
        B, c, H, W = y.shape
        x = norm(y.reshape(B, c, H * W).transpose(1, 2), f"{at}.norm")
        for j in range(told):
            m, v = taps[k * told + j][:, :1], taps[k * told + j][:, 1:]
            v = v.reshape(B, *grid, -1).permute(0, 3, 1, 2)
            v = F.interpolate(v, (H, W), mode="bilinear", align_corners=False)
            v = linear(v.permute(0, 2, 3, 1).reshape(B, H * W, -1), f"{at}.bridge")
            one = f"{at}.blocks.{j}"
            two = torch.cat([norm(linear(m, f"{at}.bridge"), f"{one}.own"),
                             v.mean(1, keepdim=True)], 1)
            x = x + attention(norm(x, f"{one}.norm1"), two, one, h)
            x = x + v
            inner = F.gelu(linear(norm(x, f"{one}.norm2"), f"{one}.fc1"))
            x = x + linear(inner, f"{one}.fc2")
        y = norm(x, f"{at}.end").transpose(1, 2).reshape(B, c, H, W)
    return linear(norm(y.mean((2, 3)), "", eps=1e-6, over=(0,)), "out")


@pytest.mark.parametrize("model, widths, heads", [
    ("vit", (8, 16), (2, 4)), ("vit", (6,), (3,)), ("deit", (8, 16), (1, 2)),
    ("timm_qkv", (8, 16), (2, 4))])
def test_it_is_the_equation_and_so_are_its_gradients(model, widths, heads):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, f"hst(widths={widths}, heads={heads}, drop_path=0.0)", head=False)
    stir(tuned, size=0.2)
    ((end,), own), after = (parts(tuned, Answer), parts(tuned, Own)), 1 + (model == "deit")
    leaves = {n: q.detach().clone().requires_grad_() for n, q in end.named_parameters()}
    rows = [o.rows.detach().clone().requires_grad_() for o in own]
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad and ".burnish." not in n}
    assert len(trained) == 8
    for n, p in base.named_parameters():
        if n in trained:
            p.requires_grad_(True).data.copy_(trained[n].data)
    taps = []

    def put(row):
        return lambda m, a: (torch.cat([a[0][:, :after], row.expand(len(a[0]), 1, -1),
                                        a[0][:, after:]], 1), *a[1:])

    def take(m, a, out):
        x = out[0] if isinstance(out, tuple) else out
        taps.append(x[:, after:])
        x = torch.cat([x[:, :after], x[:, after + 1 :]], 1)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    for block, row in zip(blocks_of(base, model), rows, strict=True):
        block.register_forward_pre_hook(put(row))
        block.register_forward_hook(take)
    got = net(**batch).logits
    base(**batch)
    picture = batch.get("pixel_values", batch.get("x"))
    want = written_out(leaves, picture, taps, (4, 4), heads, 2 // len(widths))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    size = max(float(q.grad.abs().max()) for q in leaves.values())
    pairs = [*((n, q.grad, leaves[n].grad) for n, q in end.named_parameters()),
             *((f"e_{i}", o.rows.grad, r.grad) for i, (o, r) in enumerate(zip(own, rows,
                                                                              strict=True))),
             *((n, p.grad, base.get_parameter(n).grad) for n, p in trained.items())]
    for n, a, b in pairs:
        assert b.any(), n
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * size, msg=f"{n}: {a} for {b}")


def test_the_first_token_is_reached_through_the_whole_transformer():
    net, batch = tiny("vit", batch=4)
    tuned = burnish.tune(net, SMALL, head=False)
    tuned.loss(batch).backward()
    own = parts(tuned, Own)
    assert len(own) == 2 and all(o.rows.grad.any() for o in own)
    assert net.vit.layers[0].layernorm_before.weight.grad.any()
    assert net.vit.layernorm.weight.grad is None and net.classifier.weight.grad is None


# -- the pyramid ----------------------------------------------------------------------------------
def test_maps_of_a_large_picture_are_four_sizes():
    net = Pyramid(3, 12, (4, 6, 8, 12), (2, 2, 4, 12), 1)
    taps = [torch.randn(1, 197, 12) for _ in range(4)]
    maps = net.maps(torch.randn(1, 3, 224, 224), taps, (14, 14))
    assert [tuple(m.shape) for m in maps] == [(1, 4, 56, 56), (1, 6, 28, 28), (1, 8, 14, 14),
                                              (1, 12, 7, 7)]
    assert torch.equal(net.eval()(torch.ones(1, 3, 224, 224), taps, (14, 14)),
                       net.maps(torch.ones(1, 3, 224, 224), taps, (14, 14))[-1])


def test_a_stage_is_told_by_blocks_of_its_own():
    """Three for each: what the fourth block makes does not reach the first map."""
    net = Pyramid(3, 8, (4, 4), (1, 1), 3).double()
    taps = [torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    first, last = net.maps(torch.randn(2, 3, 16, 16, dtype=torch.float64), taps, (2, 2))
    got = torch.autograd.grad(first.square().sum(), taps, allow_unused=True, retain_graph=True)
    assert [g is not None for g in got] == [True] * 3 + [False] * 3
    assert all(g.any() for g in torch.autograd.grad((last**3).sum(), taps))


def test_the_start():
    torch.manual_seed(0)
    net = Pyramid(3, 64, (32, 64), (2, 4), 2)
    for m in net.modules():
        if isinstance(m, nn.Linear):
            assert float(m.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert not m.bias.any()
        if isinstance(m, nn.Conv2d):
            fan = m.out_channels * m.kernel_size[0] ** 2
            assert float(m.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.1)
            assert m.bias is None or not m.bias.any()
    tuned = burnish.tune(tiny("vit")[0], SMALL, head=False)
    rows = torch.cat([o.rows.detach() for o in parts(tuned, Own)])
    bound = (6 / 33) ** 0.5
    assert 0.8 * bound < float(rows.abs().max()) <= bound
    (end,) = parts(tuned, Answer)
    assert end.out.weight.std() < 0.04 and not end.out.bias.any() and end.norm.eps == 1e-6


def test_the_count_is_the_papers_without_what_its_batch_norm_takes_away():
    big = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
           "intermediate_size": 16, "image_size": 224, "patch_size": 16}
    tuned = burnish.tune(tiny("vit", batch=1, **big)[0], "hst")
    numbers = sum(p.numel() for p in tuned.parameters())
    hst = tuned.recipe.named("hst")
    assert numbers == hst.count(12, 768, 3) == 764_840 - 2 * 72 + 72 * 3 + 3
    ours = sum(p.numel() for n, p in tuned.named_parameters() if ".burnish." in n)
    assert ours == 727_976 - 2 * 72 + 72 * 3 + 3
    assert not any(tuned.adapters["default"].decay[n] for n, _ in tuned.named_parameters()
                   if ".burnish." not in n)
    rows, bound = torch.cat([o.rows.detach() for o in parts(tuned, Own)]), (6 / 769) ** 0.5
    assert 0.9995 * bound < float(rows.abs().max()) <= bound
    assert hst.widths == (32, 48, 64, 72) and hst.heads == (2, 4, 8, 12) and hst.drop_path == 0.1


# -- training and evaluation ----------------------------------------------------------------------
def test_paths_are_dropped_sample_by_sample_and_never_in_evaluation():
    torch.manual_seed(0)
    x = kept(torch.ones(4000, 2, 3), 0.25)
    assert torch.equal(x, x[:, :1, :1].expand_as(x))
    torch.testing.assert_close(x[x != 0], torch.full_like(x[x != 0], 4 / 3))
    assert float(x.mean()) == pytest.approx(1, abs=0.03)
    nets = [Pyramid(3, 8, (4,), (1,), 2, p) for p in (0.0, 0.5)]
    nets[1].load_state_dict(nets[0].state_dict())
    picture, taps = torch.randn(6, 3, 16, 16), [torch.randn(6, 5, 8) for _ in range(2)]
    outs = [net(picture, taps, (2, 2)) for net in nets]
    assert not torch.equal(*outs)
    outs = [net.eval()(picture, taps, (2, 2)) for net in nets]
    assert torch.equal(*outs)


def test_one_sample_has_no_variance_in_training_and_needs_none_in_evaluation():
    net, batch = tiny("vit", batch=1)
    tuned = burnish.tune(net, SMALL, head=False)
    with pytest.raises(RecipeError, match="one sample has no variance.*two or more"):
        tuned.loss(batch)
    net.eval()
    assert net(**batch).logits.shape == (1, 3)


def test_evaluation_uses_what_training_has_seen():
    net, batch = tiny("vit", batch=8)
    tuned = burnish.tune(net, SMALL, head=False)
    (end,) = parts(tuned, Answer)
    for _ in range(60):
        tuned.loss(batch)
    seen = []
    end.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    tuned.loss(batch)
    torch.testing.assert_close(end.norm.running_mean, seen[0].mean(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("model", ["vit", "deit", "timm_qkv"])
def test_a_bf16_model_is_near_where_a_batch_has_a_variance(model):
    """Two samples have none to speak of: what is left of a small difference is its sign."""
    ends, start = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        net, batch = tiny(model, batch=16, dtype=torch.bfloat16)
        tuned = burnish.tune(net.to(dtype), SMALL, head=False)
        (end,) = parts(tuned, Answer)
        assert end.norm.running_mean.dtype == torch.float32
        assert end.out.weight.dtype == dtype
        for n, p in tuned.named_parameters():
            p.data.copy_(start.setdefault(n, p.detach().bfloat16()))
        stir(tuned)
        loss = tuned.loss({k: v.to(dtype) if v.is_floating_point() else v
                           for k, v in batch.items()})
        loss.backward()
        ends.append((float(loss.detach()), torch.cat([
            p.grad.double().flatten() for p in tuned.parameters()])))
    (want, right), (got, ours) = ends
    assert got == pytest.approx(want, rel=0.02)
    assert float((ours - right).norm()) <= 0.15 * float(right.norm())


# -- where it stands ------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["gpt2", "bert", "clip", "swin", "cnn", "convnext", "encoder",
                                   "mlp", "whisper"])
def test_models_that_look_at_no_patches_are_refused(model):
    with pytest.raises(RecipeError, match="hst needs transformer blocks of one width between a "
                                          "convolution that cuts pictures into patches and a head "
                                          "of one linear"):
        burnish.tune(tiny(model)[0], "hst", head=False)


@pytest.mark.parametrize("change", [
    lambda net: setattr(net, "head", nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3))),
    lambda net: setattr(net.patch_embed, "proj", nn.Sequential(
        nn.Conv2d(3, 32, 2, 2), nn.Conv2d(32, 32, 2, 2)))])
def test_a_head_of_two_and_patches_cut_twice_are_refused(change):
    net, _ = tiny("timm_qkv")
    change(net)
    with pytest.raises(RecipeError, match="hst needs transformer blocks"):
        burnish.tune(net, SMALL, head=False)


@pytest.mark.parametrize("recipe, said", [
    ("hst", "4 stages do not share 2 blocks evenly"),
    (SMALL + " + checkpoint", "cannot be joined"),
    (SMALL.replace("hst(", "hst(targets='fc1', "), "takes no targets")])
def test_what_cannot_be_is_refused(recipe, said):
    with pytest.raises(RecipeError, match=said):
        burnish.tune(tiny("vit")[0], recipe, head=False)


def test_the_models_own_head_does_not_train():
    with pytest.raises(RecipeError, match="answers in place of the model's head"):
        burnish.tune(tiny("vit")[0], SMALL, head=True)
    tuned = burnish.tune(tiny("vit")[0], SMALL)
    assert not any(n.startswith("classifier.weight") for n, _ in tuned.named_parameters())


@pytest.mark.parametrize("wrong", [
    "widths=(8, 16), heads=(2,)", "widths=(), heads=()", "widths=(8, 16), heads=(3, 4)",
    "widths=(8, 16), heads=(0, 4)", "widths=(0, 16), heads=(2, 4)"])
def test_stages_that_are_none_are_refused(wrong):
    with pytest.raises(RecipeError, match="as many of both, and heads that divide"):
        burnish.parse(f"hst({wrong})")


@pytest.mark.parametrize("p", ["1.0", "-0.1"])
def test_a_rate_that_is_none_is_refused(p):
    with pytest.raises(RecipeError, match="0 or more, and below 1"):
        burnish.parse(f"hst(drop_path={p})")
    assert burnish.parse("hst(drop_path=0.0, widths=(1, 2), heads=(1, 1))")


@pytest.mark.parametrize("reentrant", [False, True])
def test_somebody_elses_checkpointing_is_refused(reentrant):
    """It would hand on states without their graph."""
    net, batch = tiny("timm_qkv")
    tuned = burnish.tune(net, SMALL, head=False)
    run, inside = nn.Sequential.forward, net.blocks
    inside.forward = lambda x: checkpoint(lambda y: run(inside, y), x.requires_grad_(),
                                          use_reentrant=reentrant)
    with pytest.raises(RecipeError, match="cut off from their gradient"):
        tuned.loss(batch)


def test_patches_that_are_no_grid_and_heads_that_read_tokens_are_refused():
    net, batch = tiny("timm_qkv")
    tuned = burnish.tune(net, SMALL, head=False)
    with pytest.raises(RecipeError, match="the head runs without the model below it"):
        net.head(torch.randn(2, 32))
    forward = net.patch_embed.forward
    net.patch_embed.forward = lambda x: forward(x)[:, :12]
    net.pos_embed = nn.Parameter(net.pos_embed[:, :13].detach())
    with pytest.raises(RecipeError, match="a grid of 4 x 4 in the blocks, which have 12"):
        tuned.loss(batch)


def test_switched_off_it_is_the_base():
    net, batch = tiny("vit")
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, SMALL, head=False)
    stir(tuned)
    with tuned.disabled(), torch.no_grad():
        assert torch.equal(net.eval()(**batch).logits, base(**batch).logits)
