"""U-Nets of diffusers: levels that hold blocks of several kinds, at several widths, in turns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.example import example_batch
from burnish.testing import stir
from burnish.testing.pipelines import (
    CLASSES,
    DIT,
    PIXELS,
    PROMPTED,
    SD,
    SD3,
    SDXL,
    coder,
    pipeline,
    prompted,
)

SAID = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "norm_num_groups": 4,
        "block_out_channels": (16, 32), "attention_head_dim": 2}
TEXT = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")


def unet(kinds=PLAIN, layers=1):
    torch.manual_seed(0)
    cls, more = (UNet2DConditionModel, {"cross_attention_dim": 24}) if kinds is TEXT \
        else (UNet2DModel, {})
    return cls(down_block_types=kinds[0], up_block_types=kinds[1], layers_per_block=layers,
               **SAID, **more).eval()


def batch(kinds=PLAIN, n=2):
    g = torch.Generator().manual_seed(1)
    out = {"sample": torch.randn(n, 3, 8, 8, generator=g), "timestep": torch.arange(1, n + 1)}
    return out | ({"encoder_hidden_states": torch.randn(n, 5, 24, generator=g)}
                  if kinds is TEXT else {})


@pytest.mark.parametrize("kinds", [PLAIN, TEXT])
@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_stand_in_the_order_in_which_they_run(kinds, layers):
    net, ran = unet(kinds, layers), []
    blocks = Anatomy.of(net).blocks
    for b in blocks:
        net.get_submodule(b.path).register_forward_pre_hook(lambda m, a, b=b: ran.append(b.path))
    net(**batch(kinds))
    assert ran == [b.path for b in blocks]
    every = [n for n, m in net.named_modules() if type(m).__name__ in
             ("ResnetBlock2D", "BasicTransformerBlock" if kinds is TEXT else "Attention")]
    assert sorted(ran) == sorted(every)
    stacks = Anatomy.of(net).stacks()
    assert list(stacks) == ["down_blocks", "mid_block", "up_blocks"]
    assert all([b.index for b in s] == list(range(len(s))) for s in stacks.values())


@pytest.mark.parametrize("kinds", [PLAIN, TEXT])
def test_the_sites_of_a_block_are_modules_that_run(kinds):
    net, ran = unet(kinds), set()
    a = Anatomy.of(net)
    for n, m in net.named_modules():
        m.register_forward_hook(lambda m, args, y, n=n: ran.add(n))
    net(**batch(kinds))
    attending = [b for b in a.blocks if b.attn]
    assert len(attending) == 4 and all(b.heads and b.hidden_size for b in attending)
    for b in attending:
        sites = [b.attn, b.attn_out, b.cross, b.cross_out, b.mlp, b.mlp_out, *b.mlp_in]
        assert {s for s in sites if s} <= ran
        assert net.get_submodule(b.attn).heads == b.heads
        if kinds is PLAIN:                           # the attention is the block, with its norm
            assert b.attn == b.path and b.cross is None and b.attn_out == f"{b.path}.to_out.0"
        else:
            assert (b.attn, b.cross) == (f"{b.path}.attn1", f"{b.path}.attn2")
            assert (b.mlp, b.mlp_in) == (f"{b.path}.ff", (f"{b.path}.ff.net.0.proj",))


def test_roles_of_a_u_net_that_reads_text():
    a = Anatomy.of(unet(TEXT))
    have = Counter(p.role for p in a.places if p.block is not None)
    assert {r: have[r] for r in ("q", "k", "v", "o")} == dict.fromkeys("qkvo", 4)
    assert {r: have[f"cross_{r}"] for r in "qkvo"} == dict.fromkeys("qkvo", 4)
    assert have["gate_up"] == have["down"] == 4
    assert {p.inp for p in a.places if p.role in ("cross_k", "cross_v")} == {24}


def test_the_rows_of_a_gate_follow_those_of_what_it_gates():
    net = unet(TEXT)
    a = Anatomy.of(net)
    fused = next(p for p in a.places if p.role == "gate_up")
    up, gate = a.slices(fused)
    assert (up.role, gate.role) == ("up", "gate") and up.rows[1] == gate.rows[0] == fused.out // 2
    module = net.get_submodule(fused.path.rpartition(".")[0])
    x = torch.randn(3, fused.inp)
    with torch.no_grad():
        module.proj.bias.zero_()
        y = (x @ up.view(module.proj.weight).mT) * torch.nn.functional.gelu(
            x @ gate.view(module.proj.weight).mT)
        torch.testing.assert_close(module(x), y)


def test_the_autoencoder_and_the_transformer_of_a_pipeline():
    a = Anatomy.of(coder())
    assert [s for s in a.stacks()] == ["encoder.down_blocks", "encoder.mid_block",
                                       "decoder.mid_block", "decoder.up_blocks"]
    assert [b.attn for b in a.blocks if b.attn] == ["encoder.mid_block.attentions.0",
                                                    "decoder.mid_block.attentions.0"]
    blocks = Anatomy.of(pipeline(DIT).transformer).blocks
    assert [(b.mlp, b.attn) for b in blocks] == [     # a time step's own MLP is not it
        (f"transformer_blocks.{i}.ff", f"transformer_blocks.{i}.attn1") for i in range(2)]


def test_one_block_at_a_time_without_a_gradient_of_its_input():
    """Torch's kernel ends the process where a norm trains behind frozen channels-last states."""
    net = unet()
    tuned = burnish.tune(net, "full", targets="mid_block.attentions.0", head=False)
    x = batch()
    tuned.backward(x, loss=lambda out, b: out.sample.square().mean())
    plain = unet().double()
    for n, p in plain.named_parameters():
        p.requires_grad_("resnets.0.conv2" in n and "down_blocks.0" in n)   # keeps the input alive
    own = dict(plain.named_parameters())
    for n, _ in tuned.named_parameters():
        own[n].requires_grad_(True)
    plain(**{k: v.double() if v.is_floating_point() else v for k, v in x.items()}
          ).sample.square().mean().backward()
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p.grad.double(), own[n].grad, rtol=1e-4, atol=1e-6)
    assert any("group_norm" in n for n, _ in tuned.named_parameters())


def test_forward_gradients_of_a_u_net():
    net = unet()
    tuned = burnish.tune(net, "full + forward_grad", head=False)
    before = [p.detach().clone() for p in tuned.parameters()]
    tuned.step(batch(), loss=lambda out, b: out.sample.square().mean())
    assert any(not torch.equal(a, b) for a, b in zip(before, tuned.parameters(), strict=True))


def test_an_attention_given_a_picture_is_read_as_tokens():
    net = unet()
    tuned = stir(burnish.tune(net, "apt(length=3, rank=2)", head=False))
    read, given = [], []
    at = net.mid_block.attentions[0]
    at.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    inside = [m for n, m in net.named_modules()
              if n.startswith("mid_block") and type(m).__name__ == "MemoryRead"]
    inside[0].register_forward_pre_hook(lambda m, args: read.append(args[0]))
    net(**batch())
    assert torch.equal(read[0], given[0].flatten(2).mT)
    with pytest.raises(burnish.RecipeError, match="blocks around their attention"):
        burnish.tune(unet(), "connected", head=False)
    tuned.detach()


def test_a_refusal_leaves_a_frozen_config_as_it_was():
    net = unet()
    before = dict(net.config)
    with pytest.raises(burnish.RecipeError, match="no MLP to stand behind"):
        burnish.tune(net, "pfeiffer", head=False)
    assert dict(net.config) == before and before


# -- denoisers of every kind -----------------------------------------------------------------------
DENOISERS = [*PROMPTED, PIXELS, CLASSES, DIT]


def denoiser(kind):
    pipe = prompted(kind) if kind in PROMPTED else pipeline(kind)
    return pipe.components.get("unet") or pipe.components["transformer"]


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_denoiser_is_called_with_what_its_configuration_asks_for(kind):
    net = denoiser(kind).eval()
    batch = example_batch(net, 3)
    assert torch.equal(net(**batch)[0], net(**example_batch(net, 3))[0])
    assert len(net(**batch)[0]) == 3
    told = {SD: {"encoder_hidden_states"}, SDXL: {"encoder_hidden_states", "added_cond_kwargs"},
            SD3: {"encoder_hidden_states", "pooled_projections"}, PIXELS: set(),
            CLASSES: {"class_labels"}, DIT: {"class_labels"}}[kind]
    assert set(batch) == {"hidden_states" if kind in (SD3, DIT) else "sample", "timestep"} | told


@pytest.mark.parametrize("kind", DENOISERS)
def test_what_tells_the_noise_is_no_new_head(kind):
    net = denoiser(kind)
    assert Anatomy.of(net).head_kind in ("noise", "none")
    names = [n for n, _ in burnish.tune(net, "lora(rank=2)").named_parameters()]
    assert names and all(".burnish." in n for n in names)


def test_a_linear_probe_of_a_denoiser_trains_its_last_layer():
    names = [n for n, _ in burnish.tune(denoiser(SD3), "linear_probe").named_parameters()]
    assert set(names) == {"proj_out.weight", "proj_out.bias"}
