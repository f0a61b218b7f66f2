"""BiPFT: bits with scales that train and estimates of the rest, written out in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.choose.inputs import MeanSize
from burnish.blocks.state.estimated import Estimated, Sizes, joined
from burnish.blocks.weight.elastic import Centred, Elastic, signed, unsigned
from burnish.blocks.weight.provided import Weighted
from burnish.blocks.weight.provided import linear as provided
from burnish.core.anatomy import Anatomy
from burnish.core.errors import BurnishError, CheckError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.memory import Ledger
from burnish.testing.models import tiny

F64 = torch.float64


class Sign(torch.autograd.Function):
    """a sign(x), with the gradients that are written in the paper's step sizes."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return torch.where(x >= 0, 1.0, -1.0).to(x) * max(float(a), 1e-5)

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        inside = (x / max(float(a), 1e-5)).abs() <= 1
        return g * inside, (g * torch.where(x >= 0, 1.0, -1.0)).sum() / x.numel() ** 0.5


class Step(torch.autograd.Function):
    """a clamp(round(x / a), 0, 1)."""

    @staticmethod
    def forward(ctx, x, a):
        a = a.clamp_min(1e-5)
        ctx.save_for_backward(x, a)
        return (x / a).round().clamp(0, 1) * a

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        t = x / a
        slope = torch.zeros_like(t)
        slope[t > 1] = 1.0
        inside = (t >= 0) & (t <= 1)
        slope[inside] = (t.round() - t)[inside]
        return g * inside, (g * slope).sum() / x.numel() ** 0.5


class Weight(torch.autograd.Function):
    """m_o sign(W - mean), the gradient as it comes."""

    @staticmethod
    def forward(ctx, W):
        return W.abs().mean(1, keepdim=True) * torch.where(W >= W.mean(), 1.0, -1.0).to(W)

    @staticmethod
    def backward(ctx, g):
        return g


def linear(x, W, bias, a, A=None, B=None):
    y = F.linear(Sign.apply(x, a), Weight.apply(W), bias)
    return y if A is None else y + x @ A.t() @ B.t()


def attention(q, k, v, x, t, mask=None, causal=False, scale=None, keep=None, dropout=0.0):
    """t: the tensors by name."""
    m_q, p_q, m_k, p_k, r = (F.linear(x, t[f"{n}.weight"], t[f"{n}.bias"])[:, None]
                             for n in ("m_q", "p_q", "m_k", "p_k", "r"))
    q, k, v = Sign.apply(q, t["q"]), Sign.apply(k, t["k"]), Sign.apply(v, t["v"])
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    S = q @ k.mT + m_q @ p_k.mT + p_q @ m_k.mT + p_q @ p_k.mT
    S = S / q.shape[-1] ** 0.5 if scale is None else S * scale
    if mask is not None:
        S = S.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else S + mask
    if causal:
        S = S.masked_fill(torch.ones(S.shape[-2:]).triu(1).bool(), float("-inf"))
    P = S.softmax(-1)
    if keep is not None:
        P = P * keep / (1 - dropout)
    P = Step.apply(P, t["p"])
    return P @ v + (P @ r).expand_as(v)


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# -- numbers of one bit ---------------------------------------------------------------------------
@pytest.mark.parametrize("fn, ref", [(signed, Sign), (unsigned, Step)])
@pytest.mark.parametrize("a", [0.7, 1e-7, -1.0])
def test_values_and_gradients_of_a_scale(fn, ref, a):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, dtype=F64)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2], x[0, 0, 3] = 0.0, 0.7, -0.7, 0.35
    ends = []
    for f in (fn, ref.apply):
        y, s = x.clone().requires_grad_(), torch.tensor(a, dtype=F64, requires_grad=True)
        out = f(y, s)
        (out * torch.linspace(-1, 2, x.numel(), dtype=F64).view_as(x)).sum().backward()
        ends.append((out.detach(), y.grad, s.grad))
    for mine, want in zip(*ends, strict=True):
        close(mine, want, 1e-12)
    assert float(ends[0][2].abs()) > 0
    assert float(ends[0][1].abs().sum()) > 0 or a < 1e-5


def test_outputs_are_plus_or_minus_the_scale():
    torch.manual_seed(0)
    x, a = torch.randn(50, 20), torch.tensor(0.3)
    x[0, 0], x[0, 1] = 0.0, -0.0
    assert set(signed(x, a).flatten().tolist()) == {float(a), -float(a)}
    assert signed(x, a)[0, :2].tolist() == [float(a)] * 2
    assert set(unsigned(x, a).flatten().tolist()) == {0.0, float(a)}
    term = Elastic(4, 20, 0.3)
    assert torch.equal(term.opened(term.code(x), torch.float32), signed(x, term.a.detach()))
    W, _ = term.rounded(torch.randn(4, 20), torch.randn(4, 20))
    assert all(len(set(row.abs().tolist())) == 1 for row in W)


# -- linears --------------------------------------------------------------------------------------
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("inp", [12, 5])
@pytest.mark.parametrize("rank", [0, 2])
def test_linears_are_those_of_the_equation(inp, rank, trained):
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(7, inp, dtype=F64), requires_grad=trained)
    bias, term = torch.randn(7, dtype=F64), Elastic(7, inp, 0.8, rank).double()
    op = Weighted(lambda: W, [], term)
    x = torch.randn(3, 4, inp, dtype=F64)
    x[0, 0, 0] = 0.0
    mine = [x.clone().requires_grad_(), W, *term.parameters()]
    own = [p.detach().clone().requires_grad_(p.requires_grad) for p in mine]
    got = provided(mine[0], op, bias, W if trained else None)
    want = linear(own[0], own[1], bias, *own[2:])
    close(got, want)
    with torch.no_grad():
        close(provided(x, op, bias, W if trained else None), want)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    for p, ref in zip(mine, own, strict=True):
        assert (p.grad is None) == (ref.grad is None) == (not p.requires_grad)
        if p.requires_grad:
            close(p.grad, ref.grad)
            assert float(p.grad.abs().sum()) > 0
    if not rank:
        assert 0 < int((mine[0].grad == 0).sum()) < x.numel()


def test_a_scale_trains_where_nothing_below_does():
    term, W = Elastic(3, 4), torch.randn(3, 4)
    x = torch.randn(5, 4)
    provided(x, Weighted(lambda: W, [], term), None).square().sum().backward()
    assert float(term.a.grad.abs()) > 0


def test_the_start_of_a_branch():
    assert Elastic(6, 8).A is None and not Elastic(6, 8, rank=2, zero=True).B.any()
    term = Elastic(600, 800, rank=2)
    for p in (term.A, term.B):
        assert abs(float(p.detach().std()) / 0.02 - 1) < 0.1
    assert term.a.burnish_decay is False


def test_backward_keeps_two_bits_of_what_is_read():
    net, term = nn.Linear(64, 32, bias=False), Elastic(32, 64)
    op, x = Weighted(lambda: net.weight, [], term), torch.randn(10, 64)
    with Ledger(net) as ledger:
        for t in (x, term.a):
            ledger.watch("weights", [t])
        y = provided(x, op, None, net.weight)
        alive = sum(e.bytes for e in ledger.entries
                    if e.death is None and ledger.category(e) != "weights")
    assert alive - y.nbytes == 10 * 2 * 64 // 8


def test_a_table_has_a_scale_per_token():
    net, batch = tiny("bert")
    table = net.bert.embeddings.word_embeddings
    W = table.weight.detach().clone().double()
    burnish.tune(net, "full + bipft", targets="word_embeddings,query", head=False,
                 calibration=[batch])
    want = W.abs().mean(1, keepdim=True) * torch.where(W >= W.mean(), 1.0, -1.0)
    got = table(torch.arange(1, 20))
    close(got.detach().double(), want[1:20], 1e-5)
    got.square().sum().backward()
    assert float(table.weight.grad.abs().sum()) > 0


# -- attention ------------------------------------------------------------------------------------
def test_with_what_is_left_out_the_scores_are_exact():
    """An oracle's estimates: m the bits of a head, p what they leave out."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 1, 6, 8, dtype=F64) for _ in range(2))
    q_b, k_b = signed(q, torch.tensor(0.9)), signed(k, torch.tensor(1.3))
    Q, K = joined(q_b, k_b, q_b, q - q_b, k_b, k - k_b)
    close(Q @ K.mT, q @ k.mT, 1e-12)
    nothing = torch.zeros_like(q)
    Q, K = joined(q_b, k_b, q_b, nothing, k_b, nothing)
    close(Q @ K.mT, q_b @ k_b.mT, 1e-12)
    Q, K = joined(q_b, k_b, q_b, q - q_b, k_b, nothing)              # one side alone
    close(Q @ K.mT, q @ k_b.mT, 1e-12)
    p = torch.randn(2, 1, 6, 2, dtype=F64)
    heads = torch.randn(2, 3, 6, 8, dtype=F64)
    Q, K = joined(heads, heads, p, p, p, p)                         # the same for all heads
    close(Q @ K.mT - heads @ heads.mT, (3 * p @ p.mT).expand(-1, 3, -1, -1), 1e-12)


@pytest.fixture
def listener():
    def build(rank=2, zero=False, width=12):
        torch.manual_seed(3)
        made = Estimated(SimpleNamespace(box={}, call=None), "default", width, rank, zero).double()
        for p in made.parameters():
            p.data += 0.3 * torch.randn_like(p)
        made.p.data.fill_(0.4)
        return made
    return build


@pytest.mark.parametrize("how", ["plain", "bool", "added", "causal", "grouped", "scaled"])
def test_attention_is_that_of_the_equation(how, listener):
    made = listener()
    kv = 2 if how == "grouped" else 4
    q = torch.randn(2, 4, 6, 3, dtype=F64)
    k, v = (torch.randn(2, kv, 6, 3, dtype=F64) for _ in range(2))
    x = torch.randn(2, 6, 12, dtype=F64)
    mask = {"bool": torch.rand(2, 1, 6, 6) > 0.3,
            "added": torch.where(torch.rand(2, 1, 6, 6) > 0.3, 0.0, -10000.0).double()}.get(how)
    if how == "bool":
        mask[..., 0] = True
    scale = 0.2 if how == "scaled" else None
    mine = [t.requires_grad_() for t in (q, k, v, x)]
    own = [t.detach().clone().requires_grad_() for t in mine]
    theta = {n: p.detach().clone().requires_grad_() for n, p in made.named_parameters()}
    want = attention(*own, theta, mask, how == "causal", scale)
    got = made.answer(*mine, 3**-0.5 if scale is None else scale, mask, how == "causal", 0.0)
    close(got, want)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    mine += [p for _, p in made.named_parameters()]
    own += [theta[n] for n, _ in made.named_parameters()]
    for a, b in zip(mine, own, strict=True):
        close(a.grad, b.grad)
        assert float(a.grad.abs().sum()) > 0


def test_probabilities_are_dropped_before_they_are_bits(listener):
    made = listener()
    q, k, v = (torch.randn(2, 4, 6, 3, dtype=F64) for _ in range(3))
    x = torch.randn(2, 6, 12, dtype=F64)
    torch.manual_seed(5)
    keep = F.dropout(torch.ones(2, 4, 6, 6, dtype=F64), 0.25) > 0
    torch.manual_seed(5)
    got = made.answer(q, k, v, x, 3**-0.5, None, False, 0.25)
    want = attention(q, k, v, x, dict(made.named_parameters()), keep=keep, dropout=0.25)
    close(got, want)
    assert 0 < int(keep.sum()) < keep.numel()


def begun(net, batch, recipe, **kw):
    """(tuned, copy of the base, copies of what trains by its name), all in float64."""
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, recipe, head=False, calibration=[batch], **kw)
    net.eval()
    base.eval()
    g = torch.Generator().manual_seed(7)
    for p in tuned.parameters():
        p.data = p.data.double()
        if p.numel() > 1:
            p.data.add_(0.02 * torch.randn(p.shape, generator=g, dtype=F64))
    theta = {n: p.detach().clone().requires_grad_() for n, p in tuned.named_parameters()}
    return tuned, base, theta


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_a_whole_model_is_the_equation(model, monkeypatch):
    """Padding, rotary positions, grouped queries, a fused projection; the latent weights too."""
    net, batch = tiny(model, dtype=F64)
    if model == "bert":
        batch["input_ids"] = torch.arange(16).view(2, 8) + 3
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, -2:] = 0
    tuned, base, theta = begun(net, batch, "full + bipft(linears=True, rank=2, peak=1.5)")
    reads = []
    for path, module in base.named_modules():
        own = {n.rpartition(".bipft.")[2]: p for n, p in theta.items()
               if n.startswith(f"{path}.burnish.") and path}
        for leaf in ("weight", "bias"):
            if f"{path}.{leaf}" in theta:
                module._parameters[leaf] = theta[f"{path}.{leaf}"]
        if "a" in own:
            def bits(module, args, out, own=own):
                turn = module.weight.t() if model == "gpt2" else module.weight
                return linear(args[0], turn, module.bias, own["a"], own.get("A"), own.get("B"))
            module.register_forward_hook(bits)
        elif "m_q.weight" in own:
            module.register_forward_pre_hook(
                lambda module, args, kw, own=own: reads.append(
                    (args[0] if args else kw["hidden_states"], own)), with_kwargs=True)

    if model == "gpt2":
        base.lm_head._parameters["weight"] = theta["transformer.wte.weight"]     # they are tied

    def sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kw):
        return attention(q, k, v, *reads[-1], attn_mask, is_causal, scale)

    with monkeypatch.context() as mp:
        mp.setattr(F, "scaled_dot_product_attention", sdpa)
        want = base(**batch).logits
    got = net(**batch).logits
    assert len(reads) == 2
    close(got, want)
    w = torch.randn(want.shape, dtype=F64)
    names = [n for n, p in theta.items() if "classifier" not in n]
    mine = dict(tuned.named_parameters())
    got = torch.autograd.grad((got * w).sum(), [mine[n] for n in names], allow_unused=True)
    want = torch.autograd.grad((want * w).sum(), [theta[n] for n in names], allow_unused=True)
    seen = 0
    for n, a, b in zip(names, got, want, strict=True):
        assert (a is None) == (b is None), n
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=n)
            seen += bool(b.any()) and ".bipft." in n
    assert seen > 30 if model != "gpt2" else seen > 20


# -- starts ---------------------------------------------------------------------------------------
def test_scales_start_as_the_base_shows_them(monkeypatch):
    net, batch = tiny("bert")
    net.eval()
    base, found, stock = copy.deepcopy(net), [], F.scaled_dot_product_attention
    inputs = {}
    for path in ("attention.self.query", "output.dense"):
        base.bert.encoder.layer[1].get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: inputs.__setitem__(path, args[0]))

    def sdpa(q, k, v, **kw):
        found.append([float(t.detach().abs().mean()) for t in (q, k, v)])
        return stock(q, k, v, **kw)

    with monkeypatch.context() as mp:
        mp.setattr(F, "scaled_dot_product_attention", sdpa)
        base(**batch)
    tokens = batch["input_ids"].shape[1]
    tuned = burnish.tune(net, "full + bipft(peak=3.0)", head=False, calibration=[batch])
    got = {n: float(p.detach()) for n, p in tuned.named_parameters() if p.numel() == 1}
    for path, x in inputs.items():
        a = got[f"bert.encoder.layer.1.{path}.burnish.default.bipft.a"]
        assert a == pytest.approx(2 * float(x.detach().abs().mean()), rel=1e-5)
    for i, sizes in enumerate(found):
        head = f"bert.encoder.layer.{i}.attention.burnish.default.bipft."
        for name, size in zip("qkv", sizes, strict=True):
            assert got[head + name] == pytest.approx(2 * size, rel=1e-5)
        assert got[head + "p"] == pytest.approx(3.0 / tokens, rel=1e-6)
    assert len(found) == 2


def test_a_file_brings_its_own_scales(tmp_path):
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + bipft", head=False, calibration=[batch])
    for p in tuned.parameters():
        p.data += 0.1
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("bert")[0], tmp_path / "a")
    for (n, p), (m, q) in zip(tuned.named_parameters(), again.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q)


def test_mean_sizes_leave_padding_out():
    x = torch.randn(2, 3, 4)
    one = MeanSize()
    assert one.value == 0.0 and one.nbytes == 4
    one.update(x[:1])
    one.update(x[1:], torch.tensor([[True, False, True]]))
    want = torch.cat([x[0], x[1][[0, 2]]]).abs().mean()
    assert one.value == pytest.approx(float(want), rel=1e-6)
    assert MeanSize().key == MeanSize().key                  # q, k and v share what they read
    assert Sizes(["a"]).of("a") is None


def test_starts_of_the_estimates():
    state = SimpleNamespace(box={})
    made = Estimated(state, "default", 400, 50, False)
    for e in (made.m_q, made.p_q, made.m_k, made.p_k, made.r):
        assert not e.bias.any() and abs(float(e.weight.detach().std()) / 0.02 - 1) < 0.2
    made = Estimated(state, "default", 400, 50, True)
    assert made.m_q.weight.any() and made.m_k.weight.any()
    assert not any(e.weight.any() for e in (made.p_q, made.p_k, made.r))
    assert all(p.burnish_decay is False for p in (made.q, made.k, made.v, made.p))


@pytest.mark.parametrize("init, starts", [("bert", True), ("zero", False)])
def test_only_where_it_is_asked_for_does_nothing_estimate_at_the_start(init, starts):
    net, batch = tiny("bert")
    tuned = burnish.tune(net, f"bipft(rank=2, linears=True, init='{init}')", head=False,
                         calibration=[batch])
    names = {n: bool(p.any()) for n, p in tuned.named_parameters()
             if n.endswith((".p_q.weight", ".p_k.weight", ".r.weight", "bipft.B"))}
    assert len(names) == 2 * (3 + 3) and set(names.values()) == {starts}
    assert all(p.any() for n, p in tuned.named_parameters()
               if n.endswith((".m_q.weight", ".m_k.weight", "bipft.A")))


def test_a_scale_beyond_twice_every_probability_lets_no_value_through(listener):
    made = listener()
    q, k, x = (torch.zeros(1, 2, 6, 3, dtype=F64), torch.zeros(1, 2, 6, 3, dtype=F64),
               torch.zeros(1, 6, 12, dtype=F64))
    v = torch.randn(1, 2, 6, 3, dtype=F64, requires_grad=True)
    for scale, through in ((4 / 6, False), (1.5 / 6, True)):
        made.p.data.fill_(scale)
        out = made.answer(q, k, v, x, 1.0, None, False, 0.0)
        assert bool(out.any()) is through
        got, = torch.autograd.grad(out.square().sum(), v)
        assert bool(got.any()) is through


# -- what it costs, and refuses -------------------------------------------------------------------
def test_sizes_are_read_where_a_scale_begins_and_nowhere_else():
    (method,) = parse("bipft")
    for kind, role, reads in (("linear", "q", True), ("linear", "head", False),
                              ("embedding", "embed", False)):
        assert (method.observe(Place("a", "weight", kind, 8, 16, role)) is not None) == reads


def test_an_attention_whose_width_cannot_be_told_is_refused():
    anatomy = Anatomy.of(tiny("bert")[0])
    (one,) = parse("bipft")[0].branch(anatomy)
    assert set(one.widths.values()) == {32}
    anatomy.hidden_size = None
    anatomy.blocks = [replace(b, hidden_size=None) for b in anatomy.blocks]
    with pytest.raises(RecipeError, match="rank=1: expected at most 0, the width read"):
        list(parse("bipft")[0].branch(anatomy))


def test_what_the_estimates_cost():
    method = parse("bipft(rank=8)")[0]
    assert method.estimates(768) - 4 == 25377
    branch = parse("bipft(rank=8, linears=True)")[0]
    q = SimpleNamespace(kind="linear", role="q", inp=768, out=768)
    assert 3 * (branch.count(q) - method.count(q)) == 36864
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "bipft(rank=3)", head=False, calibration=[batch])
    attn = sum(p.numel() for n, p in tuned.named_parameters() if ".0.attention.burnish" in n)
    assert attn == parse("bipft(rank=3)")[0].estimates(32) == 4 + 4 * (32 * 3 + 3) + 33


def test_it_learns_and_has_no_merge():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "full + bipft(peak=1.5)", head=False, calibration=[batch])
    tuned.optimizer(lr=2e-3)
    losses = [float(tuned.step(batch)) for _ in range(20)]
    assert losses[-1] < losses[0]
    with pytest.raises(CheckError, match="merge"):
        tuned.merge()


def test_settings_and_refusals(listener):
    assert parse("bipft")[0].settings() == {"targets": None, "rank": 1, "linears": False,
                                            "init": "bert", "peak": 4.0}
    for wrong in ("rank=0", "peak=0.0", "peak=-1.0"):
        with pytest.raises(RecipeError, match="rank of at least 1 and a peak above 0"):
            parse(f"bipft({wrong})")
    parse("bipft(rank=1, peak=0.1)")
    net, batch = tiny("bert")
    with pytest.raises(BurnishError, match="calibration"):
        burnish.tune(net, "bipft", head=False)
    with pytest.raises(RecipeError, match="rank=33: expected at most 32"):
        burnish.tune(tiny("bert")[0], "bipft(rank=33)", head=False, calibration=[batch])
    burnish.tune(tiny("bert")[0], "bipft(rank=32)", head=False, calibration=[batch])
    with pytest.raises(RecipeError, match="attention"):
        burnish.tune(nn.Sequential(nn.Linear(8, 8)), "bipft", targets="0", head=False,
                     calibration=[torch.randn(2, 8)])
    tuned = burnish.tune(tiny("bert")[0], "bipft", targets="all", head=False, calibration=[batch])
    assert "classifier.weight" not in [n for n, _ in tuned.terms((Elastic, Centred))]


def test_a_cache_is_refused():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "bipft", head=False, calibration=[batch])
    ids = torch.arange(3, 9).view(1, 6)
    with torch.no_grad():
        whole = tuned.model(input_ids=ids, use_cache=True)
        with pytest.raises(RecipeError, match="use_cache=False"):
            tuned.model(input_ids=ids[:, :1], past_key_values=whole.past_key_values)
