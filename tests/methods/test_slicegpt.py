"""SliceGPT against its equation: the model as it is, its stream projected at every interface."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import burnish
from burnish.blocks.choose.principal import rotation
from burnish.blocks.state.shortcut import Shortcuts
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.testing import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32,
         "pad_token_id": 0}


def made(name, **settings):
    """A small model in float64 with norms that scale and shift, and a batch."""
    if name in ("llama", "gpt2"):
        net, _ = tiny(name, dtype=torch.float64, **settings)
    else:
        torch.manual_seed(0)
        extra = {"OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "Gemma": {"head_dim": 8}}
        config = getattr(transformers, f"{name}Config")(
            **{**SMALL, **extra.get(name, {}), **settings})
        config.architectures = [f"{name}ForCausalLM"]
        net = getattr(transformers, f"{name}ForCausalLM")(config).double()
    torch.manual_seed(1)
    for m in net.modules():
        if "Norm" in type(m).__name__:
            for p in m.parameters():
                p.data += 0.3 * torch.randn_like(p)
    return net.eval(), {"input_ids": torch.randint(3, 64, (3, 12))}


def slices(net, batches, **settings):
    text = ", ".join(f"{k}={v!r}" for k, v in settings.items())
    return parse(f"slicegpt({text})")[0].lifecycle(net, batches)


def projected(name, net, ids, k):
    """(logits, what is cut off at each interface): h <- h Q Q^T wherever a norm reads."""
    cut = []

    def lead(x):
        if name in ("gpt2", "OPT"):
            x = x - x.mean(-1, keepdim=True)
        values, vectors = torch.linalg.eigh(x.reshape(-1, x.shape[-1]).t()
                                            @ x.reshape(-1, x.shape[-1]))
        cut.append(float(values[: len(values) - k].sum() / values.sum()))
        Q = vectors[:, len(values) - k :]
        return x @ Q @ Q.t()

    at = torch.arange(ids.shape[1]).expand_as(ids)
    if name == "gpt2":
        t = net.transformer
        x = t.wte(ids) + t.wpe(at)
        for b in t.h:
            x = lead(x)
            x = x + b.attn(b.ln_1(x))[0]
            x = lead(x)
            x = x + b.mlp(b.ln_2(x))
        norm = t.ln_f
    elif name == "OPT":
        d = net.model.decoder
        x = d.embed_tokens(ids) + d.embed_positions(torch.ones_like(ids), 0)
        for b in d.layers:
            x = lead(x)
            x = x + b.self_attn(b.self_attn_layer_norm(x))[0]
            x = lead(x)
            x = x + b.fc2(torch.relu(b.fc1(b.final_layer_norm(x))))
        norm = d.final_layer_norm
    else:
        x = net.model.embed_tokens(ids)
        if name == "Gemma" and not hasattr(net.model.embed_tokens, "embed_scale"):
            x = x * 32**0.5
        turn = net.model.rotary_emb(x, at)
        for b in net.model.layers:
            x = lead(x)
            x = x + b.self_attn(b.input_layernorm(x), turn, None)[0]
            x = lead(x)
            x = x + b.mlp(b.post_attention_layernorm(x))
        norm = net.model.norm
    return net.lm_head(norm(lead(x))), cut


NAMES = ["llama", "gpt2", "OPT", "Gemma", "Qwen2"]


@torch.no_grad()
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_sliced_model_is_the_one_whose_stream_is_projected(name, turned):
    net, batch = made(name)
    want, cut = projected(name, net, batch["input_ids"], 24)
    lost = slices(net, [batch], ratio=0.25, turned=turned)
    near = 1e-9 if name in ("gpt2", "OPT") else 2e-5            # other norms compute in fp32
    torch.testing.assert_close(net(**batch).logits, want, rtol=near, atol=near)
    torch.testing.assert_close(list(lost.values()), cut, rtol=1e-4, atol=1e-9)
    assert len(lost) == 5 and list(lost)[-1].rpartition(".")[2] in (
        "norm", "ln_f", "final_layer_norm")
    assert max(cut) > 1e-4                                      # something was cut
    widths = {m.weight.shape for n, m in net.named_modules() if "norm" in n or ".ln_" in n}
    assert widths == {(24,)}


@torch.no_grad()
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-6), (torch.float32, 1e-4),
                                         (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_cut_it_is_the_same_function(name, dtype, near):
    net, batch = made(name)
    net = net.to(dtype)
    want = net(**batch).logits
    lost = slices(net, [batch], ratio=0.0)
    assert set(lost.values()) == {0.0}
    assert float((net(**batch).logits - want).abs().max()) < near
    assert {p.dtype for p in net.parameters()} == {dtype}


@torch.no_grad()
def test_a_width_that_is_no_multiple_stays_whole_without_a_ratio():
    net, batch = made("gpt2", n_embd=36, n_head=3)
    want = net(**batch).logits
    slices(net, [batch], ratio=0.0)
    torch.testing.assert_close(net(**batch).logits, want)


@pytest.mark.parametrize("ratio, multiple, width", [
    (0.25, 8, 3072), (0.3, 8, 2864), (0.2, 8, 3272), (0.3, 1, 2867), (0.0, 8, 4096),
    (0.5, 64, 2048)])
def test_the_width_is_rounded_down(ratio, multiple, width):
    assert parse(f"slicegpt(ratio={ratio}, multiple={multiple})")[0].width(4096) == width


def test_a_width_that_is_whole_is_not_rounded_down_by_a_rounding_error():
    for ratio, d, width in ((0.9, 5120, 512), (0.8, 3200, 640), (0.9, 1280, 128)):
        assert parse(f"slicegpt(ratio={ratio})")[0].width(d) == width > int((1 - ratio) * d)
    assert parse("slicegpt(ratio=0.9, multiple=1)")[0].width(10) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_error_grows_with_what_is_cut_off(name):
    lost, off = [], []
    for ratio in (0.0, 0.25, 0.5, 0.75):
        net, batch = made(name)
        want = net(**batch).logits
        lost.append(sum(slices(net, [batch], ratio=ratio).values()))
        off.append(float((net(**batch).logits - want).square().mean()))
    assert lost == sorted(lost) and len(set(lost)) == 4
    assert off == sorted(off) and off[1] > 1e-6 > off[0]


@torch.no_grad()
def test_directions_that_are_never_used_cost_nothing():
    """With a stream of rank 24 the other directions have no variance."""
    net, batch = made("llama")
    at = torch.linalg.qr(torch.randn(32, 24, dtype=torch.float64)).Q
    for n, p in net.named_parameters():
        if n.endswith(("o_proj.weight", "down_proj.weight")):
            p.copy_(at @ at.t() @ p)
        if n.endswith("embed_tokens.weight"):
            p.copy_(p @ at @ at.t())
    want = net(**batch).logits
    lost = slices(net, [batch], ratio=0.25)
    assert max(lost.values()) < 1e-12
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-5)


def test_counts_of_a_block_of_llama_7b():
    net, _ = tiny("llama", meta=True, **LLAMA_7B)
    block = net.model.layers[0]

    def count():
        return sum(p.numel() for p in block.parameters() if p.dim() == 2)

    assert count() == 202_375_168
    parse("slicegpt(ratio=0.25)")[0].form(net)
    parts = [sum(p.numel() for p in m.parameters()) for m in
             (block.self_attn, block.mlp, block.shortcuts)]
    assert parts == [50_331_648, 101_449_728, 18_874_368]
    assert count() == sum(parts) == 170_655_744
    assert net.lm_head.weight.shape == net.model.embed_tokens.weight.shape == (32000, 3072)
    assert block.self_attn.q_proj.in_features == block.self_attn.o_proj.out_features == 3072
    assert block.self_attn.q_proj.out_features == block.self_attn.o_proj.in_features == 4096


@torch.no_grad()
def test_padding_has_no_part():
    ids = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(3))
    plain, padded = made("llama")[0], made("llama")[0]
    long = torch.cat([ids, torch.full((8, 5), 7)], 1)
    mask = (torch.arange(17) < 12).long().expand(8, 17)
    slices(plain, [{"input_ids": ids}])
    slices(padded, [{"input_ids": long, "attention_mask": mask}])
    torch.testing.assert_close(padded(input_ids=ids).logits, plain(input_ids=ids).logits,
                               rtol=1e-4, atol=1e-4)
    other = made("llama")[0]
    slices(other, [{"input_ids": long}])
    assert (other(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_all_batches_are_read_whatever_their_length():
    """Two halves are the whole; labels and a cache have no part."""
    whole, halves = made("gpt2")[0], made("gpt2")[0]
    ids = made("gpt2")[1]["input_ids"]
    slices(whole, [{"input_ids": ids}])
    slices(halves, iter([{"input_ids": ids[:1], "labels": ids[:1]}, {"input_ids": ids[1:]}]))
    torch.testing.assert_close(halves(input_ids=ids).logits, whole(input_ids=ids).logits,
                               rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_rotation_by_chance_is_another_model_of_the_same_function():
    nets = []
    for seed in (0, 0, 1, None):
        net, batch = made("llama")
        slices(net, [batch], **({"turned": False} if seed is None else {"seed": seed}))
        nets.append(net)
    outs = [n(**batch).logits for n in nets]
    tables = [n.model.embed_tokens.weight for n in nets]
    assert torch.equal(tables[0], tables[1])
    for out, table in zip(outs[2:], tables[2:], strict=True):
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)
        assert (table - tables[0]).abs().max() > 1e-2
    # without it channels are principal directions: the first is the largest; with it none is
    energy = [t.square().sum(0) for t in (tables[3], tables[0])]
    assert torch.equal(energy[0].argmax(), torch.tensor(0))
    assert energy[1].max() / energy[1].mean() < energy[0].max() / energy[0].mean()
    R = rotation(7, 3)
    torch.testing.assert_close(R @ R.t(), torch.eye(7, dtype=torch.float64))


def test_dropout_is_where_it_was():
    """With sub-layers that say nothing, what passes them by is not dropped."""
    net, batch = made("gpt2")
    for n, m in net.named_modules():
        if isinstance(m, nn.Dropout) and n.startswith("transformer.h.") and "attn_d" not in n:
            m.p = 0.5
    slices(net, [batch])
    assert not torch.equal(net.train()(**batch).logits, net.eval()(**batch).logits)
    with torch.no_grad():
        for n, p in net.named_parameters():
            if "c_proj" in n:
                p.zero_()
    want = net.eval()(**batch).logits
    assert torch.equal(net.train()(**batch).logits, want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_sliced_model_is_saved_and_loaded_as_tensors(name, tmp_path):
    net, batch = made(name)
    slices(net, [batch])
    want = net(**batch).logits
    save_file({n: t.clone() for n, t in net.state_dict().items()}, tmp_path / "m.safetensors")
    fresh, _ = made(name)
    assert parse("slicegpt")[0].form(fresh) is None
    assert {n: t.shape for n, t in fresh.state_dict().items()} == \
        {n: t.shape for n, t in net.state_dict().items()}
    assert not torch.equal(fresh(**batch).logits, want)
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(fresh(**batch).logits, want)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        next(m for m in twin.modules() if isinstance(m, Shortcuts)).first.mul_(2)
    assert torch.equal(net(**batch).logits, want)
    assert (twin(**batch).logits - want).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", ["lora(rank=2)", "dora(rank=2)", "nf4 + lora(rank=2)", "full"])
def test_it_is_tuned_like_any_model(name, recipe, tmp_path):
    net, batch = made(name)
    net, batch = net.float(), {**batch, "labels": batch["input_ids"]}
    slices(net, [batch])
    twin, before = copy.deepcopy(net), net(**batch).logits.detach()
    tuned = burnish.tune(net, recipe)
    if "nf4" not in recipe:
        torch.testing.assert_close(net(**batch).logits, before, rtol=1e-4, atol=1e-4)
    shapes = [p.shape for n, p in tuned.named_parameters() if n.endswith(".A")]
    assert recipe == "full" or 24 in {s[-1] for s in shapes}
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(4)]
    assert losses[-1] < losses[0]
    tuned.save(tmp_path / "a")
    again = burnish.load(twin, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(again.model.eval()(**batch).logits, net.eval()(**batch).logits,
                                   rtol=1e-5, atol=1e-5)
        if "nf4" not in recipe:
            want = net(**batch).logits
            torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_that_run_again_give_the_same_gradients(name):
    net, batch = made(name)
    batch = {**batch, "labels": batch["input_ids"]}
    slices(net, [batch])
    grads = []
    for recipe in ("lora(rank=2)", "lora(rank=2) + checkpoint", "lora(rank=2) + lean"):
        tuned = burnish.tune(copy.deepcopy(net), recipe, seed=1)
        burnish.testing.stir(tuned)
        tuned.model.train()
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
        assert not any(m.held for m in tuned.model.modules() if isinstance(m, Shortcuts))
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(g.abs().max() > 0 for g in grads[0])


@torch.no_grad()
def test_what_was_tied_is_not_any_more_and_what_trained_still_does():
    net, batch = made("gpt2")
    assert net.lm_head.weight is net.transformer.wte.weight and net.lm_head.bias is None
    net.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    want, shift = net(**batch).logits, net.transformer.ln_f.bias.clone()
    slices(net, [batch], ratio=0.0)
    assert net.lm_head.weight is not net.transformer.wte.weight
    assert net.config.tie_word_embeddings is False
    assert shift.abs().max() > 0 and net.lm_head.bias is not None      # the last norm's shift
    torch.testing.assert_close(net(**batch).logits, want)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == \
        ["transformer.h.0.mlp.c_fc.weight"]
    ids = batch["input_ids"]
    a, b = (net.generate(ids, max_new_tokens=4, do_sample=False, use_cache=c, pad_token_id=0)
            for c in (True, False))
    assert torch.equal(a, b)


@torch.no_grad()
def test_a_classifier_is_sliced_too():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=3)
    net = transformers.LlamaForSequenceClassification(config).double().eval()
    batch = {"input_ids": torch.randint(3, 64, (3, 12))}
    want = net(**batch).logits
    slices(net, [batch], ratio=0.0)
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-5)
    slices_again = parse("slicegpt")[0]
    with pytest.raises(ConfigError, match="shortcuts.* is in no known way part of a stream"):
        slices_again.lifecycle(net, [batch])


@pytest.mark.parametrize("name, why", [
    ("bert", "one norm before each of its sub-layers|subtracts|in no known way"),
    ("mixtral", "is in no known way part of a stream"), ("vit", "in no known way|one norm"),
    ("t5", "several stacks")])
def test_other_models_are_refused_and_stay(name, why):
    net, batch = tiny(name)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigError, match=why):
        slices(net, [batch])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(),
                                                 strict=True))


def test_a_residual_of_another_kind_is_noticed_when_it_runs():
    config = transformers.GraniteConfig(**SMALL, residual_multiplier=0.5)
    torch.manual_seed(0)
    net = transformers.GraniteForCausalLM(config).train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigError, match="is not the sum of what came and the attention's"):
        slices(net, [{"input_ids": torch.randint(3, 64, (2, 5))}])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(),
                                                 strict=True))
    assert net.training and not any(m._forward_pre_hooks or m._forward_hooks
                                    for m in net.modules())


def test_what_cannot_be_is_refused():
    net, batch = made("llama")
    method = parse("slicegpt")[0]
    with pytest.raises(ConfigError, match="reads data first, and there is no batch"):
        method.lifecycle(net, [])
    with pytest.raises(ConfigError, match="cannot be told from a mask of .3, 1, 12, 12."):
        method.lifecycle(net, [{**batch, "attention_mask": torch.ones(3, 1, 12, 12).bool()}])
    with pytest.raises(ConfigError, match="leaves none of 32 channels in multiples of 64"):
        slices(net, [batch], multiple=64)
    tuned = burnish.tune(net, "lora(rank=2)")
    with pytest.raises(ConfigError, match="merge the update first"):
        method.lifecycle(tuned, [batch])
    with pytest.raises(ConfigError, match="a recipe is joined to this one"):
        method.lifecycle(net, [batch])
    tuned.detach()
    with torch.no_grad():
        net.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite|cannot be turned"):
        method.lifecycle(net, [batch])
    with pytest.raises(ConfigError, match="no residual stream"):
        method.form(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("settings, why", [
    ("ratio=1.0", "a ratio from 0 and below 1"), ("ratio=-0.1", "a ratio from 0"),
    ("multiple=0", "a multiple of at least 1"), ("targets='q'", "targets do nothing"),
    ("turned=False, seed=1", "seed does nothing beside turned=False")])
def test_settings_are_checked(settings, why):
    with pytest.raises(ConfigError, match=why):
        parse(f"slicegpt({settings})")


def test_the_defaults_are_the_papers():
    m = parse("slicegpt")[0]
    assert (m.ratio, m.multiple, m.turned, m.seed) == (0.25, 8, True, 0)
    assert parse("slicegpt(sparsity=0.3)")[0].ratio == 0.3
