"""Where the side blocks of LST are cut out of the blocks they stand beside, index by index."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.taps import Crown, Foot, Rung
from burnish.engine.slot import slots
from burnish.testing.models import tiny

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2}
#: name -> (config, model, settings); the others are tiny ones
OTHER = {
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM",
               {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SMALL, "rotary_pct": 1.0}),
    # every layer attention, of grouped queries and without positions
    "jamba": ("JambaConfig", "JambaForCausalLM",
              {**GROUPED, "attn_layer_period": 1, "attn_layer_offset": 0, "num_experts": 1,
               "num_experts_per_tok": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
               "use_mamba_kernels": False}),
    "bart": ("BartConfig", "BartForConditionalGeneration",
             {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
              "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
              "decoder_ffn_dim": 64, "max_position_embeddings": 32, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
              "forced_eos_token_id": None}),
}
#: name -> (blocks, q, k, v, o, into the MLP, out of it, norms of a block)
LLAMA = ("model.layers", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
         "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
NAMES = {
    "bert": ("bert.encoder.layer", "attention.self.query", "attention.self.key",
             "attention.self.value", "attention.output.dense", ("intermediate.dense",),
             "output.dense"),
    "jamba": (*LLAMA[:5], ("feed_forward.gate_proj", "feed_forward.up_proj"),
              "feed_forward.down_proj"),
    "mixtral": (*LLAMA[:5], (), None),
}


def built(name):
    """A small model whose norms and biases are not all alike, and a batch."""
    if name in OTHER:
        import transformers

        config, model, settings = OTHER[name]
        torch.manual_seed(0)
        net = getattr(transformers, model)(getattr(transformers, config)(**settings)).train()
        ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "labels": ids}
    else:
        net, batch = tiny(name)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=g))
    return net, batch


def sides(tuned):
    return [m.side for _, _, slot in slots(tuned.model) for m in slot.modules()
            if isinstance(m, Rung)]


def top(score, n):
    return score.topk(n).indices.sort().values


def heads_of(positions, width):
    """Positions inside every head -> rows."""
    return torch.cat([p + width * h for h, p in enumerate(positions)])


def attention(weight, names, kv, rotary):
    """(rows of q, of k, of v, columns of o) at 4 heads of width 8 and R = 4: 2 positions each."""
    q, k, v = (weight(n).abs() for n in names)
    group = 4 // kv
    if rotary:                                   # frequencies 0, 4, ... of 4, twice over
        at_k = [torch.tensor([0, 4])] * kv
        at_v = [top(v[8 * j : 8 * j + 8].sum(1), 2) for j in range(kv)]
    else:
        at_k = at_v = [top(sum((q[8 * h : 8 * h + 8] * k[8 * j : 8 * j + 8]
                                * v[8 * j : 8 * j + 8]).sum(1)
                               for h in range(group * j, group * j + group)), 2)
                       for j in range(kv)]
    every = [j for j in range(kv) for _ in range(group)]
    return (heads_of([at_k[j] for j in every], 8), heads_of(at_k, 8), heads_of(at_v, 8),
            heads_of([at_v[j] for j in every], 8))


@pytest.mark.parametrize("model, kv, rotary, norms", [
    ("bert", 4, False, {"attention.output.LayerNorm": 1, "output.LayerNorm": 2}),
    ("llama", 2, True, {"input_layernorm": 0, "post_attention_layernorm": 1}),
    ("mixtral", 2, True, {"input_layernorm": 0, "post_attention_layernorm": 1}),
    ("jamba", 2, False, {"input_layernorm": 0, "pre_ff_layernorm": 1}),
    ("gemma2", 2, True, {"input_layernorm": 0, "post_attention_layernorm": 1,
                         "pre_feedforward_layernorm": 1, "post_feedforward_layernorm": 2}),
    ("qwen3", 2, True, {"input_layernorm": 0, "post_attention_layernorm": 1,
                        "self_attn.q_norm": [0, 4], "self_attn.k_norm": [0, 4]}),
    ("olmo2", 2, True, {"post_attention_layernorm": 1, "post_feedforward_layernorm": 2,
                        "self_attn.q_norm": [0, 4, 8, 12, 16, 20, 24, 28],
                        "self_attn.k_norm": [0, 4, 8, 12]}),
])
def test_every_matrix_and_norm_is_cut_where_the_stream_is(model, kv, rotary, norms):
    """Columns follow the channels kept before, rows are the largest L1 of |W| (by products for q,
    k, v and for gate, up; every R-th frequency where positions rotate); norms go with the channels
    they see: 0 before attention, 1 behind it, 2 behind the MLP."""
    net, batch = built(model)
    large = copy.deepcopy(net)
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    stack, q, k, v, o, into, out = NAMES.get(model, LLAMA)
    keep = top(large.get_input_embeddings().weight.abs().sum(0), 8)
    for i, side in enumerate(sides(tuned)):
        block = large.get_submodule(stack)[i]

        def weight(name, block=block):
            return block.get_submodule(name).weight.detach()

        rows_q, rows_k, rows_v, columns = attention(weight, (q, k, v), kv, rotary)
        behind = top(weight(o).abs().sum(1), 8)
        want = {q: (rows_q, keep), k: (rows_k, keep), v: (rows_v, keep), o: (behind, columns)}
        sets = [keep, behind, behind]
        if out is not None:
            product = torch.stack([weight(n).abs() for n in into]).prod(0).sum(1)
            inner = top(product, len(product) // 4)
            sets[2] = top(weight(out).abs().sum(1), 8)
            want |= {n: (inner, behind) for n in into} | {out: (sets[2], inner)}
        for name, (rows, cols) in want.items():
            own, small = block.get_submodule(name), side.get_submodule(name)
            assert torch.equal(small.weight, own.weight[rows][:, cols]), (i, name)
            if own.bias is not None:
                assert torch.equal(small.bias, own.bias[rows]), (i, name)
        for name, at in norms.items():
            own, small = block.get_submodule(name), side.get_submodule(name)
            rows = torch.tensor(at) if isinstance(at, list) else sets[at]
            for leaf, p in own.named_parameters():
                assert torch.equal(small.get_parameter(leaf), p[rows]), (i, name, leaf)
        keep = sets[2]
    (crown,) = [m for _, _, slot in slots(net) for m in slot.modules() if isinstance(m, Crown)]
    end = {"bert": None, "jamba": "model.final_layernorm"}.get(model, "model.norm")
    if end:
        assert torch.equal(crown.norm.weight, large.get_submodule(end).weight[keep])
    tuned.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters())


def test_attention_whose_parts_interleave_starts_as_its_class_and_the_rest_is_cut():
    """Its rows are those of no single part, so the channels before it are those behind it."""
    net, batch = built("neox")
    large = copy.deepcopy(net)
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    keep = top(large.get_input_embeddings().weight.abs().sum(0), 8)
    for block, side in zip(large.gpt_neox.layers, sides(tuned), strict=True):
        up, down = block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h
        inner, end = top(up.weight.abs().sum(1), 16), top(down.weight.abs().sum(1), 8)
        assert torch.equal(side.mlp.dense_h_to_4h.weight, up.weight[inner][:, keep])
        assert torch.equal(side.mlp.dense_4h_to_h.weight, down.weight[end][:, inner])
        for n in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(side.get_submodule(n).bias, block.get_submodule(n).bias[keep])
        keep = end
    tuned.loss(batch).backward()


@pytest.mark.parametrize("reduction", [1, 2])
def test_any_reduction_of_a_fused_weight_takes_the_same_rows_of_its_bias(reduction):
    net, _ = built("gpt2")
    large = copy.deepcopy(net).transformer.h[0].attn.c_attn
    small = sides(burnish.tune(net, f"lst(reduction={reduction})", head=False))[0].attn.c_attn
    q, k, v = large.weight.detach().t().split(32)
    joint = (q * k * v).abs().sum(1).view(4, 8)
    n = 8 // reduction
    rows = heads_of([top(joint[h], n) for h in range(4)], 8)
    assert torch.equal(small.bias, torch.cat([b[rows] for b in large.bias.split(32)]))


# -- blocks of a class of one's own ----------------------------------------------------------------
class Layer(nn.Module):
    """Pre-norm; norms of queries and keys over one head or all; names that say what they do, or
    none that are known."""

    def __init__(self, config):
        super().__init__()
        d, told = config.hidden_size, config.told
        self.heads, self.shape = config.num_attention_heads, (-1, config.num_attention_heads)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.Module()
        self.attn.num_heads = self.heads
        self.attn.q, self.attn.k, self.attn.v = (nn.Linear(d, d) for _ in range(3))
        wide = d if config.wide else d // self.heads
        self.attn.q_norm, self.attn.k_norm = nn.RMSNorm(wide), nn.RMSNorm(wide)
        self.names = ("o", "fc1", "fc2") if told else ("ending", "opening", "closing")
        for n, i, o in zip(self.names, (d, d, config.intermediate_size),
                           (d, config.intermediate_size, d), strict=True):
            (self.attn if n in ("o", "ending") else self).add_module(n, nn.Linear(i, o))

    def forward(self, x):
        a, h = self.attn, self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)) for f in (a.q, a.k, a.v))
        if len(a.q_norm.weight) == q.shape[-1]:
            q, k = a.q_norm(q), a.k_norm(k)
        else:
            q, k = (n(t.flatten(-2)).view_as(t) for n, t in ((a.q_norm, q), (a.k_norm, k)))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + a.get_submodule(self.names[0])(y.transpose(1, 2).flatten(-2))
        return x + self.get_submodule(self.names[2])(
            self.get_submodule(self.names[1])(self.norm2(x)).relu())


class Own(nn.Module):
    """A transformer without positions, built from a config."""

    def __init__(self, wide=True, told=True):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=32, num_attention_heads=4, intermediate_size=64,
                                      wide=wide, told=told)
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def own(**kw):
    torch.manual_seed(0)
    net = Own(**kw)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape))
    return net, copy.deepcopy(net)


@pytest.mark.parametrize("wide", [True, False])
def test_norms_of_queries_and_keys_without_rotary_positions(wide):
    """A scale for every row goes with its row; a head's that all share has no rows all agree on."""
    net, large = own(wide=wide)
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    for side, block in zip(sides(tuned), large.layers, strict=True):
        rows, *_ = attention(lambda n, b=block: b.attn.get_submodule(n).weight.detach(), "qkv", 4,
                             rotary=False)
        for name in ("q_norm", "k_norm"):
            small = side.attn.get_submodule(name).weight
            want = block.attn.get_submodule(name).weight[rows] if wide else torch.ones(2)
            assert torch.equal(small, want), name
    net(torch.arange(8).view(2, 4)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_blocks_whose_names_say_nothing_have_the_models_width_and_start_as_their_class():
    net, large = own(told=False)
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    keep = top(large.embed.weight.abs().sum(0), 8)
    for side, block in zip(sides(tuned), large.layers, strict=True):
        assert side.opening.weight.shape == (16, 8)
        assert torch.equal(side.norm1.weight, block.norm1.weight[keep])
        assert torch.equal(side.norm2.weight, block.norm2.weight[keep])
    net(torch.arange(8).view(2, 4)).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


# -- squared gradients ----------------------------------------------------------------------------
def squares_of(net, batch):
    """name -> sum over samples of the squared gradient of that sample's loss."""
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for i in range(len(batch["labels"])):
        loss = net(**{k: v[i : i + 1] for k, v in batch.items()}).loss
        grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        for t, g in zip(total.values(), grads, strict=True):
            t += 0 if g is None else g.square()
    return total


def test_what_no_side_block_is_cut_from_may_be_held_in_another_form():
    """Data are read for the blocks with a rung and the embeddings alone."""
    net, batch = tiny("bert", hidden_size=64, intermediate_size=64)
    tuned = burnish.tune(net, "nf4(targets=['layer.1.*', 'pooler.dense']) "
                              "+ lst(reduction=4, layers=[0], init='fisher')",
                         head=False, calibration=[batch])
    held = {path for path, _, slot in slots(net) if slot.providers}
    assert "bert.pooler.dense" in held and len(held) == 7
    tuned.loss(batch).backward()


def test_channels_are_those_of_all_embeddings_together():
    """The squared gradients of two tables are summed over their words, however many those are."""
    net, _ = tiny("t5")
    net.decoder.embed_tokens = torch.nn.Embedding(9, 32)
    g = torch.Generator().manual_seed(4)
    batch = {"input_ids": torch.randint(1, 64, (4, 12), generator=g),
             "decoder_input_ids": torch.randint(1, 9, (4, 5), generator=g),
             "labels": torch.randint(1, 64, (4, 5), generator=g)}
    squares = squares_of(copy.deepcopy(net).eval(), batch)
    large = copy.deepcopy(net)
    tuned = burnish.tune(net, "lst(reduction=4, init='fisher')", head=False, calibration=[batch])
    sums = [squares[f"{n}.weight"].sum(0) for n in ("shared", "decoder.embed_tokens")]
    keep = top(sums[0] + sums[1], 8)
    assert not torch.equal(keep, top(sums[0] / 64 + sums[1] / 9, 8))
    assert not torch.equal(keep, top(sums[0], 8)) and not torch.equal(keep, top(sums[1], 8))
    for stack, side in (("encoder", sides(tuned)[0]), ("decoder", sides(tuned)[2])):
        own = large.get_submodule(stack).block[0].layer[0].SelfAttention.q.weight
        small = side.layer[0].SelfAttention.q.weight
        assert all(any(torch.equal(row, w) for w in own[:, keep]) for row in small)


def test_squares_are_held_of_what_is_cut_together_and_row_sums_of_the_rest(monkeypatch):
    from burnish.methods.side import _ladder

    made = []

    class Watched(_ladder.Scores):
        def __init__(self, anatomy):
            super().__init__(anatomy)
            made.append(self)

    monkeypatch.setattr(_ladder, "Scores", Watched)
    net, batch = tiny("llama")
    burnish.tune(net, "lst(reduction=4, init='fisher')", head=False, calibration=[batch])
    (scores,) = made
    numbers = {}
    for name, t in scores.seen.items():
        numbers.setdefault(name.split(".")[-2], set()).add(t.numel())
    whole = {"q_proj": 32 * 32, "k_proj": 16 * 32, "v_proj": 16 * 32, "gate_proj": 48 * 32,
             "up_proj": 48 * 32}
    assert numbers == {n: {k} for n, k in {**whole, "o_proj": 32, "down_proj": 32,
                                           "embed_tokens": 32}.items()}


# -- one block a stack ----------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["vit", "bert", "t5", "bart"])
def test_a_stack_of_one_block_has_a_ladder_of_one_rung(model):
    if model == "bart":
        net, batch = built(model)
    else:
        more = {"num_layers": 1} if model == "t5" else {"num_hidden_layers": 1}
        net, batch = tiny(model, **more)
    tuned = burnish.tune(net, "lst(reduction=4)", head=False)
    found = [m for _, _, slot in slots(net) for m in slot.modules()]
    stacks = 2 if model in ("t5", "bart") else 1
    assert [sum(isinstance(m, kind) for m in found) for kind in (Rung, Foot, Crown)] == \
        [stacks, stacks - 1, 1]
    tuned.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters())
