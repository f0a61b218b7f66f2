"""Two processes under gloo, each with its share of the base (FSDP2), learn what one does."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import burnish
from burnish.fit import state
from burnish.formats import safe

WORK = Path(__file__).with_name("sharded_work.py")
work = types.SimpleNamespace(**runpy.run_path(str(WORK)))


def together(jobs, world=2):
    """What each process says of each job."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
           "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": port}
    runs = [subprocess.Popen([sys.executable, WORK, json.dumps(jobs)], text=True,
                             env={**env, "RANK": str(r)}, stdout=subprocess.PIPE)
            for r in range(world)]
    said = [r.communicate(timeout=300)[0] for r in runs]
    assert [r.returncode for r in runs] == [0] * world
    return [json.loads(s.splitlines()[-1]) for s in said]


def alone(recipe, out, steps=(0, 3), kind="llama", blocks=2, norm=0.0, load=None):
    """The same in one process that sees all rows."""
    made = work.model(kind, blocks)
    tuned = burnish.load(made, load) if load else burnish.tune(made, recipe)
    tuned.save(out / "start")
    kept = state.load_tree(Path(load), "optimizer") if load else None
    losses, opt = work.train(tuned, slice(*steps), norm=norm, kept=kept)
    tuned.save(out / "end", whole=True)
    state.save_tree(state.optimizer_state(opt, list(made.named_parameters())), out / "end",
                    "optimizer")
    return losses


def same(one, two, end="end"):
    """Weights and moments of two folders agree to the rounding of sums in fp32."""
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b = (safe.load_file(folder / end / file) for folder in (one, two))
        assert a.keys() == b.keys()
        for name in a:
            off = (b[name].double() - a[name].double()).norm()
            # (a gradient that is nought, of a bias of keys, is rounding alone)
            assert float(off) <= 1e-4 * float(a[name].double().norm()) + 1e-13, name


def read(folder):
    """A folder's configuration and the bytes of its tensors (the order of words in the header of a
    safetensors file is by chance, and its digest with it)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["tensors_sha256"]
    tensors = safe.load_file(folder / "adapter_model.safetensors")
    return config, {n: (t.dtype, t.shape, t.numpy().tobytes()) for n, t in tensors.items()}


#: name -> (what the processes do, whose words one process needs)
QUICK = {"lora": dict(recipe="lora(rank=2)", norm=0.1), "full": dict(recipe="full", norm=0.1),
         "snella": dict(recipe="snella(rank=2)"),
         "head": dict(recipe="lora(rank=2)", kind="bert")}
REFUSED = {
    "nf4 + lora(rank=2)": "holds the frozen weights as codes",
    "full + step_in_backward": "before 2 processes have shared its gradient",
    "lora(rank=2) + meft": "FSDP2 stands between them",
    "full + galore(rank=2)": "reads whole tensors",
    "full + lion": "take adamw or sgd",
    "full + mezo": "take adamw or sgd",
    "full + l2_sp": "l2_sp reads whole tensors",
    "full + sam": "sam reads whole tensors",
    "lisa": "lisa reads whole tensors",
}
FOREIGN = ("sharded already (a tensor-parallel plan, or FSDP2)",
           "load the model without tp_plan, tune it", "sharded already",
           "call burnish.shard(tuned) in place of fully_shard", "keeps running statistics")
GUARDS = {"tuned.merge()": "a merge needs all of its weights",
          "tuned.detach()": "giving back the base needs",
          "tuned.add('more', 'lora')": "another adapter needs",
          "burnish.shard(tuned)": "sharded already"}


def jobs_of(table, folder, **kw):
    return {n: dict(job, out=str(folder / n), **kw) for n, job in table.items()}


@pytest.mark.slow
def test_two_processes_with_shares_of_the_base_learn_what_one_does(tmp_path):
    """Losses, weights, moments, files, what is refused, and a run that goes on in another number
    of processes; one start of two processes for all of it, since starting takes longest."""
    jobs = jobs_of(QUICK, tmp_path)
    jobs["lora"]["refused"] = list(GUARDS)
    jobs |= {r: dict(recipe=r, out=str(tmp_path / "none")) for r in REFUSED}
    jobs["first"] = dict(recipe="full", steps=[0, 2], out=str(tmp_path / "first"))
    alone("full", tmp_path / "one", (0, 2))
    jobs["on"] = dict(load=str(tmp_path / "one" / "end"), steps=[2, 4], out=str(tmp_path / "on"))
    said = together(jobs)

    whole = sum(p.numel() for p in work.model().parameters())
    for name, job in QUICK.items():
        losses = alone(job["recipe"], tmp_path / f"{name}-1", kind=job.get("kind", "llama"),
                       norm=job.get("norm", 0.0))
        for each in said:
            assert each[name]["losses"] == pytest.approx(losses, rel=1e-7), name
            assert each[name]["sharded"], name
        same(tmp_path / f"{name}-1", tmp_path / name)
        one, two = (read(tmp_path / n / "start") for n in (f"{name}-1", name))
        assert one == two, "names, bytes of tensors and every word of one process's file"
    assert said[0]["full"]["held"] + said[1]["full"]["held"] < 1.1 * whole
    for recipe, words in REFUSED.items():
        assert all(words in each[recipe] for each in said), recipe
    for call, words in GUARDS.items():
        assert all(words in each["lora"]["refused"][call] for each in said), call
    for each in said:
        for text, words in zip(each["foreign"], FOREIGN, strict=True):
            assert words in text

    straight = alone("full", tmp_path / "straight", (0, 4))
    assert said[0]["on"]["losses"] == pytest.approx(straight[2:], rel=1e-7), "1 -> 2"
    same(tmp_path / "straight", tmp_path / "on")
    on = alone("full", tmp_path / "back", (2, 4), load=tmp_path / "first" / "end")
    assert on == pytest.approx(straight[2:], rel=1e-7), "2 -> 1"
    same(tmp_path / "straight", tmp_path / "back")


@pytest.mark.slow
def test_shares_that_wait_on_the_host_micro_batches_and_blocks_that_run_again(tmp_path):
    table = {"offload": dict(recipe="full", offload=True),
             "offload-lora": dict(recipe="lora(rank=2)", offload=True),
             "micro": dict(recipe="lora(rank=2)", micro=2),
             "micro-full": dict(recipe="full", micro=2),
             "again": dict(recipe="lora(rank=2) + checkpoint(every=2)", blocks=4),
             "again-full": dict(recipe="full + checkpoint(every=2)", blocks=4),
             "norms": dict(recipe="norms", kind="bert"),
             "bitfit": dict(recipe="bitfit", kind="bert"),
             "dora": dict(recipe="dora(rank=2)"), "coded": dict(recipe="lora(rank=2) + adam8bit")}
    said = together(jobs_of(table, tmp_path))
    for name, job in table.items():
        losses = alone(job["recipe"], tmp_path / f"{name}-1", kind=job.get("kind", "llama"),
                       blocks=job.get("blocks", 2))
        assert said[0][name]["losses"] == said[1][name]["losses"]
        assert said[0][name]["losses"] == pytest.approx(losses, rel=1e-6), name
        if name != "coded":                      # a code may fall to either side of a rounding
            same(tmp_path / f"{name}-1", tmp_path / name)


@pytest.mark.slow
def test_four_processes_learn_what_one_does_and_go_on_from_two(tmp_path):
    """Four shares of tensors with two rows too: some processes hold none of them."""
    first = together(jobs_of({"two": dict(recipe="full", steps=[0, 2])}, tmp_path))
    table = {"lora": dict(recipe="lora(rank=2)"), "full": dict(recipe="full", kind="bert"),
             "snella": dict(recipe="snella(rank=2)"),
             "on": dict(load=str(tmp_path / "two" / "end"), steps=[2, 4])}
    said = together(jobs_of(table, tmp_path), world=4)
    for name in ("lora", "full", "snella"):
        losses = alone(table[name]["recipe"], tmp_path / f"{name}-1",
                       kind=table[name].get("kind", "llama"))
        assert all(each[name]["losses"] == pytest.approx(losses, rel=1e-7) for each in said)
        same(tmp_path / f"{name}-1", tmp_path / name)
    straight = alone("full", tmp_path / "straight", (0, 4))
    assert [*first[0]["two"]["losses"], *said[3]["on"]["losses"]] == pytest.approx(straight,
                                                                                  rel=1e-7)
    same(tmp_path / "straight", tmp_path / "on")


@pytest.mark.slow
def test_all_processes_start_from_the_first_ones_values(tmp_path):
    """The second process drew other factors; what trains is the first one's draw."""
    said = together({"drawn": dict(recipe="lora(rank=2)", drawn=True, out=str(tmp_path / "drawn"))})
    losses = alone("lora(rank=2)", tmp_path / "one")
    assert said[1]["drawn"]["losses"] == pytest.approx(losses, rel=1e-7)


def test_without_processes_there_is_nothing_to_spread_over():
    tuned = burnish.tune(work.model(), "lora(rank=2)")
    with pytest.raises(burnish.ConfigError, match="torchrun"):
        burnish.shard(tuned)
    tuned.step(work.batches()[0], work.loss_of)                     # and it is as it was
