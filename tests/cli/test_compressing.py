"""burnish compress and expand, on folders: what goes into the file and what comes out of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from tests.cli.conftest import answer, done, logits, run, weights

import burnish as library
from burnish.testing import stir


def test_a_model_is_its_base_and_a_small_file(capsys, models, tmp_path):
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    said = done(capsys, "compress", models["a"], "--base", models["base"], "--how",
                "compeft(density=0.2, alpha=1.5)", "--output", file)
    assert said["kind"] == "model" and said["whole"] == []
    assert said["entropy"] < said["bits"] < 1.1 and said["count"] == -(-said["entries"] // 5)
    assert said["bytes"] == file.stat().st_size and said["update"] == 4 * said["entries"]
    done(capsys, "expand", file, "--output", out)
    base, a, got = (weights(f) for f in (models["base"], models["a"], out))
    tau = torch.cat([(a[n].double() - base[n].double()).flatten() for n in got])
    back = torch.cat([(got[n].double() - base[n].double()).flatten() for n in got])
    kept = back.abs() > 1e-9
    assert int(kept.sum()) == said["count"]
    assert float(tau[kept].abs().min()) >= float(tau[~kept].abs().max()) - 1e-6
    size = torch.full_like(back[kept], 1.5 * float(tau.std(unbiased=False)))
    torch.testing.assert_close(back[kept], size * tau[kept].sign(), rtol=1e-3, atol=1e-6)
    batch = {"input_ids": torch.arange(10).view(2, 5)}
    assert logits(out, batch).shape == (2, 3)


def test_new_heads_go_along_whole_and_the_folder_is_the_tuned_ones(capsys, models, tmp_path):
    file, out = tmp_path / "h.safetensors", tmp_path / "out"
    said = done(capsys, "compress", models["other head"], "--base", models["base"], "--how",
                "delta_quant(bits=8)", "--output", file)
    assert said["whole"] == ["classifier.bias", "classifier.weight"]
    done(capsys, "expand", file, "--base", models["base"], "--output", out)
    got, want = weights(out), weights(models["other head"])
    assert got.keys() == want.keys()
    for n in want:
        if n.startswith("classifier"):
            assert torch.equal(got[n], want[n])
        else:
            torch.testing.assert_close(got[n], want[n], rtol=0, atol=2e-3)
    assert json.loads((out / "config.json").read_text())["id2label"].keys() == {*"0123456"}
    assert logits(out, {"input_ids": torch.arange(10).view(2, 5)}).shape == (2, 7)


def test_an_adapter_is_a_change_of_where_it_began(capsys, adapters, tmp_path):
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    said = done(capsys, "compress", adapters["a"], "--how", "delta_quant(bits=8, whole=())",
                "--output", file)
    assert said["kind"] == "adapter"
    done(capsys, "expand", file, "--output", out)
    one, two = (load_file(f / "adapter_model.safetensors") for f in (adapters["a"], out))
    assert one.keys() == two.keys()
    for n in one:
        torch.testing.assert_close(one[n], two[n], rtol=0, atol=0.01)
    (_, a), (_, b) = (answer(adapters["base"], f, adapters["batch"]) for f in (adapters["a"], out))
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    said = done(capsys, "compress", adapters["b"], "--how", "compeft(density=0.1)", "--output",
                file)                                # our own may go
    done(capsys, "expand", file, "--output", out)
    fresh = library.tune(answer(adapters["base"], adapters["b"], adapters["batch"])[0].detach(),
                         "lora(rank=3, scaling='rs')", seed=1).tensors()
    two = load_file(out / "adapter_model.safetensors")
    moved = sum(int((two[n] != fresh[n]).sum()) for n in two if ".lora." in n)
    assert 0 < moved <= said["count"]                # A begins at its draw, not at zero
    assert all(float(fresh[n].abs().max()) > 0 for n in fresh if n.endswith(".A"))


def test_what_cannot_be_compressed_or_expanded_is_refused(capsys, models, adapters, tmp_path):
    a, base, o = models["a"], models["base"], tmp_path / "o.safetensors"
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    for argv, why in (
            ([a, "--output", o], "--base"),
            ([a, "--base", base, "--output", tmp_path / "o.bin"], ".safetensors"),
            ([a, "--base", base, "--how", "lora", "--output", o], "one way to compress"),
            ([a, "--base", base, "--how", "compeft + delta_quant", "--output", o], "one way"),
            ([a, "--base", base, "--how", "compeft(density=7)", "--output", o], "share"),
            ([a, "--base", base, "--output", foreign], "did not write it"),
            ([tmp_path / "no", "--base", base, "--output", o], "no such folder"),
    ):
        code, _, err = run(capsys, "compress", *argv)
        assert code == 2 and why in " ".join(err.split()), (argv, err)
        assert not o.exists()
    done(capsys, "compress", a, "--base", base, "--output", o)
    with safe_open(o, "pt") as f:
        told = f.metadata()
    assert told["method"] == "compeft" and told["version"] == "1" and told["kind"] == "model"
    out = tmp_path / "out"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(o.read_bytes()[:-200])
    newer = tmp_path / "newer.safetensors"
    save_file(load_file(o), newer, {**told, "version": "9"})
    broken = tmp_path / "broken.safetensors"
    save_file(load_file(o), broken, {**told, "order": "["})
    evil = tmp_path / "evil.safetensors"
    save_file(load_file(o), evil, {**told, "beside": json.dumps({"../evil.json": "{}"})})
    for argv, why in (
            ([o, "--base", models["b"]], "another base"),
            ([foreign], "burnish compress"),
            ([cut], "truncated"),
            ([newer], "version 9"),
            ([broken], "'order'"),
            ([tmp_path / "no.safetensors"], "no.safetensors"),
    ):
        code, _, err = run(capsys, "expand", *argv, "--output", out)
        assert code == 2 and why in " ".join(err.split()), (argv, err)
        assert not out.exists()
    done(capsys, "expand", evil, "--output", out)
    assert not (tmp_path / "evil.json").exists()     # nothing is written outside of the folder


def test_a_recipe_that_began_with_data_says_that_it_cannot_begin_again(capsys, adapters, tmp_path):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(adapters["base"])
    tuned = library.tune(model, "eva(rank=2)", calibration=[adapters["batch"]] * 2)
    stir(tuned, size=0.1, seed=0)
    tuned.save(tmp_path / "eva")
    code, _, err = run(capsys, "compress", tmp_path / "eva", "--output", tmp_path / "e.safetensors")
    assert code == 2 and "data" in err
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("how", ["compeft", "delta_quant"])
def test_what_people_read(capsys, models, tmp_path, how):
    code, out, err = run(capsys, "compress", models["a"], "--base", models["base"], "--how", how,
                         "--output", tmp_path / "u.safetensors")
    assert code == 0, err
    assert "x smaller" in out and "bits per entry" in out
    assert ("no code takes less" in out) == (how == "compeft")
    code, out, _ = run(capsys, "expand", tmp_path / "u.safetensors", "--output", tmp_path / "x")
    assert code == 0 and how in out
