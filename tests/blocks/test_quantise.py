"""NF4 against the obvious dense definition, its bytes, its memory; integer grids; providers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.update.codecs import dynamic_map
from burnish.blocks.weight import quantise
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.quantise import (
    NF4,
    PIECE,
    Bf16Provider,
    Nf4Provider,
    Quantiser,
    nf4_encode,
)
from burnish.core.errors import ConfigError

SHAPES = [(1,), (63,), (64,), (65,), (3, 67), (16, 128), (5, 7, 11), (257, 257)]


def dense_nf4(w, double_quant):
    """One entry at a time, in fp64: nearest code of w / absmax, by blocks of 64."""
    flat = w.flatten().double()
    code = torch.tensor(NF4, dtype=torch.float64)
    blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
    absmax = torch.stack([b.abs().max() for b in blocks])
    index = [(b[:, None] / a.clamp_min(1e-300) - code).abs().argmin(1)
             for b, a in zip(blocks, absmax, strict=True)]
    if double_quant:
        dyn = torch.tensor(dynamic_map(8, True), dtype=torch.float64)
        mean = absmax.float().mean().double()
        out = []
        for i in range(0, len(absmax), 256):
            rest = absmax[i : i + 256] - mean
            top = rest.abs().max()
            near = (rest[:, None] / top.clamp_min(1e-300) - dyn).abs().argmin(1)
            out.append(dyn[near] * top + mean)
        absmax = torch.cat(out)
    values = [code[i] * a for i, a in zip(index, absmax, strict=True)]
    return torch.cat(index), torch.cat(values).view(w.shape)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_the_nearest_code_of_each_block(shape, double_quant):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = nf4_encode(w, double_quant)
    index, values = dense_nf4(w, double_quant)
    nibbles = torch.stack([q.codes >> 4, q.codes & 15], 1).flatten()[: w.numel()]
    assert torch.equal(nibbles.long(), index)          # the even entry sits in the high nibble
    assert torch.allclose(q.decode().double(), values, rtol=3e-7, atol=1e-7)


def test_bytes_are_those_of_the_published_kernels():
    """Digests of what bitsandbytes 0.50.2 writes for the same weights (blocksize 64, nf4)."""
    known = {(96, 64): "296e5ad79cda7b5a", (3, 67): "8b982d9235a3a843",
             (700, 91): "d9d8a4d6397de28d"}
    for shape, digest in known.items():
        q = nf4_encode(pattern(shape), double_quant=False)
        blob = q.codes.numpy().tobytes() + q.absmax.numpy().tobytes()
        assert hashlib.sha256(blob).hexdigest()[:16] == digest


def pattern(shape):
    """Weights from integer arithmetic alone, the same on every machine."""
    n = torch.Size(shape).numel()
    return (((torch.arange(n) * 7919) % 2003).float() / 1024 - 1).view(shape)


@pytest.mark.parametrize("double_quant, bits", [(False, 4.5), (True, 4 + 8 / 64 + 32 / 64 / 256)])
def test_bits_per_weight(double_quant, bits):
    q = nf4_encode(torch.randn(1024, 512), double_quant)
    offset = 32 / 1024 / 512 if double_quant else 0
    assert q.bits == pytest.approx(bits + offset, abs=1e-12)
    assert round(q.bits, 3) == (4.127 if double_quant else 4.5)


def test_on_and_beside_every_border_the_lower_code_ends_with_it():
    borders = torch.tensor([(a + b) / 2 for a, b in zip(NF4, NF4[1:], strict=False)])
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    x = torch.cat([borders, borders.nextafter(up), borders.nextafter(down),
                   torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30]),
                   torch.randn(1 << 16).tanh()])
    w = torch.ones(-(-len(x) // 63), 64)
    flat = torch.zeros(len(w) * 63)                          # each block's largest is its first, 1
    flat[: len(x)] = x
    w[:, 1:] = flat.view(-1, 63)
    want = sum((w > b).long() for b in borders.tolist())
    codes = nf4_encode(w, double_quant=False).codes.long()
    assert torch.equal(torch.stack([codes >> 4, codes & 15], 1).view_as(want), want)


def test_blocks_of_zeros_stay_zeros():
    for double_quant in (False, True):
        w = torch.randn(8, 64)
        w[2:4] = 0
        d = nf4_encode(w, double_quant).decode()
        assert (d[2:4] == 0).all() and (d[0] != 0).any()
        assert (nf4_encode(torch.zeros(5, 13), double_quant).decode() == 0).all()


def test_codes_are_fixed_points():
    """Decoded weights encode to the same bytes and decode to themselves."""
    q = nf4_encode(torch.randn(33, 50), double_quant=False)
    again = nf4_encode(q.decode(), double_quant=False)
    assert torch.equal(q.codes, again.codes) and torch.equal(q.absmax, again.absmax)


def test_less_error_than_four_bit_integers_on_normal_weights():
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    grid = Quantiser(bits=4, group=64)
    by_grid = (grid.decode(*grid.encode(w)) - w).square().mean()
    by_nf4 = (nf4_encode(w).decode() - w).square().mean()
    assert by_nf4 < by_grid


def test_decodes_in_place_and_in_other_dtypes():
    w = torch.randn(40, 24).bfloat16()
    q = nf4_encode(w)
    out = torch.empty(40, 24)
    assert q.decode(out=out) is out
    assert torch.equal(q.decode(), out.bfloat16()) and q.decode().dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"\(40, 24\)"):
        q.decode(out=torch.empty(24, 40).t())


@pytest.mark.parametrize("bad", [torch.tensor([1.0, float("nan")]),
                                 torch.tensor([float("inf"), 1.0]), torch.arange(4)])
def test_what_has_no_code_is_refused(bad):
    with pytest.raises(ConfigError, match="nf4"):
        nf4_encode(bad)


class Allocated(TorchDispatchMode):
    """The largest storage that appeared, `known` aside."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                s = t.untyped_storage()
                if s.data_ptr() not in self.known:
                    self.largest = max(self.largest, s.nbytes())
        return out


def test_temporaries_are_pieces_not_weights():
    w = torch.randn(3 * PIECE + 1000)
    with Allocated(w) as seen:
        q = nf4_encode(w)
    assert seen.largest <= 4 * PIECE
    out = torch.empty_like(w)
    with Allocated(out, q.codes, q.absmax, q.absmax_max) as seen:
        q.decode(out=out)
    assert 0 < seen.largest <= 4 * PIECE
    assert torch.equal(out, q.decode())


def test_runs_on_fake_and_meta_tensors():
    with FakeTensorMode():
        w = torch.empty(4096, 300, dtype=torch.bfloat16)
        q = nf4_encode(w)
        assert q.decode().shape == w.shape and q.decode().dtype == torch.bfloat16
        assert q.nbytes == nf4_encode(torch.empty(300, 4096)).nbytes
    m = Nf4Provider(torch.empty(64, 100, device="meta"))
    assert m.weight().device.type == "meta" and m.weight().shape == (64, 100)
    assert m.nbytes == Nf4Provider(torch.zeros(64, 100)).nbytes


def test_tables_made_under_a_fake_mode_do_not_outlive_it(monkeypatch):
    monkeypatch.setattr(quantise, "_real", {})
    w = torch.randn(8, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        nf4_encode(torch.empty(8, 64)).decode()
        nf4_encode(w)
    assert torch.equal(nf4_encode(w).decode(), nf4_encode(w).decode())
    assert not any(quantise.is_fake(t) for t in quantise._real.values())


def test_a_frozen_linear_keeps_nothing_for_backward():
    w = torch.randn(48, 32)
    provider = Nf4Provider(w)
    op = Weighted(provider.weight, [])
    x = torch.randn(6, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t,
                                                  lambda t: t):
        y = linear(x, op, None)
    assert kept == []
    g = torch.randn_like(y)
    y.backward(g)
    held = provider.weight()
    assert torch.allclose(y, x @ held.T, atol=1e-5) and torch.allclose(x.grad, g @ held, atol=1e-5)


def test_providers_keep_their_scales_through_casts_and_files(tmp_path):
    w = torch.randn(32, 96)
    p = Nf4Provider(w)
    before = p.weight()
    p.to(torch.bfloat16)
    assert p.offset.dtype == torch.float32 and p.weight().dtype == torch.bfloat16
    assert torch.equal(p.weight(), before.bfloat16())
    fresh = Nf4Provider(torch.zeros_like(w))
    fresh.load_state_dict(p.state_dict())
    assert torch.equal(fresh.weight(), before)
    assert not list(p.parameters())


def test_bf16_holds_half_and_gives_back_the_dtype():
    w = torch.randn(8, 8)
    p = Bf16Provider(w)
    assert p.nbytes == w.nbytes // 2 and p.weight().dtype == torch.float32
    assert torch.equal(p.weight(), w.bfloat16().float())
    p.half()
    assert p.held.dtype == torch.bfloat16 and p.weight().dtype == torch.float16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_grids_err_by_at_most_half_a_step(bits, group, symmetric):
    w = torch.randn(12, 40, generator=torch.Generator().manual_seed(bits))
    grid = Quantiser(bits=bits, group=group, symmetric=symmetric)
    q, scale, zero = grid.encode(w)
    lo, hi = grid.limits
    assert q.shape == w.shape and q.min() >= lo and q.max() <= hi
    d = grid.decode(q, scale, zero)
    step = scale.expand(12, -1) if group < 0 else scale
    step = step.repeat_interleave(40 if group <= 0 else 16, 1)[:, :40]
    slack = 0.5 if symmetric else 1.0            # the zero point is rounded too
    assert ((d - w).abs() <= step * slack + 1e-6).all()


def test_searched_scales_beat_the_span_and_stochastic_rounding_is_unbiased():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    loss = {}
    for rule in ("absmax", "search"):
        grid = Quantiser(bits=3, group=32, rule=rule)
        loss[rule] = (grid.decode(*grid.encode(w)) - w).square().sum(-1)
    assert (loss["search"] <= loss["absmax"] + 1e-5).all()
    assert loss["search"].sum() < 0.9 * loss["absmax"].sum()
    torch.manual_seed(0)
    grid = Quantiser(bits=4, rounding="stochastic")
    n = 2000
    mean = sum(grid.decode(*grid.encode(w[:2])) for _ in range(n)) / n
    step = w[:2].abs().amax(1, keepdim=True) / 7
    assert ((mean - w[:2]).abs() <= 5 * 0.5 * step / n**0.5 + 1e-6).all()
    with pytest.raises(ConfigError, match="2 to 8"):
        Quantiser(bits=1)


def test_the_kernel_route_is_given_what_the_package_expects(monkeypatch):
    """What is handed to the CUDA package decodes, by its documented meaning, to the same values."""
    class Package:
        class QuantState:
            def __init__(self, **kw):
                self.__dict__.update(kw)

        @staticmethod
        def dequantize_4bit(packed, state, out):
            index = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()
            n = state.shape.numel()
            scale = state.absmax.repeat_interleave(state.blocksize)[:n]
            return out.copy_((state.code[index[:n].long()] * scale).view(state.shape))

    q = nf4_encode(torch.randn(33, 70))
    assert torch.equal(quantise._decode_kernel(q, torch.empty(33, 70), Package), q.decode())
