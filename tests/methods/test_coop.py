"""CoOp and CoCoOp: a context before the names of classes, in float64 with stock CLIP."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.placed import PerImage, Placed
from burnish.core.needs import towers
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

TABLE = "text_model.embeddings.token_embedding"
CLIP_B16 = {
    "text_config": {"vocab_size": 49408, "hidden_size": 512, "num_hidden_layers": 2,
                    "num_attention_heads": 8, "intermediate_size": 2048, "projection_dim": 512,
                    "max_position_embeddings": 77},
    "vision_config": {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12,
                      "intermediate_size": 3072, "image_size": 224, "patch_size": 16,
                      "projection_dim": 512},
    "projection_dim": 512}


def logits_of(base, batch, rows):
    """s cos(f(x_i), g(t_c)) by stock CLIP, text by text: rows(i, c) behind the first token."""
    images = F.normalize(base.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    out = []
    for i, x in enumerate(images):
        for c, ids in enumerate(batch["input_ids"]):
            v = rows(i, c, x)
            handle = base.get_submodule(TABLE).register_forward_hook(
                lambda m, args, e, v=v: torch.cat([e[:, :1], v[None], e[:, 1 + len(v):]], 1))
            t = F.normalize(base.get_text_features(ids[None]).pooler_output, dim=-1)[0]
            handle.remove()
            out.append(base.logit_scale.exp() * (x @ t))
    return torch.stack(out).view(len(images), -1)


def three(one):
    """Three classes for two images; what is asked is a score of logits per image."""
    third = one.batch["input_ids"][:1].clone()
    third[:, -3:-1] = torch.tensor([5, 9])
    one.batch["input_ids"] = torch.cat([one.batch["input_ids"], third])
    one.batch.pop("return_loss", None)
    return one


def agree(one, want):
    got = one.tuned.model(**one.batch)
    torch.testing.assert_close(got.logits_per_image, want, rtol=1e-9, atol=1e-10)
    assert torch.equal(got.logits_per_text, got.logits_per_image.t())
    mine = torch.autograd.grad(one.score(got.logits_per_image), list(one.own.values()))
    ref = torch.autograd.grad(one.score(want), list(one.theta.values()))
    for k, a, r in zip(one.own, mine, ref, strict=True):
        assert r.any(), k
        torch.testing.assert_close(a, r, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("hidden", [0, 4])
def test_the_equation_written_out(beside, classes, hidden):
    one = three(beside("clip", f"coop(length=3, classes={classes}, hidden={hidden})"))
    (_, v), = one.at("rows")
    assert v.shape == ((3, 3, 32) if classes else (3, 32))
    A, a, B, b = (dict(one.at(f"meta.{n}")).get(TABLE) for n in
                  ("down.weight", "down.bias", "up.weight", "up.bias"))

    def rows(i, c, x):
        made = v[c] if classes else v
        return made + (B @ torch.relu(A @ x + a) + b if hidden else 0)

    agree(one, logits_of(one.base, one.batch, rows))


@pytest.mark.parametrize("hidden", [0, 4])
def test_the_contrastive_loss_is_of_what_each_image_reads(hidden):
    net, batch = tiny("clip")
    tuned = burnish.tune(net, f"coop(length=3, hidden={hidden})", head=False)
    stir(tuned, size=0.5)
    out = net.eval()(**batch)
    right = torch.arange(2)
    want = (F.cross_entropy(out.logits_per_image, right)
            + F.cross_entropy(out.logits_per_image.t(), right)) / 2
    torch.testing.assert_close(out.loss, want)


def test_the_context_of_a_hand_made_prompt_is_that_prompt():
    """Step 0 with the embeddings of its ids, whatever the placeholders; of CoCoOp not."""
    net, batch = tiny("clip")
    base, ids = copy.deepcopy(net).eval(), batch["input_ids"]
    ids[:, 1:5], ids[:, -1] = 3, 63                     # placeholders, and the end of a text
    hand = ids.clone()
    hand[:, 1:5] = torch.tensor([9, 8, 7, 9])
    want = base(hand, batch["pixel_values"]).logits_per_image
    burnish.tune(net, "coop(length=4, ids=[9, 8, 7])", head=False)
    assert torch.equal(net.eval()(ids, batch["pixel_values"]).logits_per_image, want)
    follows = burnish.tune(tiny("clip")[0], "coop(length=4, ids=[9, 8, 7], hidden=4)").model
    got = follows.eval()(ids, batch["pixel_values"]).logits_per_image
    assert not torch.allclose(got, want, atol=1e-4)


def test_image_features_made_once_give_the_same_gradients():
    net, batch = tiny("clip", dtype=torch.float64)
    tuned = burnish.tune(net, "coop(length=3)", head=False)
    stir(tuned, size=0.5)
    net.eval()
    (v,) = tuned.parameters()
    with torch.no_grad():
        images = F.normalize(net.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    texts = F.normalize(net.get_text_features(batch["input_ids"]).pooler_output, dim=-1)
    cached = net.logit_scale.exp() * images @ texts.t()
    whole = net(**batch).logits_per_image
    torch.testing.assert_close(cached, whole)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), v)[0]
                                 for y in (cached, whole)))


def test_nothing_of_the_images_waits_for_backward(kept):
    waits = []
    for size in (16, 32):
        net, batch = tiny("clip", vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": size, "patch_size": 4, "projection_dim": 16})
        waits.append(kept(burnish.tune(net, "coop(length=3)", head=False), batch))
    assert waits[0] == waits[1]


def test_the_start():
    torch.manual_seed(0)
    tuned = burnish.tune(tiny("clip")[0], "coop(length=8, classes=40)", head=False)
    (v,) = tuned.parameters()
    assert v.shape == (40, 8, 32) and float(v.detach().std()) == pytest.approx(0.02, rel=0.03)
    rows = burnish.tune(tiny("clip")[0], "coop(length=2, classes=3, ids=[5, 6])", head=False)
    (v,) = rows.parameters()
    table = tiny("clip")[0].get_submodule(TABLE).weight
    assert torch.equal(v, table[[5, 6]].expand(3, -1, -1))


def test_the_counts_of_the_papers(published):
    """8,192 numbers of sixteen rows, 35,360 of CoCoOp with four, on CLIP ViT-B/16."""
    clip, _ = published("CLIPConfig", "CLIPModel", **CLIP_B16)
    two = towers(clip)
    d, p = clip.model.get_submodule(two.table).embedding_dim, two.joint
    assert (two.table, two.image, d, p) == (TABLE, "visual_projection", 512, 512)
    m, c = parse("coop")[0], parse("cocoop")[0]
    assert (m.length, m.ids, m.classes, m.hidden) == (16, None, 0, 0)
    assert (c.name, c.length, c.hidden) == ("coop", 4, 32)
    assert (m.count(d, p), c.count(d, p)) == (8_192, 35_360)
    for recipe in ("coop(length=3, classes=2)", "coop(length=3, hidden=4)"):
        tuned = burnish.tune(tiny("clip")[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32, 16)


def test_one_row_of_one_class_and_the_first_token():
    table = tiny("clip")[0].get_submodule(TABLE).weight
    (v,) = burnish.tune(tiny("clip")[0], "coop(length=1, classes=1, ids=[0])",
                        head=False).parameters()
    assert v.shape == (1, 1, 32) and torch.equal(v[0], table[[0]])
    (v,) = burnish.tune(tiny("clip")[0], "coop(length=2, ids=[0, 63])", head=False).parameters()
    assert torch.equal(v, table[[0, 63]])


def test_what_a_run_refuses():
    net, batch = tiny("clip")
    burnish.tune(net, "coop(length=15)")
    burnish.tune(tiny("clip")[0], "coop(length=14)")
    with pytest.raises(burnish.RecipeError, match="as many placeholders before the name"):
        net(batch["input_ids"][:, :16], batch["pixel_values"])
    net, batch = tiny("clip")
    burnish.tune(net, "coop(length=3, classes=5)")
    with pytest.raises(burnish.RecipeError, match="5 classes have rows of their own"):
        net(**batch)
    net, batch = tiny("clip")
    burnish.tune(net, "coop(length=3, hidden=4)")
    with pytest.raises(burnish.RecipeError, match="need both"):
        net(pixel_values=batch["pixel_values"])
    with pytest.raises(burnish.RecipeError, match="none has been seen"):
        net.get_text_features(batch["input_ids"])


@pytest.mark.parametrize("recipe", ["coop(length=3)", "coop(length=3, hidden=4)",
                                    "coop(length=3, classes=2)", "maple(length=3, layers=2)",
                                    "mvlpt(length=3)", "mvlpt(length=3, where='text')"])
def test_rows_stand_on_no_padding(recipe):
    """Never where padding on the left has put what is masked."""
    net, batch = tiny("clip")
    burnish.tune(net, recipe, head=False)
    net.eval()
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    with torch.no_grad():
        net(**batch, attention_mask=mask)
        mask[1, :2] = 0
        with pytest.raises(burnish.RecipeError, match="attention_mask is 0 there: pad texts on"):
            net(**batch, attention_mask=mask)


@pytest.mark.parametrize("model, recipe, why", [
    ("clip", "coop(length=0)", "at least one row"), ("clip", "coop(hidden=-1)", "a width of 0"),
    ("clip", "coop(targets='q')", "no targets"), ("clip", "coop(ids=[])", "ids from 0 to 63"),
    ("clip", "coop(ids=[64])", "ids from 0 to 63"), ("vit", "coop", "two towers"),
    ("llama", "coop", "two towers"), ("whisper", "coop", "two towers"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_where_it_stands():
    net, _ = tiny("clip")
    burnish.tune(net, "cocoop")
    at = {type(m): n.partition(".burnish")[0] for n, m in net.named_modules()
          if isinstance(m, Placed | PerImage)}
    assert at[Placed] == TABLE and at[PerImage].startswith("burnish")


def test_a_class_whose_name_stands_where_the_rows_are_is_refused():
    """Its name was overwritten in silence: a text without placeholders lost what it said."""
    net, batch = tiny("clip")
    burnish.tune(net, "coop(length=3)", head=False)
    ids = batch["input_ids"].clone()
    ids[1, 3] = (ids[0, 3] + 1) % 60
    with pytest.raises(burnish.RecipeError, match="not the same in all texts.*3 placeholders"):
        net(input_ids=ids, pixel_values=batch["pixel_values"])
    ids[1, 3] = ids[0, 3]
    ids[1, 4] = (ids[0, 4] + 1) % 60                         # the first of its own words
    net(input_ids=ids, pixel_values=batch["pixel_values"])


def test_tokens_that_start_no_row_are_refused():
    for recipe in ("coop(length=2, ids=(3, 4, 5))", "maple(length=2, layers=1, ids=(3, 4, 5))",
                   "prefix(length=2, ids=(3, 4, 5), init='activations')"):
        with pytest.raises(burnish.RecipeError, match="3 tokens are more than the 2 rows"):
            burnish.tune(tiny("llama" if "prefix" in recipe else "clip")[0], recipe)
