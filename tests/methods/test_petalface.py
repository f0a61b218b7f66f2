"""PETALface: two LoRAs mixed by a sample's quality, their equation, their plain form."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.weight.keyed import Mixed
from burnish.core.errors import RankError
from burnish.core.site import Place
from burnish.testing import stir, tiny

QUALITY = torch.tensor([0.2, 0.9, 0.5])
OFF = "petalface(rank=2, dropout=0.0, scale=1.5, middle=0.4)"


def make(recipe=OFF, model="vit", **kw):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch.pop("labels", None)
    tuned = burnish.tune(net, recipe, head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.3), batch


@pytest.mark.parametrize("model", ["vit", "gpt2", "swin", "timm_qkv"])
def test_the_equation_written_out(model):
    """y = W x + s B_1 A_1 (1 - a) x + s B_2 A_2 a x, a = 1/2 + q - middle, sample by sample."""
    tuned, batch = make(model=model)
    mine = dict(tuned.branches(Mixed))
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def stand(path, m):
        def hook(module, args, out):
            x, rows = args[0], []
            for i, row in enumerate(x):                      # windows follow their sample
                a = float(QUALITY[i * 3 // len(x)]) + 0.5 - 0.4
                a = min(a, 1.0)
                y = ((1 - a) * row) @ m.A[0].T @ m.B[0].T + (a * row) @ m.A[1].T @ m.B[1].T
                rows.append(1.5 * y)
            return out + torch.stack(rows)
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)
    want, got = base(**batch).logits, tuned.model(**batch, quality=QUALITY.double()).logits
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        assert b.any(), n
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


def test_the_best_and_the_worst_use_one_of_the_two():
    tuned, batch = make("petalface(rank=2, dropout=0.0)")
    for quality, idle in ((0.0, 1), (1.0, 0)):
        params = [p for n, p in tuned.named_parameters()]
        grads = torch.autograd.grad(tuned.model(**batch, quality=quality).logits.sum(), params)
        assert all(not g[idle].any() for g in grads) and all(g[1 - idle].any() for g in grads)


def test_a_quality_far_from_the_middle_is_cut():
    layer = Mixed("quality", 4, 4, 2, 2, scale=1.0, dropout=0.0, middle=0.9)
    q = torch.tensor([0.0, 0.3, 0.4, 0.65, 0.9, 1.0])
    a = torch.tensor([0.0, 0.0, 0.0, 0.25, 0.5, 0.6])
    torch.testing.assert_close(layer.gates(q), torch.stack([1 - a, a], 1))
    low = Mixed("quality", 4, 4, 2, 2, scale=1.0, dropout=0.0, middle=0.1)
    torch.testing.assert_close(low.gates(torch.tensor([0.9])), torch.tensor([[0.0, 1.0]]))


def test_a_mixed_batch_is_its_samples_one_by_one():
    tuned, batch = make(model="swin")
    with torch.no_grad():
        whole = tuned.model(**batch, quality=QUALITY).logits
        for k in range(3):
            one = {n: v[k:k + 1] for n, v in batch.items()}
            got = tuned.model(**one, quality=float(QUALITY[k])).logits[0]
            torch.testing.assert_close(got, whole[k], rtol=1e-6, atol=1e-7)


def test_dropout_is_on_what_each_gives():
    """Entries of the result drop one by one, those of the two apart; backward drops alike."""
    tuned, batch = make("petalface(rank=2, dropout=0.4)")
    layer = next(m for _, m in tuned.branches(Mixed)).float()
    with torch.no_grad():
        layer.B.fill_(1.0)
        layer.A.fill_(1.0)
    layer.train()
    from burnish.core.call import Call, resume

    x = torch.ones(1, 400, 32, requires_grad=True)
    torch.manual_seed(0)
    with resume(Call(given={"quality": 0.5})):
        y = layer(x)
    levels = y.detach().unique()
    one = 0.5 * 2 * 32 / 0.6
    torch.testing.assert_close(levels, torch.tensor([0.0, one, 2 * one]))
    shares = [(y == v).float().mean().item() for v in levels]
    assert shares == pytest.approx([0.16, 0.48, 0.36], abs=0.01)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx[0, :, 0], y.detach()[0].sum(-1) / 32)
    layer.eval()
    with resume(Call(given={"quality": 0.5})):
        torch.testing.assert_close(layer(x), torch.full_like(y, 2 * 0.5 * 2 * 32))


def test_rows_of_a_fused_weight_get_it_alone():
    tuned, batch = make(model="timm_qkv", targets="q,v")
    (path, layer), *_ = tuned.branches(Mixed)
    from burnish.core.call import Call, resume

    with resume(Call(given={"quality": 0.5})):
        y = layer(torch.randn(2, 32, dtype=torch.float64))
    assert y.shape == (2, 96) and not y[:, 32:64].any() and y[:, :32].all() and y[:, 64:].all()


@pytest.mark.parametrize("model, targets", [("vit", None), ("timm_qkv", "q,v"), ("gpt2", None)])
@pytest.mark.parametrize("quality", [0.3, 1.0])
def test_one_quality_by_itself_is_a_lora_that_merges(model, targets, quality, tmp_path):
    tuned, batch = make(f"{OFF} + lora(rank=2, targets='fc2')" if model == "vit" else OFF, model,
                        **({} if targets is None else {"targets": targets}))
    with torch.no_grad():
        want = tuned.model(**batch, quality=quality).logits
        tuned.recipe.named("petalface").lifecycle(tuned, quality, "one")
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-5, atol=1e-6)
        tuned.unmerge()
    plain = [m for m in tuned.recipe if m.name == "lora"][0]
    assert plain.rank == (4 if quality < 0.9 else 2)
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny(model, dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-4, atol=1e-5)


def test_a_lora_at_the_same_place_is_refused():
    tuned, _ = make(f"{OFF} + lora(rank=2)")
    with pytest.raises(burnish.RecipeError, match="petalface would become a lora in .*has one"):
        tuned.recipe.named("petalface").lifecycle(tuned, 0.5, "one")
    assert list(tuned.adapters) == ["default"]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), float("inf")])
def test_what_is_no_quality_is_refused(wrong):
    tuned, batch = make()
    with pytest.raises(burnish.RecipeError, match="petalface reads qualities from 0 to 1, not"):
        tuned.recipe.named("petalface").lifecycle(tuned, wrong, "one")
    with pytest.raises(burnish.RecipeError, match="petalface reads 'quality'.*0 to 1, not"):
        tuned.model(**batch, quality=torch.tensor([0.5, wrong, 0.5]))


def test_start_counts_and_defaults(published):
    net, batch = tiny("vit", batch=3)
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "petalface", head=False)
    assert torch.equal(net(**batch, quality=QUALITY).logits, want)
    layers = dict(tuned.branches(Mixed))
    assert {p.rpartition(".")[2] for p in layers} == {"q_proj", "k_proj", "v_proj"}
    A = torch.cat([m.A.detach().flatten() for m in layers.values()])
    assert float(A.std()) == pytest.approx(1 / 8, rel=0.05) and abs(A.mean()) < 0.01
    assert all(not m.B.any() for m in layers.values())
    assert {g["weight_decay"] for g in
            tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} == {0.0}
    (m,) = burnish.parse("petalface")
    assert m.settings() == {"targets": None, "rank": 8, "scale": 1.0, "dropout": 0.1,
                            "middle": 0.5}
    fused = Place("a", "weight", "linear", 3 * 512, 512)
    assert m.count(fused) == 2 * 8 * (512 + 3 * 512)
    anatomy, _ = published("ViTConfig", "ViTForImageClassification")
    with torch.device("meta"):
        made = list(m.mixture(anatomy))
    assert sum(p.numel() for b in made for p in b.module.parameters()) == 12 * 3 * 16 * 2 * 768


@pytest.mark.parametrize("settings", ["middle=-0.1", "middle=1.1", "dropout=1.0"])
def test_what_cannot_act_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^petalface"):
        burnish.parse(f"petalface({settings})")
    assert burnish.parse("petalface(middle=0.0)") and burnish.parse("petalface(middle=1.0)")


def test_models_without_a_place_are_refused():
    with pytest.raises(burnish.RecipeError, match="petalface: none of the targets is one of the"):
        burnish.tune(tiny("mlp")[0], "petalface")
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32)
    stack = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(burnish.RecipeError, match="petalface tells the samples"):
        burnish.tune(torch.nn.Sequential(torch.nn.Linear(8, 16), stack), "petalface")


def test_a_routed_expert_is_refused():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

        def forward(self, x):
            return self.experts[0](x)

    with pytest.raises(burnish.TargetError, match="given the tokens of all samples together"):
        burnish.tune(Net(), "petalface(rank=2)", targets="experts.0", head=False)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(RankError, match="petalface: rank 40 does not fit"):
        burnish.tune(tiny("vit")[0], "petalface(rank=40)")


def test_a_head_that_trains_comes_along():
    """Also where nothing but this part was narrowed by the recipe's targets."""
    net, batch = tiny("timm_qkv", batch=3)
    batch.pop("labels")
    tuned = stir(burnish.tune(net, OFF, targets="q,v", head=True), size=0.3)
    net.eval()
    with torch.no_grad():
        want = net(**batch, quality=0.3).logits
        tuned.recipe.named("petalface").lifecycle(tuned, 0.3, "one")
        torch.testing.assert_close(net(**batch).logits, want, rtol=1e-4, atol=1e-5)
    assert {n for n, _ in tuned.named_parameters() if "burnish" not in n} == \
        {"head.weight", "head.bias"}
