"""LoRA on state-space models: which weights, and kernels that read them past their modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny

MAMBA_2_8B = {"hidden_size": 2560, "intermediate_size": 5120, "num_hidden_layers": 64,
              "time_step_rank": 160, "state_size": 16}
RECIPE = "lora(rank=2, targets=['in_proj', 'x_proj', 'dt_proj', 'out_proj'])"


@pytest.mark.parametrize("role, want", [("x_proj", 2_719_744), ("in_proj", 6_553_600)])
def test_counts_on_a_published_model(role, want):
    anatomy = Anatomy.of(tiny("mamba", meta=True, **MAMBA_2_8B)[0])
    places = [p for p in anatomy.places if p.role == role]
    assert len(places) == 64 and sum(parse("lora")[0].count(p) for p in places) == want


def scan(mixer, hidden_states, seen=None):
    """A mixer as a fused kernel computes it: from the weights, calling in_proj alone."""
    T, N = hidden_states.shape[1], mixer.A_log.shape[1]
    x, z = mixer.in_proj(hidden_states).transpose(1, 2).chunk(2, 1)
    conv = mixer.conv1d
    x = F.silu(F.conv1d(x, conv.weight, conv.bias, padding=conv.padding[0],
                        groups=conv.groups)[..., :T])
    made = F.linear(x.transpose(1, 2), mixer.x_proj.weight)
    dt, B, C = made.split([made.shape[-1] - 2 * N, N, N], -1)
    dt = F.softplus(F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias)).transpose(1, 2)
    factor = torch.exp(dt.unsqueeze(-1) * -torch.exp(mixer.A_log.to(dt.dtype))[None, :, None])
    if seen is not None:
        seen.append(factor.detach())
    h, ys = torch.zeros_like(factor[:, :, 0]), []
    for t in range(T):
        h = factor[:, :, t] * h + dt[:, :, t, None] * B[:, t, None] * x[:, :, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = (torch.stack(ys, -1) + mixer.D[:, None] * x) * F.silu(z)
    return F.linear(y.transpose(1, 2), mixer.out_proj.weight, mixer.out_proj.bias)


def made(fused, seen=None, dtype=torch.float64):
    net, batch = tiny("mamba", dtype=dtype)
    if fused:
        for layer in net.backbone.layers:
            kind = type(layer.mixer)
            layer.mixer.__class__ = type(kind.__name__, (kind,), {
                "forward": lambda self, hidden_states, *a, **kw: scan(self, hidden_states, seen)})
    net.eval()
    return net, batch


def test_a_kernel_that_reads_weights_past_their_modules_meets_the_update():
    """Outputs and gradients of every factor are those of the path that calls the modules."""
    outs, grads = [], []
    for fused in (False, True):
        net, batch = made(fused)
        before = net(**batch).logits
        tuned = stir(burnish.tune(net, RECIPE, head=False), size=0.2)
        out = net(**batch)
        assert not torch.allclose(out.logits, before)
        out.logits.square().sum().backward()
        outs.append(out.logits.detach())
        grads.append({n: p.grad for n, p in tuned.named_parameters()})
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-6)
    for role in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert sum(role in n for n in grads[0]) == 2 * 2
    for n, g in grads[0].items():
        assert g.any(), n
        torch.testing.assert_close(grads[1][n], g, rtol=1e-3, atol=1e-5 * float(g.abs().max()))


def test_states_do_not_grow_before_or_after_tuning():
    """No factor exp(dt A) is above 1: the largest Lyapunov exponent is not above zero."""
    seen: list = []
    net, batch = made(True, seen)
    for tuned in (None, burnish.tune(net, RECIPE, head=False)):
        if tuned is not None:
            stir(tuned, size=0.1)
        seen.clear()
        with torch.no_grad():
            net(**batch)
        assert len(seen) == len(net.backbone.layers)
        for factor in seen:
            assert bool(((factor >= 0) & (factor <= 1)).all())
            assert float(factor.log().mean(2).max()) <= 0


def test_half_precision_stays_near_over_a_long_sequence():
    net, _ = made(False, dtype=torch.float32)
    stir(burnish.tune(net, RECIPE, head=False), size=0.1)
    ids = torch.randint(3, 60, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = net(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = net(input_ids=ids).logits.float()
    off = (half - exact).norm(dim=-1)[0] / exact.norm(dim=-1)[0].mean()
    assert float(off[-64:].mean()) < 2 * float(off[:64].mean()) + 0.02 and float(off.max()) < 0.1
