"""What an ONNX file says of itself and of how it is fed: its `metadata_props`, texts under names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..files.feeding import image_facts
from ..files.weights_file import fingerprint
from ..text import width_text
from ..version import __version__


def input_shapes(proto: Any) -> dict[str, tuple[int | str, ...]]:
    """Input -> its shape, with names for dimensions that are free."""
    return {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in proto.graph.input
    }


def write_metadata(proto: Any, model: nn.Module, layers: Mapping[str, Any], runtime: str, size: Any = None) -> None:
    """Write hf_daq_version, the runtime that the file was written for, architecture, bits and
    the fingerprint of the model, for images input_size (channels, height, width), mean, std, interpolation,
    crop_pct, crop_mode and channel_order, labels, and the tokenizer: what is known. Lists are in JSON. size: of images, where the file takes any."""
    import onnx

    config: Any = getattr(model, "config", None)
    widths = {(layer.weight_bits, layer.a_quant and layer.a_quant.bits) for layer in layers.values()}
    found: dict[str, Any] = {
        "hf_daq_version": __version__,
        "runtime": runtime,
        "architecture": type(model).__name__,
        "bits": ", ".join(sorted(width_text(*width) for width in widths)),
        "fingerprint": fingerprint(model) or "",
    }
    inputs = input_shapes(proto).items()
    images = [shape for name, shape in inputs if len(shape) == 4 and not name.startswith("past_key_values")]
    if images:
        image = image_facts(getattr(model, "pretrained_cfg", None))
        found |= image | {"input_size": list(size or images[0][1:])}
        found |= {"channel_order": "RGB"} if "mean" in image else {}
    labels = found.pop("label_names", None) or _labels(config)
    if labels and len(labels) == getattr(model, "num_classes", len(labels)):  # not those of a head that was replaced
        found["labels"] = labels
    if getattr(config, "_commit_hash", None) and config.name_or_path:  # of the Hub, no path of this machine
        found["tokenizer"] = config.name_or_path
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
    onnx.helper.set_model_props(proto, texts)


def _labels(config: Any) -> list[str] | None:
    """The labels of a model of transformers, unless they are those that it makes up."""
    names = getattr(config, "id2label", None) or {}
    labels = [str(names[number]) for number in sorted(names)]
    return None if all(label == f"LABEL_{number}" for number, label in enumerate(labels)) else labels
