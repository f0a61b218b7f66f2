"""Self-Tuning Networks: the response and its gradients, the decay, steps on validation rows."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import burnish
from burnish.blocks.weight.responding import Responding
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.memory import Ledger, MemoryReport, measure, simulate
from burnish.methods.delta.lowrank import stn as module
from burnish.testing import stir, tiny

TARGETS = "0,2"


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def made(recipe="stn(rank=2, dropout=0.0)", size=0.3, **kw):
    model = net(**kw)
    base = copy.deepcopy(model)
    tuned = burnish.tune(model, recipe, targets=TARGETS, head=False)
    for p in tuned.parameters():
        p.data = p.data.double()
    tuned.optimizer(lr=0.0)
    stir(tuned, size=size)
    return tuned, base, [t for _, t in tuned.terms(Responding)]


def tuning(tuned):
    return next(h for _, h in tuned.timeline.handlers)


def by_hand(base, terms, x, u, s):
    """Both layers with their updates written out; x (N, 6)."""
    def layer(lin, t, h):
        rows = torch.stack([t.B[o] + sum(t.V[o, k] * u[k] for k in range(len(u))) * t.R[o]
                            for o in range(t.B.shape[0])])
        return h @ (lin.weight + s * rows @ t.A).T + lin.bias

    return layer(base[2], terms[1], torch.tanh(layer(base[0], terms[0], x)))


@pytest.mark.parametrize("recipe", ["stn(rank=2, dropout=0.0, alpha=5.0)",
                                    "stn(rank=2, alpha=5.0, dropout=0.0) + lean"])
def test_outputs_and_gradients_are_the_responses(recipe):
    tuned, base, terms = made(recipe)
    shared = terms[0].shared
    with torch.no_grad():
        shared.u += 0.7
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, n, generator=g, dtype=torch.float64) for n in (6, 3))
    u = (shared.u + shared.shift).double()
    assert shared.shift[0] == 0 != shared.shift[1] and tuned.model.training
    want = (by_hand(base, terms, x, u, 2.5) - y).square().sum()
    grads = torch.autograd.grad(want, [p for t in terms for p in t.parameters()])
    got = (tuned.model(x) - y).square().sum()
    got.backward()
    torch.testing.assert_close(got, want)
    for p, g_ in zip([p for t in terms for p in t.parameters()], grads, strict=True):
        torch.testing.assert_close(p.grad, g_, rtol=1e-9, atol=1e-12)
    tuned.model.eval()                                              # where nothing is moved
    torch.testing.assert_close(tuned.model(x), by_hand(base, terms, x, shared.u.double(), 2.5))


def test_the_start_is_the_base_under_every_u():
    model, batch = tiny("bert")
    before = model.eval()(**batch).logits
    tuned = burnish.tune(model.train(), "stn", head=False)
    with torch.no_grad():
        next(tuned.terms(Responding))[1].shared.u += 3.0
    assert torch.equal(model.eval()(**batch).logits, before)


def test_the_decay_is_that_of_the_moved_update():
    tuned, _, terms = made("stn(rank=2, dropout=0.0, decay_start=0.2)")
    handler = tuning(tuned)
    shared = terms[0].shared
    for p in tuned.parameters():
        p.grad = torch.ones_like(p)
    u = (shared.u + shared.shift).double()
    d = 0.2 * math.exp(float(u[1]))
    own = [p for t in terms for p in t.parameters()]
    size = sum((t.A ** 2).sum() + ((t.B + (t.V @ u)[:, None] * t.R) ** 2).sum() for t in terms)
    want = torch.autograd.grad(d / 2 * size, own)
    handler.before_update(0)
    for p, g in zip(own, want, strict=True):
        torch.testing.assert_close(p.grad, 1 + g, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("names", ["both", "dropout"])
def test_a_validation_step(names):
    how = "rank=2, alpha=5.0, widening=0.3, tuning_rate=0.02, dropout=0.2" + \
        (", decay_start=0.0" if names == "dropout" else "")
    tuned, base, terms = made(f"stn({how})")
    handler, shared = tuning(tuned), terms[0].shared
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, n, generator=g, dtype=torch.float64) for n in (6, 3))
    tuned.model(x)                                                    # the run begins
    shift, sigma = shared.shift, shared.log_sigma.exp().double()
    e = (sigma * handler.drawn(2 * 4 + 1)).double()
    u = shared.u.double().clone().requires_grad_()
    loss = (by_hand(base, terms, x, u + e, 2.5) - y).square().mean()   # no dropout, no decay
    (du,) = torch.autograd.grad(loss, u)
    grads = [p.grad for p in tuned.parameters()]
    (part,) = parse(f"stn({how})")
    part.lifecycle(tuned, [(x, y)], lambda out, b: (out - b[1]).square().mean())
    handler.validate(4)
    mask = torch.tensor([1.0, names == "both"])
    both = torch.cat([du * mask, (du * e - 0.3) * mask])
    torch.testing.assert_close(handler.moments[0].double(), 0.1 * both, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(handler.moments[1].double(), 1e-3 * both ** 2, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(shared.u.double(), -0.02 * both[:2].sign(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shared.log_sigma.double() - sigma.log(), -0.02 * both[2:].sign(),
                               rtol=1e-4, atol=1e-6)
    assert shared.shift is shift and not shared.u.requires_grad and tuned.model.training
    assert all(a is b for a, b in zip([p.grad for p in tuned.parameters()], grads, strict=True))


def test_values_are_within_their_bounds():
    (part,) = parse("stn(dropout=0.2, decay_start=0.01)")
    at = part.values(torch.tensor([math.log(2.0), math.log(3.0)]))
    assert at["dropout"] == pytest.approx(0.5 / 1.5)                  # odds 1/4, doubled
    assert at["decay"] == pytest.approx(0.03)
    assert part.values(torch.tensor([40.0, 0.0]))["dropout"] <= 1
    far = [part.values(torch.tensor([t, t])) for t in (-900.0, 900.0)]
    assert far == [{"dropout": 0.0, "decay": 0.0}, {"dropout": 1.0, "decay": math.inf}]
    with FakeTensorMode():                                            # a simulation: as it begins
        assert part.values(torch.ones(2)) == {"dropout": 0.2, "decay": 0.01}
    (one,) = parse("stn(dropout=0.0)")
    assert one.tuned == (False, True) and one.values(torch.zeros(2))["dropout"] == 0


def test_updates_draw_anew_and_micro_batches_share_a_step():
    tuned, _, terms = made("stn(rank=2, dropout=0.1, turn=2)")
    (part,) = parse("stn(rank=2, dropout=0.1)")
    g = torch.Generator().manual_seed(1)
    batch = tuple(torch.randn(5, n, generator=g, dtype=torch.float64) for n in (6, 3))

    def loss(out, b):
        return (out - b[1]).square().mean()

    part.lifecycle(tuned, [batch], loss)
    shifts, rates = [], []
    for _ in range(6):
        shifts.append(terms[0].shared.shift.clone())
        rates.append(terms[0].dropout)
        tuned.backward(batch, loss)
        tuned.backward(batch, loss)
        tuned.steps.optimizer.step()
    for seed in (-1, 2**63 - 1):                                      # any that a setting takes
        other = made(f"stn(rank=2, dropout=0.1, seed={seed})")[2][0].shared.shift
        assert not torch.equal(other, shifts[0])
    assert len({tuple(s.tolist()) for s in shifts}) == 6 and len(set(rates)) == 6
    assert tuning(tuned).taken == 2                                   # before the 3rd and the 5th
    assert tuning(tuned).told()["steps"] == 2


def test_a_decay_that_is_too_large_is_taken_back():
    """Rows of one law, and a decay that keeps the update from learning it."""
    g = torch.Generator().manual_seed(0)
    law = torch.randn(6, 3, generator=g)
    rows = [torch.randn(32, 6, generator=g) for _ in range(2)]
    train, held = [(x, torch.tanh(x @ law)) for x in rows]

    def loss(out, b):
        return (out - b[1]).square().mean()

    def run(told):
        tuned = burnish.tune(net(torch.float32), "stn(rank=3, dropout=0.0, decay_start=0.3, "
                             "tuning_rate=0.05, spread=0.3)", targets=TARGETS, head=False)
        tuned.optimizer(lr=1e-2)
        if told:
            next(iter(tuned.recipe)).lifecycle(tuned, [held], loss)
        for _ in range(300):
            tuned.step(train, loss=loss)
        tuned.model.eval()
        said = tuned.model(held[0]).detach()
        return float(loss(said, held)), tuned.timeline.told()["stn"]["decay"]

    fixed, same = run(False)
    learnt, moved = run(True)
    assert same == pytest.approx(0.3) and moved < 0.15 and learnt < 0.9 * fixed


def test_merge_files_and_resume(tmp_path):
    tuned, _, terms = made("stn(rank=2)")
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, n, generator=g, dtype=torch.float64) for n in (6, 3))
    next(iter(tuned.recipe)).lifecycle(tuned, [(x, y)], lambda o, b: (o - b[1]).square().mean())
    for k in (1, 2, 3):
        tuning(tuned).validate(k)
    assert float(terms[0].shared.u.abs().min()) > 0
    kept = tuning(tuned).state_dict()
    model = tuned.model.eval()
    said = model(x).detach()
    tuned.save(tmp_path)
    again = burnish.load(net(), tmp_path)
    torch.testing.assert_close(again.model.eval()(x), said, rtol=1e-6, atol=1e-7)
    other, _, theirs = made("stn(rank=2)")
    tuning(other).load_state_dict(kept)
    assert torch.equal(theirs[0].shared.u, terms[0].shared.u)
    assert torch.equal(tuning(other).moments, tuning(tuned).moments) and tuning(other).taken == 3
    tuned.model.train()                                               # u moves, and is not merged
    torch.testing.assert_close(tuned.merge().eval()(x), said, rtol=1e-6, atol=1e-7)


def test_count_defaults_and_refusals():
    (part,) = parse("stn")
    assert (part.rank, part.alpha, part.dropout, part.decay_start) == (8, 16.0, 0.05, 1e-4)
    assert (part.spread, part.widening, part.tuning_rate, part.turn) == (0.5, 1e-3, 0.01, 2)
    assert part.seed == 0 and parse("stn(turn=1, widening=0.0)")
    place = Place("fc", "weight", "linear", 4096, 1024, "fc1")
    assert part.count(place) == 8 * (1024 + 2 * 4096) + 2 * 4096
    for bad, said in (("dropout=0.0, decay_start=0.0", "nothing to tune"),
                      ("dropout=1.0", "probability"), ("decay_start=-1.0", "nothing to tune"),
                      ("spread=0.0", "spread and"), ("turn=0", "turn of at least 1"),
                      ("widening=-0.1", "widening of 0"), ("tuning_rate=0.0", "tuning_rate above")):
        with pytest.raises(RecipeError, match=said):
            parse(f"stn({bad})")
    tuned = burnish.tune(net(torch.float32), "lora(rank=2)", targets=TARGETS, head=False)
    tuned.optimizer(lr=1e-3)
    with pytest.raises(ConfigError, match="no part in this run"):
        part.lifecycle(tuned, [1])
    with pytest.raises(ConfigError, match="no validation batches"):
        part.lifecycle(tuned, [])


def test_several_processes_are_refused(monkeypatch):
    """Each has its own validation rows, and u is one."""
    monkeypatch.setattr(module, "processes", lambda: 2)
    tuned = burnish.tune(net(torch.float32), "stn(rank=2)", targets=TARGETS, head=False)
    with pytest.raises(ConfigError, match="of one process, and this run has 2"):
        tuned.optimizer(lr=1e-3)


def test_fit_gives_it_the_validation_rows(tmp_path):
    rows = "text,label\n" + "".join(f"{w * 2} {w},{i % 2}\n" for i, w in enumerate(
        ["good", "bad", "fine", "poor", "nice", "worse"] * 8))
    rows += f"{'good ' * 30},1\n"                                     # the longest of all
    (tmp_path / "rows.csv").write_text(rows)
    model = tiny("bert")[0]
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "good", "bad", "fine", "poor", "nice", "worse"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
                            ).save_pretrained(folder)

    def run(name, **how):
        return burnish.fit(str(folder), str(tmp_path / "rows.csv"), "stn(rank=2)", epochs=2,
                           batch_size=8, output=tmp_path / name, quiet=True, report=False, **how)

    done = run("out")
    facts = json.loads((done.folder / "run.json").read_text())
    assert "decay" in facts["told"]["stn"]
    assert abs(facts["memory"]["difference"]) < 0.01, "validation rows are in the promise"
    shared = next(done.tuned.terms(Responding))[1].shared
    assert float(shared.u.abs().min()) > 0
    with pytest.raises(ConfigError, match="stn learns of validation rows, and this run has none"):
        run("other", validation=0)


# -- the promise --------------------------------------------------------------------------------
def longer(batch, times):
    return {k: v.repeat(1, times) if v.dim() == 2 else v for k, v in batch.items()}


@pytest.mark.parametrize("recipe", ["stn(rank=2)", "stn(rank=2) + sgd"])
def test_a_look_at_longer_validation_rows_is_promised_and_measured(recipe):
    """What the step takes that really looks at them: a run's own, without a rehearsal."""
    model, batch = tiny("bert")
    rows = longer(batch, 3)
    told = simulate(model, recipe, batch, held=rows, head=False)
    assert told.peak_bytes > 1.3 * simulate(model, recipe, batch, head=False).peak_bytes
    tuned = burnish.tune(model, recipe, head=False)
    tuned.optimizer(lr=1e-3)
    found = measure(tuned, batch, held=rows)
    assert found.peak_bytes == pytest.approx(told.peak_bytes, rel=2e-3)
    handler = tuning(tuned)
    assert handler.taken == 0 and not handler.shared.u.any(), "a rehearsal takes no step"
    tuned = burnish.tune(tiny("bert")[0], recipe.replace("rank=2", "rank=2, turn=1"), head=False)
    tuned.optimizer(lr=1e-3)
    tuned.recipe.named("stn").lifecycle(tuned, [rows])
    tuned.step(batch)
    ledger = Ledger(tuned.model)
    ledger.watch("optimizer", [list(tuned.current_optimizer.state.values())])
    ledger.watch("activations", [batch, rows])
    with ledger:
        tuned.step(batch)
    assert tuning(tuned).taken == 1
    real = MemoryReport.of(ledger, device="cpu").peak_bytes
    assert real == pytest.approx(told.peak_bytes, rel=0.02)


def test_rows_like_the_steps_own_cost_no_more_than_the_step():
    model, batch = tiny("bert")
    told = simulate(model, "stn(rank=2)", batch, held=batch, head=False)
    size = sum(t.numel() * t.element_size() for t in batch.values())
    alone = simulate(model, "stn(rank=2)", batch, head=False).peak_bytes
    assert 0 <= told.peak_bytes - alone <= size
