"""SHiRA: a few entries of high rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.sparse import SparseDelta
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
MASKS = ("random", "magnitude", "structured")


def test_count_on_llama_7b():
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    (method,) = parse("shira(rank=32)")
    assert sum(method.count(p) for p in match(anatomy, "q,v")) == 16_777_216


def tuned_linear(mask, rank=2, out=64, inp=48):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"shira(rank={rank}, mask={mask!r})")
    ((_, term),) = tuned.terms(SparseDelta)
    return tuned, term.double()


@pytest.mark.parametrize("mask", MASKS)
def test_exactly_k_distinct_entries_of_high_rank(mask):
    tuned, term = tuned_linear(mask)
    k = 2 * (64 + 48)
    assert sum(p.numel() for p in tuned.parameters()) == term.values.numel() == k
    assert term.index.unique().numel() == k
    nn.init.normal_(term.values)
    assert int((term.dense() != 0).sum()) == k
    assert int(torch.linalg.matrix_rank(term.dense().detach())) > 2


@pytest.mark.parametrize("mask", MASKS)
def test_values_get_the_dense_gradient_at_their_entries(mask):
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    x, g = torch.randn(5, 48, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
    (dv,) = torch.autograd.grad(tuned.model(x), term.values, g)
    torch.testing.assert_close(dv, (g.t() @ x).flatten()[term.index.long()], rtol=1e-12,
                               atol=1e-12)


def test_magnitude_takes_the_largest():
    tuned, term = tuned_linear("magnitude")
    W = tuned.model[0].weight.abs().flatten()
    rest = torch.ones_like(W, dtype=torch.bool)
    rest[term.index.long()] = False
    assert float(W[~rest].min()) >= float(W[rest].max())


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_masks_of_the_gradient_take_the_largest(mask, tmp_path):           # findings 3.9
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x, labels):
            out = self.b(torch.tanh(self.a(x)))
            return {"logits": out, "loss": nn.functional.cross_entropy(out, labels)}

    torch.manual_seed(0)
    net = Net().double()
    base = copy.deepcopy(net)
    batch = {"x": torch.randn(6, 12, dtype=torch.float64), "labels": torch.randint(0, 3, (6,))}
    W = base.a.weight
    (g,) = torch.autograd.grad(base(**batch)["loss"], W)
    score = (g if mask == "gradient" else g * W).abs().flatten()
    recipe = f"shira(rank=2, mask={mask!r}, targets='a')"
    tuned = burnish.tune(net, recipe, head=False, calibration=[batch])
    ((_, term),) = tuned.terms(SparseDelta)
    assert set(term.index.tolist()) == set(score.topk(2 * (12 + 16)).indices.tolist())
    nn.init.normal_(term.values)
    want = tuned.model(**batch)["logits"]
    tuned.save(tmp_path / "a")
    again = burnish.load(base, tmp_path / "a")               # the index is in the file: no data
    assert torch.equal(again.model(**batch)["logits"], want)


def test_a_mask_of_the_gradient_needs_batches():
    with pytest.raises(ConfigError, match="calibration"):
        burnish.tune(nn.Sequential(nn.Linear(12, 16)), "shira(rank=2, mask='snip')", head=False)


def test_a_structured_mask_is_the_diagonal_and_whole_rows_and_columns():
    _, term = tuned_linear("structured", rank=4)
    mask = torch.zeros(64, 48, dtype=torch.bool)
    mask.view(-1)[term.index.long()] = True
    assert mask.diagonal().all()
    assert int(mask.all(1).sum()) >= 2 and int(mask.all(0).sum()) >= 2


@pytest.mark.parametrize("mask", MASKS)
def test_merged_and_back_to_the_bit(mask):
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    before = tuned.model[0].weight.clone()
    x = torch.randn(5, 48, dtype=torch.float64)
    want = tuned.model(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-13, atol=1e-13)
    assert int((tuned.model[0].weight != before).sum()) == term.values.numel()
    tuned.unmerge()
    assert torch.equal(tuned.model[0].weight, before)
    assert torch.equal(tuned.model(x), want)


def test_places_and_seeds_draw_their_own_masks():
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    index = [t.index for _, t in burnish.tune(model, "shira(rank=2)").terms(SparseDelta)]
    other = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    again = [t.index for _, t in burnish.tune(other, "shira(rank=2)").terms(SparseDelta)]
    third = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    moved = [t.index for _, t in burnish.tune(third, "shira(rank=2, seed=1)").terms(SparseDelta)]
    assert not torch.equal(index[0], index[1])
    assert torch.equal(index[0], again[0])
    assert not torch.equal(index[0], moved[0])


@pytest.mark.parametrize("mask", MASKS)
def test_a_folder_brings_back_the_same_function(mask, tmp_path):
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    x = torch.randn(3, 48, dtype=torch.float64)
    want = tuned.model(x)
    tuned.save(tmp_path / "a")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 64)).double()
    again = burnish.load(base, tmp_path / "a")
    torch.testing.assert_close(again.model(x), want, rtol=1e-6, atol=1e-6)


def test_more_entries_than_the_matrix_has():
    with pytest.raises(RecipeError, match="largest rank there is 27"):
        burnish.tune(nn.Sequential(nn.Linear(48, 64)), "shira(rank=28)")


@pytest.mark.parametrize("mask", MASKS)
def test_the_equation_written_out(mask):                                   # findings 6
    """y = x (W + scatter(v))^T + b, outputs and gradients of v and x in float64."""
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 64, dtype=torch.float64)
    layer, v = tuned.model[0], term.values
    S = torch.zeros(64 * 48, dtype=torch.float64).scatter(0, term.index.long(), v).view(64, 48)
    y = x @ (layer.weight + S).t() + layer.bias
    got = tuned.model(x)
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, (v, x), g), torch.autograd.grad(y, (v, x), g),
                    strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)
