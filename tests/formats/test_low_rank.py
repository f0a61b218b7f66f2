"""Every update that is a pair of factors leaves as one: exactly, and no wider than it must be."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.weight.term import Term, Wrap
from burnish.core.registry import names
from burnish.engine.slot import slots
from burnish.formats import peft_files
from burnish.formats.peft import export_peft
from burnish.testing.checks.common import data, fresh, join, method_of, recipe
from burnish.testing.models import tiny

#: starts that leave the base: the update has at most twice the rank
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "sorsa", "loldu", "svfit")
DELTAS = sorted(n for n in names(extra=False) if "delta" in method_of(n).axes())


def joined(name):
    net, _ = fresh("llama")
    tuned = join(net, recipe(name), "llama", calibration=data("llama", torch.float32, recipe(name)))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return tuned


@pytest.mark.parametrize("name", DELTAS)
def test_the_pair_is_the_update(name):
    """``B A`` is what the term adds, or what the function of W makes of it, in float64."""
    if set(method_of(name).kinds) in ({"embedding"}, {"conv"}):
        return                                   # rows of a table have none, and llama no kernel
    tuned = joined(name)
    met = 0
    for _, module, slot in slots(tuned.model):
        for part in slot.parts:
            term = slot.module_of(part)
            if part.place is None or not isinstance(term, Term):
                continue
            term.double()
            if (shared := term.__dict__.get("shared")) is not None:
                shared.double()
            V = part.place.view(slot._stored(module, part.place.param)).detach().double()
            known = term.low_rank_of(V) if isinstance(term, Wrap) else term.low_rank()
            if known is None:
                continue
            met += 1
            A, B = known
            assert A.shape[-1] == V.shape[-1] and B.shape[-2] == V.shape[-2]
            want = term.of(V) - V if isinstance(term, Wrap) else term.final()
            torch.testing.assert_close(B @ A, want, rtol=1e-9, atol=1e-11)
            if name in RESIDUAL:
                assert A.shape[-2] <= 2 * tuned.recipe[0].rank
    assert met or name not in RESIDUAL


@pytest.mark.parametrize("recipe", [*(f"{n}(rank=3)" for n in RESIDUAL),
                                    "pissa(rank=3, iterations=4)", "sorsa(rank=3, alpha=6)",
                                    "loldu(rank=3, alpha=6)", "corda(rank=3, mode='knowledge')",
                                    "lamda(rank=3, init='svd')"])
def test_a_residual_start_leaves_the_base_and_leaves_as_lora(recipe, tmp_path):
    """The base has the same bits after training; the folder is a LoRA of rank <= 2 r, of which
    `peft` makes equal outputs on that base."""
    from peft import PeftModel

    net, batch = tiny("llama")
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    tuned = burnish.tune(net, recipe, calibration=[batch])
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    net.eval()
    ours = net(**batch).logits.detach()
    assert all(torch.equal(p, base[n]) for n, p in net.named_parameters() if n in base)
    export_peft(tuned, tmp_path)
    read = peft_files.read(tmp_path)
    assert read.kind == "LORA" and {x.rank for x in read.loras.values()} <= {3, 6}
    theirs = PeftModel.from_pretrained(tiny("llama")[0], tmp_path).eval()
    torch.testing.assert_close(theirs(**batch).logits, ours, rtol=1e-5, atol=1e-5)


def test_a_start_that_storage_has_absorbed_leaves_all_the_same(tmp_path):
    """QPiSSA: what is exported is what the update is beside the base, not beside the residual."""
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "bf16 + pissa(rank=3, targets='q')")
    _, term = next(tuned.terms(Term))
    assert term.folded
    A, B = term.low_rank()
    torch.testing.assert_close(B @ A, torch.zeros(32, 32), rtol=0, atol=1e-6)
    A, B = term.pair()
    assert float((B @ A).norm()) > 0.1
