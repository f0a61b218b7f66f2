"""Single operations as they are benchmarked: forward and backward, again and again.

`watch` runs a function on fake tensors under the ledger that simulates whole steps, with the
kernels of the device asked for. Gradients are not cleared between runs and graphs stay, as in the
benchmarks' own loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core.errors import ConfigError, nearest
from ..memory.devices import kernels_of
from ..memory.fakes import fakes_move
from ..memory.report import MemoryReport
from ..memory.values import FakeLedger
from .graphs import MLP, rotate

#: what is run: takes no argument, gives the tensors to go back from and their gradients (or None)
Run = Callable[[], Any]


def watch(name: str, settings: dict[str, Any], device: str, runs: int = 3) -> MemoryReport:
    """The memory of `runs` runs of the operation `name` with `settings`."""
    if name not in OPERATIONS:
        raise ConfigError(f"unknown operation {name!r}{nearest(name, OPERATIONS)}; known: "
                          f"{', '.join(OPERATIONS)}")
    ledger = FakeLedger(kind=device)
    with fakes_move(), FakeTensorMode(), kernels_of(device), ledger:
        run = OPERATIONS[name](**settings)
        for _ in range(runs):
            run()
    return MemoryReport.of(ledger, device="cpu", label=device)


def _floats(*shape: int, dtype: str = "float32", grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), requires_grad=grad)


def _module(module: nn.Module, dtype: str) -> nn.Module:
    return module.to(getattr(torch, dtype))


def _back(forward: Callable[[], Tensor], given: Callable[[Tensor], Tensor] | None = None,
          keep: bool = False) -> Run:
    """``y = forward(); y.backward(given(y))``."""
    def run() -> None:
        y = forward()
        y.backward(None if given is None else given(y), retain_graph=keep)

    return run


def linear_cross_entropy(tokens: int, width: int, words: int, dtype: str) -> Run:
    """A head and its loss; the peer's head waits beside it."""
    head, _other = (_module(nn.Linear(width, words, bias=False), dtype) for _ in range(2))
    x, wanted = _floats(tokens, width, dtype=dtype), torch.empty(tokens, dtype=torch.long)
    return _hold(_back(lambda: F.cross_entropy(head(x), wanted)), _other)


def cross_entropy(tokens: int, words: int, dtype: str) -> Run:
    x, wanted = _floats(tokens, words, dtype=dtype), torch.empty(tokens, dtype=torch.long)
    return _back(lambda: F.cross_entropy(x, wanted))


def rms_norm(rows: int, width: int, dtype: str) -> Run:
    """In elementary operations: statistics in fp32, back to x's dtype, times a weight in fp32."""
    weight, _other = _floats(width), _floats(width)
    x = _floats(rows, width, dtype=dtype)
    g = torch.randn_like(x)

    def forward() -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * h.to(x.dtype)

    return _hold(_back(forward, lambda y: g, keep=True), _other)


def layer_norm(rows: int, width: int, dtype: str) -> Run:
    norm, _other = nn.LayerNorm(width), nn.LayerNorm(width)
    x = _floats(rows, width, dtype=dtype)
    g = torch.randn_like(x)
    return _hold(_back(lambda: norm(x), lambda y: g, keep=True), _other)


def gated_mlp(samples: int, tokens: int, width: int, inner: int, act: str, dtype: str,
              forward: bool = False) -> Run:
    """``down(act(gate x) * up x)``; `forward`: alone, in a process that has gone back."""
    mlp = _module(MLP({"width": width, "inner": inner, "bias": False, "gated": True, "act": act,
                       "lora": None}), dtype)
    x = _floats(samples, tokens, width, dtype=dtype)
    if not forward:
        return _back(lambda: mlp(x), torch.randn_like, keep=True)
    # both threads' libraries are open
    little = _module(nn.Linear(8, 8, bias=False), dtype)
    _back(lambda: little(_floats(1, 8, dtype=dtype)), torch.randn_like)()
    little.zero_grad()
    return lambda: mlp(x)


def rotary(tokens: int, width: int, heads: int, groups: int, dtype: str) -> Run:
    size = width // heads
    q, k = (_floats(1, tokens, n, size, dtype=dtype).transpose(1, 2) for n in (heads, groups))
    gq, gk = torch.randn_like(q), torch.randn_like(k)
    places = torch.empty(1, tokens, dtype=torch.long)
    # the angles are a product
    angles = _floats(1, size // 2, 1, grad=False) @ places[:, None].float()
    del angles
    cos, sin = (_floats(1, tokens, size, dtype=dtype, grad=False) for _ in range(2))

    def run() -> None:
        made = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
        torch.autograd.grad(made, (q, k), (gq, gk), retain_graph=True)

    return _hold(run, places)


def kl_divergence(tokens: int, words: int, dtype: str) -> Run:
    x = _floats(tokens, words, dtype=dtype).log_softmax(-1)
    wanted = _floats(tokens, words, dtype=dtype, grad=False).softmax(-1)
    return _back(lambda: F.kl_div(x, wanted, reduction="batchmean"), keep=True)


def jensen_shannon(tokens: int, words: int, dtype: str) -> Run:
    """Half the divergence of each from the mean of both, of log probabilities."""
    q = _floats(tokens, words, dtype=dtype).log_softmax(-1)
    p = _floats(tokens, words, dtype=dtype, grad=False).log_softmax(-1)

    def forward() -> Tensor:
        mean = torch.lerp(torch.exp(p), torch.exp(q), 0.5)
        return 0.5 * F.kl_div(torch.log(mean), p, reduction="batchmean", log_target=True) \
            + 0.5 * F.kl_div(torch.log(mean), q, reduction="batchmean", log_target=True)

    return _back(forward, keep=True)


def _hold(run: Run, *waiting: Any) -> Run:
    """What else the benchmark keeps alive meanwhile."""
    run.__dict__["waiting"] = waiting
    return run


OPERATIONS: dict[str, Callable[..., Run]] = {
    f.__name__: f for f in (linear_cross_entropy, cross_entropy, rms_norm, layer_norm,
                            gated_mlp, rotary, kl_divergence, jensen_shannon)}
