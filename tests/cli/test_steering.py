"""burnish steer: pairs of answers become one vector, which merges into a bias."""

from __future__ import annotations

import json

import pytest
import torch

from burnish.cli import main


def run(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A language model, pairs of loud and quiet answers, and pairs of long and short ones."""
    from tests.e2e.conftest import bytelevel
    from transformers import LlamaConfig, LlamaForCausalLM

    at = tmp_path_factory.mktemp("steer")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=bytelevel(at / "base"), hidden_size=32, intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128,
        initializer_range=0.3)).save_pretrained(at / "base")
    words = ["cat", "dog", "bank", "park", "mat", "stock", "ran", "sat", "the", "on"] * 2
    for name, high, low in (("loud", str.upper, str.lower), ("long", lambda w: w * 2, str)):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(
            {"prompt": f"say {w} ", "chosen": high(w), "rejected": f"{low(w)}."}) + "\n"
            for w in words))
    return at


def test_a_vector_is_found_written_evaluated_and_merged(capsys, at, tmp_path):
    code, out, err = run(capsys, "steer", at / "base", at / "loud.jsonl", "--output",
                         tmp_path / "loud", "--layer", 1, "--alphas", "0.5,1,2", "--cap", "3",
                         "--json")
    assert code == 0, err
    told = json.loads(out)
    first, *others = told["tried"]
    assert (first["alpha"], first["gain"], first["cost"]) == (0.0, 0.0, 1.0)   # its own delta is 0
    assert [t["alpha"] for t in others] == [0.5, 1.0, 2.0]
    best = max((t for t in others if t["cost"] <= 3), key=lambda t: t["alignment"])
    assert told["best"] == best["alpha"] and best["gain"] > 0
    assert told["recipe"] == f"steering(layer=1, alpha={best['alpha']})"

    from transformers import AutoModelForCausalLM

    from burnish.formats.folder import read_adapter

    (vector,) = read_adapter(tmp_path / "loud")[1].values()
    assert vector.shape == (32,) and float(vector.norm()) == pytest.approx(told["norm"], rel=1e-5)
    code, out, err = run(capsys, "evaluate", tmp_path / "loud", at / "loud.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["these"] == "held out by this run"
    assert json.loads(out)["tuned"]["margin"] > 0                # rewards are beside the base's
    code, _, err = run(capsys, "predict", tmp_path / "loud", "say cat ")
    assert code == 0, err
    code, _, err = run(capsys, "merge", tmp_path / "loud", "--output", tmp_path / "merged")
    assert code == 0, err
    plain, merged = (AutoModelForCausalLM.from_pretrained(f).eval()
                     for f in (at / "base", tmp_path / "merged"))
    bias = dict(merged.named_parameters())["model.layers.1.mlp.down_proj.bias"]
    assert torch.allclose(bias, best["alpha"] * vector, atol=1e-6)
    plain.model.layers[1].register_forward_hook(
        lambda m, a, y: y + bias if isinstance(y, torch.Tensor) else (y[0] + bias, *y[1:]))
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, merged(ids).logits, atol=1e-5)


def test_another_trait_is_taken_out(capsys, at, tmp_path):
    from burnish.formats.folder import read_adapter

    found = {}
    for name, how in (("long", ()), ("loud", ("--against", at / "long.jsonl"))):
        code, _, err = run(capsys, "steer", at / "base", at / f"{name}.jsonl", "--output",
                           tmp_path / name, "--cap", "100", "--alphas", "1", *how)
        assert code == 0, err
        (found[name],) = read_adapter(tmp_path / name)[1].values()
    a, b = found.values()
    assert abs(float(a @ b)) < 1e-5 * float(a.norm() * b.norm())


def test_what_cannot_be_steered_is_refused(capsys, at, tmp_path, monkeypatch):
    def refused(words, *how, pairs=at / "loud.jsonl", to=tmp_path / "o"):
        code, out, err = run(capsys, "steer", at / "base", pairs, "--output", to, *how)
        assert code in (1, 2) and words in err.replace("\n", " "), err
        assert not (tmp_path / "o").exists()

    refused("expected numbers", "--alphas", "1,much")
    refused("strengths as finite numbers and a cap of 1 or more", "--cap", "0.5")
    refused("this model has blocks 0 to 2", "--layer", "7")
    said = iter([(0.0, 4.0), (1.0, 4.5), (2.0, 6.0)])
    with monkeypatch.context() as m:
        m.setattr("burnish.fit.steer._figures", lambda *a: next(said))
        refused("every strength raises the perplexity of held-out answers to more than 1.1 times "
                "what it was (1.12 at least)", "--alphas", "1,2")
    refused("the model", to=at / "base")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 4)
    refused("preference tuning reads prompt, chosen and rejected", pairs=tmp_path / "x.jsonl")
