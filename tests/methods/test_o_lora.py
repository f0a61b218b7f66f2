"""O-LoRA: orthogonal to what earlier tasks have taken."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.methods.objective.o_lora import overlap
from burnish.testing.models import tiny


def test_the_overlap_by_hand():
    A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    B = torch.tensor([[1.0, 0.0, 3.0]])
    made = [1 * 1 + 2 * 0 + 0 * 3, 0 * 1 + 1 * 0 - 1 * 3]             # 1, -3
    assert float(overlap(A, [B], "squared")) == sum(x * x for x in made)
    assert float(overlap(A, [B], "absolute")) == sum(abs(x) for x in made)
    assert float(overlap(A, [B, B], "squared")) == 2 * sum(x * x for x in made)


def two(weight, norm="squared"):
    net, batch = tiny("bert", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2)", head=False, name="first")
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    tuned.add("second", f"lora(rank=3) + o_lora(weight={weight}, norm='{norm}') + sgd", seed=1)
    tuned.use("second")
    return tuned, batch


def crossing(tuned):
    first = dict(tuned.terms(Chain, "first"))
    return sum(float((first[n].A.detach() @ t.A.detach().t()).square().sum())
               for n, t in tuned.terms(Chain, "second"))


def test_the_gradient_is_that_of_the_formula():
    """d/dA weight ||A_1 A^T||^2 = 2 weight A A_1^T A_1."""
    grads = []
    for weight in (0.0, 0.4):
        tuned, batch = two(weight)
        tuned.optimizer(lr=0.0)
        tuned.loss(batch).backward()
        grads.append({n: t.A.grad.clone() for n, t in tuned.terms(Chain, "second")})
    first = dict(tuned.terms(Chain, "first"))
    for n, t in tuned.terms(Chain, "second"):
        A1 = first[n].A.detach()
        want = 2 * 0.4 * t.A.detach() @ A1.t() @ A1
        torch.testing.assert_close(grads[1][n] - grads[0][n], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["squared", "absolute"])
def test_the_new_task_turns_away_and_the_old_one_stays(norm):
    tuned, batch = two(5.0 if norm == "squared" else 0.5, norm)
    old = {n: t.A.detach().clone() for n, t in tuned.terms(Chain, "first")}
    before = crossing(tuned)
    tuned.optimizer(lr=2e-2)
    for _ in range(15):
        tuned.step(batch)
    assert crossing(tuned) < 0.5 * before
    assert all(torch.equal(old[n], t.A) for n, t in tuned.terms(Chain, "first"))


def test_a_first_task_has_nothing_to_avoid():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + o_lora", head=False)
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)


def test_updates_that_have_no_such_factor_are_refused():
    """Silently they would overlap as they like."""
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "bitfit + o_lora", head=False, name="first")
    (method,) = [m for m in tuned.recipe if m.name == "o_lora"]
    with pytest.raises(burnish.RecipeError, match=r"keeps the A of low-rank updates .* has none"):
        list(method.stages(tuned, ["first", "second"]))
    tuned.add("second", "bitfit + o_lora")
    tuned.use("second")
    with pytest.raises(burnish.RecipeError, match=r"keeps the A of low-rank updates .* has none"):
        tuned.optimizer(lr=1e-3)
    with pytest.raises(burnish.RecipeError, match=r"keeps the A of low-rank updates .* has none"):
        burnish.simulate(tiny("bert")[0], "increlora + o_lora", batch, tasks=2)


def test_two_tasks_one_after_the_other():
    """Stages: the second task trains beside the first, which neither moves nor falls silent."""
    net, batch = tiny("bert", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2) + o_lora(weight=2.0)", head=False, name="sums")
    method = tuned.recipe.named("o_lora")
    other = {**batch, "labels": (batch["labels"] + 1) % net.config.num_labels}
    data = {"sums": [batch] * 12, "other": [other] * 25}
    seen, first = [], {}
    for stage, step, loss in tuned.run(method.stages(tuned, ["sums", "other"]),
                                       lambda s: data[s.data], lr=2e-2):
        seen.append((stage.trains, step))
        assert torch.isfinite(loss)
        if seen[-1] == ("other", 0):
            first = {n: (t.A.detach().clone(), t.B.detach().clone())
                     for n, t in tuned.terms(Chain, "sums")}
            begin = crossing_of(tuned)
            assert dict(tuned.state.active) == {"sums": 1.0, "other": 1.0}
            assert all(".other." in n for n, _ in tuned.named_parameters())
    assert seen == [("sums", i) for i in range(12)] + [("other", i) for i in range(25)]
    assert all(torch.equal(t.A, first[n][0]) and torch.equal(t.B, first[n][1])
               for n, t in tuned.terms(Chain, "sums"))
    assert crossing_of(tuned) < 0.2 * begin
    net.eval()
    both = net(**batch).logits
    tuned.use("other")
    assert not torch.allclose(net(**batch).logits, both), "the first task's update was active too"
    tuned.use({"sums": 1.0, "other": 1.0})
    torch.testing.assert_close(tuned.merge()(**batch).logits, both)


def crossing_of(tuned):
    first = dict(tuned.terms(Chain, "sums"))
    return sum(float((first[n].A.detach() @ t.A.detach().t()).square().sum())
               for n, t in tuned.terms(Chain, "other"))


def test_defaults_are_the_published_ones():
    (method,) = burnish.parse("o_lora")
    assert (method.weight, method.norm) == (0.5, "squared")


def test_every_task_starts_from_a_draw_of_its_own():
    """Drawn alike, a new A would lie exactly on the directions it is to leave free."""
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + o_lora", head=False, name="a")
    method = tuned.recipe.named("o_lora")
    for _ in tuned.run(method.stages(tuned, ["a", "b", "c"]), lambda s: [batch], lr=0.0):
        pass
    drawn = [[t.A.detach() for _, t in tuned.terms(Chain, name)] for name in "abc"]
    for i in range(3):
        for j in range(i):
            assert not any(torch.equal(p, q) for p, q in zip(drawn[i], drawn[j], strict=True))
