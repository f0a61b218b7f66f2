"""PAVF: two streams fused layer by layer, written out in float64."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.state.fusion import Fused, Fusion
from burnish.testing.models import tiny


def softmax_rows(s):
    e = (s - s.max(0, keepdim=True).values).exp()
    return e / e.sum(0, keepdim=True)


def fused(m, A, V):
    """One sample: A (T, D), V (T, D')."""
    a = A @ m.audio.weight.t() + m.audio.bias
    v = V @ m.video.weight.t() + m.video.bias
    C = torch.einsum("ih,hg,jg->ij", a, m.W, v)                  # rows of audio
    of_a = a.t() @ softmax_rows(C) + a.t()                       # (h, T)
    of_v = v.t() @ softmax_rows(C.t()) + v.t()
    z = torch.cat([of_a, of_v]).t() @ m.mix.weight.t() + m.mix.bias
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (z * m.norm.weight + m.norm.bias).clamp_min(0)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_outputs_and_gradients_are_those_of_the_equation():
    m = Fusion(6, 5, hidden=4, out=3).double()
    A, V = drawn(2, 7, 6), drawn(2, 7, 5)
    got, want = m(A, V), torch.stack([fused(m, a, v) for a, v in zip(A, V, strict=True)])
    torch.testing.assert_close(got, want)
    leaves = [A, V, *m.parameters()]
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g),
                    strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


def test_a_token_gets_a_mean_of_the_other_stream():
    """The shares run over the tokens that are mixed: all of them alike, any mean is they."""
    m = Fusion(6, hidden=4, out=3).double()
    seen = []
    m.mix.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    A, V = drawn(1, 1, 6).expand(1, 7, 6), drawn(1, 7, 6)
    m(A, V)
    torch.testing.assert_close(seen[0][..., :4], 2 * m.audio(A))


def test_layers_and_their_head():
    m = Fused(3, 6, classes=2, hidden=4, out=3).double().eval()
    audio, video = [drawn(2, 5, 6) for _ in range(3)], [drawn(2, 5, 6) for _ in range(3)]
    f = torch.cat([torch.stack([fused(layer, a, v) for a, v in zip(A, V, strict=True)])
                   for layer, A, V in zip(m.layers, audio, video, strict=True)], -1)
    want = (f @ m.join.weight.t() + m.join.bias) @ m.head.weight.t() + m.head.bias
    torch.testing.assert_close(m(audio, video), want.mean(1))
    m.train()
    assert not torch.equal(m(audio, video), m(audio, video))


def test_the_published_counts():
    assert sum(p.numel() for p in Fusion(768).parameters()) == 492_224
    head = Fused(4, 768)
    assert sum(p.numel() for p in head.parameters()) == 4 * 492_224 + 64 * 256 + 64 + 2 * 64 + 2


def test_it_learns_beside_two_backbones_and_taken_away_leaves_them_as_they_were():
    """It reads what their layers answer, and gradients of it train the adapters in both."""
    nets, states = [], []
    for seed in (0, 1):
        net, batch = tiny("vit", seed=seed)
        before = net.eval()(**batch).logits
        tuned = burnish.tune(net, "ut_adapter(bottleneck=4)", head=False)
        nets.append((net, tuned, before, batch))
    m = Fused(2, 32, classes=3, hidden=8, out=4)
    for net, _, _, batch in nets:
        seen, hooks = [], []
        for layer in net.vit.layers:
            hooks.append(layer.register_forward_hook(
                lambda module, args, out, seen=seen:
                    seen.append(out[0] if isinstance(out, tuple) else out)))
        with_hooks = net(**batch).logits
        for h in hooks:
            h.remove()
        assert torch.equal(net(**batch).logits, with_hooks)
        states.append(seen)
    torch.nn.functional.cross_entropy(m(*states), batch["labels"]).backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters())
    for net, tuned, before, batch in nets:
        below = [p for n, p in tuned.named_parameters() if ".layers.0." in n]
        assert below and all(p.grad is not None and p.grad.any() for p in below)
        tuned.detach()
        assert torch.equal(net(**batch).logits, before)


@pytest.mark.parametrize("audio, video", [((2, 5, 6), (2, 4, 6)), ((2, 5, 6), (3, 5, 6)),
                                          ((5, 6), (5, 6))])
def test_streams_that_do_not_meet_are_refused(audio, video):
    with pytest.raises(burnish.DataError, match="as many samples and tokens"):
        Fusion(6, hidden=4)(torch.randn(audio), torch.randn(video))


def test_layers_that_are_missing_are_refused():
    with pytest.raises(burnish.DataError, match="2 layers"):
        Fused(2, 6)([torch.randn(1, 2, 6)], [torch.randn(1, 2, 6)] * 2)
