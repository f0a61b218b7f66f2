"""Missing-modality modulation: a set for every combination, the base with all of them there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.gates import Affine
from burnish.testing import stir, tiny

MISSING = torch.tensor([5, 0, 2])


def make(recipe="missing_modality(modalities=3)", model="vit", **kw):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch.pop("labels", None)
    tuned = burnish.tune(net, recipe, head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.3), batch


def sets(tuned):
    found = {}
    for n, p in tuned.named_parameters():
        found.setdefault(n.partition(".burnish.")[0], {})[n.rpartition(".")[2]] = p
    return found


@pytest.mark.parametrize("model", ["vit", "llama", "cnn"])
def test_the_equation_written_out(model):
    """h <- gamma^m h + beta^m behind every linear, convolution and norm, sample by sample; only
    the sets that a batch names get a gradient."""
    tuned, batch = make(model=model)
    mine = sets(tuned)
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def stand(path, own):
        module = base.get_submodule(path)
        first = isinstance(module, nn.Conv2d | nn.BatchNorm2d)

        def hook(m, a, h):
            out = []
            for row, k in zip(h, (4, None, 1), strict=True):   # sets 5 and 2, and none
                gain = own["gain"][k] if k is not None else torch.ones_like(own["gain"][0])
                shift = own["shift"][k] if k is not None and "shift" in own else 0 * gain
                y = row.movedim(0, -1) if first else row
                y = y * gain + shift
                out.append(y.movedim(-1, 0) if first else y)
            return torch.stack(out)
        module.register_forward_hook(hook)

    for path, own in mine.items():
        stand(path, own)
    want, got = base(**batch).logits, tuned.model(**batch, missing=MISSING).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        assert not a[[0, 2, 3, 5]].any(), n
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
    assert all(p.shape[0] == 6 for p in params)


def test_with_all_there_the_model_is_the_base_bit_by_bit():
    tuned, batch = make()
    with torch.no_grad():
        got = tuned.model(**batch, missing=torch.tensor([0, 1, 0])).logits
        with tuned.disabled():
            base = tuned.model(**batch).logits
        assert torch.equal(got[[0, 2]], base[[0, 2]]) and not torch.equal(got[1], base[1])
        assert torch.equal(tuned.model(**batch, missing=0).logits, base)


def test_a_mixed_batch_is_its_combinations_one_by_one():
    tuned, batch = make(model="swin")
    with torch.no_grad():
        whole = tuned.model(**batch, missing=MISSING).logits
        for k in range(3):
            one = {n: v[k:k + 1] for n, v in batch.items()}
            torch.testing.assert_close(tuned.model(**one, missing=int(MISSING[k])).logits[0],
                                       whole[k])


def test_the_start_is_the_function():
    net, batch = tiny("bert")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "missing_modality", head=False)
    assert torch.equal(net(**batch, missing=torch.tensor([1, 2])).logits, want)
    assert {g["weight_decay"] for g in
            tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} == {0.0}


def test_the_count_on_a_published_model(published):
    """ViT-B/16 with the sites of SSF: 205,824 for each of 2^M - 2 combinations."""
    anatomy, _ = published("ViTConfig", "ViTForImageClassification")
    whole = sum(p.numel() for n, p in anatomy.model.named_parameters() if "classifier" not in n)
    assert 205_824 < 0.01 * whole, "below a hundredth of the model"
    for modalities, combinations in ((2, 2), (3, 6)):
        (m,) = burnish.parse(f"missing_modality(modalities={modalities})")
        with torch.device("meta"):
            made = list(m.branch(anatomy))
        total = sum(p.numel() for b in made for p in b.module.parameters())
        assert total == combinations * 205_824
        assert m.count(205_824 // 2) == total and m.count(7, shift=False) == combinations * 7
        assert m.combinations == combinations + 1
    assert burnish.parse("missing_modality")[0].settings() == {"targets": None, "modalities": 2}


@pytest.mark.parametrize("model, targets", [("vit", None), ("mlp", "layers.0"),
                                            ("llama", "norm,q")])
def test_one_combination_by_itself_is_an_ssf_that_merges(model, targets, tmp_path):
    tuned, batch = make(f"missing_modality(modalities=3, targets={targets!r})", model)
    with torch.no_grad():
        want, paths = tuned.model(**batch, missing=5).logits, set(sets(tuned))
        tuned.recipe.named("missing_modality").lifecycle(tuned, 5, "one")
        assert {p for p, _ in tuned.branches(Affine)} == paths
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-6, atol=1e-7)
        tuned.unmerge()
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny(model, dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [0, 7, -1])
def test_a_combination_without_a_set_is_refused(wrong):
    tuned, batch = make()
    with pytest.raises(burnish.RecipeError, match=f"sets for 1 to 6, not {wrong}"):
        tuned.recipe.named("missing_modality").lifecycle(tuned, wrong, "no")
    if wrong:
        with pytest.raises(burnish.RecipeError, match="'missing'.*from 0 to 6, not"):
            tuned.model(**batch, missing=wrong)
    for right in (1, 6):
        tuned.use("default")
        tuned.recipe.named("missing_modality").lifecycle(tuned, right, f"one{right}")


@pytest.mark.parametrize("modalities", [0, 1, 17])
def test_so_many_modalities_are_refused(modalities):
    with pytest.raises(burnish.RecipeError, match="expected 2 to 16 modalities"):
        burnish.parse(f"missing_modality(modalities={modalities})")
    assert burnish.parse("missing_modality(modalities=16)")[0].combinations == 65_535


def test_a_model_that_puts_tokens_first_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(burnish.RecipeError, match="missing_modality tells .* tokens before"):
        burnish.tune(nn.Sequential(nn.Linear(8, 16), stack), "missing_modality")


def test_a_routed_expert_is_left_as_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])
            self.last = nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.experts[0](x))

    tuned = burnish.tune(Net(), "missing_modality", head=False)
    assert set(sets(tuned)) == {"last"}


def test_a_single_layer_is_a_model():
    net = nn.Linear(4, 3).double()
    tuned = stir(burnish.tune(net, "missing_modality", head=False), size=0.3)
    net.double()
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        want = net(x, missing=1)
        tuned.recipe.named("missing_modality").lifecycle(tuned, 1, "one")
        net.double()
        torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-7)
