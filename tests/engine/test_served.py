"""One batch, many adapters: ``tuned.adapters.rows``, alone, in generate, in threads, compiled."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import burnish
from burnish.blocks.weight.term import Term
from burnish.core.errors import ConfigError, RecipeError
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny

#: low-rank updates of several kinds and ranks, on different places
CHAINS = {"a": "lora(rank=4)", "b": "lora(rank=2, alpha=3, targets='q,v')", "c": "lora(rank=7)",
          "d": "pissa(rank=2)", "e": "adalora(rank=3)"}
#: others, which run by themselves
OTHERS = {"f": "dora(rank=2)", "g": "vera(rank=4)", "h": "snella(rank=2)", "i": "ia3"}


def served(recipes, model="llama", batch=6, **config):
    net, inputs = tiny(model, dtype=torch.float64, batch=batch, **config)
    inputs.pop("labels")
    (first, recipe), *rest = recipes.items()
    tuned = burnish.tune(net.eval(), recipe, head=False, name=first)
    for name, recipe in rest:
        tuned.add(name, recipe, seed=len(name))
    for _, _, slot in slots(net):
        slot.double()
    for i, name in enumerate(recipes):
        stir(tuned, i, 0.2, adapter=name)
    net.eval()
    return tuned, inputs


def answer(tuned, inputs):
    with torch.no_grad():
        return tuned.model(**inputs).logits


def alone(tuned, inputs, rows, ask=answer):
    """Each sample by itself, with its adapter in use."""
    used = tuned.state.active[0][0]
    out = []
    for i, name in enumerate(rows):
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        if name is None:
            with tuned.disabled():
                out.append(ask(tuned, one))
        else:
            tuned.use(name)
            out.append(ask(tuned, one))
    tuned.use(used)
    return torch.cat(out)


@pytest.mark.parametrize("model", ["llama", "gpt2", "timm_qkv"])
@pytest.mark.parametrize("rows", [["c", "a", None, "b", "a", "d"], ["e", "d", "c", "b", "a", "a"],
                                  [None] * 6, ["a"] * 6], ids=str)
def test_every_sample_is_answered_as_alone(model, rows):
    tuned, inputs = served(CHAINS, model)
    want, all_base = alone(tuned, inputs, rows), alone(tuned, inputs, [None] * 6)
    before = answer(tuned, inputs)
    with tuned.adapters.rows(rows):
        for _ in range(2):
            torch.testing.assert_close(answer(tuned, inputs), want, rtol=1e-9, atol=1e-9)
    assert torch.equal(answer(tuned, inputs), before), "what is in use has stayed"
    for i, name in enumerate(rows):
        assert (name is None) == torch.allclose(want[i], all_base[i])


def test_chains_and_other_updates_share_a_batch():
    tuned, inputs = served({**CHAINS, **OTHERS}, batch=8)
    rows = ["f", "a", "g", None, "h", "d", "i", "c"]
    want = alone(tuned, inputs, rows)
    with tuned.adapters.rows(rows):
        torch.testing.assert_close(answer(tuned, inputs), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recipe", ["nf4 + lora(rank=4)", "nf4 + pissa(rank=2)",
                                    "lora(rank=4) + checkpoint", "lora(rank=4) + lean"])
def test_beside_other_parts_of_a_recipe(recipe):
    tuned, inputs = served({"a": recipe, "b": "lora(rank=3)"}, batch=3)
    rows = ["b", None, "a"]
    want = alone(tuned, inputs, rows)
    with tuned.adapters.rows(rows):
        torch.testing.assert_close(answer(tuned, inputs), want, rtol=1e-9, atol=1e-9)


def test_the_weight_is_multiplied_once_for_all_adapters():
    names = [f"a{i}" for i in range(6)]
    tuned, inputs = served(dict.fromkeys(names, "lora(rank=2)"))

    def products(rows):
        with torch.profiler.profile() as ran, tuned.adapters.rows(rows):
            answer(tuned, inputs)
        return sum(e.count for e in ran.key_averages() if e.key in ("aten::mm", "aten::addmm"))
    assert products(names) == products([None] * 6)


@pytest.mark.parametrize("checkpoint", ["", " + checkpoint"])
def test_gradients_are_those_of_each_sample_alone(checkpoint):
    tuned, inputs = served({"a": "lora(rank=2)" + checkpoint, "b": "lora(rank=3)"}, batch=3)
    tuned.use("a")                                     # it trains: its gradient is that of its rows
    trained, rows = list(tuned.parameters()), ["b", "a", None]
    x = tuned.model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    w = torch.randn(3, x.shape[1], 1, dtype=x.dtype)
    with tuned.adapters.rows(rows):
        got = torch.autograd.grad((tuned.model(inputs_embeds=x).logits * w).sum(), [x, *trained])
    want_x = []
    for i, name in enumerate(rows):
        one = x[i : i + 1].detach().requires_grad_()
        with tuned.disabled() if name is None else torch.enable_grad():
            if name:
                tuned.use(name)
            loss = (tuned.model(inputs_embeds=one).logits * w[i]).sum()
            asked = [one, *(trained if name == "a" else [])]
            g = torch.autograd.grad(loss, asked)
        want_x.append(g[0])
        if name == "a":
            for mine, theirs in zip(got[1:], g[1:], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[0], torch.cat(want_x), rtol=1e-9, atol=1e-9)


def generated(tuned, inputs, **kw):
    ids = tuned.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kw)
    return ids


@pytest.mark.parametrize("copies, kw", [
    (1, {}), (2, {"num_beams": 2}), (3, {"num_beams": 3, "num_return_sequences": 3})], ids=str)
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_generate_gives_each_sample_what_it_gets_alone(model, copies, kw):
    tuned, inputs = served({"a": "lora(rank=4)", "b": "lora(rank=2)"}, model, batch=4)
    inputs = {"input_ids": inputs["input_ids"]}
    rows = ["b", None, "a", "b"]
    want = alone(tuned, inputs, rows, lambda t, i: generated(t, i, **kw))
    with tuned.adapters.rows(rows, copies=copies):
        assert torch.equal(generated(tuned, inputs, **kw), want)
    if copies > 1:
        with tuned.adapters.rows(rows), pytest.raises(RecipeError, match="copies=num_beams"):
            generated(tuned, inputs, **kw)


def test_threads_serve_their_own_rows():
    tuned, inputs = served({"a": "lora(rank=4)", "b": "lora(rank=2)"}, batch=2)
    batches = [["a", "b"], ["b", "a"], [None, "b"], ["a", "a"]]
    want = [alone(tuned, inputs, rows) for rows in batches]
    wrong = []

    def serve(rows, want):
        for _ in range(5):
            with tuned.adapters.rows(rows):
                if not torch.allclose(answer(tuned, inputs), want, rtol=1e-9, atol=1e-9):
                    wrong.append(rows)

    threads = [threading.Thread(target=serve, args=pair)
               for pair in zip(batches, want, strict=True)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_more_batches_than_are_remembered_stay_right_and_bounded():
    tuned, inputs = served({"a": "lora(rank=4)", "b": "lora(rank=2)"}, batch=3)
    for i in range(27):
        rows = [("a", "b", None)[i // 3**k % 3] for k in range(3)]
        want = alone(tuned, inputs, rows) if i % 5 == 0 else None
        for _ in range(2):
            with tuned.adapters.rows(rows):
                got = answer(tuned, inputs)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    linears = sum(any(p.place for p in s.parts) for _, _, s in slots(tuned.model))
    assert len(tuned.state.room.held) <= 4 * linears, "stacks of forgotten batches are let go"


def test_a_change_is_seen_and_copies_are_free_of_each_other():
    tuned, inputs = served({"a": "lora(rank=4)", "b": "lora(rank=2)"}, batch=2)
    with tuned.adapters.rows(["a", "b"]):
        before = answer(tuned, inputs)
        twin = copy.deepcopy(tuned)
        _, term = next(iter(tuned.terms(Term, "b")))
        with torch.no_grad():
            term.B.mul_(3)
        after = answer(tuned, inputs)
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])
    torch.testing.assert_close(after, alone(tuned, inputs, ["a", "b"]), rtol=1e-9, atol=1e-9)
    with twin.adapters.rows(["a", "b"]):
        assert torch.equal(answer(twin, inputs), before)


def test_dropout_acts_while_training():
    tuned, inputs = served({"a": "lora(rank=4, dropout=0.5)", "b": "lora(rank=2)"}, batch=2)
    with tuned.adapters.rows(["a", "b"]):
        still = answer(tuned, inputs)
        tuned.model.train()
        first, second = answer(tuned, inputs), answer(tuned, inputs)
    assert not torch.allclose(first[0], second[0])
    torch.testing.assert_close(first[1], still[1], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:torch.compile")
def test_a_compiled_model_answers_row_by_row_too():
    torch._dynamo.reset()
    tuned, inputs = served({"a": "lora(rank=4)", "b": "lora(rank=2)"}, batch=2)
    fast = torch.compile(tuned.model, backend="eager")
    want, whole = alone(tuned, inputs, ["b", "a"]), answer(tuned, inputs)
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, whole)
        with tuned.adapters.rows(["b", "a"]):
            torch.testing.assert_close(fast(**inputs).logits, want)
        torch.testing.assert_close(fast(**inputs).logits, whole)


# -- refused beforehand ---------------------------------------------------------------------------

@pytest.mark.parametrize("rows, kw, words", [
    (["a", "bb"], {}, "bb"), ("a", {}, "a list with an adapter's name"), ([], {}, "a list with"),
    (["a", None], {"copies": 0}, "a whole number from 1"),
    (["a", None], {"copies": True}, "a whole number from 1"),
    (["a", "p"], {}, "every sample of a batch")], ids=str)
def test_what_cannot_be_is_refused_before_anything_runs(rows, kw, words):
    tuned, inputs = served({"a": "lora(rank=2)", "p": "prompt_tuning(length=2)"}, batch=2)
    tuned.use("a")
    with pytest.raises(burnish.BurnishError, match=words), tuned.adapters.rows(rows, **kw):
        raise AssertionError("unreachable")
    assert not tuned.state.rows_here


def test_a_head_that_trains_stands_in_the_way():
    net, inputs = tiny("vit", batch=2)
    tuned = burnish.tune(net, "lora(rank=2)", head=True, name="a")
    tuned.add("b", "lora(rank=2)")
    with pytest.raises(ConfigError, match="use.*base's values back first"), \
            tuned.adapters.rows(["b", None]):
        raise AssertionError("unreachable")
    tuned.use("b")
    with tuned.adapters.rows(["b", None]):
        net(**inputs)


def test_a_batch_of_another_size_is_refused():
    tuned, inputs = served({"a": "lora(rank=2)"}, batch=6)
    for rows, copies in ((["a", None], 1), (["a", None], 2), (["a"] * 5, 1)):
        with tuned.adapters.rows(rows, copies), pytest.raises(RecipeError, match="a batch of 6"):
            answer(tuned, inputs)
    with tuned.adapters.rows(["a", None], 3):
        answer(tuned, inputs)


def test_a_base_weight_that_its_owner_lets_train_gets_the_gradient_of_all_samples():
    linear = torch.nn.Linear(6, 5).double()
    net = torch.nn.Sequential(linear)
    tuned = burnish.tune(net, "lora(rank=2)", targets="0", head=False, name="a")
    tuned.add("b", "lora(rank=2)", targets="0")
    for p in net.parameters():
        p.requires_grad_(p is linear.weight)
    x = torch.randn(3, 6, dtype=torch.float64)
    with tuned.adapters.rows(["a", None, "b"]):
        net(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(5, 6))
