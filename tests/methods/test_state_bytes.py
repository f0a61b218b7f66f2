"""What each optimizer says it holds, for every form of its state: counted from the definition
and held after two steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.blocks.update.step import compose
from burnish.core.recipe import parse

M, N = 96, 160                                   # 15,360 elements: block codecs act
CODED = {"8bit": M * N * 1 + 4 * M * N // 256, "4bit": M * N // 2 + 4 * M * N // 128}

#: recipe -> bytes beside one (96, 160) weight of `s` bytes per number
TOLD = {
    "adamw": lambda s: 2 * s * M * N, "adamw(state='bf16')": lambda s: 2 * 2 * M * N,
    "adamw(state='8bit')": lambda s: 2 * CODED["8bit"],
    "adamw(state='4bit')": lambda s: 2 * CODED["4bit"],
    "adam8bit": lambda s: 2 * CODED["8bit"], "adam4bit": lambda s: 2 * CODED["4bit"],
    "lion": lambda s: max(s, 4) * M * N, "lion(state='bf16')": lambda s: 2 * M * N,
    "lion(state='8bit')": lambda s: CODED["8bit"], "lion(state='4bit')": lambda s: CODED["4bit"],
    "sgd": lambda s: 0, "sgd(momentum=0.9)": lambda s: s * M * N,
    "sgd(momentum=0.9, state='bf16')": lambda s: 2 * M * N,
    "sgd(momentum=0.9, state='8bit')": lambda s: CODED["8bit"],
    "sgd(momentum=0.9, state='4bit')": lambda s: CODED["4bit"],
    "adafactor": lambda s: max(s, 4) * (M + N),
    "adafactor(beta1=0.9)": lambda s: max(s, 4) * (M + N + M * N),
    "galore(rank=8)": lambda s: s * M * 8 + 2 * max(s, 4) * 8 * N,
    "galore(rank=8, proj_type='reverse_std')": lambda s: s * N * 8 + 2 * max(s, 4) * 8 * M,
    "galore(rank=8, proj_type='left')": lambda s: s * M * 8 + 2 * max(s, 4) * 8 * N,
    "galore(rank=8, proj_type='right')": lambda s: s * N * 8 + 2 * max(s, 4) * 8 * M,
    "galore(rank=8, proj_type='full')": lambda s: s * 8 * (M + N) + 2 * max(s, 4) * 64,
    "galore(rank=96)": lambda s: 2 * max(s, 4) * M * N,          # nothing to save: Adam's own
    "galore(rank=8, svd='randomized')": lambda s: s * M * 8 + 2 * max(s, 4) * 8 * N,
    "fira(rank=8)": lambda s: s * M * 8 + 2 * max(s, 4) * 8 * N,
    "apollo(rank=8)": lambda s: 2 * max(s, 4) * 8 * N,
    "apollo(rank=1, by='tensor')": lambda s: 2 * max(s, 4) * N,
    "mezo": lambda s: 0, "zo": lambda s: 0, "mezo_svrg": lambda s: s * M * N,
    "zo(rule='momentum')": lambda s: max(s, 4) * M * N,
    "zo(rule='adam')": lambda s: 2 * max(s, 4) * M * N,
    "frugal": lambda s: 2 * max(s, 4) * M * N // 4 + 4 * N // 4,
    "frugal(part='rows')": lambda s: 2 * max(s, 4) * M * N // 4 + 4 * M // 4,
    "frugal(part='randk')": lambda s: 2 * max(s, 4) * M * N // 4,
    "frugal(part='svd')": lambda s: s * M * 24 + 2 * max(s, 4) * 24 * N,
    "natural_galore(rank=8, history=5)":
        lambda s: s * M * 8 + max(s, 4) * (2 * 8 * N + 5 * 8 * N + 25),
}


def held(recipe, shape, dtype):
    p = nn.Parameter(torch.randn(shape).to(dtype))
    opt = compose([m.optimizer() for m in parse(recipe)], [("layers.0.mlp.weight", p)], 1e-3)
    for _ in range(2):
        if recipe.startswith(("mezo", "zo")):
            opt.step(lambda: p.detach().float().square().mean())
            continue
        p.grad = torch.randn(shape).to(dtype)
        opt.step()
    return sum(t.nbytes for t in opt.state.get(p, {}).values()
               if isinstance(t, torch.Tensor) and t.dim())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", TOLD)
def test_what_is_said_is_counted_and_held(recipe, dtype):                       # findings 6
    (m,) = parse(recipe)
    want = TOLD[recipe](dtype.itemsize)
    if dtype == torch.float64 and ("bit" in recipe or "bf16" in recipe):
        want = 8 * M * N * (2 if recipe.startswith("adam") else 1)       # never coded beside fp64
    assert m.state_bytes((M, N), dtype.itemsize) == want
    assert held(recipe, (M, N), dtype) == want


@pytest.mark.parametrize("shape", [(7,), (6, 9), (63, 65), (4096,), (4095,), (16, 8, 3, 3),
                                   (1, 5)])
@pytest.mark.parametrize("recipe", TOLD)
def test_it_holds_for_shapes_of_every_kind(recipe, shape):
    """Vectors, small and odd matrices, convolutions as (out, rest)."""
    assert held(recipe, shape, torch.float32) == parse(recipe)[0].state_bytes(shape, 4)
