"""SHERL: detached early states gathered into the one that the last blocks read, in the graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state import gathered
from burnish.blocks.state.gathered import Early, Gather, Late, redundancy
from burnish.blocks.state.parallel_head import Tapped
from burnish.blocks.tape.saved import Tape
from burnish.core.errors import RecipeError
from burnish.engine.slot import slots
from burnish.memory import Ledger
from burnish.testing import stir
from burnish.testing.models import tiny

BLOCKS = {"vit": "vit.layers", "bert": "bert.encoder.layer", "timm_qkv": "blocks",
          "gpt2": "transformer.h", "llama": "model.layers", "mamba": "backbone.layers"}
#: small models of four blocks
DEEP = {"gpt2": {"n_layer": 4}, "timm_qkv": {},
        "mamba": {"num_hidden_layers": 4, "residual_in_fp32": False}}


def deep(model, **kw):
    return tiny(model, **DEEP.get(model, {"num_hidden_layers": 4}), **kw)


def parts(tuned, kind):
    return [m for _, _, slot in slots(tuned.model) for m in slot.modules() if isinstance(m, kind)]


# -- what it computes -----------------------------------------------------------------------------
def written_out(p, states):
    """The equation; p: tensors by name."""
    def norm(x, at, eps):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + eps).sqrt() * p[f"{at}.weight"] + p[f"{at}.bias"]

    def linear(x, at):
        return x @ p[f"{at}.weight"].t() + p[f"{at}.bias"]

    def cosine(x, y):
        return (x * y).sum(-1, keepdim=True) / (x.norm(dim=-1, keepdim=True)
                                                * y.norm(dim=-1, keepdim=True))

    *shallow, guide = (norm(linear(h, f"down.{k}"), f"gather.norm.{k}", 1e-5)
                       for k, h in enumerate(states))
    if len(shallow) == 1:
        A = guide + shallow[0]
    else:
        sure = [linear(x * guide, "gather.sure").clamp_min(0)
                / sum(cosine(x, y).clamp_min(0) for y in shallow) for x in shallow]
        total = sum(sure)
        A = guide + sum(o / (total + (total == 0)) * x for o, x in zip(sure, shallow, strict=True))
    made = norm(linear(A.clamp_min(0), "up"), "norm", 1e-12)
    return made + torch.tanh(p["stay"] / 0.1) * states[-1]


@pytest.mark.parametrize("piece", [2048, 5])
@pytest.mark.parametrize("states", [2, 3, 6])
def test_the_head_is_the_equation_and_so_are_its_gradients(states, piece, monkeypatch):
    monkeypatch.setattr(gathered, "PIECE", piece)
    torch.manual_seed(0)
    head = Early(states, 12, 6).double()
    for q in head.parameters():
        nn.init.normal_(q, std=0.5)
    nn.init.constant_(head.stay, 0.03)
    if states > 2:                                   # some tokens have several they are sure of
        nn.init.constant_(head.gather.sure.bias, 0.5)
    given = [torch.randn(3, 7, 12, dtype=torch.float64) for _ in range(states)]
    leaves = {n: q.detach().clone().requires_grad_() for n, q in head.named_parameters()}
    got, want = head(given), written_out(leaves, given)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    for n, q in head.named_parameters():
        assert leaves[n].grad.any(), n
        torch.testing.assert_close(q.grad, leaves[n].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model, layers", [
    ("vit", 1), ("vit", 2), ("bert", 1), ("bert", 3), ("gpt2", 2), ("llama", 1), ("mamba", 1),
    ("timm_qkv", 1)])
def test_the_last_blocks_read_it_in_the_place_of_their_own_state(model, layers):
    net, batch = deep(model, dtype=torch.float64)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, f"sherl(reduction=4, layers={layers}, dropout=0.0)", head=False)
    stir(tuned, size=0.1)
    ((end, *others), blocks) = parts(tuned, Late), base.get_submodule(BLOCKS[model])
    below, late = list(blocks)[:-layers], list(blocks)[-layers:]
    assert len(others) == layers - 1 and all(o.head is None for o in others)
    assert len(parts(tuned, Tapped)) == len(below)
    leaves = {n: q.detach().clone().requires_grad_() for n, q in end.head.named_parameters()}
    states = []
    below[0].register_forward_pre_hook(lambda m, args: states.append(args[0]))
    for b in below:
        b.register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    late[0].register_forward_pre_hook(
        lambda m, args: (written_out(leaves, states), *args[1:]))
    got, want = net(**batch).logits, base(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    g = torch.randn_like(want)
    got.backward(g)
    want.backward(g)
    for n, q in end.head.named_parameters():
        torch.testing.assert_close(q.grad, leaves[n].grad, rtol=1e-6, atol=1e-8)


def test_a_block_may_be_given_its_state_by_name():
    net, batch = deep("timm_qkv")
    tuned = burnish.tune(net, "sherl(reduction=4, dropout=0.0)", head=False)
    stir(tuned)
    want = tuned.loss(batch)

    def by_name(x):
        for b in net.blocks:
            x = b(x=x)
        return x

    net.blocks.forward = by_name
    assert torch.equal(tuned.loss(batch), want)


def test_the_start_hides_the_state_that_was_there():
    """g = 0: nothing of H_K goes past the gathering."""
    torch.manual_seed(0)
    head, given = Early(3, 8, 4), [torch.randn(2, 5, 8) for _ in range(3)]
    made = head.norm(head.up(F.relu(head.gather(
        *(d(h).flatten(0, 1) for d, h in zip(head.down, given, strict=True))))))
    assert torch.equal(head(given), made.view(2, 5, 8)) and not head.stay.any()
    assert head.stay.burnish_decay is False


# -- shares ---------------------------------------------------------------------------------------
def shared(head, states):
    """o of the shallow states."""
    *shallow, guide = states
    return head.shares(torch.stack(shallow, -2), guide).detach()


def sure_of(small, states):
    """A gathering that finds every state as sure as the next."""
    head = Gather(states, small).double()
    with torch.no_grad():
        head.sure.weight.zero_()
        head.sure.bias.fill_(2.0)
    return head


def test_states_that_are_the_same_have_the_same_shares():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    got = shared(sure_of(8, 5), [x] * 5)
    torch.testing.assert_close(got, torch.full_like(got, 1 / 4))


def test_shares_are_of_one_however_little_is_sure():
    head, x = sure_of(8, 5), torch.randn(8, dtype=torch.float64)
    with torch.no_grad():
        head.sure.bias.fill_(1.5e-12)
    torch.testing.assert_close(shared(head, [x] * 5).sum().item(), 1.0)


def test_a_state_that_is_there_k_times_counts_as_often_as_once():
    """Where the others are like none, exactly; where they are a little like it, nearly."""
    torch.manual_seed(0)
    one = torch.eye(8, dtype=torch.float64)
    guide = torch.randn(8, dtype=torch.float64)
    for more, bound in ((0.0, 1e-12), (0.02, 0.06)):
        a, b, c = one[0] + more, one[1] + more, one[2] + more
        once = shared(sure_of(8, 4), [a, b, c, guide])
        often = shared(sure_of(8, 8), [a, a, a, a, a, b, c, guide])
        assert abs(float(often[:5].sum() - once[0])) <= bound
        assert float(once[0]) == pytest.approx(1 / 3)
    plain = 5 / 7                                    # what it would count without redundancy
    assert float(often[:5].sum()) < plain / 1.8


def test_what_is_like_nothing_is_redundant_once_and_zeros_too():
    x = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(redundancy(x), torch.tensor([1 + 0.5**0.5, 1, 1, 1 + 0.5**0.5],
                                                           dtype=torch.float64))


def test_where_no_state_is_sure_the_deepest_is_all_there_is():
    torch.manual_seed(0)
    head = sure_of(4, 3)
    given = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with torch.no_grad():
        head.sure.bias.fill_(-2.0)
    out = head(*given)
    assert torch.equal(out, head.norm[2](given[2]))
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (*head.parameters(), *given))


# -- sizes ----------------------------------------------------------------------------------------
def test_the_count_is_the_papers():
    sherl = burnish.parse("sherl")[0]
    assert sherl.count(12, 768, small=512) == 5_133_058
    assert sherl.reduction == 2 and sherl.layers == 1 and sherl.dropout == 0.1
    for model, layers, states in (("vit", 1, 4), ("vit", 2, 3), ("timm_qkv", 1, 2)):
        net, _ = deep(model)
        tuned = burnish.tune(net, f"sherl(reduction=4, layers={layers})", head=False)
        mine = tuned.recipe.named("sherl").count(states, 32)
        assert sum(p.numel() for p in tuned.parameters()) == mine


def test_of_a_token_its_states_are_kept_and_what_they_are_narrowed_to():
    """K + 1 states of D numbers, as many of S; A, and U A, once. Nothing K x K."""
    d, s, states, kept = 32, 8, 5, []
    for tokens in (64, 128):
        head, tape = Early(states, d, s), Tape()
        given = [torch.randn(2, tokens, d) for _ in range(states)]
        with Ledger(head) as ledger, tape.recording():
            ledger.watch("weights", given)
            y = head(given, tape)
            kept.append(sum(e.bytes for e in ledger.entries if e.death is None
                            and ledger.category(e) != "weights") - y.nbytes)
    more = (kept[1] - kept[0]) / (2 * 64 * 4)            # numbers a token
    assert states * s < more <= (states + 1) * s + d + 4


def test_tokens_are_gathered_a_few_at_a_time(monkeypatch):
    """Of one sample or of several."""
    monkeypatch.setattr(gathered, "PIECE", 5)
    head, sizes = Early(3, 8, 4), []
    head.gather.register_forward_pre_hook(lambda m, args: sizes.append({a.shape for a in args}))
    with torch.no_grad():
        head([torch.randn(3, 4, 8) for _ in range(3)])
    assert sizes == [{(5, 4)}, {(5, 4)}, {(2, 4)}]


# -- the graph ------------------------------------------------------------------------------------
@pytest.mark.parametrize("layers", [1, 2])
def test_only_the_last_blocks_hold_a_graph(layers):
    net, batch = deep("vit")
    tuned = burnish.tune(net, f"sherl(layers={layers})", head=False)
    ran, seen = [], []
    for b in net.vit.layers:
        b.attention.register_forward_hook(lambda m, a, out: ran.append(torch.is_grad_enabled()))
    parts(tuned, Late)[0].head.register_forward_pre_hook(lambda m, args: seen.extend(args[0]))
    tuned.loss(batch).backward()
    assert ran == [False] * (4 - layers) + [True] * layers
    assert len(seen) == 5 - layers and not any(t.requires_grad for t in seen)
    assert all(p.grad is None for n, p in net.named_parameters() if ".burnish." not in n)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_training_fills_no_cache(model):
    net, batch = deep(model)
    burnish.tune(net, "sherl(layers=2)", head=False)
    out = net(**batch, use_cache=True)
    cache = out.past_key_values
    held = [] if cache is None else [x for x in cache.layers if getattr(x, "keys", None) is not None
                                     and x.keys.numel()]
    assert not held and out.loss.requires_grad


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_words_are_written_from_the_cache_as_without_one(model):
    net, batch = deep(model)
    tuned = burnish.tune(net, "sherl(reduction=4, layers=2)", head=False)
    stir(tuned, size=0.2)
    net.eval()
    ids = batch["input_ids"][:, :4]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False,
           "eos_token_id": None}
    out = net.generate(ids, **how, use_cache=True)
    assert torch.equal(out, net.generate(ids, **how, use_cache=False))
    with torch.no_grad():
        steps = net(input_ids=out, use_cache=False).logits
        first = net(input_ids=out[:, :4], use_cache=True)
        cache, got = first.past_key_values, [first.logits]
        for i in range(4, 10):
            got.append(net(input_ids=out[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), steps, rtol=1e-4, atol=1e-5)
    assert len(cache.layers) == 4


def test_a_backbone_that_drops_is_quiet_and_the_gathering_drops():
    net, batch = deep("bert", dropout=0.5)
    tuned = burnish.tune(net, "sherl(dropout=0.0)", head=False)
    net.dropout.p = 0.0                              # the head's
    assert torch.equal(tuned.loss(batch), tuned.loss(batch))
    parts(tuned, Late)[0].head.dropout = 0.5
    assert not torch.equal(tuned.loss(batch), tuned.loss(batch))
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(**batch).logits, net(**batch).logits)


def test_the_state_that_stays_is_never_dropped():
    head = Early(2, 8, 4, dropout=0.9)
    nn.init.zeros_(head.norm.weight)
    nn.init.constant_(head.stay, 10.0)
    given = [torch.randn(1, 50, 8) for _ in range(2)]
    torch.testing.assert_close(head(given), given[1])


# -- where it stands ------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["t5", "clip", "swin", "cnn", "mlp"])
def test_models_that_it_cannot_read_are_refused(model):
    with pytest.raises(RecipeError, match="sherl needs a single stack of blocks of one width"):
        burnish.tune(tiny(model)[0], "sherl", head=False)


@pytest.mark.parametrize("recipe, said", [
    ("sherl(reduction=3)", "the width = 32 is not divisible by it; 1, 2, 4, 8, 16 are possible"),
    ("sherl(layers=4)", "has 4 blocks, and one below"), ("sherl + norms", "could not train"),
    ("sherl + lora(rank=2)", "could not train"), ("sherl + checkpoint", "cannot be joined"),
    ("sherl(targets='fc1')", "takes no targets"),
])
def test_what_cannot_be_is_refused(recipe, said):
    with pytest.raises(RecipeError, match=said):
        burnish.tune(deep("vit")[0], recipe, head=False)


@pytest.mark.parametrize("wrong", ["reduction=0", "layers=0", "dropout=1.0", "dropout=-0.1"])
def test_settings_that_are_none_are_refused(wrong):
    name = wrong.partition("=")[0]
    with pytest.raises(RecipeError, match=f"sherl\\(.*{name}="):
        burnish.parse(f"sherl({wrong})")
    with pytest.raises(RecipeError, match="there is none"):
        burnish.parse("sherl(cache_gb=1)")
    assert burnish.parse("sherl(layers=3, dropout=0.0, reduction=1)")


def test_what_stands_in_the_last_block_or_behind_it_trains_beside_it():
    net, batch = deep("vit")
    tuned = burnish.tune(net, "sherl(reduction=4) + lora(rank=2, targets='q@-1') "
                              "+ norms(targets='vit.layernorm')", head="auto")
    stir(tuned)
    tuned.loss(batch).backward()
    names = [n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(names) == len(list(tuned.parameters()))
    assert any("lora" in n for n in names) and any("classifier" in n for n in names)


def test_switched_off_it_is_the_base():
    net, batch = deep("vit", dropout=0.5)
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, "sherl", head=False)
    with tuned.disabled(), torch.no_grad():
        assert torch.equal(net.eval()(**batch).logits, base(**batch).logits)
