"""Polyhistor: generated templates that all stages share, made larger by each layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.bottleneck import Bottleneck
from burnish.blocks.state.decomposed import Decomposed, Templates
from burnish.testing import stir, tiny

TASK = torch.tensor([2, 0, 2])
SMALL = "polyhistor(tasks=3, embedding=6, rank=2, reduction=4{})"


def make(more="", model="swin", **kw):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch.pop("labels", None)
    tuned = burnish.tune(net, SMALL.format(more), head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.4), batch


def dense(m, t, task):
    """(D, U) of a task: a Kronecker product each, formed."""
    z, d, w, r = t.task.weight[task], t.d, t.m, t.rank
    Q, P2 = (t.down_q @ z).view(r, w), (t.up_p @ z).view(w, r)
    if t.wide is None:
        P, Q2 = (t.down_p @ z).view(d, r), (t.up_q @ z).view(r, d)
    else:
        P, Q2 = t.wide, t.wide.T * (d / r) ** 0.5
    return torch.kron(m.S_down, P @ Q), torch.kron(m.S_up, P2 @ Q2)


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("model", ["swin", "vit", "gpt2"])
def test_the_equation_written_out(model, lite):
    """h + gelu(h D_t) U_t, with the products formed; the gradient of what all share is the sum over
    sites and tasks; a task that no sample has moves nothing."""
    tuned, batch = make(f", lite={lite}", model)
    mine = dict(tuned.branches(Decomposed))
    templates = next(iter(mine.values())).templates
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def stand(path, m):
        def hook(module, args, out):
            h, rows = out[0] if isinstance(out, tuple) else out, []
            for i, row in enumerate(h):
                D, U = dense(m, templates, int(TASK[i * 3 // len(h)]))
                rows.append(row + F.gelu(row @ D) @ U)
            y = torch.stack(rows)
            return (y, *out[1:]) if isinstance(out, tuple) else y
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)
    want, got = base(**batch).logits, tuned.model(**batch, task=TASK).logits
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")
        assert b.any(), n
        if "task.weight" in n:
            assert not a[1].any() and a[0].any() and a[2].any()


def test_stages_share_one_template_and_differ_by_their_kernels():
    tuned, _ = make()
    parts = [m for _, m in tuned.branches(Decomposed)]
    assert len({id(m.templates) for m in parts}) == 1
    assert sorted({tuple(m.S_up.shape) for m in parts}) == [(1, 1), (2, 2)]
    held = [n for n, _ in tuned.named_parameters() if "templates" in n]
    assert len(held) == 5 and len({n.partition(".burnish")[0] for n in held}) == 1
    saved = sum(t.numel() for t in tuned.tensors().values())
    (m,) = burnish.parse(SMALL.format(""))
    assert saved == sum(p.numel() for p in tuned.parameters()) \
        == m.generators(16) + sum(m.count(16, len(p.S_up)) for p in parts)


def test_a_mixed_batch_is_its_tasks_one_by_one():
    tuned, batch = make()
    with torch.no_grad():
        whole = tuned.model(**batch, task=TASK).logits
        for k in range(3):
            one = {n: v[k:k + 1] for n, v in batch.items()}
            torch.testing.assert_close(tuned.model(**one, task=int(TASK[k])).logits[0], whole[k])


@pytest.mark.parametrize("lite", [False, True])
def test_one_task_by_itself_is_a_plain_adapter(lite, tmp_path):
    tuned, batch = make(f", lite={lite}")
    with torch.no_grad():
        want = [tuned.model(**batch, task=k).logits for k in range(3)]
        assert not torch.allclose(want[0], want[2])
        for k in (0, 2):
            tuned.use("default")
            tuned.recipe.named("polyhistor").lifecycle(tuned, k, f"task{k}")
            tuned.model.double()
            torch.testing.assert_close(tuned.model(**batch).logits, want[k], rtol=1e-5, atol=1e-6)
    assert {(b.down.weight.shape, b.up.bias) for _, b in tuned.branches(Bottleneck)} == {
        ((4, 16), None), ((8, 32), None)}
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny("swin", dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want[2], rtol=1e-4, atol=1e-5)
    tuned.use("default")
    for wrong in (-1, 3):
        with pytest.raises(burnish.RecipeError, match=f"tasks 0 to 2, not {wrong}"):
            tuned.recipe.named("polyhistor").lifecycle(tuned, wrong, "no")
        with pytest.raises(burnish.RecipeError, match="polyhistor reads 'task'"):
            tuned.model(**batch, task=wrong)


@pytest.mark.parametrize("lite", [False, True])
def test_starts(lite):
    net, batch = tiny("vit", batch=3)
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, f"polyhistor(lite={lite})", head=False)
    assert torch.equal(net(**batch, task=torch.tensor([0, 1, 1])).logits, want)
    for _, m in tuned.branches(Decomposed):
        assert torch.equal(m.S_down, torch.eye(len(m.S_down))) and not m.S_up.any()
    torch.manual_seed(0)
    t = Templates(400, 64, 96, 16, 4, lite)
    P, Q, P2, Q2 = (x.detach() for x in t(torch.arange(400)))
    for made, deviation in ((P @ Q, 96**-0.5), (P2 @ Q2, 16**-0.5)):
        assert float(made.std()) == pytest.approx(deviation, rel=0.15)
    groups = tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups
    free = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert all(id(m.S_up) in free and id(m.S_down) in free for _, m in tuned.branches(Decomposed))


def test_the_counts_on_swin_tiny(published):
    """26,624 a side of width 96, bottleneck 8, rank 4 and 64 numbers a task; a small share of what
    HyperFormer trains there."""
    (m,) = burnish.parse("polyhistor(tasks=4)")
    assert m.settings() == {"targets": None, "tasks": 4, "embedding": 64, "rank": 4,
                            "reduction": 12, "lite": False, "stored": False}
    assert m.generators(96) == 2 * 26_624 + 4 * 64
    assert burnish.parse("polyhistor")[0].tasks == 2
    assert m.count(96) == 2 and m.count(96, 2) == 8
    anatomy, _ = published("SwinConfig", "SwinForImageClassification")

    def trained(text):
        with torch.device("meta"):
            made = list(burnish.parse(text)[0].branch(anatomy))
        return len(made), sum(p.numel() for b in made for p in b.module.parameters())

    kernels = sum(n * 2 * 2 * a * a for n, a in ((2, 1), (2, 2), (6, 4), (2, 8)))
    assert trained("polyhistor(tasks=4)") == (24, m.generators(96) + kernels)
    lite, = burnish.parse("polyhistor(tasks=4, lite=True)")
    assert lite.generators(96) == 2 * 64 * 4 * 8 + 96 * 4 + 4 * 64
    assert trained("polyhistor(tasks=4, lite=True)") == (24, lite.generators(96) + kernels)
    _, other = trained("hyperformer(tasks=4, reduction=12, norms=False)")
    assert trained("polyhistor(tasks=4)")[1] < 0.1 * other


def test_a_bottleneck_is_one_wide_at_least():
    tuned = burnish.tune(tiny("vit")[0], "polyhistor(reduction=100)", head=False)
    assert {m.templates.m for _, m in tuned.branches(Decomposed)} == {1}
    (m,) = burnish.parse("polyhistor(reduction=100)")
    held = sum(p.numel() for n, p in tuned.named_parameters() if "templates" in n)
    assert m.generators(32) == held == 2 * 64 * 4 * (1 + 32) + 2 * 64


@pytest.mark.parametrize("settings", ["tasks=0", "embedding=0", "rank=0", "reduction=0"])
def test_what_cannot_act_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^polyhistor"):
        burnish.parse(f"polyhistor({settings})")
    assert burnish.parse("polyhistor(tasks=1, embedding=1, rank=1, reduction=1)")


def test_models_that_do_not_fit_are_refused():
    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(d, 8), nn.Linear(8, d)

        def forward(self, x):
            return x + self.fc2(self.fc1(x).relu())

    net = nn.Sequential()
    net.stage1, net.stage2 = (nn.ModuleList([Block(d), Block(d)]) for d in (8, 12))
    with pytest.raises(burnish.RecipeError, match="is 12 wide, no multiple of the narrowest, 8"):
        burnish.tune(net, "polyhistor", head=False)
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    net = nn.Sequential(nn.Linear(8, 16),
                        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    with pytest.raises(burnish.RecipeError, match="polyhistor tells the samples"):
        burnish.tune(net, "polyhistor")
    burnish.tune(net, "polyhistor(stored=True)", head=False)
