"""MV-Adapter: attention across views and to a reference beside the frozen one, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention(q, K, V, heads):
    """Of queries (T, d) to keys and values (S, d), head by head."""
    out = []
    for a, b, c in zip(q.chunk(heads, -1), K.chunk(heads, -1), V.chunk(heads, -1), strict=True):
        out.append((a @ b.t() / a.shape[-1] ** 0.5).softmax(-1) @ c)
    return torch.cat(out, -1)


def beside_it(copies, x, heads, views, reference, rows=None):
    """What a run with copies adds to x (B, T, d), sample by sample. copies: {run: {linear: (W,
    b)}}. rows: the side of a square of tokens, of which those of the same row are seen."""
    group, out = views + reference, []
    for i in range(len(x)):
        first = i // group * group
        mine = range(first + reference, first + group)
        if reference and i == first:
            out.append(torch.zeros_like(x[i]))
            continue

        def of(run, name, j):
            W, b = copies[run][name]
            return F.linear(x[j], W, b)

        def across(run, js, seen, i=i):
            q = of(run, "q_proj", i)
            made = []
            for t in range(len(q)):
                K, V = (torch.cat([of(run, n, j)[seen(t)] for j in js])
                        for n in ("k_proj", "v_proj"))
                made.append(attention(q[t : t + 1], K, V, heads))
            W, b = copies[run]["o_proj"]
            return F.linear(torch.cat(made), W, b)

        def row(t):
            return slice(None) if rows is None else slice(t // rows * rows, (t // rows + 1) * rows)
        y = across("views", mine, row)
        out.append(y + across("reference", [first], lambda t: slice(None)) if reference else y)
    return torch.stack(out)


def copies_of(theta, path, names):
    runs = {}
    for run in ("views", "reference"):
        runs[run] = {n: (theta.get((f"{path}.{n}", f"copies.{run}.weight")),
                         theta.get((f"{path}.{n}", f"copies.{run}.bias"))) for n in names}
    return runs


def put(one, model, views, reference):
    path = {"vit": "vit.layers.{}.attention"}[model]
    for i in range(2):
        at = one.base.get_submodule(path.format(i))
        copies, seen = copies_of(one.theta, path.format(i), LINEARS), []
        at.register_forward_pre_hook(lambda m, args, kw, seen=seen: seen.append(
            (args or tuple(kw.values()))[0]), with_kwargs=True)
        at.o_proj.register_forward_hook(
            lambda m, args, y, seen=seen, copies=copies: y + beside_it(
                copies, seen.pop(), one.base.config.num_attention_heads, views, reference))


@pytest.mark.parametrize("views, reference", [(2, True), (3, False), (1, True), (6, False)])
def test_the_equation_written_out(beside, views, reference):
    """Six pictures: two groups of a reference and two views, two of three views, ..."""
    one = beside("vit", f"mv_adapter(views={views}, reference={reference})", batch=6)
    put(one, "vit", views, reference)
    one.agree()



def dit(size=8):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2,
        sample_size=size, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1)
    for p in net.parameters():                       # its modulations and its last layer start at 0
        nn.init.normal_(p, std=0.3)
    return net.double().eval()


def told(n, size=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {"hidden_states": torch.randn(n, 3, size, size, dtype=torch.float64, generator=g),
            "timestep": torch.randint(1, 1000, (n,), generator=g),
            "class_labels": torch.randint(10, (n,), generator=g)}


def tuned_dit(recipe, size=0.3):
    net = dit()
    tuned = burnish.tune(net, recipe, head=False)
    for _, p in tuned.named_parameters():
        p.data = p.data.double()
    if size:
        stir(tuned, size=size)
    return net, tuned


@pytest.mark.parametrize("attend", ["full", "rows"])
def test_a_diffusion_transformer_by_the_same_equation(attend):
    base = dit()
    net, tuned = tuned_dit(f"mv_adapter(views=2, attend={attend!r})")
    theta = {}
    for n, p in tuned.named_parameters():
        path, _, rest = n.partition(".burnish.default.mv_adapter.")
        theta[path, rest] = p
    names = ("to_q", "to_k", "to_v", "to_out.0")
    for i, block in enumerate(base.transformer_blocks):
        runs = copies_of(theta, f"transformer_blocks.{i}.attn1", names)
        copies = {r: dict(zip(LINEARS, (c[n] for n in names), strict=True))
                  for r, c in runs.items()}
        block.attn1.register_forward_hook(lambda m, args, y, copies=copies: y + beside_it(
            copies, args[0], 2, 2, True, 4 if attend == "rows" else None))
    batch = told(6)
    torch.testing.assert_close(net(**batch).sample, base(**batch).sample, rtol=1e-8, atol=1e-9)


def unet(conditioned):
    from diffusers import UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    said = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
            "block_out_channels": (16, 32), "norm_num_groups": 4}
    if conditioned:
        net = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=24,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, **said)
    else:
        net = UNet2DModel(down_block_types=("AttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
                          up_block_types=("UpBlock2D", "AttnUpBlock2D"), **said)
    return net.double().eval()


def told_unet(n, conditioned, seed=1):
    g = torch.Generator().manual_seed(seed)
    batch = {"sample": torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=g),
             "timestep": torch.randint(1, 1000, (n,), generator=g)}
    text = torch.randn(n, 5, 24, dtype=torch.float64, generator=g)
    return batch | ({"encoder_hidden_states": text} if conditioned else {})


def inside(module, x):
    """What a diffusers attention attends to: (B, T, d), behind its own norm."""
    if x.dim() == 4:
        x = module.group_norm(x.flatten(2)).mT
    return x


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("attend", ["full", "rows"])
def test_a_u_net_by_the_same_equation(conditioned, attend):
    """Every attention over a picture's own tokens, at its own width and side; none over text."""
    base, net = unet(conditioned), unet(conditioned)
    tuned = burnish.tune(net, f"mv_adapter(views=2, attend={attend!r})", head=False)
    for _, p in tuned.named_parameters():
        p.data = p.data.double()
    batch = told_unet(6, conditioned)
    torch.testing.assert_close(net(**batch).sample, base(**batch).sample, rtol=0, atol=0)
    stir(tuned, size=0.3)
    theta = {}
    for n, p in tuned.named_parameters():
        path, _, rest = n.partition(".burnish.default.mv_adapter.")
        theta[path, rest] = p
    own = sorted(n for n, m in base.named_modules()
                 if type(m).__name__ == "Attention" and not n.endswith("attn2"))
    assert sorted({p.rpartition(".to_")[0] for p, _ in theta}) == own and len(own) == 4
    names = ("to_q", "to_k", "to_v", "to_out.0")
    for path in own:
        at = base.get_submodule(path)
        runs = {run: {q: (theta[f"{path}.{n}", f"copies.{run}.weight"],
                          theta.get((f"{path}.{n}", f"copies.{run}.bias")))
                      for q, n in zip(LINEARS, names, strict=True)}
                for run in ("views", "reference")}
        seen = []
        at.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(inside(m, args[0])))

        def added(m, args, y, seen=seen, runs=runs, heads=at.heads):
            x = seen.pop()
            side = round(x.shape[1] ** 0.5) if attend == "rows" else None
            return y + beside_it(runs, x, heads, 2, True, side)

        at.to_out[0].register_forward_hook(added)
    torch.testing.assert_close(net(**batch).sample, base(**batch).sample, rtol=1e-8, atol=1e-9)


def test_maps_are_told_to_the_first_convolutions_of_a_u_net():
    net = unet(False)
    tuned = burnish.tune(net, "mv_adapter(views=2, camera=3, hidden=4)", head=False)
    for _, p in tuned.named_parameters():
        p.data = p.data.double()
    stir(tuned, size=0.3)
    given, batch = [], told_unet(3, False)
    maps = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    block = net.down_blocks[0].resnets[0]
    block.norm1.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    net(**batch, camera=maps)
    theta = {n.partition(".mv_adapter.")[2]: p for n, p in tuned.named_parameters()
             if n.startswith("down_blocks.0.resnets.0.burnish")}
    z = F.silu(F.conv2d(maps, theta["conv1.weight"], theta["conv1.bias"], padding=1))
    z = F.silu(F.conv2d(z, theta["conv2.weight"], theta["conv2.bias"], stride=2, padding=1))
    z = F.conv2d(z, theta["out.weight"][..., None, None], theta["out.bias"])
    want = net.conv_in(batch["sample"])
    torch.testing.assert_close(given[0][0], want[0])                 # the reference is told nothing
    torch.testing.assert_close(given[0][1:], (want + z)[1:])


def test_identity_and_a_reference_that_stays():
    """Step 0 is the base; away from it the reference's answer is still the base's, bit for bit."""
    base, batch = dit(), told(6)
    net, tuned = tuned_dit("mv_adapter(views=2, camera=3, hidden=4)", size=0)
    maps = torch.rand(6, 3, 5, 7, dtype=torch.float64)
    want = base(**batch).sample
    assert torch.equal(net(**batch, camera=maps).sample, want)
    stir(tuned, size=0.3)
    got = net(**batch, camera=maps).sample
    assert torch.equal(got[[0, 3]], want[[0, 3]])
    assert ((got - want)[[1, 2, 4, 5]].abs().amax((1, 2, 3)) > 1e-3).all()
    tuned.detach()
    assert torch.equal(net(**batch).sample, want)


@pytest.mark.parametrize("attend", ["full", "rows"])
def test_permuted_views_permute_the_answers_without_camera(attend):
    net, _ = tuned_dit(f"mv_adapter(views=3, attend={attend!r})")
    batch, order = told(4), torch.tensor([0, 3, 1, 2])
    batch["timestep"], batch["class_labels"] = torch.tensor([0, 5, 5, 5]), torch.full((4,), 2)
    y = net(**batch).sample
    torch.testing.assert_close(net(**{k: v[order] for k, v in batch.items()}).sample, y[order])
    for moved, others in ((1, [2, 3]), (0, [1, 2, 3])):      # each view is told of the others
        other = {k: v.clone() for k, v in batch.items()}
        other["hidden_states"][moved] += 1
        assert ((net(**other).sample - y)[others].abs().amax((1, 2, 3)) > 1e-6).all()


def test_maps_tell_views_apart():
    """The same picture twice, with other maps: other answers; the convolutions written out."""
    net, tuned = tuned_dit("mv_adapter(views=2, reference=False, camera=3, hidden=4)")
    batch, maps = told(1), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    batch = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    y = net(**batch, camera=maps).sample
    assert (y[0] - y[1]).abs().max() > 1e-3
    torch.testing.assert_close(net(**batch, camera=maps.flip(0)).sample, y.flip(0))
    theta = {n.partition(".mv_adapter.")[2]: p for n, p in tuned.named_parameters()
             if n.startswith("transformer_blocks.0.burnish")}
    given = []
    block = net.transformer_blocks[0].norm1
    hook = block.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    net(**batch, camera=maps)
    with torch.no_grad():
        bare = net.pos_embed(batch["hidden_states"])
    hook.remove()
    z = F.silu(F.conv2d(maps, theta["conv1.weight"], theta["conv1.bias"], padding=1))
    z = F.silu(F.conv2d(z, theta["conv2.weight"], theta["conv2.bias"], stride=2, padding=1))
    z = F.adaptive_avg_pool2d(z, 4).flatten(2).mT
    torch.testing.assert_close(given[0], bare + F.linear(z, theta["out.weight"],
                                                         theta["out.bias"]))


def test_copies_start_as_copies():
    """With the frozen last linear, one view alone is answered what attention answers it."""
    base = dit()
    net, tuned = tuned_dit("mv_adapter(views=1, reference=False)", size=0)
    own = dict(tuned.named_parameters())
    for i, block in enumerate(base.transformer_blocks):
        at = f"transformer_blocks.{i}.attn1.to_out.0"
        for leaf in ("weight", "bias"):
            own[f"{at}.burnish.default.mv_adapter.copies.views.{leaf}"].data.copy_(
                getattr(block.attn1.to_out[0], leaf))
        block.attn1.register_forward_hook(lambda m, args, y: 2 * y)
    batch = told(2)
    torch.testing.assert_close(net(**batch).sample, base(**batch).sample)


def test_padding_is_masked_within_its_own_view():
    net, batch = tiny("bert", batch=4, dtype=torch.float64)
    stir(burnish.tune(net.eval(), "mv_adapter(views=2, reference=False)"), size=0.2)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -3:] = 0
    other = batch["input_ids"].clone()
    other[1, -3:] = 1
    a, b = (net(input_ids=ids, attention_mask=mask).logits for ids in (batch["input_ids"], other))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    whole = net(input_ids=batch["input_ids"]).logits
    assert (whole - a)[0].abs().max() > 1e-6         # the other view sees fewer tokens of it
    torch.testing.assert_close(whole[2:], a[2:])


def test_count():
    """Of four linears of 64 with biases, in each of two attentions, twice."""
    m = parse("mv_adapter")[0]
    assert m.count(10) == 20 and parse("mv_adapter(reference=False)")[0].count(10) == 10
    for recipe, n in (("mv_adapter", 2), ("mv_adapter(reference=False)", 1)):
        _, tuned = tuned_dit(recipe, size=0)
        assert sum(p.numel() for p in tuned.parameters()) == 2 * n * 4 * (16 * 16 + 16)
    _, more = tuned_dit("mv_adapter(camera=6, hidden=4)", size=0)
    C, h, d = 6, 4, 16
    assert sum(p.numel() for p in more.parameters()) - 4 * 4 * 272 \
        == C * h * 9 + h * h * 9 + 2 * h + h * d + d


def test_base_weights_are_frozen_and_copies_move():
    net, tuned = tuned_dit("mv_adapter(views=2)", size=0)
    before = copy.deepcopy(net.state_dict())
    batch, noise = told(3), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        tuned.step(batch, loss=lambda out, b: (out.sample[:, :3] - noise)[1:].square().mean())
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(".burnish." in k for k in moved)
    assert any("to_q" in k and "reference" in k for k in moved)


def test_what_it_refuses():
    for recipe in ("mv_adapter(views=0)", "mv_adapter(hidden=0)", "mv_adapter(camera=-1)"):
        with pytest.raises(burnish.RecipeError, match="1 or more"):
            burnish.tune(dit(), recipe)
    with pytest.raises(burnish.RecipeError, match="writes nothing on"):
        burnish.tune(tiny("llama")[0], "mv_adapter")
    net, _ = tuned_dit("mv_adapter(views=2)")
    with pytest.raises(burnish.RecipeError, match="4 samples .* groups of 3"):
        net(**told(4))
    net, _ = tuned_dit("mv_adapter(views=1, camera=3)")
    with pytest.raises(burnish.RecipeError, match="'camera'"):
        net(**told(2))
    with pytest.raises(burnish.RecipeError, match="3 channels"):
        net(**told(2), camera=torch.rand(2, 6, 8, 8))
    net, batch = tiny("vit", batch=2)
    burnish.tune(net, "mv_adapter(views=1, attend='rows')")
    with pytest.raises(burnish.RecipeError, match="square"):
        net(**batch)


def test_fit_draws_samples_so_it_refuses(tmp_path):
    with pytest.raises(burnish.RecipeError, match="mv_adapter takes 7 consecutive samples"):
        burnish.fit(tiny("vit")[0], "digits", "mv_adapter", output=tmp_path / "run")


def test_the_defaults():
    m = parse("mv_adapter")[0]
    assert (m.views, m.reference, m.attend, m.camera, m.hidden) == (6, True, "full", 0, 64)
