"""Updates written as a path of activations, with no recipe, against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.weight.panels import PANEL, Panels
from burnish.blocks.weight.path import Path
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.triplets import Triplets
from burnish.blocks.weight.within import Within
from burnish.core.site import Place

N, IN, OUT, RANK = 4, 5, 7, 3


class Gates(Path):
    """``Delta = diag(b) U diag(a)``, a and b train; with `first`, ``Delta = diag(b) U diag(a) F``
    for a frozen F (RANK, IN) that stands before everything."""

    def __init__(self, first=False, drop=0.0):
        super().__init__()
        torch.manual_seed(0)
        wide = RANK if first else IN
        self.inp, self.drop = IN, drop
        self.a, self.b = nn.Parameter(torch.randn(wide)), nn.Parameter(torch.randn(OUT))
        self.register_buffer("U", torch.randn(OUT, wide))
        self.register_buffer("F", torch.randn(RANK, IN) if first else None)
        self.double()

    into = property(lambda self: self.F)
    draws = property(lambda self: self.training and self.drop > 0)

    def path(self, h):
        h = F.dropout(h, self.drop, self.training)
        return ((h * self.a.to(h.dtype)) @ self.U.t().to(h.dtype)) * self.b.to(h.dtype)


class One(Path):
    """``Delta = b 1^T``: a single tensor, and nothing said of drawing."""

    def __init__(self):
        super().__init__()
        self.inp, self.b = IN, nn.Parameter(torch.randn(OUT, dtype=torch.float64))

    def path(self, h):
        return h.sum(1, keepdim=True) * self.b.to(h.dtype)


class Idle(Path):
    """Has tensors that it does not read; of h it reads where `reads`, and is nothing elsewhere."""

    def __init__(self, reads):
        super().__init__()
        self.inp, self.of_h = IN, reads
        self.a = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(OUT, dtype=torch.float64))

    def path(self, h):
        if self.of_h:
            return h.sum(1, keepdim=True) * self.b
        return h.new_zeros(h.shape[0], OUT)


def delta(term):
    D = torch.diag(term.b) @ term.U @ torch.diag(term.a)
    return D if term.F is None else D @ term.F


def numbers(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ran(term, x, scale=1.0, want_x=True, give_x=True):
    """(y, dx, gradients of theta, what was kept) of one forward and backward as a linear has it."""
    y, g = torch.ones(N, OUT, dtype=torch.float64), numbers(N, OUT, seed=2)
    dx = torch.ones(N, IN, dtype=torch.float64) if want_x else None
    kept = term.forward_(x, y, scale)
    assert not y.requires_grad
    with torch.no_grad():
        grads = term.backward_(g, x if give_x else None, kept, dx, scale)
    return y - 1, None if dx is None else dx - 1, grads, kept


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("train", ["ab", "a", "b", ""])
@pytest.mark.parametrize("want_x", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.0, -0.3])
@pytest.mark.parametrize("first", [False, True])
def test_tokens_get_the_scaled_update_and_its_gradients(first, scale, want_x, train):
    """Whether another term of the layer keeps its input or nobody does."""
    term, x = Gates(first), numbers(N, IN)
    for name in "ab":
        getattr(term, name).requires_grad_(name in train)
    leaf = x.clone().requires_grad_(want_x)
    want = scale * leaf @ delta(term).t()
    asked = [t for t in (leaf, *term.parameters()) if t.requires_grad]
    ref = torch.autograd.grad(want, asked, numbers(N, OUT, seed=2)) if asked else ()
    for give_x in (True, False)[:1 + (not term.keeps_input)]:
        y, dx, grads, _ = ran(term, x, scale, want_x, give_x)
        near(y, want.detach())
        assert (dx is not None) == want_x
        assert [g is not None for g in grads] == [t.requires_grad for t in term.parameters()]
        got = [t for t in (dx, *grads) if t is not None]
        for a, b in zip(got, ref, strict=True):
            near(a, b)


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN), (2, 1, 3, IN)])
@pytest.mark.parametrize("first", [False, True])
def test_its_plain_form_and_its_matrix_are_the_update(first, shape):
    """Differentiable in x and in every tensor, for any leading shape."""
    term, x = Gates(first), numbers(*shape).requires_grad_()
    g, theta = numbers(*shape[:-1], OUT, seed=2), [x, *term.parameters()]
    want = torch.autograd.grad(x @ delta(term).t(), theta, g)
    near(term.plain(x).detach(), (x @ delta(term).t()).detach())
    near(term.dense().detach(), delta(term).detach())
    for y in (term.plain(x), x @ term.dense().t()):
        for a, b in zip(torch.autograd.grad(y, theta, g), want, strict=True):
            near(a, b)


def test_the_matrix_is_in_the_precision_of_its_tensors_be_it_of_one_alone():
    one = One()
    near(one.dense().detach(), one.b.detach().unsqueeze(1).expand(OUT, IN))
    assert one.float().dense().dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_the_matrix_has_no_dropout_and_training_goes_on_as_before(training):
    term = Gates(drop=0.5).train(training)
    near(term.dense().detach(), delta(term).detach())
    assert term.training is training


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("first", [False, True])
def test_dropout_is_drawn_again_in_backward_and_nobody_notices(first, scale):
    """The mask of forward, whatever was drawn in between; the generator stands as it stood."""
    term, x, g = Gates(first, drop=0.5), numbers(N, IN), numbers(N, OUT, seed=2)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    want = scale * term.plain(leaf)
    ref = torch.autograd.grad(want, [leaf, *term.parameters()], g)
    torch.manual_seed(5)
    y, dx = torch.zeros(N, OUT, dtype=torch.float64), torch.zeros_like(x)
    kept = term.forward_(x, y, scale)
    torch.rand(11)
    before = torch.get_rng_state()
    grads = term.backward_(g, x if term.keeps_input else None, kept, dx, scale)
    assert torch.equal(torch.get_rng_state(), before)
    near(y, want.detach())
    for a, b in zip([dx, *grads], ref, strict=True):
        near(a, b)


@pytest.mark.parametrize("train", [True, False])
def test_what_waits_for_backward(train):
    """x, or its product with the frozen matrix alone; generator states where the path draws."""
    x = numbers(N, IN)

    def of(term):
        for p in term.parameters():
            p.requires_grad_(train)
        kept = term.forward_(x, torch.zeros(N, OUT, dtype=torch.float64), 1.0)
        return term.keeps_input, kept

    for term in (Gates(), One()):
        assert of(term) == (train, (None, None))
    keeps, (h, state) = of(Gates(first=True))
    assert keeps is False and state is None
    if train:
        near(h, x @ Gates(first=True).F.t())
    else:
        assert h is None
    keeps, (h, state) = of(Gates(drop=0.5))
    assert keeps is True and h is None and state is not None
    keeps, (h, state) = of(Gates(first=True, drop=0.5))
    assert keeps is False and (h is not None) == train and state is not None


def test_a_path_that_says_nothing_of_drawing_draws_nothing():
    assert One().draws is False and One().into is None


def test_tensors_that_the_path_does_not_read_have_no_gradient():
    x, g = numbers(N, IN), numbers(N, OUT, seed=2)
    _, dx, grads, _ = ran(Idle(reads=True), x)
    assert grads[0] is None
    near(grads[1], (g * x.sum(1, keepdim=True)).sum(0))
    for want_x in (True, False):
        y, dx, grads, _ = ran(Idle(reads=False), x, want_x=want_x)
        assert grads == [None, None] and not y.any() and (dx is None or not dx.any())


def test_a_scale_of_one_makes_no_further_gradient():
    """The gradient of the result is as wide as the result: no copy of it is made for nothing."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mul.Tensor and not isinstance(args[1], torch.Tensor):
                seen.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    for scale, made in ((1.0, 0), (2.0, 1)):
        seen.clear()
        with Watch():
            ran(One(), numbers(N, IN), scale)
        assert len(seen) == made


@pytest.mark.parametrize("first", [False, True])
def test_in_a_layer_it_works_on_tokens_and_keeps_one_of_x_and_its_product(first):
    term, W = Gates(first), numbers(OUT, IN, seed=3)
    x, g = numbers(2, 3, IN).requires_grad_(), numbers(2, 3, OUT, seed=2)
    want = x @ (W + 0.3 * delta(term)).t()
    ref = torch.autograd.grad(want, [x, *term.parameters()], g)
    y = linear(x, Weighted(lambda: W, [(term, 0.3)]), None)
    kept = [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None]
    near(y.detach(), want.detach())
    for a, b in zip(torch.autograd.grad(y, [x, *term.parameters()], g), ref, strict=True):
        near(a, b)
    assert (6, RANK) in kept if first else (2, 3, IN) in kept
    assert not (first and (2, 3, IN) in kept)


@pytest.mark.parametrize("first", [False, True])
def test_a_tensor_changed_in_place_before_backward_is_refused(first):
    """Backward runs the path again: on other numbers it would be another path's gradient."""
    term, x = Gates(first), numbers(N, IN)
    y = linear(x, Weighted(lambda: numbers(OUT, IN, seed=3), [(term, 1.0)]), None)
    with torch.no_grad():
        term.a.mul_(2)
    with pytest.raises(RuntimeError, match=r"a \(\d,\) of a Gates"):
        y.sum().backward()


def test_a_function_of_the_weight_runs_the_path_once_however_many_panels_there_are():
    """A panel of a path is cut from the whole update: cut into n it would be made n times."""
    many = PANEL // OUT + 1                                         # inputs: more than one panel
    W = torch.zeros(()).expand(OUT, many)
    cheap = Triplets(Place("0", "weight", "linear", OUT, many), 1, 1.0)
    for term, panels in ((cheap, 2), (One(), 1)):
        for one in (term, Within(term, (0, OUT), OUT)):
            assert len(Panels(W, [(one, 1.0)], [None]).ranges()) == panels
