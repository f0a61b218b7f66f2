"""Every kernel that the host's functions launch, compiled for GPUs that need not be there.

Prints a line for each: name, target, bytes of shared memory (test_triton_compiles.py).
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from burnish.blocks.gpu import coded, distances, entries, road
from burnish.blocks.weight.quantise import nf4_encode
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.site import Place

TARGET, WIDE = int(sys.argv[1]), "wide" in sys.argv
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}
seen = set()


def compiled(kernel, programs, *args, **meta):
    """In the place of a launch."""
    names = kernel.arg_names
    options = {k: v for k, v in meta.items() if k in OPTIONS}
    values = {**dict(zip(names, args, strict=False)),
              **{k: v for k, v in meta.items() if k not in OPTIONS}}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {n: "constexpr" if n in constants else mangle_type(values[n]) for n in names}
    if WIDE:                                     # numbers beyond 2^31, as a large matrix has them
        signature = {n: "i64" if t == "i32" and n.startswith("s") else t
                     for n, t in signature.items()}
    key = kernel.__name__, tuple(signature.items()), tuple(map(str, constants.items()))
    if key in seen:
        return
    seen.add(key)
    made = triton.compile(ASTSource(kernel, signature, constants), options={
        **options, "enable_fp_fusion": False}, target=GPUTarget("cuda", TARGET, 32))
    print(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__} {TARGET} "
          f"{made.metadata.shared}", flush=True)


def products(dtype, shape, dq=True):
    c = nf4_encode(torch.randn(shape), dq).coded(torch.bfloat16).to(dtype)
    x, g = torch.randn(99, shape[1]).to(dtype), torch.randn(99, shape[0]).to(dtype)
    c.linear(x, x[0, :1].expand(shape[0]))
    c.back(g)
    c.decode()


def delta(rank, s, mixed, magnitude="signed_square", dtype=torch.float32):
    term = KernelDelta(Place("l", "weight", "linear", 96, 40), rank, s, mixed, magnitude=magnitude)
    made = distances.Entries(term.to(dtype))
    tau = made.threshold(s) if s else None
    made.panel(8, 40, tau)
    grads = [torch.zeros_like(p) for p in term.parameters()]
    made.pull(8, 40, torch.randn(96, 32).bfloat16(), tau, grads)
    if tau is not None:
        made.alive(tau)


@torch.no_grad()
def main():
    assert not road.interpreted()
    coded.launch = distances.launch = entries.launch = compiled
    products(torch.float32, (80, 128))
    products(torch.bfloat16, (33, 45))
    held = coded.Coded(torch.randn(64, 64).bfloat16(), (64, 64), torch.float32)
    held.linear(torch.randn(1, 64))
    held.back(torch.randn(1, 64))
    delta(8, 0.5, mixed=True)
    at = torch.arange(9)
    entries.at_entries(torch.randn(70, 33).bfloat16(), torch.randn(70, 40).bfloat16(), at, at)
    if "all" in sys.argv:
        delta(32, 0.5, False, dtype=torch.bfloat16)
        delta(12, 0.0, True, "linear")
        delta(12, 0.5, False, "linear")
        products(torch.float16, (80, 128), False)
        products(torch.float16, (33, 45), False)


if __name__ == "__main__":
    main()
