"""One checkpoint on disk: `model.safetensors` with the quantization config in its header, and `config.json`.

Files may come from strangers: the header, every name, dtype and shape, and the values of the quantizers are checked
before anything is written to a model. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn.base import DaqLayer, check_calibrated
from ..nn.layers import quantized_layers
from ..nn.leaf import ONLOAD
from ..nn.packed import daq_layers, packed_layers
from ..nn.quantizers import is_shard
from ..nn.swap import uninterrupted
from ..version import __version__
from .atomic import replace_file
from .facts import CardFacts
from .header import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, Header, weights_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}
"""As safetensors names them."""


def header_metadata(
    model: Any,
    facts: CardFacts | None = None,
    names: Mapping[str, str] | None = None,
    weights: Mapping[str, list[str]] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What the header of a weights file says of the quantization, and what its card says beside it.

    Args:
        names: layer -> its name in the file, where that is another.
        weights: of `weights_elsewhere`, with the names in the file, where these are others than in the model.
        tensors: the state dict, where it is gathered from shards.
    """
    content: dict[str, Any] = {"hf_daq_version": __version__, "quantization_config": model.daq_config.to_dict()}
    shapes = _shapes(model)
    if shapes:
        content["shapes"] = shapes
    held = weights_elsewhere(model) if weights is None else weights
    if held:
        content["weights"] = dict(held)
    tied = {name: layer.owner.daq_name for name, layer in daq_layers(model).items() if layer.owner is not None}
    if tied:
        content["tied"] = tied
    if names:
        content["names"] = dict(names)
    if facts is not None and facts.to_dict():
        content["card"] = facts.to_dict()
    if known := fingerprint(model, tensors):
        content["fingerprint"] = known
    return {METADATA_KEY: json.dumps(content, sort_keys=True)}


def fingerprint(model: nn.Module, tensors: Mapping[str, Any] | None = None) -> str | None:
    """What tells exports of a model from those of another one: a digest of the scales of its weights, the same for a trainable and a packed
    model. None where these are sharded or on the meta device.

    Args:
        tensors: state dict, where it is not the model that holds them.
    """
    digest = hashlib.sha256()
    for name, layer in sorted(daq_layers(model).items()):
        if layer.owner is not None:
            continue
        found = (tensors or {}).get(f"{name}.weight_scale" if layer.w_quant is None else f"{name}.w_quant.scale")
        scale = layer.weight_scale
        if found is not None:
            scale = found if layer.w_quant is None else layer.w_quant.rounded_scale(found)
        if is_shard(scale) or scale.is_meta:
            return None
        digest.update(f"{name} {layer.weight_bits}".encode())
        digest.update(scale.detach().float().abs().cpu().contiguous().numpy().tobytes())
    return f"daq-{digest.hexdigest()[:32]}"


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Of packed weights and those of experts, by the layers that have them."""
    packed = {name: list(layer.shape) for name, layer in packed_layers(model).items() if layer.owner is None}
    modules = dict(model.named_modules())
    sizes = {name: getattr(modules[name], "sizes", None) for name in weights_elsewhere(model)}
    return packed | {name: list(size or modules[name].weight_shape()) for name, size in sizes.items()}  # type: ignore[operator]


def weights_elsewhere(model: nn.Module) -> dict[str, list[str]]:
    """Trainable layers whose weight has another name in the state dict than "weight", each with those of what it is made of."""
    keys = {name: layer.weight_keys(name) for name, layer in quantized_layers(model).items()}
    return {name: own for name, own in keys.items() if own != [f"{name}.weight"]}


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    description: dict[str, Any],
    facts: CardFacts | None = None,
) -> None:
    """Write both files to a folder that is there.

    Args:
        tensors: the state dict of `model`, or one gathered from its shards.
        description: content of config.json, without the version.
        facts: for the model card.
    """
    text = json.dumps(description | {"hf_daq_version": __version__}, indent=2) + "\n"
    write_weights(directory / WEIGHTS_NAME, tensors, model, facts)
    replace_file(directory / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def write_weights(file: Path, tensors: Mapping[str, Tensor], model: nn.Module, facts: CardFacts | None = None) -> None:
    """The weights file alone, whose header says how the model is quantized."""
    contents: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        address = tensor.untyped_storage().data_ptr()
        # A module that is in the model twice has two names; the file holds it under both.
        contents[name] = tensor.clone() if address in storages else tensor
        storages.add(address)
    header = {"format": "pt", **header_metadata(model, facts, tensors=contents)}
    replace_file(file, lambda path: save_file(contents, path, metadata=header))


def weights_size(directory: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in weights_files(directory))


def check_fits(model: nn.Module, header: Header, path: Path) -> None:
    """Compare names, shapes and kinds of number of the file with a quantized model, which may be on the meta device."""
    expected = model.state_dict()
    problems = []
    for title, names in (
        ("missing from the file", expected.keys() - header.tensors.keys()),
        ("not in the model", header.tensors.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{len(names)} {title}: {', '.join(sorted(names)[:5])}")
    for name in expected.keys() & header.tensors.keys():
        dtype, shape = header.tensors[name]
        if shape != tuple(expected[name].shape):
            problems.append(f"{name} has shape {shape}, the model {tuple(expected[name].shape)}")
        found, own = _DTYPES.get(dtype), expected[name].dtype
        if found is None or (found.is_floating_point, found.is_complex) != (own.is_floating_point, own.is_complex):
            problems.append(f"{name} has dtype {dtype}, the model {own}")
    shapes = _shapes(model)
    if shapes != header.shapes:
        problems.append("the shapes of packed weights in its metadata are not those of the model")
    if problems:
        raise CheckpointError(f"{path} does not fit the model: " + "; ".join(problems[:8]))


def load_weights(model: nn.Module, header: Header, path: Path) -> None:
    """Load a weights file into a quantized model, after all checks; on an error the model is left as it was."""
    check_fits(model, header, path)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise CheckpointError(f"the model is on the meta device, which has no place for {path}; build it on a real one")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    check_quantizers(tensors, model, path)
    with uninterrupted():
        model.load_state_dict(tensors)


def check_quantizers(tensors: Mapping[str, Tensor], model: nn.Module, path: Any) -> None:
    """Refuse tensors of a file, under the names of a quantized model, among which are bounds or scales that no quantizer can have."""
    for name, layer in daq_layers(model).items():
        problem = layer_problem(name, layer, tensors)
        if problem:
            raise CheckpointError(f"{path}: {problem}")


def check_values(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse to save shards, what is no tensor, and quantizers that were never calibrated or whose values could not be loaded
    again."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} of the state dict is a {type(value).__name__}, and a safetensors file holds tensors alone; "
                "keep it in a buffer, or in a file of your own"
            )
        if value.dtype not in _DTYPES.values():
            raise CheckpointError(f"{name} has the dtype {value.dtype}, which a safetensors file does not have")
    if any(is_shard(tensor) for tensor in tensors.values()):
        raise CheckpointError(
            "the model is sharded; gather its tensors on every rank and save them on the main one: state_dict = "
            "accelerator.get_state_dict(model), then save_pretrained(model, directory, state_dict=state_dict)"
        )
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError(f"the model is offloaded; {ONLOAD}")
    check_calibrated(daq_layers(model), "saving")
    for name, layer in daq_layers(model).items():
        problem = layer_problem(name, layer, tensors)
        if problem:
            raise CheckpointError(f"cannot save: {problem}; a smaller quantizer_lr usually helps")


def layer_problem(name: str, layer: DaqLayer, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the bounds and scales of a layer among these tensors, or None."""
    if layer.owner is not None:
        return None
    if layer.w_quant is None and not torch.isfinite(tensors[f"{name}.weight_scale"]).all():
        return f"{name}.weight_scale is not finite"
    for side, quantizer in layer.quantizers.items():
        if side == "a_quant" and layer.input_owner is not None:
            continue
        problem = bounds_problem({key: tensors[f"{name}.{side}.{key}"] for key in quantizer.state_dict()})
        if problem:
            return f"{name}.{side}: {problem}"
    return None


def bounds_problem(values: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the bounds and scale of a quantizer, or None."""
    for key, value in values.items():
        if not torch.isfinite(value).all():
            return f"{key} is not finite"
    smooth = values.get("smooth")
    if smooth is not None and not bool(((smooth > 0) & (torch.frexp(smooth.float()).mantissa == 0.5)).all()):
        return "smooth has other values than powers of two"
    lower, upper = values["lower"].float(), values["upper"].float()
    if not (lower < upper).all():
        return f"lower {lower.max().item():g} is not below upper {upper.min().item():g}"
    return None
