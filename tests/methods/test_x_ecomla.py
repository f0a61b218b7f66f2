"""X-EcoMLA: the decompositions, the attention written out in float64, what a cache holds, and
learning what a teacher says."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import burnish
from burnish.blocks.state import latent_attention
from burnish.blocks.state.latent_attention import Latent, converted, joint, rank_of, rounded
from burnish.blocks.update import token_kl as kl_file
from burnish.blocks.update.token_kl import token_kl
from burnish.core.anatomy import Anatomy
from burnish.testing import stir
from burnish.testing.models import tiny


def method(**kw):
    said = ", ".join(f"{k}={v!r}" for k, v in kw.items())
    return burnish.parse(f"x_ecomla({said})")[0]


def llama(**kw):
    """(model, batch) in float64, evaluation mode; heads of width 8, two for keys."""
    net, batch = tiny("llama", dtype=torch.float64, **kw)
    return net.eval(), batch


def attention(net, i=0):
    return net.model.layers[i].self_attn


# -- the decompositions ---------------------------------------------------------------------------
def test_at_full_rank_values_and_keys_that_do_not_turn_are_what_they_were():
    net, _ = llama()
    old = copy.deepcopy(attention(net))
    method(q_rank=32, kv_rank=32, rope=4).lifecycle(net)
    new = attention(net)
    H, D, n, R = 4, 8, 4, 32
    assert new.rank == R
    down = new.kv_a_proj_with_mqa.weight[:R]
    up = new.kv_b_proj.weight.view(H, n + D, R)
    for h in range(H):
        g = h // 2                                          # two heads share one of keys
        torch.testing.assert_close(up[h, n:] @ down, old.v_proj.weight[g * D : (g + 1) * D])
        torch.testing.assert_close(up[h, :n] @ down, old.k_proj.weight[g * D : g * D + n])
    torch.testing.assert_close(new.q_b_proj.weight @ new.q_a_proj.weight, old.q_proj.weight)
    K = old.k_proj.weight.view(2, D, 32)
    torch.testing.assert_close(new.kv_a_proj_with_mqa.weight[R:], (K[0, n:] + K[1, n:]) / 2)
    assert new.o_proj.weight.shape == (32, 32)
    assert torch.equal(new.o_proj.weight, old.o_proj.weight)


@pytest.mark.parametrize("rank", [8, 16, 24])
def test_the_tail_of_the_singular_values_is_the_error(rank):
    net, _ = llama()
    old = copy.deepcopy(attention(net))
    lost = method(q_rank=rank, kv_rank=rank, rope=2).lifecycle(net)["model.layers.0.self_attn"]
    new = attention(net)
    W = joint(old.k_proj.weight, old.v_proj.weight, 4, 2).detach()
    K = old.k_proj.weight.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
    assert torch.equal(W[:32], K)
    U, S, V = torch.linalg.svd(W)
    best = (U[:, :rank] * S[:rank]) @ V[:rank]
    assert lost["kv"] == pytest.approx(float((W - best).norm()), rel=1e-8)
    assert lost["kv"] == pytest.approx(float(S[rank:].square().sum().sqrt()), rel=1e-8)
    q = new.q_b_proj.weight @ new.q_a_proj.weight
    assert lost["q"] == pytest.approx((q - old.q_proj.weight).norm().item(), rel=1e-8)
    up = new.kv_b_proj.weight.view(4, 14, rank)[:, 6:].reshape(32, rank)
    torch.testing.assert_close(up @ new.kv_a_proj_with_mqa.weight[:rank], best[32:])


def test_ranks_by_energy_are_rounded_up():
    S = torch.tensor([3.0, 2.0, 1.0, 0.5])
    assert [rank_of(S, e, 2.0) for e in (0.1, 0.64, 0.93, 1.0)] == [1, 1, 2, 4]
    assert rank_of(S, 0.47, 1.0) == 1 and rank_of(S, 0.47, 3.0) == 1
    assert rank_of(S, 0.78, 1.0) == 2 and rank_of(S, 0.72, 3.0) == 1
    assert [rounded(r, 100) for r in (1, 8, 9, 97)] == [8, 8, 16, 100]
    net, _ = llama()
    method(spectrum=0.6, rope=4).lifecycle(net)
    W = joint(attention(llama()[0]).k_proj.weight, attention(llama()[0]).v_proj.weight, 4, 2)
    s = torch.linalg.svdvals(W).square()
    want = int((s.cumsum(0) / s.sum() <= 0.6).sum())
    assert attention(net).rank == -(-want // 8) * 8


# -- the attention --------------------------------------------------------------------------------
def written(new, x, positions, theta=10000.0):
    """Head by head, token by token."""
    B, T, _ = x.shape
    H, D, r, R = new.heads, new.width, new.rope, new.rank
    n, out = D - r, torch.zeros(B, T, H * D, dtype=x.dtype)

    def turn(v, t):
        made = v.clone()
        for i in range(r // 2):
            a = positions[t] * theta ** (-2 * i / r)
            c, s = math.cos(a), math.sin(a)
            made[..., i] = v[..., i] * c - v[..., i + r // 2] * s
            made[..., i + r // 2] = v[..., i + r // 2] * c + v[..., i] * s
        return made
    for b in range(B):
        cq = [new.q_a_proj.weight @ x[b, t] for t in range(T)]
        low = [new.kv_a_proj_with_mqa.weight @ x[b, t] for t in range(T)]
        for h in range(H):
            Q = new.q_b_proj.weight[h * D : (h + 1) * D]
            KV = new.kv_b_proj.weight[h * (n + D) : (h + 1) * (n + D)]
            keys = [torch.cat([KV[:n] @ low[t][:R], turn(low[t][R:], t)]) for t in range(T)]
            values = [KV[n:] @ low[t][:R] for t in range(T)]
            for t in range(T):
                q = Q @ cq[t]
                q = torch.cat([q[:n], turn(q[n:], t)])
                a = torch.stack([q @ keys[s] for s in range(t + 1)]) / math.sqrt(D)
                out[b, t, h * D : (h + 1) * D] = sum(w * v for w, v in zip(
                    a.softmax(0), values, strict=False))
    return out @ new.o_proj.weight.mT


@pytest.mark.parametrize("rope", [2, 4, 8])
def test_the_equation_written_out(rope):
    net, _ = llama()
    net.config.rope_parameters["rope_theta"] = 10000.0
    method(q_rank=16, kv_rank=16, rope=rope).lifecycle(net)
    new = attention(net)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    ids = torch.arange(3, 8).unsqueeze(0)
    angles = net.model.rotary_emb(x, position_ids=ids)
    got, _ = new(x, angles)
    torch.testing.assert_close(got, written(new, x, [3, 4, 5, 6, 7]), rtol=1e-6, atol=1e-7)


def test_one_head_of_keys_that_turns_whole_at_full_rank_is_the_pre_trained_function():
    net, batch = llama(num_key_value_heads=1)
    want = net(**batch).logits
    lost = method(q_rank=32, kv_rank=32, rope=8).lifecycle(net)
    torch.testing.assert_close(net(**batch).logits, want)
    assert max(max(v.values()) for v in lost.values()) < 1e-12
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    with_mask = {"input_ids": batch["input_ids"], "attention_mask": mask}
    old, _ = llama(num_key_value_heads=1)
    torch.testing.assert_close(net(**with_mask).logits[0, 3:], old(**with_mask).logits[0, 3:])


# -- a cache --------------------------------------------------------------------------------------
def in_parts(net, ids, cuts=(3, 4, 6)):
    cache, out, at = None, [], 0
    for end in (*cuts, ids.shape[1]):
        made = net(input_ids=ids[:, at:end], past_key_values=cache, use_cache=True)
        cache, at = made.past_key_values, end
        out.append(made.logits)
    return torch.cat(out, 1), cache


def test_a_cache_holds_few_numbers_a_token_and_absorbed_is_expanded(monkeypatch):
    net, batch = llama()
    m = method(q_rank=16, kv_rank=8, rope=4)
    m.lifecycle(net)
    ids, used = batch["input_ids"], []
    inner = Latent.absorbed
    monkeypatch.setattr(Latent, "absorbed", lambda self, *a: (used.append(1), inner(self, *a))[1])
    with torch.no_grad():
        got, cache = in_parts(net, ids)
        want = net(input_ids=ids).logits
    torch.testing.assert_close(got, want)
    assert len(used) == 2 * 3, "three parts, two blocks, behind the first"
    layer = cache.layers[0]
    B, T = ids.shape
    assert (layer.keys.numel() + layer.values.numel()) == B * T * (8 + 4) == B * T * m.cached(8)
    assert layer.keys.shape == (B, 1, T, 8) and layer.values.shape == (B, 1, T, 4)
    new = attention(net)
    q, c, own = (torch.randn(2, h, s, w).double() for h, s, w in ((4, 1, 8), (1, 6, 8), (1, 6, 4)))
    torch.testing.assert_close(inner(new, q, c, own, None), new.expanded(q, c, own, None))
    q = torch.randn(2, 4, 3, 8).double()
    torch.testing.assert_close(inner(new, q, c, own, None), new.expanded(q, c, own, None))
    assert new.attend(q, q, q, None).shape == q.shape


def test_what_stands_on_the_matrix_of_keys_and_values_is_heard_with_a_cache():
    net, batch = llama()
    method(q_rank=16, kv_rank=8, rope=4).lifecycle(net)
    roles = {p.role for p in Anatomy.of(net).places}
    assert {"q_a", "q_b", "kv_a", "kv_b", "o"} <= roles
    before = net(input_ids=batch["input_ids"]).logits
    tuned = burnish.tune(net, "lora(rank=2)", targets="kv_b_proj")
    stir(tuned)
    with torch.no_grad():
        want = net.eval()(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(in_parts(net, batch["input_ids"])[0], want)
    assert not torch.allclose(want, before)


def test_compressions_of_the_paper():
    whole = 2 * 8 * 64                                       # Llama-3.2-1B: 8 heads of 64
    assert whole / method(rope=32).cached(128) == pytest.approx(6.4)
    assert whole / method(rope=32).cached(64) == pytest.approx(10.67, abs=0.01)
    assert Latent.count(2048, 32, 64, 32, 1424, 64) == 6_225_920
    net, _ = llama()
    method(q_rank=16, kv_rank=8, rope=4).lifecycle(net)
    n = sum(p.numel() for name, p in attention(net).named_parameters() if "o_proj" not in name)
    assert n == Latent.count(32, 4, 8, 4, 16, 8)


# -- learning -------------------------------------------------------------------------------------
@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_and_its_gradient(masked, monkeypatch):
    monkeypatch.setattr(kl_file, "ROWS", 4)
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(3, 5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    mask = (torch.rand(3, 5, generator=g) > 0.4).long() if masked else None
    z.requires_grad_(True)
    got = token_kl(z, t, mask)
    p, q = t.softmax(-1), z.softmax(-1)
    rows = (p * (p / q).log()).sum(-1)
    want = rows.mean() if mask is None else rows[mask.bool()].mean()
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(3 * v, z)[0] for v in (got, want))
    torch.testing.assert_close(a, b)
    half = token_kl(z.detach().bfloat16(), t.bfloat16())
    assert half.dtype == torch.float32
    assert float(token_kl(t, t)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("counted", [0, 1, 999])
def test_divergence_of_half_precision_is_computed_in_fp32(counted):
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(999, 3, generator=g).bfloat16() for _ in range(2))
    z.requires_grad_(True)
    mask = None if counted == 999 else torch.arange(999) < counted
    got = token_kl(z, t, mask)
    (grad,) = torch.autograd.grad(got, z)
    p, q = t.float().softmax(-1)[:counted], z.detach().float().softmax(-1)[:counted]
    want = (p * (p / q).log()).sum() / max(1, counted)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    whole = torch.zeros(999, 3)
    whole[:counted] = (q - p) / max(1, counted)
    torch.testing.assert_close(grad.float(), whole, rtol=2**-8, atol=1e-9)


def test_a_converted_model_learns_what_its_teacher_says():
    net, batch = llama()
    teacher = copy.deepcopy(net).train()
    m = method(q_rank=16, kv_rank=8, rope=4)
    m.lifecycle(net)
    tuned = burnish.tune(net, "full")
    tuned.optimizer(lr=3e-3)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    losses = [float(tuned.step(batch, loss=m.loss(teacher))) for _ in range(15)]
    assert losses[-1] < 0.3 * losses[0]
    assert teacher.training and all(torch.equal(p, before[n]) and p.grad is None
                                    for n, p in teacher.named_parameters())


def test_padding_does_not_count_and_the_model_s_own_loss_may():
    net, batch = llama()
    teacher = copy.deepcopy(net)
    m = method(q_rank=16, kv_rank=8, rope=4, kl=0.5, ce=2.0)
    m.lifecycle(net)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 6:] = 0
    batch = {**batch, "attention_mask": mask}
    out = net(**batch)
    p, q = (x.logits.softmax(-1) for x in (teacher(**batch), out))
    rows = (p * (p / q).log()).sum(-1)[:, :6]
    torch.testing.assert_close(m.loss(teacher)(out, batch), 0.5 * rows.mean() + 2 * out.loss)
    alone = method(kl=0.0, ce=1.0).loss(teacher)(out, batch)
    torch.testing.assert_close(alone, out.loss)
    other, _ = llama(vocab_size=48)
    with pytest.raises(burnish.DataError, match="another tokenizer"):
        m.loss(other)(out, {"input_ids": batch["input_ids"] % 48})


# -- shapes ---------------------------------------------------------------------------------------
def test_some_blocks_and_a_copy_of_the_same_shapes():
    net, batch = llama()
    old = copy.deepcopy(net)
    m = method(q_rank=16, kv_rank=8, rope=4, only=(1,))
    assert list(m.lifecycle(net)) == ["model.layers.1.self_attn"]
    assert isinstance(attention(net, 1), Latent)
    assert type(attention(net)) is type(attention(old))
    m.form(old)
    old.load_state_dict(net.state_dict())
    assert torch.equal(old(**batch).logits, net(**batch).logits)
    with torch.no_grad():
        torch.testing.assert_close(in_parts(net, batch["input_ids"])[0], net(**batch).logits)


def test_dropout_of_the_attention_is_kept():
    net, batch = tiny("llama", attention_dropout=0.5)
    net.config.attention_dropout = 0.5
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.5
    method(q_rank=16, kv_rank=8, rope=4).lifecycle(net)
    net.train()
    assert not torch.equal(net(**batch).logits, net(**batch).logits)
    net.eval()
    assert torch.equal(net(**batch).logits, net(**batch).logits)


@pytest.mark.parametrize("text, why", [
    ("x_ecomla(q_rank=0)", "at least 1"), ("x_ecomla(kv_rank=0)", "at least 1"),
    ("x_ecomla(rope=3)", "even rope"), ("x_ecomla(rope=0)", "even rope"),
    ("x_ecomla(spectrum=1.5)", "up to 1"), ("x_ecomla(kl=-1.0, ce=2.0)", "at least 0"),
    ("x_ecomla(spectrum=0.0)", "above 0"), ("x_ecomla(norm_power=0.5)", "at least 1"),
    ("x_ecomla(kl=0.0)", "not both 0"),
    ("x_ecomla(q_rank=8, kv_rank=8, spectrum=0.5)", "does nothing beside"),
    ("x_ecomla(targets='q')", "does nothing")])
def test_settings_that_cannot_act_are_refused(text, why):
    with pytest.raises(burnish.ConfigError, match=why):
        burnish.parse(text)


@pytest.mark.parametrize("model, kw, why", [
    ("bert", {}, "no attention of q_proj"), ("gpt2", {}, "no attention of q_proj"),
    ("mlp", {}, "no blocks"), ("llama", {"rope": 3 * 2}, "does not divide the width 8"),
    ("llama", {"rope": 4, "only": (5,)}, "there is no block 5")])
def test_models_it_refuses(model, kw, why):
    with pytest.raises(burnish.ConfigError, match=why):
        method(**kw).lifecycle(tiny(model)[0])


def test_what_is_joined_or_has_biases_is_refused():
    net, _ = llama(attention_bias=True)
    with pytest.raises(burnish.ConfigError, match="without biases"):
        method(rope=4).lifecycle(net)
    net, _ = llama()
    burnish.tune(net, "lora(rank=2)")
    with pytest.raises(burnish.ConfigError, match="merge or detach"):
        method(rope=4).lifecycle(net)
    with pytest.raises(burnish.ConfigError, match="give both"):
        method(rope=4).form(llama()[0])


def test_the_defaults():
    m = method()
    assert m.settings() == {
        "targets": None, "q_rank": None, "kv_rank": None, "spectrum": 0.95, "norm_power": 2.0,
        "rope": 32, "only": (), "kl": 1.0, "ce": 0.0}
    for least in ({"q_rank": 1, "kv_rank": 1, "rope": 2}, {"kl": 0.0, "ce": 0.5},
                  {"q_rank": 1, "spectrum": 1.0, "norm_power": 1.0}):
        assert method(**least).changed() == least
    assert latent_attention.MULTIPLE == 8 and converted.__doc__
