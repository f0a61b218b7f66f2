"""Merged adapters of a few entries: exchanged in place, exactly, at the price of the entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks.weight.sparse import SparseDelta
from burnish.core.errors import ConfigError
from burnish.testing.models import tiny


def two(net=None, first="shira(rank=1)", second="shira(rank=1, seed=1)", targets="0,1", **kw):
    """Two adapters with values of their own on one model."""
    torch.manual_seed(0)
    if net is None:
        net = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    tuned = burnish.tune(net, first, targets=targets, head=False)
    tuned.add("other", second, targets=targets, **kw)
    for name in ("default", "other"):
        for _, term in tuned.terms(SparseDelta, name):
            nn.init.normal_(term.values)
    return tuned


def weights(tuned):
    return [p.detach().clone() for n, p in tuned.model.named_parameters() if "burnish" not in n]


def merged_by_hand(base, tuned, mix):
    """W + sum of weight x values at their entries, one rounding, place by place."""
    out = {}
    for name, share in mix.items():
        for place, term in tuned.terms(SparseDelta, name):
            W = out.get(place, base[place].double())
            W = W.flatten().scatter_add(0, term.index.long(), share * term.values.detach().double())
            out[place] = W.view(base[place].shape)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_merged_adapter_is_exchanged_for_another_and_back(dtype):       # findings 3.9
    tuned = two(nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24)).to(dtype))
    base = weights(tuned)
    tuned.merge()
    first = weights(tuned)
    tuned.use("other")
    second = weights(tuned)
    tuned.use("default")
    assert all(map(torch.equal, weights(tuned), first))
    tuned.use("other")
    assert all(map(torch.equal, weights(tuned), second))
    tuned.unmerge()
    assert all(map(torch.equal, weights(tuned), base))
    assert tuned.training == "other"
    assert {n.split(".")[2] for n, _ in tuned.named_parameters()} == {"other"}
    tuned.merge()                                    # the same as merging it in the first place
    assert all(map(torch.equal, weights(tuned), second))
    assert not any(map(torch.equal, first[::2], second[::2]))


@pytest.mark.parametrize("mix", [{"default": 1.0, "other": 1.0}, {"default": 0.7, "other": -0.3},
                                 {"other": 0.5}])
def test_mixes_stand_in_a_merged_model_too(mix):
    tuned = two()
    base = dict(tuned.model.named_parameters())
    base = {n: p.detach().clone() for n, p in base.items() if "burnish" not in n}
    want = merged_by_hand(base, tuned, mix)
    x = torch.randn(5, 24)
    tuned.use(mix)
    beside = tuned.model(x)
    tuned.use("default")
    tuned.merge()
    tuned.use(mix)
    for name, W in want.items():
        torch.testing.assert_close(tuned.model.get_parameter(name), W.float(), rtol=0, atol=1e-6,
                                   check_dtype=False)
    torch.testing.assert_close(tuned.model(x), beside, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    assert all(torch.equal(p, base[n]) for n, p in tuned.model.named_parameters() if n in base)
    assert tuned.training is None


class Fresh(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.numel())
        return out


def test_an_exchange_makes_nothing_of_the_weights_size(monkeypatch):
    tuned = two(nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)))
    entries = 256 + 512
    where = [p.data_ptr() for n, p in tuned.model.named_parameters() if "burnish" not in n]
    tuned.merge()
    from burnish.engine.originals import Originals
    monkeypatch.setattr(Originals, "put", lambda *a: pytest.fail("a weight was put aside"))
    with Fresh() as made:
        tuned.use("other")
    assert entries <= made.largest <= 3 * entries < 256 * 512 / 50
    with Fresh() as made:
        tuned.use({"default": 1.0, "other": 1.0})
        tuned.unmerge()
    assert made.largest <= 6 * entries
    assert where == [p.data_ptr() for n, p in tuned.model.named_parameters() if "burnish" not in n]


@pytest.mark.parametrize("cell", ["gpt2/q,v", "timm_qkv/q,v", "encoder/q,v", "cnn/conv",
                                  "gpt2/c_attn"])
def test_entries_of_slices_kernels_and_transposes(cell):
    model, targets = cell.split("/")
    net, batch = tiny(model)
    net.eval()
    tuned = two(net, targets=targets)
    base = {n: p.detach().clone() for n, p in net.named_parameters() if "burnish" not in n}
    tuned.use("other")
    with torch.no_grad():
        want = tuned.loss(batch)
        tuned.use("default")
        tuned.merge()
        tuned.use("other")
        changed = [n for n, p in net.named_parameters() if not torch.equal(p, base[n])]
        assert changed
        got = net(**batch).loss
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    assert all(torch.equal(p, base[n]) for n, p in net.named_parameters() if n in base)


def test_entries_of_rows_and_of_the_whole_are_written_where_they_overlap():
    net, batch = tiny("timm_qkv")
    tuned = burnish.tune(net.eval(), "shira(rank=2, targets='q,v') + "
                                     "shira(rank=2, targets='attn.qkv')", head=False)
    for _, term in tuned.terms(SparseDelta):
        nn.init.normal_(term.values)
    before = net.blocks[0].attn.qkv.weight.detach().clone()
    with torch.no_grad():
        want = tuned.loss(batch)
        tuned.merge()
        torch.testing.assert_close(net(**batch).loss, want, rtol=1e-4, atol=1e-5)
    assert not tuned.merged.made and not list(tuned.merged.written)      # nothing whole was kept
    tuned.unmerge()
    assert torch.equal(net.blocks[0].attn.qkv.weight, before)


def test_a_kernel_held_channels_last_is_merged_and_exchanged_whole_or_not():
    net = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)).to(memory_format=torch.channels_last)
    for recipe in ("lora(rank=2)", "shira(rank=1)"):
        tuned = burnish.tune(net, recipe, targets="0", head=False)
        for p in tuned.parameters():
            nn.init.normal_(p)
        x = torch.randn(2, 8, 6, 6)
        want, before = tuned.model(x).detach(), net[0].weight.detach().clone()
        torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-4, atol=1e-4)
        tuned.unmerge()
        assert torch.equal(net[0].weight, before)
        tuned.detach()


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Linear(40, 24))


@pytest.mark.parametrize(("first", "second", "why"), [
    ("lora(rank=2)", "shira(rank=1)", "merged into whole weights"),
    ("shira(rank=1)", "lora(rank=2)", "more than entries"),
    ("shira(rank=1)", "dora(rank=2)", "more than entries"),
    ("shira(rank=1) + lora(rank=2)", "shira(rank=1)", "merged into whole weights"),
    ("shira(rank=1)", "shira(rank=1) + full(targets='1')", "trains 1"),
    ("shira(rank=1) + full(targets='1')", "shira(rank=1)", "trains 1"),
])
def test_what_is_more_than_entries_is_refused_and_nothing_changes(first, second, why):
    tuned = two(first=first, second=second, targets="0")
    tuned.merge()
    stood = weights(tuned)
    with pytest.raises(ConfigError, match=why):
        tuned.use("other")
    assert all(map(torch.equal, weights(tuned), stood))
    assert tuned.state.active == (("default", 1.0),)
    tuned.unmerge()
    tuned.use("other")


def test_moved_statistics_per_sample_use_and_training_wait_for_unmerge():
    tuned = two(Normed(), targets="0,2")
    tuned.model.train()
    tuned.model(torch.randn(9, 24))
    tuned.merge()
    with pytest.raises(ConfigError, match="moved running statistics"):
        tuned.use("other")
    tuned = two()
    tuned.merge()
    for call in (lambda: tuned.use(["other", None]),
                 lambda: tuned.use({"default": 1, "other": 1}, train="other")):
        with pytest.raises(ConfigError, match=r"tuned.unmerge\(\) first"):
            call()
    with pytest.raises(ConfigError, match="no adapter 'oter'; did you mean 'other'"):
        tuned.use("oter")


def test_an_exchange_that_is_interrupted_leaves_the_first(monkeypatch):
    import burnish.engine.entries as entries

    tuned = two()
    tuned.merge()
    stood, real, calls = weights(tuned), entries.write, []

    def write(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(entries, "write", write)
    with pytest.raises(KeyboardInterrupt):
        tuned.use("other")
    monkeypatch.undo()
    assert all(map(torch.equal, weights(tuned), stood))
    assert tuned.state.active == (("default", 1.0),)
    tuned.use("other")
    tuned.use("default")
    assert all(map(torch.equal, weights(tuned), stood))


def test_an_adapter_trained_after_an_exchange_owns_what_it_moves():
    """The exchange says whose base values stand in the model."""
    tuned = two(Normed(), targets="0,2")
    tuned.model.eval()
    tuned.merge()
    tuned.use("other")
    tuned.unmerge()
    tuned.model.train()
    tuned.model(torch.randn(9, 24))
    assert any("running_mean" in n for n in tuned.tensors("other"))
    assert not any("running_mean" in n and not torch.equal(v, torch.zeros(40))
                   for n, v in tuned.tensors("default").items())
