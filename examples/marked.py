"""Learn from answers that are marked good or bad, each by itself: KTO.

    python examples/marked.py               # under a minute

A small Llama, drawn at random, first learns to answer two letters both ways, turned round and as
they are; then one of the ways is marked good and the other bad. Nothing is downloaded. With rows of
your own it is ``burnish fit --model m/qwen --data answers.jsonl``, each with `prompt`, `completion`
and `label`, true or false.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import burnish
from burnish.fit.finished import Finished

LETTERS = string.ascii_lowercase[:8]


def letters() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", ":", *LETTERS]
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>")


def drawn(tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2))


def main(first: int = 25, then: int = 6, recipe: str = "lora(rank=8)") -> tuple[float, float]:
    """(answers that are turned round before, and after)."""
    asked = [a + b for a in LETTERS for b in LETTERS if a != b]
    with tempfile.TemporaryDirectory() as folder:
        root, tokenizer = Path(folder), letters()
        for part in (drawn(tokenizer), tokenizer):
            part.save_pretrained(root / "drawn")
        rows = [{"prompt": f"{x}:", "completion": y} for x in asked for y in (x, x[::-1])]
        (root / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
        marks = [{**r, "label": r["prompt"][1::-1] == r["completion"]} for r in rows]
        (root / "marks.jsonl").write_text("\n".join(map(json.dumps, marks)))
        base = burnish.fit(str(root / "drawn"), str(root / "both.jsonl"), "full", lr=4e-3,
                           epochs=first, batch_size=16, output=root / "sft", quiet=True)
        base.tuned.merge().save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")
        run = burnish.fit(str(root / "base"), str(root / "marks.jsonl"), recipe, lr=4e-3,
                          epochs=then, batch_size=16, output=root / "out", quiet=True)
        found = run.metrics["validation"]
        print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
        held = Finished.open(run.folder)
        said = list(held.predict([f"{x}:" for x in asked], tokens=3, beside=True))
    before, after = (sum(s[k] == x[::-1] for x, s in zip(asked, said, strict=True)) / len(asked)
                     for k in ("base", "said"))
    print(f"turned round: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
