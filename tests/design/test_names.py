"""One name per idea: a setting's name means the same in every method that has it.

Nothing is listed here. A name that several methods share stands in core/vocabulary.py with its one
meaning, or says the same words in each; a name of one method's own needs nothing.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any, ClassVar

import pytest

from burnish.core.errors import RecipeError
from burnish.core.method import Method, setting
from burnish.core.recipe import make
from burnish.core.registry import find, names
from burnish.core.vocabulary import VOCABULARY

COMMON = {f.name for f in fields(Method)}
SETTINGS = [(n, f) for n in names(extra=False) for f in fields(find(n)) if f.name not in COMMON]


def unclear(said: Mapping[str, Mapping[str, str]], known: Mapping[str, str]) -> dict[str, str]:
    """Names that several methods use for what may be several ideas. said: name -> method -> doc."""
    return {name: "; ".join(f"{m}: {doc}" for m, doc in docs.items())
            for name, docs in said.items()
            if name not in known and len(docs) > 1 and len(set(docs.values())) > 1}


def second_words(settings, known: Mapping[str, str]) -> dict[str, str]:
    """Settings called by what is another spelling of a setting that other methods have."""
    spelt: dict[str, set[str]] = defaultdict(set)
    for _, f in settings:
        for alias in f.metadata.get("alias", ()):
            spelt[alias].add(f.name)
    return {f"{m}.{f.name}": ", ".join(sorted(spelt[f.name])) for m, f in settings
            if f.name in spelt and f.name not in known}


def docs() -> dict[str, dict[str, str]]:
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for method, f in SETTINGS:
        said[f.name][method] = f.metadata["help"]
    return said


def test_a_name_means_one_thing_in_every_method():
    found = unclear(docs(), VOCABULARY)
    assert not found, f"{found}: say the same words, take another name, or give the name its one " \
                      "meaning in core/vocabulary.py"


def test_no_setting_is_called_by_another_spelling_of_an_idea_with_a_name():
    found = second_words(SETTINGS, VOCABULARY)
    assert not found, f"{found}: take the name of the idea, and make this one an alias of it"


def test_the_vocabulary_holds_what_exists_and_no_idea_twice():
    assert not set(VOCABULARY) - {f.name for _, f in SETTINGS}
    assert len(set(VOCABULARY.values())) == len(VOCABULARY)
    assert all(VOCABULARY.values())


def test_a_name_of_ones_own_needs_no_line():
    said = {**docs(), "novelty": {"lora": "a thing of its own"}}
    assert not unclear(said, VOCABULARY)


def test_one_name_for_two_ideas_is_found():
    said = {"novelty": {"lora": "a width", "dora": "a share"}, "rank": {"lora": "a", "dora": "b"}}
    assert list(unclear(said, VOCABULARY)) == ["novelty"]
    said["novelty"]["dora"] = "a width"
    assert not unclear(said, VOCABULARY)


def test_a_second_word_for_an_idea_is_found():
    width = setting(4, "a width")
    width.name = "width"                                  # an alias of bottleneck
    assert second_words([*SETTINGS, ("new", width)], VOCABULARY) == {"new.width": "bottleneck"}


def shadowed(cls: type[Method]) -> dict[str, str]:
    """What of a method has the name of a question or fact of every method and is none: the engine
    would read it as that."""
    out: dict[str, str] = {f.name: "a setting" for f in fields(cls)
                           if f.name in vars(Method) and f.name not in COMMON}
    for name, base in vars(Method).items():
        if name.startswith("__") or name in COMMON or name in out:
            continue
        mine = inspect.getattr_static(cls, name)
        wanted = _sort(base)
        if not issubclass(_sort(mine), wanted):
            out[name] = f"{mine!r} for a {wanted.__name__}"
    return out


def _sort(value: Any) -> type:
    """What it is to whoever asks an instance for it; of a property, what it says it gives."""
    if isinstance(value, property):
        said = str(inspect.signature(value.fget).return_annotation)
        value = {"bool": False, "str": ""}.get(said, () if said.startswith("tuple") else value)
    if isinstance(value, Mapping):
        return Mapping
    return FunctionType if isinstance(value, classmethod | staticmethod) else type(value)


@pytest.mark.parametrize("method", names(extra=False))
def test_no_setting_or_attribute_hides_a_fact_of_every_method(method):
    found = shadowed(find(method))
    assert not found, f"{found}: take another name, with this one as alias of a setting"


def test_a_fact_that_is_hidden_is_found():
    @dataclass(frozen=True, kw_only=True)
    class Counts(Method):
        private: int = setting(1, "rows of its own")
        merges: bool = setting(True, "of the same type, and no fact")
        together: ClassVar[int] = 3
        exact: ClassVar[int] = 1
        needs: ClassVar[tuple[str, ...]] = ("blocks",)
        context: ClassVar[dict[str, Any]] = {}

        @property
        def sees_run(self) -> bool:
            return True

        @property
        def relies_on(self) -> int:
            return 1

    assert shadowed(Counts).keys() == {"private", "merges", "together", "exact", "needs",
                                       "relies_on"}
    assert not shadowed(Method)


@pytest.mark.parametrize("method", sorted({m for m, _ in SETTINGS}))
def test_other_spellings_mean_one_setting(method):
    """No alias is a setting of the same method, and none stands for two."""
    mine = [f for m, f in SETTINGS if m == method]
    spelt = [a for f in mine for a in f.metadata.get("alias", ())]
    assert len(spelt) == len(set(spelt)) and not set(spelt) & {f.name for f in mine}


@pytest.mark.parametrize("method, old, new, value", [
    ("houlsby", "width", "bottleneck", 4), ("parallel", "reduced", "bottleneck", 4),
    ("parallel", "width", "bottleneck", 4), ("adalora", "interval", "every", 3),
    ("adalora", "final", "cooldown", 0.2), ("galore", "update_every", "every", 3),
    ("fira", "update_every", "every", 3), ("apollo", "update_every", "every", 3),
    ("mos", "private", "own_rows", 0), ("mtlora", "shared", "shared_last", False),
    ("less", "together", "at_once", 3)])
def test_earlier_spellings_are_still_read(method, old, new, value):
    assert make(method, {old: value}) == make(method, {new: value})
    with pytest.raises(RecipeError, match="twice"):
        make(method, {old: value, new: value})
