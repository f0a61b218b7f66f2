"""A tuned model compiled: eager's outputs and gradients, or uncompiled with a note. findings 1.6"""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.testing import stir
from burnish.testing.models import tiny

#: recipes that enter the graph
INSIDE = ["lora(rank=2)", "nf4 + lora(rank=2)", "lora(rank=2) + checkpoint", "dora(rank=2)", "full"]


def agrees(recipe, model, backend, **kw):
    torch._dynamo.reset()
    net, batch = tiny(model)
    net.eval()                                    # Mixtral's and BERT's own dropout draw otherwise
    tuned = stir(burnish.tune(net, recipe))
    trained = list(tuned.parameters())
    loss = tuned.loss(batch)
    want = torch.autograd.grad(loss, trained)
    fast = torch.compile(net, backend=backend, **kw)
    for _ in range(2):
        got = fast(**batch).loss
        torch.testing.assert_close(got, loss)
        for a, b in zip(torch.autograd.grad(got, trained), want, strict=True):
            torch.testing.assert_close(a, b)
    return tuned, fast, batch


def test_a_llama_compiles_whole():
    tuned, _, batch = agrees("lora(rank=2)", "llama", "eager", fullgraph=True)
    fast = torch.compile(tuned.model, backend="eager")
    with tuned.disabled(), torch.no_grad():       # its guards see what changes
        want = tuned.model(**batch).logits
        torch.testing.assert_close(fast(**batch).logits, want)
    with torch.no_grad():
        assert not torch.allclose(fast(**batch).logits, want)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "nf4 + lora(rank=2)",
                                    *(pytest.param(r, marks=pytest.mark.slow)
                                      for r in ("lora(rank=2) + checkpoint", "dora(rank=2)",
                                                "full"))])
def test_a_model_that_is_first_compiled_without_gradients(recipe):
    """Serving: no pass with a graph has come before."""
    torch._dynamo.reset()
    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net.eval(), recipe))
    fast = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, tuned.model(**batch).logits)
    with torch.inference_mode():
        torch.testing.assert_close(fast(**batch).logits, tuned.model(**batch).logits)


def test_what_cannot_enter_a_graph_runs_uncompiled_and_says_so():
    with pytest.warns(UserWarning, match="this model runs uncompiled, since parts of the recipe"):
        agrees("prefix(length=2)", "vit", "eager")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "bert", "vit"])
@pytest.mark.parametrize("recipe", INSIDE)
def test_common_recipes_compile(recipe, model):
    agrees(recipe, model, "aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe,model", [("lora(rank=2)", "gpt2"), ("lora(rank=2)", "cnn"),
                                          ("houlsby(width=4)", "bert"), ("snella(rank=2)", "vit"),
                                          ("mola(rank=2, dropout=0.0)", "llama"),
                                          ("lora(rank=2)", "encoder"), ("ia3", "llama")])
@pytest.mark.filterwarnings("ignore:torch.compile")
def test_others_compile_or_step_aside(recipe, model):
    agrees(recipe, model, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", INSIDE[:3])
def test_compiled_with_inductor(recipe):
    agrees(recipe, "llama", "inductor", fullgraph=True)
