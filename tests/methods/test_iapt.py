"""IAPT: rows made of an instruction in every layer, in float64 with stock models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.instructed import FromInstruction, Rational
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

BLOCK = {"llama": ("model.layers.{}", "self_attn"), "gpt2": ("transformer.h.{}", "attn"),
         "mixtral": ("model.layers.{}", "self_attn")}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def rational(z, a, b):
    top = sum(a[i] * z ** i for i in range(len(a)))
    return top / (1 + sum(b[j] * z ** (j + 1) for j in range(len(b))).abs())


def rows(h, t):
    """P of the instruction's states (B, n, d)."""
    U = h @ t["down.weight"].t()
    e = (U @ t["score.weight"].t()).exp()
    Z = (e / e.sum(1, keepdim=True)).transpose(1, 2) @ U
    return rational(Z, t["rational.a"], t["rational.b"]) @ t["up.weight"].t() + t["up.bias"]


def stands(base, model, theta, ends):
    """Tokens P before those of each block, at position 0 of a rotation, gone behind it. Sample i's
    instruction are its first ends[i] tokens."""
    path, attn = BLOCK[model]
    for i in range(2):
        at = path.format(i)
        t = {n.removeprefix("maker."): p for (where, n), p in theta.items()
             if where == f"{at}.{attn}"}

        def enter(m, args, kw, t=t):
            h = args[0]
            P = torch.cat([rows(h[i:i + 1, :n], t) for i, n in enumerate(ends)])
            if kw.get("position_embeddings") is not None:
                cos, sin = kw["position_embeddings"]
                L = P.shape[1]
                kw["position_embeddings"] = (torch.cat([torch.ones_like(cos[:, :L]), cos], 1),
                                             torch.cat([torch.zeros_like(sin[:, :L]), sin], 1))
            return (torch.cat([P, h], 1), *args[1:]), kw

        block = base.get_submodule(at)
        block.register_forward_pre_hook(enter, with_kwargs=True)
        L = len(t["score.weight"])
        block.register_forward_hook(lambda m, args, out, L=L: out[:, L:] if isinstance(
            out, torch.Tensor) else (out[0][:, L:], *out[1:]))


@pytest.mark.parametrize("model", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("answer", ["all", "some", None])
def test_the_equation_written_out(beside, model, answer):
    one = beside(model, "iapt(length=3, bottleneck=5)")
    one.spare = {}
    ids = one.batch["input_ids"]
    labels = ids.clone()
    if answer == "some":
        labels[0, :3], labels[1, :5] = -100, -100
    one.batch = {"input_ids": ids, "use_cache": False} | ({"labels": labels} if answer else {})
    if answer == "all":                          # an instruction of one token leaves no choice
        for table in (one.own, one.theta):
            for key in [k for k in table if k[1].endswith("score.weight")]:
                one.spare[key] = table.pop(key)
    stands(one.base, model, {**one.theta, **one.spare},
           {"all": (1, 1), "some": (3, 5), None: (8, 8)}[answer])
    one.agree()


def test_the_activation_at_the_start():
    """Within 1e-2 of the GELU on [-3, 3]; its kink and its sixth power are in fp32."""
    R, z = Rational(), torch.linspace(-3, 3, 2001)
    assert float((R(z) - F.gelu(z)).abs().max()) < 1e-3
    half = z.bfloat16()
    assert torch.equal(R(half), R(half.float()).bfloat16())
    g = torch.Generator().manual_seed(0)
    R = R.double()
    with torch.no_grad():
        for p in R.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    z = torch.randn(50, generator=g, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(R(z), rational(z, R.a, R.b))
    assert torch.autograd.gradcheck(R, (z,))
    maker = FromInstruction(3, 8, 4)
    assert float(maker.up.weight.detach().std()) < 0.04 and not maker.up.bias.any()
    assert not any(getattr(p, "burnish_decay", True) for p in R.parameters())


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_no_answer_has_a_say_in_its_own_rows(model):
    """Other answer tokens, the same states before them; other instructions, others."""
    net, batch = tiny(model)
    tuned = burnish.tune(net, "iapt(length=3, bottleneck=4)", head=False)
    stir(tuned, size=0.5)
    net.eval()
    ids, labels = batch["input_ids"].clone(), batch["input_ids"].clone()
    labels[:, :4] = -100

    def first(ids, labels=labels):
        return net(input_ids=ids, labels=labels).logits[:, :4]

    want, other = first(ids), ids.clone()
    other[:, 4:] = (other[:, 4:] + 7) % 60
    assert torch.equal(first(other), want)
    whole = net(input_ids=ids).logits[:, :4]
    assert not torch.allclose(net(input_ids=other).logits[:, :4], whole, atol=1e-4)
    told = labels.clone()
    told[:, 3] = ids[:, 3]
    assert not torch.allclose(first(ids, told), want, atol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gpt2", "mixtral"])
def test_written_with_a_cache_is_the_whole_run_again(model):
    """Rows of the instruction, carried by the cache, and no key of theirs in it."""
    net, batch = tiny(model, dtype=torch.float64)
    tuned = burnish.tune(net, "iapt(length=3, bottleneck=4)", head=False)
    stir(tuned, size=0.5)
    for p in tuned.parameters():
        p.data = p.data.double()
    net.eval()
    ids = batch["input_ids"]
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        want = net(input_ids=ids, labels=labels).logits
        out = net(input_ids=ids[:, :5], use_cache=True)
        got, past = [out.logits], out.past_key_values
        assert past.get_seq_length() == 5
        for t in range(5, 8):
            out = net(input_ids=ids[:, t:t + 1], past_key_values=past, use_cache=True)
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), want)
    made = net.generate(ids[:, :5], max_new_tokens=3, do_sample=False, use_cache=True)
    slow = net.generate(ids[:, :5], max_new_tokens=1, do_sample=False)
    assert torch.equal(made[:, :6], slow)
    with torch.no_grad(), tuned.disabled():
        past = net(input_ids=ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(burnish.RecipeError, match="filled without the rows"):
        net(input_ids=ids[:, 5:6], past_key_values=past)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_instruction(side):
    net, batch = tiny("llama", dtype=torch.float64)
    tuned = burnish.tune(net, "iapt(length=3, bottleneck=4)", head=False)
    stir(tuned, size=0.5)
    for p in tuned.parameters():
        p.data = p.data.double()
    net.eval()
    ids = batch["input_ids"]
    mask, labels = torch.ones_like(ids), ids.clone()
    real = slice(3, 8) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, real] = 1
    labels[:, :real.start + 2] = -100
    labels[mask == 0] = -100
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for told in ({"labels": labels}, {}):
        alone = net(ids[:1, real], **{k: v[:1, real] for k, v in told.items()}).logits
        got = net(ids, attention_mask=mask, position_ids=at, **told).logits[:1, real]
        torch.testing.assert_close(got, alone)


def test_checkpointing_changes_no_gradient():
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("llama")
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :4] = -100
        tuned = burnish.tune(net, "iapt(length=3, bottleneck=4)" + extra, head=False)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_search_alternates_then_r_stays():
    """Generator and R by turns; behind it the generator begins again and R is as it was found."""
    net, batch = tiny("gpt2")
    tuned = burnish.tune(net, "iapt(length=3, bottleneck=4, search=0.5)", head=False)
    assert [s.until for s in tuned.recipe[0].stages(tuned, [])] == [0.5, None]
    seen = []

    def look():
        return {n: p.detach().clone() for n, p in tuned.named_parameters()}

    start = look()
    stages = tuned.recipe[0].stages(tuned, [])
    for _ in tuned.run(stages, lambda s: [batch] * 9, total=6, lr=1e-2):
        seen.append(look())
    moved = [{".rational." in n for n in seen[0] if not torch.equal(a[n], b[n])}
             for a, b in zip([start, *seen], seen, strict=False)]
    assert moved[:3] == [{False}, {True}, {False}]
    assert all(m == {False} for m in moved[3:])
    up = next(n for n in start if n.endswith("up.bias"))
    assert len(seen) == 6 and float(seen[2][up].abs().max()) > 0
    assert not torch.equal(seen[3][up], seen[2][up])
    assert float(seen[3][up].abs().max()) < 0.011               # one update from zero again


def test_the_count_of_the_paper(published):
    """67.3M on LLaMA-7B at a bottleneck of 256."""
    llama, _ = published("LlamaConfig", "LlamaForCausalLM", **LLAMA_7B)
    m = parse("iapt")[0]
    assert (m.length, m.bottleneck, m.search) == (4, 256, 0.0) and m.relies_on == ()
    assert parse("iapt(length=1, bottleneck=1, search=0.5)")[0].relies_on == ("gradients",)
    assert m.count(llama.hidden_size, len(llama.blocks)) == 67_273_056
    tuned = burnish.tune(tiny("llama")[0], "iapt(length=3, bottleneck=4)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == parse(
        "iapt(length=3, bottleneck=4)")[0].count(32, 2)
    assert Anatomy.of(tiny("llama")[0]).hidden_size == 32


def test_tokens_in_front_are_refused():
    net, batch = tiny("llama")
    burnish.tune(net, "prompt_tuning(length=2) + iapt(length=3, bottleneck=4)")
    with pytest.raises(burnish.RecipeError, match="tokens in front are no part"):
        net(**batch)


def test_attention_that_is_not_open_is_refused():
    net, _ = tiny("llama")
    net.set_attn_implementation("eager")
    with pytest.raises(burnish.RecipeError, match="iapt: .*load it with attn_implementation"):
        burnish.tune(net, "iapt(bottleneck=4)")


def test_a_head_norm_is_refused():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    net = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, head_dim=8))
    with pytest.raises(burnish.RecipeError, match="norms its queries and keys"):
        burnish.tune(copy.deepcopy(net), "iapt(bottleneck=4)")


@pytest.mark.parametrize("model, recipe, why", [
    ("llama", "iapt(length=0)", "expected a row"), ("llama", "iapt(bottleneck=0)", "a width"),
    ("llama", "iapt(search=1.0)", "to below 1"), ("llama", "iapt(targets='q')", "no targets"),
    ("llama", "iapt(search=0.5) + sgd + step_in_backward", "gradients at once"),
    ("bert", "iapt", "iapt needs a stack"), ("mamba", "iapt", "iapt needs"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
