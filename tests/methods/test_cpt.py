"""CPT: the whole loss written out in float64, the balls, and what may not move."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import burnish
from burnish.core.recipe import parse
from burnish.testing.checks.common import next_word_loss
from burnish.testing.models import tiny

IDS = [5, 9, 7, 11, 3, 6, 9, 8, 12, 13, 2]
TYPES = [1, 2, 3, 4, 0, 5, 6, 7, 8, 8, 9]                # two examples, a label of two tokens
RECIPE = f"cpt(ids={IDS}, types={TYPES}, label_decay=0.5)"
FREE = torch.tensor([t % 4 != 0 for t in TYPES])


def joined(model="llama", recipe=RECIPE, stirred=True, exact=True, **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    if exact:
        net.loss_function = next_word_loss               # transformers' own rounds to float32
    batch = {**batch, "labels": batch["labels"].clone()}
    batch["labels"][:, :3] = -100
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, recipe, head=False)
    (d,) = tuned.parameters()
    d.data = d.data.double()
    if stirred:
        g = torch.Generator().manual_seed(3)
        d.data.add_(0.1 * torch.randn(d.shape, generator=g, dtype=torch.float64))
    return tuned, batch, base, d


def embeddings(base, batch, d):
    embed = base.get_input_embeddings()                  # Gemma's scales
    front = embed(torch.tensor(IDS)) + d * FREE.unsqueeze(1)
    x = embed(batch["input_ids"])
    return torch.cat([front.expand(len(x), -1, -1), x], 1)


def logits(base, batch, d):
    mask = F.pad(batch["attention_mask"], (len(IDS), 0), value=1) \
        if "attention_mask" in batch else None
    return base(inputs_embeds=embeddings(base, batch, d), attention_mask=mask).logits


def whole(base, batch, d, decay):
    """Mean over all labelled tokens; the query's weigh 1, then decay, then decay^2."""
    z = logits(base, batch, d)
    total, n = 0.0, 0
    for row in range(len(z)):
        every = [*IDS, *batch["labels"][row].tolist()]
        for i, word in enumerate(every):
            if i < len(IDS):
                weight = {4: decay**2, 8: decay}.get(TYPES[i])
            else:
                weight = 1.0 if word != -100 and i > len(IDS) else None
            if weight is None:
                continue
            total = total - weight * F.log_softmax(z[row, i - 1], -1)[word]
            n += 1
    return total / n


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_the_loss_and_its_gradient(model, decay):
    tuned, batch, base, d = joined(model, RECIPE.replace("0.5", str(decay)))
    batch["labels"][:, 0] = batch["input_ids"][:, 0]         # a first token is said by nobody
    tuned.optimizer(lr=1e-3)
    got = tuned.loss(batch)
    theta = d.detach().clone().requires_grad_()
    want = whole(base, batch, theta, decay)
    want.backward()
    got.backward()
    rel = 1e-7 if model == "llama" else 1e-8                 # Llama's norms are fp32 in any model
    assert float((d.grad - theta.grad).abs().max()) <= rel * float(theta.grad.abs().max())
    assert not d.grad[~FREE].any() and d.grad[FREE].any()


@pytest.mark.parametrize("family, more", [
    ("Cohere", {"logit_scale": 0.25}), ("Granite", {"logits_scaling": 5.0}),
    ("Gemma2", {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8, "head_dim": 8}),
])
def test_what_a_model_does_to_its_logits_is_done_to_the_context_s(family, more):
    """The head's own product was taken for them: a scale and a soft cap were left out."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, pad_token_id=0, attn_implementation="eager", **more)
    net = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    net.loss_function = next_word_loss
    net.requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (2, 6), generator=g)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][:, :3] = -100
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, RECIPE, head=False)
    (d,) = tuned.parameters()
    d.data = 0.1 * torch.randn(d.shape, generator=g, dtype=torch.float64)
    tuned.optimizer(lr=1e-3)
    theta = d.detach().clone().requires_grad_()
    whole(base, batch, theta, 0.5).backward()
    tuned.loss(batch).backward()
    assert float((d.grad - theta.grad).abs().max()) <= 1e-5 * float(theta.grad.abs().max())
    assert "forward" not in vars(net.model)


def test_a_micro_batch_has_its_share():
    """A loss divided by the labels of several micro-batches takes the context's along as well."""
    tuned, batch, base, d = joined(exact=False)
    tuned.optimizer(lr=1e-3)
    n = int((batch["labels"][:, 1:] != -100).sum())
    tuned.loss(batch).backward()
    alone, d.grad = d.grad, None
    tuned.loss({**batch, "num_items_in_batch": 4 * n}).backward()
    torch.testing.assert_close(d.grad, alone / 4, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen_moe"])
def test_at_the_start_it_is_in_context_learning(model):
    tuned, batch, base, d = joined(model, stirred=False)
    assert not d.any()
    ids = torch.cat([torch.tensor(IDS).expand(len(batch["input_ids"]), -1), batch["input_ids"]], 1)
    tuned.model.eval()
    base.eval()
    keys = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        got = tuned.model(**keys).logits
        want = base(input_ids=ids).logits[:, len(IDS):]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_no_row_leaves_its_ball_and_labels_never_move():
    tuned, batch, base, d = joined(stirred=False, recipe=RECIPE.replace(
        "label_decay", "input_radius=0.2, format_radius=0.05, label_decay"))
    root = (32 / 2048) ** 0.5
    radii = torch.tensor([0.0 if t % 4 == 0 else root * (0.2 if t % 4 == 2 else 0.05)
                          for t in TYPES], dtype=torch.float64)
    tuned.optimizer(lr=3e-3)
    for _ in range(8):
        tuned.step(batch)
        norms = d.detach().norm(dim=1)
        assert bool((norms <= radii * (1 + 1e-9)).all())
        assert not d.detach()[~FREE].any()
    assert bool((norms[FREE] >= radii[FREE] * (1 - 1e-9)).all())     # they do reach it
    (state,) = tuned.current_optimizer.state.values()
    assert float(state["exp_avg"].abs().max()) > 0               # moments are the gradient's


def test_inside_its_ball_a_row_is_stepped_as_by_adam_alone():
    tuned, batch, base, d = joined(stirred=False)
    tuned.optimizer(lr=1e-4, weight_decay=0.1)
    tuned.loss(batch).backward()
    g = d.grad.clone()
    d.grad = None
    tuned.step(batch)
    torch.testing.assert_close(d.detach(), -1e-4 * g / (g.abs() + 1e-8), rtol=1e-5, atol=1e-12)


def test_by_evaluations_the_context_counts_too():
    tuned, batch, base, d = joined(recipe=f"{RECIPE} + mezo(eps=0.001)")
    tuned.optimizer(lr=0.0)
    want = float(whole(base, batch, d.detach(), 0.5))
    value = float(tuned.step(batch))                     # the mean of the two points beside it
    assert value == pytest.approx(want, rel=1e-5)


def test_generation_puts_the_context_in_once():
    tuned, batch, base, d = joined()
    tuned.model.eval()
    ids = batch["input_ids"][:, :4]
    with torch.no_grad():
        first = tuned.model(input_ids=ids, use_cache=True)
        word = first.logits[:, -1:].argmax(-1)
        second = tuned.model(input_ids=word, past_key_values=first.past_key_values,
                             attention_mask=torch.ones(len(ids), 5, dtype=torch.long)).logits
        want = tuned.model(input_ids=torch.cat([ids, word], 1)).logits[:, -1:]
    torch.testing.assert_close(second, want, rtol=1e-8, atol=1e-10)


def test_nothing_of_a_forward_waits_where_no_term_is_wanted():
    tuned, batch, base, d = joined()
    from burnish.blocks.state.examples import Examples

    (rows,) = (m for m in tuned.model.modules() if isinstance(m, Examples))
    with torch.no_grad():
        tuned.model(**batch)
    assert rows.said is None
    tuned.step(batch)
    assert rows.said is None


def test_counts_and_defaults():
    made = parse(f"cpt(ids={IDS})")[0]
    assert (made.input_radius, made.format_radius, made.label_decay) == (0.1, 0.1, 0.95)
    assert made.count(4096) == len(IDS) * 4096
    assert parse("cpt(types=())")[0].coded().codes == ()     # (of no tokens, which tune refuses)
    from burnish.methods.prompt.cpt import Cpt

    assert Cpt(ids=tuple(range(500))).count(4096) == 2_048_000           # 2.05M, as published
    tuned, *_ = joined()
    assert sum(p.numel() for p in tuned.parameters()) == len(IDS) * 32
    tuned = burnish.tune(tiny("llama")[0], f"cpt(ids={IDS})", head=False)
    tuned.step(tiny("llama")[1])                                         # all input, no label


def test_types():
    from burnish.blocks.state.examples import Types

    types = Types((4, *TYPES, 8, 12))
    assert types.labels == [4, 9, 10, 12, 13]                # the first token is said by nobody
    assert types.weights(0.5) == [0.125, 0.25, 0.25, 0.25, 0.5]
    assert Types((0, 1, 2, 3, 4)).radii(2.0, 3.0) == [0.0, 3.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("model, recipe, says", [
    ("llama", "cpt", "needs the tokens of its examples"),
    ("llama", "cpt(ids=[64])", "from 0 to 63"),
    ("llama", "cpt(ids=[-1])", "from 0 to 63"),
    ("llama", "cpt(ids=[1, 2], types=[2])", "2 ids and 1 types"),
    ("llama", "cpt(types=[2])", "0 ids and 1 types"),
    ("llama", "cpt(ids=[1], types=[-1])", "types are 0"),
    ("llama", "cpt(ids=[1, 2], types=[0, 4])", "nothing may move"),
    ("llama", "cpt(ids=[1], input_radius=0.0)", "nothing may move"),
    ("llama", "cpt(ids=[1], input_radius=-1.0)", "radii are at least 0"),
    ("llama", "cpt(ids=[1], label_decay=1.5)", "from 0 to 1"),
    ("llama", "cpt(ids=[1], targets='q')", "takes no targets"),
    ("bert", "cpt(ids=[1])", "needs a model that writes on"),
    ("t5", "cpt(ids=[1])", "needs a model that writes on"),
    ("vit", "cpt(ids=[1])", "needs a model that writes on")])
def test_what_cannot_act_is_refused(model, recipe, says):
    with pytest.raises(burnish.RecipeError, match=says):
        burnish.tune(tiny(model)[0], recipe)


def test_a_loss_without_labels_in_the_batch_is_refused():
    tuned, batch, base, d = joined()
    keys = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(burnish.ConfigError, match="put labels in the batch"):
        tuned.step(keys, loss=lambda out, b: out.logits.square().mean())


def test_a_loss_that_the_model_does_not_make_is_refused():
    tuned, batch, base, d = joined()
    tuned.optimizer(lr=1e-3)
    tuned.model.loss_function = lambda *a, **k: None
    for given in (batch, (batch["input_ids"],)):
        with pytest.raises(burnish.ConfigError, match="let the model make the loss"):
            tuned.step(given, loss=lambda out, b: out.logits.square().mean())


def test_without_a_label_in_the_context_it_is_the_query_s_loss():
    tuned, batch, base, d = joined(recipe=f"cpt(ids={[0, *IDS[1:]]})")
    tuned.optimizer(lr=1e-3)
    theta = d.detach().clone().requires_grad_()
    embed = base.get_input_embeddings()
    front = embed(torch.tensor([0, *IDS[1:]])) + theta
    x = torch.cat([front.expand(len(batch["input_ids"]), -1, -1), embed(batch["input_ids"])], 1)
    z = base(inputs_embeds=x).logits[:, len(IDS) - 1:-1]
    labels = batch["labels"].clone()
    labels[:, 0] = -100                                  # is said by nobody
    F.cross_entropy(z.flatten(0, 1), labels.flatten()).backward()
    tuned.loss(batch).backward()
    assert float((d.grad - theta.grad).abs().max()) <= 1e-6 * float(theta.grad.abs().max())


@pytest.mark.parametrize("given, what", [
    ("label_decay=0.5", "a label"), ("format_radius=0.5", "a template"),
    ("types=(1, 4), input_radius=0.5", "an input"), ("types=(2, 0), label_decay=0.5", "a label"),
    ("types=(2, 4), format_radius=0.5", "a template")])
def test_a_setting_of_tokens_that_are_not_there_is_refused(given, what):
    with pytest.raises(burnish.RecipeError, match=f"does nothing: by `types` no token is {what}"):
        burnish.parse(f"cpt(ids=(5, 9), {given})")
    for fine in ("types=(2, 4), label_decay=0.5", "types=(1, 3), format_radius=0.5",
                 "types=(3, 3), format_radius=0.5", "input_radius=0.5"):
        burnish.parse(f"cpt(ids=(5, 9), {fine})")
