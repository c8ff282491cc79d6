"""`allocate`: which layers get how many bits, when all of them together may only have so many."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .apply import apply_daq
from .config import DaqConfig, stored_bits, stored_bytes
from .errors import ConfigError, ModelError
from .model.batch import all_batches, examples_in
from .model.patch import check_float_model
from .model.plan import Plan, PlannedLayer, config_from, plan
from .nn.init import start_from_weight
from .nn.layers import QuantizedLayer, evaluating, quantized_layers, replaced_forwards
from .nn.memory import memory_reused
from .nn.observers import all_reduce
from .nn.quantizers import WeightQuantizer
from .nn.sums import squares
from .report.network import answers
from .text import COLUMNS, add_row, as_text, cell, plain_table, progress_bar

_WIDTHS = range(2, 9)
_FINE = 4  # bits from which the loss follows the error of the weight
_EXAMPLES = 32
_Prices = Mapping[str, Mapping[int, float]]  # of each layer at each width, in bits


@dataclass(frozen=True)
class AllocatedLayer:
    """weights: how many. bits: of each. losses: bits -> loss of the network when only this layer is quantized."""

    name: str
    weights: int
    bits: int
    losses: Mapping[int, float]


@dataclass(frozen=True)
class Allocation:
    """Bits for each layer. `print(allocation)` shows them as a table. Losses are squared differences of the outputs to those of the
    float model, relative to the variance of these, from weights that are rounded, without calibration.

    config: for `apply_daq` and `quantize`, with a rule for each layer whose bits are not `weight_bits`.
    average_bits: of a weight of these layers. packed_bytes: of the model, as of `plan`.
    predicted: the sum of the losses of single layers. measured: the loss with all layers at their bits.
    uniform_bits, uniform: the most bits that all layers can have alike, and the loss with them. Where nothing that was tried is
        better, all layers have these.
    """

    config: DaqConfig
    layers: tuple[AllocatedLayer, ...]
    average_bits: float
    packed_bytes: int
    predicted: float
    measured: float
    uniform_bits: int
    uniform: float
    rules: tuple[Mapping[str, Any], ...] = field(repr=False)

    def to_yaml(self) -> str:
        """The config, as a file for `hf-daq quantize --config` and `DaqConfig.from_dict`."""
        import yaml  # type: ignore[import-untyped]

        text: str = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        return text

    def __rich__(self) -> Any:
        from rich.console import Group

        table = plain_table("layer", "weights", "W", "loss", f"at {self.uniform_bits} bits")
        for layer in self.layers:
            losses = (f"{layer.losses[bits]:.2g}" for bits in (layer.bits, self.uniform_bits))
            add_row(table, "", layer.name, f"{layer.weights:,}", str(layer.bits), *losses)
        return Group(
            table,
            cell(
                f"{self.average_bits:.2f} bits a weight, {self.packed_bytes / 1e6:.2f} MB packed; loss {self.predicted:.3g} as the sum "
                f"of layers, {self.measured:.3g} measured; with {self.uniform_bits} bits everywhere {self.uniform:.3g}"
            ),
        )

    def __str__(self) -> str:
        return as_text(self, COLUMNS)


@memory_reused()
@torch.no_grad()
def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    config: DaqConfig | None = None,
    *,
    average_bits: float | None = None,
    packed_bytes: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Allocation:
    """Find bits of weights for each layer of a float model, so that its outputs change the least under a budget.

        found = hf_daq.allocate(model, [images], average_bits=4, activation_bits=8, weight_granularity="channel")
        hf_daq.apply_daq(model, found.config)

    Each layer alone is rounded to 2, 3 and 4 bits, and the outputs of the network are compared with those in float; from
    there on the change follows the squared error of the weight. These losses are taken to add up, and bits go, one after
    the other, where they take away the most loss for their size. What comes out is measured as a whole beside the same bits
    everywhere, and the better one is returned. Layers whose bits a rule, `first_last_bits` or `embedding_bits` decides keep
    them and are no part of the budget in bits. The model stays as it is.

    The time is that of three forwards a layer, of up to 32 examples. Beside the model there is one copy of it.

    Args:
        model: a float model as for `apply_daq`.
        batches: each what the model takes, a tensor, a mapping or a tuple of arguments; the first 32 examples are looked at.
        config: a `DaqConfig`, or its arguments as keywords; bits of weights are found and need not be given.
        average_bits: of a weight, from 2 to 8.
        packed_bytes: size of all parameters and persistent buffers, as `plan` has it; instead of `average_bits`.
        progress: show a bar with the time that is left; None: if the standard error is a terminal.

    Raises:
        ConfigError: not one budget, or one that is out of reach. ModelError: as of `apply_daq`; no batches; no outputs to compare.
    """
    if (average_bits is None) == (packed_bytes is None):
        raise ConfigError("give one budget, either average_bits=4 or packed_bytes=5_000_000")
    check_float_model(model)
    if config is None and not {"bits", "weight_bits"} & set(kwargs):
        kwargs["weight_bits"] = _FINE
    config = config_from(config, kwargs)
    found = all_batches(model, batches, "allocate")
    plans = [plan(model, _with_bits(config, bits)) for bits in (_WIDTHS[0], _WIDTHS[-1])]
    sizes = _sizes(*plans)
    price = _bits if packed_bytes is None else partial(_bits_in_file, config)
    prices = {name: {bits: price(size, bits) for bits in _WIDTHS} for name, size in sizes.items()}
    budget = _budget(sizes, prices, average_bits, packed_bytes, plans)
    copied = copy.deepcopy(model)
    apply_daq(copied, config)
    layers = {name: layer for name, layer in quantized_layers(copied).items() if name in sizes}
    with evaluating(copied):
        trials = _Trials(copied, layers, config, _first(found))
        with progress_bar(progress, len(layers)) as show:
            losses = {name: trials.losses(name, show) for name in layers}
        uniform_bits = max(bits for bits in _WIDTHS if _together(prices, bits) <= budget)
        uniform = dict.fromkeys(sizes, uniform_bits)
        tried = [uniform, *(_solve(prices, losses, budget, least) for least in range(2, uniform_bits + 1))]
        measured = [trials.loss(bits) for bits in tried]
    best = min(range(len(tried)), key=measured.__getitem__)
    bits = tried[best]
    usual = Counter(bits.values()).most_common(1)[0][0]
    planned = plans[0].quantized
    rules = tuple(_rule(planned[name], own) for name, own in bits.items() if own != usual)
    chosen = _with_bits(config, usual, rules)
    return Allocation(
        config=chosen,
        layers=tuple(AllocatedLayer(name, size, bits[name], losses[name]) for name, size in sizes.items()),
        average_bits=sum(sizes[name] * own for name, own in bits.items()) / sum(sizes.values()),
        packed_bytes=plan(model, chosen).packed_bytes,
        predicted=sum(losses[name][own] for name, own in bits.items()),
        measured=measured[best],
        uniform_bits=uniform_bits,
        uniform=measured[0],
        rules=rules,
    )


def _with_bits(config: DaqConfig, bits: int, rules: tuple[Mapping[str, Any], ...] = ()) -> DaqConfig:
    """These rules first."""
    values: dict[str, Any] = {"weight_bits": bits, "rules": (*rules, *config.rules)}
    try:
        return config.replace(**values)
    except ConfigError:
        if config.weight_grid != "ternary":
            raise
        return config.replace(**values, weight_grid="auto")  # no layer has 2 bits


def _rule(row: PlannedLayer, bits: int) -> dict[str, Any]:
    """For one layer; the bits of its inputs too, if another rule gave them."""
    own = {"activation_bits": row.activation_bits} if row.reason else {}
    name = row.name if set(row.name).isdisjoint("*?[") else f"re:{re.escape(row.name)}"
    return {"pattern": name, "weight_bits": bits, **own}


def _sizes(least: Plan, most: Plan) -> dict[str, int]:
    """How many weights each layer has whose bits are not decided."""
    others = most.quantized
    sizes = {
        row.name: math.prod(row.shape)
        for row in least.quantized.values()
        if row.tied_to is None and (row.weight_bits, others[row.name].weight_bits) == (_WIDTHS[0], _WIDTHS[-1])
    }
    if not sizes:
        raise ModelError(
            "allocate has no layer whose bits are free: rules, first_last_bits or layers decide over all of them"
        )
    return sizes


def _bits(weights: int, bits: int) -> float:
    return weights * bits


def _bits_in_file(config: DaqConfig, weights: int, bits: int) -> float:
    return 8 * stored_bytes(weights, stored_bits(bits, config.grid(bits)))


def _together(prices: _Prices, bits: int) -> float:
    return sum(of_layer[bits] for of_layer in prices.values())


def _budget(
    sizes: Mapping[str, int],
    prices: _Prices,
    average_bits: float | None,
    packed_bytes: int | None,
    plans: Sequence[Plan],
) -> float:
    """Bits of all these weights together."""
    if average_bits is not None:
        number = isinstance(average_bits, int | float) and not isinstance(average_bits, bool)
        if not number or not _WIDTHS[0] <= average_bits <= _WIDTHS[-1]:
            raise ConfigError(f"average_bits={average_bits!r} must be a number from {_WIDTHS[0]} to {_WIDTHS[-1]}")
        return average_bits * sum(sizes.values())
    assert packed_bytes is not None
    least, most = (found.packed_bytes for found in plans)
    if not isinstance(packed_bytes, int) or packed_bytes < least:
        raise ConfigError(
            f"packed_bytes={packed_bytes!r} is out of reach: with {_WIDTHS[0]} bits everywhere the model has {least:,} bytes, with "
            f"{_WIDTHS[-1]} bits {most:,}"
        )
    return _together(prices, _WIDTHS[0]) + 8 * (packed_bytes - least)


def _first(batches: list[Any]) -> list[Any]:
    """Batches with the first examples."""
    kept: list[Any] = []
    left = _EXAMPLES
    for batch in batches:
        count = examples_in(batch)
        cut = partial(_cut, count=count, left=left)
        kept.append(batch if count <= left else pytree.tree_map(cut, batch))
        left -= count
        if left <= 0:
            break
    return kept


def _cut(value: Any, count: int, left: int) -> Any:
    return value[:left] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == count else value


class _Trials:
    """The network with some of its layers rounded, and by how much its outputs change."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, QuantizedLayer], config: DaqConfig, batches: list[Any]
    ) -> None:
        self.model, self.layers, self.config, self.batches = model, layers, config, batches
        with self._rounded({}):
            self.wanted = [answers(model, batch) for batch in batches]
        if not all(self.wanted):
            raise ModelError("the model gives no tensor of real numbers to compare")
        signals = [y - y.mean(0) if len(y) > 1 else y for outputs in self.wanted for y in outputs]
        self.signal = sum(map(squares, signals))
        if not math.isfinite(self.signal):
            raise ModelError(
                "outputs have NaN or infinite values; allocate needs inputs on which the float model is sound"
            )

    def losses(self, name: str, show: Any) -> dict[int, float]:
        """Of one layer at each width; more bits are never worse."""
        show(name)
        found: dict[int, float] = {}
        weight = self.layers[name].float_weight()
        errors = {bits: squares(self._weight(name, bits) - weight) for bits in _WIDTHS}
        for bits in _WIDTHS:
            share = errors[bits] / max(errors[_FINE], 1e-30)
            loss = self.loss({name: bits}) if bits <= _FINE else found[_FINE] * share
            found[bits] = min([loss, *found.values()])
        return found

    def loss(self, bits: Mapping[str, int]) -> float:
        sums = torch.tensor([0.0, self.signal], dtype=torch.float64)
        with self._rounded({name: self._weight(name, own) for name, own in bits.items()}):
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                for q, y in zip(answers(self.model, batch), wanted, strict=True):
                    if q.shape != y.shape:
                        raise ModelError(
                            f"with {', '.join(bits)} rounded, an output has shape {tuple(q.shape)} where it was {tuple(y.shape)}: "
                            "allocate compares values, and cannot where their number depends on them"
                        )
                    sums[0] += squares(q - y)
        sums = sums.to(next(self.model.parameters()).device)
        all_reduce(sums, dist.ReduceOp.SUM)
        return float(sums[0] / sums[1].clamp_min(1e-30))

    def _weight(self, name: str, bits: int) -> Tensor:
        layer = self.layers[name]
        quantizer = _quantizer(layer.w_quant, layer.weight_shape(), bits, self.config)
        weight = layer.float_weight()
        start_from_weight(quantizer, weight, self.config.weight_init)
        rounded: Tensor = quantizer(weight)
        return rounded

    @contextmanager
    def _rounded(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, layers compute in float with these weights, or with their own."""

        def forward(layer: QuantizedLayer, weight: Tensor | None, x: Tensor) -> Tensor:
            return layer.in_float(x, weight)

        every = quantized_layers(self.model)
        with replaced_forwards({layer: partial(forward, layer, weights.get(name)) for name, layer in every.items()}):
            yield


def _quantizer(like: WeightQuantizer, shape: tuple[int, ...], bits: int, config: DaqConfig) -> WeightQuantizer:
    """One of other bits."""
    return WeightQuantizer(
        bits,
        shape,
        granularity=like.granularity,
        group_size=like.group_size if like.granularity == "group" else None,
        grid=config.grid(bits),
        scale_dtype=like.scale_dtype,
        normalization=like.normalization,
        device=like.lower.device,
    )


def _solve(prices: _Prices, losses: Mapping[str, Mapping[int, float]], budget: float, least: int) -> dict[str, int]:
    """Bits of at least `least`: steps of the most loss for their size first, as long as there is room."""
    bits = dict.fromkeys(prices, least)
    left = budget - _together(prices, least)
    while True:
        steps = [
            ((losses[name][own] - losses[name][more]) / max(price, 1), name, more, price)
            for name, of_layer in prices.items()
            for own in (bits[name],)
            for more in range(own + 1, _WIDTHS[-1] + 1)
            if (price := of_layer[more] - of_layer[own]) <= left
        ]
        if not steps or max(steps)[0] <= 0:
            return bits
        _, name, more, price = max(steps)
        left -= price
        bits[name] = more
