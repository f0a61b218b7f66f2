"""A loss over a vocabulary by chunks, against its equation on whole logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.blocks.tape import chunked
from burnish.blocks.tape.chunked import Head, cross_entropy, linear_head
from burnish.core.errors import ConfigError

F64 = torch.float64


def draw(n: int, inp: int, words: int, dtype: torch.dtype = F64, seed: int = 0, bias: bool = True):
    g = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(*s, generator=g, dtype=F64).to(dtype).requires_grad_()
               for s in ((n, inp), (words, inp), (words,)))
    return x, W, b if bias else None


def written_out(z: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, k: float,
                reduction: str) -> Tensor:
    """sum_n r_n (a_n s_n - sum_v c_nv z_nv + k s_n^2), word by word."""
    words = z.shape[1]
    w = torch.ones(words, dtype=z.dtype) if weight is None else weight
    hard = not target.is_floating_point()
    counts = target != -100 if hard else torch.ones(len(z), dtype=torch.bool)
    q = F.one_hot(target.clamp(min=0), words).to(z.dtype) if hard else target
    # a label is weighed by its own class, what smoothing spreads by the classes it reaches
    c = ((1 - smoothing) * q + smoothing / words) * w
    s = z.exp().sum(1).log()
    rows = torch.where(counts, (c * (s[:, None] - z)).sum(1) + k * s.square(), 0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / ((q * w).sum(1)[counts].sum() if hard else len(z))


def both_ways(x: Tensor, W: Tensor, b: Tensor | None, target: Tensor, **how):
    """(value, gradients) of the equation, of the fast product and of any head, with one upstream
    gradient."""
    chunk, z_loss = how.pop("chunk"), how.pop("z_loss", 0.0)
    trains = [x, W] + ([] if b is None else [b])
    want = written_out(F.linear(x, W, b), target, how.get("weight"),
                       how.get("label_smoothing", 0.0), z_loss, how.get("reduction", "mean"))
    up = torch.linspace(0.5, 2, max(want.numel(), 1), dtype=want.dtype)[: want.numel()]
    up = up.reshape(want.shape)
    heads = linear_head(W, b), Head(lambda x: F.linear(x, W, b), tuple(trains[1:]))
    found = []
    for head in heads:
        got = cross_entropy(x, head, target, chunk=chunk, z_loss=z_loss, **how)
        found.append((got, torch.autograd.grad(got, trains, up)))
    return (want, torch.autograd.grad(want, trains, up)), found


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), inp=st.integers(1, 5), words=st.integers(2, 9),
       chunk=st.integers(1, 12), smoothing=st.sampled_from([0.0, 0.1, 0.7]),
       z_loss=st.sampled_from([0.0, 0.01]), reduction=st.sampled_from(["mean", "sum", "none"]),
       weighed=st.booleans(), soft=st.booleans(), bias=st.booleans(),
       ignored=st.lists(st.booleans(), min_size=9, max_size=9), seed=st.integers(0, 99))
def test_value_and_gradients_are_those_of_the_equation(
        n, inp, words, chunk, smoothing, z_loss, reduction, weighed, soft, bias, ignored, seed):
    x, W, b = draw(n, inp, words, seed=seed, bias=bias)
    g = torch.Generator().manual_seed(seed + 1)
    weight = torch.rand(words, generator=g, dtype=F64) + 0.1 if weighed else None
    if soft:
        target = torch.randn(n, words, generator=g, dtype=F64).softmax(-1)
    else:
        target = torch.randint(0, words, (n,), generator=g)
        target[torch.tensor(ignored[:n])] = -100
        if reduction == "mean" and bool((target == -100).all()):
            target[0] = 0
    (want, grads), found = both_ways(x, W, b, target, weight=weight, label_smoothing=smoothing,
                                     z_loss=z_loss, reduction=reduction, chunk=chunk)
    for got, mine in found:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        for a, c in zip(mine, grads, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_equation_is_torchs_own_without_the_z_loss(soft, smoothing):
    x, W, b = draw(7, 4, 6)
    target = torch.randn(7, 6, dtype=F64).softmax(-1) if soft else torch.tensor([0, 5, -100, 2, 1,
                                                                                3, 3])
    weight = torch.linspace(0.5, 2, 6, dtype=F64)
    for reduction in ("mean", "sum", "none"):
        how = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        got = cross_entropy(x, linear_head(W, b), target, chunk=3, **how)
        torch.testing.assert_close(got, F.cross_entropy(F.linear(x, W, b), target, **how))


def test_another_label_may_be_the_one_that_is_ignored():
    x, W, b = draw(5, 3, 4)
    target = torch.tensor([0, 1, 1, 2, 3])
    got = cross_entropy(x, linear_head(W, b), target, ignore_index=1, chunk=2)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, W, b), target, ignore_index=1))


def test_no_label_at_all_is_what_torch_makes_of_it():
    x, W, b = draw(4, 3, 5)
    target = torch.full((4,), -100)
    for reduction in ("mean", "sum"):
        got = cross_entropy(x, linear_head(W, b), target, reduction=reduction)
        want = F.cross_entropy(F.linear(x, W, b), target, reduction=reduction)
        assert torch.equal(got.isnan(), want.isnan()) and (got.isnan() or got == want)
    cross_entropy(x, linear_head(W, b), target, reduction="sum").backward()
    assert not x.grad.any() and not W.grad.any()


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float32, requires_grad=True)
    W = torch.tensor([[900.0], [0.0], [-900.0]])
    target = torch.tensor([2, 2])
    got = cross_entropy(x, linear_head(W), target, reduction="none")
    assert got.tolist() == [1800.0, 0.0]


def test_rows_without_a_label_are_never_made():
    x, W, _ = draw(20, 3, 5, bias=False)
    target = torch.full((20,), -100)
    target[[3, 11, 12]] = 4
    sizes = []

    def run(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return F.linear(rows, W)

    cross_entropy(x, Head(run, (W,)), target, chunk=2).backward()
    assert sizes == [2, 1]
    assert x.grad.any(1).nonzero().flatten().tolist() == [3, 11, 12]


@pytest.mark.parametrize("general", [False, True])
def test_no_tensor_of_more_than_a_chunk_of_logits_is_made(general):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    x, W, _ = draw(64, 3, 50, bias=False)
    W.requires_grad_(False)
    head = Head(lambda r: F.linear(r, W)) if general else linear_head(W)
    with Watch():
        cross_entropy(x, head, torch.arange(64) % 50, chunk=8).backward()
    assert largest == 8 * 50


def test_half_precision_is_summed_in_single():
    """Against float64 of the same rounded numbers, no worse than the plain loss on logits that are
    widened before it."""
    x, W, b = draw(512, 16, 300, torch.bfloat16)
    target = torch.arange(512) % 300
    wide = [t.detach().double().requires_grad_() for t in (x, W, b)]
    want = F.cross_entropy(F.linear(*wide), target)
    exact = torch.autograd.grad(want, wide)
    plain = F.cross_entropy(F.linear(x, W, b).float(), target)
    mine = cross_entropy(x, linear_head(W, b), target, chunk=64)
    assert mine.dtype == torch.float32
    assert abs(mine - want) <= abs(plain - want) + 1e-4

    def off(grads):
        return [float((g.double() - e).norm() / e.norm())
                for g, e in zip(grads, exact, strict=True)]

    stock = off(torch.autograd.grad(plain, (x, W, b)))
    got = off(torch.autograd.grad(mine, (x, W, b)))
    assert all(m <= 1.25 * s for m, s in zip(got, stock, strict=True)), (got, stock)


def test_the_result_has_the_dtype_that_is_asked_for():
    x, W, b = draw(4, 3, 5, torch.bfloat16)
    target = torch.tensor([0, 1, 2, 3])
    for dtype in (torch.bfloat16, torch.float32):
        for reduction in ("mean", "none"):
            got = cross_entropy(x, linear_head(W, b), target, reduction=reduction, dtype=dtype)
            assert got.dtype == dtype
            g = torch.autograd.grad(got.sum(), (x, W, b))
            assert {t.dtype for t in g} == {torch.bfloat16}


def test_a_head_may_multiply_in_another_precision_than_its_rows():
    """As under autocast: float32 rows and weight, a product in bfloat16, gradients in float32."""
    x, W, b = draw(30, 8, 12, torch.float32)
    target = torch.arange(30) % 12
    head = Head(lambda r: F.linear(r, W, b), (W, b), lambda: (W, b), torch.bfloat16)
    got = cross_entropy(x, head, target, chunk=7)
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, W, b)
    assert z.dtype == torch.bfloat16
    want = F.cross_entropy(z.float(), target)
    torch.testing.assert_close(got, want)
    for a, c in zip(torch.autograd.grad(got, (x, W, b)), torch.autograd.grad(want, (x, W, b)),
                    strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, c, rtol=0.05, atol=2e-3)


def test_a_result_that_its_own_backward_reads_stays_as_it_is():
    x, W, _ = draw(6, 3, 5, bias=False)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    head = Head(lambda r: torch.tanh(F.linear(r, W)), (W,), keeps=True)
    got = cross_entropy(x, head, target, chunk=4)
    want = F.cross_entropy(torch.tanh(F.linear(x, W)), target)
    for a, c in zip(torch.autograd.grad(got, (x, W)), torch.autograd.grad(want, (x, W)),
                    strict=True):
        torch.testing.assert_close(a, c)


def test_only_what_trains_has_a_gradient():
    x, W, b = draw(6, 3, 5)
    W.requires_grad_(False)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    cross_entropy(x, linear_head(W, b), target).backward()
    assert W.grad is None and b.grad is not None and x.grad is not None
    x, W, b = draw(6, 3, 5)
    cross_entropy(x.detach(), linear_head(W, b), target, chunk=2).backward()
    want = torch.autograd.grad(F.cross_entropy(F.linear(x.detach(), W, b), target), (W, b))
    torch.testing.assert_close((W.grad, b.grad), want)


def test_without_a_graph_there_is_a_value_and_nothing_more():
    x, W, b = draw(6, 3, 5)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        got = cross_entropy(x, linear_head(W, b), target, chunk=4)
    assert not got.requires_grad
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, W, b), target).detach())


def test_backward_may_be_repeated_while_the_graph_is_kept_and_not_differentiated():
    x, W, b = draw(6, 3, 5)
    loss = cross_entropy(x, linear_head(W, b), torch.tensor([0, 1, 2, 3, 4, 0]))
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], first[0])
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, x)
    by = torch.ones((), dtype=F64, requires_grad=True)
    loss = cross_entropy(x, linear_head(W, b), torch.zeros(6).long()) * by
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("general", [False, True])
def test_logsumexp_and_argmax_are_those_of_whole_logits(general):
    x, W, b = draw(9, 4, 7)
    head = Head(lambda r: F.linear(r, W, b), (W, b)) if general else linear_head(W, b)
    z = F.linear(x, W, b)
    assert torch.equal(chunked.argmax(x, head, chunk=2), z.argmax(-1))
    got = chunked.logsumexp(x, head, chunk=4)
    torch.testing.assert_close(got, z.logsumexp(-1))
    for a, c in zip(torch.autograd.grad(got.square().sum(), (x, W, b)),
                    torch.autograd.grad(z.logsumexp(-1).square().sum(), (x, W, b)), strict=True):
        torch.testing.assert_close(a, c)


def test_an_unknown_reduction_is_refused_with_the_nearest():
    x, W, b = draw(3, 2, 4)
    with pytest.raises(ConfigError, match="reduction='means'.*mean"):
        cross_entropy(x, linear_head(W, b), torch.zeros(3).long(), reduction="means")
