"""What a model and its tokenizer must agree about: special ids, the vocabulary, the positions.

A model pads, stops and finds its last token by ids of its config, and a tokenizer writes its own.
Where they differ, nothing fails and everything is a little wrong, so the tokenizer in use decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..core import families
from ..core.errors import ConfigError, DataError
from ..core.families import positions_of

IDS = ("pad", "bos", "eos")


def agree(model: nn.Module, tokenizer: Any, stops: Iterable[int] = ()) -> list[str]:
    """Gives the model's configs the special ids of `tokenizer`; returns what people should know.

    stops: further ids that end an answer (those that close a turn of a chat template).
    Raises ConfigError where the model counts its positions from another padding id: there the two
    do not belong together.
    """
    config = getattr(model, "config", None)
    if config is None:
        return []
    notes = []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = words_of(model)
    if rows is not None and (tokenizer.pad_token_id or 0) >= rows:
        was, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
            raise ConfigError(f"the tokenizer pads with {was!r}, and the model has no such word "
                              f"(its vocabulary ends at {rows}); resize the model's embeddings")
        notes.append(f"the tokenizer's padding {was!r} is beyond the model's {rows} words: rows "
                     f"are padded with {tokenizer.pad_token!r}")
    counted = getattr(text, "model_type", "") in families.OFFSET_POSITIONS
    if counted and text.pad_token_id != tokenizer.pad_token_id:
        raise ConfigError(
            f"{type(model).__name__} counts its positions from padding id {text.pad_token_id}, and "
            f"the tokenizer pads with {tokenizer.pad_token_id}; use the tokenizer it was made with")
    for place in (config, text):
        for name in IDS:
            own = getattr(tokenizer, f"{name}_token_id", None)
            if own is not None:
                setattr(place, f"{name}_token_id", own)
    said = getattr(model, "generation_config", None)
    if said is not None:
        said.pad_token_id = tokenizer.pad_token_id
        if tokenizer.bos_token_id is not None:
            said.bos_token_id = tokenizer.bos_token_id
        ends = dict.fromkeys(i for i in (tokenizer.eos_token_id, *stops) if i is not None)
        if ends:
            said.eos_token_id = list(ends) if len(ends) > 1 else next(iter(ends))
    return notes


def words_of(model: nn.Module) -> int | None:
    """Rows of the model's input embedding."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])     # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def longest(model: nn.Module, asked: int | None, limit: int | None) -> tuple[int | None, list[str]]:
    """(max_length, notes) of what was asked, the tokenizer's limit and the model's positions.

    Raises ConfigError where more is asked than the model has positions for.
    """
    notes = []
    found = positions_of(model)
    if found is not None:
        most, hard = found
        if asked is not None and asked > most:
            if hard:
                raise ConfigError(f"max_length={asked} is more than the {most} positions that "
                                  f"{type(model).__name__} has")
            notes.append(f"max_length={asked} is more than the {most} tokens this model was made "
                         "for")
        limit = min(limit or most, most) if hard or asked is None else limit
    if asked is not None and limit is not None and asked > limit:
        notes.append(f"max_length={asked} is more than the tokenizer's {limit}: rows end there")
    ends = [n for n in (asked, limit) if n is not None]
    return min(ends) if ends else None, notes


def room(model: nn.Module, prompt: int, tokens: int) -> int:
    """How many of so many tokens can follow a prompt, before a model's table of positions ends.

    Raises ConfigError for a prompt that does not fit by itself.
    """
    found = positions_of(model)
    if found is None or not found[1]:
        return tokens
    if prompt > found[0]:
        raise ConfigError(f"a prompt of {prompt} tokens is more than the {found[0]} positions that "
                          f"{type(model).__name__} has")
    return min(tokens, found[0] - prompt + 1)            # the last one is read by nobody


def check_room(model: nn.Module, prompt: int, tokens: int) -> None:
    """Raises ConfigError where :func:`room` is less than `tokens`."""
    if (most := room(model, prompt, tokens)) < tokens:
        raise ConfigError(f"a prompt of {prompt} tokens leaves {type(model).__name__} positions "
                          f"for an answer of {most}, not of {tokens}")


def check_words(rows: Any, words: int, where: str) -> None:
    """Every id has a row in the embedding. Raises DataError with the first that has none."""
    for i in range(len(rows)):
        worst = max(_ids(rows[i]), default=0)
        if worst >= words:
            raise DataError(f"{where} row {i}: the tokenizer writes id {worst}, the model knows "
                            f"{words} words; they do not belong together (or resize the model's "
                            "embeddings)")


def _ids(row: Mapping[str, Any]) -> Iterator[int]:
    """All ids that a row brings, and those that it asks for."""
    yield from (int(i) for i in row.get("input_ids", ()))
    for text in row.get("texts", ()):
        yield from text
    for tokens in row.get("pair", ()):
        yield from tokens.input_ids
    if isinstance(row.get("labels"), list):
        yield from (i for i in row["labels"] if i >= 0)
