"""MEND: its edit, its losses and a step of learning beside the equations written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from burnish.core.errors import CheckError, ConfigError, DataError, TargetError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.mend import Mend, _counts
from burnish.methods.objective.distill import counted
from burnish.testing.models import tiny

D64 = torch.float64
WHERE = "2,4,6"                      # (5, 5), (5, 5) and (4, 5)


def network(dtype=D64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5),
                               torch.nn.Tanh(), torch.nn.Linear(5, 5), torch.nn.Tanh(),
                               torch.nn.Linear(5, 4)).to(dtype)


def lessons(n, seed=1, rows=2):
    g = torch.Generator().manual_seed(seed)

    def some():
        x = torch.randn(rows, 6, generator=g, dtype=D64)
        return x, torch.randint(4, (rows,), generator=g)

    return [(some(), some(), some()[0]) for _ in range(n)]


def stir(editor, seed=3):
    """Nets and alphas away from their start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*editor.nets.parameters(), *editor.alpha.parameters()]:
            p += 0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return editor


def reads(net, x, weights=None):
    """(what each edited layer reads, logits), by hand."""
    u, h = {}, x
    for i in range(0, 7, 2):
        u[i] = h
        w = net[i].weight if weights is None or i not in weights else weights[i]
        h = h @ w.T + net[i].bias
        if i < 6:
            h = torch.tanh(h)
    return u, h


def gradients(net, batch):
    """layer -> (u, d): d by autograd of the whole weight's rows, one output at a time."""
    x, y = batch
    u, h, outs = {}, x, {}
    for i in range(0, 7, 2):
        u[i] = h.detach()
        outs[i] = h = h @ net[i].weight.T + net[i].bias
        if i < 6:
            h = torch.tanh(h)
    d = torch.autograd.grad(F.cross_entropy(h, y), [outs[i] for i in (2, 4, 6)])
    return {i: (u[i], g) for i, g in zip((2, 4, 6), d, strict=True)}


def statistics(seen):
    rows = torch.cat(seen)
    return rows.mean(0), rows.std(0)


def turned(p, z, matrix):
    for k in range(2):
        a = (z @ p["V"][k].T) @ p["U"][k].T + p["b"][k]
        a = p["gamma"][k, matrix] * a + p["beta"][k, matrix]
        z = z + torch.where(a >= 0, a, torch.zeros_like(a))
    return z


def edited(net, batch, nets, alphas, stats):
    """layer -> W' by the equation; nets, alphas: their tensors, by shape and layer."""
    out = {}
    for i, (u, d) in gradients(net, batch).items():
        shape, matrix = ("4x5", 0) if i == 6 else ("5x5", (2, 4).index(i))
        mean, dev = stats[shape]
        z = turned(nets[shape], (torch.cat([u, d], 1) - mean) / (dev + 1e-7), matrix)
        u2, d2 = z[:, :5], z[:, 5:]
        out[i] = net[i].weight.detach() - alphas[i] * sum(
            torch.outer(d2[t], u2[t]) for t in range(len(z)))
    return out


def stats_of(net, batches):
    seen = {"5x5": [], "4x5": []}
    for b in batches:
        for i, (u, d) in gradients(net, b).items():
            seen["4x5" if i == 6 else "5x5"].append(torch.cat([u, d], 1))
    return {k: statistics(v) for k, v in seen.items()}


def taught(net, given):
    """An editor that knows statistics and has learnt nothing, then stirred."""
    editor = Mend(bottleneck=3, scale=0.3, targets=WHERE).editor(net)
    for edit, _, _ in given:
        editor.see(editor.factors(edit))
    return editor


def tensors(editor):
    nets = {k: dict(m.named_parameters()) for k, m in editor.nets.items()}
    return nets, {i: editor.alpha[f"{i}/weight"] for i in (2, 4, 6)}


def test_before_it_learns_an_edit_is_minus_alpha_times_whitened_outer_products():
    net, given = network(), lessons(3)
    editor = taught(net, given)
    edit, stats = editor(given[0][0]), stats_of(net, [g[0] for g in given])
    for i, (u, d) in gradients(net, given[0][0]).items():
        mean, dev = stats["4x5" if i == 6 else "5x5"]
        z = (torch.cat([u, d], 1) - mean) / (dev + 1e-7)
        want = -0.3 * sum(torch.outer(z[t, 5:], z[t, :5]) for t in range(2))
        torch.testing.assert_close(edit.dense(f"{i}.weight"), want, rtol=1e-9, atol=1e-12)


def test_an_edit_is_the_equation_away_from_the_start_and_stands_and_merges_alike():
    net, given = network(), lessons(3)
    editor = stir(taught(net, given))
    before = copy.deepcopy(net)
    nets, alphas = tensors(editor)
    want = edited(net, given[1][0], nets, alphas, stats_of(net, [g[0] for g in given]))
    edit, x = editor(given[1][0]), given[2][2]
    logits = reads(net, x, want)[1]
    with edit.standing() as model:
        torch.testing.assert_close(model(x), logits, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(),
                                                 strict=True))
    assert torch.equal(net(x), before(x))                      # it stands no longer
    torch.testing.assert_close(edit.merge()(x), logits, rtol=1e-9, atol=1e-12)
    for i in (2, 4, 6):
        torch.testing.assert_close(net[i].weight, want[i], rtol=1e-9, atol=1e-12)
    assert torch.equal(net[0].weight, before[0].weight)


def test_both_losses_and_all_gradients_of_nets_and_alphas_are_the_equation_s():
    net, given = network(), lessons(3)
    editor = stir(taught(net, given))
    from burnish.blocks.update.edited import Lesson

    lesson = Lesson(*given[0])
    right, moved = editor.terms(lesson, editor.factors(lesson.edit))
    nets, alphas = tensors(editor)
    every = [*editor.nets.parameters(), *editor.alpha.parameters()]
    got = torch.autograd.grad(0.1 * right + moved, every)
    w = edited(net, lesson.edit, nets, alphas, stats_of(net, [g[0] for g in given]))
    nll = F.cross_entropy(reads(net, lesson.rephrased[0], w)[1], lesson.rephrased[1])
    p = reads(net, lesson.local)[1].detach().log_softmax(-1)
    q = reads(net, lesson.local, w)[1].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(right, nll)
    torch.testing.assert_close(moved, kl)
    want = torch.autograd.grad(0.1 * nll + kl, every)
    for a, b in zip(got, want, strict=True):
        assert bool(b.any())
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_learning_is_adam_on_the_mean_of_the_lessons_with_rates_and_a_norm_of_its_own():
    net, given = network(), lessons(4)
    part = Mend(bottleneck=3, lessons=2, scale=0.2, step_rate=1e-2, scale_rate=3e-2, grad_norm=0.5,
                weight=0.7, targets=WHERE, seed=5)
    found = part.lifecycle(net, given)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())   # as it was
    start = part.editor(net)
    nets, alphas = tensors(start)
    adam = torch.optim.Adam([{"params": list(start.nets.parameters()), "lr": 1e-2},
                             {"params": list(start.alpha.parameters()), "lr": 3e-2}])
    for step in range(2):
        stats = stats_of(net, [g[0] for g in given[:2 * step + 2]])
        total = 0
        for edit, again, local in given[2 * step:2 * step + 2]:
            w = edited(net, edit, nets, alphas, stats)
            p = reads(net, local)[1].detach().log_softmax(-1)
            q = reads(net, local, w)[1].log_softmax(-1)
            total = total + (0.7 * F.cross_entropy(reads(net, again[0], w)[1], again[1])
                             + (p.exp() * (p - q)).sum(-1).mean()) / 2
        adam.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_([*start.nets.parameters(), *start.alpha.parameters()], 0.5)
        adam.step()
    for part in ("nets", "alpha"):
        for (n, a), (_, b) in zip(getattr(found, part).named_parameters(),
                                  getattr(start, part).named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=n)
    assert bool(found.nets["5x5"].U.any())               # it has left the relu's corner at zero


def test_the_rank_of_a_change_is_at_most_the_rows_of_its_edit():
    net, given = network(), lessons(4, rows=2)
    edit = stir(taught(net, given))(given[0][0])
    for i in (2, 4, 6):
        assert int(torch.linalg.matrix_rank(edit.dense(f"{i}.weight"), rtol=1e-9)) == 2
    # and rows of which nothing is asked have no part
    dead = network()
    x = torch.randn(3, 6, dtype=D64)
    right = dead(x).argmax(-1)

    def first(out, batch):
        return F.cross_entropy(out[:1], batch[1][:1])

    editor = Mend(bottleneck=3, targets=WHERE).editor(dead, first)
    assert {len(u) for u, _ in editor.factors((x, right)).values()} == {1}


def test_with_an_alpha_of_zero_nothing_moves():
    net, given = network(), lessons(3)
    editor = stir(taught(net, given))
    for a in editor.alpha.values():
        a.data.zero_()
    from burnish.blocks.update.edited import Lesson

    _, moved = editor.terms(Lesson(*given[0]), editor.factors(given[0][0]))
    assert float(moved.detach()) == 0


def test_the_count_of_the_published_shape():
    model = tiny("gpt2", meta=True, n_embd=768, n_layer=4, n_inner=3072, n_head=12)[0]
    editor = Mend(targets="fc1@-3:").editor(model)
    (net,) = editor.nets.values()
    count = {n: p.numel() for n, p in net.named_parameters()}
    assert count["U"] + count["V"] + count["b"] == 29_498_880
    assert count["gamma"] + count["beta"] == 46_080
    assert len(editor.alpha) == 3
    every = Mend(bottleneck=2).editor(model)             # the MLPs of the last three blocks
    assert {n.split(".")[2] for n in every.places} == {"1", "2", "3"}
    assert len(every.places) == 6 and len(every.nets) == 2


def test_defaults_are_the_paper_s():
    m = parse("mend")[0]
    assert m.edits and m.settings() == {
        "targets": None, "bottleneck": 1920, "scale": 1e-4, "weight": 0.1, "lessons": 10,
        "step_rate": 1e-6, "scale_rate": 1e-4, "grad_norm": 100.0, "seed": 0}


def test_a_bottleneck_of_one_and_a_lesson_a_step_are_enough():
    editor = Mend(bottleneck=1, lessons=1, targets=WHERE).lifecycle(network(), lessons(2))
    assert all(net.V.shape[1] == 1 and bool(net.b.any()) for net in editor.nets.values())


def test_which_rows_of_a_local_text_count():
    """Those of a label; without labels those of the mask, where it is of what answers."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    labels = torch.tensor([[-100, 5, -100], [-100, -100, 7]])
    gpt2, t5, plain = tiny("gpt2")[0], tiny("t5")[0], network()
    for model in (gpt2, plain):
        assert torch.equal(_counts(model, {"attention_mask": mask}, mask.shape), mask)
        assert _counts(model, {"attention_mask": mask}, torch.Size([2])) is None
        assert _counts(model, torch.ones(2, 3), mask.shape) is None
    both = _counts(gpt2, {"attention_mask": mask, "labels": labels}, mask.shape)
    assert torch.equal(both, counted(gpt2, {"labels": labels}, mask.shape))
    assert not torch.equal(both.long(), mask)
    assert _counts(t5, {"attention_mask": mask}, mask.shape) is None     # the encoder's tokens


def test_a_language_model_with_transposed_weights_learns_to_answer_an_edit():
    """GPT-2's Conv1D store in x out."""
    torch.manual_seed(0)
    model = tiny("gpt2")[0].eval()
    g = torch.Generator().manual_seed(2)

    def words(label):
        ids = torch.randint(0, model.config.vocab_size, (1, 6), generator=g)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1] if label is None else label
        return {"input_ids": ids, "labels": labels}

    data = [((edit := words(7)), edit, {"input_ids": words(None)["input_ids"],
                                        "attention_mask": torch.ones(1, 6)}) for _ in range(80)]
    part = Mend(bottleneck=8, scale=1e-3, step_rate=1e-3, scale_rate=1e-2, lessons=4, weight=1.0)
    editor = part.lifecycle(model, data)
    ask = words(7)
    before = float(model(**ask).loss)
    edit = editor(ask)
    with edit.standing():
        standing = model(**ask)
    assert float(standing.loss) < before - 0.1
    torch.testing.assert_close(edit.merge()(**ask).logits, standing.logits, rtol=1e-4, atol=1e-4)


def test_padding_of_local_texts_has_no_part_in_the_divergence():
    torch.manual_seed(0)
    model = tiny("gpt2")[0].eval().double()
    editor = Mend(bottleneck=2, scale=0.1).editor(model)
    ids = torch.arange(1, 9).reshape(1, 8)
    ask = {"input_ids": ids, "labels": ids}
    editor.see(editor.factors(ask))
    from burnish.blocks.update.edited import Lesson

    def moved(text, **more):
        lesson = Lesson(ask, ask, {"input_ids": text, **more})
        return float(editor.terms(lesson, editor.factors(ask))[1])

    short, padded = ids[:, :5], torch.cat([ids[:, :5], torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    assert moved(padded, attention_mask=mask) == pytest.approx(moved(short), rel=1e-9)
    assert moved(padded) != pytest.approx(moved(short), rel=1e-3)


def test_modes_and_gradients_of_the_model_are_given_back():
    net = network().train()
    net.insert(1, torch.nn.Dropout(0.5))                  # off while it edits
    net[0].weight.requires_grad_(False)
    given = [((x, y), (x, y), x) for (x, y), _, _ in lessons(3)]
    editor = Mend(bottleneck=2, lessons=3, targets="3").lifecycle(net, given)
    a, b = editor(given[0][0]), editor(given[0][0])
    assert torch.equal(a.dense("3.weight"), b.dense("3.weight"))
    assert net.training and net[1].training and not net[0].weight.requires_grad
    assert net[3].weight.requires_grad


@pytest.mark.parametrize("how", ["bottleneck=0", "lessons=0", "weight=-1", "step_rate=0",
                                 "scale_rate=0", "grad_norm=0"])
def test_settings_that_mean_nothing_are_refused(how):
    with pytest.raises(ConfigError):
        parse(f"mend({how})")


def test_what_cannot_be_edited_or_learnt_of_is_refused():
    net = network()
    part = Mend(bottleneck=2, targets=WHERE)
    with pytest.raises(TargetError):
        Mend().editor(net)                                # no blocks: name the weights
    with pytest.raises(ConfigError, match="no other module shares"):
        Mend(targets="wte").editor(tiny("gpt2")[0])
    with pytest.raises(ConfigError, match="plain model"):
        part.editor(object())
    with pytest.raises(DataError, match="there are none"):
        part.lifecycle(net, [])
    with pytest.raises(DataError, match="three batches"):
        part.lifecycle(net, [1])
    (first, again, local), = lessons(1)
    with pytest.raises(DataError, match="two rows"):
        part.editor(net)(first)
    with pytest.raises(ConfigError, match="no loss"):
        part.editor(net).factors(first[0])
    with pytest.raises(CheckError, match="not finite"):
        part.editor(net).factors((first[0] * float("nan"), first[1]))
