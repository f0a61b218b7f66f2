"""Teacher Intervention against a BERT written out in float64, with and without its teacher."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.state.intervened import Answer, Led, Unheard, masked, scores
from burnish.core.errors import RecipeError
from burnish.core.recipe import parse
from burnish.testing import tiny

LINEARS = "q,k,v,o,fc1,fc2"
NAME = "teacher_intervention"


class Through(torch.autograd.Function):
    """Some values, and the gradient of what they are of where that is inside (-2.5, 2.5)."""

    @staticmethod
    def forward(ctx, x, values):
        ctx.save_for_backward(x)
        return values

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0].abs() < 2.5), None


def three(W):
    size = W.detach().abs().clamp(max=2.5)
    large = size > 0.7 * size.mean(1, keepdim=True)
    a = (size * large).sum(1, keepdim=True) / large.sum(1, keepdim=True)
    return Through.apply(W, W.detach().sign() * large * a)


def rounded(x):
    y = x.detach().clamp(-2.5, 2.5)
    s = y.abs().amax(-1, keepdim=True) / 127
    return Through.apply(x, (y / s).round() * s)


def student(mode="output", steps=1000, more="", model="bert", recipe="full + twn", **kw):
    net, batch = tiny(model, dtype=torch.float64, **kw)
    if model == "bert":
        batch["attention_mask"] = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    base = copy.deepcopy(net).eval()
    tuned = burnish.tune(net, f"{recipe} + {NAME}(mode='{mode}', steps={steps}{more})",
                         targets=LINEARS, head=False)
    torch.manual_seed(0)
    for p in tuned.parameters():
        p.data += 0.05 * torch.randn_like(p)
    tuned.optimizer(lr=0.0)
    return tuned, batch, base


def plain(x, m):
    return F.linear(x, m.weight, m.bias)


def coded(x, m):
    return F.linear(rounded(x), three(m.weight), m.bias)


def bert(net, batch, lin, teacher=None, mode=None, maps=1.0, outputs=1.0):
    """(logits, terms, states after blocks, signals of each attention) of the equation."""
    hidden = (batch["attention_mask"] == 0)[:, None, None]
    h = net.bert.embeddings(batch["input_ids"])
    terms, states, signals = [], [h], []
    for n, block in enumerate(net.bert.encoder.layer):
        a, o = block.attention.self, block.attention.output
        theirs = None if teacher is None else teacher[n]
        x = h.detach() if mode else h

        def heads(t):
            return t.view(*t.shape[:2], 4, -1).transpose(1, 2)

        q, k = heads(lin(x, a.query)), heads(lin(x, a.key))
        v = heads(lin(h if mode == "map" else x, a.value))
        S = q @ k.mT / 8**0.5
        P = S if mode != "map" else theirs[0]
        c = (P.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = lin(c, o.dense)
        signals.append((S.detach(), c.detach(), y.detach()))
        go = y
        if theirs is not None:
            zero = [s.masked_fill(hidden, 0.0) for s in (S, theirs[0])]
            terms.append(maps * (zero[0] - zero[1]).square().mean()
                         + outputs * (y - theirs[2]).square().mean())
            go = {"output": theirs[2], "context": lin(theirs[1], o.dense)}.get(mode, y)
        b = o.LayerNorm(go + h)
        h = block.output.LayerNorm(lin(F.gelu(lin(b, block.intermediate.dense)),
                                       block.output.dense) + b)
        states.append(h)
    return net.classifier(net.bert.pooler(h)), terms, states, signals


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("mode", ["output", "context", "map", None])
def test_loss_and_gradients_are_those_of_the_equation(mode, weights):
    maps, outputs = weights
    tuned, batch, base = student(mode or "map", 1, f", maps={maps}, outputs={outputs}")
    if mode is None:
        tuned.step(batch)                                    # over after one update, at lr 0
        for p in tuned.parameters():
            p.grad = None
    net = tuned.model
    twin = copy.deepcopy(base)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            own[n].copy_(p)
    with torch.no_grad():
        _, _, _, signals = bert(base, batch, plain)
    logits, terms, _, _ = bert(twin, batch, coded, signals, mode, maps, outputs)
    loss = F.cross_entropy(logits, batch["labels"])
    got = net(**batch)
    torch.testing.assert_close(got.logits, logits, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.loss, loss, rtol=1e-8, atol=1e-8)
    (0.5 * got.loss).backward()
    (0.5 * (loss + sum(terms))).backward()
    names = dict(tuned.named_parameters())
    assert len(names) == 12 and sum(terms) > 1e-4
    for n, p in names.items():
        assert own[n].grad.abs().sum() > 0, n
        torch.testing.assert_close(p.grad, own[n].grad, rtol=1e-7, atol=1e-10, msg=n)


def outputs_of(tuned, batch):
    """States after each block of a forward that trains."""
    found = []
    hooks = [tuned.model.get_submodule(b.path).register_forward_hook(
        lambda m, a, out: found.append((out[0] if isinstance(out, tuple) else out).detach()))
        for b in tuned.anatomy.blocks]
    tuned.model(**batch)
    for h in hooks:
        h.remove()
    return found[len(hooks):]                                # the teacher ran first


@pytest.mark.parametrize("mode, free", [("output", "query key value dense"),
                                        ("context", "query key value"), ("map", "query key")])
def test_blocks_do_not_hear_what_the_base_answers_for(mode, free):
    tuned, batch, _ = student(mode)
    before = outputs_of(tuned, batch)
    for n, m in tuned.model.named_modules():
        if "attention." in n and n.rpartition(".")[2] in free.split():
            nn.init.normal_(m.weight)
    assert all(map(torch.equal, before, outputs_of(tuned, batch)))
    rest = {"output": "intermediate.dense", "context": "attention.output.dense",
            "map": "attention.self.value"}[mode]
    nn.init.normal_(tuned.model.get_submodule(f"bert.encoder.layer.0.{rest}").weight)
    assert not torch.equal(before[0], outputs_of(tuned, batch)[0])


def test_phases_of_the_gradual_intervention():
    at = parse(NAME)[0].at
    assert [at(k) for k in (0, 9, 10, 19, 20, 59, 60, 61, 10_000)] == [
        "output", "output", "context", "context", "map", "map", None, None, None]
    for s in (6, 30, 60, 120):                               # boundaries at s / 6, s / 3 and s
        count = Counter(parse(f"{NAME}(steps={s})")[0].at(k) for k in range(2 * s))
        assert count == {"output": s // 6, "context": s // 6, "map": 2 * s // 3, None: s}
    at = parse(f"{NAME}(mode='inverted')")[0].at
    assert [at(k) for k in (0, 19, 20, 39, 40, 59, 60)] == [
        "map", "map", "context", "context", "output", "output", None]
    at = parse(f"{NAME}(mode='stochastic', steps=3000)")[0].at
    drawn = [at(k) for k in range(3000)]
    assert all(900 < n < 1100 for n in Counter(drawn).values()) and len(set(drawn)) == 3
    assert drawn == [at(k) for k in range(3000)] and at(3000) is None
    assert drawn != [parse(f"{NAME}(mode='stochastic', steps=3000, seed=1)")[0].at(k)
                     for k in range(3000)]
    assert parse(f"{NAME}(mode='context', steps=5)")[0].at(4) == "context"


def test_the_phase_follows_the_updates():
    """By what a block hears: of its queries nothing until the last phase is over."""
    tuned, batch, _ = student("gradual", 6)
    heard = []
    for _ in range(8):
        row = []
        for name in ("attention.output.dense", "attention.self.value", "attention.self.query"):
            m = tuned.model.get_submodule(f"bert.encoder.layer.0.{name}")
            was, before = m.weight.detach().clone(), outputs_of(tuned, batch)[0]
            m.weight.data.normal_()
            row.append(not torch.equal(before, outputs_of(tuned, batch)[0]))
            m.weight.data.copy_(was)
        heard.append(tuple(row))
        tuned.step(batch)
    assert heard == [(False, False, False), (True, False, False), *[(True, True, False)] * 4,
                     *[(True, True, True)] * 2]


def test_nothing_of_the_teacher_is_left(tmp_path):
    tuned, batch, _ = student("output")
    tuned.optimizer(lr=1e-3)
    for _ in range(3):
        tuned.step(batch)
    net = tuned.model.eval()
    with torch.no_grad():
        got = net(**batch).logits
    twin = tiny("bert", dtype=torch.float64)[0]
    alone = burnish.tune(twin, "full + twn", targets=LINEARS, head=False)
    with torch.no_grad():
        for (n, a), (m, b) in zip(alone.named_parameters(), tuned.named_parameters(), strict=True):
            assert n == m
            a.copy_(b)
        assert torch.equal(alone.model.eval()(**batch).logits, got)      # its own signals alone
    assert set(tuned.tensors()) == set(alone.tensors())
    folder = tuned.save(tmp_path / "a")
    again = burnish.load(tiny("bert", dtype=torch.float64)[0], folder)
    with torch.no_grad():
        torch.testing.assert_close(again.model.eval()(**batch).logits, got)
    assert NAME in json.dumps(json.loads((folder / "adapter_config.json").read_text())) \
        or NAME in "".join(p.read_text() for p in folder.glob("*.json"))


def test_the_teacher_is_the_base_without_dropout_and_runs_once():
    tuned, batch, base = student("output", model="vit", dropout=0.5, recipe="full + twn + "
                                 "distill(temperature=1.0) + feature_distill")
    blocks = [b.attn_out for b in tuned.anatomy.blocks]
    want = {}
    for path in blocks:
        base.get_submodule(path).register_forward_hook(
            lambda m, a, out, path=path: want.__setitem__(path, out))
    with torch.no_grad():
        base(**batch)
    seen = {path: [] for path in blocks}
    for path in blocks:
        tuned.model.get_submodule(path).register_forward_hook(
            lambda m, a, out, path=path: seen[path].append(out.detach()))
    tuned.model.train()
    tuned.step(batch)
    for path in blocks:
        assert len(seen[path]) == 2                          # the teacher, and the student
        torch.testing.assert_close(seen[path][0], want[path])
        assert torch.equal(seen[path][1], seen[path][0])     # what goes on is the teacher's


@pytest.mark.parametrize("mode", ["output", "context", "map"])
@pytest.mark.parametrize("model", ["bert", "llama", "vit"])
def test_a_student_that_is_its_teacher_answers_alike(model, mode):
    """With causal attention, heads that are shared, and masks of their own."""
    net, batch = tiny(model, dtype=torch.float64)
    want = net(**batch)
    tuned = burnish.tune(net, f"full + {NAME}(mode='{mode}')", head=False)
    tuned.optimizer(lr=0.0)
    got = net(**batch)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    grads = [p.grad for p in tuned.parameters() if p.grad is not None]
    assert not grads


def test_scores_of_shared_heads_and_of_what_is_masked():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 3, 5)
    S = scores({"query": q, "key": k, "scale": 0.5})
    for h in range(4):
        torch.testing.assert_close(S[:, h], q[:, h] @ k[:, h // 2].mT * 0.5)
    torch.testing.assert_close(scores({"query": q, "key": q}), q @ q.mT / 5**0.5)
    allowed = torch.rand(2, 1, 3, 3) > 0.4
    added = torch.where(allowed, 0.7, torch.finfo(torch.float32).min)
    for mask in (allowed, added):
        assert torch.equal(masked(S, {"attn_mask": mask}, 0.0) == 0, ~allowed.expand_as(S))
    assert torch.equal(masked(S, {"is_causal": True}, 0.0) == 0,
                       torch.ones(3, 3).triu(1).bool().expand_as(S))
    assert masked(S, {}, 0.0) is S


@pytest.mark.parametrize("mode", ["output", "context", "map"])
def test_blocks_that_run_again_give_the_same_gradients(mode):
    grads = []
    for more in ("", " + checkpoint", " + lean"):
        tuned, batch, _ = student(mode, recipe=f"full + twn{more}")
        tuned.model.train()
        tuned.loss(batch).backward()
        grads.append([p.grad for p in tuned.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_without_terms_nothing_reaches_an_attention_that_is_replaced():
    tuned, batch, _ = student("output", more=", maps=0.0, outputs=0.0")
    tuned.loss(batch).backward()
    for n, p in tuned.named_parameters():
        inside = "attention." in n and n.endswith("weight")
        assert (p.grad is None or not p.grad.any()) == inside, n


def test_evaluation_and_loops_without_an_optimizer_run_the_student_alone():
    tuned, batch, base = student("output")
    runs = []
    for b in tuned.anatomy.blocks:
        tuned.model.get_submodule(b.path).register_forward_hook(
            lambda *a, b=b: runs.append(b.path))
    with torch.no_grad():
        tuned.model(**batch)
    assert len(runs) == 2
    tuned.model(**batch)
    assert len(runs) == 2 + 4
    with tuned.disabled():
        torch.testing.assert_close(tuned.model.eval()(**batch).logits, base(**batch).logits)
    assert len(runs) == 2 + 4 + 2


def test_what_listens_is_at_the_attentions():
    tuned, _, _ = student()
    for kind, n in ((Led, 2), (Answer, 2), (Unheard, 6)):
        assert sum(isinstance(m, kind) for m in tuned.model.modules()) == n
    tuned.detach()
    assert not any(isinstance(m, Led) for m in tuned.model.modules())


@pytest.mark.parametrize("model, recipe, why", [
    ("gpt2", f"full + {NAME}", "c_attn.weight makes queries, keys and values at once"),
    ("mha", f"full + {NAME}", "this model has no attention in its blocks"),
    ("bert", f"full + bibert + {NAME}", "how attention is computed")])
def test_models_and_parts_that_do_not_fit_are_refused(model, recipe, why):
    with pytest.raises(RecipeError, match=why):
        burnish.tune(tiny(model)[0], recipe, head=False)


@pytest.mark.parametrize("text, why", [
    ("steps=0", "steps of at least 1"), ("maps=-1.0", "at least 0"), ("outputs=-1.0", "at least 0"),
    ("mode='all'", "expected one of .gradual"), ("seed=1", "seed does nothing but beside")])
def test_settings_are_checked(text, why):
    with pytest.raises(RecipeError, match=why):
        parse(f"{NAME}({text})")


def test_the_defaults_are_the_papers():
    m = parse(NAME)[0]
    assert (m.mode, m.steps, m.maps, m.outputs, m.seed) == ("gradual", 60, 1.0, 1.0, 0)
    assert parse(f"{NAME}(s=120)")[0].steps == 120
    assert parse(f"{NAME}(steps=1, maps=0.0, outputs=0.0)")[0].steps == 1
