"""``burnish methods`` and ``burnish doctor``: what there is, and whether it works here."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from ..core.axes import AXES
from ..core.errors import CheckError, ConfigError, nearest
from ..core.extras import OPTIONAL, installed, too_old
from .app import Json, app
from .screen import emit, fitted, hung, table


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method or preset, in full.")] = None,
    axis: Annotated[str | None, typer.Option(help="Only methods that answer this axis.")] = None,
    json: Json = False,
) -> None:
    """The catalogue by axis; with a name, that method's equation, settings and facts."""
    from ..core import registry

    if axis is not None and axis not in AXES:
        raise ConfigError(f"unknown axis {axis!r}; expected one of {', '.join(AXES)}"
                          f"{nearest(axis, AXES)}")
    presets = registry.presets()
    if name in presets and name not in registry.names():
        emit(json, {"name": name, "preset": presets[name]}, f"{name} = {presets[name]}")
    elif name is not None:
        entry = registry.Entry(name, registry.find(name))
        emit(json, facts(entry), page(entry))
    else:
        entries = [e for e in registry.catalogue() if axis is None or axis in e.axes]
        shown = {} if axis else presets
        data = {"methods": [{"name": e.name, "axes": e.axes, "summary": e.summary,
                             "tier": e.cls.tier} for e in entries], "presets": shown}
        emit(json, data, _listing(entries, shown))


def facts(entry: Any) -> dict[str, Any]:
    """What is known of a method, as plain data."""
    cls = entry.cls
    settings = [{"name": f.name, "default": None if f.default is MISSING else f.default,
                 "required": f.default is MISSING and f.default_factory is MISSING,
                 "type": str(f.type), "help": f.metadata.get("help", "")} for f in fields(cls)]
    return {"name": entry.name, "axes": entry.axes, "summary": entry.summary,
            "doc": inspect.getdoc(cls) or "", "settings": settings, "paper": cls.paper,
            "tier": cls.tier, "identity": cls.identity, "merges": cls.merges,
            "kinds": sorted(cls.kinds)}


def page(entry: Any) -> str:
    """A method's docstring, settings and facts, for reading."""
    d = facts(entry)
    rows = [(s["name"], "required" if s["required"] else repr(s["default"]), s["help"])
            for s in d["settings"]]
    known = [("axes", ", ".join(d["axes"])),
             ("step 0 is the base model", "yes" if d["identity"] else "no"),
             ("merges into plain weights", "yes" if d["merges"] else "no")]
    if {"delta", "storage"} & set(d["axes"]):
        known.append(("applies to", ", ".join(d["kinds"])))
    known += [("source", d["paper"]), ("written", d["tier"])]
    width = max(len(k) for k, _ in known)
    return "\n".join([fitted(d["doc"]), "", table(("setting", "default", "meaning"), rows), "",
                      *(hung(f"{k:<{width}}  {v}", width + 2) for k, v in known)])


def _listing(entries: list[Any], presets: dict[str, str]) -> str:
    width = max((len(n) for n in [*(e.name for e in entries), *presets]), default=0)

    def line(name: str, said: str) -> str:
        return hung(f"  {name:<{width}}  {said}", width + 4)

    lines: list[str] = []
    for name, axis in AXES.items():
        own = [e for e in entries if e.axes[:1] == (name,)]
        if own:
            lines += [f"{name}: {axis.question}", *(line(e.name, e.summary) for e in own), ""]
    if presets:
        lines += ["presets: named combinations",
                  *(line(n, r) for n, r in sorted(presets.items())), ""]
    from ..core.method import TIERS

    held = Counter(e.cls.tier for e in entries)
    return "\n".join([*lines, f"{len(entries)} methods: "
                      + ", ".join(f"{held[t]} {t}" for t in TIERS if held[t])
                      + "; `burnish methods NAME` tells all about one"])


#: what the package cannot be without
REQUIRED = ("torch", "safetensors", "numpy", "packaging", "typer", "rich")


@app.command()
def doctor(
    again: Annotated[bool, typer.Option("--again", help="Measure the rates once more; otherwise "
                                        "what was measured is shown.")] = False,
    json: Json = False,
) -> None:
    """What is installed, which devices there are and how fast, and one real training step here.

    The rates (products, memory, launch of an operator) take a few seconds to measure and are kept
    for `burnish plan` and `burnish simulate`.
    """
    import platform

    import torch

    packages = {p: installed(p) for p in ("burnish", *REQUIRED)}
    extras = {extra: {p: installed(p) for p in names} for extra, names in OPTIONAL.items()}
    devices = [{"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i),
                "free": torch.cuda.mem_get_info(i)[0], "total": torch.cuda.mem_get_info(i)[1]}
               for i in range(torch.cuda.device_count())]
    from ..blocks.gpu.road import asked, missing
    from ..memory.doctor import measured

    lacks = [missing("cuda", i) for i in range(len(devices))]
    kernels = {"asked": asked(), **{d["device"]: "triton" if not why and asked() == "triton" else
                                    f"torch: {why or 'BURNISH_KERNELS=triton was not asked for'}"
                                    for d, why in zip(devices, lacks, strict=True)}}
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    found_rates = [measured(kind, again) for kind in kinds]
    before, after = _step()
    data = {"python": platform.python_version(), "platform": platform.platform(),
            "packages": packages, "extras": extras, "too_old": too_old(),
            "threads": torch.get_num_threads(), "devices": devices, "kernels": kernels,
            "rates": found_rates, "step": {"loss_before": before, "loss_after": after}}
    emit(json, data, _diagnosis(data))
    if not after < before:
        raise CheckError(f"a training step did not lower the loss here ({before:.4g} before, "
                         f"{after:.4g} after)")


def _step() -> tuple[float, float]:
    """The loss of a tiny tuned layer before and after a few steps."""
    import torch

    import burnish

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    x, y = torch.randn(16, 8), torch.randn(16, 4)
    tuned = burnish.tune(model, "lora(rank=2)", head=False)
    tuned.optimizer(lr=1e-2)
    losses = [float(tuned.step((x, y), loss=lambda out, b: (out - b[1]).square().mean()))
              for _ in range(5)]
    return losses[0], losses[-1]


def _extra(extra: str, packages: dict[str, str | None], old: dict[str, str]) -> str:
    """What is missing or too old of it, and what mends that; else what is there."""
    missing = [p for p, v in packages.items() if v is None]
    told = [f"missing {', '.join(missing)}"] if missing else []
    told += [f"{p} {packages[p]}, wants {wanted}" for p, wanted in old.items()]
    if not told:
        return ", ".join(f"{p} {v}" for p, v in packages.items())
    return f"{'; '.join(told)}: pip install {'--upgrade ' * bool(old)}'burnish[{extra}]'"


def _diagnosis(d: dict[str, Any]) -> str:
    from ..memory.table import wrapped
    from ..memory.units import format_bytes

    lines = [f"Python {d['python']} on {d['platform']}, {d['threads']} threads"]
    old = d["too_old"].get("", {})
    lines += [f"  {p:<14} {v or 'MISSING'}"
              + (f", wants {old[p]}: pip install --upgrade '{p}{old[p]}'" if p in old else "")
              for p, v in d["packages"].items()]
    for extra, packages in d["extras"].items():
        state = _extra(extra, packages, d["too_old"].get(extra, {}))
        lines += [f"  {line}" for line in wrapped(f"[{extra}] {state}")]
    lines += [f"  {g['device']}: {g['name']}, {format_bytes(g['free'])} free of "
              f"{format_bytes(g['total'])}" for g in d["devices"]] or ["  no GPU: runs on the CPU"]
    lines += [f"  kernels on {g['device']} by {d['kernels'][g['device']]}" for g in d["devices"]]
    for r in d["rates"]:
        lines.append(f"  {r['kind']}: {r['single'] / 1e12:.3g} TFLOP/s in fp32, "
                     f"{r['half'] / 1e12:.3g} in 16 bits, {r['bandwidth'] / 1e9:.3g} GB/s, "
                     f"{r['launch'] * 1e6:.3g} us an operator")
        lines.append(f"    {r['name']}, measured on {r['date']}; --again does it once more")
    step = d["step"]
    lines.append(f"  training works: loss {step['loss_before']:.4g} -> {step['loss_after']:.4g}")
    return "\n".join(lines)
