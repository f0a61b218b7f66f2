"""DR-Tune against its equation in plain fp64 torch, sample by sample and class by class."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.calibrated import Pairs, rotation, shifted
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.memory import measure, simulate
from burnish.methods.objective.dr_tune import Calibrating
from burnish.testing.models import tiny

LR = 0.2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kabsch(old, new):
    """R of centred rows, as it is written."""
    U, _, Vh = torch.linalg.svd(sum(torch.outer(a, b) for a, b in zip(old, new, strict=True)))
    turn = torch.eye(len(U), dtype=U.dtype)
    turn[-1, -1] = torch.linalg.det(Vh.t() @ U.t())
    return Vh.t() @ turn @ U.t()


# -- the blocks -----------------------------------------------------------------------------------
@pytest.mark.parametrize("n,d", [(9, 4), (3, 6), (1, 3), (2, 2)])
def test_it_is_a_proper_rotation(n, d):
    for seed in range(5):
        R = rotation(random(n, d, seed=seed), random(n, d, seed=seed + 50))
        torch.testing.assert_close(R @ R.t(), torch.eye(d, dtype=R.dtype), rtol=0, atol=1e-10)
        assert float(torch.linalg.det(R)) == pytest.approx(1, abs=1e-10)


def test_it_finds_the_rotation_and_is_the_best_there_is():
    Q = torch.linalg.qr(random(4, 4))[0]
    Q = Q if torch.linalg.det(Q) > 0 else Q * torch.tensor([1.0, 1, 1, -1])
    old = random(12, 4, seed=1)
    torch.testing.assert_close(rotation(old, old @ Q.t()), Q, rtol=1e-5, atol=1e-5)
    for sign in (1, -1):                                 # a mirrored set has a rotation, too
        new = random(12, 4, seed=2) * torch.tensor([1.0, 1, 1, sign], dtype=torch.float64)
        torch.testing.assert_close(rotation(old, new), kabsch(old, new), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n,d", [(9, 4), (3, 6), (1, 3)])
def test_of_the_same_features_it_is_one(n, d):
    z = random(n, d)
    z = z - z.mean(0)
    torch.testing.assert_close(rotation(z, z), torch.eye(d, dtype=z.dtype), rtol=0, atol=1e-9)


def by_class(y, z, right, rows):
    """t of each sample."""
    t = torch.zeros_like(y)
    for c in right.unique():
        mine = [i for i in range(len(y)) if right[i] == c]
        p = torch.stack([z[i] @ rows[c] / rows[c].norm() for i in mine]).softmax(0)
        shift = sum(w * z[i] for w, i in zip(p, mine, strict=True)) - sum(y[i] for i in mine) / len(
            mine)
        for i in mine:
            t[i] = shift
    return t


def test_classes_move_to_where_the_head_is_sure():
    y, z, rows = random(8, 3), random(8, 3, seed=1), random(5, 3, seed=2)
    right = torch.tensor([0, 0, 3, 3, 3, 1, 0, 3])       # of two classes there is none
    t = shifted(y, z, F.one_hot(right, 5).double(), rows)
    torch.testing.assert_close(t, by_class(y, z, right, rows))
    z = F.normalize(z, dim=1)                            # f = f0: nothing but the weighting
    even = shifted(z, z, F.one_hot(right, 5).double(), torch.zeros(5, 3).double())
    torch.testing.assert_close(even, torch.zeros_like(even), rtol=0, atol=1e-12)


def test_the_oldest_leave():
    pairs = Pairs(3)
    for k in range(3):
        at = torch.tensor([2.0 * k, 2 * k + 1])
        pairs.add(at[:, None], -at[:, None], at.long())
    new, old, label = pairs.read()
    assert sorted(new.flatten().tolist()) == [3, 4, 5] and torch.equal(old, -new)
    assert torch.equal(label, new.flatten().long()) and len(pairs) == 3
    copied = pairs.copy()
    copied.add(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1).long())
    assert torch.equal(pairs.read()[0], new) and pairs.put == 6
    pairs.add(torch.arange(9.0)[:, None], torch.arange(9.0)[:, None], torch.arange(9))
    assert sorted(pairs.read()[2].tolist()) == [6, 7, 8]


# -- the step -------------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 3), nn.Linear(3, 4)

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x, labels=None):
        logits = self.head(self.features(x))
        return {"logits": logits,
                "loss": None if labels is None else F.cross_entropy(logits, labels)}


def start():
    torch.manual_seed(0)
    net = Net().double()
    g = torch.Generator().manual_seed(1)
    return net, [{"x": torch.randn(6, 5, generator=g, dtype=torch.float64),
                  "labels": torch.randint(4, (6,), generator=g)} for _ in range(5)]


def by_hand(net, batches, weight, buffer, every):
    base, net, held, R = net, copy.deepcopy(net), [], None
    for step, b in enumerate(batches):
        with torch.no_grad():
            f, f0 = net.features(b["x"]), base.features(b["x"])
            held = [*held, *((a / a.norm(), c / c.norm(), int(y)) for a, c, y in
                             zip(f, f0, b["labels"], strict=True))][-buffer:]
            z, z0 = (torch.stack([h[k] for h in held]) for k in (0, 1))
            right = torch.tensor([h[2] for h in held])
            if step % every == 0:
                R = kabsch(z0 - z0.mean(0), z - z.mean(0))
            y = torch.stack([R @ (a - z0.mean(0)) + z.mean(0) for a in z0])
            out = y + by_class(y, z, right, net.head.weight)
            out = out / out.norm(dim=1, keepdim=True) * f.norm(dim=1).mean()
        loss = net(**b)["loss"] + weight * F.cross_entropy(net.head(out), right)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= LR * g
    return net


@pytest.mark.parametrize("weight,buffer,every", [(1.0, 64, 1), (0.5, 8, 1), (2.0, 64, 2),
                                                 (1.0, 7, 10)])
def test_steps_are_the_equation(weight, buffer, every):
    net, batches = start()
    want = by_hand(copy.deepcopy(net), batches, weight, buffer, every)
    tuned = burnish.tune(net, f"full + dr_tune(weight={weight}, buffer={buffer}, every={every}) "
                              "+ sgd", head=True)
    tuned.optimizer(LR)
    for b in batches:
        tuned.step(b)
    for (name, a), b in zip(net.state_dict().items(), want.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_nothing_of_the_second_term_reaches_the_encoder():
    net, batches = start()
    plain = copy.deepcopy(net)
    tuned = burnish.tune(net, "full + dr_tune(weight=3.0) + sgd", head=True)
    tuned.optimizer(LR)
    tuned.backward(batches[0])
    plain(**batches[0])["loss"].backward()
    torch.testing.assert_close(net.body.weight.grad, plain.body.weight.grad, rtol=1e-12, atol=0)
    assert not torch.allclose(net.head.weight.grad, plain.head.weight.grad)


def test_removing_the_term_is_plain_tuning():
    ends = []
    for recipe in ("full + sgd", "full + dr_tune(weight=1e-300) + sgd"):
        net, batches = start()
        tuned = burnish.tune(net, recipe, head=True)
        tuned.optimizer(LR)
        for b in batches:
            tuned.step(b)
        ends.append(net.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_a_probe_holds_nothing():
    ends = []
    for looks in (False, True):
        net, batches = start()
        tuned = burnish.tune(net, "full + dr_tune(every=1) + sgd", head=True)
        tuned.optimizer(LR)
        for b in batches:
            if looks:
                tuned.probe(b)
            tuned.step(b)
        ends.append(net.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_it_goes_on_where_it_stood():
    def made():
        net, batches = start()
        tuned = burnish.tune(net, "full + dr_tune(buffer=9, every=3) + sgd", head=True)
        tuned.optimizer(LR)
        return tuned, batches

    (whole, batches), (first, _) = made(), made()
    for b in batches:
        whole.step(b)
    for b in batches[:2]:
        first.step(b)
    state = first.timeline.state()
    first.optimizer(LR)
    first.timeline.load(state)
    for b in batches[2:]:
        first.step(b)
    for a, b in zip(whole.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_that_was_gone_on_from_can_be_gone_on_from_again():
    net, batches = start()
    tuned = burnish.tune(net, "full + dr_tune(buffer=9, every=3) + sgd", head=True)
    tuned.optimizer(LR)
    tuned.step(batches[0])
    state = copy.deepcopy(tuned.timeline.state())
    kept = copy.deepcopy(state)
    tuned.timeline.load(state)
    for b in batches[1:]:
        tuned.step(b)
    assert str(state) == str(kept)


def test_a_look_ahead_is_of_a_full_buffer_once():
    net, batches = start()
    tuned = burnish.tune(net, "full + dr_tune(buffer=20) + sgd", head=True)
    tuned.optimizer(LR)
    handler = next(h for _, h in tuned.timeline.handlers if isinstance(h, Calibrating))
    given = [random(6, 3, seed=s) for s in (0, 1)]
    empty = copy.deepcopy(handler.state_dict())

    def held():
        return len(handler.calibrated(*given, batches[0]["labels"], 4, False)[1])

    assert held() == 6
    handler.load_state_dict(copy.deepcopy(empty))
    handler.rehearse(0)
    assert held() == 20
    handler.load_state_dict(empty)
    assert held() == 6


def test_the_promise_is_of_a_full_buffer():
    def asked():
        net, batch = tiny("vit")
        return net.float(), "full + dr_tune(buffer=512)", batch

    promised = simulate(*asked()).peak_bytes
    net, recipe, batch = asked()
    tuned = burnish.tune(net, recipe)
    assert measure(tuned, batch).peak_bytes == pytest.approx(promised, rel=0.01)


def test_refusals_and_defaults():
    assert parse("dr_tune")[0].settings() == {"targets": None, "weight": 1.0, "buffer": 2048,
                                              "every": 10}
    least = parse("dr_tune(buffer=1, every=1)")[0]
    assert (least.buffer, least.every) == (1, 1)
    assert least.taps(Anatomy.of(tiny("llama")[0])) == ()          # a head of its words, no class
    for wrong in ("weight=0", "weight=-1", "buffer=0", "every=0"):
        with pytest.raises(RecipeError, match="^dr_tune"):
            parse(f"dr_tune({wrong})")
    with pytest.raises(RecipeError, match="dr_tune"):
        parse("full + dr_tune + mezo")
    with pytest.raises(RecipeError, match="dr_tune needs a task head of one linear"):
        burnish.tune(tiny("llama")[0], "full + dr_tune")
    net, batches = start()
    tuned = burnish.tune(net, "full + dr_tune", head=True)
    tuned.optimizer(LR)
    with pytest.raises(ConfigError, match="a batch has `labels`"):
        tuned.step({"x": batches[0]["x"]}, lambda out, _: out["logits"].square().mean())
    with pytest.raises(ConfigError, match="a batch has `labels`"):
        tuned.step((batches[0]["x"], batches[0]["labels"]),
                   lambda out, b: F.cross_entropy(out["logits"], b[1]))
