"""A stand-in for the hub, models on it, and processes that have its address as HF_ENDPOINT."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import Said

HERE = Path(__file__).parent
TEXTS = ["the cat sat on the mat", "a dog ran in the park", "stocks fell as rates rose",
         "the bank cut its rates", "my dog and my cat play", "markets rose on bank news"] * 4

_spec = importlib.util.spec_from_file_location("burnish_hub_stand_in", HERE / "stand_in.py")
stand_in = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = stand_in
_spec.loader.exec_module(stand_in)


class Client:
    """A process that runs command lines of burnish, with settings of the environment of its own."""

    def __init__(self, **env: str | None):
        kept = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "client_work.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=kept)

    def __call__(self, *argv, **env) -> SimpleNamespace:
        return self.ask({"argv": [str(a) for a in argv], "env": env})

    def run(self, code: str) -> SimpleNamespace:
        return self.ask({"run": code})

    def ask(self, what) -> SimpleNamespace:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return SimpleNamespace(**answer | {k: Said(answer[k]) for k in ("out", "err")
                                           if k in answer})

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A small Qwen3 with a tokenizer, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64,
                                   eos_token="<|end|>", pad_token="<|pad|>")
    made.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(made), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=64,
        eos_token_id=0, bos_token_id=None, pad_token_id=None)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("hub-rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return file


@pytest.fixture(scope="session")
def files(tiny) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(tiny.iterdir())}


@pytest.fixture(scope="session")
def server(files):
    with stand_in.Hub() as hub:
        hub.add("org/tiny", files)
        yield hub


@pytest.fixture
def hub(server):
    server.asked.clear()
    yield server
    server.cut.clear()
    server.broken = None


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub-home")


@pytest.fixture(scope="session")
def _online(server, home):
    made = Client(HF_ENDPOINT=server.url, HF_HOME=str(home), HF_HUB_OFFLINE=None,
                  HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_write")
    yield made
    made.close()


@pytest.fixture
def online(_online):
    """Of somebody who may write."""
    return lambda *argv, **env: _online(*argv, **{"HF_TOKEN": "hf_write", **env})


@pytest.fixture
def script(_online):
    return _online.run


@pytest.fixture(scope="session")
def offline(server, home):
    """Of the same cache, with HF_HUB_OFFLINE."""
    made = Client(HF_ENDPOINT=server.url, HF_HOME=str(home), HF_HUB_OFFLINE="1",
                  HF_HUB_DISABLE_XET="1")
    yield made
    made.close()
