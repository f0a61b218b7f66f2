"""Norm tuning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import RecipeError
from burnish.testing.models import tiny

BERT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12}


@pytest.mark.parametrize("name, expected", [
    ("llama", (2 * 2 + 1) * 32),                    # two scales a block and the last
    ("vit", (2 * 2 + 1) * 2 * 32), ("bert", (2 * 2 + 1) * 2 * 32),
    ("cnn", 2 * (16 + 32)), ("encoder", (2 * 2 + 1) * 2 * 32),
])
def test_it_trains_scales_and_shifts_of_every_norm(name, expected):
    model, batch = tiny(name)
    tuned = burnish.tune(model, "norms", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == expected
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    trained = {n for n, _ in tuned.named_parameters()}
    for n, p in model.named_parameters():
        assert n in trained or torch.equal(before[n], p), n
    assert {type(model.get_submodule(n.rpartition(".")[0])).__name__ for n in trained} <= \
        {"LayerNorm", "LlamaRMSNorm", "BatchNorm2d"}


def test_the_start_is_the_base():
    model, batch = tiny("vit")
    model.eval()
    want = model(**batch).logits
    burnish.tune(model, "norms")
    assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("model", ["bert", "vit", "llama", "cnn", "t5"])
def test_gradients_are_stock_autograds(beside, model):                         # findings 6
    """y = gamma normalised(x) + beta: outputs and gradients of gamma and beta, nothing else."""
    one = beside(model, "norms")
    want = {f"{n}.{leaf}" for n, m in one.base.named_modules() if "norm" in type(m).__name__.lower()
            for leaf in ("weight", "bias") if getattr(m, leaf, None) is not None}
    assert {path for path, _ in one.theta} == want
    one.agree()


@pytest.mark.parametrize("model", ["vit", "llama"])
def test_updates_are_those_of_plain_adam(beside, model):
    """Five updates with a decay that norms do not take and a falling rate, against torch."""
    one = beside(model, "norms")
    opt = one.tuned.optimizer(lr=1e-2, weight_decay=0.5)
    stock = torch.optim.Adam(list(one.theta.values()), 1e-2)
    for t in range(5):
        for o in (opt, stock):
            for g in o.param_groups:
                g["lr"] = 1e-2 / (1 + t)
        one.score(one.tuned.model(**one.batch).logits).backward()
        one.score(one.base(**one.batch).logits).backward()
        for o in (opt, stock):
            o.step()
            o.zero_grad()
    for k, p in one.own.items():
        torch.testing.assert_close(p, one.theta[k], rtol=1e-9, atol=1e-11, msg=str(k))


def test_norms_do_not_decay():
    tuned = burnish.tune(tiny("llama")[0], "norms")
    opt = tuned.optimizer(weight_decay=0.1)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0]


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Linear(4, 4)),
    nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)),
], ids=["none", "without scale"])
def test_a_model_without_affine_norms_is_refused(model):
    with pytest.raises(RecipeError, match="no norm with trainable"):
        burnish.tune(model, "norms")


def test_a_norm_that_is_the_whole_model():
    tuned = burnish.tune(nn.LayerNorm(4), "norms", head=False)
    assert {n for n, _ in tuned.named_parameters()} == {"weight", "bias"}
    tuned = burnish.tune(nn.LayerNorm(4), "norms(targets='weight')", head=False)
    assert [n for n, _ in tuned.named_parameters()] == ["weight"]


def test_what_a_norm_holds_besides_its_own_tensors_stays():
    class ShiftedLayerNorm(nn.LayerNorm):
        def __init__(self, d):
            super().__init__(d)
            self.shift = nn.Linear(d, d)

        def forward(self, x):
            return super().forward(x) + self.shift(x)

    tuned = burnish.tune(nn.Sequential(nn.Linear(4, 4), ShiftedLayerNorm(4)), "norms", head=False)
    assert {n for n, _ in tuned.named_parameters()} == {"1.weight", "1.bias"}


def test_a_name_of_weights_and_norms_means_the_norms():
    tuned = burnish.tune(tiny("vit")[0], "norms(targets='vit.layers.0.*')", head=False)
    assert {n.partition("layers.")[2] for n, _ in tuned.named_parameters()} == {
        f"0.layernorm_{end}.{leaf}" for end in ("before", "after") for leaf in ("weight", "bias")}
