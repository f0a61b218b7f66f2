"""Hydra: a head of the input and a head of the result, their equation, their fold into W and b."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.heads import Head
from burnish.core.errors import CheckError, RankError
from burnish.core.site import Place
from burnish.testing import follows, stir, tiny


def made(settings, inp=12, out=9, bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out, bias=bias)).double()
    tuned = burnish.tune(model, f"hydra({settings})", head=False, targets="0")
    heads = {m.of: m.double() for _, m in tuned.branches(Head)}
    return model, stir(tuned, size=0.5), heads


@pytest.mark.parametrize("of", ["both", "input", "output"])
@pytest.mark.parametrize("biases", [False, True])
def test_outputs_gradients_and_the_merge_are_those_of_the_equation(of, biases):
    """y = f + s B_p (A_p x + a_p) + s b_p + s B_s (A_s f + a_s) + s b_s, f = W x + b."""
    ranks = {"both": "rank=3, sequential=2", "input": "rank=3, sequential=0",
             "output": "rank=0, sequential=2"}[of]
    model, tuned, heads = made(f"{ranks}, scale=0.7, bias={biases}")
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    assert set(heads) == ({"input", "output"} if of == "both" else {of})
    letters = [t for h in heads.values() for t in
               (h.down.weight, h.up.weight, *((h.down.bias, h.up.bias) if biases else ()))]
    each = 4 if biases else 2

    def equation(x, *theta):
        f = F.linear(x, W, b)
        y = f
        for k, of in enumerate(heads):
            A, B, *rest = theta[k * each:(k + 1) * each]
            h = f if of == "output" else x
            a, c = rest or (0, 0)
            y = y + 0.7 * ((h @ A.T + a) @ B.T + c)
        return y

    follows(tuned, equation, letters, (5, 3, 12))


def test_the_sequential_update_lies_in_the_rows_of_w():
    """Its columns span those of B_s, its rows are combinations of W's."""
    model, tuned, heads = made("rank=0, sequential=2", inp=12, out=4)
    W = model[0].weight.detach().clone()
    head = heads["output"]
    update = tuned.merge()[0].weight.detach() - W
    assert torch.linalg.matrix_rank(update) == 2

    def within(basis, x):
        return torch.linalg.matrix_rank(torch.cat([basis, x], 1)) == torch.linalg.matrix_rank(basis)
    assert within(head.up.weight.detach(), update) and within(W.T, update.T)
    tuned.unmerge()
    model, tuned, _ = made("rank=2, sequential=0", inp=12, out=4)
    W = model[0].weight.detach().clone()
    assert not within(W.T, (tuned.merge()[0].weight.detach() - W).T)


def test_without_the_sequential_head_it_is_a_lora():
    x = torch.randn(5, 12, dtype=torch.float64)
    model, _, heads = made("rank=3, sequential=0, scale=2.0")
    own = nn.Sequential(nn.Linear(12, 9)).double()
    own.load_state_dict({"0.weight": model[0].weight, "0.bias": model[0].bias})
    tuned = burnish.tune(own, "lora(rank=3, alpha=6)", head=False, targets="0")
    (_, chain), = tuned.terms(nn.Module)
    chain.double()
    with torch.no_grad():
        chain.A.copy_(heads["input"].down.weight)
        chain.B.copy_(heads["input"].up.weight)
    torch.testing.assert_close(model(x), own(x))


def test_the_sequential_head_reads_what_others_made_of_the_weight():
    """Beside a LoRA f is (W + B A) x + b, in the forward as in the merge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    tuned = burnish.tune(model, "hydra(rank=2, sequential=2) + lora(rank=2)", head=False,
                         targets="0")
    model.double()
    stir(tuned, size=0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    want = model(x).detach()
    torch.testing.assert_close(tuned.merge()(x), want)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("model, targets", [("timm_qkv", "q,v"), ("gpt2", "q,v"), ("gpt2", None),
                                            ("llama", None)])
def test_rows_of_a_fused_weight_read_and_write_themselves(model, targets, bias):
    """(in, out) storage too; other rows keep every bit."""
    net, batch = tiny(model, dtype=torch.float64)
    tuned = burnish.tune(net, f"hydra(rank=2, sequential=2, bias={bias})", head=False,
                         targets=targets)
    net.double().eval()
    stir(tuned, size=0.3)
    if targets:
        path, head = next((p, m) for p, m in tuned.branches(Head) if m.of == "output")
        f = torch.randn(3, 96, dtype=torch.float64)
        y = head(f)
        changed = torch.cat([f[:, :32], 0 * f[:, 32:64], f[:, 64:]], 1)
        assert not y[:, 32:64].any() and y[:, :32].all() and y[:, 64:].all()
        assert torch.equal(head(changed), y)
        was = net.get_submodule(path).weight.detach().clone()
    with torch.no_grad():
        want = net(**batch).logits
        got = tuned.merge()(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    if targets:
        now = net.get_submodule(path).weight.detach()
        now, was = (now, was) if model != "gpt2" else (now.T, was.T)
        assert torch.equal(now[32:64], was[32:64]) and not torch.equal(now[:32], was[:32])


def test_a_layer_without_a_bias_gains_one_where_the_head_has():
    model, tuned, heads = made("rank=2, sequential=2, bias=True", bias=False)
    x = torch.randn(5, 12, dtype=torch.float64)
    want = model(x).detach()
    torch.testing.assert_close(tuned.merge()(x), want)
    assert model[0].bias is not None
    tuned.unmerge()
    assert model[0].bias is None
    model, tuned, _ = made("rank=2, sequential=2", bias=False)
    tuned.merge()
    assert model[0].bias is None

    class Bare(nn.Module):
        weight = torch.zeros(9, 12, dtype=torch.float64)
    with pytest.raises(CheckError, match="cannot merge: Bare has no bias"):
        heads["input"].fold(Bare(), {})


def test_a_quantised_weight_is_decoded_for_the_merge():
    net, batch = tiny("llama", dtype=torch.float32)
    tuned = stir(burnish.tune(net, "nf4 + hydra(rank=2, sequential=2)", head=False),
                 size=0.2)
    net.eval()
    with torch.no_grad():
        want = net(**batch).logits
        torch.testing.assert_close(tuned.merge()(**batch).logits, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init, size", [("kaiming", 400**-0.5 / 3**0.5), ("normal", 0.02),
                                        ("xavier", (6 / 403)**0.5 / 3**0.5)])
def test_the_starts(init, size):
    model = nn.Sequential(nn.Linear(400, 3))
    torch.manual_seed(0)
    tuned = burnish.tune(model, f"hydra(rank=3, sequential=0, bias=True, init='{init}')",
                         head=False, targets="0")
    (_, head), = tuned.branches(Head)
    assert float(head.down.weight.detach().std()) == pytest.approx(size, rel=0.1)
    assert not head.up.weight.any() and not head.down.bias.any() and not head.up.bias.any()


def test_dropout_is_between_the_factors():
    model, _, heads = made("rank=3, sequential=2, dropout=0.5")
    assert {h.dropout for h in heads.values()} == {0.5}
    x = torch.randn(5, 12, dtype=torch.float64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_start_counts_and_defaults(published):
    net, batch = tiny("bert")
    net.eval()
    want = net(**batch).logits
    tuned = burnish.tune(net, "hydra")
    assert torch.equal(net(**batch).logits, want)
    assert {p for p, _ in tuned.branches(Head)} == \
        {f"bert.encoder.layer.{b}.output.dense" for b in (0, 1)}
    (m,) = burnish.parse("hydra")
    assert m.settings() == {"targets": None, "rank": 4, "sequential": 8, "scale": 1.0,
                            "dropout": 0.0, "bias": False, "init": "kaiming"}
    anatomy, _ = published("RobertaConfig", "RobertaForSequenceClassification")
    with torch.device("meta"):
        made = list(m.branch(anatomy))
    assert sum(p.numel() for b in made for p in b.module.parameters()) == 331_776
    assert 12 * m.count(Place("a", "weight", "linear", 768, 3072)) == 331_776
    (m,) = burnish.parse("hydra(rank=2, sequential=2, bias=True)")
    both = [Place("a", "weight", "linear", 768, n) for n in (768, 3072)]
    assert 12 * sum(map(m.count, both)) == 239_712
    for alone in ("rank=1, sequential=0", "rank=0, sequential=1"):
        (m,) = burnish.parse(f"hydra({alone}, bias=True)")
        assert m.count(both[0]) == 2 * 768 + 1 + 768


@pytest.mark.parametrize("settings", ["rank=0, sequential=0", "rank=-1", "sequential=-1",
                                      "dropout=1.0"])
def test_what_cannot_act_is_refused(settings):
    with pytest.raises(burnish.RecipeError, match="^hydra"):
        burnish.parse(f"hydra({settings})")
    assert burnish.parse("hydra(rank=1, sequential=0)") and burnish.parse(
        "hydra(rank=0, sequential=1)")


def test_ranks_that_do_not_fit_are_refused():
    made("rank=9, sequential=9")
    with pytest.raises(RankError, match="hydra: rank 10 does not fit"):
        made("rank=10, sequential=0")
    with pytest.raises(RankError, match="sequential=10 does not fit the 9 results.*there is 9"):
        made("rank=0, sequential=10")
    with pytest.raises(RankError, match="sequential=40 does not fit the 32 results"):
        burnish.tune(tiny("timm_qkv")[0], "hydra(rank=0, sequential=40)", targets="v")
    with pytest.raises(burnish.RecipeError, match="hydra: none of the targets is one"):
        burnish.tune(tiny("mlp")[0], "hydra")
