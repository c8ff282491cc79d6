"""`apply_daq` and `remove_daq`: patch a float model in place, and undo it."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from .config import DaqConfig
from .errors import ModelError
from .model.patch import patch, start_weights, unpatch
from .model.plan import config_from
from .model.roles import is_transformers_model


def apply_daq(model: nn.Module, config: DaqConfig | None = None, **kwargs: Any) -> nn.Module:
    """Quantize the layers of a float model in place and return it.

    Float weights keep their Parameter objects and names; every quantized layer gains child modules `w_quant` and
    `a_quant` with the learnable bounds and scales. Those of the weights start from the float weights, those of the layer
    inputs are set by `calibrate` or by loading a state dict. The resolved config is kept as `model.daq_config`. A
    transformers model ends as `from_pretrained(..., quantization_config=config)` would have loaded it. On an error the
    model is left as it was.

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
    patch(model, config)
    start_weights(model)
    if is_transformers_model(model):
        from .integrations import transformers as hub_transformers

        hub_transformers.attach(model)
    return model


def remove_daq(model: nn.Module, weights: Literal["float", "quantized"] = "float") -> nn.Module:
    """Give back the float layers, in place.

    Args:
        weights: "float": the weights that were trained under quantization; "quantized": the values they were quantized
            to, in the units of the float layer, and their bias corrections in the biases, so that only the quantization
            of activations is lost.

    Raises:
        ModelError: the model is not quantized, or a layer standardises its weight in the forward, so that quantized
            values cannot be stored in it.
        CalibrationError: `weights="quantized"` before calibration.
    """
    if weights not in ("float", "quantized"):
        raise ModelError(f"weights={weights!r} must be 'float' or 'quantized'")
    unpatch(model, quantized=weights == "quantized")
    if is_transformers_model(model):
        from .integrations import transformers as hub_transformers

        hub_transformers.detach(model)
    return model
