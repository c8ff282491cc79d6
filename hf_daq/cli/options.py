"""Options that commands share, and what becomes of their errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from ..config import DaqConfig, Granularity
from ..errors import ConfigError, DaqError
from ..version import __version__
from .console import note, show_error


class Commands(TyperGroup):
    """Commands whose errors end in a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (DaqError, OSError, UnicodeError, SafetensorError) as error:  # the last where a disk is full
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


Target = Literal["onnx", "compressed-tensors", "gguf"]
Runtime = Literal["onnxruntime", "openvino"]

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
Bits = Annotated[int | None, typer.Option(min=1, max=8, help="Number of bits for weights and layer inputs.")]
WeightBits = Annotated[int | None, typer.Option(min=1, max=8, help="Number of bits for weights.")]
ActivationBits = Annotated[
    int | None, typer.Option(min=1, max=8, help="Number of bits for layer inputs; default: float.")
]
FirstLastBits = Annotated[
    int | None,
    typer.Option(min=1, max=8, help="Number of bits for the first layer and the classifier; default: float."),
]
EmbeddingBits = Annotated[int | None, typer.Option(min=1, max=8, help="Number of bits for embeddings; default: float.")]
WeightGranularity = Annotated[Granularity | None, typer.Option("--granularity", help="Weights that share a scale.")]
GroupSize = Annotated[int | None, typer.Option(min=2, help="Columns that share a scale.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="A YAML or JSON file with arguments of DaqConfig, at the top or under `daq`; options are stronger.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="A folder of images, with subfolders or labels.tsv for classes; a text file; a Parquet, CSV, TSV or JSON Lines file, "
        "or a folder of them; or a data set of the Hub."
    ),
]
Output = Literal["packed", "trainable", "onnx", "compressed-tensors", "gguf"]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a block, by default 512, or at most of a sentence, by default 128.")
]
Column = Annotated[str | None, typer.Option(help="Column of the images or texts.")]
Subset = Annotated[str | None, typer.Option(help="Part of a data set of the Hub, such as sst2 of nyu-mll/glue.")]
Split = Annotated[str | None, typer.Option(help="Split of a data set; default: train, or the first one.")]
Processor = Annotated[
    str | None,
    typer.Option(help="Folder or repository of the tokenizer or image processor; default: that of the model."),
]
Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE", dir_okay=False, help="Write a page to look at, in a browser: report.html."),
]
Seed = Annotated[int, typer.Option(help="Random seed of the order of examples.")]


def refuse_same(folder: str | Path, out: Path) -> None:
    if Path(folder).is_dir() and Path(folder).resolve() == out.resolve():
        raise typer.BadParameter(f"{out} is the folder that is read; name another one")


def refuse_unwritable(path: Path) -> None:
    """Before the work, not after it."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    try:
        TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}") from None


def minutes(text: str | None) -> float | None:
    """ "5m", "90s", "1h" or a number of minutes; None for None."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None:
        raise typer.BadParameter(f"--reconstruct {text!r} is no time such as 5m, 90s or 1h")
    return float(found[1]) * {"s": 1 / 60, "m": 1, "": 1, "h": 60}[found[2]]


_CONFIG = {
    **{name: name for name in ("bits", "weight_bits", "activation_bits", "first_last_bits", "embedding_bits")},
    **{"granularity": "weight_granularity", "group_size": "group_size"},
}
"""Option of a command -> argument of `DaqConfig`."""


def chosen_config(ctx: typer.Context) -> DaqConfig:
    """The config that a command was given, in a file (`config`) and as options."""
    path = ctx.params["config"]
    given = {key: ctx.params[name] for name, key in _CONFIG.items() if ctx.params[name] is not None}
    if "bits" in given and given.keys() & {"weight_bits", "activation_bits"}:
        raise typer.BadParameter("--bits sets both --weight-bits and --activation-bits; give it alone")
    if path is None and not given.keys() & {"bits", "weight_bits"}:
        raise typer.BadParameter(
            "how many bits? Give --bits 3, or --weight-bits 2 --activation-bits 4, or --config FILE"
        )
    return merged_config(path, given)


def merged_config(path: Path | None, given: dict[str, Any]) -> DaqConfig:
    """The config of a file and of options, which are stronger."""
    values = dict(_config_values(path)) if path else {}
    if given.keys() & {"bits", "weight_bits", "activation_bits"}:
        values.pop("layers", None)
        both = values.pop("bits", None)
        if "bits" in given:
            values.pop("weight_bits", None)
            values.pop("activation_bits", None)
        elif both is not None:
            values |= {"weight_bits": both, "activation_bits": both}
    if "weight_granularity" in given:
        values.pop("group_size", None)
    if "group_size" in given:
        values.pop("weight_granularity", None)
    return DaqConfig.from_dict(values | given)


def _config_values(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path} is neither YAML nor JSON: {error}") from None
    for key in ("daq", "quantization_config"):  # of a recipe, of a checkpoint
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with arguments of DaqConfig, such as `bits: 3`")
    return values
