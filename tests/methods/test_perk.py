"""PERK: inner steps and their derivative against a plain loop in float64, order and rows that
change nothing, a start that learns to read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import CheckError, ConfigError, DataError
from burnish.methods.lifecycle.perk import next_tokens
from burnish.testing import stir
from burnish.testing.models import tiny


def rows_of(out, batch):
    return F.mse_loss(out, batch[1], reduction="none").mean(1)


def made(settings="", recipe="lora(rank=2, alpha=6)", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    tuned = burnish.tune(model, recipe, targets="0,2", head=False)
    model.double()
    stir(tuned, size=0.3)
    return model, burnish.parse(f"perk({settings})")[0].lifecycle(tuned, rows_of)


def data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 4, generator=g, dtype=torch.float64),
            torch.randn(n, 3, generator=g, dtype=torch.float64))


def answer(model, phi, x):
    """The two linears with their factors, s = 6 / 2."""
    for i, name in ((0, "0.weight"), (2, "2.weight")):
        W = model[i].weight.detach() + 3.0 * phi[f"{name}.B"] @ phi[f"{name}.A"]
        x = F.linear(x, W, model[i].bias.detach())
        x = torch.tanh(x) if i == 0 else x
    return x


def by_hand(model, phi, log_rates, context, question, steps, through):
    """(loss on the question after `steps`, phi after them), the loop written out."""
    for k in range(steps):
        whole = k >= steps - through
        at = phi if whole else {n: t.detach().requires_grad_() for n, t in phi.items()}
        value = ((answer(model, at, context[0]) - context[1]) ** 2).mean()
        grads = torch.autograd.grad(value, list(at.values()), create_graph=True)
        phi = {n: t - log_rates[n][k].exp() * (g if whole else g.detach())
               for (n, t), g in zip(phi.items(), grads, strict=True)}
    return ((answer(model, phi, question[0]) - question[1]) ** 2).mean(), phi


@pytest.mark.parametrize("through", [3, 2, 0])
@pytest.mark.parametrize("rows", [8, 2])
def test_value_and_derivative_are_those_of_the_loop(through, rows):
    model, perk = made(f"updates=3, unrolled={through}, eta=0.2, segments={rows}")
    context, question = data(5), data(4, 1)
    params = [*perk.phi.values(), *perk.rates.values()]
    loss = perk.outer(context, question)
    ours = torch.autograd.grad(loss, params)
    copies = {n: p.detach().clone().requires_grad_() for n, p in perk.phi.items()}
    logs = {n: t.detach().clone().requires_grad_() for n, t in perk.rates.items()}
    want, _ = by_hand(model, copies, logs, context, question, 3, through)
    theirs = torch.autograd.grad(want, [*copies.values(), *logs.values()])
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert all(g.any() for g in ours)


def test_what_is_cut_off_differs_from_all_of_it():
    grads = []
    for through in (0, 3):
        _, perk = made(f"updates=3, unrolled={through}, eta=0.2")
        loss = perk.outer(data(5), data(4, 1))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(
            loss, list(perk.phi.values()))]))
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) > 0.01


def test_order_and_rows_segments_change_nothing():
    found = []
    for settings, turn in (("", False), ("", True), (", segments=2", False),
                           (", segments=1", True)):
        _, perk = made("updates=3, eta=0.3" + settings)
        x, y = data(7)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(1)) if turn else \
            torch.arange(7)
        phi = perk.read((x[order], y[order]), {n: p.detach() for n, p in perk.phi.items()}, 0)
        found.append(torch.cat([t.flatten() for t in phi.values()]))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-12, atol=1e-13)


def test_reading_stands_in_the_model_and_goes_again():
    model, perk = made("updates=3, eta=0.3")
    context, question = data(5), data(4, 1)
    before = {n: p.detach().clone() for n, p in perk.phi.items()}
    rates = {n: t.detach() for n, t in perk.rates.items()}
    _, phi = by_hand(model, {n: p.clone().requires_grad_() for n, p in before.items()}, rates,
                     context, question, 3, 0)
    want = answer(model, phi, question[0])
    with pytest.raises(ZeroDivisionError), perk.reading(context) as there:
        torch.testing.assert_close(there(question[0]), want)
        assert not torch.allclose(want, answer(model, before, question[0]))
        raise ZeroDivisionError
    assert all(torch.equal(p, before[n]) for n, p in perk.phi.items())
    assert all(p.grad is None for p in perk.phi.values())


class Held:
    """Bytes that graphs hold, now and at most."""

    def __init__(self):
        self.now = self.most = self.forwards = self.rows = 0

    def pack(self, t):
        self.now += t.numel() * t.element_size()
        self.most = max(self.most, self.now)
        held = self

        class Kept:
            tensor = t

            def __del__(self):
                held.now -= self.tensor.numel() * self.tensor.element_size()

        return Kept()


def test_reading_takes_time_by_the_context_and_memory_by_the_rows():
    cost = {}
    for n in (8, 32):
        model, perk = made("updates=3, segments=4")
        held = Held()
        handle = model[0].register_forward_pre_hook(
            lambda m, args, held=held: (setattr(held, "forwards", held.forwards + 1),
                                        setattr(held, "rows", max(held.rows, len(args[0]))))[2:]
            or None)
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda k: k.tensor):
            perk.read(data(n), {k: p.detach() for k, p in perk.phi.items()}, 0)
        handle.remove()
        cost[n] = held
    assert cost[8].forwards == 3 * 2 and cost[32].forwards == 3 * 8
    assert cost[8].rows == cost[32].rows == 4
    assert 0 < cost[8].most == cost[32].most


def test_a_start_learns_to_read():
    """Each context is examples of its own linear map; questions ask for others of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    tuned = burnish.tune(model, "lora(rank=3)", targets="0,2", head=False)
    model.double()
    g = torch.Generator().manual_seed(0)

    def lesson():
        M = torch.randn(4, 3, generator=g, dtype=torch.float64)
        x, z = (torch.randn(12, 4, generator=g, dtype=torch.float64) for _ in range(2))
        return (x, x @ M), (z, z @ M)

    perk = burnish.parse("perk(updates=4, unrolled=4, eta=0.3, step_rate=0.01, "
                         "rate_rate=0.05, segments=12, lessons=2)")[0].lifecycle(tuned, rows_of)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "burnish" not in n}
    first = {n: t.detach().clone() for n, t in perk.rates.items()}
    told = perk.learn(lesson() for _ in range(120))
    assert len(told) == 60 and sum(told[-10:]) < 0.75 * sum(told[:10])
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert all(not torch.equal(t, first[n]) for n, t in perk.rates.items())
    assert all(p.grad is None for p in perk.phi.values())
    state = perk.state_dict()
    other = burnish.parse("perk")[0].lifecycle(tuned, rows_of)
    other.load_state_dict(state)
    assert all(torch.equal(other.rates[n], t) for n, t in perk.rates.items())
    with pytest.raises(ConfigError, match="of another adapter or number of updates"):
        burnish.parse("perk(updates=2)")[0].lifecycle(tuned).load_state_dict(state)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_reads_segments(kind):
    torch.manual_seed(0)
    model, batch = tiny(kind)
    tuned = stir(burnish.tune(model, "lora(rank=2)", head=False))
    perk = burnish.parse("perk(updates=2, eta=0.5)")[0].lifecycle(tuned)
    ids = batch["input_ids"]
    loss = perk.outer({"input_ids": ids}, {"input_ids": ids, "labels": ids})
    loss.backward()
    assert all(p.grad is not None for p in perk.phi.values())
    with torch.no_grad(), perk.reading({"input_ids": ids}) as there:
        after = float(there(input_ids=ids, labels=ids).loss)
    model.eval()
    with torch.no_grad():
        before = float(model(input_ids=ids, labels=ids).loss)
    assert after < before and after == pytest.approx(loss.item(), rel=1e-4)


def test_next_tokens():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    ids, mask = torch.tensor([[1, 2, 3, 4], [0, 4, 2, 2]]), torch.tensor([[1, 1, 1, 1],
                                                                         [1, 1, 1, 0]])
    labels = torch.tensor([[1, -100, 3, 4], [0, 4, 2, 2]])
    logp = logits.log_softmax(-1)
    want = [-(logp[0, 1, 3] + logp[0, 2, 4]) / 2, -(logp[1, 0, 4] + logp[1, 1, 2]) / 2]
    got = next_tokens(logits, {"input_ids": ids, "labels": labels, "attention_mask": mask})
    torch.testing.assert_close(got, torch.stack(want))
    whole = next_tokens(logits, {"input_ids": ids})
    torch.testing.assert_close(whole[1], -(logp[1, 0, 4] + logp[1, 1, 2] + logp[1, 2, 2]) / 3)
    few = torch.tensor([[1, -100, 3, -100], [0, -100, -100, -100]])      # one that counts, and none
    got = next_tokens(logits, {"input_ids": ids, "labels": few})
    torch.testing.assert_close(got, torch.stack([-logp[0, 1, 3], torch.zeros_like(logp[0, 0, 0])]))
    for out, batch in ((logits, {"input_ids": ids[:, :3]}), (logits, {"x": ids}), (logits, ids),
                       (logits[:, 0], {"input_ids": ids[:, 0]})):
        with pytest.raises(DataError, match="mappings with input_ids, of a model that says the"):
            next_tokens(out, batch)


def test_its_settings_and_the_least_of_them():
    assert burnish.parse("perk")[0].settings() == {
        "targets": None, "updates": 4, "unrolled": 2, "eta": 5e-5, "step_rate": 1e-5,
        "rate_rate": 1e-3, "lessons": 1, "segments": 8}
    least = {"updates": 1, "unrolled": 0, "segments": 1}
    assert burnish.parse("perk(updates=1, unrolled=0, segments=1)")[0].changed() == least


def test_refusals():
    for bad in ("updates=0", "unrolled=5", "unrolled=-1", "eta=0.0", "segments=0", "lessons=0",
                "step_rate=0.0", "rate_rate=0.0"):
        with pytest.raises(ConfigError, match="^perk"):
            burnish.parse(f"perk({bad})")
    with pytest.raises(ConfigError, match="a LoRA and nothing else trains"):
        made(recipe="bitfit")
    with pytest.raises(ConfigError, match="a LoRA and nothing else trains"):
        made(recipe="lora(rank=2) + bitfit")
    _, perk = made()
    with pytest.raises(DataError, match=r"a lesson is \(context, question\)"):
        perk.learn([data(3)[0]])
    perk.loss = lambda out, batch: out.mean()
    with pytest.raises(ConfigError, match="a number a row"):
        perk.outer(data(3), data(3))
    _, perk = made(recipe="lora(rank=2)")
    x, y = data(3)
    x[0, 0] = float("inf")
    with pytest.raises(CheckError, match="inner step 1 is not finite"):
        perk.learn([((x, y), data(2))])
    with pytest.raises(DataError, match="mappings with input_ids"):
        next_tokens(torch.zeros(2, 3), (x, y))
