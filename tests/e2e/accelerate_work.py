"""A loop of one's own, as `accelerate launch` starts it (test_accelerate.py does)."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path

import torch
from accelerate import Accelerator

import burnish
from burnish.core.processes import leave

work = types.SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sharded_work.py"))))


def whole_in_each(tuned, accelerator):
    """DistributedDataParallel, by `prepare`: its loop is accelerate's."""
    opt = tuned.optimizer(1e-2)
    model = accelerator.prepare(tuned.model)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    losses = []
    for batch in work.batches()[:3]:
        part = {n: v.chunk(accelerator.num_processes)[accelerator.process_index]
                for n, v in batch.items()}
        opt.zero_grad()
        loss = work.loss_of(model(**part), part)
        accelerator.backward(loss)
        opt.step()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses


def in_shares(tuned, accelerator):
    burnish.shard(tuned)
    assert any(hasattr(p, "full_tensor") for p in tuned.model.parameters())
    return work.train(tuned, slice(0, 3), accelerator.process_index,
                      accelerator.num_processes)[0]


def main():
    torch.set_num_threads(1)
    way, recipes, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    accelerator, said = Accelerator(cpu=True), {}
    for n, recipe in enumerate(recipes):
        tuned = burnish.tune(work.model(), recipe)
        said[recipe] = (whole_in_each if way == "ddp" else in_shares)(tuned, accelerator)
        if way == "fsdp2" or accelerator.is_main_process:
            tuned.save(out / str(n))
    said["processes"] = accelerator.num_processes
    if accelerator.is_main_process:
        (out / "said.json").write_text(json.dumps(said))
    leave()


if __name__ == "__main__":
    main()
