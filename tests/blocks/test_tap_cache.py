"""What a frozen backbone returns, kept on disk by sample: the same numbers, and blocks run once."""

from __future__ import annotations

import copy
import gc
import json
import os
import resource
import shutil
import signal
import time
import warnings
import zlib

import pytest
import torch

import burnish
from burnish.blocks.state import tap_cache
from burnish.blocks.state.tap_cache import MARK, TapCache
from burnish.blocks.state.tap_files import Shard
from burnish.core.errors import ConfigError, FormatError, RecipeError
from burnish.formats.placed import put
from burnish.testing.models import tiny

BLOCKS = {"vit": "vit.layers", "bert": "bert.encoder.layer", "llama": "model.layers",
          "gpt2": "transformer.h", "timm_qkv": "blocks"}


class Runs:
    """Counts samples that go through the first block of a backbone."""

    def __init__(self, net, model):
        self.n = 0
        inside = net.get_submodule(BLOCKS[model])[0].modules()
        next(m for m in inside if type(m).__name__ in ("Linear", "Conv1D")
             ).register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.n += len(args[0])


def made(model, recipe, folder=None, seed=0, more="", samples=4, **words):
    net, batch = tiny(model, batch=samples, seed=seed, **words)
    runs = Runs(net, model)
    inside = [f"cache='{folder}'{more}"] if folder else []
    name, _, rest = recipe.partition("(")
    rest = [r for r in [rest.removesuffix(")")] if r]
    tuned = burnish.tune(net, f"{name}({', '.join(rest + inside)})", seed=0)
    tuned.optimizer(lr=1e-2)
    return tuned, batch, runs


def cut(batch, rows):
    return {k: v[rows] for k, v in batch.items()}


def step(tuned, batch):
    """(loss, gradients) of a step."""
    seen = {}
    hooks = [p.register_hook(lambda g, n=n: seen.__setitem__(n, g.clone()))
             for n, p in tuned.named_parameters()]
    loss = float(tuned.step(batch))
    for h in hooks:
        h.remove()
    assert len(seen) == len(hooks)
    return loss, seen


def same(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != MARK)


def cache_of(tuned):
    return next(m.cache for m in tuned.model.modules() if getattr(m, "cache", None) is not None)


# -- the numbers ----------------------------------------------------------------------------------
@pytest.mark.parametrize("model, recipe", [
    ("vit", "lst(reduction=2)"), ("llama", "lst(reduction=2, layers=(1,))"),
    ("timm_qkv", "lst(reduction=2)"), ("bert", "unipt"), ("vit", "unipt"), ("vit", "sherl"),
    ("gpt2", "sherl")])
def test_two_epochs_are_bitwise_equal_and_blocks_run_in_the_first_alone(model, recipe, tmp_path):
    """Dropout in the model, too: the backbone drops nothing."""
    plain, batch, all_runs = made(model, recipe, dropout=0.3)
    kept, _, runs = made(model, recipe, tmp_path / "taps", dropout=0.3)
    halves = [cut(batch, [0, 1]), cut(batch, [2, 3])]
    for _ in range(2):
        for half in halves:
            torch.manual_seed(0)
            want = step(plain, half)
            torch.manual_seed(0)
            assert same(step(kept, half), want)
    assert all_runs.n == 8 and runs.n == 4
    assert cache_of(kept).written == 4 and cache_of(kept).read == 4


def test_a_sample_is_known_in_another_order_and_another_batch(tmp_path):
    plain, batch, _ = made("vit", "unipt")
    kept, _, runs = made("vit", "unipt", tmp_path / "taps")
    for rows in ([0, 1, 2], [3]):
        kept.step(cut(batch, rows))
        plain.step(cut(batch, rows))
    for rows in ([3, 1], [2, 0], [2, 3, 0, 1]):
        a, b = step(kept, cut(batch, rows)), step(plain, cut(batch, rows))
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        for n in a[1]:
            torch.testing.assert_close(a[1][n], b[1][n], rtol=1e-3, atol=1e-6)
    assert runs.n == 4


def test_a_batch_with_new_samples_runs_and_keeps_those_alone(tmp_path):
    kept, batch, runs = made("vit", "lst(reduction=2)", tmp_path / "taps")
    kept.step(cut(batch, [0, 1]))
    kept.step(cut(batch, [1, 2, 2]))                 # 2 is new, and there twice
    assert cache_of(kept).written == 3 and runs.n == 5
    kept.step(cut(batch, [0, 2, 1]))
    assert runs.n == 5


def test_masks_belong_to_a_sample(tmp_path):
    """The same tokens under another mask are another sample."""
    kept, batch, runs = made("bert", "unipt", tmp_path / "taps", samples=2)
    masks = []
    for hidden in (2, 3):
        mask = torch.ones_like(batch["input_ids"])
        mask[:, -hidden:] = 0
        masks.append({**batch, "attention_mask": mask})
    plain, _, _ = made("bert", "unipt", samples=2)
    for one in masks * 2:
        assert same(step(kept, one), step(plain, one))
    assert runs.n == 4


def test_evaluation_reads_and_fills_it(tmp_path):
    kept, batch, runs = made("vit", "lst(reduction=2)", tmp_path / "taps")
    plain, _, _ = made("vit", "lst(reduction=2)")
    kept.step(batch), plain.step(batch)
    seen, new = {"pixel_values": batch["pixel_values"]}, {"pixel_values": batch["pixel_values"] + 1}
    for tuned in (kept, plain):
        tuned.model.eval()
    with torch.no_grad():
        for given, ran in ((seen, 4), (new, 8), (new, 8)):
            assert torch.equal(kept.model(**given).logits, plain.model(**given).logits)
            assert runs.n == ran
    with kept.disabled(), torch.no_grad():
        kept.model(**seen)
    assert runs.n == 12                              # the base alone is no side network


def test_writing_on_token_by_token_runs_the_backbone(tmp_path):
    kept, batch, _ = made("llama", "lst(reduction=2)", tmp_path / "taps")
    plain, _, _ = made("llama", "lst(reduction=2)")
    kept.step(batch), plain.step(batch)
    ids = batch["input_ids"][:2]
    told = [t.model.eval().generate(ids, max_new_tokens=4, do_sample=False) for t in (kept, plain)]
    assert torch.equal(*told)


def test_states_of_bf16_and_autocast_are_kept_apart_and_bit_for_bit(tmp_path):
    kept, batch, runs = made("vit", "unipt", tmp_path / "taps")
    plain, _, _ = made("vit", "unipt")
    for ran in (4, 4):
        with torch.autocast("cpu", torch.bfloat16):
            assert same(step(kept, batch), step(plain, batch))
        assert runs.n == ran
    assert same(step(kept, batch), step(plain, batch))
    assert runs.n == 8


# -- runs that end ---------------------------------------------------------------------------------
def test_a_run_that_is_resumed_reads_what_the_one_before_kept(tmp_path):
    first, batch, _ = made("vit", "lst(reduction=2)", tmp_path / "taps")
    plain, _, _ = made("vit", "lst(reduction=2)")
    first.step(batch), plain.step(batch)
    first.save(tmp_path / "adapter")
    net, _ = tiny("vit", batch=4)
    runs = Runs(net, "vit")
    again = burnish.tune(net, f"lst(reduction=2, cache='{tmp_path / 'taps'}')", seed=0)
    put(again, first.tensors(), "here")
    again.optimizer(lr=1e-2).load_state_dict(first.current_optimizer.state_dict())
    assert same(step(again, batch), step(plain, batch))
    assert runs.n == 0


def test_an_adapter_names_no_folder_of_this_machine(tmp_path):
    kept, batch, _ = made("vit", "lst(reduction=2)", tmp_path / "taps", more=", cache_gb=2.0")
    kept.step(batch)
    kept.save(tmp_path / "adapter")
    net, _ = tiny("vit", batch=4)
    again = burnish.load(net, tmp_path / "adapter")
    assert str(again.recipe) == "lst(reduction=2)"
    given = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        assert torch.equal(again.model.eval()(**given).logits, kept.model.eval()(**given).logits)


def test_a_kill_leaves_whole_files_or_none(tmp_path):
    kept, batch, runs = made("vit", "unipt", tmp_path / "taps")
    kept.step(cut(batch, [0, 1]))
    whole = files(tmp_path / "taps")
    child = os.fork()
    if not child:
        tap_cache._Writing._whole = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        kept.step(cut(batch, [2, 3]))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = [f for f in files(tmp_path / "taps") if f not in whole]
    assert len(left) == 1 and left[0].endswith(".part")
    again, _, runs = made("vit", "unipt", tmp_path / "taps")
    again.step(batch)
    assert runs.n == 4 and cache_of(again).written == 2
    assert left[0] in files(tmp_path / "taps")       # it may be another's that is writing it
    old = time.time() - 2 * tap_cache.STALE
    os.utime(tmp_path / "taps" / left[0], (old, old))
    last, _, runs = made("vit", "unipt", tmp_path / "taps")
    last.step(batch)
    assert runs.n == 0 and left[0] not in files(tmp_path / "taps")


def test_an_error_in_the_backbone_leaves_nothing(tmp_path):
    kept, batch, _ = made("vit", "unipt", tmp_path / "taps")
    last = kept.model.get_submodule("vit.layers")[-1]
    inner = next(m for m in last.modules() if isinstance(m, torch.nn.Linear))
    hook = inner.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kept.step(batch)
    assert files(tmp_path / "taps") == []
    hook.remove()
    kept.step(batch)
    assert cache_of(kept).written == 4


@pytest.mark.parametrize("harm", ["cut", "footer", "first", "later"])
def test_a_damaged_file_is_made_anew_and_the_answer_is_right(harm, tmp_path):
    plain, batch, _ = made("vit", "unipt")
    kept, _, runs = made("vit", "unipt", tmp_path / "taps")
    assert same(step(kept, batch), step(plain, batch))
    (name,) = files(tmp_path / "taps")
    path = tmp_path / "taps" / name
    data, shard = bytearray(path.read_bytes()), Shard.read(path, 2)
    if harm == "cut":
        data = data[:-7]
    elif harm == "footer":
        data[-60] ^= 1
    else:
        data[shard.starts[harm == "later"] + 5] ^= 1
    path.write_bytes(data)
    if harm in ("cut", "footer"):                    # seen as the folder is opened
        cache_of(kept).index = None
    assert same(step(kept, batch), step(plain, batch))
    if harm in ("first", "later"):                   # noticed within a forward, and deleted
        assert files(tmp_path / "taps") == []
        assert same(step(kept, batch), step(plain, batch))
    before = runs.n
    assert files(tmp_path / "taps") == [name]
    assert same(step(kept, batch), step(plain, batch))
    assert runs.n == before


def test_a_folder_that_vanishes_is_no_error(tmp_path):
    plain, batch, _ = made("vit", "unipt")
    kept, _, _ = made("vit", "unipt", tmp_path / "taps")
    for _ in range(2):
        assert same(step(kept, batch), step(plain, batch))
        for p in (tmp_path / "taps").glob("*.taps"):
            p.unlink()


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path):
    plain, batch, _ = made("vit", "unipt")
    kept, _, runs = made("vit", "unipt", tmp_path / "taps")
    small, rest = cut(batch, [0]), cut(batch, [1, 2, 3])
    assert same(step(kept, small), step(plain, small))
    (name,) = files(tmp_path / "taps")
    size = (tmp_path / "taps" / name).stat().st_size
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, was[1]))
        with pytest.warns(UserWarning, match="no more taps are kept in .*: File too large"):
            assert same(step(kept, rest), step(plain, rest))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert files(tmp_path / "taps") == [name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (rest, small):
            ran = runs.n
            assert same(step(kept, one), step(plain, one))
    assert runs.n == ran                             # what is there is read


def test_the_room_is_a_bound(tmp_path):
    plain, batch, _ = made("vit", "unipt")
    kept, _, runs = made("vit", "unipt", tmp_path / "taps")
    one = cut(batch, [0])
    assert same(step(kept, one), step(plain, one))
    (name,) = files(tmp_path / "taps")
    size = (tmp_path / "taps" / name).stat().st_size
    room = 2 * size - 500
    tight, _, runs = made("vit", "unipt", tmp_path / "taps", more=f", cache_gb={room / 1e9!r}")
    other, _, _ = made("vit", "unipt")
    with pytest.warns(UserWarning, match=f"its room of {room:,} bytes is used .none was read yet"):
        assert same(step(tight, cut(batch, [1])), step(other, cut(batch, [1])))
    assert same(step(tight, one), step(other, one))
    assert runs.n == 1 and files(tmp_path / "taps") == [name]


def test_room_is_left_on_the_disk_for_others(tmp_path, monkeypatch):
    plain, batch, _ = made("vit", "unipt")
    kept, _, _ = made("vit", "unipt", tmp_path / "taps")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    with pytest.warns(UserWarning, match="the disk has 1,073,741,824 bytes left"):
        assert same(step(kept, batch), step(plain, batch))
    assert files(tmp_path / "taps") == []
    assert same(step(kept, batch), step(plain, batch))


HOSTILE = {"start": -5, "parts": 10**9, "note": "yes", "shape": [0, 4], "dtype": "nn",
           "sums": []}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_footer_that_asks_for_what_is_not_there_is_no_file(field, tmp_path):
    kept, batch, _ = made("vit", "unipt", tmp_path / "taps")
    kept.step(batch)
    (name,) = files(tmp_path / "taps")
    path = tmp_path / "taps" / name
    data = path.read_bytes()
    length = int.from_bytes(data[-24:-16], "little")
    told = json.loads(data[-28 - length:-28])
    assert Shard.read(path, 2) is not None and Shard.read(path, 3) is None
    told["taps"][1][field] = HOSTILE[field]
    text = json.dumps(told).encode()
    path.write_bytes(data[:-28 - length] + text + zlib.crc32(text).to_bytes(4, "little")
                     + len(text).to_bytes(8, "little") + data[-16:])
    assert Shard.read(path, 2) is None


def test_states_that_are_not_finite_are_not_kept(tmp_path):
    kept, batch, runs = made("vit", "unipt", tmp_path / "taps")
    bad = {k: v.clone() for k, v in batch.items()}
    bad["pixel_values"][1, 0, 0, 0] = float("nan")
    kept.model.eval()
    with torch.no_grad():
        for ran in (4, 8):
            out = kept.model(pixel_values=bad["pixel_values"]).logits
            assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()
            assert runs.n == ran
        assert cache_of(kept).written == 3
        kept.model(pixel_values=bad["pixel_values"][[0, 3, 2]])
    assert runs.n == 8


# -- whose they are --------------------------------------------------------------------------------
@pytest.mark.parametrize("before", ["", "nf4 + "])
def test_another_model_is_refused(before, tmp_path):
    def tuned(seed):
        net, batch = tiny("llama", seed=seed)
        t = burnish.tune(net, f"{before}lst(reduction=2, cache='{tmp_path / 'taps'}')", seed=0)
        t.optimizer(lr=1e-3)
        return t, batch

    one, batch = tuned(0)
    one.step(batch)
    same_one, _ = tuned(0)
    same_one.step(batch)
    other, _ = tuned(1)
    with pytest.raises(FormatError, match="states of another model"):
        other.step(batch)


def test_side_networks_of_one_backbone_share_it(tmp_path):
    made("vit", "lst(reduction=2)", tmp_path / "taps")[0].step(tiny("vit", batch=4)[1])
    kept, batch, runs = made("vit", "unipt", tmp_path / "taps")
    kept.step(batch)
    assert runs.n == 0


def test_a_backbone_that_changes_is_refused(tmp_path):
    kept, batch, _ = made("vit", "unipt", tmp_path / "taps")
    kept.step(batch)
    with torch.no_grad():
        next(kept.model.get_submodule("vit.layers")[0].parameters()).add_(1)
    with pytest.raises(FormatError, match="states of another model"):
        kept.step(batch)


def test_a_setting_of_a_block_is_part_of_it(tmp_path):
    kept, batch, _ = made("vit", "unipt", tmp_path / "taps")
    kept.step(batch)
    other, _, _ = made("vit", "unipt", tmp_path / "taps", layer_norm_eps=1e-3)
    with pytest.raises(FormatError, match="states of another model"):
        other.step(batch)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.taps").write_text("mine")
    kept, batch, _ = made("vit", "unipt", tmp_path)
    with pytest.raises(FormatError, match="holds other things than taps"):
        kept.step(batch)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.taps"]


def test_a_damaged_mark_and_a_folder_that_cannot_be_are_refused(tmp_path):
    kept, batch, _ = made("vit", "unipt", tmp_path / "taps")
    kept.step(batch)
    (tmp_path / "taps" / MARK).write_text("{")
    other, _, _ = made("vit", "unipt", tmp_path / "taps")
    with pytest.raises(FormatError, match="is damaged; delete the folder"):
        other.step(batch)
    (tmp_path / "file").write_text("")
    wrong, _, _ = made("vit", "unipt", tmp_path / "file" / "taps")
    with pytest.raises(RecipeError, match="taps cannot be kept in .*choose another folder"):
        wrong.step(batch)


# -- what it depends on may not train --------------------------------------------------------------
def test_what_trains_below_is_refused_by_name(tmp_path):
    with pytest.raises(RecipeError, match=r"vit\.layers.*could not train"):
        burnish.tune(tiny("vit")[0], f"lora(rank=2) + lst(reduction=2, cache='{tmp_path / 'x'}')")
    kept, batch, _ = made("vit", "unipt", tmp_path / "taps")
    first = next(iter(kept.adapters))
    kept.add("second", "lora(rank=2)")
    kept.use({"second": 1.0, first: 1.0})
    with pytest.raises(RecipeError, match="'second' is in use beside"):
        kept.model(pixel_values=batch["pixel_values"])


def test_rows_that_are_no_samples_are_refused():
    class Here:
        samples, active, version = (2,), (("a", 1.0),), 0

    class Who:
        here = Here()

    cache = TapCache("lst", "a", [torch.nn.Linear(2, 2)], "nowhere", 10)
    with pytest.raises(RecipeError, match="called with 2 samples and its first block with 6 rows"):
        cache._check(Who(), torch.zeros(6, 3, 2))


@pytest.mark.parametrize("recipe", ["lst(reduction=2)", "sherl"])
def test_what_puts_tokens_before_samples_has_none_to_keep(recipe, tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=False)
            self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = torch.nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(0))

    assert burnish.tune(Net(), recipe).model(torch.randn(5, 2, 32)).shape == (2, 3)
    name, _, rest = recipe.partition("(")
    rest = f"{rest[:-1]}, " * bool(rest) + f"cache='{tmp_path / 'x'}'"
    with pytest.raises(RecipeError, match="samples of a batch apart, .*batch_first=False"):
        burnish.tune(Net(), f"{name}({rest})")


def test_settings_that_cannot_act_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="there is none: give cache="):
        burnish.parse("lst(cache_gb=2.0)")
    with pytest.raises(RecipeError, match="more than 0"):
        burnish.parse("unipt(cache='x', cache_gb=0.0)")
    with pytest.raises(RecipeError, match="expected a folder"):
        burnish.parse("unipt(cache='')")
    with pytest.raises(RecipeError, match="one stack of blocks"):
        burnish.tune(tiny("t5")[0], f"lst(reduction=2, cache='{tmp_path / 'x'}')")
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_tuned_model_has_its_own(tmp_path):
    kept, batch, _ = made("vit", "unipt", tmp_path / "taps")
    kept.step(batch)
    twin = copy.deepcopy(kept.model).eval()
    with torch.no_grad():
        a, b = (m(pixel_values=batch["pixel_values"]).logits for m in (twin, kept.model.eval()))
    assert torch.equal(a, b)


# -- what is promised ------------------------------------------------------------------------------
WIDE = dict(intermediate_size=2048, num_hidden_layers=3)


@pytest.mark.parametrize("recipe", ["lst", "unipt(reduction=8)", "sherl(reduction=8)"])
def test_a_step_that_reads_does_not_hold_what_a_block_holds(recipe, tmp_path):
    kept, batch, _ = made("vit", recipe, tmp_path / "taps", **WIDE)
    name = str(kept.recipe)
    net, _ = tiny("vit", batch=4, **WIDE)
    filled = burnish.simulate(net, name, batch, steps=1)
    read = burnish.simulate(net, name, batch, steps=1, taps_read=True)
    assert not (tmp_path / "taps").exists()          # a promise writes nothing
    gc.collect()
    assert burnish.measure(kept, batch, steps=1).peak_bytes == filled.peak_bytes
    gc.collect()
    assert burnish.measure(kept, batch, steps=1).peak_bytes == read.peak_bytes
    hidden = 4 * 4 * 2048 * tokens(net)              # what the MLP's middle takes
    if not recipe.startswith("sherl"):               # whose last block runs in the graph
        assert read.peak_bytes < filled.peak_bytes - hidden / 2
    assert burnish.simulate(net, name, batch, evaluate=True, taps_read=True).peak_bytes \
        < burnish.simulate(net, name, batch, evaluate=True).peak_bytes or "sherl" in recipe


def tokens(net):
    c = net.config
    return (c.image_size // c.patch_size) ** 2 + 1


def test_a_promise_of_reading_asks_for_a_cache():
    with pytest.raises(ConfigError, match="no part of .*lst.* keeps states.*cache="):
        burnish.simulate(tiny("vit")[0], "lst(reduction=2)", 2, taps_read=True)
