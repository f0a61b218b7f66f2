"""Distillation from the base: the term, its gradient, its scale; the teacher is no copy."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.methods.objective.distill import divergence
from burnish.testing.models import tiny


def hand(z, t, T, mask=None):
    """T^2 sum p (log p - log q) by explicit sums, in fp64."""
    q, p = torch.softmax(z.double() / T, -1), torch.softmax(t.double() / T, -1)
    rows = (p * (p.log() - q.log())).sum(-1)
    return T * T * (rows.mean() if mask is None else rows[mask].mean())


@pytest.mark.parametrize("T", [1.0, 2.0, 4.0])
def test_the_divergence(T):
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(3, 5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, 5, generator=g) > 0.4
    torch.testing.assert_close(divergence(z, t, T), hand(z, t, T))
    torch.testing.assert_close(divergence(z, t, T, mask), hand(z, t, T, mask))
    assert divergence(t, t, T).abs() < 1e-12
    assert divergence(z.bfloat16(), t.bfloat16(), T).dtype == torch.float32


def start(recipe, model="bert", head=True):
    net, batch = tiny(model, dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, recipe, head=head)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            p.data = p.double() + 0.1 * torch.randn(p.shape, dtype=torch.float64)
    net.train()
    return tuned, base.eval(), batch


@pytest.mark.parametrize("recipe, model", [("lora(rank=2)", "bert"), ("full", "vit"),
                                           ("lora(rank=2) + checkpoint", "bert"),
                                           ("lora(rank=2)", "llama")])
def test_gradients_are_those_of_the_sum(recipe, model):
    """Loss / 2 + term / 2, with a teacher that is a real copy of the base."""
    tuned, base, batch = start(f"{recipe} + distill(weight=0.7, temperature=2.0)", model)
    tuned.model.eval()                               # dropout would draw otherwise
    if model == "llama":                             # a prompt that is not learnt
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, :3] = -100
    with torch.no_grad():
        teacher = base(**batch).logits
    out = tuned.model(**batch)                       # no optimizer yet: the task alone
    mask = None
    if model == "llama":                             # row 2 answers the first label, the last none
        mask = torch.ones_like(batch["labels"], dtype=torch.bool)
        mask[:, :2] = mask[:, -1] = False
    whole = out.loss + 0.7 * hand(out.logits, teacher, 2.0, mask)
    want = torch.autograd.grad(0.5 * whole, list(tuned.parameters()))
    tuned.optimizer(lr=0.0)
    (0.5 * tuned.model(**batch).loss).backward()
    for (n, p), g in zip(tuned.named_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10, msg=n)


def test_the_teacher_is_asked_in_eval_mode_and_modes_stay():
    tuned, base, batch = start("lora(rank=2) + distill")
    tuned.model.classifier.eval()
    before = {n: m.training for n, m in tuned.model.named_modules()}
    tuned.optimizer(lr=0.0)
    tuned.loss(batch).backward()
    assert before == {n: m.training for n, m in tuned.model.named_modules()}


def test_strong_distillation_keeps_the_base():
    gaps = []
    for weight in (0.0, 1000.0):
        net, batch = tiny("bert")
        base = copy.deepcopy(net).eval()
        tuned = burnish.tune(net, f"lora(rank=4) + distill(weight={weight})", head=False)
        tuned.optimizer(lr=1e-2)
        for _ in range(10):
            tuned.step(batch)
        net.eval()
        with torch.no_grad():
            gaps.append(float(F.mse_loss(net(**batch).logits, base(**batch).logits)))
    assert gaps[1] < 0.5 * gaps[0]


def test_under_zeroth_order_steps_its_value_counts():
    gs = []
    for weight in (0.0, 30.0):
        net, batch = tiny("bert")
        tuned = burnish.tune(net, f"lora(rank=4) + distill(weight={weight}) + mezo", head=False)
        with torch.no_grad():
            for k, p in enumerate(tuned.parameters()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * 0.1)
        opt = tuned.optimizer(lr=1e-4)
        tuned.step(batch)
        gs.append(opt.log.scalars[0])
    assert gs[0] != gs[1]


def test_a_loop_that_leaves_the_term_behind_is_stopped():
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + distill", head=False)
    opt = tuned.optimizer(lr=1e-3)
    F.cross_entropy(tuned.model(**batch).logits, batch["labels"]).backward()
    with pytest.raises(burnish.CheckError, match="distill had no part in this update.*tuned.loss"):
        opt.step()


def test_outputs_without_a_loss_carry_it():
    """A loss made outside: with one backward per update nothing need be told."""
    net, batch = tiny("bert")
    tuned = burnish.tune(net, "lora(rank=2) + distill", head=False)
    opt = tuned.optimizer(lr=1e-3)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    F.cross_entropy(tuned.model(**inputs).logits, batch["labels"]).backward()
    opt.step()


def test_the_teacher_may_be_another_adapter():
    net, batch = tiny("bert", dtype=torch.float64)
    tuned = burnish.tune(net, "lora(rank=2)", head=False, name="old")
    tuned.add("new", "lora(rank=2) + distill(adapter='old')")
    tuned.use("new")
    tuned.optimizer(lr=1e-3)
    tuned.step(batch)
    assert tuned.state.active == (("new", 1.0),)
    with pytest.raises(burnish.ConfigError, match="no adapter 'older'.*old, new"):
        tuned.add("third", "lora(rank=2) + distill(adapter='older')")
        tuned.use("third")
        tuned.optimizer(lr=1e-3)
        tuned.step(batch)


# -- which models, and which rows (findings 3.9) ---------------------------------------------
@pytest.mark.parametrize("model", ["BertModel", "BertForQuestionAnswering"])
def test_a_model_without_logits_is_refused_before_anything_runs(model):  # findings 3.9
    import transformers

    net = getattr(transformers, model)(tiny("bert")[0].config)
    before = {n: p.clone() for n, p in net.state_dict().items()}
    with pytest.raises(burnish.RecipeError, match="distill needs logits among its outputs, which "
                                                  f"{type(net).__name__} does not have"):
        burnish.tune(net, "full + distill")
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any("burnish" in n for n, _ in net.named_modules())


def test_a_model_that_compares_pictures_with_texts_has_logits_per_picture():
    tuned, base, batch = start("full + distill(temperature=2.0, weight=3.0)", "clip")
    with torch.no_grad():
        teacher = base(**batch).logits_per_image
    out = tuned.model(**batch)
    term = 3 * hand(out.logits_per_image, teacher, 2.0)
    want = torch.autograd.grad(out.loss.double() + term, list(tuned.parameters()))
    tuned.optimizer(lr=0.0)
    tuned.loss(batch).backward()
    for p, g in zip(tuned.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def rows_that_count(net, labels):
    """Rows whose logits get a gradient of the term, the student's logits being other ones."""
    from burnish.methods.objective.distill import Distill

    class Seen:
        batch = {"labels": labels}
        outputs = {"logits": torch.randn(*labels.shape, 5, requires_grad=True)}

        @staticmethod
        def reference(adapter):
            return {"logits": torch.zeros(*labels.shape, 5)}

    class Handle:
        model = net

    (term,) = Distill().objective(Handle(), Seen())
    (g,) = torch.autograd.grad(term, Seen.outputs["logits"])
    return g.abs().sum(-1) > 0


@pytest.mark.parametrize("cls, of, ahead", [
    ("LlamaForCausalLM", "llama", True), ("GPT2LMHeadModel", "gpt2", True),
    ("MambaForCausalLM", "mamba", True), ("BertForMaskedLM", "bert", False),
    ("BertForTokenClassification", "bert", False), ("LlamaForTokenClassification", "llama", False),
    ("T5ForConditionalGeneration", "t5", False), ("XLMWithLMHeadModel", None, False),
])
def test_whether_rows_answer_the_next_label_is_the_models_task_not_its_name(cls, of, ahead):
    """A class of another name is told alike: what it declares and does is inherited."""
    import transformers

    known = getattr(transformers, cls)
    config = tiny(of, meta=True)[0].config if of else \
        transformers.XLMConfig(vocab_size=9, emb_dim=8, n_layers=1, n_heads=2)
    labels = torch.tensor([[-100, -100, 3, 4], [1, -100, 2, 3]])
    want = labels != -100
    if ahead:                                        # row n answers label n + 1, the last row none
        want = torch.cat([want[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], 1)
    for kind in (known, type("Mine", (known,), {})):
        with torch.device("meta"):
            net = kind(config)
        assert torch.equal(rows_that_count(net, labels), want)
    assert known.__name__ == cls


class Named(torch.nn.Module):
    """Declares nothing and gives its answer another name."""

    def __init__(self, name):
        super().__init__()
        self.fc, self.name = torch.nn.Linear(4, 3), name

    def forward(self, x):
        return {"x": torch.ones(()), self.name: self.fc(x)}


def test_what_a_module_without_a_declaration_returns_is_found_out_when_it_runs():
    x = (torch.ones(2, 4),)
    for name in ("logits", "scores"):
        tuned = burnish.tune(Named(name), "full + distill", head=False)
        tuned.optimizer(lr=0.1)
        if name == "logits":
            tuned.loss(x, loss=lambda out, batch: out["logits"].sum()).backward()
            continue
        with pytest.raises(burnish.ConfigError, match="compares logits, and this model returns no"):
            tuned.loss(x, loss=lambda out, batch: out["scores"].sum())


# -- small things that were never shown ----------------------------------------------------------
def test_few_rows_or_none_that_count():
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(2, 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    one = torch.zeros(2, 3, dtype=torch.bool)
    assert float(divergence(z, t, 2.0, one)) == 0.0, "no row: nothing, not 0 / 0"
    one[1, 2] = True
    torch.testing.assert_close(divergence(z, t, 2.0, one), hand(z, t, 2.0, one))


def test_defaults_and_temperatures():
    (method,) = burnish.parse("distill")
    assert (method.weight, method.temperature) == (1.0, 2.0)
    assert burnish.parse("distill(T=0.5)")[0].temperature == 0.5
    for bad in (0, -1):
        with pytest.raises(burnish.RecipeError, match="expected a positive one"):
            burnish.parse(f"distill(temperature={bad})")


class Answers(torch.nn.Module):
    """Gives its logits in one of the forms a plain module may."""

    def __init__(self, form):
        super().__init__()
        self.fc, self.form = torch.nn.Linear(4, 3, dtype=torch.float64), form

    def forward(self, x):
        return self.form(self.fc(x))


Pair = namedtuple("Pair", "hidden logits")


class Holds:
    def __init__(self, z):
        self.logits = z


@pytest.mark.parametrize("form, of", [
    (lambda z: z, lambda out: out),
    (lambda z: (z.sum(), z, z * 0), lambda out: out[1]),
    (lambda z: (None, z.sum((0, 1)), z), lambda out: out[2]),
    (lambda z: {"logits": z, "a": z * 0}, lambda out: out["logits"]),
    (Holds, lambda out: out.logits), (lambda z: Pair(z * 100, z), lambda out: out.logits),
])
def test_logits_are_found_in_every_form_a_module_gives_them(form, of):
    """A tensor; by name, also in a tuple; else the first of a tuple with rows and classes."""
    torch.manual_seed(0)
    net, x = Answers(form), torch.randn(2, 4, dtype=torch.float64)
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "full + distill(weight=3.0)", head=False)
    with torch.no_grad():
        net.fc.weight.add_(torch.randn(3, 4))
    z, t = of(net(x)), of(base(x)).detach()
    (want,) = torch.autograd.grad(3.0 * hand(z, t, 2.0), [net.fc.weight])
    tuned.optimizer(lr=0.0)
    tuned.loss((x,), loss=lambda out, batch: 0 * of(out).sum()).backward()
    torch.testing.assert_close(net.fc.weight.grad, want)
