"""TuneVLSeg: six ways to prompt CLIPSeg, each written out in float64; towers that the model runs
without a graph; states that a decoder reads."""

from __future__ import annotations

import copy
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers

import burnish
from burnish.blocks.state.dice import dice
from burnish.core.anatomy import Anatomy
from burnish.core.needs import towers
from burnish.testing import stir
from burnish.testing.models import tiny

SIX = ("vpt", "coop", "cocoop", "maple", "shared_attention", "shared_separate")
TEXT, VISION = "clip.text_model", "clip.vision_model"


@cache
def _model():
    torch.manual_seed(0)
    body = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CLIPSegConfig(
        text_config={"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 16,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **body},
        vision_config={"hidden_size": 24, "image_size": 16, "patch_size": 4, **body},
        projection_dim=16, extract_layers=[0, 2], reduce_dim=8, decoder_num_attention_heads=2,
        decoder_intermediate_size=16)
    return transformers.CLIPSegForImageSegmentation(config).double()


def clipseg():
    net = copy.deepcopy(_model()).eval()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (3, 9), generator=g)
    ids[:, 0], ids[:, 1:4], ids[:, -1] = 1, 3, 63
    return net, {"input_ids": ids,
                 "pixel_values": torch.randn(3, 3, 16, 16, generator=g).double(),
                 "labels": (torch.rand(3, 16, 16, generator=g) > 0.6).double()}


def tuned_of(strategy, **more):
    net, batch = clipseg()
    said = "".join(f", {k}={v!r}" for k, v in more.items())
    tuned = burnish.tune(net, f"tunevlseg(strategy={strategy!r}, length=3, layers=2{said})")
    for n, p in net.named_parameters():
        if ".burnish." in n:
            p.data = p.data.double()
    return tuned, batch


def own(net):
    return {n.replace(".burnish.default.tunevlseg", ":"): p for n, p in net.named_parameters()
            if ".burnish." in n}


# -- the model written out ------------------------------------------------------------------------
def written(net, batch, text=(), pictures=(), follow=None):
    """Masks: rows of the first blocks of both towers; `follow` makes what is added to the text's
    first rows of the picture's features."""
    base = SimpleNamespace(eye=net.clip.vision_model, read=net.clip.text_model)
    x = base.eye.pre_layrnorm(base.eye.embeddings(batch["pixel_values"]))
    n, rows, states = x.shape[1], None, []
    for i, layer in enumerate(base.eye.encoder.layers):
        rows = pictures[i].expand(len(x), -1, -1) if i < len(pictures) else rows
        y = layer(x if rows is None else torch.cat([x, rows], 1), None)
        x, rows = y[:, :n], y[:, n:]
        states.append(x)
    seen = net.clip.visual_projection(base.eye.post_layernorm(x[:, 0]))
    ids = batch["input_ids"]
    h, T = base.read.embeddings.token_embedding(ids), ids.shape[1]
    mask = torch.full((T, T), -torch.inf).triu(1).double()
    for i, layer in enumerate(base.read.encoder.layers):
        if i < len(text):
            P = text[i].expand(len(h), -1, -1)
            if i == 0 and follow is not None:
                P = P + follow(seen / seen.norm(dim=-1, keepdim=True)).unsqueeze(1)
            h = torch.cat([h[:, :1], P, h[:, 1 + P.shape[1]:]], 1)
        if i == 0:
            h = h + base.read.embeddings.position_embedding.weight[:T]
        h = layer(h, mask)
    h = base.read.final_layer_norm(h)[torch.arange(len(h)), ids.argmax(1)]
    return net.decoder([states[i] for i in net.extract_layers], net.clip.text_projection(h)).logits


def made(strategy, theta):
    """(text, pictures, follow) by the equations, of what trains."""
    def at(start, end):
        return next(p for n, p in theta.items() if n.startswith(start) and n.endswith(end))
    tables = ("clip.text_model.embeddings.token_embedding", f"{TEXT}.encoder.layers.1")
    blocks = tuple(f"{VISION}.encoder.layers.{i}" for i in range(2))
    if strategy == "vpt":
        return (), [at(b, "rows") for b in blocks], None
    text = [at(t, "rows") for t in tables]
    if strategy == "coop":
        return text, (), None
    if strategy == "cocoop":
        A, a, B, b = (at(tables[0], f"meta.{n}") for n in ("down.weight", "down.bias", "up.weight",
                                                          "up.bias"))
        return text, (), lambda x: F.relu(x @ A.mT + a) @ B.mT + b
    if strategy == "maple":
        return text, [P @ at(b, "linear.weight").mT + at(b, "linear.bias")
                      for P, b in zip(text, blocks, strict=True)], None
    W = [(at(tables[0], f"leave.{s}.weight"), at(tables[0], f"leave.{s}.bias")) for s in (0, 1)]
    if strategy == "shared_attention":
        def get(n):
            return at(tables[0], f"common.{n}.weight"), at(tables[0], f"common.{n}.bias")

        def norm(x, n):
            g, h = get(n)
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True)
                                                     + 1e-5).sqrt() * g + h

        def linear(x, n):
            w, c = get(n)
            return x @ w.mT + c

        def mixed(u):
            q, k, v = linear(norm(u, "norm1"), "qkv").chunk(3, -1)
            u = u + linear((q @ k.mT / math.sqrt(u.shape[1])).softmax(-1) @ v, "proj")
            return u + linear(F.gelu(linear(norm(u, "norm2"), "fc1")), "fc2")
        text = [mixed(u) for u in text]
    sides = [[u @ w.mT + c for u in text] for w, c in W]
    return sides[0], sides[1], None


MORE = {s: {"hidden": 6} for s in ("cocoop", "shared_attention", "shared_separate")}


@pytest.mark.parametrize("strategy", SIX)
def test_the_equation_written_out(strategy):
    """Masks, loss and every gradient."""
    tuned, batch = tuned_of(strategy, **MORE.get(strategy, {}), dice=0.7)
    stir(tuned, size=0.3)
    theta = own(tuned.model)
    base, _ = clipseg()
    logits = written(base, batch, *made(strategy, theta))
    out = tuned.model(**batch)
    torch.testing.assert_close(out.logits, logits)
    y, p = batch["labels"], logits.sigmoid()
    soft = torch.stack([1 - (2 * (p[b] * y[b]).sum() + 1) / (p[b].sum() + y[b].sum() + 1)
                        for b in range(3)]).mean()
    want = F.binary_cross_entropy_with_logits(logits, y) + 0.7 * soft
    loss = tuned.loss(batch)
    torch.testing.assert_close(loss, want)
    right = torch.autograd.grad(want, list(theta.values()))
    loss.backward()
    for (n, p), w in zip(theta.items(), right, strict=True):
        assert bool(w.any()), n
        torch.testing.assert_close(p.grad, w, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("strategy", SIX)
def test_counts(strategy):
    tuned, _ = tuned_of(strategy, **MORE.get(strategy, {}))
    part = tuned.recipe.named("tunevlseg")
    n = sum(p.numel() for p in tuned.parameters())
    w, d, o, p = 6, 32, 24, 16
    want = {"vpt": 2 * 3 * o, "coop": 2 * 3 * d, "cocoop": 2 * 3 * d + w * (p + d) + w + d,
            "maple": 2 * (3 * d + d * o + o), "shared_separate": 2 * 3 * w + (w + 1) * (d + o),
            "shared_attention": 2 * 3 * w + (w + 1) * (d + o) + 12 * w * w + 13 * w}[strategy]
    assert n == want == part.count(d, o, p)


@pytest.mark.parametrize("strategy", SIX)
def test_a_decoder_receives_the_tokens_it_knows(strategy):
    tuned, batch = tuned_of(strategy)
    seen = []
    hook = tuned.model.decoder.register_forward_pre_hook(
        lambda m, args: seen.extend(s.shape[1] for s in args[0]))
    out = tuned.model(**batch)
    hook.remove()
    assert seen == [17, 17] and out.logits.shape == (3, 16, 16)
    assert all(h is None or h.shape[1] == 17 for h in out.vision_model_output.hidden_states)


def test_six_names_resolve_and_others_do_not():
    assert [burnish.parse(f"tunevlseg(strategy={s!r})")[0].strategy for s in SIX] == list(SIX)
    with pytest.raises(burnish.RecipeError, match="maple"):
        burnish.parse("tunevlseg(strategy='mapel')")


# -- a model that runs its towers without a graph -------------------------------------------------
def test_what_trains_in_a_tower_that_is_run_without_a_graph_is_reached():
    """Whatever the recipe; and where nobody asked for a graph, or nothing trains, there is none."""
    net, batch = clipseg()
    base = written(net, batch)
    torch.testing.assert_close(net(**batch).logits, base)
    tuned = burnish.tune(net, "lora(rank=2)", targets="q,v", head=False)
    stir(tuned)
    tuned.loss(batch).backward()
    grads = {n: p.grad for n, p in net.named_parameters() if ".lora." in n}
    assert any(TEXT in n for n in grads) and any(VISION in n for n in grads)
    assert all(g is not None and bool(g.any()) for g in grads.values())
    with torch.no_grad():
        assert not net(**batch).logits.requires_grad
    with tuned.disabled():
        torch.testing.assert_close(net(**batch).logits, base)
    tuned.detach()
    assert not any(isinstance(m, burnish.blocks.state.prompts.Graded) for m in net.modules())


def test_a_tower_in_which_nothing_trains_keeps_no_graph():
    tuned, batch = tuned_of("coop")
    out = tuned.model(**batch)
    assert not out.pooled_output.requires_grad and out.conditional_embeddings.requires_grad
    tuned, batch = tuned_of("vpt")
    out = tuned.model(**batch)
    assert out.pooled_output.requires_grad and not out.conditional_embeddings.requires_grad


def test_the_towers_of_a_part_of_a_model():
    net, _ = clipseg()
    a = Anatomy.of(net)
    assert towers(a) is None
    two = towers(a, within=True)
    assert [b.path for b in two.text] == [f"{TEXT}.encoder.layers.{i}" for i in range(3)]
    assert [b.path for b in two.vision] == [f"{VISION}.encoder.layers.{i}" for i in range(3)]
    assert (two.image, two.joint, two.scale, two.pixels) == \
        ("clip.visual_projection", 16, "clip.logit_scale", VISION)
    assert two.table == f"{TEXT}.embeddings.token_embedding"
    inner = towers(Anatomy.of(net.clip))
    assert inner == towers(Anatomy.of(net.clip), within=True) and inner.pixels == "vision_model"
    assert towers(Anatomy.of(tiny("vit")[0]), within=True) is None


# -- the whole ------------------------------------------------------------------------------------
def test_the_dice_loss():
    logits, y = torch.full((1, 2, 2), 20.0), torch.ones(1, 2, 2)
    assert float(dice(logits, y)) == pytest.approx(0, abs=1e-6)
    assert float(dice(-logits, y)) == pytest.approx(1 - 1 / 5, abs=1e-6)


def test_masks_are_learnt():
    tuned, batch = tuned_of("maple", decoder=True)
    tuned.optimizer(lr=3e-2)
    losses = [float(tuned.step(batch)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_last_layer_of_the_decoder_trains_if_asked():
    tuned, batch = tuned_of("vpt", decoder=True)
    extra = {n for n, _ in tuned.named_parameters() if ".burnish." not in n}
    assert extra == {"decoder.transposed_convolution.weight", "decoder.transposed_convolution.bias"}
    tuned, _ = tuned_of("vpt")
    assert all(".burnish." in n for n, _ in tuned.named_parameters())


@pytest.mark.parametrize("strategy", SIX)
def test_a_file_is_what_was_trained(strategy, tmp_path):
    tuned, batch = tuned_of(strategy, **MORE.get(strategy, {}))
    stir(tuned)
    want = tuned.model(**batch).logits
    tuned.save(tmp_path / "a")
    net, _ = clipseg()
    burnish.load(net, tmp_path / "a")
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model, text, why", [
    ("seg", "tunevlseg(layers=4)", "at most 3"), ("seg", "tunevlseg(strategy='coop', layers=4)",
                                                  "at most 3"),
    ("seg", "tunevlseg(targets='q', layers=1)", "takes no targets"),
    ("seg", "tunevlseg(length=0)", "at least 1"), ("seg", "tunevlseg(dice=-1.0)", "at least 0"),
    ("seg", "tunevlseg(hidden=5)", "does nothing"),
    ("seg", "tunevlseg(strategy='maple', hidden=5)", "does nothing"),
    ("seg", "tunevlseg(strategy='coop', coupled=False)", "prompts one side"),
    ("clip", "tunevlseg(layers=1, decoder=True)", "no transposed convolution"),
    ("clip", "tunevlseg(layers=1, dice=2.0)", "draws no masks"),
    ("vit", "tunevlseg(layers=1)", "two towers")])
def test_what_it_refuses(model, text, why):
    net = clipseg()[0] if model == "seg" else tiny(model)[0]
    with pytest.raises(burnish.RecipeError, match=why):
        burnish.tune(net, text)


def test_the_defaults():
    m = burnish.parse("tunevlseg")[0]
    assert (m.strategy, m.length, m.layers, m.hidden, m.coupled, m.dice, m.decoder) == \
        ("vpt", 4, 9, 64, True, 1.0, False)
