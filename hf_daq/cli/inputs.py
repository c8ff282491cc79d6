"""What a command needs: the model, inputs from a file, and the small files of a checkpoint folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..checkpoint import from_pretrained
from ..errors import CheckpointError, ModelError
from ..files.atomic import PROBE_NAME
from ..files.header import CARD_NAME, CONFIG_NAME, read_description
from ..files.hub import is_repository
from ..files.inspect import inspect
from ..integrations.build import compressed, downloaded, is_quantized, pretrained
from ..model.roles import is_transformers_model

_NOT_COPIED = ("*.safetensors*", "*.onnx", "*.gguf", "*.bin", "*.pt", "*.pth", "*.pkl", "trainer_state.json", ".*")
_OWN = (CONFIG_NAME, CARD_NAME, "generation_config.json")  # which the library writes itself


def open_model(folder: Path, then: str) -> nn.Module:
    """The model of a checkpoint folder, without bars of progress. `then`: what to write in Python where nobody can build it.

    Raises:
        ModelError: a model of neither timm nor transformers. Others as of `from_pretrained`.
    """
    found = inspect(folder)
    if found.library == "torch":
        raise ModelError(
            f"{folder} holds a {found.architecture}, a model of neither timm nor transformers, which the command line cannot "
            f"build. In Python: model = hf_daq.from_pretrained({str(folder)!r}, model={found.architecture}(...)); {then}"
        )
    transformers.logging.disable_progress_bar()  # reading a folder takes a moment
    return from_pretrained(folder)


def open_any(name: str, revision: str | None) -> nn.Module:
    """A checkpoint of ours, or a float model with its weights: a folder, a repository, or the name of a timm model; or a folder in
    the format of compressed-tensors."""
    folder = Path(name)
    if (folder / CONFIG_NAME).is_file():
        if (found := compressed(folder)) is not None:
            return found
        return open_model(folder, "...") if is_quantized(read_description(folder)) else pretrained(name, revision)
    if is_repository(name) and is_quantized(read_description(downloaded(name, revision))):
        return from_pretrained(name, revision=revision)
    return pretrained(name, revision)


def read_inputs(model: nn.Module, folder: Path, path: Path | None) -> tuple[Any, Path | None]:
    """A batch for the model, a tensor or a mapping of tensors, and the file it is from: the one given, or the probe of the
    folder; None without one. The names of the tensors are the names of the inputs, also after "input."

    Raises:
        CheckpointError: a damaged file. ModelError: the model does not take them.
    """
    if path is None:
        path = folder / PROBE_NAME
        if not path.exists():
            return None, None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    probe = {name.removeprefix("input."): tensor for name, tensor in tensors.items() if name.startswith("input.")}
    inputs = probe or tensors
    if not inputs:
        raise CheckpointError(f"{path} has no tensor")
    unnamed = len(inputs) == 1 and ("x" in inputs or not is_transformers_model(model))
    batch: Any = next(iter(inputs.values())) if unnamed else inputs
    _try(model, batch, f"the inputs in {path} ({', '.join(f'{k} {tuple(v.shape)}' for k, v in inputs.items())})")
    return batch, path


def _try(model: nn.Module, batch: Any, what: str) -> None:
    """Refuse what the model does not take, from its first two rows."""
    try:
        with torch.no_grad():
            if isinstance(batch, dict):
                model(**{name: tensor[:2] for name, tensor in batch.items()})
            else:
                model(batch[:2])
    except Exception as error:
        raise ModelError(f"the model does not take {what}: {error}") from error


def copy_companions(folder: Path, out: Path) -> list[str]:
    """Copy what else is in a checkpoint folder, such as a tokenizer, to another one. Returns the names of the files.

    Weights, pickles, hidden files, what training leaves and what the library writes itself are not copied."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in _OWN and not any(map(path.match, _NOT_COPIED)):
            shutil.copyfile(path, out / path.name)
            names.append(path.name)
    return names
