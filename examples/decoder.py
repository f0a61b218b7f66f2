"""A light decoder on a frozen model of a flow: a variable that the model was never taught.

    python examples/decoder.py                # about a minute

A small network has learnt one step of a simulator, a tracer carried by a wind and spread by
diffusion on a periodic grid. It is then to say the rain: what the tracer loses where it is above a
threshold and the wind converges, which no input or output of it is. Few fields of rain are there.
Beside each other: a linear probe of its last states, a light decoder (two convolutions) on them,
both with the model frozen, and everything tuned. Scores are mean squared errors over the variance
of the rain (lower is better; 1 is to have learnt nothing), and what the tracer's own forecast has
come to: a frozen model keeps it.

After "Finetuning a Weather Foundation Model with Lightweight Decoders for Unseen Physical
Processes" (2025), arXiv:2506.19088, whose model is Aurora and whose variables are hydrological;
their decoders and numbers are theirs, this is the same question of a model that fits here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transferred import trained

import burnish

SIDE, WIDTH, STEPS, DT = 16, 16, 4, 0.2
Batch = tuple[Tensor, Tensor]
#: how the rain is learnt -> what of the model trains, its learning rate
WAYS = {"linear probe": ("full", "decode", 1e-2, False),
        "light decoder": ("full", "decode", 5e-3, True),
        "lora and decoder": ("lora(rank=4, targets='1,3,5') + full(targets='decode')", None, 5e-3,
                             True),
        "everything": ("full", None, 2e-3, True)}


def smooth(count: int, draw: torch.Generator) -> Tensor:
    """(count, SIDE, SIDE) of a few waves, deviation 1."""
    noise = torch.fft.rfft2(torch.randn(count, SIDE, SIDE, generator=draw))
    kx = torch.fft.fftfreq(SIDE, 1 / SIDE)[:, None]
    ky = torch.fft.rfftfreq(SIDE, 1 / SIDE)[None]
    field = torch.fft.irfft2(noise * torch.exp(-(kx**2 + ky**2) / 8), s=(SIDE, SIDE))
    return field / field.std((1, 2), keepdim=True)


def slope(f: Tensor, axis: int) -> Tensor:
    return (f.roll(-1, axis) - f.roll(1, axis)) / 2


def simulated(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tracer and wind now (count, 3, S, S), tracer after STEPS small steps (count, 1, S, S), rain
    meanwhile (count, 1, S, S)): dq/dt = -u dq/dx - v dq/dy + D lap q."""
    draw = torch.Generator().manual_seed(seed)
    q, u, v = (smooth(count, draw) for _ in range(3))
    state = torch.stack([q, u, v], 1)
    rain = torch.zeros_like(q)
    meets = (-(slope(u, 1) + slope(v, 2))).clamp_min(0)
    for _ in range(STEPS):
        lap = sum(q.roll(s, a) for s in (1, -1) for a in (1, 2)) - 4 * q
        q = q + DT * (-u * slope(q, 1) - v * slope(q, 2) + 0.1 * lap)
        rain = rain + DT * meets * (q - 0.5).clamp_min(0)
    return state, q.unsqueeze(1), rain.unsqueeze(1)


class Model(nn.Module):
    """A forecast of the tracer, and a head for what else is to be said; `deep`: two layers."""

    def __init__(self) -> None:
        super().__init__()
        def conv(i: int, o: int) -> nn.Conv2d:
            return nn.Conv2d(i, o, 3, padding=1, padding_mode="circular")

        self.body = nn.Sequential(nn.Identity(), conv(3, WIDTH), nn.GELU(), conv(WIDTH, WIDTH),
                                  nn.GELU(), conv(WIDTH, WIDTH), nn.GELU())
        self.ahead = nn.Conv2d(WIDTH, 1, 1)
        self.decode: nn.Module = nn.Identity()

    def taught(self, deep: bool) -> Model:
        self.decode = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"),
                                    nn.GELU(), nn.Conv2d(WIDTH, 1, 1)) if deep else \
            nn.Sequential(nn.Conv2d(WIDTH, 1, 1))
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return x[:, :1] + self.ahead(h), self.decode(h)


def batches(rows: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    for i in range(0, len(rows[0]), size):
        yield tuple(r[i:i + size] for r in rows)


def main(many: int = 1024, few: int = 96, first: int = 8, epochs: int = 15
         ) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    x, q, _ = simulated(many, 0)
    base = trained(Model(), list(batches((x, q), 32)), 3e-3, first,
                   lambda model, b: F.mse_loss(model(b[0])[0], b[1])).eval()
    (x, _, rain), (x2, q2, rain2) = simulated(few, 1), simulated(256, 2)

    def scores(model: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            ahead, said = model.eval()(x2)
        return (float(F.mse_loss(said, rain2) / rain2.var()),
                float(F.mse_loss(ahead, q2) / (q2 - x2[:, :1]).square().mean()))

    with torch.no_grad():
        kept = float(F.mse_loss(base(x2)[0], q2) / (q2 - x2[:, :1]).square().mean())
    print(f"the tracer's forecast, as it was taught: {kept:.4f} of the error of no change")
    print(f"{'':18}{'rain':>8}{'tracer':>9}{'trains':>9}")
    found = {"as taught": (1.0, kept)}
    for name, (recipe, targets, rate, deep) in WAYS.items():
        torch.manual_seed(1)
        model = copy.deepcopy(base).taught(deep).train()
        tuned = burnish.tune(model, recipe, targets=targets, head=False)
        tuned.optimizer(rate, weight_decay=0.0)
        for _ in range(epochs):
            for batch in batches((x, rain), 16):
                tuned.step(batch, loss=lambda out, b: F.mse_loss(out[1], b[1]))
        found[name] = scores(model)
        trains = sum(p.numel() for p in tuned.parameters())
        print(f"{name:18}{found[name][0]:8.3f}{found[name][1]:9.4f}{trains:9,}", flush=True)
    return found


if __name__ == "__main__":
    main()
