"""What would write, open or compute something else than the quantized model refuses it: saving in transformers and diffusers, fusing
in timm, torch and ultralytics, and loaders that drop what a float model does not have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any


def _guard(module: str, name: str, guard: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a guarded function in the place of this one, in its module and in those of the library that took it from there. Releases
    that do not have it, or have it elsewhere, are left alone."""
    function: Any = getattr(sys.modules[module], name, None)
    if function is None:
        return
    guarded = wraps(function)(guard(function))
    library = module.partition(".")[0]
    for found, other in list(sys.modules.items()):
        if found.partition(".")[0] == library and getattr(other, "__dict__", {}).get(name) is function:
            setattr(other, name, guarded)


def guard_timm_fusing() -> None:
    _guard("timm.models._manipulate", "reparameterize_model", _before_apply)


def _before_apply(fuse: Callable[..., Any]) -> Callable[..., Any]:
    """`reparameterize_model` refuses a model in which it would fuse quantized layers into float ones."""

    def reparameterize_model(model: Any, inplace: bool = False) -> Any:
        blocks = [
            module
            for module in model.modules()
            if any(hasattr(module, call) for call in ("fuse", "reparameterize", "switch_to_deploy"))
        ]
        fused = [part.daq_name for block in blocks for part in block.modules() if hasattr(part, "daq_name")]
        if fused:
            from ..errors import ModelError

            raise ModelError(
                f"reparameterize_model would fuse the quantized layer {fused[0]!r} into one in float: call it first, model = "
                "timm.utils.reparameterize_model(model), then apply_daq and calibrate"
            )
        return fuse(model, inplace=inplace)

    return reparameterize_model


def guard_transformers() -> None:
    """`PreTrainedModel.save_pretrained` refuses a model of which only a part is quantized, or that is a part of a quantized
    one with a config of its own: it would write its tensors and say nothing of the quantization."""
    from transformers import modeling_utils

    save_pretrained: Any = modeling_utils.PreTrainedModel.save_pretrained

    @wraps(save_pretrained)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = "daq_config" in vars(self) or getattr(self, "_hf_peft_config_loaded", False)
        has_parts = any("daq_config" in vars(module) for module in self.modules())
        # The base model of a quantized one shares its config, and its file says it all.
        says_nothing = getattr(self.config, "quantization_config", None) is None
        if not whole and (has_parts or says_nothing):
            _refuse_parts(self)
        return save_pretrained(self, *args, **kwargs)

    modeling_utils.PreTrainedModel.save_pretrained = save  # type: ignore[method-assign]
    modeling_utils.PreTrainedModel.dtype = property(_dtype_of(modeling_utils.PreTrainedModel.dtype.fget))
    load: Any = getattr(modeling_utils.PreTrainedModel, "_load_pretrained_model", None)
    if load is not None:
        modeling_utils.PreTrainedModel._load_pretrained_model = staticmethod(_refuse_quantized_files(load))


def _dtype_of(first: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`model.dtype`, which is written to the config and opened with, is that of the first parameter: of a packed model it may be a
    bound, which is float32 in any model."""

    @wraps(first)
    def dtype(self: Any) -> Any:
        for name, value in self.named_parameters():
            if value.is_floating_point() and not name.endswith(_BOUNDS):
                return value.dtype
        return first(self)

    return dtype


def _refuse_quantized_files(load: Callable[..., Any]) -> Callable[..., Any]:
    """`from_pretrained` with a config that does not say that the files are quantized would open them in float, and packed ones
    with random weights."""

    @wraps(load)
    def load_what_is_described(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_float_model(
            model,
            checkpoint_files or (),
            "the config that was given does not say so: leave it out, or take that of the folder, config = "
            "AutoConfig.from_pretrained(folder)",
        )
        return load(model, state_dict, checkpoint_files, *args, **kwargs)

    return load_what_is_described


def _refuse_float_model(model: Any, files: Iterable[Any], remedy: str) -> None:
    """Refuse quantized safetensors files for a model without quantized layers."""
    files = [str(file) for file in files if str(file).endswith(".safetensors")]
    if not files or _has_quantized_layers(model):
        return
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            _refuse_quantizers(opened.keys(), file, remedy)


_BOUNDS = "a_quant.lower", "a_quant.upper"
_PAIRS = ("w_quant.lower", "w_quant.upper"), ("weight_codes", "weight_scale")
"""Tensors of a quantized layer and of a packed one."""


def _refuse_quantizers(names: Iterable[str], source: str, remedy: str) -> None:
    known = set(names)
    if any(name.endswith(one) and name.removesuffix(one) + other in known for name in known for one, other in _PAIRS):
        from ..errors import CheckpointError

        raise CheckpointError(f"{source} is quantized, and {remedy}")


_OPEN = (
    "the model is not. Write hf_daq.from_pretrained(folder), with model=... for a class of your own; or apply_daq(model, ...) "
    "with the config that it was quantized with, before it is loaded"
)


def guard_timm_loading() -> None:
    """`create_model(..., pretrained_cfg_overlay={"file": ...}, num_classes=...)` would open a quantized file in float."""

    def guard(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_pretrained(
            model: Any,
            pretrained_cfg: Any = None,
            num_classes: int = 1000,
            in_chans: int = 3,
            filter_fn: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            def checked(state_dict: Any, *of_model: Any) -> Any:
                if not _has_quantized_layers(model):
                    _refuse_quantizers(state_dict, "the file of weights", _OPEN)
                return state_dict if filter_fn is None else filter_fn(state_dict, *of_model)

            return load(model, pretrained_cfg, num_classes, in_chans, checked, *args, **kwargs)

        return load_pretrained

    _guard("timm.models._builder", "load_pretrained", guard)


def guard_accelerate() -> None:
    """`load_checkpoint_in_model` and `load_checkpoint_and_dispatch`."""
    _guard("accelerate.utils.modeling", "load_checkpoint_in_model", _quantized_models_alone)


def guard_hub_loading() -> None:
    """`load_torch_model`."""
    _guard("huggingface_hub.serialization._torch", "load_torch_model", _quantized_models_alone)


def _quantized_models_alone(load: Callable[..., Any]) -> Callable[..., Any]:
    """A loader of a model and the path of a file, of an index or of a folder. It leaves out what the model does not have, and what
    the file does not have stays."""

    def load_what_fits(model: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        whole = Path(path)
        folder = whole if whole.is_dir() else whole.parent if whole.suffix == ".json" else None
        files = [whole] if folder is None else sorted(folder.glob("*.safetensors"))
        _refuse_float_model(model, files, _OPEN)
        _prepare(model, files)
        return load(model, path, *args, **kwargs)

    return load_what_fits


def _prepare(model: Any, files: Iterable[Any]) -> None:
    """Refuse files for other bits than the model's, or packed ones for one that is not, and let its quantizers divide inputs where those
    of the files do."""
    from safetensors import safe_open

    from ..errors import CheckpointError
    from ..files.header import METADATA_KEY, parse_header
    from ..nn.quantizers import ActivationQuantizer

    modules: dict[str, Any] = dict(model.named_modules())
    shapes: dict[str, Any] = {}
    for file in (file for file in files if str(file).endswith(".safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = [name for name in opened.keys() if ".a_quant." in name]  # noqa: SIM118
            shapes |= {name: opened.get_slice(name).get_shape() for name in names}
        if METADATA_KEY not in metadata:
            continue
        config = parse_header(file, metadata, {}).config
        for name, entry in (config.layers or {}).items():
            bits = entry["weight_bits"], entry["activation_bits"]
            layer = modules.get(name)
            if layer is None or not hasattr(layer, "daq_name"):
                continue
            if config.packed != hasattr(layer, "weight_codes"):
                is_packed, other = (file, "the model") if config.packed else ("the model", file)
                raise CheckpointError(
                    f"{is_packed} is packed and {other} is not: hf_daq.from_pretrained opens both kinds"
                )
            if bits != (layer.weight_bits, layer.input_bits):
                raise CheckpointError(
                    f"{file} has {name!r} with {bits[0]}-bit weights and {bits[1] or 'float'} inputs, the model with "
                    f"{layer.weight_bits} and {layer.input_bits or 'float'}: apply_daq(model, ...) as it was quantized, or "
                    "hf_daq.from_pretrained"
                )
    for name, module in modules.items():
        if isinstance(module, ActivationQuantizer) and f"{name}.upper" in shapes:
            module.divide_by(shapes.get(f"{name}.smooth"))


def guard_diffusers() -> None:
    """`ModelMixin.save_pretrained` refuses quantized models, which diffusers would open in float."""
    mixin = sys.modules["diffusers.models.modeling_utils"].ModelMixin
    save_pretrained: Any = mixin.save_pretrained

    @wraps(save_pretrained)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "daq_config" in vars(self):
            from ..errors import ModelError

            kind = type(self).__name__
            raise ModelError(
                f"{kind}.save_pretrained would write a folder that diffusers opens in float: write hf_daq.save_pretrained(model, "
                f"directory), and open it with hf_daq.from_pretrained(directory, model={kind}.from_config(config))"
            )
        _refuse_parts(self)
        return save_pretrained(self, *args, **kwargs)

    mixin.save_pretrained = save


def _refuse_parts(model: Any) -> None:
    if _has_quantized_layers(model) or any("daq_config" in vars(module) for module in model.modules()):
        from ..errors import ModelError
        from ..model.unchanged import refusal_of_parts

        if refusal := refusal_of_parts(model):
            raise ModelError(refusal)


def _has_quantized_layers(model: Any) -> bool:
    return any(hasattr(module, "daq_name") for module in model.modules())


def guard_fusion() -> None:
    """torch's fusion with a BatchNorm refuses quantized layers, whose bounds would not fit the new weights."""
    for name in ("fuse_conv_bn_eval", "fuse_linear_bn_eval"):
        _guard("torch.nn.utils.fusion", name, _float_layers_alone)


def _float_layers_alone(fuse: Callable[..., Any]) -> Callable[..., Any]:
    def fuse_float(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(layer, "daq_name"):
            from ..errors import ModelError

            raise ModelError(
                f"{fuse.__name__} would change the weight of the quantized layer {layer.daq_name!r} and not its bounds: fuse the "
                "float model, then apply_daq and calibrate"
            )
        return fuse(layer, *args, **kwargs)

    return fuse_float


def guard_ultralytics() -> None:
    """`fuse`, which predicting calls, leaves a quantized model as it is: it would put float layers into it."""
    base = sys.modules["ultralytics.nn.tasks"].BaseModel
    fuse: Any = base.fuse

    @wraps(fuse)
    def fuse_float(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self if _has_quantized_layers(self) else fuse(self, *args, **kwargs)

    base.fuse = fuse_float
