"""VPTSP-G: both passes, proxies and loss written out in float64, sample by sample."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.proxies import ReluGru, anchored, gathered
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.methods.prompt.vptsp_g import Container
from burnish.testing import stir, tiny

SMALL = "vptsp_g(length=3, proxies=5, class_length=2)"
LABELS = torch.tensor([2, 0, 2, 1, 2, 0])              # no class in one piece, two without a sample


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(seed=0, labels=LABELS):
    return {"pixel_values": random(len(labels), 3, 16, 16, seed=seed), "labels": labels}


def holder(tuned):
    return next(h for _, h in tuned.timeline.handlers if isinstance(h, Container))


# -- the reference, without a word of burnish ------------------------------------------------------
def features(base, pixels, rows):
    """What the head reads when every block has rows (B, L, d) behind the class token."""
    hooks, seen = [], []
    blocks = base.vit.layers

    def enter(P):
        return lambda m, args: (torch.cat([args[0][:, :1], P, args[0][:, 1:]], 1), *args[1:])

    def leave(L):
        def cut(m, args, out):
            x = out[0] if isinstance(out, tuple) else out
            x = torch.cat([x[:, :1], x[:, 1 + L:]], 1)
            return (x, *out[1:]) if isinstance(out, tuple) else x
        return cut

    for block, P in zip(blocks, rows, strict=True):
        hooks += [block.register_forward_pre_hook(enter(P)),
                  block.register_forward_hook(leave(P.shape[1]))]
    hooks.append(base.classifier.register_forward_pre_hook(lambda m, a: seen.append(a[0])))
    base(pixel_values=pixels)
    for h in hooks:
        h.remove()
    return seen[0]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def gru(theta, v, h):
    W, U, b = (theta[k] for k in ("cell.W", "cell.U", "cell.b"))
    z = sigmoid(v @ W[0] + h @ U[0] + b[0])
    r = sigmoid(v @ W[1] + h @ U[1] + b[1])
    n = (v @ W[2] + r * (h @ U[2]) + b[2]).clamp_min(0)
    return (1 - z) * n + z * h


def read(theta, v, labels, c):
    """The container, class by class and sample by sample."""
    out = []
    for y in range(len(c)):
        h = c[y]
        for i in range(len(labels)):
            if int(labels[i]) == y:
                h = gru(theta, v[i], h)
        out.append(h / h.norm())
    return torch.stack(out)


def proxy_anchor(e, pi, labels, a, m):
    pull = push = 0
    for y in range(len(pi)):
        s = [float("nan")] * len(e)
        s = [e[i] @ pi[y] / e[i].norm() / pi[y].norm() for i in range(len(e))]
        mine = [torch.exp(-a * (s[i] - m)) for i in range(len(e)) if int(labels[i]) == y]
        others = [torch.exp(a * (s[i] + m)) for i in range(len(e)) if int(labels[i]) != y]
        pull = pull + torch.log(1 + sum(mine)) if mine else pull
        push = push + torch.log(1 + sum(others)) if others else push
    return (pull + push) / len(pi)


def layer_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * w + b


def by_hand(one, batch, c, a=32.0, m=0.1, keep=0.5):
    """(loss, new container) from the copies of what trains."""
    x, labels = batch["pixel_values"], batch["labels"]
    shared = [P.expand(len(x), -1, -1) for (_, n), P in one.theta.items() if n == "rows"]
    own = [P[labels] for (_, n), P in one.theta.items() if n == "vptsp_g_class.rows"]
    w, shift = (one.theta["classifier", f"norm.{n}"] for n in ("weight", "bias"))
    W, b = one.base.classifier.weight, one.base.classifier.bias
    e = layer_norm(features(one.base, x, shared), w, shift) @ W.t() + b
    mine = {n.removeprefix("vptsp_g_proxies."): t for (path, n), t in one.theta.items()
            if n.startswith("vptsp_g_proxies.")}
    v = layer_norm(features(one.base, x, own), mine["norm.weight"], mine["norm.bias"])
    v = v @ mine["linear.weight"].t() + mine["linear.bias"]
    v = v / v.norm(dim=1, keepdim=True)
    new = read(mine, v, labels, c)
    return proxy_anchor(e, keep * mine["bias"] + (1 - keep) * new, labels, a, m), new.detach()


def tuned_beside(beside, recipe=SMALL):
    one = beside("vit", recipe + " + sgd", batch=6)
    one.tuned.optimizer(0.0)
    return one


# -- the step --------------------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [(), (("sharpness", 8.0), ("margin", 0.3), ("bias_ratio", 0.2))])
def test_every_gradient_is_of_the_equation_and_the_container_goes_on(beside, extra):
    given = "".join(f", {k}={v}" for k, v in extra)
    one = tuned_beside(beside, SMALL[:-1] + given + ")")
    with_ = dict(extra)
    c = holder(one.tuned).c.clone()
    torch.testing.assert_close(c.norm(dim=1), torch.ones(5, dtype=c.dtype))
    for seed, labels in ((0, LABELS), (1, torch.tensor([1, 1, 0, 2, 1, 0]))):
        batch = pictures(seed, labels)
        for p in one.own.values():
            p.grad = None
        told = one.tuned.backward(batch)
        loss, new = by_hand(one, batch, c, with_.get("sharpness", 32.0), with_.get("margin", 0.1),
                            with_.get("bias_ratio", 0.5))
        ref = torch.autograd.grad(loss, list(one.theta.values()))
        top = max(float(r.abs().max()) for r in ref)
        for (key, p), r in zip(one.own.items(), ref, strict=True):
            assert float(r.abs().max()) > 1e-9 * top, key
            torch.testing.assert_close(p.grad, r, rtol=1e-7, atol=1e-9 * top)
        c = holder(one.tuned).c
        torch.testing.assert_close(c, new, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            own = one.tuned.model(**batch).loss
        torch.testing.assert_close(torch.as_tensor(told), own.detach(), rtol=1e-9, atol=0)


def test_the_container_carries_no_graph(beside):
    one = tuned_beside(beside)
    before = holder(one.tuned).c
    for seed in (0, 1):                                    # a graph would be walked twice
        one.tuned.backward(pictures(seed))
        c = holder(one.tuned).c
        assert not c.requires_grad and c.grad_fn is None
        torch.testing.assert_close(c.norm(dim=1), torch.ones(5, dtype=c.dtype))
        torch.testing.assert_close(c[3:], before[3:], rtol=1e-12, atol=0)
        assert (c[:3] - before[:3]).norm(dim=1).min() > 1e-3
    assert not any("container" in n for n, _ in one.tuned.named_parameters())


def test_a_probe_leaves_it_as_it_is(beside):
    one = tuned_beside(beside)
    before = holder(one.tuned).c.clone()
    one.tuned.probe(pictures())
    assert torch.equal(holder(one.tuned).c, before)


def test_evaluation_needs_no_class_and_no_rows_of_one(tmp_path):
    net, _ = tiny("vit", dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, SMALL + " + sgd", head=True)
    stir(tuned)
    net.eval()
    pixels, runs = pictures()["pixel_values"], []
    net.vit.layers[0].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        want = net(pixel_values=pixels).logits
    assert len(runs) == 1
    tuned.save(tmp_path / "file")
    tuned.save(tmp_path / "whole", whole=True)
    for name, p in net.named_parameters():
        if "vptsp_g_" in name:
            p.data.fill_(math.nan)
    with torch.no_grad():
        assert torch.equal(net(pixel_values=pixels).logits, want)
    again = burnish.load(copy.deepcopy(base), tmp_path / "file")
    assert "proxies=0" in str(again.recipe)
    assert not [n for n, _ in again.model.named_parameters() if "vptsp_g_" in n]
    with torch.no_grad():
        torch.testing.assert_close(again.model.eval()(pixel_values=pixels).logits, want)
    whole = burnish.load(copy.deepcopy(base), tmp_path / "whole")
    assert sum("vptsp_g_class" in n for n, _ in whole.named_parameters()) == 2


def test_an_evaluation_with_a_graph_brings_no_class(beside):
    one = tuned_beside(beside)                             # in evaluation mode
    before = holder(one.tuned).c
    out = one.tuned.model(pixel_values=pictures()["pixel_values"]).logits
    assert out.requires_grad and holder(one.tuned).c is before


@pytest.mark.parametrize("optimizer", ["sgd(momentum=0.9, weight_decay=0.01)", "adamw"])
def test_rows_on_the_host_train_as_resident_ones(optimizer):
    """The rows, and what the optimizer holds of them, whichever classes a batch has."""
    ends, moments = [], []
    for resident in (True, False):
        net, _ = tiny("vit", dtype=torch.float64)
        torch.manual_seed(4)
        tuned = burnish.tune(net, f"{SMALL[:-1]}, resident={resident}) + {optimizer}", head=True)
        opt = tuned.optimizer(0.05)
        for seed, labels in enumerate((LABELS, LABELS.flip(0), torch.tensor([1, 1, 0, 0, 1, 0]))):
            tuned.step(pictures(seed, labels))
        ends.append({n: p.detach().clone() for n, p in tuned.named_parameters()})
        moments.append(opt.state_dict()["state"])
    assert all(torch.equal(p, ends[1][n]) for n, p in ends[0].items())
    for a, b in zip(*(m.values() for m in moments), strict=True):
        assert a and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_rows_on_the_host_stay_there():
    def devices(resident):
        net, _ = tiny("vit")
        tuned = burnish.tune(net, f"{SMALL[:-1]}, resident={resident})", head=False)
        rows = [p for n, p in net.named_parameters() if "vptsp_g_class" in n]
        values = [p.detach().clone() for p in rows]
        net.to(torch.bfloat16).to("meta")
        kinds = {n: (p.device.type, p.dtype) for n, p in net.named_parameters()}
        assert set(kinds.values()) <= {("meta", torch.bfloat16), ("cpu", torch.bfloat16)}
        if not resident:
            mine = [p for n, p in net.named_parameters() if "vptsp_g_class" in n]
            assert all(torch.equal(a.bfloat16(), b) for a, b in zip(values, mine, strict=True))
        assert tuned is not None
        return {n for n, (device, _) in kinds.items() if device == "cpu"}

    assert not devices(True)
    found = devices(False)
    assert len(found) == 2 and all("vptsp_g_class.rows" in n for n in found)


# -- the blocks ------------------------------------------------------------------------------------
def test_classes_read_their_samples_in_order():
    cell = ReluGru(4).double()
    theta = {f"cell.{n}": p for n, p in cell.named_parameters()}
    theta["cell.b"].data.add_(random(3, 4, seed=3))
    v, c = F.normalize(random(7, 4), dim=1), F.normalize(random(6, 4, seed=1), dim=1)
    for labels in ([5, 5, 5, 5, 5, 5, 5], [0, 1, 0, 3, 3, 0, 1], [5, 4, 3, 2, 1, 0, 0]):
        y = torch.tensor(labels)
        torch.testing.assert_close(gathered(cell, v, y, c), read(theta, v, y, c))
    y = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    mixed = torch.tensor([4, 0, 2, 5, 1, 3, 6])            # within a class the order is kept
    torch.testing.assert_close(gathered(cell, v[mixed], y[mixed], c), gathered(cell, v, y, c))


def test_the_loss_is_stable_and_has_a_class_of_all_and_of_none():
    e, pi = random(5, 3), random(4, 3, seed=1)
    for labels in ([0, 0, 0, 0, 0], [0, 1, 2, 3, 1]):
        y = torch.tensor(labels)
        torch.testing.assert_close(anchored(e, pi, y, 7.0, 0.2), proxy_anchor(e, pi, y, 7.0, 0.2))
    e = e.float().requires_grad_()
    loss = anchored(e, pi.float(), torch.tensor([0, 1, 2, 3, 1]), 500.0, 0.1)
    loss.backward()
    assert loss.isfinite() and e.grad.isfinite().all()


# -- what is minimised -----------------------------------------------------------------------------
def grads(recipe, batch, loss=None):
    net, _ = tiny("vit", dtype=torch.float64)
    torch.manual_seed(4)
    tuned = burnish.tune(net, recipe + " + sgd", head=True)
    for p in tuned.parameters():
        p.data = p.double()
    tuned.optimizer(0.1)
    tuned.backward(batch, loss)
    return {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}


def test_the_models_own_loss_counts_as_said():
    batch = pictures()
    none, half, whole = (grads(f"{SMALL[:-1]}, own_loss={t})", batch) for t in (0.0, 0.5, 1.0))
    for n, g in none.items():
        torch.testing.assert_close(half[n], (g + whole[n]) / 2, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(g, whole[n]) for n, g in none.items())
    beside = {k if k != "labels" else "class": v for k, v in batch.items()}
    made = grads(SMALL, beside, lambda out, _: F.cross_entropy(out.logits, LABELS))
    for n, g in whole.items():                             # a loss from outside stands beside
        torch.testing.assert_close(made[n], g, rtol=1e-9, atol=1e-12)


def test_there_may_be_more_classes_than_outputs():
    labels = torch.tensor([4, 4, 0, 3, 2, 0])
    batch = {"pixel_values": pictures()["pixel_values"], "class": labels}
    found = grads(SMALL, batch, lambda out, _: 0 * out.logits.sum())
    rows = next(g for n, g in found.items() if "vptsp_g_class" in n)
    assert rows[[0, 2, 3, 4]].flatten(1).abs().sum(1).min() > 0 and not rows[1].any()


def test_what_is_minimised_falls():
    net, _ = tiny("vit", dtype=torch.float64)
    torch.manual_seed(0)
    tuned = burnish.tune(net, SMALL + " + adamw", head=True)
    tuned.optimizer(0.003)
    batch = pictures()

    def loss():
        with torch.no_grad():
            e = net.eval()(pixel_values=batch["pixel_values"]).logits
        net.train()
        held = holder(tuned)
        pi = 0.5 * held.made.bias.detach().double() + 0.5 * held.c.double()
        return float(proxy_anchor(e, pi, batch["labels"], 32.0, 0.1))

    first = loss()
    for _ in range(40):
        tuned.step(batch)
    assert loss() < first / 2


def test_it_goes_on_where_it_stood():
    def made():
        net, _ = tiny("vit", dtype=torch.float64)
        torch.manual_seed(4)
        tuned = burnish.tune(net, SMALL + " + sgd", head=True)
        tuned.optimizer(0.05)
        return tuned

    whole, first = made(), made()
    for seed in range(4):
        whole.step(pictures(seed))
    for seed in range(2):
        first.step(pictures(seed))
    state = first.timeline.state()
    first.optimizer(0.05)
    first.timeline.load(state)
    for seed in range(2, 4):
        first.step(pictures(seed))
    for a, b in zip(whole.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpointing_changes_no_gradient():
    a, b = (grads(SMALL + extra, pictures()) for extra in ("", " + checkpoint"))
    for n, g in a.items():
        torch.testing.assert_close(b[n], g, rtol=1e-9, atol=1e-12)


# -- sizes, starts, refusals -----------------------------------------------------------------------
def test_the_count_of_the_paper():
    """ViT-S on CUB: 46,080 of the embedding's rows, 1,382,400 of the classes'."""
    m = parse("vptsp_g(proxies=100)")[0]
    assert (m.length, m.class_length, m.bias_ratio) == (10, 3, 0.5)
    assert (m.sharpness, m.margin) == (32.0, 0.1)
    d = e = 384
    rest = 4 * d + (d + 1) * e + 6 * e * e + 3 * e + 100 * e
    assert m.count(d, 12, e) == 46_080 + 1_382_400 + rest
    assert parse("vptsp_g(proxies=0)")[0].count(d, 12, e) == 46_080 + 2 * d
    for recipe in (SMALL, "vptsp_g(length=3, proxies=0)"):
        tuned = burnish.tune(tiny("vit")[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32, 2, 3)


def test_the_start():
    torch.manual_seed(0)
    tuned = burnish.tune(tiny("vit")[0], "vptsp_g(length=40, proxies=30, class_length=20)",
                         head=False)
    found = {n.partition("default.")[2]: p.detach() for n, p in tuned.named_parameters()}
    assert float(found["vptsp_g.rows"].std()) == pytest.approx(  # fans of (1, length, d)
        math.sqrt(2 / (d_in(1, 40, 32))), rel=0.1)
    assert float(found["vptsp_g_class.rows"].std()) == pytest.approx(
        math.sqrt(2 / (d_in(30, 20, 32))), rel=0.1)
    assert float(found["vptsp_g_proxies.bias"].abs().max()) <= math.sqrt(6 / 33) / 8
    assert not found["vptsp_g_proxies.cell.b"].any()
    assert not found["vptsp_g_proxies.linear.bias"].any()
    assert (found["vptsp_g.norm.weight"] == 1).all() and not found["vptsp_g.norm.bias"].any()


def d_in(first, second, rest):
    """Xavier's fans of a tensor (first, second, rest) together."""
    return (second + first) * rest


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "vptsp_g(length=0)", "rows of at least 1"),
    ("vit", "vptsp_g(class_length=0)", "rows of at least 1"),
    ("vit", "vptsp_g(proxies=1)", "two proxies or more"),
    ("vit", "vptsp_g(bias_ratio=1.0)", "bias_ratio from"),
    ("vit", "vptsp_g(sharpness=0.0)", "sharpness above 0"),
    ("vit", "vptsp_g(own_loss=-1.0)", "own_loss"),
    ("vit", "vptsp_g(targets='q')", "no targets"), ("llama", "vptsp_g", "vptsp_g needs"),
    ("vit", "vptsp_g + mezo", "vptsp_g"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_batches_it_refuses():
    net, _ = tiny("vit", dtype=torch.float64)
    tuned = burnish.tune(net, "vptsp_g(proxies=2) + sgd", head=True)
    tuned.optimizer(0.1)
    with pytest.raises(ConfigError, match="classes from 0 to 1"):
        tuned.step(pictures())
    with pytest.raises(ConfigError, match="`class` or `labels`"):
        tuned.step({"pixel_values": pictures()["pixel_values"]},
                   lambda out, _: out.logits.square().mean())
