"""A pass that is only looked at leaves no trace; what stands around a pass stands around all."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import BurnishError, ConfigError
from burnish.core.method import Method
from burnish.engine.around import _evaluating
from burnish.memory import Ledger, simulate
from burnish.testing.models import tiny


def mse(out, batch):
    return (out - batch[1]).square().mean()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        random.random(), np.random.random()              # some models draw there, too
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def start():
    torch.manual_seed(0)
    net = Net().double()
    return net, (torch.randn(5, 6).double(), torch.randn(5, 3).double())


def everything(tuned):
    opt = tuned.current_optimizer
    return ({n: v.clone() for n, v in tuned.model.state_dict().items()},
            {n: None if p.grad is None else p.grad.clone()
             for n, p in tuned.model.named_parameters()},
            [{k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()}
             for s in opt.state.values()],
            torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(),
            tuned.timeline.step, tuned.timeline.started, list(tuned.timeline.trace),
            [(n, p.requires_grad) for n, p in tuned.model.named_parameters()])


def equal(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("recipe", ["full", "lora(rank=2, dropout=0.3)", "full + step_in_backward",
                                    "full + adam8bit + l2_sp", "full + lora(rank=2)",
                                    "full + mezo", "adalora(rank=2, init_rank=3)"])
@pytest.mark.parametrize("grads", [True, False])
def test_a_probe_leaves_no_trace(recipe, grads):
    net, batch = start()
    tuned = burnish.tune(net, recipe, targets=None if recipe.startswith("full") else "a,b",
                         head=False)
    tuned.total_steps = 20
    tuned.optimizer(1e-2)
    before = everything(tuned)                           # not even begun: no event is sent
    tuned.probe(batch, mse, grads=grads)
    assert equal(everything(tuned), before)
    tuned.step(batch, mse)
    for p in tuned.parameters():
        p.grad = torch.full_like(p, 3.0)                 # waiting for an update
    before = everything(tuned)
    found = tuned.probe(batch, mse, grads=grads)
    assert equal(everything(tuned), before)
    assert bool(found.grads) == grads and not found.loss.requires_grad
    for p in tuned.parameters():
        p.grad = None
    torch.manual_seed(3)
    again = tuned.probe(batch, mse, grads=grads)
    torch.manual_seed(3)
    following = tuned.loss(batch, mse).detach()
    assert float(again.loss) == float(following)         # with the dropout of the next pass


def test_what_a_probe_finds_is_the_gradient():
    net, batch = start()
    tuned = burnish.tune(net, "full", head=True)
    torch.manual_seed(5)
    want = torch.autograd.grad(mse(net(batch[0]), batch), list(net.parameters()))
    torch.manual_seed(5)
    found = tuned.probe(batch, mse)                      # no optimizer is needed
    assert list(found.grads) == [n for n, _ in net.named_parameters()]
    for (name, g), w in zip(found.grads.items(), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14, msg=name)


def test_the_objectives_of_a_recipe_are_in_it():
    net, batch = start()
    tuned = burnish.tune(net, "full + l2_sp(alpha=0.7)", head=False)
    tuned.optimizer(1e-2)
    torch.manual_seed(5)
    first = tuned.probe(batch, mse).grads["a.weight"]
    with torch.no_grad():
        w0 = net.a.weight.clone()
    hold = net.a.weight.register_hook(lambda g: g)       # a hook of the user's changes nothing
    torch.manual_seed(5)
    assert torch.equal(first, tuned.probe(batch, mse).grads["a.weight"])
    hold.remove()
    with torch.no_grad():
        net.a.bias += 0.25                               # only its own pull changes by 0.7 * 0.25
        net.a.bias.grad = None
    torch.manual_seed(5)
    bare = torch.autograd.grad(mse(net(batch[0]), batch), [net.a.bias])[0]
    torch.manual_seed(5)
    got = tuned.probe(batch, mse).grads["a.bias"]
    torch.testing.assert_close(got - bare, torch.full_like(bare, 0.7 * 0.25))
    assert torch.equal(net.a.weight, w0)


def test_statistics_move_only_where_they_are_asked_to():
    net, batch = start()
    tuned = burnish.tune(net, "full", head=True)
    still = net.norm.running_mean.clone()
    buffer = net.norm.running_mean
    tuned.probe(batch, mse)
    assert torch.equal(net.norm.running_mean, still) and int(net.norm.num_batches_tracked) == 0
    tuned.probe(batch, mse, statistics=True)
    assert not torch.equal(net.norm.running_mean, still) and int(net.norm.num_batches_tracked) == 1
    assert net.norm.running_mean is buffer


def test_a_probe_that_fails_leaves_no_trace():
    net, batch = start()
    tuned = burnish.tune(net, "full + step_in_backward", head=True)
    tuned.optimizer(1e-2)
    tuned.step(batch, mse)
    before = everything(tuned)

    def fails(out, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        tuned.probe(batch, fails)
    assert equal(everything(tuned), before)
    tuned.step(batch, mse)                               # and tensors are stepped again
    assert not torch.equal(net.a.weight, before[0]["a.weight"])


@pytest.mark.parametrize("recipe", ["lora(rank=2, dropout=0.2) + checkpoint", "full", "dora"])
def test_a_probe_between_a_forward_and_its_backward_changes_no_gradient(recipe):
    ends = []
    for look in (False, True):
        model, batch = tiny("bert", dropout=0.1)
        tuned = burnish.tune(model, recipe)
        tuned.optimizer(1e-2)
        torch.manual_seed(2)
        loss = tuned.loss(batch)
        if look:
            tuned.probe({k: v.flip(0) for k, v in batch.items()})
        loss.backward()
        ends.append([p.grad.clone() for p in tuned.parameters()])
    assert all(map(torch.equal, *ends))


# -- around a pass -----------------------------------------------------------------------------
LOG: list = []


@dataclass(frozen=True, kw_only=True)
class Standing(Method):
    """Notes where it stands; a probe inside."""

    relies_on = ("around_step",)
    tag: str = "a"
    phase: int = 50

    def claims(self):
        return ()

    def controller(self, tuned):
        return Noted(self.tag, self.phase)


class Noted:
    def __init__(self, tag, phase):
        self.tag, self.phase = tag, phase

    def around_step(self, step):
        LOG.append(("in", self.tag, step.index))
        probed = step.probe()
        plain = step.probe(grads=False)
        assert float(probed.loss) == float(plain.loss) and not plain.grads
        try:
            yield
        finally:
            LOG.append(("out", self.tag, step.index))


def recipe_of(*parts):
    made = []
    for i, (tag, phase) in enumerate(parts):
        cls = type(f"Standing{i}", (Standing,), {"name": f"standing{i}"})
        made.append(cls(tag=tag, phase=phase))
    return ["full", *made]


def test_they_stand_inside_each_other_by_phase_and_around_each_micro_batch():
    LOG.clear()
    net, batch = start()
    tuned = burnish.tune(net, recipe_of(("inner", 70), ("outer", 20)), head=True)
    opt = tuned.optimizer(1e-2)
    tuned.step(batch, mse)
    opt.zero_grad()
    for _ in range(2):
        tuned.backward(batch, mse, scale=0.5)
    opt.step()
    once = [("in", "outer"), ("in", "inner"), ("out", "inner"), ("out", "outer")]
    assert LOG == [(*e, k) for k in (0, 1, 1) for e in once]


def test_standing_around_and_probing_alone_changes_no_run():
    ends = []
    for recipe in ("full", recipe_of(("a", 50), ("b", 50))):
        net, batch = start()
        tuned = burnish.tune(net, recipe, head=True)
        tuned.optimizer(1e-2)
        torch.manual_seed(4)
        for _ in range(3):
            tuned.step(batch, mse)
        ends.append(net.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_micro_batches_add_up_to_the_batch():
    net, batch = start()
    net.eval()                                           # no dropout, no statistics of a batch
    tuned = burnish.tune(net, "full", head=True)
    tuned.optimizer(1e-2)
    whole = tuned.probe(batch, mse).grads
    for i in range(5):
        part = (batch[0][i:i + 1], batch[1][i:i + 1])
        tuned.backward(part, mse, scale=1 / 5)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-10, atol=1e-12)


def test_an_evaluating_optimizer_has_no_backward():
    net, batch = start()
    tuned = burnish.tune(net, "full + mezo", head=True)
    with pytest.raises(ConfigError, match=r"tuned.step\(batch, loss\)"):
        tuned.backward(batch, mse)


def test_a_loss_that_is_not_finite_stops_before_its_backward():
    net, batch = start()
    tuned = burnish.tune(net, "full", head=True)
    tuned.optimizer(1e-2)
    with pytest.raises(BurnishError, match="nothing was updated"):
        tuned.backward(batch, lambda out, batch: mse(out, batch) * float("nan"))
    assert all(p.grad is None for p in net.parameters())


def test_a_foreign_trainer_is_refused_before_it_trains(tmp_path):
    import transformers

    model, _ = tiny("bert")
    tuned = burnish.tune(model, "lora(rank=2) + sam")
    args = transformers.TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to=[])
    callback = burnish.TrainerCallback(tuned)
    with pytest.raises(ConfigError, match="sam acts around the forward and backward"):
        callback.on_train_begin(args, transformers.TrainerState(max_steps=1),
                                transformers.TrainerControl(), model=model,
                                optimizer=tuned.optimizer(1e-3))


def test_a_rare_heavy_step_is_in_the_promise():
    """Simulation tells handlers to make the step it reads their heaviest."""
    class Rare(Standing):
        name = "rare"

        def controller(self, tuned):
            return Heavy(tuned)

    class Heavy:
        due = False

        def __init__(self, tuned):
            self.tuned = tuned

        def rehearse(self, step):
            self.due = True

        def around_step(self, step):
            kept = [p.detach().clone() for p in step.parameters().values()] if self.due else []
            yield
            kept.clear()

    model, batch = tiny("vit")
    plain, heavy = (simulate(model, ["full", *more], batch) for more in ([], [Rare()]))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert heavy.peak_bytes - plain.peak_bytes >= 0.9 * size


def test_nothing_of_a_probe_stays_in_memory():
    model, batch = tiny("vit")
    tuned = burnish.tune(model, "full")
    tuned.optimizer(1e-3)
    tuned.probe(batch)
    with Ledger(model) as ledger:
        tuned.probe(batch)
        alive = sum(e.bytes for e in ledger.entries
                    if e.death is None and ledger.category(e) != "weights")
    assert alive < 4096


# -- a pass whose loss is another one -------------------------------------------------------------
class Looks:
    """Probes another scalar of the forward, and keeps what it found."""

    def __init__(self, of):
        self.of, self.found = of, []

    def around_step(self, step):
        self.found.append(step.probe(of=self.of))
        yield


def looking(net, batch, of, recipe="lora(rank=2)", loss=None, **kw):
    tuned = burnish.tune(net, recipe)
    for p in tuned.parameters():
        p.data = p.double()
        p.data.add_(0.1)
    tuned.optimizer(lr=0.0, **kw)
    handler = Looks(of)
    tuned.timeline.handlers.append(("looks", handler))
    tuned.backward(batch, loss, scale=0.5)
    return tuned, handler


@pytest.mark.parametrize("model, own", [("bert", None), ("encoder", None), ("vit", "given")])
def test_another_scalar_of_the_forward_can_be_looked_at(model, own):
    """Its gradients, at the scale of the loop's loss; the pass itself is as ever."""
    net, batch = tiny(model, dtype=torch.float64)
    net.eval()

    def of(run):
        assert run.batch["labels"] is batch["labels"]
        base = run.reference().logits
        return (run.outputs.logits - base).square().sum() + run.outputs.logits.sum()

    loss = None if own is None else lambda out, b: out.logits.square().mean()
    tuned, handler = looking(net, batch, of, "lora(rank=2) + l2_sp + distill", loss)
    params = dict(tuned.named_parameters())
    passed = {n: p.grad.clone() for n, p in params.items()}
    tuned.optimizer(lr=0.0)
    for p in params.values():
        p.grad = None
    tuned.backward(batch, loss, scale=0.5)
    assert all(torch.equal(p.grad, passed[n]) for n, p in params.items())
    out = net(**batch).logits
    with torch.no_grad(), tuned.disabled():
        base = net(**batch).logits
    (probe,) = handler.found
    value = (out - base).square().sum() + out.sum()
    torch.testing.assert_close(probe.loss, value.detach())
    for (n, _), g in zip(params.items(), torch.autograd.grad(value, list(params.values())),
                         strict=True):
        torch.testing.assert_close(probe.grads[n], g * 0.5, rtol=1e-9, atol=1e-12)


def test_another_scalar_has_the_share_of_the_tokens_too():
    """A model that divides a sum by the tokens of all micro-batches: so is what is looked at."""
    net, batch = tiny("llama", dtype=torch.float64)
    net.eval()
    _, whole = looking(net, batch, lambda run: run.outputs.logits.square().mean())
    net, _ = tiny("llama", dtype=torch.float64)
    net.eval()
    items = 2 * int((batch["labels"] != -100).sum())
    _, half = looking(net, {**batch, "num_items_in_batch": torch.tensor(items)},
                      lambda run: run.outputs.logits.square().mean())
    for n, g in whole.found[0].grads.items():
        torch.testing.assert_close(half.found[0].grads[n], g / 2)


def test_another_scalar_cannot_take_the_place_of_a_loss_that_nobody_sees():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "lora(rank=2)")
    tuned.optimizer(lr=0.0)
    tuned.timeline.handlers.append(("looks", Looks(lambda run: run.outputs.logits.sum())))

    def whole():
        loss = net(pixel_values=batch["pixel_values"]).logits.sum()
        loss.backward()
        return loss

    with pytest.raises(ConfigError, match="tuned.backward"):
        tuned.around(whole, whole)
    tuned.timeline.handlers.pop()
    assert tuned.around(whole, whole).ndim == 0      # and all is as it was


# -- a pass of some samples -----------------------------------------------------------------------
class Narrows:
    phase = 5

    def __init__(self, *rows):
        self.rows = rows

    def around_step(self, step):
        for rows in self.rows:
            step.narrow(rows)
        yield


class Probes:
    def around_step(self, step):
        self.found = step.probe()
        yield


@pytest.mark.parametrize("recipe", ["full", "full + l2_sp(alpha=0.7)", "full + glad"])
def test_a_narrowed_pass_is_that_of_these_samples_alone(recipe):
    """Whatever stands inside sees them alone, too."""
    ends = []
    for rows in ([], [[3, 0]]):
        net, (x, y) = start()
        tuned = burnish.tune(net, recipe, head=True)
        tuned.optimizer(1e-2)
        tuned.timeline.handlers.append(("narrows", Narrows(*rows)))
        tuned.timeline.handlers.append(("probes", probes := Probes()))
        torch.manual_seed(4)
        batch = (x, y) if rows else (x[[3, 0]], y[[3, 0]])
        loss = tuned.backward(batch, mse, scale=0.5)
        ends.append((loss, probes.found.loss, probes.found.grads,
                     [p.grad for p in net.parameters()], net.state_dict()))
    assert equal(ends[0], ends[1])


def test_a_narrowed_pass_may_be_made_sample_by_sample():
    class Apart:
        phase = 60
        losses = 0

        def around_step(self, step):
            step.apart(lambda: setattr(self, "losses", self.losses + 1))
            yield

    net, batch = start()
    net.eval()
    tuned = burnish.tune(net, "full", head=True)
    tuned.optimizer(1e-2)
    apart = Apart()
    tuned.timeline.handlers += [("narrows", Narrows([4, 1, 2])), ("apart", apart)]
    loss = tuned.backward(batch, mse)
    with torch.no_grad():
        want = sum(mse(net(batch[0][i:i + 1]), (None, batch[1][i:i + 1])) for i in (1, 2, 4)) / 3
    assert apart.losses == 3 and float(loss) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("rows", [[[]], [[1, 1]], [[1], [0]]])
def test_what_no_pass_can_be_narrowed_to_is_refused(rows):
    net, batch = start()
    tuned = burnish.tune(net, "full", head=True)
    tuned.optimizer(1e-2)
    tuned.timeline.handlers.append(("narrows", Narrows(*rows)))
    with pytest.raises(ConfigError, match="narrowed once, to samples that are told apart"):
        tuned.backward(batch, mse)
    assert all(p.grad is None for p in net.parameters())


def test_a_loop_that_cannot_narrow_says_what_is_missing():
    net, batch = start()
    tuned = burnish.tune(net, "full", head=True)
    tuned.optimizer(1e-2)
    tuned.timeline.handlers.append(("narrows", Narrows([0])))
    with pytest.raises(ConfigError, match=r"tuned.around\(..., some=...\)"):
        tuned.around(lambda: mse(net(batch[0]), batch), lambda: mse(net(batch[0]), batch))


def test_a_look_in_evaluation_mode_within_another_ends_neither_early():
    net = start()[0].train()
    net.drop.eval()
    with _evaluating(net):
        with _evaluating(net):
            net.train()
        assert not net.train().training and not net.norm.training
    assert net.training and net.norm.training and not net.drop.training
    assert not net.eval().training and "train" not in vars(net)
