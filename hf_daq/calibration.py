"""`calibrate`: initial bounds and scales of every quantizer, from the weights and from batches of real inputs."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .apply import tell_transformers
from .config import DaqConfig
from .errors import CalibrationError, ModelError
from .model.batch import Calls
from .model.guards import ORDER, refuse_wrapped
from .model.recording import Recorder
from .model.siblings import Readers, find_siblings
from .nn.base import layer_input, refuse_adapted_weights, weight_problem
from .nn.experts import DaqExpertsLinear
from .nn.init import activation_bounds, start_from_weight
from .nn.layers import QuantizedLayer, evaluating, quantized_layers
from .nn.leaf import ONLOAD
from .nn.matching import OutputMatch, usual_weights
from .nn.observers import InputSample, Statistics, all_reduce, limit_together
from .nn.quantizers import ActivationQuantizer, WeightQuantizer, is_shard, processes
from .nn.siblings import regroup
from .nn.smoothing import GAIN, candidates, statistics
from .nn.swap import change_class, uninterrupted
from .nn.token import TokenQuantizer
from .report.health import examine

logger = logging.getLogger("hf_daq")
_EXPERT_ROWS = 64  # of the sample of each expert, at least


@contextmanager
def calibrate(model: nn.Module, *, check: bool = True) -> Iterator[nn.Module]:
    """Set bounds and scales from every batch that goes through the model inside the context.

        with hf_daq.calibrate(model):
            for images, _ in islice(loader, 8):
                model(images)

    Inside, the model computes in full precision, in evaluation mode and without gradients, while statistics of the inputs
    of each quantized layer are taken. Whatever runs the layers counts: the model's own call, `generate`,
    `forward_features`, a part of the model. Padding tokens, which a 2-dimensional `attention_mask` names, do not count.

    At the end the bounds are set, and each quantized layer is matched to the float one on a random sample of its inputs:
    its output by a scale, and each output channel by a shift (`bias_correction`), where that lowers the squared error of
    the output over all positions and at the typical position; else they are left out. Where single channels of the inputs of
    linear layers are outliers, and it lowers these errors by a fifth, inputs are divided by powers of two, one a channel
    (`smooth`). With `weight_init="3std"` the scale is the paper's: the mean absolute output is that of the float layer. Memory
    does not grow with the number of batches: at most 2**22 inputs (or 1024 rows) of each layer are kept, and 2**28 of all (or
    256 rows of each).

    Under `torch.distributed` all statistics are reduced, so every rank ends with the same values; a rank may bring no
    batch at all, if each layer is reached on some rank. If anything raises, the quantizers stay as they were. Quantizer
    parameters that do not require gradients still do not afterwards.

    Embeddings have no such inputs: their bounds start from their weights. With `activation_scale="token"` inputs need no
    bounds, and calibration is no must: it still matches scales and outputs to the float layers.

    Batch normalization uses its running statistics here. A network that was never trained has none worth the name: give
    it some forwards in training mode first.

    Args:
        model: a model after `apply_daq`, before it is wrapped or prepared.
        check: at the end run `health` on the last batch, and log a warning for each alarm.

    Raises:
        ModelError: the model is not quantized, or already wrapped, sharded or offloaded.
        CalibrationError: a layer was not reached, or its inputs or weights are not finite.
    """
    layers = quantized_layers(model)
    config: DaqConfig | None = getattr(model, "daq_config", None)
    if not layers or config is None:
        raise ModelError(
            f"calibrate needs the model that apply_daq returned, not a float, wrapped or packed one; order: {ORDER}"
        )
    refuse_wrapped(model)
    refuse_adapted_weights(model, "calibrated")
    if any(is_shard(layer.first_parameter) for layer in layers.values()):
        raise ModelError(f"calibrate cannot see through a sharded model; the order is: {ORDER}")
    if any(layer.weight.is_meta for layer in layers.values()):
        raise ModelError(f"calibrate needs the weights, and the model is offloaded; {ONLOAD}")
    recorder, readers = Recorder(model, keep_calls=check), Readers()
    observers = {
        name: (_ExpertsObserver if isinstance(layer, DaqExpertsLinear) else _Observer)(layer, recorder)
        for name, layer in layers.items()
        if layer.owner is None and not isinstance(layer, nn.Embedding)
    }
    limit_together(sample for observer in observers.values() for sample in observer.samples)
    hooks = [layers[name].register_forward_pre_hook(observer, with_kwargs=True) for name, observer in observers.items()]
    # Experts read what their router gave to each.
    dense = {name: layers[name] for name in observers if not isinstance(layers[name], DaqExpertsLinear)}
    hooks += [layer.register_forward_pre_hook(readers.hook(name), with_kwargs=True) for name, layer in dense.items()]
    try:
        with evaluating(model), torch.no_grad(), _float_layers(layers.values()):
            yield model
    finally:
        for hook in hooks:
            hook.remove()
        recorder.remove()
    with torch.no_grad():
        own = {name: layer for name, layer in layers.items() if layer.owner is None}
        values = {
            name: _from_weight(layer, _checked_weight(name, layer), config)
            for name, layer in own.items()
            if name not in observers
        }
        groups = find_siblings(model, dense, readers)
        grouped = {name for group in groups for name in group}
        for group in (*groups, *([name] for name in observers if name not in grouped)):
            values |= _initial_values({name: own[name] for name in group}, observers, config)
            for name in group:
                del observers[name]  # its inputs
        with uninterrupted():
            _share(model, own, groups, values)
            for name, layer in own.items():
                _write(layer, values[name])
    if check:
        _warn(model, recorder.calls)


class _Observer:
    """The inputs of one layer, as a hook before its forward."""

    def __init__(self, layer: QuantizedLayer, recorder: Recorder) -> None:
        self.recorder, self.lock = recorder, Lock()
        self.statistics = Statistics(layer.weight.device)
        self.samples = [InputSample(layer, layer.weight_shape())]

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = layer_input(args, kwargs).detach().to(self.statistics.sums.device)
        x = self.recorder.attended(x)
        if x.numel() > 0:
            with self.lock:
                self.statistics.add(x)
                self.samples[0].add(x)

    def parts(self, weight: Tensor) -> list[Tensor]:
        """The weight of each sample."""
        return [weight]

    def outputs(self, weight: Tensor, a_quant: nn.Module | None = None) -> list[Tensor]:
        """Of each sample, without a bias."""
        return [
            sample.output(sample.rows if a_quant is None else a_quant(sample.rows), part)
            for sample, part in zip(self.samples, self.parts(weight), strict=True)
        ]


class _ExpertsObserver(_Observer):
    """The inputs of one layer of all experts: a sample for each expert, and statistics over all of them."""

    def __init__(self, layer: Any, recorder: Recorder) -> None:
        self.layer, self.recorder = layer, recorder
        self.statistics = Statistics(layer.weight.device)
        experts, out, columns = layer.sizes
        self.samples = [InputSample(layer, (out, columns)) for _ in range(experts)]
        for sample in self.samples:
            sample.limit = max(sample.limit // experts, _EXPERT_ROWS)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x, routing = layer_input(args, kwargs).detach(), self.layer.routing
        tokens = routing.token_count
        kept = self.recorder.kept_tokens(tokens, x.device)
        kept = torch.ones(tokens, dtype=torch.bool, device=x.device) if kept is None else kept
        pairs = kept[routing.tokens]
        seen = x[kept if routing.by_token else pairs]
        if seen.numel() > 0:
            self.statistics.add(seen)
        sizes = routing.sizes()
        parts = torch.split(routing.rows(x), sizes), torch.split(pairs, sizes)
        for sample, rows, own in zip(self.samples, *parts, strict=False):
            if own.any():
                sample.add(rows[own])

    def parts(self, weight: Tensor) -> list[Tensor]:
        return list(weight.reshape(self.layer.sizes))


def _warn(model: nn.Module, calls: Calls) -> None:
    """Log what `health` finds, on the first rank that has seen a batch. In a model that is fine as a whole, a noisy layer is no
    warning."""
    rank = dist.get_rank() if processes() > 1 else 0
    first = torch.tensor(rank if calls else processes(), device=next(model.parameters()).device)
    all_reduce(first, dist.ReduceOp.MIN)
    if calls and rank == int(first):
        found = examine(model, calls, calibrated_now=True)
        logger.log(logging.INFO if found.ok else logging.WARNING, "after calibration, network: %s", found.as_a_whole())
        for finding in found.findings:
            if finding.problem != "not-reached":  # in these calls, the last ones
                level = logging.WARNING if finding in found.alarms else logging.INFO
                logger.log(level, "after calibration, layer %r: %s", finding.layer, finding.message)


@dataclass
class _Values:
    """Quantizers of one layer with their initial values, before they are written to the layer."""

    w_quant: WeightQuantizer
    a_quant: ActivationQuantizer | TokenQuantizer | None


def _checked_weight(name: str, layer: QuantizedLayer) -> Tensor:
    """What the float layer computes with."""
    weight = layer.unsmoothed_weight(layer.float_weight())
    if problem := weight_problem(weight):
        raise CalibrationError(f"the weight of layer {name!r} has {problem}")
    return weight


def _from_weight(layer: QuantizedLayer, weight: Tensor, config: DaqConfig) -> _Values:
    """Of the weight alone: all there is for a table, whose inputs are no numbers."""
    values = _Values(copy.deepcopy(layer.w_quant), copy.deepcopy(layer.a_quant))
    start_from_weight(values.w_quant, weight, config.weight_init)
    return values


@dataclass
class _InFloat:
    """Of a layer: its weight, and for each sample the outputs, and `usual_weights` of these."""

    weight: Tensor
    outputs: list[Tensor]
    usual: list[Tensor]


def _initial_values(
    layers: Mapping[str, QuantizedLayer], observers: Mapping[str, _Observer], config: DaqConfig
) -> dict[str, _Values]:
    """Of layers that read the same tensors, or of one layer."""
    found = {}
    for name, layer in layers.items():
        observers[name].statistics.reduce()
        _check(name, observers[name].statistics)
        weight = _checked_weight(name, layer)
        outputs = observers[name].outputs(weight)
        found[name] = _InFloat(weight, outputs, [usual_weights(output) for output in outputs])
    values, least = _fitted(layers, observers, found, None, config)
    least, gained = least + math.log(1 - GAIN), False
    weights, sample = [in_float.weight for in_float in found.values()], observers[name].samples[0]
    for factors in candidates(layers.values(), weights, sample) if config.smooth else ():
        others, error = _fitted(layers, observers, found, factors, config)
        if error < least:
            values, least, gained = others, error, True
        elif not gained:
            break  # the first does most of it
    return values


def _fitted(
    layers: Mapping[str, QuantizedLayer],
    observers: Mapping[str, _Observer],
    found: Mapping[str, _InFloat],
    factors: Tensor | None,
    config: DaqConfig,
) -> tuple[dict[str, _Values], float]:
    """Values for inputs that are divided by these factors, and the logarithm of the error of the outputs."""
    weights = {
        name: in_float.weight if factors is None else in_float.weight * factors.to(in_float.weight.dtype)
        for name, in_float in found.items()
    }
    values = {name: _from_weight(layer, weights[name], config) for name, layer in layers.items()}
    a_quant = next(iter(values.values())).a_quant
    if isinstance(a_quant, ActivationQuantizer):
        a_quant.smooth = factors
        lower, upper = _input_bounds(weights, observers, found, a_quant, config.activation_init)
        a_quant.lower.fill_(lower)
        a_quant.upper.fill_(upper)
        a_quant.finish()
    errors = [
        _match(weights[name], values[name].w_quant, a_quant, observers[name], in_float, config)
        for name, in_float in found.items()
    ]
    return values, sum(errors) / len(errors)


def _match(
    weight: Tensor,
    w_quant: WeightQuantizer,
    a_quant: ActivationQuantizer | TokenQuantizer | None,
    observer: _Observer,
    found: _InFloat,
    config: DaqConfig,
) -> float:
    """Set scale and shift so that the outputs of the layer are those in float. Returns the logarithm of the error that is left,
    the mean over samples, all positions and the typical one."""
    samples = observer.samples
    if a_quant is not None:
        w_quant.scale.mul_(a_quant.span)
    quantized = observer.outputs(w_quant(weight), a_quant)
    shares = [sample.share for sample in samples]
    one_scale = w_quant.scale.numel() == len(samples)
    ratios, shifts, errors = zip(
        *(
            OutputMatch(*sums).fit(one_scale, w_quant.shift is not None, config.weight_init == "3std")
            for sums in zip(found.outputs, quantized, found.usual, shares, strict=True)
        ),
        strict=True,
    )
    w_quant.scale.mul_(torch.cat(ratios).repeat_interleave(w_quant.groups))
    if w_quant.shift is not None:
        w_quant.shift.copy_(torch.cat(shifts))
    return float(torch.stack(errors).log().mean())


def _share(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    groups: list[list[str]],
    values: Mapping[str, _Values],
) -> None:
    """Give the layers of each group one quantizer, in the model and in its config, with or without factors for channels."""
    quantizers = {
        name: layer.a_quant if layer.input_owner is None else copy.deepcopy(layer.a_quant)
        for name, layer in layers.items()
    }
    for name, quantizer in quantizers.items():
        if quantizer is not None and layers[name].owner is None:
            quantizer.smooth = values[name].a_quant.smooth  # type: ignore[union-attr]
    regroup(layers, groups, quantizers)
    root: Any = next(module for module in model.modules() if "daq_config" in vars(module))
    entries = root.daq_config.layers | {layer.daq_name: layer.entry for layer in layers.values()}
    root.daq_config = root.daq_config.replace(layers=entries)
    tell_transformers(root)


def _check(name: str, found: Statistics) -> None:
    if found.count == 0:
        raise CalibrationError(
            f"calibration never reached layer {name!r}; run the model inside `with hf_daq.calibrate(model):` on inputs "
            f"that use it, or keep it in full precision: DaqConfig(..., modules_to_not_convert=[{name!r}])"
        )
    if not math.isfinite(found.squares):
        raise CalibrationError(
            f"the inputs of layer {name!r} have NaN or infinite values (from {found.low} to {found.high})"
        )


def _input_bounds(
    weights: Mapping[str, Tensor],
    observers: Mapping[str, _Observer],
    in_float: Mapping[str, _InFloat],
    a_quant: ActivationQuantizer,
    init: str,
) -> tuple[float, float]:
    """For inputs that are the same for all of these layers, and where each of them is most sensitive to noise."""
    name = next(iter(weights))
    found = observers[name].statistics
    if a_quant.smooth is not None:
        found = statistics(observers[name].samples[0], a_quant.smooth)
    low, high = found.low, found.high
    if low == 0 and high == 0:
        warnings.warn(f"layer {name!r} saw only zeros in calibration; its input bounds start at 0 and 1", stacklevel=7)
        return 0.0, 1.0
    if init == "3std":
        reach = 3 * found.deviation or high
        return -reach if low < 0 else 0.0, reach
    histograms = []
    for name, weight in weights.items():
        samples, parts = observers[name].samples, observers[name].parts(weight)
        importance = [
            sample.share * typical.view(-1, *[1] * (sample.rows.ndim - 1)) * sample.reach(part)
            for sample, typical, part in zip(samples, in_float[name].usual, parts, strict=True)
        ]
        rows = a_quant.smoothed(torch.cat([sample.rows for sample in samples]))
        histograms += [found.histogram, found.weighted(rows, torch.cat(importance))]
    return activation_bounds(found.centers(), torch.stack(histograms), low, high, a_quant.bits)


def _write(layer: QuantizedLayer, values: _Values) -> None:
    layer.w_quant.load_state_dict(values.w_quant.state_dict())
    if layer.a_quant is not None and values.a_quant is not None and layer.input_owner is None:
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
        with uninterrupted():
            for layer, quantized_class in classes:
                change_class(layer, quantized_class)
