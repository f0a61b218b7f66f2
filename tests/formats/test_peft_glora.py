"""PEFT's GLoRA where it moves biases, and AdaMSS whose clusters stopped training one by one."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AdamssConfig, GloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import burnish
from burnish.blocks.state.gates import Shift
from burnish.core.errors import FormatError
from burnish.formats.peft import export_peft, load_peft
from burnish.testing import stir
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def theirs_of(name, config, folder, size=0.2):
    model, batch = tiny(name)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(std=0.3)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    theirs = stir(get_peft_model(model, config), size=size)
    theirs.save_pretrained(folder)

    def fresh():
        net = tiny(name)[0]
        net.load_state_dict(base)
        return net

    return fresh, batch, outputs(theirs, batch)


@pytest.mark.parametrize("form, C, DE", [
    ("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "vector"),
    ("lora", "vector", "none")])
def test_a_bias_that_moves_is_a_shift_beside_it_and_goes_back(form, C, DE, tmp_path):
    config = GloraConfig(r=2, target_modules=["value", "output.dense"], config_A_B=form,
                         config_C=C, config_D_E=DE)
    fresh, batch, want = theirs_of("bert", config, tmp_path / "peft", 0.4)
    assert (outputs(fresh(), batch) - want).abs().max() > 1e-3
    model = fresh()
    tuned = load_peft(model, tmp_path / "peft")
    assert [m.name for m in tuned.recipe] == ["glora", "beft"]
    shifts = [m.shift for m in model.modules() if isinstance(m, Shift)]
    assert len(shifts) == 6 and all(s.any() for s in shifts)
    same(outputs(model, batch), want)
    tuned.save(tmp_path / "ours")
    same(outputs(burnish.load(fresh(), tmp_path / "ours").model, batch), want)
    export_peft(tuned, tmp_path / "again")
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["config_C"], said["config_D_E"]) == ("GLORA", "none", "vector")
    same(outputs(PeftModel.from_pretrained(fresh(), tmp_path / "again"), batch), want)
    same(outputs(tuned.merge(), batch), want)


def test_layers_without_a_shift_are_written_with_none(tmp_path):
    tuned = stir(burnish.tune(tiny("bert")[0], "glora(rank=2, targets='query,value') + "
                              "beft(targets='value')", head=False))
    _, batch = tiny("bert")
    export_peft(tuned, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    some = {n: t for n, t in tensors.items() if n.endswith("glora_E.X")}
    assert len(some) == 4 and all(t.any() == (".value." in n) for n, t in some.items())
    same(outputs(PeftModel.from_pretrained(tiny("bert")[0], tmp_path), batch),
         outputs(tuned.model, batch))


def test_a_shift_without_a_bias_to_move_is_refused(tmp_path):
    tuned = stir(burnish.tune(tiny("llama")[0], "glora(rank=2, targets='q') + beft(targets='q')",
                              head=False))
    with pytest.raises(FormatError, match="a shift of its outputs and no bias"):
        export_peft(tuned, tmp_path)


@pytest.mark.parametrize("leaf, other", [
    ("glora_C.Xd", None), ("glora_E.X", None), ("glora_D.X", torch.zeros(7)),
    ("glora_C.Xu", torch.zeros(3, 1))])
def test_a_damaged_bias_is_one_clear_error(leaf, other, tmp_path):
    fresh, _, _ = theirs_of("bert", GloraConfig(r=2, target_modules=["query"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(n for n in tensors if n.endswith(leaf))
    tensors.pop(key)
    save_file(tensors if other is None else {**tensors, key: other}, file)
    with pytest.raises(FormatError, match="lacks|other shapes") as caught:
        load_peft(fresh(), tmp_path)
    assert "\n" not in str(caught.value)


def test_clusters_that_had_stopped_are_read_as_they_ended(tmp_path):
    config = AdamssConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=["q_proj"],
                          use_asa=True, asa_target_subspaces=2, init_warmup=0, final_warmup=4,
                          mask_interval=1)
    model, batch = tiny("llama")
    theirs = stir(get_peft_model(model, config))
    for step in range(3):
        theirs(**batch).loss.backward()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)
        theirs.base_model.update_and_allocate(step)
        theirs.zero_grad()
    assert any(not p.requires_grad for n, p in theirs.named_parameters() if "adamss_A" in n)
    want = outputs(theirs, batch)
    theirs.save_pretrained(tmp_path / "peft")
    tuned = load_peft(tiny("llama")[0], tmp_path / "peft")
    same(outputs(tuned.model, batch), want)
    export_peft(tuned, tmp_path / "again")
    same(outputs(PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "again"), batch), want)
