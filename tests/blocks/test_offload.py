"""Offload: what waits is written and read beside the computation, by block, and nothing is left."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.tape import spool
from burnish.blocks.tape.executor import checkpoint
from burnish.blocks.tape.offload import Offload, kept_from
from burnish.blocks.tape.saved import Tape
from burnish.core.errors import BurnishError, RecipeError
from burnish.testing.models import tiny

D, N, L = 8, 16, 5
WIDE = N * 4 * D * 8                             # bytes of what fc1 makes
LIMIT = 20                                       # seconds after which a wait has failed


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        h = torch.tanh(self.fc1(x))
        dropped = F.dropout(h, 0.2)
        self.probes = [weakref.ref(t.untyped_storage()) for t in (h, dropped)]
        return x + self.fc2(dropped)


def blocks(n=L):
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(n)).double()


def given():
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, D, dtype=torch.float64, generator=g).requires_grad_()


def run(stack, x, tape=None, before=lambda i: None):
    torch.manual_seed(2)
    if tape is None:
        for b in stack:
            x = b(x)
        return x.sum()
    with tape.recording():
        for i, b in enumerate(stack):
            before(i)
            tape.policy.enter()
            x = b(x)
    return x.sum()


def gradients(loss, x, stack, **kw):
    return torch.autograd.grad(loss, [x, *stack.parameters()], **kw)


def same(a, b):
    for s, t in zip(a, b, strict=True):
        assert torch.equal(s, t)


@pytest.fixture
def policy(tmp_path):
    return Offload("disk", threshold=1, folder=str(tmp_path))


@pytest.fixture
def want():
    stack, x = blocks(), given()
    return gradients(run(stack, x), x, stack)


@pytest.mark.parametrize("lean", [True, False])
def test_gradients_are_bit_equal(policy, want, lean):                           # findings 3.9
    stack, x = blocks(), given()
    same(want, gradients(run(stack, x, Tape(lean, policy)), x, stack))
    assert policy.bytes_written > 0


def waiting(policy, n=L):
    """Of each block: do the first and the last that it keeps stand in memory before backward?"""
    stack = blocks(n)
    loss = run(stack, given(), Tape(False, policy))
    return [[p() is not None for p in b.probes] for b in stack], loss


def test_the_last_block_stands_in_memory_and_is_never_written(policy):          # findings 3.9
    alive, _loss = waiting(policy)
    assert alive == [[False] * 2] * (L - 2) + [[False, True], [True, True]]
    one = policy.bytes_written / (L - 1)            # of each block but the last
    assert one >= 2 * WIDE and policy.bytes_written < L * one
    again = Offload("disk", threshold=1)
    waiting(again, L + 1)
    assert again.bytes_written - policy.bytes_written == one


def test_each_storage_is_written_once_and_its_views_come_back(policy):
    x = given()
    with Tape(False, policy).recording():
        policy.enter()
        h = x * 2
        y = h.sin() + h.t().cos().t() + (h[:, :4] * h[:, 4:]).repeat(1, 2)
        policy.enter()
        z = y.exp()
        policy.enter()
        loss = z.sin().tanh().sum()
    assert policy.bytes_written == 2 * N * D * 8    # h once, and what exp keeps
    (got,) = torch.autograd.grad(loss, x)
    h = x * 2
    y = h.sin() + h.t().cos().t() + (h[:, :4] * h[:, 4:]).repeat(1, 2)
    (want,) = torch.autograd.grad(y.exp().sin().tanh().sum(), x)
    assert torch.equal(got, want)


def test_writes_go_on_while_the_next_block_runs(policy, want, monkeypatch):     # findings 3.9
    """Each write waits until a later block has begun: in turn, they would wait for ever."""
    begun, late, put = threading.Semaphore(0), [], spool.put

    def slow(*args):
        late.append(not begun.acquire(timeout=LIMIT))
        return put(*args)

    monkeypatch.setattr(spool, "put", slow)
    stack, x = blocks(), given()
    for b in stack:                                  # in the middle of a block's run
        b.fc1.register_forward_hook(lambda m, a, y: [begun.release() for _ in range(9)] and None)
    loss = run(stack, x, Tape(False, policy))
    same(want, gradients(loss, x, stack))
    assert late and not any(late)


def test_the_block_before_is_read_while_a_block_goes_backward(policy, want, monkeypatch):
    """findings 3.9. Each read waits until backward has passed a later block."""
    passed, late, get = threading.Semaphore(0), [], spool.get

    def slow(*args):
        late.append(not passed.acquire(timeout=LIMIT))
        return get(*args)

    monkeypatch.setattr(spool, "get", slow)
    stack, x = blocks(), given()
    for b in stack:                                  # in the middle of a block's backward
        b.fc2.register_forward_pre_hook(lambda m, a: a[0].register_hook(
            lambda g: [passed.release() for _ in range(9)] and None) and None)
    loss = run(stack, x, Tape(False, policy))
    same(want, gradients(loss, x, stack))
    assert late and not any(late)


def test_what_is_asked_for_while_it_is_written_comes_from_memory(policy, monkeypatch):
    """findings 3.9. Of two blocks the last write of the first is under way until backward is over.
    """
    over, put, get, slow = threading.Event(), spool.put, spool.get, []
    stack, x = blocks(2), given()
    want = gradients(run(stack, x), x, stack)
    starts, begun = [], threading.Event()

    def write(file, view, at):
        starts.append(at)
        if len(starts) == 4:                         # x, tanh, the mask, what was dropped
            slow.append(at)
            begun.set()
            over.wait(LIMIT)
        return put(file, view, at)

    def read(file, view, at):
        assert at not in slow, "it was read"
        return get(file, view, at)

    monkeypatch.setattr(spool, "put", write)
    monkeypatch.setattr(spool, "get", read)
    out = run(stack, x, Tape(False, policy))
    assert begun.wait(LIMIT)
    got = gradients(out, x, stack)
    assert not over.is_set() and slow
    over.set()
    same(want, got)


def test_backward_may_come_twice_and_two_forwards_before_it(policy, want):
    stack, x = blocks(), given()
    tape = Tape(True, policy)
    loss = run(stack, x, tape)
    other = run(stack, x, tape)
    for keep in (True, False):
        same(want, gradients(loss, x, stack, retain_graph=keep))
    same(want, gradients(other, x, stack))


def test_two_threads_offload_at_once(policy):
    def pure(b, x):
        return x + b.fc2(torch.tanh(b.fc1(x)))

    stack, got = blocks(), [None] * 4
    for b in stack:
        b.forward = lambda x, b=b: pure(b, x)
    x = given()
    want = gradients(run(stack, x), x, stack)
    tape = Tape(True, policy)

    def work(k):
        mine = given()
        got[k] = gradients(run(stack, mine, tape), mine, stack)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for g in got:
        same(want, g)


def size(policy):
    return os.fstat(policy.file.file.fileno()).st_size


def test_nothing_has_a_name_on_disk_and_space_is_given_back(policy, tmp_path):
    """Whatever ends the process, no file is left; what a backward has used is free."""
    stack, x = blocks(), given()
    loss = run(stack, x, Tape(True, policy))
    assert size(policy) > 0 and not list(tmp_path.iterdir())
    gradients(loss, x, stack)
    del loss
    assert size(policy) == 0
    first = policy.bytes_written
    peak = []
    for _ in range(3):
        loss = run(stack, x, Tape(True, policy))
        peak.append(size(policy))
        gradients(loss, x, stack)
    assert max(peak) <= first and policy.bytes_written == 4 * first


@pytest.mark.parametrize("at", [2, L - 1])
def test_an_interrupted_forward_leaves_nothing(policy, tmp_path, at):
    def interrupt(i):
        if i == at:
            raise KeyboardInterrupt

    stack, x = blocks(), given()
    with pytest.raises(KeyboardInterrupt):
        run(stack, x, Tape(True, policy), interrupt)
    gc.collect()
    policy.file._threads.shutdown()                  # what was under way is over
    assert size(policy) == 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_run_leaves_nothing(tmp_path):
    code = f"""
import os, signal, torch
from burnish.blocks.tape.offload import Offload
from burnish.blocks.tape.saved import Tape
x = torch.randn(64, 64, requires_grad=True)
policy = Offload("disk", 1, {str(tmp_path)!r})
with Tape(False, policy).recording():
    y = x.sin().cos().exp().sin().sin()
assert policy.bytes_written
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not list(tmp_path.iterdir())


def test_a_full_disk_stops_the_step_and_the_next_goes_on(policy, want, monkeypatch):
    """findings 3.9"""
    put, full = spool.put, [True]

    def write(file, view, at):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return put(file, view, at)

    monkeypatch.setattr(spool, "put", write)
    stack, x = blocks(), given()
    with pytest.raises(BurnishError, match="No space left on device; choose another folder"):
        run(stack, x, Tape(True, policy))
    gc.collect()
    full[0] = False
    same(want, gradients(run(stack, x, Tape(True, policy)), x, stack))


def test_a_disk_that_cannot_be_read_stops_backward(policy, monkeypatch):
    stack, x = blocks(), given()
    loss = run(stack, x, Tape(True, policy))
    monkeypatch.setattr(spool, "get", lambda *a: 0)
    with pytest.raises(BurnishError, match="holds less than"):
        gradients(loss, x, stack)


def test_a_file_that_is_cut_short_stops_backward_and_the_next_step_goes_on(policy, want):
    stack, x = blocks(), given()
    loss = run(stack, x, Tape(True, policy))
    os.ftruncate(policy.file.file.fileno(), size(policy) // 2)
    with pytest.raises(BurnishError, match="holds less than"):
        gradients(loss, x, stack)
    del loss
    gc.collect()
    for p in (x, *stack.parameters()):
        p.grad = None
    same(want, gradients(run(stack, x, Tape(True, policy)), x, stack))


def test_a_writer_that_takes_a_little_at_a_time(policy, want, monkeypatch):
    put, get = spool.put, spool.get
    monkeypatch.setattr(spool, "put", lambda f, v, at: put(f, v[:100], at))
    monkeypatch.setattr(spool, "get", lambda f, v, at: get(f, v[:100], at))
    stack, x = blocks(), given()
    same(want, gradients(run(stack, x, Tape(True, policy)), x, stack))


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_takes_no_file_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot wait in .*; choose another folder"):
        Offload("disk", folder=str(tmp_path / folder))


def test_a_change_the_tape_sees_comes_after_the_bytes_have_left(policy):
    x = given()
    with Tape(True, policy).recording():
        policy.enter()
        h = x * 2
        first = h.sin()
        with torch.no_grad():
            h.mul_(3)
    (got,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(got, 2 * (x * 2).cos())


def test_a_change_nobody_sees_raises_as_in_stock_torch(policy):
    x = given()
    with Tape(False, policy).recording():
        policy.enter()
        h = x * 2
        first = h.sin()
    with torch.no_grad():
        h.mul_(3)
    with pytest.raises(RuntimeError, match="modified in place"):
        first.sum().backward()


def test_what_runs_again_in_backward_is_not_written(policy, want):
    """Under checkpoint block inputs move, and the live block stays."""
    stack, x, tape = blocks(), given(), Tape(False, policy)
    torch.manual_seed(2)
    h = x
    with tape.recording():
        for b in stack:
            h = checkpoint(b, lambda x, b=b: (policy.enter(), b(x))[1], (h,), {}, tape)
    same(want, gradients(h.sum(), x, stack))
    assert policy.bytes_written == (L - 1) * N * D * 8


# -- the budget ---------------------------------------------------------------------------
@pytest.mark.parametrize("bandwidth", [0.1, 1.0, 2.0, 3.0, 4.5, 7.0, 50.0])
def test_the_first_block_a_disk_cannot_take_in_time(bandwidth):                 # findings 3.9
    V, t = [4.0, 1.0, 7.0, 2.0, 6.0, 3.0], [1.0, 2.0, 0.5, 1.0, 3.0, 0.5]
    required = torch.tensor([(sum(V[:n]) + 2 * V[n]) / (3 * sum(t) - 2 * sum(t[:n]))
                             for n in range(6)])
    over = (required > bandwidth).nonzero().flatten().tolist()
    assert kept_from(V, t, bandwidth) == (over[0] if over else None)


class Clock:
    """Time that passes where the test says: a second a block, so many a byte that is written."""

    def __init__(self, monkeypatch, write):
        self.computing = self.writing = 0.0
        put = spool.put
        monkeypatch.setattr(spool, "WORKERS", 1)
        monkeypatch.setattr(spool, "clock", lambda: self.writing if threading.current_thread()
                            is not threading.main_thread() else self.computing)

        def slow(file, view, at):
            n = put(file, view, at)
            self.writing += write * n
            return n

        monkeypatch.setattr(spool, "put", slow)

    def block(self, i):
        self.computing += 1.0


@pytest.mark.parametrize("write, takes", [(1e-9, "all"), (1.0, "nothing")])
def test_forwards_two_and_three_say_what_a_disk_takes(monkeypatch, write, takes):
    """findings 3.9. The third forward is written whole; the fourth as the disk can."""
    clock = Clock(monkeypatch, write)
    policy = Offload("disk", threshold=1, in_time=True)
    stack, x, written = blocks(), given(), []
    want = gradients(run(stack, x), x, stack)
    for _ in range(5):
        before = policy.bytes_written
        same(want, gradients(run(stack, x, Tape(False, policy), clock.block), x, stack))
        written.append(policy.bytes_written - before)
    assert len(set(written[:3])) == 1 and written[0] > 0
    assert written[3:] == [written[0] if takes == "all" else 0] * 2


def test_a_budget_needs_a_disk():
    with pytest.raises(RecipeError, match="a disk for in_time"):
        burnish.parse("offload(in_time=True)")
    with pytest.raises(RecipeError, match="0 bytes or more"):
        burnish.parse("offload(threshold=-1)")
    assert burnish.parse("offload(threshold=0)")


def test_a_recipe_tells_the_policy_where_blocks_begin():
    net, batch = tiny("bert")
    net.eval()
    before = net(**batch).logits
    tuned = burnish.tune(net, "lora(rank=2) + offload(to='disk', threshold=1)")
    policy, entered = tuned.state.tape.policy, []
    policy.enter = lambda: entered.append(True)
    assert torch.equal(net(**batch).logits, before)
    assert len(entered) == len(tuned.anatomy.blocks) == 2


def test_states_of_a_backbone_are_kept_beside_it(tmp_path):
    """It decides where kept tensors wait and nothing of what a block computes."""
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"lst(reduction=4, cache={str(tmp_path / 'taps')!r}) + "
                              "offload(threshold=0)", head=False)
    first = tuned.loss(batch)
    assert torch.equal(first, tuned.loss(batch)) and any((tmp_path / "taps").iterdir())
