"""A configuration file, and ``--key value`` after it, as one dictionary."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..core.reading import parse_json, plain, read_text, reading, sane

#: the largest configuration, in bytes
LARGEST = 1 << 24
SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def read(path: str | Path) -> dict[str, Any]:
    """A YAML, JSON or TOML file whose top level is a mapping; dashes in keys become underscores.

    Raises ConfigError when the file is missing, of another kind or not a mapping.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        hint = "; a model is given by --model, rows by --data" if path.exists() else ""
        raise ConfigError(f"{path} is not a configuration file; expected one that ends in "
                          f"{', '.join(SUFFIXES)}{hint}")
    text = read_text(path, ConfigError, LARGEST)
    with reading(path, ConfigError):
        data = _parse(text, path)
    sane(data, path, ConfigError, nodes=100_000)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__} at the top; expected a mapping "
                          "such as 'model: ...'")
    found = {plain(key).replace("-", "_"): value for key, value in data.items()}
    if len(found) < len(data):
        names = [plain(key).replace("-", "_") for key in data]
        twice = next(n for n in names if names.count(n) > 1)
        raise ConfigError(f"{path} gives {twice} twice, under two spellings")
    return found


def _parse(text: str, path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return parse_json(text, path, ConfigError)
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
    class Loader(yaml.SafeLoader):
        """Plain YAML, in which a name stands once and ``1e-4`` is a number."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in getattr(node, "value", ()):
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                name = (key.tag, str(key.value))
                if name in seen:
                    raise ConfigError(f"{path}, line {key.start_mark.line + 1}: "
                                      f"{plain(key.value)} stands twice")
                seen.add(name)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{at} is not YAML: "
                          f"{plain(getattr(error, 'problem', None) or error)}") from None


#: PyYAML takes 1e-4 for text (YAML 1.1 wants 1.0e-4); everybody else means the number
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")


def value(text: str) -> Any:
    """What a word on the command line means: JSON, then a Python literal, then itself.

    >>> value("1e-4"), value("true"), value("None"), value("8GB")
    (0.0001, True, None, '8GB')
    """
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")     # '1is' makes Python frown
                return parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
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
