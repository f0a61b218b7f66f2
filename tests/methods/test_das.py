"""DAS: blocks that are skipped, written out in float64; the gates; a useless block is found."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import burnish
from burnish.core.recipe import parse
from burnish.methods.controller.das import Skips
from burnish.testing import stir
from burnish.testing.models import tiny

STACK = {"bert": "bert.encoder.layer", "vit": "vit.layers", "llama": "model.layers",
         "timm_qkv": "blocks", "gpt2": "transformer.h", "encoder": "encoder.layers"}
NAMES = ("norm_in.weight", "norm_in.bias", "down.weight", "down.bias", "up.weight", "up.bias")


class Instead(nn.Module):
    """``x + s (W_up relu(W_down LN(x) + b) + b')`` in the place of a block."""

    def __init__(self, letters, s, block):
        super().__init__()
        self.letters, self.s, self.block = letters, s, [block]

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    def forward(self, x, *args, **kw):
        g, h, A, a, B, b = self.letters
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True)
                                              + 1e-5).sqrt() * g + h
        return x + self.s * (F.relu(z @ A.t() + a) @ B.t() + b)


@pytest.mark.parametrize("model", list(STACK))
def test_the_equation_written_out(beside, model):
    """The first block is skipped before a run has said which; the other runs, its adapter rests."""
    one = beside(model, "das(layers=1, bottleneck=4, scale=2.0)")
    stack = one.base.get_submodule(STACK[model])
    letters = [one.theta[f"{STACK[model]}.0", f"f.{n}"] for n in NAMES]
    stack[0] = Instead(letters, 2.0, stack[0])
    for d in (one.theta, one.own):
        for key in [k for k in d if ".1" in k[0]]:
            d.pop(key)
    one.agree()


def test_with_none_skipped_it_is_what_stands_beside_it():
    net, batch = tiny("bert")
    before = net.eval()(**batch).logits
    burnish.tune(net, "lora(rank=2) + das(layers=0)")
    assert torch.equal(net.eval()(**batch).logits, before)
    assert not any("das" in n for n, _ in net.named_parameters())
    tuned = burnish.tune(tiny("bert")[0], "lora(rank=2) + das(layers=0)")
    tuned.optimizer(lr=1e-3)
    assert not any(isinstance(h, Skips) for _, h in tuned.timeline.handlers)


class Toy(nn.Module):
    """Blocks of which the third adds nothing and the others a lot."""

    def __init__(self):
        super().__init__()
        base, _ = tiny("encoder")
        self.layers = nn.ModuleList(copy.deepcopy(base.encoder.layers[0]) for _ in range(4))
        self.head = nn.Linear(32, 3)
        for i, layer in enumerate(self.layers):
            for p in (layer.linear2.weight, layer.linear2.bias, layer.self_attn.out_proj.weight,
                      layer.self_attn.out_proj.bias):
                p.data = torch.randn_like(p) if i != 2 else torch.zeros_like(p)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_a_useless_block_is_found():
    torch.manual_seed(0)
    net = Toy()
    x = torch.randn(64, 6, 32)
    y = net(x).argmax(-1)                            # what the model says already
    tuned = burnish.tune(net, "das(layers=1, bottleneck=4, every=1, candidates=4, warmup=0.1, "
                              "search=0.8)", head=False)
    tuned.optimizer(lr=1e-4)
    tuned.total_steps = 30
    for _ in range(30):
        tuned.step((x, y), loss=lambda out, batch: F.cross_entropy(out, batch[1]))
    told = tuned.timeline.told()["das"]
    assert max(told["gates"], key=told["gates"].get) == "layers.2"
    assert told["skipped"] == ["layers.2"]
    assert (tuned.model.eval()(x).argmax(-1) == y).float().mean() > 0.95


def gates(tuned):
    return next(h for _, h in tuned.timeline.handlers if isinstance(h, Skips))


def test_the_gates_follow_the_equation():
    net, _ = tiny("vit", num_hidden_layers=4)
    tuned = burnish.tune(net, "das(layers=2, bottleneck=4)")
    tuned.optimizer(lr=1e-3)
    h = gates(tuned)
    names = list(h.blocks)
    h.gates = dict(zip(names, (0.5, -0.3, 0.0, 1.0), strict=True))
    sets = [frozenset(names[:2]), frozenset(names[1:3])]
    h.learn(sets, [0.9, 0.3])
    p = [1 / (1 + math.exp(-g)) for g in (0.5, -0.3, 0.0, 1.0)]
    want = [0.5 + 0.3 * p[0] * (1 - p[0]), -0.3, -0.3 * p[2] * (1 - p[2]), 1.0]
    assert list(h.gates.values()) == pytest.approx(want)
    assert h.settled() == [names[3], names[0]]


def test_what_is_skipped_when():
    """Uniform draws, draws by the gates with comparisons, and one set to the end; the loss of each
    candidate is that of the model with it left out."""
    net, batch = tiny("vit", num_hidden_layers=4, dropout=0.4)
    tuned = burnish.tune(net, "das(layers=2, bottleneck=4, every=2, warmup=0.25, search=0.75)",
                         head=False)
    tuned.optimizer(lr=1e-2)
    tuned.total_steps = 16
    net.train()                                      # candidates are compared without dropout
    h, live, compared = gates(tuned), [], []
    assert set(h.gates.values()) == {0.0}
    learn = h.learn
    h.learn = lambda sets, rewards: (compared.append((len(live), sets, rewards)),
                                     learn(sets, rewards))
    for _ in range(16):
        before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
        n = len(compared)
        tuned.step(batch)
        if len(compared) > n:
            _, sets, rewards = compared[-1]
            again, _ = tiny("vit", num_hidden_layers=4)
            other = burnish.tune(again, "das(layers=2, bottleneck=4)", head=False)
            again.load_state_dict(before, strict=False)
            mine = gates_of(other)
            for names, reward in zip(sets, rewards, strict=True):
                for path, m in mine.items():
                    m.skip(path in names)
                with torch.no_grad():
                    assert math.exp(-float(again.eval()(**batch).loss)) == pytest.approx(reward,
                                                                                        1e-4)
        live.append(frozenset(n for n, m in h.blocks.items() if m.on))
    assert [at for at, *_ in compared] == [4, 6, 8, 10]
    assert all(len(set(sets)) == len(sets) == 3 for _, sets, _ in compared)
    assert len(set(live[12:])) == 1 and len(set(live[:11])) > 1
    assert live[-1] == frozenset(h.settled()) and all(len(s) == 2 for s in live)


def test_draws_follow_the_gates_where_they_should():
    net, batch = tiny("vit", num_hidden_layers=4)
    tuned = burnish.tune(net, "das(layers=2, bottleneck=4, every=1, warmup=0.5, search=1.0)")
    tuned.optimizer(lr=1e-3)
    h = gates(tuned)
    names = list(h.gates)
    h.gates = dict(zip(names, (-40.0, 40.0, -40.0, 40.0), strict=True))
    sure = {names[1], names[3]}
    assert all(h.draw(step, nth, False) == sure for step in range(5) for nth in range(3))
    assert len({h.draw(step, 0, True) for step in range(20)}) > 3

    def live(step):
        h.step_begin(step)
        return {n for n, m in h.blocks.items() if m.on}

    h.start(40)
    assert [live(s) for s in range(20)] == [h.draw(s, 0, True) for s in range(20)]
    assert all(live(s) == sure for s in range(20, 40))
    h.start(None)                                    # nobody knows how long: gates from the first
    assert all(live(s) == sure for s in range(6))


@pytest.mark.parametrize("seed", range(4))
def test_sets_are_compared_once_an_update_and_drawn_by_the_gates(seed):
    net, batch = tiny("vit", num_hidden_layers=4)
    tuned = burnish.tune(net, "das(layers=1, bottleneck=4, every=1, candidates=3, "
                              f"seed={seed})")
    tuned.optimizer(lr=1e-3)
    h = gates(tuned)
    h.gates = dict(zip(h.gates, (2.0, -1.0, 0.5, -2.0), strict=True))
    want = list(dict.fromkeys(h.draw(0, nth, False) for nth in range(1, 60)))[:3]
    seen = []
    h.learn = lambda sets, rewards: seen.append(sets)
    tuned.backward(batch)
    tuned.backward(batch)                            # a second half of the same update
    assert seen == [want]


def test_what_rests_keeps_what_its_optimizer_knows():
    net, batch = tiny("vit", num_hidden_layers=3)
    tuned = burnish.tune(net, "das(layers=1, bottleneck=4, warmup=1.0, search=1.0)", head=False)
    optimizer = tuned.optimizer(lr=1e-3)
    h = gates(tuned)
    assert h.schedule._optimizer() is optimizer
    tuned.step(batch)
    one = next(n for n, m in h.blocks.items() if m.on)
    first = next(p for p in h.blocks[one].parameters())
    assert optimizer.state[first]
    h.set([n for n in h.blocks if n != one][:1])
    assert optimizer.state[first]


def test_it_begins_as_bert_does():
    net, _ = tiny("vit", num_hidden_layers=3)
    burnish.tune(net, "das(layers=1, bottleneck=64)")
    for n, p in net.named_parameters():
        if ".f." in n and "norm" not in n:
            assert not p.any() if n.endswith("bias") else 0.017 < float(p.detach().std()) < 0.023


def test_a_look_ahead_goes_round_the_blocks():
    net, _ = tiny("vit", num_hidden_layers=3)
    tuned = burnish.tune(net, "das(layers=2, bottleneck=4)")
    tuned.optimizer(lr=1e-3)
    h, seen = gates(tuned), []
    names = list(h.blocks)
    for step in range(3):
        h.rehearse(step)
        seen.append([names.index(n) for n, m in h.blocks.items() if m.on])
    assert seen == [[0, 1], [0, 2], [1, 2]]


def test_one_process_alone(monkeypatch):
    from burnish.methods.controller import das as module

    monkeypatch.setattr(module, "processes", lambda: 2)
    with pytest.raises(burnish.ConfigError, match="here are several"):
        burnish.tune(tiny("vit")[0], "das(layers=1)").optimizer(lr=1e-3)


def gates_of(tuned):
    from burnish.blocks.state.skipped import Skippable

    return {n.partition(".burnish.")[0]: m for n, m in tuned.model.named_modules()
            if isinstance(m, Skippable)}


def test_fewer_sets_than_asked_for_end_the_draws():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "das(layers=1, bottleneck=4, every=1, candidates=9)")
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)                                # two sets are all there are
    assert any(gates(tuned).gates.values())


def test_who_is_skipped_trains_alone_and_a_file_says_who(tmp_path):
    net, batch = tiny("vit", num_hidden_layers=3)
    tuned = burnish.tune(net, "das(layers=1, bottleneck=4)", head=False)
    stir(tuned)
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    gates(tuned).set(["vit.layers.1"])
    for p in tuned.model.parameters():
        p.grad = None
    tuned.loss(batch).backward()
    assert {n.partition(".burnish")[0] for n, p in tuned.named_parameters() if p.grad is not None} \
        == {"vit.layers.1"}
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit", num_hidden_layers=3)[0], tmp_path / "a")
    assert torch.equal(again.model.eval()(**batch).logits, net.eval()(**batch).logits)
    assert [m.out() for m in gates_of(again).values()] == [False, True, False]


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_text_written_word_by_word_is_the_whole_one(skipped):
    """A cache counts the tokens of a skipped first layer."""
    net, _ = tiny("llama", dtype=torch.float64, num_hidden_layers=3)
    tuned = burnish.tune(net, "das(layers=1, bottleneck=4)")
    stir(tuned, size=0.3)
    for i, m in enumerate(gates_of(tuned).values()):
        m.skip(i == skipped)
    ids = torch.arange(7).unsqueeze(0)
    first = net.eval()(input_ids=ids[:, :4], use_cache=True)
    rest = net(input_ids=ids[:, 4:6], past_key_values=first.past_key_values, use_cache=True)
    last = net(input_ids=ids[:, 6:], past_key_values=rest.past_key_values)
    got = torch.cat([first.logits, rest.logits, last.logits], 1)
    torch.testing.assert_close(got, net(input_ids=ids).logits, rtol=1e-8, atol=1e-10)


def test_counts_and_the_work_of_a_skipped_block():
    """444,960 numbers at d = 768; of the work a block's is gone and an adapter's there."""
    m = parse("das")[0]
    assert m.count(768) == 444_960 and parse("das(bottleneck=96)")[0].count(768) == 149_856
    flops = []
    for K in (0, 1, 2):
        net, batch = tiny("vit", num_hidden_layers=3)
        burnish.tune(net, f"lora(rank=2) + das(layers={K}, bottleneck=4)")
        net.eval()(**batch)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(**batch)
        flops.append(counter.get_total_flops())
    assert flops[0] > flops[1] > flops[2] and flops[0] - flops[1] == flops[1] - flops[2]
    adapter = 2 * 2 * (2 * 17) * 32 * 4
    assert flops[0] - flops[1] > 20 * adapter
    net, _ = tiny("vit", num_hidden_layers=3)
    tuned = burnish.tune(net, "das(layers=1, bottleneck=4)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == 3 * (2 * 32 * 4 + 4 + 3 * 32)


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "das(layers=2)", "one at least is to run"), ("vit", "das(layers=-1)", "0 or more"),
    ("vit", "das(bottleneck=0)", "1 or more"), ("vit", "das(candidates=1)", "2 candidates"),
    ("vit", "das(every=0)", "1 or more"), ("vit", "das(warmup=0.5)", "warmup <= search"),
    ("vit", "das(warmup=-0.1)", "warmup <= search"), ("vit", "das(search=1.5)", "warmup <= search"),
    ("t5", "das(layers=1)", "one width"), ("vit", "das(layers=1) + adapterdrop", "live blocks"),
    ("vit", "das(layers=1, targets='fc1')", "takes no targets"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_the_defaults():
    least = {"layers": 0, "bottleneck": 1, "every": 1, "candidates": 2, "warmup": 0.0,
             "search": 1.0}
    said = ", ".join(f"{k}={v}" for k, v in least.items())
    assert parse(f"das({said})")[0].changed() == least
    m = parse("das")[0]
    assert (m.layers, m.bottleneck, m.scale, m.warmup, m.search, m.every, m.candidates, m.seed) == \
        (4, 288, 1.0, 0.1, 0.3, 10, 3, 0)


def test_what_stands_in_a_skipped_block_rests_with_it():
    """It has no gradient, so nothing of it moves, and the first step is no error; its turn comes
    when its block runs."""
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + das(layers=1, bottleneck=4, warmup=1.0, search=1.0)",
                         head=False)
    tuned.total_steps = 6
    stir(tuned)
    tuned.optimizer(lr=1e-2)
    before = {n: p.detach().clone() for n, p in net.named_parameters() if ".lora." in n}
    assert before
    where, seen = [m for _, m in tuned.timeline.handlers if isinstance(m, Skips)][0], set()
    for _ in range(6):
        skipped = {n for n, m in where.blocks.items() if bool(m.skipped)}
        tuned.step(batch)                            # (its end decides who is skipped next)
        moved = {b for b in where.blocks for n, p in net.named_parameters()
                 if n.startswith(f"{b}.") and n in before and not torch.equal(p, before[n])}
        assert moved == where.blocks.keys() - skipped
        before = {n: p.detach().clone() for n, p in net.named_parameters() if n in before}
        seen |= skipped
    assert seen == where.blocks.keys()
