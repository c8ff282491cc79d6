"""What formats of language models have in common before they write anything: their library, and the layers they take."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ExportError
from ..nn.base import DaqLayer, check_finite, refuse_adapted_weights
from ..nn.experts import ExpertsLinear
from ..nn.packed import daq_layers
from ..nn.quantizers import is_shard


def library(module: str, package: str) -> Any:
    """A module of another library, which `package` installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"this export needs another library: pip install -U {package} ({error})") from None


def layers_to_export(model: nn.Module) -> dict[str, DaqLayer]:
    """The quantized or packed layers, of which there is one at least."""
    layers = daq_layers(model)
    if not layers:
        raise ExportError("there is no quantized layer; export the model that apply_daq or from_pretrained returned")
    check_finite(layers)
    refuse_adapted_weights(model, "exported")
    return layers


def refuse_experts(layers: Mapping[str, DaqLayer]) -> None:
    """For files that have no layers of experts."""
    name = next((name for name, layer in layers.items() if isinstance(layer, ExpertsLinear)), None)
    if name is not None:
        parent = name.rpartition(".")[0]
        raise ExportError(
            f"layer {name!r} computes for all experts of a mixture, which ONNX files do not hold: save the model with "
            "hf_daq.save_pretrained(model, directory, packed=True), or with hf_daq.export_compressed_tensors where weights "
            f"alone are quantized, or leave its experts in full precision: modules_to_not_convert=[{parent!r}]"
        )


def refuse_sharded(layer: DaqLayer) -> None:
    if any(is_shard(parameter) for parameter in layer.parameters()):
        raise ExportError("the model is sharded; gather and save it, open it again, then export it")
