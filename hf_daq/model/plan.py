"""Which modules are quantized, to how many bits, and why the others are not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import DaqConfig, did_you_mean, packed_bytes, pattern_matches
from ..errors import ConfigError
from ..nn.layers import LAYER_TYPES
from ..text import add_row, as_text, bits_text, cell, plain_table, shape_text
from .roles import bypassed_layers, largest_weight, outer_layers, saved_tensors, tied_layers, weight_modules


@dataclass(frozen=True)
class PlannedLayer:
    """One row of a plan. `weight_bits` is None for a layer that stays in full precision; `unsupported` if nobody asked for
    that: it holds a weight which this library cannot quantize."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    activation_bits: int | None
    reason: str
    unsupported: bool = False


@dataclass(frozen=True)
class Plan:
    """What `apply_daq` would do, layer by layer. `print(plan)` shows it as a table.

    layers: all modules with weights. parameters: how many numbers the model has. float_bytes, packed_bytes: size of all
    parameters and persistent buffers, as they are and after `pack`.
    """

    layers: tuple[PlannedLayer, ...]
    parameters: int
    float_bytes: int
    packed_bytes: int

    @property
    def quantized(self) -> dict[str, PlannedLayer]:
        return {layer.name: layer for layer in self.layers if layer.weight_bits is not None}

    @property
    def unsupported(self) -> dict[str, PlannedLayer]:
        return {layer.name: layer for layer in self.layers if layer.unsupported}

    @property
    def kept(self) -> dict[str, PlannedLayer]:
        return {layer.name: layer for layer in self.layers if layer.weight_bits is None}

    @property
    def totals(self) -> dict[str, Any]:
        """Plain JSON types: numbers of layers and of parameters, and bytes of all parameters and persistent buffers, tied
        ones once, of the float and of the packed model."""
        return {
            "layers_quantized": len(self.quantized),
            "layers_kept": len(self.kept),
            "layers_unsupported": len(self.unsupported),
            "weights_quantized": sum(math.prod(layer.shape) for layer in self.quantized.values()),
            "parameters": self.parameters,
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
        }

    def __rich__(self) -> Any:
        from rich.console import Group

        table = plain_table("layer", "type", "weight shape", "W", "A", "why")
        for layer in self.layers:
            style = "magenta" if layer.unsupported else "dim" if layer.weight_bits is None else ""
            bits = map(bits_text, (layer.weight_bits, layer.activation_bits))
            add_row(table, style, layer.name, layer.kind, shape_text(layer.shape), *bits, layer.reason)
        return Group(table, cell(self._totals_text()))

    def __str__(self) -> str:
        return as_text(self)

    def _totals_text(self) -> str:
        totals = self.totals
        share = totals["weights_quantized"] / max(totals["parameters"], 1)
        unsupported = f", {len(self.unsupported)} unsupported" if self.unsupported else ""
        return (
            f"{len(self.quantized)} layers quantized, {len(self.kept)} kept in full precision{unsupported}; "
            f"{totals['weights_quantized']:,} of {totals['parameters']:,} parameters quantized ({share:.1%}); "
            f"{totals['float_bytes'] / 1e6:.2f} MB in float, {totals['packed_bytes'] / 1e6:.2f} MB packed"
        )


def plan(model: nn.Module, config: DaqConfig | None = None, **kwargs: Any) -> Plan:
    """What `apply_daq(model, config)` would do, without doing it.

        plan = hf_daq.plan(model, bits=3, first_last_bits=8)
        print(plan)

    Args:
        model: a float model; may live on the meta device.
        config: a `DaqConfig`, or its arguments as keywords, e.g. `plan(model, bits=3)`.

    Raises:
        ConfigError: a rule or pattern matches nothing, a rule gives bits to nothing that has a quantized form, or a
        resolved layer is not in the model.
    """
    config = config_from(config, kwargs)
    modules = dict(weight_modules(model))
    tied, bypassed = tied_layers(model), bypassed_layers(model)
    if config.layers is not None:
        _check_resolved(config.layers, modules, bypassed | tied)
    else:
        _check_patterns(config, modules)
    outer = outer_layers(model)
    layers = tuple(_plan_layer(name, module, config, outer, tied, bypassed) for name, module in modules.items())
    float_bytes = sum(value.nbytes for value in saved_tensors(model))
    saved = sum(_saved_bytes(modules[row.name], row, config) for row in layers if row.weight_bits is not None)
    return Plan(layers, sum(value.numel() for value in model.parameters()), float_bytes, float_bytes - saved)


def config_from(config: DaqConfig | None, kwargs: dict[str, Any]) -> DaqConfig:
    """The config a call was given, as an object or as keywords."""
    if config is None:
        return DaqConfig(**kwargs)
    if not isinstance(config, DaqConfig):
        raise ConfigError(f"config={config!r} is not a DaqConfig; write apply_daq(model, DaqConfig(bits=3))")
    if kwargs:
        raise ConfigError(f"pass a DaqConfig or keywords, not both; or config.replace({next(iter(kwargs))}=...)")
    return config


def _plan_layer(
    name: str,
    module: nn.Module,
    config: DaqConfig,
    outer: dict[str, str],
    tied: dict[str, str],
    bypassed: dict[str, str],
) -> PlannedLayer:
    shape = tuple(largest_weight(module).shape)

    def row(bits: tuple[int, int | None] | None, reason: str, unsupported: bool = False) -> PlannedLayer:
        weight_bits, activation_bits = bits or (None, None)
        return PlannedLayer(name, type(module).__name__, shape, weight_bits, activation_bits, reason, unsupported)

    if isinstance(module, nn.Embedding):
        return row(None, "embedding")
    if type(module) not in LAYER_TYPES and outer.get(name) == "router":
        return row(None, "router")
    if type(module) not in LAYER_TYPES:
        return row(None, f"no quantized form of {type(module).__name__}", unsupported=not _asked_to_stay(name, config))
    if name in tied:
        return row(None, tied[name])
    if name in bypassed:
        return row(None, bypassed[name], unsupported=not _asked_to_stay(name, config))
    if config.layers is not None:
        entry = config.layers.get(name)
        return row(entry and (entry["weight_bits"], entry["activation_bits"]), "resolved before")  # type: ignore[arg-type]
    for pattern in config.modules_to_not_convert:
        if pattern_matches(pattern, name):
            return row(None, f"modules_to_not_convert: {pattern}")
    for rule in config.rules:
        if pattern_matches(rule["pattern"], name):
            if rule.get("skip"):
                return row(None, f"rule {rule['pattern']}")
            weight_bits = rule.get("weight_bits", rule.get("bits", config.weight_bits))
            activation_bits = rule.get("activation_bits", rule.get("bits", config.activation_bits))
            return row((weight_bits, activation_bits), f"rule {rule['pattern']}")
    if name in outer:
        bits = config.first_last_bits
        if bits is None:
            return row(None, outer[name])
        return row((bits, None if config.activation_bits is None else bits), f"{outer[name]}: first_last_bits")
    return row((config.weight_bits, config.activation_bits), "")


def _asked_to_stay(name: str, config: DaqConfig) -> bool:
    """Whether the config itself leaves the layer in float."""
    if any(pattern_matches(pattern, name) for pattern in config.modules_to_not_convert):
        return True
    rule = next((rule for rule in config.rules if pattern_matches(rule["pattern"], name)), {})
    return bool(rule.get("skip"))


def _saved_bytes(module: Any, row: PlannedLayer, config: DaqConfig) -> int:
    """By how many bytes a layer gets smaller when it is packed."""
    assert row.weight_bits is not None
    shape = LAYER_TYPES[type(module)].weight_shape(module)
    packed = packed_bytes(math.prod(shape), row.weight_bits, config.scale_count(shape))
    if row.activation_bits is not None:
        packed += 8  # bounds of the inputs, both in float32
    if module.bias is None and config.bias_correction and isinstance(module, nn.Conv2d):
        packed += shape[0] * module.weight.itemsize
    own: int = sum(value.nbytes for name, value in module.named_parameters(recurse=False) if name != "bias")
    return own - packed


def _check_resolved(layers: Any, modules: dict[str, nn.Module], fixed: dict[str, str]) -> None:
    convertible = [name for name, module in modules.items() if type(module) in LAYER_TYPES]
    for name in layers:
        if name not in convertible:
            raise ConfigError(
                f"the config quantizes a layer {name!r} that this model does not have{did_you_mean(name, convertible)}"
            )
        if name in fixed:
            raise ConfigError(f"the config quantizes layer {name!r}, but in this model it {fixed[name]}")


def _check_patterns(config: DaqConfig, modules: dict[str, nn.Module]) -> None:
    names = list(modules)
    for pattern in [*config.modules_to_not_convert, *(rule["pattern"] for rule in config.rules)]:
        if not any(pattern_matches(pattern, name) for name in names):
            hint = did_you_mean(pattern, names) or f"; layers are named like {', '.join(map(repr, names[:3]))}"
            raise ConfigError(f"pattern {pattern!r} matches no layer of the model{hint}")
    for rule in config.rules:
        if not rule.get("skip"):
            _check_bits_rule(rule["pattern"], modules)


def _check_bits_rule(pattern: str, modules: dict[str, nn.Module]) -> None:
    """Refuse bits for nothing but layers that stay in float."""
    matched = [(name, module) for name, module in modules.items() if pattern_matches(pattern, name)]
    if any(type(module) in LAYER_TYPES for _, module in matched):
        return
    shown = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in matched[:3])
    more = f" and {len(matched) - 3} more" if len(matched) > 3 else ""
    raise ConfigError(
        f"rule {pattern!r} gives bits to {shown}{more}, which have no quantized form and stay in float: leave the rule out, or "
        f"write {{'pattern': {pattern!r}, 'skip': True}} to say so; hf_daq.plan(model, bits=4) lists what can be quantized"
    )
