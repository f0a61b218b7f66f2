"""The kernel delta in Triton: its entries are made in registers, wherever they are wanted.

    d_h[i, o] = || A_h[i] - B_h[o] ||_2       by direct differences, in fp32
    D = 0.1 (d_1 - d_2)                       K = D,  or  D + alpha softmax_o(D / gamma) + beta
    Delta = K gate,   gate = |K| or 1, and 0 where |K| <= tau; constant in the gradient

A block is (IB, OB): some input features, some outputs. A (2, IN, Q), B (2, OUT, Q). stats (2, IN):
the largest D / gamma of each row, and what the exponentials of the rest add up to. Every kernel
makes K by the same operations on each entry, so that a threshold that one has found divides the
entries of another exactly. See distances.py.
"""

import triton
import triton.language as tl


@triton.jit
def distances(A, B, i, o, IN, OUT, Q: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr):
    """Both distances of a block."""
    a, b = A + i.to(tl.int64) * Q, B + o.to(tl.int64) * Q
    first = tl.zeros((IB, OB), tl.float32)
    second = tl.zeros((IB, OB), tl.float32)
    for q in range(Q):
        e = (tl.load(a + q, mask=i < IN, other=0.0).to(tl.float32)[:, None]
             - tl.load(b + q, mask=o < OUT, other=0.0).to(tl.float32)[None, :])
        first = tl.fma(e, e, first)
        e = (tl.load(a + IN * Q + q, mask=i < IN, other=0.0).to(tl.float32)[:, None]
             - tl.load(b + OUT * Q + q, mask=o < OUT, other=0.0).to(tl.float32)[None, :])
        second = tl.fma(e, e, second)
    return tl.sqrt_rn(first), tl.sqrt_rn(second)


@triton.jit
def entries(A, B, alpha, gamma, beta, stats, i, o, IN, OUT, Q: tl.constexpr, MIXED: tl.constexpr,
            IB: tl.constexpr, OB: tl.constexpr):
    """(d_1, d_2, D, the softmax, K) of a block."""
    first, second = distances(A, B, i, o, IN, OUT, Q, IB, OB)
    D = (first - second) * 0.1
    S = D
    K = D
    if MIXED:
        most = tl.load(stats + i, mask=i < IN, other=0.0)[:, None]
        total = tl.load(stats + IN + i, mask=i < IN, other=1.0)[:, None]
        S = tl.exp(D / tl.load(gamma).to(tl.float32) - most) / total
        K = S * tl.load(alpha).to(tl.float32) + D + tl.load(beta).to(tl.float32)
    return first, second, D, S, K


@triton.jit
def gates(K, tau, SQUARE: tl.constexpr, CUT: tl.constexpr):
    """The constant factor. A K that is no number stays none."""
    gate = tl.abs(K)
    if CUT:
        low = gate <= tl.load(tau)
        if not SQUARE:
            gate = tl.full(K.shape, 1.0, tl.float32)
        return tl.where(low, 0.0, gate)
    else:
        if SQUARE:
            return gate
        else:
            return tl.full(K.shape, 1.0, tl.float32)


@triton.jit
def softmax(A, B, gamma, stats, IN, OUT, Q: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr):
    """stats, of IB rows a program."""
    i = tl.program_id(0) * IB + tl.arange(0, IB)
    most = tl.full((IB,), float("-inf"), tl.float32)
    total = tl.zeros((IB,), tl.float32)
    for start in range(0, OUT, OB):
        o = start + tl.arange(0, OB)
        first, second = distances(A, B, i, o, IN, OUT, Q, IB, OB)
        z = (first - second) * 0.1 / tl.load(gamma).to(tl.float32)
        z = tl.where((o < OUT)[None, :], z, float("-inf"))
        now = tl.maximum(most, tl.max(z, axis=1))
        total = total * tl.exp(most - now) + tl.sum(tl.exp(z - now[:, None]), axis=1)
        most = now
    tl.store(stats + i, most, mask=i < IN)
    tl.store(stats + IN + i, total, mask=i < IN)


@triton.jit
def counts(A, B, alpha, gamma, beta, stats, prefix, found, IN, OUT, Q: tl.constexpr,
           MIXED: tl.constexpr, LEVEL: tl.constexpr, BINS: tl.constexpr,
           IB: tl.constexpr, OB: tl.constexpr):
    """found (2, BINS) += how often a digit of the bits of |K| occurs, of those entries whose bits
    above it are `prefix`: one histogram for each of two prefixes. Non-negative floats sort as
    their bits do. LEVEL 0: the upper 11 bits of 32, all entries, one histogram; 1: 11; 2: 10."""
    i = tl.program_id(0) * IB + tl.arange(0, IB)
    one = tl.zeros((BINS,), tl.int32)
    two = tl.zeros((BINS,), tl.int32)
    for start in range(0, OUT, OB):
        o = start + tl.arange(0, OB)
        first, second, D, S, K = entries(A, B, alpha, gamma, beta, stats, i, o, IN, OUT, Q, MIXED,
                                         IB, OB)
        bits = tl.reshape(tl.abs(K).to(tl.int32, bitcast=True), (IB * OB,))
        inside = tl.reshape((i < IN)[:, None] & (o < OUT)[None, :], (IB * OB,))
        if LEVEL == 0:
            one += tl.histogram(bits >> 21, BINS, mask=inside)
        elif LEVEL == 1:
            digit = (bits >> 10) & 2047
            one += tl.histogram(digit, BINS, mask=inside & ((bits >> 21) == tl.load(prefix)))
            two += tl.histogram(digit, BINS, mask=inside & ((bits >> 21) == tl.load(prefix + 1)))
        else:
            digit = bits & 1023
            one += tl.histogram(digit, BINS, mask=inside & ((bits >> 10) == tl.load(prefix)))
            two += tl.histogram(digit, BINS, mask=inside & ((bits >> 10) == tl.load(prefix + 1)))
    bins = tl.arange(0, BINS)
    tl.atomic_add(found + bins, one.to(tl.int64), mask=one > 0)
    if LEVEL > 0:
        tl.atomic_add(found + BINS + bins, two.to(tl.int64), mask=two > 0)


@triton.jit
def alive(A, B, alpha, gamma, beta, stats, tau, found, IN, OUT, Q: tl.constexpr,
          MIXED: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr):
    """found[program]: entries of its rows above tau."""
    i = tl.program_id(0) * IB + tl.arange(0, IB)
    n = tl.zeros((IB,), tl.int32)
    for start in range(0, OUT, OB):
        o = start + tl.arange(0, OB)
        first, second, D, S, K = entries(A, B, alpha, gamma, beta, stats, i, o, IN, OUT, Q, MIXED,
                                         IB, OB)
        above = (tl.abs(K) > tl.load(tau)) & (i < IN)[:, None] & (o < OUT)[None, :]
        n += tl.sum(above.to(tl.int32), axis=1)
    tl.store(found + tl.program_id(0), tl.sum(n, axis=0))


@triton.jit
def panel(A, B, alpha, gamma, beta, stats, tau, delta, i0, i1, IN, OUT, Q: tl.constexpr,
          MIXED: tl.constexpr, SQUARE: tl.constexpr, CUT: tl.constexpr,
          IB: tl.constexpr, OB: tl.constexpr):
    """delta (i1 - i0, OUT): rows i0 to i1 of Delta."""
    wide = tl.cdiv(OUT, OB)
    i = i0 + (tl.program_id(0) // wide) * IB + tl.arange(0, IB)
    o = (tl.program_id(0) % wide) * OB + tl.arange(0, OB)
    first, second, D, S, K = entries(A, B, alpha, gamma, beta, stats, i, o, IN, OUT, Q, MIXED,
                                     IB, OB)
    tl.store(delta + (i - i0).to(tl.int64)[:, None] * OUT + o[None, :],
             (K * gates(K, tau, SQUARE, CUT)).to(delta.dtype.element_ty),
             mask=(i < i1)[:, None] & (o < OUT)[None, :])


@triton.jit
def pulled(A, B, alpha, gamma, beta, stats, tau, G, sgo, sgi, i, o, i0, i1, IN, OUT,
           Q: tl.constexpr, MIXED: tl.constexpr, SQUARE: tl.constexpr, CUT: tl.constexpr,
           IB: tl.constexpr, OB: tl.constexpr):
    """(d_1, d_2, D, the softmax, Delta, dL/dK) of a block; dL/dK is zero outside. G: dL/dDelta,
    entry (o, i) at o sgo + (i - i0) sgi."""
    first, second, D, S, K = entries(A, B, alpha, gamma, beta, stats, i, o, IN, OUT, Q, MIXED,
                                     IB, OB)
    gate = gates(K, tau, SQUARE, CUT)
    inside = (i < i1)[:, None] & (o < OUT)[None, :]
    at = o.to(tl.int64)[None, :] * sgo + (i - i0).to(tl.int64)[:, None] * sgi
    dK = tl.load(G + at, mask=inside, other=0.0).to(tl.float32) * gate
    return first, second, D, S, K * gate, tl.where(inside, dK, 0.0)


@triton.jit
def shares(A, B, alpha, gamma, beta, stats, tau, G, sgo, sgi, share, straight, i0, i1, IN, OUT,
           per, Q: tl.constexpr, SQUARE: tl.constexpr, CUT: tl.constexpr,
           IB: tl.constexpr, OB: tl.constexpr):
    """share, straight (parts, i1 - i0): of each row the sum of softmax times dL/dK, and of dL/dK;
    a part is a run of `per` outputs."""
    rows = tl.cdiv(i1 - i0, IB)
    part = tl.program_id(0) // rows
    i = i0 + (tl.program_id(0) % rows) * IB + tl.arange(0, IB)
    weighed = tl.zeros((IB,), tl.float32)
    plain = tl.zeros((IB,), tl.float32)
    for start in range(part * per, tl.minimum(OUT, (part + 1) * per), OB):
        o = start + tl.arange(0, OB)
        first, second, D, S, delta, dK = pulled(A, B, alpha, gamma, beta, stats, tau, G, sgo, sgi,
                                                i, o, i0, i1, IN, OUT, Q, True, SQUARE, CUT, IB, OB)
        weighed += tl.sum(S * dK, axis=1)
        plain += tl.sum(dK, axis=1)
    to = part.to(tl.int64) * (i1 - i0) + i - i0
    tl.store(share + to, weighed, mask=i < i1)
    tl.store(straight + to, plain, mask=i < i1)


@triton.jit
def own(S, dK, share, i, i0, i1):
    """What the softmax passes on of dL/dK, without alpha / gamma."""
    return S * (dK - tl.load(share + (i - i0), mask=i < i1, other=0.0)[:, None])


@triton.jit
def ratio(dD, d):
    """0.1 dL/dD / d; the gradient of a zero distance is zero."""
    return tl.where(d == 0, 0.0, dD * 0.1 / tl.where(d == 0, 1.0, d))


@triton.jit
def back_rows(A, B, alpha, gamma, beta, stats, tau, G, sgo, sgi, share, delta, dA, slope, i0, i1,
              IN, OUT, per, Q: tl.constexpr, MIXED: tl.constexpr, SQUARE: tl.constexpr,
              CUT: tl.constexpr, QB: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr):
    """delta (i1 - i0, OUT), dA (parts, 2, i1 - i0, Q) and slope (parts, i1 - i0), which is of each
    row the sum of `own` times D; a part is a run of `per` outputs."""
    rows = tl.cdiv(i1 - i0, IB)
    part = tl.program_id(0) // rows
    i = i0 + (tl.program_id(0) % rows) * IB + tl.arange(0, IB)
    a, width = A + i.to(tl.int64) * Q, i1 - i0
    column = tl.arange(0, QB)[None, :]
    one = tl.zeros((IB, QB), tl.float32)
    two = tl.zeros((IB, QB), tl.float32)
    turn = tl.zeros((IB,), tl.float32)
    for start in range(part * per, tl.minimum(OUT, (part + 1) * per), OB):
        o = start + tl.arange(0, OB)
        inside = (i < i1)[:, None] & (o < OUT)[None, :]
        first, second, D, S, made, dD = pulled(A, B, alpha, gamma, beta, stats, tau, G, sgo, sgi,
                                               i, o, i0, i1, IN, OUT, Q, MIXED, SQUARE, CUT, IB, OB)
        tl.store(delta + (i - i0).to(tl.int64)[:, None] * OUT + o[None, :],
                 made.to(delta.dtype.element_ty), mask=inside)
        if MIXED:
            through = tl.where(inside, own(S, dD, share, i, i0, i1), 0.0)
            turn += tl.sum(through * D, axis=1)
            dD += tl.load(alpha).to(tl.float32) / tl.load(gamma).to(tl.float32) * through
        R1, R2 = ratio(dD, first), ratio(dD, second)
        b = B + o.to(tl.int64) * Q
        for q in range(Q):
            e = (tl.load(a + q, mask=i < IN, other=0.0).to(tl.float32)[:, None]
                 - tl.load(b + q, mask=o < OUT, other=0.0).to(tl.float32)[None, :])
            one += tl.where(column == q, tl.sum(R1 * e, axis=1)[:, None], 0.0)
            e = (tl.load(a + IN * Q + q, mask=i < IN, other=0.0).to(tl.float32)[:, None]
                 - tl.load(b + OUT * Q + q, mask=o < OUT, other=0.0).to(tl.float32)[None, :])
            two -= tl.where(column == q, tl.sum(R2 * e, axis=1)[:, None], 0.0)
    to = (part.to(tl.int64) * 2 * width + i - i0)[:, None] * Q + column
    there = (i < i1)[:, None] & (column < Q)
    tl.store(dA + to, one, mask=there)
    tl.store(dA + width * Q + to, two, mask=there)
    if MIXED:
        tl.store(slope + part.to(tl.int64) * width + i - i0, turn, mask=i < i1)


@triton.jit
def back_columns(A, B, alpha, gamma, beta, stats, tau, G, sgo, sgi, share, dB, i0, i1, IN, OUT,
                 per, Q: tl.constexpr, MIXED: tl.constexpr, SQUARE: tl.constexpr,
                 CUT: tl.constexpr, QB: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr):
    """dB (parts, 2, OUT, Q); a part is a run of `per` rows of the panel."""
    wide = tl.cdiv(OUT, OB)
    part = tl.program_id(0) // wide
    o = (tl.program_id(0) % wide) * OB + tl.arange(0, OB)
    b = B + o.to(tl.int64) * Q
    column = tl.arange(0, QB)[None, :]
    one = tl.zeros((OB, QB), tl.float32)
    two = tl.zeros((OB, QB), tl.float32)
    for start in range(i0 + part * per, tl.minimum(i1, i0 + (part + 1) * per), IB):
        i = start + tl.arange(0, IB)
        first, second, D, S, made, dD = pulled(A, B, alpha, gamma, beta, stats, tau, G, sgo, sgi,
                                               i, o, i0, i1, IN, OUT, Q, MIXED, SQUARE, CUT, IB, OB)
        if MIXED:
            inside = (i < i1)[:, None] & (o < OUT)[None, :]
            through = tl.where(inside, own(S, dD, share, i, i0, i1), 0.0)
            dD += tl.load(alpha).to(tl.float32) / tl.load(gamma).to(tl.float32) * through
        R1, R2 = ratio(dD, first), ratio(dD, second)
        a = A + i.to(tl.int64) * Q
        for q in range(Q):
            e = (tl.load(a + q, mask=i < IN, other=0.0).to(tl.float32)[:, None]
                 - tl.load(b + q, mask=o < OUT, other=0.0).to(tl.float32)[None, :])
            one -= tl.where(column == q, tl.sum(R1 * e, axis=0)[:, None], 0.0)
            e = (tl.load(a + IN * Q + q, mask=i < IN, other=0.0).to(tl.float32)[:, None]
                 - tl.load(b + OUT * Q + q, mask=o < OUT, other=0.0).to(tl.float32)[None, :])
            two += tl.where(column == q, tl.sum(R2 * e, axis=0)[:, None], 0.0)
    to = (part.to(tl.int64) * 2 * OUT + o)[:, None] * Q + column
    there = (o < OUT)[:, None] & (column < Q)
    tl.store(dB + to, one, mask=there)
    tl.store(dB + OUT * Q + to, two, mask=there)
