"""``burnish compress`` and ``expand``: what tuning changed, in one small file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from . import target
from .app import Json, app
from .files import Base, Output
from .screen import emit


@app.command()
def compress(
    folder: Annotated[Path, typer.Argument(help="A tuned model's folder, or an adapter's.")],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    how: Annotated[str, typer.Option(help="compeft(density=0.05) or delta_quant(bits=4).")
                   ] = "compeft",
    base: Annotated[str | None, typer.Option(help="The base model's folder; of an adapter, "
                                                  "default: what it was made on.")] = None,
    json: Json = False,
) -> None:
    """What tuning changed, in one small file: signs and places (ComPEFT), or a few bits an entry.

    Of a model the difference from its base, one tensor in memory at a time; of an adapter the
    difference of its tensors from what they began as.
    """
    from ..blocks.weight import golomb
    from ..formats import combine
    from ..formats.compressed import compress_adapter, compress_model
    from ..memory.units import format_bytes

    part = _part(how)
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: the file's name ends in .safetensors")
    kind = combine.kind_of([folder])
    if output.exists() and not _ours(output):
        raise ConfigError(f"{output} exists, and burnish did not write it; name another file")
    if kind == "model":
        if base is None:
            raise ConfigError("what tuning changed is a difference; give --base, the folder "
                              f"{folder} was tuned from")
        told = compress_model(folder, Path(base), part, output)
    else:
        from ..formats.folder import read_config

        config = read_config(folder)
        told = compress_adapter(folder, lambda: _start(config, base), part, output)
    least = golomb.entropy(part.density) if hasattr(part, "density") else None
    times = told["update"] / told["bytes"]
    lines = [f"{output}: {format_bytes(told['bytes'])}, of an update that takes "
             f"{format_bytes(told['update'])} as it is: " + (
                 f"{times:.1f} x smaller" if times > 1 else
                 "larger, as the file's header is; it is not worth compressing"),
             f"  {told['bits']:.3f} bits per entry" + (
                 f"; no code takes less than {least:.3f}" if least is not None else "")]
    if told["whole"]:
        lines.append(f"  as it is, for lack of a start: {', '.join(told['whole'])}")
    emit(json, {"output": output, "kind": kind, "how": str(part), **told, "entropy": least},
         "\n".join(lines))


@app.command()
def expand(
    file: Annotated[Path, typer.Argument(help="A file that compress wrote.")],
    output: Output,
    base: Base = None,
    json: Json = False,
) -> None:
    """The folder that a compressed update stands for: its base with the change, or the adapter."""
    from ..formats import claim, staged
    from ..formats.compressed import Update, expand_adapter, expand_model

    update = Update(file)
    name = base or update.base
    if not name:
        raise ConfigError(f"{file} does not say which base it was made on; give --base")
    reads = [("the update", file), ("the base model", name)]
    claim.refuse_overlap(output, reads, whole=True)
    staged.refuse_others(output, update.kind)
    with staged.replace(output, update.kind, reads) as new:
        if update.kind == "model":
            expand_model(update, Path(name), new)
        else:
            expand_adapter(update, lambda config: _start(config, name), new)
    emit(json, {"output": output, "kind": update.kind, "base": name, "how": str(update.how)},
         f"{update.kind} written to {output}, of {name} and {file} ({update.how})")


def _part(how: str) -> Any:
    from ..blocks.weight.coded import Codes
    from ..core.recipe import parse

    parts = list(parse(how))
    if len(parts) != 1 or not isinstance(parts[0], Codes):
        raise ConfigError(f"--how {how}: one way to compress is expected, compeft(density=0.05) or "
                          "delta_quant(bits=4)")
    return parts[0]


def _start(config: Mapping[str, Any], base: str | None) -> Any:
    """The adapter of a configuration on its base, as it was before training."""
    import burnish

    name = base or config["base"].get("name")
    if not name:
        raise ConfigError("the adapter does not say which base it was made on; give --base")
    entry, = (config.get("adapters") or {"": config}).values()
    return burnish.tune(target.model(name), entry["recipe"], targets=entry.get("targets"),
                        head=bool(entry.get("head")), seed=entry.get("seed", 0))


def _ours(path: Path) -> bool:
    from ..core.errors import FormatError
    from ..formats.compressed import Update

    try:
        Update(path)
    except FormatError:
        return False
    return True
