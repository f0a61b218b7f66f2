"""OwLore: outliers counted on data, blocks drawn by them, and a subspace inside those that live."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.live import Draw
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny


def llama(**kw):
    return tiny("llama", num_hidden_layers=4, **kw)


def joined(settings, batches=None, model=None, recipe=""):
    net, batch = llama() if model is None else model
    settings += "" if "rank" in settings else ", rank=4"
    settings += "" if "layers" in settings else ", layers=2"
    tuned = burnish.tune(net, f"owlore({settings}){recipe}", head=False,
                         calibration=[batch] if batches is None else batches)
    return tuned, batch


def controller(tuned):
    return next(h for n, h in tuned.timeline.handlers if n == "owlore")


def counted(net, batches, times):
    """D of each block: all of its linears as one vector, in float64, from the inputs themselves."""
    given = {}
    hooks = [m.register_forward_pre_hook(
        lambda m, args, n=n: given.setdefault(n, []).append(args[0].detach().double()))
        for n, m in net.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    net.eval()
    with torch.no_grad():
        for b in batches:
            net(**{k: v for k, v in b.items() if k != "labels"})
    for h in hooks:
        h.remove()
    shares = []
    for block in range(4):
        scores = []
        for n, xs in given.items():
            if f".layers.{block}." in n:
                x = torch.cat([x.flatten(0, -2) for x in xs])
                W = net.get_submodule(n).weight.detach().double()
                scores.append((W.abs() * x.norm(dim=0) / math.sqrt(len(xs[0]) * len(xs))).flatten())
        A = torch.cat(scores)
        shares.append(float((A > times * A.mean()).double().mean()))
    return shares


@pytest.mark.parametrize("times", [1.5, 3.0])
def test_shares_are_those_of_the_definition(times):
    net, batch = llama()
    batch = {k: v for k, v in batch.items() if k != "attention_mask"}
    with torch.no_grad():                            # blocks that differ
        for i, layer in enumerate(net.model.layers):
            for p in layer.parameters():
                if p.dim() > 1:
                    p[torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < 0.02 * i] \
                        *= 8
    want = counted(net, [batch], times)
    tuned, _ = joined(f"outlier={times}", [batch], (net, batch))
    (part,) = tuned.recipe
    got = part.shares(tuned)
    assert len(set(got)) > 1
    assert got == pytest.approx(want, abs=1e-12)
    tuned.optimizer(lr=1e-3)
    assert controller(tuned).schedule.policy.weights == got


def test_so_many_samples_are_read():
    net, batch = llama()
    seen = []
    net.register_forward_pre_hook(
        lambda m, args, kw: seen.append(kw["input_ids"].shape[0]), with_kwargs=True)
    joined("samples=3", [batch] * 4, (net, batch))
    whole = batch["input_ids"].shape[0]
    reads = seen[1:]                                 # the first tells who shares an input
    assert sum(reads) == 3 and max(seen) <= whole


@pytest.mark.parametrize("weights", [[0.5, 0.2, 0.2, 0.1], [1.0, 1.0, 1.0, 1.0], [3.0, 0, 0, 1.0]])
def test_blocks_come_as_sequential_weighted_sampling_has_them(weights):
    """Inclusion of block i in a draw of two: p_i + sum over j of p_j p_i / (1 - p_j)."""
    n, names = 3000, list("abcd")
    draw = Draw(names, 2, 1, seed=5, weights=weights)
    visits = Counter(b for k in range(n) for b in draw.period(k))
    p = [(w + 1e-8) / (sum(weights) + 4e-8) for w in weights]
    for i, name in enumerate(names):
        want = p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i)
        assert abs(visits[name] / n - want) < 4 * math.sqrt(want * (1 - want) / n) + 1e-6
    if len(set(weights)) == 1:                       # as lisa draws: gamma / L
        assert all(abs(visits[x] / n - 0.5) < 0.04 for x in names)


def test_live_blocks_have_state_in_the_subspace_and_the_rest_none():
    r = 4
    tuned, batch = joined(f"layers=2, every=3, rank={r}, outlier=2.0")
    opt = tuned.optimizer(lr=1e-3)
    blocks = {b.path for b in tuned.anatomy.blocks}
    lived = set()
    for _step in range(9):
        before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
        was = controller(tuned).schedule.live
        tuned.step(batch)
        live = controller(tuned).schedule.live       # a draw follows the update before it
        was = live if was is None else was
        lived |= live
        assert len(live) == 2 and live < blocks
        for name, p in tuned.model.named_parameters():
            held = sum(t.numel() for t in opt.state.get(p, {}).values()
                       if isinstance(t, torch.Tensor) and t.dim())
            inside = next((b for b in blocks if name.startswith(f"{b}.")), None)
            if inside not in was | live | {None}:
                assert torch.equal(p, before[name]), name
            if inside is None or inside in was & live:
                a, c = min(p.shape), max(p.shape)
                projected = inside is not None and p.dim() == 2 and a > r
                assert held == (a * r + 2 * c * r if projected else 2 * p.numel()), name
                assert not torch.equal(p, before[name]), name
            elif inside not in live:
                assert held == 0 and p.grad is None, name
    assert len(lived) > 2


def test_it_is_lisa_with_galore_where_the_blocks_are_the_same():
    """With all blocks live: the same weights, bit for bit."""
    one, batch = joined("layers=4, rank=4, refresh=2, scale=0.5")
    two = burnish.tune(llama()[0], "lisa(layers=4) + galore(rank=4, every=2, scale=0.5)",
                       head=False)
    for tuned in (one, two):
        tuned.optimizer(lr=1e-2)
        for _ in range(4):
            tuned.step(batch)
    theirs = dict(two.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in one.model.named_parameters())


def test_a_block_that_comes_back_has_a_new_basis():
    tuned, batch = joined("layers=1, every=1, rank=4, outlier=2.0, state_on_leave='keep'")
    opt = tuned.optimizer(lr=1e-3)
    for _ in range(8):
        tuned.step(batch)
        live, = controller(tuned).schedule.live
        for name, p in tuned.model.named_parameters():
            if ".layers." in name and not name.startswith(f"{live}."):
                assert not any(k.startswith("projector.") for k in opt.state.get(p, {})), name


def test_a_file_knows_what_was_counted(tmp_path):
    tuned, batch = joined("outlier=2.0, layers=2")
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    again = burnish.load(llama()[0], tmp_path / "a")
    assert tuned.recipe[0].shares(tuned) == again.recipe[0].shares(again)
    assert sum(again.recipe[0].shares(again)) > 0


def test_it_reads_data_first():
    with pytest.raises(ConfigError, match="owlore reads data before it starts"):
        burnish.tune(llama()[0], "owlore(layers=2)", head=False)


def test_without_values_blocks_are_drawn_alike():
    report = burnish.simulate(llama()[0], "owlore(layers=2, rank=4)", llama()[1])
    assert report.peak_bytes > 0


def test_a_block_of_which_nothing_was_counted_has_no_share():
    tuned, _ = joined("outlier=1e9")
    (part,) = tuned.recipe
    assert part.shares(tuned) == [0.0] * 4
    settled = next(iter(tuned.adapters[tuned.training].settled.values()))
    for name in [n for n in settled if ".layers.2." in n]:
        del settled[name]
    assert part.shares(tuned) == [0.0] * 4


def test_what_stands_outside_the_blocks_is_not_counted():
    tuned, _ = joined("outlier=2.0, layers=1", model=tiny("bert"))
    assert "bert.pooler.dense.weight" in {p.name for p in tuned.anatomy.places if p.block is None}
    (settled,) = tuned.adapters[tuned.training].settled.values()
    assert settled and all(".layer." in name for name in settled)


def test_the_loss_falls():
    tuned, batch = joined("layers=2, every=5, rank=4, outlier=2.0")
    tuned.optimizer(lr=3e-3)
    losses = [float(tuned.step(batch)) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_what_cannot_act_is_refused():
    for setting, wanted in ("outlier=0.0", "more than 0"), ("samples=0", "1 or more"):
        with pytest.raises(RecipeError, match=f"{setting}.: expected {wanted}"):
            parse(f"owlore({setting})")
    with pytest.raises(RecipeError, match="owlore: layers=9, but this model has 4 repeated"):
        joined("layers=9")
    with pytest.raises(RecipeError, match="subspace of the gradient"):
        parse("owlore + galore")
    with pytest.raises(RecipeError, match="owlore and adafactor cannot be joined: adafactor looks"):
        joined("layers=2", recipe="+ adafactor")[0].optimizer(lr=1e-3)


def test_its_settings_are_the_authors():
    (made,) = parse("owlore")
    want = {"layers": 5, "every": 50, "outlier": 13.0, "samples": 128, "rank": 256, "refresh": 100,
            "scale": 1.0, "seed": 0, "state_on_leave": "drop"}
    assert {k: getattr(made, k) for k in want} == want
