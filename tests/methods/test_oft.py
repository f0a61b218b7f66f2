"""OFT: the input space is turned; lengths and angles stay."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.rotation import Rotation
from burnish.blocks.weight.term import Term
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.testing import follows
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny


def skew(upper, b):
    """Q from the entries above its diagonal, row by row, written out entry by entry."""
    blocks = []
    for row in upper:
        Q = [[torch.zeros((), dtype=row.dtype)] * b for _ in range(b)]
        n = 0
        for i in range(b):
            for j in range(i + 1, b):
                Q[i][j], Q[j][i] = row[n], -row[n]
                n += 1
        blocks.append(torch.stack([torch.stack(r) for r in Q]))
    return blocks


def rotation(upper, b, inp):
    """R = blockdiag((I + Q_j)(I - Q_j)^-1): (in, in)."""
    I = torch.eye(b, dtype=upper.dtype)  # noqa: E741
    made = [(I + Q) @ torch.linalg.inv(I - Q) for Q in skew(upper, b)]
    return torch.block_diag(*made * (inp // b if len(made) == 1 else 1))


def stirred(model, recipe, size=0.3):
    tuned = burnish.tune(model, recipe, head=False, targets="0")
    (_, term), = tuned.terms(Rotation)
    term.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_(std=size)
    return tuned, term


@pytest.mark.parametrize("recipe", ["oft(block=4)", "oft(block=8)", "oft(block=4, share=True)"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_outputs_and_gradients_are_those_of_the_equation(recipe, kind):
    """y = x (W R^T)^T + b, everything in float64, R written out."""
    model = nn.Sequential(nn.Linear(16, 12)).double()
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D
        model = nn.Sequential(Conv1D(12, 16)).double()
    W = (model[0].weight if kind == "linear" else model[0].weight.t()).detach().clone()
    tuned, term = stirred(model, recipe)
    follows(tuned, lambda x, upper: F.linear(
        x, W @ rotation(upper, term.block, 16).t(), model[0].bias), [term.upper], (5, 3, 16))


def test_a_convolution_is_turned_over_its_whole_kernel():
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double()
    W, bias = conv[0].weight.detach().clone(), conv[0].bias.detach()
    tuned, term = stirred(conv, "oft(block=4)")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    turned = (W.flatten(1) @ rotation(term.upper, 4, 36).t()).view_as(W)
    want, got = F.conv2d(x, turned, bias, padding=1), conv(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, term.upper, g)[0] for y in (got, want)),
                               rtol=1e-8, atol=1e-10)


def test_a_trained_weight_and_a_delta_under_the_rotation():
    """W' = (W + s B A) R^T; W trains too: all gradients are those of the dense form."""
    from burnish.blocks.weight.factor import Chain

    model = nn.Sequential(nn.Linear(16, 12)).double()
    tuned, term = stirred(model, "full + oft(block=4) + lora(rank=2)")
    chain = next(t for _, t in tuned.terms(Chain))
    chain.double()
    W = model[0].weight
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, W, term.upper, chain.A, chain.B]
    V = W + chain.scale * chain.B @ chain.A
    want = F.linear(x, V @ rotation(term.upper, 4, 16).t(), model[0].bias)
    got = model(x)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_lengths_and_angles_of_rows_stay():
    """R^T R = I, so W' W'^T = W W^T."""
    model = nn.Sequential(nn.Linear(64, 24, bias=False)).double()
    W = model[0].weight.detach().clone()
    tuned, term = stirred(model, "oft(block=32)", size=1.0)
    R = torch.eye(64, dtype=torch.float64) + torch.block_diag(*term.move().detach())
    torch.testing.assert_close(R.t() @ R, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-10)
    turned = tuned.merge()[0].weight
    assert (turned - W).abs().max() > 0.1
    torch.testing.assert_close(turned @ turned.t(), W @ W.t(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_start_is_the_base_to_the_last_bit(dtype):
    model = nn.Sequential(nn.Linear(32, 24)).to(dtype)
    x = torch.randn(6, 32).to(dtype)
    want = model(x)
    burnish.tune(model, "oft", head=False, targets="0")
    assert torch.equal(model(x), want)


def test_merge_is_exact():
    net, batch = tiny("vit")
    net.eval()
    tuned = burnish.tune(net, "oft(block=8)")
    with torch.no_grad():
        for _, t in tuned.terms(Rotation):
            t.upper.normal_(std=0.2)
    want = net(**batch).logits
    torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-5, atol=1e-5)


def test_counts():
    (method,) = parse("oft(block=32)")
    place = Place("a", "weight", "linear", 4096, 4096)
    assert method.count(place) == 63_488
    (shared,) = parse("oft(block=32, share=True)")
    assert shared.count(place) == 32 * 31 // 2
    for m in (method, shared):
        tuned = burnish.tune(nn.Sequential(nn.Linear(64, 8)), m, head=False, targets="0")
        assert sum(p.numel() for p in tuned.parameters()) == \
            m.count(Place("0", "weight", "linear", 8, 64))


def test_the_bound_holds_after_every_update():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "oft(block=4, bound=0.01)")
    tuned.optimizer(lr=1e-1)
    for _ in range(2):
        tuned.step(batch)
        for _, t in tuned.terms(Rotation):
            assert torch.linalg.matrix_norm(t.skew()).max() <= 0.01 * (1 + 1e-5)


def test_x_is_all_that_waits_for_backward():
    """Neither the turned x nor anything of the weight's size."""
    model = nn.Sequential(nn.Linear(32, 48))
    tuned = burnish.tune(model, "oft(block=8)", head=False, targets="0")
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, tape = [], tuned.state.tape
    tape.lean, tape.pack, tape.unpack = False, lambda t: kept.append(t) or t, lambda t: t
    x = torch.randn(10, 32, requires_grad=True)
    y = model(x)
    kept = [t for t in kept if t.untyped_storage().data_ptr() not in held]
    assert [tuple(t.shape) for t in kept] == [(10, 32)]
    assert kept[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    y.sum().backward()
    assert next(tuned.parameters()).grad.abs().sum() > 0


def test_what_changed_since_the_forward_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    tuned = burnish.tune(model, "oft(block=4)", head=False, targets="0")
    y = model(torch.randn(3, 8)).sum()
    with torch.no_grad():
        next(tuned.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        y.backward()


@pytest.mark.parametrize("terms", [0, 5])
def test_it_is_what_peft_computes(terms):
    """peft's exact rotation has the other sign of Q, its series the same: with the same entries
    (negated for the exact one) the outputs agree."""
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12))
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["0"], use_cayley_neumann=bool(terms),
        num_cayley_neumann_terms=terms or 5))
    tuned = burnish.tune(ours, f"oft(block=4, terms={terms})", head=False, targets="0")
    (_, term), = tuned.terms(Rotation)
    theirs_upper = next(p for n, p in theirs.named_parameters() if "oft_R" in n)
    values = torch.randn(4, 6) * 0.1
    with torch.no_grad():
        theirs_upper.copy_(values)
        term.upper.copy_(values if terms else -values)
    x = torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe, words", [
    ("oft(block=5)", "does not divide the 16 inputs"), ("oft(terms=1)", "at least 2"),
    ("oft(bound=0.0)", "largest norm"), ("oft(block=4) + dora(rank=2)", "function of W")])
def test_what_cannot_be_is_refused(recipe, words):
    with pytest.raises(RecipeError, match=words):
        burnish.tune(nn.Sequential(nn.Linear(16, 12)), recipe, head=False, targets="0")


def test_defaults_are_the_published_ones():
    assert burnish.parse("oft")[0].settings() == {
        "targets": None, "block": 32, "share": False, "bound": None, "terms": 0,
        "block_dropout": 0.0}


def test_decay_leaves_it_alone():
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 24)), "oft(block=4)", targets="0",
                         head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


@pytest.mark.parametrize("settings", ["block=2", "terms=0", "terms=2", "bound=1e-9"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"oft({settings})")


@pytest.mark.parametrize("settings", ["block=1", "terms=1", "terms=-1", "bound=0.0", "bound=-1.0"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^oft"):
        burnish.parse(f"oft({settings})")


def test_a_block_comes_back_to_its_ball_and_those_inside_stay():
    """Q <- Q min(1, bound / ||Q||_F), block by block."""
    tuned, term = stirred(nn.Sequential(nn.Linear(16, 12)).double(), "oft(block=4, bound=0.5)")
    tuned.optimizer(lr=1e-3)
    with torch.no_grad():
        term.upper[0].mul_(0.01)
    before = [q.detach().clone() for q in term.skew()]
    norms = [float(q.norm()) for q in before]
    assert norms[0] < 0.5 < min(norms[1:])
    handler = next(h for n, h in tuned.timeline.handlers if n == "oft")
    handler.after_update(0)
    for q, old, norm in zip(term.skew(), before, norms, strict=True):
        torch.testing.assert_close(q, old * min(1.0, 0.5 / norm), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inp, would", [(16, "2, 4, 8, 16 would"), (7, "none would"),
                                        (192, "2, 4, 8, 16, 32, 64 would")])
def test_what_would_divide_is_named(inp, would):
    with pytest.raises(RecipeError, match=f"inputs of 0.weight; {would}"):
        burnish.tune(nn.Sequential(nn.Linear(inp, 12)), "oft(block=5)", head=False, targets="0")


@pytest.mark.parametrize("terms, powers", [(2, [1]), (3, [2, 1]), (4, [2, 2, 1])])
def test_the_series_is_cut_after_its_terms(terms, powers):
    """R - I = 2 Q + 2 Q^2 + ... + Q^(terms - 1), the last once."""
    tuned, term = stirred(nn.Sequential(nn.Linear(8, 6)).double(), f"oft(block=4, terms={terms})")
    for Q, M in zip(skew(term.upper.detach(), 4), term.move().detach(), strict=True):
        want = sum(c * torch.linalg.matrix_power(Q, n + 1) for n, c in enumerate(powers))
        torch.testing.assert_close(M, want, rtol=1e-12, atol=1e-14)


def test_a_rotation_is_of_its_own_dtype_whatever_torchs_default():
    _, term = stirred(nn.Sequential(nn.Linear(8, 6)), "oft(block=4)")
    want = term.move().detach()
    term.float()
    torch.set_default_dtype(torch.float64)
    assert term.move().dtype == torch.float32
    torch.testing.assert_close(term.move().detach().double(), want, rtol=1e-5, atol=1e-6)


def test_targets_name_the_resource():
    with pytest.raises(RecipeError, match="the function of W on q,v"):
        parse("oft(targets='q,v') + oft(block=4, targets='q,v')")
    assert len(parse("oft(targets='q') + oft(block=4, targets='v')")) == 2


def test_it_keeps_what_it_says():
    assert keeps_what_it_says("oft", "vit") is None


@pytest.mark.parametrize("word", ["block_dropout"])
def test_what_it_drops_is_a_probability_and_reaches_the_term(word):
    """What a probability does is held in tests/blocks/test_dropped.py."""
    tuned = burnish.tune(nn.Sequential(nn.Linear(16, 16)), f"oft(block=4, {word}=0.25)",
                         targets="0", head=False)
    term = next(tuned.terms(Term))[1]
    assert getattr(term, word) == 0.25
    for p in (-0.1, 1.0):
        with pytest.raises(burnish.RecipeError, match=f"^oft: {word} is a probability"):
            burnish.parse(f"oft({word}={p})")


@pytest.mark.parametrize("p, still", [(0.5, {2}), (0.25, {1}), (0.4, {1, 2}), (0.9, {3, 4})])
def test_a_share_of_the_blocks_stays_where_it_is(p, still):
    """The same blocks for all tokens and in backward; how many, is p of them on average."""
    model = nn.Sequential(nn.Linear(16, 12)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    _, term = stirred(model, f"oft(block=4, block_dropout={p})")
    whole, seen, total = term.move().detach(), set(), 0
    for seed in range(60):
        torch.manual_seed(seed)
        turns = term.draw().flatten()
        torch.manual_seed(seed)
        x = torch.randn(5, 16, dtype=torch.float64)
        torch.manual_seed(seed)
        got = model(x)
        U = term.upper.detach().clone().requires_grad_()
        want = F.linear(x, W @ rotation(U * turns[:, None], 4, 16).t(), bias)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        g = torch.randn_like(want)
        a, = torch.autograd.grad(got, term.upper, g)
        b, = torch.autograd.grad(want, U, g)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert set(turns.tolist()) <= {0.0, 1.0}
        seen.add(int(4 - turns.sum()))
        total += int(4 - turns.sum())
    assert seen == still and abs(total / 240 - p) < 0.06
    model.eval()
    assert term.draw() is None and torch.equal(term.own(), whole)


def test_a_block_that_is_shared_always_turns():
    model = nn.Sequential(nn.Linear(16, 12))
    _, term = stirred(model, "oft(block=4, share=True, block_dropout=0.5)")
    assert term.draw() is None


def test_block_dropout_has_no_form_on_a_weight():
    with pytest.raises(RecipeError, match="dropout cannot act on .* acts on the weight"):
        burnish.tune(tiny("vit")[0], "oft(block=4, block_dropout=0.5, targets='conv')", head=False)
