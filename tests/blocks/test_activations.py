"""Activations that write over a gradient, and are made again strip by strip: stock gradients."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.tape import activations
from burnish.blocks.tape.activations import KNOWN, Strips, strips
from burnish.blocks.tape.saved import Tape

FUNCTIONS = [(F.gelu, {}), (F.gelu, {"approximate": "tanh"}), (F.silu, {})]


def lean(fn, *args):
    with Tape().recording():
        return fn(*args)


def both(build, x):
    """(value, gradients of x) by stock torch and under the tape."""
    found = []
    for run in (lambda f, *a: f(*a), lean):
        x1 = x.clone().requires_grad_()
        y = run(build, x1)
        found.append((y.detach(), torch.autograd.grad(y.sum(), x1)[0]))
    return found


def written(monkeypatch):
    """How often a backward wrote over its gradient, from now on."""
    count = []
    for func, known in list(KNOWN.items()):
        def back(*args, known=known, **kwargs):
            count.append("grad_input" in kwargs)
            return known.back(*args, **kwargs)
        monkeypatch.setitem(KNOWN, func, known._replace(back=back))
    return count


@pytest.mark.parametrize("func,kwargs", FUNCTIONS)
def test_values_and_gradients_are_stock_bit_for_bit(func, kwargs, monkeypatch):
    count = written(monkeypatch)
    W = torch.randn(5, 7, dtype=torch.float64)
    stock, ours = both(lambda x: func(x, **kwargs) @ W.t(), torch.randn(4, 7, dtype=torch.float64))
    assert torch.equal(stock[0], ours[0]) and torch.equal(stock[1], ours[1])
    # one product, one node: it was written over, where torch counts references
    assert count == [hasattr(torch.Tensor, "_use_count")]


HELD = {
    "another branch": lambda y, keep: y.sin().sum() + (y + 1).pow(2).sum(),
    "a sum of two": lambda y, keep: (y + y.detach() * 2 + y).mul(3).sum(),
    "its own gradient kept": lambda y, keep: y.retain_grad() or keep.append(y) or y.pow(2).sum(),
    "a hook that keeps it": lambda y, keep: y.register_hook(keep.append) and y.pow(2).sum(),
    "a hook that keeps a row": lambda y, keep: y.register_hook(lambda g: keep.append(g[0]))
    and y.pow(2).sum(),
    "a hook on the node": lambda y, keep: y.grad_fn.register_prehook(
        lambda gs: keep.append(gs[0])) and y.pow(2).sum(),
    "a hook behind the node": lambda y, keep: y.grad_fn.register_hook(
        lambda ins, outs: keep.append(outs[0])) and y.pow(2).sum(),
}


@pytest.mark.parametrize("how", HELD)
@pytest.mark.parametrize("func,kwargs", FUNCTIONS)
def test_a_gradient_that_somebody_else_has_stays_as_it_was(how, func, kwargs):
    x = torch.randn(4, 7, dtype=torch.float64)
    seen = []
    for run in (lambda f, *a: f(*a), lean):
        x1, keep = x.clone().requires_grad_(), []
        loss = run(lambda x, keep=keep: HELD[how](func(x, **kwargs), keep), x1)
        loss.backward()
        seen.append((x1.grad, [k.grad if k.requires_grad else k for k in keep]))
    (gx, kept), (hx, held) = seen
    assert torch.equal(gx, hx)
    assert len(kept) == len(held)
    for a, b in zip(kept, held, strict=True):
        assert torch.equal(a, b)


def test_a_gradient_given_to_backward_is_not_written_over():
    x, g = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
    was = g.clone()
    lean(F.gelu, x).backward(g)
    assert torch.equal(g, was)


def test_two_activations_of_one_sum_do_not_write_over_one_gradient():
    x = torch.randn(4, 7, dtype=torch.float64)
    stock, ours = both(lambda x: (F.gelu(x) + F.silu(2 * x) + F.gelu(3 * x)).pow(2), x)
    assert torch.equal(stock[1], ours[1])


def test_it_is_twice_differentiable():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for func, kwargs in FUNCTIONS:
        def run(x, func=func, kwargs=kwargs):
            return lean(lambda x: func(x, **kwargs), x)
        assert torch.autograd.gradgradcheck(run, x)


def test_parameters_in_place_and_graphs_kept_are_stock():
    x = torch.randn(4)
    assert torch.equal(torch.func.grad(lambda x: lean(F.gelu, x).sum())(x),
                       torch.func.grad(lambda x: F.gelu(x).sum())(x))
    assert torch.equal(lean(lambda x: F.gelu(input=x), x), F.gelu(x))
    p = nn.Parameter(torch.randn(4))
    assert torch.equal(torch.autograd.grad(lean(F.gelu, p).sum(), p)[0],
                       torch.autograd.grad(F.gelu(p).sum(), p)[0])
    x = torch.randn(4, 7, requires_grad=True)
    y = lean(lambda x: F.silu(x * 1, inplace=True), x)
    assert torch.equal(y, F.silu(x))
    W = torch.randn(7, 7)
    z = lean(lambda x: (F.gelu(x) @ W).sum(), x)
    first = torch.autograd.grad(z, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(z, x)[0])


# -- strip by strip -------------------------------------------------------------------------------
class Mlp(nn.Module):
    def __init__(self, act=F.gelu, width=32):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, width), nn.Linear(width, 8), act

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def mlp(act=F.gelu, width=32, level=1):
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(act, width), nn.Linear(8, 2)).double()
    burnish.tune(model, f"lora(rank=3) + lean(level={level})")
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model


def gradients(model, x):
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(model(x).pow(2).sum(), params)


def made(monkeypatch):
    """The rows of every strip from now on."""
    seen, was = [], Strips.__iter__

    def iterate(self):
        for n0, n1, rows in was(self):
            seen.append((n0, n1))
            yield n0, n1, rows
    monkeypatch.setattr(Strips, "__iter__", iterate)
    return seen


def test_a_strip_stays_in_the_cache_of_a_cpu_and_is_worth_a_launch_elsewhere():
    assert activations.STRIP == {"cpu": (8 << 20) // 4}
    assert activations.LONG_STRIP == (64 << 20) // 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("act, level", [
    (F.gelu, 1), (F.silu, 1), (lambda x: F.gelu(x, approximate="tanh"), 1), (F.gelu, 2),
    (F.relu, 2)])
def test_strips_give_the_gradients_of_the_whole(act, level, monkeypatch):
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    model = mlp(act, level=level)
    whole = gradients(model, x)
    monkeypatch.setitem(activations.STRIP, "cpu", 32 * 5)
    rows = made(monkeypatch)
    for a, b in zip(whole, gradients(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert rows == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 22)]


def test_the_output_never_stands_whole_in_backward(monkeypatch):
    x = torch.randn(64, 8, dtype=torch.float64)
    sizes = {}
    for strip in (1 << 21, 32 * 4):
        monkeypatch.setitem(activations.STRIP, "cpu", strip)
        model = mlp()
        sizes[strip] = widest(model, x)
    assert sizes[1 << 21] == 64 * 32 and sizes[32 * 4] == 4 * 32


def widest(model, x):
    """Elements of the largest output of a GELU while backward runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Outputs(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket is torch.ops.aten.gelu:
                self.largest = max(self.largest, out.numel())
            return out

    loss = model(x).pow(2).sum()
    with Outputs() as seen:
        loss.backward()
    return seen.largest


def test_an_output_that_others_read_as_well_is_made_once(monkeypatch):
    class Two(Mlp):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(32, 8)

        def forward(self, x):
            h = self.act(self.up(x))
            return self.down(h) + self.other(h)

    torch.manual_seed(0)
    model = nn.Sequential(Two(), nn.Linear(8, 2)).double()
    burnish.tune(model, "lora(rank=3)")
    x = torch.randn(22, 8, dtype=torch.float64)
    whole = gradients(model, x)
    monkeypatch.setitem(activations.STRIP, "cpu", 32 * 5)
    rows = made(monkeypatch)
    for a, b in zip(whole, gradients(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not rows


def test_a_graph_that_is_kept_goes_backward_twice_by_strips(monkeypatch):
    monkeypatch.setitem(activations.STRIP, "cpu", 32 * 5)
    model, x = mlp(), torch.randn(22, 8, dtype=torch.float64)
    params = [p for p in model.parameters() if p.requires_grad]
    loss = model(x).pow(2).sum()
    first = torch.autograd.grad(loss, params, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, params), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, params)


def test_a_changed_input_is_an_error_by_strips_too(monkeypatch):
    monkeypatch.setitem(activations.STRIP, "cpu", 32 * 5)
    kept = []

    def act(h):
        kept.append(h)
        return F.gelu(h)

    model, x = mlp(act), torch.randn(22, 8, dtype=torch.float64)
    loss = model(x).pow(2).sum()
    with torch.no_grad():
        kept[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|modified in place"):
        loss.backward()


@pytest.mark.parametrize("recipe", ["lora(rank=3, dropout=0.5)", "dora(rank=3)", "snella(rank=4)",
                                    "lora(rank=3) + bitfit", "lora(rank=3) + offload",
                                    "lora(rank=3) + coded(bits=8)", "lora(rank=3) + checkpoint"])
def test_what_needs_the_whole_gets_it(recipe, monkeypatch):
    """The same gradients with strips as without, whatever else reads or moves the output."""
    x = torch.randn(22, 8, dtype=torch.float64)
    found = []
    for strip in (1 << 21, 32 * 5):
        monkeypatch.setitem(activations.STRIP, "cpu", strip)
        torch.manual_seed(0)
        model = nn.Sequential(Mlp(), Mlp(), nn.Linear(8, 2)).double()
        burnish.tune(model, recipe)
        torch.manual_seed(1)
        found.append(gradients(model.train(), x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nothing_is_held_by_a_graph_that_has_gone(monkeypatch):
    monkeypatch.setitem(activations.STRIP, "cpu", 32 * 5)
    model, x = mlp(), torch.randn(22, 8, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (22, 32)]
    assert not alive


def test_what_is_no_note_of_an_activation_has_no_strips():
    assert strips(None) is None and strips(torch.ones(3)) is None
