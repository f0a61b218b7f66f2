"""What a model is made of, on every small architecture and on real-size configs."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import burnish
from burnish.core import families
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError
from burnish.core.site import KINDS
from burnish.testing import NAMES, config, example_batch, tiny


@pytest.fixture(scope="module")
def anatomies() -> dict[str, Anatomy]:
    return {name: Anatomy.of(tiny(name)[0]) for name in NAMES}


def roles(a: Anatomy) -> dict[str, int]:
    return dict(Counter(p.role for p in a.places))


PLAIN = {"q": 2, "k": 2, "v": 2, "o": 2, "fc1": 2, "fc2": 2}
GATED = {"q": 2, "k": 2, "v": 2, "o": 2, "gate": 2, "up": 2, "down": 2}
FUSED = {"qkv": 2, "o": 2, "fc1": 2, "fc2": 2}
TWICE = {r: 2 * n for r, n in PLAIN.items()}
CROSS = {f"cross_{r}": 2 for r in "qkvo"}
EXPECTED = {
    "vit": {"patch": 1, **PLAIN, "head": 1},
    "deit": {"patch": 1, **PLAIN, "head": 1},
    "swin": {"patch": 1, **{r: 3 for r in PLAIN}, "reduction": 1, "head": 1},
    "convnext": {"patch": 1, "conv": 2, "fc1": 2, "fc2": 2, "reduction": 1, "head": 1},
    "bert": {"embed": 1, "position": 1, "type": 1, **PLAIN, "pooler": 1, "head": 1},
    "roberta": {"embed": 1, "position": 1, "type": 1, **PLAIN, "head": 2},
    "gpt2": {"embed": 1, "position": 1, **FUSED},
    "llama": {"embed": 1, **GATED, "head": 1},
    "mixtral": {"embed": 1, "q": 2, "k": 2, "v": 2, "o": 2, "router": 2, "gate_up": 2, "down": 2,
                "head": 1},
    "qwen_moe": {"embed": 1, **GATED, "down": 4, "router": 4, "gate_up": 2, "head": 1},
    "t5": {"embed": 1, "position": 2, **TWICE, **CROSS},
    "clip": {"embed": 1, "position": 2, "patch": 1, **TWICE, "": 2},
    "mamba": {"embed": 1, "conv": 2, "in_proj": 2, "x_proj": 2, "dt_proj": 2, "out_proj": 2,
              "head": 1},
    "whisper": {"conv": 2, "position": 2, "embed": 1, **TWICE, **CROSS},
    "timm_qkv": {"patch": 1, **FUSED, "head": 1},
    "encoder": {**FUSED, "head": 1},
    "mha": {"": 1, "qkv": 1, "o": 1, "head": 1},
    "cnn": {"conv": 2, "head": 1},
    "mlp": {"": 2, "head": 1},
    "points": {"": 6, **FUSED, "head": 1},
    "graphs": {"": 1, "fc1": 2, "fc2": 2, "head": 1},
}
STACKS = {
    "swin": {"swin.encoder.layers": 3}, "convnext": {"convnext.encoder.stages": 2},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "clip": {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2},
    "whisper": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "gpt2": {"transformer.h": 2}, "timm_qkv": {"blocks": 2}, "mha": {}, "cnn": {}, "mlp": {},
}
HEADS = {
    "roberta": (("classifier.dense", "classifier.out_proj"), "classification"),
    "gpt2": (("lm_head",), "lm"), "llama": (("lm_head",), "lm"), "mixtral": (("lm_head",), "lm"),
    "qwen_moe": (("lm_head",), "lm"), "t5": (("lm_head",), "lm"), "mamba": (("lm_head",), "lm"),
    "whisper": (("proj_out",), "lm"), "clip": ((), "none"),
    "timm_qkv": (("head",), "classification"), "encoder": (("head",), "classification"),
    "mha": (("head",), "classification"), "mlp": (("head",), "classification"),
    "points": (("head",), "classification"), "graphs": (("head",), "classification"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_matrix_is_a_place_with_its_role(anatomies, name):
    a = anatomies[name]
    assert roles(a) == EXPECTED[name]
    assert {p.kind for p in a.places} <= set(KINDS)
    assert {p.role for p in a.places} <= {*families.ROLES, ""}
    names = [p.name for p in a.places]
    assert len(set(names)) == len(names)
    # nothing is missing: every parameter with a matrix of a linear, convolution or table
    known = {n for n, p in a.model.named_parameters()
             if p.dim() > 1 and isinstance(a.model.get_submodule(n.rpartition(".")[0]),
                                           nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)}
    assert known <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_a_place_is_a_view_of_the_parameter(anatomies, name):
    a = anatomies[name]
    for whole in a.places:
        module = a.model.get_submodule(whole.path)
        stored = whole.stored(module)
        assert isinstance(stored, nn.Parameter)
        for p in (whole, *a.slices(whole)):
            view = p.view(stored)
            shape = (p.out, p.inp)
            assert view.shape == ((p.experts, *shape) if p.experts else shape)
            assert view.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
            assert p.numel == view.numel()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_by_stack_and_head(anatomies, name):
    a = anatomies[name]
    stacks = {s: len(b) for s, b in a.stacks().items()}
    if name in STACKS:
        assert stacks == STACKS[name]
    else:
        assert list(stacks.values()) == [2]
    for blocks in a.stacks().values():
        assert [b.index for b in blocks] == list(range(len(blocks)))
        assert len({type(a.model.get_submodule(b.path)) for b in blocks}) == 1
    assert (a.head, a.head_kind) == HEADS.get(name, (("classifier",), "classification"))
    assert a.hidden_size == 32
    for p in a.places:
        inside = [i for i, b in enumerate(a.blocks) if p.path.startswith(f"{b.path}.")]
        assert p.block == (inside[0] if inside else None)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_is_read_without_data(anatomies, name):
    real = anatomies[name]
    read = Anatomy.of(tiny(name, meta=True)[0])
    assert (read.places, read.blocks, read.head, read.notes) == \
        (real.places, real.blocks, real.head, real.notes)


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "t5", "swin", "timm_qkv", "llama"])
def test_the_sites_of_a_block_are_what_runs(anatomies, name):
    """attn_out ends attention, mlp_out the MLP: what they return is as wide as the block."""
    a = anatomies[name]
    _, batch = tiny(name)
    seen: dict[str, torch.Tensor] = {}
    hooks = [a.model.get_submodule(path).register_forward_hook(
        lambda m, i, o, path=path: seen.__setitem__(path, o[0] if isinstance(o, tuple) else o))
        for b in a.blocks for path in (b.attn, b.attn_out, b.cross_out, *b.mlp_in, b.mlp_out)
        if path]
    with torch.no_grad():
        a.model(**batch)
    for h in hooks:
        h.remove()
    for b in a.blocks:
        for path in (b.attn, b.attn_out, b.mlp_out):
            assert path.startswith(f"{b.path}.")
            assert seen[path].shape[-1] == b.hidden_size
        assert all(seen[p].shape[-1] > b.hidden_size for p in b.mlp_in)
        assert b.attn_out.startswith(b.attn)
        assert b.norms and all(n.startswith(f"{b.path}.") for n in b.norms)


def test_sites_where_the_children_are_not_called(anatomies):
    block = anatomies["encoder"].blocks[0]
    assert block.attn == block.attn_out == "encoder.layers.0.self_attn"
    assert (block.mlp_in, block.mlp_out) == (("encoder.layers.0.linear1",),
                                             "encoder.layers.0.linear2")
    moe = anatomies["mixtral"].blocks[0]
    assert (moe.mlp, moe.mlp_in, moe.mlp_out) == ("model.layers.0.mlp", (), None)
    mamba = anatomies["mamba"].blocks[1]
    assert (mamba.attn, mamba.mixer) == (None, "backbone.layers.1.mixer")
    assert anatomies["convnext"].blocks[0].mlp is None


def test_decoders_tell_cross_attention_apart(anatomies):
    for name in ("t5", "whisper"):
        a = anatomies[name]
        first, last = a.blocks[0], a.blocks[-1]
        assert first.cross is None and first.cross_out is None
        assert last.cross and last.cross != last.attn
        crossed = {p.block for p in a.places if p.role in families.CROSS}
        assert crossed == {2, 3}


def test_grouped_queries(anatomies):
    a = anatomies["llama"]
    assert (a.heads, a.kv_heads) == (4, 2)
    assert {p.role: p.out for p in a.places if p.role in "qkv"} == {"q": 32, "k": 16, "v": 16}
    assert (anatomies["vit"].heads, anatomies["vit"].kv_heads) == (4, 4)
    assert [b.heads for b in anatomies["swin"].blocks] == [2, 2, 4]


def test_rows_of_fused_weights(anatomies):
    """Each slice of a fused qkv really gives that projection."""
    for name, transposed in (("gpt2", True), ("timm_qkv", False)):
        a = anatomies[name]
        fused = next(p for p in a.places if p.role == "qkv")
        assert fused.transposed is transposed
        x = torch.randn(5, 32)
        module = a.model.get_submodule(fused.path)
        q, k, v = module(x).detach().split(32, dim=-1)
        for s, want in zip(a.slices(fused), (q, k, v), strict=True):
            bias = module.bias.detach()[slice(*s.rows)]
            got = x @ s.view(s.stored(module)).detach().T + bias
            torch.testing.assert_close(got, want)
    assert [(s.role, s.name) for s in anatomies["mha"].slices(anatomies["mha"].places[1])] == [
        (r, f"attn.in_proj_weight[{r}]") for r in "qkv"]


def test_rows_of_a_fused_weight_with_grouped_queries():
    assert families.runs("qkv", 4608, 32, 8) == (
        ("q", (0, 3072)), ("k", (3072, 3840)), ("v", (3840, 4608)))
    assert families.runs("cross_kv", 64, 4, 4) == (("cross_k", (0, 32)), ("cross_v", (32, 64)))
    assert families.runs("qkv", 100, 4, 4) == ()


def test_interleaved_weights_have_no_rows():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, bos_token_id=1, eos_token_id=2))
    a = Anatomy.of(model)
    fused = [p for p in a.places if p.role == "qkv"]
    assert len(fused) == 2 and all(a.interleaved(p) and a.slices(p) == () for p in fused)


def test_experts(anatomies):
    a = anatomies["mixtral"]
    up, down = (next(p for p in a.places if p.role == r) for r in ("gate_up", "down"))
    assert (up.kind, up.experts, up.out, up.inp, up.transposed) == ("experts", 4, 96, 32, False)
    assert (down.experts, down.out, down.inp) == (4, 32, 48)
    assert [(s.role, s.rows) for s in a.slices(up)] == [("gate", (0, 48)), ("up", (48, 96))]


def test_experts_stored_in_by_out():
    from transformers import GptOssConfig, GptOssForCausalLM

    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=24, num_local_experts=4,
            pad_token_id=0, eos_token_id=1))
    a = Anatomy.of(model)
    up, down = (next(p for p in a.places if p.role == r) for r in ("gate_up", "down"))
    assert (up.out, up.inp, up.transposed) == (48, 32, True)
    assert (down.out, down.inp, down.transposed) == (32, 24, True)
    assert up.view(up.stored(model.get_submodule(up.path))).shape == (4, 48, 32)
    assert a.slices(up) == ()                            # gate and up alternate


def test_experts_of_an_unknown_module():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 96))
            self.down_proj = nn.Parameter(torch.zeros(4, 48, 32))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.gate = nn.Linear(32, 4)
            self.experts = Experts()

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    a = Anatomy.of(model)
    assert roles(a) == {"router": 2, "gate_up": 2, "down": 2}
    up, down = (next(p for p in a.places if p.role == r) for r in ("gate_up", "down"))
    assert (up.out, up.inp, up.transposed) == (96, 32, True)
    assert (down.out, down.inp, down.transposed) == (32, 48, True)


def test_weights_read_past_their_modules(anatomies):
    """A place names the module whose forward reads the weight."""
    mamba = {p.role: p for p in anatomies["mamba"].places if p.block == 0}
    for role in ("x_proj", "dt_proj", "out_proj"):
        assert (mamba[role].kind, mamba[role].param) == ("mha", f"{role}.weight")
        assert mamba[role].path == "backbone.layers.0.mixer"
    assert mamba["in_proj"].kind == "linear"
    a = anatomies["encoder"]
    assert [(p.path, p.param) for p in a.places if p.role == "o"][0] == (
        "encoder.layers.0.self_attn", "out_proj.weight")


@contextmanager
def standing_in(model: nn.Module, name: str, value: torch.Tensor):
    """`value` answers for a parameter without touching it."""
    owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    owner.__dict__[leaf] = value
    try:
        yield
    finally:
        del owner.__dict__[leaf]


@pytest.mark.parametrize("name", NAMES)
def test_the_module_of_a_place_runs_and_reads_the_weight(name):
    """Another weight on it changes the loss; of a tied weight, on the modules that share it."""
    model, batch = tiny(name, dtype=torch.float64)
    a = Anatomy.of(model)
    ran: set[str] = set()
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, path=path: ran.add(path))
    with torch.no_grad():
        before = model(**batch).loss
        for p in a.places:
            stored = p.stored(model.get_submodule(p.path)).detach()
            assert p.path in ran or a.tied(p), p.name
            with ExitStack() as stack:
                for full in (p.name, *a.tied(p)):
                    stack.enter_context(standing_in(model, full, stored + torch.randn_like(stored)))
                assert not torch.equal(before, model(**batch).loss), p.name


def test_tied_weights_appear_once(anatomies):
    assert anatomies["gpt2"].aliases == {"lm_head.weight": "transformer.wte.weight"}
    a = anatomies["t5"]
    assert set(a.aliases) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
                              "lm_head.weight"}
    assert set(a.aliases.values()) == {"shared.weight"}
    assert sum("tied" in n for n in a.notes) == 3
    assert a.tied(a.places[0]) == tuple(a.aliases)
    assert anatomies["llama"].aliases == {}
    assert anatomies["llama"].tied(anatomies["llama"].places[0]) == ()


def test_the_ends(anatomies):
    def ends(name):
        a = anatomies[name]
        return a.embeddings, a.final_norm

    assert ends("vit") == (("vit.embeddings.patch_embeddings.projection",), "vit.layernorm")
    assert ends("bert") == (("bert.embeddings.word_embeddings",), None)
    assert ends("llama") == (("model.embed_tokens",), "model.norm")
    assert ends("timm_qkv") == (("patch_embed.proj",), "norm")
    assert ends("t5") == (("shared",), "decoder.final_layer_norm")
    assert anatomies["clip"].final_norms == {
        "text_model.encoder.layers": "text_model.final_layer_norm",
        "vision_model.encoder.layers": "vision_model.post_layernorm"}
    assert len(anatomies["cnn"].norms) == 2 and len(anatomies["swin"].norms) == 9


def test_an_unknown_model_is_read_off_its_modules():
    class Piece(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
            self.strange = nn.Linear(8, 8)

    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Piece(), Piece()), nn.Linear(8, 5))
    a = Anatomy.of(model)
    assert [b.path for b in a.blocks] == ["1.0", "1.1"]
    assert roles(a) == {"": 3, "fc1": 2, "fc2": 2, "head": 1}
    assert a.head == ("2",) and a.head_kind == "classification"
    assert any("head is guessed" in n for n in a.notes)
    assert any("shape" in n for n in a.notes) and any("no role" in n for n in a.notes)


def test_a_lone_layer_is_no_head():
    assert Anatomy.of(nn.Linear(4, 3)).head == ()
    assert Anatomy.of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).head == ()
    assert Anatomy.of(nn.Linear(4, 3)).places[0].name == "weight"


def test_base_models_have_no_head():
    import transformers

    for cls, name in ((transformers.BertModel, "bert"), (transformers.ViTModel, "vit")):
        a = Anatomy.of(cls(config(name)))
        assert (a.head, a.head_kind) == ((), "none") and len(a.blocks) == 2


def test_weights_that_are_no_matrices_are_named():
    a = Anatomy.of(nn.Sequential(nn.LSTM(4, 4)))
    assert a.places == [] and "recurrent" in a.notes[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder"])
def test_a_tuned_model_reads_as_before(name):
    model, _ = tiny(name)
    before = Anatomy.of(model)
    burnish.tune(model, "nf4 + lora(rank=2)", targets="mlp")
    after = Anatomy.of(model)
    assert (after.places, after.blocks, after.norms) == (before.places, before.blocks, before.norms)


# -- batches ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_the_batch_of_a_tiny_model_trains_all_of_it(name):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model, batch = tiny(name, batch=3)
    assert torch.equal(state, torch.get_rng_state())
    loss = model(**batch).loss
    loss.backward()
    assert loss.dim() == 0 and torch.isfinite(loss) and model.training
    idle = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not idle
    again, _ = tiny(name)
    assert all(torch.equal(a, b) for a, b in
               zip(model.parameters(), again.parameters(), strict=True))


def test_dropout_is_off_unless_asked():
    for name in ("vit", "bert", "gpt2", "t5", "encoder", "timm_qkv"):
        model, batch = tiny(name)
        assert torch.equal(model(**batch).loss, model(**batch).loss)
        model, batch = tiny(name, dropout=0.5)
        assert not torch.equal(model(**batch).loss, model(**batch).loss)


def test_unknown_names_are_answered():
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        tiny("lama")
    with pytest.raises(ConfigError, match="plain torch"):
        config("mlp")
    with pytest.raises(ConfigError, match="does not say what it takes"):
        example_batch(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="not positive"):
        example_batch(config("vit"), 0)


def test_batches_of_real_sizes_without_data():
    import transformers

    made = {
        "vit": transformers.ViTConfig(architectures=["ViTForImageClassification"]),
        "llama": transformers.LlamaConfig(architectures=["LlamaForCausalLM"]),
        "roberta": transformers.RobertaConfig(max_position_embeddings=514,
                                              architectures=["RobertaForSequenceClassification"]),
        "clip": transformers.CLIPConfig(architectures=["CLIPModel"]),
        "whisper": transformers.WhisperConfig(architectures=["WhisperForConditionalGeneration"]),
        "wav2vec2": transformers.Wav2Vec2Config(
            architectures=["Wav2Vec2ForSequenceClassification"]),
    }
    with FakeTensorMode():
        shapes = {n: {k: tuple(getattr(v, "shape", ())) for k, v in example_batch(
            c, (4, 256) if n == "llama" else 4).items()} for n, c in made.items()}
    assert shapes["vit"] == {"pixel_values": (4, 3, 224, 224), "labels": (4,)}
    assert shapes["llama"] == {"input_ids": (4, 256), "labels": (4, 256)}
    assert shapes["roberta"] == {"input_ids": (4, 512), "labels": (4,)}
    assert shapes["clip"] == {"input_ids": (4, 77), "pixel_values": (4, 3, 224, 224),
                              "return_loss": ()}
    assert shapes["whisper"]["input_features"] == (4, 80, 3000)
    assert shapes["wav2vec2"] == {"input_values": (4, 16000), "labels": (4,)}


def test_a_mapping_is_the_batch():
    given = {"x": torch.zeros(1)}
    assert example_batch(config("vit"), given) == given
