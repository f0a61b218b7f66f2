"""LoRA beside a pipeline of diffusers: what diffusers loads computes what was trained, and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import burnish
from burnish.core.errors import FormatError
from burnish.core.example import example_batch
from burnish.formats.diffusers_files import FILE, METADATA
from burnish.formats.diffusers_lora import export_diffusers
from burnish.testing import stir
from burnish.testing.pipelines import PROMPTED, SD, SD3, prompted


def denoiser(pipe):
    return pipe.components.get("unet") or pipe.components["transformer"]


def answer(model):
    with torch.no_grad():
        return model.eval()(**example_batch(model, 2))[0]


def tuned_of(kind, recipe, **how):
    pipe = prompted(kind)
    tuned = burnish.tune(denoiser(pipe), recipe, head=False, **how)
    stir(tuned)
    return pipe, tuned


RECIPES = {
    "lora": "lora(rank=4)",
    "alpha": "lora(rank=4, alpha=3)",
    "rs": "lora(rank=4, alpha=5, scaling='rs')",
    "ranks": "lora(rank=2, alpha=3, targets='re:.*to_q') + lora(rank=4, targets='re:.*to_v')",
    "dora": "dora(rank=3, alpha=2)",
    "shift": "lora(rank=3, alpha=2) + beft",
    "pissa": "pissa(rank=2)",
}


@pytest.mark.parametrize("kind", PROMPTED)
@pytest.mark.parametrize("name", RECIPES)
def test_diffusers_computes_what_was_trained(tmp_path, kind, name):
    _, tuned = tuned_of(kind, RECIPES[name])
    want = answer(tuned.model)
    done = export_diffusers(tuned, tmp_path / "out", base="m/pipe")
    fresh = prompted(kind)
    base = answer(denoiser(fresh))
    fresh.load_lora_weights(tmp_path / "out")
    got = answer(denoiser(fresh))
    assert (want - base).abs().max() > 1e-2
    assert torch.allclose(got, want, atol=2e-5, rtol=1e-5), (got - want).abs().max()
    assert done.commands[1] == f"pipe.load_lora_weights({str(tmp_path / 'out')!r})"

    # every file stands alone: one rank, no scale but what is in B, each a tensor of its own
    held = load_file(tmp_path / "out" / FILE)
    assert {k.partition(".")[0] for k in held} == {"transformer" if kind == SD3 else "unet"}
    assert {v.shape[0] for k, v in held.items() if k.endswith("lora_A.weight")} == {done.rank}

    # and back, as an adapter of burnish
    again = denoiser(prompted(kind))
    back = burnish.load_peft(again, tmp_path / "out")
    assert torch.allclose(answer(back.model), want, atol=2e-5, rtol=1e-5)


def test_the_same_picture_is_drawn(tmp_path):
    pipe, tuned = tuned_of(SD, "lora(rank=4)")
    export_diffusers(tuned, tmp_path / "out")

    def drawn(one):
        one.set_progress_bar_config(disable=True)
        return one("a grey disc", num_inference_steps=6, output_type="np", height=16, width=16,
                   generator=torch.Generator().manual_seed(1)).images[0]

    fresh = prompted(SD)
    plain = drawn(fresh)
    fresh.load_lora_weights(tmp_path / "out")
    want, got = drawn(pipe), drawn(fresh)
    assert abs(want - got).max() < 1e-3 < abs(want - plain).max()


@pytest.mark.parametrize("recipe, text", [
    ("bitfit", "adds to no weight.*burnish merge writes a pipeline"),
    ("bitfit + lora(rank=2)", "trains by itself.*burnish merge writes a pipeline"),
    ("houlsby(bottleneck=4)", "computes on hidden states"),
    ("ia3", "computes on hidden states"),
    ("snella(rank=2)", "no exact LoRA form"),
])
def test_what_is_no_lora_is_refused_and_nothing_is_written(tmp_path, recipe, text):
    _, tuned = tuned_of(SD, recipe)
    with pytest.raises(FormatError, match=text):
        export_diffusers(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_stands_in_no_pipeline_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)
    with pytest.raises(FormatError, match="Sequential is no denoiser of diffusers"):
        export_diffusers(tuned, tmp_path / "out")


# -- files of others -------------------------------------------------------------------------------
def theirs(tmp_path, **how):
    """What diffusers itself writes of a LoRA of PEFT's, and what its pipeline computes."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = prompted(SD)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"], **how)
    pipe.unet.add_adapter(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in pipe.unet.named_parameters():
            if "lora_" in n:
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    settings = pipe.unet.peft_config["default"].to_dict()
    settings = json.loads(json.dumps(settings, default=lambda v: sorted(v)))
    pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.unet),
                           unet_lora_adapter_metadata=settings)
    return answer(pipe.unet)


@pytest.mark.parametrize("how", [{"lora_alpha": 4}, {"lora_alpha": 9},
                                 {"lora_alpha": 8, "alpha_pattern": {"to_v": 2}}])
def test_a_file_of_diffusers_is_read_with_its_alphas(tmp_path, how):
    want = theirs(tmp_path, **how)
    tuned = burnish.load_peft(prompted(SD).unet, tmp_path)
    assert torch.allclose(answer(tuned.model), want, atol=2e-5, rtol=1e-5)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    def refused(text, tensors, metadata=None):
        save_file(tensors, tmp_path / FILE, metadata)
        model = prompted(SD).unet
        with pytest.raises(FormatError, match=text):
            burnish.load_peft(model, tmp_path)
        assert not any(".burnish" in n for n, _ in model.named_modules())

    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    A, B = torch.ones(2, 32), torch.ones(32, 2)
    refused("is of a text encoder", {"text_encoder.x.lora_A.weight": A})
    refused("is not named as diffusers names them", {"lora_unet_mid.lora_down.weight": A})
    refused("one factor of two", {f"{site}.lora_A.weight": A})
    refused("do not make an update", {f"{site}.lora_A.weight": A, f"{site}.lora_B.weight": A + 1})
    refused("NaN", {f"{site}.lora_A.weight": A * float("nan"), f"{site}.lora_B.weight": B})
    refused("does not have", {"unet.nowhere.lora_A.weight": A, "unet.nowhere.lora_B.weight": B})
    good = {f"{site}.lora_A.weight": A, f"{site}.lora_B.weight": B}
    refused("is no JSON object", good, {METADATA: "{"})
    refused("its settings say 3", good, {METADATA: json.dumps({"unet.r": 3})})
