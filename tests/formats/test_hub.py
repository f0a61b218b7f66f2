"""Names: local folders first, then the cache; nothing is fetched offline. The rest, against a
server: tests/hub."""

from __future__ import annotations

import pytest
import torch

from burnish.core.errors import BurnishError, ConfigError
from burnish.formats import hub
from burnish.formats.folder import write_adapter
from burnish.formats.sharing import push

CONF = {"recipe": "lora", "base": {"name": "b"}}


def test_local_paths_come_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model").resolve() == tmp_path / "org" / "model"
    assert hub.resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["./orf", "/no/such/place", "a/b/c"])
def test_paths_are_not_looked_up(tmp_path, monkeypatch, name):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        hub.resolve(name)
    with pytest.raises(ConfigError, match="did you mean 'org'"):
        hub.resolve("./orf")


def test_offline_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BurnishError, match="org/none: there is no such folder here.*"
                                           "HF_HUB_OFFLINE is set"):
        hub.resolve("org/none", cache_dir=tmp_path)
    with pytest.raises(BurnishError, match="nothing is pushed"):
        push(write_adapter(tmp_path / "a", {"t": torch.zeros(2)}, CONF), "org/a")


def test_a_cached_snapshot_is_found_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert hub.resolve("org/tiny", cache_dir=tmp_path) == snapshot


def test_a_bad_name_is_refused():
    with pytest.raises(ConfigError, match="neither a local path nor a hub name"):
        hub.resolve("bad name!")
