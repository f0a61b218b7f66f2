"""Gradient checkpointing as a part of a recipe: its segments, what they keep, and refusals."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import burnish
from burnish.core.anatomy import Anatomy
from burnish.methods.activations.checkpoint import Checkpoint, least
from burnish.testing.models import tiny

D, TOKENS = 16, 8


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Tower(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Mlp() for _ in range(n)), nn.Linear(D, 2)

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return self.head(x)


def tower(n):
    torch.manual_seed(0)
    return Tower(n), (torch.randn(4, TOKENS, D), )


def square(out, batch):
    return out.square().mean()


def gradients(net, recipe, batch, **kw):
    tuned = burnish.tune(net, recipe, **kw)
    torch.manual_seed(5)
    (tuned.loss(batch) if isinstance(batch, dict) else square(net(*batch), batch)).backward()
    return {n: p.grad for n, p in tuned.named_parameters()}


@pytest.mark.parametrize("model", ["vit", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("given", ["every=2", "every=None", "mode='selective'"])
def test_gradients_are_those_without_it(model, given):                          # findings 3.9
    recipe = "lora(rank=2, dropout=0.2)"
    want = gradients(*_twin(model, recipe))
    one = gradients(*_twin(model, f"{recipe} + checkpoint"))
    got = gradients(*_twin(model, f"{recipe} + checkpoint({given})"))
    assert got.keys() == want.keys() and want
    for n in want:
        assert torch.equal(got[n], one[n]), n
        torch.testing.assert_close(got[n], want[n], rtol=2e-5, atol=1e-6)


def _twin(model, recipe):
    net, batch = tiny(model, dropout=0.3)
    return net.train(), recipe, batch


@pytest.mark.parametrize("every, kept", [(1, 6), (2, 3), (4, 2), (6, 1), (50, 1)])
def test_a_segment_keeps_one_hidden_state(every, kept):                         # findings 3.9
    net, (x,) = tower(6)
    burnish.tune(net, f"full + checkpoint(every={every})", head=False)
    seen = {}

    def see(t):
        if t.shape == x.shape:
            seen[t.untyped_storage()._cdata] = t
        return t

    pack = net.burnish.state.tape.pack
    net.burnish.state.tape.pack = lambda t: (see(t), pack(t))[1]
    net(x)
    assert len(seen) == kept


@pytest.mark.parametrize("recipe", ["full + checkpoint(every=2)", "full + checkpoint(every=None)",
                                    "lora(rank=2) + checkpoint(every=3)",
                                    "full + checkpoint(mode='selective')",
                                    "lora(rank=2) + checkpoint(mode='selective')",
                                    "snella(rank=2) + checkpoint(mode='selective')"])
def test_the_promise_is_kept(recipe):
    net, batch = tower(7)
    promised = burnish.simulate(net, recipe, batch, loss=square)
    assert promised.peak_bytes == burnish.measure(burnish.tune(net, recipe), batch,
                                                  square).peak_bytes


def test_the_segment_that_keeps_least():                                        # findings 3.9
    """ceil(L / s) + s f over all s, and near sqrt(L / f) where that is whole."""
    for blocks in (1, 2, 7, 12, 48, 100, 400):
        for f in (1.0, 3.3, 10.0, 16.0):
            s = least(blocks, f)
            costs = {n: math.ceil(blocks / n) + n * f for n in range(1, blocks + 1)}
            assert costs[s] == min(costs.values())
    assert least(400, 4.0) == 10 and least(12, 10.0) == 1


@pytest.mark.parametrize("blocks, segments", [(1, 1), (5, 5), (20, 10), (29, 15), (60, 20)])
def test_none_takes_the_segment_of_the_blocks_it_finds(blocks, segments):       # findings 3.9
    """A block of these keeps 1 + (4 D + D) / D = 6 states."""
    net, _ = tower(blocks)
    answer = Checkpoint(every=None).activations(Anatomy.of(net))
    assert len(answer.paths) == blocks and len(answer.paths) - len(answer.joined) == segments


def test_a_deep_model_is_told_by_a_segment():
    """What stands for many blocks in a simulation is a whole segment of them; none is known where
    the model says how long it is."""
    said = [burnish.parse(r)[0].repeats() for r in ("checkpoint", "checkpoint(every=3)",
                                                    "checkpoint(every=None)")]
    assert said == [1, 3, None]


class Unnamed(nn.Module):
    """A block whose matrices have names that say nothing: of width D, as what reads it is."""

    def __init__(self, width=D, table=False):
        super().__init__()
        self.one, self.two = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.table = nn.Embedding(50 * D, 50 * D) if table else None

    def forward(self, x):
        return x + self.two(torch.tanh(self.one(x)))


class Normal(nn.Module):
    """A block without any matrix: all it keeps is its input."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(D), nn.Tanh()

    def forward(self, x):
        return self.act(self.norm(x))


def segments(blocks):
    """How many there are with every=None."""
    torch.manual_seed(0)
    net = Tower(0)
    net.blocks = nn.ModuleList(blocks)
    net.head = nn.Linear(D, 2) if type(blocks[0]) is not Normal else nn.Identity()
    answer = Checkpoint(every=None).activations(Anatomy.of(net))
    assert len(answer.paths) == len(blocks)
    return len(answer.paths) - len(answer.joined)


def cheapest(blocks, f):
    s = min(range(1, blocks + 1), key=lambda n: math.ceil(blocks / n) + n * f)
    return math.ceil(blocks / s)


def test_what_a_block_keeps_is_told_by_its_matrices_alone():                    # findings 3.9
    """Whatever they are called; a table that is looked up keeps nothing of full width."""
    assert segments([Unnamed() for _ in range(60)]) == cheapest(60, 6) == 20
    assert segments([Unnamed(table=True) for _ in range(60)]) == 20
    assert segments([Normal() for _ in range(64)]) == cheapest(64, 1) == 8


def test_each_stack_has_the_segments_of_its_own_width():                       # findings 3.9
    """The inner width over that of the stack, not of the model's last one."""
    net = nn.ModuleDict({"first": Tower(60), "second": Tower(60)})
    for block in net["first"].blocks:
        block.fc1, block.fc2 = nn.Linear(4 * D, 16 * D), nn.Linear(16 * D, 4 * D)
    answer = Checkpoint(every=None).activations(Anatomy.of(net))
    for stack in net:
        firsts = [p for p in answer.paths if p.startswith(stack) and p not in answer.joined]
        assert len(firsts) == cheapest(60, 6) == 20


def test_two_stacks_share_no_segment():
    net, _ = tiny("t5")
    anatomy = Anatomy.of(net)
    answer = Checkpoint(every=100).activations(anatomy)
    firsts = {blocks[0].path for blocks in anatomy.stacks().values()}
    assert len(firsts) == 2 and set(answer.paths) - answer.joined == firsts


@pytest.mark.parametrize("every", [0, -1])
def test_a_segment_without_blocks_is_refused(every):                            # findings 3.9
    with pytest.raises(burnish.RecipeError, match="1 block or more"):
        burnish.parse(f"checkpoint(every={every})")


def test_a_model_without_blocks_is_refused():
    with pytest.raises(burnish.RecipeError, match="no repeated blocks"):
        burnish.tune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "full + checkpoint")


def test_two_recipes_that_cut_otherwise_are_refused():
    net, _ = tower(4)
    tuned = burnish.tune(net, "lora(rank=2) + checkpoint")
    with pytest.raises(burnish.ConfigError, match="one for all adapters"):
        tuned.add("other", "lora(rank=2) + checkpoint(every=2)")


def test_compiled_segments_run_uncompiled_and_say_so():
    net, (x,) = tower(4)
    tuned = burnish.tune(net, "full + checkpoint(every=2)")
    fast = torch.compile(net, backend="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = fast(x)
    assert any("several blocks run again as one" in str(w.message) for w in said)
    assert torch.equal(out, net(x))
    tuned.detach()


class Written(nn.Module):
    """An activation written out: each of its steps keeps a tensor of full width."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        h = self.fc1(x)
        return x + self.fc2(h.sigmoid() * (h.tanh() + h.sin()).exp())


def test_selective_takes_what_products_make_whatever_is_between():              # findings 3.9
    def peak(recipe, block):
        torch.manual_seed(0)
        net = Tower(6)
        net.blocks = nn.ModuleList(block() for _ in range(6))
        return burnish.simulate(net, recipe, (torch.randn(64, TOKENS, D),), loss=square).peak_bytes

    for block in (Mlp, Written):
        whole, some, none = (peak(f"lora(rank=2) + {r}", block) for r in
                             ("checkpoint", "checkpoint(mode='selective')", "lean(on=False)"))
        assert whole < some < none
        lean = peak("lora(rank=2)", block)
    state = 64 * TOKENS * D * 4                     # written out, it is far less than the tape's
    assert some < lean - 6 * 4 * state


def test_selective_segments_are_refused():
    with pytest.raises(burnish.RecipeError, match="no use for a segment"):
        burnish.parse("checkpoint(mode='selective', every=2)")


def test_two_forwards_before_one_backward():
    recipe = "lora(rank=2, dropout=0.2)"
    results = []
    for more in ("", " + checkpoint(every=2)", " + checkpoint(mode='selective')"):
        net, recipe_, batch = _twin("bert", recipe + more)
        tuned = burnish.tune(net, recipe_)
        torch.manual_seed(5)
        (tuned.loss(batch) + tuned.loss(batch).square()).backward()
        results.append([p.grad for p in tuned.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
