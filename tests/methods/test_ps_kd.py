"""PS-KD: targets between the label and what the model said an epoch ago."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.core.errors import ConfigError, RecipeError
from burnish.methods.objective.ps_kd import softened
from burnish.testing import stir, tiny


def hand(z, t, labels, share):
    """CE of the mixed target over rows with a label, in float64, row by row."""
    z, t = z.double().flatten(0, -2), t.double().flatten(0, -2)
    found = []
    for row, said, y in zip(z, t, labels.flatten().tolist(), strict=True):
        if y == -100:
            continue
        target = share * torch.softmax(said, -1)
        target = target + (1 - share) * torch.nn.functional.one_hot(torch.tensor(y), len(row))
        found.append(-(target * torch.log_softmax(row, -1)).sum())
    return torch.stack(found).mean()


def test_what_a_mixed_target_adds():
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(3, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(5, (3, 4), generator=g)
    labels[0, :3] = -100
    plain = hand(z, t, labels, 0.0)
    torch.testing.assert_close(plain + 0.3 * softened(z, t, labels), hand(z, t, labels, 0.3))
    assert softened(z, t, torch.full_like(labels, -100)) == 0
    one = torch.full_like(labels, -100)
    one[1, 2] = 3                                        # a single row has a label
    torch.testing.assert_close(hand(z, t, one, 0.0) + 0.3 * softened(z, t, one),
                               hand(z, t, one, 0.3))
    assert softened(z.bfloat16(), t.bfloat16(), labels).dtype == torch.float32


def trained(recipe, model, steps, total, lr=0.05):
    """(tuned, batch, a copy of the model after each update)."""
    net, batch = tiny(model, dtype=torch.float64)
    tuned = burnish.tune(net, f"{recipe} + sgd", head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    stir(tuned, size=0.1)
    net.eval()
    tuned.total_steps = total
    tuned.optimizer(lr=lr)
    after = []
    for _ in range(steps):
        tuned.step(batch)
        net.eval()
        with torch.no_grad():
            after.append(net(**batch).logits.clone())
    return tuned, batch, after


@pytest.mark.parametrize("recipe, model", [
    ("lora(rank=2)", "bert"), ("full", "vit"), ("lora(rank=2) + checkpoint", "gpt2"),
    ("houlsby(bottleneck=4)", "bert")])
def test_gradients_are_those_of_the_mixed_target(recipe, model):
    """Six updates in three stretches: in the third a_3 = 0.6, against the model after the fourth
    update, not the fifth."""
    tuned, batch, after = trained(f"{recipe} + ps_kd(alpha=0.6, stretches=3)", model, 5, 6)
    net = tuned.model
    if model == "gpt2":
        batch["labels"][:, :3] = -100
    labels = batch["labels"]
    if model == "gpt2":
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    bare = copy.deepcopy(net)
    out = bare(**batch)
    whole = hand(out.logits, after[3], labels, 0.6)
    if model == "gpt2":                              # whose own loss is made in float32
        whole = whole - hand(out.logits, after[3], labels, 0.0) + out.loss
    want = torch.autograd.grad(0.5 * whole,
                               [p for p in bare.parameters() if p.requires_grad],
                               allow_unused=True)
    assert not torch.allclose(after[3], after[4])
    for p in tuned.parameters():
        p.grad = None
    (0.5 * net(**batch).loss).backward()
    mine = [p for p in net.parameters() if p.requires_grad]
    for p, g in zip(mine, want, strict=True):
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


def test_the_first_stretch_is_the_plain_loss():
    plain, _, one = trained("lora(rank=2)", "bert", 2, 6)
    tuned, _, other = trained("lora(rank=2) + ps_kd(stretches=3)", "bert", 4, 6)
    for a, b in zip(one, other, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    _, _, further = trained("lora(rank=2)", "bert", 4, 6)
    assert torch.equal(further[1], other[1]) and not torch.allclose(further[2], other[2])


def test_how_much_its_own_word_counts():
    tuned, _, _ = trained("lora(rank=2) + ps_kd(alpha=0.8, stretches=4)", "bert", 0, 10)
    handler = next(h for _, h in tuned.timeline.handlers if hasattr(h, "share"))
    assert [round(handler.share(s), 2) for s in range(12)] == \
        [0, 0, 0, .4, .4, .4, .6, .6, .6, .8, .8, .8]


def test_a_run_shorter_than_its_stretches_has_one_an_update():
    tuned, _, _ = trained("lora(rank=2) + ps_kd(alpha=0.8, stretches=8)", "bert", 0, 3)
    handler = next(h for _, h in tuned.timeline.handlers if hasattr(h, "share"))
    assert [round(handler.share(s), 2) for s in range(3)] == [0, .2, .3]


def test_a_promise_is_of_an_update_whose_teacher_answers():
    tuned, _, _ = trained("lora(rank=2) + ps_kd(alpha=0.8, stretches=2)", "bert", 1, 4)
    handler = next(h for _, h in tuned.timeline.handlers if hasattr(h, "share"))
    assert not handler.values and handler.share(0) == 0  # the first stretch has none
    handler.rehearse(0)
    assert handler.share(0) == 0.8
    held = {n: v.clone() for n, v in handler.values.items()}
    assert held.keys() == dict(tuned.named_parameters()).keys()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(1.0)
    handler.after_update(1)                              # no stretch ends in rehearsal
    assert all(torch.equal(v, held[n]) for n, v in handler.values.items())


def test_what_trains_is_as_it_was_when_the_teacher_has_answered():
    tuned, batch, _ = trained("lora(rank=2) + ps_kd(stretches=2)", "bert", 3, 4)
    before = {n: (p.data_ptr(), p.clone()) for n, p in tuned.named_parameters()}
    tuned.loss(batch).backward()
    for n, p in tuned.named_parameters():
        assert p.data_ptr() == before[n][0] and torch.equal(p, before[n][1])


def test_a_stretch_ends_at_its_last_update():
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "lora(rank=2) + ps_kd(stretches=3)", head=False)
    tuned.optimizer(lr=1e-3)
    tuned.total_steps = 9
    handler = next(h for _, h in tuned.timeline.handlers if type(h).__name__ == "Earlier")
    kept = []
    handler.keep = lambda: kept.append(step)
    for step in range(9):
        handler.after_update(step)
    assert kept == [2, 5, 8]


def test_a_batch_that_is_no_mapping_is_refused_once_there_is_a_teacher():
    net, batch = tiny("mlp")
    tuned = burnish.tune(net, "full + ps_kd(stretches=2)", head=True)
    tuned.optimizer(lr=1e-3)
    tuned.total_steps = 2
    pair = (batch["x"], batch["labels"]) if "x" in batch else tuple(batch.values())[:1]

    def loss(out, _):
        return out.logits.square().mean()

    tuned.step(pair, loss)
    with pytest.raises(ConfigError, match="expected a batch with `labels`"):
        tuned.step(pair, loss)


def test_refusals():
    assert burnish.parse("ps_kd")[0].settings() == {"targets": None, "alpha": 0.8, "stretches": 10}
    assert burnish.parse("ps_kd(alpha=1.0, stretches=2)")[0].alpha == 1.0
    for bad in ("alpha=0.0", "alpha=1.1", "stretches=1"):
        with pytest.raises(RecipeError, match="alpha above 0 and up to 1, and stretches of"):
            burnish.parse(f"ps_kd({bad})")
    with pytest.raises(ConfigError, match="its length is not known: tuned.total_steps"):
        trained("lora(rank=2) + ps_kd", "bert", 1, None)
    tuned, batch, _ = trained("lora(rank=2) + ps_kd(stretches=2)", "bert", 2, 4)
    with pytest.raises(ConfigError, match="expected a batch with `labels`"):
        tuned.loss({"input_ids": batch["input_ids"]}, loss=lambda out, b: out.logits.sum())
    with pytest.raises(RecipeError, match="ps_kd needs a loss that a sample has by itself"):
        burnish.tune(tiny("clip")[0], "lora(rank=2) + ps_kd")
