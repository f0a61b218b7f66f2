"""What is not a finite number, in a forward or only in a backward (a loss scale that overflows),
reaches every gradient that it reaches without a form of its own for what backward keeps."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core import registry
from burnish.testing.models import tiny

#: method -> (model, recipes beside it)
FORMS = {
    "checkpoint": ("vit", ["checkpoint", "checkpoint(every=2)", "checkpoint(mode='selective')"]),
    "chunked_loss": ("llama", ["chunked_loss(chunk=4)"]),
    "coded": ("vit", ["coded", "coded(bits=1, norm_bits=4)", "coded(mean_bits=2.0)",
                      "coded(running=0.9)", "coded(softmax_bits=4)"]),
    "ghost_batch_norm": ("cnn", ["ghost_batch_norm(ghost=2)"]),
    "lean": ("vit", ["lean", "lean(level=2)"]),
    "meft": ("vit", ["meft(bottleneck=4, anchors=1)",
                      "meft(bottleneck=4, streams='fixed')"]),
    "offload": ("vit", ["offload(to='disk', threshold=0)", "offload(threshold=0)"]),
    "scatterbrain": ("vit", ["scatterbrain"]),
    "velora": ("vit", ["velora(groups=4)"]),
    "wta_crs": ("vit", ["wta_crs(retained=0.3, floor=1)", "wta_crs(retained=0.9, floor=1)"]),
}
CELLS = [(m, r) for m, rs in FORMS.values() for r in rs]


def test_every_form_stands_here():
    with_tape = {n for n in registry.names(extra=False) if "activations" in registry.find(n).axes()}
    assert set(FORMS) == {n for n in with_tape
                          if registry.find(n).__module__.startswith("burnish.methods.activations")}


def head(net):
    return next(net.get_submodule(n) for n in ("classifier", "lm_head", "head", "fc")
                if hasattr(net, n))


def gradients(model, recipe, plant):
    """{name: has the gradient a number that is not finite?}, and the loss."""
    net, batch = tiny(model)
    tuned = burnish.tune(net, f"lora(rank=2) + {recipe}" if recipe else "lora(rank=2)", head=True)
    for n, p in tuned.named_parameters():
        if n.endswith("lora.B"):
            p.data.normal_(generator=torch.Generator().manual_seed(0))
    with plant(net):
        loss = tuned.loss(batch)
        loss.backward()
    return loss.detach(), {n: not bool(p.grad.isfinite().all())
                           for n, p in tuned.named_parameters() if p.grad is not None}


class In:
    """One sample's numbers become `value`: in the result of a module, or in its gradient."""

    def __init__(self, value, backward):
        self.value, self.backward = value, backward

    def __call__(self, net):
        self.net = net
        return self

    def __enter__(self):
        change = self.back if self.backward else self.forth
        where = head(self.net) if self.backward else next(
            m for n, m in self.net.named_modules()
            if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and ".burnish" not in n)
        self.hook = where.register_forward_hook(change)

    def __exit__(self, *_):
        self.hook.remove()

    def forth(self, module, args, out):
        out = out.clone()
        out[0].view(-1)[0] = self.value
        return out

    def back(self, module, args, out):
        def bad(g):
            g = g.clone()
            g[0].view(-1)[0] = self.value
            return g

        out.register_hook(bad)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "forward"])
@pytest.mark.parametrize("model, recipe", CELLS, ids=[r for _, r in CELLS])
def test_it_reaches_what_it_reaches_without_it(model, recipe, backward, value):
    loss, want = gradients(model, "", In(value, backward))
    mine, got = gradients(model, recipe, In(value, backward))
    assert any(want.values())
    assert bool(mine.isfinite()) == bool(loss.isfinite())
    assert not [n for n, bad in want.items() if bad and not got.get(n, True)]
    assert not backward or any(got.values())
