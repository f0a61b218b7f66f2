"""Sparse update: late biases, and some input channels of some weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.channels import KernelSlice
from burnish.blocks.weight.integer import Int8Provider
from burnish.blocks.weight.slices import Slice
from burnish.blocks.weight.term import Term
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place, Site
from burnish.testing import follows, stir, tiny

F64 = torch.float64
CONVS = {
    "plain": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (3, 8, 7, 6)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1, bias=False), (3, 8, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8, padding=1), (3, 8, 5, 5)),
    "by groups": (lambda: nn.Conv2d(8, 6, (3, 1), groups=2, dilation=2), (3, 8, 9, 5)),
    "one axis": (lambda: nn.Conv1d(8, 6, 3, padding=1), (3, 8, 9)),
    "three axes": (lambda: nn.Conv3d(8, 2, 2), (2, 8, 3, 4, 3)),
    "padded by words": (lambda: nn.Conv2d(8, 6, 3, padding="same"), (2, 8, 5, 5)),
    "turned": (lambda: nn.ConvTranspose2d(8, 6, 2, groups=2), (2, 8, 4, 4)),
}


def heaviest(conv, n):
    """Input channels whose weights have the largest norm, one by one."""
    W, g = conv.weight.detach(), conv.groups
    if isinstance(conv, nn.ConvTranspose2d):             # stored (in, out / groups, kernel)
        norms = W.flatten(1).square().sum(1)
    else:
        per = conv.in_channels // g
        norms = torch.stack([W[c // per * (len(W) // g) :][: len(W) // g, c % per].square().sum()
                             for c in range(conv.in_channels)])
    return norms.argsort(descending=True)[:n].sort().values


def whole(conv, at, V):
    """V as an update of the stored weight, channel by channel."""
    D = V.new_zeros(conv.weight.shape)
    g, kernel = conv.groups, conv.kernel_size
    for c, v in zip(at.tolist(), V, strict=True):
        v = v.view(-1, *kernel)
        if isinstance(conv, nn.ConvTranspose2d):
            D = D.index_put((torch.tensor([c]),), v.unsqueeze(0))
            continue
        rows, per = len(D) // g, conv.in_channels // g
        first = c // per * rows
        D = D.index_put((torch.arange(first, first + rows), torch.tensor(c % per)), v)
    return D


@pytest.mark.parametrize("which", CONVS)
@pytest.mark.parametrize("density, n", [(0.25, 2), (0.5, 4), (1.0, 8)])
def test_convolutions_follow_the_equation(which, density, n):
    torch.manual_seed(0)
    conv, shape = CONVS[which]
    net = nn.Sequential(conv()).double()
    base = copy.deepcopy(net[0])
    tuned = burnish.tune(net, f"sparse_update(density={density})", head=False, targets="0")
    ((_, term),) = tuned.terms(KernelSlice)
    nn.init.normal_(term.double().V)
    at = heaviest(base, n)
    assert term.at.tolist() == at.tolist()
    assert term.V.numel() == n * base.weight.numel() // 8
    letters = [term.V, *([net[0].bias] if base.bias is not None else [])]

    def equation(x, V, b=None):
        return torch.func.functional_call(base, {
            "weight": base.weight.detach() + whole(base, at, V),
            **({} if b is None else {"bias": b})}, (x,))

    follows(tuned, equation, letters, shape)


@pytest.mark.parametrize("density, n", [(0.125, 1), (0.25, 3), (1.0, 12)])
def test_linears_follow_the_equation(density, n):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 5)).double()
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, f"sparse_update(density={density})", head=False, targets="0")
    ((_, term),) = tuned.terms(Slice)
    nn.init.normal_(term.double().V)
    at = W.square().sum(0).argsort(descending=True)[:n].sort().values
    assert term.at.tolist() == at.tolist()
    follows(tuned, lambda x, V, b: F.linear(x, W, b) + x[..., at] @ V.t(), [term.V, net[0].bias],
            (4, 3, 12))


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
def test_sgd_in_real_units_is_qas_on_the_whole_numbers(kind):
    """W of int8 in letters of whole numbers: G / s_W^2 and G_b / (s_W s_x)^2, then plain SGD."""
    torch.manual_seed(0)
    layer, shape = {"linear": (nn.Linear(8, 5), (6, 8)),
                    "conv": (nn.Conv2d(8, 5, 3), (2, 8, 5, 5)),
                    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5))}[kind]
    net, x = nn.Sequential(layer).double(), torch.randn(shape, dtype=F64)
    b = layer.bias.detach().clone()
    tuned = burnish.tune(net, "int8_graph + sparse_update(density=1.0)", head=False, targets="0",
                         calibration=[x])
    term = next(t for _, t in tuned.terms(Term) if hasattr(t, "V")).double()
    (held,) = [m for m in net.modules() if isinstance(m, Int8Provider)]
    s_w = held.scale.double()
    (s_x, z_x), (s_y, z_y) = held.reads, held.written
    per = s_w.view(-1, *(1,) * (layer.weight.dim() - 1))
    over = s_w.view(-1, *(1,) * (layer.weight.dim() - 2))
    letters = [held.codes.double().requires_grad_(), (b / (s_x * s_w)).requires_grad_()]

    def through(v):
        return v + (v.round() - v).detach()

    q = ((x / s_x).round() + z_x).clamp(-128, 127) - z_x
    a = F.linear(q, letters[0]) if kind == "linear" else \
        F.conv2d(q, letters[0], groups=layer.groups)
    a = a + through(letters[1]).view(over.shape)
    y = ((through(over * s_x / s_y * a) + z_y).clamp(-128, 127) - z_y) * s_y
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    target = torch.randn_like(y)
    G, G_b = torch.autograd.grad((y - target).square().mean(), letters)
    G, G_b = G / per**2, G_b / (s_x * s_w) ** 2                      # QAS
    opt = torch.optim.SGD(tuned.parameters(), lr=0.05)
    (net(x) - target).square().mean().backward()
    W = held.weight().double()
    real = term.V.grad
    dense = copy.deepcopy(term)
    with torch.no_grad():
        dense.V.copy_(real)
    g = dense.dense().view(W.shape)

    def ratio(w, g):
        return w.flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1)

    torch.testing.assert_close(ratio(letters[0].detach(), G), ratio(W, g), rtol=1e-9, atol=0)
    opt.step()
    torch.testing.assert_close(W + term.dense().view(W.shape),
                               (letters[0].detach() - 0.05 * G) * per, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.bias.detach(), (letters[1].detach() - 0.05 * G_b) * s_x * s_w,
                               rtol=1e-9, atol=1e-12)


def mobile():
    """A stem, two inverted blocks (expand, depthwise, project; a sum round the second), a head."""
    torch.manual_seed(1)

    def block(inp, mid, out):
        return [nn.Conv2d(inp, mid, 1), nn.Conv2d(mid, mid, 3, padding=1, groups=mid),
                nn.Conv2d(mid, out, 1)]

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*block(8, 16, 8))

        def forward(self, x):
            return x + self.body(x)

    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *block(8, 16, 8), Sum(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


NAMES = ["0", "1", "2", "3", "4.body.0", "4.body.1", "4.body.2"]
PLACES = 6 * 6                                           # of every convolution's output, one sample


def kept_by(net, recipe, x, **kw):
    """(tensors kept for backward, the tuned model) of a step; ours alone, as convolutions are."""
    tuned = burnish.tune(net, recipe, head=False, targets="0,1,2,3,4.body.*", calibration=[x], **kw)
    tuned.state.tape.lean, kept = False, []
    tuned.state.tape.pack = lambda t: kept.append(t) or t
    tuned.state.tape.unpack = lambda t: t
    net[:5](x).sum().backward()
    return [t for t in kept if not isinstance(t, nn.Parameter)], tuned


@pytest.mark.parametrize("density", [0.0, 0.125, 0.5])
@pytest.mark.parametrize("last", [3, 5])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_kept_is_the_formula(density, last, int8):
    """sum of k tokens, in int8 a byte each and a bit for each number that may be clipped."""
    B, x = 2, torch.randn(2, 3, 12, 12)
    recipe = f"sparse_update(last={last}, density={density})"
    kept, tuned = kept_by(mobile(), ("int8_graph + " if int8 else "") + recipe, x)
    wide = [(3, 8, 16, 16, 8, 16, 16)[i] for i in range(7)][-last:]
    chosen = [max(1, int(c * density)) if density else 0 for c in wide]
    inputs = [t for t in kept if t.dim() == 4]
    assert [t.shape[1] for t in inputs] == [n for n in chosen if n]
    bits = [t for t in kept if t.dim() == 1]
    want = sum(chosen) * B * PLACES * (1 if int8 else 4)
    assert sum(t.nbytes for t in inputs) == want
    if int8:                                             # outputs, and all inputs but the first
        outs = [(8, 16, 16, 8, 16, 16, 8)[i] for i in range(7)][-last:]
        assert sum(t.nbytes for t in bits) == (sum(outs) + sum(wide[1:])) * B * PLACES // 8
        assert {t.dtype for t in inputs} <= {torch.int8}
    else:
        assert not bits
    assert len(kept) == len(inputs) + len(bits)
    assert tuned.recipe.named("sparse_update").last == last


def test_a_linear_keeps_bytes_beside_int8_and_the_same_gradients():
    torch.manual_seed(0)
    grads = []
    for coded in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 8))
        x = torch.randn(10, 16)
        tuned = burnish.tune(net, "int8_graph + sparse_update(density=0.5)", head=False,
                             targets="0", calibration=[x])
        ((_, term),) = tuned.terms(Slice)
        kept = []
        tuned.state.tape.lean = False
        tuned.state.tape.pack = lambda t, kept=kept: kept.append(t) or t
        tuned.state.tape.unpack = lambda t: t
        net(x)                                           # the plan tells the grid
        assert term.grid == net[0].burnish.grid("weight") is not None
        if not coded:
            term.grid = None
        kept.clear()
        net(x).square().sum().backward()
        dtypes = {t.dtype for t in kept if t.shape == (10, 8)}
        assert dtypes == ({torch.int8} if coded else {torch.float32})
        grads.append(term.V.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_the_grid_goes_with_the_storage():
    net = nn.Sequential(nn.Linear(16, 8))
    x = torch.randn(10, 16)
    tuned = burnish.tune(net, "lora(rank=2)", head=False, targets="0")
    tuned.add("b", "sparse_update", targets="0")
    tuned.use("b")
    net(x)
    assert net[0].burnish.grid("weight") is None
    assert all(t.grid is None for _, t in tuned.terms(Slice))


@pytest.mark.parametrize("model, last", [("mobile", 3), ("vit", 5), ("gpt2", 3)])
@pytest.mark.parametrize("storage", ["", "int8_graph + "])
def test_the_rest_stays_and_the_loss_falls(model, last, storage):
    if model == "mobile":
        net, batch = mobile(), torch.randn(4, 3, 12, 12)
        targets = ",".join(NAMES).replace(".body.0,4.body.1,4.body.2", ".body.*")
        loss = lambda out, batch: out.square().mean()                          # noqa: E731
    else:
        net, batch = tiny(model)
        targets, loss = None, None
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"{storage}sparse_update(last={last}, density=0.25)",
                         targets=targets, head=False, calibration=[batch])
    names = [p.name for p in tuned.anatomy.places if p.role not in ("head", "embedding")
             and p.kind != "embedding"]
    names = [n for n in names if n != "lm_head.weight"][: 7 if model == "mobile" else None]
    late = names[-last:]
    mine = {n for n, p in tuned.named_parameters()}
    assert {n for n in mine if n.endswith("bias")} == {n.replace("weight", "bias") for n in late}
    assert {n.partition(".burnish")[0] for n in mine if n.endswith("V")} == \
        {n.removesuffix(".weight") for n in late}
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step(batch, loss=loss)) for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = {n for n, p in net.named_parameters() if ".burnish." not in n
             and not torch.equal(p, base.get_parameter(n))}
    held = {f"{n}" for n in names} if storage else set()
    assert moved - held == {n.replace("weight", "bias") for n in late}
    for n, t in ((n, t) for n, t in tuned.terms(Term) if hasattr(t, "V")):
        D = t.dense()
        assert 0 < int(D.count_nonzero()) <= t.V.numel() <= D.numel() // 4, n


def test_nothing_below_the_layers_that_train_is_in_the_graph():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "sparse_update(last=2)", head=False)
    seen = []
    for n in ("0.mlp.fc2", "1.attention.o_proj", "1.mlp.fc1", "1.mlp.fc2"):
        module = net.get_submodule(f"vit.layers.{n}")
        module.register_forward_hook(lambda m, a, y, n=n: seen.append((n, y.requires_grad)))
    tuned.loss(batch)
    assert seen == [("0.mlp.fc2", False), ("1.attention.o_proj", False),
                                 ("1.mlp.fc1", True), ("1.mlp.fc2", True)]


@pytest.mark.parametrize("model", ["vit", "mobile"])
def test_biases_of_more_layers_than_weights(model):
    net, batch = (mobile(), torch.randn(2, 3, 12, 12)) if model == "mobile" else tiny(model)
    targets, weights = ("0,1,2,3,4.body.*", "4.body.1,4.body.2") if model == "mobile" else \
        (None, "fc1")
    tuned = burnish.tune(net, "sparse_update(last=4, density=0) + "
                              f"sparse_update(targets='{weights}', last=1, density=0.5)",
                         targets=targets, head=False)
    names = [n for n, _ in tuned.named_parameters()]
    assert sum(n.endswith("bias") for n in names) == 4
    (path,) = {n.partition(".burnish")[0] for n in names if n.endswith("V")}
    assert path == ("4.body.2" if model == "mobile" else "vit.layers.1.mlp.fc1")
    x = torch.randn(2, 3, 12, 12)
    stir(tuned)
    if model == "mobile":
        assert len(list(tuned.terms(KernelSlice))) == 5          # four keep no input, one a part
        want = tuned.model(x).detach()
        torch.testing.assert_close(tuned.merge()(x), want)


@pytest.mark.parametrize("storage", ["", "int8_graph + "])
def test_a_fused_weight_is_one_layer_and_its_rows_have_no_bias(storage):
    net, batch = tiny("gpt2")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, storage + "sparse_update(targets='qkv')", head=False,
                         calibration=[batch])
    assert {tuple(t.V.shape) for _, t in tuned.terms(Slice)} == {(3 * 32, 8)}
    assert {n for n, _ in tuned.named_parameters() if "bias" in n} == {
        f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)}
    net = copy.deepcopy(base)
    tuned = burnish.tune(net, storage + "sparse_update(targets='q,v')", head=False,
                         calibration=[batch])
    assert {tuple(t.V.shape) for _, t in tuned.terms(Slice)} == {(32, 8)}
    assert not [n for n, _ in tuned.named_parameters() if "bias" in n]
    W = base.transformer.h[0].attn.c_attn.weight.detach()            # (in, out)
    first = W[:, :32].square().sum(1).argsort(descending=True)[:8].sort().values
    assert next(t for _, t in tuned.terms(Slice)).at.tolist() == first.tolist()


# -- the search -----------------------------------------------------------------------------------
def small():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
            self.c = nn.Linear(16, 8)

        def forward(self, x, labels=None):
            h = self.b(self.a(x).relu()).relu().mean((2, 3))
            return {"loss": self.c(h).square().mean()}

    return Net()


def data(n=3):
    g = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(2, 8, 6, 6, generator=g)} for _ in range(n)]


def by_hand(net, width, samples=None):
    """gains and costs of a, b, c at each share, by plain autograd."""
    shares = (1 / 8, 1 / 4, 1 / 2, 1)
    gains = [[0.0] * 4 for _ in range(3)]
    batches = data()[: samples]
    for batch in batches:
        loss = net(**batch)["loss"]
        for i, m in enumerate((net.a, net.b, net.c)):
            (g,) = torch.autograd.grad(loss, m.weight, retain_graph=True)
            order = m.weight.detach().transpose(0, 1).flatten(1).square().sum(1).argsort(
                descending=True)
            for j, s in enumerate(shares):
                n = int(len(order) * s)
                gains[i][j] += float(g[:, order[:n]].square().sum()) / len(batches)
    costs = [[int(c * s) * (tokens * width + 4 * out * kernel) for s in shares]
             for c, tokens, out, kernel in ((8, 36, 16, 9), (16, 36, 16, 1), (16, 1, 8, 1))]
    return gains, costs


def best(gains, costs, budget):
    made = []
    for c in itertools.product(range(5), repeat=len(gains)):
        if sum(costs[i][j - 1] for i, j in enumerate(c) if j) <= budget:
            made.append((sum(gains[i][j - 1] for i, j in enumerate(c) if j), c))
    return max(made)[1]


def searched(settings, net=None, targets="a,b,c", **kw):
    net = net or small()
    tuned = burnish.tune(net, f"sparse_update({settings})", head=False, targets=targets,
                         calibration=data(), **kw)
    said = tuned.adapters["default"].settled["sparse_update"]
    return tuned, [said[f"{n}.weight"]["channels"] for n in "abc"]


WIDE = ((1, 2, 4, 8), (2, 4, 8, 16), (2, 4, 8, 16))


@pytest.mark.parametrize("memory, width", [(1500, 4), (4000, 4), (4000, 1), (9000, 4)])
def test_the_search_finds_the_best_choice_of_all(memory, width):
    gains, costs = by_hand(small(), width)
    want = [WIDE[i][j - 1] if j else 0 for i, j in enumerate(best(gains, costs, memory))]
    assert want != [w[-1] for w in WIDE]
    tuned, got = searched(f"memory={memory}, itemsize={width}")
    assert got == want
    for n, k in zip("abc", want, strict=True):
        made = [t for name, t in tuned.terms(Term) if name.startswith(f"{n}.") and hasattr(t, "V")]
        assert [t.at.numel() for t in made] == ([k] if k or n != "c" else [])
    assert {n for n, _ in tuned.named_parameters() if "bias" in n} == {"a.bias", "b.bias", "c.bias"}


def test_a_table_of_gains_is_followed_and_reads_no_gradient():
    _, costs = by_hand(small(), 4)
    table = [("a.weight", 0.1, 0.2, 0.3, 0.4), ["b.weight", 0.0, 0.0, 0.0, 9.0],
             ("c.weight", 1.0, 0.9, 0.8, 0.7)]
    want = best([list(r[1:]) for r in table], costs, 3500)
    net = small()
    net.forward = lambda x: {"out": net.c(net.b(net.a(x)).mean((2, 3)))}        # no loss
    _, got = searched(f"memory=3500, contributions={table}", net)
    assert got == [WIDE[i][j - 1] if j else 0 for i, j in enumerate(want)] and got[2] == 2
    with pytest.raises(RecipeError, match="says nothing of c.weight; it names a.weight, b"):
        searched(f"memory=3500, contributions={table[:2]}")
    with pytest.raises(RecipeError, match="contributions has rows such as"):
        parse("sparse_update(memory=1, contributions=[('a.weight', .1, .2)])")
    for row in ("('a', 1, 2, 3, '4')", "('a', '1', 2, 3, 4)", "(1, 1, 2, 3, 4)", "'a'"):
        with pytest.raises(RecipeError, match="contributions has rows such as"):
            parse(f"sparse_update(memory=1, contributions=[{row}])")


def test_only_so_many_samples_are_read_and_only_late_layers_are_chosen():
    gains, costs = by_hand(small(), 4, samples=1)
    want = [WIDE[i][j - 1] if j else 0 for i, j in enumerate(best(gains, costs, 4000))]
    assert searched("memory=4000, samples=2")[1] == want
    assert costs[2][0] == 72
    assert searched("memory=72")[1] == [0, 0, 2] and searched("memory=71")[1] == [0, 0, 0]
    tuned, got = searched("memory=100000, last=2")
    assert got == [0, 16, 16]
    assert {n for n, _ in tuned.named_parameters() if "bias" in n} == {"b.bias", "c.bias"}
    seeds = [searched(f"memory=4000, seed={s}")[1] for s in (0, 0, 5)]
    assert seeds[0] == seeds[1]


def test_a_folder_brings_the_choice(tmp_path):
    net = small()
    base = copy.deepcopy(net)
    tuned = stir(burnish.tune(net, "int8_graph + sparse_update(memory=4000, itemsize=1)",
                              head=False, targets="a,b,c", calibration=data()))
    tuned.save(tmp_path / "a")
    other = burnish.load(base, tmp_path / "a")
    assert [(n, t.at.tolist()) for n, t in other.terms(Term) if hasattr(t, "V")] == \
        [(n, t.at.tolist()) for n, t in tuned.terms(Term) if hasattr(t, "V")]
    assert torch.equal(net(**data()[0])["loss"], base(**data()[0])["loss"])


def test_defaults_refusals_and_counts():
    (method,) = parse("sparse_update")
    assert method.settings() == {
        "targets": None, "last": 20, "density": 0.25, "memory": None, "itemsize": 4,
        "contributions": None, "samples": 128, "seed": 0}
    assert method.repeats() is None and not method.keeps_input and method.by_data
    for text, why in (("last=0", "last, samples and itemsize are at least 1"),
                      ("memory=1, samples=0", "at least 1"), ("memory=1, itemsize=0", "at least 1"),
                      ("density=0.3", "expected 0, 0.125, 0.25, 0.5 or 1.0"),
                      ("memory=0", "memory=0: expected bytes"),
                      ("itemsize=1", "itemsize does nothing without memory="),
                      ("seed=1", "seed does nothing without memory="),
                      ("memory=10, density=0.5", "the search says each density")):
        with pytest.raises(RecipeError, match=why):
            parse(f"sparse_update({text})")
    parse("sparse_update(memory=1, samples=1, itemsize=1, last=1)")
    linear = Place("a", "weight", "linear", 10, 40)
    assert (method.count(linear), method.per_token(linear)) == (100, 10)
    assert (method.count(linear, 3), method.per_token(linear, 3)) == (30, 3)
    deep = Place("a", "weight", "conv", 16, 9, kernel=9, axes=(3, 3), groups=8)
    assert method.count(deep) == 2 * 2 * 9
    assert method.count(Place("a", "weight", "linear", 10, 3)) == 10
    assert parse("sparse_update(density=0)")[0].count(linear) == 0
    blank = parse("sparse_update(memory=9)")[0].delta(
        Site(linear, torch.ones(10, 40), blank=True, places=[linear]))
    assert blank.at.numel() == 40                        # the most it may be
