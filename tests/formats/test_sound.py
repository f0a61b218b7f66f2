"""What a file may not make us believe: its values, its settings, its size, its names."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import BurnishError, ConfigError, FormatError
from burnish.fit import checkpoint
from burnish.formats import peft_files, safe
from burnish.formats.card import code, model_card, words
from burnish.formats.folder import CONFIG, TENSORS, read_adapter, write_adapter
from burnish.formats.peft_folder import Lora, PeftFolder


class Doubled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A linear in all but name."""


def net(first: type = nn.Linear, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("fc", first(8, 8))
    model.add_module("out", nn.Linear(8, 8, bias=False))
    if tied:
        model.add_module("again", nn.Linear(8, 8, bias=False))
        model.again.weight = model.out.weight
    return model


def peft_folder(folder, **settings):
    what = PeftFolder(loras={"fc": Lora(torch.ones(2, 8), torch.ones(8, 2))})
    peft_files.write(folder, what, ["fc", "out"])
    config = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


# -- values ---------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_neither_saved_nor_loaded(tmp_path, bad, dtype):
    """findings 4.4"""
    tuned = burnish.tune(net(), "lora(rank=2)", targets="fc", head=False)
    tuned.save(tmp_path / "a")
    with torch.no_grad():
        next(iter(tuned.parameters())).view(-1)[3] = bad
    with pytest.raises(BurnishError, match="NaN or infinite values; nothing was saved"):
        tuned.save(tmp_path / "a")
    burnish.load(net(), tmp_path / "a").detach()
    name = next(iter(safe.header(tmp_path / "a" / TENSORS)))
    tensors = {k: v.to(dtype) for k, v in safe.load_file(tmp_path / "a" / TENSORS).items()}
    tensors[name].view(-1)[3] = bad
    safe.save_file(tensors, tmp_path / "a" / TENSORS)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    config.pop("tensors_sha256")
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(FormatError, match="holds NaN or infinite values"):
        burnish.load(net(), tmp_path / "a")
    peft = peft_folder(tmp_path / "p")
    tensors = safe.load_file(peft / TENSORS)
    next(iter(tensors.values())).view(-1)[0] = bad
    safe.save_file(tensors, peft / TENSORS)
    with pytest.raises(FormatError, match="holds NaN or infinite values"):
        burnish.load_peft(net(), peft)


def test_any_flipped_bit_of_a_checkpoint_is_noticed_before_a_run_goes_on(tmp_path):
    """findings 4.4"""
    with checkpoint.writing(tmp_path / "checkpoint-4") as new:
        safe.save_file({"a": torch.ones(40)}, new / "adapter_model.safetensors")
        safe.write_json(new / "loop.json", {"tree": {"x": 1}})
        safe.write_text(new / "trainer_state.json", '{"global_step": 4}')
    folder = checkpoint.find(tmp_path, True)
    assert folder is not None and checkpoint.changed(folder) is None
    checkpoint.rewrite(folder, "trainer_state.json", '{"global_step": 4, "best": 1}')
    assert checkpoint.find(tmp_path, True) == folder
    for name in ("adapter_model.safetensors", "loop.json", "trainer_state.json"):
        good = (folder / name).read_bytes()
        for at in (0, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[at] ^= 4
            (folder / name).write_bytes(bytes(bad))
            for resume in (True, "auto", folder):
                with pytest.raises(FormatError, match=f"{name} is not what was saved"):
                    checkpoint.find(tmp_path, resume)
        (folder / name).write_bytes(good)
    assert checkpoint.find(tmp_path, True) == folder


# -- settings -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings,says",
    [
        ({"lora_alpha": float("nan")}, "NaN; expected a finite number"),
        ({"lora_alpha": float("inf")}, "expected a finite number"),
        ({"lora_alpha": None}, "finite number"),
        ({"lora_alpha": "16"}, "'lora_alpha' should be a finite number, got '16'"),
        ({"use_rslora": "false"}, "'use_rslora' should be true or false, got 'false'"),
        ({"use_dora": 0}, "'use_dora' should be true or false"),
        ({"r": 3}, "has rank 2, its settings say 3"),
        ({"r": 2.0}, "'r' should be a whole number"),
        ({"lora_dropout": 1.5}, "a share from 0 to 1"),
        ({"rank_pattern": {"fc": 7}}, "its settings say 7"),
        ({"alpha_pattern": {"(": 1}}, "no regular expr"),
        ({"alpha_pattern": {"(.*)*x": 1}, "lora_alpha": 2}, None),
        ({"alpha_pattern": []}, "names to numbers"),
        ({"modules_to_save": "out"}, "should be a list of texts"),
    ],
)
def test_settings_of_peft_are_what_they_should_be(tmp_path, settings, says):
    """findings 4.4, 4.5"""
    folder = peft_folder(tmp_path / "p", **settings)
    if says is None:
        burnish.load_peft(net(), folder).detach()
    else:
        with pytest.raises(FormatError, match=says):
            burnish.load_peft(net(), folder)


@pytest.mark.parametrize(
    "settings,says",
    [
        ({"head": "false"}, "'head' should be true or false"),
        ({"seed": "1"}, "'seed' should be a whole"),
        ({"base": []}, "'base' should be a mapping"),
        ({"recipe": 3}, "'recipe' should be text"),
        ({"adapters": {"x": {}}}, "adapter 'x': field 'recipe' is missing"),
        ({"adapters": {"x": 1}}, "a mapping"),
        ({"active": [["default"]]}, "pairs of a name and a weight"),
        ({"selected": "x"}, "a list of texts"),
        ({"active": [["default", float("nan")]]}, "finite number"),
        ({"format": True}, "should be a number"),
        ({"targets": {"a": 1}}, "text or a list of texts"),
        ({"base": {"fingerprint": 3}}, "a mapping"),
    ],
)
def test_settings_of_ours_are_what_they_should_be(tmp_path, settings, says):
    tuned = burnish.tune(net(), "lora(rank=2)", targets="fc", head=False)
    tuned.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | settings
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(FormatError, match=says):
        burnish.load(net(), tmp_path / "a")


# -- sizes ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "recipe",
    [
        "lora(rank=99999999)",
        "lora(rank=600000)",
        "lora(rank=2000)",
        "dora(rank=5000)",
        "miss(rank=4096)",
        "lora(rank=-3)",
    ],
)
def test_a_recipe_that_asks_for_more_than_its_file_holds_makes_nothing(
    tmp_path, monkeypatch, recipe
):
    """findings 4.5"""
    tuned = burnish.tune(net(), "lora(rank=2)", targets="fc", head=False)
    tuned.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    config["adapters"]["default"]["recipe"] = recipe
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    model, made = net(), []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or real(*a, **k))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(BurnishError):
        burnish.load(model, tmp_path / "a")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    again = burnish.tune(model, "lora(rank=2)", targets="fc", head=False)  # and it is free
    assert again.tensors()


def test_a_large_rank_that_the_file_does_hold_is_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(700, 700))
    tuned = burnish.tune(model, "lora(rank=600)", targets="0", head=False)
    tuned.save(tmp_path / "a")
    tuned.detach()
    assert burnish.load(model, tmp_path / "a").tensors()


def bert(folder, **settings):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            vocab_size=20,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "settings,says",
    [
        ({"vocab_size": 100_000_000}, "asks for 800,.* parameters, the weight files hold"),
        ({"hidden_size": 8192, "intermediate_size": 32768}, "they do not belong together"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers = 100000, but the weights are"),
        ({"num_hidden_layers": 10**12}, "no model has so many"),
    ],
)
def test_a_configuration_that_asks_for_more_than_its_files_hold_loads_nothing(
    tmp_path, settings, says
):
    """findings 4.5"""
    from burnish.cli import target
    from burnish.fit.data import Data
    from burnish.fit.tasks import TASKS

    folder = bert(tmp_path / "m", **settings)
    task = TASKS["text-classification"](Data("text-classification", {}, "x", "y", ("a", "b")))
    for load in (target.model, task.load):
        with pytest.raises(ConfigError, match=says):
            load(str(folder))


def test_pickled_weights_are_not_opened(tmp_path):
    """findings 4.6"""
    from burnish.cli import target

    folder = bert(tmp_path / "m")
    assert target.model(str(folder)).config.hidden_size == 8
    torch.save(safe.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickled weights are not opened"):
        target.model(str(folder))


# -- names ----------------------------------------------------------------------------------
def test_two_names_of_one_tensor_with_two_values_are_refused(tmp_path):
    """findings 4.7"""
    folder = peft_folder(tmp_path / "p", modules_to_save=["out", "again"])
    tensors = safe.load_file(folder / TENSORS)
    whole = {
        f"base_model.model.{n}.weight": torch.ones(8, 8) * k for n, k in (("out", 1), ("again", 2))
    }
    safe.save_file({**tensors, **whole}, folder / TENSORS)
    with pytest.raises(
        FormatError, match="again.weight and out.weight are one tensor.*two different"
    ):
        burnish.load_peft(net(tied=True), folder)
    whole = {n: torch.ones(8, 8) for n in whole}
    safe.save_file({**tensors, **whole}, folder / TENSORS)
    model = net(tied=True)
    burnish.load_peft(model, folder)
    assert torch.equal(model.out.weight.detach(), torch.ones(8, 8))


def test_a_class_with_a_forward_of_its_own_goes_neither_to_peft_nor_from_it(tmp_path):
    """findings 4.7: the two libraries would compute two functions of it."""
    tuned = burnish.tune(net(Doubled), "lora(rank=2)", targets="fc", head=False)
    with pytest.raises(FormatError, match="fc is a Doubled, whose forward is its own"):
        burnish.export_peft(tuned, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    folder = peft_folder(tmp_path / "q")
    with pytest.raises(FormatError, match="fc is a Doubled"):
        burnish.load_peft(net(Doubled), folder)
    tuned = burnish.load_peft(net(Named), folder)
    burnish.export_peft(tuned, tmp_path / "again")


NAMES = [
    "a`b``c",
    "x | y",
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit",
    "# head",
    "[a](b)",
    "*bold*",
    'quo"te',
    "back\\slash",
    "\ud800",
    "```\ncode",
    "`",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_names_and_nothing_else(name):
    """findings 4.7"""
    import yaml

    text = model_card({"base": {"name": name}, "recipe": name}, {"note": name, "n": {name: 0.25}})
    _, header, body = text.split("---\n", 2)
    found = yaml.safe_load(header)
    assert set(found) == {"library_name", "tags"}       # nothing that a hub could call a name
    outside = re.sub(r"(`+)[^`](?:.|\n)*?(?<!`)\1(?!`)", "", body)     # spans of code aside
    assert not re.search(r"(?<!\\)<", outside)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(line.replace("\\|", "").count("|") == 3 for line in rows)
    assert body.splitlines().count("```") == 1 and "license" not in found


def test_spans_of_code_hold_what_they_are_given():
    assert code("a") == "`a`" and code("a`b") == "``a`b``" and code("`") == "`` ` ``"
    assert words("a|b_c") == "a\\|b\\_c"


def test_a_folder_moved_elsewhere_is_still_ours(tmp_path):
    folder = write_adapter(tmp_path / "a", {"t": torch.ones(2)}, {"recipe": "lora", "base": {}})
    shutil.move(folder, tmp_path / "b")
    write_adapter(tmp_path / "b", {"t": torch.zeros(2)}, {"recipe": "lora", "base": {}})
    assert float(read_adapter(tmp_path / "b")[1]["t"].sum()) == 0
