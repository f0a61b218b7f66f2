"""MLD: rows of another domain are those that a student follows its teacher badly on."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError
from burnish.methods.lifecycle.mld import auroc
from burnish.testing import stir, tiny


def states(net, batch):
    seen, hooks = [], []
    for block in Anatomy.of(net).blocks:
        hooks.append(net.get_submodule(block.path).register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)))
    net(**batch)
    for h in hooks:
        h.remove()
    return seen


@pytest.mark.parametrize("model", ["bert", "vit"])
def test_levels_are_their_equation(model):
    net, batch = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net).eval()
    if model == "bert":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 5:] = 0
    tuned = burnish.tune(net, "lora(rank=2)", head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    (method,) = burnish.parse("mld")
    assert method.lifecycle(tuned, [batch]).abs().max() < 1e-25, "the base follows itself"
    stir(tuned, size=0.3)
    net.train()
    got = method.lifecycle(tuned, [batch, batch])
    assert net.training and len(got) == 4 and torch.equal(got[:2], got[2:])
    net.eval()
    with torch.no_grad():
        mine, theirs = states(net, batch), states(base, batch)
    for row in range(2):
        total = 0.0
        for f, t in zip(mine, theirs, strict=True):
            keep = slice(None) if model == "vit" or row else slice(0, 5)
            f, t = f[row, keep], t[row, keep]
            total += float((f - t).square().sum() / t.square().sum())
        assert float(got[row]) == pytest.approx(total / len(mine), rel=1e-9)


def test_perplexity_is_its_equation():
    net, batch = tiny("gpt2", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2)", head=False)
    net.eval()
    given = {"input_ids": batch["input_ids"],
             "attention_mask": torch.ones_like(batch["input_ids"])}
    given["attention_mask"][1, 6:] = 0
    (got,) = [burnish.parse("mld(told_by='perplexity')")[0].lifecycle(tuned, [given])]
    with torch.no_grad():
        p = net(**given).logits.log_softmax(-1)
    for row, last in ((0, given["input_ids"].shape[1]), (1, 6)):
        each = [-float(p[row, t, given["input_ids"][row, t + 1]]) for t in range(last - 1)]
        assert float(got[row]) == pytest.approx(
            float(torch.tensor(each).double().mean().exp()), rel=1e-6)


def test_rows_of_few_tokens_or_none_have_a_figure():
    net, batch = tiny("gpt2", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2)", head=False)
    stir(tuned, size=0.3)
    ids = batch["input_ids"][:1].expand(3, -1)
    mask = torch.zeros_like(ids)
    mask[1, :1], mask[2, :2] = 1, 1
    given = {"input_ids": ids, "attention_mask": mask}
    got = burnish.parse("mld(told_by='perplexity')")[0].lifecycle(tuned, [given])
    with torch.no_grad():
        said = net.eval()(**given).logits[2, 0].log_softmax(-1)[ids[2, 1]]
    assert got[:2].tolist() == [1.0, 1.0]                # nothing comes next
    (method,) = burnish.parse("mld(told_by='perplexity')")
    assert torch.equal(method.lifecycle(tuned, [{"input_ids": ids}]), method.lifecycle(
        tuned, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]))
    assert float(got[2]) == pytest.approx(float((-said).exp()), rel=1e-6)
    late = mask.clone()
    late[0, -3:] = 1                                     # padded on the left: what follows the pad
    with torch.no_grad():                                # is not foretold
        said = net.eval()(input_ids=ids, attention_mask=late).logits[0].log_softmax(-1)
    T = ids.shape[1]
    want = -sum(float(said[t, ids[0, t + 1]]) for t in (T - 3, T - 2)) / 2
    got = method.lifecycle(tuned, [{"input_ids": ids, "attention_mask": late}])
    assert float(got[0].log()) == pytest.approx(want, rel=1e-6)
    off = burnish.parse("mld")[0].lifecycle(tuned, [given])
    assert float(off[0]) == 0 and bool((off[1:] > 0).all())


def test_batches_that_are_no_mapping_and_what_is_left_on_the_model():
    net, batch = tiny("timm_qkv", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2)", head=False)
    stir(tuned, size=0.3)
    hooks = [len(m._forward_hooks) for m in net.modules()]
    (method,) = burnish.parse("mld")
    x = batch["x"]
    assert torch.equal(method.lifecycle(tuned, [x]), method.lifecycle(tuned, [{"x": x}]))
    assert [len(m._forward_hooks) for m in net.modules()] == hooks


def test_auroc_counts_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(6, (n,), generator=g).double() + k for n, k in ((40, 0), (30, 1)))
    want = sum(float(y > x) + 0.5 * float(x == y) for x in a for y in b) / (40 * 30)
    assert auroc(a, b) == pytest.approx(want) and 0.5 < want < 1
    assert auroc(a, a) == pytest.approx(0.5) and auroc(a, a + 10) == 1.0
    for one, two in ((a, b[:0]), (a[:0], b), (a * float("nan"), b)):
        with pytest.raises(ConfigError, match="expected some of each, all numbers"):
            auroc(one, two)


def test_a_student_of_one_domain_gives_another_away():
    """Texts of one half of the vocabulary teach it; texts of the other half are outside."""
    net, batch = tiny("bert")
    words = net.config.vocab_size
    g = torch.Generator().manual_seed(0)
    inside, held = (torch.randint(2, words // 2, (32, 8), generator=g) for _ in range(2))
    outside = torch.randint(words // 2, words, (32, 8), generator=g)
    tuned = burnish.tune(net, "pela(compression=4.0, rest=False) + feature_distill", head=False)
    tuned.optimizer(lr=1e-2)
    for _ in range(40):
        tuned.step({"input_ids": inside}, loss=lambda out, b: 0 * out.logits.sum())
    (method,) = burnish.parse("mld")
    scores = [method.lifecycle(tuned, [{"input_ids": x}]) for x in (held, outside)]
    assert auroc(*scores) > 0.7


def test_refusals():
    tuned = burnish.tune(tiny("bert")[0], "lora(rank=2)", head=False)
    with pytest.raises(ConfigError, match="does not write on; expected 'levels'"):
        burnish.parse("mld(told_by='perplexity')")[0].lifecycle(tuned, [])
    (method,) = burnish.parse("mld")
    assert method.settings() == {"targets": None, "told_by": "levels"}
    with pytest.raises(ConfigError, match="no batch to score"):
        method.lifecycle(tuned, [])
    bare = burnish.tune(torch.nn.Sequential(torch.nn.Linear(4, 4)), "full", head=False)
    with pytest.raises(ConfigError, match="states after each block, and this model has none"):
        method.lifecycle(bare, [])
    with pytest.raises(ConfigError):
        burnish.parse("mld(targets='0')")
