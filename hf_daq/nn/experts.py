"""Experts of a mixture that transformers keeps in parameters of three dimensions, as two layers each.

A quantized experts module is the float one's class with `SplitExperts` in front. Its projections are child modules
that own quantizers and no weight: the Parameters stay where they were, under their names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  # its operator, for graphs of torch.compile
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..config import DaqConfig
from .layers import LAYER_TYPES, QuantizedLayer
from .leaf import Leaf
from .packed import PACKED_TYPES, PackedLayer
from .swap import change_class

_LAYERS = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
"""Parameter -> child module that computes with it."""


_OF_LLAMA4 = {"has_gate": True, "has_bias": False, "is_transposed": True}


def _has(experts: nn.Module, what: str) -> bool:
    """What transformers notes of experts in attributes; not of those of Llama 4."""
    found: bool = getattr(experts, what, _OF_LLAMA4[what])
    return found


# ------------------------------------------------------------------------------------------------ one of the two layers


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
        return module._parameters[name] if own is None else own

    @property
    def bias(self) -> Any:
        """Shape (experts, out), or None."""
        module, name = self.place
        return getattr(module, f"{name}_bias") if _has(module, "has_bias") else None

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
        return (experts, columns, out) if _has(self.place[0], "is_transposed") else (experts, out, columns)

    def float_weight(self) -> Tensor:
        weight = self.weight.transpose(1, 2) if _has(self.place[0], "is_transposed") else self.weight
        result: Tensor = weight.contiguous().view(self.weight_shape())  # packed ones are, and sums go by strides
        return result

    def weight_shape(self) -> tuple[int, ...]:
        """(experts, out, in) with a scale an expert, else (experts * out, in)."""
        experts, out, columns = self.sizes
        return (experts, out, columns) if self.per_expert else (experts * out, columns)

    def stored(self, weight: Tensor) -> Tensor:
        weight = weight.reshape(self.place[0].num_experts, -1, weight.shape[-1])
        return weight.transpose(1, 2) if _has(self.place[0], "is_transposed") else weight

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
        self.weight = weight.t() if _has(layer.place[0], "is_transposed") else weight
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


# ------------------------------------------------------------------------------------------------------------ both


class SplitExperts(Leaf):
    """Comes before the class of fused experts, and computes as transformers' experts do, in two layers. Only experts that get
    tokens compute."""

    float_class: ClassVar[Any]
    num_experts: int
    has_gate: bool
    has_post_expert_norm: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: shape (tokens, in). top_k_index, top_k_weights: shape (tokens, k)."""
        own: Any = self
        first, down = expert_layers(self).values()
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        every = torch.arange(self.num_experts, device=experts.device)
        ends = torch.searchsorted(experts, every, right=True)
        routing = Routing(order // top_k_index.shape[-1], experts, ends, by_token=True)
        x = _routed(first, hidden_states, routing)
        x = own._apply_gate(x) if self.has_gate else own.act_fn(x)
        x = _routed(down, x, routing._replace(by_token=False))
        if self.has_post_expert_norm:
            x = own.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        pairs = torch.empty_like(x).index_copy(0, order, x)
        return pairs.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        layer = self._modules.get(_LAYERS.get(name, "")) if value is None else None
        return value if layer is None else layer.weight  # packed: computed from the codes

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickle, which does not find a class that was made here."""
        return _blank, (self.float_class,), self.__getstate__()  # type: ignore[no-untyped-call]


class SplitLlama4Experts(SplitExperts):
    """The experts of Llama 4, which read rows that are sorted by expert, all tokens for each. The rows of tokens that go to other
    experts are zeros, and give zeros."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states: shape (experts * tokens, in)."""
        own: Any = self
        first, down = expert_layers(self).values()
        seen = _rows_of_llama4(hidden_states, self.num_experts)
        count, every = seen.shape[1], torch.arange(self.num_experts, device=seen.device)
        # A graph of torch.compile cannot know how many rows there are.
        rows = torch.arange(seen.numel(), device=seen.device) if torch.compiler.is_compiling() else _places(seen)
        experts = rows // count
        routing = Routing(rows % count, experts, torch.searchsorted(experts, every, right=True), by_token=False)
        gate, up = _routed(first, hidden_states[rows], routing).chunk(2, dim=-1)
        x = _routed(down, up * own.act_fn(gate), routing)
        if torch.compiler.is_compiling():
            return x * seen.view(-1, 1)
        return x.new_zeros(seen.numel(), x.shape[-1]).index_copy(0, rows, x)


def _rows_of_llama4(hidden_states: Tensor, experts: int) -> Tensor:
    """Which rows are of tokens that an expert gets, shape (experts, tokens). A token of zeros goes to the first."""
    seen = hidden_states.detach().reshape(experts, -1, hidden_states.shape[-1]).ne(0).any(2)
    nowhere = ~seen.any(0)
    return torch.cat([seen[:1] | nowhere, seen[1:]])


def _places(seen: Tensor) -> Tensor:
    return seen.view(-1).nonzero().squeeze(1)


def pair_count(module: Any, args: Iterable[Any]) -> int:
    """How many pairs of a token and an expert float experts compute, called with these arguments."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if _is_of_llama4(type(module)):
        return int(_rows_of_llama4(tensors[0], module.num_experts).sum())
    return next(value for value in tensors if not value.is_floating_point()).numel()


def _routed(layer: Any, x: Tensor, routing: Routing) -> Tensor:
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


_SPLIT: dict[type[nn.Module], type[SplitExperts]] = {}


def _split_class(kind: type[nn.Module]) -> type[SplitExperts]:
    if kind not in _SPLIT:
        own = {"float_class": kind, "__module__": __name__}
        split: Any = SplitLlama4Experts if _is_of_llama4(kind) else SplitExperts
        _SPLIT[kind] = type(f"Daq{kind.__name__}", (split, kind), own)
        register_notrace_module(_SPLIT[kind])
    return _SPLIT[kind]


def _blank(kind: type[nn.Module]) -> Any:
    return object.__new__(_split_class(kind))


def fused_experts(module: Any) -> dict[str, str]:
    """Child module -> parameter of experts that can be split, in the order in which they compute; empty for all other modules.

    The sign is transformers' `use_experts_implementation`: whatever has it computes alike. Those of Llama 4 are known by their
    class. Parameters must be those it names.
    """
    code = getattr(type(module).forward, "__code__", None)
    alike = code is not None and code.co_freevars == ("experts_interface", "original_forward")
    if not alike and not _is_of_llama4(type(module)):
        return {}
    names = ["gate_up_proj" if _has(module, "has_gate") else "up_proj", "down_proj"]
    expected = {*names, *(f"{name}_bias" for name in names if _has(module, "has_bias"))}
    found = {name: value for name, value in module._parameters.items() if value is not None}
    shapes = [tuple(found[name].shape) for name in names if name in found]
    fits = found.keys() == expected and all(len(shape) == 3 and shape[0] == module.num_experts for shape in shapes)
    return (
        {_LAYERS[name]: name for name in names} if fits and not any(map(module._modules.get, _LAYERS.values())) else {}
    )


def _is_of_llama4(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")


def expert_layers(module: nn.Module) -> dict[str, Any]:
    """The two layers of split experts, in the order in which they compute."""
    return {name: module._modules[name] for name in _LAYERS.values() if name in module._modules}


def split_experts(modules: Iterable[nn.Module]) -> None:
    """Give experts their layers, in place. Their outputs stay what they were."""
    for module in modules:
        if layers := fused_experts(module):
            for name, parameter in layers.items():
                module.register_module(name, ExpertsLinear(module, parameter))
            change_class(module, _split_class(type(module)))


def join_experts(model: nn.Module) -> None:
    """Inverse of `split_experts`, for all experts without a quantized layer."""
    for module in model.modules():
        if isinstance(module, SplitExperts):
            layers = expert_layers(module)
            if all(type(layer) is ExpertsLinear for layer in layers.values()):
                for name in layers:
                    del module._modules[name]
                change_class(module, module.float_class)
