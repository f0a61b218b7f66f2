"""MMRL and MMRL++: rows of one space in the last blocks of two towers, in float64 with stock CLIP.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.generators import Aligned, Space
from burnish.blocks.state.prompts import grown
from burnish.blocks.state.readings import Readings, Second, gap
from burnish.core.needs import towers
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

TEXT, VISION = "text_model.encoder.layers.{}", "vision_model.encoder.layers.{}"
WIDE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "image_size": 16, "patch_size": 4, "projection_dim": 16}
CLIP_B16 = {
    "text_config": {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
    "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                      "image_size": 224, "patch_size": 16}, "projection_dim": 512}


def stand(base, at, rows, beta):
    """rows[j] behind the first token of the last blocks: new in the first of them, then
    beta row + (1 - beta) what is there. What they are at the end is in the list that is returned;
    nothing of them is in what the tower reads."""
    n, seen, first = len(rows[0]), [], 2 - len(rows)

    def put(x, P, new):
        P = P.expand(len(x), -1, -1)
        there = x[:, 1:1] if new else x[:, 1:1 + n]
        return torch.cat([x[:, :1], P if new else beta * P + (1 - beta) * there,
                          x[:, 1 + there.shape[1]:]], 1)

    for j, P in enumerate(rows):
        base.get_submodule(at.format(first + j)).register_forward_pre_hook(
            lambda m, args, P=P, j=j: (put(args[0], P, not j), *args[1:]))

    def leave(m, args, x):
        seen.append(x[:, 1:1 + n])
        return torch.cat([x[:, :1], x[:, 1 + n:]], 1)

    base.get_submodule(at.format(1)).register_forward_hook(leave)
    return seen


def rows_of(one, layers, rank, coupled):
    """(text rows, picture rows) by block."""
    t = {(p, n.removeprefix("maker.")): v for (p, n), v in one.theta.items()}
    out = []
    for side, at in enumerate((TEXT, VISION)):
        mine = []
        for j in range(2 - layers, 2):
            p = at.format(j)
            if not coupled:
                mine.append(t[p, "rows"])
                continue
            owner = TEXT.format(2 - layers)
            R = t[owner, "space.rows"]
            if rank:
                W = t[owner, f"space.shared.{side}"] + t[p, "A"] @ t[p, "B"]
                mine.append(R @ W.t() + t[p, "bias"])
            else:
                mine.append(R @ t[p, "linear.weight"].t() + t[p, "linear.bias"])
        out.append(mine)
    return out


def readings(one, layers, rank, q, beta, coupled=True):
    """(f_c, f_r, t, s): by stock CLIP."""
    text, pictures = rows_of(one, layers, rank, coupled)
    base = one.base
    stand(base, TEXT, text, beta)
    seen = stand(base, VISION, pictures, beta)
    at = {n.removeprefix("mmrl_second."): p for (path, n), p in one.theta.items()
          if path == "visual_projection"}
    P_v = base.visual_projection.weight
    P_r = P_v + ((at["A"] @ at["B"]).t() if q else at["weight"])
    f_c = base.get_image_features(one.batch["pixel_values"]).pooler_output
    (slots,) = seen
    f_r = base.vision_model.post_layernorm(slots).mean(1) @ P_r.t()
    t = base.get_text_features(one.batch["input_ids"]).pooler_output
    return *(F.normalize(x, dim=-1) for x in (f_c, f_r, t)), base.logit_scale.exp()


@pytest.mark.parametrize("layers, rank, q, beta, coupled", [
    (2, 0, 0, 1.0, True), (1, 0, 3, 1.0, True), (2, 3, 2, 0.6, True), (2, 0, 0, 0.3, False)])
def test_the_equation_written_out(beside, layers, rank, q, beta, coupled):
    space = f"code=8, rank={rank}, " * coupled
    one = beside("clip", f"mmrl(length=3, layers={layers}, {space}proj_rank={q}, beta={beta}, "
                 f"alpha=0.6, coupled={coupled})", vision_config=WIDE)
    f_c, f_r, t, s = readings(one, layers, rank, q, beta, coupled)
    want = 0.6 * s * f_c @ t.t() + 0.4 * s * f_r @ t.t()
    out = one.tuned.model(**one.batch)
    torch.testing.assert_close(out.logits_per_image, want, rtol=1e-9, atol=1e-10)
    assert torch.equal(out.logits_per_text, out.logits_per_image.t())
    right = torch.arange(2)
    torch.testing.assert_close(out.loss, (F.cross_entropy(want, right)
                                          + F.cross_entropy(want.t(), right)) / 2)
    mine = torch.autograd.grad(one.score(out.logits_per_image), list(one.own.values()))
    ref = torch.autograd.grad(one.score(want), list(one.theta.values()))
    for k, a, r in zip(one.own, mine, ref, strict=True):
        assert r.any(), k
        torch.testing.assert_close(a, r, rtol=1e-7, atol=1e-9, msg=str(k))


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_what_is_minimised(beside, weight, contrastive):
    """a H(z_c) + (1 - a) H(z_r) + weight (1 - cos) + weight (1 - cos), and its gradients."""
    one = beside("clip", "mmrl(length=3, layers=2, code=8, rank=2, proj_rank=2, alpha=0.6, "
                 f"weight={weight})")
    plain = copy.deepcopy(one.base)
    one.tuned.optimizer(lr=0.0)
    ids = one.batch["input_ids"]
    other = ids[:1].clone()
    other[:, 4:6] = torch.tensor([5, 9])
    if not contrastive:
        one.batch["input_ids"] = torch.cat([ids, other])
        one.batch.pop("return_loss")
    f_c, f_r, t, s = readings(one, 2, 2, 2, 1.0)
    label = torch.arange(2) if contrastive else torch.tensor([2, 0])

    def H(z):
        return (F.cross_entropy(z, label) + F.cross_entropy(z.t(), label)) / 2 if contrastive \
            else F.cross_entropy(z, label)

    f0 = F.normalize(plain.get_image_features(one.batch["pixel_values"]).pooler_output, dim=-1)
    t0 = F.normalize(plain.get_text_features(one.batch["input_ids"]).pooler_output, dim=-1)
    want = 0.6 * H(s * f_c @ t.t()) + 0.4 * H(s * f_r @ t.t()) \
        + weight * (1 - (f_c * f0).sum(-1).mean()) + weight * (1 - (t * t0).sum(-1).mean())
    grads = torch.autograd.grad(want, list(one.theta.values()))
    loss = None if contrastive else lambda out, b: F.cross_entropy(out.logits_per_image, label)
    one.tuned.loss(one.batch, loss).backward()
    for (k, p), r in zip(one.own.items(), grads, strict=True):
        torch.testing.assert_close(p.grad, r, rtol=1e-7, atol=1e-9, msg=str(k))


def test_the_gap_follows_no_label():
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    a = torch.tensor([[0.2], [1.0], [0.5], [0.0], [0.9]], dtype=torch.float64)
    for label in (torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 3, 3, 1, 1])):
        def H(z, label=label):
            return F.cross_entropy(z, label, reduction="none")

        want = (a[:, 0] * H(one) + (1 - a[:, 0]) * H(other)).mean()
        torch.testing.assert_close(H(a * one + (1 - a) * other).mean() + gap(one, other, a), want)
    assert float(gap(one, other, 0.4)) > 0 and abs(float(gap(one, one, 0.4))) < 1e-12
    assert abs(float(gap(one, other, a[1:2]))) < 1e-12


def test_classes_that_training_has_not_seen_are_read_by_the_class_token():
    """Image by image, or for all of a stretch; whoever asks for features alone gets that one."""
    net, batch = tiny("clip")
    tuned = burnish.tune(net, "mmrl(length=3, layers=2, code=8)", head=False)
    stir(tuned, size=0.5)
    net.eval()
    batch.pop("return_loss")
    known = net(**batch)
    z_c = net.logit_scale.exp() * known.image_embeds @ known.text_embeds.t()
    got = net(**batch, unseen=torch.tensor([0, 1])).logits_per_image
    assert torch.equal(got[0], known.logits_per_image[0])
    torch.testing.assert_close(got[1], z_c[1])
    assert not torch.allclose(z_c, known.logits_per_image, atol=1e-3)
    with tuned.given(unseen=1):
        torch.testing.assert_close(net(**batch).logits_per_image, z_c)
    torch.testing.assert_close(
        F.normalize(net.get_image_features(batch["pixel_values"]).pooler_output, dim=-1),
        known.image_embeds)
    with pytest.raises(burnish.RecipeError, match="'unseen' says of single images"):
        net(**batch, return_loss=True, unseen=1)
    with pytest.raises(burnish.RecipeError, match="whole numbers from 0 to 1"):
        net(**batch, unseen=torch.tensor([0, 2]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_text_is_the_text_alone(attention):
    """The mask grows with the rows: causal, over rows and padding."""
    net, batch = tiny("clip", dtype=torch.float64)
    net.set_attn_implementation(attention)
    tuned = burnish.tune(net, "mmrl(length=3, layers=1, code=8)", head=False)
    stir(tuned, size=0.5)
    net.eval()
    for p in tuned.parameters():
        p.data = p.data.double()
    ids = batch["input_ids"]
    ids[0, 5:], ids[0, 5] = 0, 63
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    whole = net.get_text_features(ids, attention_mask=mask).pooler_output
    alone = net.get_text_features(ids[:1, :6]).pooler_output
    torch.testing.assert_close(whole[:1], alone)
    torch.testing.assert_close(net.get_text_features(ids).pooler_output, whole)


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bool_", [True, False])
def test_a_mask_grows(after, causal, bool_):
    """Written out, for a text of four tokens the last of which is padding, and two rows."""
    T, L = 4, 2
    real = [0, 1, 2]
    small = torch.tensor([[j in real and (j <= i or not causal) for j in range(T)]
                          for i in range(T)])
    place = [*range(after), *range(after, after + L), *range(after + L, T + L)]
    origin = [i if i < after else None if i < after + L else i - L for i in place]
    want = torch.tensor([[origin[j] != 3 and (j <= i or not causal) for j in place] for i in place])

    def form(m):
        m = m[None, None]
        return m if bool_ else torch.zeros(m.shape).masked_fill(~m, -torch.inf)

    assert torch.equal(grown(form(small), after, L), form(want))
    flat = torch.tensor([[1, 1, 1, 0]])
    assert torch.equal(grown(flat, after, L), torch.tensor([[1, 1, 1, 1, 1, 0]]))
    row = small[None, None, 3:4]
    assert torch.equal(grown(row, after, L)[0, 0, 0], torch.tensor([o != 3 for o in origin]))


def test_beta_one_is_mmrl_and_b_zero_is_the_projection(beside):
    """Slots are overwritten; where B (or the copy's difference) is zero f_r is P_v of their mean.
    """
    text = "mmrl(length=3, layers=2, code=8, rank=2, proj_rank=2, beta={})"
    one = beside("clip", text.format(1.0))
    got = one.tuned.model(**one.batch).logits_per_image
    for beta, same in ((1.0, True), (0.9, False)):
        other = beside("clip", text.format(beta))
        assert torch.equal(other.tuned.model(**other.batch).logits_per_image, got) is same
    for q in (0, 4):
        second = Second(None, "a", 32, 16, q)
        assert not second.apart().any() and second.apart().shape == (16, 32)
        assert not second.finished()["weight"].any()
    fresh = burnish.tune(tiny("clip")[0], "mmrl(length=3, layers=2, code=8, rank=2)", head=False)
    assert not any(p.any() for n, p in fresh.named_parameters() if n.endswith((".B", "d.weight")))


def test_what_a_file_holds(tmp_path):
    net, batch = tiny("clip")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "mmrl(length=3, layers=2, code=8, rank=2, proj_rank=3, beta=0.8)",
                         head=False)
    stir(tuned, size=0.5)
    net.eval()
    want = net(**batch).logits_per_image
    tuned.save(tmp_path / "file")
    again = burnish.load(base, tmp_path / "file")
    names = [n for n, _ in again.named_parameters()]
    assert "coupled=False" in str(again.recipe) and len(names) == 5
    assert all(n.endswith(("rows", "weight")) for n in names)
    torch.testing.assert_close(again.model.eval()(**batch).logits_per_image, want)


def deep(blocks, meta=False):
    text = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
            "max_position_embeddings": 16, "projection_dim": 16, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": blocks}
    return tiny("clip", text_config=text, vision_config=WIDE | {"num_hidden_layers": blocks},
                meta=meta, batch=8)


def test_nothing_waits_for_backward_below_the_first_rows(kept):
    """However many blocks lie below, as many bytes wait; each block of rows costs its own. Promised
    and in truth."""
    recipe = "mmrl(length=3, layers={}, code=8, weight=0.0)"

    def waits(blocks, layers):
        net, batch = deep(blocks)
        return kept(burnish.tune(net, recipe.format(layers), head=False), batch)

    two = waits(2, 2)
    assert waits(4, 2) == waits(6, 2) == two
    more, yet = waits(6, 4) - two, waits(6, 6) - two
    assert yet == 2 * more and more > 0.6 * two

    def promise(layers):
        net, batch = deep(6)
        return burnish.simulate(net, recipe.format(layers), batch)

    some, whole = promise(2), promise(6)
    own = 4 * 4 * (9 * (32 + 48)) * 4            # weights, gradients and moments of four blocks
    assert whole.peak_bytes - some.peak_bytes >= yet and \
        whole.peak_bytes - some.peak_bytes <= yet + 2 * own
    assert some.peak_bytes < promise(4).peak_bytes < whole.peak_bytes


def test_checkpointing_changes_no_gradient():
    """The slots outlive a block that runs again: they leave behind it."""
    grads = []
    for extra in ("", " + checkpoint"):
        net, batch = tiny("clip")
        tuned = burnish.tune(net, "mmrl(length=3, layers=2, code=8, rank=2)" + extra, head=False)
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(g is not None for g in grads[0])


def test_the_start():
    torch.manual_seed(0)
    space = Space(50, 64, (30, 40), 4)
    assert float(space.rows.detach().std()) == pytest.approx(0.02, rel=0.05)
    one, two = (Aligned(space, side, out, 4, False) for side, out in enumerate((30, 40)))
    assert (one.A.shape, one.B.shape, two.bias.shape) == ((30, 4), (4, 64), (40,))
    assert 0.45 < float(one.A.detach().abs().max()) <= 0.5          # of fan-in 4, a = sqrt 5
    assert float(space.shared[1].detach().abs().max()) <= 1 / 8 and len(two.borrowed) == 3
    assert torch.equal(two(), F.linear(space.rows, space.shared[1], two.bias))
    second = Second(None, "a", 100, 50, 16)
    assert 0.24 < float(second.A.detach().abs().max()) <= 0.25


def test_the_counts_of_the_papers(published):
    """4,992,256 and 813,312 on CLIP ViT-B/16: five rows in blocks 6 to 12."""
    clip, _ = published("CLIPConfig", "CLIPModel", **CLIP_B16)
    two = towers(clip)
    assert len(two.text) == len(two.vision) == 12 and two.scale == "logit_scale"
    d, out = clip.model.get_submodule(two.table).embedding_dim, two.vision[0].hidden_size
    m, pp = parse("mmrl")[0], parse("mmrl_pp")[0]
    assert (m.length, m.code, m.layers, m.rank, m.proj_rank) == (5, 512, 7, 0, 0)
    assert (m.alpha, m.beta, m.weight, m.coupled) == (0.7, 1.0, 1.0, True)
    assert (pp.name, pp.rank, pp.proj_rank, pp.beta) == ("mmrl", 4, 64, 0.9)
    assert m.count(d, out, two.joint) == 4_992_256
    assert pp.count(d, out, two.joint) == 813_312
    for recipe in ("mmrl(length=3, layers=2, code=8)", "mmrl(layers=1, code=8, rank=2)",
                   "mmrl(layers=2, coupled=False, proj_rank=3)"):
        tuned = burnish.tune(tiny("clip", vision_config=WIDE)[0], recipe, head=False)
        assert sum(p.numel() for p in tuned.parameters()) == parse(recipe)[0].count(32, 48, 16)
    assert m.repeats() is None


def test_states_of_blocks_are_as_many_as_they_were():
    """What a model says of its blocks is of its own tokens."""
    net, batch = tiny("clip", vision_config=WIDE, dtype=torch.float64)
    tuned = burnish.tune(net, "mmrl(length=3, layers=2, code=8)", head=False)
    stir(tuned, size=0.5)
    net.eval()
    for p in tuned.parameters():
        p.data = p.data.double()
    said = {n: batch[n] for n in ("input_ids", "pixel_values")}
    out = net(**said, output_hidden_states=True)
    text, pictures = out.text_model_output, out.vision_model_output
    torch.testing.assert_close(net.text_model.final_layer_norm(text.hidden_states[-1]),
                               text.last_hidden_state)
    torch.testing.assert_close(pictures.hidden_states[-1], pictures.last_hidden_state)
    for states, tokens in ((text.hidden_states, said["input_ids"].shape[1]), (
            pictures.hidden_states, 1 + (16 // 4) ** 2)):
        assert [s.shape[1] for s in states] == [tokens] * 3
    seen = []                                        # what the second block reads, less the rows
    hook = net.text_model.encoder.layers[1].register_forward_pre_hook(
        lambda m, args: seen.append(args[0]))
    net(**said)
    hook.remove()
    reads = torch.cat([seen[0][:, :1], seen[0][:, -said["input_ids"].shape[1] + 1:]], 1)
    torch.testing.assert_close(text.hidden_states[1], reads)


def test_rows_of_no_space_begin_small_and_the_space_stands_once():
    net, _ = tiny("clip", vision_config=WIDE)
    burnish.tune(net, "mmrl(length=200, layers=2, coupled=False)", head=False)
    rows = [p for n, p in net.named_parameters() if n.endswith(".rows")]
    assert len(rows) == 4 and all(0.018 < float(p.detach().std()) < 0.022 for p in rows)
    net, _ = tiny("clip", vision_config=WIDE)
    burnish.tune(net, "mmrl(length=3, layers=2, code=8)", head=False)
    every = [n for n, _ in net.named_parameters(remove_duplicate=False)]
    assert sum(n.endswith("space.rows") for n in every) == 1


@pytest.mark.parametrize("change", ["scale", "norm"])
def test_a_model_without_a_scale_or_a_last_norm_is_refused(monkeypatch, change):
    from dataclasses import replace

    from burnish.core.anatomy import Anatomy
    from burnish.methods.prompt import mmrl

    anatomy = Anatomy.of(tiny("clip")[0])
    if change == "scale":
        monkeypatch.setattr(mmrl, "towers", lambda a: replace(towers(a), scale=None))
    else:
        anatomy.final_norms.clear()
    with pytest.raises(burnish.RecipeError, match="has not both"):
        parse("mmrl(layers=1)")[0].prompt(anatomy)


def test_where_it_stands():
    net, _ = tiny("clip")
    burnish.tune(net, "mmrl(length=3, layers=1, code=8)", head=False)
    at = {n.partition(".burnish")[0] for n, m in net.named_modules() if ".burnish." in n}
    assert {TEXT.format(1), VISION.format(1), "visual_projection", "vision_model.encoder",
            "vision_model.post_layernorm"} <= at
    assert TEXT.format(0) not in at and VISION.format(0) not in at
    assert sum(isinstance(m, Readings) for m in net.modules()) == 1


@pytest.mark.parametrize("model, recipe, why", [
    ("clip", "mmrl(length=0)", "expected a row"), ("clip", "mmrl(rank=-1)", "ranks of 0"),
    ("clip", "mmrl(alpha=1.5)", "from 0 to 1"), ("clip", "mmrl(beta=-0.1)", "from 0 to 1"),
    ("clip", "mmrl(beta=1.5)", "from 0 to 1"),
    ("clip", "mmrl(weight=-1)", "weight of 0 or more"), ("clip", "mmrl(layers=3)", "at most 2"),
    ("clip", "mmrl(layers=2, coupled=False, rank=2)", "of none: leave them out"),
    ("clip", "mmrl(layers=2, coupled=False, code=8)", "of none: leave them out"),
    ("clip", "mmrl(targets='q')", "no targets"), ("vit", "mmrl", "two towers"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe)
