"""MoTE: ternary copies of an MLP beside it, one of them a token."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import burnish
from burnish.blocks.state.ternary import (
    Latent,
    Stored,
    TernaryExperts,
    bytes_of,
    packed,
    ternary,
    unpacked,
)
from burnish.core.errors import RecipeError
from burnish.core.registry import find
from burnish.testing import stir, tiny


def written_out(x, W, b=None):
    """One token at a time; gradients straight through what is rounded."""
    g = W.detach().abs().mean()
    hat = W + (g * (W / (g + 1e-5)).round().clamp(-1, 1) - W).detach()
    rows = []
    for t in x.reshape(-1, x.shape[-1]):
        m = t.detach().abs().max().clamp_min(1e-5)
        q = (127 * t / m).round().clamp(-128, 127) * m / 127
        rows.append((t + (q - t).detach()) @ hat.T)
    y = torch.stack(rows).view(*x.shape[:-1], -1)
    return y if b is None else y + b


def made(text="mote(experts=3, every=1)", model="llama", size=0.3, **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, text, head=False)
    net.double()
    return stir(tuned, size=size), net, base, batch


def test_weights_are_minus_one_zero_and_one():
    torch.manual_seed(0)
    W = torch.randn(40, 30)
    codes, g = ternary(W)
    assert set(codes.unique().tolist()) == {-1, 0, 1} and codes.dtype == torch.int8
    assert float(g) == pytest.approx(float(W.abs().mean()))
    assert torch.equal(codes.float(), (W / (W.abs().mean() + 1e-5)).round().clamp(-1, 1))
    half, gamma = ternary(W.bfloat16())
    assert gamma.dtype == torch.float32 and half.dtype == torch.int8
    x, scale = bytes_of(torch.tensor([[0.0, 0.0], [3.0, -1.5]]))
    assert x.tolist() == [[0, 0], [127, -64]] and scale.flatten().tolist() == \
        pytest.approx([0.0, 3 / 127])


@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (1, 1)])
def test_packing_is_exact_and_takes_two_bits(shape):
    codes = torch.randint(-1, 2, shape).to(torch.int8)
    bits = packed(codes)
    assert torch.equal(unpacked(bits, codes.shape), codes)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-codes.numel() // 4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_the_equation_and_passes_gradients_straight_through(bias):
    torch.manual_seed(0)
    W = torch.randn(6, 9, dtype=torch.float64)
    b = torch.randn(6, dtype=torch.float64) if bias else None
    linear = Latent(W, b)
    x = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    other, theirs = W.clone().requires_grad_(), x.detach().clone().requires_grad_()
    got, want = linear(x), written_out(theirs, other, b)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(linear.weight.grad, other.grad, rtol=1e-9, atol=1e-11)
    answers = Stored(W, b)
    answers.load_state_dict(linear.finished())
    assert torch.equal(answers(x), got)


def experts_of(net):
    return {n.partition(".burnish")[0]: m for n, m in net.named_modules()
            if isinstance(m, TernaryExperts)}


def term(m, x, k):
    """Token by token, and the balance term of the batch."""
    flat = x.reshape(-1, x.shape[-1])
    p = (flat @ m.router.T).softmax(-1)
    rows, sent = [], torch.zeros(p.shape[1], dtype=p.dtype)
    for n, t in enumerate(flat):
        total = 0
        for e in sorted(range(p.shape[1]), key=lambda e: -float(p[n, e]))[:k]:      # noqa: B023
            own = m.experts[e]
            h = F.silu(written_out(t[None], own.gate_proj.weight)) \
                * written_out(t[None], own.up_proj.weight)
            total = total + p[n, e] * written_out(h, own.down_proj.weight)[0]
            sent[e] += 1
        rows.append(total)
    return torch.stack(rows).view_as(x), p.shape[1] * (sent / sent.sum() * p.mean(0)).sum()


@pytest.mark.parametrize("k", [1, 2])
def test_the_layer_is_the_shared_mlp_and_its_tokens_expert_and_so_are_all_gradients(k):
    tuned, net, base, batch = made(f"mote(experts=3, every=1, k={k}, balance=0.3)")
    terms = []
    for path, m in experts_of(net).items():
        def hook(mod, args, out, m=m):
            y, balance = term(m, args[0], k)
            terms.append(balance)
            return out + y
        base.get_submodule(path).register_forward_hook(hook)
    tuned.optimizer()
    tuned.loss(batch).backward()
    loss = base(**batch).loss
    names, params = zip(*tuned.named_parameters(), strict=True)
    want = torch.autograd.grad(loss + 0.3 * sum(terms), params, allow_unused=True)
    assert any(g is not None and g.any() for g in want)
    for n, p, g in zip(names, params, want, strict=True):
        g = torch.zeros_like(p) if g is None else g
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")
    net.eval()
    torch.testing.assert_close(net(**batch).logits, base(**batch).logits, rtol=1e-8, atol=1e-9)


def test_the_shared_path_is_unchanged():
    tuned, net, base, batch = made()
    with torch.no_grad():
        for m in experts_of(net).values():
            for own in m.experts:
                own.down_proj.weight.zero_()
    torch.testing.assert_close(net(**batch).logits, base(**batch).logits)
    assert not [n for n, _ in tuned.named_parameters() if "burnish" not in n]


def test_experts_begin_as_the_mlp_and_the_router_at_random():
    _, net, base, _ = made(size=0.0)
    for path, m in experts_of(net).items():
        mlp = base.get_submodule(path)
        for own in m.experts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                assert torch.equal(getattr(own, name).weight, getattr(mlp, name).weight)
        assert m.router.shape == (3, 32) and 0 < m.router.abs().max() <= 32 ** -0.5


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_a_finished_file_holds_two_bits_a_weight_and_answers_alike(model, tmp_path):
    net, batch = tiny(model)
    tuned = burnish.tune(net, "mote(experts=2, every=1)", head=False)
    stir(tuned, size=0.1)
    net.eval()
    with torch.no_grad():
        want = net(**batch).logits
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, Latent))
    tuned.save(tmp_path / "a")
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    bits = {n: t for n, t in held.items() if n.endswith(".bits")}
    assert sum(t.numel() for t in bits.values()) * 8 / weights == 2.0
    assert not [n for n in held if n.endswith("proj.weight") and ".experts." in n]
    again = burnish.load(tiny(model)[0].eval(), tmp_path / "a")
    again.model.eval()
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, want)
    assert not list(again.parameters())
    tuned.save(tmp_path / "b", whole=True)
    whole = burnish.load(tiny(model)[0], tmp_path / "b")
    assert any(isinstance(m, Latent) for m in whole.model.modules())


def test_what_waits_for_backward_is_a_byte_a_number():
    linear, kept = Latent(torch.randn(64, 256), None), []
    x = torch.randn(32, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    own = [t for t in kept if t.data_ptr() != linear.weight.data_ptr()]
    assert sum(t.nbytes for t in own) == 32 * 256 + 32 * 4


def test_the_count_of_qwen_and_where_it_stands():
    m = burnish.parse("mote")[0]
    assert m.count(3 * 1536 * 8960, 1536) == 165_150_720 + 6_144
    tuned, net, _, _ = made()
    numbers = 3 * 32 * 48
    assert sum(p.numel() for p in tuned.parameters()) == 2 * tuned.recipe[0].count(numbers, 32)
    assert list(experts_of(made("mote(experts=3)")[1])) == ["model.layers.1.mlp"]
    assert (m.experts, m.k, m.every, m.balance) == (4, 1, 2, 0.01)


def test_blocks_are_alike_where_each_has_experts():
    for every, want in ((1, 1), (2, None), (3, None)):
        assert burnish.parse(f"mote(every={every})")[0].repeats() == want


def test_its_gradient_is_no_difference_of_losses():
    """It passes roundings as if there were none, and the suite is told so."""
    torch.manual_seed(0)
    linear, x = Latent(torch.randn(3, 4, dtype=torch.float64), None), torch.randn(5, 4).double()
    (got,) = torch.autograd.grad(linear(x).square().sum(), linear.weight)
    want = torch.zeros_like(got)
    with torch.no_grad():
        for i in range(3):
            for j in range(4):
                ends = []
                for step in (1e-6, -2e-6):
                    linear.weight[i, j] += step
                    ends.append(float(linear(x).square().sum()))
                linear.weight[i, j] += 1e-6
                want[i, j] = (ends[0] - ends[1]) / 2e-6
    assert not torch.allclose(got, want, rtol=0.1)
    assert not find("mote").exact


@pytest.mark.parametrize("text, why", [
    ("mote(experts=0)", "an expert or more"), ("mote(k=5)", "k from 1"),
    ("mote(every=0)", "every of"), ("mote(balance=-1.0)", "balance"),
    ("mote(every=3)", "no MLP in such a block"),
    ("lora(rank=2, targets='down') + mote(every=1)", "added inside it")])
def test_what_cannot_act_is_refused(text, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.tune(tiny("llama")[0], text, head=False)


@pytest.mark.parametrize("model", ["bert", "mixtral", "mlp", "mamba"])
def test_models_without_such_mlps_are_refused(model):
    with pytest.raises(RecipeError, match="mote needs blocks whose MLP is a module of linears"):
        burnish.tune(tiny(model)[0], "mote", head=False)


def test_experts_are_copies_of_the_mlp_without_what_stands_around_it():
    """An adapter of the same MLP acts on the sum once; no expert has it a second time."""
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "gbt_sam(scan=2, mlp=True) + mote(experts=2, every=1)", head=False)
    inside = [n for n, _ in net.named_parameters() if ".experts." in n]
    assert inside and not any(".burnish." in n.partition(".experts.")[2] for n in inside)
    assert any(".gbt_sam." in n for n, _ in tuned.named_parameters())
