"""Prefix tuning: attention with rows before keys and values, written out in float64."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.keys_values import KeysValues, OwnMass
from burnish.core.recipe import parse
from burnish.methods.prompt._stacks import key_width
from burnish.testing import stir
from burnish.testing.models import tiny


def attention(q, k, v, P_k, P_v, mask, causal, scale):
    """softmax(q [P_k; K]^T) [P_v; V] by explicit sums, head by head; the rows see no mask."""
    h = q.shape[-1]
    own = P_k.shape[-1] // h
    P_k, P_v = (P.unflatten(-1, (own, h)).transpose(-3, -2).expand(len(q), -1, -1, -1)
                for P in (P_k, P_v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    P_k, P_v = (t.repeat_interleave(q.shape[1] // own, 1) for t in (P_k, P_v))
    scale = 1 / math.sqrt(h) if scale is None else scale
    real = scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if causal:
        real = real.masked_fill(~torch.ones_like(real, dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        real = real.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else real + mask
    rows = scale * torch.einsum("bhqd,bhkd->bhqk", q, P_k)
    most = torch.cat([rows, real], -1).max(-1, keepdim=True).values
    e_rows, e_real = (rows - most).exp(), (real - most).exp()
    total = e_rows.sum(-1, keepdim=True) + e_real.sum(-1, keepdim=True)
    return (torch.einsum("bhqk,bhkd->bhqd", e_rows, P_v)
            + torch.einsum("bhqk,bhkd->bhqd", e_real, v)) / total


def stock(one, monkeypatch, rows, batch=None):
    """Logits of the base whose attentions, in the order of their calls, take these rows."""
    calls = iter(rows)

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        assert not dropout_p
        return attention(q, k, v, *next(calls), attn_mask, is_causal, scale)

    with monkeypatch.context() as m:
        m.setattr(F, "scaled_dot_product_attention", sdpa)
        out = one.base(**(batch or one.batch)).logits
    assert next(calls, None) is None, "every attention was met"
    return out


@pytest.mark.parametrize("model", ["vit", "timm_qkv", "llama", "gpt2", "bert"])
def test_the_equation_written_out(beside, monkeypatch, model):                 # findings 6
    """K' = [P_k; K], V' = [P_v; V] in every attention; grouped queries, causal and padded too."""
    one = beside(model, "prefix(length=3)")
    rows = [p for _, p in one.at("rows")]
    assert len(rows) == len(one.theta) == 2 and rows[0].shape[:2] == (2, 3)
    if model in ("llama", "bert"):
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        one.batch["attention_mask"][1, -2:] = 0
    one.agree(stock(one, monkeypatch, rows))


@pytest.mark.parametrize("model", ["vit", "llama", "gpt2", "bert"])
def test_a_prefix_that_nobody_may_see_leaves_the_base(monkeypatch, model):
    """The first `length` keys masked: rows that are far from nought then change no number."""
    net, batch = tiny(model, dtype=torch.float64)
    net.eval()
    if "attention_mask" in batch or model in ("llama", "bert"):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, -2:] = 0
    want = net(**batch).logits
    tuned = burnish.tune(net, "prefix(length=3)", head=False)
    stir(tuned, size=1.0)
    net.eval()
    assert not torch.allclose(net(**batch).logits, want, rtol=1e-2)
    attend, met = KeysValues.attend, []

    def unseen(bank, func, args, kwargs):
        def run(q, k, v, attn_mask=None, is_causal=False, **kw):
            open_ = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
            if is_causal:
                open_ = open_.masked_fill(~torch.ones_like(open_, dtype=torch.bool).tril(),
                                          -math.inf)
            if attn_mask is not None:
                open_ = open_.masked_fill(~attn_mask, -math.inf) \
                    if attn_mask.dtype == torch.bool else open_ + attn_mask
            open_ = open_.clone()
            open_[..., :3] = -math.inf
            met.append(k.shape[-2])
            return func(q, k, v, attn_mask=open_, **kw)
        return attend(bank, run, args, kwargs)

    monkeypatch.setattr(KeysValues, "attend", unseen)
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-11, atol=1e-13)
    assert len(met) == 2 and tuned is not None


@pytest.mark.parametrize("model", ["vit", "gpt2"])
def test_rows_made_by_an_mlp(beside, monkeypatch, model):                      # findings 6
    """P_l = up_l tanh(W P' + b), P', W and b shared by all layers: 2 H h numbers per row."""
    one = beside(model, "prefix(length=3, hidden=5)")
    (where, P), = one.at("trunk.rows")
    (_, W), = one.at("trunk.down.weight")
    (_, b), = one.at("trunk.down.bias")
    shared = torch.tanh(P @ W.t() + b)
    rows = []
    for (_, U), (_, c) in zip(one.at("up.weight"), one.at("up.bias"), strict=True):
        made = shared @ U.t() + c
        rows.append((made[:, :32], made[:, 32:]))
    assert P.shape == (3, 32) and W.shape == (5, 32) and len(rows) == 2 and where
    one.agree(stock(one, monkeypatch, rows))


def test_multi_head_attention_of_torch(beside):                                # findings 6
    """nn.MultiheadAttention: q, k, v by its own matrices, rows before keys and values."""
    one = beside("encoder", "prefix(length=3)")
    rows = dict(one.at("rows"))
    assert len(rows) == 2
    for path, P in rows.items():
        attn = one.base.get_submodule(path)

        def forward(query, key, value, attn=attn, P=P, **kw):
            assert kw.get("attn_mask") is None and kw.get("key_padding_mask") is None
            x = query if attn.batch_first else query.transpose(0, 1)
            B, N, D = x.shape
            q, k, v = (t.view(B, N, attn.num_heads, -1).transpose(1, 2) for t in
                       (x @ attn.in_proj_weight.t() + attn.in_proj_bias).chunk(3, -1))
            y = attention(q, k, v, P[0], P[1], None, False, None).transpose(1, 2).reshape(B, N, D)
            y = y @ attn.out_proj.weight.t() + attn.out_proj.bias
            return (y if attn.batch_first else y.transpose(0, 1)), None

        attn.forward = forward
    for m in (one.base, one.tuned.model):
        m.train()                                 # in eval torch takes a fused path of its own
    one.agree()


def test_it_is_a_gated_sum():
    """(1 - l) Attn(K, V) + l softmax(q P_k^T) P_v, l the share of the rows."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 4, generator=g, dtype=torch.float64) for _ in range(3))
    P_k, P_v = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    rows, real = (torch.exp(q @ t.transpose(-1, -2) / 2) for t in (P_k, k))
    share = rows.sum(-1, keepdim=True) / (rows.sum(-1, keepdim=True) + real.sum(-1, keepdim=True))
    want = (1 - share) * torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v \
        + share * torch.softmax(q @ P_k.t() / 2, -1) @ P_v
    torch.testing.assert_close(attention(q, k, v, P_k, P_v, None, False, None), want)
    bank = KeysValues(None, "default", 3, 4).double()
    bank.rows.data = torch.stack([P_k, P_v])
    got = bank.attend(F.scaled_dot_product_attention, (q, k, v), {})
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("recipe", ["prefix(length=500)", "prefix(length=500, hidden=4)"])
def test_the_start(recipe):
    """Rows N(0, 0.02^2); with an MLP P' is normal."""
    tuned = burnish.tune(tiny("vit")[0], recipe, head=False)
    rows = next(p for n, p in tuned.named_parameters() if n.endswith("rows")).detach()
    spread = 1.0 if "hidden" in recipe else 0.02
    assert float(rows.std()) == pytest.approx(spread, rel=0.03)
    assert abs(float(rows.mean())) < 0.05 * spread


def test_keys_narrower_than_the_state_and_cross_attention():
    """One bank per attention, as wide as its keys, in the order of the blocks."""
    sites = {"qwen_moe": 16, "mixtral": 16, "whisper": 32}
    for model, width in sites.items():
        net = tiny(model)[0]
        attentions = [n for n, m in net.named_modules()
                      if n.endswith(("self_attn", "encoder_attn"))]
        banks = {n: m for n, m in burnish.tune(net, "prefix(length=2)").model.named_modules()
                 if isinstance(m, KeysValues)}
        assert [n.partition(".burnish")[0] for n in banks] == attentions
        assert all(m.width == width for m in banks.values())


def test_the_mlp_reads_the_width_of_the_model(beside):
    """P' is as wide as the state, the rows as the keys: under grouped queries they differ."""
    one = beside("llama", "prefix(length=1, hidden=5)")
    ((_, P),) = one.at("trunk.rows")
    assert P.shape == (1, 32) and {U.shape for _, U in one.at("up.weight")} == {(32, 5)}


def test_blocks_of_different_widths():
    """Each attention has rows of its own width, whatever the other blocks hold."""
    tuned = burnish.tune(tiny("swin")[0], "prefix(length=2)", head=False)
    assert [tuple(p.shape) for p in tuned.parameters()] == [(2, 2, 16), (2, 2, 16), (2, 2, 32)]


def test_keys_of_a_fused_weight_that_interleaves_its_heads():
    """out = (heads + 2 kv) h numbers, of which kv h are keys; without heads nothing can be said."""
    place = SimpleNamespace(block=3, role="qkv", out=96, rows=None)
    first = SimpleNamespace(block=3, role="fc1", out=7, rows=None)
    anatomy = SimpleNamespace(places=[first, place], slices=lambda p: [])
    block = SimpleNamespace(heads=4, kv_heads=2, path="layers.3")
    assert key_width(anatomy, 3, block, "") == 24
    for heads, kv in ((None, 2), (4, None)):
        with pytest.raises(burnish.RecipeError, match="cannot be told"):
            key_width(anatomy, 3, SimpleNamespace(heads=heads, kv_heads=kv, path="x"), "")
    for number, prefix in ((2, ""), (3, "cross_")):
        with pytest.raises(burnish.RecipeError, match="cannot be told"):
            key_width(anatomy, number, block, prefix)


def test_counts_and_defaults():
    m = parse("prefix")[0]
    assert m.count(2, 16, 32) == 2 * 2 * 30 * 16
    assert (m.length, m.hidden) == (30, 0)
    assert parse("prefix(length=4, hidden=5)")[0].count(2, 16, 32) == \
        4 * 32 + 33 * 5 + 2 * 2 * 16 * 6


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "prefix(length=0)", "at least one row"), ("vit", "prefix(targets='q')", "no targets"),
    ("vit", "prefix(length=3, frozen_rows=3)", "expected fewer than the 3 rows"),
    ("vit", "prefix(frozen_rows=-1)", "expected fewer than the 30"),
    ("vit", "prefix(frozen_rows=1, hidden=4)", "train directly"),
    ("vit", "prefix(dropout=1.0)", "prefix: dropout is a probability"),
    ("vit", "prefix(frozen_rows=1, mass='own')", "none scales them"),
    ("convnext", "prefix", "no attention"), ("mlp", "prefix", "no attention"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


@pytest.mark.parametrize("kind", ["eager", "flash_attention_2", "flex_attention"])
def test_attention_that_cannot_take_rows_is_refused_before(kind):
    net = tiny("llama")[0]
    net.config._attn_implementation = kind
    with pytest.raises(burnish.RecipeError, match=f"{kind}.*sdpa"):
        burnish.tune(net, "prefix")


# -- dropout --------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["vit", "llama", "gpt2"])
def test_dropout_is_drawn_for_every_sample(beside, monkeypatch, model):        # findings 3.8, 3.9
    """Stock dropout of the rows of each sample, attention by attention, from the same seed."""
    one = beside(model, "prefix(length=4, dropout=0.5)")
    B = len(next(iter(one.batch.values())))

    def dropped():
        for _, P in one.at("rows"):
            yield F.dropout(P.unsqueeze(1).expand(-1, B, -1, -1), 0.5, True)

    one.tuned.model.train()
    torch.manual_seed(5)
    rows = list(dropped())
    assert len(rows) == 2 and not torch.equal(rows[0][:, 0] == 0, rows[0][:, 1] == 0)
    want = stock(one, monkeypatch, rows)
    torch.manual_seed(5)
    one.agree(want)
    one.tuned.model.eval()
    assert torch.equal(one.tuned.model(**one.batch).logits, one.tuned.model(**one.batch).logits)


def test_dropout_inside_multi_head_attention_of_torch():                       # findings 3.9
    """Every sample reads rows of its own there too, and eval drops nothing."""
    tuned = burnish.tune(tiny("encoder")[0], "prefix(length=4, dropout=0.5)", head=False)
    net, batch = tuned.model, tiny("encoder")[1]
    same = {n: t[:1].expand(len(t), *t.shape[1:]).contiguous() for n, t in batch.items()}
    for p in tuned.parameters():
        p.data.normal_()
    net.eval()
    out = net(**same).logits
    torch.testing.assert_close(out, out[:1].expand_as(out))
    for m in net.modules():
        m.training = isinstance(m, KeysValues)                # no dropout but that of the rows
    out = net(**same).logits
    assert not torch.allclose(out[0], out[1], atol=1e-3)


def test_dropout_is_the_same_when_a_block_runs_again():                        # findings 3.9
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("llama")
        tuned = burnish.tune(net.train(), f"prefix(length=3, dropout=0.5){extra}")
        torch.manual_seed(7)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# -- starts from activations ----------------------------------------------------------------------
def test_words_before_a_rotary_text(beside):                                   # findings 3.9
    """The prefix that starts from words is those words: the logits of the text behind them."""
    words = [5, 9, 33, 2]
    one = beside("llama", f"prefix(length=4, init='activations', ids={words})", size=0)
    one.batch.pop("labels", None)
    ids = one.batch["input_ids"]
    long = torch.cat([torch.tensor(words).expand(len(ids), -1), ids], 1)
    want = one.base(input_ids=long).logits[:, 4:]
    got = one.tuned.model(**one.batch).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_words_before_learned_positions(beside):                               # findings 3.9
    """Keys and values of GPT-2 for the words at positions 0..3, fewer words repeated."""
    one = beside("gpt2", "prefix(length=4, init='activations', ids=[7, 3])", size=0)
    ids = one.batch["input_ids"]
    at = torch.arange(4, 4 + ids.shape[1]).expand_as(ids)
    long = torch.cat([torch.tensor([7, 3, 7, 3]).expand(len(ids), -1), ids], 1)
    want = one.base(input_ids=long).logits[:, 4:]
    got = one.tuned.model(input_ids=ids, position_ids=at).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_words_before_an_encoder_decoder():                                    # findings 3.9
    """Both stacks read the words: keys and values of each of its attentions for them."""
    words = torch.tensor([[5, 9, 33, 5]])
    tuned, base = tuned_on("t5", "prefix(length=4, init='activations', ids=[5, 9, 33])", None)
    banks = {n.partition(".burnish")[0]: m for n, m in tuned.model.named_modules()
             if isinstance(m, KeysValues)}
    want = keys_and_values(base, banks, {"input_ids": words, "decoder_input_ids": words})
    assert len(banks) == len(want) == 6
    for path, bank in banks.items():
        torch.testing.assert_close(bank.made().double(), want[path][:, 0], rtol=1e-5, atol=1e-6)


def keys_and_values(base, paths, batch):
    """What the projections of these attentions return: path -> (2, B, T, H h)."""
    seen = {}
    for path in paths:
        for leaf in (("key", "value"), ("k_proj", "v_proj"), ("k", "v")):
            attn = base.get_submodule(path)
            attn = getattr(attn, "self", attn)
            if all(hasattr(attn, n) for n in leaf):
                for n in leaf:
                    getattr(attn, n).register_forward_hook(
                        lambda m, a, out, p=path: seen.setdefault(p, []).append(out))
                break
    with torch.no_grad():
        base(**batch)
    return {path: torch.stack(t) for path, t in seen.items()}


def tuned_on(model, recipe, batches, **kw):
    net = tiny(model, dtype=torch.float64)[0]
    base = copy.deepcopy(net).eval()
    return burnish.tune(net, recipe, calibration=batches, head=False, **kw), base


@pytest.mark.parametrize("model", ["vit", "bert", "t5", "whisper", "deit"])
@pytest.mark.parametrize("hidden", [0, 5])
def test_the_first_tokens_of_the_data(model, hidden):                          # findings 3.9
    """P is K and V of the first sample, which an MLP of enough width meets too."""
    batch = tiny(model, dtype=torch.float64)[1]
    tuned, base = tuned_on(model, f"prefix(length=3, hidden={hidden}, init='activations')", [batch])
    banks = {n.partition(".burnish")[0]: m for n, m in tuned.model.named_modules()
             if isinstance(m, KeysValues)}
    want = keys_and_values(base, banks, batch)
    assert len(banks) == len(want)
    for path, bank in banks.items():
        torch.testing.assert_close(bank.made().double(), want[path][:, 0, :3], rtol=1e-4, atol=1e-5)


def test_padding_of_the_data_starts_nothing():                                 # findings 3.9
    """Tokens that are attended to, sample by sample, until there are enough."""
    batch = tiny("bert", dtype=torch.float64)[1]
    mask = torch.zeros_like(batch["input_ids"])
    mask[0, 1:3], mask[1, :4] = 1, 1
    batch["attention_mask"] = mask
    tuned, base = tuned_on("bert", "prefix(length=5, init='activations')", [batch])
    banks = {n.partition(".burnish")[0]: m for n, m in tuned.model.named_modules()
             if isinstance(m, KeysValues)}
    for path, t in keys_and_values(base, banks, batch).items():
        want = torch.cat([t[:, 0, 1:3], t[:, 1, :3]], 1)
        torch.testing.assert_close(banks[path].made().double(), want, rtol=1e-5, atol=1e-6)


def given_to(base, path, batch):
    """What an nn.MultiheadAttention is given; in training torch takes no path of its own."""
    seen = []
    base.train()
    for m in base.modules():
        m.__dict__.update({"p": 0.0} if isinstance(m, torch.nn.Dropout) else {})
    handle = base.get_submodule(path).register_forward_pre_hook(
        lambda m, args, kw: seen.append(args[0] if args else kw["query"]), with_kwargs=True)
    with torch.no_grad():
        base(**batch)
    handle.remove()
    return seen[0]


def test_multi_head_attention_of_torch_starts_from_data():                     # findings 3.9
    batch = tiny("encoder", dtype=torch.float64)[1]
    tuned, base = tuned_on("encoder", "prefix(length=3, init='activations')", [batch])
    banks = {n.partition(".burnish")[0]: m for n, m in tuned.model.named_modules()
             if isinstance(m, KeysValues)}
    for path, bank in banks.items():
        x, attn = given_to(base, path, batch), base.get_submodule(path)
        x = x if attn.batch_first else x.transpose(0, 1)
        _, k, v = (x @ attn.in_proj_weight.t() + attn.in_proj_bias).chunk(3, -1)
        torch.testing.assert_close(bank.rows.double(), torch.stack([k[0, :3], v[0, :3]]),
                                   rtol=1e-4, atol=1e-5)


def test_a_file_needs_no_data(tmp_path):                                       # findings 3.9
    """The rows are in it; a simulation needs none either."""
    recipe = "prefix(length=3, init='activations')"
    net, batch = tiny("llama")
    tuned = burnish.tune(net.eval(), recipe, calibration=[batch])
    want = net(**batch).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("llama")[0].eval(), tmp_path / "a")
    assert torch.equal(again.model(**batch).logits, want)
    assert burnish.simulate(tiny("llama")[0], recipe, batch).peak_bytes > 0
    with pytest.raises(burnish.ConfigError, match="calibration=batches"):
        burnish.tune(tiny("llama")[0], recipe)


def test_the_start_leaves_no_trace():                                          # findings 3.9
    """No hook, mode or random number of the caller's is moved, and a second adapter starts from
    the base whatever the first has learnt."""
    net, batch = tiny("llama", dtype=torch.float64)
    net.train()
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    tuned = burnish.tune(net, "prefix(length=3, init='activations')", calibration=[batch])
    assert torch.equal(torch.randn(4), expected) and net.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    first = [p.detach().clone() for p in tuned.parameters()]
    for p in tuned.parameters():
        p.data.normal_()
    tuned.add("second", "prefix(length=3, init='activations')")
    tuned.use("second")
    assert all(torch.equal(a, b) for a, b in zip(first, tuned.parameters(), strict=True))


@pytest.mark.parametrize("model, recipe, why", [
    ("llama", "prefix(ids=[1])", "init='normal'.*init='activations'"),
    ("llama", "prefix(init='activations', ids=[])", "ids from 0 to 63"),
    ("llama", "prefix(init='activations', ids=[3, 64])", "ids from 0 to 63"),
    ("llama", "prefix(init='activations', ids=[-1])", "ids from 0 to 63"),
    ("vit", "prefix(init='activations', ids=[1])", "reads no token ids"),
    ("clip", "prefix(init='activations', ids=[1])", "token ids alone"),
    ("gpt2", "prefix(length=500, init='activations', ids=[1])",
     r"does not run on these token ids alone \(index out of range in self\); leave them out"),
])
def test_starts_that_cannot_be(model, recipe, why):                            # findings 3.9
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_data_that_are_too_short():                                            # findings 3.9
    net, batch = tiny("llama")
    n = batch["input_ids"].numel()
    with pytest.raises(burnish.ConfigError, match=f"was given {n} tokens, where {n + 1} rows"):
        burnish.tune(net, f"prefix(length={n + 1}, init='activations')", calibration=[batch])
    burnish.tune(tiny("llama")[0], f"prefix(length={n}, init='activations')", calibration=[batch])


def test_an_mlp_where_blocks_differ_in_width():
    """P' is as wide as the state the last of them leaves, the rows as each attention's keys."""
    tuned = burnish.tune(tiny("swin")[0], "prefix(length=2, hidden=4)", head=False)
    shapes = [tuple(p.shape) for n, p in tuned.named_parameters() if n.endswith("trunk.rows")]
    assert shapes == [(2, 32)]


def test_a_finished_prefix_is_its_rows():
    assert str(parse("prefix(length=4, hidden=5)")[0].finished()) == "prefix(length=4)"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_moved_tokens_count_from_the_length_on(model):
    """The same as a key-value cache of these rows in front, which is what PEFT hands a model."""
    from transformers import DynamicCache

    net, batch = tiny(model)
    net.eval()
    ids = batch["input_ids"]
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "prefix(length=3, moved=True)")
    banks = [m for m in net.modules() if isinstance(m, KeysValues)]
    with torch.no_grad():
        for bank in banks:
            bank.rows.normal_()
    cache = DynamicCache(config=base.config)
    for k, bank in enumerate(banks):
        heads = base.config.get_text_config().num_key_value_heads if model == "llama" else \
            base.config.n_head
        rows = bank.rows.detach().unflatten(-1, (heads, -1)).transpose(1, 2)
        cache.update(*(r.expand(len(ids), -1, -1, -1) for r in rows), k)
    want = base(input_ids=ids, past_key_values=cache,
                attention_mask=torch.ones(len(ids), 3 + ids.shape[1])).logits
    torch.testing.assert_close(net(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    at = torch.arange(ids.shape[1])[None] + 4
    moved = net(input_ids=ids, position_ids=at).logits
    embeds = net.get_input_embeddings()(ids)
    assert torch.allclose(net(inputs_embeds=embeds).logits, net(input_ids=ids).logits, atol=1e-6)
    with tuned.disabled():
        assert torch.equal(net(input_ids=ids).logits, base(input_ids=ids).logits)
    assert not torch.allclose(moved, want, atol=1e-4) if model == "gpt2" else moved is not None
    step = net(input_ids=ids[:, :5], use_cache=True)
    rest = net(input_ids=ids[:, 5:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(rest, want[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["vit", "t5"])
def test_positions_that_cannot_move_are_refused(model):
    with pytest.raises(burnish.RecipeError, match="needs one stack of blocks that takes"):
        burnish.tune(tiny(model)[0], "prefix(length=3, moved=True)")


# -- rows with a mass of their own (LAE) ----------------------------------------------------------
def own_mass(q, k, v, P_k, P_v, scales, mask, causal, scale):
    """The joint attention's part of the tokens as it is, and the rows' part over its own sum."""
    P_k, P_v = scales[0] * P_k, scales[1] * P_v
    joint = attention(q, k, v, P_k, torch.zeros_like(P_v), mask, causal, scale)
    alone = attention(q, k[:, :, :1] * 0, v[:, :, :1] * 0, P_k, P_v, None, False, scale)
    # of the rows alone: take the token of zeros out again
    h = q.shape[-1]
    own = P_k.shape[-1] // h
    rows = P_k.unflatten(-1, (own, h)).transpose(-3, -2).repeat_interleave(q.shape[1] // own, 0)
    z = (1 / math.sqrt(h) if scale is None else scale) * torch.einsum("bhqd,hld->bhql", q, rows)
    share = z.exp().sum(-1, keepdim=True) / (z.exp().sum(-1, keepdim=True) + 1)
    return joint + alone / share


@pytest.mark.parametrize("model", ["vit", "llama", "gpt2", "bert"])
def test_rows_with_a_mass_of_their_own(beside, monkeypatch, model):
    one = beside(model, "prefix(length=3, mass='own')")
    rows, scales = ([p for _, p in one.at(n)] for n in ("rows", "scales"))
    assert len(rows) == len(scales) == 2 and len(one.theta) == 4
    if model in ("llama", "bert"):
        one.batch["attention_mask"] = torch.ones_like(one.batch["input_ids"])
        one.batch["attention_mask"][1, -2:] = 0
    calls = iter(zip(rows, scales, strict=True))

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        P, s = next(calls)
        return own_mass(q, k, v, P[0], P[1], s, attn_mask, is_causal, scale)

    with monkeypatch.context() as m:
        m.setattr(F, "scaled_dot_product_attention", sdpa)
        out = one.base(**one.batch).logits
    assert next(calls, None) is None
    one.agree(out)


def test_the_attention_that_rows_get_adds_up_to_one():
    """Values of one at the rows, of nought at the tokens: what comes out is the rows' mass."""
    bank = OwnMass(None, "a", 3, 8, std=1.0).double()
    with torch.no_grad():
        bank.rows[1] = 1.0
    q, k = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(2))
    call = (F.scaled_dot_product_attention, (q, k, torch.zeros_like(k)), {})
    mass = bank.attend(*call)
    assert (mass - 1).abs().max() < 1e-6
    tokens = bank.attend(call[0], (q, k, torch.ones_like(k)), {}) - mass
    assert bool((tokens < 1).all()) and bool((tokens > 0).all())    # and theirs stays 1 - l
    shared = KeysValues(None, "a", 3, 8, std=1.0).double()
    shared.load_state_dict({"rows": bank.rows})
    assert float((shared.attend(*call).detach() - 1).abs().min()) > 1e-3


def test_own_mass_counts_files_and_refusals(tmp_path):
    base, batch = tiny("vit", dtype=torch.float64)
    tuned = burnish.tune(base, "prefix(length=3, mass='own', hidden=5)", head=False)
    part = tuned.recipe[0]
    assert sum(p.numel() for p in tuned.parameters()) == part.count(2, 32, 32)
    assert parse("prefix(length=3, mass='own')")[0].count(2, 32, 32) == 2 * 2 * 3 * 32 + 4
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if n.endswith("scales"):
                p.copy_(torch.tensor([0.5, 2.0]))
        want = base.eval()(**batch).logits
        tuned.save(tmp_path / "a")
        again = burnish.load(tiny("vit", dtype=torch.float64)[0], tmp_path / "a")
        torch.testing.assert_close(again.model.eval()(**batch).logits, want)
    assert not any("trunk" in n for n, _ in again.model.named_parameters())
    tuned = burnish.tune(tiny("llama")[0], "prefix(length=2, mass='own', moved=True)")
    with pytest.raises(burnish.FormatError, match="no words for"):
        burnish.export_peft(tuned, tmp_path / "b")
    with pytest.raises(burnish.RecipeError, match="keeps its softmax to itself"):
        burnish.tune(tiny("encoder")[0], "prefix(mass='own')")
    groups = tuned.optimizer(weight_decay=0.1).param_groups
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.numel() == 2} == {0.0}


# -- rows that stay (Cartridges) ------------------------------------------------------------------
def test_frozen_rows_are_read_and_never_move(beside, monkeypatch):
    """The attention of all rows; of the first neither gradient nor decay, nor are they counted."""
    one = beside("llama", "prefix(length=4, frozen_rows=1)")
    banks = [m for m in one.tuned.model.modules() if isinstance(m, KeysValues)]
    first = [b.first.clone() for b in banks]
    assert all(f.shape[1] == 1 and f.any() for f in first)
    one.agree(stock(one, monkeypatch, [
        torch.cat([f.double(), rows], 1) for f, (_, rows) in zip(first, one.at("rows"),
                                                                 strict=True)]))
    m = one.tuned.recipe[0]
    assert sum(p.numel() for p in one.tuned.parameters()) == m.count(2, banks[0].width, 32)
    assert m.count(2, 16, 32) == 2 * 2 * 3 * 16


def test_a_frozen_row_is_the_first_token_s():
    net, batch = tiny("vit")
    base = copy.deepcopy(net)
    whole = burnish.tune(net, "prefix(length=3, init='activations')", calibration=[batch])
    some = burnish.tune(base, "prefix(length=3, init='activations', frozen_rows=2)",
                        calibration=[batch])
    pairs = zip(*([m for m in t.model.modules() if isinstance(m, KeysValues)]
                  for t in (whole, some)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b.first, a.rows[:, :2].detach())
        torch.testing.assert_close(b.rows, a.rows[:, 2:])
