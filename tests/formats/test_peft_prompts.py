"""PEFT's rows in front of a text or of keys and values: the same outputs, and the same training."""

from __future__ import annotations

import json

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

import burnish
from burnish.blocks.state.examples import Examples
from burnish.core.errors import FormatError
from burnish.formats.peft import export_peft, load_peft
from burnish.testing import stir
from burnish.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS, TYPES = [5, 9, 7, 11, 3, 6, 9, 8, 12], [1, 2, 3, 4, 0, 5, 6, 7, 8]
FREE = torch.tensor([t % 4 != 0 for t in TYPES])


def outputs(model, batch, **keys):
    model.eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, **keys).logits
    return logits[:, -batch["input_ids"].shape[1]:]


def same(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def said(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder, **fields):
    (folder / "adapter_config.json").write_text(json.dumps(said(folder) | fields))


# -- CPT ------------------------------------------------------------------------------------------
def cpt(name, loss="decay", size=0.004, **more):
    config = CPTConfig(cpt_token_ids=IDS, cpt_tokens_type_mask=TYPES, cpt_mask=[1] * len(IDS),
                       opt_weighted_loss_type=loss, opt_loss_decay_factor=0.5,
                       task_type="CAUSAL_LM", **more)
    theirs = stir(get_peft_model(tiny(name)[0], config), size=size)
    delta = theirs.prompt_encoder["default"].delta_embedding.weight
    with torch.no_grad():
        delta[~FREE] = 0                         # no gradient ever moves them
    return theirs, delta


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_context_moved_by_peft_is_ours_and_goes_back(name, tmp_path):
    theirs, delta = cpt(name, size=0.1)          # cut to the balls before it is used
    _, batch = tiny(name)
    want = outputs(theirs, batch)
    theirs.save_pretrained(tmp_path / "peft")
    tuned = load_peft(tiny(name)[0], tmp_path / "peft")
    part, = tuned.recipe
    assert (part.name, list(part.ids), list(part.types), part.label_decay) == (
        "cpt", IDS, TYPES, 0.5)
    same(outputs(tuned.model, batch), want)
    d, = tuned.parameters()
    assert not d[~FREE].any() and bool((d[FREE].norm(dim=1) > 1e-3).all())
    plain = tuned.model.get_input_embeddings()(torch.tensor(IDS))
    keep = {k: v for k, v in batch.items() if k != "labels"}
    ids = torch.cat([torch.tensor(IDS).expand(len(keep["input_ids"]), -1), keep["input_ids"]], 1)
    with torch.no_grad():
        d.zero_()
        assert plain.shape == d.shape
        same(outputs(tuned.model, batch), outputs(tiny(name)[0], {**batch, "input_ids": ids})
             [:, -keep["input_ids"].shape[1]:])
    tuned = load_peft(tiny(name)[0], tmp_path / "peft")
    tuned.save(tmp_path / "ours")
    same(outputs(burnish.load(tiny(name)[0], tmp_path / "ours").model, batch), want)
    export_peft(tuned, tmp_path / "again")
    assert said(tmp_path / "again")["peft_type"] == "CPT"
    same(outputs(PeftModel.from_pretrained(tiny(name)[0], tmp_path / "again"), batch), want)


@pytest.mark.parametrize("loss, more", [
    ("decay", {}), ("none", {}),
    ("decay", {"opt_projection_epsilon": 0.01, "opt_projection_format_epsilon": 0.2})])
def test_a_context_trains_here_as_it_does_there(loss, more, tmp_path):
    """The gradient of the whole loss, and the balls: three steps that reach them."""
    theirs, delta = cpt("llama", loss, **more)
    _, batch = tiny("llama")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :3] = -100
    theirs.save_pretrained(tmp_path)
    tuned = load_peft(tiny("llama")[0], tmp_path)
    d, = tuned.parameters()
    with torch.no_grad():
        delta.copy_(theirs.prompt_encoder["default"].get_projection())
    torch.testing.assert_close(d.detach(), delta.detach(), rtol=1e-4, atol=1e-7)
    tuned.optimizer(lr=0.0)
    ball, = (m for m in tuned.model.modules() if isinstance(m, Examples))
    theirs.train(), tuned.model.train()
    for _ in range(3):
        want, got = theirs(**{k: v.clone() for k, v in batch.items()}).loss, tuned.loss(batch)
        for loss, p in ((want, delta), (got, d)):
            p.grad = None
            loss.backward()
        torch.testing.assert_close(d.grad, delta.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            d.sub_(0.2 * d.grad), delta.sub_(0.2 * delta.grad)
            ball.project()
            delta.copy_(theirs.prompt_encoder["default"].get_projection())
        torch.testing.assert_close(d.detach(), delta.detach(), rtol=1e-4, atol=1e-6)
    size = (32 / 2048) ** 0.5
    assert float(d.detach().norm(dim=1).max()) == pytest.approx(
        size * max(more.values(), default=0.1), rel=1e-4)


@pytest.mark.parametrize("fields, words", [
    ({"cpt_token_ids": IDS[:-1]}, "expected 9 numbers from 0, one for each row"),
    ({"cpt_token_ids": [*IDS[:-1], "a"]}, "expected 9 numbers from 0"),
    ({"cpt_tokens_type_mask": [*TYPES[:-1], -1]}, "expected 9 numbers from 0"),
    ({"cpt_tokens_type_mask": 3}, "cpt_tokens_type_mask"),
    ({"opt_weighted_loss_type": "later"}, "'later'; expected 'none' or 'decay'"),
    ({"opt_projection_epsilon": -1}, "radii are at least 0"),
    ({"opt_loss_decay_factor": 2}, "label_decay is from 0 to 1"),
    ({"opt_projection_epsilon": 0, "opt_projection_format_epsilon": 0}, "nothing may move"),
    ({"cpt_token_ids": [*IDS[:-1], 5]}, "row 8 of prompt_embeddings .* for token 5: it is of an"),
    ({"cpt_token_ids": [*IDS[:-1], 500000]}, "from 0 to"),
])
def test_a_context_that_would_be_misread_is_refused(fields, words, tmp_path):
    cpt("llama")[0].save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    model, batch = tiny("llama")
    want = outputs(model, batch)
    with pytest.raises(burnish.BurnishError, match=words) as caught:
        load_peft(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert torch.equal(outputs(model, batch), want)


def test_a_context_without_types_is_all_template(tmp_path):
    """PEFT's default; a radius that has nothing to act on is left out."""
    config = CPTConfig(cpt_token_ids=IDS, task_type="CAUSAL_LM", opt_projection_epsilon=0.5,
                       opt_projection_format_epsilon=0.05)
    get_peft_model(tiny("llama")[0], config).save_pretrained(tmp_path)
    part, = load_peft(tiny("llama")[0], tmp_path).recipe
    assert set(part.types) == {1} and part.format_radius == 0.05 and part.input_radius == 0.1
    edit(tmp_path, cpt_tokens_type_mask=None)
    assert set(load_peft(tiny("llama")[0], tmp_path).recipe[0].types) == {1}


def test_damaged_rows_are_one_clear_error(tmp_path):
    cpt("llama")[0].save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    rows = load_file(file)["prompt_embeddings"]
    for other in ({}, {"prompt_embeddings": rows[:4].clone()}, {"prompt_embeddings": rows[None]},
                  {"prompt_embeddings": rows[:, :8].clone()}, {"prompt_embeddings": rows.int()},
                  {"prompt_embeddings": rows * float("nan")}):
        save_file(other, file)
        with pytest.raises(FormatError) as caught:
            load_peft(tiny("llama")[0], tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [
    PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM"),
    PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, task_type="SEQ_2_SEQ_LM")])
def test_of_rows_for_both_stacks_the_encoder_s_are_read(config, tmp_path):
    """PEFT's default before an encoder-decoder: twice the rows, of which its forward reads half."""
    _, batch = tiny("t5")
    theirs = stir(get_peft_model(tiny("t5")[0], config), size=0.8)
    more = {"labels": batch["labels"].clamp(min=0)}
    base, want = outputs(tiny("t5")[0], batch, **more), outputs(theirs, batch, **more)
    assert (want - base).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "peft")
    assert said(tmp_path / "peft")["num_transformer_submodules"] == 2
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]) == 8
    tuned = load_peft(tiny("t5")[0], tmp_path / "peft")
    assert tuned.recipe[0].length == 4
    same(outputs(tuned.model, batch, **more), want)
    export_peft(tuned, tmp_path / "again")
    same(outputs(PeftModel.from_pretrained(tiny("t5")[0], tmp_path / "again"), batch, **more), want)


# -- multitask prompt tuning ----------------------------------------------------------------------
TASK = torch.tensor([2, 0])


def shared(name, task_type="CAUSAL_LM", tasks=3, rank=2):
    config = MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=tasks, num_ranks=rank,
                                         num_transformer_submodules=1, task_type=task_type)
    return stir(get_peft_model(tiny(name)[0], config), size=0.8)


@pytest.mark.parametrize("name, kind, tasks", [
    ("llama", "CAUSAL_LM", 3), ("t5", "SEQ_2_SEQ_LM", 3), ("gpt2", "CAUSAL_LM", 1)])
def test_rows_that_tasks_share_go_both_ways(name, kind, tasks, tmp_path):
    theirs, (_, batch) = shared(name, kind, tasks), tiny(name)
    ids = TASK.clamp_max(tasks - 1)
    more = {"labels": batch["labels"].clamp(min=0)} if name == "t5" else {}
    mine = {**more, **({"task": ids} if tasks > 1 else {})}
    base, want = outputs(tiny(name)[0], batch, **more), outputs(theirs, batch, task_ids=ids, **more)
    assert (want - base).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "peft")
    tuned = load_peft(tiny(name)[0], tmp_path / "peft")
    part, = tuned.recipe
    assert (part.name, part.length, part.tasks, part.rank) == ("mpt", 4, tasks, 2)
    same(outputs(tuned.model, batch, **mine), want)
    tuned.save(tmp_path / "ours")
    same(outputs(burnish.load(tiny(name)[0], tmp_path / "ours").model, batch, **mine), want)
    export_peft(tuned, tmp_path / "again")
    assert said(tmp_path / "again")["peft_type"] == "MULTITASK_PROMPT_TUNING"
    back = PeftModel.from_pretrained(tiny(name)[0], tmp_path / "again")
    same(outputs(back, batch, task_ids=ids, **more), want)


def test_one_task_s_rows_become_a_prompt_of_its_own(tmp_path):
    theirs, (_, batch) = shared("llama"), tiny("llama")
    want = outputs(theirs, batch, task_ids=torch.tensor([1, 1]))
    theirs.save_pretrained(tmp_path / "peft")
    tuned = load_peft(tiny("llama")[0], tmp_path / "peft")
    tuned.recipe[0].lifecycle(tuned, 1, "one")
    same(outputs(tuned.model, batch), want)
    export_peft(tuned, tmp_path / "one", name="one")
    assert said(tmp_path / "one")["peft_type"] == "PROMPT_TUNING"
    same(outputs(PeftModel.from_pretrained(tiny("llama")[0], tmp_path / "one"), batch), want)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("prefix_task_cols"), "lacks prefix_task_cols"),
    (lambda t: t.update(prefix_task_rows=t["prefix_task_rows"][:2].clone()), "the model needs"),
    (lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:, :8].clone()), "model needs"),
    (lambda t: t.update(prefix_task_cols=t["prefix_task_cols"] / 0), "NaN or infinite"),
])
def test_damaged_task_rows_are_one_clear_error(change, words, tmp_path):
    shared("llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(FormatError, match=words) as caught:
        load_peft(tiny("llama")[0], tmp_path)
    assert "\n" not in str(caught.value)


# -- cartridges -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name, frozen", [("llama", 2), ("gpt2", 1), ("llama", 0)])
def test_a_cartridge_goes_both_ways_and_its_first_rows_stay(name, frozen, tmp_path):
    config = CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=frozen, task_type="CAUSAL_LM")
    theirs, (_, batch) = get_peft_model(tiny(name)[0], config), tiny(name)
    base, want = outputs(tiny(name)[0], batch), outputs(theirs, batch)
    assert (want - base).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "peft")
    tuned = load_peft(tiny(name)[0], tmp_path / "peft")
    part, = tuned.recipe
    assert (part.name, part.length, part.moved, part.frozen_rows) == ("prefix", 4, True, frozen)
    same(outputs(tuned.model, batch), want)
    tuned.save(tmp_path / "ours")
    same(outputs(burnish.load(tiny(name)[0], tmp_path / "ours").model, batch), want)
    tuned.optimizer(lr=1e-2, weight_decay=0.1)
    tuned.step(batch)
    stepped = outputs(tuned.model, batch)
    assert (stepped - want).abs().max() > 1e-3
    export_peft(tuned, tmp_path / "again")
    assert said(tmp_path / "again")["peft_type"] == ("CARTRIDGE" if frozen else "PREFIX_TUNING")
    back = PeftModel.from_pretrained(tiny(name)[0], tmp_path / "again")
    same(outputs(back, batch), stepped)
    old, new = (load_file(tmp_path / f / "adapter_model.safetensors")["prompt_embeddings"]
                for f in ("peft", "again"))
    moved = (new - old).abs().amax(1) > 0
    assert moved.tolist() == [False] * frozen + [True] * (4 - frozen)


def test_a_cartridge_whose_rows_all_stay_has_nothing_to_train(tmp_path):
    config = CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(tiny("llama")[0], config).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="expected fewer than the 3 rows"):
        load_peft(tiny("llama")[0], tmp_path)
    edit(tmp_path, num_frozen_tokens=None)           # PEFT's default
    assert load_peft(tiny("llama")[0], tmp_path).recipe[0].frozen_rows == 1
