"""A batch in which each sample has its own adapter: ``python benchmarks/rows.py --width 1024``.

CPU time of one forward of a small Llama in evaluation, a sample per adapter, beside the same batch
with one adapter and with none, interleaved in one process. A row of JSON per call.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import burnish


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=25)
    a = parser.parse_args()
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(
        hidden_size=a.width, intermediate_size=int(a.width * 2.75) // 16 * 16, num_hidden_layers=2,
        num_attention_heads=8, vocab_size=256, max_position_embeddings=512)).eval()
    recipe, names = f"lora(rank={a.rank})", [f"a{i}" for i in range(a.adapters)]
    tuned = burnish.tune(net, recipe, head=False, name=names[0])
    for i, name in enumerate(names[1:]):
        tuned.add(name, recipe, seed=i)
    net.eval()
    ids = torch.randint(0, 256, (a.adapters, a.tokens))
    ways = {"one": contextlib.nullcontext, "each": lambda: tuned.adapters.rows(names),
            "base": tuned.disabled}
    took: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(a.repeats):
            for way, inside in ways.items():
                with inside():
                    start = time.process_time()
                    net(input_ids=ids)
                    took[way].append(time.process_time() - start)
    ms = {way: round(1e3 * min(t), 2) for way, t in took.items()}
    print(json.dumps({"date": datetime.date.today().isoformat(), "torch": torch.__version__,
                      "threads": torch.get_num_threads(), **vars(a), "ms": ms,
                      "throughput": round(ms["one"] / ms["each"], 3)}))


if __name__ == "__main__":
    main()
