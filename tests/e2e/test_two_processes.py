"""Two processes under gloo learn what one does with the same rows."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from burnish.fit import checkpoint
from burnish.formats import safe

CALL = """
import json, sys, torch, burnish
from burnish.core import processes
torch.set_num_threads(1)
model, output, recipe, size, more = sys.argv[1:]
how = {"measure": False, **json.loads(more)}
try:
    burnish.fit(model, how.pop("data", "digits"), recipe, output=output, max_steps=4,
                batch_size=int(size), save_steps=2, eval_steps=2, lr=1e-2, report=False,
                test=False, quiet=True, seed=5, **how)
except burnish.BurnishError as e:
    sys.exit(f"{type(e).__name__}: {e}")
processes.leave()
"""


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification

    from burnish.fit.pictures import Picture
    torch.manual_seed(0)
    model = tmp_path_factory.mktemp("models") / "vit"
    ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10)).save_pretrained(model)
    Picture(8, 8, (0.5,), (0.5,)).save_pretrained(model)
    return model


def run(processes, model, output, recipe, size, start=None, env=(), **more):
    """One run in so many processes, going on from a checkpoint of another; the last words of
    each."""
    if start is not None:
        shutil.copytree(start, output / start.name)
        more["resume"] = True
    source = str(Path(__file__).resolve().parents[2] / "src")
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1",
           "PYTHONFAULTHANDLER": "1", **dict(env)}
    call = [sys.executable, "-c", CALL, model, output, recipe, str(size), json.dumps(more)]
    if processes == 1:
        each = [env]
    else:
        many = {**env, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port())}
        each = [{**many, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    runs = [subprocess.Popen(call, env=e, stderr=subprocess.PIPE, text=True) for e in each]
    said = [r.communicate(timeout=300)[1] for r in runs]
    if any(r.returncode for r in runs):
        return [(f"ended with {r.returncode}\n" + s.strip()).splitlines()[-1]
                for r, s in zip(runs, said, strict=True)]
    return [""] * processes


def same(one, two, file="adapter_model.safetensors"):
    a, b = (safe.load_file(folder / file) for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5), name


@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one(vit, tmp_path):
    assert run(2, vit, tmp_path / "two", "lora(rank=4)", 4) == ["", ""]
    assert run(1, vit, tmp_path / "one", "lora(rank=4)", 8) == [""]
    same(tmp_path / "one", tmp_path / "two")
    newest = checkpoint.all_in(tmp_path / "two")[-1]
    assert {"rng-0.json", "rng-1.json"} <= {p.name for p in newest.iterdir()}


@pytest.mark.slow
def test_shares_of_a_model_end_in_its_weights_and_either_goes_on_from_the_other(vit, tmp_path):
    """FSDP2 in two processes, one process, and each from the other's checkpoint of half way:
    the same weights and moments, whole in every file."""
    two, one = tmp_path / "two", tmp_path / "one"
    assert run(2, vit, two, "full", 4, shard="fsdp2", shard_offload=True) == ["", ""]
    assert run(1, vit, one, "full", 8) == [""]
    same(one, two)
    back, on = tmp_path / "back", tmp_path / "on"
    assert run(1, vit, back, "full", 8, start=two / "checkpoint-2") == [""]
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}     # as accelerate launch says it
    assert run(2, vit, on, "full", 4, start=one / "checkpoint-2", env=asked) == ["", ""]
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        for other in (two, back, on):
            same(one / "checkpoint-4", other / "checkpoint-4", file)


@pytest.mark.slow
def test_two_processes_go_on_from_one_with_as_many_rows_an_update(vit, tmp_path):
    one = tmp_path / "one"
    assert run(1, vit, one, "lora(rank=4)", 8) == [""]
    assert run(2, vit, tmp_path / "on", "lora(rank=4)", 4, start=one / "checkpoint-2") == ["", ""]
    same(one / "checkpoint-4", tmp_path / "on" / "checkpoint-4")
    said = run(2, vit, tmp_path / "more", "lora(rank=4)", 8, start=one / "checkpoint-2")
    assert all("its rows is 8, this run's is 16" in s for s in said)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A small encoder without dropout, which processes draw apart, and texts of unlike length."""
    from burnish.testing.tasks import texts

    folder = tmp_path_factory.mktemp("classes")
    model, tokenizer = texts("text-classification")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder / "base"), tokenizer.save_pretrained(folder / "base")
    rows = [{"text": "ab" * (1 + i * 7 % 31), "label": "xy"[i % 2]} for i in range(72)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.slow
def test_rows_of_like_length_are_the_same_in_two_processes_and_when_one_goes_on(classes, tmp_path):
    how = {"data": str(classes / "rows.jsonl"), "group_by_length": True}
    base, two, one = classes / "base", tmp_path / "two", tmp_path / "one"
    assert run(2, base, two, "lora(rank=4)", 4, **how) == ["", ""]
    assert run(1, base, one, "lora(rank=4)", 8, **how) == [""]
    same(one, two)
    on = tmp_path / "on"
    assert run(1, base, on, "lora(rank=4)", 8, start=two / "checkpoint-2", **how) == [""]
    same(one / "checkpoint-4", on / "checkpoint-4")
    plain = tmp_path / "plain"
    assert run(1, base, plain, "lora(rank=4)", 8, data=how["data"]) == [""]
    with pytest.raises(AssertionError):
        same(one, plain)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora(rank=4)", "full"])
def test_answers_are_looked_at_on_shares(recipe, tmp_path):
    """Logits are read after the forward that their head was gathered for."""
    from burnish.testing.tasks import texts

    for part in texts("instruction-tuning"):
        part.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "ab" * (1 + i % 4), "completion": "c" * (1 + i * 7 % 17)} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"data": str(tmp_path / "rows.jsonl")}
    two, one = tmp_path / "two", tmp_path / "one"
    assert run(2, tmp_path / "base", two, recipe, 2, shard="fsdp2", **data) == ["", ""]
    assert run(1, tmp_path / "base", one, recipe, 4, **data) == [""]
    same(one, two)
    a, b = (json.loads((d / "run.json").read_text())["metrics"] for d in (one, two))
    a, b = a["validation"], b["validation"]
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert b["token_accuracy"] == pytest.approx(a["token_accuracy"])


@pytest.mark.slow
def test_packed_rows_of_two_processes_end_in_the_weights_of_one(tmp_path):
    from burnish.testing.tasks import texts

    for part in texts("instruction-tuning"):
        part.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "ab" * (1 + i % 4), "completion": "c" * (1 + i * 7 % 17)} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    how = {"data": str(tmp_path / "rows.jsonl"), "packing": True, "max_length": 32,
           "validation": 0}
    assert run(2, tmp_path / "base", tmp_path / "two", "lora(rank=4)", 2, **how) == ["", ""]
    assert run(1, tmp_path / "base", tmp_path / "one", "lora(rank=4)", 4, **how) == [""]
    same(tmp_path / "one", tmp_path / "two")
    shares = tmp_path / "shares"
    assert run(2, tmp_path / "base", shares, "lora(rank=4)", 2, shard="fsdp2", **how) == ["", ""]
    same(tmp_path / "one", shares)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["ddp", "fsdp2"])
def test_each_of_two_processes_is_promised_what_it_takes(vit, tmp_path, shard):
    assert run(2, vit, tmp_path / shard, "lora(rank=4)", 4, shard=shard, measure=True) == ["", ""]
    memory = json.loads((tmp_path / shard / "run.json").read_text())["memory"]
    for reading in (memory["simulated"], memory["measured"]):
        assert (reading["world_size"], reading["shard"]) == (2, shard)
    assert abs(memory["difference"]) < 0.005


def test_shares_are_refused_where_nobody_else_holds_the_rest():
    import burnish
    with pytest.raises(burnish.ConfigError, match="there is one: start several with torchrun"):
        burnish.fit("nowhere", "digits", shard="fsdp2")
    with pytest.raises(burnish.ConfigError, match="did you mean 'fsdp2'"):
        burnish.fit("nowhere", "digits", shard="fsdp")
    with pytest.raises(burnish.ConfigError, match="give both"):
        burnish.fit("nowhere", "digits", shard_offload=True)
    with pytest.raises(burnish.ConfigError, match="shard='fsdp2' shards the model"):
        burnish.fit("nowhere", "digits", fsdp="full_shard")


def test_the_first_fsdp_is_refused(monkeypatch):
    import burnish
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(burnish.ConfigError, match="fsdp_version: 2"):
        burnish.fit("nowhere", "digits")
