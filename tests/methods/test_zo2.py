"""ZO2: MeZO's own bits, each block brought once a probe, and a device that holds two blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.hosted import Hosted, hosted
from burnish.core.errors import BurnishError, ConfigError, RecipeError
from burnish.memory import measure, simulate
from burnish.testing.models import tiny

BESIDE = "lora(rank=2)"


def run(recipe, model, steps=4, **kw):
    net, batch = tiny(model)
    tuned = burnish.tune(net, recipe, **kw)
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch)) for _ in range(steps)]
    return losses, [p.detach().clone() for p in tuned.parameters()], tuned, batch


@pytest.mark.parametrize("model, beside, settings", [
    ("llama", BESIDE, "eps=0.01"), ("gpt2", BESIDE, "eps=0.01, queries=2"),
    ("vit", "houlsby(bottleneck=2)", "eps=0.01, weight_decay=0.1"), ("mixtral", BESIDE, "eps=0.01"),
    ("bert", BESIDE, "eps=0.01, g_max=0.001"), ("llama", "norms", "eps=0.01, noise='portable'")])
def test_losses_and_weights_have_mezo_s_bits(model, beside, settings):
    want, weights, *_ = run(f"{beside} + mezo({settings})", model)
    losses, ours, *_ = run(f"{beside} + zo2({settings})", model)
    assert losses == want and len(set(want)) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, weights, strict=True))


def test_matrices_decay():
    _, plain, *_ = run("houlsby + zo2(g_max=1e-12)", "vit", steps=1)
    _, decayed, *_ = run("houlsby + zo2(g_max=1e-12, weight_decay=0.5)", "vit", steps=1)
    moved = [not torch.equal(a, b) for a, b in zip(decayed, plain, strict=True)]
    assert any(moved) and not all(moved)
    for a, b, m in zip(decayed, plain, moved, strict=True):
        torch.testing.assert_close(a, b * (1 - 1e-2 * 0.5) if m else b)


def test_against_the_equation_in_float64():
    """g and one update, by two forwards of a dense model at theta +- eps z."""
    from burnish.blocks.update.noise import CounterNoise

    net, batch = tiny("llama", dtype=torch.float64)
    tuned = burnish.tune(net, f"{BESIDE} + zo2(eps=0.01)", head=False)
    for p in tuned.parameters():
        nn.init.normal_(p, std=0.1)
    start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    opt = tuned.optimizer(lr=0.1)
    tuned.step(batch)
    (seed,), (g,) = opt.log.seeds, opt.log.scalars
    z = {n: CounterNoise(seed, n).normal(p.numel()).view(p.shape).to(p.dtype)
         for n, p in start.items()}
    twin = copy.deepcopy(tuned)
    losses = []
    for side in (0.01, -0.01):
        for n, p in twin.named_parameters():
            p.data = start[n] + side * z[n]
        twin.model.eval()
        with torch.no_grad():
            losses.append(twin.model(**batch).loss)
    assert g == pytest.approx(float(losses[0] - losses[1]) / 0.02, rel=1e-4)
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p.detach(), start[n] - 0.1 * g * z[n])


class Counted:
    """What comes to a device for which this one stands."""

    def __init__(self, monkeypatch):
        self.brought, self.alone, self.most, self.there = {}, 0, 0, set()
        monkeypatch.setattr(Hosted, "away", True)
        bring, leave, weight = Hosted.bring, Hosted.leave, Hosted.weight

        def brings(held):
            if held._here is None:
                self.brought[id(held)] = self.brought.get(id(held), 0) + 1
            bring(held)
            self.there.add(id(held))
            self.most = max(self.most, len(self.there))

        def leaves(held):
            leave(held)
            self.there.discard(id(held))

        def weighs(held):
            self.alone += held._here is None
            return weight(held)

        monkeypatch.setattr(Hosted, "bring", brings)
        monkeypatch.setattr(Hosted, "leave", leaves)
        monkeypatch.setattr(Hosted, "weight", weighs)


def test_each_block_comes_once_a_step_and_two_are_there_at_most(monkeypatch):
    net, batch = tiny("llama", num_hidden_layers=5)
    tuned = burnish.tune(net, f"{BESIDE} + zo2")
    held = hosted([tuned.model])
    assert len(held) == 5 * 7
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)                            # the first one compares, and brings more
    seen = Counted(monkeypatch)
    tuned.step(batch)
    assert seen.brought == {id(p): 1 for p in held}
    assert seen.alone == 0 and seen.most == 2 * 7 and not seen.there


def test_outside_of_a_step_a_weight_comes_while_it_is_read(monkeypatch):
    net, batch = tiny("llama")
    plain = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, f"{BESIDE} + zo2")
    seen = Counted(monkeypatch)
    with torch.no_grad():
        assert torch.equal(tuned.model.eval()(**batch).loss, plain(**batch).loss)
    assert seen.alone and not seen.brought
    merged = tuned.merge()
    assert all(torch.equal(a, b) for a, b in zip(merged.state_dict().values(),
                                                 plain.state_dict().values(), strict=True))


def test_the_device_holds_two_blocks_whatever_the_depth():
    """Beside what trains and what is no matrix of a block, promised for a GPU."""
    def beside(layers, recipe):
        net, batch = tiny("llama", hidden_size=128, intermediate_size=256,
                          num_hidden_layers=layers)
        report = simulate(net, f"{BESIDE} + {recipe}", batch, device="cuda")
        own = sum(p.nbytes for p in burnish.tune(net, BESIDE, head=False).parameters())
        return report.peak_bytes - own, report.other_devices.get("cpu", 0)

    net, _ = tiny("llama", hidden_size=128, intermediate_size=256)
    block = sum(m.weight.nbytes for m in net.model.layers[0].modules()
                if isinstance(m, nn.Linear))
    few, host = beside(4, "zo2")
    many, hosts = beside(10, "zo2")
    assert many - few < 6 * block / 20           # norms
    assert host == 4 * block and hosts == 10 * block
    resident, _ = beside(10, "mezo")
    assert 7.5 * block < resident - many < 8.5 * block


def test_on_a_cpu_the_promise_is_what_is_measured():
    net, batch = tiny("gpt2")
    promise = simulate(copy.deepcopy(net), f"{BESIDE} + zo2", batch)
    tuned = burnish.tune(net, f"{BESIDE} + zo2")
    tuned.optimizer(lr=1e-3)
    assert promise.peak_bytes == measure(tuned, batch).peak_bytes


def test_moving_and_casting_the_model_leaves_the_weights_on_the_host():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"{BESIDE} + zo2")
    (first, *_) = hosted([tuned.model])
    want = first.held.bfloat16()
    tuned.model.to(torch.bfloat16)
    assert first.held.device.type == "cpu" and torch.equal(first.held, want)
    assert first.weight().dtype == torch.bfloat16


@pytest.mark.parametrize("recipe, error, words", [
    ("full + zo2", RecipeError, "frozen"),
    ("lora(rank=2, targets='embedding') + zo2", ConfigError, "before the first block"),
    ("prompt_tuning(length=2) + zo2", BurnishError, "before the first block"),
    ("nf4 + lora(rank=2) + zo2", RecipeError, "two storages"),
    ("lora(rank=2) + sam + zo2", RecipeError, "cannot be joined"),
    ("lora(rank=2) + o_lora + zo2", RecipeError, "cannot be joined")])
def test_refusals(recipe, error, words):
    with pytest.raises(error, match=words):
        run(recipe, "llama", steps=1)


def test_blocks_that_do_not_follow_each_other_are_refused():
    with pytest.raises(BurnishError, match="follow each other|single stack"):
        run(f"{BESIDE} + zo2", "t5", steps=1)


def test_a_loss_that_reads_other_states_is_refused():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"{BESIDE} + zo2")
    tuned.optimizer(lr=1e-3)
    batch["output_hidden_states"] = True
    with pytest.raises((ConfigError, RuntimeError, NotImplementedError)):
        tuned.step(batch, lambda out, _: out.loss + out.hidden_states[1].float().square().mean())


def test_a_failed_step_leaves_the_model_as_it_was():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"{BESIDE} + zo2")
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    before = [p.detach().clone() for p in tuned.parameters()]
    calls = []

    def broken(out, _):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("broken")
        return out.loss

    with pytest.raises(ValueError, match="broken"):
        tuned.step(batch, broken)
    assert all(torch.equal(a, p) for a, p in zip(before, tuned.parameters(), strict=True))
    assert net.config.use_cache
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks
                   for m in net.model.layers)
    assert torch.isfinite(tuned.step(batch))
