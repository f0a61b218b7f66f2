"""What a finished run says of a text, a picture, a sound or rows, beside what its base says."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

#: rows of a table that are answered
ROWS = 100

_open: dict[str, Any] = {}


def predict(say: Callable[[int, int], None], run: str, text: str | None = None,
            file: str | None = None, texts: Sequence[str] = (), tokens: int = 64
            ) -> dict[str, Any]:
    """What a finished run says, beside what its base says. The last run asked stays open.

    text: never taken for the name of a file; one that begins with a brace is a row.
    file: a picture, a sound, or a table of rows; of a table that is no series the answer is
        ``rows``, the first ROWS of them.  texts: that a picture is compared with.
    """
    from ..fit.finished import Finished

    key = f"{run} {os.stat(Path(run, 'run.json')).st_mtime_ns}"
    if key not in _open:
        _open.clear()
        _open[key] = Finished.open(Path(run))
    finished = _open[key]
    takes = finished.task.takes
    with contextlib.ExitStack() as stack:
        if takes == ("image", "text"):
            inputs = _compared(file, texts, stack)
        else:
            inputs = [_given(takes, text, file)]
        said = itertools.islice(finished.predict(inputs, tokens, beside=True), ROWS)
        if inputs == [file] and takes[0] not in ("image", "audio", "cloud", "values"):
            return {"rows": [{"asked": _row(a["input"], k), "said": a["said"], "base": a["base"]}
                             for k, a in enumerate(said, 1)]}
        return _shown({k: v for k, v in next(said).items() if k != "input"})


def _given(takes: Sequence[str], text: str | None, file: str | None) -> str:
    """The one thing that a run is asked about."""
    from ..fit.layouts import TABLES
    from ..fit.media import MEDIA

    medium = next((m for m in MEDIA if takes == (m.role,)), None)
    if medium is not None:
        if file is None or not medium.is_one(file):
            raise ConfigError(f"this run answers {medium.word}s: give it one")
        return file
    if file is not None:
        if Path(file).suffix not in TABLES:
            raise ConfigError("this run answers rows: give it a table of them")
        return file
    if takes == ("values",):
        raise ConfigError("this run is asked for what comes next: give it a table with the last "
                          "rows of a series")
    if text is None:
        raise ConfigError("this run answers texts: type one")
    if text.lstrip().startswith("{"):
        return text
    if takes[-1] == "context":
        raise ConfigError('this run is asked with a row: {"question": "Who?", "context": '
                          '"It was she."}')
    return json.dumps({takes[0]: text})


def _compared(file: str | None, texts: Sequence[str], stack: contextlib.ExitStack) -> list[str]:
    """A picture and texts, which lie in a file: none is taken for the name of one."""
    from ..fit.media import PICTURE

    said = [" ".join(t.split()) for t in texts if t.strip()]
    if file is None or not PICTURE.is_one(file) or not said:
        raise ConfigError("this run reads pictures with texts: give it a picture, and a text "
                          "or more")
    lines = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8"))
    lines.write("\n".join(said))
    lines.flush()
    return [file, lines.name]


def _row(asked: str, number: int) -> str:
    """A row of a table as it is called here, where its file has a passing name."""
    return f"row {number}" if asked.startswith(tempfile.gettempdir()) else asked


def _shown(told: dict[str, Any]) -> dict[str, Any]:
    """An answer with the pictures that the run has made as the page shows them; none is kept."""
    made = {v: Path(v) for v in told.values() if isinstance(v, str)
            and Path(v).suffix == ".png" and Path(v).parent.name == "pictures"}
    coded = {v: base64.b64encode(p.read_bytes()).decode() for v, p in made.items() if p.is_file()}
    for name in coded:
        made[name].unlink()
    return {k: f"data:image/png;base64,{coded[v]}" if isinstance(v, str) and v in coded else v
            for k, v in told.items()}
