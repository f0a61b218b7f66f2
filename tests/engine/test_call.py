"""A forward is fixed when it begins: backward computes what it computed, whatever came between,
and threads do not see each other."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.core.call import current
from burnish.core.method import Method
from burnish.core.recipe import parse
from burnish.core.site import Branch
from burnish.testing import choose, stir
from burnish.testing.models import tiny


def gradients(tuned):
    got = {n: p.grad.clone() for n, p in tuned.model.named_parameters() if p.grad is not None}
    tuned.model.zero_grad(set_to_none=True)
    return got


def same(got, want, **kw):
    assert got.keys() == want.keys() and want
    for n in want:
        torch.testing.assert_close(got[n], want[n], msg=lambda m, n=n: f"{n}: {m}", **kw)


# -- backward reads the forward, not the present ---------------------------- findings 1.5

@pytest.mark.parametrize("recipe", ["mola(rank=2, dropout=0.0, balance=0.5)",
                                    "mola(rank=2, dropout=0.0, balance=0.5) + checkpoint"])
def test_two_forwards_with_different_masks_and_one_backward(recipe):
    net, batch = tiny("llama")
    tuned = stir(burnish.tune(net, recipe))
    ids = batch["input_ids"]
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[0][:, 2:] = 0
    masks[1][0, 6:] = 0
    alone = []
    for mask in masks:
        net(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        alone.append(gradients(tuned))
    sum(net(input_ids=ids, attention_mask=m, labels=ids).loss for m in masks).backward()
    same(gradients(tuned), {n: alone[0][n] + alone[1][n] for n in alone[0]}, rtol=1e-4, atol=1e-6)


MODELS = [("lora(rank=2)", "vit"), ("lora(rank=2) + checkpoint", "vit"),
          ("dora(rank=2) + checkpoint", "llama"), ("lora(rank=2)", "cnn"),
          ("snella(rank=2)", "encoder"),
          ("houlsby(bottleneck=4, norms=False) + checkpoint", "bert"),
          ("prefix(length=2) + checkpoint", "llama"), ("nf4 + lora(rank=2) + checkpoint", "gpt2"),
          ("lst(reduction=4)", "llama"), ("ia3 + checkpoint", "vit")]


@pytest.mark.parametrize("recipe,model", MODELS)
def test_what_runs_between_forward_and_backward_changes_nothing(recipe, model):
    """Another adapter in use, another batch, the base: backward still sees its own forward."""
    net, batch = tiny(model)
    net.eval()
    tuned = stir(burnish.tune(net, recipe, head=False))
    tuned.add("other", " + ".join(p for p in recipe.split(" + ") if p not in ("checkpoint", "nf4")))
    tuned.loss(batch).backward()
    want = gradients(tuned)
    loss = tuned.loss(batch)
    tuned.use("other")
    tuned.loss({n: v.flip(0) for n, v in batch.items()}).backward()
    with tuned.disabled(), torch.no_grad():
        net(**batch)
    tuned.use("default")
    tuned.model.zero_grad()
    with tuned.disabled():
        loss.backward()
    same(gradients(tuned), want, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "lora(rank=2) + checkpoint",
                                    "houlsby(norms=False) + checkpoint",
                                    "prefix(length=2) + checkpoint"])
@pytest.mark.parametrize("then", ["other", {"default": 0.5, "other": 0.5}, ["other", None]])
def test_the_inputs_gradient_is_that_of_the_adapter_that_ran(recipe, then):
    if "prefix" in recipe and then != "other":
        then = "other"
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, recipe, head=False))
    tuned.add("other", recipe.removesuffix(" + checkpoint"))
    tuned.use("other")
    stir(tuned, 2)
    tuned.use("default")
    x = batch["pixel_values"].clone().requires_grad_()
    (want,) = torch.autograd.grad(net(x).logits.square().sum(), x)
    loss = net(x).logits.square().sum()
    tuned.use(then)
    (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, want)


def test_a_forward_of_an_adapter_that_was_taken_out_since_is_refused():
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, "lora(rank=2) + checkpoint", head=False))
    loss = tuned.loss(batch)
    for _, _, slot in burnish.engine.slot.slots(net):
        slot.drop("default")
    with pytest.raises(burnish.RecipeError, match="taken out since"):
        loss.backward()


class Spanning(Method):
    """Reads the output of the first block in the second."""

    def branch(self, anatomy):
        first, second = (b.path for b in anatomy.blocks[:2])
        yield Branch(second, nn.Linear(32, 32), read=(first, "output"))


def test_a_state_from_another_block_cannot_enter_one_that_runs_again():
    net, batch = tiny("vit")
    burnish.register(Spanning, "spanning")
    tuned = burnish.tune(net, [Spanning()])
    tuned.loss(batch).backward()
    assert all(p.grad is not None for p in tuned.parameters())
    net, batch = tiny("vit")
    tuned = burnish.tune(net, [Spanning(), *parse("checkpoint")])
    with pytest.raises(burnish.RecipeError, match="did not run before it in the same block"):
        tuned.loss(batch)


def test_nothing_stays_open_and_the_box_is_emptied():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "prefix(length=2)")
    calls = []
    net.model.layers[0].register_forward_hook(lambda *_: calls.append(current()))
    tuned.loss(batch)
    assert current() is None and calls[0] is not None and not calls[0].box
    with pytest.raises(ValueError):
        net(input_ids=None)
    assert current() is None


# -- the base between a forward and its backward ---------------------------- findings 1.8

@pytest.mark.parametrize("recipe,model", [("full", "bert"), ("full", "gpt2"), ("full", "cnn"),
                                          ("lora(rank=2)", "vit"), ("bitfit", "gpt2"),
                                          ("full + checkpoint", "llama"), ("norms", "encoder")])
def test_a_penalty_against_the_base_trains_base_weights(recipe, model):
    """Knowledge distillation from oneself: the base answers between forward and backward."""
    net, batch = tiny(model)
    base = copy.deepcopy(net)
    tuned = stir(burnish.tune(net, recipe, head=True))
    net.eval(), base.eval()
    with torch.no_grad():
        want = base(**batch).logits

    def penalty(reference):
        out = net(**batch).logits
        return F.mse_loss(out, reference(), reduction="sum")

    def off():
        with torch.no_grad(), tuned.disabled():
            return net(**batch).logits

    penalty(lambda: want).backward()
    expected = gradients(tuned)
    before = {n: (p.data_ptr(), p._version) for n, p in net.named_parameters()}
    loss = penalty(off)
    torch.testing.assert_close(off(), want)      # stock encoders take a fused path, to rounding
    assert not torch.allclose(net(**batch).logits, want)
    loss.backward()
    same(gradients(tuned), expected)
    assert before == {n: (p.data_ptr(), p._version) for n, p in net.named_parameters()}, \
        "nothing was copied or written"


def test_the_base_itself_may_be_differentiated_and_recomputed():
    net, batch = tiny("vit")
    base = copy.deepcopy(net).eval()
    tuned = stir(burnish.tune(net, "full + checkpoint"))
    net.eval()
    x = batch["pixel_values"].clone().requires_grad_()
    (want,) = torch.autograd.grad(base(x).logits.square().sum(), x)
    with tuned.disabled():
        loss = net(x).logits.square().sum()
    (got,) = torch.autograd.grad(loss, x)           # outside: still the base's
    torch.testing.assert_close(got, want)


def test_one_threads_base_is_not_anothers():
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, "full"))
    net.eval()
    with torch.no_grad():
        want, seen = net(**batch).logits, []

        def other():
            with torch.no_grad():
                seen.append(net(**batch).logits)

        with tuned.disabled():
            t = threading.Thread(target=other)
            t.start(), t.join()
            assert not torch.equal(net(**batch).logits, want)
    assert torch.equal(seen[0], want)


# -- threads ---------------------------------------------------------------- findings 1.9

PAIRS = [("lora(rank=2)", "encoder"), ("snella(rank=2)", "encoder"), ("lora(rank=2)", "cnn"),
         ("parallel(bottleneck=4, tap='residual')", "vit"), ("lst(reduction=4)", "llama"),
         ("prefix(length=2)", "llama")]


def together(*work):
    """Run each in a thread of its own, from a common start; raises what any of them raised."""
    start, failed = threading.Barrier(len(work)), []

    def run(f):
        try:
            start.wait()
            f()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(f,)) for f in work]
    [t.start() for t in threads]
    [t.join() for t in threads]
    if failed:
        raise failed[0]


def in_threads(recipe, model, times, threads=3):
    net, batch = tiny(model)
    stir(burnish.tune(net, recipe))
    net.eval()
    batches = []
    for k in range(threads):
        g = torch.Generator().manual_seed(k)
        batches.append({n: v + torch.randn(v.shape, generator=g) if v.is_floating_point()
                        else v.roll(k, 0) if n != "attention_mask" else v
                        for n, v in batch.items()})

    @torch.no_grad()
    def answers(b):
        return net(**b).logits

    want = [answers(b) for b in batches]
    wrong = [0] * threads

    def serve(k):
        for _ in range(times):
            wrong[k] += not torch.equal(answers(batches[k]), want[k])

    together(*[lambda k=k: serve(k) for k in range(threads)])
    assert wrong == [0] * threads


@pytest.mark.parametrize("recipe,model", PAIRS)
def test_three_threads_share_one_tuned_model(recipe, model):
    in_threads(recipe, model, 60)


if choose.everything():                          # many minutes a pair: part of `make test-all`
    @pytest.mark.slow
    @pytest.mark.parametrize("recipe,model", PAIRS)
    def test_three_threads_share_one_tuned_model_for_long(recipe, model):
        in_threads(recipe, model, 10_000)


@pytest.mark.parametrize("recipe,model", [("lora(rank=2)", "cnn"), ("lora(rank=2)", "encoder"),
                                          ("prefix(length=2) + checkpoint", "llama")])
def test_gradients_in_two_threads_of_one_model(recipe, model):
    net, batch = tiny(model)
    tuned = stir(burnish.tune(net, recipe))
    net.eval()
    trained = list(tuned.parameters())
    want = torch.autograd.grad(tuned.loss(batch), trained)

    def train():
        for _ in range(20):
            for a, b in zip(torch.autograd.grad(tuned.loss(batch), trained), want, strict=True):
                assert torch.equal(a, b)

    together(train, train)
