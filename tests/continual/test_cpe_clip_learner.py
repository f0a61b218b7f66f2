"""CPE-CLIP as a learner: each session moves what trains by the share of classes it brings."""

from __future__ import annotations

import pytest
import torch
from tests.continual.plane import plane

from burnish.continual import Stream, Training, by_class, run
from burnish.continual.learners.cpe_clip import CpeClip
from burnish.core.errors import RecipeError
from burnish.testing.models import tiny

LOGITS = {"logits": lambda out: out["logits_per_image"]}


def followed(stream, recipe, **training):
    """(factors, what trains before and after each session), of the learner as it runs."""
    factors, states = [], []

    class Look(CpeClip):
        name = "look"

        def learn(self, t):
            factors.append(self.factor(t))
            states.append(self.now())
            super().learn(t)
            states.append(self.now())

        def now(self):
            return {n: p.detach().clone() for n, p in self.tuned.named_parameters()
                    if n not in self.head}

    found = run(stream, recipe, Look(), training=Training(**training))
    return factors, states, found


def test_the_factor_of_each_session():
    factors, _, _ = followed(plane(), "lora(rank=2)", epochs=1, batch=8, rate=1e-2)
    assert factors == [1, 2 / 4, 2 / 6]


def test_an_update_of_the_second_session_counts_half():
    """One update: Adam's is as long as the rate, whatever the gradient; the head's is not damped.
    """
    stream = plane(classes=4, increment=2)
    _, states, _ = followed(stream, "full", epochs=1, batch=64, rate=1e-2, decay=0.0)
    one, two = ([(b[n] - a[n]).abs().max() for n in a] for a, b in
                (states[:2], states[2:]))
    assert all(float(d) == pytest.approx(1e-2, rel=1e-2) for d in one)
    assert all(float(d) == pytest.approx(5e-3, rel=1e-2) for d in two)


def pictures():
    """Pictures of one brightness a class, read beside the texts of all classes."""
    g = torch.Generator().manual_seed(0)
    rows = [[((c - 1.5) + 0.1 * torch.randn(3, 16, 16, generator=g), c) for c in range(4)
             for _ in range(n)] for n in (6, 3)]
    ids = tiny("clip")[1]["input_ids"][:1].repeat(4, 1)
    ids[:, 5] = torch.tensor([10, 20, 30, 40])
    return Stream("shades", "shades", "class", by_class(*rows, increment=2, order=0),
                  lambda: tiny("clip")[0],
                  lambda x: {"pixel_values": torch.stack(list(x)), "input_ids": ids},
                  head=False, **LOGITS)


def test_prompts_of_a_model_that_reads_the_texts_of_all_classes():
    """The recipe of the paper, by sessions; the same prompts answer for all classes."""
    recipe = "cpe_clip(length=3, layers=2) + sgd(momentum=0.9)"
    factors, states, found = followed(pictures(), recipe, epochs=6, batch=6, rate=0.1)
    assert factors == [1, 0.5]
    assert all(not torch.equal(a, b) for a, b in
               zip(states[0].values(), states[-1].values(), strict=True))
    assert len(found.matrix.rows) == 2 and found.added == (6 * 32 + 32 * 33, 0)


@pytest.mark.parametrize("stream, recipe, why", [
    (plane("domain"), "lora(rank=2)", "a stream of scenario 'class'"),
    (plane(), "lora(rank=2) + o_lora", "has its own way through tasks"),
    (pictures(), "cpe_clip(layers=2, sessions=(2, 2))", "damps by itself")])
def test_what_cannot_be_is_refused(stream, recipe, why):
    with pytest.raises(RecipeError, match=why):
        run(stream, recipe, "cpe_clip", training=Training(epochs=1))
