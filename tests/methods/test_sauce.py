"""SAUCE: features of a sparse autoencoder, told by concepts and damped."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.state.autoencoder import SparseAutoencoder, damped
from burnish.core.errors import ConfigError
from burnish.formats import safe
from burnish.testing.models import tiny


def of(width=6, features=12, active=0, seed=0):
    sae = SparseAutoencoder(width, features, active, seed).double().requires_grad_(False)
    g = torch.Generator().manual_seed(seed + 1)
    for p in (sae.W_e, sae.b_e, sae.b_d):
        p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return sae


def written_out(sae, h, which, strength, threshold):
    """h' token by token and feature by feature."""
    out = h.clone()
    for n in range(len(h)):
        f = torch.stack([max((h[n] - sae.b_d) @ sae.W_e[m] + sae.b_e[m], h.new_zeros(()))
                         for m in range(len(sae.b_e))])
        if sae.active:
            f = torch.where(torch.isin(torch.arange(len(f)), f.topk(sae.active).indices), f, 0)
        for j in which:
            if f[j] > threshold:
                out[n] = out[n] + (strength - 1) * f[j] * sae.W_d[:, j]
    return out


@pytest.mark.parametrize("active", [0, 3])
@pytest.mark.parametrize("strength", [-0.5, 0.0, 0.7])
def test_the_equation_feature_by_feature(active, strength):
    sae, which = of(active=active), (2, 5, 7, 9)
    h = torch.randn(20, 6, dtype=torch.float64)
    got = damped(sae, h.view(4, 5, 6), which, strength, 0.4).view(20, 6)
    want = written_out(sae, h, which, strength, 0.4)
    assert torch.allclose(got, want, atol=1e-12) and not torch.equal(got, h)


def test_what_uses_no_feature_of_the_concept_is_the_same_bit_for_bit():
    sae = of().float()
    h = torch.randn(200, 6)
    h[::3] = -0.0                                        # a sum with zero would turn its sign
    f = sae.encode(h)
    which = (1, 4)
    free = ~(f[:, list(which)] > 0.2).any(-1)
    got = damped(sae, h, which, -0.5, 0.2)
    assert 0 < int(free.sum()) < 200
    assert torch.equal(got[free].view(torch.int32), h[free].view(torch.int32))
    assert bool((got[~free] != h[~free]).any(-1).all())
    assert damped(sae, h, which, 1.0, 0.0) is h and damped(sae, h, (), -0.5, 0.0) is h


def test_several_concepts_are_the_union_of_their_features():
    sae, h = of(), torch.randn(30, 6, dtype=torch.float64)
    a, b = (1, 4, 6), (4, 8)
    both = damped(sae, h, (*a, *b), -0.5, 0.0)
    assert torch.allclose(both, written_out(sae, h, {*a, *b}, -0.5, 0.0), atol=1e-12)
    apart = [damped(sae, h, w, -0.5, 0.0) - h for w in (a, b, (4,))]      # 4 is theirs, and once
    assert torch.allclose(both - h, apart[0] + apart[1] - apart[2], atol=1e-12)


def test_the_autoencoder_its_loss_and_its_numbers():
    sae = of(active=3)
    h = torch.randn(9, 6, dtype=torch.float64)
    f = sae.encode(h)
    assert int((f > 0).sum(-1).max()) <= 3 and float(f.min()) == 0
    g = torch.stack([sum(f[n, m] * sae.W_d[:, m] for m in range(12)) + sae.b_d for n in range(9)])
    want = ((h - g) ** 2).sum() / (9 * 6) + 0.3 * f.sum() / 9
    assert torch.allclose(sae.loss(h, 0.3), want, atol=1e-12)
    assert torch.allclose(sae.W_d.norm(dim=0), torch.ones(12).double(), atol=1e-6)
    with torch.device("meta"):
        count = sum(p.numel() for p in (torch.empty(1024, 8192), torch.empty(8192, 1024),
                                        torch.empty(8192), torch.empty(1024)))
    assert count == 2 * 1024 * 8192 + 8192 + 1024 == 16_786_432
    assert sum(p.numel() for p in sae.parameters()) == 2 * 6 * 12 + 12 + 6


@pytest.fixture
def pictures():
    """A small vision transformer, pictures whose left or right half is bright, and others."""
    net, _ = tiny("vit")
    g = torch.Generator().manual_seed(0)
    noise = [torch.randn(8, 3, 16, 16, generator=g) * 0.3 for _ in range(3)]
    left, right = (n.clone() for n in noise[:2])
    left[..., :8] += 2
    right[..., 8:] += 2
    return net.eval(), *({"pixel_values": x} for x in (left, right, noise[2]))


def test_learning_is_adam_on_the_loss_with_columns_of_length_one(pictures):
    net, left, right, _ = pictures
    part = burnish.parse("sauce(expansion=2, active=0, l1=0.3, state_passes=2, step_size=0.02, "
                         "layer=0, seed=3)")[0]
    with torch.no_grad():
        h = [net(**b, output_hidden_states=True).hidden_states[1].reshape(-1, 32)
             for b in (left, right)]
    twin = SparseAutoencoder(32, 64, 0, 3)
    with torch.no_grad():
        twin.b_d.copy_(h[0].mean(0))
    adam = torch.optim.Adam(twin.parameters(), lr=0.02)
    for x in (*h, *h):
        f = torch.relu((x - twin.b_d) @ twin.W_e.t() + twin.b_e)
        loss = (x - f @ twin.W_d.t() - twin.b_d).square().mean() + 0.3 * f.sum() / len(x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            twin.W_d /= twin.W_d.norm(dim=0)
    found = part.lifecycle(net, [left, right]).sae
    for (n, a), b in zip(found.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-4, msg=n)
        assert not a.requires_grad


def test_a_concept_is_learnt_damped_and_put_back(pictures, tmp_path):
    net, left, right, plain = pictures
    part = burnish.parse("sauce(expansion=4, active=8, state_passes=40, concept_size=5, "
                         "layer=0)")[0]
    weights = {n: p.clone() for n, p in net.named_parameters()}
    forget = part.lifecycle(net, [left, right, plain])
    assert forget.path == "vit.layers.0" and len(forget.sae.b_e) == 4 * 32
    assert 0 <= forget.dead < 1
    from burnish.methods.lifecycle.sauce import read

    used = torch.cat([forget.sae.encode(read(net, forget.path, b)) for b in (left, right, plain)])
    assert forget.dead == pytest.approx(1 - (used > 0).any(0).float().mean().item())
    h = read(net, forget.path, plain)
    error = (h - forget.sae.decode(forget.sae.encode(h))).square().mean()
    assert float(error) < float((h - h.mean(0)).square().mean())           # it has learnt something
    found = forget.learn("left", [left], [right, plain])
    score = used[:len(h)].mean(0) - used[len(h):].mean(0)
    assert list(found) == score.argsort(descending=True)[:5].tolist()
    assert float(score[list(found)].min()) > 0
    forget.learn("right", [right], [left, plain])
    assert forget.features("left", "right") == tuple(sorted({*found, *forget.concepts["right"]}))
    before = net(**left).logits
    with forget.standing("left"):
        assert not torch.allclose(net(**left).logits, before, atol=1e-4)
    with forget.standing("left", "right", concept_factor=1.0):
        assert torch.equal(net(**left).logits, before)
    assert torch.equal(net(**left).logits, before)
    assert all(torch.equal(p, weights[n]) for n, p in net.named_parameters())
    # from a file, on another autoencoder
    safe.save_file(forget.tensors(), tmp_path / "f.safetensors")
    other = burnish.parse("sauce(expansion=4, active=8, seed=3, layer=0)")[0].lifecycle(net, [left])
    other.load(safe.load_file(tmp_path / "f.safetensors"))
    assert other.concepts == forget.concepts
    with forget.standing("left"), torch.no_grad():
        want = net(**left).logits
    with other.standing("left"), torch.no_grad():
        assert torch.equal(net(**left).logits, want)


def test_the_tower_that_sees_is_taken_and_its_last_block_but_one():
    net, batch = tiny("clip")
    forget = burnish.parse("sauce(expansion=2)")[0].lifecycle(net, [batch])
    assert forget.path == "vision_model.encoder.layers.0"
    named = burnish.parse("sauce(expansion=2)")[0].lifecycle(
        net, [batch], "text_model.encoder.layers.1")
    assert len(named.sae.b_e) == 64


def test_refusals(pictures):
    net, left, _, plain = pictures
    assert burnish.parse("sauce")[0].settings() == {
        "targets": None, "expansion": 8, "active": 32, "l1": 0.0, "concept_size": 20,
        "concept_factor": -0.5, "threshold": 0.0, "layer": None, "state_passes": 1,
        "step_size": 1e-3, "seed": 0}
    least = burnish.parse("sauce(expansion=1, concept_size=1, active=0, concept_factor=1.0)")[0]
    assert (least.expansion, least.active) == (1, 0)
    for text, words in (("sauce(concept_size=0)", "concept_size"),
                        ("sauce(state_passes=0)", "state_passes"),
                        ("sauce(active=-1)", "active"), ("sauce(step_size=0.0)", "above 0"),
                        ("sauce(expansion=0)", "expansion, concept_size and state_passes of"),
                        ("sauce(l1=-1.0)", "active and l1 of 0 or more"),
                        ("sauce(concept_factor=1.5)", "would strengthen a concept"),
                        ("sauce(targets='q')", "targets='q' does nothing")):
        with pytest.raises(ConfigError, match=words):
            burnish.parse(text)
    part = burnish.parse("sauce(expansion=2)")[0]
    for args, words in ((([],), "there are no batches"), (([left], "vit.lyers"), "has no module"),
                        (([left], "dropout"), "gave no states|has no module")):
        with pytest.raises(ConfigError, match=words):
            part.lifecycle(net, *args)
    with pytest.raises(ConfigError, match="layer=9: there are blocks 0 to 1"):
        burnish.parse("sauce(layer=9)")[0].lifecycle(net, [left])
    with pytest.raises(ConfigError, match="has no blocks"):
        part.lifecycle(tiny("mlp")[0], [left])
    forget = part.lifecycle(net, [left])
    with pytest.raises(ConfigError, match="one of the two is empty"):
        forget.learn("a", [left], [])
    with pytest.raises(ConfigError, match="no feature is more active on 'a' than elsewhere"):
        forget.learn("a", [left], [left])
    with pytest.raises(ConfigError, match="'a' was not learnt; there is nothing yet"), \
            forget.standing("a"):
        pass
    with pytest.raises(ConfigError, match="W_d is missing|b_d is missing|W_e is missing"):
        forget.load({})
    forget.concepts["a"], forget.path = (1,), "vit"
    with pytest.raises(ConfigError, match="name the block itself"), forget.standing("a"):
        net(**left)
