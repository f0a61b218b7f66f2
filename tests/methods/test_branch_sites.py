"""Where the methods of the branch folder stand: ends of sub-layers, widths, norms of the stream."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import burnish
from burnish.core import anatomy as core
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.methods.branch import _sites
from burnish.testing.models import tiny

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}


def causal(name, **more):
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**TEXT, **more)).eval()


def ends(model, which):
    return [(s.path, s.width) for s in which(Anatomy.of(tiny(model, meta=True)[0]))]


# -- ends -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("model, attention, mlp", [
    ("vit", ["vit.layers.{}.attention.o_proj"], ["vit.layers.{}.mlp.fc2"]),
    ("bert", ["bert.encoder.layer.{}.attention.output.dense"],
     ["bert.encoder.layer.{}.output.dense"]),
    ("mixtral", ["model.layers.{}.self_attn.o_proj"], ["model.layers.{}.mlp"]),
    ("encoder", ["encoder.layers.{}.self_attn"], ["encoder.layers.{}.linear2"]),
    ("mamba", ["backbone.layers.{}.mixer"], []),
])
def test_the_ends_of_sub_layers(model, attention, mlp):
    """The last linear of each; the whole module where it reads that weight itself, is a mixture, or
    mixes tokens in another way than attention."""
    for which, paths in ((_sites.attention_ends, attention), (_sites.mlp_ends, mlp)):
        assert ends(model, which) == [(p.format(i), 32) for i in range(2) for p in paths]


def test_cross_attention_has_an_end_of_its_own():
    got = [p for p, _ in ends("t5", _sites.attention_ends)]
    assert got == [*(f"encoder.block.{i}.layer.0.SelfAttention.o" for i in range(2)),
                   *(f"decoder.block.{i}.layer.{n}.o" for i in range(2)
                     for n in ("0.SelfAttention", "1.EncDecAttention"))]


class Attn(nn.Module):
    def __init__(self, d, out=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))
        if out:
            self.o_proj = nn.Linear(d, out)

    def forward(self, x):
        y = nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x),
                                                       self.v_proj(x))
        return self.o_proj(y) if hasattr(self, "o_proj") else y


class Mlp(nn.Module):
    def __init__(self, d, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, out)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Block(nn.Module):
    """Attention of width d, an MLP to another width; norms by name."""

    def __init__(self, d, out, project=True, norms=()):
        super().__init__()
        for n in norms:
            self.add_module(n, nn.LayerNorm(d))
        self.attn, self.mlp = Attn(d, d if project else None), Mlp(d, out)

    def forward(self, x):
        return self.mlp(x + self.attn(x))


class Stack(nn.Module):
    def __init__(self, *blocks, final=False):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        if final:
            self.norm = nn.LayerNorm(8)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.norm(x) if hasattr(self, "norm") else x


def test_an_adapter_is_as_wide_as_what_the_module_before_it_returns():
    """Also in a block whose MLP returns another width than its attention."""
    net = Stack(Block(8, 8), Block(8, 12))
    anatomy = Anatomy.of(net)
    assert [s.width for s in _sites.attention_ends(anatomy)] == [8, 8]
    assert [s.width for s in _sites.mlp_ends(anatomy)] == [8, 12]
    tuned = burnish.tune(net, "houlsby(bottleneck=2, init='zero')", head=False)
    assert tuned.model(torch.randn(2, 3, 8)).shape == (2, 3, 12)


def test_attention_without_an_output_projection_has_no_end():
    """What it returns is of its heads, not of the stream."""
    anatomy = Anatomy.of(Stack(Block(8, 8, project=False), Block(8, 8, project=False)))
    assert list(_sites.attention_ends(anatomy)) == []
    assert [s.path for s in _sites.mlp_ends(anatomy)] == ["layers.0.mlp.fc2", "layers.1.mlp.fc2"]


def test_a_width_that_cannot_be_told_is_refused():
    block = core.Block("layers.0", 0, "layers", mlp="layers.0.mlp")
    with pytest.raises(burnish.RecipeError, match="width of layers.0.mlp cannot be told"):
        _sites.width(Anatomy.of(Stack(Block(8, 8))), "layers.0.mlp", block)


def test_sites_are_numbered_by_block_and_within_it():
    """HyperFormer's places: of an encoder two a block, of a decoder three."""
    anatomy = Anatomy.of(tiny("t5", meta=True)[0])
    sites = [*_sites.attention_ends(anatomy), *_sites.mlp_ends(anatomy)]
    assert dict(zip([s.path.partition(".layer.")[::2] for s in sites], _sites.numbered(sites),
                    strict=True)) == {
        ("encoder.block.0", "0.SelfAttention.o"): (0, 0),
        ("encoder.block.1", "0.SelfAttention.o"): (1, 0),
        ("decoder.block.0", "0.SelfAttention.o"): (2, 0),
        ("decoder.block.0", "1.EncDecAttention.o"): (2, 1),
        ("decoder.block.1", "0.SelfAttention.o"): (3, 0),
        ("decoder.block.1", "1.EncDecAttention.o"): (3, 1),
        ("encoder.block.0", "1.DenseReluDense.wo"): (0, 1),
        ("encoder.block.1", "1.DenseReluDense.wo"): (1, 1),
        ("decoder.block.0", "2.DenseReluDense.wo"): (2, 2),
        ("decoder.block.1", "2.DenseReluDense.wo"): (3, 2)}


def test_targets_name_a_site_by_its_weight_or_by_one_inside_it():
    """A mixture is named by its experts' weights; a name that only begins alike names nothing."""
    def stands(model, targets):
        tuned = burnish.tune(tiny(model)[0], "pfeiffer(reduction=4)", targets=targets, head=False)
        return sorted({n.partition(".burnish.")[0] for n, _ in tuned.named_parameters()})

    assert stands("mixtral", "router@0") == ["model.layers.0.mlp"]
    assert stands("vit", "fc2@1") == ["vit.layers.1.mlp.fc2"]
    place = Anatomy.of(tiny("vit", meta=True)[0]).places[-2]
    assert _sites.at(place.path, [place])
    assert not _sites.at(place.path[:-1], [place]) and not _sites.at(f"{place.path}.x", [place])
    assert _sites.at(place.path.rpartition(".")[0], [place])


# -- norms ----------------------------------------------------------------------------------------
class OwnNorm(nn.LayerNorm):
    """A norm with a layer of its own below it."""

    def __init__(self, d):
        super().__init__(d)
        self.gate = nn.Linear(d, d)

    def forward(self, x):
        return super().forward(x) * torch.sigmoid(self.gate(x))


def test_the_norms_train_scale_and_shift_and_no_layer_below_and_do_not_decay():
    net = Stack(Block(8, 8, norms=["norm1", "norm2"]), Block(8, 8, norms=["norm1"]))
    net.layers[1].add_module("norm2", OwnNorm(8))
    chosen = list(_sites.norm_tensors(Anatomy.of(net)))
    assert [s.name for s in chosen] == [f"layers.{i}.norm{k}.{leaf}" for i in range(2)
                                        for k in (1, 2) for leaf in ("weight", "bias")]
    assert not any(s.decay for s in chosen)


@pytest.mark.parametrize("model, last", [
    ("bert", ["bert.encoder.layer.{}.output.LayerNorm"]), ("vit", None), ("llama", None),
    ("whisper", None), ("convnext", None), ("mamba", None)])
def test_the_norm_behind_the_mlp_stands_last_in_blocks_that_normalise_last(model, last):
    anatomy = Anatomy.of(tiny(model, meta=True)[0])
    want = [None] * len(anatomy.blocks) if last is None else [last[0].format(i) for i in range(2)]
    assert [_sites.post_norm(anatomy, b) for b in anatomy.blocks] == want


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("final", [True, False])
def test_a_block_that_says_whether_it_normalises_first_is_believed(first, final):
    """Whether or not a norm stands behind the stack; also where a decoder's block has three."""
    d = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "norm_first": first, "batch_first": True}
    norm = nn.LayerNorm(8) if final else None
    net = nn.ModuleDict({
        "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(**d), 2, norm,
                                         enable_nested_tensor=False),
        "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(**d), 2, norm)})
    anatomy = Anatomy.of(net)
    got = {b.path: _sites.post_norm(anatomy, b) for b in anatomy.blocks}
    assert got == {f"{kind}.layers.{i}": None if first else f"{kind}.layers.{i}.norm{n}"
                   for kind, n in (("encoder", 2), ("decoder", 3)) for i in range(2)}


def test_one_norm_in_a_block_is_none_behind_the_mlp():
    """It is attention's as much as the MLP's."""
    anatomy = Anatomy.of(Stack(Block(8, 8, norms=["norm"]), Block(8, 8, norms=["norm"])))
    assert [_sites.post_norm(anatomy, b) for b in anatomy.blocks] == [None, None]


def test_norms_of_queries_and_keys_are_none_of_the_stream():
    anatomy = Anatomy.of(causal("Qwen3"))
    for i, b in enumerate(anatomy.blocks):
        assert len(b.norms) == 4
        assert _sites.outer_norms(b) == [f"model.layers.{i}.input_layernorm",
                                         f"model.layers.{i}.post_attention_layernorm"]
    bert = Anatomy.of(tiny("bert", meta=True)[0])
    assert [_sites.outer_norms(b) for b in bert.blocks] == [
        [f"bert.encoder.layer.{i}.{n}.LayerNorm" for n in ("attention.output", "output")]
        for i in range(2)]


FAMILIES = {"Qwen3": {}, "Gemma2": {"query_pre_attn_scalar": 8}, "Olmo2": {}, "Glm4": {},
            "Exaone4": {}}


@pytest.mark.parametrize("model", ["vit", "gpt2", "llama", "mixtral", "t5", "whisper", "clip",
                                   "timm_qkv", "encoder", "swin", *FAMILIES])
def test_the_tap_is_the_residual_stream_between_the_sub_layers(model):
    """Where the MLP gives nothing, a block returns what was tapped."""
    net, batch = (causal(model, **FAMILIES[model]), {"input_ids": torch.arange(1, 9).view(1, 8)}) \
        if model in FAMILIES else tiny(model)
    net.eval()
    anatomy, seen = Anatomy.of(net), {}
    with torch.no_grad():
        for b in anatomy.blocks:
            for n, p in net.get_submodule(b.path).named_parameters():
                inner = f"{b.path}.{n}"
                if inner.startswith(f"{b.mlp_out or b.mlp}."):
                    p.zero_()
            path = _sites.mlp_norm(anatomy, b) or b.mlp or b.mlp_in[0]
            net.get_submodule(path).register_forward_pre_hook(
                lambda m, args, k=b.path: seen.update({k: args[0]}))
            net.get_submodule(b.path).register_forward_hook(
                lambda m, args, out, k=b.path: seen.update(
                    {f"{k} gives": out[0] if isinstance(out, tuple) else out}))
        net(**batch)
    assert len(seen) == 2 * len(anatomy.blocks)
    for b in anatomy.blocks:
        assert torch.equal(seen[b.path], seen[f"{b.path} gives"].view_as(seen[b.path]))


@pytest.mark.parametrize("norms, want", [
    (("pre_mlp_norm", "post_mlp_norm"), "pre_mlp_norm"),
    (("norm1", "pre_ffn_layernorm", "post_ffn_layernorm"), "pre_ffn_layernorm"),
    (("norm1", "norm2", "post_self_attn_norm", "post_ffn_norm"), "norm2"),
    (("norm1", "norm2"), "norm2"), (("norm1", "norm_cross", "norm2"), "norm2"),
    (("post_attention_norm", "post_feedforward_norm"), None), (("post_mlp_norm",), None),
    ((), None)])
def test_the_norm_before_the_mlp_by_its_name(norms, want):
    """None: the MLP reads the stream, only what sub-layers give is normalised."""
    anatomy = Anatomy.of(Stack(Block(8, 8, norms=norms), Block(8, 8, norms=norms), final=True))
    for b in anatomy.blocks:
        assert _sites.mlp_norm(anatomy, b) == (want and f"{b.path}.{want}")


@pytest.mark.parametrize("model, why", [("convnext", "mixes no tokens before its MLP"),
                                        ("mamba", "one norm for attention and MLP together")])
def test_where_nothing_lies_between_the_sub_layers_the_residual_tap_is_refused(model, why):
    anatomy = Anatomy.of(tiny(model, meta=True)[0])
    for b in anatomy.blocks:
        with pytest.raises(burnish.RecipeError, match=why):
            _sites.mlp_norm(anatomy, b)


def test_beside_a_sub_layer_whose_result_is_normalised_it_reads_the_stream():
    """OLMo 2: nothing stands before the MLP, both taps are one."""
    outs = []
    for tap in ("norm", "residual"):
        net = causal("Olmo2")
        tuned = burnish.tune(net, f"parallel(bottleneck=4, tap={tap!r})", head=False)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in tuned.parameters():
                p.normal_(0, 0.3)
            outs.append(net.eval()(input_ids=torch.arange(1, 9).view(1, 8)).logits)
    assert torch.equal(*outs)


def test_a_model_without_such_sub_layers_is_refused_by_name():
    anatomy = Anatomy.of(tiny("mlp", meta=True)[0])
    with pytest.raises(burnish.RecipeError, match="houlsby: this model has no MLP to stand behind"):
        _sites.found(anatomy, _sites.mlp_ends(anatomy), parse("houlsby")[0], "MLP")
