"""FRUGAL against a dense fp64 reference from its equations, and its published table of state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import burnish
from burnish.blocks.update.noise import CounterNoise
from burnish.blocks.update.rota import Rota
from burnish.blocks.update.step import compose
from burnish.blocks.update.subspace import SubspaceMap
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64 = torch.float64
KINDS = ["columns", "rows", "randk", "svd", "random", "block"]


def answers(recipe):
    return [m.optimizer() for m in parse(recipe)]


def gradients(m, n, steps, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=g, dtype=F64).to(dtype) for _ in range(steps)]


def drive(recipe, Ws, grads, lr=1e-2, seen=lambda opt, ps: None, **kw):
    ps = [(f"layers.{i}.w", nn.Parameter(W.clone())) for i, W in enumerate(Ws)]
    opt = compose(answers(recipe), ps, lr, **kw)
    for step in grads:
        for (_, p), g in zip(ps, step, strict=True):
            p.grad = g.clone()
        opt.step()
        seen(opt, ps)
    return [p for _, p in ps], opt


def inside(by, opt, name, p, turn):
    """G -> (what Adam sees, how it comes back, which entries it picks), in whole matrices."""
    m, n = p.shape
    state, ones = opt.state[p], torch.ones(m, n, dtype=F64)
    if by in ("svd", "random"):
        P, Q = state.get("projector.left"), state.get("projector.right")
        if P is not None:
            return (lambda G: P.t() @ G), (lambda N: P @ N)
        return (lambda G: G @ Q.t()), (lambda N: N @ Q)
    if by == "columns":
        mask = torch.zeros(n, dtype=F64).index_fill(0, state["projector.columns"].long(), 1.0)
        mask = ones * mask
    elif by == "rows":
        mask = torch.zeros(m, dtype=F64).index_fill(0, state["projector.rows"].long(), 1.0)
        mask = ones * mask[:, None]
    elif by == "randk":
        drawn = SubspaceMap(density=opt.plan.subspace.map.density, kind="entries").basis(
            ones, CounterNoise(opt.seed, f"{name}/subspace"), turn, F64)
        mask = torch.zeros(m, n, dtype=F64).scatter(1, drawn.entries, 1.0)
    else:
        mask = ones * ("exp_avg" in state)
    return (lambda G: G * mask), (lambda N: N * mask)


def reference(Ws, grads, opt_of, every, lr, s_proj=1.0, s_free=0.1, wd=0.0, residual="sign",
              restart=True):
    """The equations, dense; `opt_of(step)` tells down and back of each matrix at that step."""
    Ws, M, V = [W.clone() for W in Ws], [0.0] * len(Ws), [0.0] * len(Ws)
    rest = {"sign": torch.sign, "sgd": lambda G: G, "none": torch.zeros_like}[residual]
    for k, step in enumerate(grads):
        t = k % every + 1 if restart else k + 1
        for i, G in enumerate(step):
            down, back = opt_of[k][i]
            if restart and t == 1:
                M[i] = V[i] = 0.0
            R = down(G)
            M[i], V[i] = 0.9 * M[i] + 0.1 * R, 0.999 * V[i] + 0.001 * R**2
            N = M[i] / (1 - 0.9**t) / ((V[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            left = G - back(R)
            left = left * (left.abs() > 1e-13)
            Ws[i] = Ws[i] * (1 - lr * wd) - lr * s_proj * (back(N) + s_free * rest(left))
    return Ws


@pytest.mark.parametrize("settings", [{}, {"scale": 0.5, "scale_free": 0.3}, {"residual": "sgd"},
                                      {"residual": "none"}], ids=str)
@pytest.mark.parametrize("by", KINDS)
def test_the_equations(by, settings):
    Ws = gradients(12, 20, 1, 1) + gradients(20, 12, 1, 2) + gradients(16, 16, 2, 3)
    grads = list(zip(gradients(12, 20, 7), gradients(20, 12, 7, 5), gradients(16, 16, 7, 6),
                     gradients(16, 16, 7, 7), strict=True))
    parts, k = [], [0]

    def seen(opt, ps):
        parts.append([inside(by, opt, n, p, k[0] // 3) for n, p in ps])
        k[0] += 1

    more = "".join(f", {a}={b!r}" for a, b in settings.items())
    ps, _ = drive(f"full + frugal(density=0.25, part={by!r}, every=3{more})", Ws, grads, seen=seen,
                  weight_decay=0.1)
    names = {"s_proj": settings.get("scale", 1.0), "s_free": settings.get("scale_free", 0.1),
             "residual": settings.get("residual", "sign")}
    for p, want in zip(ps, reference(Ws, grads, parts, 3, 1e-2, wd=0.1, **names), strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-11)


def test_without_reset_moments_and_time_go_on():
    Ws, grads = gradients(12, 20, 1, 1), [(g,) for g in gradients(12, 20, 5)]
    parts, k = [], [0]

    def seen(opt, ps):
        parts.append([inside("rows", opt, n, p, k[0] // 2) for n, p in ps])
        k[0] += 1

    (p,), _ = drive("full + frugal(part='rows', every=2, density=0.5, reset=False)", Ws, grads,
                    seen=seen)
    # moments stay by their place in R, as GaLore's do; the reference keeps R in whole matrices,
    # so it is told each turn's rows in the order of their places
    M = V = torch.zeros(6, 20, dtype=F64)
    want = Ws[0].clone()
    for t, (G,) in enumerate(grads, 1):
        rows = parts[t - 1][0][0](torch.ones(12, 20, dtype=F64))[:, 0].nonzero().flatten()
        R = G[rows]
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = M / (1 - 0.9**t) / ((V / (1 - 0.999**t)).sqrt() + 1e-8)
        step = 0.1 * G.sign()
        step[rows] = N
        want = want - 1e-2 * step
    torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("by", ["columns", "rows", "randk", "block"])
def test_all_of_it_without_reset_is_adamw(by):
    Ws, grads = gradients(12, 20, 1, 1), [(g,) for g in gradients(12, 20, 6)]
    settings = "" if by == "block" else ", every=2, reset=False"
    (p,), _ = drive(f"full + frugal(density=1.0, part={by!r}{settings})", Ws, grads,
                    weight_decay=0.1)
    q = nn.Parameter(Ws[0].clone())
    adam = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1)
    for (g,) in grads:
        q.grad = g
        adam.step()
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("by", KINDS)
def test_nothing_of_it_is_sign_descent_without_state(by):
    Ws, grads = gradients(12, 20, 1, 1), [(g,) for g in gradients(12, 20, 6)]
    (p,), opt = drive(f"full + frugal(density=0.0, part={by!r}, every=4, scale_free=1.0)", Ws,
                      grads)
    want = Ws[0] - 1e-2 * sum(g.sign() for (g,) in grads)
    torch.testing.assert_close(p.detach(), want)
    assert not any(isinstance(v, torch.Tensor) for v in opt.state[p].values())


@pytest.mark.parametrize("by", ["columns", "rows", "randk"])
def test_the_two_parts_share_no_entry_and_leave_none_out(by):
    """With a large scale of signs, an entry moves by its sign or by Adam's first step, never
    both."""
    (G,) = gradients(12, 20, 1)
    (p,), _ = drive(f"full + frugal(density=0.25, part={by!r}, scale_free=100.0)",
                    [torch.zeros(12, 20, dtype=F64)], [(G,)], lr=1.0)
    size = p.detach().abs()
    adam, sign = (size - 1).abs() < 1e-4, (size - 100).abs() < 1e-4
    assert (adam ^ sign).all()
    assert int(adam.sum()) == 60


def test_what_takes_moments_moves_on_and_is_drawn_again_alike():
    seen = []
    Ws, grads = gradients(12, 20, 1, 1), [(g,) for g in gradients(12, 20, 6)]
    drive("full + frugal(every=2)", Ws, grads, seed=3,
          seen=lambda opt, ps: seen.append(opt.state[ps[0][1]]["projector.columns"].tolist()))
    assert seen[0] == seen[1] != seen[2] == seen[3] != seen[4]
    again = []
    drive("full + frugal(every=2)", Ws, grads, seed=3,
          seen=lambda opt, ps: again.append(opt.state[ps[0][1]]["projector.columns"].tolist()))
    assert seen == again


@pytest.mark.parametrize("m, n, r", [(400, 12, 5), (400, 7, 7), (300, 9, 1), (400, 6, 4)])
def test_entries_of_a_row_differ_and_each_is_as_likely(m, n, r):
    how = SubspaceMap(rank=r, kind="entries")
    G, hits = torch.zeros(m, n), torch.zeros(n)
    for turn in range(10):
        at = how.basis(G, CounterNoise(1, "w"), turn, F64).entries
        assert at.shape == (m, r) and (at.sort(1).values.diff(dim=1) > 0).all()
        assert 0 <= int(at.min()) and int(at.max()) < n
        hits += torch.bincount(at.flatten(), minlength=n)
    share, draws = r / n, 10 * m
    sigma = (share * (1 - share) / draws) ** 0.5
    assert ((hits / draws - share).abs() <= 4.5 * sigma + 1e-9).all()


@pytest.mark.parametrize("by", ["columns", "randk", "svd", "block"])
def test_a_resumed_run_is_bit_for_bit_the_same(by):
    Ws = gradients(12, 20, 4, 1)
    grads = [gradients(12, 20, 4, k) for k in range(7)]
    recipe = f"full + frugal(part={by!r}, every=2)"
    whole, _ = drive(recipe, Ws, grads)
    first, opt = drive(recipe, Ws, grads[:3])
    ps = [(f"layers.{i}.w", nn.Parameter(p.detach().clone())) for i, p in enumerate(first)]
    again = compose(answers(recipe), ps, 1e-2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in grads[3:]:
        for (_, p), g in zip(ps, step, strict=True):
            p.grad = g.clone()
        again.step()
    assert all(torch.equal(a, b) for a, (_, b) in zip(whole, ps, strict=True))


@pytest.mark.parametrize("order, turns", [
    ("ascending", ["ab", "cd", "ea", "bc"]), ("descending", ["ed", "cb", "ae"]),
    ("mirror", ["ae", "bd", "ca"])])
def test_turns_go_round(order, turns):
    rota = Rota(0.4, order, tuple("abcde"))
    assert [rota.live(k, 0) for k in range(len(turns))] == [frozenset(t) for t in turns]


def test_from_both_ends_by_turns_means_the_first_the_last_and_so_on():
    rota = Rota(0.2, "mirror", tuple("abcde"))
    assert "".join(*zip(*(rota.live(k, 0) for k in range(6)), strict=True)) == "aebdca"


def test_turns_that_are_drawn_have_the_share_and_depend_on_seed_and_turn():
    rota = Rota(0.25, "random", tuple(map(str, range(40))))
    drawn = [rota.live(k, 0) for k in range(400)]
    assert {len(d) for d in drawn} == {10} and len(set(drawn)) > 390
    assert drawn[3] == rota.live(3, 0) != rota.live(3, 1)
    counts = [sum(n in d for d in drawn) for n in rota.names]
    assert max(abs(c - 100) for c in counts) < 4.5 * (400 * 0.25 * 0.75) ** 0.5


def test_only_those_whose_turn_it_is_hold_moments_and_never_more():
    """Moments of those that leave are freed before those that come have any."""
    most, made = [0], []

    def held(opt, ps):
        have = [n for n, p in ps if "exp_avg" in opt.state[p]]
        made.append(tuple(have))
        most[0] = max(most[0], len(have))

    grads = [gradients(8, 8, 8, k) for k in range(9)]
    ps = [(f"layers.{i}.w", nn.Parameter(W.clone())) for i, W in enumerate(gradients(8, 8, 8, 1))]
    opt = compose(answers("full + frugal(part='block', every=2, order='ascending')"), ps, 1e-2)
    rule = type(opt.plan.rule)
    assert rule.__name__ == "AdamW"
    allocate = opt._allocate

    def watched(state, *a):
        allocate(state, *a)
        held(opt, ps)

    opt._allocate = watched
    for step in grads:
        for (_, p), g in zip(ps, step, strict=True):
            p.grad = g.clone()
        opt.step()
    assert most == [2] and len(set(made)) > 4


def test_a_tied_matrix_has_one_turn():
    w = nn.Parameter(torch.zeros(8, 8))
    ps = [("layers.0.a", w), ("layers.1.a", nn.Parameter(torch.zeros(8, 8))), ("layers.2.a", w)]
    opt = compose(answers("full + frugal(part='block')"), ps, 1e-2)
    assert opt.plan.subspace.rota.names == ("layers.0.a", "layers.1.a")


@pytest.mark.parametrize("form, adamw, quarter, none", [
    ((512, 1376, 8), 0.43, 0.29, 0.24), ((768, 2048, 12), 1.00, 0.52, 0.37),
    ((1024, 2736, 24), 2.74, 1.05, 0.49), ((2048, 5461, 24), 9.98, 3.23, 0.98)])
def test_the_published_table_of_state(form, adamw, quarter, none):
    """LLaMA 60M to 1B: GiB of fp32 optimizer state beside AdamW, a quarter of it, none of it. One
    block on fake tensors, times their number, and what stands outside."""
    d, ff, layers = form
    with FakeTensorMode():
        def weight(*shape):
            p = nn.Parameter(torch.empty(*shape))
            p.grad = torch.empty_like(p)
            return p

        block = [(f"layers.0.{i}.weight", weight(*s))
                 for i, s in enumerate([(d, d)] * 4 + [(ff, d)] * 2 + [(d, ff)])]
        block += [(f"layers.0.norm{i}.weight", weight(d)) for i in range(2)]
        rest = [("embed_tokens.weight", weight(32000, d)), ("lm_head.weight", weight(32000, d)),
                ("norm.weight", weight(d))]
        for settings, want in (("density=1.0", adamw), ("density=0.25", quarter),
                               ("density=0.25, part='randk'", quarter), ("density=0.0", none)):
            opt = compose(answers(f"full + frugal({settings})"), block + rest, 1e-3)
            opt.step()

            def held(named, opt=opt):
                return sum(v.nbytes for _, p in named for v in opt.state[p].values()
                           if isinstance(v, torch.Tensor))

            assert round((layers * held(block) + held(rest)) / 2**30, 2) == want


def test_others_take_adam():
    p = nn.Parameter(torch.ones(6, dtype=F64))
    q = nn.Parameter(torch.ones(6, dtype=F64))
    opt = compose(answers("full + frugal"), [("layers.0.norm.weight", p)], 1e-2)
    adam = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.0)
    for k in range(3):
        p.grad = q.grad = torch.full_like(p, 1e-7 * (k + 1))         # eps is seen
        opt.step()
        adam.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_targets_choose_what_is_taken_apart():
    ps = [(f"layers.0.{n}", nn.Parameter(gradients(12, 20, 1)[0])) for n in ("w", "v")]
    opt = compose(answers("full + frugal(targets='v')"), ps, 1e-2)
    for _, p in ps:
        p.grad = gradients(12, 20, 1)[0]
    opt.step()
    w, v = (opt.state[p]["exp_avg"].numel() for _, p in ps)
    assert (w, v) == (12 * 20, 12 * 5)


@pytest.mark.parametrize("by", KINDS)
def test_inside_backward_it_is_the_same(by):
    Ws, ends = gradients(8, 12, 4, 1), []
    for recipe in (f"full + frugal(part={by!r}, every=2)",
                   f"full + frugal(part={by!r}, every=2) + step_in_backward"):
        ps = [(f"layers.{i}.w", nn.Parameter(W.clone())) for i, W in enumerate(Ws)]
        opt = compose(answers(recipe), ps, 1e-2)
        for k in range(5):
            sum((p * g).sum() for (_, p), g in zip(ps, gradients(8, 12, 4, k), strict=True)
                ).backward()
            opt.step()
            opt.zero_grad()
        ends.append([p.detach() for _, p in ps])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("rule", ["lion", "sgd(momentum=0.9)", "adam8bit"])
def test_another_rule_takes_adam_s_place(rule):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"full + frugal(every=3) + {rule}", head=False)
    tuned.optimizer(lr=3e-3 if rule != "lion" else 1e-3)
    losses = [float(tuned.step(batch)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_what_cannot_act_is_refused():
    with pytest.raises(burnish.RecipeError, match="part='block', reset=False"):
        parse("full + frugal(part='block', reset=False)")
    with pytest.raises(burnish.RecipeError, match="take part='block'"):
        parse("full + frugal(order='mirror')")
    with pytest.raises(burnish.RecipeError, match="density is a share from 0 to 1, got 1.5"):
        answers("full + frugal(density=1.5)")
    with pytest.raises(burnish.RecipeError, match="^frugal: every is at least 1"):
        answers("full + frugal(every=0)")
    with pytest.raises(burnish.RecipeError, match="frugal and galore|galore and frugal"):
        parse("full + frugal + galore")


def test_its_settings_are_the_authors():
    (made,) = parse("frugal")
    want = {"density": 0.25, "every": 200, "scale": 1.0, "scale_free": 0.1, "reset": True,
            "part": "columns", "residual": "sign"}
    assert {k: getattr(made, k) for k in want} == want


def test_its_published_fine_tuning_takes_eight_columns_of_768():
    m = SubspaceMap(density=8 / 768, kind="columns")
    assert m.shape(768, 768) == (768, 8) and m.shape(768, 3072) == (768, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("by, told", [
    ("columns", lambda s, w: 2 * w * 12 * 5 + 4 * 5), ("rows", lambda s, w: 2 * w * 3 * 20 + 4 * 3),
    ("randk", lambda s, w: 2 * w * 12 * 5), ("svd", lambda s, w: s * 3 * 12 + 2 * w * 3 * 20),
    ("random", lambda s, w: s * 3 * 12 + 2 * w * 3 * 20), ("block", lambda s, w: 2 * w * 12 * 20)])
def test_the_bytes_it_tells_are_held(by, told, dtype):
    size = dtype.itemsize
    (m,) = parse(f"frugal(part={by!r}, order={'ascending' if by == 'block' else 'random'!r})")
    assert m.state_bytes((12, 20), size) == told(size, max(size, 4))
    Ws = [W.to(dtype) for W in gradients(12, 20, 4, 1)]
    ps, opt = drive(f"full + {m}", Ws, [gradients(12, 20, 4, 2, dtype)])
    held = sum(v.nbytes for v in opt.state[ps[0]].values() if isinstance(v, torch.Tensor))
    assert held == told(size, max(size, 4))
    assert m.state_bytes((7,), size) == 2 * 7 * max(size, 4)
