"""timm hears of the architecture `hf_daq` when it is loaded, transformers of the quantizer `daq` when it loads its own, PEFT
of adapters for quantized layers when it loads its own; huggingface_hub opens quantized models; and what would write or compute
something else than the quantized model refuses it: saving in transformers and diffusers, fusing in timm, torch, ultralytics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _WhenLoaded(MetaPathFinder):
    """Finds a module as others would have, and calls something after it was executed."""

    def __init__(self, name: str, register: Callable[[], None]) -> None:
        self.name, self.register, self.searching = name, register, False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self.searching = False
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                if self in sys.meta_path:  # a spec may be looked for without being executed
                    sys.meta_path.remove(self)
                execute(module)
                self.register()

            loader.exec_module = execute_and_register
        return spec


def _register_with_timm() -> None:
    from timm.models import _manipulate, register_model

    register_model(hf_daq)
    fuse: Any = getattr(_manipulate, "reparameterize_model", None)
    if fuse is not None:  # in older releases it is elsewhere
        guarded = wraps(fuse)(_before_apply(fuse))
        for module in (_manipulate, sys.modules["timm.models"]):
            setattr(module, fuse.__name__, guarded)


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


def hf_daq(*args: Any, **kwargs: Any) -> Any:
    """The architecture of timm's factory that rebuilds saved models: `integrations.timm.build`."""
    from .timm import build

    return build(*args, **kwargs)


def _register_with_transformers() -> None:
    from . import transformers  # noqa: F401


def _guard_transformers() -> None:
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
    load: Any = getattr(modeling_utils.PreTrainedModel, "_load_pretrained_model", None)
    if load is not None:
        modeling_utils.PreTrainedModel._load_pretrained_model = staticmethod(_refuse_quantized_files(load))


def _refuse_quantized_files(load: Callable[..., Any]) -> Callable[..., Any]:
    """`from_pretrained` with a config that does not say that the files are quantized would open them in float, and packed ones
    with random weights."""

    @wraps(load)
    def load_what_is_described(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        files = [str(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        if files and not _has_quantized_layers(model):
            from safetensors import safe_open

            from ..errors import CheckpointError
            from ..files.header import METADATA_KEY

            with safe_open(files[0], framework="pt") as file:
                if METADATA_KEY in (file.metadata() or {}):
                    raise CheckpointError(
                        f"{files[0]} is quantized, and the config that was given does not say so: leave it out, or take that of "
                        "the folder, config = AutoConfig.from_pretrained(folder)"
                    )
        return load(model, state_dict, checkpoint_files, *args, **kwargs)

    return load_what_is_described


def _guard_diffusers() -> None:
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


def _register_with_hub_mixin() -> None:
    from . import hub_mixin

    hub_mixin.register()


def _guard_fusion() -> None:
    """torch's fusion with a BatchNorm refuses quantized layers, whose bounds would not fit the new weights."""
    for name in ("fuse_conv_bn_eval", "fuse_linear_bn_eval"):
        for module in (sys.modules["torch.nn.utils.fusion"], sys.modules.get("torch.nn.utils")):
            if hasattr(module, name):
                setattr(module, name, _float_layers_alone(getattr(module, name)))


def _float_layers_alone(fuse: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fuse)
    def fuse_float(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(layer, "daq_name"):
            from ..errors import ModelError

            raise ModelError(
                f"{fuse.__name__} would change the weight of the quantized layer {layer.daq_name!r} and not its bounds: fuse the "
                "float model, then apply_daq and calibrate"
            )
        return fuse(layer, *args, **kwargs)

    return fuse_float


def _guard_ultralytics() -> None:
    """`fuse`, which predicting calls, leaves a quantized model as it is: it would put float layers into it."""
    base = sys.modules["ultralytics.nn.tasks"].BaseModel
    fuse: Any = base.fuse

    @wraps(fuse)
    def fuse_float(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self if _has_quantized_layers(self) else fuse(self, *args, **kwargs)

    base.fuse = fuse_float


def _register_with_peft() -> None:
    from . import peft_hooks

    peft_hooks.register()


for _name, _register in (
    ("timm", _register_with_timm),
    ("transformers.quantizers.auto", _register_with_transformers),
    ("transformers.modeling_utils", _guard_transformers),
    ("peft.peft_model", _register_with_peft),
    ("huggingface_hub.hub_mixin", _register_with_hub_mixin),
    ("diffusers.models.modeling_utils", _guard_diffusers),
    ("torch.nn.utils.fusion", _guard_fusion),
    ("ultralytics.nn.tasks", _guard_ultralytics),
):
    if _name in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenLoaded(_name, _register))
