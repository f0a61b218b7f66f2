"""The settings of a PEFT folder: each is acted upon, or says nothing of what is computed, or is
refused.

What is not known here is refused unless it says nothing (None, False, 0, empty): an option that
burnish has not would be misread in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import FormatError
from ..core.reading import check_fields, shown
from .folder import CONFIG
from .peft_own import Form
from .peft_prompts import OF_ALL, OF_ROWS

#: types that are not read, and why
UNREAD = {
    "XLORA": "its gates ask a first pass of the model about adapters that lie in other folders; "
             "load each, load_peft(tuned, folder, name), and weigh them with tuned.use({...}) or "
             "by the lifecycle of arrow",
    "SHADOW": "it is a second model that runs beside the first and hands its states over, which no "
              "part of burnish does"}
#: settings that are not read, and why
UNBUILT = {"arrow_config": "its experts lie in other folders: load each, load_peft(tuned, folder, "
                           "name), and route among them with the lifecycle of arrow"}
#: settings that acted in training alone, which goes on otherwise here: what an adapter's notes say
TRAINED = {"monteclora_config": "MonteCLoRA draws noise while it trains, which burnish does not: "
                                "it answers, and trains on, as the lora that it is without",
           "use_asa": "AdaMSS lets some clusters stop training (use_asa): here all train on"}
#: types that can train biases beside themselves, each with what it calls those of its own layers
BIASED = {"LORA": "lora_only", "ADALORA": "adalora_only", "OFT": "oft_only", "BOFT": "boft_only",
          "HRA": "hra_only", "MISS": "MiSS_only", "VERA": "vera_only", "PVERA": "pvera_only",
          "FOURIERFT": "fourier_only", "RANDLORA": "randlora_only", "DEFT": "deft_only",
          "WAVEFT": "waveft_only", "VBLORA": "vblora_only", "UNILORA": "unilora_only",
          "TINYLORA": "tinylora_only", "C3A": "c3a_only", "FROD": "frod_only",
          "DELORA": "delora_only", "GRALORA": "gralora_only", "GLORA": "glora_only"}
#: what the settings that are read are (see core/reading.py)
KINDS = {"r": "count?", "lora_alpha": "number", "lora_dropout": "number?", "use_rslora": "flag?",
         "miss_dropout": "number?", "use_dora": "flag?", "lora_bias": "flag?",
         "fan_in_fan_out": "flag?", "alpha_pattern": "numbers?", "rank_pattern": "numbers?",
         "modules_to_save": "texts?",
         "base_model_name_or_path": "text?", "task_type": "text?", "bias": "text?",
         "peft_type": "text"}
_READ = {"peft_type", "task_type", "base_model_name_or_path", "modules_to_save", "fan_in_fan_out",
         "bias"}
#: where an adapter came from, and on which modules it stands, which its tensors say too
_TOLD = {"auto_mapping", "peft_version", "revision", "inference_mode", "target_modules",
         "exclude_modules", "layers_to_transform", "layers_pattern", "init_weights",
         "runtime_config", "megatron_core"}
#: how a LoRA began: what is left of it is said by `init_lora_weights`. Tied weights that are saved
#: are the same tensor anyway; the last stands beside `use_qalora`
_BEGAN = {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
          "ensure_weight_tying", "qalora_group_size"}
_OF: dict[str, set[str]] = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
             "alpha_pattern", "lora_bias", "velora_config", "trainable_token_indices",
             "target_parameters", "layer_replication",
             "monteclora_config", *_BEGAN},
    "MISS": {"r", "miss_dropout", "mini_r"},
    # of AdaLoRA PEFT looks at none of these; the betas smooth scores while it trains
    "ADALORA": {"r", "use_rslora", "alpha_pattern", "beta1", "beta2", *_BEGAN},
    "HIRA": {"rank_pattern"},
    # which of its clusters had stopped training is in no folder: PEFT chooses them anew as well
    "ADAMSS": {"use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval",
               "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"},
    "SHIRA": {"mask_type"},                      # the entries are in the folder
    "IA3": {"feedforward_modules", "init_ia3_weights"},
}
#: starting values that PEFT takes off the base; the bare factors then mean nothing
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def known(kind: str, form: Form | None) -> set[str]:
    """The settings of a type that are acted upon, refused by themselves, or say nothing."""
    own = {*form.settings, *form.alone, *form.patterned.values()} if form else set()
    rows = OF_ALL | OF_ROWS[kind].settings if kind in OF_ROWS else set()
    return _READ | _TOLD | own | _OF.get(kind, set()) | rows


def check(config: dict[str, Any], form: Form | None, folder: Path) -> None:
    """Raises FormatError, one line, for a setting of another kind than it should be, and for one
    that changes what is computed and has no counterpart here."""
    kind = config["peft_type"]
    own = form.fields if form else OF_ROWS[kind].fields if kind in OF_ROWS else {}
    check_fields(config, {**KINDS, **own}, folder / CONFIG)
    there = known(kind, form)
    for name, value in config.items():
        if name not in there and not _idle(value):
            why = f": {UNBUILT[name]}" if name in UNBUILT else ""
            raise FormatError(f"{folder}: {shown(name)[1:-1]} = {shown(value)} has no counterpart "
                              f"in burnish for an adapter of type {kind}{why}")
    if kind == "LORA":
        check_fields(config, {"target_parameters": "texts?"}, folder / CONFIG)
    if kind == "LORA" and config.get("target_parameters") and (
            config.get("lora_dropout") or config.get("use_dora")):
        raise FormatError(f"{folder}: PEFT has neither dropout nor DoRA beside target_parameters")
    _check_bias(config, folder)
    for name in ("lora_dropout", "miss_dropout"):
        if not 0 <= (config.get(name) or 0) <= 1:
            raise FormatError(f"{folder}: {name} = {config[name]}; expected a share from 0 to 1")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_RESIDUAL):
        raise FormatError(
            f"{folder}: init_lora_weights = {start!r} trained on a base PEFT had changed; save it "
            "with path_initial_model_for_weight_conversion, which makes it plain LoRA")


def notes(config: Mapping[str, Any]) -> list[str]:
    """What is otherwise here than the settings say, of training alone."""
    return [why for name, why in TRAINED.items() if not _idle(config.get(name))]


def _idle(value: Any) -> bool:
    return value is None or value is False or value in ("", 0) or value in ({}, [])


def _check_bias(config: Mapping[str, Any], folder: Path) -> None:
    bias, kind = config.get("bias") or "none", config["peft_type"]
    if bias != "none" and kind not in BIASED:
        raise FormatError(f"{folder}: bias = {shown(bias)}, and PEFT's {kind} trains none")
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise FormatError(f"{folder}: bias = {shown(bias)}; expected 'none', 'all' or "
                          f"{BIASED[kind]!r}")
