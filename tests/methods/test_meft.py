"""MEFT: what reversible blocks compute, what they keep, and when they refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as foreign

import burnish
from burnish.blocks.tape.reversible import growth, reach
from burnish.core.errors import RecipeError
from burnish.memory import Ledger
from burnish.testing.models import tiny

D, R, T = 16, 4, 12


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, h):
        q, k, v = (f(h).unflatten(-1, (2, D // 2)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h)))


class Block(nn.Module):
    """Pre-norm, with dropout on both residual branches."""

    def __init__(self, p=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp, self.p = Attention(), Mlp(), p

    def forward(self, h, bias=None):
        h = h if bias is None else h + bias
        h = h + F.dropout(self.attn(self.norm1(h)), self.p, self.training)
        return h + F.dropout(self.mlp(self.norm2(h)), self.p, self.training)


class Net(nn.Module):
    """Blocks one after the other, and something `between` them."""

    def __init__(self, depth=4, p=0.0, between=None, bias=False, wrapped=None):
        super().__init__()
        self.embed = nn.Linear(8, D)
        self.layers = nn.ModuleList(Block(p) for _ in range(depth))
        self.head = nn.Linear(D, 3)
        self.bias = nn.Linear(8, D) if bias else None
        self.between, self.wrapped, self.seen = between, wrapped, []

    def forward(self, x):
        h = self.embed(x)
        self.seen = [h]
        for layer in self.layers:
            if self.wrapped is not None:
                h = foreign(layer, h, use_reentrant=self.wrapped)
            else:
                h = layer(h) if self.bias is None else layer(h, self.bias(x))
            self.seen.append(h)
            h = h if self.between is None else self.between(h)
        return self.head(h)


def batch(seed=0, n=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, T, 8, generator=g, dtype=torch.float64).to(dtype)


def loss(out, _=None):
    return out.square().mean()


def tuned_net(recipe=f"meft(bottleneck={R})", dtype=torch.float64, stir=0.3, seed=0, **kw):
    torch.manual_seed(seed)
    net = Net(**kw).to(dtype)
    tuned = burnish.tune(net, recipe, head=False)
    g = torch.Generator().manual_seed(1)
    for p in tuned.parameters():
        p.data = p.data.to(dtype)
        p.data += stir * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
    return net, tuned


def gradients(tuned, value):
    for p in tuned.parameters():
        p.grad = None
    value.backward()
    return {n: p.grad.clone() for n, p in tuned.named_parameters()}


def reference(base, tuned, x, lam, beta, variant, first=0, act=F.gelu):
    """The equations of the docstring, everything stored: (output, gradients by name)."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}

    def adapter(i, which, h):
        mark = {"behind": ".meft.", "beside": ".meft_run.beside."}[which]
        pick = {n.partition(mark)[2]: p for n, p in leaves.items()
                if n.startswith(f"layers.{i}.") and mark in n}
        z = act(h @ pick["down.weight"].t() + pick["down.bias"])
        return z @ pick["up.weight"].t() + pick["up.bias"]

    h = base.embed(x)
    for i in range(first):
        h = base.layers[i](h)
    h1 = h2 = h
    last = len(base.layers) - 1
    for i in range(first, last + 1):
        def block(v, i=i):
            made = base.layers[i](v)
            return made + adapter(i, "behind", made)

        if variant == 1:
            y1 = lam * h1 + block(h2)
            y2 = None if i == last else beta * h2 + adapter(i, "beside", y1)
            state = y1
        else:
            y1 = lam * h1 + adapter(i, "beside", h2)
            y2 = beta * h2 + block(y1)
            state = y2
        h1, h2 = y2, y1
    out = base.head(state)
    loss(out).backward()
    return out.detach(), {n: p.grad for n, p in leaves.items()}


def close(got, want, rel):
    assert set(got) == set(want)
    top = max(float(w.abs().max()) for w in want.values())
    for n, w in want.items():
        assert float((got[n] - w).abs().max()) <= rel * top, n


# -- the equations --------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, lam, beta", [(1, None, None), (2, None, None), (1, 0.5, 0.8),
                                                (2, 0.7, 0.4)])
@pytest.mark.parametrize("anchors", [None, 0, 1, 2])
def test_gradients_are_those_of_the_stored_equations(variant, lam, beta, anchors):
    net, tuned = tuned_net(f"meft(bottleneck={R}, variant={variant}, lam={lam}, beta={beta}, "
                           f"anchors={anchors})")
    base, _ = tuned_net()
    net2 = Net().double()
    net2.load_state_dict({k: v for k, v in net.state_dict().items() if ".burnish." not in f".{k}"},
                         strict=False)
    del base
    usual = (0.1, 1.0) if variant == 1 else (1.0, 0.1)
    scales = [u if v is None else v for u, v in zip(usual, (lam, beta), strict=True)]
    x = batch()
    out = net(x)
    want_out, want = reference(net2, tuned, x, *scales, variant)
    assert torch.allclose(out, want_out, rtol=1e-12, atol=1e-14)
    close(gradients(tuned, loss(out)), want, 1e-9)


def test_the_last_blocks_alone_and_what_trains_below_gets_its_gradient():
    net, tuned = tuned_net(f"meft(bottleneck={R}, layers=2) + full", depth=4)
    stock = copy.deepcopy(net)                       # the same, its blocks stored, by torch.func
    x = batch()
    got = gradients(tuned, loss(net(x)))
    names = [n for n, p in stock.named_parameters() if p.requires_grad]
    values = {n: dict(stock.named_parameters())[n].detach() for n in names}
    want = torch.func.grad(lambda v: loss(torch.func.functional_call(stock, v, (x,))))(values)
    close(got, {n: want[n] for n in got}, 1e-9)
    assert not any(".meft." in n for n in got if n.startswith(("layers.0", "layers.1")))


def test_it_joins_updates_inside_its_blocks():
    net, tuned = tuned_net(f"lora(rank=2) + meft(bottleneck={R})")
    stock = copy.deepcopy(net)
    x = batch()
    got = gradients(tuned, loss(net(x)))
    values = {n: p.detach() for n, p in stock.named_parameters() if p.requires_grad}
    want = torch.func.grad(lambda v: loss(torch.func.functional_call(stock, v, (x,))))(values)
    close(got, {n: want[n] for n in got}, 1e-9)


@pytest.mark.parametrize("variant", [1, 2])
def test_dropout_is_drawn_again(variant):
    """Blocks drop; the gradient along a direction is the change of the loss under one seed."""
    net, tuned = tuned_net(f"meft(bottleneck={R}, variant={variant})", p=0.4)
    net.train()
    x, params = batch(), dict(tuned.named_parameters())
    torch.manual_seed(5)
    grads = gradients(tuned, loss(net(x)))
    after = torch.rand(1)
    g = torch.Generator().manual_seed(2)
    along = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for n, p in params.items():
                p += step * along[n]
            torch.manual_seed(5)
            ends.append(float(loss(net(x))))
            assert torch.equal(after, torch.rand(1))  # backward left the generator alone
    want = (ends[0] - ends[1]) / 2e-5
    got = float(sum((grads[n] * d).sum() for n, d in along.items()))
    assert got == pytest.approx(want, rel=1e-5)


# -- the start ------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, word", [(1, "lam"), (2, "beta")])
def test_the_start_nears_the_pre_trained_model_linearly(variant, word):
    """With adapters at 0 the deviation is proportional to the small factor."""
    off = []
    for size in (1e-2, 1e-3, 1e-4):
        net, tuned = tuned_net(f"meft(bottleneck={R}, variant={variant}, {word}={size})", stir=0)
        for n, p in tuned.named_parameters():
            if ".up." in n:
                nn.init.zeros_(p)
        with tuned.disabled():
            want = net(batch())
        off.append(float((net(batch()) - want).detach().abs().max()))
    assert off[0] / off[1] == pytest.approx(10, rel=0.1)
    assert off[1] / off[2] == pytest.approx(10, rel=0.02)


def test_the_count_is_two_adapters_a_block_but_for_one():
    for variant, adapters in ((1, 7), (2, 8)):
        _, tuned = tuned_net(f"meft(bottleneck={R}, variant={variant})")
        n = sum(p.numel() for p in tuned.parameters())
        assert n == adapters * (2 * D * R + R + D) == tuned.recipe.named("meft").count(4, D)
    down = [p for n, p in tuned_net(f"meft(bottleneck={D})", stir=0)[1].named_parameters()
            if n.endswith("weight")]
    spread = float(torch.cat([p.detach().flatten() for p in down]).std())
    assert spread == pytest.approx(0.02, rel=0.1)


# -- memory ---------------------------------------------------------------------------------------
def kept(net, tuned, x):
    with Ledger(net) as ledger:
        ledger.watch("weights", [x])
        net.seen = []
        value = loss(net(x))
        net.seen = []
        alive = sum(e.bytes for e in ledger.entries
                    if e.death is None and ledger.category(e) != "weights")
    assert value.requires_grad
    return alive


@pytest.mark.parametrize("anchors, pairs", [(0, lambda L: 1), (2, lambda L: L // 2)])
def test_a_block_keeps_nothing_and_an_anchor_a_pair(anchors, pairs):
    x = batch(n=16, dtype=torch.float32)
    state = 16 * T * D * 4
    found = []
    for depth in (4, 8):
        net, tuned = tuned_net(f"meft(bottleneck={R}, anchors={anchors})", torch.float32,
                               depth=depth)
        found.append(kept(net, tuned, x))
    more = 2 * state * (pairs(8) - pairs(4))
    few = 4 * 5056 * 4                               # generator states: two a block, no tensors
    assert found[1] - found[0] == pytest.approx(more, abs=few * 2 + 0.01 * state)


@pytest.mark.parametrize("model", ["vit", "llama", "encoder"])
@pytest.mark.parametrize("recipe", ["meft(bottleneck=4)", "meft(bottleneck=4, variant=2)",
                                    "meft(bottleneck=4, streams='fixed')",
                                    "lora(rank=2) + meft(bottleneck=4)"])
def test_the_promise_is_kept(model, recipe):
    net, data = tiny(model, batch=4)
    promised = burnish.simulate(copy.deepcopy(net), recipe, data)
    measured = burnish.measure(burnish.tune(net, recipe), data)
    assert promised.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)


# -- rounding -------------------------------------------------------------------------------------
def test_growth_and_reach_are_the_formula():
    assert growth(1, 1) == pytest.approx(1.618, abs=1e-3)
    assert growth(1, 0.5) == pytest.approx(2.73, abs=0.01)
    assert growth(0.1, 1) == growth(1, 0.1) == pytest.approx(10.9, abs=0.05)
    assert growth(0.1, 0.1) == pytest.approx(101, abs=0.2)
    for a, b in ((1, 1), (1, 0.5), (0.1, 1)):
        for dtype in (torch.float32, torch.float64):
            n, eps = reach(a, b, dtype), torch.finfo(dtype).eps
            assert eps * growth(a, b) ** n <= 1e-3 < eps * growth(a, b) ** (n + 1)
    assert reach(0.1, 1, torch.float32) == 3 and reach(2, 1, torch.float32) > 1000


@pytest.mark.filterwarnings("ignore:reversible blocks. rounding has grown")
@pytest.mark.parametrize("lam, beta", [(1, 1), (0.5, 1), (0.1, 1)])
def test_the_error_of_what_is_made_again_grows_by_the_formula_a_block(lam, beta):
    """Blocks that hand on what they are given: an error is multiplied by 1 / |mu| at each."""
    depth, seen = 12, []
    net, tuned = tuned_net(f"meft(bottleneck={R}, anchors=0, lam={lam}, beta={beta})",
                           torch.float32, depth=depth, stir=0.0)
    for name, p in net.named_parameters():
        if name.startswith("layers.") and (".o." in name or "fc2" in name or ".up." in name):
            p.data.zero_()
    for layer in net.layers:
        seen.append([])
        layer.norm1.register_forward_pre_hook(
            lambda m, args, here=seen[-1]: here.append(args[0].detach().clone()))
    gradients(tuned, loss(net(batch(n=64, dtype=torch.float32))))
    off = [float((again - first).norm()) for first, again in seen]
    assert off[-2:] == [0, 0], "the last pair is kept"
    assert (off[1] / off[7]) ** (1 / 6) == pytest.approx(growth(lam, beta), rel=0.05)


def stored(net, x):
    """Gradients of the same equations by torch.func, which stores everything."""
    net = copy.deepcopy(net)
    values = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    return torch.func.grad(lambda v: loss(torch.func.functional_call(net, v, (x,))))(values)


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_streams_are_inverted_exactly_at_any_depth(variant, dtype):
    """20 blocks without an anchor: the gradient of the stored equations to 1e-5, and that of the
    unrounded ones (in float64, written out) within the grid."""
    net, tuned = tuned_net(f"meft(bottleneck={R}, variant={variant}, streams='fixed')", dtype,
                           depth=20, stir=0.1)
    x = batch(dtype=dtype)
    out = net(x)
    value = loss(out)
    net.seen = []
    want = stored(net, x)
    got = gradients(tuned, value)
    close(got, want, 1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        base = Net(depth=20)
        base.load_state_dict({k: v for k, v in net.state_dict().items()
                              if ".burnish." not in f".{k}"}, strict=False)
        for p in tuned.parameters():
            p.data = p.data.double()
        scales = (1 / 16, 1.0) if variant == 1 else (1.0, 1 / 16)
        near, grads = reference(base.double(), tuned, x.double(), *scales, variant)
        assert torch.allclose(out.double(), near, atol=5e-3)
        close({n: g.double() for n, g in got.items()}, grads, 2e-2)


def test_fixed_streams_keep_their_dropped_bits_and_nothing_else():
    x = batch(n=64, dtype=torch.float32)
    found = []
    for depth in (4, 8):
        net, tuned = tuned_net(f"meft(bottleneck={R}, streams='fixed')", torch.float32, depth=depth)
        found.append(kept(net, tuned, x))
    bits = 4 * 64 * T * D * 4 / 8
    assert found[1] - found[0] == pytest.approx(bits, abs=4 * 4 * 5056 + 0.01 * bits)


@pytest.mark.parametrize("settings, word", [("anchors=2", "needs no anchors"),
                                            ("lam=0.1", "whole bits")])
def test_fixed_streams_refuse_what_they_cannot_invert(settings, word):
    with pytest.raises(RecipeError, match=word):
        burnish.tune(Net(), f"meft(streams='fixed', {settings})")


def test_rounding_that_grows_is_said_and_anchors_hold_it():
    torch.manual_seed(0)
    for anchors, word in ((0, "rounding has grown"), (None, None)):
        net, tuned = tuned_net(f"meft(bottleneck={R}, anchors={anchors})", torch.float32, depth=10)
        x = batch(dtype=torch.float32)
        exact = copy.deepcopy(net)
        if word:
            with pytest.warns(UserWarning, match=word):
                gradients(tuned, loss(net(x)))
            continue
        got = gradients(tuned, loss(net(x)))
        values = {n: p.detach() for n, p in exact.named_parameters() if p.requires_grad}
        want = torch.func.grad(lambda v: loss(torch.func.functional_call(exact, v, (x,))))(values)   # noqa: B023
        close(got, {n: want[n] for n in got}, 1e-2)


# -- odd circumstances ----------------------------------------------------------------------------
def test_two_forwards_before_one_backward():
    net, tuned = tuned_net()
    apart = [gradients(tuned, loss(net(batch(k)))) for k in (0, 1)]
    both = gradients(tuned, loss(net(batch(0))) + loss(net(batch(1))))
    close(both, {n: apart[0][n] + apart[1][n] for n in both}, 1e-10)


def test_a_graph_that_is_kept_can_go_backward_twice():
    net, tuned = tuned_net()
    value = loss(net(batch()))
    params = list(tuned.parameters())
    one = torch.autograd.grad(value, params, retain_graph=True)
    two = torch.autograd.grad(value, params)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_state_inside_may_be_read_beside_the_end_but_not_alone():
    net, tuned = tuned_net()
    x = batch()
    value = loss(net(x)) + net.seen[2].square().mean()
    got = gradients(tuned, value)
    net.seen = []
    stock = copy.deepcopy(net)

    def whole(v):
        out = torch.func.functional_call(stock, v, (x,))
        return loss(out) + stock.seen[2].square().mean()

    values = {n: p.detach() for n, p in stock.named_parameters() if p.requires_grad}
    want = torch.func.grad(whole)(values)
    close(got, {n: want[n] for n in got}, 1e-9)
    net(x)
    with pytest.raises(RuntimeError, match="backward came alone"):
        net.seen[2].square().mean().backward()


def test_under_autocast_gradients_are_near_those_without():
    net, tuned = tuned_net(dtype=torch.float32, stir=0.1)
    x = batch(dtype=torch.float32)
    want = gradients(tuned, loss(net(x)))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(net(x).float())
    got = gradients(tuned, value)
    off = math.sqrt(sum(float((got[n] - w).square().sum()) for n, w in want.items()))
    assert off < 0.1 * math.sqrt(sum(float(w.square().sum()) for w in want.values()))


def test_a_half_precision_model_has_streams_in_single():
    net, tuned = tuned_net(dtype=torch.bfloat16, stir=0.1, depth=2)
    x = batch(dtype=torch.bfloat16)
    got = gradients(tuned, loss(net(x)))
    net.seen = []
    wide = copy.deepcopy(net).float()
    values = {n: p.detach() for n, p in wide.named_parameters() if p.requires_grad}
    want = torch.func.grad(
        lambda v: loss(torch.func.functional_call(wide, v, (x.float(),))))(values)
    off = math.sqrt(sum(float((got[n].float() - want[n]).square().sum()) for n in got))
    assert off < 0.1 * math.sqrt(sum(float(w.square().sum()) for w in want.values()))


def test_a_model_that_changes_the_state_between_blocks_is_refused():
    for between in (lambda h: h * 2, lambda h: h.mul_(1.5), lambda h: h + 0):
        net, _ = tuned_net(between=between)
        with pytest.raises(RecipeError, match="between two reversible blocks"):
            net(batch())


def test_changing_the_last_state_in_place_is_right():
    net, tuned = tuned_net(depth=1, between=lambda h: h.mul_(1.5))
    stock = copy.deepcopy(net)
    x = batch()
    got = gradients(tuned, loss(net(x)))
    stock.between = lambda h: h * 1.5
    values = {n: p.detach() for n, p in stock.named_parameters() if p.requires_grad}
    want = torch.func.grad(lambda v: loss(torch.func.functional_call(stock, v, (x,))))(values)
    close(got, {n: want[n] for n in got}, 1e-9)


def test_weights_that_change_before_backward_raise():
    net, tuned = tuned_net()
    value = loss(net(batch()))
    with torch.no_grad():
        net.layers[1].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        value.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_somebody_elses_checkpointing_is_refused(reentrant):
    net, _ = tuned_net(wrapped=reentrant)
    with pytest.raises(RecipeError, match="checkpointing that is not burnish's"):
        net(batch().requires_grad_())


def test_an_input_besides_the_state_that_carries_a_gradient_is_refused():
    net, tuned = tuned_net("meft(bottleneck=4)", bias=True)
    loss(net(batch())).backward()                    # frozen: it is only read
    net, tuned = tuned_net("meft(bottleneck=4) + full", bias=True)
    with pytest.raises(RecipeError, match="another tensor that carries a gradient"):
        net(batch())


@pytest.mark.parametrize("model, word", [("t5", "several stacks"), ("clip", "several stacks"),
                                         ("whisper", "several stacks"), ("mlp", "no repeated"),
                                         ("swin", "different widths")])
def test_models_it_cannot_reverse_are_refused_beforehand(model, word):
    with pytest.raises(RecipeError, match=word):
        burnish.tune(tiny(model)[0], "meft")


@pytest.mark.parametrize("recipe, word", [
    ("meft + checkpoint", "mode of the blocks"), ("checkpoint + meft", "mode of the blocks"),
    ("meft(lam=0)", "above 0"), ("meft(layers=9)", "4 blocks"), ("meft(layers=0)", "4 blocks"),
    ("meft(targets='fc1')", "no targets"), ("meft(bottleneck=0)", "bottleneck"),
    ("meft(anchors=-1)", "anchors")])
def test_what_cannot_act_is_refused_beforehand(recipe, word):
    with pytest.raises(RecipeError, match=word):
        burnish.tune(Net(), recipe)


def test_batch_norm_in_a_block_is_refused():
    net = Net()
    for layer in net.layers:
        layer.norm1 = nn.BatchNorm1d(T)
    with pytest.raises(RecipeError, match="batch norm"):
        burnish.tune(net, "meft")


def test_another_adapter_cannot_run_its_blocks_in_another_mode():
    _, tuned = tuned_net()
    with pytest.raises(burnish.ConfigError, match="'default' has asked for with meft"):
        tuned.add("other", "lora(rank=2) + checkpoint")


def test_switched_off_it_is_the_base():
    net, tuned = tuned_net()
    base = copy.deepcopy(net)
    with tuned.disabled():
        off = net(batch())
    tuned.detach()
    assert torch.equal(off, net(batch()))
    assert not torch.equal(off, base(batch()))


def test_the_adapters_of_the_paper_are_64_wide_and_one_channel_is_legal():
    assert burnish.parse("meft")[0].bottleneck == 64
    assert burnish.parse("meft(bottleneck=1, anchors=0)")
    for words in ("bottleneck=0", "anchors=-1"):
        with pytest.raises(RecipeError, match="are expected"):
            burnish.parse(f"meft({words})")


def test_a_deep_model_is_told_by_the_blocks_between_two_kept_pairs():
    said = [burnish.parse(f"meft({more})")[0].repeats() for more in (
        "anchors=3", "anchors=0", "anchors=3, layers=2", "lam=0.1")]
    assert said == [3, 1, None, None]


@pytest.mark.parametrize("power", [0, 1, 2, 4, 8])
def test_fixed_streams_take_the_factors_whose_bits_pack(power):
    """1 and 2^-k for k of 1, 2, 4 and 8, and no other."""
    part = burnish.parse(f"meft(streams='fixed', lam={2.0 ** -power})")[0]
    assert part.scales() == (2.0 ** -power, 1.0)


@pytest.mark.parametrize("factor", [2.0, 4.0, 256.0, 1 / 3, 1 / 5, 1 / 8, 1 / 15, 1 / 17, 1 / 255,
                                    1 / 257, 2 / 256, 0.75])
def test_fixed_streams_refuse_other_factors(factor):
    with pytest.raises(RecipeError, match="whole bits are dropped"):
        burnish.parse(f"meft(streams='fixed', lam={factor})")[0].scales()
