"""APT: rows behind an attention that tokens read through a ReLU, written out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import burnish
from burnish.blocks.state.memory import MemoryRead
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

#: (an attention, the module whose output it returns) of each of two blocks
ENDS = {
    "vit": [("vit.layers.{}.attention", "vit.layers.{}.attention.o_proj")],
    "timm_qkv": [("blocks.{}.attn", "blocks.{}.attn.proj")],
    "gpt2": [("transformer.h.{}.attn", "transformer.h.{}.attn.c_proj")],
    "bert": [("bert.encoder.layer.{}.attention", "bert.encoder.layer.{}.attention.output.dense")],
    "encoder": [("encoder.layers.{}.self_attn", "encoder.layers.{}.self_attn")],
    "t5": [(f"{s}.block.{{}}.layer.{n}.{a}", f"{s}.block.{{}}.layer.{n}.{a}.o")
           for s, n, a in (("encoder", 0, "SelfAttention"), ("decoder", 0, "SelfAttention"),
                           ("decoder", 1, "EncDecAttention"))],
}


def read(x, T, A, B):
    """e w: a = relu(x (T + T A B)^T), e = a T, w the largest of a, which has no gradient."""
    a = torch.relu(torch.einsum("...d,kd->...k", x, T + T @ A @ B))
    return torch.einsum("...k,kd->...d", a, T) * a.max(-1, keepdim=True).values.detach()


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("model", [*ENDS])
def test_the_equation_written_out(beside, model, stretch):
    """(o + e w) exp(c) behind every self- and cross-attention, x what it reads."""
    one = beside(model, f"apt(length=12, rank=2, stretch={stretch})", size=0.4)
    ends = [(a.format(i), o.format(i)) for a, o in ENDS[model] for i in range(2)]
    assert {p for p, _ in one.at("rows")} == {o for _, o in ends}
    names = dict(one.base.named_modules())
    for attn, end in ends:
        assert attn in names, [n for n in names if "attn" in n or "attention" in n.lower()]
        seen = {}
        T, A, B = (one.theta[end, n] for n in ("rows", "A", "B"))
        c = next((p for (path, n), p in one.theta.items() if path == end and n.endswith("c")), None)
        assert (c is not None) == stretch

        def look(m, args, kw, seen=seen):
            seen["x"] = args[0] if args else kw["hidden_states"]

        def answer(m, args, out, seen=seen, theta=(T, A, B), c=c):
            o = out[0] if isinstance(out, tuple) else out
            o = o + read(seen["x"], *theta)
            o = o if c is None else o * c.exp()
            return (o, *out[1:]) if isinstance(out, tuple) else o

        names[attn].register_forward_pre_hook(look, with_kwargs=True)
        names[end].register_forward_hook(answer)
    one.agree()


def test_rows_of_zeros_are_the_base():
    net, batch = tiny("vit", dtype=torch.float64)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "apt(length=3)", head=False)
    stir(tuned)
    for name, p in tuned.named_parameters():
        if name.endswith("rows"):
            p.data.zero_()
    net.eval()
    assert torch.equal(net(**batch).logits, base(**batch).logits)


def test_the_start():
    """T N(0, 0.02^2), A normal, B and c zero: near the base's answers, which it is not."""
    torch.manual_seed(0)
    part = MemoryRead(300, 200, 40)
    assert float(part.rows.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(part.A.detach().std()) == pytest.approx(1, rel=0.02) and not part.B.any()
    net, batch = tiny("vit")
    want = net.eval()(**batch).logits.detach()
    burnish.tune(net, "apt(length=10, stretch=True)", head=False)
    got = net.eval()(**batch).logits.detach()
    assert 0 < float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def test_the_maximum_passes_no_gradient():
    """Differences with the maximum as it stands are the gradient; with one that moves, not."""
    torch.manual_seed(0)
    part = MemoryRead(6, 4, 2).double()
    stir(part, size=0.7)
    x = torch.randn(5, 6, dtype=torch.float64)
    g = torch.randn(5, 6, dtype=torch.float64)

    def value(x, still):
        T = part.rows
        a = torch.relu(x @ (T + T @ part.A @ part.B).t())
        now = torch.relu(still @ (T + T @ part.A @ part.B).t())
        return float((g * (a @ T) * now.max(-1, keepdim=True).values).sum().detach())

    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad((part(leaf) * g).sum(), leaf)
    held, moving, h = torch.zeros_like(x), torch.zeros_like(x), 1e-6
    for i in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=torch.float64)
        e[i] = h
        e = e.view_as(x)
        held.view(-1)[i] = (value(x + e, x) - value(x - e, x)) / (2 * h)
        moving.view(-1)[i] = (value(x + e, x + e) - value(x - e, x - e)) / (2 * h)
    torch.testing.assert_close(got, held, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(got, moving, rtol=1e-2)


def test_work_is_linear_in_rows_and_in_tokens():
    def flops(tokens, length):
        part, x = MemoryRead(64, length, 4), torch.randn(1, tokens, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(x)
        return counter.get_total_flops() - 4 * length * 64 * 4        # M(T), once for all tokens

    assert flops(100, 20) == 2 * 2 * 100 * 20 * 64
    assert flops(200, 20) == 2 * flops(100, 20) == flops(100, 40)


def test_x_alone_is_kept(kept):
    """Neither scores nor keys: as many bytes with ten times the rows."""
    waits = []
    for length in (3, 30):
        net, batch = tiny("vit", batch=4)
        waits.append(kept(burnish.tune(net, f"apt(length={length})", head=False), batch))
    assert waits[0] == waits[1]


def test_scores_are_made_in_fp32():
    """A bf16 state has the answer of fp32 on the same numbers, rounded once."""
    torch.manual_seed(0)
    part = MemoryRead(64, 16, 2)
    stir(part, size=0.5)
    x = (30 * torch.randn(8, 64)).bfloat16()
    with torch.no_grad():
        assert torch.equal(part(x), part(x.float()).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(part(x.float()), part.run(x.float()))


def test_the_count_of_the_paper(published):
    """159,744 for a self- or a cross-attention of width 768."""
    m = parse("apt")[0]
    assert (m.length, m.rank, m.stretch, m.count(768)) == (200, 4, False, 159_744)
    net, _ = published("BertConfig", "BertLMHeadModel", is_decoder=True, add_cross_attention=True,
                       num_hidden_layers=2)
    made = list(m.branch(net))
    assert len(made) == 4
    assert {sum(p.numel() for p in b.module.parameters()) for b in made} == {159_744}
    assert parse("apt(stretch=True)")[0].count(768) == 159_745


def test_targets_choose_attentions():
    tuned = burnish.tune(tiny("vit")[0], "apt(length=2, targets='layers.1.*')", head=False)
    assert {n.partition(".burnish")[0] for n, _ in tuned.named_parameters()} == {
        "vit.layers.1.attention.o_proj"}


def test_one_row_and_stages_of_several_widths():
    """Each attention's rows are of its own width."""
    tuned = burnish.tune(tiny("swin")[0], "apt(length=1, rank=1)", head=False)
    rows = [p.shape for n, p in tuned.named_parameters() if n.endswith("rows")]
    assert rows == [(1, 16), (1, 16), (1, 32)]


def test_a_run_of_another_kind():
    """vmap sees plain operations."""
    part = MemoryRead(6, 4, 2).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    want = read(x, part.rows, part.A, part.B)
    torch.testing.assert_close(torch.func.vmap(part)(x), want)
    assert math.isfinite(float(want.detach().sum()))


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "apt(length=0)", "at least one row"), ("vit", "apt(rank=0)", "a rank of 1"),
    ("cnn", "apt", "no attention"), ("mamba", "apt", "no attention"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
