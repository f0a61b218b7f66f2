"""PELA: two small matrices in the place of each weight, and the model of which they are left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks.weight import replaced
from burnish.blocks.weight.replaced import Replaced, farthest
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.testing import follows, stir, tiny

ALONE = "pela(rest=False)"


def layer(recipe=ALONE, out=12, inp=10, bias=True, **kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inp, out, bias)).double()
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, recipe, targets="0", head=False, **kw)
    return tuned, next(t for _, t in tuned.terms(Replaced)), W


class Largest(TorchDispatchMode):
    top = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.top = max(self.top, t.numel())
        return out


@pytest.mark.parametrize("out, inp, rho, rank", [(12, 10, 2.0, 2), (10, 12, 1.25, 4),
                                                 (16, 16, 2.0, 4), (12, 10, 5.0, 1)])
def test_the_start_is_the_best_of_the_rank(out, inp, rho, rank):
    _, term, W = layer(f"pela(compression={rho}, rest=False)", out, inp)
    assert term.A.shape == (rank, inp) and term.B.shape == (out, rank)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vt[:rank]
    torch.testing.assert_close(term.B @ term.A, best, rtol=1e-12, atol=1e-12)
    off = torch.linalg.matrix_norm(W - term.B @ term.A)
    torch.testing.assert_close(off, S[rank:].square().sum().sqrt())          # Eckart-Young
    both = torch.diag(S[:rank])                                             # shared by halves
    torch.testing.assert_close(term.A @ term.A.t(), both, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(term.B.t() @ term.B, both, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_two_linears(bias):
    tuned, term, _ = layer(bias=bias)
    b = tuned.model[0].bias.detach().clone() if bias else None
    stir(tuned, size=0.5)
    follows(tuned, lambda x, A, B: F.linear(F.linear(x, A), B, b), [term.A, term.B], (5, 3, 10))


def test_all_else_trains_with_rest_and_the_weight_itself_never():
    net, _ = tiny("vit")
    names = {n for n, _ in net.named_parameters()}
    taken = {f"{p.path}.{p.param}" for p in match(Anatomy.of(net))}
    tuned = burnish.tune(net, "pela")
    assert {n for n, _ in tuned.named_parameters() if ".burnish." not in n} == names - taken
    tuned.detach()
    tuned = burnish.tune(net, "pela", targets="fc1")
    fc1 = {n for n in names if n.endswith("fc1.weight")}
    assert {n for n, _ in tuned.named_parameters() if ".burnish." not in n} == names - fc1
    tuned.detach()
    tuned = burnish.tune(net, ALONE, head=False)
    assert all(".burnish." in n for n, _ in tuned.named_parameters())


def test_what_it_has_no_form_for_trains_whole_and_so_it_does_on_two_targets():
    tuned = burnish.tune(tiny("mha")[0], "pela")
    assert "attn.in_proj_weight" in dict(tuned.named_parameters())
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    tuned = burnish.tune(net, "pela(compression=3.0, rest=False, targets='0') + "
                         "pela(rest=False, targets='1')", head=False)
    assert [t.A.shape[0] for _, t in tuned.terms(Replaced)] == [2, 3]


def test_a_file_holds_the_factors_in_fp32(tmp_path):
    net, batch = tiny("vit", dtype=torch.bfloat16)
    tuned = burnish.tune(copy.deepcopy(net), ALONE, head=False)
    stir(tuned, size=0.001)
    tuned.save(tmp_path / "a")
    again = burnish.load(net, tmp_path / "a")
    for (n, a), (_, b) in zip(tuned.terms(Replaced), again.terms(Replaced), strict=True):
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and b.A.dtype == torch.float32, n


@pytest.mark.parametrize("panel, most", [(4, 4), (64, 64)])
def test_errors_are_looked_at_a_panel_at_a_time(panel, most, monkeypatch):
    monkeypatch.setattr(replaced, "PANEL", panel)
    A, B, W = torch.ones(1, 100), torch.ones(3, 1), torch.zeros(3, 100)
    with Largest() as made:
        assert farthest(A, B, W) == (0, 0)
    assert 0.5 * most < made.top <= most


def test_nothing_larger_than_the_weight_is_made():
    with Largest() as made:
        burnish.tune(nn.Sequential(nn.Linear(12, 200)), ALONE, targets="0", head=False)
    assert made.top <= 200 * 12


def test_a_weight_too_small_for_a_rank_trains_whole():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    tuned = burnish.tune(net, "pela", head=False)
    assert {n for n, _ in tuned.named_parameters() if ".burnish." not in n} == \
        {"0.bias", "1.weight", "1.bias"}
    with pytest.raises(RankError, match="compression=2.0 leaves no rank to 1.weight .1 x 16."):
        burnish.tune(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1)), ALONE, targets="1",
                     head=False)


def test_counts_of_deit_b():
    config = transformers.DeiTConfig()
    with torch.device("meta"):
        net = transformers.DeiTForImageClassification(config)
    method, places = parse("pela")[0], match(Anatomy.of(net))
    fc1 = next(p for p in places if (p.out, p.inp) == (3072, 768))
    assert method.rank(fc1) == 307
    assert method.count(fc1) == 307 * 3840 == 1_178_880
    for rho in (1.5, 2.0, 3.0):
        m = parse(f"pela(compression={rho})")[0]
        share = sum(m.count(p) for p in places) / sum(p.numel for p in places)
        assert share == pytest.approx(1 / rho, rel=0.01)


@pytest.mark.parametrize("panel", [4, 1 << 22])
def test_the_largest_error(panel, monkeypatch):
    monkeypatch.setattr(replaced, "PANEL", panel)
    g = torch.Generator().manual_seed(0)
    for k in range(20):
        A, B, W = (torch.randn(s, generator=g, dtype=torch.float64)
                   for s in ((2, 7), (3, 2), (3, 7)))
        off = (B @ A - W).abs()
        assert divmod(int(off.argmax()), 7) == farthest(A, B, W), k
    assert farthest(torch.zeros(1, 4), torch.zeros(2, 1), torch.ones(2, 4)) == (0, 0)   # of equals


@pytest.mark.parametrize("targets", [None, "q,fc1"])
def test_the_term_is_that_of_the_largest_errors(targets):
    """Its gradient joins the loss's at its scale, against autograd on the whole matrices."""
    model = "vit" if targets is None else "gpt2"
    net, batch = tiny(model, dtype=torch.float64)
    tuned = burnish.tune(net, "pela(weight=0.7, slack=0.01, rest=False)", targets=targets,
                         head=False)
    net.eval()
    stir(tuned)
    terms = [t for _, t in tuned.terms(Replaced)]
    assert len(terms) == (12 if targets is None else 4)
    whole = net(**batch).loss
    for t in terms:
        off = (t.B @ t.A - tuned.weight(t.place)).abs().max()
        whole = whole + 0.7 / len(terms) * (off - 0.01) ** 2
    want = torch.autograd.grad(0.5 * whole, list(tuned.parameters()))
    tuned.optimizer(lr=0.0)
    (0.5 * tuned.loss(batch)).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12, msg=n)


def test_without_a_weight_there_is_no_term():
    tuned, *_ = layer()
    assert list(tuned.recipe[0].objective(tuned, None)) == []


@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_the_small_model_answers_the_same_and_takes_any_recipe(model):
    net, batch = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net).eval()
    before = sum(p.numel() for p in net.parameters())
    tuned = burnish.tune(net, "pela")
    stir(tuned)
    net.eval()
    want = net(**batch).logits.detach()
    terms = [t for _, t in tuned.terms(Replaced)]
    places = [t.place for t in terms]
    gone = sum(p.numel for p in places) - sum(parse("pela")[0].count(p) for p in places)
    small = tuned.recipe[0].lifecycle(tuned)
    assert small is net and sum(p.numel() for p in small.parameters()) == before - gone
    assert not any(p.requires_grad for p in small.parameters())
    torch.testing.assert_close(small(**batch).logits, want, rtol=1e-9, atol=1e-10)
    module = small.get_submodule(places[0].path)
    assert [type(m) for m in module] == [nn.Linear, nn.Linear] and not module.training
    assert module[0].bias is None and module[1].bias is not None
    assert [(m.out_features, m.in_features) for m in module] == [m.weight.shape for m in module]
    with torch.no_grad():
        module[0].weight.zero_()                             # its own, not the handle's
    tuned.unmerge()                                          # and the way back
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-12, atol=1e-12)
    tuned.detach()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(),
                                                 base.state_dict().values(), strict=True))


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "dora(rank=2)", "full", "nf4 + lora(rank=2)"])
def test_any_recipe_tunes_the_small_model(recipe):
    net, batch = tiny("vit")
    first = burnish.tune(net, "pela")
    small = first.recipe[0].lifecycle(first)
    small.eval()
    before = small(**batch).logits.detach()
    tuned = burnish.tune(small, recipe, head=False)
    if "nf4" not in recipe:
        torch.testing.assert_close(small(**batch).logits, before, rtol=1e-4, atol=1e-5)
    pairs = [n for n, _ in tuned.named_parameters() if ".0." in n or ".1." in n]
    assert pairs
    tuned.optimizer(lr=1e-2)
    for _ in range(5):
        last = tuned.step(batch)
    assert last < first.loss(batch) if first.merged is None else last.isfinite()


def test_a_root_that_is_replaced_and_slices_have_no_small_model():
    net, _ = tiny("gpt2")
    tuned = burnish.tune(net, ALONE, targets="q", head=False)
    with pytest.raises(ConfigError, match=r"c_attn.weight\[q\] is rows of a weight that stays"):
        tuned.recipe[0].lifecycle(tuned)
    assert tuned.merged is None
    tuned.detach()
    tuned = burnish.tune(net, "lora(rank=2)")
    with pytest.raises(ConfigError, match="nothing is replaced in this model; tune it with pela"):
        parse("pela")[0].lifecycle(tuned)


@pytest.mark.parametrize("other, why", [
    ("lora(rank=2)", "pela takes the place of 0.weight: what lora adds to it would not be heard"),
    ("shira(rank=2)", "what shira adds to it would not be heard; give them different targets"),
    ("dora(rank=2)", "both functions of 0.weight|function of W"),
    ("bone(rank=2)", "both functions of 0.weight|function of W"),
    ("full", "full trains 0.weight whole, but pela takes its place; give them different targets")])
@pytest.mark.parametrize("first", [True, False])
def test_what_would_not_be_heard_is_refused(other, why, first):
    net = nn.Sequential(nn.Linear(10, 12))
    with pytest.raises(RecipeError, match=why):
        burnish.tune(net, f"{ALONE} + {other}" if first else f"{other} + {ALONE}", head=False)
    assert type(net[0]) is nn.Linear and [n for n, _ in net.named_parameters()] == \
        ["0.weight", "0.bias"]


def test_an_update_of_some_rows_under_it_is_refused():
    with pytest.raises(RecipeError, match="takes the place of .*c_attn.weight: what another part"):
        burnish.tune(tiny("gpt2")[0], "pela(targets='qkv', rest=False) + lora(rank=2, targets='q')")


def test_other_weights_take_what_they_like_and_other_adapters_too():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "pela(targets='fc1', rest=False) + dora(rank=2, targets='q')",
                         head=False)
    tuned.add("other", "lora(rank=2, targets='fc1')", head=False)
    tuned.use("other")
    net(**batch).loss.backward()
    with pytest.raises(RecipeError, match="would not be heard"):
        tuned.use({"default": 1.0, "other": 1.0})


def test_the_teacher_is_the_base_whatever_form_it_is_held_in():
    net, batch = tiny("vit")
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "pela")
    stir(tuned)
    net.eval()
    with tuned.disabled():
        assert torch.equal(net(**batch).logits, base(**batch).logits)
    tuned.detach()
    plain = burnish.tune(copy.deepcopy(base), ALONE, head=False)
    coded = burnish.tune(copy.deepcopy(base), f"nf4 + {ALONE}", head=False)
    for (n, a), (_, b) in zip(plain.terms(Replaced), coded.terms(Replaced), strict=True):
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B), n
    other = burnish.tune(copy.deepcopy(base), "nf4 + lora(rank=2)", head=False)
    with torch.no_grad(), other.disabled():
        want = other.model.eval()(**batch).logits
        with coded.disabled():
            assert torch.equal(coded.model.eval()(**batch).logits, want)


def test_factors_train_in_fp32_and_the_small_model_is_in_the_weights_precision():
    net = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 12)).bfloat16()
    tuned = burnish.tune(net, ALONE, targets="0", head=False)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    x = torch.randn(2, 10, dtype=torch.bfloat16)
    assert net(x).dtype == torch.bfloat16
    assert {p.dtype for p in tuned.recipe[0].lifecycle(tuned).parameters()} == {torch.bfloat16}
    assert net(x).dtype == torch.bfloat16


def test_a_distilled_model_comes_nearer_to_its_base():
    far = []
    for recipe in ("pela", "pela + feature_distill(weight=100.0)"):
        net, batch = tiny("vit")
        base = copy.deepcopy(net).eval()
        tuned = burnish.tune(net, recipe)
        tuned.optimizer(lr=3e-3)
        for _ in range(20):
            tuned.step(batch)
        net.eval()
        with torch.no_grad():
            states = [m(**batch, output_hidden_states=True).hidden_states[-1] for m in (net, base)]
        far.append(float(F.mse_loss(*states)))
    assert far[1] < 0.3 * far[0]


@pytest.mark.parametrize("settings, why", [
    ("compression=1.0", "compression=1.0: expected above 1, or nothing gets smaller"),
    ("slack=0.1", "slack does nothing beside weight=0"),
    ("weight=-1.0", "weight and slack are at least 0"),
    ("weight=1.0, slack=-0.1", "at least 0, .* got 1.0 and -0.1")])
def test_settings_are_checked(settings, why):
    with pytest.raises(RecipeError, match=why):
        parse(f"pela({settings})")


def test_the_defaults_are_the_papers():
    m = parse("pela")[0]
    assert (m.compression, m.rest, m.weight, m.slack) == (2.0, True, 0.0, 1e-3)
    assert parse("pela(rho=1.5, kappa_p=1.0, epsilon=0.01)")[0] == \
        parse("pela(compression=1.5, weight=1.0, slack=0.01)")[0]
    parse("pela(weight=0.1, slack=0.001)"), parse("pela(weight=0.1, slack=0.0)")
