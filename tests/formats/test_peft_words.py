"""What a LoraConfig can say, and how it is said here: the same tensors train."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

import burnish
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SAID = {
    "rank_pattern": ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
                     "lora(rank=4, targets='q') + lora(rank=2, targets='v')"),
    "layers_to_transform": ({"target_modules": ["q_proj"], "layers_to_transform": [1]},
                            "lora(rank=4, targets='q@1')"),
    "exclude_modules": ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
                        "lora(rank=4, targets='-down')"),
    "a pattern": ({"target_modules": r".*\.0\..*\.(q|k)_proj"},
                  r"lora(rank=4, targets='re:.*\.0\..*\.(q|k)_proj')"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
                        "lora(rank=4, targets='q') + full(targets='embed_tokens')"),
    "trainable_token_indices": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
                                "lora(rank=4, targets='q') + trainable_tokens(ids=(3, 5))"),
    "use_dora": ({"target_modules": ["q_proj"], "use_dora": True},
                 "dora(rank=4, targets='q')"),
    "bias": ({"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
             "lora(rank=4, targets='c_attn') + bitfit"),
    "lora_only": ({"target_modules": ["c_fc"], "bias": "lora_only", "fan_in_fan_out": True},
                  "lora(rank=4, targets='c_fc') + bitfit(targets='c_fc')"),
    "target_parameters": ({"target_modules": [], "target_parameters": [
        "experts.gate_up_proj", "experts.down_proj"]}, "lora(rank=4, targets='experts')"),
}
MODEL = {"bias": "gpt2", "lora_only": "gpt2", "target_parameters": "mixtral"}


@pytest.mark.parametrize("name", SAID)
def test_what_a_config_says_has_a_spelling(name):
    config, recipe = SAID[name]
    model = MODEL.get(name, "llama")
    theirs = get_peft_model(tiny(model)[0], LoraConfig(r=4, **config))
    ours = burnish.tune(tiny(model)[0], recipe, head=False)

    def sizes(parameters):
        return sorted(p.numel() for p in parameters if p.requires_grad)

    assert sizes(ours.parameters()) == sizes(theirs.parameters())
