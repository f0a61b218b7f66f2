"""Adam-mini against its equations in float64, group by group, and its counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.step import compose
from burnish.core.anatomy import Anatomy
from burnish.core.groups import Outputs, outputs
from burnish.core.recipe import parse
from burnish.testing.models import tiny

F64 = torch.float64


def answers(recipe="adam_mini"):
    return [m.optimizer() for m in parse(recipe)]


def numbered(name, p, model, kind):
    """Of every weight, the number of its group: written from the paper's list, by names."""
    c = model.config
    m, n = (p.shape[0], p.numel() // p.shape[0]) if p.dim() > 1 else (p.numel(), 1)
    row = torch.arange(m)[:, None].expand(m, n).reshape(p.shape) if p.dim() > 1 else None
    leaf = name.split(".")[-2]
    if p.dim() < 2:
        return torch.zeros(p.shape, dtype=torch.long)
    if kind == "llama":
        width = c.hidden_size // c.num_attention_heads
        if leaf in ("q_proj", "k_proj"):
            return row // width
        return row                                       # v, o, gate, up, down, embedding, head
    d, heads = c.n_embd, c.n_head                        # gpt2: stored (in, out)
    column = torch.arange(n).expand(m, n)
    if leaf == "c_attn":
        per_head = column // (d // heads)
        return torch.where(column < 2 * d, per_head, column - 2 * d + 2 * heads)
    return row if leaf in ("wte", "wpe", "lm_head") else column


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_equations(kind):
    net, batch = tiny(kind)
    net = net.double()
    stock = copy.deepcopy(net)
    tuned = burnish.tune(net, "full + adam_mini(betas=(0.8, 0.95), weight_decay=0.3)", head=False)
    opt = tuned.optimizer(lr=1e-2)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    ms, vs = {}, {}
    for t in range(1, 5):
        tuned.step(batch)
        stock.train(net.training)
        loss = stock(**batch).loss
        named = dict(stock.named_parameters())
        for (name, p), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())),
                                strict=True):
            at = numbered(name, p, stock, kind)
            count = int(at.max()) + 1
            sums = torch.zeros(count, dtype=F64).index_add(0, at.flatten(), g.flatten() ** 2)
            mean = sums / torch.bincount(at.flatten())
            ms[name] = 0.8 * ms.get(name, 0.0) + 0.2 * g
            vs[name] = 0.95 * vs.get(name, 0.0) + 0.05 * mean
            u = ms[name] / (1 - 0.8**t) / ((vs[name] / (1 - 0.95**t)).sqrt()[at] + 1e-8)
            p.data = p.data * (1 - 1e-2 * 0.3) - 1e-2 * u
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), named[name].detach(), rtol=1e-5, atol=1e-8,
                                       msg=f"{name} at {t}")
    for name, p in net.named_parameters():                  # p + groups, and nothing more
        held = {k: v.numel() for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}
        assert held == {"exp_avg": p.numel(),
                        "group_sq": int(numbered(name, p, stock, kind).max()) + 1}


def test_groups_of_one_weight_are_adam():
    W, gs = torch.randn(6, 1, dtype=F64), torch.randn(5, 6, 1, dtype=F64)
    p, q = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    opt = compose(answers(), [("w", p)], 1e-2, outputs={"w": Outputs(False, ((6, 1),))},
                  weight_decay=0.1)
    adam = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1)
    for g in gs:
        p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        adam.step()
    torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("columns", [False, True])
def test_large_tensors_are_stepped_by_strips(columns, monkeypatch):
    from burnish.blocks.update import mini
    runs = Outputs(columns, ((2, 6), (8, 1)))
    shape = (7, 20) if columns else (20, 7)
    ends = []
    for size in (1 << 18, 30):
        monkeypatch.setattr(mini, "strip", lambda device, size=size: size)
        p = nn.Parameter(torch.ones(shape, dtype=F64))
        opt = compose(answers(), [("w", p)], 1e-2, outputs={"w": runs})
        if size == 30:
            monkeypatch.setattr(type(opt), "_slice", staticmethod(lambda device: 30))
        for k in range(3):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(k), dtype=F64)
            opt.step()
        ends.append(p.detach())
        assert opt.state[p]["group_sq"].shape == (10,)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_which_outputs_are_grouped():
    net, _ = tiny("llama")
    c = net.config
    found = outputs(Anatomy.of(net))
    width = c.hidden_size // c.num_attention_heads
    at = "model.layers.0.self_attn."
    assert found[f"{at}q_proj.weight"] == Outputs(False, ((c.num_attention_heads, width),))
    assert found[f"{at}k_proj.weight"] == Outputs(False, ((c.num_key_value_heads, width),))
    assert found[f"{at}v_proj.weight"].runs == ((c.num_key_value_heads * width, 1),)
    assert found["model.layers.0.mlp.down_proj.weight"].runs == ((c.hidden_size, 1),)
    assert found["model.embed_tokens.weight"] == Outputs(False, ((c.vocab_size, 1),))
    assert found["lm_head.weight"] == Outputs(False, ((c.vocab_size, 1),))
    gpt2, _ = tiny("gpt2")
    d, heads = gpt2.config.n_embd, gpt2.config.n_head
    fused = outputs(Anatomy.of(gpt2))["transformer.h.0.attn.c_attn.weight"]
    assert fused == Outputs(True, ((heads, d // heads), (heads, d // heads), (d, 1)))


@pytest.mark.parametrize("heads", [32, 8])
def test_the_groups_of_a_7b_model(heads):
    """A head of q, k; an output of v, o and the MLP; a token of table and head; each norm."""
    d, ff, vocab = 4096, 11008, 32000
    net, _ = tiny("llama", meta=True, hidden_size=d, intermediate_size=ff, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=heads, vocab_size=vocab)
    found = outputs(Anatomy.of(net))
    groups = sum(sum(count for count, _ in found[n].runs) if n in found else 1
                 for n, _ in net.named_parameters())
    block = (32 + heads) + heads * 128 + d + 2 * ff + d + 2
    assert groups == 32 * block + 2 * vocab + 1
    assert groups < 2e-4 * sum(p.numel() for p in net.parameters())


def test_heads_that_nobody_tells_are_no_groups():
    net, _ = tiny("llama")
    anatomy = Anatomy.of(net)
    anatomy.blocks = [replace(b, heads=None, kv_heads=None) for b in anatomy.blocks]
    d = net.config.hidden_size
    assert outputs(anatomy)["model.layers.0.self_attn.q_proj.weight"].runs == ((d, 1),)


def test_a_resumed_run_is_bit_for_bit_the_same():
    W, gs = torch.randn(8, 6), torch.randn(6, 8, 6)
    told = {"w": Outputs(False, ((2, 4),))}

    def go(p, opt, some):
        for g in some:
            p.grad = g.clone()
            opt.step()

    whole = nn.Parameter(W.clone())
    go(whole, compose(answers(), [("w", whole)], 1e-2, outputs=told), gs)
    first = nn.Parameter(W.clone())
    opt = compose(answers(), [("w", first)], 1e-2, outputs=told)
    go(first, opt, gs[:3])
    second = nn.Parameter(first.detach().clone())
    again = compose(answers(), [("w", second)], 1e-2, outputs=told)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    go(second, again, gs[3:])
    assert torch.equal(whole, second)


@pytest.mark.parametrize("more", ["", " + step_in_backward", " + stochastic_rounding"])
def test_on_a_model_it_learns(more):
    net, batch = tiny("llama")
    tuned = burnish.tune(net.bfloat16() if "rounding" in more else net,
                         f"full + adam_mini{more}", head=False)
    tuned.optimizer(lr=3e-3)
    losses = [float(tuned.step(batch)) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_what_cannot_be_joined_is_refused():
    for other in ("galore", "adam8bit"):
        with pytest.raises(burnish.RecipeError, match="cannot be joined"):
            compose(answers(f"adam_mini + {other}"), [("w", nn.Parameter(torch.ones(2)))], 1e-3)


def test_its_settings_are_the_authors():
    (made,) = parse("adam_mini")
    want = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert {k: getattr(made, k) for k in want} == want
