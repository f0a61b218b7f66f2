"""PEFT's POLY: the same outputs on both sides, for every task."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, PolyConfig, get_peft_model
from safetensors.torch import load_file, save_file

import burnish
from burnish.blocks.weight.skills import Skills
from burnish.core.errors import FormatError
from burnish.formats.peft import export_peft, load_peft
from burnish.testing import stir
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TASK = torch.tensor([2, 0])


def outputs(model, batch, **keys):
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}, **keys).logits


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("heads", [1, 4])
def test_peft_computes_what_we_exported(heads, tmp_path):
    model, batch = tiny("llama")
    base = outputs(model, batch)
    tuned = stir(burnish.tune(model, f"poly(rank=3, alpha=5.0, experts=3, tasks=3, slices={heads})",
                              head=False))
    ours = outputs(model, batch, task=TASK)
    assert (ours - base).abs().max() > 1e-4
    export_peft(tuned, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "POLY"
    same(outputs(PeftModel.from_pretrained(tiny("llama")[0], tmp_path), batch, task_ids=TASK), ours)


@pytest.mark.parametrize("tasks, splits", [(3, 4), (3, 1), (1, 2)])
def test_we_compute_what_peft_saved_and_give_it_back(tasks, splits, tmp_path):
    config = PolyConfig(target_modules=["q_proj", "down_proj"], r=3, n_tasks=tasks, n_skills=3,
                        n_splits=splits, task_type="CAUSAL_LM")
    model, batch = tiny("llama")
    theirs = stir(get_peft_model(model, config), size=0.2)
    theirs.save_pretrained(tmp_path / "peft")
    ids = TASK.clamp_max(tasks - 1)
    want = outputs(theirs, batch, task_ids=ids)
    keys = {"task": ids} if tasks > 1 else {}
    model, _ = tiny("llama")
    tuned = load_peft(model, tmp_path / "peft")
    assert tuned.recipe[0].noisy, "its gates are drawn in training, as PEFT's are"
    same(outputs(model, batch, **keys), want)
    tuned.save(tmp_path / "ours")
    export_peft(tuned, tmp_path / "again")
    again = burnish.load(tiny("llama")[0], tmp_path / "ours")
    same(outputs(again.model, batch, **keys), want)
    back = PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "again")
    same(outputs(back, batch, task_ids=ids), want)


def test_a_damaged_folder_is_one_clear_error(tmp_path):
    config = PolyConfig(target_modules=["q_proj", "down_proj"], r=3, n_tasks=2, n_splits=2)
    model, batch = tiny("llama")
    stir(get_peft_model(model, config)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    model, _ = tiny("llama")
    for key in list(tensors)[:3]:
        t = tensors[key]
        for other in (None, t[: t.shape[0] // 2].clone(), t[None].clone(), t.int() + 1000,
                      torch.full(t.shape, float("nan")), t[:0].clone()):
            changed = {k: v for k, v in tensors.items() if k != key}
            save_file(changed if other is None else {**changed, key: other}, file)
            with pytest.raises(burnish.BurnishError) as caught:
                load_peft(model, tmp_path)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not any("burnish" in n for n, _ in model.named_modules())


def test_some_rows_of_a_fused_weight_have_no_form(tmp_path):
    net, _ = tiny("timm_qkv")
    tuned = burnish.tune(net, "poly(rank=2)", targets="q,v", head=False)
    assert all(m.rows for _, m in tuned.branches(Skills))
    with pytest.raises(FormatError, match="POLY adds to all outputs of a linear"):
        export_peft(tuned, tmp_path)
