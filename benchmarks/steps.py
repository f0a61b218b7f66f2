"""Step time and memory of training, one fresh process per row (see README.md)."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=100, attn_implementation="sdpa"))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=1024,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa"))


def vit_batch(n):
    import torch

    g = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(n or 32, 3, 224, 224, generator=g),
            "labels": torch.randint(0, 100, (n or 32,), generator=g)}


def llama_batch(n):
    import torch

    ids = torch.randint(0, 32000, (n or 4, 512), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


MODELS = {"vit": (vit, vit_batch, "classifier"), "llama": (llama, llama_batch, "lm_head")}


def peft_model(model, kind, name):
    """A PEFT row: lora, dora, miss, shira, vera; "+ckpt" adds transformers' checkpointing."""
    import peft
    import torch

    name, _, ckpt = name.partition("+")
    head = MODELS[kind][2]
    linears = [n for n, m in model.named_modules()
               if isinstance(m, torch.nn.Linear) and head not in n.split(".")]
    config, args = {
        "lora": ("LoraConfig", {"r": 8, "lora_alpha": 16}),
        "dora": ("LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True}),
        "miss": ("MissConfig", {"r": 16}),
        "shira": ("ShiraConfig", {"r": 8, "random_seed": 0}),
        "vera": ("VeraConfig", {"r": 256}),
    }[name]
    model = peft.get_peft_model(model, getattr(peft, config)(
        target_modules=linears, modules_to_save=[head] if kind == "vit" else None, **args))
    if ckpt:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def prepare(kind, method):
    """(model, parameters that train, call) of one row."""
    import torch

    torch.manual_seed(0)
    model = MODELS[kind][0]()
    library, _, what = method.partition(":")
    if method == "none":
        return model, []
    if method == "full":
        pass
    elif library == "peft":
        model = peft_model(model, kind, what)
    elif library == "burnish":
        import burnish

        burnish.tune(model, what)
    else:
        raise SystemExit(f"unknown method {method!r}: none, full, peft:<name>, burnish:<recipe>")
    model.train()
    return model, [p for p in model.parameters() if p.requires_grad]


def row(kind, method, steps, batch_size):
    """Measure in this process; prints one JSON line."""
    libc = ctypes.CDLL(None)
    for option in (-1, -3):                        # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(option, 1 << 20)
    libc.mallopt(-8, 2)                            # M_ARENA_MAX
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model, params = prepare(kind, method)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out = {"model": kind, "method": method, "trainable": sum(p.numel() for p in params)}
    if method != "none":
        batch = MODELS[kind][1](batch_size)
        opt = torch.optim.AdamW(params, lr=1e-3, fused=True)
        times, losses = [], []
        for _ in range(steps + 1):
            t0 = time.perf_counter()
            opt.zero_grad(set_to_none=True)
            loss = model(**batch).loss
            t1 = time.perf_counter()
            loss.backward()
            t2 = time.perf_counter()
            opt.step()
            losses.append(loss.item())
            del loss
            times.append((time.perf_counter() - t0, t1 - t0, t2 - t1))
        timed = times[1:] or times
        out |= {"step_s": statistics.median(t[0] for t in timed),
                "step_min": min(t[0] for t in timed), "step_max": max(t[0] for t in timed),
                "forward_s": statistics.median(t[1] for t in timed),
                "backward_s": statistics.median(t[2] for t in timed), "loss": losses}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out |= {"built_mib": base, "peak_mib": peak, "torch": torch.__version__,
            "date": datetime.date.today().isoformat(), "device": platform.processor() or
            platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps(out))


def run(kind, methods, steps, batch_size, out):
    env = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"),
               TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    for method in ["none", *methods]:
        done = subprocess.run(
            [sys.executable, __file__, "--model", kind, "--row", method, "--steps", str(steps),
             "--batch", str(batch_size)], capture_output=True, text=True, env=env)
        line = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else json.dumps(
            {"model": kind, "method": method, "error": done.stderr.strip().splitlines()[-1:]})
        with open(out, "a") as f:
            f.write(line + "\n")
        print(line[:200], flush=True)


def table(path):
    """Markdown, ratios against the first `peft:lora` row of each model."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        d = json.loads(line)
        rows[d["model"], d["method"]] = d
    for kind in dict.fromkeys(k for k, _ in rows):
        mine = [d for (k, _), d in rows.items() if k == kind]
        bare = next((d["peak_mib"] for d in mine if d["method"] == "none"), 0.0)
        ref = next((d for d in mine if d["method"] == "peft:lora"), None)
        print(f"\n{kind}: a process that only builds the model peaks at {bare:.0f} MiB\n")
        print("| method | trainable | step s (min..max) | x peft:lora | peak MiB over the model "
              "| x peft:lora |")
        print("|---|---|---|---|---|---|")
        for d in mine:
            if d["method"] == "none":
                continue
            if "error" in d:
                print(f"| {d['method']} | failed: {d['error']} | | | | |")
                continue
            peak = d["peak_mib"] - bare
            t = d["step_s"] / ref["step_s"] if ref else float("nan")
            m = peak / (ref["peak_mib"] - bare) if ref else float("nan")
            print(f"| `{d['method']}` | {d['trainable']:,} | {d['step_s']:.1f} "
                  f"({d['step_min']:.1f}..{d['step_max']:.1f}) | {t:.2f} | {peak:.0f} | {m:.2f} |")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--model", choices=MODELS, default="vit")
    ap.add_argument("--steps", type=int, default=2)
    ap.add_argument("--batch", type=int, default=0)
    ap.add_argument("--row", help="measure one method in this process")
    ap.add_argument("--out", default="steps.jsonl")
    ap.add_argument("--table", help="print a table of a results file")
    ap.add_argument("methods", nargs="*")
    a = ap.parse_args()
    if a.table:
        table(a.table)
    elif a.row:
        row(a.model, a.row, a.steps, a.batch)
    else:
        run(a.model, a.methods, a.steps, a.batch, a.out)


if __name__ == "__main__":
    main()
