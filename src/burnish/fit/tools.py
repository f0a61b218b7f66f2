"""Tools in conversations: what a model may call, its calls, and what they gave, in the layout of
OpenAI and TRL, which chat templates read.

    tools       [{"type": "function", "function": {"name", "description", "parameters"}}, ...]
    tool_calls  [{"type": "function", "id", "function": {"name", "arguments": {...}}}, ...]

In canonical rows both are JSON: as columns of a table every call would have the arguments of all
others too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import DataError
from ..core.reading import parse_json, shown

#: layouts whose objects have every field that any of them has, empty where it was not said
FILLED = ("in memory", "hub", "parquet")
#: what a turn may have beside its role and content
BESIDE = ("tool_calls", "tool_call_id", "name")


def offered(value: Any, at: str, filled: bool) -> str | None:
    """A row's tools as canonical JSON, or None. Raises DataError for what is no list of them.

    filled: objects have fields that were not said.
    """
    given = _read(value, f"{at}, field 'tools'")
    if not given:
        return None
    if not isinstance(given, list):
        raise DataError(f"{at}, field 'tools': expected a list of functions, found "
                        f"{type(given).__name__}")
    made = []
    for k, one in enumerate(given):
        here = f"{at}, field 'tools[{k}]'"
        one = _said(_read(one, here) if isinstance(one, str) else one, filled)
        inner = one.get("function", one) if isinstance(one, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(f"{here}: expected a function with a name, as in "
                            '{"type": "function", "function": {"name": "heat", "parameters": {}}}, '
                            f"found {shown(one, 60)}")
        made.append(one if "function" in one else {"type": "function", "function": one})
    return json.dumps(made, ensure_ascii=False)


def called(value: Any, at: str, filled: bool) -> str | None:
    """A turn's calls as canonical JSON, or None."""
    given = _read(value, at)
    if not given:
        return None
    made = []
    for k, one in enumerate(given if isinstance(given, list) else [given]):
        here = f"{at}, call {k}"
        inner = one.get("function", one) if isinstance(one, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise DataError(f"{here}: expected a function's name and arguments, found "
                            f"{shown(one, 60)}")
        arguments = inner.get("arguments", {})
        arguments = _said({} if arguments in (None, "") else _read(arguments, here), filled)
        if not isinstance(arguments, Mapping):
            raise DataError(f"{here}: expected arguments by name, found {shown(arguments, 60)}")
        named = {"id": one["id"]} if isinstance(one.get("id"), str) else {}
        made.append({"type": "function", **named,
                     "function": {"name": inner["name"], "arguments": arguments}})
    return json.dumps(made, ensure_ascii=False)


def turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Canonical turns as a template reads them."""
    made = []
    for turn in messages:
        said = {k: v for k, v in turn.items() if v is not None or k not in BESIDE}
        if isinstance(said.get("tool_calls"), str):
            said["tool_calls"] = json.loads(said["tool_calls"])
        made.append(said)
    return made


def of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a canonical row as a template reads them."""
    kept = row.get("tools")
    return json.loads(kept) if kept else None


def _read(value: Any, at: str) -> Any:
    """What stands as it is, or as JSON."""
    return parse_json(value, at, DataError) if isinstance(value, str) and value.strip() else value


def _said(value: Any, filled: bool) -> Any:
    """Without the fields that a table has filled in."""
    if not filled:
        return value
    if isinstance(value, Mapping):
        return {k: _said(v, filled) for k, v in value.items() if v is not None}
    return [_said(v, filled) for v in value] if isinstance(value, list) else value
