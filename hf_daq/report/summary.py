"""`summary`: what quantization does to each layer of a model, in figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ..errors import CalibrationError, ModelError
from ..model.roles import largest_weight, saved_tensors
from ..model.unchanged import check_unchanged
from ..nn.attention import parameters_of_attention
from ..nn.experts import ExpertsLinear
from ..nn.layers import LAYER_TYPES
from ..nn.packed import daq_layers
from ..nn.quantizers import wide
from ..text import COLUMNS, SMOOTH_NOTE, Name, as_text, bits_text, cell, marked, plain, shape_text
from .measure import Measurement, bits_name, check_quantized, kept_modules, measure, paths_taken, paths_text, usable


@dataclass(frozen=True)
class LayerSummary:
    """One quantized or packed layer. What needs inputs is None without a batch, or where the batch does not reach the
    layer; what needs the float weight is None for a packed one.

    name, kind: in the model, and the float class, e.g. "Conv2d". shape: of the weight, (out, in / groups, ...).
    weight_bits, activation_bits: the latter None for inputs in float.
    smooth: by what the channel of the input that is divided most is divided before it is rounded, a power of two; None where
        none is. Bounds are those of the divided input, and of the weight that is multiplied with the same.
    parameters: how many weights.
    weight_lower, weight_upper: bounds in units of the float weight; of channels or groups the lowest and the highest.
    weight_scale: mean of |scale|.
    input_lower, input_upper, zero_point: the learned bounds in units of the input, and the code of the real zero.
    weights_clipped, inputs_clipped: share outside of the bounds, 0 to 1. Bounds of signed inputs are moved by up to half a
        step, so that zero is a code; outside of these.
    weight_codes, input_codes: how many distinct codes are in use, of 2**bits.
    weight_sqnr: signal to quantization noise of the weight in dB, `10 log10(sum w^2 / sum (w - quantized w)^2)`.
    output_sqnr: the same of outputs, float layer against quantized layer, both on the inputs the layer gets in the
        quantized network; inf where they are equal.
    float_bytes, bytes: size of the weight in its dtype, and packed: dense codes with scales in float32.
    macs: multiply-accumulates for one example, of all calls of the layer.
    path: packed layers only: how the layer computes this batch: "integers", "codes", or "unpacked", bit for bit as the
        quantized layer. path_error: the norm of the difference to the outputs of that layer, relative to theirs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int
    activation_bits: int | None
    smooth: float | None
    parameters: int
    weight_lower: float | None
    weight_upper: float | None
    weight_scale: float
    input_lower: float | None
    input_upper: float | None
    zero_point: int | None
    weights_clipped: float | None
    inputs_clipped: float | None
    weight_codes: int
    input_codes: int | None
    weight_sqnr: float | None
    output_sqnr: float | None
    float_bytes: int
    bytes: int
    macs: int | None
    path: str | None
    path_error: float | None


@dataclass(frozen=True)
class KeptLayer:
    """A layer with weights that stays in float. macs: for one example, 0 for a look-up; None without a batch, where it
    does not reach the layer, and for modules whose arithmetic is not that of a linear layer or a convolution."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    macs: int | None


@dataclass(frozen=True)
class Summary:
    """What quantization does to a model. `print(summary)` shows the figures that matter in 80 columns,
    `print(summary.to_text(wide=True))` all of them.

    layers, kept: quantized layers, and layers with weights that stay in float, in the order of `named_modules`.
    totals: `weights` and `macs`, how many by "W4A4", "W4" (inputs in float) and "float"; `other_parameters`, of
        normalization, biases and the like; `bytes_before` and `bytes_after`, of all parameters and
        persistent buffers of the float and of the packed model, tied ones once; `compression`, the first by the second; `macs_quantized`, share of all that are known.
        `macs` and `macs_quantized` are None without a batch. Products inside attention are not counted.
    """

    layers: list[LayerSummary]
    kept: list[KeptLayer]
    totals: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; "inf", "-inf" and "nan" are strings."""
        values: dict[str, Any] = plain(dataclasses.asdict(self))
        return values

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each quantized layer.

        Raises:
            ModelError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError:
            raise ModelError('to_dataframe needs pandas: pip install "hf-daq[plots]"; to_dict does without') from None
        names = [field.name for field in dataclasses.fields(LayerSummary)]
        return pandas.DataFrame([dataclasses.asdict(layer) for layer in self.layers], columns=names)

    def to_table(self, wide: bool = False) -> Group:
        """For rich: a table of layers and the totals; `wide` with all figures, in some 150 columns."""
        table, totals = _wide_table(self) if wide else _table(self), _totals_text(self, wide)
        return Group(table, totals, *_paths_text(self.layers))

    def to_text(self, wide: bool = False) -> str:
        """The same as text: in 80 columns if the figures leave room for it, or as wide as all figures are."""
        return as_text(self.to_table(wide), 0 if wide else COLUMNS)

    def __rich__(self) -> Group:
        return self.to_table()

    def __str__(self) -> str:
        return self.to_text()


def summary(model: nn.Module, batch: Any = None) -> Summary:
    """Layer by layer: bits, bounds, clipping, codes in use, noise, bytes and multiply-accumulates.

        print(hf_daq.summary(model, images))

    Printed are the figures that matter; `summary(...).to_text(wide=True)` has all. The model computes in evaluation mode, without gradients, and is left as it was.

    Args:
        model: calibrated or packed.
        batch: a tensor, a mapping of tensors for `model(**batch)`, or a tuple for `model(*batch)`; on the device of the
            model. Without it, what needs inputs is None.

    Raises:
        ModelError: nothing in the model is quantized, it is sharded, or its layers are not those of its `daq_config`. CalibrationError: a layer is not calibrated.
    """
    check_quantized(model, "summary")
    if "daq_config" in vars(model):
        check_unchanged(model, adapters=True)
    for name, layer in daq_layers(model).items():
        if not usable(layer):
            raise CalibrationError(
                f"layer {name!r} has no usable bounds: calibrate first, `with hf_daq.calibrate(model): model(batch)`; "
                "if it was calibrated before, hf_daq.health(model, batch) says what became of it"
            )
    measured, macs = measure(model, batch)
    layers = [_row(found) for found in measured]
    kept = [_kept(name, module, macs.get(name)) for name, module in kept_modules(model).items()]
    return Summary(layers, kept, _totals(model, measured, layers, kept, batch is not None))


def _row(found: Measurement) -> LayerSummary:
    a_quant, reached = found.a_quant, found.first_call is not None
    bounds = found.layer.quantizers.get("a_quant")
    seen = reached and a_quant is not None and not found.bad_inputs
    return LayerSummary(
        name=found.name,
        kind=found.kind,
        shape=found.shape,
        weight_bits=found.weight_bits,
        activation_bits=found.input_bits,
        smooth=None if found.layer.smooth is None else found.layer.smooth.max().item(),
        parameters=found.parameters,
        weight_lower=found.weight_lower,
        weight_upper=found.weight_upper,
        weight_scale=float(wide(found.scale).abs().mean()),
        input_lower=None if bounds is None else bounds.lower.item(),
        input_upper=None if bounds is None else bounds.upper.item(),
        zero_point=None if a_quant is None else a_quant.zero_point,
        weights_clipped=found.weights_clipped,
        inputs_clipped=found.clipped_inputs / found.inputs if seen and bounds is not None else None,
        weight_codes=found.weight_codes,
        input_codes=int((found.input_counts > 0).sum()) if seen else None,
        weight_sqnr=found.weight_sqnr,
        output_sqnr=found.output_sqnr,
        float_bytes=found.parameters * found.dtype.itemsize,
        bytes=found.bytes,
        macs=found.macs if reached else None,
        path=found.path,
        path_error=found.path_error,
    )


def _kept(name: str, module: nn.Module, macs: int | None) -> KeptLayer:
    weights = [value for value in _own(module) if value.ndim >= 2]
    shape = LAYER_TYPES[type(module)].weight_shape(module) if type(module) in LAYER_TYPES else None  # type: ignore[arg-type]
    count = sum(value.numel() for value in weights)
    return KeptLayer(
        name, type(module).__name__, tuple(shape or largest_weight(module).shape), count, _size(weights), macs
    )


# --------------------------------------------------------------------------------------------------------------- totals


def _totals(
    model: nn.Module, measured: list[Measurement], layers: list[LayerSummary], kept: list[KeptLayer], with_batch: bool
) -> dict[str, Any]:
    weights: dict[str, int] = {}
    macs: dict[str, int] = {}
    for found, layer in zip(measured, layers, strict=True):
        own = layer.parameters if found.layer.owner is None else 0
        weights[found.bits] = weights.get(found.bits, 0) + own
        macs[found.bits] = macs.get(found.bits, 0) + (layer.macs or 0)
    quantized = sum(macs.values())
    macs["float"] = sum(layer.macs or 0 for layer in kept)
    modules = kept_modules(model).values()
    in_float = {id(value): value for module in modules for value in _own(module) if value.ndim >= 2}
    weights["float"] = sum(value.numel() for value in in_float.values())
    inside = {id(value) for found in measured for value in saved_tensors(found.layer)}
    inside |= {id(value) for found in measured for value in parameters_of_attention(found.layer)}
    inside |= {id(value) for found in measured if found.w_quant is not None for value in _own(found.layer)}
    outside = [value for value in saved_tensors(model) if id(value) not in inside]
    other = sum(value.numel() for value in model.parameters() if id(value) not in inside | in_float.keys())
    other += sum(map(_bias, measured))
    sizes = [_sizes(found) for found in measured]
    before, after = (_size(outside) + sum(side) for side in zip(*sizes, strict=True))
    return {
        "weights": weights,
        "other_parameters": other,
        "bytes_before": before,
        "bytes_after": after,
        "compression": before / after,
        "macs": macs if with_batch else None,
        "macs_quantized": quantized / total if with_batch and (total := sum(macs.values())) else None,
    }


def _own(module: Any) -> list[Tensor]:
    """The parameters of a module that is not packed, without its children; of a layer of experts its weight, which the module around it
    holds."""
    return [module.weight] if isinstance(module, ExpertsLinear) else list(module.parameters(recurse=False))


def _bias(found: Measurement) -> int:
    """The numbers in the bias that a layer holds; that of experts is a parameter beside them."""
    return found.shape[0] if found.layer.has_bias and not isinstance(found.layer, ExpertsLinear) else 0


def _sizes(found: Measurement) -> tuple[int, int]:
    """Bytes of all that a layer holds, in float and packed."""
    layer = found.layer
    if layer.owner is not None:
        bias = _bias(found) * found.dtype.itemsize
        return bias, bias
    if found.w_quant is None:
        before = (found.parameters + _bias(found)) * found.dtype.itemsize
        return before, _size(saved_tensors(layer))
    bias = (found.shape[0] if layer.w_quant.shift is not None else _bias(found)) * found.dtype.itemsize
    own = found.a_quant is not None and layer.input_owner is None
    bounds = _size(saved_tensors(found.a_quant)) if own else 0
    values = layer.float_values() if hasattr(layer, "float_values") else _own(layer)
    return _size(values), found.bytes + bias + bounds


def _size(tensors: Any) -> int:
    return sum(value.numel() * value.dtype.itemsize for value in tensors)


# ------------------------------------------------------------------------------------------------------------- printing

_HEADERS = ("bits", "clip\nW %", "clip\nA %", "SQNR\nW dB", "SQNR\nout dB", "packed\nkB", "MACs\n10^6")
_WIDE_HEADERS = (
    *("type", "shape", "weights", "bits\nW", "bits\nA", "lower\nW", "upper\nW", "lower\nA", "upper\nA"),
    *("clip\nW %", "clip\nA %", "codes\nW", "codes\nA", "SQNR\nW dB", "SQNR\nout dB", "float\nkB", "packed\nkB"),
    "MACs\n10^6",
)


def _table(summary: Summary) -> Table:
    """The columns that matter; those without any figure are left out."""
    rows = []
    for layer in summary.layers:
        rows.append(
            (
                marked(bits_name(layer.weight_bits, layer.activation_bits), layer.smooth is not None),
                *(_cell(value, ".1f", 100) for value in (layer.weights_clipped, layer.inputs_clipped)),
                *(_cell(value, ".1f") for value in (layer.weight_sqnr, layer.output_sqnr)),
                _cell(layer.bytes, ",.1f", 1e-3),
                _cell(layer.macs, ",.2f", 1e-6),
            )
        )
    for kept in summary.kept:
        rows.append(("float", *"-" * 4, _cell(kept.bytes, ",.1f", 1e-3), _cell(kept.macs, ",.2f", 1e-6)))
    columns = [
        (header, cells) for header, cells in zip(_HEADERS, zip(*rows, strict=True), strict=True) if {*cells} != {"-"}
    ]
    table = _empty_table([header for header, _ in columns])
    names = [layer.name for layer in summary.layers] + [layer.name for layer in summary.kept]
    for name, cells in zip(names, zip(*(cells for _, cells in columns), strict=True), strict=True):
        table.add_row(Name(cell(name)), *cells)
    return table


def _wide_table(summary: Summary) -> Table:
    packed = any(layer.path for layer in summary.layers)
    table = _empty_table([*_WIDE_HEADERS, *["path"] * packed])
    for column in table.columns[1:3]:
        column.justify = "left"
    for layer in summary.layers:
        table.add_row(
            *_first_cells(layer),
            bits_text(layer.weight_bits),
            marked(bits_text(layer.activation_bits), layer.smooth is not None),
            *(_cell(value, ".3g") for value in (layer.weight_lower, layer.weight_upper)),
            *(_cell(value, ".3g") for value in (layer.input_lower, layer.input_upper)),
            *(_cell(value, ".1f", 100) for value in (layer.weights_clipped, layer.inputs_clipped)),
            *(_cell(value, "d") for value in (layer.weight_codes, layer.input_codes)),
            *(_cell(value, ".1f") for value in (layer.weight_sqnr, layer.output_sqnr)),
            *(_cell(value, ",.1f", 1e-3) for value in (layer.float_bytes, layer.bytes)),
            _cell(layer.macs, ",.2f", 1e-6),
            *[layer.path or "-"] * packed,
        )
    for kept in summary.kept:
        size = _cell(kept.bytes, ",.1f", 1e-3)
        table.add_row(
            *_first_cells(kept),
            "float",
            "float",
            *"-" * 10,
            size,
            size,
            _cell(kept.macs, ",.2f", 1e-6),
            *["-"] * packed,
        )
    return table


def _empty_table(headers: Sequence[str]) -> Table:
    table = Table("layer", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for header in headers:
        width = max(map(len, header.splitlines()))
        table.add_column(header, justify="right", no_wrap=True, min_width=width)
    return table


def _first_cells(layer: LayerSummary | KeptLayer) -> tuple[Any, ...]:
    return Name(cell(layer.name)), cell(layer.kind), shape_text(layer.shape), f"{layer.parameters:,}"


def _totals_text(summary: Summary, wide: bool) -> Text:
    totals = summary.totals
    weights = ", ".join(f"{count:,} {bits}" for bits, count in totals["weights"].items() if count)
    before, after = totals["bytes_before"] / 1e6, totals["bytes_after"] / 1e6
    legend = "W: weights, A: layer inputs; clip: outside of the bounds"
    legend += "" if totals["macs"] is None else "; MACs: of one example"
    legend += "; bounds in units of weights and inputs; codes: in use" if wide else ""
    lines = [
        "",
        legend,
        *[SMOOTH_NOTE] * any(layer.smooth is not None for layer in summary.layers),
        f"weights: {weights}; other parameters: {totals['other_parameters']:,}",
        f"size: {before:,.3f} MB in float, {after:,.3f} MB packed, {totals['compression']:.2f} times smaller",
    ]
    if totals["macs"] is not None:
        macs = ", ".join(f"{count / 1e6:,.2f} million {bits}" for bits, count in totals["macs"].items() if count)
        share = totals["macs_quantized"]
        lines.append(f"MACs: {macs or 0}" + ("" if share is None else f"; {share:.1%} quantized"))
    return Text("\n".join(lines))


def _paths_text(layers: list[LayerSummary]) -> list[Text]:
    paths, error = paths_taken(layers)
    return [Text(paths_text(paths, error))] if paths else []


def _cell(value: float | None, form: str, factor: float = 1) -> str:
    if value is None:
        return "-"
    return format(value if factor == 1 else value * factor, form)
