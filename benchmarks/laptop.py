"""A 7B-shaped Llama trained within a laptop's memory: ``python benchmarks/laptop.py --shape 7b``.

Makes a folder of safetensors shards in bf16 with random weights (one tensor in memory at a time),
opens it, joins a recipe and takes training steps, in a fresh process per recipe. Of each phase the
highest resident size of the process stands beside what the simulator promised for it; the promise
is made in a process of its own, and the size of the process with everything imported is added.
A row of JSON per recipe, appended to --out. The folder is removed at the end, unless --keep.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

#: hidden, layers, intermediate, heads, key-value heads, words
SHAPES = {"tiny": (256, 2, 688, 4, 4, 1000), "1b": (2048, 22, 5632, 32, 4, 32000),
          "7b": (4096, 32, 11008, 32, 32, 32000)}
RECIPES = ("nf4 + lora(rank=8) + checkpoint", "nf4 + mezo + lora(rank=8)")
SHARD = 5 << 30


def config_of(shape: str):
    from transformers import LlamaConfig

    hidden, layers, inner, heads, few, words = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=words,
        num_attention_heads=heads, num_key_value_heads=few, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)


def make(shape: str, folder: Path) -> None:
    """The folder as ``save_pretrained`` would lay it out, a tensor at a time."""
    from burnish.formats import safe
    from burnish.memory.fakes import from_config

    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    like = from_config(config).state_dict()
    shards: list[dict[str, Tensor]] = [{}]
    for name, t in like.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + t.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = t
    draw = torch.Generator().manual_seed(0)

    def values(shard: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, t in shard.items():
            value = torch.ones(t.shape, dtype=t.dtype)
            yield name, value if t.dim() == 1 else value.normal_(0, 0.02, generator=draw)

    names = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        safe.save_stream(values(shard), shard, folder / file)
        names.update(dict.fromkeys(shard, file))
    size = sum(t.nbytes for t in like.values())
    safe.write_json(folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": size}, "weight_map": names})
    config.save_pretrained(folder)


def batch_of(tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def promise(folder: Path, recipe: str, tokens: int) -> dict[str, dict[str, int]]:
    """What the simulator says of loading and of a step."""
    import burnish

    model = burnish.open_model(folder).train()
    said = {when: burnish.simulate(model, recipe, batch_of(tokens), during=when)
            for when in ("load", "train")}
    return {when: {"peak": r.peak_bytes, **r.by_category} for when, r in said.items()}


def real(folder: Path, recipe: str, tokens: int, steps: int) -> dict[str, object]:
    """Opens, joins and steps; (highest resident bytes, seconds) of each phase."""
    from burnish.memory import process_peak, steady_heap
    from burnish.memory.allocator import reset_peak, resident

    steady_heap()
    import burnish
    from burnish.testing import tiny

    model, batch = tiny("llama")
    warm = burnish.tune(model, recipe)               # what is imported on the way is of the process
    warm.optimizer(lr=1e-4)
    warm.step(batch)
    del model, batch, warm
    out: dict[str, object] = {"process": resident(), "exact": reset_peak()}
    phases: dict[str, dict[str, float]] = {}

    def phase(name: str, began: float, cpu: float) -> None:
        phases[name] = {"rss_peak": process_peak(), "rss_after": resident(),
                        "seconds": round(time.perf_counter() - began, 1),
                        "cpu_seconds": round(time.process_time() - cpu, 1)}
        print(name, phases[name], file=sys.stderr, flush=True)
        reset_peak()

    now = time.perf_counter(), time.process_time()
    model = burnish.open_model(folder).train()
    phase("open", *now)
    now = time.perf_counter(), time.process_time()
    tuned = burnish.tune(model, recipe)
    phase("load", *now)
    tuned.optimizer(lr=1e-4)
    losses, batch = [], batch_of(tokens)
    for n in range(steps):
        now = time.perf_counter(), time.process_time()
        losses.append(float(tuned.step(batch)))
        phase(f"step {n + 1}", *now)
    return out | {"phases": phases, "losses": losses,
                  "trainable": sum(p.numel() for p in tuned.parameters())}


def row(folder: Path, recipe: str, a: argparse.Namespace) -> dict[str, object]:
    """One recipe: its promise and its run, each in a process of its own."""
    def fresh(what: str) -> dict:
        done = subprocess.run(
            [sys.executable, __file__, "--only", what, "--folder", str(folder), "--recipes", recipe,
             "--tokens", str(a.tokens), "--steps", str(a.steps)], check=True, text=True,
            stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    said, did = fresh("promise"), fresh("real")
    measured = {"load": max(did["phases"][n]["rss_peak"] for n in ("open", "load")),
                "train": max(p["rss_peak"] for n, p in did["phases"].items() if "step" in n)}
    shown = {when: {"promised": did["process"] + said[when]["peak"], "rss": measured[when],
                    "difference": round(measured[when] / (did["process"] + said[when]["peak"]) - 1,
                                        4)} for when in measured}
    return {"date": datetime.date.today().isoformat(), "shape": a.shape, "recipe": recipe,
            "tokens": a.tokens, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "machine": platform.machine(), **shown, "promise": said, **did}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("promise", "real", "make"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.only == "make":
        make(a.shape, a.folder)
        return
    if a.only == "promise":
        print(json.dumps(promise(a.folder, a.recipes[0], a.tokens)))
        return
    if a.only == "real":
        print(json.dumps(real(a.folder, a.recipes[0], a.tokens, a.steps)))
        return
    folder = a.folder or Path(tempfile.mkdtemp(prefix="burnish-laptop-"))
    try:
        if not (folder / "config.json").exists():
            make(a.shape, folder)
        for recipe in a.recipes:
            line = json.dumps(row(folder, recipe, a))
            print(line)
            if a.out:
                with open(a.out, "a", encoding="utf-8") as f:
                    f.write(line + "\n")
    finally:
        if not a.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
