"""Configurations of LLaMA-Factory and axolotl, as what `fit` takes.

Every key is used, has no counterpart (it says how fast, where to, or what a library of theirs does,
or it is said what happens instead), or is refused: without it something else would be learnt. Their
own defaults stand where a key that bears on the result is absent. Which keys there are, and those
defaults, is from their documentation and examples, read, not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, nearest
from ..core.reading import shown
from ..core.recipe import parse
from .foreign_keys import (
    AXOLOTL,
    ENDS,
    FACTORY,
    FASTER,
    HELD,
    LEFT,
    LORA,
    METHODS,
    NAMES,
    OF,
    OPTIMIZERS,
    REFUSED,
    TOPICS,
    WITH_LORA,
    WORDS,
)
from .foreign_rows import Left, Refused, Told, counted


@dataclass
class Foreign:
    """of: whose configuration. settings: what `fit` is called with. used, left, refused: key ->
    what became of it. assumed: their defaults that were filled in."""

    of: str
    settings: dict[str, Any] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"of": self.of, "settings": self.settings, "used": self.used, "left": self.left,
                "refused": self.refused, "assumed": self.assumed}

    def lines(self) -> list[str]:
        """A line a key, by what became of it."""
        out = [f"a configuration of {self.of}"]
        if recipe := self.settings.get("recipe"):
            out.append(f"recipe: {recipe}")
        for head, told in (("used", self.used), ("their defaults", self.assumed),
                           ("no counterpart", self.left), ("refused", self.refused)):
            out += [f"{head}:", *(f"  {k}: {why}" for k, why in told.items())] if told else []
        return out


def translated(config: Mapping[str, Any], folder: Path, given: frozenset[str] = frozenset()
               ) -> Foreign:
    """`config` as settings of `fit`. folder: where the file lies.  given: settings that are said
    otherwise, such as ``data`` or ``recipe``: what the file says of those is left.

    Raises ConfigError for a file of neither; what is refused stands in the answer.
    """
    votes = {of: len(keys & set(config)) for of, keys in OF.items()}
    of = max(votes, key=lambda k: votes[k])
    if not votes[of] or len(set(votes.values())) == 1:
        raise ConfigError("this is a configuration of neither LLaMA-Factory (model_name_or_path, "
                          "finetuning_type, dataset ...) nor axolotl (base_model, adapter, "
                          "datasets ...)")
    made = Foreign(of)
    state = _State(made, {k: v for k, v in config.items() if v not in (None, "", [], {})}, folder,
                   of)
    for key in config:
        if key not in state.config:
            made.left[key] = "says nothing"
            continue
        if (topic := next((t for t, keys in TOPICS.items() if key in keys and t in given), "")):
            made.left[key] = f"{topic}= says it"
            continue
        try:
            made.used[key] = state.take(key)
        except Left as why:
            made.left[key] = str(why)
        except Refused as why:
            made.refused[key] = str(why)
    state.close(given)
    return made


class _State(Told):
    """One translation under way: ``key_NAME`` takes the value of that key."""

    def __init__(self, made: Foreign, config: dict[str, Any], folder: Path, of: str):
        super().__init__(config, made.settings, folder)
        self.made, self.of = made, of
        self.lora: dict[str, Any] = {}
        self.method = "lora" if of == FACTORY else "full"
        self.forms: list[str] = []                   # of a LoRA: dora, pissa
        self.storage = self.optimizer = self.also = ""
        self.checkpoint = of == FACTORY              # theirs, unless it is told not to

    def take(self, key: str) -> str:
        value = self.config[key]
        own: Callable[[Any], str] | None = getattr(self, f"key_{key}", None)
        if own is not None:
            one = isinstance(value, list | Mapping) and key in WORDS     # looked up in tables
            return own(shown(value, 60) if one else value)
        if key in LORA:
            self.lora[LORA[key]] = value
            return f"{LORA[key]} {shown(value, 30)} of the recipe"
        if key in NAMES:
            self.settings[NAMES[key]] = value
            return f"{NAMES[key]}={shown(value, 60)}"
        if key in REFUSED:
            if value in (False, 0):
                raise Left("says no")
            raise Refused(REFUSED[key])
        if key in LEFT:
            raise Left(LEFT[key])
        known = {*NAMES, *LEFT, *REFUSED, *LORA, *(k for t in TOPICS.values() for k in t),
                 *(n.removeprefix("key_") for n in dir(self) if n.startswith("key_"))}
        raise Refused(f"not known here{nearest(key, known)}")

    # -- what is trained -----------------------------------------------------------------------
    def key_finetuning_type(self, value: Any) -> str:
        if value not in METHODS:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(METHODS)}; write --recipe")
        self.method = METHODS[value]
        return f"recipe {self.method}"

    def key_adapter(self, value: Any) -> str:
        told = self.key_finetuning_type(value)
        if value == "qlora" and not self.config.get("load_in_4bit"):
            raise Refused("qlora wants load_in_4bit: true")
        if not (self.config.get("lora_target_linear") or self.config.get("lora_target_modules")):
            raise Refused("lora_target_linear: true or lora_target_modules says where it goes")
        return told

    def key_stage(self, value: Any) -> str:
        tasks = {"sft": None, "pt": "language-modelling", "dpo": "preference-tuning"}
        if value not in tasks:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(tasks)}")
        if tasks[value]:
            self.settings["task"] = tasks[value]
        if value == "dpo":
            self.settings.setdefault("loss_type", "dpo")
        return f"task={tasks[value]}" if tasks[value] else "what the rows are"

    def key_rl(self, value: Any) -> str:
        if value == "simpo" and self.config.get("cpo_alpha") != 0:
            raise Refused("theirs adds the likelihood of the better answer to it; cpo_alpha: 0 "
                          "says that it is not")
        return self._loss(value, ("dpo", "ipo", "orpo", "simpo"))

    def key_cpo_alpha(self, value: Any) -> str:
        if value != 0:
            raise Refused("no likelihood of the better answer is added; only 0 is taken")
        return "nothing is added"

    def key_pref_loss(self, value: Any) -> str:
        self._prefers()
        return self._loss({"sigmoid": "dpo"}.get(value, value), ("dpo", "ipo", "hinge", "orpo",
                                                                 "simpo"))

    def key_pref_beta(self, value: Any) -> str:
        self._prefers()
        self.settings["beta"] = value
        return f"beta={shown(value, 30)}"

    def key_simpo_gamma(self, value: Any) -> str:
        if "simpo" not in (self.config.get("pref_loss"), self.config.get("rl")):
            raise Left("the loss is not simpo")
        self.settings["gamma"] = value
        return f"gamma={shown(value, 30)}"

    def _prefers(self) -> None:
        if self.of == FACTORY and self.config.get("stage", "sft") != "dpo":
            raise Left("stage is not dpo")

    def _loss(self, value: Any, known: tuple[str, ...]) -> str:
        if value not in known:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(known)}")
        self.settings |= {"task": "preference-tuning", "loss_type": value}
        return f"loss_type={value}"

    def _targets(self, value: Any) -> str:
        names = self._names(value)
        if names in (["all"], ["all-linear"]):
            return "every linear layer outside the head, as usual"
        self.lora["targets"] = ",".join(names)
        return f"targets {','.join(names)} of the recipe"

    key_lora_target = _targets

    def _names(self, value: Any) -> list[str]:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list) or not all(
                isinstance(n, str) and n.strip().replace("_", "").replace(".", "").isalnum()
                for n in names):
            raise Refused(f"{shown(value, 40)} is no list of names: write it into --recipe")
        return [n.strip() for n in names]

    def key_lora_target_modules(self, value: Any) -> str:
        if self.config.get("lora_target_linear") is not True:
            return self._targets(value)
        if odd := [n for n in self._names(value) if n in ENDS]:
            raise Refused(f"{odd[0]} beside every linear layer: write --recipe")
        raise Left("lora_target_linear takes every linear layer")

    def key_lora_target_linear(self, value: Any) -> str:
        if value is not True:
            raise Left("says no")
        return "every linear layer outside the head, as usual"

    def _whole(self, value: Any) -> str:
        self.also = f"full(targets={','.join(self._names(value))!r})"
        return self.also

    key_additional_target = key_lora_modules_to_save = _whole

    def key_peft_use_dora(self, value: Any) -> str:
        return self._form("dora", value)

    def key_pissa_init(self, value: Any) -> str:
        return self._form("pissa", value)

    def _form(self, name: str, value: Any) -> str:
        if not value:
            raise Left("says no")
        self.forms.append(name)                      # whichever key comes first
        return f"recipe {name}"

    def key_peft_use_rslora(self, value: Any) -> str:
        if value:
            self.lora["scaling"] = "rs"
        return "scaling='rs'" if value else "no"

    key_use_dora, key_use_rslora = key_peft_use_dora, key_peft_use_rslora

    # -- how it is held ------------------------------------------------------------------------
    def key_quantization_bit(self, value: Any) -> str:
        if value not in (4, 8):
            raise Refused(f"{shown(value, 30)} bits: 4 and 8 are known; write --recipe")
        if value == 8:
            return self.key_load_in_8bit(True)
        double = self.config.get("double_quantization", True)
        self.storage = "nf4" if double else "nf4(double_quant=False)"
        return self.storage

    def key_double_quantization(self, value: Any) -> str:
        if "quantization_bit" not in self.config:
            raise Left("nothing is quantised")
        return f"double_quant={bool(value)}"

    def key_load_in_4bit(self, value: Any) -> str:
        if not value:
            raise Left("says no")
        self.storage = "nf4"
        return "nf4"

    def key_load_in_8bit(self, value: Any) -> str:
        if not value:
            raise Left("says no")
        if self.config.get("load_in_4bit"):
            raise Refused("load_in_4bit is said too; keep one")
        self.storage = "int8"
        return "int8, rounded to the nearest; no outliers are kept apart"

    def key_quantization_method(self, value: Any) -> str:
        if value not in ("bnb", "bitsandbytes"):
            raise Refused(f"{shown(value, 30)}: bnb's rounding is known; write --recipe")
        raise Left("nf4 and int8 are those of bitsandbytes")

    def key_quantization_type(self, value: Any) -> str:
        if value != "nf4":
            raise Refused(f"{shown(value, 30)}: nf4 is known; write --recipe")
        raise Left("nf4 is meant")

    def key_gradient_checkpointing(self, value: Any) -> str:
        self.checkpoint = bool(value)
        return "checkpoint" if value else "no checkpoint"

    def key_disable_gradient_checkpointing(self, value: Any) -> str:
        self.checkpoint = not value
        return "no checkpoint" if value else "checkpoint"

    def key_optim(self, value: Any) -> str:
        if value not in OPTIMIZERS:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(OPTIMIZERS)}; write --recipe")
        self.optimizer = OPTIMIZERS[value]
        return self.optimizer or "AdamW"

    key_optimizer = key_optim

    def key_sequence_len(self, value: Any) -> str:
        self.settings["max_length"] = value
        return f"max_length={shown(value, 30)}; a longer row is cut there, not left out"

    def key_cutoff_len(self, value: Any) -> str:
        self.settings["max_length"] = value
        return f"max_length={shown(value, 30)}; a longer row is cut at its end"

    def key_pure_bf16(self, value: Any) -> str:
        if not value:
            raise Left("says no")
        self.settings["dtype"] = "bfloat16"
        return "dtype=bfloat16, without mixed precision"

    def key_bf16(self, value: Any) -> str:
        import torch

        if value in (False, "false"):
            raise Left("says no")
        if value == "full":
            return self.key_pure_bf16(True)
        if value not in (True, "true", "auto"):
            raise Refused(f"{shown(value, 30)} is none of true, false, auto, full")
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if value == "auto" and not able:
            raise Left("auto, and this device does without")
        self.settings["bf16"] = True
        return "bf16=True"

    def key_plugins(self, value: Any) -> str:
        names = value if isinstance(value, list) else [value]
        if odd := [n for n in names if not any(k in str(n) for k in FASTER)]:
            raise Refused(f"{shown(odd[0], 60)}: it may learn something else")
        raise Left("how fast, not what")

    def key_chat_template(self, value: Any) -> str:
        if value != "tokenizer_default":
            raise Refused("save the template with the tokenizer and give --processor FOLDER")
        raise Left("the tokenizer's own chat template is used")

    def key_do_train(self, value: Any) -> str:
        if not value:
            raise Refused("fit always trains; see burnish evaluate and predict")
        raise Left("fit always trains")

    def key_special_tokens(self, value: Any) -> str:
        if isinstance(value, Mapping) and set(value) <= {"pad_token"}:
            raise Left("the tokenizer's own padding is used, or its end of text")
        raise Refused("the tokenizer's words stay as they are; save it with them and give "
                      "--processor FOLDER")

    # -- the end -------------------------------------------------------------------------------
    def close(self, given: frozenset[str]) -> None:
        """The recipe of what was said, and their defaults for what was not."""
        if "recipe" not in given:
            self._recipe()
        self._evaluated(given)
        for name, value in self._usual(given).items():
            said = {name, "warmup_ratio"} if name == "warmup_steps" else {name}
            if not said & {*self.settings, *given}:
                self.settings[name] = value
                self.made.assumed[name] = f"{name}={value}"
        most, rows = self.config.get("max_samples"), counted(self.settings.get("data"))
        if "max_samples" in self.made.left and "data" not in given:
            if isinstance(most, int) and rows is not None and rows <= most:
                self.made.left["max_samples"] = f"there are {rows}: all rows are read"
            else:
                del self.made.left["max_samples"]
                self.made.refused["max_samples"] = (
                    "all rows are read" + (f", {rows}" if rows is not None else "") +
                    "; write so many into a file, --data")

    def _recipe(self) -> None:
        made = self.made
        if self.method == "full":
            for key in [k for k in made.used if k in WITH_LORA]:
                del made.used[key]
                made.left[key] = "every weight trains, and there is no LoRA"
            for key in [k for k in made.used if k in HELD and self.storage]:
                del made.used[key]
                made.refused[key] = "weights that all train are not quantised"
        else:
            if len(self.forms) > 1:
                made.refused["pissa_init"] = "beside dora there is no recipe for it"
            self.method = next(iter(self.forms), self.method)
            self.lora.setdefault("rank", 8)
            if "alpha" not in self.lora and self.of == AXOLOTL:
                made.refused["lora_alpha"] = "axolotl's own configurations name it; give it"
            elif "alpha" not in self.lora:
                self.lora["alpha"] = 2 * self.lora["rank"]
                made.assumed["lora_alpha"] = f"alpha={self.lora['alpha']}"
            if self.settings.get("weight_decay") and not self.also \
                    and made.used.pop("weight_decay", None):
                made.left["weight_decay"] = "a LoRA's factors are not decayed here"
        method = self.method if self.method == "full" else \
            f"{self.method}({', '.join(f'{k}={v!r}' for k, v in self.lora.items())})"
        under, beside = ("", "") if self.method == "full" else (self.storage, self.also)
        parts = [under, method, beside, "checkpoint" if self.checkpoint else "", self.optimizer]
        self.settings["recipe"] = " + ".join(filter(None, parts))
        try:
            parse(self.settings["recipe"])
        except ConfigError as e:
            made.refused["recipe"] = f"{self.settings['recipe']}: {e}"

    def _evaluated(self, given: frozenset[str]) -> None:
        """A number of steps says that it goes by them, where there is something to evaluate on."""
        split = bool(self.settings.get("validation")) or "validation" in given
        for what in ("save", "eval"):
            if f"{what}_steps" in self.settings and f"{what}_strategy" not in given and (
                    what == "save" or split):
                self.settings.setdefault(f"{what}_strategy", "steps")
        if self.of == AXOLOTL and not split and self.settings.pop("eval_strategy", None):
            del self.made.used["eval_strategy"]
            self.made.left["eval_strategy"] = "no row is set aside to evaluate on"

    def _usual(self, given: frozenset[str]) -> dict[str, Any]:
        """Setting -> their own default."""
        usual: dict[str, Any] = {
            FACTORY: {"learning_rate": 5e-5, "per_device_train_batch_size": 8,
                      "num_train_epochs": 3.0, "max_length": 2048, "validation": 0,
                      "warmup_steps": 0, "weight_decay": 0.0, "load_best_model_at_end": False},
            AXOLOTL: {"per_device_train_batch_size": 1, "num_train_epochs": 1, "validation": 0,
                      "max_length": 512, "warmup_steps": 0.03, "lr_scheduler_type": "cosine",
                      "weight_decay": 0.0, "load_best_model_at_end": False}}[self.of]
        if self.of == AXOLOTL:
            if "learning_rate" not in {*self.settings, *given}:
                self.made.refused["learning_rate"] = "axolotl's own configurations name it; give it"
            # theirs keeps the best where both go by steps
            if all({f"{w}_steps", f"{w}s_per_epoch"} & set(self.config) for w in ("save", "eval")):
                del usual["load_best_model_at_end"]
        if self.settings.get("task") == "preference-tuning":
            usual["beta"] = 0.1
            if self.settings.get("loss_type") == "simpo":
                usual["gamma"] = 0.5
        if self.method == "full" and "recipe" not in given:   # theirs trains copies in float32
            mixed = self.of == AXOLOTL and self.settings.get("bf16")
            usual["dtype"] = "bfloat16" if mixed else "float32"
        return usual


def refusal(made: Foreign, path: Path) -> str:
    """One line of what cannot be taken; "" where all can."""
    if not made.refused:
        return ""
    told = "; ".join(f"{k}: {why}" for k, why in made.refused.items())
    return (f"{path} says what fit cannot take ({told}). Remove a line to go on without it, or say "
            "it by a flag")
