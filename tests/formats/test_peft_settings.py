"""Every field of every config that PEFT writes of a type we read: acted upon, known to say nothing
of what is computed, or refused by its name."""

from __future__ import annotations

import dataclasses
import json
import re

import peft
import pytest
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import burnish
from burnish.core.errors import FormatError
from burnish.formats import peft_files, peft_prompts, peft_settings
from burnish.formats.peft import load_peft
from burnish.formats.peft_forms import FORMS
from burnish.formats.peft_variants import VARIANTS
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LINEAR = {"target_modules": ["q_proj"]}
CONFIGS = {
    "LORA": peft.LoraConfig(r=2, **LINEAR), "LOHA": peft.LoHaConfig(r=2, **LINEAR),
    "LOKR": peft.LoKrConfig(r=2, **LINEAR), "OFT": peft.OFTConfig(oft_block_size=8, **LINEAR),
    "BOFT": peft.BOFTConfig(boft_block_size=8, **LINEAR), "HRA": peft.HRAConfig(r=2, **LINEAR),
    "HIRA": peft.HiraConfig(r=2, **LINEAR), "MISS": peft.MissConfig(r=2, **LINEAR),
    "SHIRA": peft.ShiraConfig(r=2, **LINEAR), "VERA": peft.VeraConfig(r=4, **LINEAR),
    "ADALORA": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **LINEAR),
    "IA3": peft.IA3Config(feedforward_modules=[], **LINEAR),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=9, **LINEAR),
    "RANDLORA": peft.RandLoraConfig(r=4, **LINEAR),
    "LILY": peft.LilyConfig(r=2, **LINEAR),
    "POLY": peft.PolyConfig(r=2, n_tasks=3, n_skills=2, n_splits=4, **LINEAR),
    "PVERA": peft.PveraConfig(r=4, **LINEAR),
    "VBLORA": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, **LINEAR),
    "UNILORA": peft.UniLoraConfig(r=2, theta_d_length=20, **LINEAR),
    "TINYLORA": peft.TinyLoraConfig(r=2, u=5, **LINEAR),
    "WAVEFT": peft.WaveFTConfig(n_frequency=9, **LINEAR),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(target_modules=["embed_tokens"],
                                                   token_indices=[3, 4]),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8,
                                         task_type="CAUSAL_LM"),
    "CPT": peft.CPTConfig(cpt_token_ids=[5, 9, 7], cpt_tokens_type_mask=[1, 2, 4],
                          task_type="CAUSAL_LM"),
    "CARTRIDGE": peft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "OSF": peft.OSFConfig(**LINEAR), "PSOFT": peft.PsoftConfig(r=3, **LINEAR),
    "PEANUT": peft.PeanutConfig(r=2, **LINEAR), "DEFT": peft.DeftConfig(r=2, **LINEAR),
    "BEFT": peft.BeftConfig(**LINEAR), "ROAD": peft.RoadConfig(group_size=16, **LINEAR),
    "C3A": peft.C3AConfig(block_size=16, **LINEAR), "DELORA": peft.DeloraConfig(r=2, **LINEAR),
    "GRALORA": peft.GraloraConfig(r=4, gralora_k=2, **LINEAR),
    "FROD": peft.FrodConfig(sparse_rate=0.1, progressbar=False, **LINEAR),
    "ADAMSS": peft.AdamssConfig(r=8, num_subspaces=3, subspace_rank=2, **LINEAR),
    "GLORA": peft.GloraConfig(r=2, **LINEAR),
    "SUPERTUNING": peft.SupertuningConfig(sparsity=0.9, **LINEAR),
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
}
#: what PEFT does nothing with, or what stands in its tensors or in another field; the reason
NOTHING = {
    "where it came from": {"auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                           "inference_mode", "task_type"},
    "the tensors' names say it": {
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "modules_to_save", "feedforward_modules"},
    "how weights are stored, which is read off the module": {"fan_in_fan_out"},
    "how it began": {"init_weights", "init_ia3_weights", "loftq_config", "eva_config",
                     "corda_config", "lora_ga_config", "mask_type", "prompt_tuning_init",
                     "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
                     "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"},
    "what made the rows, which is gone": {
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
        "encoder_dropout", "prefix_projection", "token_dim", "num_attention_heads", "num_layers"},
    "stands beside a setting that is refused": {
        "qalora_group_size", "megatron_core"},
    "which clusters went on training, which no folder holds": {
        "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval",
        "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"},
    "how it runs": {"runtime_config"}, "nobody looks at it": {"cpt_mask"},
    "one tensor has one value": {"ensure_weight_tying"},
}


def test_every_type_of_the_installed_peft_is_read_or_refused_with_the_reason(tmp_path):
    there = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert set(there) == set(CONFIGS) | set(peft_settings.UNREAD)
    for kind, why in peft_settings.UNREAD.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(FormatError, match=f"of type {kind!r}: {re.escape(why)}"):
            load_peft(tiny("llama")[0], tmp_path)
    for kind, config in CONFIGS.items():
        assert type(config) is there[kind]


def test_every_type_is_here():
    forms = {f.kind for f in FORMS}
    assert set(CONFIGS) == forms | {"LORA", "LN_TUNING", *peft_prompts.PROMPTS}
    assert set(peft_settings.BIASED) == {
        k for k, c in CONFIGS.items() if hasattr(c, "bias")}


def other(field, value):
    """A value that is not the default's, of the same kind where that can be told."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"a": 1} if isinstance(value, dict) else ["a"] if isinstance(value, list) else "a"


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_field_is_read_past(kind, tmp_path):
    config = CONFIGS[kind]
    get_peft_model(tiny("llama")[0], config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    peft_files.read(tmp_path)
    form = peft_files.form_of(kind, said, tmp_path)
    silent = {n for names in NOTHING.values() for n in names}
    acts = peft_settings.known(kind, form) - silent
    if kind == "LORA":                           # each makes it another form: test_peft_lora.py
        acts |= {f.says for f in VARIANTS}
    for field in dataclasses.fields(config):
        file.write_text(json.dumps(said | {field.name: other(field.name, said.get(field.name))}))
        if field.name in acts or field.name in silent and \
                field.name in peft_settings.known(kind, form):
            continue
        with pytest.raises(FormatError, match=f"{field.name}.* has no counterpart in burnish"):
            load_peft(tiny("llama")[0], tmp_path)
    file.write_text(json.dumps(said | {"a_later_option": 2}))
    with pytest.raises(FormatError, match="a_later_option = 2 has no counterpart in burnish for"):
        load_peft(tiny("llama")[0], tmp_path)
    for idle in (None, False, 0, 0.0, "", [], {}):
        file.write_text(json.dumps(said | {"a_later_option": idle}))
        peft_files.read(tmp_path)


#: (type, field): a value that acts, and what is then so
ACTS = [
    ("LORA", "lora_dropout", 0.25, lambda r: r[0].dropout == 0.25),
    ("LORA", "lora_alpha", 3, lambda r: r[0].alpha == 3),
    ("LORA", "use_rslora", True, lambda r: r[0].scaling == "rs"),
    ("LORA", "alpha_pattern", {"q_proj": 5}, lambda r: r[0].alpha == 5),
    ("LORA", "rank_pattern", {"q_proj": 3}, "its settings say 3"),
    ("LORA", "r", 3, "its settings say 3"),
    ("LORA", "use_dora", True, "has no magnitude"),
    ("LORA", "lora_bias", True, "has no bias"),
    ("LORA", "velora_config", {"num_groups": 4, "scale": 2}, lambda r: r[1].groups == 4
     and r[1].scale == 2 and r[1].init == "mean"),
    ("LORA", "velora_config", {"init_type": "random"}, lambda r: r[1].init == "random"),
    ("LORA", "velora_config", {"init_type": "batch_average_once"}, "a first batch that is gone"),
    ("LORA", "velora_config", {"init_type": 3}, "init_type = 3 has no counterpart"),
    ("LORA", "velora_config", {"num_groups": "a"}, "velora"),
    ("LORA", "velora_config", {"num_groups": 0}, "1 group or more"),
    ("LORA", "velora_config", {"later": 0}, "later has no counterpart"),
    ("LORA", "velora_config", [3], "has no counterpart"),
    ("LORA", "layer_replication", [[0, 1], [0, 2]], lambda r: r[0].rank == 2),
    ("LORA", "layer_replication", [[0, 3]], "layer_replication: runs of blocks .* from 0 to 2"),
    ("LORA", "layer_replication", "a", "layer_replication: runs of blocks are pairs"),
    ("LORA", "monteclora_config", {"num_samples": 2}, lambda r: r[0].name == "lora"),
    ("LORA", "bias", "some", "expected 'none', 'all' or 'lora_only'"),
    ("LORA", "init_lora_weights", "pissa", "trained on a base PEFT had changed"),
    ("LORA", "trainable_token_indices", [3], "no tensor has their rows"),
    ("LOHA", "alpha", 5, lambda r: r[0].alpha == 5),
    ("LOHA", "alpha_pattern", {"q_proj": 5}, lambda r: r[0].alpha == 5),
    ("LOHA", "r", 3, "the model needs"),
    ("LOHA", "rank_pattern", {"q_proj": 3}, "the model needs"),
    ("LOKR", "decompose_factor", 2, "other shapes|the model needs"),
    ("LOKR", "decompose_both", True, lambda r: r[0].decompose_both),
    ("OFT", "use_cayley_neumann", False, lambda r: r[0].terms == 0),
    ("OFT", "num_cayley_neumann_terms", 7, lambda r: r[0].terms == 7),
    ("OFT", "coft", True, lambda r: r[0].bound is not None),
    ("HRA", "r", 3, "an odd number|the model needs"),
    ("HIRA", "r", 3, "its settings say 3"),
    ("MISS", "miss_dropout", 0.25, lambda r: r[0].dropout == 0.25),
    ("MISS", "r", 3, "its settings say 3"),
    ("FOURIERFT", "scaling", 3.0, lambda r: r[0].alpha == 3),
    ("FOURIERFT", "random_loc_seed", 3, lambda r: r[0].seed == 3),
    ("FOURIERFT", "n_frequency", 8, "the model needs"),
    ("LILY", "r", 3, "the model needs"), ("LILY", "scaling", 3, lambda r: r[0].scale == 3),
    ("LILY", "num_B", 3, "other shapes than this model needs"),
    ("LILY", "stride_A", 2, "lily_A.weight is not that of the layers which share it"),
    ("POLY", "r", 3, "the model needs"), ("POLY", "n_tasks", 2, "the model needs"),
    ("POLY", "n_skills", 4, "has 4 slices of 2 skills, its settings say 4 of 4"),
    ("POLY", "n_splits", 2, "has 4 slices of 2 skills, its settings say 2 of 2"),
    ("POLY", "poly_type", "other", "poly_type = 'other' has no counterpart"),
    ("PVERA", "r", 3, "the model needs"),
    ("PVERA", "d_initial", 0.5, lambda r: r[0].d_start == 0.5),
    ("PVERA", "pvera_dropout", 0.25, lambda r: r[0].dropout == 0.25),
    ("PVERA", "sample_at_inference", True, "sample_at_inference = True has no counterpart"),
    ("VBLORA", "topk", 3, lambda r: r[0].k == 3), ("VBLORA", "r", 3, "the model needs"),
    ("VBLORA", "num_vectors", 8, "the model needs"),
    ("VBLORA", "vector_length", 16, "the model needs"),
    ("VBLORA", "vblora_dropout", 0.25, lambda r: r[0].dropout == 0.25),
    ("VBLORA", "init_logits_std", 0.5, lambda r: r[0].std == 0.5),
    ("VBLORA", "save_only_topk_weights", True, "lacks vblora_logits_A_topk_indices"),
    ("UNILORA", "proj_seed", 3, lambda r: r[0].seed == 3),
    ("UNILORA", "r", 3, lambda r: r[0].rank == 3), ("UNILORA", "theta_d_length", 19, "the model n"),
    ("UNILORA", "target_modules", ["no_such"], "names no module of this model"),
    ("UNILORA", "target_modules", 3, "expected names or a pattern"),
    ("UNILORA", "unilora_dropout", 0.25, lambda r: r[0].dropout == 0.25),
    ("UNILORA", "init_theta_d_bound", 0.5, lambda r: r[0].start == 0.5),
    ("TINYLORA", "r", 3, "the model needs"), ("TINYLORA", "u", 4, "the model needs"),
    ("TINYLORA", "weight_tying", 1.0, "make 1 groups of matrices, and tinylora_v.1 is one more"),
    ("TINYLORA", "projection_seed", 3, lambda r: r[0].seed == 3),
    ("TINYLORA", "tinylora_dropout", 0.25, lambda r: r[0].dropout == 0.25),
    ("ADAPTION_PROMPT", "adapter_len", 4, "has 3 rows, its settings say 4"),
    ("ADAPTION_PROMPT", "adapter_layers", 2, "1 attentions have an adaption_prompt.*say 2"),
    ("FROD", "sparse_rate", 0.2, "the model needs"),
    ("FROD", "regularization_alpha", 1, lambda r: r[0].ridge == 1),
    ("FROD", "projection_prng_key", 3, lambda r: r[0].seed == 3),
    ("FROD", "frod_dropout", 0.25, lambda r: r[0].dropout == 0.25),
    ("ADAMSS", "r", 6, "the model needs"), ("ADAMSS", "num_subspaces", 4, "the model needs|lacks"),
    ("ADAMSS", "subspace_rank", 3, lambda r: r[0].each == 3),
    ("ADAMSS", "subspace_rank", 1, "the model needs rank 1 at most"),
    ("ADAMSS", "random_seed", 5, "the model needs"),
    ("ADAMSS", "use_dynamic_rank", True, lambda r: r[0].threshold == 0.1),
    ("ADAMSS", "use_asa", True, lambda r: r[0].clusters == 3),     # as it ended
    ("GLORA", "r", 3, "the model needs"), ("GLORA", "config_A_B", "vector", "lacks glora_A.X"),
    ("GLORA", "config_A_B", "none", "config_A_B = 'none'; expected"),
    ("GLORA", "config_C", "constant", "config_C = 'constant'; expected one of"),
    ("GLORA", "config_D_E", "lora", "config_D_E = 'lora'; expected one of"),
    ("WAVEFT", "scaling", 3, lambda r: r[0].alpha == 3),
    ("WAVEFT", "random_loc_seed", 3, lambda r: r[0].seed == 3),
    ("WAVEFT", "n_frequency", 8, "has 9 coefficients, its settings say 8"),
    ("WAVEFT", "n_frequency_pattern", {"q_proj": 8}, "has 9 coefficients, its settings say 8"),
    ("WAVEFT", "use_idwt", False, lambda r: r[0].wavelet == "none"),
    ("WAVEFT", "wavelet_family", "coif4", "'coif4' has no counterpart in burnish; PEFT's figures"),
    ("WAVEFT", "wavelet_family", "sym6", lambda r: r[0].wavelet == "sym6"),
    ("WAVEFT", "proportional_parameters", True, lambda r: r[0].n == 9),
    ("VERA", "r", 3, "the model needs"), ("VERA", "d_initial", 0.5, lambda r: r[0].d_start == 0.5),
    ("RANDLORA", "randlora_alpha", 3, lambda r: r[0].alpha == 3),
    ("ADALORA", "target_r", 1, lambda r: r[0].rank == 1),
    ("ADALORA", "lora_alpha", 3, lambda r: r[0].alpha == 3),
    ("ADALORA", "orth_reg_weight", 0.25, lambda r: r[0].ortho == 0.25),
    ("ADALORA", "deltaT", 7, lambda r: r[0].every == 7),
    ("ADALORA", "tinit", 3, lambda r: r[0].warmup == 1 / 3),
    ("ADALORA", "tfinal", 3, lambda r: r[0].cooldown == 1 / 3),
    ("ADALORA", "use_dora", True, "use_dora = True has no counterpart"),
    ("ADALORA", "trainable_token_indices", [3], "has no counterpart in burnish for an adapter of"),
    ("TRAINABLE_TOKENS", "token_indices", [5, 9], lambda r: r[0].ids == (5, 9)),
    ("PROMPT_TUNING", "num_virtual_tokens", 4, "its settings say 4"),
    ("CPT", "opt_projection_epsilon", 0.5, lambda r: r[0].input_radius == 0.5),
    ("CPT", "opt_projection_format_epsilon", 0.5, lambda r: r[0].format_radius == 0.5),
    ("CPT", "opt_weighted_loss_type", "decay", lambda r: r[0].label_decay == 1),
    ("CARTRIDGE", "num_frozen_tokens", 2, lambda r: r[0].frozen_rows == 2),
    ("MULTITASK_PROMPT_TUNING", "num_tasks", 3, "the model needs"),
    ("MULTITASK_PROMPT_TUNING", "num_ranks", 2, "the model needs"),
    ("PREFIX_TUNING", "num_transformer_submodules", 2, "an encoder and a decoder"),
    ("LOHA", "bias", "all", "PEFT's LOHA trains none"),
    ("OSF", "effective_rank", 16, lambda r: r[0].kept == 16),
    ("PSOFT", "use_cayley_neumann", True, lambda r: r[0].terms == 5),
    ("PSOFT", "psoft_alpha", 5, lambda r: r[0].rank == 3),        # it cancels
    ("PSOFT", "psoft_mag_a", False, lambda r: not r[0].gain_in),
    ("PEANUT", "scaling", 3.0, lambda r: r[0].scale == 3), ("PEANUT", "act_fn", "gelu",
                                                            lambda r: r[0].act == "gelu"),
    ("DEFT", "alpha", 5, lambda r: r[0].alpha == 5),
    ("DEFT", "decomposition_method", "qr", lambda r: r[0].form == "qr"),
    ("SUPERTUNING", "select_top", False, lambda r: not r[0].largest),
    ("SUPERTUNING", "sparsity", 0.8, "its settings say 204"),
]


@pytest.mark.parametrize("kind, name, value, then", ACTS,
                         ids=[f"{k} {n}" for k, n, *_ in ACTS])
def test_a_setting_acts_or_is_refused(kind, name, value, then, tmp_path):
    get_peft_model(tiny("llama")[0], CONFIGS[kind]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    if isinstance(then, str):
        with pytest.raises(FormatError, match=then):
            load_peft(tiny("llama")[0], tmp_path)
        return
    tuned = load_peft(tiny("llama")[0], tmp_path)
    assert then(tuned.recipe)


@pytest.mark.parametrize("name, value", [
    ("arrow_config", {"top_k": 2}),
    ("megatron_config", {"a": 1}), ("qalora", 3.5), ("x" * 500, "y" * 500)])
def test_what_is_not_built_is_refused_in_a_line(name, value, tmp_path):
    get_peft_model(tiny("llama")[0], CONFIGS["LORA"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(FormatError, match="has no counterpart in burnish for an") as caught:
        load_peft(tiny("llama")[0], tmp_path)
    assert name[:40] in str(caught.value) and len(str(caught.value)) < 400
    assert peft_settings.UNBUILT.get(name, "") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_burnish_writes_it_reads(tmp_path):
    for k, recipe in enumerate(("lora(rank=2)", "oft(block=8)", "miss(rank=2)", "norms", "ia3",
                                "prompt_tuning(length=2)", "prefix(length=2, moved=True)")):
        burnish.export_peft(burnish.tune(tiny("llama")[0], recipe), tmp_path / str(k))
        peft_files.read(tmp_path / str(k))
