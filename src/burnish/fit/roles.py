"""Which column of a table plays which part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Roles:
    """Which column plays which part; None where it plays none."""

    task: str | None = None
    text: str | None = None
    label: str | None = None
    image: str | None = None
    audio: str | None = None
    #: files of clouds of points; edges of graphs, and what is said of their nodes
    cloud: str | None = None
    edges: str | None = None
    nodes: str | None = None
    #: pictures of the classes of pixels
    mask: str | None = None
    #: boxes and their classes
    objects: str | None = None
    pair: str | None = None
    #: texts that are not near the first
    negative: str | None = None
    #: words, one by one
    tokens: str | None = None
    #: messages, conversations, alpaca, completion
    form: str | None = None
    prompt: str | None = None
    completion: str | None = None
    #: of series: their columns of numbers, and what says when a row is and of which series
    channels: tuple[str, ...] = ()
    time: str | None = None
    series: str | None = None

    def named(self) -> dict[str, Any]:
        """role -> its column, of what a row is asked with; of ``channels`` all of them."""
        found = {k: v for k in ("text", "pair", "tokens", "prompt", "time", "series")
                 if (v := getattr(self, k))}
        return found | ({"channels": list(self.channels)} if self.channels else {})

    def said(self, names: Iterable[str]) -> str:
        """"text from 'body', label from 'mood'; not read: id" """
        parts = {k: v for k in ("image", "mask", "objects", "audio", "cloud", "edges", "nodes",
                                "text", "pair", "negative", "tokens", "label", "prompt",
                                "completion", "time", "series")
                 if (v := getattr(self, k)) is not None}
        if self.channels:
            parts["numbers"] = ", ".join(self.channels)
        used = set(parts.values()) | set(self.channels) | _FORMS.get(self.form or "", set())
        if self.label is not None:
            used |= {n.strip() for n in self.label.split(",")}
        left = [n for n in names if n not in used]
        read = ", ".join(f"{k} from {v!r}" for k, v in parts.items() if k != v) or (
            f"read as {self.form}" if self.form else "")
        return "; ".join(filter(None, [read, f"not read: {', '.join(left)}" if left else ""]))


#: the columns that each form of conversation is made of
_FORMS = {"messages": {"messages"}, "conversations": {"conversations"},
          "alpaca": {"instruction", "input", "output", "system"},
          "completion": {"prompt", "completion"},
          "questions": {"context", "question", "answers"},
          "preferences": {"prompt", "chosen", "rejected"}}
