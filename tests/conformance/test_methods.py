"""Every registered method on small architectures: the cells of testing/choose.py, each check of
each method on another model from run to run; all of all with ``BURNISH_ALL=1``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from burnish.core import registry
from burnish.core.needs import NEEDS, lacks
from burnish.core.site import KINDS
from burnish.core.targets import match
from burnish.testing import changed, choose, conformance
from burnish.testing.models import NAMES, tiny

METHODS = conformance.methods()
#: what few of the small models have
FEW = {"stream", "pictures", "batch norms", "linear head", "two towers", "towers within",
       "plain patches", "plain mlp", "groups of points"}
#: needs that few have all of: BERT and its kin with a head, decoders whose attention is reached
TOGETHER = ({"text", "whole reading", "head"}, {"open attention", "writes on"})
LIVE = conformance.live(METHODS)


def rows():
    """A test for each method's cells; where they are many, one for each of its models."""
    if choose.everything():
        chosen = [choose.Cell(m, c.__name__, n) for m in METHODS for n in choose.models_for(m)
                  for c in conformance.CHECKS]
    else:
        chosen = choose.cells(LIVE)
    for method, some in itertools.groupby(chosen, key=lambda c: c.method):
        some = list(some)
        if len(some) < 2 * len(conformance.CHECKS):
            yield pytest.param(some, id=f"{method}-in turn")
            continue
        some.sort(key=lambda c: c.model)
        for model, few in itertools.groupby(some, key=lambda c: c.model):
            yield pytest.param(list(few), id=f"{method}-{model}")


def told(report, record_property):
    record_property("conformance", [(r.check, r.state) for r in report.results])
    assert not report.failures, f"{report} (BURNISH_SEED={changed.seed()})"


@pytest.mark.slow
@pytest.mark.parametrize("cells", list(rows()))
def test_method(cells, record_property):
    """All checks of a method; those with nothing to look at say why, and are counted."""
    told(conformance.look(cells), record_property)


@pytest.mark.slow
@pytest.mark.parametrize("check", range(len(conformance.ONCE)),
                         ids=[c.__name__ for c in conformance.ONCE])
@pytest.mark.parametrize("method", METHODS)
def test_once(method, check, record_property):
    """Every setting, every kind of place: whatever the number of models, small ones first."""
    model = choose.models_for(method, all=False)[-1]
    told(conformance.run(method, [model], only=[conformance.once(method)[check]]), record_property)


@pytest.mark.parametrize("new", [frozenset(), frozenset({"lora"})])
def test_each_of_them_is_asked_of_changed_methods_and_of_others(new, monkeypatch):
    monkeypatch.setattr(changed, "methods", lambda: new)
    assert [c.__name__ for c in conformance.once("lora")] == \
        [c.__name__ for c in conformance.ONCE]


@pytest.mark.parametrize("method", ["lora", "snella", "full", "checkpoint"])
def test_method_on_vit(method):
    """A quick look at four of them for `make check`."""
    conformance.check(method, "vit")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_applies_where_its_file_says(method):
    """Refused exactly where the model lacks what `kinds` and `needs` name, with a reason. Where it
    applies the cells show it; here a model of either sort is asked, all of a changed method."""
    cls = registry.find(method)
    lack = {m: lacks(cls, choose.anatomy(m)) for m in NAMES}
    sorts = ([m for m in NAMES if lack[m]], [m for m in NAMES if not lack[m]])
    for model in (m for sort in sorts for m in choose.some(method, sort, 1)):
        reason = conformance.refusal(method, model)
        if lack[model] is None and reason is not None and "does not divide" in reason:
            continue                                  # of sizes, which other models have otherwise
        assert (reason is None) == (lack[model] is None), f"{model}: {reason or lack[model]}"
        if reason is not None:
            assert len(reason) > 30 and "\n" not in reason


# -- what is excused ------------------------------------------------------------------------------
def test_every_excuse_names_a_check_and_a_model_and_says_why():
    checks = {c.__name__ for c in (*conformance.CHECKS, *conformance.ONCE)}
    for method in METHODS:
        for what, reason in registry.find(method).excused.items():
            check, on, model = what.partition(" on ")
            assert check in checks, f"{method}: {what}"
            assert not on or choose.applies(method, model), f"{method}: covers nothing: {what}"
            assert len(reason) > 20, f"{method}: {what}"


def test_a_check_that_is_excused_and_passes_fails(monkeypatch):
    def fine(name, model):
        return None

    def broken(name, model):
        raise AssertionError("wrong")

    monkeypatch.setattr(registry.find("lora"), "excused",
                        {"fine": "no reason at all", "broken on vit": "no reason at all"})
    assert conformance.one(fine, "lora", "vit").state == "fail"
    assert conformance.one(broken, "lora", "vit").state == "excluded"
    assert conformance.one(broken, "lora", "bert").state == "fail"
    assert conformance.one(broken, "dora", "vit").state == "fail"


def test_a_model_that_refuses_a_method_s_sizes_is_no_failure_and_no_pass(monkeypatch):
    """A method may apply by its kinds and be refused by a size there: oft in blocks of 5 inputs."""
    monkeypatch.setattr(registry.find("oft"), "small", {"block": 5})
    conformance.refusal.cache_clear()
    result = conformance.one(conformance.checks.attaching.it_acts, "oft", "vit")
    conformance.refusal.cache_clear()
    assert result.state == "not applicable" and "does not divide" in result.reason


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
        cls = registry.find(method)
        if set(cls.kinds) != {"conv"} and not FEW & cls.needs \
                and not any(some <= cls.needs for some in TOGETHER):
            assert len(every) >= 5, f"{method} applies to {every} only"


def test_one_run_shows_every_check_of_every_method_and_each_meets_every_structure():
    for seed in (0, 7, 512):
        cells = choose.cells(LIVE, seed, ())
        shown = {(c.method, c.check) for c in cells}
        assert shown == {(m, c) for m, checks in LIVE.items() for c in checks}
        for check in {c for checks in LIVE.values() for c in checks}:
            able = [m for m in METHODS if check in LIVE[m]]
            for structure, models in choose.STRUCTURES.items():
                could = any(choose.applies(m, n) for m in able for n in models)
                met = {c.model for c in cells if c.check == check} & set(models)
                assert met or not could, f"{check} meets no {structure}"


def test_a_run_shows_a_method_on_nearly_as_many_structures_as_it_can_stand_on():
    for method in METHODS:
        models = {c.model for c in choose.diagonal(method, LIVE[method], 3)}
        can = {s for s, ms in choose.STRUCTURES.items() if any(choose.applies(method, m)
                                                               for m in ms)}
        met = {s for s, ms in choose.STRUCTURES.items() if models & set(ms)}
        assert len(met) >= min(len(can), len(LIVE[method])) - 3, f"{method}: {sorted(can - met)}"


def test_as_many_runs_as_there_are_models_show_everything():
    for method in ("lora", "adam8bit", "vpt"):
        seen = [(c.check, c.model) for seed in range(100, 100 + len(NAMES))
                for c in choose.diagonal(method, LIVE[method], seed)]
        whole = {(c, m) for c in LIVE[method] for m in choose.models_for(method, all=True)}
        assert set(seen) == whole


def test_a_few_changed_methods_are_shown_whole_and_many_share_what_there_is():
    one = choose.cells(LIVE, 3, ["lora"])
    whole = {(c, m) for c in LIVE["lora"] for m in choose.models_for("lora", all=True)}
    assert {(c.check, c.model) for c in one if c.method == "lora"} == whole
    for new in (METHODS[:20], METHODS):
        more = len(choose.cells(LIVE, 3, new)) - len(choose.cells(LIVE, 3, ()))
        assert 0 <= more <= choose.CHANGED


def test_structures_are_of_models_that_have_them():
    assert set(choose.ROUND) == set(NAMES) and len(choose.ROUND) == len(NAMES)
    assert {m for models in choose.STRUCTURES.values() for m in models} == set(NAMES)
    for model in NAMES:
        a = choose.anatomy(model)
        said = {s for s, models in choose.STRUCTURES.items() if model in models}
        net = tiny(model)[0]
        twice = list(net.named_parameters(remove_duplicate=False))
        tied = len(list(net.parameters())) < len(twice)
        assert tied == ("a tied head" in said), model
        assert ("encoder and decoder" in said) == (a.encoder_decoder() is not None), model
        assert ("no blocks" in said) == (not a.blocks), model
        kinds = choose.kinds_on(model)
        assert ("experts" in kinds) == ("experts" in said), model
        rows = any(a.slices(p) for p in match(a, None) if p.kind != "experts")
        assert rows == ("one weight for q, k and v" in said), model
        assert ("conv1d" in kinds) == ("weights stored (in, out)" in said), model


def test_every_kind_of_place_is_looked_at():
    deltas = [m for m in METHODS if "delta" in registry.find(m).axes()]
    seen = {k for m in deltas for n in choose.models_for(m, all=False) for k in choose.kinds_on(n)}
    assert seen | {k for k, _, _ in choose.PLACES} >= {*KINDS, "fused"}
    assert {k for k, _, _ in choose.PLACES} == set(KINDS)


def test_a_new_method_moves_no_choice():
    before = choose.models_for("lora", all=False)
    assert before == choose.models_for("lora", all=False)
    assert choose.rank("lora", "vit") == 9607555404148528131       # on every machine
    without = {m: checks for m, checks in LIVE.items() if m != "dora"}
    assert {c for c in choose.cells(LIVE, 5, ()) if c.method == "lora"} >= \
        set(choose.diagonal("lora", LIVE["lora"], 5))
    assert choose.diagonal("lora", LIVE["lora"], 5) == choose.diagonal("lora", without["lora"], 5)


# -- what a catalogue of any size costs -----------------------------------------------------------
#: cells a method adds to a run at most, and what is there without any
EACH, BASE = len(conformance.CHECKS), 2 * len(conformance.CHECKS) * len(choose.STRUCTURES)


@pytest.fixture
def catalogue():
    """catalogue(n): so many methods, copies of ours under other names; gone afterwards."""
    made = []

    def grow(n):
        for k in range(n):
            cls = registry.find(METHODS[k % len(METHODS)])
            twin = dataclass(frozen=True, kw_only=True)(
                type(cls.__name__, (cls,), {"__doc__": "a copy", "__module__": __name__}))
            made.append(registry.register(twin, f"copy_{k}").name)
        return made[:n]

    yield grow
    for name in made:
        del registry._EXTRA[name]


def test_a_run_has_as_many_cells_as_methods_times_a_number_and_a_rest(catalogue):
    names = catalogue(300)
    live = conformance.live(names)
    for n in (50, 100, 300):
        few = {m: live[m] for m in names[:n]}
        for new in ((), names[:5], names[:n]):
            cells = choose.cells(few, 11, new)
            assert len(cells) <= EACH * n + BASE + (choose.CHANGED if new else 0)
        assert len(choose.visited(names[:n], 11, ())) <= choose.WINDOW
        assert len(choose.visited(names[:n], 11, names[:n])) <= 2 * choose.WINDOW
        own = choose.visited(names[:n], 11, names[:1], window=choose.TESTS)
        assert names[0] in own and min(n, choose.TESTS) <= len(own) <= choose.TESTS + 1
    assert all(len(choose.some(m, [f.name for f in conformance.checks.settings.own(m)],
                               choose.SETTINGS, 11)) <= choose.SETTINGS for m in names)


def test_a_window_goes_round_the_catalogue():
    names = [f"m{k}" for k in range(200)]
    turns = [choose.visited(names, seed, ()) for seed in range(40, 40 + 7)]
    assert {n for turn in turns for n in turn} == set(names)
    assert set(choose.visited(names, 3, ["m7", "m8"])) >= {"m7", "m8"}


@pytest.mark.parametrize("text, parts", [(None, (1, 1)), ("", (1, 1)), ("3/8", (3, 8))])
def test_a_shard_is_a_part_of_the_whole(text, parts):
    assert choose.shard(text) == parts


def test_long_tests_have_their_turns_and_a_changed_file_has_its_own():
    ids = [f"tests/e2e/test_{k % 9}.py::test_{k}" for k in range(90)]
    turns = [choose.long_tests(ids, seed, ()) for seed in range(choose.TURNS)]
    assert {i for turn in turns for i in turn} == set(ids)
    assert sum(map(len, turns)) == len(ids)
    now = choose.long_tests(ids, 3, ["tests/e2e/test_4.py"])
    assert {i for i in ids if "test_4.py" in i} <= now
    assert len(choose.long_tests(ids, 3, {i.partition("::")[0] for i in ids})) <= \
        2 * len(ids) / choose.TURNS + 1


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "a/b", "3/", "-1/2"])
def test_a_wrong_shard_is_refused(text):
    from burnish import BurnishError

    with pytest.raises(BurnishError, match="SHARD"):
        choose.shard(text)
