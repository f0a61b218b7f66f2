"""TabM: every member is an MLP by itself, the loss is the mean of theirs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.members import Apart, Ensemble, Shared
from burnish.core.errors import RecipeError
from burnish.core.site import Place
from burnish.testing import stir, tiny


def plain(out=3, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.LayerNorm(6), nn.Tanh(),
                         nn.Linear(6, 6, bias=bias), nn.Tanh(), nn.Linear(6, out)).double()


def made(text="tabm(k=3)", size=0.3, **kw):
    net = plain(**kw)
    tuned = burnish.tune(net, text, head=False)
    net.double()
    return stir(tuned, size=size), net


def letters(net):
    """path -> what stands at its linear."""
    return {path.partition(".burnish")[0]: m for path, m in net.named_modules()
            if isinstance(m, Shared | Apart)}


def equation(net, x, k):
    """Member by member, layer by layer: (k, N, out)."""
    own, rows = letters(net), []
    for i in range(k):
        h = x
        for n, layer in enumerate(net):
            m = own.get(str(n))
            if isinstance(m, Apart):
                h = h @ m.weight[i].T + m.bias[i]
            elif isinstance(layer, nn.Linear):
                h = h if m is None else h * m.r[i]
                h = h @ layer.weight.T
                if m is None or m.s is None:
                    h = h if layer.bias is None else h + layer.bias
                else:
                    h = h * m.s[i]
                    h = h if m.b is None else h + m.b[i]
            elif isinstance(layer, nn.LayerNorm):
                h = F.layer_norm(h, (6,), layer.weight, layer.bias)
            else:
                h = torch.tanh(h)
        rows.append(h)
    return torch.stack(rows)


@pytest.mark.parametrize("mode, bias", [("tabm", True), ("tabm", False), ("mini", True),
                                        ("mini", False), ("packed", True)])
def test_members_and_all_gradients_are_the_equations(mode, bias):
    tuned, net = made(f"tabm(k=3, mode='{mode}')", bias=bias)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    got, want = net(x).view(5, 3, 3), equation(net, x, 3).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    params = [x, *tuned.parameters()]
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, params, g), torch.autograd.grad(want, params, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert b.any()


@pytest.mark.parametrize("mode", ["tabm", "mini", "packed"])
def test_a_member_is_its_folded_mlp(mode):
    tuned, net = made(f"tabm(k=3, mode='{mode}')")
    x = torch.randn(5, 4, dtype=torch.float64)
    whole, method = net(x).view(5, 3, 3), tuned.recipe[0]
    for i in range(3):
        alone = plain(seed=9)
        alone.load_state_dict(method.lifecycle(tuned, i))
        torch.testing.assert_close(alone(x), whole[:, i], rtol=1e-6, atol=1e-9)


def test_the_loss_is_the_mean_of_the_members_losses_and_not_of_their_mean():
    tuned, net = made()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    rows = equation(net, x, 3)
    want = torch.stack([F.cross_entropy(z, y) for z in rows]).mean()
    got = tuned.loss((x, y), lambda out, batch: F.cross_entropy(out, batch[1]))
    torch.testing.assert_close(got, want)
    own = F.cross_entropy(net(x), y.repeat_interleave(3))
    torch.testing.assert_close(own, want)
    assert abs(float((got - F.cross_entropy(rows.mean(0), y)).detach())) > 1e-3
    net.eval()                                   # what trains is the same in either mode
    with torch.enable_grad():
        torch.testing.assert_close(
            tuned.loss((x, y), lambda out, batch: F.cross_entropy(out, batch[1])), want)
    params = list(tuned.parameters())
    for a, b in zip(torch.autograd.grad(got, params), torch.autograd.grad(want, params),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_a_model_that_makes_its_loss_is_given_its_labels_for_each_member():
    net, batch = tiny("mlp", dtype=torch.float64)
    tuned = burnish.tune(net, "tabm(k=4)", head=False)
    net.double()
    stir(tuned, size=0.3)
    out = net(**batch)
    assert out.logits.shape == (2, 3)
    rows = net.logits(batch["x"].repeat_interleave(4, 0)).view(2, 4, 3)
    want = torch.stack([F.cross_entropy(rows[:, i], batch["labels"]) for i in range(4)]).mean()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.logits, rows.mean(1))


@pytest.mark.parametrize("out", [1, 3])
def test_in_evaluation_it_answers_with_the_mean(out):
    for average in ("outputs", "probabilities"):
        tuned, net = made(f"tabm(k=3, average='{average}')", out=out)
        net.eval()
        x = torch.randn(5, 4, dtype=torch.float64)
        rows = equation(net, x, 3)
        got = net(x)
        if average == "outputs":
            torch.testing.assert_close(got, rows.mean(0))
        elif out == 1:
            torch.testing.assert_close(got.sigmoid(), rows.sigmoid().mean(0))
        else:
            torch.testing.assert_close(got.softmax(-1), rows.softmax(-1).mean(0))
            torch.testing.assert_close(got, rows.softmax(-1).mean(0).log())


def test_members_are_equal_where_nothing_tells_them_apart():
    """r of ones and tied heads: the base, k times; with random signs members differ."""
    x = torch.randn(5, 4, dtype=torch.float64)
    want = plain()(x)
    _, net = made("tabm(k=3, init='ones', head_start='copied')", size=0.0)
    torch.testing.assert_close(net(x).view(5, 3, 3), want.unsqueeze(1).expand(5, 3, 3))
    for text in ("tabm(k=3, head_start='copied')", "tabm(k=3, init='ones')"):
        _, net = made(text, size=0.0)
        rows = net(x).view(5, 3, 3)
        assert (rows[:, 0] - rows[:, 1]).abs().max() > 1e-3


def test_the_start():
    _, net = made("tabm(k=8, block=2)", size=0.0)
    own = letters(net)
    first, second, head = own["0"], own["3"], own["5"]
    assert set(first.r.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(first.r[:, ::2], first.r[:, 1::2])
    for ones in (first.s, second.r, second.s):
        assert torch.equal(ones, torch.ones_like(ones))
    assert torch.equal(first.b, net[0].bias.expand(8, 6))
    assert torch.equal(second.b, net[3].bias.expand(8, 6))
    assert head.weight.abs().max() <= 6 ** -0.5 and head.weight.abs().max() > 0.9 * 6 ** -0.5
    assert len({float(w[0, 0]) for w in head.weight}) == 8
    assert head.bias.abs().max() <= 6 ** -0.5 and head.bias.unique().numel() == 24
    _, net = made("tabm(k=64, init='normal')", size=0.0)
    r = letters(net)["0"].r
    assert r.unique().numel() == r.numel() and abs(float(r.std()) - 1) < 0.2


def test_the_count_of_the_paper():
    method = burnish.parse("tabm")[0]
    wide = Place("a", "weight", "linear", 512, 512)
    assert method.count(wide) == 311_296
    apart = burnish.parse("tabm(mode='packed')")[0].count(wide)
    assert apart == 8_404_992 == 32 * (512 * 512 + 512)
    for text in ("tabm(k=3)", "tabm(k=3, rest=False)", "tabm(k=3, mode='packed')",
                 "tabm(k=3, mode='mini')"):
        tuned, net = made(text)
        method = tuned.recipe[0]
        first, _, second, head = (p for p in [
            Place("0", "weight", "linear", 6, 4), None,
            Place("3", "weight", "linear", 6, 6), Place("5", "weight", "linear", 3, 6)])
        want = method.count(first) + method.count(second) + method.count(head, last=True)
        want += 12 * method.rest                     # the norm
        want += 3 * 4 if method.mode == "mini" else 0        # r of the first linear
        assert sum(p.numel() for p in tuned.parameters()) == want, text


def test_what_members_share_trains_or_stays():
    assert {n for n, _ in made("tabm(k=3)")[0].named_parameters() if "burnish" not in n} == \
        {"0.weight", "1.weight", "1.bias", "3.weight"}
    assert not [n for n, _ in made("tabm(k=3, rest=False)")[0].named_parameters()
                if "burnish" not in n]
    tuned, _ = made("tabm(k=3)")
    opt = tuned.optimizer(weight_decay=0.5)
    left = {id(p) for g in opt.param_groups if not g["weight_decay"] for p in g["params"]}
    assert all(id(p) in left for n, p in tuned.named_parameters() if ".tabm." in n and n[-2] == ".")


def test_pruning_keeps_members_that_help():
    tuned, net = made("tabm(k=4)", size=0.5)
    x = torch.randn(64, 4, dtype=torch.float64)
    net.eval()
    rows = equation(net, x, 4)
    y = rows[2].argmax(-1)                       # what member 2 says is right

    def score():
        with torch.no_grad():
            return -float(F.cross_entropy(net(x), y))

    kept, before = tuned.recipe[0].pruned(tuned, score), None
    assert 2 in kept and len(kept) < 4
    torch.testing.assert_close(net(x), rows[kept].mean(0))
    assert next(m for m in net.modules() if isinstance(m, Ensemble)).answers.tolist() == \
        [i in kept for i in range(4)], before


def test_it_learns_and_steps_repeat_the_batch():
    tuned, net = made("tabm(k=4)", size=0.0)
    x = torch.randn(64, 4, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] > 0).long()
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step((x, y), lambda out, b: F.cross_entropy(out, b[1])))
              for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    net.eval()
    assert (net(x).argmax(-1) == y).double().mean() > 0.9


def test_lora_on_a_shared_matrix_is_inside_the_member():
    net = plain()
    tuned = burnish.tune(net, "lora(rank=2, alpha=2, targets='0') + tabm(k=3, rest=False)",
                         head=False)
    net.double()
    stir(tuned, size=0.3)
    x = torch.randn(5, 4, dtype=torch.float64)
    got = net(x).view(5, 3, 3)
    lora = net[0].burnish.default.lora
    with torch.no_grad():
        net[0].weight += lora.B @ lora.A
        torch.testing.assert_close(got, equation(net, x, 3).transpose(0, 1))
    with pytest.raises(RecipeError, match=r"another part adds to 0\.weight"):
        tuned.recipe[1].lifecycle(tuned, 0)


@pytest.mark.parametrize("text, why", [
    ("tabm(k=0)", "k and block of at least 1"),
    ("tabm(block=0)", "k and block of at least 1"),
    ("tabm(mode='packed', init='ones')", "has no r"),
    ("tabm(init='ones', block=2)", "draws nothing"),
    ("tabm(targets='0')", "takes no targets"),
    ("tabm(block=3)", "do not divide the 4"),
    ("bitfit + tabm", "every member has its own"),
    ("lora(rank=2, targets='5') + tabm", "every member has its own"),
    ("distill + tabm", "one answer of each sample"),
    ("tabm + tabm", "how many answers"),
])
def test_what_cannot_act_is_refused(text, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.tune(plain(), text, head=False)


def test_other_models_are_refused():
    with pytest.raises(RecipeError, match="linears one behind the other"):
        burnish.tune(tiny("vit")[0], "tabm")
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with pytest.raises(RecipeError, match="linears one behind the other"):
        burnish.tune(net, "tabm")
    tuned, net = made()
    with pytest.raises(RecipeError, match="members 0 to 2, not 3"):
        tuned.recipe[0].lifecycle(tuned, 3)
    with pytest.raises(RecipeError, match="call the model as a whole"):
        net[0](torch.randn(5, 4, dtype=torch.float64))


def test_the_defaults():
    m = burnish.parse("tabm")[0]
    assert (m.k, m.mode, m.init, m.rest, m.head_start, m.average, m.block) == \
        (32, "tabm", "signs", True, "drawn", "outputs", 1)


@pytest.mark.slow
def test_fit_trains_members_on_handwriting_and_tells_the_figure_of_their_mean(tmp_path):
    from burnish.fit.pictures import Picture

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    run = burnish.fit(net, "digits", "tabm(k=4)", output=tmp_path, max_steps=80, lr=1e-2,
                      batch_size=32, quiet=True, report=False, seed=0,
                      processor=Picture(8, 8, (0.5,), (0.5,)))
    assert run.metrics["validation"]["accuracy"] > 0.8
