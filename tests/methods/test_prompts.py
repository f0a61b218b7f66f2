"""Prompt tuning, prefix and visual prompts on whole models."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.state.keys_values import KeysValues
from burnish.blocks.state.prompts import Prepended, Tokens
from burnish.core.recipe import parse
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny


def banks(tuned, kind):
    return {path: m for path, _, slot in slots(tuned.model) for m in slot.modules()
            if isinstance(m, kind)}


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def greedy(model, steps, ids, **kw):
    """Tokens by full forwards without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, logits(model, input_ids=ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids


def generate(model, ids, steps, **kw):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None, **kw)


TEXT = [5, 9, 33]


def with_text(model, **kw):
    """A tuned model whose prompt is the embeddings of TEXT."""
    net, batch = tiny(model, **kw)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, f"prompt_tuning(length=3, ids={TEXT})")
    net.eval()
    return tuned, base, batch


def prepended(ids):
    return torch.cat([torch.tensor(TEXT).expand(len(ids), -1), ids], 1)


# -- prompt tuning ------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2", "mixtral", "mamba"])
def test_embeddings_of_a_text_are_that_text(model):
    tuned, base, batch = with_text(model)
    ids = batch["input_ids"]
    want = logits(base, input_ids=prepended(ids))[:, 3:]
    torch.testing.assert_close(logits(tuned.model, input_ids=ids), want, rtol=1e-5, atol=1e-6)


def test_a_text_before_an_encoder_leaves_the_pooler_on_its_token():
    tuned, base, batch = with_text("bert")
    ids = batch["input_ids"]
    seen = {}
    base.bert.pooler.register_forward_pre_hook(lambda m, a: (a[0][:, 3:],))
    base.classifier.load_state_dict(tuned.model.classifier.state_dict())
    tuned.model.bert.register_forward_hook(lambda m, a, out: seen.update(out))
    want = logits(base, input_ids=prepended(ids))
    torch.testing.assert_close(logits(tuned.model, input_ids=ids), want, rtol=1e-5, atol=1e-6)
    assert seen["last_hidden_state"].shape[1] == ids.shape[1]


def test_a_text_before_an_encoder_decoder():
    tuned, base, batch = with_text("t5")
    ids, labels = batch["input_ids"], batch["labels"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    want = logits(base, input_ids=prepended(ids), labels=labels,
                  attention_mask=torch.nn.functional.pad(mask, (3, 0), value=1))
    got = logits(tuned.model, input_ids=ids, labels=labels, attention_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for m in (None, mask):
        kw = {} if m is None else {"attention_mask": m}
        longer = {} if m is None else {
            "attention_mask": torch.nn.functional.pad(m, (3, 0), value=1)}
        assert torch.equal(generate(tuned.model, ids, 5, **kw),
                           generate(base, prepended(ids), 5, **longer))


def test_labels_need_no_care():
    tuned, base, batch = with_text("llama")
    ids = batch["input_ids"]
    long = torch.cat([torch.full((len(ids), 3), -100), ids], 1)
    want = base(input_ids=prepended(ids), labels=torch.where(
        torch.arange(long.shape[1]) <= 3, torch.full_like(long, -100), long)).loss
    torch.testing.assert_close(tuned.model(input_ids=ids, labels=ids).loss, want)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(model):
    tuned, _, batch = with_text(model)
    stir(tuned, size=0.2)
    ids = batch["input_ids"][:1, :5]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    want = logits(tuned.model, input_ids=ids)
    got = logits(tuned.model, input_ids=padded, attention_mask=mask)
    torch.testing.assert_close(got[:, 2:], want, rtol=1e-5, atol=1e-6)
    assert torch.equal(generate(tuned.model, padded, 4, attention_mask=mask)[:, 7:],
                       generate(tuned.model, ids, 4, attention_mask=torch.ones_like(ids))[:, 5:])


@pytest.mark.parametrize("model, recipe", [
    (m, r) for m in ("llama", "gpt2") for r in ("prompt_tuning(length=3)", "prefix(length=3)",
                                                "prefix(length=3, hidden=5)")]
    + [("mamba", "prompt_tuning(length=3)")])                 # a scan's state holds the rows once
def test_generation_with_a_cache_is_the_full_forward(model, recipe):
    net, batch = tiny(model)
    tuned = burnish.tune(net, recipe)
    stir(tuned, size=0.5)
    net.eval()
    ids = batch["input_ids"][:, :4]
    out = generate(net, ids, 6, attention_mask=torch.ones_like(ids))
    assert torch.equal(out, greedy(net, 6, ids))
    mine = logits(net, input_ids=ids)
    with tuned.disabled():
        assert not torch.allclose(logits(net, input_ids=ids), mine, atol=1e-3)


def test_the_start_is_rows_of_the_table():
    table = tiny("llama")[0].model.embed_tokens.weight
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "prompt_tuning(length=5)")
    (rows,) = [m.rows for m in banks(tuned, Prepended).values()]
    assert all((table == r).all(1).any() for r in rows) and rows.dtype == torch.float32
    with pytest.raises(burnish.RecipeError, match="ids from 0 to 63"):
        burnish.tune(tiny("llama")[0], "prompt_tuning(length=2, ids=[64])")


def test_models_that_take_no_embeddings_are_refused():
    for name in ("vit", "clip", "cnn"):
        with pytest.raises(burnish.RecipeError, match="inputs_embeds"):
            burnish.tune(tiny(name)[0], "prompt_tuning")


# -- prefix ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("model, sites", [
    ("llama", {"model.layers.0.self_attn": 16, "model.layers.1.self_attn": 16}),
    ("timm_qkv", {"blocks.0.attn": 32, "blocks.1.attn": 32}),
    ("t5", {f"encoder.block.{i}.layer.0.SelfAttention": 32 for i in range(2)}
     | {f"decoder.block.{i}.layer.0.SelfAttention": 32 for i in range(2)}
     | {f"decoder.block.{i}.layer.1.EncDecAttention": 32 for i in range(2)}),
])
def test_every_attention_gets_rows_as_wide_as_its_keys(model, sites):
    tuned = burnish.tune(tiny(model)[0], "prefix(length=3)")
    assert {p: m.width for p, m in banks(tuned, KeysValues).items()} == sites


def test_positions_of_real_tokens_do_not_move():
    net, batch = tiny("llama")
    seen = []
    net.model.rotary_emb.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    logits(net, **batch)
    burnish.tune(net, "prefix(length=3)")
    logits(net, **batch)
    assert torch.equal(seen[0], seen[1])


def test_padding_and_a_prefix():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "prefix(length=3)")
    stir(tuned, size=0.5)
    net.eval()
    ids = batch["input_ids"][:1, :5]
    padded = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], 1)
    got = logits(net, input_ids=padded, attention_mask=torch.tensor([[1] * 5 + [0] * 2]))
    torch.testing.assert_close(got[:, :5], logits(net, input_ids=ids), rtol=1e-5, atol=1e-6)


def test_collapsing_the_mlp_changes_nothing():
    net, batch = tiny("gpt2")
    tuned = burnish.tune(net, "prefix(length=3, hidden=5)")
    stir(tuned, size=0.5)
    net.eval()
    want = logits(net, **batch)
    for bank in banks(tuned, KeysValues).values():
        bank.collapse()
    torch.testing.assert_close(logits(net, **batch), want)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * 2 * 3 * 32


def test_eager_attention_is_refused_before_and_during():
    net, batch = tiny("llama", attn_implementation="eager")
    with pytest.raises(burnish.RecipeError, match="attn_implementation='sdpa'"):
        burnish.tune(net, "prefix")
    net, batch = tiny("llama")
    burnish.tune(net, "prefix(length=3)")
    net.set_attn_implementation("eager")
    with pytest.raises(burnish.RecipeError, match="without F.scaled_dot_product_attention"):
        net(**batch)


@pytest.mark.parametrize("recipe", ["prefix(length=3)", "prefix(length=3, hidden=5)",
                                    "vpt(length=3, dropout=0.0)", "vpt(length=3, deep=True)"])
def test_checkpointing_changes_no_gradient(recipe):
    grads = []
    for extra in ("", " + checkpoint", " + lean(on=False)"):
        net, batch = tiny("vit")
        tuned = burnish.tune(net, recipe + extra)
        torch.manual_seed(7)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
        assert all(g is not None and g.any() for g in grads[-1])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_two_adapters_take_turns():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "prefix(length=3)")
    tuned.add("other", "prompt_tuning(length=2)")
    stir(tuned, size=0.5)
    net.eval()
    first = logits(net, **batch)
    tuned.use("other")
    stir(tuned, size=0.5)
    second = logits(net, **batch)
    assert not torch.allclose(first, second)
    assert {n.split("burnish.")[1].split(".")[0] for n, _ in tuned.named_parameters()} == {"other"}
    tuned.use("default")
    assert torch.equal(logits(net, **batch), first)
    with pytest.raises(burnish.RecipeError, match="whole"):
        tuned.use({"default": 0.5, "other": 0.5})
        logits(net, **batch)
    with pytest.raises(burnish.RecipeError, match="per-sample"):
        tuned.use(["default", None])
        logits(net, **batch)


# -- visual prompts -------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["vit", "deit", "timm_qkv", "encoder"])
def test_deep_without_tokens_is_the_base(model):
    net, batch = tiny(model, dtype=torch.float64)
    before = logits(net.eval(), **batch)
    burnish.tune(net, "vpt(length=0, deep=True)")
    torch.testing.assert_close(logits(net.eval(), **batch), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deep", [False, True])
def test_tokens_go_in_behind_the_class_token_and_out_again(deep):
    net, batch = tiny("vit")
    inside, outside = [], []
    for layer in net.vit.layers:
        layer.mlp.register_forward_hook(lambda m, a, out: inside.append(out.shape[1]))
    net.vit.layernorm.register_forward_pre_hook(lambda m, a: outside.append(a[0].shape[1]))
    tuned = burnish.tune(net, f"vpt(length=4, deep={deep})")
    logits(net, **batch)
    assert inside == [21, 21] and outside == [17]
    with tuned.disabled():
        logits(net, **batch)
    assert inside[2:] == [17, 17]
    assert all(m.after == 1 for m in banks(tuned, Tokens).values())
    own = [m.rows is not None for m in banks(tuned, Tokens).values()]
    assert own == ([True, True] if deep else [True, False])


def test_deep_by_the_equation():
    """[cls_i, _, E_i] = L_i([cls; P_i; E])."""
    net, batch = tiny("timm_qkv", dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "vpt(length=3, deep=True, dropout=0.0)", head=False)
    rows = [m.rows.double() for m in banks(tuned, Tokens).values()]
    x = base.patch_embed(batch["x"])
    x = torch.cat([base.cls_token.expand(len(x), -1, -1), x], 1) + base.pos_embed
    for block, P in zip(base.blocks, rows, strict=True):
        y = block(torch.cat([x[:, :1], P.expand(len(x), -1, -1), x[:, 1:]], 1))
        x = torch.cat([y[:, :1], y[:, 4:]], 1)
    want = base.head(base.norm(x)[:, 0])
    torch.testing.assert_close(logits(net, **batch), want, rtol=1e-10, atol=1e-12)


def test_special_tokens_are_counted():
    def first(model, recipe="vpt(length=2)"):
        return next(iter(banks(burnish.tune(tiny(model)[0], recipe), Tokens).values())).after

    assert first("vit") == 1 and first("deit") == 2 and first("timm_qkv") == 1
    assert first("encoder") == 0 and first("clip") == 1
    assert first("vit", "vpt(length=2, after=0)") == 0


def test_the_start_is_uniform_within_the_authors_bound():
    tuned = burnish.tune(tiny("vit")[0], "vpt(length=50)")
    rows = next(iter(banks(tuned, Tokens).values())).rows
    bound = (6 / (3 * 4 * 4 + 32)) ** 0.5
    assert rows.abs().max() <= bound and rows.abs().max() > 0.98 * bound


def test_where_tokens_have_no_place():
    for name, why in (("swin", "windows"), ("bert", "read text"), ("convnext", "no transformer")):
        with pytest.raises(burnish.RecipeError, match=why):
            burnish.tune(tiny(name)[0], "vpt(length=2)")


# -- counts -------------------------------------------------------------------------------------
def test_counts():
    one = {name: parse(name)[0] for name in ("prompt_tuning", "prefix(length=10)",
                                             "prefix(length=30)", "prefix(length=20)",
                                             "vpt", "vpt(deep=True)")}
    assert one["prompt_tuning"].count(768) == 76_800
    assert one["prefix(length=10)"].count(12, 768, 768) == 184_320
    assert one["prefix(length=30)"].count(12, 768, 768) == 552_960
    assert one["prefix(length=20)"].count(24, 1024, 1024) == 983_040
    assert one["vpt"].count(768, 12) == 38_400
    assert one["vpt(deep=True)"].count(768, 12) == 460_800


def test_counts_of_published_shapes(published):
    """Rows and widths as the anatomies of T5-base, RoBERTa and ViT-B/16 have them."""
    t5, _ = published("T5Config", "T5ForConditionalGeneration", d_model=768, d_kv=64, d_ff=3072,
                      num_layers=12, num_heads=12)
    assert parse("prompt_tuning(length=100)")[0].count(t5.hidden_size) == 76_800
    for recipe, d, layers, want in (("prefix(length=10)", 768, 12, 184_320),
                                    ("p_tuning_v2", 1024, 24, 983_040)):
        net, _ = published("RobertaConfig", "RobertaForSequenceClassification", hidden_size=d,
                           num_hidden_layers=layers, num_attention_heads=d // 64)
        method = parse(recipe)[0]
        widths = [width for _, width in method.prompt(net).sites]
        assert len(widths) == layers and sum(method.count(1, w, d) for w in widths) == want
    vit, _ = published("ViTConfig", "ViTForImageClassification")
    among = parse("vpt(deep=True)")[0].prompt(vit)
    d, n = among.blocks[0].hidden_size, len(among.blocks)
    assert (among.method.count(d, n), parse("vpt")[0].count(d, n)) == (460_800, 38_400)


def test_p_tuning_v2_is_a_prefix_beside_a_head_that_trains():
    """Rows N(0, 0.02^2) in every attention, dropped at random; no verbaliser but a linear head."""
    method = parse("p_tuning_v2")[0]
    assert (method.name, method.length, method.hidden, method.dropout) == ("prefix", 20, 0, 0.1)
    tuned = burnish.tune(tiny("roberta")[0], "p_tuning_v2")
    rows = [p for n, p in tuned.named_parameters() if n.endswith("rows")]
    head = [n for n, _ in tuned.named_parameters() if n.startswith("classifier.")]
    assert len(rows) == 2 and head
    assert float(torch.stack(rows).detach().std()) == pytest.approx(0.02, rel=0.05)


def test_a_second_step_of_a_cache_puts_no_prompt_in():
    """Generation with the rows in the cache once is the full forward, logit by logit."""
    tuned, base, batch = with_text("llama")
    ids = batch["input_ids"]
    first = tuned.model(input_ids=ids[:, :5], use_cache=True)
    got = logits(tuned.model, input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    want = logits(base, input_ids=prepended(ids))[:, 8:]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model, recipe, args", [
    ("llama", "prompt_tuning(length=4)", (32,)), ("gpt2", "prefix(length=4)", (2, 32, 32)),
    ("llama", "prefix(length=4)", (2, 16, 32)),
    ("llama", "prefix(length=4, hidden=5)", (2, 16, 32)),
    ("vit", "vpt(length=4)", (32, 2)), ("vit", "vpt(length=4, deep=True)", (32, 2)),
])
def test_counts_are_what_trains(model, recipe, args):
    tuned = burnish.tune(tiny(model)[0], recipe, head=False)
    assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(*args)


def test_targets_have_no_meaning_here():
    for name, model in (("prompt_tuning", "llama"), ("prefix", "llama"), ("vpt", "vit")):
        with pytest.raises(burnish.RecipeError, match="takes no targets"):
            burnish.tune(tiny(model)[0], f"{name}(length=2, targets='q')")


# -- bytes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe, extra", [("vpt(length=4)", 4 / 17), ("prefix(length=4)", None)])
def test_what_waits_for_backward(recipe, extra, kept):
    """Visual prompts: the frozen block's bytes for (N + p) / N tokens. A prefix: L more keys and
    values, and no copies of the model's own."""
    per = {}
    for name in ("bitfit", recipe):
        sizes = []
        for layers in (2, 4):
            net, batch = tiny("vit", batch=8, num_hidden_layers=layers)
            sizes.append(kept(burnish.tune(net, name, head=False), batch))
        per[name] = (sizes[1] - sizes[0]) / 2
    more = per[recipe] / per["bitfit"] - 1
    if extra is not None:
        assert more == pytest.approx(extra, rel=0.05)
    else:
        unit = 8 * 32 * 4                                    # batch x width, fp32
        assert per[recipe] - per["bitfit"] == pytest.approx(2 * 4 * unit, rel=0.05)
