"""I-LoRA: two sets of factors, which of them answers, and what holds the one near the other."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.reservoir import Reservoir
from burnish.blocks.weight.interpolated import Interpolated
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, DataError, RecipeError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.testing import follows, stir, tiny
from burnish.testing.checks.cost import keeps_what_it_says


def parts(term):
    """(A, B, A_slow, B_slow) themselves, whatever the mode."""
    return (*term._parameters.values(), *term._buffers.values())


def layer(recipe="i_lora(rank=3, alpha=6.0)"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 8)).double()
    W, b = (t.detach().clone() for t in net[0].parameters())
    tuned = burnish.tune(net, recipe, targets="0", head=False)
    ((_, term),) = tuned.terms(Interpolated)
    term.double()
    return tuned, term, W, b


def test_while_training_it_is_lora():
    tuned, term, W, b = layer()
    A, B, A_slow, B_slow = parts(term)
    assert A.shape == (3, 10) and B.shape == (8, 3) and not B.any()
    assert torch.equal(A, A_slow) and torch.equal(B, B_slow)
    assert {id(p) for p in tuned.parameters()} == {id(A), id(B)}
    stir(tuned, size=0.5)
    with tuned.given(replay=0):
        follows(tuned, lambda x, A, B: x @ W.t() + 2.0 * x @ A.t() @ B.t() + b, [A, B],
                (5, 3, 10), merged=False)


def apart():
    tuned, term, W, b = layer()
    stir(tuned, size=0.5)
    A, B, A_slow, B_slow = parts(term)
    with torch.no_grad():
        for k, t in enumerate((A_slow, B_slow)):
            t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(k)))
    return tuned, term, W + 2.0 * (B_slow @ A_slow), b


def test_in_evaluation_and_in_a_merged_weight_the_long_term_set_answers():
    tuned, term, slow, b = apart()
    x = torch.randn(4, 10, dtype=torch.float64)
    with tuned.given(replay=0):
        working = tuned.model(x)
    tuned.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned.model(x), F.linear(x, slow, b))
    assert torch.equal(tuned.model(x), working)              # a graph: this is training
    tuned.model.train()
    with torch.no_grad(), tuned.given(replay=0):
        assert torch.equal(tuned.model(x), working)
    torch.testing.assert_close(tuned.merge()[0].weight, slow)            # whatever the mode
    tuned.unmerge()
    with tuned.given(replay=0):
        assert torch.equal(tuned.model(x), working)


@pytest.mark.parametrize("recipe, model", [
    ("i_lora(rank=2)", "llama"), ("i_lora(rank=2) + checkpoint", "llama"),
    ("i_lora(rank=2)", "cnn")])
def test_gradients_are_the_working_sets_in_either_mode(recipe, model):
    """Also where a block runs without a graph first, and where the mode changes in between."""
    net, batch = tiny(model, dtype=torch.float64)
    tuned = burnish.tune(net, recipe, head=False)
    for k, (_, term) in enumerate(tuned.terms(Interpolated)):
        term.double()
        g = torch.Generator().manual_seed(k)
        for t in parts(term):
            t.data.copy_(0.3 * torch.randn(t.shape, generator=g))
        assert not any(t.requires_grad for t in parts(term)[2:])
    found = []
    for first, second in ((True, True), (True, False), (False, False), (False, True)):
        net.train(first)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        tuned.model.zero_grad()
        loss = tuned.loss({**batch, "replay": 0})
        net.train(second)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in tuned.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(g.any() for g in found[0])
    with torch.no_grad():
        net.eval()
        assert float(tuned.loss({**batch, "replay": 0})) != float(found[0][0])
    norms = tuned.sample_norms({**batch, "replay": torch.zeros(2, dtype=torch.long)})
    assert norms.shape == (2,) and bool((norms > 0).all())


def test_it_leaves_as_a_plain_lora_of_the_long_term_set(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "i_lora(rank=2)", head=False)
    stir(tuned)
    for _, term in tuned.terms(Interpolated):
        term._buffers["B_slow"].normal_(generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = net.eval()(**batch).logits
    burnish.export_peft(tuned, tmp_path / "peft")
    other = tiny("llama")[0]
    burnish.load_peft(other, tmp_path / "peft")
    torch.testing.assert_close(other.eval()(**batch).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ema", [0.0, 0.3, 0.99])
def test_the_long_term_set_is_the_running_mean(ema):
    net, batch = tiny("vit")
    tuned = burnish.tune(net, f"i_lora(rank=2, ema={ema})", head=False)
    tuned.optimizer(lr=1e-2)
    terms = [t for _, t in tuned.terms(Interpolated)]
    want = [[t.detach().clone() for t in parts(term)[2:]] for term in terms]
    for _ in range(4):
        tuned.step({**batch, "replay": torch.zeros(2, dtype=torch.long)})
        for term, slow in zip(terms, want, strict=True):
            A, B, A_slow, B_slow = parts(term)
            for w, now in zip(slow, (A, B), strict=True):
                w.mul_(ema).add_(now.detach(), alpha=1 - ema)
            if not ema:
                assert torch.equal(A_slow, A) and torch.equal(B_slow, B)
            torch.testing.assert_close((A_slow, B_slow), tuple(slow), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("model, recipe", [
    ("vit", "full(targets='head') + i_lora"), ("llama", "i_lora"), ("cnn", "i_lora"),
    ("llama", "checkpoint + i_lora")])
@pytest.mark.parametrize("replay", [[0, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]])
def test_the_term_and_its_gradient(model, recipe, replay):
    """Against a copy of the model that has the long-term set as its own."""
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    recipe = recipe.replace("i_lora", "i_lora(rank=2, weight=0.7)")
    if model == "llama":                                 # a prompt that is not learnt
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, :3] = -100
    tuned = burnish.tune(net, recipe, head=False)
    for _, term in tuned.terms(Interpolated):
        term.double()
    stir(tuned, size=0.1)
    for k, (_, term) in enumerate(tuned.terms(Interpolated)):
        for t in term._buffers.values():
            t.add_(0.2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(k),
                                     dtype=torch.float64))
    net.train()
    for m in net.modules():                              # statistics of batches are no part of it
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    rows = [i for i, r in enumerate(replay) if r]
    slow = copy.deepcopy(tuned).merge().eval()
    with torch.no_grad():
        theirs = logits(slow, batch)[rows]
    keys = {"replay": torch.tensor(replay)}
    out = tuned.model(**batch, **keys)
    z = (out.logits if hasattr(out, "logits") else out["logits"])[rows]
    off = (z - theirs).square()
    if model == "llama":                     # row 2 answers the first label, the last one none
        off = off[:, 2:-1]
    loss = out.loss if hasattr(out, "loss") else out["loss"]
    whole = loss + (0.7 * off.mean() if rows else 0.0)
    want = torch.autograd.grad(0.5 * whole, list(tuned.parameters()))
    tuned.optimizer(lr=0.0)
    (0.5 * tuned.loss({**batch, **keys})).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=n)
    assert net.training


def logits(model, batch):
    out = model(**batch)
    return out.logits if hasattr(out, "logits") else out["logits"]


def test_a_term_without_labels_and_without_rows_that_count():
    tuned, term, slow, b = apart()
    tuned.optimizer(lr=0.0)
    g = torch.Generator().manual_seed(4)
    x, y = (torch.randn(3, n, generator=g, dtype=torch.float64) for n in (10, 8))
    A, B = (t.detach().clone().requires_grad_() for t in parts(term)[:2])
    W = layer()[2]
    z = F.linear(x, W + 2.0 * (B @ A), b)
    off = (z - F.linear(x, slow, b))[1:].square().mean()
    want = torch.autograd.grad((z - y).square().mean() + off, [A, B])
    with tuned.given(replay=torch.tensor([0, 1, 1])):
        tuned.loss((x, y), loss=lambda out, batch: (out - batch[1]).square().mean()).backward()
    for p, w in zip(parts(term)[:2], want, strict=True):
        torch.testing.assert_close(p.grad, w)
    net, batch = tiny("llama", batch=3)
    tuned = burnish.tune(net, "i_lora(rank=2)", head=False)
    tuned.optimizer()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = -100                            # the one of the memory
    tuned.step({**batch, "replay": torch.tensor([0, 1, 0])})
    net, batch = tiny("vit")
    nn.init.zeros_(net.classifier.weight)
    nn.init.zeros_(net.classifier.bias)                  # logits that add up to nothing
    tuned = burnish.tune(net, "full(targets='classifier') + i_lora(rank=2)", head=False)
    tuned.optimizer()
    tuned.step({**batch, "replay": torch.tensor([0, 0])})
    assert all(p.isfinite().all() for p in tuned.parameters())


def test_the_long_term_set_is_asked_about_the_memory_alone():
    net, batch = tiny("vit", batch=4)
    for weight, want in ((1.0, [(1, False), (4, True)]), (0.0, [(4, True)])):
        tuned = burnish.tune(copy.deepcopy(net), f"i_lora(rank=2, weight={weight})", head=False)
        tuned.optimizer(lr=0.0)
        seen = []

        def look(module, args, out, seen=seen):
            seen.append((len(out.logits), torch.is_grad_enabled()))

        tuned.model.register_forward_hook(look)
        tuned.loss({**batch, "replay": torch.tensor([0, 0, 1, 0])}).backward()
        assert seen == want
    tuned.loss({**batch, "replay": 1})                   # one entry for all


def test_a_batch_that_does_not_say_is_refused_in_training_alone():
    net, batch = tiny("vit")
    tuned = burnish.tune(net, "i_lora(rank=2)", head=False)
    tuned.optimizer()
    with pytest.raises(RecipeError, match="i_lora reads 'replay' of the batch .1 for a sample"):
        tuned.step(batch)
    runs = []
    net.register_forward_hook(lambda *_: runs.append(1) and None)
    net.eval()(**batch)
    assert len(runs) == 1                                # nothing is of the memory then


def test_dropout_acts_in_training_alone():
    tuned, term, W, b = layer("i_lora(rank=3, dropout=0.5)")
    stir(tuned, size=0.5)
    term.follow(0.0)
    x = torch.randn(64, 10, dtype=torch.float64)
    with tuned.given(replay=0):
        assert not torch.equal(tuned.model(x), tuned.model(x))
    tuned.model.eval()
    with torch.no_grad():
        assert torch.equal(tuned.model(x), tuned.model(x))


def test_a_run_goes_on_from_its_file_with_the_same_bits(tmp_path):
    def batches():
        g = torch.Generator().manual_seed(5)
        for _ in range(6):
            yield {"pixel_values": torch.randn(2, 3, 8, 8, generator=g),
                   "labels": torch.randint(3, (2,), generator=g), "replay": torch.tensor([0, 1])}

    given = list(batches())
    base, batch = tiny("vit")
    shape = batch["pixel_values"].shape[1:]
    for b in given:
        b["pixel_values"] = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    whole = burnish.tune(copy.deepcopy(base), "i_lora(rank=2, ema=0.7)", head=False)
    whole.optimizer(lr=1e-2)
    for b in given:
        whole.step(b)
    first = burnish.tune(copy.deepcopy(base), "i_lora(rank=2, ema=0.7)", head=False)
    opt = first.optimizer(lr=1e-2)
    for b in given[:3]:
        first.step(b)
    first.save(tmp_path / "a")
    again = burnish.load(copy.deepcopy(base), tmp_path / "a")
    again.model.train()
    again.optimizer(lr=1e-2).load_state_dict(opt.state_dict())
    for b in given[3:]:
        again.step(b)
    for (n, a), (_, b) in zip(whole.terms(Interpolated), again.terms(Interpolated), strict=True):
        assert all(torch.equal(s, t) for s, t in zip(parts(a), parts(b), strict=True)), n
    A, B, A_slow, B_slow = parts(a)
    assert not torch.equal(B, B_slow)


def test_tasks_follow_each_other_in_one_adapter():
    net, batch = tiny("vit", batch=4)
    tuned = burnish.tune(net, "i_lora(rank=2, ema=0.5)", head=False)
    memory, seen = Reservoir(8), []
    stages = list(tuned.recipe[0].stages(tuned, ("one", "two")))
    assert [(s.trains, s.data) for s in stages] == [("default", "one"), ("default", "two")]
    assert list(tuned.recipe[0].stages(tuned, ())) == []
    other = burnish.tune(tiny("vit")[0], "lora(rank=2)", head=False)
    other.add("late", "i_lora(rank=2)", head=False)
    other.use("late")
    assert [s.trains for s in other.recipe[0].stages(other, ("one",))] == ["late"]

    def data(stage):
        for _ in range(2):
            mixed = memory.beside(batch, 2)
            seen.append(mixed["replay"].tolist())
            yield mixed
        memory.show(batch)

    before = {n: p.clone() for n, p in net.named_parameters() if ".burnish." not in n}
    for _ in tuned.run(stages, data, lr=1e-2):
        pass
    assert seen == [[0] * 4, [0] * 4, [0] * 4 + [1] * 2, [0] * 4 + [1] * 2]
    assert list(tuned.adapters) == ["default"]
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n in before)


def test_it_keeps_what_it_says():
    assert keeps_what_it_says("i_lora", "vit") is None


def test_counts_and_decay():
    net = tiny("llama", meta=True, hidden_size=4096, intermediate_size=11008,
               num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
               vocab_size=32000)[0]
    places = match(Anatomy.of(net), "q,v")
    assert sum(parse("i_lora(rank=8)")[0].count(p) for p in places) == 4_194_304
    tuned, *_ = layer()
    assert {g["weight_decay"] for g in tuned.optimizer(weight_decay=0.1).param_groups} == {0.0}


@pytest.mark.parametrize("settings, why", [
    ("ema=1.0", "ema from 0 to below 1"), ("ema=-0.1", "ema from 0 to below 1"),
    ("weight=-1.0", "a weight of at least 0"), ("dropout=1.0", "dropout is a probability")])
def test_settings_are_checked(settings, why):
    with pytest.raises(RecipeError, match=why):
        parse(f"i_lora({settings})")


def test_the_defaults_and_the_words_of_the_paper():
    m = parse("i_lora")[0]
    assert (m.rank, m.alpha, m.dropout, m.ema, m.weight) == (8, 16.0, 0.0, 0.99, 1.0)
    assert parse("i_lora(lambda_e=0.0)")[0].ema == 0.0
    assert m.by_data                         # a promise is of a batch that is all memory
    with pytest.raises(burnish.BurnishError, match="rank 9 does not fit"):
        layer("i_lora(rank=9)")


# -- the memory -------------------------------------------------------------------------------
def shown(size, n, seed, by=3):
    memory = Reservoir(size, seed)
    for i in range(0, n, by):
        memory.show({"x": torch.arange(i, min(n, i + by)), "word": "left out"})
    return memory


def test_every_sample_is_as_likely_to_stay():
    counts = torch.zeros(12)
    for seed in range(3000):
        held = shown(4, 12, seed)._held["x"]
        assert len(set(held.tolist())) == 4
        counts[held] += 1
    assert (counts / 3000 - 4 / 12).abs().max() < 0.035


def test_what_is_drawn_is_there_and_none_twice():
    memory = shown(6, 4, 0)
    assert len(memory) == 4 and sorted(memory.draw(9)["x"].tolist()) == [0, 1, 2, 3]
    memory = shown(6, 20, 0)
    assert len(memory) == 6
    held = set(memory._held["x"].tolist())
    for _ in range(20):
        some = memory.draw(3)["x"].tolist()
        assert len(set(some)) == 3 and set(some) <= held


def test_a_memory_goes_on_where_it_stood():
    whole, first = shown(4, 9, 7), shown(4, 9, 7)
    again = Reservoir(4)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    for memory in (whole, again):
        memory.show({"x": torch.arange(100, 120)})
    assert torch.equal(whole._held["x"], again._held["x"]) and whole.seen == again.seen
    assert torch.equal(whole.draw(2)["x"], again.draw(2)["x"])
    first.show({"x": torch.arange(5)})                   # and has its own copy
    assert again.seen == 29


def test_batches_are_mixed():
    memory = Reservoir(5)
    batch = {"x": torch.randn(3, 2), "y": torch.tensor([0, 1, 2]), "word": "kept"}
    assert memory.beside(batch, 4)["replay"].tolist() == [0, 0, 0]
    memory.show(batch)
    other = {"x": torch.zeros(2, 2), "y": torch.tensor([7, 8]), "word": "kept"}
    mixed = memory.beside(other, 2, key="old")
    assert mixed["old"].tolist() == [0, 0, 1, 1] and mixed["word"] == "kept"
    assert mixed["y"][:2].tolist() == [7, 8]
    for x, y in zip(mixed["x"][2:], mixed["y"][2:], strict=True):
        assert torch.equal(x, batch["x"][int(y)])
    assert len(other["x"]) == 2                          # the batch itself is as it was


@pytest.mark.parametrize("use, why", [
    (lambda m: Reservoir(0), "a memory of 0 samples: expected at least 1"),
    (lambda m: m.show({"x": torch.zeros(2, 3)}), "samples of one form: .* had x .2,.* x .3,."),
    (lambda m: m.show({"y": torch.zeros(2, 2)}), "samples of one form"),
    (lambda m: m.show({"x": torch.zeros(2, 2), "y": torch.zeros(3)}), "as many samples each"),
    (lambda m: m.show({}), "as many samples each"),
    (lambda m: m.beside({"y": torch.zeros(2)}, 1), "the memory's samples have no 'y': x")])
def test_what_a_memory_cannot_hold_is_refused(use, why):
    memory = Reservoir(4)
    memory.show({"x": torch.zeros(3, 2)})
    with pytest.raises((ConfigError, DataError), match=why):
        use(memory)


# -- states after each block, and only what has fallen below ---------------------------------------
def states_of(model, run):
    """The states after each of the blocks of a tiny model."""
    found, handles = [], []
    for block in Anatomy.of(model).blocks:
        handles.append(model.get_submodule(block.path).register_forward_hook(
            lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out)))
    run()
    for h in handles:
        h.remove()
    return found


@pytest.mark.parametrize("target", ["symmetric", "max"])
@pytest.mark.parametrize("model", ["vit", "bert", "llama"])
def test_states_after_each_block(model, target):
    """mean over layers, tokens that count and dimensions of (h - t)^2, t = h_slow or the larger."""
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    if model != "vit":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, -3:] = 0
    tuned = burnish.tune(net, f"i_lora(rank=2, weight=0.7, compare='hidden', target='{target}')",
                         head=False)
    for _, term in tuned.terms(Interpolated):
        term.double()
    stir(tuned, size=0.1)
    for k, (_, term) in enumerate(tuned.terms(Interpolated)):
        for t in term._buffers.values():
            t.add_(0.2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(k),
                                     dtype=torch.float64))
    net.train()
    rows, keys = [1, 2], {"replay": torch.tensor([0, 1, 1])}
    slow = copy.deepcopy(tuned).merge().eval()
    with torch.no_grad():
        theirs = states_of(slow, lambda: slow(**batch))
    out = []
    mine = states_of(tuned.model, lambda: out.append(tuned.model(**batch, **keys)))
    assert len(mine) == len(theirs) == 2
    penalty = 0
    for h, t in zip(mine, theirs, strict=True):
        h, t = h[rows], t[rows]
        if target == "max":
            t = torch.maximum(h, t).detach()
        off = (h - t).square()
        if model != "vit":
            off = off[batch["attention_mask"][rows].bool()]
        penalty = penalty + off.mean() / 2
    want = torch.autograd.grad(out[0].loss + 0.7 * penalty, list(tuned.parameters()))
    tuned.optimizer(lr=0.0)
    tuned.loss({**batch, **keys}).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=n)


@pytest.mark.parametrize("compare", ["logits", "hidden"])
def test_what_is_above_the_long_term_set_is_free(compare):
    """h >= h_slow everywhere: no penalty, and the gradient of the task alone."""
    m = parse(f"i_lora(target='max', compare='{compare}')")[0]
    g = torch.Generator().manual_seed(0)
    slow = torch.randn(4, 6, generator=g, dtype=torch.float64)
    above = (slow + torch.rand(4, 6, generator=g, dtype=torch.float64)).requires_grad_()
    term = m._off(above, slow, None)
    term.backward()
    assert float(term.detach()) == 0.0 and not above.grad.any()
    below = (slow - 0.5).requires_grad_()
    m._off(below, slow, None).backward()
    torch.testing.assert_close(below.grad, torch.full_like(slow, -2 * 0.5 / 24))
    net, batch = tiny("vit", batch=4)
    tuned = burnish.tune(net, f"i_lora(rank=2, target='max', compare='{compare}')", head=False)
    tuned.optimizer(lr=0.0)
    tuned.loss({**batch, "replay": 1}).backward()           # both sets the same: nothing below
    with_term = [p.grad.clone() for p in tuned.parameters()]
    tuned.model.zero_grad()
    tuned.loss({**batch, "replay": 0}).backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(tuned.parameters(), with_term, strict=True))


def test_states_are_of_models_with_blocks():
    with pytest.raises(RecipeError, match="this model has none"):
        layer("i_lora(rank=2, compare='hidden')")[0].optimizer()
    layer("i_lora(rank=2, compare='hidden', weight=0.0)")[0].optimizer()


def test_padding_that_cannot_be_told_among_states_is_refused():
    """A prompt makes states longer than the mask: all of them count, or nobody knows which."""
    net, batch = tiny("bert", batch=3)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    recipe = "i_lora(rank=2, compare='hidden') + prompt_tuning(length=2)"
    tuned = burnish.tune(net, recipe, head=False)
    tuned.optimizer(lr=0.0)
    tuned.loss({**batch, "replay": 1}).backward()
    batch["attention_mask"][1, -2:] = 0
    with pytest.raises(burnish.BurnishError, match="leaves tokens out, and is .3, .* compare='log"):
        tuned.loss({**batch, "replay": 1})


def test_a_decoder_has_a_mask_of_its_own():
    m = parse("i_lora(rank=2, compare='hidden')")[0]
    from burnish.methods.delta.lowrank.i_lora import _valid
    from burnish.methods.objective.direction_match import mask_key

    anatomy = Anatomy.of(tiny("t5")[0])
    keys = [mask_key(anatomy, b) for b in anatomy.blocks]
    assert m and keys == sorted(keys) and set(keys) == {"attention_mask", "decoder_attention_mask"}
    batch = {"attention_mask": torch.tensor([[1, 0], [1, 1]])}
    states = torch.zeros(2, 2, 4)
    assert _valid(batch, "decoder_attention_mask", [0, 1], states) is None
    assert _valid((batch, None), "attention_mask", [0], states).tolist() == [[1, 0]]
    assert _valid((torch.ones(2, 2), None), "attention_mask", [0], states) is None     # no keys
