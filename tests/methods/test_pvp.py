"""PVP: a second run begins where a first one ended, under another head."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.formats.warm import begin_from
from burnish.methods.lifecycle.pvp import Pvp
from burnish.testing import stir
from burnish.testing.models import tiny

HOSTS = ["vpt(length=3, deep=True)", "lora(rank=2)", "houlsby(bottleneck=4)", "bitfit", "apt",
         "vqt(length=2)", "idpt(neighbours=4)", "lora(rank=2) + adam8bit"]


def first(recipe, folder, whole=False, **kw):
    net, batch = tiny("vit", **kw)
    tuned = burnish.tune(net, recipe)
    stir(tuned, size=0.3)
    tuned.save(folder, whole=whole)
    return tuned


def own(tuned):
    return {n: t.detach().clone() for n, t in tuned.tensors(tuned.training).items()}


@pytest.mark.parametrize("recipe", HOSTS)
def test_what_was_learnt_comes_over_and_the_head_does_not(tmp_path, recipe):
    """Other classes too: every tensor outside the head has its value, the head is fresh."""
    was = own(first(recipe, tmp_path, num_labels=5))
    net, batch = tiny("vit")
    tuned = burnish.tune(net, recipe, seed=3)
    fresh = own(tuned)
    left = begin_from(tuned, tmp_path)
    now = own(tuned)
    inside = {n for n in now if n.startswith("classifier.")}
    assert set(left) == {n for n in was if n.startswith("classifier.")} and inside
    for n, t in now.items():
        assert torch.equal(t, fresh[n] if n in inside else was[n]), n
    tuned.step(batch)


def test_an_adapter_of_another_name(tmp_path):
    first("vpt(length=3)", tmp_path)
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "vpt(length=3)", name="second", head=False)
    begin_from(tuned, tmp_path)
    was = burnish.load(tiny("vit")[0], tmp_path)
    (a,), (b,) = ([p for n, p in t.named_parameters() if n.endswith("rows")] for t in (was, tuned))
    assert torch.equal(a, b)
    was.add("other", "lora(rank=2)", head=False)
    was.use("other")
    was.save(tmp_path / "two")
    again = burnish.tune(tiny("vit")[0], "lora(rank=2)", head=False)
    begin_from(again, tmp_path / "two")
    with pytest.raises(burnish.RecipeError, match="was lora, this recipe is vpt"):
        begin_from(tuned, tmp_path / "two")


@pytest.mark.parametrize("recipe, why", [
    ("vpt(length=4, deep=True)", "length was 3 in the earlier adapter, it is 4"),
    ("vpt(length=3)", "deep was True"), ("lora(rank=2)", "was vpt, this recipe is lora"),
    ("vpt(length=3, deep=True) + bitfit", "this recipe is vpt [+] bitfit"),
])
def test_what_is_not_alike_is_refused_and_nothing_moves(tmp_path, recipe, why):
    first("vpt(length=3, deep=True)", tmp_path)
    tuned = burnish.tune(tiny("vit")[0], recipe)
    before = own(tuned)
    with pytest.raises(burnish.RecipeError, match=why):
        begin_from(tuned, tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in own(tuned).items())


@pytest.mark.parametrize("recipe", ["vera(rank=4)", "pvera(rank=4)", "randlora(rank=2)",
                                    "lora(rank=2) + vera(rank=4, targets='mlp')"])
def test_what_stands_beside_drawn_tensors_goes_on_under_their_seed(tmp_path, recipe):
    """Under another one the trained values would count in another random basis."""
    net, batch = tiny("vit")
    was = burnish.tune(net, recipe, head=False, seed=4)
    stir(was, size=0.3)
    was.save(tmp_path)
    tuned = burnish.tune(tiny("vit")[0], recipe, head=False)
    before = own(tuned)
    part = burnish.parse(recipe)[-1].name
    with pytest.raises(burnish.RecipeError,
                       match=f": {part} draws .* seed, which was 4 .* is 0 here.*seed=4"):
        begin_from(tuned, tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in own(tuned).items())
    same = burnish.tune(tiny("vit")[0], recipe, head=False, seed=4)
    assert begin_from(same, tmp_path) == []
    with torch.no_grad():
        want = net.eval()(**batch).logits
        assert torch.equal(same.model.eval()(**batch).logits, want)
        with same.disabled():
            assert not torch.allclose(same.model(**batch).logits, want, atol=1e-3)


def test_a_basis_that_follows_its_own_setting_needs_no_seed(tmp_path):
    net, batch = tiny("vit")
    was = burnish.tune(net, "unilora(rank=2, dimension=20)", head=False, seed=4)
    stir(was, size=0.3)
    was.save(tmp_path)
    tuned = burnish.tune(tiny("vit")[0], "unilora(rank=2, dimension=20)", head=False)
    begin_from(tuned, tmp_path)
    with torch.no_grad():
        assert torch.equal(tuned.model.eval()(**batch).logits, net.eval()(**batch).logits)


def test_shapes_that_do_not_fit():
    """Of tensors handed over directly: of another size, too few, too many."""
    tuned = burnish.tune(tiny("vit")[0], "vpt(length=3)", head=False)
    (name,) = own(tuned)
    recipe = tuned.recipe
    with pytest.raises(burnish.RecipeError, match=r"has shape \(2, 32\).*\(3, 32\) here"):
        Pvp().lifecycle(tuned, {name: torch.zeros(2, 32)}, recipe)
    with pytest.raises(burnish.RecipeError, match="is new here"):
        Pvp().lifecycle(tuned, {}, recipe)
    with pytest.raises(burnish.RecipeError, match="is not here"):
        Pvp().lifecycle(tuned, {name: own(tuned)[name], "vit.other": torch.zeros(1)}, recipe)


def test_another_base_is_refused(tmp_path):
    first("vpt(length=3)", tmp_path)
    for kw, why in (({"seed": 1}, "has other values"), ({"hidden_size": 64}, "there and")):
        tuned = burnish.tune(tiny("vit", **kw)[0], "vpt(length=3)")
        with pytest.raises(burnish.FormatError, match=f"another base: .*{why}"):
            begin_from(tuned, tmp_path)
    with pytest.raises(burnish.FormatError):
        begin_from(tuned, tmp_path / "nowhere")


def test_a_few_samples_are_learnt_better_from_there(tmp_path):
    """Two tasks that read the same features of a tuned backbone: after as many steps on twelve
    samples, the same head and the same seed, the loss is lower than from a random start."""
    recipe = "vpt(length=4, deep=True, dropout=0.0)"
    teacher, _ = tiny("vit")
    stir(burnish.tune(teacher, recipe, head=False), size=2.0)
    teacher.eval()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, 16, 16, generator=g)
    with torch.no_grad():
        states = teacher.vit(pixel_values=x).last_hidden_state[:, 0]
    heads = torch.randn(2, 3, 32, generator=g)
    labels = [((states - states.mean(0)) @ h.t()).argmax(1) for h in heads]

    def train(tuned, task, rows, steps, lr):
        opt = tuned.optimizer(lr=lr)
        for _ in range(steps):
            some = rows[torch.randperm(len(rows), generator=g)[:32]]
            loss = F.cross_entropy(tuned.model(pixel_values=x[some]).logits, labels[task][some])
            opt.zero_grad()
            loss.backward()
            opt.step()
        with torch.no_grad():
            return float(F.cross_entropy(tuned.model(pixel_values=x[rows]).logits,
                                         labels[task][rows]))

    tuned = burnish.tune(tiny("vit")[0], recipe)
    train(tuned, 0, torch.arange(244), 60, 2e-2)
    tuned.save(tmp_path)
    ends = []
    for begins in (True, False):
        net, _ = tiny("vit")
        tuned = burnish.tune(net, recipe, seed=5)
        if begins:
            begin_from(tuned, tmp_path)
        ends.append(train(tuned, 1, torch.arange(244, 256), 15, 5e-3))
    assert ends[0] < ends[1]


def test_fit_begins_there(tmp_path, capsys):
    net = tiny("vit", num_labels=10, num_channels=1)[0]
    base = copy.deepcopy(net)
    words = {"max_steps": 1, "batch_size": 4, "report": False, "measure": False, "test": False,
             "validation": 0}
    run = burnish.fit(net, "digits", "vpt(length=2)", output=tmp_path / "one", lr=1e-2, **words)
    was = own(run.tuned)
    again = burnish.fit(base, "digits", "vpt(length=2)", output=tmp_path / "two",
                        lr=1e-30, init_from=str(tmp_path / "one"), **words)
    (n,) = (n for n in was if n.endswith("rows"))
    torch.testing.assert_close(own(again.tuned)[n], was[n])
    assert "begins where" in capsys.readouterr().out
