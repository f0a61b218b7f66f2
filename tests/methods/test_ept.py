"""EPT: what makes the prompt, written out in float64; DePT where nothing does."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import burnish
from burnish.blocks.state.generators import Fused
from burnish.blocks.state.prompts import Prepended
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

SMALL = "length=3, rank=2, edited=5"


def softmax(x):
    e = (x - x.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


def prompt(theta, d):
    """P*, letter by letter; what is absent is left out."""
    P, T = theta["rows"], theta["edit.A"] @ theta["edit.B"]
    if "maker.q" in theta:
        P = P + softmax((P @ theta["maker.q"]) @ (T @ theta["maker.k"]).t() / math.sqrt(d)) @ T
    if "maker.U" in theta:
        g = softmax(theta["maker.G"] @ P.mean(0))
        assert float(g.sum().detach()) == pytest.approx(1)
        P = sum(g[j] * (P + P @ theta["maker.U"][j] @ theta["maker.V"][j]) for j in range(len(g)))
    return P, T


@pytest.mark.parametrize("more", ["", ", fusion=0", ", spaces=1", ", spaces=3, space_rank=2",
                                  ", fusion=0, spaces=2"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_equation_written_out(beside, model, more):
    one = beside(model, f"ept({SMALL}{more})")
    theta = {name: p for (_, name), p in one.theta.items()}
    assert ("maker.q" in theta, "maker.U" in theta) == ("fusion=0" not in more,
                                                        "spaces=1" not in more)
    P, T = prompt(theta, 32)
    ids = one.batch["input_ids"]
    one.batch = {"input_ids": ids}
    x = one.base.get_input_embeddings()(ids)
    x = torch.cat([P.expand(len(ids), -1, -1), x[:, :5] + T, x[:, 5:]], 1)
    one.agree(one.base(inputs_embeds=x).logits[:, 3:])


def test_at_the_start_it_is_a_prompt():
    made = []
    for recipe in ("ept(length=4, ids=[7, 9])", "prompt_tuning(length=4, ids=[7, 9])"):
        net, batch = tiny("llama")
        burnish.tune(net, recipe)
        made.append(net.eval()(**batch).logits)
    torch.testing.assert_close(*made)


def test_one_space_and_no_fusion_are_dept():
    """The same tensors, outputs and gradients."""
    ends = []
    for name, more in (("ept", ", fusion=0, spaces=1"), ("dept", "")):
        net, batch = tiny("llama", dtype=torch.float64)
        tuned = burnish.tune(net, f"{name}({SMALL}, ids=[3, 4]{more})", head=False)
        stir(tuned, size=0.3)
        loss = tuned.loss(batch)
        ends.append((loss.detach(), *torch.autograd.grad(loss, list(tuned.parameters()))))
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_what_a_file_holds_is_the_prompt_itself(tmp_path):
    """P*, A and B: dept's tensors, and the same answers; a checkpoint holds what makes them."""
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"ept({SMALL})", head=False)
    stir(tuned, size=0.5)
    net.eval()
    tuned.save(tmp_path / "file")
    tuned.save(tmp_path / "whole", whole=True)
    again = burnish.load(copy.deepcopy(base), tmp_path / "file")
    assert {n.rpartition("ept.")[2] for n, _ in again.named_parameters()} == {
        "rows", "edit.A", "edit.B"}
    assert "fusion=0" in str(again.recipe) and "spaces=1" in str(again.recipe)
    want = net(**batch).logits
    torch.testing.assert_close(again.model.eval()(**batch).logits, want, rtol=1e-5, atol=1e-6)
    (bank,) = (m for m in net.modules() if isinstance(m, Prepended))
    theta = {n: p.detach() for n, p in bank.named_parameters()}
    (copied,) = (m for m in again.model.modules() if isinstance(m, Prepended))
    torch.testing.assert_close(copied.rows.detach(), prompt(theta, 32)[0])
    whole = burnish.load(copy.deepcopy(base), tmp_path / "whole")
    assert len(list(whole.named_parameters())) == 8
    assert torch.equal(whole.model.eval()(**batch).logits, want)


def test_a_file_of_maps_of_a_higher_rank_needs_none_of_them(tmp_path):
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    tuned = stir(burnish.tune(net, f"ept({SMALL}, space_rank=2)", head=False), size=0.5)
    want = net.eval()(**batch).logits
    tuned.save(tmp_path)
    again = burnish.load(base, tmp_path)
    torch.testing.assert_close(again.model.eval()(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_the_gate_adds_up_to_one():
    maker = Fused(8, 2, 5, 1)
    stir(maker, size=2.0)
    g = maker.gate(torch.randn(3, 8))
    assert g.shape == (5,) and float(g.detach().sum()) == pytest.approx(1) and g.min() > 0
    assert Fused(8, 2, 4, 1).gate(torch.randn(3, 8)).tolist() == [0.25] * 4


def test_counts_and_defaults():
    """76,800 at d = 768 as they stand: a prompt of 100 rows."""
    m = parse("ept")[0]
    assert (m.length, m.rank, m.edited, m.fusion, m.spaces, m.space_rank) == (40, 30, 256, 4, 4, 1)
    assert m.count(768) == 76_800
    for more in ("", ", fusion=0", ", spaces=1", ", spaces=2", ", fusion=0, spaces=2",
                 ", spaces=3, space_rank=2"):
        recipe = f"ept({SMALL}{more})"
        tuned = burnish.tune(tiny("gpt2")[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32)
    rates = {p.burnish_lr for n, p in tuned.named_parameters() if not n.endswith("rows")}
    assert rates == {1e-3}


@pytest.mark.parametrize("recipe, why", [
    ("ept(fusion=-1)", "a width of 0"), ("ept(spaces=0)", "a space"),
    ("ept(spaces=1, space_rank=3)", "spaces=1 has none"), ("ept(rank=0)", "rank 1"),
    ("ept(space_rank=0)", "rank of 1"),
    ("ept(targets='q')", "ept takes no targets"),
])
def test_what_it_refuses(recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny("llama")[0], recipe)
