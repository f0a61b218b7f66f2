"""How long `burnish plan` takes: one fresh process a row, wall and CPU seconds.

    python benchmarks/plan.py [NAME ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: settings of published models, as their configs give them; memory and batch asked for
MODELS = {
    "llama-3.1-8b": ("LlamaConfig", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072, "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16"}, "24GB", ["--batch", "4", "--length", "512"]),
    "llama-3.1-70b": ("LlamaConfig", {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256,
        "max_position_embeddings": 131072, "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16"}, "80GB", ["--batch", "4", "--length", "512"]),
    "mixtral-8x7b": ("MixtralConfig", {
        "architectures": ["MixtralForCausalLM"], "dtype": "bfloat16"},
        "80GB", ["--batch", "4", "--length", "512"]),
    "vit-l": ("ViTConfig", {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "architectures": ["ViTForImageClassification"]},
        "8GB", ["--batch", "32"]),
}


def _compiled() -> dict[str, str]:
    """The environment of an installed library: its modules are compiled once, not at each start."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def row(name: str) -> dict:
    """One plan in a process of its own, with an empty cache."""
    import transformers

    kind, settings, memory, batch = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, kind)(**settings).save_pretrained(folder)
        argv = [sys.executable, "-c", "import sys; from burnish.cli import main; "
                "sys.exit(main(sys.argv[1:]))", "plan", folder, "--memory", memory, *batch,
                "--json"]
        rows = {}
        for said in ("empty", "again"):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(argv, capture_output=True, text=True,
                                  env={**_compiled(), "BURNISH_CACHE": f"{folder}/cache"})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            rows[said] = {"wall_s": round(time.perf_counter() - began, 2),
                          "cpu_s": round(cpu, 2)}
        plans = json.loads(done.stdout)
    return {"model": name, "memory": memory, "exit": done.returncode, "looked": plans["looked"],
            "fits": len(plans["fits"]), **{f"{k}_{f}": v for k, r in rows.items()
                                           for f, v in r.items()}}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("names", nargs="*", default=list(MODELS))
    ask.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / (
        f"plan-{datetime.date.today().isoformat()}.jsonl"))
    said = ask.parse_args()
    import torch
    import transformers

    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__,
             "transformers": transformers.__version__, "python": platform.python_version(),
             "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
    subprocess.run([sys.executable, "-c", "import burnish.memory.plan, burnish.engine.tune"],
                   env=_compiled(), check=True)
    for name in said.names or MODELS:
        line = json.dumps({**row(name), **about})
        print(line, flush=True)
        with said.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
