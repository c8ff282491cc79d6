"""`apply_daq`, `remove_daq`, `pack`, `unpack`: a model changed in place, and back."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from .config import DaqConfig
from .errors import ModelError
from .model.patch import pack_layers, patch, restart_weights, start_weights, unpack_layers, unpatch
from .model.plan import config_from
from .model.roles import is_transformers_model
from .nn.packed import packed_layers, shared_copy
from .nn.swap import uninterrupted


def apply_daq(model: nn.Module, config: DaqConfig | None = None, **kwargs: Any) -> nn.Module:
    """Quantize the layers of a float model in place and return it.

        hf_daq.apply_daq(model, weight_bits=2, activation_bits=4, first_last_bits=8)
        print(model.daq_config.layers)  # the bits of each quantized layer

    Float weights keep their Parameter objects and names; every quantized layer gains child modules `w_quant` and
    `a_quant` with the learnable bounds and scales. Those of the weights start from the float weights, those of the layer
    inputs are set by `calibrate` or by loading a state dict, with the `daq_config` of the model that it is from. The resolved config is kept as `model.daq_config`. A
    transformers model ends as `from_pretrained(..., quantization_config=config)` would have loaded it. Where the weight of
    a layer is frozen (`requires_grad=False`), so are its bounds and scales. On an error the model is left as it was.

    Args:
        model: a float model, on any device (meta too), before it is wrapped, sharded or given to an optimizer.
        config: a `DaqConfig`, or its arguments as keywords, e.g. `apply_daq(model, bits=3)`.

    Raises:
        ConfigError: a rule matches nothing.
        ModelError: already quantized, wrapped, sharded or scripted; nothing to quantize.
    """
    config = config_from(config, kwargs)
    if config.packed:
        raise ModelError("packed=True is written by hf_daq.pack; apply_daq without it, calibrate or train, then pack")
    with uninterrupted():
        patch(model, config)
    try:
        start_weights(model)
    except BaseException:
        with uninterrupted():
            unpatch(model)
        raise
    tell_transformers(model)
    return model


def remove_daq(model: nn.Module, weights: Literal["float", "quantized"] = "float") -> nn.Module:
    """Give back the float layers, in place.

    Args:
        weights: "float": the weights that were trained under quantization; "quantized": the values they were quantized
            to, in the units of the float layer, and their bias corrections in the biases, so that only the quantization
            of activations is lost.

    Raises:
        ModelError: the model is not quantized, or a layer standardizes its weight in the forward, so that quantized
            values cannot be stored in it.
        CalibrationError: `weights="quantized"` before calibration.
    """
    if weights not in ("float", "quantized"):
        raise ModelError(f"weights={weights!r} must be 'float' or 'quantized'")
    with uninterrupted():
        unpatch(model, quantized=weights == "quantized")
    if is_transformers_model(model):
        from .integrations.transformers import detach

        detach(model)
    return model


def restart(model: nn.Module) -> nn.Module:
    """Start the weight quantizers of a calibrated model anew from the weights as they are now, in place, and return it.

        model = peft_model.merge_and_unload()
        hf_daq.restart(model)

    For weights that something else than training changed much, as merging adapters does: bounds and scales fit the new
    weights, and a correction of the outputs that was found for the old ones is dropped. Bounds of layer inputs stay.

    Raises:
        ModelError: the model is not quantized, packed or sharded. CalibrationError: not calibrated.
    """
    restart_weights(model)
    return model


def pack(model: nn.Module, *, fast: bool | None = None) -> nn.Module:
    """Replace the float weight of every quantized layer by its codes, in place, and return the model in evaluation mode.

    1 to 8 bits a weight, dense, and one float32 scale a layer, channel or group. On the CPU linear layers whose weights alone
    are quantized compute from the codes, faster than in float where few rows meet a weight, as in `generate`; layers whose
    inputs are quantized too compute in integers. Outputs of a layer are the same up to rounding of float32 (`summary` names
    the way and the error), so that an input of the next one that lies between two codes may get either. The weights of
    other layers exist in float only while the layer computes: memory is saved, not time. `save_pretrained` writes a
    packed checkpoint, which opens like any other.

    On a GPU linear layers whose inputs are quantized compute in integers, and weights in bfloat16 or float32 come from
    one kernel, which for one row of inputs computes the product too.

    Args:
        fast: True also allows layers to round more than the quantized model does, where that is faster: on a GPU weights of up to 4
            bits with bfloat16 inputs have scales in bfloat16, for torch's kernel of 4-bit weights. It is not saved. On a
            packed model, as one opened from a folder, True and False change nothing else.

    Raises:
        ModelError: not quantized, packed already, wrapped or sharded. CalibrationError: not calibrated. The model is then
        left as it was.
    """
    if fast is None or not packed_layers(model):
        with uninterrupted(), torch.inference_mode(False):
            pack_layers(model)
            tell_transformers(model)
    for layer in packed_layers(model).values():
        layer.fast = bool(fast)
        layer._forget()
    return model.eval()


def unpack(model: nn.Module) -> nn.Module:
    """Inverse of `pack`, in place: a model that can be trained, whose float weights are the values they were rounded to.

    Raises:
        ModelError: not packed, or a layer standardizes its weight in the forward, so that its codes are no weights to
        train. The model is then left as it was.
    """
    with uninterrupted():
        unpack_layers(model)
        tell_transformers(model)
    return model


def packed_copy(model: nn.Module) -> nn.Module:
    """A packed copy that shares what packing does not change with the model."""
    return pack(shared_copy(model))


def tell_transformers(model: nn.Module) -> None:
    """Let a transformers model know its config."""
    if is_transformers_model(model):
        from .integrations.transformers import attach

        attach(model)
