"""huggingface_hub: a quantized model of a class that is a `PyTorchModelHubMixin` saves itself, and its class opens it, as in float."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import hub_mixin
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

from ..config import QUANT_METHOD, DaqConfig
from ..errors import CheckpointError, ConfigError, ModelError
from ..files.atomic import replace_file
from ..files.facts import CardFacts
from ..files.header import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, read_header
from ..files.weights_file import check_quantizers, check_values, load_weights, write_weights
from ..model.patch import patch, unpatch
from ..model.unchanged import check_unchanged, quantized_parts, refusal_of_parts
from ..nn.settle import settled

_CONFIG_KEY = "quantization_config"
_PARTS_KEY = "hf_daq_parts"
"""Of a model of which parts were quantized by themselves: their names and quantization configs."""


def register() -> None:
    """Let the mixin write and read the weights of quantized models so, and name the quantization in the config.json that it
    writes, beside the arguments of the class."""
    mixin: Any = hub_mixin.PyTorchModelHubMixin
    save, load = mixin._save_pretrained, mixin._load_as_safetensor.__func__
    save_all, build = mixin.save_pretrained, mixin._from_pretrained.__func__

    @wraps(save)
    def _save_pretrained(self: Any, save_directory: Path) -> None:
        whole, path = "daq_config" in vars(self), Path(save_directory) / WEIGHTS_NAME
        parts = {"": self} if whole else {name: self.get_submodule(name) for name in quantized_parts(self)}
        if not parts:
            if refusal := refusal_of_parts(self):
                raise ModelError(refusal)
            save(self, save_directory)
            return
        for part in parts.values():
            check_unchanged(part)
            check_values(part.state_dict(), part)
        if whole:
            write_weights(path, settled(self), self, CardFacts().with_versions())
            return
        for part in parts.values():
            settled(part)  # moves the weights in the model, which save_model takes
        configs = {name: part.daq_config.to_dict() for name, part in parts.items()}
        save_model(self, str(path), metadata={_PARTS_KEY: json.dumps(configs, sort_keys=True)})

    @wraps(load)
    def _load_as_safetensor(cls: type, model: Any, model_file: str, map_location: Any, strict: bool) -> Any:
        with safe_open(model_file, framework="pt") as file:
            found = file.metadata() or {}
        if METADATA_KEY in found:
            header = read_header(Path(model_file))
            _quantize(model, header.config)
            load_weights(model, header, Path(model_file))
            return model.to(map_location).eval()
        if _PARTS_KEY in found:
            parts = _quantized(model, found, model_file)
            model = load(cls, model, model_file, map_location, True)
            for part in parts:
                check_quantizers(part.state_dict(), part, model_file)
            return model
        return load(cls, model, model_file, map_location, strict)

    @wraps(save_all)
    def save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> Any:
        result = save_all(self, save_directory, **kwargs)
        if "daq_config" in vars(self):
            path = Path(save_directory) / CONFIG_NAME
            description = json.loads(path.read_text("utf-8")) if path.exists() else {}
            text = json.dumps(description | {_CONFIG_KEY: self.daq_config.to_dict()}, indent=2) + "\n"
            replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
        return result

    @wraps(build)
    def _from_pretrained(cls: Any, **kwargs: Any) -> Any:
        config = kwargs.get(_CONFIG_KEY)  # of config.json, for a class that takes any argument
        if isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD:
            del kwargs[_CONFIG_KEY]
        return build(cls, **kwargs)

    mixin.save_pretrained = save_pretrained
    mixin._from_pretrained = classmethod(_from_pretrained)  # type: ignore[arg-type]
    mixin._save_pretrained = _save_pretrained
    mixin._load_as_safetensor = classmethod(_load_as_safetensor)


def _quantize(model: nn.Module, config: DaqConfig) -> None:
    """As the file says, also where the class quantizes the model as it builds it."""
    if "daq_config" in vars(model):
        unpatch(model)
    patch(model, config)


def _quantized(model: nn.Module, metadata: Mapping[str, str], path: str) -> list[nn.Module]:
    """The parts of a model that the file names, now quantized."""
    try:
        configs = {name: DaqConfig.from_dict(values) for name, values in json.loads(metadata[_PARTS_KEY]).items()}
        parts = {name: model.get_submodule(name) for name in configs}
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} names parts that are quantized and this model does not have: {error}") from None
    for name, part in parts.items():
        _quantize(part, configs[name])
    return list(parts.values())
