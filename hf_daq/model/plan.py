"""Which modules are quantized, to how many bits, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..config import DaqConfig, did_you_mean, packed_bytes, pattern_matches
from ..errors import ConfigError
from ..nn.attention import Projection, projections
from ..nn.layers import CONVOLUTIONS, LAYER_TYPES, TRANSPOSED
from ..nn.smoothing import SMOOTHED
from ..nn.subclasses import know_subclasses
from ..nn.weight_norm import Normed, as_normed
from ..text import add_row, as_text, bits_text, cell, plain_table, shape_text
from .macs import count_macs
from .roles import (
    bias_tables,
    bypassed_layers,
    kept_computed_weights,
    largest_weight,
    outer_layers,
    refuse_scripted,
    refused_tables,
    saved_tensors,
    tied_layers,
    tied_tables,
    unusual_weights,
    weight_modules,
)
from .shares import InFloat, in_float, rest_text, too_little


@dataclass(frozen=True)
class PlannedLayer:
    """One row of a plan. `weight_bits` is None for a layer that stays in full precision; `unsupported` if nobody asked for
    that: it holds a weight which this library cannot quantize. `tied_to`: the embedding with whose codes it computes.
    `macs`: multiply-accumulates for one example, None without inputs and where these do not reach it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    activation_bits: int | None
    reason: str
    unsupported: bool = False
    tied_to: str | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Plan:
    """What `apply_daq` would do, layer by layer. `print(plan)` shows it as a table.

    layers: all modules with weights. parameters: how many numbers the model has. in_float: those that stay in float, by what
    holds them, the largest part first. float_bytes, packed_bytes: size of all parameters and persistent buffers, as they
    are and after `pack`; layers that calibration finds to read one input save another 8 bytes each, and those whose channels it
    divides take 4 more a channel.
    """

    layers: tuple[PlannedLayer, ...]
    parameters: int
    in_float: tuple[InFloat, ...]
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
        ones once, of the float and of the packed model. `share_of_parameters` is quantized, and `share_of_macs` of all
        multiply-accumulates of layers, of which an example needs `macs`; both None without inputs."""
        weights = sum(math.prod(row.shape) for row in self.quantized.values() if row.tied_to is None)
        macs = sum(row.macs or 0 for row in self.layers) or None
        return {
            "layers_quantized": len(self.quantized),
            "layers_kept": len(self.kept),
            "layers_unsupported": len(self.unsupported),
            "weights_quantized": weights,
            "parameters": self.parameters,
            "share_of_parameters": weights / max(self.parameters, 1),
            "macs": macs,
            "share_of_macs": macs and sum(row.macs or 0 for row in self.quantized.values()) / macs,
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
        unsupported = f", {len(self.unsupported)} unsupported" if self.unsupported else ""
        share = f"{totals['share_of_parameters']:.1%}"
        if totals["macs"] is not None:
            share += f", and {totals['share_of_macs']:.1%} of {totals['macs'] / 1e6:,.2f} million MACs"
        return (
            f"{len(self.quantized)} layers quantized, {len(self.kept)} kept in full precision{unsupported}; "
            f"{totals['float_bytes'] / 1e6:.2f} MB in float, {totals['packed_bytes'] / 1e6:.2f} MB packed; "
            f"{totals['weights_quantized']:,} of {totals['parameters']:,} parameters quantized ({share})"
            + (f"; the rest: {self.rest}" if too_little(self.in_float, self.parameters) else "")
        )

    @property
    def rest(self) -> str:
        """What holds most of the parameters in float, each with its share of all, and what to write."""
        return rest_text(self.in_float, self.parameters)


def plan(model: nn.Module, config: DaqConfig | None = None, inputs: Any = None, **kwargs: Any) -> Plan:
    """What `apply_daq(model, config)` would do, without doing it.

        plan = hf_daq.plan(model, bits=3, first_last_bits=8)
        print(plan)

    Args:
        model: a float model; may live on the meta device.
        config: a `DaqConfig`, or its arguments as keywords, e.g. `plan(model, bits=3)`.
        inputs: a batch, to count multiply-accumulates: a tensor, a mapping or a tuple of what the model takes. It goes
            through the model once, in evaluation mode.

    Raises:
        ConfigError: a rule or pattern matches nothing, a rule gives bits to nothing that has a quantized form, or a
        resolved layer is not in the model.
    """
    config = config_from(config, kwargs)
    refuse_scripted(model)
    know_subclasses(model)
    modules = _layers_of(model)
    tied = tied_layers(model)
    refused = bypassed_layers(model) | refused_tables(model) | kept_computed_weights(model) | unusual_weights(modules)
    owners, biases = tied_tables(model, refused), bias_tables(model)
    tied = {name: reason for name, reason in tied.items() if name not in owners}
    if config.layers is not None:
        _check_resolved(config.layers, modules, refused | tied, owners)
    else:
        _check_patterns(config, modules, refused, owners, biases)
    outer, tables = outer_layers(model), _bits_of_tables(config, modules, owners, biases)
    outer |= {name: outer[of] for name in modules if (of := name.rpartition(".")[0]) in outer}
    layers = tuple(_plan_layer(name, module, config, outer, tied, refused, tables) for name, module in modules.items())
    layers = tuple(_following(row, owners, layers, config) for row in layers)
    if config.activation_scale == "token":
        _check_tokens(layers, modules)
    _check_projections(layers, modules)
    if inputs is not None:
        macs = count_macs(model, modules, inputs)
        layers = tuple(replace(row, macs=macs.get(row.name)) for row in layers)
    float_bytes = sum(value.nbytes for value in saved_tensors(model))
    own = [row for row in layers if row.weight_bits is not None and row.tied_to is None]
    saved = sum(_saved_bytes(modules[row.name], row, config) for row in own)
    parameters = sum(value.numel() for value in model.parameters())
    kept = [row for row in layers if row.weight_bits is None]
    rest = in_float(kept, modules, parameters, sum(math.prod(row.shape) for row in own))
    return Plan(layers, parameters, rest, float_bytes, float_bytes - saved)


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """By name, with the projections of attentions in the place of these, and layers with weight normalization as they will be."""
    found: dict[str, nn.Module] = {}
    for name, module in weight_modules(model):
        parts: dict[str, nn.Module] = {**projections(module)}
        found |= {f"{name}.{part}".lstrip("."): layer for part, layer in parts.items()} or {name: as_normed(module)}
    return found


def _check_projections(layers: tuple[PlannedLayer, ...], modules: dict[str, nn.Module]) -> None:
    """Files hold the projections of an attention in one tensor, or packed in none."""
    found: dict[str, set[bool]] = {}
    for row in layers:
        if isinstance(modules[row.name], Projection):
            found.setdefault(row.name.rpartition(".")[0], set()).add(row.weight_bits is None)
    for name, kinds in found.items():
        if len(kinds) > 1:
            raise ConfigError(
                f"the config quantizes a part of the projections of attention {name!r}, which are one parameter: let a pattern "
                f"name the attention, {name!r}"
            )


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
    refused: dict[str, str],
    tables: dict[str, tuple[int | None, str]],
) -> PlannedLayer:
    shape = tuple(largest_weight(module).shape)

    def row(bits: tuple[int, int | None] | None, reason: str, unsupported: bool = False) -> PlannedLayer:
        weight_bits, activation_bits = bits or (None, None)
        return PlannedLayer(name, type(module).__name__, shape, weight_bits, activation_bits, reason, unsupported)

    table_bits, table_reason = tables.get(name, (None, ""))
    if name in tables and table_bits is None:
        return row(None, table_reason)
    if type(module) not in LAYER_TYPES and outer.get(name) == "router":
        return row(None, "router")
    if type(module) not in LAYER_TYPES:
        return row(None, f"no quantized form of {type(module).__name__}", unsupported=not _asked_to_stay(name, config))
    if name in tied:
        return row(None, tied[name], unsupported=name in tables)
    if name in refused:
        return row(None, refused[name], unsupported=not _asked_to_stay(name, config))
    if table_bits is not None:
        return row((table_bits, None), table_reason)
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


def _following(
    row: PlannedLayer, owners: dict[str, str], layers: tuple[PlannedLayer, ...], config: DaqConfig
) -> PlannedLayer:
    """The row of a layer that shares the weight of an embedding: quantized with it, and by nothing else."""
    owner = owners.get(row.name, row.name)
    if owner == row.name:
        return row
    bits = next(other.weight_bits for other in layers if other.name == owner)
    reason = f"shares its weight with {owner}"
    if bits is None:
        return replace(row, weight_bits=None, activation_bits=None, reason=reason, unsupported=False)
    skipped = [*config.modules_to_not_convert, *(rule["pattern"] for rule in config.rules if rule.get("skip"))]
    pattern = next((one for one in skipped if pattern_matches(one, row.name)), None)
    if config.layers is None and pattern is not None:
        raise ConfigError(
            f"pattern {pattern!r} keeps {row.name!r} in full precision, but it shares its weight with {owner!r}, which gets "
            f"{bits} bits: name both there, modules_to_not_convert=[{row.name!r}, {owner!r}]"
        )
    return replace(row, weight_bits=bits, activation_bits=None, reason=reason, unsupported=False, tied_to=owner)


def _bits_of_tables(
    config: DaqConfig, modules: dict[str, nn.Module], owners: dict[str, str], biases: Container[str]
) -> dict[str, tuple[int | None, str]]:
    """Embedding -> its bits, None for full precision, and the reason."""
    tables = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    found: dict[str, tuple[int | None, str]] = dict.fromkeys(tables, (None, "embedding"))
    if config.layers is not None:
        bits = {name: entry["weight_bits"] for name, entry in config.layers.items()}
        return found | {name: (bits[name], "resolved before") for name in tables if name in bits}
    for name in tables:
        pattern = next((one for one in config.modules_to_not_convert if pattern_matches(one, name)), None)
        rule = next((one for one in config.rules if _is_for_tables(one, name, config, modules, owners)), None)
        if pattern is not None:
            found[name] = None, f"modules_to_not_convert: {pattern}"
        elif rule is not None:
            found[name] = None if rule.get("skip") else _bits_of_table(rule, config), f"rule {rule['pattern']}"
        elif name in biases:
            found[name] = None, "table of biases"
        elif config.embedding_bits is not None:
            found[name] = config.embedding_bits, "embedding_bits"
    return found


def _is_for_tables(
    rule: Mapping[str, Any], name: str, config: DaqConfig, modules: dict[str, nn.Module], owners: dict[str, str]
) -> bool:
    """Whether a rule decides about this embedding. One that gives bits to other layers too does so only where embeddings have
    bits without it."""
    if not pattern_matches(rule["pattern"], name):
        return False
    others = (key for key, module in modules.items() if not isinstance(module, nn.Embedding) and key not in owners)
    return config.embedding_bits is not None or not any(pattern_matches(rule["pattern"], key) for key in others)


def _bits_of_table(rule: Mapping[str, Any], config: DaqConfig) -> int | None:
    bits: int | None = rule.get("weight_bits", rule.get("bits", config.embedding_bits))
    return bits


def _saved_bytes(module: Any, row: PlannedLayer, config: DaqConfig) -> int:
    """By how many bytes a layer gets smaller when it is packed."""
    assert row.weight_bits is not None
    quantized_class = LAYER_TYPES[type(module)]
    entry = (config.layers or {}).get(row.name, {})
    config = quantized_class.config_of(config, module)
    shape = quantized_class.weight_shape(module)
    scales = config.scale_count(shape)
    packed = packed_bytes(math.prod(shape), row.weight_bits, scales, config.grid(row.weight_bits))
    if row.activation_bits is not None and config.activation_scale == "static" and "same_input_as" not in entry:
        packed += 8 + 4 * shape[1] * ("smooth" in entry)  # bounds of the inputs, and factors, in float32
    if isinstance(module, CONVOLUTIONS + TRANSPOSED) and module.bias is None and config.bias_correction:
        packed += shape[0] * module.weight.itemsize
    if isinstance(module, Normed):
        own = module.parts
    else:  # a projection has its weight elsewhere
        held = {name: value for name, value in module.named_parameters(recurse=False) if name != "bias"}
        own = list((held | {"weight": module.weight}).values())
    float_bytes: int = sum(value.nbytes for value in own)
    return float_bytes - packed


def _check_tokens(layers: tuple[PlannedLayer, ...], modules: dict[str, nn.Module]) -> None:
    for row in layers:
        if row.activation_bits is not None and isinstance(modules[row.name], nn.modules.conv._ConvNd):
            raise ConfigError(
                f'activation_scale="token" is for linear layers, and {row.name!r} ({row.kind}) has no tokens; keep its input in '
                f"float with rules=[{{'pattern': {row.name!r}, 'activation_bits': None}}], or write activation_scale=\"static\""
            )


def _check_resolved(layers: Any, modules: dict[str, nn.Module], fixed: dict[str, str], owners: dict[str, str]) -> None:
    convertible = [name for name, module in modules.items() if type(module) in LAYER_TYPES]
    for name in layers:
        if name not in convertible:
            raise ConfigError(
                f"the config quantizes a layer {name!r} that this model does not have{did_you_mean(name, convertible)}"
            )
        if name in fixed:
            raise ConfigError(f"the config quantizes layer {name!r}, but in this model it {fixed[name]}")
        if "smooth" in layers[name] and not isinstance(modules[name], SMOOTHED):
            raise ConfigError(
                f"the config has smooth for layer {name!r}, a {type(modules[name]).__name__}, and it is for linear layers"
            )
        owner = owners.get(name, name)
        if layers[name]["activation_bits"] is not None and isinstance(modules[owner], nn.Embedding):
            raise ConfigError(
                f"the config gives activation_bits to layer {name!r}, which computes with the weight of an embedding: its input "
                "is not quantized, activation_bits=None"
            )
        if owner not in layers or dict(layers[owner]) != dict(layers[name]):
            raise ConfigError(
                f"the config quantizes layer {name!r}, but in this model it shares its weight with {owner!r}, which the config "
                "does not quantize alike"
            )


def _check_patterns(
    config: DaqConfig,
    modules: dict[str, nn.Module],
    refused: dict[str, str],
    owners: dict[str, str],
    biases: Container[str],
) -> None:
    names = list(modules)
    for pattern in [*config.modules_to_not_convert, *(rule["pattern"] for rule in config.rules)]:
        if not any(pattern_matches(pattern, name) for name in names):
            hint = did_you_mean(pattern, names) or f"; layers are named like {', '.join(map(repr, names[:3]))}"
            raise ConfigError(f"pattern {pattern!r} matches no layer of the model{hint}")
    tables = _bits_of_tables(config, modules, owners, biases)
    quantized = {name for name, (bits, _) in tables.items() if bits is not None and name not in refused}
    for rule in config.rules:
        if not rule.get("skip"):
            _check_bits_rule(rule["pattern"], modules, quantized)


def _check_bits_rule(pattern: str, modules: dict[str, nn.Module], tables: set[str]) -> None:
    """Refuse bits for nothing but layers that stay in float."""
    matched = [(name, module) for name, module in modules.items() if pattern_matches(pattern, name)]
    for name, module in matched:
        if type(module) in LAYER_TYPES and (name in tables or not isinstance(module, nn.Embedding)):
            return
    shown = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in matched[:3])
    more = f" and {len(matched) - 3} more" if len(matched) > 3 else ""
    raise ConfigError(
        f"rule {pattern!r} gives bits to {shown}{more}, which have no quantized form and stay in float: leave the rule out, or "
        f"write {{'pattern': {pattern!r}, 'skip': True}} to say so; hf_daq.plan(model, bits=4) lists what can be quantized"
    )
