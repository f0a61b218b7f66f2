"""GPS: the inputs of each neuron that the loss pulls at most."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.contrast import features, supervised_contrast
from burnish.blocks.weight.sparse import SparseDelta
from burnish.core.anatomy import Anatomy
from burnish.core.errors import DataError, RankError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing import follows, tiny
from burnish.testing.checks.cost import keeps_what_it_says

VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "image_size": 224, "patch_size": 16}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x, labels=None):
        out = self.b(torch.tanh(self.a(x)))
        return {"logits": out, "loss": F.cross_entropy(out, labels)}


def batches(n=3, size=8):
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(size, 12, generator=g, dtype=torch.float64),
             "labels": torch.randint(0, 3, (size,), generator=g)} for _ in range(n)]


def made(settings="entries=2", data=None):
    torch.manual_seed(0)
    net = Net().double()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"gps({settings})", head=False, targets="a",
                         calibration=data or batches())
    ((_, term),) = tuned.terms(SparseDelta)
    return tuned, term.double(), base


def top_of_rows(g, k):
    return {(i, int(j)) for i, row in enumerate(g) for j in row.abs().argsort(descending=True)[:k]}


def chosen(term, inp=12):
    return {divmod(i, inp) for i in term.index.tolist()}


def test_count_on_vit_b_16():
    anatomy = Anatomy.of(tiny("vit", meta=True, **VIT_B)[0])
    (method,) = parse("gps")
    assert sum(method.count(p) for p in match(anatomy, None)) == 82_944


@pytest.mark.parametrize("k", [1, 3, 12])
def test_each_row_has_its_k_largest_gradients_of_the_mean_loss(k):
    _, term, base = made(f"entries={k}")
    g = sum(torch.autograd.grad(base(**b)["loss"], base.a.weight)[0] for b in batches())
    assert chosen(term) == top_of_rows(g, k) and term.values.numel() == 16 * k


def test_each_filter_of_a_convolution_has_its_k():
    """Of all its channels and places of the kernel together."""
    net, batch = tiny("cnn", dtype=torch.float64)
    base = copy.deepcopy(net.eval())
    tuned = burnish.tune(net, "gps(entries=3, targets='conv')", head=False, calibration=[batch])
    found = dict(tuned.terms(SparseDelta))
    assert found
    names = list(found)
    grads = torch.autograd.grad(base(**batch).loss, [base.get_parameter(n) for n in names])
    for n, g in zip(names, grads, strict=True):
        g, mine = g.flatten(1), chosen(found[n], g[0].numel())
        assert base.get_parameter(n).dim() == 4 and len(mine) == 3 * len(g)
        alive = {i for i, row in enumerate(g) if row.any()}     # a filter that ReLU holds at zero
        assert len(alive) > 4
        assert {e for e in mine if e[0] in alive} == {e for e in top_of_rows(g, 3) if e[0] in alive}


def test_only_so_many_samples_are_read():
    _, term, base = made("entries=2, samples=3")
    first = {k: v[:3] for k, v in batches()[0].items()}
    (g,) = torch.autograd.grad(base(**first)["loss"], base.a.weight)
    assert chosen(term) == top_of_rows(g, 2)


def test_outputs_and_gradients_are_those_of_the_equation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10)).double()
    W, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    labelled = [{"input": torch.randn(4, 12).double()}]

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, input):
            return {"loss": self.net(input).square().mean()}

    whole = burnish.tune(Own(), "gps(entries=3)", head=False, calibration=labelled, targets="0")
    ((_, term),) = whole.terms(SparseDelta)
    term.double()
    nn.init.normal_(term.values)
    at = tuple(torch.tensor(v) for v in zip(*sorted(chosen(term)), strict=True))

    class Just:
        model = net
        parameters = staticmethod(whole.parameters)

    follows(Just, lambda x, v: F.linear(x, W.index_put(at, v, accumulate=True), bias),
            [term.values], (5, 3, 12), merged=False)


def test_what_is_not_chosen_stays_to_the_bit():
    tuned, term, base = made("entries=2")
    opt = tuned.optimizer(lr=1e-2, weight_decay=0.1)
    for b in batches():
        tuned.step(b)
    moments = sum(t.numel() for s in opt.state.values() for t in s.values() if t.dim())
    assert moments == 2 * 2 * 16, "of the entries alone"
    tuned.merge()
    moved = (tuned.model.a.weight != base.a.weight).nonzero().tolist()
    assert {tuple(m) for m in moved} == chosen(term)


# -- the contrastive loss -------------------------------------------------------------------------
def contrast(z, labels, T):
    """Written out, sample by sample."""
    z = z / z.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        alike = [j for j in others if labels[j] == labels[i]]
        if alike:
            low = torch.log(sum(torch.exp(z[i] @ z[a] / T) for a in others))
            terms.append(-sum(z[i] @ z[p] / T - low for p in alike) / len(alike))
    return sum(terms) / len(terms)


def test_the_contrastive_loss_is_the_sum_written_out():
    torch.manual_seed(0)
    z = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 2, 0, 1, 3, 2, 0])
    got, want = supervised_contrast(z, labels, 0.3), contrast(z, labels, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in [(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0])]:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert supervised_contrast(z.bfloat16(), labels, 0.3).dtype == torch.float32
    with pytest.raises(DataError, match="a batch of 3 has none"):
        supervised_contrast(z[:3], torch.tensor([0, 1, 2]), 0.3)


@pytest.mark.parametrize("T", [0.07, 0.5])
def test_gradients_of_the_contrast_need_no_head(T):
    net, batch = tiny("vit", batch=6, dtype=torch.float64)
    net.eval()
    labels = batch["labels"] = torch.tensor([0, 1, 0, 1, 2, 2])
    base = copy.deepcopy(net)
    with torch.no_grad():
        net.classifier.weight.mul_(100)                    # the head has no say
    extra = "" if T == 0.07 else f", temperature={T}"
    tuned = burnish.tune(net, f"gps(entries=2, contrast=True{extra})", targets="fc1@0",
                         calibration=[batch])
    ((name, term),) = tuned.terms(SparseDelta)
    W = base.get_parameter(name)
    z = base.vit(batch["pixel_values"]).last_hidden_state[:, 0]
    (g,) = torch.autograd.grad(contrast(z, labels, T), W)
    assert chosen(term, 32) == top_of_rows(g, 2)


def test_a_contrast_wants_a_head_that_classifies_whole_samples():
    net, batch = tiny("llama")
    with pytest.raises(RecipeError, match="none; contrast=False"):
        burnish.tune(net, "gps(contrast=True)", calibration=[batch])
    net, batch = tiny("vit")
    with pytest.raises(RecipeError, match="each whole sample; contrast=False"):
        features(net, batch, lambda b: net.classifier(torch.randn(2, 3, 32)))


def test_a_folder_brings_the_entries_and_needs_no_data(tmp_path):
    tuned, term, base = made("entries=3")
    nn.init.normal_(term.values)
    tuned.save(tmp_path / "a")
    again = burnish.load(base, tmp_path / "a")
    ((_, other),) = again.terms(SparseDelta)
    assert torch.equal(other.index, term.index) and torch.equal(other.values, term.values.float())


def test_refusals_defaults_and_cost():
    net, batch = tiny("llama")
    with pytest.raises(RankError, match="33 entries do not fit a row of .* which has 32"):
        burnish.tune(net, "gps(entries=33)", targets="q", calibration=[batch])
    burnish.tune(net, "gps(entries=32)", targets="q", calibration=[batch])
    for text, why in (("entries=0", "at least 1"), ("samples=0", "at least 1"),
                      ("temperature=0.2", "does nothing beside contrast=False"),
                      ("contrast=True, temperature=0.0", "is positive")):
        with pytest.raises(RecipeError, match=why):
            parse(f"gps({text})")
    parse("gps(entries=1, samples=1)")
    assert parse("gps")[0].settings() == {"targets": None, "entries": 1, "contrast": False,
                                          "temperature": 0.07, "samples": None}
    assert keeps_what_it_says("gps", "vit") is None
    assert parse("gps")[0].per_token(Place("a", "weight", "linear", 9, 7)) == 0
