"""PEFT folders, read and written, against what `peft` itself makes of them."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model

from burnish.core.errors import FormatError
from burnish.formats import peft_files
from burnish.formats.peft_files import targets
from burnish.formats.peft_folder import Lora, PeftFolder
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8}),
    "llama rslora": ("llama", {"target_modules": ["v_proj"], "r": 4, "use_rslora": True}),
    "llama dora": ("llama", {"target_modules": ["q_proj"], "r": 2, "use_dora": True}),
    "llama patterns": ("llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 16,
                                 "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 6},
                                 "alpha_pattern": {"mlp.gate.*": 3,
                                                   "^model.layers.1.mlp.up_proj": 5}}),
    "vit with head": ("vit", {"target_modules": ["q_proj", "v_proj"], "r": 4,
                              "modules_to_save": ["classifier"]}),
    "vit convolution": ("vit", {"target_modules": ["projection", "q_proj"], "r": 3}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True}),
    "gpt2 embedding": ("gpt2", {"target_modules": ["wte", "c_proj"], "r": 4,
                                "fan_in_fan_out": True}),
    "bert with head": ("bert", {"target_modules": ["query", "value"], "r": 4,
                                "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "bert dora": ("bert", {"target_modules": ["dense"], "r": 2, "use_dora": True}),
}


def made(name, config, folder):
    """A tuned PEFT model with random values everywhere, and its saved folder."""
    model, batch = tiny(name)
    torch.manual_seed(1)
    tuned = get_peft_model(model, config).eval()
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    tuned.save_pretrained(folder)
    return tuned, batch


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(params=CASES, ids=str)
def case(request, tmp_path):
    name, kw = CASES[request.param]
    return name, *made(name, LoraConfig(**kw), tmp_path / "from_peft"), tmp_path


def test_factors_mean_what_peft_takes_them_for(case):
    _, tuned, _, tmp = case
    read = peft_files.read(tmp / "from_peft")
    layers = {n: m for n, m in tuned.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(read.loras) == set(layers)
    for path, x in read.loras.items():
        delta = layers[path].get_delta_weight("default")
        if layers[path].__class__.__name__ == "Embedding" or getattr(
                layers[path], "fan_in_fan_out", False):
            delta = delta.T
        assert torch.allclose(x.scale * x.B @ x.A, delta.flatten(1), atol=1e-6), path


def test_a_folder_written_again_loads_to_the_same_outputs(case):
    name, tuned, batch, tmp = case
    read = peft_files.read(tmp / "from_peft")
    model, _ = tiny(name)
    peft_files.write(tmp / "again", read, [n for n, _ in model.named_modules()])
    back = PeftModel.from_pretrained(model, tmp / "again").eval()
    assert torch.allclose(outputs(back, batch), outputs(tuned, batch), atol=1e-6)
    assert not torch.allclose(outputs(back, batch), outputs(tiny(name)[0].eval(), batch),
                              atol=1e-3)
    config = peft.PeftConfig.from_pretrained(tmp / "again")
    was = peft.PeftConfig.from_pretrained(tmp / "from_peft")
    assert config.use_dora == was.use_dora and config.use_rslora == was.use_rslora
    assert config.fan_in_fan_out == was.fan_in_fan_out


@pytest.mark.parametrize("mini", [False, True])
def test_miss_both_ways(tmp_path, mini):
    kw = {"init_weights": "mini", "mini_r": 8} if mini else {}
    config = MissConfig(r=6, target_modules=["q_proj", "gate_proj"], **kw)
    tuned, batch = made("llama", config, tmp_path / "a")
    read = peft_files.read(tmp_path / "a")
    assert read.kind == "MISS" and read.mini == mini and len(read.blocks) == 4
    model, _ = tiny("llama")
    peft_files.write(tmp_path / "b", read, [n for n, _ in model.named_modules()])
    back = PeftModel.from_pretrained(model, tmp_path / "b").eval()
    assert torch.allclose(outputs(back, batch), outputs(tuned, batch), atol=1e-6)


def test_targets_name_these_modules_and_no_others():
    names = ["", "a", "a.q", "a.v", "b", "b.q", "b.v", "c.a.q"]
    assert targets({"a.v", "b.v"}, names) == ["v"]
    assert targets({"b.q", "b.v"}, names) == ["b.q", "b.v"]
    assert targets({"a.q"}, names) == "^(a\\.q)$"              # "c.a.q" ends with it


@pytest.fixture
def folder(tmp_path):
    made("llama", LoraConfig(target_modules=["q_proj"], r=2), tmp_path / "p")
    return tmp_path / "p"


def edit(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


DAMAGE = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "is no PEFT folder"),
    "ours": (lambda f: edit(f, library="burnish"), r"read it with burnish.load\(model, folder\)"),
    "other type": (lambda f: edit(f, peft_type="NOVEL"), "type 'NOVEL'; LORA"),
    "known type": (lambda f: edit(f, peft_type="XLORA"), "type 'XLORA': its gates ask"),
    "pickle": (pickled, "may hold a pickle"),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"),
                  "truncated"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa_niter_4"), "base PEFT had changed"),
    "biases": (lambda f: edit(f, bias="some"), "expected 'none', 'all' or"),
    "dora without": (lambda f: edit(f, use_dora=True), "use_dora is True but .* has no magnitude"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_what_cannot_be_read_is_said_in_one_line(folder, damage):
    act, message = DAMAGE[damage]
    act(folder)
    with pytest.raises(FormatError, match=message) as caught:
        peft_files.read(folder)
    assert "\n" not in str(caught.value)


def test_a_module_peft_cannot_save_alone(tmp_path):
    what = PeftFolder(loras={"q": Lora(torch.zeros(1, 2), torch.zeros(2, 1))},
                                 saved=["classifier"])
    with pytest.raises(FormatError, match="would take 'pre_classifier' too"):
        peft_files.write(tmp_path, what, ["q", "classifier", "pre_classifier"])
    what.saved.append("pre_classifier")
    peft_files.write(tmp_path, what, ["q", "classifier", "pre_classifier"])
