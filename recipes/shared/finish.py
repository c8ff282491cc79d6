"""The end of a training recipe: the model card of the network it saved, and the files that `--export` asks for."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import hf_daq

_TELL_NOTHING = {
    "data",
    "dataset",
    "datasets",
    "default",
    "images",
    "input",
    "raw",
    "split",
    "splits",
    "train",
    "training",
}
_OF_THIS_MACHINE = {"output_dir", "resume", "checkpoint_every", "tracker", "log_every", "num_workers", "export"}


def write_card(
    folder: Path,
    recipe: str,
    argv: list[str],
    cfg: Any,
    metric: str,
    results: dict[str, Any],
    versions: dict[str, str],
    split: str,
    base_model: str | None = None,
    license: str | None = None,
) -> None:
    """Give the network in `folder` its card.

    Args:
        recipe, argv: file of the recipe, and its arguments.
        metric, results: what was measured: "quantized" and, if it was, "float".
        split: what was evaluated on, in words.
        base_model, license: of the Hub, where the network started from there.
    """
    settings = {key: named(value) for key, value in dataclasses.asdict(cfg).items() if key not in _OF_THIS_MACHINE}
    dataset = dataset_name(cfg.dataset)
    facts = hf_daq.CardFacts(
        base_model=base_model,
        license=license,
        datasets=(dataset,),
        calibration=f"{cfg.calibration_batches} batches of the {cfg.train_split} split",
        results=(hf_daq.Result(metric, results["quantized"], results.get("float"), dataset, split),),
        command=command(recipe, argv),
        recipe=settings,
        seed=cfg.seed,
        versions=versions,
    )
    hf_daq.update_card(folder, facts)


def command(recipe: str, argv: list[str]) -> str:
    """The line that launched the recipe, without folders of this machine."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    launcher = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    return shlex.join([*launcher, f"recipes/{Path(recipe).name}", *map(named, argv)])


def named(value: Any) -> Any:
    """The name of a file or folder of this machine for its whole path; anything else as it is."""
    path = Path(value) if isinstance(value, str) else None
    return path.name if path and path.is_absolute() and path.exists() else value


def dataset_name(dataset: str) -> str:
    """A data set in a card: a Hub id as it is, a path of this machine by its last part that says something."""
    if not Path(dataset).exists():
        return dataset
    path = Path(dataset).resolve()
    return (
        next((part.name for part in (path, *path.parents) if part.stem.lower() not in _TELL_NOTHING), "") or path.name
    )


def hub_id(name: str | None) -> str | None:
    """A name of the Hub, None for a folder of this machine."""
    return None if name is None or Path(name).exists() else name


# ---------------------------------------------------------------------------------------------------------- exports


def formats(names: str | None) -> list[str]:
    """The names that were asked for, checked before a run begins."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in wanted:
        if name not in _WRITERS:
            raise SystemExit(f"export is {names!r}; allowed are {', '.join(_WRITERS)}, separated by commas")
    return wanted


def fitting(config: hf_daq.DaqConfig, names: list[str]) -> hf_daq.DaqConfig:
    """The config for a network that these formats can hold."""
    return config.replace(smooth=False) if "compressed-tensors" in names else config


def export(names: list[str], output: Path, inputs: Any) -> None:
    """Write each format beside output/quantized, compare it with the network, and print what was found.

    Args:
        inputs: real inputs to compare with, as the model takes them: a tensor, or a mapping of tensors.
    """
    for name in names:
        model = hf_daq.from_pretrained(output / "quantized")
        print(_WRITERS[name](model, output, inputs))


def _packed(model: Any, output: Path, inputs: Any) -> str:
    card = hf_daq.inspect(output / "quantized").facts
    hf_daq.save_pretrained(model, output / "packed", packed=True, probe=inputs, card=card)
    size = (output / "packed" / "model.safetensors").stat().st_size
    return f"{output / 'packed'}: {size / 2**20:.2f} MiB, computed as before the same outputs bit for bit"


def _onnx(model: Any, output: Path, inputs: Any) -> Any:
    return hf_daq.export_onnx(model, output / "model.onnx", inputs)


def _compressed_tensors(model: Any, output: Path, inputs: Any) -> Any:
    return hf_daq.export_compressed_tensors(model, output / "compressed-tensors", inputs)


def _gguf(model: Any, output: Path, inputs: Any) -> Any:
    folder = output / "quantized"
    tokenizer = folder if (folder / "tokenizer.json").exists() else None
    return hf_daq.export_gguf(model, output / "model.gguf", tokenizer)


_WRITERS = {"packed": _packed, "onnx": _onnx, "compressed-tensors": _compressed_tensors, "gguf": _gguf}
