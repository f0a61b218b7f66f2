"""Files as they lie on disk, read row by row, so that an error can name the row and the field.

Every reader returns a :class:`Table`: columns by name, and where each row came from. What the
columns mean is decided in :mod:`burnish.fit.data`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError, nearest
from ..core.reading import beside, parse_json, plain, read_text, reading, regular
from .graphs import graph_folder
from .kinds import generated
from .masks import paired
from .media import CLOUD, MEDIA, Medium, held
from .table import Table

TABLES = frozenset({".csv", ".tsv", ".jsonl", ".json", ".parquet", ".conll"})
PROSE = frozenset({".txt", ".md", ".rst", ".py"})

#: names of splits people use, and what they mean here
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "eval": "validation", "test": "test",
          "testing": "test"}

#: what the column of files is called beside them, likeliest first
FILES = ("file_name", "image_file_name", "audio_file_name", "file", "image", "audio", "cloud",
         "path")

#: a parquet file may claim this many cells whatever its size; more must be in proportion to it
MOST_CELLS = 5_000_000


def files(path: Path, task: str | None = None) -> dict[str, Table]:
    """Every split found at `path`: a table, a folder of pictures or sounds, or a folder of either.

    task: where somebody has said it, for a folder that holds both.
    Raises DataError when nothing readable is there, saying what was expected.
    """
    if not path.exists():
        raise DataError(f"there is nothing at {path}{nearest(path.name, beside(path))}")
    with reading(path, DataError):
        return folder(path, task) if path.is_dir() else {"train": table(path)}


def table(path: Path) -> Table:
    """One CSV, TSV, JSON, JSONL, parquet or plain text file."""
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet,
               ".conll": _conll}
    kind = path.suffix.lower()
    if kind == ".txt":
        return passages(path)
    if kind in PROSE:
        return prose([path])
    if kind not in readers:
        raise DataError(f"{path} is no layout burnish reads; it reads {', '.join(sorted(TABLES))}, "
                        f"plain text ({', '.join(sorted(PROSE))}) and folders of pictures, of "
                        "sounds or of clouds of points")
    if regular(path, DataError).stat().st_size == 0:
        raise DataError(f"{path} is empty")
    with reading(path, DataError):
        found = readers[kind](path)
    if len(found) == 0:
        raise DataError(f"{path} has no rows")
    found.folder = path.parent
    return found


def folder(path: Path, task: str | None = None) -> dict[str, Table]:
    """A folder: split folders or files, class folders of pictures or sounds, or plain texts."""
    if (found := _coco(path)) is not None:
        return {"train": found}
    if (told := _coco_tree(path)) is not None:
        return told
    if (scenes := paired(path, task, _split_of)) is not None:
        return scenes
    if (graphs := graph_folder(path)) is not None:
        return {"train": graphs}
    if (within := _splits_within(path, task)) is not None:
        return within
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    named = {p: _split_of(p.name) for p in entries
             if p.is_dir() or p.suffix.lower() in TABLES | PROSE}
    if any(split == "train" for split in named.values()):
        out: dict[str, Table] = {}
        for p, split in named.items():
            if split and split not in out:
                plain_media = p.is_dir() and held(p) and paired(p, task, _split_of) is None
                out[split] = media(p, task) if plain_media else (
                    next(iter(files(p, task).values())))
        return out
    tables = [p for p in entries if p.suffix.lower() in TABLES]
    meta = [p for p in tables if p.stem == "metadata"]
    if meta or (not tables and held(path)):
        return {"train": media(path, task)}
    if len(tables) == 1:
        return {"train": table(tables[0])}
    if len(tables) > 1:
        raise DataError(f"{path} holds {len(tables)} tables and none is called train: "
                        f"{', '.join(p.name for p in tables[:6])}; name one of them, or call them "
                        "train, validation and test")
    texts = sorted(p for p in path.rglob("*") if p.suffix.lower() in PROSE)
    if texts:
        return {"train": prose(texts)}
    raise DataError(f"{path} holds neither pictures, sounds or clouds in class folders, nor a "
                    f"table ({', '.join(sorted(TABLES))}), nor plain texts")


def _splits_within(path: Path, task: str | None) -> dict[str, Table] | None:
    """Class folders with split folders in them, as ModelNet has: ``chair/train``, ``chair/test``.
    None where the folders in class folders are no splits."""
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    inside = {c: {s: p for p in sorted(c.iterdir()) if p.is_dir() and (s := _split_of(p.name))}
              for c in classes}
    if not classes or any(_split_of(c.name) for c in classes) or not any(
            "train" in found for found in inside.values()) or not held(path):
        return None
    medium = _medium(path, task)
    out: dict[str, Table] = {}
    for split in dict.fromkeys(s for found in inside.values() for s in found):
        paths: list[str] = []
        labels: list[str] = []
        for c in classes:
            found = medium.among(inside[c][split]) if split in inside[c] else []
            if not found and split == "train":
                raise DataError(f"class folder {c} has no {medium.word} in a folder train, and "
                                "others have one; fill it or remove the class")
            paths += map(str, found)
            labels += [c.name] * len(found)
        medium.look(paths)
        if paths:
            out[split] = Table({medium.role: paths, "label": labels}, paths.__getitem__,
                               f"{medium.word}s of classes, split", {
                                   "label": tuple(c.name for c in classes)})
    return out


def media(path: Path, task: str | None = None) -> Table:
    """Class folders of pictures, sounds or clouds of points, or a `metadata.csv|jsonl` with
    `file_name` and more.

    Raises AmbiguousError for a folder of both where `task` does not say which is learnt.
    """
    if (found := _coco(path)) is not None:
        return found
    for name in ("metadata.csv", "metadata.jsonl"):
        if (path / name).exists():
            return _described(path, path / name)
    medium = _medium(path, task)
    word = medium.word
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    every = task == "text-to-image"
    if medium.role == "image" and (told := _told(path, medium, every)) is not None:
        return told
    if not classes and generated(task or ""):
        paths = [str(p) for p in medium.among(path)]
        medium.look(paths)
        return Table({medium.role: paths}, paths.__getitem__, "pictures")
    if not classes:
        raise DataError(f"{path} holds {word}s but no class folders; expected "
                        f"{path}/<class>/<{word}>, or a metadata.csv with file_name and label")
    paths: list[str] = []
    labels: list[str] = []
    for name in classes:
        found = [str(p) for p in medium.among(path / name)]
        if not found:
            raise DataError(f"class folder {path / name} is empty: it holds no {word} "
                            f"({', '.join(sorted(medium.suffixes))}); fill it or remove it")
        paths += found
        labels += [name] * len(found)
    medium.look(paths)
    layout = f"{medium.role} folder"
    return Table({medium.role: paths, "label": labels}, paths.__getitem__, layout,
                 {"label": tuple(classes)})


def _medium(path: Path, task: str | None) -> Medium:
    there = held(path)
    if len(there) > 1:
        from .readings import AmbiguousError, Reading

        said = [m for m in there if (task or "").startswith(f"{m.role}-")]
        if not said:
            there = [m for m in there if m is not CLOUD]     # pictures of clouds, arrays of numbers
            if len(there) == 1:
                return there[0]
            ways = tuple(Reading((("task", f"{m.role}-classification"),),
                                 f"learns the class of a {m.word}") for m in there)
            raise AmbiguousError(str(path), "it holds pictures and sounds; say which are learnt: "
                                            f"{'; or '.join(map(str, ways))}", ways)
        return said[0]
    return there[0]


def _told(path: Path, medium: Medium, every: bool = False) -> Table | None:
    """Pictures with a text of the same name beside each, None where the first has none (every:
    where none has)."""
    found = medium.among(path)
    first = next((p for p in (found if every else found[:1]) if p.with_suffix(".txt").is_file()),
                 None)
    if first is None:
        return None
    for p in found:
        if not p.with_suffix(".txt").is_file():
            raise DataError(f"{p} has no {p.stem}.txt beside it, and "
                            f"{'the first picture' if first == found[0] else first.name} has one")
    paths = [str(p) for p in found]
    medium.look(paths)
    return Table({"image": paths, "text": [_utf8(p.with_suffix(".txt")).strip() for p in found]},
                 paths.__getitem__, "pictures with texts")


def prose(paths: Sequence[Path]) -> Table:
    """Each file is one document."""
    return Table({"text": [_utf8(p) for p in paths]}, lambda i: str(paths[i]), "plain text")


def passages(path: Path) -> Table:
    """One `.txt` holds many documents: its paragraphs (blank lines between), else its lines."""
    texts: list[str] = []
    starts: list[int] = []
    gap = True
    lines = _utf8(path).removeprefix("\ufeff").splitlines()
    paragraphs = any(not line.strip() for line in "\n".join(lines).strip().split("\n"))
    for n, line in enumerate(lines, 1):
        if not line.strip():
            gap = True
        elif gap or not paragraphs:
            texts.append(line)
            starts.append(n)
            gap = False
        else:
            texts[-1] += f"\n{line}"
    if not texts:
        raise DataError(f"{path} holds no text")
    kind = "paragraphs" if paragraphs else "lines"
    return Table({"text": texts}, lambda i: f"{path}, line {starts[i]}",
                 f"plain text, {kind} are documents")


def _utf8(path: Path) -> str:
    return read_text(path, DataError)


def _split_of(name: str) -> str | None:
    """`train-00000-of-00001.parquet` and `dev.csv` say which split they are."""
    return SPLITS.get(name.lower().split(".")[0].split("-")[0].split("_")[0])


def _described(root: Path, metadata: Path) -> Table:
    found = table(metadata)
    key = next((k for k in FILES if k in found.columns), None)
    if key is None:
        raise DataError(f"{metadata} needs a column file_name; it has {', '.join(found.columns)}")
    names = [str(v) for v in found.columns.pop(key)]
    medium = next((m for m in MEDIA if m.is_one(names[0])), None)
    if medium is None:
        raise DataError(f"{found.where(0)}, field {key!r}: {plain(names[0], 60)!r} is no "
                        "picture, sound or cloud by its ending: it is one of "
                        f"{', '.join(sorted(s for m in MEDIA for s in m.suffixes))}")
    for i, name in enumerate(names):
        if not medium.is_one(name):
            raise DataError(f"{found.where(i)}, field {key!r}: {plain(name, 60)!r} is no "
                            f"{medium.word}, and the first row's file is one")
    found.columns[medium.role] = [str(root / v) for v in names]
    for name in [n for n in found.columns if n.endswith("_file_name")]:   # as `datasets` has it
        found.columns[name.removesuffix("_file_name")] = [
            str(root / str(v)) for v in found.columns.pop(name)]
    medium.look(found.columns[medium.role])
    found.layout = f"{medium.word}s with metadata"
    return found


def _csv(path: Path) -> Table:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with io.StringIO(read_text(path, DataError), newline="") as f:
            reader = csv.reader(f, delimiter=delimiter)
            header = next(reader, [])
            if not header:
                raise DataError(f"{path} has no header: its first line names no column")
            if delimiter == "," and len(header) == 1 and header[0].count(";") > 0:
                raise DataError(f"{path} is separated by semicolons; save it with commas, or as "
                                ".tsv with tabs")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(f"{path}, line {reader.line_num}: {len(row)} fields where the "
                                    f"header names {len(header)} ({', '.join(header)})")
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as e:
        raise DataError(f"{path} cannot be read as {path.suffix[1:].upper()}: {plain(e)}") from None
    columns = {h: [r[i] for r in rows] for i, h in enumerate(header)}
    if len(columns) != len(header):
        raise DataError(f"{path}: the header names a column twice ({', '.join(header)})")
    return Table(columns, lambda i: f"{path}, line {lines[i]}", path.suffix[1:].upper())


def _jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for n, line in enumerate(read_text(path, DataError).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {n}", DataError)
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {n}: expected an object with fields, found "
                            f"{type(row).__name__}")
        rows.append(row)
        lines.append(n)
    return Table(_columns(rows), lambda i: f"{path}, line {lines[i]}", "JSONL")


def _json(path: Path) -> Table:
    text = read_text(path, DataError)
    first, _, second = text.strip().partition("\n")
    if second and first.startswith("{") and first.rstrip().endswith("}"):
        return _jsonl(path)  # many `.json` files are JSON lines; its errors name the line
    rows = parse_json(text, path, DataError)
    if isinstance(rows, dict):
        if (found := _squad(rows, path)) is not None:
            return found
        inner = [k for k, v in rows.items() if isinstance(v, list)]
        if len(inner) != 1:
            raise DataError(f"{path}: expected a list of rows, or an object with one list of rows; "
                            f"found an object with {plain(', '.join(list(rows)[:6]))}")
        rows = rows[inner[0]]
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {n}: expected an object with fields, found "
                            f"{type(row).__name__}")
    return Table(_columns(rows), lambda i: f"{path}, row {i}", "JSON")


def _squad(file: dict[str, Any], path: Path) -> Table | None:
    """SQuAD's own nesting: articles of paragraphs of questions. None for another object."""
    articles = file.get("data")
    if not isinstance(articles, list) or not articles or not all(
            isinstance(a, dict) and isinstance(a.get("paragraphs"), list) for a in articles):
        return None
    rows, at = [], []
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(article["paragraphs"]):
            for k, asked in enumerate(paragraph["qas"]):
                rows.append({"context": paragraph["context"], "question": asked["question"],
                             "answers": asked.get("answers", [])})
                at.append(f"{path}, data[{i}].paragraphs[{j}].qas[{k}]")
    return Table(_columns(rows), at.__getitem__, "SQuAD")


def _conll(path: Path) -> Table:
    """A word a line, its tag last, sentences between blank lines."""
    tokens: list[list[str]] = []
    tags: list[list[str]] = []
    starts: list[int] = []
    gap = True
    for n, line in enumerate(read_text(path, DataError).split("\n"), 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-" or gap and line.startswith("# "):
            gap = True                            # a sentence may have a line about itself
            continue
        if len(fields) < 2:
            raise DataError(f"{path}, line {n}: expected a word and its tag, found {line!r}")
        if gap:
            tokens.append([])
            tags.append([])
            starts.append(n)
            gap = False
        tokens[-1].append(fields[0])
        tags[-1].append(fields[-1])
    return Table({"tokens": tokens, "tags": tags}, lambda i: f"{path}, line {starts[i]}", "CoNLL")


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(k for row in rows for k in row)
    return {k: [row.get(k) for row in rows] for k in names}


def _parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    with reading(path, DataError, "is it parquet?"), pq.ParquetFile(path) as file:
        about, size = file.metadata, path.stat().st_size
        cells = about.num_rows * about.num_columns
        if cells > MOST_CELLS and cells > 100 * size:
            raise DataError(f"{path} says it holds {about.num_rows} rows of {about.num_columns} "
                            f"columns in {size} bytes; if so, load it with `datasets` and pass "
                            "that")
        columns = file.read().to_pydict()
    return Table(columns, lambda i: f"{path}, row {i}", "parquet")


def _coco_tree(path: Path) -> dict[str, Table] | None:
    from .boxes import tree

    return tree(path, _split_of)


def _coco(path: Path) -> Table | None:
    """Objects in boxes; torch comes with who looks for them."""
    from .boxes import coco

    return coco(path)
