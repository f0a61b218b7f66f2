"""Every setting of every method acts: another legal value makes a difference that is seen."""

from __future__ import annotations

import typing
from dataclasses import fields
from functools import lru_cache

import pytest
import torch

import burnish
from burnish.core import registry
from burnish.core.method import Method
from burnish.memory import Ledger
from burnish.testing import conformance
from burnish.testing.models import tiny

STEPS = 6
METHODS = conformance.methods()
SETTINGS = [(m, f.name) for m in METHODS for f in fields(registry.find(m))
            if f.name not in {g.name for g in fields(Method)}]

#: another legal value, where half, twice or the other one would not be legal or not be seen here
OTHER = {
    ("adalora", "rank"): 2, ("adalora", "init_rank"): 5, ("adalora", "cooldown"): 0.6,
    ("adalora", "warmup"): 0.5,
    ("adalora", "every"): 2, ("snell", "norm_p"): 3.0, ("snella", "rounds"): 2,
    ("snella", "warmup"): 0.4, ("snella", "cooldown"): 0.4, ("snella", "s"): 0.2,
    ("miss", "mini"): 4, ("mola", "allocation"): "1-2", ("mola", "k"): 1, ("mola", "balance"): 1.0,
    ("pissa", "alpha"): 8.0, ("pissa", "iterations"): 1, ("prefix", "hidden"): 4,
    ("prompt_tuning", "ids"): (1, 2), ("vpt", "after"): 3, ("lst", "layers"): (1,),
    ("lisa", "layers"): 2, ("lisa", "every"): 3, ("offload", "to"): "disk",
    ("houlsby", "act"): "tanh", ("parallel", "act"): "tanh", ("pfeiffer", "act"): "tanh",
    ("adam8bit", "eps"): 1e-2, ("adam4bit", "eps"): 1e-2, ("adamw", "eps"): 1e-2,
    ("lion", "betas"): (0.5, 0.9), ("lora", "b_rate"): 16.0, ("shira", "rank"): 2,
    ("checkpoint", "every"): 2, ("galore", "every"): 2, ("galore", "rank"): 2,
    ("lora", "dropout"): 0.3, ("dora", "dropout"): 0.3, ("parallel", "dropout"): 0.3,
    ("sgd", "weight_decay"): 0.1, ("sgd", "momentum"): 0.5, ("lion", "weight_decay"): 0.5,
    ("mezo", "weight_decay"): 0.5, ("lokr", "factor"): 4, ("oft", "bound"): 0.01,
    ("oft", "terms"): 5, ("corda", "samples"): 2, ("eva", "samples"): 2,
    ("eva", "tolerance"): -1.0, ("eva", "rho"): 1.0, ("corda", "alpha"): 8.0,
}
#: what a setting needs beside it to have anything to act on
BESIDE = {
    ("sgd", "nesterov"): {"momentum": 0.9}, ("sgd", "state"): {"momentum": 0.9},
    ("lisa", "seed"): {"layers": 1}, ("lisa", "every"): {"layers": 1},
    ("lisa", "state_on_leave"): {"layers": 1}, ("snella", "cooldown"): {"rounds": 6},
    ("lokr", "decompose_both"): {"rank": 1}, ("lokr", "alpha"): {"rank": 1},
    ("galore", "at_refresh"): {"every": 2},
    ("adalora", "warmup"): {"every": 1},
}
GROWS = {"warmup": 1, "every": 1, "top": 2, "rank": 6, "init_rank": 1}
BESIDE |= {("increlora", n): {k: v for k, v in GROWS.items() if k != n}
           for n in ("rank", "top", "warmup", "every", "preserve", "advance", "grow")}
OTHER |= {("increlora", "rank"): 2, ("increlora", "top"): 1, ("increlora", "warmup"): 3,
          ("increlora", "every"): 3}
#: what cannot be seen in one process on the host, with the reason
UNSEEN = {
    ("offload", "folder"): "where files lie: tests/blocks/test_saved",
    ("offload", "to"): "the host and the disk are both outside the ledger of a host run",
    ("offload", "threshold"): "on the host nothing moves",
    ("mezo", "mode"): "the same numbers, another peak: tests/methods/test_mezo",
    ("galore", "in_backward"): "the same numbers, another peak: tests/methods/test_galore",
    ("distill", "adapter"): "names another adapter: tests/methods/test_distill",
    ("o_lora", "weight"): "a penalty on earlier adapters: tests/methods/test_o_lora",
    ("o_lora", "norm"): "a penalty on earlier adapters: tests/methods/test_o_lora",
    ("loraprune", "spare"): "of two blocks none is left to prune: tests/methods/test_loraprune",
    ("apollo", "scale_front"): "a limit of growth is relative, so a fixed factor commutes with it: "
                               "only rounding differs; tests/methods/test_apollo",
    ("soup", "kind"): "works on checkpoints: tests/blocks/test_taskvector",
    ("task_arithmetic", "scale"): "works on checkpoints: tests/blocks/test_taskvector",
}
HOSTS = {("pfeiffer", "placement"): "bert", ("prompt_tuning", "ids"): "bert"}


def host(method: str, name: str) -> str:
    if (method, name) in HOSTS:
        return HOSTS[method, name]
    return next(m for m in ("vit", "bert", "llama", "cnn")
                if conformance.refusal(method, m) is None)


def other(method: str, name: str):
    """Another legal value of a setting."""
    if (method, name) in OTHER:
        return OTHER[method, name]
    cls = registry.find(method)
    hint = typing.get_type_hints(cls)[name]
    now = small(method).get(name, next(f.default for f in fields(cls) if f.name == name))
    if typing.get_origin(hint) is typing.Literal:
        return next(v for v in typing.get_args(hint) if v != now)
    if isinstance(now, bool):
        return not now
    if isinstance(now, int):
        return now // 2 if now > 2 else now + 2
    if isinstance(now, tuple):
        return (0.5, 0.9)
    assert isinstance(now, float), f"give {method}.{name} another value in OTHER"
    return now / 2 if now else 0.1


def several(batch):
    """Batches to read beforehand: more than one, and not the same."""
    for n in range(1, 5):
        yield {k: v.sin() * n if v.is_floating_point() else v.roll(n, -1)
               for k, v in batch.items()}
        batch = {k: v.roll(n, -1) for k, v in batch.items()}


def small(method: str) -> dict:
    part = burnish.parse(conformance.recipe(method))[-1]
    return part.changed()


@lru_cache(maxsize=256)
def seen(method: str, model: str, settings: tuple) -> tuple:
    """What a run shows: starts, outputs in training, kept bytes, weights after some steps."""
    net, batch = tiny(model)
    *before, last = conformance.recipe(method).split(" + ")
    part = type(burnish.parse(last)[0])(**(small(method) | dict(settings)))
    tuned = burnish.tune(net, [*before, part], head=True, calibration=list(several(batch)))
    tuned.total_steps = STEPS
    tuned.optimizer(lr=1e-2)
    start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    losses = []
    torch.manual_seed(3)
    with Ledger(net) as ledger:
        loss = tuned.loss(batch)
        kept = sum(e.bytes for e in ledger.entries
                   if e.death is None and ledger.category(e) != "weights")
    del loss
    for _ in range(STEPS):
        losses.append(tuned.step(batch).detach().clone())
    end = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    stored = sum(b.numel() * b.element_size() for b in net.buffers())
    return start, losses, end, kept, stored


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("method, name", [s for s in SETTINGS if s not in UNSEEN],
                         ids=lambda x: x)
def test_a_setting_acts_or_is_refused(method, name):                     # findings 3.5
    model, beside = host(method, name), BESIDE.get((method, name), {})
    plain = seen(method, model, tuple(beside.items()))
    again = {**beside, name: other(method, name)}
    assert small(method).get(name) != again[name]
    changed = seen(method, model, tuple(again.items()))
    assert not same(plain, changed), f"{method}({name}={again[name]!r}) changes nothing"


def test_a_run_repeats_itself():
    """What the comparison stands on: without a change nothing differs."""
    seen.cache_clear()
    first = seen("lora", "vit", (("dropout", 0.3),))
    seen.cache_clear()
    assert same(first, seen("lora", "vit", (("dropout", 0.3),)))


def test_what_is_left_out_exists():
    assert {*UNSEEN, *OTHER, *BESIDE, *HOSTS} <= {
        (e.name, f.name) for e in burnish.methods() for f in fields(e.cls)}
