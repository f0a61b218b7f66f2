"""Kept tensors in a few bits: what is exact stays exact, the rest is right in the mean."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as foreign

from burnish.blocks.tape import roles
from burnish.blocks.tape.coded import Coded
from burnish.blocks.tape.codes import Codes, packed, unpacked
from burnish.blocks.tape.derivatives import table
from burnish.blocks.tape.offload import Offload
from burnish.blocks.tape.saved import Tape

D, M, N = 32, 64, 48


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(build, x, params, policy=None, lean=True):
    """Output and gradients of a function, under a tape with a policy or under stock torch."""
    x = x.clone().requires_grad_()
    if policy is None:
        y = build(x)
    else:
        with Tape(lean, policy).recording():
            y = build(x)
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().to(y.dtype).view_as(y)
    return y.detach(), torch.autograd.grad((y * weights).sum(), [x, *params])


def kept(build, x, policy, lean=True):
    """Bytes of distinct storages that wait for backward, parameters excluded."""
    tape, alive, weights = Tape(lean, policy), {}, set()
    pack = tape.pack

    def walk(held):
        if isinstance(held, torch.Tensor):
            if held.untyped_storage()._cdata not in weights:
                alive[held.untyped_storage()._cdata] = held.untyped_storage().nbytes()
        elif hasattr(held, "entry"):
            entry = held.entry
            closed = getattr(entry.fn, "__closure__", None) or ()
            for a in (*entry.args, *entry.kwargs.values(), *closed):
                walk(getattr(a, "cell_contents", a))
        elif hasattr(held, "tensor"):
            walk(held.tensor)
        elif hasattr(held, "held"):
            for h in held.held:
                walk(h)
        elif hasattr(held, "codes"):
            walk(held.codes)

    everything = []

    def see(t):
        if roles.is_weight(t):
            weights.add(t.untyped_storage()._cdata)
        everything.append(pack(t))
        return everything[-1]

    tape.pack = see
    with tape.recording():
        y = build(x)
    for held in everything:
        walk(held)
    assert y.requires_grad
    return sum(alive.values())


# -- codes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 255, 256, 1000])
def test_packed_numbers_come_back(bits, n):
    q = torch.randint(0, 2 ** bits, (n,), dtype=torch.uint8)
    b = packed(q, bits)
    assert b.numel() == math.ceil(n * bits / 8) and torch.equal(unpacked(b, bits, n), q)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_code_is_within_a_step_and_takes_the_bytes_it_says(bits, dtype):
    n, group = 1000, 64
    x = (torch.randn(n, dtype=torch.float64) * 3 + 1).to(dtype)
    codes = Codes.of(lambda a, b: x[a:b], n, bits, group, x, None)
    wide = 8 if dtype == torch.float64 else 4
    assert sum(t.nbytes for t in codes.tensors) == math.ceil(n * bits / 8) + 2 * wide * 16
    for k in range(0, n, group):
        v = x[k:k + group].double()
        step = (v.max() - v.min()) / (2 ** bits - 1)
        off = (codes.values()[k:k + group].double() - v).abs().max()
        assert off <= step * 1.001 + v.abs().max() * 2 * torch.finfo(dtype).eps


def test_groups_of_one_value_and_values_that_are_not_finite_come_back():
    x = torch.full((300,), 2.5)
    assert torch.equal(Codes.of(lambda a, b: x[a:b], 300, 4, 256, x, None).values(), x)
    x[3] = math.inf
    made = Codes.of(lambda a, b: x[a:b], 300, 4, 256, x, None).values()
    assert not made[:256].isfinite().all() and torch.equal(made[256:], x[256:])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_mean_of_many_codes_is_the_value(bits):
    x, draws = torch.randn(64, dtype=torch.float64), 1500
    g = torch.Generator().manual_seed(1)
    step = float(x.max() - x.min()) / (2 ** bits - 1)
    mean = sum(Codes.of(lambda a, b: x[a:b], 64, bits, 64, x, g).values()
               for _ in range(draws)) / draws
    # a mean of `draws` numbers of standard deviation s / 2 at most
    assert float((mean - x).abs().max()) < 5 * step / 2 / draws ** 0.5


# -- derivatives ----------------------------------------------------------------------------------
def test_the_tables_are_the_published_optimum():
    borders, levels, error = table("gelu", 4)
    want = (0, .152, .312, .488, .684, .932, 2.052, 2.676)
    assert borders[7:] == pytest.approx(want, abs=0.01)
    assert borders[:8] == pytest.approx([-b for b in reversed(want)], abs=0.01)
    low = (-.0019, -.0501, -.1094, -.0210, .0832, .1980, .3186, .4396)
    assert levels[:8] == pytest.approx(low, abs=0.005)
    assert levels[8:] == pytest.approx([1 - v for v in reversed(low)], abs=0.005)
    assert error == pytest.approx(3.1e-3, rel=0.02)
    assert table("gelu", 1)[:2] == ((0.0,), pytest.approx((0, 1), abs=1e-4))
    assert table("gelu", 2)[0] == pytest.approx((-.472, 0, .472), abs=0.01)
    assert table("gelu", 2)[2] == pytest.approx(3.9e-2, rel=0.02)


FUNCTIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_is_exact_forward_and_its_derivative_is_near(name):
    x = torch.linspace(-9, 9, 5001, dtype=torch.float64)
    y, (g,) = run(FUNCTIONS[name], x, [], Coded())
    want, (right,) = run(FUNCTIONS[name], x, [])
    assert torch.equal(y, want)
    weights = torch.arange(5001, dtype=torch.float64).cos()
    far = weights.abs() > 1e-3
    off = ((g - right)[far] / weights[far]).abs().max()
    assert off <= (0.07 if "gelu" in name else 0.09)


def test_relu_is_exact_in_one_bit():
    x = torch.randn(N, M)
    x[0] = 0
    for a, b in zip(run(F.relu, x, [], Coded())[1], run(F.relu, x, [])[1], strict=True):
        assert torch.equal(a, b)
    leaf = x.clone().requires_grad_()
    assert kept(lambda v: F.relu(v * 1.0), leaf, Coded(bits=0)) == N * M // 8


def test_dropout_draws_what_stock_dropout_draws_and_keeps_nothing():
    x = torch.randn(N, M)
    for lean in (True, False):
        ends = []
        for policy in (None, Coded()):
            torch.manual_seed(3)
            ends.append(run(lambda v: F.dropout(v, 0.3), x, [], policy, lean))
        assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1][0], ends[1][1][0])
        assert kept(lambda v: F.dropout(v, 0.3), x.clone().requires_grad_(), Coded(), lean) == 0


# -- roles ----------------------------------------------------------------------------------------
def test_a_weight_is_never_coded():
    """Not as a parameter, a view of one, or what autocast makes of it."""
    layer = nn.Linear(M, M)
    seen = []

    class Watch(Coded):
        def pack(self, t, role=None):
            seen.append((role, tuple(t.shape), t.untyped_storage()._cdata))
            return super().pack(t, role)

    x = torch.randn(N, M, requires_grad=True)
    with Tape(policy=Watch()).recording():
        layer(x) @ layer.weight
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    mine = layer.weight.untyped_storage()._cdata
    assert {r for r, _, s in seen if s == mine} == {"weight"}
    assert [r for r, shape, s in seen if shape == (M, M) and s != mine] == ["weight"]
    assert [r for r, shape, _ in seen if shape == (N, M)] == ["linear input"] * 3


def test_one_role_that_is_in_doubt_keeps_the_tensor():
    """As many tokens as outputs: a copy made by autocast could be either."""
    layer, x = nn.Linear(M, M), torch.randn(M, M, requires_grad=True)

    def build(v):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(v).float()

    _, got = run(build, x.detach(), list(layer.parameters()), Coded())
    _, want = run(build, x.detach(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_does_not_enter_linearly_is_kept_as_it_is():
    x = torch.randn(N, M, dtype=torch.float64)
    for fn in (lambda v: v.softmax(-1), torch.exp, lambda v: v * v, lambda v: v.pow(3),
               F.softplus, F.mish):
        for a, b in zip(run(fn, x, [], Coded())[1], run(fn, x, [])[1], strict=True):
            assert torch.equal(a, b)


def test_what_is_kept_anyway_is_not_coded_again():
    layer = nn.Linear(M, M)
    x = torch.randn(N, M)

    def build(v):
        p = v.softmax(-1)                            # keeps its output
        return layer(p)

    for a, b in zip(run(build, x, [layer.weight], Coded())[1], run(build, x, [layer.weight])[1],
                    strict=True):
        assert torch.equal(a, b)
    assert kept(build, x.clone().requires_grad_(), Coded()) == 4 * N * M


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_has_the_gradient_of_its_code(name, affine):
    """Against the formula in float64 on exact x^: within the code's step, everywhere."""
    norm = (nn.LayerNorm if name == "layer_norm" else nn.RMSNorm)(
        M, eps=1e-5, elementwise_affine=affine).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    params = list(norm.parameters())
    x = torch.randn(3, N, M, dtype=torch.float64) * 4 + 1
    y, got = run(norm, x, params, Coded())
    want_y, want = run(norm, x, params)
    assert torch.equal(y, want_y)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) < 0.02 * float(b.abs().max())
    assert any(not torch.equal(a, b) for a, b in zip(got, want, strict=True))


# -- the block ------------------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm, fused attention, GELU MLP; every linear trains."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D, dtype=dtype), nn.LayerNorm(D, dtype=dtype)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, dtype=dtype) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(D, 4 * D, dtype=dtype), nn.Linear(4 * D, D, dtype=dtype)

    def forward(self, x):
        h = self.ln1(x)
        q, k, v = (f(h).view(2, N, 4, D // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, N, D)
        x = x + self.o(a)
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


@pytest.mark.parametrize("dtype, units", [(torch.float32, 5.5), (torch.bfloat16, 7.0)])
def test_a_block_keeps_the_units_it_says(dtype, units):
    block = Block(dtype)
    x = torch.randn(2, N, D, dtype=dtype, requires_grad=True)
    one = 2 * N * D * dtype.itemsize                 # a hidden state
    # k/(8 b) of each coded state (two norms in 8 bits, fc1's output and fc2's input in 4), q, k, v
    # and attention's output as they are; beside them the ranges, 1 / std, and the log-sum-exp
    b = dtype.itemsize
    assert units == 4 + 2 * 8 / (8 * b) + 2 * 4 * 4 / (8 * b)
    n = 2 * N
    ranges = 8 * (2 * n * D + 4 * n * D) // 256
    extra = ranges + 2 * 4 * n + 4 * 4 * n
    assert kept(block, x, Coded()) == pytest.approx(units * one + extra, rel=0.01)
    assert kept(block, x, Tape().policy) > 9.9 * one


def mean_gradient(block, x, policy, draws, lean=True):
    params = list(block.parameters())
    total, square = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for k in range(draws):
        policy.begin(k)
        for t, s, g in zip(total, square, run(block, x, params, policy, lean)[1][1:], strict=True):
            t += g
            s += g * g
    means = [t / draws for t in total]
    errors = [((s / draws - m * m).clamp_min(0) / draws).sqrt()
              for s, m in zip(square, means, strict=True)]
    return means, errors


@pytest.mark.parametrize("lean", [True, False])
def test_the_mean_gradient_of_a_block_is_the_exact_one(lean):
    """Linear inputs in 2 bits and norms in 8, over many draws: within the noise of the mean."""
    block = Block()
    x = torch.randn(2, N, D, dtype=torch.float64)
    policy = Coded(bits=2, derivative=0, group=64)
    means, errors = mean_gradient(block, x, policy, 200, lean)
    want = run(block, x, list(block.parameters()))[1][1:]
    z, seen, top = [], 0, max(float(w.abs().max()) for w in want)
    for m, e, w in zip(means, errors, want, strict=True):
        noisy = e > 1e-9 * top                       # the bias of the keys has gradient 0
        seen += int(noisy.sum())
        z.append((m - w)[noisy] / e[noisy])
        assert torch.allclose(m[~noisy], w[~noisy], rtol=1e-6, atol=1e-8 * top)
    z = torch.cat(z)
    assert seen > 1000
    # as many standard errors off as a mean is: not more, which a bias would make
    assert float(z.square().mean()) < 1.3 and float(z.abs().max()) < 6


def test_a_rounding_that_is_not_random_would_be_seen():
    """The check above fails for codes that round to the nearest level."""
    block, x = Block(), torch.randn(2, N, D, dtype=torch.float64)

    class Nearest(Coded):
        def encode(self, part, n, bits, like, unit=1):
            codes = super().encode(part, n, bits, like, unit)
            v, (_, low, step) = part(0, n), codes.tensors
            z, s = (t.repeat_interleave(self.group)[:n] for t in (low, step))
            q = ((v - z) / s.masked_fill(s == 0, 1)).round().to(torch.uint8)
            codes.tensors[0].copy_(packed(q, bits))
            return codes

    policy = Nearest(bits=2, derivative=0, group=64)
    means, _ = mean_gradient(block, x, policy, 3)
    want = run(block, x, list(block.parameters()))[1][1:]
    off = max(float((m - w).abs().max() / w.abs().max()) for m, w in zip(means, want, strict=True))
    assert off > 0.02


# -- probabilities --------------------------------------------------------------------------------
def attend(x):
    """Attention written out, scores with a mask of what is to come."""
    scores = x @ x.transpose(-1, -2) * 0.5
    mask = torch.full((x.shape[-2],) * 2, float("-inf"), dtype=x.dtype).triu(1)
    return torch.softmax(scores + mask, dim=-1) @ x.detach().cos()


@pytest.mark.parametrize("how", [lambda x: torch.softmax(x, -1), lambda x: x.softmax(dim=1),
                                 lambda x: F.softmax(x, dim=-1, dtype=torch.float64)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_softmax_is_exact_forward_and_keeps_bits_a_number_and_a_step_a_row(bits, how):
    x = torch.randn(40, 33, dtype=torch.float32)
    policy = Coded(bits=4, softmax=bits)
    y, _ = run(how, x, [], policy)
    assert torch.equal(y, how(x))
    wide = y.element_size()
    assert kept(lambda t: how(t), x.clone().requires_grad_(), policy) == \
        math.ceil(40 * 33 * bits / 8) + 40 * wide


def test_the_mean_gradient_of_a_softmax_is_the_exact_one():
    """Two bits, where the variance of a code is largest, against P (g - sum g P) written out."""
    x = torch.randn(6, 9, dtype=torch.float64) * 2
    x[2, 4:] = float("-inf")
    g = torch.randn(6, 9, dtype=torch.float64)
    P = x.exp() / x.exp().sum(1, keepdim=True)
    want = P * (g - (g * P).sum(1, keepdim=True))
    policy, n, total, square = Coded(bits=4, softmax=2), 20000, 0.0, 0.0
    leaf = x.clone().requires_grad_()
    for step in range(n):
        policy.begin(step)
        with Tape(True, policy).recording():
            y = leaf.softmax(-1)
        (made,) = torch.autograd.grad((y * g).sum(), [leaf])
        total, square = total + made, square + made.square()
    mean = total / n
    error = ((square / n - mean.square()).clamp_min(0) / n).sqrt()
    assert torch.equal(mean[2, 4:], torch.zeros(5, dtype=torch.float64))    # what is masked stays
    noisy = error > 1e-9
    z = ((mean - want)[noisy] / error[noisy])
    assert noisy.sum() > 40 and float(z.square().mean()) < 1.6 and float(z.abs().max()) < 4.5
    torch.testing.assert_close(mean[~noisy], want[~noisy], rtol=1e-6, atol=1e-7)
    # an estimate that squared one code would be off by its variance, which this would see
    s = P.amax(1, keepdim=True) / 3
    f = (P / s).frac()
    assert float((s * s * f * (1 - f) * g)[noisy].div(error[noisy]).abs().max()) > 10


def test_each_softmax_of_a_step_has_numbers_of_its_own_and_a_step_comes_again():
    x = torch.randn(5, 64)
    policy = Coded(bits=4, softmax=2, seed=3)
    draws = []
    for step in (1, 1, 2):
        policy.begin(step)
        draws.append([run(lambda t: t.softmax(-1), x, [], policy)[1][0] for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    other = Coded(bits=4, softmax=2, seed=4)
    other.begin(1)
    assert not torch.equal(draws[0][0], run(lambda t: t.softmax(-1), x, [], other)[1][0])


def test_a_softmax_over_another_axis_or_unasked_is_stock():
    x = torch.randn(6, 8)
    for policy, how in ((Coded(softmax=4), lambda t: t.softmax(0)),
                        (Coded(), lambda t: t.softmax(-1))):
        assert torch.equal(run(how, x, [], policy)[1][0], run(how, x, [])[1][0])


def test_written_out_attention_is_right_in_the_mean():
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    want = run(attend, x, [])[1][0]
    policy, n, total, square = Coded(bits=4, softmax=4, group=64), 3000, 0.0, 0.0
    for step in range(n):
        policy.begin(step)
        made = run(attend, x, [], policy)[1][0]
        total, square = total + made, square + made.square()
    mean = total / n
    error = ((square / n - mean.square()).clamp_min(0) / n).sqrt()
    z = (mean - want) / error
    assert float(z.square().mean()) < 1.6 and float(z.abs().max()) < 5


# -- odd circumstances ----------------------------------------------------------------------------
def test_in_somebody_elses_checkpointing_everything_is_stock():
    block, x = Block(), torch.randn(2, N, D, dtype=torch.float64)
    params = list(block.parameters())
    want = run(block, x, params)[1]
    got = run(lambda v: foreign(block, v, use_reentrant=False), x, params, Coded())[1]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_two_forwards_before_one_backward_have_codes_of_their_own():
    """Their sum is, number by number, what the two give one after the other."""
    block = Block()
    params = list(block.parameters())
    xs = [torch.randn(2, N, D, dtype=torch.float64) for _ in range(2)]

    def losses(policy):
        for x in xs:
            with Tape(policy=policy).recording():
                yield block(x).square().sum()

    apart = [torch.autograd.grad(v, params) for v in losses(Coded())]
    both = torch.autograd.grad(sum(list(losses(Coded()))), params)
    for a, b, c in zip(*apart, both, strict=True):
        assert torch.allclose(a + b, c, rtol=1e-12, atol=1e-12)


def test_a_tensor_that_changes_after_it_was_coded_changes_no_gradient():
    """The code is of what the operation read; where the tensor itself is kept, backward raises."""
    layer = nn.Linear(M, M)
    x = torch.randn(N, M)

    def build(v):
        h = v * 2
        y = layer(h)
        h.zero_()
        return y

    policy = Coded(bits=8)
    _, (_, got) = run(build, x, [layer.weight], policy)
    _, (_, want) = run(lambda v: layer(v * 2), x, [layer.weight])
    assert float((got - want).abs().max()) < 0.02 * float(want.abs().max())

    def kept_whole(v):
        h = v * 2
        y = layer(h.softmax(-1).exp_())
        return y

    with pytest.raises(RuntimeError, match="modified"):
        run(kept_whole, x, [layer.weight], policy)


def test_a_part_and_an_expansion_of_a_tensor_come_back():
    layer = nn.Linear(M, 8, dtype=torch.float64)
    x = torch.randn(N, 2 * M, dtype=torch.float64)
    for view in (lambda v: v[:, :M], lambda v: v[:, ::2], lambda v: v[:1, :M].expand(N, M),
                 lambda v: v.view(2 * N, M), lambda v: v.t()[:M].t()):
        build = lambda v, view=view: layer(view(v * 1.5))               # noqa: E731
        _, (gx, gw) = run(build, x, [layer.weight], Coded(bits=8, group=64))
        _, (wx, ww) = run(build, x, [layer.weight])
        assert torch.allclose(gx, wx)
        assert float((gw - ww).abs().max()) < 0.03 * float(ww.abs().max())


@pytest.mark.parametrize("first", ["coded", "offload"])
def test_codes_wait_on_disk_in_whatever_order_they_are_named(first, tmp_path):
    block, x = Block(torch.float32), torch.randn(2, N, D)
    params, tape = list(block.parameters()), Tape()
    away = Offload("disk", threshold=1, folder=str(tmp_path))
    for policy in (Coded(), away) if first == "coded" else (away, Coded()):
        tape.keep(policy)
    leaf = x.clone().requires_grad_()
    with tape.recording():
        loss = block(leaf).sum()
    assert 0 < away.bytes_written < 7 * x.nbytes      # what is coded went as codes
    got = torch.autograd.grad(loss, params)
    with Tape(policy=Coded()).recording():
        loss = block(leaf).sum()
    for a, b in zip(got, torch.autograd.grad(loss, params), strict=True):
        assert torch.equal(a, b)


def test_the_rounding_leaves_everybody_elses_random_numbers_alone():
    block, x = Block(), torch.randn(2, N, D, dtype=torch.float64)
    before = torch.get_rng_state()
    first = run(block, x, list(block.parameters()), Coded())[1]
    assert torch.equal(before, torch.get_rng_state())
    torch.randn(5)
    again = run(block, x, list(block.parameters()), Coded())[1]
    other = run(block, x, list(block.parameters()), Coded(seed=1))[1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
