"""DiffFit: biases, norms, the table of classes, and a scale on what a sub-layer adds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.gates import Affine
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse


class Block(nn.Module):
    """A block of a diffusion transformer: attention and MLP, each behind its own gate."""

    def __init__(self, d, width=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(d, width * d), nn.Linear(width * d, d)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, h, c):
        a1, b1, g1, a2, b2, g2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        q, k, v = self.attn.qkv(self.norm1(h) * (1 + a1) + b1).chunk(3, -1)
        h = h + g1 * self.attn.proj(F.scaled_dot_product_attention(q, k, v))
        return h + g2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(h) * (1 + a2) + b2)))


class Table(nn.Module):
    def __init__(self, classes, d):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, d)

    def forward(self, y):
        return self.embedding_table(y)


class DiT(nn.Module):
    def __init__(self, d=16, depth=2, classes=10):
        super().__init__()
        self.y_embedder = Table(classes, d)
        self.blocks = nn.ModuleList([Block(d) for _ in range(depth)])

    def forward(self, h, y):
        c = self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        return h


def data():
    g = torch.Generator().manual_seed(0)
    return (torch.randn(3, 5, 16, dtype=torch.float64, generator=g), torch.tensor([1, 10, 4]))


def tuned_dit(settings=""):
    torch.manual_seed(0)
    net = DiT().double()
    return burnish.tune(net, f"difffit({settings})", head=False), net


def test_counts_on_dit_xl_2():
    """Block biases 17,280 x 28 = 483,840, gamma 2 1152 28 = 64,512, (classes + 1) 1152."""
    with torch.device("meta"):
        net = DiT(1152, 28, 1000)
    (method,), anatomy = parse("difffit"), Anatomy.of(net)
    names = {s.name: net.get_parameter(s.name).numel() for s in method.select(anatomy)}
    assert sum(b.module.gain.numel() for b in method.branch(anatomy)) == 64_512
    assert sum(v for n, v in names.items() if n.endswith("bias")) == 483_840
    assert sum(names.values()) == 483_840 + 1001 * 1152


@pytest.mark.parametrize("gain", ["vector", "scalar"])
def test_outputs_and_gradients_are_those_of_the_equation(gain):
    tuned, net = tuned_dit(f"gain={gain!r}")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.data = p.data.double().normal_()
    ours = dict(tuned.named_parameters())
    theirs = {n: p.detach().clone().requires_grad_() for n, p in ours.items()}
    sites = sorted(n for n, m in net.named_modules() if n.endswith(("attn.proj", "mlp.fc2")))
    gamma = {s: next(v for n, v in theirs.items() if n.startswith(f"{s}.burnish")) for s in sites}
    assert {v.numel() for v in gamma.values()} == {16 if gain == "vector" else 1}
    h, y = data()
    W = {n: p.detach() for n, p in net.named_parameters() if ".burnish." not in n}

    def linear(x, n, base):
        out = F.linear(x, W[f"{n}.weight"], theirs[f"{n}.bias"])
        return out * gamma[n] if n in gamma else out

    x, c = h, theirs["y_embedder.embedding_table.weight"][y]
    for b in ("blocks.0", "blocks.1"):
        a1, b1, g1, a2, b2, g2 = linear(F.silu(c), f"{b}.adaLN_modulation.1", W) \
            .unsqueeze(1).chunk(6, -1)
        q, k, v = linear(F.layer_norm(x, (16,)) * (1 + a1) + b1, f"{b}.attn.qkv", W).chunk(3, -1)
        s = (q @ k.transpose(1, 2) / 4).softmax(-1) @ v
        x = x + g1 * linear(s, f"{b}.attn.proj", W)
        m = F.gelu(linear(F.layer_norm(x, (16,)) * (1 + a2) + b2, f"{b}.mlp.fc1", W))
        x = x + g2 * linear(m, f"{b}.mlp.fc2", W)
    got = net(h, y)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)
    g = torch.randn_like(x)
    for n, a, b in zip(ours, torch.autograd.grad(got, list(ours.values()), g),
                       torch.autograd.grad(x, list(theirs.values()), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=n)
    torch.testing.assert_close(tuned.merge()(h, y), x, rtol=1e-9, atol=1e-9)


def test_it_starts_as_the_base_and_decays_nothing():
    h, y = data()
    torch.manual_seed(0)
    want = DiT().double()(h, y)
    tuned, net = tuned_dit()
    assert torch.equal(net(h, y), want)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


@pytest.mark.parametrize("depth, blocks", [(0.5, [0]), (1.0, [0, 1]), (0.0, [])])
def test_gamma_stands_in_the_first_blocks(depth, blocks):
    tuned, _ = tuned_dit(f"depth={depth}")
    assert sorted({int(p.split(".")[1]) for p, _ in tuned.branches(Affine)}) == blocks
    assert parse(f"difffit(depth={depth})")[0].repeats() == (None if depth == 0.5 else 1)


@pytest.mark.parametrize("name", ["class_embedding.linear_1", "class_embedder.t", "label_emb",
                                  "label_embedding"])
def test_tables_of_classes_are_known_by_other_names_too(name):
    from burnish.methods.select.difffit import _CLASSES

    assert _CLASSES.search(f"{name}.weight") and _CLASSES.search(f"unet.{name}.weight")
    assert not _CLASSES.search("subclass_embedding.weight")


def test_affine_norms_train_and_the_heads_bias_is_the_heads(beside):
    one = beside("vit", "difffit")
    stems = {path for path, _ in one.theta}
    assert "vit.layernorm.weight" in stems or any(s.endswith("layernorm.weight") for s in stems)
    assert not any(s.startswith("classifier") for s in stems)


def test_targets_narrow_it():
    tuned, _ = tuned_dit("targets='fc2'")
    assert sorted(n.partition("mlp.fc2.")[2].rpartition(".")[2]
                  for n, _ in tuned.named_parameters()) == ["bias"] * 2 + ["gain"] * 2
    assert all(".mlp.fc2." in n for n, _ in tuned.named_parameters())


def test_a_vector_that_is_no_bias_and_no_norm_stays():
    torch.manual_seed(0)
    net = DiT().double()
    net.blocks[1].layer_scale = nn.Parameter(torch.ones(16, dtype=torch.float64))
    names = {n for n, _ in burnish.tune(net, "difffit", head=False).named_parameters()}
    assert names and not any("layer_scale" in n for n in names)


def test_refusals_and_defaults():
    with pytest.raises(RecipeError, match="depth=1.5: expected a share"):
        parse("difffit(depth=1.5)")
    with pytest.raises(RecipeError, match="depth=-0.1"):
        parse("difffit(depth=-0.1)")
    with pytest.raises(RecipeError, match="neither biases nor norms"):
        burnish.tune(nn.Sequential(nn.Linear(4, 4, bias=False)), "difffit", head=False)
    assert parse("difffit")[0].settings() == {"targets": None, "gain": "vector", "depth": 1.0}
