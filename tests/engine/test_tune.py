"""The tuned model: what `tune` refuses, how it steps, copies, compiles and casts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.errors import CheckError, ConfigError, RecipeError, TargetError
from burnish.memory.ledger import Ledger
from burnish.testing import stir
from burnish.testing.models import tiny


def mlp(dtype=torch.float32, width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
                         nn.Linear(64, 5)).to(dtype)


def square(out, _):
    return out.float().square().mean()


# -- refused ------------------------------------------------------------------------------------

def integers():
    model = mlp()
    model[2].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    return model


REFUSED = {
    "no module": (lambda: {"weight": 1}, "lora", {}, ConfigError, "torch.nn.Module, not dict"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), "lora", {}, ConfigError,
                      "Sequential has no parameters"),
    "meta": (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "lora", {}, ConfigError,
             "0.weight is on the meta device.*simulate"),
    "integer weights": (integers, "lora(rank=2)", {}, TargetError, "2.weight holds torch.int8"),
    "bad target": (mlp, "lora(rank=2)", {"targets": "q_prj"}, TargetError, "q_prj"),
    "rank": (mlp, "lora(rank=33, targets='0')", {}, RecipeError,
             "0.weight .64 x 32.; the largest rank.* 32"),
    "empty": (mlp, "", {}, RecipeError, "recipe"),
    "unknown": (mlp, "lroa", {}, RecipeError, "did you mean 'lora'"),
    "unknown setting": (mlp, "lora(rnak=4)", {}, RecipeError, "did you mean 'rank'"),
    "wrong type": (mlp, "lora(rank='four')", {}, RecipeError, "expected int, got str"),
    "wrong choice": (mlp, "lora(scaling='rslora')", {}, RecipeError, "did you mean 'rs'|'rs'"),
    "positional": (mlp, "lora(8)", {}, RecipeError, "by name"),
    "nothing trains": (mlp, "checkpoint", {"head": False}, burnish.BurnishError, "block|trains"),
    "nothing trains, said": (lambda: tiny("vit")[0], "lean", {"head": False}, CheckError,
                             "nothing trains with lean.*lora"),
    "no text": (mlp, 3, {}, ConfigError, "recipe"),
    "bad name": (mlp, "lora(rank=2)", {"name": "a.b"}, ConfigError, "plain word"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_clear_line_and_changes_nothing(case):
    make, recipe, settings, error, words = REFUSED[case]
    model = make()
    state = [(n, type(m)) for n, m in model.named_modules()] if isinstance(model, nn.Module) else []
    flags = [p.requires_grad for p in model.parameters()] if state else []
    with pytest.raises(error, match=words) as e:
        burnish.tune(model, recipe, **settings)
    said = str(e.value)
    assert "\n" not in said and 20 < len(said) < 400
    assert e.value.exit_code == (4 if error is CheckError else e.value.exit_code)
    if error in (ConfigError, RecipeError, TargetError):
        assert e.value.exit_code == 2
    if state:
        assert state == [(n, type(m)) for n, m in model.named_modules()]
        assert flags == [p.requires_grad for p in model.parameters()]


def test_a_tuned_model_is_not_tuned_twice():
    model = mlp()
    tuned = burnish.tune(model, "lora(rank=2)")
    with pytest.raises(ConfigError, match="tuned already.*tuned.add"):
        burnish.tune(model, "lora(rank=2)")
    tuned.detach()
    burnish.tune(model, "lora(rank=2)")


def test_a_tied_weight_takes_no_delta():
    """What is added to the embedding would not reach the head that reads the same weight."""
    model, _ = tiny("gpt2")
    with pytest.raises(TargetError, match="tied to lm_head.weight.*Untie"):
        burnish.tune(model, "lora(rank=4)", targets="embedding")
    untied, _ = tiny("llama", tie_word_embeddings=False)
    burnish.tune(untied, "lora(rank=4, targets='embed_tokens')")


# -- stepping -----------------------------------------------------------------------------------

def test_a_batch_may_be_a_mapping_a_pair_or_the_input():
    x, y = torch.randn(6, 32), torch.randint(0, 5, (6,))
    losses = []
    for batch, loss in (((x, y), lambda out, b: F.cross_entropy(out, b[1])),
                        (x, lambda out, b: F.cross_entropy(out, y)),
                        ({"input": x}, lambda out, b: F.cross_entropy(out, y))):
        tuned = burnish.tune(mlp(), "lora(rank=4)")
        tuned.step(batch, loss=loss)
        losses.append(tuned.step(batch, loss=loss))
    assert losses[0] == losses[1] == losses[2] and not losses[0].requires_grad


def test_a_model_without_a_loss_says_what_to_do():
    tuned = burnish.tune(mlp(), "lora(rank=4)")
    with pytest.raises(ConfigError, match="no scalar loss.*loss=lambda"):
        tuned.step(torch.randn(2, 32))


def test_the_same_in_anybodys_loop():
    """tuned.step, and a loop around tuned.optimizer, end at the same weights."""
    ends = []
    for own in (False, True):
        tuned = burnish.tune(mlp(), "snella(rank=4, s=0.2) + l2_sp")
        tuned.total_steps = 6
        opt = tuned.optimizer(lr=1e-2)
        for k in range(6):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(k))
            if own:
                opt.zero_grad()
                square(tuned.model(x), None).backward()
                opt.step()
            else:
                tuned.step(x, loss=square)
        ends.append(tuned.tensors())
    for n, t in ends[0].items():
        assert torch.equal(t, ends[1][n]), n


def test_a_loss_that_is_not_a_number_updates_nothing():
    tuned = burnish.tune(mlp(), "lora(rank=4)")
    x = torch.randn(4, 32)
    for _ in range(3):
        tuned.step(x, loss=square)
    before = {n: t.clone() for n, t in tuned.tensors().items()}
    with pytest.raises(burnish.BurnishError, match="nan at step 3; nothing was updated"):
        tuned.step(x, loss=lambda out, b: out.sum() * float("nan"))
    with pytest.raises(burnish.BurnishError, match="inf at step 3"):
        tuned.step(x, loss=lambda out, b: out.sum() * 0 + float("inf"))
    assert all(torch.equal(before[n], t) for n, t in tuned.tensors().items())
    tuned.step(x, loss=square)
    assert tuned.timeline.step == 4


def test_the_seed_draws_the_start():
    starts = [burnish.tune(mlp(), "lora(rank=4)", seed=s).tensors() for s in (0, 0, 1)]
    key = next(k for k in starts[0] if k.endswith("A"))
    assert torch.equal(starts[0][key], starts[1][key])
    assert not torch.equal(starts[0][key], starts[2][key])
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    burnish.tune(mlp_without_seed(), "lora(rank=4)")
    assert torch.equal(torch.rand(1), want), "the global generator stays as it was"


def mlp_without_seed():
    with torch.random.fork_rng():
        return mlp()


def test_what_trains_is_said():
    tuned = burnish.tune(tiny("vit")[0], "lora(rank=4)")
    said = tuned.summary()
    assert said["parts"]["lora"] == {"tensors": 24, "trainable": 3584, "bytes": 4 * 3584}
    assert said["parts"]["head"]["trainable"] == 99
    assert said["trainable"] == sum(p.numel() for p in tuned.parameters()) == 3584 + 99
    assert "lora" in repr(tuned) and "3,683 of" in repr(tuned)


def test_a_classification_head_trains_and_a_language_model_head_does_not():
    heads = {m: [n for n, _ in burnish.tune(tiny(m)[0], "lora(rank=4)").named_parameters()
                 if ".burnish." not in n] for m in ("vit", "llama")}
    assert heads["vit"] == ["classifier.weight", "classifier.bias"] and heads["llama"] == []
    forced = burnish.tune(tiny("llama", tie_word_embeddings=False)[0], "lora(rank=4)", head=True)
    assert [n for n, _ in forced.named_parameters() if ".burnish." not in n] == ["lm_head.weight"]


# -- copies, pickles, compilation ----------------------------------------------------------------

RECIPES = ["lora(rank=4)", "dora(rank=4)", "snella(rank=4)", "shira(rank=2)", "pissa(rank=4)",
           "full", "nf4 + lora(rank=4)"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_deep_copy_computes_and_trains_alone(recipe):
    tuned = stir(burnish.tune(mlp(), recipe), size=0.2)
    x = torch.randn(3, 32)
    want = tuned.model(x)
    twin = copy.deepcopy(tuned.model)
    torch.testing.assert_close(twin(x), want, rtol=0, atol=0)
    twin(x).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in tuned.model.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    torch.testing.assert_close(tuned.model(x), want, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pickle_computes_the_same(recipe):
    tuned = stir(burnish.tune(mlp(), recipe), size=0.2)
    x = torch.randn(3, 32)
    buffer = io.BytesIO()
    torch.save(tuned.model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(tuned.model)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin(x), tuned.model(x), rtol=0, atol=0)
        assert type(twin).__name__ == "Sequential" and isinstance(twin, nn.Sequential)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("recipe", ["lora(rank=4) + coded", "lora(rank=4) + lean(on=False)",
                                    "lora(rank=4) + offload(to='disk', threshold=1)",
                                    "lora(rank=4) + coded + offload(to='disk', threshold=1)"])
def test_a_copy_keeps_for_backward_what_the_model_keeps(recipe, way):
    tuned = burnish.tune(mlp(), recipe)
    x = torch.randn(64, 32)

    def kept(model: nn.Module) -> int:
        ledger = Ledger(model)
        ledger.watch("activations", [x])
        with ledger:
            y = model(x).square().sum()
            alive = sum(e.bytes for e in ledger.entries if e.death is None)
            y.backward()
        return alive

    twin = way(tuned.model)
    assert kept(twin) == kept(tuned.model)
    assert kept(twin) == kept(tuned.model)           # and neither holds what the other packs
    for p, q in zip(twin.parameters(), tuned.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)


def test_compiled_without_a_backend():
    compiled_agrees("lora(rank=4)", "eager")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dora(rank=4)", "lora(rank=4, dropout=0.3)", "miss(rank=4)",
                                    "snella(rank=4)", "full"])
def test_others_compiled_without_a_backend(recipe):
    compiled_agrees(recipe, "eager")


def compiled_agrees(recipe, backend):
    torch._dynamo.reset()
    tuned = stir(burnish.tune(mlp(), recipe), size=0.2)
    tuned.model.double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    fast = torch.compile(tuned.model, backend=backend)
    results = []
    for f in (tuned.model, fast):
        torch.manual_seed(3)
        y = f(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *tuned.parameters()])
        results.append((y, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora(rank=4)", "dora(rank=4)"])
def test_compiled_with_inductor(recipe):
    compiled_agrees(recipe, "inductor")


def test_a_scripted_signature_is_the_bases():
    import inspect

    model, _ = tiny("vit")
    want = inspect.signature(model.forward)
    burnish.tune(model, "lora(rank=4)")
    assert inspect.signature(model.forward) == want


# -- precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", ["lora(rank=4)", "dora(rank=4)", "snella(rank=4)",
                                    "miss(rank=4)", "shira(rank=2)", "pissa(rank=4)", "full",
                                    "lora(rank=4) + checkpoint"])
@pytest.mark.parametrize("model", ["vit", "cnn"])
def test_autocast_comes_close_and_gradients_arrive_in_fp32(recipe, model):
    if model == "cnn" and "checkpoint" in recipe:
        recipe = "lora(rank=4)"
    net, batch = tiny(model)
    tuned = stir(burnish.tune(net, recipe, head=False), size=0.2)
    loss = tuned.loss(batch)
    want = torch.autograd.grad(loss, list(tuned.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        cast = tuned.loss(batch)
    got = torch.autograd.grad(cast, list(tuned.parameters()))
    torch.testing.assert_close(cast.float(), loss, rtol=3e-2, atol=3e-2)
    total = sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))
    assert total < 0.02 * sum(float(b.square().sum()) for b in want)
    assert all(a.dtype == p.dtype for a, p in zip(got, tuned.parameters(), strict=True))


def test_autocast_keeps_no_copy_of_a_weight():
    """The cast weight is made again in backward; stock autocast keeps one per linear."""
    tuned = burnish.tune(mlp(), "lora(rank=4)", head=False)
    tape, kept = tuned.state.tape, []
    pack = tape.pack
    tape.pack = lambda t: (kept.append((tuple(t.shape), t.dtype)), pack(t))[1]
    x = torch.randn(7, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tuned.model[0](x).sum()                     # outside the root nothing is recorded
        tuned.model(x)
    shapes = [s for s, dtype in kept if dtype == torch.bfloat16]
    assert shapes and not [s for s in shapes if s in ((64, 32), (32, 64), (64, 64))]


def test_backward_inside_autocast():
    tuned = stir(burnish.tune(mlp(), "lora(rank=4) + l2_sp"), size=0.2)
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        square(tuned.model(x), None).backward()
    assert all(p.grad.dtype == torch.float32 for p in tuned.parameters())


def test_second_derivatives_are_refused_not_wrong():
    tuned = stir(burnish.tune(mlp(), "snella(rank=4)", head=False), size=0.2)
    x = torch.randn(3, 32, requires_grad=True)
    y = tuned.model(x).square().sum()
    with pytest.raises(RuntimeError, match="once_differentiable; .* torch.func"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "dora(rank=2)", "snella(rank=2)", "houlsby",
                                    "oft(block=4)", "nf4 + lora(rank=2)", "lora(rank=2) + lean",
                                    "lora(rank=2) + checkpoint", "lora(rank=2) + coded"])
def test_a_product_with_the_hessian_is_right_or_refused(recipe):
    """Against a difference of gradients; torch's own mark would leave out a part in silence."""
    net, batch = tiny("timm_qkv")
    tuned = stir(burnish.tune(net.double(), recipe, seed=0), size=0.1)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    ps = [p for p in tuned.parameters() if p.requires_grad]
    vs = [torch.randn_like(p) for p in ps]

    def gradient(**how):
        return torch.autograd.grad(tuned.model(**batch).loss, ps, allow_unused=True, **how)

    try:
        found = gradient(create_graph=True)
    except RuntimeError as error:
        assert "once_differentiable" in str(error)
        return
    along = sum((g * v).sum() for g, v in zip(found, vs, strict=True) if g is not None)
    got = torch.autograd.grad(along, ps, allow_unused=True)
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, v in zip(ps, vs, strict=True):
                p.add_(v, alpha=step)
        ends.append(gradient())
    for h, a, b in zip(got, *ends, strict=True):
        if a is not None:
            exact = (a - b) / 2e-5
            assert torch.allclose(h, exact, atol=1e-4 * float(exact.abs().max()) + 1e-9)


# -- with others ---------------------------------------------------------------------------------

def test_accelerate_prepares_model_and_optimizer():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "snella(rank=4, s=0.1) + checkpoint")
    tuned.total_steps = 4
    model, opt = accelerator.prepare(net, tuned.optimizer(lr=1e-2))
    losses = []
    for _ in range(4):
        opt.zero_grad()
        loss = model(**batch).loss
        accelerator.backward(loss)
        opt.step()
        losses.append(float(loss.detach()))
    assert tuned.timeline.step == 4 and losses[-1] < losses[0]
    accelerator.unwrap_model(model)
    assert accelerator.unwrap_model(model) is net


def test_the_models_own_checkpointing_still_works():
    """gradient_checkpointing_enable() of transformers, instead of ours."""
    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net, "lora(rank=4)"), size=0.2)
    want = torch.autograd.grad(tuned.loss(batch), list(tuned.parameters()))
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = torch.autograd.grad(tuned.loss(batch), list(tuned.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_generation_runs():
    net, batch = tiny("llama")
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net.eval(), "lora(rank=4) + checkpoint")
    ids = batch["input_ids"]
    want = base.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(net.generate(ids, max_new_tokens=4, do_sample=False), want)
    assert tuned.model is net


def with_an_unused_tensor():
    """A model that owns a tensor no batch uses, as DINOv2 its mask token."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model.register_parameter("mask_token", nn.Parameter(torch.zeros(1, 8)))
    return model, (torch.randn(4, 8), torch.arange(4) % 3)


def test_a_whole_selection_names_what_the_batch_does_not_use():            # findings 3.7
    model, batch = with_an_unused_tensor()
    tuned = burnish.tune(model, "full")
    loss = lambda out, b: nn.functional.cross_entropy(out, b[1])  # noqa: E731
    for _ in range(2):
        tuned.step(batch, loss=loss)
    assert model.mask_token.abs().sum() == 0
    notes = [n for n in tuned.summary()["notes"] if "mask_token" in n]
    assert len(notes) == 1 and "no gradient" in notes[0]


def test_a_selection_of_nothing_but_unused_tensors_is_refused():           # findings 3.7
    model, batch = with_an_unused_tensor()
    tuned = burnish.tune(model, "full(targets='mask_token')", head=False)
    with pytest.raises(burnish.BurnishError):
        tuned.step(batch, loss=lambda out, b: nn.functional.cross_entropy(out, b[1]))


def test_dinov2_trains_whole():                                            # findings 3.7
    import transformers

    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                       image_size=16, patch_size=4, num_labels=3)
    model = transformers.Dinov2ForImageClassification(config)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    tuned = burnish.tune(model, "full", example=batch)
    tuned.step(batch)
    assert any("mask_token" in n for n in tuned.summary()["notes"])
