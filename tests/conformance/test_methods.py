"""Every registered method on small architectures: three each, all with ``BURNISH_ALL=1``."""

from __future__ import annotations

import pytest

from burnish.core import registry
from burnish.core.errors import ConfigError
from burnish.core.needs import NEEDS, lacks
from burnish.core.site import KINDS
from burnish.testing import choose, conformance
from burnish.testing.models import NAMES

METHODS = conformance.methods()
CELLS = [(m, n) for m in METHODS for n in choose.models_for(m)]


@pytest.mark.slow
@pytest.mark.parametrize("method, model", CELLS, ids=[f"{m}-{n}" for m, n in CELLS])
def test_method(method, model, record_property):
    """All checks of a cell; those with nothing to look at say why, and are counted."""
    report = conformance.run(method, [model], only=conformance.CHECKS)
    record_property("conformance", [(r.check, r.state) for r in report.results])
    assert not report.failures, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("check", conformance.ONCE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_once(method, check, record_property):
    """Every setting, every kind of place: whatever the number of models."""
    report = conformance.run(method, choose.models_for(method, all=False)[:1], only=[check])
    record_property("conformance", [(r.check, r.state) for r in report.results])
    assert not report.failures, str(report)


@pytest.mark.parametrize("method", ["lora", "snella", "full", "checkpoint"])
def test_method_on_vit(method):
    """A quick look at four of them for `make check`."""
    conformance.check(method, "vit")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_applies_where_its_file_says(method):
    """Refused exactly where the model lacks what `kinds` and `needs` name, with a reason."""
    cls = registry.find(method)
    for model in NAMES:
        lack = lacks(cls, choose.anatomy(model))
        reason = conformance.refusal(method, model)
        if lack is None and reason is not None and "does not divide" in reason:
            continue                                  # of sizes, which other models have otherwise
        assert (reason is None) == (lack is None), f"{model}: {reason or lack}"
        if reason is not None:
            assert len(reason) > 30 and "\n" not in reason


# -- what is excused ------------------------------------------------------------------------------
def test_every_exclusion_names_a_check_and_says_why():
    checks = {c.__name__ for c in (*conformance.CHECKS, *conformance.ONCE)}
    for e in conformance.exclusions():
        assert e.check in checks, e
        assert len(e.reason) > 20, e
        assert any(e.covers(e.check, m, n) for m in METHODS for n in NAMES), f"covers nothing: {e}"


def test_facts_of_a_method_are_refused_there():
    """They stand in its file: a new method edits no list."""
    with pytest.raises(ConfigError, match=r"\[other\], \[small\]: .* stands in the method's file"):
        conformance.read("[small.lora]\nrank = 2\n[other.lora]\nrank = [3]\n")


def test_a_check_that_is_excused_and_passes_fails(monkeypatch):
    def fine(name, model):
        return None

    def broken(name, model):
        raise AssertionError("wrong")

    excused = tuple(conformance.Exclusion(c, "lora", "*", "no reason at all") for c in
                    ("fine", "broken"))
    monkeypatch.setattr(conformance, "exclusions", lambda: excused)
    assert conformance.one(fine, "lora", "vit").state == "fail"
    assert conformance.one(broken, "lora", "vit").state == "excluded"
    assert conformance.one(broken, "dora", "vit").state == "fail"


def test_every_check_looks_at_something():
    """No check is empty for the whole catalogue: some method declares what it compares with."""
    from burnish.core.method import Method

    facts = {"per_token", "state_bytes"}
    for fact in facts:
        assert [m for m in METHODS if hasattr(registry.find(m), fact)], fact
        assert not hasattr(Method, fact), fact


# -- the choice itself ----------------------------------------------------------------------------
def test_needs_are_words_that_have_a_meaning():
    for method in METHODS:
        assert registry.find(method).needs <= set(NEEDS), method


def test_every_method_has_three_models_where_it_applies_to_three():
    for method in METHODS:
        chosen = choose.models_for(method, all=False)
        every = choose.models_for(method, all=True)
        assert len(chosen) == min(3, len(every)) and set(chosen) <= set(every), method
        assert len(every) >= 5, f"{method} applies to {every} only"


def test_every_family_and_every_kind_of_place_is_looked_at():
    """Three models a method are enough: together they are all models, and all kinds of place."""
    chosen = {m: choose.models_for(m, all=False) for m in METHODS}
    assert {n for models in chosen.values() for n in models} == set(NAMES)
    deltas = [m for m in METHODS if "delta" in registry.find(m).axes()]
    seen = {k for m in deltas for n in chosen[m] for k in choose.kinds_on(n)}
    assert seen | {k for k, _, _ in choose.PLACES} >= {*KINDS, "fused"}
    assert {k for k, _, _ in choose.PLACES} == set(KINDS)


def test_a_new_method_moves_no_choice():
    before = choose.models_for("lora", all=False)
    assert before == choose.models_for("lora", all=False)
    assert choose.rank("lora", "vit") == 9607555404148528131       # on every machine


@pytest.mark.parametrize("text, parts", [(None, (1, 1)), ("", (1, 1)), ("3/8", (3, 8))])
def test_a_shard_is_a_part_of_the_whole(text, parts):
    assert choose.shard(text) == parts


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "a/b", "3/", "-1/2"])
def test_a_wrong_shard_is_refused(text):
    from burnish import BurnishError

    with pytest.raises(BurnishError, match="SHARD"):
        choose.shard(text)
