"""BitFit: biases train, and no linear keeps its input."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch

import burnish
from burnish.blocks.state.gates import Shift
from burnish.core.anatomy import Anatomy
from burnish.core.errors import RecipeError, TargetError
from burnish.core.recipe import parse
from burnish.core.site import Place
from burnish.methods.select.bitfit import bias_of
from burnish.testing.models import tiny

BERT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512}


def chosen(model, recipe="bitfit"):
    return [s.name for s in parse(recipe)[0].select(Anatomy.of(model))]


def test_count_on_bert_base():
    """12 (4 768 + 3072 + 768 + 2 768) + 2 768, embedding norm and pooler included."""
    model, _ = tiny("bert", meta=True, **BERT_BASE)
    names = chosen(model)
    assert sum(model.get_parameter(n).numel() for n in names) == 102_912
    body = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("classifier"))
    assert round(100 * 102_912 / body, 2) == 0.09
    assert not any(n.startswith("classifier") for n in names), "the head trains by itself"


def test_query_and_first_mlp_biases():
    model, _ = tiny("bert", meta=True, **BERT_BASE)
    names = chosen(model, "bitfit(which='query-mlp')")
    assert sum(model.get_parameter(n).numel() for n in names) == 12 * (768 + 3072)
    assert all("query" in n or "intermediate" in n for n in names)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "timm_qkv", "encoder", "mha", "cnn"])
def test_every_weight_matrix_stays_as_it_is(name):
    model, batch = tiny(name)
    tuned = burnish.tune(model, "bitfit", head=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved and all(n.endswith("bias") for n in moved)
    # a key's bias shifts all scores of a query alike: softmax does not see it
    assert all(n in moved or ".k" in n or "key" in n
               for n, _ in tuned.named_parameters())


def test_the_gradient_is_the_sum_over_tokens():
    model, _ = tiny("mlp")
    burnish.tune(model, "bitfit", head=False)
    h, seen = torch.randn(5, 32), {}
    first = model.layers[0]
    out = first(h)
    out.register_hook(lambda g: seen.update(g=g))
    torch.tanh(out).square().sum().backward()
    torch.testing.assert_close(first.bias.grad, seen["g"].sum(0))


@pytest.mark.parametrize("model", ["bert", "vit", "gpt2", "cnn", "encoder"])
def test_gradients_are_stock_autograds(beside, model):                         # findings 6
    """y = W x + (b + db): outputs, and the gradient of every bias of the body, in float64."""
    one = beside(model, "bitfit")
    head = ("classifier", "score", "head", "fc")
    want = {n for n, _ in one.base.named_parameters()
            if n.endswith("bias") and not n.startswith(head)}
    want |= {path for path, _ in one.theta}                  # those that stand for b + db
    assert {path for path, _ in one.theta} == want
    assert all(path.endswith("bias") for path, _ in one.theta)
    one.agree()


def test_query_rows_of_a_fused_bias_are_shifted(beside):                       # findings 3.8
    """The shift joins the first rows of what the fused layer gives; two updates of torch."""
    one = beside("timm_qkv", "bitfit(which='query-mlp')")
    for path, shift in one.at("shift"):
        def hook(m, args, y, shift=shift):
            return torch.cat([y[..., :32] + shift, y[..., 32:]], -1)

        one.base.get_submodule(path).register_forward_hook(hook)
    assert len(one.at("shift")) == 2 and len(one.theta) == 4
    one.agree()


def test_targets_narrow_it_to_some_biases(beside):
    one = beside("vit", "bitfit(targets='fc1,layernorm_before')")
    stems = {path.partition("layers.")[2][2:] for path, _ in one.theta}
    assert stems == {"mlp.fc1.bias", "layernorm_before.bias"}
    one.agree()


@pytest.mark.parametrize("targets, biases, shifts", [
    ("fc1@0", ["transformer.h.0.mlp.c_fc.bias"], []),
    ("q@1", [], ["transformer.h.1.attn.c_attn"]),
    ("c_attn@0,fc1@1", ["transformer.h.1.mlp.c_fc.bias"], ["transformer.h.0.attn.c_attn"]),
    (None, [f"transformer.h.{i}.mlp.c_fc.bias" for i in range(2)],
     [f"transformer.h.{i}.attn.c_attn" for i in range(2)]),
])
def test_targets_may_name_rows_or_whole_biases(beside, targets, biases, shifts):
    one = beside("gpt2", f"bitfit(which='query-mlp', targets={targets!r})")
    assert [path for path, rest in one.theta if not rest] == biases
    assert [path for path, rest in one.theta if rest] == shifts


def test_targets_that_name_no_bias_are_refused():
    for targets in ("k", "nonsense", "wte"):
        with pytest.raises(burnish.TargetError):
            burnish.tune(tiny("gpt2")[0], f"bitfit(which='query-mlp', targets={targets!r})")
    with pytest.raises(burnish.TargetError):
        burnish.tune(tiny("bert")[0], "bitfit(targets='word_embeddings')")


class Plain(torch.nn.Module):
    """Two linears with an operation between them that keeps its output, not its input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 64), torch.nn.Linear(64, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("recipe, kept", [("bitfit", [(4, 64)]),
                                          ("full", [(4, 16), (4, 64), (4, 64)])])
def test_no_linear_keeps_its_input(recipe, kept):
    """Of the activations only what ReLU needs waits for backward; to train weights, inputs do."""
    model = Plain()
    tuned = burnish.tune(model, recipe, head=False)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    seen = []
    tape = tuned.state.tape

    def pack(t):
        if t.untyped_storage()._cdata not in weights:
            seen.append(tuple(t.shape))
        return t

    tape.lean, tape.pack, tape.unpack = False, pack, lambda t: t
    model(torch.randn(4, 16)).sum().backward()
    assert sorted(seen) == kept


def test_head_and_biases_have_their_own_decay():
    tuned = burnish.tune(tiny("bert")[0], "bitfit")
    opt = tuned.optimizer(lr=1e-3, weight_decay=0.1)
    names = {id(p): n for n, p in tuned.named_parameters()}
    decayed = {names[id(p)] for g in opt.param_groups for p in g["params"] if g["weight_decay"]}
    assert decayed == {"classifier.weight", "classifier.bias"}


def test_nothing_of_it_stays_after_detach():
    """A later full fine-tuning decays biases again."""
    model, _ = tiny("bert")
    burnish.tune(model, "bitfit").detach()
    assert not any(hasattr(p, "burnish_decay") for p in model.parameters())
    opt = burnish.tune(model, "full").optimizer(weight_decay=0.1)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1]


def test_a_model_without_biases_is_refused_with_a_way_out():
    with pytest.raises(RecipeError, match="no biases.*norms"):
        burnish.tune(tiny("llama")[0], "bitfit")


def test_merged_and_saved(tmp_path):
    model, batch = tiny("vit")
    tuned = burnish.tune(model, "bitfit")
    tuned.step(batch)
    model.eval()
    want = model(**batch).logits
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("vit")[0].eval(), tmp_path / "a")
    torch.testing.assert_close(again.model(**batch).logits, want)
    torch.testing.assert_close(tuned.merge()(**batch).logits, want)


@pytest.mark.parametrize("name", ["timm_qkv", "gpt2"])
def test_query_biases_of_a_fused_weight_train_as_rows(name):             # findings 3.8
    """The gradient is that of the bias' query rows; keys and values stay; it merges exactly."""
    model, batch = tiny(name)
    stock = copy.deepcopy(model)
    tuned = burnish.tune(model, "bitfit(which='query-mlp')", head=False)
    shifts = [m for _, m in model.named_modules() if isinstance(m, Shift)]
    assert len(shifts) == 2 and all(s.shift.shape == (32,) for s in shifts)
    assert sum(p.numel() for p in tuned.parameters()) == 2 * (32 + (64 if name != "gpt2" else 128))
    tuned.loss(batch).backward()
    stock(**batch).loss.backward()
    fused = [p.grad for n, p in stock.named_parameters()
             if n.endswith(("qkv.bias", "c_attn.bias"))]
    for s, g in zip(shifts, fused, strict=True):
        torch.testing.assert_close(s.shift.grad, g[:32], rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        for s in shifts:
            s.shift.normal_()
    model.eval()
    want = model(**batch).logits
    before = {n: p.detach().clone() for n, p in stock.named_parameters()}
    merged = tuned.merge()
    torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-5, atol=1e-5)
    for n, p in merged.named_parameters():
        if n.endswith(("qkv.bias", "c_attn.bias")):
            assert torch.equal(p[32:], before[n][32:]) and not torch.equal(p[:32], before[n][:32])


def test_query_biases_that_cannot_be_told_apart_are_refused():
    with pytest.raises(RecipeError, match="without a call.*which='all'"):
        burnish.tune(tiny("mha")[0], "bitfit(which='query-mlp')")


def test_queries_that_stand_between_keys_are_refused():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    net = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, bos_token_id=1, eos_token_id=2))
    with pytest.raises(RecipeError, match="stand between those of keys and values.*which='all'"):
        burnish.tune(net, "bitfit(which='query-mlp')")


def test_a_weight_without_a_bias_is_named_for_nothing():
    with pytest.raises(TargetError, match="name nothing it acts on"):
        burnish.tune(tiny("bert")[0], "bitfit(targets='word_embeddings')", head=False)


def test_a_bias_whose_name_begins_like_the_heads_is_none_of_the_head():
    net = torch.nn.Sequential(OrderedDict(fc_in=torch.nn.Linear(4, 4), fc=torch.nn.Linear(4, 2)))
    assert Anatomy.of(net).head == ("fc",) and chosen(net) == ["fc_in.bias"]


def test_the_bias_of_a_layer_that_is_the_whole_model():
    assert bias_of(Place("", "weight", "linear", 4, 4)) == "bias"
    assert bias_of(Place("a.b", "in_proj_weight", "mha", 4, 4)) == "a.b.in_proj_bias"
