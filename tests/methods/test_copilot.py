"""Transformer Copilot: the mistakes of a language model, foretold and put right."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.state.mistakes import Corrector, Record, corrected, error
from burnish.core.errors import ConfigError
from burnish.testing.models import tiny


def batches(n=3, seed=0, pad=False):
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        ids = torch.randint(3, 60, (2, 9), generator=g)
        mask = torch.ones_like(ids)
        if pad:
            ids[0, 7:], mask[0, 7:] = 0, 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def learnt(steps=4, model="llama", **how):
    net, _ = tiny(model)
    words = ", ".join(f"{k}={v}" for k, v in ({"decoder_width": 32, "kept": 64} | how).items())
    pair = burnish.parse(f"copilot({words})")[0].lifecycle(net.eval())
    some = batches()
    losses = [pair.learn(some[k % 3]) for k in range(steps)]
    return net, pair, some, losses


# -- the error ---------------------------------------------------------------------------------
def test_the_error_is_one_hot_less_the_softmax():
    net, pair, (batch, *_), _ = learnt(1)
    out, record = pair.recorded(batch)
    q = net(**{k: v for k, v in batch.items() if k != "labels"}).logits.softmax(-1).detach()
    p = torch.nn.functional.one_hot(batch["input_ids"][:, 1:], 64).float()
    assert torch.allclose(error(record, 64)[:, :-1], p - q[:, :-1], atol=1e-6)
    few = burnish.parse("copilot(kept=5)")[0].lifecycle(net).recorded(batch)[1]
    top = torch.zeros_like(q).scatter(-1, q.topk(5).indices, q.topk(5).values)
    assert torch.allclose(error(few, 64)[:, :-1], p - top[:, :-1], atol=1e-6)
    assert few.words.shape == few.q.shape == (2, 9, 5)                # and no row of V in the log
    states = net(**{k: v for k, v in batch.items() if k != "labels"},
                 output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.allclose(record.h, sum(states).detach() / 3, atol=1e-6)
    asked = batch["labels"][:, 1:] != -100
    assert torch.equal(record.asked[:, :-1], asked) and not record.asked[:, -1].any()


def test_the_loss_is_the_root_of_the_mean_square_over_what_is_asked():
    _, pair, some, _ = learnt(3)
    record = Record(**{k: v.double() if v.is_floating_point() else v
                       for k, v in vars(pair.recorded(some[0])[1]).items()})
    made = pair.copilot.double()
    f, l_BTV = made(record), error(record, 64)
    rows = [((f[b, t] - l_BTV[b, t]) ** 2).sum() for b in range(2) for t in range(9)
            if record.asked[b, t]]
    assert torch.allclose(made.loss(record), torch.stack(rows).mean().sqrt(), atol=1e-12)


def test_the_copilot_sees_past_errors_and_states_up_to_now():
    torch.manual_seed(0)
    made = Corrector(20, 6, 16, 2, 4).eval()
    torch.nn.init.normal_(made.out.weight)
    q = torch.rand(1, 7, 20).softmax(-1)
    top = q.topk(5)
    record = Record(top.indices, top.values, torch.randint(20, (1, 7)), torch.randn(1, 7, 6),
                    torch.ones(1, 7).bool(), torch.ones(1, 7).bool())
    before = made(record)

    def moved(**changed):
        return ((made(Record(**{**vars(record), **changed})) - before).abs() > 1e-6).any(-1)[0]

    token, h = record.token.clone(), record.h.clone()
    token[0, 3], h[0, 3] = (token[0, 3] + 1) % 20, 5.0
    assert moved(token=token).tolist() == [False] * 4 + [True] * 3     # l_3 from token 4 on
    assert moved(h=h).tolist() == [False] * 3 + [True] * 4             # h_3 from token 3 on
    valid = record.valid.clone()
    valid[0, 6] = False
    assert not moved(valid=valid)[:6].any()
    early = record.valid.clone()
    early[0, :2] = False                                               # padded in front
    assert torch.isfinite(made(Record(**{**vars(record), "valid": early}))).all()


# -- joined --------------------------------------------------------------------------------------
def test_no_gradient_goes_from_the_copilot_to_the_pilot():
    net, _ = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=2)")
    pair = burnish.parse("copilot(decoder_width=32)")[0].lifecycle(tuned)
    alone = burnish.tune(copy.deepcopy(tiny("llama")[0]), "lora(rank=2)")
    for batch in batches():
        was = {n: p.detach().clone() for n, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = None
        pair.learn(batch)
        assert all(p.grad is None for p in net.parameters())
        assert all(torch.equal(p, was[n]) for n, p in net.named_parameters())
        tuned.step(batch)
        alone.step(batch)
    for (n, a), (_, b) in zip(tuned.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(a, b), n                                    # as if nobody looked on
    assert net.training and not any(t.requires_grad for r in pair.records for t in vars(r).values())


def test_it_learns_the_mistakes_and_answers_are_more_right():
    net, pair, some, losses = learnt(150, decoder_rate=0.003)
    assert losses[-1] < 0.5 * losses[0]
    batch = {k: v for k, v in some[0].items() if k != "labels"}
    told = pair.recorded(some[0])[1].asked[:, :-1]

    def said():
        logits = net(**batch).logits.detach()[:, :-1].log_softmax(-1)
        return float(logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][told].mean())

    plain = said()
    with pair.standing():
        mild = said()
    with pair.standing(alpha=0.9):
        assert said() > mild > plain
    assert said() == plain


def test_a_perfect_copilot_at_one_gives_the_truth():
    net, pair, (batch, *_), _ = learnt(1)
    l_BTV = error(pair.recorded(batch)[1], 64)
    pair.copilot.forward = lambda record: l_BTV
    with pair.standing(alpha=1.0):
        said = net(**{k: v for k, v in batch.items() if k != "labels"}).logits.exp()[:, :-1]
    p = torch.nn.functional.one_hot(batch["input_ids"][:, 1:], 64).float()
    assert torch.allclose(said, p, atol=1e-5)


def test_at_no_strength_the_pilot_answers_bit_for_bit():
    net, pair, (batch, *_), _ = learnt(5)
    given = {k: v for k, v in batch.items() if k != "labels"}
    plain = net(**given).logits
    with pair.standing(alpha=0.0):
        assert torch.equal(net(**given).logits, plain)
    q = plain.softmax(-1)
    assert corrected(q, torch.randn_like(q), 0.0) is q
    fresh = burnish.parse("copilot")[0].lifecycle(net)
    with fresh.standing(alpha=0.0):
        assert torch.equal(net(**given).logits, plain)


def test_what_is_corrected_is_a_distribution():
    q = torch.rand(5, 9).softmax(-1)
    f = torch.randn(5, 9)
    got = corrected(q, f, 0.3)
    want = torch.stack([(q[i] + 0.3 * f[i]).clamp(min=0) for i in range(5)])
    assert torch.allclose(got, want / want.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(corrected(q, torch.full_like(q, -9.0), 1.0), q)  # nothing would be left


def test_texts_are_written_on_with_ones_own_tokens():
    net, pair, _, _ = learnt(60)
    ids = torch.tensor([[5, 9, 3, 12]])
    with pair.standing(alpha=0.9):
        made = net.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False,
                            eos_token_id=None, logits_to_keep=0)
        for t in range(4, 8):                                          # each from the text so far
            assert int(net(input_ids=made[:, :t], use_cache=False).logits[0, -1].argmax()) == \
                int(made[0, t])
        with pytest.raises(ConfigError, match="use_cache=False"):
            kept = net.model(ids, use_cache=True).past_key_values
            net(input_ids=ids[:, -1:], past_key_values=kept)


def test_the_log_forgets_and_the_numbers_are_these():
    _, pair, _, _ = learnt(9, log=4)
    assert len(pair.records) == 4
    V, D, S = 64, 32, 32
    per = 8 * S * S + 8 * S + 8 * S * S + 5 * S + 6 * S                 # two attentions, MLP, norms
    assert sum(p.numel() for p in pair.copilot.parameters()) == \
        V * S + S + D * S + S + 2 * per + 2 * S + S * V + V


def test_refusals():
    for text, words in (("copilot(kept=0)", "kept, log, decoder_blocks and decoder_heads of"),
                        ("copilot(decoder_width=30)", "that the heads divide"),
                        ("copilot(alpha=-1.0)", "would add mistakes"),
                        ("copilot(targets='q')", "targets='q' does nothing")):
        with pytest.raises(ConfigError, match=words):
            burnish.parse(text)
    net, pair, (batch, *_), _ = learnt(1)
    with pytest.raises(ConfigError, match="a batch of texts has input_ids"):
        pair.learn({"pixel_values": torch.zeros(1)})
    with pytest.raises(ConfigError, match="labels are all -100"):
        pair.learn({**batch, "labels": batch["labels"] * 0 - 100})
    with pytest.raises(ConfigError, match="nothing has been learnt yet"), \
            burnish.parse("copilot")[0].lifecycle(net).standing():
        pass
    with pair.standing(), pytest.raises(ConfigError, match="logits_to_keep=0"):
        net(input_ids=batch["input_ids"], logits_to_keep=1)
