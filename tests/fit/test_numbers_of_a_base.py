"""A base held in other numbers than its files: read so, asked so, and found so again."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.fit.finished import Finished
from burnish.fit.pictures import Picture
from burnish.testing.scenes import segformer, shapes
from burnish.testing.sounds import AST, KINDS, made, tones


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10)), \
        Picture(8, 8, (0.5,), (0.5,))


def kept(folder, model, processor):
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("kind", [*KINDS, "segformer", "vit"])
def test_pictures_and_sounds_are_of_the_models_numbers(tmp_path, kind):
    """A processor makes fp32, which a bf16 model's first convolution would not take."""
    torch.manual_seed(0)
    if kind == "segformer":
        base, data = kept(tmp_path, *segformer()), shapes(tmp_path / "data", 6)
        asked = data / "images" / "0.jpg"
    elif kind == "vit":
        base, data, asked = kept(tmp_path, *vit()), "digits", None
    else:
        base, data = kept(tmp_path, *made(kind)), tones(tmp_path / "data", 4)
        asked = data / "low" / "0.wav"
    burnish.fit(str(base), str(data), "lora(rank=2)", output=tmp_path / "run", max_steps=2, lr=0.1,
                dtype="bfloat16", report=False, measure=False, quiet=True, batch_size=2)
    run = Finished.open(tmp_path / "run")
    held = {n: p.dtype for n, p in run.tuned.model.named_parameters()}
    assert held.pop(next(iter(held))) is torch.bfloat16
    rows, split, _ = run.chosen(str(data), None, {})
    batch = run.task.collate([rows[0]])
    floats = {k: v.dtype for k, v in batch.items() if v.is_floating_point()}
    assert set(floats.values()) == {torch.bfloat16}
    if asked is not None:
        assert [a["said"] for a in run.predict([str(asked)])]


def test_a_command_on_files_reads_a_base_as_it_was(tmp_path, capsys):
    """The folder of an adapter says what its base was of; the base's own files say fp32."""
    torch.manual_seed(0)
    base = kept(tmp_path, *made(AST))
    model = type(made(AST)[0]).from_pretrained(base, dtype=torch.bfloat16)
    tuned = burnish.tune(model, "lora(rank=2)", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.01)
    tuned.save(tmp_path / "adapter")
    call = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"),
            "--base", str(base), "--tolerance", "0.1"]
    assert main(call) == 0, capsys.readouterr().err
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
