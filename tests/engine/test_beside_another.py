"""Parts that act on the whole model, beside another adapter's; storage told what it cannot hold."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.errors import ConfigError, TargetError
from burnish.testing import stir
from burnish.testing.models import tiny


@pytest.mark.parametrize("first, second", [
    ("coded", "coded(bits=2)"), ("coded(bits=8)", "coded"), ("lean", "lean(level=2)"),
    ("lean(on=False)", "lean"), ("offload", "offload(to='disk')"),
    ("coded + offload", "coded(group=64)"), ("chunked_loss", "chunked_loss(on=False)"),
    ("checkpoint", "checkpoint(mode='selective')")])
def test_what_is_one_for_the_model_is_not_said_twice_in_two_ways(first, second):
    net, _ = tiny("llama")
    tuned = burnish.tune(net, f"lora(rank=2) + {first}", name="a")
    policy, lean = tuned.state.tape.policy, tuned.state.tape.lean
    with pytest.raises(ConfigError, match="'a' has asked for.*one for all adapters"):
        tuned.add("b", f"lora(rank=2) + {second}")
    assert list(tuned.adapters) == ["a"]
    assert (tuned.state.tape.policy, tuned.state.tape.lean) == (policy, lean)


def gradients(recipe, again=None):
    torch.manual_seed(0)
    net, batch = tiny("llama")
    tuned = burnish.tune(net.eval(), recipe, head=False, name="a")
    if again:
        tuned.add("b", again)
    stir(tuned, 0, 0.2, adapter="a")
    loss = tuned.loss(batch)
    return tuned, [loss.detach(), *torch.autograd.grad(loss, list(tuned.parameters()))]


@pytest.mark.parametrize("part", ["coded", "offload", "lean(level=2)", "chunked_loss",
                                  "checkpoint"])
def test_said_again_in_the_same_words_it_acts_once(part):
    recipe = f"lora(rank=2) + {part}"
    once, want = gradients(recipe)
    twice, got = gradients(recipe, recipe)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    kinds = [(type(t.policy), type(getattr(t.policy, "inner", None)))
             for t in (once.state.tape, twice.state.tape)]
    assert kinds[0] == kinds[1]
    twice.adapters.remove("b")
    assert type(twice.state.tape.policy) is kinds[0][0]


@pytest.mark.parametrize("targets", ["['lm_head']", "'lm_head'"])
def test_nf4_told_the_head_alone_says_that_it_leaves_it(targets):
    net, _ = tiny("llama")
    before = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(TargetError, match=r"nf4: targets .*lm_head.* nothing that it acts on; it "
                                          r"leaves lm_head.weight as it is"):
        burnish.tune(net, f"nf4(targets={targets}) + lora(rank=2)")
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_bf16_of_weights_that_are_bf16_is_refused_where_it_was_told_them_and_noted_else():
    net, _ = tiny("llama", dtype=torch.bfloat16)
    with pytest.raises(TargetError, match="bf16: targets 'q' name nothing that it acts on"):
        burnish.tune(net, "bf16(targets='q') + lora(rank=2)")
    tuned = burnish.tune(net, "bf16 + lora(rank=2)")
    assert any("bf16 leaves" in n and "as it is" in n for n in tuned.adapters.active.notes)


def test_the_head_among_others_is_noted():
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "nf4(targets=['lm_head', 'q']) + lora(rank=2)")
    assert any(n.startswith("nf4 leaves lm_head.weight") for n in tuned.adapters.active.notes)
    assert net.lm_head.weight.dtype == torch.float32
