"""What PEFT does otherwise with quantized and packed layers. Nothing of hf_daq's layers is loaded before such a layer is met."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.peft_model import PeftModel
from peft.tuners.lora.model import LoraModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper


def register() -> None:
    """Put the functions below in place of those of PEFT, which they call."""
    for owner, name, hook in (
        (LoraModel, "_create_new_module", _create_new_module),
        (BaseTuner, "_replace_module", _replace_module),
        (TrainableTokensLayer, "forward_adapters", _forward_adapters),
        (ModulesToSaveWrapper, "update", _update),
        (PeftModel, "_setup_prompt_encoder", _setup_prompt_encoder),
    ):
        wrapped: Any = wraps(getattr(owner, name))(hook(getattr(owner, name)))
        setattr(owner, name, staticmethod(wrapped) if owner is LoraModel else wrapped)


def _create_new_module(create: Callable[..., Any]) -> Callable[..., Any]:
    """`LoraConfig(init_lora_weights="daq")` makes the LoRA layers of `integrations.peft`."""

    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        if lora_config.init_lora_weights not in ("daq", "daq_bounds"):
            return create(lora_config, adapter_name, target, **kwargs)
        from .peft import inside

        return inside(lora_config, adapter_name, target, **kwargs)

    return create_new_module


def _replace_module(replace: Callable[..., Any]) -> Callable[..., Any]:
    """Adapters of some kinds do not call the layer but read its weight: with them it would not be quantized."""

    def replace_module(self: Any, parent: Any, child_name: str, new_module: Any, child: Any) -> Any:
        if hasattr(child, "daq_name"):
            from .peft import check_calls

            check_calls(new_module, child)
        return replace(self, parent, child_name, new_module, child)

    return replace_module


def _forward_adapters(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A quantized table, or a layer tied to it, computes with the rows that are trained in it, quantized: what is trained is
    what is merged."""

    def forward_adapters(self: Any, x: Any, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        plain = self.disable_adapters or self.merged or not active_adapters
        if plain or getattr(self.base_layer, "w_quant", None) is None or not hasattr(self.base_layer, "daq_name"):
            return forward(self, x, active_adapters, *args, **kwargs)
        from torch.func import functional_call

        self._check_overlapping_tokens(active_adapters)
        weight = {"weight": self.get_merged_weights(active_adapters)}
        return functional_call(self.base_layer, weight, (x,), tie_weights=False)

    return forward_adapters


def _update(update: Callable[..., Any]) -> Callable[..., Any]:
    """Of a packed layer there is nothing to train in a copy."""

    def update_wrapper(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        packed = [module for module in self.original_module.modules() if hasattr(module, "weight_codes")]
        if packed:
            from ..errors import ModelError

            raise ModelError(
                f"layer {packed[0].daq_name!r} is packed, and modules_to_save (which task_type may add to) trains a copy of "
                "it: codes do not learn. First write hf_daq.unpack(model), or train it by target_modules"
            )
        update(self, adapter_name, *args, **kwargs)

    return update_wrapper


def _setup_prompt_encoder(setup: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT looks for the table of words among the parameters."""

    def setup_prompt_encoder(self: Any, adapter_name: str) -> None:
        kind = self.peft_config[adapter_name].peft_type
        find = getattr(self.base_model, "get_input_embeddings", None)
        if find is not None and kind not in ("PREFIX_TUNING", "CARTRIDGE") and hasattr(find(), "weight_codes"):
            from ..errors import ModelError

            raise ModelError(
                f"layer {find().daq_name!r} is packed, and {kind.value} looks for its weight among the parameters: first "
                "write hf_daq.unpack(model), or take peft.PrefixTuningConfig"
            )
        setup(self, adapter_name)

    return setup_prompt_encoder
