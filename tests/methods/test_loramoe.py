"""LoRAMoE: the mixture and its balance against the equations, padding, halves, counts."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.weight.experts import DenseChains, localised
from burnish.engine.slot import slots
from burnish.testing.models import tiny


def make(recipe, model="llama", **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    tuned = burnish.tune(net, recipe, head=False)
    net.to(torch.float64)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.05)
    return tuned, batch


def parts(tuned):
    return {path: m for path, _, slot in slots(tuned.model) for m in slot.modules()
            if isinstance(m, DenseChains)}


def imbalance(w, kinds, mask, pull, kind):
    """Var(I o Q) / Mean(I o Q)^2, or / Mean(I o Q), entry by entry; w (B, T, N)."""
    Z = []
    for b in range(w.shape[0]):
        for n in range(w.shape[2]):
            q = sum(w[b, t, n] for t in range(w.shape[1]) if mask[b, t])
            mine = (n < w.shape[2] / 2) == (int(kinds[b]) == 1)
            Z.append(q * ((1 + pull) if mine else (1 - pull)))
    mean = sum(Z) / len(Z)
    var = sum((z - mean) ** 2 for z in Z) / (len(Z) - 1)
    return var / (mean ** 2 + 1e-10) if kind == "cv2" else var / mean


@pytest.mark.parametrize("kind", ["cv2", "mean"])
@pytest.mark.parametrize("model, leaves, rel", [
    ("bert", {"dense"}, 1e-9), ("gpt2", {"c_fc", "c_proj"}, 1e-9),
    ("qwen_moe", {"gate_proj", "up_proj", "down_proj"}, 1e-5)])      # its norms are in fp32
def test_loss_and_gradients_are_the_equations(kind, model, leaves, rel):
    """Expert by expert through the untouched model, with beta times every router's imbalance;
    padding counts nowhere, in a shared expert's flattened tokens either."""
    tuned, batch = make("loramoe(experts=4, rank=2, alpha=6, pull=0.3, balance=0.7, "
                        f"imbalance='{kind}')", model)
    kinds, mask = torch.tensor([1, 0]), torch.ones_like(batch["input_ids"])
    mask[1, 5:] = 0
    batch["attention_mask"] = mask
    mine = parts(tuned)
    assert {p.rpartition(".")[2] for p in mine} == leaves and not any("attn" in p for p in mine)
    base, extra = tiny(model, dtype=torch.float64)[0], []

    def stand(path, m):
        def hook(module, args, out):
            x = args[0]
            w = torch.softmax(x @ m.router.T, -1)
            extra.append(0.7 * imbalance(w.reshape(2, -1, 4), kinds, mask, 0.3, kind))
            return out + 3.0 * sum(w[..., n:n + 1] * (x @ m.A[n].T @ m.B[n].T) for n in range(4))
        base.get_submodule(path).register_forward_hook(hook)

    for path, m in mine.items():
        stand(path, m)

    def own(out, batch=None):                                # the library's is in fp32
        return (out.logits ** 2).mean()

    want, got = own(base(**batch)), tuned.loss({**batch, "sample_type": kinds}, own)
    torch.testing.assert_close(got, want, rtol=rel, atol=0)
    names, params = zip(*tuned.named_parameters(), strict=True)
    for n, a, b in zip(names, torch.autograd.grad(got, params),
                       torch.autograd.grad(want + sum(extra), params), strict=True):
        assert (a - b).abs().max() <= rel * b.abs().max(), n


def test_a_uniform_router_without_pull_is_balanced():
    p = torch.full((2, 5, 4), 0.25)
    assert localised(p, torch.tensor([1, 0]), 0.0) < 1e-12
    assert localised(p, torch.tensor([1, 0]), 0.1) > 1e-3


def test_the_ratio_does_not_grow_with_the_tokens_and_the_papers_does():
    g = torch.Generator().manual_seed(0)
    p, kinds = torch.rand(2, 5, 4, generator=g, dtype=torch.float64), torch.tensor([1, 0])
    long = p.repeat(1, 3, 1)
    torch.testing.assert_close(localised(long, kinds, 0.1), localised(p, kinds, 0.1))
    torch.testing.assert_close(localised(long, kinds, 0.1, form="mean"),
                               3 * localised(p, kinds, 0.1, form="mean"))


def test_a_stronger_pull_moves_mass_to_the_other_half():
    """Z is level where Q is larger in the half that I makes small: of two kinds of samples, told
    apart by their inputs, each ends with a share of (1 + pull) / 2 in the half that is not its."""
    shares = []
    kinds = torch.tensor([1, 0])
    x = torch.eye(2).repeat_interleave(4, 0).view(2, 4, 2)
    for pull in (0.1, 0.3):
        router = torch.zeros(4, 2, requires_grad=True)
        opt = torch.optim.Adam([router], lr=0.05)
        for _ in range(300):
            opt.zero_grad()
            localised(torch.softmax(x @ router.T, -1), kinds, pull).backward()
            opt.step()
        p = torch.softmax(x @ router.T, -1)
        shares.append(float(p[0, 0, 2:].sum().detach()))     # a sample of type 1, second half
    assert abs(shares[0] - 0.55) < 0.01 and abs(shares[1] - 0.65) < 0.01


def test_the_count_on_llama_7b(published):
    anatomy, _ = published("LlamaConfig", "LlamaForCausalLM")
    method = burnish.parse("loramoe")[0]
    with torch.device("meta"):
        made = list(method.mixture(anatomy))
    total = sum(p.numel() for b in made for p in b.module.parameters())
    assert total == 46_399_488 + 4_915_200 == 51_314_688
    assert len(made) == 32 * 3
    mlp = [p for p in anatomy.places if p.role in ("gate", "up", "down")]
    assert sum(method.count(p) for p in mlp) == total


def test_targets_narrow_it_within_the_mlps():
    tuned, _ = make("loramoe(rank=2, targets='down,q')")
    assert {p.rpartition(".")[2] for p in parts(tuned)} == {"down_proj"}
    with pytest.raises(burnish.TargetError, match="loramoe: targets 'q,v' name nothing it acts on"):
        burnish.tune(tiny("llama")[0], "loramoe(targets='q,v')")


def test_dropout_is_a_probability():
    with pytest.raises(burnish.RecipeError, match="loramoe: dropout is a probability"):
        burnish.parse("loramoe(dropout=1.0)")


@pytest.mark.parametrize("experts", [1, 3, 0])
def test_halves_need_an_even_number(experts):
    with pytest.raises(burnish.RecipeError, match="two halves; expected an even number"):
        burnish.tune(tiny("llama")[0], f"loramoe(experts={experts})")


def test_one_entry_for_a_flattened_batch_is_refused():
    tuned, batch = make("loramoe(rank=2)", "qwen_moe")
    with pytest.raises(burnish.RecipeError, match="give one entry per sample"):
        tuned.loss({**batch, "sample_type": 1})


def test_one_entry_serves_a_whole_batch():
    tuned, batch = make("loramoe(rank=2)", "bert")
    grads = [torch.autograd.grad(tuned.loss({**batch, "sample_type": k}), list(tuned.parameters()))
             for k in (1, torch.tensor([1, 1]))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_no_weight():
    with pytest.raises(burnish.CheckError, match="cannot merge.*loramoe"):
        make("loramoe(rank=2)")[0].merge()


def test_the_defaults_are_the_authors():
    m = burnish.parse("loramoe")[0]
    assert (m.experts, m.rank, m.alpha, m.dropout) == (8, 4, 32.0, 0.0)
    assert (m.pull, m.balance, m.imbalance) == (0.1, 0.1, "cv2")


def test_two_experts_are_two_halves():
    assert {m.A.shape[0] for m in parts(make("loramoe(experts=2, rank=2)")[0]).values()} == {2}


def test_the_type_of_a_sample_is_for_what_is_minimised():
    """An answer needs none; a loss does, unless nothing is balanced."""
    tuned, batch = make("loramoe(rank=2)", "bert")
    with torch.no_grad():
        tuned.model.eval()(**batch)
    tuned.model.train()
    with pytest.raises(burnish.RecipeError, match="sample_type"):
        tuned.loss(batch)
    tuned, batch = make("loramoe(rank=2, balance=0.0)", "bert")
    assert tuned.loss(batch).requires_grad


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_is_on_the_input_of_the_experts(p):
    """Evaluation drops nothing; training does, by the share asked for."""
    tuned, batch = make(f"loramoe(rank=2, balance=0.0, dropout={p})", "bert")
    torch.manual_seed(0)
    a = tuned.model.train()(**batch).logits
    torch.manual_seed(1)
    b = tuned.model(**batch).logits
    assert torch.equal(a, b) == (p == 0)


def phi3():
    """A gated MLP whose first two matrices are one linear: rows 0 to 47 gate, 48 to 95 up."""
    import transformers

    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=32, original_max_position_embeddings=32))


@pytest.mark.parametrize("targets, named", [("gate", {0}), ("up", {1}), ("gate,up", {0, 1}),
                                            ("gate_up", {0, 1}), (None, {0, 1})])
def test_a_part_of_a_fused_linear_is_that_part(targets, named):
    """What targets name gets y + s sum_n w_n B_n A_n x; the other rows are the base's."""
    net = phi3().double()
    fused = net.model.layers[0].mlp.gate_up_proj
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    base = fused(x).detach()
    tuned = burnish.tune(net, "loramoe(experts=2, rank=2, alpha=6, balance=0)", head=False,
                         targets=targets)
    net.double()
    experts = parts(tuned)
    assert {p.rpartition(".")[2] for p in experts} == \
        ({"gate_up_proj"} if targets else {"gate_up_proj", "down_proj"})
    m = experts["model.layers.0.mlp.gate_up_proj"]
    with torch.no_grad():
        m.B.normal_(0, 0.3)
        w = torch.softmax(x @ m.router.T, -1)
        update = 3 * sum(w[..., n:n + 1] * (x @ m.A[n].T @ m.B[n].T) for n in range(2))
        want = base.clone()
        want[..., 48 * min(named):48 * max(named) + 48] += update
        torch.testing.assert_close(fused(x), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("balance, numbers", [(0.0, 1), (0.1, 2)])
def test_what_waits_for_backward_is_what_it_says(balance, numbers, kept):
    """Per token and expert `rank` numbers and a weight, two where the balance rides on it."""
    found = []
    for experts in (2, 6):
        net, batch = tiny("bert", batch=8)
        batch["input_ids"] = batch["input_ids"].repeat(1, 4)          # few samples beside tokens
        tuned = burnish.tune(net, f"loramoe(rank=3, experts={experts}, balance={balance})",
                             targets="fc1", head=False)
        found.append(kept(tuned, {**batch, "sample_type": torch.tensor([0, 1] * 4)}))
        assert tuned.recipe.named("loramoe").per_token(None) == experts * (3 + numbers)
    tokens, layers = batch["input_ids"].numel(), 2
    more = (found[1] - found[0]) / (tokens * layers * 4)
    assert more == pytest.approx(4 * (3 + numbers), rel=0.02)
