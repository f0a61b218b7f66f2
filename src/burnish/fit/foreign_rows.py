"""The rows that configurations of LLaMA-Factory and axolotl name, as `fit` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, nearest
from ..core.reading import shown
from ..formats import safe

#: fields of axolotl's data sets at which they say what is read anyway
USUAL = {"message_field_role": "role", "message_field_content": "content", "train_on_eos": "turn",
         "message_property_mappings": {"role": "role", "content": "content"},
         "roles_to_train": ["assistant"], "chat_template": "tokenizer_default"}
#: keys by which rows share a sequence
PACKING = ("packing", "neat_packing", "sample_packing")


class Left(Exception):
    """A key without a counterpart, and why that changes nothing that is learnt."""


class Refused(Exception):
    """A key that cannot be taken, and what to do."""


class Told:
    """config: what was said, without what says nothing. folder: where its file lies."""

    def __init__(self, config: dict[str, Any], settings: dict[str, Any], folder: Path):
        self.config, self.settings, self.folder = config, settings, folder

    def key_dataset_dir(self, value: Any) -> str:
        return "where dataset_info.json is"

    def key_dataset(self, value: Any) -> str:
        """One entry of LLaMA-Factory's dataset_info.json."""
        names = value if isinstance(value, list) else [n.strip() for n in str(value).split(",")]
        if len(names) != 1:
            raise Refused(f"{len(names)} data sets are mixed: write them into one file, --data")
        name, where = str(names[0]), str(self.config.get("dataset_dir", "data"))
        info = next((p for base in (Path(), self.folder)
                     if (p := base / where / "dataset_info.json").is_file()), None)
        if info is None:
            raise Refused(f"there is no {where}/dataset_info.json here; give --data")
        known = safe.read_json(info)
        entry = known.get(name) if isinstance(known, dict) else None
        if not isinstance(entry, dict):
            raise Refused(f"{info} has no {name!r}"
                          f"{nearest(name, known if isinstance(known, dict) else ())}")
        columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
        odd = set(entry) - {"file_name", "hf_hub_url", "formatting", "columns", "tags", "ranking",
                            "split"}
        if "hf_hub_url" in entry:
            odd -= {"ms_hub_url", "om_hub_url"}      # the same rows on other hubs
        odd |= {k for k, v in (("columns", columns), ("tags", tags)) if not isinstance(v, Mapping)}
        if odd:
            raise Refused(f"its {min(odd)} in {info}: give --data with the file")
        if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt", "openai"):
            raise Refused(f"its formatting {shown(entry['formatting'], 30)}: give --data")
        self._columns(columns)
        self._tags(tags)
        # what is on the hub goes before a file, as theirs does
        data = entry.get("hf_hub_url") or (
            str(info.parent / str(entry["file_name"])) if "file_name" in entry else None)
        if not data:
            raise Refused(f"its entry in {info} names no file; give --data")
        if "split" in entry:
            self.settings["split"] = entry["split"]
        self.settings["data"] = data
        return f"data={data}"

    def _columns(self, columns: Mapping[str, Any]) -> None:
        """Columns under the names that layouts know need nothing; a pair is told by flags."""
        usual = {"prompt": ("instruction",), "query": ("input",), "response": ("output",),
                 "system": ("system",), "messages": ("messages", "conversations"),
                 "chosen": ("chosen",), "rejected": ("rejected",), "tools": ("tools",)}
        if self.config.get("stage") == "pt" and set(columns) == {"prompt"}:
            self.settings["text"] = columns["prompt"]
            return
        odd = {k: v for k, v in columns.items() if v not in usual.get(k, ())}
        if set(odd) == {"prompt", "response"} and set(columns) == set(odd):
            self.settings |= {"prompt": odd["prompt"], "completion": odd["response"]}
        elif odd:
            name = next(iter(odd))
            raise Refused(f"its column {name}={shown(odd[name], 30)}: rename it in the file")

    def _tags(self, tags: Mapping[str, Any]) -> None:
        """OpenAI's and ShareGPT's own words are read without being told."""
        usual = {"role_tag": ("role", "from"), "content_tag": ("content", "value"),
                 "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt"),
                 "system_tag": ("system",), "observation_tag": ("observation", "tool"),
                 "function_tag": ("function_call",)}
        for name, said in tags.items():
            if said not in usual.get(name, ()):
                raise Refused(f"its tag {name}={shown(said, 30)}: rename it in the file")

    def key_datasets(self, value: Any) -> str:
        """axolotl's list, of one."""
        if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
            count = len(value) if isinstance(value, list) else 1
            raise Refused(f"{count} data sets are mixed: write them into one file, --data"
                          if count > 1 else "expected a list of one with path and type")
        entry = dict(value[0])
        path, kind = entry.pop("path", None), entry.pop("type", None)
        files, field_of = entry.pop("data_files", None), entry.pop("field", None)
        entry.pop("ds_type", None)
        entry = {k: v for k, v in entry.items() if v is not None and USUAL.get(k, {}) != v}
        roles = entry.get("roles")
        if isinstance(roles, Mapping) and all(v == [k] for k, v in roles.items()):
            del entry["roles"]
        split, messages = entry.pop("split", None), entry.pop("field_messages", "messages")
        if kind not in ("alpaca", "chat_template", "completion", "sharegpt"):
            raise Refused(f"its type {shown(kind, 40)}: write the rows as messages, or as "
                          "instruction, input, output; give --data")
        if entry:
            raise Refused(f"its {min(map(str, entry))}: write the rows as fit reads them; give "
                          "--data")
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
        told = {"alpaca": "; the tokenizer's own chat template is written around a row, not "
                          "Alpaca's words", "completion": "; documents are read end to end"}
        return f"data={where}{told.get(kind, '')}"

    # -- how rows stand together ---------------------------------------------------------------
    def key_neat_packing(self, value: Any) -> str:
        return self._packs(value)

    def key_sample_packing(self, value: Any) -> str:
        return self._packs(value)

    def key_packing(self, value: Any) -> str:
        """LLaMA-Factory's, whose rows see each other unless neat_packing is said too."""
        if self.config.get("stage") == "pt" and not self.config.get("neat_packing"):
            raise Left("documents are read end to end, and cut into rows of max_length")
        told = self._packs(value)
        return told if self.config.get("neat_packing") else f"{told}, as with neat_packing"

    def _packs(self, value: Any) -> str:
        if not value:
            raise Left("says no")
        if self._pairs():
            raise Left("pairs of answers are not packed")
        self.settings["packing"] = True
        return "packing=True; rows of a sequence do not see each other"

    def _pairs(self) -> bool:
        return bool(self.config.get("rl")) or self.config.get("stage") == "dpo"

    def key_group_by_length(self, value: Any) -> str:
        if value and self.config.get("stage") == "pt" and not self.config.get("neat_packing"):
            raise Left("documents are read end to end, and their rows are all as long")
        if value and not self._pairs() and any(self.config.get(k) for k in PACKING):
            raise Left("packed sequences are all about as long")
        self.settings["group_by_length"] = value
        return f"group_by_length={value}"

    def key_max_samples(self, value: Any) -> str:
        raise Left("all rows are read")              # unless close finds that there are more


def counted(where: Any) -> int | None:
    """How many rows a file holds; None of what is no file here, or is not read: fit says why."""
    from .layouts import table

    try:
        return len(table(Path(where))) if Path(where).is_file() else None
    except (BurnishError, OSError, TypeError, ValueError):
        return None
