"""SEMA: adapters that come where a descriptor sees a shift, weighed sample by sample."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import burnish
from burnish.blocks.state.expanding import Descriptor, Modular, token_means
from burnish.core.anatomy import Anatomy
from burnish.core.call import Call, resume
from burnish.core.errors import RecipeError
from burnish.engine.stages import begin
from burnish.memory import measure, simulate
from burnish.methods.mixture.sema import Sema
from burnish.testing import stir, tiny

SMALL = "layers=(0, 1), bottleneck=3, descriptor=4, buffer=7"
READ = {"vit": "vit.layers.{}.mlp", "bert": "bert.encoder.layer.{}.intermediate.dense"}
WRITE = {"vit": "vit.layers.{}.mlp", "bert": "bert.encoder.layer.{}.output.dense"}


def made(model="vit", grow=(1,), more="", dtype=torch.float64, batch=3, stirred=0.3, **kw):
    net, rows = tiny(model, dtype=dtype, batch=batch, **kw)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, f"sema({SMALL}{more})", head=False)
    for k, number in enumerate(grow):
        tuned.add(f"more{k}", f"sema({SMALL}{more}, grown={number})", head=False, seed=k + 5)
        tuned.use({**dict(tuned.state.active), f"more{k}": 1.0}, train=f"more{k}")
    net.to(dtype)
    for name in tuned.adapters if stirred else ():
        stir(tuned, size=stirred, adapter=name, seed=len(name))
    if model == "bert":
        rows["attention_mask"] = torch.ones(batch, 8, dtype=torch.long)
        rows["attention_mask"][0, 5:] = 0
    return tuned, net, base, rows


def at(tuned, number):
    return [m for n, _ in tuned.state.active for _, m in tuned.branches(Modular, n)
            if m.number == number]


def mixture(adapters, x, mask=None):
    """Sample by sample, token by token: (sum_e g_e f_e(x), means, g)."""
    out, means, gates = [], [], []
    for b in range(len(x)):
        keep = range(x.shape[1]) if mask is None else \
            [i for i in range(x.shape[1]) if mask[b, i]]
        mean = sum(x[b, i] for i in keep) / len(keep)
        z = torch.stack([a.router.weight[0] @ mean + a.router.bias[0] for a in adapters])
        g = torch.exp(z - z.max())
        g = g / g.sum()
        rows = 0
        for e, a in enumerate(adapters):
            f = a.functional
            h = (x[b] @ f.down.weight.T + f.down.bias).clamp_min(0)
            rows = rows + g[e] * (h @ f.up.weight.T + f.up.bias)
        out.append(rows)
        means.append(mean)
        gates.append(g)
    return torch.stack(out), torch.stack(means), torch.stack(gates)


def rho(d, mean):
    z = d.encoder.weight @ mean + d.encoder.bias
    back = d.decoder.weight @ z + d.decoder.bias
    return sum((back - mean) ** 2) / len(mean)


def reference(tuned, base, batch, model, trains):
    """(loss of the task and of the descriptors that train, outputs, errors by block, g by block) of
    the untouched model with hooks."""
    seen, errors, gates, hooks = {}, {}, {}, []
    mask = batch.get("attention_mask")
    for number in (0, 1):
        adapters = at(tuned, number)

        def read(module, args, number=number):
            seen[number] = args[0]

        def write(module, args, out, number=number, adapters=adapters):
            added, means, gates[number] = mixture(adapters, seen[number], mask)
            for a in adapters:
                if a in trains:
                    errors[number] = torch.stack([rho(a.descriptor, m.detach()) for m in means])
            return out + added

        hooks += [base.get_submodule(READ[model].format(number)).register_forward_pre_hook(read),
                  base.get_submodule(WRITE[model].format(number)).register_forward_hook(write)]
    out = base(**batch)
    for h in hooks:
        h.remove()
    return out.loss + sum(e.mean() for e in errors.values()), out, errors, gates


@pytest.mark.parametrize("model", ["vit", "bert"])
@pytest.mark.parametrize("grow", [(), (1,), (0, 1), (1, 1)])
def test_outputs_and_all_gradients_are_the_equations(model, grow):
    tuned, net, base, batch = made(model, grow)
    trains = [m for _, m in tuned.branches(Modular, tuned.training)]
    tuned.optimizer()
    loss, want, _, gates = reference(tuned, base, batch, model, trains)
    assert [len(at(tuned, n)) for n in (0, 1)] == [1 + grow.count(n) for n in (0, 1)]
    torch.testing.assert_close(net(**batch).logits, want.logits)
    tuned.loss(batch).backward()
    names, params = zip(*tuned.named_parameters(), strict=True)
    for n, p, g in zip(names, params, torch.autograd.grad(loss, params), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
        assert g.any(), n
    assert all(torch.allclose(g.sum(1), torch.ones(3).double()) for g in gates.values())
    assert all(not n.startswith("default") and (".router." in n) <= bool(grow) for n in names)


def test_it_is_the_base_before_training_with_newcomers_too():
    tuned, net, base, batch = made(grow=(0, 1), stirred=0)
    assert torch.equal(net(**batch).logits, base(**batch).logits)


def test_another_router_unit_divides_the_weights_anew_and_keeps_their_proportions():
    tuned, net, base, batch = made(grow=(1,))
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tuned.add("last", f"sema({SMALL}, grown=1)", head=False)
    net.double()
    three = (("default", 1.0), ("more0", 1.0), ("last", 1.0))
    one = at(tuned, 1)[0]
    with resume(Call(tuned.state, active=three[:2])):
        _, before = one.weights(x)
    with resume(Call(tuned.state, active=three)):
        all_, after = one.weights(x)
    assert before.shape == (5, 2) and after.shape == (5, 3) and len(all_) == 3
    torch.testing.assert_close(after[:, :2] / after[:, :2].sum(1, keepdim=True), before)
    assert (after[:, 2] > 0).all()


def test_errors_are_recorded_once_while_a_descriptor_trains_and_the_last_ones_stay():
    for recipe in ("", " + checkpoint"):
        net, batch = tiny("vit", dtype=torch.float64, batch=3)
        base = copy.deepcopy(net).requires_grad_(False)
        tuned = burnish.tune(net, f"sema({SMALL}){recipe}", head=False)
        net.double()
        tuned.optimizer(lr=1e-2)
        d = [m.descriptor for m in at(tuned, 0) + at(tuned, 1)]
        want = [[], []]
        for _ in range(4):
            trains = at(tuned, 0) + at(tuned, 1)
            _, _, errors, _ = reference(tuned, base, batch, "vit", trains)
            for n in (0, 1):
                want[n] += errors[n].tolist()
            assert [int((x.record >= 0).sum()) for x in d] == [min(7, len(want[0]) - 3)] * 2
            tuned.step(batch)
        for n in (0, 1):
            torch.testing.assert_close(d[n].record, torch.tensor(want[n][-7:]).double())
        before = [x.record.clone() for x in d]
        net.eval()
        net(**batch)
        for x in d:
            x.requires_grad_(False)
        net.train()
        tuned.step(batch)
        assert all(torch.equal(x.record, b) for x, b in zip(d, before, strict=True))


def test_the_deviation_is_the_formula_and_nothing_is_unlike_two_errors():
    torch.manual_seed(0)
    d = Descriptor(6, 3, 5).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    r = [float(rho(d, row).detach()) for row in x]
    assert torch.equal(d.unlike(x), torch.zeros(4).double())
    d.remember(torch.tensor([1.0, 2.0]))
    assert torch.equal(d.unlike(x), torch.zeros(4).double())
    for new in ([4.0], [0.5, 3.0, 2.5]):             # three of them; then the first has gone
        d.remember(torch.tensor(new))
    held = [2.0, 4.0, 0.5, 3.0, 2.5]
    mean = sum(held) / 5
    s = math.sqrt(sum((h - mean) ** 2 for h in held) / 4)
    torch.testing.assert_close(d.unlike(x), torch.tensor([abs(e - mean) / s for e in r]).double())
    few = Descriptor(6, 3, 5).double()
    few.load_state_dict({**d.state_dict(), "record": torch.tensor([-1, -1, 1.0, 2, 4]).double()})
    s = math.sqrt(sum((h - 7 / 3) ** 2 for h in (1, 2, 4)) / 2)
    torch.testing.assert_close(few.unlike(x),
                               torch.tensor([abs(e - 7 / 3) / s for e in r]).double())


def task(shift=0.0, seed=0, n=24):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 16, 16, generator=g)
    y = torch.arange(n) % 3
    x = x + shift * torch.linspace(-1, 1, 16) + y.view(-1, 1, 1, 1) / 2
    return [{"pixel_values": x[i:i + 8], "labels": y[i:i + 8]} for i in range(0, n, 8)]


def learnt(threshold=2.0, steps=120):
    net, _ = tiny("vit", batch=3)
    tuned = burnish.tune(net, f"sema(layers=(0, 1), bottleneck=3, descriptor=16, buffer=24, "
                              f"threshold={threshold}) + sgd(momentum=0.9)", head=False)
    taught(tuned, task(), steps)
    return tuned


def taught(tuned, data, steps=120):
    method = tuned.recipe[0]
    for _ in tuned.run(method.stages(tuned, ()), lambda stage: data * steps, total=steps, lr=5e-2):
        pass


def test_a_repeat_adds_nothing_a_shift_adds_the_shallowest_block_and_the_rest_stays():
    tuned = learnt()
    method, net = tuned.recipe[0], tuned.model
    net.train()
    assert method.lifecycle(tuned, "again", task()) is None
    assert list(tuned.adapters) == ["default"] and net.training
    before = {n: t.clone() for n, t in net.state_dict().items()}
    assert method.lifecycle(tuned, "new", task(6.0, seed=1)) == 0
    assert tuned.training == "new" and dict(tuned.state.active) == {"default": 1.0, "new": 1.0}
    d, m, k = 32, 3, 16
    own = 2 * d * m + m + d + 2 * d * k + k + d + d + 1
    assert sum(p.numel() for p in tuned.parameters()) == own == \
        tuned.recipe[0].count(d, grows=True)
    assert str(tuned.recipe[1]) == "sgd(momentum=0.9)"
    taught(tuned, task(6.0, seed=1))
    after = net.state_dict()
    for n, t in before.items():                      # records of errors among them
        assert torch.equal(t, after[n]), n
    assert any(not torch.equal(t, torch.zeros_like(t)) for n, t in after.items()
               if ".new." in n and ".up." in n)
    assert method.lifecycle(tuned, "same", task(6.0, seed=1), but=(0, 1)) is None
    assert method.lifecycle(tuned, "same", task()) is None
    assert int((at(tuned, 0)[1].descriptor.record >= 0).sum()) == 24


def test_one_adapter_to_which_it_is_like_is_enough():
    """min over adapters, not the first's or the mean; and the mean over the batch, not a row."""
    tuned = learnt()
    net, method = tuned.model, tuned.recipe[0]
    data = task(6.0, seed=1)
    method.lifecycle(tuned, "new", data)
    first, new = at(tuned, 0)
    heard = first.heard = []
    net.eval()
    net(**data[0])
    x, first.heard = heard[0], None
    errors = torch.stack([rho(first.descriptor, row) for row in x]).detach()
    only = {"default": 1.0}
    tuned.use({**only, "new": 1.0})
    new.descriptor.load_state_dict(first.descriptor.state_dict())
    for spread, sees in ((10.0, None), (1e-4, 0)):   # like it, and then not
        new.descriptor.record.fill_(-1.0)
        new.descriptor.remember(errors.mean() + spread * torch.linspace(-1, 1, 9))
        z = float(new.descriptor.unlike(x).mean())
        assert (z > 2) == (sees == 0)
        assert method.lifecycle(tuned, f"x{spread:.0f}", data[:1], but=(1,)) == sees
        tuned.use({**only, "new": 1.0})


def test_the_threshold_decides_and_blocks_that_are_done_are_passed_over():
    tuned = learnt(threshold=1e9)
    data = task(6.0, seed=1)
    assert tuned.recipe[0].lifecycle(tuned, "new", data) is None
    low = Sema(layers=(0, 1), bottleneck=3, descriptor=16, buffer=24, threshold=0.0)
    assert low.lifecycle(tuned, "new", data, but=(0,)) == 1
    assert [len(at(tuned, n)) for n in (0, 1)] == [1, 2]


def test_what_has_grown_resumes_exactly_from_a_file(tmp_path):
    def grown():
        tuned = learnt()
        tuned.recipe[0].lifecycle(tuned, "new", task(6.0, seed=1))
        tuned.optimizer(lr=1e-2)
        tuned.model.train()
        for batch in task(6.0, seed=1):
            tuned.step(batch)
        return tuned

    tuned = grown()
    tuned.save(tmp_path / "a", whole=True)
    state = copy.deepcopy(tuned.current_optimizer.state_dict())
    again = burnish.load(tiny("vit", batch=3)[0], tmp_path / "a")
    assert again.training == "new" and dict(again.state.active) == dict(tuned.state.active)
    again.optimizer(lr=1e-2).load_state_dict(state)
    again.model.train()
    for batch in task(6.0, seed=2):
        assert torch.equal(tuned.step(batch), again.step(batch))
    there = again.model.state_dict()
    assert all(torch.equal(t, there[n]) for n, t in tuned.model.state_dict().items())
    data = task(-6.0, seed=3)
    methods = [t.recipe[0] for t in (tuned, again)]
    assert methods[0] == methods[1]
    assert methods[0].lifecycle(tuned, "third", data) == methods[1].lifecycle(again, "third", data)


def test_stages_train_adapters_first_and_descriptors_then():
    tuned, net, _, batch = made(grow=(), dtype=torch.float32)
    tuned.add("new", f"sema({SMALL}, functional=0.25, grown=1)", head=False)
    tuned.use({"default": 1.0, "new": 1.0}, train="new")
    moved, last = [], {n: p.detach().clone() for n, p in net.named_parameters()}
    for stage, _, _ in tuned.run(tuned.recipe[0].stages(tuned, ()), lambda s: [batch] * 8, total=8,
                                 lr=1e-2):
        now = {n: p.detach().clone() for n, p in net.named_parameters()}
        moved.append({n for n in now if not torch.equal(now[n], last[n])})
        last = now
        assert dict(stage.beside) == {"default": 1.0}
    for k, names in enumerate(moved):
        assert names and all(".new." in n and (".descriptor." in n) == (k >= 2) for n in names)
    assert any(".router." in n for n in moved[1])
    with pytest.raises(RecipeError, match="learner 'sema'"):
        tuned.recipe[0].stages(tuned, ("a", "b")).__next__()


def test_descriptors_have_a_rate_of_their_own():
    tuned, net, _, batch = made(grow=(), more=", descriptor_rate=3.0")
    opt = tuned.optimizer(lr=1e-2)
    rates = {id(p): g["lr"] for g in opt.param_groups for p in g["params"]}
    for n, p in tuned.named_parameters():
        assert rates[id(p)] == pytest.approx(3e-2 if ".descriptor." in n else 1e-2), n


def test_the_promise_is_of_the_dearest_stage():
    net, batch = tiny("bert")
    text = "sema(layers=(1,), bottleneck=4, descriptor=32, buffer=3)"
    promise = simulate(copy.deepcopy(net), text, batch)
    tuned = burnish.tune(net, text)
    first = next(iter(tuned.recipe[0].stages(tuned, ())))
    begin(tuned, first)
    tuned.optimizer(lr=1e-3)
    assert len(promise.stages) == 2
    assert abs(promise.peak_bytes / measure(tuned, batch).peak_bytes - 1) < 0.03


def test_counts_and_defaults_are_the_papers():
    m = Sema()
    assert (m.bottleneck, m.layers, m.threshold, m.buffer, m.descriptor) == \
        (16, (9, 10, 11), 2.0, 500, 128)
    d = 768
    assert m.count(d) == 25_360 and m.count(d, grows=True) == 25_360 + 197_504
    assert Sema(grown=9).count(d, grows=True) == 25_360 + 197_504 + 769
    net, _ = tiny("vit", meta=True, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                  num_attention_heads=12)
    made = [b.module for b in m.mixture(Anatomy.of(net))]
    assert sum(p.numel() for b in made for p in b.parameters() if p.requires_grad) == \
        12 * 25_360 + 3 * 197_504
    (one,) = (b.module for b in Sema(grown=10).mixture(Anatomy.of(net)))
    assert sum(p.numel() for p in one.parameters()) == 25_360 + 197_504 + 769 and one.number == 10
    start = Descriptor(768, 128, 500)
    assert not start.encoder.bias.any() and not start.decoder.bias.any()
    assert start.encoder.weight.abs().max() <= 768 ** -0.5 < 1.05 * start.encoder.weight.abs().max()
    assert len(start.record) == 500 and (start.record == -1).all()


def test_means_keep_the_rows_of_a_sample_together():
    x = torch.arange(24.0).view(4, 3, 2)
    with resume(Call(samples=(2,))):                 # windows: two rows of each sample
        assert torch.equal(token_means(x), x.view(2, 6, 2).mean(1))
    with resume(Call(samples=(3,))), pytest.raises(RecipeError, match="for 3 samples"):
        token_means(x)
    assert torch.equal(token_means(x), x.mean(1))


@pytest.mark.parametrize("text, says", [
    ("sema(layers=(9,))", "blocks 0 to 1"),
    ("sema(layers=())", "each once"), ("sema(layers=(1, 1))", "each once"),
    ("sema(layers=(-1, 1))", "each once"),
    ("sema(layers=(1,), bottleneck=0)", "widths of at least 1"),
    ("sema(layers=(1,), descriptor=0)", "widths of at least 1"),
    ("sema(layers=(1,), buffer=2)", "at least 3"),
    ("sema(layers=(1,), threshold=-0.1)", "threshold of at least 0"),
    ("sema(layers=(1,), descriptor_rate=0.0)", "above 0"),
    ("sema(layers=(1,), functional=1.0)", "between 0 and 1"),
    ("sema(layers=(1,), functional=0.0)", "between 0 and 1"),
    ("sema(layers=(1,), grown=0)", "in one of layers"),
    ("sema(layers=(1,), grown=1, targets='fc1')", "no targets of its own"),
    ("sema(layers=(1,), targets='layers.0.mlp.fc2')", "block 1 is to grow"),
    ("sema(layers=(1,)) + sema(layers=(0,))", "adapters added on demand")])
def test_refusals(text, says):
    with pytest.raises(RecipeError, match=says):
        burnish.tune(tiny("vit")[0], text)


def test_a_newcomer_trains_beside_others_alone_and_a_scan_needs_somebody():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "sema(layers=(1,), grown=1)", head=False)
    with pytest.raises(RecipeError, match="use them together"):
        tuned.step(batch)
    net.eval()
    with torch.no_grad():
        net(**batch)
    other = burnish.tune(tiny("vit")[0], "lora(rank=2)", head=False)
    with pytest.raises(RecipeError, match="nothing that could see a shift"):
        Sema(layers=(1,)).lifecycle(other, "new", [batch])
