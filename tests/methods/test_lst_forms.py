"""lst in the forms of QST: how a state is narrowed, and a gate for each channel."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.state.taps import Crown, Rung
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny

QST = "down='low_rank', gate='channel'"
FORMS = [QST, "down='low_rank', bottleneck=3", "down='mean'", "down='max', gate='channel'",
         "down='random'", "gate='channel'"]


def parts(tuned, kind):
    return [m for _, _, slot in slots(tuned.model) for m in slot.modules() if isinstance(m, kind)]


# -- what it computes -----------------------------------------------------------------------------
def narrowed(form, h, p, at, R):
    """D h; p: tensors by name."""
    if form == "low_rank":
        a = h @ p[f"{at}.a.weight"].t()
        b = (a * torch.sigmoid(a)) @ p[f"{at}.b.weight"].t()
        mean, var = b.mean(-1, keepdim=True), b.var(-1, unbiased=False, keepdim=True)
        return ((b - mean) / (var + 1e-5).sqrt() * p[f"{at}.norm.weight"]
                + p[f"{at}.norm.bias"])
    if form in ("mean", "max"):
        runs = torch.stack([h[..., i::R] for i in range(R)])
        return runs.mean(0) if form == "mean" else runs.max(0).values
    return h @ p[f"{at}.weight"].t() + p[f"{at}.bias"]


def mixed(a, s, h):
    w = 1 / (1 + torch.exp(-(a if a.dim() else a / 0.1)))
    return w * s + (1 - w) * h


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_equation_and_so_are_its_gradients(form, layers):
    net, batch = tiny("vit", dtype=torch.float64)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, f"lst(reduction=4, layers={layers}, {form})", head=False)
    stir(tuned, size=0.2)
    how = tuned.recipe.named("lst").down
    rungs, (crown,) = parts(tuned, Rung), parts(tuned, Crown)
    copies = copy.deepcopy(rungs), copy.deepcopy(crown)
    p = [dict(r.named_parameters()) for r in copies[0]]
    states = []
    for b in base.vit.layers:
        b.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    base.vit.layers[-1].register_forward_hook(lambda m, a, out: states.append(out))

    def ends(module, args, h):
        own = how == "linear" or layers == [1]
        s = narrowed(how, states[0], p[0], "first" if own else "down", 4)
        for i, r in enumerate(copies[0]):
            if r.side is not None:
                s = r.side(mixed(p[i]["gate.alpha"], s,
                                 narrowed(how, states[i + 1], p[i], "down", 4)))
        up = copies[1].norm(s) @ copies[1].up.weight.t() + copies[1].up.bias
        return mixed(copies[1].gate.alpha, up, h)

    base.vit.layernorm.register_forward_hook(ends)
    loss, want = tuned.loss(batch), base(**batch).loss
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    loss.backward()
    want.backward()
    own = [q for m in (*rungs, crown) for q in m.parameters() if q.requires_grad]
    assert len(own) == len(list(tuned.parameters()))
    for mine, ref in zip((*rungs, crown), (*copies[0], copies[1]), strict=True):
        for (n, q), (_, r) in zip(mine.named_parameters(), ref.named_parameters(), strict=True):
            if q.requires_grad:
                torch.testing.assert_close(q.grad, r.grad, rtol=1e-8, atol=1e-11, msg=n)
            else:
                assert how == "random" and q.grad is None and n.startswith(("down.", "first."))


def test_the_gates_of_channels_start_where_qst_says():
    """sigma(1/2) = 0.622 for the ladder inside, sigma(1) = 0.731 for the backbone at the end."""
    tuned = burnish.tune(tiny("llama")[0], f"lst(reduction=4, {QST})")
    rungs, (crown,) = parts(tuned, Rung), parts(tuned, Crown)
    for r in rungs:
        torch.testing.assert_close(r.gate.alpha.sigmoid(), torch.full((8,), 0.622459))
    torch.testing.assert_close(1 - crown.gate.alpha.sigmoid(), torch.full((32,), 0.731059))
    assert rungs[0].first is None and rungs[0].down.a.weight.shape == (16, 32)
    decayed = [p for g in tuned.optimizer(weight_decay=0.1).param_groups if g["weight_decay"]
               for p in g["params"]]
    gates = [r.gate.alpha for r in rungs] + [crown.gate.alpha]
    assert decayed and not any(g is p for g in gates for p in decayed)


def test_a_token_that_follows_is_what_the_whole_text_says():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"lst(reduction=4, {QST})")
    stir(tuned, size=0.2)
    net.eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        first = net(input_ids=ids[:, :5], use_cache=True)
        then = net(input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(then, net(input_ids=ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["random", "low_rank"])
def test_a_file_brings_what_was_drawn(how, tmp_path):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"lst(reduction=4, down='{how}')", head=False)
    tuned.step(batch)
    tuned.save(tmp_path)
    with torch.no_grad():
        want = net.eval()(**batch).logits
    other, _ = tiny("vit")
    torch.manual_seed(7)
    burnish.load(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other.eval()(**batch).logits, want)


# -- counts and bytes -----------------------------------------------------------------------------
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def test_qst_trains_what_is_published_on_llama_2_7b():
    """L (4 s^2 + 3 s m / R + 2 s) + L (d q + q s + 2 s) + L s + s + s d + d + d = 28,623,104."""
    net, batch = tiny("llama", meta=True, batch=1, **LLAMA_7B)
    assert burnish.simulate(net, "qst", batch).trainable == 28_623_104
    block = 4 * 256 * 256 + 3 * 256 * 688 + 2 * 256
    assert parse("qst")[1].count(32, 4096, block, norm=1) == 28_623_104
    assert sum(p.numel() for p in net.parameters()) // 28_623_104 == 235        # 0.42 %


def test_nine_of_twelve_layers_of_a_t5_base_are_a_fiftieth_and_less():
    """About 1.7 % of the model at R = 8, as published."""
    net, batch = tiny("t5", meta=True, batch=1, d_model=768, d_ff=3072, d_kv=64, num_heads=12,
                      num_layers=12, num_decoder_layers=12, vocab_size=32128)
    recipe = "lst(reduction=8, layers=[1, 2, 3, 5, 6, 7, 9, 10, 11])"
    trainable = burnish.simulate(net, recipe, batch).trainable
    assert trainable == 3_878_707
    assert trainable / sum(p.numel() for p in net.parameters()) == pytest.approx(0.0174, abs=5e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers, n", [(None, 2), ([0], 1)])
def test_the_count(form, layers, n):
    net, _ = tiny("vit")
    tuned = burnish.tune(net, f"lst(reduction=4, layers={layers}, {form})", head=False)
    side = sum(p.numel() for p in parts(tuned, Rung)[0].side.parameters())
    assert sum(p.numel() for p in tuned.parameters()) == \
        tuned.recipe.named("lst").count(n, 32, side)


@pytest.mark.parametrize("down, tap", [("mean", 0), ("max", 0), ("random", 0), ("linear", 1)])
def test_a_state_waits_only_for_a_matrix_that_trains(down, tap, kept):
    """(8 + 2 g + 2 mu) / R units for a rung without one, within 2 %."""
    R, width, tokens, sizes = 4, 64, 8 * 17, []
    for layers in (2, 4):
        net, batch = tiny("vit", batch=8, num_hidden_layers=layers, hidden_size=width,
                          intermediate_size=4 * width)
        tuned = burnish.tune(net, f"lst(reduction={R}, down='{down}') + lean(on=False)",
                             head=False)
        sizes.append(kept(tuned, batch))
    per = (sizes[1] - sizes[0]) / 2 / (tokens * width * 4)
    units = 6 + 2 + 8 + 1                                  # and what the gate reads
    few = (2 * 2 + 4) / width                              # statistics of norms and attention
    assert per == pytest.approx(tap + units / R + few, rel=0.02)
    assert per < tap + (8 + 2 + 8) / R


def test_what_nothing_would_read_is_refused():
    with pytest.raises(RecipeError, match="bottleneck=8.*down='low_rank'"):
        parse("lst(bottleneck=8)")
    with pytest.raises(RecipeError, match="1 or more"):
        parse("lst(down='low_rank', bottleneck=0)")
    with pytest.raises(RecipeError, match="'linear', 'low_rank', 'mean', 'max', 'random'"):
        parse("lst(down='pooled')")
    with pytest.raises(RecipeError, match="bounds a folder"):
        parse("lst(cache_gb=2.0)")
    assert parse("lst(down='low_rank', bottleneck=8)")[0].bottleneck == 8
    assert [m.name for m in parse("qst")] == ["nf4", "lst"]
