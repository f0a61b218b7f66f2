"""Branches at a lower resolution, written out in float64 with stock pooling and interpolation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.coarse import means, spread
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

BLOCKS = {"vit": "vit.layers", "deit": "deit.layers", "timm_qkv": "blocks"}
ACT = {"gelu": F.gelu, "relu": F.relu}


def beside_block(block, letters, grid, stride, s=1.0, act="gelu", prompts=None, special=1):
    """block(x) + s up(act(pool(patches) W_d + b_d) W_u + b_u); prompts: put in and taken out."""
    A, a, B, b = letters
    gh, gw = grid

    def run(x, *rest, was=block.forward, **kw):
        if prompts is not None:
            x = torch.cat([x[:, :special], prompts.expand(len(x), -1, -1), x[:, special:]], 1)
        out = was(x, *rest, **kw)
        y = out[0] if isinstance(out, tuple) else out
        n = x.shape[1] - gh * gw
        maps = x[:, n:].transpose(1, 2).unflatten(2, (gh, gw))
        small = F.avg_pool2d(maps, stride, ceil_mode=True, count_include_pad=False)
        z = act_of(act)(torch.einsum("bdhw,rd->bhwr", small, A) + a) @ B.t() + b
        up = F.interpolate(z.permute(0, 3, 1, 2), (gh, gw), mode="bilinear", align_corners=False)
        whole = z.flatten(1, 2).mean(1, keepdim=True)
        y = torch.cat([y[:, :n] + s * whole, y[:, n:] + s * up.flatten(2).transpose(1, 2)], 1)
        if prompts is not None:
            y = torch.cat([y[:, :special], y[:, special + len(prompts):]], 1)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    block.forward = run


def act_of(name):
    return ACT[name]


def letters_of(one, path):
    return [one.theta[path, f"f.{n}"]
            for n in ("down.weight", "down.bias", "up.weight", "up.bias")]


@pytest.mark.parametrize("model, special", [("vit", 1), ("deit", 2), ("timm_qkv", 1)])
@pytest.mark.parametrize("how", ["", ", scale=0.5, act='relu'", ", downsample=3", ", downsample=1"])
def test_the_equation_written_out(beside, model, special, how):
    one = beside(model, f"lite_residual(bottleneck=5{how})", size=0.5)
    m = parse(f"lite_residual(bottleneck=5{how})")[0]
    for i, block in enumerate(one.base.get_submodule(BLOCKS[model])):
        beside_block(block, letters_of(one, f"{BLOCKS[model]}.{i}"), (4, 4), m.downsample, m.scale,
                     m.act)
    one.agree()


def test_a_grid_that_is_no_square_and_does_not_divide(beside):
    """5 x 3 patches in windows of two: the last ones have means of what is there."""
    one = beside("vit", "lite_residual(bottleneck=5)", size=0.5, image_size=(20, 12))
    assert one.batch["pixel_values"].shape[-2:] == (20, 12)
    for i, block in enumerate(one.base.vit.layers):
        beside_block(block, letters_of(one, f"vit.layers.{i}"), (5, 3), 2)
    one.agree()


@pytest.mark.parametrize("model, special", [("vit", 1), ("deit", 2)])
def test_prompts_before_the_patches_are_not_read(beside, model, special):
    one = beside(model, "vpt(length=3, deep=True) + lite_residual(bottleneck=5)", size=0.5)
    rows = [P for _, P in one.at("rows")]
    for i, block in enumerate(one.base.get_submodule(BLOCKS[model])):
        beside_block(block, letters_of(one, f"{BLOCKS[model]}.{i}"), (4, 4), 2, prompts=rows[i],
                     special=special)
    one.agree()


def test_means_and_what_they_are_spread_to():
    x = torch.zeros((), dtype=torch.float64)
    want = torch.tensor([[.5, .5, 0, 0, 0], [0, 0, .5, .5, 0], [0, 0, 0, 0, 1]]).double()
    assert torch.equal(means(5, 2, x), want)
    assert torch.equal(means(3, 1, x), torch.eye(3, dtype=torch.float64))
    assert torch.allclose(spread(2, 4, x), torch.tensor([[1, 0], [.75, .25], [.25, .75], [0, 1]])
                          .double())


def test_a_step_reaches_every_tensor_and_the_start_is_the_base():
    net, batch = tiny("vit")
    plain = net.eval()(**batch).logits.detach()
    tuned = burnish.tune(net, "lite_residual", head=False)
    assert torch.equal(net.eval()(**batch).logits, plain)
    stir(tuned, size=0.5)
    assert not torch.allclose(net(**batch).logits, plain, atol=1e-3)


def test_targets_name_blocks(beside):
    one = beside("vit", "lite_residual(bottleneck=5, targets='vit.layers.1.*')", size=0.5)
    assert {p for p, _ in one.theta} == {"vit.layers.1"}
    beside_block(one.base.vit.layers[1], letters_of(one, "vit.layers.1"), (4, 4), 2)
    one.agree()


def test_what_waits_is_of_the_low_resolution(kept):
    """d + r numbers for each of m patches and block, where the frozen block's are the same."""
    held = []
    for stride in (1, 2, 4):
        net, batch = tiny("vit", batch=4, image_size=32)
        tuned = burnish.tune(net, f"norms + lite_residual(bottleneck=8, downsample={stride})",
                             head=False)
        held.append(kept(tuned, batch))
    d, r, n, blocks, samples = 32, 8, 64, 2, 4
    each = 4 * samples * blocks * (d + r)
    fixed = 4 * 2 * n                            # the two matrices, once for all blocks
    for (a, b), m in zip(itertools.pairwise(held), (64 - 16, 16 - 4), strict=True):
        assert a - b == pytest.approx((each + fixed) * m, rel=0.02)


def test_a_block_that_runs_again_knows_the_grid():
    grads = []
    for more in ("", " + checkpoint"):
        net, batch = tiny("vit", dtype=torch.float64)
        tuned = burnish.tune(net, f"lite_residual(bottleneck=4){more}", head=False)
        stir(tuned, size=0.5)
        tuned.loss(batch).backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters()})
    for n, g in grads[0].items():
        assert float(g.abs().max()) > 0
        torch.testing.assert_close(grads[1][n], g, rtol=1e-10, atol=1e-13)


def test_a_block_by_itself_says_that_the_grid_is_not_known():
    net, _ = tiny("vit")
    burnish.tune(net, "lite_residual(bottleneck=4)", head=False)
    with pytest.raises(burnish.RecipeError, match="run the whole model"):
        net.vit.layers[0](torch.randn(2, 17, 32))


def test_counts_and_defaults(published):
    m = parse("lite_residual")[0]
    assert (m.bottleneck, m.downsample, m.scale, m.act) == (24, 2, 1.0, "gelu")
    vit, _ = published("ViTConfig", "ViTForImageClassification")
    made = [b for b in m.branch(vit) if hasattr(b, "module")]
    assert len(made) == 12
    assert sum(p.numel() for b in made for p in b.module.parameters()) \
        == m.count(768, 12) == 12 * m.count(768) == 12 * (2 * 768 * 24 + 24 + 768)


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "lite_residual(downsample=0)", "a window of 1"),
    ("vit", "lite_residual(bottleneck=0)", "a width"),
    ("vit", "lite_residual + vpt(length=2, after=4)", "behind all other tokens"),
    ("llama", "lite_residual", "patches"), ("cnn", "lite_residual", "patches"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_tokens_before_samples_are_refused():
    net, _ = tiny("vit")
    net.vit.layers[0].batch_first = False
    with pytest.raises(burnish.RecipeError, match="tokens before samples"):
        burnish.tune(net, "lite_residual")
