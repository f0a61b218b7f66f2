"""The ledger against hand counts, and against what the allocator itself reports."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from burnish.memory import Ledger, MemoryReport

from .blocks import D, Net


def allocated_peak(step) -> int:
    """Highest sum of allocations minus releases that PyTorch's CPU allocator reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        step()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def size(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def make(frozen=False, **kw):
    net = Net(**kw)
    if frozen:
        net.requires_grad_(False)
        net.head.requires_grad_(True)
        net.blocks[1].fc1.requires_grad_(True)
    x, y = torch.randn(4, 32, D), torch.zeros(4, dtype=torch.long)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)

    def step():
        opt.zero_grad()
        net(x, y)["loss"].backward()
        opt.step()
    return net, (x, y), opt, step


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_peak_is_the_allocators(frozen, eager):
    net, batch, opt, step = make(frozen, eager=eager)
    step()
    opt.zero_grad()
    state = [t for s in opt.state.values() for t in s.values()]
    base = size([*net.parameters(), *batch, *state])
    with Ledger(net) as ledger:
        ledger.watch("activations", batch)
        ledger.watch("optimizer", state)
        step()
    opt.zero_grad()
    # up to a few scalars that kernels allocate and release inside themselves
    assert MemoryReport.of(ledger).peak_bytes == pytest.approx(base + allocated_peak(step), abs=64)


@pytest.mark.parametrize("frozen", [False, True])
def test_fake_step_reads_as_the_real_one(frozen):
    def read():
        net, batch, opt, step = make(frozen)
        with Ledger(net, count=True) as ledger:
            ledger.watch("activations", batch)
            step()
            step()
        return MemoryReport.of(ledger)

    real = read()
    with FakeTensorMode():
        fake = read()
    assert fake == real


def test_categories_hold_what_their_names_say():
    net, batch, opt, step = make(frozen=True)
    with Ledger(net) as ledger:
        ledger.watch("activations", batch)
        step()
        step()
    trained = size(p for p in net.parameters() if p.requires_grad)
    held = {}
    for e, category, birth, death in ledger.lived():
        if birth <= ledger.now < death:
            held[category] = held.get(category, 0) + e.bytes
    assert held["weights"] == size(net.parameters())
    assert held["gradients"] == trained
    counters = 4 * sum(p.requires_grad for p in net.parameters())
    assert held["optimizer"] == 2 * trained + counters
    assert held["activations"] == size(batch)


def test_activations_are_what_forward_leaves_for_backward():
    net, batch, opt, step = make()
    with Ledger(net) as ledger:
        step()
    start = ledger.backward_starts[0]
    kept = sum(e.bytes for e, c, birth, death in ledger.lived()
               if c == "activations" and birth <= start < death)
    counted = 0
    seen = set()
    own = {p.untyped_storage()._cdata for p in net.parameters()} | \
        {t.untyped_storage()._cdata for t in batch}

    def pack(t):
        nonlocal counted
        key = t.untyped_storage()._cdata
        if key not in own and key not in seen:
            seen.add(key)
            held.append(t)
            counted += t.untyped_storage().nbytes()
        return t

    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = net(*batch)["loss"]
    # the loss and the one that seeds backward are alive and saved by nobody
    assert kept == counted + 2 * loss.untyped_storage().nbytes()


def test_views_and_in_place_operators_are_counted_once():
    with Ledger() as ledger:
        x = torch.zeros(1000)
        y = x.view(10, 100).t()[3:]
        x.add_(1)
        z = y * 2
    sizes = [e.bytes for e in ledger.entries]
    assert sizes == [4000, z.untyped_storage().nbytes()]


def test_a_resized_storage_changes_its_entry():
    with Ledger() as ledger:
        x = torch.zeros(10)
        x.resize_(1000)
    alive = [e.bytes for e in ledger.entries if e.death is None]
    assert alive == [4000]


def test_it_keeps_no_tensor_alive():
    with Ledger() as ledger:
        x = torch.zeros(1000)
        ref = weakref.ref(x)
        del x
        assert ref() is None
        y = torch.zeros(10)
        assert [e.death is None for e in ledger.entries] == [False, True]
        del y
    gc.collect()
    assert all(e.death is not None for e in ledger.entries)


def test_hooks_are_gone_afterwards():
    net, batch, opt, step = make()
    before = {p: len(p._backward_hooks or ()) for p in net.parameters()}
    with pytest.raises(RuntimeError, match="stop"), Ledger(net) as ledger:
        step()
        raise RuntimeError("stop")
    assert {p: len(p._backward_hooks or ()) for p in net.parameters()} == before
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    count = len(ledger.entries)
    step()
    assert len(ledger.entries) == count


def test_backward_is_charged_to_the_module_it_belongs_to():
    net, batch, opt, step = make()
    with Ledger(net) as ledger:
        step()
    grads = {e.module for e in ledger.entries
             if e.category == "gradients" and e.phase == "backward"}
    assert {"blocks.0.fc1", "blocks.1.q", "head"} <= grads
    state = {e.module for e in ledger.entries if e.category == "optimizer"}
    assert "blocks.1.fc2" in state


def test_phases_run_in_order():
    net, batch, opt, step = make()
    with Ledger(net) as ledger:
        step()
        step()
    assert [p for p, _ in ledger.phases if p != "loss"] == \
        ["forward", "backward", "update", "forward", "backward"]


def test_recomputation_belongs_to_backward_and_leaves_only_inputs():
    class Checked(Net):
        def forward(self, x, labels):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return {"loss": nn.functional.cross_entropy(self.head(x.mean(1)), labels)}

    plain, checked = Net(blocks=4), Checked(blocks=4)
    x, y = torch.randn(4, 64, D).requires_grad_(), torch.zeros(4, dtype=torch.long)
    held = {}
    for name, net in (("plain", plain), ("checked", checked)):
        with Ledger(net) as ledger:
            ledger.watch("activations", [x, y])
            net(x, y)["loss"].backward()
        held[name] = MemoryReport.of(ledger)
    parts = {name: r.by_category for name, r in held.items()}
    assert parts["checked"]["activations"] < 0.3 * parts["plain"]["activations"]
    assert parts["checked"]["temporary"] > parts["plain"]["temporary"]
    assert held["checked"].peak_bytes < 0.7 * held["plain"].peak_bytes
    again = [e for e in ledger.entries if e.phase == "backward" and "blocks." in e.module]
    assert again


def test_step_in_backward_gradients_are_still_gradients():
    net = Net()
    x, y = torch.randn(2, 8, D), torch.zeros(2, dtype=torch.long)

    def apply(p):
        p.data.add_(p.grad, alpha=-0.1)
        p.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(apply)
    with Ledger(net) as ledger:
        net(x, y)["loss"].backward()
    born = sum(e.bytes for e in ledger.entries if e.category == "gradients")
    assert born == size(net.parameters())
    assert not any(e.death is None for e in ledger.entries if e.category == "gradients")


def test_operations_are_counted_as_by_the_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    net, batch, opt, step = make(eager=True)
    with FlopCounterMode(display=False) as counter:
        step()
    with Ledger(net, count=True) as ledger:
        step()
    assert sum(ledger.flops.values()) == counter.get_total_flops()
    assert ledger.flops["backward"] > 1.8 * ledger.flops["forward"]
    assert ledger.traffic["update"] > 0


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match="gradients"):
        Ledger().watch("grads", [])
