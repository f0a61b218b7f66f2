"""Where methods are found: one file each, the file name is the name. There is no list to edit.

Built-in methods are the files ``burnish/methods/<axis>/<name>.py``, imported when first named;
an axis of many methods has folders for readers (``delta/lowrank/lora.py``); the stem is the name.
Other packages add theirs through the entry-point group ``burnish.methods`` (name -> class), and
any code may call :func:`register`.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from .errors import RecipeError, nearest
from .method import Method

_ROOT = Path(__file__).resolve().parent.parent / "methods"
_EXTRA: dict[str, type[Method]] = {}
_LOADED: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    name: str
    cls: type[Method]

    @property
    def axes(self) -> tuple[str, ...]:
        return self.cls.axes()

    @property
    def summary(self) -> str:
        """The first line of the docstring, after the published name."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]


@lru_cache(maxsize=1)
def _files() -> dict[str, str]:
    """method name -> module, read off the folders."""
    return {f.stem: ".".join(("burnish", "methods", *f.relative_to(_ROOT).with_suffix("").parts))
            for f in sorted(_ROOT.glob("*/**/*.py")) if not f.stem.startswith("_")}


@lru_cache(maxsize=1)
def _plugins() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group="burnish.methods")}


def register(cls: type[Method], name: str | None = None) -> type[Method]:
    """Add a method class from anywhere; usable as a decorator. The name is the class's module
    file name unless given."""
    cls.name = name or cls.__module__.rpartition(".")[2]
    _EXTRA[cls.name] = cls
    return cls


def names(extra: bool = True) -> list[str]:
    """Every name a recipe may use, presets not included. extra=False: without what a script has
    registered, only the files and the entry points."""
    return sorted({*_files(), *_plugins(), *(_EXTRA if extra else ())})


def presets() -> dict[str, str]:
    """Named combinations of the literature: name -> expression."""
    return importlib.import_module("burnish.methods.presets").PRESETS


def find(name: str) -> type[Method]:
    """The class behind a name; an unknown name is an error with near misses."""
    if name in _EXTRA:
        return _EXTRA[name]
    if name in _LOADED:
        return _LOADED[name]
    if name in _files():
        module = importlib.import_module(_files()[name])
        own = [c for c in vars(module).values()
               if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__]
        if len(own) != 1:
            raise RecipeError(f"{module.__name__} defines {len(own)} methods; a file defines one")
        cls = own[0]
    elif name in _plugins():
        cls = _plugins()[name].load()
    else:
        raise RecipeError(f"unknown method {name!r}{nearest(name, [*names(), *presets()])}"
                          + ("" if nearest(name, [*names(), *presets()])
                             else "; `burnish methods` lists them"))
    cls.name = name
    _LOADED[name] = cls
    return cls


def catalogue() -> list[Entry]:
    """Every method, by axis and name (imports all method files)."""
    return [Entry(n, find(n)) for n in names()]
