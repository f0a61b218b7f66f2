"""Small models of real architectures, for our tests and other people's.

Each has two blocks, width about 32 and seeded random weights, and comes with a batch for which
``model(**batch).loss`` is a scalar. The transformers ones are the library's own classes built from
a small config, so module names, fused weights, ties and shapes are those of the large models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.draw import drawn
from ..core.errors import ConfigError, nearest
from ..core.example import example_batch
from .graphs import GraphNetwork
from .plain import CLASSES, AttentionPool, Cnn, Encoder, Perceptron, VisionTransformer
from .points import PointTransformer

_TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_TEXT, "intermediate_size": 64, "max_position_embeddings": 34, "num_labels": CLASSES,
         "pad_token_id": 0}
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": CLASSES}
_LLAMA = {**_TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: name -> (config class, model class, settings)
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", _VIT),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _VIT),
    "swin": ("SwinConfig", "SwinForImageClassification",
             {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1],
              "num_heads": [2, 4], "window_size": 4, "num_labels": CLASSES}),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification",
                 {"image_size": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2,
                  "layer_scale_init_value": 0.5,         # at 1e-6 nothing in a block is seen
                  "num_labels": CLASSES}),
    "bert": ("BertConfig", "BertForSequenceClassification", _BERT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _BERT),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel",
             {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
              **_IDS}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM",
                {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM",
                 {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
    "t5": ("T5Config", "T5ForConditionalGeneration",
           {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
            "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "clip": ("CLIPConfig", "CLIPModel",
             {"text_config": {**_TEXT, "intermediate_size": 64, "max_position_embeddings": 16,
                              "projection_dim": 16, **_IDS},
              "vision_config": {**_VIT, "projection_dim": 16}, "projection_dim": 16,
              # at the usual 2.66 a cosine's rounding in bf16 is a fiftieth of the loss
              "logit_scale_init_value": 1.0}),
    "mamba": ("MambaConfig", "MambaForCausalLM",
              {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
               "time_step_rank": 8,
               "tie_word_embeddings": False, **_IDS}),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                 "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
                 "max_source_positions": 8, "max_target_positions": 16,
                 "decoder_start_token_id": 1, **_IDS}),
}


_PLAIN: dict[str, Callable[..., nn.Module]] = {
    "timm_qkv": VisionTransformer, "encoder": Encoder, "mha": AttentionPool, "cnn": Cnn,
    "mlp": Perceptron, "points": PointTransformer, "graphs": GraphNetwork,
}

NAMES: tuple[str, ...] = (*_TRANSFORMERS, *_PLAIN)


# -- the face ---------------------------------------------------------------------------------
def tiny(name: str, *, meta: bool = False, dropout: float = 0.0, seed: int = 0, batch: int = 2,
         dtype: torch.dtype | None = None, **settings: Any
         ) -> tuple[nn.Module, dict[str, Any]]:
    """One of :data:`NAMES`, in training mode, and a batch for it: (model, batch).

    meta: parameters on the meta device (the batch stays real: its integers have values).
    dropout: probability of every dropout of the model.
    settings: fields of the config to set otherwise (transformers models only).
    The global random state stays as it was.
    """
    _known(name)
    with drawn(seed):
        if name in _PLAIN:
            if settings:
                raise ConfigError(f"{name} takes no settings, got {', '.join(settings)}")
            with torch.device("meta" if meta else "cpu"):
                model = _PLAIN[name](dropout=dropout)
        else:
            model = _build(name, config(name, dropout=dropout, **settings), meta)
    if dtype is not None:
        model = model.to(dtype)
    if dtype == torch.float64 and name in ("mixtral", "qwen_moe"):
        model.set_experts_implementation("eager")           # the grouped kernel has no float64
    text = getattr(model, "main_input_name", "") == "input_ids" or name == "whisper"
    data = example_batch(model, (batch, 8) if text else batch)
    if name == "clip":
        data["input_ids"][:, 1:4] = 3                       # placeholders, as its prompts have them
        data["input_ids"][:, 4:].clamp_(max=62)[:, -1] = 63     # and an end
    if dtype is not None:
        data = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in data.items()}
    return model.train(), data


def config(name: str, *, dropout: float = 0.0, **settings: Any) -> Any:
    """The small transformers config behind `name`; names its architecture.

    Raises ConfigError for an unknown name and for the plain torch models, which have none.
    """
    _known(name)
    if name in _PLAIN:
        raise ConfigError(f"{name} is a plain torch module and has no config; configs exist for "
                          f"{', '.join(_TRANSFORMERS)}")
    import transformers

    cls, architecture, fields = _TRANSFORMERS[name]
    made = getattr(transformers, cls)(**{**fields, **settings})
    made.architectures = [architecture]
    for part in (made, *(getattr(made, k, None) for k in ("text_config", "vision_config"))):
        for key, value in vars(part).items() if part is not None else ():
            if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float):
                setattr(part, key, dropout)
            elif key == "drop_path_rate":                   # drops whole blocks: not a dropout
                setattr(part, key, 0.0)
    return made


def _build(name: str, made: Any, meta: bool) -> nn.Module:
    import transformers
    from transformers import initialization

    cls = getattr(transformers, _TRANSFORMERS[name][1])
    if not meta:
        return cls._from_config(made)
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        return cls._from_config(made)


def _known(name: str) -> None:
    if name not in NAMES:
        raise ConfigError(f"unknown model {name!r}{nearest(name, NAMES)} "
                          f"(there are {', '.join(NAMES)})")
