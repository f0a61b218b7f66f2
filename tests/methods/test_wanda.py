"""Wanda: weights times the norms of what they are given."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.pruned import Chosen
from burnish.core.errors import ConfigError, RecipeError, TargetError
from burnish.core.recipe import parse
from burnish.memory import simulate
from burnish.testing import follows, tiny


def without_lowest(W, score, k):
    """Each row without the k entries of its lowest scores, in plain Python."""
    out = W.detach().clone()
    for row, s in zip(out, score.tolist(), strict=True):
        for i in sorted(range(len(s)), key=lambda i: s[i])[:k]:
            row[i] = 0
    return out


def norms(xs):
    """Over the tokens of a sample, the root of the mean square over samples."""
    samples = [s.double().reshape(-1, s.shape[-1]) for x in xs for s in x]
    return (sum(s.square().sum(0) for s in samples) / len(samples)).sqrt()


def batches(n=3):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 12, generator=g, dtype=torch.float64) *
            torch.logspace(0, 1, 12, dtype=torch.float64) for _ in range(n)]


def made(settings="", data=None, more="lora(rank=2, alpha=6)"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10)).double()
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, f"wanda({settings}) + {more}", head=False, targets="0",
                         calibration=batches() if data is None else data)
    return net, tuned, W


@pytest.mark.parametrize("settings, k", [("", 6), ("ratio=0.3, by_block=False", 3)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, k):
    net, tuned, W = made(settings)
    bias = net[0].bias.detach()
    pruned = without_lowest(W, W.abs() * norms(batches()), k)
    assert torch.equal(net[0].weight, pruned)
    assert not torch.equal(pruned, without_lowest(W, W.abs(), k)), "inputs have a say"
    ((_, term),) = tuned.terms(Chain)
    term.double()
    nn.init.normal_(term.B)
    follows(tuned, lambda x, A, B: F.linear(x, pruned + 3 * B @ A, bias), [term.A, term.B],
            (5, 3, 12))
    tuned.detach()
    assert torch.equal(net[0].weight, W)


def test_only_so_many_samples_are_read():
    net, _, W = made("samples=3")
    first = [batches()[0], batches()[1][:1]]
    assert torch.equal(net[0].weight, without_lowest(W, W.abs() * norms(first), 6))


def test_patterns_and_whole_matrices():
    net, _, W = made("mask='2:4'")
    score = W.abs() * norms(batches())
    assert torch.equal(net[0].weight.view(-1, 4),
                       without_lowest(W.view(-1, 4), score.view(-1, 4), 2))
    net, _, W = made("mask='matrix', ratio=0.25")
    assert torch.equal(net[0].weight.view(1, -1),
                       without_lowest(W.view(1, -1), score.view(1, -1), 30))


def block_by_block(net, batch, sequential):
    """The pruned weights of a Llama, each by inputs that hooks have seen."""
    layers = net.model.layers
    seen: dict[str, torch.Tensor] = {}
    for name, m in net.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
    rounds = [[f"model.layers.{i}."] for i in range(len(layers))] if sequential else \
        [["model.layers."]]
    for prefixes in rounds:
        with torch.no_grad():
            net(**batch)
            for name, m in net.named_modules():
                if isinstance(m, nn.Linear) and name.startswith(tuple(prefixes)):
                    W = m.weight
                    W.copy_(without_lowest(W, W.abs() * norms([seen[name]]), W.shape[1] // 2))
    return net


@pytest.mark.parametrize("sequential", [True, False])
def test_each_block_is_pruned_by_what_the_pruned_ones_pass_on(sequential):
    net, batch = tiny("llama", dtype=torch.float64)
    net.eval()
    base = copy.deepcopy(net)
    burnish.tune(net, f"wanda(by_block={sequential}) + lora(rank=2)", head=False,
                 calibration=[batch])
    for other in (sequential, not sequential):
        want = block_by_block(copy.deepcopy(base), batch, other)
        same = all(torch.equal(net.get_submodule(n).weight, m.weight)
                   for n, m in want.named_modules() if isinstance(m, nn.Linear))
        assert same == (other is sequential)


def test_a_row_is_an_output_where_the_transpose_is_stored():
    net, batch = tiny("gpt2", dtype=torch.float64)
    net.eval()
    W, seen = net.transformer.h[0].mlp.c_proj.weight.detach().clone(), []
    net.transformer.h[0].mlp.c_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    burnish.tune(net, "wanda(targets='fc2@0') + lora(rank=2)", head=False, calibration=[batch])
    want = without_lowest(W.t(), W.t().abs() * norms(seen[:1]), W.shape[0] // 2)
    assert torch.equal(net.transformer.h[0].mlp.c_proj.weight, want.t())


def test_a_folder_brings_the_mask_and_needs_no_data(tmp_path):
    net, batch = tiny("llama")
    base, other = copy.deepcopy(net), copy.deepcopy(net)
    tuned = burnish.tune(net, "wanda(ratio=0.4) + lora(rank=2)", head=False, calibration=[batch])
    net.eval()
    want = net(**batch).logits
    tuned.save(tmp_path / "a")
    bits = {k: t for k, t in tuned.tensors().items() if "provided" in k}
    assert len(bits) == 14
    assert sum(t.nbytes for t in bits.values()) == sum(
        p.numel() for n, p in base.named_parameters() if "layers" in n and "norm" not in n) // 8
    again = burnish.load(base, tmp_path / "a")
    base.eval()
    assert torch.equal(base(**batch).logits, want)
    assert all(torch.equal(t, again.tensors()[k]) for k, t in tuned.tensors().items())
    again.detach()
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), other.parameters(),
                                                 strict=True))


def test_another_mask_is_taken_of_the_weight_as_it_was():
    """A checkpoint over a model that was pruned otherwise; one that fails leaves it as it was."""
    from burnish.core.errors import FormatError
    from burnish.formats import adapter

    net, batch = tiny("llama")
    tuned = burnish.tune(net, "wanda + lora(rank=2)", head=False, calibration=[batch])
    second, _ = tiny("llama")
    shifted = {k: v.roll(1, 0).flip(1) for k, v in batch.items()}
    other = burnish.tune(second, "wanda(ratio=0.3) + lora(rank=2)", head=False,
                         calibration=[shifted])
    before, want = held(net), held(second)
    assert not any(torch.equal(a, b) for a, b in zip(before, want, strict=True))
    mine = {k: t.clone() for k, t in tuned.tensors().items()}
    theirs = {k: t.clone() for k, t in other.tensors().items()}
    with pytest.raises(FormatError, match="has 'more'"):
        adapter.put(tuned, {**theirs, "more": torch.zeros(1)}, "there")
    *_, last = (k for k in theirs if "provided" in k)
    broken = {**theirs, last: None}
    with pytest.raises(AttributeError):
        tuned.change(lambda: adapter._put(tuned, broken, mine, {}, False))
    assert all(torch.equal(a, b) for a, b in zip(held(net), before, strict=True))
    adapter.put(tuned, theirs, "there")
    assert all(torch.equal(a, b) for a, b in zip(held(net), want, strict=True))
    adapter.put(tuned, mine, "here")
    assert all(torch.equal(a, b) for a, b in zip(held(net), before, strict=True))


def held(net):
    return [m.held.clone() for m in net.modules() if isinstance(m, Chosen)]


def test_a_start_that_is_taken_off_first_comes_back_from_a_file(tmp_path):
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "wanda + pissa(rank=2)", head=False, calibration=[batch])
    net.eval()
    tuned.save(tmp_path / "a")
    burnish.load(base, tmp_path / "a")
    base.eval()
    torch.testing.assert_close(base(**batch).logits, net(**batch).logits, rtol=0, atol=0)


def test_the_adapter_that_comes_second_has_no_part_in_the_mask():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "wanda + lora(rank=2)", head=False, calibration=[batch])
    tuned.add("second", "lora(rank=2)")
    assert not [k for k in tuned.tensors("second") if "provided" in k]
    assert len([k for k in tuned.tensors("default") if "provided" in k]) == 14


def never_read():
    raise AssertionError("data were read")
    yield


def test_what_cannot_act_is_refused():
    for text, why in (("samples=0", "samples=0: expected at least 1"),
                      ("ratio=0.0", "^wanda: ratio"), ("mask='x'", "expected 'row'")):
        with pytest.raises(RecipeError, match=why):
            parse(f"wanda({text})")
    parse("wanda(samples=1)")
    net, batch = tiny("llama")
    with pytest.raises(TargetError, match="wanda: runs of 5 inputs do not tile .*, which has 32"):
        burnish.tune(net, "wanda(mask='2:5') + lora(rank=2)", calibration=never_read())
    with pytest.raises(ConfigError, match="wanda reads data before it starts"):
        burnish.tune(net, "wanda + lora(rank=2)")
    assert parse("wanda")[0].settings() == {"targets": None, "ratio": 0.5, "mask": "row",
                                            "by_block": True, "samples": 128}


def test_the_head_stays_and_nothing_is_read_for_it():
    net, batch = tiny("vit")
    head = net.classifier.weight.detach().clone()
    tuned = burnish.tune(net, "wanda(targets='all-linear, head') + lora(rank=2, targets='q')",
                         head=False, calibration=[batch])
    assert torch.equal(net.classifier.weight, head)
    assert any("as it is" in n for n in tuned.active.notes)


def test_a_step_takes_what_it_takes_without():
    """Originals of this size wait on disk."""
    net, batch = tiny("llama", hidden_size=256, intermediate_size=512)
    plain = simulate(copy.deepcopy(net), "lora(rank=2)", batch).by_category
    pruned = simulate(net, "wanda + lora(rank=2)", batch).by_category
    assert pruned["weights"] == plain["weights"]
    assert pruned["activations"] == plain["activations"]
