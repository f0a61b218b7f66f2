"""A silent no-op is the worst way to fail: what the self-checks catch and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import CheckError
from burnish.testing.models import NAMES, tiny


class Skips(nn.Module):
    """`unused` is never called; `cut` is called and its gradient thrown away."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.cut = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x, labels=None):
        h = torch.tanh(self.used(x)) + self.cut(x).detach()
        y = self.out(h)
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


BATCH = {"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 2, 0])}


def unchanged(model):
    assert not any(".burnish" in f".{n}" for n, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("recipe, settings", [
    ("lora(rank=2)", {"targets": "used,{}", "head": False}),
    ("snella(rank=2)", {"targets": "used,{}", "head": False}),
    ("miss(rank=2)", {"targets": "used,{}", "head": False}),
])
@pytest.mark.parametrize("target", ["unused", "cut"])
def test_an_adapter_nobody_calls_is_found_before_anything_runs(recipe, settings, target):
    model = Skips()
    settings = {k: v.format(target) if isinstance(v, str) else v for k, v in settings.items()}
    said = f"no gradient from the loss.*{target}.*check targets"
    with pytest.raises(CheckError, match=said) as e:
        burnish.tune(model, recipe, example=BATCH, **settings)
    assert e.value.exit_code == 4 and "\n" not in str(e.value)
    assert "used.burnish" not in str(e.value).replace("unused.burnish", "")
    unchanged(model)


@pytest.mark.parametrize("target", ["unused", "cut"])
def test_a_base_tensor_nobody_uses_is_named(target):
    """Of a whole selection some tensors may stay as they are; the summary says which."""
    tuned = burnish.tune(Skips(), "full", example=BATCH)
    assert f"{target}.weight" in repr(tuned) and "get no gradient" in repr(tuned)


def test_everything_cut_off_is_said_too():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).detach().sum()

    with pytest.raises(CheckError, match="no part in the loss"):
        burnish.tune(Dead(), "lora(rank=2)", head=False, example=torch.randn(2, 8))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("mixtral", "qwen_moe", "clip")])
def test_sound_recipes_pass_on_every_architecture(name):
    """And the check changes nothing: weights, gradients, random state."""
    net, batch = tiny(name, dropout=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    torch.manual_seed(11)
    want = torch.rand(1)
    torch.manual_seed(11)
    tuned = burnish.tune(net, "lora(rank=2)", example=batch)
    assert torch.equal(torch.rand(1), want)
    assert all(p.grad is None and not p.is_meta for p in net.parameters())
    for n, p in net.named_parameters():
        assert n not in before or torch.equal(before[n], p), n
    tuned.step(batch)


@pytest.mark.parametrize("recipe", ["lora(rank=4) + checkpoint", "nf4 + dora(rank=4)",
                                    "snella(rank=4) + offload(to='disk', threshold=1)",
                                    "houlsby(bottleneck=4)", "vpt", "lst(reduction=4)", "bitfit",
                                    "shira(rank=2)", "adalora(rank=2, init_rank=4)",
                                    "lora(rank=4, dropout=0.1) + galore(rank=2)"])
def test_sound_recipes_pass(recipe):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, recipe, example=batch)
    tuned.step(batch)


def test_the_first_step_checks_what_an_example_would_have():
    model = Skips()
    tuned = burnish.tune(model, "lora(rank=2, targets='used,unused')", head=False)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    with pytest.raises(CheckError, match="no gradient after the first step: unused.burnish") as e:
        tuned.step(BATCH)
    assert "used.burnish.default.lora.A" in str(e.value)
    assert all(torch.equal(before[n], p) for n, p in tuned.named_parameters())


def test_a_gradient_that_is_not_finite_is_named_before_the_update():
    tuned = burnish.tune(Skips(), "lora(rank=2, targets='used,out')", head=False)
    name, p = next(iter(tuned.named_parameters()))
    p.register_hook(lambda g: g * float("inf"))
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    with torch.no_grad():
        for n, q in tuned.named_parameters():
            if n.endswith("B"):
                q.add_(0.1)
                before[n] = q.clone()
    with pytest.raises(CheckError, match=f"not finite in the first step: {name}"):
        tuned.step(BATCH)
    assert all(torch.equal(before[n], p) for n, p in tuned.named_parameters())


def test_many_names_are_counted_not_listed():
    model, batch = tiny("vit")
    tuned = burnish.tune(model, "lora(rank=2)")
    tuned.optimizer()
    with pytest.raises(CheckError, match=r"24 trainable tensors.* and 20 more"):
        tuned.current_optimizer.step()


def test_optimizers_without_gradients_are_left_alone():
    model, batch = tiny("vit")
    tuned = burnish.tune(model, "mezo + lora(rank=2)")
    assert torch.isfinite(tuned.step(batch))
