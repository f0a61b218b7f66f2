"""Trainers of others, as they are: TRL's, and the one of SentenceTransformers."""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers as t

import burnish
from burnish.core.call import call_of
from burnish.core.errors import ConfigError
from burnish.fit.chat import prepare_tokenizer
from burnish.testing.tasks import texts

QUIET = {"max_steps": 6, "save_steps": 3, "report_to": [], "disable_tqdm": True,
         "logging_steps": 1, "seed": 0, "use_cpu": True, "per_device_train_batch_size": 4}
PROMPTS = [{"prompt": f"{a} then", "completion": f" {b}"}
           for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
PAIRS = [{"prompt": a, "chosen": a, "rejected": "no"} for a in "abcdefgh"]
RECIPES = ["lora(rank=4)", "lora(rank=4) + lean + checkpoint + adam8bit", "full + galore(rank=4)"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small decoder, and a small encoder as a SentenceTransformer, without dropout."""
    folder = tmp_path_factory.mktemp("bases")
    model, tokenizer = texts("instruction-tuning")
    model.save_pretrained(folder / "decoder")
    prepare_tokenizer(tokenizer).save_pretrained(folder / "decoder")
    model, tokenizer = texts("text-classification")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    t.BertModel(model.config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(folder / "bert"), device="cpu").save(str(folder / "sentences"))
    return folder


def decoder(folders):
    return t.AutoModelForCausalLM.from_pretrained(folders / "decoder")


def trainer_of(kind, folders, output, recipe, **more):
    import trl

    model = decoder(folders)
    tuned = burnish.tune(model, recipe)
    how = {"processing_class": t.AutoTokenizer.from_pretrained(folders / "decoder"),
           "optimizers": (tuned.optimizer(1e-2), None),
           "callbacks": [burnish.TrainerCallback(tuned)]}
    common = {**QUIET, "output_dir": str(output), "max_length": 64, "bf16": False,
              "gradient_checkpointing": False, **more}
    if kind == "sft":
        return tuned, trl.SFTTrainer(model, args=trl.SFTConfig(**common), **how,
                                     train_dataset=datasets.Dataset.from_list(PROMPTS * 4))
    return tuned, trl.DPOTrainer(model, args=trl.DPOConfig(**common), **how,
                                 train_dataset=datasets.Dataset.from_list(PAIRS * 4))


def losses(trainer):
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trains_a_tuned_model_and_what_it_writes_opens_again(kind, recipe, folders, tmp_path):
    tuned, trainer = trainer_of(kind, folders, tmp_path, recipe)
    trainer.train()
    assert tuned.timeline.step == tuned.total_steps == 6
    found = losses(trainer)
    assert found[-1] < found[0]
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert "trl" in (tmp_path / "README.md").read_text().lower()          # theirs stays
    model = tuned.model.eval()
    again = burnish.load(decoder(folders), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        said = model(input_ids=ids).logits
        assert torch.equal(said, again.model.eval()(input_ids=ids).logits)
        assert not torch.equal(said, decoder(folders)(input_ids=ids).logits)
        kept = again.merge()
        torch.testing.assert_close(kept(input_ids=ids).logits, said, atol=1e-5, rtol=1e-5)


def test_a_folder_that_trl_has_trained_into_is_trained_into_again(folders, tmp_path):
    for _ in range(2):
        _, trainer = trainer_of("sft", folders, tmp_path, "lora(rank=2)", max_steps=2)
        trainer.train()
    assert burnish.load(decoder(folders), tmp_path)


def test_the_first_loss_of_sft_is_the_models_own_and_an_update_is_that_of_a_plain_loop(
        folders, tmp_path):
    recipe = "lora(rank=4) + sgd + lean"
    tuned, trainer = trainer_of("sft", folders, tmp_path, recipe, max_steps=1, warmup_steps=0,
                                lr_scheduler_type="constant", max_grad_norm=0.0)
    start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer.train()
    other = burnish.tune(decoder(folders), recipe)
    with torch.no_grad():
        for n, p in other.named_parameters():
            p.copy_(start[n])
    other.optimizer(1e-2)
    batch.pop("completion_mask", None)
    loss = other.step(batch)
    assert losses(trainer)[0] == pytest.approx(float(loss), rel=1e-4)
    moved = 0.0
    for (n, a), (_, b) in zip(tuned.named_parameters(), other.named_parameters(), strict=True):
        moved = max(moved, float((a - start[n]).detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert moved > 1e-4


def test_trls_forward_runs_within_the_models_own(folders, tmp_path):
    """Its tape and its call are open where TRL looks for the head; they were not."""
    tuned, trainer = trainer_of("sft", folders, tmp_path, "lora(rank=2) + lean", max_steps=1)
    model, seen, head = tuned.model, [], tuned.model.get_output_embeddings

    def looked():
        seen.append(call_of(tuned.state) is not None)
        return head()

    trainer.add_callback(_At(lambda: setattr(model, "get_output_embeddings", looked)))
    trainer.train()
    assert seen and all(seen)


class _At(t.TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_step_begin(self, args, state, control, **kw):
        self.act()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_what_trl_would_leave_out_is_refused(kind, folders, tmp_path):
    _, trainer = trainer_of(kind, folders, tmp_path / "head", "lora(rank=2, targets='lm_head')")
    with pytest.raises(ConfigError, match="adds to lm_head, and this trainer multiplies by its"):
        trainer.train()
    _, trainer = trainer_of(kind, folders, tmp_path / "own", "distill + lora(rank=2)")
    with pytest.raises(ConfigError, match="distill compares logits, and this model returns none"):
        trainer.train()


@pytest.mark.parametrize("recipe", RECIPES)
def test_sentence_transformers_train_a_tuned_encoder(recipe, folders, tmp_path):
    import sentence_transformers as st
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = st.SentenceTransformer(str(folders / "sentences"), device="cpu")
    tuned = burnish.tune(model[0].auto_model, recipe)
    rows = datasets.Dataset.from_list([{"anchor": a * 3, "positive": a.upper()}
                                       for a in "abcdefgh"] * 4)
    args = st.SentenceTransformerTrainingArguments(output_dir=str(tmp_path / "out"), **QUIET)
    trainer = st.SentenceTransformerTrainer(
        model, args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model),
        optimizers=(tuned.optimizer(1e-2), None), callbacks=[burnish.TrainerCallback(tuned)])
    trainer.train()
    assert tuned.timeline.step == 6
    assert (tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors").exists()
    before = st.SentenceTransformer(str(folders / "sentences"), device="cpu")
    again = st.SentenceTransformer(str(folders / "sentences"), device="cpu")
    burnish.load(again[0].auto_model, tmp_path / "out")
    said = model.eval().encode(["abc", "b"])
    assert (said == again.eval().encode(["abc", "b"])).all()
    assert abs(said - before.encode(["abc", "b"])).max() > 1e-4
    tuned.merge()
    model.save(str(tmp_path / "merged"))
    plain = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert abs(plain.encode(["abc", "b"]) - said).max() < 1e-5


def test_a_module_that_runs_whatever_is_in_it_says_what_to_tune(folders):
    import sentence_transformers as st

    model = st.SentenceTransformer(str(folders / "sentences"), device="cpu")
    burnish.tune(model, "lora(rank=2)", head=False)
    with pytest.raises(ConfigError, match=r"tune the module inside it.*model\[0\].auto_model"):
        model.encode(["a"])
