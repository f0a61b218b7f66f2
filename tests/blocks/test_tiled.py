"""Kernel deltas against the formula written out, with `torch.quantile` for the threshold."""

from __future__ import annotations

import pytest
import torch

from burnish.blocks.weight import panels, tiled
from burnish.blocks.weight.factor import Chain
from burnish.blocks.weight.provided import Weighted, linear
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.site import Place
from burnish.memory.ledger import Ledger
from burnish.testing.ran import Ran

OUT, IN, N = 24, 20, 7


def place(out=OUT, inp=IN):
    return Place("layer", "weight", "linear", out, inp)


def kernel(out=OUT, inp=IN, rank=8, s=0.6, mixed=True, seed=0, **kw):
    torch.manual_seed(seed)
    term = KernelDelta(place(out, inp), rank, s, mixed, **kw).double()
    if mixed:
        with torch.no_grad():
            term.alpha.fill_(0.7)
            term.gamma.fill_(0.05)
            term.beta.fill_(0.002)
    return term


def formula(A, B, s, p=2.0, mix=None, linear_form=False):
    """Delta (out, in) from the paper's equations; autograd does the rest."""
    d = (B[:, :, None, :] - A[:, None, :, :]).abs().pow(p).sum(-1).pow(1 / p)
    K = 0.1 * (d[0] - d[1])
    if mix is not None:
        alpha, gamma, beta = mix
        K = K + alpha * torch.softmax(K / gamma, dim=0) + beta
    tau = torch.quantile(K.detach().abs().flatten(), s) if s > 0 else -1.0
    gate = (K.abs() > tau).to(K.dtype) * (1 if linear_form else K.abs())
    return K * gate.detach()


def mix_of(term):
    return (term.alpha, term.gamma, term.beta) if term.mixed else None


CASES = {
    "snell": {"mixed": False}, "snella": {"mixed": True},
    "dense": {"mixed": False, "s": 0.0}, "nearly all zero": {"mixed": True, "s": 0.97},
    "linear": {"mixed": False, "magnitude": "linear"},
    "linear dense": {"mixed": False, "s": 0.0, "magnitude": "linear"},
    "p=1": {"mixed": False, "norm_p": 1.0}, "p=3": {"mixed": False, "norm_p": 3.0},
}


@pytest.mark.parametrize("pieces", [1, 4], ids=["one panel", "four panels"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_formula(case, pieces, monkeypatch):
    """tau agrees with torch.quantile; every gradient with dense autograd, to 1e-9."""
    monkeypatch.setattr(panels, "PANEL", OUT * IN // pieces)
    monkeypatch.setattr(tiled, "PANEL", OUT * IN // pieces)
    monkeypatch.setattr(tiled, "STRIP", 3 * OUT)
    term = kernel(**CASES[case])
    W = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(N, OUT, dtype=torch.float64)
    names = [n for n, _ in term.named_parameters()]
    wanted = [x, *term.parameters()]
    y = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
    got = torch.autograd.grad(y, wanted, g)
    ref = x @ (W + formula(term.A, term.B, term.sparsity, term.norm_p, mix_of(term),
                           term.magnitude == "linear")).t()
    want = torch.autograd.grad(ref, wanted, g)
    torch.testing.assert_close(y, ref, rtol=1e-11, atol=1e-13)
    for n, a, b in zip(["x", *names], got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


def test_gradient_equals_central_differences():
    """With the factor held constant, and each parameter moved on its own."""
    term = kernel(12, 9, rank=4)
    G = torch.randn(12, 9, dtype=torch.float64)
    with torch.no_grad():
        K = term.kernel_reference()
        gate = K.abs() * (K.abs() > torch.quantile(K.abs().flatten(), term.sparsity))
    state, grads = term.prepare(), [None] * 5
    term.pull(0, 9, G, state, grads)
    step = 1e-6
    for p, got in zip(term.parameters(), grads, strict=True):
        want = torch.empty_like(p)
        flat, values = want.view(-1), p.data.view(-1)
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                values[i] += sign * step
                ends.append(float((term.kernel_reference().detach() * gate * G).sum()))
                values[i] -= sign * step
            flat[i] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mixed", [False, True], ids=["snell", "snella"])
@pytest.mark.parametrize("s", [0.0, 0.1, 0.5, 0.9, 0.995, 0.99999])
def test_share_of_zeros(s, mixed):
    """s of the entries, within one."""
    for seed, (out, inp) in enumerate([(24, 20), (96, 31), (17, 130)]):
        term = KernelDelta(place(out, inp), 8, s, mixed)
        torch.nn.init.normal_(term.A, std=0.1 + seed)
        zeros = int((term.dense() == 0).sum())
        assert abs(zeros - s * out * inp) <= 1
        assert term.nnz() == out * inp - zeros
        panel = term.tile(0, inp, term.prepare())
        assert int((panel == 0).sum()) == zeros


def test_a_kernel_has_full_rank_where_a_chain_has_its_own():
    """768 x 768 at rank 8: at least 760 against 8, at equal numbers of parameters."""
    torch.manual_seed(0)
    snell = KernelDelta(place(768, 768), 8, 0.0, mixed=False)
    lora = Chain(place(768, 768), 8)
    torch.nn.init.normal_(lora.B)
    assert sum(p.numel() for p in snell.parameters()) == sum(p.numel() for p in lora.parameters())
    K = snell.double().kernel_reference().detach()
    assert int(torch.linalg.matrix_rank(K)) >= 760
    assert int(torch.linalg.matrix_rank(lora.double().dense().detach())) == 8
    # the size at the start, as the authors' initialisation has it
    assert float(K.square().mean().sqrt()) == pytest.approx(1.28e-3, rel=0.1)
    assert float((K * K.abs()).square().mean().sqrt()) == pytest.approx(2.7e-6, rel=0.2)


@pytest.mark.parametrize("rank, rms", [(8, 5.2e-6), (32, 2.6e-6)])
def test_the_mixed_kernel_starts_small(rank, rms):
    """768 x 768: mean K 1.3e-3 (one over out), and the rms of Delta."""
    torch.manual_seed(0)
    term = KernelDelta(place(768, 768), rank, 0.0, mixed=True)
    K = term.kernel_reference().detach()
    assert float(K.mean()) == pytest.approx(1.3e-3, rel=0.05)
    assert float((K * K.abs()).square().mean().sqrt()) == pytest.approx(rms, rel=0.06)


def kept_bytes(out, mixed):
    kept = []
    term = KernelDelta(place(out, 32), 8, 0.5, mixed)
    W, x = torch.randn(out, 32), torch.randn(6, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t,
                                                  lambda t: t):
        y = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
    held = [v for s in y.grad_fn.states for v in (s.tau, s.panel) if v is not None]
    return sum(kept), sum(v.nbytes for v in held)


@pytest.mark.parametrize("mixed", [False, True], ids=["snell", "snella"])
def test_kept_bytes_do_not_grow_with_the_matrix(mixed):
    """x and one number, whatever the width of the output."""
    assert kept_bytes(16, mixed) == kept_bytes(1024, mixed) == (6 * 32 * 4, 4)


def test_a_zero_distance_has_no_gradient():
    term = kernel(6, 5, mixed=False, s=0.0)
    with torch.no_grad():
        term.B[0, 2] = term.A[0, 3]
        term.B[1, 2] = term.A[1, 3]
    G = torch.zeros(6, 5, dtype=torch.float64)
    G[2, 3] = 1.0
    grads = [None, None]
    term.pull(0, 5, G, term.prepare(), grads)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    ref = torch.autograd.grad((term.dense() * G).sum(), [term.A, term.B])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in ref)


def test_distances_are_direct_differences():
    """Close, long factors: the Gram form would lose all digits of their distance in fp32."""
    term = KernelDelta(place(300, 300), 8, 0.0, mixed=False, magnitude="linear")
    with torch.no_grad():
        for p in (term.A, term.B):
            p.mul_(1e-3).add_(1.0)
    got = term.tile(0, 300, term.prepare()).double()
    want = formula(term.A.double(), term.B.double(), 0.0, linear_form=True).detach()
    assert float((got - want).norm() / want.norm()) < 1e-3


def test_the_sparsity_travels_with_the_tensors():
    term, other = kernel(s=0.25), kernel(s=0.6)
    other.load_state_dict(term.state_dict())
    assert other.sparsity == 0.25


def test_a_half_precision_base_still_feels_small_entries():
    """Entries far below the base's spacing act on the output: they meet x, not the weight."""
    torch.manual_seed(0)
    term = KernelDelta(place(64, 64), 8, 0.0, mixed=False)     # entries of about 1e-4
    W = torch.full((64, 64), 4.0, dtype=torch.bfloat16)        # spacing 2^-5
    x = torch.zeros(2, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        x[0, :2] = torch.tensor([1.0, -1.0])                   # the base's own part cancels
    y = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
    want = term.dense()[:, 0] - term.dense()[:, 1]
    torch.testing.assert_close(y[0].float(), want, rtol=0.05, atol=1e-7)
    g = torch.zeros_like(y)
    g[0, :2] = torch.tensor([1.0, -1.0])
    (dx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(dx[0].float(), term.dense()[0] - term.dense()[1],
                               rtol=0.05, atol=1e-7)


@pytest.mark.slow
def test_a_matrix_of_seven_billion_models_trains_within_panels():
    """4096 x 11008 (beyond what torch.quantile takes): no storage near in x out ever exists."""
    out, inp, tokens = 11008, 4096, 4
    torch.manual_seed(0)
    term = KernelDelta(place(out, inp), 8, 0.5, mixed=True)
    W = torch.randn(out, inp) * 0.02
    x = torch.randn(tokens, inp, requires_grad=True)
    with Ledger() as ledger:
        ledger.watch("weights", [W, x, *term.parameters()])
        y = linear(x, Weighted(lambda: W, [(term, 1.0)]), None)
        y.square().sum().backward()
    made = [e for e in ledger.entries if e.category != "weights"]
    assert max(e.bytes for e in made) <= 4 * panels.PANEL
    assert peak_bytes(made, ledger.now + 1) < 5 * 4 * panels.PANEL < 4 * out * inp
    zeros = out * inp - term.nnz()
    assert abs(zeros - out * inp // 2) <= 1
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in term.parameters())


def peak_bytes(entries, end):
    """Most bytes alive at once."""
    change = {}
    for e in entries:
        change[e.birth] = change.get(e.birth, 0) + e.bytes
        gone = end if e.death is None else e.death
        change[gone] = change.get(gone, 0) - e.bytes
    alive = [0]
    for event in sorted(change):
        alive.append(alive[-1] + change[event])
    return max(alive)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_device_is_given_few_operations_and_asked_for_nothing(mixed):          # findings 3.10
    """Each is a launch: K is made for two histograms and once for the panels, in long strips. A
    tensor on meta has no value: whatever asks for one raises."""
    term = kernel(4096, 4096, rank=16, mixed=mixed).float().to("meta")
    W, x = torch.empty(4096, 4096, device="meta"), torch.empty(512, 4096, device="meta")
    for p in term.parameters():
        p.requires_grad_()
    with Ran() as forward:
        y = linear(x.requires_grad_(), Weighted(lambda: W, [(term, 1.0)]), None)
    with Ran() as backward:
        y.backward(torch.empty_like(y))
    strips = 4096 * 4096 // tiled.LONG_STRIP
    assert forward.names.count("_cdist_forward") == 3 * 2 * strips
    assert backward.names.count("_cdist_forward") == 2 * strips
    assert len(forward.names) < 1300 and len(backward.names) < 1600
