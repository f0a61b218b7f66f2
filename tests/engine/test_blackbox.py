"""A function that answers with numbers: every query counted, logged, and made once."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import threading

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.step import compose
from burnish.core.errors import BurnishError, ConfigError, FormatError, RecipeError
from burnish.core.recipe import parse

RULES = ["mezo(queries=2)", "spsa_gc(queries=2)", "zo(rule='adam')", "zo(rule='cons')",
         "zo(one_sided=True, queries=2)", "zo(unit='module')", "zo(s=0.5, measure='probe')",
         "mezo_svrg(every=3)", "mezo(mode='in_place')", "zo(rule='cons', one_sided=True)"]
BATCHES = [torch.full((3,), float(i)) for i in range(6)]


def start():
    g = torch.Generator().manual_seed(0)
    return {"a.w": torch.randn(4, 3, generator=g), "b": torch.randn(5, generator=g)}


def loss(params, batch, query_seed=0):
    return float((params["a.w"].sum(0) - batch).double().square().mean()
                 + (params["b"] - 1).double().square().mean())


class Service:
    """Notes what it is asked, and may die or fail at a query."""

    def __init__(self, fail_at=None):
        self.asked, self.seeds, self.fail_at, self.lock = [], [], fail_at, threading.Lock()

    def __call__(self, params, batch, query_seed):
        with self.lock:
            self.asked.append(tuple(float(v.double().sum()) for v in params.values()))
            self.seeds.append(query_seed)
            if len(self.asked) == self.fail_at:
                raise TimeoutError("no answer in 30 s")
        return loss(params, batch)


def run(service, recipe, steps=5, **kw):
    params = start()
    box = burnish.BlackBox(service, params, recipe, lr=0.05, seed=7, **kw)
    for batch in BATCHES[box.updates:steps]:
        box.step(batch)
    return box, params


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("recipe", RULES)
def test_it_is_the_optimizer_driven_by_a_closure(recipe, concurrency):
    box, params = run(Service(), recipe, concurrency=concurrency)
    held = {n: nn.Parameter(p) for n, p in start().items()}
    opt = compose([m.optimizer() for m in parse(recipe)], held.items(), 0.05, seed=7)
    for batch in BATCHES[:5]:
        opt.step(lambda batch=batch: loss({n: p.detach() for n, p in held.items()}, batch))
    assert same(params, {n: p.detach() for n, p in held.items()})
    assert not same(params, start()) and box.updates == 5


@pytest.mark.parametrize("recipe, each", [("mezo", 2), ("spsa_gc(queries=3)", 6),
                                          ("zo(one_sided=True, queries=2)", 3),
                                          ("zo(rule='cons')", 5)])
def test_queries_are_counted_and_two_make_an_estimate(recipe, each):
    service = Service()
    box, _ = run(service, recipe, cost=0.25)
    assert len(service.asked) == box.queries == 5 * each and box.spent == 5 * each / 4
    assert len(set(service.asked)) >= 5 * (each - 1)
    assert [len(set(service.seeds[i * each:(i + 1) * each])) for i in range(5)] == [1] * 5
    assert len(set(service.seeds)) == 5                            # common within an update


def test_on_a_quadratic_the_mean_of_the_moves_is_the_gradient():
    g = torch.Generator().manual_seed(0)
    H = torch.randn(6, 6, generator=g, dtype=torch.float64)
    H, at = H @ H.T / 6, torch.randn(6, generator=g, dtype=torch.float64)
    for recipe in ("mezo(eps=1e-3)", "spsa_gc(eps=1e-3, queries=1, momentum=0.0, rate_power=0.0)"):
        w, total, n = at.clone(), torch.zeros(6, dtype=torch.float64), 2000
        box = burnish.BlackBox(lambda p, b, s: float(0.5 * p["w"] @ H @ p["w"]), {"w": w}, recipe,
                               lr=1.0, concurrency=1)
        for _ in range(n):
            box.step()
            total += at - w
            w.copy_(at)
        assert (total / n - H @ at).norm() < 0.2 * (H @ at).norm(), recipe


def test_both_points_of_a_probe_are_asked_at_once():
    both = threading.Barrier(2, timeout=20)

    def evaluate(params, batch, seed):
        both.wait()                                  # breaks unless two stand here together
        return loss(params, batch)

    run(evaluate, "mezo", steps=2)


def die(path, recipe, at, concurrency):
    count = [0]

    def evaluate(params, batch, seed):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{path}.asked", "a") as file:
            file.write("x")
        return loss(params, batch)

    run(evaluate, recipe, log=path, concurrency=concurrency)


@pytest.mark.parametrize("recipe, concurrency", [
    ("mezo(queries=2)", 1), ("mezo(queries=2)", 2), ("spsa_gc(queries=2)", 2),
    ("mezo_svrg(every=3)", 2), ("zo(rule='adam', one_sided=True)", 1)])
def test_killed_in_the_middle_of_a_step_it_repeats_no_query(tmp_path, recipe, concurrency):
    path = tmp_path / "queries.jsonl"
    whole, want = run(Service(), recipe)
    child = multiprocessing.get_context("fork").Process(target=die,
                                                        args=(path, recipe, 8, concurrency))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    logged = len(path.read_text().splitlines()) - 1
    assert 5 <= logged <= 8
    service = Service()
    box, params = run(service, recipe, log=path, concurrency=concurrency)
    assert len(service.asked) == whole.queries - logged and box.queries == whole.queries
    assert same(params, want)
    again, params = run(Service(fail_at=1), recipe, log=path)       # asks nothing at all
    assert same(params, want) and again.updates == 5


def test_every_line_may_be_the_last_and_a_torn_one_is_asked_again(tmp_path):
    path = tmp_path / "queries.jsonl"
    whole, want = run(Service(), "mezo(queries=2)", log=path)
    lines = path.read_bytes().splitlines(keepends=True)
    for n in range(len(lines) + 1):
        for torn in (b"", b'{"update": 1, "a'):
            path.write_bytes(b"".join(lines[:n]) + torn)
            service = Service()
            _, params = run(service, "mezo(queries=2)", log=path)
            assert same(params, want)
            assert len(service.asked) == whole.queries - max(0, n - 1)
            assert path.read_bytes().count(b"\n") == len(lines)


def test_the_answer_of_the_second_point_alone_is_kept(tmp_path):
    """Two threads: the other one's answer was on disk when the run was killed."""
    path = tmp_path / "queries.jsonl"
    _, want = run(Service(), "mezo", log=path)
    lines = path.read_bytes().splitlines(keepends=True)
    last = [i for i, line in enumerate(lines[1:], 1) if json.loads(line)["update"] == 3]
    zero = next(i for i in last if json.loads(lines[i])["at"] == 0)
    path.write_bytes(b"".join(line for i, line in enumerate(lines[:last[-1] + 1]) if i != zero))
    service = Service()
    _, params = run(service, "mezo", log=path)
    assert same(params, want) and len(service.asked) == 1 + 2


def test_a_query_that_fails_moves_nothing_and_is_the_only_one_asked_again():
    service, params = Service(fail_at=4), start()
    box = burnish.BlackBox(service, params, "mezo(queries=2)", lr=0.05, seed=7, concurrency=1)
    with pytest.raises(BurnishError, match="update 0 failed with TimeoutError: no answer in 30 s"):
        box.step(BATCHES[0])
    assert same(params, start()) and box.queries == 3
    with pytest.raises(ConfigError, match="cut off after 3 answers on another batch"):
        box.step(BATCHES[1])
    for batch in BATCHES[:5]:
        box.step(batch)
    assert box.queries == 20 and len(service.asked) == 21
    assert same(params, run(Service(), "mezo(queries=2)")[1])


def test_a_budget_stops_before_a_step_and_more_goes_on_where_it_stood(tmp_path):
    path, service, params = tmp_path / "q", Service(), start()
    box = burnish.BlackBox(service, params, "mezo(queries=2)", lr=0.05, seed=7, budget=3.0,
                           cost=0.5, log=path)
    box.step(BATCHES[0])
    stood = {n: p.clone() for n, p in params.items()}
    with pytest.raises(BurnishError, match="the budget of 3 is spent: 6 queries cost 3, and "
                                           "update 1 asks 2 more"):
        box.step(BATCHES[1])
    assert same(params, stood) and len(service.asked) == 6 and box.spent == 3
    _, params = run(service, "mezo(queries=2)", budget=10.0, cost=0.5, log=path)
    assert len(service.asked) == 20 and same(params, run(Service(), "mezo(queries=2)")[1])


def test_rates_that_fall_are_the_log_s(tmp_path):
    def falling(service, path):
        params = start()
        box = burnish.BlackBox(service, params, "mezo", lr=1.0, seed=7, log=path)
        for i in range(box.updates, 4):
            box.lr = 0.1 / (1 + i)
            box.step(BATCHES[i])
        return params

    want, path = falling(Service(), tmp_path / "a"), tmp_path / "a"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]))            # two updates, and one answer of the third
    assert same(falling(Service(), path), want)


def test_an_answer_that_is_not_finite_moves_nothing_and_stays_so_in_the_log(tmp_path):
    def evaluate(params, batch, seed):
        return float("nan") if batch[0] == 1 else loss(params, batch)

    path = tmp_path / "q"
    _, params = run(evaluate, "mezo", log=path)
    assert all(p.isfinite().all() for p in params.values())
    assert same(run(Service(fail_at=1), "mezo", log=path)[1], params)


def test_a_disk_that_is_full_stops_before_anything_moves(tmp_path):
    path, params = tmp_path / "q", start()
    box = burnish.BlackBox(Service(), params, "mezo", lr=0.05, seed=7, log=path)
    box.step(BATCHES[0])
    stood, size = {n: p.clone() for n, p in params.items()}, path.stat().st_size
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, was[1]))     # half of a line
        with pytest.raises(BurnishError, match="could not be written to .*; the weights are"):
            box.step(BATCHES[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, handler)
    assert same(params, stood)
    for batch in BATCHES[1:5]:
        box.step(batch)
    want = run(Service(), "mezo")[1]
    assert same(params, want) and same(run(Service(fail_at=1), "mezo", log=path)[1], want)


def test_a_log_of_another_run_and_a_damaged_one_are_refused(tmp_path):
    path = tmp_path / "q"
    run(Service(), "mezo", log=path)
    for settings, says in (({"recipe": "spsa_gc"}, "its recipe is 'mezo"), ({"seed": 8}, "seed")):
        with pytest.raises(FormatError, match=says):
            burnish.BlackBox(Service(), start(), **{"recipe": "mezo", "seed": 7, "lr": 1.0,
                                                    "log": path, **settings})
    moved = {n: p + 1 for n, p in start().items()}
    with pytest.raises(FormatError, match="its start is"):
        burnish.BlackBox(Service(), moved, "mezo", lr=1.0, seed=7, log=path)
    lines = path.read_bytes().splitlines(keepends=True)
    for change, says in ((lines[:2] + [b"{]\n"], "line 3 is no JSON"),
                         (lines[:2] + [b"[1]\n"], "line 3 is no answer"),
                         (lines[:2] + [b'{"update": 1}\n'], "line 3: at is missing"),
                         (lines[:1] + lines[3:], "none that finish update 0")):
        path.write_bytes(b"".join(change))
        with pytest.raises(FormatError, match=says):
            burnish.BlackBox(Service(), start(), "mezo", lr=1.0, seed=7, log=path)
    row = {**json.loads(lines[1]), "at": 0, "scale": 0.5}
    path.write_bytes(lines[0] + json.dumps(row).encode() + b"\n")
    with pytest.raises(FormatError, match="it is of another run"):
        burnish.BlackBox(Service(), start(), "mezo", lr=1.0, seed=7, log=path)
    with pytest.raises(FormatError, match="cannot be read"):
        burnish.BlackBox(Service(), start(), "mezo", lr=1.0, log=tmp_path)


def test_a_model_of_one_s_own_is_such_a_function():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    x, y = torch.randn(16, 3), torch.randn(16, 2)

    def evaluate(params, batch, seed):
        out = torch.func.functional_call(net, params, (batch[0],))
        return (out - batch[1]).square().mean()

    box = burnish.BlackBox(evaluate, dict(net.named_parameters()), "mezo(queries=4)", lr=2e-2)
    losses = [box.step((x, y)) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    assert float(evaluate(dict(net.named_parameters()), (x, y), 0)) < losses[0]    # in place


def test_what_cannot_act_is_refused():
    for recipe, says in (("lora", "lora changes a model"), ("adamw", "adamw reads gradients"),
                         ("forward_grad", "forward_grad reads gradients or a model"),
                         ("zo_fo", "zo_fo reads gradients or a model"),
                         ("full + mezo", "full changes a model")):
        with pytest.raises(RecipeError, match=says):
            burnish.BlackBox(Service(), start(), recipe, lr=1.0)
    for settings, says in (({"concurrency": 3}, "expected 1 or 2"), ({"cost": 0}, "costs more"),
                           ({"budget": -1}, "at least 0"), ({"params": {}}, "params is empty"),
                           ({"params": {"n": torch.ones(2).long()}}, "n is no tensor of real")):
        with pytest.raises(ConfigError, match=says):
            burnish.BlackBox(Service(), **{"params": start(), "recipe": "mezo", "lr": 1.0,
                                           **settings})
    for answer, says in (("1.0", "answered with a str"), (True, "answered with a bool"),
                         (torch.ones(2), "one number"), (torch.ones((), dtype=torch.float16),
                                                         "wider than the differences")):
        with pytest.raises(ConfigError, match=says):
            burnish.BlackBox(lambda *_, a=answer: a, start(), "mezo", lr=1.0).step()
