"""The Fourier domain of a cloud's groups, and a mixer that filters tokens there.

    A_ij = min(1, d_min / |c_i - c_j|),   L = I - D^{-1/2} A D^{-1/2},   L = Phi^T diag(.) Phi

c (G, 3) the groups' centres, d_min the least of a cloud's positive distances. Rows of Phi go from
low frequencies to high. Local bases are of runs of centres along a space-filling curve.

Letters: B clouds, T tokens, G groups, g groups of a run, R width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from .prompts import Listener

#: added to a degree; cells of the curve in a unit of length, and bits of a cell's number by axis
_EPSILON, _CELLS, _BITS = 1e-6, 100, 10


def centres_of(out: Any) -> Tensor | None:
    """The centres (B, G, 3) in what a module returns that gathers points into groups."""
    found = [t for t in (out if isinstance(out, tuple | list) else [out])
             if isinstance(t, Tensor) and t.dim() == 3 and t.shape[-1] == 3]
    return found[0] if found else None


class Noted(Listener):
    """Listens to the module that gathers points into groups: what `make` says of their centres is
    noted under `key`, for all that read it in this forward."""

    def __init__(self, state: Any, adapter: str, key: Any, make: Callable[[Tensor], Any],
                 what: str):
        super().__init__(state, adapter)
        self.__dict__["make"] = make
        self.key, self.what = key, what

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        here, out = self.here, call(*args, **kw)
        self.check(here)
        if here.off or not dict(here.active).get(self.adapter):
            return out
        if (centres := centres_of(out)) is None:
            raise RecipeError(f"{self.what} reads the centres of groups of points: expected "
                              f"(batch, groups, 3) among what {type(module).__name__} returns")
        with torch.no_grad():
            here.noted[self.key] = self.make(centres.detach())
        return out

    def check(self, call: Any) -> None:
        if call.rows is not None:                # any scale will do, but for all samples
            super().check(call)


def noted(key: Any, what: str) -> Any:
    """What was noted under `key` in this forward."""
    try:
        return context().noted[key]
    except KeyError:
        raise RecipeError(f"{what} acts on a cloud's groups, and none have been gathered in this "
                          "forward: run the whole model on points") from None


# -- groups -----------------------------------------------------------------------------------
@torch.no_grad()
def spread(points: Tensor, count: int) -> Tensor:
    """(B, count): which of (B, P, 3) are far from each other. The first is the farthest from the
    mean, then always the one farthest from those before it."""
    x = points.to(torch.promote_types(points.dtype, torch.float32))
    sample = torch.arange(len(x), device=x.device)
    last = (x - x.mean(1, keepdim=True)).square().sum(-1).argmax(1)
    chosen, far = [last], torch.full(x.shape[:2], torch.inf, dtype=x.dtype, device=x.device)
    while len(chosen) < count:
        far = torch.minimum(far, (x - x[sample, last].unsqueeze(1)).square().sum(-1))
        last = far.argmax(1)
        chosen.append(last)
    return torch.stack(chosen, 1)


def between(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, P): squared distances of (B, M, 3) from (B, P, 3), each by itself."""
    return (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)


# -- bases ------------------------------------------------------------------------------------
def spectrum(centres: Tensor) -> Tensor:
    """Phi (..., G, G) of centres (..., G, 3), in float32 at least; rows are orthonormal, and of
    each the entry of the largest magnitude is positive."""
    c = centres.to(torch.promote_types(centres.dtype, torch.float32))
    far = torch.linalg.vector_norm(c.unsqueeze(-2) - c.unsqueeze(-3), dim=-1)
    least = torch.where(far > 0, far, torch.inf).flatten(-2).amin(-1)[..., None, None]
    least = torch.where(least.isinf(), 1, least)           # a cloud whose centres are all one
    near = least / torch.maximum(far, least)               # centres that coincide are at d_min
    near.diagonal(dim1=-2, dim2=-1).fill_(1)
    root = (near.sum(-1) + _EPSILON).rsqrt()
    eye = torch.eye(c.shape[-2], dtype=c.dtype, device=c.device)
    U = torch.linalg.eigh(eye - root.unsqueeze(-1) * near * root.unsqueeze(-2)).eigenvectors
    top = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    return (U * torch.where(top < 0, -1, 1)).mT


def along_curve(centres: Tensor) -> Tensor:
    """(B, G): the groups in the order of a Z-shaped curve through cells of side 1/100."""
    low = centres.amin(1, keepdim=True)
    cell = ((centres - low) * _CELLS).long().clamp_(max=2 ** _BITS - 1)
    key = torch.zeros_like(cell[..., 0])
    for bit in range(_BITS):
        for axis in range(3):
            key |= (cell[..., axis] >> bit & 1) << (3 * bit + axis)
    return key.argsort(dim=-1, stable=True)


def bases(centres: Tensor, local: int) -> tuple[Tensor, Tensor, Tensor]:
    """(Phi (B, G, G), of runs (B, G / g, g, g), the order the runs stand in (B, G))."""
    G = centres.shape[1]
    if G % local:
        fits = [n for n in range(2, G + 1) if G % n == 0]
        raise RecipeError(f"point_gst(local={local}): {G} groups of points do not fall into runs "
                          f"of {local}; {', '.join(map(str, fits))} are possible")
    order = along_curve(centres)
    c = centres.gather(1, order.unsqueeze(-1).expand(-1, -1, 3)).unflatten(1, (G // local, local))
    return spectrum(centres), spectrum(c), order


# -- the mixer --------------------------------------------------------------------------------
class Filter(nn.Module):
    """``s + silu(W norm(s) + b)``; W (R, R), b begin at 0, a norm for each of two domains."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm_global, self.norm_local = nn.LayerNorm(width), nn.LayerNorm(width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, s: Tensor, norm: nn.LayerNorm) -> Tensor:
        seen = F.layer_norm(s, norm.normalized_shape, norm.weight.to(s.dtype),
                            norm.bias.to(s.dtype), norm.eps)
        W, b = self.linear.weight.to(s.dtype), self.linear.bias.to(s.dtype)
        return s + F.silu(F.linear(seen, W, b))


class Spectral(nn.Module):
    """A mixer of a bottleneck: ``silu(t) + Phi^T f(Phi t) + the same in runs`` of the last G
    tokens, which are the points'; the others become silu(h)."""

    def __init__(self, width: int, local: int):
        super().__init__()
        self.local, self.filter = local, Filter(width)

    def forward(self, h: Tensor) -> Tensor:
        whole, runs, order = noted(("spectrum", self.local), "point_gst")
        G = whole.shape[-1]
        if h.dim() != 3 or len(h) != len(whole) or h.shape[1] < G:
            raise RecipeError(f"point_gst reads (batch, tokens, width) of {len(whole)} clouds of "
                              f"{G} groups; a layer is given {tuple(h.shape)}")
        t, f = h[:, -G:], self.filter
        phi = whole.to(h.dtype)
        found = phi.mT @ f(phi @ t, f.norm_global)
        at = order.unsqueeze(-1).expand(-1, -1, t.shape[-1])
        phi = runs.to(h.dtype)
        near = phi.mT @ f(phi @ t.gather(1, at).unflatten(1, runs.shape[1:3]), f.norm_local)
        found = found + torch.zeros_like(t).scatter(1, at, near.flatten(1, 2))
        return F.silu(h) + F.pad(found, (0, 0, h.shape[1] - G, 0))
