"""Kernels in Triton beside torch's operators, and beside what the device can do (README.md).

    python benchmarks/kernels.py [product delta entries] --out FILE
    python benchmarks/kernels.py --table FILE
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny       (no GPU: small shapes, no shares)

Each row is first held against float64 (what flows back against torch's operators in fp32), then
timed on both roads, with the caches written over before every turn. `bandwidth` is the least
traffic of the row (every operand read, every result written, once) by its time, as a share of a
copy's; `rate` its operations of matrices as a share of cuBLAS's for that precision, fp32 without
TF32. Both ceilings are measured in the same process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.blocks.gpu import road
from burnish.blocks.gpu.entries import at_entries
from burnish.blocks.weight.quantise import Nf4Provider
from burnish.blocks.weight.sparse import spread
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.site import Place

#: facts, roads, how far off the kernels' result is, least bytes, operations, precision
Row = tuple[dict[str, Any], dict[str, Callable[[], Any]], Callable[[Any], float], int, int, str]
#: largest error allowed, of the largest number of a result
ERROR = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).partition(".")[2]


def _off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def taken(how: str, fn: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with road.use(how):
            return fn()
    return run


def products(shapes: list, tokens: list[int], device: str) -> Iterator[Row]:
    """x W^T and g W with W in NF4. By torch: decoded, then cuBLAS."""
    for out, inp in shapes:
        provider = Nf4Provider(torch.randn(out, inp, device=device))
        for dtype in (torch.bfloat16, torch.float32):
            with road.use("torch"):
                W = provider.weight().to(dtype)
            for n in tokens:
                for which, width in (("forward", inp), ("backward", out)):
                    t = torch.randn(n, width, device=device).to(dtype)
                    with road.use("triton"):
                        coded = provider.coded(t).to(dtype)
                    if which == "forward":
                        own, theirs = (lambda c=coded, t=t: c.linear(t)), \
                            (lambda t=t, p=provider: t @ p.weight().to(t.dtype).t())
                        want = t.double() @ W.double().t()
                    else:
                        own, theirs = (lambda c=coded, t=t: c.back(t)), \
                            (lambda t=t, p=provider: t @ p.weight().to(t.dtype))
                        want = t.double() @ W.double()
                    moved = provider.nbytes + n * (out + inp) * t.element_size()
                    yield ({"what": f"product {which}", "out": out, "in": inp, "tokens": n},
                           {"triton": taken("triton", own), "torch": taken("torch", theirs)},
                           lambda got, want=want: _off(got, want), moved, 2 * n * out * inp,
                           _name(dtype))


def deltas(shapes: list, device: str) -> Iterator[Row]:
    """Threshold, one pass of panels, and one pass of what flows back, by panels."""
    from burnish.blocks.weight.panels import PANEL

    for out, inp in shapes:
        step = max(1, PANEL // out)
        runs = [(i, min(inp, i + step)) for i in range(0, inp, step)]
        for rank, mixed in ((8, False), (32, True)):
            with torch.device(device):
                term = KernelDelta(Place("l", "weight", "linear", out, inp), rank, 0.9, mixed)
                G = torch.randn(out, step, dtype=torch.bfloat16)
            wide = 4 * out * inp
            count = len(list(term.parameters()))

            def tiles(term=term, runs=runs) -> Any:
                state = term.prepare()
                return state, [term.tile(a, b, state) for a, b in runs][0]

            def pulls(term=term, runs=runs, G=G, count=count) -> Any:
                state, grads = term.prepare(), [None] * count
                for a, b in runs:
                    term.pull(a, b, G[:, : b - a], state, grads)
                return grads

            def dense(got: Any, term=term, runs=runs) -> float:
                (a, b), (state, tile) = runs[0], got
                d = [torch.cdist(term.B[h].double(), term.A[h, a:b].double(),
                                 compute_mode="donot_use_mm_for_euclid_dist") for h in (0, 1)]
                K = 0.1 * (d[0] - d[1])
                if term.mixed:
                    K = K + term.alpha * torch.softmax(K / term.gamma, 0) + term.beta
                sure = (K.abs() - state.tau).abs() > 1e-3 * state.tau    # not beside the border
                want = K * K.abs() * (K.abs() > state.tau)
                return _off(tile[sure], want[sure].detach())

            def kept(got: Any, term=term) -> float:
                """Beyond any bound where the share of zeros is not s, to an entry."""
                with road.use("triton"):
                    far = abs(term.nnz() - (1 - term.sparsity) * term.out * term.inp)
                return 0.0 if far <= 1 else 1.0

            def beside(got: Any, pulls=pulls) -> float:
                """Of all gradients; an entry beside the border may fall either way, so a tenth."""
                with road.use("torch"):
                    want = pulls()
                return max(_off(a, b.double()) for a, b in zip(got, want, strict=True)) / 10

            facts = {"out": out, "in": inp, "rank": rank, "mixed": mixed}
            for what, fn, check, moved in (
                    ("threshold", lambda t=term: t.prepare(), kept, 0),
                    ("threshold and panels", tiles, dense, wide),
                    ("threshold and what flows back", pulls, beside, wide * 3 // 2)):
                yield ({"what": what, **facts},
                       {h: taken(h, fn) for h in ("triton", "torch")}, check, moved, 0, "float32")


def sparse(shapes: list, tokens: list[int], device: str) -> Iterator[Row]:
    """1 % of the entries of g^T x. By torch: picked from the product."""
    for out, inp in shapes:
        index = spread(out * inp, out * inp // 100, 0).sort().values.to(device)
        rows, cols = index // inp, index % inp
        for dtype in (torch.bfloat16, torch.float32):
            for n in tokens:
                g, x = (torch.randn(n, w, device=device).to(dtype) for w in (out, inp))
                want = (g[:, rows[:1000]].double() * x[:, cols[:1000]].double()).sum(0)
                moved = n * (out + inp) * g.element_size() + 12 * index.numel()
                yield ({"what": "entries", "out": out, "in": inp, "tokens": n,
                        "entries": index.numel()},
                       {"triton": lambda g=g, x=x, at=(rows, cols): at_entries(g, x, *at),
                        "torch": lambda g=g, x=x, at=(rows, cols): (g.t() @ x)[at]},
                       lambda got, want=want: _off(got[:1000], want), moved,
                       2 * n * index.numel(), _name(dtype))


class Clock:
    """Seconds of a call on a device; its caches are written over beforehand."""

    def __init__(self, device: str, turns: int):
        self.gpu, self.turns = device == "cuda", turns
        self.cold = torch.empty(256 << 20 if self.gpu else 1, dtype=torch.uint8, device=device)

    def seconds(self, fn: Callable[[], Any]) -> float:
        """The median of the turns, after three that do not count."""
        return statistics.median([self._once(fn) for _ in range(self.turns + 3)][3:])

    def _once(self, fn: Callable[[], Any]) -> float:
        self.cold.zero_()
        if not self.gpu:
            t0 = time.perf_counter()
            fn()
            return time.perf_counter() - t0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def ceilings(clock: Clock) -> dict[str, float]:
    """Bytes a second of a copy, and operations a second of cuBLAS, by precision."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(big)
    found = {"copy": 2 * big.numel() / clock.seconds(lambda: to.copy_(big))}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        found[_name(dtype)] = 2 * 8192**3 / clock.seconds(lambda a=a: a @ a)
    return found


def measured(which: list[str], tiny: bool, turns: int) -> Iterator[dict[str, Any]]:
    device = "cpu" if tiny else "cuda"
    shapes = [(40, 70)] if tiny else [(4096, 4096), (11008, 4096), (4096, 11008)]
    tokens = [5] if tiny else [1, 16, 512, 4096]
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(device, turns)
    most = {} if tiny else ceilings(clock)
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__,
             "triton": __import__("triton").__version__,
             "device": "Triton's interpreter" if tiny else torch.cuda.get_device_name()}
    rows: dict[str, Callable[[], Iterator[Row]]] = {
        "product": lambda: products(shapes, tokens, device),
        "delta": lambda: deltas(shapes, device),
        "entries": lambda: sparse(shapes, tokens[-2:], device)}
    for name in which:
        for facts, roads, check, moved, operations, dtype in rows[name]():
            with torch.no_grad():
                off = check(roads["triton"]())
                if not off < ERROR[dtype]:
                    sys.exit(f"{facts}, {dtype}: off by {off:.3g}")
                own, theirs = (clock.seconds(roads[r]) for r in ("triton", "torch"))
            row = {**facts, "dtype": dtype, "off": off, "triton_s": own, "torch_s": theirs,
                   "x": own / theirs}
            if most:
                row |= {"bandwidth": moved / own / most["copy"],
                        "rate": operations / own / most[dtype], "ceilings": most}
            yield {**row, **about}


def table(path: Path) -> None:
    print("| what | precision | triton ms | torch ms | bandwidth | rate |")
    print("|---|---|---|---|---|---|")
    for line in path.read_text().splitlines():
        d = json.loads(line)
        facts = ", ".join(f"{k} {d[k]}" for k in ("out", "in", "tokens", "rank", "mixed", "entries")
                          if k in d)
        shares = " | ".join(f"{d[k]:.0%}" if d.get(k) else "" for k in ("bandwidth", "rate"))
        print(f"| {d['what']}: {facts} | {d['dtype']} | {d['triton_s'] * 1e3:.3f} | "
              f"{d['torch_s'] * 1e3:.3f} | {shares} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = ("product", "delta", "entries")
    parser.add_argument("which", nargs="*", metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    if given.table:
        return table(given.table)
    if wrong := set(given.which) - set(kinds):
        parser.error(f"{sorted(wrong)[0]!r}: expected some of {', '.join(kinds)}")
    if not given.tiny and (not torch.cuda.is_available() or road.interpreted()):
        sys.exit("these figures are a GPU's, and none is here (or TRITON_INTERPRET is set); --tiny "
                 "runs the script without one")
    for row in measured(given.which or list(kinds), given.tiny, given.turns):
        print(json.dumps(row), flush=True)
        if given.out:
            with given.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
    return None


if __name__ == "__main__":
    main()
