"""DynMoLE: who answers, the entropy, the loss of the routers, against the equations."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.weight.entropic import EntropicChains, chosen, highest, tsallis
from burnish.core.call import Call, resume
from burnish.core.site import Place
from burnish.testing import stir, tiny


def make(recipe, model="vit", **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    tuned = burnish.tune(net, recipe, head=False)
    net.double()
    return stir(tuned, size=0.4), batch


def entropy(p, q):
    if q <= 1:
        p = [x.clamp_min(1e-5) for x in p]
    if q == 1:
        return -sum(x * x.log() for x in p)
    return (1 - sum(x ** q for x in p)) / (q - 1)


def weights(p, q, uncertain, top_p, always):
    """Of one token: a list of its experts' weights."""
    if float(entropy(p.detach(), q)) > uncertain:
        return list(p)
    order = sorted(range(len(p)), key=lambda e: -float(p[e].detach()))
    total, inside = 0.0, set(order[:always])
    for e in order:
        total += float(p[e].detach())
        if total <= top_p:
            inside.add(e)
    return [p[e] if e in inside else 0 * p[e] for e in range(len(p))]


@pytest.mark.parametrize("q, uncertain, top_p, always", [
    (1.1, 0.9, 0.75, 2), (1.0, 1.0, 0.9, 1), (2.0, 0.6, 0.8, 1), (0.5, 1.2, 0.5, 3)])
def test_loss_and_gradients_are_the_equations(q, uncertain, top_p, always):
    """Token by token through the untouched model; of the three ways a router may answer all occur.
    The loss of the routers is the mean over them, and padding counts nowhere."""
    model = "llama" if q == 1.1 else "vit"
    tuned, batch = make("dynmole(rank=2, alpha=6.0, experts=4, dropout=0.0, targets='q,"
                        f"{'down' if model == 'llama' else 'fc1,fc2'}', balance=0.7, "
                        f"entropy=0.3, index={q}, uncertain={uncertain}, top_p={top_p}, "
                        f"always={always})", model)
    mine = dict(tuned.branches(EntropicChains))
    with torch.no_grad():
        for m in mine.values():
            m.router.mul_(2.5)
    mask = None
    if q == 1.1:
        mask = batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        mask[1, 5:] = 0
    base, extra, seen = tiny(model, dtype=torch.float64)[0], [], set()

    def stand(path, m):
        def hook(module, args, out):
            x = args[0]
            y, ps, ws = torch.zeros_like(out), [], []
            for b in range(len(x)):
                for t in range(x.shape[1]):
                    p = torch.softmax(m.router @ x[b, t], 0)
                    w = weights(p, q, uncertain, top_p, always)
                    seen.add(sum(float(v.detach()) > 0 for v in w))
                    y[b, t] = 3.0 * sum(w[e] * (m.B[e] @ (m.A[e] @ x[b, t])) for e in range(4))
                    if mask is None or mask[b, t]:
                        ps.append(p)
                        ws.append(torch.stack(w))
            S = sum(entropy(p, q) for p in ps) / len(ps)
            even = 4 * sum(torch.stack(ws).mean(0) * torch.stack(ps).mean(0))
            extra.append(0.3 * S + 0.7 * even)
            return out + y
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)

    def own(out, batch=None):
        return (out.logits ** 2).mean()

    want, got = own(base(**batch)), tuned.loss(batch, own)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=0)
    assert 4 in seen and len(seen) > 1
    names, params = zip(*tuned.named_parameters(), strict=True)
    for n, a, b in zip(names, torch.autograd.grad(got, params),
                       torch.autograd.grad(want + sum(extra) / len(extra), params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def test_a_router_that_knows_nothing_asks_all_and_one_that_is_sure_the_first():
    even, sure = torch.full((1, 8), 1 / 8), torch.eye(8)[3:4]
    assert chosen(even, 1.1, 0.9, 0.75, 2).all()
    assert chosen(sure, 1.1, 0.9, 0.75, 2).nonzero()[:, 1].tolist() == [0, 3]
    assert chosen(sure, 1.1, 0.9, 0.75, 1).nonzero()[:, 1].tolist() == [3]


def test_the_one_that_crosses_stays_out_and_all_of_the_mass_is_all():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert chosen(p, 1.0, 9.0, 0.75, 1).tolist() == [[False, True, False, True]]
    assert chosen(p, 1.0, 9.0, 0.74, 1).tolist() == [[False, True, False, False]]
    assert chosen(p, 1.0, 9.0, 0.74, 3).tolist() == [[False, True, True, True]]
    over = next(p for seed in range(99) if (p := torch.randn(
        1, 8, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        ).sort(descending=True).values.cumsum(-1)[0, -1] > 1)
    assert chosen(over, 1.0, 9.0, 1.0, 1).all()         # a sum of all that was rounded up


def test_the_entropy_its_limit_and_its_largest_value():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    for q in (0.5, 1.1, 2.0):
        torch.testing.assert_close(tsallis(p, q), (1 - (p ** q).sum()) / (q - 1))
    shannon = -(p * p.log()).sum()
    torch.testing.assert_close(tsallis(p, 1.0), shannon)
    assert abs(float(tsallis(p, 1.0001) - shannon)) < 1e-4
    assert [round(highest(8, q), 3) for q in (1, 1.1, 1.5, 2)] == [2.079, 1.877, 1.293, 0.875]
    assert float(tsallis(torch.eye(4)[0], 1.1)) == 0
    for q in (0.5, 1.0, 1.1):
        x = torch.tensor([200.0, 0.0, -200.0], requires_grad=True)
        tsallis(x.softmax(0), q).backward()
        assert x.grad.isfinite().all()


def test_the_entropy_term_sharpens():
    x = torch.tensor([0.2, 0.0, -0.1, 0.1], requires_grad=True)
    before = x.detach().softmax(0).max()
    for _ in range(60):
        (g,) = torch.autograd.grad(tsallis(x.softmax(0), 1.1), x)
        with torch.no_grad():
            x -= g
    assert x.detach().softmax(0).max() > before + 0.3


@pytest.mark.parametrize("tokens", [0, 1])
def test_the_means_are_over_the_tokens_that_count(tokens):
    m = EntropicChains(6, 6, 4, 2, q=1.1, threshold=0.9, top_p=0.5, always=1, entropy=0.7,
                       balance=0.3)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    valid = torch.zeros(2, 5, dtype=torch.long)
    valid[1, :tokens] = 1
    with resume(Call(valid=valid)):
        got = m.imbalance(*m.gates(x), x)
    p, g = (t[1, 0] for t in m.gates(x))
    want = 0.7 * tsallis(p, 1.1) + 0.3 * 4 * (p * g).sum()
    torch.testing.assert_close(got, want if tokens else torch.zeros(()))


def test_terms_alone_and_neither():
    """Each weight has its own term; with both at 0 nothing rides on the loss."""
    parts = {}
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    for b, e in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        torch.manual_seed(0)
        m = EntropicChains(6, 6, 4, 2, q=1.1, threshold=0.9, top_p=0.5, always=1, entropy=e,
                           balance=b, share=0.5)
        parts[b, e] = m.imbalance(*m.gates(x), x)
        assert m.coefficient == 0.5
    torch.testing.assert_close(parts[2.0, 3.0], 2 * parts[1.0, 0.0] + 3 * parts[0.0, 1.0])
    assert EntropicChains(6, 6, 4, 2, q=1.1, threshold=0.9, top_p=0.5, always=1, entropy=0.0,
                          balance=0.0).coefficient == 0


def test_start_count_and_defaults(published):
    net, batch = tiny("vit")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "dynmole(rank=4)", head=False)
    assert torch.equal(net(**batch).logits, want)
    for _, m in tuned.branches(EntropicChains):
        for t in (m.A, m.router):
            assert 0.8 < float(t.detach().abs().max()) * t.shape[-1] ** 0.5 <= 1
    (m,) = burnish.parse("dynmole")
    assert m.settings() == {
        "targets": None, "rank": 8, "alpha": 16.0, "experts": 8, "top_p": 0.75, "always": 2,
        "uncertain": 0.9, "index": 1.1, "dropout": 0.05, "balance": 1e-3, "entropy": 1e-2}
    anatomy, _ = published("LlamaConfig", "LlamaForCausalLM")
    with torch.device("meta"):
        made = list(m.mixture(anatomy))
    ends = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    per = [8 * (8 * (i + o) + i) for i, o in ends]
    assert [m.count(Place("a", "weight", "linear", o, i)) for i, o in ends] == per
    assert sum(p.numel() for b in made for p in b.module.parameters()) == 32 * sum(per)
    assert {b.module.coefficient for b in made} == {1 / 224}


@pytest.mark.parametrize("settings", [
    "index=2.0", "uncertain=1.9", "uncertain=-0.1", "always=0", "always=9", "top_p=0.0",
    "top_p=1.1", "index=0.0", "balance=-1.0", "entropy=-1.0", "rank=0", "dropout=1.0"])
def test_what_cannot_act_is_refused(settings):
    """An entropy that is never reached, say: 0.9 of 8 experts is above 0.875, which q = 2 has."""
    with pytest.raises(burnish.RecipeError, match="^dynmole"):
        burnish.parse(f"dynmole({settings})")
    assert burnish.parse("dynmole(index=2.0, uncertain=0.87, always=8, top_p=1.0, balance=0.0)")
    assert burnish.parse("dynmole(experts=1, always=1)") and burnish.parse("dynmole(rank=1)")


def test_ranks_and_targets():
    with pytest.raises(burnish.RecipeError, match="rank 40 does not fit"):
        burnish.tune(tiny("vit")[0], "dynmole(rank=40)")
    tuned = burnish.tune(tiny("gpt2")[0], "dynmole(rank=2, targets='q,v')", head=False)
    assert {m.rows for _, m in tuned.branches(EntropicChains)} == {((0, 32), (64, 96))}
