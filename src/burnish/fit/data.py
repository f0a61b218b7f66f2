"""What is given as data becomes one thing: named splits of a known task.

    read("digits")                     scikit-learn's 1,797 scanned digits
    read("photos/")                    class folders, or train/ and validation/ of them
    read("sounds/")                    the same, of recordings, or of clouds of points
    read("MUTAG/")                     graphs of the TU collection
    read("mails.csv", label="folder")  tables: CSV, TSV, JSON, JSONL, parquet
    read("chats.jsonl")                messages, conversations, alpaca, prompt and completion
    read("owner/name:split")           a hub name, through `datasets.load_dataset`
    read(datasets.Dataset | DatasetDict)

Layouts are recognised by their columns; what cannot be told is asked for by the name of a flag.
Whatever is wrong is said with its row and field, before a model is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, DataError, nearest
from ..core.keys import Read
from ..core.reading import beside, reading
from . import graphs, layouts, masks, series
from .beside import apart, missing, told_apart, without
from .columns import assign, label_of
from .kinds import (
    SINGLE,
    TASKS,
    drawn_by_text,
    form_of_label,
    generated,
    in_time,
    tasks_said,
)
from .labels import differ
from .layouts import SPLITS
from .media import opened
from .roles import Roles
from .table import Table
from .turns import as_rows_of
from .values import canonical

if TYPE_CHECKING:
    import datasets


@dataclass
class Data:
    """Splits of one task, in canonical columns.

    image-...: ``image``, ``label``.  audio-...: ``audio``, ``label``.  text-...: ``text`` (and
    ``pair``), ``label``.  A label is a class (-classification), a list of classes (-multi-label) or
    a number (-regression).  semantic-segmentation: ``image``, ``mask``.  text-segmentation:
    ``image``, ``mask``, ``text``.
    object-detection: ``image``, ``boxes`` (x, y, width, height in pixels), ``classes``.
    image-text-contrastive, image-captioning: ``image``, ``text``.
    image-generation: ``image``, and ``label``, a class, where there are such.
    text-to-image: ``image``, and ``text`` where each has its own.
    speech-recognition, speech-to-text: ``audio``, ``text``.
    cloud-...: ``cloud`` (clouds.py), ``label``.  graph-...: ``edge_index``, ``node_feat``
    (graphs.py), ``label``.
    time-series-forecasting: ``series``, ``values``, ``begin`` (series.py), a row a series.
    token-classification: ``tokens``, ``tags``.  question-answering: ``context``, ``question``,
    ``answers`` (``text``, ``answer_start``).  language-modelling, masked-language-modelling:
    ``text``.  instruction-tuning: ``messages``, or ``prompt`` and ``completion``.
    embedding: ``text`` and ``pair``, with ``negative`` or ``label``, a number.
    unpaired-preference-tuning: ``messages``, or ``prompt`` and ``completion``, with ``good``.
    sequence-to-sequence, masked-instruction-tuning: ``prompt`` and ``completion``.
    preference-tuning: ``chosen`` and ``rejected`` turns, or texts beside a ``prompt``.
    """

    task: str
    splits: dict[str, datasets.Dataset]
    source: str
    layout: str
    labels: tuple[str, ...] | None = None
    where: dict[str, Callable[[int], str]] = field(default_factory=dict, repr=False)
    #: messages, or completion: prompts and answers joined as they are
    form: str | None = None
    #: which columns are read as what, in words, and by role
    columns: str = ""
    roles: dict[str, Any] = field(default_factory=dict, repr=False)
    #: what :func:`read` was told, so that the same rows can be found again
    reading: dict[str, Any] = field(default_factory=dict, repr=False)
    #: the numbers that masks hold
    held: tuple[int, ...] = ()
    #: columns that are keys of context, which parts of the recipe read beside the rows
    keys: tuple[str, ...] = ()

    @property
    def train(self) -> datasets.Dataset:
        return self.splits["train"]

    @property
    def validation(self) -> datasets.Dataset | None:
        return self.splits.get("validation")

    @property
    def test(self) -> datasets.Dataset | None:
        return self.splits.get("test")

    def several(self, column: str, *splits: str) -> None:
        """Raises DataError where all rows of a split have one text in `column`: what is learnt and
        measured is to tell it from others, and there is none."""
        for split in splits or tuple(self.splits):
            rows = self.splits[split]
            if len(set(rows[column][:])) < 2:
                only = f"all {len(rows)} rows have one {column}" if len(rows) > 1 else \
                    "it has one row"
                share = ", or another share with validation=" if split == "validation" else ""
                raise DataError(f"{self.source}, {split}: {only}, and nothing is told apart; give "
                                f"rows of several{share}")

    def as_task(self, task: str) -> Data:
        """The same rows, learnt in another way. Raises DataError with the row that cannot be."""
        if drawn_by_text(self.task):                       # masks are of classes, whatever is said
            unread = f"not read: {self.roles['text']}"
            return replace(
                self, task=task, columns=f"{self.columns}; {unread}" if self.columns else unread,
                roles={k: v for k, v in self.roles.items() if k != "text"},
                labels=masks.classes(self.held, self.labels, self.source),
                splits={n: rows.remove_columns("text") for n, rows in self.splits.items()})
        splits = {n: as_rows_of(task, rows, self.where.get(n)) for n, rows in self.splits.items()}
        return replace(self, task=task, splits=splits,
                       form="completion" if task in SINGLE else self.form)

    def row(self, split: str, i: int) -> dict[str, Any]:
        """As it is read. Raises DataError for a picture that is broken inside."""
        return opened(self.splits[split], i, self.where.get(split))

    def sizes(self) -> dict[str, int]:
        """Rows of each split; of series their steps."""
        return {k: series.steps(v) if in_time(self.task) else len(v)
                for k, v in self.splits.items()}

    def samples(self, n: int = 3) -> list[str]:
        """The first rows of each kind, as people read them."""
        seen: list[str] = []
        step = max(1, len(self.train) // max(1, n))
        for i in range(0, len(self.train), step)[:n]:
            row = self.row("train", i)
            seen.append("  ".join(
                f"{k}={_short(v, self.labels if k in ('label', 'tags') else None)}"
                for k, v in row.items() if k != "begin"))
        return seen

    def summary(self) -> dict[str, Any]:
        """The facts written into `run.json`."""
        return {"source": self.source, "layout": self.layout, "task": self.task,
                "rows": self.sizes(),
                "labels": list(self.labels) if self.labels else None, "form": self.form,
                "reading": self.reading, "roles": self.roles, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A digest of task, labels, sizes and some rows: enough to tell other data."""
        h = hashlib.sha256(json.dumps([self.task, self.labels]).encode())
        for name, rows in self.splits.items():
            h.update(f"{name}{len(rows)}".encode())
            for i in sorted({0, len(rows) // 3, len(rows) // 2, len(rows) - 1}):
                h.update(repr({k: v if isinstance(v, str | int | list) else _short(v)
                               for k, v in self.row(name, i).items()}).encode())
        return h.hexdigest()[:16]

    def __str__(self) -> str:
        sizes = ", ".join(f"{n} {k}" for k, n in self.sizes().items())
        kinds = f", {len(self.labels)} classes" if self.labels else ""
        read = f"; {self.columns}" if self.columns else ""
        return f"{self.source}: {self.layout}, {self.task} ({sizes}{kinds}){read}"


def _said(reader: Callable[..., Data]) -> Callable[..., Data]:
    """Whatever fails inside is a DataError that names the data."""
    @functools.wraps(reader)
    def read(data: Any, **how: Any) -> Data:
        with reading(data if isinstance(data, str | Path) else f"a {type(data).__name__}",
                     DataError):
            return reader(data, **how)

    return read


@_said
def read(data: Any, *, task: str | None = None, text: str | None = None, label: str | None = None,
         image: str | None = None, audio: str | None = None, split: str | None = None,
         validation: float | int = 0.1, seed: int = 0, labels: Sequence[str] | None = None,
         prompt: str | None = None, completion: str | None = None, group: str | None = None,
         keys: Mapping[str, Read] = MappingProxyType({}),
         optional: Collection[str] = ()) -> Data:
    """Reads data for fine-tuning.

    data: a name, path, hub name (``owner/name``, ``owner/name:split``), `datasets` object or Data.
    task: one of TASKS; None takes what the columns say.
    text, label, image, audio: names of columns where they cannot be told.
    prompt, completion: two columns of which the second is learnt as the answer to the first.
    group: a column that says which task an example of instruction-tuning is of, kept as ``group``.
    split: the training split's name where it is not called train.
    validation: share (or number) of training rows set aside when there is no validation split;
        0 for none. The choice is a function of `seed`, and keeps the proportions of classes.
    labels: the classes in their order, where they are known beforehand.
    keys: what the recipe reads beside the rows (core/keys.py): each is a column of its name.
    optional: those of them that may be missing.

    Raises DataError with row and field, ConfigError for a wrong flag, and AmbiguousError (a
    DataError) with the readings where columns can be read in more than one way.
    """
    optional = {*optional, *(name for name, read in keys.items() if read.key.optional)}
    if isinstance(data, Data):
        for name in keys:
            if name not in data.keys and name not in optional:
                raise DataError(missing(keys[name], name, data.source, data.train.column_names))
        return data
    if task is not None and task not in TASKS:
        raise ConfigError(f"there is no task {task!r}{nearest(task, TASKS) or '; ' + tasks_said()}")
    flags = Roles(task=task, text=text, label=label, image=image, audio=audio, prompt=prompt,
                  completion=completion)
    source, tables = _tables(data, split, task)
    if "train" not in tables:
        raise DataError(f"{source} has no training split; it has {', '.join(tables)}; name it "
                        "with split=")
    beside = {s: apart(t, s, keys, optional) for s, t in tables.items()}
    tables = {s: t for s, (t, _) in beside.items()}
    grouped = {s: told_apart(t, group) for s, t in tables.items()} if group else {}
    tables |= {s: without(t, group) for s, t in tables.items() if group}
    for t in tables.values():
        if graphs.recognised(list(t.columns)):
            graphs.unwrapped(t, label or label_of(list(t.columns)))
    roles = assign(tables["train"], flags)
    if group and roles.task != "instruction-tuning":
        raise ConfigError(f"group={group!r} says which task an example of instruction-tuning is "
                          f"of, and the data are for {roles.task}")
    classes = tuple(labels) if labels else None
    held: set[int] = set()
    if roles.mask and roles.image:
        for t in tables.values():
            held |= masks.values(t, roles.mask, roles.image)
    if roles.mask and roles.image and not drawn_by_text(roles.task):
        classes = masks.classes(held, classes or tables["train"].classes.get(roles.mask), source)
    splits: dict[str, datasets.Dataset] = {}
    order = sorted(tables, key=lambda s: s != "train")  # the classes are those of the train split
    for name in order:
        splits[name], classes = canonical(tables[name], roles, classes, source)
        for key, entries in beside[name][1].items():
            if roles.task in ("language-modelling", "masked-language-modelling"):
                raise DataError(f"language modelling runs documents end to end, so no row has a "
                                f"{key!r} of its own, which {keys[key].part} reads")
            if in_time(roles.task):
                raise DataError(f"a forecast is of many rows, none of which has a {key!r} of its "
                                f"own, which {keys[key].part} reads")
            splits[name] = splits[name].add_column(key, entries)
        if group:
            splits[name] = splits[name].add_column("group", grouped[name])
    if "label" in splits["train"].column_names and form_of_label(roles.task or "") == "number":
        differ(splits["train"]["label"][:], roles.label or "", source)
    known = tuple(k for k in keys if all(k in found for _, found in beside.values()))
    form = None
    if roles.task in ("instruction-tuning", *SINGLE, "preference-tuning",
                      "unpaired-preference-tuning"):
        form = "completion" if "prompt" in splits["train"].column_names else "messages"
    done = Data(roles.task or "", splits, source, tables["train"].layout, classes,
                {k: series.where(splits[k]) if in_time(roles.task) else t.where
                 for k, t in tables.items()}, form,
                roles.said(n for n in tables["train"].columns if n != "tools" or
                           n not in splits["train"].column_names), roles.named(),
                {"task": task, "text": text, "label": label, "image": image, "audio": audio,
                 "prompt": prompt, "completion": completion, "group": group, "split": split,
                 "validation": validation, "seed": seed}, tuple(sorted(held)), known)
    if "validation" not in splits and validation:
        done = set_aside(done, validation, seed)
    return done


def set_aside(data: Data, part: float | int, seed: int) -> Data:
    """Moves a reproducible part of the training rows into `validation`, class by class; of series
    their last steps."""
    import torch

    if in_time(data.task):
        early, late = series.set_aside(data.train, part)
        return replace(data, splits=data.splits | {"train": early, "validation": late},
                       where=data.where | {"validation": series.where(late)})
    rows = len(data.train)
    count = int(part) if part >= 1 else max(1, round(rows * part))
    if count >= rows:
        raise ConfigError(f"validation={part} would take {count} of the {rows} training rows")
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=g).tolist()
    classes = form_of_label(data.task) == "class" or generated(data.task)
    if classes and "label" in data.train.column_names:
        labels = data.train["label"][:]
        by_class: dict[int, list[int]] = {}
        for i in order:
            by_class.setdefault(labels[i], []).append(i)
        # the k-th of a class's n rows stands at (k + 1/2) / n: cutting there keeps proportions
        spread = [((k + 0.5) / len(v), i) for v in by_class.values() for k, i in enumerate(v)]
        order = [i for _, i in sorted(spread)]
    held, kept = sorted(order[:count]), sorted(order[count:])
    splits = dict(data.splits) | {"train": data.train.select(kept),
                                  "validation": data.train.select(held)}
    where = dict(data.where)
    if "train" in where:
        at = where["train"]
        where |= {"train": lambda i: at(kept[i]), "validation": lambda i: at(held[i])}
    return replace(data, splits=splits, where=where)


def there(data: Any) -> None:
    """Is there something at a path? Raises DataError before anything heavy is imported."""
    if isinstance(data, str | Path) and str(data) != "digits":
        path = Path(data).expanduser()
        if not path.exists() and _looks_local(str(data), path):
            layouts.files(path)  # says what is missing, and what is near


def _looks_local(name: str, path: Path) -> bool:
    return name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/") or (
        path.suffix.lower() in layouts.TABLES | layouts.PROSE)


# -- where it comes from ---------------------------------------------------------------------
def _tables(data: Any, split: str | None, task: str | None = None
            ) -> tuple[str, dict[str, Table]]:
    if type(data).__module__.partition(".")[0] == "datasets":
        return type(data).__name__, _from_datasets(data, split, "in memory")
    if not isinstance(data, str | Path):
        raise DataError(f"data is a path, a name or a `datasets` object, not "
                        f"{type(data).__name__}; a torch dataset goes to your own loop with "
                        "tuned.step or burnish.TrainerCallback")
    name = str(data)
    if name == "digits":
        return name, digits()
    path = Path(name).expanduser()
    if path.exists():
        tables = layouts.files(path, task)
        if split:
            if split not in tables:
                raise DataError(f"{path} has no split {split!r}; it has {', '.join(tables)}")
            tables["train"] = tables.pop(split)
        return str(data), tables
    there(name)
    return name, _from_hub(name, split)


def _from_hub(name: str, split: str | None) -> dict[str, Table]:
    import datasets

    repo, _, named = name.partition(":")
    try:
        found = datasets.load_dataset(repo)
    except Exception as e:
        raise DataError(f"{repo!r} is neither a path here nor a data set that could be loaded from "
                        f"the hub ({type(e).__name__}: {str(e).splitlines()[0]})"
                        f"{nearest(Path(name).name, beside(Path(name)))}") from None
    return _from_datasets(found, split or named or None, "hub")


def _from_datasets(data: Any, split: str | None, layout: str) -> dict[str, Table]:
    import datasets

    if isinstance(data, datasets.Dataset):
        data = {"train": data}
    elif not isinstance(data, datasets.DatasetDict):
        raise DataError(f"a {type(data).__name__} cannot be shuffled or measured; load it without "
                        "streaming")
    tables: dict[str, Table] = {}
    for name, rows in data.items():
        key = "train" if name == split else SPLITS.get(name, name)
        if split and name != split and key == "train":
            continue
        tables[key] = _from_dataset(rows, name, layout)
    return tables


def _from_dataset(rows: Any, name: str, layout: str) -> Table:
    import datasets

    classes: dict[str, tuple[str, ...]] = {}
    columns: dict[str, Any] = {}
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image | datasets.Audio):
            rows = rows.cast_column(column, type(kind)(decode=False))
        inner = getattr(kind, "feature", None)
        if isinstance(kind, datasets.ClassLabel):
            names = kind.names
            columns[column] = [None if v is None or v < 0 else names[v] for v in rows[column]]
            classes[column] = tuple(names)
        elif isinstance(inner, datasets.ClassLabel):        # a list of classes, or of tags
            columns[column] = [None if row is None else [
                None if v is None or v < 0 else inner.names[v] for v in row]
                for row in rows[column]]
            classes[column] = tuple(inner.names)
        else:
            columns[column] = rows[column][:]
    return Table(columns, lambda i: f"{name}[{i}]", layout, classes)


def digits() -> dict[str, Table]:
    """Scikit-learn's handwritten digits, 8 x 8, in the order in which they were scanned.

    The second half (899) is the test, as in scikit-learn's own example: mostly other writers
    than the first half's, of which the last 178 are for validation and 720 for training.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scans = [Image.fromarray(np.uint8(np.round(x * (255 / 16)))) for x in bunch.images]
    names = [str(t) for t in bunch.target]
    cuts = {"train": (0, 720), "validation": (720, 898), "test": (898, len(names))}

    def part(first: int, last: int) -> Table:
        return Table({"image": scans[first:last], "label": names[first:last]},
                     lambda i: f"digit {first + i}", "8 x 8 scans", {"label": tuple("0123456789")})

    return {k: part(*v) for k, v in cuts.items()}


def _short(value: Any, names: Sequence[str] | None = None, width: int = 60) -> str:
    if names is not None and isinstance(value, int):
        return repr(names[value])
    if hasattr(value, "size") and hasattr(value, "mode"):
        return f"{value.size[0]}x{value.size[1]} {value.mode}"
    if isinstance(value, list):
        said = ", ".join(_short(v, names) for v in value[:4])
        return f"[{said}{'...' if len(value) > 4 else ''}]"
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:      # a file
        return f"{len(value['bytes'])} bytes" if value["bytes"] else Path(value["path"]).name
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_short(v, width=40)}" for k, v in value.items()) + "}"
    text = repr(value)
    return text if len(text) <= width else text[: width - 4] + "...'"
