"""MIP: updates generated from numbers of the sample, the encoding that keeps their length."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.hyper import HyperChain, Trunk, encoded
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import stir, tiny

SMALL = "mip(inputs={}, rank=2, hidden=5, code=6, scale=1.5)"
GAMMA = {1: torch.tensor([0.2, 0.9, 0.5]), 2: torch.tensor([[0.2, 1.0], [0.0, 0.4], [0.7, 0.7]])}


def make(inputs=1, model="vit", more="", **kw):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch.pop("labels", None)
    tuned = burnish.tune(net, SMALL.format(inputs) + more, head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.2), batch


@pytest.mark.parametrize("model, inputs", [("vit", 1), ("vit", 2), ("swin", 2), ("gpt2", 1),
                                           ("mlp", 2)])
def test_the_equation_written_out(model, inputs):
    """y = W x + s (B_0 + W_B e)(A_0 + W_A e) x, sample by sample, with one network for e."""
    tuned, batch = make(inputs, model)
    gamma = GAMMA[inputs].double()
    mine = dict(tuned.branches(HyperChain))
    (trunk,) = {id(m.trunk): m.trunk for m in mine.values()}.values()
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def e_of(g):
        z = torch.cat([torch.cos(math.pi * g / 2), torch.sin(math.pi * g / 2)])
        for linear in (trunk.inner, trunk.outer):
            z = linear.weight @ z + linear.bias
            z = torch.where(z > 0, z, 0.01 * z)
        return z

    def stand(path, m):
        def hook(module, args, out):
            x, rows = args[0], []
            for i, row in enumerate(x):
                e = e_of(gamma[i * 3 // len(x)].reshape(-1))
                A = m.A0 + (m.WA @ e).reshape(m.A0.shape)
                B = m.B0 + (m.WB @ e).reshape(m.B0.shape)
                rows.append(1.5 * row @ A.T @ B.T)
            return out + torch.stack(rows)
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)
    want, got = base(**batch).logits, tuned.model(**batch, gamma=gamma).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        assert b.any(), n
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def test_what_is_generated_does_not_grow_with_its_input():
    """The code has one length; of the plain numbers, weights grow in proportion."""
    g = torch.rand(50, 3, dtype=torch.float64)
    torch.testing.assert_close(encoded(g).norm(dim=1), torch.full((50,), 3**0.5).double())
    assert torch.equal(encoded(torch.tensor([[0.0]])), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(encoded(torch.tensor([[1.0]])), torch.tensor([[0.0, 1.0]]))
    torch.manual_seed(0)
    layers = [HyperChain(Trunk(1, 32, 64), 20, 5, 4, scale=1.0, owns=True) for _ in range(40)]
    size, plain = [], []
    for x in (0.01, 0.1, 1.0):
        size.append(torch.stack([(m.factors(torch.tensor([[x]]))[0][0] - m.A0).detach()
                                 for m in layers]).std())
        plain.append(torch.stack([F.linear(F.leaky_relu(m.trunk.outer(F.leaky_relu(
            F.linear(torch.tensor([[x, 0.0]]), m.trunk.inner.weight)))), m.WA).detach()
            for m in layers]).std())
    assert max(size) < 1.3 * min(size)
    assert plain[1] / plain[0] == pytest.approx(10, rel=0.01)
    assert plain[2] / plain[1] == pytest.approx(10, rel=0.01)


def test_without_the_output_layer_the_own_weights_are_left():
    tuned, batch = make()
    with torch.no_grad():
        for _, m in tuned.branches(HyperChain):
            m.WA.zero_()
            m.WB.zero_()
            A, B = m.factors(torch.tensor([[0.3], [0.8]], dtype=torch.float64))
            assert torch.equal(A, m.A0.expand_as(A)) and torch.equal(B, m.B0.expand_as(B))


def test_a_mixed_batch_is_its_samples_one_by_one():
    tuned, batch = make(2, "swin")
    gamma = GAMMA[2]
    with torch.no_grad():
        whole = tuned.model(**batch, gamma=gamma).logits
        for k in range(3):
            one = {n: v[k:k + 1] for n, v in batch.items()}
            for given in (gamma[k:k + 1], gamma[k]):
                torch.testing.assert_close(tuned.model(**one, gamma=given).logits[0], whole[k],
                                           rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs, gamma", [(1, 0.3), (2, (0.3, 1.0))])
@pytest.mark.parametrize("model, targets", [("vit", None), ("timm_qkv", "q,v,fc2")])
def test_one_gamma_by_itself_is_a_lora_that_merges(model, targets, inputs, gamma, tmp_path):
    tuned, batch = make(inputs, model, **({} if targets is None else {"targets": targets}))
    given = torch.tensor(gamma)
    with torch.no_grad():
        want = tuned.model(**batch, gamma=given).logits
        for m in tuned.model.modules():
            if isinstance(m, HyperChain):
                m.float()
        tuned.recipe.named("mip").lifecycle(tuned, gamma, "one")
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-4, atol=1e-5)
        tuned.unmerge()
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny(model, dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-4, atol=1e-5)


def test_rows_of_a_fused_weight_get_it_alone():
    from burnish.core.call import Call, resume

    tuned, _ = make(model="timm_qkv", targets="q,v")
    for _, layer in tuned.branches(HyperChain):
        with resume(Call(given={"gamma": 0.3})):
            y = layer(torch.randn(2, 32, dtype=torch.float64))
        assert y.shape == (2, 96) and not y[:, 32:64].any() and y[:, :32].all() and y[:, 64:].all()


@pytest.mark.parametrize("wrong", [1.5, -0.5, (0.5, 0.5)])
def test_what_is_no_gamma_is_refused(wrong):
    tuned, batch = make()
    with pytest.raises(burnish.RecipeError, match="mip reads 1 numbers from 0 to 1, not"):
        tuned.recipe.named("mip").lifecycle(tuned, wrong, "no")
    if not isinstance(wrong, tuple):
        with pytest.raises(burnish.RecipeError, match="mip reads 'gamma'.*numbers from 0 to 1"):
            tuned.model(**batch, gamma=wrong)
    for end in (0.0, 1.0):
        tuned.use("default")
        tuned.recipe.named("mip").lifecycle(tuned, end, f"end{end:.0f}")


@pytest.mark.parametrize("inputs, given", [(1, torch.rand(3, 2)), (2, torch.rand(3, 1)),
                                           (2, torch.rand(3, 3)), (1, torch.rand(3, 1, 2))])
def test_entries_of_another_shape_are_refused(inputs, given):
    tuned, batch = make(inputs)
    with pytest.raises(burnish.RecipeError, match=f"'gamma' has entries of.*expected {inputs} num"):
        tuned.model(**batch, gamma=given)
    right = torch.rand(3, inputs)
    assert tuned.model(**batch, gamma=right).logits.isfinite().all()


def test_start_counts_and_defaults(published):
    net, batch = tiny("vit", batch=3)
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "mip", head=False)
    assert torch.equal(net(**batch, gamma=GAMMA[1]).logits, want)
    layers = [m for _, m in tuned.branches(HyperChain)]
    assert sum("trunk" in m._modules for m in layers) == 1 < len(layers)
    assert layers[0].borrowed == () and len(layers[1].borrowed) == 4
    for m in layers:
        bound = m.A0.shape[1]**-0.5
        assert not m.B0.any() and not m.WB.any()
        assert 0.9 * bound < float(m.A0.detach().abs().max()) <= bound
        assert float(m.A0.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.2)
        assert float(m.WA.detach().std()) == pytest.approx(len(m.WA)**-0.5, rel=0.1)
    decay = {id(p): g["weight_decay"] for g in
             tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups for p in g["params"]}
    assert all(decay[id(m.A0)] == decay[id(m.B0)] == 0 and decay[id(m.WA)] == 0.5 for m in layers)
    torch.manual_seed(0)
    trunk = Trunk(50, 300, 200)
    assert float(trunk.inner.weight.detach().std()) == pytest.approx((2 / 300)**0.5, rel=0.03)
    assert float(trunk.outer.weight.detach().std()) == pytest.approx((2 / 200)**0.5, rel=0.03)
    assert not trunk.inner.bias.any() and not trunk.outer.bias.any()
    (m,) = burnish.parse("mip")
    assert m.settings() == {"targets": None, "inputs": 1, "rank": 4, "scale": 1.0, "hidden": 16,
                            "code": 16}
    (m,) = burnish.parse("mip(inputs=3, hidden=5, code=6, rank=2)")
    anatomy, _ = published("ViTConfig", "ViTForImageClassification")
    with torch.device("meta"):
        made = list(m.branch(anatomy))
    places = [Place("a", "weight", "linear", o, i) for o, i in
              ((768, 768),) * 4 + ((3072, 768), (768, 3072))]
    assert sum(p.numel() for b in made for p in b.module.parameters()) == \
        12 * sum(map(m.count, places)) + 7 * 5 + 6 * 6
    assert m.count(places[0]) == 7 * 2 * 1536


@pytest.mark.parametrize("settings", ["inputs=0", "hidden=0", "code=0"])
def test_what_cannot_act_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^mip.*at least 1"):
        burnish.parse(f"mip({settings})")
    assert burnish.parse("mip(inputs=1, hidden=1, code=1)")


def test_models_and_ranks_that_do_not_fit_are_refused():
    with pytest.raises(burnish.RecipeError, match="mip: none of the targets is one of the linears"):
        burnish.tune(tiny("cnn")[0], "mip")
    with pytest.raises(RankError, match="mip: rank 40 does not fit"):
        burnish.tune(tiny("vit")[0], "mip(rank=40)")
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(burnish.RecipeError, match="mip tells the samples"):
        burnish.tune(nn.Sequential(nn.Linear(8, 16), stack), "mip(rank=2)")


def test_a_routed_expert_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x):
            return self.experts[0](x)

    with pytest.raises(burnish.TargetError, match="given the tokens of all samples together"):
        burnish.tune(Net(), "mip(rank=2)", targets="experts.0", head=False)


def test_one_number_is_a_column_and_several_have_a_shape():
    one, two = (burnish.parse(f"mip(inputs={n})")[0].keys()["gamma"] for n in (1, 2))
    assert one.real and two.real and one.shape == () and two.shape == (2,)
    assert one.meaning == two.meaning
