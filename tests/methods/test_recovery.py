"""Recovery: against a dense loop over one flat vector, bit for bit two models' weights."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.state.early import last_token
from burnish.core.errors import CheckError, ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.recovery import Recovery
from burnish.testing.models import tiny

E = 1


def prompts(seed, n=3, side="right"):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        ids, mask = torch.randint(5, 60, (2, 6), generator=g), torch.ones(2, 6, dtype=torch.long)
        mask[0, (slice(4 + i % 2, None) if side == "right" else slice(0, 1 + i % 2))] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


def pair(dtype=torch.float64):
    """(tuned model in training mode, aligned tensors)"""
    model, _ = tiny("llama", dtype=dtype, dropout=0.1)
    aligned = {n: t.clone() for n, t in model.named_parameters()}
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g).to(p)
    return model, aligned


def hidden(model, batch):
    """(B, D) after block E, by the library's own outputs."""
    h = model.eval()(**batch, output_hidden_states=True).hidden_states[E]
    at = [int(m.nonzero().max()) for m in batch["attention_mask"]]
    return torch.stack([row[i] for row, i in zip(h, at, strict=True)])


def block_names(model):
    return [n for n, _ in model.named_parameters()
            if n.startswith("model.layers.0.") and "norm" not in n]


def reference(model, aligned, harmful, task, *, share, steps, rollback, back=0.2):
    """One flat vector, one step after the other; also the gradients that chose."""
    twin = copy.deepcopy(model).eval()
    names, params = block_names(twin), dict(twin.named_parameters())
    start = torch.cat([params[n].detach().flatten() for n in names])
    goal = torch.cat([aligned[n].flatten() for n in names])
    other = copy.deepcopy(twin)
    other.load_state_dict(aligned, strict=False)
    with torch.no_grad():
        d_h = torch.cat([hidden(other, b) for b in harmful]).mean(0)
        d_b = torch.cat([hidden(twin, b) for b in task]).mean(0)
    total = sum(p.numel() for p in twin.parameters())

    def put(flat):
        at = 0
        for n in names:
            params[n].data.copy_(flat[at : at + params[n].numel()].view_as(params[n]))
            at += params[n].numel()

    def grad(batches, d):
        loss = sum(-(h @ d) / (h.norm() * d.norm()) for h in (hidden(twin, b).mean(0)
                                                               for b in batches))
        found = torch.autograd.grad(loss, [params[n] for n in names])
        return torch.cat([x.flatten() for x in found])

    now, g, seen = start.clone(), torch.zeros_like(start), []
    for _ in range(steps):
        put(now)
        g = grad(harmful, d_h) + (0 if rollback else g)
        may = [i for i in range(len(now)) if (now[i] - goal[i]) * g[i] > 0]
        chosen = sorted(may, key=lambda i: -abs(float(g[i])))[: int(share * total)]
        seen.append([(now[i] - goal[i]) * g[i] > 0 for i in chosen])
        now[chosen] = goal[chosen]
        if rollback:
            put(now)
            gb = grad(task, d_b)
            may = [i for i in chosen if (now[i] - start[i]) * gb[i] > 0]
            again = sorted(may, key=lambda i: -abs(float(gb[i])))[: int(back * len(may) + 1e-9)]
            now[again] = start[again]
    return names, now, start, goal, total, seen


def flat(model, names):
    params = dict(model.named_parameters())
    return torch.cat([params[n].detach().flatten() for n in names])


def run(model, aligned, harmful, task, score, harm=lambda m: 0.0, **settings):
    return Recovery(layers=E, **settings).lifecycle(model, aligned, harmful, task, score=score,
                                                    harm=harm)


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_steps_are_those_of_one_flat_vector(rollback, side):
    model, aligned = pair()
    harmful, task = prompts(1, side=side), prompts(2, side=side)
    names, want, start, goal, total, signs = reference(
        model, aligned, harmful, task, share=0.01, steps=4, rollback=rollback)
    asked = []

    def score(m):
        asked.append(1)                                  # the second is after the warm-up
        return 0.5 if rollback and len(asked) == 2 else 1.0

    left = iter([5.0, 4.0, 3.0])
    before = copy.deepcopy(model.state_dict())
    found = run(model, aligned, harmful, task, score, lambda m: next(left), restored=0.01, steps=4,
                warmup=2, every=2)
    got = flat(model, names)
    assert torch.equal(got, want) and found.rollback == rollback and found.step == 4
    assert bool(((got == start) | (got == goal)).all())              # bit for bit one of the two
    changed = int((got != start).sum())
    assert changed == sum(len(v) for v in found.index.values())
    assert 0 < changed / total <= 4 * 0.01 and found.share == changed / total
    assert all(all(s) for s in signs)                    # descent goes to the aligned weight
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k not in names)
    assert [t[0] for t in found.trace] == [0, 2, 4] and model.training


def test_all_that_may_goes_back_where_the_share_is_whole():
    model, aligned = pair()
    harmful, task = prompts(1), prompts(2)
    names = block_names(model)
    left = iter([2.0, 1.0])
    start = flat(model, names)
    _, want, _, goal, _, _ = reference(model, aligned, harmful, task, share=1.0, steps=1,
                                       rollback=False)
    run(model, aligned, harmful, task, lambda m: 1.0, lambda m: next(left), restored=1.0, steps=1,
        warmup=1, every=1)
    got = flat(model, names)
    assert torch.equal(got, want)
    share = float((got == goal).double().mean())
    assert 0.3 < share < 0.7 and bool((got[got != goal] == start[got != goal]).all())


def test_the_safest_within_what_the_task_may_lose_stands():
    harm = {0: 9.0, 1: 5.0, 2: 3.0, 3: 1.0}
    quality = {0: 0.8, 1: 0.79, 2: 0.77, 3: 0.5}
    for drop, step in ((0.05, 2), (0.01, 0), (0.02, 1), (0.9, 3)):
        model, aligned = pair()
        start = copy.deepcopy(model.state_dict())
        at = {"score": [0, None, 1, 2, 3], "harm": [0, 1, 2, 3]}

        def score(m, at=at):
            now = at["score"].pop(0)
            return 0.8 if now is None else quality[now]

        found = run(model, aligned, prompts(1), prompts(2), score,
                    lambda m, at=at: harm[at["harm"].pop(0)], restored=0.01, steps=3, warmup=1,
                    every=1, drop=drop)
        assert (found.step, found.score, found.harm) == (step, quality[step], harm[step])
        now = model.state_dict()
        differ = {n: (now[n] != start[n]).flatten().nonzero().squeeze(1) for n in now}
        assert {n: v.tolist() for n, v in differ.items() if len(v)} == {
            n: v.tolist() for n, v in found.index.items()}


def test_figures_below_nought_have_a_floor_too():
    model, aligned = pair()
    seen = iter([-1.0, -1.04, -1.04])
    found = run(model, aligned, prompts(1), prompts(2), lambda m: next(seen), lambda m: 0.0,
                steps=1, warmup=1, every=1)
    assert found.rollback is False


def test_an_exception_leaves_the_tuned_model():
    model, aligned = pair()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def score(m):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(model, aligned, prompts(1), prompts(2), score, restored=0.05)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_nothing_behind_the_block_is_run():
    model, _ = pair()
    ran = []
    for n in ("model.layers.0", "model.layers.1", "lm_head"):
        model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: ran.append(n))
    batch = prompts(1)[0]
    h = last_token(model.eval(), "model.layers.0", batch)
    assert ran == ["model.layers.0"]
    torch.testing.assert_close(h, hidden(model, batch))
    plain = last_token(model, "model.layers.0", {"input_ids": batch["input_ids"]})
    assert plain.shape == h.shape


def test_half_precision_weights_are_bit_for_bit_one_of_the_two():
    model, aligned = pair(torch.bfloat16)
    names, start = block_names(model), flat(model, block_names(model))
    goal, left = torch.cat([aligned[n].flatten() for n in names]), iter([2.0, 1.0])
    run(model, aligned, prompts(1), prompts(2), lambda m: 1.0, lambda m: next(left),
        restored=0.02, steps=2, warmup=1, every=2)
    got = flat(model, names)
    assert bool(((got == start) | (got == goal)).all()) and int((got != start).sum()) > 10


def test_its_settings():
    made = parse("recovery")[0]
    assert (made.restored, made.steps, made.warmup, made.every, made.layers, made.drop,
            made.back) == (0.002, 20, 5, 5, None, 0.05, 0.2)


def test_what_cannot_act_is_refused():
    for settings, said in (({"restored": 0.0}, "shares above 0"), ({"back": 1.5}, "shares above 0"),
                           ({"restored": 1.5}, "shares above 0"),
                           ({"drop": -0.1}, "at least 0"), ({"warmup": 30}, "steps of 20"),
                           ({"every": 0}, "steps of 20"), ({"layers": 0}, "at least 1"),
                           ({"targets": "q"}, "targets do nothing")):
        with pytest.raises(ConfigError, match=said):
            Recovery(**settings)
    model, aligned = pair()

    def ask(how, m=model, a=aligned, h=None, t=None):
        return how.lifecycle(m, a, prompts(1) if h is None else h, prompts(2) if t is None else t,
                             score=lambda m: 1.0, harm=lambda m: 1.0)

    with pytest.raises(ConfigError, match="needs batches of harmful prompts"):
        ask(Recovery(), h=[])
    with pytest.raises(ConfigError, match="has another .*: none"):
        ask(Recovery(), a={k: v for k, v in aligned.items() if "q_proj" not in k})
    with pytest.raises(ConfigError, match="has another .*float32"):
        ask(Recovery(), a={k: v.float() for k, v in aligned.items()})
    with pytest.raises(ConfigError, match="reads block 9 of one run of blocks"):
        ask(Recovery(layers=9))
    with pytest.raises(ConfigError, match="merge the update first"):
        ask(Recovery(), m=burnish.tune(pair()[0], "lora(rank=2)"))
    with pytest.raises(ConfigError, match="one run of blocks"):
        ask(Recovery(), m=tiny("t5")[0])
    with pytest.raises(ConfigError, match="is less than one of"):
        ask(Recovery(restored=1e-9))
    with pytest.raises(ConfigError, match="nothing to put back"):
        ask(Recovery(), a=model.state_dict())


@pytest.mark.parametrize("which", ["score", "harm"])
@pytest.mark.parametrize("odd", [float("nan"), None, torch.ones(2)])
@pytest.mark.parametrize("when", [0, 2])
def test_a_figure_that_is_no_number_leaves_the_tuned_model(which, odd, when):
    model, aligned = pair()
    before, calls = copy.deepcopy(model.state_dict()), []

    def figure(m):
        calls.append(1)
        return odd if len(calls) == when + 1 else 1.0

    given = {"score": lambda m: 1.0, "harm": lambda m: 1.0, which: figure}
    with pytest.raises(CheckError, match=f"{which} gave "):
        Recovery(restored=0.05, steps=3, warmup=1, every=1).lifecycle(
            model, aligned, prompts(1), prompts(2), **given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
