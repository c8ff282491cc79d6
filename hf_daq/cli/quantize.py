"""`hf-daq quantize` and `hf-daq evaluate`: a float model, a data set, a file, and figures."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..errors import DaqError, DataError
from .console import note, show, show_json, working
from .options import (
    ActivationBits,
    Bits,
    Column,
    ConfigFile,
    Data,
    Debug,
    EmbeddingBits,
    FirstLastBits,
    GroupSize,
    Json,
    Length,
    Output,
    Processor,
    Report,
    Revision,
    Runtime,
    Seed,
    Split,
    Subset,
    WeightBits,
    WeightGranularity,
    chosen_config,
    minutes,
    refuse_same,
    refuse_unwritable,
)

logger = logging.getLogger("hf_daq")


def quantize_command(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A timm model, a folder of a float model, or its repository.")],
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="The folder to write.")],
    bits: Bits = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    first_last_bits: FirstLastBits = None,
    embedding_bits: EmbeddingBits = None,
    granularity: WeightGranularity = None,
    group_size: GroupSize = None,
    config: ConfigFile = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Images, sentences or blocks of tokens to calibrate with; as many to compare.")
    ] = 256,
    reconstruct: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="At most so long, 5m or 90s; 0: only calibrate. Default: as long as it takes."
        ),
    ] = None,
    to: Annotated[
        Output, typer.Option(help="What to write: the folder, and a file in it for onnx and gguf.")
    ] = "packed",
    runtime: Annotated[
        Runtime | None, typer.Option(help="Runtime that the ONNX file is written for; default: onnxruntime.")
    ] = None,
    length: Length = None,
    column: Column = None,
    subset: Subset = None,
    split: Split = None,
    processor: Processor = None,
    report: Report = None,
    seed: Seed = 0,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a pretrained model, without training.

    Some hundred examples calibrate it and fit it layer by layer to the float model. They need no labels; with labels the
    accuracy is measured. As many others are held back, on which it is compared with the float model.

    \b
    hf-daq quantize resnet18 --data photographs --bits 4 -o small
    hf-daq quantize ./bert --data sentences.csv --bits 8 --to onnx -o small
    hf-daq quantize ./llama --data text.txt --weight-bits 4 --to gguf -o small
    """
    limit = minutes(reconstruct)
    chosen = chosen_config(ctx)
    if to == "compressed-tensors":
        chosen = chosen.replace(smooth=False)  # for which the format has no place
    if runtime and to != "onnx":
        raise typer.BadParameter("--runtime is for --to onnx")
    refuse_same(model, output)
    for path in filter(None, (output, report)):
        refuse_unwritable(path)
    with working(f"reading {model}"):
        import torch

        import hf_daq

        from ..integrations.build import pretrained, skeleton

        network = pretrained(model, revision)
        if to == "onnx" and any(
            value.dtype != torch.float32 for value in network.parameters() if value.is_floating_point()
        ):
            note("in float32, which the ONNX file computes in")
            network.float()
        _refuse_export(lambda: hf_daq.apply_daq(skeleton(model, revision), chosen), to, network, processor)
    note(f"quantizing {model} with {data}")
    result = hf_daq.quantize(
        network,
        data,
        chosen,
        examples=examples,
        max_minutes=limit,
        processor=processor,
        length=length,
        column=column,
        subset=subset,
        split=split,
        seed=seed,
        report=report,
        saved=_without_folders(str(output)),
    )
    written = _write(network, result, output, to, runtime, _facts(result, model, data, seed))
    if as_json:
        show_json({"model": model, "path": output, **result.to_dict(), "export": written})
        return
    show(result)
    for line in ([written] if written else []) + [f"wrote {path}" for path in (report, output) if path]:
        show(Text(str(line)))


def evaluate_command(
    model: Annotated[str, typer.Argument(help="A checkpoint or a float model: a folder, a repository, a timm model.")],
    data: Data,
    reference: Annotated[
        str | None,
        typer.Option("--float", metavar="MODEL", help="The float model. Default: the checkpoint's own float weights."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Images, sentences or blocks of tokens.")] = 1000,
    length: Length = None,
    column: Column = None,
    subset: Subset = None,
    split: Split = None,
    processor: Processor = None,
    report: Report = None,
    seed: Seed = 0,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model, and how near it is to the float one.

    Its accuracy where the data has classes, its perplexity on text.

    \b
    hf-daq evaluate small --data photographs --float resnet18 --report report.html
    """
    if report:
        refuse_unwritable(report)
    with working(f"reading {model}"):
        import hf_daq

        from ..integrations.build import pretrained
        from ..integrations.examples import read_examples
        from ..nn.packed import daq_layers
        from .inputs import open_any

        network = open_any(model, revision)
        if report and not daq_layers(network):
            raise typer.BadParameter(f"--report is about a model that hf_daq quantized, and {model} is none")
        of_float: Any = pretrained(reference) if reference else _own(network)
        (found,) = read_examples(
            network,
            data,
            (examples,),
            processor=processor,
            length=length,
            column=column,
            subset=subset,
            split=split,
            seed=seed,
        )
    try:
        comparison = hf_daq.compare(network, of_float, found.batches, labels=found.labels)
    except DaqError:
        raise
    except Exception as error:  # whatever a model says of inputs that are not its own
        if reference is None:
            raise
        raise DataError(f"{reference} does not take the inputs of {model}: {type(error).__name__}: {error}") from error
    if comparison.accuracy is comparison.perplexity is comparison.kl is comparison.cosine is None:
        raise DataError(f"{data} has no classes that {model} knows; --float MODEL compares it with the float model")
    if report:
        hf_daq.report(
            network,
            of_float,
            found.batches,
            report,
            processor=found.processor,
            shown=found.shown,
            comparison=comparison,
            saved=_without_folders(model),
        )
    if seen := _calibrated_with(model, data):
        note(f"{seen} calibrated this model, and may be among these examples: what quantize printed is of others")
    if as_json:
        show_json({"model": model, **comparison.to_dict()})
        return
    show(comparison)
    if report:
        show(Text(f"wrote {report}"))


def _calibrated_with(model: str, data: str) -> str | None:
    """What the card says of calibration, where it was with this data."""
    import hf_daq

    if not Path(model).is_dir():
        return None
    try:
        seen = hf_daq.inspect(model).facts.calibration
    except DaqError:  # a float model, say
        return None
    return seen if seen and seen.endswith(f" of {_rows(data)}") else None


def _rows(data: str) -> str:
    return Path(data).name if Path(data).exists() else data


def _own(model: Any) -> Any:
    """What `compare` takes for the float model: the model's own float weights, or where it has none the model alone."""
    from ..nn.layers import quantized_layers

    return None if quantized_layers(model) else model


def _without_folders(word: str) -> str:
    """The last part of a path of this machine."""
    return Path(word).name if Path(word).is_absolute() else word


def _facts(result: Any, model: str, data: str, seed: int) -> Any:
    """For the model card. Paths of this machine are given by their last part."""
    import hf_daq

    folder, rows = Path(model), _rows(data)
    return hf_daq.CardFacts(
        base_model=model if "/" in model and not folder.exists() else None,
        calibration=f"{result.examples} of {rows}",
        results=hf_daq.Result.from_comparison(result.comparison, rows, f"{result.held_back} held back"),
        command=shlex.join(["hf-daq", *map(_without_folders, sys.argv[1:])]),
        seed=seed,
    )


def _refuse_export(build: Callable[[], Any], to: Output, network: Any, processor: str | None) -> None:
    """Before the work, not after it."""
    if to == "gguf":
        from ..export.gguf import check_gguf, check_tokenizer
        from ..integrations.examples import processor_of

        built = build()
        found = check_gguf(built)
        check_tokenizer(built, processor_of(network, processor, "AutoTokenizer"), *found)
    if to == "compressed-tensors":
        from ..export.compressed_tensors import check_compressed_tensors

        check_compressed_tensors(build())
    if to == "onnx":
        from ..export.onnx import check_onnx

        check_onnx(build())


def _write(model: Any, result: Any, output: Path, to: Output, runtime: Runtime | None, facts: Any) -> Any:
    """The checkpoint, and the report of an export."""
    import hf_daq

    from ..files.atomic import temporary_folder
    from ..files.card import has_edited_card, write_card
    from ..files.header import CARD_NAME

    if to == "compressed-tensors":
        report: Any = hf_daq.export_compressed_tensors(model, output, result.inputs)
        if result.processor is not None:
            result.processor.save_pretrained(output)
        _remove_earlier(output)
        if has_edited_card(output):
            logger.warning(
                "%s stays as it is: edit it, if it says something of what was here before", output / CARD_NAME
            )
        else:
            (output / CARD_NAME).unlink(missing_ok=True)  # of a checkpoint, which this is not
        return report
    with temporary_folder(output) as folder:  # if the export fails, what was there stays
        report = None
        if to == "onnx":
            report = hf_daq.export_onnx(model, folder / "model.onnx", result.inputs, runtime=runtime or "onnxruntime")
        if to == "gguf":
            report = hf_daq.export_gguf(model, folder / "model.gguf", result.processor)
        hf_daq.save_pretrained(model, output, packed=to != "trainable", card=facts)
        if result.processor is not None:
            result.processor.save_pretrained(output)
    _remove_earlier(output, () if report is None else (report.path.name, f"{report.path.name}.data"))
    if report is not None:
        report = replace(report, path=output / report.path.name)
    if to == "onnx":
        write_card(output)  # says how the file is fed
    return report


def _remove_earlier(output: Path, written: Collection[str] = ()) -> None:
    """Exports of the model that was in the folder before."""
    for name in {"model.onnx", "model.onnx.data", "model.gguf"} - {*written}:
        (output / name).unlink(missing_ok=True)
