"""Greedy generation with a recipe, unmerged and merged, beside the base and beside peft.

    python benchmarks/generate.py [RECIPE ...] [--tokens 32] [--out FILE]

One fresh process per recipe. The model is a Llama of 134 M parameters (hidden 768, 12 layers), the
prompt 16 tokens. Base, unmerged and merged take turns; the shortest turn of each counts.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import subprocess
import sys
import time

import torch

RECIPES = ("lora(rank=8)", "dora(rank=8)", "snella(rank=8)", "snell(rank=8)", "shira(rank=8)",
           "bone(rank=64)", "oft(block=32)", "vera(rank=256)", "loha(rank=8)", "boft",
           "randlora", "fourierft", "ia3", "peft:lora")


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                         intermediate_size=2048, vocab_size=32000)
    return LlamaForCausalLM(config).eval()


def stirred(model):
    """Factors that start at zero would be no update."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=1e-3)
    return model


def subjects(recipe):
    """name -> a call that generates."""
    base = llama()
    if recipe.startswith("peft:"):
        from peft import LoraConfig, get_peft_model

        tuned = get_peft_model(copy.deepcopy(base), LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear"))
        return base, stirred(tuned).eval(), None
    import burnish

    tuned = burnish.tune(copy.deepcopy(base), recipe)
    stirred(tuned.model).eval()
    other = burnish.tune(copy.deepcopy(base), recipe)
    stirred(other.model)
    return base, tuned.model, other.merge().eval()


def measured(recipe, tokens, turns):
    ids = torch.arange(16)[None] + 100
    how = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    found = [m for m in subjects(recipe) if m is not None]
    shortest = [float("inf")] * len(found)
    import burnish

    with torch.no_grad():
        for turn in range(turns + 1):
            for k, model in enumerate(found):
                start = time.process_time()
                model.generate(ids, **how)
                if turn:
                    shortest[k] = min(shortest[k], time.process_time() - start)
    base, unmerged, *merged = (1000 * s / tokens for s in shortest)
    return {"recipe": recipe, "tokens": tokens, "base_ms": base, "unmerged": unmerged / base,
            "merged": merged[0] / base if merged else None, "turns": turns,
            "torch": torch.__version__, "burnish": burnish.__version__,
            "threads": torch.get_num_threads(), "machine": platform.machine(),
            "date": datetime.date.today().isoformat()}


def table(rows):
    yield "| recipe | ms a token, base | unmerged x | merged x |"
    yield "|---|---|---|---|"
    for r in rows:
        merged = "" if r["merged"] is None else f"{r['merged']:.2f}"
        yield f"| `{r['recipe']}` | {r['base_ms']:.1f} | {r['unmerged']:.2f} | {merged} |"


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("recipes", nargs="*")
    ap.add_argument("--tokens", type=int, default=32)
    ap.add_argument("--turns", type=int, default=5)
    ap.add_argument("--out")
    ap.add_argument("--table")
    ap.add_argument("--one", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.table:
        with open(a.table) as f:
            print("\n".join(table([json.loads(line) for line in f])))
    elif a.one:
        torch.set_num_threads(1)
        print(json.dumps(measured(a.one, a.tokens, a.turns)))
    else:
        for recipe in a.recipes or RECIPES:
            done = subprocess.run([sys.executable, __file__, "--one", recipe, "--tokens",
                                   str(a.tokens), "--turns", str(a.turns)], text=True,
                                  stdout=subprocess.PIPE, check=True)
            line = done.stdout.splitlines()[-1]
            print(line, flush=True)
            if a.out:
                with open(a.out, "a") as f:
                    f.write(line + "\n")


if __name__ == "__main__":
    main()
