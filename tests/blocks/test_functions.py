"""What every autograd function of ours keeps to, whichever method it serves: results that may be
changed in place, errors where backward would read what has changed, second derivatives and
transforms of torch.func right or refused.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.bottleneck import Bottleneck
from burnish.blocks.tape import replay
from burnish.blocks.tape.functions import once_differentiable
from burnish.blocks.tape.reversible import _Straight
from burnish.blocks.update.objective import Attached, Ride, Riding
from burnish.blocks.weight import masked
from burnish.blocks.weight.experts import ExpertChains, Product
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.integer import _OnGrid, grid_of
from burnish.blocks.weight.migrated import _Given, _Passed
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.turned import RoundedRows
from burnish.core.site import Place
from burnish.engine.objectives import _Notice
from burnish.testing.models import tiny

#: every way a method reaches a linear, a convolution or a state, with what makes it small
RECIPES = {
    "lora": "lora(rank=2)", "dropout": "lora(rank=2, dropout=0.4)", "frozen A": "lora(rank=2, "
    "train_a=False)", "dora": "dora(rank=2)", "pissa": "pissa(rank=2)",
    "adalora": "adalora(init_rank=2, rank=1)",
    "miss": "miss(rank=2)", "shira": "shira(rank=2)", "snell": "snell(rank=4)",
    "snella": "snella(rank=4)", "vera": "vera(rank=4)", "fact": "fact(rank=2)",
    "nf4": "nf4 + lora(rank=2)", "bf16 + dora": "bf16 + dora(rank=2)",
    "full + lora": "full + lora(rank=2)", "ssf": "ssf", "bitfit": "bitfit",
}
DELTAS = [n for n in RECIPES if n not in ("ssf", "bitfit")]
D = 8


class Model(nn.Module):
    """Every result of a linear is changed in place at once, where `inplace` says so."""

    def __init__(self, inplace=True):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.inplace = inplace

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        if self.inplace:
            q *= 0.5
            k[..., 0] = 0
            F.relu(k, inplace=True)
            h = self.out(q + k)
            h.add_(1)
            return h
        k = F.relu(torch.cat([torch.zeros_like(k[..., :1]), k[..., 1:]], -1))
        return self.out(q * 0.5 + k) + 1


def tuned(name, inplace=True, dtype=torch.float64, **kw):
    torch.manual_seed(0)
    model = Model(inplace).to(dtype)
    made = burnish.tune(model, RECIPES.get(name, name), head=False, **kw)
    for p in made.parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p), alpha=0.1)
    return made


def grads(t, x, params=None):
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    wanted = [x, *(t.parameters() if params is None else params)]
    return torch.autograd.grad(t.model(x).square().sum(), wanted, allow_unused=True)


def close(got, want, **kw):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **kw)


# -- results that may be changed ------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(5, D), (2, 3, D), (D,)], ids=["rows", "tokens", "one"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_a_tuned_layer_returns_may_be_changed_in_place(name, shape):     # findings 1.2
    if len(shape) == 1 and name in ("bf16 + dora", "snell"):
        shape = (1, D)
    x = torch.randn(shape, dtype=torch.float64)
    close(grads(tuned(name), x), grads(tuned(name, inplace=False), x))


@pytest.mark.parametrize("kind", ["bottleneck", "experts", "product", "balance"])
def test_what_a_branch_returns_may_be_changed_in_place(kind):                 # findings 1.2
    branch = {"bottleneck": lambda: Bottleneck(D, 4, init="bert"),
              "experts": lambda: ExpertChains(D, D, 3, 2, 2)}.get(kind)
    x = torch.randn(2, 3, D, requires_grad=True)
    w = torch.randn(4, D, requires_grad=True)
    run = branch() if branch else (lambda x: Product.apply(x, w)) if kind == "product" else \
        (lambda x: Attached.apply(x, w.sum(), 0.5, Riding()))
    with torch.no_grad():
        for p in getattr(run, "parameters", list)():
            p.add_(0.1)
    y = run(x)
    y[..., 0] = 0
    y.mul_(3).relu_()
    (got,) = torch.autograd.grad(y.square().sum(), x)
    z = run(x) * 3
    z = F.relu(torch.cat([torch.zeros_like(z[..., :1]), z[..., 1:]], -1))
    (want,) = torch.autograd.grad(z.square().sum(), x)
    torch.testing.assert_close(got, want)


def test_convolutions_and_fused_rows_may_be_changed_in_place():               # findings 1.2
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(True),
                             nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.1, True), nn.Flatten(),
                             nn.Linear(128, 4)).double()

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stock = model()
    want = torch.autograd.grad(stock(x).square().sum(), list(stock.parameters()))
    t = burnish.tune(model(), "full")
    got = torch.autograd.grad(t.model(x).square().sum(), list(t.parameters()))
    close(got, want, rtol=1e-12, atol=1e-12)


# -- what changes between forward and backward ----------------------------------------------------
def changed(t, x, change):
    """Gradients with `change` between forward and backward."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    loss = t.model(x).square().sum()
    wanted = [x, *t.parameters()]
    change()
    return torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_trained_tensor_changed_before_backward_raises_or_does_not_matter(name):  # findings 1.3
    x = torch.randn(5, D, dtype=torch.float64)
    want = grads(tuned(name), x)
    raised = 0
    for k in range(len(list(tuned(name).parameters()))):
        t = tuned(name)
        p = list(t.parameters())[k]
        try:
            got = changed(t, x, lambda p=p: p.detach().add_(1))
        except RuntimeError as e:
            assert "modified" in str(e), e
            raised += 1
        else:
            close(got, want)
    assert raised or name == "bitfit"


@pytest.mark.parametrize("name", ["lora", "dora", "snella", "nf4", "bf16 + dora", "full + lora"])
def test_a_frozen_weight_changed_before_backward_raises(name):                # findings 1.3
    t, x = tuned(name), torch.randn(5, D, dtype=torch.float64)
    held = [b for n, b in t.model.named_buffers() if "provided" in n] or [t.model.k.weight]
    for b in held:
        with pytest.raises(RuntimeError, match="modified"):
            changed(t, x, lambda b=b: b.detach().add_(1))


def test_the_error_names_what_changed():
    t, x = tuned("lora"), torch.randn(5, D, dtype=torch.float64)
    B = next(p for n, p in t.named_parameters() if n.endswith("B"))
    with pytest.raises(RuntimeError, match=r"B \(8, 2\) of a Chain.*modified in place"):
        changed(t, x, lambda: B.detach().add_(1))
    with pytest.raises(RuntimeError, match=r"A \(2, 8\) of a Chain was replaced"):
        chain = next(m for m in t.model.modules() if isinstance(m, Chain))
        changed(t, x, lambda: setattr(chain, "A", nn.Parameter(chain.A.detach().clone())))


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "snella(rank=4)", "bf16 + lora(rank=2)"])
def test_weights_of_a_convolution_changed_before_backward_raise(recipe):      # findings 1.3
    t = burnish.tune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), recipe, targets="all")
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    tensors = [*t.parameters(), *(b for n, b in t.model.named_buffers() if "provided" in n)]
    for p in tensors:
        loss = t.model(x).square().sum()
        with torch.no_grad():
            p.add_(1)
        with pytest.raises(RuntimeError, match="modified"):
            loss.backward()


def test_what_stock_does_not_read_may_change():
    """The first layer's input carries no gradient: its weights are not read in backward."""
    W, b = torch.randn(D, D), torch.randn(D, requires_grad=True)
    W = nn.Parameter(W, False)
    term = Chain(Place("x", "weight", "linear", D, D), 2, train_a=False)
    x = torch.randn(5, D)
    y = linear(x, Weighted(lambda: W, [(term, 1.0)]), b)
    (want,) = torch.autograd.grad(y.square().sum(), term.B, retain_graph=True)
    with torch.no_grad():
        for t in (W, b, term.A, term.B):
            t.add_(1)
    (got,) = torch.autograd.grad(y.square().sum(), term.B)
    torch.testing.assert_close(got, want)


def test_biases_of_a_bottleneck_may_change_as_in_stock_torch():
    pair = Bottleneck(D, 4, init="bert", act="gelu").double()
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    y = pair(x).sum()
    want = torch.autograd.grad(y, [x, *pair.parameters()], retain_graph=True)
    with torch.no_grad():
        pair.down.bias.add_(1)
        pair.up.bias.add_(1)
    close(torch.autograd.grad(y, [x, *pair.parameters()], retain_graph=True), want)
    with torch.no_grad():
        pair.up.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        y.backward()


@pytest.mark.parametrize("name", DELTAS)
def test_who_wants_a_gradient_is_decided_in_forward(name):
    """Another adapter comes into use between forward and backward: the input gets its gradient."""
    x = torch.randn(5, D, dtype=torch.float64)
    want, t = grads(tuned(name), x), tuned(name)
    params = list(t.parameters())
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    loss = t.model(x).square().sum()
    for p in params:
        p.requires_grad_(False)
    loss.backward()
    torch.testing.assert_close(x.grad, want[0])
    assert not any(p.requires_grad or p.grad is not None for p in params)


@pytest.mark.parametrize("name", DELTAS)
def test_what_begins_to_train_after_the_forward_gets_nothing_from_it(name):
    x = torch.randn(5, D, dtype=torch.float64)
    want, t = grads(tuned(name), x), tuned(name)
    params = list(t.parameters())
    for p in params:
        p.requires_grad_(False)
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    loss = t.model(x).square().sum()
    for p in params:
        p.requires_grad_(True)
    loss.backward()
    torch.testing.assert_close(x.grad, want[0])
    assert all(p.requires_grad and p.grad is None for p in params)


# -- second derivatives ---------------------------------------------------------------------------
def functions():
    """Every autograd function of ours."""
    for m in pkgutil.walk_packages(burnish.__path__, "burnish."):
        if m.name.endswith("__main__"):
            continue
        for f in vars(importlib.import_module(m.name)).values():
            if isinstance(f, type) and issubclass(f, torch.autograd.Function) \
                    and f.__module__ == m.name:
                yield f


#: those whose backward is made of differentiable operations, shown by the tests named here
TWICE = {
    "cast._Cast": "test_cast.py::test_a_cast_is_twice_differentiable",
    "replay._Dropout": "test_replay.py::test_dropout_is_the_stock_one_twice_differentiable",
    "reversible._Straight": "test_a_straight_gradient_is_twice_differentiable",
    "masked._Straight": "test_values_that_stand_for_others_are_twice_differentiable",
    "migrated._Given": "test_values_that_stand_for_others_are_twice_differentiable",
    "migrated._Passed": "test_values_that_stand_for_others_are_twice_differentiable",
    "turned.RoundedRows": "test_values_that_stand_for_others_are_twice_differentiable",
    "objective.Attached": "test_a_term_that_rides_is_twice_differentiable",
    "objective.Ride": "test_a_term_that_rides_is_twice_differentiable",
    "objectives._Notice": "test_a_term_that_rides_is_twice_differentiable",
    "integer._OnGrid": "test_a_straight_gradient_on_a_grid_is_twice_differentiable",
    "linalg._Walsh": "test_linalg.py::test_walsh_is_twice_differentiable",
    "activations._Elementwise": "test_activations.py::test_it_is_twice_differentiable",
    "unread._Linear":
        "test_unread.py::test_a_quick_linear_can_be_differentiated_twice_and_under_transforms"}


def test_a_backward_that_cannot_be_differentiated_says_so():                  # findings 1.7
    found = {f"{f.__module__.rpartition('.')[2]}.{f.__name__}": f for f in functions()}
    marked = once_differentiable(lambda ctx: None).__code__
    assert len(found) >= 40 and found.keys() >= TWICE.keys()
    for name, f in found.items():
        once = f.backward.__code__ is marked
        assert once != (name in TWICE), f"{name}: once_differentiable, or a line in TWICE"


def test_a_straight_gradient_on_a_grid_is_twice_differentiable():
    h = torch.tensor([-9.0, -1.0, 0.3, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    made = _OnGrid.apply(h, grid_of(-2.0, 2.0), None)
    (a,) = torch.autograd.grad((made * w.square()).sum(), h, create_graph=True)
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(a, inside * w.square())
    (b,) = torch.autograd.grad(a.sum(), w)
    torch.testing.assert_close(b, inside * 2 * w)


def test_a_straight_gradient_is_twice_differentiable():
    h = torch.randn(3, dtype=torch.float64, requires_grad=True)
    made = (h.detach() * 4).round() / 4
    (a,) = torch.autograd.grad(_Straight.apply(h, made, 0.5).pow(3).sum(), h, create_graph=True)
    torch.testing.assert_close(a, 1.5 * made.square())
    torch.testing.assert_close(torch.autograd.grad(a.sum(), h)[0], 1.5 * made)


@pytest.mark.parametrize("straight", [
    lambda h, kept: RoundedRows.apply(h, 8), lambda h, kept: _Passed.apply(h, kept),
    lambda h, kept: _Given.apply(h, SimpleNamespace(_on_grid=lambda x: (kept, x > -9))),
    lambda h, kept: masked._Straight.apply(h, kept, torch.ones_like(kept))],
    ids=["RoundedRows", "_Passed", "_Given", "masked"])
def test_values_that_stand_for_others_are_twice_differentiable(straight):
    """Second derivatives go through what is made of the values, as first ones do."""
    h = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    made = straight(h, h.detach() * 2)
    (a,) = torch.autograd.grad(made.pow(3).sum(), h, create_graph=True)
    (b,) = torch.autograd.grad(a.sum(), h)
    torch.testing.assert_close(a, 3 * made.square())
    torch.testing.assert_close(b, 6 * made)


def test_a_term_that_rides_is_twice_differentiable():
    h = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = torch.randn((), dtype=torch.float64, requires_grad=True)
    y = Attached.apply(h, loss, 0.25, Riding())
    a, b = torch.autograd.grad(y.pow(3).sum(), [h, loss], create_graph=True)
    assert b == 0.25
    torch.testing.assert_close(torch.autograd.grad(a.sum(), h)[0], 6 * h)
    (a,) = torch.autograd.grad(_Notice.apply(h, Riding()).pow(2).sum(), h, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(a.sum(), h)[0], torch.full_like(h, 2))
    z = Ride.apply(h.pow(3).sum(), Riding(), 1.0, loss.square())
    a, b = torch.autograd.grad(z, [h, loss], create_graph=True)
    torch.testing.assert_close((a, b), (3 * h.square(), 2 * loss))
    torch.testing.assert_close(torch.autograd.grad(a.sum() + b, [h, loss]),
                               (6 * h, 2 * torch.ones_like(loss)))


@pytest.mark.parametrize("name", [*DELTAS, "houlsby"])
def test_second_derivatives_are_refused_not_wrong(name):                      # findings 1.7
    if name.startswith("houlsby"):
        branch = Bottleneck(D, 4, act="gelu", init="bert")
        x = torch.randn(3, D, requires_grad=True)
        y = branch(x).square().sum()
    else:
        t = tuned(name, inplace=False)
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        y = t.model(x).square().sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(y, x, create_graph=True)


# -- torch.func -----------------------------------------------------------------------------------
@pytest.mark.parametrize("lean", ["", " + lean(on=False)"], ids=["lean", "not lean"])
@pytest.mark.parametrize("name", RECIPES)
def test_torch_func_grad_is_the_ordinary_gradient(name, lean):                # findings 1.7
    t = tuned(RECIPES[name] + lean)
    x = torch.randn(5, D, dtype=torch.float64)
    names = [n for n, p in t.model.named_parameters() if p.requires_grad]
    params = {n: p.detach() for n, p in t.model.named_parameters() if n in names}

    def loss(params, x):
        return torch.func.functional_call(t.model, params, (x,)).square().sum()

    torch.manual_seed(5)
    got = torch.func.grad(loss)(params, x)
    want = grads(t, x, [dict(t.model.named_parameters())[n] for n in names])[1:]
    if "dropout" in name:                        # drawn in another order of operations
        want = got.values()
    close(got.values(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "dora(rank=2)", "vera(rank=4)"])
def test_gradients_per_sample_by_vmap(recipe):
    t, x = tuned(recipe, inplace=False), torch.randn(4, D, dtype=torch.float64)
    names = {id(p): n for n, p in t.model.named_parameters()}
    params = {names[id(p)]: p.detach() for p in t.parameters()}

    def loss(params, row):
        return torch.func.functional_call(t.model, params, (row,)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for k in range(4):
        close([g[k] for g in got.values()], grads(t, x[k])[1:])


def test_forward_mode_and_hessians():
    t = tuned("lora(rank=2)", inplace=False)
    x, v = torch.randn(2, 3, D, dtype=torch.float64)
    out, along = torch.func.jvp(t.model, (x,), (v,))
    torch.testing.assert_close(out, t.model(x))
    J = torch.autograd.functional.jacobian(lambda x: t.model(x), x)
    torch.testing.assert_close(along, (J * v).sum((-1, -2)))
    H = torch.func.hessian(lambda x: t.model(x).pow(3).sum())(x)
    assert H.shape == (3, D, 3, D) and H.abs().sum() > 0


def test_torch_func_under_checkpoint_and_branches():
    model, batch = tiny("vit")
    t = burnish.tune(model.eval(), "houlsby(bottleneck=4) + lora(rank=2) + checkpoint", head=False)
    names = {id(p): n for n, p in model.named_parameters()}
    params = {names[id(p)]: p.detach() for p in t.parameters()}

    def loss(params):
        out = torch.func.functional_call(model, params, (), batch)
        return out.logits.square().sum()

    got = torch.func.grad(loss)(params)
    want = torch.autograd.grad(model(**batch).logits.square().sum(), list(t.parameters()))
    close(got.values(), want, rtol=1e-4, atol=1e-5)


def test_tensors_put_in_the_place_of_parameters_get_the_gradient():
    """functional_call without a transform: backward must not read the module's own tensors."""
    t, x = tuned("lora(rank=2)"), torch.randn(5, D, dtype=torch.float64)
    own = {n: p for n, p in t.model.named_parameters() if p.requires_grad}
    other = {n: (p.detach() * 1.5).requires_grad_() for n, p in own.items()}
    y = torch.func.functional_call(t.model, other, (x,)).square().sum()
    got = torch.autograd.grad(y, list(other.values()))
    with torch.no_grad():
        for p in own.values():
            p.mul_(1.5)
    want = torch.autograd.grad(t.model(x).square().sum(), list(own.values()))
    close(got, want)


def test_an_objective_is_refused_by_transforms():
    t = tuned("lora(rank=2) + l2_sp", inplace=False)
    t.optimizer(lr=0.1)
    with pytest.raises(burnish.BurnishError, match="objective.*torch.func"):
        torch.func.grad(lambda x: t.model(x).square().sum())(torch.randn(3, D).double())


def test_dropout_under_a_function_of_w_is_refused_by_transforms():
    t = tuned("dora(rank=2, dropout=0.3)", inplace=False)
    with pytest.raises(burnish.BurnishError, match="dropout.*torch.func"):
        torch.func.grad(lambda x: t.model(x).sum())(torch.randn(3, D, dtype=torch.float64))


def test_dropout_steps_aside_for_transforms():
    x = torch.randn(50, dtype=torch.float64)
    torch.manual_seed(0)
    got = torch.func.grad(lambda x: replay.dropout(x, 0.5).sum())(x)
    torch.manual_seed(0)
    want = F.dropout(torch.ones_like(x), 0.5, True)
    torch.testing.assert_close(got, want)
