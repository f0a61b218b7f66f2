"""DePT: a short prompt and an edit of the embeddings by place, written out in float64."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.state.prompts import Positioned
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

TABLES = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "mamba": "backbone.embeddings",
          "bert": "bert.embeddings.word_embeddings", "t5": "shared"}


def edited(x, mask, A, B):
    """E(x) + row i of A B for the i-th token that is no padding, as far as there are rows."""
    E, out = A @ B, x.clone()
    for b in range(len(x)):
        i = 0
        for t in range(x.shape[1]):
            if mask[b, t]:
                if i < len(E):
                    out[b, t] = out[b, t] + E[i]
                i += 1
    return out


def letters(one):
    (_, P), = one.at("rows")
    (_, A), = one.at("edit.A")
    (_, B), = one.at("edit.B")
    return P, A, B


@pytest.mark.parametrize("model, padded", [(m, p) for m in ("llama", "gpt2") for p in
                                           (None, "right", "left")] + [("mamba", None)])
def test_the_equation_written_out(beside, model, padded):
    """[P; E(x) + A B] through the stock model; five rows for eight tokens."""
    one = beside(model, "dept(length=3, rank=2, edited=5)")
    P, A, B = letters(one)
    ids = one.batch["input_ids"]
    one.batch = {"input_ids": ids}
    mask, kw = torch.ones_like(ids), {}
    if padded:
        mask[1, slice(-3, None) if padded == "right" else slice(0, 2)] = 0
        one.batch["attention_mask"] = mask
        wide = torch.cat([torch.ones(len(ids), 3, dtype=mask.dtype), mask], 1)
        kw = {"attention_mask": wide}
        if model != "mamba":
            kw["position_ids"] = (wide.cumsum(-1) - 1).clamp(min=0)
    x = edited(one.base.get_submodule(TABLES[model])(ids), mask, A, B)
    one.agree(one.base(inputs_embeds=torch.cat([P.expand(len(ids), -1, -1), x], 1),
                       **kw).logits[:, 3:])


def test_an_encoder_and_an_encoder_decoder(beside):
    one = beside("bert", "dept(length=3, rank=2, edited=20)")
    (P, A, B), ids = letters(one), one.batch["input_ids"]
    one.batch = {"input_ids": ids}
    x = edited(one.base.bert.embeddings.word_embeddings(ids), torch.ones_like(ids), A, B)
    one.base.bert.pooler.register_forward_pre_hook(lambda m, args: (args[0][:, 3:],))
    one.agree(one.base(inputs_embeds=torch.cat([P.expand(len(ids), -1, -1), x], 1)).logits)
    one = beside("t5", "dept(length=3, rank=2, edited=5)")
    (P, A, B), ids, labels = letters(one), one.batch["input_ids"], one.batch["labels"]
    x = edited(one.base.shared(ids), torch.ones_like(ids), A, B)
    one.agree(one.base(inputs_embeds=torch.cat([P.expand(len(ids), -1, -1), x], 1),
                       labels=labels).logits)


def test_without_an_edit_it_is_prompt_tuning():
    """B = 0 at the start: a prompt of the same length and ids, bit by bit."""
    made = []
    for recipe in ("dept(length=4, ids=[7, 9])", "prompt_tuning(length=4, ids=[7, 9])"):
        net, batch = tiny("llama")
        burnish.tune(net, recipe)
        made.append(net.eval()(**batch).logits)
    assert torch.equal(*made)


def test_the_budget(published):
    """l d = m d + r (s + d): 40 rows and rank 45 at 256 tokens of T5-base are a prompt of 100."""
    m = parse("dept")[0]
    assert (m.length, m.rank, m.edited, m.edit_rate) == (40, 45, 256, 1e-3)
    t5, _ = published("T5Config", "T5ForConditionalGeneration", d_model=768, d_kv=64, d_ff=3072,
                      num_layers=12, num_heads=12)
    d = t5.hidden_size
    assert m.count(d) == parse("prompt_tuning(length=100)")[0].count(d) == 76_800
    tuned = burnish.tune(tiny("t5")[0], "dept(length=3, rank=2, edited=5)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == \
        parse("dept(length=3, rank=2, edited=5)")[0].count(32) == 3 * 32 + 2 * (5 + 32)


def test_two_learning_rates():
    """The prompt's is the run's, A and B have their share of it."""
    tuned = burnish.tune(tiny("llama")[0], "dept(length=2, rank=2, edit_rate=0.01)", head=False)
    opt = tuned.optimizer(lr=0.3)
    names = {id(p): n.rpartition(".")[2] for n, p in tuned.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in opt.param_groups for p in g["params"]}
    assert rates == {"rows": 0.3, "A": pytest.approx(0.003), "B": pytest.approx(0.003)}


def test_rows_behind_the_text_have_no_gradient():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "dept(length=2, rank=2, edited=20)", head=False)
    stir(tuned)
    (A,) = (p for n, p in tuned.named_parameters() if n.endswith("edit.A"))
    tokens = batch["input_ids"].shape[1]
    for mask, longest in ((None, tokens), (torch.ones(2, tokens).tril(2), 4)):
        A.grad = None
        kw = {} if mask is None else {"attention_mask": mask.long()}
        tuned.loss({**batch, **kw}).backward()
        assert not A.grad[longest:].any() and bool(A.grad[: longest - 1].any(1).all())


@pytest.mark.parametrize("model", ["llama", "gpt2", "mamba"])
def test_generation_goes_on_behind_the_last_row(model):
    """Token by token from a cache, full forwards without one: alike, in the edit and behind it."""
    net, batch = tiny(model)
    tuned = burnish.tune(net, "dept(length=3, rank=2, edited=6)")
    stir(tuned, size=0.5)
    net.eval()
    ids = batch["input_ids"][:, :4]
    out = net.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None,
                       attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, net(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_a_step_from_a_cache_without_a_mask():
    net, batch = tiny("llama", dtype=torch.float64)
    tuned = burnish.tune(net, "dept(length=3, rank=2, edited=6)")
    stir(tuned, size=0.5)
    net.eval()
    ids = batch["input_ids"]
    first = net(input_ids=ids[:, :5], use_cache=True)
    got = net(input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(got, net(input_ids=ids).logits[:, 5:])


def test_rows_of_an_edit():
    edit = Positioned(4, 2, 3).double()
    stir(edit, size=1.0)
    table = (edit.A @ edit.B).detach()
    with torch.no_grad():
        torch.testing.assert_close(edit.table(), table)
        torch.testing.assert_close(edit(0, 3), table[:3])
        torch.testing.assert_close(edit(2, 3), torch.cat([table[2:], torch.zeros(1, 3).double()]))
        torch.testing.assert_close(edit(7, 2), torch.zeros(2, 3).double())
        got = edit(0, 3, torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]]))
    zero = torch.zeros(3).double()
    want = [[table[0], table[1], table[2]], [zero, table[0], table[1]],
            [table[0], table[1], zero], [table[0], zero, table[1]]]
    torch.testing.assert_close(got, torch.stack([torch.stack(w) for w in want]))


def test_peft_has_no_such_folder(tmp_path):
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "dept(length=2, rank=2)")
    with pytest.raises(burnish.BurnishError):
        burnish.export_peft(tuned, tmp_path / "folder")


def test_the_least_edit_is_a_row_for_the_first_token():
    """rank 1, one place: what stands behind it is a prompt's alone."""
    edit = Positioned(1, 1, 3)
    stir(edit, size=1.0)
    with torch.no_grad():
        assert edit(0, 3)[0].any() and not edit(0, 3)[1:].any()
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "dept(length=1, rank=1, edited=1)", head=False)
    tuned.backward(batch)
    assert sorted(p.numel() for p in tuned.parameters()) == [1, 32, 32]


@pytest.mark.parametrize("recipe, why", [
    ("dept(length=0)", "at least one row"), ("dept(targets='q')", "dept takes no targets"),
    ("dept(rank=0)", "rank 1"), ("dept(edited=0)", "at least one token"),
    ("dept(edit_rate=0.0)", "a rate above 0"), ("dept(ids=[64])", "ids from 0 to 63"),
])
def test_what_it_refuses(recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny("llama")[0], recipe)
    with pytest.raises(burnish.RecipeError, match="inputs_embeds"):
        burnish.tune(tiny("vit")[0], "dept")
