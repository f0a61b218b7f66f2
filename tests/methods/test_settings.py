"""What a method's file says of its settings, and the check that reads it.

That every setting acts is shown method by method in tests/conformance (`every_setting_acts`).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.method import Method, setting
from burnish.core.recipe import least, make
from burnish.core.registry import find, names, register
from burnish.core.vocabulary import DECAYS, PROBABILITIES, SIGNED, VOCABULARY
from burnish.testing import conformance
from burnish.testing.checks import settings, training

TESTS = Path(__file__).parents[1]
COMMON = {f.name for f in fields(Method)}
SETTINGS = [(n, f) for n in names(extra=False) for f in fields(find(n)) if f.name not in COMMON]
every_setting_acts = settings.every_setting_acts


def about(fact: str) -> list:
    return [pytest.param(m, f, id=f"{m}-{f.name}") for m, f in SETTINGS if f.metadata.get(fact)]


@pytest.mark.parametrize("method, f", about("unseen"))
def test_what_no_run_shows_says_why_and_names_a_test(method, f):
    reason, _, where = f.metadata["unseen"].rpartition(": ")
    assert len(reason) > 20, "say why"
    assert (TESTS.parent / where).is_file() and where.startswith("tests/"), where


@pytest.mark.parametrize("method, f", about("other"))
def test_other_values_are_legal_and_other(method, f):
    beside = f.metadata["beside"]                # what it is shown with
    small = burnish.parse(conformance.part(method, **beside))[0].changed()
    now = make(method, small).settings()[f.name]
    for value in f.metadata["other"]:
        assert getattr(make(method, {**small, f.name: value}), f.name) == value != now


@pytest.mark.parametrize("method, f", about("beside"))
def test_what_a_setting_is_shown_beside_is_legal(method, f):
    assert burnish.parse(conformance.part(method, **f.metadata["beside"]))
    assert list(settings.others(method, f))


@pytest.mark.parametrize("method", [n for n in names(extra=False) if find(n).small])
def test_small_sizes_are_settings_and_legal(method):
    small = burnish.parse(conformance.part(method))[0]
    assert {k: getattr(small, k) for k in type(small).small} == type(small).small


def bounded(word) -> list:
    """Settings that mean a number of things, a size, a probability or what is left of an earlier
    step, with what is none."""
    out = []
    for m, f in SETTINGS:
        kind, low, above = f.type.split(" | ")[0], least(f), f.metadata["above"]
        if word == "count" and kind == "int" and low is not None:
            out.append((m, f, int(low) - 1))
        if word == "size" and kind == "float" and low is not None:
            out += [(m, f, low - 0.5), (m, f, low - 1e-9)]
        if word == "size" and above is not None:
            out += [(m, f, above), (m, f, above - 0.5)]
        if word == "probability" and f.name in PROBABILITIES:
            out += [(m, f, -0.5), (m, f, 1.0)]
        if word == "decay" and f.name in DECAYS:
            pair = kind.startswith("tuple")
            out += [(m, f, w) for v in (-0.5, 1.0, 1.5)
                    for w in (((v, 0.5), (0.5, v)) if pair else (v,))]
    return out


@pytest.mark.parametrize("word", ["count", "size", "probability", "decay"])
def test_what_a_setting_cannot_mean_is_refused_by_every_method(word):
    """Fewer than can be, or no probability: not at the first tensor, nor in another's words."""
    cases, taken = bounded(word), []
    for method, f, value in cases:
        small = burnish.parse(conformance.part(method, **f.metadata["beside"]))[0].changed()
        try:
            made = make(method, {**small, f.name: value})
        except ConfigError as e:
            assert method in str(e) or f.name in str(e), e
        else:
            taken.append(str(made))
    assert not taken and len(cases) > 20


def several() -> list:
    """Settings of several numbers, what they are shown beside, and a value that is taken there."""
    out = []
    for m, f in SETTINGS:
        made = burnish.parse(conformance.part(m, **f.metadata["beside"]))[0]
        known = [v for v in (getattr(made, f.name), *f.metadata["other"]) if isinstance(v, tuple)]
        if f.type.startswith(("tuple[int", "tuple[float")) and any(known):
            out.append((m, f, made.changed(), next(filter(None, known))))
    return out


def test_what_stands_in_a_setting_of_several_numbers_is_held_to_its_type():
    """Text, truth, no finite number or a tuple in the place of one, and one too many or too few."""
    cases, taken = several(), []
    for method, f, small, right in cases:
        wrong = [(v, *right[1:]) for v in ("a", True, None, 1e999, -1e999, right)]
        wrong += [(*right[:-1], v) for v in ("a", 1e999)]
        wrong += [right[1:], (*right, right[0])] if "..." not in f.type else []
        wrong += [(-0.1, *right[1:]), (*right[:-1], 1.0)] if f.name == "betas" else []
        for value in wrong:
            try:
                taken.append(str(make(method, {**small, f.name: value})))
            except ConfigError as e:
                assert method in str(e) and len(str(e).splitlines()) == 1
        assert getattr(make(method, {**small, f.name: right}), f.name) == right
    assert not taken and {f.name for _, f, *_ in cases} > {"betas", "pixel_std", "coefficients"}


def test_a_sign_is_free_where_that_is_said():
    """By a name that many share, or by the setting; and it is then taken."""
    free = [(m, f) for m, f in SETTINGS if f.type.split(" | ")[0] == "float" and
            f.name not in SIGNED and least(f) is None]
    assert {m for m, _ in free} and all(f.metadata["signed"] or f.default < 0 for _, f in free)
    for m, f in free:
        small = burnish.parse(conformance.part(m, **f.metadata["beside"]))[0].changed()
        assert getattr(make(m, {**small, f.name: -0.5}), f.name) == -0.5
    assert {"alpha", "scale", "seed"} == SIGNED, "a name more is a bound less, for all that have it"
    assert SIGNED - {"seed"} <= set(VOCABULARY) and make("lora", {"alpha": -8.0}).alpha == -8.0


def test_a_method_that_is_handed_over_as_an_object_is_held_to_the_same():
    for made, says in ((Counting(many=-1), "many=-1.: expected 0 or more"),
                       (Counting(size=-1e-9), "size=-1e-09.: expected 0 or more"),
                       (Counting(size=None, part=0.5), "part=0.5.: expected more than 0.5"),
                       (Counting(betas=(0.5, 1.0)), "betas=.0.5, 1.0..: expected from 0 to below"),
                       (Counting(momentum=-0.1), "momentum=-0.1.: expected from 0 to below 1"),
                       (Counting(alpha=-1.0), "alpha=-1.0.: expected 0.5 or more"),
                       (Counting(weight_decay=-0.1), "weight_decay=-0.1.: expected 0 or more"),
                       (Counting(one=0), "one=0.: expected 1 or more"),
                       (Counting(back=-1), "back=-1")):
        with pytest.raises(RecipeError, match=says):
            burnish.parse(made)
    for right in ({"many": 0}, {"one": 1}, {"seed": -1}, {"last": -2}, {"free": -1.0},
                  {"weight_decay": 0.0}, {"size": None}, {"size": 0.0}, {"part": 0.51},
                  {"betas": (0.0, 0.999)}, {"momentum": 0.0}, {"alpha": 0.5}, {"scale": -1.0},
                  {"below": -3.0}):
        assert burnish.parse(Counting(**right))


def test_a_run_repeats_itself():
    """What the comparison stands on: without a change nothing differs."""
    assert not training.differ("mlp", "lora(dropout=0.3)", "lora(dropout=0.3)  ")


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    """A method that refuses nothing itself."""

    many: int = setting(3, "how many")
    one: int = setting(3, "how many, one at least", least=1)
    back: int | None = setting(None, "how many, or as many as there are", other=(2,))
    last: int | None = setting(None, "which one, -1 the last", other=(0, -1))
    seed: int = setting(0, "of what is drawn")
    weight_decay: float = setting(0.0, "of the weights")
    free: float = setting(1.0, "how much", signed=True)
    size: float | None = setting(1.0, "how much of it", other=(2.0,))
    part: float = setting(1.0, "how much", above=0.5)
    below: float = setting(-1.0, "how much")
    scale: float = setting(1.0, "a factor")
    alpha: float = setting(1.0, "a factor that has a bound", least=0.5)
    momentum: float = setting(0.5, "of an earlier step")
    betas: tuple[float, float] = setting((0.5, 0.5), "of earlier steps")


# -- methods whose settings are wrong in one way each ----------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    """A low-rank update with one setting that acts."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    scale: float = setting(1.0, "numerator")

    def delta(self, site):
        return Chain(site.place, 2, self.scale)


def toy(**given) -> str:
    """That one, with other settings beside it or in its place: name -> (type, setting)."""
    cls = type("Toy", (Plain,), {"__module__": __name__,
                                 "__annotations__": {k: t for k, (t, _) in given.items()},
                                 **{k: v for k, (_, v) in given.items()}})
    return register(dataclass(frozen=True, kw_only=True)(cls), "toy_settings").name


def test_a_setting_that_does_nothing_is_named(monkeypatch):              # findings 3.5
    monkeypatch.setattr(settings.choose, "models_for", lambda name, all: ("mlp",))
    name = toy(idle=("float", setting(1.0, "of nothing")))
    with pytest.raises(AssertionError, match="idle does the same whatever is given"):
        every_setting_acts(name, "mlp")


def test_a_type_that_tells_no_value_asks_for_one():
    name = toy(word=("str", setting("plain", "of nothing")))
    with pytest.raises(AssertionError, match="word: no other value was accepted; .*other="):
        every_setting_acts(name, "mlp")


def test_what_is_called_unseen_and_is_seen_is_named():
    name = toy(scale=("float", setting(1.0, "numerator", unseen="no run: tests/x.py")))
    with pytest.raises(AssertionError, match="scale acts, although it is called unseen"):
        every_setting_acts(name, "mlp")


def test_a_setting_is_shown_beside_what_it_needs():
    """Of two settings the second acts where the first is set."""
    @dataclass(frozen=True, kw_only=True)
    class Gated(Plain):
        on: bool = setting(False, "take `gain`")
        gain: float = setting(1.0, "a factor", beside={"on": True, "gain": 3.0})

        def delta(self, site):
            return Chain(site.place, 2, self.scale * (self.gain if self.on else 2.0))

    register(Gated, "toy_gated")
    assert every_setting_acts("toy_gated", "mlp") is None


def test_a_fact_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="besides"):
        setting(1.0, "a misspelt fact", besides={})


def test_no_setting_is_required():
    """A bare name is a recipe."""
    assert not [(m, f.name) for m, f in SETTINGS if f.default is MISSING]
