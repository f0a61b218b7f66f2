"""MFTCoder: losses that are means over tasks, against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.by_task import balanced, counts, nll
from burnish.blocks.update.converging import Coba, Famo, Following
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
    ("mftcoder(case='case1', task_weights=(1.0, 2.0))", "task_weights do nothing"),
    ("mftcoder(case='coba', task_weights=(1.0, 2.0))", "task_weights do nothing"),
    ("mftcoder(alarm=1.0)", "alarm does nothing beside case='case3'; expected case='coba'"),
    ("mftcoder(case='coba', weight_rate=1.0)", "expected case='famo'"),
    ("mftcoder(case='coba', remembered=1)", "2 or more losses"),
    ("mftcoder(case='famo', weight_rate=-1.0)", "weight_rate and evening of at least 0")])
def test_settings_that_cannot_act_are_refused(text, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.parse(text)


def test_one_process_alone(monkeypatch):
    from burnish.methods.objective import mftcoder as module

    monkeypatch.setattr(module, "processes", lambda: 2)
    with pytest.raises(burnish.ConfigError, match="each of 2 processes sees its own part"):
        burnish.tune(tiny("vit")[0], "full + mftcoder(tasks=2)").optimizer(lr=1e-3)


def test_tasks_are_of_training_alone():
    net, batch = tiny("vit")
    burnish.tune(net, "lora(rank=2) + mftcoder(tasks=2)")
    net.eval()
    assert net(**batch).logits.isfinite().all()          # and an answer needs no task


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


# -- weights that follow how losses fall -----------------------------------------------------------
def softmax(xs):
    top = max(xs)
    e = [math.exp(x - top) for x in xs]
    return [x / sum(e) for x in e]


def line(ys):
    """Slope of the least-squares line through (0, y0), (1, y1), ..."""
    n, mx, my = len(ys), (len(ys) - 1) / 2, sum(ys) / len(ys)
    return sum((i - mx) * (y - my) for i, y in enumerate(ys)) \
        / sum((i - mx) ** 2 for i in range(n))


def coba_written_out(losses, warmup, window, tau):
    """Weights behind each row of losses, from the equations."""
    N, out, slopes, worst = len(losses[0]), [], [], []
    for t in range(len(losses)):
        r = [[row[i] / losses[0][i] for row in losses[: t + 1]][-window:] for i in range(N)]
        if t + 1 < max(warmup, 2):
            out.append([1 / N] * N)
            continue
        a = [line(x) for x in r]
        slopes.append(a)
        worst.append(line([max(c) for c in zip(*r, strict=True)]))
        rcs = softmax([N * x / sum(map(abs, a)) for x in a])
        past = [[s[i] for s in slopes][-window:] for i in range(N)]
        acs = softmax([-len(p) * p[-1] / sum(map(abs, p)) for p in past])
        shares = softmax([-tau * len(worst) * x / sum(map(abs, worst)) for x in worst])
        df = min(1.0, len(worst) * shares[-1])
        out.append([df * x + (1 - df) * y for x, y in zip(rcs, acs, strict=True)])
    return out


def famo_written_out(losses, rate, pull):
    x, out = [0.0] * len(losses[0]), []
    for t, now in enumerate(losses):
        if t:
            z = softmax(x)
            fell = [math.log(a) - math.log(b) for a, b in zip(losses[t - 1], now, strict=True)]
            jacobian = [[z[i] * ((i == j) - z[j]) for j in range(len(z))] for i in range(len(z))]
            delta = [sum(jacobian[j][i] * fell[j] for j in range(len(z))) for i in range(len(z))]
            x = [a - rate * (d + pull * a) for a, d in zip(x, delta, strict=True)]
        w = [z / y for z, y in zip(softmax(x), now, strict=True)]
        out.append([a / sum(w) for a in w])
    return out


def falling(rates, steps=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[2 * math.exp(r * t) * (1 + 0.05 * float(torch.rand(1, generator=g)))
             for r in rates] for t in range(steps)]


@pytest.mark.parametrize("rates", [(-0.2, -0.05, -0.1), (-0.2, 0.1, -0.1)])
@pytest.mark.parametrize("window", [3, 200])
def test_weights_are_their_equations_at_every_step(rates, window):
    losses = falling(rates)
    rule = Coba(3, 4, window, 5.0)
    for now, want in zip(losses, coba_written_out(losses, 4, window, 5.0), strict=True):
        got = rule.told(now)
        assert got == pytest.approx(want, rel=1e-9) and sum(got) == pytest.approx(1)
        again = Coba(3, 4, window, 5.0)
        again.load_state_dict(rule.state_dict())         # a run that resumes goes on alike
        rule = again
    rule = Famo(3, 0.5, 0.01)
    for now, want in zip(losses, famo_written_out(losses, 0.5, 0.01), strict=True):
        assert rule.told(now) == pytest.approx(want, rel=1e-9)
        again = Famo(3, 0.5, 0.01)
        again.load_state_dict(rule.state_dict())
        rule = again


def test_who_falls_slower_weighs_more_and_who_turns_up_less():
    even = falling((-0.2, -0.02, -0.1))
    coba, famo = Coba(3, 3, 200, 5.0), Famo(3, 0.5, 0.001)
    for now in even:
        w, f = coba.told(now), famo.told(now)
    assert w[1] > w[2] > w[0]
    z = [a * b for a, b in zip(f, now, strict=True)]     # famo's z: w_i l_i, but for their sum
    assert z[1] > z[2] > z[0]
    turned = [[a, 2 - 0.15 * t if t < 8 else 0.8 + 0.5 * (t - 8), c]
              for t, (a, _, c) in enumerate(falling((-0.2, 0, -0.1), 14))]
    rule = Coba(3, 3, 6, 5.0)
    for now in turned:
        w = rule.told(now)
    assert w[1] < min(w[0], w[2])


@pytest.mark.parametrize("case", ["famo", "coba"])
def test_an_update_is_weighed_by_the_losses_told_before_it(case):
    """Equal until every task was there; then by the rule, of each update's own losses."""
    recipe = f"lora(rank=2) + mftcoder(tasks=3, case={case!r}" + (
        ", warmup=2, remembered=4)" if case == "coba" else ", weight_rate=0.5)")
    tuned, net, batch, shifted = llama(recipe)
    opt, losses, told = tuned.optimizer(lr=3e-2), [], None
    rule = Coba(3, 2, 4, 5.0) if case == "coba" else Famo(3, 0.5, 0.001)
    for step in range(5):
        task = batch["task"] = torch.tensor([0, 2, 0, 2, 2] if not step else [0, 2, 1, 2, 2])
        params = list(tuned.parameters())
        z = net(**batch).logits
        want = torch.autograd.grad(written_out(z, shifted, task, "case3", told), params)
        tuned.loss(batch).backward()
        for p, g in zip(params, want, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)
        if step:
            losses.append([written_out(z[task == i], shifted[task == i], task[task == i],
                                       "case3").item() for i in range(3)])
            told = rule.told(losses[-1])
        opt.step()
        opt.zero_grad()
        said = next(h for _, h in tuned.timeline.handlers if isinstance(h, Following))
        assert said.weights == (None if told is None else pytest.approx(told, rel=1e-5))
    assert max(told) - min(told) > 1e-3
    assert said.told()["weights"] == said.weights


def test_validation_batches_take_the_place_of_those_that_train():
    tuned, net, batch, shifted = llama("lora(rank=2) + mftcoder(tasks=3, case='famo')")
    tuned.optimizer(lr=1e-2)
    method = tuned.recipe.named("mftcoder")
    held = {**batch, "task": torch.tensor([0, 1, 2, 1, 2])}
    method.validate(tuned, held)
    assert net.training
    z = net.eval()(**held).logits
    each = [written_out(z[held["task"] == i], shifted[held["task"] == i],
                        held["task"][held["task"] == i], "case3").item() for i in range(3)]
    net.train()
    said = next(h for _, h in tuned.timeline.handlers if isinstance(h, Following))
    assert said.last == pytest.approx(each, rel=1e-6)
    before = list(said.last)
    tuned.step(batch)
    assert said.last == before
    with pytest.raises(burnish.ConfigError, match="expected case='famo' or case='coba'"):
        other = llama("lora(rank=2) + mftcoder(tasks=3)")[0]
        other.optimizer()
        other.recipe.named("mftcoder").validate(other, held)


@pytest.mark.parametrize("text", [
    "tasks=1", "case='focal', focus=0.0", "task_weights=(0.0, 1.0)",
    "case='coba', remembered=2, warmup=0, alarm=0.0", "case='famo', weight_rate=0.0, evening=0.0"])
def test_the_least_that_acts(text):
    part = burnish.parse(f"mftcoder({text})")[0]
    assert burnish.parse(str(part))[0].settings() == part.settings() and part.changed()


def test_the_defaults():
    m = burnish.parse("mftcoder")[0]
    assert (m.case, m.tasks, m.task_weights, m.focus) == ("case3", 2, None, 2.0)
    assert (m.warmup, m.remembered, m.alarm) == (100, 200, 5.0)
    assert (m.weight_rate, m.evening) == (0.025, 0.001)
