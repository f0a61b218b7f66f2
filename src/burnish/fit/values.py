"""From a table's values to canonical rows, with whatever is wrong said by its row and field."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from ..core.reading import plain
from . import boxes, graphs, labels, series, turns
from .kinds import SINGLE, form_of_label, generated, in_time
from .labels import Classes
from .roles import Roles
from .table import Table

if TYPE_CHECKING:
    import datasets


def canonical(table: Table, roles: Roles, classes: Classes, source: str
              ) -> tuple[datasets.Dataset, Classes]:
    """The canonical rows of `table`, and the classes (found here unless given)."""
    import datasets

    if roles.task in ("instruction-tuning", *SINGLE):
        return datasets.Dataset.from_list(turns.canonical(table, roles)), None
    if roles.task == "unpaired-preference-tuning":
        return datasets.Dataset.from_list(turns.marks(table, roles)), None
    if roles.task == "preference-tuning":
        return datasets.Dataset.from_list(turns.preferences(table, roles)), None
    if roles.task == "question-answering":
        return datasets.Dataset.from_list(_questions(table)), None
    if in_time(roles.task):
        return series.canonical(table, roles), None
    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    words = datasets.List(datasets.Value("string"))
    recorded = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    for role, feature, check in (("image", datasets.Image(), _images),
                                 ("mask", datasets.Image(), _images),
                                 ("audio", recorded, partial(_files, word="sound")),
                                 ("cloud", recorded, partial(_files, word="cloud", coded=False)),
                                 ("text", datasets.Value("string"), _texts),
                                 ("pair", datasets.Value("string"), _texts),
                                 ("negative", datasets.Value("string"), _texts),
                                 ("tokens", words, _tokens)):
        name = getattr(roles, role)
        if name is not None:
            columns[role], features[role] = _column(table, name), feature
            columns[role] = check(columns[role], name, table) or columns[role]
    if roles.objects is not None:
        told = _column(table, roles.objects)
        columns["boxes"], columns["classes"], classes = boxes.objects(
            told, roles.objects, table, classes or table.classes.get(roles.objects))
        features["boxes"] = datasets.List(datasets.List(datasets.Value("float64")))
        features["classes"] = datasets.List(datasets.Value("int64"))
    if roles.edges is not None:
        columns |= graphs.canonical(table)
        features |= {k: datasets.List(datasets.List(datasets.Value(v)))
                     for k, v in (("edge_index", "int64"), ("node_feat", "float64"))}
    form = "class" if generated(roles.task or "") else form_of_label(roles.task or "")
    if form is None or roles.label is None:
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features)), classes
    if form == "several" and roles.label not in table.columns:
        named = tuple(n.strip() for n in roles.label.split(","))
        given, classes = labels.marked(table, named), classes or named
    else:
        given = _column(table, roles.label)
    number = datasets.Value("int64")
    if form == "number":
        columns["label"] = labels.numbers(given, roles.label, table,
                                          1.0 if roles.task == "embedding" else None)
        features["label"] = datasets.Value("float64")
    elif form == "class":
        columns["label"], classes = labels.single(given, roles.label, table, classes, source)
        features["label"] = datasets.ClassLabel(names=list(classes))
    elif form == "several":
        columns["label"], classes = labels.several(given, roles.label, table, classes, source)
        features["label"] = datasets.List(number)
    else:
        columns["tags"], classes = labels.tags(given, columns["tokens"], roles.label, table,
                                               classes, source)
        features["tags"] = datasets.List(number)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features)), classes


def _column(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        raise DataError(f"{table.where(0)}: a split lacks the column {name!r}")
    return table.columns[name]


def _tokens(values: list[Any], field: str, table: Table) -> None:
    for i, row in enumerate(values):
        at = f"{table.where(i)}, field {field!r}"
        if not isinstance(row, list) or not row:
            raise DataError(f"{at}: expected a list of words, it is "
                            f"{'empty' if row == [] else f'a {type(row).__name__}'}")
        for k, word in enumerate(row):
            if not isinstance(word, str) or not word.strip():
                raise DataError(f"{at}: word {k} is {word!r}; expected text")


def _questions(table: Table) -> list[dict[str, Any]]:
    """``context``, ``question`` and the answers as texts with the place where each begins."""
    rows = []
    for i, row in enumerate(table.rows()):
        at = table.where(i)
        context, question = (turns.words(row, k, at) for k in ("context", "question"))
        texts, starts = _answers(row.get("answers"), context, f"{at}, field 'answers'")
        rows.append({"context": context, "question": question,
                     "answers": {"text": texts, "answer_start": starts}})
    return rows


def _answers(given: Any, context: str, at: str) -> tuple[list[str], list[int]]:
    """SQuAD's ``{"text": [...], "answer_start": [...]}``, a list of such, one of either, or texts
    that stand in the context once. No answer at all is an answer: the context does not say."""
    if given is None or given == []:
        return [], []
    if isinstance(given, list) and all(isinstance(a, dict) for a in given):
        given = {"text": [a.get("text") for a in given],
                 "answer_start": [a.get("answer_start") for a in given]}
    if isinstance(given, str):
        given = {"text": [given]}
    elif isinstance(given, list):
        given = {"text": given}
    if not isinstance(given, dict) or "text" not in given:
        raise DataError(f"{at}: expected texts with answer_start, found {type(given).__name__}")
    texts = given["text"] if isinstance(given["text"], list) else [given["text"]]
    starts = given.get("answer_start")
    starts = starts if isinstance(starts, list) else [starts] * len(texts)
    if len(texts) != len(starts):
        raise DataError(f"{at}: {len(texts)} texts and {len(starts)} starts")
    found = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{at}: an answer is {text!r}; expected text")
        if start is None:
            times = context.count(text)
            if times != 1:
                raise DataError(f"{at}: {plain(text, 60)!r} stands in the context "
                                f"{'nowhere' if not times else f'{times} times'}; say which with "
                                "answer_start")
            start = context.index(text)
        if not isinstance(start, int) or context[start:start + len(text)] != text or start < 0:
            there = context[start:start + len(text)] if isinstance(start, int) else start
            raise DataError(f"{at}: at answer_start {start} the context says {plain(there, 60)!r}, "
                            f"not {plain(text, 60)!r}")
        found.append(start)
    return texts, found


def _texts(values: list[Any], field: str, table: Table) -> None:
    for i, v in enumerate(values):
        if not isinstance(v, str):
            what = "missing" if v is None or v != v else f"a {type(v).__name__}"
            raise DataError(f"{table.where(i)}, field {field!r}: expected text, it is {what}")
        if not v.strip():
            raise DataError(f"{table.where(i)}, field {field!r}: the text is empty")


def _images(values: list[Any], field: str, table: Table) -> list[Any]:
    """Pictures, those that are named as they are found."""
    out = []
    for i, given in enumerate(values):
        v = given
        if isinstance(v, dict):
            v = v.get("bytes") or v.get("path")
        if v is None or not (isinstance(v, str | bytes) or hasattr(v, "convert")):
            raise DataError(f"{table.where(i)}, field {field!r}: expected a picture (a path, "
                            f"encoded bytes or a PIL image), found {type(v).__name__}")
        there = table.path(v) if isinstance(v, str) else None
        if isinstance(v, str) and there is None:
            raise DataError(f"{table.where(i)}, field {field!r}: there is no picture at "
                            f"{plain(v)}")
        out.append(given if there is None else str(there))
    return out


def _files(values: list[Any], field: str, table: Table, word: str, coded: bool = True
           ) -> list[dict[str, Any]]:
    """Recordings, or clouds, as ``{"bytes", "path"}``, as `datasets` keeps recordings. coded:
    whether the bytes of a file will do (the ending of a cloud's says how it is read)."""
    out = []
    for i, v in enumerate(values):
        given = v if isinstance(v, dict) else {"bytes" if isinstance(v, bytes) else "path": v}
        held, path = given.get("bytes") if coded else None, given.get("path")
        if not isinstance(held, bytes) and not isinstance(path, str):
            what = "a path, or the bytes of a file" if coded else "a path"
            raise DataError(f"{table.where(i)}, field {field!r}: expected a {word} ({what}), found "
                            f"{type(v).__name__}")
        there = None if held else table.path(path)
        if not held and there is None:
            raise DataError(f"{table.where(i)}, field {field!r}: there is no {word} at "
                            f"{plain(path)}")
        out.append({"bytes": held or None, "path": None if there is None else str(there)})
    return out
