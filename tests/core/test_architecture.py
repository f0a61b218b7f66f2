"""A bare config stands for what people train of its type, or the choice is asked."""

from __future__ import annotations

import json

import pytest
import transformers

import burnish
from burnish.core.architecture import architecture
from burnish.core.errors import ConfigError
from burnish.core.example import example_batch

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 128}


@pytest.mark.parametrize(("config", "means"), [
    ("LlamaConfig", "LlamaForCausalLM"), ("MixtralConfig", "MixtralForCausalLM"),
    ("GPT2Config", "GPT2LMHeadModel"), ("MambaConfig", "MambaForCausalLM"),
    ("T5Config", "T5ForConditionalGeneration"), ("BartConfig", "BartForConditionalGeneration"),
    ("WhisperConfig", "WhisperForConditionalGeneration"),
    ("ViTConfig", "ViTForImageClassification"), ("CLIPConfig", "CLIPModel")])
def test_a_bare_config_stands_for_what_people_train(config, means):
    assert architecture(getattr(transformers, config)()).__name__ == means


def test_what_is_listed_is_meant():
    config = transformers.LlamaConfig(architectures=["LlamaForSequenceClassification"])
    assert architecture(config).__name__ == "LlamaForSequenceClassification"
    assert architecture(transformers.LlamaConfig(architectures=["LlamaModel"])
                        ).__name__ == "LlamaModel"
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        architecture(transformers.LlamaConfig(architectures=["LlamaForCasualLM"]))


@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig"])
def test_an_encoder_of_text_is_asked_about_by_name(config):
    with pytest.raises(ConfigError, match="ForSequenceClassification.*ForTokenClassification"):
        architecture(getattr(transformers, config)())
    with pytest.raises(ConfigError, match="architectures"):
        burnish.simulate(getattr(transformers, config)(num_hidden_layers=1), "lora", (2, 8))


def test_a_bare_llama_is_planned_with_its_head():
    bare = transformers.LlamaConfig(**SMALL)
    said = transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    ours, theirs = (burnish.simulate(c, "lora(rank=2)", (2, 8)) for c in (bare, said))
    assert ours.to_dict() == theirs.to_dict()
    assert burnish.plan(bare, "1GB", (2, 8), candidates=["lora(rank=2)"]).best.peak_bytes \
        == theirs.peak_bytes
    assert "labels" in example_batch(bare, (2, 8))


def test_a_folder_whose_config_lists_nothing_loads_with_its_head(tmp_path):
    from burnish.cli import target

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    del said["architectures"]
    file.write_text(json.dumps(said))
    assert type(target.model(str(tmp_path))).__name__ == "LlamaForCausalLM"
