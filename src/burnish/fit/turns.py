"""Conversations, instructions, prompts with completions: every form of them as canonical rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.errors import DataError, nearest
from . import tools
from .columns import ROLES, Roles
from .kinds import SINGLE
from .table import Table


def canonical(table: Table, roles: Roles) -> list[dict[str, Any]]:
    """Every form as `messages`, except that plain prompts and completions stay plain; with the
    `tools` that a conversation offers."""
    rows, form, filled = [], roles.form, table.layout in tools.FILLED
    asked, answer = roles.prompt or "prompt", roles.completion or "completion"
    for i, row in enumerate(table.rows()):
        at = table.where(i)
        if form in ("messages", "conversations"):
            rows.append({"messages": _messages(row[form], at, form, filled)})
        elif form == "alpaca":
            said = words(row, "instruction", at)
            extra = row.get("input")
            if extra:
                said += "\n\n" + words(row, "input", at)
            turns = [{"role": "user", "content": said},
                     {"role": "assistant", "content": words(row, "output", at)}]
            if row.get("system"):
                turns.insert(0, {"role": "system", "content": words(row, "system", at)})
            rows.append({"messages": turns})
        elif isinstance(row.get(asked), list):
            rows.append({"messages": _messages([*row[asked], *(row[answer] or ())], at,
                                               f"{asked} and {answer}", filled)})
        else:
            rows.append({"prompt": words(row, asked, at),
                         "completion": words(row, answer, at)})
    _offer(rows, table)
    if roles.task in SINGLE:
        rows = [_single(row, table.where(i), str(roles.task)) for i, row in enumerate(rows)]
    if len({"messages" in r for r in rows}) > 1:
        raise DataError(f"{table.where(0)}: prompts are texts in some rows and messages in others; "
                        "write them one way")
    return rows


def _offer(rows: list[dict[str, Any]], table: Table) -> None:
    """Puts the tools of each conversation beside it, where some have any."""
    if "tools" not in table.columns or not rows or "prompt" in rows[0]:
        return
    filled = table.layout in tools.FILLED
    found = [tools.offered(v, table.where(i), filled) for i, v in enumerate(
        table.columns["tools"])]
    if any(found):
        for row, own in zip(rows, found, strict=True):
            row["tools"] = own


def as_rows_of(task: str, rows: Any, where: Callable[[int], str] | None) -> Any:
    """Canonical rows of conversations as prompts and answers, for a model that learns one at a
    time; rows of other tasks as they are."""
    import datasets

    if task not in SINGLE or "prompt" in rows.column_names:
        return rows
    beside = [n for n in rows.column_names if n not in ("messages", "tools")]
    return datasets.Dataset.from_list([
        {**_single(row, where(i) if where else f"row {i}", task),
         **{n: row[n] for n in beside}} for i, row in enumerate(rows)])


def _single(row: dict[str, Any], at: str, task: str) -> dict[str, str]:
    """One prompt and its answer, which is all such a model is trained on at a time."""
    if "messages" not in row:
        return row
    said = row["messages"]
    if [turn["role"] for turn in said] != ["user", "assistant"]:
        raise DataError(f"{at}: {task} learns one answer to one prompt, and these "
                        f"turns are {', '.join(turn['role'] for turn in said)}")
    if row.get("tools") or said[1].get("tool_calls"):
        raise DataError(f"{at}: tools are written by the chat template of a decoder, and {task} "
                        "reads a prompt as it stands; leave them out")
    return {"prompt": said[0]["content"], "completion": said[1]["content"]}


def preferences(table: Table, roles: Roles) -> list[dict[str, Any]]:
    """``chosen`` and ``rejected``: turns from the beginning, which differ in the last; or texts
    beside a ``prompt``, joined to it as they are."""
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(table.rows()):
        at, prompt = table.where(i), row.get(roles.prompt or "prompt")
        said = {k: row.get(k) for k in ("chosen", "rejected")}
        if not any(isinstance(v, list) for v in said.values()):
            if isinstance(prompt, list):
                said = {k: [{"role": "assistant", "content": words(row, k, at)}] for k in said}
            else:
                rows.append({"prompt": words(row, roles.prompt or "prompt", at),
                             **{k: words(row, k, at) for k in said}})
                _differ(rows[-1], at)
                continue
        opens = prompt if isinstance(prompt, list) else []
        if isinstance(prompt, str) and all(isinstance(v, list) and v and isinstance(v[0], dict)
                                           and _role(v[0]) == "assistant" for v in said.values()):
            opens = [{"role": "user", "content": words(row, roles.prompt or "prompt", at)}]
        made = {}
        for k, v in said.items():
            v = [{"role": "assistant", "content": v}] if isinstance(v, str) else v
            whole = isinstance(v, list) and v[:len(opens)] == opens
            made[k] = _messages(v if whole else [*opens, *(v or ())], at, k,
                                table.layout in tools.FILLED)
        _differ(made, at)
        rows.append(made)
    _offer(rows, table)
    if len({tuple(r) for r in rows}) > 1:
        raise DataError(f"{table.where(0)}: answers are texts in some rows and messages in others; "
                        "write them one way")
    return rows


def marks(table: Table, roles: Roles) -> list[dict[str, Any]]:
    """Prompts with their answers, and ``good``: whether an answer is."""
    rows = canonical(table, roles)
    for i, given in enumerate(table.columns[roles.label or "label"]):
        said = given.strip().lower() if isinstance(given, str) else given
        known = {"true": True, "false": False, "1": True, "0": False}
        if isinstance(said, str):
            said = known.get(said, said)
        if not isinstance(said, bool | int) or said not in (0, 1):
            raise DataError(f"{table.where(i)}, field {roles.label!r}: expected true or false, it "
                            f"is {given!r}")
        rows[i] = rows[i] | {"good": bool(said)}
    return rows


def _role(turn: dict[str, Any]) -> Any:
    return ROLES.get(turn.get("role", turn.get("from")))


def _differ(row: dict[str, Any], at: str) -> None:
    if row["chosen"] == row["rejected"]:
        raise DataError(f"{at}: chosen and rejected are the same; nothing is preferred")
    if isinstance(row["chosen"], list) and row["chosen"][:-1] != row["rejected"][:-1]:
        raise DataError(f"{at}: chosen and rejected answer different turns; they should differ in "
                        "the last one alone")


def words(row: dict[str, Any], field: str, at: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        what = "missing or empty" if not value or isinstance(value, str) else (
            f"a {type(value).__name__}")
        raise DataError(f"{at}, field {field!r}: expected text, it is {what}")
    return value


def _messages(turns: Any, at: str, field: str, filled: bool = False) -> list[dict[str, str]]:
    """Both spellings (role and content, from and value), checked turn by turn. filled: as
    :func:`burnish.fit.tools.offered`."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{at}, field {field!r}: expected a list of turns, found "
                        f"{'an empty one' if turns == [] else type(turns).__name__}")
    out = []
    for k, turn in enumerate(turns):
        here = f"{at}, field '{field}[{k}]'"
        if not isinstance(turn, dict):
            raise DataError(f"{here}: expected role and content, found {type(turn).__name__}")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise DataError(f"{here}: role {role!r} is not one of {', '.join(ROLES)}"
                            f"{nearest(str(role), ROLES)}")
        calls = tools.called(turn.get("tool_calls") or turn.get("function_call") or (
            content if role == "function_call" else None), here, filled)
        if calls and ROLES[role] != "assistant":
            raise DataError(f"{here}: the assistant calls tools, and this is the {role}'s turn")
        if role == "function_call" or content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise DataError(f"{here}: content is {'missing' if content is None else 'no text'}")
        named = {k: turn[k] for k in ("tool_call_id", "name") if isinstance(turn.get(k), str)} \
            if ROLES[role] == "tool" else {}
        out.append({"role": ROLES[role], "content": content, **named,
                    **({"tool_calls": calls} if calls else {})})
    if out[-1]["role"] != "assistant":
        raise DataError(f"{at}, field {field!r}: the last turn is {out[-1]['role']}'s; it must be "
                        "the assistant's, which is what is learnt")
    return out
