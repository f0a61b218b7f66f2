"""The loop: what it learns, what it writes, and what it refuses. Small models, real training."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

import burnish
from burnish.core.errors import BurnishError, CheckError, ConfigError, NoPlanError
from burnish.fit import checkpoint
from burnish.fit.pictures import Picture
from burnish.formats import safe

SMALL = {"max_steps": 6, "batch_size": 8, "quiet": True, "report": False, "test": False}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder with a ViT small enough for tests, and how it reads pictures."""
    from transformers import ViTConfig, ViTForImageClassification
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10)).save_pretrained(folder)
    Picture(8, 8, (0.5,), (0.5,)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer_factory):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tokenizer_factory()
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# -- what a run is -----------------------------------------------------------------------------
def test_a_run_learns_and_its_folder_gives_the_same_answers(vit, glyph_vit, tmp_path):
    run = burnish.fit(glyph_vit, "digits", "lora(rank=4)", output=tmp_path, epochs=2, lr=3e-3,
                      batch_size=32, quiet=True)
    assert run.metrics["validation"]["accuracy"] > 0.85
    assert run.metrics["test"]["accuracy"] > 0.85
    names = {p.name for p in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.json",
            "metrics.jsonl", "report.html", "preprocessor_config.json"} <= names
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".pt", ".bin", ".pth", ".pkl"}

    from burnish.fit.data import read
    from burnish.fit.tasks import task_for
    task = task_for(read("digits"), glyph_vit)
    other = burnish.load(task.load(glyph_vit), tmp_path)
    batch = task.example(16)
    run.tuned.model.eval(), other.model.eval()
    with torch.no_grad():
        assert torch.equal(run.tuned.model(**batch).logits, other.model(**batch).logits)


def test_the_promise_is_what_is_measured(vit, tmp_path):
    run = burnish.fit(vit, "digits", "lora(rank=4)", output=tmp_path, **SMALL)
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.03)
    kept = safe.read_json(tmp_path / "run.json")["memory"]
    assert kept["simulated"]["peak_bytes"] == run.promise.peak_bytes
    assert kept["measured"]["peak_bytes"] == run.truth.peak_bytes
    assert kept["process_peak"] >= kept["process_before"] > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_promise_knows_dropout(tmp_path, tokenizer, attention):  # newcomer A2
    """Masks are kept and other kernels chosen in training mode, and a loaded model is not in it."""
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "ab " * (3 + i % 17), "label": i % 3}) + "\n"
                            for i in range(32)))
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "bert", attn_implementation=attention)
    run = burnish.fit(model, path, "lora(rank=4)", output=tmp_path / "run", validation=0,
                      **{**SMALL, "max_steps": 2, "processor": tokenizer})
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.01)
    quiet = burnish.simulate(BertForSequenceClassification(BertConfig(
        **{**model.config.to_dict(), "hidden_dropout_prob": 0.0,
           "attention_probs_dropout_prob": 0.0})), "lora(rank=4)", (8, 51))
    assert run.promise.peak_bytes > 1.1 * quiet.peak_bytes


def test_evaluation_has_a_promise_where_its_batches_are_larger(llama, tmp_path, capsys):
    """Simulated and real, the same ledger sees the same peak; what does not fit is refused."""
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer as Words

    from burnish.memory import Ledger, MemoryReport
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "completion": "b" * (5 + i % 80)}) + "\n"
                            for i in range(60)))
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(5, len(Words.from_pretrained(llama)), (24, 60))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    promised = burnish.simulate(model, "lora(rank=2)", batch, evaluate=True)
    tuned = burnish.tune(model, "lora(rank=2)")
    with (ledger := Ledger(model)), torch.no_grad():
        model(**batch)
    real = MemoryReport.of(ledger, device="cpu")
    assert promised.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    assert promised.by_category["gradients"] == 0
    tuned.detach()

    common = {**SMALL, "max_steps": 1, "batch_size": 1, "quiet": False, "validation": 40}
    burnish.fit(llama, path, "lora(rank=2)", output=tmp_path / "a", **common)
    assert "evaluation, of batch" not in capsys.readouterr().out
    burnish.fit(llama, path, "lora(rank=2)", output=tmp_path / "b", **common,
                per_device_eval_batch_size=40)
    assert "evaluation, of batch 40 x" in capsys.readouterr().out
    with pytest.raises(NoPlanError, match="evaluation of batch 40 x .*per_device_eval_batch_size"):
        burnish.fit(llama, path, "lora(rank=2)", memory="1MiB", output=tmp_path / "c", **common,
                    per_device_eval_batch_size=40)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "mezo + lora(rank=2)"])
def test_figures_are_of_the_plain_loss_and_training_is_smoothed(vit, tmp_path, recipe):
    # findings 5.4
    common = {**SMALL, "lr": 0.0, "max_steps": 2, "seed": 3}
    plain = burnish.fit(vit, "digits", recipe, output=tmp_path / "a", **common)
    smooth = burnish.fit(vit, "digits", recipe, output=tmp_path / "b", **common,
                         label_smoothing_factor=0.5)
    assert smooth.metrics == plain.metrics
    a, b = (next(r["loss"] for r in rows(tmp_path / n) if "loss" in r) for n in "ab")
    assert abs(a - b) > 1e-4


def test_the_loss_of_a_split_weighs_every_token_alike(llama, tmp_path):
    """However rows are batched: the mean of batches' means would depend on it."""
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say ", "completion": "ab" * (1 + i % 9)}) + "\n"
                            for i in range(24)))
    found = []
    for size in (1, 3, 8):
        run = burnish.fit(llama, path, "lora(rank=2)", output=tmp_path / str(size), validation=11,
                          per_device_eval_batch_size=size, **{**SMALL, "lr": 0.0, "max_steps": 1})
        found.append(run.metrics["validation"]["loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


class Rates(transformers.TrainerCallback):
    """Writes down the rate of every step that is taken; may be pulled out of the wall after one."""

    def __init__(self, pulled_after=None):
        self.taken, self.pulled_after = [], pulled_after

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kw):
        inner = getattr(optimizer, "optimizer", optimizer)
        self.taken.append(getattr(inner, "inner", inner).param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.pulled_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "lora(rank=2) + adam8bit",
                                    "full + galore(rank=4)", "full + step_in_backward",
                                    "mezo + lora(rank=2)"])
def test_learning_rates_go_on_where_they_stopped(vit, tmp_path, recipe):  # findings 5.5
    """The rates a resumed run takes are those of the run that was not stopped."""
    common = {**SMALL, "max_steps": 8, "validation": 0, "save_steps": 3, "warmup_steps": 2,
              "measure": False}
    one, two, three = Rates(), Rates(pulled_after=5), Rates()
    whole = burnish.fit(vit, "digits", recipe, output=tmp_path / "a", callbacks=[one], **common)
    with pytest.raises(KeyboardInterrupt):
        burnish.fit(vit, "digits", recipe, output=tmp_path / "b", callbacks=[two], **common)
    again = burnish.fit(vit, "digits", recipe, output=tmp_path / "b", callbacks=[three],
                        resume=True, **common)
    assert len(one.taken) == 8 and max(one.taken) > 0
    assert two.taken == one.taken[:5] and three.taken == one.taken[3:]
    assert again.facts["time"]["steps"] == 8            # of both sessions, as its seconds are
    for (name, a), (_, b) in zip(whole.tuned.named_parameters(), again.tuned.named_parameters(),
                                 strict=True):
        assert torch.equal(a, b), name


def test_a_run_given_more_steps_or_another_rate_goes_on_by_them(vit, tmp_path):  # findings 5.5
    """Not at the rate at which the shorter run ended, which is nought."""
    common = {**SMALL, "validation": 0, "warmup_steps": 2, "measure": False, "lr": 1e-3}
    long, short, more, other = Rates(), Rates(), Rates(), Rates()
    burnish.fit(vit, "digits", "lora(rank=2)", output=tmp_path / "a", callbacks=[long],
                **{**common, "max_steps": 8})
    for n in "bc":
        burnish.fit(vit, "digits", "lora(rank=2)", output=tmp_path / n, callbacks=[short],
                    **{**common, "max_steps": 4})
    burnish.fit(vit, "digits", "lora(rank=2)", output=tmp_path / "b", callbacks=[more],
                resume=True, **{**common, "max_steps": 8})
    run = burnish.fit(vit, "digits", "lora(rank=2)", output=tmp_path / "c", callbacks=[other],
                      resume=True, **{**common, "max_steps": 8, "lr": 2e-3, "weight_decay": 0.3})
    assert max(g["weight_decay"] for g in run.tuned.current_optimizer.param_groups) == 0.3
    assert more.taken == long.taken[4:] and more.taken[0] > 0
    assert other.taken == pytest.approx([2 * r for r in long.taken[4:]])


def test_metrics_are_written_line_by_line(vit, tmp_path):
    burnish.fit(vit, "digits", "bitfit", output=tmp_path, **SMALL)
    train = [r for r in rows(tmp_path) if "loss" in r]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert all(r["learning_rate"] >= 0 and r["grad_norm"] > 0 for r in train)
    assert [r["step"] for r in rows(tmp_path) if "eval_accuracy" in r] == [1, 2, 3, 4, 5, 6]


def test_the_best_step_by_validation_is_kept(vit, tmp_path):
    run = burnish.fit(vit, "digits", "full", output=tmp_path, **{**SMALL, "lr": 3e-3})
    scores = {r["step"]: r["eval_accuracy"] for r in rows(tmp_path) if "eval_accuracy" in r}
    best = max(scores.values())
    assert run.metrics["validation"]["accuracy"] == pytest.approx(best)
    assert scores[run.facts["best"]["step"]] == pytest.approx(best)


def test_of_steps_whose_figure_is_the_same_the_one_of_least_loss_is_kept(vit, tmp_path,
                                                                         monkeypatch):
    """A figure that has not moved yet is no reason to give back what was there before training."""
    from burnish.fit.tasks.classes import ImageClassification

    monkeypatch.setattr(ImageClassification, "measure", lambda *_: {"accuracy": 0.5})
    run = burnish.fit(vit, "digits", "full", output=tmp_path, **{**SMALL, "lr": 3e-3})
    losses = {r["step"]: r["eval_loss"] for r in rows(tmp_path) if "eval_loss" in r}
    assert {r["eval_accuracy"] for r in rows(tmp_path) if "eval_accuracy" in r} == {0.5}
    assert run.facts["best"]["step"] == min(losses, key=losses.__getitem__) > 1
    assert run.metrics["validation"]["loss"] == pytest.approx(min(losses.values()))


def test_a_module_of_ones_own(tmp_path):
    """No transformers anywhere: a plain module, told how pictures are read."""
    torch.manual_seed(0)

    class Flat(nn.Sequential):
        num_classes = 7

    model = Flat(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 7))
    run = burnish.fit(model, "digits", "full", output=tmp_path, epochs=6, lr=3e-3, batch_size=32,
                      processor=Picture(8, 8, (0.5,), (0.5,)), quiet=True, report=False)
    assert model[-1].out_features == 10
    assert run.metrics["test"]["accuracy"] > 0.85
    assert run.promise.peak_bytes == pytest.approx(run.truth.peak_bytes, rel=0.03)


def test_language_modelling_and_instruction_tuning(llama, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 40)
    run = burnish.fit(llama, str(tmp_path / "a.txt"), "lora(rank=4)", output=tmp_path / "lm",
                      task="language-modelling", max_length=32, validation=0, lr=1e-2,
                      **{**SMALL, "max_steps": 12})
    losses = [r["loss"] for r in rows(tmp_path / "lm") if "loss" in r]
    assert losses[-1] < losses[0] - 0.2
    assert run.tuned.model.lm_head.weight.requires_grad is False

    talk = [{"messages": [{"role": "user", "content": f"say {c}"},
                          {"role": "assistant", "content": c * 3}]} for c in "abcdefgh"]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, talk)))
    run = burnish.fit(llama, path, "lora(rank=4)", output=tmp_path / "chat", validation=2,
                      **SMALL)
    assert set(run.metrics["validation"]) >= {"loss", "token_accuracy", "perplexity"}
    assert (tmp_path / "chat" / "chat_template.jinja").exists()


@pytest.mark.parametrize("recipe", ["lora(rank=2) + adam8bit", "snella(rank=4)",
                                    "full + galore(rank=4)", "mezo + lora(rank=2)",
                                    "full + step_in_backward"])
def test_recipes_of_every_kind_of_step_run(vit, tmp_path, recipe):
    run = burnish.fit(vit, "digits", recipe, output=tmp_path, **SMALL)
    assert run.tuned.timeline.step == 6 or "mezo" in recipe
    assert all(r["loss"] > 0 for r in rows(tmp_path) if "loss" in r)


def test_gradients_that_accumulate_are_those_of_the_whole_batch(vit, tmp_path):
    common = {**SMALL, "seed": 1, "validation": 0, "max_grad_norm": 0.0}
    one = burnish.fit(vit, "digits", "lora(rank=4)", output=tmp_path / "one",
                      **{**common, "batch_size": 16})
    two = burnish.fit(vit, "digits", "lora(rank=4)", output=tmp_path / "two",
                      **{**common, "batch_size": 4, "gradient_accumulation_steps": 4})
    for (n, a), (_, b) in zip(one.tuned.named_parameters(), two.tuned.named_parameters(),
                              strict=True):
        assert torch.allclose(a, b, atol=2e-5), n


def test_the_promise_of_accumulated_gradients_is_kept(vit, tmp_path):
    peaks = []
    for times in (1, 2):
        run = burnish.fit(vit, "digits", "full", output=tmp_path / str(times),
                          **{**SMALL, "measure": True, "batch_size": 4, "max_steps": 2,
                             "gradient_accumulation_steps": times})
        assert run.promise.peak_bytes == run.truth.peak_bytes
        assert run.truth.accumulation == times
        peaks.append(run.truth.peak_bytes)
    assert peaks[0] < peaks[1]


# -- memory chosen -----------------------------------------------------------------------------
def test_a_recipe_is_chosen_for_a_memory(vit, tmp_path, monkeypatch):
    import importlib
    planning = importlib.import_module("burnish.memory.plan")
    monkeypatch.setattr(planning, "shipped", lambda: [["lora(rank=4)"], ["linear_probe"]])
    run = burnish.fit(vit, "digits", memory="1GB", output=tmp_path, **SMALL)
    assert str(run.tuned.recipe) in ("lora(rank=4)", "linear_probe")
    assert run.truth.peak_bytes <= 2**30


def test_what_does_not_fit_is_refused_with_figures(vit, tmp_path):
    with pytest.raises(NoPlanError, match="full needs .* more than the 4.00 KiB asked for"):
        burnish.fit(vit, "digits", "full", memory="4KiB", output=tmp_path, **SMALL)
    assert not any(tmp_path.iterdir())


def test_of_tasks_no_recipe_is_chosen_and_none_is_offered(vit, tmp_path):
    """A recipe in stages has to be named: to leave it out would be refused."""
    tasks = {"one": "digits", "two": "digits"}
    with pytest.raises(NoPlanError, match="more than the 4.00 KiB asked for; give a smaller batch"):
        burnish.fit(vit, tasks, "lora(rank=2) + o_lora", memory="4KiB", output=tmp_path, **SMALL)
    with pytest.raises(ConfigError, match="there is no recipe"):
        burnish.fit(vit, tasks, memory="4KiB", output=tmp_path, **SMALL)
    assert not any(tmp_path.iterdir())


# -- what goes wrong ---------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(vit, tmp_path):
    with pytest.raises(BurnishError, match=r"is (nan|inf|-inf) at step \d+ .* is kept in"):
        burnish.fit(vit, "digits", "full", output=tmp_path, **{**SMALL, "lr": 1e18,
                    "warmup_steps": 0, "max_grad_norm": 0.0, "validation": 0, "save_steps": 100})
    kept = checkpoint.all_in(tmp_path)[-1]
    tensors = safe.load_file(kept / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_full_disk_while_saving_leaves_no_half_checkpoint(vit, tmp_path, monkeypatch):
    real, calls = safe.save_file, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        return real(tensors, path, metadata)

    monkeypatch.setattr(safe, "save_file", full)
    with pytest.raises(BurnishError, match="No space left on device"):
        burnish.fit(vit, "digits", "lora(rank=2)", output=tmp_path, **SMALL)
    assert all(checkpoint.whole(p) for p in tmp_path.iterdir() if p.is_dir())


def test_no_memory_is_one_error_with_a_way_on(vit, tmp_path, monkeypatch):
    from burnish.core.errors import MemoryExceeded
    from burnish.fit.loop import Trainer
    real, calls = Trainer.training_step, []

    def step(self, *a, **k):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")
        return real(self, *a, **k)

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(MemoryExceeded, match="checkpoint-3 with resume=True and a smaller"):
        burnish.fit(vit, "digits", "lora(rank=2)", output=tmp_path, **SMALL)


def test_an_output_with_checkpoints_is_not_mixed_with_another_run(vit, tmp_path):
    burnish.fit(vit, "digits", "bitfit", output=tmp_path, **SMALL)
    with pytest.raises(ConfigError, match="resume=True goes on from checkpoint-6, overwrite=True"):
        burnish.fit(vit, "digits", "bitfit", output=tmp_path, **SMALL)
    burnish.fit(vit, "digits", "norms", output=tmp_path, **SMALL, overwrite=True)
    with pytest.raises(BurnishError, match="its recipe is 'norms'"):
        burnish.fit(vit, "digits", "bitfit", output=tmp_path, **SMALL, resume=True)


def test_an_earlier_run_is_noticed_before_anything_is_read(vit, tmp_path, monkeypatch):
    burnish.fit(vit, "digits", "bitfit", output=tmp_path, **SMALL)
    monkeypatch.setattr("burnish.fit.run.read", lambda *a, **k: pytest.fail("data were read"))
    with pytest.raises(ConfigError, match="resume=True goes on from checkpoint-6"):
        burnish.fit(vit, "digits", "bitfit", output=tmp_path, **SMALL)


def test_settings_that_make_no_sense_are_refused_before_anything_is_loaded(tmp_path):
    for given, words in (({"learnin_rate": 1}, "did you mean"), ({"optim": "sgd"}, "the recipe")):
        with pytest.raises(ConfigError, match=words):
            burnish.fit("nowhere", "nothing", output=tmp_path, **given)


# -- somebody else's trainer -------------------------------------------------------------------
def trainer_of(vit, tuned, output, **kw):
    import transformers

    from burnish.fit.data import read
    from burnish.fit.tasks import task_for
    task = task_for(read("digits"), vit)
    args = transformers.TrainingArguments(
        output_dir=str(output), max_steps=4, per_device_train_batch_size=8, report_to=[],
        save_steps=2, remove_unused_columns=False, disable_tqdm=True, logging_steps=1, seed=0)
    return transformers.Trainer(model=tuned.model, args=args, data_collator=task.collate,
                                train_dataset=task.rows("train"), **kw)


def test_one_line_in_a_trainer_of_ones_own(vit, tmp_path):
    from transformers import AutoModelForImageClassification
    tuned = burnish.tune(AutoModelForImageClassification.from_pretrained(vit), "snella(rank=4)")
    trainer = trainer_of(vit, tuned, tmp_path, optimizers=(tuned.optimizer(1e-2), None),
                         callbacks=[burnish.TrainerCallback()])
    trainer.train()
    assert tuned.total_steps == 4 and tuned.timeline.step == 4
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    model = AutoModelForImageClassification.from_pretrained(vit)
    again = burnish.load(model, tmp_path)
    for (n, a), (_, b) in zip(tuned.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), n


def test_a_trainer_that_would_leave_parts_out_is_refused(vit, tmp_path):
    from transformers import AutoModelForImageClassification
    tuned = burnish.tune(AutoModelForImageClassification.from_pretrained(vit),
                         "lora(rank=2) + adam8bit")
    with pytest.raises(ConfigError, match="adam8bit act.* through the optimizer"):
        trainer_of(vit, tuned, tmp_path, callbacks=[burnish.TrainerCallback(tuned)]).train()


def test_a_model_without_a_recipe_is_refused(vit, tmp_path):
    from types import SimpleNamespace

    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(vit)
    with pytest.raises(ConfigError, match="call burnish.tune"):
        trainer_of(vit, SimpleNamespace(model=model), tmp_path,
                   callbacks=[burnish.TrainerCallback()]).train()


def test_what_does_not_train_is_said_at_the_first_step(vit, tmp_path):
    """An added tensor without a gradient is an error."""
    from transformers import AutoModelForImageClassification
    tuned = burnish.tune(AutoModelForImageClassification.from_pretrained(vit), "lora(rank=2)")
    path, layer = next((n, m) for n, m in tuned.model.named_modules()
                       if isinstance(m, nn.Linear) and hasattr(m, "burnish"))
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    with pytest.raises(CheckError, match=path):
        trainer_of(vit, tuned, tmp_path, optimizers=(tuned.optimizer(1e-3), None),
                   callbacks=[burnish.TrainerCallback(tuned)]).train()


def test_a_tensor_of_the_model_that_no_batch_uses_is_named(vit, tmp_path):
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(vit)
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    tuned = burnish.tune(model, "full")
    trainer_of(vit, tuned, tmp_path, optimizers=(tuned.optimizer(1e-3), None),
               callbacks=[burnish.TrainerCallback(tuned)]).train()
    assert any("unused" in note for note in tuned.summary()["notes"])


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_and_keeps_the_best(tmp_path, vit):
    """After as many evaluations in a row as were asked for; one that does get better goes on."""
    how = {"max_steps": 12, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2,
           "save_steps": 2, "quiet": True, "report": False, "measure": False, "test": False,
           "metric_for_best_model": "loss", "early_stopping_patience": 2}
    for lr in (0.0, 1e-3):
        run = burnish.fit(vit, "digits", "full", output=tmp_path / str(lr), lr=lr, **how)
        losses = [h["eval_loss"] for h in run.history if "eval_loss" in h]
        best, since = float("inf"), 0
        for k, loss in enumerate(losses, 1):
            best, since = (loss, 0) if loss < best else (best, since + 1)
            assert (since == 2) <= (k == len(losses))               # it went on no further
        assert since == 2 or len(losses) >= 6                       # and no less far
        assert lr or len(losses) == 3
    for more in ({"eval_strategy": "no"}, {"load_best_model_at_end": False}, {"save_steps": 3}):
        with pytest.raises(ConfigError, match="early_stopping_patience=2 ends a run by"):
            burnish.fit(vit, "digits", "linear_probe", output=tmp_path / "no",
                        **(how | more))
    with pytest.raises(ConfigError, match="early_stopping_patience=0: expected 1 or more"):
        burnish.fit(vit, "digits", "linear_probe", output=tmp_path / "no",
                    **(how | {"early_stopping_patience": 0}))
