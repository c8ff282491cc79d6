"""The layers of experts that transformers keeps in parameters of three dimensions: each computes with one of them, for all experts.

They are child modules that own quantizers and no weight: the Parameters stay where they were, under their names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  # its operator, for graphs of torch.compile
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..config import DaqConfig
from .layers import LAYER_TYPES, QuantizedLayer
from .packed import PACKED_TYPES, PackedLayer

_OF_LLAMA4 = {"has_gate": True, "has_bias": False, "is_transposed": True}


def has(experts: nn.Module, what: str) -> bool:
    """What transformers notes of experts in attributes; not of those of Llama 4."""
    found: bool = getattr(experts, what, _OF_LLAMA4[what])
    return found


class Routing(NamedTuple):
    """Which expert computes what. Pairs of a token and an expert are sorted by the expert.

    tokens, experts: int64, shape (pairs,). ends: int64, shape (experts,): where the pairs of each expert end.
    by_token: whether the layer's input has a row for each token, not for each pair.
    """

    tokens: Tensor
    experts: Tensor
    ends: Tensor
    by_token: bool

    @property
    def token_count(self) -> int:
        return int(self.tokens.max()) + 1 if len(self.tokens) else 0

    def pairs_of(self, expert: int) -> slice:
        return slice(int(self.ends[expert - 1]) if expert else 0, int(self.ends[expert]))

    def sizes(self) -> list[int]:
        """How many pairs each expert has, and at last those of experts that are elsewhere."""
        ends = [0, *self.ends.tolist(), len(self.tokens)]
        return [end - start for start, end in pairwise(ends)]

    def rows(self, x: Tensor) -> Tensor:
        """The inputs of all pairs, shape (pairs, in)."""
        return x[self.tokens] if self.by_token else x


_ROUTING: ContextVar[Routing | None] = ContextVar("routing", default=None)


def routed(layer: Any, x: Tensor, routing: Routing) -> Tensor:
    output: Tensor
    if torch.compiler.is_compiling():  # a graph has no context variables
        layer._traced = routing
        output = layer(x)
        layer._traced = None
        return output
    token = _ROUTING.set(routing)
    try:
        output = layer(x)
    finally:
        _ROUTING.reset(token)
    return output


class ExpertsLinear(nn.Module):
    """The linear layers of all experts, which have their weight in one Parameter of the module around this one.

    place: that module and the name of the Parameter. In a tuple, for it is no child of this one.
    per_expert: whether a weight has a scale an expert, not one an output channel or group.
    """

    place: tuple[Any, str]
    per_expert = False
    _traced: Routing | None = None

    def __init__(self, module: nn.Module, parameter: str) -> None:
        super().__init__()
        self.place = module, parameter

    @property
    def weight(self) -> Any:
        """As the experts have it: shape (experts, out, in), or (experts, in, out)."""
        module, name = self.place
        own = self._parameters.get("weight")  # of a copy that computes with another weight
        return getattr(module, name) if own is None else own

    @property
    def bias(self) -> Any:
        """Shape (experts, out), or None."""
        module, name = self.place
        return getattr(module, f"{name}_bias") if has(module, "has_bias") else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            module, parameter = self.place
            module._parameters[parameter] = value
        else:
            super().__setattr__(name, value)

    @property
    def routing(self) -> Routing | None:
        """Of the forward that runs, which is another one in each thread."""
        found = None if torch.compiler.is_compiling() else _ROUTING.get()
        return self._traced if found is None else found

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, outputs and inputs."""
        experts, out, columns = self.weight.shape
        return (experts, columns, out) if has(self.place[0], "is_transposed") else (experts, out, columns)

    def float_weight(self) -> Tensor:
        weight = self.weight.transpose(1, 2) if has(self.place[0], "is_transposed") else self.weight
        result: Tensor = weight.contiguous().view(self.weight_shape())  # packed ones are, and sums go by strides
        return result

    def weight_shape(self) -> tuple[int, ...]:
        """(experts, out, in) with a scale an expert, else (experts * out, in)."""
        experts, out, columns = self.sizes
        return (experts, out, columns) if self.per_expert else (experts * out, columns)

    def stored(self, weight: Tensor) -> Tensor:
        weight = weight.reshape(self.place[0].num_experts, -1, weight.shape[-1])
        return weight.transpose(1, 2) if has(self.place[0], "is_transposed") else weight

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (pairs, out), from inputs of shape (tokens, in)."""
        routing = self.routing
        assert routing is not None
        weight = weight.reshape(len(routing.ends), -1, weight.shape[-1])
        if torch.compiler.is_compiling():
            return _in_one_node(routing.rows(x), weight, bias, routing)
        weights = weight.unbind()
        biases = None if bias is None else bias.unbind()

        def product(expert: int, rows: Tensor) -> Tensor:
            return F.linear(rows, weights[expert], None if biases is None else biases[expert])

        return _of_each(product, routing.rows(x), routing, weight.shape[1])

    def forward(self, x: Tensor) -> Any:
        return self.compute(x, self.float_weight(), self.bias)


def _of_each(product: Callable[[int, Tensor], Tensor], rows: Tensor, routing: Routing, out: int) -> Tensor:
    """The outputs of the experts that have rows, in their order; zeros for experts that are elsewhere."""
    sizes = routing.sizes()
    parts = torch.split(rows, sizes)
    found = [product(expert, part) for expert, part in enumerate(parts[:-1]) if len(part)]
    if len(parts[-1]) or not found:
        found.append(rows.new_zeros(sizes[-1], out, dtype=found[0].dtype if found else rows.dtype))
    return torch.cat(found)


def _in_one_node(rows: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """In a graph of torch.compile, which cannot know how many rows an expert gets."""
    ends = routing.ends.to(torch.int32)
    product = torch.ops.transformers.grouped_mm_fallback(rows.to(weight.dtype), weight.transpose(1, 2), ends)
    if bias is not None:
        product = product + bias[routing.experts.clamp(max=len(weight) - 1)]
    return product  # type: ignore[no-any-return]


class DaqExpertsLinear(QuantizedLayer, ExpertsLinear):  # type: ignore[misc]
    weight_shape, float_weight = ExpertsLinear.weight_shape, ExpertsLinear.float_weight
    stored, compute = ExpertsLinear.stored, ExpertsLinear.compute

    @classmethod
    def config_of(cls, config: DaqConfig, layer: Any) -> DaqConfig:
        layer.per_expert = config.weight_granularity == "tensor"
        return config.per_row().replace(bias_correction=False)

    def weight_keys(self, name: str) -> list[str]:
        return [f"{name.rpartition('.')[0]}.{self.place[1]}".lstrip(".")]

    def drop_parameters(self) -> None:
        module, parameter = self.place
        module._parameters[parameter] = None


class OneExpert:
    """The layer of one expert by itself, for what fits one layer after the other. Its tensors are parts of those of all experts,
    so what is written to them is written there.

    weight: shape (out, in).
    """

    standardizes = False

    def __init__(self, layer: DaqExpertsLinear, expert: int) -> None:
        weight: Tensor = layer.weight.detach()[expert]
        self.weight = weight.t() if has(layer.place[0], "is_transposed") else weight
        self.a_quant, self.daq_name = layer.a_quant, f"{layer.daq_name}, expert {expert}"
        self.w_quant = copy.copy(layer.w_quant)
        parts = layer.w_quant._parameters.items()
        rows = {name: None if value is None else value.detach().chunk(layer.sizes[0])[expert] for name, value in parts}
        self.w_quant._parameters = rows  # type: ignore[assignment]
        if layer.per_expert:
            self.w_quant.granularity = "tensor"

    def smoothed(self, x: Tensor) -> Tensor:
        """The input: channels of experts are not divided."""
        return x

    def float_weight(self) -> Tensor:
        return self.weight.contiguous()

    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def as_parameter(self, weight: Tensor) -> Tensor:
        return weight

    def write_weight(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def codes(self) -> Tensor:
        return self.w_quant.codes(self.float_weight())


class PackedExpertsLinear(PackedLayer, ExpertsLinear):  # type: ignore[misc]
    """Unpacks the weight of an expert that gets tokens, one after the other."""

    stored, compute = ExpertsLinear.stored, ExpertsLinear.compute

    @property
    def sizes(self) -> tuple[int, int, int]:
        experts, columns = self.place[0].num_experts, self.shape[-1]
        return experts, math.prod(self.shape) // (experts * columns), columns

    def path(self, x: Tensor) -> str:
        return "unpacked"

    def quantized_forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.as_quantized(x)
        routing, bias, coded = self.routing, self.bias, self.coded()
        assert routing is not None
        experts, out, columns = self.sizes
        if out * columns % (5 if coded.grid == "ternary" else 8):  # an expert may end inside of a byte
            return self.as_quantized(x)
        x = x if self.a_quant is None else self.a_quant(x)
        streams, scales = coded.stream.view(experts, -1), coded.scale.view(experts, -1)

        def product(expert: int, rows: Tensor) -> Tensor:
            own = coded._replace(stream=streams[expert], scale=scales[expert], shape=(out, columns))
            return F.linear(rows, own.weight(rows.dtype), None if bias is None else bias[expert])

        return _of_each(product, routing.rows(x), routing, out)


LAYER_TYPES[ExpertsLinear] = DaqExpertsLinear
DaqExpertsLinear.float_class = PackedExpertsLinear.float_class = ExpertsLinear
PACKED_TYPES[DaqExpertsLinear] = PackedExpertsLinear
register_notrace_module(DaqExpertsLinear)
register_notrace_module(PackedExpertsLinear)
