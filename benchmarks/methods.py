"""A row per method: the time and the peak of its step beside LoRA's and PEFT's (see README.md).

    python benchmarks/methods.py [RECIPE ...] [--model vit llama] --out FILE   # goes on
    python benchmarks/methods.py --table FILE

vit: ViT-B/16, 8 pictures of 224 pixels, 100 classes. llama: 134 M parameters, 2 x 512 tokens.
peak: simulated of the whole model, less its weights.
time: a third of the model (4 of 12 blocks, a third of the words, so that the shares stay), the
    recipe, LoRA of rank 8 and, where PEFT has the method, PEFT with the same tensors (it reads the
    folder that burnish writes) turn by turn in one process on one thread; the shortest processor
    time of each. AdamW, fused.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import rows

LORA, TURNS = "lora(rank=8)", 4


def vit(layers: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        num_labels=100, num_hidden_layers=layers, attn_implementation="sdpa"))


def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=layers * 32000 // 12, hidden_size=768, intermediate_size=2048,
        num_hidden_layers=layers, num_attention_heads=12, max_position_embeddings=1024,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa"))


def batch_of(model: Any) -> dict[str, Any]:
    import torch

    g = torch.Generator().manual_seed(0)
    if hasattr(model.config, "vocab_size"):
        ids = torch.randint(0, model.config.vocab_size, (2, 512), generator=g)
        return {"input_ids": ids, "labels": ids.clone()}
    return {"pixel_values": torch.randn(8, 3, 224, 224, generator=g),
            "labels": torch.randint(0, 100, (8,), generator=g)}


MODELS = {"vit": vit, "llama": llama}


def stepper(model: Any, batch: dict[str, Any], params: list[Any],
            update: Callable[[list[Any]], Any]) -> Callable[[], None]:
    opt = update(params)

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        opt.step()
    return step


def peers(tuned: Any, model: Callable[[], Any]) -> Any:
    """PEFT's model with `tuned`'s tensors; None where PEFT has no form of the method."""
    import peft

    import burnish

    with tempfile.TemporaryDirectory() as folder:
        try:
            burnish.export_peft(tuned, folder)
        except burnish.FormatError:
            return None
        try:
            return peft.PeftModel.from_pretrained(model(), folder, is_trainable=True).train()
        except Exception as e:
            print(f"peft does not read it: {type(e).__name__}: {e}", flush=True)
            return None


def row(kind: str, recipe: str) -> dict[str, Any]:
    import torch

    import burnish

    def fresh(layers: int = 4) -> Any:
        torch.manual_seed(0)
        return MODELS[kind](layers).train()

    def peak(model: Any, recipe: str) -> int:
        bare = sum(p.numel() * p.element_size() for p in model.parameters())
        return burnish.simulate(model, recipe, batch_of(model)).peak_bytes - bare

    def adamw(params: list[Any]) -> Any:
        return torch.optim.AdamW(params, 1e-4, fused=True)

    batch = batch_of(fresh())
    runs: dict[str, Callable[[], None]] = {}
    out: dict[str, Any] = {}
    theirs = None
    for key, what in (("lora", LORA), ("own", recipe)):
        model = fresh()
        tuned = burnish.tune(model, what, calibration=[batch] * 2, seed=0)
        tuned.total_steps = 1000
        if key == "own":
            out["trained"] = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
            theirs = peers(tuned, fresh)

        def step(tuned: Any = tuned) -> None:
            tuned.step(batch)
        tuned.optimizer(lr=1e-4)
        runs[key] = step
    if theirs is not None:
        runs["peft"] = stepper(theirs, batch, [p for p in theirs.parameters() if p.requires_grad],
                               adamw)
    took: dict[str, list[float]] = {k: [] for k in runs}
    for turn in range(TURNS + 1):
        for key in list(runs)[::(-1) ** turn]:
            began = time.process_time()
            runs[key]()
            if turn:
                took[key].append(time.process_time() - began)
    best = {k: min(t) for k, t in took.items()}
    runs.clear()
    with torch.device("meta"):
        whole = MODELS[kind](12).train()
    out |= {"time": best["own"] / best["lora"], "seconds": took,
            "peak": peak(whole, recipe), "lora_peak": peak(whole, LORA)}
    if theirs is not None:
        like = burnish.tune(fresh(12), recipe, calibration=[batch_of(whole)], seed=0)
        theirs = peers(like, lambda: fresh(12))
        out |= {"peft_time": best["own"] / best["peft"],
                "peft_peak": peak(theirs, "as_is + lean(on=False)")}
    return out | {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}


def table(path: str) -> None:
    """Markdown: ratios to LoRA, and to PEFT's own of the same method."""
    print("| recipe | model | trained | x LoRA: time | peak | x PEFT: time | peak |\n"
          "|---|---|---|---|---|---|---|")
    for line in Path(path).read_text().splitlines():
        d = json.loads(line)
        if "error" in d:
            print(f"| `{d['recipe']}` | {d['model']} | {d['error']} | | | | |")
            continue
        beside = (f"{d['peft_time']:.2f} | {d['peak'] / d['peft_peak']:.2f}"
                  if "peft_time" in d else " | ")
        print(f"| `{d['recipe']}` | {d['model']} | {d['trained']:,} | {d['time']:.2f} | "
              f"{d['peak'] / d['lora_peak']:.2f} | {beside} |")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("recipes", nargs="*")
    ask.add_argument("--model", nargs="*", default=list(MODELS), choices=MODELS)
    ask.add_argument("--out", default="methods.jsonl")
    ask.add_argument("--workers", type=int, default=1)
    ask.add_argument("--table", help="print a table of a results file")
    a = ask.parse_args()
    if a.table:
        return table(a.table)
    import peft  # noqa: F401  (what a fork need not import again)
    import torch
    import transformers  # noqa: F401

    from burnish.fit.driving import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    rows([{"recipe": r, "model": m} for r in a.recipes for m in a.model],
         lambda recipe, model: row(model, recipe), a.out, a.workers)


if __name__ == "__main__":
    main()
