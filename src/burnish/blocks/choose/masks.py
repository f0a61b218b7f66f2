"""Which k entries of a matrix: drawn, the largest of a score, whole rows and columns, or given.

Each returns flat positions of the matrix read row by row. `taken` are positions that are left out,
in ascending order, those of another update that this one is to be disjoint from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import RecipeError, TargetError, nearest
from ...core.followed import is_fake
from ...core.reading import plain, reading, regular
from ...core.site import Place, Site
from ..weight.sparse import SparseDelta, spread


def drawn(n: int, k: int, seed: int, key: str, taken: Tensor | None = None) -> Tensor:
    """The same k positions on every machine (`spread`), those of `taken` passed over."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():              # an index has values, also in a simulation
        if taken is None:
            index = spread(n, k, seed, key)
        else:
            index = spread(n, k + taken.numel(), seed, key)
            index = index[~torch.isin(index, taken.cpu())][:k]
    return index + torch.zeros((), dtype=torch.int64)


def as_torch(n: int, k: int, seed: int) -> Tensor:
    """The first k of ``torch.randperm(n)`` on the host: what other libraries draw (8 n bytes for a
    moment)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=g, device="cpu")[:k].clone()


def drawn_over(sizes: Sequence[int], k: int, seed: int, key: str) -> list[Tensor]:
    """k positions of several runs of these sizes together: those of each, counted in it."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        at = spread(sum(sizes), k, seed, key).sort().values
        ends = torch.tensor(sizes).cumsum(0)
        parts = at.tensor_split(torch.searchsorted(at, ends)[:-1])
        found = [part - (end - n) for part, end, n in zip(parts, ends, sizes, strict=True)]
    return [part + torch.zeros((), dtype=torch.int64) for part in found]


def to_come(place: Place, k: int) -> Tensor:
    """k positions in the stead of those that a file brings. RecipeError where a place has fewer."""
    if not 0 <= k <= place.numel:
        raise RecipeError(f"{k} entries of {place.name} are asked for, which has {place.numel}")
    return torch.arange(k)


def largest(score: Tensor, k: int, taken: Tensor | None = None) -> Tensor:
    """Of a score that is not negative."""
    flat = score.flatten()
    return (flat if taken is None else flat.index_fill(0, taken, -1)).topk(k).indices


def structured(out: int, inp: int, k: int, taken: Tensor | None = None) -> Tensor:
    """Diagonal first, then alternately a row and a column, evenly spaced, until k entries."""
    free = torch.ones(out, inp, dtype=torch.bool)
    if taken is not None:
        free.view(-1)[taken.cpu()] = False
    was = free.clone()
    left = k - _fill(free.diagonal(), k)
    for step in range(4 * (out + inp)):
        if not left:
            break
        golden = (step // 2 * 0.6180339887498949) % 1.0
        left -= _fill(free[:, int(golden * inp)] if step % 2 else free[int(golden * out)], left)
    _fill(free.view(-1), left)                   # nearly every entry is asked for
    return (was & ~free).view(-1).nonzero().squeeze(1)


def _fill(line: Tensor, most: int) -> int:
    """Take the free entries of a line, at most so many; how many they were."""
    found = line.nonzero().squeeze(1)[:most]
    line[found] = False
    return found.numel()


def occupied(site: Site) -> Tensor | None:
    """Entries of a place that sparse updates there have already; None where there is none."""
    return had_by(site.place, site.beside)


def had_by(place: Place, beside: Iterable[tuple[Place, Any]]) -> Tensor | None:
    """Entries of a place that the sparse updates among (place, term) have, places of one weight."""
    found = []
    for other, term in beside:
        if isinstance(term, SparseDelta) and not is_fake(term.index):
            index = term.index.long()
            rows = index // place.inp + _first(other) - _first(place)
            inside = (rows >= 0) & (rows < place.out)
            found.append((rows * place.inp + index % place.inp)[inside])
    return torch.cat(found).unique() if found else None


def _first(place: Place) -> int:
    return place.rows[0] if place.rows else 0


def given(file: str, site: Site) -> Tensor:
    """The entries that a safetensors file names: one mask per weight, under the weight's name in
    the model and in its shape there, of truth values or of zeros and ones.

    Raises RecipeError for a file that cannot be read and for masks of another shape, with other
    values or with no entry, TargetError where the names are not those of the targets.
    """
    from safetensors import safe_open
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    path = regular(Path(file).expanduser(), RecipeError)
    whole = site.weight if site.weight._base is None else site.weight._base
    if site.place.kind == "conv" and site.place.transposed:
        raise RecipeError(f"{plain(path)}: no mask is read for a transposed convolution, as "
                          f"{site.place.name} is; leave it out of targets")
    with unset_fake_temporarily(), reading(path, RecipeError), safe_open(path, "pt") as masks:
        _check_names(plain(path), list(masks.keys()), site.places)
        index = _entries(masks.get_tensor(_name(site.place)), site.place, tuple(whole.shape),
                         f"{plain(path)}: the mask of {_name(site.place)}")
    return index + torch.zeros((), dtype=torch.int64)


def _entries(mask: Tensor, place: Place, shape: tuple[int, ...], what: str) -> Tensor:
    if tuple(mask.shape) != shape:
        raise RecipeError(f"{what} has shape {tuple(mask.shape)}, the weight {shape}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise RecipeError(f"{what} has entries that are neither 0 nor 1")
    index = place.view(mask).flatten().nonzero().squeeze(1)
    if not index.numel():
        raise RecipeError(f"{what} has no entry of {place.name}; leave it out of the targets")
    return index


def _name(place: Place) -> str:
    return f"{place.path}.{place.param}" if place.path else place.param


def _check_names(file: str, names: list[str], places: Sequence[Place]) -> None:
    wanted = dict.fromkeys(map(_name, places))
    unknown = [n for n in names if n not in wanted]
    if lacking := [n for n in wanted if n not in names]:
        raise TargetError(f"{file} has no mask for {lacking[0]} ({len(lacking)} of {len(wanted)} "
                          f"targets lack one){nearest(lacking[0], unknown)}; targets says which "
                          "weights it is for")
    if unknown:
        raise TargetError(f"{file} has a mask for {plain(unknown[0], 100)}, which is no target "
                          f"({len(unknown)} of {len(names)} are none)"
                          f"{nearest(unknown[0], wanted)}; masks have the names of weights, and "
                          "targets says which")
