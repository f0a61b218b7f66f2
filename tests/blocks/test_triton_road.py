"""Which road is taken, and what is said of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.blocks.gpu import road
from burnish.core.errors import ConfigError


@pytest.fixture
def fresh(monkeypatch):
    """Nothing asked for, and nothing remembered of what this machine has."""
    monkeypatch.delenv(road.VARIABLE, raising=False)
    for known in (road.missing, road.interpreted):
        known.cache_clear()
    yield
    for known in (road.missing, road.interpreted):
        known.cache_clear()


def test_a_cpu_takes_torch_s_operators(fresh):
    assert road.refusal(torch.ones(2)) == "on cpu, and Triton's kernels are for cuda"
    assert road.refusal(torch.ones(2, device="meta")).startswith("on meta")


def test_cuda_takes_them_where_they_are_asked_for(fresh, monkeypatch):
    like = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    assert road.refusal(like) == "BURNISH_KERNELS=triton was not asked for"
    monkeypatch.setattr(road, "_PLAIN", (SimpleNamespace,))
    monkeypatch.setattr(road, "missing", lru_cache(lambda kind, index: ""))
    with road.use("triton"):
        assert road.refusal(like) == ""


def test_asked_for_by_name_the_interpreter_runs_on_a_cpu(fresh):
    with road.use("triton"):
        assert road.interpreted() and road.refusal(torch.ones(2)) == ""
        assert road.refusal(torch.ones(2, device="meta")).startswith("on meta")
        with road.use("torch"):
            assert road.refusal(torch.ones(2)) == "on cpu, and Triton's kernels are for cuda"
        assert road.refusal(torch.ones(2)) == ""
    assert road.refusal(torch.ones(2)) != ""


def test_the_environment_asks_too(fresh, monkeypatch):
    monkeypatch.setenv(road.VARIABLE, "triton")
    assert road.refusal(torch.ones(2)) == ""
    with road.use("torch"):
        assert road.refusal(torch.ones(2)) != ""
    monkeypatch.setenv(road.VARIABLE, "tritn")
    with pytest.raises(ConfigError, match="BURNISH_KERNELS: 'tritn' is no road.*triton"):
        road.refusal(torch.ones(2))
    with pytest.raises(ConfigError, match="'cuda' is no road; expected one of torch, triton"), \
            road.use("cuda"):
        pass


@pytest.mark.parametrize("like, why", [
    (lambda: torch.ones(2, dtype=torch.float64), "in float64"),
    (lambda: torch.ones(2, dtype=torch.int64), "in int64"),
    (lambda: FakeTensorMode().from_tensor(torch.ones(2)), "a FakeTensor is no plain tensor"),
])
def test_what_the_kernels_do_not_take_is_said(fresh, like, why):
    with road.use("triton"):
        assert road.refusal(like()).startswith(why)
        if "plain" in why:
            assert road.refusal(torch.ones(2), like()).startswith(why)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_precisions_they_take(fresh, dtype):
    with road.use("triton"):
        assert road.refusal(torch.nn.Parameter(torch.ones(2, dtype=dtype)),
                            torch.ones(2, dtype=torch.uint8)) == ""


def test_transforms_and_compiled_graphs_take_torch_s(fresh, monkeypatch):
    told = []

    def f(x):
        told.append(road.refusal(torch.ones(2)))
        return x.sum()

    with road.use("triton"):
        torch.func.grad(f)(torch.ones(2))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        f(torch.ones(2))
    assert told == ["under a transform", "inside a compiled graph"]


def test_who_asks_for_what_this_machine_lacks_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with road.use("triton"), pytest.raises(ConfigError, match="set TRITON_INTERPRET=1 before"):
        road.refusal(torch.ones(2))
    road.missing.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "triton" else find(n))
    with road.use("triton"), pytest.raises(ConfigError, match="triton is not installed"):
        road.refusal(torch.ones(2))


@pytest.mark.parametrize("capability, hip, why", [
    ((7, 5), None, "Turing has capability 7.5, and Triton compiles for 8.0 and newer"),
    ((8, 0), None, ""), ((9, 0), None, ""), ((9, 0), "6.4", "they were never run on ROCm"),
])
def test_what_a_gpu_lacks(fresh, monkeypatch, capability, hip, why):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Turing")
    monkeypatch.setattr(torch.version, "hip", hip)
    assert road.missing("cuda", 0) == why


def test_triton_is_loaded_when_a_kernel_runs_and_not_before():
    code = ("import sys, torch, burnish\nfrom burnish.blocks.weight.quantise import nf4_encode\n"
            "burnish.methods(); nf4_encode(torch.ones(4, 4)).decode()\n"
            "print('triton' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_blocks_are_powers_of_two():
    assert [road.blocks(n, 64) for n in (0, 1, 16, 17, 33, 64, 65, 1000)] == \
        [16, 16, 16, 32, 64, 64, 64, 64]


def test_a_launch_is_on_its_tensor_s_device_and_contracts_nothing(monkeypatch):
    """K that two kernels make has the same bits only without contraction."""
    told, where = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **meta: told.append((grid, args, meta))

    class On:
        def __init__(self, device):
            where.append(device)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return None

    class There:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", On)
    x, there = torch.ones(1), There()
    for n, first in ((0, x), (1, x), (2, there)):
        road.launch(Kernel(), n, first, 5, num_stages=2)
    options = {"enable_fp_fusion": False, "num_stages": 2}
    assert told == [((1,), (x, 5), options), ((2,), (there, 5), options)]
    assert where == [There.device]
