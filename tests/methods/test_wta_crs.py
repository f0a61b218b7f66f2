"""WTA-CRS: what is kept, what is right in the mean, what stays exact."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.tape.sampled import Sampled, drawn, nbytes
from burnish.blocks.tape.saved import Tape
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.memory import Ledger
from burnish.testing.models import tiny

INP, HID, OUT, N = 24, 40, 8, 64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(INP, HID), nn.Linear(HID, OUT)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def mse(out, batch):
    return (out - batch[1]).square().mean()


def heavy(n, width, seed=0, spread=1.5):
    """Rows whose lengths are far apart, as tokens' are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64)
    return x * torch.exp(torch.randn(n, 1, generator=g, dtype=torch.float64) * spread)


def gradients(tuned, batch, loss=mse):
    for p in tuned.parameters():
        p.grad = None
    tuned.loss(batch, loss).backward()
    return {n: p.grad.clone() for n, p in tuned.named_parameters()}


# -- the estimator --------------------------------------------------------------------------------
def estimates(X, G, k, draws):
    g, norms = torch.Generator().manual_seed(1), X.norm(dim=1)
    for _ in range(draws):
        rows, factor = drawn(norms, k, g)
        yield (X[rows] * factor[:, None]).t() @ G[rows]


def winners(X, k):
    """|C| by trying all, and p in descending order."""
    p = (X.norm(dim=1) / X.norm(dim=1).sum()).sort(descending=True).values
    return min(range(k), key=lambda c: float(p[c:].sum()) / (k - c)), p


def test_the_mean_of_many_draws_is_the_gradient_in_float64():
    n, k, draws = 200, 60, 4000
    X, G = heavy(n, 6), heavy(n, 4, seed=1, spread=0.1)
    want = X.t() @ G
    seen = torch.stack(list(estimates(X, G, k, draws)))
    error = seen.std(0) / draws**0.5
    assert float(((seen.mean(0) - want) / error).abs().max()) < 5
    off = (seen - want).flatten(1).norm(dim=1).square().mean()
    # the variance of independent draws, by the equation
    C, _ = winners(X, k)
    order = X.norm(dim=1).argsort(descending=True)
    rest = order[C:]
    q = X[rest].norm(dim=1) / X[rest].norm(dim=1).sum()
    terms = torch.einsum("ni,nj->nij", X[rest], G[rest])
    second = (terms.flatten(1).square().sum(1) / q).sum()
    says = (second - terms.sum(0).square().sum()) / (k - C)
    assert 0.2 * float(says) < float(off) < float(says)


def test_the_winners_are_the_likeliest_and_their_number_the_best():
    X = heavy(200, 6)
    C, _ = winners(X, 60)
    likeliest = set(X.norm(dim=1).argsort(descending=True)[:C].tolist())
    rows, factor = drawn(X.norm(dim=1), 60, torch.Generator().manual_seed(0))
    as_they_are = {int(r) for r, f in zip(rows, factor, strict=True) if f == 1}
    assert 10 < C < 59 and as_they_are == likeliest
    assert torch.equal(rows, rows.sort().values)
    assert float(factor.min()) >= 0


def test_it_is_nearer_than_plain_sampling_and_not_biased_as_the_winners_alone():
    X, G = heavy(200, 6), heavy(200, 4, seed=1, spread=0.1)
    want, k = X.t() @ G, 60
    ours = torch.stack(list(estimates(X, G, k, 800)))
    p = X.norm(dim=1) / X.norm(dim=1).sum()
    g = torch.Generator().manual_seed(2)
    plain = []
    for _ in range(800):
        at = torch.multinomial(p, k, True, generator=g)
        plain.append((X[at] / (k * p[at])[:, None]).t() @ G[at])
    off = [float((e - want).flatten(1).norm(dim=1).square().mean()) for e in
           (ours, torch.stack(plain))]
    assert off[0] < 0.5 * off[1]
    top = X.norm(dim=1).argsort(descending=True)[:k]
    alone = float((X[top].t() @ G[top] - want).norm())
    assert float((ours.mean(0) - want).norm()) < 0.5 * alone


@pytest.mark.parametrize("n", [1, 7, 64])
def test_all_rows_of_one_length_are_drawn_with_factors_that_add_up(n):
    seen = []
    for k in (1, max(1, n // 2), n):
        rows, factor = drawn(torch.ones(n), k, torch.Generator().manual_seed(n))
        assert len(rows) == k and int(rows.min()) >= 0 and int(rows.max()) < n
        seen.append(float(factor.sum()))
    assert seen == pytest.approx([n] * 3)


def test_rows_of_zeros_are_never_counted():
    norms = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])
    for k in range(1, 6):
        for seed in range(20):
            rows, factor = drawn(norms, k, torch.Generator().manual_seed(seed))
            assert bool((factor[norms[rows] == 0] == 0).all()) and torch.isfinite(factor).all()
    rows, factor = drawn(torch.zeros(5), 3, None)
    assert float(factor.abs().sum()) == 0 and len(rows) == 3


def test_a_draw_on_a_border_takes_the_row_behind_it(monkeypatch):
    """Draws of 0 in each stratum, in fp64: of four rows alike each is taken once."""
    def least(k, generator=None, dtype=None, device=None):
        assert dtype == torch.float64
        return torch.zeros(k, dtype=dtype)

    monkeypatch.setattr(torch, "rand", least)
    rows, factor = drawn(torch.ones(4), 4, None)
    assert rows.tolist() == [0, 1, 2, 3] and factor.tolist() == [1.0] * 4


# -- in a network ---------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["full", "lora(rank=2, alpha=2)"])
def test_the_mean_over_steps_is_the_exact_gradient_in_float64(recipe):
    torch.manual_seed(0)
    net, x, y = Net().double(), heavy(N, INP), torch.randn(N, OUT, dtype=torch.float64)
    more = " + bitfit" if recipe == "full" else ""
    tuned = burnish.tune(net, f"{recipe}{more} + wta_crs(retained=0.4)", targets="a,b", head=False)
    for p in tuned.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64) * 0.3
    leaves = {n: p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}

    def layer(name):
        own = getattr(net, name)
        if recipe == "full":
            return leaves[f"{name}.weight"], leaves.get(f"{name}.bias", own.bias.detach())
        A, B = (next(p for n, p in leaves.items() if n.startswith(f"{name}.")
                     and n.endswith(f".{f}")) for f in "AB")
        return own.weight.detach() + B @ A, own.bias.detach()

    (Wa, ba), (Wb, bb) = layer("a"), layer("b")
    mse(torch.relu(x @ Wa.t() + ba) @ Wb.t() + bb, (x, y)).backward()
    draws, got = 400, []
    for k in range(draws):
        tuned.state.tape.policy.begin(k)
        got.append(gradients(tuned, (x, y)))
    estimated = set()
    for n, want in leaves.items():
        each = torch.stack([g[n] for g in got])
        error = each.std(0) / draws**0.5
        noisy = error > 1e-9 * want.grad.abs().max()
        if bool(noisy.any()):
            estimated.add(n)
            assert float(((each.mean(0) - want.grad)[noisy] / error[noisy]).abs().max()) < 5.5
        assert torch.allclose(each.mean(0)[~noisy], want.grad[~noisy], rtol=1e-9, atol=1e-12), n
    # biases, and B that reads A x, have what goes down exactly
    assert {n.rpartition(".")[2] for n in estimated} == ({"weight"} if recipe == "full" else {"A"})
    assert len(estimated) == 2


@pytest.mark.parametrize("recipe", ["full + wta_crs(retained=1.0)", "full + wta_crs(floor=64)"])
def test_where_all_tokens_are_kept_it_is_exact(recipe):
    torch.manual_seed(0)
    net, batch = Net().double(), (heavy(N, INP), torch.randn(N, OUT, dtype=torch.float64))
    stock = copy.deepcopy(net)
    got = gradients(burnish.tune(net, recipe, head=False), batch)
    mse(stock(batch[0]), batch).backward()
    for n, p in stock.named_parameters():
        assert torch.allclose(got[n], p.grad, rtol=1e-12, atol=1e-15), n


@pytest.mark.parametrize("dtype, each", [(torch.float32, 8), (torch.bfloat16, 8),
                                         (torch.float64, 12)])
def test_a_layer_keeps_its_rows(dtype, each):
    """k (width b + 8) bytes an input, k (8 width + 12) in fp64, and one bit for the ReLU."""
    rows, b = N * 64, dtype.itemsize
    net, batch = Net().to(dtype), (torch.randn(rows, INP, dtype=dtype),
                                   torch.randn(rows, OUT, dtype=dtype))
    tuned = burnish.tune(net, "full + wta_crs(retained=0.25)", head=False)
    with Ledger(net) as ledger:
        ledger.watch("weights", [*batch])
        loss = tuned.loss(batch, mse)
        kept = sum(e.bytes for e in ledger.entries
                   if e.death is None and ledger.category(e) != "weights")
    k = rows // 4
    says = k * (INP * b + each) + k * (HID * b + each) + rows * HID / 8
    others = rows * OUT * b                                # the loss keeps out - y
    assert loss.requires_grad and kept - others - loss.nbytes == pytest.approx(says, abs=200)
    method = parse("wta_crs(retained=0.25)")[0]
    assert says == pytest.approx(sum(method.kept_bytes(rows, w, b) for w in (INP, HID))
                                 + rows * HID / 8)
    assert method.kept_bytes(10, INP, b) == 10 * INP * b    # ten tokens are kept as they are
    assert method.kept_bytes(30, INP, b) == nbytes(10, INP, b)


def kept(fn, x, policy):
    with Ledger() as ledger:
        ledger.watch("weights", [x])
        with Tape(lean=False, policy=policy).recording():
            out = fn(x)
        total = sum(e.bytes for e in ledger.entries if e.death is None
                    and ledger.category(e) != "weights") - out.nbytes
    return total


def test_readers_of_one_input_share_its_rows():
    layers = nn.ModuleList(nn.Linear(HID, HID) for _ in range(3))
    policy = Sampled(0.25)
    x = torch.randn(4, 256, HID).requires_grad_()

    def qkv(x):
        h = torch.tanh(x) * 1.0 + 0.0               # a fresh tensor that nothing else keeps
        return sum(f(h) for f in layers)

    tanh = x.nbytes
    assert kept(qkv, x, policy) - tanh == pytest.approx(nbytes(256, HID, 4), abs=64)
    assert policy.taken == 1


def test_another_draw_for_what_has_changed_in_between():
    layers = nn.ModuleList(nn.Linear(HID, HID) for _ in range(2))
    policy = Sampled(0.25)
    with Tape(lean=False, policy=policy).recording():
        h = torch.randn(256, HID)
        first = layers[0](h)
        h.mul_(2)
        (first + layers[1](h)).sum()
    assert policy.taken == 2


def test_what_is_kept_anyway_is_not_sampled():
    layer, policy = nn.Linear(HID, HID), Sampled(0.25)
    x = torch.randn(256, HID).requires_grad_()
    assert kept(lambda v: layer(v.softmax(-1)), x, policy) == x.nbytes and policy.taken == 0


def test_products_of_states_convolutions_and_weights_are_kept_as_they_are():
    """What goes down stays exact: only what a weight multiplies is sampled."""
    policy, g = Sampled(0.1), torch.Generator().manual_seed(0)
    q, k = (torch.randn(256, 64, generator=g, dtype=torch.float64, requires_grad=True)
            for _ in range(2))
    picture = torch.randn(2, 3, 32, 32, generator=g, dtype=torch.float64, requires_grad=True)
    conv = nn.Conv2d(3, 4, 3).double()

    def run():
        return ((q @ k.t()).tanh().sum() + (q * k).cos().sum() + conv(picture).square().sum())

    want = torch.autograd.grad(run(), (q, k, picture, conv.weight))
    with Tape(lean=False, policy=policy).recording():
        loss = run()
    for a, b in zip(torch.autograd.grad(loss, (q, k, picture, conv.weight)), want, strict=True):
        assert torch.equal(a, b)
    assert policy.taken == 0


def test_a_gain_that_trains_reads_rows_and_what_goes_down_is_exact():
    policy, gain = Sampled(0.25), nn.Parameter(torch.randn(HID).double())
    x = torch.randn(256, HID, dtype=torch.float64, requires_grad=True)
    with Tape(lean=False, policy=policy).recording():
        y = (x + 0.0) * gain
    dx, dg = torch.autograd.grad(y.sum(), (x, gain))
    assert torch.equal(dx, gain.detach().expand_as(x)) and policy.taken == 1
    assert not torch.allclose(dg, x.detach().sum(0))


def test_a_view_of_something_larger_is_sampled_by_its_own_rows():
    layer, policy = nn.Linear(HID, OUT).double(), Sampled(0.9)
    wide = torch.randn(200, 2 * HID, dtype=torch.float64)
    wide[:, :HID] *= 1e9                             # nothing of this is in what is read
    with Tape(lean=False, policy=policy).recording():
        loss = layer(wide[:, HID:]).sum()
    (got,) = torch.autograd.grad(loss, layer.weight)
    assert policy.taken == 1 and float(got.abs().max()) < 1e4


# -- in models ------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["full + lean(on=False)", "lora(rank=4) + checkpoint",
                                    "nf4 + lora(rank=4) + lean(on=False)"])
def test_the_promise_is_kept_and_the_loss_is_exact(recipe):
    net, batch = tiny("llama", batch=4)
    promised = burnish.simulate(copy.deepcopy(net), f"{recipe} + wta_crs", batch)
    plain = burnish.tune(copy.deepcopy(net), recipe)
    tuned = burnish.tune(net, f"{recipe} + wta_crs")
    assert torch.equal(plain.loss(batch), tuned.loss(batch))
    measured = burnish.measure(tuned, batch)
    assert promised.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)


def test_a_block_of_the_model_keeps_ten_units_and_its_share_of_six():
    """A pre-norm block with fused attention that trains whole, with products never made twice:
    what waits is 10 d units and 6 retained more, as the table of memory says."""
    grown = []
    for more in ("", " + wta_crs(retained=0.25)"):
        found = []
        for n in (16, 32):
            net, batch = tiny("vit", batch=n)
            tuned = burnish.tune(net, f"full + lean(on=False){more}", head=False)
            with Ledger(net) as ledger:
                ledger.watch("weights", list(batch.values()))
                loss = tuned.loss(batch)
                found.append(sum(e.bytes for e in ledger.entries if e.death is None
                                 and ledger.category(e) != "weights"))
            assert loss.requires_grad
        grown.append(found[1] - found[0])
    config = net.config
    tokens = 16 * ((config.image_size // config.patch_size) ** 2 + 1)
    d, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    # inputs of q, k, v (one), of fc1 and of fc2; that of o is attention's own output
    widths = [d, d, m] * layers
    saved = sum(tokens * w * 4 - tokens * 0.25 * (w * 4 + 8) for w in widths)
    saved += tokens * d * 4          # the head reads one token of a state that was held whole
    assert grown[0] - grown[1] == pytest.approx(saved, rel=0.06)


def test_a_run_in_which_nothing_was_sampled_says_so_once():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "bitfit + wta_crs", head=False)
    tuned.optimizer(lr=1e-3)
    with pytest.warns(UserWarning, match="wta_crs saves nothing here"):
        tuned.step(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.step(batch)


def test_a_run_that_samples_says_nothing():
    net = Net()
    tuned = burnish.tune(net, "full + wta_crs", head=False)
    tuned.optimizer(lr=1e-3)
    batch = torch.randn(N, INP), torch.randn(N, OUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            tuned.step(batch, mse)
            assert tuned.state.tape.policy.taken == 0     # counted anew for every update


def test_rows_wait_where_offload_says():
    torch.manual_seed(0)
    net, batch = Net(), (torch.randn(N, INP), torch.randn(N, OUT))
    other = copy.deepcopy(net)
    a = burnish.tune(net, "full + wta_crs + offload(to='disk', threshold=1)", head=False)
    b = burnish.tune(other, "full + wta_crs", head=False)
    got, want = gradients(a, batch), gradients(b, batch)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn():
    torch.manual_seed(0)
    net, batch = Net(), (torch.randn(N, INP), torch.randn(N, OUT))
    tuned = burnish.tune(net, "full + wta_crs", head=False)
    policy = tuned.state.tape.policy
    policy.begin(3)
    want = gradients(tuned, batch)
    again = copy.deepcopy(policy)
    assert (again.keep, again.least, again.seed, again.step) == (0.3, 10, policy.seed, 3)
    policy.begin(4)
    other = gradients(tuned, batch)
    policy.begin(3)
    got = gradients(tuned, batch)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert not torch.equal(other["a.weight"], want["a.weight"])


@pytest.mark.parametrize("settings", ["retained=0", "retained=1.01", "floor=0", "retained=-0.1"])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(RecipeError, match="retained is above 0 and at most 1, floor 1 or more"):
        burnish.parse(f"wta_crs({settings})")


def test_it_and_codes_are_two_forms_of_one_tensor():
    with pytest.raises(RecipeError, match="the form of kept tensors"):
        burnish.tune(Net(), "lora(rank=2) + wta_crs + coded", targets="a")


def test_a_compiled_model_says_that_it_runs_uncompiled():
    net = Net()
    burnish.tune(net, "full + wta_crs", head=False)
    with pytest.warns(UserWarning, match="wta_crs"):
        torch.compile(net, backend="eager")(torch.randn(N, INP))


def test_defaults():
    method = burnish.parse("wta_crs")[0]
    assert (method.retained, method.floor) == (0.3, 10)
