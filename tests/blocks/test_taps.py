"""Side networks' parts: gates, rotary tables, masks seen, blocks shrunk and cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.blocks.state.sideblocks import Plain, Watch, shrunk
from burnish.blocks.state.taps import Crown, Gate, Rung, Still, _small_rotary
from burnish.blocks.tape.saved import Tape
from burnish.blocks.weight import slicing
from burnish.core.errors import RecipeError
from burnish.testing.models import tiny


def state():
    return SimpleNamespace(active=(("a", 1.0),), off=False, rows=None, tape=Tape(), box={})


def test_a_gate_mixes_and_keeps_one_state():
    gate, s, h = Gate().double(), *torch.randn(2, 3, 4, dtype=torch.double)
    s.requires_grad_()
    torch.testing.assert_close(gate(s, h), (s + h) / 2)
    with torch.no_grad():
        gate.alpha.fill_(0.07)
    w = torch.sigmoid(torch.tensor(0.7, dtype=torch.double))
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = gate(s, h)
    torch.testing.assert_close(y, w * s + (1 - w) * h)
    assert sum(n for n in kept.values() if n > 1) == 12
    (g,) = torch.autograd.grad(y.sum(), gate.alpha)
    torch.testing.assert_close(g, ((s - h).sum() * w * (1 - w) / 0.1).detach())


def test_rotary_tables_of_the_small_head_are_its_own():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def tables(width):
        config = LlamaConfig(hidden_size=4 * width, num_attention_heads=4, head_dim=width)
        return LlamaRotaryEmbedding(config)(torch.zeros(1, 6, width), torch.arange(6)[None])

    for reduction in (2, 4, 8):
        got = _small_rotary(tables(32), SimpleNamespace(reduction=reduction))
        for a, b in zip(got, tables(32 // reduction), strict=True):
            torch.testing.assert_close(a, b)


# -- slicing --------------------------------------------------------------------------------------
def test_what_stays():
    score = torch.tensor([3.0, 1.0, 5.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    assert slicing.largest(score, 3).tolist() == [4, 5, 6]
    assert slicing.largest_per_head(score, 2, 2).tolist() == [0, 2, 4, 5]
    assert slicing.every(8, 2, 2).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    a, b = torch.randn(2, 4, 6)
    want = (a.abs() * b.abs()).sum(1)
    torch.testing.assert_close(slicing.row_importance(a, b), want)


def test_a_cut_is_indexing():
    source, target = torch.randn(6, 5), torch.empty(2, 3)
    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 2, 3])
    slicing.cut(target, source, rows, columns)
    assert torch.equal(target, source[rows][:, columns])
    for norm in (nn.LayerNorm(6), nn.RMSNorm(6)):
        nn.init.normal_(norm.weight)
        made = slicing.cut_norm(norm, columns)
        assert torch.equal(made.weight, norm.weight[columns])
        assert made(torch.randn(2, 3)).shape == (2, 3) and norm.weight.shape == (6,)


# -- blocks -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, block", [("llama", "model.layers.1"), ("vit", "vit.layers.1"),
                                         ("bert", "bert.encoder.layer.1"),
                                         ("gpt2", "transformer.h.1"),
                                         ("mixtral", "model.layers.1")])
def test_a_shrunk_block_has_every_width_over_r(name, block):
    net, _ = tiny(name)
    large = net.get_submodule(block)
    small = shrunk(large, net.config, 4, 1, 2)
    assert type(small) is type(large) and small.cache_index == 3
    sizes = dict(small.named_parameters())
    for n, p in large.named_parameters():
        ratio = p.numel() // sizes[n].numel()
        router = n.endswith("gate.weight") and "mlp" in n
        assert ratio == (4 if p.dim() == 1 or router else 16), n
        assert sizes[n].dim() == p.dim()


def test_blocks_without_a_config_cannot_be_shrunk():
    assert shrunk(tiny("timm_qkv")[0].blocks[0], None, 4, 0, 2) is None
    with pytest.raises(RecipeError, match="divisible"):
        shrunk(tiny("vit")[0].vit.layers[0], None, 5, 0, 2)


def test_a_plain_block_masks_as_the_one_beside_it():
    class Causal(nn.Module):
        def forward(self, x):
            q = x.unsqueeze(1)
            return F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)

    s, block = state(), Causal()
    rung = Rung(s, "a", Plain(4, 2, 8), 8, 4, enter=True)
    x = torch.randn(1, 5, 8)
    y = torch.cat([x[:, :3], torch.randn(1, 2, 8)], 1)
    states = []
    for given in (x, y):
        with s.tape.recording():
            rung(block, block, given)
        states.append(s.box["side", "a"])
    torch.testing.assert_close(states[0][:, :3], states[1][:, :3])
    assert not torch.allclose(states[0][:, 3:], states[1][:, 3:])


def test_attention_nobody_can_see_has_no_plain_block():
    s, block = state(), nn.Linear(8, 8)
    rung = Rung(s, "a", Plain(4, 2, 8), 8, 4, enter=True)
    with s.tape.recording(), pytest.raises(RecipeError, match="attn_implementation='sdpa'"):
        rung(block, block, torch.randn(1, 5, 8))
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    x, watch = torch.randn(1, 5, 8), Watch(s.tape)
    with s.tape.recording(), watch, pytest.raises(RecipeError, match="masked"):
        mha(x, x, x, key_padding_mask=torch.zeros(1, 5, dtype=torch.bool))


def test_taps_carry_no_graph():
    s, block = state(), nn.Linear(8, 8)
    rung = Rung(s, "a", None, 8, 4, enter=True)
    out = rung(block, block, torch.randn(1, 5, 8))
    assert not out.requires_grad and s.box["side", "a"].requires_grad
    with pytest.raises(RecipeError, match="gradient would be cut"):
        rung(block, block, torch.randn(1, 5, 8, requires_grad=True))


def test_the_crown_mixes_with_what_the_backbone_returns():
    s, norm = state(), nn.LayerNorm(8)
    crown = Crown(s, "a", nn.LayerNorm(4), 8, 4)
    s.box["side", "a"] = side = torch.randn(1, 5, 4)
    x = torch.randn(1, 5, 8)
    want = (crown.up(crown.norm(side)) + norm(x)) / 2
    torch.testing.assert_close(crown(norm, norm, x), want)
    assert not s.box


def test_a_still_backbone_drops_nothing():
    body = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).train()
    still = Still(state(), "a", [body[0]])
    x = torch.randn(3, 4)
    assert torch.equal(still(body, body, x), body[1](x)) and body[0].training
