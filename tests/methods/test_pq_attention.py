"""SPT's sparse attention: few keys of each query, by product codes that learn beside the task."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import burnish
from burnish.blocks.state import chosen as module
from burnish.blocks.state.chosen import Coded, How, choice, chosen, recall
from burnish.blocks.state.quantised import Codebook
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.testing import tiny

B, H, D = 2, 3, 8
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def drawn(T, seed=0, size=1.0, S=2, words=3):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, T, D, generator=g, dtype=torch.float64) * size for _ in range(3))
    codes = tuple(torch.randint(words, (S, B, H, T), generator=g).to(torch.uint8) for _ in range(2))
    return q, k, v, codes


def picked(codes, kept, causal=False, mask=None):
    """K, (B, H, T, T): sorted out query by query."""
    of_q, of_k = codes
    _, b, h, T = of_q.shape
    sel = torch.zeros(b, h, T, T, dtype=torch.bool)
    open_ = torch.ones(b, h, T, T, dtype=torch.bool)
    if mask is not None:
        open_ = (mask if mask.dtype == torch.bool else mask > -1e4).expand(b, h, T, T)
    for x in range(b):
        for y in range(h):
            for i in range(T):
                can = [j for j in range(T) if open_[x, y, i, j] and (j <= i or not causal)]
                can.sort(key=lambda j: (-int((of_q[:, x, y, i] == of_k[:, x, y, j]).sum()),
                                        abs(i - j), j))
                sel[x, y, i, can[:kept]] = True
    return sel


def dense(q, k, v, sel, scale, bias=None, drop=None):
    s = (q @ k.transpose(-1, -2) * scale).clamp(-10, 10)
    s = s if bias is None else s + bias
    p = torch.nan_to_num(torch.softmax(s.masked_fill(~sel, float("-inf")), -1))
    return (p if drop is None else p * drop) @ v


def masks(kind, T):
    g = torch.Generator().manual_seed(5)
    pad = torch.ones(B, 1, 1, T, dtype=torch.bool)
    pad[0, ..., -4:] = False
    if kind == "padding":
        return pad
    if kind == "whole":
        return pad & torch.ones(T, T, dtype=torch.bool).tril(2)
    if kind == "added":                                  # one for all samples, with a gradient
        return torch.randn(1, H, T, T, generator=g, dtype=torch.float64).requires_grad_()
    if kind == "flat":
        return torch.randn(T, T, generator=g, dtype=torch.float64).requires_grad_()
    if kind == "column":
        added = torch.zeros(B, 1, 1, T, dtype=torch.float64).masked_fill(~pad, -1e9) + 0.3
        return added.requires_grad_()
    return None


@pytest.mark.parametrize("kind", ["none", "padding", "whole", "added", "flat", "column"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strip", [1, 5 * B * H * 9, 1 << 22])
def test_outputs_and_gradients_are_those_of_the_masked_dense_attention(kind, causal, strip,
                                                                       monkeypatch):
    monkeypatch.setattr(module, "STRIP", strip)
    T = 9
    q, k, v, codes = drawn(T, size=2.5)                  # some scores are cut
    mask = masks(kind, T)
    sel = picked(codes, 3, causal, mask)
    assert torch.equal(choice(codes, How(3, 0.5, causal), mask), sel)
    bias = None if mask is None or mask.dtype == torch.bool else mask
    ends = []
    for run in (lambda *a: chosen(*a, codes, How(3, 0.5, causal), mask),
                lambda *a: dense(*a, sel, 0.5, bias)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = run(*leaves)
        wanted = [*leaves, *([mask] if bias is not None and bias.requires_grad else [])]
        ends.append((out, *torch.autograd.grad(out, wanted, torch.cos(v))))
    assert (0.5 * q @ k.transpose(-1, -2)).abs().max() > 10
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_with_all_keys_it_is_the_dense_attention(causal):
    q, k, v, codes = drawn(10)
    for kept in (10, 11):
        ends = []
        for run in (lambda *a, kept=kept: chosen(*a, codes, How(kept, 0.4, causal)),
                    lambda *a: F.scaled_dot_product_attention(*a, is_causal=causal, scale=0.4)):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = run(*leaves)
            ends.append((out, *torch.autograd.grad(out, leaves, torch.cos(v))))
        for got, want in zip(*ends, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    assert not torch.allclose(chosen(q, k, v, codes, How(9, 0.4)),
                              F.scaled_dot_product_attention(q, k, v, scale=0.4))


def test_early_queries_attend_to_all_they_may_see_and_none_to_later_ones():
    _, _, _, codes = drawn(12)
    sel = choice(codes, How(4, 1.0, True))
    assert sel.sum(-1).flatten(0, 1).eq(torch.arange(1, 13).clamp_max(4)).all()
    assert not sel.triu(1).any()


def test_a_query_that_may_see_nothing_is_answered_with_zero():
    q, k, v, codes = (t if isinstance(t, tuple) else t.requires_grad_() for t in drawn(6))
    mask = torch.ones(B, 1, 6, 6, dtype=torch.bool)
    mask[1, :, 2] = False
    out = chosen(q, k, v, codes, How(2, 0.5), mask)
    assert not out[1, :, 2].any() and out[1, :, 3].all()
    grads = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(g.isfinite().all() for g in grads) and not grads[0][1, :, 2].any()


def test_narrow_types_are_computed_wide_and_given_back():
    q, k, v, codes = drawn(8)
    want = dense(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(),
                 picked(codes, 3), 0.5)
    leaves = [t.bfloat16().requires_grad_() for t in (q, k, v)]
    out = chosen(*leaves, codes, How(3, 0.5))
    assert torch.equal(out, want.float().bfloat16())
    bias = torch.zeros(8, 8, dtype=torch.bfloat16, requires_grad=True)
    out = chosen(*leaves, codes, How(3, 0.5), bias)
    grads = torch.autograd.grad(out.sum(), [*leaves, bias])
    assert {g.dtype for g in grads} == {out.dtype} == {torch.bfloat16}


def test_the_gradient_of_a_narrow_mask_is_summed_wide(monkeypatch):
    monkeypatch.setattr(module, "STRIP", 1)
    q, k, v, codes = drawn(40)
    bias = torch.zeros(1, 1, 1, 40, dtype=torch.bfloat16, requires_grad=True)
    got, = torch.autograd.grad(chosen(q, k, v, codes, How(8, 0.5), bias), bias, torch.cos(v))
    wide = bias.detach().double().requires_grad_()
    out = dense(q, k, v, picked(codes, 8), 0.5, wide)
    want, = torch.autograd.grad(out, wide, torch.cos(v))
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("strip", [2 * B * H * 9, 1 << 22])
def test_dropout_acts_on_the_chosen_ones_and_backward_draws_the_same(strip, monkeypatch):
    monkeypatch.setattr(module, "STRIP", strip)
    q, k, v, codes = drawn(9)
    sel, r = picked(codes, 4), min(9, strip // (B * H * 9))
    torch.manual_seed(3)
    drop = torch.cat([F.dropout(torch.ones(B, H, min(r, 9 - a), 9, dtype=q.dtype), 0.4)
                      for a in range(0, 9, r)], 2)
    ends = []
    for run in (lambda *a: chosen(*a, codes, How(4, 0.5, p=0.4)),
                lambda *a: dense(*a, sel, 0.5, drop=drop)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        torch.manual_seed(3)
        out = run(*leaves)
        torch.rand(7)
        ends.append((out, *torch.autograd.grad(out, leaves, torch.cos(v))))
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_it_is_differentiable_under_torch_func():
    q, k, v, codes = drawn(6)
    sel = picked(codes, 2)
    got = torch.func.grad(lambda x: chosen(x, k, v, codes, How(2, 0.5)).square().sum())(q)
    want = torch.func.grad(lambda x: dense(x, k, v, sel, 0.5).square().sum())(q)
    torch.testing.assert_close(got, want)


def test_strips_are_as_many_rows_as_fit_and_one_at_least(monkeypatch):
    q = torch.zeros(B, H, 7, D)
    for strip, r in ((0, 1), (B * H * 7 - 1, 1), (3 * B * H * 7, 3), (1 << 22, 7)):
        monkeypatch.setattr(module, "STRIP", strip)
        for causal in (False, True):
            assert [(s.a, s.b, s.end) for s in module._strips(q, causal)] == \
                [(a, min(a + r, 7), min(a + r, 7) if causal else 7) for a in range(0, 7, r)]


def test_two_tokens_have_two_rows_of_a_mask(monkeypatch):
    monkeypatch.setattr(module, "STRIP", 1)
    q, k, v, codes = drawn(2)
    mask = torch.tensor([[True, False], [False, True]])
    torch.testing.assert_close(chosen(q, k, v, codes, How(2, 0.5), mask), v)


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.n = max(self.n, out.numel())
        return out


def test_nothing_of_tokens_by_tokens_is_kept_or_made(monkeypatch):
    monkeypatch.setattr(module, "STRIP", 4 * B * H * 64)
    sizes = []
    for T in (64, 128, 256):
        q, k, v, codes = drawn(T)
        leaves = [t.float().requires_grad_() for t in (q, k, v)]
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.setdefault(t.untyped_storage().data_ptr(), t) is None
                or t, lambda t: t), Largest() as largest:
            out = chosen(*leaves, codes, How(T // 8, 0.5, True))
        with largest:
            out.sum().backward()
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
        assert largest.n <= max(4 * B * H * 64, B * H * T * D)
        assert sizes[-1] == B * H * T * (3 * 4 * D + 2 * 2 + 4)      # q, k, v; codes; an int
    assert sizes == [sizes[0], 2 * sizes[0], 4 * sizes[0]]


# -- codebooks -------------------------------------------------------------------------------------
def book(h=D, words=4, width=2, seed=0):
    torch.manual_seed(seed)
    return Codebook(h, words, width)


def spelled(C, z, valid=None):
    """L(z) and the codes, head by head, sub-space by sub-space."""
    S, _, w = C.shape
    terms, codes = [], []
    for s in range(S):
        part = z[..., s * w : (s + 1) * w]
        d = (part.unsqueeze(-2) - C[s]).abs().sum(-1)
        codes.append(d.argmin(-1))
        near = C[s][codes[-1]]
        p = (1 / d) / (1 / d).sum(-1, keepdim=True)
        terms.append((part - near).square() + (p @ C[s] - near).square())
    off = torch.cat(terms, -1)
    if valid is not None:
        off = off[valid[:, None, :].expand(off.shape[:-1])]
    return off.mean(), torch.stack(codes)


@pytest.mark.parametrize("padded", [False, True])
def test_codes_are_nearest_words_and_the_loss_is_the_equation(padded):
    m = book()
    m.double()
    z, _, _, _ = drawn(7)
    valid = None
    if padded:
        valid = torch.ones(B, 7, dtype=torch.bool)
        valid[1, 3:] = False
    z.requires_grad_()
    want, codes = spelled(m.words, z, valid)
    assert torch.equal(m.codes(z).long(), codes) and m.codes(z).dtype == torch.uint8
    got = m.loss(z, valid)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, [z, m.words]),
                    torch.autograd.grad(want, [z, m.words]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert m.words.burnish_decay is False


def test_a_state_that_is_a_word_and_a_batch_of_padding_are_numbers():
    m = book()
    z = m.words[:, 1].flatten().detach().expand(1, 1, 3, D).clone().requires_grad_()
    for valid in (None, torch.zeros(1, 3, dtype=torch.bool)):
        loss = m.loss(z, valid)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [z, m.words]))
        assert float(loss.detach()) < 1e-9
    assert m.loss(z.bfloat16()).dtype == torch.float32


def test_the_loss_keeps_states_alone():
    m, (z, _, _, _) = book(), drawn(50)
    z = z.float().requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t):
        loss = m.loss(z)
    assert loss.requires_grad
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) <= z.nbytes + m.words.nbytes


def test_words_are_normal_and_as_many_as_said():
    torch.manual_seed(0)
    m = Codebook(256, 64, 8)
    assert m.words.shape == (32, 64, 8)
    words = m.words.detach()
    assert abs(float(words.mean())) < 0.05 and abs(float(words.std()) - 1) < 0.05


@pytest.mark.parametrize("causal", [False, True])
def test_it_finds_more_of_the_largest_scores_than_chance_and_more_once_it_has_learned(causal):
    """Queries and keys about a few centres, as those of trained attentions are."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=g) * 1.5
    q, k = (centres[torch.randint(6, (2, 2, 96), generator=g)]
            + 0.3 * torch.randn(2, 2, 96, 16, generator=g) + 2 for _ in range(2))
    torch.manual_seed(0)
    m, how = Codebook(16, 8, 4), How(12, 0.25, causal)
    found = [recall(q, k, (m.codes(q), m.codes(k)), how)]
    opt = torch.optim.Adam(m.parameters(), lr=5e-2)
    for _ in range(200):
        opt.zero_grad()
        (m.loss(q) + m.loss(k)).backward()
        opt.step()
    found.append(recall(q, k, (m.codes(q), m.codes(k)), how))
    noise = tuple(torch.randint(8, (4, 2, 2, 96), generator=g) for _ in range(2))
    chance = recall(q, k, noise, how)
    print(f"recall of the largest eighth: {chance:.2f} by chance, {found[0]:.2f} with words as "
          f"drawn, {found[1]:.2f} once learned")
    assert chance < 0.3 and found[0] > chance + 0.05 and found[1] > found[0] + 0.1


def test_recall_counts_what_is_chosen_of_the_best_where_there_is_a_choice():
    q, k, _, codes = drawn(8)
    for causal, pad in ((False, None), (True, None), (False, masks("padding", 8))):
        sel = picked(codes, 3, causal, pad)
        seen = picked(codes, 8, causal, pad)
        s = (q @ k.transpose(-1, -2)).masked_fill(~seen, -1e9)
        hit = [len(set(s[b, h, i].topk(3).indices.tolist())
                   & set(sel[b, h, i].nonzero().flatten().tolist())) / 3
               for b in range(B) for h in range(H) for i in range(8) if seen[b, h, i].sum() > 3]
        got = recall(q, k, codes, How(3, 1.0, causal), pad)
        assert got == pytest.approx(sum(hit) / len(hit))
    assert recall(q, k, codes, How(8, 1.0)) != recall(q, k, codes, How(3, 1.0))


# -- in models -------------------------------------------------------------------------------------
LONG = {"llama": 24, "bert": 24, "vit": None}
KEEP, WORDS, WIDTH = 0.2, 4, 2


def made(model, settings=f"attended={KEEP}, words={WORDS}, subspace={WIDTH}",
         more="lora(rank=2) + ", **kw):
    torch.manual_seed(0)
    if model == "vit":
        net, batch = tiny("vit", image_size=20, patch_size=4, **kw)
        batch["pixel_values"] = torch.randn(2, 3, 20, 20)
    else:
        net, batch = tiny(model, max_position_embeddings=64, **kw)
        T = LONG[model]
        batch["input_ids"] = torch.randint(3, 50, (2, T))
        batch.pop("token_type_ids", None)
        batch["attention_mask"] = torch.ones(2, T, dtype=torch.long)
        if model == "llama":
            batch["labels"] = batch["input_ids"]
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"{more}pq_attention({settings})", head=False)
    return tuned, batch, base


def books(tuned):
    return [m for m in tuned.model.modules() if isinstance(m, Coded)]


class Stock(torch.overrides.TorchFunctionMode):
    """The equation in the place of the function that models call."""

    def __init__(self, tuned, causal=False, valid=None):
        super().__init__()
        self.words = [m.codebook.words for m in books(tuned)]
        self.causal, self.valid, self.at, self.terms = causal, valid, 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        C = self.words[self.at].to(q.dtype)
        self.at += 1
        (lq, of_q), (lk, of_k) = spelled(C, q, self.valid), spelled(C, k, self.valid)
        self.terms.append(lq + lk)
        n = q.shape[1] // k.shape[1]
        k, v, of_k = (k.repeat_interleave(n, 1), v.repeat_interleave(n, 1),
                      of_k.repeat_interleave(n, 2))
        T = q.shape[2]
        kept = -(-T * int(KEEP * 100) // 100)
        mask = None if self.valid is None else self.valid[:, None, None, :]
        sel = picked((of_q, of_k), kept, self.causal, mask)
        return dense(q, k, v, sel, q.shape[-1]**-0.5)


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("model", LONG)
def test_models_compute_the_equation(model, padding):
    if model == "vit" and padding:
        return
    tuned, batch, base = made(model, dtype=torch.float64)
    if model == "vit":
        batch["pixel_values"] = batch["pixel_values"].double()
    valid = None
    if padding:
        mask = batch["attention_mask"]
        mask[0, -7:] = 0
        if padding == "left":
            mask.copy_(mask.flip(1))
        valid = mask.bool()
    tuned.model.eval(), base.eval()
    got = tuned.model(**batch).logits
    with Stock(tuned, model == "llama", valid):
        want = base(**batch).logits
    plain = base(**batch).logits
    if valid is not None and got.dim() == 3:
        got, want, plain = got[valid], want[valid], plain[valid]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(got, plain)


@pytest.mark.parametrize("repeated", [False, True])
def test_grouped_queries(repeated):
    tuned, batch, base = made("llama", dtype=torch.float64, num_attention_heads=4,
                              num_key_value_heads=2)
    tuned.model.eval(), base.eval()
    with Stock(tuned, True):
        want = base(**batch).logits
    torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-8, atol=1e-9)
    m = books(tuned)[0]
    q, k, v, _ = drawn(9)
    k, v = k[:, :1], v[:, :1]
    kw = {} if repeated else {"enable_gqa": True}
    given = (q, *(t.expand(-1, H, -1, -1) if repeated else t for t in (k, v)))
    got = m.attend(nn.Identity(), F.scaled_dot_product_attention, given, kw)
    codes = spelled(m.codebook.words.double(), q)[1], \
        spelled(m.codebook.words.double(), k)[1].expand(-1, -1, H, -1)
    torch.testing.assert_close(got, dense(q, k, v, picked(codes, 2), D**-0.5))


@pytest.mark.parametrize("pulls", [True, False])
def test_the_codebook_loss_rides_on_the_tasks(pulls):
    """Gradients are those of loss + weight * sum over attentions of L(q) + L(k)."""
    text = f"attended={KEEP}, words={WORDS}, subspace={WIDTH}, weight=0.7, pulls={pulls}"
    tuned, batch, base = made("bert", text, "full + ", dtype=torch.float64)
    batch["attention_mask"][0, -5:] = 0
    for m in books(tuned):
        m.double()
    tuned.model.eval(), base.eval()                      # no dropout
    got = dict(tuned.named_parameters())
    grads = dict(zip(got, torch.autograd.grad(3 * tuned.loss(batch), got.values()), strict=True))
    for name, p in base.named_parameters():
        p.requires_grad_(name in got)
    with Stock(tuned, valid=batch["attention_mask"].bool()) as stock:
        loss = base(**batch).loss
    if not pulls:
        task = 3 * loss
        want = dict(zip(got, torch.autograd.grad(
            task, [p for n, p in base.named_parameters() if n in got]), strict=False))
        words = torch.autograd.grad(3 * 0.7 * sum(stock.terms), stock.words)
    else:
        mine = [p for n, p in base.named_parameters() if n in got]
        both = torch.autograd.grad(3 * (loss + 0.7 * sum(stock.terms)), [*mine, *stock.words])
        want, words = dict(zip(got, both, strict=False)), both[len(mine):]
    names = [n for n, _ in base.named_parameters() if n in got]
    for name, g in zip(names, want.values(), strict=False):
        torch.testing.assert_close(grads[name], g, rtol=1e-8, atol=1e-10)
    for name, g in zip([n for n in got if n not in names], words, strict=True):
        torch.testing.assert_close(grads[name], g, rtol=1e-8, atol=1e-10)


def test_codebooks_learn_in_a_warm_up_and_at_times_after_it():
    tuned, batch, _ = made("llama", "attended=0.3, subspace=4, warmup=2, every=3")
    tuned.optimizer(lr=1e-2)
    words, moved = books(tuned)[0].codebook.words, []
    for _ in range(9):
        before = words.detach().clone()
        tuned.step(batch)
        moved.append(not torch.equal(before, words))
    assert moved == [True, True, True, False, False, True, False, False, True]
    tuned, batch, _ = made("llama", "attended=0.3, subspace=4, warmup=1, every=0")
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    before = books(tuned)[0].codebook.words.detach().clone()
    tuned.step(batch)
    assert torch.equal(before, books(tuned)[0].codebook.words)
    tuned.timeline.emit("rehearse", 5)
    assert books(tuned)[0].codebook.words.requires_grad


def test_training_raises_the_recall_of_a_model():
    tuned, batch, _ = made("llama", "attended=0.2, words=8, subspace=4")
    m, seen = books(tuned)[0], []
    real = m.attend

    def look(module, func, args, kwargs):
        q, k = args[0].detach(), args[1].detach()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        seen.append(recall(q, k, (m.codebook.codes(q), m.codebook.codes(k)),
                           How(5, 1.0, True)))
        return real(module, func, args, kwargs)

    m.attend = look
    tuned.optimizer(lr=2e-2)
    for _ in range(100):
        tuned.step(batch)
    print(f"recall in a small model: {seen[0]:.2f} at the start, {seen[-1]:.2f} after 100 updates")
    assert sum(seen[-5:]) / 5 > seen[0] + 0.05


def test_blocks_that_run_again_choose_the_same():
    grads = []
    for more in ("", "checkpoint + "):
        tuned, batch, _ = made("llama", more=f"lora(rank=2) + {more}")
        tuned.optimizer(lr=1e-2)
        tuned.step(batch)
        tuned.step(batch)
        grads.append({n: p.grad.clone() for n, p in tuned.named_parameters()})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-4, atol=1e-7)


def test_a_cache_and_another_sequence_stay_exact():
    tuned, _, _ = made("llama")
    q, k, v, _ = drawn(9)
    got = books(tuned)[0].attend(nn.Identity(), F.scaled_dot_product_attention,
                                 (q[:, :, -1:], k, v), {"scale": 0.3})
    assert torch.equal(got, F.scaled_dot_product_attention(q[:, :, -1:], k, v, scale=0.3))


def test_a_call_has_its_own_scale_order_and_dropout():
    tuned, _, _ = made("llama")
    tuned.model.eval()
    m, (q, k, v, _) = books(tuned)[0], drawn(9)
    codes = tuple(spelled(m.codebook.words.double(), t)[1] for t in (q, k))
    for kw in ({"scale": 0.2}, {"is_causal": True}, {}):
        sel = picked(codes, 2, kw.get("is_causal", False))
        got = m.attend(nn.Identity(), F.scaled_dot_product_attention, (q, k, v), kw)
        torch.testing.assert_close(got, dense(q, k, v, sel, kw.get("scale", D**-0.5)))
    torch.manual_seed(1)
    dropped = m.attend(nn.Identity(), F.scaled_dot_product_attention, (q, k, v, None, 0.5), {})
    assert not torch.allclose(dropped, got)
    one = m.attend(nn.Identity(), F.scaled_dot_product_attention,
                   tuple(t[:, :, :4] for t in (q, k, v)), {})          # 0.2 of 4 tokens is one
    codes = tuple(c[..., :4] for c in codes)
    torch.testing.assert_close(one, dense(q[:, :, :4], k[:, :, :4], v[:, :, :4],
                                          picked(codes, 1), D**-0.5))


def test_autocast_keeps_out_of_it():
    tuned, _, _ = made("llama")
    tuned.model.eval()
    m, (q, k, v, _) = books(tuned)[0], (t if isinstance(t, tuple) else t.float() for t in drawn(9))
    plain = m.attend(nn.Identity(), F.scaled_dot_product_attention, (q, k, v), {})
    with torch.autocast("cpu", torch.bfloat16):
        got = m.attend(nn.Identity(), F.scaled_dot_product_attention, (q, k, v), {})
    assert torch.equal(got, plain)


def test_it_is_no_weight_and_lora_merges_without_it():
    tuned, batch, base = made("bert")
    tuned.model.eval(), base.eval()
    assert not torch.equal(tuned.model(**batch).logits, base(**batch).logits)
    with pytest.raises(burnish.BurnishError, match="pq_attention"):
        tuned.merge()
    method = parse("pq_attention")[0]
    assert not method.identity and not method.merges


class Single(nn.Module):
    """Attention of one head, which says nothing of heads."""

    def __init__(self, d):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        q, k, v = (m(x).unsqueeze(1) for m in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Beside(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(d), Single(d)

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Stack(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.layers = nn.ModuleList(Beside(d) for _ in range(2))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def test_heads_of_which_nothing_is_said_are_one():
    torch.manual_seed(0)
    net, x = Stack(D), torch.randn(2, 5, D)
    want = net(x)
    tuned = burnish.tune(net, f"pq_attention(subspace={D}, words=2, attended=1.0)", head=False)
    assert [tuple(p.shape) for p in tuned.parameters()] == [(1, 2, D)] * 2
    torch.testing.assert_close(net(x), want)


def test_count_on_a_published_shape():
    method = parse("pq_attention")[0]
    found = list(method.branch(Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])))
    assert [c.h for c in found] == [128] * 32 and method.count(128) == 128 * 16
    tuned, _, _ = made("llama", more="")
    assert [tuple(p.shape) for p in tuned.parameters()] == [(D // WIDTH, WORDS, WIDTH)] * 2
    assert method.__class__(words=WORDS).count(D) == D * WORDS


def test_refusals_and_defaults():
    assert parse("pq_attention")[0].settings() == {
        "targets": None, "attended": 0.125, "words": 16, "subspace": 8, "weight": 1.0,
        "warmup": 100, "every": 10, "pulls": True}
    for text, why in (("attended=0.0", "expected a share"), ("attended=1.1", "expected a share"),
                      ("words=1", "2 to 256"), ("words=257", "2 to 256"),
                      ("subspace=0", "2 to 256"), ("weight=0.0", "learn nothing"),
                      ("warmup=-1", "learn nothing"), ("every=-1", "learn nothing"),
                      ("warmup=0, every=0", "learn nothing")):
        with pytest.raises(RecipeError, match=f"^pq_attention.*{why}"):
            parse(f"pq_attention({text})")
    assert parse("pq_attention(attended=1.0, words=2, subspace=1, warmup=0, every=1)")
    assert parse("pq_attention(words=256, warmup=1, every=0)")
    assert parse("pq_attention(warmup=3, every=3)")
    for other in ("scatterbrain", "pq_attention(words=4)"):
        with pytest.raises(RecipeError, match="how attention is computed"):
            parse(f"pq_attention + {other}")
    with pytest.raises(RecipeError, match="is an nn.MultiheadAttention"):
        burnish.tune(tiny("encoder")[0], "lora(rank=2) + pq_attention", head=False)
    with pytest.raises(RecipeError, match="does not divide heads of width 8"):
        burnish.tune(tiny("bert")[0], "lora(rank=2) + pq_attention(subspace=3)", head=False)
    net, _ = tiny("bert")
    net.set_attn_implementation("eager")
    with pytest.raises(RecipeError, match="attn_implementation='sdpa'"):
        burnish.tune(net, "lora(rank=2) + pq_attention(subspace=4)", head=False)
    tuned, batch, _ = made("llama")
    tuned.model.set_attn_implementation("eager")
    with pytest.raises(RecipeError, match=r"^pq_attention.*without F.scaled_dot_product_attention"):
        tuned.model(**batch)
    with pytest.raises(RecipeError, match=r"queries \(2, 9, 8\)"):
        books(tuned)[0].attend(nn.Identity(), F.scaled_dot_product_attention,
                               tuple(torch.randn(2, 9, 8) for _ in range(3)), {})
    tuned, batch, _ = made("bert")
    with pytest.raises(RecipeError, match="rides on backward"):
        torch.func.functional_call(tuned.model, {}, (), batch)
        params = {n: p.detach() for n, p in tuned.named_parameters()}
        torch.func.grad(lambda ps: torch.func.functional_call(
            tuned.model, ps, (), batch).loss)(params)
