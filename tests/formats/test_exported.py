"""Whole models as ONNX: what onnxruntime answers is what the tuned model answers."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

import burnish
from burnish.cli import main
from burnish.core.errors import CheckError, ConfigError, FormatError
from burnish.formats import exported
from burnish.formats.exported import PACKAGES, export_onnx
from burnish.testing import stir
from burnish.testing.models import tiny


def test_without_its_packages_it_says_which_and_how(monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda n, *a: None if n in ("onnx", "onnxruntime") else found(n, *a))
    with pytest.raises(ConfigError, match=r"onnx, .*onnxruntime.*pip install 'burnish\[onnx\]'"):
        export_onnx(nn.Linear(2, 2), tmp_path / "o")
    # before anything is looked for
    assert main(["export", str(tmp_path / "none"), "--output", str(tmp_path / "o"), "--for",
                 "onnx"]) == 2
    assert "burnish[onnx]" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_rank_is_of_no_use_there(tmp_path, capsys):
    assert main(["export", str(tmp_path / "a"), "--output", str(tmp_path / "o"), "--for", "onnx",
                 "--rank", "4"]) == 2
    assert "onnx holds the merged weights" in capsys.readouterr().err


class Open(nn.Module):
    """Takes any batch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(4, 3)

    def example(self, samples):
        return {"x": torch.randn(samples, 4), "labels": torch.zeros(samples)}

    def forward(self, x, labels=None):
        return self.w(x)


class Looks(Open):
    """Goes by a value, which no graph can."""

    def forward(self, x, labels=None):
        return self.w(x) if x.sum().item() > 0 else -x


class One(Open):
    """Takes a batch of its own size alone."""

    def forward(self, x, labels=None):
        return self.w(x).view(2, 3) if x.shape[0] == 2 else self.w(x).view(-1)


if all(importlib.util.find_spec(p) is not None for p in PACKAGES):     # pip install burnish[onnx]
    def session(folder):
        import onnxruntime

        return onnxruntime.InferenceSession(str(folder / "model.onnx"),
                                            providers=["CPUExecutionProvider"])

    @pytest.mark.slow
    @pytest.mark.parametrize("name, recipe", [
        ("llama", "lora(rank=2)"), ("llama", "nf4 + lora(rank=2)"), ("bert", "dora(rank=2)"),
        ("vit", "lora(rank=2)")])
    def test_it_answers_as_the_tuned_model_does(tmp_path, name, recipe):
        model, batch = tiny(name)
        tuned = burnish.tune(model, recipe, head=False)
        stir(tuned, size=0.2)
        batch = {k: v for k, v in batch.items() if k != "labels"}
        text = "input_ids" in batch
        if text:                                            # sizes that the exporter never saw
            ids = batch["input_ids"].repeat(4, 3)[:4, :9]
            mask = torch.ones_like(ids)
            mask[1, 4:] = mask[3, 7:] = 0
            batch = {"input_ids": ids, "attention_mask": mask}
        else:
            batch = {"pixel_values": torch.randn(5, *batch["pixel_values"].shape[1:])}
        with torch.no_grad():
            want = tuned.model.eval()(**batch).logits
        done = export_onnx(tuned.merge(), tmp_path / "o")
        run = session(tmp_path / "o")
        got = torch.from_numpy(run.run(["logits"], {k: v.numpy() for k, v in batch.items()})[0])
        assert got.shape == want.shape
        assert torch.allclose(got, want, atol=2e-5, rtol=1e-4)
        assert 0 < done.difference < 1e-5
        axes = ["batch", "length"] if text else ["batch"]
        assert all(v[:len(axes)] == axes for v in done.inputs.values()), done.inputs
        assert done.outputs["logits"][0] == "batch"
        assert json.loads((tmp_path / "o" / "config.json").read_text())["model_type"]

    @pytest.mark.slow
    def test_experts_are_written_in_a_form_that_onnx_has(tmp_path):
        model, batch = tiny("mixtral")
        ids = batch["input_ids"][:, :7]
        with torch.no_grad():
            want = model.eval()(input_ids=ids).logits
        done = export_onnx(model, tmp_path / "o")
        feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        got = torch.from_numpy(session(tmp_path / "o").run(["logits"], feeds)[0])
        assert torch.allclose(got, want, atol=2e-5, rtol=1e-4)
        assert "experts token by token" in str(done)
        assert model.config._experts_implementation == "grouped_mm"    # here it stays as it was

    @pytest.mark.slow
    def test_weights_in_sixteen_bits_are_written_in_float32_and_say_so(tmp_path):
        model = tiny("vit")[0].bfloat16()
        done = export_onnx(model, tmp_path / "o")
        assert "its weights were bfloat16" in str(done)
        assert next(model.parameters()).dtype == torch.bfloat16       # the model stays as it was
        assert session(tmp_path / "o").get_inputs()[0].type == "tensor(float)"

    def test_a_plain_module_with_an_example_is_written_too(tmp_path):
        model = Open().eval()
        done = export_onnx(model, tmp_path / "o")
        x = torch.randn(7, 4)
        got = session(tmp_path / "o").run(None, {"x": x.numpy()})[0]
        assert torch.allclose(torch.from_numpy(got), model(x), atol=1e-6)
        assert done.inputs == {"x": ["batch", 4]} and done.outputs == {"output": ["batch", 3]}

    @pytest.mark.parametrize("kind", [Looks, One])
    def test_what_torch_cannot_follow_is_refused_and_leaves_nothing(tmp_path, kind):
        with pytest.raises(FormatError, match=f"torch cannot write {kind.__name__} as ONNX"):
            export_onnx(kind(), tmp_path / "o")
        assert list(tmp_path.iterdir()) == [] or not (tmp_path / "o").exists()

    def test_what_answers_otherwise_is_not_written(tmp_path, monkeypatch):
        monkeypatch.setattr(exported, "TOLERANCE", -1.0)
        with pytest.raises(CheckError, match="differ from torch's by .* nothing was written"):
            export_onnx(Open(), tmp_path / "o")
        assert not (tmp_path / "o").exists()

    @pytest.mark.slow
    def test_the_command_merges_checks_and_refuses_what_does_not_merge(tmp_path, capsys):
        model, _ = tiny("llama")
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "tokenizer.json").write_text("{}")
        for recipe in ("lora(rank=2)", "prompt_tuning(length=2)"):
            from transformers import LlamaForCausalLM

            own = LlamaForCausalLM.from_pretrained(tmp_path / "base")
            tuned = burnish.tune(own, recipe, head=False)
            stir(tuned, size=0.2)
            tuned.save(tmp_path / recipe[:4])
        capsys.readouterr()
        argv = ["--for", "onnx", "--base", str(tmp_path / "base"), "--output"]
        assert main(["export", str(tmp_path / "lora"), *argv, str(tmp_path / "o")]) == 0
        said = capsys.readouterr()
        assert "takes input_ids (batch, length)" in said.out and said.err == ""
        assert {p.name for p in (tmp_path / "o").iterdir()} >= {"model.onnx", "config.json",
                                                                "tokenizer.json"}
        assert main(["export", str(tmp_path / "prom"), *argv, str(tmp_path / "p")]) == 4
        assert "prompt_tuning" in capsys.readouterr().err and not (tmp_path / "p").exists()
        # a whole model's folder will do
        assert main(["export", str(tmp_path / "base"), "--for", "onnx", "--output",
                     str(tmp_path / "q")]) == 0
