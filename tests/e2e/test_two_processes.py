"""Two processes under gloo learn what one does with the same rows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from burnish.fit import checkpoint
from burnish.formats import safe

CALL = """
import sys, torch, burnish
torch.set_num_threads(1)
burnish.fit(sys.argv[1], "digits", "lora(rank=4)", output=sys.argv[2], max_steps=4,
            batch_size=int(sys.argv[3]), save_steps=2, eval_steps=2, lr=1e-2, report=False,
            test=False, measure=False, quiet=True, seed=5)
"""


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    from burnish.fit.pictures import Picture
    torch.manual_seed(0)
    model = tmp_path / "vit"
    ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10)).save_pretrained(model)
    Picture(8, 8, (0.5,), (0.5,)).save_pretrained(model)

    source = str(Path(__file__).resolve().parents[2] / "src")
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    many = {**env, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    both = [subprocess.Popen([sys.executable, "-c", CALL, model, tmp_path / "two", "4"],
                             env={**many, "RANK": r, "LOCAL_RANK": r}) for r in "01"]
    assert [p.wait(300) for p in both] == [0, 0]
    subprocess.run([sys.executable, "-c", CALL, model, tmp_path / "one", "8"], env=env, check=True)

    one, two = (safe.load_file(tmp_path / n / "adapter_model.safetensors")
                for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name
    newest = checkpoint.all_in(tmp_path / "two")[-1]
    assert {"rng-0.json", "rng-1.json"} <= {p.name for p in newest.iterdir()}
