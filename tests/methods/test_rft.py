"""RFT: the policy gradient answer by answer, a filter that drops what is worth nothing."""

from __future__ import annotations

import copy

import pytest
import torch

import burnish
from burnish.blocks.update.rewarded import advantages, answered, policy_loss
from burnish.core.errors import ConfigError
from burnish.core.recipe import parse
from burnish.methods.lifecycle.rft import Rft
from burnish.testing.models import tiny


def test_advantages_compare_the_answers_of_one_prompt():
    A = advantages(torch.tensor([[1.0, 0, 0, 1], [3, 3, 3, 3], [0, 0, 0, 0], [1, 2, 3, 6]],
                                dtype=torch.float64))
    assert A[0].tolist() == [1, -1, -1, 1]
    assert A[1].tolist() == A[2].tolist() == [0] * 4
    r = [1.0, 2, 3, 6]
    std = (sum((x - 3) ** 2 for x in r) / 4) ** 0.5
    assert A[3].tolist() == pytest.approx([(x - 3) / std for x in r])
    assert advantages(torch.full((1, 3), 0.1)).tolist() == [[0, 0, 0]]       # no rounding either


def test_the_loss_is_the_equation():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 6, 7, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(7, (3, 6), generator=g)
    labels[:, :2] = -100
    labels[1, 4:] = -100
    A = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    want = 0.0
    for n in range(3):
        said = [t for t in range(1, 6) if labels[n, t] != -100]
        mean = sum(z[n, t - 1].log_softmax(-1)[labels[n, t]] for t in said) / len(said)
        want = want - A[n] * mean
    got = policy_loss(z, labels, A, 8)
    torch.testing.assert_close(got, want / 8)
    for a, b in zip(torch.autograd.grad(got, z), torch.autograd.grad(want / 8, z), strict=True):
        torch.testing.assert_close(a, b)


def test_answers_worth_the_same_have_no_gradient_at_all():
    z = torch.randn(4, 5, 6).requires_grad_()
    A = advantages(torch.full((1, 4), 0.7)).flatten()
    (g,) = torch.autograd.grad(policy_loss(z, torch.randint(6, (4, 5)), A, 4), z)
    assert not g.any()


def test_an_answer_ends_with_its_end():
    ids = torch.tensor([[5, 1, 7, 1, 1], [5, 1, 7, 8, 9], [1, 1, 1, 4, 1]])
    assert answered(ids, 2, [1]).tolist() == [[-100, -100, 7, 1, -100], [-100, -100, 7, 8, 9],
                                            [-100, -100, 1, -100, -100]]
    assert answered(ids, 2, [])[:, 2:].tolist() == ids[:, 2:].tolist()
    assert answered(ids, 2, [4, 8])[:, 2:].tolist() == [[7, 1, 1], [7, 8, -100], [1, 4, -100]]


# -- of a model -----------------------------------------------------------------------------------
def model(dtype=torch.float64):
    net, _ = tiny("llama")
    net.generation_config.eos_token_id = 3
    return net.to(dtype)


def prompts(n=4):
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(4, 60, (1, 3 + i), generator=g)} for i in range(n)]


def test_the_filter_drops_exactly_the_prompts_that_earn_nothing():
    rows, lines = prompts(6), []
    tuned = burnish.tune(model(), "lora(rank=2)")
    tuned.model.train()

    def reward(row, answer):
        assert answer.dim() == 1 and 1 <= len(answer) <= 5
        if row is rows[2]:
            return 1.0                                   # all the same, but worth something
        if row is rows[4]:
            return -1.0 if len(answer) > 4 else 0.0
        return float(int(answer[0]) % 2) if row is not rows[1] else 0.0

    torch.manual_seed(0)
    kept = Rft(rollouts=6, longest=5).lifecycle(tuned, rows, reward, say=lines.append)
    want = [i for i in range(6) if any(float(r) != 0 for r in kept.rewards[i])]
    assert kept.rows == want and 1 not in want and 2 in want
    assert kept.rewards.shape == (6, 6) and kept.rewards[2].tolist() == [1.0] * 6
    assert kept.dropped == pytest.approx(1 - len(want) / 6)
    assert f"{len(want)} of 6 prompts" in lines[0] and tuned.model.training


def test_a_step_is_that_of_the_answers_it_drew():
    rows, drawn = prompts(3), []
    net = model()
    other = copy.deepcopy(net).eval()

    def reward(row, answer):
        at = next(i for i, r in enumerate(rows) if r is row)
        drawn.append((at, answer.clone(), float(at != 1) * float(len(drawn) % 3)))
        return drawn[-1][2]

    tuned = burnish.tune(net.eval(), "full + sgd")
    tuned.optimizer(0.5)
    torch.manual_seed(3)
    rewards = Rft(rollouts=4, longest=5).step(tuned, rows, reward)
    assert rewards.shape == (3, 4) and rewards[1].tolist() == [0] * 4
    total = 0.0
    for at in range(3):
        mine = [(a, r) for i, a, r in drawn if i == at]
        r = torch.tensor([x for _, x in mine], dtype=torch.float64)
        std = (r - r.mean()).square().mean().sqrt()
        for answer, worth in mine:
            if not std:
                continue
            whole = torch.cat([rows[at]["input_ids"][0], answer])
            logp = other(whole[None]).logits[0].log_softmax(-1)
            n = rows[at]["input_ids"].shape[1]
            said = sum(logp[t - 1, whole[t]] for t in range(n, len(whole))) / len(answer)
            total = total - (worth - r.mean()) / std * said / 12
    params = dict(other.named_parameters())
    grads = torch.autograd.grad(total, list(params.values()))
    now = dict(net.named_parameters())
    for (name, p), g in zip(params.items(), grads, strict=True):
        torch.testing.assert_close(now[name], p - 0.5 * g, rtol=1e-6, atol=1e-9, msg=name)


def test_prompts_whose_answers_are_alike_make_no_update():
    tuned = burnish.tune(model(), "full + sgd(momentum=0.9)")
    tuned.optimizer(0.5, weight_decay=0.1)
    before = {n: p.clone() for n, p in tuned.named_parameters()}
    rewards = Rft(rollouts=2, longest=2).step(tuned, prompts(2), lambda row, answer: 0.25)
    assert rewards.tolist() == [[0.25, 0.25]] * 2 and tuned.timeline.step == 0
    assert all(torch.equal(p, before[n]) for n, p in tuned.named_parameters())


def test_what_is_rewarded_becomes_likelier():
    net = model(torch.float32)
    tuned = burnish.tune(net, "full")
    tuned.optimizer(1e-2)
    row = prompts(1)[0]

    def chance():
        with torch.no_grad():
            return float(net.eval()(**row).logits[0, -1].softmax(-1)[7:40].sum())

    before = chance()
    torch.manual_seed(0)
    method = Rft(rollouts=16, longest=1)
    for _ in range(10):
        method.step(tuned, [row], lambda _, answer: float(7 <= int(answer[0]) < 40))
    assert chance() > before + 0.1


def test_padding_before_a_prompt_does_not_count():
    row = prompts(1)[0]["input_ids"]
    padded = {"input_ids": torch.cat([torch.zeros(1, 2, dtype=row.dtype), row], 1),
              "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    tuned = burnish.tune(model(), "full + sgd")
    tuned.optimizer(0.1)
    seen = []
    tuned.model.model.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["attention_mask"]) if torch.is_grad_enabled() else None,
        with_kwargs=True)
    Rft(rollouts=3, longest=2).step(tuned, [padded], lambda _, answer: float(answer.sum()))
    assert seen[-1][:, :5].tolist() == [[0, 0, 1, 1, 1]] * 3
    drawn = []

    def reward(_, answer):
        drawn.append(len(answer))
        return float(len(drawn))

    tuned.model.generation_config.eos_token_id = list(range(30))        # answers of many lengths
    Rft(rollouts=6, longest=6).step(tuned, [padded, {"input_ids": row}], reward)
    assert len(set(drawn)) > 2
    want = [[0, 0, 1, 1, 1][at * 2:] + [1] * n for at in (0, 1) for n in drawn[6 * at:][:6]]
    long = seen[-1].shape[1]
    assert seen[-1].tolist() == [w + [0] * (long - len(w)) for w in want]


@pytest.mark.parametrize("ends, pad", [(None, 0), (7, 7), ([5, 9], 5)])
def test_answers_are_drawn_of_the_whole_distribution(monkeypatch, ends, pad):
    tuned = burnish.tune(model(), "full + sgd")
    tuned.model.generation_config.eos_token_id = ends
    asked, real = [], tuned.model.generate
    monkeypatch.setattr(tuned.model, "generate", lambda **kw: (asked.append(kw), real(**kw))[1])
    kept = Rft(rollouts=3, longest=2, temperature=0.7).lifecycle(tuned, prompts(1),
                                                                 lambda *_: 0.0)
    assert kept.dropped == 1.0
    (how,) = asked
    assert {k: how[k] for k in ("do_sample", "temperature", "top_k", "top_p", "pad_token_id")} == {
        "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "pad_token_id": pad}
    assert (how["num_return_sequences"], how["max_new_tokens"]) == (3, 2)


def test_refusals_and_defaults():
    assert parse("rft")[0].settings() == {"targets": None, "rollouts": 8, "longest": 64,
                                          "temperature": 1.0}
    for wrong in ("rollouts=1", "longest=0", "temperature=0"):
        with pytest.raises(ConfigError, match="^rft"):
            parse(f"rft({wrong})")
    with pytest.raises(ConfigError, match="targets='q' does nothing"):
        parse("rft(targets='q')")
    tuned, method = burnish.tune(model(), "lora(rank=2)"), Rft(rollouts=2, longest=1)
    row = prompts(1)[0]
    for call, words in (
            (lambda: method.lifecycle(tuned, [], lambda *_: 0.0), "no prompts"),
            (lambda: method.step(tuned, [], lambda *_: 0.0), "no prompts"),
            (lambda: method.step(tuned, [{**row, "pixel_values": row["input_ids"]}],
                                 lambda *_: 0.0), "pixel_values"),
            (lambda: method.lifecycle(tuned, [{"input_ids": torch.ones(2, 3).long()}],
                                      lambda *_: 0.0), r"one row of input_ids, \(1, L\)"),
            (lambda: method.lifecycle(tuned, [row], lambda *_: float("nan")), "reward is nan"),
            (lambda: method.lifecycle(burnish.tune(tiny("bert")[0], "lora(rank=2)"), [row],
                                      lambda *_: 0.0), "writes nothing on")):
        with pytest.raises(ConfigError, match=words):
            call()
