"""`accelerate launch` of a script: what two processes learn is what one does."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import burnish
from burnish.formats import safe

HERE = Path(__file__).parent
work = types.SimpleNamespace(**runpy.run_path(str(HERE / "sharded_work.py")))
RECIPES = ["lora(rank=2)", "full"]
#: --multi_gpu is accelerate's word for several processes of one machine
ASKED = {"ddp": ["--multi_gpu"],
         "fsdp2": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "NO_WRAP"]}


@pytest.mark.slow
@pytest.mark.parametrize("way", ASKED)
def test_two_processes_that_accelerate_launches_learn_what_one_does(way, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "OMP_NUM_THREADS": "1",
           "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
    call = [sys.executable, "-m", "accelerate.commands.launch", *ASKED[way], "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", port, HERE / "accelerate_work.py", way, json.dumps(RECIPES),
            tmp_path]
    ran = subprocess.run(call, env=env, text=True, capture_output=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["processes"] == 2
    for n, recipe in enumerate(RECIPES):
        tuned = burnish.tune(work.model(), recipe)
        losses, _ = work.train(tuned, slice(0, 3))
        assert said[recipe] == pytest.approx(losses, rel=1e-7), recipe
        tuned.save(tmp_path / "one" / str(n))
        one, two = (safe.load_file(folder / str(n) / "adapter_model.safetensors")
                    for folder in (tmp_path / "one", tmp_path))
        assert one.keys() == two.keys()
        for name in one:
            off = (two[name].double() - one[name].double()).norm()
            assert float(off) <= 1e-4 * float(one[name].double().norm()) + 1e-13, name
