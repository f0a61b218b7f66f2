"""The map shows the house: files, classes and arguments that docs/architecture.md names exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import burnish
from burnish.blocks.weight import term

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
SKETCH = ast.parse("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)))
CLASSES = {c.name: c for c in SKETCH.body if isinstance(c, ast.ClassDef)}


def below(cls: type) -> list[type]:
    return [cls, *(s for c in cls.__subclasses__() for s in below(c))]


def members(name: str) -> list:
    return [(name, m.name if isinstance(m, ast.FunctionDef) else m.target.id, m)
            for m in CLASSES[name].body]


@pytest.mark.parametrize("cls, name, said", [
    pytest.param(*m, id=f"{m[0]}.{m[1]}") for c in CLASSES for m in members(c)])
def test_what_the_sketch_of_a_class_names_is_there(cls, name, said):
    burnish.methods()                                     # all terms there are
    has = [c for c in below(getattr(term, cls)) if hasattr(c, name)]
    assert has, f"no {cls} has {name}"
    if isinstance(said, ast.FunctionDef):
        real = list(inspect.signature(getattr(has[0], name)).parameters)
        assert [a.arg for a in said.args.args] == real
    elif said.value is not None:
        assert getattr(getattr(term, cls), name) == ast.literal_eval(said.value)


@pytest.mark.parametrize("cls", sorted(CLASSES))
def test_its_bases_are_those_of_the_class(cls):
    said = [ast.unparse(b).rpartition(".")[2] for b in CLASSES[cls].bases]
    assert said == [b.__name__ for b in getattr(term, cls).__bases__]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([a-z_/]+\.(?:py|toml))`", PAGE))))
def test_the_files_it_names_exist(path):
    assert (ROOT / "src/burnish" / path).is_file()


def test_the_sketch_is_read():
    assert {"Term", "Wrap"} <= set(CLASSES)
    assert not [c for c in below(term.Term) if hasattr(c, "no_such_member")]
