"""Single entries of a product of gradient and input: what the values of a sparse update get.

``dv_k = sum_n g[n, o_k] x[n, i_k]`` without g^T x: each program sums a run of entries over a run of
tokens, in fp32 whatever the tokens' precision, and torch adds up the runs. It reads 2 N numbers an
entry and makes nothing of the matrix's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .distances import parts_of
from .road import launch

NB, KB = 32, 64


def at_entries(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(k,) in fp32 of g (N, out) and x (N, in), of any strides."""
    from . import entries_kernels

    N, K = g.shape[0], rows.numel()
    blocks = -(-K // KB)
    parts, per = parts_of(blocks, -(-N // NB), NB)
    found = torch.empty(parts, K, dtype=torch.float32, device=g.device)
    launch(entries_kernels.gathered, blocks * parts, g, x, rows, columns, found, N, K, per,
           *g.stride(), *x.stride(), NB=NB, KB=KB)
    return found.sum(0)
