"""Products with a frozen weight that is decoded tile by tile, in Triton. See coded.py.

A tile is (OB, IB): some outputs, some inputs. Entry (o, i) of the weight is number
``start + o so + i si`` of what is held. FORM 0: numbers in a precision of their own; 1: NF4 with
block maxima in fp32; 2: NF4 with block maxima in 8 bits.

EVEN: inputs lie side by side, and a tile of 64 of them is one block of each row: its scale is read
once a row, and a byte once for both its codes.

INTERPRETED: in Triton's interpreter, which cuts bfloat16 instead of rounding it, and multiplies no
bfloat16.
"""

import triton
import triton.language as tl


@triton.jit
def narrowed(v, D: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 rounded to D, half to even."""
    if D == tl.bfloat16:
        if INTERPRETED:
            bits = v.to(tl.int32, bitcast=True)
            bits = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), bits)
            return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return v.to(D)


@triton.jit
def dotted(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b, accumulated in fp32; fp32 factors are not cut to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scales(absmax, top, offset, dynamic, block, inside, FORM: tl.constexpr):
    """The maxima of NF4 blocks."""
    if FORM == 2:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        most = tl.load(top + block // 256, mask=inside, other=0.0)
        return tl.load(dynamic + code) * most + tl.load(offset)
    else:
        return tl.load(absmax + block, mask=inside, other=0.0)


@triton.jit
def tile(codes, absmax, top, offset, dynamic, levels, o, i0, OUT, IN, so, si, start,
         FORM: tl.constexpr, EVEN: tl.constexpr, HELD: tl.constexpr, D: tl.constexpr,
         IB: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rows o, IB columns from i0 of the weight, in D; zero outside."""
    i = i0 + tl.arange(0, IB)
    inside = (o < OUT)[:, None] & (i < IN)[None, :]
    row = start + o.to(tl.int64) * so
    if FORM == 0:
        at = row[:, None] + i.to(tl.int64)[None, :] * si
        w = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32)
    else:
        if EVEN:
            first = row + i0
            a = scales(absmax, top, offset, dynamic, first // 64, o < OUT, FORM)
            pair = tl.arange(0, IB // 2)
            there = (o < OUT)[:, None] & (i0 + 2 * pair < IN)[None, :]
            byte = tl.load(codes + (first // 2)[:, None] + pair[None, :], mask=there, other=0)
            byte = byte.to(tl.int32)
            w = tl.interleave(tl.load(levels + (byte >> 4)), tl.load(levels + (byte & 15)))
            w = w * a[:, None]
        else:
            at = row[:, None] + i.to(tl.int64)[None, :] * si
            byte = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
            code = tl.where(at % 2 == 0, byte >> 4, byte & 15)
            w = tl.load(levels + code)
            w = w * scales(absmax, top, offset, dynamic, at // 64, inside, FORM)
        w = tl.where(inside, w, 0.0)
    return narrowed(narrowed(w, HELD, INTERPRETED).to(tl.float32), D, INTERPRETED)


@triton.jit
def forward(x, codes, absmax, top, offset, dynamic, levels, bias, y,
            N, OUT, IN, sxn, sxi, so, si, start,
            FORM: tl.constexpr, EVEN: tl.constexpr, HELD: tl.constexpr, BIAS: tl.constexpr,
            NB: tl.constexpr, OB: tl.constexpr, IB: tl.constexpr, INTERPRETED: tl.constexpr):
    """y (N, OUT) = x W^T + bias. Programs side by side read the same rows of W."""
    D: tl.constexpr = x.dtype.element_ty
    tokens = tl.cdiv(N, NB)
    n = (tl.program_id(0) % tokens) * NB + tl.arange(0, NB)
    o = (tl.program_id(0) // tokens) * OB + tl.arange(0, OB)
    row = x + n.to(tl.int64)[:, None] * sxn
    acc = tl.zeros((NB, OB), tl.float32)
    for k in range(0, IN, IB):
        i = k + tl.arange(0, IB)
        xs = tl.load(row + i.to(tl.int64)[None, :] * sxi,
                     mask=(n < N)[:, None] & (i < IN)[None, :], other=0.0)
        w = tile(codes, absmax, top, offset, dynamic, levels, o, k, OUT, IN, so, si, start,
                 FORM, EVEN, HELD, D, IB, INTERPRETED)
        acc = dotted(xs, tl.trans(w), acc, INTERPRETED)
    if BIAS:
        acc += tl.load(bias + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    tl.store(y + n.to(tl.int64)[:, None] * OUT + o[None, :],
             narrowed(acc, y.dtype.element_ty, INTERPRETED),
             mask=(n < N)[:, None] & (o < OUT)[None, :])


@triton.jit
def backward(g, codes, absmax, top, offset, dynamic, levels, dx,
             N, OUT, IN, sgn, sgo, so, si, start,
             FORM: tl.constexpr, EVEN: tl.constexpr, HELD: tl.constexpr,
             NB: tl.constexpr, OB: tl.constexpr, IB: tl.constexpr, INTERPRETED: tl.constexpr):
    """dx (N, IN) = g W."""
    D: tl.constexpr = g.dtype.element_ty
    tokens = tl.cdiv(N, NB)
    n = (tl.program_id(0) % tokens) * NB + tl.arange(0, NB)
    i0 = (tl.program_id(0) // tokens) * IB
    row = g + n.to(tl.int64)[:, None] * sgn
    acc = tl.zeros((NB, IB), tl.float32)
    for k in range(0, OUT, OB):
        o = k + tl.arange(0, OB)
        gs = tl.load(row + o.to(tl.int64)[None, :] * sgo,
                     mask=(n < N)[:, None] & (o < OUT)[None, :], other=0.0)
        w = tile(codes, absmax, top, offset, dynamic, levels, o, i0, OUT, IN, so, si, start,
                 FORM, EVEN, HELD, D, IB, INTERPRETED)
        acc = dotted(gs, w, acc, INTERPRETED)
    i = i0 + tl.arange(0, IB)
    tl.store(dx + n.to(tl.int64)[:, None] * IN + i[None, :], narrowed(acc, D, INTERPRETED),
             mask=(n < N)[:, None] & (i < IN)[None, :])


@triton.jit
def decode(codes, absmax, top, offset, dynamic, levels, w,
           OUT, IN, so, si, start,
           FORM: tl.constexpr, EVEN: tl.constexpr, HELD: tl.constexpr,
           OB: tl.constexpr, IB: tl.constexpr, INTERPRETED: tl.constexpr):
    """w (OUT, IN): the weight itself."""
    wide = tl.cdiv(IN, IB)
    o = (tl.program_id(0) // wide) * OB + tl.arange(0, OB)
    i0 = (tl.program_id(0) % wide) * IB
    v = tile(codes, absmax, top, offset, dynamic, levels, o, i0, OUT, IN, so, si, start,
             FORM, EVEN, HELD, w.dtype.element_ty, IB, INTERPRETED)
    i = i0 + tl.arange(0, IB)
    tl.store(w + o.to(tl.int64)[:, None] * IN + i[None, :], v,
             mask=(o < OUT)[:, None] & (i < IN)[None, :])
