"""Transformer Copilot: the mistakes of a language model, foretold and put right."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

import burnish
from burnish.blocks.state.mistakes import Corrector, Record, corrected, error, righted
from burnish.core.errors import BurnishError, ConfigError, RecipeError
from burnish.memory import measure, simulate
from burnish.methods.side import copilot as module
from burnish.methods.side._mistakes import Beside
from burnish.testing.models import tiny

SIZES = {"decoder_width": 32, "kept": 64, "log": 4}


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


def text(**how):
    return f"copilot({', '.join(f'{k}={v!r}' for k, v in (SIZES | how).items())})"


def joined(model="llama", lr=0.0, net=None, **how):
    """A pilot that stands still unless it is told to move, and its copilot."""
    net = tiny(model)[0] if net is None else net
    tuned = burnish.tune(net, f"lora(rank=2) + {text(**how)}")
    tuned.optimizer(lr=lr)
    return tuned, next(h for n, h in tuned.timeline.handlers if n == "copilot")


def stepped(steps=4, **how):
    tuned, handler = joined(**how)
    some, losses = batches(), []
    for k in range(steps):
        tuned.step(some[k % 3])
        losses.append(float(handler.last))
    return tuned, handler, some, losses


def plain(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


@torch.no_grad()
def answers(tuned, batch):
    tuned.model.eval()
    return tuned.model(**batch)


def pilot(tuned, batch):
    """With a gradient the pilot answers for itself."""
    tuned.model.eval()
    out = tuned.model(**batch)
    assert out.logits.requires_grad
    return out.logits.detach()


# -- the error ---------------------------------------------------------------------------------
def test_a_record_is_one_hot_less_the_softmax_and_the_mean_of_the_states():
    tuned, handler, (batch, *_), _ = stepped(1, log=1)
    (record,) = handler.records
    q = pilot(tuned, plain(batch)).softmax(-1)
    p = torch.nn.functional.one_hot(batch["input_ids"][:, 1:], 64).float()
    assert torch.allclose(error(record, 64)[:, :-1], p - q[:, :-1], atol=1e-6)
    states = list(tuned.model(**plain(batch), output_hidden_states=True).hidden_states[:2])
    hook = tuned.model.model.layers[-1].register_forward_hook(lambda m, a, out: states.append(out))
    tuned.model(**plain(batch))
    hook.remove()
    assert len(states) == 3 and torch.allclose(record.h, sum(states).detach() / 3, atol=1e-6)
    asked = batch["labels"][:, 1:] != -100
    assert torch.equal(record.asked[:, :-1], asked) and not record.asked[:, -1].any()
    assert not any(t.requires_grad for t in vars(record).values())

    _, few, _, _ = stepped(1, kept=5)
    top = torch.zeros_like(q).scatter(-1, q.topk(5).indices, q.topk(5).values)
    assert torch.allclose(error(few.records[0], 64)[:, :-1], p - top[:, :-1], atol=1e-6)
    assert few.records[0].words.shape == few.records[0].q.shape == (2, 9, 5)


def test_the_loss_is_the_root_of_the_mean_square_over_what_is_asked():
    tuned, handler, some, _ = stepped(3)
    record = Record(**{k: v.double() if v.is_floating_point() else v
                       for k, v in vars(handler.records[0]).items()})
    made = copy.deepcopy(handler.beside.decoder).double()
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


# -- training ------------------------------------------------------------------------------------
def test_the_decoder_takes_steps_of_adam():
    """Against torch's own, on the records that are drawn."""
    tuned, handler = joined(log=1, decoder_rate=0.02)
    handler.beside.decoder.double()            # a bias of keys has a gradient of rounding alone
    twin = copy.deepcopy(handler.beside.decoder).requires_grad_(True)
    adam = torch.optim.Adam(twin.parameters(), 0.02)
    for batch in batches(4):
        tuned.step(batch)
        loss = twin.loss(handler.records[-1])
        assert float(loss.detach()) == pytest.approx(float(handler.last), rel=1e-12)
        adam.zero_grad()
        loss.backward()
        adam.step()
    for (n, a), b in zip(twin.named_parameters(), handler.weights.values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9), n
    assert handler.told() == {"steps": 4, "loss": float(handler.last)}


def test_no_gradient_goes_from_the_copilot_to_the_pilot():
    """As if nobody looked on, in training and in evaluation mode, dropout and all."""
    for mode in (True, False):
        tuned, handler = joined(lr=1e-2, net=tiny("gpt2")[0])
        alone = burnish.tune(tiny("gpt2")[0], "lora(rank=2)")
        alone.optimizer(lr=1e-2)
        for k, batch in enumerate(batches(5)):
            found = []
            for t in (tuned, alone):
                t.model.train(mode)
                torch.manual_seed(k)
                found.append(t.step(batch))
            assert torch.equal(*found)
        own = dict(tuned.named_parameters())
        assert list(own) == [n for n, _ in alone.named_parameters()]
        for n, b in alone.named_parameters():
            assert torch.equal(own[n], b), n
        assert not any(p.requires_grad or p.grad is not None for p in handler.weights.values())
        assert float(handler.weights["out.weight"].abs().max()) > 0 and handler.taken == 5


def test_each_micro_batch_is_logged_and_the_log_forgets():
    tuned, handler = joined()
    opt = tuned.optimizer(lr=0.0, accumulation=3)
    handler = next(h for n, h in tuned.timeline.handlers if n == "copilot")
    for k in range(2):
        for b in batches(3, seed=k):
            tuned.backward(b, scale=1 / 3)
        opt.step()
        opt.zero_grad()
    assert handler.taken == 2 and len(handler.records) == 4
    kept = [*batches(3, 0)[2:], *batches(3, 1)]
    for r, b in zip(handler.records, kept, strict=True):
        assert torch.equal(r.token[:, :-1], b["input_ids"][:, 1:])
    tuned.backward({**b, "labels": b["labels"] * 0 - 100}, lambda out, _: out.logits.mean())
    assert len(handler.records) == 4 and torch.equal(handler.records[-1].token, r.token)


def test_it_learns_the_mistakes_and_answers_are_more_right():
    tuned, _, some, losses = stepped(100, decoder_rate=0.003)
    assert losses[-1] < 0.5 * losses[0]
    told = (some[0]["labels"][:, 1:] != -100)

    def said(logits):
        logits = logits[:, :-1].log_softmax(-1)
        return float(logits.gather(-1, some[0]["input_ids"][:, 1:, None])[..., 0][told].mean())

    out = answers(tuned, some[0])
    assert said(out.logits) > said(pilot(tuned, plain(some[0]))) + 0.2
    assert float(out.loss) == pytest.approx(-said(out.logits), rel=1e-5)
    with tuned.disabled(), torch.no_grad():
        base = tuned.model(**plain(some[0])).logits
    assert torch.allclose(base, pilot(tuned, plain(some[0])), atol=1e-6)


# -- answers -------------------------------------------------------------------------------------
def test_it_begins_as_the_pilot_and_is_the_pilot_at_no_strength():
    batch = batches(1, pad=True)[0]
    tuned, _ = joined()
    before = answers(tuned, batch)
    assert torch.equal(before.logits, pilot(tuned, plain(batch)))
    tuned, _, _, _ = stepped(3, alpha=0.0)
    assert torch.equal(answers(tuned, batch).logits, pilot(tuned, plain(batch)))


def test_answers_are_q_and_a_share_of_what_is_foretold():
    for pad in (False, True):
        tuned, handler, _, _ = stepped(12, decoder_rate=0.01)
        batch = batches(1, 7, pad)[0]
        z = pilot(tuned, plain(batch))
        tuned.model.train()
        tuned.backward(batch)
        record = handler.records[-1]                       # its own tokens, as when answering
        f = handler.beside.decoder.eval()(record).detach()
        want = (z.softmax(-1) + 0.3 * f).clamp(min=0)
        want = want / want.sum(-1, keepdim=True)
        got = answers(tuned, batch)
        real = batch["attention_mask"].bool()
        assert torch.allclose(got.logits.softmax(-1)[real], want[real], atol=1e-5)
        assert not torch.allclose(want, z.softmax(-1), atol=1e-3)
        whole = answers(tuned, {**batch, "output_hidden_states": True, "return_dict": False})
        assert torch.equal(whole[1], got.logits) and len(whole[-1]) == 3


def test_a_perfect_copilot_at_one_gives_the_truth():
    tuned, handler, (batch, *_), _ = stepped(1, alpha=1.0)
    l_BTV = error(handler.records[-1], 64)
    handler.beside.decoder.forward = lambda record: l_BTV
    said = answers(tuned, plain(batch)).logits.softmax(-1)[:, :-1]
    p = torch.nn.functional.one_hot(batch["input_ids"][:, 1:], 64).float()
    assert torch.allclose(said, p, atol=1e-5)


def test_what_is_corrected_is_a_distribution():
    z, f = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    q = z.softmax(-1)
    want = torch.stack([(q[i] + 0.3 * f[i]).clamp(min=0) for i in range(5)])
    want = want / want.sum(-1, keepdim=True)
    assert torch.allclose(corrected(q, f, 0.3), want, atol=1e-12)
    assert torch.allclose(righted(z, f, 0.3).softmax(-1), want, atol=1e-12)
    none = torch.full_like(q, -9.0)                        # nothing would be left
    assert torch.equal(corrected(q, none, 1.0), q) and torch.equal(righted(z, none, 1.0), z)
    assert corrected(q, f, 0.0) is q and torch.equal(righted(z, torch.zeros_like(f), 0.3), z)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_texts_are_written_on_with_ones_own_tokens_with_a_cache_and_without(model):
    tuned, _, _, _ = stepped(60, model=model, decoder_rate=0.01, alpha=0.9)
    net = tuned.model.eval()
    ids = torch.tensor([[0, 0, 5, 9, 3, 12], [4, 7, 8, 15, 6, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    how = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None,
           "pad_token_id": 0}
    made = net.generate(ids, use_cache=False, **how)
    for more in ({}, {"num_beams": 3}):                    # beams put a cache in another order
        assert torch.equal(net.generate(ids, **how, **more),
                           net.generate(ids, use_cache=False, **how, **more))
    with torch.no_grad():
        for t in range(6, 10):                             # each from the text so far
            given = {"input_ids": made[1:, :t], "attention_mask": torch.ones(1, t).long()}
            assert int(net(**given).logits[0, -1].argmax()) == int(made[1, t])
        last = net(**given, logits_to_keep=2).logits
        assert torch.allclose(last, net(**given).logits[:, -2:], atol=1e-5)
    other = tiny(model)[0].eval()
    with torch.no_grad(), pytest.raises(ConfigError, match="from its first token"):
        kept = other(input_ids=ids, use_cache=True).past_key_values
        net(input_ids=ids[:, -1:], past_key_values=kept)


# -- kept, promised, refused ---------------------------------------------------------------------
def test_a_file_brings_the_decoder_back(tmp_path):
    tuned, handler, (batch, *_), _ = stepped(20, lr=1e-2, decoder_rate=0.01)
    tuned.save(tmp_path / "a")
    again = burnish.load(tiny("llama")[0], tmp_path / "a")
    other = next(m for m in again.model.modules() if isinstance(m, Beside)).decoder
    for a, b in zip(handler.weights.values(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not b.requires_grad
    assert torch.equal(answers(again, batch).logits, answers(tuned, batch).logits)
    with pytest.raises(BurnishError, match="copilot"):
        tuned.merge()


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "full + checkpoint"])
def test_the_promise_is_what_is_measured_with_a_full_log(recipe):
    net, batch = tiny("llama")
    few, many = (f"{recipe} + {text(log=n)}" for n in (1, 64))
    promised = simulate(net, many, batch).peak_bytes
    record = 2 * 8 * (64 * 12 + 32 * 4 + 8 + 2)             # words, q; h; the token; two masks
    assert promised - simulate(net, few, batch).peak_bytes == pytest.approx(63 * record, rel=0.05)
    tuned = burnish.tune(net, many)
    tuned.optimizer(lr=1e-3)
    was = [p.clone() for p in net.parameters()]
    assert measure(tuned, batch).peak_bytes == promised
    assert all(torch.equal(a, b) for a, b in zip(was, net.parameters(), strict=True))
    handler = next(h for n, h in tuned.timeline.handlers if n == "copilot")
    assert not handler.records and not handler.taken, "a rehearsal leaves nothing"


def test_fit_trains_it_goes_on_from_a_checkpoint_and_answers_with_it(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from burnish.testing.tasks import characters

    words = characters()
    rows = [{"prompt": "ab "[:1 + i % 3] * (1 + i % 5), "completion": "cde"[i % 3:] * (1 + i % 4)}
            for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=96, pad_token_id=0, bos_token_id=1,
            eos_token_id=2))

    def run(name, **how):
        return burnish.fit(base(), tmp_path / "rows.jsonl", f"lora(rank=2) + {text(log=3)}",
                           output=tmp_path / name, processor=words, quiet=True, report=False,
                           **{"max_length": 32, "batch_size": 4, "validation": 4, "max_steps": 4,
                              "save_steps": 2, "save_total_limit": 9, "lr": 1e-2,
                              "measure": False, "label_smoothing_factor": 0.1,
                              "load_best_model_at_end": False} | how)

    whole = run("a")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    again = run("b", resume=True)
    for (n, a), (_, b) in zip(sorted(whole.tuned.tensors().items()),
                              sorted(again.tuned.tensors().items()), strict=True):
        assert torch.equal(a, b), n
    handlers = [next(h for n, h in r.tuned.timeline.handlers if n == "copilot")
                for r in (whole, again)]
    assert [h.taken for h in handlers] == [4, 4]
    for a, b in zip(*(h.records for h in handlers), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(),
                                                     strict=True))
    facts = json.loads((whole.folder / "run.json").read_text())
    assert facts["told"]["copilot"]["steps"] == 4
    for p, b in zip(handlers[0].records[-1].asked, handlers[0].records[-1].valid, strict=True):
        assert p.any() and int(p.sum()) < int(b.sum()) - 1, "prompts are no mistakes"
    with pytest.raises(ConfigError, match="copilot looks at each sample by itself"):
        run("f", packing=True)


def test_its_settings():
    made = burnish.parse("copilot")[0]
    assert (made.kept, made.log, made.decoder_rate, made.seed) == (32, 16, 1e-3, 0)


def test_the_decoder_is_drawn_from_its_seed_alone():
    def drawn(seed, other):
        torch.manual_seed(other)
        tuned, _ = joined(seed=seed)
        made = next(m for m in tuned.model.modules() if isinstance(m, Corrector))
        return torch.cat([p.detach().flatten() for p in made.parameters()])

    assert torch.equal(drawn(1, 5), drawn(1, 6)) and not torch.equal(drawn(1, 5), drawn(2, 5))


def test_states_may_be_wider_than_what_the_head_reads():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    net = OPTForCausalLM(OPTConfig(hidden_size=32, num_hidden_layers=1, ffn_dim=32, vocab_size=64,
                                   num_attention_heads=4, word_embed_proj_dim=16,
                                   max_position_embeddings=32, do_layer_norm_before=False))
    tuned, _ = joined(net=net)
    tuned.step(batches(1)[0])
    made = net.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert made.shape == (1, 5)


def test_the_numbers_are_these():
    _, handler = joined()
    V, D, S = 64, 32, 32
    per = 8 * S * S + 8 * S + 8 * S * S + 5 * S + 6 * S                 # two attentions, MLP, norms
    assert sum(p.numel() for p in handler.weights.values()) == \
        V * S + S + D * S + S + 2 * per + 2 * S + S * V + V


def test_refusals(monkeypatch):
    for bad, words in (("kept=0", "kept"), ("log=0", "log"), ("decoder_heads=0", "decoder_heads"),
                       ("decoder_width=30", "not divided by 4 heads"), ("alpha=-1.0", "alpha"),
                       ("decoder_rate=0.0", "decoder_rate")):
        with pytest.raises(RecipeError, match=words):
            burnish.parse(f"copilot({bad})")
    with pytest.raises(RecipeError, match="takes no targets"):
        burnish.tune(tiny("llama")[0], "lora(rank=2) + copilot(targets='q')")
    for other in ("mezo", "dp(sigma=1.0, batch=2)", "copilot(log=3)"):
        with pytest.raises(RecipeError, match="copilot"):
            burnish.tune(tiny("llama")[0], f"lora(rank=2) + {text()} + {other}")
    for model in ("bert", "vit", "t5"):
        with pytest.raises(RecipeError, match="copilot needs"):
            burnish.tune(tiny(model)[0], f"full + {text()}")
    tuned, _, (batch, *_), _ = stepped(1)
    embeds = torch.randn(2, 9, 32)
    with torch.no_grad(), pytest.raises(ConfigError, match="reads texts as input_ids"):
        tuned.model.eval()(inputs_embeds=embeds)
    with torch.no_grad(), pytest.raises(ConfigError, match="one number a token"):
        tuned.model(batch["input_ids"], attention_mask=torch.ones(2, 8).long())
    loop = burnish.tune(tiny("llama")[0], f"lora(rank=2) + {text()}")
    opt = loop.optimizer(lr=1e-3)
    loop.model(**batch).loss.backward()
    with pytest.raises(ConfigError, match="copilot acts around"):
        opt.step()
    monkeypatch.setattr(module, "processes", lambda: 2)
    with pytest.raises(ConfigError, match="use one process"):
        loop.optimizer(lr=1e-3)
