"""The table of what a block keeps: the published figures, counted on plain PyTorch and foretold.

Units are d * b bytes a token and block. Counted at d = 768, twelve heads, 256 tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.memory.rules import Block as Form
from burnish.memory.rules import kept_bytes

from .blocks import Adapter, Block, Delta, Lora, kept

D, HEADS, MLP, N, RANK = 768, 12, 3072, 256, 8
ALL = ("q", "k", "v", "o", "fc1", "fc2")
FORM, EAGER = Form(D, MLP, HEADS), Form(D, MLP, HEADS, eager=True)


class Dropped(Lora):
    def forward(self, x):
        return self.base(x) + (F.dropout(x, 0.1) @ self.a.t()) @ self.b.t()


def freeze(m):
    m.requires_grad_(False)


def biases(m):
    for name, p in m.named_parameters():
        p.requires_grad_(name.endswith("bias"))


def swapped(names, wrap):
    def change(m):
        freeze(m)
        for name in names:
            setattr(m, name, wrap(getattr(m, name)))
    return change


def lora(names, kind=Lora):
    return swapped(names, lambda linear: kind(linear, RANK))


def two_adapters(m):
    freeze(m)
    m.after_attention, m.after_mlp = Adapter(D, RANK), Adapter(D, RANK)


def beside(m):
    freeze(m)
    m.beside_mlp = Adapter(D, RANK)


def units(blocks, batch=1, dtype=torch.float32, n=N, d=D):
    """Counted on an input that gradients must reach, as inside a model."""
    blocks.to(dtype)
    x = torch.randn(batch, n, d, dtype=dtype).requires_grad_()

    def forward():
        h = x
        for block in blocks:
            h = block(h)
        return h

    counted = kept(forward, blocks.parameters())
    return counted / len(blocks) / (batch * n * d * dtype.itemsize)


def made(change, eager=False):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(D, HEADS, MLP, eager) for _ in range(2))
    for block in blocks:
        change(block)
    return blocks


#: row of rules.py, what changes, its settings, sequences, figure
FIGURES = [
    ("full", lambda m: None, {}, 1, 16.02), ("bitfit", biases, {}, 1, 10.02),
    ("lora", lora("qkv"), {"on": "qkv"}, 1, 11.05), ("lora", lora(ALL), {"on": "all"}, 1, 16.08),
    ("lora", lora(ALL, Dropped), {"on": "all", "dropout": True}, 1, 28.08),
    ("delta_naive", swapped(ALL, Delta), {}, 4, 25.02), ("adapters", two_adapters, {}, 1, 12.04),
    ("parallel_adapter", beside, {}, 1, 11.03),
]
WRITTEN_OUT = [
    ("frozen", freeze, {}, 1, 13.0), ("full", lambda m: None, {}, 1, 20.0),
    ("lora", lora(ALL), {"on": "all"}, 1, 20.1), ("delta_naive", swapped(ALL, Delta), {}, 4, 29.0),
    ("adapters", two_adapters, {}, 1, 15.0),
]


def ids(rows):
    return [f"{row}{'-' + s['on'] if 'on' in s else ''}{'-dropped' * ('dropout' in s)}"
            for row, _, s, _, _ in rows]


def agree(form, eager, row, change, settings, batch, figure, digits):
    counted = units(made(change, eager), batch)
    said = kept_bytes(form, row, batch * N, N, 4, rank=RANK, **settings) / (batch * N * D * 4)
    assert round(counted, digits) == figure
    assert counted == pytest.approx(said, rel=0.005)


@pytest.mark.parametrize(("row", "change", "settings", "batch", "figure"), FIGURES,
                         ids=ids(FIGURES))
def test_a_figure_is_counted_and_foretold(row, change, settings, batch, figure):
    agree(FORM, False, row, change, settings, batch, figure, 2)


@pytest.mark.parametrize(("row", "change", "settings", "batch", "figure"), WRITTEN_OUT,
                         ids=ids(WRITTEN_OUT))
def test_attention_that_is_written_out_adds_its_matrix(row, change, settings, batch, figure):
    agree(EAGER, True, row, change, settings, batch, figure, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dropped_copy_of_every_input_waits_in_both_dtypes(dtype):
    counted = units(made(lora(ALL, Dropped)), 1, dtype)
    said = kept_bytes(FORM, "lora", N, N, dtype.itemsize, rank=RANK, on="all", dropout=True)
    assert counted * N * D * dtype.itemsize == pytest.approx(said, rel=0.02)
    # nine inputs, each with a mask of a byte in bf16: 10 + 9 + 4.5
    assert kept_bytes(FORM, "lora", 1, N, 2, rank=0, on="all", dropout=True, mask=0.5) / (2 * D) \
        == pytest.approx(23.5, abs=0.05)


def test_dropout_of_attention_and_of_both_residuals_adds_ten_units():
    """Probabilities as dropped and their mask, four each, and two masks; a CPU's are full size."""
    class Drops(Block):
        def attend(self, q, k, v):
            p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
            return F.dropout(p, 0.1) @ v

    class Residual(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return F.dropout(self.linear(x), 0.1)

    def stack(kind, change):
        blocks = nn.ModuleList(kind(D, HEADS, MLP, True) for _ in range(2))
        for block in blocks:
            change(block)
        return units(blocks)

    without, of = stack(Block, freeze), stack(Drops, swapped(("o", "fc2"), Residual))
    assert of - without == pytest.approx(10, abs=0.01)


# -- a gated block whose norm is computed in fp32, as transformers writes it -----------------------
@pytest.mark.parametrize("names, on, figure", [
    ((), None, 16.10), (("q", "v"), "qv", 17.12), (("q", "k", "v", "o", "gate", "up", "down"),
                                                  "all", 20.86), (None, "full", 22.79)])
def test_a_norm_that_is_cast_up_keeps_two_units_a_block_and_four_that_train(names, on, figure):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
    d, m = 768, 2064                                                  # mu = 2.6875, as Llama's
    config = LlamaConfig(hidden_size=d, intermediate_size=m, num_attention_heads=12,
                         num_key_value_heads=12)
    config._attn_implementation = "sdpa"
    rotary = LlamaRotaryEmbedding(config)

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LlamaDecoderLayer(config, 0)

        def forward(self, x):
            out = self.layer(x, position_embeddings=places)
            return out[0] if isinstance(out, tuple) else out

    blocks = nn.ModuleList(One() for _ in range(2)).bfloat16()
    places = rotary(torch.zeros(1, N, d, dtype=torch.bfloat16), torch.arange(N)[None])
    for block in blocks if names is not None else ():
        freeze(block)
        for path, linear in list(block.named_modules()):
            if path.rpartition(".")[2].removesuffix("_proj") in names:
                above = block.get_submodule(path.rpartition(".")[0])
                setattr(above, path.rpartition(".")[2], Lora(linear, RANK))
    counted = units(blocks, dtype=torch.bfloat16, d=d)
    assert counted == pytest.approx(figure, rel=0.01)
    form = Form(d, m, 12, gated=True, rms=True)
    fused = {None: form.frozen(N), "qv": form.frozen(N) + 1 + 2 * RANK / d,
             "all": form.full(N) + 7 * RANK / d, "full": form.full(N)}[on]
    assert counted - fused == pytest.approx(4 if on == "full" else 2, abs=0.15)


def test_an_autocast_keeps_a_narrow_copy_of_every_weight():
    """Two bytes a parameter: 14.2 MB a block at d = 768; what weights in bf16 do not."""
    blocks = made(freeze)
    x = torch.randn(1, N, D).requires_grad_()

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            h = x
            for block in blocks:
                h = block(h)
        return h

    extra = kept(forward, blocks.parameters()) / 2
    copies = sum(p.numel() for n, p in blocks[0].named_parameters()
                 if p.dim() == 2) * 2
    assert copies / 1e6 == pytest.approx(14.2, abs=0.05)
    assert extra > copies + 10 * N * D * 2
    narrow = units(made(freeze), dtype=torch.bfloat16) * N * D * 2
    assert narrow < 12 * N * D * 2 < copies


# -- derived rows ---------------------------------------------------------------------------------
def of(form, row, n=197, itemsize=2, **settings):
    """Units without the statistics in fp32."""
    settings = {"rank": 0, **settings}
    whole = kept_bytes(form, row, 1, n, itemsize, **settings)
    return (whole - 4 * form.statistics() * (row not in ("checkpoint", "meft", "offload"))) \
        / (form.width * itemsize)


@pytest.mark.parametrize("row, settings, pre_norm, llama", [
    ("full", {}, 16, 18.75), ("frozen", {}, 10, 14.06), ("bitfit", {}, 10, 14.06),
    ("lora", {"on": "qkv"}, 11, 15.06), ("lora", {"on": "all"}, 16, 18.75),
    ("lora_fa", {}, 10, 14.06), ("delta", {}, 16, 18.75), ("adapters", {}, 12, 16.06),
    ("parallel_adapter", {}, 11, 15.06), ("checkpoint", {}, 1, 1), ("meft", {}, 0, 0),
    ("meft", {"anchors": 4}, 0.5, 0.5), ("lst", {"reduction": 8}, 3.25, None),
    ("lst", {"reduction": 8, "down": "pooled"}, 2.25, None), ("ia3", {}, 16, None),
    ("wta_crs", {"keep": 0.3}, 11.8, None), ("few_bit", {"bits": 4}, 7, None),
])
def test_the_derived_columns(row, settings, pre_norm, llama):
    assert of(FORM, row, **settings) == pytest.approx(pre_norm, abs=0.006)
    if llama is not None:
        big = Form(4096, 11008, 32, gated=True, rms=True)
        assert of(big, row, **settings) == pytest.approx(llama, abs=0.006)


def test_megabytes_an_image_of_a_vit_b():
    image = 12 * 197 * D * 2 / 1e6
    for row, settings, figure in (("full", {}, 58.1), ("bitfit", {}, 36.3),
                                  ("checkpoint", {}, 3.6)):
        assert image * of(FORM, row, **settings) == pytest.approx(figure, abs=0.06)
    side = kept_bytes(FORM, "lst", 1, 197, 4, reduction=8) / (4 * D)       # as counted in fp32
    assert (round(side, 2), round(image * side, 1)) == (3.27, 11.9)


gelu = F.gelu


class FourBits(torch.autograd.Function):
    """A GELU whose backward has a code of four bits an entry, two in a byte."""

    @staticmethod
    def forward(ctx, x):
        code = (x.clamp(-4, 3.99) * 2 + 8).to(torch.uint8)
        ctx.save_for_backward(code[..., ::2] * 16 + code[..., 1::2])
        return gelu(x)

    @staticmethod
    def backward(ctx, g):
        (code,) = ctx.saved_tensors
        return g * torch.stack([code // 16, code % 16], -1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gelu_in_four_bits(dtype, monkeypatch):
    blocks = made(freeze)
    monkeypatch.setattr(F, "gelu", lambda x: FourBits.apply(x) if x.requires_grad else gelu(x))
    counted = units(blocks, dtype=dtype)
    said = kept_bytes(FORM, "few_bit", N, N, dtype.itemsize, bits=4) / (N * D * dtype.itemsize)
    assert counted == pytest.approx(said, rel=0.02)
