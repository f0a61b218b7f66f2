"""Lily: factors that layers share and a router blends, against the equation written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import burnish
from burnish.blocks.weight.blended import Blended
from burnish.core.errors import RankError, RecipeError
from burnish.testing import follows, stir
from burnish.testing.models import tiny


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.back = nn.Linear(4, 6)

    def forward(self, x):
        return self.back(self.o(torch.tanh(self.q(x)) + self.v(x)))


def made(settings="rank=3", blocks=3, targets="q,v,o"):
    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(blocks))).double()
    tuned = burnish.tune(net, f"lily({settings})", head=False, targets=targets)
    branches = dict(tuned.branches(Blended))
    for m in branches.values():
        m.double()
    stir(tuned)
    return net, tuned, branches


def update(x, A, B, R, scale=1.0):
    h = x @ A.t()
    p = torch.softmax(h @ R.t(), -1).flatten(0, -2).mean(0)
    return scale * (h @ sum(w * M for w, M in zip(p, B, strict=True)))


def test_outputs_and_gradients_are_those_of_the_equation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5)).double()
    W, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    tuned = burnish.tune(net, "lily(rank=3, experts=4, scale=2.5)", head=False, targets="0")
    (_, m), = tuned.branches(Blended)
    m.double()
    stir(tuned)
    assert m.A.shape == (3, 7) and m.B.shape == (4, 3, 5) and m.router.shape == (4, 3)
    follows(tuned, lambda x, A, B, R: F.linear(x, W, bias) + update(x, A, B, R, 2.5),
            [m.A, m.B, m.router], (5, 3, 7), merged=False)


def test_linears_of_a_name_and_size_share_b_and_runs_of_them_a():
    _, tuned, found = made("rank=3, stride=2, experts=2")
    q, v, o = ([found[f"{n}.{name}"] for n in range(3)] for name in "qvo")
    for group in (q, v, o):
        assert group[0].B is group[1].B is group[2].B
        assert group[0].A is group[1].A and group[2].A is not group[0].A
        assert len({id(m.router) for m in group}) == 3
    assert q[0].B is not v[0].B and q[0].A is not v[0].A
    assert [m.owns for m in q] == ["BA", "", "A"]
    assert sum(p.numel() for p in tuned.parameters()) == \
        3 * 2 * 3 * 6 + 2 * 2 * 3 * 6 + 2 * 3 * 4 + 9 * 2 * 3


def test_a_group_of_a_size_asks_for_no_name():
    _, _, found = made("rank=3, stride=4, grouping='size'")
    square = [found[f"{n}.{name}"] for n in range(3) for name in "qv"]
    assert len({id(m.B) for m in square}) == 1
    assert [m.A is square[0].A for m in square] == [True] * 4 + [False] * 2
    assert square[4].A is square[5].A and found["0.o"].B is not square[0].B


def test_gradients_of_what_is_shared_add_up():
    net, tuned, found = made("rank=2, stride=3", targets="q,v,o")
    letters = {id(p): p for p in tuned.parameters()}
    fixed = {n: (m.weight.detach().clone(), m.bias.detach().clone())
             for n, m in net.named_modules() if isinstance(m, nn.Linear)}

    def equation(x, *copies):
        now = dict(zip(letters, copies, strict=True))

        def layer(name, x):
            y = F.linear(x, *fixed[name])
            m = found.get(name)
            return y if m is None else y + update(x, *(now[id(t)] for t in (m.A, m.B, m.router)))

        for n in range(3):
            x = layer(f"{n}.back", layer(f"{n}.o", torch.tanh(layer(f"{n}.q", x)) +
                                         layer(f"{n}.v", x)))
        return x

    follows(tuned, equation, list(letters.values()), (4, 2, 6), merged=False)


def test_the_start():
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    burnish.tune(net, "lily(rank=4)")
    assert torch.equal(net(**batch).logits, want)
    tuned = burnish.tune(nn.Sequential(nn.Linear(400, 300)), "lily(rank=100, experts=50)",
                         head=False, targets="0")
    (_, m), = tuned.branches(Blended)
    for t, bound in ((m.A, 0.05), (m.router, 0.1)):
        assert 0.99 * bound < float(t.detach().abs().max()) <= bound
        assert float(t.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert abs(float(t.detach().mean())) < 0.03 * bound
    assert not m.B.any()
    assert {g["weight_decay"] for g in tuned.optimizer(lr=1e-3, weight_decay=0.5).param_groups} \
        == {0.0}


def test_a_file_holds_what_is_shared_once(tmp_path):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lily(rank=3, stride=2, targets='q')", seed=1)
    for _ in range(2):
        tuned.step(batch)
    tuned.save(tmp_path / "a")
    names = [k.rpartition(".")[2] for k in load_file(tmp_path / "a/adapter_model.safetensors")]
    assert sorted(names) == ["A", "B", "router", "router"]
    other, _ = tiny("llama")
    burnish.load(other, tmp_path / "a")
    net.eval(), other.eval()
    assert torch.equal(net(**batch).logits, other(**batch).logits)


def test_a_fused_linear_has_the_rows_that_are_meant():
    net, batch = tiny("gpt2")
    tuned = stir(burnish.tune(net, "lily(rank=3, targets='v')", head=False))
    (path, m), *_ = tuned.branches(Blended)
    assert path.endswith("c_attn") and m.B.shape[-1] == 32 and m.out == 96
    y = m(torch.randn(2, 5, 32))
    assert not y[..., :64].any() and bool(y[..., 64:].any())


def test_half_precision_runs_and_is_near():
    net, tuned, found = made("rank=3, experts=3")
    m = found["0.q"].float()
    x = torch.randn(4, 5, 6)
    want = update(x.bfloat16().float(), m.A, m.B, m.router)
    y = m(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=3e-2, atol=3e-2)


def test_defaults_and_refusals():
    assert burnish.parse("lily")[0].settings() == {
        "targets": None, "rank": 32, "stride": 1, "experts": 2, "scale": 1.0, "grouping": "name"}
    for settings in ("rank=0", "stride=0", "experts=0"):
        with pytest.raises(RecipeError, match="^lily: rank, stride and experts of at least 1"):
            burnish.parse(f"lily({settings})")
    assert burnish.parse("lily(rank=1, experts=1)")
    with pytest.raises(RankError, match="^lily: rank 5"):
        burnish.tune(nn.Sequential(nn.Linear(4, 6)), "lily(rank=5)", head=False, targets="0")
