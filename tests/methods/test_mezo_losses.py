"""MeZO in half precision: losses in fp32 wherever they are computed; standing still is said."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.update.precise import Evaluation, Fp32Losses
from burnish.blocks.update.step import compose
from burnish.core.recipe import parse
from burnish.testing.models import NAMES, tiny


def build(named, lr=1e-3, recipe="mezo"):
    return compose([m.optimizer() for m in parse(recipe)], named, lr)


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_the_loss_moves_with_the_probe_on_every_model(name):
    model, batch = tiny(name)                                        # findings 2.1
    model.to(torch.bfloat16)
    batch = {k: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point()
             else v for k, v in batch.items()}
    tuned = burnish.tune(model, "full + mezo(eps=0.01)")
    opt = tuned.optimizer(lr=1e-4)
    for _ in range(6):
        tuned.step(batch)
    assert sum(g != 0.0 for g in opt.log.scalars) >= 5, opt.log.scalars


def test_the_estimate_in_bf16_is_that_of_the_same_weights_with_an_fp32_loss():
    """Dense reference: logits of the perturbed bf16 model, widened, cross-entropy in fp32."""
    torch.manual_seed(0)                                             # findings 2.1
    x, y = torch.randn(16, 8).bfloat16(), torch.randint(3, (16,))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return F.cross_entropy(self.fc(x), y)

    net = Net().bfloat16()
    opt = build(net.named_parameters(), recipe="mezo(mode='in_place', eps=0.05)")
    seen, losses = [], []
    net.fc.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone()))

    def closure():
        losses.append(net(x))
        return losses[-1]

    opt.step(closure)
    want = [F.cross_entropy(logits.double(), y).item() for logits in seen]
    for got, w in zip(losses, want, strict=True):
        assert got.dtype == torch.float32 and got.item() == pytest.approx(w, rel=1e-6)
    assert opt.log.scalars[0] == pytest.approx((want[0] - want[1]) / 0.1, rel=1e-3)


@pytest.mark.parametrize("loss", [
    lambda h, y: F.cross_entropy(h, y),
    lambda h, y: nn.CrossEntropyLoss(weight=torch.ones(3, dtype=h.dtype))(h, y),
    lambda h, y: F.nll_loss(h.log_softmax(-1), y),
    lambda h, y: F.mse_loss(h, torch.zeros_like(h)),
    lambda h, y: F.smooth_l1_loss(h, torch.zeros_like(h)),
    lambda h, y: F.huber_loss(h, torch.zeros_like(h)),
    lambda h, y: F.binary_cross_entropy_with_logits(h, torch.ones_like(h)),
    lambda h, y: F.binary_cross_entropy(h.sigmoid(), torch.ones_like(h)),
    lambda h, y: F.kl_div(F.log_softmax(h, -1), torch.full_like(h, 1 / 4), reduction="batchmean"),
    lambda h, y: -torch.log_softmax(h, -1).gather(1, y[:, None]).mean(),
    lambda h, y: F.logsigmoid(h).mean(),
])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_function_computes_in_fp32(loss, dtype):
    torch.manual_seed(0)
    h, y = torch.randn(8, 3).to(dtype), torch.randint(3, (8,))
    with Fp32Losses():
        got = loss(h, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(h.float(), y), rtol=2e-3, atol=1e-3)
    assert loss(h.float(), y).dtype == torch.float32, "outside the mode nothing changes"


def test_what_a_model_returns_is_widened_for_a_loss_outside():
    net = nn.Linear(4, 2).bfloat16()
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    with Evaluation(nullcontext(), net):
        assert net(x).dtype == torch.float32
    assert net(x).dtype == torch.bfloat16


def test_a_loss_in_half_precision_is_refused_with_the_way_out():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = build([("w", p)])
    with pytest.raises(burnish.BurnishError, match=r"bfloat16.*fp32.*logits.float"):
        opt.step(lambda: p.sum())


def test_standing_still_is_an_error_that_explains_itself():
    p = nn.Parameter(torch.ones(3))                                  # findings 2.1
    opt = build([("w", p)])
    for _ in range(4):
        opt.step(lambda: torch.tensor(1.25))
    with pytest.raises(burnish.BurnishError, match=r"5 updates in a row.*1\.25.*fp32.*eps=0.01"):
        opt.step(lambda: torch.tensor(1.25))


def test_one_difference_starts_the_count_again():
    p = nn.Parameter(torch.ones(3))
    opt = build([("w", p)])
    values = iter([1.0, 1.0] * 4 + [1.0, 2.0] + [1.0, 1.0] * 4)
    for _ in range(9):
        opt.step(lambda: torch.tensor(next(values)))


def test_a_count_may_stand_still_for_longer():
    opt = build([("w", nn.Parameter(torch.ones(3)))])
    for _ in range(99):
        opt.step(lambda: -7)                     # seven rows of the batch are right
    with pytest.raises(burnish.BurnishError, match="larger batch"):
        opt.step(lambda: -7)


def test_losses_that_are_never_finite_are_an_error_too():
    opt = build([("w", nn.Parameter(torch.ones(3)))])
    for _ in range(4):
        opt.step(lambda: torch.tensor(float("nan")))
    with pytest.raises(burnish.BurnishError, match="not finite"):
        opt.step(lambda: torch.tensor(float("nan")))
