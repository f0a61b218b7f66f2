"""A block that runs again in backward leaves out the product that nobody reads, and only that."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks import matmul
from burnish.blocks.tape import unread
from burnish.testing import conformance, stir
from burnish.testing.models import tiny
from burnish.testing.ran import Ran


class Block(nn.Module):
    """x + fc2(gelu(fc1(norm x))), with something behind it."""

    def __init__(self, d=8, behind=None):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.behind = behind

    def forward(self, x):
        y = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return y if self.behind is None else self.behind(y)


def stack(behind=lambda: None, blocks=3):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(behind=behind()) for _ in range(blocks)]).double()


def gradients(tuned, x):
    tuned.model.zero_grad()
    tuned.model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in tuned.named_parameters()}


def both(make, recipe, x, **kw):
    """(gradients of three passes with checkpoint, those without)."""
    plain = stir(burnish.tune(make(), recipe, head=False, **kw))
    again = stir(burnish.tune(make(), f"{recipe} + checkpoint", head=False, **kw))
    return [gradients(again, x) for _ in range(3)], gradients(plain, x)


@pytest.fixture
def left(monkeypatch):
    """How many products have been left out."""
    count = []
    nothing = unread.nothing
    monkeypatch.setattr(unread, "nothing", lambda *a: count.append(1) or nothing(*a))
    return count


@pytest.mark.parametrize("recipe,targets", [
    ("lora(rank=2)", "all"), ("lora(rank=2)", "*.fc1"), ("dora(rank=2)", "all"),
    ("snella(rank=2)", "all"), ("full", "all"), ("norms", None)])
def test_a_pre_norm_block_leaves_its_last_product_out(recipe, targets, left):
    x = torch.randn(4, 8, dtype=torch.float64)
    kw = {} if targets is None else {"targets": targets}
    again, plain = both(stack, recipe, x, **kw)
    assert len(left) in (4, 6)          # 2 passes after the first, the first block may need nothing
    for got in again:
        assert got.keys() == plain.keys()
        for n in plain:
            assert torch.equal(got[n], plain[n]), n


class Doubled(nn.Module):
    """A product, which keeps its factors."""

    def forward(self, y):
        return y * y


@pytest.mark.parametrize("behind", [lambda: nn.LayerNorm(8), nn.GELU, Doubled,
                                    lambda: nn.Dropout(0.0)])
def test_a_block_that_reads_it_runs_whole(behind, left):
    x = torch.randn(4, 8, dtype=torch.float64)
    again, plain = both(lambda: stack(behind), "lora(rank=2)", x)
    assert bool(left) == isinstance(behind(), nn.Dropout)
    for got in again:
        for n in plain:
            assert torch.equal(got[n], plain[n]), n


class Sometimes(nn.Module):
    """Reads the result only when told to."""

    on = False

    def forward(self, y):
        return y * y if self.on else y


def test_a_block_that_reads_it_later_runs_again_whole(left):
    x = torch.randn(4, 8, dtype=torch.float64)
    again = stir(burnish.tune(stack(Sometimes), "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(stack(Sometimes), "lora(rank=2)", head=False))
    for on in (False, False, True, True, False):
        for tuned in (again, plain):
            for m in tuned.model.modules():
                if isinstance(m, Sometimes):
                    m.on = on
        want = gradients(plain, x)
        for n, g in gradients(again, x).items():
            assert torch.equal(g, want[n]), (on, n)
    assert len(left) == 6                            # the second pass, and the third in vain


class Refuses(nn.Module):
    def forward(self, y):
        if y.isnan().any():
            raise ValueError("not a number")
        return y


def test_a_block_that_minds_what_it_is_given_runs_again_whole(left):
    x = torch.randn(4, 8, dtype=torch.float64)
    again, plain = both(lambda: stack(Refuses), "lora(rank=2)", x)
    assert left
    for got in again:
        for n in plain:
            assert torch.equal(got[n], plain[n]), n


def test_hooks_see_numbers(left):
    x = torch.randn(4, 8, dtype=torch.float64)
    tuned = stir(burnish.tune(stack(), "lora(rank=2) + checkpoint", head=False))
    seen = []
    for m in tuned.model.modules():
        if isinstance(m, Block):
            m.fc2.register_forward_hook(lambda m, a, out: seen.append(out.isnan().any().item()))
    for _ in range(3):
        gradients(tuned, x)
    assert len(seen) == 18 and not any(seen) and not left


def test_real_models_leave_it_out_where_they_may(left):
    """ViT, Llama and GPT-2 add the last product to the stream; BERT norms it."""
    for name, expected in (("vit", True), ("llama", True), ("gpt2", True), ("bert", False)):
        left.clear()
        net, batch = tiny(name)
        net.train()
        tuned = stir(burnish.tune(copy.deepcopy(net), "lora(rank=2) + checkpoint", head=False))
        plain = stir(burnish.tune(net, "lora(rank=2)", head=False))
        for _ in range(2):
            for t in (tuned, plain):
                torch.manual_seed(0)
                t.model.zero_grad()
                t.loss(batch).backward()
        assert bool(left) == expected, name
        want = dict(plain.named_parameters())
        for n, p in tuned.named_parameters():
            assert torch.equal(p.grad, want[n].grad), (name, n)


def test_what_an_autocast_keeps_is_seen(left):
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(tiny("vit")[0], "lora(rank=2)", head=False))
    for _ in range(3):
        for t in (tuned, plain):
            t.model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = t.loss(batch)
            loss.backward()
    want = dict(plain.named_parameters())
    assert left
    for n, p in tuned.named_parameters():
        assert torch.equal(p.grad, want[n].grad), n


class Gelus(TorchDispatchMode):
    """Counts how often GELU is computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.gelu.default
        return func(*args, **(kwargs or {}))


def test_what_the_product_left_out_reads_is_not_made_again():
    """Its backward comes first, so its input is kept: of three blocks each runs its GELU once in
    forward and once in backward. In the first pass, where nothing is left out yet, the lean tape
    makes the input once more."""
    tuned = stir(burnish.tune(stack(), "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(stack(), "lora(rank=2)", head=False))
    x = torch.randn(4, 8, dtype=torch.float64)
    want, counts = gradients(plain, x), []
    for _ in range(3):
        with Gelus() as seen:
            got = gradients(tuned, x)
        counts.append(seen.count)
        assert all(torch.equal(got[n], want[n]) for n in want)
    assert counts == [9, 6, 6]


def test_what_the_product_left_out_reads_comes_in_strips_where_it_is_large(monkeypatch):
    """Whole, it would stand beside its own gradient."""
    from burnish.blocks.tape import activations

    monkeypatch.setitem(activations.STRIP, "cpu", 40)
    rows, was = [], activations.Strips.__iter__

    def iterate(self):
        rows.append(self.shape)
        return was(self)

    monkeypatch.setattr(activations.Strips, "__iter__", iterate)
    tuned = stir(burnish.tune(stack(), "lora(rank=2) + checkpoint", head=False))
    plain = stir(burnish.tune(stack(), "lora(rank=2)", head=False))
    x = torch.randn(4, 8, dtype=torch.float64)
    want = gradients(plain, x)
    rows.clear()
    for _ in range(3):
        got = gradients(tuned, x)
        for n in want:
            torch.testing.assert_close(got[n], want[n], rtol=1e-12, atol=1e-12)
    assert len(rows) == 9                                # three blocks, each time


# -- products that nothing was added to: by the library that is quickest at them -------------------
class Layers(nn.Module):
    """A linear, one that holds its weight the other way (as GPT-2 does), and one without bias."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 10), Conv1D(7, 10)
        self.three = nn.Linear(7, 600, bias=False)

    def forward(self, x):
        return self.three(F.gelu(self.two(F.gelu(self.one(x)))))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(matmul, "_linear", torch.ops.mkldnn._linear_pointwise)
    monkeypatch.setattr(matmul, "LEAST", 0)


def products(fn):
    with Ran() as seen:
        out = fn()
    return out, seen.names.count("_linear_pointwise")


@pytest.mark.parametrize("recipe,back", [("full", 6), ("bitfit", 3), ("full + lean(level=3)", 7)])
def test_a_linear_alone_is_quick_and_right(quick, recipe, back):
    """Forward and backward, weights that train or not, are the float64 products but for rounding;
    what is made again is made as it was."""
    x = torch.randn(3, 5, 6, requires_grad=True)
    plain = Layers().double()
    tuned = burnish.tune(Layers(), recipe, head=False)
    y, forth = products(lambda: tuned.model(x))
    assert (forth, products(lambda: y.square().sum().backward())[1]) == (3, back)
    twin = x.detach().double().requires_grad_()
    plain(twin).square().sum().backward()
    own = dict(plain.named_parameters())
    assert (y.double() - plain(twin)).abs().max() < 1e-5
    assert (x.grad.double() - twin.grad).abs().max() < 1e-5 * twin.grad.abs().max()
    for name, p in tuned.named_parameters():
        off = (p.grad.double() - own[name].grad).abs().max()
        assert off < 1e-5 * own[name].grad.abs().max(), name
        assert p.grad.is_contiguous()


def test_a_quick_linear_can_be_differentiated_twice_and_under_transforms(quick):
    tuned, plain = burnish.tune(Layers(), "full", head=False), Layers().double()
    found = []
    for model, dtype in ((tuned.model, torch.float32), (plain, torch.float64)):
        x = torch.linspace(-1, 1, 12, dtype=dtype).view(2, 6).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        _, jvp = torch.func.jvp(model, (x.detach(),), (torch.ones_like(x),))
        found.append([x.grad, jvp, *(p.grad for p in model.parameters())])
    for got, exact in zip(*found, strict=True):
        assert (got.double() - exact).abs().max() < 1e-4 * exact.abs().max()


def test_a_changed_weight_raises_and_a_narrow_type_is_torchs_own(quick):
    tuned = burnish.tune(Layers(), "full", head=False)
    y = tuned.model(torch.randn(2, 6, requires_grad=True))
    with torch.no_grad():
        tuned.model.three.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, used = products(lambda: tuned.model(torch.randn(2, 6)))
    assert (y.dtype, used) == (torch.bfloat16, 0)
    with torch.no_grad():
        assert products(lambda: tuned.model(torch.randn(2, 6)))[1] == 0


def test_somebody_elses_recomputation_gets_what_it_counted(quick):
    from torch.utils.checkpoint import checkpoint
    tuned, plain = burnish.tune(Layers(), "full", head=False), Layers().double()
    x = torch.randn(2, 6, requires_grad=True)
    checkpoint(tuned.model, x, use_reentrant=False).square().sum().backward()
    plain(x.double()).square().sum().backward()
    for name, p in plain.named_parameters():
        off = (tuned.model.get_parameter(name).grad.double() - p.grad).abs().max()
        assert off < 1e-5 * p.grad.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "gpt2"])
@pytest.mark.parametrize("method", ["full", "bitfit", "houlsby", "checkpoint", "offload", "lean"])
def test_methods_keep_their_word_where_every_product_is_quick(quick, method, model):
    """Small models never reach oneDNN by themselves."""
    conformance.check(method, model)
