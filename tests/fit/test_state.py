"""What is kept of a run comes back bit for bit, under its name, and never through a pickle."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from burnish.core.errors import BurnishError, ConfigError, FormatError
from burnish.fit import checkpoint, state
from burnish.fit.arguments import recipe_of, sort_out


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    tree = {"x": torch.randn(3, 2).bfloat16(), "n": 0.1 + 0.2, "inf": float("inf"),
            "nan": float("nan"), "t": (1, [2, None], {"y": torch.arange(3)}), 4: {True: "odd keys"},
            "u": np.arange(3, dtype=np.uint32), "d": torch.float16, "scalar": torch.tensor(7.0),
            "empty": torch.zeros(0)}
    state.save_tree(tree, tmp_path, "tree")
    assert same(state.load_tree(tmp_path, "tree"), tree)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_what_would_need_a_pickle_is_refused_with_its_path():
    with pytest.raises(FormatError, match="a.b.0: a function cannot be kept"):
        state.pack({"a": {"b": [test_a_tree_comes_back_bit_for_bit]}})


def test_generators_go_on_where_they_were(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn()  # leaves a second normal waiting inside numpy's generator
    state.save_tree(state.random_state(), tmp_path, "rng")
    expected = random.random(), np.random.randn(), torch.randn(2)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    state.set_random_state(state.load_tree(tmp_path, "rng"))
    assert same((random.random(), np.random.randn(), torch.randn(2)), expected)


def trained(optimizer=torch.optim.AdamW, order=("a", "b"), dtype=torch.float32, steps=3):
    torch.manual_seed(0)
    named = {n: nn.Parameter(torch.randn(4, 3, dtype=dtype)) for n in ("a", "b")}
    opt = optimizer([{"params": [named[n]], "lr": 0.1 * (i + 1)} for i, n in enumerate(order)])
    for _ in range(steps):
        for p in named.values():
            p.grad = torch.randn_like(p)
        opt.step()
    return named, opt


def test_optimizer_state_is_kept_under_names_so_order_does_not_matter(tmp_path):
    named, opt = trained()
    state.save_tree(state.optimizer_state(opt, named.items()), tmp_path, "optimizer")
    kept = state.load_tree(tmp_path, "optimizer")
    assert set(kept["state"]) == {"a", "b"}
    torch.manual_seed(5)
    fresh = {n: nn.Parameter(p.detach().clone()) for n, p in named.items()}
    other = torch.optim.AdamW([{"params": [fresh["a"]]}, {"params": [fresh["b"]]}])
    state.load_optimizer_state(other, fresh.items(), kept)
    for n in named:
        assert same(dict(opt.state[named[n]]), dict(other.state[fresh[n]]))
    assert [g["lr"] for g in other.param_groups] == [0.1, 0.2]


def test_fp32_moments_of_bf16_weights_are_not_rounded(tmp_path):
    named, opt = trained(dtype=torch.bfloat16)
    for p in named.values():
        opt.state[p]["exp_avg"] = torch.randn(4, 3)  # what an 8-bit or master-weight rule may keep
        opt.state[p]["codes"] = torch.arange(4, dtype=torch.uint8)
    kept = state.optimizer_state(opt, named.items())
    fresh, other = trained(dtype=torch.bfloat16, steps=0)
    state.load_optimizer_state(other, fresh.items(), kept)
    for n in named:
        assert same(dict(opt.state[named[n]]), dict(other.state[fresh[n]]))


def test_state_of_other_parameters_is_refused():
    named, opt = trained()
    kept = state.optimizer_state(opt, named.items())
    p = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(FormatError, match="kept for other parameters"):
        state.load_optimizer_state(torch.optim.AdamW([p]), [("c", p)], kept)


# -- folders -----------------------------------------------------------------------------------
def fill(folder, text="x"):
    with checkpoint.writing(folder) as hidden:
        (hidden / "a.txt").write_text(text)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(ZeroDivisionError), checkpoint.writing(folder) as hidden:
        (hidden / "a.txt").write_text("x")
        assert not folder.exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    fill(folder)
    assert checkpoint.all_in(tmp_path) == [folder]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    fill(tmp_path / "checkpoint-1")
    with pytest.raises(BurnishError, match="No space left.*untouched"), \
            checkpoint.writing(tmp_path / "checkpoint-2"):
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_newest_whole_checkpoint_is_found_and_leftovers_go(tmp_path):
    for n in (9, 10, 11):
        fill(tmp_path / f"checkpoint-{n}")
    (tmp_path / "checkpoint-11" / "a.txt").write_text("")  # lost bytes on the way
    (tmp_path / ".checkpoint-12.writing").mkdir()
    assert checkpoint.find(tmp_path, True).name == "checkpoint-10"
    assert checkpoint.clear_leftovers(tmp_path) == [".checkpoint-12.writing", "checkpoint-11"]
    with pytest.raises(FormatError, match="no such folder"):
        checkpoint.find(tmp_path, tmp_path / "checkpoint-99")
    assert checkpoint.find(tmp_path / "none", "auto") is None


def cut_off(out, last):
    """Writes, replaces and removes a checkpoint in a process that dies before its `last` touch of
    the disk; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    touches = iter(range(1, last))

    def dies(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") \
                and str(out) in str(args[:2]) and next(touches, None) is None:
            os._exit(9)

    code = 1
    try:
        sys.addaudithook(dies)
        for text in ("new", "in its place"):
            fill(out / "checkpoint-1", text)
        checkpoint.remove(out / "checkpoint-1")
        code = 0
    finally:
        os._exit(code)


def test_killed_before_any_touch_of_the_disk_a_run_can_go_on(tmp_path):    # findings 4.1
    """Whatever a kill leaves of a checkpoint is known as ours: nothing has to be moved away."""
    for n in range(1, 400):
        out = tmp_path / str(n)
        out.mkdir()
        code = cut_off(out, n)
        checkpoint.refuse_foreign(out)
        checkpoint.clear_leftovers(out)
        assert all(checkpoint.whole(p) for p in out.iterdir()), sorted(out.rglob("*"))
        if not code:
            break
        assert code == 9
        fill(out / "checkpoint-2")
        assert checkpoint.find(out, True).name == "checkpoint-2"
    assert 20 < n < 399


def test_rotation_spares_the_newest_and_the_best(tmp_path):
    for n in range(1, 6):
        fill(tmp_path / f"checkpoint-{n}")
    checkpoint.rotate(tmp_path, 2, tmp_path / "checkpoint-2")
    assert [p.name for p in checkpoint.all_in(tmp_path)] == ["checkpoint-2", "checkpoint-5"]
    checkpoint.rotate(tmp_path, 1)
    assert [p.name for p in checkpoint.all_in(tmp_path)] == ["checkpoint-5"]


# -- names of settings -------------------------------------------------------------------------
def test_names_from_elsewhere_mean_what_they_meant_there():
    own, args, _ = sort_out({"lr": 1e-3, "num_epochs": 2, "micro_batch_size": 4, "cutoff_len": 64,
                             "val_set_size": 0.2, "warmup_ratio": 0.1, "weight_decay": 0.0})
    assert args == {"learning_rate": 1e-3, "num_train_epochs": 2, "warmup_steps": 0.1,
                    "per_device_train_batch_size": 4, "weight_decay": 0.0}
    assert (own.max_length, own.validation) == (64, 0.2)


@pytest.mark.parametrize("given, words", [
    ({"learning_rat": 1}, "did you mean 'learning_rate'"),
    ({"lr": 1, "learning_rate": 2}, "lr= and learning_rate= are the same"),
    ({"optim": "adamw_torch"}, "the recipe names the optimizer"),
    ({"output_dir": "x"}, "the folder is output="),
])
def test_wrong_names_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        sort_out(given)


def test_loras_old_flags_are_a_recipe():
    _, _, lora = sort_out({"lora_r": 4, "lora_alpha": 8})
    assert recipe_of(None, lora) == "lora(rank=4, alpha=8)"
    with pytest.raises(ConfigError, match="belong in the recipe"):
        recipe_of("snella(rank=8)", lora)
