"""The handle and its life: what it does after the model has gone on without it."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import CheckError, ConfigError
from burnish.engine import originals
from burnish.engine.owners import tuned_of
from burnish.engine.slot import slots
from burnish.testing.models import tiny


class Net(nn.Module):
    """A convolution with running statistics behind it, and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.proj, self.classifier = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x):
        h = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.classifier(torch.relu(self.proj(h)))


def net():
    torch.manual_seed(0)
    return Net()


def batches(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 6, 6, generator=g) * 3 + 5 for _ in range(n)]


def train(tuned, n=3, seed=0, lr=1e-2):
    tuned.model.train()
    tuned.optimizer(lr=lr)
    for x in batches(n, seed):
        tuned.step((x, None), loss=lambda out, _: (out - 1).square().mean())
    return tuned


def answer(model):
    model.eval()
    with torch.no_grad():
        return model(batches(1, 99)[0])


def same_state(model, want):
    got = model.state_dict()
    assert list(got) == list(want)
    for k, v in want.items():
        assert torch.equal(got[k], v), k


def kept(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


# -- detached -----------------------------------------------------------------------------------
CALLS = {
    "add": lambda t, f: t.add("x", "lora(rank=2)"), "use": lambda t, f: t.use("default"),
    "remove": lambda t, f: t.remove("default"), "recipe": lambda t, f: t.recipe,
    "parameters": lambda t, f: list(t.parameters()), "summary": lambda t, f: t.summary(),
    "named_parameters": lambda t, f: list(t.named_parameters()),
    "optimizer": lambda t, f: t.optimizer(), "loss": lambda t, f: t.loss(torch.ones(2)),
    "step": lambda t, f: t.step(torch.ones(2)), "merge": lambda t, f: t.merge(),
    "unmerge": lambda t, f: t.unmerge(), "save": lambda t, f: t.save(f / "a"),
    "tensors": lambda t, f: t.tensors(), "terms": lambda t, f: list(t.terms(nn.Module)),
    "disabled": lambda t, f: t.disabled().__enter__(),
    "check_gradients": lambda t, f: t.check_gradients(),
    "export": lambda t, f: burnish.export_peft(t, f / "a"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_detached_handle_says_so_and_touches_nothing(call, tmp_path):
    # findings 4.3
    model = net()
    old = train(burnish.tune(model, "lora(rank=2) + bitfit"))
    old.detach()
    new = train(burnish.tune(model, "dora(rank=2) + norms"), seed=5)
    before = kept(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="detached: the model is its base again.*burnish.tune"):
        CALLS[call](old, tmp_path)
    assert old.detach() is model, "a second time there is nothing to do"
    same_state(model, before)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert tuned_of(model) is new and not list(tmp_path.iterdir())
    train(new)


def test_a_detached_handle_shows_what_it_is():
    # findings 4.3
    tuned = burnish.tune(net(), "lora(rank=2)")
    assert tuned_of(tuned.model) is tuned
    tuned.detach()
    assert repr(tuned) == "Tuned(of a Net; detached: the model is its base again)"
    assert tuned_of(tuned.model) is None


@pytest.mark.parametrize("recipe", ["full", "lora(rank=2) + bitfit", "full + sgd",
                                    "full + step_in_backward"])
def test_an_optimizer_of_a_detached_handle_does_not_move_the_base(recipe):
    # findings 4.3
    model = net()
    want = kept(model)
    tuned = train(burnish.tune(model, recipe), lr=1e-3)
    opt = tuned.current_optimizer
    tuned.detach()
    model.eval()(batches(1)[0]).square().mean().backward()
    if "backward" not in recipe:
        with pytest.raises(ConfigError, match="detached"):
            opt.step()
    same_state(model, want)


def test_a_refused_tune_leaves_no_handle_and_the_flags_of_the_second():
    model = net()
    model.proj.weight.requires_grad_(False)
    with pytest.raises(burnish.BurnishError):
        burnish.tune(model, "lora(rank=999)")
    assert tuned_of(model) is None
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["proj.weight"]


@pytest.mark.parametrize("recipe", ["nf4 + lora(rank=2)", "bf16 + lora(rank=2)", "full",
                                    "lora(rank=2)", "nf4 + pissa(rank=2)"])
def test_parameters_are_the_same_objects_after_detach(recipe):
    # findings 4.3
    model = net()
    want, objects = kept(model), list(model.named_parameters())
    held = torch.optim.SGD(model.parameters(), lr=0.1)
    tuned = train(burnish.tune(model, recipe, targets="proj" if "4" in recipe else None))
    tuned.detach()
    for (n, p), (m, q) in zip(objects, model.named_parameters(), strict=True):
        assert n == m and p is q
    same_state(model, want)
    model(batches(1)[0]).square().mean().backward()
    held.step()                                       # whoever held them holds the model's
    assert not torch.equal(model.proj.weight, want["proj.weight"])


def test_parameters_are_the_same_objects_after_unmerge_and_merged_ones_too():
    model = net()
    fc = model.proj.weight
    tuned = burnish.tune(model, "nf4 + lora(rank=2)", targets="proj")
    assert fc.numel() == 0, "the full weight is gone while its codes stand for it"
    tuned.merge()
    assert model.proj.weight is fc and fc.shape == (64, 8)
    tuned.unmerge()
    assert fc.numel() == 0
    tuned.detach()
    assert model.proj.weight is fc and torch.equal(fc, net().proj.weight)


def test_a_tied_weight_keeps_its_form_under_a_storage():
    """The other end would go on holding it whole, and detach would untie the two."""
    model, batch = tiny("gpt2")
    tuned = burnish.tune(model, "bf16(targets='embedding,fc1') + lora(rank=4)")
    assert any("tied" in n for n in tuned.summary()["notes"])
    assert model.transformer.wte.weight is model.lm_head.weight
    tuned.step(batch)
    tuned.detach()
    assert model.transformer.wte.weight is model.lm_head.weight
    same_state(model, kept(tiny("gpt2")[0]))


# -- removing -----------------------------------------------------------------------------------
def test_remove_takes_one_adapter_out():
    model, batch = tiny("vit")
    tuned = burnish.tune(model, "nf4(targets='fc1') + lora(rank=4) + checkpoint")
    alone = {k for k in model.state_dict()}
    tuned.step(batch)
    want = {k: v.clone() for k, v in tuned.tensors().items()}
    tuned.add("other", "houlsby(bottleneck=4, norms=False) + bitfit + lean(on=False)", head=True)
    tuned.use("other")
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    tuned.remove("other")
    assert list(tuned.adapters) == ["default"] and tuned.state.active == (("default", 1.0),)
    assert set(model.state_dict()) == alone, "nothing of it is left, the storage stays"
    assert tuned.state.tape.lean
    assert {s.mode for _, _, s in slots(model)} == {None, "checkpoint"}
    for k, v in tuned.tensors().items():
        assert torch.equal(v, want[k]), k
    with pytest.raises(CheckError, match="optimizer"):
        tuned.step(batch)                            # made for what was removed
    with pytest.raises(CheckError, match="optimizer"):
        tuned.step(batch)                            # and still
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    tuned.add("other", "lora(rank=2)")               # the name is free
    tuned.detach()
    same_state(model, kept(tiny("vit")[0]))


def test_remove_the_first_and_its_modes_go_with_it(tmp_path):
    model, batch = tiny("vit")
    tuned = burnish.tune(model, "lora(rank=4) + checkpoint + lean(on=False)")
    tuned.add("other", "vpt(length=2)", head=True)
    tuned.add("third", "lora(rank=4) + bitfit", head=True)
    for name in ("other", "third"):
        tuned.use(name)
        tuned.optimizer(lr=1e-2)
        tuned.step(batch)
    model.eval()
    want = {}
    for name in ("other", "third"):
        tuned.use(name)
        want[name] = model(**batch).logits.detach()
    tuned.remove("default")
    assert not any(s.mode for _, _, s in slots(model)) and tuned.state.tape.lean
    assert not any(".default." in k for k in model.state_dict())
    for name in ("other", "third"):
        tuned.use(name)
        assert torch.equal(model(**batch).logits, want[name])
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit")[0], tmp_path / "a")
    again.model.eval()
    assert list(again.adapters) == ["other", "third"]
    torch.testing.assert_close(again.model(**batch).logits, want["third"])
    tuned.remove("other")
    assert not any(s.listeners for _, _, s in slots(model))
    with pytest.raises(ConfigError, match="only adapter.*detach"):
        tuned.remove("third")


def test_remove_refuses_what_is_not_there():
    tuned = burnish.tune(net(), "lora(rank=2)", name="french")
    tuned.add("law", "lora(rank=2)")
    with pytest.raises(ConfigError, match="did you mean 'french'"):
        tuned.remove("frnech")
    tuned.merge()
    with pytest.raises(ConfigError, match="merged"):
        tuned.remove("law")


def test_removing_the_active_one_uses_the_first_that_is_left():
    tuned = train(burnish.tune(net(), "lora(rank=2)"))
    tuned.add("other", "lora(rank=2) + bitfit", head=True)
    tuned.use("other")
    train(tuned, seed=3)
    for which in ("other", {"default": .5, "other": .5}):
        tuned.use(which)
        twin = copy.deepcopy(tuned)
        twin.remove("other")
        assert twin.state.active == (("default", 1.0),)
        tuned.use("default")
        assert torch.equal(answer(twin.model), answer(tuned.model))


# -- copies ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["full", "nf4 + lora(rank=2) + bitfit"])
def test_a_copy_of_a_handle_lives_on_its_own(recipe, monkeypatch):
    # findings 4.3
    monkeypatch.setattr(originals, "IN_MEMORY", 64)
    tuned = train(burnish.tune(net(), recipe, targets="proj" if "4" in recipe else None))
    twin = copy.deepcopy(tuned)
    assert twin.model is not tuned.model and tuned_of(twin.model) is twin
    want = answer(tuned.model)
    assert torch.equal(answer(twin.model), want)
    train(twin, seed=7)
    assert torch.equal(answer(tuned.model), want)
    tuned.detach()
    del tuned
    gc.collect()
    twin.detach()
    same_state(twin.model, kept(net()))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])
def test_a_model_is_copied_while_it_trains_and_detaches_afterwards(way):
    """The handle and its optimizer do not travel along."""
    tuned = train(burnish.tune(net(), "nf4(targets='proj') + lora(rank=2) + bitfit + l2_sp"))
    twin = way(tuned.model)
    want = answer(tuned.model)
    assert torch.equal(answer(twin), want) and tuned_of(twin) is None
    tuned.step((batches(1)[0], None), loss=lambda out, _: out.square().mean())
    assert torch.equal(answer(twin), want)
    tuned.detach()
    same_state(tuned.model, kept(net()))
    assert torch.equal(answer(twin), want)
    twin.train()(batches(1)[0]).square().mean().backward()


def test_a_handle_is_not_pickled():
    with pytest.raises(ConfigError, match="tuned.save"):
        pickle.dumps(burnish.tune(net(), "lora(rank=2)"))
