"""UDS: scores by plain SVD and FFT in float64, and steps of the samples that were kept."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import burnish
from burnish.blocks.choose.novelty import PERIOD, STRIP, Recent, Sketch, nuclear
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.fit.passing import Passing
from burnish.memory import measure, simulate
from burnish.methods.controller.uds import PASSES, SURER
from burnish.testing.models import tiny

LR = 0.1


# -- the blocks -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (1, 5), (5, 2 * STRIP + 3), (6, 6)])
def test_the_gram_matrix_gives_the_sum_of_singular_values(shape):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=g)
    z[0] *= 1e3                                          # and small ones beside a large one
    want = torch.linalg.svdvals(z.double()).sum()
    assert float(nuclear(z)) == pytest.approx(float(want), rel=1e-6)
    assert nuclear(z).dtype == torch.float64


def by_fft(z, rows, columns, seed):
    """The sketch through the whole two-dimensional transform."""
    length, width = z.shape
    g = torch.Generator().manual_seed(seed)
    over_l = torch.randint(PERIOD, (rows,), generator=g)
    blocks = -(-length // PERIOD)
    signs_l = torch.cat([torch.randint(2, (PERIOD,), generator=g) for _ in range(blocks)]) * 2 - 1
    g.manual_seed(seed + 1)
    over_v = torch.randint(width, (columns,), generator=g)
    signs_v = torch.randint(2, (width,), generator=g) * 2 - 1
    flipped = torch.zeros(blocks * PERIOD, width, dtype=torch.float64)
    flipped[:length] = z.double() * signs_l[:length, None] * signs_v
    folded = flipped.view(blocks, PERIOD, width).sum(0)
    return torch.fft.fft2(folded)[over_l][:, over_v].real.flatten() * (2 / rows / columns) ** 0.5


@pytest.mark.parametrize("shape", [(1, 9), (12, 50), (PERIOD + 40, 11), (3, STRIP + 17)])
def test_the_sketch_is_the_two_sided_transform(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = Sketch(3, 5, 4).of(z)
    torch.testing.assert_close(got.double(), by_fft(z, 3, 5, 4), rtol=1e-4, atol=1e-4)
    longer = torch.cat([z, torch.zeros(PERIOD, shape[1])])
    torch.testing.assert_close(Sketch(3, 5, 4).of(longer), got, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(Sketch(3, 5, 5).of(z), got)


@pytest.mark.parametrize("rank", [1, 30])
def test_distances_are_kept_within_a_tenth_on_average(rank):
    g = torch.Generator().manual_seed(2)
    ratios = []
    for seed in range(40):
        a, b = (torch.randn(30, rank, generator=g) @ torch.randn(rank, 200, generator=g)
                for _ in "ab")
        sketch = Sketch(8, 128, seed)
        ratios.append(float((sketch.of(a) - sketch.of(b)).norm() / (a - b).norm()))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)
    assert sum(abs(r - 1) for r in ratios) / len(ratios) < (0.1 if rank > 1 else 0.3)


def test_only_the_last_are_remembered():
    recent = Recent(2)
    e = torch.tensor([[0.0, 0], [3, 4], [0, 8]])
    assert recent.far(e).tolist() == [0, 0, 0] and not len(recent)
    recent.add(e[:1])
    assert recent.far(e).tolist() == [0, 5, 8]
    recent.add(e[1:])                                    # the first is gone
    assert len(recent) == 2 and recent.far(e).tolist() == [6.5, 2.5, 2.5]
    other = Recent(2)
    other.load(recent.state())
    other.add(torch.zeros(1, 2))                         # in place of the older one
    assert other.far(e).tolist() == [4, 5, 4]


# -- the step -------------------------------------------------------------------------------------
class Words(nn.Module):
    """(n, 6) tokens -> (n, 6, 9) logits."""

    def __init__(self, p=0.0):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.a(self.table(x)))))


def said(out, batch):
    return nn.functional.cross_entropy(out.flatten(0, 1), batch[1].flatten())


def start(p=0.0, n=5):
    torch.manual_seed(0)
    net = Words(p).double()
    with torch.no_grad():
        net.b.weight *= 3
    g = torch.Generator().manual_seed(1)
    return net, [tuple(torch.randint(9, (n, 6), generator=g) for _ in "xy") for _ in range(6)]


def by_hand(net, batches, keep, alpha, memory, rows, columns, seed, scale=1.0):
    """The samples of each step, and the weights after them."""
    net, held, kept = copy.deepcopy(net), [], []
    for x, y in batches:
        with torch.no_grad():
            z = copy.deepcopy(net).eval()(x)
        e = [by_fft(one, rows, columns, seed) * scale for one in z]
        far = [sum((a - b).norm() for b in held) / len(held) if held else 0.0 for a in e]
        score = [float(torch.linalg.svdvals(one).sum() + alpha * f)
                 for one, f in zip(z, far, strict=True)]
        best = sorted(sorted(range(len(x)), key=lambda i: -score[i])[:keep])
        held = [*held, *(e[i] for i in best)][-memory:]
        kept.append(best)
        grads = torch.autograd.grad(said(net(x[best]), (None, y[best])), list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= LR * g
    return net, kept


def tuned_on(net, recipe, batches):
    tuned = burnish.tune(net, f"full + {recipe} + sgd", head=True)
    tuned.optimizer(LR)
    seen = []
    net.table.register_forward_hook(
        lambda m, args, out: seen.append(args[0]) if torch.is_grad_enabled() else None)
    for b in batches:
        tuned.step(b, said)
    kept = [[i for i, row in enumerate(b[0]) if any(torch.equal(row, r) for r in x)]
            for b, x in zip(batches, seen, strict=True)]
    return tuned, kept


@pytest.mark.parametrize("alpha,memory,keep", [(0.0, 3, 2), (2.0, 3, 2), (2.0, 1, 1),
                                               (50.0, 64, 3)])
def test_steps_are_those_of_the_best_samples(alpha, memory, keep):
    net, batches = start()
    want, kept = by_hand(net, batches, keep, alpha, memory, 4, 6, 3)
    tuned, mine = tuned_on(net, f"uds(best={keep}, alpha={alpha}, buffer={memory}, sketch_rows=4, "
                                "sketch_columns=6, seed=3)", batches)
    assert mine == kept and len({tuple(k) for k in kept}) > 1
    for (name, a), b in zip(tuned.model.state_dict().items(), want.state_dict().values(),
                            strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=name)
    assert tuned.timeline.told()["uds"] == {"seen": 30, "trained": 6 * keep}


def test_each_setting_of_the_distance_changes_who_is_chosen():
    found = {}
    for said_ in ("", "buffer=1", "sketch_rows=1", "sketch_columns=1", "seed=1",
                  "legacy_scale=True", "best=1"):
        net, batches = start(n=40)
        recipe = f"uds(alpha=0.5{', ' if said_ else ''}{said_})"
        found[said_] = tuned_on(net, recipe, batches)[1]
    assert all(v != found[""] for k, v in found.items() if k)


def test_the_authors_scale_and_its_strength_are_another_writing_of_ours():
    """alpha |e - e'| is the same when distances grow by sqrt(L V) / 2 and alpha falls by it."""
    factor = (6 * 9) ** 0.5 / 2
    runs = []
    for text in (f"uds(alpha={3 * factor})", "uds(alpha=3.0, legacy_scale=True)"):
        net, batches = start()
        runs.append(tuned_on(net, text, batches)[1])
    assert runs[0] == runs[1]
    assert parse("uds(legacy_scale=True)")[0].strength == 2.5e-3
    assert parse("uds")[0].strength == pytest.approx(2.5e-3 * (512 * 152_064) ** 0.5 / 2, rel=0.01)


def test_with_all_of_them_kept_it_is_ordinary_training_bit_for_bit():
    ends = []
    for recipe in ("sgd", "uds(best=5) + sgd", "uds(best=9) + sgd"):
        net, batches = start(0.4)
        tuned = burnish.tune(net, f"full + {recipe}", head=True)
        tuned.optimizer(LR)
        torch.manual_seed(7)
        for b in batches:
            tuned.step(b, said)
        ends.append(net.state_dict())
    for other in ends[1:]:
        assert all(torch.equal(v, other[k]) for k, v in ends[0].items())


def test_looking_is_without_dropout_and_leaves_the_mode():
    net, batches = start(0.5)
    picked = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        picked.append(tuned_on(copy.deepcopy(net), "uds(best=2)", batches[:1])[1])
    assert picked[0] == picked[1] and net.training


def test_the_loss_of_the_samples_that_train_falls():
    net, batches = start()
    tuned = burnish.tune(net, "full + uds(best=2, alpha=0.0) + sgd", head=True)
    tuned.optimizer(LR)
    losses = [float(tuned.step(batches[0], said)) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_it_goes_on_where_it_stood():
    net, batches = start()
    whole, _ = tuned_on(copy.deepcopy(net), "uds(best=1, buffer=3)", batches)
    first, _ = tuned_on(net, "uds(best=1, buffer=3)", batches[:4])
    state = first.timeline.state()
    first.optimizer(LR)                                  # its controller remembers nothing
    first.timeline.load(state)
    for b in batches[4:]:
        first.step(b, said)
    for a, b in zip(whole.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.timeline.told()["uds"]["seen"] == 30


# -- of a classifier ------------------------------------------------------------------------------
def classified(passes, clear, best=2, every=6):
    """(the handle, mean probability of the likeliest class over those kept and over all) after so
    many passes over rows of which every third is `clear`, in a classifier that stays as it is."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    tuned = burnish.tune(net, f"full + uds(best={best}, alpha=0.0) + sgd", head=True)
    tuned.optimizer(0.0)
    sums = torch.zeros(2, dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    for _ in range(passes):
        x = torch.randn(every, 4, generator=g, dtype=torch.float64)
        x[::3] *= clear
        z = (x @ net.weight.t() + net.bias).detach()
        p = (z.exp() / z.exp().sum(1, keepdim=True)).max(1).values
        kept = z.norm(dim=1).argsort(descending=True)[:best]
        sums += torch.stack([p[kept].mean(), p.mean()])
        tuned.step((x, torch.zeros(every, dtype=torch.long)),
                   lambda out, b: nn.functional.cross_entropy(out, b[1]))
    return tuned, (sums / passes).tolist()


def test_a_classifier_whose_surest_rows_are_kept_is_told_once():
    with pytest.warns(UserWarning, match="keeps what this classifier knows") as told:
        tuned, (mine, pool) = classified(PASSES, 20.0)
    assert mine - pool > SURER and len(told) == 1
    assert f"{mine:.0%} on average of the {2 * PASSES} rows that trained and {pool:.0%} of all " \
           f"{6 * PASSES}" in str(told[0].message)
    assert tuned.timeline.told()["uds"]["confidence"] == pytest.approx(
        {"seen": pool, "trained": mine}, abs=1e-4)
    with pytest.warns(UserWarning, match="keeps what") as told:
        classified(3 * PASSES, 20.0)
    assert len(told) == 1


def test_nothing_is_said_before_it_is_known_or_where_all_are_as_sure(recwarn):
    classified(PASSES - 1, 20.0)
    _, (mine, pool) = classified(PASSES, 0.5)
    assert 0 < mine - pool < SURER
    net, batches = start()
    tuned, _ = tuned_on(net, "uds(best=2, alpha=0.0)", batches * 3)
    assert "confidence" not in tuned.timeline.told()["uds"], "a row a token: length is not sureness"
    assert not recwarn.list


def test_how_sure_it_was_is_kept_with_a_run():
    tuned, _ = classified(5, 20.0)
    said = tuned.timeline.told()
    state = tuned.timeline.state()
    tuned.optimizer(0.0)
    tuned.timeline.load(state)
    assert tuned.timeline.told() == said


# -- of a language model --------------------------------------------------------------------------
def prompted(n=4):
    net, batch = tiny("llama")
    batch = {k: v.repeat(-(-n // len(v)), *[1] * (v.dim() - 1))[:n].clone()
             for k, v in batch.items()}
    g = torch.Generator().manual_seed(5)
    batch["input_ids"] = torch.randint(net.config.vocab_size, batch["input_ids"].shape,
                                       generator=g)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :4] = -100
    return net.float().eval(), batch


def test_prompts_and_padding_do_not_score():
    """Row n answers token n + 1: what counts are the rows whose next token is a label."""
    net, batch = prompted()
    with torch.no_grad():
        z = net(**batch).logits.double()
    counts = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    tuned = burnish.tune(net, "lora(rank=2) + uds(best=2, alpha=0.0)")
    tuned.optimizer(1e-3)
    tuned.step(batch)
    best = sorted(range(4), key=lambda i: -float(torch.linalg.svdvals(z[i][counts[i]]).sum()))[:2]
    held = dict(tuned.timeline.handlers)["uds"].recent.held[:2].double()
    masked = z * counts[..., None]
    for e, i in zip(held, sorted(best), strict=True):
        torch.testing.assert_close(e, by_fft(masked[i], 8, 128, 0), rtol=1e-3, atol=1e-4)


def test_without_labels_the_attention_mask_says_what_counts():
    net, batch = prompted()
    del batch["labels"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5:] = 0
    tuned = burnish.tune(net, "lora(rank=2) + uds(best=4)")
    tuned.optimizer(1e-3)
    with torch.no_grad():
        z = net(**batch).logits.double() * batch["attention_mask"][..., None]
    tuned.step(batch, lambda out, _: out.logits.square().mean())
    held = dict(tuned.timeline.handlers)["uds"].recent.held
    torch.testing.assert_close(held[1].double(), by_fft(z[1], 8, 128, 0), rtol=1e-3, atol=1e-4)


def of_the_model(counts):
    """What its layers take, and not what is made of its logits."""
    return sum(sum(v.values()) for name, v in counts.items()
               if name.endswith((".model", ".lm_head")))


def test_a_step_costs_a_forward_and_its_share_of_a_step():
    net, batch = prompted(8)
    spent = {}
    for recipe in ("lora(rank=2)", "lora(rank=2) + uds(best=2)"):
        model = copy.deepcopy(net)
        tuned = burnish.tune(model, recipe)
        tuned.optimizer(1e-3)
        tuned.step(batch)
        with FlopCounterMode(display=False) as count:
            tuned.step(batch)
        counts = count.get_flop_counts()
        spent[recipe] = of_the_model(counts)
    with FlopCounterMode(display=False) as count, torch.no_grad():
        net(**batch)
    forward = of_the_model(count.get_flop_counts())
    assert spent["lora(rank=2) + uds(best=2)"] == pytest.approx(
        forward + spent["lora(rank=2)"] * 2 / 8, rel=0.05)     # and what does not shrink with rows


@pytest.mark.parametrize("more", ["", " + chunked_loss", " + checkpoint"])
def test_the_promise_is_of_the_samples_that_train(more):
    net, batch = prompted(32)
    recipe = f"lora(rank=2) + uds(best=1, buffer=8, sketch_columns=2){more}"
    promised = simulate(net, recipe, batch).peak_bytes
    if not more:
        assert promised < simulate(net, "lora(rank=2)", batch).peak_bytes
    tuned = burnish.tune(net, recipe)
    assert measure(tuned, batch).peak_bytes == pytest.approx(promised, rel=0.005)


def test_in_fit_a_micro_batch_keeps_its_weight_in_the_update():
    """transformers divides a sum by the answers of all micro-batches; two of four rows with 3 of
    10 answers are divided by as much less."""
    calls = []
    labels = torch.full((4, 6), -100)
    for row, n in enumerate((1, 2, 3, 4)):
        labels[row, 1:1 + n] = 1
    ids = torch.arange(24).view(4, 6)
    net, _ = tiny("llama")
    fit = Passing()
    fit.args, fit.accelerator = SimpleNamespace(world_size=1), SimpleNamespace(scaler=None)
    fit.tuned = SimpleNamespace(model=net, steps=SimpleNamespace(still=False),
                                timeline=SimpleNamespace(handlers=[]),
                                around=lambda whole, alone, each, scale, some: some([0, 1])[0]())
    fit._pass(lambda model, inputs, items: calls.append((inputs, items)), net,
              {"input_ids": ids, "labels": labels}, torch.tensor(40.0))
    (inputs, items), = calls
    assert torch.equal(inputs["input_ids"], ids[:2]) and float(items) == pytest.approx(40 * 3 / 10)
    fit._pass(lambda model, inputs, items: calls.append((inputs, items)), net,
              {"input_ids": ids, "labels": labels}, None)
    assert calls[-1][1] is None


@pytest.mark.slow
def test_a_run_trains_on_what_it_keeps_and_says_so(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    from burnish.fit.pictures import Picture

    torch.manual_seed(0)
    net = ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=10))
    burnish.fit(net, "digits", "lora(rank=2) + uds(best=3)", output=tmp_path, batch_size=8,
                max_steps=4, quiet=True, report=False, test=False, measure=False, validation=0,
                processor=Picture(8, 8, (0.5,), (0.5,)))
    told = json.loads((tmp_path / "run.json").read_text())
    said = told["told"]["uds"]
    assert (said["seen"], said["trained"]) == (32, 12)
    assert 0.1 < said["confidence"]["seen"] <= said["confidence"]["trained"] < 1


# -- refusals -------------------------------------------------------------------------------------
def test_refusals_and_defaults():
    assert parse("uds")[0].settings() == {
        "targets": None, "best": 2, "alpha": None, "buffer": 1024, "sketch_rows": 8,
        "sketch_columns": 128, "legacy_scale": False, "seed": 0}
    for text in ("best=0", "buffer=0", "sketch_rows=0", "sketch_columns=0", "alpha=-1",
                 "alpha=1e999"):
        with pytest.raises(RecipeError, match="^uds"):
            parse(f"uds({text})")
    parse("uds(best=1, buffer=1, sketch_rows=1, sketch_columns=1, alpha=0)")
    for text in ("full + uds + step_in_backward", "full + uds + mezo", "lora + dp + uds"):
        with pytest.raises(RecipeError, match="uds"):
            parse(text)


def test_maps_are_no_logits():
    net = nn.Conv2d(1, 3, 1)
    tuned = burnish.tune(net, "full + uds", head=True)
    tuned.optimizer(LR)
    with pytest.raises(ConfigError, match="uds reads logits"):
        tuned.step((torch.zeros(4, 1, 5, 5), None), lambda out, _: out.mean())
