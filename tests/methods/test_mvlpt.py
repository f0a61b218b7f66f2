"""MVLPT: rows for both towers, of many tasks first, written out in float64 with stock CLIP."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.core.needs import towers
from burnish.core.recipe import parse
from burnish.formats.warm import begin_from
from burnish.testing import stir
from burnish.testing.models import tiny

TABLE = "text_model.embeddings.token_embedding"
VISION = "vision_model.encoder.layers.{}"
WIDE = {"vision_config": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "intermediate_size": 64, "image_size": 16, "patch_size": 4,
                          "projection_dim": 16}}


def norm(x, scale, shift):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5) ** 0.5 * scale + shift


def unified(t):
    """[U_T; U_V] through one block of one head, and back to both widths."""
    def line(name, x):
        return x @ t[f"{name}.weight"].t() + t[f"{name}.bias"]

    x = torch.cat([line(f"enter.{i}", t[f"rows.{i}"]) for i in range(2)])
    q, k, v = line("qkv", norm(x, t["norm1.weight"], t["norm1.bias"])).chunk(3, -1)
    scores = q @ k.t() / math.sqrt(x.shape[1])
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    x = x + line("proj", e / e.sum(-1, keepdim=True) @ v)
    x = x + line("fc2", F.gelu(line("fc1", norm(x, t["norm2.weight"], t["norm2.bias"]))))
    half = len(x) // 2
    return line("leave.0", x[:half]), line("leave.1", x[half:])


def stands(base, text, visual):
    if text is not None:
        base.get_submodule(TABLE).register_forward_hook(lambda m, args, e: torch.cat(
            [e[:, :1], text.expand(len(e), -1, -1), e[:, 1 + len(text):]], 1))
    if visual is not None:
        base.get_submodule(VISION.format(0)).register_forward_pre_hook(lambda m, args: (
            torch.cat([args[0], visual.expand(len(args[0]), -1, -1)], 1), *args[1:]))


@pytest.mark.parametrize("form", ["unified", "text", "visual", "both"])
def test_the_equation_written_out(beside, form):
    """Towers of two widths; the class token is the first of a picture, so what is carried on
    behind the patches needs no leave in the reference."""
    width = ", hidden=8" * (form == "unified")
    one = beside("clip", f"mvlpt(length=3, where={form!r}{width})", **WIDE)
    if form == "unified":
        text, visual = unified({n.removeprefix("maker.bank."): p
                                for (_, n), p in one.theta.items()})
    else:
        text, visual = (one.theta.get((p, "rows")) for p in (TABLE, VISION.format(0)))
    assert (text is None, visual is None) == (form == "visual", form == "text")
    one.batch["input_ids"][:, -1] = 63
    stands(one.base, text, visual)
    want, got = (m(**one.batch).logits_per_image for m in (one.base, one.tuned.model))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    mine = torch.autograd.grad(one.score(got), list(one.own.values()))
    ref = torch.autograd.grad(one.score(want), list(one.theta.values()))
    for k, a, r in zip(one.own, mine, ref, strict=True):
        torch.testing.assert_close(a, r, rtol=1e-7, atol=1e-9, msg=str(k))


def given(batch, n):
    ids = torch.randint(3, 60, (n, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 1:5] = 7                                          # placeholders
    ids[:, -1] = 63
    return {"input_ids": ids, "pixel_values": batch["pixel_values"]}


def test_logits_are_those_of_the_image_s_own_task():
    """Classes 0 and 1 are the first task's, 2 to 4 the second's: the softmax is within a task."""
    net, batch = tiny("clip")
    tuned = burnish.tune(net, "mvlpt(length=2, hidden=4, per_task=(2, 3))", head=False)
    net.eval()
    batch = given(batch, 5)
    out = net(**batch, task=torch.tensor([1, 0]))
    logits = out.logits_per_image
    assert torch.equal(logits.isinf(), torch.tensor([[True, True, False, False, False],
                                                     [False, False, True, True, True]]))
    assert torch.equal(out.logits_per_text, logits.t())
    label = torch.tensor([3, 1])
    plain = burnish.tune(tiny("clip")[0], "mvlpt(length=2, hidden=4)", head=False)
    for a, b in zip(plain.parameters(), tuned.parameters(), strict=True):
        a.data.copy_(b)
    every = plain.model.eval()(**batch).logits_per_image
    want = F.cross_entropy(every[:1, 2:], torch.tensor([1])) \
        + F.cross_entropy(every[1:, :2], torch.tensor([1]))
    loss = F.cross_entropy(logits, label, reduction="sum")
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, list(tuned.parameters())),
                    torch.autograd.grad(want, list(plain.parameters())), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_second_stage_starts_from_the_first(tmp_path):
    """Its value, without the tasks: `per_task` adds nothing that trains."""
    net, batch = tiny("clip")
    tuned = burnish.tune(net, "mvlpt(length=2, hidden=4, per_task=(2, 3))", head=False)
    tuned.optimizer(lr=1e-2)
    batch = given(batch, 5) | {"task": torch.tensor([0, 1])}
    label = torch.tensor([1, 2])
    losses = [float(tuned.step(batch, loss=lambda out, b: F.cross_entropy(
        out.logits_per_image, label))) for _ in range(3)]
    assert losses[-1] < losses[0]
    tuned.save(tmp_path, whole=True)
    target = burnish.tune(tiny("clip")[0], "mvlpt(length=2, hidden=4)", head=False, seed=9)
    begin_from(target, tmp_path)
    for (n, a), b in zip(target.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(a, b), n
    with pytest.raises(burnish.RecipeError, match="length was 2"):
        begin_from(burnish.tune(tiny("clip")[0], "mvlpt(length=3, hidden=4)"), tmp_path)


def test_a_file_holds_the_rows_of_both_sides(tmp_path):
    net, batch = tiny("clip", **WIDE)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "mvlpt(length=3, hidden=4)", head=False)
    stir(tuned, size=0.5)
    want = net.eval()(**batch).logits_per_image
    tuned.save(tmp_path)
    again = burnish.load(base, tmp_path)
    assert "where='both'" in str(again.recipe)
    assert {n.rpartition(".")[2] for n, _ in again.named_parameters()} == {"rows"}
    torch.testing.assert_close(again.model.eval()(**batch).logits_per_image, want)


def test_counts_and_defaults(published):
    m = parse("mvlpt")[0]
    assert (m.length, m.where, m.hidden, m.per_task, m.tasks) == (16, "unified", 128, (), 1)
    clip, _ = published("CLIPConfig", "CLIPModel", vision_config={
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        "image_size": 224, "patch_size": 16})
    two = towers(clip)
    d, out = clip.model.get_submodule(two.table).embedding_dim, two.vision[0].hidden_size
    assert (d, out) == (512, 768)
    assert parse("mvlpt(where='text')")[0].count(d, out) == 8_192
    assert parse("mvlpt(where='visual')")[0].count(d, out) == 16 * 768
    for form in ("unified", "text", "visual", "both"):
        recipe = f"mvlpt(length=3{', hidden=4' * (form == 'unified')}, where={form!r})"
        tuned = burnish.tune(tiny("clip", **WIDE)[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32, 48)
    rows = burnish.tune(tiny("clip")[0], "mvlpt(length=60, where='both')", head=False)
    for p in rows.parameters():
        assert float(p.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("where", ["unified", "text", "visual", "both"])
def test_pictures_leave_their_tower_without_the_rows(where):
    three = {"vision_config": {**WIDE["vision_config"], "num_hidden_layers": 3}}
    net, batch = tiny("clip", **three)
    given = {k: batch[k] for k in ("pixel_values", "input_ids")}
    plain = copy.deepcopy(net)(**given, output_hidden_states=True).vision_model_output
    burnish.tune(net, f"mvlpt(length=3, where={where!r})", head=False)
    out = net(**given, output_hidden_states=True).vision_model_output
    assert out.last_hidden_state.shape == plain.last_hidden_state.shape
    assert [s.shape for s in out.hidden_states] == [s.shape for s in plain.hidden_states]
    finished = parse(f"mvlpt(where={where!r})")[0].finished()
    assert finished.where == ("both" if where == "unified" else where)


def test_the_least_that_acts_and_a_task_that_is_not_there():
    assert parse("mvlpt(length=1, hidden=1, per_task=(1, 1))")[0].tasks == 2
    net, batch = tiny("clip")
    burnish.tune(net, "mvlpt(length=2, per_task=(1, 1))", head=False)
    given = {k: batch[k] for k in ("pixel_values", "input_ids")}
    with pytest.raises(burnish.RecipeError, match="from 0 to 1"):
        net(**given, task=torch.tensor([0, 2]))


def test_checkpointing_changes_no_gradient():
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("clip")
        tuned = burnish.tune(net, "mvlpt(length=3, hidden=4)" + extra, head=False)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_what_a_run_refuses():
    net, batch = tiny("clip")
    burnish.tune(net, "mvlpt(length=2, hidden=4, per_task=(2, 3))", head=False)
    task = torch.tensor([0, 1])
    with pytest.raises(burnish.RecipeError, match="a contrastive loss"):
        net(**batch, task=task)
    with pytest.raises(burnish.RecipeError, match="5 classes together, and 4 texts"):
        net(**given(batch, 4), task=task)
    with pytest.raises(burnish.RecipeError, match="'task'"):
        net(**given(batch, 5))


@pytest.mark.parametrize("model, recipe, why", [
    ("clip", "mvlpt(length=0)", "a row"), ("clip", "mvlpt(hidden=0)", "a width"),
    ("clip", "mvlpt(per_task=(3, 0))", "classes of 1 or more"),
    ("clip", "mvlpt(where='text', hidden=8)", "hidden=8 is the width in which both sides meet"),
    ("clip", "mvlpt(targets='q')", "no targets"), ("vit", "mvlpt", "two towers"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
