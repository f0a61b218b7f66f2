"""LAE: who is trained when, what follows, and which of the two answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.continual.plane import plane

import burnish
from burnish.continual import run
from burnish.continual.learner import learner
from burnish.continual.learners.lae import Lae
from burnish.core.errors import ConfigError, RecipeError
from burnish.testing.models import tiny


def through(recipe="lora(rank=2)", stream=None, hook=None, **settings):
    """The learner itself, after its run."""
    box = []

    class Look(Lae):
        name = "look"

        def begin(self, study):
            super().begin(study)
            box[:] = [self]

        def learn(self, t):
            super().learn(t)
            if hook is not None:
                hook(self, t)

    found = run(stream or plane(), recipe, Look(**settings))
    return box[0], found


def test_gamma_one_freezes_the_offline_module():
    seen = []

    def hook(one, t):
        if one.dual is not None:
            seen.append({n: s.clone() for n, s in one.dual.slow.items()})
        else:
            seen.append({n: p.detach().clone() for n, p in one.added.items()})

    through(hook=hook, ema=1.0)
    assert len(seen) == 3
    for later in seen[1:]:
        assert all(torch.equal(a, seen[0][n]) for n, a in later.items())


@pytest.mark.parametrize("ema", [0.5, 0.9])
def test_it_accumulates_after_every_update_while_frozen_too(ema):
    """phi_off in closed form, from the online values after each update; the head alone first."""
    trail, moved = [], []

    class Look(Lae):
        name = "look"

        def learn(self, t):
            self.t = t
            if t == 1:
                self.start = {n: p.detach().clone() for n, p in self.added.items()}
            super().learn(t)

        def teach(self, rows, t, step=None, **how):
            if "after" in how:
                follow = how["after"]

                def after():
                    trail.append({n: p.detach().clone() for n, p in self.added.items()})
                    follow()
                how["after"] = after
            before = {n: p.detach().clone() for n, p in self.tuned.model.named_parameters()}
            super().teach(rows, t, step, **how)
            moved.append((how.get("epochs"), {n for n, p in self.tuned.model.named_parameters()
                                              if not torch.equal(p, before[n])}, self))

    run(plane(), "lora(rank=2)", Look(ema=ema, freeze=2))
    one = moved[-1][2]
    assert [e for e, _, _ in moved] == [None, 2, 4, 2, 4]
    assert moved[1][1] == {"4.weight", "4.bias"} == one.head
    assert moved[2][1] == {*one.head, *one.added}
    want = one.start
    for values in trail:
        want = {n: ema * want[n] + (1 - ema) * v for n, v in values.items()}
    assert len(trail) == 2 * 6 * 4                   # of two tasks, six epochs of four batches
    for n, v in want.items():
        torch.testing.assert_close(one.dual.slow[n], v, rtol=1e-5, atol=1e-7)


def test_the_larger_probability_of_each_class_answers():
    one, _ = through(ema=0.5, freeze=0)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    allowed = one.study.stream.classes(1)
    with torch.no_grad():
        one.tuned.model.eval()
        cut = torch.where(allowed, 0.0, -torch.inf)
        on = (one.tuned.model(x) + cut).softmax(-1)
        fast = {n: p.detach().clone() for n, p in one.added.items()}
        for n, p in one.added.items():
            p.copy_(one.dual.slow[n])
        off = (one.tuned.model(x) + cut).softmax(-1)
        for n, p in one.added.items():
            p.copy_(fast[n])
        got = one.scores(x, allowed, None)
        assert not torch.allclose(on, off, atol=1e-3)
        torch.testing.assert_close(got, torch.maximum(on, off))
        assert not got[:, ~allowed].any()
        assert all(torch.equal(p.detach(), fast[n]) for n, p in one.added.items())
        for n, p in one.added.items():               # the same twice: one of them
            one.dual.slow[n].copy_(p)
        torch.testing.assert_close(one.scores(x, allowed, None), on)


def test_columns_of_earlier_classes_are_left():
    seen = []
    through(hook=lambda one, t: seen.append(one.tuned.model[4].weight.detach().clone()))
    stream = plane()
    for t in (1, 2):
        moved = (seen[t] != seen[t - 1]).any(1)
        assert set(moved.nonzero().flatten().tolist()) == set(stream.tasks[t].classes)


def test_what_is_stored_twice():
    one, found = through()
    n = sum(p.numel() for p in one.added.values())
    assert found.added == (n + 102, n, 0) and n == 2 * (2 + 16 + 16 + 16)


def test_any_module_on_a_transformer():
    """LoRA on keys and values, a parallel adapter beside attention, scales that train: the counts
    of the paper's ViT-B/16, five blocks."""
    vit = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
           "intermediate_size": 3072, "image_size": 224, "patch_size": 16}
    recipe = burnish.parse("parallel(placement='attention', bottleneck=5, scale=1.0, act='gelu', "
                           "train_scale=True)")
    assert 5 * recipe[0].count(768) == 42_270
    from burnish.core.anatomy import Anatomy
    from burnish.core.targets import match

    model = tiny("vit", meta=True, **vit)[0]
    places = [p for p in match(Anatomy.of(model), "k,v") if p.block < 5]
    lora = burnish.parse("lora(rank=5, train_scale=True)")[0]
    assert sum(lora.count(p) for p in places) == 76_810


@pytest.mark.parametrize("recipe", ["full", "bitfit", "houlsby(bottleneck=2)"])
def test_what_it_follows(recipe):
    if "houlsby" in recipe:
        with pytest.raises(RecipeError):             # no block to stand in
            through(recipe)
        return
    one, found = through(recipe)
    assert not set(one.added) & one.head and found.matrix.last > 0


@pytest.mark.parametrize("recipe, text, why", [
    ("lora(rank=2) + o_lora", "lae", "has its own way through tasks"),
    ("lora(rank=2)", "lae(freeze=6)", "freeze=5 or less"),
    ("lora(rank=2)", "lae(ema=1.5)", "ema from 0 to 1"),
    ("lora(rank=2)", "lae(freeze=-1)", "freeze of at least 0"),
    ("linear_probe", "lae", "trains the head alone"),
    ("adalora(rank=2)", "lae", "lae.freeze=0.")])
def test_what_cannot_be_is_refused(recipe, text, why):
    with pytest.raises((ConfigError, RecipeError), match=why):
        run(plane(), recipe, text)


def test_a_head_that_does_not_train_and_the_paper_s_word():
    assert learner("lae(gamma=0.5)").ema == 0.5
    stream = replace(plane("domain"), head=False)
    one, found = through("lora(rank=2)", stream)
    assert found.matrix.tasks == 3 and one.dual is not None
