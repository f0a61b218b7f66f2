"""A finished run, opened again: its model with what was learnt, and the task it was made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import CheckError, ConfigError, DataError


@dataclass
class Finished:
    """What `burnish fit` left in a folder. `facts` is its run.json."""

    folder: Path
    tuned: Any
    task: Any
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, base: str | None = None, force: bool = False) -> Finished:
        """base: the base model's folder or name, where it is no longer what the run recorded.

        Raises FormatError for what is no adapter, ConfigError for an adapter without a run.
        """
        import burnish

        from ..fit.data import Data
        from ..fit.loop import quiet_libraries
        from ..fit.tasks import task_for
        from ..formats.folder import RUN, read_config
        from ..formats.safe import read_json

        quiet_libraries()
        recorded = read_config(folder)["base"].get("name")
        if not (folder / RUN).is_file():
            raise ConfigError(f"{folder} holds an adapter but no {RUN}, so its task is unknown; "
                              "predict and evaluate need the folder of a finished fit")
        facts = read_json(folder / RUN)
        name = base or facts.get("model") or recorded
        about = facts["data"]
        data = Data(about["task"], {}, about["source"], about["layout"],
                    tuple(about["labels"]) if about["labels"] else None)
        words = (folder / "tokenizer_config.json").is_file()
        task = task_for(data, str(folder) if words else name)
        tuned = burnish.load(task.load(name), folder, force=force)
        tuned.model.eval()
        return cls(folder, tuned, task, facts)

    # -- answers -------------------------------------------------------------------------------
    def predict(self, inputs: Sequence[str], tokens: int = 64) -> Iterator[dict[str, Any]]:
        """One answer per input: a label with its probability, or text that goes on."""
        import torch

        for given, row in self._rows(inputs):
            with torch.no_grad():
                if self.task.data.labels:
                    share = self._logits(row)[0].float().softmax(-1)
                    best = int(share.argmax())
                    yield {"input": given, "label": self.task.data.labels[best],
                           "probability": float(share[best])}
                else:
                    yield {"input": given, "text": self._go_on(row, tokens)}

    def _rows(self, inputs: Sequence[str]) -> Iterator[tuple[str, Any]]:
        if self.task.data.task == "image-classification":
            for path in _pictures(inputs):
                yield str(path), {"pixel_values": self.task.processor(_picture(path))[None]}
            return
        for text in _texts(inputs):
            if self.task.data.task == "instruction-tuning":
                turn = [{"role": "user", "content": text}]
                yield text, self.task.processor.apply_chat_template(
                    turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            else:
                yield text, self.task.processor(text, return_tensors="pt", truncation=True,
                                                max_length=self.task.max_length)

    def _logits(self, batch: dict[str, Any]) -> Any:
        from ..fit.tasks import logits_of

        return logits_of(self.tuned.model(**batch))

    def _go_on(self, row: dict[str, Any], tokens: int) -> str:
        made = self.tuned.model.generate(**row, max_new_tokens=tokens, do_sample=False,
                                         pad_token_id=self.task.processor.pad_token_id)
        return self.task.processor.decode(made[0, row["input_ids"].shape[1]:],
                                          skip_special_tokens=True)

    # -- figures -------------------------------------------------------------------------------
    def evaluate(self, data: Any, split: str | None = None, batch: int = 16) -> dict[str, Any]:
        """The figures of the tuned model and of its base on every row of a split.

        Raises CheckError when both give the same outputs: the adapter does nothing then.
        """
        rows, name = self._split(data, split)
        tuned, first = self._figures(rows, batch)
        with self.tuned.disabled():
            base, plain = self._figures(rows, batch)
        if first.equal(plain):
            raise CheckError(f"{self.folder} changes nothing: its outputs are those of the base")
        return {"data": str(data), "split": name, "rows": len(rows), "tuned": tuned, "base": base}

    def _split(self, data: Any, split: str | None) -> tuple[Any, str]:
        from ..fit.data import read

        own = self.task.data
        found = read(data, task=own.task, split=None, validation=0)
        if own.labels and found.labels and not set(found.labels) <= set(own.labels):
            new = sorted(set(found.labels) - set(own.labels))
            raise DataError(f"{data} has classes this run was not trained for: {', '.join(new)}; "
                            f"it knows {', '.join(own.labels)}")
        name = split or next(s for s in ("test", "validation", "train") if s in found.splits)
        if name not in found.splits:
            raise ConfigError(f"{data} has no split {name!r}; it has {', '.join(found.splits)}")
        if own.labels and found.labels != own.labels:
            place = [own.labels.index(word) for word in found.labels or ()]
            found.splits[name] = found.splits[name].map(lambda r: {"label": place[r["label"]]})
        self.task.data.splits[name] = found.splits[name]
        return self.task.rows(name), name

    def _figures(self, rows: Any, size: int) -> tuple[dict[str, float], Any]:
        """(figures, the first batch's logits)."""
        import torch

        answers, truth, losses, first = [], [], [], None
        with torch.no_grad():
            for start in range(0, len(rows), size):
                batch = self.task.collate([rows[i] for i in range(start, min(start + size,
                                                                             len(rows)))])
                logits = self._logits(batch)
                first = logits if first is None else first
                losses.append((float(self.task.loss(logits, batch["labels"])), len(logits)))
                answers += list(self.task.reduce(logits, batch["labels"]))
                truth += list(batch["labels"])
        pad = torch.nn.utils.rnn.pad_sequence
        whole = [pad(v, batch_first=True, padding_value=-100) if v[0].dim() else torch.stack(v)
                 for v in (answers, truth)]
        loss = sum(v * n for v, n in losses) / sum(n for _, n in losses)
        return {"loss": loss, **self.task.measure(*whole)}, first


def _pictures(inputs: Sequence[str]) -> Iterator[Path]:
    from ..fit.layouts import IMAGES

    for given in map(Path, inputs):
        if given.is_dir():
            inside = sorted(p for p in given.rglob("*") if p.suffix.lower() in IMAGES)
            if not inside:
                raise DataError(f"{given} holds no pictures")
            yield from inside
        elif given.is_file():
            yield given
        else:
            raise DataError(f"there is no picture at {given}")


def _picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: the picture cannot be read: {error}") from None


def _texts(inputs: Sequence[str]) -> Iterator[str]:
    """The words themselves, or the lines of a file of that name."""
    for given in inputs:
        path = Path(given)
        if path.suffix == ".txt" and path.is_file():
            yield from filter(None, map(str.strip, path.read_text("utf-8").splitlines()))
        else:
            yield given
