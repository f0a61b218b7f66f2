"""What a training step adds to the process on a CPU, promised and measured (see README.md).

One fresh process per row. The base is that process with everything imported and one step of the
same recipe on a model of two small blocks behind it, so that libraries, code pages and threads are
there already; the row is the largest resident size from then on, less the base's.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

SIZES = {  # blocks, width, heads, mlp, the rest: of the model, and of the one that warms up
    "vit": ((12, 768, 12, 3072), (2, 32, 2, 64)),
    "bert": ((12, 768, 12, 3072), (2, 32, 2, 64)),
    "llama": ((12, 768, 12, 2048), (2, 32, 2, 64)),
}
#: (samples, tokens); a picture of 224 px has 197
BATCHES = {"vit": (4, 197), "bert": (4, 128), "llama": (2, 256)}
#: row -> (burnish's recipe, how peft does it; None where it does not)
ROWS = {
    "full": ("full", "full"),
    "lora": ("lora(rank=8)", "lora"),
    "qlora": ("nf4 + lora(rank=8)", None),
    "snella": ("snella(rank=8)", None),
    "dora": ("dora(rank=8)", "dora"),
    "lst": ("lst", None),
    "checkpoint": ("lora(rank=8) + checkpoint", "lora+ckpt"),
    "mezo": ("lora(rank=8) + mezo", None),
}


def build(kind, small=False):
    """A module with random weights, from its config alone."""
    import transformers as t

    blocks, width, heads, mlp = SIZES[kind][small]
    common = dict(num_hidden_layers=blocks, hidden_size=width, num_attention_heads=heads,
                  intermediate_size=mlp, attn_implementation="sdpa")
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(num_labels=100, **common))
    if kind == "bert":
        return t.BertForSequenceClassification(t.BertConfig(num_labels=2, **common))
    return t.LlamaForCausalLM(t.LlamaConfig(
        vocab_size=32000 if not small else 128, num_key_value_heads=heads, use_cache=False,
        max_position_embeddings=1024, tie_word_embeddings=False, **common))


def examples(kind, small=False):
    import torch

    g = torch.Generator().manual_seed(0)
    n, length = (1, 8) if small else BATCHES[kind]
    if kind == "vit":
        return {"pixel_values": torch.randn(n, 3, 224, 224, generator=g),
                "labels": torch.randint(0, 100, (n,), generator=g)}
    ids = torch.randint(0, 128 if small else 30000, (n, length), generator=g)
    if kind == "bert":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "labels": torch.randint(0, 2, (n,), generator=g)}
    return {"input_ids": ids, "labels": ids.clone()}


def promises(kind, names):
    """row -> bytes of the moments it has: the simulator's, on a model without weights."""
    import torch

    from burnish import simulate

    with torch.device("meta"):
        model = build(kind).train()
    return {n: {m: simulate(model, ROWS[n][0], examples(kind), during=m).peak_bytes
                for m in ("load", "train")} for n in names}


def prepared(kind, name, library, small=False):
    """A step of the row, as its user would take it."""
    import torch

    from burnish.memory.allocator import process_peak, resident

    torch.manual_seed(0)
    before = resident()
    model, batch = build(kind, small), examples(kind, small)
    model.train()
    built = resident()
    if library == "burnish":
        import burnish

        tuned = burnish.tune(model, ROWS[name][0])
        return lambda: tuned.step(batch), (before, built, process_peak())
    if ROWS[name][1] != "full":
        model = with_peft(model, kind, ROWS[name][1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    return step, (before, built, process_peak())


def with_peft(model, kind, name):
    import peft
    import torch

    name, _, ckpt = name.partition("+")
    head = "lm_head" if kind == "llama" else "classifier"
    linears = [n for n, m in model.named_modules()
               if isinstance(m, torch.nn.Linear) and head not in n.split(".")]
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=8, lora_alpha=16, use_dora=name == "dora", target_modules=linears,
        modules_to_save=None if kind == "llama" else [head]))
    if ckpt:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def row(kind, name, library, steps):
    """Measure in this process; prints one JSON line."""
    from burnish.memory.allocator import process_peak, reset_peak, resident, steady_heap

    steady_heap()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    import burnish  # noqa: F401  (so that both libraries' bases hold the same)

    step, _ = prepared(kind, name, library, small=True)
    step()
    step()
    del step
    gc.collect()
    reset_peak()
    base = resident()
    step, (_, built, loaded) = prepared(kind, name, library)
    gc.collect()
    reset_peak()
    tuned = resident()
    seen = []
    for _ in range(steps):
        step()
        seen.append(process_peak() - base)
    print(json.dumps({
        "row": name, "model": kind, "library": library, "measured": seen[-1],
        "load": loaded - base, "built": built - base, "tuned": tuned - base, "after": seen,
        "still": resident() - base, "base": base}))


def ask(words):
    env = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
               TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True,
                          env=env)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(kinds, names, libraries, steps, out):
    import torch

    about = {"torch": torch.__version__, "date": datetime.date.today().isoformat(),
             "device": platform.processor() or platform.machine(),
             "threads": int(os.environ.get("OMP_NUM_THREADS", "1"))}
    for kind in kinds:
        told_before = ask(["--promise", kind, *names]) if "burnish" in libraries else {}
        for name in names:
            for library in libraries:
                if library == "peft" and ROWS[name][1] is None:
                    continue
                told = {"row": name, "model": kind, "library": library, "batch": BATCHES[kind]}
                if library == "burnish":
                    told |= {"recipe": ROWS[name][0], "during": told_before[name]}
                told |= ask(["--row", kind, name, library, "--steps", str(steps)])
                if library == "burnish" and "measured" in told:
                    told["predicted"] = told["during"]["train"]
                    told["ratio"] = round(told["predicted"] / told["measured"], 4)
                with open(out, "a") as f:
                    f.write(json.dumps(told | about) + "\n")
                print(kind, name, library, told.get("error") or told.get("ratio", ""),
                      told.get("measured"), flush=True)


def table(path):
    """Markdown: burnish's promise and truth, and peft's truth, in MiB; `rss` is the whole process:
    what it held before and the promise, over its resident peak."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        d = json.loads(line)
        rows[d["model"], d["row"], d["library"]] = d
    print("| model | row | promised | measured | promised / measured | rss | peft measured | "
          "burnish / peft |\n|---|---|---|---|---|---|---|---|")
    for (kind, name, library), d in rows.items():
        if library != "burnish":
            continue
        peer = rows.get((kind, name, "peft"))
        other = f"{peer['measured'] / 2**20:.0f} | {d['measured'] / peer['measured']:.2f}" \
            if peer else " | "
        whole = (d["base"] + d["predicted"]) / (d["base"] + d["measured"])
        print(f"| {kind} | {name} | {d['predicted'] / 2**20:.0f} | {d['measured'] / 2**20:.0f} | "
              f"{d['ratio']:.3f} | {whole:.3f} | {other} |")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES))
    ap.add_argument("--libraries", nargs="*", default=["burnish", "peft"])
    ap.add_argument("--steps", type=int, default=2)
    ap.add_argument("--out", default="resident.jsonl")
    ap.add_argument("--table", help="print a table of a results file")
    ap.add_argument("--row", nargs=3, metavar=("MODEL", "ROW", "LIBRARY"))
    ap.add_argument("--promise", choices=SIZES, help="bytes of the rows, simulated")
    ap.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default all")
    a = ap.parse_args()
    if a.table:
        table(a.table)
    elif a.row:
        row(*a.row, a.steps)
    elif a.promise:
        print(json.dumps(promises(a.promise, a.rows)))
    else:
        run(a.models, a.rows or list(ROWS), a.libraries, a.steps, a.out)


if __name__ == "__main__":
    main()
