"""CALF: both branches by hand, the real shape, what stays when the textual one goes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.cross_modal import principal_words, shared_copy
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

SMALL = ("past=12, horizon=4, depth_kept=2, components=10, series_heads=4, rank=2")


def made(more="", model="gpt2", dtype=torch.float64, **kw):
    """(CALF, its model, the tuned handle, a batch), away from the start."""
    calf = parse(f"calf({SMALL}, {more or 'seed=0'})")[0]
    series = calf.lifecycle(tiny(model, dtype=dtype, **kw)[0])
    tuned = burnish.tune(series, calf.recipe(series), head=False)
    for p in tuned.parameters():
        p.data = p.data.to(dtype)
    g = torch.Generator().manual_seed(3)
    batch = {"past_values": 5 + 3 * torch.randn(3, 12, 5, generator=g, dtype=dtype),
             "future_values": torch.randn(3, 4, 5, generator=g, dtype=dtype)}
    return calf, series, stir(tuned, size=0.1), batch


# -- the equation ------------------------------------------------------------------------------
def attended(q, E, weight, bias, out_w, out_b, heads):
    """Attention of q to E, both its keys and values, head by head."""
    D = q.shape[-1]
    d = D // heads
    Q, K, V = (x @ weight[i * D:(i + 1) * D].T + bias[i * D:(i + 1) * D]
               for i, x in enumerate((q, E, E)))
    got = [(Q[..., h * d:(h + 1) * d] @ K[:, h * d:(h + 1) * d].T / d ** 0.5).softmax(-1)
           @ V[:, h * d:(h + 1) * d] for h in range(heads)]
    return torch.cat(got, -1) @ out_w.T + out_b


def blocks(x, p, heads, lora=None):
    """GPT-2's blocks with their after-norm, and every state; weights (in, out)."""
    x = x + p["wpe.weight"][:x.shape[1]]
    states = []
    for k in range(2):
        states.append(x)
        b = {n.removeprefix(f"h.{k}."): t for n, t in p.items() if n.startswith(f"h.{k}.")}
        D = x.shape[-1]
        h = F.layer_norm(x, (D,), b["ln_1.weight"], b["ln_1.bias"], 1e-5)
        W = b["attn.c_attn.weight"]
        if lora is not None:
            A, B = lora[k]
            W = W + (32.0 / 2) * (B @ A).T
        q, key, v = (h @ W + b["attn.c_attn.bias"]).split(D, -1)
        d, M = D // heads, x.shape[1]
        mask = torch.full((M, M), float("-inf"), dtype=x.dtype).triu(1)
        parts = [((q[..., i * d:(i + 1) * d] @ key[..., i * d:(i + 1) * d].mT) / d ** 0.5 + mask)
                 .softmax(-1) @ v[..., i * d:(i + 1) * d] for i in range(heads)]
        x = x + torch.cat(parts, -1) @ b["attn.c_proj.weight"] + b["attn.c_proj.bias"]
        h = F.layer_norm(x, (D,), b["ln_2.weight"], b["ln_2.bias"], 1e-5)
        h = F.gelu(h @ b["mlp.c_fc.weight"] + b["mlp.c_fc.bias"], approximate="tanh")
        x = x + h @ b["mlp.c_proj.weight"] + b["mlp.c_proj.bias"]
    x = F.layer_norm(x, (x.shape[-1],), p["ln_f.weight"], p["ln_f.bias"], 1e-5)
    return x, [*states, x]


def by_hand(own, frozen, E, batch, consistency, feature, decay):
    """(the loss, (B, H, M)) of what trains (`own`, by name) and what does not."""
    p = {**frozen, **own}
    x, y = batch["past_values"], batch["future_values"]
    mean = x.sum(1, keepdim=True) / 12
    std = ((x - mean).square().sum(1, keepdim=True) / 12 + 1e-5).sqrt()
    z = ((x - mean) / std).mT @ p["embed.weight"].T + p["embed.bias"]
    D = z.shape[-1]
    w, b = p["mix.self_attn.in_proj_weight"], p["mix.self_attn.in_proj_bias"]
    rows = [attended(r, r, w, b, p["mix.self_attn.out_proj.weight"],
                     p["mix.self_attn.out_proj.bias"], 4) for r in z]
    z = F.layer_norm(z + torch.stack(rows), (D,), p["mix.norm1.weight"], p["mix.norm1.bias"])
    f = (z @ p["mix.linear1.weight"].T + p["mix.linear1.bias"]).relu()
    z = F.layer_norm(z + f @ p["mix.linear2.weight"].T + p["mix.linear2.bias"], (D,),
                     p["mix.norm2.weight"], p["mix.norm2.bias"])
    t = torch.stack([attended(r, E, p["attend.in_proj_weight"], p["attend.in_proj_bias"],
                              p["attend.out_proj.weight"], p["attend.out_proj.bias"], 4)
                     for r in z])
    body = {n[5:]: v for n, v in p.items() if n.startswith("body.")}
    lora = [[body[f"h.{k}.attn.c_attn.burnish.default.lora.{a}"] for a in "AB"] for k in range(2)]
    h, states = blocks(z, body, 4, lora)
    base = {n[5:]: v for n, v in frozen.items() if n.startswith("body.")}
    g, others = blocks(t, base | {"wpe.weight": p["text_positions.0"]}, 4)
    said, other = (((s + r) @ p["out.weight"].T + p["out.bias"]).mT * std + mean
                   for s, r in ((h, z), (g, t)))
    loss = (said - y).abs().mean() + consistency * (said - other).abs().mean()
    for k, (a, c) in enumerate(zip(states, others, strict=True)):
        far = a @ p[f"time_states.{k}.weight"].T - c @ p[f"text_states.{k}.weight"].T
        loss = loss + feature * decay ** (2 - k) * far.abs().mean()
    return loss, said


@pytest.mark.parametrize("consistency, feature, decay", [(1.0, 0.01, 0.8), (0.3, 0.7, 0.5),
                                                        (0.0, 2.0, 1.0)])
def test_loss_and_every_gradient_are_the_equations(consistency, feature, decay):
    more = f"dropout=0.0, consistency={consistency}, feature={feature}, decay={decay}"
    _, series, tuned, batch = made(more)
    frozen = {n: p.detach().clone() for n, p in series.named_parameters()}
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():                             # the textual branch's norms are its own
        for p in series.text_norms:
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    for n, p in zip([m for m, _ in series.body.named_parameters() if "ln_" in m],
                    series.text_norms, strict=True):
        frozen[f"body.{n}"] = p.detach().clone()
    own = {n: p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}
    want, said = by_hand(own, frozen, series.words, batch, consistency, feature, decay)
    got = series(**batch)
    torch.testing.assert_close(got.loss, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.prediction_outputs, said, rtol=1e-9, atol=1e-10)
    grads = torch.autograd.grad(want, list(own.values()), allow_unused=True)
    got.loss.backward()
    for (n, p), g in zip(tuned.named_parameters(), grads, strict=True):
        g = torch.zeros_like(p) if g is None else g
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, g,
                                   rtol=1e-7, atol=1e-10, msg=n)
    if consistency:
        assert dict(tuned.named_parameters())["attend.in_proj_weight"].grad.abs().max() > 0
        assert dict(tuned.named_parameters())["text_positions.0"].grad.abs().max() > 0


def test_the_last_states_term_counts_once_whatever_the_decay():
    losses = {}
    for decay in (1.0, 1e-9):
        _, series, _, batch = made(f"dropout=0.0, consistency=0.0, feature=1.0, decay={decay}")
        losses[decay] = float(series(**batch).loss.detach())
    _, series, _, batch = made("dropout=0.0, consistency=0.0, feature=0.0")
    plain = float(series(**batch).loss.detach())
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out))
             for m in (series.time_states[2], series.text_states[2])]
    series(**batch)
    for h in hooks:
        h.remove()
    last = float((seen[0] - seen[1]).detach().abs().mean())
    assert losses[1e-9] == pytest.approx(plain + last, rel=1e-6) and losses[1.0] > losses[1e-9]


def test_answers_do_without_the_textual_branch():
    _, series, _, batch = made()
    series.eval()
    before = series(batch["past_values"]).prediction_outputs
    assert series(**batch).loss == F.l1_loss(before, batch["future_values"])
    series._text = (None,)
    series.words = None
    del series.attend, series.text_states, series.time_states, series.text_positions
    assert torch.equal(series(batch["past_values"]).prediction_outputs, before)
    assert series(batch["past_values"]).loss is None


# -- counts --------------------------------------------------------------------------------------
def test_counts_on_gpt2():
    """6 . 8 (768 + 2304) of LoRA, 14 . 768^2 of projections, 1024 . 768 positions a branch."""
    net = tiny("gpt2", meta=True, n_embd=768, n_layer=12, n_head=12, n_positions=1024,
               vocab_size=50257)[0]
    calf = parse("calf")[0]
    series = calf.lifecycle(net)
    lora, as_is = parse(calf.recipe(series))
    anatomy = Anatomy.of(series)
    places = [p for p in anatomy.places if p.path in lora.targets.split(",")]
    assert len(places) == 6 and sum(lora.count(p) for p in places) == 147_456
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 32.0, 0.1)
    trains = {n: series.get_parameter(n).numel() for n in (s.name for s in as_is.select(anatomy))}

    def count(*starts):
        return sum(v for n, v in trains.items() if n.startswith(starts))

    assert count("time_states", "text_states") == 8_257_536
    assert trains["body.wpe.weight"] == trains["text_positions.0"] == 786_432
    assert sum(v for n, v in trains.items() if "ln_" in n) == 13 * 2 * 768
    assert count("embed") == 97 * 768 and count("out") == 96 * 769
    assert count("attend") == 4 * 768 * 769
    assert count("mix") == 4 * 768 * 769 + 2 * 768 * 2048 + 2048 + 768 + 4 * 768
    assert sum(trains.values()) == 13 * 2 * 768 + count("body.wpe", "text_", "time_", "embed",
                                                       "out", "attend", "mix")
    assert series.words.shape == (500, 768)


# -- its parts -------------------------------------------------------------------------------
def test_principal_words():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(40, 6, generator=g, dtype=torch.float64) + 2
    X = table.T - table.T.mean(0)                     # the widths are the rows, words the columns
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    got = principal_words(table, 4)
    for k in range(4):
        want = X @ Vh[k]
        assert torch.allclose(got[k], want, atol=1e-10) or torch.allclose(got[k], -want, atol=1e-10)
        assert got[k].abs().max() == got[k].max()
    assert principal_words(table.float(), 4).dtype == torch.float32


def test_frozen_weights_are_held_once_and_survive_a_copy():
    _, series, tuned, batch = made("dropout=0.0")
    text = series._text[0]
    assert text.h[0].attn.c_attn.weight is series.body.h[0].attn.c_attn.weight
    assert text.h[0].ln_1.weight is not series.body.h[0].ln_1.weight
    assert text.h[0].ln_1.weight is series.text_norms[0] and text.wpe.weight is \
        series.text_positions[0]
    assert not any("_text" in n for n, _ in series.named_parameters())
    twin = copy.deepcopy(series)
    assert twin._text[0].h[1].mlp.c_fc.weight is twin.body.h[1].mlp.c_fc.weight
    assert torch.equal(twin(**batch).loss, series(**batch).loss)
    series.eval()
    assert not text.training and series.train().training and text.training
    assert "words" not in series.state_dict()
    net = tiny("gpt2")[0]
    two = shared_copy(net, [])
    assert two is not net and all(a is b for a, b in zip(two.parameters(), net.parameters(),
                                                        strict=True))


def test_a_base_stays_as_it_is_and_others_than_gpt2_serve():
    net, _ = tiny("llama")
    was = {n: p.clone() for n, p in net.named_parameters()}
    calf = parse(f"calf({SMALL})")[0]
    series = calf.lifecycle(net)
    assert len(net.model.layers) == 2 and not list(series.text_positions)   # rotary: no table
    tuned = burnish.tune(series, calf.recipe(series), head=False)
    assert calf.recipe(series).count("_proj") == 6
    tuned.optimizer(lr=1e-3)
    tuned.step({"past_values": torch.randn(2, 12, 3), "future_values": torch.randn(2, 4, 3)})
    assert all(torch.equal(p, was[n]) for n, p in net.named_parameters())
    one = calf.lifecycle(tiny("llama")[0])
    assert torch.equal(one.out.weight, calf.lifecycle(tiny("llama")[0]).out.weight)
    other = parse(f"calf({SMALL}, seed=1)")[0].lifecycle(tiny("llama")[0])
    assert not torch.equal(one.out.weight, other.out.weight)


def test_projections_learn_at_a_fifth_of_the_rate():
    _, series, tuned, _ = made(dtype=torch.float32)
    optimizer = tuned.optimizer(lr=5e-4)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(series.time_states[0].weight)] == pytest.approx(1e-4)
    assert rates[id(series.text_states[2].weight)] == pytest.approx(1e-4)
    assert rates[id(series.out.weight)] == rates[id(series.text_positions[0])] == 5e-4


# -- a run ---------------------------------------------------------------------------------------
def waves(count, seed):
    g = torch.Generator().manual_seed(seed)
    at = torch.arange(16.0)[None, :, None] + 40 * torch.rand(count, 1, 1, generator=g)
    x = torch.sin(at / torch.tensor([1.5, 2.0, 2.5])) * 3 + torch.tensor([0.0, 5.0, -2.0])
    return {"past_values": x[:, :12], "future_values": x[:, 12:]}


def test_it_learns_merges_and_is_saved(tmp_path):
    calf = parse(f"calf({SMALL}, dropout=0.0)")[0]
    series = calf.lifecycle(tiny("gpt2")[0])
    tuned = burnish.tune(series, calf.recipe(series), head=False)
    tuned.optimizer(lr=1e-2)
    test = waves(64, 1)

    def error():
        series.eval()
        with torch.no_grad():
            said = float(series(**test).loss)
        series.train()
        return said

    before = error()
    for k in range(100):
        tuned.step(waves(32, 10 + k))
    assert error() < 0.5 * before
    said = series.eval()(test["past_values"]).prediction_outputs.detach()
    tuned.save(tmp_path)
    again = burnish.load(calf.lifecycle(tiny("gpt2")[0]), tmp_path).model.eval()
    torch.testing.assert_close(again(test["past_values"]).prediction_outputs, said)
    plain = tuned.merge()
    torch.testing.assert_close(plain(test["past_values"]).prediction_outputs, said, rtol=1e-4,
                               atol=1e-4)


@pytest.mark.parametrize("how, said", [
    ("past=0", "at least 1"), ("rank=0", "at least 1"), ("decay=0.0", "decay in"),
    ("decay=1.5", "decay in"), ("dropout=1.0", "dropout in"), ("feature=-1.0", "0 or more"),
    ("targets='q'", "does nothing")])
def test_settings_that_are_no_use(how, said):
    with pytest.raises((ConfigError, RecipeError), match=said):
        parse(f"calf({how})")


def test_bases_that_are_no_use():
    for more, model, said in ((f"{SMALL}, components=33", "gpt2", "at most 32 components"),
                              ("past=2, horizon=2, components=3, depth_kept=2, series_heads=5",
                               "gpt2", "series_heads divide 32"),
                              ("depth_kept=3", "gpt2", "depth_kept=3 of a model of 2 blocks"),
                              (SMALL, "cnn", "a causal language model"),
                              (SMALL, "t5", "a causal language model")):
        more = more.replace("components=10, ", "") if "components=33" in more else more
        with pytest.raises(ConfigError, match=said):
            parse(f"calf({more})")[0].lifecycle(tiny(model)[0])
    tuned = burnish.tune(tiny("gpt2")[0], "lora(rank=2)")
    with pytest.raises(ConfigError, match="has an adapter"):
        parse(f"calf({SMALL})")[0].lifecycle(tuned)


def test_defaults():
    m = parse("calf")[0]
    assert (m.past, m.horizon, m.depth_kept, m.components, m.series_heads) == (96, 96, 6, 500, 12)
    assert (m.rank, m.alpha, m.dropout, m.consistency, m.feature, m.decay) == \
        (8, 32.0, 0.1, 1.0, 0.01, 0.8)
    assert not m.merges                               # a new model, for the base's own form none
    assert parse("calf(past=1, horizon=1, depth_kept=1, components=1, series_heads=1, rank=1)")
