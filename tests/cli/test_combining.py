"""burnish combine, on folders: rules over models and adapters, against arithmetic of tensors."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.conftest import answer, done, logits, rows, run, weights

import burnish as library
from burnish.testing import stir
from burnish.testing.models import tiny


def ties(taus, keep):
    flat = [torch.cat([t[n].flatten() for n in sorted(t)]) for t in taus]
    least = [f.abs().sort(descending=True).values[-(-round(keep * len(f) * 1e6) // 10**6) - 1]
             for f in flat]
    out = {}
    for n in taus[0]:
        kept = torch.stack([t[n].where(t[n].abs() >= c, 0) for t, c in zip(taus, least,
                                                                           strict=True)])
        agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        out[n] = kept.where(agree, 0).sum(0) / agree.sum(0).clamp(min=1)
    return out


# -- whole models -----------------------------------------------------------------------------
def test_models_are_merged_by_ties_and_the_rest_is_the_bases(capsys, models, tmp_path):
    out = tmp_path / "out"
    said = done(capsys, "combine", models["a"], models["other head"], "--base", models["base"],
                "--how", "ties(density=0.3)", "--output", out)
    assert said["kind"] == "model" and "classifier.weight" in said["left"]
    base, a, b, got = (weights(models.get(n, out)) for n in ("base", "a", "other head", ""))
    names = [n for n in base if not n.startswith("classifier")]
    taus = [{n: m[n].double() - base[n].double() for n in names} for m in (a, b)]
    for n, t in ties(taus, 0.3).items():
        wrong = (got[n].double() - base[n].double() - t).abs() > 1e-6
        assert int(wrong.sum()) <= 1, n          # one that rounds to the other side of the cut
    assert torch.equal(got["classifier.weight"], base["classifier.weight"])
    assert logits(out, tiny("bert")[1]).shape == (2, 3)


def test_weights_scale_what_was_changed(capsys, models, tmp_path):
    done(capsys, "combine", models["a"], models["b"], "--base", models["base"], "--weights",
         "0.5,-1", "--how", "task_arithmetic(scale=0.8)", "--output", tmp_path / "x")
    done(capsys, "arithmetic", models["base"], "+", f"0.4*{models['a']}", "-",
         f"0.8*{models['b']}", "-o", tmp_path / "y")
    x, y = weights(tmp_path / "x"), weights(tmp_path / "y")
    assert x.keys() == y.keys()
    for n in x:
        torch.testing.assert_close(x[n], y[n], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_held_out_data_choose_the_scale(capsys, tuned, tmp_path):
    folders = [tuned / f"{n}-model" for n in ("good", "fine")]
    said = done(capsys, "combine", *folders, "--base", tuned / "bad-model", "--how",
                "task_arithmetic", "--data", rows(tmp_path / "h.csv", 16), "--metric", "loss",
                "--output", tmp_path / "out")
    scores = {float(s): v for s, v in said["scores"].items()}
    assert len(scores) == 21 and said["score"] == max(scores.values()) > scores[0.0]
    assert f"scale={said['scale']}" in said["how"] or said["scale"] == 0.4
    assert list(tmp_path.glob(".burnish-*")) == []
    w, at = weights(tmp_path / "out"), "bert.encoder.layer.0.attention.self.query.weight"
    start, *tuned_ = (weights(f)[at] for f in (tuned / "bad-model", *folders))
    want = start + said["scale"] * sum(t - start for t in tuned_)
    torch.testing.assert_close(w[at], want, rtol=0, atol=1e-6)


# -- adapters ---------------------------------------------------------------------------------
@pytest.fixture
def many(adapters, tmp_path):
    """Adapters of other methods on the same base: a function of W, whole tensors, a residual."""
    from transformers import BertForSequenceClassification

    for k, (name, recipe) in enumerate((("dora", "dora(rank=2)"), ("bias", "bitfit"),
                                        ("pissa", "pissa(rank=2)"), ("full", "full"))):
        model = BertForSequenceClassification.from_pretrained(adapters["base"])
        made = library.tune(model, recipe, seed=k)
        stir(made, size=0.1, seed=k)
        made.save(tmp_path / name)
        adapters[name] = tmp_path / name
        adapters[f"{name} merged"] = tmp_path / f"{name}-model"
        made.merge().save_pretrained(adapters[f"{name} merged"])
    return adapters


@pytest.mark.parametrize("pair", [("a", "dora"), ("dora", "bias"), ("pissa", "full"),
                                  ("b", "bias")])
def test_adapters_of_any_method_add_up_as_their_merged_models_do(capsys, many, tmp_path, pair):
    one, two = pair
    said = done(capsys, "combine", many[one], many[two], "--how", "task_arithmetic(scale=0.5)",
                "--output", tmp_path / "x")
    assert said["kind"] == "model" and said["averaged"] == ["classifier.bias", "classifier.weight"]
    base, a, b, got = (weights(many.get(n, tmp_path / "x")) for n in
                       ("base", f"{one} merged", f"{two} merged", ""))
    assert got.keys() == base.keys()
    moved = 0
    for n in base:
        want = (a[n] + b[n]) / 2 if n.startswith("classifier") else \
            base[n] + 0.5 * (a[n] - base[n]) + 0.5 * (b[n] - base[n])
        torch.testing.assert_close(got[n], want, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(got[n], base[n])
    assert moved > 5
    assert logits(tmp_path / "x", many["batch"]).isfinite().all()


def test_ties_of_adapters_trims_their_products(capsys, adapters, tmp_path):
    done(capsys, "combine", adapters["a"], adapters["b"], "--how", "ties(density=0.25)",
         "--output", tmp_path / "x")
    base, a, b, got = (weights(adapters.get(n, tmp_path / "x"))
                       for n in ("base", "a merged", "b merged", ""))
    changed = [n for n in base if not n.startswith("classifier")
               and not torch.equal(a[n], base[n])]
    taus = [{n: m[n].double() - base[n].double() for n in changed} for m in (a, b)]
    for n, t in ties(taus, 0.25).items():
        wrong = (got[n].double() - base[n].double() - t).abs() > 1e-6
        assert float(wrong.float().mean()) < 0.002, n       # ties at the threshold, by rounding


def test_with_a_rank_the_merge_is_the_best_adapter_and_says_what_it_leaves_out(
        capsys, adapters, tmp_path):
    how = "task_arithmetic(scale=1.0)"
    said = done(capsys, "combine", adapters["a"], adapters["b"], "--how", how, "--rank", "5",
                "--output", tmp_path / "five")
    assert said["kind"] == "adapter" and said["error"] < 1e-5
    tuned, got = answer(adapters["base"], tmp_path / "five", adapters["batch"])
    assert tuned.recipe.named("lora").rank == 5
    done(capsys, "combine", adapters["a"], adapters["b"], "--how", how, "--output", tmp_path / "m")
    torch.testing.assert_close(got, logits(tmp_path / "m", adapters["batch"]), rtol=1e-4, atol=1e-5)
    said = done(capsys, "combine", adapters["a"], adapters["b"], "--how", how, "--rank", "2",
                "--output", tmp_path / "two")
    base, made = (weights(f) for f in (adapters["base"], tmp_path / "m"))
    read = load_file(tmp_path / "two" / "adapter_model.safetensors")
    lost = total = 0.0
    for A in (n for n in read if n.endswith(".A")):
        n = A.partition(".burnish")[0] + ".weight"
        whole = made[n] - base[n]
        left = torch.linalg.svdvals(whole.double())[2:].square().sum()
        lost, total = lost + float(left), total + float(whole.double().square().sum())
        best = torch.linalg.svd(whole.double(), full_matrices=False)
        want = (best.U[:, :2] * best.S[:2]) @ best.Vh[:2]
        torch.testing.assert_close((read[A.removesuffix("A") + "B"] @ read[A]).double(), want,
                                   rtol=1e-3, atol=1e-4)
    assert said["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)


def test_folders_of_peft_are_merged_beside_ours(capsys, adapters, tmp_path):
    assert run(capsys, "export", adapters["b"], "--output", tmp_path / "peft")[0] == 0
    how = ("--how", "dare(drop_rate=0.5) + ties(density=0.5)")
    done(capsys, "combine", adapters["a"], adapters["b"], *how, "--output", tmp_path / "x")
    done(capsys, "combine", adapters["a"], tmp_path / "peft", *how, "--base", adapters["base"],
         "--output", tmp_path / "y")
    x, y = weights(tmp_path / "x"), weights(tmp_path / "y")
    for n in x:
        assert float(((x[n] - y[n]).abs() > 1e-5).float().mean()) < 0.01, n


def test_factors_are_stacked_truncated_or_summed(capsys, adapters, tmp_path):
    ab = adapters["a"], adapters["b"]
    done(capsys, "combine", *ab, "--how", "cat", "--output", tmp_path / "cat")
    done(capsys, "arithmetic", "0.5 *", ab[0], "+", "0.5 *", ab[1], "-o", tmp_path / "mean")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("cat", "mean"))
    for n in one:
        want = 2 * two[n] if n.endswith(".A") else two[n]
        torch.testing.assert_close(one[n], want, rtol=1e-6, atol=0)
    done(capsys, "combine", *ab, "--how", "svd", "--output", tmp_path / "svd")
    assert answer(adapters["base"], tmp_path / "svd", adapters["batch"])[0].recipe.named(
        "lora").rank == 3
    code, _, err = run(capsys, "combine", *ab, "--how", "linear", "--output", tmp_path / "no")
    assert code == 2 and "equal ranks" in err
    done(capsys, "combine", ab[0], ab[0], "--how", "linear", "--output", tmp_path / "linear")
    one, a = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "linear", ab[0]))
    for A in (n for n in a if n.endswith(".A")):
        B = A.removesuffix("A") + "B"            # (2 c A)(2 c B) with c^2 = scale 3
        torch.testing.assert_close(one[B] @ one[A], 4 * 3 * a[B] @ a[A], rtol=1e-4, atol=1e-5)


# -- refusals ---------------------------------------------------------------------------------
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(capsys, models, many, tmp_path):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(many["base"])
    library.tune(model, "houlsby(bottleneck=4)").save(tmp_path / "houlsby")
    a, b, o = many["a"], many["b"], tmp_path / "o"
    ma, mb, base = models["a"], models["b"], models["base"]
    for argv, why in (
            ([ma, mb], "--base"),
            ([ma], "two folders"),
            ([ma, a, "--base", base], "burnish merge"),
            ([ma, mb, "--base", base, "--how", "cat"], "task_arithmetic"),
            ([ma, mb, "--base", base, "--how", "tise"], "ties"),
            ([ma, mb, "--base", base, "--how", "dare"], "dare + task_arithmetic"),
            ([ma, mb, "--base", base, "--how", "ties + pcb"], "two rules"),
            ([ma, mb, "--base", base, "--how", "lora"], "nothing about merging"),
            ([ma, mb, "--base", base, "--rank", "2"], "of adapters"),
            ([ma, mb, "--base", base, "--weights", "1"], "2 numbers"),
            ([ma, mb, "--base", base, "--weights", "1,x"], "2 numbers"),
            ([ma, mb, "--base", base, "--how", "soup(kind='uniform')", "--data", "x.csv"],
             "has none"),
            ([a, b, "--data", "x.csv"], "burnish merge"),
            ([a, b, "--how", "cat", "--rank", "3"], "svd"),
            ([a, b, "--how", "cat", "--data", "x.csv"], "has none"),
            ([a, many["bias"], "--rank", "2"], "leave out --rank"),
            ([a, tmp_path / "houlsby"], "more than a change of weights"),
            ([a, b, "--rank", "99"], "largest rank"),
    ):
        code, _, err = run(capsys, "combine", *argv, "--output", o)
        assert code == 2 and why in " ".join(err.split()), (argv, err)
        assert not o.exists()
    shutil.copytree(ma, tmp_path / "in")
    code, _, err = run(capsys, "combine", tmp_path / "in", mb, "--base", base, "--output",
                       tmp_path / "in")
    assert code == 2 and (tmp_path / "in" / "model.safetensors").is_file()
