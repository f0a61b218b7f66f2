"""Logits that wait: whoever reads them finds what a whole tensor would have been, and a loss takes
them by chunks. The reference is the dense ``x W^T + b`` in float64."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.blocks.tape.chunked import Head, linear_head
from burnish.blocks.tape.forms import logits
from burnish.blocks.tape.unmade import Logits

F64 = torch.float64
B, T, D, V = 2, 5, 4, 11
CAP = 3.0


class Case:
    """A hidden state, a head and labels; `made` counts whole runs of the head."""

    def __init__(self, dtype=F64, general=False, chunk=3):
        g = torch.Generator().manual_seed(0)
        self.h, self.W, self.b = (torch.randn(*s, generator=g, dtype=F64).to(dtype)
                                  .requires_grad_() for s in ((B, T, D), (V, D), (V,)))
        self.x = self.h * 1
        self.labels = torch.randint(0, V, (B, T), generator=g)
        self.labels[0, 1] = self.labels[1, 4] = -100
        self.sizes: list[int] = []
        self.taken, self.general, self.chunk = 0, general, chunk

    @property
    def dense(self) -> Tensor:
        return F.linear(self.x, self.W, self.b)

    def waiting(self) -> Logits:
        def run(rows: Tensor) -> Tensor:
            self.sizes.append(rows.numel() // D)
            return F.linear(rows, self.W, self.b)

        def used() -> None:
            self.taken += 1

        head = Head(run, (self.W, self.b)) if self.general else \
            Head(run, (self.W, self.b), linear_head(self.W, self.b).stock)
        return logits(self.x, head, V, chunk=self.chunk, held=(self.W, self.b), used=used)

    @property
    def whole(self) -> bool:
        """Has the head made all logits at once?"""
        return B * T in self.sizes


def grads(loss: Tensor, of) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of, retain_graph=True)


def causal(c: Case, z: Tensor, **kw) -> Tensor:
    wanted = F.pad(c.labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.view(-1, V), wanted.view(-1), **kw)


def rows(c: Case, z: Tensor) -> Tensor:
    return sum(F.cross_entropy(r[y != -100], y[y != -100], reduction="sum")
               for r, y in zip(z, c.labels, strict=True))


def flat(c: Case, z: Tensor, **kw) -> Tensor:
    return F.cross_entropy(z.view(-1, V), c.labels.view(-1), **kw)


BIAS = torch.linspace(-1, 1, V, dtype=F64)
#: ways of models and loops from logits to a loss, none of which needs all of them at once
FOLLOWED = {
    "transformers": lambda c, z: causal(c, z.double(), reduction="sum") / 7,
    "gemma": lambda c, z: causal(c, torch.tanh(z / CAP) * CAP),
    "a cap by methods": lambda c, z: causal(c, z.div(CAP).tanh().mul(CAP)),
    "cohere": lambda c, z: causal(c, z * 0.5),
    "a scale from the left": lambda c, z: causal(c, 0.5 * z),
    "granite": lambda c, z: causal(c, z / 8),
    "a scale that is a tensor": lambda c, z: causal(c, z * torch.tensor(0.5, dtype=F64)),
    "bart": lambda c, z: flat(c, z + BIAS[None]),
    "a bias from the left": lambda c, z: flat(c, BIAS + z),
    "bert": lambda c, z: torch.nn.CrossEntropyLoss()(z.view(-1, V), c.labels.view(-1)),
    "a slice": lambda c, z: F.cross_entropy(z[:, :-1].flatten(0, 1), c.labels[:, 1:].flatten(),
                                            label_smoothing=0.1),
    "dots": lambda c, z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V),
                                         c.labels[..., 1:].reshape(-1)),
    "rows": rows,
    "a row": lambda c, z: F.cross_entropy(z[1], c.labels[1]),
    "the last": lambda c, z: F.cross_entropy(z[:, -1], c.labels[:, -1].clamp(min=0)),
    "a mask": lambda c, z: F.cross_entropy(z[c.labels != -100], c.labels[c.labels != -100]),
    "a new axis": lambda c, z: F.cross_entropy(z[None, 0][0], c.labels[0]),
    "a tuple of sizes": lambda c, z: F.cross_entropy(z.reshape((B * T, V)), c.labels.view(-1)),
    "an open width": lambda c, z: F.cross_entropy(z.view(B * T, -1), c.labels.view(-1)),
    "flattened from the end": lambda c, z: F.cross_entropy(z.flatten(end_dim=-2),
                                                           c.labels.view(-1)),
    "unbound": lambda c, z: F.cross_entropy(z.unbind(0)[0], c.labels[0]),
    "to": lambda c, z: flat(c, z.to(F64).to("cpu").to("cpu", F64)),
    "row by row": lambda c, z: flat(c, z, reduction="none").square().sum(),
    "soft": lambda c, z: F.cross_entropy(z.view(-1, V), BIAS.softmax(0).expand(B * T, V)),
    "weights": lambda c, z: flat(c, z, weight=BIAS + 2, label_smoothing=0.2),
    "z-loss": lambda c, z: flat(c, z) + 0.1 * torch.logsumexp(z, -1).square().mean(),
    "logsumexp of a form": lambda c, z: (z[:, 1:] * 2).logsumexp(dim=-1).sum(),
}
#: ways that read them all
READ = {
    "softmax": lambda c, z: z.softmax(-1).square().sum(),
    "log_softmax": lambda c, z: F.nll_loss(F.log_softmax(z.view(-1, V), -1), c.labels.view(-1)),
    "written to": lambda c, z: flat(c, z.mul_(2)),
    "written to by index": lambda c, z: (z.__setitem__((slice(None), 0), 0.0), flat(c, z))[1],
    "columns": lambda c, z: z[..., :3].square().sum(),
    "columns behind dots": lambda c, z: z[..., 2].square().sum(),
    "transposed": lambda c, z: F.cross_entropy(z.transpose(1, 2), c.labels),
    "another width": lambda c, z: z.view(-1).square().sum(),
    "flattened with the words": lambda c, z: z.flatten(1).square().sum(),
    "a numpy index": lambda c, z: z[[0, 1]].square().sum(),
    "a scale for each word": lambda c, z: flat(c, z * BIAS),
    "a scale for each row": lambda c, z: flat(c, z + torch.ones(B, T, 1, dtype=F64)),
    "as an argument": lambda c, z: flat(c, torch.where(c.labels[..., None] > 3, z, z * 2)),
    "max": lambda c, z: z.max(),
    "a multiple of a bias": lambda c, z: flat(c, torch.add(z, BIAS, alpha=2)),
    "rounded": lambda c, z: flat(c, torch.div(z, 0.5, rounding_mode="floor") + 0 * z),
    "a bias by name": lambda c, z: flat(c, torch.add(input=BIAS, other=z)),
    "logsumexp over tokens": lambda c, z: z.logsumexp(1).sum(),
}


def same(c: Case, way) -> None:
    want, got = way(c, c.dense), way(c, c.waiting())
    assert type(got) is Tensor and got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    trains = (c.h, c.W, c.b)
    for a, e in zip(grads(got, trains), grads(want, trains), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("way", FOLLOWED)
def test_a_loss_takes_them_by_chunks_in_any_form(way, general):
    c = Case(general=general)
    same(c, FOLLOWED[way])
    assert not c.whole and max(c.sizes, default=0) <= c.chunk


@pytest.mark.parametrize("way", READ)
def test_whoever_reads_or_writes_them_finds_the_whole_tensor(way):
    c = Case()
    same(c, READ[way])
    assert c.whole


def test_a_loss_says_that_it_took_them_and_a_reader_does_not():
    c = Case()
    z = c.waiting()
    z.argmax(-1), z.logsumexp(-1), z.shape
    assert not c.taken
    flat(c, z)
    assert c.taken == 1
    z = c.waiting()
    z.sum()
    flat(c, z)
    assert c.taken == 1                              # they were there: nothing was saved


def test_facts_need_no_logits():
    c = Case()
    z, want = c.waiting(), c.dense
    assert z.shape == want.shape and z.size(-1) == V and z.dim() == z.ndim == 3 and len(z) == B
    assert z.dtype == F64 and z.device == want.device and z.numel() == want.numel()
    assert z.requires_grad and not z.is_leaf and z.is_floating_point() and not z.is_cuda
    assert isinstance(z, Tensor) and not c.sizes
    assert torch.equal(z.argmax(-1), want.argmax(-1)) and not c.whole
    assert torch.equal(z[:, 1:].argmax(dim=2), want[:, 1:].argmax(2)) and not c.whole
    assert torch.equal(z.argmax(-1, keepdim=True), want.argmax(-1, keepdim=True)) and c.whole


def test_they_are_made_once():
    c = Case()
    z = c.waiting()
    first, again = z.softmax(-1), z.exp()
    assert c.sizes == [B * T]
    torch.testing.assert_close(first, c.dense.softmax(-1))
    torch.testing.assert_close(again, c.dense.exp())


def test_what_is_written_to_one_form_is_seen_where_torch_shows_it():
    def forms(z):
        v, scaled, part = z.view(-1, V), z * 2, z[:, 1:]
        z[0, 2] = 5.0
        z.view(-1, V)[0] = 7.0
        return [z.sum(-1), v.sum(-1), scaled.sum(-1), part.sum(-1)]

    c = Case()
    for got, want in zip(forms(c.waiting()), forms(c.dense), strict=True):
        torch.testing.assert_close(got, want)


def test_a_form_that_is_written_to_before_the_loss_counts():
    def loss(c, z):
        v = z.view(-1, V)
        z.mul_(0.5)
        return F.cross_entropy(v, c.labels.view(-1))

    same(Case(), loss)


def test_without_a_graph_a_form_has_none_and_the_others_keep_theirs():
    c = Case()
    z = c.waiting()
    with torch.no_grad():
        cut = z[:, 1:]
        assert not cut.requires_grad
        read = z.softmax(-1)
    assert not read.requires_grad and z.requires_grad
    assert not z.detach().requires_grad
    torch.testing.assert_close(cut.detach(), c.dense[:, 1:].detach())
    got, want = flat(c, z), flat(c, c.dense)         # read before, and the gradient is there
    for a, e in zip(grads(got, (c.h, c.W)), grads(want, (c.h, c.W)), strict=True):
        torch.testing.assert_close(a, e)


def test_a_loss_of_detached_logits_trains_nothing():
    c = Case()
    for form in (lambda z: z.detach(), lambda z: (z * 2).detach()):
        got = flat(c, form(c.waiting()))
        assert not got.requires_grad
        torch.testing.assert_close(got, flat(c, form(c.dense)))


class Doubled(torch.autograd.Function):
    """Somebody's function whose result is made of the values."""

    @staticmethod
    def forward(ctx, z, how):
        return z.clone() if how == "clone" else z.view(-1, V) if how == "view" else z + z

    @staticmethod
    def backward(ctx, g):
        return 2 * g.view(B, T, V), None


@pytest.mark.parametrize("how", ["clone", "view", "sum"])
def test_another_autograd_function_may_take_them(how):
    same(Case(), lambda c, z: F.cross_entropy(Doubled.apply(z, how).reshape(-1, V),
                                              c.labels.view(-1)))


def test_a_hook_on_them_sees_their_gradient():
    c, seen = Case(), []
    z = c.waiting()
    z.register_hook(seen.append)
    flat(c, z).backward()
    want = torch.autograd.grad(flat(c, d := c.dense), d)[0]
    torch.testing.assert_close(seen[0], want)


@pytest.mark.parametrize("read", [lambda c, z: z.softmax(-1), flat, lambda c, z: z.argmax(-1),
                                  lambda c, z: z.logsumexp(-1),
                                  lambda c, z: Doubled.apply(z, "view").sum()])
def test_a_head_that_has_changed_since_is_an_error_not_another_answer(read):
    c = Case()
    z = c.waiting()
    with torch.no_grad():
        c.W.add_(1.0)
    with pytest.raises(RuntimeError, match=r"head or its input has changed.*on=False"):
        read(c, z)
    c = Case()
    z = c.waiting()
    with torch.no_grad():
        c.x.zero_()
    with pytest.raises(RuntimeError, match="head or its input has changed"):
        read(c, z)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimizers_step_on_the_head_counts_as_a_change(how):
    c = Case()
    z = c.waiting()
    flat(c, z).backward()
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).step()       # somebody else's
    z[:, 1:].detach()
    torch.optim.AdamW([c.W], **how).step()
    with pytest.raises(RuntimeError, match="head or its input has changed"):
        z.softmax(-1)


def test_logits_that_were_read_before_an_update_stay_what_they_were():
    c = Case()
    z, want = c.waiting(), c.dense.softmax(-1)
    z.sum()
    with torch.no_grad():
        c.W.add_(1.0)
    torch.testing.assert_close(z.softmax(-1), want)


def test_a_bias_of_its_own_that_trains_gets_its_gradient():
    own = BIAS.clone().requires_grad_()
    c = Case()
    loss = flat(c, c.waiting() + own)
    got = grads(loss, (own, c.b, c.h))
    want = grads(flat(c, c.dense + own), (own, c.b, c.h))
    assert not c.whole
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_are_those_that_torch_makes(dtype):
    c = Case(torch.float32)
    for form in (lambda z: z.to(dtype), lambda z: z.float(), lambda z: z.double(),
                 lambda z: z.to(dtype).float(), lambda z: z.half(), lambda z: z.bfloat16(),
                 lambda z: z * 2, lambda z: z + BIAS, lambda z: z.to(torch.int32)):
        want, got = form(c.dense), form(c.waiting())
        assert got.dtype == want.dtype
        torch.testing.assert_close(got.exp(), want.exp())
        if want.dtype.is_floating_point:
            torch.testing.assert_close(flat(c, got), flat(c, want), rtol=2e-2, atol=2e-2)
            assert flat(c, got).dtype == want.dtype
    z = c.waiting()
    assert z.float() is z and z.contiguous() is z and z.to("cpu") is z


def test_numbers_are_rounded_where_the_model_rounds_them():
    """A cast to half and back loses what it loses on whole logits."""
    c = Case(torch.float32)
    got = flat(c, c.waiting().to(torch.bfloat16).float())
    torch.testing.assert_close(got, flat(c, c.dense.to(torch.bfloat16).float()))
    assert abs(float(got.detach() - flat(c, c.dense).detach())) > 1e-5


MASK = torch.tensor([True, False])
SHAPED = {
    "view": lambda z: z.view(-1, V), "view of a list": lambda z: z.view([T, B, V]),
    "a row": lambda z: z.view(B, T, 1, V)[0, 2], "open last": lambda z: z.view(2, 5, -1),
    "open last, other rows": lambda z: z.view(-1, 1, V), "all in one": lambda z: z.reshape(-1),
    "half a row": lambda z: z.reshape(5, -1), "flatten": lambda z: z.flatten(),
    "flatten words": lambda z: z.flatten(1), "flatten tokens": lambda z: z.flatten(0, 1),
    "flatten by end": lambda z: z.flatten(end_dim=1), "dots": lambda z: z[..., 1:, :],
    "dots first": lambda z: z[0, ..., :], "only dots": lambda z: z[...],
    "words": lambda z: z[..., 1:], "words behind": lambda z: z[:, :, 1:],
    "all words": lambda z: z[:, 1:, :], "a mask": lambda z: z[MASK],
    "mask, token": lambda z: z[MASK, 1], "dots twice": lambda z: z[..., 0, ...],
    "mask, words": lambda z: z[MASK, 1, 2:], "mask, all": lambda z: z[MASK, 1, :],
    "picked": lambda z: z[torch.tensor([1, 1, 0])], "axis": lambda z: z[None, :, None, 0],
    "two masks": lambda z: z[z.new_ones(B, T) > 0], "unbind": lambda z: z.unbind(0)[1],
    "unbind tokens": lambda z: z.unbind(1)[1], "unbind by name": lambda z: z.unbind(dim=0)[0],
    "one row, unbound": lambda z: z[0, 0].unbind()[3], "iterated": lambda z: list(z)[1],
    "to like": lambda z: z.to(torch.ones(1, dtype=torch.float32)),
    "to a copy": lambda z: z.to(torch.float32, copy=True),
    "to whole numbers": lambda z: z.to(torch.int32),
    "to rows": lambda z: z.to(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("way", SHAPED)
def test_a_form_has_its_shape_before_it_is_made_and_its_numbers_after(way):
    c = Case()
    got, want = SHAPED[way](c.waiting()), SHAPED[way](c.dense)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got.detach() + 0, want.detach())


def test_a_cast_that_only_widens_leaves_the_product_alone():
    c = Case(torch.bfloat16)
    got = flat(c, c.waiting().float())
    assert not c.sizes                               # the plain product, not the head's own run
    torch.testing.assert_close(got, flat(c, c.dense.float()))
    torch.testing.assert_close(flat(c, c.waiting().double()), flat(c, c.dense.double()),
                               rtol=1e-12, atol=0)


def test_wrong_calls_fail_as_on_whole_logits():
    c = Case()
    for wrong in (lambda z: z.view(-1, V + 1), lambda z: z.view(3, 7, V), lambda z: z[5],
                  lambda z: z[0, 0, 0, 0], lambda z: z[:, 0, 0, :], lambda z: z.argmax(7),
                  lambda z: z.view(-1, -1, V), lambda z: z.view(-1, 3, V),
                  lambda z: F.cross_entropy(z.view(-1, V), c.labels.view(-1)[:3]),
                  lambda z: flat(c, z, reduction="most"), lambda z: flat(c, z, weight=c.b.exp()),
                  lambda z: flat(c, z, weight=BIAS[:3])):
        errors = []
        for z in (c.dense, c.waiting()):
            with pytest.raises((RuntimeError, IndexError, ValueError)) as e:
                wrong(z)
            errors.append(type(e.value))
        assert errors[0] is errors[1]


def test_copies_and_files_hold_the_numbers():
    c = Case()
    with torch.no_grad():
        z, want = c.waiting(), c.dense
    assert torch.equal(copy.deepcopy(z), want)
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    assert torch.equal(torch.load(file), want) and type(copy.deepcopy(z)) is Tensor
    assert repr(z) == repr(want) and z.tolist() == want.tolist()
    assert (z.numpy() == want.numpy()).all()


def test_nothing_is_held_once_they_are_gone():
    c = Case()
    z = c.waiting()
    flat(c, z).backward()
    x = weakref.ref(c.x)
    c.x = None
    gc.disable()
    try:
        del z
        assert x() is None
    finally:
        gc.enable()


def test_whole_logits_do_not_hold_the_rows():
    c = Case()
    c.W.requires_grad_(False), c.b.requires_grad_(False)
    c.x = c.x.detach()
    z = c.waiting()
    z.sum()
    x = weakref.ref(c.x)
    c.x = None
    assert x() is None and z.shape == (B, T, V)
