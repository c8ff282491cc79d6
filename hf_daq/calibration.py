"""`calibrate`: initial bounds and scales of every quantizer, from the weights and from batches of real inputs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .apply import tell_transformers
from .config import DaqConfig
from .errors import CalibrationError, ModelError
from .model.batch import Calls
from .model.guards import ORDER, refuse_wrapped
from .model.patch import set_config
from .model.recording import Recorder
from .model.roles import refuse_computed
from .model.siblings import Readers, find_siblings
from .nn.base import layer_input, refuse_adapted_weights
from .nn.experts import DaqExpertsLinear
from .nn.initial_values import Values, initial_values, values_of_table
from .nn.layers import CONVOLUTIONS, TRANSPOSED, QuantizedLayer, evaluating, quantized_layers
from .nn.leaf import ONLOAD
from .nn.memory import memory_reused
from .nn.observers import ExpertsInputs, LayerInputs, all_reduce, limit_together
from .nn.quantizers import is_shard, processes
from .nn.siblings import regroup
from .nn.swap import change_class, uninterrupted
from .report.health import examine

logger = logging.getLogger("hf_daq")


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
    layers, config = _checked(model), cast(DaqConfig, model.daq_config)
    if fitted := [name for name, layer in layers.items() if layer.fitted]:
        logger.warning(
            "calibrate takes the place of what reconstruct found, and starts from weights that are those of the float model no more, "
            "in %d layers, such as %s; to do both again, start from the float model",
            len(fitted),
            fitted[0],
        )
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
        with memory_reused(), evaluating(model), torch.no_grad(), _float_layers(layers.values()):
            yield model
    finally:
        for hook in hooks:
            hook.remove()
        recorder.remove()
    with torch.no_grad():
        _refuse_unreached(observers)
        own = {name: layer for name, layer in layers.items() if layer.owner is None}
        values = {name: values_of_table(name, layer, config) for name, layer in own.items() if name not in observers}
        groups = find_siblings(model, dense, readers)
        grouped = {name for group in groups for name in group}
        for group in (*groups, *([name] for name in observers if name not in grouped)):
            values |= initial_values({name: own[name] for name in group}, observers, config)
            for name in group:
                del observers[name]  # its inputs
        with uninterrupted():
            _share(model, own, groups, values)
            for name, layer in own.items():
                values[name].write(layer)
    if check:
        _warn(model, recorder.calls)


def _checked(model: nn.Module) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(model)
    if not layers or not hasattr(model, "daq_config"):
        raise ModelError(
            f"calibrate needs the model that apply_daq returned, not a float, wrapped or packed one; order: {ORDER}"
        )
    refuse_wrapped(model)
    refuse_adapted_weights(model, "calibrated")
    refuse_computed(model, "parametrize")
    if any(is_shard(layer.first_parameter) for layer in layers.values()):
        raise ModelError(f"calibrate cannot see through a sharded model; the order is: {ORDER}")
    if any(layer.weight.is_meta for layer in layers.values()):
        raise ModelError(f"calibrate needs the weights, and the model is offloaded; {ONLOAD}")
    return layers


def _refuse_unreached(observers: Mapping[str, LayerInputs]) -> None:
    """Layers that no rank has seen."""
    if not observers:
        return
    sums = [observer.statistics.sums for observer in observers.values()]
    counts = torch.stack([of_layer[0].to(sums[0].device) for of_layer in sums])
    all_reduce(counts, dist.ReduceOp.SUM)
    missing = [name for name, count in zip(observers, counts.tolist(), strict=True) if count == 0]
    if missing:
        more = f" and {len(missing) - 1} more ({', '.join(missing[1:4])}{', ...' * (len(missing) > 4)})"
        raise CalibrationError(
            f"calibration never reached layer {missing[0]!r}{more if missing[1:] else ''}; run the model inside "
            "`with hf_daq.calibrate(model):` on inputs that use it, and call the layer, not its `.forward`; heads that run in training "
            "alone need a call of their own there, as model.aux(features); or keep it in full precision: "
            f"DaqConfig(..., modules_to_not_convert={missing[:4]}{' + ...' * (len(missing) > 4)})"
        )


class _Observer(LayerInputs):
    """A hook before the forward of a layer."""

    def __init__(self, layer: QuantizedLayer, recorder: Recorder) -> None:
        super().__init__(layer)
        self.recorder, self.lock = recorder, Lock()

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = layer_input(args, kwargs).detach().to(self.statistics.sums.device)
        if isinstance(layer, CONVOLUTIONS + TRANSPOSED) and x.ndim - len(layer.kernel_size) not in (1, 2):
            return  # the layer says what is wrong with it
        x = self.recorder.attended(x)
        if x.numel() > 0:
            with self.lock:
                self.statistics.add(x)
                self.samples[0].add(x)


class _ExpertsObserver(ExpertsInputs):
    """A hook before the forward of a layer of experts."""

    def __init__(self, layer: Any, recorder: Recorder) -> None:
        super().__init__(layer)
        self.layer, self.recorder = layer, recorder

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


@memory_reused()
def _warn(model: nn.Module, calls: Calls) -> None:
    """Log what `health` finds, on the first rank that has seen a batch. In a model that is fine as a whole, a noisy layer is no
    warning."""
    rank = dist.get_rank() if processes() > 1 else 0
    first = torch.tensor(rank if calls else processes(), device=next(model.parameters()).device)
    all_reduce(first, dist.ReduceOp.MIN)
    if calls and rank == int(first):
        try:
            found = examine(model, calls, calibrated_now=True)
        except Exception as error:  # calibration is done, whatever the model does now
            logger.warning(
                "after calibration the model cannot be examined, it raised %s: %s", type(error).__name__, error
            )
            return
        logger.log(logging.INFO if found.ok else logging.WARNING, "after calibration, network: %s", found.as_a_whole())
        for finding in found.findings:
            if finding.problem != "not-reached":  # in these calls, the last ones
                level = logging.WARNING if finding in found.alarms else logging.INFO
                logger.log(level, "after calibration, layer %r: %s", finding.layer, finding.message)


def _share(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    groups: list[list[str]],
    values: Mapping[str, Values],
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
    set_config(root, root.daq_config.replace(layers=entries))
    tell_transformers(root)


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
