"""The closed forms against bytes counted by saved-tensor hooks on plain PyTorch blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from burnish.core.errors import ConfigError
from burnish.memory.rules import Block as Form
from burnish.memory.rules import kept_bytes, predict

from .blocks import HEADS, MLP, Adapter, Block, D, Delta, Gated, Lora, kept

B, N, RANK, BLOCKS = 2, 128, 4, 2
LINEARS = ("q", "k", "v", "o", "fc1", "fc2")
FORM = Form(D, MLP, HEADS)


def swap(block: nn.Module, names, wrap) -> None:
    for name in names:
        setattr(block, name, wrap(getattr(block, name)))


def freeze(m: nn.Module) -> None:
    m.requires_grad_(False)


def bias_only(m):
    freeze(m)
    for name, p in m.named_parameters():
        p.requires_grad_(name.endswith("bias"))


def lora(names, **kw):
    def change(m):
        freeze(m)
        swap(m, names, lambda lin: Lora(lin, RANK, **kw))
    return change


def delta(m):
    freeze(m)
    swap(m, LINEARS, Delta)


def two_adapters(m):
    freeze(m)
    m.after_attention, m.after_mlp = Adapter(D, RANK), Adapter(D, RANK)


def parallel(m):
    freeze(m)
    m.beside_mlp = Adapter(D, RANK)


def scaled(m):
    freeze(m)
    m.scales = nn.ParameterList(nn.Parameter(torch.ones(n)) for n in (D, D, MLP))


ROWS = [
    ("full", lambda m: None, {}),
    ("frozen", freeze, {}),
    ("bitfit", bias_only, {}),
    ("lora", lora("qkv"), {"on": "qkv", "rank": RANK}),
    ("lora", lora("qv"), {"on": "qv", "rank": RANK}),
    ("lora", lora(LINEARS), {"on": "all", "rank": RANK}),
    ("lora_fa", lora(LINEARS, train_a=False), {"rank": RANK}),
    ("delta_naive", delta, {}),
    ("adapters", two_adapters, {"rank": RANK}),
    ("parallel_adapter", parallel, {"rank": RANK}),
    ("ia3", scaled, {}),
]


def run(blocks, dtype, n=N):
    """Bytes kept by the stack on an input that gradients must reach (as in mid-model)."""
    blocks.to(dtype)
    x = torch.randn(B, n, D, dtype=dtype).requires_grad_()

    def forward():
        h = x
        for block in blocks:
            h = block(h)
        return h

    return kept(forward, blocks.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("row", "change", "settings"), ROWS,
                         ids=[f"{r}-{s.get('on', '')}" for r, _, s in ROWS])
def test_a_row_predicts_what_is_kept(row, change, settings, dtype):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    for block in blocks:
        change(block)
    counted = run(blocks, dtype)
    said = BLOCKS * kept_bytes(FORM, row, B * N, N, dtype.itemsize, **settings)
    assert counted == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize(("row", "change"), [("full", lambda m: None), ("frozen", freeze)])
def test_eager_attention_keeps_its_matrix(row, change):
    blocks = nn.ModuleList(Block(eager=True) for _ in range(BLOCKS))
    for block in blocks:
        change(block)
    form = Form(D, MLP, HEADS, eager=True)
    said = BLOCKS * kept_bytes(form, row, B * N, N, 4)
    assert run(blocks, torch.float32) == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("row", "change"), [("full", lambda m: None), ("frozen", freeze)])
def test_gated_block_with_grouped_keys(row, change, dtype):
    blocks = nn.ModuleList(Gated(kv_heads=2) for _ in range(BLOCKS))
    for block in blocks:
        change(block)
    form = Form(D, MLP, HEADS, kv_heads=2, gated=True, rms=True)
    said = BLOCKS * kept_bytes(form, row, B * N, N, dtype.itemsize)
    assert run(blocks, dtype) == pytest.approx(said, rel=0.02)


def test_prompts_lengthen_every_row():
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    blocks.requires_grad_(False)
    said = BLOCKS * kept_bytes(FORM, "vpt", B * N, N, 4, prompts=16)
    assert run(blocks, torch.float32, n=N + 16) == pytest.approx(said, rel=0.02)


@pytest.mark.parametrize("down", ["trained", "pooled"])
def test_a_side_network_keeps_its_taps_and_a_narrow_tape(down):
    r = 4
    backbone = nn.ModuleList(Block() for _ in range(BLOCKS)).requires_grad_(False)
    side = nn.ModuleList(Block(D // r, HEADS, MLP // r) for _ in range(BLOCKS))
    downs = nn.ModuleList(nn.Linear(D, D // r) for _ in range(BLOCKS))
    downs.requires_grad_(down == "trained")
    gates = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(BLOCKS))
    x = torch.randn(B, N, D)
    start = torch.randn(B, N, D // r).requires_grad_()

    def forward():
        h, s = x, start
        for block, tap, small, gate in zip(backbone, downs, side, gates, strict=True):
            with torch.no_grad():
                h = block(h)
            mix = gate.sigmoid()
            s = small(s * mix + tap(h) * (1 - mix))
        return s

    own = [*backbone.parameters(), *side.parameters(), *downs.parameters(), *gates]
    said = BLOCKS * kept_bytes(FORM, "lst", B * N, N, 4, reduction=r, down=down)
    assert kept(forward, own) == pytest.approx(said, rel=0.02)


def test_checkpoint_keeps_one_unit():
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    x = torch.randn(B, N, D).requires_grad_()
    counted = 0

    def forward():
        h = x
        inputs = []
        for block in blocks:
            inputs.append(h)
            h = checkpoint(block, h, use_reentrant=False)
        nonlocal counted
        counted = sum(i.untyped_storage().nbytes() for i in inputs)
        return h

    inside = kept(forward, blocks.parameters())
    said = BLOCKS * kept_bytes(FORM, "checkpoint", B * N, N, 4)
    assert counted == said
    assert inside <= said


def test_lean_rows_equal_the_frozen_one():
    assert FORM.full(N, lean=True) == FORM.frozen(N)
    assert kept_bytes(FORM, "lora", 8, N, 4, on="qkv", lean=True, rank=0) == \
        kept_bytes(FORM, "frozen", 8, N, 4)


def test_published_check_numbers():
    vit = Form(768, 3072, 12)
    image = 12 * 197 * 768 * 2
    assert image * vit.full(197) / 1e6 == pytest.approx(58.1, abs=0.05)
    assert image * vit.frozen(197) / 1e6 == pytest.approx(36.3, abs=0.05)
    llama = Form(4096, 11008, 32, gated=True, rms=True)
    assert llama.full(1) == pytest.approx(18.75, abs=0.01)
    assert llama.frozen(1) == pytest.approx(14.06, abs=0.01)


@pytest.mark.parametrize(("frugal", "adamw"), [
    ((512, 1376, 8), None), ((768, 2048, 12), None), ((1024, 2736, 24), None),
    ((2048, 5461, 24), None)])
def test_state_is_eight_bytes_per_trainable_entry(frugal, adamw):
    d, ff, layers = frugal
    form = Form(d, ff, 8, gated=True, rms=True)
    entries = layers * (sum(o * i for o, i in form.matrices) + 2 * d) + 2 * 32000 * d + d
    p = predict(form, layers, "full", parameters=entries, trainable=entries, batch=1, tokens=8)
    assert p.optimizer == 8 * entries and p.gradients == p.weights == 4 * entries
    assert p.peak == pytest.approx(16 * entries + p.activations + p.temporary)


def test_unknown_row_is_named():
    with pytest.raises(ConfigError, match="lora"):
        kept_bytes(FORM, "lorra", 8, 8, 4)
