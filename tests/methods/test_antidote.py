"""Antidote: against scores and masks entry by entry, and what the pruned columns do not touch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose.above import threshold
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.antidote import Antidote
from burnish.testing.models import tiny


def dense_mask(score, ratio, ranking):
    """Which entries go, by lists."""
    rows = [[float(s) for s in row] for row in score]
    if ranking == "global":
        flat = sorted((s for row in rows for s in row), reverse=True)
        k = int(ratio * len(flat))
        cut = flat[k] if k < len(flat) else -1
        return torch.tensor([[s > cut for s in row] for row in rows])
    out = []
    for row in rows:
        k = len(row) - math.floor(len(row) * (1 - ratio) + 1e-9)
        cut = sorted(row, reverse=True)[k - 1]
        out.append([s >= cut for s in row])
    return torch.tensor(out)


def batches(n=3, width=6, pad=False):
    g = torch.Generator().manual_seed(1)
    out = []
    for i in range(n):
        ids = torch.randint(5, 60, (2, width), generator=g)
        mask = torch.ones_like(ids)
        if pad:
            mask[0, : i + 1] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


def inputs(model, path, data):
    """Tokens (N, in) that a module reads, padding left out."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for b in data:
            model.eval()(**b)
    hook.remove()
    return torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, data, strict=True)])


@pytest.mark.parametrize("ranking", ["row", "global"])
@pytest.mark.parametrize("pad", [False, True])
def test_whole_weights_are_masked_as_the_equation_says(ranking, pad):
    model, _ = tiny("llama", dtype=torch.float64)
    data, before = batches(pad=pad), copy.deepcopy(model.state_dict())
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"]
    scores = {n: before[f"{n}.weight"].abs() * inputs(model, n, data).square().mean(0).sqrt()
              for n in names}
    model.train()
    told = Antidote(ratio=0.3, ranking=ranking).lifecycle(model, data)
    if ranking == "row":
        want = {n: dense_mask(s, 0.3, "row") for n, s in scores.items()}
    else:
        whole = dense_mask(torch.cat([s.reshape(1, -1) for s in scores.values()], 1), 0.3, "global")
        want = dict(zip(scores, [m.view_as(s) for m, s in zip(
            whole[0].split([s.numel() for s in scores.values()]), scores.values(), strict=True)],
            strict=True))
    after = model.state_dict()
    for n in names:
        assert torch.equal(after[f"{n}.weight"], before[f"{n}.weight"] * ~want[n])
        assert told[f"{n}.weight"] == pytest.approx(float(want[n].double().mean()))
    assert all(torch.equal(v, before[k]) for k, v in after.items()
               if k.removesuffix(".weight") not in names)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("rank, dropped", [(8, 1), (4, 1), (16, 2), (10, 1)])
def test_the_share_that_goes_is_the_formula_s(rank, dropped):
    tuned, data = factored(rank)
    told = Antidote().lifecycle(tuned, data)
    width = 32
    for name, share in told.items():
        n, gone = (rank, dropped) if name.endswith(".B") else (width, 4)   # 32 - floor(28.8)
        assert share == pytest.approx(gone / n)
    for _, t in tuned.terms(object):
        assert int((t.A == 0).sum()) == 4 * t.A.shape[0]
        assert int((t.B == 0).sum()) == dropped * t.B.shape[0]


def factored(rank=4, recipe="lora(rank={}, dropout=0.2)"):
    model, _ = tiny("llama", dtype=torch.float64)
    tuned = burnish.tune(model, recipe.format(rank), targets="q,v", head=False)
    torch.manual_seed(0)
    for p in tuned.parameters():
        p.data = torch.randn_like(p, dtype=torch.float64) * 0.3
    return tuned, batches(pad=True)


def test_factors_are_masked_with_nothing_masked_before_them():
    tuned, data = factored()
    terms = dict(tuned.terms(object))
    before = {n: (t.A.detach().clone(), t.B.detach().clone()) for n, t in terms.items()}
    want = {}
    for n, (A, B) in before.items():
        x = inputs(tuned.model, n.removesuffix(".weight"), data)
        want[n] = (A * ~dense_mask(A.abs() * x.square().mean(0).sqrt(), 0.3, "row"),
                   B * ~dense_mask(B.abs() * (x @ A.t()).square().mean(0).sqrt(), 0.3, "row"))
    Antidote(ratio=0.3).lifecycle(tuned, data)
    for n, t in terms.items():
        assert torch.equal(t.A, want[n][0]) and torch.equal(t.B, want[n][1])
    merged = tuned.merge()                                # and merging comes after
    assert merged is not None


def test_inputs_at_right_angles_to_what_went_are_answered_as_before():
    """Harmful data speak through some inputs alone; what reads others does not change."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.first(x).tanh())

    model = Net()
    harmful = torch.zeros(16, 8)
    harmful[:, :3] = torch.randn(16, 3)
    harmless = torch.zeros(16, 8)
    harmless[:, 3:] = torch.randn(16, 5)
    with torch.no_grad():
        before, bad = model(harmless), model(harmful)
    told = Antidote(ratio=0.375, targets="first").lifecycle(model, [{"x": harmful}])
    assert told == {"first.weight": 0.375} and not model.first.weight[:, :3].any()
    with torch.no_grad():
        assert torch.equal(model(harmless), before)
        assert float((model(harmful) - bad).abs().max()) > 0.1


def test_without_data_sizes_are_ranked():
    model, _ = tiny("gpt2")                              # whose weights stand the other way round
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    Antidote(ratio=0.25, targets="q").lifecycle(model, None)
    q = before[:, :32].t()
    want = before.clone()
    want[:, :32] = (q * ~dense_mask(q.abs(), 0.25, "row")).t()
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, want)


def test_one_threshold_over_parts():
    g = torch.Generator().manual_seed(0)
    parts = [torch.rand(3, 50, generator=g), torch.rand(7, generator=g), torch.rand(0)]
    whole = torch.cat([p.flatten() for p in parts])
    for k in (0, 1, 40, 156):
        assert int((whole > threshold(lambda: iter(parts), k)).sum()) == k
    assert threshold(lambda: iter(parts), 157) == -1 == threshold(lambda: iter(parts), 900)
    assert int((torch.ones(5) > threshold(lambda: iter([torch.ones(5)]), 2)).sum()) == 0


def test_its_settings():
    made = parse("antidote")[0]
    assert (made.ratio, made.ranking) == (0.1, "row") and parse("antidote(dense_ratio=0.2)")
    assert parse("antidote(ratio=1.0)")[0].ratio == 1.0


def test_what_cannot_act_is_refused():
    for settings in ({"ratio": 0.0}, {"ratio": 1.2}):
        with pytest.raises(ConfigError, match="share above 0"):
            Antidote(**settings)
    with pytest.raises(ConfigError, match="expected row or global"):
        Antidote(ranking="layer")
    tuned, data = factored()
    with pytest.raises(ConfigError, match="targets are of whole weights"):
        Antidote(targets="q").lifecycle(tuned, data)
    with pytest.raises(ConfigError, match="read nothing in these batches"):
        Antidote().lifecycle(tuned, [])
    model, _ = tiny("cnn")
    with pytest.raises(ConfigError, match="of another kind"):
        Antidote(targets="features.0").lifecycle(model, None)
    with pytest.raises(ConfigError, match="which of these are padding"):
        net, _ = tiny("t5")
        b = batches(pad=True)[0]
        Antidote().lifecycle(net, [{**b, "decoder_input_ids": b["input_ids"][:, :3]}])
    with pytest.raises(ConfigError, match="which of these are padding"):
        Antidote().lifecycle(net, [{**b, "decoder_input_ids": b["input_ids"]}])
    other, data = factored(recipe="lokr")
    with pytest.raises(ConfigError, match="merge it first"):
        Antidote(targets="q").lifecycle(other, data)
    with pytest.raises(ConfigError, match="o_proj.weight is the base's own"):
        Antidote(targets="o").lifecycle(other, data)
    other, data = factored(recipe="dora(rank={})")
    assert len(Antidote().lifecycle(other, data)) == 8      # its factors, not its lengths


@pytest.mark.parametrize("recipe", ["lokr(targets='o')", "ia3(targets='mlp')", "full(targets='o')"])
def test_weights_that_a_run_does_not_hold_stay(recipe):
    model, _ = tiny("llama")
    tuned, before = burnish.tune(model, recipe, head=False), copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="q_proj.weight is the base's own, which no adapter"):
        Antidote().lifecycle(tuned, batches())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_weights_that_a_recipe_trains_as_a_whole_are_masked():
    model, _ = tiny("llama")
    tuned, data = burnish.tune(model, "full(targets='q')", head=False), batches()
    before = {n: t.clone() for n, t in tuned.tensors().items()}
    x = inputs(model, "model.layers.0.self_attn.q_proj", data)
    assert len(Antidote(ratio=0.25, targets="q").lifecycle(tuned, data)) == 2
    name = "model.layers.0.self_attn.q_proj.weight"
    W = before[name]
    want = W * ~dense_mask(W.abs() * x.square().mean(0).sqrt(), 0.25, "row")
    assert torch.equal(tuned.tensors()[name], want)


@pytest.mark.parametrize("ratio, of_row, of_all", [(0.29, 3, 29), (0.3, 3, 30), (0.01, 1, 1),
                                                   (0.001, 1, 0), (1e-12, 1, 0), (1, 10, 100)])
def test_a_share_is_counted_as_it_is_written(ratio, of_row, of_all):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 10))
    Antidote(ratio=ratio, targets="0").lifecycle(net, None)
    assert (net[0].weight == 0).sum(1).tolist() == [of_row] * 10
    net = nn.Sequential(nn.Linear(10, 10))
    one = Antidote(ratio=ratio, ranking="global", targets="0")
    if of_all:
        one.lifecycle(net, None)
        assert int((net[0].weight == 0).sum()) == of_all
        return
    with pytest.raises(ConfigError, match="less than one entry of these 1 matrices"):
        one.lifecycle(net, None)
    assert net[0].weight.all()


def test_updates_that_are_no_plain_product_behind_a_linear_are_named():
    tuned, data = factored(recipe="pissa(rank={})")           # a product less its start
    with pytest.raises(ConfigError, match="update that is no plain product"):
        Antidote().lifecycle(tuned, data)
    net, _ = tiny("cnn")
    with pytest.raises(ConfigError, match=r"\(conv\) has an update that is no plain product"):
        Antidote().lifecycle(burnish.tune(net, "lora(rank=2)", head=False), None)


def test_a_matrix_is_ranked_beside_other_kinds_of_update_but_not_under_one():
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "lokr(targets='q') + full(targets='v')", head=False)
    told = Antidote(ratio=0.25, targets="v").lifecycle(tuned, batches())
    assert list(told.values()) == [0.25] * 2 and all("v_proj" in n for n in told)
    with pytest.raises(ConfigError, match="stands with an update that is no product of factors"):
        Antidote(targets="q").lifecycle(tuned, batches())


def test_a_decoder_reads_what_labels_say():
    net, batch = tiny("t5")
    ids, labels = batch["input_ids"], batch["labels"][:, :4].contiguous()
    said = net._shift_right(labels)
    twin = copy.deepcopy(net)
    Antidote(ratio=0.25).lifecycle(net, [{"input_ids": ids, "labels": labels}])
    Antidote(ratio=0.25).lifecycle(twin, [{"input_ids": ids, "decoder_input_ids": said}])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ConfigError, match="bring labels or decoder_input_ids"):
        Antidote().lifecycle(net, [{"input_ids": ids}])
    with pytest.raises(ConfigError, match="a batch is a mapping"):
        Antidote().lifecycle(net, [ids])
