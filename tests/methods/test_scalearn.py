"""ScaLearn and AdapterFusion: adapters of other tasks, combined by scales or by attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.bottleneck import Bottleneck
from burnish.blocks.state.sources import Fused, Scaled, Sources
from burnish.testing import stir, tiny

FORMS = {"": (2, 32), "scales='number'": (2,), "share=True": (2, 32),
         "scales='number', share=True": (2,)}


def make(recipe, model="vit", **kw):
    net, batch = tiny(model, dtype=torch.float64)
    batch.pop("labels", None)
    tuned = burnish.tune(net, recipe, head=False, **kw)
    net.double().eval()
    kind = Scaled if recipe.startswith("scalearn") else Fused
    with torch.no_grad():
        for _, m in tuned.branches(kind):
            stir(m, size=0.4)
            for p in (m.down, m.down_bias, m.up, m.up_bias):
                p.add_(torch.randn_like(p) * 0.3)
    return tuned, batch, dict(tuned.branches(kind))


def each(m, h):
    """o_s of every source, one by one."""
    act = {"relu": F.relu, "gelu": F.gelu}[m.act]
    return [act(h @ m.down[s].T + m.down_bias[s]) @ m.up[s].T + m.up_bias[s]
            for s in range(len(m.down))]


def check(tuned, batch, mine, equation, model):
    """Outputs and gradients through the untouched model, `equation` behind every MLP."""
    base = tiny(model, dtype=torch.float64)[0].eval()
    for path, m in mine.items():
        base.get_submodule(path).register_forward_hook(
            lambda module, args, out, m=m: out + equation(m, out))
    want, got = base(**batch).logits, tuned.model(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
        assert b.any(), n


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_scalearn_written_out(form, model):
    """F + sum_s w_s o_s; the sources do not train."""
    tuned, batch, mine = make(f"scalearn(reduction=8, dropout=0.0{', ' * bool(form)}{form})", model)
    own = next(iter(mine.values())).scales

    def equation(m, h):
        w = own if "share" in form else m.scales
        return sum(w[s] * o for s, o in enumerate(each(m, h)))

    assert all(m.scales.shape == FORMS[form] for m in mine.values())
    check(tuned, batch, mine, equation, model)
    assert len(list(tuned.parameters())) == (1 if "share" in form else len(mine))


@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_adapter_fusion_written_out(model):
    """F + V sum_s softmax_s((Q F + q) . K o_s) o_s, with every o_s made."""
    tuned, batch, mine = make("adapter_fusion(sources=3, reduction=8, act='gelu')", model)

    def equation(m, h):
        outs = each(m, h)
        q = h @ m.query.weight.T + m.query.bias
        scores = torch.stack([(q * (o @ m.key.weight.T)).sum(-1) for o in outs], -1)
        a = scores.softmax(-1)
        return sum(a[..., s:s + 1] * (o @ m.value.weight.T) for s, o in enumerate(outs))

    check(tuned, batch, mine, equation, model)


def test_a_key_bias_would_do_nothing():
    """Which is why there is none: it adds q . b to the score of every source."""
    m = stir(Fused(3, 8, 4, "relu").double(), size=0.5)
    h, b = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    q = h @ m.query.weight.T + m.query.bias
    keys = [o @ m.key.weight.T for o in each(m, h)]
    without, with_it = (torch.stack([(q * (k + x)).sum(-1) for k in keys], -1).softmax(-1)
                        for x in (0 * b, b))
    torch.testing.assert_close(without, with_it)


@pytest.mark.parametrize("vector", [True, False])
def test_one_hot_scales_are_a_source(vector):
    m = Scaled(3, 8, 4, "relu", vector=vector, dropout=0.0)
    with torch.no_grad():
        m.scales.zero_()[1] = 1.0
    h = torch.randn(2, 5, 8)
    torch.testing.assert_close(m(h), m.of(1, h))
    torch.testing.assert_close(m.of(1, h), each(m, h)[1])


@pytest.mark.parametrize("form", FORMS)
def test_settled_scales_are_one_bottleneck(form, tmp_path):
    """Of the widths of the sources together, exactly; it saves, loads and trains on."""
    tuned, batch, mine = make(f"scalearn(reduction=8{', ' * bool(form)}{form})")
    with torch.no_grad():
        want = tuned.model(**batch).logits
        tuned.recipe.named("scalearn").lifecycle(tuned, "one")
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-6, atol=1e-6)
    made = [b for _, b in tuned.branches(Bottleneck)]
    assert len(made) == 2 and all(b.down.weight.shape == (2 * 4, 32) for b in made)
    assert all(p.requires_grad for b in made for p in b.parameters())
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny("vit", dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-5, atol=1e-5)


def test_what_is_settled_drops_nothing():
    """While it trains, and with the activation that the sources have."""
    m = stir(Scaled(2, 6, 3, "gelu", vector=True, dropout=0.5), size=0.5)
    b, h = m.plain(), torch.randn(4, 6)
    assert m.dropout == 0.5
    torch.testing.assert_close(b(h), m.eval()(h))


def test_a_single_row_of_tokens_and_functions_of_functions():
    for m in (stir(Scaled(2, 6, 3, "relu", vector=True, dropout=0.0), size=0.5),
              stir(Fused(2, 6, 3, "relu"), size=0.5)):
        h = torch.randn(4, 6)
        torch.testing.assert_close(m(h), m(h[None])[0])
        want, x = torch.func.grad(lambda t, m=m: m(t).square().sum())(h), h.requires_grad_(True)
        torch.testing.assert_close(torch.autograd.grad(m(x).square().sum(), x)[0], want)


def test_no_copy_of_frozen_weights_waits_for_backward():
    m, seen = Scaled(2, 16, 8, "relu", vector=True, dropout=0.0), []
    h = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t):
        m(h)
    assert not [t for t in seen if t.numel() == m.down.numel() and t.dtype == torch.bfloat16]


def test_scales_are_dropped_in_training_alone():
    m = Scaled(4, 300, 4, "relu", vector=True, dropout=0.5)
    with torch.no_grad():
        m.scales.fill_(1.0)
        m.up_bias.fill_(1.0)
    h = torch.zeros(1, 300)
    torch.manual_seed(0)
    y = m(h).detach()[0]                          # of each channel 2 x how many of 4 are left
    assert set(y.tolist()) <= {0.0, 2.0, 4.0, 6.0, 8.0} and abs(float(y.mean()) - 4) < 0.4
    m.eval()
    torch.testing.assert_close(m(h), torch.full((1, 300), 4.0))
    m.train()
    m.scales.requires_grad_(True)
    torch.manual_seed(1)
    y = m(h)
    (g,) = torch.autograd.grad(y.sum(), m.scales)
    torch.testing.assert_close(g.sum(0), y.detach()[0])         # backward drops the same ones


def test_what_waits_for_backward_is_the_bottlenecks_numbers(kept):
    """Of two sources 2 M a token, whatever the width."""
    per = {}
    for reduction in (8, 4):
        net, batch = tiny("vit", batch=8)
        tuned = burnish.tune(net, f"scalearn(reduction={reduction}, act='gelu', dropout=0.0)",
                             head=False)
        per[reduction] = kept(tuned, batch)
    tokens = 8 * 17
    assert (per[4] - per[8]) / (2 * tokens * 4) == 2 * 4         # two layers, four units more


def source(tuned, name, **kw):
    tuned.add(name, "pfeiffer(reduction=8)", head=False, **kw)
    with torch.no_grad():
        for _, b in tuned.branches(Bottleneck, name):
            stir(b, size=0.3)


@pytest.mark.parametrize("method", ["scalearn", "adapter_fusion"])
def test_adapters_that_are_there_are_combined(method, tmp_path):
    """The combination has what the sources learnt, without them."""
    net, batch = tiny("vit", dtype=torch.float64)
    batch.pop("labels")
    tuned = burnish.tune(net, "pfeiffer(reduction=8)", head=False, name="a")
    source(tuned, "b")
    net.double().eval()
    with torch.no_grad():
        for _, b in tuned.branches(Bottleneck, "a"):
            stir(b, size=0.3)
        want = net(**batch).logits                      # of "a" alone
    part = burnish.parse(f"{method}(reduction=8)")[0]
    part.lifecycle(tuned, "both", ["a", "b"])
    net.double()
    assert tuned.training == "both" and dict(tuned.state.active) == {"both": 1.0}
    tuned.remove("a"), tuned.remove("b")
    for _, m in tuned.branches(Sources):
        with torch.no_grad():
            if method == "scalearn":
                m.scales.zero_()[0] = 1.0
            else:                                       # all of the attention on the first
                m.key.weight.zero_()
                m.up[1] = m.up[0]
                m.up_bias[1] = m.up_bias[0]
                m.down[1] = m.down[0]
                m.down_bias[1] = m.down_bias[0]
    with torch.no_grad():
        torch.testing.assert_close(net(**batch).logits, want, rtol=1e-6, atol=1e-7)
    tuned.save(tmp_path / "both")
    again = burnish.load(tiny("vit", dtype=torch.float64)[0].eval(), tmp_path / "both")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_a_scaled_source_brings_its_scale():
    m, b = Scaled(1, 6, 2, "relu", vector=False, dropout=0.0), \
        stir(Bottleneck(6, 2, scale=3.0), size=0.5)
    m.take(0, b, "it")
    h = torch.randn(4, 6)
    torch.testing.assert_close(m.of(0, h), b(h))


@pytest.mark.parametrize("other, words", [
    ("pfeiffer(reduction=4)", "'b' at .* is no bottleneck of 4 relu units"),
    ("pfeiffer(reduction=8, act='gelu')", "'b' at .* is no bottleneck of 4 relu units"),
    ("houlsby(bottleneck=4, act='relu', norms=False)", "'b' differs from it at"),
    ("lora(rank=2)", "'b' differs from it at")])
def test_adapters_that_are_no_sources_are_refused(other, words):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "pfeiffer(reduction=8)", head=False, name="a")
    tuned.add("b", other, head=False)
    want = net(**batch).logits
    part = burnish.parse("scalearn(reduction=8)")[0]
    with pytest.raises(burnish.RecipeError, match=words):
        part.lifecycle(tuned, "both", ["a", "b"])
    assert set(tuned.adapters) == {"a", "b"} and torch.equal(net(**batch).logits, want)
    with pytest.raises(burnish.RecipeError, match="expected 2 sources, not 1"):
        part.lifecycle(tuned, "both", ["a"])
    with pytest.raises(burnish.ConfigError, match="no adapter 'nobody'.*there is a, b"):
        part.lifecycle(tuned, "both", ["a", "nobody"])
    assert set(tuned.adapters) == {"a", "b"}


@pytest.mark.parametrize("other, words", [
    ("parallel(bottleneck=4, scale=1.0)",
     "reads the output of bert.encoder.layer.0.output.dense .add.*, and what 'b' has there reads "
     "the input of bert.encoder.layer.0.intermediate.dense"),
    ("ast_adapter(bottleneck=4, mode='series', norms=False)",
     r"reads the output .*\(replace at the output\)"),
    ("parallel(bottleneck=4, scale=1.0) + pfeiffer(reduction=8)", "'b' has several at")])
def test_what_stands_there_otherwise_is_no_source(other, words):
    """In blocks without an MLP of their own, where its last linear is what they all change."""
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "pfeiffer(reduction=8)", head=False, name="a")
    tuned.add("b", other, head=False)
    want = net(**batch).logits
    with pytest.raises(burnish.RecipeError, match=words):
        burnish.parse("scalearn(reduction=8)")[0].lifecycle(tuned, "both", ["a", "b"])
    assert set(tuned.adapters) == {"a", "b"} and torch.equal(net(**batch).logits, want)


@pytest.mark.parametrize("method", ["scalearn", "adapter_fusion"])
def test_a_run_over_three_tasks(method):
    """Two sources, each alone on its own data, then what combines them; the sources then rest."""
    net, batch = tiny("vit", batch=4)
    tuned = burnish.tune(net, f"{method}(reduction=8)", name="target")
    part = tuned.recipe.named(method)
    before = {n: p.detach().clone() for n, p in net.named_parameters() if ".target." in n}
    seen, held = [], {}
    for stage, _, loss in tuned.run(part.stages(tuned, ["a", "b", "c"]), lambda s: [batch] * 3,
                                    lr=1e-2):
        seen.append(stage.trains)
        assert torch.isfinite(loss) and dict(tuned.state.active) == {stage.trains: 1.0}
        if len(seen) == 7:
            held = {path: m.down.detach().clone() for path, m in tuned.branches(Sources)}
    assert seen == ["a"] * 3 + ["b"] * 3 + ["target"] * 3
    for path, m in tuned.branches(Sources, "target"):
        for n, name in enumerate("ab"):
            b = dict(tuned.branches(Bottleneck, name))[path]
            assert torch.equal(m.down[n], b.down.weight) and torch.equal(m.up[n], b.up.weight)
        assert torch.equal(m.down, held[path]) and not m.down.requires_grad
    moved = {n for n, p in net.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any(n.endswith(("scales", "value.weight")) for n in moved)
    with pytest.raises(burnish.RecipeError, match="2 sources and a target are 3 tasks, not 2"):
        list(part.stages(tuned, ["a", "b"]))
    assert not list(part.stages(tuned, []))


@pytest.mark.parametrize("method", ["scalearn", "adapter_fusion"])
def test_the_stages_of_a_run_over_three_sources(method):
    """Each source has the targets and the head of the adapter that trains, which combines them
    behind the last source, on the last task."""
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "lora(rank=2)", head=False, name="first")
    part = burnish.parse(f"{method}(sources=3, reduction=8, act='gelu')")[0]
    tuned.add("target", part, targets="fc2@0", head="auto")
    tuned.use("target")
    stages = list(part.stages(tuned, ["a", "b", "c", "d"]))
    assert [s.trains for s in stages] == ["a", "b", "c", "target"]
    assert [s.data for s in stages] == ["a", "b", "c", "d"]
    assert [s.then is not None for s in stages] == [False, False, True, False]
    own = tuned.adapters["target"]
    assert all(dict(s.add) == {"targets": own.targets, "head": own.head} for s in stages[:3])
    assert own.targets is not None and tuned.adapters["first"].head is not own.head
    assert all(burnish.parse(s.recipe)[0].settings()["reduction"] == 8 for s in stages[:3])
    tuned.use({"target": 0.5, "first": 0.5})
    assert tuned.training is None
    assert list(part.stages(tuned, ["a", "b", "c", "d"]))[-1].trains == "first"


def test_a_combination_has_the_targets_and_the_head_of_its_first_source():
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "pfeiffer(reduction=8)", targets="vit.layers.0.mlp.fc2", name="a")
    tuned.add("b", "pfeiffer(reduction=8)", targets="fc2@0", head=False)
    burnish.parse("scalearn(reduction=8)")[0].lifecycle(tuned, "both", ["a", "b"])
    a, both = tuned.adapters["a"], tuned.adapters["both"]
    assert (both.targets, both.head) == (a.targets, a.head)
    assert [p for p, _ in tuned.branches(Sources)] == ["vit.layers.0.mlp.fc2"]
    assert both.targets != tuned.adapters["b"].targets and both.head != tuned.adapters["b"].head


def test_a_source_is_one_wide_at_least():
    tuned = burnish.tune(tiny("vit")[0], "scalearn(reduction=100)", head=False)
    assert {m.down.shape for _, m in tuned.branches(Sources)} == {(2, 1, 32)}


def test_the_counts_on_roberta_base(published):
    """8 sources, 12 layers of width 768: 73,728, 96, 6,144 and 8; AdapterFusion 12 x 3 x 768^2."""
    anatomy, _ = published("RobertaConfig", "RobertaForSequenceClassification")

    def trained(recipe):
        with torch.device("meta"):
            made = list(burnish.parse(recipe)[0].mixture(anatomy))
        return {id(p): p for b in made for p in b.module.parameters() if p.requires_grad}.values()

    for form, want in (("", 73_728), ("scales='number'", 96), ("share=True", 6_144),
                       ("scales='number', share=True", 8)):
        recipe = f"scalearn(sources=8{', ' * bool(form)}{form})"
        assert sum(p.numel() for p in trained(recipe)) == want
        assert burnish.parse(recipe)[0].count(768, 12) == want
    assert burnish.parse("scalearn(sources=8)")[0].count(768) == 8 * 768
    assert Bottleneck.count(768, 48) * 12 == 894_528
    fused = trained("adapter_fusion(sources=8)")
    assert sum(p.numel() for p in fused if p.dim() == 2) == 21_233_664
    assert sum(p.numel() for p in fused if p.dim() == 1) == 12 * 768
    assert burnish.parse("adapter_fusion")[0].count(768) * 12 == 21_233_664 + 9_216
    assert round(73_728 / 21_233_664, 4) == 0.0035


def test_starts_and_defaults():
    m = Scaled(4, 64, 8, "relu", vector=True, dropout=0.0)
    w = m.scales.detach()
    assert abs(float(w.mean()) - 0.5) < 1e-3 and 8e-4 < float(w.std()) < 1.25e-3
    assert 0.015 < float(m.down.std()) < 0.025 and not m.down_bias.any() and not m.up_bias.any()
    f = Fused(2, 64, 8, "relu")
    assert torch.equal(f.value.weight, torch.eye(64)) and not f.query.bias.any()
    assert all(0.015 < float(x.weight.detach().std()) < 0.025 for x in (f.query, f.key))
    tuned = burnish.tune(tiny("vit")[0], "scalearn", head=False)
    assert {g["weight_decay"] for g in
            tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} == {0.0}
    assert burnish.parse("scalearn")[0].settings() == {
        "targets": None, "sources": 2, "reduction": 16, "act": "relu", "scales": "vector",
        "share": False, "dropout": 0.3, "stored": False}
    assert burnish.parse("adapter_fusion")[0].settings() == {
        "targets": None, "sources": 2, "reduction": 16, "act": "relu"}


@pytest.mark.parametrize("recipe", [
    "scalearn(sources=0)", "scalearn(reduction=0)", "scalearn(dropout=1.0)",
    "adapter_fusion(sources=0)", "adapter_fusion(reduction=0)"])
def test_what_cannot_act_is_refused(recipe):
    with pytest.raises(burnish.RecipeError, match=f"^{recipe.partition('(')[0]}"):
        burnish.parse(recipe)


def test_an_activation_that_is_none_is_refused_beforehand():
    with pytest.raises(burnish.ConfigError, match="unknown activation 'gelo'"):
        burnish.tune(tiny("vit")[0], "adapter_fusion(act='gelo')", head=False)


def test_scales_of_one_width_for_blocks_of_several():
    with pytest.raises(burnish.RecipeError, match=r"scalearn\(share=True\) has scales of one"):
        burnish.tune(tiny("swin")[0], "scalearn(share=True)")
    for more in ("", ", scales='number'"):
        burnish.tune(tiny("swin")[0], f"scalearn(share={bool(more)}{more})", head=False)
    with pytest.raises(burnish.RecipeError, match="scalearn: this model has no MLP"):
        burnish.tune(tiny("mlp")[0], "scalearn")
