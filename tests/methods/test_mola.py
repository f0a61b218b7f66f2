"""MoLA: counts, the two forms, routing, the balance loss and its gradient, padding, bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.objective import Attached, Riding
from burnish.blocks.weight.experts import ExpertChains, balance, counted, top_k
from burnish.core.recipe import parse
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny


def experts(tuned):
    return {path: m for path, _, slot in slots(tuned.model) for m in slot.modules()
            if isinstance(m, ExpertChains)}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# -- counts -----------------------------------------------------------------------------------
def test_the_count_on_llama_2_7b(published):
    anatomy, _ = published("LlamaConfig", "LlamaForCausalLM")
    assert len(anatomy.blocks) == 32
    method = parse("mola")[0]
    with torch.device("meta"):
        made = list(method.mixture(anatomy))
    total = sum(p.numel() for b in made for p in b.module.parameters())
    assert total == 99_942_400 + 5_693_440 == 105_635_840
    assert len(made) == 32 * 7
    places = [p for p in anatomy.places if p.block is not None]
    assert sum(method.count(p, 32) for p in places) == total
    q = [p for p in places if p.role == "q"]
    per = [method.experts(p.block, 32) for p in q]
    assert sum(per) == 160 and per == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8


def test_dropout_is_a_probability_and_somebody_answers():
    with pytest.raises(burnish.RecipeError, match="mola: dropout is a probability"):
        parse("mola(dropout=1.0)")
    with pytest.raises(burnish.RecipeError, match="mola.k=0.: expected 1 or more"):
        parse("mola(k=0)")


def test_allocations():
    for text, want in (("8-6-4-2", [8, 6, 4, 2]), ("5-5-5-5", [5] * 4), ("3", [3] * 4)):
        method = parse(f"mola(allocation='{text}')")[0]
        assert [method.experts(b, 4) for b in range(4)] == want
    for wrong in ("2-x", "", "2-0"):
        with pytest.raises(burnish.RecipeError, match="expected numbers of experts"):
            burnish.tune(tiny("vit")[0], f"mola(allocation='{wrong}')")
    tuned = burnish.tune(tiny("t5")[0], "mola(rank=2, allocation='2-3')")
    sizes = {p: len(m.A) for p, m in experts(tuned).items()}
    assert {n for p, n in sizes.items() if "block.0" in p} == {2}, "each stack is split by itself"
    assert {n for p, n in sizes.items() if "block.1" in p} == {3}


# -- what it computes -----------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["vit", "llama", "gpt2", "timm_qkv", "t5"])
def test_the_start_is_the_base_bit_for_bit(model):
    net, batch = tiny(model)
    before = logits(net.eval(), batch)
    burnish.tune(net, "mola(rank=2)")
    assert torch.equal(logits(net.eval(), batch), before)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_dense_and_grouped_forms_agree(k):
    m = ExpertChains(6, 7, 5, 3, k, scale=2.0).double()
    stir(m, size=0.3)
    x = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(m(x), m.grouped(x), rtol=1e-10, atol=1e-12)
    inputs = (x, *m.parameters())
    for a, b in zip(torch.autograd.grad(m(x).square().sum(), inputs),
                    torch.autograd.grad(m.grouped(x).square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_the_equation_written_out():
    m = ExpertChains(6, 7, 4, 3, 2, scale=2.0).double()
    stir(m, size=0.3)
    x = torch.randn(3, 6, dtype=torch.double)
    p = (x @ m.router.t()).softmax(-1)
    want = torch.zeros(3, 7, dtype=torch.double)
    for t in range(3):
        best = p[t].topk(2).indices
        for e in best:
            want[t] += p[t, e] / p[t, best].sum() * 2.0 * m.B[e] @ m.A[e] @ x[t]
    torch.testing.assert_close(m(x), want, rtol=1e-10, atol=1e-12)


def routed(one, path, k, s, balance_of=None, rows=None, drop=0.0):
    """y = W x + s sum over the k largest of p_e / (their sum) B_e A_e drop(x), p = softmax(W_r x);
    and E sum_e f_e P_e of that router, f the share of the pairs, P the mean probability."""
    A, B, W_r = (one.theta[path, leaf] for leaf in ("A", "B", "router"))
    k = min(k, len(A))

    def hook(module, args, y):
        x = args[0]
        p = torch.softmax(x @ W_r.t(), -1)
        sent = p >= p.sort(-1, descending=True).values[..., k - 1 : k]
        gates = p * sent / (p * sent).sum(-1, keepdim=True)
        z = nn.functional.dropout(x, drop, drop > 0)
        made = sum(s * gates[..., e : e + 1] * (z @ A[e].t() @ B[e].t()) for e in range(len(A)))
        if balance_of is not None:
            mask = one.batch.get("attention_mask")
            count = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
            f = sent[count].double().sum(0) / sent[count].sum()
            balance_of.append(len(A) * (f * p[count].mean(0)).sum())
        if rows is None:
            return y + made
        out, used = y.clone(), 0
        for a, b in rows:
            out[..., a:b] = out[..., a:b] + made[..., used : used + b - a]
            used += b - a
        return out

    one.base.get_submodule(path).register_forward_hook(hook)


@pytest.mark.parametrize("model", ["llama", "vit", "gpt2"])
def test_the_model_with_experts_written_out(beside, model):                    # findings 6
    """Outputs and the gradients of A, B and the routers, two experts below and four above."""
    one = beside(model, "mola(rank=2, alpha=3.0, k=2, allocation='2-4', dropout=0.0)")
    assert [len(A) for _, A in one.at("A")] == sorted(len(A) for _, A in one.at("A"))
    assert {len(A) for _, A in one.at("A")} == {2, 4}
    for path, _ in one.at("A"):
        routed(one, path, 2, 1.5)
    one.agree()


def test_rows_of_a_fused_projection_written_out(beside):                       # findings 6
    one = beside("timm_qkv", "mola(rank=2, alpha=3.0, k=1, allocation='3', targets='q,v')")
    for path, B in one.at("B"):
        assert B.shape == (3, 64, 2)
        routed(one, path, 1, 1.5, rows=((0, 32), (64, 96)))
    one.tuned.model.eval()
    got, want = one.tuned.model(**one.batch).logits, one.base(**one.batch).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    # with k = 1 a gate is 1 whatever the router says: only A and B have a gradient
    theta = [p for (_, leaf), p in one.theta.items() if leaf != "router"]
    own = [p for (_, leaf), p in one.own.items() if leaf != "router"]
    for a, b in zip(torch.autograd.grad(one.score(got), own),
                    torch.autograd.grad(one.score(want), theta), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_of_every_router_written_out(beside, padded):              # findings 2.9
    """The gradients are those of loss + c sum_routers E sum_e f_e P_e, padding left out."""
    one = beside("llama", "mola(rank=2, alpha=3.0, k=2, allocation='2-4', balance=0.3, dropout=0)")
    if padded:
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        one.batch["attention_mask"][1, -3:] = 0
    extra = []
    for path, _ in one.at("A"):
        routed(one, path, 2, 1.5, extra)
    one.tuned.model.train()
    one.tuned.loss(one.batch).backward()
    want = torch.autograd.grad(one.base(**one.batch).loss + 0.3 * sum(extra),
                               list(one.theta.values()))
    assert len(extra) == 2 * 7
    top = max(float(w.abs().max()) for w in want)
    for (k, p), w in zip(one.own.items(), want, strict=True):
        assert float((p.grad - w).abs().max()) <= 1e-6 * top, k         # the loss is in fp32


def test_dropout_is_on_what_the_experts_read(beside):
    """Not on what the router reads: one linear, the same seed, stock dropout."""
    one = beside("vit", "mola(rank=2, alpha=3.0, allocation='3', dropout=0.4, balance=0, "
                        "targets='fc1@1')")
    ((path, _),) = one.at("A")
    routed(one, path, 2, 1.5, drop=0.4)
    one.tuned.model.train()
    torch.manual_seed(5)
    want = one.base(**one.batch).logits
    torch.manual_seed(5)
    one.agree(want)


def test_fewer_experts_than_k_are_all_used():
    m = ExpertChains(6, 7, 2, 3, 4)
    assert m.k == 2 and (m.gates(torch.randn(5, 6))[1] > 0).all()


def test_rows_of_a_fused_projection():
    m = ExpertChains(6, 9, 2, 3, 2, rows=((0, 3), (6, 9)))
    stir(m, size=0.3)
    y = m(torch.randn(4, 6))
    assert y.shape == (4, 9) and not y[:, 3:6].any() and y[:, :3].any() and y[:, 6:].any()
    net, batch = tiny("timm_qkv")
    tuned = burnish.tune(net, "mola(rank=2, targets='q,v')")
    assert {m.rows for m in experts(tuned).values()} == {((0, 32), (64, 96))}
    tuned.loss(batch).backward()


def test_dropout_draws_the_same_mask_twice():
    m = ExpertChains(6, 7, 3, 2, 2, dropout=0.5).double()
    stir(m, size=0.3)
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)

    def stock():
        torch.manual_seed(3)
        _, g = m.gates(x)
        z = nn.functional.dropout(x, 0.5, True) @ m.A.flatten(0, 1).t()
        return (z.view(4, 3, 2) * g.unsqueeze(-1)).flatten(1) @ m.B.transpose(1, 2).flatten(0, 1)

    torch.manual_seed(3)
    y = m(x)
    torch.testing.assert_close(y, stock())
    inputs = (x, *m.parameters())
    torch.manual_seed(3)
    got = torch.autograd.grad(m(x).square().sum(), inputs)
    for a, b in zip(got, torch.autograd.grad(stock().square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_routing_is_single_precision_under_low_precision():
    m, x = ExpertChains(6, 7, 3, 2, 2), torch.randn(4, 6, dtype=torch.bfloat16)
    p, g = m.gates(x)
    assert p.dtype == g.dtype == torch.float32 and m(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert m.gates(x.float())[0].dtype == torch.float32
    x.requires_grad_()
    m(x).sum().backward()
    assert m.A.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


# -- balance ------------------------------------------------------------------------------------
@pytest.mark.parametrize("experts_, k", [(4, 2), (8, 1), (5, 5)])
def test_a_uniform_router_has_a_balance_of_one(experts_, k):
    p = torch.full((7, experts_), 1 / experts_, dtype=torch.double)
    assert float(balance(p, top_k(p, k))) == pytest.approx(1.0, abs=1e-12)


def test_a_collapsed_router_pays():
    p = torch.tensor([[0.9, 0.05, 0.03, 0.02]] * 6)
    assert float(balance(p, top_k(p, 1))) == pytest.approx(4 * 0.9, rel=1e-6)


def test_padding_does_not_count():
    p = torch.rand(2, 5, 4).softmax(-1)
    g = top_k(p, 2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    seen = mask.bool()
    torch.testing.assert_close(balance(p, g, mask), balance(p[seen][None], g[seen][None]))


def test_the_mask_of_the_batch_reaches_the_routers():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "mola(rank=2)")
    seen = []
    for m in experts(tuned).values():
        m.register_forward_pre_hook(lambda m, a: seen.append(counted(a[0])))
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    net(input_ids=ids, attention_mask=mask)
    assert len(seen) == len(experts(tuned)) and all(torch.equal(s, mask) for s in seen)
    net(ids, mask)                                  # by position
    assert all(torch.equal(s, mask) for s in seen)
    seen.clear()
    net(input_ids=ids)
    assert seen and not any(s is not None for s in seen)


def test_the_gradient_of_the_balance_is_added_where_it_arises():
    """Gradients equal those of loss + sum of coefficient x balance, in anybody's loop."""
    net, batch = tiny("llama", dtype=torch.float64)
    tuned = burnish.tune(net, "mola(rank=2, balance=0.3, dropout=0.0)")
    for m in experts(tuned).values():
        m.double()
        stir(m, size=0.3)
    tuned.loss(batch).backward()
    got = [p.grad.clone() for p in tuned.parameters()]
    extra = []
    for m in experts(tuned).values():
        m.coefficient = 0.0
        m.register_forward_pre_hook(
            lambda m, a: extra.append(balance(*m.gates(a[0]))))
    loss = tuned.loss(batch)
    want = torch.autograd.grad(loss + 0.3 * sum(extra), list(tuned.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_attaching_a_loss_changes_no_value():
    h, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    y = Attached.apply(h, (w ** 2).sum(), 0.5, Riding())
    assert torch.equal(y, h)
    y.sum().backward()
    torch.testing.assert_close(w.grad, w.detach())
    torch.testing.assert_close(h.grad, torch.ones(3))


# -- around it ------------------------------------------------------------------------------------
def test_checkpointing_changes_no_gradient():
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("llama")
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 4:] = 0
        tuned = burnish.tune(net, "mola(rank=2, balance=0.3)" + extra)
        for m in experts(tuned).values():
            torch.manual_seed(1)
            stir(m, size=0.3)
        torch.manual_seed(5)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_waits_for_backward(kept):
    """Per linear: E R numbers and a few per expert and token; x once, as for any trained linear."""
    tokens, R = 8 * 17, 4
    per = {}
    for E in (2, 6):
        net, batch = tiny("vit", batch=8)
        tuned = burnish.tune(
            net, f"mola(rank={R}, allocation='{E}', targets='fc1', dropout=0.0)", head=False)
        per[E] = kept(tuned, batch)
    more = (per[6] - per[2]) / (2 * tokens * 4)            # per layer and token, for four experts
    assert 4 * R <= more <= 4 * (R + 5), "R numbers, and gates, probabilities and slots"


def test_targets_and_kinds():
    tuned = burnish.tune(tiny("llama")[0], "mola(rank=2)", targets="q,v")
    assert {p.rpartition(".")[2] for p in experts(tuned)} == {"q_proj", "v_proj"}
    for model, targets, why in (("encoder", "q", "of kind mha"), ("vit", "patch", "outside them")):
        with pytest.raises(burnish.TargetError, match=why):
            burnish.tune(tiny(model)[0], f"mola(rank=2, targets='{targets}')")
    with pytest.raises(burnish.RecipeError, match="rank 40 does not fit"):
        burnish.tune(tiny("vit")[0], "mola(rank=40)")


def test_it_cannot_merge_and_copies_stay_whole():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "mola(rank=2)")
    for m in experts(tuned).values():
        stir(m, size=0.3)
    net.eval()
    other = copy.deepcopy(net)
    assert torch.equal(logits(net, batch), logits(other, batch))
    with pytest.raises(burnish.CheckError, match="mola has no form as a plain weight"):
        tuned.merge()


@pytest.mark.parametrize("rank, alpha, s", [(2, 12, 6.0), (4, 2, 0.5)])
def test_a_layer_of_the_model_is_the_equation(rank, alpha, s):             # findings 6
    """y = x W^T + b + (alpha / rank) sum_e g_e B_e A_e x, g the two largest of softmax(W_r x)
    over their sum; float64, with gradients."""
    net, _ = tiny("vit", dtype=torch.float64)
    tuned = burnish.tune(net, f"mola(rank={rank}, alpha={alpha}, allocation='3', dropout=0.0, "
                              "balance=0.0, targets='fc1')", head=False)
    for path, m in experts(tuned).items():
        m.double()
        stir(m, size=0.3)
        linear = net.get_submodule(path)
        W, b = linear.weight.detach(), linear.bias.detach()
        x = torch.randn(7, W.shape[1], dtype=torch.float64, requires_grad=True)
        p = (x @ m.router.t()).softmax(-1)
        smallest = p == p.amin(-1, keepdim=True)
        g = p.masked_fill(smallest, 0.0)
        g = g / g.sum(-1, keepdim=True)
        update = torch.einsum("ne,eor,eri,ni->no", g, m.B, m.A, x)
        want, got = x @ W.t() + b + s * update, linear(x)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        probe = torch.randn_like(want)
        inputs = (x, m.A, m.B, m.router)
        for a, c in zip(torch.autograd.grad(got, inputs, probe),
                        torch.autograd.grad(want, inputs, probe), strict=True):
            torch.testing.assert_close(a, c, rtol=1e-7, atol=1e-11)


def test_defaults_are_the_published_ones():
    assert burnish.parse("mola")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "k": 2, "allocation": "2-4-6-8",
        "dropout": 0.05, "balance": 1e-3}


def test_blocks_are_alike_where_every_group_has_as_many_experts():
    for allocation, want in (("2-4-6-8", None), ("5-5-5-5", 1), ("3", 1), ("2-4", None),
                             ("2-2-4", None)):
        assert parse(f"mola(allocation='{allocation}')")[0].repeats() == want


def test_a_place_that_names_no_block_is_counted_as_in_the_first():
    from burnish.core.site import Place

    (method,) = parse("mola(rank=2)")
    place = Place("l", "weight", "linear", 24, 16)
    assert method.count(place, 4) == 2 * (2 * (24 + 16) + 16)


def experts_of(model, recipe):
    tuned = burnish.tune(tiny(model)[0], recipe, head=False)
    return {path.rpartition(".")[2]: m for path, _, slot in slots(tuned.model)
            for m in slot.modules() if isinstance(m, ExpertChains)}


def test_linears_too_small_for_the_rank_are_left_out():
    """By default, with a note; one that was asked for, or a rank too large for all, is refused."""
    tuned = burnish.tune(tiny("llama")[0], "mola(rank=20, allocation='2-2')")
    (note,) = [n for n in tuned.active.notes if "rank" in n]
    assert note.startswith("mola leaves 4 of 14 weights alone, too small for its rank, e.g. ")
    small = experts_of("llama", "mola(rank=20, allocation='2-2')")
    assert set(small) == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for recipe in ("mola(rank=20, targets='k')", "mola(rank=500)"):
        with pytest.raises(burnish.RecipeError, match="rank"):
            burnish.tune(tiny("llama")[0], recipe)


def test_all_rows_of_a_fused_weight_are_the_weight():
    """Some are a slice of its outputs; all of them need none to be set in their place."""
    assert experts_of("gpt2", "mola(rank=2, targets='q,k,v')")["c_attn"].rows is None
    assert experts_of("gpt2", "mola(rank=2, targets='q,v')")["c_attn"].rows == ((0, 32), (64, 96))
    assert experts_of("gpt2", "mola(rank=2, targets='k,v')")["c_attn"].rows == ((32, 64), (64, 96))
