"""VL-Adapter: what tasks share of their adapters, and what each has alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.another import beside
from burnish.blocks.state.bottleneck import Bottleneck
from burnish.blocks.state.keyed_bottleneck import TaskBottlenecks
from burnish.testing import stir, tiny

TASK = torch.tensor([2, 0, 2])


def make(share, model="vit", **kw):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    batch.pop("labels", None)
    said = f"share='{share}'" + (", tasks=3" if share != "all" else "")
    tuned = burnish.tune(net, f"vl_adapter({said}, norms=False)", head=False, **kw)
    net.double().eval()
    return stir(tuned, size=0.3), batch


@pytest.mark.parametrize("share", ["down", "up", "none"])
@pytest.mark.parametrize("model", ["vit", "swin", "gpt2"])
def test_the_equation_written_out(share, model):
    """h + U_t act(D_t h + b_t) + c_t sample by sample; what a task without samples has alone gets
    no gradient."""
    tuned, batch = make(share, model)
    mine = dict(tuned.branches(TaskBottlenecks))
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def stand(path, m):
        def hook(module, args, out):
            h, rows = out[0] if isinstance(out, tuple) else out, []
            for i, row in enumerate(h):
                t = int(TASK[i * 3 // len(h)])
                D, b, U, c = (p[min(t, len(p) - 1)] for p in (m.down, m.down_bias, m.up, m.up_bias))
                rows.append(row + F.gelu(row @ D.T + b, approximate="tanh") @ U.T + c)
            y = torch.stack(rows)
            return (y, *out[1:]) if isinstance(out, tuple) else y
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)
        assert [len(p) for p in (m.down, m.down_bias, m.up, m.up_bias)] == \
            [1 if share == "down" else 3] * 2 + [1 if share == "up" else 3] * 2
    want, got = base(**batch).logits, tuned.model(**batch, task=TASK).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
        assert b.any(), n
        assert len(a) == 1 or not a[1].any() and a[0].any() and a[2].any(), n


def test_it_stands_behind_self_attention_cross_attention_and_mlp():
    tuned = burnish.tune(tiny("t5")[0], "vl_adapter", head=False)
    paths = [p for p, _ in tuned.branches(Bottleneck)]
    assert len(paths) == 2 * 2 + 2 * 3 and len(set(paths)) == 10
    assert sum(".EncDecAttention." in p for p in paths) == 2


def test_one_for_all_is_one_each_with_tied_weights():
    """Outputs are the same, and the gradient is the sum over the tasks."""
    single, batch = make("all")
    several, _ = make("none")
    one = dict(single.branches(Bottleneck))
    with torch.no_grad():
        for path, m in several.branches(TaskBottlenecks):
            for p, value in zip(m.parameters(), one[path].parameters(), strict=True):
                p.copy_(value.expand_as(p))
    a, b = single.model(**batch).logits, several.model(**batch, task=TASK).logits
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for p, q in zip(torch.autograd.grad(a.square().sum(), list(single.parameters())),
                    torch.autograd.grad(b.square().sum(), list(several.parameters())), strict=True):
        torch.testing.assert_close(p, q.sum(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("share, tensors", [("all", 4), ("down", 4), ("none", 4)])
def test_what_is_shared_has_one_slot_of_the_optimizer(share, tensors):
    """And stands in a file once."""
    tuned, batch = make(share)
    opt = tuned.optimizer(lr=1e-2)
    tuned.model(**batch, **({} if share == "all" else {"task": TASK})).logits.sum().backward()
    opt.step()
    held = [p for g in opt.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == 4 * tensors
    per = tuned.recipe.named("vl_adapter").count(32)
    assert sum(p.numel() for p in held) == 4 * per == sum(
        t.numel() for t in tuned.tensors().values())


def test_a_mixed_batch_is_its_tasks_one_by_one():
    tuned, batch = make("down", "swin")
    with torch.no_grad():
        whole = tuned.model(**batch, task=TASK).logits
        for k in range(3):
            one = {n: v[k:k + 1] for n, v in batch.items()}
            torch.testing.assert_close(tuned.model(**one, task=int(TASK[k])).logits[0], whole[k])


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_one_task_by_itself_is_an_adapter_for_all(share, tmp_path):
    tuned, batch = make(share)
    with torch.no_grad():
        want = [tuned.model(**batch, task=k).logits for k in range(3)]
        assert not torch.allclose(want[0], want[2])
        for k in (0, 2):
            tuned.use("default")
            tuned.recipe.named("vl_adapter").lifecycle(tuned, k, f"task{k}")
            tuned.model.double()
            torch.testing.assert_close(tuned.model(**batch).logits, want[k], rtol=1e-6, atol=1e-6)
    assert [(m.name, m.share) for m in tuned.recipe] == [("vl_adapter", "all")]
    tuned.save(tmp_path / "one")
    again = burnish.load(tiny("vit", dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", ["scalearn(reduction=8, dropout=0.0)",
                                  "ast_adapter(bottleneck=4, mixer='conformer', kernel=3)"])
def test_what_other_parts_hold_without_training_it_goes_along(more):
    """Frozen sources, running statistics: as they are now, not as they are made."""
    net, batch = tiny("vit", dtype=torch.float64, batch=3)
    batch.pop("labels")
    tuned = burnish.tune(net, f"{more} + vl_adapter(tasks=3, share='none', norms=False)",
                         head=False, seed=5)
    net.double()
    with torch.no_grad():
        for n, p in net.named_parameters():
            if ".burnish." in n:
                p.add_(0.3 * torch.randn_like(p))
        for _ in range(3):
            net(**batch, task=TASK)                          # statistics move
        want = net.eval()(**batch, task=2).logits
        tuned.recipe.named("vl_adapter").lifecycle(tuned, 2, "one")
        net.double()
        torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_what_has_another_size_by_now_is_refused():
    tuned = burnish.tune(tiny("vit")[0], "increlora(rank=4) + vl_adapter(share='none')", head=False)
    tuned.resize(next(term for _, term in tuned.terms(nn.Module)), torch.arange(1))
    with pytest.raises(burnish.RecipeError, match="since it was made"):
        tuned.recipe.named("vl_adapter").lifecycle(tuned, 0, "one")
    assert list(tuned.adapters) == ["default"] and tuned.training == "default"


def test_what_fails_on_the_way_leaves_what_was():
    tuned, batch = make("none")
    part = tuned.recipe.named("vl_adapter")
    want = tuned.model(**batch, task=TASK).logits
    made = {path: m.plain(0).state_dict() for path, m in tuned.branches(TaskBottlenecks)}
    made[max(made)].pop("up.bias")
    with pytest.raises(RuntimeError, match="up.bias"):
        beside(tuned, part, "one", [(burnish.parse("vl_adapter(norms=False)")[0], made)])
    assert list(tuned.adapters) == ["default"] and tuned.training == "default"
    assert not any(".one" in n for n, _ in tuned.model.named_modules())
    assert torch.equal(tuned.model(**batch, task=TASK).logits, want)
    part.lifecycle(tuned, 0, "one")


def test_what_there_is_none_of_is_refused():
    tuned, batch = make("none")
    for wrong in (-1, 3):
        with pytest.raises(burnish.RecipeError, match=f"tasks 0 to 2, not {wrong}"):
            tuned.recipe.named("vl_adapter").lifecycle(tuned, wrong, "no")
        with pytest.raises(burnish.RecipeError, match="vl_adapter reads 'task'"):
            tuned.model(**batch, task=wrong)
    tuned, _ = make("all")
    with pytest.raises(burnish.RecipeError, match="one adapter for all tasks already"):
        tuned.recipe.named("vl_adapter").lifecycle(tuned, 0, "no")


def test_starts():
    for share in ("all", "none"):
        tuned = burnish.tune(tiny("vit", batch=3)[0], f"vl_adapter(share='{share}')", head=False)
        for _, m in tuned.branches(Bottleneck if share == "all" else TaskBottlenecks):
            for n, p in m.named_parameters():
                assert not p.any() if "bias" in n else 0.01 < float(p.detach().std()) < 0.03, n
            if share == "none":
                assert not torch.equal(m.down[0], m.down[1]) and not torch.equal(m.up[0], m.up[1])
        net, batch = tiny("vit", batch=3)
        net.eval()
        want = net(**batch).logits
        burnish.tune(net, f"vl_adapter(share='{share}', init='zero')", head=False)
        assert torch.equal(net(**batch, **({} if share == "all" else {"task": 1})).logits, want)


def test_norms_train_where_it_stands():
    """Those of a stack that targets leave out do not."""
    net, _ = tiny("clip")
    tuned = burnish.tune(net, "vl_adapter(targets='text_model*')", head=False)
    assert all(p.startswith("text_model.") for p, _ in tuned.branches(Bottleneck))
    names = {n for n, _ in tuned.named_parameters() if ".burnish" not in n}
    assert any(n.startswith("text_model.encoder.layers.0") for n in names)
    assert not any(n.startswith("vision_model.encoder.layers.") for n in names)
    tuned = burnish.tune(tiny("clip")[0], "vl_adapter", head=False)
    names = {n for n, _ in tuned.named_parameters() if ".burnish" not in n}
    assert any(n.startswith("vision_model.encoder.layers.") for n in names)
    tuned = burnish.tune(tiny("clip")[0], "vl_adapter(norms=False)", head=False)
    assert all(".burnish" in n for n, _ in tuned.named_parameters())


def test_counts_and_defaults(published):
    """148,320 of 768 channels and a bottleneck of 96; T5-base has 60 sites, 12 in each of the
    encoder's two places and the decoder's three."""
    (m,) = burnish.parse("vl_adapter")
    assert m.settings() == {"targets": None, "tasks": 2, "reduction": 8, "share": "all",
                            "act": "gelu_new", "init": "bert", "norms": True}
    anatomy, _ = published("T5Config", "T5ForConditionalGeneration", d_model=768, d_ff=3072,
                           num_layers=12, num_decoder_layers=12, num_heads=12)
    for share, per in (("all", 148_320), ("none", 4 * 148_320),
                       ("down", 73_824 + 4 * 74_496), ("up", 4 * 73_824 + 74_496)):
        more = "" if share == "all" else ", tasks=4"
        (m,) = burnish.parse(f"vl_adapter(share='{share}'{more})")
        with torch.device("meta"):
            made = list(m.branch(anatomy))
        assert len(made) == 60 and m.count(768) == per
        assert sum(p.numel() for b in made for p in b.module.parameters()) == 60 * per


def test_an_adapter_is_one_wide_at_least():
    tuned = burnish.tune(tiny("vit")[0], "vl_adapter(reduction=100, norms=False)", head=False)
    assert {tuple(b.down.weight.shape) for _, b in tuned.branches(Bottleneck)} == {(1, 32)}
    assert burnish.parse("vl_adapter(reduction=100)")[0].count(32) == 32 + 1 + 32 + 32


@pytest.mark.parametrize("settings", ["tasks=0", "reduction=0"])
def test_what_cannot_act_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^vl_adapter"):
        burnish.parse(f"vl_adapter({settings})")
    with pytest.raises(burnish.ConfigError, match="unknown activation 'gelo'"):
        burnish.parse("vl_adapter(act='gelo')")
    with pytest.raises(burnish.RecipeError, match="^vl_adapter: tasks=7 .* tasks left out"):
        burnish.parse("vl_adapter(tasks=7)")


def test_models_that_put_tokens_first_are_refused_where_tasks_are_told_apart():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    net = nn.Sequential(nn.Linear(8, 16),
                        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    with pytest.raises(burnish.RecipeError, match="vl_adapter tells the samples"):
        burnish.tune(net, "vl_adapter(share='down')")
    burnish.tune(net, "vl_adapter", head=False)
