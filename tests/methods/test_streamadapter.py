"""StreamAdapter: the fold and the change against the equation in float64, pieces against the whole,
and contexts that learn to matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.absorbed import Layer
from burnish.core.errors import ConfigError, DataError
from burnish.core.site import Place
from burnish.testing.models import tiny


def made(settings="rank=3, fold=4", **kw):
    torch.manual_seed(0)
    model, batch = tiny("llama", **kw)
    model.double().eval()
    absorber = burnish.parse(f"streamadapter({settings})")[0].lifecycle(model)
    return model, absorber, batch["input_ids"]


def stirred(absorber, size=0.3):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in absorber.layers.parameters():
            p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return absorber


def ids(n, seed=0):
    return torch.randint(0, 30, (1, n), generator=torch.Generator().manual_seed(seed))


def test_the_state_and_the_change_are_those_of_the_equation():
    model, absorber, _ = made()
    stirred(absorber)
    tokens = ids(10)                                     # two chunks and a half
    context = absorber.absorb(tokens)
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    edit = absorber.edit(context)
    for layer, S, kv in zip(absorber.layers, context.states, cache.layers, strict=True):
        K, V = (torch.cat([t[0, h] for h in range(t.shape[1])], -1) for t in (kv.keys, kv.values))
        want = torch.zeros(3, V.shape[1], dtype=torch.float64)
        for a, b in ((0, 4), (4, 8), (8, 10)):
            for r in range(3):
                z = torch.stack([layer.Q[r] @ K[t] / K.shape[1]**0.5 for t in range(a, b)])
                U = ((z - z.max()).exp() / (z - z.max()).exp().sum()) @ V[a:b]
                want[r] = want[r].clone() / (1 + (-(U @ layer.gate)).exp()) + U
        torch.testing.assert_close(S, want)
        for name, into, out in zip(layer.names, layer.into, layer.out, strict=True):
            dense = out @ want.T @ into
            torch.testing.assert_close(edit.dense(name), dense)
            assert int(torch.linalg.matrix_rank(dense)) <= 3 and dense.any()


def test_pieces_of_whole_chunks_are_the_whole():
    _, absorber, _ = made()
    stirred(absorber)
    tokens = ids(14)
    whole = absorber.absorb(tokens)
    for cuts in ((4, 14), (8, 14), (4, 8, 12, 14), (12, 12, 14)):
        found, start = None, 0
        for stop in cuts:
            found = absorber.absorb(tokens[:, start:stop], found)
            start = stop
        assert found.tokens == 14
        for a, b in zip(found.states, whole.states, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    turned = absorber.absorb(torch.cat([tokens[:, 4:8], tokens[:, :4], tokens[:, 8:]], 1))
    assert not torch.allclose(turned.states[-1], whole.states[-1])       # order is kept


def test_a_chunk_length_of_another_size_is_another_state():
    states = []
    for fold in (4, 2):
        _, absorber, _ = made(f"rank=3, fold={fold}")
        states.append(stirred(absorber).absorb(ids(8)).states[0])
    assert not torch.allclose(*states)


def test_no_context_is_the_base_and_so_is_the_start():
    model, absorber, batch = made()
    want = model(input_ids=batch).logits
    with absorber.edit(absorber.absorb(ids(9))).standing():              # P_out = 0
        assert torch.equal(model(input_ids=batch).logits, want)
    stirred(absorber)
    for context in (absorber.empty(), absorber.absorb(ids(0))):
        with absorber.edit(context).standing():
            assert torch.equal(model(input_ids=batch).logits, want)
    with absorber.edit(absorber.absorb(ids(9))).standing():
        assert not torch.allclose(model(input_ids=batch).logits, want)
    assert torch.equal(model(input_ids=batch).logits, want)


def test_unmerged_is_merged_and_a_closed_context_answers_the_same():
    model, absorber, batch = made()
    stirred(absorber)
    context = absorber.absorb(ids(9)).closed()
    assert context.cache is None
    with torch.no_grad(), absorber.edit(context).standing():
        want = model(input_ids=batch).logits
    absorber.edit(context).merge()
    torch.testing.assert_close(model(input_ids=batch).logits, want, rtol=1e-9, atol=1e-10)


def test_counts():
    place = Place("l", "weight", "linear", 24, 16)
    layer = Layer([place, place], 10, 12, 5, torch.Generator(), torch.empty(0))
    assert sum(p.numel() for p in layer.parameters()) == 5 * 10 + 12 + 2 * (12 * 24 + 5 * 16)
    _, absorber, _ = made()
    assert {n.rsplit(".", 2)[-2] for layer in absorber.layers for n in layer.names} == \
        {"q_proj", "v_proj"}
    assert burnish.parse("streamadapter")[0].settings() == {
        "targets": None, "rank": 16, "fold": 128, "seed": 0}


def test_gradients_reach_all_that_trains_and_lessons_are_learnt():
    """A query asks for a token that only its context has told."""
    model, absorber, _ = made("rank=4, fold=4, targets='q,v,o,mlp'")
    model.lm_head.weight.data.mul_(20)                   # a head that can be sure
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = torch.Generator().manual_seed(0)
    query = torch.tensor([[1, 2, 3]])

    def lesson():
        t = int(torch.randint(5, 9, (1,), generator=g))
        labels = torch.tensor([[-100, -100, t]])
        return torch.full((1, 8), t), {"input_ids": query, "labels": labels}

    stirred(absorber, 0.01)
    told = absorber.learn((lesson() for _ in range(120)), 1e-2)
    assert sum(told[-20:]) < 0.6 * sum(told[:20])
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    context, batch = lesson()
    with absorber.edit(absorber.absorb(context)).standing():
        model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in absorber.layers.parameters())


def test_refusals():
    for bad in ("rank=0", "fold=0"):
        with pytest.raises(ConfigError, match="at least 1"):
            burnish.parse(f"streamadapter({bad})")
    model, absorber, _ = made()
    with pytest.raises(DataError, match="one context at a time"):
        absorber.absorb(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(DataError, match="where a chunk of 4 tokens has ended"):
        absorber.absorb(ids(4), absorber.absorb(ids(6)))
    with pytest.raises(DataError, match="this one has 4, closed"):
        absorber.absorb(ids(4), absorber.absorb(ids(4)).closed())
    with pytest.raises(DataError, match="a lesson is"):
        absorber.learn([(ids(4), ids(3))], 1e-3)
    with pytest.raises(ConfigError, match="plain model"):
        burnish.parse("streamadapter")[0].lifecycle(burnish.tune(model, "lora(rank=2)"))
    with pytest.raises(ConfigError, match="is in no layer"):
        burnish.parse("streamadapter(targets='lm_head')")[0].lifecycle(tiny("llama")[0])
    with pytest.raises(ConfigError, match="a Sequential is none"):
        burnish.parse("streamadapter(targets='0')")[0].lifecycle(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match="changes whole linears, and .*attn.* is none"):
        burnish.parse("streamadapter")[0].lifecycle(tiny("gpt2")[0])     # q, v are rows of one


def test_one_row_and_one_token_at_a_time_are_enough():
    _, absorber, _ = made("rank=1, fold=1")
    context = stirred(absorber).absorb(ids(3))
    assert all(S.shape[0] == 1 and S.any() for S in context.states)
    dense = absorber.edit(context).dense(absorber.layers[0].names[0])
    assert int(torch.linalg.matrix_rank(dense)) == 1
