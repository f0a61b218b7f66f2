"""MaPLe: rows in both towers, written out in float64 with stock CLIP."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.state.prompts import Tokens
from burnish.core.needs import towers
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

TABLE = "text_model.embeddings.token_embedding"
TEXT, VISION = "text_model.encoder.layers.{}", "vision_model.encoder.layers.{}"
CLIP_B16 = {
    "text_config": {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
    "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                      "image_size": 224, "patch_size": 16}}


def stands(base, texts, pictures, blocks=2):
    """texts[i] after the first token of block i, pictures[i] behind the patches; the last are
    carried, and nothing of them comes out."""
    n = len(texts[0])

    def place(x, P):
        return torch.cat([x[:, :1], P.expand(len(x), -1, -1), x[:, 1 + n:]], 1)

    base.get_submodule(TABLE).register_forward_hook(lambda m, args, e: place(e, texts[0]))
    for i in range(blocks):
        if 0 < i < len(texts):
            base.get_submodule(TEXT.format(i)).register_forward_pre_hook(
                lambda m, args, P=texts[i]: (place(args[0], P), *args[1:]))
        if i < len(pictures):
            base.get_submodule(VISION.format(i)).register_forward_pre_hook(
                lambda m, args, P=pictures[i], i=i: (
                    torch.cat([args[0][:, :-n] if i else args[0],
                               P.expand(len(args[0]), -1, -1)], 1), *args[1:]))
    base.get_submodule(VISION.format(blocks - 1)).register_forward_hook(
        lambda m, args, out: out[:, :-n] if isinstance(out, torch.Tensor) else
        (out[0][:, :-n], *out[1:]))


def agree(one):
    want, got = (m(**one.batch).logits_per_image for m in (one.base, one.tuned.model))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    mine = torch.autograd.grad(one.score(got), list(one.own.values()))
    ref = torch.autograd.grad(one.score(want), list(one.theta.values()))
    for k, a, r in zip(one.own, mine, ref, strict=True):
        assert r.any(), k
        torch.testing.assert_close(a, r, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("coupled", [True, False])
def test_the_equation_written_out(beside, layers, coupled):
    one = beside("clip", f"maple(length=3, layers={layers}, coupled={coupled})")
    paths = [TABLE, TEXT.format(1)][:layers]
    texts = [one.theta[p, "rows"] for p in paths]
    pictures = []
    for i in range(layers):
        at = VISION.format(i)
        pictures.append(texts[i] @ one.theta[at, "maker.linear.weight"].t()
                        + one.theta[at, "maker.linear.bias"] if coupled else one.theta[at, "rows"])
    one.batch["input_ids"][:, -1] = 63                         # where a text ends
    stands(one.base, texts, pictures)
    agree(one)


def test_rows_made_beforehand_are_those_made_in_a_run(tmp_path):
    """A file holds the rows of both sides; a checkpoint what makes them."""
    net, batch = tiny("clip")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "maple(length=3, layers=2)", head=False)
    stir(tuned, size=0.5)
    net.eval()
    want = net(**batch).logits_per_image
    tuned.save(tmp_path / "file")
    tuned.save(tmp_path / "whole", whole=True)
    again = burnish.load(copy.deepcopy(base), tmp_path / "file")
    assert "coupled=False" in str(again.recipe)
    assert all(n.endswith("rows") for n, _ in again.named_parameters())
    torch.testing.assert_close(again.model.eval()(**batch).logits_per_image, want)
    whole = burnish.load(copy.deepcopy(base), tmp_path / "whole")
    assert sum(n.endswith("linear.weight") for n, _ in whole.named_parameters()) == 2
    assert torch.equal(whole.model.eval()(**batch).logits_per_image, want)


def test_the_end_of_a_text_stays_where_it_was():
    """Placeholders are overwritten and texts keep their length: the same end is read."""
    net, batch = tiny("clip")
    ids = batch["input_ids"]
    ids[:, 1:4], ids[:, -1] = 3, 63
    seen = []
    net.text_model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state))
    tuned = burnish.tune(net, "maple(length=3, layers=2)", head=False)
    stir(tuned)
    out = net.eval()(**batch)
    assert seen[0].shape[1] == ids.shape[1]
    pooled = net.text_projection(seen[0][:, -1])
    torch.testing.assert_close(out.text_embeds, pooled / pooled.norm(dim=-1, keepdim=True))
    other = ids.clone()
    other[:, 1:4] = 5
    assert torch.equal(net(other, batch["pixel_values"]).logits_per_image, out.logits_per_image)


def test_pictures_leave_their_tower_without_the_rows():
    net, batch = tiny("clip")
    plain = copy.deepcopy(net)(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"],
                               output_hidden_states=True).vision_model_output
    burnish.tune(net, "maple(length=3, layers=1)", head=False)
    out = net(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"],
              output_hidden_states=True).vision_model_output
    assert out.last_hidden_state.shape == plain.last_hidden_state.shape
    assert [s.shape for s in out.hidden_states] == [s.shape for s in plain.hidden_states]


def test_checkpointing_changes_no_gradient():
    """A block that runs again makes its rows again, of those that the text tower holds."""
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("clip")
        tuned = burnish.tune(net, "maple(length=3, layers=2)" + extra, head=False)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_start():
    tuned = burnish.tune(tiny("clip")[0], "maple(length=40, layers=2, coupled=False)", head=False)
    for p in tuned.parameters():
        assert float(p.detach().std()) == pytest.approx(0.02, rel=0.1)
    net = tiny("clip")[0]
    table = net.get_submodule(TABLE).weight.detach()
    tuned = burnish.tune(net, "maple(length=3, layers=2, ids=[9, 8])", head=False)
    rows = {n.partition(".burnish")[0]: p for n, p in tuned.named_parameters()
            if n.endswith("rows")}
    assert torch.equal(rows[TABLE], table[[9, 8, 9]])
    assert float(rows[TEXT.format(1)].detach().abs().max()) < 0.1


def test_the_count_of_the_paper(published):
    """3,555,072 on CLIP ViT-B/16: two rows in nine blocks."""
    clip, _ = published("CLIPConfig", "CLIPModel", **CLIP_B16)
    two = towers(clip)
    assert len(two.text) == len(two.vision) == 12
    d, out = clip.model.get_submodule(two.table).embedding_dim, two.vision[0].hidden_size
    m = parse("maple")[0]
    assert (m.length, m.layers, m.ids, m.coupled) == (2, 9, None, True)
    assert m.count(d, out) == 3_555_072
    for recipe in ("maple(length=3, layers=2)", "maple(length=3, layers=1, coupled=False)"):
        tuned = burnish.tune(tiny("clip")[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32, 32)
    assert parse("maple")[0].repeats() is None


def test_tokens_behind_all_others():
    class State:
        off, rows, active = False, None, (("a", 1.0),)

    def made(rows, enter, leave):
        return Tokens(State(), "a", 2, rows, after=None, enter=enter, leave=leave)

    x, P = torch.randn(3, 4, 5), torch.randn(2, 5)
    block = torch.nn.Identity()
    inside = made(P, True, False)(block, lambda x: x, x)
    assert torch.equal(inside, torch.cat([x, P.expand(3, -1, -1)], 1))
    again = made(-P, False, False)(block, lambda x: x, inside)
    assert torch.equal(again, torch.cat([x, -P.expand(3, -1, -1)], 1))
    assert torch.equal(made(None, False, True)(block, lambda x: x, again), x)


@pytest.mark.parametrize("model, recipe, why", [
    ("clip", "maple(length=0)", "at least one row"), ("clip", "maple(layers=0)", "one block"),
    ("clip", "maple(targets='q')", "no targets"), ("clip", "maple(layers=3)", "at most 2"),
    ("clip", "maple(layers=1, ids=[64])", "ids from 0 to 63"), ("vit", "maple", "two towers"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
