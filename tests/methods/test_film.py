"""FiLM: a scale and a shift that follow the sample, written out in float64 with stock hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.state.banks import Conditioned
from burnish.blocks.state.gates import Affine
from burnish.testing import stir, tiny

SAID = torch.tensor([2, 0, 2])


def make(recipe="film(conditions=3, embedding=5)", model="vit", dtype=torch.float64, **kw):
    net, batch = tiny(model, dtype=dtype, batch=3)
    tuned = burnish.tune(net, recipe, head=False, **kw)
    net.to(dtype).eval()
    return stir(tuned, size=0.3), batch


def letters(tuned):
    """path -> name of a tensor -> it."""
    found = {}
    for n, p in tuned.named_parameters():
        path, _, rest = n.partition(".burnish.")
        found.setdefault(path, {})[rest.partition(".film.")[2]] = p
    return found


@pytest.mark.parametrize("model", ["vit", "llama", "cnn", "convnext", "swin", "t5"])
def test_the_equation_written_out(model):
    """h <- (1 + W_g z + b_g) h + W_b z + b_b behind every norm of the body, sample by sample, with
    one table z: outputs and all gradients."""
    tuned, batch = make(model=model)
    mine = letters(tuned)
    (z,) = [own["z.weight"] for own in mine.values() if "z.weight" in own]
    base = tiny(model, dtype=torch.float64, batch=3)[0].eval()

    def stand(path, own):
        module = base.get_submodule(path)
        first = isinstance(module, nn.BatchNorm2d) or \
            getattr(module, "data_format", "") == "channels_first"

        def hook(m, a, h):
            out = []
            for i, row in enumerate(h):                      # windows follow their sample
                c = z[SAID[i * 3 // len(h)]]
                gain = 1 + own["gain.weight"] @ c + own["gain.bias"]
                shift = own["shift.weight"] @ c + own["shift.bias"] if "shift.bias" in own else 0
                y = row.movedim(0, -1) * gain + shift if first else row * gain + shift
                out.append(y.movedim(-1, 0) if first else y)
            return torch.stack(out)
        module.register_forward_hook(hook)

    for path, own in mine.items():
        stand(path, own)
    batch.pop("labels")
    if model == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    want, got = base(**batch).logits, tuned.model(**batch, condition=SAID).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        assert b.any(), n
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def test_it_stands_behind_norms_unless_others_are_named():
    net = tiny("bert")[0]
    norms = {n for n, m in net.named_modules() if isinstance(m, nn.LayerNorm)}
    assert set(letters(make(model="bert")[0])) == norms
    paths = set(letters(make(model="bert", targets="value")[0]))
    assert paths and all(p.endswith("value") for p in paths)
    assert "router" not in str(letters(make(model="mixtral")[0]))
    assert not any(p.startswith("classifier") for p in letters(make(model="cnn")[0]))
    for none in ("conditions", "embedding"):
        with pytest.raises(burnish.RecipeError, match=f"film.*{none}=0.*: expected 1 or more"):
            burnish.parse(f"film({none}=0)")
    with pytest.raises(burnish.RecipeError, match="^film: this model has no norm to stand behind"):
        make(model="mlp")


def test_a_routed_expert_is_left_as_it_is():
    """It is given the tokens of all samples together, in no order of theirs."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])
            self.norm = nn.LayerNorm(4)

        def forward(self, x, **kw):
            return self.norm(self.experts[0](x))

    assert [n for n, _ in burnish.tune(Net(), "film", targets="norm", head=False)
            .named_parameters() if "experts" in n] == []
    with pytest.raises(burnish.TargetError):
        burnish.tune(Net(), "film(targets='experts.0')", head=False)


def test_the_start_is_the_function_and_moves_from_it():
    net, batch = tiny("vit", batch=3)
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "film", head=False)
    got = net(**batch, condition=torch.tensor([0, 1, 1])).logits
    assert torch.equal(got, want)
    z = [p for n, p in tuned.named_parameters() if n.endswith("z.weight")]
    assert len(z) == 1 and z[0].shape == (2, 64) and 0.8 < z[0].std() < 1.2
    assert not any(p.any() for n, p in tuned.named_parameters() if not n.endswith("z.weight"))
    got.sum().backward()
    assert all(p.grad.any() for n, p in tuned.named_parameters() if not n.endswith("z.weight"))


def test_counts(published):
    """ViT-B/16 has 25 norms of 768 channels."""
    anatomy, _ = published("ViTConfig", "ViTForImageClassification")
    (m,) = burnish.parse("film(conditions=4, embedding=16)")
    with torch.device("meta"):
        made = list(m.branch(anatomy))
    assert sum(p.numel() for b in made for p in b.module.parameters()) == \
        25 * m.count(768) + 4 * 16 == 25 * 2 * 768 * 17 + 64
    assert m.count(32, shift=False) == 32 * 17
    (m,) = burnish.parse("film")
    assert m.settings() == {"conditions": 2, "embedding": 64, "targets": None}


@pytest.mark.parametrize("model, targets", [("vit", None), ("llama", None), ("cnn", None),
                                            ("bert", "value,layer.0.output.LayerNorm"),
                                            ("mlp", "layers.0")])
def test_one_condition_by_itself_is_an_ssf_that_merges(model, targets, tmp_path):
    """What else trains comes along; the file reads no key; the conditioned one stays."""
    beside = " + bitfit" if model in ("vit", "cnn") else ""
    tuned, batch = make(f"film(conditions=3, embedding=5, targets={targets!r}){beside}", model)
    batch.pop("labels")
    with torch.no_grad():
        want = [tuned.model(**batch, condition=k).logits for k in range(3)]
        assert not torch.allclose(want[1], want[2])
        sites = {p for p, _ in tuned.branches(Conditioned)}
        tuned.recipe.named("film").lifecycle(tuned, 1, "one")
        assert {p for p, _ in tuned.branches(Affine)} == sites
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want[1], rtol=1e-6, atol=1e-7)
        tuned.save(tmp_path / "one")
        torch.testing.assert_close(tuned.merge()(**batch).logits, want[1], rtol=1e-6, atol=1e-7)
        tuned.unmerge()
        tuned.use("default")
        torch.testing.assert_close(tuned.model(**batch, condition=2).logits, want[2])
    again = burnish.load(tiny(model, dtype=torch.float64)[0].eval(), tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, want[1], rtol=1e-5, atol=1e-6)
    assert str(again.recipe).startswith("ssf")


def test_statistics_of_the_base_go_along():
    tuned, batch = make("film(conditions=3, embedding=5)", "cnn")
    batch.pop("labels")
    tuned.model.train()
    with torch.no_grad():
        for _ in range(3):
            tuned.model(**batch, condition=1)
        want = tuned.model.eval()(**batch, condition=1).logits
        tuned.recipe.named("film").lifecycle(tuned, 1, "one")
        tuned.model.double()
        torch.testing.assert_close(tuned.model(**batch).logits, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_condition_that_is_none_is_refused(wrong):
    tuned, batch = make()
    with pytest.raises(burnish.RecipeError, match=f"conditions 0 to 2, not {wrong}"):
        tuned.recipe.named("film").lifecycle(tuned, wrong, "no")
    with pytest.raises(burnish.RecipeError, match=f"film reads 'condition'.*0 to 2, not {wrong}"):
        tuned.model(**batch, condition=wrong)


def test_what_cannot_act_is_refused():
    for wrong in ("conditions=0", "embedding=0"):
        with pytest.raises(burnish.RecipeError, match="^film"):
            make(f"film({wrong})")
    make("film(conditions=1, embedding=1)", model="vit")
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(burnish.RecipeError, match="film tells .* apart.*before samples"):
        burnish.tune(nn.Sequential(nn.Linear(8, 16), stack), "film")


def test_the_settled_part_is_this_recipes():
    tuned, _ = make()
    (other,) = burnish.parse("film(conditions=2)")
    with pytest.raises(burnish.RecipeError, match="no part of the recipe that trains"):
        other.lifecycle(tuned, 1, "no")
    assert list(tuned.adapters) == ["default"]


def test_a_single_layer_is_a_model():
    net = nn.LayerNorm(4).double()
    tuned = stir(burnish.tune(net, "film(embedding=3)", head=False), size=0.3)
    net.double()
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        want = net(x, condition=0)
        tuned.recipe.named("film").lifecycle(tuned, 0, "one")
        net.double()
        torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-7)
