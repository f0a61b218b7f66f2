"""Keys of the batch that parts of a recipe read: task ids, sample types, whatever a method names.

Two methods of the literature stand here whole, each read against its equation in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish import Method, setting
from burnish.blocks.weight.experts import counted
from burnish.core.call import context
from burnish.core.site import Branch
from burnish.testing.models import tiny


# -- HyperFormer: a hypernetwork generates each layer's adapter from the task's embedding ---------
class Generator(nn.Module):
    """``I = W2 relu(W1 z_task)``; U = reshape(W^U I), D = reshape(W^D I); ``h + U gelu(D h)``."""

    def __init__(self, d: int, m: int, tasks: int, t: int):
        super().__init__()
        self.d, self.m = d, m
        self.z = nn.Parameter(torch.randn(tasks, t))
        self.w1, self.w2 = nn.Linear(t, 2 * t), nn.Linear(2 * t, t)
        self.up = nn.Parameter(torch.randn(d * m, t) * 0.01)
        self.down = nn.Parameter(torch.randn(d * m, t) * 0.01)

    def forward(self, h):
        task = torch.as_tensor(context().need("task"), device=h.device)
        made = self.w2(F.relu(self.w1(self.z[task.expand(len(h))])))          # (B, t)
        D = (made @ self.down.t()).view(-1, self.m, self.d)
        U = (made @ self.up.t()).view(-1, self.d, self.m)
        return F.gelu(h @ D.transpose(1, 2)) @ U.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class HyperFormer(Method):
    """HyperFormer: adapters generated from the task's embedding, one generator per layer."""

    context: ClassVar[Mapping[str, str]] = {"task": "one id per batch or per sample"}
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    width: int = setting(4, "m, width of the adapters")
    tasks: int = setting(3, "how many tasks")

    def branch(self, anatomy):
        for b in anatomy.blocks:
            yield Branch(b.path, Generator(b.hidden_size, self.width, self.tasks, 8))


# -- LoRAMoE: experts in two halves, balanced by the type of the sample ---------------------------
class Balanced(nn.Module):
    """``s sum_n w_n B_n A_n x``, w = softmax(W_g x); beta Var(Z) / Mean(Z)^2 rides along."""

    def __init__(self, method, inp, out):
        super().__init__()
        n, r = method.experts, method.rank
        self.method = method
        self.A = nn.Parameter(torch.empty(n, r, inp).uniform_(-1 / math.sqrt(inp),
                                                              1 / math.sqrt(inp)))
        self.B = nn.Parameter(torch.zeros(n, out, r))
        self.router = nn.Parameter(torch.empty(n, inp).uniform_(-1 / math.sqrt(inp),
                                                                1 / math.sqrt(inp)))

    def attached(self, attacher):
        self.__dict__["riding"] = attacher.state.riding

    def forward(self, x):
        m = self.method
        w = torch.softmax(F.linear(x, self.router), -1)
        if self.training and self.riding.wanted:
            w = self.riding.on(w, self.imbalance(w, counted(x)), m.beta)
        z = F.linear(x, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2]) * w.unsqueeze(-1)
        return torch.einsum("btnr,nor->bto", z, self.B) * (m.alpha / m.rank)

    def imbalance(self, w, valid):
        kind = torch.as_tensor(context().need("sample_type"), device=w.device)
        Q = (w if valid is None else w * valid.unsqueeze(-1)).sum(1)          # (B, n)
        n = Q.shape[1]
        first = (torch.arange(n, device=w.device) < n // 2).long()
        same = first.unsqueeze(0) == kind.expand(len(Q)).unsqueeze(1)
        Z = Q * (1 + self.method.pull * (2 * same.to(Q.dtype) - 1))
        return Z.var() / (Z.mean() ** 2 + 1e-10)


@dataclass(frozen=True, kw_only=True)
class LoraMoe(Method):
    """LoRAMoE: a dense mixture of LoRA experts on the feed-forward linears."""

    context: ClassVar[Mapping[str, str]] = {"sample_type": "1 for world knowledge, 0 for others"}
    merges: ClassVar[bool] = False

    experts: int = setting(4, "N")
    rank: int = setting(2, "r")
    alpha: float = setting(32.0, "numerator of the scale")
    pull: float = setting(0.1, "how far the halves are pulled apart")
    beta: float = setting(0.1, "weight of the balance")

    def mixture(self, anatomy):
        for place in anatomy.places:
            if place.role in ("gate", "up", "down") and place.block is not None:
                yield Branch(place.path, Balanced(self, place.inp, place.out),
                             read=(place.path, "input"))


burnish.register(HyperFormer, "hyperformer_here")
burnish.register(LoraMoe, "loramoe_here")


def stir(tuned, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return tuned


def gradients(tuned):
    got = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.model.zero_grad(set_to_none=True)
    return got


def test_each_sample_has_the_adapter_of_its_task():
    """Against the equation, sample by sample, in float64; the model never sees the key."""
    net, batch = tiny("vit", dtype=torch.float64, batch=3)
    tuned = burnish.tune(net, "hyperformer_here", head=False)
    net.double()
    stir(tuned)
    block, bare = net.vit.layers[0], tiny("vit", dtype=torch.float64)[0].vit.layers[0]
    seen = []
    block.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    task = torch.tensor([2, 0, 2])
    net(**batch, task=task)
    h, out = seen[-1]
    base = bare(h)
    base = base[0] if isinstance(base, tuple) else base
    g = block.burnish.default.hyperformer_here
    for k in range(3):
        made = g.w2.weight @ torch.relu(g.w1.weight @ g.z[task[k]] + g.w1.bias) + g.w2.bias
        U, D = (g.up @ made).view(32, 4), (g.down @ made).view(4, 32)
        want = base[k] + F.gelu(base[k] @ D.t()) @ U.t()
        got = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(got[k], want, rtol=1e-9, atol=1e-12)
    one, same = net(**batch, task=1).logits, net(**batch, task=torch.tensor([1, 1, 1])).logits
    torch.testing.assert_close(one, same)


@pytest.mark.parametrize("recipe", ["hyperformer_here", "hyperformer_here + checkpoint"])
@pytest.mark.parametrize("foreign", [False, True])
def test_recomputation_reads_the_task_of_its_forward(recipe, foreign):
    net, batch = tiny("bert")
    tuned = stir(burnish.tune(net, recipe))
    if foreign:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    alone = []
    for task in (0, 2):
        tuned.loss({**batch, "task": task}).backward()
        alone.append(gradients(tuned))
    losses = [tuned.loss({**batch, "task": t}) for t in (0, 2)]
    with torch.no_grad(), tuned.given(task=1):
        net(**batch)
    sum(losses).backward()
    got = gradients(tuned)
    for n in got:
        torch.testing.assert_close(got[n], alone[0][n] + alone[1][n], rtol=1e-4, atol=1e-6)


def test_a_batch_that_lacks_the_key_is_refused_with_the_reason():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "hyperformer_here")
    with pytest.raises(burnish.RecipeError, match="hyperformer_here reads 'task' of the batch"):
        tuned.step(batch)
    with tuned.disabled():
        net(**batch, task=1)                       # the base needs none and minds none
        net(**batch)
    with tuned.given(task=1):
        tuned.step(batch)
    with pytest.raises(burnish.ConfigError, match="no part of the recipe reads 'tusk'; did you"):
        with tuned.given(tusk=1):
            pass
    tuned.add("plain", "lora(rank=2)")
    tuned.use("plain")
    net(**batch)                                   # nobody active reads it


def test_a_step_is_simulated_with_its_keys():
    net, batch = tiny("vit")
    report = burnish.simulate(net, "hyperformer_here", {**batch, "task": torch.tensor([0, 1])})
    assert report.peak_bytes > 0
    tuned = burnish.tune(net, "hyperformer_here", example={**batch, "task": torch.tensor([0, 1])})
    assert tuned.step({**batch, "task": torch.tensor([0, 1])}).isfinite()


def test_per_sample_adapters_get_their_samples_keys():
    net, batch = tiny("vit", batch=3)
    tuned = stir(burnish.tune(net, "hyperformer_here", head=False))
    net.eval()
    task = torch.tensor([2, 0, 1])
    with torch.no_grad():
        whole, off = net(**batch, task=task).logits, None
        with tuned.disabled():
            off = net(**batch).logits
        tuned.use(["default", None, "default"])
        got = net(**batch, task=task).logits
    torch.testing.assert_close(got[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(got[1], off[1])


def test_the_balance_follows_the_type_of_the_sample():
    """Against Var(I o Q) / Mean(I o Q)^2 written out, padding left out, in float64."""
    net, batch = tiny("llama", dtype=torch.float64)
    recipe = "loramoe_here(pull=0.3, beta=0.7)"
    tuned = burnish.tune(net, recipe)
    net.double()
    stir(tuned)
    kinds, mask = torch.tensor([1, 0]), torch.ones_like(batch["input_ids"])
    mask[1, 5:] = 0
    given = {**batch, "attention_mask": mask}
    parts = [m for m in net.modules() if isinstance(m, Balanced)]
    assert len(parts) == 6
    tuned.loss({**given, "sample_type": kinds}).backward()
    got = gradients(tuned)
    inputs = []
    hooks = [m.register_forward_pre_hook(lambda m, a: inputs.append((m, a[0]))) for m in parts]
    for m in parts:
        m.eval()
    loss = tuned.loss({**given, "sample_type": kinds})
    extra = 0.0
    for m, x in inputs:
        w = torch.softmax(x @ m.router.t(), -1)
        Z = []
        for b in range(2):
            for n in range(4):
                q = sum(w[b, t, n] for t in range(x.shape[1]) if mask[b, t])
                match = (n < 2) == (kinds[b] == 1)
                Z.append(q * (1.3 if match else 0.7))
        Z = torch.stack(Z)
        mean = Z.mean()
        extra = extra + 0.7 * ((Z - mean) ** 2).sum() / (len(Z) - 1) / (mean ** 2 + 1e-10)
    want = torch.autograd.grad(loss + extra, list(tuned.parameters()))
    [h.remove() for h in hooks]
    for (n, _), b in zip(tuned.named_parameters(), want, strict=True):
        torch.testing.assert_close(got[n], b, rtol=1e-8, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")


def test_a_uniform_router_without_pull_is_balanced():
    m = Balanced(LoraMoe(pull=0.0), 6, 6)
    w = torch.full((2, 5, 4), 0.25)
    from burnish.core.call import Call, resume

    with resume(Call(given={"sample_type": torch.tensor([1, 0])})):
        assert m.imbalance(w, None) < 1e-12
