"""EMoE: the clusters of an MLP's keys, and who answers, against the equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.emergent import Emergent, assigned, clusters
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.testing import stir, tiny


class Mlp(nn.Module):
    def __init__(self, gated, bias):
        super().__init__()
        self.gated = gated
        names = [("gate_proj", 6, 16), ("up_proj", 6, 16), ("down_proj", 16, 6)] if gated else \
            [("fc1", 6, 16), ("fc2", 16, 6)]
        for name, inp, out in names:
            self.add_module(name, nn.Linear(inp, out, bias=bias))

    def forward(self, x):
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, gated, bias):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(6), Mlp(gated, bias)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, gated=False, bias=True):
        super().__init__()
        self.layers = nn.ModuleList([Block(gated, bias), Block(gated, bias)])

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def made(k, beside="full", **kw):
    """Tuned, its model, and the first matrices as they were before anything moved."""
    torch.manual_seed(0)
    net = Net(**kw).double()
    first = "gate_proj" if kw.get("gated") else "fc1"
    keys = [getattr(b.mlp, first).weight.detach().clone() for b in net.layers]
    tuned = burnish.tune(net, f"{beside} + emoe(experts=4, k={k}, seed=1)", head=False,
                         targets="all-linear" if "lora" in beside else None)
    net.double()
    return stir(tuned, size=0.3), net, keys


def leaders(net):
    return [m for m in net.modules() if isinstance(m, Emergent) and m.routes]


def weight(net, path):
    """The (out, in) matrix of a linear with what a LoRA adds, spelled out."""
    linear = net.get_submodule(path)
    own = {n.rpartition(".")[2]: p for n, p in net.named_parameters()
           if n.startswith(f"{path}.burnish.") and ".lora." in n}
    scale = next((m.scale for n, m in net.named_modules() if n.endswith(".lora")), 1.0)
    return linear.weight + scale * own["B"] @ own["A"] if own else linear.weight


def equation(net, x, k, keys):
    """Token by token: the whole MLP, with the inner numbers of all other clusters at zero."""
    for n, block in enumerate(net.layers):
        mlp, path = block.mlp, f"layers.{n}.mlp"
        parts = leaders(net)[n].channels.view(4, 4)
        h, rows = F.layer_norm(x, (6,), block.norm.weight, block.norm.bias), []
        for t in h.reshape(-1, 6):
            scores = [float(t.detach() @ keys[n][own].mean(0)) for own in parts]
            best = sorted(range(4), key=lambda e: -scores[e])[:k]            # noqa: B023
            mask = torch.zeros(16, dtype=x.dtype)
            for e in best:
                mask[parts[e]] = 1.0
            inner = [F.linear(t, weight(net, f"{path}.{name}"), getattr(mlp, name).bias)
                     for name in (("gate_proj", "up_proj") if mlp.gated else ("fc1",))]
            u = F.silu(inner[0]) * inner[1] if mlp.gated else F.gelu(inner[0])
            last = "down_proj" if mlp.gated else "fc2"
            rows.append(F.linear(u * mask, weight(net, f"{path}.{last}"),
                                 getattr(mlp, last).bias))
        x = x + torch.stack(rows).view_as(x)
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("beside", ["full", "lora(rank=2)", "full + lora(rank=2)"])
@pytest.mark.parametrize("k", [1, 3])
def test_outputs_and_gradients_are_the_masked_mlps(k, beside, gated, bias):
    """The gate goes by the keys as they stood, whatever has become of them, and has no gradient."""
    tuned, net, keys = made(k, beside, gated=gated, bias=bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    got, want = net(x), equation(net, x, k, keys)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    params = [x, *tuned.parameters()]
    for a, b in zip(torch.autograd.grad(got, params, torch.cos(x.detach())),
                    torch.autograd.grad(want, params, torch.cos(x.detach())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gated", [True, False])
def test_all_clusters_are_the_dense_mlp(gated):
    """After training too, which is what folds back."""
    tuned, net, _ = made(4, gated=gated)
    plain = Net(gated).double()
    plain.load_state_dict({n: p for n, p in net.state_dict().items() if "burnish" not in n})
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-12, atol=1e-13)
    for model in ("llama", "vit"):
        net, batch = tiny(model)
        net.eval()
        want = net(**batch).logits
        burnish.tune(net, "lora(rank=2) + emoe(experts=4, k=4)", head=False)
        torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-6)


# -- the clusters ----------------------------------------------------------------------------------
def test_every_channel_has_one_cluster_and_every_cluster_as_many():
    g = torch.Generator().manual_seed(0)
    for rows, E in ((48, 4), (60, 10), (16, 16), (64, 2)):
        order = clusters(torch.randn(rows, 5, generator=g), E, seed=3)
        assert sorted(order.tolist()) == list(range(rows))
        for own in order.view(E, -1).tolist():
            assert own == sorted(own)
    labels = assigned(torch.randn(60, 6, generator=g), 10)
    assert torch.bincount(labels).tolist() == [10] * 6


def test_keys_that_are_all_alike_have_clusters_too():
    assert sorted(clusters(torch.ones(12, 3), 4, seed=0).tolist()) == list(range(12))


def test_the_nearest_are_served_first():
    """Entry by entry from the largest, by hand."""
    likes = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    want, room = [-1] * 12, [4] * 3
    for flat in likes.flatten().argsort(descending=True).tolist():
        row, e = divmod(flat, 3)
        if want[row] < 0 and room[e]:
            want[row], room[e] = e, room[e] - 1
    assert assigned(likes, 4).tolist() == want


def test_planted_clusters_are_found_whatever_their_lengths():
    g = torch.Generator().manual_seed(2)
    means = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    label = torch.arange(8).repeat(6)[torch.randperm(48, generator=g)]
    keys = means[label] + 0.05 * torch.randn(48, 8, generator=g)
    keys = keys * torch.rand(48, 1, generator=g) * 9
    parts = clusters(keys, 8, seed=0).view(8, 6)
    assert all(len(set(label[own].tolist())) == 1 for own in parts)


def test_clusters_are_tighter_than_runs_and_a_function_of_the_seed():
    g = torch.Generator().manual_seed(3)
    keys = torch.randn(64, 6, generator=g)
    unit = F.normalize(keys, dim=1)

    def spread(order):
        parts = unit[order].view(8, 8, 6)
        return float((parts - parts.mean(1, keepdim=True)).square().sum())

    found = clusters(keys, 8, seed=0)
    assert torch.equal(found, clusters(keys, 8, seed=0))
    assert spread(found) < 0.8 * spread(torch.arange(64))
    assert any(not torch.equal(found, clusters(keys, 8, seed=s)) for s in (1, 2, 3))


# -- around it -------------------------------------------------------------------------------------
def test_what_was_found_is_in_the_file_and_does_not_train(tmp_path):
    tuned, net, keys = made(2, "lora(rank=2)")
    for m, W in zip(leaders(net), keys, strict=True):
        assert torch.equal(m.channels, clusters(W, 4, seed=1))
        torch.testing.assert_close(m.gate, torch.stack([W[own].mean(0)
                                                        for own in m.channels.view(4, 4)]))
    assert not any("emoe" in n for n, _ in net.named_parameters())
    tuned.save(tmp_path / "it")
    torch.manual_seed(0)
    again = burnish.load(Net().double(), tmp_path / "it")
    for a, b in zip(leaders(again.model), leaders(net), strict=True):
        assert torch.equal(a.channels, b.channels) and torch.allclose(a.gate, b.gate.to(a.gate))
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(again.model(x), net(x), rtol=1e-5, atol=1e-6)


def test_only_the_chosen_are_multiplied_and_kept():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for k in (1, 2):
        _, net, _ = made(k)
        x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        counts.append(counter.get_total_flops())
    gate = 2 * (2 * 40 * 6 * 4)
    assert abs((counts[1] - gate) / (counts[0] - gate) - 2) < 0.05


def test_weights_held_in_another_form():
    """Keys are decoded once; clusters of codes are those of what they stand for."""
    net, batch = tiny("llama", hidden_size=64, intermediate_size=128)
    tuned = burnish.tune(net.eval(), "nf4 + lora(rank=2) + emoe(experts=4, k=2)", head=False)
    place = next(p for p in tuned.anatomy.places if p.path.endswith("layers.0.mlp.gate_proj"))
    assert torch.equal(leaders(net)[0].channels, clusters(tuned.weight(place), 4, seed=0))
    assert tuned.loss(batch).isfinite()


def test_which_mlps_and_defaults():
    method = parse("emoe")[0]
    assert method.settings() == {"targets": None, "experts": 64, "k": 32, "layers": 2, "seed": 0}
    anatomy = Anatomy.of(tiny("llama", meta=True, hidden_size=4096, intermediate_size=11008,
                              num_hidden_layers=32, num_attention_heads=32)[0])
    assert [c.group.block for c in method.branch(anatomy)] == [30, 31]
    assert len(parse("emoe(layers=0)")[0].branch(anatomy)) == 32
    assert parse("emoe(layers=0)")[0].repeats() == 1 and method.repeats() is None


def test_some_of_the_clusters_are_neither_the_dense_mlp_nor_a_weight():
    tuned, net, _ = made(1)
    x = torch.randn(3, 6, dtype=torch.float64)
    on = net(x)
    with tuned.disabled():
        assert (net(x) - on).abs().max() > 1e-3
    assert not type(tuned.recipe[-1]).identity
    with pytest.raises(burnish.CheckError, match="emoe has no form as a plain weight"):
        made(1, "lora(rank=2)")[0].merge()


def test_weights_that_train_meanwhile_in_another_adapter_are_read_as_they_stand():
    torch.manual_seed(0)
    net = Net().double()
    tuned = burnish.tune(net, "full", head=False, name="first")
    stir(tuned, size=0.3)
    keys = [b.mlp.fc1.weight.detach().clone() for b in net.layers]
    assert all(b.mlp.fc1.weight.requires_grad for b in net.layers)
    tuned.add("second", "emoe(experts=4, k=2, seed=1)", head=False)
    for m, W in zip(leaders(net), keys, strict=True):
        assert torch.equal(m.channels, clusters(W, 4, seed=1))


def test_refusals():
    for text in ("experts=1", "experts=1, k=1", "k=0", "k=65", "layers=-1"):
        with pytest.raises(burnish.RecipeError, match=r"^emoe.*expected at least 2"):
            parse(f"emoe({text})")
    assert parse("emoe(experts=2, k=2, layers=0)") and parse("emoe(experts=2, k=1)")
    with pytest.raises(burnish.RecipeError, match="does not divide the 16 inner channels"):
        burnish.tune(Net(), "full + emoe(experts=3, k=1)", head=False)
    with pytest.raises(burnish.RecipeError, match=r"emoe\(layers=3\): this model has 2 such MLPs"):
        burnish.tune(Net(), "full + emoe(experts=4, k=1, layers=3)", head=False)
    with pytest.raises(burnish.RecipeError, match="this model has none|needs MLPs"):
        burnish.tune(nn.Sequential(nn.Linear(3, 2)), "full + emoe", head=False)
    with pytest.raises(burnish.RecipeError, match="^emoe: .* holds more than low-rank"):
        burnish.tune(Net(), "dora(rank=2) + emoe(experts=4, k=2)", targets="all-linear", head=False)
    with pytest.raises(burnish.RecipeError, match="which inner channels"):
        parse("emoe + routed_ffn")
