"""A folder of a merged model holds the biases that the merge has made, or is not written."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.engine.biases import gained
from burnish.testing import stir
from burnish.testing.models import tiny


@pytest.mark.parametrize("recipe, flags", [
    ("beft(targets='down')", {"mlp_bias"}), ("beft", {"attention_bias"}),
    ("beft(targets='v,down')", {"mlp_bias", "attention_bias"}), ("lora(rank=2)", set())])
def test_a_merged_llama_is_the_same_when_it_is_read_again(tmp_path, recipe, flags):
    from transformers import LlamaForCausalLM

    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net.eval(), recipe, head=False))
    config, want = net.config, net(**batch).logits
    merged = tuned.merge()
    assert tuned.merged.lost is None
    assert {k for k in ("mlp_bias", "attention_bias") if getattr(merged.config, k)} == flags
    assert not gained(merged)
    torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "m")
    again, told = LlamaForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(again.eval()(**batch).logits, merged(**batch).logits)
    tuned.unmerge()
    assert net.config is config and not any(getattr(config, k) for k in
                                            ("mlp_bias", "attention_bias"))
    assert torch.equal(net(**batch).logits, want)
    tuned.detach()
    assert not gained(net)


def test_what_no_configuration_asks_for_is_refused_and_nothing_is_written(tmp_path, capsys):
    net, _ = tiny("t5")
    net.save_pretrained(tmp_path / "base")
    tuned = stir(burnish.tune(net, "beft", head=False))
    tuned.model.name_or_path = str(tmp_path / "base")
    tuned.merge()
    assert "T5ForConditionalGeneration is built without" in tuned.merged.lost
    tuned.unmerge()
    tuned.save(tmp_path / "adapter")
    capsys.readouterr()
    code = main(["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--output",
                 str(tmp_path / "o")])
    assert code == 4 and "a folder would lose it" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_plain_module_is_left_alone():
    net, _ = tiny("encoder")
    assert gained(net) is None
    tuned = stir(burnish.tune(net, "ssf", head=False))
    tuned.merge()
    assert tuned.merged.lost is None
