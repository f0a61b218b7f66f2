"""Keys and values for the next token are not kept in a training step, which reads none."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.caches import without_cache
from burnish.testing.models import NAMES, tiny


def configs(model):
    return {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None
            and hasattr(c, "use_cache")}


@pytest.mark.parametrize("recipe", ["lora(rank=2) + lean(level=3)", "lora(rank=2) + mezo"])
@pytest.mark.parametrize("name", [n for n in NAMES if any(
    c.use_cache is not None for c in configs(tiny(n)[0]).values())])
def test_a_step_takes_as_much_whether_a_cache_is_wanted_or_not(name, recipe):
    model, batch = tiny(name)
    peaks = []
    for wanted in (True, False):
        for c in configs(model).values():
            c.use_cache = wanted
        peaks.append(burnish.simulate(model, recipe, batch).peak_bytes)
        assert all(c.use_cache is wanted for c in configs(model).values())
    assert peaks[0] == peaks[1]


def test_an_evaluation_inside_a_step_keeps_none_and_a_call_outside_does():
    model, batch = tiny("llama")
    model.config.use_cache = True
    seen = []
    tuned = burnish.tune(model, "lora(rank=2) + mezo")

    def loss(out, batch):
        seen.append(out.past_key_values)
        return out.loss

    tuned.step(batch, loss=loss)
    assert seen and all(s is None for s in seen)
    assert model.eval()(**batch).past_key_values is not None


def test_who_asks_for_a_cache_gets_it():
    model, batch = tiny("llama")
    model.config.use_cache = True
    tuned, seen = burnish.tune(model, "lora(rank=2)"), []

    def loss(out, batch):
        seen.append(out.past_key_values)
        return out.loss

    tuned.step({**batch, "use_cache": True}, loss=loss)
    assert seen[0] is not None


def test_the_config_is_as_it_was_after_a_step_that_fails():
    model, batch = tiny("llama")
    model.config.use_cache = True
    tuned = burnish.tune(model, "lora(rank=2)")

    def breaks(out, batch):
        raise RuntimeError("somebody's own")

    with pytest.raises(RuntimeError, match="own"):
        tuned.step(batch, loss=breaks)
    assert model.config.use_cache is True


def test_models_without_configs_pass():
    with without_cache(torch.nn.Linear(2, 2)):
        pass
