"""Loading, evaluating, saving and merging are promised as a step is: to the byte."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import burnish
from burnish.core.errors import ConfigError
from burnish.formats.folder import finite
from burnish.memory import Ledger, MemoryReport, measure, simulate
from burnish.memory.during import MOMENTS, evaluated, watching
from burnish.memory.moments import peaks
from burnish.testing.models import tiny

RECIPES = ["full", "lora(rank=2)", "nf4 + lora(rank=2)", "dora(rank=2)", "bf16 + lora(rank=2)"]


def config(blocks: int = 1) -> LlamaConfig:
    """Matrices of 1 and 2 MiB: some of several pieces, all waiting on disk where they wait."""
    return LlamaConfig(vocab_size=1024, hidden_size=512, intermediate_size=1024,
                       num_hidden_layers=blocks, num_attention_heads=8, num_key_value_heads=8,
                       use_cache=False, tie_word_embeddings=False)


def measured(model, recipe, batch, folder, merges: bool) -> dict[str, int]:
    """The same moments, really lived through."""
    told = {}
    with watching(model) as seen:
        tuned = burnish.tune(model, recipe)
    told["load"] = seen[0].peak_bytes
    told["train"] = measure(tuned, batch).peak_bytes
    ledger = Ledger(model)
    evaluated(tuned, ledger, batch)
    told["evaluate"] = MemoryReport.of(ledger, device="cpu").peak_bytes
    model.train()
    tuned.state.room.clear()
    with watching(model, tuned) as seen:
        tuned.save(folder)
    told["save"] = seen[0].peak_bytes
    if merges:
        with watching(model, tuned) as seen:
            tuned.merge()
        told["merge"] = seen[0].peak_bytes
    return told


@pytest.mark.parametrize("recipe", [*RECIPES, "shira(rank=2)", "bitfit"])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_every_moment_is_promised_to_the_byte(name, recipe, tmp_path):
    model, batch = tiny(name)
    promised = {m: r.peak_bytes for m, r in peaks(model, recipe, batch).items()}
    assert promised == measured(model, recipe, batch, tmp_path, "merge" in promised)


@pytest.mark.parametrize("recipe", RECIPES)
def test_so_is_a_model_of_larger_matrices(recipe, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    ids = torch.zeros(1, 8, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids.clone()}
    promised = {m: r.peak_bytes for m, r in peaks(model, recipe, batch).items()}
    assert promised == measured(model, recipe, batch, tmp_path, True)


@pytest.mark.parametrize("during", ["load", "evaluate", "save", "merge"])
def test_few_blocks_stand_for_many_in_every_moment(during):
    few = simulate(config(9), "nf4 + lora(rank=2)", (1, 8), during=during)
    assert few.peak_bytes == simulate(config(9), "nf4 + lora(rank=2)", (1, 8), during=during,
                                      whole=True).peak_bytes


def test_weights_are_taken_one_at_a_time():
    """Never two copies of the model: what comes on top is as large as one matrix, not as all."""
    large = 1024 * 512 * 4
    model = LlamaForCausalLM(config(3))
    whole = sum(p.numel() * 4 for p in model.parameters())
    full, coded = peaks(model, "full", (1, 8)), peaks(model, "nf4 + lora(rank=2)", (1, 8))
    assert whole > 16 * large
    for report in (full["load"], full["merge"], coded["load"]):
        assert report.peak_bytes < whole + 2 * large
    assert full["save"].peak_bytes < whole + 4 * large         # and what tells finite numbers
    assert coded["save"].peak_bytes < 0.4 * whole
    # dense weights, the codes that unmerge goes back to, and one matrix in the making
    assert coded["merge"].peak_bytes < 1.2 * whole + 5 * large


def test_a_recipe_without_a_form_as_weights_promises_no_merge():
    model, batch = tiny("vit")
    assert list(peaks(model, "lst", batch)) == [m for m in MOMENTS if m != "merge"]


def test_an_evaluation_may_have_a_batch_of_its_own():
    model, batch = tiny("llama")
    found = peaks(model, "lora(rank=2)", (1, 8), evaluation=(8, 16))
    assert found["evaluate"].peak_bytes == simulate(model, "lora(rank=2)", (8, 16),
                                                    evaluate=True).peak_bytes
    assert found["train"].peak_bytes == simulate(model, "lora(rank=2)", (1, 8)).peak_bytes


def test_another_moment_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="during='merges'.*merge"):
        simulate(tiny("llama")[0], "lora", (1, 8), during="merges")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_are_looked_at_in_pieces(dtype):
    t = torch.zeros(8 << 20).to(dtype)
    with (ledger := Ledger()):
        assert finite(t)
    assert MemoryReport.of(ledger, device="cpu").by_category["temporary"] < 3 * t.numel()
    t[-1] = float("nan")
    assert not finite(t)
    assert not finite(t.view(2, -1).t())                       # in another order
    assert finite(t[:-1])
