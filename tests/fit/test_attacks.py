"""Attacks from a public encoder: the ascent by its equation, who knows what, and the command."""

from __future__ import annotations

import json

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.core.errors import CheckError, ConfigError
from burnish.fit.assets import GLYPH_VIT
from burnish.fit.attacks import Attacked, Box, ascend, audit, random_signs
from burnish.testing.models import tiny

D64 = torch.float64


def box(budget=0.1, mean=(0.5, 0.2), std=(0.5, 0.25)):
    return Box.of(budget, *(torch.tensor(t, dtype=D64).view(-1, 1, 1) for t in (mean, std)))


def pictures(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 3, 4, generator=g, dtype=D64)              # pixels from 0 to 1
    mean, std = (torch.tensor(t, dtype=D64).view(-1, 1, 1) for t in ((0.5, 0.2), (0.5, 0.25)))
    return x, (x - mean) / std


def test_the_ascent_is_the_equation_in_pixels():
    pixels, x = pictures()
    W = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), dtype=D64)
    mean = torch.tensor([0.5, 0.2], dtype=D64).view(-1, 1, 1)
    std = torch.tensor([0.5, 0.25], dtype=D64).view(-1, 1, 1)

    def f(x):
        return torch.tanh(x.flatten(1) @ W.T / 5)

    got = ascend(x, lambda at: (f(at) - f(x)).square().sum(), box(), 4,
                 torch.Generator().manual_seed(7))
    # the same on pixels: delta' = delta std, and a sign is the same in both
    d = (torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) * 2 - 1).double() * 0.1
    d = (pixels + d).clamp(0, 1) - pixels
    for _ in range(4):
        d = d.clone().requires_grad_(True)
        h = torch.tanh(((pixels + d - mean) / std).flatten(1) @ W.T / 5)
        (h - f(x)).square().sum().backward()
        d = (d + 2.5 * 0.1 / 4 * d.grad.sign()).detach().clamp(-0.1, 0.1)
        d = (pixels + d).clamp(0, 1) - pixels
    assert torch.allclose(got * std, d, atol=1e-12)
    assert float(d.abs().max()) == pytest.approx(0.1)


def test_of_a_linear_feature_it_finds_the_corner():
    x = torch.full((2, 2, 3, 4), 0.1, dtype=D64)
    w = torch.randn(24, generator=torch.Generator().manual_seed(2), dtype=D64)
    made = ascend(x, lambda at: ((at - x).flatten(1) @ w).square().sum(), box(0.05), 20,
                  torch.Generator().manual_seed(0))
    for row in made:
        assert torch.allclose((row.flatten() @ w).abs(), (box(0.05).budget.expand(2, 3, 4)
                                                          .flatten() * w.abs()).sum())


def test_random_signs_are_the_whole_budget_and_stay_pictures():
    pixels, x = pictures(40)
    std = torch.tensor([0.5, 0.25], dtype=D64).view(-1, 1, 1)
    made = random_signs(x, box(0.2), torch.Generator().manual_seed(0)) * std
    inner = (pixels > 0.2) & (pixels < 0.8)
    assert torch.allclose(made[inner].abs(), torch.full_like(made[inner], 0.2))
    assert 0.4 < float((made[inner] > 0).double().mean()) < 0.6
    assert float((pixels + made).min()) > -1e-12 and float((pixels + made).max()) < 1 + 1e-12


def test_a_gradient_that_is_no_number_is_named():
    x = torch.zeros(1, 2, 2, 2, dtype=D64)
    with pytest.raises(CheckError, match="not finite"):
        ascend(x, lambda at: (at * float("nan")).sum(), box(), 1, torch.Generator())


def scans(n=6):
    g = torch.Generator().manual_seed(3)
    return torch.rand(n, 1, 16, 16, generator=g) * 2 - 1


def handle(recipe, stirred=True):
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(str(GLYPH_VIT)).eval()
    tuned = burnish.tune(model, recipe, head=True)
    if stirred:
        g = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in tuned.parameters():
                p += 0.05 * torch.randn(p.shape, generator=g)
    return tuned


def grey(budget=0.1):
    half = torch.full((1, 1, 1), 0.5, dtype=D64)
    return Box.of(budget, half, half)


@pytest.mark.parametrize("recipe", ["linear_probe", "lora(rank=4)", "full"])
def test_who_has_the_base_alone_makes_pictures_that_depend_on_nothing_else(recipe):
    """The delta is that of the untuned model by itself, whatever was tuned, head and all."""
    from transformers import ViTModel

    x = scans()
    base = ViTModel.from_pretrained(str(GLYPH_VIT), add_pooling_layer=False).eval()

    def f(at):
        return base(pixel_values=at).last_hidden_state[:, 0]

    with torch.no_grad():
        first = f(x)
    want = ascend(x, lambda at: (f(at) - first).square().sum(), grey(), 2,
                  torch.Generator().manual_seed(0))
    tuned = handle(recipe)
    before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
    got = Attacked(tuned, "encoder", grey(), 2, 0).eval().delta(x, {})
    # where a gradient is nearly nothing, rounding may turn its sign
    assert float(((got - want).abs() < 1e-5).float().mean()) > 0.99
    assert all(torch.equal(before[n], p) for n, p in tuned.model.named_parameters())
    assert all(p.grad is None for p in tuned.model.parameters())


def test_who_has_the_tuned_model_moves_its_own_answers():
    x, tuned = scans(), handle("lora(rank=4)")
    attack = Attacked(tuned, "whole", grey(0.2), 5, 0).eval()
    with torch.no_grad():
        said = tuned.model(pixel_values=x).logits
        moved = attack(pixel_values=x).logits
    labels = said.argmax(-1)
    loss = torch.nn.functional.cross_entropy
    assert float(loss(moved, labels)) > float(loss(said, labels)) + 0.5
    with torch.no_grad():
        assert torch.equal(Attacked(tuned, "clean", grey(), 1, 0).eval()(pixel_values=x).logits,
                           said)


def test_what_cannot_be_attacked_is_refused():
    for budget in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="a budget is of pixels from 0 to 1"):
            audit(None, None, "test", budget=budget)
    with pytest.raises(ConfigError, match="a step or more, not 0"):
        audit(None, None, "test", budget=0.1, steps=0)
    tuned = burnish.tune(tiny("llama")[0], "full", head=False)
    with pytest.raises(ConfigError, match="no such head"):
        Attacked(tuned, "encoder", grey(), 1, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    at = tmp_path_factory.mktemp("attack") / "run"
    burnish.fit(str(GLYPH_VIT), "digits", "linear_probe", output=at, quiet=True, report=False,
                test=False, max_steps=40, learning_rate=1e-2)
    return at


def asked(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def test_the_command_tells_all_four_and_the_base_s_pictures_are_worse_than_chance(capsys, run):
    code, out, err = asked(capsys, "audit", run, "digits", "--attack", "0.15", "--steps", "3",
                           "--split", "validation", "--json")
    assert code == 0, err
    told = json.loads(out)
    found = {way: f["accuracy"] for way, f in told["figures"].items()}
    assert list(found) == ["clean", "random", "encoder", "whole"]
    assert found["clean"] > 0.5 and found["random"] > found["encoder"] + 0.1
    assert told["rows"] > 50 and told["budget"] == 0.15 and told["steps"] == 3
    recorded = json.loads((run / "run.json").read_text())["metrics"]["validation"]
    assert recorded["accuracy"] == pytest.approx(found["clean"])


@pytest.mark.parametrize(("words", "says"), [
    (["--attack", "0"], "a budget is of pixels from 0 to 1"),
    (["--attack", "0.1", "--tokens", "4"], "--tokens is of prompts"),
    (["--attack", "0.1", "--judge", "a:b"], "--judge is of prompts"),
    (["--steps", "4"], "--steps is of --attack"),
    (["--split", "test"], "--split is of --attack"),
    (["--attack", "0.1", "--split", "none"], "none"),
])
def test_options_of_the_other_audit_are_refused(capsys, run, words, says):
    code, _, err = asked(capsys, "audit", run, "digits", *words)
    assert code != 0 and says in err and "Traceback" not in err


def test_a_whole_model_is_refused(capsys):
    code, _, err = asked(capsys, "audit", GLYPH_VIT, "digits", "--attack", "0.1")
    assert code != 0 and "give the folder of a fit" in err
