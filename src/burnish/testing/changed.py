"""What a run of the suite starts from: its seed, and the methods that have changed.

Both are read off the checkout, so that a run can be repeated. The seed is the day of the last
commit; ``BURNISH_SEED=512`` sets another. Changed is what differs from the branch ``main`` where
this is another one, from the last commit where something is not committed, from the last tag else,
from the day before the last commit where there is no tag; ``BURNISH_SINCE=<commit>`` says from
where, ``BURNISH_CHANGED=lora,dora`` what.
"""

from __future__ import annotations

import os
import subprocess
import time
from functools import lru_cache
from pathlib import Path

from ..core import registry
from ..core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
#: seconds before the last commit that count as new, where no branch and no tag says it
RECENT = 24 * 3600


def _git(*words: str) -> str | None:
    """What git answers in the checkout; None where there is none."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if not done.returncode else None


@lru_cache(maxsize=1)
def seed() -> int:
    """The day of the last commit, counted from 1970, or today where nobody knows;
    ``BURNISH_SEED`` says another. Raises ConfigError for what is no whole number."""
    if said := os.environ.get("BURNISH_SEED", ""):
        if not said.isdecimal():
            raise ConfigError(f"BURNISH_SEED={said!r}: expected a whole number, e.g. 512")
        return int(said)
    return int(_git("show", "-s", "--format=%ct", "HEAD") or time.time()) // (24 * 3600)


@lru_cache(maxsize=1)
def since() -> str | None:
    """The commit that changes are counted from. Raises ConfigError for one that is not there."""
    if said := os.environ.get("BURNISH_SINCE", ""):
        if (found := _git("rev-parse", "--verify", "--quiet", f"{said}^{{commit}}")) is None:
            raise ConfigError(f"BURNISH_SINCE={said!r}: no such commit")
        return found
    head = _git("rev-parse", "HEAD")
    for main in ("main", "origin/main"):
        base = _git("merge-base", "HEAD", main)
        if base and base != head:
            return base
    if _git("status", "--porcelain"):
        return head
    if (tag := _git("describe", "--tags", "--abbrev=0")) is not None:
        return _git("rev-parse", f"{tag}^{{commit}}")
    if (last := _git("show", "-s", "--format=%ct", "HEAD")) is None:
        return None
    return _git("rev-list", "-1", f"--before={int(last) - RECENT}", "HEAD") or None


@lru_cache(maxsize=1)
def files() -> frozenset[str]:
    """Files that differ from `since`, committed or not, by their path in the checkout."""
    base = since()
    told = [_git("ls-files", "--others", "--exclude-standard"),
            _git("diff", "--name-only", base) if base else None]
    return frozenset(line for text in told if text for line in text.splitlines())


@lru_cache(maxsize=1)
def methods() -> frozenset[str]:
    """Methods whose own file, test or a mechanism that their file imports has changed;
    ``BURNISH_CHANGED`` names others."""
    if (said := os.environ.get("BURNISH_CHANGED")) is not None:
        return frozenset(registry.find(n).name for n in said.replace(",", " ").split())
    return frozenset(n for n in registry.names(extra=False) if files() & about(n))


def about(name: str) -> frozenset[str]:
    """The files that make a method what it is: its own, its test, and the blocks and neighbours
    that it imports itself (not what those import, which is the whole house)."""
    import ast
    import sys

    cls = registry.find(name)
    module = sys.modules[cls.__module__]
    own = Path(module.__file__ or "")
    if ROOT not in own.parents:
        return frozenset()
    found = {own, ROOT / f"tests/methods/test_{name}.py"}
    for node in ast.walk(ast.parse(own.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = own.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found |= {p for p in (base.with_suffix(".py"),
                                  *(base / f"{a.name}.py" for a in node.names)) if p.is_file()}
    core = ROOT / "src/burnish/core"
    return frozenset(p.relative_to(ROOT).as_posix() for p in found if core not in p.parents)
