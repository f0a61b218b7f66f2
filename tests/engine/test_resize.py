"""Ranks that change while training: tensors, moments and files go together."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.weight.triplets import Triplets
from burnish.core.errors import ConfigError, RecipeError
from burnish.testing.models import tiny


def trained(recipe="adalora(rank=3, init_rank=4)", steps=3):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, recipe)
    tuned.optimizer(lr=1e-2)
    for _ in range(steps):
        tuned.step(batch)
    return net, batch, tuned


def test_moments_and_gradients_are_cut_with_their_tensor():
    net, batch, tuned = trained()
    opt = tuned.current_optimizer
    keep = torch.tensor([3, 1])
    for _, term in tuned.terms(Triplets):
        before = {n: (getattr(term, n), getattr(term, n).detach().clone(),
                      opt.state[getattr(term, n)]["exp_avg"].clone()) for n in "PEQ"}
        tuned.resize(term, keep=keep)
        for n, dim in term.ranked.items():
            p, value, moment = before[n]
            assert getattr(term, n) is p, "the same parameter, in the same group"
            assert torch.equal(p, value.index_select(dim, keep))
            assert torch.equal(opt.state[p]["exp_avg"], moment.index_select(dim, keep))
            assert p.grad is None or p.grad.shape == p.shape
    held = {id(p) for g in opt.param_groups for p in g["params"]}
    assert held == {id(p) for p in tuned.parameters()}


def test_fresh_components_start_with_no_moments():
    net, batch, tuned = trained()
    name, term = next(iter(tuned.terms(Triplets)))
    out, inp = term.P.shape[0], term.Q.shape[1]
    tuned.resize(term, fresh={"P": torch.ones(out, 2), "E": torch.zeros(2),
                              "Q": torch.full((2, inp), 3.0)})
    assert term.P.shape == (out, 6) and (term.P[:, 4:] == 1).all() and (term.Q[4:] == 3).all()
    state = tuned.current_optimizer.state[term.P]
    assert state["exp_avg"][:, :4].any() and not state["exp_avg"][:, 4:].any()
    assert tuned.adapters["default"].settled["adalora"][name] == {"rank": 6}


@pytest.mark.parametrize("extra", ["", " + lion", " + step_in_backward", " + checkpoint"])
def test_cutting_what_has_no_effect_changes_no_further_step(extra):
    """A component with E = 0 and no momentum, gone or held at zero: the rest trains alike."""
    runs = []
    for gone in (True, False):
        net, batch = tiny("llama")
        tuned = burnish.tune(net, "lora(rank=4)" + extra, seed=1)
        tuned.optimizer(lr=1e-3)
        from burnish.blocks.weight.factor import Chain
        Chain.ranked = {"A": 0, "B": 1}
        try:
            with torch.no_grad():
                for _, t in tuned.terms(Chain):
                    t.A[3], t.B[:, 3] = 0, 0
            if gone:
                for _, t in tuned.terms(Chain):
                    t.settled = lambda: {}
                    tuned.resize(t, keep=torch.arange(3))
            for _ in range(3):
                tuned.step(batch)
            runs.append([t.B[:, :3] @ t.A[:3] for _, t in tuned.terms(Chain)])
        finally:
            del Chain.ranked
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_coded_states_are_refused_when_the_recipe_is_read():
    for optimizer in ("adam8bit", "adam4bit", "galore(rank=4)"):
        with pytest.raises(RecipeError, match="cannot be joined.*own shape"):
            burnish.parse(f"adalora + {optimizer}")


def test_a_term_without_a_rank_axis_says_so():
    net, batch, tuned = trained("snella(rank=4)")
    from burnish.blocks.weight.tiled import KernelDelta

    _, term = next(iter(tuned.terms(KernelDelta)))
    with pytest.raises(ConfigError, match="KernelDelta says of no tensor"):
        tuned.resize(term, keep=torch.arange(2))
    other = Triplets(next(p for p in tuned.anatomy.places if p.kind == "linear"), 2, 1.0)
    with pytest.raises(ConfigError, match="no part of the tuned model"):
        tuned.resize(other, keep=torch.arange(1))


def test_ragged_ranks_come_back_from_a_file(tmp_path):
    net, batch, tuned = trained()
    for i, (_, term) in enumerate(tuned.terms(Triplets)):
        tuned.resize(term, keep=torch.arange(i % 4))             # rank 0 among them
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    again = burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    assert [t.E.numel() for _, t in again.terms(Triplets)] == \
        [t.E.numel() for _, t in tuned.terms(Triplets)]
    torch.testing.assert_close(tuned.merge()(**batch).logits, other(**batch).logits, rtol=1e-4,
                               atol=1e-5)
