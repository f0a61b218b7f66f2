"""Random small programs under the tape: gradients are those of the untouched program.

A program is a list of steps over a growing list of tensors: linears (plain and tuned), norms,
activations, dropout, views, and changes in place, before and after somebody has read the tensor.
Where stock torch refuses a program, ours refuses it too, or gives what it gives when every kept
tensor is a copy. `BURNISH_EXAMPLES` multiplies the number of programs.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint as foreign

import burnish
from burnish.blocks.tape.executor import checkpoint
from burnish.blocks.tape.offload import Offload
from burnish.blocks.tape.saved import Tape
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.provided import Weighted, linear
from burnish.core.site import Place

MORE = int(os.environ.get("BURNISH_EXAMPLES", "1"))
N, D = 4, 8


class Parts(nn.Module):
    """What programs are made of. tuned: linears with an update run through our function."""

    def __init__(self, dtype):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.fc = nn.Linear(D, D, dtype=dtype), nn.Linear(D, D, dtype=dtype)
            self.base = nn.Parameter(torch.randn(D, D, dtype=dtype) / 3, requires_grad=False)
            self.chain = Chain(Place("x", "weight", "linear", D, D), 2, 0.7, dtype=dtype)
            nn.init.normal_(self.chain.B, std=0.3)
            self.norm, self.gain = nn.LayerNorm(D, dtype=dtype), nn.Parameter(
                torch.rand(D, dtype=dtype) + 0.5)
            self.group = nn.GroupNorm(2, D, dtype=dtype)
            self.batch = nn.BatchNorm1d(D, dtype=dtype)
            turns = torch.randn(4, dtype=torch.complex128 if dtype == torch.float64
                                else torch.complex64)
            self.register_buffer("turns", turns)
        self.op = Weighted(lambda: self.base, [(self.chain, 1.0)])
        self.tuned = False

    def lora(self, h):
        if self.tuned:
            return linear(h, self.op, None)
        if torch.is_autocast_enabled("cpu"):     # the same operations in the same precision
            h = h.to(torch.get_autocast_dtype("cpu"))
            with torch.autocast("cpu", enabled=False):
                return linear(h, self.op, None)
        return F.linear(h, self.op.dense(self.base))


def rotate(m, a, b):
    z = torch.view_as_complex(a.reshape(-1, 4, 2)) * m.turns
    return torch.view_as_real(z).flatten(1)


def turned(m, a, b):
    z = torch.view_as_complex(a.reshape(-1, 4, 2).contiguous())
    return (z * z.conj()).real.repeat(1, 2)


#: steps that make a tensor from tensors of shape (n, 8)
MAKE = {
    "linear": lambda m, a, b: m.fc(a),
    "tuned": lambda m, a, b: m.lora(a),
    "layer_norm": lambda m, a, b: m.norm(a),
    "rms_norm": lambda m, a, b: F.rms_norm(a, (D,), m.gain),
    "group_norm": lambda m, a, b: m.group(a),
    "batch_norm": lambda m, a, b: m.batch(a),
    "gelu": lambda m, a, b: F.gelu(a),
    "silu": lambda m, a, b: F.silu(a),
    "softplus": lambda m, a, b: F.softplus(a),
    "leaky": lambda m, a, b: F.leaky_relu(a, 0.1),
    "tanh": lambda m, a, b: a.tanh(),
    "exp": lambda m, a, b: a.clamp(-2, 2).exp(),
    "sigmoid": lambda m, a, b: a.sigmoid(),
    "relu": lambda m, a, b: F.relu(a),
    "dropout": lambda m, a, b: F.dropout(a, 0.3, True),
    "times two": lambda m, a, b: a * 2,
    "times gain": lambda m, a, b: m.gain * a,
    "product": lambda m, a, b: a * b if a.shape == b.shape else a * b.mean(),
    "square": lambda m, a, b: (a * 0.5).square(),
    "addcmul": lambda m, a, b: torch.addcmul(m.gain, a, m.gain),
    "sum": lambda m, a, b: a + b if a.shape == b.shape else a + b.sum(),
    "matmul": lambda m, a, b: (a @ b.t()).tanh() @ b,
    "rotary": rotate,
    "conjugate": turned,
    "wide": lambda m, a, b: a.float().double() if a.dtype == torch.float64 else a.double().float(),
    "cut off": lambda m, a, b: a.detach(),
    "without a graph": lambda m, a, b: torch.no_grad()(F.gelu)(a) + a,
    "rows": lambda m, a, b: a[1:] if len(a) > 2 else a,
    "half": lambda m, a, b: a.chunk(2)[0] if len(a) > 2 else a,
    "turned around": lambda m, a, b: (m.fc(a).t() * 2).t(),
    "reshaped": lambda m, a, b: a.reshape(-1, 2, D // 2).transpose(1, 2).reshape(-1, D),
    "expanded": lambda m, a, b: a[:1].expand(N, D),
    "view": lambda m, a, b: a.view(a.shape),
    "alias": lambda m, a, b: a,
}


def quietly(fn):
    def change(m, a, b):
        with torch.no_grad():
            fn(a)
    return change


def setting(where, value):
    def change(m, a, b):
        a[where] = value if value is not None else b[: len(a[where])]
    return change


#: steps that change a tensor in place
CHANGE = {
    "add_": lambda m, a, b: a.add_(0.5),
    "mul_": lambda m, a, b: a.mul_(0.5),
    "+=": lambda m, a, b: a.__iadd__(b if a.shape == b.shape else 1),
    "*=": lambda m, a, b: a.__imul__(b if a.shape == b.shape else 2),
    "masked_fill_": lambda m, a, b: a.masked_fill_(a.detach() > 0.3, 0.1),
    "column = 0": setting((slice(None), 0), 0.0),
    "row = row": setting(slice(0, 1), None),
    "copy_": lambda m, a, b: a.copy_(b if a.shape == b.shape else b.mean()),
    "clamp_": lambda m, a, b: a.clamp_(-0.5, 0.5),
    "sigmoid_": lambda m, a, b: a.sigmoid_(),
    "tanh_": lambda m, a, b: torch.tanh_(a),
    "relu inplace": lambda m, a, b: F.relu(a, inplace=True),
    "leaky inplace": lambda m, a, b: F.leaky_relu(a, 0.1, True),
    "silu inplace": lambda m, a, b: F.silu(a, inplace=True),
    "dropout inplace": lambda m, a, b: F.dropout(a, 0.3, True, inplace=True),
    "view add_": lambda m, a, b: a[1:].add_(1),
    "transposed mul_": lambda m, a, b: a.t()[1:3].mul_(-1),
    "index_fill_": lambda m, a, b: a.index_fill_(1, torch.tensor([1, 2]), 0.2),
    "quiet mul_": quietly(lambda a: a.mul_(0.7)),
    "quiet out": quietly(lambda a: torch.mul(a, 3, out=a)),
    "detached add_": lambda m, a, b: a.detach().add_(1),
    "data zero_": lambda m, a, b: a.data.zero_(),
    "foreach": quietly(lambda a: torch._foreach_add_([a], 1.0)),
    "operator": quietly(lambda a: torch.ops.aten.add_.Scalar(a, 1.0)),
}
STEPS = sorted(MAKE) + sorted(CHANGE)


@st.composite
def programs(draw):
    """Steps (name, which tensor, which other); the latest tensors are the likeliest."""
    back = st.integers(0, 3)
    one = st.tuples(st.one_of(st.sampled_from(sorted(MAKE)), st.sampled_from(sorted(CHANGE))),
                    back, back)
    return draw(st.lists(one, min_size=2, max_size=9))


def play(program, m, x):
    """Run a program; the loss reads what is left of every tensor."""
    made = [m.first(x)]
    for name, i, j in program:
        a, b = made[-1 - i % len(made)], made[-1 - j % len(made)]
        if name in MAKE:
            made.append(MAKE[name](m, a, b))
        else:
            CHANGE[name](m, a, b)
    last = m.fc(made[-1])
    return last.double().pow(2).sum() + sum(t.double().sin().sum() for t in made[1::2])


class Refused(Exception):
    """Stock torch, or we, refuse the program; where: "forward" or "backward"."""

    def __init__(self, where, why):
        super().__init__(f"{where}: {why}")
        self.where = where


def gradients(run, m, x):
    """Gradients of the input and of everything that trains."""
    torch.manual_seed(7)
    m.batch.reset_running_stats()
    x = x.clone().requires_grad_()
    wanted = [x, *(p for p in m.parameters() if p.requires_grad)]
    try:
        loss = run(x)
    except RuntimeError as e:
        raise Refused("forward", e) from e
    try:
        return torch.autograd.grad(loss, wanted, allow_unused=True)
    except RuntimeError as e:
        raise Refused("backward", e) from e


def copies():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


# -- the ways a program runs ----------------------------------------------------------------------
def alone(program, m, policy=None):
    def run(x):
        with Tape(policy=policy).recording():
            return play(program, m, x)
    return run


def on_disk(program, m):
    return alone(program, m, Offload("disk", threshold=1))


def in_a_block(program, m):
    tape = Tape()

    def run(x):
        with tape.recording():
            return checkpoint(m, lambda x: play(program, m, x), (x,), {}, tape)
    return run


def recomputed_by_torch(program, m):
    tape = Tape()

    def fn(x):
        with tape.recording():
            return play(program, m, x)

    return lambda x: foreign(fn, x, use_reentrant=False)


MODES = {"alone": (alone, 110), "on disk": (on_disk, 25), "in a block": (in_a_block, 50),
         "recomputed by torch": (recomputed_by_torch, 50)}
seen = Counter()


def judge(program, mode, autocast=False):
    """Compare one program with its untouched run."""
    dtype = torch.float32 if autocast else torch.float64
    m, x = Parts(dtype), torch.linspace(-2, 2, N * D, dtype=dtype).view(N, D).sin()
    wrap = (lambda f: lambda x: torch.autocast("cpu", torch.bfloat16)(f)(x)) if autocast \
        else (lambda f: f)

    def stock(x):
        return play(program, m, x)

    m.tuned, want, refused = False, None, None
    try:
        want = gradients(wrap(stock), m, x)
    except Refused as e:
        refused = e
        if e.where == "backward":
            with copies():
                want = gradients(wrap(stock), m, x)
    m.tuned = True
    try:
        got = gradients(wrap(mode(program, m)), m, x)
    except Refused as e:
        seen["both refuse" if refused else "we alone"] += 1
        if refused is None:
            raise AssertionError(f"stock runs it, we say {e}") from e
        return
    seen["right" if refused is None else "right where stock refuses"] += 1
    assert want is not None, f"stock says {refused}"
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        if autocast:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def bounded(examples):
    return settings(max_examples=examples * MORE, deadline=None, derandomize=MORE == 1,
                    database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", MODES)
def test_random_programs_have_the_gradients_of_the_untouched_program(name):   # findings 1.1
    mode, examples = MODES[name]
    seen.clear()

    @bounded(examples)
    @given(programs())
    def run(program):
        judge(program, mode)

    run()
    # the programs show something: most of them run, and change what is kept
    assert seen["right"] > 0.4 * seen.total(), seen


@pytest.mark.parametrize("name", ["alone", "in a block"])
def test_random_programs_under_autocast_repeat_the_same_operations(name):
    @bounded(30)
    @given(programs())
    def run(program):
        judge(program, MODES[name][0], autocast=True)

    run()


COMPILED = {
    "changed behind a note": [("gelu", 0, 0), ("+=", 0, 0), ("linear", 0, 0)],
    "argument changed": [("times two", 0, 0), ("linear", 0, 0), ("add_", 2, 0), ("silu", 0, 0)],
    "views": [("layer_norm", 0, 0), ("reshaped", 0, 0), ("relu inplace", 0, 0), ("rows", 0, 0)],
}


class Program(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.parts, self.program = Parts(torch.float64), program

    def forward(self, x):
        return play(self.program, self.parts, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_programs_have_the_gradients_of_the_untouched_program(name):
    x = torch.linspace(-2, 2, N * D, dtype=torch.float64).view(N, D).sin()
    stock, model = Program(COMPILED[name]), Program(COMPILED[name])
    tuned = burnish.tune(model, "lora(rank=2)", targets="parts.fc", head=False)
    run = torch.compile(model, backend="aot_eager")
    grads = [torch.autograd.grad(f(t), t)[0] for f, t in
             ((stock, x.clone().requires_grad_()), (run, x.clone().requires_grad_()))]
    assert list(tuned.parameters())
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
