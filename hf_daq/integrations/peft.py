"""LoRA inside the quantizer, for PEFT: `LoraConfig(init_lora_weights="daq")` makes a layer compute with `Q(W + s B A)`, and
"daq_bounds" lets the bounds and scales of its weight learn too, which the adapter has then of its own.

What is trained is then what is merged. In a packed layer W is the weight that its codes mean, and merging writes other codes.
The word is kept in `adapter_config.json`, so that an adapter that was trained this way opens this way; without hf_daq PEFT
refuses it as an unknown initialization.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..nn.adapted import add_adapters_
from ..nn.base import DaqLayer
from ..nn.kept import Fingerprint
from ..nn.layers import QuantizedLayer
from ..nn.packed import PackedLayer
from ..nn.quantizers import is_shard
from ..nn.recompute import without_weight
from ..nn.siblings import once
from ..nn.sums import finite
from ..nn.weight_norm import Normed

INSIDE, WITH_BOUNDS = "daq", "daq_bounds"


class InsideLora:
    """Comes before a LoRA layer of PEFT: the adapted weight, `W + s B A` of all active adapters, is what the base layer
    computes with, quantized or not. It has the dtype of W.

    lora_w_quant: adapter -> weight quantizer of its own, for those with `init_lora_weights="daq_bounds"`.
    packed_w_quant: the weight quantizer of a packed base layer, which has none; it is frozen, and in no file. In a tuple, for
        it is no module of this one.

    No weight is kept for the backward: it is computed from W, or its codes, and the adapters once more.
    """

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_w_quant")
    adapts_weight = True
    base_layer: Any
    packed_w_quant: tuple[Any, ...] = ()
    _known: tuple[Fingerprint, Any, Tensor] | None = None
    _sharded = False

    def update_layer(self: Any, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        _check_config(config, adapter_name)
        if "lora_w_quant" not in self._modules:
            self.lora_w_quant = nn.ModuleDict()
            self._unmerged: dict[str, Tensor] = {}
            if isinstance(self.base_layer, PackedLayer):
                self.packed_w_quant = (self.base_layer.weight_quantizer().requires_grad_(False),)
        if config.init_lora_weights == WITH_BOUNDS and isinstance(self.base_layer, DaqLayer):
            learning: Any = copy.deepcopy(self.packed_w_quant[0] if self.packed_w_quant else self.base_layer.w_quant)
            self.lora_w_quant[adapter_name] = learning.requires_grad_(True)
        config = copy.copy(config)
        config.init_lora_weights = True
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)  # type: ignore[misc]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise ModelError(
                "adapter_names was passed, and an adapter inside the quantizer changes the weight for the whole batch; call "
                "model.set_adapter(name) and pass the rows of one adapter at a time"
            )
        for key in lora.VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if isinstance(self.base_layer, DaqLayer):
            return self._quantized_forward(x, names)

        def compute(x: Tensor) -> Tensor:
            parameters = {"weight": self._weight(names)}
            output: Tensor = functional_call(self.base_layer, parameters, (x, *args), kwargs, tie_weights=False)
            return output

        return without_weight(compute, x)

    def _quantized_forward(self: Any, x: Tensor, names: list[str]) -> Tensor:
        layer = self.base_layer
        if isinstance(layer, QuantizedLayer):
            layer._check_calibrated()
        inside = getattr(layer, "low_memory", False) and layer.a_quant is not None
        if not inside and layer.a_quant is not None:
            x = once(layer, x, layer.a_quant)

        def compute(x: Tensor) -> Tensor:
            own = self._own_quantizer(names)
            bias = layer.quantized_bias() if own is None else own.shifted(layer.bias, layer.weight_dtype)
            output: Tensor = layer.compute(layer.a_quant(x) if inside else x, self._weight(names), bias)
            return output

        return without_weight(compute, x)

    def _weight(self: Any, names: list[str]) -> Tensor:
        """What the base layer computes with, with gradients; where nothing learns it is kept until one of its parts changes."""
        quantizer = self._quantizer(names)
        parts = [] if self.packed_w_quant else [self.base_layer.weight]
        parts += [*self._factors(names), *(() if quantizer is None else quantizer.parameters())]
        if getattr(self.base_layer, "smooth", None) is not None:
            parts.append(self.base_layer.smooth)
        unkept = self.training or self._sharded or self.packed_w_quant or torch.compiler.is_compiling()
        if unkept or not _may_keep(parts):
            self._known = None
            return self._computed_weight(names)  # type: ignore[no-any-return]
        dtype = None if quantizer is None else quantizer.result_dtype(parts[0])
        options = names, self._scalings(names), dtype
        if self._known is None or self._known[1] != options or not self._known[0].fits(parts):
            with torch.inference_mode(False), torch.no_grad():
                self._known = Fingerprint(parts), options, self._computed_weight(names)
        return self._known[2]  # type: ignore[no-any-return]

    def _computed_weight(self: Any, names: list[str]) -> Tensor:
        quantizer, weight = self._quantizer(names), self._sum(names)
        return self._stored(weight) if quantizer is None else quantizer(self._smoothed(weight))  # type: ignore[no-any-return]

    def _smoothed(self: Any, weight: Tensor) -> Tensor:
        layer = self.base_layer
        return layer.smoothed_weight(weight) if isinstance(layer, DaqLayer) else weight

    def _quantizer(self: Any, names: list[str]) -> Any:
        """The weight quantizer; None for a layer in float."""
        own = self._own_quantizer(names)
        if own is not None or not isinstance(self.base_layer, DaqLayer):
            return own
        if self.packed_w_quant:
            return self.packed_w_quant[0].to(self.base_layer.weight_codes.device).train(self.training)
        return self.base_layer.w_quant

    def _stored(self: Any, weight: Tensor) -> Tensor:
        """A weight in the shape in which it is quantized, as the base layer has it; or the other way round."""
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def _factors(self: Any, names: list[str]) -> list[Tensor]:
        return [part[name].weight for name in names for part in (self.lora_A, self.lora_B)]

    def _scalings(self: Any, names: list[str]) -> tuple[float, ...]:
        return tuple(self.scaling[name] for name in names)

    def _sum(self: Any, names: list[str]) -> Tensor:
        """`W + s B A`, in the shape in which it is quantized."""
        layer = self.base_layer
        if isinstance(layer, PackedLayer):
            weight = layer.unsmoothed_weight(layer.float_weight())
        else:
            weight = self._stored(layer.weight).clone(memory_format=torch.contiguous_format)
        with torch.autocast(weight.device.type, enabled=False):  # what is merged is no product in bfloat16 either
            return add_adapters_(weight, self._scalings(names), *self._factors(names))

    def _own_quantizer(self: Any, names: list[str]) -> Any:
        """The weight quantizer that one of these adapters has of its own; None without one."""
        own = [name for name in names if name in self.lora_w_quant]
        if len(own) > 1:
            raise ModelError(
                f'adapters {own} are active, and with init_lora_weights="{WITH_BOUNDS}" each has bounds of its own; activate '
                "one of them: model.set_adapter(name)"
            )
        return self.lora_w_quant[own[0]] if own else None

    def _own_bounds(self: Any, names: list[str]) -> dict[str, Tensor]:
        """The parameters of `_own_quantizer`, by their names in the base layer."""
        own = self._own_quantizer(names)
        return {} if own is None else {f"w_quant.{key}": value for key, value in own.named_parameters()}

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self.lora_w_quant and any(key.startswith(f"{prefix}lora_w_quant.") for key in state_dict):
            raise ModelError(
                f"the adapter has bounds for layer {prefix.rstrip('.')!r}, which is not quantized here; quantize or open the "
                "model as it was when the adapter was made"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _get_base_layer_device_and_dtype(self: Any, base_layer: Any) -> Any:
        """Without the weight of a packed layer, which would be computed."""
        if isinstance(base_layer, PackedLayer):
            return base_layer.weight_codes.device, base_layer.weight_dtype
        return super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[misc]

    def train(self: Any, mode: bool = True) -> Any:
        self._sharded = self._has_shards()  # whole weights of all layers would undo the sharding
        return super().train(mode)  # type: ignore[misc]

    def _has_shards(self: Any) -> bool:
        """Whether FSDP2 shards the layer. It lends whole parameters now and then, so that what was seen once stays."""
        return self._sharded or any(map(is_shard, self.parameters()))

    def _refuse_shards(self: Any) -> None:
        if self._has_shards():
            raise ModelError(
                "merging writes whole weights, and the model is sharded: write model.save_pretrained(folder, "
                "state_dict=accelerator.get_state_dict(model), is_main_process=accelerator.is_main_process), then open model and "
                "adapter in one process and merge there"
            )

    @torch.no_grad()
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put what the base layer computes with into its parameters; what was there is kept for `unmerge`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        self._refuse_shards()
        if isinstance(self.base_layer, PackedLayer):
            self._merge_codes(names, safe_merge)
            return
        merged = {"weight": self._stored(self._sum(names)), **self._own_bounds([*self.merged_adapters, *names])}
        _check_finite(names, merged.values() if safe_merge else ())
        for key, value in merged.items():
            parameter = self.base_layer.get_parameter(key)
            self._unmerged.setdefault(key, parameter.data)
            parameter.data = value.detach().clone()
        self._known = None
        self.merged_adapters.extend(names)

    def _merge_codes(self: Any, names: list[str], safe_merge: bool) -> None:
        """Write the codes of the adapted weight. Codes of codes would not be those that were trained, so adapters that are merged
        already start once more with the others."""
        layer, names = self.base_layer, [*self.merged_adapters, *names]
        self._put_codes_back()
        weight, quantizer = self._sum(names), self._quantizer(names)
        _check_finite(names, (weight, quantizer.scale) if safe_merge else ())
        self._unmerged |= {"weight_codes": layer.weight_codes, "weight_scale": layer.weight_scale}
        layer.write_codes(quantizer.codes(self._smoothed(weight)), quantizer.output_scale)
        self.merged_adapters[:] = names

    def _put_codes_back(self: Any) -> None:
        for key in ("weight_codes", "weight_scale"):
            if key in self._unmerged:
                setattr(self.base_layer, key, self._unmerged.pop(key).to(self.base_layer.weight_codes.device))
        self.base_layer._forget()

    def unmerge(self: Any) -> None:
        """Put back what the base layer had, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._refuse_shards()
        if isinstance(self.base_layer, PackedLayer):
            self._put_codes_back()
        for key, value in self._unmerged.items():
            parameter = self.base_layer.get_parameter(key)
            parameter.data = value.to(parameter.device, parameter.dtype)
        self._unmerged.clear()
        self.merged_adapters.clear()


class InsideLinear(InsideLora, lora.Linear):
    pass


class InsideConv1d(InsideLora, lora.Conv1d):
    pass


class InsideConv2d(InsideLora, lora.Conv2d):
    pass


class InsideConv3d(InsideLora, lora.Conv3d):
    pass


_TYPES: dict[type[nn.Module], Any] = {
    nn.Linear: InsideLinear,
    Conv1D: InsideLinear,
    nn.Conv1d: InsideConv1d,
    nn.Conv2d: InsideConv2d,
    nn.Conv3d: InsideConv3d,
}


def inside(config: Any, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
    """The LoRA layer for a layer of a model.

    Raises:
        ModelError: a layer or an option for which there is no `Q(W + s B A)`.
    """
    name = kwargs.get("target_name")
    kind = next((made for base, made in _TYPES.items() if isinstance(target, base)), None)
    if kwargs.get("parameter_name") is not None or isinstance(target, BaseTunerLayer) or kind is None:
        what = kwargs.get("parameter_name") or type(target).__name__
        problem = f"is a {what}; linear layers and convolutions can be adapted"
    elif isinstance(target, DaqLayer) and target.owner is not None:
        problem = f"computes with the weight of layer {target.owner.daq_name!r}"
    elif isinstance(target, DaqLayer) and target.standardizes:
        problem = "standardizes its weight in every forward"
    elif isinstance(target, Normed):
        problem = "normalizes its weight in every forward"
    elif getattr(target, "groups", 1) > 1:
        problem = "is a convolution with groups"
    else:
        _check_config(config, adapter_name)
        config = copy.copy(config)
        config.fan_in_fan_out = isinstance(target, Conv1D)
        made: nn.Module = kind(target, adapter_name, config=config, **kwargs)
        return made
    raise ModelError(
        f'layer {name!r} {problem}: init_lora_weights="daq" cannot adapt it; leave it out: exclude_modules=[{name!r}]'
    )


class _CalledError(Exception):
    pass


def _called(*_: Any) -> None:
    raise _CalledError


@torch.no_grad()
def check_calls(adapter: nn.Module, layer: Any) -> None:
    """Refuse an adapter around this quantized or packed layer that does not call it: then neither weight nor input would be
    quantized. What tells is a forward with zeros, which ends where the layer is called."""
    if isinstance(layer, PackedLayer) and layer.a_quant is None:
        return  # its weight is what its codes mean
    tensors = itertools.chain(adapter.named_parameters(), adapter.named_buffers())
    # With low_cpu_mem_usage=True an adapter has no values yet.
    absent = {name: torch.zeros_like(tensor, device=layer.weight.device) for name, tensor in tensors if tensor.is_meta}
    handle = layer.register_forward_pre_hook(_called)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functional_call(adapter, absent, (_zeros(layer),), tie_weights=False)
    except Exception:  # called, or an adapter that needs more than an input
        return
    finally:
        handle.remove()
    kind = f"{type(adapter).__module__}.{type(adapter).__name__}"
    raise ModelError(
        f"{kind} reads the weight of layer {layer.daq_name!r} and does not call it, so it would not be quantized: take "
        "adapters that call their layer, as LoraConfig's do, or leave the layer out of target_modules"
    )


def _zeros(layer: Any) -> Tensor:
    """One input."""
    if isinstance(layer, nn.Embedding):
        return torch.zeros(1, 1, dtype=torch.long, device=layer.weight.device)
    if isinstance(layer, nn.modules.conv._ConvNd):
        sizes = [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape: tuple[int, ...] = (1, layer.in_channels, *sizes)
    else:
        shape = (1, layer.weight_shape()[1])
    return torch.zeros(shape, dtype=layer.weight_dtype, device=layer.weight.device)


def _check_config(config: Any, adapter_name: str) -> None:
    if config.init_lora_weights not in (INSIDE, WITH_BOUNDS):
        raise ModelError(
            f"adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, and the layers have an adapter "
            f'inside their quantizers: write LoraConfig(..., init_lora_weights="{INSIDE}"), or give it a model of its own'
        )
    if config.lora_dropout:
        raise ModelError(
            f"lora_dropout={config.lora_dropout} leaves out inputs of the adapter, and an adapter inside the quantizer has "
            "no inputs of its own: write lora_dropout=0.0"
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in (*variants, "lora_bias"):
        if getattr(config, name):
            raise ModelError(
                f'{name}={getattr(config, name)!r} does not go with init_lora_weights="{INSIDE}", which is plain LoRA: '
                f"leave {name} out"
            )


def _check_finite(names: list[str], values: Iterable[Tensor]) -> None:
    if not all(map(finite, values)):
        raise ModelError(f"adapters {names} of a layer were not merged: a merged value is not finite")


def _may_keep(parts: list[Any]) -> bool:
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return False
    return all(type(part) in (Tensor, nn.Parameter) and not part.is_inference() for part in parts)
