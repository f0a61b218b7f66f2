"""STABLE-RPS: the map written out entry by entry, balance, and training at full memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.hashed import Hashed, Lengths, Map, mixed
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.testing import follows
from burnish.testing.models import tiny

F64 = torch.float64
SHAPES = ((12, 9), (9, 7))
N = 12 * 9 + 9 * 7


def made(settings, shapes=SHAPES):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in shapes)).double()
    tuned = burnish.tune(model, f"stable_rps({settings})", head=False, targets="all")
    for m in model.modules():
        if hasattr(m, "burnish"):
            m.burnish.double()
    psi = model.burnish.default["stable_rps_shared"].psi
    return model, tuned, psi


def where(i, M, Z, seed, stable):
    """h(i) and g(i) in Python's numbers."""
    sign = 1.0 if mixed(i, seed) & 1 else -1.0
    if not stable:
        return Z * (mixed(i // Z, seed + 1) % (M // Z)) + i % Z, sign
    p, rest = divmod(i, M)
    c, r = divmod(rest, Z)
    return Z * ((c + mixed(p, seed + 1) % (M // Z)) % (M // Z)) + r, sign


def matrices(M, Z, seed, stable, shapes=SHAPES):
    """For each matrix P (out, in, M) with Delta = P psi, entries counted column by column."""
    i, out, loads = 0, [], torch.zeros(M, dtype=F64)
    for inp, o in shapes:
        P = torch.zeros(o, inp, M, dtype=F64)
        for col in range(inp):
            for row in range(o):
                at, sign = where(i, M, Z, seed, stable)
                P[row, col, at] = sign * inp**-0.5
                loads[at] += 1 / inp
                i += 1
        out.append(P)
    return [P / loads.sqrt() for P in out] if stable else out


CASES = [(24, 4, 0, True), (24, 4, 3, False), (171, 1, 1, True), (50, 5, 0, True),
         (30, 30, 2, True)]


@pytest.mark.parametrize("M, Z, seed, stable", CASES)
def test_outputs_and_gradients_are_those_of_the_map(M, Z, seed, stable):
    mode = "stable" if stable else "roast"
    model, tuned, psi = made(f"dimension={M}, piece={Z}, seed={seed}, mode={mode!r}")
    with torch.no_grad():
        psi.normal_()
    P = matrices(M, Z, seed, stable)
    layers = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model]

    def equation(x, psi):
        for (W, b), Pi in zip(layers, P, strict=True):
            x = F.linear(x, W + Pi @ psi, b)
        return x

    follows(tuned, equation, [psi], (4, 3, 12), rtol=1e-6, atol=1e-7)
    if stable:
        flat = torch.cat([Pi.flatten(0, 1) for Pi in P])
        torch.testing.assert_close(flat.t() @ flat, torch.eye(M, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [60, 61, 97, 600, 7])
def test_every_number_is_read_as_often_as_any_other_or_once_more(n):
    at = Map(60, 4, 5).of(torch.arange(n))
    loads = at.bincount(minlength=60)
    assert int(loads.max() - loads.min()) <= 1
    chunks = at[: n // 4 * 4].view(-1, 4)
    assert torch.equal(chunks, chunks[:, :1] + torch.arange(4)) and (chunks[:, 0] % 4 == 0).all()
    roast = Map(60, 4, 5, stable=False).of(torch.arange(6000)).bincount(minlength=60)
    assert int(roast.max() - roast.min()) > 20


def test_at_full_memory_the_map_is_a_bijection_and_training_is_the_dense_one():
    """Plain descent on psi and on the weights themselves, with lam and d in the way."""
    model, tuned, psi = made(f"dimension={N}, piece=1", SHAPES)
    assert Map(N, 1, 0).of(torch.arange(N)).sort().values.tolist() == list(range(N))
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Linear(i, o) for i, o in SHAPES)).double()
    x, y = torch.randn(8, 12, dtype=F64), torch.randn(8, 7, dtype=F64)
    mine = torch.optim.SGD([psi], lr=0.05)
    theirs = torch.optim.SGD([m.weight for m in dense], lr=0.05)
    for _ in range(20):
        for net, opt in ((model, mine), (dense, theirs)):
            opt.zero_grad()
            (net(x) - y).square().mean().backward()
            opt.step()
    for a, b in zip(tuned.merge(), dense, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=1e-7)


def test_a_step_moves_the_weights_as_far_as_its_projection():
    """At half the memory: Delta after one step of plain descent is -lr P P^T dW."""
    model, _, psi = made("dimension=90, piece=9")
    P = torch.cat([Pi.flatten(0, 1) for Pi in matrices(90, 9, 0, True)])
    x, y = torch.randn(8, 12, dtype=F64), torch.randn(8, 7, dtype=F64)
    (model(x) - y).square().mean().backward()
    dense = nn.Sequential(*(nn.Linear(i, o) for i, o in SHAPES)).double()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "burnish" not in k})
    (dense(x) - y).square().mean().backward()
    dW = torch.cat([m.weight.grad.flatten() for m in dense])
    torch.testing.assert_close(psi.grad, P.t() @ dW, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("M, Z", [(24, 4), (60, 12), (171, 3), (10, 10), (200, 8)])
def test_lengths_are_sums_over_what_reads_a_number(M, Z):
    spans = ((108, 1 / 12), (63, 1 / 9), (5, 0.7), (300, 1.5))
    how = Map(M, Z, 3)
    square = torch.cat([torch.full((n,), s, dtype=F64) for n, s in spans])
    want = torch.zeros(M, dtype=F64).index_add(0, how.of(torch.arange(476)), square)
    got = Lengths((M,), map=how, spans=spans).draw(0, "x")
    torch.testing.assert_close(got.double(), want.rsqrt(), rtol=1e-6, atol=0)


def test_files_hold_the_memory_alone(tmp_path):
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "stable_rps(dimension=256, piece=8)", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
        want = net(**batch).logits
    tuned.save(tmp_path / "a")
    held = load_file(next((tmp_path / "a").glob("*.safetensors")))
    assert [tuple(t.shape) for t in held.values()] == [(256,)]
    again = burnish.load(tiny("bert")[0], tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in tuned.parameters()) == 256


def test_the_hash_is_spread_and_the_same_on_every_machine():
    seen = mixed(torch.arange(1 << 14), 0)
    for seed in (7, 2**63 - 1):                              # any that a setting takes
        assert [mixed(k, seed) for k in range(3)] == mixed(torch.arange(3), seed).tolist()
    assert len(seen.unique()) == 1 << 14 and int(seen.max()) < 1 << 32
    signs = Map(8, 8, 0).signs(torch.arange(1 << 14), F64)
    assert abs(float(signs.mean())) < 0.03 and set(signs.tolist()) == {-1.0, 1.0}


def test_what_cannot_act_is_refused():
    (method,) = parse("stable_rps")
    assert (method.dimension, method.piece, method.mode, method.seed) == (65536, 32, "stable", 0)
    for bad in ("dimension=100", "piece=0", "dimension=0, piece=1"):
        with pytest.raises(RecipeError, match="no whole number of chunks"):
            parse(f"stable_rps({bad})")
    assert parse("stable_rps(dimension=1, piece=1)")         # one number for all
    with pytest.raises(RecipeError, match="seed=-1"):
        parse("stable_rps(seed=-1)")
    with pytest.raises(RecipeError, match="more than the 171 entries"):
        made("dimension=192")


def test_terms_know_what_stands_before_them():
    _, tuned, _ = made("dimension=24, piece=4")
    assert [t.first for _, t in tuned.terms(Hashed)] == [0, 108]
