"""LoRAPrune against its equations in plain float64, and the smaller model it leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose.score import factor_importance
from burnish.blocks.state.mask import UnitMask
from burnish.core.anatomy import Anatomy
from burnish.core.errors import CheckError, ConfigError
from burnish.core.groups import groups
from burnish.core.targets import match
from burnish.methods.controller import loraprune as module
from burnish.testing.models import tiny


def test_importance_is_the_equation_whatever_the_panel():
    W, s = torch.randn(12, 10, dtype=torch.float64), 1.5
    A, B = torch.randn(3, 10, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    dA, dB = torch.randn_like(A), torch.randn_like(B)
    G = dB @ A + B @ dA - dB @ dA
    torch.testing.assert_close(G, -((B - dB) @ (A - dA) - B @ A))
    want = (G * (W + s * B @ A)).abs()
    for panel in (1, 35, 1 << 20):
        rows, columns = factor_importance(W, A, B, dA, dB, s, panel=panel)
        torch.testing.assert_close(rows, want.sum(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(columns, want.sum(0), rtol=1e-12, atol=1e-12)


def test_groups_of_a_llama_follow_its_key_value_heads():
    net, _ = tiny("llama")
    c = net.config
    found, notes = groups(Anatomy.of(net))
    heads = [g for g in found if g.kind == "heads"]
    assert len(found) == 2 * c.num_hidden_layers and not notes
    assert {g.units for g in heads} == {c.num_key_value_heads}
    width = c.hidden_size // c.num_attention_heads
    per = c.num_attention_heads // c.num_key_value_heads
    q, k, v = heads[0].rows
    assert (q[1], k[1], v[1], heads[0].columns[0][1]) == (per * width, width, width, per * width)
    channels = next(g for g in found if g.kind == "channels")
    assert channels.units == c.intermediate_size
    assert {p.role for p, _ in channels.rows} == {"gate", "up"} and channels.out.role == "down"


def test_heads_with_a_bias_of_their_own_stay():
    found, notes = groups(Anatomy.of(tiny("t5")[0]))
    assert {g.kind for g in found} == {"channels"} and "bias per head" in notes[0]


@pytest.mark.parametrize("model", ["llama", "gpt2", "vit", "bert"])
def test_a_masked_unit_is_a_unit_taken_out(model):
    """Zeroing a unit's rows by hand in the untouched model is what the mask does."""
    net, batch = tiny(model)
    tuned = burnish.tune(net, "loraprune(rank=4, spare=0)", head=False)
    base, _ = tiny(model)
    net.eval(), base.eval()
    found = {g.out.path: g for g in groups(Anatomy.of(base))[0]}
    with torch.no_grad():
        for i, (path, mask) in enumerate(tuned.branches(UnitMask)):
            mask.alive[i % len(mask.alive)] = False
            g = found[path]
            place, width = g.columns[0]
            w = place.view(base.get_submodule(path).weight)
            u = i % g.units
            w[:, u * width: (u + 1) * width] = 0
    torch.testing.assert_close(net(**batch).logits, base(**batch).logits)


def reference_scores(net, tuned, group):
    """Sum over the group's matrices of unit sums / their l2 norm, dense and in float64."""
    parts = []
    for side, members in ((1, group.rows), (0, group.columns)):
        for place, width in members:
            term = net.get_submodule(place.path).burnish.default["loraprune"]
            A, B, dA, dB = (t.detach().double() for t in
                            (term.A, term.B, term.A.grad, term.B.grad))
            W = net.get_submodule(place.path).weight.detach().double()
            W = W if isinstance(net.get_submodule(place.path), nn.Linear) else W.t()
            G = dB @ A + B @ dA - dB @ dA
            v = (G * (W + term.scale * B @ A)).abs().sum(side)
            if place.rows:
                v = v[place.rows[0]: place.rows[1]]
            v = v.view(group.units, width).sum(1)
            parts.append(v / v.norm())
    return sum(parts)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_who_is_switched_off_is_the_weakest_by_the_smoothed_score(model):
    net, batch = tiny(model)
    tuned = burnish.tune(net, "loraprune(rank=4, spare=0, every=3, ratio=0.5, decay=0.8)")
    tuned.total_steps = 6
    found = groups(tuned.anatomy)[0]
    smooth = [None] * len(found)
    opt = tuned.optimizer(lr=1e-2)

    def look(*_):
        for i, g in enumerate(found):
            now = reference_scores(net, tuned, g)
            smooth[i] = now if smooth[i] is None else 0.8 * smooth[i] + 0.2 * now

    opt.register_step_pre_hook(look)
    masks = dict(tuned.branches(UnitMask))
    for step in range(6):
        tuned.step(batch)
        if step == 2:                               # r(3) of a cubic from 0.6 to 5.4 updates
            r = 0.5 + (0 - 0.5) * (1 - (3 - 0.6) / (5.4 - 0.6)) ** 3
            for g, s in zip(found, smooth, strict=True):
                dead = set(s.argsort()[: min(int(r * g.units + 1e-9), g.units - 1)].tolist())
                assert set((~masks[g.out.path].alive).nonzero().flatten().tolist()) == dead
    for g in found:
        assert int(masks[g.out.path].alive.sum()) == max(1, g.units - int(0.5 * g.units))
    handler = next(h for n, h in tuned.timeline.handlers if n == "loraprune")
    for got, want in zip(handler.importance, smooth, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5)


def pruned(model, recipe="loraprune(rank=4, every=1, spare=0)", steps=8):
    net, batch = tiny(model)
    tuned = burnish.tune(net, recipe)
    tuned.total_steps = steps
    for _ in range(steps):
        tuned.step(batch)
    net.eval()
    return net, batch, tuned


@pytest.mark.parametrize("model, recipe", [
    ("llama", "loraprune(rank=4, every=1, spare=0)"),
    ("gpt2", "loraprune(rank=4, every=1, spare=0, units='channels')"),
    ("vit", "loraprune(rank=4, every=1, spare=0)"),
    ("bert", "loraprune(rank=4, every=1, spare=0, units='channels')"),
    ("t5", "loraprune(rank=4, every=1, spare=0)")])
def test_the_smaller_model_saves_and_loads_with_transformers(model, recipe, tmp_path):
    net, batch, tuned = pruned(model, recipe)
    base = {k: v.clone() for k, v in tiny(model)[0].state_dict().items()}
    config = net.config.to_dict() | {"dtype": None}          # save_pretrained names it
    want = net(**batch).logits
    before = sum(p.numel() for n, p in net.named_parameters() if "burnish" not in n)
    small = tuned.shrink()
    assert sum(p.numel() for p in small.parameters()) < 0.85 * before
    torch.testing.assert_close(small(**batch).logits, want, rtol=1e-5, atol=1e-6)
    assert not [n for n in small.state_dict() if "burnish" in n]
    small.save_pretrained(tmp_path / "small")
    again = type(small).from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(again(**batch).logits, small(**batch).logits, rtol=1e-6,
                               atol=1e-6)
    tuned.unmerge()
    torch.testing.assert_close(net(**batch).logits, want)
    assert net.config.to_dict() | {"dtype": None} == config
    tuned.detach()
    assert all(torch.equal(v, base[k]) for k, v in net.state_dict().items())


def operations(net, batch):
    from torch.utils.flop_counter import FlopCounterMode

    net.set_attn_implementation("eager")             # fused products of a CPU are not counted
    given = {k: v for k, v in batch.items() if k != "labels"}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(**given)
    return counter.get_total_flops()


@pytest.mark.parametrize("ratio, heads, channels", [(0.5, 1, 24), (0.25, 2, 36)])
def test_a_smaller_model_takes_the_operations_of_its_size(ratio, heads, channels, tmp_path):
    """Multiplications and additions of one forward, counted: those of the products that are left,
    written out; of the folder that transformers loads the same."""
    net, batch, tuned = pruned("llama", f"loraprune(rank=4, every=1, spare=0, ratio={ratio})")
    n, t = batch["input_ids"].shape
    config = copy.deepcopy(net.config)
    d, vocab, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    group = config.num_attention_heads // config.num_key_value_heads     # queries of a unit

    def said(units, inner):
        wide = config.head_dim * units
        matrices = d * wide * (2 * group + 2) + 3 * d * inner
        attention = 2 * t * wide * group
        return 2 * n * t * (layers * (matrices + attention) + d * vocab)

    stock = operations(tiny("llama")[0], batch)
    assert stock == said(config.num_key_value_heads, config.intermediate_size)
    small = tuned.shrink()
    assert operations(small, batch) == said(heads, channels) < (1 - 0.4 * ratio) * stock
    small.save_pretrained(tmp_path)
    assert operations(type(small).from_pretrained(tmp_path).eval(), batch) == said(heads, channels)


def test_a_number_of_heads_that_no_folder_can_say_is_refused():
    """A Llama's width must be a multiple of its heads, or its config is neither written nor
    read."""
    net, batch = tiny("llama", num_attention_heads=4, num_key_value_heads=4)
    tuned = burnish.tune(net, "loraprune(rank=4, every=1, spare=0, ratio=0.25, units='heads')")
    tuned.total_steps = 4
    for _ in range(4):
        tuned.step(batch)
    net.eval()
    want = net(**batch).logits
    with pytest.raises(CheckError, match=r"LlamaConfig does not take the new sizes \(.*not a "
                                         r"multiple of the number of attention heads \(3\).*"
                                         "ragged=True"):
        tuned.shrink()
    assert torch.equal(net(**batch).logits, want)
    torch.testing.assert_close(tuned.shrink(ragged=True)(**batch).logits, want, rtol=1e-5,
                               atol=1e-6)


def test_a_number_of_heads_that_no_folder_can_say_is_foreseen():
    """Before anything trains, with the numbers that would do; not where all is well."""
    def notes(recipe, **kw):
        tuned = burnish.tune(tiny("llama", num_attention_heads=8, num_key_value_heads=8, **kw)[0],
                             f"loraprune(rank=4, {recipe})", head=False)
        return [n for n in tuned.active.notes if "key-value heads" in n]

    (note,) = notes("spare=0, ratio=0.3")
    assert note.startswith("loraprune(ratio=0.3) leaves 6 of 8 key-value heads, which LlamaConfig: "
                           "The hidden size (32) is not a multiple of the number of attention "
                           "heads (6).")
    assert note.endswith("ragged=True; 1, 2, 4 would do, or units='channels'")
    for fine in ("spare=0", "spare=0, ratio=0.1", "spare=0, ratio=0.3, units='channels'",
                 "spare=0.3, ratio=0.3"):
        try:
            assert not notes(fine)
        except burnish.RecipeError as e:             # two blocks, both spared
            assert "spared" in str(e)


def test_where_no_number_of_heads_would_do_none_is_named(monkeypatch):
    monkeypatch.setattr(module, "not_taken", lambda *_: "Config: no.")
    tuned = burnish.tune(tiny("llama")[0], "loraprune(rank=4, spare=0)", head=False)
    (note,) = [n for n in tuned.active.notes if "key-value heads" in n]
    assert note == ("loraprune(ratio=0.5) leaves 1 of 2 key-value heads, which Config: no. "
                    "shrink() will want ragged=True; units='channels'")


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3"])
def test_heads_that_do_not_divide_the_width_are_said_where_a_config_has_their_width(name, tmp_path):
    import transformers

    torch.manual_seed(0)
    wide = {"head_dim": 8} if name == "Qwen3" else {}
    net = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, **wide))
    ids = torch.randint(3, 64, (2, 8))
    tuned = burnish.tune(net, "loraprune(rank=4, every=1, spare=0, ratio=0.25, units='heads')")
    assert not [n for n in tuned.active.notes if "key-value heads" in n]
    tuned.total_steps = 4
    for _ in range(4):
        tuned.step({"input_ids": ids, "labels": ids})
    net.eval()
    want = net(input_ids=ids).logits
    small = tuned.shrink()
    assert (small.config.num_attention_heads, small.config.head_dim) == (3, 8)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, want, rtol=1e-4, atol=1e-6)
    tuned.unmerge()
    assert torch.equal(net(input_ids=ids).logits, want) and net.config.num_attention_heads == 4


def test_what_no_config_can_say_is_refused_with_the_way_out():
    net, batch, tuned = pruned("bert")
    want = net(**batch).logits
    with pytest.raises(CheckError, match="BertConfig has no words.*ragged=True"):
        tuned.shrink()
    torch.testing.assert_close(net(**batch).logits, want, rtol=0, atol=0)
    small = tuned.shrink(ragged=True)
    torch.testing.assert_close(small(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_spared_blocks_stay_whole_and_ragged_sizes_are_told():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2))
    batch = {"input_ids": torch.randint(0, 64, (2, 8))}
    batch["labels"] = batch["input_ids"]
    tuned = burnish.tune(net, "loraprune(rank=4, every=1, spare=0.3)")
    blocks = {int(p.split(".")[2]) for p, _ in tuned.branches(UnitMask)}
    assert blocks == {2}                             # ceil(0.3 * 4) = 2 first, and the last, spared
    tuned.total_steps = 6
    for _ in range(6):
        tuned.step(batch)
    with pytest.raises(CheckError, match="blocks keep 1 to 2 heads.*spare=0"):
        tuned.shrink()


def test_nothing_off_is_nothing_to_take_out():
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=4)")
    with pytest.raises(ConfigError, match="nothing is switched off"):
        tuned.shrink()
    assert tuned.merged is None


def test_without_the_number_of_steps_nothing_is_pruned():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "loraprune(rank=4, every=1, spare=0)")
    for _ in range(3):
        tuned.step(batch)
    assert all(m.alive.all() for _, m in tuned.branches(UnitMask))


def test_masks_are_in_files_and_in_merged_weights(tmp_path):
    net, batch, tuned = pruned("llama")
    want = net(**batch).logits
    tuned.save(tmp_path / "a")
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    other.eval()
    assert torch.equal(other(**batch).logits, want)
    torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_the_count_on_llama_7b():
    """All seven matrices of 32 blocks."""
    method = burnish.parse("loraprune")[0]
    net = tiny("llama", meta=True, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=32, vocab_size=32000)[0]
    places = match(Anatomy.of(net), None)
    assert len(places) == 7 * 32 and sum(map(method.count, places)) == 19_988_480


@pytest.mark.parametrize("model", ["llama", "gpt2", "vit"])
def test_it_keeps_what_lora_keeps_and_one_number_a_masked_channel(model, kept):
    """The masked input of a matrix is what it keeps instead of its input."""
    both, channels = [], 0
    for recipe in ("lora(rank=4)", "loraprune(rank=4, spare=0)"):
        net, batch = tiny(model, batch=16)
        tuned = burnish.tune(net, recipe, head=False)
        both.append(kept(tuned, batch))
        channels += sum(m.channels().numel() for _, m in tuned.branches(UnitMask))
    assert channels and both[1] - both[0] == 4 * channels


def test_defaults_are_the_published_ones():
    assert burnish.parse("loraprune")[0].settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "ratio": 0.5, "units": "both", "every": 10,
        "warmup": 0.1, "cooldown": 0.1, "spare": 0.1, "decay": 0.9, "dropout": 0.0}


def test_blocks_are_alike_where_none_is_spared():
    assert burnish.parse("loraprune")[0].repeats() is None
    assert burnish.parse("loraprune(spare=0)")[0].repeats() == 1


def test_decay_leaves_the_factors_alone():
    tuned = burnish.tune(tiny("llama")[0], "loraprune(rank=4, spare=0)", head=False)
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.5)
    assert {g["weight_decay"] for g in opt.param_groups} == {0.0}


@pytest.mark.parametrize("settings", ["ratio=0.0", "spare=0.0", "decay=0.0", "every=1",
    "warmup=0.0, cooldown=0.0", "warmup=0.5, cooldown=0.5"])
def test_settings_at_their_bounds_are_taken(settings):
    assert burnish.parse(f"loraprune({settings})")


@pytest.mark.parametrize("settings", ["ratio=1.0", "ratio=-0.1", "spare=1.0", "spare=-0.1",
    "decay=1.0", "decay=-0.1", "dropout=1.0", "dropout=-0.1", "every=0", "warmup=-0.1",
    "cooldown=-0.1", "warmup=0.6, cooldown=0.5"])
def test_settings_beyond_their_bounds_are_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^loraprune"):
        burnish.parse(f"loraprune({settings})")


def test_two_that_share_one_budget_are_refused():
    with pytest.raises(burnish.RecipeError, match="the units of attention and MLP"):
        burnish.parse("loraprune + loraprune(rank=4)")


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(burnish.RecipeError, match="rank 99 does not fit"):
        burnish.tune(tiny("llama")[0], "loraprune(rank=99, spare=0, targets='q')", head=False)


def alive(tuned):
    return {p: int(m.alive.sum()) for p, m in tuned.branches(UnitMask)}


def test_the_last_choice_comes_with_the_last_update():
    """Whatever `every`: the run ends at the whole ratio."""
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "loraprune(rank=4, spare=0, every=4, ratio=0.5, units='channels')")
    tuned.total_steps = 6
    units = {g.out.path: g.units for g in groups(tuned.anatomy)[0] if g.kind == "channels"}
    for step in range(6):
        if step < 4:
            assert alive(tuned) == units
        else:
            r = 0.5 - 0.5 * (1 - (4 - 0.6) / (5.4 - 0.6)) ** 3
            assert alive(tuned) == {p: n - int(r * n + 1e-9) for p, n in units.items()}
        tuned.step(batch)
    assert alive(tuned) == {p: n - n // 2 for p, n in units.items()}


@pytest.mark.parametrize("units", ["heads", "channels", "both"])
def test_one_of_everything_that_is_asked_for_lives_and_nothing_else_is_touched(units):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, f"loraprune(rank=4, spare=0, every=1, ratio=0.9999999999999, "
                              f"units='{units}')")
    tuned.total_steps = 3
    want = {g.out.path: 1 for g in groups(tuned.anatomy)[0] if units in ("both", g.kind)}
    for _ in range(3):
        tuned.step(batch)
    assert alive(tuned) == want


def test_a_matrix_without_an_update_has_no_vote():
    """q and down alone are adapted: heads are judged by q, channels by down."""
    from dataclasses import replace as with_

    net, batch = tiny("llama")
    tuned = burnish.tune(net, "loraprune(rank=4, spare=0, every=1, targets='q,down')")
    tuned.total_steps = 3
    tuned.optimizer(lr=1e-2)
    handler = next(h for n, h in tuned.timeline.handlers if n == "loraprune")
    tuned.step(batch)
    tuned.loss(batch).backward()
    found = groups(tuned.anatomy)[0]
    for g in found:
        mine = with_(g, rows=tuple(m for m in g.rows if m[0].role == "q"),
                     columns=tuple(m for m in g.columns if m[0].role == "down"))
        torch.testing.assert_close(handler.now(g).double(), reference_scores(net, tuned, mine),
                                   rtol=1e-4, atol=1e-6)
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "loraprune(rank=4, spare=0, every=1, targets='q')")
    tuned.total_steps = 3
    for _ in range(3):
        tuned.step(batch)
    units = {g.out.path: (g.kind, g.units) for g in groups(tuned.anatomy)[0]}
    for path, n in alive(tuned).items():
        kind, whole = units[path]
        assert n == whole if kind == "channels" else n < whole


def test_a_model_whose_blocks_are_all_spared_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    net = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(burnish.RecipeError, match="outside the 10% of its blocks"):
        burnish.tune(net, "loraprune(rank=4)")


def test_a_state_that_is_loaded_goes_on_from_its_importance():
    _, _, tuned = pruned("llama", steps=3)
    handler = next(h for n, h in tuned.timeline.handlers if n == "loraprune")
    state = handler.state_dict()
    assert state["total"] == 3 and all(s is not None for s in state["importance"])
    other, _ = tiny("llama")
    again = burnish.tune(other, "loraprune(rank=4, every=1, spare=0)")
    again.optimizer(lr=1e-3)
    fresh = next(h for n, h in again.timeline.handlers if n == "loraprune")
    fresh.load_state_dict(state)
    assert fresh.total == 3
    for a, b in zip(fresh.importance, state["importance"], strict=True):
        assert torch.equal(a, b)


def test_a_linear_is_the_equation():
    """y = x W^T + (alpha / rank) x A^T B^T, with gradients, in float64."""
    net, _ = tiny("llama", dtype=torch.float64)
    tuned = burnish.tune(net, "loraprune(rank=4, alpha=6, spare=0)", head=False)
    linear = net.model.layers[0].self_attn.q_proj
    term = linear.burnish.default["loraprune"].double()
    with torch.no_grad():
        term.B.normal_()
    x = torch.randn(5, linear.in_features, dtype=torch.float64, requires_grad=True)
    want = x @ linear.weight.detach().t() + 1.5 * x @ term.A.t() @ term.B.t()
    got = linear(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    g, inputs = torch.randn_like(want), (x, term.A, term.B)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    assert all(m.alive.all() for _, m in tuned.branches(UnitMask))


def test_dropout_acts_on_what_the_factors_read():
    torch.manual_seed(0)
    net, _ = tiny("llama", dtype=torch.float64)
    burnish.tune(net, "loraprune(rank=4, alpha=6, spare=0, dropout=0.5)", head=False)
    linear = net.model.layers[0].self_attn.q_proj
    term = linear.burnish.default["loraprune"].double()
    nn.init.normal_(term.B)
    x = torch.randn(5, linear.in_features, dtype=torch.float64)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5, True)
    torch.manual_seed(3)
    torch.testing.assert_close(
        linear(x), x @ linear.weight.t() + 1.5 * dropped @ term.A.t() @ term.B.t())


def test_rows_of_a_fused_weight_that_have_an_update_of_their_own():
    """v alone of a fused q, k, v: its heads by its rows, and nobody else's."""
    net, batch = tiny("gpt2")
    tuned = burnish.tune(net, "loraprune(rank=4, spare=0, every=1, targets='v', units='heads')")
    tuned.total_steps = 4
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    tuned.loss(batch).backward()
    terms = dict(tuned.terms(nn.Module))
    handler = next(h for n, h in tuned.timeline.handlers if n == "loraprune")
    for g in (g for g in groups(tuned.anatomy)[0] if g.kind == "heads"):
        ((v, width),) = [m for m in g.rows if m[0].role == "v"]
        term = terms[v.name]
        A, B, dA, dB = (t.detach().double() for t in (term.A, term.B, term.A.grad, term.B.grad))
        W = net.get_submodule(v.path).weight.detach().double().t()[v.rows[0]: v.rows[1]]
        G = dB @ A + B @ dA - dB @ dA
        units = (G * (W + 4 * B @ A)).abs().sum(1).view(g.units, width).sum(1)
        torch.testing.assert_close(handler.now(g).double(), units / units.norm(), rtol=1e-4,
                                   atol=1e-6)


def test_a_gradient_of_zero_is_no_importance_and_not_nan():
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "loraprune(rank=4, spare=0, every=1)")
    tuned.optimizer(lr=1e-2)
    (tuned.loss(batch) * 0).backward()
    handler = next(h for n, h in tuned.timeline.handlers if n == "loraprune")
    for g in groups(tuned.anatomy)[0]:
        assert torch.equal(handler.now(g), torch.zeros(g.units))
