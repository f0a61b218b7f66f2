"""Arrow: tokens choose among low-rank updates by the direction that each reads most."""

from __future__ import annotations

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

import burnish
from burnish.blocks.weight.arrows import Arrows, direction
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.formats.peft import load_peft
from burnish.testing import stir, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def equation(m, x, k, temperature):
    """Token by token, expert by expert."""
    tokens, out = x.reshape(-1, x.shape[-1]), []
    for t in tokens:
        fit = [abs(float(v @ t)) for v in m.V.double()]
        best = sorted(range(len(fit)), key=lambda n: -fit[n])[:k]
        c = torch.stack([(m.V[n].double() @ t).abs() / temperature for n in best])
        w = c.exp() / c.exp().sum()
        out.append(m.scale * sum(w[i] * (m.B[n] @ (m.A[n] @ t)) for i, n in enumerate(best)))
    return torch.stack(out).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("model, k, temperature", [("vit", 2, 1.0), ("gpt2", 3, 0.3)])
def test_the_equation_written_out(model, k, temperature):
    net, batch = tiny(model, dtype=torch.float64)
    batch.pop("labels", None)
    tuned = burnish.tune(net, f"arrow(rank=2, alpha=3.0, experts=4, k={k}, "
                              f"temperature={temperature})", head=False)
    net.double().eval()
    stir(tuned, size=0.5)
    base = tiny(model, dtype=torch.float64)[0].eval()
    for path, m in tuned.branches(Arrows):
        assert m.scale == 1.5
        base.get_submodule(path).register_forward_hook(
            lambda module, args, out, m=m: out + equation(m, args[0], k, temperature))
    want, got = base(**batch).logits, tuned.model(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    names, params = zip(*tuned.named_parameters(), strict=True)
    g = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for n, a, b in zip(names, torch.autograd.grad(got, params, g),
                       torch.autograd.grad(want, params, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


def test_a_direction_is_the_leading_one():
    A, B = torch.randn(3, 7).double(), torch.randn(5, 3).double()
    want = torch.linalg.svd(B @ A).Vh[0]
    got = direction(A, B)
    torch.testing.assert_close(got * torch.sign(got @ want), want)


def test_in_bf16_the_same_choice_gives_nearly_the_same():
    torch.manual_seed(0)
    m = stir(Arrows(16, 12, 3, 2, 3, 1.0, 1.0), size=0.5)
    x = torch.randn(4, 9, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        got, want = m(x), m(x.float())
    assert got.dtype == torch.bfloat16
    grads = [torch.autograd.grad(y.float().square().sum(), list(m.parameters()))
             for y in (got, want)]
    for a, b in ((got.float(), want), *zip(*grads, strict=True)):
        assert float((a - b).norm()) < 0.02 * float(b.norm())


def apart(folder, seed, rank=2, alpha=3, name="llama", **more):
    """A LoRA of PEFT's whose leading value stands well above the next, so that its few steps of a
    power iteration are at the end."""
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=rank, lora_alpha=alpha, **more)
    theirs = stir(get_peft_model(tiny(name)[0], config), seed=seed, size=0.3)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_B" in n:
                p[:, 1:] *= 0.1
    theirs.save_pretrained(folder)
    return str(folder)


def outputs(model, batch):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


@pytest.mark.parametrize("general", [0, 2])
@pytest.mark.parametrize("k, temperature", [(2, 1.0), (1, 1.0), (3, 0.25)])
def test_a_library_of_peft_folders_answers_as_there(general, k, temperature, tmp_path):
    own = [apart(tmp_path / f"a{i}", i) for i in range(3)]
    common = [apart(tmp_path / f"g{i}", 7 + i) for i in range(general)]
    config = ArrowConfig(top_k=k, router_temperature=temperature, use_gks=bool(general), rng_seed=0)
    theirs = create_arrow_model(tiny("llama")[0], own, config, general_adapter_paths=common or None)
    model, batch = tiny("llama")
    base, want = outputs(model, batch), outputs(theirs, batch)
    tuned = load_peft(model, own[0], "a0")
    for folder in (*own[1:], *common):
        load_peft(tuned, folder, folder[-2:])
    part = parse(f"arrow(k={k}, temperature={temperature})")[0]
    part.lifecycle(tuned, "routed", ["a0", "a1", "a2"], [f"g{i}" for i in range(general)])
    got = outputs(model, batch)
    assert (want - base).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if general else 2e-6)
    tuned.save(tmp_path / "ours")
    again = burnish.load(tiny("llama")[0], tmp_path / "ours")
    again.use("routed")
    torch.testing.assert_close(outputs(again.model, batch), got)
    tuned.use("a1")
    assert not torch.equal(outputs(model, batch), got)


def test_ranks_and_scales_may_differ_and_one_source_is_itself(tmp_path):
    model, batch = tiny("llama")
    tuned = load_peft(model, apart(tmp_path / "a", 1, rank=2, alpha=5), "a")
    load_peft(tuned, apart(tmp_path / "b", 2, rank=4, alpha=3, use_rslora=True), "b")
    want = outputs(model, batch)
    part = parse("arrow")[0]
    part.lifecycle(tuned, "one", ["a"])
    torch.testing.assert_close(outputs(model, batch), want)
    part.lifecycle(tuned, "both", ["a", "b"])
    assert tuned.recipe[0].rank == 4 and tuned.recipe[0].experts == 2 and tuned.recipe[0].k == 2
    mine = dict(tuned.branches(Arrows))
    x = torch.randn(1, 3, 32)
    m = mine["model.layers.0.self_attn.q_proj"]
    assert m.scale == 1, "each source's own scale is in what it brings"
    w = m.weights(x)
    pairs = [(c.A, c.B, c.scale) for s in "ab" for n, c in tuned.terms(Chain, s)
             if n.startswith("model.layers.0.self_attn.q_proj")]
    want = sum(w[..., i:i + 1] * (x @ A.T @ B.T) * s for i, (A, B, s) in enumerate(pairs))
    torch.testing.assert_close(m(x), want, rtol=1e-5, atol=1e-6)


def test_what_fails_on_the_way_leaves_no_adapter(monkeypatch):
    model, batch = tiny("llama")
    tuned = stir(burnish.tune(model, "lora(rank=2, targets='q')", head=False))
    want = outputs(model, batch)

    def fails(self, updates):
        raise MemoryError

    monkeypatch.setattr(Arrows, "take", fails)
    with pytest.raises(MemoryError):
        parse("arrow")[0].lifecycle(tuned, "routed", ["default"])
    assert list(tuned.adapters) == ["default"] and torch.equal(outputs(model, batch), want)


def test_a_linear_outside_blocks_and_those_too_small_for_the_rank():
    tuned = burnish.tune(tiny("llama")[0], "arrow(rank=2, targets='lm_head,q@0')", head=False)
    assert {p for p, _ in tuned.branches(Arrows)} == {"lm_head", "model.layers.0.self_attn.q_proj"}
    tuned = burnish.tune(tiny("llama")[0], "arrow(rank=20)", head=False)
    assert "q_proj" in str(paths := [p for p, _ in tuned.branches(Arrows)])
    assert not [p for p in paths if p.endswith(("k_proj", "v_proj"))], "16 wide"
    assert any("4 of" in n and "rank" in n for n in tuned.active.notes)
    with pytest.raises(RecipeError, match="rank 20 does not fit"):
        burnish.tune(tiny("llama")[0], "arrow(rank=20, targets='k')", head=False)


def test_counts_defaults_and_refusals(tmp_path):
    m = parse("arrow")[0]
    assert m.settings() == {"targets": None, "rank": 8, "alpha": 8.0, "experts": 4, "k": 3,
                            "temperature": 1.0}
    assert m.count(Place("l", "weight", "linear", 24, 16)) == 4 * 8 * (24 + 16)
    tuned = burnish.tune(tiny("llama")[0], "arrow(rank=2, targets='q')")
    assert sum(p.numel() for p in tuned.parameters()) == 2 * 4 * 2 * (32 + 32)
    for recipe in ("arrow(k=5)", "arrow(k=0)", "arrow(rank=0)", "arrow(temperature=0.0)"):
        with pytest.raises(RecipeError, match="k from 1 to experts"):
            parse(recipe)
    model, batch = tiny("llama")
    tuned = stir(burnish.tune(model, "lora(rank=2, targets='q')"))
    tuned.add("other", "lora(rank=2, targets='v')")
    tuned.add("dora", "dora(rank=2, targets='q')")
    tuned.add("pissa", "pissa(rank=2, targets='q')")
    tuned.add("table", "lora(rank=2, targets='embedding')", head=False)
    tuned.add("larger", "lora(rank=3, targets='q')")
    tuned.add("more", "lora(rank=2, targets='q') + norms")
    want = outputs(model, batch)
    for sources, general, words in (
            ([], [], "at least one"), (["default", "other"], [], "'other' updates other linears"),
            (["dora"], [], "'dora' is, or has"), (["pissa"], [], "'pissa' is, or has"),
            (["table"], [], "'table' is, or has"), (["more"], [], "'more' is, or has"),
            (["default"], ["larger"], "have several ranks")):
        with pytest.raises(RecipeError, match=words):
            m.lifecycle(tuned, "routed", sources, general)
    with pytest.raises(ConfigError):
        m.lifecycle(tuned, "routed", ["nobody"])
    assert "routed" not in tuned.adapters
    assert torch.equal(outputs(model, batch), want)
