"""The command `hf-daq`. Torch and the model libraries are loaded by the commands that need them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import CheckpointError, ExportError, ModelError
from ..files.atomic import PROBE_NAME
from ..files.inspect import every_layer
from ..text import plain, printable
from .console import show, show_json, show_warnings, working
from .options import (
    ActivationBits,
    Bits,
    Commands,
    ConfigFile,
    Debug,
    EmbeddingBits,
    FirstLastBits,
    Folder,
    GroupSize,
    Inputs,
    Json,
    OutFolder,
    Revision,
    Runtime,
    Target,
    Version,
    WeightBits,
    WeightGranularity,
    chosen_config,
    refuse_same,
)
from .quantize import evaluate_command, quantize_command

EXAMPLES = """Examples:

\b
  hf-daq plan resnet18 --bits 3            what apply_daq would do
  hf-daq quantize resnet18 --data photos --bits 4 --output small
  hf-daq evaluate small --data photos --float resnet18
  hf-daq plan ./bert --weight-bits 2 --activation-bits 8
  hf-daq inspect user/name                 what is in a checkpoint
  hf-daq summary trained --health          what quantization does to it
  hf-daq pack trained packed               codes of a few bits for inference
  hf-daq export trained model.onnx --to onnx --inputs images.safetensors
  hf-daq push packed user/name --private   to the Hub, with a model card

Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""


app = typer.Typer(
    cls=Commands,
    help="Distance-aware Quantization (DAQ) of timm and transformers models.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback()
def _options(version: Version = False, debug: Debug = False) -> None:
    show_warnings()


# ------------------------------------------------------------------------------------------------------- plan


@app.command("plan")
def plan_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A timm model, a folder of a float model, or its repository.")],
    bits: Bits = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    first_last_bits: FirstLastBits = None,
    embedding_bits: EmbeddingBits = None,
    granularity: WeightGranularity = None,
    group_size: GroupSize = None,
    config: ConfigFile = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what apply_daq would do to a float model, layer by layer.

    The model is built without weights: of a repository only config.json is downloaded, and none of its code is run.

    \b
    hf-daq plan resnet18 --bits 3
    hf-daq plan Qwen/Qwen3-0.6B --weight-bits 3 --group-size 64
    """
    chosen = chosen_config(ctx)
    with working(f"building {model} without weights"):
        from ..integrations.build import skeleton
        from ..model.plan import plan

        built: Any = skeleton(model, revision)
        found = plan(built, chosen)
    if as_json:
        show_json({"model": model, "config": chosen.to_dict(), "layers": found.layers, "totals": found.totals})
    else:
        show(Group(Text(f"{model}, {type(built).__name__}", style="bold"), found))  # type: ignore[arg-type]


app.command("quantize")(quantize_command)
app.command("evaluate")(evaluate_command)


# ------------------------------------------------------------------------------------------------------- inspect


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a weights file, or a repository of the Hub.")],
    revision: Revision = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer instead of groups.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a checkpoint, from its header alone.

    Nothing is built and no tensor is read: of a repository only config.json and the headers are asked for.

    \b
    hf-daq inspect out
    hf-daq inspect user/name --layers
    """
    from ..files.inspect import inspect

    with working(f"reading {checkpoint}"):
        found = inspect(checkpoint, revision=revision)
    if as_json:
        show_json(found.to_dict())
        return
    shown: Any = found.__rich__()
    if layers:
        each = every_layer(found)
        shown = Group(*(each if isinstance(part, Table) else part for part in shown.renderables))
    show(shown)


# ------------------------------------------------------------------------------------------------------- card and push


@app.command("card")
def card_command(
    folder: Folder,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the card even if it was edited.")] = False,
    print_it: Annotated[bool, typer.Option("--print", help="Print the card, write nothing.")] = False,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository of the card, user/name; the card loads from there.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model card README.md of a checkpoint.

    \b
    hf-daq card out --repo-id user/name
    """
    from ..files.card import has_edited_card, render, write_card
    from ..files.header import CARD_NAME
    from ..files.inspect import inspect

    found = inspect(folder)
    if print_it:
        text = render(found, repo_id)
        show_json({"card": text, "facts": found.facts.to_dict()}) if as_json else typer.echo(printable(text), nl=False)
        return
    path = folder / CARD_NAME
    if not overwrite and has_edited_card(folder):
        raise CheckpointError(f"{path} was edited, so it is not replaced; --overwrite replaces it")
    write_card(folder, repo_id, overwrite)
    show_json({"path": path, "facts": found.facts.to_dict()}) if as_json else show(Text(f"wrote {path}"))


@app.command("push")
def push_command(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; created if needed.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who can see a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; created if needed.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the commit as a pull request.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Access token; default: HF_TOKEN, or that of `hf auth login`.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace the repository's card even if it was edited.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a checkpoint with its model card to the Hub.

    One commit: an interrupted upload changes nothing in the repository. Prints the address of the commit.

    \b
    hf-daq push out user/name --private
    """
    from ..files.push import push_folder

    commit = push_folder(
        folder,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        overwrite_card=overwrite_card,
    )
    if as_json:
        show_json({"commit_url": commit.commit_url, "oid": commit.oid, "pull_request": commit.pr_url})
    else:
        show(Text(commit.pr_url or commit.commit_url))


# ------------------------------------------------------------------------------------------------------- pack and export


@app.command("pack")
def pack_command(
    folder: Folder,
    out: OutFolder,
    probe: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint with codes of a few bits a weight.

    It is for inference, and as complete as the folder: tokenizers and other small files are copied.

    With --probe, or if the folder has a probe, the outputs for it are compared, computed as before packing: they stay
    the same, bit for bit.

    \b
    hf-daq pack trained packed --probe images.safetensors
    """
    _convert(folder, out, True, probe, as_json)


@app.command("unpack")
def unpack_command(
    folder: Folder,
    out: OutFolder,
    probe: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a packed checkpoint with float weights again.

    It can be trained on; the weights are the values they were rounded to.

    \b
    hf-daq unpack packed trainable
    """
    _convert(folder, out, False, probe, as_json)


def _convert(folder: Path, out: Path, packed: bool, probe: Path | None, as_json: bool) -> None:
    from ..files.inspect import inspect

    refuse_same(folder, out)
    before = inspect(folder)
    kind = "packed" if before.packed else "trainable"
    if before.packed == packed:
        raise CheckpointError(f"{folder} is {kind} already")
    with working(f"reading {folder}, writing {out}"):
        import hf_daq

        from .inputs import copy_companions, open_model, read_inputs

        unpacked = "" if packed else "hf_daq.unpack(model); "
        model = open_model(folder, f"{unpacked}hf_daq.save_pretrained(model, {str(out)!r}, packed={packed})")
        inputs, source = read_inputs(model, folder, probe)
        if not packed:
            hf_daq.unpack(model)
        hf_daq.save_pretrained(model, out, packed=packed, probe=inputs, card=before.facts)
        copied = copy_companions(folder, out)
    after = inspect(out)
    sizes = {"bytes_before": before.tensor_bytes, "bytes": after.tensor_bytes}
    if as_json:
        show_json({"path": out, "packed": packed, **sizes, "compared_on": source, "copied": copied})
        return
    compared = (
        "not compared with each other; --probe FILE compares their outputs for the inputs in FILE"
        if source is None
        else f"outputs for {source}, computed as before, are the same, bit for bit"
    )
    lines = [f"{out}: {after.tensor_bytes / 1e6:.2f} MB, of {before.tensor_bytes / 1e6:.2f} MB; {compared}"]
    lines += [f"copied: {', '.join(copied)}"] if copied else []
    show(Text("\n".join(lines)))


@app.command("export")
def export_command(
    folder: Folder,
    out: Annotated[
        Path, typer.Argument(help="The file to write for onnx and gguf, the folder for compressed-tensors.")
    ],
    to: Annotated[Target, typer.Option(help="The format.")],
    runtime: Annotated[
        Runtime | None, typer.Option(help="Runtime that the ONNX file is written for; default: onnxruntime.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="ONNX decoders with keys and values as inputs and outputs, to generate.")
    ] = False,
    int8_inputs: Annotated[
        bool,
        typer.Option(
            "--int8-inputs",
            help="Faster and not exact: ONNX Runtime rounds inputs of linear layers with weights alone to 8 bits.",
        ),
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size", help="Height and width of images are free; with --runtime openvino."),
    ] = False,
    inputs: Inputs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an ONNX file, a compressed-tensors folder or a GGUF file.

    What was written is compared with the model, for onnx and compressed-tensors on real inputs. A GGUF file gets the
    tokenizer of the folder, if there is a tokenizer.json.

    Needs `pip install "hf-daq[export]"`.

    \b
    hf-daq export trained model.onnx --to onnx --inputs images.safetensors
    hf-daq export trained model.onnx --to onnx --runtime openvino --dynamic-size
    hf-daq export decoder model.onnx --to onnx --cache --inputs texts.safetensors
    hf-daq export trained out --to compressed-tensors --inputs batch.safetensors
    hf-daq export trained model.gguf --to gguf
    """
    refuse_same(folder, out)
    options = {"runtime": runtime, "cache": cache, "int8_inputs": int8_inputs, "dynamic_size": dynamic_size}
    options = {name: value for name, value in options.items() if value}
    for name in options if to != "onnx" else ():
        raise typer.BadParameter(f"--{name.replace('_', '-')} is for --to onnx")
    if inputs and to == "gguf":
        raise typer.BadParameter(
            "--inputs is for --to onnx and compressed-tensors: a GGUF file is compared tensor by tensor"
        )
    if to != "compressed-tensors" and out.is_dir():
        out = out / f"model.{to}"
    if not out.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}")
    with working(f"exporting {folder} to {out}"):
        report, source = _exported(folder, out, to, options, inputs)
    if as_json:
        show_json(plain(report) | ({} if to == "gguf" else {"compared_on": source}))
    else:
        show(Text(f"{report}{_taken(inputs, source)}"))


def _exported(
    folder: Path, out: Path, to: Target, options: dict[str, Any], inputs: Path | None
) -> tuple[Any, Path | None]:
    """The report, and the file of the inputs that were compared."""
    import hf_daq

    from ..files.card import write_card
    from .inputs import copy_companions, open_model, read_inputs

    function = f"hf_daq.export_{to.replace('-', '_')}"
    model = open_model(folder, f"{function}(model, {str(out)!r}{'' if to == 'gguf' else ', inputs'})")
    if to == "gguf":
        tokenizer = folder if (folder / "tokenizer.json").exists() else None
        return hf_daq.export_gguf(model, out, tokenizer), None
    batch, source = read_inputs(model, folder, inputs)
    if batch is None:
        raise ExportError(
            f"real inputs are needed to compare the export with the model, and {folder} has no {PROBE_NAME}; pass "
            '--inputs FILE.safetensors with two rows or more: one tensor "x" for images, or what the model takes, e.g. '
            '"input_ids" and "attention_mask"; safetensors.torch.save_file({"x": images}, "inputs.safetensors") writes one'
        )
    if to == "compressed-tensors":
        report: Any = hf_daq.export_compressed_tensors(model, out, batch)
        copy_companions(folder, out)
        return report, source
    report = hf_daq.export_onnx(model, out, batch, **options)
    if out.parent.resolve() == folder.resolve():
        write_card(folder)  # says how the file is fed
    return report, source


def _taken(given: Path | None, source: Path | None) -> str:
    """A line about inputs that nobody named."""
    return "" if given or source is None else f"\nwith the inputs in {source}; --inputs FILE takes others"


@app.command("summary")
def summary_command(
    folder: Folder,
    inputs: Inputs = None,
    health: Annotated[
        bool,
        typer.Option(
            "--health", help="Compare the outputs with float, and look for broken layers; exit code 1 for an alarm."
        ),
    ] = False,
    wide: Annotated[
        bool, typer.Option("--wide", help="All figures, in some 150 columns: also shapes, bounds, codes in use.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what quantization does to each layer.

    Bits, clipping, noise, bytes, multiply-accumulates; more with --wide. Without inputs some figures are left out.

    \b
    hf-daq summary out --inputs images.safetensors --health
    """
    if health and not (inputs or folder / PROBE_NAME).exists():
        raise ModelError(
            f"--health needs real inputs, and {folder} has no {PROBE_NAME}; pass --inputs FILE.safetensors"
        )
    with working(f"measuring {folder}"):
        import hf_daq

        from .inputs import open_model, read_inputs

        model = open_model(folder, "print(hf_daq.summary(model, inputs))")
        batch, source = read_inputs(model, folder, inputs)
        figures = hf_daq.summary(model, batch)
        found = hf_daq.health(model, batch) if health else None
    if as_json:
        show_json(figures.to_dict() | ({} if found is None else {"health": found.to_dict()}))
    else:
        show(figures.to_table(wide))
        if taken := _taken(inputs, source):
            show(Text(taken.strip()))
        if found is not None:
            show(Group(Text(), found))  # type: ignore[arg-type]
    if found is not None and not found.ok:
        raise typer.Exit(1)


def main() -> None:
    """The entry point."""
    os.environ.setdefault("HF_DAQ_COMPILE", "0")  # compiling takes longer than the few passes of a command
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    try:
        app(prog_name="hf-daq")
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has enough; Python would flush once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
