"""Two processes under gloo: what acts around a pass, and steps that see one process's rows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from burnish.core.processes import processes

#: each process has its own rows; what is trained, and what the other process sees, is printed
CALL = """
import json, sys, torch, torch.distributed as dist, burnish
from burnish.core.processes import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
g = torch.Generator().manual_seed(1)
x, y = torch.randn(4, 8, 6, generator=g).double(), torch.randn(4, 8, 3, generator=g).double()
mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
tuned = burnish.tune(net, sys.argv[1], head=True)
try:
    opt = tuned.optimizer(float(sys.argv[2]))
except burnish.BurnishError as e:
    print(json.dumps(str(e)), flush=True)
    leave()
mse = lambda out, batch: (out - batch[1]).square().mean()
shared = DDP(net)
for a, b in zip(x, y):
    batch = a[mine], b[mine]
    def whole():
        from contextlib import nullcontext
        with shared.no_sync() if tuned.steps.still else nullcontext():
            loss = mse(shared(batch[0]), batch)
            loss.backward()
        return loss.detach()
    if getattr(opt, "zeroth_order", False):
        tuned.step(batch, mse)
        continue
    opt.zero_grad()
    tuned.around(whole, lambda: mse(net(batch[0]), batch))
    opt.step()
print(json.dumps([p.tolist() for p in net.parameters()]), flush=True)
leave()
"""


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def both(recipe, lr):
    """What each of two processes prints."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
           "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port())}
    runs = [subprocess.Popen([sys.executable, "-c", CALL, recipe, str(lr)], text=True,
                             env={**env, "RANK": r}, stdout=subprocess.PIPE) for r in "01"]
    said = [r.communicate(timeout=300)[0] for r in runs]
    assert [r.returncode for r in runs] == [0, 0]
    return [json.loads(s.splitlines()[-1]) for s in said]


def start():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    g = torch.Generator().manual_seed(1)
    return net, torch.randn(4, 8, 6, generator=g).double(), torch.randn(4, 8, 3, generator=g
                                                                        ).double()


@pytest.mark.slow
def test_sam_takes_the_mean_of_each_processs_own_ascent():
    """e_k = rho g_k / ||g_k|| of process k's rows (m-sharpness); both step along the mean of
    the gradients at w + e_k, and hold the same weights. In plain fp64."""
    one, two = both("full + sam(radius=0.5) + sgd", 0.1)
    assert one == two
    net, x, y = start()
    params = list(net.parameters())
    for a, b in zip(x, y, strict=True):
        found = []
        for rows in (slice(0, 4), slice(4, 8)):
            def loss(rows=rows, a=a, b=b):
                return (net(a[rows]) - b[rows]).square().mean()

            g = torch.autograd.grad(loss(), params)
            size = torch.cat([t.flatten() for t in g]).norm()
            kept = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, t in zip(params, g, strict=True):
                    p.add_(t, alpha=float(0.5 / size))
            found.append(torch.autograd.grad(loss(), params))
            with torch.no_grad():
                for p, w in zip(params, kept, strict=True):
                    p.copy_(w)
        with torch.no_grad():
            for p, g0, g1 in zip(params, *found, strict=True):
                p.sub_(0.1 * (g0 + g1) / 2)
    for got, want in zip(one, params, strict=True):
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want.detach(),
                                   rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_evaluations_are_of_all_rows():
    """mezo over two processes takes the steps of one that sees the rows of both."""
    import burnish

    one, two = both("full + mezo", 0.1)
    assert one == two
    net, x, y = start()
    tuned = burnish.tune(net, "full + mezo", head=True)
    tuned.optimizer(0.1)
    for batch in zip(x, y, strict=True):
        tuned.step(batch, lambda out, b: (out - b[1]).square().mean())
    for got, want in zip(one, net.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want.detach(),
                                   rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, word", [
    ("full + sgd + step_in_backward", "before 2 processes"),
    ("greentrainer", "one process")])
def test_what_would_part_the_processes_is_refused(recipe, word):
    assert all(word in said for said in both(recipe, 0.1))
    assert processes() == 1, "of this one"
