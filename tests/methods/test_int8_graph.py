"""The int8 graph: whole numbers throughout, held against the same sums in int64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import burnish
from burnish.blocks.weight.integer import Grid, Int8Provider, grid_of, on_grid
from burnish.core.errors import BurnishError, CheckError, ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Site
from burnish.testing import tiny

F64 = torch.float64
LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 4, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (6, 7)),
    "the transpose": (lambda: Conv1D(5, 7), (3, 4, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), (2, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False), (2, 4, 5, 5)),
    "one axis": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding=2), (2, 4, 9)),
}


class Whole:
    """A layer in int64, written out: scales of its weight and of data, and sums."""

    def __init__(self, layer, data):
        W = layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()
        self.layer = layer
        rows = W.float().flatten(1)
        self.s_w = rows.abs().amax(1).div(127).double()
        self.W = (rows / self.s_w.float()[:, None]).round().long().view(W.shape)
        assert self.W.abs().amax() == 127
        with torch.no_grad():
            self.x, self.y = self.span(data), self.span([layer(x) for x in data])
        self.e = self.x[0] * self.s_w / self.y[0]
        self.b = None if layer.bias is None else \
            (layer.bias.detach() / (self.x[0] * self.s_w)).round().long()

    @staticmethod
    def span(tensors):
        low, high = min(0.0, *(float(t.min()) for t in tensors)), \
            max(0.0, *(float(t.max()) for t in tensors))
        scale = (high - low) / 255
        return scale, round(-128 - low / scale)

    def real(self, q):
        return (q - self.y[1]).double() * self.y[0]

    def codes(self, x):
        return ((x / self.x[0]).round() + self.x[1]).clamp(-128, 127).long()

    def sums(self, q):
        """Of codes q - z_x (padded with zeros: the code z_x) and W, all int64."""
        q = q - self.x[1]
        if not hasattr(self.layer, "kernel_size"):
            return q @ self.W.t()
        c = self.layer
        for side, p in zip(range(q.dim() - 1, 1, -1), reversed(c.padding), strict=True):
            widths = [0, 0] * (q.dim() - 1 - side) + [p, p]
            q = F.pad(q, widths)
        for k, (n, step, d) in enumerate(zip(c.kernel_size, c.stride, c.dilation, strict=True)):
            q = q.unfold(2 + k, d * (n - 1) + 1, step)[..., ::d]
        sides = len(c.kernel_size)
        q = q.flatten(2 + sides)                                    # (batch, in, out.., kernel)
        own = []
        for part, W in zip(q.chunk(c.groups, 1), self.W.flatten(2).chunk(c.groups), strict=True):
            own.append(torch.einsum("bc...k,ock->bo...", part, W))
        return torch.cat(own, 1)

    def channels(self, v):
        return v.view(-1, *(1,) * len(getattr(self.layer, "kernel_size", ())))

    def __call__(self, x):
        """(codes of the output, what of it is not clipped)."""
        a = self.sums(self.codes(x))
        if self.b is not None:
            a = a + self.channels(self.b)
        q = (self.channels(self.e) * a).round() + self.y[1]
        return q.clamp(-128, 127).long(), (q >= -128) & (q <= 127)


def made(which, dtype=F64, recipe="int8_graph + bitfit"):
    torch.manual_seed(0)
    layer, shape = LAYERS[which]
    layer = layer()
    nn.init.normal_(layer.weight)
    if layer.bias is None:
        recipe = "int8_graph + lora(rank=1)"
    else:
        nn.init.normal_(layer.bias)
    data = [torch.randn(shape, dtype=F64) * k for k in (1.0, 0.6)]
    whole = Whole(copy.deepcopy(layer).double(), data)
    net = nn.Sequential(layer).double()
    tuned = burnish.tune(net, recipe, head=False, targets="0", calibration=data)
    return net.to(dtype), tuned, whole, 1.6 * torch.randn(shape, dtype=F64)


@pytest.mark.parametrize("which", LAYERS)
def test_a_layer_gives_what_the_whole_numbers_give(which):
    net, _, whole, x = made(which)
    want, inside = whole(x)
    assert 0 < float(inside.double().mean()) < 1, "something is clipped, not all"
    assert not bool(((whole.codes(x) > -128) & (whole.codes(x) < 127)).all())
    got = net(x).detach()
    assert torch.equal((got / whole.y[0]).round().long() + whole.y[1], want)
    torch.testing.assert_close(got, whole.real(want), rtol=1e-12, atol=1e-12)
    W = whole.W.double().flatten(1) * whole.s_w[:, None]
    held = net[0].weight.detach()
    held = held.t() if which == "the transpose" else held
    torch.testing.assert_close(held.flatten(1), W, rtol=1e-12, atol=0)


@pytest.mark.parametrize("which", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_the_products_is_rounded_away(which, dtype):
    """fp32 gives the same whole numbers; a bf16 model the grid's own numbers."""
    net, _, whole, x = made(which, dtype)
    x = (whole.codes(x) - whole.x[1]).double() * whole.x[0]  # no ties that precision would break
    got = net(x.to(dtype)).detach()
    q = got.double() / whole.y[0] + whole.y[1]
    if dtype == torch.float32:
        assert torch.equal(q.round().long(), whole(x)[0])
    assert got.dtype == dtype
    off = (got - ((q.round() - whole.y[1]) * whole.y[0]).to(dtype)).abs().max()
    assert float(off) <= torch.finfo(dtype).eps * float(got.abs().max())


@pytest.mark.parametrize("which", ["linear", "conv", "depthwise", "one axis"])
def test_gradients_go_straight_through_and_end_where_something_is_clipped(which):
    net, _, whole, x = made(which)
    x.requires_grad_()
    y = net(x)
    g = torch.randn_like(y)
    dx, *db = torch.autograd.grad(y, [x, *([net[0].bias] if net[0].bias is not None else [])], g)
    inside = whole(x.detach())[1]
    q = (x.detach() / whole.x[0]).round() + whole.x[1]
    plain = copy.deepcopy(whole.layer)
    with torch.no_grad():
        plain.weight.copy_(whole.W.double() * whole.s_w.view(-1, *(1,) * (whole.W.dim() - 1)))
    at = ((whole.codes(x.detach()) - whole.x[1]).double() * whole.x[0]).requires_grad_()
    want = torch.autograd.grad(plain(at), [at, *([plain.bias] if db else [])], g * inside)
    torch.testing.assert_close(dx, want[0] * ((q >= -128) & (q <= 127)), rtol=1e-10, atol=1e-12)
    if db:
        torch.testing.assert_close(db[0], want[1], rtol=1e-10, atol=1e-12)


def test_sgd_on_a_bias_is_qas_on_its_whole_numbers():
    """G_b / (s_W s_x)^2 of the integer bias, per output, then plain SGD."""
    net, tuned, whole, x = made("conv")
    unit = whole.x[0] * whole.s_w
    b = whole.layer.bias.detach().clone()
    target = torch.randn_like(net(x).detach())
    opt = torch.optim.SGD(tuned.parameters(), lr=0.1)
    (net(x) - target).square().mean().backward()
    letter = (b / unit).requires_grad_()                     # the integer bias, unrounded

    def through(v, low=None):
        return v + (v.round() - v).detach()

    a = whole.sums(whole.codes(x)) + whole.channels(through(letter))
    q = through(whole.channels(whole.e) * a) + whole.y[1]
    y = (q.clamp(-128, 127) - whole.y[1]) * whole.y[0]
    torch.testing.assert_close(y.detach(), net(x).detach(), rtol=1e-12, atol=1e-12)
    (G,) = torch.autograd.grad((y - target).square().mean(), letter)
    scaled = G / unit**2
    real = net[0].bias.grad
    torch.testing.assert_close(letter.detach() / scaled, b / real, rtol=1e-9, atol=0)
    assert not torch.allclose(letter.detach() / G, b / real, rtol=1e-2)
    opt.step()
    torch.testing.assert_close(net[0].bias.detach(), (letter.detach() - 0.1 * scaled) * unit,
                               rtol=1e-10, atol=1e-12)


def test_a_frozen_layer_keeps_a_bit_a_number():
    """Two convolutions under one that trains its bias at the bottom: masks alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 4, 10, 10)
    tuned = burnish.tune(net, "int8_graph + bitfit(targets='0')", head=False, targets="0,1,2",
                         calibration=[x])
    tuned.state.tape.lean, kept = False, []
    tuned.state.tape.pack = lambda t: kept.append(t) or t
    tuned.state.tape.unpack = lambda t: t
    net(x).sum().backward()
    sizes = [2 * 8 * 8 * 8, 2 * 8 * 8 * 8, 2 * 8 * 6 * 6, 2 * 8 * 6 * 6, 2 * 4 * 6 * 6]
    assert [t.dtype for t in kept] == [torch.uint8] * 5
    assert [t.numel() for t in kept] == [n // 8 for n in sizes]    # what 0 gives; both ends of 1, 2


def test_what_is_held_is_a_byte_a_weight_and_a_scale_an_output():
    net, tuned, _, _ = made("conv", torch.float32)
    (held,) = [m for m in net.modules() if isinstance(m, Int8Provider)]
    assert held.codes.dtype == torch.int8 and held.scale.dtype == torch.float32
    assert held.nbytes == 4 * 6 * 6 + 4 * 6
    net.to(torch.bfloat16)
    assert held.scale.dtype == torch.float32 and net[0].weight.dtype == torch.bfloat16
    assert "int8" in repr(held)
    tuned.detach()


@pytest.mark.parametrize("which", LAYERS)
def test_detach_gives_the_layer_back(which):
    net, tuned, whole, x = made(which)
    tuned.detach()
    assert torch.equal(net(x), whole.layer(x))


def small_mobile():
    """A stem, an inverted block with its sum, and a head, of stock layers."""
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
                nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24),
                nn.ReLU6(), nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))

        def forward(self, x):
            return x + self.body(x)

    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
                         Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("model", ["mobile", "vit", "gpt2"])
def test_models_answer_nearly_as_they_did_and_train(model, tmp_path):
    if model == "mobile":
        net, batch = small_mobile(), torch.randn(4, 3, 12, 12)
        targets, ask = "0,body.*", lambda net: net(batch)
        loss = lambda out, batch: out.square().mean()                          # noqa: E731
    else:
        net, batch = tiny(model)
        targets, ask, loss = None, lambda net: net(**batch).logits, None
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "int8_graph + lora(rank=2)", targets=targets, head=False,
                         calibration=[batch])
    net.eval(), base.eval()
    with torch.no_grad():
        got, want = ask(net), ask(base)
        assert not torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=0, atol=0.05 * float(want.abs().max()))
        with tuned.disabled():                           # the base is the graph
            assert torch.equal(ask(net), got)
    net.train()
    opt = tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch, loss=loss)) for _ in range(8)]
    assert losses[-1] < losses[0] and opt is not None
    net.eval()
    tuned.save(tmp_path / "a")
    again = burnish.load(base, tmp_path / "a")           # no data
    base.train(), net.train()
    base.load_state_dict({k: v for k, v in net.state_dict().items()
                          if "running" in k or "tracked" in k}, strict=False)
    net.eval(), base.eval()
    assert torch.equal(ask(base), ask(net))
    again.detach()


def test_samples_with_adapters_of_their_own_go_over_the_grids_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5))
    x = torch.randn(3, 7)
    tuned = burnish.tune(net, "int8_graph + lora(rank=1)", head=False, targets="0",
                         calibration=[x])
    tuned.add("other", "lora(rank=1)")
    for n, p in net.named_parameters():
        if ".B" in n:
            nn.init.normal_(p)
    net.eval()
    with torch.no_grad():
        alone = {}
        for name in ("default", "other"):
            tuned.use(name)
            alone[name] = net(x)
        tuned.use(["default", "other", None])
        got = net(x)
        with tuned.disabled():
            base = net(x)
    assert torch.equal(got, torch.stack([alone["default"][0], alone["other"][1], base[2]]))


def test_other_parts_that_multiply_by_the_weight_themselves_are_told_there_is_more():
    net, _, _, _ = made("linear", recipe="int8_graph + lora(rank=1)")
    assert net[0].burnish.product(net[0], ()) is None


def test_a_transform_sees_the_same():
    net, _, whole, x = made("linear")
    want = net(x).detach()
    got, vjp = torch.func.vjp(net, x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(want)
    y = net(x.requires_grad_())
    torch.testing.assert_close(vjp(g)[0], torch.autograd.grad(y, x, g)[0], rtol=1e-10, atol=1e-12)


def test_one_grid_under_a_transform():
    x = torch.tensor([-3.0, 0.3, 0.7, 3.0])
    got = torch.func.grad(lambda x: (on_grid(x, grid_of(-1.0, 1.55)) * 3).sum())(x)
    assert torch.equal(got, torch.tensor([0.0, 3.0, 3.0, 0.0]))


def test_grids_span_the_data_and_have_zero_on_them():
    assert grid_of(0.0, 255.0) == Grid(1.0, -128) and grid_of(-255.0, 0.0) == Grid(1.0, 127)
    assert grid_of(5.0, 51.0) == Grid(0.2, -128) and grid_of(0.0, 0.0).scale == 1.0
    made = grid_of(-1.0, 1.55)
    assert made == (pytest.approx(0.01), -28)
    x = torch.tensor([-2.0, -1.0, 0.0, 0.004, 0.0061, 1.55, 3.0])
    torch.testing.assert_close(on_grid(x, made),
                               torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.01, 1.55, 1.55]))
    step = torch.tensor([0.3, 10.0])                     # sums are rounded to their own steps first
    torch.testing.assert_close(on_grid(torch.tensor([0.44, 0.44]), made, step),
                               torch.tensor([0.3, 0.0]))
    for low, high in ((float("-inf"), 0.0), (0.0, float("nan"))):
        with pytest.raises(ConfigError, match="spans numbers"):
            grid_of(low, high)


def test_refusals_and_facts():
    (method,) = parse("int8_graph")
    assert method.samples == 128 and not method.merges and not method.identity
    with pytest.raises(RecipeError, match="samples=0: expected at least 1"):
        parse("int8_graph(samples=0)")
    parse("int8_graph(samples=1)")
    net, tuned, _, _ = made("linear")
    with pytest.raises(CheckError, match="int8_graph has no form as a plain weight"):
        tuned.merge()
    tuned.add("other", "lora(rank=1)")
    tuned.use("other")
    with pytest.raises(CheckError, match="0 reads and gives numbers on a grid"):
        tuned.merge()
    with pytest.raises(ConfigError, match="reads data before it starts"):
        burnish.tune(nn.Sequential(nn.Linear(3, 3)), "int8_graph + lora(rank=1)", targets="0")
    with pytest.raises(BurnishError, match="the grid of the stored weights"):
        burnish.tune(nn.Sequential(nn.Linear(3, 3)), "int8_graph + nf4", targets="0")
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "int8_graph(targets='all-linear, head') + lora(rank=2, targets='q')",
                         head=False, calibration=[tiny("vit")[1]])
    assert net.classifier._parameters["weight"] is not None
    said = tuned.adapters["default"].settled["int8_graph"]
    assert "classifier.weight" not in said and len(said) == 12
    (place,) = [p for p in tuned.anatomy.places if p.block == 0 and p.role == "fc1"]
    blank = method.storage(Site(place, torch.ones(place.out, place.inp)))
    assert blank.grid == blank.written == Grid(1.0, 0)       # where nothing has values


def test_only_so_many_samples_are_read():
    x = torch.cat([torch.linspace(-1, 1, 4).view(2, 2), torch.full((1, 2), 9.0)])
    grids = []
    for samples in (2, 3):
        net = nn.Sequential(nn.Linear(2, 2))
        burnish.tune(net, f"int8_graph(samples={samples}) + lora(rank=1)", head=False, targets="0",
                     calibration=[x])
        (held,) = [m for m in net.modules() if isinstance(m, Int8Provider)]
        grids.append(held.grid)
    assert grids[0] == grid_of(-1.0, 1.0) and grids[1] == grid_of(-1.0, 9.0)
