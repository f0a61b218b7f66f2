"""MFTCoder: losses that are means over tasks, against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.by_task import balanced, counts, nll
from burnish.core.errors import CheckError
from burnish.testing import stir, tiny

CASES = ("case1", "case2", "case3", "case4", "focal", "task_focal")


def written_out(logits, labels, task, case, w=None, focus=2.0):
    """Sample by sample, target by target."""
    ps = []                                      # of each sample the p of its targets
    for z, y in zip(logits, labels, strict=True):
        z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
        rows = [torch.exp(r[c] - torch.logsumexp(r, 0)) for r, c in zip(z, y, strict=True)
                if c != -100]
        ps.append(torch.stack(rows) if rows else None)
    every = [p for p in ps if p is not None]
    if case == "case1":
        return -torch.cat(every).log().mean()
    if case == "case2":
        return torch.stack([-p.log().mean() for p in every]).mean()
    total, over = 0, 0
    for i in sorted(set(task.tolist())):
        mine = [p for p, t in zip(ps, task.tolist(), strict=True) if t == i and p is not None]
        if not mine:
            continue
        flat = torch.cat(mine)
        said = {"case3": lambda: -flat.log().mean(),                             # noqa: B023
                "case4": lambda: torch.stack([-p.log().mean() for p in mine]).mean(),  # noqa: B023
                "focal": lambda: torch.stack([-(1 - p.mean()) ** focus * p.log().mean()
                                              for p in mine]).mean(),            # noqa: B023
                "task_focal": lambda: -(1 - flat.mean()) ** focus * flat.log().mean(),  # noqa: B023
                }[case]()
        share = 1.0 if w is None else w[i]
        total, over = total + share * said, over + share
    return total / over


def data(seed=0):
    """A batch of three tasks, of which one is absent, with a sample without a target."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 64, (5, 8), generator=g)
    for i, n in enumerate((8, 3, 5, 1, 8)):
        labels[i, n:] = -100
    labels[4] = -100
    return labels, torch.tensor([0, 2, 0, 2, 2])


@pytest.mark.parametrize("w", [None, (1.0, 9.0, 3.0)])
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_equations_and_so_are_their_gradients(case, w):
    if w is not None and case in ("case1", "case2"):
        w = None
    how = {"case1": "tokens", "case2": "samples", "case3": "task tokens", "case4": "task samples",
           "focal": "focal", "task_focal": "task focal"}[case]
    torch.manual_seed(0)
    labels, task = data()
    z = torch.randn(5, 8, 64, dtype=torch.float64, requires_grad=True)
    got = balanced(nll(z, labels), labels, task, how, counts(labels, task, 3),
                   None if w is None else torch.tensor(w), 2.0)
    want = written_out(z, labels, task, case, w)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(got, z), torch.autograd.grad(want, z)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def llama(recipe, **kw):
    net, batch = tiny("llama", dtype=torch.float64, batch=5)
    tuned = burnish.tune(net, recipe, head=False)
    net.double()
    labels, task = data()
    batch["labels"], batch["task"] = labels, task
    return stir(tuned, size=0.2), net, batch, nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("case", CASES)
def test_what_goes_backward_is_the_case(case):
    """Of a model that writes on: row n answers label n + 1."""
    tuned, net, batch, shifted = llama(f"lora(rank=2) + mftcoder(tasks=3, case='{case}')")
    tuned.optimizer()
    tuned.loss(batch).backward()
    params = list(tuned.parameters())
    z = net(**batch).logits
    want = torch.autograd.grad(written_out(z, shifted, batch["task"], case), params)
    for p, g in zip(params, want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)   # transformers' loss is fp32
        assert g.any()


def test_one_tasks_data_twice_changes_nothing():
    labels, task = data()
    z = torch.randn(5, 8, 64, dtype=torch.float64)
    twice = torch.cat([z, z[task == 2]]), torch.cat([labels, labels[task == 2]]), \
        torch.cat([task, task[task == 2]])
    for how, same in (("task tokens", True), ("task samples", True), ("tokens", False)):
        one = balanced(nll(z, labels), labels, task, how, counts(labels, task, 3))
        two = balanced(nll(twice[0], twice[1]), twice[1], twice[2], how,
                       counts(twice[1], twice[2], 3))
        assert torch.allclose(one, two, rtol=1e-12) == same, how


def test_equal_lengths_give_case3_and_case4_alike():
    torch.manual_seed(0)
    z, labels = torch.randn(4, 6, 9, dtype=torch.float64), torch.randint(0, 9, (4, 6))
    task = torch.tensor([0, 1, 1, 1])

    def of(labels, how):
        return balanced(nll(z, labels), labels, task, how, counts(labels, task, 2))

    torch.testing.assert_close(of(labels, "task tokens"), of(labels, "task samples"))
    labels[1, 2:] = -100
    assert not torch.allclose(of(labels, "task tokens"), of(labels, "task samples"), rtol=1e-4)


@pytest.mark.parametrize("case", CASES[:-1])
def test_micro_batches_add_up_to_one_batch(case):
    recipe = f"lora(rank=2) + mftcoder(tasks=3, case='{case}')"
    ends = []
    for cuts in (((0, 5),), ((0, 1), (1, 4), (4, 5)), ((0, 2), (2, 5))):
        tuned, _, batch, _ = llama(recipe)
        opt = tuned.optimizer(lr=1e-3)
        parts = [{k: v[a:b] for k, v in batch.items()} for a, b in cuts]
        parts = [p for p in parts if (p["labels"] != -100).any()] if len(cuts) > 1 else parts
        method = tuned.recipe.named("mftcoder")
        method.lifecycle(tuned, parts)
        ends.append([p.grad.clone() for p in tuned.parameters()])
        opt.step()
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
            assert b.any()


def test_accumulation_behind_its_back_is_stopped():
    tuned, _, batch, _ = llama("lora(rank=2) + mftcoder(tasks=3)")
    opt = tuned.optimizer(lr=1e-3)
    for a, b in ((0, 2), (2, 4)):
        tuned.backward({k: v[a:b] for k, v in batch.items()}, scale=0.5)
    before = [p.detach().clone() for p in tuned.parameters()]
    with pytest.raises(CheckError, match=r"2 micro-batches .* lifecycle"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tuned.parameters(), strict=True))
    opt.zero_grad()
    tuned.step(batch)                            # one is right again
    opt.zero_grad()
    for _ in range(2):                           # and one that is looked at twice (sam)
        tuned.backward(batch)
    opt.step()
    with pytest.raises(burnish.ConfigError, match="no sum over micro-batches"):
        burnish.parse("mftcoder(case='task_focal')")[0].lifecycle(tuned, [batch, batch])


def test_a_classifier_has_one_target_a_sample():
    net, batch = tiny("vit", dtype=torch.float64, batch=4)
    tuned = burnish.tune(net, "full + mftcoder", head=True)
    batch["task"] = torch.tensor([0, 1, 1, 1])
    tuned.optimizer()
    tuned.loss(batch).backward()
    params = [p for _, p in tuned.named_parameters() if p.grad is not None]
    z = net(**batch).logits
    each = torch.logsumexp(z, 1) - z[torch.arange(4), batch["labels"]]
    want = torch.autograd.grad((each[0] + each[1:].mean()) / 2, params)
    for p, g in zip(params, want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


def test_a_batch_of_one_task_has_the_plain_loss():
    tuned, _, batch, _ = llama("lora(rank=2) + mftcoder(tasks=3)")
    plain, _, _, _ = llama("lora(rank=2)")
    batch["task"] = torch.ones(5, dtype=torch.long)
    for t, given in ((tuned, batch), (plain, {k: v for k, v in batch.items() if k != "task"})):
        t.optimizer()
        t.loss(given).backward()
    for a, b in zip(tuned.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("text, why", [
    ("mftcoder(tasks=0)", "a task or more"), ("mftcoder(focus=-1.0, case='focal')", "0 or more"),
    ("mftcoder(focus=1.0)", "focus does nothing"),
    ("mftcoder(task_weights=(1.0,))", "a weight of at least 0 for each"),
    ("mftcoder(task_weights=(0.0, 0.0))", "a weight of at least 0 for each"),
    ("mftcoder(case='case1', task_weights=(1.0, 2.0))", "task_weights do nothing")])
def test_settings_that_cannot_act_are_refused(text, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.parse(text)


def test_what_it_reads_is_asked_for():
    tuned, net, batch, _ = llama("lora(rank=2) + mftcoder(tasks=3)")
    tuned.optimizer()
    del batch["task"]
    with pytest.raises(burnish.BurnishError, match="task"):
        net(**batch)
    batch["task"] = torch.tensor([0, 1, 2, 3, 0])
    with pytest.raises(burnish.BurnishError, match="from 0 to 2"):
        net(**batch)
    batch["task"] = 1
    del batch["labels"]
    with pytest.raises(burnish.BurnishError, match="a batch with 'labels'"):
        net(**batch)


def test_the_defaults():
    m = burnish.parse("mftcoder")[0]
    assert (m.case, m.tasks, m.task_weights, m.focus) == ("case3", 2, None, 2.0)
