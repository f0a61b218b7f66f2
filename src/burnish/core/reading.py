"""The boundary between files and us: whatever a file holds, it is read or refused in one line.

Every reader works inside :func:`reading`, which turns any exception of Python or of a library into
our error with the file's name; JSON goes through :func:`parse_json`, text through
:func:`read_text`, and nothing is opened that is no regular file (a pipe would never end).
"""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BurnishError, FormatError

#: deepest nesting of JSON and YAML, and the largest configuration file
DEPTH, LARGEST = 64, 1 << 28


@contextmanager
def reading(what: Any, error: type[BurnishError] = FormatError, advice: str = "") -> Iterator[None]:
    """Inside the block, every failure is `error`: what was read, why it failed, what to try.

    Our own errors pass as they are, and so does whatever is no failure (Ctrl-C, an exit).
    """
    tail = f"; {advice}" if advice else ""
    try:
        yield
    except BurnishError:
        raise
    except RecursionError:
        raise error(f"{plain(what)} is nested too deeply to be read{tail}") from None
    except MemoryError:
        raise error(f"{plain(what)} asks for more memory than there is{tail}") from None
    except UnicodeError as e:
        raise error(f"{plain(what)} is not UTF-8 text ({plain(e)}){tail}") from None
    except OSError as e:
        why = e.strerror or plain(e) or type(e).__name__
        raise error(f"cannot read {plain(what)}: {why}{tail}") from None
    except Exception as e:
        if type(e).__name__ == "OutOfMemoryError":   # an accelerator's: the caller says it better
            raise
        why = plain(e) or "no details"
        raise error(f"{plain(what)} cannot be read: {why} ({type(e).__name__}){tail}") from e
    except BaseException as e:                       # how libraries written in Rust give up
        if type(e).__name__ != "PanicException":
            raise
        raise error(f"{plain(what)} cannot be read: {plain(e)}{tail}") from None


def beside(path: Path) -> list[str]:
    """Names in the folder where `path` was looked for (this one where there is none), for an error
    to choose from; none where nobody may look."""
    try:
        return os.listdir(path.parent if path.parent.is_dir() else ".")
    except OSError:
        return []


def plain(text: Any, limit: int = 300) -> str:
    """One printable line, not longer than an error should be."""
    try:
        line = " ".join(str(text)[: 4 * limit].split())
    except ValueError:                               # an integer too long to be written out
        line = f"a {type(text).__name__}"
    line = "".join(c if c.isprintable() or c == " " else f"\\x{ord(c):02x}" for c in line)
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else line[: limit - 3] + "..."


def shown(value: Any, limit: int = 60) -> str:
    """A value as Python writes it, in one line; also one that Python refuses to write."""
    try:
        return plain(repr(value), limit)
    except (ValueError, RecursionError):             # an integer of thousands of digits
        return f"a {type(value).__name__} too long to show"


def regular(path: str | Path, error: type[BurnishError] = FormatError) -> Path:
    """The path of a regular file. Raises `error` for one that is missing, a folder, a pipe or a
    device: reading those would wait for ever."""
    path = Path(path)
    with reading(path, error):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise error(f"{plain(path)}: no such file") from None
        if stat.S_ISDIR(mode):
            raise error(f"{plain(path)} is a folder; expected a file")
        if not stat.S_ISREG(mode):
            kind = "a pipe" if stat.S_ISFIFO(mode) else "a device" if \
                stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "no regular file"
            raise error(f"{plain(path)} is {kind}; expected a file")
    return path


def read_text(path: str | Path, error: type[BurnishError] = FormatError,
              largest: int | None = None) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    path = regular(path, error)
    with reading(path, error):
        if largest is not None and (size := path.stat().st_size) > largest:
            raise error(f"{plain(path)} has {size} bytes; a file of its kind has at most {largest}")
        return decode(path.read_bytes(), path, error)


def decode(data: bytes, what: Any, error: type[BurnishError] = FormatError) -> str:
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if data.startswith(mark):
            raise error(f"{plain(what)} is UTF-16 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise error(f"{plain(what)} is not UTF-8 text: byte 0x{data[e.start]:02x} in line {line}; "
                    "save it as UTF-8") from None


def parse_json(text: str | bytes, what: Any, error: type[BurnishError] = FormatError,
               finite: bool = False) -> Any:
    """JSON as it was meant: no name twice in an object, no text that cannot be written again, no
    nesting beyond :data:`DEPTH`, and with `finite` no NaN and no number beyond all bounds."""
    where = plain(what)
    if isinstance(text, bytes):
        text = decode(text, what, error)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [k for k, _ in pairs]
            twice = next(k for k in names if names.count(k) > 1)
            raise error(f"{where}: {shown(twice, 60)} stands twice in one object")
        return made

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise error(f"{where} holds {plain(digits, 40)}; expected a finite number")
        return value

    with reading(where, error):
        try:
            found = json.loads(text, object_pairs_hook=once, parse_constant=number,
                               parse_float=number)
        except BurnishError:
            raise
        except json.JSONDecodeError as e:
            place = f"line {e.lineno}" + (f", column {e.colno}" if "\n" not in text else "")
            raise error(f"{where} is not JSON: {e.msg} at {place}") from None
        except RecursionError:
            raise error(f"{where} is nested too deeply; at most {DEPTH} levels are read") from None
        except ValueError:                           # more digits than Python turns into a number
            raise error(f"{where} holds a number with too many digits") from None
    if text.count("[") + text.count("{") > DEPTH or "\\u" in text:
        sane(found, where, error)
    return found


#: what a field may be asked to be: words for people, and the test
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda x: isinstance(x, str)),
    "flag": ("true or false", lambda x: isinstance(x, bool)),
    "number": ("a finite number", lambda x: _number(x)),
    "whole": ("a whole number", lambda x: isinstance(x, int) and _number(x)),
    "count": ("a whole number from 0", lambda x: isinstance(x, int) and _number(x) and x >= 0),
    "mapping": ("a mapping", lambda x: isinstance(x, dict)),
    "list": ("a list", lambda x: isinstance(x, list)),
    "texts": ("a list of texts",
              lambda x: isinstance(x, list) and all(isinstance(t, str) for t in x)),
    "text or texts": ("text or a list of texts", lambda x: isinstance(x, str) or (
        isinstance(x, list) and all(isinstance(t, str) for t in x))),
    "numbers": ("a mapping of names to numbers",
                lambda x: isinstance(x, dict) and all(_number(v) for v in x.values())),
    "lines": ("a mapping of names to texts",
              lambda x: isinstance(x, dict) and all(isinstance(v, str) for v in x.values())),
}


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2**63


def check_fields(data: dict[str, Any], kinds: dict[str, str], where: Any,
                 error: type[BurnishError] = FormatError) -> None:
    """Raises `error` for a field of another kind than `kinds` says; a kind that ends in "?" may
    be null, and a field that is not there is no matter."""
    for name, kind in kinds.items():
        words, test = FIELDS[kind.removesuffix("?")]
        value = data.get(name)
        if name in data and not test(value) and not (kind.endswith("?") and value is None):
            raise error(f"{plain(where)}: field {name!r} should be {words}, got "
                        f"{shown(value, 60)}")


def sane(tree: Any, what: Any, error: type[BurnishError] = FormatError,
         nodes: int = 10_000_000) -> None:
    """Raises `error` for a tree too deep, too large when written out (aliases), or that contains
    itself, and for text that no file can hold."""
    level: list[Any] = [tree]
    for _ in range(DEPTH + 1):
        below: list[Any] = []
        for x in level:
            nodes -= 1
            if isinstance(x, str):
                try:
                    x.encode()
                except UnicodeEncodeError:
                    raise error(f"{plain(what)} holds half a character (a lone surrogate): "
                                f"{plain(ascii(x), 40)}") from None
            elif isinstance(x, dict):
                below += x.keys()
                below += x.values()
            elif isinstance(x, list | tuple | set):
                below += x
        if nodes < len(below):
            raise error(f"{plain(what)} becomes too large when written out")
        if not below:
            return
        level = below
    raise error(f"{plain(what)} is nested too deeply; at most {DEPTH} levels are read")
