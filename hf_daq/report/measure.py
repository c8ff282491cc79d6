"""`measure`: one pass over a quantized model, from which `summary` and `health` take their figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config import packed_bytes
from ..errors import ModelError
from ..model.batch import examples_in, run
from ..model.guards import ORDER
from ..model.macs import first_tensor, macs_of, macs_of_projections
from ..model.roles import weight_modules
from ..nn.base import layer_input, refuse_adapted_weights
from ..nn.init import spread
from ..nn.layers import CONVOLUTIONS, TRANSPOSED, QuantizedLayer, evaluating, replaced_forwards
from ..nn.packed import daq_layers
from ..nn.quantizers import is_shard, wide
from ..nn.sums import count_bad, squares

_SAMPLES = 2**16
_EXACT = 1e-10  # of the energy of the output: -100 dB


@torch.no_grad()
def measure(model: nn.Module, batch: Any = None) -> tuple[list[Measurement], dict[str, int]]:
    """Figures of all quantized layers from one pass of the batch, and the multiply-accumulates for one example of layers
    that stay in float. A layer without usable bounds computes in float, so that the layers behind it still get
    inputs. The model has passed `check_quantized`."""
    refuse_adapted_weights(model, "measured")
    macs: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(left_as_it_was(model))
        measured = [Measurement(name, layer) for name, layer in daq_layers(model).items()]
        if batch is not None:
            examples = examples_in(batch)
            if examples == 0:
                raise ModelError(
                    "the batch has no examples: its first tensor has length 0; pass a batch of a few dozen"
                )
            stack.enter_context(
                replaced_forwards({found.layer: found.in_float for found in measured if found.in_float})
            )
            calls = iter(range(2**62))
            for found in measured:
                hook = found.layer.register_forward_hook(_observing(found, calls), prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            for name, module in kept_modules(model).items():
                stack.callback(
                    module.register_forward_hook(_counting(name, macs), prepend=True, with_kwargs=True).remove
                )
            run(model, batch)
            for found in measured:
                found.macs = round(found.macs / examples)
            macs = {name: round(count / examples) for name, count in macs.items()}
    return measured, macs


def kept_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with weights that stay in float, by name."""
    return {name: module for name, module in weight_modules(model) if not isinstance(module, QuantizedLayer)}


class Measurement:
    """Figures of one layer. Those of its inputs and outputs are sums over calls; `first_call` is its place among the
    first calls of all layers, None if there was none.

    largest_channel: root mean square of the weights of the largest output channel, by that of the median one.
    signal, noise: sums of squares of the float layer's output, and of its difference to the quantized one's.
    distinct_weights, distinct_inputs: distinct values the layer computes with, the most under one scale, and in one call.
    bad_weights, bad_inputs, bad_outputs: how many are NaN or infinite.
    path, path_error: packed layers only: the way the last call took, and the largest relative difference of the outputs to
        those of the quantized layer.
    """

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer, self.w_quant, self.a_quant = name, layer, layer.w_quant, layer.a_quant
        self.kind = layer.float_class.__name__
        self.shape: tuple[int, ...] = layer.weight_shape()
        self.parameters = math.prod(self.shape)
        self.dtype: torch.dtype = layer.weight_dtype
        self.weight_bits: int = layer.weight_bits
        self.input_bits: int | None = layer.input_bits
        self.scale: Tensor = layer.weight_scale
        self.usable = usable(layer)
        self.in_float: Callable[[Tensor], Tensor] | None = (
            None if self.usable or self.w_quant is None else self.float_output
        )
        self.first_call: int | None = None
        self.macs = self.inputs = self.outputs = self.bad_inputs = self.bad_outputs = self.bad_weights = 0
        self.clipped_inputs = self.negative_inputs = self.distinct_weights = self.distinct_inputs = (
            self.weight_codes
        ) = 0
        self.signal = self.noise = 0.0
        self.bypassed = 0
        self.path: str | None = None
        self.path_error: float | None = None
        self.channels: Tensor | None = None
        self.weight_lower: float | None = None
        self.weight_upper: float | None = None
        self.weights_clipped: float | None = None
        self.largest_channel: float | None = None
        self.weight_sqnr: float | None = None
        self.input_counts = torch.zeros(2 ** (self.input_bits or 0), dtype=torch.int64, device=self.scale.device)
        self._look_at_weight()

    def _look_at_weight(self) -> None:
        layer = self.layer
        if self.w_quant is not None:
            weight = wide(layer.float_weight())
            self.bad_weights = count_bad(weight)
        if self.bad_weights or not self.usable:
            return
        codes = layer.codes()
        self.weight_codes = int((torch.bincount(codes.flatten()) > 0).sum())
        quantized = layer.quantized_weight()
        self.distinct_weights = _distinct(self._rows_of_scales(quantized))
        if self.w_quant is not None:
            lower, upper = layer.w_quant.bounds(weight)
            self.weight_lower, self.weight_upper = float(lower.min()), float(upper.max())
            clipped = layer.w_quant.outside(layer.w_quant.positions(weight)).count_nonzero()
            self.weights_clipped = int(clipped) / weight.numel()
            energy = torch.linalg.vector_norm(weight.flatten(1), dim=1)
            self.largest_channel = float(energy.max() / energy.median())
            quantized = wide(quantized) / layer.span
            self.weight_sqnr = decibels(squares(weight), squares(weight - quantized))

    def _rows_of_scales(self, weight: Tensor) -> Tensor:
        """The values that share a scale in a row, groups filled up with their last one."""
        flat = weight.reshape(1 if self.scale.numel() == 1 else len(weight), -1)
        size = self.layer.group_size
        if size is None:
            return flat
        missing = -flat.shape[1] % size
        return torch.cat([flat, flat[:, -1:].expand(-1, missing)], 1).view(-1, size)

    def float_output(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer.in_float(x)
        return output

    def observe(self, x: Tensor, output: Tensor) -> None:
        """Take note of one call."""
        bad = count_bad(x)
        self.inputs += x.numel()
        self.outputs += output.numel()
        self.bad_inputs += bad
        self.bad_outputs += count_bad(output)
        self.macs += macs_of(self.layer, x, output) or 0
        if bad or not self.usable:
            return
        if self.a_quant is not None:
            self._look_at_inputs(self.a_quant, x)
        if self.w_quant is None:
            self._look_at_path(x, output)
        elif not self.bad_weights:
            reference = wide(self.float_output(x))
            signal, noise = squares(reference), squares(reference - wide(output))
            self.signal += signal
            self.noise += noise
            self.bypassed += noise < _EXACT * signal and self._deviates(x, reference)

    def _look_at_path(self, x: Tensor, output: Tensor) -> None:
        self.path = self.layer.path(x)
        expected = wide(self.layer.as_quantized(x))
        energy, difference = squares(expected), squares(wide(output) - expected)
        error = math.sqrt(difference / energy) if energy > 0 else math.inf if difference > 0 else 0.0
        self.path_error = max(self.path_error or 0.0, error)

    def _deviates(self, x: Tensor, reference: Tensor) -> bool:
        """Whether what the quantizers give is not this float output, which a shift can match on a few positions."""
        layer = self.layer
        bias = layer.w_quant.shifted(layer.bias, self.dtype)
        expected = layer.compute(x if self.a_quant is None else self.a_quant(x), layer.quantized_weight(), bias)
        return squares(reference - wide(expected)) > 100 * _EXACT * squares(reference)

    def _look_at_inputs(self, a_quant: Any, x: Tensor) -> None:
        self.input_counts += torch.bincount(a_quant.codes(x).flatten(), minlength=2**a_quant.bits)
        self.clipped_inputs += int(a_quant.outside(a_quant.positions(x)).count_nonzero())
        self.negative_inputs += int((x < 0).count_nonzero())
        values, channel = wide(x), self._channel_dim()
        values, noise = self.layer.smoothed(values), wide(a_quant(values)) * a_quant.span
        noise -= values
        energies = torch.stack([part.movedim(channel, 0).flatten(1).square().sum(1) for part in (values, noise)])
        self.channels = energies if self.channels is None else self.channels + energies
        quantize, rows = a_quant if a_quant.smooth is None else a_quant.rounded, self.layer.smoothed(x).reshape(1, -1)
        self.distinct_inputs = max(self.distinct_inputs, _distinct(quantize(_sample(rows))))

    def _channel_dim(self) -> int:
        convolution = issubclass(self.layer.float_class, CONVOLUTIONS + TRANSPOSED)
        return -1 - len(self.layer.kernel_size) if convolution else -1

    @property
    def output_sqnr(self) -> float | None:
        """In dB, None where nothing could be compared."""
        bad = self.w_quant is None or not self.usable or self.bad_inputs or self.bad_weights
        return decibels(self.signal, self.noise) if self.inputs and not bad else None

    @property
    def bits(self) -> str:
        """Of weight and inputs, e.g. "W4A8"; "W4" for inputs in float."""
        return bits_name(self.weight_bits, self.input_bits)

    @property
    def bytes(self) -> int:
        """Of codes and scales in a packed file; 0 where they are those of an embedding."""
        if self.layer.owner is not None:
            return 0
        return packed_bytes(self.parameters, self.weight_bits, self.scale.numel(), self.layer.weight_grid)


def bits_name(weight_bits: int, input_bits: int | None) -> str:
    """The field's short form."""
    return f"W{weight_bits}" if input_bits is None else f"W{weight_bits}A{input_bits}"


def paths_taken(layers: Iterable[Any]) -> tuple[dict[str, int], float | None]:
    """How many packed layers took each path, and the largest error of one; nothing and None without packed layers."""
    taken = [layer for layer in layers if layer.path is not None]
    return dict(Counter(layer.path for layer in taken)), max((layer.path_error for layer in taken), default=None)


def paths_text(paths: dict[str, int], error: float | None) -> str:
    """What `paths_taken` found, in words."""
    words = {
        "bfloat16 scales": "with bfloat16 scales",
        "integers": "in integers",
        "codes": "from codes",
        "unpacked": "unpacked",
    }
    counts = [f"{paths[path]} {word}" for path, word in words.items() if path in paths]
    first, *others = counts
    layers = "layer" if first.startswith("1 ") else "layers"
    text = ", ".join([first.replace(" ", f" {layers} ", 1), *others])
    return f"packed: {text}; largest error of a layer {f'{error:.0e}' if error else 0}"


def usable(layer: Any) -> bool:
    """Whether the layer has bounds and scales to compute with. Looks at the values, which training may have spoilt."""
    quantizers = list(layer.quantizers.values())
    values: list[Tensor] = [value for quantizer in quantizers for value in quantizer.parameters()]
    values += [layer.weight_scale] if layer.w_quant is None else []
    ordered = all(bool((part.lower < part.upper).all()) and part.calibrated for part in quantizers)
    return ordered and not any(map(count_bad, values))


def decibels(signal: float, noise: float) -> float:
    """`10 log10(signal / noise)`; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def check_quantized(model: nn.Module, function: str) -> None:
    layers = daq_layers(model)
    if not layers:
        raise ModelError(
            f"{function} needs a quantized or packed model, and no layer of this {type(model).__name__} is; order: {ORDER}"
        )
    for name, layer in layers.items():
        values = layer.state_dict(keep_vars=True).values()
        if any(map(is_shard, values)):
            raise ModelError(
                f"{function} needs whole weights, but those of {name!r} are sharded: gather and save them, state_dict = "
                "accelerator.get_state_dict(model), then on the main process hf_daq.save_pretrained(model, folder, "
                f"state_dict=state_dict), and call {function} where one process opens that folder"
            )
        if any(value.is_meta for value in values):
            raise ModelError(f"{function} needs whole weights, but those of {name!r} are on the meta device")


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, and hooks are called in compiled models too. Random numbers, and the weights that layers
    hold for their next call, are not touched."""
    layers = [layer for layer in daq_layers(model).values() if isinstance(layer, QuantizedLayer)]
    cached = [vars(layer).get("_kept") for layer in layers]
    devices = {value.device.index for value in model.parameters() if value.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), evaluating(model), _uncompiled(model):
            yield
    finally:
        for layer, weight in zip(layers, cached, strict=True):
            vars(layer).pop("_kept", None)
            if weight is not None:
                vars(layer)["_kept"] = weight


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    compiled = any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _observing(found: Measurement, calls: Iterator[int]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        x = layer_input(args, named).to(found.scale.device)  # Accelerate moves inputs inside of the forward
        if x.numel() > 0:
            found.first_call = next(calls) if found.first_call is None else found.first_call
            found.observe(x, output.to(x.device))

    return hook


def _counting(name: str, macs: dict[str, int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            count: int | None = sum(macs_of_projections(module, args, named)[:3])
        else:
            count = macs_of(module, first_tensor(args, named), output)
        if count is not None:
            macs[name] = macs.get(name, 0) + count

    return hook


def _sample(rows: Tensor) -> Tensor:
    return rows[:, spread(rows.shape[1], _SAMPLES, rows.device)]


def _distinct(rows: Tensor) -> int:
    """How many distinct values a sample of a row has, in the row that has most."""
    ordered = _sample(rows).sort(1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(1).max()) + 1
