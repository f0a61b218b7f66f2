"""SHiRA: a few entries of high rank."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import burnish
from burnish.blocks.weight.sparse import SparseDelta
from burnish.core.anatomy import Anatomy
from burnish.core.errors import ConfigError, RecipeError, TargetError
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.testing.checks.cost import keeps_what_it_says
from burnish.testing.models import tiny

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
MASKS = ("random", "magnitude", "structured")


def test_count_on_llama_7b():
    anatomy = Anatomy.of(tiny("llama", meta=True, **LLAMA_7B)[0])
    (method,) = parse("shira(rank=32)")
    assert sum(method.count(p) for p in match(anatomy, "q,v")) == 16_777_216


def tuned_linear(mask, rank=2, out=64, inp=48):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out)).double()
    tuned = burnish.tune(model, f"shira(rank={rank}, mask={mask!r})")
    ((_, term),) = tuned.terms(SparseDelta)
    return tuned, term.double()


@pytest.mark.parametrize("mask", MASKS)
def test_exactly_k_distinct_entries_of_high_rank(mask):
    tuned, term = tuned_linear(mask)
    k = 2 * (64 + 48)
    assert sum(p.numel() for p in tuned.parameters()) == term.values.numel() == k
    assert term.index.unique().numel() == k
    nn.init.normal_(term.values)
    assert int((term.dense() != 0).sum()) == k
    assert int(torch.linalg.matrix_rank(term.dense().detach())) > 2


@pytest.mark.parametrize("mask", MASKS)
def test_values_get_the_dense_gradient_at_their_entries(mask):
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    x, g = torch.randn(5, 48, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
    (dv,) = torch.autograd.grad(tuned.model(x), term.values, g)
    torch.testing.assert_close(dv, (g.t() @ x).flatten()[term.index.long()], rtol=1e-12,
                               atol=1e-12)


def test_magnitude_takes_the_largest():
    tuned, term = tuned_linear("magnitude")
    W = tuned.model[0].weight.abs().flatten()
    rest = torch.ones_like(W, dtype=torch.bool)
    rest[term.index.long()] = False
    assert float(W[~rest].min()) >= float(W[rest].max())


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_masks_of_the_gradient_take_the_largest(mask, tmp_path):           # findings 3.9
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x, labels):
            out = self.b(torch.tanh(self.a(x)))
            return {"logits": out, "loss": nn.functional.cross_entropy(out, labels)}

    torch.manual_seed(0)
    net = Net().double()
    base = copy.deepcopy(net)
    batch = {"x": torch.randn(6, 12, dtype=torch.float64), "labels": torch.randint(0, 3, (6,))}
    W = base.a.weight
    (g,) = torch.autograd.grad(base(**batch)["loss"], W)
    score = (g if mask == "gradient" else g * W).abs().flatten()
    recipe = f"shira(rank=2, mask={mask!r}, targets='a')"
    tuned = burnish.tune(net, recipe, head=False, calibration=[batch])
    ((_, term),) = tuned.terms(SparseDelta)
    assert set(term.index.tolist()) == set(score.topk(2 * (12 + 16)).indices.tolist())
    nn.init.normal_(term.values)
    want = tuned.model(**batch)["logits"]
    tuned.save(tmp_path / "a")
    again = burnish.load(base, tmp_path / "a")               # the index is in the file: no data
    assert torch.equal(again.model(**batch)["logits"], want)


def test_a_mask_of_the_gradient_needs_batches():
    with pytest.raises(ConfigError, match="calibration"):
        burnish.tune(nn.Sequential(nn.Linear(12, 16)), "shira(rank=2, mask='snip')", head=False)


def test_a_structured_mask_is_the_diagonal_and_whole_rows_and_columns():
    _, term = tuned_linear("structured", rank=4)
    mask = torch.zeros(64, 48, dtype=torch.bool)
    mask.view(-1)[term.index.long()] = True
    assert mask.diagonal().all()
    assert int(mask.all(1).sum()) >= 2 and int(mask.all(0).sum()) >= 2


@pytest.mark.parametrize("mask", MASKS)
def test_merged_and_back_to_the_bit(mask):
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    before = tuned.model[0].weight.clone()
    x = torch.randn(5, 48, dtype=torch.float64)
    want = tuned.model(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-13, atol=1e-13)
    assert int((tuned.model[0].weight != before).sum()) == term.values.numel()
    tuned.unmerge()
    assert torch.equal(tuned.model[0].weight, before)
    assert torch.equal(tuned.model(x), want)


def test_places_and_seeds_draw_their_own_masks():
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    index = [t.index for _, t in burnish.tune(model, "shira(rank=2)").terms(SparseDelta)]
    other = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    again = [t.index for _, t in burnish.tune(other, "shira(rank=2)").terms(SparseDelta)]
    third = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    moved = [t.index for _, t in burnish.tune(third, "shira(rank=2, seed=1)").terms(SparseDelta)]
    assert not torch.equal(index[0], index[1])
    assert torch.equal(index[0], again[0])
    assert not torch.equal(index[0], moved[0])


@pytest.mark.parametrize("mask", MASKS)
def test_a_folder_brings_back_the_same_function(mask, tmp_path):
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    x = torch.randn(3, 48, dtype=torch.float64)
    want = tuned.model(x)
    tuned.save(tmp_path / "a")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 64)).double()
    again = burnish.load(base, tmp_path / "a")
    torch.testing.assert_close(again.model(x), want, rtol=1e-6, atol=1e-6)


def test_more_entries_than_the_matrix_has():
    with pytest.raises(RecipeError, match="largest rank there is 27"):
        burnish.tune(nn.Sequential(nn.Linear(48, 64)), "shira(rank=28)")


@pytest.mark.parametrize("mask", MASKS)
def test_a_base_in_float64_keeps_its_digits_under_values_in_float32(mask):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64)).double()
    x = torch.randn(5, 48, dtype=torch.float64)
    want = net(x)
    burnish.tune(net, f"shira(rank=2, mask={mask!r})", head=False)
    torch.testing.assert_close(net(x), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mask", MASKS)
def test_the_equation_written_out(mask):                                   # findings 6
    """y = x (W + scatter(v))^T + b, outputs and gradients of v and x in float64."""
    tuned, term = tuned_linear(mask)
    nn.init.normal_(term.values)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 64, dtype=torch.float64)
    layer, v = tuned.model[0], term.values
    S = torch.zeros(64 * 48, dtype=torch.float64).scatter(0, term.index.long(), v).view(64, 48)
    y = x @ (layer.weight + S).t() + layer.bias
    got = tuned.model(x)
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)
    for a, w in zip(torch.autograd.grad(got, (v, x), g), torch.autograd.grad(y, (v, x), g),
                    strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)


# -- masks of one's own ---------------------------------------------------------------------------
def masks_for(model, path, share=0.1, dtype=torch.bool, seed=0):
    """A drawn mask per weight of a tuned-to-be model, under its name and in its shape."""
    g = torch.Generator().manual_seed(seed)
    made = {n: (torch.rand(p.shape, generator=g) < share).to(dtype)
            for n, p in model.named_parameters() if p.dim() > 1}
    save_file(made, path)
    return made


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_of_ones_own_says_which_entries_train(dtype, tmp_path):     # findings 3.9
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    base = copy.deepcopy(net)
    made = masks_for(net, tmp_path / "m.safetensors", dtype=dtype)
    tuned = burnish.tune(net, f"shira(mask='{tmp_path}/m.safetensors')", head=False, targets="0,2")
    assert sum(p.numel() for p in tuned.parameters()) == sum(int(m.sum()) for m in made.values())
    x, y = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    for _ in range(3):
        tuned.step((x, y), loss=lambda out, batch: (out - batch[1]).square().mean())
    want = net(x).detach()
    tuned.merge()
    for n, p in base.named_parameters():
        moved = net.get_parameter(n) != p
        assert torch.equal(moved, made[n].bool() if n in made else torch.zeros_like(moved)), n
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)


def test_a_folder_needs_no_masks_file(tmp_path):
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    base, file = copy.deepcopy(net), tmp_path / "m.safetensors"
    masks_for(net, file)
    for whole in (False, True):                          # to use it, and to train on
        masks_for(net, file)
        tuned = burnish.tune(copy.deepcopy(net), f"shira(mask='{file}')", head=False, targets="0,2")
        for p in tuned.parameters():
            nn.init.normal_(p)
        want = tuned.model(x := torch.randn(4, 12))
        tuned.save(tmp_path / "a", whole=whole)
        file.unlink()
        again = burnish.load(copy.deepcopy(base), tmp_path / "a")
        assert torch.equal(again.model(x), want)
        assert [t.index.tolist() for _, t in again.terms(SparseDelta)] == \
            [t.index.tolist() for _, t in tuned.terms(SparseDelta)]
    assert str(again.recipe) == f"shira(mask='{file}')"
    again.save(tmp_path / "b")                           # what is finished names no file
    assert str(burnish.load(base, tmp_path / "b").recipe) == "shira(mask='stored')"
    with pytest.raises(RecipeError, match="name the masks' file"):
        burnish.tune(nn.Sequential(nn.Linear(99, 99)), "shira(mask='stored')", head=False)


@pytest.mark.parametrize("cell", ["gpt2/q,v", "timm_qkv/q", "cnn/conv", "encoder/v"])
def test_masks_have_the_shape_in_which_the_model_holds_its_weights(cell, tmp_path):
    """Transposes, rows of fused weights, kernels: what changes is where the mask is 1."""
    model, targets = cell.split("/")
    net, _ = tiny(model)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    probe = burnish.tune(net, "shira(rank=1)", targets=targets, head=False)
    here = {n.partition("[")[0] for n, _ in probe.terms(SparseDelta)}
    probe.detach()
    made = {n: torch.rand(before[n].shape) < 0.2 for n in here}
    save_file(made, tmp_path / "m.safetensors")
    tuned = burnish.tune(net, f"shira(mask='{tmp_path}/m.safetensors')", targets=targets,
                         head=False)
    for _, term in tuned.terms(SparseDelta):
        nn.init.ones_(term.values)
    tuned.merge()
    for n, p in net.named_parameters():
        moved = p.detach() != before[n]
        if n not in here:
            assert not moved.any()
        elif "[" in next(iter(dict(probe_names(tuned)))):
            assert moved.any() and not (moved & ~made[n]).any()
        else:
            assert torch.equal(moved, made[n])


def probe_names(tuned):
    tuned.unmerge()
    found = [(n, t) for n, t in tuned.terms(SparseDelta)]
    tuned.merge()
    return found


def test_a_masks_file_is_simulated_and_costs_what_it_trains(tmp_path):
    net, batch = tiny("mlp")
    here = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    save_file({n: torch.rand(p.shape) < 0.5 for n, p in here.items()}, tmp_path / "m.safetensors")
    recipe = f"shira(mask='{tmp_path}/m.safetensors', targets={list(here)!r})"
    promised = burnish.simulate(copy.deepcopy(net), recipe, batch)
    measured = burnish.measure(burnish.tune(net, recipe), batch)
    assert promised.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)


@pytest.mark.parametrize(("change", "error", "why"), [
    (lambda m: m.pop("0.weight"), TargetError, "no mask for 0.weight (1 of 2 targets lack one)"),
    (lambda m: m.update({"0.weigth": m.pop("0.weight")}), TargetError,
     "no mask for 0.weight (1 of 2 targets lack one); did you mean '0.weigth'"),
    (lambda m: m.update({"1.weight": torch.ones(2)}), TargetError,
     "a mask for 1.weight, which is no target (1 of 3 are none); did you mean"),
    (lambda m: m.update({"0.weight": m["0.weight"].t().contiguous()}), RecipeError,
     "the mask of 0.weight has shape (12, 16), the weight (16, 12)"),
    (lambda m: m.update({"0.weight": torch.full((16, 12), 0.5)}), RecipeError,
     "the mask of 0.weight has entries that are neither 0 nor 1"),
    (lambda m: m.update({"0.weight": torch.full((16, 12), -1)}), RecipeError, "neither 0 nor 1"),
    (lambda m: m.update({"2.weight": torch.zeros(3, 16)}), RecipeError,
     "the mask of 2.weight has no entry of 2.weight; leave it out of the targets"),
])
def test_masks_that_do_not_fit_are_refused_beforehand(change, error, why, tmp_path):
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    made = masks_for(net, tmp_path / "m.safetensors")
    change(made)
    save_file(made, tmp_path / "m.safetensors")
    with pytest.raises(error) as caught:
        burnish.tune(net, f"shira(mask='{tmp_path}/m.safetensors')", head=False, targets="0,2")
    assert why in str(caught.value) and "m.safetensors" in str(caught.value)
    assert type(net[0]) is nn.Linear and "burnish" not in net[0]._modules


def test_a_file_that_is_none_and_words_that_are_none_are_refused(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"no tensors at all")
    for mask, why in ((f"{tmp_path}/m.safetensors", "m.safetensors"),
                      (f"{tmp_path}/n.safetensors", "no such file"),
                      ("magnitud", "did you mean 'magnitude'"), ("m.pt", "a .safetensors file")):
        with pytest.raises(RecipeError, match=why):
            burnish.tune(nn.Sequential(nn.Linear(12, 16)), f"shira(mask='{mask}')", head=False)


@pytest.mark.parametrize(("settings", "dead"), [
    ("rank=4, mask='m.safetensors'", "rank"), ("seed=1, mask='magnitude'", "seed"),
    ("seed=1, mask='m.safetensors'", "seed"), ("samples=4", "samples"),
    ("samples=4, mask='structured'", "samples")])
def test_a_setting_that_its_mask_does_not_read_is_refused(settings, dead):
    with pytest.raises(RecipeError, match=f"{dead} does nothing beside mask"):
        burnish.parse(f"shira({settings})")
    burnish.parse("shira(samples=4, mask='snip', rank=3)")
    burnish.parse("shira(seed=4, rank=3)")


def test_the_entries_a_file_claims_are_no_more_than_there_are(tmp_path):
    import json

    net = nn.Sequential(nn.Linear(12, 16))
    masks_for(net, tmp_path / "m.safetensors")
    tuned = burnish.tune(copy.deepcopy(net), f"shira(mask='{tmp_path}/m.safetensors')", head=False)
    tuned.save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    said = json.loads(config.read_text())
    said["adapters"]["default"]["settled"]["shira"]["0.weight"]["entries"] = 10**12
    config.write_text(json.dumps(said))
    with pytest.raises(RecipeError, match="which has 192"):
        burnish.load(net, tmp_path / "a")


# -- entries of their own -------------------------------------------------------------------------
def entries(tuned, name):
    return [set(t.index.tolist()) for _, t in tuned.terms(SparseDelta, name)]


@pytest.mark.parametrize("mask", MASKS)
def test_disjoint_adapters_share_no_entry_and_add_up(mask):                # findings 3.9
    """Three adapters of the same kind on the same weights: k entries each, none twice; merged
    together they stand side by side."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24)).double()
    tuned = burnish.tune(net, f"shira(rank=2, mask={mask!r})", targets="0,1", head=False)
    base = [net[k].weight.detach().clone() for k in (0, 1)]
    for name in ("b", "c"):
        tuned.add(name, f"shira(rank=2, mask={mask!r}, disjoint=True)", targets="0,1")
    names = ("default", "b", "c")
    for sets in zip(*(entries(tuned, n) for n in names), strict=True):
        assert [len(s) for s in sets] == [2 * (24 + 40)] * 3
        assert len(set.union(*sets)) == 3 * 2 * (24 + 40)
    for n in names:
        for _, t in tuned.terms(SparseDelta, n):
            nn.init.normal_(t.values)
    tuned.use(dict.fromkeys(names, 1.0))
    tuned.merge()
    for k, W in enumerate(base):
        for n in names:
            t = tuned.merged.modules[k + 1][3]._modules[n]["shira"]
            at = t.index.long()
            torch.testing.assert_close(net[k].weight.flatten()[at] - W.flatten()[at],
                                       t.values.detach().double(), rtol=1e-6, atol=1e-7)


def test_the_largest_that_are_free_are_taken():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40))
    tuned = burnish.tune(net, "shira(rank=2, mask='magnitude')", head=False)
    tuned.add("b", "shira(rank=2, mask='magnitude', disjoint=True)")
    order = net[0].weight.abs().flatten().argsort(descending=True).tolist()
    k = 2 * (24 + 40)
    assert entries(tuned, "default")[0] == set(order[:k])
    assert entries(tuned, "b")[0] == set(order[k : 2 * k])


def test_a_disjoint_draw_is_the_same_permutation_without_what_is_taken():
    def made(first):
        torch.manual_seed(0)
        tuned = burnish.tune(nn.Sequential(nn.Linear(24, 40)), first, head=False)
        tuned.add("b", "shira(rank=2, disjoint=True)")
        return tuned

    tuned = made("shira(rank=1, mask='magnitude')")
    alone = burnish.tune(nn.Sequential(nn.Linear(24, 40)), "shira(rank=3)", head=False)
    taken, drawn = entries(tuned, "default")[0], entries(alone, "default")[0]
    assert entries(tuned, "b")[0] < drawn - taken            # the first 2 (24 + 40) of them
    assert entries(made("lora(rank=1)"), "b")[0] < drawn     # nothing is taken there


def test_disjoint_in_one_recipe_and_across_rows_of_a_fused_weight():
    net, _ = tiny("timm_qkv")
    tuned = burnish.tune(net, "shira(rank=2, targets='attn.qkv') + "
                              "shira(rank=4, targets='q,v', disjoint=True)", head=False)
    width = net.blocks[0].attn.qkv.in_features
    whole, rows = {}, {}
    for name, t in tuned.terms(SparseDelta):
        path = name.partition("[")[0]
        first = {"q": 0, "v": 2 * width}.get(name.partition("[")[2][:-1], 0)
        found = {(i // width + first, i % width) for i in t.index.tolist()}
        (rows if "[" in name else whole).setdefault(path, set()).update(found)
    assert whole.keys() == rows.keys()
    for path, taken in whole.items():
        inside = {e for e in taken if not width <= e[0] < 2 * width}
        assert inside and not taken & rows[path]


def test_a_folder_brings_back_disjoint_adapters(tmp_path):
    net = nn.Sequential(nn.Linear(24, 40))
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "shira(rank=2)", head=False)
    tuned.add("b", "shira(rank=2, disjoint=True)")
    tuned.add("c", "shira(rank=2, mask='structured', disjoint=True)")
    tuned.save(tmp_path / "a")
    again = burnish.load(base, tmp_path / "a")
    for name in ("default", "b", "c"):
        assert entries(again, name) == entries(tuned, name)


def test_no_room_for_disjoint_entries_is_said():
    tuned = burnish.tune(nn.Sequential(nn.Linear(48, 64)), "shira(rank=20)", head=False)
    with pytest.raises(RecipeError, match="which has 832 left; the largest rank there is 7"):
        tuned.add("b", "shira(rank=8, disjoint=True)")
    tuned.add("b", "shira(rank=7, disjoint=True)")
    assert entries(tuned, "b")[0].isdisjoint(entries(tuned, "default")[0])


def test_masks_of_ones_own_that_are_to_be_disjoint_are_checked(tmp_path):
    mask = torch.zeros(40, 24)
    mask[[0, 30]] = 1
    save_file({"0.weight": mask}, tmp_path / "m.safetensors")
    tuned = burnish.tune(nn.Sequential(nn.Linear(24, 40)), "shira(rank=1, mask='structured')",
                         head=False)
    recipe = f"shira(mask='{tmp_path}/m.safetensors', disjoint=True)"
    both = len({*range(24), *range(720, 744)} & entries(tuned, "default")[0])
    assert both
    with pytest.raises(RecipeError, match=f"{both} entries of 0.weight in .* are those of"):
        tuned.add("b", recipe)
    tuned.add("b", recipe.replace(", disjoint=True", ""))
    mask.view(-1)[list(entries(tuned, "default")[0])] = 0
    save_file({"0.weight": mask}, tmp_path / "m.safetensors")
    tuned.remove("b")
    tuned.add("b", recipe)


def test_it_keeps_what_it_says_and_has_the_defaults_of_the_paper():
    assert keeps_what_it_says("shira", "vit") is None
    (method,) = parse("shira")
    assert (method.rank, method.samples) == (32, 128)


def test_one_entry_of_ones_own_is_enough_and_only_given_masks_are_counted(tmp_path):
    net = nn.Sequential(nn.Linear(12, 16))
    mask = torch.zeros(16, 12, dtype=torch.bool)
    mask[3, 4] = True
    save_file({"0.weight": mask}, tmp_path / "m.safetensors")
    tuned = burnish.tune(copy.deepcopy(net), f"shira(mask='{tmp_path}/m.safetensors')", head=False)
    assert tuned.adapters["default"].settled == {"shira": {"0.weight": {"entries": 1}}}
    tuned.save(tmp_path / "a")
    assert entries(burnish.load(copy.deepcopy(net), tmp_path / "a"), "default") == [{3 * 12 + 4}]
    drawn = burnish.tune(net, "shira(rank=1)", head=False)
    assert drawn.adapters["default"].settled == {}
