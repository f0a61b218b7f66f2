"""Folders for servers: what they hold is the update, in the few words that a server reads."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from peft import PeftModel

import burnish
from burnish.cli import main
from burnish.core.errors import FormatError
from burnish.formats import safe
from burnish.formats.peft_folder import Lora
from burnish.formats.served import READERS, alike, export_served
from burnish.testing import stir
from burnish.testing.models import tiny

UNLIKE = "lora(rank=2, alpha=6, targets='q') + lora(rank=4, alpha=5, targets='v@0')"
PLAIN = ("vllm", "sglang", "gguf")


def tuned_by(recipe, name="llama"):
    model, batch = tiny(name)
    tuned = burnish.tune(model, recipe, head=False)
    stir(tuned, size=0.2)
    return tuned, {k: v for k, v in batch.items() if k != "labels"}


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


@pytest.mark.parametrize("reader", PLAIN)
@pytest.mark.parametrize("recipe", [UNLIKE, "lora(rank=3, scaling='rs')", "pissa(rank=2)"])
def test_peft_reads_the_same_update_from_a_servers_folder(tmp_path, reader, recipe):
    tuned, batch = tuned_by(recipe)
    served = export_served(tuned, tmp_path / "out", reader, base="the/base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (served.rank, served.scale * served.rank)
    assert isinstance(config["lora_alpha"], int) and isinstance(config["target_modules"], list)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"] and not config["use_dora"]
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert config["base_model_name_or_path"] == "the/base"
    tensors = safe.load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, t in tensors.items():
        assert key.startswith("base_model.model.model.layers.") and served.rank == (
            t.shape[0] if "lora_A" in key else t.shape[1])
    opened = PeftModel.from_pretrained(tiny("llama")[0], str(tmp_path / "out"))
    assert torch.allclose(logits(opened, batch), logits(tuned.model, batch), atol=2e-5)


def test_equal_scales_stay_and_ranks_are_filled_up_with_noughts():
    torch.manual_seed(0)
    pairs = {n: Lora(torch.randn(r, 6), torch.randn(5, r), 2.0) for n, r in (("a", 1), ("b", 4))}
    made, rank, scale, folded = alike(pairs)
    assert (rank, scale, folded) == (4, 2.0, [])
    for n, x in made.items():
        assert torch.equal(x.B @ x.A, pairs[n].B @ pairs[n].A) and x.rank == 4


@pytest.mark.parametrize("scale, alpha", [(0.5, True), (0.3, False), (3.0, True)])
def test_a_scale_that_is_no_whole_number_over_the_rank_goes_into_b(scale, alpha):
    torch.manual_seed(0)
    x = Lora(torch.randn(2, 6), torch.randn(5, 2), scale)
    made, rank, got, folded = alike({"a": x})
    assert bool(folded) != alpha and got == (scale if alpha else 1.0)
    want = scale * (x.B.double() @ x.A.double())
    assert torch.allclose(got * (made["a"].B.double() @ made["a"].A.double()), want, rtol=1e-6)
    assert alike({"a": x}, whole=False)[2] == scale


def test_mlx_reads_every_block_by_its_own_rules(tmp_path):
    tuned, batch = tuned_by(UNLIKE)
    export_served(tuned, tmp_path / "out", "mlx", base="the/base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = safe.load_file(tmp_path / "out" / "adapters.safetensors")
    how = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2
    assert how["keys"] == ["self_attn.q_proj", "self_attn.v_proj"] and how["rank"] == 4
    model, _ = tiny("llama")
    with torch.no_grad():                   # what mlx-lm does: every key of the last blocks
        for block in range(2):
            for key in how["keys"]:
                layer = model.get_submodule(f"model.layers.{block}.{key}")
                a, b = (tensors.pop(f"model.layers.{block}.{key}.lora_{k}") for k in "ab")
                assert a.shape == (layer.in_features, 4) and b.shape == (4, layer.out_features)
                layer.weight += how["scale"] * (a @ b).T
    assert not tensors
    assert torch.allclose(logits(model, batch), logits(tuned.model, batch), atol=2e-5)


@pytest.mark.parametrize("recipe, name, says", [
    ("dora(rank=2)", "llama", "magnitude"),
    ("lora(rank=2, targets='q') + beft(targets='q')", "llama", "a bias of its update"),
    ("alora(rank=2, invocation=(3,))", "llama", "hidden states"),
    ("lora(rank=2) + norms", "llama", "trains by itself"),
    ("lora(rank=2) + trainable_tokens(ids=[1])", "llama", "embed_tokens trains by itself"),
    ("lora(rank=2, targets='embed_tokens')", "llama", "no place for it"),
    ("lora(rank=2) + full(targets='lm_head')", "llama", "lm_head trains by itself"),
    ("houlsby", "llama", "hidden states"), ("loha(rank=2)", "llama", "no exact LoRA form"),
    ("lora(rank=2)", "bert", "serves adapters of language models"),
    ("lora(rank=2)", "gpt2", "no place for it"),
    ("lora(rank=2, targets='experts')", "mixtral", "stack of experts")])
@pytest.mark.parametrize("reader", ["vllm", "mlx"])
def test_what_a_server_would_pass_over_is_refused_by_name(tmp_path, recipe, name, says, reader):
    tuned, _ = tuned_by(recipe, name)
    with pytest.raises(FormatError, match=says):
        export_served(tuned, tmp_path / "out", reader)
    assert not (tmp_path / "out").exists()


def test_what_has_no_factors_is_approximated_at_a_rank_that_is_said(tmp_path):
    tuned, _ = tuned_by("loha(rank=2, targets='q')")
    served = export_served(tuned, tmp_path / "out", "vllm", rank=2)
    assert served.rank == 2 and 0 < max(served.errors.values()) < 1
    assert "approximated" in str(served)


def test_what_is_typed_then_names_rank_and_folder(tmp_path):
    tuned, _ = tuned_by("lora(rank=12)")
    for reader in READERS:
        served = export_served(tuned, tmp_path / f"for {reader}", reader, base="m/the base")
        words = shlex.split(served.commands[0])
        where = str(tmp_path / f"for {reader}")
        assert any(w == where or w.endswith(f"={where}") for w in words), words
        assert "m/the base" in words
        shown = str(served).partition("then:\n")[2]
        assert shlex.split(shown.replace("\\\n", "")) == [
            w for c in served.commands for w in shlex.split(c)]
        if reader == "vllm":
            assert words[words.index("--max-lora-rank") + 1] == "16"
    big = tuned_by("lora(rank=2)")[0]
    with pytest.raises(FormatError, match="did you mean 'vllm'"):
        export_served(big, tmp_path / "x", "vlm")


def test_unread_names_are_not_known_to_mlx(tmp_path):
    tuned, _ = tuned_by("lora(rank=2)")
    tuned.model.config.model_type = "something"
    with pytest.raises(FormatError, match="not known here"):
        export_served(tuned, tmp_path / "x", "mlx")
    assert "unconfirmed" in str(export_served(tuned, tmp_path / "x", "vllm"))


def test_from_the_command_line(tmp_path, capsys):
    model, batch = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    tuned = burnish.tune(type(model).from_pretrained(tmp_path / "base"), UNLIKE, head=False)
    stir(tuned, size=0.2)
    tuned.save(tmp_path / "adapter")
    argv = ["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    assert main([*argv, "--for", "sgland"]) == 2
    assert "did you mean 'sglang'" in capsys.readouterr().err
    assert main([*argv, "--for", "vllm", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rank"] == 4 and len(said["folded"]) == 3 and "--enable-lora" in said["commands"][0]
    assert main([*argv, "--to", "peft"]) == 0        # the older spelling, over the same folder
    assert main([*argv, "--for", "mlx"]) == 2        # which is no folder of MLX
    opened = PeftModel.from_pretrained(tiny("llama")[0], str(tmp_path / "out"))
    assert torch.allclose(logits(opened, {k: v for k, v in batch.items() if k != "labels"}),
                          logits(tuned.model, {k: v for k, v in batch.items() if k != "labels"}),
                          atol=2e-5)
