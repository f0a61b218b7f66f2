"""MPT: rows that tasks share, each with a low-rank factor of its own, in plain float64."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.state.task_prompts import TaskRows
from burnish.core.recipe import parse
from burnish.testing import stir, tiny

TASK = torch.tensor([2, 0, 2])


def make(recipe="mpt(length=3, tasks=3, rank=2)", model="llama", stirred=True):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch = {"input_ids": batch["input_ids"]}
    tuned = burnish.tune(net, recipe, head=False)
    net.double().eval()
    return (stir(tuned, size=0.3) if stirred else tuned), batch


def rows_of(tuned):
    m, = (m for m in tuned.model.modules() if isinstance(m, TaskRows))
    return m


def product(P, U, V):
    """P_t, entry by entry."""
    return torch.stack([torch.stack([P[i, j] * sum(U[i, r] * V[r, j] for r in range(len(V)))
                                     for j in range(P.shape[1])]) for i in range(len(P))])


@pytest.mark.parametrize("model, table", [("llama", "model.embed_tokens"),
                                          ("gpt2", "transformer.wte")])
def test_the_equation_written_out(model, table):
    """X' = [P * (U_t V_t); E(x)], sample by sample; a task without a sample has no gradient."""
    tuned, batch = make(model=model)
    m, base = rows_of(tuned), tiny(model, dtype=torch.float64, batch=3)[0].eval()
    ids = batch["input_ids"]
    front = torch.stack([product(m.rows, m.U[t], m.V[t]) for t in TASK])
    x = torch.cat([front, base.get_submodule(table)(ids)], 1)
    want = base(inputs_embeds=x).logits[:, 3:]
    got = tuned.model(**batch, task=TASK).logits
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    params = (m.rows, m.U, m.V)
    for a, b in zip(torch.autograd.grad(got, params, g), torch.autograd.grad(want, params, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert b.any()
    assert not a[1].any() and a[0].any() and a[2].any()


def test_every_task_begins_with_the_shared_rows():
    tuned, batch = make(stirred=False)
    m = rows_of(tuned)
    plain = burnish.tune(tiny("llama", dtype=torch.float64)[0], "prompt_tuning(length=3)")
    with torch.no_grad():
        next(plain.parameters()).copy_(m.rows)
        plain.model.double().eval()
        want = plain.model(**batch).logits
        for task in range(3):
            torch.testing.assert_close(tuned.model(**batch, task=task).logits, want)
    assert bool((m.U[..., 1] != 0).all()) and not m.V[:, 1].any(), "further components can part"


def test_one_task_reads_no_key():
    tuned, batch = make("mpt(length=3, tasks=1, rank=2)")
    m = rows_of(tuned)
    assert tuned.recipe[0].keys() == {} and tuned.model(**batch).logits.isfinite().all()
    torch.testing.assert_close(m.plain(None)["rows"], product(m.rows, m.U[0], m.V[0]))
    tuned, batch = make()
    with pytest.raises(burnish.RecipeError, match="reads 'task' of the batch"):
        tuned.model(**batch)
    with pytest.raises(burnish.RecipeError, match="whole numbers from 0 to 2"):
        tuned.model(**batch, task=torch.tensor([0, 3, 1]))


@pytest.mark.parametrize("task", [1, None])
@pytest.mark.parametrize("then", ["prompt_tuning", "mpt"])
def test_what_comes_next(task, then, tmp_path):
    """A task's rows alone, or one new task begun there; None: at the mean of the factors."""
    tuned, batch = make()
    m = rows_of(tuned)
    U, V = (t.detach().mean(0) if task is None else t[task].detach() for t in (m.U, m.V))
    want = product(m.rows.detach(), U, V)
    tuned.recipe[0].lifecycle(tuned, task, "next", then=then)
    named = {n.rpartition(".")[2]: p for n, p in tuned.named_parameters()}
    rows = named["rows"] if then == "prompt_tuning" else product(
        named["rows"], named["U"][0], named["V"][0])
    torch.testing.assert_close(rows.detach().double(), want, rtol=1e-6, atol=1e-8)
    assert set(named) == ({"rows"} if then == "prompt_tuning" else {"rows", "U", "V"})
    assert tuned.model(**batch).logits.isfinite().all()
    tuned.use("default")
    assert not torch.equal(tuned.model(**batch, task=0).logits, tuned.model(**batch, task=2).logits)


def test_counts_defaults_and_refusals():
    m = parse("mpt")[0]
    assert (m.length, m.tasks, m.rank) == (100, 2, 1)
    assert m.count(768) == 100 * 768 + 2 * (100 + 768)
    tuned, _ = make()
    assert sum(p.numel() for p in tuned.parameters()) == parse(
        "mpt(length=3, tasks=3, rank=2)")[0].count(32)
    for recipe in ("mpt(tasks=0)", "mpt(rank=0)"):
        with pytest.raises(burnish.RecipeError, match="expected a task and a rank of at least 1"):
            parse(recipe)
    with pytest.raises(burnish.RecipeError, match="tasks 0 to 2, not 3"):
        tuned.recipe[0].lifecycle(tuned, 3, "x")
    with pytest.raises(burnish.RecipeError, match="becomes 'prompt_tuning' or 'mpt', not 'lora'"):
        tuned.recipe[0].lifecycle(tuned, 0, "x", then="lora")
