"""Targets act or are refused, whatever the method, wherever and however they are written."""

from __future__ import annotations

import pytest

import burnish
from burnish.core import registry
from burnish.engine.slot import slots
from burnish.testing import choose, conformance
from burnish.testing.models import tiny

METHODS = choose.visited(conformance.methods())
MODELS = ("vit", "bert", "gpt2", "llama", "cnn", "clip", "mlp", "points")
#: texts that name a part, not all, of what methods act on by default
PARTS = ("linear@0", "norm@0", "layernorm_before", "k@0", "features.0", "features.1", "fc2@0",
         "v@0")


def host(method):
    """The first small model that takes the method."""
    return next(m for m in MODELS if conformance.refusal(method, m) is None)


def touched(tuned):
    """Everything the recipe stands on: what trains, where it stands, and what is stored in another
    form."""
    stored = {f"{path}.{p}" for path, _, slot in slots(tuned.model) for p in slot.providers}
    placed = {f"{path}:{p.key}" for path, _, slot in slots(tuned.model) for p in slot.parts}
    return {n for n, _ in tuned.named_parameters()} | stored | placed


def outcome(method, model, part=None, whole=None):
    """What the recipe touches, or the error."""
    net, batch = tiny(model)
    try:
        pieces = [burnish.parse(p)[0] for p in conformance.recipe(method).split(" + ")]
        if part is not None:
            own = {k: v for k, v in pieces[-1].changed().items() if v is not None}
            pieces[-1] = type(pieces[-1])(**own, targets=part)
        return touched(burnish.tune(net, pieces, targets=whole, head=False, calibration=[batch]))
    except burnish.BurnishError as e:
        assert not [n for n, _ in net.named_modules() if n.endswith("burnish")]
        return e


@pytest.mark.parametrize("where", ["part", "whole"])
@pytest.mark.parametrize("method", METHODS)
def test_targets_narrow_a_method_or_are_refused(method, where):          # findings 3.6
    """One of the texts leaves some of what it touches by default and nothing else; a method that
    no text narrows refuses them all. A list says what text says."""
    model = host(method)
    everything = outcome(method, model)
    narrowed = []
    for text in PARTS:
        got = outcome(method, model, **{where: text})
        if isinstance(got, burnish.BurnishError):
            assert len(str(got)) > 30
            continue
        assert got != everything, f"{text!r} narrowed nothing"
        assert got == outcome(method, model, **{where: [text]}), "a list says what text says"
        narrowed.append(bool(got) and got < everything)
        if narrowed[-1]:
            break
    assert not narrowed or narrowed[-1], f"no text narrowed it: {PARTS}"


@pytest.mark.parametrize("written", ["nonsense", ["nonsense"], "linear,nonsense", "nonsense@0"])
@pytest.mark.parametrize("where", ["part", "whole"])
@pytest.mark.parametrize("method", METHODS)
def test_targets_that_name_nothing_are_refused(method, where, written):  # findings 3.6
    assert isinstance(outcome(method, host(method), **{where: written}), burnish.BurnishError)


@pytest.mark.parametrize("recipe, name, targets, trained", [
    ("full", "llama", "embed_tokens", {"model.embed_tokens.weight"}),
    ("full(targets=['embed_tokens'])", "llama", None, {"model.embed_tokens.weight"}),
    ("full(targets=['q', 'k@0'])", "vit", None,
     {f"vit.layers.{i}.attention.q_proj.weight" for i in (0, 1)}
     | {"vit.layers.0.attention.k_proj.weight"}),
    ("full(targets='layernorm_after@1')", "vit", None,
     {f"vit.layers.1.layernorm_after.{x}" for x in ("weight", "bias")}),
    ("full(targets='cls_token')", "vit", None, {"vit.embeddings.cls_token"}),
    ("bitfit(targets='fc1@0')", "vit", None, {"vit.layers.0.mlp.fc1.bias"}),
    ("bitfit", "vit", "q", {f"vit.layers.{i}.attention.q_proj.bias" for i in (0, 1)}),
    ("norms(targets='re:.*layers.0.*')", "vit", None,
     {f"vit.layers.0.layernorm_{w}.{x}" for w in ("before", "after") for x in ("weight", "bias")}),
])
def test_a_selection_takes_targets_as_which_tensors(recipe, name, targets, trained):
    tuned = burnish.tune(tiny(name)[0], recipe, targets=targets, head=False)
    assert {n for n, _ in tuned.named_parameters()} == trained


@pytest.mark.parametrize("recipe", ["prefix(length=2)", "vpt(length=2)", "linear_probe",
                                    "lst(reduction=4)", "lisa(layers=1)", "prefix + checkpoint"])
def test_targets_that_no_part_uses_are_refused(recipe):                  # findings 3.6
    with pytest.raises(burnish.TargetError, match="targets 'q' do nothing in"):
        burnish.tune(tiny("vit")[0], recipe, targets="q")


@pytest.mark.parametrize("part", ["prefix", "vpt", "lst", "lisa", "linear_probe", "checkpoint",
                                  "lean", "offload", "adamw", "mezo", "l2_sp"])
def test_a_part_that_cannot_be_narrowed_says_so(part):                   # findings 3.6
    with pytest.raises(burnish.BurnishError, match=f"{part} takes no targets"):
        burnish.tune(tiny("vit")[0], f"lora + {part}(targets='q')")


def test_the_recipes_targets_are_for_the_parts_they_name():
    """LoRA on q and v, every norm, and a word about it."""
    tuned = burnish.tune(tiny("vit")[0], "lora(rank=4) + norms", targets="q,v", head=False)
    names = {n for n, _ in tuned.named_parameters()}
    assert sum("lora" in n for n in names) == 2 * 2 * 2
    assert sum("norm" in n for n in names) == 2 * (2 * 2 + 1)
    assert any("norms is not narrowed" in n for n in tuned.summary()["notes"])


def test_a_target_that_names_rows_is_no_whole_tensor():
    for recipe in ("full(targets='q')", "bitfit(targets='q')", "ssf(targets='q')"):
        with pytest.raises(burnish.TargetError, match="rows"):
            burnish.tune(tiny("timm_qkv")[0], recipe)


def test_targets_written_as_a_list_survive_text_and_files(tmp_path):
    part = registry.find("lora")(rank=4, targets=["q", "v"])
    assert burnish.parse(str(part))[0] == part
    tuned = burnish.tune(tiny("vit")[0], part, head=False)
    names = {n for n, _ in tuned.named_parameters()}
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit")[0], tmp_path / "a")
    assert {n for n, _ in again.named_parameters()} == names


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "miss", "mola", "shira"])
def test_default_targets_leave_out_what_is_too_small_for_the_rank(method):   # newcomer A5
    """Mamba's dt_proj (64 x 2) has no rank 4: left out by default, refused when it is named."""
    rank, kw = (2, {"time_step_rank": 1}) if method == "shira" else (4, {"time_step_rank": 2})
    tuned = burnish.tune(tiny("mamba", **kw)[0], f"{method}(rank={rank})", head=False)
    names = " ".join(n for n, _ in tuned.named_parameters())
    assert "in_proj" in names or "x_proj" in names
    if method != "mola":                         # dt_proj is no linear that is called
        assert any(f"{method} leaves 2 of" in n for n in tuned.summary()["notes"])
        with pytest.raises(burnish.RecipeError, match="does not fit|asks for"):
            burnish.tune(tiny("mamba", **kw)[0], f"{method}(rank={rank})", targets="dt_proj,x_proj")


def test_a_rank_that_no_weight_takes_is_refused():
    with pytest.raises(burnish.RecipeError, match="does not fit"):
        burnish.tune(tiny("mlp")[0], "lora(rank=33)")


def test_a_network_of_recurrent_weights_says_how_to_train_them():            # newcomer A5
    from torch import nn

    net = nn.Sequential(nn.LSTM(8, 8))
    with pytest.raises(burnish.TargetError, match=r"full\(targets='0'\)"):
        burnish.tune(net, "lora")
    tuned = burnish.tune(net, "full(targets='0')", head=False)
    assert len(list(tuned.parameters())) == 4
