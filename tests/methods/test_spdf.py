"""SPDF: a random share of the weights at zero, then all of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import burnish
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.spdf import Opening
from burnish.testing import follows, tiny


def made(settings="", out=10):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, out)).double()
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"full + spdf({settings})", head=False)
    ((_, term),) = tuned.terms(Opening)
    M = term.of(torch.ones(out, 12, dtype=torch.float64))
    return net, tuned, base, term, M


@pytest.mark.parametrize("settings, zeros", [("", 90), ("ratio=0.3", 36), ("ratio=0.55", 66)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, zeros):
    net, tuned, base, _, M = made(settings)
    assert int((M == 0).sum()) == zeros
    follows(tuned, lambda x, W, b: F.linear(x, W * M, b), [net[0].weight, net[0].bias], (5, 3, 12))
    assert torch.equal(tuned.merge()[0].weight, base[0].weight * M)


def test_a_whole_number_of_zeros_is_not_rounded_down():
    """0.35 of 180 is 63, and of floating numbers a little less."""
    assert 0.35 * 180 < 63
    assert int((made("ratio=0.35", out=15)[4] == 0).sum()) == 63


def test_an_open_weight_is_no_longer_formed(monkeypatch):
    """The layer runs on the weight itself, forward and backward."""
    net, tuned, _, _, M = made()
    tuned.recipe.named("spdf").open(tuned)
    want = F.linear(x := torch.randn(5, 12).double(), net[0].weight, net[0].bias)
    monkeypatch.setattr(Opening, "of", None)
    got = net(x)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, net[0].weight, g)[0], g.t() @ x)


def test_the_draw_is_the_seeds_and_each_weights_own():
    draws = [made(s)[4] for s in ("", "", "seed=1")]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    net = burnish.tune(tiny("llama")[0], "full + spdf")
    q, k = (dict(net.terms(Opening))[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qo")
    assert not torch.equal(q.bits, k.bits)


def run(net, batch, steps=8, recipe="full + spdf(until=0.5)", **words):
    tuned = burnish.tune(net, recipe)
    method = tuned.recipe.named("spdf")
    return tuned, tuned.run(method.stages(tuned, ()), lambda stage: [batch] * steps, total=steps,
                            lr=1e-2, weight_decay=0.1, **words)


def test_sparsity_is_exact_and_nothing_changes_at_the_switch():
    net, batch = tiny("llama")
    tuned, steps = run(net, batch)
    whole = {n: p for n, p in net.named_parameters() if n.endswith("q_proj.weight")}
    masks = {n: t.of(torch.ones_like(whole[n])) for n, t in tuned.terms(Opening) if n in whole}
    assert len(masks) == 2
    before = None
    for i, (_, done, _) in enumerate(steps):
        hidden = {n: p.detach()[masks[n] == 0] for n, p in whole.items()}
        if i < 3:
            assert all(not t.opened for _, t in tuned.terms(Opening))
            for n, p in whole.items():
                assert p.grad is None or not p.grad[masks[n] == 0].any()
        if i == 3:                                       # the last of the first stage
            net.eval()
            before = net(**batch).logits.detach().clone()
            net.train()
            moments = tuned.current_optimizer
        if i == 4:                                       # the first of the second, one update on
            assert tuned.current_optimizer is not moments and done == 0
            assert all(t.opened for _, t in tuned.terms(Opening))
            for n, p in whole.items():
                revived = p.detach()[masks[n] == 0]
                assert 0 < float(revived.abs().max()) <= 1.01e-2, "one step from zero, no decay"
                assert float((revived != 0).float().mean()) > 0.9
            steps_taken = {float(s["step"]) for s in tuned.current_optimizer.state.values()}
            assert steps_taken == {1.0}
    assert before is not None and hidden
    assert all(float((p == 0).float().mean()) < 0.05 for p in whole.values())


def test_the_function_at_the_switch_is_the_same():
    net, batch = tiny("llama")
    tuned, steps = run(net, batch)
    for _ in range(3):
        next(steps)
    net.eval()
    want = net(**batch).logits.detach().clone()
    method = tuned.recipe.named("spdf")
    method.open(tuned)
    assert torch.equal(net(**batch).logits, want)
    method.open(tuned)
    assert torch.equal(net(**batch).logits, want)
    weight = net.model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == int(0.75 * weight.numel())


def test_a_folder_says_which_stage_it_is_of(tmp_path):
    for opened in (False, True):
        net, batch = tiny("llama")
        base = copy.deepcopy(net)
        tuned, steps = run(net, batch)
        for _ in range(6 if opened else 3):
            next(steps)
        net.eval()
        tuned.save(tmp_path / str(opened))
        again = burnish.load(base, tmp_path / str(opened))
        base.eval()
        assert torch.equal(base(**batch).logits, net(**batch).logits)
        assert {t.opened for _, t in again.terms(Opening)} == {opened}
        torch.testing.assert_close(again.merge()(**batch).logits, net(**batch).logits)


def test_fused_and_transposed_weights():
    net, batch = tiny("gpt2")
    tuned, steps = run(net, batch)
    assert len([next(steps) for _ in range(4)]) == 4
    net.eval()
    want = net(**batch).logits
    tuned.recipe.named("spdf").open(tuned)
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-6)


class Pulled(transformers.TrainerCallback):
    """Pulls the plug after an update of the run."""

    def __init__(self, after=None):
        self.left = after

    def on_step_end(self, args, state, control, **kw):
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


@pytest.mark.parametrize("after", [3, 6])
def test_a_run_that_goes_on_in_either_stage_ends_in_the_same_bits(after, tmp_path):
    from burnish.fit.pictures import Picture

    torch.manual_seed(0)
    folder = tmp_path / "vit"
    transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10)).save_pretrained(folder)
    Picture(8, 8, (0.5,), (0.5,)).save_pretrained(folder)
    words = {"max_steps": 8, "batch_size": 8, "quiet": True, "report": False, "test": False,
             "validation": 0, "save_steps": 2, "measure": False, "lr": 1e-2}
    recipe = "full + spdf(until=0.5)"
    whole = burnish.fit(str(folder), "digits", recipe, output=tmp_path / "a", **words)
    with pytest.raises(KeyboardInterrupt):
        burnish.fit(str(folder), "digits", recipe, output=tmp_path / "b",
                    callbacks=[Pulled(after)], **words)
    again = burnish.fit(str(folder), "digits", recipe, output=tmp_path / "b", resume=True, **words)
    for (name, a), (_, b) in zip(whole.tuned.named_parameters(), again.tuned.named_parameters(),
                                 strict=True):
        assert torch.equal(a, b), name
    assert all(t.opened for _, t in again.tuned.terms(Opening))


def test_what_the_stages_are():
    from burnish.engine.stages import divides, stages_of

    net, _ = tiny("llama")
    tuned = burnish.tune(net, "full + spdf(until=0.25)")
    assert divides(tuned.recipe).name == "spdf"
    first, second = stages_of(tuned)
    assert first.until == 0.25 and second.until is None
    assert first.trains == second.trains == "default" and second.then is None


def test_the_stages_are_of_the_adapter_that_trains():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2)", head=False)
    tuned.add("two", "full + spdf", head=False)
    tuned.use({"two": 1.0}, train="two")
    assert {s.trains for s in tuned.recipe.named("spdf").stages(tuned, ())} == {"two"}
    alone = burnish.tune(tiny("llama")[0], "full + spdf", head=False)
    alone.use({"default": 1.0}, train=None)
    assert {s.trains for s in alone.recipe.named("spdf").stages(alone, ())} == {"default"}


def test_what_evaluation_kept_of_masked_weights_goes_with_the_masks():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "full + spdf", head=False)
    net.eval()
    with torch.no_grad():
        want = net(**batch).logits
        assert tuned.state.room.tensors()
        tuned.recipe.named("spdf").open(tuned)
        assert torch.equal(net(**batch).logits, want)
        assert not tuned.state.room.tensors()


def test_what_cannot_act_is_refused_and_the_defaults():
    for text in ("ratio=0.0", "ratio=1.0", "until=0.0", "until=1.0"):
        with pytest.raises(RecipeError, match="shares above 0 and below 1"):
            parse(f"spdf({text})")
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2) + spdf")
    with pytest.raises(RecipeError, match="opens weights that train whole, and .* does not: full"):
        list(tuned.recipe.named("spdf").stages(tuned, ()))
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "full(targets='k,v') + spdf(targets='q')")
    with pytest.raises(RecipeError, match="q_proj.weight does not: full"):
        list(tuned.recipe.named("spdf").stages(tuned, ()))
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "full + spdf")
    with pytest.raises(RecipeError, match="over one data set"):
        list(tuned.recipe.named("spdf").stages(tuned, ("a", "b")))
    assert parse("spdf(targets='q')")[0].claims() == ("the function of W on q",)
    assert parse("spdf")[0].claims() == ("the function of W on the default targets",)
    assert parse("spdf")[0].settings() == {"targets": None, "ratio": 0.75, "until": 0.5, "seed": 0}
