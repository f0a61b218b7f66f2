"""Adapter folders: what is written is read back; what is wrong is said in one line."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch

from burnish.core.errors import BurnishError, FormatError
from burnish.formats import safe
from burnish.formats.claim import MARK
from burnish.formats.folder import CARD, CONFIG, RUN, TENSORS, read_adapter, write_adapter

CONF = {"recipe": "lora(rank=8)", "base": {"name": "tiny/llama", "sha256": "0" * 64, "tensors": {}}}


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    return {f"layers.{i}.q_proj.burnish.default.0.{n}": torch.randn(s, generator=g)
            for i in range(4) for n, s in (("A", (8, 256)), ("B", (256, 8)))}


@pytest.fixture
def folder(tmp_path, tensors):
    return write_adapter(tmp_path / "adapter", tensors, CONF, run={"loss": 0.25})


def test_round_trip(folder, tensors):
    config, back = read_adapter(folder)
    assert config["library"] == "burnish" and config["format"] == 1
    assert config["recipe"] == "lora(rank=8)" and config["base"] == CONF["base"]
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in back)
    assert {p.name for p in folder.iterdir()} == {CONFIG, TENSORS, CARD, RUN, MARK}
    assert json.loads((folder / RUN).read_text()) == {"loss": 0.25}


def test_the_file_is_hardly_larger_than_what_was_trained(folder, tensors):
    trained = sum(t.nbytes for t in tensors.values())
    assert trained < (folder / TENSORS).stat().st_size <= 1.05 * trained


def test_dtypes_views_and_shared_tensors_survive(tmp_path):
    base = torch.randn(6, 4)
    shared = torch.randn(3)
    given = {"bf16": base.bfloat16(), "view": base[1:3], "turned": base.t(), "scalar": base[0, 0],
             "bytes": torch.arange(5, dtype=torch.uint8), "empty": torch.empty(0, 4),
             "flag": torch.tensor([True, False]), "one": shared, "two": shared}
    _, back = read_adapter(write_adapter(tmp_path / "a", given, CONF))
    for k, t in given.items():
        assert back[k].dtype == t.dtype and torch.equal(back[k], t), k
    assert back["one"].data_ptr() == back["two"].data_ptr()
    header = (tmp_path / "a" / TENSORS).read_bytes()
    n = int.from_bytes(header[:8], "little")
    stored = json.loads(header[8 : 8 + n])
    spans = sorted(v["data_offsets"] for k, v in stored.items() if k != "__metadata__")
    assert "two" not in stored and spans[0][0] == 0 and spans[-1][1] == len(header) - 8 - n
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_only_the_asked_tensor_is_read(folder, tensors):
    name = next(iter(tensors))
    assert list(safe.load_file(folder / TENSORS, names=[name])) == [name]
    with pytest.raises(FormatError, match="no tensor 'nothing'"):
        safe.load_file(folder / TENSORS, names=["nothing"])


def test_card_has_the_header_hubs_read(folder):
    import huggingface_hub as hub

    card = hub.ModelCard.load(folder / CARD)
    assert card.data.library_name == "burnish" and card.data.base_model == "tiny/llama"
    assert "lora(rank=8)" in card.text and "| loss | 0.25 |" in card.text


# -- what is refused ------------------------------------------------------------------------
def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    config.update(fields)
    (folder / CONFIG).write_text(json.dumps(config))


def truncate(folder):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-100])


def flip(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(bytes(data))


def pickled(folder):
    (folder / TENSORS).unlink()
    torch.save({}, folder / "adapter_model.bin")


DAMAGE = {
    "missing folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"it has no {CONFIG}"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"has no {TENSORS}"),
    "truncated tensors": (truncate, "truncated"),
    "empty tensors": (lambda f: (f / TENSORS).write_bytes(b""), "truncated"),
    "changed tensors": (flip, "interrupted, or the file changed"),
    "pickle": (pickled, r"adapter_model.bin may hold a pickle and is not opened"),
    "peft": (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA", "r": 8}'),
             r"written by PEFT \(LORA\); read it with burnish.load_peft"),
    "other library": (lambda f: edit(f, library="else"), "not written by burnish"),
    "newer": (lambda f: edit(f, format=2), "format 2, this burnish reads up to 1"),
    "odd format": (lambda f: edit(f, format="new"), "'format' should be a number"),
    "unknown field": (lambda f: edit(f, recipes="x"), "unknown field 'recipes'; did you mean "
                                                      "'recipe'"),
    "missing field": (lambda f: (f / CONFIG).write_text('{"library": "burnish", "format": 1}'),
                      "field 'recipe' is missing"),
    "corrupt json": (lambda f: (f / CONFIG).write_text('{"library": "burnish",\n oops'),
                     "is not JSON: .* at line 2"),
    "json list": (lambda f: (f / CONFIG).write_text("[]"), "expected a JSON object, got list"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"),
                      "is UTF-16 text; save it as UTF-8"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_bad_input_is_one_clear_line(folder, damage):
    act, message = DAMAGE[damage]
    act(folder)
    with pytest.raises(FormatError, match=message) as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_misspelt_folder_and_a_file_in_its_place(folder):
    with pytest.raises(FormatError, match="did you mean 'adapter'"):
        read_adapter(folder.with_name("adaptr"))
    with pytest.raises(FormatError, match="is a file; expected an adapter folder"):
        read_adapter(folder / CONFIG)


def test_pickles_are_refused_by_name(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(FormatError, match="may hold a pickle"):
        safe.load_file(tmp_path / "model.pt")


def test_unknown_fields_are_not_written(tmp_path, tensors):
    with pytest.raises(FormatError, match="unknown field 'recepe'; did you mean 'recipe'"):
        write_adapter(tmp_path / "a", tensors, {**CONF, "recepe": ""})
    assert not (tmp_path / "a").exists()


def test_a_full_disk_leaves_the_old_adapter(folder, tensors):
    """A limit on file size stands for the full disk: the same error at the same place."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    bigger = {k: torch.randn(512, 512) for k in tensors}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BurnishError, match="cannot write .*untouched"):
            write_adapter(folder, bigger, CONF)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    read_adapter(folder)


def test_an_interrupted_save_leaves_the_old_adapter(folder, tensors, monkeypatch):
    """The tensors are new, the configuration is not written any more."""
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safe, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(folder, {k: t + 1 for k, t in tensors.items()}, CONF)
    _, back = read_adapter(folder)
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_saving_again_replaces_and_leaves_no_litter(folder, tensors):
    write_adapter(folder, {k: t + 1 for k, t in tensors.items()}, CONF)
    _, back = read_adapter(folder)
    assert all(torch.equal(back[k], tensors[k] + 1) for k in tensors)
    assert {p.name for p in folder.iterdir()} == {CONFIG, TENSORS, CARD, MARK}


def test_a_place_that_cannot_be_written(tmp_path, tensors):
    (tmp_path / "file").write_text("")
    with pytest.raises(BurnishError, match="cannot write"):
        write_adapter(tmp_path / "file" / "adapter", tensors, CONF)
