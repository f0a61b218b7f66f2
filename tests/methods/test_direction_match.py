"""Direction matching: patterns written out as tokens by tokens, on a real copy of the base."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.methods.objective.direction_match import apart, products
from burnish.testing import stir, tiny

F64 = torch.float64


def distance(A, B):
    return (A / A.norm() - B / B.norm()).norm()


def pattern(Z, heads):
    """R of every sample and head: (batch, heads, tokens, tokens)."""
    Z = Z.unflatten(-1, (heads, -1)).transpose(1, 2)
    return Z @ Z.mT / Z.shape[-1] ** 0.5


def seen(net, batch):
    """(what q, k and v give, the states after each block, outputs), by hooks of the test's own."""
    found, states, hooks = [], [], []
    anatomy = Anatomy.of(net)
    for place in anatomy.places:
        if place.role in ("q", "k", "v", "qkv"):
            runs = anatomy.slices(place) or [place]
            block = anatomy.blocks[place.block]

            def look(m, a, out, runs=runs, block=block):
                for r in runs:
                    part = out if r.rows is None else out[..., r.rows[0] : r.rows[1]]
                    found.append((part, block.heads if r.role == "q" else block.kv_heads))

            hooks.append(net.get_submodule(place.path).register_forward_hook(look))
    for block in anatomy.blocks:
        hooks.append(net.get_submodule(block.path).register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)))
    out = net(**batch)
    for h in hooks:
        h.remove()
    return found, states, out


@pytest.mark.parametrize("model, padded", [("bert", True), ("gpt2", False), ("llama", True)])
@pytest.mark.parametrize("weight, states", [(0.7, 0.3), (0.7, 0.0), (0.0, 0.3)])
def test_gradients_are_those_of_the_sum(model, padded, weight, states):
    net, batch = tiny(model, dtype=F64)
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -2:] = 0
    base = copy.deepcopy(net).eval().requires_grad_(False)
    tuned = burnish.tune(net, f"lora(rank=2) + direction_match(weight={weight}, states={states})",
                         head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    stir(tuned, size=0.1)
    net.eval()
    mine, theirs = seen(net, batch), seen(base, batch)
    mask = batch["attention_mask"].double().unsqueeze(-1) if padded else 1.0
    whole = mine[2].loss
    assert len(mine[0]) == 3 * len(mine[1]) > 3
    for (Z, heads), (Y, _) in zip(mine[0], theirs[0], strict=True):
        whole = whole + weight * distance(pattern(Z * mask, heads), pattern(Y * mask, heads))
    for H, Y in zip(mine[1], theirs[1], strict=True):
        whole = whole + states * distance(H * mask, Y * mask)
    want = torch.autograd.grad(0.5 * whole, list(tuned.parameters()), allow_unused=True)
    tuned.optimizer(lr=0.0)
    (0.5 * net(**batch).loss).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9, msg=n)


def test_of_nothing_there_is_no_direction_and_no_gradient_that_is_none():
    from burnish.methods.objective.direction_match import _counting, _state, apart

    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    y = torch.ones(3, dtype=torch.float64)
    apart((z * y).sum(), z.square().sum(), y.square().sum()).backward()
    assert z.grad.isfinite().all()
    same = y.clone().requires_grad_()
    for scale in (1.0, 3.0, 1e5):
        off = apart(scale * (same * y).sum(), same.square().sum(), scale**2 * y.square().sum())
        assert float(off) == 2 * torch.finfo(torch.float64).eps ** 0.5
    assert _state((y, z)) is y and _state([y, z]) is y and _state(y) is y
    assert torch.equal(_counting(y, (y, z), "attention_mask"), y)


def test_without_a_weight_projections_are_not_looked_at():
    net, _ = tiny("bert")
    from burnish.core.anatomy import Anatomy

    anatomy = Anatomy.of(net)
    part = burnish.parse("direction_match(weight=0.0, states=1.0)")[0]
    assert part.taps(anatomy) == tuple(b.path for b in anatomy.blocks)


def test_the_size_of_a_pattern_does_not_count():
    Z, Y = torch.randn(2, 5, 3, 4, dtype=F64), torch.randn(2, 5, 3, 4, dtype=F64)

    def term(Z):
        return apart(products(Z, Y), products(Z, Z), products(Y, Y))

    assert float(term(Z)) == pytest.approx(float(term(7 * Z)), rel=1e-12)
    R, S = (torch.einsum("bthi,buhi->bhtu", A, A) for A in (Z, Y))
    assert float(term(Z)) == pytest.approx(float(distance(R, S)), rel=1e-12)


def gradients(recipe, prepare=lambda tuned: None):
    net, batch = tiny("bert")
    net.eval()
    tuned = burnish.tune(net, recipe, head=False)
    prepare(tuned)
    tuned.optimizer(lr=0.0)
    net(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in tuned.parameters()])


def test_at_the_base_it_is_nothing():
    torch.testing.assert_close(gradients("lora(rank=2) + direction_match"),
                               gradients("lora(rank=2)"), rtol=1e-4, atol=1e-6)


def test_another_adapter_may_be_the_teacher():
    def prepare(tuned):
        tuned.add("first", "lora(rank=2)")
        tuned.use("first")
        stir(tuned, size=0.3)
        tuned.use("default")

    plain = gradients("lora(rank=2)")
    pulled = gradients("lora(rank=2) + direction_match(adapter='first')", prepare)
    assert float((pulled - plain).norm()) > 0.1 * float(plain.norm())


def test_bibert_learns_from_its_base():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "full + bibert + direction_match + distill", head=False)
    tuned.optimizer(lr=2e-3)
    losses = [float(tuned.step(batch)) for _ in range(25)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("told", [True, False])
def test_a_decoder_has_a_mask_of_its_own(told):
    """Where the encoder's would fit it too."""
    net, _ = tiny("t5", dtype=F64)
    tuned = burnish.tune(net, "lora(rank=2) + direction_match(weight=0.7, states=0.3)", head=False)
    anatomy, (method,) = tuned.anatomy, [m for m in tuned.recipe if m.name == "direction_match"]
    masks = [torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0], [1] * 5])]
    batch = {"attention_mask": masks[0]} | ({"decoder_attention_mask": masks[1]} if told else {})
    places = method.projections(anatomy)
    widths = {p.path: p.out for p in places} | {b.path: 32 for b in anatomy.blocks}
    mine, theirs = ({path: torch.randn(2, 5, n, dtype=F64) for path, n in widths.items()}
                    for _ in range(2))
    terms = list(method.objective(tuned, SimpleNamespace(
        batch=batch, taps=mine, reference_taps=lambda adapter: theirs)))

    def counting(path):
        mask = masks[0] if path.startswith("encoder.") else masks[1] if told else torch.ones(2, 5)
        return [t[path] * mask.double().unsqueeze(-1) for t in (mine, theirs)]

    assert {p.path.partition(".")[0] for p in places} == {"encoder", "decoder"}
    for got, want in zip(terms, (
            0.7 * sum(distance(*(pattern(Z, anatomy.blocks[p.block].heads)
                                 for Z in counting(p.path))) for p in places),
            0.3 * sum(distance(*counting(b.path)) for b in anatomy.blocks)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_blocks_that_run_without_a_graph_are_refused():
    with pytest.raises(RecipeError, match="direction_match and checkpoint cannot be joined: .*"
                                          "inside the blocks"):
        parse("lora(rank=2) + direction_match + checkpoint")
    parse("lora(rank=2) + direction_match(weight=0.0) + checkpoint")


def test_what_cannot_act_is_refused():
    for bad in ("weight=-1.0", "states=-1.0", "weight=0.0, states=0.0"):
        with pytest.raises(RecipeError, match="direction_match: weight and states"):
            parse(f"direction_match({bad})")
    with pytest.raises(RecipeError, match="queries, keys and values"):
        burnish.tune(nn.Sequential(nn.Linear(4, 4)), "full + direction_match")
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "prompt_tuning(length=2) + direction_match", head=False)
    tuned.optimizer(lr=1e-3)
    with pytest.raises(ConfigError, match="compares states token by token"):
        tuned.step(batch)
    assert burnish.parse("direction_match")[0].settings() == {
        "targets": None, "weight": 1.0, "states": 1.0, "adapter": None}
