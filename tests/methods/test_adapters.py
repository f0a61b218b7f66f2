"""Houlsby, Pfeiffer and parallel adapters: counts, starts, placement, gradients, bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.core.recipe import parse
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny

NAMES = ["houlsby", "pfeiffer", "parallel"]


def trained(anatomy, recipe):
    """Numbers that the branches of a recipe train on a model without values."""
    with torch.device("meta"):
        return sum(p.numel() for m in parse(recipe) for b in m.branch(anatomy)
                   for p in b.module.parameters())


def adapters(tuned):
    """(path, module) of every bottleneck, in model order."""
    return [(path, slot.module_of(p)) for path, _, slot in slots(tuned.model) for p in slot.parts]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# -- counts -----------------------------------------------------------------------------------
def test_counts_on_published_shapes(published):
    bert, _ = published("BertConfig", "BertForSequenceClassification")
    vit, _ = published("ViTConfig", "ViTForImageClassification")
    roberta, _ = published("RobertaConfig", "RobertaForSequenceClassification")
    assert trained(bert, "houlsby(bottleneck=64)") == 24 * 99_136 == 2_379_264
    assert trained(bert, "pfeiffer(reduction=16)") == 12 * 74_544 == 894_528
    assert trained(roberta, "parallel(bottleneck=512)") == 9_452_544
    assert trained(vit, "parallel(bottleneck=64, tap='residual')") == 1_189_632
    assert trained(vit, "adaptformer") == 1_189_632
    norms = sum(bert.model.get_parameter(s.name).numel()
                for s in parse("houlsby")[0].select(bert))
    assert norms == 25 * 2 * 768, "two per block and the embeddings'"


def test_counts_are_what_the_helpers_say():
    houlsby, pfeiffer, parallel = (parse(n)[0] for n in NAMES)
    assert houlsby.count(768) == 99_136 and pfeiffer.count(768) == 74_544
    assert 12 * parallel.count(768) == 9_452_544


# -- starts -----------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["vit", "bert", "gpt2", "llama", "t5", "mixtral", "swin"])
@pytest.mark.parametrize("recipe", ["houlsby(bottleneck=4, init='zero')",
                                    "pfeiffer(reduction=4, init='zero')", "parallel(bottleneck=4)",
                                    "adaptformer"])
def test_a_zero_start_is_the_base_bit_for_bit(model, recipe):
    net, batch = tiny(model)
    before = logits(net.eval(), batch)
    burnish.tune(net, recipe)
    assert torch.equal(logits(net.eval(), batch), before)


def test_the_authors_starts_are_near_but_not_on_it():
    for recipe in ("houlsby(bottleneck=4)", "houlsby(bottleneck=4, init='truncated')", "pfeiffer"):
        net, batch = tiny("vit")
        before = logits(net.eval(), batch)
        burnish.tune(net, recipe)
        moved = (logits(net.eval(), batch) - before).abs().max()
        assert 0 < moved < 0.05


# -- placement --------------------------------------------------------------------------------
def test_houlsby_stands_behind_both_sub_layers_and_trains_norms():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "houlsby(bottleneck=4)", head=False)
    stems = {p.split(".burnish.")[0].split("layer.0.")[-1] for p, _ in tuned.named_parameters()
             if "layer.0." in p and ".burnish." in p}
    assert stems == {"attention.output.dense", "output.dense"}
    base = [n for n, _ in tuned.named_parameters() if ".burnish." not in n]
    assert len(base) == 2 * 5 and all("LayerNorm" in n for n in base)
    assert not any("LayerNorm" in n for n, _ in burnish.tune(
        tiny("bert")[0], "houlsby(bottleneck=4, norms=False)").named_parameters())


def test_targets_narrow_the_sites():
    net, _ = tiny("bert")
    tuned = burnish.tune(net, "houlsby(bottleneck=4, targets='fc2@-1')")
    assert [p for p, _ in adapters(tuned)] == ["bert.encoder.layer.1.output.dense"]
    with pytest.raises(burnish.TargetError, match="nothing it acts on"):
        burnish.tune(tiny("bert")[0], "houlsby(bottleneck=4, targets='q')")


def test_the_library_form_of_pfeiffer():
    """out = LN(u + f(LN(u))), u = F(x) + x, with the frozen norm in both places."""
    net, batch = tiny("bert")
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "pfeiffer(reduction=4, placement='library')")
    stir(tuned, size=0.1)
    net.eval()
    made = [m.inner for _, m in adapters(tuned)]
    for layer, f in zip(base.bert.encoder.layer, made, strict=True):
        norm = layer.output.LayerNorm
        frozen = copy.deepcopy(norm)
        norm.forward = lambda u, frozen=frozen, f=f: frozen(u + f.dense(frozen(u)))
    head = dict(net.classifier.named_parameters())
    base.classifier.load_state_dict(head)
    torch.testing.assert_close(logits(net, batch), logits(base, batch), rtol=1e-5, atol=1e-6)


def test_the_library_form_starts_on_the_base_with_zeros():
    net, batch = tiny("bert")
    before = logits(net.eval(), batch)
    burnish.tune(net, "pfeiffer(reduction=4, placement='library', init='zero')")
    assert torch.equal(logits(net.eval(), batch), before)
    with pytest.raises(burnish.RecipeError, match="normalises first"):
        burnish.tune(tiny("vit")[0], "pfeiffer(placement='library')")


@pytest.mark.parametrize("model, norm, tap", [
    ("vit", "vit.layers.0.layernorm_after", "vit.layers.0.mlp"),
    ("llama", "model.layers.0.post_attention_layernorm", "model.layers.0.mlp"),
    ("t5", "encoder.block.0.layer.1.layer_norm", "encoder.block.0.layer.1.DenseReluDense"),
    ("gpt2", "transformer.h.0.ln_2", "transformer.h.0.mlp"),
])
def test_what_a_parallel_adapter_reads(model, norm, tap):
    """tap="norm": what the MLP reads; tap="residual": what its norm reads."""
    for setting, path in (("norm", tap), ("residual", norm)):
        net, batch = tiny(model)
        tuned = burnish.tune(net, f"parallel(bottleneck=4, tap='{setting}')")
        seen = {}
        first = adapters(tuned)[0][1]
        net.get_submodule(path).register_forward_pre_hook(
            lambda m, args, seen=seen: seen.setdefault("want", args[0]))
        first.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.setdefault("got", args[0]))
        logits(net.eval(), batch)
        assert torch.equal(seen["got"], seen["want"])


def test_one_norm_for_both_parts_has_no_residual_between():
    with pytest.raises(burnish.RecipeError, match="tap='norm'"):
        burnish.tune(tiny("convnext")[0], "parallel(bottleneck=4, tap='residual')")


# -- values and gradients -----------------------------------------------------------------------
def behind(module, f):
    """A stock hook that does what a sequential adapter says."""
    module.register_forward_hook(lambda m, args, out: out + f.dense(out))


def beside(module, f):
    module.register_forward_hook(lambda m, args, out: out + f.dense(args[0]))


@pytest.mark.parametrize("recipe, hook, sites", [
    ("houlsby(bottleneck=4, norms=False)", behind, ["attention.o_proj", "mlp"]),
    ("pfeiffer(reduction=4)", behind, ["mlp"]),
    ("parallel(bottleneck=4, scale=2.0)", beside, ["mlp"]),
])
@pytest.mark.parametrize("extra", ["", " + checkpoint"])
def test_against_dense_autograd(recipe, hook, sites, extra):
    net, batch = tiny("vit", dtype=torch.float64)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, recipe + extra, head=False)
    for _, m in adapters(tuned):
        m.double()
    stir(tuned, size=0.1)
    stock = [copy.deepcopy(m) for _, m in adapters(tuned)]
    modules = [base.vit.layers[i].get_submodule(s) for i in range(2) for s in sites]
    for module, f in zip(modules, stock, strict=True):
        hook(module, f)
    loss, want = tuned.loss(batch), base(**batch).loss
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    loss.backward()
    for (_, a), b in zip(adapters(tuned), stock, strict=True):
        ours = [p.grad for p in a.parameters()]
        for x, y in zip(ours, torch.autograd.grad(want, list(b.parameters()), retain_graph=True),
                        strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11)


def test_the_branch_scales_linearly_and_folds():
    net, batch = tiny("vit", dtype=torch.float64)
    tuned = burnish.tune(net, "parallel(bottleneck=4, scale=1.0)")
    stir(tuned, size=0.5)
    made = [m for _, m in adapters(tuned)]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    one = made[0](x)
    made[0].scale = 4.0
    torch.testing.assert_close(made[0](x), 4 * one)
    for m in made:
        m.scale = 4.0
    before = logits(net, batch)
    for m in made:
        m.absorb_scale()
    torch.testing.assert_close(logits(net, batch), before, rtol=1e-6, atol=1e-8)


# -- bytes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe, units", [
    ("houlsby(bottleneck=4, norms=False, init='zero')", 2 * (1 + 4 / 32)),
    ("pfeiffer(reduction=8, init='zero')", 1 + 4 / 32),
    ("parallel(bottleneck=4)", 4 / 32),             # its input is made again from the norm's
])
def test_what_waits_for_backward(recipe, units, kept):
    """Per token and block, in units of the width, beyond a frozen block on the gradient's path."""
    more = []
    for name in ("bitfit(targets=None)", recipe):
        per = []
        for layers in (2, 4):
            net, batch = tiny("vit", batch=4, num_hidden_layers=layers)
            per.append(kept(burnish.tune(net, name, head=False), batch))
        more.append((per[1] - per[0]) / 2)
    tokens = 4 * 17
    assert (more[1] - more[0]) / (tokens * 32 * 4) == pytest.approx(units, rel=0.01)


def test_checkpoint_holds_no_tap(kept):
    """A tap between two modules of a block is let go as soon as it is read."""
    plain, tapped = [], []
    for recipe, out in (("parallel(bottleneck=4) + checkpoint", plain),
                        ("parallel(bottleneck=4, tap='residual') + checkpoint", tapped)):
        net, batch = tiny("vit", batch=4)
        tuned = burnish.tune(net, recipe)
        out.append(kept(tuned, batch))
        tuned.loss(batch).backward()
    assert plain == tapped


# -- together -----------------------------------------------------------------------------------
def test_mam_is_a_prefix_and_a_parallel_adapter():
    recipe = parse("mam")
    assert [m.name for m in recipe] == ["prefix", "parallel"]
    assert recipe[0].length == 30 and (recipe[1].bottleneck, recipe[1].scale) == (512, 4.0)
    net, batch = tiny("gpt2")
    tuned = burnish.tune(net, "mam")
    tuned.optimizer(lr=1e-3)
    losses = [float(tuned.step(batch)) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_adaptformer_is_a_parallel_adapter_of_the_stream(beside):
    """x' = x + Attn(LN1 x), out = x' + MLP(LN2 x') + s W_up ReLU(W_down x' + b) + s b_up; s = 0.1
    multiplies all of it, so that ten times s is ten times the branch."""
    (m,) = parse("adaptformer")
    assert (m.name, m.bottleneck, m.scale, m.train_scale, m.act, m.dropout, m.tap) == \
        ("parallel", 64, 0.1, False, "relu", 0.1, "residual")
    one = beside("vit", "adaptformer")
    for i in range(2):
        layer = one.base.vit.layers[i]
        A, a, B, b = (one.theta[f"vit.layers.{i}.mlp", leaf] for leaf in
                      ("down.weight", "down.bias", "up.weight", "up.bias"))

        def out(module, args, got, A=A, a=a, B=B, b=b):
            stream = module.stream
            return got + 0.1 * (torch.relu(stream @ A.t() + a) @ B.t() + b)

        layer.layernorm_after.register_forward_pre_hook(
            lambda m, args, mlp=layer.mlp: setattr(mlp, "stream", args[0]))
        layer.mlp.register_forward_hook(out)
    one.agree()
    first = adapters(one.tuned)[0][1]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    small = first(x)
    first.scale = 1.0
    torch.testing.assert_close(first(x), 10 * small)


def test_a_mixture_of_experts_is_one_mlp():
    net, batch = tiny("mixtral")
    tuned = burnish.tune(net, "pfeiffer(reduction=4)")
    assert [p for p, _ in adapters(tuned)] == [f"model.layers.{i}.mlp" for i in range(2)]
    tuned.loss(batch).backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_generation_with_a_cache_is_the_full_forward():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "houlsby(bottleneck=4) + parallel(bottleneck=4)")
    stir(tuned, size=0.1)
    net.eval()
    ids = batch["input_ids"][:, :4]
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
                       eos_token_id=None)
    for _ in range(5):
        ids = torch.cat([ids, logits(net, {"input_ids": ids})[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_models_without_sub_layers_say_so():
    for name, recipe in (("cnn", "houlsby"), ("mlp", "pfeiffer"), ("mamba", "parallel")):
        with pytest.raises(burnish.RecipeError, match="this model has no"):
            burnish.tune(tiny(name)[0], recipe)


def test_they_cannot_merge():
    tuned = burnish.tune(tiny("vit")[0], "parallel(bottleneck=4)")
    with pytest.raises(burnish.CheckError, match="parallel has no form as a plain weight"):
        tuned.merge()
    assert isinstance(tuned.model, nn.Module)
