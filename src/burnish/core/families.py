"""The facts of architectures, and nowhere else: what a name in a published model means.

A weight's role follows from its leaf name and from where it stands: ``dense`` ends attention in
BERT's ``attention.output``, starts the MLP in ``intermediate`` and is a pooler elsewhere. So the
place in the tree (its context) is told first, from the names and classes above the weight, and
each context has its own table. Everything here is about names; shapes are read off the modules.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# -- roles ------------------------------------------------------------------------------------
#: a matrix's part in self-attention; cross-attention carries ``cross_`` in front
ATTENTION = ("q", "k", "v", "qkv", "kv", "o", "q_a", "q_b", "kv_a", "kv_b")
CROSS = tuple(f"cross_{r}" for r in ATTENTION)
#: fc1, fc2: two-matrix MLP.  gate, up, down: gated MLP; gate_up: the first two in one matrix
MLP = ("fc1", "fc2", "gate", "up", "gate_up", "down")
#: a state-space mixer
MIXER = ("in_proj", "x_proj", "dt_proj", "out_proj")
OTHER = ("router", "embed", "position", "type", "patch", "reduction", "pooler", "conv", "head")
ROLES = (*ATTENTION, *CROSS, *MLP, *MIXER, *OTHER)

_ATTENTION = {
    "q": "q q_proj query to_q wq Wq q_lin linear_q query_proj q_attn q_linear q_head q_proj_weight",
    "k": "k k_proj key to_k wk Wk k_lin linear_k key_proj k_linear k_head k_proj_weight",
    "v": "v v_proj value to_v wv Wv v_lin linear_v value_proj v_linear v_head v_proj_weight",
    "qkv": "qkv qkv_proj Wqkv c_attn query_key_value in_proj_weight to_qkv in_proj wqkv "
           "qkv_linear c_qkv",
    "kv": "kv kv_proj to_kv key_value kv_linear",
    "o": "o o_proj out_proj proj c_proj dense to_out wo Wo out_lin linear_out out output_proj "
         "out_linear attn_out o_linear projection post_proj",
    "q_a": "q_a_proj wq_a", "q_b": "q_b_proj wq_b",
    "kv_a": "kv_a_proj_with_mqa kv_a_proj wkv_a", "kv_b": "kv_b_proj wkv_b",
}
_MLP = {
    "fc1": "fc1 c_fc dense_h_to_4h linear1 lin1 wi fc_in pwconv1 linear_fc1 conv_pw dense1 "
           "linear_1 intermediate_dense ffn",
    "fc2": "fc2 c_proj dense_4h_to_h linear2 lin2 wo fc_out pwconv2 linear_fc2 dense2 linear_2 "
           "output_dense ffn_output",
    "gate": "gate_proj wi_0 w1 gate",
    "up": "up_proj wi_1 w3 up",
    "down": "down_proj w2 down Wo",
    "gate_up": "gate_up_proj Wi w12",
}
_MIXER = {"in_proj": "in_proj in_proj_qkvz", "x_proj": "x_proj", "dt_proj": "dt_proj",
          "out_proj": "out_proj", "conv": "conv1d"}


def _by_leaf(table: dict[str, str]) -> dict[str, str]:
    return {leaf: role for role, leaves in table.items() for leaf in leaves.split()}


#: context -> leaf name -> role
LEAVES = {"attention": _by_leaf(_ATTENTION), "mlp": _by_leaf(_MLP), "mixer": _by_leaf(_MIXER)}
#: leaf names that say their role wherever they stand (Whisper's fc1 has no MLP module)
_BARE = {leaf: role for leaf, role in LEAVES["mlp"].items()
         if leaf not in ("c_proj", "wo", "Wo", "gate", "up", "down")}
_BARE |= {leaf: role for leaf, role in LEAVES["attention"].items()
          if role in ("q", "k", "v", "qkv") and len(leaf) > 2 and leaf not in ("in_proj", "c_attn")}
_BARE |= {"o_proj": "o"}

# -- contexts ---------------------------------------------------------------------------------
_CROSS_NAMES = re.compile(
    r"encoder_attn|EncDecAttention|cross_?attn|cross_?attention|multihead_attn|enc_attn"
    r"|encoder_decoder_attention", re.I)
_ATTENTION_NAMES = re.compile(r"^(attn|attention|self_attn|self_attention|SelfAttention|mha|self"
                              r"|linear_attn|attn\d)$")
_MLP_NAMES = re.compile(r"^(mlp|ffn|feed_forward|feedforward|ff|DenseReluDense|block_sparse_moe"
                        r"|experts?|shared_experts?|moe)$")
_MLP_CLASS = re.compile(r"mlp|feed_?forward|ffn|denseact|densegatedact|expert", re.I)
#: classes of attentions, one of which may be a block by itself
ATTENTION_CLASS = re.compile(r"Attention$")
_MIXER_CLASS = re.compile(r"mamba\d?mixer|ssm", re.I)
_ROUTER = re.compile(r"^(router|gate|shared_expert_gate)$")
_PATCH = re.compile(r"patch_?embed|patch_projection", re.I)
_REDUCTION = re.compile(r"^(reduction|downsample\w*|downsampling_layer)$")
#: modules that make a vector of a time step or of another condition, an MLP of their own
_EMBEDDER = re.compile(r"^(time|timestep|add|label|class|text)\w*_embed(d|ding|der)?\w*$|^emb$")
_POSITION = re.compile(r"pos|relative_attention_bias|^wpe$", re.I)
_TYPE = re.compile(r"token_type|segment|lang_embed", re.I)


def role(path: str, classes: list[str], kind: str, block: str | None, moe: bool = False,
         crossed: bool = False) -> str:
    """What the weight at `path` does, or "" where its name does not say.

    classes: class names of the modules above it, from the root down to its direct parent (one
        per component of `path`).
    block: path of the block it stands in.  moe: a module above it owns experts.  crossed: one says
        that it is cross-attention.
    """
    parts = path.split(".")
    leaf, above = parts[-1], parts[:-1]
    start = len(block.split(".")) if block else 0
    if kind == "embedding":
        if _POSITION.search(leaf):
            return "position"
        return "type" if _TYPE.search(leaf) else "embed"
    if any(_PATCH.search(p) for p in parts):
        return "patch"
    if any(_REDUCTION.match(p) for p in parts):
        return "reduction"
    if moe and "experts" not in above and (_ROUTER.match(leaf) or "router" in above[start:]):
        return "router"
    if leaf == "to_out" or above[-1:] == ["to_out"]:          # Sequential(Linear, Dropout)
        return _cross("o", above[start:], crossed)
    if leaf == "proj" and classes and GATE_LAST.match(classes[-1]):
        return "gate_up"
    found = _context(above[start:], classes[start:])
    if found:
        known = LEAVES[found].get(leaf, "")
        if known:
            return _cross(known, above[start:], crossed) if found == "attention" else known
    if kind == "conv":
        return "conv"
    if "pooler" in parts:
        return "pooler"
    if leaf == "dense" and block and above[-1] in ("intermediate", "output"):
        return "fc1" if above[-1] == "intermediate" else "fc2"
    bare = _BARE.get(leaf, "") if not found and not any(_EMBEDDER.search(p) for p in above) else ""
    return f"cross_{bare}" if crossed and bare in ATTENTION else bare


def context(path: str, classes: list[str], block: str | None) -> str:
    """"attention", "mlp", "mixer" or "": what the nearest telling module above is."""
    start = len(block.split(".")) if block else 0
    above = path.split(".")[:-1]
    return _context(above[start:], classes[start:])


def _context(above: list[str], classes: list[str]) -> str:
    for name, cls in zip(reversed(above), reversed(classes), strict=True):
        if _MIXER_CLASS.search(cls):
            return "mixer"
        if _MLP_NAMES.match(name) or _MLP_CLASS.search(cls):
            return "mlp"
        if _ATTENTION_NAMES.match(name) or _CROSS_NAMES.search(name) or \
                cls.endswith(("Attention", "SdpaAttention")):
            return "attention"
    return ""


def _cross(found: str, above: list[str], crossed: bool) -> str:
    return f"cross_{found}" if crossed or any(_CROSS_NAMES.search(a) for a in above) else found


def is_cross(path: str) -> bool:
    """A module of cross-attention by its name."""
    return any(_CROSS_NAMES.search(p) for p in path.split("."))


# -- several matrices in one --------------------------------------------------------------------
#: fused role -> the roles of its runs of rows, in order
FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up")}
#: fused weights whose parts are interleaved head by head, so they are no runs of rows:
#: leaf name (any model), or (model_type, leaf name)
INTERLEAVED: frozenset[str | tuple[str, str]] = frozenset({
    "query_key_value",                  # GPT-NeoX, Bloom, Falcon, Persimmon: (head, 3, width)
    ("codegen", "qkv_proj"),            # (4 shards, q|v|k)
    ("gpt_bigcode", "c_attn"),
    ("deberta", "in_proj"),             # (head, q|k|v)
    ("internlm2", "wqkv"),              # (kv head, queries | k | v)
    "in_proj_qkvz",
})


def interleaved(model_type: str, leaf: str) -> bool:
    return leaf in INTERLEAVED or (model_type, leaf) in INTERLEAVED


#: classes whose one linear `proj` makes what is gated and, in the rows behind it, the gate
GATE_LAST = re.compile(r"^(GEGLU|SwiGLU)$")


def gate_last(above: nn.Module) -> bool:
    """Do the rows of the gate follow those of what is gated, in a linear right below `above`?"""
    return any(GATE_LAST.match(c.__name__) for c in type(above).__mro__)


def runs(fused: str, out: int, heads: int | None, kv_heads: int | None, gate_last: bool = False
         ) -> tuple[tuple[str, tuple[int, int]], ...]:
    """((role, (first row, last row + 1)), ...) of a fused weight of `out` rows; () if unclear.

    With h query heads and k key heads of width d, ``out = (h + 2k) d``; else equal parts.
    """
    cross, _, base = fused.rpartition("_") if fused.startswith("cross_") else ("", "", fused)
    names = [f"{cross}_{p}" if cross else p for p in FUSED.get(base, ())]
    names = names[::-1] if base == "gate_up" and gate_last else names
    if base == "qkv" and heads and kv_heads and heads != kv_heads:
        if out % (heads + 2 * kv_heads):
            return ()
        width = out // (heads + 2 * kv_heads)
        sizes = [heads * width, kv_heads * width, kv_heads * width]
    elif not names or out % len(names):
        return ()
    else:
        sizes = [out // len(names)] * len(names)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple((n, (e - s, e)) for n, s, e in zip(names, sizes, ends, strict=True))


# -- weights read past the module that owns them --------------------------------------------------
#: class name -> children whose weight it reads itself, so that nothing put on the child runs
BYPASS = {
    "MultiheadAttention": ("out_proj",),
    "DisentangledSelfAttention": ("in_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
#: class name -> modules that its forward runs without a graph, whatever the caller asks for; those
#: that follow each other together
UNGRADED = {
    "CLIPSegForImageSegmentation": (("clip.vision_model", "clip.visual_projection"),
                                    ("clip.text_model", "clip.text_projection")),
}
#: the fused kernels of state-space mixers (modules that own A_log) take these as plain tensors
MIXER_BYPASS = ("conv1d", "x_proj", "dt_proj", "out_proj")

# -- blocks ------------------------------------------------------------------------------------
#: modules that repeat but only hold the blocks of one resolution
STAGE = re.compile(r"Stage$|BasicLayer$|ResNetLayer$|Level$"
                   r"|(Down|Up|Mid)(En|De)?(coder)?Block(2D|3D|Flat|Motion|CrossAttn|Spatio|Temporal)")
#: containers whose single child is a block all the same
LISTS = ("layers", "layer", "blocks", "block", "h", "stages", "resblocks", "albert_layers",
         "resnets", "attentions", "transformer_blocks")
#: lists of a U-Net's level whose entries run in turn: the first of each, the second of each
TURNS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
#: parts of a U-Net in the order in which they run, which is not that of its modules
IN_ORDER = ("down_blocks", "mid_block", "up_blocks")
#: lists inside a block, never lists of blocks
NOT_BLOCKS = re.compile(r"experts|heads|downsampl|upsampl|mlps$|projections$|predictor", re.I)

def turn(path: str) -> tuple[int, ...]:
    """Where a block with this path below a module runs among the others of that module, where
    names tell; equal (as they are written) elsewhere."""
    first, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    if first in TURNS and number.isdigit():
        return int(number), TURNS.index(first)
    return (IN_ORDER.index(first) if first in IN_ORDER else -1,)


# -- norms -------------------------------------------------------------------------------------
#: the norm of what the MLP reads, in blocks that also normalise what a sub-layer gives
BEFORE_MLP = re.compile(r"(^|_)pre_(feedforward|ffn|ff|mlp|expert)(_|$)")
#: the norm of what a sub-layer gives, before its residual (``post_attention_layernorm`` is this in
#: some and the one before the MLP in others)
BEHIND = re.compile(r"(^|_)post_(feedforward|ffn|ff|mlp|expert|self_attn|operator)(_|$)")

# -- clouds ------------------------------------------------------------------------------------
#: names of the module that returns neighbourhoods of points and, (B, G, 3), their centres
GROUPERS = ("group_divider",)

# -- ends --------------------------------------------------------------------------------------
#: top-level names under which a task head lives in models that do not say it themselves
HEADS = ("classifier", "head", "heads", "fc", "lm_head", "score", "logits", "classification_head",
         "head_dist", "cls_classifier", "distillation_classifier", "qa_outputs", "embed_out",
         "proj_out", "output_projection", "vocab_projector", "pre_classifier", "cls")
#: architectures (class names) that carry a task head
TASK = re.compile(r"For[A-Z]|LMHead|WithLMHead|DoubleHeads")
#: architectures whose head speaks the vocabulary
LM = re.compile(r"For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining|Speech2?Text|"
                r"SpeechSeq2Seq)|LMHead|DoubleHeads")
#: names of the norm after the last block
FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layernorm", "layer_norm",
              "norm_f", "post_layernorm", "final_norm", "ln_post", "ln_final", "ln_out")

# -- numbers -----------------------------------------------------------------------------------
#: attributes of attention modules or configs that hold a count, first found wins
HEAD_COUNT = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead",
              "encoder_attention_heads", "heads")
KV_COUNT = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
WIDTH = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
#: model types whose first position is the padding index + 1
OFFSET_POSITIONS = frozenset({
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet",
    "data2vec-text", "longformer", "ibert", "xmod", "esm", "luke", "markuplm", "layoutlmv3",
    "lilt"})


def rotary(model: nn.Module) -> bool:
    """Are its positions rotations of queries and keys?"""
    return any("rotary" in type(m).__name__.lower() for m in model.modules())


def positions_of(model: nn.Module) -> tuple[int, bool] | None:
    """(tokens of the longest row, is that a hard end?); None where the model does not say.

    A table of positions ends; rotary and relative positions only have not been trained further.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    hard = any(isinstance(m, nn.Embedding) and limit <= m.num_embeddings <= limit + 2
               and any(w in name.rpartition(".")[2] for w in ("position", "wpe"))
               for name, m in model.named_modules())
    if getattr(text, "model_type", "") in OFFSET_POSITIONS:
        limit -= (text.pad_token_id or 0) + 1
    return limit, hard
