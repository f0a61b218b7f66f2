"""ConES: vectors in the place of a text encoder, held against stock CLIP."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.methods.lifecycle.cones import Cones
from burnish.testing.models import tiny


def texts(n=3):
    ids = tiny("clip")[1]["input_ids"][:1].repeat(n, 1)
    ids[:, 5] = torch.arange(10, 10 + n)
    return {"input_ids": ids}


def searched(dtype=None, **settings):
    net, batch = tiny("clip", dtype=dtype)
    return Cones(**settings).lifecycle(net, **texts()), net, batch["pixel_values"]


def test_the_start_is_the_model_s_own_answer():
    concepts, net, x = searched()
    want = copy.deepcopy(net).eval()(**texts(), pixel_values=x).logits_per_image
    torch.testing.assert_close(concepts.eval()(x).logits, want)
    ids = texts()["input_ids"]
    ids[0, 6:], ids[0, 6] = 0, 63
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    padded = Cones().lifecycle(net, input_ids=ids, attention_mask=mask).eval()(x).logits
    want = net.eval()(input_ids=ids, attention_mask=mask, pixel_values=x).logits_per_image
    torch.testing.assert_close(padded, want)


def test_the_text_encoder_is_not_resident():
    concepts, net, x = searched()
    want = concepts(x).logits
    gone = [weakref.ref(p) for n, p in net.named_parameters() if n.startswith("text_")]
    names = {n for n, _ in net.named_parameters()}
    own = {n.removeprefix("body.") for n, _ in concepts.named_parameters()}
    assert own == {n for n in names if not n.startswith("text_")} | {"classifier.weight"}
    assert len(gone) > 20
    del net
    gc.collect()
    assert not any(r() is not None for r in gone)
    assert torch.equal(concepts(x).logits, want)


def test_the_model_it_is_made_of_stays_as_it_was():
    concepts, net, x = searched()
    assert concepts.training and net.training and hasattr(net, "text_model")
    assert net(**texts(), pixel_values=x).logits_per_image.shape == (2, 3)
    assert concepts.body.vision_model is net.vision_model


def test_the_concepts_alone_are_searched(kept):
    """Gradients of C against the equation, none elsewhere; nothing of the pictures' tower waits."""
    concepts, net, x = searched(torch.float64)
    plain = copy.deepcopy(net).eval()
    tuned = burnish.tune(concepts, "linear_probe")
    (C,) = tuned.parameters()
    assert C.shape == (3, 16) and Cones().count(3, 16) == 48
    assert Cones().count(77, 768) == 59_136                       # all positions of SD 1
    C.data += torch.randn(C.shape, generator=torch.Generator().manual_seed(0), dtype=C.dtype)
    labels, ref = torch.tensor([2, 0]), C.detach().clone().requires_grad_()
    f = plain.get_image_features(x).pooler_output.detach()
    z = plain.logit_scale.exp().detach() * (f / f.norm(dim=1, keepdim=True)) @ (
        ref / ref.norm(dim=1, keepdim=True)).t()
    want = torch.autograd.grad(F.cross_entropy(z, labels), ref)[0]
    tuned.loss({"pixel_values": x, "labels": labels}).backward()
    torch.testing.assert_close(C.grad, want)
    assert all(p.grad is None for n, p in concepts.named_parameters() if "classifier" not in n)
    waits = []
    for blocks in (2, 4):
        net = tiny("clip", vision_config={
            "hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": 16, "patch_size": 4, "projection_dim": 16})[0]
        one = burnish.tune(Cones().lifecycle(net, **texts()), "linear_probe")
        waits.append(kept(one, {"pixel_values": x.float(), "labels": labels}))
    assert waits[0] == waits[1]


def test_the_model_beside_them():
    """Tuned with the concepts, or with the concepts as they stand."""
    for head, trains in (("auto", True), (False, False)):
        concepts, _, x = searched()
        tuned = burnish.tune(concepts, "lora(rank=2)", head=head)
        names = [n for n, _ in tuned.named_parameters()]
        assert any("classifier" in n for n in names) is trains
        assert any("vision_model" in n for n in names)
        batch = {"pixel_values": x, "labels": torch.tensor([2, 0])}
        tuned.optimizer(lr=1e-2)
        losses = [float(tuned.step(batch)) for _ in range(8)]
        assert losses[-1] < losses[0]


def test_a_random_start():
    torch.manual_seed(0)
    concepts, net, x = searched(init="normal")
    C = concepts.classifier.weight
    torch.testing.assert_close(C.norm(dim=1), torch.ones(3))
    own = searched()[0].classifier.weight
    assert float((C * own).sum(1).abs().max()) < 0.9


def test_what_it_refuses():
    with pytest.raises(burnish.RecipeError, match="no model that matches images and texts"):
        Cones().lifecycle(tiny("vit")[0], **texts())
    with pytest.raises(burnish.RecipeError, match="give input_ids"):
        Cones().lifecycle(tiny("clip")[0])
