"""VeRA against its equation in plain float64, and what it keeps and saves."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.term import Term
from burnish.testing.models import tiny


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def tuned_two(**settings):
    torch.manual_seed(0)
    net = Two().double()
    text = ", ".join(f"{k}={v}" for k, v in {"rank": 3, **settings}.items())
    tuned = burnish.tune(net, f"vera({text})", targets="up,down", seed=5)
    for m in net.modules():
        if hasattr(m, "burnish"):
            m.burnish.double()
    return net, tuned


def equation(net, x, A, B, d, b):
    """y = x W^T + bias + b * ((d * (x A[:, :in]^T)) B[:out]^T)"""
    def layer(lin, x, d, b):
        y = x @ lin.weight.detach().t() + lin.bias.detach()
        return y + b * ((d * (x @ A[:, : lin.in_features].t())) @ B[: lin.out_features].t())

    return layer(net.down, torch.tanh(layer(net.up, x, d[0], b[0])), d[1], b[1])


def test_outputs_and_gradients_are_the_equations():
    net, tuned = tuned_two()
    shared = net.burnish.default["vera_shared"]
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    terms = [net.up.burnish.default["vera"], net.down.burnish.default["vera"]]
    d = [t.d.detach().clone().requires_grad_() for t in terms]
    b = [t.b.detach().clone().requires_grad_() for t in terms]
    x2 = x.detach().clone().requires_grad_()
    y, want = net(x), equation(net, x2, shared.A, shared.B, d, b)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-8, atol=1e-12)
    for t, d_, b_ in zip(terms, d, b, strict=True):
        torch.testing.assert_close(t.d.grad, d_.grad, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(t.b.grad, b_.grad, rtol=1e-8, atol=1e-12)


def test_it_starts_as_the_base_with_d_at_its_start():
    net, tuned = tuned_two(d_start=0.5)
    x = torch.randn(7, 6, dtype=torch.float64)
    with tuned.disabled():
        want = net(x)
    assert torch.equal(net(x), want)
    term = net.up.burnish.default["vera"]
    assert torch.equal(term.d, torch.full((3,), 0.5, dtype=torch.float64)) and not term.b.any()


def test_the_bases_are_uniform_and_shared():
    net, _ = tuned_two(rank=200)
    shared = net.burnish.default["vera_shared"]
    assert shared.A.shape == (200, 10) and shared.B.shape == (10, 200)
    assert shared.A.abs().max() <= 10**-0.5 and shared.B.abs().max() <= 200**-0.5
    assert float(shared.A.var()) == pytest.approx(1 / 30, rel=0.1)
    assert not shared.A.requires_grad
    up, down = net.up.burnish.default["vera"], net.down.burnish.default["vera"]
    assert up.into.data_ptr() == down.into.data_ptr() == shared.A.data_ptr()


def test_the_count_on_real_shapes():
    cls = type(burnish.parse("vera")[0])
    from burnish.core.site import Place

    def of(rank, shapes, times):
        return times * sum(cls(rank=rank).count(Place("x", "weight", "linear", o, i))
                           for o, i in shapes)

    assert of(1024, [(768, 768)] * 2, 12) == 43_008                       # RoBERTa-base q,v
    llama = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert of(256, llama, 32) == 1_417_216


def test_files_hold_vectors_alone_and_a_load_draws_the_same_bases(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "vera(rank=64)", seed=3)
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in file} == {"d", "b"}
    torch.manual_seed(99)
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    bases = [m.burnish.default["vera_shared"] for m in (net, other)]
    assert torch.equal(bases[0].A, bases[1].A) and torch.equal(bases[0].B, bases[1].B)
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    assert not torch.equal(bases[0].A, burnish.tune(
        tiny("llama")[0], "vera(rank=64)", seed=4).model.burnish.default["vera_shared"].A)


def test_the_bases_of_a_folder_stand_in_our_files_too(bases_of_a_folder):
    """Of PEFT's folder they are its own: no seed makes them, so what we save has them."""
    assert len(bases_of_a_folder("vera(rank=8)")) == 2


def test_stored_bases_come_with_a_file():
    with pytest.raises(burnish.RecipeError, match="has the bases of a saved adapter"):
        burnish.tune(Two(), "vera(rank=3, bases='stored')", targets="up,down")


def test_backward_keeps_rank_numbers_per_token_not_x():
    torch.manual_seed(0)
    net = nn.Linear(64, 48)
    burnish.tune(net, "vera(rank=4)", targets="*")
    x, kept = torch.randn(100, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(x)
    sizes = {t.untyped_storage().data_ptr(): t.numel() for t in kept
             if not isinstance(t, nn.Parameter)}
    assert max(sizes.values(), default=0) <= 100 * 4
    (method,) = burnish.parse("vera")
    assert method.keeps_input is False, "and its file says so, for the plan of memory"


def test_merge_is_the_update_in_the_weight():
    net, tuned = tuned_two()
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(7, 6, dtype=torch.float64)
    want = net(x)
    assert torch.allclose(tuned.merge()(x), want, rtol=1e-12, atol=1e-12)


def test_defaults_are_the_published_ones():
    assert burnish.parse("vera")[0].settings() == {"targets": None, "rank": 256, "d_start": 0.1,
                                                   "dropout": 0.0, "bases": "drawn"}


def test_decay_leaves_the_vectors_alone():
    tuned = burnish.tune(Two(), "vera(rank=3)", targets="up,down", head=False)
    opt = tuned.optimizer(lr=0.1, weight_decay=0.5)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0]


def test_what_a_token_keeps_is_the_rank():
    from burnish.core.site import Place

    (method,) = burnish.parse("vera(rank=24)")
    assert method.per_token(Place("x", "weight", "linear", 64, 48)) == 24


@pytest.mark.parametrize("word", ["dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), f"vera(rank=3, {word}=0.25)",
                         targets="0", head=False)
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^vera: {word} is a probability"):
            burnish.parse(f"vera({word}={p})")
