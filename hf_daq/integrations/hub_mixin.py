"""huggingface_hub: a quantized model of a class that is a `PyTorchModelHubMixin` saves itself, and its class opens it, as in float."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import hub_mixin
from safetensors import safe_open

from ..errors import ModelError
from ..files.facts import CardFacts
from ..files.header import METADATA_KEY, WEIGHTS_NAME, read_header
from ..files.weights_file import check_values, load_weights, write_weights
from ..model.patch import patch
from ..model.unchanged import check_unchanged, refusal_of_parts
from ..nn.settle import settled


def register() -> None:
    """Give the mixin these two steps of saving and opening; it writes config.json with the arguments of the class, and the
    card, itself."""
    mixin: Any = hub_mixin.PyTorchModelHubMixin
    save, load = mixin._save_pretrained, mixin._load_as_safetensor.__func__

    @wraps(save)
    def _save_pretrained(self: Any, save_directory: Path) -> None:
        if refusal := refusal_of_parts(self):
            raise ModelError(refusal)
        if "daq_config" not in vars(self):
            save(self, save_directory)
            return
        check_unchanged(self)
        check_values(self.state_dict(), self)
        write_weights(Path(save_directory) / WEIGHTS_NAME, settled(self), self, CardFacts().with_versions())

    @wraps(load)
    def _load_as_safetensor(cls: type, model: Any, model_file: str, map_location: Any, strict: bool) -> Any:
        with safe_open(model_file, framework="pt") as file:
            quantized = METADATA_KEY in (file.metadata() or {})
        if not quantized:
            return load(cls, model, model_file, map_location, strict)
        header = read_header(Path(model_file))
        patch(model, header.config)
        load_weights(model, header, Path(model_file))
        return model.to(map_location).eval()

    mixin._save_pretrained = _save_pretrained
    mixin._load_as_safetensor = classmethod(_load_as_safetensor)
