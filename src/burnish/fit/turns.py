"""Conversations, instructions, prompts with completions: every form of them as canonical rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.errors import DataError, nearest
from .columns import ROLES, Roles
from .layouts import Table


def canonical(table: Table, roles: Roles) -> list[dict[str, Any]]:
    """Every form as `messages`, except that plain prompts and completions stay plain."""
    rows, form = [], roles.form
    asked, answer = roles.prompt or "prompt", roles.completion or "completion"
    for i, row in enumerate(table.rows()):
        at = table.where(i)
        if form in ("messages", "conversations"):
            rows.append({"messages": _messages(row[form], at, form)})
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
                                               f"{asked} and {answer}")})
        else:
            rows.append({"prompt": words(row, asked, at),
                         "completion": words(row, answer, at)})
    if roles.task == "sequence-to-sequence":
        rows = [_single(row, table.where(i)) for i, row in enumerate(rows)]
    if len({tuple(r) for r in rows}) > 1:
        raise DataError(f"{table.where(0)}: prompts are texts in some rows and messages in others; "
                        "write them one way")
    return rows


def as_rows_of(task: str, rows: Any, where: Callable[[int], str] | None) -> Any:
    """Canonical rows of conversations as prompts and answers, for an encoder-decoder; rows of
    other tasks as they are."""
    import datasets

    if task != "sequence-to-sequence" or "prompt" in rows.column_names:
        return rows
    return datasets.Dataset.from_list([_single(row, where(i) if where else f"row {i}")
                                       for i, row in enumerate(rows)])


def _single(row: dict[str, Any], at: str) -> dict[str, str]:
    """One prompt and its answer, which is all an encoder-decoder is trained on at a time."""
    if "messages" not in row:
        return row
    said = row["messages"]
    if [turn["role"] for turn in said] != ["user", "assistant"]:
        raise DataError(f"{at}: sequence-to-sequence learns one answer to one prompt, and these "
                        f"turns are {', '.join(turn['role'] for turn in said)}")
    return {"prompt": said[0]["content"], "completion": said[1]["content"]}


def words(row: dict[str, Any], field: str, at: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        what = "missing or empty" if not value or isinstance(value, str) else (
            f"a {type(value).__name__}")
        raise DataError(f"{at}, field {field!r}: expected text, it is {what}")
    return value


def _messages(turns: Any, at: str, field: str) -> list[dict[str, str]]:
    """Both spellings (role and content, from and value), checked turn by turn."""
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
        if not isinstance(content, str):
            raise DataError(f"{here}: content is {'missing' if content is None else 'no text'}")
        out.append({"role": ROLES[role], "content": content})
    if out[-1]["role"] != "assistant":
        raise DataError(f"{at}, field {field!r}: the last turn is {out[-1]['role']}'s; it must be "
                        "the assistant's, which is what is learnt")
    return out
