"""What leaves training: sizes of files, how exactly they agree with the network, and how fast they run.

    python recipes/measure/deploy.py resnet18.a1_in1k=cifar10 vit_tiny_patch16_224.augreg_in21k_ft_in1k=cifar10
    python recipes/measure/deploy.py runs/resnet18/float=DIR runs/sst2/float=sst2/train.tsv runs/shakespeare/float=input.txt
    python recipes/measure/deploy.py --speed resnet18 mobilenetv2_100 vit_tiny_patch16_224 runs/sst2/float --threads 1

MODEL=DATA: a name of timm, or a folder with the float network of a training recipe; and images (a Hub id, or a folder
of parquet files) or a text file with one example a line. At each of `--bits` the network is quantized (images: weights and inputs;
texts: weights, and inputs to 8 bits; causal language models: weights only, in groups of 64), calibrated, trained for
`--steps` updates to give the outputs of the float network, without labels, and then

    trainable, packed    saved both ways; the packed file gives the same outputs bit for bit, or this stops
    integers             computed with integers in PyTorch: relative error of the outputs (in float64: largest)
    ONNX                 exported and run in ONNX Runtime and OpenVINO: equal top-1, relative error of the outputs
    compressed-tensors   of transformers models: opened by plain transformers
    GGUF                 of causal language models from 3 bits on (groups of 64 columns do not fit its types of fewer): error
                         of a weight

on `--rows` examples it was not trained on. The table has sizes in MB (10^6 bytes).

`--decoder` measures four layers of a decoder of 0.49 billion parameters, random, with weights alone in groups of 128, in ONNX
Runtime: exact and with `int8_inputs=True` against float, one row and 128.

`--speed` measures inference of float and quantized files in the same runtime, and of the packed network in PyTorch (images in
channels_last; `--compiled`: with torch.compile too), random weights for names of timm, as ratios of medians taken in turn.
`--profile` shows where both spend their time there: milliseconds of each operator itself, of every call the fastest of ten, which
counts what other programs disturb least (a compiled graph: the time of its own loops; the rest of eager packed networks: their
layers in whole numbers, and Python).
`--runtimes pytorch` leaves out the files, `--weight_grid odd integer` measures both grids. "error of a layer" is the largest relative error of the outputs of a packed layer to those
of the quantized one, both on the inputs that the packed network gives it. Outputs of a random network as a whole tell less: one input
that float32 rounds to the other side of a threshold changes everything behind it.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
import transformers
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

import hf_daq

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.distillation import train_towards

# ---------------------------------------------------------------------------------------------------------- knobs


RUNTIMES = ("onnxruntime", "openvino", "pytorch")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL=DATA")
    add("--bits", nargs="+", type=int, default=[1, 2, 3, 4, 8])
    add("--activation_bits", type=int, help="of images and texts")
    add("--activation_scale", default="static", choices=("static", "token"), help="of texts")
    add("--weight_grid", nargs="+", default=["auto"], help="as of hf_daq.DaqConfig; one after the other")
    add("--steps", type=int, default=60, help="updates of distillation after calibration")
    add("--rows", type=int, default=256, help="examples to compare with")
    add("--batch_size", type=int, default=32)
    add("--lr", type=float, default=2e-4, help="of the weights (AdamW)")
    add("--quantizer_lr", type=float, default=1e-3)
    add("--tokens", type=int, default=64, help="length of texts")
    add("--int8_outputs", action="store_true", help="as of hf_daq.export_onnx")
    add("--speed", nargs="*", default=[], metavar="MODEL")
    add("--speed_bits", nargs="+", type=int, default=[4])
    add("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="of --speed")
    add("--first_last_bits", type=int, help="as of hf_daq.DaqConfig")
    add("--profile", action="store_true", help="of --speed in PyTorch: time by operator")
    add("--compiled", action="store_true", help="--speed in PyTorch with torch.compile too")
    add("--decoder", nargs="*", default=[], type=int, metavar="BITS")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="JSON file for the tables")
    args = parser.parse_args(argv)
    for model in args.models:
        if "=" not in model:
            parser.error(f"{model!r}: write MODEL=DATA, e.g. resnet18.a1_in1k=cifar10")
    return args


# ---------------------------------------------------------------------------------------------------------- model


def load_float(name: str) -> tuple[nn.Module, str]:
    """A float network and what it reads: "image", "text" or "next token"."""
    folder = Path(name)
    if not folder.is_dir():
        return timm.create_model(name, pretrained=True).eval(), "image"
    if "model_type" not in json.loads((folder / "config.json").read_text()):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), "image"
    kind = AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    model.config.use_cache = False
    return model, "next token" if kind.endswith("ForCausalLM") else "text"


def settings(kind: str, bits: int, grid: str, args: argparse.Namespace) -> hf_daq.DaqConfig:
    if kind == "next token":
        return hf_daq.DaqConfig(weight_bits=bits, weight_grid=grid, group_size=64)
    inputs = args.activation_bits or (bits if kind == "image" else 8)
    options = {"weight_granularity": "channel", "weight_grid": grid, "first_last_bits": args.first_last_bits}
    if kind == "text":
        options["activation_scale"] = args.activation_scale
    return hf_daq.DaqConfig(weight_bits=bits, activation_bits=inputs, **options)


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or what else the network gives first."""
    output = model(batch["x"]) if "x" in batch else model(**batch)
    return output if isinstance(output, Tensor) else output[0]


def outputs(model: nn.Module, batch: dict[str, Tensor], size: int = 32) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(model, part) for part in split(batch, size)])


def split(batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(next(iter(batch.values()))), size):
        yield {key: value[start : start + size] for key, value in batch.items()}


# ----------------------------------------------------------------------------------------------------------- data


def read(data: str, model: nn.Module, name: str, kind: str, args: argparse.Namespace) -> tuple[dict, dict]:
    """Examples to train on, and others to compare with, as batches of all of them."""
    count = args.steps * args.batch_size
    if kind == "image":
        make = create_transform(**resolve_data_config({}, model=model))
        found = datasets.load_dataset(data)
        column = next(key for key, feature in found["train"].features.items() if isinstance(feature, datasets.Image))

        def images(split: str, number: int) -> dict[str, Tensor]:
            part = found[split].shuffle(seed=args.seed)
            part = part.select(range(min(number, len(part))))
            return {"x": torch.stack([make(image.convert("RGB")) for image in part[column]])}

        return images("train", max(count, 256)), images("test", args.rows)
    lines = [line.rpartition("\t")[0] or line for line in Path(data).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(name)
    if kind == "text":
        generator = torch.Generator().manual_seed(args.seed)
        lines = [lines[index] for index in torch.randperm(len(lines), generator=generator).tolist()]
        encoded = tokenizer(lines, truncation=True, max_length=args.tokens, padding="max_length", return_tensors="pt")
        tokens = {key: encoded[key] for key in tokenizer.model_input_names}
    else:
        stream = tokenizer("\n".join(lines), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        tokens = {"input_ids": stream[: len(stream) // args.tokens * args.tokens].view(-1, args.tokens)}
    return (
        {key: value[args.rows :][: max(count, 256)] for key, value in tokens.items()},
        {key: value[: args.rows] for key, value in tokens.items()},
    )


def distill(model: nn.Module, teacher: nn.Module, train: dict[str, Tensor], args: argparse.Namespace) -> None:
    groups = hf_daq.param_groups(model, args.lr, args.quantizer_lr)
    batches = itertools.cycle(list(split(train, args.batch_size)))
    model.train()
    train_towards(teacher, model, groups, batches, run, lambda updates: updates / args.steps)
    model.eval()


# -------------------------------------------------------------------------------------------------- sizes and parity


def measure(name: str, data: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    teacher, kind = load_float(name)
    train, test = read(data, teacher, name, kind, args)
    expected = outputs(teacher, test)
    for bits, grid in itertools.product(args.bits, args.weight_grid):
        torch.manual_seed(args.seed)
        # compressed-tensors has no place for factors of input channels
        config = settings(kind, bits, grid, args).replace(smooth=kind == "image")
        model = hf_daq.apply_daq(copy.deepcopy(teacher), config)
        with hf_daq.calibrate(model):
            for batch in split({key: value[:256] for key, value in train.items()}, 32):
                run(model, batch)
        if args.steps:
            distill(model, teacher, train, args)
        row = {
            "model": name,
            "bits": bits,
            "grid": grid,
            "float": sum(t.nbytes for t in unshared(teacher.state_dict()).values()) / 1e6,
        }
        row |= {"top-1 as float": agreement(outputs(model, test), expected)}
        with tempfile.TemporaryDirectory() as folder:
            row |= files(model, test, Path(folder), kind, args)
        yield row


def files(
    model: nn.Module, test: dict[str, Tensor], folder: Path, kind: str, args: argparse.Namespace
) -> dict[str, Any]:
    probe = test.get("x", test)
    hf_daq.save_pretrained(model, folder / "trainable")
    hf_daq.save_pretrained(model, folder / "packed", packed=True, probe=probe)
    expected = outputs(model, test)
    with hf_daq.integer_arithmetic(model):
        integers = outputs(model, test)
    row: dict[str, Any] = {
        "trainable": size_of(folder / "trainable"),
        "packed": size_of(folder / "packed"),
        "ideal": hf_daq.summary(model).totals["bytes_after"] / 1e6,
        "integers": error(integers, expected),
    }
    double = copy.deepcopy(model).double()
    few = {key: (value[:8].double() if value.is_floating_point() else value[:8]) for key, value in test.items()}
    simulated = outputs(double, few)
    with hf_daq.integer_arithmetic(double):
        row["integers, float64"] = ((outputs(double, few) - simulated).abs().max() / simulated.abs().max()).item()
    row |= dict.fromkeys(("onnx int8", "onnx int4"))
    containers = ("int8", "int4") if row_bits(model) <= 3 else ("int8",)
    for weights in containers:
        # The table shows what verification would refuse: a network that hesitates between classes changes its mind easily.
        options = {"int8_outputs": args.int8_outputs, "min_agreement": 0.0, "max_error": float("inf")}
        report = hf_daq.export_onnx(model, folder / f"{weights}.onnx", probe, weights=weights, **options)
        row[f"onnx {weights}"] = report.bytes / 1e6
        if weights == "int8":
            other = hf_daq.export_onnx(model, folder / "other.onnx", probe, runtime="openvino", **options)
            for runtime, found in (("onnxruntime", report), ("openvino", other)):
                agreed = found.runtimes[runtime]
                row[f"{runtime}: top-1"], row[f"{runtime}: error"] = agreed.top1, agreed.error
    if kind != "image":
        found = hf_daq.export_compressed_tensors(model, folder / "compressed", test)
        row["compressed-tensors"] = found.size / 1e6
        row["compressed error"] = found.relative_error
    if kind == "next token":
        row |= dict.fromkeys(("GGUF", "GGUF error"))
    if kind == "next token" and row_bits(model) >= 3:
        written = hf_daq.export_gguf(model, folder / "model.gguf")
        row["GGUF"], row["GGUF error"] = written.size / 1e6, written.error
    return row


def size_of(folder: Path) -> float:
    return (folder / "model.safetensors").stat().st_size / 1e6


def row_bits(model: Any) -> int:
    return model.daq_config.weight_bits


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once."""
    return {name: state[name] for name in {tensor.data_ptr(): name for name, tensor in state.items()}.values()}


def error(one: Tensor, other: Tensor) -> float:
    return ((one - other).square().mean() / other.square().mean()).sqrt().item()


def agreement(one: Tensor, other: Tensor) -> float:
    return (one.argmax(-1) == other.argmax(-1)).float().mean().item()


# ---------------------------------------------------------------------------------------------------------- speed


def speed(name: str, bits: int, grid: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times of the float file and the quantized ones, batch 1 and 8, in each runtime."""
    torch.manual_seed(args.seed)
    if Path(name).is_dir():
        model, kind = load_float(name)
        sizes = model.config.get_text_config()
        tokens = torch.randint(sizes.vocab_size, (64, min(128, sizes.max_position_embeddings)))
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    else:
        model, kind = timm.create_model(name).eval(), "image"
        inputs = {"x": torch.randn(64, *model.pretrained_cfg["input_size"])}
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # timm starts some at 0, which would leave out whole branches
                nn.init.ones_(module.weight)
    network = copy.deepcopy(model)
    hf_daq.apply_daq(model, settings(kind, bits, grid, args))
    about = {"model": name, "bits": bits, "grid": grid}
    with hf_daq.calibrate(model):
        run(model, {key: value[:16] for key, value in inputs.items()})
    with tempfile.TemporaryDirectory() as folder:
        for row in file_speed(network, model, inputs, Path(folder), args):
            yield about | row
    if "pytorch" in args.runtimes:
        for row in packed_speed(network, model, inputs, args):
            yield about | row


def file_speed(
    network: nn.Module, model: nn.Module, inputs: dict[str, Tensor], folder: Path, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Times of the ONNX files of the float network and the quantized one."""
    makers = {"onnxruntime": onnxruntime, "openvino": openvino}
    makers = {runtime: make for runtime, make in makers.items() if runtime in args.runtimes}
    paths = {"float": folder / "float.onnx"}
    if makers:
        batch = {key: value[:2] for key, value in inputs.items()}
        shapes = {key: {0: torch.export.Dim("batch", min=1)} for key in batch}
        arguments = {"args": tuple(batch.values()), "dynamic_shapes": tuple(shapes.values())}
        if "x" not in batch:
            arguments = {"args": (), "kwargs": batch, "dynamic_shapes": shapes}
        torch.onnx.export(network, f=paths["float"], dynamo=True, verbose=False, external_data=False, **arguments)
    for runtime, make in makers.items():
        for label, rounded in (("exact", False), ("int8_outputs", True)):
            paths[label] = folder / f"{label}.onnx"
            options = {"runtime": runtime, "int8_outputs": rounded, "verify": False}
            hf_daq.export_onnx(model, paths[label], inputs.get("x", inputs), **options)
        sessions = {label: make(path, args.threads) for label, path in paths.items()}
        for count in (1, 8):
            feed = {key: value[:count].numpy() for key, value in inputs.items()}
            yield {"runtime": runtime, "batch": count, **ratios(sessions, feed)}


def packed_speed(
    network: nn.Module, model: nn.Module, inputs: dict[str, Tensor], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Times of the float network and the packed one in PyTorch, and the largest error of one of its layers."""
    models = {"float": network, "exact": hf_daq.pack(model)}
    few = {key: value[:8] for key, value in inputs.items()}
    layers = hf_daq.summary(model, few.get("x", few)).layers
    largest = max(layer.path_error for layer in layers)
    if "x" in inputs:
        models = {label: found.to(memory_format=torch.channels_last) for label, found in models.items()}
    for way in ("PyTorch", "PyTorch, compiled")[: 1 + args.compiled]:
        if "compiled" in way:
            models = {label: torch.compile(found) for label, found in models.items()}
        for count in (1, 8):
            feed = {key: value[:count] for key, value in inputs.items()}
            if "x" in feed:
                feed["x"] = feed["x"].contiguous(memory_format=torch.channels_last)
            sessions = {label: partial(inferred, found) for label, found in models.items()}
            yield {"runtime": way, "batch": count, **ratios(sessions, feed), "error of a layer": largest}
            if args.profile:
                found = {label: profiled(session, feed) for label, session in sessions.items()}
                for name in sorted(set().union(*found.values()), key=lambda name: -found["float"].get(name, 0)):
                    times = {f"{label}, ms": found[label].get(name, 0.0) for label in found}
                    if max(times.values()) > 0.01 * found["exact"]["all"]:
                        yield {"runtime": way, "batch": count, "operator": name, **times}


def profiled(session: Callable, feed: dict[str, Tensor], runs: int = 10) -> dict[str, float]:
    """Milliseconds of each operator itself, and of all."""
    times: list[list[float]] = []
    for _ in range(runs):
        with torch.profiler.profile() as found, torch.profiler.record_function("the rest"):
            session(feed)
        events = sorted(found.events(), key=lambda event: event.time_range.start)
        times.append([event.self_cpu_time_total / 1e3 for event in events])
    by_name: dict[str, float] = dict.fromkeys(["all"], 0.0)
    for event, *calls in zip(events, *times, strict=True):
        name = "graph" if "CompiledFxGraph" in event.name else event.name
        for key in (name, "all"):
            by_name[key] = by_name.get(key, 0.0) + min(calls)
    return by_name


def inferred(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return run(model, batch)


def onnxruntime(path: Path, threads: int) -> Callable[[dict[str, Any]], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(
        None, dict(zip([entry.name for entry in session.get_inputs()], feed.values(), strict=False))
    )


def openvino(path: Path, threads: int) -> Callable[[dict[str, Any]], Any]:
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(str(path), "CPU", options).create_infer_request()
    return lambda feed: request.infer(list(feed.values()))


def ratios(sessions: dict[str, Callable], feed: dict[str, Any], rounds: int = 9) -> dict[str, float]:
    """Milliseconds of the float file, and how many times faster the others are, each the median over rounds."""
    times: dict[str, list[float]] = {label: [] for label in sessions}
    for index in range(rounds + 1):
        for label in list(sessions)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            sessions[label](feed)
            times[label].append(time.perf_counter() - start)
    found = {"float, ms": 1e3 * statistics.median(times["float"][1:])}
    for label in list(sessions)[1:]:
        pairs = zip(times["float"][1:], times[label][1:], strict=True)
        found[label] = statistics.median(slow / fast for slow, fast in pairs)
    return found


def decoder(bits: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Sizes of files, their errors, and times of four layers without embeddings and head, which stay in float."""
    torch.manual_seed(args.seed)
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(vocab_size=16, num_hidden_layers=4, use_cache=False, **sizes)
    model = transformers.Qwen2Model(config).eval()
    inputs = {"input_ids": torch.randint(config.vocab_size, (4, 128))}
    with tempfile.TemporaryDirectory() as folder:
        paths = {label: Path(folder, f"{label}.onnx") for label in ("float", "exact", "int8_inputs")}
        batch = {key: value[:2] for key, value in inputs.items()}
        shapes = {"input_ids": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1)}}
        options = {"kwargs": batch, "dynamic_shapes": shapes, "dynamo": True, "verbose": False, "external_data": False}
        torch.onnx.export(model, (), paths["float"], **options)
        hf_daq.apply_daq(model, weight_bits=bits, group_size=128)
        hf_daq.save_pretrained(model, Path(folder, "packed"), packed=True)
        row: dict[str, Any] = {"bits": bits, "packed": size_of(Path(folder, "packed"))}
        row["float, MB"] = paths["float"].stat().st_size / 1e6
        for label in ("exact", "int8_inputs"):
            options = {"int8_inputs": label == "int8_inputs", "max_error": float("inf"), "min_agreement": 0}
            report = hf_daq.export_onnx(model, paths[label], batch, **options)
            row[f"{label}, MB"], row[f"{label}: error"] = report.bytes / 1e6, report.runtimes["onnxruntime"].error
        sessions = {label: onnxruntime(path, args.threads) for label, path in paths.items()}
        for length in (1, 128):
            yield row | {"rows": length} | ratios(sessions, {"x": inputs["input_ids"][:1, :length].numpy()})


# ------------------------------------------------------------------------------------------------------------ main


def add(row: dict[str, Any], table: list[dict[str, Any]]) -> None:
    """Print a row of a Markdown table, below the names of its columns where they are others than before."""
    if not table or list(table[-1]) != list(row):
        print("\n| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    print("| " + " | ".join(cell(column, value) for column, value in row.items()) + " |", flush=True)
    table.append(row)


def cell(column: str, value: Any) -> str:
    if "top-1" in column and value is not None:
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.2f}" if value == 0 or abs(value) > 0.05 else f"{value:.0e}"
    return "" if value is None else str(value)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    tables: dict[str, list[dict[str, Any]]] = {"sizes": [], "speed": [], "decoder": []}
    try:
        for entry in args.models:
            name, _, data = entry.partition("=")
            for row in measure(name, data, args):
                add(row, tables["sizes"])
        for name in args.speed:
            for bits, grid in itertools.product(args.speed_bits, args.weight_grid):
                for row in speed(name, bits, grid, args):
                    add(row, tables["speed"])
        for bits in args.decoder:
            for row in decoder(bits, args):
                add(row, tables["decoder"])
    finally:
        if args.output:
            args.output.write_text(json.dumps(tables | {"settings": vars(args)}, indent=2, default=str) + "\n")
    return tables


if __name__ == "__main__":
    main()
