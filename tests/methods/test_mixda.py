"""MixDA: domains beside an MLP's last linear, one weight a sample, and what is held as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.state.domains import Domains, last_token
from burnish.core.errors import RecipeError
from burnish.testing import stir, tiny

GENERAL = torch.tensor([1, 0, 1])
ENDS = {"bert": ("bert.encoder.layer.{}.output.dense", "bert.encoder.layer.{}.output.LayerNorm"),
        "vit": ("vit.layers.{}.mlp.fc2", None)}


def made(more="", model="bert", general=GENERAL, size=0.3, mask=None):
    net, batch = tiny(model, dtype=torch.float64, batch=3)
    base = copy.deepcopy(net).requires_grad_(False)
    tuned = burnish.tune(net, f"mixda(layers=(1,), hidden=8, dropout=0.0{more})", head=False)
    net.double()
    stir(tuned, size=size)
    if mask is not None:
        batch["attention_mask"] = mask
    if general is not None:
        batch["general"] = general
    return tuned, net, base, batch


def padding():
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:], mask[2, 1:] = 0, 0
    return mask


def mixture(m, u, own, valid=None, position=False):
    """Sample by sample: (what the linear gives, g)."""
    rows, gates = [], []
    for b in range(len(u)):
        at = u.shape[1] - 1 if valid is None or position else int(valid[b].nonzero()[-1])
        h = u[b, at]
        linears = [x for x in m.gate if isinstance(x, torch.nn.Linear)]
        for n, linear in enumerate(linears):
            h = (h.clamp_min(0) if n else h) @ linear.weight.T + linear.bias
        g = torch.exp(h - h.max())
        g = g / g.sum()
        out = g[-1] * own[b]
        for i, a in enumerate(m.adapters):
            z = F.gelu(u[b] @ a.down.weight.T + a.down.bias)
            out = out + g[i] * (z @ a.up.weight.T + a.up.bias)
        rows.append(out)
        gates.append(g)
    return torch.stack(rows), torch.stack(gates)


def listener(net):
    return next(m for m in net.modules() if isinstance(m, Domains))


def reference(net, base, batch, model, weight, **how):
    """(loss with what is held, the mixture's weights) of the untouched model with hooks."""
    m, seen = listener(net), {}
    end, norm = (p and p.format(1) for p in ENDS[model])

    def mix(module, args, out):
        seen["u"], seen["own"] = args[0], out
        seen["out"], seen["g"] = mixture(m, args[0], out, batch.get("attention_mask"), **how)
        return seen["out"]

    hooks = [base.get_submodule(end).register_forward_hook(mix)]
    where = base.get_submodule(norm or "vit.layers.1")

    def keep(module, args, out):
        y = out[0] if isinstance(out, tuple) else out
        delta = seen["out"] - seen["own"]
        other = y - delta if norm is None else F.layer_norm(
            args[0] - delta, y.shape[-1:], module.weight, module.bias, module.eps)
        each = (y - other.detach()).square().mean((1, 2))
        seen["keep"] = (each * batch["general"]).sum() / batch["general"].sum()

    hooks.append(where.register_forward_hook(keep))
    out = base(**{k: v for k, v in batch.items() if k != "general"})
    for h in hooks:
        h.remove()
    return out.loss + weight * seen["keep"], seen


@pytest.mark.parametrize("model", ["bert", "vit"])
@pytest.mark.parametrize("more, how", [("", {}), (", adapters=2, reduction=4", {}),
                                       (", weight=0.7", {}),
                                       (", pool='position'", {"position": True})])
def test_gradients_are_those_of_the_task_and_of_what_is_held(model, more, how):
    tuned, net, base, batch = made(more, model, mask=padding() if model == "bert" else None)
    tuned.optimizer()
    tuned.loss(batch).backward()
    loss, _ = reference(net, base, batch, model, tuned.recipe[0].weight, **how)
    names, params = zip(*tuned.named_parameters(), strict=True)
    for n, p, g in zip(names, params, torch.autograd.grad(loss, params), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")
        assert g.any(), n


def test_outputs_are_the_equations_and_the_gate_is_one_for_all_tokens():
    tuned, net, base, batch = made(", adapters=3", mask=padding())
    _, seen = reference(net, base, batch, "bert", 1.0)
    m = listener(net)
    u = seen["u"]
    end = net.get_submodule(ENDS["bert"][0].format(1))
    with tuned.given(general=GENERAL):
        torch.testing.assert_close(net(**batch).logits, base_with(m, base, batch))
    g = seen["g"]
    assert g.shape == (3, 4) and torch.allclose(g.sum(1), torch.ones(3).double())
    own = u @ end.weight.T + end.bias
    with torch.no_grad():                        # each token's output is the same convex mixture
        parts = torch.stack([*(a.dense(u) for a in m.adapters), own], -1)
    torch.testing.assert_close((parts * g[:, None, None]).sum(-1), seen["out"])


def base_with(m, base, batch):
    hook = base.get_submodule(ENDS["bert"][0].format(1)).register_forward_hook(
        lambda mod, args, out: mixture(m, args[0], out, batch["attention_mask"])[0])
    out = base(**{k: v for k, v in batch.items() if k != "general"}).logits
    hook.remove()
    return out


def test_the_last_token_that_is_no_padding():
    u = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(last_token(u, None), u[:, 2])
    left = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert torch.equal(last_token(u, left), torch.stack([u[0, 2], u[1, 1]]))


def test_a_gate_that_is_all_the_original_holds_everything():
    tuned, net, base, batch = made()
    m = listener(net)
    with torch.no_grad():
        m.gate[-1].weight.zero_()
        m.gate[-1].bias.copy_(torch.tensor([-1e9, 0.0]))
    loss, seen = reference(net, base, batch, "bert", 2.0)
    assert float(seen["keep"]) == 0 and torch.equal(seen["g"][:, 1], torch.ones(3).double())
    tuned.optimizer()
    net.eval()
    torch.testing.assert_close(net(**batch).logits,
                               base(**{k: v for k, v in batch.items() if k != "general"}).logits)
    tuned.loss(batch).backward()
    assert all(p.grad is None or not p.grad.any() for n, p in tuned.named_parameters()
               if ".adapters." in n)


def test_without_general_text_nothing_is_held():
    ends = []
    for general, more in ((torch.zeros(3, dtype=torch.long), ""), (None, ", weight=0.0")):
        tuned, _, _, batch = made(more, general=general)
        tuned.optimizer()
        tuned.loss(batch).backward()
        ends.append([p.grad for p in tuned.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_each_stage_trains_what_it_is_for(tmp_path):
    tuned, net, _, batch = made(", adapters=2")
    assert {n.split(".mixda.")[1].split(".")[0] for n, _ in tuned.named_parameters()} == \
        {"adapters", "gate"}
    kept = {n: t.clone() for n, t in listener(net).state_dict().items()}
    tuned.recipe[0].lifecycle(tuned, "job", "pfeiffer(reduction=8)")
    net.double()
    names = {n for n, _ in tuned.named_parameters()}
    assert names and not [n for n in names if ".adapters." in n or ".default." in n]
    assert any(".mixda.gate." in n for n in names) and any(".pfeiffer." in n for n in names)
    del batch["general"]                         # no key is read any more
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    own = next(m for m in net.modules() if isinstance(m, Domains) and m.adapter == "job")
    for n, t in own.state_dict().items():
        assert torch.equal(t, kept[n].float().double()) == n.startswith("adapters"), n
    net.eval()
    want = net(**batch).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("bert", dtype=torch.float64)[0].eval(), tmp_path / "a")
    again.model.eval()
    torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-5, atol=1e-6)


def test_without_a_gate_the_adapter_stands_in_the_place_of_the_linear():
    tuned, net, base, batch = made(", gated=False, weight=0.0", general=None)
    m = listener(net)
    hook = base.get_submodule(ENDS["bert"][0].format(1)).register_forward_hook(
        lambda mod, args, out: m.adapters[0].dense(args[0]))
    torch.testing.assert_close(net(**batch).logits, base(**batch).logits)
    hook.remove()
    assert tuned.recipe[0].count(64, 32) == sum(p.numel() for p in tuned.parameters())


def test_its_settings_and_the_least_width():
    told = burnish.parse("mixda")[0].settings()
    assert told == {"targets": None, "layers": (7,), "adapters": 1, "reduction": 1, "gated": True,
                    "hidden": 768, "dropout": 0.2, "lean": 0.0, "pool": "token", "weight": 2.0,
                    "learns": "domain"}
    _, net, _, _ = made(", reduction=64")
    assert listener(net).adapters[0].down.weight.shape[0] == 1


def test_general_text_is_of_training_alone():
    tuned, net, base, batch = made(general=None)
    net.eval()
    assert net(**batch).logits.shape == base(**batch).logits.shape
    tuned.optimizer()
    net.train()
    with pytest.raises(burnish.BurnishError, match="general"):
        tuned.loss(batch)


def test_domains_go_on_without_anything_beside_them():
    tuned, net, _, batch = made()
    tuned.recipe[0].lifecycle(tuned, "job")
    assert {n.split(".mixda.")[1].split(".")[0] for n, _ in tuned.named_parameters()} == {"gate"}


def test_the_start():
    _, net, base, batch = made(", lean=3.0", size=0.0)
    m = listener(net)
    assert not m.adapters[0].up.weight.any() and not m.adapters[0].down.bias.any()
    assert m.adapters[0].down.weight.abs().max() <= 64 ** -0.5
    assert float(m.gate[-1].bias[-1]) > 2
    _, seen = reference(net, base, batch, "bert", 2.0)
    torch.testing.assert_close(seen["out"], seen["g"][:, 1:, None] * seen["own"])


def test_the_counts_of_roberta_large():
    m = burnish.parse("mixda")[0]
    assert m.count(4096, 1024) == 20_976_640 + 4_329_218
    tuned, *_ = made(", adapters=2, reduction=4")
    assert sum(p.numel() for p in tuned.parameters()) == tuned.recipe[0].count(64, 32)


@pytest.mark.parametrize("text, why", [
    ("mixda(adapters=0)", "at least 1"), ("mixda(layers=())", "each once"),
    ("mixda(layers=(1, 1))", "each once"),
    ("mixda(gated=False, adapters=2)", "several need a gate"),
    ("mixda(weight=-1.0)", "at least 0"), ("mixda(dropout=1.0)", "below 1"),
    ("mixda(layers=(7,))", "blocks 0 to 1"),
    ("mixda(layers=(0,)) + mixda(layers=(1,))", "linear"),
    ("mixda(layers=(0,), targets='q')", "no targets")])
def test_what_cannot_act_is_refused(text, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.tune(tiny("bert")[0], text, head=False)


def test_domains_that_were_never_learnt_are_refused():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "mixda(layers=(1,), hidden=8, learns='task')", head=False)
    with pytest.raises(RecipeError, match="there are none"):
        tuned.loss(batch)


@pytest.mark.parametrize("model", ["llama", "t5", "mlp"])
def test_models_that_look_ahead_or_have_no_such_linear_are_refused(model):
    with pytest.raises(RecipeError, match="mixda needs"):
        burnish.tune(tiny(model)[0], "mixda(layers=(1,))", head=False)
