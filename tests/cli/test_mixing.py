"""burnish soup and arithmetic, on folders: what comes out, as transformers and burnish load it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import answer, done, logits, rows, run, weights

import burnish as library
from burnish.cli.mixing import terms
from burnish.core.errors import ConfigError
from burnish.testing.models import tiny


# -- whole models -----------------------------------------------------------------------------
def test_a_uniform_soup_is_the_mean_and_loads_in_transformers(capsys, models, tmp_path):
    out = tmp_path / "soup"
    said = done(capsys, "soup", models["base"], models["a"], models["b"], "--output", out)
    assert said["kind"] == "model"
    parts, got = [weights(models[n]) for n in ("base", "a", "b")], weights(out)
    for n, t in got.items():
        want = torch.stack([p[n].double() for p in parts]).mean(0)
        torch.testing.assert_close(t.double(), want, rtol=0, atol=1e-7)
    assert logits(out, tiny("bert")[1]).shape == (2, 3)
    assert done(capsys, "soup", models["a"], models["b"], "--output", out)   # our own may go
    assert torch.allclose(weights(out)["classifier.bias"],
                          (parts[1]["classifier.bias"] + parts[2]["classifier.bias"]) / 2)


def test_arithmetic_adds_and_subtracts_differences(capsys, models, tmp_path):
    out = tmp_path / "edited"
    said = done(capsys, "arithmetic", models["base"], "+", f"0.5*{models['a']}", "-", models["b"],
                "-o", out)
    assert [t["weight"] for t in said["terms"]] == [0.5, -1.0] and said["left"] == {}
    base, a, b = (weights(models[n]) for n in ("base", "a", "b"))
    for n, t in weights(out).items():
        z = base[n].double()
        want = z + 0.5 * (a[n].double() - z) - (b[n].double() - z)
        assert torch.equal(t, want.float()), n
    logits(out, tiny("bert")[1])
    once = done(capsys, "arithmetic", f"{models['base']} + {models['a']}", "-o", tmp_path / "one")
    assert once["kind"] == "model"
    assert all(torch.equal(t, a[n]) for n, t in weights(tmp_path / "one").items())


def test_heads_of_another_size_stay_the_bases_and_are_named(capsys, models, tmp_path):
    folder = tmp_path / "o"
    code, out, _ = run(capsys, "arithmetic", models["base"], "+",
                       models["other head"].rename(tmp_path / "more"), "-o", folder)
    assert code == 0
    assert "classifier.weight stays the base's: [7, 32] beside [3, 32]" in out
    base = weights(models["base"])
    assert torch.equal(weights(folder)["classifier.weight"], base["classifier.weight"])
    assert not torch.equal(weights(folder)["bert.pooler.dense.weight"],
                           base["bert.pooler.dense.weight"])


@pytest.mark.slow
def test_no_more_than_one_tensor_of_the_result_is_in_memory(models, tmp_path, monkeypatch):
    """Tensors of the result that are alive together, counted as they are written."""
    import gc
    import weakref

    from burnish.formats import combine, safe

    alive, most = weakref.WeakSet(), [0]
    stream = safe.save_stream

    def watched(tensors, like, path, metadata=None):
        def each():
            for name, t in tensors:
                alive.add(t)
                yield name, t
                del t
                gc.collect()
                most[0] = max(most[0], len(alive))
        return stream(each(), like, path, metadata)

    monkeypatch.setattr(safe, "save_stream", watched)
    for write in (lambda new: combine.sum_models([models["a"], models["b"]], [0.5, 0.5], new),
                  lambda new: combine.add_models(models["base"], [models["a"]], [1.0], new)):
        new = tmp_path / f"new{most[0]}{len(alive)}"
        new.mkdir(exist_ok=True)
        write(new)
    assert most[0] <= 2, "the one that is written, and the one that follows"


@pytest.mark.slow
def test_a_greedy_soup_keeps_what_does_not_hurt_and_says_so(capsys, tuned, tmp_path):
    held = rows(tmp_path / "held.csv", 16)
    for kind in ("", "-model"):
        folders = [tuned / f"{n}{kind}" for n in ("bad", "good", "fine")]
        out = tmp_path / f"soup{kind}"
        said = done(capsys, "soup", *folders, "--greedy", "--data", held, "--output", out,
                    "--metric", "loss")
        assert str(folders[1]) in said["chosen"] and str(folders[0]) not in said["chosen"]
        assert list(tmp_path.glob(".burnish-*")) == []
    loss = done(capsys, "evaluate", tmp_path / "soup", held)["tuned"]["loss"]
    assert -loss == pytest.approx(json.loads(json.dumps(done(
        capsys, "soup", *[tuned / n for n in ("bad", "good", "fine")], "--greedy", "--data", held,
        "--output", tmp_path / "again", "--metric", "loss")["score"])), rel=1e-4)


@pytest.mark.slow
def test_a_learned_soup_weighs_the_models(capsys, tuned, tmp_path):
    folders = [tuned / f"{n}-model" for n in ("bad", "good")]
    said = done(capsys, "soup", *folders, "--learned", "--data", rows(tmp_path / "h.csv", 16),
                "--output", tmp_path / "soup")
    w = said["weights"]
    assert sum(w.values()) == pytest.approx(1) and w[str(folders[1])] > w[str(folders[0])]
    one, two, made = (weights(f) for f in (*folders, tmp_path / "soup"))
    n = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(made[n], w[str(folders[0])] * one[n] + w[str(folders[1])] * two[n])
    for more, why in ((["--greedy"], "two kinds"), (["--metric", "no"], "")):
        code, _, err = run(capsys, "soup", *folders, "--learned", *more, "--output",
                           tmp_path / "no")
        assert code == 2 and why in err
    code, _, err = run(capsys, "soup", tuned / "good", tuned / "fine", "--learned", "--data",
                       tmp_path / "h.csv", "--output", tmp_path / "no")
    assert code == 2 and "burnish merge" in err


# -- adapters ---------------------------------------------------------------------------------
def test_adapters_are_added_as_updates_not_factor_by_factor(capsys, adapters, tmp_path):
    """The same as the arithmetic of the merged models: base + sum of weight * Delta W."""
    said = done(capsys, "soup", adapters["a"], adapters["b"], "--output", tmp_path / "soup")
    assert said["kind"] == "adapter"
    tuned, got = answer(adapters["base"], tmp_path / "soup", adapters["batch"])
    assert tuned.recipe.named("lora").rank == 5 and tuned.recipe.named("lora").scale == 1
    done(capsys, "soup", adapters["a merged"], adapters["b merged"], "--output", tmp_path / "m")
    torch.testing.assert_close(got, logits(tmp_path / "m", adapters["batch"]), rtol=1e-4, atol=1e-5)
    words = (adapters["base"], "+", f"0.4*{adapters['a']}", "-", f"0.3 *{adapters['b']}")
    done(capsys, "arithmetic", *words, "-o", tmp_path / "x")
    done(capsys, "arithmetic", adapters["base"], "+", f"0.4*{adapters['a merged']}", "-",
         f"0.3*{adapters['b merged']}", "-o", tmp_path / "y")
    _, got = answer(adapters["base"], tmp_path / "x", adapters["batch"])
    torch.testing.assert_close(got, logits(tmp_path / "y", adapters["batch"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.25])
def test_a_share_of_one_adapter_is_the_interpolation_of_the_weights(capsys, adapters, tmp_path,
                                                                   alpha):
    """WiSE-FT: (1 - alpha) theta_0 + alpha theta_f of every tensor, written out in float64."""
    done(capsys, "arithmetic", adapters["base"], "+", f"{alpha}*{adapters['a']}", "-o",
         tmp_path / "x")
    _, got = answer(adapters["base"], tmp_path / "x", adapters["batch"])
    base, tuned = weights(adapters["base"]), weights(adapters["a merged"])
    between = {n: ((1 - alpha) * base[n].double() + alpha * t.double()).to(t.dtype)
               for n, t in tuned.items()}
    assert any(not torch.equal(t, base[n]) for n, t in between.items())
    shutil.copytree(adapters["a merged"], tmp_path / "dense")
    save_file(between, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(got, logits(tmp_path / "dense", adapters["batch"]), rtol=1e-4,
                               atol=1e-5)


def test_a_smaller_rank_is_the_best_approximation(capsys, adapters, tmp_path):
    done(capsys, "soup", adapters["a"], adapters["b"], "--output", tmp_path / "all")
    done(capsys, "soup", adapters["a"], adapters["b"], "--output", tmp_path / "two", "--rank", "2")
    read = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("all", "two")]
    for A in (n for n in read[0] if n.endswith(".A")):
        whole, part = (t[A.removesuffix("A") + "B"] @ t[A] for t in read)
        U, S, V = torch.linalg.svd(whole)
        torch.testing.assert_close(part, (U[:, :2] * S[:2]) @ V[:2], rtol=1e-4, atol=1e-5)
    code, _, err = run(capsys, "soup", *[adapters["a"]] * 11, *[adapters["b"]] * 11, "--output",
                       tmp_path / "much")
    assert code == 2 and "give --rank 32 or less" in err


# -- what is refused --------------------------------------------------------------------------
def test_nothing_is_written_over_and_unlike_things_are_not_added(capsys, models, tmp_path):
    a, b, base = models["a"], models["b"], models["base"]
    before = {f: f.read_bytes() for f in a.iterdir()}
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    (tmp_path / "empty").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "empty" / "model.safetensors")
    llama, _ = tiny("llama")
    llama.save_pretrained(tmp_path / "llama")
    wide, _ = tiny("bert", hidden_size=64)
    wide.save_pretrained(tmp_path / "wide")
    codes = shutil.copytree(a, tmp_path / "codes")
    config = json.loads((codes / "config.json").read_text())
    (codes / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    for argv, why in (
        (["soup", a, b, "--output", a], "is an input itself"),
        (["soup", a, b, "--output", a / "in"], "lies inside an input"),
        (["soup", a, b, "--output", foreign], "notes.txt that burnish did not write"),
        (["soup", a, "--output", tmp_path / "o"], "two folders or more"),
        (["soup", a, tmp_path / "llama", "--output", tmp_path / "o"], "of another architecture"),
        (["soup", a, tmp_path / "wide", "--output", tmp_path / "o"], "beside"),
        (["soup", a, codes, "--output", tmp_path / "o"], "quantised weights"),
        (["soup", a, tmp_path / "empty", "--output", tmp_path / "o"], "no adapter folder"),
        (["soup", a, tmp_path / "nowhere", "--output", tmp_path / "o"], "no such folder"),
        (["soup", a, b, "--greedy", "--output", tmp_path / "o"], "need --data"),
        (["soup", a, b, "--data", "digits", "--output", tmp_path / "o"], "--data is for"),
        (["soup", a, b, "--rank", "3", "--output", tmp_path / "o"], "--rank is of adapters"),
        (["arithmetic", base, "+", tmp_path / "wide", "-o", tmp_path / "o"], "was not tuned from"),
        (["arithmetic", base, "-o", tmp_path / "o"], "nothing is added"),
        (["arithmetic", f"2*{base}", "+", a, "-o", tmp_path / "o"], "it has no weight"),
        (["arithmetic", base, a, "-o", tmp_path / "o"], "expected + or - before"),
        (["arithmetic", base, "+", "-o", tmp_path / "o"], "ends with a sign"),
        (["arithmetic", base, "+", a, "-o", base], "is the base model itself"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and why in err and err.count("\n") == 1, (argv, err)
        assert not (tmp_path / "o").exists()
    assert all(f.read_bytes() == t for f, t in before.items())
    assert [f.name for f in foreign.iterdir()] == ["notes.txt"]


def test_adapters_that_have_no_sum_are_refused(capsys, adapters, tmp_path):
    from transformers import BertForSequenceClassification

    def made(name, recipe, base=adapters["base"], **kw):
        net = BertForSequenceClassification.from_pretrained(base)
        library.tune(net, recipe, **kw).save(tmp_path / name)
        return tmp_path / name

    moved = BertForSequenceClassification.from_pretrained(adapters["base"])
    with torch.no_grad():
        moved.bert.pooler.dense.weight.add_(1)
    moved.save_pretrained(tmp_path / "moved")
    a, o = adapters["a"], tmp_path / "o"
    for argv, why in (
        (["soup", a, made("dora", "dora(rank=2)"), "--output", o], "no sum of factors"),
        (["soup", a, made("fa", "lora(rank=2, train_a=False)"), "--output", o], "no sum of factor"),
        (["soup", a, made("far", "lora(rank=2)", tmp_path / "moved"), "--output", o],
         "another base than"),
        (["soup", a, made("few", "lora(rank=2)", targets="q"), "--output", o], "the same places"),
        (["soup", a, adapters["base"], "--output", o], "burnish merge"),
        (["arithmetic", f"0.5*{a}", "-", adapters["b"], "-o", o], "trained whole, and the base"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2 and why in err and not o.exists(), err


@pytest.mark.parametrize("text, found", [
    ("base + a", [(1, "base"), (1, "a")]), ("- a + 2e-1*b", [(-1, "a"), (0.2, "b")]),
    ("x/a-b + .5 * c+d", [(1, "x/a-b"), (0.5, "c+d")]), ("0.25*a", [(0.25, "a")]),
])
def test_a_sum_is_read_with_signs_that_stand_alone(text, found):
    assert [(w, str(p)) for w, p in terms(text)] == found


@pytest.mark.parametrize("text", ["", "-", "a b", "a + + b", "a +", "a + - b", "0.5*"])
def test_what_is_no_sum_is_refused(text):
    with pytest.raises(ConfigError):
        terms(text)
