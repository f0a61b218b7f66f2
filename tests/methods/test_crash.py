"""CRaSh: CKA and clusters against plain loops, the emulator block by block, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.choose.similar import Cka, by_twos, clustered, runs_of, spread
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.crash import Crash
from burnish.testing import tiny

OFFSITE = {"outer": True, "cluster": "turn", "share": False}


def made(name="llama", layers=7):
    net, batch = tiny(name, dtype=torch.float64, num_hidden_layers=layers)
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net.eval(), batch


def plain_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.t() @ x).norm() ** 2 / ((x.t() @ x).norm() * (y.t() @ y).norm()))


def streamed(*parts):
    found = Cka()
    for states in parts:
        found.add(states)
    return found.values()


def test_cka_is_the_equation_of_all_rows_and_knows_no_rotation():
    torch.manual_seed(0)
    x, y = (torch.randn(50, 6, dtype=torch.float64) + 3 for _ in range(2))
    z = y + x
    got = streamed([x[:20], y[:20], z[:20]], [x[20:], y[20:], z[20:]])
    assert got == pytest.approx([plain_cka(x, y), plain_cka(y, z)], rel=1e-10)
    assert 0.01 < got[0] < 0.9
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert streamed([x, 3 * x @ q - 5]) == pytest.approx([1.0], abs=1e-12)
    assert streamed([x, torch.ones_like(x)]) == [0.0]


def test_clusters_are_intervals_that_cover_all_blocks():
    torch.manual_seed(0)
    for n in (5, 9, 14):
        alike = torch.rand(n - 1).tolist()
        for alone in ((0, n - 1), (0, 2, n - 1), (1,)):
            least = len(runs_of(n, alone))
            for many in range(least, n - len(alone) + 1):
                got = clustered(alike, alone, many)
                assert [i for a, b in got for i in range(a, b + 1)] == list(range(n))
                assert len(got) == many + len(alone)
                assert all((i, i) in got for i in alone)
                borders = [alike[b] for (_, b), (c, _) in zip(got, got[1:], strict=False)
                           if not {b, c} & set(alone)]
                inside = [alike[i] for a, b in got for i in range(a, b)]
                assert not borders or not inside or max(borders) <= min(inside)


def test_the_most_alike_are_joined_first_and_pairs_are_in_order():
    assert clustered([.1, .9, .2, .8, .3], (), 4) == [(0, 0), (1, 2), (3, 4), (5, 5)]
    assert clustered([.5, .5, .5], (), 3) == [(0, 1), (2, 2), (3, 3)]
    assert by_twos(8, (0, 7)) == [(0, 0), (1, 2), (3, 4), (5, 6), (7, 7)]
    assert by_twos(6, (0, 4)) == [(0, 0), (1, 2), (3, 3), (4, 4), (5, 5)]
    assert spread(32, 4) == (0, 10, 21, 31) and spread(5, 1) == (0,)
    assert Crash(layers=3, outer=True).trained(9) == (0, 1, 8)
    assert Crash(layers=2, outer=True).trained(6) == (0, 5)
    assert Crash().many(32) == 22 and Crash(layers=2).many(7) == 3
    assert Crash(layers=3).many(5) == 2 and Crash(intervals=25).many(32) == 25


def test_its_settings_and_the_least_of_them():
    assert parse("crash")[0].settings() == {"targets": None, "layers": 4, "intervals": None,
                                            "outer": False, "cluster": "cka", "share": True}
    one = Crash(layers=1, intervals=1)                   # all but the first are one cluster
    assert one.trained(5) == (0,) and one.many(5) == 1


def run(net, ids, blocks):
    """The llama by hand, of these of its blocks."""
    m = net.model
    x = m.embed_tokens(ids)
    n = ids.shape[1]
    at = torch.arange(n)[None]
    rope = m.rotary_emb(x, at)
    mask = torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    seen = []
    for i in blocks:
        x = m.layers[i](x, attention_mask=mask, position_embeddings=rope, position_ids=at)
        x = x[0] if isinstance(x, tuple) else x
        seen.append(x)
    return net.lm_head(m.norm(x)), seen


@pytest.mark.parametrize("settings", [{"layers": 2, "intervals": 2}, {"layers": 3, "intervals": 3},
                                      {"layers": 2, "intervals": 3, "share": False},
                                      {"layers": 2, **OFFSITE}])
@torch.no_grad()
def test_the_emulator_runs_the_kept_blocks_where_the_others_stood(settings):
    net, batch = made()
    ids = batch["input_ids"]
    given = {"input_ids": ids}
    before = {n: p.clone() for n, p in net.state_dict().items()}
    e = Crash(**settings).lifecycle(net, [given])
    _, states = run(net, ids, range(7))
    want = [plain_cka(a.reshape(-1, 32), b.reshape(-1, 32))
            for a, b in zip(states, states[1:], strict=False)]
    assert e.alike == pytest.approx(want, rel=1e-9)
    assert e.kept == tuple((a + b) // 2 for a, b in e.clusters)
    order = e.kept if not settings.get("share", True) else \
        [k for k, (a, b) in zip(e.kept, e.clusters, strict=True) for _ in range(a, b + 1)]
    torch.testing.assert_close(e.model(**given).logits, run(net, ids, order)[0])
    cached = e.model(input_ids=ids[:, :3], use_cache=True)
    more = e.model(input_ids=ids[:, 3:], past_key_values=cached.past_key_values)
    torch.testing.assert_close(more.logits, run(net, ids, order)[0][:, 3:])
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())
    one = sum(p.numel() for p in net.model.layers[0].parameters())
    left_out = 7 - len(e.kept)
    assert sum(p.numel() for p in e.model.parameters()) == \
        sum(p.numel() for p in net.parameters()) - left_out * one
    assert left_out and not {id(p) for p in net.parameters()} & {
        id(p) for p in e.model.parameters()}


def test_blocks_are_joined_by_their_likeness_or_by_twos():
    net, batch = made(layers=8)
    given = [{"input_ids": batch["input_ids"]}]
    alike = Crash(layers=2).lifecycle(net, given).alike
    for intervals in (2, 3, 4):
        e = Crash(layers=2, outer=True, intervals=intervals).lifecycle(net, given)
        assert list(e.clusters) == clustered(list(alike), (0, 7), intervals)
    e = Crash(layers=2, outer=True, cluster="turn").lifecycle(net, given)
    assert list(e.clusters) == by_twos(8, (0, 7)) != clustered(list(alike), (0, 7), 3)


def test_a_copy_of_the_emulator_is_plugged_in_as_it_is_and_not_the_emulator_s_own():
    net, batch = made()
    method = Crash(layers=2)
    e = method.lifecycle(net, [{"input_ids": batch["input_ids"]}])
    far = copy.deepcopy(e.model)
    w = far.get_submodule(e.path(0)).mlp.up_proj.weight
    w.data += 1
    own = net.model.layers[0].mlp.up_proj.weight.detach().clone()
    method.plug(net, e, far)
    assert torch.equal(net.model.layers[0].mlp.up_proj.weight, w)
    method.plug(net, e)
    assert torch.equal(net.model.layers[0].mlp.up_proj.weight, own)


def test_four_of_the_blocks_of_opt_train_as_many_numbers_as_published():
    from transformers import OPTConfig, OPTForCausalLM

    with torch.device("meta"):
        net = OPTForCausalLM(OPTConfig(hidden_size=4096, num_hidden_layers=32, ffn_dim=16384,
                                       num_attention_heads=32, word_embed_proj_dim=4096))
    blocks = ",".join(f"model.decoder.layers.{k}" for k in Crash().trained(32))
    assert burnish.simulate(net, f"full(targets='{blocks}')", (1, 8)).trainable == \
        4 * (12 * 4096**2 + 13 * 4096) == 805_519_360


def test_padding_has_no_say():
    net, batch = made(layers=4)
    ids = batch["input_ids"][:2]
    mask = torch.ones_like(ids)
    longer = torch.cat([ids, ids[:, :2]], 1)
    padded = {"input_ids": longer,
              "attention_mask": torch.cat([mask, torch.zeros_like(mask[:, :2])], 1)}
    method = Crash(layers=2)
    got = method.lifecycle(net, [padded]).alike
    assert got == pytest.approx(method.lifecycle(net, [{"input_ids": ids}]).alike, rel=1e-9)
    assert got != pytest.approx(method.lifecycle(net, [{"input_ids": longer}]).alike, rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("settings", [{}, OFFSITE])
def test_plugged_in_untrained_it_is_the_model_bit_for_bit_and_trained_it_has_the_blocks(
        name, settings):
    net, batch = tiny(name, **({"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}))
    base = copy.deepcopy(net)
    method = Crash(layers=3, **settings)
    e = method.lifecycle(net, [batch])
    method.plug(net, e)
    assert all(torch.equal(p, base.state_dict()[n]) for n, p in net.state_dict().items())
    tuned = burnish.tune(e.model, f"full(targets={e.targets!r})", head=False)
    blocks = [m for _, m in net.named_modules() if isinstance(m, torch.nn.ModuleList)][0]
    assert sum(p.numel() for p in tuned.parameters()) == \
        3 * sum(p.numel() for p in blocks[0].parameters())
    tuned.optimizer(lr=1e-2)
    first = float(tuned.step(batch))
    for _ in range(5):
        last = float(tuned.step(batch))
    assert last < first
    method.plug(net, e, tuned)
    stack = [n for n, m in net.named_modules() if m is blocks][0]
    back = e.model.state_dict()
    for n, p in net.state_dict().items():
        number = int(n[len(stack) + 1:].split(".")[0]) if n.startswith(f"{stack}.") else None
        if number in e.trained:
            assert torch.equal(p, back[n.replace(f"{stack}.{number}.", f"{e.path(number)}.")])
        else:
            assert torch.equal(p, base.state_dict()[n])
    assert not all(torch.equal(p, base.state_dict()[n]) for n, p in net.state_dict().items())


def test_a_low_rank_part_and_a_head_return():
    net, batch = tiny("vit", num_hidden_layers=5)
    base = copy.deepcopy(net)
    method = Crash(layers=2)
    e = method.lifecycle(net, [batch])
    tuned = burnish.tune(e.model, f"lora(rank=2, targets={e.linears!r})", head=True)
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    with pytest.raises(ConfigError, match="merge what was joined"):
        method.plug(net, e, tuned)
    method.plug(net, e, tuned.merge())
    changed = {n for n, p in net.state_dict().items() if not torch.equal(p, base.state_dict()[n])}
    assert {n.split(".")[2] for n in changed if n.startswith("vit.layers.")} == {"0", "4"}
    assert {n.split(".")[0] for n in changed} == {"vit", "classifier"}


def test_what_trained_elsewhere_has_no_place():
    net, batch = made()
    before = copy.deepcopy(net.state_dict())
    method = Crash(layers=2)
    e = method.lifecycle(net, [batch])
    e.model.get_submodule(e.path(6)).mlp.up_proj.weight.data += 1
    e.model.model.norm.weight.data += 1
    with pytest.raises(ConfigError, match="model.norm.weight has been trained"):
        method.plug(net, e)
    assert all(torch.equal(before[n], p) for n, p in net.state_dict().items())


@pytest.mark.parametrize("text, said", [
    ("crash(layers=0)", "of at least 1"), ("crash(intervals=0)", "of at least 1"),
    ("crash(cluster='turn', intervals=2)", "does nothing"), ("crash(targets='q')", "does nothing")])
def test_settings_that_cannot_act_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse(text)


def test_models_that_cannot_be_emulated_are_refused():
    net, batch = made()
    for settings, said in (({"layers": 7}, "layers=6 or less"),
                           ({"intervals": 2, "layers": 4}, "make from 3 to 3 clusters"),
                           ({"intervals": 6, "layers": 2}, "from 1 to 5 clusters, not 6")):
        with pytest.raises(ConfigError, match=said):
            Crash(**settings).lifecycle(net, [batch])
    with pytest.raises(ConfigError, match="there are none"):
        Crash(layers=2).lifecycle(net, [])
    with pytest.raises(ConfigError, match="merge or detach"):
        Crash(layers=2).lifecycle(burnish.tune(copy.deepcopy(net), "lora").model, [batch])
    with pytest.raises(ConfigError, match="one stack of blocks"):
        Crash(layers=2).lifecycle(tiny("mlp")[0], [tiny("mlp")[1]])
    net.model.layers[3].mlp.up_proj = torch.nn.Linear(32, 5)
    with pytest.raises(ConfigError, match="block 3 has other tensors"):
        Crash(layers=2).lifecycle(net, [batch])
