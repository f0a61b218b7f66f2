"""Names: local folders first, then the cache; nothing is fetched offline; no pickles, no code."""

from __future__ import annotations

import fnmatch

import pytest
import torch

from burnish.core.errors import BurnishError, ConfigError, FormatError
from burnish.formats import hub
from burnish.formats.folder import write_adapter

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
    with pytest.raises(BurnishError, match="'org/none' is no local folder.*HF_HUB_OFFLINE is set"):
        hub.resolve("org/none", cache_dir=tmp_path)
    with pytest.raises(BurnishError, match="nothing is pushed"):
        hub.push(write_adapter(tmp_path / "a", {"t": torch.zeros(2)}, CONF), "org/a")


def test_a_cached_snapshot_is_found_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    assert hub.resolve("org/tiny", cache_dir=tmp_path) == snapshot


def test_what_is_fetched(monkeypatch):
    asked = {}

    def snapshot_download(name, **kw):
        asked.update(kw, name=name)
        return "/x"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    def fetched(file):
        return any(fnmatch.fnmatch(file, p) for p in asked["allow_patterns"])

    hub.resolve("org/m", revision="v1")
    assert asked["revision"] == "v1" and asked["name"] == "org/m"
    assert fetched("model-00001-of-2.safetensors") and fetched("tokenizer.json")
    assert not fetched("pytorch_model.bin") and not fetched("modeling_odd.py")
    hub.resolve("org/m", trust_remote_code=True)
    assert fetched("modeling_odd.py") and not fetched("pytorch_model.bin")


def test_a_bad_name_is_refused():
    with pytest.raises(ConfigError, match="neither a local path nor a hub name"):
        hub.resolve("bad name!")


def test_only_the_adapter_is_pushed(monkeypatch, tmp_path):
    calls = []

    class Api:
        def create_repo(self, repo_id, **kw):
            calls.append((repo_id, kw["private"]))

        def upload_folder(self, **kw):
            calls.append(kw["allow_patterns"])
            return "https://hub/org/a"

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = write_adapter(tmp_path / "a", {"t": torch.zeros(2)}, CONF)
    assert hub.push(folder, "org/a") == "https://hub/org/a"
    assert calls[0] == ("org/a", True)
    assert set(calls[1]) == {"adapter_config.json", "adapter_model.safetensors", "README.md",
                             "run.json"}
    with pytest.raises(FormatError, match="no such folder"):
        hub.push(tmp_path / "b", "org/b")
