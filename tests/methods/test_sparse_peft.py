"""SparsePEFT: what is added passes the mask of a pruned weight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import RecipeError
from burnish.memory import simulate
from burnish.testing import follows, tiny


def made(recipe, zeros=0.4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10)).double()
    with torch.no_grad():
        net[0].weight.mul_(torch.rand(10, 12) > zeros)
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, recipe, head=False, targets="0")
    ((_, term),) = tuned.terms(Chain)
    term.double()
    nn.init.normal_(term.B)
    return net, tuned, W, term


def test_outputs_and_gradients_are_those_of_the_equation():
    """On a checkpoint that was pruned elsewhere."""
    net, tuned, W, term = made("lora(rank=2, alpha=6) + sparse_peft")
    bias, M = net[0].bias.detach(), (W != 0).double()
    assert 0.3 < float(1 - M.mean()) < 0.5
    follows(tuned, lambda x, A, B: F.linear(x, (W + 3 * B @ A) * M, bias), [term.A, term.B],
            (5, 3, 12))
    assert torch.equal(tuned.merge()[0].weight != 0, M.bool())


def test_zeros_that_a_part_beside_it_makes():
    net, tuned, W, term = made("magnitude(ratio=0.5) + lora(rank=2, alpha=6) + sparse_peft", 0.0)
    bias, held = net[0].bias.detach(), net[0].weight.detach().clone()
    M = (held != 0).double()
    assert torch.equal(M.sum(1), torch.full((10,), 6.0).double()) and torch.equal(held, W * M)
    follows(tuned, lambda x, A, B: F.linear(x, (W + 3 * B @ A) * M, bias), [term.A, term.B],
            (5, 3, 12))
    assert torch.equal(tuned.merge()[0].weight != 0, M.bool())


def test_each_is_the_function_of_the_weights_it_names():
    assert len(burnish.parse("sparse_peft(targets='q') + sparse_peft(targets='v')")) == 2
    with pytest.raises(RecipeError, match="the function of W on the default targets"):
        burnish.parse("sparse_peft + sparse_peft")


def test_a_weight_that_trains_keeps_its_zeros():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10))
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    tuned = burnish.tune(net, "full + sparse_peft", head=False, targets="0")
    x = torch.randn(4, 12)
    tuned.optimizer(lr=0.1)
    for _ in range(3):
        tuned.step((x,), loss=lambda out, batch: out.square().sum())
    assert not tuned.merge()[0].weight[:, ::2].any()


def test_a_folder_and_a_merge_of_a_whole_model(tmp_path):
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "wanda + lora(rank=2) + sparse_peft", head=False,
                         calibration=[batch])
    tuned.optimizer(lr=0.05)
    for _ in range(3):
        tuned.step(batch)
    net.eval()
    want = net(**batch).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(base, tmp_path / "a")
    base.eval()
    assert torch.equal(base(**batch).logits, want)
    merged = again.merge()
    torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-5, atol=1e-6)
    shares = [float((m.weight == 0).float().mean()) for n, m in merged.named_modules()
              if isinstance(m, nn.Linear) and "layers" in n]
    assert shares == [0.5] * 14


def test_dropout_and_a_second_function_of_w_are_refused():
    with pytest.raises(RecipeError, match="dropout on the input of .* cannot act under a function"):
        burnish.tune(tiny("llama")[0], "lora(rank=2, dropout=0.1, targets='q') + "
                     "sparse_peft(targets='q')")
    burnish.tune(tiny("llama")[0], "lora(rank=2, dropout=0.1, targets='k') + "
                 "sparse_peft(targets='q')", head=False)
    with pytest.raises(RecipeError, match="dropout on the input of .* cannot act under"):
        burnish.tune(tiny("llama")[0], "lora(rank=4, dropout=0.1) + bone(rank=4)")
    with pytest.raises(RecipeError, match="function of W"):
        burnish.tune(tiny("llama")[0], "dora(rank=2) + sparse_peft")


def test_a_forward_keeps_the_input_and_nothing_of_the_weights_size():
    net, batch = tiny("llama", hidden_size=256, intermediate_size=512)
    kept = {t: simulate(net, f"{t} + lean(on=False)", batch).by_category["activations"]
            for t in ("lora(rank=2)", "lora(rank=2) + sparse_peft")}
    assert kept["lora(rank=2) + sparse_peft"] <= kept["lora(rank=2)"]
