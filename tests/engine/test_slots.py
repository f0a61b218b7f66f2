"""What is added to one module, and that the module stays what it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.provided import Term
from burnish.engine.slot import slots
from burnish.engine.swap import ATTR
from burnish.testing import stir
from burnish.testing.models import tiny


def dense(tuned):
    """place name -> the update as a matrix."""
    out = {}
    for name, term in tuned.terms(Term):
        out[name] = out.get(name, 0) + term.dense().detach()
    return out


# -- identity ------------------------------------------------------------------------------------

def test_a_touched_module_keeps_its_class_its_names_and_its_parameters():
    class Own(nn.Linear):
        """A user's own linear."""

        extra = 7

    model = nn.Sequential(Own(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = [(type(m), type(m).__name__, type(m).__qualname__, type(m).__module__)
              for m in model]
    weights = [id(p) for p in model.parameters()]
    burnish.tune(model, "lora(rank=2)", targets="all", head=False)
    for m, (cls, name, qualname, module) in zip(model, before, strict=True):
        assert isinstance(m, cls)
        assert (type(m).__name__, type(m).__qualname__, type(m).__module__) == \
            (name, qualname, module)
    assert type(model[1]) is nn.ReLU, "what is not touched is not swapped"
    assert model[0].extra == 7 and type(model[0]).__doc__ == "A user's own linear."
    assert [id(p) for n, p in model.named_parameters() if ATTR not in n] == weights
    assert model[0].weight is dict(model.named_parameters())["0.weight"]
    assert len(model) == 3 and model.get_submodule("0") is model[0]


def test_new_names_are_below_one_child():
    model = nn.Sequential(nn.Linear(4, 4))
    burnish.tune(model, "lora(rank=2)", head=False)
    assert set(model.state_dict()) == {"0.weight", "0.bias", f"0.{ATTR}.default.lora.A",
                                       f"0.{ATTR}.default.lora.B"}


def test_several_parts_on_one_weight_have_their_own_names():
    model = nn.Sequential(nn.Linear(4, 4))
    tuned = burnish.tune(model, "lora(rank=2) + lora(rank=1) + miss(rank=2)", head=False)
    assert {n.split(".")[3] for n, _ in tuned.named_parameters()} == {"lora", "lora_2", "miss"}
    stir(tuned, size=0.1)
    x = torch.randn(3, 4)
    want = F.linear(x, model[0].weight + dense(tuned)["0.weight"], model[0].bias)
    torch.testing.assert_close(model(x), want)


def test_moving_and_casting_takes_everything_along():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    tuned = burnish.tune(model, "lora(rank=2, dropout=0.5)", head=False)
    stir(tuned, size=0.1)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    x = torch.randn(3, 4, dtype=torch.float64)
    model.eval()
    assert torch.equal(model(x), model(x)), "dropout of the update follows eval()"
    assert model.train()[0]._modules[ATTR].training


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "nf4 + lora(rank=2)"])
def test_a_new_module_of_the_same_class_is_a_plain_one(recipe):
    """Code that makes another ``type(module)(...)`` gets what it asks for."""
    model = nn.Sequential(nn.Linear(64, 64))
    burnish.tune(model, recipe, head=False)
    other = type(model[0])(64, 3)
    x = torch.randn(2, 64)
    assert torch.equal(other(x), F.linear(x, other.weight, other.bias))
    assert set(other.state_dict()) == {"weight", "bias"}


# -- every kind of call --------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", ["lora(rank=2)", "snella(rank=2)", "dora(rank=2)",
                                    "nf4 + lora(rank=2)"])
def test_a_linear_may_be_called_by_keyword(recipe):
    model = nn.Sequential(nn.Linear(64, 64))
    stir(burnish.tune(model, recipe, head=False), size=0.1)
    x = torch.randn(3, 64)
    assert torch.equal(model[0](input=x), model[0](x))


def test_an_embedding_and_its_lookup():
    model = nn.Sequential(nn.Embedding(10, 6, padding_idx=0))
    tuned = stir(burnish.tune(model, "lora(rank=2)", targets="embedding", head=False), size=0.1)
    index = torch.tensor([[0, 3, 3], [9, 1, 0]])
    want = F.embedding(index, model[0].weight + dense(tuned)["0.weight"].t())
    torch.testing.assert_close(model(index), want)
    torch.testing.assert_close(model[0](input=index), want)


def test_any_shape_of_input():
    model = nn.Sequential(nn.Linear(6, 4))
    tuned = stir(burnish.tune(model, "lora(rank=2)", head=False), size=0.1)
    W = model[0].weight + dense(tuned)["0.weight"]
    for shape in ((6,), (2, 6), (2, 3, 5, 6), (0, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias))
    x = torch.randn(6, 2, 5).permute(1, 2, 0)          # not contiguous
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias))


@pytest.mark.parametrize("conv", [
    nn.Conv1d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(4, 8, 3, groups=2),
    nn.Conv2d(4, 8, (1, 3), dilation=2, padding_mode="circular", padding=2), nn.Conv3d(4, 8, 2),
], ids=lambda c: str(c)[:30])
def test_a_convolution_on_its_effective_weight(conv):
    model = nn.Sequential(conv).double()
    tuned = stir(burnish.tune(model, "lora(rank=2) + snella(rank=2)", targets="conv"), size=0.1)
    for _, t in tuned.terms(Term):
        t.double()
    size = (2, 4, *[7] * (conv.weight.dim() - 2))
    x = torch.randn(size, dtype=torch.float64)
    plain = type(conv)(4, 8, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                       groups=conv.groups, padding_mode=conv.padding_mode).double()
    with torch.no_grad():
        plain.bias.copy_(conv.bias)
        plain.weight.copy_(conv.weight + dense(tuned)["0.weight"].view_as(conv.weight))
    torch.testing.assert_close(model(x), plain(x))


def test_gradients_of_a_convolution_equal_dense_autograd():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    tuned = stir(burnish.tune(model, "dora(rank=2)", targets="conv", head=False), size=0.1)
    for _, t in tuned.terms(Term):
        t.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    params = list(tuned.parameters())
    got = torch.autograd.grad(model(x).square().sum(), params)
    chain, magnitude = (t for _, t in tuned.terms(Term))
    V = model[0].weight.flatten(1) + chain.dense()
    W = (magnitude.m / V.norm(dim=1).detach())[:, None] * V
    y = F.conv2d(x, W.view(4, 3, 3, 3), model[0].bias)
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), params), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_reads_weights_past_its_children(train, batch_first):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=batch_first)})
    model.train(train)
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    plain.load_state_dict(model["attn"].state_dict())
    tuned = stir(burnish.tune(model, "lora(rank=2)", targets="q,v,o", head=False), size=0.1)
    names = [n for n, _ in tuned.terms(Term)]
    assert len(names) == 3
    updates = dense(tuned)
    with torch.no_grad():
        for n, d in updates.items():
            if "out_proj" in n:
                plain.out_proj.weight.add_(d)
            else:
                a = 0 if n.endswith("[q]") else 16
                plain.in_proj_weight[a : a + 8] += d
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(model["attn"](x, x, x)[0], plain(x, x, x)[0])


def test_the_fused_encoder_layer_does_not_bypass_the_update():
    """In eval mode torch would read the weights itself, in one kernel."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1)).eval()
    x = torch.randn(2, 5, 8)
    tuned = burnish.tune(model, "lora(rank=2)", head=False)
    with torch.no_grad():
        base = model(x)
        stir(tuned, size=0.1)
        assert not torch.allclose(model(x), base)
        torch.testing.assert_close(model(x), model.train()(x))
    assert torch.backends.mha.get_fastpath_enabled(), "and it is switched on again"


def test_rows_of_a_fused_weight_are_products_of_their_own():
    model, batch = tiny("timm_qkv")
    tuned = stir(burnish.tune(model, "lora(rank=2)", targets="k", head=False), size=0.1)
    qkv = model.blocks[0].attn.qkv
    (d,) = (v for n, v in dense(tuned).items() if n.startswith("blocks.0."))
    x = torch.randn(2, 5, 32)
    W = qkv.weight.detach().clone()
    W[32:64] += d
    torch.testing.assert_close(qkv(x), F.linear(x, W, qkv.bias))


def test_a_module_used_twice_gets_both_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return self.f(torch.tanh(self.f(x)))

    model = Twice().double()
    tuned = stir(burnish.tune(model, "lora(rank=2)", head=False), size=0.1)
    ((_, term),) = tuned.terms(Term)
    term.double()
    x = torch.randn(3, 4, dtype=torch.float64)
    got = torch.autograd.grad(model(x).square().sum(), list(tuned.parameters()))
    W = model.f.weight + term.dense()
    y = F.linear(torch.tanh(F.linear(x, W, model.f.bias)), W, model.f.bias)
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), list(tuned.parameters())),
                    strict=True):
        torch.testing.assert_close(a, b)


# -- what is left behind -------------------------------------------------------------------------

def test_an_effective_weight_stands_only_during_the_call():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    stir(burnish.tune(model, "lora(rank=2)", targets="conv", head=False), size=0.1)
    weight, seen = model[0].weight, []
    model[0].register_forward_hook(lambda m, a, y: seen.append(m.weight is weight))
    model(torch.randn(1, 3, 5, 5))
    assert model[0].weight is weight and seen == [True]
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 2, 5, 5))                 # wrong number of channels
    assert model[0].weight is weight and "weight" not in vars(model[0])


def test_a_forward_that_fails_leaves_the_tape_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tuned = stir(burnish.tune(model, "lora(rank=2)", head=False), size=0.1)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3))
    assert tuned.state.tape._here.depth == 0 and not tuned.state.tape._known
    model(torch.randn(2, 4)).sum().backward()


@pytest.mark.parametrize("kind", ["conv", "mha", "conv1d"])
def test_no_effective_weight_waits_for_backward(kind):
    """It is made again: what is kept holds nothing of a weight's size."""
    net, batch = tiny({"conv": "cnn", "mha": "encoder", "conv1d": "gpt2"}[kind])
    tuned = stir(burnish.tune(net, "snella(rank=2)", head=False), size=0.1)
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    tape, kept = tuned.state.tape, []
    pack = tape.policy.pack

    def see(t, role=None):
        if t.untyped_storage()._cdata not in own:
            kept.append(tuple(t.shape))
        return pack(t)

    tape.policy.pack = see
    tuned.loss(batch).backward()
    weights = {tuple(p.shape) for n, p in net.named_parameters() if p.dim() > 1 and ATTR not in n}
    assert kept and not weights & set(kept)


def test_hooks_run_once_and_see_the_modules_own_values():
    model = nn.Sequential(nn.Linear(4, 4))
    burnish.tune(model, "lora(rank=2)", head=False)
    calls = []
    model[0].register_forward_pre_hook(lambda m, a: calls.append(("pre", a[0].shape)))
    model[0].register_forward_hook(lambda m, a, y: calls.append(("post", y.shape)))
    model[0].register_full_backward_hook(lambda m, gi, go: calls.append(("back", go[0].shape)))
    model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert calls == [("pre", (3, 4)), ("post", (3, 4)), ("back", (3, 4))]


def test_a_part_of_the_model_may_be_called_on_its_own():
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, "lora(rank=2)"), size=0.1)
    inner = net.vit(batch["pixel_values"]).last_hidden_state
    inner.sum().backward()
    assert any(p.grad is not None for p in tuned.parameters())


def test_only_places_asked_for_have_slots():
    net, _ = tiny("vit")
    burnish.tune(net, "lora(rank=2)", targets="q@0", head=False)
    assert [p for p, _, _ in slots(net)] == ["", "vit.layers.0.attention.q_proj"]
