"""What structured pruning leaves: a dense model of fewer units or channels, and what its forward
takes.

    python benchmarks/smaller.py [RECIPE ...] [--out FILE]

then ``--table FILE``. A Llama of 134 M parameters (hidden 768, 12 layers), random weights, is tuned
for four updates at 2 x 64 tokens, shrunk, written and read again by transformers; then whole and
small take turns at a forward of 4 x 256 tokens, one thread. Counted: parameters and operations
(multiplications and additions of eager attention and all products); measured: the shortest
processor time of each. Which units go after four updates is of no worth: how many do is all that
speed asks. `loraprune` takes out heads and inner channels, `pat` channels of the residual stream.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time

import torch

UNITS = "loraprune(every=1, spare=0, warmup=0, cooldown=0, ratio={})"
RECIPES = (*(UNITS.format(r) for r in (0.34, 0.5)),
           *(f"lora(rank=20) + pat(ratio={r})" for r in (0.25, 0.5)),
           UNITS.format(0.34) + " + pat(ratio=0.34)")


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                         intermediate_size=2048, vocab_size=32000)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).eval()


def shrunk(recipe):
    """The smaller model, as transformers reads its folder."""
    import burnish

    net = llama()
    ids = torch.randint(0, 32000, (2, 64))
    tuned = burnish.tune(net, recipe)
    tuned.total_steps = 4
    for _ in range(4):
        tuned.step({"input_ids": ids, "labels": ids})
    small = tuned.shrink()
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        return type(small).from_pretrained(folder, attn_implementation="eager").eval()


def operations(net, ids):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(input_ids=ids)
    return counter.get_total_flops()


def measured(recipe, turns):
    import burnish

    small, whole = shrunk(recipe), llama()
    ids = torch.randint(0, 32000, (4, 256))
    shortest = [float("inf")] * 2
    with torch.no_grad():
        for turn in range(turns + 1):
            for k, net in enumerate((whole, small)):
                start = time.process_time()
                net(input_ids=ids)
                if turn:
                    shortest[k] = min(shortest[k], time.process_time() - start)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (whole, small)]
    ops = [operations(net, ids) for net in (whole, small)]
    return {"recipe": recipe, "parameters": sizes[1] / sizes[0], "operations": ops[1] / ops[0],
            "time": shortest[1] / shortest[0], "whole_s": shortest[0], "turns": turns,
            "torch": torch.__version__, "burnish": burnish.__version__,
            "threads": torch.get_num_threads(), "machine": platform.machine(),
            "date": datetime.date.today().isoformat()}


def table(rows):
    yield "| recipe | parameters | operations | time of a forward | speed |"
    yield "|---|---|---|---|---|"
    for r in rows:
        yield (f"| `{r['recipe']}` | {r['parameters']:.2f} | {r['operations']:.2f} | "
               f"{r['time']:.2f} | {1 / r['time']:.2f} x |")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("recipes", nargs="*")
    ap.add_argument("--turns", type=int, default=5)
    ap.add_argument("--out")
    ap.add_argument("--table")
    a = ap.parse_args()
    if a.table:
        with open(a.table) as f:
            print("\n".join(table([json.loads(line) for line in f])))
        return
    torch.set_num_threads(1)
    for recipe in a.recipes or RECIPES:
        line = json.dumps(measured(recipe, a.turns))
        print(line, flush=True)
        if a.out:
            with open(a.out, "a") as f:
                f.write(line + "\n")


if __name__ == "__main__":
    main()
