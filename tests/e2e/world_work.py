"""What each of several processes takes (test_world.py holds it against promises)."""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.core.processes import leave
from burnish.engine.spread import let_go
from burnish.testing.models import tiny


class Patient(TorchDispatchMode):
    """After every collective gloo's threads get time to let go of its tensors: they wake who waits
    first, and on a busy machine they keep a buffer over several operators."""

    after = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(t, "full_tensor") for t in types):
            return NotImplemented
        if self.after:
            time.sleep(0.005)
        self.after = func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def allocated(step) -> int:
    """Highest sum of allocations minus releases that PyTorch's CPU allocator reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p, Patient():
        step()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def held(values) -> int:
    """Bytes of the storages of tensors, this process's part of those in shares."""
    parts = [getattr(t, "_local_tensor", t).untyped_storage() for t in values
             if isinstance(t, torch.Tensor)]
    return sum({s._cdata: s.nbytes() for s in parts}.values())


def said_of(job):
    made, batch = tiny(job.get("kind", "llama"), batch=2)
    tuned, through = burnish.tune(made, job["recipe"]), None
    if job["shard"] == "fsdp2":
        burnish.shard(tuned, offload=job.get("shard_offload", False))
    opt = tuned.optimizer()
    if job["shard"] == "ddp":
        through = DistributedDataParallel(made, find_unused_parameters=True)
    report = burnish.measure(tuned, batch, through=through)
    said = dict(peak=report.peak_bytes, parts=report.by_category, trainable=report.trainable,
                world=report.world_size, shard=report.shard)
    if "watched" in job:                             # from outside, without a ledger
        tuned.steps.through = through
        copies = [t for t in tuned.originals.kept.values() if isinstance(t, torch.Tensor)]
        buckets = sum(p.nbytes for p in tuned.parameters()) if through else 0
        peaks = []
        for _ in range(4):
            tuned.step(batch)
            opt.zero_grad()
            let_go(tuned)
            rest = held([*made.parameters(), *made.buffers(), *batch.values(), *copies,
                         *(t for s in opt.state.values() for t in s.values())])
            peaks.append(rest + buckets + allocated(lambda: tuned.step(batch)))
        said["outside"] = min(peaks)                 # gloo's threads let go of their copies late
    return said


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said = {}
    for name, job in json.loads(sys.argv[1]).items():
        said[name] = said_of(job)
    print("\n" + json.dumps(said), flush=True)
    leave()


if __name__ == "__main__":
    main()
