"""SPT's routed FFN: runs of inner channels that a router gives each token a few of."""

from __future__ import annotations

import copy
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import burnish
from burnish.blocks.state.routed import Routed, routed
from burnish.blocks.weight.factor import Chain
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.needs import inner
from burnish.core.recipe import parse
from burnish.testing import stir, tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32}


class Mlp(nn.Module):
    """fc1, an activation, fc2; or gate and up, and down."""

    def __init__(self, gated, d=6, inside=16, bias=True):
        super().__init__()
        self.gated = gated
        if gated:
            self.gate_proj = nn.Linear(d, inside, bias=bias)
            self.up_proj = nn.Linear(d, inside, bias=bias)
            self.down_proj = nn.Linear(inside, d, bias=bias)
        else:
            self.fc1 = nn.Linear(d, inside, bias=bias)
            self.fc2 = nn.Linear(inside, d, bias=bias)

    def forward(self, x):
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, gated, **kw):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mlp = Mlp(gated, **kw)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, gated=False, **kw):
        super().__init__()
        self.layers = nn.ModuleList([Block(gated, **kw), Block(gated, **kw)])

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def made(gated=False, settings="", more="lora(rank=2) + ", bias=True, train=True):
    torch.manual_seed(0)
    net = Net(gated, bias=bias).double()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"{more}routed_ffn({settings})", head=False,
                         targets="all-linear" if "lora" in more else None)
    net.double()
    stir(tuned, size=0.4)
    net.train(train)
    return tuned, base


def scale_of(tuned):
    return next(m.scale for m in tuned.model.modules() if isinstance(m, Chain))


def of(tuned, path):
    """(A, B) of the update at a linear, spelled out; zeros where there is none."""
    linear = tuned.model.get_submodule(path)
    named = {n.rpartition(".")[2]: p for n, p in tuned.named_parameters()
             if n.startswith(f"{path}.burnish.") and ".lora." in n}
    if not named:
        return linear.weight.new_zeros(1, linear.in_features), \
            linear.weight.new_zeros(linear.out_features, 1)
    return named["A"], named["B"] * scale_of(tuned)


def equation(tuned, base, x, k, experts=4, one=False):
    """Token by token, expert by expert, in loops. one: c is 1."""
    named = dict(tuned.model.named_parameters())
    for n, block in enumerate(base.layers):
        mlp, path = block.mlp, f"layers.{n}.mlp"
        ins = ["gate_proj", "up_proj"] if mlp.gated else ["fc1"]
        last = "down_proj" if mlp.gated else "fc2"
        key = f"{path}.{ins[0]}.burnish.default.routed_ffn.router."
        W_r, b_r = named[f"{key}weight"], named[f"{key}bias"]
        h = block.norm(x)
        rows = []
        for t in h.reshape(-1, h.shape[-1]):
            p = torch.sigmoid(W_r @ t + b_r)
            best = sorted(range(experts), key=lambda e: -p[e].item())[:k]        # noqa: B023
            down = getattr(mlp, last)
            y = torch.zeros_like(t) if down.bias is None else down.bias
            for e in best:
                c = 1.0 if one else 2 * p[e]
                made = []
                for name in ins:
                    linear, (A, B) = getattr(mlp, name), of(tuned, f"{path}.{name}")
                    f = linear.out_features // experts
                    run = slice(e * f, e * f + f)
                    own = linear.weight[run] @ t
                    own = own if linear.bias is None else own + linear.bias[run]
                    made.append(c * own + B[run] @ (A @ t))
                inside = F.silu(made[0]) * made[1] if mlp.gated else F.gelu(made[0])
                A, B = of(tuned, f"{path}.{last}")
                y = y + c * (down.weight[:, run] @ inside) + B @ (A[:, run] @ inside)
            rows.append(y)
        x = x + torch.stack(rows).view_as(x)
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("k", [None, 1, 3, 4])
def test_outputs_and_gradients_are_those_of_the_equation(k, gated, bias):
    tuned, base = made(gated, "" if k is None else f"k={k}", bias=bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    got, want = tuned.model(x), equation(tuned, base, x, k or (1 if gated else 2))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    params = [x, *tuned.parameters()]
    assert len(params) == 1 + 2 * 2 * (3 if gated else 2) + 4
    for a, b in zip(torch.autograd.grad(got, params, torch.cos(x.detach())),
                    torch.autograd.grad(want, params, torch.cos(x.detach())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gated", [True, False])
def test_all_experts_with_c_of_one_are_the_mlp(gated):
    tuned, base = made(gated, "k=4", more="")
    with torch.no_grad():
        for p in tuned.parameters():
            p.zero_()                                    # sigmoid(0) = 1/2
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(tuned.model(x), base(x), rtol=1e-12, atol=1e-13)
    tuned, _ = made(gated, "k=3", more="")
    assert not torch.allclose(tuned.model(x), base(x))


def test_alone_only_the_router_trains_and_c_is_its_gradient():
    tuned, base = made(more="")
    assert [tuple(p.shape) for p in tuned.parameters()] == [(4, 6), (4,)] * 2
    x = torch.randn(7, 6, dtype=torch.float64)
    got = torch.autograd.grad(tuned.model(x).sin().sum(), list(tuned.parameters()))
    want = torch.autograd.grad(equation(tuned, base, x, 2).sin().sum(), list(tuned.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_biases_that_train_beside_it():
    tuned, base = made(more="lora(rank=2) + bitfit + ")
    named = dict(tuned.named_parameters())
    for n, p in base.named_parameters():
        if n in named:
            p.requires_grad_(True).data.copy_(named[n])
    x = torch.randn(9, 6, dtype=torch.float64)
    names = [n for n, _ in base.named_parameters() if n in named]
    assert any("fc1.bias" in n for n in names) and any("fc2.bias" in n for n in names)
    got = torch.autograd.grad(tuned.model(x).sin().sum(), [named[n] for n in names])
    own = dict(base.named_parameters())
    want = torch.autograd.grad(equation(tuned, base, x, 2).sin().sum(), [own[n] for n in names])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_only_the_chosen_experts_are_multiplied():
    """Of N F d multiplications of each of the base's products k / E are made, forth and back."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for k in (1, 2, 4):
        tuned, _ = made(settings=f"k={k}", more="")
        x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            tuned.model(x).sum().backward()
        counts.append(counter.get_total_flops())
    router = 2 * (2 * 40 * 6 * 4) * 3                    # forth, to W_r, to x
    inner = 2 * 4 * (2 * 40 * 6 * 16)                    # two MLPs; fc1 and fc2, forth and back
    biases = 2 * (2 * 40 * 16)
    for k, n in zip((1, 2, 4), counts, strict=True):
        assert abs(n - router - (inner + biases) * k / 4) < 0.05 * inner, (k, n)


def test_what_is_kept_is_a_share_of_the_inner_states():
    sizes = []
    for k in (1, 2, 4):
        tuned, _ = made(settings=f"k={k}", more="")
        kept = {}
        weights = {p.untyped_storage().data_ptr() for p in tuned.model.parameters()}

        def pack(t, kept=kept, weights=weights):
            if t.untyped_storage().data_ptr() not in weights:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(64, 6, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = tuned.model(x)
        assert out.requires_grad
        sizes.append(sum(kept.values()))
    one = sizes[1] - sizes[0]
    assert sizes[2] - sizes[1] == 2 * one and one <= 2 * 64 * 8 * (2 * 4 + 8)


# -- routing ---------------------------------------------------------------------------------------
def test_rows_stand_expert_by_expert_and_come_back_to_their_tokens():
    torch.manual_seed(0)
    router = nn.Linear(6, 4).double().requires_grad_(False)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    r = routed(x, router, 2)
    p = torch.sigmoid(router(x)).reshape(15, 4)
    assert r.of is x and r.experts == 4 and len(r.ends) == 5 and r.ends[0] == 0 and r.ends[-1] == 30
    seen = set()
    for e, (a, b) in enumerate(pairwise(r.ends)):
        for row in range(a, b):
            t = int(r.token[row])
            assert e in p[t].topk(2).indices
            assert float(r.c[row]) == pytest.approx(2 * float(p[t, e]))
            seen.add((t, e))
    assert len(seen) == 30
    rows = torch.randn(30, 3, dtype=torch.float64)
    want = torch.zeros(15, 3, dtype=torch.float64).index_add_(0, r.token, rows)
    torch.testing.assert_close(r.back(rows), want)


def test_routing_is_wide_and_a_simulation_gives_all_experts_as_many():
    router = nn.Linear(6, 4)
    x = torch.randn(10, 6).bfloat16()
    r = routed(x, router, 2)
    want = 2 * torch.sigmoid(router(x.float())).topk(2, -1).values.sum()
    torch.testing.assert_close(r.c.sum(), want)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(routed(x, router, 2).c, r.c, rtol=0, atol=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert list(routed(torch.randn(10, 6), nn.Linear(6, 4), 2).ends) == [0, 5, 10, 15, 20]
    assert list(routed(x.to("meta"), router.to("meta"), 2).ends) == [0, 5, 10, 15, 20]


def test_an_expert_without_tokens_is_no_trouble():
    tuned, base = made(settings="k=1")
    named = dict(tuned.named_parameters())
    with torch.no_grad():
        for n, p in named.items():
            if n.endswith("router.bias"):
                p.copy_(torch.tensor([9.0, -9.0, -9.0, -9.0]))
    x = torch.randn(4, 6, dtype=torch.float64)
    got, want = tuned.model(x), equation(tuned, base, x, 1)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sin().sum(), named.values()),
                    torch.autograd.grad(want.sin().sum(), named.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# -- in models -------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "vit"])
def test_models_train_with_it_and_under_checkpoint_alike(model):
    grads = []
    for more in ("", " + checkpoint"):
        net, batch = tiny(model)
        tuned = burnish.tune(net, f"lora(rank=2) + routed_ffn{more}", head=False)
        net.eval()
        stir(tuned)
        tuned.loss(batch).backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters()})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_a_step_is_simulated_to_the_byte(model):
    """However the tokens fall."""
    for k in (1, 2):
        net, batch = tiny(model)
        tuned = burnish.tune(net, f"lora(rank=2) + routed_ffn(k={k})", head=False)
        said = burnish.simulate(tiny(model)[0], f"lora(rank=2) + routed_ffn(k={k})", batch,
                                head=False)
        assert burnish.measure(tuned, batch).peak_bytes == said.peak_bytes


def test_autocast_and_narrow_weights():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + routed_ffn(k=4)", head=False)
    net.eval()
    want = tuned.model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = tuned.model(**batch).logits
        got.float().sum().backward()
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
    assert not torch.equal(got.float(), want)


def test_weights_held_in_another_form():
    torch.manual_seed(0)
    net, batch = tiny("llama", hidden_size=64, intermediate_size=128)
    net.eval()
    tuned = burnish.tune(net, "nf4 + lora(rank=2) + routed_ffn", head=False)
    stir(tuned)
    plain, _ = tiny("llama", hidden_size=64, intermediate_size=128)
    other = burnish.tune(plain.eval(), "lora(rank=2) + routed_ffn", head=False)
    stir(other)
    with torch.no_grad():
        for place in tuned.anatomy.places:
            if place.block is not None and place.kind == "linear":
                plain.get_submodule(place.path).weight.copy_(tuned.weight(place))
    own = dict(other.named_parameters())
    for n, p in tuned.named_parameters():
        own[n].data.copy_(p)
    a, b = (t.loss(batch) for t in (tuned, other))
    torch.testing.assert_close(a, b)
    a.backward(), b.backward()
    for n, p in tuned.named_parameters():
        torch.testing.assert_close(p.grad, own[n].grad, rtol=1e-4, atol=1e-6)


def test_which_mlps():
    method = parse("routed_ffn")[0]
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    found = method.branch(anatomy)
    assert [e.group.units for e in found] == [11008] * 32
    assert method.count(4096) == 4 * 4097 and method.taken(True) == 1 and method.taken(False) == 2
    assert parse("routed_ffn(experts=2)")[0].taken(True) == 1
    assert parse("routed_ffn(experts=8)")[0].taken(True) == 2
    assert parse("routed_ffn(experts=12)")[0].taken(True) == 3
    assert parse("routed_ffn(experts=8, k=3)")[0].taken(True) == 3
    assert [g.kind for g in inner(anatomy)] == ["channels"] * 32
    assert parse("routed_ffn")[0].settings() == {"targets": None, "experts": 4, "k": None}
    assert not method.identity and not method.merges


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize("beside", ["dora(rank=2)", "ia3", "lora(rank=2, dropout=0.1)",
                                    "snell(rank=2)"])
def test_what_cannot_be_divided_is_refused_beforehand(beside):
    with pytest.raises(RecipeError, match="^routed_ffn: .* holds more than low-rank updates"):
        burnish.tune(Net(), f"{beside} + routed_ffn", targets="all-linear", head=False)


def test_refusals():
    for text in ("experts=1", "k=0", "k=5", "experts=2, k=3"):
        with pytest.raises(RecipeError, match=r"^routed_ffn\(experts=.*expected at least 2"):
            parse(f"routed_ffn({text})")
    assert parse("routed_ffn(experts=2, k=2)")
    with pytest.raises(RecipeError, match="does not divide the 16 inner channels of layers.0.mlp"):
        burnish.tune(Net(), "lora(rank=2) + routed_ffn(experts=3)", head=False)
    with pytest.raises(RecipeError, match="which inner channels"):
        parse("routed_ffn + routed_ffn(k=1)")
    with pytest.raises(RecipeError, match="this model has none|needs MLPs"):
        burnish.tune(nn.Sequential(nn.Linear(3, 2)), "full + routed_ffn", head=False)
    tuned, _ = made(more="full + ")
    with pytest.raises(RecipeError, match="trains whole"):
        tuned.model(torch.randn(2, 6, dtype=torch.float64))
    tuned, _ = made(more="")
    with pytest.raises(burnish.BurnishError, match="routed_ffn"):
        tuned.merge()
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(RecipeError, match="torch.func does not"):
        torch.func.grad(lambda t: tuned.model(t).sum())(x)


def test_layers_in_whole_numbers_are_refused():
    net, batch = tiny("bert")
    with pytest.raises(RecipeError, match="reads and gives numbers on a grid"):
        burnish.tune(net.eval(), "int8_graph + lora(rank=2) + routed_ffn", head=False,
                     calibration=[batch])


def test_more_than_an_activation_between_is_refused():
    tuned, _ = made(more="")
    mlp = tuned.model.layers[0].mlp
    x = torch.randn(4, 6, dtype=torch.float64)
    mlp.forward = lambda t: mlp.fc2(mlp.fc1(t).flatten())
    with pytest.raises(RecipeError, match=re.escape("more between its linears")):
        tuned.model(x)
    mlp.forward = lambda t: mlp.fc2(t.new_zeros(8, 4))
    with pytest.raises(RecipeError, match="no rows of its experts"):
        tuned.model(x)
    tuned, _ = made(True, more="")
    mlp = tuned.model.layers[0].mlp
    for forward in (lambda t: mlp.down_proj(mlp.up_proj(t) * mlp.gate_proj(t)),
                    lambda t: mlp.down_proj(mlp.gate_proj(t) * mlp.up_proj(t + 0))):
        mlp.forward = forward
        with pytest.raises(RecipeError, match=r"up_proj ran before .*, or on another state"):
            tuned.model(x)


def test_a_listener_is_no_copy_of_its_slot():
    tuned, base = made()
    again = copy.deepcopy(tuned.model)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(again(x), tuned.model(x))
    for a, b in zip((m for m in again.modules() if isinstance(m, Routed)),
                    (m for m in tuned.model.modules() if isinstance(m, Routed)), strict=True):
        assert a.slot is not b.slot and any(m is a for m in a.slot.modules())
