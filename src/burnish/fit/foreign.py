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
from ..formats import safe
from .foreign_keys import (
    AXOLOTL,
    FACTORY,
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
)


class Left(Exception):
    """A key without a counterpart, and why that changes nothing that is learnt."""


class Refused(Exception):
    """A key that cannot be taken, and what to do."""


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


class _State:
    """One translation under way."""

    def __init__(self, made: Foreign, config: dict[str, Any], folder: Path, of: str):
        self.made, self.config, self.folder, self.of = made, config, folder, of
        self.settings = made.settings
        self.lora: dict[str, Any] = {}
        self.method = "lora" if of == FACTORY else "full"
        self.storage = self.optimizer = self.also = ""
        self.checkpoint = of == FACTORY              # theirs, unless it is told not to

    def take(self, key: str) -> str:
        value = self.config[key]
        own: Callable[[Any], str] | None = getattr(self, f"_{key}", None)
        if own is not None:
            return own(value)
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
        known = {*NAMES, *LEFT, *REFUSED, *LORA, *(k for t in TOPICS.values() for k in t)}
        raise Refused(f"not known here{nearest(key, known)}")

    # -- what is trained -----------------------------------------------------------------------
    def _finetuning_type(self, value: Any) -> str:
        if value not in METHODS:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(METHODS)}; write --recipe")
        self.method = METHODS[value]
        return f"recipe {self.method}"

    def _adapter(self, value: Any) -> str:
        told = self._finetuning_type(value)
        if value == "qlora" and not self.config.get("load_in_4bit"):
            raise Refused("qlora wants load_in_4bit: true")
        return told

    def _stage(self, value: Any) -> str:
        tasks = {"sft": None, "pt": "language-modelling", "dpo": "preference-tuning"}
        if value not in tasks:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(tasks)}")
        if tasks[value]:
            self.settings["task"] = tasks[value]
        if value == "dpo":
            self.settings.setdefault("loss_type", "dpo")
        return f"task={tasks[value]}" if tasks[value] else "what the rows are"

    def _rl(self, value: Any) -> str:
        return self._loss(value, ("dpo", "ipo", "orpo", "simpo"))

    def _pref_loss(self, value: Any) -> str:
        return self._loss({"sigmoid": "dpo"}.get(value, value), ("dpo", "ipo", "hinge", "orpo",
                                                                 "simpo"))

    def _loss(self, value: Any, known: tuple[str, ...]) -> str:
        if value not in known:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(known)}")
        self.settings |= {"task": "preference-tuning", "loss_type": value}
        return f"loss_type={value}"

    def _targets(self, value: Any) -> str:
        names = value if isinstance(value, list) else [t.strip() for t in str(value).split(",")]
        if names in (["all"], ["all-linear"]):
            return "every linear layer outside the head, as usual"
        if not all(isinstance(n, str) and n.replace("_", "").replace(".", "").isalnum()
                   for n in names):
            raise Refused("a pattern: write the targets into --recipe")
        self.lora["targets"] = ",".join(names)
        return f"targets {','.join(names)} of the recipe"

    _lora_target = _lora_target_modules = _targets

    def _lora_target_linear(self, value: Any) -> str:
        if value is not True:
            raise Left("says no")
        return "every linear layer outside the head, as usual"

    def _whole(self, value: Any) -> str:
        names = value if isinstance(value, list) else [t.strip() for t in str(value).split(",")]
        self.also = f"full(targets={','.join(names)!r})"
        return self.also

    _additional_target = _lora_modules_to_save = _whole

    def _peft_use_dora(self, value: Any) -> str:
        if value:
            self.method = "dora"
        return "recipe dora" if value else "no"

    def _peft_use_rslora(self, value: Any) -> str:
        if value:
            self.lora["scaling"] = "rs"
        return "scaling='rs'" if value else "no"

    _use_dora, _use_rslora = _peft_use_dora, _peft_use_rslora

    def _pissa_init(self, value: Any) -> str:
        if value:
            self.method = "pissa"
        return "recipe pissa" if value else "no"

    # -- how it is held ------------------------------------------------------------------------
    def _quantization_bit(self, value: Any) -> str:
        if value not in (4, 8):
            raise Refused(f"{shown(value, 30)} bits: 4 and 8 are known; write --recipe")
        if value == 8:
            return self._load_in_8bit(True)
        double = self.config.get("double_quantization", True)
        self.storage = "nf4" if double else "nf4(double_quant=False)"
        return self.storage

    def _double_quantization(self, value: Any) -> str:
        if "quantization_bit" not in self.config:
            raise Left("nothing is quantised")
        return f"double_quant={bool(value)}"

    def _load_in_4bit(self, value: Any) -> str:
        if not value:
            raise Left("says no")
        self.storage = "nf4"
        return "nf4"

    def _load_in_8bit(self, value: Any) -> str:
        if not value:
            raise Left("says no")
        self.storage = "int8"
        return "int8, rounded to the nearest; no outliers are kept apart"

    def _gradient_checkpointing(self, value: Any) -> str:
        self.checkpoint = bool(value)
        return "checkpoint" if value else "no checkpoint"

    def _disable_gradient_checkpointing(self, value: Any) -> str:
        self.checkpoint = not value
        return "no checkpoint" if value else "checkpoint"

    def _optim(self, value: Any) -> str:
        if value not in OPTIMIZERS:
            raise Refused(f"{shown(value, 30)} is none of {', '.join(OPTIMIZERS)}; write --recipe")
        self.optimizer = OPTIMIZERS[value]
        return self.optimizer or "AdamW"

    _optimizer = _optim

    def _bf16(self, value: Any) -> str:
        import torch

        if value in (False, "false"):
            raise Left("says no")
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if value == "auto" and not able:
            raise Left("auto, and this device does without")
        self.settings["bf16"] = True
        return "bf16=True"

    def _special_tokens(self, value: Any) -> str:
        if isinstance(value, Mapping) and set(value) <= {"pad_token"}:
            raise Left("the tokenizer's own padding is used, or its end of text")
        raise Refused("the tokenizer's words stay as they are; save it with them and give "
                      "--processor FOLDER")

    # -- the rows ------------------------------------------------------------------------------
    def _dataset_dir(self, value: Any) -> str:
        return "where dataset_info.json is"

    def _dataset(self, value: Any) -> str:
        """One entry of LLaMA-Factory's dataset_info.json."""
        names = value if isinstance(value, list) else [n.strip() for n in str(value).split(",")]
        if len(names) != 1:
            raise Refused(f"{len(names)} data sets are mixed: write them into one file, --data")
        where = str(self.config.get("dataset_dir", "data"))
        info = next((p for base in (Path(), self.folder)
                     if (p := base / where / "dataset_info.json").is_file()), None)
        if info is None:
            raise Refused(f"there is no {where}/dataset_info.json here; give --data")
        known = safe.read_json(info)
        entry = known.get(names[0])
        if not isinstance(entry, dict):
            raise Refused(f"{info} has no {names[0]!r}{nearest(names[0], known)}")
        if odd := sorted(set(entry) - {"file_name", "hf_hub_url", "formatting", "columns", "tags",
                                       "ranking", "split"}):
            raise Refused(f"its {odd[0]} in {info}: give --data with the file")
        if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt", "openai"):
            raise Refused(f"its formatting {shown(entry['formatting'], 30)}: give --data")
        self._columns(entry.get("columns") or {})
        if "tags" in entry:
            self._tags(entry["tags"])
        if "split" in entry:
            self.settings["split"] = entry["split"]
        self.settings["data"] = str(info.parent / entry["file_name"]) if "file_name" in entry \
            else entry.get("hf_hub_url")
        if not self.settings["data"]:
            raise Refused(f"its entry in {info} names no file; give --data")
        return f"data={self.settings['data']}"

    def _columns(self, columns: Mapping[str, Any]) -> None:
        """Columns under the names that layouts know need nothing; a pair is told by flags."""
        usual = {"prompt": "instruction", "query": "input", "response": "output",
                 "messages": ("messages", "conversations"), "chosen": "chosen",
                 "rejected": "rejected"}
        odd = {k: v for k, v in columns.items()
               if k not in usual or v not in (usual[k] if k == "messages" else (usual[k],))}
        if set(odd) == {"prompt", "response"} and set(columns) == set(odd):
            self.settings |= {"prompt": odd["prompt"], "completion": odd["response"]}
        elif odd:
            name = next(iter(odd))
            raise Refused(f"its column {name}={shown(odd[name], 30)}: rename it in the file")

    def _tags(self, tags: Mapping[str, Any]) -> None:
        """OpenAI's and ShareGPT's own words are read without being told."""
        usual = {"role_tag": ("role", "from"), "content_tag": ("content", "value"),
                 "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt"),
                 "system_tag": ("system",)}
        for name, said in tags.items():
            if said not in usual.get(name, ()):
                raise Refused(f"its tag {name}={shown(said, 30)}: rename it in the file")

    def _datasets(self, value: Any) -> str:
        """axolotl's list, of one."""
        if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
            count = len(value) if isinstance(value, list) else 1
            raise Refused(f"{count} data sets are mixed: write them into one file, --data"
                          if count > 1 else "expected a list of one with path and type")
        entry = dict(value[0])
        path, kind = entry.pop("path", None), entry.pop("type", None)
        files, field_of = entry.pop("data_files", None), entry.pop("field", None)
        entry.pop("ds_type", None)
        split, messages = entry.pop("split", None), entry.pop("field_messages", "messages")
        if kind not in ("alpaca", "chat_template", "completion", "sharegpt"):
            raise Refused(f"its type {shown(kind, 40)}: write the rows as messages, or as "
                          "instruction, input, output; give --data")
        if entry:
            raise Refused(f"its {sorted(entry)[0]}: write the rows as fit reads them; give --data")
        if messages not in ("messages", "conversations"):
            raise Refused(f"its field_messages {shown(messages, 30)}: rename it to messages")
        if isinstance(files, list) and len(files) != 1:
            raise Refused(f"{len(files)} data_files: write them into one; give --data")
        where = (files[0] if isinstance(files, list) else files) or path
        if not isinstance(where, str):
            raise Refused("it names no path; give --data")
        self.settings["data"] = where
        if kind == "completion":
            self.settings |= {"task": "language-modelling", "text": field_of or "text"}
        if split not in (None, "train"):
            self.settings["split"] = split
        return f"data={where}"

    # -- the end -------------------------------------------------------------------------------
    def close(self, given: frozenset[str]) -> None:
        """The recipe of what was said, and their defaults for what was not."""
        made = self.made
        if "recipe" not in given:
            if self.method == "full":
                for key in [k for k in made.used if k in WITH_LORA]:
                    del made.used[key]
                    made.left[key] = "every weight trains, and there is no LoRA"
                for key in [k for k in made.used if k in HELD and self.storage]:
                    del made.used[key]
                    made.refused[key] = "weights that all train are not quantised"
            if self.method != "full":
                self.lora.setdefault("rank", 8)
                if "alpha" not in self.lora:
                    rank = self.lora["rank"]
                    self.lora["alpha"] = 2 * rank if self.of == FACTORY else 16
                    made.assumed["lora_alpha"] = f"alpha={self.lora['alpha']}"
            method = self.method if self.method == "full" else \
                f"{self.method}({', '.join(f'{k}={v!r}' for k, v in self.lora.items())})"
            under, beside = ("", "") if self.method == "full" else (self.storage, self.also)
            parts = [under, method, beside, "checkpoint" if self.checkpoint else "", self.optimizer]
            self.settings["recipe"] = " + ".join(filter(None, parts))
            try:
                parse(self.settings["recipe"])
            except ConfigError as e:
                made.refused["recipe"] = f"{self.settings['recipe']}: {e}"
        for what in ("save", "eval"):                # a number of steps says that it goes by them
            if f"{what}_steps" in self.settings and f"{what}_strategy" not in given:
                self.settings.setdefault(f"{what}_strategy", "steps")
        usual: dict[str, Any] = {FACTORY: {"learning_rate": 5e-5, "per_device_train_batch_size": 8,
                           "num_train_epochs": 3.0, "max_length": 2048, "validation": 0,
                           "warmup_steps": 0, "weight_decay": 0.0},
                 AXOLOTL: {"per_device_train_batch_size": 1, "num_train_epochs": 1, "validation": 0,
                           "max_length": 512, "warmup_steps": 0,
                           "lr_scheduler_type": "cosine", "weight_decay": 0.0}}[self.of]
        if self.of == AXOLOTL and "learning_rate" not in {*self.settings, *given}:
            made.refused["learning_rate"] = "axolotl's own configurations name it; give it"
        for name, value in usual.items():
            said = {name, "warmup_ratio"} if name == "warmup_steps" else {name}
            if not said & {*self.settings, *given}:
                self.settings[name] = value
                made.assumed[name] = f"{name}={value}"


def refusal(made: Foreign, path: Path) -> str:
    """One line of what cannot be taken; "" where all can."""
    if not made.refused:
        return ""
    told = "; ".join(f"{k}: {why}" for k, why in made.refused.items())
    return (f"{path} says what fit cannot take ({told}). Remove a line to go on without it, or say "
            "it by a flag")
