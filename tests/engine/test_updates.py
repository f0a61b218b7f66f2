"""What an adapter adds to each weight, against what merging writes."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.engine.updates import updates
from burnish.fit import figures
from burnish.fit.report import change
from burnish.testing.models import tiny


def moved(tuned, size=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(size * torch.randn_like(p))
    return tuned


RECIPES = {
    "llama": ["lora(rank=2)", "dora(rank=2, targets='q')", "hra(rank=4, targets='q,down')",
              "lokr(rank=2)", "oft(block=8)", "snella(rank=4, targets='q')", "pissa(rank=3)",
              "lora(rank=2, targets='q') + svfit(rank=3, targets='q')", "full(targets='down')",
              "trainable_tokens(ids=(3, 5))", "hra(rank=2, targets='q') + lora(targets='q')"],
    "gpt2": ["lora(rank=2, targets='q,v')", "full(targets='c_attn')", "hra(rank=4)"],
    "vit": ["lora(rank=2, targets='conv')", "full(targets='conv')"],
    "mixtral": ["lora(rank=2, targets='experts')"],
}


@pytest.mark.parametrize("model, recipe", [(m, r) for m, rs in RECIPES.items() for r in rs])
def test_the_update_is_what_a_merge_writes(model, recipe):
    net, _ = tiny(model)
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    tuned = moved(burnish.tune(net, recipe, head=False))
    found = list(updates(tuned))
    assert found and len({u.name for u in found}) == len(found)
    places = {p.name: p for q in tuned.anatomy.places for p in (q, *tuned.anatomy.slices(q))}
    seen = {u.name: (u.delta(), u.base().clone(), u.pair(), u.values(), u.shape) for u in found}
    merged = dict(tuned.merge().named_parameters())
    for name, (delta, W, pair, s, shape) in seen.items():
        place = places[name]
        full = f"{place.path}.{place.param}"
        want = place.view(merged[full]) - place.view(base[full])
        assert torch.equal(W, place.view(base[full])) and delta.shape == want.shape == shape
        torch.testing.assert_close(delta, want, rtol=1e-4, atol=2e-6)
        if pair is not None:
            torch.testing.assert_close(pair[1] @ pair[0], delta, rtol=1e-4, atol=2e-6)
        if len(shape) > 2:
            assert s is None
            continue
        all_ = torch.linalg.svdvals(want)
        torch.testing.assert_close(s, all_[: len(s)], rtol=1e-3, atol=1e-5)
        assert float(all_[len(s):].sum()) < 1e-3


@pytest.mark.parametrize("recipe, share", [
    *((r, s) for r in ("rtn(bits=4, group=8) + soka(rank=3)", "nf4 + pissa(rank=3)",
                       "rtn(bits=3, group=8) + loftq(rank=3)") for s in (1.0, 0.25)),
    ("nf4 + pissa(rank=3) + oft(block=8)", 1.0)])
def test_a_start_that_a_storage_has_absorbed_is_no_update(recipe, share):
    net, _ = tiny("llama")
    tuned = burnish.tune(net, recipe, targets="q", head=False)
    if "oft" not in recipe and "loftq" not in recipe:
        assert not any(u.delta().any() for u in updates(tuned))
    moved(tuned)
    if share != 1:
        tuned.use({next(iter(tuned.adapters)): share})
    for u in updates(tuned):
        layer = net.get_submodule(u.name.removesuffix(".weight"))
        unit = torch.eye(u.shape[1])
        with torch.no_grad():
            on = layer(unit).t()
            with tuned.disabled():
                off = layer(unit).t()
        torch.testing.assert_close(u.base(), off, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(u.delta(), on - off, rtol=1e-4, atol=2e-6)
        if (pair := u.pair()) is not None:
            torch.testing.assert_close(pair[1] @ pair[0], on - off, rtol=1e-4, atol=2e-6)


def test_what_costs_too_much_is_not_decomposed():
    tuned = moved(burnish.tune(tiny("llama")[0], "lokr(rank=2, targets='q') + lora(targets='v')"))
    by = {u.name.rpartition("self_attn.")[2]: u for u in updates(tuned)}
    q, v = by["q_proj.weight"], by["v_proj.weight"]
    assert q.values(32**3 - 1) is None and q.values(32**3) is not None
    assert v.pair() is not None and v.values(0) is not None


def test_only_what_is_active_counts_at_its_weight():
    tuned = moved(burnish.tune(tiny("llama")[0], "lora(rank=2, targets='q')", name="one"))
    whole = next(updates(tuned)).delta()
    tuned.add("two", "lora(rank=2, targets='v')")
    tuned.use({"one": 0.5})
    (u, *rest) = updates(tuned)
    assert len(rest) == 1 and torch.allclose(u.delta(), 0.5 * whole)
    A, B = u.pair()
    torch.testing.assert_close(B @ A, 0.5 * whole, rtol=1e-5, atol=1e-6)


def test_the_report_tells_ranks_and_draws_spectra():
    tuned = moved(burnish.tune(tiny("llama")[0], "lora(rank=4, targets='q') + snella(targets='v')"))
    told = change(tuned)
    q = told["model.layers.0.self_attn.q_proj.weight"]
    assert len(q["values"]) == 4 and 1 < q["effective_rank"] <= 4 and q["stable_rank"] <= 4
    assert len(told["model.layers.0.self_attn.v_proj.weight"]["values"]) > 4
    drawn = figures.spectra(told)
    assert drawn.startswith("<svg") and drawn.count("<path") > 8
    assert figures.spectra({}) == "" == figures.spectra({"a": {"change": 0.1, "nonzero": 1.0}})
    assert figures.intruders([], 0.5) == ""
    assert figures.intruders([(0.1, 0), (0.5, 3)], 0.5).startswith("<svg")
