"""`pack` and `unpack`: float weights become codes of a few bits, for inference, and come back."""

from __future__ import annotations

from torch import nn

from .model.patch import pack_layers, unpack_layers
from .model.roles import is_transformers_model
from .nn.packed import shared_copy


def pack(model: nn.Module) -> nn.Module:
    """Replace the float weight of every quantized layer by its codes, in place, and return the model in evaluation mode.

    1 to 8 bits a weight, dense, and one float32 scale a layer, channel or group; its outputs stay what they were, bit for
    bit. The weights exist in float only while their layer computes, so that memory is saved, not time: `export_onnx`
    gives a file that is fast. `save_pretrained` writes a packed checkpoint, which opens like any other.

    Raises:
        ModelError: not quantized, packed already, wrapped or sharded. CalibrationError: not calibrated. The model is then
        left as it was.
    """
    pack_layers(model)
    _tell_transformers(model)
    return model.eval()


def unpack(model: nn.Module) -> nn.Module:
    """Inverse of `pack`, in place: a model that can be trained, whose float weights are the values they were rounded to.

    Raises:
        ModelError: not packed, or a layer standardises its weight in the forward, so that its codes are no weights to
        train. The model is then left as it was.
    """
    unpack_layers(model)
    _tell_transformers(model)
    return model


def packed_copy(model: nn.Module) -> nn.Module:
    """A packed copy that shares what packing does not change with the model."""
    return pack(shared_copy(model))


def _tell_transformers(model: nn.Module) -> None:
    if is_transformers_model(model):
        from .integrations import transformers as hub_transformers

        hub_transformers.attach(model)
