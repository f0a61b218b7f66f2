"""A finished run, opened again: its model with what was learnt, and the task it was made for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..core.errors import CheckError, ConfigError
from . import asked
from .series import listed

#: either says that a run left its tokenizer, image processor or feature extractor in the folder
PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json")


@dataclass
class Finished:
    """What `burnish fit` left in a folder. `facts` is its run.json."""

    folder: Path
    tuned: Any
    task: Any
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, base: str | None = None, force: bool = False,
             unread: bool = False, trust: bool = False) -> Finished:
        """base: the base model's folder or name, where it is no longer what the run recorded.
        trust: let code that comes with the base run.
        unread: weights wait in the base's files even where the recipe stores none of them.

        Raises FormatError for what is no adapter, ConfigError for an adapter without a run.
        """
        import torch

        import burnish

        from ..formats.fingerprint import dtype_of
        from ..formats.folder import RUN, read_config, read_run
        from .data import Data
        from .places import processor_for
        from .promise import stores
        from .tasks import embedded, task_for

        quiet()
        was = read_config(folder)["base"]
        recorded, dtype = was.get("name"), dtype_of(was)
        if not (folder / RUN).is_file():
            raise ConfigError(f"{folder} holds an adapter but no {RUN}, so its task is unknown; "
                              "predict and evaluate need the folder of a finished fit")
        facts = read_run(folder)
        name = base or facts.get("model") or recorded
        about = facts["data"]
        data = Data(about["task"], {}, about["source"], about["layout"],
                    tuple(about["labels"]) if about["labels"] else None,
                    form=about.get("form"), roles=about.get("roles", {}))
        own = any((folder / f).is_file() for f in PROCESSORS)   # as it was used in training
        task = task_for(data, name, processor=processor_for(data.task, str(folder)) if own else
                        None, max_length=facts.get("max_length"),
                        trust_remote_code=trust,
                        seed=int(facts["training"].get("seed", 42)), **facts.get("task", {}))
        embedded(about["task"], facts["recipe"])
        task.folder = folder
        torch.manual_seed(int(facts["training"].get("seed", 42)))  # what the base lacks is drawn
        try:
            module = task.load(name, trust, unread=unread or stores(facts["recipe"]),
                               **({} if dtype is None else {"dtype": dtype}))
        except ConfigError as e:
            if base is not None:
                raise
            raise ConfigError(f"{e}; where the base model has moved since, give base=") from None
        tuned = burnish.load(module, folder, force=force)
        tuned.model.eval()
        return cls(folder, tuned, task, facts)

    def cached(self, limit: str | None) -> contextlib.AbstractContextManager[None]:
        """``tuned.cached``, where somebody has said a limit."""
        return contextlib.nullcontext() if limit is None else self.tuned.cached(limit)

    # -- answers -------------------------------------------------------------------------------
    def predict(self, inputs: Sequence[str], tokens: int = 64,
                keys: Mapping[str, float] = MappingProxyType({}), beside: bool = False
                ) -> Iterator[dict[str, Any]]:
        """One answer per input: what the task makes of it, beside what was given and ``said``, the
        answer in a line.

        inputs: pictures or sounds, and folders of them; texts, `.txt` files of one a line, tables
            of rows with the columns of the task, rows as JSON objects.

        keys: entries of the keys that the recipe reads beside an input, for all inputs.
        beside: also ``base``, what the model said before, in a line.
        """
        import torch

        for name, read in self.keys.items():
            if name not in keys and not (read.key.training or read.key.optional):
                raise ConfigError(f"{read.part} reads {name!r} ({read.key.meaning}): give "
                                  f"--given {name}=..., {read.range}")
        model = self.tuned.model
        for given, row in asked.rows(inputs, self.task, self.facts["data"].get("roles", {})):
            with torch.no_grad(), self.tuned.given(**keys):
                made = self.task.answer(model, row, tokens)
            said = {"input": given, **made, "said": self.task.said(made)}
            if beside:
                with torch.no_grad(), self.tuned.disabled():
                    said["base"] = self.task.said(self.task.answer(model, row, tokens))
            yield said

    @property
    def keys(self) -> dict[str, Any]:
        """What the recipe reads beside a row: name -> core.keys.Read."""
        from ..core.keys import keys_of

        return keys_of(self.tuned.recipe)

    # -- figures -------------------------------------------------------------------------------
    def evaluate(self, data: Any, split: str | None = None, batch: int = 16,
                 **columns: str | None) -> dict[str, Any]:
        """The figures of the tuned model and of its base on rows of a split.

        data: where it is what the run was trained on, the rows that the run held out are taken;
        columns: text=, label=, image=, audio=, where they are not called as in the run.
        Raises CheckError when both give the same outputs: the adapter does nothing then.
        """
        import torch

        from .tasks import evaluate

        rows, name, these = self.chosen(data, split, columns)
        self.task.ready(self.tuned, next(self.tuned.model.parameters()).device, batch)
        first = self.task.feed(self.task.collate([rows[i] for i in range(min(batch, len(rows)))]))
        with torch.no_grad():
            logits = self.task.logits(self.tuned.model(**first))
            with self.tuned.disabled():
                plain = self.task.logits(self.tuned.model(**first))
        if logits.equal(plain):
            raise CheckError(f"{self.folder} changes nothing: its outputs are those of the base")
        tuned = evaluate(self.tuned.model, self.task, name, batch)
        with self.tuned.disabled():
            base = evaluate(self.tuned.model, self.task, name, batch)
        return {"data": str(data), "split": name,
                "rows": self.task.data.sizes()[name], "these": these,
                "tuned": tuned, "base": base}

    def held_out(self, data: Any, split: str | None) -> str:
        """The split that candidates are compared on, ready to be evaluated: `split`, or validation,
        or the only one. ConfigError rather than the test split unasked."""
        try:
            return self.chosen(data, split or "validation", {})[1]
        except ConfigError:
            if split is not None:
                raise
        name = self.chosen(data, None, {})[1]
        if name == "test":
            raise ConfigError(f"{data} has no validation split; say with --split which rows were "
                              "held out")
        return name

    def chosen(self, data: Any, split: str | None, columns: dict[str, str | None]
               ) -> tuple[Any, str, str]:
        """(rows, name of the split, which rows these are in words); the split is `split`, or test,
        validation, train, the first there is."""
        from .data import read, set_aside

        about, *others = self.facts.get("tasks", {"": self.facts["data"]}).values()
        how = {**about.get("reading", {}), **{k: v for k, v in columns.items() if v}}
        part, seed = how.pop("validation", 0), how.pop("seed", 0)
        if (names := about.get("roles", {}).get("channels")) and not columns.get("label"):
            how["label"] = listed(names)                # in their order, whatever a file's is
        found = read(data, **{**how, "task": about["task"]}, validation=0,
                     labels=self.task.data.labels, keys=self.keys,
                     optional=[k for k, r in self.keys.items() if r.key.training])
        again = found
        if part and "validation" not in found.splits:
            with contextlib.suppress(ConfigError):              # fewer rows than it would take
                again = set_aside(found, part, seed)
        same = again.fingerprint() in {a["fingerprint"] for a in (about, *others)}
        found = again if same else found
        name = split or next(s for s in ("test", "validation", "train") if s in found.splits)
        if name not in found.splits:
            raise ConfigError(f"{data} has no split {name!r}; it has {', '.join(found.splits)}")
        self.task.data.splits[name], self.task.data.keys = found.splits[name], found.keys
        self.task.data.where |= found.where
        these = "the rows this run was trained on" if name == "train" else "held out by this run"
        return self.task.rows(name), name, these if same else "all of them"


def quiet() -> None:
    from .driving import quiet_libraries

    quiet_libraries()
