"""Experts of a mixture that transformers keeps in parameters of three dimensions, as two layers each: a quantized experts module is
the float one's class with `SplitExperts` in front."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .experts import ExpertsLinear, Routing, has, routed
from .leaf import Leaf
from .swap import change_class

LAYERS = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
"""Parameter -> child module that computes with it."""


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
        x = routed(first, hidden_states, routing)
        x = own._apply_gate(x) if self.has_gate else own.act_fn(x)
        x = routed(down, x, routing._replace(by_token=False))
        if self.has_post_expert_norm:
            x = own.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        pairs = torch.empty_like(x).index_copy(0, order, x)
        return pairs.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        layer = self._modules.get(LAYERS.get(name, "")) if value is None else None
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
        gate, up = routed(first, hidden_states[rows], routing).chunk(2, dim=-1)
        x = routed(down, up * own.act_fn(gate), routing)
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
    names = ["gate_up_proj" if has(module, "has_gate") else "up_proj", "down_proj"]
    expected = {*names, *(f"{name}_bias" for name in names if has(module, "has_bias"))}
    found = {name: value for name, value in module._parameters.items() if value is not None}
    shapes = [tuple(found[name].shape) for name in names if name in found]
    fits = found.keys() == expected and all(len(shape) == 3 and shape[0] == module.num_experts for shape in shapes)
    return {LAYERS[name]: name for name in names} if fits and not any(map(module._modules.get, LAYERS.values())) else {}


def _is_of_llama4(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")


def expert_layers(module: nn.Module) -> dict[str, Any]:
    """The two layers of split experts, in the order in which they compute."""
    return {name: module._modules[name] for name in LAYERS.values() if name in module._modules}


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
