"""Scatterbrain: exact near a token, estimated elsewhere, in real models by their own attention."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state import scattered as module
from burnish.blocks.state.scattered import Scattered, features, scattered, seen
from burnish.blocks.update.noise import CounterNoise
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.testing import tiny

B, H, D = 2, 3, 8


def drawn(T, M=6, seed=0, size=0.8):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, T, D, generator=g, dtype=torch.float64) * size for _ in range(3))
    return q, k, v, torch.randn(M, D, generator=g, dtype=torch.float64)


def near(T, w, causal):
    """Which keys a token sees exactly, and which at all."""
    at = torch.arange(T) // w
    apart = at[:, None] - at[None, :]
    order = torch.ones(T, T, dtype=torch.bool).tril() if causal else \
        torch.ones(T, T, dtype=torch.bool)
    return (apart.abs() <= 1) & order, order


def dense(q, k, v, omega, w, scale, causal=False, valid=None):
    """T x T, written out."""
    T = q.shape[-2]

    def phi(x):
        wx = x @ omega.t() * scale**0.5
        wx = torch.cat([wx, -wx], -1)
        return torch.exp(wx - scale * (x * x).sum(-1, keepdim=True) / 2) / (2 * len(omega))**0.5

    exact, order = near(T, w, causal)
    E = torch.where(exact, torch.exp(scale * q @ k.transpose(-1, -2)),
                    phi(q) @ phi(k).transpose(-1, -2)) * order
    if valid is not None:
        E = E * valid[:, None, None, :]
    return E @ v / E.sum(-1, keepdim=True).clamp_min(1e-300)    # a padded query may see none


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [12, 14, 17])
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients_are_those_of_the_equation(T, causal, padded):
    q, k, v, omega = drawn(T)
    valid = None
    if padded:
        valid = torch.ones(B, T, dtype=torch.bool)
        valid[0, -5:] = False
    leaves = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2)]
    got = scattered(*leaves[0], omega, 3, 0.3, causal, valid)
    want = dense(*leaves[1], omega, 3, 0.3, causal, valid)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves[0], g), torch.autograd.grad(want, leaves[1], g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_where_all_is_near_it_is_the_softmax(causal):
    for T, w in ((10, 5), (10, 7), (4, 4), (3, 8)):
        q, k, v, omega = drawn(T)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.4)
        got = scattered(q, k, v, omega, w, 0.4, causal)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_the_features_estimate_the_kernel_without_bias():
    """And better with more of them: the error falls as the root of their number."""
    q, k, _, _ = drawn(1, size=0.6)
    want = (0.3 * q @ k.transpose(-1, -2)).exp().flatten()
    errors = []
    for M in (16, 256):
        est = torch.stack([(features(q, o, 0.3).exp() * features(k, o, 0.3).exp()).sum(-1).flatten()
                           for s in range(300) for o in [drawn(1, M, 1000 * M + s)[3]]])
        off = (est.mean(0) - want) / (est.std(0) / 300**0.5)
        assert off.abs().max() < 4
        errors.append(float((est - want).std()))
    assert 2.5 < errors[0] / errors[1] < 6


def test_it_errs_less_than_either_part_alone():
    q, k, v, _ = drawn(48, size=1.2)
    want = F.scaled_dot_product_attention(q, k, v, scale=0.35)
    both, local, low = [], [], []
    exact, _ = near(48, 4, False)
    for s in range(5):
        omega = drawn(1, 64, s)[3]
        both.append(float((scattered(q, k, v, omega, 4, 0.35) - want).square().mean()))
        E = features(q, omega, 0.35).exp() @ features(k, omega, 0.35).exp().transpose(-1, -2)
        low.append(float((E @ v / E.sum(-1, keepdim=True) - want).square().mean()))
        S = (0.35 * q @ k.transpose(-1, -2)).exp() * exact
        local.append(float((S @ v / S.sum(-1, keepdim=True) - want).square().mean()))
    assert sum(both) < min(sum(local), sum(low))


def test_large_exponents_and_padding_of_a_whole_sample_stay_numbers():
    q, k, v, omega = drawn(12)
    q, k = (q * 30).float().requires_grad_(), (k * 30).float().requires_grad_()
    valid = torch.ones(B, 12, dtype=torch.bool)
    valid[1] = False
    out = scattered(q, k, v.float(), omega, 3, 0.35, True, valid)
    assert out.isfinite().all() and out.dtype == torch.float32
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), [q, k]))
    half = scattered(q.bfloat16(), k.bfloat16(), v.bfloat16(), omega, 3, 0.35)
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_dropout_acts_on_the_exact_part():
    q, k, v, omega = drawn(15)
    torch.manual_seed(0)
    outs = torch.stack([scattered(q, k, v, omega, 3, 0.3, p=0.3) for _ in range(400)])
    want = scattered(q, k, v, omega, 3, 0.3)
    assert float((outs.mean(0) - want).abs().max()) < 6 * float(outs.std(0).max()) / 20
    gone = scattered(q, k, v, omega, 3, 0.3, p=0.9999999)
    E, (exact, _) = (features(q, omega, 0.3).exp()
                     @ features(k, omega, 0.3).exp().transpose(-1, -2)), near(15, 3, False)
    S = torch.where(exact, (0.3 * q @ k.transpose(-1, -2)).exp(), E)
    torch.testing.assert_close(gone, (E * ~exact) @ v / S.sum(-1, keepdim=True), rtol=1e-6,
                               atol=1e-8)
    torch.manual_seed(0)
    near_only = scattered(q[..., :6, :], k[..., :6, :], v[..., :6, :], omega, 3, 0.3, p=0.3)
    assert not torch.equal(near_only, scattered(q[..., :6, :], k[..., :6, :], v[..., :6, :],
                                                omega, 3, 0.3))


def test_what_is_kept_grows_with_tokens_not_with_their_square():
    sizes = []
    for T in (64, 128, 256):
        q, k, v, omega = (t.float().requires_grad_() for t in drawn(T))
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.setdefault(t.untyped_storage().data_ptr(), t) is None
                or t, lambda t: t):
            scattered(q, k, v, omega.detach(), 8, 0.3)
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    assert sizes[1] < 2.2 * sizes[0] and sizes[2] < 2.2 * sizes[1]


# -- in models -------------------------------------------------------------------------------------
LONG = {"llama": 40, "bert": 40, "vit": None}


def made(model, settings="window=4, features=5", more="lora(rank=2) + ", **kw):
    torch.manual_seed(0)
    if model == "vit":
        net, batch = tiny("vit", image_size=32, patch_size=4, **kw)
        batch["pixel_values"] = torch.randn(2, 3, 32, 32)
    else:
        net, batch = tiny(model, max_position_embeddings=64, **kw)
        T = LONG[model]
        batch["input_ids"] = torch.randint(3, 50, (2, T))
        batch.pop("token_type_ids", None)
        batch["attention_mask"] = torch.ones(2, T, dtype=torch.long)
        if model == "llama":
            batch["labels"] = batch["input_ids"]
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, f"{more}scatterbrain({settings})", head=False)
    return tuned, batch, base


class Stock(torch.overrides.TorchFunctionMode):
    """The equation in the place of the function that models call."""

    def __init__(self, paths, M, w, causal, valid, seed=0):
        super().__init__()
        self.paths, self.at, self.how = list(paths), 0, (M, w, causal, valid, seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        M, w, causal, valid, seed = self.how
        q, k, v = args[:3]
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        noise = CounterNoise(seed, f"scatterbrain/{self.paths[self.at]}")
        self.at += 1
        omega = noise.normal(M * q.shape[-1]).view(M, -1).to(q)
        return dense(q, k, v, omega, w, q.shape[-1]**-0.5, causal, valid)


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
    paths = [b.attn for b in tuned.anatomy.blocks]
    tuned.model.eval(), base.eval()
    got = tuned.model(**batch).logits
    with Stock(paths, 5, 4, model == "llama", valid):
        want = base(**batch).logits
    if valid is not None and got.dim() == 3:
        got, want = got[valid], want[valid]
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(got, base(**batch).logits[valid] if valid is not None
                              and base(**batch).logits.dim() == 3 else base(**batch).logits)


def test_grouped_queries():
    tuned, batch, base = made("llama", dtype=torch.float64, num_attention_heads=4,
                              num_key_value_heads=2)
    tuned.model.eval(), base.eval()
    with Stock([b.attn for b in tuned.anatomy.blocks], 5, 4, True, None):
        want = base(**batch).logits
    torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-8, atol=1e-9)


def test_short_sequences_are_the_models_own_and_so_is_a_cache():
    tuned, batch, base = made("llama", "window=20")
    tuned.model.eval(), base.eval()
    assert torch.equal(tuned.model(**batch).logits, base(**batch).logits)
    tuned, batch, base = made("llama")
    tuned.model.eval(), base.eval()
    short = {"input_ids": batch["input_ids"][:, :6]}
    kw = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(tuned.model.generate(**short, **kw), base.generate(**short, **kw))


def test_it_trains_and_blocks_that_run_again_draw_the_same():
    grads = []
    for more in ("", "checkpoint + "):
        tuned, batch, _ = made("llama", "window=4, features=5, redraw=True",
                               more=f"lora(rank=2) + {more}")
        tuned.optimizer(lr=1e-2)
        first = float(tuned.step(batch))
        tuned.step(batch)
        grads.append({n: p.grad.clone() for n, p in tuned.named_parameters()})
        assert float(tuned.step(batch)) != first
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-4, atol=1e-7)


def test_redraw_draws_in_every_update_and_goes_on_after_a_resume():
    tuned, batch, _ = made("llama", "window=4, features=5, redraw=True")
    mine = [m for m in tuned.model.modules() if isinstance(m, Scattered)]
    tuned.optimizer(lr=0.0)
    losses = [float(tuned.step(batch)) for _ in range(3)]
    assert len(set(losses)) == 3 and [m.turn for m in mine] == [3, 3]
    kept = copy.deepcopy(tuned.timeline.state())
    other, _, _ = made("llama", "window=4, features=5, redraw=True")
    other.optimizer(lr=0.0)
    other.timeline.load(kept)
    assert float(other.step(batch)) == float(tuned.step(batch))
    plain, batch, _ = made("llama")
    plain.optimizer(lr=0.0)
    assert len({float(plain.step(batch)) for _ in range(3)}) == 1


def test_each_setting_acts_on_long_sequences():
    found = set()
    for settings in ("window=4, features=5", "window=5, features=5", "window=4, features=6",
                     "window=4, features=5, seed=1", "window=4"):
        tuned, batch, _ = made("bert", settings)
        tuned.model.eval()
        found.add(float(tuned.model(**batch).logits.detach().sum()))
    assert len(found) == 5
    listener = Scattered(None, "a", CounterNoise(0, "x"), 0, 4)
    assert listener.omega(64, torch.device("cpu")).shape == (round(64 * math.log(64)), 64)
    assert listener.omega(1, torch.device("cpu")).shape == (1, 1)
    assert not torch.equal(Scattered(None, "a", CounterNoise(0, "x"), 2, 4).omega(4, "cpu"),
                           Scattered(None, "a", CounterNoise(0, "y"), 2, 4).omega(4, "cpu"))


def test_a_call_has_its_own_scale_and_two_windows_are_exact():
    listener = Scattered(None, "a", CounterNoise(0, "x"), 6, 3)
    q, k, v, _ = drawn(7)
    omega = listener.omega(D, q.device).double()
    for scale in (None, 0.2):
        got = listener.attend(nn.Identity(), F.scaled_dot_product_attention, (q, k, v),
                              {"scale": scale})
        torch.testing.assert_close(got, dense(q, k, v, omega, 3, scale or D**-0.5))
    q, k, v, _ = drawn(6)
    got = listener.attend(nn.Identity(), F.scaled_dot_product_attention, (q, k, v), {})
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))


def test_autocast_keeps_out_of_it():
    listener = Scattered(None, "a", CounterNoise(0, "x"), 6, 3)
    q, k, v, _ = drawn(12)
    want = dense(q, k, v, listener.omega(D, q.device).double(), 3, D**-0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = listener.attend(nn.Identity(), F.scaled_dot_product_attention,
                              (q.float(), k.float(), v.float()), {})
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_where_all_is_near_no_features_are_made(monkeypatch):
    made = []
    monkeypatch.setattr(module, "features", lambda x, *a: made.append(1) or features(x, *a))
    for T, n in ((6, 0), (7, 2)):
        q, k, v, omega = drawn(T)
        scattered(q, k, v, omega, 3, 0.3)
        assert len(made) == n


def test_it_is_an_approximation_that_no_weight_holds():
    tuned, batch, base = made("bert")
    tuned.model.eval(), base.eval()
    assert not torch.equal(tuned.model(**batch).logits, base(**batch).logits)
    with pytest.raises(burnish.BurnishError, match="scatterbrain"):
        tuned.merge()
    method = parse("scatterbrain")[0]
    assert not method.identity and not method.merges


# -- masks and refusals ----------------------------------------------------------------------------
def test_masks_of_padding_and_order_are_followed_and_others_refused():
    T = 6
    valid = torch.ones(2, T, dtype=torch.bool)
    valid[0, 4:] = False
    plain = valid[:, None, None, :].expand(2, 1, T, T)
    order = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(seen(plain, False, valid, T), valid)
    assert torch.equal(seen(plain & order, True, valid, T), valid)
    added = torch.zeros(2, 1, T, T).masked_fill(~(plain & order), torch.finfo(torch.float32).min)
    assert torch.equal(seen(added, True, valid, T), valid)
    assert seen(order[None, None], True, None, T) is None
    assert seen(order[None, None].to("meta"), True, None, T) is None
    assert torch.equal(seen(order[None, None].to("meta"), True, valid, T), valid)
    band = order & ~torch.ones(T, T, dtype=torch.bool).tril(-3)
    for mask, causal, who in ((band[None, None], True, None), (order[None, None], False, None),
                              (plain, True, valid), (plain, False, None),
                              (added + 0.1, True, valid)):
        with pytest.raises(RecipeError, match="^scatterbrain: this model masks attention"):
            seen(mask, causal, who, T)


def test_refusals_and_defaults():
    assert parse("scatterbrain")[0].settings() == {
        "targets": None, "window": 64, "features": 0, "redraw": False, "seed": 0}
    for text in ("window=0", "features=-1"):
        with pytest.raises(RecipeError, match="^scatterbrain: window is at least 1"):
            parse(f"scatterbrain({text})")
    assert parse("scatterbrain(window=1, features=1)")
    with pytest.raises(RecipeError, match="how attention is computed"):
        parse("scatterbrain + scatterbrain(seed=1)")
    with pytest.raises(RecipeError, match="is an nn.MultiheadAttention"):
        burnish.tune(tiny("encoder")[0], "lora(rank=2) + scatterbrain", head=False)
    net, _ = tiny("bert")
    net.set_attn_implementation("eager")
    with pytest.raises(RecipeError, match="attn_implementation='sdpa'"):
        burnish.tune(net, "lora(rank=2) + scatterbrain", head=False)
    tuned, batch, _ = made("llama")
    tuned.model.set_attn_implementation("eager")
    with pytest.raises(RecipeError, match="without F.scaled_dot_product_attention"):
        tuned.model(**batch)
    with pytest.raises(burnish.BurnishError):
        burnish.tune(nn.Sequential(nn.Linear(3, 2)), "full + scatterbrain")
    assert module.NOTHING < -1e29
