"""Terms that ride on a loss: shares, what stands among outputs, values where nobody goes back."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from burnish.blocks.update.objective import (
    OnWeights,
    Riding,
    loss_of,
    on_outputs,
    portion,
    with_loss,
)
from burnish.core.errors import ConfigError

Named = namedtuple("Named", "loss logits")
Pair = namedtuple("Pair", "hidden logits")


@dataclass(frozen=True)
class Frozen:
    logits: Any
    loss: Any = None


def number(value=1.0, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


# -- of weights alone ------------------------------------------------------------------------------
def test_gradients_of_weights_in_closed_form_or_by_autograd():
    p, q, r = (nn.Parameter(torch.randn(3)) for _ in range(3))
    q.requires_grad_(False)

    def value():
        return (p.square().sum() + q.sum()) * 3              # of r nothing

    with torch.no_grad():
        gp, gq, gr = OnWeights((p, q, r), value).gradients()
    torch.testing.assert_close(gp, 6 * p.detach())
    assert gq is None and gr is None

    def grads():
        assert not torch.is_grad_enabled()
        return [p + 1]

    (g,) = OnWeights((p,), value, grads).gradients()
    assert torch.equal(g, p.detach() + 1) and not g.requires_grad


# -- the loss among outputs ------------------------------------------------------------------------
def test_the_loss_of_outputs():
    loss, logits = number(), torch.randn(2, 3)
    for out in (loss, {"loss": loss, "logits": logits}, (loss, logits), Named(loss, logits),
                Frozen(logits, loss), SimpleNamespace(loss=loss)):
        assert loss_of(out) is loss
    for out in (logits, {"logits": logits}, (logits, loss), (), Named(logits, loss), None, 3.0,
                Frozen(logits), SimpleNamespace(), {"loss": torch.tensor(3)}, [loss],
                {"loss": 2.0}, Pair(loss, logits)._replace(hidden=logits)):
        assert loss_of(out) is None


def test_another_loss_in_its_place():
    logits = torch.randn(2, 3)

    def change(loss):
        return loss * 2

    assert float(with_loss(number(), change).detach()) == 2
    for make in (lambda n: {"loss": n, "logits": logits}, lambda n: (n, logits, 5),
                 lambda n: Named(n, logits), lambda n: Frozen(logits, n),
                 lambda n: SimpleNamespace(loss=n, logits=logits)):
        out = make(number(3.0))
        new = with_loss(out, change)
        assert type(new) is type(out) and float(loss_of(new).detach()) == 6
        held = new.get("logits") if isinstance(new, dict) else new[1] if isinstance(new, tuple) \
            else new.logits
        assert held is logits and (not isinstance(new, tuple) or len(new) == len(out))
        still = make(torch.tensor(3.0))                      # of no gradient
        assert with_loss(still, change) is still and float(loss_of(still)) == 3
    assert with_loss(logits, change) is logits


# -- on the first output with a gradient -----------------------------------------------------------
def hidden():
    return torch.ones(2, 3, dtype=torch.float64, requires_grad=True)


FORMS = {
    "tensor": lambda h: h, "dict": lambda h: {"n": torch.tensor(3), "h": h, "z": h * 2},
    "tuple": lambda h: (torch.ones(2), h, h * 2), "list": lambda h: [h, 5, 6],
    "named": lambda h: Pair(torch.ones(2), h), "frozen": lambda h: Frozen(h),
    "namespace": lambda h: SimpleNamespace(words="x", h=h, more=7)}
WHERE = {"tensor": lambda o: o, "dict": lambda o: o["h"], "tuple": lambda o: o[1],
         "list": lambda o: o[0], "named": lambda o: o.logits, "frozen": lambda o: o.logits,
         "namespace": lambda o: o.h}


@pytest.mark.parametrize("form", FORMS)
def test_terms_ride_on_an_output(form):
    riding, h, a, b = Riding(), hidden(), number(), number(dtype=torch.float32)
    riding.rest = lambda: 0.25
    out = FORMS[form](h)
    new = on_outputs(out, riding, [a, b])
    assert type(new) is type(out)
    assert torch.equal(WHERE[form](new), h) and WHERE[form](new) is not h
    if isinstance(out, tuple | list):
        assert len(new) == len(out) and all(new[i] is out[i] for i in range(len(out))
                                            if out[i] is not h)
    (WHERE[form](new) * 3).sum().backward()
    assert torch.equal(h.grad, torch.full_like(h, 3))
    assert (float(a.grad), float(b.grad)) == (0.25, 0.25)    # the update's share, once each


@pytest.mark.parametrize("out", [torch.ones(2), {"a": torch.tensor(3)}, (torch.ones(2), 4), 3.0,
                                 SimpleNamespace(a=torch.ones(2)), [], None])
def test_without_an_output_with_a_gradient_there_is_nothing_to_ride_on(out):
    with pytest.raises(ConfigError, match="no output of the model carries a gradient"):
        on_outputs(out, Riding(), [number()])


# -- on an activation ------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("seen", [True, False], ids=["a loss", "no loss"])
def test_a_term_on_a_state_gets_its_weight_of_the_share(seen, dtype):
    riding, h, term = Riding(), hidden(), number(dtype=dtype)
    riding.rest = lambda: 7.0 if seen else 98304.0           # more than half precision holds
    at = riding.on(h, term, 0.3)
    assert torch.equal(at, h) and at is not h and riding.rode
    loss = at.sum()
    if seen:
        riding.on_end = lambda *a: []
        loss = riding.end((), {}, loss, {}) * 98304
    loss.backward()
    assert term.grad.dtype == dtype
    exact = {torch.float64: 1e-7 if seen else 1e-15, torch.float16: 1e-3}[dtype]
    assert float(term.grad) == pytest.approx(0.3 * 98304, rel=exact)


def test_where_nobody_goes_backward_values_are_collected():
    riding, h = Riding(), hidden()
    with torch.no_grad():
        assert not riding.wanted
        with riding.collecting() as found:
            assert riding.wanted
            assert riding.on(h, number(2.0), 0.5) is h and not riding.rode
            half = number(3.0, torch.bfloat16)
            riding.on_end = lambda *a: [half]
            out = object()
            assert riding.end((), {}, out, {}) is out
            with riding.collecting() as inner:
                riding.on(h, number(7.0), 1.0)
            assert [float(t) for t in inner] == [7.0]
        assert [float(t) for t in found] == [1.0, 3.0] and riding.collected is None
        assert found[1].dtype == torch.float32 and not any(t.requires_grad for t in found)
        assert not riding.wanted
    assert riding.wanted


# -- the end of a forward --------------------------------------------------------------------------
def test_where_nobody_waits_outputs_are_as_they_are():
    riding = Riding()
    for loss in (number(), {"loss": number()}):
        assert riding.end((), {}, loss, {}) is loss
    assert riding.join(loss["loss"]) is loss["loss"]
    riding.on_end = lambda *a: []
    with torch.no_grad():
        assert riding.end((), {}, loss, {}) is loss
    assert not riding.ridden and riding.latest is riding.total is None
    out = (hidden(),)                                        # no loss and no term
    assert riding.end((), {}, out, {}) is out


def test_a_term_on_a_state_is_reason_enough_once():
    riding, loss = Riding(), number()
    riding.on(hidden(), number(), 1.0)
    assert riding.end((), {}, loss, {}) is not loss
    assert riding.end((), {}, loss, {}) is loss


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("items", [None, 8])
def test_the_share_is_told_and_the_terms_get_it(items, outside):
    riding, loss, a, b = Riding(), number(5.0), number(), number(dtype=torch.float32)
    told, over = [], []
    riding.on_end = lambda args, kw, out, given: told.append((args, out, given)) or [a, b]
    riding.on_share = lambda: over.append((riding.latest, riding.total))
    kw = {} if items is None else {"labels": torch.tensor([1, -100, 2]),
                                   "num_items_in_batch": torch.tensor(items)}
    out = {"loss": loss}
    if outside:
        with riding.to_join():
            assert riding.end((1,), kw, out, {"k": 2}) is out and out["loss"] is loss
            joined = riding.join(loss)
        assert not riding.outside
        with riding.to_join():
            with riding.to_join(False):
                assert not riding.outside
            assert riding.outside
    else:
        joined = riding.end((1,), kw, out, {"k": 2})["loss"]
    assert float(joined.detach()) == 5 and joined is not loss
    assert told[0][0] == (1,) and told[0][1] is out and told[0][2] == {"k": 2}
    seen = []
    loss.register_hook(lambda g: seen.append((float(riding.latest), float(riding.total),
                                              riding.ridden)))
    (joined * 3).backward()
    size = 3 * (1 if items is None else 2 / 8)
    assert float(loss.grad) == 3 and seen == [(size, size, True)]
    assert (float(a.grad), float(b.grad)) == (size, size) and b.grad.dtype == torch.float32
    assert over == [(None, None)] and riding.ridden
    assert riding.join(loss) is loss, "a loss is joined once"


def test_a_loss_without_a_gradient_takes_nothing_along():
    riding = Riding()
    riding.on_end = lambda *a: [number()]
    for loss in (torch.tensor(1.0), 3.0):
        with riding.to_join():
            riding.end((), {}, hidden(), {})
            assert riding.join(loss) is loss


def test_losses_of_one_backward_add_up():
    riding, p = Riding(), number(1.0, torch.bfloat16)
    riding.on_end = lambda *a: []
    seen = []
    p.register_hook(lambda g: seen.append((riding.total, riding.latest)))
    one, two, three = (riding.end((), {}, p * k, {}) for k in (1, 2, 3))
    (one + 0.5 * two + 0.25 * three).backward()
    ((total, latest),) = seen
    assert float(total) == 1.75 and total.dtype == latest.dtype == torch.float32
    assert float(latest) in (1.0, 0.5, 0.25)


def test_a_loss_made_elsewhere_and_terms():
    riding, h, a = Riding(), hidden(), number()
    riding.on_end = lambda *args: [a]
    out = riding.end((), {}, (h, 5), {})
    assert out[1] == 5 and out[0] is not h
    out[0].sum().backward()
    assert float(a.grad) == 1                                # what `rest` says


def test_under_a_transform_there_is_no_backward():
    riding = Riding()
    riding.on_end = lambda *a: []
    with pytest.raises(ConfigError, match="rides on backward, which torch.func does not run"):
        torch.func.grad(lambda x: riding.end((), {}, x.square(), {}))(torch.tensor(2.0))


@pytest.mark.parametrize("outside", [False, True])
def test_another_loss_for_a_while(outside):
    riding, loss, h = Riding(), number(5.0), hidden()
    riding.on_end = lambda *a: pytest.fail("objectives keep out of it")
    kw = {"labels": torch.tensor([1, -100, 2]), "num_items_in_batch": torch.tensor(8)}
    other, out = number(4.0), {"loss": loss}
    asked = []
    with riding.replaced(lambda *given: asked.append(given) or other):
        assert riding.on(h, number(), 1.0) is h and not riding.rode
        with riding.to_join(outside):
            new = riding.end((1,), kw, out, {"k": 2})
            got = riding.join(loss) if outside else new["loss"]
        assert new is out and float(got.detach()) == 4 * 2 / 8
        assert asked == [((1,), kw, out, {"k": 2})]
        if not outside:
            with pytest.raises(ConfigError, match="another loss is to be looked at"):
                riding.end((), {}, (h,), {})
        with riding.replaced(None):
            assert riding.join(loss) is loss
        assert float(riding.join(loss).detach()) == (1 if outside else 4)
    assert riding.join(loss) is loss


def test_how_much_of_an_update_a_forward_holds():
    labels, items = torch.tensor([[1, -100], [100, -99]]), torch.tensor(6)
    assert portion({}) == portion({"labels": labels}) == 1.0
    assert portion({"num_items_in_batch": items}) == 1.0
    assert portion({"labels": [1, 2], "num_items_in_batch": items}) == 1.0
    assert float(portion({"labels": labels, "num_items_in_batch": items})) == 0.5
    both = torch.tensor([-100, -101])
    assert float(portion({"labels": both, "num_items_in_batch": torch.tensor(2)})) == 0.5


def test_a_copy_has_nobody_to_listen_to():
    riding = Riding()
    riding.on_end, riding.rode = (lambda *a: []), True
    one, two = copy.deepcopy([riding, riding])
    assert one is two and one is not riding and one.on_end is None and not one.rode
    again = pickle.loads(pickle.dumps(riding))
    assert isinstance(again, Riding) and again.on_end is None and not again.rode
