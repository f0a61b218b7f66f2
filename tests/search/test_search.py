"""Spaces of recipes, trials that go on where they stopped, fronts, and the command."""

from __future__ import annotations

import json
import random
import statistics

import pytest

import burnish
from burnish.core.errors import BurnishError, ConfigError, RecipeError
from burnish.search import Front, Score, Space, Trial, search
from burnish.testing.models import tiny

SPACE = "houlsby(bottleneck=0|1|3|6|12) + prefix(length=0|1|3|6|12) + lora(rank=0|1|2|4|8)"


# -- spaces ----------------------------------------------------------------------------------------
def test_a_choice_of_nothing_takes_the_part_out():
    space = Space.of(f"{SPACE} + lean")
    assert space.size == 125 and list(space.choices) == ["1.houlsby.bottleneck", "2.prefix.length",
                                                         "3.lora.rank"]
    made = space.recipe({"1.houlsby.bottleneck": 3, "2.prefix.length": 0, "3.lora.rank": 2})
    assert made == "houlsby(bottleneck=3) + lora(rank=2) + lean"
    assert space.recipe(dict.fromkeys(space.choices, 0)) == "lean"
    assert Space.of("lora(rank=0|4)").recipe({"1.lora.rank": 0}) is None
    assert len(list(space.all())) == 125


def test_values_are_of_every_kind():
    space = Space.of("lora(rank=4, targets='q,v'|'linear', train_a=True|False, dropout=0.0|0.1)")
    some = next(v for v in space.all() if v["1.lora.targets"] == "linear")
    assert space.recipe({**some, "1.lora.train_a": False, "1.lora.dropout": 0.1}) == \
        "lora(rank=4, targets='linear', train_a=False, dropout=0.1)"
    assert space.recipe({**some, "1.lora.dropout": 0.0, "1.lora.train_a": True}) == \
        "lora(rank=4, targets='linear', train_a=True, dropout=0.0)"      # no width, so a value


@pytest.mark.parametrize("text, words", [
    ("lora(rank=4)", "nothing to choose"), ("lora(rank=4|4)", "stands there twice"),
    ("lora(rnak=4|8)", "rnak"), ("lroa(rank=4|8)", "lroa"), ("lora(rank=4|'x')", "expected int"),
    ("lora(rank=4|8", "cannot read"), ("lora(4|8)", "cannot read"), ("lora | dora", "cannot read"),
    ("lora(rank=x|y)", "with bars between"), ("qlora(rank=4|8)", "preset"),
    ("lora(rank=4|8, rank=2)", "twice"), ("", "cannot read")])
def test_spaces_that_cannot_be_read(text, words):
    with pytest.raises(RecipeError, match=words) as e:
        Space.of(text)
    assert "\n" not in str(e.value)


def test_parts_that_cannot_stand_together_are_no_recipe():
    space = Space.of("dora(rank=0|4) + dora(rank=0|2)")
    assert "cannot be joined" in (space.buildable({"1.dora.rank": 4, "2.dora.rank": 2}) or "")
    assert space.buildable({"1.dora.rank": 4, "2.dora.rank": 0}) is None


# -- layers ----------------------------------------------------------------------------------------
WIDTHS = "|".join(str(768 // 2**k) for k in range(9)) + "|1|0"


@pytest.mark.parametrize("layers, ways", [(12, 5_451_776), (24, 11**3 * 2**24)])
def test_a_space_of_bits_is_as_large_as_the_paper_says(layers, ways):
    space = Space.of(f"houlsby(bottleneck={WIDTHS}, targets='linear') + "
                     f"parallel(bottleneck={WIDTHS}, targets='linear') + "
                     f"lora(rank={WIDTHS})", layers)
    assert space.size == ways


def test_a_layer_that_is_off_is_left_out_of_every_part():
    space = Space.of("lora(rank=2|4, targets='q, v') + "
                     "houlsby(bottleneck=0|3, targets='linear') + lean", 3)
    assert list(space.choices)[-3:] == ["layer.0", "layer.1", "layer.2"]

    def of(rank, width, *on):
        return space.recipe({"1.lora.rank": rank, "2.houlsby.bottleneck": width,
                             **{f"layer.{i}": i in on for i in range(3)}})

    assert of(2, 3, 0, 2) == ("lora(targets='q@0,q@2,v@0,v@2', rank=2) + "
                              "houlsby(targets='linear@0,linear@2', bottleneck=3) + lean")
    assert of(4, 0, 1) == "lora(targets='q@1,v@1', rank=4) + lean"
    assert of(4, 0, 0, 1, 2) == "lora(targets='q, v', rank=4) + lean"
    assert of(4, 3) == "lean"


@pytest.mark.parametrize("part", ["lora(rank=2|3)", "houlsby(bottleneck=2, targets='linear')",
                                  "ia3(targets='k,v,fc2')", "lora(rank=2|3, targets='mlp')",
                                  "parallel(bottleneck=2, targets='linear')"])
@pytest.mark.parametrize("on", [0, 1])
def test_what_is_left_out_trains_nothing(part, on):
    space = Space.of(part, 2)
    values = {k: v[0] for k, v in space.choices.items()} | {f"layer.{1 - on}": False}
    tuned = burnish.tune(tiny("bert")[0], space.recipe(values), head=False)
    where = {n.split("layer.")[1][0] for n, _ in tuned.named_parameters() if ".burnish." in n}
    assert where == {str(on)}
    whole = burnish.tune(tiny("bert")[0], space.recipe(values | {f"layer.{1 - on}": True}),
                         head=False)
    added = [sum(p.numel() for n, p in t.named_parameters() if ".burnish." in n)
             for t in (tuned, whole)]
    assert 2 * added[0] == added[1]


@pytest.mark.parametrize("text, layers, words", [
    ("lora(rank=2|4)", 1, "2 or more"), ("lean(on=True|False)", 2, "no part stands in a layer"),
    ("lora(rank=2|4) + prefix(length=2|3)", 2, "prefix stands in the model as a whole"),
    ("ia3", 2, "has places of its own"), ("lora(rank=2|4, targets='q@0')", 2, "plain words"),
    ("lora(rank=2, targets='q'|'linear,-o')", 2, "plain words")])
def test_layers_that_cannot_be_chosen(text, layers, words):
    with pytest.raises(RecipeError, match=words):
        Space.of(text, layers)


def test_the_model_says_how_many_layers_there_are(tmp_path):
    from burnish.cli.searching import check_layers

    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    check_layers(str(tmp_path), 4)
    check_layers(str(tmp_path), 0)
    check_layers("owner/name", 3)
    with pytest.raises(ConfigError, match="--layers 5: .* has 4 blocks"):
        check_layers(str(tmp_path), 5)


def test_a_search_over_layers_goes_on_as_one_that_was_not_stopped(tmp_path):
    space = Space.of("lora(rank=1|2|4)", 4)

    def score(recipe, number=0):
        (part,) = burnish.parse(recipe)
        on = 4 if part.targets is None else part.targets.count("@")
        return Score(-abs(on - 2) - abs(part.rank - 2), part.rank * on, 1)

    whole = search(space, score, tmp_path / "whole", trials=12, first=4)
    search(space, score, tmp_path / "parts", trials=7, first=4)
    parts = search(space, score, tmp_path / "parts", trials=12, first=4)
    assert [t.recipe for t in whole.trials] == [t.recipe for t in parts.trials]
    with pytest.raises(ConfigError, match="another space"):
        search(Space.of("lora(rank=1|2|4)"), score, tmp_path / "parts", trials=13)


# -- trials ----------------------------------------------------------------------------------------
def toy(recipe: str, number: int = 0) -> Score:
    """Two measures that pull apart: wider is better up to a point, and larger."""
    parts = {m.name: m for m in burnish.parse(recipe)}
    widths = [getattr(parts.get("houlsby"), "bottleneck", 0),
              getattr(parts.get("prefix"), "length", 0), getattr(parts.get("lora"), "rank", 0)]
    figure = 1 - sum((w - best)**2 for w, best in zip(widths, (6, 1, 4), strict=True)) / 200
    return Score(figure, sum(w * c for w, c in zip(widths, (64, 16, 128), strict=True)), 1)


def area(front: Front) -> float:
    """What the front covers of figure x peak, from no figure and the largest peak."""
    found, last = 0.0, 2600.0
    for t in sorted(front.best, key=lambda t: -t.score.figure):
        if t.score.peak < last:
            found += (last - t.score.peak) * max(0.0, t.score.figure)
            last = t.score.peak
    return found


def test_a_front_has_what_no_other_beats():
    space = Space.of("lora(rank=1|2|3|4)")

    def trial(n, figure, peak):
        return Trial(n, f"lora(rank={n})", Score(figure, peak, 1))

    front = Front(space, ("figure", "peak"), [
        trial(1, 0.5, 10), trial(2, 0.6, 20), trial(3, 0.55, 30), trial(4, 0.5, 10),
        Trial(5, "lora(rank=5)", failed="no")])
    assert [t.number for t in front.best] == [2, 1, 4]
    assert [t.number for t in Front(space, ("figure",), front.trials).best] == [2]


def test_a_search_finds_more_than_chance_does(tmp_path):
    """Hypervolume at equal budget, median of ten seeds."""
    space, found = Space.of(SPACE), {True: [], False: []}
    for seed in range(10):
        for blind in (True, False):
            front = search(space, toy, tmp_path / f"{seed}-{blind}", trials=30, first=10,
                           seed=seed, random=blind)
            found[blind].append(area(front))
    assert statistics.median(found[False]) > statistics.median(found[True])


def test_a_stopped_search_goes_on_as_one_that_was_not(tmp_path):
    space = Space.of(SPACE)
    whole = search(space, toy, tmp_path / "whole", trials=12, seed=3)

    def stops(recipe, number):
        if number >= 7:                          # the first of these that was not tried before
            raise KeyboardInterrupt
        return toy(recipe)

    with pytest.raises(KeyboardInterrupt):
        search(space, stops, tmp_path / "part", trials=12, seed=3)
    asked = []
    again = search(space, lambda r, n: asked.append(r) or toy(r), tmp_path / "part", trials=12,
                   seed=3, first=4)
    assert [t.recipe for t in again.trials] == [t.recipe for t in whole.trials]
    assert [t.score for t in again.trials] == [t.score for t in whole.trials]
    assert asked and asked[0] in {t.recipe for t in whole.trials[7:]}
    ended = search(space, lambda r, n: pytest.fail("it ran again"), tmp_path / "part", trials=12)
    assert len(ended.trials) == 12


def test_a_recipe_is_run_once_and_a_small_space_comes_to_its_end(tmp_path):
    ran = []

    def score(recipe, number):
        ran.append(recipe)
        return toy(recipe)

    front = search(Space.of("lora(rank=1|2|4)"), score, tmp_path, trials=200)
    assert sorted(ran) == [f"lora(rank={n})" for n in (1, 2, 4)]
    assert {t.recipe for t in front.trials} == set(ran) and len(front.trials) < 200


def test_failures_are_told_and_wrong_questions_end_it(tmp_path):
    space = Space.of("dora(rank=0|2|4) + dora(rank=0|1)")

    def score(recipe, number):
        if "rank=1" in recipe:
            raise BurnishError("it went wrong")
        return Score(0.5, 1, 1)

    front = search(space, score, tmp_path / "a", trials=60, seed=1)
    told = {t.failed for t in front.trials}
    assert "it went wrong" in told and "no part is left" in told
    assert any("cannot be joined" in t for t in told)
    assert {t.recipe for t in front.best} == {"dora(rank=2)", "dora(rank=4)"}

    def wrong(recipe, number):
        raise ConfigError("no rows to validate on")

    with pytest.raises(ConfigError, match="no rows to validate"):
        search(space, wrong, tmp_path / "b", trials=5)
    with pytest.raises(ConfigError, match="another space"):
        search(Space.of("lora(rank=1|2)"), score, tmp_path / "a")
    with pytest.raises(ConfigError, match="another space or for other objectives"):
        search(space, score, tmp_path / "a", objectives=("figure",))
    for how, words in (({"objectives": ("speed",)}, "'speed'"), ({"objectives": ()}, "one or more"),
                       ({"trials": 0}, "at least 1")):
        with pytest.raises(ConfigError, match=words):
            search(space, score, tmp_path / "c", **how)


# -- the command -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_command_ends_in_recipes_and_what_to_type(tmp_path, capsys):
    from burnish.cli import main
    from burnish.testing.models import tiny

    random.seed(0)
    tiny("vit", num_labels=10, num_channels=1)[0].save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16},
        "image_mean": [0.5], "image_std": [0.5]}))
    words = ["search", "lora(rank=0|2|4) + checkpoint(every=0|1)", "--model",
             str(tmp_path / "base"), "--data", "digits", "--output", str(tmp_path / "out"),
             "--max-steps", "2", "--batch-size", "16"]
    assert main([*words, "--trials", "3", "--picture", str(tmp_path / "front.svg"), "--json"]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert len(told["trials"]) == 3 and told["best"]
    assert told["best"][0]["recipe"] in told["command"] and "3 of 3" in shown.err
    assert "<svg" in (tmp_path / "front.svg").read_text()
    assert main([*words, "--trials", "3"]) == 0                     # nothing runs again
    assert "no recipe tried beats these in figure and peak" in capsys.readouterr().out
    for more, said in ((["--recipe", "lora"], "is what is searched"),
                       (["--picture", "x.png"], "ends in .svg"),
                       (["--objectives", "speed"], "'speed'")):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert main([*words[:-4], "--max-steps", "1", "--memory", "10KB", "--output",
                 str(tmp_path / "none"), "--trials", "2"]) == 1
    assert "no trial of 2 has come to a figure" in capsys.readouterr().err
