"""PCP: what is written, what is asked for, and the four stages."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import burnish
from burnish.core.recipe import parse
from burnish.methods.lifecycle.pcp import Pcp, Written

MASK, CLS, SEP, PAD = 4, 2, 3, 1
TEMPLATES, WORDS = ((10, MASK), (11, MASK, 13)), ((20, 21), (22,))
METHOD = Pcp(templates=TEMPLATES, label_words=WORDS, mask_token=MASK, special=(CLS, SEP, PAD))


def model():
    torch.manual_seed(0)
    net = BertForMaskedLM(BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40, pad_token_id=PAD))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def texts(n=24, seed=0):
    """Class 0 speaks of 30 .. 39, class 1 of 40 .. 49."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    ids = torch.randint(30, 40, (n, 6), generator=g) + 10 * labels.unsqueeze(1)
    ids = torch.cat([torch.full((n, 1), CLS), ids, torch.full((n, 1), SEP)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_texts_are_written_with_the_word_of_their_class():
    tuned = burnish.tune(model(), "full", head=False)
    batch = texts(4)
    rows = METHOD.write(tuned, batch, labels=[1, 0, 0, 1])
    for m, template in enumerate(TEMPLATES):
        for b, label in enumerate([1, 0, 0, 1]):
            word = WORDS[label][0]
            want = [*batch["input_ids"][b, :-1].tolist(),
                    *(word if t == MASK else t for t in template), SEP]
            row = rows.tokens[4 * m + b].tolist()
            assert row == want + [PAD] * (len(row) - len(want))
            assert rows.mask[4 * m + b].tolist() == [1] * len(want) + [0] * (len(row) - len(want))
    said = METHOD.lifecycle(tuned, batch).argmax(1)
    own = METHOD.write(tuned, batch)
    assert torch.equal(own.tokens, METHOD.write(tuned, batch, labels=said).tokens)


def test_a_share_of_all_tokens_is_asked_for_the_word_among_them():
    tuned = burnish.tune(model(), "full", head=False)
    rows = METHOD.write(tuned, texts(400), labels=texts(400)["labels"])
    asked = METHOD.asked(tuned, rows, torch.Generator().manual_seed(1))
    taken = asked["labels"] != -100
    may = rows.mask.bool() & ~torch.isin(rows.tokens, torch.tensor([CLS, SEP, PAD]))
    assert not (taken & ~may).any()
    n, k = int(may.sum()), int(taken.sum())
    assert abs(k / n - 0.15) < 3 * (0.15 * 0.85 / n) ** 0.5
    assert torch.equal(asked["labels"][taken], rows.tokens[taken])
    assert torch.equal(asked["input_ids"][~taken], rows.tokens[~taken])
    read, true = asked["input_ids"][taken], rows.tokens[taken]
    masked, same = read == MASK, read == true
    assert abs(float(masked.float().mean()) - 0.8) < 0.04 + 1 / 64
    assert abs(float(same.float().mean()) - 0.1) < 0.04 + 1 / 64
    words = torch.isin(rows.tokens, torch.tensor([20, 22]))
    assert 0.1 < float((taken & words).sum() / words.sum()) < 0.2
    other = METHOD.asked(tuned, rows, torch.Generator().manual_seed(2))
    again = METHOD.asked(tuned, rows, torch.Generator().manual_seed(1))
    assert torch.equal(again["input_ids"], asked["input_ids"])
    assert not torch.equal(other["labels"], asked["labels"])


def test_without_special_tokens_every_token_is_asked_for():
    tuned = burnish.tune(model(), "full", head=False)
    own = {k: getattr(METHOD, k) for k in ("templates", "label_words", "mask_token")}
    method = Pcp(**own, ratio=1.0)
    rows = method.write(tuned, texts(5), labels=texts(5)["labels"])
    rows.tokens[:, 3] = PAD                              # a token like any other here
    asked = method.asked(tuned, rows, torch.Generator().manual_seed(1))
    assert torch.equal(asked["labels"] != -100, rows.mask.bool())


def test_what_stands_for_a_token_is_named():
    tuned = burnish.tune(model(), "full", head=False)
    rows = Written(texts(2)["input_ids"], texts(2)["attention_mask"], Pcp().how())
    with pytest.raises(burnish.ConfigError, match="pcp needs mask_token"):
        Pcp().asked(tuned, rows)


def test_the_four_stages():
    few, many, test = texts(8, 1), texts(48, 2), texts(40, 3)
    net = model()

    def right(tuned):
        return float((METHOD.lifecycle(tuned, test).argmax(1) == test["labels"]).float().mean())

    tuned = burnish.tune(net, "full", head=False)
    before = {k: v.clone() for k, v in tuned.detach().state_dict().items()}
    tuned = burnish.tune(net, "full", head=False)
    tuned.optimizer(lr=1e-3)
    for _ in range(8):
        METHOD.step(tuned, few)
    rows = METHOD.write(tuned, many)
    net = tuned.detach()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    tuned = burnish.tune(net, "lora(rank=4)", head=False)
    tuned.optimizer(lr=1e-2)
    g = torch.Generator().manual_seed(0)
    losses = [float(METHOD.read(tuned, rows, g)) for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    with torch.no_grad():
        held = METHOD.lifecycle(tuned, test)
    net = tuned.merge()
    tuned = burnish.tune(net, "full", head=False)
    torch.testing.assert_close(METHOD.lifecycle(tuned, test), held, rtol=1e-3, atol=1e-4)
    tuned.optimizer(lr=1e-3)
    for _ in range(12):
        METHOD.step(tuned, few)
    assert right(tuned) >= 0.8


def test_a_stage_is_a_file_and_another_template_is_refused(tmp_path):
    tuned = burnish.tune(model(), "full", head=False)
    rows = METHOD.write(tuned, texts(6))
    tensors, metadata = rows.state()
    save_file(tensors, tmp_path / "rows.safetensors", metadata)
    with safe_open(tmp_path / "rows.safetensors", "pt") as f:
        back = METHOD.restored(load_file(tmp_path / "rows.safetensors"), f.metadata())
    assert torch.equal(back.tokens, rows.tokens) and torch.equal(back.mask, rows.mask)
    METHOD.read(tuned, back)
    for change, key in ((dict(templates=((10, MASK), (12, MASK, 13))), "templates"),
                        (dict(label_words=((20,), (22,))), "label_words")):
        own = {k: getattr(METHOD, k) for k in ("templates", "label_words", "mask_token")}
        other = Pcp(**{**own, **change})
        with pytest.raises(burnish.ConfigError, match=f"written with {key}=.*need the same"):
            other.read(tuned, rows)
        with pytest.raises(burnish.ConfigError, match=f"written with {key}="):
            other.restored(tensors, metadata)
    for bad in (({}, metadata), (tensors, {}), (tensors, {"pcp": "{"})):
        with pytest.raises(burnish.FormatError, match="not a file of pcp's rows"):
            METHOD.restored(*bad)
    moved = Written(rows.tokens, rows.mask, {**rows.how, "mask_token": 5})
    with pytest.raises(burnish.ConfigError, match="written with mask_token=5"):
        METHOD.read(tuned, moved)


def test_its_settings():
    made = parse("pcp")[0]
    assert made.ratio == 0.15 and made.special == () and made.attack == 0.0
    for ratio in (0.0, 1.5):
        with pytest.raises(burnish.ConfigError, match="ratio is a share"):
            Pcp(ratio=ratio)
    with pytest.raises(burnish.ConfigError, match="every template has the mask"):
        Pcp(templates=((1, 2),), mask_token=MASK)
    with pytest.raises(burnish.ConfigError, match="needs templates"):
        made.write(burnish.tune(model(), "full", head=False), texts(2))
