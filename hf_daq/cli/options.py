"""Options that commands share, and what becomes of their errors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import DaqError
from ..version import __version__
from .console import note, show_error


class Commands(TyperGroup):
    """Commands whose errors end in a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (DaqError, OSError, UnicodeError) as error:
            show_error(error, bool(ctx.meta.get("debug")))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None


def _remember(ctx: typer.Context, value: bool) -> bool:
    ctx.meta["debug"] = ctx.meta.get("debug") or value
    return value


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"hf-daq {__version__}")
        raise typer.Exit


class Granularity(StrEnum):
    tensor = "tensor"
    channel = "channel"
    group = "group"


class Target(StrEnum):
    onnx = "onnx"
    compressed_tensors = "compressed-tensors"


class Runtime(StrEnum):
    onnxruntime = "onnxruntime"
    openvino = "openvino"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[
    bool, typer.Option("--debug", envvar="HF_DAQ_DEBUG", callback=_remember, help="Show the traceback of an error.")
]
Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
]
Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A folder of save_pretrained.")]
OutFolder = Annotated[Path, typer.Argument(file_okay=False, help="The folder to write.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
Inputs = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="A safetensors file with real inputs: a tensor for each, under its name, or one tensor `x` for images. "
        "Default: probe.safetensors of the folder.",
    ),
]
