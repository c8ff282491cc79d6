"""`calibrate`: initial bounds and scales of every quantizer, from the weights and from batches of real inputs."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import DaqConfig
from .errors import CalibrationError, ModelError
from .model.batch import Call
from .model.guards import ORDER, processes, refuse_wrapped
from .nn.init import activation_bounds, start_from_weight
from .nn.layers import LAYER_TYPES, QuantizedLayer, evaluating, quantized_layers
from .nn.quantizers import ActivationQuantizer, WeightQuantizer, is_shard
from .nn.swap import change_class
from .report.health import health

logger = logging.getLogger("hf_daq")
_BINS = 8192
_SAMPLES = 2**20
_SMALLEST_EXPONENT = -126


@contextmanager
def calibrate(model: nn.Module, *, check: bool = True) -> Iterator[nn.Module]:
    """Set bounds and scales from every batch that goes through the model inside the context.

        with hf_daq.calibrate(model):
            for images, _ in islice(loader, 8):
                model(images)

    Inside, the model computes in full precision, in evaluation mode and without gradients, while the inputs of each
    quantized layer are recorded as histograms. At the end the bounds are set, the batches are run once more to match
    the mean absolute output of each quantized layer to the float one (the paper's start of its output scale) and the
    mean of each output channel (`bias_correction`), and training mode is what it was before. Under `torch.distributed`
    all statistics are reduced, so every rank ends with the same values; a rank may bring no batch at all, if each layer
    is reached on some rank. The inputs given to the model are kept until the end. If the body raises, the quantizers
    stay as they were.

    Batch normalization uses its running statistics here. A network that was never trained has none worth the name: give
    it some forwards in training mode first.

    Args:
        model: a model after `apply_daq`, before it is wrapped or prepared.
        check: at the end run `health` on the last batch, and log a warning for each finding.

    Raises:
        ModelError: the model is not quantized, or already wrapped or sharded.
        CalibrationError: a layer was not reached, or its inputs or weights are not finite.
    """
    layers = quantized_layers(model)
    config: DaqConfig | None = getattr(model, "daq_config", None)
    if not layers or config is None:
        raise ModelError(
            f"calibrate needs the model that apply_daq returned, not a float, wrapped or packed one; order: {ORDER}"
        )
    refuse_wrapped(model)
    if any(is_shard(layer.weight) for layer in layers.values()):
        raise ModelError(f"calibrate cannot see through a sharded model; the order is: {ORDER}")
    observers = {name: _Observer(layer.weight.device) for name, layer in layers.items()}
    batches: list[Call] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches.append(Call(_copied(args), _copied(kwargs)))

    with evaluating(model):
        with torch.no_grad(), _float_layers(layers.values()):
            hooks = [layer.register_forward_pre_hook(observers[name].observe) for name, layer in layers.items()]
            hooks.append(model.register_forward_pre_hook(record, with_kwargs=True))
            try:
                yield model
            finally:
                for hook in hooks:
                    hook.remove()
            _reduce(observers)
            values = {name: _initial_values(name, layer, observers[name], config) for name, layer in layers.items()}
            probe = Call(*map(_copied, batches[-1])) if check and batches else None  # a forward may change a cache
            _match_outputs(model, layers, values, batches)
        for name, layer in layers.items():
            _write(layer, values[name])
    if probe is not None and (processes() == 1 or dist.get_rank() == 0):
        for finding in health(model, probe).findings:
            logger.warning("after calibration, layer %r: %s", finding.layer, finding.message)


class _Observer:
    """What a layer's inputs look like: count, range, moments, and a histogram over [-2**k, 2**k) that grows with them."""

    def __init__(self, device: torch.device) -> None:
        self.exponent = _SMALLEST_EXPONENT
        self.extremes = torch.full((2,), -math.inf, device=device)  # -min, max
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)  # count, sum, sum of squares
        self.histogram = torch.zeros(_BINS, device=device, dtype=torch.float64)

    def observe(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float().flatten()
        if x.numel() == 0:
            return
        low, high = x.aminmax()
        self.extremes = torch.maximum(self.extremes, torch.stack([-low, high]))
        total, squares = x.sum(dtype=torch.float64), torch.linalg.vector_norm(x, dtype=torch.float64).square()
        self.sums += torch.stack([total.new_tensor(x.numel()), total, squares])
        largest = float(torch.maximum(-low, high))
        if math.isfinite(largest):
            self.grow(math.frexp(largest)[1] if largest > 0 else _SMALLEST_EXPONENT)
            samples = x[:: (x.numel() // _SAMPLES) | 1]
            edge = 2.0**self.exponent
            counts = torch.histc(samples, _BINS, -edge, edge).double()
            self.histogram += counts * (x.numel() / samples.numel())

    def grow(self, exponent: int) -> None:
        """Widen the range to [-2**exponent, 2**exponent), merging bins in pairs around the middle."""
        if not self.histogram.any():
            self.exponent = max(self.exponent, exponent)
        while self.exponent < exponent:
            merged = self.histogram.view(-1, 2).sum(1)
            self.histogram = nn.functional.pad(merged, (_BINS // 4, _BINS // 4))
            self.exponent += 1

    def centers(self) -> Tensor:
        edge = 2.0**self.exponent
        steps = torch.arange(_BINS, device=self.histogram.device, dtype=torch.float64) + 0.5
        return steps.mul_(2 * edge / _BINS).sub_(edge)


def _reduce(observers: dict[str, _Observer]) -> None:
    """Join the statistics of all ranks."""
    for observer in observers.values():
        exponent = torch.tensor(observer.exponent, device=observer.sums.device)
        _all_reduce(exponent, dist.ReduceOp.MAX)
        observer.grow(int(exponent))
        _all_reduce(observer.extremes, dist.ReduceOp.MAX)
        _all_reduce(observer.sums, dist.ReduceOp.SUM)
        _all_reduce(observer.histogram, dist.ReduceOp.SUM)


def _all_reduce(tensor: Tensor, operation: Any) -> None:
    """Reduce over all ranks in place; nothing to do in a process that is alone."""
    if processes() > 1:
        dist.all_reduce(tensor, operation)


@dataclass
class _Values:
    """Quantizers of one layer with their initial values, before they are written to the layer."""

    w_quant: WeightQuantizer
    a_quant: ActivationQuantizer | None


def _initial_values(name: str, layer: QuantizedLayer, observer: _Observer, config: DaqConfig) -> _Values:
    count, total, squares = observer.sums.tolist()
    low, high = -float(observer.extremes[0]), float(observer.extremes[1])
    if count == 0:
        raise CalibrationError(
            f"calibration never reached layer {name!r}; run the model inside `with hf_daq.calibrate(model):` on inputs "
            f"that use it, or keep it in full precision: DaqConfig(..., modules_to_not_convert=[{name!r}])"
        )
    if not math.isfinite(squares):
        raise CalibrationError(f"the inputs of layer {name!r} have NaN or infinite values (from {low} to {high})")
    weight = _quantized_class(layer).float_weight(layer)
    if not weight.isfinite().all():
        raise CalibrationError(f"the weight of layer {name!r} has NaN or infinite values")
    w_quant, a_quant = copy.deepcopy(layer.w_quant), copy.deepcopy(layer.a_quant)
    start_from_weight(w_quant, weight, config.weight_init)
    if a_quant is not None:
        if low == 0 and high == 0:
            warnings.warn(
                f"layer {name!r} saw only zeros in calibration; its input bounds start at 0 and 1", stacklevel=4
            )
            bounds = (0.0, 1.0)
        elif config.activation_init == "3std":
            reach = 3 * math.sqrt(max(squares / count - (total / count) ** 2, 0.0)) or high
            bounds = (-reach if low < 0 else 0.0, reach)
        else:
            bounds = activation_bounds(observer.centers(), observer.histogram, low, high, a_quant.bits)
        a_quant.lower.fill_(bounds[0])
        a_quant.upper.fill_(bounds[1])
        a_quant.finish()
        w_quant.scale.mul_(a_quant.span)
    return _Values(w_quant, a_quant)


def _match_outputs(
    model: nn.Module, layers: dict[str, QuantizedLayer], values: dict[str, _Values], batches: list[Call]
) -> None:
    """Run the batches again to match each quantized layer to its float form on the same inputs: the mean absolute
    output by the scale, and then the mean of every output channel by the shift."""
    weights = {name: v.w_quant(_quantized_class(layers[name]).float_weight(layers[name])) for name, v in values.items()}
    sums = {name: _OutputSums(values[name].w_quant, len(weight)) for name, weight in weights.items()}

    def compare(name: str, layer: Any, x: Tensor, output: Tensor) -> None:
        a_quant = values[name].a_quant
        quantized = _quantized_class(layer).compute(layer, x if a_quant is None else a_quant(x), weights[name], None)
        sums[name].add(0, layer, output, layer.bias)
        sums[name].add(1, layer, quantized, None)

    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: compare(name, layer, args[0], output))
        for name, layer in layers.items()
    ]
    try:
        for args, kwargs in batches:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, found in sums.items():
        ratio, full, quantized = found.match()
        w_quant = values[name].w_quant
        w_quant.scale.mul_(ratio.repeat_interleave(w_quant.groups))
        if w_quant.shift is not None:
            w_quant.shift.copy_(full - ratio * quantized)


class _OutputSums:
    """Sums over all batches of float (row 0) and quantized (row 1) outputs, and their absolute values, per channel."""

    def __init__(self, w_quant: WeightQuantizer, channels: int) -> None:
        self.per_layer = w_quant.granularity == "tensor"
        self.sums = torch.zeros(2, 3, channels, device=w_quant.scale.device, dtype=torch.float64)

    def add(self, side: int, layer: nn.Module, output: Tensor, bias: Tensor | None) -> None:
        """Add an output of the layer, less the bias that is in it."""
        output = output.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).float()
        if bias is not None:
            output = output - bias.float()[:, None]
        count = output.new_full((len(output),), output.shape[1])
        self.sums[side] += torch.stack([output.sum(1), output.abs().sum(1), count])

    def match(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ratio of the mean absolute outputs, of the layer or a channel, and each channel's float and quantized mean."""
        _all_reduce(self.sums, dist.ReduceOp.SUM)
        full, quantized = self.sums[:, 1].sum(1, keepdim=True) if self.per_layer else self.sums[:, 1]
        usable = (full > 0) & (quantized > 0)
        means = self.sums[:, 0] / self.sums[:, 2]
        return torch.where(usable, full / quantized, 1.0), means[0], means[1]


def _quantized_class(layer: nn.Module) -> type[QuantizedLayer]:
    return LAYER_TYPES[type(layer)]


def _write(layer: QuantizedLayer, values: _Values) -> None:
    layer.w_quant.load_state_dict(values.w_quant.state_dict())
    if layer.a_quant is not None and values.a_quant is not None:
        layer.a_quant.load_state_dict(values.a_quant.state_dict())


@contextmanager
def _float_layers(layers: Collection[QuantizedLayer]) -> Iterator[None]:
    """The layers compute with their float classes inside."""
    classes: list[tuple[Any, type]] = [(layer, type(layer)) for layer in layers]
    try:
        for layer, _ in classes:
            change_class(layer, layer.float_class)
        yield
    finally:
        for layer, quantized_class in classes:
            change_class(layer, quantized_class)


def _copied(value: Any) -> Any:
    """A copy that the model cannot change, as it does with key-value caches, and no loader writes over."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(_copied(item) for item in value) if type(value) in (list, tuple) else copy.deepcopy(value)
