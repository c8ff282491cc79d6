"""`reconstruct`: weights of a calibrated model, layer by layer, that give the outputs of the float network."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import CalibrationError, ConfigError, ModelError
from .model.batch import all_batches, resized, run, without_caches
from .model.guards import ORDER, refuse_wrapped
from .model.recording import Recorder
from .model.remembered import Remembered, left_as_before
from .model.roles import refuse_computed, tied_layers
from .model.sensitivity import Sensitivity, Weights
from .model.walk import Chunk, Rows, Walk
from .nn.base import check_calibrated, refuse_adapted_weights, weight_problem
from .nn.bounds import fit_input_bounds
from .nn.experts import DaqExpertsLinear, OneExpert
from .nn.fitting import fit_layer, whole_or_not
from .nn.layers import QuantizedLayer, evaluating, quantized_layers, replaced_forwards, sums_of
from .nn.moments import Moments, Sample
from .nn.observers import all_reduce
from .nn.packed import packed_layers
from .nn.quantizers import is_shard
from .text import progress_bar

logger = logging.getLogger("hf_daq")
_MEMORY = 2**29  # bytes of the inputs of one layer, over both networks
_NEVER = 2**31


@torch.no_grad()
def reconstruct(
    model: nn.Module, batches: Iterable[Any], *, max_minutes: float | None = None, progress: bool | None = None
) -> nn.Module:
    """Choose weights of a calibrated model again, so that it gives the outputs of the float model, in place; return it.

        hf_daq.reconstruct(model, [images])
        hf_daq.save_pretrained(model, "out", packed=True)

    Some hundred inputs without labels and some minutes, instead of training or before it. Layers come one after the
    other, as they run. Of each, the inputs in the network as it is quantized so far and in the float network give second
    moments, in which positions of a convolution count by how much the outputs of the float network depend on them (one backward of
    each batch), and these give: the bounds of the inputs that serve the output (those of 1 bit stay, for
    training), the weights that turn the quantized inputs into the float output (least squares, damped as held-out examples
    want it), the distance of their codes, the codes, column by column, where the error of each is made good by those that
    follow (GPTQ, Frantar et al. 2023), and the scale and the shift of the output; that of convolutions varies as in float.
    The new weight stays a float weight inside the cell of its code, so that training can go on from here.

    Everything runs in evaluation mode. Forwards of both networks and of all batches stand still in the middle, side by side: what one
    keeps in attributes of modules or in hooks is its own, and both networks draw the same random numbers. Padding tokens,
    which a 2-dimensional `attention_mask` names, do not count. Layers that standardize their weight only get a new scale and shift. A layer
    that runs more than once in a forward, shares its weight or never runs stays as it was calibrated, which is logged; so do
    embeddings, whose rows have no inputs. Experts of a mixture are fitted each to its own tokens, and one without tokens stays.
    Beside the model there is, at most, one float copy of the weights that are quantized, and what a forward of each batch holds in
    the middle: some hundred MB of text, 4 GB of 256 photographs.
    Under `torch.distributed` moments are reduced, and all ranks end with the same weights.

    Layers that it fitted before, as when `max_minutes` were over, stay as they are, with a warning: it needs the weights of the
    float model. After training it does so too, and does not know it.

    Ctrl-C is safe: the layer in work is finished or left alone, and what is done stays.

    Args:
        model: a model after `apply_daq` and `calibrate`, before it is wrapped or prepared.
        batches: each what the model takes, a tensor, a mapping or a tuple of arguments; the same as for `calibrate` will do.
            All are kept in memory. Of text a few large ones are better than many small ones; images are split and joined as it
            is fastest.
        max_minutes: when these are over, layers that are not done stay as calibrated, which is logged. None: no limit.
        progress: show a bar with the time that is left; None: if the standard error is a terminal.

    Raises:
        ModelError: not quantized, packed, wrapped or sharded; no batches. CalibrationError: not calibrated, or inputs or a weight
        of a layer are not finite. ConfigError: max_minutes below 0. Before the first layer is written the model is left as it was.
    """
    if max_minutes is not None and not max_minutes >= 0:
        raise ConfigError(f"max_minutes={max_minutes}: write a number of minutes, or None")
    layers = _checked(model, "reconstruct")
    with evaluating(model), without_caches(model):
        _Sweep(model, layers, resized(all_batches(model, batches, "reconstruct"))).run(max_minutes, progress)
    return model


def _checked(model: nn.Module, what: str) -> dict[str, QuantizedLayer]:
    layers = quantized_layers(model)
    if not layers or not hasattr(model, "daq_config"):
        state = "packed: hf_daq.unpack(model) comes first" if packed_layers(model) else "not quantized, or wrapped"
        raise ModelError(f"{what} needs the model that apply_daq returned; this one is {state}")
    refuse_wrapped(model)
    refuse_computed(model)
    if any(is_shard(layer.first_parameter) for layer in layers.values()):
        raise ModelError(f"{what} needs whole weights, and the model is sharded; the order is: {ORDER}")
    check_calibrated(layers, what)
    for name, layer in layers.items():
        if problem := weight_problem(layer.float_weight()):
            raise CalibrationError(f"the weight of layer {name!r} has {problem}")
    refuse_adapted_weights(model, "reconstructed")
    return layers


class _Sweep:
    """All layers of a model, one after the other, with one forward of each batch in both networks."""

    def __init__(self, model: nn.Module, layers: dict[str, QuantizedLayer], batches: list[Any]) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.todo: dict[nn.Module, int] = {}
        self.places: dict[nn.Module, int] = {}
        self.float_weights: dict[nn.Module, Tensor] = {}
        self.few: list[str] = []

    def run(self, max_minutes: float | None, progress: bool | None) -> None:
        end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.todo = self._order()
        self.places = dict(self.todo)
        self.fitted = {layer for layer in self.layers.values() if layer.fitted}
        weights = [{} for _ in self.batches] if self._over(end) else self._weights(progress)
        self.recorder = Recorder(self.model, keep_calls=False)
        chunks = [
            Chunk(lambda batch=batch: run(self.model, batch), self.remembered, of_batch)  # type: ignore[misc]
            for batch, of_batch in zip(self.batches, weights, strict=True)
        ]
        try:
            forwards: dict[nn.Module, Any] = {layer: self._forward(layer) for layer in self.layers.values()}
            with replaced_forwards(forwards), progress_bar(progress, len(self.todo)) as show:
                while not self._over(end) and (layer := self._next(chunks)) is not None:
                    show(layer.daq_name)
                    with torch.autocast(layer.weight.device.type, enabled=False):
                        self._reconstruct(layer, chunks)
        finally:
            for walk in (walk for chunk in chunks for walk in chunk.walks):
                walk.end()
            self.recorder.remove()
            torch.clear_autocast_cache()  # it may hold what was there before
        if self.few:
            logger.warning(
                "layers that saw fewer positions than their weight has columns, and may be worse than calibrated: %s; give more inputs",
                ", ".join(self.few),
            )
        if self.todo:
            names = [name for name, layer in self.layers.items() if layer in self.todo]
            why = "were not reached in time" if self._over(end) else "never ran"
            logger.warning("layers that %s stay as calibrated: %s", why, ", ".join(names))

    def _weights(self, progress: bool | None) -> list[Weights]:
        """How much the outputs of the float network depend on the positions of each layer, for each batch."""
        sensitivity = Sensitivity(self.todo)
        if not sensitivity.layers:
            return [{} for _ in self.batches]

        def in_float(layer: QuantizedLayer) -> Callable[[Tensor], Tensor]:
            forward = layer.quantized_forward if layer in self.fitted else layer.in_float
            return lambda x: sensitivity.watched(layer, forward(x))

        forwards: dict[nn.Module, Any] = {layer: in_float(layer) for layer in self.layers.values()}
        with (
            left_as_before(self.model),
            replaced_forwards(forwards),
            progress_bar(progress, len(self.batches)) as show,
        ):
            return sensitivity.weights(self.model, self.batches, show)

    def _over(self, end: float) -> bool:
        """Whether time is over, on any rank."""
        over = self._tensor(int(time.monotonic() > end))
        if end < math.inf:
            all_reduce(over, dist.ReduceOp.MAX)
        return bool(over)

    def _order(self) -> dict[nn.Module, int]:
        """The layers to reconstruct, by when they run. Errors of the first batch come before anything is changed."""
        names = [name for name, layer in self.layers.items() if not isinstance(layer, nn.Embedding)]
        calls: list[str] = []
        self.remembered = Remembered(self.model)

        def called(name: str) -> None:
            calls.append(name)
            self.remembered.watch()

        hooks = [
            self.layers[name].register_forward_pre_hook(lambda *_, name=name: called(name))  # type: ignore[misc]
            for name in names
        ]
        try:
            for batch in self.batches[:1]:
                run(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        self.remembered.watch()
        first = self._tensor([calls.index(name) if name in calls else _NEVER for name in names])
        count = self._tensor([calls.count(name) for name in names])
        all_reduce(first, dist.ReduceOp.MIN)
        all_reduce(count, dist.ReduceOp.MAX)
        shared = tied_layers(self.model)
        skipped = [name for name, runs in zip(names, count.tolist(), strict=True) if runs > 1 or name in shared]
        if skipped:
            logger.warning(
                "layers that run more than once in a forward or share their weight stay as calibrated: %s",
                ", ".join(skipped),
            )
        fitted = [name for name in names if name not in skipped and self.layers[name].fitted]
        if fitted:
            logger.warning(
                "layers that reconstruct fitted before stay as they are, since their float weights are those of the float model no "
                "more: %s; to do it again, start from the float model",
                ", ".join(fitted),
            )
        order = [names[place] for place in first.argsort(stable=True).tolist()]
        return {self.layers[name]: place for place, name in enumerate(order) if name not in (*skipped, *fitted)}

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=next(self.model.parameters()).device)

    def _forward(self, layer: QuantizedLayer) -> Callable[[Tensor], Tensor]:
        """What the layer computes in a walk: it stops here for as long as the layer is not done."""

        def forward(x: Tensor) -> Tensor:
            walk = threading.current_thread()
            assert isinstance(walk, Walk)
            if layer in self.todo:
                walk.stop(layer, x, self._kept(layer, x))
            if not walk.in_float or layer in self.fitted:
                return layer.quantized_forward(x)
            weight = self.float_weights.get(layer)
            return layer.in_float(x, weight)

        return forward

    def _kept(self, layer: QuantizedLayer, x: Tensor) -> Tensor | None:
        """Which positions of an input are no padding; of experts, which tokens."""
        if isinstance(layer, DaqExpertsLinear) and layer.routing is not None:
            return self.recorder.kept_tokens(layer.routing.token_count, x.device)
        return self.recorder.kept(x)

    def _next(self, chunks: list[Chunk]) -> QuantizedLayer | None:
        """Bring as many batches as memory allows to where they wait for a layer, and return the first of these layers."""
        if not self.todo:
            return None
        held = largest = 0
        for chunk in chunks:
            if not chunk.waits(self.todo):
                if held + largest > _MEMORY:
                    break
                chunk.advance(self.todo)
            held, largest = held + chunk.size, max(largest, chunk.size)
        places = [self.todo[walk.layer] for chunk in chunks for walk in chunk.walks if walk.layer in self.todo]
        first = self._tensor(min(places, default=_NEVER))
        all_reduce(first, dist.ReduceOp.MIN)
        found = [layer for layer, place in self.todo.items() if place == int(first)]
        return found[0] if found else None  # type: ignore[return-value]

    def _reconstruct(self, layer: QuantizedLayer, chunks: list[Chunk]) -> None:
        there = [chunk for chunk in chunks if chunk.quantized.layer is layer]
        readers = self._readers(layer)
        own = not isinstance(layer, DaqExpertsLinear)  # all experts have the same
        if own and layer is readers[0] and all(reader in self.todo for reader in readers):
            with whole_or_not(*readers):
                fit_input_bounds(readers, [self._sample(reader, layer, there) for reader in readers])
        with whole_or_not(layer):
            before = layer.float_weight().clone()
            if isinstance(layer, DaqExpertsLinear):
                parts = [
                    self._fit(OneExpert(layer, expert), [chunk.of_expert(expert) for chunk in there])
                    for expert in range(layer.sizes[0])
                ]
            else:
                parts = [self._fit(layer, [chunk.inputs for chunk in there])]
            if any(parts):
                self.float_weights[layer] = before
                layer._fitted = sums_of(layer.weight)
            if len(parts) > 1 and not all(parts):
                logger.info(
                    "%d experts of %s had too few tokens and stay as calibrated", parts.count(False), layer.daq_name
                )
        del self.todo[layer]

    def _readers(self, layer: QuantizedLayer) -> list[QuantizedLayer]:
        """The layers that use the quantizer of this one's input, as they run."""
        owner = layer.input_owner or layer
        return sorted(
            (other for other in self.layers.values() if (other.input_owner or other) is owner),
            key=lambda other: self.places.get(other, _NEVER),
        )

    def _sample(self, reader: QuantizedLayer, layer: QuantizedLayer, there: list[Chunk]) -> Sample:
        """Of the inputs of a layer, for another one that reads the same."""
        sample = Sample(reader, reader.weight_shape())
        for number, chunk in enumerate(there):
            for half, x, exact, weights in chunk.inputs(number % 2, reader):
                x, exact = reader.smoothed(x), reader.smoothed(exact)
                sample.add(half, x, exact, sample.limit // (2 * len(there)) + 1, weights)
        sample.join()
        return sample

    def _fit(self, layer: QuantizedLayer | OneExpert, there: Sequence[Callable[[int], Rows]]) -> bool:
        """Fit one layer, or one expert, to rows that have been seen; False without any in one of the halves."""
        moments = Moments(layer, layer.weight_shape())
        for number, inputs in enumerate(there):
            for half, x, exact, weights in inputs(number % 2):
                q = x if layer.a_quant is None else layer.a_quant(x) * layer.a_quant.span.to(x.dtype)
                moments.add(half, q, layer.smoothed(exact), moments.limit // (2 * len(there)) + 1, weights)
        moments.reduce()
        if not all(half.finite for half in moments.halves):
            raise CalibrationError(f"the inputs of layer {layer.daq_name!r} have NaN or infinite values")
        if 0 < int(moments.positions) < moments.columns and not isinstance(layer, OneExpert):
            self.few.append(f"{layer.daq_name} ({int(moments.positions)} of {moments.columns})")
        enough = moments.count > 0 and not (isinstance(layer, OneExpert) and moments.lopsided)
        if enough:
            fit_layer(layer, moments)
        return enough
