"""LoRA and its named variants: counts, scale, rates, what is kept, merge."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.scaled import Scaled
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.core.targets import match
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
ROBERTA = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
           "num_attention_heads": 12, "vocab_size": 50265}


@pytest.fixture(scope="module")
def llama():
    return Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])


def count(anatomy, recipe, targets=None):
    (method,) = parse(recipe)
    return sum(method.count(p) for p in match(anatomy, targets))


@pytest.mark.parametrize("recipe, targets, expected", [
    ("lora(rank=8)", "q,v", 4_194_304),
    ("lora(rank=16)", None, 39_976_960),
    ("lora(rank=64, train_a=False)", None, 87_031_808),
])
def test_counts_on_llama_7b(llama, recipe, targets, expected):
    assert count(llama, recipe, targets) == expected


def test_count_on_roberta_base():
    anatomy = Anatomy.of(tiny("roberta", meta=True, **ROBERTA)[0])
    assert count(anatomy, "lora(rank=8)", "q,v") == 294_912


def test_a_ten_thousandth_of_gpt_3():
    """175B: 96 layers of width 12288; rank 4 on queries and values."""
    (method,) = parse("lora(rank=4)")
    of = 2 * 96 * method.count(Place("q", "weight", "linear", 12288, 12288))
    assert 175e9 / of == pytest.approx(10_000, rel=0.1)


def mlp(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def fill(tuned, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)


def test_the_start_is_the_base_to_the_bit():
    model, x = mlp(), torch.randn(4, 32)
    want = model(x)
    burnish.tune(model, "lora(rank=4)")
    assert torch.equal(model(x), want)


def test_the_update_has_at_most_its_rank_and_merges():
    model, x = mlp(), torch.randn(4, 32)
    tuned = burnish.tune(model, "lora(rank=3)")
    fill(tuned)
    for _, term in tuned.terms(Chain):
        assert int(torch.linalg.matrix_rank(term.dense())) == 3
    want = tuned.model(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-5, atol=1e-5)


def test_the_scale():
    assert parse("lora(rank=16, alpha=8)")[0].scale == 0.5
    assert parse("lora(rank=16, alpha=8, scaling='rs')")[0].scale == 2.0


def test_rank_stabilised_updates_do_not_shrink_with_the_rank():
    """The output of s B A x with entries of B of one size, as the rank goes 4 -> 1024: constant
    with alpha / sqrt(rank), shrinking as 1 / sqrt(rank) with alpha / rank."""
    place = Place("l", "weight", "linear", 256, 1024)
    x = torch.randn(1024, 1024)

    def size(scaling, rank):
        torch.manual_seed(0)
        term = Chain(place, rank, parse(f"lora(rank={rank}, scaling={scaling!r})")[0].scale)
        nn.init.normal_(term.B)
        return float((x @ term.dense().detach().t()).square().mean().sqrt())

    for rank in (64, 1024):
        assert size("rs", rank) / size("rs", 4) == pytest.approx(1.0, rel=0.1)
        assert size("lora", rank) / size("lora", 4) == pytest.approx(math.sqrt(4 / rank), rel=0.1)


def test_lora_plus_gives_b_its_own_rate():
    tuned = burnish.tune(mlp(), "lora(rank=4, b_rate=16)")
    opt = tuned.optimizer(lr=1e-4, weight_decay=0.1)
    names = {id(p): n for n, p in tuned.named_parameters()}
    rates = {names[id(p)].rpartition(".")[2]: (g["lr"], g["weight_decay"])
             for g in opt.param_groups for p in g["params"]}
    assert rates == {"A": (1e-4, 0.0), "B": (pytest.approx(16e-4), 0.0)}
    assert len(opt.param_groups) == 2


def test_factors_of_an_embedding_have_a_rate_of_their_own():              # findings 3.9
    net = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4))
    tuned = burnish.tune(net, "lora(rank=2, b_rate=16, embedding_rate=0.5, targets=['0', '1'])",
                         head=False)
    rates = {n.removeprefix("model."): g["lr"] for g in tuned.optimizer(lr=1e-3).param_groups
             for p in g["params"] for n, q in tuned.named_parameters() if q is p}
    by_end = {(n.split(".")[0], n.rpartition(".")[2]): lr for n, lr in rates.items()}
    assert by_end == {("0", "A"): pytest.approx(5e-4), ("0", "B"): pytest.approx(5e-4),
                      ("1", "A"): pytest.approx(1e-3), ("1", "B"): pytest.approx(16e-3)}


def test_a_head_decays_and_factors_do_not():
    tuned = burnish.tune(tiny("bert")[0], "lora(rank=4)")
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.1)
    names = {id(p): n for n, p in tuned.named_parameters()}
    for g in opt.param_groups:
        for p in g["params"]:
            assert g["weight_decay"] == (0.0 if ".burnish." in names[id(p)] else 0.1)


def kept_bytes(recipe, tokens=16, width=64):
    """Bytes that wait for backward in one linear of an MLP, parameters excluded."""
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    tuned = burnish.tune(model, recipe)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    tuned.state.tape.lean = False
    tuned.state.tape.pack = pack
    tuned.state.tape.unpack = lambda t: t
    tuned.model(torch.randn(tokens, width, requires_grad=True))
    return sum(kept.values()) / tokens / 4


@pytest.mark.parametrize("recipe, x, more", [
    ("lora(rank=4, train_a=False)", 0, 4), ("lora(rank=4)", 64, 4),
    ("lora(rank=4, train_scale=True)", 64, 4)])
def test_rank_numbers_a_token_are_kept_and_without_a_the_input_is_not(recipe, x, more):
    assert kept_bytes(recipe) == x + more
    assert parse(recipe)[0].per_token(Place("l", "weight", "linear", 64, 64)) == more


def test_frozen_a_stays_where_it_is():
    model, x = mlp(), torch.randn(8, 32)
    tuned = burnish.tune(model, "lora(rank=4, train_a=False)")
    before = [t.A.clone() for _, t in tuned.terms(Chain)]
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(x, loss=lambda y, _: (y - 1).square().mean())
    for old, (_, term) in zip(before, tuned.terms(Chain), strict=True):
        assert torch.equal(old, term.A)
        assert term.B.abs().sum() > 0


def test_factors_are_fp32_on_a_half_precision_base():
    tuned = burnish.tune(mlp().bfloat16(), "lora(rank=4)")
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert tuned.model(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16


def test_only_rows_asked_for_change_in_a_fused_projection():
    model, batch = tiny("timm_qkv")
    tuned = burnish.tune(model, "lora(rank=4, targets='q,v')", head=False)
    fill(tuned)
    before = model.blocks[0].attn.qkv.weight.clone()
    change = (tuned.merge().blocks[0].attn.qkv.weight - before).abs().sum(1)
    assert (change[:32] > 0).all() and (change[64:] > 0).all()
    assert torch.equal(change[32:64], torch.zeros(32))


@pytest.mark.parametrize("settings, word", [
    ("rank=33", "largest rank there is 32"), ("rank=0", "rank 0 does not fit"),
    ("dropout=1.0", "dropout"), ("dropout=-0.1", "dropout"), ("b_rate=0.0", "b_rate"),
])
def test_settings_that_make_no_sense(settings, word):
    with pytest.raises(RecipeError, match=word):
        burnish.tune(mlp(), f"lora({settings})")


def test_an_embedding_leaves_its_padding_alone():                         # findings 3.8
    """As in torch the row of padding_idx gets no gradient, so it stays what it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6, padding_idx=3))
    tuned = burnish.tune(model, "lora(rank=2)", targets="0", head=False)
    ids = torch.tensor([[1, 3, 3, 4]])
    tuned.optimizer(lr=1e-1)
    for _ in range(3):
        tuned.step((ids, None), loss=lambda out, b: (out - 1).square().sum())
    (_, term), = tuned.terms(nn.Module)
    assert torch.equal(model(torch.tensor(3)), torch.zeros(6))
    assert term.A[:, 3].abs().sum() == 0 and term.A[:, 1].abs().sum() > 0


def test_defaults_are_the_published_ones():
    assert parse("lora")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "scaling": "lora", "dropout": 0.0,
        "train_a": True, "train_scale": False, "init": "uniform", "b_rate": 1.0,
        "embedding_rate": 1.0}


@pytest.mark.parametrize("scaling, s", [("lora", 12.0 / 4), ("rs", 12.0 / 2)])
def test_the_equation_written_out(scaling, s):                             # findings 6
    """y = x W^T + b + s (x A^T) B^T, outputs and gradients of A, B and x in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).double()
    tuned = burnish.tune(model, f"lora(rank=4, alpha=12, scaling={scaling!r})", head=False)
    ((_, term),) = tuned.terms(Chain)
    term.double()
    fill(tuned)
    x, g = torch.randn(5, 24).double().requires_grad_(), torch.randn(5, 16).double()
    W, b, A, B = model[0].weight, model[0].bias, term.A, term.B
    y = x @ W.t() + b + s * (x @ A.t()) @ B.t()
    got = model(x)
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, (A, B, x), g), torch.autograd.grad(y, (A, B, x), g),
                    strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)


def test_the_start_is_uniform_below_one_over_the_root_of_the_inputs():
    torch.manual_seed(0)
    term = Chain(Place("l", "weight", "linear", 64, 400), 16, 1.0)
    assert not term.B.any() and float(term.A.abs().max()) <= 0.05
    assert float(term.A.std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.05)


def test_a_normal_start_has_deviation_one_over_the_rank_and_leaves_tables_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 64))
    tuned = burnish.tune(net, "lora(rank=16, init='normal', targets=['0', '1'])", head=False)
    table, linear = (t for _, t in tuned.terms(Chain))
    A = linear.A.detach()
    assert float(A.std()) == pytest.approx(1 / 16, rel=0.05) and float(A.abs().max()) > 2.5 / 16
    assert not linear.B.any() and not table.A.any()
    assert float(table.B.detach().std()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("train_a, per, passed", [(True, 4, 4 * 56), (False, 4, 4 * 24)])
def test_counts_of_experts(train_a, per, passed):
    place = Place("l", "w", "experts", 24, 32, experts=3)
    method = parse(f"lora(rank=4, train_a={train_a})")[0]
    assert method.count(place) == 3 * passed and method.per_token(place) == per


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_of_nothing_is_refused(rate):
    with pytest.raises(RecipeError, match="b_rate"):
        parse(f"lora(b_rate={rate})")
    assert parse("lora(b_rate=0.5)")[0].b_rate == 0.5


def test_a_rate_of_embeddings_that_is_none_is_refused():
    with pytest.raises(RecipeError, match="embedding_rate multiplies a learning rate, 0.0 is no"):
        burnish.parse("lora(embedding_rate=0)")


# -- a scale that trains (LAE) --------------------------------------------------------------------
@pytest.mark.parametrize("model", ["vit", "gpt2", "cnn"])
def test_a_scale_that_trains(beside, model):
    """W' = W + g s B A, with the gradient of g."""
    one = beside(model, "lora(rank=2, alpha=3.0, train_scale=True)")
    A, B, g = (dict(one.at(n)) for n in ("A", "B", "gain"))
    assert A and len(A) == len(B) == len(g)
    for path in A:
        module = one.base.get_submodule(path)
        W = module._parameters.pop("weight").detach()
        delta = 1.5 * g[path] * (B[path] @ A[path])
        delta = delta.t() if model == "gpt2" else delta
        module.__dict__["weight"] = W + delta.reshape(W.shape)
    one.agree()


def test_the_input_is_dropped_once_under_a_scale_that_trains():
    model = nn.Sequential(nn.Linear(12, 9)).double()
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    tuned = burnish.tune(model, "lora(rank=3, alpha=6, dropout=0.5, train_scale=True)", head=False,
                         targets="0")
    (_, term), = tuned.terms(Scaled)
    term.double()
    with torch.no_grad():
        for p in tuned.parameters():
            p.normal_()
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    want = F.linear(x, W, bias) + 2.0 * term.gain * dropped @ term.A.t() @ term.B.t()
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, list(term.parameters()), g),
                    torch.autograd.grad(want, list(term.parameters()), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_scale_that_trains_counts_merges_and_leaves_as_a_plain_lora(tmp_path):
    anatomy = Anatomy.of(tiny("vit", meta=True, hidden_size=768, num_hidden_layers=12,
                              num_attention_heads=12, intermediate_size=3072)[0])
    (method,) = parse("lora(rank=5, train_scale=True)")
    assert sum(method.count(p) for p in match(anatomy, "k,v") if p.block < 5) == 76_810
    model, x = mlp(), torch.randn(4, 32)
    base = model(x)
    tuned = burnish.tune(model, "lora(rank=3, train_scale=True)")
    assert torch.equal(model(x), base)
    fill(tuned)
    for _, term in tuned.terms(Scaled):
        nn.init.constant_(term.gain, 1.7)
    groups = tuned.optimizer(weight_decay=0.1).param_groups
    assert {g["weight_decay"] for g in groups} == {0.0}
    want = model(x).detach()
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-5, atol=1e-5)
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2, train_scale=True, targets='q,v')", head=False)
    fill(tuned)
    with torch.no_grad():
        want = net.eval()(**batch).logits
    burnish.export_peft(tuned, tmp_path / "peft")
    other = tiny("llama")[0]
    burnish.load_peft(other, tmp_path / "peft")
    torch.testing.assert_close(other.eval()(**batch).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe, why", [
    ("lora(rank=2, train_scale=True, train_a=False)", "leave one of them out"),
    ("lora(rank=2, train_scale=True, targets='embed_tokens')", "a table, whose scale is fixed")])
def test_a_scale_that_cannot_train_is_refused(recipe, why):
    with pytest.raises(RecipeError, match=why):
        burnish.tune(tiny("llama")[0], recipe)
