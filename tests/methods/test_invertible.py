"""Invertible adapters: the coupling and its inverse, both sides of tied tables, language stacks."""

from __future__ import annotations

import pytest
import torch
import transformers

import burnish
from burnish.blocks.state.coupling import Coupling
from burnish.core.recipe import parse
from burnish.testing import stir
from burnish.testing.models import tiny


def bert(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, vocab_size=50,
                                     max_position_embeddings=16)
    net = transformers.BertForMaskedLM(config).to(dtype).eval()
    ids = torch.randint(0, 50, (2, 8))
    return net, {"input_ids": ids, "labels": ids}


def coupling(d=8, width=3, dtype=torch.float32):
    torch.manual_seed(0)
    made = Coupling(d, width, "relu", "bert").to(dtype)
    for p in made.parameters():
        p.data.add_(0.5 * torch.randn_like(p))
    return made


def test_the_inverse_of_the_forward_is_the_state():
    made, e = coupling(768, 192), torch.randn(4, 768)
    made.F.reset("bert")
    made.G.reset("bert")
    torch.testing.assert_close(made.back(made(e)), e, rtol=0, atol=1e-5)
    wild, e = coupling(dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(wild.back(wild(e)), e, rtol=1e-12, atol=1e-12)
    assert (wild(e) - e).abs().max() > 0.1


def test_it_keeps_volumes():
    """log |det| = 0, of the map and of its inverse."""
    made, e = coupling(dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    for f in (made.there, made.back):
        J = torch.autograd.functional.jacobian(lambda x, f=f: f(x[None])[0], e)
        sign, log = torch.linalg.slogdet(J)
        assert sign == 1 and abs(float(log)) < 1e-12


def there(e, t):
    """o1 = e1 + F(e2), o2 = e2 + G(o1)."""
    def f(name, x):
        A, a, B, b = (t[f"{name}.{leaf}"] for leaf in ("down.weight", "down.bias", "up.weight",
                                                       "up.bias"))
        return torch.relu(x @ A.t() + a) @ B.t() + b
    half = e.shape[-1] // 2
    o1 = e[..., :half] + f("F", e[..., half:])
    return torch.cat([o1, e[..., half:] + f("G", o1)], -1), f


def back(o, t):
    """e2 = o2 - G(o1), e1 = o1 - F(e2)."""
    half = o.shape[-1] // 2
    _, f = there(o, t)
    e2 = o[..., half:] - f("G", o[..., :half])
    return torch.cat([o[..., :half] - f("F", e2), e2], -1)


@pytest.mark.parametrize("model, tables, head", [
    ("gpt2", ["transformer.wte"], "lm_head"), ("llama", ["model.embed_tokens"], "lm_head"),
    ("t5", ["encoder.embed_tokens", "decoder.embed_tokens"], "lm_head"),
    ("bert", ["bert.embeddings.word_embeddings"], None)])
def test_the_equation_written_out(beside, model, tables, head):
    """The table's rows through the coupling, what the head reads through its inverse; a classifier
    has no such head."""
    one = beside(model, "invertible")
    letters = {rest: t for (_, rest), t in one.theta.items()}
    assert len(letters) == len(one.theta) == 8
    for path in tables:
        one.base.get_submodule(path).register_forward_hook(
            lambda m, args, out: there(out, letters)[0])
    if head:
        one.base.get_submodule(head).register_forward_pre_hook(
            lambda m, args: (back(args[0], letters),))
    one.agree()


@pytest.mark.parametrize("model", ["gpt2", "t5", "bert"])
def test_a_zero_start_is_the_base(model):
    net, batch = tiny(model)
    with torch.no_grad():
        before = net.eval()(**batch).logits
        burnish.tune(net, "invertible(init='zero')")
        assert torch.equal(net.eval()(**batch).logits, before)


def test_without_the_inverse_a_language_model_is_another():
    """Skipping it moves the logits by what the coupling did; with it, those of a model without
    blocks are the base's."""
    net, batch = bert()
    for inverse, branches in ((True, 2), (False, 1)):
        net, batch = bert()
        tuned = burnish.tune(net, f"invertible(inverse={inverse})", head=False)
        assert len(list(tuned.branches(torch.nn.Module))) == branches
        stir(tuned, size=0.3)
        table, head = net.bert.embeddings.word_embeddings, net.cls.predictions.decoder
        with torch.no_grad(), tuned.disabled():
            want = head(table(batch["input_ids"]))
        with torch.no_grad():
            got = head(table(batch["input_ids"]))            # tied: the same rows on both sides
        assert torch.allclose(got, want, atol=1e-5) == inverse


def test_two_in_use_are_undone_last_first():
    net, batch = bert(torch.float64)
    tuned = burnish.tune(net, "invertible", head=False)
    tuned.add("b", "invertible", seed=1)
    for seed, name in enumerate(("default", "b")):
        for _, m in tuned.branches(Coupling, name):
            m.double()
        stir(tuned, seed=seed, size=0.5, adapter=name)
    table, head = net.bert.embeddings.word_embeddings, net.cls.predictions.decoder
    with torch.no_grad():
        with tuned.disabled():
            rows = table(batch["input_ids"])
            want = head(rows)
        for active in ({"default": 1, "b": 1}, {"b": 1, "default": 1}, "b"):
            tuned.use(active)
            assert (table(batch["input_ids"]) - rows).abs().max() > 0.1
            torch.testing.assert_close(head(table(batch["input_ids"])), want)


def test_a_weight_that_could_not_be_undone_is_refused():
    net, batch = bert()
    tuned = burnish.tune(net, "invertible", head=False)
    tuned.add("b", "invertible", seed=1)
    for mix in ({"default": 0.5}, {"default": 1, "b": 0.5}):
        with pytest.raises(burnish.RecipeError, match="undoes it whole; it can be used whole"):
            tuned.use(mix)
    tuned.use({"default": 0, "b": 1})
    net, batch = bert()
    tuned = burnish.tune(net, "invertible(inverse=False)", head=False)
    tuned.use({"default": 0.5})
    net(**batch)


def test_counts_and_the_preset(published):
    m = parse("invertible")[0]
    assert m.count(768) == 296_064
    model, _ = published("BertConfig", "BertForMaskedLM")
    with torch.device("meta"):
        by = {p.name: sum(q.numel() for b in p.branch(model) for q in b.module.parameters())
              for p in parse("mad_x")}
    assert by == {"invertible": 296_064, "pfeiffer": 894_528}
    assert (m.reduction, m.act, m.inverse, m.init) == (2, "relu", True, "bert")


def test_a_task_adapter_stands_on_a_language_adapter_which_can_be_exchanged():
    """h <- a_task(a_language(h)); the language rests while the task trains, another takes its place
    for zero-shot transfer, and the base is what it was."""
    net, batch = bert()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    base = net(**batch).logits
    tuned = burnish.tune(net, "invertible + pfeiffer(reduction=4)", head=False)
    stir(tuned, size=0.1)
    tuned.add("french", "invertible + pfeiffer(reduction=4)", seed=1)
    tuned.add("task", "pfeiffer(reduction=8)", seed=2)
    tuned.use({"default": 1, "task": 1}, train="task")
    assert all(".burnish.task." in n for n, _ in tuned.named_parameters())
    kept = {n: p.detach().clone() for n, p in net.named_parameters() if ".burnish." in n}
    tuned.optimizer(lr=1e-2)
    for _ in range(3):
        tuned.step(batch)
    for n, p in net.named_parameters():
        if n in kept:
            assert torch.equal(p, kept[n]) == (".burnish.task." not in n), n
    net.eval()
    english = net(**batch).logits
    order = [p.adapter for p in net.bert.encoder.layer[0].output.dense.burnish.parts]
    assert order == ["default", "french", "task"], "the task reads what the language made"
    tuned.use({"french": 1, "task": 1})
    assert not torch.allclose(net(**batch).logits, english, atol=1e-5)
    tuned.use({"default": 1, "task": 1})
    assert torch.equal(net(**batch).logits, english)
    tuned.detach()
    assert torch.equal(net(**batch).logits, base)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_what_waits_for_backward_is_the_state_alone(kept):
    """Beside a frozen model that a gradient passes: e once (and o, which the first block keeps in
    place of it), and what the inverse reads; F and G run again."""
    per = []
    for reduction in (1, 4):
        net, batch = tiny("gpt2", batch=8)
        per.append(kept(burnish.tune(net, f"invertible(reduction={reduction})", head=False), batch))
    assert per[0] == per[1], "no number of the width of F or G"


@pytest.mark.parametrize("model, recipe, why", [
    ("vit", "invertible", "table of token embeddings"),
    ("gpt2", "invertible(reduction=0)", "at least 1"),
    ("gpt2", "invertible(targets='q')", "targets"),
])
def test_what_it_refuses(model, recipe, why):
    with pytest.raises(burnish.BurnishError, match=why):
        burnish.tune(tiny(model)[0], recipe)


def test_an_activation_that_is_none_is_refused_before_there_is_a_model():
    with pytest.raises(burnish.ConfigError, match="unknown activation 'gelo'"):
        parse("invertible(act='gelo')")


def test_a_narrow_side_is_one_wide_at_least():
    tuned = burnish.tune(tiny("gpt2")[0], "invertible(reduction=100)", head=False)
    assert sum(p.numel() for p in tuned.parameters()) == parse(
        "invertible(reduction=100)")[0].count(32) == 2 * (16 + 1 + 16 + 16)


def test_of_several_tables_there_is_no_one_to_stand_at():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(10, 8)})
                              for _ in range(2))
            self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8))
                                              for _ in range(2))

        def forward(self, input_ids):
            h = self.a["embed_tokens"](input_ids) + self.b["embed_tokens"](input_ids)
            for layer in self.layers:
                h = layer(h)
            return h

    with pytest.raises(burnish.RecipeError, match="needs one table of token embeddings"):
        burnish.tune(Two(), "invertible", head=False)


def test_an_odd_width_is_refused():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(10, 7)
            self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(7, 7))
                                              for _ in range(2))

        def forward(self, input_ids):
            h = self.embed_tokens(input_ids)
            for layer in self.layers:
                h = layer(h)
            return h

    with pytest.raises(burnish.RecipeError, match="two halves"):
        burnish.tune(Odd(), "invertible", head=False)
