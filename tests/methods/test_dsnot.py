"""DSnoT: entries of a pruned weight that change places, against a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import RecipeError, TargetError
from burnish.core.recipe import parse
from burnish.testing import follows, tiny


def batches(n=3):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 12, generator=g, dtype=torch.float64) + 1.5 for _ in range(n)]


def pruned(W, xs, k=6, first="wanda", tolerance=0.1, cycles=50, m=0):
    """W with its mask, row by row and exchange by exchange in plain Python; how many were made."""
    samples = [s.reshape(-1, s.shape[-1]) for x in xs for s in x]
    norm = (sum(s.square().sum(0) for s in samples) / len(samples)).sqrt().tolist()
    mean, var = torch.cat(samples).mean(0).tolist(), \
        torch.cat(samples).var(0, correction=0).tolist()
    out, made = W.clone(), 0
    for row in out:
        w, n = row.tolist(), len(row)
        wanda = [abs(w[j]) * norm[j] for j in range(n)]
        score = wanda if first == "wanda" else [abs(v) for v in w]
        runs = [range(i, i + m) for i in range(0, n, m)] if m else [range(n)]
        gone = {j for run in runs for j in sorted(run, key=lambda j: score[j])[:k]}
        for _ in range(cycles):
            e = sum(w[j] * mean[j] for j in gone)
            if abs(e) <= tolerance:
                break
            sign = 1 if e > 0 else -1
            g = max(gone, key=lambda j: sign * w[j] * mean[j] / var[j])
            if sign * w[g] * mean[g] <= 0:
                break
            may = [j for j in range(n) if j not in gone and
                   (j // m == g // m if m else sign * w[j] * mean[j] < 0)]
            if not may:
                break
            p = min(may, key=lambda j: wanda[j])
            if (e + w[p] * mean[p] - w[g] * mean[g]) * sign < 0:
                break
            gone, made = gone - {g} | {p}, made + 1
        row[sorted(gone)] = 0
    return out, made


def made(settings=""):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 240)).double()
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, f"dsnot(refine='all'{settings}) + lora(rank=2, alpha=6)", head=False,
                         targets="0", calibration=batches())
    return net, tuned, W


@pytest.mark.parametrize("settings, how", [
    ("", {}), (", ratio=0.3", {"k": 3}), (", first='magnitude'", {"first": "magnitude"}),
    (", tolerance=0.0", {"tolerance": 0.0}), (", tolerance=0.5", {"tolerance": 0.5}),
    (", cycles=1", {"cycles": 1}), (", mask='2:4'", {"k": 2, "m": 4}),
    (", mask='1:4', first='magnitude'", {"k": 3, "m": 4, "first": "magnitude"})])
def test_outputs_and_gradients_are_those_of_the_equation(settings, how):
    net, tuned, W = made(settings)
    want, exchanges = pruned(W, batches(), **how)
    bias = net[0].bias.detach()
    assert torch.equal(net[0].weight, want) and exchanges > 2
    ((_, term),) = tuned.terms(Chain)
    term.double()
    nn.init.normal_(term.B)
    follows(tuned, lambda x, A, B: F.linear(x, want + 3 * B @ A, bias), [term.A, term.B],
            (5, 3, 12))
    tuned.detach()
    assert torch.equal(net[0].weight, W)


def test_what_an_output_loses_never_grows_and_never_changes_its_sign():
    """|e| from exchange to exchange, row by row, with as many entries as before."""
    mean = torch.cat([x.reshape(-1, 12) for x in batches()]).mean(0)
    before, moves = None, 0
    for settings in (", tolerance=1e9", *(f", tolerance=0.0, cycles={k}" for k in range(1, 6))):
        net, _, W = made(settings)
        kept = net[0].weight != 0
        e = (W * ~kept) @ mean
        assert (kept.sum(1) == 6).all()
        if before is not None:
            was, e_was = before
            moved = (was != kept).any(1)
            assert (e[moved].abs() < e_was[moved].abs()).all() and torch.equal(e[~moved],
                                                                               e_was[~moved])
            assert (e * e_was >= 0).all()
            moves += int(moved.sum())
        before = kept, e
    assert moves > 10


def test_where_little_is_lost_it_is_wanda():
    kept = []
    for part in ("dsnot(refine='all', tolerance=1e9)", "wanda"):
        net, batch = tiny("llama")
        burnish.tune(net, f"{part} + lora(rank=2)", head=False, calibration=[batch])
        kept.append([m.weight for m in net.modules() if isinstance(m, nn.Linear)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_only_attention_is_refined_and_rows_keep_their_numbers():
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    for model, part in ((net, "dsnot(tolerance=0.0"), (base, "wanda(by_block=True")):
        burnish.tune(model, f"{part}, targets='all-linear@0') + lora(rank=2, targets='q')",
                     head=False, calibration=[batch])
    moved = {}
    for n, m in net.named_modules():
        if isinstance(m, nn.Linear) and "layers.0" in n:
            other = base.get_submodule(n).weight
            moved[n.split(".")[-2]] = moved.get(n.split(".")[-2], False) or \
                not torch.equal(m.weight, other)
            assert torch.equal((m.weight != 0).sum(1), (other != 0).sum(1))
    assert moved == {"self_attn": True, "mlp": False}


def test_attention_over_an_encoder_is_attention():
    net, batch = tiny("t5")
    base = copy.deepcopy(net)
    for model, part in ((net, "dsnot(tolerance=0.0"), (base, "wanda(by_block=True")):
        burnish.tune(model, f"{part}, targets='cross_q, cross_o, fc1') + "
                     "lora(rank=2, targets='q')", head=False, calibration=[batch])
    moved = {n for n, m in net.named_modules() if isinstance(m, nn.Linear)
             and not torch.equal(m.weight, base.get_submodule(n).weight)}
    assert any("EncDecAttention" in n for n in moved)


def test_a_folder_brings_the_mask(tmp_path):
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "dsnot + lora(rank=2)", head=False, calibration=[batch])
    net.eval()
    tuned.save(tmp_path / "a")
    burnish.load(base, tmp_path / "a")
    base.eval()
    assert torch.equal(base(**batch).logits, net(**batch).logits)


def never_read():
    raise AssertionError("data were read")
    yield


def test_what_cannot_act_is_refused_and_the_defaults():
    for text, why in (("samples=0", "of at least 1"), ("cycles=0", "of at least 1"),
                      ("tolerance=-0.1", "of at least 1"), ("ratio=1.0", "^dsnot: ratio"),
                      ("mask='matrix'", "entries change places within an output")):
        with pytest.raises(RecipeError, match=why):
            parse(f"dsnot({text})")
    parse("dsnot(samples=1, cycles=1, tolerance=0.0)")
    net, batch = tiny("llama")
    with pytest.raises(TargetError, match="dsnot: runs of 5 inputs do not tile"):
        burnish.tune(net, "dsnot(mask='2:5') + lora(rank=2)", calibration=never_read())
    with pytest.raises(RecipeError, match="none of the targets is a matrix of attention"):
        burnish.tune(net, "dsnot(targets='up, down') + lora(rank=2)", calibration=[batch])
    assert parse("dsnot")[0].settings() == {
        "targets": None, "ratio": 0.5, "mask": "row", "first": "wanda", "refine": "attention",
        "cycles": 50, "tolerance": 0.1, "samples": 128}


def test_the_head_stays():
    net, batch = tiny("vit")
    head = net.classifier.weight.detach().clone()
    burnish.tune(net, "dsnot(targets='all-linear, head') + lora(rank=2, targets='q')", head=False,
                 calibration=[batch])
    assert torch.equal(net.classifier.weight, head)
