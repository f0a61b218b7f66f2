"""Updates of several batches: from the second on the gradients of those before them are there."""

from __future__ import annotations

import pytest
from torch.utils.data import default_collate

import burnish
from burnish.core.errors import BurnishError, ConfigError
from burnish.memory import Ledger, MemoryReport
from burnish.memory.cache import Reports
from burnish.memory.search import Search
from burnish.memory.simulate import watch_originals
from burnish.testing import tiny

IN_BACKWARD = "full + galore(rank=4, in_backward=True)"
RECIPES = ["full", "full + checkpoint", "lora(rank=4)", "nf4 + lora", "full + galore(rank=4)",
           IN_BACKWARD, "snella(rank=4)", "houlsby + adam8bit"]


def plain_loop(name: str, recipe: str, times: int) -> int:
    """The peak of the second update of anybody's loop."""
    model, batch = tiny(name)
    tuned = burnish.tune(model, recipe, calibration=[batch])
    opt = tuned.optimizer(1e-3, accumulation=times)
    ledger, since = Ledger(tuned.model), 0
    ledger.watch("activations", batch)
    with ledger:
        watch_originals(tuned, ledger)
        for _ in range(2):
            since = ledger.now + 1
            for _ in range(times):
                tuned.backward(batch, scale=1 / times)
            opt.step()
            opt.zero_grad()
    return MemoryReport.of(ledger, since=since).peak_bytes


@pytest.mark.parametrize("name", ["vit", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_promise_is_what_a_plain_loop_takes(name, recipe):
    model, batch = tiny(name)
    promise = burnish.simulate(model, recipe, batch, accumulation=3)
    assert promise.peak_bytes == plain_loop(name, recipe, 3)
    assert promise.accumulation == 3 and ", 3 to an update" in str(promise)


@pytest.mark.parametrize("recipe", ["full", IN_BACKWARD, "lora(rank=4)"])
def test_more_batches_take_no_more_and_the_measure_is_the_promise(recipe):
    model, batch = tiny("vit")
    one, *more = [burnish.simulate(model, recipe, batch, accumulation=n, count=True)
                  for n in (1, 3, 4, 16)]
    assert len({r.peak_bytes for r in more}) == 1 and more[0].peak_bytes > one.peak_bytes
    assert more[0].flops == one.flops                    # of one batch and the update
    tuned = burnish.tune(model, recipe)
    tuned.optimizer(1e-3, accumulation=4)
    real = burnish.measure(tuned, batch, accumulation=4)
    assert (real.peak_bytes, real.accumulation) == (more[0].peak_bytes, 4)


def test_whole_gradients_wait_beside_the_activations():
    """Without accumulation the last gradients come when the activations are gone."""
    model, batch = tiny("vit")
    size = 4 * sum(p.numel() for p in model.parameters())
    once, twice = [burnish.simulate(model, "full + sgd", batch, accumulation=n) for n in (1, 2)]
    assert 0.5 * size < twice.peak_bytes - once.peak_bytes <= size
    assert twice.by_category["gradients"] >= size


@pytest.mark.parametrize("recipe", ["full + mezo", "full + step_in_backward"])
def test_who_cannot_add_up_says_so(recipe):
    model, batch = tiny("vit")
    with pytest.raises(BurnishError, match="accumulation 1|accumulat"):
        burnish.simulate(model, recipe, batch, accumulation=2)
    with pytest.raises(ConfigError, match="accumulation=0"):
        burnish.simulate(model, "lora", batch, accumulation=0)


def batch_of(samples: int):
    return default_collate([{k: v[0] for k, v in tiny("vit")[1].items()}] * samples)


@pytest.mark.parametrize("recipe", ["full", "lora(rank=4)"])
def test_a_plan_that_halves_the_batch_promises_the_whole_update(recipe):
    model = tiny("vit")[0]
    whole = burnish.simulate(model, recipe, batch_of(8)).peak_bytes
    (found,) = burnish.plan(model, memory=int(0.8 * whole), batch=batch_of(8),
                            candidates=[recipe], workers=1).fits
    assert found.batch < 8 and found.accumulate * found.batch >= 8
    assert found.peak_bytes == burnish.simulate(model, recipe, batch_of(found.batch),
                                                accumulation=found.accumulate).peak_bytes
    assert found.report.accumulation == found.accumulate
    (twice,) = burnish.plan(model, memory="1GB", batch=batch_of(4), accumulation=3,
                            candidates=[recipe], workers=1).fits
    assert (twice.batch, twice.accumulate) == (4, 3)


def test_a_plan_does_not_divide_what_cannot_add_up():
    model = tiny("vit")[0]
    need = burnish.simulate(model, "full + mezo", batch_of(8)).peak_bytes
    plans = burnish.plan(model, memory=need - 1, batch=batch_of(8), workers=1,
                         candidates=["full + mezo"])
    assert not plans.fits and plans.over[0].batch == 8


def test_kept_reports_know_whether_gradients_waited(tmp_path):
    model, kept = tiny("vit")[0], Reports("about", tmp_path)

    def search(samples, accumulation=1):
        return Search(model, 10**9, samples, batch_of, "cpu", {}, kept, accumulation)

    once, twice = search(4).report("full", 4), search(8).report("full", 4)
    thrice = search(4, 3).report("full", 4)
    assert [r.accumulation for r in (once, twice, thrice)] == [1, 2, 3]
    assert once.peak_bytes < twice.peak_bytes == thrice.peak_bytes
    assert len(list(tmp_path.iterdir())) == 2
