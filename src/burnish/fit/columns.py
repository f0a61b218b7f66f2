"""What columns mean: from a table's names to a task, and from its values to canonical rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, nearest
from ..core.reading import plain
from .layouts import Table
from .readings import ambiguous, aside, label_like, texts

if TYPE_CHECKING:
    import datasets

#: names people give these columns, likeliest first
TEXT = ("text", "sentence", "content", "document", "review", "comment", "body", "message",
        "utterance", "question", "premise", "sentence1", "question1", "tweet", "title")
PAIR = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2",
        "question": "sentence"}
LABEL = ("label", "labels", "class", "target", "category", "sentiment", "y", "intent", "topic")
IMAGE = ("image", "img", "picture", "photo", "pixel_values")

#: "3.0", which tables make of 3
_WHOLE = re.compile(r"^(-?\d+)\.0+$")

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "model": "assistant", "system": "system", "tool": "tool", "function": "tool"}


@dataclass(frozen=True)
class Roles:
    """Which column plays which part; None where it plays none."""

    task: str | None = None
    text: str | None = None
    label: str | None = None
    image: str | None = None
    pair: str | None = None
    #: messages, conversations, alpaca, completion
    form: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def said(self, names: Iterable[str]) -> str:
        """"text from 'body', label from 'mood'; not read: id" """
        parts = {k: v for k in ("image", "text", "pair", "label", "prompt", "completion")
                 if (v := getattr(self, k)) is not None}
        used = set(parts.values()) | _FORMS.get(self.form or "", set())
        left = [n for n in names if n not in used]
        read = ", ".join(f"{k} from {v!r}" for k, v in parts.items() if k != v) or (
            f"read as {self.form}" if self.form else "")
        return "; ".join(filter(None, [read, f"not read: {', '.join(left)}" if left else ""]))


#: the columns that each form of conversation is made of
_FORMS = {"messages": {"messages"}, "conversations": {"conversations"},
          "alpaca": {"instruction", "input", "output", "system"},
          "completion": {"prompt", "completion"}}


def assign(table: Table, flags: Roles) -> Roles:
    """The parts columns play, from their names; flags go before guesses."""
    names = list(table.columns)
    if (flags.prompt is None) != (flags.completion is None):
        raise DataError("prompt= and completion= name two columns that belong together; give both")
    for flag in ("text", "label", "image", "prompt", "completion"):
        given = getattr(flags, flag)
        if given is not None and given not in names:
            raise DataError(f"{flag}={given!r} is no column of the data; it has "
                            f"{', '.join(names)}{nearest(given, names)}")
    found = flags.task or _task(table, flags)
    if found == "instruction-tuning":
        form = "completion" if flags.prompt else _form(names)
        return replace(flags, task=found, form=form)
    image = label = text = pair = None
    if found == "image-classification":
        image = flags.image or _first(names, IMAGE)
        if image is None:
            raise DataError(f"no column holds pictures; the data has {', '.join(names)}; name it "
                            "with image=")
    else:
        known = flags.label or _label(names)
        told = bool(flags.task or flags.label)
        text = flags.text or _text(table, known if found != "language-modelling" else None, told)
        pair = PAIR.get(text) if PAIR.get(text) in names else None
    if found != "language-modelling":
        label = flags.label or _label(names)
        if label is None:
            raise DataError(f"cannot tell which column holds the label; the data has "
                            f"{', '.join(names)}; name it with label=")
    return Roles(found, text, label, image, pair)


def _task(table: Table, flags: Roles) -> str:
    """What the columns say. Raises AmbiguousError where they leave a choice."""
    names = list(table.columns)
    if flags.prompt:
        return "instruction-tuning"
    label = flags.label or _label(names)
    if not flags.text and not flags.label and (form := _form(names, ask=True)):
        if form == "completion" and label is not None:    # answers marked good and bad, perhaps
            raise ambiguous(table)
        return "instruction-tuning"
    if flags.image or _first(names, IMAGE):
        return "image-classification"
    if flags.label or (label is not None and not _prose(table, label)):
        return "text-classification"
    text = flags.text or (texts(table) or [None])[0]
    others = [n for n in names if n != text and not aside(n)]
    if text is not None and (not others or (text.lower() == "text" and others == ["title"])):
        return "language-modelling"
    raise ambiguous(table)


def _prose(table: Table, name: str) -> bool:
    """A column called target may hold whole sentences: nearly all different, and not short."""
    seen = [v for v in table.columns[name] if isinstance(v, str)]
    return len(seen) > 3 and not label_like(table, name) and (
        sum(" " in v.strip() for v in seen) > len(seen) // 2)


def _label(names: list[str]) -> str | None:
    """The column called label, or the only one of a name that labels have."""
    lower = {n.lower(): n for n in reversed(names)}
    found = [lower[w] for w in LABEL if w in lower]
    if len(found) > 1 and found[0].lower() not in ("label", "labels"):
        raise DataError(f"cannot tell which column holds the label: {' or '.join(found)}; name it "
                        "with label=")
    return found[0] if found else None


def _text(table: Table, label: str | None, told: bool) -> str:
    """The column called text, the first of a known pair, or the only one of words.

    told: somebody said what is to be learnt, so that only this column is in question.
    """
    names = list(table.columns)
    lower = {n.lower(): n for n in reversed(names)}
    if "text" in lower:
        return lower["text"]
    for first, second in PAIR.items():
        if {first, second} <= set(names):
            return first
    words = [n for n in texts(table) if n != label]
    named = [lower[w] for w in TEXT if w in lower and lower[w] != label]
    for found in (words, named):
        if len(found) == 1:
            return found[0]
    if not words and not named:
        raise DataError(f"cannot tell which column holds the text; the data has "
                        f"{', '.join(names)}; name it with text=")
    if not told:
        raise ambiguous(table)
    raise DataError(f"cannot tell which column holds the text: {' or '.join(words or named)}; name "
                    "it with text=")


def _form(names: list[str], ask: bool = False) -> str | None:
    have = set(names)
    if "messages" in have:
        return "messages"
    if "conversations" in have:
        return "conversations"
    if {"instruction", "output"} <= have:
        return "alpaca"
    if {"prompt", "completion"} <= have:
        return "completion"
    if ask:
        return None
    raise DataError("instruction tuning reads messages, conversations, instruction and output, or "
                    f"prompt and completion; the data has {', '.join(names)}")


def _first(names: list[str], wanted: Iterable[str]) -> str | None:
    lower = {n.lower(): n for n in reversed(names)}
    return next((lower[w] for w in wanted if w in lower), None)


# -- values ----------------------------------------------------------------------------------
def canonical(table: Table, roles: Roles, classes: tuple[str, ...] | None,
              source: str) -> tuple[datasets.Dataset, tuple[str, ...] | None]:
    """The canonical rows of `table`, and the classes (found here unless given)."""
    import datasets

    if roles.task == "instruction-tuning":
        return datasets.Dataset.from_list(_conversations(table, roles)), None
    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    for role in ("image", "text", "pair"):
        name = getattr(roles, role)
        if name is None:
            continue
        if name not in table.columns:
            raise DataError(f"{table.where(0)}: a split lacks the column {name!r}")
        values = table.columns[name]
        if role == "image":
            features[role] = datasets.Image()
            _images(values, name, table)
        else:
            features[role] = datasets.Value("string")
            _texts(values, name, table)
        columns[role] = values
    if roles.label is not None:
        if roles.label not in table.columns:
            raise DataError(f"{table.where(0)}: a split lacks the column {roles.label!r}")
        _no_fractions(table, roles.label)
        given = [class_name(v, table.where(i), roles.label)
                 for i, v in enumerate(table.columns[roles.label])]
        classes = classes or table.classes or _classes(given, roles.label, source)
        number = {c: i for i, c in enumerate(classes)}
        for i, c in enumerate(given):
            if c not in number:
                raise DataError(f"{table.where(i)}, field {roles.label!r}: class {c!r} is not "
                                f"among the training classes{nearest(c, classes)}")
        columns["label"] = [number[c] for c in given]
        features["label"] = datasets.ClassLabel(names=list(classes))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features)), classes


def _no_fractions(table: Table, field: str) -> None:
    """Numbers with fractions are quantities, however few of them there are."""
    values = table.columns[field]
    numbers = []
    for v in values:
        try:
            numbers.append(float(v))
        except (TypeError, ValueError):
            return
    for i, x in enumerate(numbers):
        if math.isfinite(x) and not x.is_integer():
            raise DataError(f"{table.where(i)}, field {field!r}: the label is {values[i]}, a "
                            "number with a fraction: that is regression, and fit serves "
                            "classification; put the numbers into classes, or name another column "
                            "with label=")


def class_name(value: Any, where: str, field: str) -> str:
    """A class as a name; 3, 3.0 and "3" are one class. Missing, NaN and 3.5 are errors."""
    at = f"{where}, field {field!r}"
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{at}: the label is missing")
    if isinstance(value, str):
        value = value.strip()
        if value.lower() in ("nan", "none", "null", "n/a"):
            raise DataError(f"{at}: the label is {value!r}; name the class, or remove the row")
        return _WHOLE.sub(r"\1", value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            raise DataError(f"{at}: the label is NaN")
        if not value.is_integer() or abs(value) > 2**63:
            raise DataError(f"{at}: the label is {value}; burnish fits classes, and a class is a "
                            "name or a whole number")
        value = int(value)
    if not isinstance(value, int) or abs(value) > 2**63:
        raise DataError(f"{at}: a label is a name or a whole number, not {type(value).__name__}")
    return str(value)


def _classes(given: list[str], field: str, source: str) -> tuple[str, ...]:
    classes = sorted(set(given), key=_numbers_first)
    if len(classes) < 2:
        raise DataError(f"{source}: every row of {field!r} is {classes[0]!r}; classification needs "
                        "two classes or more")
    if len(classes) > max(50, len(given) // 2):
        raise DataError(f"{source}: column {field!r} has {len(classes)} different values in "
                        f"{len(given)} rows, which are no classes; name the label with label=")
    return tuple(classes)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    number = re.fullmatch(r"-?[0-9]{1,18}", name)
    return number is None, int(name) if number else 0, name


def _texts(values: list[Any], field: str, table: Table) -> None:
    for i, v in enumerate(values):
        if not isinstance(v, str):
            what = "missing" if v is None or v != v else f"a {type(v).__name__}"
            raise DataError(f"{table.where(i)}, field {field!r}: expected text, it is {what}")
        if not v.strip():
            raise DataError(f"{table.where(i)}, field {field!r}: the text is empty")


def _images(values: list[Any], field: str, table: Table) -> None:
    for i, v in enumerate(values):
        if isinstance(v, dict):
            v = v.get("bytes") or v.get("path")
        if v is None or not (isinstance(v, str | bytes) or hasattr(v, "convert")):
            raise DataError(f"{table.where(i)}, field {field!r}: expected a picture (a path, "
                            f"encoded bytes or a PIL image), found {type(v).__name__}")
        if isinstance(v, str) and not Path(v).is_file():      # nor a pipe, nor an address
            raise DataError(f"{table.where(i)}, field {field!r}: there is no picture at "
                            f"{plain(v)}")


def _conversations(table: Table, roles: Roles) -> list[dict[str, Any]]:
    """Every form as `messages`, except that plain prompts and completions stay plain."""
    rows, form = [], roles.form
    asked, answer = roles.prompt or "prompt", roles.completion or "completion"
    for i, row in enumerate(table.rows()):
        at = table.where(i)
        if form in ("messages", "conversations"):
            rows.append({"messages": _messages(row[form], at, form)})
        elif form == "alpaca":
            said = _words(row, "instruction", at)
            extra = row.get("input")
            if extra:
                said += "\n\n" + _words(row, "input", at)
            turns = [{"role": "user", "content": said},
                     {"role": "assistant", "content": _words(row, "output", at)}]
            if row.get("system"):
                turns.insert(0, {"role": "system", "content": _words(row, "system", at)})
            rows.append({"messages": turns})
        elif isinstance(row.get(asked), list):
            rows.append({"messages": _messages([*row[asked], *(row[answer] or ())], at,
                                               f"{asked} and {answer}")})
        else:
            rows.append({"prompt": _words(row, asked, at),
                         "completion": _words(row, answer, at)})
    if len({tuple(r) for r in rows}) > 1:
        raise DataError(f"{table.where(0)}: prompts are texts in some rows and messages in others; "
                        "write them one way")
    return rows


def _words(row: dict[str, Any], field: str, at: str) -> str:
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

