"""Poly and MHR: skills averaged task by task, slice by slice; what comes after that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.skills import Skills
from burnish.core.call import Call, resume
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import stir, tiny

TASK = torch.tensor([2, 0, 2])
SMALL = "poly(rank=2, alpha=3.0, experts=3, tasks=3{})"


def make(more="", model="vit", **kw):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch.pop("labels", None)
    tuned = burnish.tune(net, SMALL.format(more), head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.5), batch


def update(A, B, Z, scale):
    """Of one task, out x in: each slice of A's inputs and of B's outputs has its own gates."""
    heads, rows, columns = len(Z), [], []
    for h in range(heads):
        gate = 1 / (1 + torch.exp(-Z[h]))
        w = gate / gate.sum()
        rows.append(sum(w[m] * A[m].chunk(heads, 1)[h] for m in range(len(A))))
        columns.append(sum(w[m] * B[m].chunk(heads, 0)[h] for m in range(len(A))))
    return scale * torch.cat(columns, 0) @ torch.cat(rows, 1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("model", ["vit", "gpt2", "swin"])
def test_the_equation_written_out(model, heads):
    """y = W x + (alpha / rank) B_t A_t x; the logits of a task that no sample has stay."""
    tuned, batch = make(f", slices={heads}", model)
    mine = dict(tuned.branches(Skills))
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def stand(path, m):
        def hook(module, args, out):
            x = args[0]
            return out + torch.stack([
                row @ update(m.A, m.B, m.Z[TASK[i * 3 // len(x)]], 1.5).T
                for i, row in enumerate(x)])
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)
    want, got = base(**batch).logits, tuned.model(**batch, task=TASK).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
        assert b.any(), n
        if n.endswith("Z"):
            assert not a[1].any() and a[0].any() and a[2].any(), n


def test_more_samples_than_tasks_are_the_same_samples_one_by_one():
    """Every task's factors are made once then, and picked."""
    tuned, batch = make(", slices=2")
    many = {n: torch.cat([v, v.flip(0)]) for n, v in batch.items()}
    task = torch.tensor([2, 0, 2, 1, 1, 0])
    with torch.no_grad():
        whole = tuned.model(**many, task=task).logits
        for k in range(6):
            one = {n: v[k:k + 1] for n, v in many.items()}
            torch.testing.assert_close(tuned.model(**one, task=int(task[k])).logits[0], whole[k])


def test_a_task_has_the_rank_of_one_skill_and_equal_logits_are_the_mean():
    tuned, _ = make(", slices=4")
    for _, m in tuned.branches(Skills):
        for task in (0, 1, None):
            made = m.plain(task)
            assert int(torch.linalg.matrix_rank(made["B"] @ made["A"])) == 2
        even = m.plain(None)
        torch.testing.assert_close(even["A"], m.A.detach().mean(0))
        torch.testing.assert_close(even["B"], 1.5 * m.B.detach().mean(0))
        with torch.no_grad():
            m.Z.fill_(0.7)
        torch.testing.assert_close(m.plain(2), even)


@pytest.mark.parametrize("more, rate", [("", 10.0), (", gate_rate=4.0", 4.0)])
def test_the_logits_learn_at_a_rate_of_their_own(more, rate):
    tuned, _ = make(more)
    groups = tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert {g["weight_decay"] for g in groups} == {0.0}
    for _, m in tuned.branches(Skills):
        assert rates[id(m.Z)] == pytest.approx(rate * 1e-3)
        assert rates[id(m.A)] == rates[id(m.B)] == 1e-3


def test_one_head_is_poly():
    """Equal gates in all slices are those of one slice."""
    one = stir(Skills(8, 12, 3, 2, 2, 1, scale=1.0), size=0.5)
    four = Skills(8, 12, 3, 2, 2, 4, scale=1.0)
    with torch.no_grad():
        four.A.copy_(one.A), four.B.copy_(one.B), four.Z.copy_(one.Z.expand_as(four.Z))
    with resume(Call(given={"task": torch.tensor([1, 0])})):
        x = torch.randn(2, 5, 8)
        torch.testing.assert_close(four(x), one(x))


@pytest.mark.parametrize("model, targets", [("vit", None), ("timm_qkv", "q,v,fc1")])
def test_a_settled_task_is_a_lora_that_merges(model, targets, tmp_path):
    tuned, batch = make(", slices=2", model, **({} if targets is None else {"targets": targets}))
    with torch.no_grad():
        want = [tuned.model(**batch, task=k).logits for k in range(3)]
        assert not torch.allclose(want[0], want[2])
        for k in (0, 2):
            tuned.use("default")
            tuned.recipe.named("poly").lifecycle(tuned, k, f"task{k}")
            tuned.model.double()
            torch.testing.assert_close(tuned.model(**batch).logits, want[k], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tuned.merge()(**batch).logits, want[2], rtol=1e-5, atol=1e-6)
        tuned.unmerge()
    assert [(m.name, m.rank) for m in tuned.recipe] == [("lora", 2)]
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny(model, dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want[2], rtol=1e-4, atol=1e-5)


def test_mhr_mu_is_the_average_as_a_lora():
    tuned, batch = make(", slices=2")
    before = dict(tuned.branches(Skills))
    with torch.no_grad():
        for m in before.values():
            m.Z.fill_(0.0)
        want = tuned.model(**batch, task=1).logits
        tuned.recipe.named("poly").lifecycle(tuned, None, "mean")
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-5, atol=1e-6)
    assert [m.name for m in tuned.recipe] == ["lora"]


@pytest.mark.parametrize("then, task", [("all", None), ("router", None), ("router", 2)])
def test_a_new_task_begins_from_the_skills(then, task, tmp_path):
    """Of MHR-z heads x experts numbers a router train; a file keeps the skills it weighs."""
    tuned, batch = make(", slices=2")
    for _, m in tuned.branches(Skills):
        with torch.no_grad():
            m.Z[1].zero_()
    with torch.no_grad():
        want = tuned.model(**batch, task=1 if task is None else task).logits
    tuned.recipe.named("poly").lifecycle(tuned, task, "new", then)
    tuned.model.double()
    (m,) = tuned.recipe
    assert (m.tasks, m.train_skills) == (1, then == "all") and not m.keys()
    mine = [s for n, s in tuned.branches(Skills)]
    trains = sum(p.numel() for p in tuned.parameters())
    assert trains == sum(2 * 3 + (0 if then == "router" else s.A.numel() + s.B.numel())
                         for s in mine)
    assert m.count(Place("a", "weight", "linear", 8, 4)) == 6 + (then == "all") * 3 * 2 * 12
    with torch.no_grad():
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-5, atol=1e-6)
    tuned.model.train()
    opt = tuned.optimizer(lr=0.3)
    tuned.model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())
    opt.step()
    tuned.model.eval()
    with torch.no_grad():
        trained = tuned.model(**batch).logits
    assert not torch.allclose(trained, want, atol=1e-3)
    tuned.save(tmp_path / "new")
    again = burnish.load(tiny("vit", dtype=torch.float64)[0].eval(), tmp_path / "new")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["gpt2", "timm_qkv"])
@pytest.mark.parametrize("then", ["all", "router"])
def test_a_new_task_has_the_rows_that_there_are(model, then):
    tuned, batch = make(", slices=2", model, targets="q,v")
    with torch.no_grad():
        want = tuned.model(**batch, task=1).logits
        before = {path: m.rows for path, m in tuned.branches(Skills)}
        tuned.recipe.named("poly").lifecycle(tuned, 1, "new", then)
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-5, atol=1e-6)
    assert {path: m.rows for path, m in tuned.branches(Skills)} == before
    assert all(len(rows) == 2 for rows in before.values())


def test_a_new_task_leaves_the_experts_that_several_did():
    """For one task alone they could have skills too; those that there are have none."""
    tuned, batch = make(", slices=2", "mixtral")
    before = {path for path, _ in tuned.branches(Skills)}
    tuned.recipe.named("poly").lifecycle(tuned, 1, "new", "router")
    assert {path for path, _ in tuned.branches(Skills)} == before


def test_gates_alone_weigh_skills_that_exist():
    net, batch = tiny("vit")
    burnish.tune(net, "poly(rank=2, tasks=1, train_skills=False)", head=False)
    net.eval()
    net(**batch)
    net.train()
    with pytest.raises(burnish.RecipeError, match="weigh skills that exist, and these are nothing"):
        net(**batch)


def test_skills_may_be_made_again_where_nothing_has_a_value():
    """A file's own recipe is simulated without its skills."""
    net, batch = tiny("vit")
    said = burnish.simulate(net, "poly(rank=2, tasks=1, train_skills=False)", batch, head=False)
    assert said.peak_bytes > 0


def test_gates_that_are_all_shut_give_nothing():
    """Not a division of nothing by nothing."""
    layer = stir(Skills(6, 6, 2, 3, 1, 1, scale=1.0), size=0.5)
    with torch.no_grad():
        layer.Z.fill_(-300.0)
    y = layer(torch.randn(2, 5, 6))
    assert not y.any()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_drawn_gates():
    """Every sample its own, by RelaxedBernoulli of temperature 1; in evaluation the sigmas."""
    layer = stir(Skills(6, 6, 2, 6, 1, 1, scale=1.0, noisy=True), size=0.5)
    with torch.no_grad():
        layer.Z.copy_(torch.tensor([[[0.8, -0.4]]]))
        layer.A.copy_(torch.eye(6).expand(2, 6, 6))      # then B_t is what comes out
    x = torch.eye(6).expand(4000, 6, 6)
    torch.manual_seed(0)
    with torch.no_grad(), resume(Call(samples=(4000,))):
        y = layer(x)
    d = layer.B.detach()
    w = ((y.transpose(1, 2) - d[1]) / (d[0] - d[1]))                 # of the first skill
    assert float((w.amax((1, 2)) - w.amin((1, 2))).max()) < 1e-2, "one draw a sample"
    torch.manual_seed(1)
    gates = torch.distributions.RelaxedBernoulli(
        torch.tensor(1.0), logits=torch.tensor([0.8, -0.4])).sample((4000,))
    want = (gates / gates.sum(1, keepdim=True))[:, 0]
    got = w.mean((1, 2))
    assert abs(float(got.mean() - want.mean())) < 0.02
    assert abs(float(got.std() - want.std())) < 0.02
    layer.eval()
    g = torch.sigmoid(torch.tensor([0.8, -0.4]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:1])[0].T, (g[0] * d[0] + g[1] * d[1]) / g.sum())
    layer.noisy = False
    layer.train()
    with torch.no_grad():
        torch.testing.assert_close(layer(x[:1])[0].T, (g[0] * d[0] + g[1] * d[1]) / g.sum())


def test_draws_follow_windows_and_are_drawn_again_in_backward():
    net, batch = tiny("swin", batch=3)
    tuned = stir(burnish.tune(net, "poly(rank=2, tasks=1, noisy=True)", head=False), size=0.3)
    net.train()
    torch.manual_seed(0)
    a = net(**batch).logits
    torch.manual_seed(0)
    b = net(**batch).logits
    assert torch.equal(a, b) and not torch.equal(a, net(**batch).logits)
    b.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters())


def test_start_counts_and_defaults():
    net, batch = tiny("vit", batch=3)
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "mhr", head=False)
    assert torch.equal(net(**batch, task=torch.tensor([0, 1, 1])).logits, want)
    for _, m in tuned.branches(Skills):
        bound = m.A.shape[-1] ** -0.5
        assert not m.B.any() and 0.8 * bound < float(m.A.detach().abs().max()) <= bound
        assert float(m.A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.25)
        assert 0 < float(m.Z.detach().abs().max()) <= 1e-3 and m.Z.shape == (2, 8, 8)
    assert {g["weight_decay"] for g in
            tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} == {0.0}
    assert burnish.parse("poly")[0].settings() == {
        "targets": None, "rank": 1, "alpha": 1.0, "experts": 8, "tasks": 2, "slices": 1,
        "noisy": False, "gate_rate": 10.0, "train_skills": True}
    assert burnish.parse("poly(tasks=1)")[0].keys() == {} and burnish.parse("poly")[0].keys()


def test_the_count_on_roberta_base(published):
    """24 matrices of 768 x 768, 8 skills of rank 8, 8 tasks, 8 heads: 24 (98,304 + 512)."""
    anatomy, _ = published("RobertaConfig", "RobertaForSequenceClassification")
    (m,) = burnish.parse("poly(rank=8, experts=8, tasks=8, slices=8, targets='q,v')")
    with torch.device("meta"):
        made = list(m.mixture(anatomy))
    assert len(made) == 24
    assert sum(p.numel() for b in made for p in b.module.parameters()) == 2_371_584
    assert m.count(Place("a", "weight", "linear", 768, 768)) == 98_304 + 512


@pytest.mark.parametrize("settings", ["rank=0", "experts=0", "tasks=0", "slices=0"])
def test_what_cannot_act_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^poly"):
        burnish.parse(f"poly({settings})")
    assert burnish.parse("poly(rank=1, experts=1, tasks=1, slices=1)")


def test_tasks_and_forms_that_are_none_are_refused():
    tuned, batch = make()
    part = tuned.recipe.named("poly")
    for wrong in (-1, 3):
        with pytest.raises(burnish.RecipeError, match=f"tasks 0 to 2, not {wrong}"):
            part.lifecycle(tuned, wrong, "no")
        with pytest.raises(burnish.RecipeError, match="poly reads 'task'"):
            tuned.model(**batch, task=wrong)
    with pytest.raises(burnish.RecipeError, match="'lora', 'all' or 'router', not 'z'"):
        part.lifecycle(tuned, 0, "no", "z")


def test_linears_that_have_no_equal_slices():
    """Left out, refused where they were asked for, or where there are no others."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return x + self.fc2(self.fc1(x).relu())

    def sites(heads, **kw):
        net = nn.Sequential(Block(), Block())
        tuned = burnish.tune(net, f"poly(rank=2, tasks=1, slices={heads})", head=False, **kw)
        return {p for p, _ in tuned.branches(Skills)}

    assert sites(4) == {"0.fc1", "1.fc1", "0.fc2", "1.fc2"}
    for kw in ({}, {"targets": "fc1"}):
        with pytest.raises(burnish.RecipeError, match="outputs, which are no 8 equal slices"):
            sites(8, **kw)
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "poly(rank=2, slices=32)", head=False)
    assert {p.rpartition(".")[2] for p, _ in tuned.branches(Skills)} == {"q_proj", "o_proj"}


def test_models_and_ranks_that_do_not_fit_are_refused():
    with pytest.raises(RankError, match="poly: rank 64 does not fit"):
        burnish.tune(tiny("vit")[0], "poly(rank=64)")
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(8, 16), stack)
    for wrong in ("poly(rank=2)", "poly(rank=2, tasks=1, noisy=True)"):
        with pytest.raises(burnish.RecipeError, match="poly tells the samples"):
            burnish.tune(net, wrong)
    burnish.tune(net, "poly(rank=2, tasks=1)", head=False)


def test_rows_of_a_fused_weight_get_it_alone():
    tuned, _ = make(model="timm_qkv", targets="q,v")
    for _, layer in tuned.branches(Skills):
        with resume(Call(given={"task": 1})):
            y = layer(torch.randn(2, 32, dtype=torch.float64))
        assert y.shape == (2, 96) and not y[:, 32:64].any() and y[:, :32].all() and y[:, 64:].all()
