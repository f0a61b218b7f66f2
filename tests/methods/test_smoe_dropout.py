"""SMoE-Dropout: a random router that stays, and k that grows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.slimmed import Slimmed
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.testing import stir, tiny

E = 4


class Mlp(nn.Module):
    def __init__(self, gated, bias):
        super().__init__()
        self.gated = gated
        if gated:
            self.gate_proj = nn.Linear(6, 16, bias=bias)
            self.up_proj = nn.Linear(6, 16, bias=bias)
            self.down_proj = nn.Linear(16, 6, bias=bias)
        else:
            self.fc1, self.fc2 = nn.Linear(6, 16, bias=bias), nn.Linear(16, 6, bias=bias)

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


def made(settings="experts=4, k=2", beside="full", **kw):
    torch.manual_seed(0)
    net = Net(**kw).double()
    tuned = burnish.tune(net, f"{beside} + smoe_dropout({settings})", head=False,
                         targets="all-linear" if "lora" in beside else None)
    net.double()
    for n, p in net.named_parameters():
        if "router" in n:
            p.data.mul_(3.0)
    return stir(tuned, size=0.3), net


def slim(tuned):
    return [m for m in tuned.model.modules() if isinstance(m, Slimmed)]


def weight(net, path):
    """The (out, in) matrix of a linear with what a LoRA adds, spelled out."""
    linear = net.get_submodule(path)
    own = {n.rpartition(".")[2]: p for n, p in net.named_parameters()
           if n.startswith(f"{path}.burnish.") and ".lora." in n}
    scale = next((m.scale for n, m in net.named_modules() if n.endswith(".lora")), 1.0)
    return linear.weight + scale * own["B"] @ own["A"] if own else linear.weight


def equation(net, x, k):
    """Token by token, expert by expert, in loops."""
    for n, block in enumerate(net.layers):
        mlp, path = block.mlp, f"layers.{n}.mlp"
        ins = ["gate_proj", "up_proj"] if mlp.gated else ["fc1"]
        last = "down_proj" if mlp.gated else "fc2"
        named = dict(net.named_parameters())
        key = f"{path}.{ins[0]}.burnish.default.smoe_dropout.router."
        R, r = named[f"{key}weight"], named[f"{key}bias"]
        h, rows = F.layer_norm(x, (6,), block.norm.weight, block.norm.bias), []
        for t in h.reshape(-1, 6):
            likes = R @ t + r
            best = sorted(range(E), key=lambda e: -likes[e].item())[:k]      # noqa: B023
            w = torch.softmax(torch.stack([likes[e] for e in best]), 0) * E
            y = 0
            for i, e in enumerate(best):
                run, inner = slice(e * 4, e * 4 + 4), []
                for name in ins:
                    z = weight(net, f"{path}.{name}")[run] @ t
                    bias = getattr(mlp, name).bias
                    inner.append(z if bias is None else z + bias[run])
                u = F.silu(inner[0]) * inner[1] if mlp.gated else F.gelu(inner[0])
                y = y + w[i] * (getattr(mlp, last).weight[:, run] @ u)
                lora = weight(net, f"{path}.{last}") - getattr(mlp, last).weight
                y = y + lora[:, run] @ u
            bias = getattr(mlp, last).bias
            rows.append(y if bias is None else y + bias)
        x = x + torch.stack(rows).view_as(x)
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("beside", ["full", "lora(rank=2)", "full + lora(rank=2)"])
@pytest.mark.parametrize("k", [1, 3])
def test_outputs_and_gradients_are_those_of_the_equation(k, beside, gated, bias):
    tuned, net = made(f"experts=4, k={k}", beside, gated=gated, bias=bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    got, want = net(x), equation(net, x, k)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    params = [x, *tuned.parameters()]
    for a, b in zip(torch.autograd.grad(got, params, torch.cos(x.detach())),
                    torch.autograd.grad(want, params, torch.cos(x.detach())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gated", [True, False])
def test_all_with_equal_weights_are_the_mlp(gated):
    """In evaluation, at the end of training, and with k experts where that is asked for."""
    tuned, net = made("experts=4, k=4", gated=gated)
    x = torch.randn(3, 6, dtype=torch.float64)

    def dense():
        plain = Net(gated).double()
        plain.load_state_dict({n: p for n, p in net.state_dict().items() if "burnish" not in n})
        return plain(x)

    want = dense()
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-13)
    tuned, net = made(gated=gated)
    net.eval()
    want = dense()
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-13)
    net.train()
    assert not torch.allclose(net(x), want)


def test_k_rises_evenly_from_the_first_to_the_last():
    (m,) = parse("smoe_dropout")
    ks = [m.at(t, 80) for t in range(81)]
    assert ks[0] == 8 and ks[80] == 16 and ks == sorted(ks) and set(ks) == set(range(8, 17))
    assert all(ks[t] == round(8 * t / 80) + 8 for t in range(81)) and m.at(100, 80) == 16
    assert parse("smoe_dropout(k_end=8)")[0].at(40, 80) == 8
    seen, steps = [], 8
    tuned, net = made("experts=4, k=1, k_end=3")
    tuned.total_steps = steps
    tuned.optimizer(lr=1e-3)
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(steps):
        net.train()
        tuned.step(x, loss=lambda out, batch: (seen.append(slim(tuned)[0].k), out.square().mean())
                   [1])
    assert seen == [round(2 * t / 8) + 1 for t in range(8)] and slim(tuned)[0].k == 3


def test_without_a_length_k_stays():
    tuned, net = made("experts=4, k=2")
    tuned.optimizer(lr=1e-3)
    for _ in range(3):
        tuned.step(torch.randn(4, 6, dtype=torch.float64), loss=lambda o, b: o.square().mean())
    assert {m.k for m in slim(tuned)} == {2}


def test_the_schedule_goes_on_where_a_run_was_left():
    tuned, net = made("experts=4, k=1")
    tuned.total_steps = 6
    opt = tuned.optimizer(lr=1e-3)
    for _ in range(3):
        tuned.step(torch.randn(4, 6, dtype=torch.float64), loss=lambda o, b: o.square().mean())
    k, state = slim(tuned)[0].k, tuned.timeline.state()
    assert k == round(3 * 3 / 6) + 1
    other, _ = made("experts=4, k=1")
    other.total_steps = 6
    other.optimizer(lr=1e-3)
    other.timeline.load(state)
    assert {m.k for m in slim(other)} == {k} and opt is not None
    other.step(torch.randn(4, 6, dtype=torch.float64), loss=lambda o, b: o.square().mean())
    assert {m.k for m in slim(other)} == {round(3 * 4 / 6) + 1}


def test_the_router_stays_and_is_kept_in_the_file(tmp_path):
    tuned, net = made("experts=4, k=2, k_end=2", "lora(rank=2)")
    routers = {n: p.detach().clone() for n, p in net.named_parameters() if "router" in n}
    assert len(routers) == 4 and not any(p.requires_grad for n, p in net.named_parameters()
                                         if "router" in n)
    assert sum(p.numel() for p in routers.values()) == 2 * parse(
        "smoe_dropout(experts=4)")[0].frozen(6) == 2 * 4 * 7
    tuned.optimizer(lr=0.1)
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(3):
        tuned.step(x, loss=lambda o, b: o.square().mean())
    now = dict(net.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in routers.items())
    tuned.save(tmp_path / "it")
    net.eval()
    torch.manual_seed(0)
    again = burnish.load(Net().double(), tmp_path / "it")
    again.model.eval()
    torch.testing.assert_close(again.model(x), net(x), rtol=1e-5, atol=1e-6)


def test_more_experts_are_nearer_to_the_whole():
    """Of an MLP that is trained with few the error falls, or stays, as more answer."""
    torch.manual_seed(0)
    net = Net().double()
    tuned = burnish.tune(net, "full + smoe_dropout(experts=4, k=1)", head=False)
    net.double()
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], *x.t()[:4]], 1)
    tuned.total_steps = 150
    tuned.optimizer(lr=1e-2)
    for _ in range(150):
        tuned.step((x, y), loss=lambda o, b: (o - b[1]).square().mean())
    net.eval()
    errors = []
    for k in (1, 2, 3, 4):
        tuned.recipe.named("smoe_dropout").lifecycle(tuned, k)
        with torch.no_grad():
            errors.append(float((net(x) - y).square().mean()))
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_only_the_chosen_experts_are_multiplied():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for k in (1, 2):
        tuned, net = made(f"experts=4, k={k}", "lora(rank=2)")
        net.eval()
        tuned.recipe.named("smoe_dropout").lifecycle(tuned, k)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.randn(40, 6, dtype=torch.float64))
        counts.append(counter.get_total_flops())
    router = 2 * (2 * 40 * 6 * 4)
    lora = 2 * 2 * 40 * 2 * (6 + 6)                     # what does not follow k of the updates
    assert abs((counts[1] - router - lora) / (counts[0] - router - lora) - 2) < 0.1


def test_models_and_defaults():
    for model in ("llama", "vit"):
        net, batch = tiny(model)
        net.eval()
        want = net(**batch).logits
        tuned = burnish.tune(net, "lora(rank=2) + smoe_dropout(experts=4, k=2)", head=False)
        torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-5)
        assert tuned.loss(batch).isfinite()
    assert parse("smoe_dropout")[0].settings() == {"targets": None, "experts": 16, "k": None,
                                                   "k_end": None}
    anatomy = Anatomy.of(tiny("llama", meta=True, hidden_size=4096, intermediate_size=11008,
                              num_hidden_layers=32, num_attention_heads=32)[0])
    assert [e.group.units for e in parse("smoe_dropout")[0].branch(anatomy)] == [11008] * 32


def test_some_of_the_experts_are_neither_the_dense_mlp_nor_a_weight():
    tuned, net = made("experts=4, k=1, k_end=1", "lora(rank=2)")
    x = torch.randn(3, 6, dtype=torch.float64)
    on = net.eval()(x)
    with tuned.disabled():
        assert (net(x) - on).abs().max() > 1e-3
    assert not type(tuned.recipe[-1]).identity
    with pytest.raises(burnish.CheckError, match="smoe_dropout has no form as a plain weight"):
        tuned.merge()


def test_refusals():
    for text in ("experts=1", "experts=1, k=1", "k=0", "k=17", "k_end=7", "k_end=17",
                 "experts=4, k=5"):
        with pytest.raises(burnish.RecipeError, match=r"^smoe_dropout.*expected at least 2"):
            parse(f"smoe_dropout({text})")
    assert parse("smoe_dropout(experts=2, k=1, k_end=1)")
    with pytest.raises(burnish.RecipeError, match="does not divide the 16 inner channels"):
        burnish.tune(Net(), "full + smoe_dropout(experts=3, k=1)", head=False)
    with pytest.raises(burnish.RecipeError, match="this model has none|needs MLPs"):
        burnish.tune(nn.Sequential(nn.Linear(3, 2)), "full + smoe_dropout", head=False)
    with pytest.raises(burnish.RecipeError, match="^smoe_dropout: .* holds more than low-rank"):
        burnish.tune(Net(), "dora(rank=2) + smoe_dropout(experts=4, k=2)", targets="all-linear",
                     head=False)
    with pytest.raises(burnish.RecipeError, match="which inner channels"):
        parse("smoe_dropout + routed_ffn")
    tuned, _ = made()
    for wrong in (0, 5):
        with pytest.raises(burnish.RecipeError, match=f"1 to 4 experts, not {wrong}"):
            tuned.recipe.named("smoe_dropout").lifecycle(tuned, wrong)
