"""Running statistics: what training moves beside the weights belongs to the adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import CheckError, ConfigError, FormatError
from burnish.testing.models import tiny


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 4)
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.classifier(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()


def batch(seed):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def train(tuned, steps=20, seed=0):
    tuned.model.train()
    tuned.optimizer(lr=1e-2)
    for k in range(steps):
        tuned.step((batch(seed + k), None), loss=lambda out, _: (out - 1).square().mean())
    return tuned


def answer(model, x=None):
    model.eval()
    with torch.no_grad():
        return model(batch(99) if x is None else x)


RECIPES = ["lora(rank=2)", "full", "norms", "ssf", "bitfit"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_and_loaded_onto_an_untouched_base(recipe, tmp_path):
    # findings 3.2
    tuned = train(burnish.tune(net(), recipe))
    want = answer(tuned.model)
    tuned.save(tmp_path / "a")
    assert torch.equal(answer(burnish.load(net(), tmp_path / "a").model), want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_detach_gives_them_back(recipe):
    # findings 3.2
    tuned = train(burnish.tune(net(), recipe))
    tuned.detach()
    for (k, a), b in zip(tuned.model.state_dict().items(), net().state_dict().values(),
                         strict=True):
        assert torch.equal(a, b), k


def test_disabled_answers_as_the_base_and_moves_nothing():
    # findings 3.2
    tuned = train(burnish.tune(net(), "lora(rank=2)"))
    want, moved = answer(tuned.model), tuned.model.bn.running_mean.clone()
    with tuned.disabled():
        assert torch.equal(answer(tuned.model), answer(net()))
        tuned.model.train()(batch(5))
        assert not torch.equal(tuned.model.bn.running_mean, net().bn.running_mean)
    assert torch.equal(tuned.model.bn.running_mean, moved)
    assert torch.equal(answer(tuned.model), want)


def test_disabled_between_forward_and_backward_breaks_no_graph():
    tuned = train(burnish.tune(net(), "lora(rank=2)", head=False))
    tuned.model.eval()
    out = tuned.model(batch(1))
    with tuned.disabled():
        tuned.model(batch(2))
    out.square().mean().backward()


def two():
    tuned = train(burnish.tune(net(), "lora(rank=2)", head=False))
    tuned.add("other", "lora(rank=2)", seed=1)
    tuned.add("still", "lora(rank=2)", seed=2)
    tuned.use("other")
    train(tuned, seed=50)
    return tuned


def test_each_adapter_has_its_own(tmp_path):
    # findings 3.2
    tuned = two()
    start, other = net().bn, {k: v.clone() for k, v in tuned.model.bn.state_dict().items()}
    want = {"other": answer(tuned.model)}
    for name in ("default", "still"):
        tuned.use(name)
        want[name] = answer(tuned.model)
    for k, v in start.state_dict().items():
        assert torch.equal(tuned.model.bn.state_dict()[k], v), "a new adapter stands on the base"
    for name in ("other", "default", "other"):
        tuned.use(name)
        assert torch.equal(answer(tuned.model), want[name])
    for k, v in other.items():
        assert torch.equal(tuned.model.bn.state_dict()[k], v)
    tuned.save(tmp_path / "a")
    again = burnish.load(net(), tmp_path / "a")
    for name in ("still", "other", "default"):
        again.use(name)
        assert torch.equal(answer(again.model), want[name])
    again.remove("default")
    again.save(tmp_path / "b")
    last = burnish.load(net(), tmp_path / "b")
    for name in ("still", "other"):
        last.use(name)
        assert torch.equal(answer(last.model), want[name])
    for t in (again, last, tuned):
        t.detach()
        assert torch.equal(answer(t.model), answer(net()))


def test_a_mix_lies_between_and_counters_stay():
    tuned = two()
    other = tuned.model.bn.running_var.clone()
    tuned.use("default")
    default = tuned.model.bn.running_var.clone()
    start = net().bn.running_var
    tuned.use({"default": 0.25, "other": 0.5})
    torch.testing.assert_close(tuned.model.bn.running_var,
                               start + 0.25 * (default - start) + 0.5 * (other - start))
    assert tuned.model.bn.num_batches_tracked == 0
    tuned.use("other")
    assert torch.equal(tuned.model.bn.running_var, other)


@pytest.mark.parametrize("weights", [{"default": 1.5}, {"default": -0.5, "other": 1.0},
                                     {"default": 0.7, "other": 0.7}], ids=str)
def test_a_mix_beyond_them_is_refused(weights):
    tuned = two()
    want = answer(tuned.model)
    with pytest.raises(ConfigError, match="bn.running_mean.*add up to 1"):
        tuned.use(weights)
    assert torch.equal(answer(tuned.model), want)
    tuned.use({"still": 2.0})


def test_per_sample_use_is_refused_for_those_who_moved_them():
    tuned = two()
    with pytest.raises(ConfigError, match="'default' has moved bn.running_mean"):
        tuned.use(["default", "still"] * 4)
    tuned.use(["still", None] * 4)


def test_unmerge_brings_them_back():
    # findings 3.2
    tuned = train(burnish.tune(net(), "lora(rank=2)"))
    want = answer(tuned.model)
    merged = tuned.merge()
    torch.testing.assert_close(answer(merged), want)
    merged.train()(batch(3))
    tuned.unmerge()
    assert torch.equal(answer(tuned.model), want)


def test_files_hold_only_those_that_moved(tmp_path):
    tuned = train(burnish.tune(net(), "lora(rank=2)", head=False), steps=1)
    assert {k for k in tuned.tensors() if "bn." in k} == {
        "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    quiet = burnish.tune(net().eval(), "lora(rank=2)", head=False)
    quiet.step((batch(0), None), loss=lambda out, _: out.square().mean())
    assert not {k for k in quiet.tensors() if "burnish" not in k}
    moved = tuned.tensors()
    moved["bn.running_mean"] = torch.zeros(9)
    from burnish.formats.placed import put

    with pytest.raises(FormatError, match="bn.running_mean has shape"):
        put(quiet, moved, "this")
    assert torch.equal(quiet.model.bn.running_mean, torch.zeros(8))


def test_a_checkpoint_without_them_puts_them_at_the_start():
    from burnish.formats.placed import put

    tuned = train(burnish.tune(net(), "lora(rank=2)", head=False))
    before = {k: v.clone() for k, v in tuned.tensors().items() if "burnish" in k}
    put(tuned, before, "this")
    assert torch.equal(tuned.model.bn.running_mean, torch.zeros(8))


def test_segformer_saves_and_detaches(tmp_path):
    # findings 3.2
    import transformers as t

    def made():
        torch.manual_seed(0)
        c = t.SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                              hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
                              num_attention_heads=[1, 2], mlp_ratios=[2, 2],
                              decoder_hidden_size=16, num_labels=3)
        return t.SegformerForSemanticSegmentation(c)

    x = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(0, 3, (2, 32, 32))}
    tuned = burnish.tune(made(), "lora(rank=2)")
    tuned.model.train()
    for _ in range(5):
        tuned.step(x)
    want = tuned.model.eval()(**x).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(made(), tmp_path / "a")
    assert torch.equal(again.model.eval()(**x).logits, want)
    tuned.detach()
    for (k, a), b in zip(tuned.model.state_dict().items(), made().state_dict().values(),
                         strict=True):
        assert torch.equal(a, b), k


def test_a_fixed_body_does_not_move():
    # findings 3.2
    tuned = train(burnish.tune(net(), "linear_probe"))
    for k, v in net().bn.state_dict().items():
        assert torch.equal(tuned.model.bn.state_dict()[k], v), k
    x = batch(3)
    with torch.no_grad():
        assert torch.equal(tuned.model.train()(x), tuned.model.eval()(x)), \
            "the features of a fixed body do not depend on what else is in the batch"
    assert tuned.model.bn.training is False and tuned.model.train().bn.training


def test_a_fixed_body_has_no_dropout():
    model, batch = tiny("bert")
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.5
    model.dropout.p = 0.0                             # part of the head
    tuned = burnish.tune(model.train(), "linear_probe")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
    tuned.detach()
    with torch.no_grad():
        other = model.train()(**batch).logits
        assert not torch.equal(model(**batch).logits, other)


def test_large_packed_integers_are_not_copied():
    from burnish.engine.buffers import movable

    model = net()
    model.register_buffer("packed", torch.zeros(1 << 19, dtype=torch.int32))
    model.register_buffer("small", torch.zeros(4, dtype=torch.int32))
    assert {n for n, _ in movable(model)} == {
        "small", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def test_what_cannot_be_exported_says_so(tmp_path):
    tuned = train(burnish.tune(net(), "lora(rank=2, targets='conv')", head=False))
    with pytest.raises((FormatError, CheckError), match="bn.running_mean"):
        burnish.export_peft(tuned, tmp_path / "p")
