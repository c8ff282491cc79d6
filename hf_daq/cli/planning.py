"""The config and the tables of the command line: what a plan would do, and every layer of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from ..config import DaqConfig
from ..errors import ConfigError
from ..text import add_row, bits_text, plain_table, shape_text


def config_of(path: Path | None, given: dict[str, Any]) -> DaqConfig:
    """The config of a file and of options, which are stronger."""
    values = dict(_config_values(path)) if path else {}
    preset = values.pop("preset", None)
    if preset not in (None, "paper"):
        raise ConfigError(f"preset={preset!r} in {path} must be 'paper', or be left out")
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
    values |= given
    return DaqConfig.paper(**values) if preset else DaqConfig.from_dict(values)


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


def totals_of(model: Any, found: Any) -> dict[str, Any]:
    """Numbers of layers and weights, and bytes of all parameters in float and with packed weights, scales left out."""
    sizes = {layer.name: math.prod(layer.shape) for layer in found.layers}
    quantized = {name: (sizes[name], layer.weight_bits) for name, layer in found.quantized.items()}
    modules = dict(model.named_modules())
    before = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    saved = sum(size * modules[name].weight.itemsize - size * bits / 8 for name, (size, bits) in quantized.items())
    return {
        "layers_quantized": len(quantized),
        "layers_kept": len(found.kept),
        "layers_unsupported": len(found.unsupported),
        "weights_quantized": sum(size for size, _ in quantized.values()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "float_bytes": before,
        "packed_bytes": round(before - saved),
    }


def _totals_text(totals: Mapping[str, Any]) -> Text:
    share = totals["weights_quantized"] / max(totals["parameters"], 1)
    unsupported = totals["layers_unsupported"]
    kept = f"{totals['layers_kept']} kept in full precision" + (f", {unsupported} unsupported" if unsupported else "")
    return Text(
        f"{totals['layers_quantized']} layers quantized, {kept}; {totals['weights_quantized']:,} of "
        f"{totals['parameters']:,} parameters quantized ({share:.1%}); about {totals['float_bytes'] / 1e6:.2f} MB in float, "
        f"{totals['packed_bytes'] / 1e6:.2f} MB packed"
    )


def plan_table(model: str, built: Any, found: Any) -> Group:
    """What a plan does to each layer, and totals."""
    table = plain_table("layer", "type", "weight shape", "W", "A", "why")
    for layer in found.layers:
        style = "yellow" if layer.unsupported else "dim" if layer.weight_bits is None else ""
        bits = map(bits_text, (layer.weight_bits, layer.activation_bits))
        add_row(table, style, layer.name, layer.kind, shape_text(layer.shape), *bits, layer.reason)
    title = Text(f"{model}, {type(built).__name__}", style="bold")
    return Group(title, table, _totals_text(totals_of(built, found)))
