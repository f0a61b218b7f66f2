"""Configurations of LLaMA-Factory and axolotl: each key used, without a counterpart, or refused."""

from __future__ import annotations

import json

import pytest

import burnish
from burnish.cli import config, main
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.fit.arguments import sort_out
from burnish.fit.foreign import refusal, translated

FACTORY = """
### model
model_name_or_path: {model}
trust_remote_code: false
quantization_bit: 4
quantization_method: bnb

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: talks
template: qwen3_nothink
cutoff_len: 64
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: {out}
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: false
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
AXOLOTL = """
base_model: {model}
load_in_8bit: false
load_in_4bit: true
strict: false

datasets:
  - path: {data}
    type: chat_template
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: {out}

adapter: qlora
lora_model_dir:

sequence_len: 64
sample_packing: true
eval_sample_packing: true

lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - q_proj

wandb_project:
wandb_entity:

gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002

bf16: auto
tf32: false

gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true

loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3

warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""


@pytest.fixture
def talks(tmp_path):
    """Rows, and the table in which LLaMA-Factory finds them."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "talks.json").write_text(json.dumps([
        {"conversations": [{"from": "human", "value": f"the cat {i}"},
                           {"from": "gpt", "value": "sat on the mat"}]} for i in range(12)]))
    (folder / "dataset_info.json").write_text(json.dumps({
        "talks": {"file_name": "talks.json", "formatting": "sharegpt",
                  "columns": {"messages": "conversations"}},
        "pairs": {"file_name": "p.json", "columns": {"prompt": "q", "response": "a"}},
        "odd": {"file_name": "p.json", "columns": {"prompt": "q", "query": "x"}},
        "hub": {"hf_hub_url": "owner/name", "ms_hub_url": "x/y", "split": "train"},
        "other": {"ms_hub_url": "x/y", "file_name": "talks.json"}, "torn": {"columns": "q"},
        "texts": {"file_name": "t.json", "columns": {"prompt": "body"}}}))
    return folder / "talks.json"


def read(tmp_path, text, **more):
    path = tmp_path / "train.yaml"
    path.write_text(text.format(model="m/base", data="d.jsonl", out="saves/x"))
    return translated({**config.read(path), **more}, tmp_path)


def test_llama_factory_key_by_key(tmp_path, talks):
    made = read(tmp_path, FACTORY)
    said = config.read(tmp_path / "train.yaml")
    assert made.of == "LLaMA-Factory" and not made.refused
    assert {*made.used, *made.left} == set(said) and not set(made.used) & set(made.left)
    assert str(parse(made.settings["recipe"])) == str(parse(
        "nf4 + lora(rank=8, alpha=16) + checkpoint"))
    assert made.settings["data"] == str(talks) and made.settings["max_length"] == 64
    assert made.settings["save_strategy"] == "steps" and made.settings["overwrite"] is True
    assert made.assumed == {"lora_alpha": "alpha=16", "validation": "validation=0",
                            "weight_decay": "weight_decay=0.0",
                            "load_best_model_at_end": "load_best_model_at_end=False"}
    assert "all rows are read" in made.left["max_samples"]
    assert made.left["resume_from_checkpoint"] == "says nothing"


def test_axolotl_key_by_key(tmp_path):
    made = read(tmp_path, AXOLOTL)
    said = config.read(tmp_path / "train.yaml")
    assert made.of == "axolotl" and not made.refused, made.refused
    assert {*made.used, *made.left} == set(said)
    assert str(parse(made.settings["recipe"])) == str(parse(
        "nf4 + lora(rank=16, alpha=32, dropout=0.05, targets='gate_proj,q_proj') + checkpoint + "
        "adam8bit"))
    settings = made.settings
    assert settings["data"] == "d.jsonl" and settings["learning_rate"] == 2e-4
    assert (settings["per_device_train_batch_size"], settings["num_train_epochs"]) == (2, 1)
    assert "says no" in made.left["load_in_8bit"]
    assert settings["packing"] is True and "do not see" in made.used["sample_packing"]


@pytest.mark.parametrize("text, more, settings, told", [
    (FACTORY, {"packing": True}, {"packing": True}, {"packing": "as with neat_packing"}),
    (FACTORY, {"packing": True, "neat_packing": True, "group_by_length": True}, {"packing": True},
     {"packing": "do not see", "neat_packing": "do not see", "group_by_length": "as long"}),
    (FACTORY, {"packing": False, "group_by_length": True}, {"group_by_length": True},
     {"packing": "says no", "group_by_length": "group_by_length=True"}),
    (FACTORY, {"stage": "pt", "packing": True, "group_by_length": True}, {},
     {"packing": "end to end", "group_by_length": "end to end"}),
    (FACTORY, {"stage": "pt", "packing": True, "neat_packing": True}, {"packing": True},
     {"packing": "do not see"}),
    (FACTORY, {"stage": "dpo", "packing": True, "group_by_length": True}, {"group_by_length": True},
     {"packing": "not packed"}),
    (AXOLOTL, {"group_by_length": True}, {"packing": True}, {"group_by_length": "as long"}),
    (AXOLOTL, {"sample_packing": False, "group_by_length": True}, {"group_by_length": True},
     {"sample_packing": "says no"}),
    (AXOLOTL, {"rl": "dpo"}, {}, {"sample_packing": "not packed"})])
def test_how_rows_stand_together_is_as_they_say(tmp_path, talks, text, more, settings, told):
    made = read(tmp_path, text, **more)
    found = {k: made.settings[k] for k in ("packing", "group_by_length") if k in made.settings}
    assert found == settings and not made.refused
    said = {**made.used, **made.left}
    assert all(why in said[key] for key, why in told.items()), said


@pytest.mark.parametrize("text", [FACTORY, AXOLOTL])
def test_what_is_made_of_them_are_settings_of_fit(tmp_path, talks, text):
    made = read(tmp_path, text)
    own = {"model", "data", "recipe", "output"}
    assert own < set(made.settings)
    sort_out({k: v for k, v in made.settings.items() if k not in own})


@pytest.mark.parametrize("more, recipe", [
    ({"quantization_bit": None, "use_dora": True}, "dora(rank=8, alpha=16) + checkpoint"),
    ({"quantization_bit": 8}, "int8 + lora(rank=8, alpha=16) + checkpoint"),
    ({"double_quantization": False},
     "nf4(double_quant=False) + lora(rank=8, alpha=16) + checkpoint"),
    ({"quantization_bit": None, "use_rslora": True, "lora_alpha": 3, "optim": "lion_32bit",
      "disable_gradient_checkpointing": True}, "lora(rank=8, alpha=3, scaling='rs') + lion"),
    ({"quantization_bit": None, "finetuning_type": "full", "lora_rank": None}, "full + checkpoint"),
    ({"additional_target": "embed_tokens,lm_head", "loraplus_lr_ratio": 16.0},
     "nf4 + lora(rank=8, alpha=16, b_rate=16.0) + full(targets='embed_tokens,lm_head') + "
     "checkpoint")])
def test_methods_become_recipes(tmp_path, talks, more, recipe):
    made = read(tmp_path, FACTORY, **more)
    assert not made.refused and str(parse(made.settings["recipe"])) == str(parse(recipe))


@pytest.mark.parametrize("text, more, key, says", [
    (FACTORY, {"stage": "ppo"}, "stage", "none of"), (FACTORY, {"finetuning_type": "freeze"},
                                                     "finetuning_type", "write --recipe"),
    (FACTORY, {"dataset": "talks,pairs"}, "dataset", "2 data sets"),
    (FACTORY, {"dataset": "talk"}, "dataset", "did you mean 'talks'"),
    (FACTORY, {"dataset": "odd"}, "dataset", "column"),
    (FACTORY, {"dataset": "other"}, "dataset", "ms_hub_url"),
    (FACTORY, {"dataset": "torn"}, "dataset", "its columns"),
    (FACTORY, {"train_on_prompt": True}, "train_on_prompt", "answers alone"),
    (FACTORY, {"use_galore": True}, "use_galore", "galore"),
    (FACTORY, {"lerning_rate": 1}, "lerning_rate", "did you mean 'learning_rate'"),
    (FACTORY, {"finetuning_type": "full"}, "quantization_bit", "not quantised"),
    (FACTORY, {"lora_rank": "x"}, "recipe", "rank"),
    (AXOLOTL, {"learning_rate": None}, "learning_rate", "give it"),
    (AXOLOTL, {"datasets": [{"path": "a"}, {"path": "b"}]}, "datasets", "2 data sets"),
    (AXOLOTL, {"datasets": [{"path": "a", "type": "input_output"}]}, "datasets", "its type"),
    (AXOLOTL, {"datasets": [{"path": "a", "type": "alpaca", "name": "x"}]}, "datasets", "its name"),
    (AXOLOTL, {"special_tokens": {"bos_token": "<s>"}}, "special_tokens", "--processor"),
    (AXOLOTL, {"optimizer": "muon"}, "optimizer", "write --recipe"),
    (AXOLOTL, {"load_in_4bit": False}, "adapter", "load_in_4bit"),
    (AXOLOTL, {"rl": "grpo"}, "rl", "none of"), (AXOLOTL, {"rl": "simpo"}, "rl", "cpo_alpha"),
    (AXOLOTL, {"lora_target_modules": None}, "adapter", "lora_target_linear"),
    (AXOLOTL, {"lora_alpha": None}, "lora_alpha", "give it"),
    (AXOLOTL, {"lora_target_linear": True, "lora_target_modules": ["lm_head"]},
     "lora_target_modules", "lm_head"),
    (AXOLOTL, {"chat_template": "chatml"}, "chat_template", "--processor"),
    (AXOLOTL, {"plugins": ["axolotl.integrations.kd.KDPlugin"]}, "plugins", "something else"),
    (AXOLOTL, {"load_in_8bit": True}, "load_in_8bit", "keep one"),
    (FACTORY, {"max_samples": 3}, "max_samples", "12"),
    (FACTORY, {"default_system": "Be brief."}, "default_system", "into the rows"),
    (FACTORY, {"quantization_method": "hqq"}, "quantization_method", "bnb"),
    (FACTORY, {"do_train": False}, "do_train", "evaluate")])
def test_what_would_learn_something_else_is_refused_with_its_key(tmp_path, talks, text, more, key,
                                                                 says):
    made = read(tmp_path, text, **more)
    assert key in made.refused and says in made.refused[key], made.refused
    assert key in refusal(made, tmp_path / "train.yaml") and key not in made.used


@pytest.mark.parametrize("first", [True, False])
def test_a_form_of_lora_is_taken_wherever_its_key_stands(tmp_path, first):
    pair = {"use_dora": True}, {"finetuning_type": "lora"}
    made = translated({**pair[not first], **pair[first], "model_name_or_path": "m"}, tmp_path)
    assert made.settings["recipe"].startswith("dora(")
    both = translated({"use_dora": True, "pissa_init": True, "stage": "sft"}, tmp_path)
    assert "pissa_init" in both.refused


@pytest.mark.parametrize("key", ["finetuning_type", "stage", "pref_loss", "optim", "adapter",
                                 "quantization_bit", "bf16", "lora_target", "plugins", "datasets",
                                 "additional_target"])
@pytest.mark.parametrize("value", [["lora", 3], {"a": [1]}, 7.5])
def test_values_of_another_kind_are_refused_with_their_key(tmp_path, talks, key, value):
    made = read(tmp_path, FACTORY, stage="dpo", **{key: value} if key != "stage" else {})
    made = made if key != "stage" else read(tmp_path, FACTORY, stage=value)
    assert key in made.refused or "recipe" in made.refused, (made.used, made.left)


def test_their_own_defaults_stand_where_nothing_is_said(tmp_path, talks):
    made = read(tmp_path, AXOLOTL, warmup_ratio=None)
    assert made.assumed["warmup_steps"] == "warmup_steps=0.03"
    assert "load_best_model_at_end" not in made.assumed     # both go by steps: the best is kept
    plain = read(tmp_path, AXOLOTL, evals_per_epoch=None)
    assert plain.settings["load_best_model_at_end"] is False
    for loss, more in (("hinge", {}), ("simpo", {"gamma": 0.5}), ("sigmoid", {})):
        made = read(tmp_path, FACTORY, stage="dpo", pref_loss=loss)
        assert made.settings["beta"] == 0.1
        assert {k: v for k, v in made.settings.items() if k == "gamma"} == more
    unsaid = read(tmp_path, FACTORY, pref_loss="simpo", pref_beta=0.3, simpo_gamma=1.0)
    assert "beta" not in unsaid.settings and "task" not in unsaid.settings     # stage is sft


@pytest.mark.parametrize("text, more, dtype", [
    (FACTORY, {}, "float32"), (FACTORY, {"pure_bf16": True}, "bfloat16"),
    (AXOLOTL, {"bf16": False}, "float32"), (AXOLOTL, {"bf16": "full"}, "bfloat16")])
def test_weights_that_all_train_are_held_as_theirs_are(tmp_path, talks, text, more, dtype):
    full = {"quantization_bit": None, "finetuning_type": "full"} if text is FACTORY else \
        {"adapter": None, "load_in_4bit": False}
    made = read(tmp_path, text, **full, **more)
    assert made.settings["dtype"] == dtype and not made.refused
    assert "bf16" not in made.settings
    assert "dtype" not in read(tmp_path, text).settings


def test_decay_is_told_where_nothing_decays(tmp_path, talks):
    assert "not decayed" in read(tmp_path, FACTORY, weight_decay=0.1).left["weight_decay"]
    for more in ({"additional_target": "lm_head"}, {"weight_decay": 0.0},
                 {"finetuning_type": "full", "quantization_bit": None}):
        assert "weight_decay" in read(tmp_path, FACTORY, **{"weight_decay": 0.1, **more}).used


def test_steps_of_evaluation_need_rows_to_evaluate_on(tmp_path, talks):
    made = read(tmp_path, FACTORY, eval_steps=5)
    assert "eval_strategy" not in made.settings
    assert read(tmp_path, FACTORY, eval_steps=5, val_size=0.1).settings["eval_strategy"] == "steps"
    made = read(tmp_path, AXOLOTL, eval_strategy="steps", eval_steps=5, val_set_size=0)
    assert "eval_strategy" not in made.settings and "eval_strategy" in made.left


def test_every_linear_layer_goes_before_a_list_of_some(tmp_path):
    made = read(tmp_path, AXOLOTL, lora_target_linear=True)
    assert "targets" not in made.settings["recipe"] and "lora_target_modules" in made.left


def test_a_flag_answers_what_is_refused(tmp_path, talks):
    said = {"use_galore": True, "chat_template_jinja": "x", "adapter_name_or_path": "x",
            "max_samples": 3}
    path = tmp_path / "train.yaml"
    assert set(read(tmp_path, FACTORY, **said).refused) == set(said)
    config_ = {**config.read(path), **said}
    made = translated(config_, tmp_path, frozenset({"recipe", "processor", "init_from", "data"}))
    assert not made.refused


def test_keys_are_not_taken_for_parts_of_the_translation(tmp_path, talks):
    names = ("loss", "targets", "columns", "tags", "whole", "recipe", "usual", "_class__")
    made = read(tmp_path, FACTORY, **dict.fromkeys(names, "x"))
    assert set(made.refused) == set(names)


def test_pairs_and_preferences_are_told_by_settings(tmp_path, talks):
    made = read(tmp_path, FACTORY, dataset="pairs", stage="dpo", pref_loss="simpo", pref_beta=0.2)
    assert (made.settings["prompt"], made.settings["completion"]) == ("q", "a")
    assert made.settings["task"] == "preference-tuning"
    assert (made.settings["loss_type"], made.settings["beta"]) == ("simpo", 0.2)
    hub = read(tmp_path, FACTORY, dataset="hub")
    assert hub.settings["data"] == "owner/name" and hub.settings["split"] == "train"


def test_documents_are_a_column_of_texts(tmp_path, talks):
    made = read(tmp_path, FACTORY, stage="pt", dataset="texts")
    assert made.settings["text"] == "body" and made.settings["task"] == "language-modelling"
    assert "dataset" in read(tmp_path, FACTORY, dataset="texts").refused


def test_fields_of_a_data_set_that_say_what_is_read_anyway(tmp_path):
    plain = {"path": "d.jsonl", "type": "chat_template"}
    usual = {"field_messages": "messages", "message_property_mappings": {
        "role": "role", "content": "content"}, "roles": {"user": ["user"]}, "split": None,
        "roles_to_train": ["assistant"], "name": None}
    assert read(tmp_path, AXOLOTL, datasets=[plain | usual]).settings["data"] == "d.jsonl"
    for odd in ({"roles": {"user": ["human"]}}, {"train_on_eos": "all"}, {"roles": "x"},
                {"roles_to_train": ["user", "assistant"]}):
        assert next(iter(odd)) in read(tmp_path, AXOLOTL, datasets=[plain | odd]).refused[
            "datasets"]


def test_files_of_neither_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither LLaMA-Factory"):
        translated({"lr": 1, "epochs": 3}, tmp_path)


def qwen(folder):
    from tests.e2e.conftest import bytelevel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=bytelevel(folder), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=128,
        eos_token_id=0, bos_token_id=None, pad_token_id=None)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", [FACTORY, AXOLOTL])
def test_fit_trains_by_either_and_says_what_became_of_each_key(tmp_path, talks, text, capsys):
    path = tmp_path / "train.yaml"
    path.write_text(text.format(model=qwen(tmp_path / "base"), data=talks, out=tmp_path / "out"))
    code = main(["fit", "--from-yaml", str(path), "--measure", "false", "--report", "false"])
    out, err = capsys.readouterr()
    assert code == 0, err
    head = out.partition("\n\n")[0]
    assert all(word in head for word in ("used:", "no counterpart:"))
    assert all(len(line) <= 80 for line in head.splitlines() if str(tmp_path) not in line)
    kept = json.loads((tmp_path / "out" / "run.json").read_text())
    assert kept["parts"][:2] == ["nf4", "lora"] and "checkpoint" in kept["parts"]
    assert kept["training"]["lr_scheduler_type"] == "cosine"


def test_flags_go_over_the_file_in_any_spelling(tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(burnish, "fit", lambda **kw: seen.update(kw) or "done")
    path = tmp_path / "train.yaml"
    path.write_text(FACTORY.format(model="m", data="", out="o"))      # no dataset_info.json here
    argv = ["fit", "--from-yaml", str(path)]
    assert main(argv) == 2
    assert "dataset_info.json here; give --data" in capsys.readouterr().err
    assert main([*argv, "--data", "mine.jsonl", "--lr", "1e-3", "--epochs", "2", "--recipe",
                 "full"]) == 0
    assert seen["data"] == "mine.jsonl" and seen["recipe"] == "full" and seen["lr"] == 1e-3
    assert "learning_rate" not in seen and "num_train_epochs" not in seen
    assert seen["per_device_train_batch_size"] == 2
    said = capsys.readouterr().out
    assert "dataset: --data says it" in said and "lora_rank: --recipe says it" in said
