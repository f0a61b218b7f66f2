"""What a model says of a few rows while it is taught: figures say that it learns, answers what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..core.batches import moved
from ..core.errors import BurnishError, ConfigError
from ..engine.tuned import Tuned
from .stages import Leg
from .tasks import Task
from .watch import growing

#: tokens of a written answer, words of a document that is gone on with, letters that are kept
TOKENS, WORDS, LONGEST = 48, 16, 1000


class Answers(transformers.TrainerCallback):
    """A line of answers.jsonl after each evaluation of the run.

    Rows are spread over the validation split, the same every time. Nothing is drawn from the run's
    generators (the trainer puts them back after evaluating), and each row is asked by itself, so
    that it takes less memory than the evaluation before it.
    """

    def __init__(self, path: Path, resumed_at: int | None, leg: Leg, tuned: Tuned, task: Task,
                 count: int):
        if task.data.validation is None:
            raise ConfigError(f"samples={count} are rows of the validation split, and there is "
                              "none; give one, or validation=")
        if tuned.state.shards is not None:
            raise ConfigError(f"samples={count} are answered by one process, and shard='fsdp2' "
                              "gives each a part of the model; leave samples= out")
        self.path, self.leg, self.tuned, self.task = path, leg, tuned, task
        rows = task.data.validation
        count = min(count, len(rows))
        self.posed = [posed(task, rows[i * len(rows) // count]) for i in range(count)]
        self.last = -1
        growing(path, resumed_at)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        step = self.leg.before + state.global_step
        if not state.is_world_process_zero or step == self.last:    # the figures at the end are
            return                                                  # of a step that has answered
        self.last = step
        row = {"step": step, "answers": self.said(args.device)}
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise BurnishError(f"cannot write {self.path}: {e.strerror or e}; the checkpoints "
                               "so far are whole, resume=True goes on from the last") from None

    @torch.no_grad()
    def said(self, device: Any) -> list[dict[str, Any]]:
        """asked, said and right of every row, in words."""
        model, out = self.tuned.model, []
        was = model.training
        model.eval()
        try:
            near: Any = model if torch.device(device).type == "cpu" else _Near(model, device)
            for p in self.posed:
                with self.tuned.given(**p.keys):
                    answer = self.task.answer(near, p.row, TOKENS)
                out.append({"asked": p.asked[:LONGEST], "said": self.task.said(answer)[:LONGEST],
                            "right": p.right[:LONGEST]})
        finally:
            model.train(was)
        return out


@dataclass
class Posed:
    """A row as `answer` is asked, with the keys that parts of the recipe read; and in words."""

    row: dict[str, Any]
    asked: str
    right: str
    keys: dict[str, Any]


def posed(task: Task, row: Mapping[str, Any]) -> Posed:
    """A row of the data as a question with its answer.

    A conversation is asked by its first user turn, a document by its first words; of a text with
    gaps to fill the word in the middle is hidden.
    """
    keys = {k: row[k] for k in task.data.keys}
    if (own := task.parted(row)) is not None:
        return Posed(*own, keys)
    turns = row.get("messages") or (row["chosen"] if isinstance(row.get("chosen"), list) else None)
    if turns:
        at = next((i for i, t in enumerate(turns) if t["role"] == "user"), 0)
        reply = turns[at + 1] if at + 1 < len(turns) else {}
        after = reply.get("content") or reply.get("tool_calls") or ""
        offer = {"tools": row["tools"]} if row.get("tools") else {}
        return Posed({"text": turns[at]["content"], **offer}, turns[at]["content"], after, keys)
    if "prompt" in row:
        right = row.get("completion") or row.get("chosen") or ""
        return Posed({"text": row["prompt"]}, row["prompt"], right, keys)
    if task.data.task == "language-modelling":
        words = row["text"].split(" ")
        many = min(WORDS, max(1, len(words) // 2))
        begun = " ".join(words[:many])
        return Posed({"text": begun}, begun, " ".join(words[many:2 * many]), keys)
    if task.data.task == "masked-language-modelling":
        words = row["text"].split()[:2 * WORDS]
        hidden = words[len(words) // 2]
        words[len(words) // 2] = task.processor.mask_token
        text = " ".join(words)
        return Posed({"text": text}, text, hidden, keys)
    asked = task.posed(row)
    said = task.word or "\n".join(map(_words, asked.values()))
    return Posed(asked, said, _right(task, row), keys)


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(map(str, value))
    size = getattr(value, "size", None)
    return f"a picture of {size[0]} x {size[1]}" if isinstance(size, tuple) else "a recording"


def _right(task: Task, row: Mapping[str, Any]) -> str:
    names = task.data.labels
    if "tags" in row:
        return task.said({"words": row["tokens"], "tags": [names[t] for t in row["tags"]]}
                         ) if names else ""
    if "answers" in row:
        return task.said({"text": next(iter(row["answers"]["text"]), "")})
    label = row.get("label")
    if task.takes == ("audio",) and "text" in row:                  # what is said in it
        return str(row["text"])
    if names is None or label is None:
        return "" if label is None else f"{label:.4g}"
    return ", ".join(names[i] for i in label) or "none" if isinstance(label, list) else names[label]


class _Near:
    """A model elsewhere, asked with batches of the CPU, and answering there."""

    def __init__(self, model: nn.Module, device: Any):
        self.model, self.device = model, device

    @property
    def whole(self) -> nn.Module:
        """The model itself, for who asks it by parts."""
        return self.model

    def __call__(self, **batch: Any) -> Any:
        out = self.model(**moved(batch, self.device))
        for key in list(out):                       # an object of transformers stays one
            out[key] = moved(out[key], "cpu")
        return out

    def generate(self, **how: Any) -> Any:
        return self.model.generate(**moved(how, self.device)).cpu()  # type: ignore[operator]
