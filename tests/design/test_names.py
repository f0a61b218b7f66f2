"""One name per idea: a setting's name means the same in every method that has it.

Nothing is listed here. A name that several methods share stands in core/vocabulary.py with its one
meaning, or says the same words in each; a name of one method's own needs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields

import pytest

import burnish
from burnish.core.errors import RecipeError
from burnish.core.method import Method
from burnish.core.recipe import make
from burnish.core.vocabulary import VOCABULARY

COMMON = {f.name for f in fields(Method)}
SETTINGS = [(e.name, f) for e in burnish.methods() if e.cls.__module__.startswith("burnish.")
            for f in fields(e.cls) if f.name not in COMMON]


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
    from burnish.core.method import setting

    width = setting(4, "a width")
    width.name = "width"                                  # an alias of bottleneck
    assert second_words([*SETTINGS, ("new", width)], VOCABULARY) == {"new.width": "bottleneck"}


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
    ("fira", "update_every", "every", 3), ("apollo", "update_every", "every", 3)])
def test_earlier_spellings_are_still_read(method, old, new, value):
    assert make(method, {old: value}) == make(method, {new: value})
    with pytest.raises(RecipeError, match="twice"):
        make(method, {old: value, new: value})
