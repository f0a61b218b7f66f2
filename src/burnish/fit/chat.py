"""One chat template for training and for use, and which of its tokens are learnt.

A conversation is rendered once as text, with the stretches that the assistant speaks marked; it
is tokenised whole, and a token is in the loss when it holds any of a marked stretch. Each
stretch ends in a stop token, so that the tuned model knows how to stop. The template is stored in
the tokenizer, which is saved beside the adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError
from . import tools as tooling

#: for tokenizers that bring no template: plain headings, and the tokenizer's own stop token
PLAIN = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}### Assistant:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% elif m['role'] == 'tool' %}### Tool:\n{{ m['content'] }}\n\n"
    "{% else %}### User:\n{{ m['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


@dataclass(frozen=True)
class Marked:
    """Text and the (start, stop) stretches of it that are learnt."""

    text: str
    learnt: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tokens:
    """Token ids, and as labels the same ids where they are learnt and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Gives the tokenizer a template, and a pad token, where it has none. Returns it."""
    if tokenizer.eos_token is None:
        raise DataError(f"the tokenizer {tokenizer.name_or_path or ''} has no end-of-text token, "
                        "so a model could not learn to stop; set tokenizer.eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so it is never learnt
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = PLAIN
    return tokenizer


def mark(tokenizer: Any, messages: Sequence[dict[str, str]], where: str = "",
         tools: Any = None) -> Marked:
    """The conversation as the template writes it, with every assistant turn marked: what it says
    and the tools that it calls.

    The stretch of a turn is what the template adds to ``messages[:k]`` plus its generation
    prompt, up to and including the stop token. Raises DataError where a template is not
    incremental (rewrites earlier turns), for then no stretch could be trusted, and where it has
    no place for tools, calls, or what they gave.
    """
    _has_place(tokenizer, messages, where, tools)
    pieces: list[str] = []  # alternately given and learnt
    done = ""
    for k, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:k], True, where, tools)
        answered = render(tokenizer, messages[: k + 1], False, where, tools)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise DataError(f"{_at(where)}the tokenizer's chat template rewrites earlier turns, so "
                            "what the assistant says cannot be told apart; train on single "
                            "answers, or set tokenizer.chat_template")
        said = answered[len(asked):]
        tail = said[len(said.rstrip()):]
        said = said[: len(said) - len(tail)]
        if not _stops(tokenizer, said):
            said += tokenizer.eos_token
        pieces += [asked[len(done):], said, tail]
        done = answered
    text, learnt = "", []
    for n, piece in enumerate(pieces):
        if n % 3 == 1:
            learnt.append((len(text), len(text) + len(piece)))
        text += piece
    return Marked(text, tuple(learnt))


def _has_place(tokenizer: Any, messages: Sequence[dict[str, str]], where: str, tools: Any) -> None:
    """Raises DataError where something of a conversation with tools can be changed, and the
    template writes the same."""
    changed: list[tuple[str, Any, Any]] = []
    if tools:
        changed.append(("of the tools that are offered", messages, None))
    for k, turn in enumerate(messages):
        without = [*messages[:k], {n: v for n, v in turn.items() if n != "tool_calls"},
                   *messages[k + 1:]]
        if turn.get("tool_calls"):
            changed.append(("of the tools that the assistant calls", without, tools))
        elif turn["role"] == "tool":
            other = [*messages[:k], {**turn, "content": turn["content"] + "?"}, *messages[k + 1:]]
            changed.append(("of what a tool gives", other, tools))
    if not changed:
        return
    whole = render(tokenizer, messages, False, where, tools)
    for what, others, offered in changed:
        try:
            found = render(tokenizer, others, False, where, offered)
        except DataError:                                # it looks at them: it refuses others
            continue
        if found == whole:
            raise DataError(f"{_at(where)}the tokenizer's chat template writes nothing {what}, so "
                            "it could not be learnt; set tokenizer.chat_template to one that takes "
                            "tools, or leave such rows out")


def last(marked: Marked) -> Marked:
    """Of the stretches that are learnt the last one alone."""
    return Marked(marked.text, marked.learnt[-1:])


def render(tokenizer: Any, messages: Sequence[dict[str, str]], ask: bool, where: str = "",
           tools: Any = None) -> str:
    """The conversation as text, with the tools that it offers. A system turn that the template
    refuses (Gemma's does) opens the user's first turn, an empty line behind it. A template is
    somebody else's program: whatever else it raises is a DataError with the row (roles it refuses,
    turns it wants to alternate, a template that is no template)."""
    def written(turns: Sequence[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(
            tooling.turns(turns), tokenize=False, add_generation_prompt=ask,
            **({"tools": tools} if tools else {}))
        return text

    try:
        return written(messages)
    except Exception as e:
        if instructed(messages) and refuses_system(tokenizer):
            with contextlib.suppress(Exception):
                return written(folded(messages))
        said = " ".join(str(e).split()) or type(e).__name__
        line = getattr(e, "lineno", None)
        if type(e).__name__ == "TemplateSyntaxError":
            raise DataError(f"the tokenizer's chat template cannot be read (line {line}: {said}); "
                            "set tokenizer.chat_template") from None
        roles = ", ".join(m["role"] for m in messages) or "none yet"
        raise DataError(f"{_at(where)}the tokenizer's chat template refuses these turns ({roles}): "
                        f"{said}") from None


def instructed(messages: Sequence[dict[str, str]]) -> bool:
    """Does it begin with a system turn and a user's?"""
    return [m["role"] for m in messages[:2]] == ["system", "user"]


def folded(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """With the words of the system turn at the head of the user's first."""
    first, second, *rest = messages
    return [{**second, "content": f"{first['content']}\n\n{second['content']}"}, *rest]


def refuses_system(tokenizer: Any) -> bool:
    """Does the template write a user's turn, but none with a system turn before it?"""
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        tokenizer.apply_chat_template(turns[1:], tokenize=False)
    except Exception:
        return False
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:
        return True
    return False


def stop_ids(tokenizer: Any) -> list[int]:
    """What ends the assistant's turn in this tokenizer's template, beside its end-of-text: of an
    answer, and of a call where it writes calls."""
    call = '[{"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {}}}]'
    offer = [{"type": "function", "function": {"name": "f", "description": "f",
                                               "parameters": {"type": "object", "properties": {}}}}]
    found: list[int] = []
    for answer, tools in (({"content": "b"}, None), ({"content": "", "tool_calls": call}, offer)):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]
        with contextlib.suppress(DataError):             # said of the first real row
            tokens = tokenize(tokenizer, mark(tokenizer, turns, tools=tools), None)
            found.append([y for y in tokens.labels if y != -100][-1])
    return list(dict.fromkeys(found))


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def mark_completion(tokenizer: Any, prompt: str, completion: str) -> Marked:
    """A plain prompt and completion: joined as they are, the completion learnt with its stop."""
    said = completion if _stops(tokenizer, completion) else completion + tokenizer.eos_token
    return Marked(prompt + said, ((len(prompt), len(prompt) + len(said)),))


def tokenize(tokenizer: Any, marked: Marked, max_length: int | None, *,
             special: bool = False) -> Tokens:
    """Token ids and labels. Cut at `max_length`; a row may then have nothing left to learn.

    special: add the tokenizer's own opening tokens (plain prompts have none, templates write
        theirs).
    """
    if tokenizer.is_fast:
        coded = tokenizer(marked.text, return_offsets_mapping=True, add_special_tokens=False)
        ids = list(coded["input_ids"])
        # a token may begin in the prompt and hold the answer's first letters (" yes")
        keep = [any(a < stop and max(b, a + 1) > start for start, stop in marked.learnt)
                for a, b in coded["offset_mapping"]]
    else:
        ids, keep = [], []
        for piece, learn in _pieces(marked):
            part = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += part
            keep += [learn] * len(part)
    if special and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids, keep = [tokenizer.bos_token_id, *ids], [False, *keep]
    labels = [t if k else -100 for t, k in zip(ids, keep, strict=True)]
    return Tokens(ids[:max_length], labels[:max_length])


def show(tokenizer: Any, tokens: Tokens) -> str:
    """The row as text, with what is learnt between »guillemets«."""
    out, run, learning = "", [], False
    for t, y in [*zip(tokens.input_ids, tokens.labels, strict=True), (None, None)]:
        now = y is not None and y != -100
        if (now != learning or t is None) and run:
            text = tokenizer.decode(run)
            out += f"»{text}«" if learning else text
            run = []
        learning = now
        if t is not None:
            run.append(t)
    return out


def _pieces(marked: Marked) -> Iterable[tuple[str, bool]]:
    at = 0
    for a, b in marked.learnt:
        if a > at:
            yield marked.text[at:a], False
        yield marked.text[a:b], True
        at = b
    if at < len(marked.text):
        yield marked.text[at:], False


def _stops(tokenizer: Any, said: str) -> bool:
    """Does it end in the stop token, or in a special token that closes a turn?"""
    if said.endswith(tokenizer.eos_token):
        return True
    return any(said.endswith(t) for t in tokenizer.all_special_tokens if t)
