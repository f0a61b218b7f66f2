"""Single entries of g^T x, in Triton. See entries.py."""

import triton
import triton.language as tl


@triton.jit
def gathered(g, x, rows, columns, found, N, K, per, sgn, sgo, sxn, sxi,
             NB: tl.constexpr, KB: tl.constexpr):
    """found (parts, K): ``sum_n g[n, rows_k] x[n, columns_k]`` in fp32; a part is a run of `per`
    tokens."""
    blocks = tl.cdiv(K, KB)
    part = tl.program_id(0) // blocks
    k = (tl.program_id(0) % blocks).to(tl.int64) * KB + tl.arange(0, KB)
    o = tl.load(rows + k, mask=k < K, other=0).to(tl.int64) * sgo
    i = tl.load(columns + k, mask=k < K, other=0).to(tl.int64) * sxi
    acc = tl.zeros((KB,), tl.float32)
    for start in range(part * per, tl.minimum(N, (part + 1) * per), NB):
        n = start + tl.arange(0, NB)
        inside = (n < N)[:, None] & (k < K)[None, :]
        at = n.to(tl.int64)[:, None]
        a = tl.load(g + at * sgn + o[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + at * sxn + i[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(a * b, axis=0)
    tl.store(found + part.to(tl.int64) * K + k, acc, mask=k < K)
