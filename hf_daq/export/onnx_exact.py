"""Whether an ONNX file computes the integers of its model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..model.batch import Inputs, outputs_of
from ..nn.integers import Integers, adds_in_16_bits, integers
from ..nn.layers import replaced_forwards
from ..nn.sums import squares, total
from .onnx_verify import RUNTIMES, Agreement, Comparison, Report, class_axis

_TIE = 1e-5
"""How far from a threshold float32 may round to either side, as a share of the range."""
_CODES, _OUTPUTS, _OUTPUTS_IN_FLOAT = 5e-4, 1e-3, 1e-4


@dataclass
class _Distances:
    """Of codes that a file computes from those of the model: sums over batches. All in steps of the codes."""

    excess: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor, codes: Tensor, step: Tensor, values: Integers) -> None:
        """codes: less the zero point, in floats. Rounding moves an input by half a step, and bounds clip it."""
        levels, zero = 2 ** (values.input_bits or 0) - 1, values.zero_point
        place = x.div(step).clamp_(-zero, levels - zero)
        beyond = place.sub_(codes).abs_().sub_(0.5 + _TIE * (levels + 1)).clamp_min_(0)
        self.excess += total(beyond)
        self.squares += squares(codes)
        self.count += codes.numel()

    @property
    def error(self) -> float:
        """An error d moves a share d of evenly spread values to another code, by d / 2 beyond the threshold on average:
        twice the mean excess is the mean square of the error. Here its root over the RMS of the input."""
        count = max(self.count, 1)
        return float((2 * self.excess / count) ** 0.5 / max((self.squares / count) ** 0.5, 1.0))


@dataclass
class _File:
    """The codes that a file computes for a batch, by their names; and what was seen of them.

    merges: whether there are layers without codes of their own.
    """

    merges: bool = False
    codes: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    merged: list[tuple[Integers, Tensor, Tensor]] = field(default_factory=list)
    distances: dict[str, _Distances] = field(default_factory=dict)

    def start(self, codes: Mapping[str, Tensor]) -> None:
        self.codes, self.calls, self.merged = dict(codes), {}, []

    def of_call(self, name: str, values: Integers, own: Callable[[], Tensor]) -> Tensor | None:
        """The codes of the next call of a layer. Quantizers that do the same to the same input are one in the file."""
        number = self.calls[name] = self.calls.get(name, -1) + 1
        found = self.codes.get(f"{name}.input_codes" + (f".{number}" if number else ""))
        if found is not None:
            if self.merges:
                self.merged.append((values, own(), found))
            return found
        alike = ((known, codes) for other, known, codes in self.merged if _same(values, other))
        return next((codes for known, codes in alike if torch.equal(own(), known)), None)


def _same(one: Integers, other: Integers) -> bool:
    return torch.equal(one.input_scale, other.input_scale) and (one.input_bits, one.zero_point) == (
        other.input_bits,
        other.zero_point,
    )


class _OnCodes:
    """The forward of a layer on the codes that the file computes for its input."""

    def __init__(self, layer: Any, name: str, file: _File) -> None:
        self.layer, self.name, self.file, self.values = layer, name, file, integers(layer)
        weight, scale = self.values.weight.flatten(1), self.values.weight_scale
        if self.values.group_size is not None:
            scale = scale.repeat_interleave(self.values.group_size, 1)[:, : weight.shape[1]]
        self.weight = (weight * scale).view(self.values.weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        values, quantizer = self.values, self.layer.a_quant
        found = self.file.of_call(self.name, values, lambda: quantizer.codes(x))
        found = found if found is not None and found.shape == x.shape else None
        codes = (quantizer.codes(x) if found is None else found).to(x.device, torch.float32)
        codes.sub_(values.zero_point)
        step = quantizer.scale(x) if values.tokens else values.input_scale
        if found is not None:
            self.file.distances.setdefault(self.name, _Distances()).add(self.layer.smoothed(x), codes, step, values)
        output: Tensor = self.layer.compute(codes.mul_(step), self.weight, values.bias)
        return output


def check_exact(
    report: Report,
    model: nn.Module,
    layers: Mapping[str, Any],
    proto: Any,
    batch: Inputs,
    runtime: str,
    batches: int | None = None,
) -> Agreement:
    """Refuse a file that differs from the integers of the model by more than codes at thresholds explain.

    The model computes with the codes of the file, so that a code at a threshold changes nothing behind it, however large
    the network.

    Args:
        batches: how many of the inputs are compared; None for all.

    Returns:
        How close the outputs are.
    """
    from onnx import TensorProto

    from .onnx_graph import input_codes, with_outputs

    names = input_codes(proto)
    compute = RUNTIMES[runtime](with_outputs(proto, names, TensorProto.UINT8))
    quantized = {name: layer for name, layer in layers.items() if layer.a_quant is not None}
    file = _File(merges=not {f"{name}.input_codes" for name in quantized} <= set(names))
    forwards, comparison = {layer: _OnCodes(layer, name, file) for name, layer in quantized.items()}, Comparison()
    for tensors in islice(batch.batches(), batches):
        found = compute(tensors)
        outputs, codes = found[: len(found) - len(names)], found[len(found) - len(names) :]
        file.start({name: torch.from_numpy(values.copy()) for name, values in zip(names, codes, strict=True)})
        with replaced_forwards(forwards):
            expected = [value.cpu().numpy() for value in outputs_of(model, batch, tensors)]
        comparison.add(expected, outputs, class_axis(model, batch, expected[0]))
    agreement = comparison.result()
    wrong = [name for name, distances in file.distances.items() if not distances.error <= _CODES]
    if wrong or not agreement.error <= (_OUTPUTS if forwards else _OUTPUTS_IN_FLOAT):
        where = (
            f"codes of the input of layer {wrong[0]!r} are others than what comes before them in the file gives, and not only at "
            "thresholds"
            if wrong
            else f"on the codes of the file, outputs differ by {agreement.error:.1e}, more than rounding explains"
        )
        why = (
            f"This processor has no VNNI instructions: {runtime} adds pairs of products in 16 bits here, and cuts off what is too large "
            "for them, as products of 8-bit inputs and weights are. Take weight_bits=7, or compare on another processor "
            '(verify=False, or runtimes=["onnxruntime"]).'
            if report.large_sums and adds_in_16_bits()
            else f"This is a fault of the export or of {runtime}: try another `runtime=`, or leave what stands before it in float, and "
            "report it."
        )
        raise ExportError(
            f"{runtime}: the file computes something else than the model: {where}. {why} Nothing was written.\n{report}"
        )
    return agreement
