"""A configuration file, and ``--key value`` after it, as one dictionary."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def read(path: str | Path) -> dict[str, Any]:
    """A YAML, JSON or TOML file whose top level is a mapping; dashes in keys become underscores.

    Raises ConfigError when the file is missing, of another kind or not a mapping.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path} is not a configuration file; expected one that ends in "
                          f"{', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        data = _parse(text, path.suffix.lower())
    except ValueError as error:                     # JSON's and TOML's errors are ValueErrors
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__} at the top; expected a mapping "
                          "such as 'model: ...'")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        try:
            import tomllib
        except ModuleNotFoundError:                 # Python 3.10
            import tomli as tomllib
        return tomllib.loads(text)
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError("YAML needs PyYAML: pip install 'burnish[fit]', or write the "
                          "configuration as JSON or TOML") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def value(text: str) -> Any:
    """What a word on the command line means: JSON, then a Python literal, then itself.

    >>> value("1e-4"), value("true"), value("None"), value("8GB")
    (0.0001, True, None, '8GB')
    """
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def overrides(words: list[str]) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and the bare flag ``--key`` (which means True)."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected {word!r}; settings are written --key value")
        key, given, text = word[2:].partition("=")
        if given:
            found[key.replace("-", "_")] = value(text)
        elif rest and not rest[0].startswith("--"):
            found[key.replace("-", "_")] = value(rest.pop(0))
        else:
            found[key.replace("-", "_")] = True
    return found
