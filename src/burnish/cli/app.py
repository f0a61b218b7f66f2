"""The commands, in the order help shows them. Each body imports what it needs when it runs."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="burnish",
    help="Fine-tune any PyTorch model within the memory you have, and know the cost beforehand.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


#: where commands are, in the order of help
MODULES = ("training", "advising", "memory", "reproduce", "files", "sharing", "mixing",
           "combining", "compressing", "selecting", "mixtures", "marking", "searching",
           "inspecting", "adapting", "auditing", "repairing", "editing", "steering", "sparsity",
           "dimension", "continual", "federating", "boarding", "page", "catalogue", "suite")


def command() -> Any:
    """The parser with every command on it; the modules register theirs when imported."""
    for module in MODULES:
        importlib.import_module(f"burnish.cli.{module}")
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"burnish {version('burnish')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="The version, and nothing else.")] = False,
) -> None:
    pass
