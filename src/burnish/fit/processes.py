"""How many processes this run was meant to have, and what each holds."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError
from ..core.processes import check_shard, processes

if TYPE_CHECKING:
    from ..engine.tuned import Tuned
    from .arguments import Options


def settle(own: Options) -> None:
    """What `shard` and the environment of ``accelerate launch`` ask for, in `own`.

    Raises ConfigError for an unknown word, for FSDP of the first kind, and for shares of a model
    that one process would have alone.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("accelerate's configuration asks for FSDP 1, which rebuilds "
                              "parameters; set fsdp_version: 2 (--fsdp_version 2)")
        os.environ["ACCELERATE_USE_FSDP"] = "false"      # the recipe decides what stays whole
        own.shard = own.shard or "fsdp2"
        own.shard_offload |= os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
    check_shard(own.shard)
    if own.shard == "fsdp2" and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError("shard='fsdp2' spreads the model over processes, and there is one: start "
                          "several with torchrun --nproc-per-node 2 -m burnish fit ..., or burnish "
                          "fit --launch 2 ...")
    if own.shard_offload and own.shard != "fsdp2":
        raise ConfigError("shard_offload keeps the shares of shard='fsdp2' on the host; give both")


def world(own: Options) -> dict[str, Any]:
    """What a promise is told of the processes of this run."""
    size = max(processes(), int(os.environ.get("WORLD_SIZE", "1")))
    if size < 2:
        return {}
    return {"world_size": size, "shard": own.shard, "shard_offload": own.shard_offload}


def spread(tuned: Tuned, own: Options) -> None:
    """Give each process its share, where that was asked for and is not done yet."""
    if own.shard == "fsdp2" and tuned.state.shards is None:
        from ..engine.sharded import shard

        shard(tuned, offload=own.shard_offload)


def alone(parent: int | None = None) -> str | None:
    """What to say where `accelerate launch` was asked for several processes and started one.

    On CPUs it does so without a word, and only its own command line shows it (read where the
    system tells it, on Linux).
    """
    if "WORLD_SIZE" in os.environ:
        return None
    try:
        line = Path(f"/proc/{parent or os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    words = [w.decode(errors="replace") for w in line]
    if not any("accelerate" in w for w in words) or not any(w.endswith("launch") for w in words):
        return None
    for k, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            count = value or words[min(k + 1, len(words) - 1)]
            if count.isdigit() and int(count) > 1:
                return (f"accelerate was asked for {count} processes and started this one alone; "
                        f"torchrun --nproc-per-node {count} ... starts {count}")
    return None


def sayer(quiet: bool, width: int = 80) -> Callable[[str], None]:
    """Prints what a run says, in the first process; sentences are folded, what is indented (rows,
    tables) stays as it is."""
    def say(text: str) -> None:
        if quiet or int(os.environ.get("RANK", "0")):
            return
        for line in text.split("\n"):
            long = len(line) > width and not line.startswith(" ")
            print(textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False,
                                break_on_hyphens=False) if long else line, flush=True)

    return say
