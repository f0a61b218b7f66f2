"""``burnish merge`` and ``export``: an adapter folder as plain weights, or as others read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import CheckError, ConfigError, nearest
from . import target
from .app import Json, app
from .screen import emit

Adapter = Annotated[Path, typer.Argument(help="An adapter folder.")]
Base = Annotated[str | None, typer.Option(help="The base model's folder or hub name; default: "
                                               "what the adapter was made on.")]
Output = Annotated[Path, typer.Option(help="The folder to write.")]
Force = Annotated[bool, typer.Option(help="Load onto a base that differs from the adapter's.")]


def attached(adapter: Path, base: str | None, force: bool = False, unread: bool = False
             ) -> tuple[Any, str]:
    """(the adapter on its base: a tuned model, the base's folder or name).

    The folder of a finished fit says how its head was sized; other adapters say their base only.
    unread: the weights of a base that is a folder wait there (formats/opened.py).
    """
    import burnish

    from ..formats import safe
    from ..formats.combine import of_peft
    from ..formats.fingerprint import dtype_of
    from ..formats.folder import CONFIG, RUN, read_config
    from ..formats.opened import open_model, opens

    def model(name: str, dtype: str | None = None) -> Any:
        target.needs_transformers("models")
        return open_model(name, dtype) if unread and opens(name) else target.model(name, dtype)

    if of_peft(adapter):
        own = safe.read_json(adapter / CONFIG)
        name = base or own.get("base_model_name_or_path")
        if not name:
            raise ConfigError(f"{adapter} does not say which base it was made on; give --base")
        return burnish.load_peft(model(name), adapter), name
    was = read_config(adapter)["base"]
    name = base or was.get("name")
    if not name:
        raise ConfigError(f"{adapter} does not say which base it was made on; give --base")
    if (adapter / RUN).is_file():
        from ..fit.finished import Finished

        return Finished.open(adapter, base, force, unread).tuned, name
    found = model(name, dtype_of(was))
    return burnish.load(found, adapter, force=force), name


@app.command()
def merge(
    adapter: Adapter,
    output: Output,
    base: Base = None,
    tolerance: Annotated[float, typer.Option(help="Largest change of the outputs, relative to "
                                                  "their size, that still is a merge.")] = 1e-2,
    force: Force = False,
    json: Json = False,
) -> None:
    """The base with the update in its weights. Refuses (exit code 4) when the outputs drift."""
    from ..fit.pipelines import Pipeline, is_pipeline
    from ..formats import claim, safe, staged
    from ..formats.folder import CARD, read_config
    from ..formats.model_files import copy_processor

    reads = [("the adapter", adapter), ("the base model", base),
             ("the base model", read_config(adapter)["base"].get("name"))]
    claim.refuse_overlap(output, reads, whole=True)      # before anything is loaded
    staged.refuse_others(output, "model")
    tuned, source = attached(adapter, base, force)
    merged, drift = merged_within(tuned, tolerance)
    if tuned.merged.lost is not None:
        raise CheckError(tuned.merged.lost)
    with staged.replace(output, "model", reads) as new:
        if is_pipeline(source):
            Pipeline(source).save(merged, new)
        else:
            merged.save_pretrained(new)
            copy_processor([Path(source), adapter], new)
        safe.write_text(new / CARD, _card(adapter))
    emit(json, {"output": output, "drift": drift},
         f"merged into {output}; outputs on a probe batch differ by {drift:.2g} of their size")


def _card(adapter: Path) -> str:
    """The card of a merged model, from what is beside the adapter."""
    from ..fit.card import card
    from ..formats.card import model_card
    from ..formats.folder import RUN, read_config, read_run

    if (adapter / RUN).is_file() and "parts" in (run := read_run(adapter)):
        return card(run, merged=True)
    # an adapter made of others (combined, repaired, steered) knows its task and has no run to tell
    return model_card(read_config(adapter), merged=True)


FORMATS = ("peft", "vllm", "sglang", "gguf", "mlx", "diffusers", "onnx")


@app.command()
def export(
    adapter: Adapter,
    output: Output,
    to: Annotated[str, typer.Option("--for", "--to", help=f"Who reads it: one of "
                                    f"{', '.join(FORMATS)}.")] = "peft",
    rank: Annotated[int | None, typer.Option(help="Approximate what is no pair of factors by its "
                                             "best one of this rank.", min=1)] = None,
    base: Base = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """The adapter in another program's files, and what to type there.

    peft takes nearly everything. vllm, sglang, gguf (llama.cpp) and mlx read pairs of factors of a
    language model's linear layers, with one rank and one scale; the rest is refused by name.
    diffusers reads the LoRA of a pipeline's denoiser, pipe.load_lora_weights(OUTPUT). onnx is the
    whole model with the update in its weights, run once by onnxruntime; the folder of a
    merged model will do.
    """
    import burnish

    from ..formats import claim, staged
    from ..formats.diffusers_lora import export_diffusers
    from ..formats.served import export_served
    from ..memory.table import wrapped

    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}; expected one of {', '.join(FORMATS)}"
                          f"{nearest(to, FORMATS)}")
    claim.refuse_overlap(output, [("the adapter", adapter), ("the base model", base)], whole=True)
    staged.refuse_others(output, to if to in ("mlx", "onnx", "diffusers") else "peft")
    if to == "onnx":
        if rank is not None:
            raise ConfigError("--rank approximates an update, and onnx holds the merged weights")
        whole = _onnx(adapter, output, base, force)
        emit(json, whole, "\n".join(line for part in str(whole).split("\n")
                                    for line in wrapped(part)))
        return
    tuned, source = attached(adapter, base, force)
    if to == "peft":
        burnish.export_peft(tuned, output, rank=rank)
        emit(json, {"output": output, "format": to}, f"written to {output}, for {to}")
        return
    done: Any = export_diffusers(tuned, output, base=source, rank=rank, inputs=[
        ("the adapter", adapter)]) if to == "diffusers" else \
        export_served(tuned, output, to, base=source, rank=rank)
    said = [line for part in str(done).split("\n") for line in (
        [part] if part.startswith("  ") else wrapped(part))]       # commands are copied whole
    emit(json, done, "\n".join(said))


def _onnx(folder: Path, output: Path, base: str | None, force: bool) -> Any:
    """The model of an adapter, merged, or of a model's folder, as ONNX."""
    from ..formats.exported import export_onnx, needed
    from ..formats.folder import CONFIG

    needed()                                             # before anything is loaded
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        if base is not None:
            raise ConfigError(f"--base is of an adapter, and {folder} is a whole model")
        return export_onnx(target.model(str(folder)), output, [folder], [("the model", folder)])
    tuned, source = attached(folder, base, force)
    merged, _ = merged_within(tuned, 1e-2)
    return export_onnx(merged, output, [source, folder],
                       [("the adapter", folder), ("the base model", source)])


def merged_within(tuned: Any, tolerance: float) -> tuple[Any, float]:
    """(the model with the update in its weights, by how much its outputs drift). CheckError where
    it is more than `tolerance`."""
    before = probe(tuned.model)
    merged = tuned.merge()
    drift = difference(before, probe(merged))
    if not drift <= tolerance:
        raise CheckError(f"merging changes the outputs by {drift:.2g} of their size, more than "
                         f"the tolerance of {tolerance:g}; nothing was written")
    return merged, drift


def probe(model: Any) -> Any:
    """The model's outputs on a fixed small batch of its own kind of input."""
    import torch

    from ..core.example import example_batch

    model.eval()
    batch = {k: v.to(model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v
             for k, v in example_batch(model, 2).items()}
    told = batch.pop("labels", None)
    if told is not None and getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = told
    with torch.no_grad():
        out = model(**batch)
    return next(t for t in out.to_tuple() if torch.is_tensor(t) and t.is_floating_point()).float()


def difference(a: Any, b: Any) -> float:
    """|a - b| relative to |a|."""
    return float((a - b).norm() / a.norm().clamp(min=1e-12))
