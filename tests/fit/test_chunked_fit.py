"""The loss by chunks as the default of language models: training, evaluation, promise and plan."""

import importlib
import json

import pytest
import torch

import burnish
from burnish.blocks.tape.unmade import Logits
from burnish.core.errors import RecipeError
from burnish.fit.driving import Smoothed
from burnish.memory import plan
from burnish.memory.usual import usual
from burnish.testing.models import tiny

SMALL = {"batch_size": 8, "max_steps": 4, "eval_strategy": "no", "logging_steps": 1, "quiet": True,
         "report": False, "lr": 1e-2, "task": "language-modelling", "max_length": 32}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer_factory):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("llama"), tokenizer_factory()
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"cat {k} sat and looked at the moon. " * 4})
                              for k in range(40)))
    return str(path)


def ends(run):
    return {n: p.detach().clone() for n, p in run.tuned.named_parameters()}


def test_a_language_model_is_trained_and_evaluated_without_whole_logits(
        llama, text, tmp_path, monkeypatch):
    plain = burnish.fit(llama, text, "lora(rank=4) + chunked_loss(on=False)",
                        output=tmp_path / "plain", **SMALL)
    monkeypatch.setattr(Logits, "whole", lambda self: pytest.fail("whole logits were made"))
    run = burnish.fit(llama, text, "lora(rank=4)", output=tmp_path / "chunked", **SMALL)
    assert str(run.tuned.recipe) == "lora(rank=4) + chunked_loss"
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.03)
    assert run.promise.peak_bytes < plain.promise.peak_bytes
    for n, p in ends(plain).items():
        torch.testing.assert_close(ends(run)[n], p, rtol=1e-3, atol=1e-5)
    for split, figures in plain.metrics.items():
        assert run.metrics[split] == pytest.approx(figures, rel=1e-4)


def test_smoothing_is_that_of_transformers_and_needs_no_whole_logits(
        llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Logits, "whole", lambda self: pytest.fail("whole logits were made"))
    burnish.fit(llama, text, "lora(rank=4)", output=tmp_path, label_smoothing_factor=0.2,
                **{**SMALL, "max_steps": 2, "validation": 0})


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("items", [None, 9, torch.tensor(9)])
def test_smoothed_is_the_smoother_of_transformers(shift, items):
    from transformers.trainer_pt_utils import LabelSmoother

    torch.manual_seed(0)
    out = {"logits": torch.randn(2, 5, 7, dtype=torch.float32)}
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 1:3] = -100
    want = LabelSmoother(epsilon=0.3)(out, labels.clone(), shift, items)
    torch.testing.assert_close(Smoothed(0.3)(out, labels, shift, items), want)
    torch.testing.assert_close(Smoothed(0.3)((out["logits"],), labels, shift, items), want)


def test_it_is_left_out_where_the_head_cannot_and_that_is_said(llama, text, tmp_path, capsys):
    run = burnish.fit(llama, text, "lora(rank=4, dropout=0.1, targets='lm_head')", output=tmp_path,
                      **{**SMALL, "quiet": False, "max_steps": 1})
    assert run.tuned.recipe.named("chunked_loss") is None
    assert "note: chunked_loss is left out: " in capsys.readouterr().out


def test_who_is_given_it():
    net, _ = tiny("llama")
    given = usual(net)
    assert str(given("lora(rank=2)")) == "lora(rank=2) + chunked_loss"
    for said in ("lora(rank=2) + chunked_loss(on=False)", "chunked_loss(chunk=7) + full",
                 "lora(rank=2) + distill"):
        assert str(given(said)) == said
    for other in ("vit", "bert", "clip"):
        assert str(usual(tiny(other)[0])("full")) == "full"


def test_a_plan_promises_what_fit_will_train():
    net, _ = tiny("llama")
    plans = plan(net, "1GB", (2, 8))
    assert plans.fits and all(p.recipe.endswith("+ chunked_loss") for p in plans.fits)
    assert not any("chunked" in why for why in plans.refused.values())
    said = plan(net, "1GB", (2, 8), candidates=["lora(rank=2)"])
    assert [p.recipe for p in said.fits] == ["lora(rank=2)"]


def test_a_plan_leaves_out_what_the_head_refuses_as_fit_does(monkeypatch):
    """An update of the head itself that drops inputs: its rows cannot be taken by chunks."""
    module = importlib.import_module("burnish.memory.plan")
    asked = "lora(rank=2, dropout=0.1)"
    monkeypatch.setattr(module, "shipped", lambda: [[asked], ["lora(rank=2)"]])
    net, _ = tiny("llama")
    for _ in range(2):                        # the second time from what is kept on disk
        plans = plan(net.config, "1GB", (2, 8), targets="lm_head", workers=1)
        assert {p.recipe for p in plans} == {asked, "lora(rank=2) + chunked_loss"}
        assert plans.refused == {}


def test_only_the_part_that_was_added_is_left_out():
    given = usual(tiny("llama")[0])

    def do(recipe):
        if recipe.named("chunked_loss") is not None:
            raise RecipeError("chunked_loss takes the rows of lm_head in chunks, and it cannot")
        return len(recipe)

    assert [str(v) for v in given.run("lora(rank=2)", do)[:2]] == ["lora(rank=2)", "1"]
    assert "lm_head" in given.run("lora(rank=2)", do)[2]
    with pytest.raises(RecipeError):          # asked for, so refused
        given.run("lora(rank=2) + chunked_loss", do)

    def other(recipe):
        raise RecipeError("lora finds no blocks")

    with pytest.raises(RecipeError, match="no blocks"):
        given.run("lora(rank=2)", other)
