"""CPE-CLIP: rows in both towers of one projection, damped by the share of new classes."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.methods.test_maple import TABLE, TEXT, VISION, agree, stands

import burnish
from burnish.core.needs import towers
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

CLIP_B16 = {
    "text_config": {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
    "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                      "image_size": 224, "patch_size": 16}}


@pytest.mark.parametrize("layers", [1, 2])
def test_the_equation_written_out(beside, layers):
    """One projection for all blocks, owned by the first."""
    one = beside("clip", f"cpe_clip(length=3, layers={layers})")
    texts = [one.theta[p, "rows"] for p in [TABLE, TEXT.format(1)][:layers]]
    W, b = (one.theta[VISION.format(0), f"maker.linear.{n}"] for n in ("weight", "bias"))
    assert len(one.theta) == layers + 2
    one.batch["input_ids"][:, -1] = 63                         # where a text ends
    stands(one.base, texts, [G @ W.t() + b for G in texts])
    agree(one)


def stepped(recipe, rule, steps=1):
    net, batch = tiny("clip", dtype=torch.float64)
    tuned = burnish.tune(net, f"{recipe} + {rule}", head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    start = [p.detach().clone() for p in tuned.parameters()]
    tuned.optimizer(lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        tuned.step(batch)
    return [p.detach() - s for p, s in zip(tuned.parameters(), start, strict=True)]


@pytest.mark.parametrize("rule", ["sgd", "adamw", "lion"])
def test_updates_count_for_the_share_of_new_classes(rule):
    """lambda = 5 / 65, with SGD and with rules that a damped gradient would not reach."""
    assert parse("cpe_clip(sessions=(60, 5))")[0].factor == 5 / 65
    assert parse("cpe_clip(sessions=(60, 5, 5))")[0].factor == 5 / 70
    assert parse("cpe_clip")[0].factor == parse("cpe_clip(sessions=(60,))")[0].factor == 1
    own = "cpe_clip(length=3, layers=2{})"
    whole, less = (stepped(own.format(s), rule) for s in ("", ", sessions=(60, 5)"))
    for a, b in zip(whole, less, strict=True):
        assert a.any()
        torch.testing.assert_close(b, a * 5 / 65)


def test_with_sgd_a_damped_update_is_one_of_a_damped_gradient():
    """Over several steps with momentum: plain SGD on gradients times lambda."""
    rule = "sgd(momentum=0.9)"
    got = stepped("cpe_clip(length=3, layers=2, sessions=(3, 1))", rule, steps=3)
    net, batch = tiny("clip", dtype=torch.float64)
    tuned = burnish.tune(net, "cpe_clip(length=3, layers=2)", head=False)
    mine = list(tuned.parameters())
    for p in mine:
        p.data = p.data.double()
    start = [p.detach().clone() for p in mine]
    plain = torch.optim.SGD(mine, lr=1e-2, momentum=0.9)
    for _ in range(3):
        plain.zero_grad()
        net(**batch).loss.backward()
        for p in mine:
            p.grad *= 1 / 4
        plain.step()
    for p, s, g in zip(mine, start, got, strict=True):
        torch.testing.assert_close(g, p.detach() - s, rtol=1e-6, atol=1e-12)


def test_the_first_session_is_whole_and_leaves_gradients_to_others():
    """Nothing reads all of them at once, so they may be stepped and dropped one by one."""
    net, batch = tiny("clip")
    tuned = burnish.tune(net, "cpe_clip(layers=2) + sgd + step_in_backward", head=False)
    tuned.optimizer(lr=1e-2)
    assert torch.isfinite(tuned.step(batch))
    assert tuned.recipe[0].controller(tuned) is None


def test_another_adapter_is_not_damped():
    """lambda is of what trains; what another adapter learns beside it is its own."""
    net, batch = tiny("clip", dtype=torch.float64)
    tuned = burnish.tune(net, "cpe_clip(layers=2) + sgd", head=False)
    tuned.add("second", "cpe_clip(layers=2, sessions=(3, 1)) + sgd", head=False)
    tuned.use("second")
    for p in tuned.parameters():
        p.data = p.data.double()
    moved = {n: p for n, p in net.named_parameters() if ".second." in n}
    start = {n: p.detach().clone() for n, p in moved.items()}
    tuned.optimizer(lr=1e-2, weight_decay=0.0)
    tuned.loss(batch).backward()
    want = {n: -1e-2 / 4 * p.grad for n, p in moved.items()}
    tuned.step(batch)
    for n, p in moved.items():
        torch.testing.assert_close(p.detach() - start[n], want[n], rtol=1e-4, atol=1e-9)


def test_nothing_beside_it_is_damped():
    moved = {}
    for text in ("", ", sessions=(3, 1)"):
        net, batch = tiny("clip")
        tuned = burnish.tune(net, f"cpe_clip(length=3, layers=2{text}) + bitfit + sgd", head=False)
        start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
        tuned.optimizer(lr=1e-1)
        tuned.step(batch)
        moved[text] = {n: p.detach() - start[n] for n, p in tuned.named_parameters()}
    (one, other), same = moved.values(), 0
    for n in one:
        factor = 1 / 4 if ".cpe_clip." in n else 1
        torch.testing.assert_close(other[n], factor * one[n], rtol=1e-3, atol=1e-7)
        same += factor == 1
    assert same and same < len(one)


def test_rows_made_beforehand_are_those_made_in_a_run(tmp_path):
    net, batch = tiny("clip")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "cpe_clip(length=3, layers=2)", head=False)
    stir(tuned, size=0.5)
    want = net.eval()(**batch).logits_per_image
    tuned.save(tmp_path)
    again = burnish.load(base, tmp_path)
    assert "coupled=False" in str(again.recipe)
    assert all(n.endswith("rows") for n, _ in again.named_parameters())
    torch.testing.assert_close(again.model.eval()(**batch).logits_per_image, want)


def test_checkpointing_changes_no_gradient():
    """A block that runs again has the projection that another holds."""
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("clip")
        tuned = burnish.tune(net, "cpe_clip(length=3, layers=2)" + extra, head=False)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_start_and_the_count(published):
    """406,272 on CLIP ViT-B/16; G within the bound of Xavier's uniform."""
    clip, _ = published("CLIPConfig", "CLIPModel", **CLIP_B16)
    two = towers(clip)
    m = parse("cpe_clip")[0]
    assert (m.length, m.layers, tuple(m.sessions), m.coupled) == (2, 12, (), True)
    d, out = clip.model.get_submodule(two.table).embedding_dim, two.vision[0].hidden_size
    assert m.count(d, out) == 406_272 and m.repeats() is None
    for recipe in ("cpe_clip(length=3, layers=2)", "cpe_clip(length=3, layers=1, coupled=False)"):
        tuned = burnish.tune(tiny("clip")[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32, 32)
    net = tiny("clip")[0]
    burnish.tune(net, "cpe_clip(length=3, layers=2)", head=False)
    rows = torch.stack([p.detach() for n, p in net.named_parameters() if n.endswith("rows")])
    bound = (6 / (3 * 32 + 2 * 32)) ** 0.5
    assert 0.9 * bound < float(rows.abs().max()) <= bound


@pytest.mark.parametrize("model, recipe, why", [
    ("clip", "cpe_clip(length=0)", "at least one row"),
    ("clip", "cpe_clip(layers=0)", "one block"), ("clip", "cpe_clip(layers=3)", "at most 2"),
    ("clip", "cpe_clip(layers=2, sessions=(3, 0))", "sessions of one class"),
    ("clip", "cpe_clip(layers=2, targets='q')", "cpe_clip takes no targets"),
    ("clip", "cpe_clip(layers=2, sessions=(3, 1)) + sgd + step_in_backward", "gradients at once"),
    ("vit", "cpe_clip", "two towers"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
