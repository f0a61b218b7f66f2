"""As it is: the module's own flags say what trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import RecipeError, TargetError
from burnish.memory import measure, simulate
from burnish.testing.models import tiny

from ..memory.blocks import Lora


def by_hand(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    """Somebody's own LoRA on the queries of a small Llama, everything else frozen."""
    model, batch = tiny("llama", dtype=dtype)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj, 4).to(dtype)
        layer.self_attn.q_proj.base.requires_grad_(False)
        nn.init.normal_(layer.self_attn.q_proj.b, std=0.1)
    return model, batch


def test_exactly_what_asks_for_a_gradient_trains():
    model, _ = by_hand()
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    tuned = burnish.tune(model, "as_is")
    assert {n for n, _ in tuned.named_parameters()} == asking
    assert {n.rpartition(".")[2] for n in asking} == {"a", "b"}


def test_it_is_the_modules_own_training():
    """Three steps equal a loop of torch alone on the same flags, in float64."""
    model, batch = by_hand(torch.float64)
    plain = copy.deepcopy(model)
    tuned = burnish.tune(model, "as_is")
    tuned.optimizer(lr=1e-2, weight_decay=0.1)
    own = [p for p in plain.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        loss = plain(**batch).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
        torch.testing.assert_close(tuned.step(batch), loss.detach(), rtol=1e-9, atol=1e-12)
    for (n, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def test_a_frozen_head_stays_frozen_and_one_that_asks_trains():
    model, _ = tiny("vit")
    model.requires_grad_(False)
    model.vit.layers[0].attention.q_proj.weight.requires_grad_(True)
    tuned = burnish.tune(model, "as_is")
    assert [n for n, _ in tuned.named_parameters()] == ["vit.layers.0.attention.q_proj.weight"]
    tuned.detach()
    model.classifier.requires_grad_(True)
    names = [n for n, _ in burnish.tune(model, "as_is").named_parameters()]
    assert names == ["vit.layers.0.attention.q_proj.weight", "classifier.weight",
                     "classifier.bias"]


def test_flags_come_back():
    model, _ = by_hand()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    burnish.tune(model, "as_is").detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_second_adapter_reads_the_flags_as_they_were_found():
    model, _ = by_hand()
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    tuned = burnish.tune(model, "lora(rank=2)", targets="v")
    tuned.add("theirs", "as_is")
    tuned.use("theirs")
    assert {n for n, _ in tuned.named_parameters()} == asking


def test_targets_narrow_it():
    model, _ = by_hand()
    tuned = burnish.tune(model, "as_is", targets="model.layers.1.self_attn.q_proj.b")
    assert [n for n, _ in tuned.named_parameters()] == ["model.layers.1.self_attn.q_proj.b"]
    tuned.detach()
    with pytest.raises(TargetError, match="as_is: targets 'k' name nothing it acts on"):
        burnish.tune(model, "as_is(targets='k')")


def test_the_role_of_a_matrix_means_its_weight_and_not_its_bias():
    model, _ = tiny("vit")
    tuned = burnish.tune(model, "as_is(targets='q')")
    assert [n for n, _ in tuned.named_parameters()] == \
        [f"vit.layers.{i}.attention.q_proj.weight" for i in range(2)]


def test_a_model_in_which_nothing_asks_is_refused():
    model, _ = tiny("llama")
    with pytest.raises(RecipeError, match="nothing in this model asks for a gradient"):
        burnish.tune(model.requires_grad_(False), "as_is")


def test_what_it_trained_is_saved_and_loaded(tmp_path):
    model, batch = by_hand()
    fresh = copy.deepcopy(model)
    tuned = burnish.tune(model, "as_is")
    tuned.step(batch)
    tuned.save(tmp_path / "adapter")
    burnish.load(fresh, tmp_path / "adapter")
    for (n, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), n


def test_somebody_elses_graph_is_promised_as_it_is_measured():
    """The peer's own tape: nothing is made again, nothing of ours is in the graph."""
    model, batch = by_hand()
    promised = simulate(model, "as_is + lean(on=False)", batch)
    measured = measure(burnish.tune(model, "as_is + lean(on=False)"), batch)
    assert promised.peak_bytes == measured.peak_bytes
    assert promised.trainable == sum(p.numel() for n, p in model.named_parameters()
                                     if n.endswith((".a", ".b")))


def test_a_tensor_that_no_batch_reaches_is_no_obstacle_to_a_promise():     # findings 3.7
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask_token = nn.Parameter(torch.zeros(1, 8))
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    for recipe in ("as_is", "full"):
        report = simulate(Masked(), recipe, (torch.zeros(4, 8),))
        assert report.trainable == 8 + 8 * 8 + 8
        assert any("mask_token" in note for note in report.notes)


def test_targets_of_the_whole_recipe_act_in_a_simulation_or_are_refused():     # findings 3.6
    model, batch = tiny("llama")
    queries = sum(m.q_proj.weight.numel() for m in (x.self_attn for x in model.model.layers))
    assert simulate(model, "full", batch, targets=["*q_proj"]).trainable == queries
    with pytest.raises(TargetError, match="nonsense"):
        simulate(model, "full", batch, targets=["nonsense"])
