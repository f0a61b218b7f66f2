"""A promise for one of several processes, held against several real ones (gloo)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.memory import simulate
from burnish.testing.models import tiny

WORK = Path(__file__).with_name("world_work.py")

JOBS = {
    "lora": dict(recipe="lora(rank=4)", shard="fsdp2", watched=True),
    "full": dict(recipe="full", shard="fsdp2", watched=True),
    "again": dict(recipe="full + checkpoint", shard="fsdp2"),
    "offloaded": dict(recipe="full", shard="fsdp2", shard_offload=True),
    "snella": dict(recipe="snella(rank=2)", shard="fsdp2"),
    "zeroth order": dict(recipe="lora(rank=4) + mezo", shard="fsdp2"),
    "a trained head": dict(recipe="lora(rank=4)", kind="bert", shard="fsdp2"),
    "buckets": dict(recipe="full", shard="ddp", watched=True),
    "small buckets": dict(recipe="lora(rank=4)", kind="vit", shard="ddp"),
}


def together(world):
    """What each of so many processes has measured of itself."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
           "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": port}
    runs = [subprocess.Popen([sys.executable, WORK, json.dumps(JOBS)], text=True,
                             env={**env, "RANK": str(r)}, stdout=subprocess.PIPE)
            for r in range(world)]
    said = [r.communicate(timeout=300)[0] for r in runs]
    assert [r.returncode for r in runs] == [0] * world
    return [json.loads(s.splitlines()[-1]) for s in said]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_each_process_takes_what_was_promised_for_it(world):
    """To the byte, by the ledger on the real step; and by the allocator, which no ledger asks."""
    said = together(world)
    for name, job in JOBS.items():
        model, batch = tiny(job.get("kind", "llama"), batch=2)
        how = dict(shard=job["shard"], shard_offload=job.get("shard_offload", False))
        promised = simulate(model, job["recipe"], batch, world_size=world, **how)
        for each in (s[name] for s in said):
            assert each["peak"] == promised.peak_bytes, name
            assert (each["world"], each["shard"]) == (world, job["shard"])
            assert each["trainable"] == promised.trainable > 0
            if job["shard"] == "fsdp2":
                assert each["parts"] == promised.by_category, name
            for part in ("weights", "optimizer", "activations"):
                assert each["parts"][part] == promised.by_category[part], name
            if "outside" in each:                # but for scalars inside kernels, and integers that
                off = abs(each["outside"] - promised.peak_bytes)     # the reducer counts with
                assert off <= 256, (name, off)
