"""What the library says in Python, said in flags: ``resume=True`` is ``--resume`` here."""

from __future__ import annotations

import contextlib
import re
from functools import cache

from ..core.errors import ConfigError

#: settings of fit that have a flag of the command itself
OWN = ("model", "data", "recipe", "memory", "output", "force", "base", "text", "label", "image",
       "audio")
_SAID = re.compile(r"""(?<![\w(.-])([a-z_]+)=(True\b|'[^']*'|"[^"]*"|[\w.+-]+|)""")
_LISTED = re.compile(r"(--\w+ (?:'[^']*'|[\w./:+-]+)), (?=--\w+ )")
_PLAIN = re.compile(r"[\w.,:/+-]+")


@cache
def names() -> frozenset[str]:
    from dataclasses import fields

    from ..fit.arguments import ALIASES, OWN_ALIASES, Options, training_names

    theirs: frozenset[str] = frozenset()
    with contextlib.suppress(ConfigError):              # the light core is without transformers
        theirs = training_names()
    return frozenset({*OWN, *(f.name for f in fields(Options)), *theirs, *ALIASES,
                      *OWN_ALIASES}) - {"callbacks"}


def flags(text: str) -> str:
    """`text` with every setting as it is written on the command line; recipes stay as they are.

    >>> flags("name it with text=; resume=True goes on; lora(rank=8, dropout=0.1)")
    'name it with --text; --resume goes on; lora(rank=8, dropout=0.1)'
    """
    def said(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in names() or _inside(text, found.start()):
            return found.group()
        if value in ("", "True"):
            return f"--{name}"
        bare = value[1:-1] if value[0] in "'\"" else value
        return f"--{name} {bare if _PLAIN.fullmatch(bare) else repr(bare)}"

    if "=" not in text:
        return text
    written = _SAID.sub(said, text).replace("load(..., force=True)", "--force") \
        .replace("export_peft(..., rank=16)", "--rank 16")
    return _LISTED.sub(r"\1 ", written)                 # as they are typed, one after another


def _inside(text: str, at: int) -> bool:
    """Within the brackets of a call, such as a recipe's."""
    depth = 0
    for i, letter in enumerate(text[:at]):
        if letter == "(" and i and (text[i - 1].isalnum() or text[i - 1] == "_"):
            depth += 1
        elif letter == "(" and depth:
            depth += 1
        elif letter == ")" and depth:
            depth -= 1
    return depth > 0
