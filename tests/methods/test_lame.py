"""Lame: against loops over samples, its energy falls where it must, and no weight moves."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.blocks.choose.affinity import affinity, agreeing, energy
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.lame import Lame
from burnish.testing.models import tiny


def samples(n=12, classes=4, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, width, generator=g, dtype=torch.float64)
    q = (1.5 * torch.randn(n, classes, generator=g, dtype=torch.float64)).softmax(1)
    return f, q


def dense(f, kind, k, symmetrise=False):
    """W entry by entry."""
    f = [row / row.norm() for row in f]
    n = len(f)
    d = [[float((f[i] - f[j]).norm()) for j in range(n)] for i in range(n)]
    W = torch.zeros(n, n, dtype=torch.float64)
    sigma = sum(sorted(d[i])[min(k, n) - 1] for i in range(n)) / n
    for i in range(n):
        others = sorted((d[i][j], j) for j in range(n) if j != i)[:k]
        for j in range(n):
            if kind == "linear":
                W[i, j] = f[i] @ f[j]
            elif kind == "rbf":
                W[i, j] = 1.0 if i == j else torch.exp(torch.tensor(
                    -d[i][j] ** 2 / (2 * sigma**2), dtype=torch.float64))
            else:
                W[i, j] = float(j in [o for _, o in others])
    return (W + W.t()) / 2 if symmetrise else W


def dense_steps(q, W, strength, steps):
    n, K = q.shape
    z = q.clone()
    for _ in range(steps):
        new = torch.zeros_like(z)
        for i in range(n):
            a = [float(torch.log(q[i, c] + 1e-10)) + strength * sum(
                float(W[i, j] * z[j, c]) for j in range(n)) for c in range(K)]
            new[i] = torch.tensor(a, dtype=torch.float64).softmax(0)
        z = new
    return z


def true_energy(z, q, W, strength):
    return float((z * (z / (q + 1e-10)).log()).sum() - strength / 2 * (W * (z @ z.t())).sum())


@pytest.mark.parametrize("kind, k, symmetrise", [
    ("knn", 3, False), ("knn", 3, True), ("knn", 30, False), ("rbf", 4, False), ("rbf", 30, False),
    ("linear", 5, False)])
def test_a_batch_is_corrected_as_loops_over_samples_say(kind, k, symmetrise):
    f, q = samples()
    W = affinity(f, kind, k, symmetrise)
    torch.testing.assert_close(W, dense(f, kind, k, symmetrise), rtol=1e-12, atol=1e-12)
    said, seen = agreeing(q, W, 0.7)
    z = said.exp()
    torch.testing.assert_close(z, dense_steps(q, W, 0.7, len(seen)), rtol=1e-9, atol=1e-12)
    want = sum(float(z[i, c] * z[i, c].log() - z[i, c] * (q[i, c] + 1e-10).log()
                     - 0.7 * (W[i] @ z[:, c]) * z[i, c])
               for i in range(len(q)) for c in range(q.shape[1]))
    assert seen[-1] == pytest.approx(want, rel=1e-10) == energy(z, q, W, 0.7)


def test_its_energy_never_rises_for_a_linear_affinity():
    for seed in range(8):
        f, q = samples(20, 5, 4, seed)
        W = affinity(f, "linear")
        path = [true_energy(dense_or(q, W, t), q, W, 1.0) for t in range(12)]
        assert all(b <= a + 1e-9 for a, b in zip(path, path[1:], strict=False))


def dense_or(q, W, steps):
    return q if not steps else agreeing(q, W, 1.0, tolerance=-1, most=steps)[0].exp()


def test_when_it_stops():
    f, q = samples()
    W = affinity(f, "rbf", 4)
    _, seen = agreeing(q, W, 1.0)
    change = [abs(b - a) / abs(a) for a, b in zip(seen, seen[1:], strict=False)]
    assert change[-1] <= 1e-8 and all(c > 1e-8 for c in change[1:-1])
    assert len(agreeing(q, W, 1.0, tolerance=-1)[1]) == 100
    assert len(agreeing(q, torch.zeros_like(W), 1.0)[1]) == 3          # not before the third


def test_identical_samples_have_identical_answers():
    f, q = samples()
    f[5], q[5] = f[2], q[2]
    f[7], q[7] = f[2], q[2]
    for kind in ("knn", "rbf", "linear"):
        z = agreeing(q, affinity(f, kind, 3), 1.0)[0].exp()
        torch.testing.assert_close(z[5], z[2], rtol=1e-12, atol=0)
        torch.testing.assert_close(z[7], z[2], rtol=1e-12, atol=0)


def test_one_sample_alone_is_answered_as_it_was():
    model, batch = tiny("vit", batch=1, dtype=torch.float64)
    rows = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        plain = model.eval()(**rows).logits.softmax(-1)
    with Lame().lifecycle(model) as adapted:
        torch.testing.assert_close(adapted(rows).logits.exp(), plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name, recipe", [("vit", None), ("cnn", None), ("bert", None),
                                          ("vit", "lora(rank=2)"), ("timm_qkv", None)])
def test_what_the_head_reads_are_the_features_and_nothing_moves(name, recipe):
    torch.manual_seed(0)
    net, batch = tiny(name, batch=6, dropout=0.2)
    tuned = net if recipe is None else burnish.tune(net, recipe, head=False)
    rows = {k: v for k, v in batch.items() if k != "labels"}
    before, read = copy.deepcopy(net.state_dict()), []
    head = next(m for n, m in net.named_modules() if n in ("classifier", "head"))
    with torch.no_grad():
        hook = head.register_forward_pre_hook(lambda m, a: read.append(a[0]))
        out = net.eval()(**rows)
        hook.remove()
    net.train()
    method = Lame(neighbours=2, alpha=2.0)
    with method.lifecycle(tuned) as adapted:
        got = adapted(rows).logits
        again = adapted({k: v[:4] for k, v in rows.items()}).logits
    W = dense(read[0].double(), "knn", 2)
    q = out.logits.double().softmax(-1)
    want = dense_steps(q, W, 2.0, 60)
    torch.testing.assert_close(got.exp().double(), want, rtol=1e-4, atol=1e-5)
    assert float((want - q).abs().max()) > 1e-3 and len(again) == 4
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training and not head._forward_hooks and not got.requires_grad


def test_features_may_be_made_of_the_outputs():
    f, q = samples(6)
    model = torch.nn.Identity()
    with Lame(affinity="linear").lifecycle(model, features=lambda o: f) as adapted:
        got = adapted(q.log())
    want = agreeing(q, affinity(f, "linear"), 1.0)[0]
    torch.testing.assert_close(got, want)
    with Lame().lifecycle(model, features=lambda o: f[:3]) as adapted, \
            pytest.raises(ConfigError, match="a row of features is expected for each of 6"):
        adapted(q.log())


def test_certain_answers_stay_finite():
    q = F.one_hot(torch.tensor([0, 1, 0]), 3).float()
    said, seen = agreeing(q, torch.ones(3, 3), 5.0)
    assert said.isfinite().all() and all(torch.tensor(seen).isfinite())
    same = torch.ones(4, 3)
    assert torch.equal(affinity(same, "rbf", 2), torch.ones(4, 4))
    assert affinity(same.bfloat16(), "linear").dtype == torch.float32


def test_its_settings():
    made = parse("lame(neighbours=1)")[0]                # one is enough
    assert made.neighbours == 1
    made = parse("lame")[0]
    assert (made.affinity, made.neighbours, made.alpha, made.symmetrise) == \
        ("knn", 5, 1.0, False)


def test_what_cannot_act_is_refused():
    for settings, said in (({"affinity": "cosine"}, "expected knn, rbf, linear"),
                           ({"neighbours": 0}, "at least 1"), ({"alpha": 0.0}, "positive"),
                           ({"affinity": "linear", "neighbours": 3}, "has no neighbours"),
                           ({"affinity": "rbf", "symmetrise": True}, "symmetric already"),
                           ({"targets": "q"}, "no weight is touched")):
        with pytest.raises(ConfigError, match=said):
            Lame(**settings)
    with pytest.raises(ConfigError, match="no linear head"):
        Lame().lifecycle(tiny("llama")[0])
    with pytest.raises(ConfigError, match="no linear head"):
        Lame().lifecycle(tiny("clip")[0])

    class Skips(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

        def forward(self, x):
            return SimpleNamespace(logits=self.body(x) @ self.head.weight.t())

    with Lame().lifecycle(Skips()) as adapted, pytest.raises(ConfigError, match="head did not run"):
        adapted(torch.randn(2, 4))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_a_model_that_writes_on_the_features_are_of_the_token_that_answers(kind, side):
    import transformers

    torch.manual_seed(0)
    wide = {"vocab_size": 64, "num_labels": 4, "pad_token_id": 0}
    model = (transformers.GPT2ForSequenceClassification(transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=16, **wide)) if kind == "gpt2" else
        transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            **wide))).double().eval()
    torch.nn.init.normal_(model.score.weight)
    ids, mask = torch.randint(3, 60, (6, 7)), torch.ones(6, 7, dtype=torch.long)
    for i in range(6):
        mask[i, :i] = 0                              # 0 to 5 tokens of padding
    if side == "right":
        mask = mask.flip(1)
    ids = ids * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        plain = model(**batch).logits
        states = model.base_model(**batch).last_hidden_state
    last = torch.tensor([int(m.nonzero().max()) for m in mask])
    f = states[torch.arange(6), last]
    torch.testing.assert_close(f @ model.score.weight.t(), plain)
    with Lame(neighbours=2).lifecycle(model) as adapted:
        got = adapted(batch).logits.softmax(-1)
    z = q = plain.softmax(-1)
    W = dense(f, "knn", 2)
    for _ in range(100):
        z = (torch.log(q + 1e-10) + W @ z).softmax(-1)
    torch.testing.assert_close(got, z, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got, q, atol=1e-3)


def test_of_tokens_that_say_the_same_the_last_is_read():
    from burnish.methods.lifecycle.lame import _Seen

    head = torch.nn.Linear(3, 2, bias=False)
    head.weight.data[:, 2] = 0                       # so that two tokens may say the same
    x = torch.randn(2, 4, 3)
    x[:, 1:3, :2] = x[:, :1, :2]
    seen = _Seen()
    head.register_forward_hook(seen, with_kwargs=True)
    with torch.no_grad():
        said = head(input=x)                         # by name, as some models call theirs
    assert torch.equal(seen.taken(said[:, 0]), x[:, 2])
    with torch.no_grad():
        head(x)
    assert torch.equal(seen.taken(said.mean(1)), x)  # an answer of no one token: refused by shape
    for args, out in (((x,), (said,)), (("x",), said), ((), said)):
        seen(head, args, {}, out)
        with pytest.raises(ConfigError, match="did not run, or not on a tensor"):
            seen.taken(said[:, 0])


def test_one_neighbour_is_enough():
    f, q = samples(6)
    W = dense(f, "knn", 1)
    model = torch.nn.Identity()
    with Lame(neighbours=1).lifecycle(model, features=lambda out: f) as adapted:
        got = adapted(q.log()).exp()
    torch.testing.assert_close(got, dense_steps(q, W, 1.0, 100), rtol=1e-6, atol=1e-8)
