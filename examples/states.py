"""Read on in another kind of text: a state-space model (Mamba) of bytes goes from prose to code.

    python examples/states.py                 # about two minutes

Pre-training reads the docstrings of Python's standard library; the task is its code. Scores are
bits a byte of code that nobody has read (8 is to know nothing).
"""

from __future__ import annotations

import ast
import copy
import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transferred import compare, split, trained
from transformers import MambaConfig, MambaForCausalLM

LONG = 96
RECIPES = {"linear_probe": 3e-3, "norms": 1e-2, "lora(rank=8)": 1e-2,
           "prompt_tuning(length=8)": 1e-2, "full": 3e-3}


def read(files: int) -> tuple[bytes, bytes]:
    """Docstrings, and code without them, of so many modules."""
    prose, code = [], []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                prose.append(" ".join((ast.get_docstring(node) or "").split()))
                if isinstance(node, ast.FunctionDef):
                    own = node.body[bool(ast.get_docstring(node)):]
                    code.append("\n".join(ast.unparse(n) for n in own))
    return " ".join(prose).encode(), "\n".join(code).encode()


def pieces(text: bytes, count: int, start: int = 0) -> torch.Tensor:
    """(count, LONG) bytes, one piece behind the other."""
    rows = torch.frombuffer(bytearray(text[start * LONG:(start + count) * LONG]), dtype=torch.uint8)
    return rows.long().view(count, LONG)


def main(first: int = 900, few: int = 160, held: int = 160, epochs: int = 3, files: int = 60
         ) -> dict[str, float]:
    prose, code = read(files)
    before, learnt = pieces(prose, first), pieces(code, few)
    judged = pieces(code, held, few + 400)

    def batches(rows: torch.Tensor, size: int) -> list[dict[str, Any]]:
        return [{"input_ids": rows[i], "labels": rows[i]} for i in split(len(rows), size)]

    torch.manual_seed(0)
    base = trained(MambaForCausalLM(MambaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8, conv_kernel=4,
        pad_token_id=0, bos_token_id=0, eos_token_id=0)), batches(before, 24), 5e-3, 2,
        lambda model, b: model(**b).loss)

    def bits(model: nn.Module) -> float:
        return float(model(input_ids=judged, labels=judged).loss) / math.log(2)

    with torch.no_grad():
        print(f"as it was pre-trained: {bits(base.eval()):.4f}")
    return compare(lambda: copy.deepcopy(base), batches(learnt, 16), bits, RECIPES, epochs=epochs,
                   word="bits")


if __name__ == "__main__":
    main()
