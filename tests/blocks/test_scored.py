"""The importance of a whole update: ``sum |Delta * dL/dDelta|``, worked by autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.scored import Scored
from burnish.blocks.weight.triplets import Triplets
from burnish.core.site import Place

N, IN, OUT = 4, 5, 7
PLACE = Place("0", "weight", "linear", OUT, IN)


class OnTokens(Scored, Triplets):
    """A tokenwise update that is scored."""


class OnPanels(Scored):
    """``Delta = diag(b) U``, added panel by panel."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.b = nn.Parameter(torch.zeros(OUT))
        self.register_buffer("U", torch.zeros(OUT, IN))

    def dense(self):
        return self.b.unsqueeze(1) * self.U


def numbers(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def term(kind):
    torch.manual_seed(0)
    made = (OnTokens(PLACE, 3, 0.7) if kind == "tokens" else OnPanels()).double()
    with torch.no_grad():
        for t in (*made.parameters(), *made.buffers()):
            t.normal_()
    return made


def formula(t):
    return 0.7 * t.P @ torch.diag(t.E) @ t.Q if isinstance(t, OnTokens) else torch.diag(t.b) @ t.U


def passed(t, seed, scale):
    """One forward and backward in a layer, whose gradients are autograd's: what the definition of
    the score says of it."""
    W, x, g = numbers(OUT, IN, seed=9), numbers(N, IN, seed=seed), numbers(N, OUT, seed=seed + 50)
    x.requires_grad_()
    theta = [x, *t.parameters()]
    y = linear(x, Weighted(lambda: W, [(t, scale)]), None)
    got = torch.autograd.grad(y, theta, g)
    D = formula(t).detach().requires_grad_()
    (G,) = torch.autograd.grad(x @ (W + scale * D).t(), D, g)
    want = torch.autograd.grad(x @ (W + scale * formula(t)).t(), theta, g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    return float((D * G).detach().abs().sum())


@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize("kind", ["tokens", "panels"])
def test_the_score_grows_by_the_sum_over_the_matrix_in_every_backward_while_scoring(kind, scale):
    t = term(kind)
    assert t.scoring is False and t.score == 0
    passed(t, 1, scale)
    assert t.score == 0                              # nobody has asked
    t.scoring, total = True, 0.0
    for seed in (1, 2, 3):
        total += passed(t, seed, scale)
        assert float(t.score) == pytest.approx(total, rel=1e-11)
        assert not t.score.requires_grad
    t.scoring = False
    passed(t, 4, scale)
    assert float(t.score) == pytest.approx(total, rel=1e-11)


class Widths(TorchDispatchMode):
    """Columns of whatever is summed without its sign."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.abs.default:
            self.seen.append(out.shape[1])
        return out


@pytest.mark.parametrize("panel, widths", [
    (1 << 22, [5]), (3 * OUT, [3, 2]), (2 * OUT + 1, [2, 2, 1]), (OUT, [1] * 5), (1, [1] * 5)])
def test_the_gradient_of_the_matrix_is_formed_a_run_of_inputs_at_a_time(panel, widths):
    """Never more than `panel` entries at once, a column at the least; the sum is the same."""
    t, x, g = term("tokens"), numbers(N, IN), numbers(N, OUT, seed=2)
    assert t.at_once == 1 << 22                        # 16 MiB in fp32, as of any other panel
    t.scoring, t.at_once = True, panel
    with torch.no_grad():
        kept = t.forward_(x, torch.zeros(N, OUT, dtype=torch.float64), 1.0)
        with Widths() as seen:
            t.backward_(g, x, kept, torch.zeros(N, IN, dtype=torch.float64), 1.0)
    assert seen.seen == widths
    want = (formula(t).detach() * (g.t() @ x)).abs().sum()
    torch.testing.assert_close(t.score, want, rtol=1e-11, atol=0)
