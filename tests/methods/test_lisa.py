"""LISA: what is live, how often, and that nothing of a block stays when it leaves."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from burnish.blocks.update.step import compose
from burnish.core.errors import RecipeError
from burnish.core.events import Timeline
from burnish.core.recipe import parse

L, D = 6, 16


class Body(nn.Module):
    """Embedding, blocks, final norm, head: the parts LISA tells apart."""

    def __init__(self, tied=False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(20, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(L))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x))


def attach(recipe, model, lr=1e-2):
    parts = parse(recipe)
    anatomy = SimpleNamespace(model=model,
                              blocks=[SimpleNamespace(path=f"layers.{i}") for i in range(L)])
    chosen = {s.name for s in parts[0].select(anatomy)}
    opt = compose([m.optimizer() for m in parts],
                  [(n, p) for n, p in model.named_parameters() if n in chosen], lr)
    tuned = SimpleNamespace(model=model, anatomy=anatomy, current_optimizer=opt)
    return parts[0].controller(tuned), opt


def train(model, control, opt, steps, start=0, after=lambda step: None):
    for step in range(start, start + steps):
        control.step_begin(step)
        ids = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        opt.step()
        opt.zero_grad()
        after(step)


def elements(opt):
    return sum(v.numel() for s in opt.state.values() for k, v in s.items()
               if isinstance(v, torch.Tensor) and k != "step")


def count(model, blocks):
    outside = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("layers"))
    return outside + blocks * sum(p.numel() for p in model.layers[0].parameters())


@pytest.mark.parametrize("gamma", [0, 1, 2])
def test_after_ten_periods_only_the_live_have_state(gamma):
    model = Body()
    control, opt = attach(f"lisa(layers={gamma}, every=2)", model)
    train(model, control, opt, 20)
    assert elements(opt) == 2 * count(model, gamma)


def test_state_of_every_block_would_stay_if_kept():
    model = Body()
    control, opt = attach("lisa(layers=2, every=2, state_on_leave='keep')", model)
    train(model, control, opt, 40)
    assert elements(opt) > 2 * count(model, 4)


def test_frozen_blocks_do_not_move_within_a_period():
    model = Body()
    control, opt = attach("lisa(layers=2, every=3) + adamw(weight_decay=0.5)", model)
    seen = {}

    def after(step):
        live = control.schedule.live
        assert len(live) == 2
        for i, layer in enumerate(model.layers):
            if step % 3 == 0:
                seen[i] = layer.weight.detach().clone()
            elif f"layers.{i}" not in live:
                assert torch.equal(seen[i], layer.weight) and layer.weight.grad is None
            else:
                assert not torch.equal(seen[i], layer.weight)

    train(model, control, opt, 12, after=after)
    assert model.embed.weight.requires_grad and model.norm.weight.requires_grad


def test_every_block_is_visited_equally_often():
    model = Body()
    control, _ = attach("lisa(layers=2, every=1)", model)
    n, seen = 3000, Counter()
    for step in range(n):
        control.step_begin(step)
        seen.update(control.schedule.live)
    for i in range(L):
        assert abs(seen[f"layers.{i}"] / n - 2 / L) < 5 * (1 / 3 * 2 / 3 / n) ** 0.5


def test_the_draw_leaves_global_generators_alone_and_can_be_resumed():
    whole = Body()
    state = torch.get_rng_state()
    control, opt = attach("lisa(layers=2, every=3, seed=4)", whole)
    train(whole, control, opt, 8)
    assert torch.equal(state, torch.get_rng_state())

    first = Body()
    control, opt = attach("lisa(layers=2, every=3, seed=4)", first)
    train(first, control, opt, 4)                      # stops inside a period
    second = Body()
    second.load_state_dict(first.state_dict())
    again, opt2 = attach("lisa(layers=2, every=3, seed=4)", second)
    opt2.load_state_dict(opt.state_dict())
    again.load_state_dict(control.state_dict())
    assert again.schedule.live == control.schedule.live
    train(second, again, opt2, 4, start=4)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_embedding_and_head_are_one_tensor_and_always_live():
    model = Body(tied=True)
    control, opt = attach("lisa(layers=1, every=1)", model)
    train(model, control, opt, 5)
    assert model.head.weight.requires_grad
    assert elements(opt) == 2 * count(model, 1)


def test_with_galore_a_returning_block_gets_a_new_basis():
    model = Body()
    control, opt = attach("lisa(layers=2, every=1) + galore(rank=4, every=100)", model)
    for step in range(12):
        before = {p for p in opt.state if opt.state[p]}
        train(model, control, opt, 1, start=step)
        for name in control.schedule.live:
            w = model.get_submodule(name).weight
            state = opt.state[w]
            assert sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor)) == \
                D * 4 + 2 * D * 4
            if w not in before:
                assert state["step"] == 1
    assert {n for n, m in model.named_modules()
            if n.startswith("layers.") and m.weight in opt.state} == control.schedule.live


@pytest.mark.parametrize("leave", ["drop", "keep"])
def test_the_live_take_the_steps_of_plain_adam(leave):                          # findings 6
    """Twelve updates in float64 against torch.optim.AdamW on an untouched copy, one optimizer a
    block: begun anew whenever the block comes back, or gone on with where state is kept."""
    model, stock = Body().double(), Body().double()
    control, opt = attach(f"lisa(layers=2, every=2, state_on_leave={leave!r}) + "
                          "adamw(weight_decay=0.3)", model)

    def fresh(params):
        return torch.optim.AdamW(params, 1e-2, weight_decay=0.3)

    outside = fresh([p for n, p in stock.named_parameters() if not n.startswith("layers.")])
    blocks: dict[str, torch.optim.Optimizer] = {}
    turns = []
    for step in range(12):
        train(model, control, opt, 1, start=step)
        live = set(control.schedule.live)
        turns.append(live)
        if leave == "drop":
            blocks = {n: o for n, o in blocks.items() if n in live}
        ids = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(stock(ids).flatten(0, 1), ids.flatten()).backward()
        for name in live:
            if name not in blocks:
                blocks[name] = fresh(stock.get_submodule(name).parameters())
            blocks[name].step()
        outside.step()
        stock.zero_grad()
        for (n, a), b in zip(model.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=f"{n}, step {step}")
    assert len({frozenset(t) for t in turns}) > 2
    came_back = [n for n in turns[-1] if any(n in t for t in turns[:-2]) and n not in turns[-3]]
    assert came_back or any(turns[k] - turns[k - 1] & set().union(*turns[:k - 1])
                            for k in range(2, 12)), "some block has left and returned"


@pytest.mark.parametrize("layers, said", [(7, "6 repeated blocks"), (-1, "expected 0 or more")])
def test_more_layers_than_blocks_is_refused(layers, said):
    with pytest.raises(RecipeError, match=f"layers={layers}.*{said}"):
        attach(f"lisa(layers={layers})", Body())


def furnished():
    """A block with an adapter beside its weight and a table of whole numbers, and a bias that is
    read outside, too, under a name that comes later."""
    model = Body()
    first = model.layers[0]
    first.burnish = nn.ParameterDict({"A": nn.Parameter(torch.ones(2, D))})
    first.table = nn.Parameter(torch.arange(4), requires_grad=False)
    model.beside = nn.Linear(D, D)
    model.beside.bias = first.bias
    return model


def test_only_the_base_s_own_real_numbers_are_its_business():
    model = furnished()
    anatomy = SimpleNamespace(model=model, blocks=[SimpleNamespace(path="layers.0")])
    chosen = {s.name for s in parse("lisa(layers=0)")[0].select(anatomy)}
    own = {n for n, p in Body().named_parameters()} | {"beside.weight"}
    assert chosen == own


def test_an_adapter_and_what_is_shared_with_the_outside_stay_live():
    model = furnished()
    control, _ = attach("lisa(layers=0, every=1)", model)
    control.step_begin(0)
    first = model.layers[0]
    assert first.burnish["A"].requires_grad and first.bias.requires_grad
    assert not first.weight.requires_grad and not first.table.requires_grad
    assert not model.layers[1].bias.requires_grad


def test_whoever_names_no_phase_finds_the_draw_made():
    model, seen = Body(), []
    control, _ = attach("lisa(layers=2, every=1)", model)

    class Looks:
        def step_begin(self, step):
            seen.append(sum(layer.weight.requires_grad for layer in model.layers))

    Timeline([("looks", Looks()), ("lisa", control)]).emit("step_begin", 0)
    assert seen == [2]


def test_its_settings_are_the_authors():
    from burnish.core.recipe import parse

    (made,) = parse("lisa")
    want = {"layers": 2, "every": 20, "seed": 0}
    assert {k: getattr(made, k) for k in want} == want
