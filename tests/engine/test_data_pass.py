"""What methods read before they start: shared inputs, rounds, and a model left as it was."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.choose.inputs import Norms, NormsAndGradient
from burnish.blocks.choose.observe import Covariance, Gradient, Spectrum
from burnish.blocks.weight.factor import Chain
from burnish.core.anatomy import Anatomy
from burnish.core.batches import cut
from burnish.core.errors import ConfigError, DataError
from burnish.core.method import Method
from burnish.core.registry import register
from burnish.engine.observe import Batches, Pass, valid_tokens
from burnish.testing.models import tiny


@dataclass(frozen=True, kw_only=True)
class Reader(Method):
    """Reader: a chain that remembers what it was shown."""

    def observe(self, place):
        return Covariance(place.inp)

    def delta(self, site):
        SHOWN.append((site.place.name, site.seen and site.seen.value.clone()))
        return Chain(site.place, 2)


@dataclass(frozen=True, kw_only=True)
class Steepest(Method):
    """Steepest: reads gradients of the loss by the weight."""

    def observe(self, place):
        return Gradient(place.out, place.inp)

    def delta(self, site):
        SHOWN.append((site.place.name, site.seen and site.seen.value.clone()))
        return Chain(site.place, 2)


SHOWN: list = []
register(Reader, "reader")
register(Steepest, "steepest")


@pytest.fixture(autouse=True)
def nothing_shown():
    SHOWN.clear()


def the_pass(model, part, batch, budget=None):
    net, data = tiny(model)
    part = burnish.parse(part)[0]
    places = [p for p in Anatomy.of(net).places if p.kind in ("linear", "conv1d")
              and not p.role == "head" and p.block is not None]
    return net, places, Pass(net, part, places, Batches([data] if batch is None else batch),
                             lambda b, loss=False: net(**b).loss if loss else net(**b),
                             budget=budget)


def test_q_k_and_v_read_one_tensor_and_share_one_statistic():
    _, places, p = the_pass("llama", "reader", None, budget=1 << 30)
    (seen, _), = p.rounds()
    by = {x.name: s for x, s in seen.items()}
    layer = "model.layers.0."
    q, k, v = (by[f"{layer}self_attn.{r}_proj.weight"] for r in "qkv")
    gate, up, down = (by[f"{layer}mlp.{r}_proj.weight"] for r in ("gate", "up", "down"))
    assert q is k is v and gate is up
    assert len({id(s) for s in (q, by[f"{layer}self_attn.o_proj.weight"], gate, down)}) == 4
    assert set(seen) == set(places)


def test_what_is_shown_is_what_the_untouched_model_computes():
    net, batch = tiny("bert")
    net.eval()
    inputs = {}
    for name, m in net.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda m, a, name=name: inputs.setdefault(name, a[0]))
    with torch.no_grad():
        net(**batch)
    tuned_net, _ = tiny("bert")
    burnish.tune(tuned_net, "reader", calibration=[batch])
    valid = valid_tokens(batch)
    assert len(SHOWN) > 6
    for name, value in SHOWN:
        x = inputs[name.removesuffix(".weight")]
        want = torch.zeros_like(value)
        for i in range(len(x)):
            X = x[i] if valid is None else x[i][valid[i]]
            want += X.t() @ X
        torch.testing.assert_close(value, want / len(x))


def test_gradients_are_those_of_the_untouched_model():
    net, batch = tiny("gpt2")
    net.eval()
    net(**batch).loss.backward()
    tuned_net, _ = tiny("gpt2")
    burnish.tune(tuned_net, "steepest", calibration=[batch, batch])
    for name, value in SHOWN:
        torch.testing.assert_close(value, net.get_parameter(name).grad.t())
    assert all(p.grad is None for p in tuned_net.parameters())


def test_rounds_fit_the_budget_and_free_what_was_read():
    _, places, p = the_pass("llama", "reader", None, budget=2 * 4 * 32 * 32)
    alive, rounds, got = [], 0, set()
    for seen, _ in p.rounds():
        rounds += 1
        gc.collect()
        assert not [r for r in alive if r() is not None], "the last round still stands"
        stats = {id(s): s for s in seen.values()}
        assert len(stats) == 1 or sum(s.nbytes for s in stats.values()) <= 2 * 4 * 32 * 32
        alive = [weakref.ref(s) for s in stats.values()]
        got |= set(seen)
        seen.clear()
        del stats, seen
    assert rounds > 2 and got == set(places)


def test_the_model_is_left_as_it_was():
    net, batch = tiny("llama")
    net.train()
    net.model.layers[0].mlp.eval()
    modes = [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    state = torch.get_rng_state()
    p = Pass(net, burnish.parse("steepest")[0],
             [x for x in Anatomy.of(net).places if x.kind == "linear" and x.block is not None],
             Batches([batch]), lambda b, loss=False: net(**b).loss)
    list(p.rounds())
    assert [m.training for m in net.modules()] == modes
    assert [q.requires_grad for q in net.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert not any(q._post_accumulate_grad_hooks for q in net.parameters())


def test_a_second_adapter_reads_the_base_not_the_first():
    net, batch = tiny("llama")
    burnish.tune(net, "reader", calibration=[batch])
    first = dict(SHOWN)
    SHOWN.clear()
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=4)")
    for _ in range(3):
        tuned.step(batch)
    tuned.add("second", "reader", calibration=[batch])
    assert SHOWN and all(torch.equal(first[n], v) for n, v in SHOWN)


def test_a_generator_serves_every_round_and_every_part():
    net, batch = tiny("llama")
    burnish.tune(net, "reader(targets='q') + reader(targets='down')",
                 calibration=(b for b in [batch, batch]))
    assert len(SHOWN) == 4 and all(v is not None for _, v in SHOWN)


def test_without_data_it_says_what_to_give():
    net, _ = tiny("llama")
    with pytest.raises(ConfigError, match="reader reads data before it starts.*calibration"):
        burnish.tune(net, "reader")
    assert not [n for n in net.state_dict() if "burnish" in n]


def test_data_that_reach_nothing_are_an_error():
    net, batch = tiny("llama")
    with pytest.raises(DataError, match="holds no batch"):
        burnish.tune(net, "reader", calibration=[])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(DataError, match="never reach idle"):
        burnish.tune(Two(), "reader", targets="used,idle", calibration=[torch.randn(2, 4)])


def test_a_load_and_a_simulation_need_no_data(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "reader", calibration=[batch])
    tuned.step(batch)
    tuned.save(tmp_path / "a")
    SHOWN.clear()
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    assert SHOWN and all(v is None for _, v in SHOWN)
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)
    assert burnish.simulate(tiny("llama")[0], "reader", batch).peak_bytes > 0


def test_samples_are_counted_and_the_last_batch_is_cut():
    data = [{"x": torch.arange(4)}, {"x": torch.arange(4, 8)}]
    b = Batches(data)
    assert [v["x"].tolist() for v in b.first(6)] == [[0, 1, 2, 3], [4, 5]]
    assert [v["x"].tolist() for v in b.first(None)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [t.tolist() for t in cut((torch.arange(3), torch.arange(3)), 2)] == [[0, 1], [0, 1]]


def test_tokens_that_are_padding_or_not_learnt_do_not_count():
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0]]),
             "labels": torch.tensor([[-100, 5, 6, -100]])}
    assert valid_tokens(batch).tolist() == [[False, True, True, False]]
    assert valid_tokens({"attention_mask": torch.tensor([[1, 0]])}).tolist() == [[True, False]]
    assert valid_tokens({"pixel_values": torch.zeros(2, 3)}) is None
    all_hidden = {"labels": torch.full((1, 2), -100)}
    assert valid_tokens(all_hidden) is None


def test_a_module_called_twice_is_not_taken_for_its_neighbour():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + self.a(y)

    net, x = Twice(), torch.randn(5, 4)
    with torch.no_grad():
        y = net.a(x)
    burnish.tune(net, "reader", targets="a,b", calibration=[x])
    shown = dict(SHOWN)
    torch.testing.assert_close(shown["b.weight"], y.t() @ y / 5)
    torch.testing.assert_close(shown["a.weight"], (x.t() @ x + y.t() @ y) / 10)


@dataclass(frozen=True, kw_only=True)
class Heavy(Method):
    """Heavy: reads weights, and the input of the head where it is told to."""

    inputs: bool = False

    def observe(self, place):
        return Covariance(place.inp) if self.inputs and "lm_head" in place.name else Spectrum(2)

    def settle(self, seen):
        ASKED.append({p.name: s.value.clone() if s.reads == "weight" else None
                      for p, s in seen.items()})
        return {p: {"rank": 3} for p in seen}

    def delta(self, site):
        SHOWN.append((site.place.name, site.seen and site.seen.value.clone()))
        return Chain(site.place, site.settled["rank"])


ASKED: list = []
register(Heavy, "heavy")


def test_a_statistic_of_weights_needs_no_data():
    ASKED.clear()
    net, batch = tiny("llama")
    ran = []
    net.register_forward_pre_hook(lambda *_: ran.append(1))
    tuned = burnish.tune(net, "heavy", targets="q,down")
    assert not ran and len(ASKED) == 1 and len(SHOWN) == 4
    for name, left in SHOWN:
        S = torch.linalg.svdvals(net.get_parameter(name))
        want = float(S[2:].square().sum() / S.square().sum())
        assert float(left) == pytest.approx(want, abs=1e-5)
        assert float(ASKED[0][name]) == float(left)
    assert {t.A.shape[0] for _, t in tuned.terms(Chain)} == {3}


def test_weights_and_inputs_in_one_part():
    ASKED.clear()
    net, batch = tiny("llama", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match="heavy reads data"):
        burnish.tune(net, "heavy(inputs=True)", targets="q,lm_head")
    burnish.tune(net, "heavy(inputs=True)", targets="q,lm_head", calibration=[batch])
    shown = dict(SHOWN)
    assert len(shown) == 3 and shown["lm_head.weight"].shape == (32, 32)
    assert all(v.dim() == 0 for n, v in shown.items() if n != "lm_head.weight")


def test_a_weight_that_waits_in_its_file_is_read_for_its_statistic(tmp_path):
    from burnish.core.unread import is_unread, mark

    net, _ = tiny("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    whole, p = net.get_parameter(name).detach().clone(), net.get_parameter(name)
    reads = []

    class File:
        def read(self):
            reads.append(1)
            return whole.clone()

    p.data = torch.full((), float("nan")).expand(whole.shape)
    mark(p, File())
    assert is_unread(net)
    burnish.tune(net, "heavy", targets="down")
    S = torch.linalg.svdvals(whole)
    assert float(dict(SHOWN)[name]) == pytest.approx(
        float(S[2:].square().sum() / S.square().sum()), abs=1e-5)
    assert len(reads) == 3                       # its statistic, its term, and for good
    assert torch.equal(net.get_parameter(name), whole)


@dataclass(frozen=True, kw_only=True)
class Turns(Method):
    """Turns: what it reads stands in its setting."""

    turns: str = "budget"

    def observe(self, place):
        return Norms(place.inp, self.turns)


register(Turns, "turns")


@pytest.mark.parametrize("turns, rounds", [("once", [14]), ("blocks", [7, 7])])
def test_turns_by_block_or_all_at_once_whatever_the_budget(turns, rounds):
    _, places, p = the_pass("llama", f"turns(turns='{turns}')", None, budget=1)
    found = [dict(seen) for seen, _ in p.rounds()]
    assert [len(f) for f in found] == rounds and {k for f in found for k in f} == set(places)
    assert all(len({k.block for k in f}) == 1 for f in found) == (turns == "blocks")
    _, _, p = the_pass("llama", "turns", None, budget=4 * 32)
    assert len([1 for _ in p.rounds()]) == 8


def test_inputs_and_gradients_are_read_in_one_pass():
    @dataclass(frozen=True, kw_only=True)
    class Both(Method):
        """Both: inputs and gradients."""

        def observe(self, place):
            return NormsAndGradient(place.out, place.inp, "l2")

    register(Both, "both")
    net, places, p = the_pass("llama", "both", None, budget=1 << 30)
    (seen, _), = p.rounds()
    assert len({id(s) for s in seen.values()}) == len(places), "a gradient is one place's alone"
    batch = tiny("llama")[1]
    want = {q: torch.zeros(q.out, q.inp) for q in places}
    inputs = {q: [] for q in places}
    for q in places:
        net.get_submodule(q.path).register_forward_pre_hook(
            lambda m, a, q=q: inputs[q].append(a[0].detach()[0].square().sum(0)))
    for i in range(2):
        net.zero_grad()
        net(**{k: v[i : i + 1] for k, v in batch.items()}).loss.backward()
        for q in places:
            want[q] += net.get_submodule(q.path).weight.grad.square() / 2
    for q in places:
        torch.testing.assert_close(seen[q].gradient, want[q].sqrt(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(seen[q].square, sum(inputs[q]) / 2)
