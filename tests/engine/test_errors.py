"""Every refusal: its class, its exit code, one line, the nearest right spelling."""

from __future__ import annotations

import pytest
from torch import nn

import burnish
from burnish.core import errors, registry
from burnish.core.recipe import parse
from burnish.testing.models import tiny


def test_exit_codes():
    """As the command line promises: 1 failed, 2 wrong call, 3 no plan, 4 a check, 5 memory."""
    codes = {n: getattr(errors, n).exit_code for n in dir(errors)
             if isinstance(getattr(errors, n), type)
             and issubclass(getattr(errors, n), errors.BurnishError)}
    assert codes == {"BurnishError": 1, "ConfigError": 2, "RecipeError": 2, "TargetError": 2,
                     "RankError": 2, "DataError": 2, "FormatError": 2, "NoPlanError": 3,
                     "CheckError": 4, "MemoryExceeded": 5}


def test_usual_exceptions_catch_them():
    assert issubclass(burnish.ConfigError, ValueError)
    assert issubclass(burnish.MemoryExceeded, MemoryError)


@pytest.mark.parametrize("word, known, said", [
    ("lroa", ["lora", "dora"], "'lora'"), ("Lora", ["lora"], "'lora'"), ("qqq", ["lora"], ""),
])
def test_nearest(word, known, said):
    got = errors.nearest(word, known)
    assert (said in got and "did you mean" in got) if said else got == ""


APART = [n for n in registry.names(extra=False) if registry.find(n).apart()]


@pytest.mark.parametrize("name", APART)
def test_what_acts_on_models_is_no_part_of_a_recipe_for_one(name):
    """It was accepted and did nothing: ``lora + tpt`` answered without a test-time step."""
    for recipe in (f"lora(rank=2) + {name}", f"{name} + checkpoint"):
        with pytest.raises(burnish.RecipeError, match=f"{name} is no part of a model.*works: "):
            parse(recipe)
    model = tiny("vit")[0]
    parse(name)                                          # by itself it is called
    for act in (burnish.tune, burnish.simulate):
        with pytest.raises(burnish.RecipeError, match=f"{name} is no part of a model"):
            act(model, name, *([tiny("vit")[1]] if act is burnish.simulate else []))


def test_they_stand_beside_one_another():
    assert len(parse("dare + ties")) == 2


@pytest.mark.parametrize("text, words", [
    ("lroa(rank=4)", ["lroa", "'lora'"]),
    ("lora(rnak=4)", ["lora", "rnak", "'rank'"]),
    ("lora(rank=4.5)", ["rank=4.5", "expected int"]),
    ("lora(rank=True)", ["rank=True", "expected int, got bool"]),
    ("lora(train_a=1)", ["train_a", "expected bool"]),
    ("lora(scaling='rslora')", ["scaling", "'lora'", "'rs'"]),
    ("lora(rank=x)", ["rank", "expected a number", "x"]),
    ("lora(8)", ["by name", "lora(rank=8)"]),
    ("lora - dora", ["'+'"]),
    ("lora(rank=4", ["cannot read", "expected"]),
    ("lora.rank", ["cannot read"]),
    ("lora() + 3", ["cannot read"]),
    ("qlora(rank=4)", ["preset", "nf4 + lora"]),
    ("dora + dora(rank=4)", ["dora", "cannot be joined", "nearest recipe that works"]),
    ("lora + checkpoint + checkpoint(every=2)", ["checkpoint", "mode of the blocks"]),
])
def test_recipes_that_cannot_be_read(text, words):
    with pytest.raises(burnish.RecipeError) as e:
        parse(text)
    said = str(e.value)
    assert all(w in said for w in words), said
    assert "\n" not in said


@pytest.mark.parametrize("method", registry.names(extra=False))
def test_every_method_names_the_nearest_setting(method):
    settings = [f for f in registry.find(method)().settings() if len(f) > 3]
    for name in settings:
        wrong = name[:-2] + name[-1] + name[-2] if name[-1] != name[-2] else name + "x"
        with pytest.raises(burnish.RecipeError, match=f"{method} has no setting.*did you mean"):
            parse(f"{method}({wrong}=1)")


@pytest.mark.parametrize("target, words", [
    ("q_prj", ["q_prj", "q_proj"]), ("", ["empty"]), ("q,-q", ["nothing"]),
    (["q", 3], ["3"]), ("q@9", ["9"]), ("re:(", ["re:("]),
])
def test_targets_that_match_nothing(target, words):
    net, _ = tiny("llama")
    with pytest.raises(burnish.TargetError) as e:
        burnish.tune(net, "lora(rank=2)", targets=target)
    assert all(w in str(e.value) for w in words), str(e.value)
    assert "\n" not in str(e.value)
    assert not any("burnish" in n for n, _ in net.named_modules())


def test_a_kind_without_a_form_is_named():
    net, _ = tiny("llama", tie_word_embeddings=False)
    with pytest.raises(burnish.TargetError, match="oft has no form for model.embed_tokens.weight"):
        burnish.tune(net, "oft(block=4)", targets="embed_tokens")


@pytest.mark.parametrize("recipe, words", [
    ("full(targets='q') + nf4", ["full", "nf4"]),
    ("checkpoint + lora(rank=2)", ["checkpoint", "block"]),
    ("bitfit", ["bias"]), ("norms", ["norm"]), ("linear_probe", ["head"]),
])
def test_methods_without_a_place_in_a_model_say_why(recipe, words):
    net = tiny("llama", hidden_size=64)[0] if "nf4" in recipe else \
        nn.Sequential(nn.Linear(8, 8, bias=False))
    if recipe == "linear_probe":
        net = nn.ModuleList([nn.Conv1d(4, 4, 3)])
    with pytest.raises(burnish.RecipeError) as e:
        burnish.tune(net, recipe)
    assert all(w in str(e.value) for w in words), str(e.value)
