"""TIES, DARE and PCB against flat, dense computations of their equations, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.blocks.choose.quantile import radix
from burnish.blocks.weight import taskvector
from burnish.blocks.weight.taskvector import TaskVector, merged, planned
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.formats.safe import Tensors, save_file
from burnish.methods.lifecycle.dare import Dare
from burnish.methods.lifecycle.pcb import Pcb, signed
from burnish.methods.lifecycle.soup import Soup
from burnish.methods.lifecycle.task_arithmetic import TaskArithmetic
from burnish.methods.lifecycle.ties import Ties

SHAPES = {"embed.weight": (40, 30), "a.weight": (31, 40), "a.bias": (31,), "b.weight": (9, 31)}


def start(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
            for n, s in SHAPES.items()}


def tuned(base, seed, size=0.01):
    g = torch.Generator().manual_seed(seed)
    return {n: t + size * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)
            for n, t in base.items()}


def flat(some, base):
    return torch.cat([(some[n].double() - base[n].double()).flatten() for n in base])


@pytest.fixture
def models():
    base = start()
    return base, [tuned(base, k) for k in (1, 2, 3)]


@pytest.fixture(params=[1 << 20, 57], ids=["whole", "pieces"])
def pieces(request, monkeypatch):
    """Task vectors in pieces of this many entries."""
    for f in (taskvector.together, taskvector.pieces_of, taskvector.combine,
              taskvector.Task.pieces):
        monkeypatch.setattr(f, "__defaults__", (request.param,))
    return request.param


def of(base, models, *parts):
    return flat(dict(merged(base, models, parts)), base)


# -- TIES -----------------------------------------------------------------------------------------
def ties(taus, keep, scale=1.0):
    k = math.ceil(keep * taus.shape[1])
    kept = torch.stack([torch.where(t.abs() >= t.abs().sort(descending=True).values[k - 1], t, 0.0)
                        for t in taus])
    out = torch.zeros(taus.shape[1], dtype=taus.dtype)
    for i, column in enumerate(kept.T.tolist()):
        sign = math.copysign(1, sum(column)) if sum(column) else 0
        agree = [x for x in column if x and math.copysign(1, x) == sign]
        out[i] = sum(agree) / len(agree) if agree else 0.0
    return scale * out


@pytest.mark.parametrize("keep, scale", [(0.2, 1.0), (0.05, 0.7), (1.0, 1.0)])
def test_ties_is_its_equation(models, pieces, keep, scale):
    base, some = models
    want = ties(torch.stack([flat(m, base) for m in some]), keep, scale)
    torch.testing.assert_close(of(base, some, Ties(density=keep, scale=scale)), want,
                               rtol=0, atol=1e-12)


def test_ties_of_one_task_is_the_trimmed_vector(models):
    base, (one, *_) = models
    got = of(base, [one], Ties(density=0.2))
    assert int((got != 0).sum()) == math.ceil(0.2 * got.numel())
    torch.testing.assert_close(got[got != 0], flat(one, base)[got != 0], rtol=0, atol=1e-12)


def test_of_two_opposite_changes_the_larger_wins_and_equal_ones_cancel():
    base = {"w": torch.zeros(4, dtype=torch.float64)}
    a = {"w": torch.tensor([3.0, -3.0, 1.0, 2.0], dtype=torch.float64)}
    b = {"w": torch.tensor([-1.0, 1.0, -1.0, 2.0], dtype=torch.float64)}
    assert of(base, [a, b], Ties(density=1.0)).tolist() == [3.0, -3.0, 0.0, 2.0]


def test_the_order_of_tasks_changes_nothing(models):
    base, some = models
    for part in (Ties(), Pcb(), Pcb(scoring="paper"), TaskArithmetic(), Soup(kind="uniform")):
        one, two = of(base, some, part), of(base, some[::-1], part)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
        assert one.any()


# -- DARE -----------------------------------------------------------------------------------------
def test_dare_keeps_the_mean_and_drops_its_share():
    base = {"w": torch.zeros(8, 4, dtype=torch.float64)}
    one = {"w": torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)}
    draws = torch.stack([Dare(drop_rate=0.8, seed=s).lifecycle(base, one)["w"]
                         for s in range(4096)])
    sd = one["w"].abs() * math.sqrt(0.8 / 0.2)
    error = (draws.mean(0) - one["w"]).abs() / (sd / math.sqrt(4096)).clamp(min=1e-12)
    assert float(error.max()) < 4 and float((error < 3).double().mean()) > 0.95
    torch.testing.assert_close(draws.std(0), sd, rtol=0.06, atol=1e-9)
    assert set((draws[0] / one["w"]).round(decimals=9).unique().tolist()) == {0.0, 5.0}
    assert float((draws == 0).double().mean()) == pytest.approx(0.8, abs=0.01)


def test_dare_draws_by_place_task_and_seed(models, pieces):
    base, some = models
    first = of(base, some, Dare(drop_rate=0.5), TaskArithmetic(scale=1.0))
    one = {n: base[n].clone() for n in reversed(base)}           # another order of names
    again = dict(merged(one, some, [Dare(drop_rate=0.5), TaskArithmetic(scale=1.0)]))
    torch.testing.assert_close(first, flat(again, base), rtol=0, atol=0)
    other = of(base, some, Dare(drop_rate=0.5, seed=1), TaskArithmetic(scale=1.0))
    assert not torch.equal(first, other)
    alone = Dare(drop_rate=0.5).lifecycle(base, some[0])
    torch.testing.assert_close(flat(alone, base), of(base, some[:1], Dare(drop_rate=0.5),
                                                     TaskArithmetic(scale=1.0)), rtol=0, atol=0)
    same = of(base, [some[0], some[0]], Dare(drop_rate=0.5), TaskArithmetic(scale=1.0))
    taken = (same / flat(some[0], base)).round(decimals=6).unique().tolist()
    assert taken == [0.0, 2.0, 4.0]                              # each task has draws of its own
    assert torch.equal(of(base, some, Dare(drop_rate=0.0), Ties()), of(base, some, Ties()))


def test_draws_are_the_same_whatever_the_pieces(models, monkeypatch):
    base, some = models
    whole = of(base, some, Dare(), Ties())
    for f in (taskvector.pieces_of, taskvector.combine, taskvector.Task.pieces):
        monkeypatch.setattr(f, "__defaults__", (57,))
    torch.testing.assert_close(whole, of(base, some, Dare(), Ties()), rtol=0, atol=1e-12)


# -- PCB ------------------------------------------------------------------------------------------
def norm(x):
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return torch.where(high > low, (x - low) / (high - low), torch.zeros_like(x))


def kept(s, keep):
    m = math.floor(keep * s.shape[1])
    floor = s.sort(1).values[:, max(0, s.shape[1] - 1 - m)].unsqueeze(1)
    return norm(s.maximum(floor))


def released(taus, keep):
    T, d = taus.shape
    sizes = taus.abs().sort(1).values
    low, high = (sizes[:, k].unsqueeze(1)
                 for k in (math.floor(1e-4 * d), math.ceil(0.9999 * d) - 1))
    c = taus.sign() * taus.abs().clamp(low, high)
    s = torch.exp(T * norm(c.abs()) ** 2) * torch.tanh(taus * taus.sum(0))
    w = kept(s, keep)
    return (w * c).sum(0) / w.sum(0).clamp(min=1e-12)


def paper(taus, keep):
    T = len(taus)
    intra = (T * norm(taus**2)).softmax(1)
    inter = sum(norm(taus * taus[u]).softmax(1) for u in range(T))
    w = kept(intra * inter, keep)
    return (w * taus).sum(0) / w.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("variant, want", [("released", released), ("paper", paper)])
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_pcb_is_its_equation(pieces, variant, want, keep):
    base = start()
    some = [tuned(base, k, size=0.5) for k in (1, 2, 3)]         # large: tanh is not linear there
    taus = torch.stack([flat(m, base) for m in some])
    got = of(base, some, Pcb(density=keep, scale=1.0, scoring=variant))
    torch.testing.assert_close(got, want(taus, keep), rtol=0, atol=2e-6)
    assert torch.allclose(of(base, some, Pcb(density=keep, scale=1.5, scoring=variant)), 1.5 * got)


def test_pcb_keeps_its_share_clamps_and_takes_one_task_as_it_is(models):
    base, (one, *_) = models
    for variant in ("released", "paper"):
        got = of(base, [one], Pcb(scale=1.0, scoring=variant))
        assert int((got != 0).sum()) == math.floor(0.1 * got.numel())
        change = flat(one, base)[got != 0]
        if variant == "released":                # one in ten thousand is above the clamp: none here
            assert got.numel() < 10_000
        torch.testing.assert_close(got[got != 0], change, rtol=1e-7, atol=0)
    large = {"w": torch.zeros(30_000, dtype=torch.float64)}
    steep = {"w": torch.arange(30_000, dtype=torch.float64)}
    top = of(large, [steep], Pcb(scale=1.0, density=0.5))
    assert top.max() == 30_000 - 3 - 1 and int((top == top.max()).sum()) == 4
    every = of(large, [steep], Pcb(scale=1.0, density=1.0))
    assert every[1:5].tolist() == [3.0, 3.0, 3.0, 4.0]


def test_changes_that_are_all_alike_weigh_nothing():
    base = {"w": torch.zeros(20, dtype=torch.float64)}
    same = {"w": torch.ones(20, dtype=torch.float64)}
    for variant in ("released", "paper"):
        got = of(base, [same, same], Pcb(scoring=variant))
        assert torch.isfinite(got).all() and not got.any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_signed_entries_are_found_exactly(share):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(101, generator=g)
    x = torch.where(torch.rand(101, generator=g) < share, -x.abs(), x.abs())
    x[5] = x[7] = 0.0
    for k in (0, 3, 50, 99, 100):
        assert signed(lambda: iter(x.split(17)), 101, k) == x.sort().values[k].item()
    assert float(radix(lambda: [x.abs()], 101, 0)[0]) == 0


def test_the_function_of_a_part_is_the_merge_by_it_alone(models):
    base, some = models
    for part in (Ties(), Pcb(), TaskArithmetic()):
        got = part.lifecycle(base, *some)
        assert got.keys() == base.keys()
        torch.testing.assert_close(flat(got, base), of(base, some, part), rtol=0, atol=1e-12)


def test_what_stands_in_the_papers_is_the_default():
    assert (Ties().density, Ties().scale) == (0.2, 1.0)
    assert (Pcb().density, Pcb().scale, Pcb().scoring) == (0.1, 1.2, "released")
    assert (Dare().drop_rate, TaskArithmetic().scale) == (0.9, 0.4)


def test_the_scales_that_data_choose_from():
    assert TaskArithmetic.grid == tuple(k / 20 for k in range(21))
    assert Ties.grid == (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0)
    assert Pcb.grid == (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)


# -- parts ----------------------------------------------------------------------------------------
def test_a_merge_is_changes_and_one_rule_in_order(models):
    base, some = models
    tasks = [TaskVector(base, m) for m in some]
    for parts, said in (("dare", "dare \\+ task_arithmetic"), ("ties + pcb", "ties and pcb"),
                        ("ties + dare", "write dare before it"), ("soup", "burnish soup"),
                        ("intruders", "nothing about merging")):
        with pytest.raises(ConfigError, match=said):
            planned(list(parse(parts)), tasks)
    with pytest.raises(ConfigError, match="nothing to merge"):
        planned([Ties()], [])
    with pytest.raises(ConfigError, match="no tensor in common"):
        planned([Pcb()], [TaskVector(base, {})])


@pytest.mark.parametrize("make, said", [
    (lambda: Ties(density=0), "share"), (lambda: Ties(density=20), "share"),
    (lambda: Dare(drop_rate=1.0), "below 1"), (lambda: Dare(drop_rate=-1), "from 0"),
    (lambda: Ties(density=1.5), "share"), (lambda: Pcb(density=1.5), "share"),
    (lambda: Pcb(density=0.0), "share"), (lambda: Pcb(density=2), "share")])
def test_shares_that_are_none_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_what_one_task_does_not_change_has_no_part_in_any_threshold(models):
    base, (one, two, _) = models
    lacks = {n: t for n, t in two.items() if n != "embed.weight"}
    rest = {n: t for n, t in base.items() if n != "embed.weight"}
    got = dict(merged(base, [one, lacks], [Ties()]))
    assert torch.equal(got["embed.weight"], base["embed.weight"])
    want = dict(merged(rest, [{n: one[n] for n in rest}, lacks], [Ties()]))
    assert all(torch.equal(got[n], want[n]) for n in rest)


def test_files_are_read_tensor_by_tensor_and_give_the_same(models, tmp_path):
    base, some = start(torch.float32), [tuned(start(torch.float32), k) for k in (1, 2)]
    for i, m in enumerate([base, *some]):
        save_file(m, tmp_path / f"{i}.safetensors")
    files = [Tensors(tmp_path / f"{i}.safetensors") for i in range(3)]
    for part in (Ties(), Pcb(), Pcb(scoring="paper"), Soup(kind="uniform")):
        one = dict(merged(base, some, [Dare(drop_rate=0.3), part]))
        for name, t in merged(files[0], files[1:], [Dare(drop_rate=0.3), part]):
            assert torch.equal(t, one[name]) and t.dtype == torch.float32
