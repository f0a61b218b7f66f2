"""Every reader with a sound input: what the fuzzer damages, and how it is then read."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import burnish
from burnish.cli import config, target
from burnish.core.anatomy import Anatomy
from burnish.core.recipe import parse
from burnish.core.targets import match
from burnish.fit import checkpoint, pictures, state
from burnish.fit.arguments import sort_out
from burnish.fit.data import read
from burnish.formats import claim, folder, peft_files, safe
from burnish.formats.peft_folder import Lora, PeftFolder
from burnish.memory import parse_bytes
from burnish.testing.models import tiny


@dataclass
class Reader:
    """make: writes sound files into an empty folder.  read: reads them.  texts: sound inputs, where
    it reads words and no files."""

    make: Callable[[Path], Any] | None
    read: Callable[[Any], Any]
    texts: tuple[str, ...] = ()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "fc1": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.layers:
            x = x + block["fc1"](block["q_proj"](x))
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapter(place: Path) -> None:
    tuned = burnish.tune(net(), "lora(rank=2) + lean", targets="q_proj,fc1", head=False)
    tuned.add("second", "lora(rank=1)", targets="re:.*q_proj")
    tuned.save(place / "a", run={"loss": 1.0})


def load(place: Path) -> None:
    burnish.load(net(), place / "a").detach()


def peft(place: Path) -> None:
    names = [f"layers.{i}.q_proj" for i in range(2)]
    what = PeftFolder(loras={n: Lora(torch.ones(2, 8), torch.ones(8, 2), 0.5) for n in names})
    peft_files.write(place / "p", what, [n for n, _ in net().named_modules()], "card")
    made = safe.read_json(place / "p" / "adapter_config.json")
    made |= {"alpha_pattern": {"o_proj": 4}, "rank_pattern": {"layers.1.*": 2}}
    (place / "p" / "adapter_config.json").write_text(json.dumps(made))


def run_file(place: Path) -> None:
    safe.write_json(
        place / "run.json",
        {
            "model": "m",
            "training": {"seed": 3},
            "max_length": 8,
            "recipe": "lora",
            "data": {
                "task": "text-classification",
                "source": "x.csv",
                "layout": "CSV",
                "labels": ["a", "b"],
                "reading": {},
                "fingerprint": "0",
            },
        },
    )


def shards(place: Path) -> None:
    safe.save_file(
        {"a": torch.ones(3), "b": torch.ones(2, 2)}, place / "one.safetensors", {"x": "y"}
    )
    shared = torch.ones(4)
    safe.save_file({"c": shared, "d": shared}, place / "two.safetensors")
    safe.write_json(
        place / "model.safetensors.index.json",
        {
            "metadata": {},
            "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
        },
    )


def read_shards(place: Path) -> None:
    found = safe.Tensors(place)
    for name in found:
        found[name].sum()
    safe.header(place / "one.safetensors")


def run_folder(place: Path) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    with checkpoint.writing(place / "checkpoint-3") as new:
        state.save_tree(state.random_state(), new, "rng-0")
        state.save_tree(state.optimizer_state(optimizer, [("p", parameter)]), new, "optimizer")
        state.save_tree(
            {"scheduler": {"last": 3}, "when": (1, 2.5), "kind": torch.float32}, new, "loop"
        )


def resume(place: Path) -> None:
    found = checkpoint.find(place, True)
    assert found is None or not checkpoint.changed(found), "a changed checkpoint was taken"


def trees(place: Path) -> None:
    """Without the seal, as if the writer had meant it."""
    random = torch.get_rng_state()
    try:
        parameter = nn.Parameter(torch.ones(3))
        kept = state.load_tree(place / "checkpoint-3", "optimizer")
        state.load_optimizer_state(torch.optim.AdamW([parameter]), [("p", parameter)], kept)
        state.load_tree(place / "checkpoint-3", "loop")
        state.set_random_state(state.load_tree(place / "checkpoint-3", "rng-0"))
    finally:
        torch.set_rng_state(random)


def settings(place: Path) -> None:
    (place / "c.yaml").write_text(
        "model: m\ndata: d.csv\nlr: 1e-3\nrecipe: lora(rank=2)\nbatch_size: 4\n"
        "base: &b {epochs: 2}\nmore:\n  <<: *b\n  x: [1, 2]\nwhen: 2024-01-02\n"
    )
    (place / "c.json").write_text(
        '{"lr": 0.1, "seed": 3, "head": true, "max_length": 8, "targets": ["q"]}'
    )
    (place / "c.toml").write_text("lr = 0.1\nseed = 3\n[x]\ny = [1, 2]\nwhen = 2024-01-02\n")


def read_settings(place: Path) -> None:
    for file in sorted(place.iterdir()):
        found = config.read(file)
        sort_out(
            {
                k: v
                for k, v in found.items()
                if k not in ("model", "data", "recipe", "base", "more", "x", "when")
            }
        )


def table(name: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(text, encoding="utf-8") and None


def read_one(name: str, **how: Any) -> Callable[[Path], None]:
    def act(place: Path) -> None:
        found = read(str(place / name), **how)
        found.samples()
        found.summary()

    return act


ROWS = [(f"this is text {i} of many", "yes" if i % 2 else "no") for i in range(12)]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"what is {i}?"},
            {"role": "assistant", "content": f"it is {i}"},
        ]
    }
    for i in range(6)
]
ALPACA = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(6)]
PLAIN = [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(6)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


def parquet(place: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    text, label = zip(*ROWS, strict=True)
    pq.write_table(pyarrow.table({"text": text, "label": label}), place / "x.parquet")


def photos(place: Path) -> None:
    from PIL import Image

    for kind in ("cat", "dog"):
        (place / "x" / kind).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (6, 6), 40 * i).save(place / "x" / kind / f"{i}.png")


def points(place: Path) -> None:
    from burnish.testing.own import clouds

    clouds(place / "x", 2, points=6, ends=(".xyz", ".npy", ".ply", ".off"))


def read_points(place: Path) -> None:
    from burnish.fit.clouds import cloud, sampled

    found = read(str(place / "x"), validation=0)
    for i in range(len(found.train)):
        sampled(cloud(found.row("train", i)["cloud"]["path"]), 4, (0, 0, i))


def graph_rows(place: Path) -> None:
    from burnish.testing.own import graphs

    graphs(place / "x.jsonl", 3)


def graph_folder(place: Path) -> None:
    from burnish.testing.own import rows_of_graphs, tu

    tu(place / "x", rows_of_graphs(4))


def described(place: Path) -> None:
    from PIL import Image

    (place / "x").mkdir()
    for i in range(4):
        Image.new("RGB", (6, 6)).save(place / "x" / f"{i}.png")
    (place / "x" / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(4))
    )


def processor(place: Path) -> None:
    pictures.Picture(8, 8, (0.5,) * 3, (0.5,) * 3, crop=0.9).save_pretrained(place)


def prepare(place: Path) -> None:
    from PIL import Image

    made = pictures.processor_of(str(place))
    if made.height * made.width <= 512 * 512:
        made(Image.new("RGB", (9, 7)))


def model_config(place: Path) -> None:
    from transformers import BertConfig

    BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=20,
        architectures=["BertForSequenceClassification"],
    ).save_pretrained(place)


def model_folder(place: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model_config(place)
    BertForSequenceClassification(BertConfig.from_pretrained(place)).save_pretrained(place)


def mark(place: Path) -> None:
    folder.write_adapter(place / "a", {"t": torch.ones(2)}, {"recipe": "lora", "base": {}})


def write_again(place: Path) -> None:
    claim.refuse_overlap(place / "b", [("x", place / "a")])
    folder.write_adapter(place / "a", {"t": torch.ones(2)}, {"recipe": "lora", "base": {}})


@functools.cache
def anatomy() -> Anatomy:
    return Anatomy.of(tiny("llama", meta=True)[0])


def chosen(text: str) -> None:
    match(anatomy(), text)


def on_the_line(text: str) -> None:
    config.value(text)
    sort_out(config.overrides(text.split(" ")))


READERS: dict[str, Reader] = {
    "recipe": Reader(
        None,
        parse,
        (
            "nf4 + snella(rank=8) + checkpoint",
            "lora(rank=2, targets='q,v')",
            "qlora + adam8bit",
            "mezo + lora(rank=4, dropout=0.1)",
        ),
    ),
    "targets": Reader(
        None,
        chosen,
        (
            "q_proj,up",
            "q@-1",
            "re:.*\\.(q|v)_proj",
            "all,-head",
            "*up_proj@0:1",
            "o_proj",
            "linear",
        ),
    ),
    "sizes": Reader(None, parse_bytes, ("8GB", "7.5 GiB", "900MB", "16,000,000", "1.5e3 kb")),
    "command line": Reader(
        None,
        on_the_line,
        ("--lr 1e-3 --epochs=2", "--seed 3 --head false", "--batch-size 4 --targets ['q']"),
    ),
    "adapter": Reader(adapter, load),
    "peft": Reader(peft, lambda p: burnish.load_peft(net(), p / "p").detach()),
    "run": Reader(run_file, folder.read_run),
    "tensors": Reader(shards, read_shards),
    "checkpoint": Reader(run_folder, resume),
    "state": Reader(run_folder, trees),
    "settings": Reader(settings, read_settings),
    "clouds": Reader(points, read_points),
    "graph rows": Reader(graph_rows, read_one("x.jsonl", validation=0)),
    "graph folder": Reader(graph_folder, read_one("x", validation=0)),
    "csv": Reader(
        table("x.csv", "text,label\n" + "".join(f"{t},{c}\n" for t, c in ROWS)), read_one("x.csv")
    ),
    "tsv": Reader(
        table("x.tsv", "text\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in ROWS)), read_one("x.tsv")
    ),
    "json": Reader(
        table("x.json", json.dumps([{"text": t, "label": c} for t, c in ROWS])), read_one("x.json")
    ),
    "jsonl": Reader(
        table("x.jsonl", lines([{"text": t, "label": c} for t, c in ROWS])), read_one("x.jsonl")
    ),
    "text": Reader(
        table("x.txt", "one text\n\nanother text\n\nand a third\n\nand more\n"), read_one("x.txt")
    ),
    "chat": Reader(table("x.json", json.dumps(CHAT)), read_one("x.json")),
    "alpaca": Reader(table("x.json", json.dumps(ALPACA)), read_one("x.json")),
    "completion": Reader(table("x.json", json.dumps(PLAIN)), read_one("x.json")),
    "parquet": Reader(parquet, read_one("x.parquet")),
    "photos": Reader(photos, read_one("x")),
    "metadata": Reader(described, read_one("x")),
    "processor": Reader(processor, prepare),
    "config": Reader(model_config, lambda p: target.config(str(p))),
    "model": Reader(model_folder, lambda p: target.model(str(p))),
    "mark": Reader(mark, write_again),
}


def fresh(source: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    return place
