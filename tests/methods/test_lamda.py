"""LaMDA: a square core behind a frozen projection, before one that freezes column by column."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.observe import Spectrum
from burnish.blocks.weight.cored import Cored, Freezing
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, RankError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.formats.placed import put
from burnish.testing import follows, stir
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32}


def made(settings="rank=4, alpha=6", inp=12, out=9, **kw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"lamda({settings})", head=False, targets="0", **kw)
    (_, term), = tuned.terms(Cored)
    return model, tuned, term


def test_the_equation_with_and_without_frozen_columns():
    model, tuned, term = made()
    term.double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    A = term.A.clone()
    stir(tuned, size=1.0)
    follows(tuned, lambda x, C, B: F.linear(x, W + 1.5 * B @ C @ A, bias), [term.C, term.B],
            (5, 3, 12))
    for frozen in (1, 2):
        tuned.resize(term, keep={"B": torch.arange(1, term.B.shape[1])},
                     fresh={"F": term.B.detach()[:, :1]})
        assert (term.frozen, term.B.shape[1]) == (frozen, 4 - frozen)
        U = term.F.clone()
        follows(tuned, lambda x, C, B, U=U: F.linear(x, W + 1.5 * torch.cat([U, B], 1) @ C @ A,
                                                     bias), [term.C, term.B], (5, 12))
    tuned.resize(term, keep={"B": torch.arange(0)}, fresh={"F": term.B.detach()})
    U = term.F.clone()
    follows(tuned, lambda x, C, B: F.linear(x, W + 1.5 * U @ C @ A, bias) + B.sum(),
            [term.C, term.B], (5, 12))
    (tuned.model(torch.randn(3, 12).double()).sum()).backward()
    assert term.B.grad.shape == (9, 0)                     # and not None: it is reached


def test_a_start_from_the_spectrum_leaves_the_base():
    model, tuned, term = made("rank=3, alpha=6, init='svd'")
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    x = torch.randn(5, 12).double()
    assert torch.equal(model(x), F.linear(x, W, bias))
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    first = (U[:, :3] * S[:3]) @ Vt[:3]
    torch.testing.assert_close(2.0 * (term.B @ term.C @ term.A).double(), first, rtol=0, atol=1e-6)
    torch.testing.assert_close(term.A @ term.A.t(), torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(term.C.detach(), torch.diag(S[:3].float() / 2), rtol=1e-5,
                               atol=1e-6)
    term.double()
    A, B0, C0 = (getattr(term, n).clone() for n in ("A", "B0", "C0"))
    stir(tuned, size=1.0)
    follows(tuned, lambda x, C, B: F.linear(x, W + 2.0 * (B @ C - B0 @ C0) @ A, bias),
            [term.C, term.B], (5, 12))
    tuned.resize(term, keep={"B": torch.arange(0)}, fresh={"F": term.B.detach()})
    U = term.F.clone()
    follows(tuned, lambda x, C, B: F.linear(x, W + 2.0 * (U @ C - B0 @ C0) @ A, bias) + B.sum(),
            [term.C, term.B], (5, 12))
    A_, B_ = term.pair()
    torch.testing.assert_close(B_ @ A_, 2.0 * (U @ term.C - B0 @ C0) @ A)


def test_a_random_start_is_the_base_and_the_core_is_drawn_for_its_width():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 30))
    x = torch.randn(4, 400)
    want = model(x)
    tuned = burnish.tune(model, "lamda(rank=30)", head=False, targets="0")
    (_, term), = tuned.terms(Cored)
    assert torch.equal(model(x), want) and not term.B.any() and term.C.dtype == torch.float32
    for t, n in ((term.A, 400), (term.C, 30)):
        assert -n**-0.5 <= float(t.detach().min()) < -0.95 * n**-0.5
        assert 0.95 * n**-0.5 < float(t.detach().max()) <= n**-0.5
        assert float(t.detach().square().mean()) == pytest.approx(1 / (3 * n), rel=0.1)
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_counts_on_published_shapes():
    """7B: 224 x 32^2 = 229,376 in the end, and 43,515,904 more while all of B trains."""
    places = match(Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0]), "all-linear")
    places = [p for p in places if p.block is not None]
    (method,) = parse("lamda")
    assert len(places) == 224
    assert sum(method.count(p) for p in places) == 229_376 + 43_515_904
    assert sum(method.count(p, rank=32, frozen=32) for p in places) == 229_376
    assert method.count(places[0], rank=5, frozen=2) == 25 + 3 * 4096
    assert (method.per_token(places[0]), method.per_token(places[0], rank=5)) == (32, 5)
    assert method.settings() == {"targets": None, "rank": 32, "alpha": 16.0, "cooldown": 0.7,
                                 "init": "random", "rho": 1.0}


def test_a_token_keeps_rank_numbers_and_no_input():
    assert keeps_what_it_says("lamda", "vit") is None


STEPS = 20


def start(recipe="lamda(rank=4, cooldown=0.7)", total=STEPS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    tuned = burnish.tune(model, recipe, targets="all", head=False)
    tuned.total_steps = total
    tuned.optimizer(lr=2e-2, weight_decay=0.1)
    return tuned


def step(tuned, k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(6, 12, generator=g)
    return tuned.step((x, x[:, :8]), loss=lambda out, b: (out - b[1]).square().mean())


def test_columns_freeze_by_the_schedule_bit_for_bit_and_take_their_moments_along():
    tuned = start()
    terms = [t for _, t in tuned.terms(Cored)]
    seen = []
    for k in range(STEPS):
        were = [torch.cat([t.F, t.B.detach()], 1)[:, : t.frozen].clone() for t in terms]
        step(tuned, k)
        for t, was in zip(terms, were, strict=True):
            assert torch.equal(t.F[:, : was.shape[1]], was)
            moments = [v for v in tuned.current_optimizer.state[t.B].values()
                       if isinstance(v, torch.Tensor) and v.dim()]
            assert moments and all(v.numel() == t.B.numel() for v in moments)
        seen.append(terms[0].frozen)
        assert {t.frozen for t in terms} == {seen[-1]}
    # t_i = 6 of 20 updates: floor(4 t / 6), all at the sixth
    assert seen == [0, 1, 2, 2, 3, 4] + [4] * 14
    assert all(t.F.any() for t in terms)
    merged = tuned.model(torch.ones(2, 12)).detach()
    torch.testing.assert_close(tuned.merge()(torch.ones(2, 12)), merged)


@pytest.mark.parametrize("cooldown, total, seen", [(0, 4, [1, 2, 3, 4]), (0.99, 4, [4] * 4),
                                                   (0.5, None, [0] * 4)])
def test_the_length_of_the_freeze(cooldown, total, seen):
    tuned = start(f"lamda(rank=4, cooldown={cooldown})", total)
    got = []
    for k in range(4):
        step(tuned, k)
        got.append(next(tuned.terms(Cored))[1].frozen)
    assert got == seen


@pytest.mark.parametrize("at", [3, 10])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(at):
    whole = start()
    for k in range(at):
        step(whole, k)
    saved = copy.deepcopy((whole.timeline.state(), whole.tensors(),
                           whole.current_optimizer.state_dict()))
    for k in range(at, STEPS):
        step(whole, k)
    second = start(total=None)
    put(second, saved[1], "memory")
    second.current_optimizer.load_state_dict(saved[2])
    second.timeline.load(saved[0])
    for k in range(at, STEPS):
        step(second, k)
    assert whole.tensors().keys() == second.tensors().keys()
    for (n, a), b in zip(whole.tensors().items(), second.tensors().values(), strict=True):
        assert torch.equal(a, b), n


def test_a_file_holds_what_is_frozen_and_comes_back_with_it(tmp_path):
    for at, frozen in ((2, 1), (8, 4)):
        net, batch = tiny("llama")
        tuned = burnish.tune(net, "lamda(rank=4, init='svd')", head=False)
        tuned.total_steps = STEPS
        tuned.optimizer(lr=1e-2)
        for _ in range(at):
            tuned.step(batch)
        tuned.save(tmp_path / str(at))
        other, _ = tiny("llama")
        again = burnish.load(other, tmp_path / str(at))
        assert {t.frozen for _, t in again.terms(Cored)} == {frozen}
        net.eval(), other.eval()
        assert torch.equal(net(**batch).logits, other(**batch).logits)
        again.total_steps = STEPS
        again.optimizer(lr=1e-2)
        again.step(batch)                                  # every tensor is reached


def test_measuring_between_two_updates_puts_frozen_columns_back():
    ends = []
    for measured in (False, True):
        net, batch = tiny("llama")
        tuned = burnish.tune(net, "lamda(rank=4, cooldown=0)", head=False)
        tuned.total_steps = 4
        tuned.optimizer(lr=1e-2)
        tuned.step(batch)
        if measured:
            burnish.measure(tuned, batch)
            assert {t.frozen for _, t in tuned.terms(Cored)} == {1}
        tuned.step(batch)
        ends.append(tuned.tensors())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


# -- LaMDA++ --------------------------------------------------------------------------------------
class Stack(nn.Module):
    """Linears of given singular values."""

    def __init__(self, *spectra, n=24):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(n, n) for _ in spectra)
        for layer, S in zip(self.layers, spectra, strict=True):
            U, V = (torch.linalg.qr(torch.randn(n, n)).Q for _ in range(2))
            layer.weight.data = U * S @ V.t()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def ranks(model, settings, targets="all"):
    tuned = burnish.tune(model, f"lamda({settings})", targets=targets, head=False)
    return [len(t.C) for _, t in tuned.terms(Cored)], tuned


def test_a_flatter_spectrum_gets_more_rank():
    steep, flat = 0.5 ** torch.arange(24.0), torch.ones(24)
    middle = torch.cat([torch.ones(8), 0.5 * torch.ones(16)])
    # beyond 4 singular values: 1/3 of the steep's 4^-4, 20/24 of the flat's, 8/12 of the middle's
    steep_left, flat_left, middle_left = 4.0**-4, 20 / 24, (4 + 4) / 12
    model = Stack(steep, flat, middle)
    got, tuned = ranks(model, "rank=4, rho=2")
    share = 6 * (flat_left - steep_left) / (flat_left + middle_left - 2 * steep_left)
    assert share == pytest.approx(3.3, abs=0.05)
    assert got == [2, 5, 5] and sum(got) == 12
    assert {t.scale for _, t in tuned.terms(Cored)} == {16 / 4}
    assert ranks(Stack(steep, flat, flat, steep), "rank=4, rho=2")[0] == [2, 6, 6, 2]
    assert ranks(Stack(steep, flat, steep, steep), "rank=4, rho=2")[0] == [3, 8, 3, 2]
    assert ranks(Stack(steep, flat, steep), "rank=4, rho=1.5")[0] == [3, 6, 3]
    assert ranks(Stack(flat, flat), "rank=4, rho=3")[0] == [4, 4]
    # no rank above the matrix
    assert ranks(Stack(steep, flat), "rank=20, rho=9")[0] == [16, 24]
    assert ranks(Stack(steep, flat, middle), "rank=4")[0] == [4, 4, 4]


def test_what_rounding_tells_apart_is_not_told():
    (method,) = parse("lamda(rank=8, rho=2)")
    for apart, want in ((1.6e-4, [6, 10]), (0.4e-4, [8, 8])):
        seen = {Place(str(i), "weight", "linear", 40, 40): Spectrum(8) for i in range(2)}
        for i, statistic in enumerate(seen.values()):
            statistic.value = torch.tensor(0.5 + i * apart, dtype=torch.float64)
        assert [d["rank"] for d in method.settle(seen).values()] == want


def test_what_is_too_small_for_the_rank_is_left_alone():
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "lamda(rank=20, rho=2)", head=False)
    assert any("too small for its rank" in n for n in tuned.adapters["default"].notes)
    assert {t.B.shape[0] for _, t in tuned.terms(Cored)} == {32, 48}


def test_only_matrices_of_one_role_and_shape_compete():
    model, _ = tiny("llama")
    tuned = burnish.tune(model, "lamda(rank=4, rho=2)", head=False)
    by_role = {}
    for name, t in tuned.terms(Cored):
        by_role.setdefault((name.split(".")[-2], t.inp), []).append(len(t.C))
    assert len(by_role) > 3 and all(sum(r) == 4 * len(r) for r in by_role.values())


def test_ranks_are_in_the_file_and_a_load_decides_nothing(tmp_path):
    def changed():
        net = tiny("llama")[0]
        with torch.no_grad():
            net.model.layers[0].mlp.up_proj.weight[1:] *= 0.01
        return net

    tuned = burnish.tune(changed(), "lamda(rank=4, rho=2)", head=False)
    want = {n: len(t.C) for n, t in tuned.terms(Cored)}
    assert len(set(want.values())) > 1
    tuned.save(tmp_path / "a")
    again = burnish.load(changed(), tmp_path / "a")
    assert {n: len(t.C) for n, t in again.terms(Cored)} == want
    assert sum(p.numel() for p in again.parameters()) == sum(
        parse("lamda(rank=4)")[0].count(p, rank=want[p.name])
        for p in match(Anatomy.of(tiny("llama")[0]), None))


def test_refusals():
    for settings in ("cooldown=1", "cooldown=-0.1", "rho=0.9", "rho=inf", "init='svd', alpha=0",
                     "init='svd', alpha=inf", "init='svd', alpha=-1"):
        with pytest.raises(burnish.RecipeError, match="^lamda"):
            parse(f"lamda({settings.replace('inf', '1e999')})")
    assert parse("lamda(cooldown=0, rho=1, alpha=-1)")
    assert parse("lamda(init='svd', alpha=0.5)")
    for settings in ("rank=10", "rank=0", "rank=10, rho=2"):
        with pytest.raises(RankError, match="does not fit"):
            made(settings)
    with pytest.raises(burnish.RecipeError, match="adam8bit"):
        parse("lamda + adam8bit")
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CheckError):
        burnish.tune(model, "lamda(rank=2, init='svd')", head=False, targets="0")


def test_the_schedule_alone():
    """With no recipe: terms by name, and how they are resized."""
    place = Place("l", "weight", "linear", 5, 7)
    term = Cored(place, 3, 1.0, 1, False)
    assert (term.frozen, term.B.shape, term.settled()) == (1, (5, 2), {"rank": 3, "frozen": 1})
    asked = []
    handler = Freezing({"l": term}, lambda t, keep, fresh: asked.append((keep, fresh)), 0.5)
    handler.after_update(0)
    handler.start(6)
    handler.after_update(0)
    assert not asked                                       # one of three is frozen already
    handler.after_update(1)
    (keep, fresh), = asked
    assert keep["B"].tolist() == [1] and torch.equal(fresh["F"], term.B[:, :1])
    assert handler.state_dict() == {"last": 3}
