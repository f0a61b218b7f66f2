"""MTLoRA: an update for all tasks and one for each in last blocks, picked sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight.keyed import Tasked
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import stir, tiny

TASK = torch.tensor([2, 0, 2])
SMALL = "mtlora(rank=4, tasks=3, task_rank=2, scale=1.5, dropout=0.0{})"


def make(more="", model="swin", **kw):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch.pop("labels", None)
    tuned = burnish.tune(net, SMALL.format(more), head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.3), batch


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("model", ["swin", "gpt2"])
def test_the_equation_written_out(model, shared):
    """y = W x + s B_0 A_0 x + s B_t A_t x, the last in the last block of every stage; the factors
    of a task that no sample has get no gradient."""
    tuned, batch = make(f", shared_last={shared}", model)
    mine = dict(tuned.branches(Tasked))
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def stand(path, m):
        def hook(module, args, out):
            x, rows = args[0], []
            for i, row in enumerate(x):
                t, y = TASK[i * 3 // len(x)], 0
                if m.A0 is not None:
                    y = row @ m.A0.T @ m.B0.T
                if m.task is not None:
                    y = y + row @ m.task.A[t].T @ m.task.B[t].T
                rows.append(1.5 * y)
            return out + torch.stack(rows)
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
        if ".task." in n:
            assert not a[1].any() and a[0].any() and a[2].any(), n
    last = {"swin": {"swin.encoder.layers.0.blocks.1", "swin.encoder.layers.1.blocks.0"},
            "gpt2": {"transformer.h.1"}}[model]
    for path, m in mine.items():
        own = any(path.startswith(f"{b}.") for b in last)
        assert (m.task is not None) == own and (m.A0 is not None) == (shared or not own), path
        assert m.task is None or m.task.A.shape[:2] == (3, 2)
        assert m.A0 is None or len(m.A0) == 4


def test_with_no_tasks_it_is_a_lora_and_reads_no_key():
    net, batch = tiny("vit", dtype=torch.float64)
    tuned = burnish.tune(net, "mtlora(rank=3, tasks=0, scale=2.0, dropout=0.0)", head=False)
    net.double()
    stir(tuned, size=0.3)
    other, _ = tiny("vit", dtype=torch.float64)
    lora = burnish.tune(other, "lora(rank=3, alpha=6)", head=False)
    other.double()
    with torch.no_grad():
        for path, m in tuned.branches(Tasked):
            chain = other.get_submodule(f"{path}.burnish.default.lora")
            chain.A.copy_(m.A0)
            chain.B.copy_(m.B0)
    torch.testing.assert_close(net(**batch).logits, other(**batch).logits)
    assert len(list(lora.parameters())) == len(list(tuned.parameters()))
    assert burnish.parse("mtlora(tasks=0)")[0].repeats() == 1
    assert burnish.parse("mtlora")[0].repeats() is None


def test_a_mixed_batch_is_its_tasks_one_by_one():
    tuned, batch = make()
    with torch.no_grad():
        whole = tuned.model(**batch, task=TASK).logits
        for k in range(3):
            one = {n: v[k:k + 1] for n, v in batch.items()}
            torch.testing.assert_close(tuned.model(**one, task=int(TASK[k])).logits[0], whole[k])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("model, targets", [("swin", None), ("timm_qkv", "q,v,fc1")])
def test_one_task_by_itself_is_lora_parts_that_merge(model, targets, shared, tmp_path):
    tuned, batch = make(f", shared_last={shared}", model,
                        **({} if targets is None else {"targets": targets}))
    with torch.no_grad():
        want = [tuned.model(**batch, task=k).logits for k in range(3)]
        assert not torch.allclose(want[0], want[2])
        for k in (0, 2):
            tuned.use("default")
            tuned.recipe.named("mtlora").lifecycle(tuned, k, f"task{k}")
            tuned.model.double()
            torch.testing.assert_close(tuned.model(**batch).logits, want[k], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tuned.merge()(**batch).logits, want[2], rtol=1e-5, atol=1e-6)
        tuned.unmerge()
    assert [(m.name, m.rank) for m in tuned.recipe] == [("lora", 4), ("lora", 6 if shared else 2)]
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny(model, dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_task_that_is_none_is_refused(wrong):
    tuned, batch = make()
    with pytest.raises(burnish.RecipeError, match=f"tasks 0 to 2, not {wrong}"):
        tuned.recipe.named("mtlora").lifecycle(tuned, wrong, "no")
    with pytest.raises(burnish.RecipeError, match="mtlora reads 'task'"):
        tuned.model(**batch, task=wrong)
    net, _ = tiny("vit")
    tuned = burnish.tune(net, "mtlora(rank=2, tasks=0)", head=False)
    with pytest.raises(burnish.RecipeError, match="tasks 0 to 0, not 1"):
        tuned.recipe.named("mtlora").lifecycle(tuned, 1, "no")
    tuned.recipe.named("mtlora").lifecycle(tuned, 0, "plain")


def test_rows_of_a_fused_weight_get_it_alone():
    tuned, _ = make(model="timm_qkv", targets="q,v")
    from burnish.core.call import Call, resume

    for _, layer in tuned.branches(Tasked):
        with resume(Call(given={"task": 1})):
            y = layer(torch.randn(2, 32, dtype=torch.float64))
        assert y.shape == (2, 96) and not y[:, 32:64].any() and y[:, :32].all() and y[:, 64:].all()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_is_on_the_input_of_both(p):
    """One mask for the two; backward draws it again."""
    layer = stir(Tasked(400, 5, 2, 2, 3, scale=1.0, dropout=p), size=1.0)
    from burnish.core.call import Call, resume

    x = torch.eye(400, requires_grad=True)
    torch.manual_seed(0)
    with resume(Call(given={"task": 1})):
        y = layer(x)
        layer.eval()
        whole = layer(x)
        rate = (y.abs().sum(1) > 0).float().mean()
        assert abs(float(rate) - (1 - p)) < 0.1
        alive = y.abs().sum(1) > 0
        torch.testing.assert_close(y[alive], whole[alive] / (1 - p))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx.diagonal(), y.detach().sum(1))


def test_start_counts_and_defaults():
    net, batch = tiny("vit", batch=3)
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "mtlora(rank=4)", head=False)
    assert torch.equal(net(**batch, task=torch.tensor([0, 1, 1])).logits, want)
    for _, m in tuned.branches(Tasked):
        assert not m.B0.any() and (m.task is None or not m.task.B.any())
        for A in (m.A0, *(() if m.task is None else (m.task.A,))):
            bound = A.shape[-1] ** -0.5
            assert 0.8 * bound < float(A.detach().abs().max()) <= bound
            assert float(A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.25)
    assert {g["weight_decay"] for g in
            tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} == {0.0}
    (m,) = burnish.parse("mtlora")
    assert m.settings() == {"targets": None, "rank": 64, "tasks": 2, "task_rank": 4, "scale": 4.0,
                            "dropout": 0.05, "shared_last": True}


def test_the_count_on_swin_tiny(published):
    """Four linears in 2, 2, 6, 2 blocks of width 96 to 768, and tasks in the last block of each."""
    anatomy, _ = published("SwinConfig", "SwinForImageClassification")
    for shared in (True, False):
        (m,) = burnish.parse("mtlora(rank=16, tasks=4, targets='q,k,v,o,fc1,fc2', "
                             f"shared_last={shared})")
        with torch.device("meta"):
            made = list(m.mixture(anatomy))
        want = 0
        for d, blocks in ((96, 2), (192, 2), (384, 6), (768, 2)):
            ends = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]
            for b in range(blocks):
                for inp, out in ends:
                    place = Place("a", "weight", "linear", out, inp)
                    last = b == blocks - 1
                    per = (16 if shared or not last else 0) + (4 * 4 if last else 0)
                    assert m.count(place, last) == per * (inp + out)
                    assert last or m.count(place) == per * (inp + out)
                    want += per * (inp + out)
        assert sum(p.numel() for b in made for p in b.module.parameters()) == want


@pytest.mark.parametrize("settings", ["tasks=-1", "task_rank=0", "dropout=1.0"])
def test_what_cannot_act_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^mtlora"):
        burnish.parse(f"mtlora({settings})")
    assert burnish.parse("mtlora(task_rank=1, tasks=0)")


def test_models_and_ranks_that_do_not_fit_are_refused():
    with pytest.raises(burnish.RecipeError, match="mtlora: none of the targets is"):
        burnish.tune(tiny("mlp")[0], "mtlora")
    with pytest.raises(RankError, match="mtlora: rank 64 does not fit"):
        burnish.tune(tiny("vit")[0], "mtlora")
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(8, 16), stack)
    with pytest.raises(burnish.RecipeError, match="mtlora tells the samples"):
        burnish.tune(net, "mtlora(rank=2)")
    with pytest.raises(burnish.RecipeError, match="mtlora tells the samples"):
        burnish.tune(net, "mtlora(rank=2, tasks=1)")
    burnish.tune(net, "mtlora(rank=2, tasks=0)")


def test_a_routed_expert_is_left_as_it_is():
    """It is given the tokens of all samples together; with no tasks that does not matter."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.experts = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x):
            return x + self.experts[0](self.fc1(x))

    def sites(tasks, **kw):
        net = nn.Sequential()
        net.layers = nn.ModuleList([Block(), Block()])
        tuned = burnish.tune(net, f"mtlora(rank=2, tasks={tasks})", head=False, **kw)
        return {p.partition(".")[2] for p, _ in tuned.branches(Tasked)}

    assert sites(2) == sites(1) == {"0.fc1", "1.fc1"}
    assert sites(0) == {"0.fc1", "1.fc1", "0.experts.0", "1.experts.0"}
    with pytest.raises(burnish.TargetError, match="given the tokens of all samples together"):
        sites(1, targets="experts")


def test_one_task_is_a_task():
    tuned = burnish.tune(tiny("vit")[0], "mtlora(rank=2, tasks=1)", head=False)
    assert [m.task is not None for _, m in tuned.branches(Tasked)] == [False] * 6 + [True] * 6
