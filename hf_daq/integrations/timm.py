"""timm: how a quantized timm model is described in config.json, and what rebuilds it, as the architecture `hf_daq`.

With it, `timm.create_model("local-dir:PATH" | "hf-hub:USER/NAME", pretrained=True)` opens our checkpoints.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.models import is_model
from timm.models._hub import hf_split, save_config_for_hf
from torch import nn

from ..config import DaqConfig
from ..errors import CheckpointError, ConfigError
from ..files.header import ARCHITECTURE, WEIGHTS_NAME, read_agreeing_header
from ..files.weights_file import check_fits, load_weights
from ..model.patch import patch, quantize_replaced, start_weights
from ..nn.packed import daq_layers
from .build import building

_OWN_ARGS = ("base", "base_args", "quantization_config")
_SOURCE_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
_LARGEST = 2**18
_REFUSED_ARGS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
}

_OTHER_SHAPES = {
    "in_chans": "in_chans changes the first weight: write it where the float model is created, before apply_daq",
    "img_size": "img_size changes the position embedding: open the model without it, then write model.set_input_size(img_size=...)",
}
"""What to write instead of arguments that give weights other shapes than those of the file."""


def is_timm_model(model: nn.Module) -> bool:
    """True for a model that timm's factory can build again. What `features_only` makes of one has no `num_classes`, and is a
    module of your own."""
    config = getattr(model, "pretrained_cfg", None)
    return isinstance(config, dict) and hasattr(model, "num_classes") and is_model(_base_name(model))


def describe(model: nn.Module, config: DaqConfig) -> dict[str, Any]:
    """config.json of a quantized timm model, in timm's layout, with `hf_daq` as the architecture."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        saved_args = model.__dict__.get("_model_args")
        try:
            model._model_args = {k: v for k, v in (saved_args or {}).items() if k not in _OWN_ARGS}  # type: ignore[assignment]
            save_config_for_hf(model, path)
        finally:
            if saved_args is not None:
                model._model_args = saved_args
            else:
                del model._model_args
        description: dict[str, Any] = json.loads(path.read_text())
    model_args = {
        "base": _base_name(model),
        "base_args": description.pop("model_args", {}),
        "quantization_config": config.to_dict(),
    }
    return description | {"architecture": ARCHITECTURE, "model_args": model_args}


def described_model(description: dict[str, Any]) -> nn.Module:
    """The quantized model, without its values, that a config.json of `describe` gives."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(description))
        model: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=False)
    return model


def _base_name(model: Any) -> str:
    args = getattr(model, "_model_args", {})
    return str(args.get("base") or model.pretrained_cfg.get("architecture"))


def build(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    *,
    base: str,
    quantization_config: dict[str, Any],
    base_args: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the timm model `base`, quantize it, and with `pretrained` load the checkpoint it came from.

    `num_classes` other than the saved one gives the loaded model a new classifier. If the saved one was quantized, so is
    the new one, starting from its own weights; in a packed model it is in full precision.
    """
    config = DaqConfig.from_dict(quantization_config)
    if not isinstance(base, str) or base == ARCHITECTURE or not is_model(base):
        raise CheckpointError(
            f"base={base!r} is not an architecture of this timm ({timm.__version__}); if it is your own, import the module "
            "that registers it first"
        )
    base_args = base_args or {}
    if not isinstance(base_args, dict) or _REFUSED_ARGS & base_args.keys() or _is_huge(base_args):
        raise CheckpointError(f"base_args={base_args!r} are not arguments of a model")
    source = dict(pretrained_cfg or {}) | (pretrained_cfg_overlay or {})
    plain = {key: value for key, value in source.items() if key not in _SOURCE_KEYS} | {"architecture": base}
    num_classes = kwargs.pop("num_classes", None)
    if kwargs.get("features_only"):
        raise ConfigError(
            "features_only=True takes a network apart before its weights are read; open it without, and write "
            "model.forward_intermediates(images, indices=3, intermediates_only=True) for its last three stages"
        )

    def build() -> nn.Module:
        model: nn.Module = timm.create_model(base, pretrained=False, pretrained_cfg=plain, **{**base_args, **kwargs})
        patch(model, config)
        return model

    if pretrained:
        path = _weights_file(source, cache_dir)
        header = read_agreeing_header(path, config)
        room = 2 * len(header.tensors) + 1000
        with torch.device("meta"), building(room):  # no memory for a model that the file does not fit
            described = build()
        try:
            check_fits(described, header, path)
        except CheckpointError as error:
            remedies = [f"; {remedy}" for name, remedy in _OTHER_SHAPES.items() if name in kwargs]
            raise CheckpointError("".join([str(error), *remedies])) from None
        model = build()
        load_weights(model, header, path)
        model.eval()
    else:
        model = build()
        start_weights(model)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **source, "architecture": ARCHITECTURE}  # type: ignore
    if num_classes is not None and num_classes != model.num_classes:
        before = daq_layers(model)
        model.reset_classifier(num_classes)  # type: ignore[operator]
        quantize_replaced(model, before)
    return model


def _is_huge(value: Any) -> bool:
    """Whether a number in it is one that no layer has."""
    if isinstance(value, dict | list):
        return any(map(_is_huge, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not abs(value) <= _LARGEST


def _weights_file(source: dict[str, Any], cache_dir: str | None) -> Path:
    if source.get("source") == "local-dir" and source.get("file"):
        return Path(source["file"]) / WEIGHTS_NAME
    if source.get("hf_hub_id"):
        repository, revision = hf_split(source["hf_hub_id"])
        return Path(hf_hub_download(repository, WEIGHTS_NAME, revision=revision, cache_dir=cache_dir))
    raise ConfigError(
        "hf_daq is the architecture of saved checkpoints; "
        'write timm.create_model("local-dir:PATH" or "hf-hub:USER/NAME", pretrained=True)'
    )
