"""What a finished run is asked about: pictures, sounds, texts, and rows with several columns."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError
from ..core.reading import parse_json, plain, read_text
from . import graphs, tools
from .columns import AUDIO, CAPTION, CLOUD, IMAGE
from .kinds import drawn_by_text
from .layouts import FILES

Row = dict[str, Any]


def rows(inputs: Sequence[str], task: Any, roles: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """(what was given, its columns as the task reads them) of every input.

    roles: what the run's own columns are called. Raises DataError and ConfigError where an input
    is not there, or lacks a column.
    """
    from .media import CLOUD as CLOUDS
    from .media import PICTURE, SOUND

    if task.paired:
        yield from _one_or_two(inputs, PICTURE, roles)
        return
    if task.takes == ("image",):
        for name, held in _files(inputs, PICTURE, roles):
            yield name, {"image": _picture(held, name)}
        return
    if task.takes == ("audio",):
        for name, held in _files(inputs, SOUND, roles):
            yield name, {"audio": held}
        return
    if task.takes == ("cloud",):
        for name, held in _files(inputs, CLOUDS, roles):
            yield name, {"cloud": held}
        return
    if task.takes == ("edge_index", "node_feat"):
        for given in inputs:
            yield from _graphs(given)
        return
    if task.takes == ("image", "text"):
        yield from (_each(inputs, roles) if drawn_by_text(task.data.task) else
                    _both(inputs, roles))
        return
    if task.takes == ("values",):
        for given in inputs:
            yield from _series(given, roles)
        return
    names = {k: roles.get(k) or roles.get("prompt" if k == "text" else k) or k
             for k in task.takes}
    for given in inputs:
        path = Path(given)
        if path.suffix == ".txt" and path.is_file():
            for line in filter(None, map(str.strip, read_text(path, DataError).splitlines())):
                yield line, _text(line, task)
        elif _table(path):
            yield from _tabled(path, names, task)
        elif given.lstrip().startswith("{"):
            yield given, _row(parse_json(given, "the input", DataError), names, task,
                              plain(given, 60))
        else:
            yield given, _text(given, task)


def _one_or_two(inputs: Sequence[str], medium: Any, roles: Mapping[str, Any]
                ) -> Iterator[tuple[str, Row]]:
    """Two pictures beside each other, where these are all there is; else each by itself."""
    found = _files(inputs, medium, roles)
    if len(inputs) == 2 and all(Path(i).is_file() and not _table(Path(i)) for i in inputs):
        (one, first), (other, second) = found
        yield f"{one}, {other}", {"image": _picture(first, one), "pair": _picture(second, other)}
        return
    for name, held in found:
        yield name, {"image": _picture(held, name)}


def _both(inputs: Sequence[str], roles: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """Each picture among the texts, and each text among the pictures."""
    texts, paths = _sorted(inputs, roles)
    if not texts or not paths:
        raise ConfigError("pictures and texts are told apart by each other: give some of both, "
                          "such as photos/ 'a red kiln' 'a blue bowl'")
    said = {t: t for t in texts}
    seen = {name: functools.partial(_picture, held, name) for name, held in paths}
    for name, held in paths:
        yield name, {"image": _picture(held, name), "among": said}
    for text in said:
        yield text, {"text": text, "among": seen}


def _each(inputs: Sequence[str], roles: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """Each picture with each text."""
    texts, paths = _sorted(inputs, roles)
    if not texts or not paths:
        raise ConfigError("a mask is of what a text names on a picture: give some of both, such as "
                          "photos/ 'a red kiln'")
    for name, held in paths:
        image = _picture(held, name)
        for text in dict.fromkeys(texts):
            yield f"{name}, {text}", {"image": image, "text": text}


def _sorted(inputs: Sequence[str], roles: Mapping[str, Any]
            ) -> tuple[list[str], list[tuple[str, Any]]]:
    """(texts, pictures) among the inputs. A table has either or both."""
    from .layouts import table
    from .media import PICTURE

    texts: list[str] = []
    paths: list[tuple[str, Any]] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir() or path.is_file() and PICTURE.is_one(path):
            paths += _files([given], PICTURE, roles)
        elif _table(path):
            found = table(path)
            text = _column(found, roles, "text", CAPTION)
            texts += () if text is None else _words(found, text)
            if text is None or _column(found, roles, "image", (*IMAGE, *FILES)) is not None:
                paths += _listed(found, path, PICTURE, roles)
        elif path.suffix == ".txt" and path.is_file():
            texts += filter(None, map(str.strip, read_text(path, DataError).splitlines()))
        elif PICTURE.is_one(path):
            raise DataError(f"there is no picture at {given}")
        else:
            texts.append(given)
    return texts, paths


def _text(text: str, task: Any) -> Row:
    if task.takes[-1] == "context":
        raise ConfigError(f"{task.data.task} is asked with a question and a context: give a JSON "
                          'object such as \'{"question": "Who?", "context": "It was she."}\', or a '
                          f"table with these columns, not {plain(text, 60)!r}")
    return {task.takes[0]: text}


def _table(path: Path) -> bool:
    from .layouts import TABLES

    return path.suffix.lower() in TABLES and path.is_file()


def _tabled(path: Path, names: Mapping[str, str], task: Any) -> Iterator[tuple[str, Row]]:
    from .layouts import table

    found = table(path)
    for i, row in enumerate(found.rows()):
        yield found.where(i), _row(row, names, task, found.where(i))


def _row(given: Any, names: Mapping[str, str], task: Any, where: str) -> Row:
    """A row by the task's own names of its columns, or by the run's."""
    if not isinstance(given, dict):
        raise DataError(f"{where}: expected an object with columns, found {type(given).__name__}")
    row = {k: given.get(name, given.get(k)) for k, name in names.items()}
    if row.get(task.takes[0]) is None and "prompt" in given and task.takes == ("text",):
        row["text"] = given["prompt"]
    missing = [names[k] for k in task.takes if row[k] is None and k != "pair"]
    if missing:
        raise DataError(f"{where}: there is no {' and no '.join(missing)}; it has "
                        f"{plain(', '.join(map(str, given)), 120)}")
    for k, value in row.items():
        good = isinstance(value, str) or (k == "tokens" and isinstance(value, list))
        if value is not None and not good:
            raise DataError(f"{where}, field {names[k]!r}: expected text, it is a "
                            f"{type(value).__name__}")
    if task.data.task == "instruction-tuning" and task.data.form == "messages":
        row["tools"] = tools.offered(given.get("tools"), where, filled=False)
    return {k: v for k, v in row.items() if v is not None}


def _series(given: str, roles: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """Each series of a table, by the columns that the run was of."""
    from .layouts import table
    from .series import together

    if not _table(Path(given)):
        raise DataError(f"a series is asked for what comes next: give a table with the columns "
                        f"{', '.join(roles['channels'])}; there is no such file as "
                        f"{plain(given, 60)!r}")
    found = table(Path(given))
    time, of = (c if c in found.columns else None for c in (roles.get("time"),
                                                            roles.get("series")))
    for name, (values, times) in together(found, roles["channels"], time, of).items():
        said = f"{given}, {name}" if name else given
        yield said, {"values": values, "times": times, "time": time, "where": said}


def _graphs(given: str) -> Iterator[tuple[str, Row]]:
    """A graph as a JSON object, or those of a table or of a folder."""
    from . import layouts

    if given.lstrip().startswith("{"):
        said = plain(given, 60)
        row = parse_json(given, "the input", DataError)
        found = [(said, row)] if isinstance(row, dict) else []
    else:
        if not Path(given).exists():
            raise DataError(f"there is no table of graphs at {plain(given, 60)}; a graph is a row "
                            'such as {"edge_index": [[0, 1], [1, 0]], "node_feat": [[1], [2]]}')
        tables = layouts.files(Path(given)).values()
        found = [(t.where(i), row) for t in tables for i, row in enumerate(t.rows())]
    for where, row in found:
        edges, nodes = graphs.one(row, where)
        yield where, {graphs.EDGES: edges, graphs.NODES[0]: nodes}


def _files(inputs: Sequence[str], medium: Any, roles: Mapping[str, Any]
           ) -> Iterator[tuple[str, Any]]:
    """(what it is called, a path or what a table holds of it) of every picture or sound."""
    from .layouts import table

    for given in map(Path, inputs):
        if given.is_dir():
            inside = medium.among(given)
            if not inside:
                raise DataError(f"{given} holds no {medium.word}s")
            yield from ((str(p), str(p)) for p in inside)
        elif _table(given):
            yield from _listed(table(given), given, medium, roles)
        elif given.is_file():
            yield str(given), str(given)
        else:
            raise DataError(f"there is no {medium.word} at {given}")


def _listed(found: Any, path: Path, medium: Any, roles: Mapping[str, Any]
            ) -> Iterator[tuple[str, Any]]:
    """The same of a table: paths, from where it stands or from here, or the coded files."""
    usual = (*{"image": IMAGE, "audio": AUDIO, "cloud": CLOUD}[medium.role], *FILES)
    name = _column(found, roles, medium.role, usual)
    if name is None:
        raise DataError(f"{path}: no column holds {medium.word}s: expected "
                        f"{roles.get(medium.role) or medium.role} or file_name, it has "
                        f"{plain(', '.join(found.columns), 120)}")
    for i, given in enumerate(found.columns[name]):
        at, held = f"{found.where(i)}, field {name!r}", given
        if isinstance(given, dict):
            held = given.get("bytes") or given.get("path")
        if isinstance(held, bytes):
            yield at, held
            continue
        if not isinstance(held, str):
            raise DataError(f"{at}: expected a {medium.word} (a path, or the bytes of a file), "
                            f"found {type(given).__name__}")
        there = found.path(held)
        if there is None:
            raise DataError(f"{at}: there is no {medium.word} at {plain(held, 120)}")
        yield str(there), str(there)


def _column(found: Any, roles: Mapping[str, Any], role: str, usual: Sequence[str]) -> str | None:
    """The table's column of a role: called as in the run, or as people call it."""
    lower = {n.lower(): n for n in reversed(found.columns)}
    names = (lower.get(str(n).lower()) for n in (roles.get(role), *usual) if n)
    return next(filter(None, names), None)


def _words(found: Any, name: str) -> Iterator[str]:
    for i, text in enumerate(found.columns[name]):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{found.where(i)}, field {name!r}: expected text")
        yield text


def _picture(given: Any, name: str) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(given) if isinstance(given, bytes) else given) as image:
            image.load()
            return ImageOps.exif_transpose(image)         # upright, as rows are read in training
    except Exception as error:
        raise DataError(f"{name}: the picture cannot be read: {plain(error)}") from None
