"""push, pull and fit by name, against a stand-in for the hub that speaks its HTTP API."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.slow       # two processes load everything, once for all of these

FIT = ("--steps", "2", "--batch_size", "4", "--quiet", "true", "--validation", "0")


def of(name, hub, files, **kw):
    """A repository of one test."""
    return hub.add(name, files, **kw)


def same(a, b):
    """Do two folders hold the same adapter, to the bit?"""
    from safetensors.torch import load_file

    one, other = (load_file(f / "adapter_model.safetensors") for f in (a, b))
    return one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)


def other(files, word):
    """The weights again, as a file that no cache has."""
    from safetensors.torch import load, save

    return save(load(files["model.safetensors"]), {"format": "pt", "of": word})


def without_weights(files):
    return {k: v for k, v in files.items() if not k.endswith(".safetensors")}


@pytest.fixture(scope="session")
def run(server, _online, rows, tmp_path_factory):
    """A fit of the model by its name on the hub."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    server.asked.clear()
    done = _online("fit", "--model", "org/tiny", "--data", rows, "--output", folder, *FIT,
                       HF_TOKEN="hf_read")
    assert done.code == 0, done.err
    return folder, done, list(server.fetched()), list(server.asked)


# -- fit by name ----------------------------------------------------------------------------
def test_fit_takes_a_model_by_name_and_fetches_each_file_once(run):
    folder, done, fetched, asked = run
    assert len(fetched) == len(set(fetched)) and "config.json" in fetched
    assert sum(p.endswith("/model.safetensors") and m == "GET" for m, p, _ in asked) == 1
    assert done.err == ""                                   # no bars, no words of libraries
    assert json.loads((folder / "run.json").read_text())["model"] == "org/tiny"
    assert json.loads((folder / "adapter_config.json").read_text())["base"]["name"] == "org/tiny"
    assert "models--" not in (folder / "adapter_config.json").read_text()


def test_it_learns_what_it_learns_of_the_folder(run, online, tiny, rows, tmp_path):
    assert online("fit", "--model", tiny, "--data", rows, "--output", tmp_path / "a", *FIT
                  ).code == 0
    assert same(tmp_path / "a", run[0])


def test_offline_it_is_taken_from_the_cache(run, hub, offline, rows, tmp_path):
    done = offline("fit", "--model", "org/tiny", "--data", rows, "--output", tmp_path / "a", *FIT)
    assert done.code == 0, done.err
    assert same(tmp_path / "a", run[0])
    assert hub.asked == []                                  # not one request


def test_offline_without_a_copy_it_says_so_and_asks_nobody(hub, offline, rows, tmp_path, files):
    of("org/unseen", hub, files)
    done = offline("fit", "--model", "org/unseen", "--data", rows, "--output", tmp_path / "a", *FIT)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "nothing of that name is in the hub's cache, and HF_HUB_OFFLINE is set" in done.err
    assert hub.asked == []
    done = offline("push", tmp_path, "org/x")
    assert done.code == 2 and "no such folder" not in done.err and hub.asked == []


def test_weights_that_are_pickled_are_not_fetched(hub, online, rows, tmp_path, files):
    of("org/pickled", hub, {**without_weights(files), "pytorch_model.bin": b"\x80\x02" * 99})
    done = online("fit", "--model", "org/pickled", "--data", rows, "--output", tmp_path / "a", *FIT)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "org/pickled holds no weights in safetensors: its weights are in pytorch_model.bin, " \
           "which may hold a pickle and is not opened" in done.err
    assert not any("pytorch_model.bin" in p for _, p, _ in hub.asked)
    # nor does anybody look for other people's copies of it
    assert not any("discussions" in p or "refs" in p for _, p, _ in hub.asked)


def test_of_several_copies_of_the_weights_one_is_fetched(hub, online, tmp_path, files):
    from safetensors.torch import load, save

    tensors = load(files["model.safetensors"])
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:3],
             "model-00002-of-00002.safetensors": names[3:]}
    index = {"metadata": {}, "weight_map": {n: f for f, held in parts.items() for n in held}}
    of("org/shards", hub, {
        **without_weights(files), "pytorch_model.bin": b"\x80" * 99, "handler.py": b"import os",
        **{f: save({n: tensors[n] for n in held}, {"format": "pt"}) for f, held in parts.items()},
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": files["model.safetensors"],
        "original/model.safetensors": files["model.safetensors"]})
    done = online("pull", "org/shards", "--output", tmp_path / "m")
    assert done.code == 0, done.err
    assert {p.name for p in (tmp_path / "m").glob("*.safetensors")} == set(parts)
    asked = " ".join(p for _, p, _ in hub.asked)
    for other in ("pytorch_model.bin", "handler.py", "consolidated", "original/"):
        assert other not in asked, other
    done = online("simulate", "org/shards", "--recipe", "lora", "--length", "8")
    assert done.code == 0, done.err


def test_code_comes_only_where_it_is_asked_for(hub, script, files):
    of("org/code", hub, {**files, "modeling_odd.py": b"x = 1", "pytorch_model.bin": b"\x80"})
    done = script("""
from burnish.formats.hub import resolve
for asked in (False, True):
    folder = resolve("org/code", trust_remote_code=asked)
    print((folder / "modeling_odd.py").exists(), (folder / "pytorch_model.bin").exists())
""")
    assert done.out.split() == ["False", "False", "True", "False"]


# -- push and pull --------------------------------------------------------------------------
def test_an_adapter_is_pushed_with_its_card_and_comes_back(run, hub, online, tmp_path):
    import shutil

    from huggingface_hub import ModelCard

    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "old.bin").write_bytes(b"\x80")
    done = online("push", folder, "me/adapter", "--message", "first of them")
    assert done.code == 0 and done.err == "", done.err
    assert f"pushed to {hub.url}/me/adapter/commit/" in done.out
    there = hub.files("me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md",
            "tokenizer.json", "tokenizer_config.json"} <= set(there)
    assert not {"notes.txt", "old.bin", "metrics.jsonl", "report.html"} & set(there)
    assert not any(n.startswith("checkpoint") for n in there)
    assert hub.repositories["me/adapter"].private
    assert hub.repositories["me/adapter"].messages[-1] == "first of them"

    card = ModelCard(there["README.md"].decode())
    facts = json.loads(there["run.json"])
    head = card.data.to_dict()
    assert head["base_model"] == "org/tiny" and head["base_model_relation"] == "adapter"
    assert head["pipeline_tag"] == "text-generation" and head["library_name"] == "burnish"
    assert {"burnish", "adapter", "lora"} <= set(head["tags"])
    assert card.data.eval_results is None or all(
        r.metric_value == facts["metrics"][r.dataset_split][r.metric_type]
        for r in card.data.eval_results)
    for word in ("promised beforehand", "measured afterwards", 'burnish.pull("me/adapter")'):
        assert word in card.text
    assert str(tmp_path) not in there["README.md"].decode()

    done = online("pull", "me/adapter", "--output", tmp_path / "back", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["base"] == "org/tiny"
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    said = [online("predict", f, "the cat", "--tokens", "4").out for f in (folder,
                                                                           tmp_path / "back")]
    assert said[0] == said[1] and "the cat" in said[0]


def test_a_merged_model_is_pushed_as_a_finetune(run, hub, online, tmp_path):
    from huggingface_hub import ModelCard

    assert online("merge", run[0], "--output", tmp_path / "m").code == 0
    done = online("push", tmp_path / "m", "me/merged", "--public")
    assert done.code == 0, done.err
    there = hub.files("me/merged")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(there)
    assert not hub.repositories["me/merged"].private
    card = ModelCard(there["README.md"].decode())
    head = card.data.to_dict()
    assert head["base_model"] == "org/tiny" and head["base_model_relation"] == "finetune"
    assert head["library_name"] == "transformers" and "adapter" not in head["tags"]
    assert 'AutoModelForCausalLM.from_pretrained("me/merged")' in card.text
    done = online("simulate", "me/merged", "--recipe", "lora", "--length", "8")
    assert done.code == 0, done.err


def test_an_adapter_of_a_folder_has_no_base_that_hubs_know(online, hub, tiny, rows, tmp_path):
    done = online("fit", "--model", tiny, "--data", rows, "--output", tmp_path / "a", *FIT)
    assert done.code == 0, done.err
    done = online("push", tmp_path / "a", "me/local")        # the stand-in refuses what hubs refuse
    assert done.code == 0, done.err
    assert "a folder of this machine: whoever pulls it gives --base" in done.out
    assert b"base_model" not in hub.files("me/local")["README.md"]


def test_a_damaged_adapter_is_refused_before_anything_is_sent(run, hub, online, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    done = online("push", folder, "me/damaged")
    assert done.code == 2 and "is not the file adapter_config.json was written for" in done.err
    assert hub.asked == [] and "me/damaged" not in hub.repositories


def test_a_branch_is_pushed_to_and_pulled(run, hub, online, tmp_path):
    assert online("push", run[0], "me/branches").code == 0
    first = hub.files("me/branches")
    assert online("push", run[0], "me/branches", "--revision", "next", "--message", "m").code == 0
    repository = hub.repositories["me/branches"]
    sha = repository.commit({"README.md": b"---\nlibrary_name: burnish\n---\nother"}, "next")
    assert hub.files("me/branches") == first
    for revision, text in (("next", b"other"), (sha, b"other"), ("main", b"promised")):
        out = tmp_path / revision
        assert online("pull", "me/branches", "--revision", revision, "--output", out).code == 0
        assert text in (out / "README.md").read_bytes()
    done = online("pull", "me/branches", "--revision", "v9")
    assert done.code == 2 and "me/branches has no revision 'v9'" in done.err


def test_the_newest_commit_is_pulled_also_in_one_process(hub, online, files, tmp_path):
    repository = of("org/moves", hub, {**files, "README.md": b"one"})
    online("pull", "org/moves", "--output", tmp_path / "a")
    repository.commit({"README.md": b"two"})
    online("pull", "org/moves", "--output", tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_bytes() == b"two"


# -- who may ----------------------------------------------------------------------------------
@pytest.mark.parametrize("token, words", [
    (None, "the hub knows no such name (a private one needs HF_TOKEN)"),
    ("hf_wrong", "the hub does not know this token (HF_TOKEN, or the one that was kept at login)"),
    ("hf_read", None)])
def test_a_private_repository(hub, online, files, tmp_path, token, words):
    of(f"org/secret-{token}", hub, files, private=True)
    done = online("pull", f"org/secret-{token}", "--output", tmp_path / "a", HF_TOKEN=token)
    if words is None:
        assert done.code == 0, done.err
    else:
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("token, words", [
    (None, "the hub wants a token (HF_TOKEN)"),
    ("hf_wrong", "the hub does not know this token"),
    ("hf_read", "needs the right to write there")])
def test_a_push_that_may_not(run, hub, online, token, words):
    done = online("push", run[0], "org/mine", HF_TOKEN=token)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert "org/mine" not in hub.repositories


def test_names_that_are_not_there(run, hub, online):
    done = online("pull", "org/none")
    assert done.code == 2 and "the hub knows no such name" in done.err
    done = online("push", run[0], "bad name!")
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    hub.add("org/empty", {"README.md": b"nothing"})
    done = online("pull", "org/empty")
    assert done.code == 2 and "holds no adapter and no model" in done.err
    done = online("pull", "bad name!")
    assert done.code == 2 and "is neither a local path nor a hub name (owner/name)" in done.err
    hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    done = online("pull", "org/gated")
    assert done.code == 2 and "org/gated is gated: ask for access on its page" in done.err


def test_a_folder_is_not_pulled(online, tmp_path):
    done = online("pull", tmp_path)
    assert done.code == 2 and "is a folder here; pull takes the name of a repository" in done.err


# -- what breaks off ----------------------------------------------------------------------------
def test_a_download_that_is_cut_goes_on_where_it_was(hub, online, files, tmp_path):
    from safetensors.torch import save

    weights = save({"w": torch.arange(6_000_000, dtype=torch.float32)})     # read 10 MiB at a time
    of("org/cut", hub, {"config.json": files["config.json"], "model.safetensors": weights})
    hub.cut["model.safetensors"] = [12_000_000, 11_000_000]
    done = online("pull", "org/cut", "--output", tmp_path / "a")
    assert done.code == 0, done.err
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == weights
    ranges = [r for m, p, r in hub.asked if m == "GET" and p.endswith("/model.safetensors")]
    piece = 10 * 2**20
    assert ranges == [None, f"bytes={piece}-", f"bytes={2 * piece}-"]


def test_one_that_fails_keeps_the_files_it_has(hub, online, offline, files, tmp_path):
    of("org/fails", hub, files := {**files, "model.safetensors": other(files, "fails")})
    hub.cut["model.safetensors"] = [0] * 9
    done = online("pull", "org/fails", "--output", tmp_path / "a")
    assert done.code == 1 and "burnish: org/fails could not be fetched: the connection broke off" \
        in done.err.splitlines()[-1]
    assert not (tmp_path / "a").exists()
    done = offline("pull", "org/fails")                     # half of it is not taken for all of it
    assert done.code == 1 and "the copy in the hub's cache is not whole" in done.err
    hub.cut.clear()
    hub.asked.clear()
    assert online("pull", "org/fails", "--output", tmp_path / "a").code == 0
    assert hub.fetched() == []                              # the rest is there already
    assert [p for m, p, _ in hub.asked if m == "GET" and "/objects/" in p]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == files[name]


def test_a_hub_that_is_down(run, hub, online, script):
    hub.broken = 503
    done = online("pull", "org/never-seen")
    assert done.code == 1 and "the hub answered 503" in done.err and done.err.count("\n") == 1
    done = online("push", run[0], "me/down")
    assert done.code == 1 and "could not be pushed: the hub answered 503" in done.err
    done = online("simulate", "org/tiny", "--recipe", "lora", "--length", "8")
    assert done.code == 0, done.err                         # from the cache


# -- adapters that are not burnish's or not safe ------------------------------------------------
def test_an_adapter_that_is_pickled_is_refused(hub, online, tmp_path):
    of("org/old-peft", hub, {"adapter_config.json": b'{"peft_type": "LORA", "r": 4}',
                             "adapter_model.bin": b"\x80\x02" * 50})
    done = online("pull", "org/old-peft", "--output", tmp_path / "a")
    assert done.code == 2 and "its weights are in adapter_model.bin, which may hold a pickle and " \
                              "is not opened" in done.err
    assert not any("adapter_model.bin" in p for _, p, _ in hub.asked) and not (
        tmp_path / "a").exists()


def test_a_peft_adapter_travels_too(run, hub, online, tmp_path):
    assert online("export", run[0], "--output", tmp_path / "peft").code == 0
    done = online("push", tmp_path / "peft", "me/peft")
    assert done.code == 0, done.err
    done = online("pull", "me/peft", "--output", tmp_path / "back")
    assert done.code == 0 and "its base is org/tiny" in done.out, done.err
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == \
        (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()


def test_python_says_the_same(hub, script, online, files, tmp_path):
    of("org/python", hub, files)
    done = script(f"""
import burnish
folder = burnish.pull("org/python", {str(tmp_path / "a")!r})
assert (folder / "model.safetensors").is_file()
try:
    burnish.pull("org/nothing")
except burnish.ConfigError as e:
    print(e)
""")
    assert "the hub knows no such name" in done.out
