"""Places and selections: where in a model something can be added or trained.

A :class:`Place` is one weight matrix seen as out x in, whatever the module that holds it: a
Linear, the Conv1D of GPT-2 (which stores the transpose), a convolution, an embedding, one slice
of a fused qkv, a projection inside `nn.MultiheadAttention`, or the matrix of every expert in a
3-D parameter. Terms are written for out x in matrices and never look at the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import RankError

#: linear: y = x W^T.  conv1d: HF Conv1D, stores W^T.  conv: W is (out, in/groups*kernel), of a
#: transposed convolution too, which stores (in, out/groups, kernel).
#: embedding: W is (width, vocabulary), the transpose of what is stored.
#: mha: a matrix a module reads past the child that owns it, without calling that child: the
#: projections of `nn.MultiheadAttention`, some of Mamba's; `path` is the reader then.
#: experts: a 3-D parameter (experts, out, in) or its transpose; each expert is one matrix.
KINDS = ("linear", "conv1d", "conv", "embedding", "mha", "experts")


@dataclass(frozen=True)
class Place:
    """One out x in weight matrix of the model.

    path: module that owns the computation (for `mha` the MultiheadAttention itself).
    param: the parameter's name below that module (``weight``, ``out_proj.weight``...).
    rows: (start, stop) along `out` when only a slice is meant (fused qkv); else None.
    experts: number of matrices in a 3-D parameter; 0 for an ordinary place.
    transposed: the parameter stores in x out (Conv1D, embeddings, transposed convolutions, some
        expert layouts).
    kernel: entries of a convolution's kernel; inp is channels x kernel.
    axes: its sides, ``(3, 3)``; () elsewhere.  groups: of the convolution.
    """

    path: str
    param: str
    kind: str
    out: int
    inp: int
    role: str = ""
    block: int | None = None
    rows: tuple[int, int] | None = None
    experts: int = 0
    transposed: bool = False
    kernel: int = 1
    axes: tuple[int, ...] = ()
    groups: int = 1

    @property
    def name(self) -> str:
        """A name unique in the model; slices carry their role (``attn.qkv.weight[q]``)."""
        head = f"{self.path}.{self.param}" if self.path else self.param
        return f"{head}[{self.role}]" if self.rows else head

    @property
    def numel(self) -> int:
        return self.out * self.inp * max(1, self.experts)

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored parameter as (out, in), or (experts, out, in): a view, but for kernels held
        in another order (channels last, transposed convolutions), which are copied."""
        w = stored
        if self.kind == "conv":
            if self.transposed:                  # (g n, out / g, ...) -> (out, n, ...)
                w = w.unflatten(0, (-1, self.inp // self.kernel)).transpose(1, 2).flatten(0, 1)
            w = w.flatten(1)
        elif self.transposed:
            w = w.transpose(-1, -2)
        if self.rows:
            w = w[..., self.rows[0] : self.rows[1], :]
        return w

    def unview(self, w: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """A whole (out, in) matrix in the layout of the stored parameter: what `view` undoes."""
        if self.kind == "conv":
            if not self.transposed:
                return w.reshape(stored.shape)
            n = self.inp // self.kernel
            w = w.reshape(stored.shape[0] // n, -1, n, self.kernel).transpose(1, 2)
            return w.reshape(stored.shape)
        return w.transpose(-1, -2) if self.transposed else w

    def stored(self, module: nn.Module) -> torch.Tensor:
        """The parameter itself (whole, as stored)."""
        *parents, leaf = self.param.split(".")
        for p in parents:
            module = getattr(module, p)
        return getattr(module, leaf)

    def check_rank(self, rank: int, method: str) -> None:
        """A rank above the matrix is an error that names the place and the largest rank."""
        if not 1 <= rank <= min(self.out, self.inp):
            raise RankError(
                f"{method}: rank {rank} does not fit {self.name} ({self.out} x {self.inp}); "
                f"the largest rank there is {min(self.out, self.inp)}"
            )


@dataclass(frozen=True)
class Site:
    """A place as a method finds it when it is asked for its answer.

    place: where.
    weight: the (out, in) view of what stands there, possibly fake; (experts, out, in) for experts.
    seen: the statistic the data pass gathered here (`Method.observe`); None where nothing was read.
    settled: what `Method.settle` decided for this place once data was read: kept in files, so that
        a load needs no data.
    shared: module whose attributes are the tensors the part owns once (`Method.shared`), or None.
    blank: no values are wanted, shapes are what counts: they come from a file, or the model has
        none (a simulation).
    beside: (place, term) of what stands on the same parameter already: of other adapters, and of
        parts before this one.
    places: all the places that the part is asked about.
    weight_of: ``with weight_of(place) as W``, the weight of another of these.
    rounded: (out, in) weight -> what the recipe's storage would make of it here, decoded again; it
        gives None where none of the recipe will hold this weight, or data tell what it holds.
    """

    place: Place
    weight: torch.Tensor
    seen: Any = None
    settled: Mapping[str, Any] = field(default_factory=dict)
    shared: Any = None
    blank: bool = False
    beside: Sequence[tuple[Place, Any]] = ()
    places: Sequence[Place] = ()
    weight_of: Any = None
    rounded: Callable[[torch.Tensor], torch.Tensor | None] = lambda W: None


@dataclass(frozen=True)
class Selection:
    """An existing parameter that trains whole. Entries, rows and columns are sparse deltas.

    name: the parameter's dotted name in the model, as in ``model.named_parameters()``.
    decay: False keeps weight decay from it.
    """

    name: str
    decay: bool = True


@dataclass(frozen=True)
class Branch:
    """A module beside the model's own: ``write(...) <- write(...) + module(read)``.

    read: (path, "input" | "output") of the hidden state the branch looks at.
    write: path of the module whose output it changes; one with ``read=(write, "output")`` is
    sequential, with ``read=(write, "input")`` parallel, with another path it spans modules.
    compose: "add" adds the branch's result; "replace" takes it instead of the output; "blend" adds
        it to (1 - l) times the output, l the module's ``scale``, which its result holds already.
    at: "output" changes what `write` returns, "input" what it is given, which it then reads.
    undoes: it takes away again what stands elsewhere: of several adapters the last one's comes
        first, and they are in use whole.
    """

    write: str
    module: nn.Module
    read: tuple[str, str] = ("", "output")
    compose: str = "add"
    at: str = "output"
    branches_merge: bool = False
    undoes: bool = False
