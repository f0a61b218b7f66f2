"""LST: no graph on the taps, gradients of a detached reference, bytes, pruning, generation."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.state.taps import Crown, Rung
from burnish.core.recipe import parse
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny


def parts(tuned, kind):
    return [m for _, _, slot in slots(tuned.model) for m in slot.modules() if isinstance(m, kind)]


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def make(model, recipe="lst(reduction=4)", dtype=torch.float64, **kw):
    net, batch = tiny(model, dtype=dtype, **kw)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, recipe, head=False)
    stir(tuned, size=0.2)
    return tuned, base, batch


# -- what it computes -----------------------------------------------------------------------------
def climb(rungs, crown, taps, first, final, run):
    """s <- g(w s + (1 - w) D h), then y = w U Norm(s) + (1 - w) h_L, written out."""
    s = first(taps[0])
    for i, r in enumerate(rungs):
        if r.side is not None:
            w = torch.sigmoid(r.gate.alpha / 0.1)
            s = run(i, r.side, w * s + (1 - w) * r.down(taps[i + 1]))
    w = torch.sigmoid(crown.gate.alpha / 0.1)
    return w * crown.up(crown.norm(s)) + (1 - w) * final


@pytest.mark.parametrize("recipe", ["lst(reduction=4)", "lst(reduction=4, layers=[1])"])
@pytest.mark.parametrize("model", ["vit", "llama", "timm_qkv"])
def test_it_is_the_ladder_over_a_detached_backbone(model, recipe):
    tuned, base, batch = make(model, recipe)
    rungs, (crown,) = [copy.deepcopy(r) for r in parts(tuned, Rung)], parts(tuned, Crown)
    crown = copy.deepcopy(crown)
    blocks = {"vit": "vit.layers", "llama": "model.layers", "timm_qkv": "blocks"}[model]
    norm = {"vit": "vit.layernorm", "llama": "model.norm", "timm_qkv": "norm"}[model]
    blocks, norm = base.get_submodule(blocks), base.get_submodule(norm)
    taps, given = [], []

    def see(module, args, kw):
        taps.append(args[0].detach())
        given.append(kw)

    for b in blocks:
        b.register_forward_pre_hook(see, with_kwargs=True)
    blocks[-1].register_forward_hook(lambda m, a, out: taps.append(out.detach()))

    def run(i, side, u):
        kw = dict(given[i])
        if "position_embeddings" in kw:
            kw["position_embeddings"] = tuple(
                torch.cat([t[..., :4][..., ::4]] * 2, -1) for t in kw["position_embeddings"])
            kw |= {"past_key_values": None, "use_cache": False}
        return side(u, **kw)

    norm.register_forward_hook(
        lambda m, a, out: climb(rungs, crown, taps, rungs[0].first, out.detach(), run))
    loss, want = tuned.loss(batch), base(**batch).loss
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    loss.backward()
    pairs = [*zip(parts(tuned, Rung), rungs, strict=True), (parts(tuned, Crown)[0], crown)]
    for _, stock in pairs:
        stock.requires_grad_(True)
    ref = [p for _, m in pairs for p in m.parameters()]
    got = [p.grad for m, _ in pairs for p in m.parameters()]
    assert len(got) == len(list(tuned.parameters())) and all(g is not None for g in got)
    for a, b in zip(got, torch.autograd.grad(_again(base, batch, taps, given), ref), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def _again(base, batch, taps, given):
    taps.clear()
    given.clear()
    return base(**batch).loss


def test_no_block_of_the_backbone_has_a_graph():
    tuned, _, batch = make("vit")
    seen = []
    for layer in tuned.model.vit.layers:
        layer.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    tuned.loss(batch).backward()
    assert seen == [False, False]
    assert all(p.grad is None for n, p in tuned.model.named_parameters() if ".burnish." not in n)


def test_the_last_normed_state_is_half_the_backbones_at_the_start():
    net, batch = tiny("llama")
    seen = []
    hook = net.model.norm.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(net.eval(), **batch)
    hook.remove()
    tuned = burnish.tune(net, "lst(reduction=4)")
    (crown,) = parts(tuned, Crown)
    made = []
    crown.up.register_forward_hook(lambda m, a, out: made.append(out))
    net.model.norm.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(net.eval(), **batch)
    torch.testing.assert_close(seen[1], (seen[0] + made[0]) / 2)


def test_a_frozen_backbone_drops_nothing():
    net, batch = tiny("bert", dropout=0.5)
    tuned = burnish.tune(net, "lst(reduction=4)")
    taps = []
    net.bert.encoder.layer[0].register_forward_hook(lambda m, a, out: taps.append(out))
    net.train()
    for _ in range(2):
        tuned.loss(batch)
    assert torch.equal(taps[0], taps[1])
    assert net.bert.encoder.layer[0].attention.self.dropout.training, "its own mode is put back"
    side = parts(tuned, Rung)[0].side
    assert side.training and net.dropout.training


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_generation_with_a_cache_is_the_full_forward(model):
    net, batch = tiny(model)
    tuned = burnish.tune(net, "lst(reduction=4)")
    stir(tuned, size=0.2)
    net.eval()
    ids = batch["input_ids"][:, :4]
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                       eos_token_id=None)
    with torch.no_grad():
        steps = net(input_ids=out, use_cache=False).logits
        first = net(input_ids=out[:, :4], use_cache=True)
        cache, got = first.past_key_values, [first.logits]
        for i in range(4, 10):
            got.append(net(input_ids=out[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), steps, rtol=1e-4, atol=1e-5)
    assert torch.equal(steps[:, 3:-1].argmax(-1), out[:, 4:])
    assert len(cache.layers) == 4, "two of the backbone, two of the ladder"


def test_padding_reaches_the_side_blocks():
    tuned, _, batch = make("llama", dtype=torch.float32)
    tuned.model.eval()
    ids = batch["input_ids"][:1, :5]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    at = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    got = logits(tuned.model, input_ids=padded, position_ids=at,
                 attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]))
    torch.testing.assert_close(got[:, 2:], logits(tuned.model, input_ids=ids), rtol=1e-4, atol=1e-5)


# -- the start --------------------------------------------------------------------------------
def test_side_blocks_are_cut_out_of_their_own():
    """Importance |W|: explicit indexing of BERT's and ViT's matrices gives the same slices."""
    net, _ = tiny("vit")
    block = copy.deepcopy(net.vit.layers[0])
    patch = net.vit.embeddings.patch_embeddings.projection.weight.detach().clone()
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    rungs = parts(tuned, Rung)

    def top(score, n):
        return score.topk(n).indices.sort().values

    def weight(name):
        return block.get_submodule(name).weight.detach()

    keep = top(patch.flatten(1).abs().sum(1), 8)
    att = "attention."
    q, k, v = (weight(f"{att}{n}_proj").abs() for n in "qkv")
    joint = (q * k * v).sum(1).view(4, 8)
    heads = torch.cat([top(joint[h], 2) + 8 * h for h in range(4)])
    out = top(weight(f"{att}o_proj").abs().sum(1), 8)
    inner = top(weight("mlp.fc1").abs().sum(1), 16)
    last = top(weight("mlp.fc2").abs().sum(1), 8)
    want = {f"{att}q_proj": (heads, keep), f"{att}k_proj": (heads, keep),
            f"{att}v_proj": (heads, keep), f"{att}o_proj": (out, heads), "mlp.fc1": (inner, out),
            "mlp.fc2": (last, inner)}
    side = rungs[0].side
    for name, (rows, columns) in want.items():
        large, small = block.get_submodule(name), side.get_submodule(name)
        assert torch.equal(small.weight, large.weight[rows][:, columns]), name
        assert torch.equal(small.bias, large.bias[rows]), name
    assert torch.equal(side.layernorm_before.weight, block.layernorm_before.weight[keep])
    assert torch.equal(side.layernorm_after.bias, block.layernorm_after.bias[out])


def test_rotary_heads_keep_every_rth_frequency():
    net, _ = tiny("llama")
    q = net.model.layers[0].self_attn.q_proj.weight.detach().clone()
    embed = net.model.embed_tokens.weight.detach().clone()
    side = parts(burnish.tune(net, "lst(reduction=4)"), Rung)[0].side
    keep = embed.t().abs().sum(1).topk(8).indices.sort().values
    rows = torch.tensor([8 * h + i for h in range(4) for i in (0, 4)])
    assert torch.equal(side.self_attn.q_proj.weight, q[rows][:, keep])


def test_a_random_start_is_another():
    ends = []
    for init in ("prune", "random"):
        net, _ = tiny("vit")
        side = parts(burnish.tune(net, f"lst(reduction=4, init='{init}')"), Rung)[0].side
        ends.append(side.mlp.fc1.weight.detach())
    assert not torch.equal(*ends) and ends[1].isfinite().all()


# -- counts and bytes ---------------------------------------------------------------------------
def test_the_count():
    for layers, n in ((None, 2), ([0], 1)):
        net, _ = tiny("vit")
        tuned = burnish.tune(net, f"lst(reduction=4, layers={layers})", head=False)
        side = sum(p.numel() for p in parts(tuned, Rung)[0].side.parameters())
        want = parse("lst(reduction=4)")[0].count(n, 32, side)
        assert sum(p.numel() for p in tuned.parameters()) == want


@pytest.mark.parametrize("lean, units", [
    (False, 6 + 2 + 8 + 1),       # a fully trained block, g = 1 and mu = 4; the gate's difference
    (True, 6 + 2 + 8 + 1 - 6),    # less two norms' and an activation's outputs
])
def test_bytes_per_rung(lean, units, kept):
    """1 unit for the tap and (6 + 2 g + 2 mu) / R and the gate's 1 / R, within 2 %."""
    R, width, tokens = 4, 64, 8 * 17
    sizes = []
    for layers in (2, 4):
        net, batch = tiny("vit", batch=8, num_hidden_layers=layers, hidden_size=width,
                          intermediate_size=4 * width)
        tuned = burnish.tune(net, f"lst(reduction={R}) + lean(on={lean})", head=False)
        sizes.append(kept(tuned, batch))
    per = (sizes[1] - sizes[0]) / 2 / (tokens * width * 4)
    few = (2 * 2 + 4) / width             # mean and deviation of two norms, a number per head
    assert per == pytest.approx(1 + units / R + few, rel=0.02)


def test_qst_reads_each_stored_weight_once():
    """The preset: 4-bit weights are taken apart in the forward and never in backward."""
    net, batch = tiny("llama", hidden_size=64, intermediate_size=64, num_attention_heads=2,
                      num_key_value_heads=2)
    assert [m.name for m in parse("qst")] == ["nf4", "lst"]
    tuned = burnish.tune(net, "nf4 + lst(reduction=16)")
    count = []
    for _, _, slot in slots(net):
        for child in slot.providers.values():
            home = slot._modules[child]
            home.weight = lambda home=home, own=home.weight: count.append(1) or own()
    loss = tuned.loss(batch)
    forward = len(count)
    assert forward == 2 * 7
    loss.backward()
    assert len(count) == forward
    assert all(p.grad is not None for p in tuned.parameters())


# -- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("model, recipe, why", [
    ("clip", "lst(reduction=4)", "several stacks"),
    ("swin", "lst(reduction=4)", "different widths"), ("mamba", "lst(reduction=4)", "no attention"),
    ("cnn", "lst", "no repeated blocks"), ("vit", "lst(reduction=5)", "not divisible"),
    ("vit", "lst(reduction=16)", "does not split into 4 heads; 2, 4, 8 would"),
    ("llama", "lst(reduction=8)", "rotary positions need an even width"),
    ("vit", "lst(reduction=4, layers=[2])", "no block 2"),
    ("vit", "lst(reduction=4, targets='q')", "takes no targets"),
    ("vit", "lst(reduction=4) + lora", "could not train"),
    ("vit", "lst(reduction=4) + bitfit", "could not train"),
    ("vit", "lst(reduction=4) + vpt(length=2)", "could not train"),
    ("llama", "lst(reduction=4) + prompt_tuning(length=2)", "could not train"),
    ("llama", "prefix(length=2) + lst(reduction=4)", "could not train"),
    ("vit", "lst(reduction=4) + checkpoint", "the mode of the blocks"),
])
def test_what_has_no_ladder_says_why(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_the_last_norm_and_the_head_may_train():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "lst(reduction=4) + linear_probe")
    tuned.loss(batch).backward()
    assert {n for n, p in tuned.model.named_parameters() if ".burnish." not in n
            and p.grad is not None} == {"classifier.weight", "classifier.bias"}


def test_something_that_trains_below_is_found_out():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lst(reduction=4)")
    net.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(burnish.RecipeError, match="gradient would be cut"):
        tuned.loss(batch)


def test_a_plain_block_is_mentioned():
    tuned = burnish.tune(tiny("timm_qkv")[0], "lst(reduction=4)")
    assert any("plain pre-norm blocks" in n for n in tuned.summary()["notes"])


# -- numbers ------------------------------------------------------------------------------------
def test_defaults_are_the_published_ones():
    (method,) = parse("lst")
    assert (method.reduction, method.samples, method.init) == (8, 1024, "prune")
    assert (method.cache, method.cache_gb) == (None, 32.0)
    # a few blocks stand for many in a simulation where each has a rung
    assert method.repeats() == 1 and parse("lst(layers=[0, 2])")[0].repeats() is None


@pytest.mark.parametrize("width, reduction, said", [
    (32, 5, r"the width = 32 is not divisible by it; 2, 4, 8, 16, 32 are possible"),
    (24, 5, r"the width = 24 is not divisible by it; 2, 4, 8 are possible"),
    (32, 0, "2, 4, 8, 16, 32 are possible"), (32, -2, "expected 0 or more"),
    (128, 64, r"a width of 2 does not split into 4 heads; 2, 4, 8, 16, 32 would"),
    (48, 24, r"a width of 2 does not split into 4 heads; 2, 4 would"),
])
def test_a_width_that_does_not_divide_names_those_that_would(width, reduction, said):
    net, _ = tiny("vit", hidden_size=width)
    with pytest.raises(burnish.RecipeError, match=f"lst.reduction={reduction}.: .*{said}"):
        burnish.tune(net, f"lst(reduction={reduction})")


def test_a_side_network_may_be_as_wide_as_the_backbone():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "lst(reduction=1)", head=False)
    mine, own = parts(tuned, Rung)[0].side, net.vit.layers[0]
    assert torch.equal(mine.mlp.fc1.weight, own.mlp.fc1.weight)
    tuned.loss(batch).backward()


def test_only_the_fisher_start_asks_for_data():
    net, _ = tiny("vit")
    place = burnish.tune(net, "lst(reduction=4)").anatomy.places[3]
    assert parse("lst")[0].observe(place) is None
    seen = parse("lst(init='fisher')")[0].observe(place)
    assert (seen.out, seen.inp, seen.alone) == (place.out, place.inp, True)
