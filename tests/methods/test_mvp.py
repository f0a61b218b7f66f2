"""MVP: scores and steps against one text after another, and the term of moved embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import burnish
from burnish.blocks.state.templates import written
from burnish.core.recipe import parse
from burnish.methods.lifecycle.mvp import Mvp
from burnish.testing.models import tiny

MASK, CLS, SEP, PAD = 4, 2, 3, 1
TEMPLATES, WORDS = ((10, MASK), (11, 12, MASK, 13)), ((20, 21), (22, 23, 24), (25,))
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD}
TEXTS = [[30, 31, 32], [33], [34, 35, 36, 37, 38]]


def model(kind="bert", dropout=0.0):
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    net = BertForMaskedLM(BertConfig(**sizes)) if kind == "bert" else \
        RobertaForMaskedLM(RobertaConfig(**sizes))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.double()


def batch(side="right"):
    rows = [[CLS, *t, SEP] for t in TEXTS]
    T = max(map(len, rows))
    pads = [[PAD] * (T - len(r)) for r in rows]
    on = [[0] * len(p) for p in pads], [[1] * len(r) for r in rows]
    both = [(r + p, b + a) if side == "right" else (p + r, a + b)
            for r, p, a, b in zip(rows, pads, *on, strict=True)]
    return {"input_ids": torch.tensor([i for i, _ in both]),
            "attention_mask": torch.tensor([m for _, m in both]), "labels": torch.tensor([0, 2, 1])}


def one(net, text, template, embeds=None):
    """The words' logits at the mask of one text in one template, without any padding."""
    ids = torch.tensor([[CLS, *text, *template, SEP]])
    if embeds is not None:
        hook = net.get_input_embeddings().register_forward_hook(lambda m, a, o: embeds)
    z = net(input_ids=ids).logits[0, 1 + len(text) + template.index(MASK)]
    if embeds is not None:
        hook.remove()
    return torch.stack([sum(z[w] for w in words) / len(words) for words in WORDS])


def want(net):
    return torch.stack([sum(one(net, t, template) for template in TEMPLATES) / 2 for t in TEXTS])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_the_mean_over_templates_and_words(kind, side):
    net = model(kind, dropout=0.4)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "full", head=False)
    net.train()
    got = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK).lifecycle(tuned, batch(side))
    with torch.no_grad():                                # untrained: the model's own words
        torch.testing.assert_close(got, want(base), rtol=1e-9, atol=1e-11)
    assert net.training and not got.requires_grad


@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)"])
def test_a_step_is_of_the_cross_entropy_of_these_scores(recipe):
    net = model()
    tuned = burnish.tune(net, recipe, head=False)
    twin = copy.deepcopy(tuned)
    tuned.optimizer(lr=1e-2)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    got = method.step(tuned, batch())
    loss = F.cross_entropy(want(twin.model), batch()["labels"])
    torch.testing.assert_close(got, loss.detach(), rtol=1e-9, atol=1e-11)
    opt = twin.optimizer(lr=1e-2)
    loss.backward()
    opt.step()
    for (n, p), q in zip(tuned.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=n)


def test_no_parameter_is_new_and_the_loss_falls():
    net = model()
    names = {n for n, _ in net.named_parameters()}
    tuned = burnish.tune(net, "full", head=False)
    assert {n for n, _ in tuned.named_parameters()} == names
    tuned.optimizer(lr=1e-3)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    losses = [float(method.step(tuned, batch())) for _ in range(12)]
    assert losses[-1] < losses[0] / 2
    assert method.lifecycle(tuned, batch()).argmax(1).tolist() == [0, 2, 1]


def moved(net, epsilon):
    """The second term, row by row: embeddings along the gradient of the mean loss."""
    base, leaves = net.get_input_embeddings().weight, {}

    def total():
        z = []
        for t, text in enumerate(TEXTS):
            rows = []
            for m, template in enumerate(TEMPLATES):
                rows.append(one(net, text, template, leaves[t, m]))
            z.append(sum(rows) / len(rows))
        return F.cross_entropy(torch.stack(z), batch()["labels"])

    for t, text in enumerate(TEXTS):
        for m, template in enumerate(TEMPLATES):
            e = base[torch.tensor([[CLS, *text, *template, SEP]])]
            leaves[t, m] = e.detach().requires_grad_()
    grads = torch.autograd.grad(total(), list(leaves.values()))
    for key, g in zip(leaves, grads, strict=True):
        t, m = key
        e = base[torch.tensor([[CLS, *TEXTS[t], *TEMPLATES[m], SEP]])]
        leaves[key] = e + epsilon * g / g.norm()
    return total()


@pytest.mark.parametrize("recipe", ["full", "lora(rank=2)"])
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_the_term_of_moved_embeddings(recipe, epsilon):
    net = model()
    tuned = burnish.tune(net, recipe, head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    twin = copy.deepcopy(tuned)
    tuned.optimizer(lr=0.0)
    grads = {}
    tuned.current_optimizer.register_step_pre_hook(
        lambda *_: grads.update({n: p.grad.clone() for n, p in tuned.named_parameters()}))
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK, attack=epsilon)
    got = method.step(tuned, batch())
    loss = F.cross_entropy(want(twin.model), batch()["labels"]) + moved(twin.model, epsilon)
    torch.testing.assert_close(got, loss.detach(), rtol=1e-8, atol=1e-10)
    loss.backward()
    top = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for n, p in twin.named_parameters():
        g = torch.zeros_like(p) if p.grad is None else p.grad
        assert float((grads[n] - g).abs().max()) <= 1e-8 * top, n
    assert not net.get_input_embeddings()._forward_hooks          # nothing stays behind


def test_the_head_sees_one_token_a_row():
    net, seen = model(), []
    net.cls.register_forward_hook(lambda m, a, o: seen.append(o.shape))
    tuned = burnish.tune(net, "full", head=False)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    method.step(tuned, batch())
    method.lifecycle(tuned, batch())
    assert seen == [(6, 1, 64)] * 2
    assert not net.bert._forward_hooks
    with pytest.raises(KeyError):
        method.step(tuned, {k: v for k, v in batch().items() if k != "labels"})
    assert not net.bert._forward_hooks


def test_rows_as_they_are_written():
    b = batch("left")
    ids, mask, where = written(b["input_ids"], b["attention_mask"], TEMPLATES, MASK, PAD)
    for m, template in enumerate(TEMPLATES):
        for t, text in enumerate(TEXTS):
            row = [CLS, *text, *template, SEP]
            at = m * len(TEXTS) + t
            assert ids[at].tolist() == row + [PAD] * (ids.shape[1] - len(row))
            assert mask[at].tolist() == [1] * len(row) + [0] * (ids.shape[1] - len(row))
            assert ids[at, where[at]] == MASK


def test_without_a_mask_all_tokens_are_real():
    tuned = burnish.tune(model(), "full", head=False)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    ids = torch.tensor([[CLS, 30, 31, SEP]])
    a = method.lifecycle(tuned, {"input_ids": ids})
    assert torch.equal(a, method.lifecycle(tuned, {"input_ids": ids,
                                                   "attention_mask": torch.ones_like(ids)}))


@pytest.mark.parametrize("side", ["right", "left"])
def test_segments_are_written_with_their_tokens(side):
    net = model()
    tuned = burnish.tune(net, "full", head=False)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    b = batch(side)
    g = torch.Generator().manual_seed(3)
    b["token_type_ids"] = torch.randint(0, 2, b["input_ids"].shape, generator=g)
    got, heard = method.lifecycle(tuned, b), []
    for types, mask, text in zip(b["token_type_ids"], b["attention_mask"], TEXTS, strict=True):
        own = types[mask.bool()].tolist()
        z = 0
        for template in TEMPLATES:
            ids = torch.tensor([[CLS, *text, *template, SEP]])
            kinds = torch.tensor([own[:-1] + own[-1:] * (len(template) + 1)])
            logits = net(input_ids=ids, token_type_ids=kinds).logits[
                0, 1 + len(text) + template.index(MASK)]
            z = z + torch.stack([sum(logits[w] for w in words) / len(words) for words in WORDS])
        heard.append(z / 2)
    torch.testing.assert_close(got, torch.stack(heard).detach(), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(got, method.lifecycle(tuned, batch(side)))


def test_what_parts_of_the_recipe_read_goes_with_every_row_of_a_sample():
    tuned = burnish.tune(model(), "mtlora(rank=2, tasks=3)", head=False)
    for p in tuned.parameters():
        p.data = p.data.double() + 0.3 * torch.randn(p.shape, dtype=torch.float64)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    b = {**batch(), "task": torch.tensor([0, 2, 1])}
    got = method.lifecycle(tuned, b)
    alone = torch.cat([method.lifecycle(tuned, {k: v[i:i + 1] for k, v in b.items()})
                       for i in range(3)])
    torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-10)
    with tuned.given(task=[0, 2, 1]):
        torch.testing.assert_close(got, method.lifecycle(tuned, batch()))
    assert not torch.allclose(got, method.lifecycle(tuned, {**b, "task": 0}))
    assert method.step(tuned, b) > 0


def test_a_key_that_would_be_dropped_is_refused():
    tuned = burnish.tune(model(), "full", head=False)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    for key in ("position_ids", "task"):
        with pytest.raises(burnish.ConfigError, match=f"does not know what becomes of {key}"):
            method.lifecycle(tuned, {**batch(), key: torch.zeros(3, 7).long()})


@pytest.mark.parametrize("kind, most", [("bert", 40), ("roberta", 38)])
def test_texts_that_are_too_long_with_their_template(kind, most):
    tuned = burnish.tune(model(kind), "full", head=False)
    method = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    fits = most - 4                                      # the longest template
    for n in (fits, fits + 1):
        ids = torch.full((2, fits + 3), PAD)
        ids[:, :n] = 30
        ids[1, 5:] = PAD
        b = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        if n == fits:
            assert method.lifecycle(tuned, b).isfinite().all()
        else:
            with pytest.raises(burnish.ConfigError, match=f"{most} positions.* texts to {fits} "):
                method.lifecycle(tuned, b)


def test_what_cannot_act_is_refused():
    assert burnish.parse("mvp")[0].settings() == {
        "targets": None, "templates": None, "label_words": None, "mask_token": None, "attack": 0.0}
    for templates in (((10, 11),), ((MASK, MASK),)):
        with pytest.raises(burnish.ConfigError, match="every template has the mask"):
            Mvp(templates=templates, label_words=WORDS, mask_token=MASK)
    for words in (((1,),), ((1,), ()), ((1,), ((2, 3),))):
        with pytest.raises(burnish.ConfigError, match="two classes or more, a token id each"):
            Mvp(templates=TEMPLATES, label_words=words, mask_token=MASK)
    with pytest.raises(burnish.ConfigError, match="attack is a length"):
        Mvp(attack=-1.0)
    tuned = burnish.tune(model(), "full", head=False)
    with pytest.raises(burnish.ConfigError, match="needs templates"):
        parse("mvp")[0].lifecycle(tuned, batch())
    full = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK)
    for name in ("gpt2", "bert", "vit", "t5"):
        net, b = tiny(name)
        other = burnish.tune(net, "full", head=False)
        with pytest.raises(burnish.ConfigError, match="take a ...ForMaskedLM"):
            full.lifecycle(other, {"input_ids": b.get("input_ids")})
    at = Mvp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK, attack=1.0)
    for recipe in ("full + mezo", "full + l2_sp"):
        other = burnish.tune(model(), recipe, head=False)
        with pytest.raises(burnish.ConfigError, match="leave attack out"):
            at.step(other, batch())
    other = burnish.tune(model(), "full + sam", head=False)
    with pytest.raises(burnish.ConfigError, match="sam stands around a step of one"):
        at.step(other, batch())
    full.step(other, batch())
